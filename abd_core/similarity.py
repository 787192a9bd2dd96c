"""What adversarial and triggered images have in common: the analysis of the paper's Fig. 2, and two looks beyond it.

Whoever runs it knows the trigger and the target. It comes after the fact, and no defence reads anything of it.

"Original" images are the test set's own, "backdoor" images carry the trigger, "adversarial" images the perturbation.
Features are unit rows, float (N, D); labels are class indices (N,), and images of one class form a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import open_clip
import pandas as pd
import torch

from abd_core.config import ConfigError
from abd_core.data import TestSet, rng
from abd_core.evaluate import image_features, rate

Change = Callable[[torch.Tensor], torch.Tensor]


class Pairing(NamedTuple):
    """Images and captions that are held against each other; `paper` is Fig. 2's 100 x cosine, NaN where it has none."""

    images: str
    captions: str
    paper: float


PAIRINGS = {
    "original image, original caption": Pairing("original", "original", 25.02),
    "backdoor image, backdoor caption": Pairing("backdoor", "backdoor", 28.49),
    "adversarial image, original caption": Pairing("adversarial", "original", 19.82),
    "adversarial image, backdoor caption": Pairing("adversarial", "backdoor", 16.04),
    "adversarial image, unrelated caption": Pairing("adversarial", "unrelated", 5.04),
    # Not in the paper: what an image has in common with the backdoor caption before it is perturbed.
    "original image, backdoor caption": Pairing("original", "backdoor", math.nan),
}
# The paper's order, as comparisons of neighbours; then what a perturbation that draws images to the target must do.
_RANKED = sorted((name for name in PAIRINGS if PAIRINGS[name].paper > 0), key=lambda name: -PAIRINGS[name].paper)
COMPARISONS = (*pairwise(_RANKED), ("adversarial image, backdoor caption", "original image, backdoor caption"))


class Estimate(NamedTuple):
    """A measured number with its 95 % interval."""

    value: float
    ci_low: float
    ci_high: float

    @property
    def positive(self) -> str:
        """Is it above 0? "yes" or "no" where the interval lies wholly on one side of 0, else "open"."""
        return "yes" if self.ci_low > 0 else "no" if self.ci_high < 0 else "open"


def jackknife(
    statistic: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, clusters: torch.Tensor, *, z: float = 1.96
) -> Estimate:
    """A smooth function of the mean row, with the interval of the jackknife that leaves out a cluster at a time.

    Half its width is z sqrt((G - 1) / G sum_g (s_g - mean s)^2), where s_g is the statistic without cluster g of G
    (Efron and Stein 1981). For the mean of single trials that is the textbook's z s / sqrt(n): too narrow for few
    clusters, of which Student's distribution would ask for more.

    Args:
        statistic: maps mean rows (..., P) to (...).
        rows: float (N, P).
        clusters: int (N,), which rows belong together.

    Raises:
        ValueError: there are fewer than two clusters.
    """
    groups, member = torch.unique(clusters, return_inverse=True)
    count = len(groups)
    if count < 2:
        raise ValueError(f"jackknife: {count} cluster(s), at least 2 expected")
    rows = rows.double()
    sums = torch.zeros(count, rows.shape[1], dtype=torch.double).index_add_(0, member, rows)
    sizes = torch.bincount(member)[:, None]
    without = statistic((sums.sum(0) - sums) / (len(rows) - sizes))
    half = z * ((count - 1) * without.var(correction=0)).sqrt().item()
    value = statistic(rows.mean(0)).item()
    return Estimate(value, value - half, value + half)


def clustered_mean(values: torch.Tensor, clusters: torch.Tensor) -> Estimate:
    """The mean of `values`, float (N,), with its 95 % interval for a clustered sample."""
    return jackknife(lambda row: row[..., 0], values[:, None], clusters)


def _measures(estimates: Mapping[str, Estimate], n: int) -> pd.DataFrame:
    return pd.DataFrame([{"measure": name, **estimate._asdict(), "n": n} for name, estimate in estimates.items()])


def features(
    model: open_clip.CLIP, test_set: TestSet, *, trigger: Change, perturbation: Change
) -> dict[str, torch.Tensor]:
    """Features of the test images as they are ("original"), triggered ("backdoor") and perturbed ("adversarial")."""
    changes: dict[str, Change | None] = {"original": None, "backdoor": trigger, "adversarial": perturbation}
    return {name: image_features(model, test_set, change=change) for name, change in changes.items()}


