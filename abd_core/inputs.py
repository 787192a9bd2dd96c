"""What a stage reads besides its settings: the embedded benchmark, or weights, pairs and test images of one's own.

The settings here mean the same in every stage. All of them are places: what is found there enters a run's key by its
digest, so the runs of the embedded benchmark stay where they are, and data may be moved. (Of pairs, ids, captions and
the sizes that a tar tells, see `ImagePairs.digest`: images that are replaced under the same names are not noticed, nor
are test images on a remote store that are as large as those that they replace.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from safetensors import SafetensorError, safe_open

from abd_core import models
from abd_core.config import Config, ConfigError, option, unknown
from abd_core.data import CELL, TestSet, TrainingPairs, load_pairs, load_test_set
from abd_core.formats import ImagePairs, load_image_pairs
from abd_core.labelled import load_labelled
from abd_core.paths import RunError, regular


@dataclass(frozen=True, kw_only=True)
class TestInputs(Config):
    """Where a zero-shot test set is found, and which model it is for. Empty: the embedded benchmark's."""

    __test__ = False  # not a pytest class

    model: str = option(
        "",
        "open_clip architecture; '': the one that the weights name, or RN50-quickgelu where they name none",
        place=True,
    )
    test_images: str = option(
        "", "test images: a folder of class folders, or ImageNet's flat files with devkit; '': embedded", place=True
    )
    test_classes: str = option(
        "", "file of class names, a line a class: '<folder><tab><name>' or the name; not for ImageNet", place=True
    )
    devkit: str = option("", "ImageNet's ILSVRC2012_devkit_t12, folder or .tar.gz, for its flat files", place=True)
    dev_share: float = option(
        0.1,
        "share of each class's test images for the dev split; 0: both splits are all images",
        ge=0,
        lt=1,
        place=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("test_classes", "devkit"):
            if getattr(self, name) and not self.test_images:
                where = f"{type(self).__name__}.{name} = {getattr(self, name)!r}"
                raise ConfigError(f"{where}: it goes with test_images, which are not given")


@dataclass(frozen=True, kw_only=True)
class PairSource(Config):
    """Where the pairs are found. Empty: the embedded benchmark's."""

    pairs: str = option(
        "", "image-caption pairs: .csv, .tsv, .parquet or .tar; braces for many; '': embedded", place=True
    )
    columns: str = option("", "columns of a table, 'image,caption'; '': recognised", place=True)
    manifest: str = option("", "CSV file with the ids of the pairs to use (abd_core.formats); '': all", place=True)
    max_damaged: float = option(
        0.01, "share of damaged pairs that is left out; more is an error", ge=0, lt=1, place=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("columns", "manifest"):
            if getattr(self, name) and not self.pairs:
                where = f"{type(self).__name__}.{name} = {getattr(self, name)!r}"
                raise ConfigError(f"{where}: it goes with pairs, which are not given")


@dataclass(frozen=True, kw_only=True)
class PairInputs(PairSource, TestInputs):
    """Where the pairs and the test set are found, and which model they are for. Empty: the embedded benchmark's."""

    @property
    def outside(self) -> bool:
        """Whether anything but the embedded benchmark is read."""
        return bool(self.pairs or self.test_images)


@dataclass(frozen=True, kw_only=True)
class TrainInputs(PairInputs):
    """Where the clean weights are found, besides the pairs and the test set. Empty: the embedded benchmark's."""

    pretrained: str = option(
        "", "clean weights: a file, a Hugging Face folder or an open_clip tag of model; '': embedded", place=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model and not self.pretrained:
            models.pretrained_weights(self.model, "")  # refuses another architecture than the embedded one

    @property
    def outside(self) -> bool:
        return bool(self.pretrained) or super().outside


@dataclass(frozen=True, kw_only=True)
class SuspectInputs(Config):
    """Which model is defended."""

    checkpoint: str = option(
        "", "the suspect's weights: a file or a Hugging Face folder; '': the victim of an attack run here", place=True
    )


def check_no_attack(source: SuspectInputs, attacker: Config) -> None:
    """Raises ConfigError where an attack is named beside a checkpoint, on which none is run."""
    for field in dataclasses.fields(attacker):
        value = getattr(attacker, field.name)
        if source.checkpoint and field.name in ("attack", "target") and value != field.default:
            raise ConfigError(
                f"checkpoint = {source.checkpoint!r}: no attack is run, so {field.name} = {value!r} is not read"
            )


SHARED = tuple(field.name for field in dataclasses.fields(TrainInputs))  # in every stage they mean the same


def test_inputs(config: TestInputs) -> dict[str, Any]:
    """The test set's settings of a stage, e.g. for an `EvaluateConfig` that measures what it made."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(TestInputs)}


def clean_weights(config: TrainInputs) -> Path:
    """The published weights that everything starts from, as one file that names its architecture.

    Raises:
        ConfigError, RunError: see `models.pretrained_weights`.
    """
    return models.pretrained_weights(config.model, config.pretrained) if config.pretrained else models.clean_weights()


def suspect_weights(source: SuspectInputs, config: TrainInputs) -> Path:
    """The checkpoint as one file that names its architecture; where it names none itself, it is of `config.model`.

    Raises:
        RunError: it is missing, damaged, or does not fit the architecture, see `models.load`.
    """
    if not Path(source.checkpoint).expanduser().exists():
        raise RunError(f"missing file: {source.checkpoint}")
    return models.pretrained_weights(config.model, source.checkpoint)


def architecture(config: TestInputs) -> str:
    """The open_clip architecture of a model that is trained from scratch."""
    return config.model or models.EMBEDDED


def resolution(weights: Path | None, config: TestInputs) -> int:
    """Side in pixels of the images that the model at `weights` takes, or that a model of `architecture` will.

    Raises:
        RunError: the file is missing, damaged, or names an architecture that open_clip does not know.
        ConfigError: `config.model` does so, where there are no weights.
    """
    name = architecture(config) if weights is None else _named(weights) or config.model or models.FOREIGN
    if name not in open_clip.list_models():
        if weights is None:
            raise unknown("model", name, open_clip.list_models())
        raise RunError(f"{weights}: its metadata names the model {name!r}, which open_clip does not know")
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    if not isinstance(size, int):
        raise RunError(f"{weights or 'model'}: {name} takes images of {size} px: only square ones can be used")
    return size


def _named(weights: Path | None) -> str:
    """The architecture that a file of weights names; "" where it names none. Raises RunError where it is damaged."""
    if weights is None or weights.suffix.lower() != ".safetensors":
        return ""
    regular(weights)
    try:
        with safe_open(weights, framework="pt") as f:
            return (f.metadata() or {}).get("model", "")
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"damaged file: {weights}: not safetensors ({error})") from None


def training_pairs(config: Any, weights: Path | None) -> TrainingPairs:
    """The clean pairs that `config` (a stage's, with `limit`) names, for the model at `weights` (see `resolution`).

    Raises:
        ConfigError, RunError: see `formats.load_image_pairs`; or the model takes images of another size than the
            embedded ones.
    """
    if config.pairs:
        return own_pairs(config, resolution=resolution(weights, config), limit=config.limit)
    _embedded(config, weights, "pairs")
    return load_pairs(config.limit)


def own_pairs(config: PairSource, *, resolution: int, limit: int = 0) -> ImagePairs:
    """The pairs that `config` names, at that resolution. Raises as `formats.load_image_pairs`."""
    return load_image_pairs(
        config.pairs,
        resolution=resolution,
        columns=config.columns,
        manifest=config.manifest,
        limit=limit,
        max_damaged=config.max_damaged,
    )


def test_set(config: TestInputs, split: str, weights: Path | None) -> TestSet:
    """The test set that `config` names, for the model at `weights` (see `resolution`).

    Raises:
        ConfigError, RunError: see `labelled.load_labelled`; or the model takes images of another size than the embedded
            ones.
    """
    if config.test_images:
        return load_labelled(
            config.test_images,
            split=split,
            resolution=resolution(weights, config),
            classes=config.test_classes,
            devkit=config.devkit,
            dev_share=config.dev_share,
        )
    _embedded(config, weights, "test_images")
    return load_test_set(split)


def _embedded(config: TestInputs, weights: Path | None, what: str) -> None:
    """Refuse a model of another size, where one is named."""
    named = config.model or getattr(config, "pretrained", "") or getattr(config, "pairs", "")
    if (named or _named(weights)) and (size := resolution(weights, config)) != CELL:
        taker = weights.name if weights else architecture(config)
        raise ConfigError(f"{what} = '': the embedded images have {CELL} px, {taker} takes {size}: give {what}")


test_inputs.__test__ = test_set.__test__ = False  # type: ignore[attr-defined]
