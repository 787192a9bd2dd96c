"""The paper's scale in small: its profile, the grid on data of one's own, and RN50 at 224 px through all stages."""

from __future__ import annotations

import argparse
import csv
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import miniature
import open_clip
import papermill
import pytest
import test_checkpoints
import test_labelled
import test_notebooks
import torch
from conftest import ROOT

from abd_core import grid, inputs, labelled, models
from abd_core.adversary import adversary
from abd_core.config import ConfigError
from abd_core.defend import defend
from abd_core.evaluate import EvaluateConfig, measure
from abd_core.export import export
from abd_core.grid import NOTEBOOKS, STAGES
from abd_core.inputs import SuspectInputs
from abd_core.notebook import given_parameters, stage_configs
from abd_core.paths import RunError, read_json
from abd_core.poison import poison
from abd_core.pretrain import PretrainConfig
from abd_core.text import tokenize

PROFILE = ROOT / "profiles" / "paper"


def profile(name: str) -> dict:
    return given_parameters([PROFILE / f"{name}.yaml"], [])


# --- the profile ------------------------------------------------------------------------------------------------------


def test_the_profile_is_the_paper_s_section():
    attacker, searcher, defender = stage_configs(profile("03_defend"), **STAGES)
    for config in (attacker, searcher, defender):
        assert (config.model, config.pretrained, config.dev_share) == ("RN50-quickgelu", "openai", 0)
        assert config.limit == 500_000
    assert (attacker.rate, attacker.batch_size, attacker.epochs, attacker.lr) == (0.003, 128, 10, 1e-6)
    assert attacker.trigger_size * 224 == pytest.approx(16)
    assert round(attacker.rate * attacker.limit) == 1500
    pairs = round(searcher.share * searcher.limit)
    assert pairs == round(defender.share * defender.limit) == 250_000
    assert (searcher.magnitude, searcher.batch_size) == (0.03, 16)
    assert searcher.steps * searcher.batch_size == 20 * pairs
    assert (defender.defence, defender.batch_size, defender.epochs, defender.lr) == ("abd", 64, 10, 3e-6)


def test_the_notebooks_share_one_profile():
    """The victim and the perturbation of an earlier notebook are those that the later one loads."""
    whole = dict(zip(STAGES, stage_configs(profile("03_defend"), **STAGES), strict=True))
    (attacker,) = stage_configs(profile("01_poison"), poison=STAGES["poison"])
    upstream = {name: STAGES[name] for name in ("poison", "adversary")}
    assert attacker == whole["poison"]
    assert list(stage_configs(profile("02_adversary"), **upstream)) == [whole["poison"], whole["adversary"]]


def test_each_setting_of_the_profile_can_be_overridden():
    changed = {**profile("03_defend"), "poison_lr": 1e-5, "limit": 1000, "pretrained": "mine.pt"}
    attacker, _, defender = stage_configs(changed, **STAGES)
    assert (attacker.lr, attacker.limit, defender.limit, defender.pretrained) == (1e-5, 1000, 1000, "mine.pt")


def commands() -> list[tuple[str, str]]:
    """Where the book and the README call a notebook, the preflight or the grid, and the command line."""
    called = re.compile(r"(?:papermill (?=\S*book/)|python -m abd_core\.(?:preflight|grid) )[^`\n]*-[fp] [^`\n]*")
    found = []
    for path in [ROOT / "README.md", ROOT / "book" / "intro.md", *sorted((ROOT / "book").glob("*.py"))]:
        text = re.sub(r"(?m)^# ?", "", path.read_text(encoding="utf-8")) if path.suffix == ".py" else path.read_text()
        found += [(path.name, line) for line in called.findall(re.sub(r"\\\n\s*", "", text))]
    return found


def test_the_commands_of_the_book_are_found():
    own = [line for name, line in commands() if name == "09_paper_scale.py"]
    assert sum("profiles/paper/" in line for line in own) == 4
    assert any("-p num_processes 8" in line for line in own)
    assert {"README.md", "intro.md", "01_poison.py"} <= {name for name, _ in commands()}