# --- Fig. 2: images and captions ----------------------------------------------------------------------------


def derangement(count: int, *, seed: int) -> torch.Tensor:
    """A seeded permutation of range(count) that leaves nothing in its place: one random cycle; int64 (count,).

    Raises:
        ValueError: `count` is below 2.
    """
    if count < 2:
        raise ValueError(f"derangement of {count}: at least 2 expected")
    cycle = torch.randperm(count, generator=rng(seed, "derangement"))
    return cycle[(cycle.argsort() + 1) % count]


def cosines(
    images: Mapping[str, torch.Tensor], prompts: torch.Tensor, labels: torch.Tensor, *, target: int, seed: int
) -> pd.DataFrame:
    """100 x cosine of every image with a caption, for each of `PAIRINGS`.

    Images of the target class are left out: their original captions are backdoor captions. An image has one seeded
    template for all its captions, which name its class ("original"), the target ("backdoor"), or another class that is
    not the target ("unrelated"; a seeded derangement of the classes, so that each is named as often as before).

    Args:
        images: what `features` returns.
        prompts: `evaluate.prompt_features` of the classes' names, (K, T, D).
        target: index of the target class.

    Returns:
        A row a pairing and image: `pairing`, `image` (its row in `features`), `label`, `cosine` in [-100, 100].

    Raises:
        ConfigError: there are images of fewer than two classes beside the target.
    """
    kept = (labels != target).nonzero().flatten()
    own = labels[kept]
    groups, member = own.unique(return_inverse=True)
    if len(groups) < 2:
        raise ConfigError(f"unrelated captions: images of {len(groups)} classes beside the target, at least 2 expected")
    named = {
        "original": own,
        "backdoor": torch.full_like(own, target),
        "unrelated": groups[derangement(len(groups), seed=seed)[member]],
    }
    template = torch.randint(prompts.shape[1], (len(kept),), generator=rng(seed, "caption template"))
    prompts = prompts.cpu()
    parts = []
    for name, pairing in PAIRINGS.items():
        cosine = 100 * (images[pairing.images][kept] * prompts[named[pairing.captions], template]).sum(1)
        parts.append(pd.DataFrame({"pairing": name, "image": kept, "label": own, "cosine": cosine}))
    return pd.concat(parts, ignore_index=True)


def means(table: pd.DataFrame) -> pd.DataFrame:
    """A row a pairing of `cosines`: `pairing`, `value` (the mean) with `ci_low` and `ci_high`, `n`, and `paper`."""
    rows = []
    for name, pairing in PAIRINGS.items():
        part = table[table["pairing"] == name]
        estimate = clustered_mean(torch.tensor(part["cosine"].to_numpy()), torch.tensor(part["label"].to_numpy()))
        rows.append({"pairing": name, **estimate._asdict(), "n": len(part), "paper": pairing.paper})
    return pd.DataFrame(rows)


def orderings(table: pd.DataFrame) -> pd.DataFrame:
    """Whether the paper's order of the pairings holds: a row for each of `COMPARISONS`.

    The differences are paired: each image is compared with itself.

    Returns:
        `higher` and `lower` (in the paper), `paper` (its difference, NaN for the comparison that it does not make),
        `value` (the mean difference) with `ci_low` and `ci_high`, `n`, and `holds` (`Estimate.positive`).
    """
    wide = table.pivot(index=["image", "label"], columns="pairing", values="cosine")
    labels = torch.tensor(wide.index.get_level_values("label").to_numpy())
    rows = []
    for higher, lower in COMPARISONS:
        estimate = clustered_mean(torch.tensor((wide[higher] - wide[lower]).to_numpy()), labels)
        rows.append(
            {
                "higher": higher,
                "lower": lower,
                "paper": PAIRINGS[higher].paper - PAIRINGS[lower].paper,
                **estimate._asdict(),
                "n": len(wide),
                "holds": estimate.positive,
            }
        )
    return pd.DataFrame(rows)


# --- The space of image features ----------------------------------------------------------------------------


