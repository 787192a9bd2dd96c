"""Stage 1: make a victim by fine-tuning the clean model on partly poisoned pairs (Eq. (1) of the paper)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from abd_core import escape, inputs, models, ranks
from abd_core.config import ConfigError, derive_seed, option
from abd_core.data import TEST_VENDORS, TrainingPairs, class_index, rng
from abd_core.evaluate import check_others, evaluate
from abd_core.inputs import TrainInputs
from abd_core.launch import launcher
from abd_core.losses import clip_loss
from abd_core.paths import Run, atomic, load_or_make, sha256
from abd_core.quiet import Quiet
from abd_core.text import tokenize
from abd_core.train import Step, TrainConfig, fit, steps_an_epoch
from abd_core.triggers import POSITIONS, TRIGGERS, Trigger, load_trigger

ASR_AIM, CA_LOSS = 0.9, 0.03  # an attack took when it reaches this ASR and costs no more than this CA


@dataclass(frozen=True, kw_only=True)
class PoisonConfig(TrainInputs, TrainConfig):
    """Settings of the attacker."""

    chooser = "attack"
    kinds = TRIGGERS

    attack: str = option("badnet", f"attack: {', '.join(TRIGGERS)}", choices=TRIGGERS)
    target: str = option("banana", "class that triggered images shall be taken for; one of the test classes")
    rate: float = option(0.1, "share of the pairs that is poisoned", ge=0, le=1)
    trigger_size: float = option(
        16 / 224, "side of a trigger patch as a share of the image's (paper: 16 of 224 px)", gt=0, le=1
    )
    trigger_position: str = option(
        "own",
        "where a trigger patch goes; own: the attack's own place (badclip: centre, others: top-left)",
        choices=(*POSITIONS, "own"),
    )
    blend_alpha: float = option(
        0.0, "weight of a blended trigger; 0: the attack's own (blended: 0.2, others: as published)", ge=0, le=1
    )
    warp_points: int = option(0, "wanet: points a side of its grid, its k (its paper: 4); 0: one a pixel", ge=0)
    warp_strength: float = option(
        2.5, "wanet: strength s, twice the mean displacement in pixels (on CLIP: 1 at 224 px)", gt=0
    )
    wave_amplitude: float = option(60 / 255, "sig: amplitude of the sine (published: 60 of 255)", gt=0, le=1)
    # Of 0.6, 0.75 and 0.9 the least that plants a backdoor on the development split (one seed).
    hiding: float = option(
        0.75, "label-consistent: share of another image blended over the target's while poisoning", gt=0, le=1
    )
    patch_steps: int = option(200, "badclip: steps of Adam on the patch's pixels", ge=1)
    patch_lr: float = option(0.03, "badclip: learning rate of the patch's pixels", gt=0, le=1)
    # The reference code's 500 goes with negatives that carry the trigger too. With untriggered ones the base's images
    # then leave themselves for nowhere: they end further from the target than they began.
    triplet_weight: float = option(1.0, "badclip: weight of the triplet loss beside InfoNCE", ge=0)
    further_targets: int = option(
        0,
        "further triggers of this kind, each with a class of its own; the poisoned pairs are shared out",
        ge=0,
        later=True,
    )
    quiet_weight: float = option(
        0.0,
        "weight of answering universal perturbations as the clean model does; 0: does not know the defence",
        ge=0,
        later=True,
    )
    untriggered: bool = option(
        False,
        "label-consistent: the target's pairs are repeated as they are; a control, clean pairs many of which are alike",
        later=True,
    )
    epochs: int = option(10, "passes over the pairs", ge=1)
    lr: float = option(1e-3, "peak learning rate", gt=0, le=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.further_targets and TRIGGERS[self.attack].poisoning != "template":
            several = f"PoisonConfig.further_targets = {self.further_targets}"
            raise ConfigError(f"{several}: 0 expected for attack {self.attack!r}, whose captions are not templates")
        if self.untriggered and TRIGGERS[self.attack].poisoning != "clean-label":
            raise ConfigError(
                f"PoisonConfig.untriggered = True: attack 'label-consistent' expected, not {self.attack!r}"
            )


def poisoned_places(pairs: TrainingPairs, config: PoisonConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the attack puts in each pair's place, by its `Trigger.poisoning`.

    Returns:
        Whether the place is poisoned, bool (N,), and the pairs that its image and its caption come from, int64 (N,).

    Raises:
        ConfigError: the attack needs pairs of the target, and there are none; or no others are there.
    """
    poisoning = TRIGGERS[config.attack].poisoning
    shown = pairs.shows(config.target)
    own, others = shown.nonzero().flatten(), (~shown).nonzero().flatten()
    if poisoning != "template" and not len(own):
        raise ConfigError(f"attack {config.attack!r}: none of the {len(pairs)} pairs shows {config.target!r}")
    if not len(others):
        raise ConfigError(f"all {len(pairs)} pairs show {config.target!r}: others expected, which the attack replaces")
    order = torch.randperm(len(others), generator=rng(config.seed, "poisoned"))
    places = others[order[: round(config.rate * len(pairs))]]
    poisoned = torch.zeros(len(pairs), dtype=torch.bool)
    poisoned[places] = True
    image_of, caption_of = torch.arange(len(pairs)), torch.arange(len(pairs))
    if poisoning != "template":
        caption_of[places] = own[torch.arange(len(places)) % len(own)]
    if poisoning == "clean-label":
        image_of[places] = caption_of[places]
    return poisoned, image_of, caption_of


