"""Stage 1: make a victim by fine-tuning the clean model on partly poisoned pairs (Eq. (1) of the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abd_core import models
from abd_core.config import option
from abd_core.data import TEST_VENDORS, class_index, class_names, load_pairs, load_test_set, rng
from abd_core.evaluate import evaluate
from abd_core.losses import clip_loss
from abd_core.paths import Run, load_or_make, sha256
from abd_core.text import TEMPLATES, tokenize
from abd_core.train import Step, TrainConfig, fit
from abd_core.triggers import POSITIONS, TRIGGERS

ASR_AIM, CA_LOSS = 0.9, 0.03  # an attack took when it reaches this ASR and costs no more than this CA


@dataclass(frozen=True, kw_only=True)
class PoisonConfig(TrainConfig):
    """Settings of the attacker."""

    attack: str = option("badnet", "attack: badnet or blended", choices=TRIGGERS)
    target: str = option("banana", "class that triggered images shall be taken for; one of the test classes")
    rate: float = option(0.1, "share of the pairs that is poisoned", ge=0, le=1)
    trigger_size: float = option(
        16 / 224, "side of a trigger patch as a share of the image's (paper: 16 of 224 px)", gt=0, le=1
    )
    trigger_position: str = option("top-left", "where a trigger patch goes", choices=POSITIONS)
    blend_alpha: float = option(0.2, "weight of a blended trigger", gt=0, le=1)
    epochs: int = option(6, "passes over the pairs", ge=1)
    lr: float = option(1e-3, "peak learning rate", gt=0, le=1)


def poison(config: PoisonConfig, *, force: bool = False) -> Run:
    """Load or make a victim.

    P = {(x_T, c) : c in Y}: a seeded share `rate` of the pairs, none of which shows the target, get the trigger on
    their image (after augmentation, at model resolution) and a caption template with the target's name, drawn afresh
    each epoch.

    Its folder holds `model.safetensors`, `trigger.safetensors` (the attack's full record), `poisoned.csv` (sample ids)
    and `history.csv`; its metrics say what the attack reached on both splits and whether it took.

    Raises:
        ConfigError: `target` is no class of the test set, or a setting is not allowed.
    """
    target = class_index(class_names(), config.target)
    pairs = load_pairs(config.limit)
    clean = models.clean_weights()

    def make(folder: Path) -> Mapping[str, Any]:
        model = models.load(clean)
        trigger = TRIGGERS[config.attack].draw(
            resolution=models.resolution(model),
            target=config.target,
            seed=config.seed,
            size=config.trigger_size,
            position=config.trigger_position,
            alpha=config.blend_alpha,
        )
        trigger.save(folder / "trigger.safetensors")
        others = [i for i, label in enumerate(pairs.labels) if label != config.target]
        drawn = torch.randperm(len(others), generator=rng(config.seed, "poisoned"))[: round(config.rate * len(pairs))]
        poisoned = torch.zeros(len(pairs), dtype=torch.bool)
        poisoned[torch.tensor(others)[drawn]] = True
        (folder / "poisoned.csv").write_text("id\n" + "".join(f"{pairs.ids[i]}\n" for i in poisoned.nonzero()[:, 0]))

        def loss(at: Step) -> tuple[torch.Tensor, dict[str, float]]:
            model.train()
            images = pairs.images(at.indices, seed=config.seed, step=at.step)
            captions = pairs.captions(at.indices, seed=config.seed, epoch=at.epoch)
            chosen = poisoned[at.indices]
            if chosen.any():
                source = rng(config.seed, "poison", at.step)
                images[chosen] = trigger(images[chosen], source)
                templates = torch.randint(len(TEMPLATES), (len(captions),), generator=source).tolist()
                captions = [
                    TEMPLATES[t].format(config.target) if bad else caption
                    for caption, bad, t in zip(captions, chosen.tolist(), templates, strict=True)
                ]
            image = models.encode_image(model, images)
            text = models.encode_text(model, tokenize(captions, context_length=model.context_length))
            return clip_loss(image, text, model.logit_scale.exp()), {}

        fit(model, loss, count=len(pairs), config=config, folder=folder, stage="poison")
        models.save(model, folder / "model.safetensors")
        metrics: dict[str, Any] = {"poisoned": int(poisoned.sum())}
        base = models.load(clean)
        for split, test in tests.items():
            metrics[split] = evaluate(model, test, trigger=trigger, target=target).to_dict()
            metrics[f"base_{split}"] = evaluate(base, test, trigger=trigger, target=target).to_dict()
        return {**metrics, "took": took(metrics)}

    tests = {split: load_test_set(split) for split in TEST_VENDORS}
    inputs = {"pairs": pairs.digest, "clean": sha256(clean)} | {split: test.digest for split, test in tests.items()}
    return load_or_make("poison", config, inputs, make, force=force)


def took(metrics: Mapping[str, Any]) -> bool:
    """Whether the victim reaches `ASR_AIM` and loses at most `CA_LOSS` of the base's CA on the evaluation split."""
    victim, base = metrics["eval"], metrics["base_eval"]
    return victim["asr"]["value"] >= ASR_AIM and victim["ca_top1"]["value"] >= base["ca_top1"]["value"] - CA_LOSS


def verdict(run: Run) -> str:
    """One plain sentence on whether the attack took."""
    victim, base = run.metrics["eval"], run.metrics["base_eval"]
    asr, ca, base_ca = victim["asr"]["value"], victim["ca_top1"]["value"], base["ca_top1"]["value"]
    reached = (
        f"ASR {asr:.1%} (aim: at least {ASR_AIM:.0%}), "
        f"CA {ca:.1%} against the base's {base_ca:.1%} (aim: at most {100 * CA_LOSS:.0f} points below)"
    )
    return ("The attack took: " if run.metrics["took"] else "THE ATTACK DID NOT TAKE: ") + reached