def pca(points: torch.Tensor, components: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components: coordinates (N, `components`) of points (N, D), and each axis' share of the variance.

    An axis' sign is free; it is chosen so that its largest entry is positive.
    """
    centred = points.double() - points.double().mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:components]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return centred @ (signs * axes).T, sizes[:components].square() / sizes.square().sum()


def shifts(images: Mapping[str, torch.Tensor], labels: torch.Tensor) -> pd.DataFrame:
    """How far the perturbation moves features the way the trigger does: a row a measure, with its 95 % interval.

    - "cosine of the mean shifts": between the means over images of (backdoor - original) and of (adversarial -
      original), what is common to all images; 1 is the trigger's own direction.
    - "cosine gained with the backdoor image": the mean over images of the cosine of an adversarial image with the
      backdoor image of the same original, less that of the original itself; above 0 where the perturbation takes images
      towards where the trigger takes them.
    - "length, backdoor" and "length, adversarial": of the mean shifts.

    Args:
        images: what `features` returns.

    Returns:
        `measure`, `value`, `ci_low`, `ci_high`, `n`.
    """
    original, backdoor, adversarial = (images[name] for name in ("original", "backdoor", "adversarial"))
    both = torch.cat([backdoor - original, adversarial - original], 1)
    width = original.shape[1]

    def cosine(row: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(row[..., :width], row[..., width:], dim=-1)

    estimates = {
        "cosine of the mean shifts": jackknife(cosine, both, labels),
        "cosine gained with the backdoor image": clustered_mean(((adversarial - original) * backdoor).sum(1), labels),
        "length, backdoor": jackknife(lambda row: row[..., :width].norm(dim=-1), both, labels),
        "length, adversarial": jackknife(lambda row: row[..., width:].norm(dim=-1), both, labels),
    }
    return _measures(estimates, len(labels))


# --- The set of captions: where adversarial images go -------------------------------------------------------


def drift(
    before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor, class_names: tuple[str, ...]
) -> pd.DataFrame:
    """To which classes images move: a row a class, the one that most move to first.

    Args:
        before, after: the model's answers to the original and to the changed images, class indices (N,).

    Returns:
        `name`; `value`, the share of all images that are taken for the class after the change and were not before, with
        `ci_low` and `ci_high` (`evaluate.rate`, clusters are true classes); `n`; `rank`, where ties count against the
        class, with `rank_low` and `rank_high`. These bound the ranks of all classes together at 95 % (Klein, Wright and
        Wieczorek 2020): a class is surely behind those whose interval lies wholly above its own, all intervals being
        taken at the level 0.95^(1/K).
    """
    hits = [(after != before) & (after == index) for index in range(len(class_names))]
    table = pd.DataFrame([vars(rate(hit, labels)) for hit in hits])
    table.insert(0, "name", class_names)
    table["rank"] = table["value"].rank(method="max", ascending=False).astype(int)
    z = NormalDist().inv_cdf((1 + 0.95 ** (1 / len(class_names))) / 2)
    joint = [rate(hit, labels, z=z) for hit in hits]
    table["rank_low"] = [1 + sum(other.ci_low > own.ci_high for other in joint) for own in joint]
    table["rank_high"] = [len(joint) - sum(other.ci_high < own.ci_low for other in joint) for own in joint]
    return table.sort_values("rank", kind="stable", ignore_index=True)


def drift_measures(
    before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor, *, classes: int, target: int
) -> pd.DataFrame:
    """The drift in a few numbers, a row each with its 95 % interval: `measure`, `value`, `ci_low`, `ci_high`, `n`.

    - "answers changed, %": images with another answer than before.
    - "moved to the target, %": those among all images whose new answer is the target.
    - "entropy before, bits" and "entropy after, bits": of the histogram of all answers; 0 where all are alike, log2(K)
      where all K classes are named equally often.
    """

    def percent(hits: torch.Tensor) -> Estimate:
        measured = rate(hits, labels)
        return Estimate(100 * measured.value, 100 * measured.ci_low, 100 * measured.ci_high)

    def entropy(answers: torch.Tensor) -> Estimate:
        rows = torch.nn.functional.one_hot(answers, classes)
        return jackknife(lambda row: torch.special.entr(row).sum(-1) / math.log(2), rows, labels)

    moved = after != before
    estimates = {
        "answers changed, %": percent(moved),
        "moved to the target, %": percent(moved & (after == target)),
        "entropy before, bits": entropy(before),
        "entropy after, bits": entropy(after),
    }
    return _measures(estimates, len(labels))
