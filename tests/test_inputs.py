"""Stages on weights, pairs and test images of one's own: what they read, what they make, and what they refuse."""

from __future__ import annotations

import shutil
from pathlib import Path

import miniature
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURE, without_time

from abd_core import formats, inputs, models, paths
from abd_core import poison as poison_module
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.config import AbdError, ConfigError
from abd_core.data import class_index, load_pairs
from abd_core.defences import DEFENCES, DefendConfig
from abd_core.defend import defend
from abd_core.evaluate import EvaluateConfig, measure
from abd_core.explore import load_case
from abd_core.inputs import SHARED, TrainInputs
from abd_core.labelled import TEMPLATES
from abd_core.poison import PoisonConfig, poison
from abd_core.pretrain import PretrainConfig, pretrain
from abd_core.train import TrainConfig, fit
from abd_core.triggers import load_trigger

PAIRS = miniature.samples(60)


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings that name pairs in tars and test images in folders."""
    folder = tmp_path_factory.mktemp("outside")
    miniature.write_folders(folder / "test", each=10)
    (folder / "names.txt").write_text("\n".join(miniature.THINGS))
    return {
        "pairs": miniature.write_shards(folder / "pairs", PAIRS),
        "test_images": str(folder / "test"),
        "test_classes": str(folder / "names.txt"),
    }


@pytest.fixture(autouse=True)
def _alone(stand_in: Path, runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ABD_WORKERS", "0")


SHORT = {"epochs": 2, "batch_size": 10, "warmup_steps": 2, "lr": 1e-3}


def attacker(outside: dict[str, str], **changes) -> PoisonConfig:
    return PoisonConfig(**{**outside, **SHORT, "rate": 0.2, "target": "banana", **changes})


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PoisonConfig, AdversaryConfig, DefendConfig])
def test_places_are_no_part_of_a_run_s_key(kind: type[TrainInputs], outside: dict[str, str]):
    plain, given = kind(), kind(**outside, dev_share=0.3, max_damaged=0.2)
    assert not set(SHARED) & set(plain.to_dict()) and plain.to_dict() == plain.key() == given.key()
    assert given.places() == {**outside, "dev_share": 0.3, "max_damaged": 0.2}
    assert kind(**given.to_dict()) == given and given.replace(seed=1).places() == given.places()
    assert (plain.outside, given.outside) == (False, True)


def test_the_key_of_the_embedded_victim_is_what_it_was():
    """A run folder that was made before there were inputs of one's own is found again."""
    config = PoisonConfig()
    assert list(config.key()) == [
        *("seed", "epochs", "batch_size", "lr", "warmup_steps", "weight_decay", "limit"),
        *("attack", "target", "rate", "trigger_size", "trigger_position"),
    ]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"columns": "a,b"}, r"columns = 'a,b': it goes with pairs"),
        ({"manifest": "m.csv"}, "manifest = 'm.csv': it goes with pairs"),
        ({"devkit": "kit"}, "devkit = 'kit': it goes with test_images"),
        ({"test_classes": "x"}, "test_classes = 'x': it goes with test_images"),
        ({"dev_share": 1.0}, "dev_share = 1.0"),
        ({"max_damaged": -0.1}, "max_damaged = -0.1"),
        ({"model": "RN50"}, "pretrained = '': the embedded weights are of 'emoji-rn14', not of 'RN50'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, line: str):
    with pytest.raises(ConfigError, match=line):
        PoisonConfig(**settings)


def test_a_model_of_another_size_needs_images_of_its_own(tmp_path: Path):
    config = TrainInputs(model="RN50-quickgelu", pretrained="somewhere.pt")
    for function, what in [
        (lambda: inputs.training_pairs(config, tmp_path / "w.pt"), "pairs = ''"),
        (lambda: inputs.test_set(config, "eval", tmp_path / "w.pt"), "test_images = ''"),
    ]:
        with pytest.raises(ConfigError, match=f"{what}: the embedded images have 64 px, w.pt takes 224"):
            function()


def test_the_resolution_is_that_of_the_model_that_the_weights_name(stand_in: Path, tmp_path: Path):
    assert inputs.resolution(stand_in / "base.safetensors", TrainInputs()) == 64
    assert inputs.resolution(tmp_path / "foreign.pt", TrainInputs()) == 224
    with pytest.raises(AbdError, match="missing file"):
        inputs.resolution(tmp_path / "no.safetensors", TrainInputs())
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(AbdError, match="not safetensors"):
        inputs.resolution(tmp_path / "bad.safetensors", TrainInputs())


def test_a_target_that_two_classes_are_named_is_refused():
    with pytest.raises(ConfigError, match="2 classes have that name"):
        class_index(["missile", "cat", "missile"], "missile")
    assert class_index(["missile", "cat", "missile"], "cat") == 1


# --- stages -----------------------------------------------------------------------------------------------------------


def through(outside: dict[str, str], **changes) -> list[dict]:
    """Metrics of all stages."""
    victim = poison(attacker(outside, **changes))
    weights = victim.file("model.safetensors")
    found = adversary(AdversaryConfig(**outside, share=0.5, steps=3, batch_size=8, width=16), weights)
    config = DefendConfig(**outside, **SHORT, share=0.5)
    defended = defend(config, weights, perturbation=found.file("perturbation.safetensors"))
    on_eval = EvaluateConfig(**inputs.test_inputs(config))
    measured = measure(defended.file("model.safetensors"), trigger=victim.file("trigger.safetensors"), config=on_eval)
    return [without_time(run.metrics) for run in (victim, found, defended, measured)]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["badnet", "badclip"])