@pytest.mark.parametrize(("where", "line"), commands())
def test_the_parameters_of_every_command_in_the_book_are_those_of_its_stages(where: str, line: str, tmp_path: Path):
    (places,) = re.findall(r"# ```yaml\n(.*?)# ```", (ROOT / "book" / "09_paper_scale.py").read_text(), re.S)
    (tmp_path / "mine.yaml").write_text(re.sub(r"(?m)^# ", "", places))
    parser = argparse.ArgumentParser()
    parser.add_argument("-f", action="append", default=[])
    parser.add_argument("-p", action="append", default=[], nargs=2)
    given, rest = parser.parse_known_args(shlex.split(line, comments=True))
    files = [tmp_path / name if name == "mine.yaml" else ROOT / name for name in given.f]
    notebook = next((Path(word).stem for word in rest if word.endswith(".ipynb")), None)
    stages = test_notebooks.STAGES[notebook] if notebook else STAGES
    configs = [c for c in stage_configs(given_parameters(files, given.p), **stages) if not isinstance(c, SuspectInputs)]
    if "mine.yaml" in given.f and "results" not in stages:
        assert {config.pairs for config in configs} == {"/data/cc3m/{00000..00331}.tar"}
    if ["num_processes", "8"] in given.p:
        assert [getattr(config, "num_processes", 1) for config in configs] == [8, 1, 8]


def test_the_second_setting_is_rn50_at_the_embedded_benchmark_s_size():
    ours, large = (open_clip.get_model_config(name) for name in ("emoji-rn50", "RN50-quickgelu"))
    assert (ours["vision_cfg"].pop("image_size"), ours["text_cfg"].pop("context_length")) == (64, 20)
    assert (large["vision_cfg"].pop("image_size"), large["text_cfg"].pop("context_length")) == (224, 77)
    assert ours == large
    folder = ROOT / "profiles" / "rn50"
    job = read_json(folder / "pretrain.json")
    base = PretrainConfig.from_parameters(job["config"])
    attacker, *_ = stage_configs(given_parameters([folder / "03_defend.yaml"], []), **STAGES)
    assert (job["stage"], base.model, base.lr) == ("pretrain", "emoji-rn50", attacker.lr)


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_every_notebook_lists_where_data_and_weights_are(stage: str):
    listed = papermill.inspect_notebook(ROOT / "book" / f"{NOTEBOOKS[stage]}.ipynb")
    assert {"model", "pretrained", "pairs", "test_images", "limit"} <= set(listed)


# --- the grid ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """Parameters that name a miniature in tars and folders."""
    names = ("apple", "banana", "crab", "drum", "egg", "fox", "goat", "hat", "ink", "jar")  # no cat, as in ImageNet
    miniature.write_folders(tmp_path / "test", each=10, names=names)
    (tmp_path / "names.txt").write_text("\n".join(names))
    return {
        "pairs": miniature.write_shards(tmp_path / "pairs", miniature.samples(60)),
        "test_images": str(tmp_path / "test"),
        "test_classes": str(tmp_path / "names.txt"),
    }


