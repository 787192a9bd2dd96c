"""The defences: what each owns, its settings, and how it turns the victim into the defended model.

A further defence is one class, its settings in `DefendConfig`, and one line in `DEFENCES`. All train in the one loop of
`train.fit`, whose optimiser, schedule and batch size stand in for their papers' own, so that they differ in what they
do to a batch and in nothing else. Nothing here reads the attack's record: no trigger, no target, no poisoned rows.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import open_clip
import torch
from open_clip.transform import OPENAI_DATASET_MEAN

from abd_core import graphs, models, ranks
from abd_core.augment import auto_augment, crop_colour_blur, random_erasing
from abd_core.config import ConfigError, derive_seed, option
from abd_core.data import TrainingPairs, rng
from abd_core.disagreement import Disagreement, search
from abd_core.generator import Perturbation, patch_side
from abd_core.inputs import TrainInputs
from abd_core.kernels.dispatch import sent
from abd_core.losses import clip_loss, feature_shift, in_modal_loss, nearest
from abd_core.text import augment, tokenize
from abd_core.train import Step, TrainConfig, fit

# Named places of a patch: shares of the room that it has, down and to the right, flush with the border.
CORNERS = {
    "top-left": (0.0, 0.0),
    "top-right": (0.0, 1.0),
    "bottom-left": (1.0, 0.0),
    "bottom-right": (1.0, 1.0),
    "centre": (0.5, 0.5),
}


class Defence(ABC):
    """How the victim becomes the defended model.

    Attributes:
        title: its name in tables and figures.
        needs_pairs, needs_perturbation, needs_clean_weights: what the stage must hand over besides the victim.
        owns: one line on what the defender must own, upstream stages included.
        settings: the fields of `DefendConfig` that this defence reads and not all others do.
        lr, batch_norm: its own settings of the loop; chapter 5 has the search for them.
    """

    title: ClassVar[str]
    needs_pairs: ClassVar[bool] = True
    needs_perturbation: ClassVar[bool] = False
    needs_clean_weights: ClassVar[bool] = False
    owns: ClassVar[str] = "clean pairs"
    settings: ClassVar[tuple[str, ...]] = ()
    lr: ClassVar[float] = 1e-3
    batch_norm: ClassVar[str] = "train"

    def __init__(
        self,
        config: DefendConfig,
        pairs: TrainingPairs,
        *,
        perturbation: Perturbation | None = None,
        clean: Path | None = None,
    ) -> None:
        if perturbation is not None:  # on the device before the first step, which would wait for it
            perturbation = dataclasses.replace(perturbation, delta=perturbation.delta.to(models.device()))
        self.config, self.pairs, self.perturbation, self.clean = config, pairs, perturbation, clean

    @abstractmethod
    def defend(self, model: open_clip.CLIP, folder: Path) -> None:
        """Turn the victim into the defended model, in place; `folder` is the run's, for histories and resume files."""


def clean_model(path: Path | None, victim: open_clip.CLIP) -> open_clip.CLIP:
    """The clean model at `path`. Raises ConfigError where it does not fit the victim's architecture."""
    assert path is not None  # the stage has seen to it
    model = models.load(path)
    shapes = [{name: tensor.shape for name, tensor in net.state_dict().items()} for net in (model, victim)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"{path}: the clean weights (pretrained) are of another architecture than the victim's")
    return model


class CleanWeights(Defence):
    """Go back to the clean weights: what a defender who owns them can do without any training."""

    title = "clean weights"
    needs_pairs = False
    needs_clean_weights = True
    owns = "clean weights"

    def defend(self, model: open_clip.CLIP, folder: Path) -> None:
        model.load_state_dict(clean_model(self.clean, model).state_dict())