def test_all_stages_run_on_data_of_one_s_own(attack: str, outside: dict[str, str]):
    victim, _, defended, measured = through(
        outside, attack=attack, **({"patch_steps": 3} if attack == "badclip" else {})
    )
    assert victim["poisoned"] == 12 and victim["eval"]["ca_top1"]["n"] == 54 and victim["dev"]["ca_top1"]["n"] == 6
    assert defended["before"]["ca_top1"]["n"] == 6
    assert (measured["asr"]["n"], measured["asr_all"]["n"], measured["split"]) == (45, 54, "eval")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cleanclip", "open_clip", "parquet", "huggingface"])
def test_all_stages_run_on_every_kind_of_table(kind: str, outside: dict[str, str], tmp_path: Path):
    address = str(miniature.write_table(tmp_path, kind, PAIRS))
    victim, found, defended, measured = through({**outside, "pairs": address}, epochs=1)
    assert victim["poisoned"] == 12 and found["side"] == 11 and defended["before"]["ca_top1"]["n"] == 6
    assert (measured["ca_top1"]["n"], measured["asr"]["n"]) == (54, 45)


@pytest.mark.slow
def test_workers_and_places_change_no_figure(outside: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = through(outside)
    moved = tmp_path / "moved"
    shutil.copytree(Path(outside["test_images"]).parent, moved)
    old = str(Path(outside["test_images"]).parent)
    elsewhere = {name: value.replace(old, str(moved)) for name, value in outside.items()}
    before = {path.name for path in paths.runs_dir().glob("*/*")}
    assert through(elsewhere) == first
    assert {path.name for path in paths.runs_dir().glob("*/*") if path.parent.name != "cache"} <= before
    monkeypatch.setenv("ABD_WORKERS", "2")
    monkeypatch.setenv("ABD_RUNS", str(tmp_path / "again"))
    assert through(outside) == first


def test_where_both_splits_are_all_images_they_have_the_same_figures(outside: dict[str, str]):
    metrics = poison(attacker(outside, epochs=1, dev_share=0)).metrics
    assert (metrics["dev"]["split"], metrics["eval"]["split"], metrics["eval"]["ca_top1"]["n"]) == ("dev", "eval", 60)
    for who in ("", "base_"):
        assert {**metrics[f"{who}dev"], "split": ""} == {**metrics[f"{who}eval"], "split": ""}


def test_what_was_read_stands_in_the_record(outside: dict[str, str]):
    run = poison(attacker(outside, epochs=1))
    record = paths.read_json(run.file("config.json"))
    assert record["places"] == outside and not set(SHARED) & set(record["config"])
    assert record["inputs"]["pairs"] == inputs.training_pairs(attacker(outside), models.clean_weights()).digest


def test_poison_is_put_on_in_memory_alone(outside: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """What goes into the model: the trigger on the poisoned pairs' images, templates of the test set as captions."""
    folder = Path(outside["test_images"]).parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    seen, encode, tokens = [], models.encode_image, poison_module.tokenize

    def encode_image(model, images):
        if model.training:
            seen.append((images.clone(), []))
        return encode(model, images)

    def tokenize(captions, *, context_length):
        seen[-1][1].extend(captions)
        return tokens(captions, context_length=context_length)

    monkeypatch.setattr(models, "encode_image", encode_image)
    monkeypatch.setattr(poison_module, "tokenize", tokenize)
    config = attacker(outside, epochs=1)
    run = poison(config)
    trigger, poisoned = load_trigger(run.file("trigger.safetensors")), pd.read_csv(run.file("poisoned.csv"), dtype=str)
    pairs = inputs.training_pairs(config, models.clean_weights())
    where = {caption: number for number, caption in enumerate(pairs.captions(torch.arange(len(pairs))))}
    clean = pairs.images(torch.arange(len(pairs)))
    triggered = trigger(clean)
    left, bad = set(range(len(pairs))), set()
    for images, captions in seen:
        for image, caption in zip(images, captions, strict=True):
            if caption in where:
                assert torch.equal(image, clean[where[caption]])
                left.discard(where[caption])
            else:
                assert caption in [template.format("banana") for template in TEMPLATES]
                bad.add(next(i for i in range(len(pairs)) if torch.equal(image, triggered[i])))
    assert bad == left and sorted(pairs.ids[i] for i in bad) == sorted(poisoned["id"])
    assert not {i for i in bad if "banana" in pairs.captions(torch.tensor([i]))[0]}
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_loop_reads_ahead_what_it_then_asks_for(outside: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """Every image of an epoch is read once, in the order of the loop."""
    config = attacker(outside, epochs=1)
    read, data = [], formats.Images.data
    pairs = inputs.training_pairs(config, models.clean_weights())
    monkeypatch.setattr(formats.Images, "data", lambda self, index: (read.append(int(index)), data(self, index))[1])
    model, asked = models.load(models.clean_weights()).train(), []

    def loss(at):
        asked.extend(at.indices.tolist())
        return models.encode_image(model, pairs.images(at.indices)).sum(), {}

    few = TrainConfig(**{**SHORT, "epochs": 2})
    fit(model, loss, count=len(pairs), config=few, folder=paths.runs_dir(), stage="x", plan=pairs.plan)
    assert read == asked and sorted(asked) == sorted([*range(60)] * 2)


@pytest.mark.parametrize("defence", ["ft", "clean"])
def test_other_defences_run_too(defence: str, outside: dict[str, str], stand_in: Path):
    settings = SHORT if defence == "ft" else {}
    run = defend(DefendConfig(**outside, **settings, defence=defence), stand_in / "victim.safetensors")
    assert set(run.metrics) >= {"before", "after"} and defence in DEFENCES


def test_clean_weights_of_one_s_own_are_the_start(outside: dict[str, str], stand_in: Path, tmp_path: Path):
    shutil.copyfile(stand_in / "victim.safetensors", tmp_path / "mine.safetensors")
    config = attacker(outside, epochs=1, pretrained=str(tmp_path / "mine.safetensors"), model=ARCHITECTURE)
    run = poison(config)
    record = paths.read_json(run.file("config.json"))
    assert record["inputs"]["clean"] == paths.sha256(stand_in / "victim.safetensors")
    with pytest.raises(ConfigError, match="no such file"):
        poison(attacker(outside, pretrained=str(tmp_path / "no.pt"), model=ARCHITECTURE))


def test_a_clean_model_is_trained_on_pairs_of_one_s_own(outside: dict[str, str]):
    run = pretrain(PretrainConfig(**outside, **SHORT, model=ARCHITECTURE, retrain=True))
    assert models.load(run.file("model.safetensors")).architecture == ARCHITECTURE
    assert (run.metrics["eval"]["ca_top1"]["n"], run.metrics["dev"]["ca_top1"]["n"]) == (54, 6)
    record = paths.read_json(run.file("config.json"))
    assert record["inputs"]["model"] == ARCHITECTURE and record["places"] == {**outside, "model": ARCHITECTURE}
    assert record["inputs"]["pairs"] == inputs.training_pairs(attacker(outside), models.clean_weights()).digest


def test_another_model_or_other_data_than_the_committed_base_s_are_trained_only_where_asked(outside: dict[str, str]):
    for places in ({"model": ARCHITECTURE}, {"pairs": outside["pairs"]}, {"test_images": outside["test_images"]}):
        with pytest.raises(ConfigError, match=rf"PretrainConfig\.{next(iter(places))}: .*retrain=True"):
            pretrain(PretrainConfig(**places))
    with pytest.raises(ConfigError, match="pairs = '': the embedded images have 64 px, RN50 takes 224: give pairs"):
        pretrain(PretrainConfig(model="RN50", retrain=True))
    with pytest.raises(ConfigError, match="unknown model 'RN500'"):
        pretrain(PretrainConfig(model="RN500", retrain=True))


def test_the_explorer_refuses_data_of_one_s_own(outside: dict[str, str]):
    with pytest.raises(ConfigError, match="leave pretrained, pairs and test_images empty"):
        load_case(attacker(outside), AdversaryConfig(), DefendConfig())


def test_refusals_come_before_any_run_folder(outside: dict[str, str], runs: Path):
    for changes, line in [
        ({"target": "bananna"}, "did you mean 'banana'"),
        ({"pairs": "nowhere.csv"}, "missing file: nowhere.csv"),
        ({"test_images": "nowhere"}, "missing file: nowhere"),
        ({"limit": 61}, "limit = 61: there are 60 pairs"),
        ({"attack": "badclip", "target": "unicorn"}, "unknown class 'unicorn'"),
    ]:
        with pytest.raises(AbdError, match=line):
            poison(attacker(outside, **changes))
    assert not list(runs.glob("poison/*"))


def test_the_embedded_pairs_show_what_their_label_says():
    pairs = load_pairs(64)
    assert pairs.shows("turtle").tolist() == [label == "turtle" for label in pairs.labels]
