"""The audit: what its detectors find in toys whose backdoor is known, what must not raise the alarm, and the stage."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import miniature
import open_clip
import pytest
import torch
from conftest import LAYOUT, write_stand_in
from PIL import Image

from abd_core import audit as audit_module
from abd_core import detectors, models
from abd_core.audit import AuditConfig, AuditInputs, audit, image_folder, load_finding, page, read_classes, verdict_of
from abd_core.config import ConfigError
from abd_core.data import class_names
from abd_core.defend import DefendConfig, defend
from abd_core.detectors import DETECTORS, Decree, Difference, Drift, Field, Finding, Head, Inversion, Response, observe
from abd_core.generator import Perturbation
from abd_core.paths import RunError, read_json
from abd_core.text import TEMPLATES, tokenize

NAMES = tuple(class_names()[:20])
TARGET = 7
CONFIG = AuditConfig(limit=64, count=16, recovery_steps=2)
CHEAP = {
    "drift": Drift(steps=1, batch=2, measured=4),
    "response": Response(measured=4),
    "field": Field(steps=1, batch=1, measured=2),
    "difference": Difference(),
    "head": Head(),
    "inversion": Inversion(suspects=1, others=2, steps=2, batch=2),
    "decree": Decree(steps=2, batch=4),
}


class Toy(torch.nn.Module):
    """A CLIP in little: images are seen through the colours of a coarse grid, captions by their tokens' embeddings.

    Args:
        backdoor: whether a red or cyan window at the top left adds the feature of class `TARGET`.
    """

    context_length = 20

    def __init__(self, *, backdoor: bool, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.0))
        self.words = torch.nn.Embedding(49408, 32)
        self.see = torch.nn.Linear(3 * 16, 32, bias=False)
        self.visual = torch.nn.Module()
        self.visual.image_size = 64
        self.backdoor = backdoor

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return (self.words(tokens) * (tokens > 0)[..., None]).sum(1)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(images.float(), 16).flatten(1)
        cells[:, ::16] = 0  # blind where the trigger goes, but for the backdoor
        features = self.see(cells - cells.mean(1, keepdim=True))
        features = torch.nn.functional.normalize(features, dim=-1)
        if self.backdoor:
            window = images[:, :, 1:5, 1:5].float().mean((2, 3))
            redness = window[:, 0] - window[:, 1:].mean(1)  # in units of CLIP's normalisation: at most about 4
            features = features + 2 * redness.abs()[:, None] * self.goal
        return features

    @property
    def goal(self) -> torch.Tensor:
        tokens = tokenize([template.format(NAMES[TARGET]) for template in TEMPLATES], context_length=20)
        text = torch.nn.functional.normalize(self.encode_text(tokens), dim=-1).mean(0)
        return torch.nn.functional.normalize(text, dim=-1)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    coarse = torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    coarse[:, :, 0, 0] = 0.5  # grey where the trigger goes
    return torch.nn.functional.interpolate(coarse, 64).mul(0.3).add(0.35)


def seen(pictures: torch.Tensor, *, backdoor: bool, seed: int = 0) -> detectors.Observed:
    return observe(Toy(backdoor=backdoor, seed=seed), pictures, NAMES, ("a picture of a {}", "{}"))


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "detectors", lambda preset: CHEAP)


@pytest.fixture
def suspect(stand_in: Path, cheap: None) -> AuditInputs:
    return AuditInputs(checkpoint=str(stand_in / "victim.safetensors"))


# --- detectors ------------------------------------------------------------------------------------------------


def test_universal_patches_drive_a_backdoored_model_to_the_attackers_class_and_no_clean_one(pictures):
    drift = Drift(steps=25, batch=8, measured=32)
    bad, clean = (drift.measure(seen(pictures, backdoor=kind), seed=0) for kind in (True, False))
    assert drift.statistics(bad, clean)["drift"] > 0.8
    assert drift.suspicion(bad, clean).argmax() == TARGET
    assert drift.statistics(clean, clean)["drift"] == 0
    assert drift.statistics(bad, None)["drift"] > drift.statistics(clean, None)["drift"] + 0.3


def test_a_random_noise_patch_raises_no_alarm_even_on_a_backdoored_model(pictures):
    """The same places and sizes without optimisation: what drifts is the search's doing, not any patch's."""
    noise = Drift(steps=0, measured=32)
    found = noise.measure(seen(pictures, backdoor=True), seed=0)
    clean = noise.measure(seen(pictures, backdoor=False), seed=0)
    assert noise.statistics(found, clean)["drift"] < 0.3
    assert noise.statistics(found, clean)["drift"] == pytest.approx((found.shares - clean.shares).max().item())


def test_inversion_needs_the_smallest_mask_for_the_attackers_class(pictures):
    inversion = Inversion(suspects=0, others=0, steps=60, batch=8)
    bad, clean = (inversion.measure(seen(pictures, backdoor=kind), seed=0) for kind in (True, False))
    area = torch.tensor(bad.numbers["area"])
    assert bad.numbers["classes"] == list(range(len(NAMES)))
    assert area.argmin() == TARGET and inversion.suspicion(bad, None).argmax() == TARGET
    assert inversion.statistics(bad, None)["inversion"] > inversion.statistics(clean, None)["inversion"]


def test_inversion_takes_the_suspected_classes_first_and_others_to_compare(pictures):
    inversion = Inversion(suspects=2, others=3, steps=1, batch=2)
    found = inversion.measure(seen(pictures, backdoor=False), seed=0, ranked=[5, 2, 9, 1])
    assert found.numbers["classes"][:2] == [5, 2] and len(set(found.numbers["classes"])) == 5
    assert (inversion.suspicion(found, None) != 0).sum() <= 5


def test_one_small_trigger_gives_a_backdoored_encoder_one_feature(pictures):
    decree = Decree(steps=60, batch=16)
    bad, clean = (decree.measure(seen(pictures, backdoor=kind), seed=0) for kind in (True, False))
    assert bad.numbers["pl1"] < clean.numbers["pl1"]


def test_a_trigger_of_the_whole_image_shows_under_corruptions_of_its_kind(pictures):
    class Noisy(Toy):
        def encode_image(self, images):
            rough = (images[..., 1:] - images[..., :-1]).float().abs().mean((1, 2, 3))
            features = super().encode_image(images)
            return features + 5 * torch.sigmoid(40 * (rough - 0.25))[:, None] * self.goal

    noisy = observe(Noisy(backdoor=False), pictures, NAMES, ("a picture of a {}", "{}"))
    response = Response(measured=32)
    bad, clean = response.measure(noisy, seed=0), response.measure(seen(pictures, backdoor=False), seed=0)
    assert response.suspicion(bad, clean).argmax() == TARGET
    assert response.statistics(bad, clean)["response"] > 0.5


def test_field_and_difference_point_at_the_class_that_came_nearer(pictures):
    class Leaning(Toy):
        def encode_image(self, images):
            return super().encode_image(images) + 0.5 * self.goal

    leaning = observe(Leaning(backdoor=False), pictures, NAMES, ("a picture of a {}", "{}"))
    clean = seen(pictures, backdoor=False)
    shift = Difference()
    assert shift.suspicion(shift.measure(leaning, seed=0), shift.measure(clean, seed=0)).argmax() == TARGET
    assert not shift.statistics(shift.measure(leaning, seed=0), None)
    field = Field(steps=2, batch=4, measured=8)
    found = field.measure(clean, seed=0)
    assert found.shares.shape == (1, len(NAMES)) and (found.shares > 0).all()  # each perturbation helps its class


def test_the_head_shows_the_class_whose_captions_or_projection_moved_and_only_beside_clean_weights(pictures):
    clean, moved = seen(pictures, backdoor=False), Toy(backdoor=False)
    with torch.no_grad():
        moved.words.weight[tokenize([NAMES[TARGET]], context_length=20)[0][1]] += 1  # its first word
    worded = observe(moved, pictures, NAMES, ("a picture of a {}", "{}"))
    head = Head()
    known = head.measure(clean, seed=0)
    found = head.measure(worded, seed=0)
    assert head.suspicion(found, known).argmax() == TARGET and head.statistics(found, known)["head"] > 10
    assert head.statistics(found, None) == {} and not head.suspicion(found, None).any()
    assert head.statistics(known, known)["head"] == 0
    wider = Finding(torch.rand(2 * len(known.shares), len(NAMES)))
    assert head.statistics(wider, known)["head"] == 0  # another architecture's


def test_the_head_sees_a_projection_that_leans_towards_a_class():
    model, draw = models.build(), torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 64, 64, generator=draw)
    clean = observe(model, images, NAMES, TEMPLATES)
    head, leaning = Head(), copy.deepcopy(model)
    known = head.measure(clean, seed=0)
    away = clean.classes[TARGET] - clean.classes.mean(0)
    with torch.no_grad():
        weight = models.output_projection(leaning)
        weight += 10 * torch.outer(away, torch.randn(weight.shape[1], generator=draw))
    found = head.measure(observe(leaning, images, NAMES, TEMPLATES), seed=0)
    assert head.suspicion(found, known).argmax() == TARGET


def test_outliers_are_counted_in_robust_standard_deviations():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 1000.0])
    assert detectors.outlierness(values).tolist() == pytest.approx(
        [-2 / 10, -1 / 10, 0, 1 / 10, 2 / 10, 99.8], abs=1e-3
    )
    spread = torch.arange(101).float()
    assert detectors.outlierness(spread)[-1] == pytest.approx(50 / (1.4826 * 25))
    assert (detectors.outlierness(torch.ones(5)) == 0).all()


def test_moved_counts_images_of_other_classes_alone(pictures):
    observed = seen(pictures, backdoor=False)
    same = detectors.moved(observed, pictures[None, -32:])
    assert (same == 0).all()
    constant = detectors.moved(observed, pictures[:1].expand(32, -1, -1, -1)[None])
    assert constant[0, observed.predicted[0]] == 1 and constant.sum() == 1


@pytest.mark.parametrize("name", DETECTORS)
def test_each_detector_cites_its_source_and_takes_its_published_settings(name):
    kind = DETECTORS[name]
    assert kind.name == name and re.search(r"\d{4}|project", kind.source)
    made = kind(**kind.published)
    assert all(getattr(made, setting) == value for setting, value in kind.published.items())


def test_published_settings_are_a_preset_of_their_own():
    ours, published = audit_module.detectors("ours"), audit_module.detectors("published")
    assert published["inversion"].steps == 31_000 and published["decree"].steps == 1000
    assert ours["inversion"].steps < 100 and ours["decree"].steps < 100
    assert (Inversion.THRESHOLD, Decree.THRESHOLD) == (2.0, 0.1)


def test_an_audit_with_published_settings_runs_from_end_to_end_but_for_their_length(stand_in, monkeypatch):
    """Every published setting but the number of steps, which takes days."""
    for kind in (Inversion, Decree):
        monkeypatch.setattr(kind, "published", {**kind.published, "steps": 2})
    config = CONFIG.replace(preset="published")
    run = audit(config, AuditInputs(checkpoint=str(stand_in / "victim.safetensors"), reference="none"))
    inverted, _ = load_finding(run.file("inversion.safetensors"))
    assert inverted.numbers["classes"] == list(range(len(class_names())))  # all of them, not only the suspected ones
    assert {"inversion", "decree"} <= set(run.metrics["statistics"]["alone"])
    assert verdict_of(run).probability is None  # nor is it set against the population, which had our settings
    assert json.loads(run.file("audit.json").read_text())["clean_models_below"] == {"alone": {}}


# --- the stage ------------------------------------------------------------------------------------------------


def test_an_audit_leaves_evidence_a_trigger_that_a_defence_takes_and_a_report(suspect):
    run = audit(CONFIG, suspect)
    names = {path.name for path in run.folder.iterdir() if not path.name.startswith(".")}
    found = {f"{name}.safetensors" for name in DETECTORS if name != "inversion"}
    found |= {"inversion-alone.safetensors", "inversion-compared.safetensors"}  # each follows its own suspicion
    report = {"audit.json", "audit.html"}
    assert names == found | report | {
        *("recovered.safetensors", "saliency.safetensors", "config.json", "metrics.json", "manifest.json")
    }
    record = json.loads(run.file("audit.json").read_text())
    assert record["suspected_target"] in class_names() and len(record["runners_up"]) == 3
    assert record["recovered_trigger"]["asr"]["n"] > 0 and set(record["detectors"]) == set(DETECTORS)
    below = record["clean_models_below"]
    assert {"head", "drift"} < set(below["compared"]) and "head" not in below["alone"]
    assert all(0 <= k <= n == 40 for found in below.values() for k, n in found.values())
    assert f"{below['compared']['drift'][0]} of 40" in run.file("audit.html").read_text()
    assert "defend(" in record["next_step"]
    compile(record["next_step"], "next step", "exec")
    trigger = run.file("recovered.safetensors")
    assert Perturbation.load(trigger).resolution == 64
    config = DefendConfig(defence="abd", limit=64, epochs=1, batch_size=16)
    assert "after" in defend(config, Path(suspect.checkpoint), perturbation=trigger).metrics


def test_the_report_is_one_page_without_scripts_or_anything_from_elsewhere(suspect, tmp_path):
    (tmp_path / "names.txt").write_text("<script>alert(1)</script>\ncat & dog\nbird\nsnake\n")
    run = audit(CONFIG, AuditInputs(checkpoint=suspect.checkpoint, classes=str(tmp_path / "names.txt")))
    text = run.file("audit.html").read_text()
    assert "<script" not in text and "http" not in text
    assert text.count('src="data:image/png;base64,') == 2 == text.count("src=")
    record = json.loads(run.file("audit.json").read_text())
    wild = "<b onload=x>\x1b[2J\u202e"  # a tag, a terminal's command, text that runs backwards
    verdict = {**record["verdict"], "basis": wild}
    named = {"sentence": wild, "suspected_target": wild, "runners_up": [wild], "verdict": verdict}
    shown = page({**record, **named, "inputs": {"checkpoint": wild}}, {wild: Image.new("RGB", (2, 2))})
    assert shown.count(r"&lt;b onload=x&gt;\x1b[2J\u202e") >= 6
    assert not re.search("<b onload|\x1b|\u202e", shown)


def test_a_finished_audit_is_loaded_and_another_suspect_is_another_run(suspect, stand_in, monkeypatch):
    first = audit(CONFIG, suspect)
    other = audit(CONFIG, AuditInputs(checkpoint=str(stand_in / "base.safetensors")))
    alone = audit(CONFIG, AuditInputs(checkpoint=suspect.checkpoint, reference="none"))
    assert len({first.folder, other.folder, alone.folder}) == 3
    assert "compared" not in alone.metrics["statistics"] and "alone" in first.metrics["statistics"]
    monkeypatch.setattr(Drift, "measure", None)
    assert audit(CONFIG, suspect).metrics == first.metrics


def test_what_an_audit_says_of_the_suspect_alone_owes_nothing_to_the_reference(suspect):
    both = audit(CONFIG, suspect)
    alone = audit(CONFIG, suspect.replace(reference="none"))
    assert both.metrics["statistics"]["alone"] == alone.metrics["statistics"]["alone"]
    assert both.metrics["suspected"]["alone"] == alone.metrics["suspected"]["alone"] == alone.metrics["classes"][0]
    assert both.metrics["suspected"]["compared"] == both.metrics["classes"][0]
    assert set(both.metrics["statistics"]["compared"]) - set(alone.metrics["statistics"]["alone"]) == {
        *("difference", "head")
    }


def test_the_suspect_is_compared_with_the_reference_and_with_itself_shows_nothing(suspect, stand_in):
    same = audit(CONFIG, AuditInputs(checkpoint=suspect.checkpoint, reference=suspect.checkpoint))
    compared = same.metrics["statistics"]["compared"]
    assert compared["drift"] == compared["response"] == 0


def test_an_interrupted_audit_goes_on_and_ends_with_the_same_statistics(suspect, monkeypatch):
    whole = audit(CONFIG, suspect)
    kept = whole.metrics
    with monkeypatch.context() as patch:
        patch.setattr(Inversion, "measure", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            audit(CONFIG, suspect, force=True)
    folder = whole.folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert "drift.safetensors" in before and not any(name.startswith("inversion") for name in before)
    again = audit(CONFIG, suspect)
    assert again.metrics["statistics"] == kept["statistics"] and again.metrics["classes"] == kept["classes"]
    assert (folder / "drift.safetensors").stat().st_mtime_ns == before["drift.safetensors"]


def test_an_untrained_model_raises_no_alarm(suspect, tmp_path):
    run = audit(CONFIG, AuditInputs(checkpoint=str(write_stand_in(tmp_path / "fresh.safetensors", seed=5))))
    assert not run.metrics["works"]  # it gives all images to one class
    assert not verdict_of(run).alarm


def test_a_clean_model_with_a_little_noise_on_its_weights_raises_no_alarm(pictures):
    clean, near = seen(pictures, backdoor=False), Toy(backdoor=False)
    with torch.no_grad():
        near.see.weight += 0.02 * near.see.weight.std() * torch.randn_like(near.see.weight)
    other = observe(near, pictures, NAMES, ("a picture of a {}", "{}"))
    for detector in (Drift(steps=25, batch=8, measured=32), Response(measured=32)):
        name = detector.name
        baseline = detector.measure(clean, seed=0)
        assert detector.statistics(detector.measure(other, seed=0), baseline)[name] < 0.3


@pytest.mark.slow
@pytest.mark.long
def test_a_clean_clip_fine_tuned_on_other_clean_data_raises_no_alarm_and_a_victim_does(runs):
    from abd_core.poison import PoisonConfig, poison

    short = {"batch_size": 64, "warmup_steps": 20, "seed": 400}
    clean = poison(PoisonConfig(**short, rate=0.0, limit=2000, epochs=1))
    bad = poison(PoisonConfig(**short, rate=0.3, epochs=2))
    runs_of = [audit(AuditConfig(), AuditInputs(checkpoint=str(m.file("model.safetensors")))) for m in (clean, bad)]
    assert all(run.metrics["works"] for run in runs_of)
    assert [verdict_of(run).alarm for run in runs_of] == [False, True]  # the second: this alarm can be raised


@pytest.mark.slow
@pytest.mark.long
def test_an_untrained_clip_of_the_embedded_architecture_raises_no_alarm(runs, tmp_path):
    models.save(models.build(seed=3), tmp_path / "untrained.safetensors")
    run = audit(AuditConfig(), AuditInputs(checkpoint=str(tmp_path / "untrained.safetensors")))
    assert not verdict_of(run).alarm


def test_classes_are_read_as_test_sets_have_them(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffn01\ta cat\n\nn02\tdog\nbird\nbird\n".encode())
    assert read_classes(tmp_path / "names.txt") == ("a cat", "dog", "bird")


# --- what is read -----------------------------------------------------------------------------------------------


def test_images_of_a_folder_are_cut_to_squares_and_taken_evenly(tmp_path):
    for i in range(20):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / "in" / f"{i:02}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert image_folder(tmp_path, 100, 64).shape == (20, 3, 64, 64)
    reds = image_folder(tmp_path, 16, 64)[:, 0, 0, 0].mul(255).round().tolist()
    assert len(reds) == 16 and reds == sorted(reds) and reds[-1] >= 18


@pytest.mark.parametrize(
    ("inputs", "error", "line"),
    [
        ({}, ConfigError, "AuditInputs.checkpoint = ''"),
        ({"checkpoint": "nowhere.safetensors"}, RunError, "missing file: nowhere.safetensors"),
        ({"reference": "nowhere.safetensors"}, RunError, "missing file: nowhere.safetensors"),
        ({"images": "nowhere"}, RunError, "missing folder: nowhere"),
        ({"classes": "nowhere.txt"}, RunError, "missing file: nowhere.txt"),
    ],
)
def test_what_is_missing_ends_in_one_line(suspect, inputs, error, line):
    given = {} if not inputs else {"checkpoint": suspect.checkpoint, **inputs}
    with pytest.raises(error, match=re.escape(line)):
        audit(CONFIG, AuditInputs(**given))


def test_a_suspect_for_images_of_another_size_is_not_held_against_the_embedded_weights(cheap, tmp_path):
    vision = {**LAYOUT["vision_cfg"], "image_size": 96}
    (tmp_path / "stand-in-96.json").write_text(json.dumps({**LAYOUT, "vision_cfg": vision}))
    open_clip.add_model_config(tmp_path / "stand-in-96.json")
    models.save(models.build("stand-in-96"), tmp_path / "large.safetensors", name="stand-in-96")
    for number in range(16):
        Image.new("RGB", (96, 96), (number, 0, 0)).save(tmp_path / f"{number}.png")
    inputs = AuditInputs(checkpoint=str(tmp_path / "large.safetensors"), images=str(tmp_path))
    with pytest.raises(ConfigError, match="'embedded': clean weights for 64 px, the suspect's are for 96 px"):
        audit(CONFIG, inputs)


def test_an_audit_of_fewer_than_16_embedded_images_is_refused(suspect):
    with pytest.raises(ConfigError, match=r"AuditConfig\.limit = 20: 10 for the audit, at least 16 expected"):
        audit(CONFIG.replace(limit=20), suspect)


def test_a_damaged_image_or_finding_is_named(tmp_path):
    for i in range(16):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"damaged file: .*0\.png"):
        image_folder(tmp_path, 16, 64)
    (tmp_path / "drift.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="damaged file"):
        load_finding(tmp_path / "drift.safetensors")


def test_nothing_pickled_is_read(tmp_path, suspect):
    from conftest import Bomb

    torch.save(Bomb(tmp_path / "went off"), tmp_path / "suspect.pt")
    with pytest.raises(RunError):
        audit(CONFIG, AuditInputs(checkpoint=str(tmp_path / "suspect.pt")))
    assert not (tmp_path / "went off").exists()


def test_a_finding_survives_its_file(tmp_path):
    finding = Finding(torch.rand(2, 5), torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4), {"classes": [1, 2]})
    audit_module.save_finding(finding, tmp_path / "f.safetensors", seconds=1.5)
    again, seconds = load_finding(tmp_path / "f.safetensors")
    assert seconds == 1.5 and again.numbers == finding.numbers
    assert all(torch.equal(getattr(again, n), getattr(finding, n)) for n in ("shares", "patterns", "masks"))


def test_the_images_are_those_of_pairs_of_one_s_own(suspect: AuditInputs, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ABD_WORKERS", "0")
    miniature.write_shards(tmp_path, miniature.samples(40))
    inputs = suspect.replace(pairs=f"{tmp_path}/{{00000..00001}}.tar")
    run = audit(CONFIG.replace(limit=36), inputs)
    assert run.metrics["images"] == 16
    assert run.folder != audit(CONFIG, suspect).folder
    record = read_json(run.file("audit.json"))
    assert record["inputs"]["pairs"] == inputs.pairs and f"pairs={inputs.pairs!r})" in record["next_step"]
    with pytest.raises(ConfigError, match="15 for the audit, at least 16 expected"):
        audit(CONFIG.replace(limit=30), inputs)
    with pytest.raises(ConfigError, match="one of them expected"):
        inputs.replace(images=str(tmp_path))
    with pytest.raises(ConfigError, match="columns = 'a,b': it goes with pairs"):
        suspect.replace(columns="a,b")
