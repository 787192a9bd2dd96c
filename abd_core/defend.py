"""Stage 3: fine-tune the victim so that its backdoor goes and its clean accuracy stays.

A defence owns the suspect's weights, clean pairs and, where it needs one, a perturbation. Nothing here reads the
attack's record: no trigger, no target, no poisoned rows. A further defence is one class and one line in `DEFENCES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch

from abd_core import models
from abd_core.config import ConfigError, option
from abd_core.data import Pairs, load_pairs, load_test_set, rng
from abd_core.evaluate import evaluate
from abd_core.generator import Perturbation
from abd_core.losses import clip_loss
from abd_core.paths import Run, load_or_make, sha256
from abd_core.text import augment, tokenize
from abd_core.train import Step, TrainConfig, fit


class Defence(ABC):
    """How a clean batch becomes a loss."""

    needs_perturbation: ClassVar[bool] = False

    def __init__(self, config: DefendConfig, pairs: Pairs, perturbation: Perturbation | None) -> None:
        self.config, self.pairs, self.perturbation = config, pairs, perturbation

    def images(self, at: Step) -> torch.Tensor:
        return self.pairs.images(at.indices, seed=self.config.seed, step=at.step).to(models.device())

    def captions(self, at: Step) -> list[str]:
        return self.pairs.captions(at.indices, seed=self.config.seed, epoch=at.epoch)

    @abstractmethod
    def loss(self, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        """The scalar to minimise."""


class FineTuning(Defence):
    """FT: CLIP's loss on clean pairs, nothing added."""

    def loss(self, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        image = models.encode_image(model, self.images(at))
        text = models.encode_text(model, tokenize(self.captions(at), context_length=model.context_length))
        return clip_loss(image, text, model.logit_scale.exp())


class ABD(Defence):
    """Adversarial Backdoor Defense: CLIP's loss on (image + universal perturbation, EDA(caption))."""

    needs_perturbation = True

    def loss(self, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        assert self.perturbation is not None  # `defend` has seen to it
        images, captions = self.images(at), self.captions(at)
        views = [self.perturbation(images, rng(self.config.seed, "place", at.step))]
        if self.config.view == "both":
            views.append(images)
        if self.config.eda:
            ids = [self.pairs.ids[i] for i in at.indices.tolist()]
            captions = augment(captions, seed=self.config.seed, epoch=at.epoch, ids=ids)
        text = models.encode_text(model, tokenize(captions, context_length=model.context_length))
        features = models.encode_image(model, torch.cat(views)).chunk(len(views))
        scale = model.logit_scale.exp()
        return torch.stack([clip_loss(image, text, scale) for image in features]).mean()


DEFENCES: dict[str, type[Defence]] = {"abd": ABD, "ft": FineTuning}


@dataclass(frozen=True, kw_only=True)
class DefendConfig(TrainConfig):
    """Settings of the defender."""

    defence: str = option("abd", "defence: abd, or ft (fine-tuning alone)", choices=DEFENCES)
    view: str = option(
        "replace", "the perturbed image replaces the clean one, or both are in the batch", choices=("replace", "both")
    )
    eda: bool = option(True, "augment captions by EDA")
    batch_norm: str = option(
        "train", "BatchNorm in fine-tuning: batch statistics, or the victim's", choices=("train", "frozen")
    )
    share: float = option(0.5, "share of the pairs that the defender holds, seeded", gt=0, le=1)
    epochs: int = option(5, "passes over the pairs", ge=1)
    batch_size: int = option(64, "pairs a step", ge=2)
    lr: float = option(1e-3, "peak learning rate", gt=0, le=1)


def freeze_batch_norm(model: torch.nn.Module) -> None:
    """Put every BatchNorm in eval mode: it uses and keeps its running statistics."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def defend(config: DefendConfig, victim: Path, *, perturbation: Path | None = None, force: bool = False) -> Run:
    """Load or make a defended model from the suspect's weights and clean pairs.

    Its folder holds `model.safetensors` and `history.csv`; its metrics are what a defender can know: the CA before and
    after, on the development split.

    Raises:
        RunError: a file is missing or damaged.
        ConfigError: the perturbation is for another resolution, or the defence needs one and got none.
    """
    universal = None if perturbation is None else Perturbation.load(perturbation)
    pairs = load_pairs(config.limit).subset(config.share, seed=config.seed)
    if universal is None and DEFENCES[config.defence].needs_perturbation:
        raise ConfigError(f"defence {config.defence!r} needs a perturbation, from the adversary stage")
    if universal is not None and universal.resolution != pairs.resolution:
        sides = f"{universal.resolution} px, the images {pairs.resolution} px"
        raise ConfigError(f"{perturbation}: the perturbation is for another resolution: {sides}")
    test = load_test_set("dev")
    inputs = {"victim": sha256(victim), "pairs": pairs.digest, "dev": test.digest}
    if perturbation is not None:
        inputs["perturbation"] = sha256(perturbation)

    def make(folder: Path) -> Mapping[str, Any]:
        model = models.load(victim)
        defence = DEFENCES[config.defence](config, pairs, universal)
        before = evaluate(model, test)

        def loss(at: Step) -> tuple[torch.Tensor, dict[str, float]]:
            model.train()
            if config.batch_norm == "frozen":
                freeze_batch_norm(model)
            return defence.loss(model, at), {}

        fit(model, loss, count=len(pairs), config=config, folder=folder, stage="defend")
        models.save(model, folder / "model.safetensors")
        return {"before": before.to_dict(), "after": evaluate(model, test).to_dict()}

    return load_or_make("defend", config, inputs, make, force=force)
