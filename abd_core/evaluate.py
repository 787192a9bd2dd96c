"""Zero-shot clean accuracy (CA), attack success rate (ASR) and robust accuracy (RA), with counts and intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from abd_core import inputs, models, ranks
from abd_core.config import ConfigError, TrainingError, option
from abd_core.data import TEST_VENDORS, TestSet, class_index
from abd_core.inputs import TestInputs
from abd_core.models import encode_image, encode_text
from abd_core.paths import Run, load_or_make, sha256
from abd_core.text import tokenize
from abd_core.triggers import load_trigger

TOP = (1, 5, 10)
PROMPTS = 2000  # encoded at a time: ImageNet has 80,000


@dataclass(frozen=True)
class Rate:
    """A measured share: `value` of `n` trials in [0, 1], with its 95 % interval."""

    value: float
    n: int
    ci_low: float
    ci_high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.ci_low:.1f}, {100 * self.ci_high:.1f}]"


def rate(hits: torch.Tensor, clusters: torch.Tensor, *, z: float = 1.96) -> Rate:
    """The share of hits with a Wilson interval at the effective sample size of a clustered sample.

    Several views of one artwork (or images of one class) are not independent trials. The variance between clusters
    gives the design effect deff >= 1 (Kish 1965), n / deff takes the place of n in Wilson's interval (1927), as
    Korn and Graubard (1998) do for the exact interval. A handful of hits tells little about that variance, so it is
    estimated with two clusters of average size added, one all hits and one all misses, as Agresti and Coull (1998) add
    trials; scaled so that clusters of single trials give n, and clusters that agree within give their number.

    Args:
        hits: bool (N,).
        clusters: int (N,), which trials belong together.

    Raises:
        ValueError: there are no trials.
    """
    n = len(hits)
    if n == 0:
        raise ValueError("rate: no trials")
    p = hits.double().mean().item()
    groups, member = torch.unique(clusters, return_inverse=True)
    k = len(groups)
    sizes = torch.bincount(member, minlength=k).double()
    counts = torch.zeros(k, dtype=torch.double).index_add_(0, member, hits.double())
    average = sizes.new_tensor([n / k])
    sizes, counts = torch.cat([sizes, average, average]), torch.cat([counts, average, 0 * average])
    share = (counts.sum() / sizes.sum()).item()
    spread = (counts - share * sizes).square().sum().item()
    effective = min(n, k / (k + 2) * share * (1 - share) * sizes.sum().item() ** 2 / spread)
    centre = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(p * (1 - p) / effective + z * z / (4 * effective**2))
    return Rate(p, n, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))  # against rounding at 0 and 1


@torch.no_grad()
def prompt_features(model: open_clip.CLIP, class_names: tuple[str, ...], templates: tuple[str, ...]) -> torch.Tensor:
    """Unit features (K, T, D) of each class's T prompts, in the model's present mode."""
    prompts = [template.format(name) for name in class_names for template in templates]
    tokens = tokenize(prompts, context_length=model.context_length)
    features = torch.cat([encode_text(model, part) for part in tokens.split(PROMPTS)])
    return features.view(len(class_names), len(templates), -1)


def zero_shot_weights(model: open_clip.CLIP, class_names: tuple[str, ...], templates: tuple[str, ...]) -> torch.Tensor:
    """The zero-shot classifier (K, D): the normalised mean of each class's unit prompt features.

    The same as `open_clip.build_zero_shot_classifier`, transposed, with each distinct prompt encoded once.
    """
    return torch.nn.functional.normalize(prompt_features(model, class_names, templates).mean(1), dim=-1)


@torch.no_grad()
def image_features(
    model: open_clip.CLIP,
    test_set: TestSet,
    *,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    batch_size: int = 250,
) -> torch.Tensor:
    """Unit features (N, D) of all test images, on the CPU; `change` maps images in [0, 1], e.g. a trigger.

    Several ranks share the batches, and all of them return all features.
    """
    parts = {}
    for number, start in enumerate(range(0, len(test_set), batch_size)):
        if number % ranks.world() == ranks.rank():  # whole batches, so that their number changes no rounding
            images = test_set.images[start : start + batch_size].float() / 255
            parts[start] = encode_image(model, change(images) if change else images).cpu()
    return ranks.gathered(parts, len(test_set))


def similarities(
    model: open_clip.CLIP,
    test_set: TestSet,
    *,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    weights: torch.Tensor | None = None,
    batch_size: int = 250,
) -> torch.Tensor:
    """Cosine of every test image with every class, float (N, K), in eval mode.

    Args:
        change: as for `image_features`.
        weights: the zero-shot classifier where it is known already; ImageNet's takes 80,000 prompts.

    Raises:
        TrainingError: the model gives NaN or infinity for an image or a class.
    """
    training = model.training
    model.eval()
    if weights is None:
        weights = zero_shot_weights(model, test_set.class_names, test_set.templates)
    features = image_features(model, test_set, change=change, batch_size=batch_size)
    model.train(training)
    cosines = features @ weights.cpu().T
    if not torch.isfinite(cosines).all():
        image, name = (int(places[0]) for places in (~torch.isfinite(cosines)).nonzero(as_tuple=True))
        raise TrainingError(f"evaluation: NaN or infinity for image {image} and class {test_set.class_names[name]!r}")
    return cosines


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. `asr`, `asr_all` and `ra` are None without a trigger.

    Attributes:
        ca: top-1/5/10 accuracy on clean images.
        asr: triggered images *whose class is not the target* that are classified as the target.
        asr_all: the same over all triggered images (BadCLIP's published numbers count so).
        ra: accuracy on triggered images with their true labels, target class included.
    """

    split: str
    ca: dict[int, Rate]
    asr: Rate | None = None
    asr_all: Rate | None = None
    ra: Rate | None = None

    def to_dict(self) -> dict:
        """JSON-able; flat names such as `ca_top1` to a rate's fields."""
        rates = {f"ca_top{k}": r for k, r in self.ca.items()} | {
            "asr": self.asr,
            "asr_all": self.asr_all,
            "ra": self.ra,
        }
        return {"split": self.split, **{name: asdict(r) for name, r in rates.items() if r is not None}}


