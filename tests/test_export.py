"""What is exported gives the same features through open_clip and transformers, and its card can be trusted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import ARCHITECTURE, ROOT

from abd_core import export as exporting
from abd_core import models
from abd_core.adversary import AdversaryConfig
from abd_core.config import Config
from abd_core.data import load_test_set
from abd_core.defend import DefendConfig, defend
from abd_core.evaluate import evaluate, measure
from abd_core.export import export
from abd_core.paths import Run, RunError, load_or_make, sha256
from abd_core.text import tokenize
from abd_core.triggers import TRIGGERS

VIT = {
    "embed_dim": 20,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = ["a picture of a banana.", "dog", "", "Tom & Jerry: 2 naïve cats"]


def made(model: open_clip.CLIP, *, config: Mapping | None = None) -> Run:
    """A finished run of a defence that left the model alone."""
    settings = DefendConfig(defence="ft")

    def make(folder: Path) -> dict:
        models.save(model, folder / "model.safetensors")
        rate = {"value": 0.5, "n": 10, "ci_low": 0.25, "ci_high": 0.75}
        return {"before": {"split": "dev", "ca_top1": rate}, "after": {"split": "dev", "ca_top1": rate}}

    run = load_or_make("defend", settings, {"victim": "ab" * 32}, make)
    if config:
        record = json.loads(run.file("config.json").read_text())
        record["config"] = {**record["config"], **config}
        run.file("config.json").write_text(json.dumps(record))
    return run


@pytest.fixture
def vit(stand_in: Path, tmp_path: Path) -> open_clip.CLIP:
    (tmp_path / "export-vit.json").write_text(json.dumps(VIT))
    open_clip.add_model_config(tmp_path / "export-vit.json")
    model = models.build("export-vit")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def resnet(stand_in: Path) -> open_clip.CLIP:
    model = models.build(ARCHITECTURE, seed=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.visual.bn1.running_mean.uniform_(-0.1, 0.1)
    return model


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_open_clip_loads_the_export_by_name_and_by_folder_and_gives_the_same_features(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
):
    model = request.getfixturevalue(kind)
    out = export(made(model), tmp_path / "out")
    images = torch.rand(3, 3, *[models.resolution(model)] * 2)
    tokens = tokenize(CAPTIONS, context_length=20)
    by_name = open_clip.create_model_and_transforms(
        model.architecture, pretrained=str(out / "open_clip_model.safetensors")
    )
    by_folder = open_clip.create_model_and_transforms(f"local-dir:{out}")
    for theirs, _, transform in (by_name, by_folder):
        theirs.eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode_image(images), model.encode_image(images), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(theirs.encode_text(tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-6)
        normalise = transform.transforms[-1]
        assert (tuple(normalise.mean), tuple(normalise.std)) == models.NORMALISATION


def test_transformers_loads_the_export_of_a_vision_transformer_and_gives_the_same_features(
    vit: open_clip.CLIP, tmp_path: Path
):
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    out = export(made(vit), tmp_path / "out")
    theirs, report = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = CLIPProcessor.from_pretrained(out)
    picture = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 9).convert("RGB")
    inputs = processor(text=CAPTIONS, images=[picture], return_tensors="pt", padding="max_length", truncation=True)
    ours = tokenize(CAPTIONS, context_length=20)
    assert torch.equal(inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0), ours)
    pixels = torch.tensor(list(picture.tobytes())).view(1, 32, 32, 3).permute(0, 3, 1, 2).to(torch.uint8)
    with torch.no_grad():
        output = theirs(**inputs)
        image, text = vit.encode_image(inputs["pixel_values"], normalize=True), vit.encode_text(ours, normalize=True)
    torch.testing.assert_close(output.image_embeds, image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.text_embeds, text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits_per_image, vit.logit_scale.exp() * image @ text.T, rtol=1e-4, atol=1e-4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in models.NORMALISATION)
    torch.testing.assert_close(inputs["pixel_values"], (pixels / 255 - mean) / std, rtol=1e-4, atol=1e-4)


def test_the_export_can_be_read_back_from_either_file(vit: open_clip.CLIP, tmp_path: Path):
    out = export(made(vit), tmp_path / "out")
    for path in (out, out / "open_clip_model.safetensors"):
        again = models.load(path)
        assert again.architecture == "export-vit"
        assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in vit.state_dict().items())


def test_of_a_resnet_no_file_claims_to_be_a_clip_model_and_the_card_says_why(resnet: open_clip.CLIP, tmp_path: Path):
    out = export(made(resnet), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }
    assert "cannot represent stand\\-in" in (out / "README.md").read_text()


@pytest.mark.slow
def test_the_card_has_data_settings_and_metrics_before_and_after(stand_in: Path, tmp_path: Path):
    """Of a defence that ran, with its victim and itself measured against an attack afterwards."""
    victim = stand_in / "victim.safetensors"
    run = defend(DefendConfig(defence="ft", limit=32, epochs=1, batch_size=16, seed=5), victim)
    trigger = TRIGGERS["badnet"].draw(resolution=64, target="banana", seed=0, size=0.1, position="top-left", alpha=0.0)
    trigger.save(tmp_path / "trigger.safetensors")
    test = load_test_set("eval", views=1)
    measured = {
        when: measure(path, trigger=tmp_path / "trigger.safetensors").metrics
        for when, path in (("before", victim), ("after", run.file("model.safetensors")))
    }
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    for when in ("before", "after"):
        for metric in ("asr", "ra"):
            rate = measured[when][metric]
            row = rf"\| {when}, trigger \w+ \| eval \| {re.escape(exporting.METRICS[metric])} \| "
            assert re.search(rf"{row}{100 * rate['value']:.1f} \| .* \| {rate['n']} \|", text)
    own = run.metrics["after"]["ca_top1"]
    assert f"| after | dev | clean accuracy, top\\-1 | {100 * own['value']:.1f} |" in text
    assert evaluate(models.load(victim), test).ca[1].n == measured["before"]["ca_top1"]["n"]
    assert f"| victim | {sha256(victim)} |" in text and "| seed | 5 |" in text and "Trigger-blind" in text


def test_the_card_says_where_the_data_was_how_many_pairs_and_how_the_perturbation_was_searched(
    resnet: open_clip.CLIP, tmp_path: Path
):
    def search(folder: Path) -> dict:
        (folder / "perturbation.safetensors").write_bytes(b"pixels")
        return {}

    found = load_or_make("adversary", AdversaryConfig(width=16, tau=0.07), {}, search)
    digests = {"pairs": "ab" * 32, "perturbation": sha256(found.file("perturbation.safetensors"))}

    def defended(config: DefendConfig, digests: Mapping[str, str]) -> str:
        def make(folder: Path) -> dict:
            models.save(resnet, folder / "model.safetensors")
            return {"before": {}, "after": {}, "pairs": 1234}

        out = tmp_path / str(config.seed)
        return (export(load_or_make("defend", config, digests, make), out) / "README.md").read_text()

    text = defended(DefendConfig(defence="abd", pairs="cc3m/{0..9}.tar", seed=1), digests)
    assert "| pairs | cc3m/\\{0..9\\}.tar |" in text and "| test\\_images | the embedded benchmark's |" in text
    assert "| number of pairs | 1234 |" in text
    assert "| tau | 0.07 |" in text and "| width | 16 |" in text
    other = defended(DefendConfig(defence="abd", seed=2), {**digests, "perturbation": "cd" * 32})
    assert "| pairs | the embedded benchmark's |" in other and "its run is not among" in other
    assert "| tau |" not in other
    without = defended(DefendConfig(defence="clean", seed=3), {"victim": "ab" * 32})
    assert "| pairs |" not in without and "perturbation" not in without


def test_a_measurement_of_other_weights_is_not_on_the_card(resnet: open_clip.CLIP, tmp_path: Path):
    run = made(resnet)
    load_or_make("evaluate", Config(), {"weights": "cd" * 32}, lambda folder: {"split": "eval"})
    assert "Measured afterwards" not in (export(run, tmp_path / "out") / "README.md").read_text()


def test_nothing_in_a_record_becomes_markup_on_the_card(resnet: open_clip.CLIP, tmp_path: Path):
    wild = "<script>alert(1)</script> | a `b` **c** [d](http://e)\n# f & $g$ \\"
    run = made(resnet, config={"defence": wild, "class | names": wild})
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    assert "<script" not in text and "\n# f" not in text
    row = next(line for line in text.splitlines() if line.startswith("| class"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "&lt;script&gt;" in row and r"\*\*c\*\*" in row and r"\[d\]\(http\://e\)" in row and r"\`b\`" in row


def test_the_command_exports_a_run_and_says_what_is_wrong_in_one_line(resnet: open_clip.CLIP, tmp_path: Path):
    run = made(resnet)
    run.file("model.safetensors").write_bytes(b"damaged")
    command = [sys.executable, "-m", "abd_core.export", str(run.folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and done.stderr.startswith("damaged file: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_folder(resnet: open_clip.CLIP, tmp_path: Path, capsys: pytest.CaptureFixture):
    exporting.main([str(made(resnet).folder), str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"


def test_a_folder_that_holds_something_is_left_alone(resnet: open_clip.CLIP, tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="a new or an empty folder is expected"):
        export(made(resnet), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("runs", "export-vit.json")] == ["note.txt"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file.txt/out", "file.txt/out cannot be made: Not a directory"),
        ("file.txt", "file.txt: a new or an empty folder is expected"),
        ("nowhere", "nowhere: a new or an empty folder is expected"),
        ("/proc/nope", "/proc/nope cannot be made: No such file or directory"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named_in_one_line(
    place: str, said: str, resnet: open_clip.CLIP, tmp_path: Path
):
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError) as error:
        export(made(resnet), tmp_path / place)
    assert str(error.value).endswith(said)


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(
    there: bool, vit: open_clip.CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(out: Path, **settings: object) -> None:
        raise KeyboardInterrupt

    run, out = made(vit), tmp_path / "exports" / "out"
    if there:
        out.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_tokeniser", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(run, out)
    assert [path for path in tmp_path.joinpath("exports").rglob("*") if path != out] == [] and out.exists() == there
    export(run, out)
    assert (out / "README.md").is_file() and [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_that_is_a_link_stays_one(resnet: open_clip.CLIP, tmp_path: Path):
    (tmp_path / "own").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "own")
    export(made(resnet), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "own" / "open_clip_model.safetensors").is_file()
