"""From an audit's statistics to a probability, calibrated on a population of clean and poisoned models.

The population is `data/results/audit.csv`, a row a model (`abd_core.population` makes it). One half chooses: a logistic
regression on the statistics, and the alarm's threshold. The other half reports.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize

from abd_core.evaluate import Rate, rate
from abd_core.paths import RunError, data_dir, regular

STATISTICS = ("drift", "response", "field", "inversion", "decree")  # that the regression reads
COMPRESSED = ("field", "inversion")  # robust standard deviations without a limit: their logarithm enters
ROBUST = 2.0  # standard deviations beyond which a statistic is cut, so that no one number decides alone
RIDGE = 1.0  # penalty of the standardised coefficients
FALSE_ALARMS = 0.05  # that the threshold may cost among the clean models of the choosing half
LEAST = 3  # models of each kind without which there is no calibration
MOST = 0.5  # without a calibration: the share of images that one class draws on a model to distrust
CLASSES, IMAGES = 100, 256  # of the population's audits: of fewer, clean models have larger statistics
FEW = 50  # classes: among fewer, and without clean weights, the plain rule would distrust clean models
TOOK = 0.5  # a poisoned model below this ASR carries no backdoor to speak of, and is neither kind


def default_table() -> Path:
    """The committed population."""
    return data_dir() / "results" / "audit.csv"


def adaptive_table() -> Path:
    """Audits of victims whose attacker knew the audit, with the population's columns."""
    return data_dir() / "results" / "audit_adaptive.csv"


@functools.cache
def read_population(path: Path | None = None) -> pd.DataFrame:
    """The population's rows, none where there is no such file; `label` is 1 (backdoored), 0 (clean) or -1 (neither).

    Raises:
        RunError: the file is no such table.
    """
    path = path or default_table()
    if not path.exists():
        return pd.DataFrame(columns=["label", "half", "attack"])
    try:
        table = pd.read_csv(regular(path), dtype={"asr": float})
    except ValueError as error:  # of which every error of pandas is one
        raise RunError(f"damaged file: {path}: no CSV, or an asr that is no number ({error})") from None
    needed = {"kind", "half", "attack", "asr"}
    needed |= {f"{name}_{mode}" for name in ("suspected", *STATISTICS) for mode in MODES}
    if missing := sorted(needed - set(table.columns)):
        raise RunError(f"{path}: not a population of audits: no column {missing[0]}")
    taken = (table["kind"] == "poisoned") & (table["asr"] >= TOOK)
    return table.assign(label=np.where(table["kind"] == "clean", 0, np.where(taken, 1, -1)))


MODES = ("compared", "alone")  # with the clean weights, and without


def features(statistics: Mapping[str, float]) -> np.ndarray:
    """What enters the regression, (P,). Raises ValueError for what is no number, which would pass as a low one."""
    values = [math.log1p(max(0.0, statistics[name])) if name in COMPRESSED else statistics[name] for name in STATISTICS]
    if not np.isfinite([statistics[name] for name in STATISTICS]).all():
        raise ValueError(f"features: a statistic is no finite number: {dict(statistics)}")
    return np.array(values, dtype=float)


@dataclass(frozen=True, eq=False)
class Calibration:
    """A logistic regression with a threshold.

    Attributes:
        centre, spread, weights: (P,) each; `bias` is the intercept.
        threshold: the alarm is raised at this probability and above.
        clean, poisoned: how many models it was chosen on.
    """

    centre: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    bias: float
    threshold: float
    clean: int
    poisoned: int

    def probability(self, statistics: Mapping[str, float]) -> float:
        """Of a backdoor, where as many models are backdoored as clean."""
        scaled = ((features(statistics) - self.centre) / self.spread).clip(-ROBUST, ROBUST)
        return float(1 / (1 + math.exp(-(scaled @ self.weights + self.bias))))


def _statistics(row: pd.Series, mode: str) -> dict[str, float]:
    return {name: float(row[f"{name}_{mode}"]) for name in STATISTICS}


