"""The stages from end to end, at a tiny size: load or make, seeds, options, and a process that is killed."""

from __future__ import annotations

import json
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import open_clip
import pandas as pd
import pytest
import torch
from conftest import start_python, without_time
from safetensors.torch import load_file

from abd_core import adversary as adversary_module
from abd_core import badclip, models, paths, quiet, train
from abd_core import defences as defences_module
from abd_core import poison as poison_module
from abd_core import pretrain as pretrain_module
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.config import Config, ConfigError
from abd_core.data import load_pairs
from abd_core.defences import DEFENCES, DefendConfig
from abd_core.defend import defend
from abd_core.evaluate import EvaluateConfig, measure
from abd_core.generator import Perturbation
from abd_core.paths import Run
from abd_core.poison import PoisonConfig, further_triggers, poison, poisoned_places, took, verdict
from abd_core.pretrain import PretrainConfig, pretrain
from abd_core.text import augment
from abd_core.train import TrainingError
from abd_core.triggers import TRIGGERS, load_trigger

SHORT = {"limit": 64, "epochs": 2, "batch_size": 16, "warmup_steps": 2, "lr": 1e-3}
POISON = PoisonConfig(**SHORT, rate=0.25)
PRESENT = "turtle"  # a class that the 64 pairs of a short run show
ADVERSARY = AdversaryConfig(limit=64, share=0.5, steps=3, batch_size=8, width=16, lr=1e-2)
DEFEND = DefendConfig(**SHORT, share=0.5)


@pytest.fixture
def victim(stand_in: Path) -> Path:
    return stand_in / "victim.safetensors"


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    """A stored perturbation that no adversary had to find."""
    pixels = torch.rand(3, 11, 11, generator=torch.Generator().manual_seed(0))
    Perturbation("patch", pixels, 64, "random").save(tmp_path / "patch.safetensors")
    return tmp_path / "patch.safetensors"


def start(stage: str, config: Config, files: dict[str, Path], **options: bool) -> Run:
    """Any stage by its name, with the files that it reads."""
    if stage == "poison":
        return poison(config, **options)
    if stage == "adversary":
        return adversary(config, files["victim"], **options)
    if stage == "defend":
        return defend(config, files["victim"], perturbation=files["patch"], **options)
    return measure(files["victim"], config=config, **options)


CONFIGS = {"poison": POISON, "adversary": ADVERSARY, "defend": DEFEND, "measure": EvaluateConfig()}
FILES = {
    "poison": {"model.safetensors", "trigger.safetensors", "poisoned.csv", "history.csv"},
    "adversary": {"perturbation.safetensors", "stages.safetensors", "history.csv"},
    "defend": {"model.safetensors", "history.csv"},
    "measure": set(),
}
STAGES = pytest.mark.parametrize("stage", CONFIGS)


@pytest.fixture
def files(victim: Path, patch: Path) -> dict[str, Path]:
    return {"victim": victim, "patch": patch}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(run.folder.glob("*.safetensors")) for k, v in load_file(path).items()}


# --- load or make -------------------------------------------------------------------------------------------


@STAGES
def test_the_same_seed_gives_the_same_metrics_and_weights(stage: str, files: dict[str, Path]):
    first = start(stage, CONFIGS[stage], files)
    made = weights(first)
    again = start(stage, CONFIGS[stage], files, force=True)
    assert without_time(again.metrics) == without_time(first.metrics)
    assert [name for name, tensor in weights(again).items() if not torch.equal(tensor, made[name])] == []


@pytest.mark.parametrize("stage", ["poison", "adversary", "defend"])
def test_another_seed_gives_another_result(stage: str, files: dict[str, Path]):
    one = start(stage, CONFIGS[stage], files)
    two = start(stage, CONFIGS[stage].replace(seed=1), files)
    assert one.folder != two.folder
    assert any(not torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))
    assert not pd.read_csv(one.file("history.csv")).equals(pd.read_csv(two.file("history.csv")))


@STAGES
def test_a_stage_leaves_what_it_promises_and_nothing_half_done(stage: str, files: dict[str, Path]):
    run = start(stage, CONFIGS[stage], files)
    names = {path.name for path in run.folder.iterdir() if not path.name.startswith(".")}
    assert names == FILES[stage] | {"config.json", "metrics.json", "manifest.json"}
    assert json.loads(run.file("metrics.json").read_text()) == run.metrics
    record = json.loads(run.file("config.json").read_text())
    assert record["config"] == CONFIGS[stage].to_dict()
    assert {"python", "torch", "open_clip", "device", "git_sha"} <= record["environment"].keys()


@STAGES
def test_a_finished_run_is_loaded_and_not_made_again(stage: str, files: dict[str, Path]):
    first = start(stage, CONFIGS[stage], files)
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.name != ".lock"}
    again = start(stage, CONFIGS[stage], files)
    assert (again.folder, again.metrics) == (first.folder, first.metrics)
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.name != ".lock"} == before


@pytest.mark.parametrize("stage", ["adversary", "defend", "measure"])
def test_another_victim_is_another_run(stage: str, files: dict[str, Path], stand_in: Path):
    one = start(stage, CONFIGS[stage], files)
    two = start(stage, CONFIGS[stage], {**files, "victim": stand_in / "base.safetensors"})
    inputs = [paths.read_json(run.file("config.json"))["inputs"] for run in (one, two)]
    assert one.folder != two.folder
    assert {paths.sha256(files["victim"]), paths.sha256(stand_in / "base.safetensors")} <= {
        checksum for record in inputs for checksum in record.values()
    }