def test_parameters_for_every_cell_come_from_files_and_the_command_line(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("poison_lr: 1.0e-5\nlimit: 100\n")
    (tmp_path / "b.yaml").write_text("limit: 200\n")
    given = given_parameters([tmp_path / "a.yaml", tmp_path / "b.yaml"], [("epochs", "2"), ("share", "0.25")])
    assert given == {"poison_lr": 1e-5, "limit": 200, "epochs": "2", "share": "0.25"}
    job = grid.Cell("BadNet", "FT", 0, "eval").job(given)
    victim = job.chain()[0].config
    assert (job.config.epochs, job.config.limit, victim.lr, victim.limit) == (2, 200, 1e-5, 200)
    label = grid.Cell("BadNet", "ABD, 6 epochs", 0, "eval").job(given)
    assert label.config.epochs == 6  # what makes a label goes first


@pytest.mark.parametrize(("text", "line"), [("[1, 2]", "names with a value"), ("a: [", "not YAML"), (None, "missing")])
def test_a_file_of_parameters_that_is_none_is_refused(text: str | None, line: str, tmp_path: Path):
    if text is not None:
        (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(RunError, match=line):
        given_parameters([tmp_path / "p.yaml"], [])


def test_the_committed_table_takes_no_rows_of_other_parameters(runs: Path):
    with pytest.raises(ConfigError, match="--output expected"):
        grid.main(["small", "-p", "epochs", "2"])
    with pytest.raises(ConfigError, match="unknown parameter 'epoch'"):
        grid.main(["small", "-p", "epoch", "2", "--output", "x.csv"])


def snakemake(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ABD_WORKERS": "0"}
    made = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout + made.stderr


def write_parameters(folder: Path, parameters: dict) -> Path:
    path = folder / "parameters.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in parameters.items()))
    return path


SMALL = {
    "limit": 48,
    "poison_epochs": 1,
    "poison_batch_size": 16,
    "epochs": 1,
    "batch_size": 8,
    "steps": 2,
    "width": 16,
}


@pytest.mark.slow
def test_the_whole_graph_runs_on_data_of_one_s_own(outside: dict[str, str], runs: Path, tmp_path: Path):
    """Poison, adversary, defend, evaluate, table: every notebook, under snakemake, from tars and folders."""
    path, table = write_parameters(tmp_path, {**outside, **SMALL}), tmp_path / "mine.csv"
    snakemake(tmp_path, "-c1", "--quiet", "all", "--config", "grids=small", f"table={table}", f"parameters={path}")
    with table.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert {(row["attack"], row["defence"]) for row in rows} == {("BadNet", name) for name in ("none", "FT", "ABD")}
    counts = {row["metric"]: int(row["n"]) for row in rows}
    assert counts == {"ca_top1": 90, "ca_top5": 90, "asr": 81, "asr_all": 90, "ra": 90}
    expected = grid.Cell("BadNet", "ABD", 0, "eval").job({**outside, **SMALL}).key
    assert expected in {row["run_id"] for row in rows}
    assert "Preflight:" in next((runs / "grid").glob("03_defend-badnet-abd-*.ipynb")).read_text()


@pytest.mark.slow
def test_the_slurm_profile_of_the_paper_s_scale_asks_for_a_gpu_a_job(outside: dict, runs: Path, tmp_path: Path):
    path = write_parameters(tmp_path, {**outside, **SMALL})
    settings = ["--config", "grids=small", f"table={tmp_path / 'mine.csv'}", f"parameters={path}"]
    planned = snakemake(tmp_path, "--dry-run", "--profile", str(PROFILE / "slurm"), *settings)
    assert planned.count("gres=gpu:1") >= 3 and "runtime=2880" in planned and "mem_mb=64000" in planned


# --- 224 px -----------------------------------------------------------------------------------------------------------

JPEGS = miniature.samples(240, size=(400, 300))
CHAINS = [  # every format of pairs, every foreign format of weights
    ("cleanclip", "CleanCLIP"),
    ("open_clip", "open_clip training"),
    ("parquet", "state dict"),
    ("huggingface", "open_clip safetensors"),
    ("txt", "TorchScript"),
    ("json", "state dict, old format"),
    ("both", "compiled"),
    ("both", "scale of one element"),
    ("both", "CLIPModel"),
    ("both", "OpenAI state dict"),
]


def exported_is(model: open_clip.CLIP, out: Path) -> None:
    """What open_clip loads from an exported folder, and transformers where it can, gives the features of `model`."""
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(["a picture of a banana.", "dog"], context_length=77)
    theirs = open_clip.create_model(model.architecture, pretrained=str(out / "open_clip_model.safetensors")).eval()
    with torch.no_grad():
        image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(theirs.encode_image(images, normalize=True), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.encode_text(tokens, normalize=True), text, rtol=1e-4, atol=1e-5)
        assert (out / "config.json").exists() == model.architecture.startswith("ViT")
        if (out / "config.json").exists():
            from transformers import CLIPModel

            output = CLIPModel.from_pretrained(out)(input_ids=tokens, pixel_values=images)
            torch.testing.assert_close(output.image_embeds, image, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(output.text_embeds, text, rtol=1e-4, atol=1e-5)


def through_all_stages(folder: Path, pairs: str, weights: str, *, names: Sequence[str], **test: Any) -> dict[str, Any]:
    """Random weights, 240 JPEGs of 400 x 300 and the paper's 16 px patch, poison to evaluate; returns the metrics.

    Args:
        pairs: a table of `miniature.write_table`, or which captions tars have.
        weights: a format that `test_checkpoints.write` knows.
        names: folders of the test images.
        test: further settings of the test set.
    """
    in_tars = pairs in ("txt", "json", "both")
    write = functools.partial(miniature.write_shards, text=pairs) if in_tars else miniature.write_table
    address = write(folder / "pairs", JPEGS, shards=3) if in_tars else write(folder / "pairs", pairs, JPEGS)
    miniature.write_folders(folder / "test", each=1, names=names)
    model = "ViT-B-32-quickgelu" if weights == "CLIPModel" else "RN50-quickgelu"
    data = {
        "model": model,
        "pretrained": str(test_checkpoints.write(weights, folder)),
        "pairs": str(address),
        "test_images": str(folder / "test"),
        "dev_share": 0,
        **test,
    }
    given = {**data, **SMALL, "limit": 32, "poison_rate": 0.25, "poison_batch_size": 8}
    attacker, searcher, defender = stage_configs(given, **STAGES)
    victim = poison(attacker)
    suspect = victim.file("model.safetensors")
    perturbation = adversary(searcher, suspect).file("perturbation.safetensors")
    run = defend(defender, suspect, perturbation=perturbation)
    defended = run.file("model.safetensors")
    on_eval = EvaluateConfig(**inputs.test_inputs(defender))
    measured = measure(defended, trigger=victim.file("trigger.safetensors"), config=on_eval)
    assert (len(inputs.training_pairs(attacker.replace(limit=0), suspect)), victim.metrics["poisoned"]) == (240, 8)
    before, after = models.load(suspect), models.load(defended)
    assert (after.architecture, models.resolution(after)) == (model, 224)
    changed = [n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])]
    assert len(changed) > 100
    exported_is(after, export(run, folder / "exported"))
    print(f"{pairs}, {weights}: {measured.metrics}")
    return measured.metrics


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "weights"), CHAINS)
def test_every_format_goes_through_all_stages_at_224_px(
    pairs: str, weights: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(labelled, "TEMPLATES", labelled.TEMPLATES[:2])  # encoding 80 takes most of the time
    (tmp_path / "names.txt").write_text("\n".join(miniature.THINGS))
    metrics = through_all_stages(
        tmp_path, pairs, weights, names=miniature.THINGS, test_classes=str(tmp_path / "names.txt")
    )
    assert (metrics["ca_top1"]["n"], metrics["asr"]["n"]) == (6, 5)


@pytest.mark.long
@pytest.mark.slow
def test_rn50_at_224_px_goes_through_all_stages_on_a_thousand_folders(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of one image and one prompt a class: 80 prompts would be 80,000."""
    monkeypatch.setattr(labelled, "TEMPLATES", labelled.TEMPLATES[:1])
    metrics = through_all_stages(tmp_path, "both", "CleanCLIP", names=test_labelled.SYNSETS)
    assert (metrics["ca_top1"]["n"], metrics["asr"]["n"]) == (1000, 999)


@pytest.mark.long
@pytest.mark.slow
def test_the_notebooks_run_on_rn50_at_224_px(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Preflight first, pictures last; no class is called as the ones that are shown of the embedded benchmark."""
    names = ("banana", "egg", "fox")
    miniature.write_folders(tmp_path / "test", each=3, names=names)
    (tmp_path / "names.txt").write_text("\n".join(names))
    data = {
        "model": "RN50-quickgelu",
        "pretrained": str(test_checkpoints.write("CleanCLIP", tmp_path)),
        "pairs": miniature.write_shards(tmp_path / "pairs", JPEGS),
        "test_images": str(tmp_path / "test"),
        "test_classes": str(tmp_path / "names.txt"),
        "dev_share": 0.0,
    }
    monkeypatch.setenv("ABD_STATIC", "1")
    attack, search = {"poison_batch_size": 8, "poison_epochs": 1}, {"steps": 2, "width": 16, "share": 1.0}
    settings = {
        "poison": {"batch_size": 8, "epochs": 1},
        "adversary": {**attack, **search, "batch_size": 8},
        "defend": {**attack, **search, "adversary_batch_size": 8, "batch_size": 8, "epochs": 1},
    }
    for stage, name in NOTEBOOKS.items():
        given = {**data, **settings[stage], "limit": 16}
        made = tmp_path / f"{name}.ipynb"
        papermill.execute_notebook(ROOT / "book" / f"{name}.ipynb", made, given, progress_bar=False)
        assert "Preflight:" in made.read_text() and "0 damaged ones left out" in made.read_text()
    assert [len(list((runs / stage).iterdir())) for stage in STAGES] == [1, 1, 1]