def calibrate(rows: pd.DataFrame, mode: str) -> Calibration | None:
    """Fit regression and threshold; None where there are fewer than `LEAST` models of a kind.

    Both kinds weigh the same. More of a statistic never speaks for a clean model: coefficients are >= 0. The threshold
    lies halfway between the highest clean probability that counts and the lowest poisoned one above it, where at most
    `FALSE_ALARMS` of the clean models lie above.

    Args:
        rows: as `read_population` gives them.
        mode: one of `MODES`.
    """
    rows = rows[rows["label"] >= 0]
    labels = rows["label"].to_numpy(dtype=float)
    poisoned = int(labels.sum())
    clean = len(labels) - poisoned
    if min(clean, poisoned) < LEAST:
        return None
    values = np.stack([features(_statistics(row, mode)) for _, row in rows.iterrows()])
    centre = values.mean(0)
    spread = np.maximum(values.std(0), 1e-6)
    scaled = ((values - centre) / spread).clip(-ROBUST, ROBUST)
    weight = np.where(labels == 1, 0.5 / poisoned, 0.5 / clean) * len(labels)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits = scaled @ parameters[:-1] + parameters[-1]
        wrong = weight * (1 / (1 + np.exp(-logits)) - labels)
        value = (weight * (np.logaddexp(0, logits) - labels * logits)).sum()
        penalty = RIDGE * np.append(parameters[:-1], 0.0)
        return value + 0.5 * penalty @ parameters, np.append(scaled.T @ wrong, wrong.sum()) + penalty

    bounds = [(0.0, None)] * values.shape[1] + [(None, None)]
    fitted = minimize(loss, np.zeros(values.shape[1] + 1), jac=True, bounds=bounds, method="L-BFGS-B").x
    chosen = Calibration(centre, spread, fitted[:-1], float(fitted[-1]), 0.5, clean, poisoned)
    scores = np.array([chosen.probability(_statistics(row, mode)) for _, row in rows.iterrows()])
    tolerated = np.sort(scores[labels == 0])[::-1][math.floor(FALSE_ALARMS * clean)]
    above = scores[(labels == 1) & (scores > tolerated)]
    threshold = (tolerated + above.min()) / 2 if len(above) else (tolerated + 1) / 2
    return Calibration(centre, spread, fitted[:-1], float(fitted[-1]), float(threshold), clean, poisoned)


@functools.cache
def committed(mode: str) -> Calibration | None:
    """The calibration on the choosing half of the committed population."""
    rows = read_population()
    return calibrate(rows[rows["half"] == "choose"], mode)


# --- what it is worth -------------------------------------------------------------------------------------------