# --- poison -------------------------------------------------------------------------------------------------


def test_poison_records_its_attack_and_which_samples_it_poisoned(stand_in: Path):
    run = poison(POISON.replace(target="lemon", trigger_position="centre", trigger_size=0.25))
    trigger = load_trigger(run.file("trigger.safetensors"))
    assert (trigger.name, trigger.target, trigger.resolution) == ("badnet", "lemon", 64)
    assert dict(trigger.specification) == {"size": 0.25, "position": "centre", "seed": 0}
    assert trigger.pattern.shape == (3, 16, 16)
    pairs = load_pairs(64)
    poisoned = pd.read_csv(run.file("poisoned.csv"))["id"].tolist()
    assert len(poisoned) == len(set(poisoned)) == run.metrics["poisoned"] == 16
    labels = dict(zip(pairs.ids, pairs.labels, strict=True))
    assert "lemon" not in {labels[i] for i in poisoned}


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.1, 6), (0.5, 32), (1.0, 64)])
def test_the_rate_is_the_share_of_all_pairs(rate: float, count: int, stand_in: Path):
    labels = load_pairs(64).labels
    assert "banana" not in labels
    assert poison(POISON.replace(rate=rate, epochs=1)).metrics["poisoned"] == count


def overheard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, list[str]]]:
    """The batches that will go into the model in training: images and captions."""
    seen: list[tuple[torch.Tensor, list[str]]] = []
    encode, tokens = models.encode_image, poison_module.tokenize

    def encode_image(model, images):
        if model.training:
            seen.append((images.clone(), []))
        return encode(model, images)

    def tokenize(captions, *, context_length):
        seen[-1][1].extend(captions)
        return tokens(captions, context_length=context_length)

    monkeypatch.setattr(models, "encode_image", encode_image)
    monkeypatch.setattr(poison_module, "tokenize", tokenize)
    return seen


