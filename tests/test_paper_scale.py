"""The paper's scale in small: its profile, the grid on data of one's own, and RN50 at 224 px through all stages."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import miniature
import open_clip
import papermill
import pytest
import torch
from conftest import ROOT

from abd_core import grid, inputs, models
from abd_core.adversary import adversary
from abd_core.config import ConfigError
from abd_core.defend import defend
from abd_core.evaluate import EvaluateConfig, measure
from abd_core.grid import NOTEBOOKS, STAGES
from abd_core.notebook import given_parameters, stage_configs
from abd_core.paths import RunError, read_json
from abd_core.poison import poison
from abd_core.pretrain import PretrainConfig

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
    names = (*miniature.THINGS, "goat", "hat", "ink", "jar")
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


# --- RN50 at 224 px ---------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cleanclip", "webdataset"])
def test_rn50_at_224_px_goes_through_all_stages(kind: str, runs: Path, tmp_path: Path):
    """Random weights, as CleanCLIP stores them; 64 JPEGs of 400 x 300; six test classes; the paper's 16 px patch."""
    pairs = miniature.samples(64, size=(400, 300))
    address = (
        miniature.write_shards(tmp_path, pairs)
        if kind == "webdataset"
        else miniature.write_table(tmp_path, kind, pairs)
    )
    miniature.write_folders(tmp_path / "test", each=2)
    (tmp_path / "names.txt").write_text("\n".join(miniature.THINGS))
    model = models.build("RN50-quickgelu", seed=0)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "epoch_1.pt")
    data = {
        "model": "RN50-quickgelu",
        "pretrained": tmp_path / "epoch_1.pt",
        "pairs": address,
        "test_images": tmp_path / "test",
        "test_classes": tmp_path / "names.txt",
        "dev_share": 0,
    }
    shared = {name: value if isinstance(value, int) else str(value) for name, value in data.items()}
    given = {**shared, **SMALL, "limit": 32, "poison_rate": 0.25, "poison_batch_size": 8}
    attacker, searcher, defender = stage_configs(given, **STAGES)
    victim = poison(attacker)
    weights = victim.file("model.safetensors")
    found = adversary(searcher, weights)
    defended = defend(defender, weights, perturbation=found.file("perturbation.safetensors"))
    config = EvaluateConfig(**inputs.test_inputs(defender))
    measured = measure(defended.file("model.safetensors"), trigger=victim.file("trigger.safetensors"), config=config)
    assert victim.metrics["poisoned"] == 8 and measured.metrics["ca_top1"]["n"] == 12
    stored = models.load(defended.file("model.safetensors"))
    assert (stored.architecture, models.resolution(stored)) == ("RN50-quickgelu", 224)
    changed = [n for n, t in stored.state_dict().items() if not torch.equal(t.cpu(), model.state_dict()[n].cpu())]
    assert len(changed) > 100
