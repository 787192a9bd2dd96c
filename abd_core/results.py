"""The table of results: read and checked, means over seeds, paired differences, the Pareto front.

Two kinds of spread must not be taken for each other. The interval in a row of the table is about the *test images* of
one run: what other images might have given. An interval over seeds is about the *runs*: a seed draws the poisoned
pairs, the victim, the defender's pairs and every batch, and all of them are measured on the same test images.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from abd_core import escape
from abd_core.config import AbdError, Config, option
from abd_core.data import TEST_VENDORS
from abd_core.defences import DEFENCES
from abd_core.paths import RunError, data_dir, regular, root
from abd_core.triggers import TRIGGERS

METRICS = {
    "ca_top1": "CA",
    "ca_top5": "CA top-5",
    "ca_top10": "CA top-10",
    "asr": "ASR",
    "asr_all": "ASR, all images",
    "ra": "RA",
}
VICTIM = "none"  # the defence of rows that measure the victim itself
CONTROLS = ("noise patch", "random erasing", "Gaussian noise")
MOST_CA_LOST = 0.05  # below the victim's CA: the aim of a defence, and the rule by which its settings are chosen
TO_BEAT = ("CleanCLIP", "PAR", "random erasing")  # whose ASR a defence is to go below
LEVEL = 0.95  # of the intervals over seeds
_ORDER = {  # of the rows; labels that are not here come after these, in the order of the file
    "attack": [kind.title for kind in TRIGGERS.values()],
    "defence": [VICTIM, *(kind.title for kind in DEFENCES.values())],
    "metric": list(METRICS),
}


class ResultsError(AbdError):
    """A table of results lacks a column, or holds a value or a row that cannot be."""


@dataclass(frozen=True, kw_only=True)
class ResultsConfig(Config):
    """Which results a chapter shows."""

    results: str = option("", "path of a results CSV; empty: the committed one")
    split: str = option(
        "eval", "test split: results are reported on eval, settings chosen on dev", choices=TEST_VENDORS
    )

    @property
    def path(self) -> Path:
        return Path(self.results) if self.results else data_dir() / "results" / "grid.csv"


@dataclass(frozen=True, kw_only=True)
class BenchmarksConfig(Config):
    """Which measurements of speed a chapter shows."""

    benchmarks: str = option("", "path of a CSV that `make bench` wrote; empty: the committed one")

    @property
    def path(self) -> Path:
        return Path(self.benchmarks) if self.benchmarks else root() / "benchmarks" / "results.csv"


def read_benchmarks(path: Path) -> pd.DataFrame:
    """Figures of the benchmarks, a row each (see `benchmarks/measure.py`); NaN where there is no ratio or interval.

    Raises:
        RunError: there is no such file.
        ResultsError: it is another kind of table.
    """
    regular(path)
    ratios = ("ratio", "ratio_low", "ratio_high")
    try:
        table = pd.read_csv(path, dtype={"value": float, **dict.fromkeys(ratios, float), "n": int})
    except ValueError as error:
        raise ResultsError(f"{path}: {error}") from None
    missing = {"benchmark", "device", "case", "variant", "metric", "value", "unit", *ratios, "n"} - set(table.columns)
    if missing:
        raise ResultsError(f"{path}: columns missing: {', '.join(sorted(missing))}")
    return table


def number(low: float, high: float = math.inf, *, kind: type = float, empty: bool = False) -> Callable[[str], Any]:
    """Reads a finite number in [low, high], or NaN where the text may be empty and is."""

    def read(text: str) -> Any:
        if empty and not text:
            return math.nan
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise ValueError
        return value

    return read


def _one_of(known: Iterable[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError
        return text

    return read


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text


Columns = Mapping[str, tuple[Callable[[str], Any], str]]  # column -> how its text is read, and what is allowed
COLUMNS: Columns = {
    "attack": (_name, "a name"),
    "defence": (_name, "a name"),
    "seed": (number(0, kind=int), "a whole number ≥ 0"),
    "split": (_one_of(TEST_VENDORS), f"one of {', '.join(TEST_VENDORS)}"),
    "metric": (_one_of(METRICS), f"one of {', '.join(METRICS)}"),
    "value": (number(0, 1), "a share in [0, 1]"),
    "n": (number(1, kind=int), "a whole number ≥ 1"),
    "ci_low": (number(0, 1), "a share in [0, 1]"),
    "ci_high": (number(0, 1), "a share in [0, 1]"),
    "paper_value": (number(0, 1, empty=True), "a share in [0, 1] or nothing"),
    "seconds": (number(0, empty=True), "a number ≥ 0 or nothing"),
    "device": (str, ""),
    "versions": (str, ""),
    "git_sha": (str, ""),
    "run_id": (str, ""),
}


def read_results(path: Path) -> pd.DataFrame:
    """The rows of a results CSV, columns as in `COLUMNS`; what may be empty is NaN there.

    Whatever the file's order, attacks and defences come in that of their registries, the victim first, and then others
    that the file has. All that is made from the rows keeps their order.

    Raises:
        RunError: the file is missing or no CSV text.
        ResultsError: a column is missing, a value is not allowed, a measurement is there twice, or rows of the same
            attack, defence and metric name different values of the paper. The line is named.
    """
    rows = read_rows(path, COLUMNS, key=("attack", "defence", "seed", "split", "metric"))
    stated: dict[tuple, tuple[float, int]] = {}
    for line, row in rows.items():
        if not math.isnan(paper := row["paper_value"]):
            value, earlier = stated.setdefault((row["attack"], row["defence"], row["metric"]), (paper, line))
            if value != paper:
                raise ResultsError(f"{path}, line {line}: paper_value = {paper}: {value} in line {earlier}")
    return _in_order(pd.DataFrame(rows.values()))


def read_rows(path: Path, columns: Columns, *, key: Iterable[str]) -> dict[int, dict[str, Any]]:
    """The rows of a CSV of measurements by their lines, with the columns `columns`; others are left out.

    Raises:
        RunError: the file is missing or no CSV text.
        ResultsError: a column is missing, there are no rows, a value is not allowed or outside its interval, or a
            measurement, which the columns `key` name, is there twice. The line is named.
    """
    regular(path)
    try:
        with path.open(newline="", encoding="utf-8") as f:
            reader = csv.reader(f, strict=True)
            lines = [(reader.line_num, fields) for fields in reader if fields]
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"damaged file: {path}: no CSV ({error})") from None
    header = lines[0][1] if lines else []
    if missing := [name for name in columns if name not in header]:
        raise ResultsError(f"{path}: no column {', '.join(map(repr, missing))}; needed: {', '.join(columns)}")
    if len(lines) == 1:
        raise ResultsError(f"{path}: no rows")
    rows = {number: _row(fields, header, columns, f"{path}, line {number}") for number, fields in lines[1:]}
    first: dict[tuple, int] = {}
    for number, row in rows.items():
        measured = tuple(row[name] for name in key)
        if (earlier := first.setdefault(measured, number)) != number:
            raise ResultsError(f"{path}, line {number}: measured twice, see line {earlier}: {measured}")
    return rows


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    ranks = {}
    for name, known in _ORDER.items():
        labels = table[name].unique()
        first = [label for label in known if label in labels]
        ranks[name] = {label: i for i, label in enumerate([*first, *(label for label in labels if label not in first)])}
    return table.sort_values(
        [*ranks, "seed"], key=lambda column: column.map(ranks.get(column.name, lambda seed: seed)), ignore_index=True
    )


def _row(fields: list[str], header: list[str], columns: Columns, where: str) -> dict[str, Any]:
    if len(fields) != len(header):
        raise ResultsError(f"{where}: {len(header)} fields expected, not {len(fields)}")
    texts, row = dict(zip(header, fields, strict=True)), {}
    for name, (read, allowed) in columns.items():
        try:
            row[name] = read(texts[name])
        except ValueError:
            raise ResultsError(f"{where}: {name} = {texts[name]!r}: {allowed} expected") from None
    if not row["ci_low"] <= row["value"] <= row["ci_high"]:
        raise ResultsError(f"{where}: value = {row['value']}: outside [ci_low, ci_high]")
    return row


def half_width(sd: pd.Series, count: pd.Series) -> pd.Series:
    """Half the t-interval of a mean of `count` values with standard deviation `sd`; NaN for fewer than two."""
    return stdtrit((count - 1).where(count > 1), (1 + LEVEL) / 2) * sd / np.sqrt(count)


def _refuse_repeated_seeds(results: pd.DataFrame) -> None:
    if results.duplicated(["attack", "defence", "metric", "seed"]).any():
        raise ValueError("a seed is there twice: choose the rows of one split")


def means(results: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, a row a cell of the grid.

    Args:
        results: rows of one split, as `read_results` gives them.

    Returns:
        index (attack, defence, metric), in the order of first appearance; columns, shares: `mean`, `half` (half the
        t-interval over the seeds, NaN for a single one), `ci_low` and `ci_high` (mean ± half, *not* cut off at 0 and 1;
        for a single seed the run's own interval), `seeds` (their number), `paper` (NaN where the paper has none).

    Raises:
        ValueError: a seed is there twice.
    """
    _refuse_repeated_seeds(results)
    table = results.groupby(["attack", "defence", "metric"], sort=False).agg(
        mean=("value", "mean"),
        sd=("value", "std"),
        seeds=("value", "size"),
        ci_low=("ci_low", "first"),
        ci_high=("ci_high", "first"),
        paper=("paper_value", "first"),
    )
    table["half"] = half_width(table.pop("sd"), table["seeds"])
    several = table["seeds"] > 1
    table["ci_low"] = table["ci_low"].mask(several, table["mean"] - table["half"])
    table["ci_high"] = table["ci_high"].mask(several, table["mean"] + table["half"])
    return table