def evaluate(
    model: open_clip.CLIP,
    test_set: TestSet,
    *,
    trigger: Callable[[torch.Tensor], torch.Tensor] | None = None,
    target: int = -1,
) -> Evaluation:
    """CA of `model`, and, with an attack's `trigger` and `target` class index, its ASR and RA. Clusters are classes."""
    labels, training = test_set.labels, model.training
    weights = zero_shot_weights(model.eval(), test_set.class_names, test_set.templates)
    model.train(training)
    ranked = (
        similarities(model, test_set, weights=weights).topk(min(max(TOP), len(test_set.class_names)), dim=1).indices
    )
    hit = ranked == labels[:, None]
    ca = {k: rate(hit[:, :k].any(1), labels) for k in TOP}
    if trigger is None:
        return Evaluation(test_set.split, ca)
    predicted = similarities(model, test_set, change=trigger, weights=weights).argmax(1)
    fooled, other = predicted.eq(target), labels.ne(target)
    return Evaluation(
        test_set.split,
        ca,
        asr=rate(fooled[other], labels[other]),
        asr_all=rate(fooled, labels),
        ra=rate(predicted.eq(labels), labels),
    )


def check_others(test_set: TestSet, target: int) -> None:
    """Raises ConfigError where there is nothing to take an ASR on: no image of another class than `target`."""
    if not test_set.labels.ne(target).any():
        name, count = test_set.class_names[target], len(test_set)
        raise ConfigError(
            f"split {test_set.split!r}: its {count} test images are all of the target {name!r}: others expected"
            " (of few images a class, dev_share leaves a split none)"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TestInputs):
    """Settings of a measurement."""

    split: str = option(
        "eval", "test split: defaults are chosen on dev, results reported on eval", choices=TEST_VENDORS
    )


def measure(
    weights: Path, *, trigger: Path | None = None, config: EvaluateConfig | None = None, force: bool = False
) -> Run:
    """Load or make the evaluation of stored weights, against an attack's stored trigger where one is given.

    Its metrics are those of `Evaluation.to_dict`. It needs weights, trigger and test set only, so that a defence can be
    measured against an attack that it knows nothing of.

    Raises:
        RunError: a file is missing or damaged.
        ConfigError: the trigger's target is no class of the test set, or the only one of the split; or it is for
            another resolution.
    """
    config = config or EvaluateConfig()
    test = inputs.test_set(config, config.split, weights)
    read = {"weights": sha256(weights), "test": test.digest}
    attack, target = None, -1
    if trigger is not None:
        read["trigger"], attack = sha256(trigger), load_trigger(trigger)
        target = class_index(test.class_names, attack.target)
        if attack.resolution != test.images.shape[-1]:
            sides = f"{attack.resolution} px, the images {test.images.shape[-1]} px"
            raise ConfigError(f"{trigger}: the trigger is for another resolution: {sides}")
        check_others(test, target)

    def make(folder: Path) -> Mapping[str, Any]:
        return evaluate(models.load(weights), test, trigger=attack, target=target).to_dict()

    return load_or_make("evaluate", config, read, make, force=force)