class WiSEFT(CleanWeights):
    """WiSE-FT (Wortsman et al. 2022): a * victim + (1 - a) * clean weights, a = `mixing` (their default 0.5).

    Every float is interpolated, BatchNorm's running means and variances too: they are not those of the mixed model's
    own features, which only clean images could give. Counters of batches are taken from the nearer model. The end
    points are the two models themselves.
    """

    title = "WiSE-FT"
    settings = ("mixing",)

    def defend(self, model: open_clip.CLIP, folder: Path) -> None:
        alpha = self.config.mixing

        def mixed(clean: torch.Tensor, victim: torch.Tensor) -> torch.Tensor:
            if clean.is_floating_point():
                return torch.lerp(clean, victim, alpha)  # exact at 0 and 1
            return victim if alpha >= 0.5 else clean

        victim, weights = model.state_dict(), clean_model(self.clean, model).state_dict()
        model.load_state_dict({name: mixed(t, victim[name]) for name, t in weights.items()})


def freeze_batch_norm(model: torch.nn.Module) -> None:
    """Put every BatchNorm in eval mode: it uses and keeps its running statistics."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


class FineTuningDefence(Defence):
    """A defence that fine-tunes the victim on clean pairs: a subclass says how a batch becomes a loss."""

    def defend(self, model: open_clip.CLIP, folder: Path) -> None:
        def loss(at: Step) -> tuple[torch.Tensor, dict[str, float]]:
            model.train()
            if self.config.batch_norm == "frozen":
                freeze_batch_norm(model)
            return self.loss(model, at), {}

        count, plan = len(self.pairs), self.pairs.plan
        fit(model, loss, count=count, config=self.config, folder=folder, stage="defend", plan=plan)

    @abstractmethod
    def loss(self, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        """The scalar to minimise."""

    def images(self, at: Step) -> torch.Tensor:
        return sent(self.pairs.images(at.indices, seed=self.config.seed, step=at.step), models.device())

    def captions(self, at: Step) -> list[str]:
        return self.pairs.captions(at.indices, seed=self.config.seed, epoch=at.epoch)

    def eda(self, captions: list[str], at: Step) -> list[str]:
        ids = [self.pairs.ids[i] for i in at.indices.tolist()]
        return augment(captions, seed=self.config.seed, epoch=at.epoch, ids=ids)


def encode_captions(model: open_clip.CLIP, captions: list[str]) -> torch.Tensor:
    return models.encode_text(model, tokenize(captions, context_length=model.context_length))


class FineTuning(FineTuningDefence):
    """FT: CLIP's loss on clean pairs, nothing added."""

    title = "FT"

    def loss(self, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        image = models.encode_image(model, self.images(at))
        return clip_loss(image, encode_captions(model, self.captions(at)), model.logit_scale.exp())


def fine_tuned(
    victim: open_clip.CLIP, pairs: TrainingPairs, folder: Path, *, seed: int, micro_batch: int = 0
) -> open_clip.CLIP:
    """What stands in for clean weights that the defender has not: FT's model of the victim, at FT's own settings.

    Where fine-tuning weakens the backdoor, victim and stand-in differ at it; what FT leaves of it cannot show. `folder`
    keeps the model in `normal.safetensors`.
    """
    path, model = folder / "normal.safetensors", copy.deepcopy(victim).requires_grad_(True)
    if ranks.agreed(path.exists()):  # an earlier process got so far
        return models.load(path)
    share = max(1, min(DefendConfig.batch_size, len(pairs)) // ranks.world())  # of a batch, each process's
    config = DefendConfig(defence="ft", seed=seed, batch_size=share * ranks.world(), micro_batch=micro_batch)
    training = folder / "normal"  # its own, as a run has one resume file and one history
    training.mkdir(exist_ok=True)
    FineTuning(config, pairs).defend(model, training)
    models.save(model, path)
    if ranks.first():
        shutil.rmtree(training)
    return model


class CleanCLIP(FineTuningDefence):
    """CleanCLIP (Bansal et al. 2023): CLIP's loss + `in_modal_weight` (1 in their code) * the in-modal loss.

    Images are augmented by AutoAugment, captions by EDA; plain and augmented ones go through the encoder in one batch,
    so that BatchNorm sees both where it is trained (as published; frozen, it keeps more CA here). Published: lr 1e-5,
    batch 64, 10 epochs, 50 warm-up steps, 100K pairs.
    """

    title = "CleanCLIP"
    lr = 5e-4
    batch_norm = "frozen"
    settings = ("in_modal_weight",)

    def loss(self, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        images, captions = self.images(at), self.captions(at)
        augmented = auto_augment(images, seed=derive_seed(self.config.seed, "autoaugment", at.step))
        image, augmented_image = models.encode_image(model, torch.cat([images, augmented])).chunk(2)
        text, augmented_text = encode_captions(model, captions + self.eda(captions, at)).chunk(2)
        scale = model.logit_scale.exp()
        in_modal = in_modal_loss(image, augmented_image, text, augmented_text, scale)
        return clip_loss(image, text, scale) + self.config.in_modal_weight * in_modal


class RoCLIP(FineTuningDefence):
    """RoCLIP (Yang et al. 2023): in every `match_every`-th epoch (2) an image's caption is the nearest in a text bank.

    Images and captions are augmented in all epochs. The bank is a ring of text features (21,845) without gradients; a
    matching step looks up its images first, then puts its own captions' features in the place of the oldest. Theirs
    starts from random vectors, which so few steps as ours would never flush; this one starts from the victim's features
    of a random sample of the captions, and is never larger than the number of pairs. Published: lr 5e-5, batch 512, 24
    epochs of pre-training.
    """

    title = "RoCLIP"
    lr = 2.5e-4
    batch_norm = "frozen"
    settings = ("bank", "match_every")

    def defend(self, model: open_clip.CLIP, folder: Path) -> None:
        config = self.config
        chosen = torch.randperm(len(self.pairs), generator=rng(config.seed, "bank"))[: config.bank]
        with torch.no_grad():
            features = [
                encode_captions(model, self.pairs.captions(part, seed=config.seed, epoch=0))
                for part in chosen.split(256)
            ]
        model.register_buffer("bank", torch.cat(features))  # among the weights, so that a resume file holds it
        model.register_buffer("oldest", torch.tensor(0, device=features[0].device))
        super().defend(model, folder)
        del model.bank, model.oldest

    def loss(self, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        seed = derive_seed(self.config.seed, "crop, colour, blur", at.step)
        image = models.encode_image(model, crop_colour_blur(self.images(at), seed=seed))
        matching = (at.epoch + 1) % self.config.match_every == 0
        with torch.set_grad_enabled(not matching):
            text = encode_captions(model, self.eda(self.captions(at), at))
        target = nearest(image, model.bank) if matching else text
        if matching:
            size = len(model.bank)
            places = (model.oldest + torch.arange(min(len(text), size), device=text.device)) % size
            model.bank[places] = text[-size:]
            model.oldest.copy_((places[-1] + 1) % size)
        return clip_loss(image, target, model.logit_scale.exp())


class PAR(FineTuningDefence):
    """PAR, Perturb and Recover (Singh et al. 2024): L_clip - w (S_img [S_img <= tau] + S_txt [S_txt <= tau]).

    S is how far the unit features have moved from the frozen victim's (eval mode) on the same inputs; w =
    `shift_weight` (0.5), tau = `shift_limit` (2.15). As in their code, captions are plain, the temperature is not
    trained, and an image gets with probability 0.5 the positive part of Gaussian noise of sigma 0.2, and with
    probability 0.5 a square of 0.5 to 1 % of its area in CLIP's mean colour. Published: batch 512, 2 epochs, 250K
    pairs, weight decay 1e-4, lr from 3e-5 down to 3e-6 in the first half, then by a cosine to 1e-9.
    """

    title = "PAR"
    settings = ("shift_weight", "shift_limit")

    def defend(self, model: open_clip.CLIP, folder: Path) -> None:
        self.victim = models.frozen(copy.deepcopy(model))
        with graphs.recorded(self.victim, on=ranks.world() == 1 and not self.config.micro_batch):
            super().defend(model, folder)

    def loss(self, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        limit, captions = self.config.shift_limit, self.captions(at)
        images = self.augmented(self.images(at), rng(self.config.seed, "par", at.step))
        image, text = models.encode_image(model, images), encode_captions(model, captions)
        with torch.no_grad():
            victim_image = models.encode_image(self.victim, images)
            victim_text = encode_captions(self.victim, captions)
        shift = feature_shift(image, victim_image, limit=limit) + feature_shift(text, victim_text, limit=limit)
        return clip_loss(image, text, model.logit_scale.exp().detach()) - self.config.shift_weight * shift

    @staticmethod
    def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noisy = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        noise = 0.2 * torch.randn(images.shape, generator=generator)
        images = (images + (noisy * noise.clamp(0, 1)).to(images)).clamp(0, 1)
        mean = torch.tensor(OPENAI_DATASET_MEAN)
        return random_erasing(images, generator, probability=0.5, area=(0.005, 0.01), aspect=(1, 1), colour=mean)


class Perturbed(FineTuningDefence):
    """CLIP's loss on (perturbed image, EDA(caption)): a subclass says how an image is perturbed."""

    settings: ClassVar[tuple[str, ...]] = ("view", "eda")
    batch_norm = "frozen"  # clean images shall not be normalised with statistics of perturbed ones

    @abstractmethod
    def perturb(self, images: torch.Tensor, at: Step) -> torch.Tensor:
        """Perturbed copies of images (B, 3, R, R) in [0, 1]."""

    def loss(self, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        images, captions = self.images(at), self.captions(at)
        views = [] if self.config.view == "clean" else [self.perturb(images, at)]
        if self.config.view != "replace":
            views.append(images)
        text = encode_captions(model, self.eda(captions, at) if self.config.eda else captions)
        features = models.encode_image(model, torch.cat(views)).chunk(len(views))
        scale = model.logit_scale.exp()
        return torch.stack([clip_loss(image, text, scale) for image in features]).mean()


class ABD(Perturbed):
    """Adversarial Backdoor Defense: CLIP's loss on (image + universal perturbation, EDA(caption)).

    Its ablations are settings: `eda` False is I_adv + T, `view` "clean" is I + T_eda. The UAP without L_bd is a setting
    of the adversary, `patch_place` one of the controls.
    """

    title = "ABD"
    needs_perturbation = True
    owns = "clean pairs; clean weights too, to find the perturbation by Eq. (2)"
    settings = (*Perturbed.settings, "patch_place")

    def perturb(self, images: torch.Tensor, at: Step) -> torch.Tensor:
        assert self.perturbation is not None  # the stage has seen to it, and to its place
        return self.perturbation(images, rng(self.config.seed, "place", at.step))


class ABDD(Perturbed):
    """ABD-D, a variant of this project: the perturbations are those at which victim and clean model disagree most.

    See `disagreement`. Half of the perturbed images show a window of the one, the other half have the other one added;
    `perturbed_share` of the batch is perturbed, the rest is clean.
    """

    title = "ABD-D"
    lr = 5e-4
    batch_norm = "train"
    needs_clean_weights = True
    owns = "clean pairs; clean weights"
    settings = (
        *Perturbed.settings,
        "normal",
        "perturbed_share",
        "search_steps",
        "search_lr",
        "window_low",
        "window_high",
        "field_bound",
    )

    def defend(self, model: open_clip.CLIP, folder: Path) -> None:
        config, path = self.config, folder / "found.safetensors"
        sides = (config.window_low, config.window_high)
        if ranks.agreed(not path.exists()):  # else an earlier process got further
            stand_in = config.normal == "fine-tuned"
            given = {"seed": config.seed, "micro_batch": config.micro_batch}
            normal = fine_tuned(model, self.pairs, folder, **given) if stand_in else None
            search(
                models.frozen(copy.deepcopy(model)),
                models.frozen(normal or clean_model(self.clean, model)),
                self.pairs,
                **given,
                steps=config.search_steps,
                lr=config.search_lr,
                batch_size=config.batch_size,
                bound=config.field_bound,
                sides=sides,
            ).save(path)
        ranks.barrier()
        self.found = Disagreement.load(path, sides)
        super().defend(model, folder)

    def perturb(self, images: torch.Tensor, at: Step) -> torch.Tensor:
        return self.found(images, rng(self.config.seed, "place", at.step), share=self.config.perturbed_share)


class NoisePatch(Perturbed):
    """Control: ABD with a patch of uniform noise, drawn once a run, of the same size and at the same places."""

    title = "noise patch"
    settings = (*Perturbed.settings, "patch_place", "patch_area")

    def perturb(self, images: torch.Tensor, at: Step) -> torch.Tensor:
        return noise_patch(self.config, images.shape[-1])(images, rng(self.config.seed, "place", at.step))


class RandomErasing(Perturbed):
    """Control: ABD with Random Erasing (Zhong et al. 2020) in place of the perturbation.

    Their settings: probability 0.5, 2 to 40 % of the area, aspect 0.3 to 1/0.3, fresh noise in every pixel.
    """

    title = "random erasing"
    settings = (*Perturbed.settings, "erase_probability", "erase_low", "erase_high")

    def perturb(self, images: torch.Tensor, at: Step) -> torch.Tensor:
        config = self.config
        return random_erasing(
            images,
            rng(config.seed, "erase", at.step),
            probability=config.erase_probability,
            area=(config.erase_low, config.erase_high),
        )


class GaussianNoise(Perturbed):
    """Control: ABD with fresh Gaussian noise of standard deviation `noise_sigma` in place of the perturbation."""

    title = "Gaussian noise"
    settings = (*Perturbed.settings, "noise_sigma")

    def perturb(self, images: torch.Tensor, at: Step) -> torch.Tensor:
        noise = torch.randn(images.shape, generator=rng(self.config.seed, "noise", at.step))
        return (images + self.config.noise_sigma * noise.to(images)).clamp(0, 1)


def noise_patch(config: DefendConfig, size: int) -> Perturbation:
    """A run's patch of uniform noise, for images of `size` px."""
    side = patch_side(config.patch_area, size)
    noise = torch.rand(3, side, side, generator=rng(config.seed, "noise patch"))
    return placed(Perturbation("patch", noise, size, "random"), config.patch_place)


def placed(perturbation: Perturbation, place: str) -> Perturbation:
    """The same perturbation at another place: one of `CORNERS`, "random", or "stored" (as it is).

    Raises:
        ConfigError: it is additive, and so has no place.
    """
    if place == "stored":
        return perturbation
    if perturbation.mode != "patch":
        raise ConfigError(f"DefendConfig.patch_place = {place!r}: the perturbation is additive and has no place")
    if place == "random":
        return dataclasses.replace(perturbation, placement="random")
    room = perturbation.resolution - perturbation.delta.shape[-1]
    down, right = CORNERS[place]
    return dataclasses.replace(perturbation, placement="fixed", corner=(int(down * room), int(right * room)))


DEFENCES: dict[str, type[Defence]] = {
    "abd": ABD,
    "abd-d": ABDD,
    "ft": FineTuning,
    "cleanclip": CleanCLIP,
    "roclip": RoCLIP,
    "par": PAR,
    "clean": CleanWeights,
    "wise-ft": WiSEFT,
    "noise-patch": NoisePatch,
    "random-erasing": RandomErasing,
    "gaussian-noise": GaussianNoise,
}


@dataclass(frozen=True, kw_only=True)
class DefendConfig(TrainInputs, TrainConfig):
    """Settings of the defender. Once made, `lr` and `batch_norm` are those in force.

    Raises:
        ConfigError: a setting that the defence does not read is not at its default, or a smallest exceeds a largest.
    """

    chooser = "defence"
    kinds = DEFENCES

    defence: str = option(
        "abd", "abd, abd-d, ft, cleanclip, roclip, par, clean, wise-ft, or a control", choices=DEFENCES
    )
    view: str = option(
        "replace",
        "the perturbed image replaces the clean one, both are in the batch, or the clean one alone",
        choices=("replace", "both", "clean"),
    )
    eda: bool = option(True, "augment captions by EDA (abd and its controls)")
    patch_place: str = option(
        "stored",
        "place of abd's patch: as its file says (noise-patch: random), drawn for each image, or one for all",
        choices=("stored", "random", *CORNERS),
    )
    normal: str = option(
        "clean",
        "abd-d: what the victim is compared with: the clean weights, or the victim fine-tuned on the clean pairs",
        choices=("clean", "fine-tuned"),
        later=True,
    )
    perturbed_share: float = option(0.25, "abd-d: share of the batch that is perturbed", ge=0, le=1)
    search_steps: int = option(60, "abd-d: steps of Adam on the perturbations' pixels", ge=1)
    search_lr: float = option(0.1, "abd-d: learning rate of the window's pixels; of the field's: times its bound", gt=0)
    window_low: float = option(1 / 8, "abd-d: smallest side of a window as a share of the image's", gt=0, le=1)
    window_high: float = option(3 / 8, "abd-d: largest side of a window as a share of the image's", gt=0, le=1)
    field_bound: float = option(0.1, "abd-d: bound of what is added to a pixel in [0, 1]", gt=0, le=1)
    patch_area: float = option(0.03, "noise-patch: share of the area, as the adversary's magnitude", gt=0, le=1)
    erase_probability: float = option(0.5, "random-erasing: share of the images (0.5)", gt=0, le=1)
    erase_low: float = option(0.02, "random-erasing: smallest share of the area (0.02)", gt=0, le=1)
    erase_high: float = option(0.4, "random-erasing: largest share of the area (0.4)", gt=0, le=1)
    noise_sigma: float = option(0.03, "gaussian-noise: standard deviation, as the additive bound", gt=0, le=1)
    in_modal_weight: float = option(1.0, "cleanclip: weight of the in-modal loss (1)", ge=0)
    bank: int = option(21845, "roclip: most text features to match with (21,845)", ge=1)
    match_every: int = option(2, "roclip: captions are matched in every such epoch (2)", ge=1)
    shift_weight: float = option(0.5, "par: weight of the distances from the victim's features (0.5)", ge=0)
    shift_limit: float = option(2.15, "par: squared distance beyond which none is pushed on (2.15)", ge=0, le=4)
    mixing: float = option(0.5, "wise-ft: share of the victim, 0 (the clean weights) to 1 (0.5)", ge=0, le=1)
    batch_norm: str = option(
        "own",
        "BatchNorm in fine-tuning: statistics of the batch (train), or the victim's (frozen); own: the defence's own",
        choices=("own", "train", "frozen"),
    )
    share: float = option(0.5, "share of the pairs that the defender holds, seeded", gt=0, le=1)
    epochs: int = option(3, "passes over the pairs", ge=1)
    batch_size: int = option(64, "pairs a step", ge=2)
    lr: float = option(0.0, "peak learning rate; 0: the defence's own", ge=0, le=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for low, high in (("erase_low", "erase_high"), ("window_low", "window_high")):
            if getattr(self, low) > getattr(self, high):
                allowed = f"≤ {high} = {getattr(self, high):g} expected"
                raise ConfigError(f"DefendConfig.{low} = {getattr(self, low):g}: {allowed}")
        if not self.lr:
            object.__setattr__(self, "lr", DEFENCES[self.defence].lr)
        if self.batch_norm == "own":
            object.__setattr__(self, "batch_norm", DEFENCES[self.defence].batch_norm)

    def replace(self, **changes: Any) -> Self:
        """A changed copy; another defence has its own `lr` and `batch_norm`, unless they are among the changes."""
        if changes.get("defence", self.defence) != self.defence:
            changes = {"lr": 0.0, "batch_norm": "own", **changes}
        return super().replace(**changes)

    @property
    def needs_perturbation(self) -> bool:
        """Whether the defence reads a perturbation under these settings."""
        return DEFENCES[self.defence].needs_perturbation and self.view != "clean"

    @property
    def needs_clean_weights(self) -> bool:
        """Whether the defence reads the clean weights under these settings."""
        return DEFENCES[self.defence].needs_clean_weights and self.normal == "clean"