def differences(
    results: pd.DataFrame,
    pairs: Iterable[tuple[str, str]],
    metrics: Iterable[str] = ("ca_top1", "asr"),
    *,
    again: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One defence minus another, paired by seed: both met victims of the same draws, so that their luck falls out.

    On one machine that is the very same victim. Another machine makes it anew from the same draws with other rounding,
    which training amplifies (see `replication`); such pairs are counted.

    Args:
        results: rows of one split, as `read_results` gives them.
        pairs: (defence, against) each.
        again: rows of the same jobs from another machine. Where two runs of `results` are of two machines, and one of
            them was made on the other's as well, that one stands in.

    Returns:
        a row a pair, attack and metric that both have been measured on; columns `defence`, `against`, `attack`,
        `metric`; shares `difference`, `ci_low`, `ci_high` (t-interval over the seeds, NaN for a single one), `paper`
        (the paper's difference, NaN where it has none); `seeds` (how many pairs of runs) and `two_machines` (how many
        of these pairs have one run on another machine than the other); `side`: lower, higher, "too
        close to tell" (the interval contains 0) or "too few seeds" (no interval); `verdict`, "" where the paper has no
        difference: agrees or disagrees (in its sign), or the side where that is neither lower nor higher.

    Raises:
        ValueError: a seed is there twice.
    """
    _refuse_repeated_seeds(results)
    if again is not None:
        _refuse_repeated_seeds(again)
        results = pd.concat([results, again[again["run_id"].isin(results["run_id"])]])
    wanted = results[results["metric"].isin(list(metrics))]
    ours = pd.DataFrame(list(pairs), columns=["defence", "against"], dtype=str).merge(wanted, on="defence")
    theirs = wanted.rename(columns={"defence": "against"})
    both = ours.merge(theirs, on=["against", "attack", "metric", "seed"], suffixes=("", "_against"))
    both["difference"] = both["value"] - both["value_against"]
    both["paper"] = both["paper_value"] - both["paper_value_against"]
    both["two_machines"] = both["device"] != both["device_against"]
    # Of a seed's pairs, with `again` more than one: the first of one machine, else that of `results` itself.
    cell = ["defence", "against", "attack", "metric", "seed"]
    both = both.sort_values("two_machines", kind="stable").drop_duplicates(cell).sort_index()
    table = both.groupby(["defence", "against", "attack", "metric"], sort=False, as_index=False).agg(
        difference=("difference", "mean"),
        sd=("difference", "std"),
        seeds=("seed", "size"),
        two_machines=("two_machines", "sum"),
        paper=("paper", "first"),
    )
    half = half_width(table.pop("sd"), table["seeds"])
    table["ci_low"], table["ci_high"] = table["difference"] - half, table["difference"] + half
    above, below = table["ci_low"] > 0, table["ci_high"] < 0
    sides = np.select([table["seeds"] < 2, above, below], ["too few seeds", "higher", "lower"], "too close to tell")
    same = (above & (table["paper"] > 0)) | (below & (table["paper"] < 0))
    verdicts = np.where(above | below, np.where(same, "agrees", "disagrees"), sides)
    return table.assign(side=sides, verdict=np.where(table["paper"].isna(), "", verdicts))


def replication(
    results: pd.DataFrame, again: pd.DataFrame, metrics: Iterable[str] = ("ca_top1", "asr")
) -> pd.DataFrame:
    """How far two runs of a cell lie apart: of one seed on two machines, and of two seeds on one machine.

    The draws of a seed are the same on all machines; rounding is not. What two machines differ by is what a seed's
    figures are worth to the last digit, and what two seeds differ by is all that a seed draws besides.

    Args:
        results: rows of one split, as `read_results` gives them.
        again: rows of the same cells from another machine; others are left out.

    Returns:
        a row an attack and metric, index (attack, metric); columns `runs` (how many were made twice), and in shares
        `bias` (mean of `again` minus `results`), `machines` and `seeds` (root mean square difference of two runs, over
        all defences; NaN where there is no second run).

    Raises:
        ValueError: a seed is there twice.
    """
    _refuse_repeated_seeds(results)
    _refuse_repeated_seeds(again)
    cell = ["attack", "metric", "defence"]
    both = results[results["metric"].isin(list(metrics))].merge(again, on=[*cell, "seed"], suffixes=("", "_again"))
    both["bias"] = both["value_again"] - both["value"]
    both["machines"] = both["bias"] ** 2
    spread = results.merge(both[cell].drop_duplicates(), on=cell).groupby(cell, sort=False)["value"].var() * 2
    by_cell = both.groupby(["attack", "metric"], sort=False)
    table = by_cell.agg(runs=("bias", "size"), bias=("bias", "mean"), machines=("machines", "mean"))
    table["seeds"] = spread.groupby(["attack", "metric"]).mean()
    table[["machines", "seeds"]] **= 0.5
    return table


def shown_difference(row: Any) -> str:
    """A row of `differences` in points: `-8.7 [-12.0, -5.4]`, or without an interval where there is none."""
    interval = f" [{100 * row.ci_low:+.1f}, {100 * row.ci_high:+.1f}]" if row.seeds > 1 else ""
    return f"{100 * row.difference:+.1f}{interval}"


def spoken(defence: str) -> str:
    """A defence's label in a sentence of Markdown."""
    return "the victim" if defence == VICTIM else escape.markdown(defence)


def runs_behind(row: Any) -> str:
    """How many pairs of runs a row of `differences` rests on, and how many of them are of two machines."""
    return f"seeds: {row.seeds}" + (f", {row.two_machines} of them on two machines" if row.two_machines else "")


def claims(table: pd.DataFrame) -> list[str]:
    """A sentence, in Markdown, for each row of `differences` on which the paper has a word."""

    def sentence(row: Any) -> str:
        defence, against = spoken(row.defence), spoken(row.against)
        relation = "the same {} as" if row.paper == 0 else f"a {'lower' if row.paper < 0 else 'higher'} {{}} than"
        attack = escape.markdown(row.attack)
        return (
            f"**{row.verdict}**: in the paper, on *{attack}*, {defence} has {relation.format(METRICS[row.metric])} "
            f"{against} ({100 * row.paper:+.2f} points); here {shown_difference(row)} ({runs_behind(row)})"
        )

    return [sentence(row) for row in table[table["verdict"] != ""].itertuples()]


def findings(table: pd.DataFrame) -> list[str]:
    """A sentence, in Markdown, for each pair and metric in `differences`: on which attacks which side it is on."""
    lines = []
    table = table.assign(runs=[runs_behind(row) for row in table.itertuples()])
    for (defence, against, metric), part in table.groupby(["defence", "against", "metric"], sort=False):
        sides = part.groupby(["side", "runs"], sort=False)["attack"]
        told = "; ".join(
            f"**{side}** on {', '.join(f'*{escape.markdown(attack)}*' for attack in attacks)} ({runs})"
            for (side, runs), attacks in sides
        )
        lines.append(f"{METRICS[metric]} of {escape.markdown(defence)} against that of {spoken(against)}: {told}")
    return lines


def aims(results: pd.DataFrame, defences: Iterable[str]) -> pd.DataFrame:
    """What a defence is to reach: little CA lost, and an ASR below that of each of `TO_BEAT`. By means over seeds.

    Args:
        results: rows of one split, as `read_results` gives them.
        defences: none of `TO_BEAT`.

    Returns:
        index (defence, attack), where defence and victim have been measured; columns, shares: `lost` (the victim's CA
        minus the defence's), `asr`, and for each of `TO_BEAT` the defence's ASR minus its own (NaN: not measured).
        Differences are over the seeds that both sides have.

    Raises:
        ValueError: a seed is there twice.
    """
    cell = ["defence", "attack"]
    apart = differences(results, [(name, against) for name in defences for against in (VICTIM, *TO_BEAT)])
    victim = apart["against"].eq(VICTIM)
    lost = -apart[victim & apart["metric"].eq("ca_top1")].set_index(cell)["difference"].rename("lost")
    asr = results[results["metric"] == "asr"].groupby(cell, sort=False)["value"].mean().rename("asr")
    rivals = apart[~victim & apart["metric"].eq("asr")].pivot(index=cell, columns="against", values="difference")
    return lost.to_frame().join(asr).join(rivals.reindex(columns=list(TO_BEAT)))


def averages(results: pd.DataFrame, settings: Iterable[str]) -> pd.DataFrame:
    """What settings reach on average over all attacks of `results`; those that have not met all of them are left out.

    Args:
        results: rows of one split, as `read_results` gives them.
        settings: labels of defences.

    Returns:
        index: the settings; columns, shares: `ca_top1`, `asr`, and `lost`, the victims' CA minus theirs.
    """
    rows = results[results["defence"].isin([VICTIM, *settings])]
    wide = means(rows)["mean"].unstack("metric").reindex(columns=["ca_top1", "asr"])
    met = wide.groupby("defence").size()
    average = wide.groupby("defence").mean()[met == rows["attack"].nunique()].dropna()
    average["lost"] = average["ca_top1"].get(VICTIM, math.nan) - average["ca_top1"]
    return average.drop(VICTIM, errors="ignore")


def chosen(average: pd.DataFrame) -> dict[str, str]:
    """The rule of the search: of each defence's settings, the one with the lowest ASR among those that lose little CA.

    Where all lose more than `MOST_CA_LOST`, the one with the highest CA.

    Args:
        average: as `averages` returns it. A setting's defence is its label up to the first comma.
    """
    taken = {}
    for defence, rows in average.groupby(lambda label: label.split(", ")[0]):
        enough = rows[rows["lost"] <= MOST_CA_LOST]
        taken[defence] = rows["ca_top1"].idxmax() if enough.empty else enough["asr"].idxmin()
    return taken


def pareto(ca: np.ndarray, asr: np.ndarray) -> np.ndarray:
    """Which points no other point beats: at least its CA, at most its ASR, and better in one of them.

    Args:
        ca, asr: shares, float (N,).

    Returns:
        bool (N,). Points that are equal are on the front together.
    """
    front = np.zeros(len(ca), dtype=bool)
    best = (-math.inf, math.inf)  # CA and ASR of the latest point on the front
    for i in np.lexsort((asr, -ca)):  # from the highest CA down, and up in ASR where it is the same
        if asr[i] < best[1] or (ca[i], asr[i]) == best:
            front[i], best = True, (ca[i], asr[i])
    return front


def front(results: pd.DataFrame, attack: str, rivals: Iterable[str]) -> pd.DataFrame:
    """The rivals on the Pareto front of (CA up, ASR down) by their means over seeds against one attack.

    Returns:
        index: the defences, by CA from the lowest up; columns `ca_top1` and `asr`, shares.
    """
    rows = results[results["attack"].eq(attack) & results["defence"].isin(list(rivals))]
    points = means(rows)["mean"].droplevel("attack").unstack("metric").reindex(columns=["ca_top1", "asr"]).dropna()
    on_it = pareto(points["ca_top1"].to_numpy(), points["asr"].to_numpy())
    return points[on_it].sort_values(["ca_top1", "asr"])