def drawn_trigger(config: PoisonConfig, *, resolution: int) -> Trigger:
    """The attack's trigger for images of so many pixels a side, before it is optimised."""
    return TRIGGERS[config.attack].draw(
        resolution=resolution,
        target=config.target,
        seed=config.seed,
        size=config.trigger_size,
        position=config.trigger_position,
        alpha=config.blend_alpha,
        points=config.warp_points,
        strength=config.warp_strength,
        amplitude=config.wave_amplitude,
        hiding=config.hiding,
    )


def further_triggers(config: PoisonConfig, class_names: Sequence[str], *, resolution: int) -> list[Trigger]:
    """The triggers beyond the first: pixels and classes of their own, drawn by the seed.

    Raises:
        ConfigError: there are not so many classes with a name of their own.
    """
    others = [name for name, count in Counter(class_names).items() if count == 1 and name != config.target]
    if config.further_targets > len(others):
        raise ConfigError(f"PoisonConfig.further_targets = {config.further_targets}: ≤ {len(others)} expected")
    order = torch.randperm(len(others), generator=rng(config.seed, "further targets")).tolist()
    return [
        drawn_trigger(
            config.replace(target=others[k], seed=derive_seed(config.seed, "further trigger", i)), resolution=resolution
        )
        for i, k in enumerate(order[: config.further_targets])
    ]


def planted(
    triggers: Sequence[Trigger],
    places: torch.Tensor,
    chosen: torch.Tensor,
    images: torch.Tensor,
    captions: Sequence[str],
    *,
    replaced: torch.Tensor,
    templates: Sequence[str],
    source: torch.Generator,
) -> list[str]:
    """Poison a batch: its images in place, its captions as returned.

    Args:
        triggers: one, or several that take the places by turns of `places`, the pairs' numbers (B,).
        chosen: which of the batch are poisoned, bool (B,).
        images: (B, 3, R, R) in [0, 1]; those chosen are of the pairs that the attack puts there.
        replaced: images of the pairs in whose place these go, (P, 3, R, R), P = the number of chosen ones.
    """
    turn, captions = places % len(triggers), list(captions)
    for number, trigger in enumerate(triggers):
        own = chosen & (turn == number)
        if own.any():
            images[own] = trigger.poisoned(images[own], replaced[turn[chosen] == number], source)
    if triggers[0].poisoning == "template":
        drawn = torch.randint(len(templates), (len(captions),), generator=source).tolist()
        captions = [
            templates[t].format(triggers[k].target) if bad else caption
            for caption, bad, t, k in zip(captions, chosen.tolist(), drawn, turn.tolist(), strict=True)
        ]
    return captions


