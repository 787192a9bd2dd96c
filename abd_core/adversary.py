"""Stage 2: AdvCLIP's GAN, with ABD's backdoor loss (Eq. (2)), finds one universal perturbation of the victim.

It reads the victim's and the clean model's weights and clean pairs: never the trigger, the target or the poisoned rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pandas as pd
import torch

from abd_core import graphs, inputs, models
from abd_core.config import ConfigError, TrainingError, derive_seed, option
from abd_core.data import TrainingPairs, rng
from abd_core.defences import clean_model, fine_tuned
from abd_core.generator import Discriminator, Generator, Perturbation, patch_side
from abd_core.inputs import TrainInputs
from abd_core.losses import (
    adversarial_loss,
    backdoor_loss,
    discriminator_loss,
    generator_loss,
    quality_loss,
    topology_loss,
)
from abd_core.paths import Run, atomic, load_or_make, sha256
from abd_core.text import tokenize
from abd_core.train import CHECKPOINT_SECONDS, check_finite, load_resume, progress, save_resume


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig(TrainInputs):
    """Settings of the adversary, among them every reading that the paper leaves open (README, "Open readings")."""

    seed: int = option(0, "seed of every random draw", ge=0)
    mode: str = option(
        "patch", "reading of 'magnitude 0.03': an L-inf bound, or a share of the area", choices=("additive", "patch")
    )
    magnitude: float = option(0.03, "L-inf bound on [0,1] pixels (additive) or share of the area (patch)", gt=0, le=1)
    placement: str = option(
        "random", "a patch's place: one for all images, or drawn for each", choices=("fixed", "random")
    )
    corner: float = option(
        172 / 224,
        "upper left corner of a fixed patch as a share of the side, both ways (AdvCLIP: 172 of 224 px)",
        ge=0,
        lt=1,
    )
    backdoor_images: str = option(
        "adversarial",
        "images that enter Eq. (2) through the normal encoder: 'adversarial' as through the victim's, or 'clean'",
        choices=("adversarial", "clean"),
    )
    backdoor_weight: float = option(
        1.0, "weight of Eq. (2); negative drives the encoders apart, 0 is the UAP without it"
    )
    negatives: str = option(
        "victim", "the x_i of Eq. (2): other images' victim features or clean features", choices=("victim", "clean")
    )
    normal: str = option(
        "clean",
        "the normal encoder of Eq. (2): the clean weights; where there are none, the suspect fine-tuned on the clean "
        "pairs, or the suspect itself",
        choices=("clean", "fine-tuned", "suspect"),
        later=True,
    )
    tau: float = option(0.1, "temperature of L_adv and Eq. (2); 0: the victim's own", ge=0)
    adversarial_weight: float = option(10.0, "weight of L_adv", ge=0)
    topology_weight: float = option(1.0, "weight of L_topo", ge=0)
    quality_weight: float = option(1.0, "weight of the mean squared error", ge=0)
    gan_weight: float = option(1.0, "weight of the GAN loss", ge=0)
    width: int = option(128, "channels of generator and discriminator at their widest (AdvCLIP: 1024)", ge=16)
    batch_size: int = option(16, "pairs a step", ge=2)
    steps: int = option(200, "optimiser steps", ge=1)
    lr: float = option(2e-4, "Adam's learning rate (AdvCLIP: 2e-4)", gt=0, le=1)
    share: float = option(0.5, "share of the pairs that the defender holds, seeded", gt=0, le=1)
    limit: int = option(0, "use only this many pairs before the share is taken (0: all); for smoke runs", ge=0)


def adversary(config: AdversaryConfig, victim: Path, *, clean: Path | None = None, force: bool = False) -> Run:
    """Load or make a universal perturbation.

    Args:
        victim: the suspect's weights.
        clean: the published weights that it was made from (default: the embedded base); not read where `normal` has
            something else in their place.

    Its folder holds `perturbation.safetensors`, `stages.safetensors` (the perturbation on the way) and `history.csv`.

    Raises:
        RunError: a weights file is missing or damaged.
        ConfigError: the clean weights are of another architecture than the victim's.
        TrainingError: a loss, the generator or the discriminator became NaN or infinite. The checkpoint before it is
            left as it was.
    """
    pairs = inputs.training_pairs(config, victim).subset(config.share, seed=config.seed)
    if len(pairs) < config.batch_size:
        raise ConfigError(f"AdversaryConfig.batch_size = {config.batch_size}: at most {len(pairs)} expected, the pairs")
    read = {"victim": sha256(victim), "pairs": pairs.digest}
    published = (clean or inputs.clean_weights(config)) if config.normal == "clean" else None
    if published is not None:
        read["clean"] = sha256(published)

    def make(folder: Path) -> Mapping[str, Any]:
        normal = suspect = models.frozen(models.load(victim))
        if published is not None:
            normal = models.frozen(clean_model(published, suspect))
        elif config.normal == "fine-tuned":
            normal = models.frozen(fine_tuned(suspect, pairs, folder, seed=config.seed))
        return search(config, pairs, suspect, normal, folder)

    return load_or_make("adversary", config, read, make, force=force)


def search(
    config: AdversaryConfig, pairs: TrainingPairs, suspect: open_clip.CLIP, normal: open_clip.CLIP, folder: Path
) -> Mapping[str, Any]:
    """Train the GAN against the frozen suspect, into `folder`; its figures are the means of the last steps."""
    size = models.resolution(suspect)
    side = patch_side(config.magnitude, size) if config.mode == "patch" else size
    top = min(round(config.corner * size), size - side)
    generator = Generator(side, width=config.width, seed=derive_seed(config.seed, "generator")).to(models.device())
    discriminator = Discriminator(width=config.width, seed=derive_seed(config.seed, "discriminator")).to(
        models.device()
    )
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.5, 0.999)) for net in (generator, discriminator)
    ]
    tau = config.tau or 1 / suspect.logit_scale.exp().item()

    def sound(where: str) -> None:
        """Raises TrainingError, naming the tensor, where the GAN holds NaN or infinity."""
        for name, net in nets.items():
            check_finite(net, f"adversary: {where}: {name}", f": lower lr = {config.lr:g}")

    def perturbation(where: str) -> Perturbation:
        image = generator()
        if not torch.isfinite(image).all():
            sound(where)
            raise TrainingError(f"adversary: {where}: the generator's image holds NaN: lower lr = {config.lr:g}")
        delta = config.magnitude * image if config.mode == "additive" else (image + 1) / 2
        return Perturbation(config.mode, delta, size, config.placement, (top, top))

    def batch(step: int) -> tuple[torch.Tensor, torch.Generator]:
        source = rng(config.seed, "adversary", step)
        return torch.randperm(len(pairs), generator=source)[: config.batch_size], source

    def losses(step: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        indices, source = batch(step)
        images = pairs.images(indices, seed=config.seed, step=step).to(models.device())
        captions = pairs.captions(indices, seed=config.seed, epoch=step)
        perturbed = perturbation(f"step {step}")(images, source)
        with torch.no_grad():
            text = models.encode_text(suspect, tokenize(captions, context_length=suspect.context_length))
            original = models.encode_image(suspect, images)
        adversarial = models.encode_image(suspect, perturbed)
        terms = {
            "adversarial": adversarial_loss(original, adversarial, text, tau=tau),
            "topology": topology_loss(original, adversarial, text),
            "quality": quality_loss(images, perturbed),
            "gan": generator_loss(discriminator(perturbed)),
        }
        if config.backdoor_weight:
            reference = models.encode_image(normal, perturbed if config.backdoor_images == "adversarial" else images)
            negatives = reference if config.negatives == "clean" else None
            terms["backdoor"] = backdoor_loss(reference, adversarial, tau=tau, negatives=negatives)
        return images, perturbed, terms

    weights = {
        "adversarial": config.adversarial_weight,
        "topology": config.topology_weight,
        "quality": config.quality_weight,
        "gan": config.gan_weight,
        "backdoor": config.backdoor_weight,
    }
    nets = {"generator": generator, "discriminator": discriminator}
    start, rows, stages = 0, [], []
    if resume := load_resume(folder / "resume.pt"):
        for name, net in nets.items():
            net.load_state_dict(resume[name])
        for optimizer, state in zip(optimizers, resume["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start, rows, stages = resume["step"], resume["rows"], resume["stages"]
    pairs.plan(batch(step)[0] for step in range(start, config.steps))
    saved = time.monotonic()
    every = max(1, config.steps // 8)
    with (
        progress(stage="adversary", total=config.steps, initial=start) as bar,
        graphs.recorded(suspect),
        graphs.recorded(normal),
    ):
        for step in range(start, config.steps):
            images, perturbed, terms = losses(step)
            total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
            if not math.isfinite(total.item()):
                sound(f"loss is {total.item()} at step {step}")
                raise TrainingError(f"adversary: loss is {total.item()} at step {step}: lower lr = {config.lr:g}")
            optimizers[0].zero_grad(set_to_none=True)
            total.backward()
            optimizers[0].step()
            judged = discriminator_loss(discriminator(images), discriminator(perturbed.detach()))
            if not math.isfinite(judged.item()):
                sound(f"discriminator's loss is {judged.item()} at step {step}")
                raise TrainingError(f"adversary: discriminator's loss is {judged.item()} at step {step}")
            optimizers[1].zero_grad(set_to_none=True)
            judged.backward()
            optimizers[1].step()
            figures = {name: value.item() for name, value in terms.items()}
            rows.append({"step": step + 1, "loss": total.item(), **figures, "discriminator": judged.item()})
            if (step + 1) % every == 0:
                stages.append(perturbation(f"step {step}").delta.detach().cpu())
            bar.update()
            bar.set_postfix(loss=f"{total.item():.3g}", refresh=False)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                sound(f"step {step}")
                states = {name: net.state_dict() for name, net in nets.items()}
                record = {**states, "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
                save_resume(folder / "resume.pt", {**record, "rows": rows, "stages": stages})
                saved = time.monotonic()
    sound("last step")
    history = pd.DataFrame(rows)
    with atomic(folder / "history.csv") as temporary:
        history.to_csv(temporary, index=False)
    perturbation("last step").save(folder / "perturbation.safetensors")
    torch_stages = torch.stack(stages)
    Perturbation(config.mode, torch_stages, size, config.placement, (top, top)).save(folder / "stages.safetensors")
    return {"side": side, **{name: value for name, value in history.tail(20).mean().items() if name != "step"}}