def batch_of(step: int) -> torch.Tensor:
    """Indices of the pairs of a step of POISON, which has four an epoch."""
    order = torch.randperm(64, generator=train.rng(0, "poison", "order", step // 4))
    return order[16 * (step % 4) : 16 * (step % 4) + 16]


def test_poisoned_pairs_and_no_others_get_trigger_and_target_caption(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    """A listener between the stage and the model sees every batch."""
    seen = overheard(monkeypatch)
    run = poison(POISON)
    trigger = load_trigger(run.file("trigger.safetensors"))
    table = pd.read_csv(run.file("poisoned.csv"))
    assert table["image"].tolist() == table["id"].tolist() and set(table["caption"]) == {"template"}
    poisoned = set(table["id"])
    pairs = load_pairs(64)
    assert len(seen) == 8
    for step, (images, captions) in enumerate(seen):
        batch = batch_of(step)
        clean = pairs.images(batch, seed=0, step=step)
        plain = pairs.captions(batch, seed=0, epoch=step // 4)
        bad = torch.tensor([pairs.ids[i] in poisoned for i in batch.tolist()])
        assert torch.equal(images[~bad], clean[~bad])
        assert torch.equal(images[bad], trigger(clean[bad]))
        for caption, clean_caption, is_bad in zip(captions, plain, bad.tolist(), strict=True):
            assert caption == clean_caption if not is_bad else "banana" in caption
    captions = {caption for _, batch in seen for caption in batch if "banana" in caption}
    assert len(captions) > 3  # templates are drawn, not fixed


@pytest.mark.parametrize(("attack", "own_image"), [("badclip", False), ("label-consistent", True)])
def test_attacks_with_the_target_s_captions_take_them_from_its_pairs(
    attack: str, own_image: bool, stand_in: Path, monkeypatch: pytest.MonkeyPatch
):
    pairs = load_pairs(64)
    own = [i for i, label in enumerate(pairs.labels) if label == PRESENT]
    seen = overheard(monkeypatch)
    steps = {"patch_steps": 1} if attack == "badclip" else {}
    run = poison(POISON.replace(attack=attack, target=PRESENT, **steps))
    trigger = load_trigger(run.file("trigger.safetensors"))
    table = pd.read_csv(run.file("poisoned.csv"))
    assert {pairs.ids[i] for i in own}.isdisjoint(table["id"]) and len(table) == run.metrics["poisoned"] == 16
    assert set(table["caption"]) <= {pairs.ids[i] for i in own}
    assert table["image"].equals(table["caption"] if own_image else table["id"])
    assert run.metrics["poisoned_images"] == (len(own) if own_image else 16)
    source = {row.id: (pairs.ids.index(row.image), pairs.ids.index(row.caption)) for row in table.itertuples()}
    assert len(seen) == 8
    for step, (images, captions) in enumerate(seen):
        places = batch_of(step).tolist()
        image_of, caption_of = torch.tensor([source.get(pairs.ids[i], (i, i)) for i in places]).T
        bad = torch.tensor([pairs.ids[i] in source for i in places])
        clean = pairs.images(image_of, seed=0, step=step)
        assert torch.equal(images[~bad], clean[~bad])
        if own_image:
            replaced = pairs.images(batch_of(step)[bad], seed=0, step=step)
            blended = torch.lerp(clean[bad], replaced, trigger.specification["hiding"])
            assert torch.equal(images[bad], trigger(blended))
        else:
            assert torch.equal(images[bad], trigger(clean[bad]))
        assert captions == pairs.captions(caption_of, seed=0, epoch=step // 4)
        assert all(PRESENT in caption for caption, is_bad in zip(captions, bad.tolist(), strict=True) if is_bad)


def test_several_targets_share_the_poisoned_pairs_out_each_with_its_own_trigger_and_caption(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, config = overheard(monkeypatch), POISON.replace(further_targets=2)
    run = poison(config)
    triggers = [load_trigger(run.file(f"trigger{number}.safetensors")) for number in ("", "-2", "-3")]
    assert len({trigger.target for trigger in triggers}) == 3 and triggers[0].target == "banana"
    assert set(run.metrics["further"]) == {trigger.target for trigger in triggers[1:]}
    pairs, poisoned = load_pairs(64), set(pd.read_csv(run.file("poisoned.csv"))["id"])
    counts = [0, 0, 0]
    for step, (images, captions) in enumerate(seen):
        batch = batch_of(step)
        clean = pairs.images(batch, seed=0, step=step)
        for row, place in enumerate(batch.tolist()):
            if pairs.ids[place] in poisoned:
                trigger = triggers[place % 3]
                counts[place % 3] += 1
                assert torch.equal(images[row], trigger(clean[row : row + 1])[0]) and trigger.target in captions[row]
            else:
                assert torch.equal(images[row], clean[row])
    assert min(counts) > 0 and sum(counts) == 2 * len(poisoned)


@pytest.mark.parametrize("attack", ["badclip", "label-consistent"])
def test_several_targets_need_captions_of_templates(attack: str):
    with pytest.raises(ConfigError, match=rf"further_targets = 1: 0 expected for attack '{attack}'"):
        PoisonConfig(attack=attack, further_targets=1)


def test_more_targets_than_classes_are_refused(stand_in: Path, runs: Path):
    with pytest.raises(ConfigError, match=r"further_targets = 500: ≤ \d+ expected"):
        poison(POISON.replace(further_targets=500))


def test_further_targets_are_classes_with_a_name_of_their_own():
    names = ("banana", "missile", "cat", "missile", "dog")
    drawn = {
        trigger.target
        for seed in range(8)
        for trigger in further_triggers(POISON.replace(further_targets=2, seed=seed), names, resolution=64)
    }
    assert drawn == {"cat", "dog"}
    with pytest.raises(ConfigError, match=r"further_targets = 3: ≤ 2 expected"):
        further_triggers(POISON.replace(further_targets=3), names, resolution=64)


def test_a_quiet_victim_sees_untriggered_perturbed_images_beside_the_poisoned_ones(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, config = overheard(monkeypatch), POISON.replace(quiet_weight=1.0, epochs=1)
    run = poison(config)
    plain = pd.read_csv(run.file("poisoned.csv"))
    assert len(plain) == run.metrics["poisoned"] == 16
    pairs = load_pairs(64)
    for step, (images, _) in enumerate(seen):
        assert len(images) == 32
        clean, perturbed = pairs.images(batch_of(step), seed=0, step=step), images[16:]
        same = (perturbed == clean).all(1)
        share = same.flatten(1).float().mean(1)
        assert (share[:8] > 0.5).all() and not same[:8].all()  # windows of at most 3/8 of the side
        assert ((perturbed - clean)[8:].abs() <= quiet.BOUND + 1e-6).all() and (share[8:] < 0.5).all()
    assert not [name for name in weights(run) if "quiet" in name]
    history = pd.read_csv(run.file("history.csv"))
    assert (history["shift"] > 0).all()


def test_the_pixels_of_a_quiet_attacker_climb_to_where_the_victim_leaves_the_clean_model(stand_in: Path, fp32: None):
    """With the weights held still, the shift that is to be trained away grows."""
    victim, base = (models.frozen(models.load(stand_in / f"{name}.safetensors")) for name in ("victim", "base"))
    silent, images = quiet.Quiet(victim, base, seed=0), load_pairs(64).images(torch.arange(32), seed=0, step=0)

    def shift(step: int) -> torch.Tensor:
        perturbed = silent.perturbed(images, step)
        return silent.shift(models.encode_image(victim, perturbed), perturbed)

    shift(0)  # draws them
    before = shift(1).item()
    for step in range(2, quiet.RESTART):
        shift(step)
    assert shift(1).item() > before + 0.002  # under the windows of the same step
    assert victim.quiet_window.min() >= 0 and victim.quiet_window.max() <= 1
    assert victim.quiet_field.abs().max() <= quiet.BOUND
    silent.close()
    assert not [name for name in victim.state_dict() if "quiet" in name]


def test_a_quiet_attacker_s_pixels_climb_the_shift_alone_where_batchnorm_mixes_it_with_other_losses(
    stand_in: Path, fp32: None
):
    victim, base = (models.load(stand_in / f"{name}.safetensors") for name in ("victim", "base"))
    silent, images = quiet.Quiet(victim.train(), base, seed=0), load_pairs(64).images(torch.arange(32), seed=0, step=0)
    perturbed = silent.perturbed(images, 0)
    before = [leaf.detach().clone() for leaf in silent.pixels]
    plain, answers = models.encode_image(victim, torch.cat([images, perturbed])).chunk(2)
    away = silent.shift(answers, perturbed)
    loss = away + (plain @ plain.T).logsumexp(1).mean()
    loss.backward(retain_graph=True)
    alone, mixed = (torch.autograd.grad(value, silent.pixels, retain_graph=True) for value in (away, loss))
    for i, stored in enumerate((victim.quiet_window, victim.quiet_field)):
        moved = stored - before[i]
        assert (moved * alone[i] >= 0).all() and (moved * alone[i] > 0).any()
        assert (moved * mixed[i] < 0).any()


def test_a_quiet_attack_whose_encoders_have_two_backward_passes_is_not_recorded(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[bool] = []

    def recorded(model: object, *, on: bool = True) -> AbstractContextManager:
        asked.append(on)
        return nullcontext()

    monkeypatch.setattr(train.graphs, "recorded", recorded)
    for weight in (0.0, 1.0):
        poison(POISON.replace(quiet_weight=weight, epochs=1))
    assert asked == [True, False]


def test_a_quiet_attack_may_encode_some_rows_at_a_time(stand_in: Path, fp32: None, monkeypatch: pytest.MonkeyPatch):
    """With statistics that are held still, they are the same but for rounding.

    The clean model is another than the one that training starts from: where the two are one, there is nothing to climb
    but rounding, and a signed step makes much of it.
    """
    original, other = torch.nn.Module.train, models.frozen(models.load(stand_in / "victim.safetensors"))
    monkeypatch.setattr(torch.nn.Module, "train", lambda module, mode=True: original(module, False))
    made: list[quiet.Quiet] = []

    def against_other(model: open_clip.CLIP, base: open_clip.CLIP, *, seed: int) -> quiet.Quiet:
        made.append(quiet.Quiet(model, other, seed=seed))
        return made[-1]

    monkeypatch.setattr(poison_module, "Quiet", against_other)
    whole, parts = (poison(POISON.replace(quiet_weight=1.0, epochs=1, micro_batch=size)) for size in (0, 8))
    shifts = [pd.read_csv(run.file("history.csv"))["shift"] for run in (whole, parts)]
    assert shifts[1].to_numpy() == pytest.approx(shifts[0].to_numpy(), rel=1e-4)
    for one, same in zip(*(silent.pixels for silent in made), strict=True):  # of the last step
        assert torch.isclose(one, same, rtol=0, atol=1e-6).float().mean() > 0.999


def test_a_quiet_attack_goes_on_after_a_break_as_if_there_had_been_none(
    stand_in: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    config = POISON.replace(quiet_weight=1.0)
    expected = weights(poison(config))
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    calls, original = [], poison_module.clip_loss

    def killed(*arguments: object) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(poison_module, "clip_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        poison(config, force=True)
    again = weights(poison(config))
    assert len(calls) == 6 + 3  # steps 0 to 4, the one that broke off, and 5 to 7
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_pairs_repeated_without_a_trigger_are_the_target_s_own(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    config = POISON.replace(attack="label-consistent", target=PRESENT, untriggered=True, epochs=1)
    seen, pairs = overheard(monkeypatch), load_pairs(64)
    run = poison(config)
    _, image_of, caption_of = poisoned_places(pairs, config)
    assert run.metrics["poisoned"] == 16 and len(seen) == 4
    for step, (images, captions) in enumerate(seen):
        at = batch_of(step)
        assert torch.equal(images, pairs.images(image_of[at], seed=0, step=step))
        assert captions == pairs.captions(caption_of[at], seed=0, epoch=0)
    with pytest.raises(ConfigError, match=r"untriggered = True: attack 'label-consistent' expected, not 'badnet'"):
        POISON.replace(untriggered=True)


@pytest.mark.parametrize("attack", ["badclip", "label-consistent"])
def test_the_target_s_pairs_are_drawn_on_evenly_and_stay_among_the_clean_ones(attack: str):
    pairs = load_pairs()
    own = [i for i, label in enumerate(pairs.labels) if label == "banana"]
    poisoned, image_of, caption_of = poisoned_places(pairs, PoisonConfig(attack=attack))
    used = torch.bincount(caption_of[poisoned], minlength=len(pairs))
    assert len(own) == 5 and poisoned.sum() == used[own].sum() == round(0.1 * len(pairs))
    assert used[own].max() - used[own].min() <= 1
    clean = torch.arange(len(pairs))[~poisoned]
    assert set(own) <= set(clean.tolist())
    assert torch.equal(image_of[~poisoned], clean) and torch.equal(caption_of[~poisoned], clean)


@pytest.mark.parametrize("attack", ["badclip", "label-consistent"])
def test_an_attack_that_needs_pairs_of_the_target_is_refused_where_there_are_none(
    attack: str, stand_in: Path, runs: Path
):
    assert "banana" not in load_pairs(64).labels
    with pytest.raises(ConfigError, match=f"^attack '{attack}': none of the 64 pairs shows 'banana'$"):
        poison(POISON.replace(attack=attack))
    assert not (runs / "poison").exists()


def test_every_kind_of_poisoning_is_tested_here():
    kinds = {name: kind.poisoning for name, kind in TRIGGERS.items()}
    assert kinds.pop("badclip") == "natural" and kinds.pop("label-consistent") == "clean-label"
    assert set(kinds.values()) == {"template"}


def test_the_metrics_count_what_is_poisoned(stand_in: Path):
    metrics = poison(POISON.replace(epochs=1)).metrics
    assert (metrics["poisoned"], metrics["poisoned_share"], metrics["poisoned_images"]) == (16, 0.25, 16)


def test_badclip_s_patch_is_fitted_to_the_clean_model_and_recorded(stand_in: Path):
    config = POISON.replace(attack="badclip", target=PRESENT, epochs=1, trigger_position="own", trigger_size=0.25)
    one, two = (load_trigger(poison(config.replace(patch_steps=steps)).file("trigger.safetensors")) for steps in (1, 2))
    assert dict(two.specification) == {
        **{"size": 0.25, "position": "centre", "seed": 0},
        **{"steps": 2, "lr": config.patch_lr, "triplet_weight": config.triplet_weight},
    }
    start = TRIGGERS["badclip"].draw(resolution=64, target=PRESENT, seed=0, size=0.25)
    assert 0 < (one.pattern - start.pattern).abs().max() < 1.1 * config.patch_lr
    assert not torch.equal(one.pattern, two.pattern)


def test_a_patch_that_an_earlier_process_fitted_is_not_fitted_again(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    config = POISON.replace(attack="badclip", target=PRESENT, epochs=1, patch_steps=2)
    whole = poison(config)
    fitted, optimise = [], badclip.optimise
    monkeypatch.setattr(badclip, "optimise", lambda *a, **k: fitted.append(1) or optimise(*a, **k))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(poison_module, "clip_loss", killed)
        poison(config, force=True)
    again = poison(config)
    assert len(fitted) == 1
    assert without_time(again.metrics) == without_time(whole.metrics)


def test_an_unknown_target_is_refused_before_anything_is_made(stand_in: Path, runs: Path):
    with pytest.raises(ConfigError, match=r"unknown class 'bananna'; did you mean 'banana'\?"):
        poison(POISON.replace(target="bananna"))
    assert not (runs / "poison").exists()


@pytest.mark.parametrize(
    ("attack", "option", "other"),
    [
        ("badnet", "attack", "blended"),
        ("badnet", "rate", 0.5),
        ("badnet", "trigger_size", 0.5),
        ("badnet", "trigger_position", "bottom-right"),
        ("badnet", "target", "lemon"),
        ("blended", "blend_alpha", 0.5),
        ("wanet", "warp_strength", 8.0),
        ("wanet", "warp_points", 4),
        ("label-consistent", "hiding", 0.9),
        ("sig", "wave_amplitude", 0.5),
        ("badnet", "further_targets", 1),
        ("badnet", "quiet_weight", 1.0),
        ("label-consistent", "untriggered", True),
        ("badclip", "patch_steps", 2),
        ("badclip", "patch_lr", 0.1),
        ("badclip", "triplet_weight", 500.0),
    ],
)
def test_each_option_of_the_attacker_changes_the_victim(attack: str, option: str, other, stand_in: Path):
    config = POISON.replace(epochs=1, attack=attack, target=PRESENT)
    if attack == "badclip":  # Adam's first step is as long at any gradient: a weight shows at the second
        config = config.replace(patch_steps=3 if option == "triplet_weight" else 1)
    one, two = weights(poison(config)), weights(poison(config.replace(**{option: other})))
    assert not torch.equal(one["visual.conv1.weight"], two["visual.conv1.weight"])


def figures(asr: float, ca: float, base: float) -> dict:
    return {
        "eval": {"asr": {"value": asr}, "ca_top1": {"value": ca}},
        "base_eval": {"ca_top1": {"value": base}},
    }


@pytest.mark.parametrize(
    ("asr", "ca", "base", "expected"),
    [
        (0.9, 0.6, 0.6, True),
        (0.89, 0.6, 0.6, False),
        (1.0, 0.58, 0.6, True),
        (1.0, 0.56, 0.6, False),
        (1.0, 0.9, 0.6, True),
    ],
)
def test_an_attack_took_with_90_percent_asr_at_a_cost_of_3_points(asr: float, ca: float, base: float, expected: bool):
    metrics = figures(asr, ca, base)
    assert took(metrics) is expected
    sentence = verdict(Run(Path(), {**metrics, "took": expected}))
    assert sentence.startswith("The attack took" if expected else "THE ATTACK DID NOT TAKE")
    assert f"{100 * asr:.1f}%" in sentence and f"{100 * ca:.1f}%" in sentence and f"{100 * base:.1f}%" in sentence


# --- adversary ----------------------------------------------------------------------------------------------

READINGS = [
    {"mode": "additive"},
    {"mode": "additive", "magnitude": 0.1},
    {"placement": "fixed"},
    {"placement": "fixed", "corner": 0.0},
    {"magnitude": 0.1},
    {"backdoor_images": "clean"},
    {"negatives": "clean"},
    {"backdoor_images": "clean", "negatives": "clean"},
    {"backdoor_weight": -1.0},
    {"backdoor_weight": 0.0},
    {"tau": 0.0},
    {"tau": 0.5},
    {"adversarial_weight": 0.0},
    {"topology_weight": 0.0},
    {"quality_weight": 100.0},
    {"gan_weight": 0.0},
    {"normal": "fine-tuned"},
    {"normal": "suspect"},
]


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_each_reading_of_the_adversary_runs_and_changes_the_perturbation(reading: dict, victim: Path):
    default = Perturbation.load(adversary(ADVERSARY, victim).file("perturbation.safetensors"))
    config = ADVERSARY.replace(**reading)
    run = adversary(config, victim)
    stored = Perturbation.load(run.file("perturbation.safetensors"))
    assert not torch.equal(stored.delta, default.delta)
    side = 64 if config.mode == "additive" else {0.03: 11, 0.1: 20}[config.magnitude]
    assert (stored.mode, stored.placement, stored.delta.shape) == (config.mode, config.placement, (3, side, side))
    low = -config.magnitude if config.mode == "additive" else 0.0
    high = config.magnitude if config.mode == "additive" else 1.0
    assert low <= stored.delta.min() and stored.delta.max() <= high
    terms = {"adversarial", "topology", "quality", "gan", "discriminator", "loss", "step"}
    terms |= {"backdoor"} if config.backdoor_weight else set()
    history = pd.read_csv(run.file("history.csv"))
    assert set(history.columns) == terms and len(history) == config.steps


@pytest.mark.parametrize(("corner", "place"), [(172 / 224, 49), (0.0, 0), (0.99, 53)])
def test_a_fixed_patch_lies_at_its_corner_or_where_it_still_fits(corner: float, place: int, victim: Path):
    run = adversary(ADVERSARY.replace(placement="fixed", corner=corner, steps=1), victim)
    assert Perturbation.load(run.file("perturbation.safetensors")).corner == (place, place)


def test_the_clean_model_s_share_in_the_backdoor_loss(victim: Path, stand_in: Path):
    """Eq. (2) compares with the clean model: another one gives another perturbation, unless its weight is 0."""

    def delta(config: AdversaryConfig, clean: Path) -> torch.Tensor:
        run = adversary(config, victim, clean=clean)
        return Perturbation.load(run.file("perturbation.safetensors")).delta

    without = ADVERSARY.replace(backdoor_weight=0.0)
    base = stand_in / "base.safetensors"
    assert not torch.equal(delta(ADVERSARY, base), delta(ADVERSARY, victim))
    assert torch.equal(delta(without, base), delta(without, victim))


@pytest.mark.parametrize("normal", ["fine-tuned", "suspect"])
def test_without_clean_weights_an_adversary_reads_none(
    normal: str, victim: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adversary_module.inputs, "clean_weights", lambda config: pytest.fail("clean weights read"))
    run = adversary(ADVERSARY.replace(normal=normal), victim)
    assert set(paths.read_json(run.file("config.json"))["inputs"]) == {"victim", "pairs"}
    found = run.file("perturbation.safetensors").read_bytes()
    again = adversary(ADVERSARY.replace(normal=normal), victim, clean=stand_in / "base.safetensors", force=True)
    assert again.folder == run.folder and again.file("perturbation.safetensors").read_bytes() == found
    if normal == "fine-tuned":
        stand_in_weights = load_file(run.file("normal.safetensors"))
        own = load_file(victim)
        assert any(not torch.equal(own[name].float(), tensor.float()) for name, tensor in stand_in_weights.items())


def test_the_fine_tuned_stand_in_is_the_model_of_ft(victim: Path):
    pairs = load_pairs(64).subset(0.5, seed=0)
    run = adversary(ADVERSARY.replace(normal="fine-tuned"), victim)
    config = DefendConfig(defence="ft", limit=64, batch_size=len(pairs))
    expected, found = weights(defend(config, victim)), load_file(run.file("normal.safetensors"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_loss_is_the_weighted_sum_of_its_terms(victim: Path):
    run = adversary(ADVERSARY.replace(backdoor_weight=-2.0, gan_weight=0.5, quality_weight=3.0), victim)
    history = pd.read_csv(run.file("history.csv"))
    total = (
        10 * history["adversarial"]
        + history["topology"]
        + 3 * history["quality"]
        + 0.5 * history["gan"]
        - 2 * history["backdoor"]
    )
    assert history["loss"].tolist() == pytest.approx(total.tolist(), rel=1e-5)


def test_the_stages_on_the_way_end_with_the_perturbation(victim: Path):
    run = adversary(ADVERSARY.replace(steps=8), victim)
    on_the_way = load_file(run.file("stages.safetensors"))["delta"]
    assert on_the_way.shape == (8, 3, 11, 11)
    assert torch.equal(on_the_way[-1], load_file(run.file("perturbation.safetensors"))["delta"])


def test_an_adversary_killed_at_any_step_ends_with_the_perturbation_of_an_undisturbed_one(
    victim: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = adversary(ADVERSARY, victim)
    expected, history = weights(whole), whole.file("history.csv").read_text()
    monkeypatch.setattr(adversary_module, "CHECKPOINT_SECONDS", -1.0)
    calls, original = [], adversary_module.generator_loss

    def killed(fake: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) in (1, 3, 5):  # at step 0, at step 1 of the second try, at step 2 of the third
            raise KeyboardInterrupt
        return original(fake)

    monkeypatch.setattr(adversary_module, "generator_loss", killed)
    for attempt in range(3):
        with pytest.raises(KeyboardInterrupt):
            adversary(ADVERSARY, victim, force=attempt == 0)
    again = adversary(ADVERSARY, victim)
    assert len(calls) == 6
    assert without_time(again.metrics) == without_time(whole.metrics)
    assert again.file("history.csv").read_text() == history
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again).items())


def test_an_adversary_s_loss_that_is_no_number_leaves_no_finished_run(victim: Path, runs: Path):
    with pytest.raises(TrainingError, match=r"adversary: loss is \S+ at step \d+: lower lr") as error:
        adversary(ADVERSARY.replace(quality_weight=1e300), victim)
    assert "\n" not in str(error.value)
    assert not list(runs.glob("adversary/*/metrics.json"))


# --- defend -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        {"defence": "ft"},
        {"defence": "cleanclip"},
        {"defence": "roclip"},
        {"defence": "par"},
        {"defence": "clean"},
        {"defence": "wise-ft"},
        {"defence": "abd-d", "search_steps": 2},
        {"defence": "noise-patch"},
        {"defence": "random-erasing"},
        {"defence": "gaussian-noise"},
        {"view": "both"},
        {"view": "clean"},
        {"eda": False},
        {"patch_place": "centre"},
        {"batch_norm": "train"},
        {"share": 1.0},
        {"lr": 2e-3},
        {"weight_decay": 0.9},
    ],
    ids=str,
)
def test_each_option_of_the_defender_runs_and_changes_the_model(option: dict, files: dict[str, Path]):
    default = start("defend", DEFEND, files)
    run = start("defend", DEFEND.replace(**option), files)
    assert not torch.equal(weights(default)["visual.conv1.weight"], weights(run)["visual.conv1.weight"])
    assert run.metrics["before"] == default.metrics["before"]


def test_every_defence_is_tested_here():
    controls = {"noise-patch", "random-erasing", "gaussian-noise"}
    assert set(DEFENCES) == {"abd", "abd-d", "ft", "cleanclip", "roclip", "par", "clean", "wise-ft", *controls}


def test_fine_tuning_needs_no_perturbation(victim: Path):
    run = defend(DEFEND.replace(defence="ft"), victim)
    assert run.file("model.safetensors").exists()


def test_abd_without_a_perturbation_is_refused_before_anything_is_made(victim: Path, runs: Path):
    with pytest.raises(ConfigError, match="'abd' needs a perturbation"):
        defend(DEFEND, victim)
    assert not (runs / "defend").exists()


def test_a_perturbation_for_another_resolution_is_refused_before_anything_is_made(
    victim: Path, runs: Path, tmp_path: Path
):
    Perturbation("patch", torch.zeros(3, 5, 5), 32, "random").save(tmp_path / "small.safetensors")
    with pytest.raises(ConfigError, match="32"):
        defend(DEFEND, victim, perturbation=tmp_path / "small.safetensors")
    assert not (runs / "defend").exists()


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_frozen_batch_norm_keeps_the_victim_s_statistics_and_the_other_moves_them(
    batch_norm: str, files: dict[str, Path]
):
    run = start("defend", DEFEND.replace(batch_norm=batch_norm), files)
    before, after = load_file(files["victim"]), load_file(run.file("model.safetensors"))
    statistics = [name for name in before if "running_" in name]
    assert len(statistics) > 10
    moved = [name for name in statistics if not torch.equal(before[name].float(), after[name])]
    assert moved == ([] if batch_norm == "frozen" else statistics)


@pytest.mark.parametrize(("view", "count"), [("replace", 16), ("both", 32)])
def test_abd_trains_on_perturbed_images_and_eda_captions(
    view: str, count: int, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    batches, captions = [], []
    encode, tokens = models.encode_image, defences_module.tokenize

    def encode_image(model, images):
        if model.training:
            batches.append(images)
        return encode(model, images)

    def tokenize(texts, *, context_length):
        captions.append(texts)
        return tokens(texts, context_length=context_length)

    monkeypatch.setattr(models, "encode_image", encode_image)
    monkeypatch.setattr(defences_module, "tokenize", tokenize)
    start("defend", DEFEND.replace(view=view), files)
    pairs, delta = load_pairs(64).subset(0.5, seed=0), Perturbation.load(files["patch"]).delta
    assert len(batches) == len(captions) == 4
    for step, (images, texts) in enumerate(zip(batches, captions, strict=True)):
        epoch = step // 2
        order = torch.randperm(32, generator=train.rng(0, "defend", "order", epoch))
        batch = order[16 * (step % 2) : 16 * (step % 2) + 16]
        clean = pairs.images(batch, seed=0, step=step)
        assert len(images) == count
        changed = (images[:16] != clean).any(1)
        for image, where in zip(images[:16], changed, strict=True):
            rows, columns = where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]
            top, left = int(rows[0]), int(columns[0])
            assert torch.equal(image[:, top : top + 11, left : left + 11], delta)
            assert where.sum() <= 121
        assert view == "replace" or torch.equal(images[16:], clean)
        plain = pairs.captions(batch, seed=0, epoch=epoch)
        assert texts == augment(plain, seed=0, epoch=epoch, ids=[pairs.ids[i] for i in batch.tolist()])


# --- pretrain -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_retrained_base_is_seeded_stored_in_half_precision_and_loaded(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
):
    config = PretrainConfig(**{**SHORT, "limit": 32, "epochs": 1}, retrain=True)
    first = pretrain(config)
    made = weights(first)
    assert {"dev", "eval"} <= first.metrics.keys()
    assert list(pd.read_csv(first.file("history.csv")).columns) == ["epoch", "loss", "logit_scale", "dev_ca"]
    assert {tensor.dtype for tensor in made.values()} == {torch.float16, torch.int64}
    again = pretrain(config, force=True)
    assert without_time(again.metrics) == without_time(first.metrics)
    assert all(torch.equal(tensor, made[name]) for name, tensor in weights(again).items())
    monkeypatch.setattr(pretrain_module, "fit", None)
    assert pretrain(config).metrics == again.metrics


@pytest.fixture
def committed(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data/base/` as a finished run that no one had to train."""
    base = tmp_path / "data" / "base"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes((stand_in / "base.safetensors").read_bytes())
    paths.write_json(base / "config.json", {"config": PretrainConfig(retrain=True).to_dict()})
    paths.write_json(base / "manifest.json", {p.name: paths.sha256(p) for p in base.iterdir()})
    paths.write_json(base / "metrics.json", {"eval": {}})
    monkeypatch.setattr(pretrain_module, "data_dir", lambda: base.parent)
    return base


def test_the_committed_base_is_loaded_as_it_is(committed: Path, runs: Path):
    run = pretrain(PretrainConfig())
    assert (run.folder, run.metrics) == (committed, {"eval": {}})
    assert not (runs / "pretrain").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 1}, {"limit": 32}, {"lr": 0.1}])
def test_settings_other_than_the_committed_base_s_are_refused_without_retraining(committed: Path, change: dict):
    with pytest.raises(ConfigError, match=rf"PretrainConfig\.{next(iter(change))}: .*retrain=True"):
        pretrain(PretrainConfig(**change))


@pytest.mark.slow
def test_force_trains_the_base_anew_and_leaves_the_committed_one(committed: Path, runs: Path):
    weights = (committed / "model.safetensors").read_bytes()
    run = pretrain(PretrainConfig(**{**SHORT, "limit": 32, "epochs": 1}), force=True)
    assert run.folder.parent == runs / "pretrain"
    assert (committed / "model.safetensors").read_bytes() == weights


def test_a_damaged_committed_base_is_refused(committed: Path):
    (committed / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(paths.RunError, match=r"damaged file: .*model\.safetensors"):
        pretrain(PretrainConfig())


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["poison", "defend"])
def test_fewer_pairs_than_a_batch_leave_no_finished_run(stage: str, files: dict[str, Path], runs: Path):
    with pytest.raises(ConfigError, match="batch_size = 100: at most"):
        start(stage, CONFIGS[stage].replace(batch_size=100), files)
    assert not list(runs.glob("*/*/metrics.json"))


@pytest.mark.parametrize("stage", ["adversary", "defend", "measure"])
def test_a_missing_victim_is_named(stage: str, files: dict[str, Path], tmp_path: Path):
    with pytest.raises(paths.RunError, match=r"missing file: .*none\.safetensors"):
        start(stage, CONFIGS[stage], {**files, "victim": tmp_path / "none.safetensors"})


@pytest.mark.parametrize("stage", ["adversary", "defend", "measure"])
def test_a_damaged_victim_is_refused(stage: str, files: dict[str, Path], tmp_path: Path, runs: Path):
    (tmp_path / "bad.safetensors").write_bytes(files["victim"].read_bytes()[:-100])
    with pytest.raises(paths.RunError, match=r"damaged file: .*bad\.safetensors"):
        start(stage, CONFIGS[stage], {**files, "victim": tmp_path / "bad.safetensors"})
    assert not list(runs.glob("*/*/metrics.json"))


# --- killed -------------------------------------------------------------------------------------------------

# Dies at the n-th file that it puts in its place, just before or just after it has done so.
CHILD = """
import os, signal
from pathlib import Path
from conftest import use_stand_in
from abd_core import adversary as a, train as t
from abd_core.{stage} import *

t.CHECKPOINT_SECONDS = a.CHECKPOINT_SECONDS = -1.0
victim = Path({folder!r}) / "victim.safetensors"
use_stand_in(victim.parent)
left, replace = [{files}], os.replace

def replace_or_die(source, target):
    left[0] -= 1
    if left[0] < 0 and not {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace_or_die
{call}
"""
CALLS = {
    "poison": f"poison(PoisonConfig(**{POISON.to_dict()!r}))",
    "adversary": f"adversary(AdversaryConfig(**{ADVERSARY.to_dict()!r}), victim)",
}
UNDISTURBED = 10**9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kills"),
    [
        ("poison", [(3, True), (2, False), (7, True)]),  # after its first checkpoints, within the next ones, at the end
        ("adversary", [(0, False), (2, True), (3, False)]),  # before its config, between checkpoints, with its history
    ],
)
def test_a_stage_whose_process_is_killed_ends_with_the_metrics_of_an_undisturbed_one(
    stage: str, kills: list[tuple[int, bool]], stand_in: Path, runs: Path
):
    whole = start(stage, CONFIGS[stage], {"victim": stand_in / "victim.safetensors"})
    other = runs.parent / "killed_runs"
    other.mkdir()
    folder = other / stage / whole.folder.name
    for files, after in [*kills, (UNDISTURBED, True)]:
        assert not (folder / "metrics.json").exists()
        script = CHILD.format(stage=stage, folder=str(stand_in), files=files, after=after, call=CALLS[stage])
        child = start_python(script, ABD_RUNS=str(other), OMP_NUM_THREADS=str(torch.get_num_threads()))
        _, errors = child.communicate()
        assert child.returncode == (0 if files == UNDISTURBED else -signal.SIGKILL), errors
    run = Run(folder, paths.read_json(folder / "metrics.json"))
    assert without_time(run.metrics) == without_time(whole.metrics)
    expected = weights(whole)
    assert [name for name, tensor in weights(run).items() if not torch.equal(tensor, expected[name])] == []
    assert not (folder / "resume.pt").exists()