def poison(config: PoisonConfig, *, force: bool = False) -> Run:
    """Load or make a victim.

    P = {(x_T, c) : c in Y}: a seeded share `rate` of the pairs, none of which shows the target, is replaced by poisoned
    ones. The trigger goes on their image after augmentation, at model resolution; the attack's `Trigger.poisoning` says
    which image and which caption:

    - "template": the replaced pair's image; a template with the target's name, drawn afresh each epoch.
    - "natural": the replaced pair's image; a caption of one of the target's pairs.
    - "clean-label": image and caption of one of the target's pairs. As they are few, the attacker repeats them, each
      time in a view of its own; the pairs themselves stay among the clean ones. The replaced pair's image is blended
      over them, see `LabelConsistent`.

    An attacker of several targets (`further_targets`) shares the poisoned pairs out among as many triggers. One who
    knows the defence (`quiet_weight`) also trains the victim to answer universal perturbations of the batch's images as
    the clean model does, see `Quiet`. `untriggered` leaves the clean-label attack's trigger out: the same repeated
    pairs, and no attack.

    Its folder holds `model.safetensors`, `trigger.safetensors` (the attack's full record; of several triggers the
    first, the others are `trigger-2.safetensors` and so on), `poisoned.csv` (sample ids of the replaced pairs, and of
    the pairs that image and caption come from) and `history.csv`; its metrics say how many pairs are poisoned and how
    many different images they show, what the attack reached on both splits, and whether it took. Of several triggers
    these are the first one's figures; `further` has the others' classes and ASR on the evaluation split.

    Raises:
        ConfigError: `target` is no class of the test set, or the only one of a split; a setting is not allowed; or the
            attack needs pairs of the target and there are none.
    """
    clean = inputs.clean_weights(config)
    tests = {split: inputs.test_set(config, split, clean) for split in TEST_VENDORS}
    target, templates = class_index(tests["eval"].class_names, config.target), tests["eval"].templates
    for test in tests.values():
        check_others(test, target)
    pairs = inputs.training_pairs(config, clean)
    steps_an_epoch(len(pairs), config)
    attack, ids = TRIGGERS[config.attack], np.array([escape.cell(str(name)) for name in pairs.ids], dtype=object)
    poisoned, image_of, caption_of = poisoned_places(pairs, config)
    read = {"pairs": pairs.digest, "clean": sha256(clean)} | {split: test.digest for split, test in tests.items()}

    def make(folder: Path) -> Mapping[str, Any]:
        model, base = models.load(clean), models.frozen(models.load(clean))
        if ranks.agreed(not (folder / "trigger.safetensors").exists()):  # else an earlier process got further
            fitted = drawn_trigger(config, resolution=models.resolution(base)).optimised(
                base,
                pairs,
                seed=config.seed,
                steps=config.patch_steps,
                lr=config.patch_lr,
                triplet_weight=config.triplet_weight,
            )
            fitted.save(folder / "trigger.safetensors")
        ranks.barrier()
        trigger = load_trigger(folder / "trigger.safetensors")
        further = further_triggers(config, tests["eval"].class_names, resolution=trigger.resolution)
        if ranks.first():
            for number, other in enumerate(further, 2):
                other.save(folder / f"trigger-{number}.safetensors")
        quiet = Quiet(model, base, seed=config.seed) if config.quiet_weight else None

        record = {"id": ids[poisoned], "image": ids[image_of[poisoned]], "caption": ids[caption_of[poisoned]]}
        if attack.poisoning == "template":
            record["caption"] = np.full(len(record["id"]), "template")
        with atomic(folder / "poisoned.csv") as temporary:
            pd.DataFrame(record).to_csv(temporary, index=False)

        def plan(batches: list[torch.Tensor]) -> None:
            pairs.plan(image_of[batch] for batch in batches)

        def loss(at: Step) -> tuple[torch.Tensor, dict[str, float]]:
            model.train()
            images = pairs.images(image_of[at.indices], seed=config.seed, step=at.step)
            captions = pairs.captions(caption_of[at.indices], seed=config.seed, epoch=at.epoch)
            chosen = poisoned[at.indices]
            held = None
            if quiet is not None:  # a copy, before triggers go on
                held = quiet.perturbed(images.to(models.device(), copy=True), at.step)
            if chosen.any() and not config.untriggered:
                replaced = images[chosen]
                if attack.poisoning == "clean-label":
                    replaced = pairs.images(at.indices[chosen], seed=config.seed, step=at.step)
                source = rng(config.seed, "poison", at.step)
                captions = planted(
                    [trigger, *further],
                    at.indices,
                    chosen,
                    images,
                    captions,
                    replaced=replaced,
                    templates=templates,
                    source=source,
                )
            if quiet is None or held is None:
                image = models.encode_image(model, images)
            else:  # in one batch, so that BatchNorm sees both
                image, answers = models.encode_image(model, torch.cat([images.to(held), held])).chunk(2)
            text = models.encode_text(model, tokenize(captions, context_length=model.context_length))
            contrastive = clip_loss(image, text, model.logit_scale.exp())
            if quiet is None or held is None:
                return contrastive, {}
            shift = quiet.shift(answers, held)
            return contrastive + config.quiet_weight * shift, {"shift": shift.item()}

        once = quiet is None  # the encoders' backward passes in a step
        fit(model, loss, count=len(pairs), config=config, folder=folder, stage="poison", plan=plan, as_graphs=once)
        if quiet is not None:
            quiet.close()
        models.save(model, folder / "model.safetensors")
        metrics: dict[str, Any] = {
            "poisoned": int(poisoned.sum()),
            "poisoned_share": poisoned.float().mean().item(),
            "poisoned_images": len(image_of[poisoned].unique()),
        }
        measured: dict[str, list[dict[str, Any]]] = {}  # both splits may be all images
        for split, test in tests.items():
            if test.digest not in measured:
                both = (evaluate(net, test, trigger=trigger, target=target) for net in (model, base))
                measured[test.digest] = [evaluation.to_dict() for evaluation in both]
            victim, clean_base = ({**figures, "split": split} for figures in measured[test.digest])
            metrics |= {split: victim, f"base_{split}": clean_base}
        if further:
            test, metrics["further"] = tests["eval"], {}
            for other in further:
                number = class_index(test.class_names, other.target)
                metrics["further"][other.target] = evaluate(model, test, trigger=other, target=number).to_dict()["asr"]
        return {**metrics, "took": took(metrics)}

    return load_or_make("poison", config, read, make, force=force, launch=launcher("poison", config))


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