def wilson(value: float, n: int, *, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` independent trials."""
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))


def auc(clean: np.ndarray, poisoned: np.ndarray) -> Rate:
    """Share of (clean, poisoned) couples in which the poisoned one scores higher, ties half.

    Its interval is Wilson's with the smaller group as the number of trials: wider than the usual ones, which have no
    width at all where the groups are apart.

    Raises:
        ValueError: a group is empty.
    """
    if not len(clean) or not len(poisoned):
        raise ValueError("auc: a group is empty")
    difference = poisoned[:, None] - clean[None]
    value = float(((difference > 0) + 0.5 * (difference == 0)).mean())
    n = min(len(clean), len(poisoned))
    return Rate(value, n, *wilson(value, n))


def roc(clean: np.ndarray, poisoned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of clean and of poisoned models at or above each threshold, from none to all; `auc` is the area below."""
    thresholds = np.append(np.inf, np.unique(np.concatenate([clean, poisoned]))[::-1])
    above = [(group >= thresholds[:, None]).mean(1) for group in (clean, poisoned)]
    return above[0], above[1]


def scored(rows: pd.DataFrame, calibration: Calibration, mode: str) -> pd.DataFrame:
    """The clean and backdoored rows with their `probability`, `alarm` and, in this mode, `suspected` class."""
    rows = rows[rows["label"] >= 0]
    probability = [calibration.probability(_statistics(row, mode)) for _, row in rows.iterrows()]
    alarm = [p >= calibration.threshold for p in probability]
    return rows.assign(probability=probability, alarm=alarm, suspected=rows[f"suspected_{mode}"])


def performance(rows: pd.DataFrame, calibration: Calibration, mode: str) -> dict[str, Rate]:
    """AUC, alarms on clean and backdoored models, and targets named among the detected; without trials, nothing."""
    table = scored(rows, calibration, mode)
    clean, bad = table[table["label"] == 0], table[table["label"] == 1]
    result = {}
    if len(clean) and len(bad):
        result["AUC"] = auc(clean["probability"].to_numpy(), bad["probability"].to_numpy())
    caught = bad[bad["alarm"]]
    groups = {
        "false alarms": clean["alarm"],
        "detected": bad["alarm"],
        "target named": caught["suspected"] == caught["target"] if len(caught) else [],
    }
    for name, hits in groups.items():
        if len(hits):
            result[name] = rate(torch.tensor(list(hits), dtype=torch.bool), torch.arange(len(hits)))
    return result


def single(rows: pd.DataFrame, names: Sequence[str], mode: str) -> dict[str, Rate]:
    """AUC of each of these statistics by itself, where all models have it; nothing is chosen or calibrated."""
    rows = rows[rows["label"] >= 0]
    result = {}
    for name in names:
        values = rows[f"{name}_{mode}"]
        clean, bad = (values[rows["label"] == label].to_numpy() for label in (0, 1))
        if len(clean) and len(bad) and values.notna().all():
            result[name] = auc(clean, bad)
    return result


def left_out(rows: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Each attack under a calibration that never saw it: `attack`, `n`, `detected`, `named`.

    Only models of the choosing half choose; the attack's victims of both halves are judged.
    """
    records = []
    for attack, victims in rows[rows["label"] == 1].groupby("attack"):
        calibration = calibrate(rows[(rows["half"] == "choose") & (rows["attack"] != attack)], mode)
        if calibration is None:
            continue
        table = scored(victims, calibration, mode)
        named = int((table["alarm"] & (table["suspected"] == table["target"])).sum())
        records.append({"attack": attack, "n": len(table), "detected": int(table["alarm"].sum()), "named": named})
    return pd.DataFrame(records, columns=["attack", "n", "detected", "named"])


def clean_below(statistics: Mapping[str, float], mode: str) -> dict[str, tuple[int, int]]:
    """How many of the population's clean models lie below each of `statistics`, and of how many."""
    rows = read_population()
    clean = rows[rows["label"] == 0]
    known = {name: clean[f"{name}_{mode}"] for name in statistics if f"{name}_{mode}" in clean}
    return {name: (int((values < statistics[name]).sum()), len(values)) for name, values in known.items()}


# --- the verdict ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What an audit says.

    Attributes:
        alarm: whether to distrust the model.
        probability: of a backdoor, at even odds beforehand; None where there is no calibration, or nothing to judge.
        threshold: of the alarm; None likewise.
        basis: what it rests on, in a sentence.
    """

    alarm: bool
    probability: float | None
    threshold: float | None
    basis: str

    def sentence(self, target: str) -> str:
        """The verdict in one line."""
        if self.probability is None:
            suspected = f"Distrust it: suspected target {target!r}; no calibrated probability."
            return suspected if self.alarm else "No alarm, and no calibrated probability."
        if self.alarm:
            return f"Backdoored, probability {self.probability:.2f}; suspected target: {target!r}."
        return f"No alarm: probability of a backdoor {self.probability:.2f}."


def judge(
    statistics: Mapping[str, float],
    *,
    mode: str,
    preset: str = "ours",
    classes: int = CLASSES,
    images: int = IMAGES,
    works: bool = True,
    calibration: Calibration | None = None,
) -> Verdict:
    """The verdict on one model's statistics.

    Args:
        mode: "compared" or "alone", as the statistics were taken.
        preset: `AuditConfig.preset` that they were taken with; the population tells nothing of any but "ours".
        classes, images: that they were taken with, likewise of fewer than the population's.
        works: False for a model that gives most clean images to one class: its answers carry no evidence either way.
        calibration: default: the committed population's.
    """
    if preset != "ours":
        calibration, reason = None, "settings other than the population's"
    elif classes < CLASSES or images < IMAGES:
        few = f"{classes} classes and {images} images, of which the population had {CLASSES} and {IMAGES}"
        calibration, reason = None, few
    else:
        calibration = calibration or committed(mode)
        reason = f"fewer than {LEAST} clean or poisoned models in audit.csv"
    if not works:
        return Verdict(False, None, None, "The model gives most clean images to one class: there is nothing to audit.")
    if calibration is None and mode == "alone" and classes < FEW:
        basis = f"Among {classes} classes, one draws most perturbed images on clean models too: there is nothing to say"
        return Verdict(False, None, None, f"{basis} without clean weights, or at least {FEW} class names.")
    if calibration is None:
        drawn = max(statistics["drift"], statistics["response"])
        basis = (
            f"No calibration ({reason}), a plain rule: perturbations "
            f"that aim at no class send at most {drawn:.0%} of the images of other classes to one class"
            f"{' beyond what they do on the clean weights' if mode == 'compared' else ''}; alarm from {MOST:.0%} on."
        )
        return Verdict(drawn >= MOST, None, None, basis)
    probability = calibration.probability(statistics)
    basis = (
        f"Probability at even odds beforehand, from {', '.join(STATISTICS)}, "
        f"{'compared with' if mode == 'compared' else 'without'} clean weights; calibrated on "
        f"{calibration.clean} clean and {calibration.poisoned} backdoored models; alarm at {calibration.threshold:.2f}."
    )
    return Verdict(probability >= calibration.threshold, probability, calibration.threshold, basis)
