"""The grid: its labels and cells, its jobs through papermill, its table."""

from __future__ import annotations

import ast
import csv
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import papermill
import pytest
from conftest import ARCHITECTURE, ROOT, start_python

from abd_core import defences, grid, models, paths, triggers
from abd_core.adversary import adversary
from abd_core.config import ConfigError
from abd_core.defend import defend
from abd_core.evaluate import EvaluateConfig, measure
from abd_core.grid import ATTACKS, DEFENCES, GRIDS, NOTEBOOKS, SEEDS, STAGES, Cell, Grid, Job, JobError
from abd_core.notebook import stage_configs, stage_parameters
from abd_core.poison import ASR_AIM, CA_LOSS, poison
from abd_core.results import COLUMNS, VICTIM

SMALL = {
    "ATTACKS": {
        "BadNet": {"attack": "badnet", "limit": 256, "poison_epochs": 1},
        "no such target": {"attack": "badnet", "target": "bananna"},
    },
    "DEFENCES": {
        "FT": {"defence": "ft", "epochs": 1},
        "ABD": {"defence": "abd", "epochs": 1, "steps": 2, "width": 16},
    },
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, stand_in: Path, tmp_path: Path) -> Path:
    """Labels of the smallest size, and a folder for startup code of the kernels, which use the stand-in too."""
    for name, labels in SMALL.items():
        monkeypatch.setattr(grid, name, labels)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    saved = "models.save = functools.partial(models.save, name=conftest.ARCHITECTURE)"
    used = f"conftest.use_stand_in(pathlib.Path({str(stand_in)!r}))"
    monkeypatch.setattr(models, "save", functools.partial(models.save, name=ARCHITECTURE))
    imports = "import conftest, functools, pathlib\nfrom abd_core import models"
    return startup(tmp_path, monkeypatch, f"{imports}\n{saved}\n{used}")


def startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Path:
    """Let every kernel run `code` first; returns the folder where further files do the same."""
    folder = tmp_path / "ipython" / "profile_default" / "startup"
    folder.mkdir(parents=True)
    (folder / "1.py").write_text(code)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def fake(monkeypatch: pytest.MonkeyPatch, failing: tuple[str, ...] = ()) -> list[Job]:
    """Jobs write a made-up record instead of running a kernel; those named in `failing` fail. Returns those tried."""
    tried = []

    def execute(job: Job, title: str) -> None:
        tried.append(job)
        if title in failing:
            raise JobError("no luck")

    def collect(job: Job) -> None:
        rate = {"n": 4, "ci_low": 0.25, "ci_high": 0.75}
        on_split = {"eval": {"value": 0.5, **rate}, "dev": {"value": 0.4, **rate}}
        metrics = {split: dict.fromkeys(grid.METRICS, on_split[split]) for split in SEEDS}
        made = {"python": "3", "torch": "2", "open_clip": "3", "threads": 1, "device": "CPU", "git_sha": None}
        record = {"run": "", "seconds": None, "environment": made, "metrics": metrics}
        paths.write_json(job.record, record)

    monkeypatch.setattr(Job, "execute", execute)
    monkeypatch.setattr(Job, "collect", collect)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tried


# --- labels and cells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_of_a_grid_is_made_by_a_chain_of_jobs_of_its_own(name: str):
    jobs = {cell: cell.job() for cell in GRIDS[name].cells()}
    assert len(set(jobs.values())) == len(jobs)  # no two labels mean the same
    for cell, job in jobs.items():
        stages = [part.stage for part in job.chain()]
        assert stages in (["poison"], ["poison", "defend"], ["poison", "adversary", "defend"]), cell
        assert (stages == ["poison"]) == (cell.defence == "none")
        assert all(part.config.seed == cell.seed for part in job.chain())


def test_each_notebook_gets_parameters_that_give_the_settings_of_its_job():
    """As papermill does it: the notebook's own parameters, then the injected ones."""
    listed = {stage: papermill.inspect_notebook(ROOT / "book" / f"{name}.ipynb") for stage, name in NOTEBOOKS.items()}
    jobs = {job for table in GRIDS.values() for cell in table.cells() for job in cell.job().chain()}
    assert {job.stage for job in jobs} == set(STAGES)
    for job in jobs:
        configs = {part.stage: part.config for part in job.chain()}
        own = {name: ast.literal_eval(record["default"]) for name, record in listed[job.stage].items()}
        own.pop("checkpoint", None)  # names a suspect that the grid did not make
        known = {name: STAGES[name] for name in list(STAGES)[: list(STAGES).index(job.stage) + 1]}
        made = stage_configs({**own, **stage_parameters(own, **configs)}, **known)
        assert {name: config for name, config in zip(known, made, strict=True) if name in configs} == configs


def test_whatever_is_registered_has_a_label_and_its_parameters_choose_it():
    for name, attack in triggers.TRIGGERS.items():
        assert ATTACKS[attack.title]["attack"] == name
    for name, defence in defences.DEFENCES.items():
        assert DEFENCES[defence.title]["defence"] == name


def test_seeds_of_development_and_of_evaluation_never_meet():
    assert not set(SEEDS["dev"]) & set(SEEDS["eval"])
    with pytest.raises(ConfigError, match="seed 100 on split 'eval': 0 to 99 expected"):
        Grid(("BadNet",), ("FT",), (0, 100))
    with pytest.raises(ConfigError, match="seed 0 on split 'dev': 100 to 199 expected"):
        grid.select(["search"], seeds=[0])
    with pytest.raises(ConfigError, match="seed 0 on split 'dev': 100 to 199 expected"):
        Grid(("BadNet",), (), (0,), "dev")
    with pytest.raises(ConfigError, match="a grid that chooses nothing: 'clean weights' alone expected, not 'FT'"):
        Grid(("BadNet",), ("FT", "clean weights"), (0,), "dev", chooses=False)


def test_a_victim_of_the_evaluation_is_measured_on_both_splits_of_one_making(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tried = fake(monkeypatch)
    table = tmp_path / "victims.csv"
    (here,), (there,) = (Grid(("BadNet",), (), (0,), split, chooses=False).cells() for split in ("eval", "dev"))
    assert grid.undone({there: there.job()}, table)
    for cells in ([here], [there], [here, there]):
        grid.run(cells, output=table)
    assert len(tried) == 1
    rows = read(table)
    assert {(row["split"], row["value"], row["run_id"]) for row in rows} == {
        ("eval", "0.5", here.job().key),
        ("dev", "0.4", here.job().key),
    }
    assert len(rows) == 2 * len(grid.METRICS)
    monkeypatch.setenv("ABD_RUNS", str(tmp_path / "none yet"))
    (tmp_path / "one.csv").write_text("".join(line for line in table.open() if ",dev," not in line))
    assert list(grid.undone({here: here.job(), there: there.job()}, tmp_path / "one.csv")) == [there]


def test_cells_are_chosen_by_label_and_seed_and_victims_stay():
    cells = grid.select(["table1", "ablations"], attacks=["BadNet"], defences=["ABD", "UAP + T"], seeds=[7])
    assert {(cell.attack, cell.defence, cell.seed) for cell in cells} == {
        ("BadNet", "none", 7),
        ("BadNet", "ABD", 7),
        ("BadNet", "UAP + T", 7),
    }
    assert len(cells) == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tabel1"], "unknown grid 'tabel1'; did you mean 'table1'?"),
        (["table1", "--attacks", "Badnet"], "unknown attack in these grids 'Badnet'; did you mean 'BadNet'?"),
        (["table1", "--defences", "I_adv"], "unknown defence in these grids 'I_adv'"),
        (["--job", "0" * 16], "unknown job"),
    ],
)
def test_a_wrong_name_ends_in_one_line(arguments: list[str], line: str, runs: Path):
    with pytest.raises(ConfigError) as error:
        grid.main(arguments)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_the_list_has_every_grid_and_its_number_of_cells(capsys: pytest.CaptureFixture):
    assert grid.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, str(len(made.cells()))] for name, made in GRIDS.items()]


# --- running ----------------------------------------------------------------------------------------------------------


def test_each_job_is_run_once_and_after_what_it_stands_on(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried = fake(monkeypatch)
    cells = grid.select(["table1", "ablations", "controls"], seeds=[0, 1])
    assert grid.run(cells, processes=3, output=tmp_path / "grid.csv") == []
    assert len(tried) == len(set(tried)) and set(tried) == {part for cell in cells for part in cell.job().chain()}
    assert all(job.base is None or tried.index(job.base) < tried.index(job) for job in tried)
    assert len(read(tmp_path / "grid.csv")) == len(cells) * len(grid.METRICS)


def test_what_is_done_is_not_run_again_and_another_default_is(runs: Path, tmp_path: Path, monkeypatch):
    tried = fake(monkeypatch)
    cells = grid.select(["small"])
    grid.run(cells, output=tmp_path / "grid.csv")
    table = read(tmp_path / "grid.csv")
    tried.clear()
    grid.run(cells, output=tmp_path / "grid.csv")
    assert not tried and read(tmp_path / "grid.csv") == table
    monkeypatch.setitem(DEFENCES, "FT", {"defence": "ft", "weight_decay": 0.05})
    grid.run(cells, output=tmp_path / "grid.csv")
    assert [job.config.defence for job in tried] == ["ft"]
    assert read(tmp_path / "grid.csv") != table and len(read(tmp_path / "grid.csv")) == len(table)


def test_a_table_alone_says_what_is_done_under_whatever_label(runs: Path, tmp_path: Path, monkeypatch):
    """As in a fresh clone, which has the committed table and no records."""
    fake(monkeypatch)
    grid.run(grid.select(["small"]), output=tmp_path / "grid.csv")
    table = read(tmp_path / "grid.csv")
    monkeypatch.setenv("ABD_RUNS", str(tmp_path / "none yet"))
    tried = fake(monkeypatch)
    grid.run(grid.select(["small"]), output=tmp_path / "grid.csv")
    assert not tried and read(tmp_path / "grid.csv") == table
    monkeypatch.setitem(DEFENCES, "fine-tuning", DEFENCES["FT"])
    monkeypatch.setitem(DEFENCES, "slower", {**DEFENCES["FT"], "lr": 1e-5})
    grid.run(Grid(("BadNet",), ("fine-tuning", "slower"), (0,)).cells(), output=tmp_path / "grid.csv")
    assert [job.stage for job in tried] == ["poison", "defend"] and tried[1].config.lr == 1e-5
    copied = [{**row, "defence": "FT"} for row in read(tmp_path / "grid.csv") if row["defence"] == "fine-tuning"]
    assert copied == [{**row, "paper_value": ""} for row in table if row["defence"] == "FT"]


@pytest.mark.parametrize(
    "name",
    ["grid.csv", "victims.csv", "costs.csv", "replication.csv", "not_taken/grid.csv", "not_taken/replication.csv"],
)
def test_the_committed_tables_are_of_the_present_settings_and_data(name: str):
    rows = read(grid.default_table().parent / name)
    measured = {Cell(row["attack"], row["defence"], int(row["seed"]), row["split"]): row["run_id"] for row in rows}
    assert measured
    for cell, run_id in measured.items():
        assert cell.job().key == run_id, f"{cell}: measured with other settings or data: measure it again"


def test_the_tables_seeds_are_the_first_with_which_an_attack_takes_however_often_it_was_made():
    folder = grid.default_table().parent
    kept, left_out, *again = (
        [row for row in read(folder / name) if row["split"] == "eval"]
        for name in ("grid.csv", "not_taken/grid.csv", "victims.csv", "replication.csv")
    )
    rows = [*kept, *left_out, *itertools.chain(*again)]
    base = max(float(row["value"]) for row in rows if (row["defence"], row["metric"]) == (grid.CLEAN, "ca_top1"))
    made = defaultdict[tuple[str, int, str], list[float]](list)
    for row in rows:
        if row["defence"] == VICTIM:
            made[row["attack"], int(row["seed"]), row["metric"]].append(float(row["value"]))
    # Of these the ASR depends on the dose, see the curve in chapter 4; this much it is at least.
    aims = dict.fromkeys(("Blended-Stripes", "Blended-Triangles", "Blended-Text", "label-consistent"), 0.6)

    def taken(*attacks: str, seeds: Sequence[int]) -> list[int]:
        """Those of the draws up to the last of `seeds` with which each of `attacks` takes in all of its makings."""
        return [
            seed
            for seed in range(max(seeds) + 1)
            if all(min(made[attack, seed, "asr"]) >= aims.get(attack, ASR_AIM) for attack in attacks)
            and all(min(made[attack, seed, "ca_top1"]) >= base - CA_LOSS for attack in attacks)
        ]

    assert taken(*grid.PAPER, seeds=grid.TAKEN) == [*grid.TAKEN] and len(grid.TAKEN) >= 5
    zoo = GRIDS["zoo"]
    for attack in (*zoo.attacks, *grid.MOVED):
        seeds = zoo.draws.get(attack, zoo.seeds)
        assert taken(attack, seeds=seeds) == [*seeds] and len(seeds) >= 3, attack
    drawn = {(cell.attack, cell.seed) for table in GRIDS.values() if table.chooses for cell in table.cells()}
    shown, hidden = ({(row["attack"], int(row["seed"])) for row in table} for table in (kept, left_out))
    assert shown <= drawn and not hidden & drawn


def test_a_failed_job_is_one_line_and_only_what_stands_on_it_is_left_out(runs: Path, tmp_path: Path, monkeypatch):
    tried = fake(monkeypatch, failing=("BadNet, ABD, seed 0", "Blended, seed 1"))
    cells = grid.select(["table1"], attacks=["BadNet", "Blended"], defences=["FT", "ABD"], seeds=[0, 1])
    lines = grid.run(cells, output=tmp_path / "grid.csv")
    assert sorted(lines) == [
        "01_poison of Blended, seed 1: no luck",
        "02_adversary of BadNet, ABD, seed 0: no luck",
    ]
    done = {(row["attack"], row["defence"], row["seed"]) for row in read(tmp_path / "grid.csv")}
    missing = {(cell.attack, cell.defence, str(cell.seed)) for cell in cells} - done
    assert missing == {("BadNet", "ABD", "0"), *(("Blended", defence, "1") for defence in ("none", "FT", "ABD"))}
    tried.clear()
    monkeypatch.undo()
    monkeypatch.setenv("ABD_RUNS", str(runs))
    tried = fake(monkeypatch)
    assert grid.run(cells, output=tmp_path / "grid.csv") == []
    assert len(tried) == 6  # BadNet's perturbation and defence, and all of Blended's but for the seed that was well
    assert len(read(tmp_path / "grid.csv")) == len(cells) * len(grid.METRICS)


def test_one_job_alone_leaves_its_record_and_is_not_run_twice(runs: Path, monkeypatch: pytest.MonkeyPatch):
    tried = fake(monkeypatch)
    victim, job = GRIDS["search"].cells()[-1].job().chain()[0], GRIDS["search"].cells()[-1].job()
    for _ in range(2):
        assert grid.main(["--job", victim.key]) == 0
        assert grid.main(["--job", job.key]) == 0
    assert tried == [victim, job] and victim.record.exists() and job.record.exists()


def test_kernels_share_the_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    grid.use_cores(3)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.delenv("OMP_NUM_THREADS")
    grid.use_cores(3)
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.slow
def test_without_notebooks_processes_give_the_numbers_that_this_one_gives(
    small: Path, stand_in: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cells = Grid(("BadNet", "no such target"), ("FT",), (3,)).cells()
    (tmp_path / "sitecustomize.py").write_text((small / "1.py").read_text())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    (line,) = grid.run(cells, processes=2, notebooks=False, output=tmp_path / "grid.csv")
    assert line == "01_poison of no such target, seed 3: ConfigError: unknown class 'bananna'; did you mean 'banana'?"
    assert not list((runs / "grid").glob("*.ipynb"))

    table = read(tmp_path / "grid.csv")
    monkeypatch.setenv("ABD_RUNS", str(tmp_path / "others"))
    for cell in cells[:2]:
        for job in cell.job().chain():
            job.collect()
        for row in grid.rows(cell, cell.job(), grid.paper_values()):
            (found,) = [r for r in table if r["defence"] == cell.defence and r["metric"] == row["metric"]]
            assert float(found["value"]) == row["value"] and found["run_id"] == row["run_id"]


@pytest.mark.slow
def test_a_small_grid_through_papermill_survives_a_killed_kernel_and_gives_the_stages_own_numbers(
    small: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cells = Grid(("BadNet", "no such target"), ("FT", "ABD"), (3,)).cells()
    output, kernels, execute = tmp_path / "grid.csv", [], papermill.execute_notebook

    def counted(source: Path, *others, **settings) -> None:
        kernels.append(source.stem)
        execute(source, *others, **settings)

    monkeypatch.setattr(papermill, "execute_notebook", counted)
    (small / "0.py").write_text("import os\nos._exit(9)")
    (line,) = grid.run(cells[:3], output=output)
    assert line.startswith("01_poison of BadNet, seed 3: ") and "\n" not in line
    assert kernels == ["01_poison"] and read(output) == []
    (small / "0.py").unlink()
    kernels.clear()

    (line,) = grid.run(cells, processes=2, output=output)
    error = "ConfigError: unknown class 'bananna'; did you mean 'banana'?"
    assert line.startswith(f"01_poison of no such target, seed 3: {error} (")
    assert Path(line.rpartition("(")[2].rstrip(")")).is_file()
    assert sorted(kernels) == ["01_poison", "01_poison", "02_adversary", "03_defend", "03_defend"]
    kernels.clear()

    table = read(output)
    assert list(table[0]) == list(COLUMNS) and len(table) == 3 * len(grid.METRICS)
    assert len(list((runs / "poison").iterdir())) == 1 and len(list((runs / "evaluate").iterdir())) == 2
    assert grid.run(cells[:3], output=output) == []
    assert not kernels and read(output) == table

    monkeypatch.setenv("ABD_RUNS", str(tmp_path / "others"))
    for cell in cells[:3]:
        chain = {job.stage: job.config for job in cell.job().chain()}
        victim = own = poison(chain["poison"])
        metrics, weights, patch = victim.metrics["eval"], victim.file("model.safetensors"), None
        if "adversary" in chain:
            patch = adversary(chain["adversary"], weights).file("perturbation.safetensors")
        if "defend" in chain:
            own, on_eval = defend(chain["defend"], weights, perturbation=patch), EvaluateConfig(split="eval")
            trigger = victim.file("trigger.safetensors")
            metrics = measure(own.file("model.safetensors"), trigger=trigger, config=on_eval).metrics
        for metric in grid.METRICS:
            (row,) = [row for row in table if row["defence"] == cell.defence and row["metric"] == metric]
            assert {name: float(row[name]) for name in ("value", "n", "ci_low", "ci_high")} == metrics[metric]
            assert row["run_id"] == cell.job().key
            assert row["versions"].endswith(", 1 thread") and float(row["seconds"]) >= 0


@pytest.mark.slow
def test_ctrl_c_ends_the_grid_and_its_kernels_at_once(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    marker = tmp_path / "kernel"
    code = (
        "import abd_core.poison, os, pathlib, time\n"
        "def hang(config):\n"
        f"    pathlib.Path({str(marker)!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(900)\n"
        "abd_core.poison.poison = hang"
    )
    startup(tmp_path, monkeypatch, code)
    child = start_python(
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & has it ignored
        f"import runpy, sys; sys.argv = ['grid', 'small', '--output', {str(tmp_path / 'grid.csv')!r}]\n"
        "runpy.run_module('abd_core.grid', run_name='__main__')"
    )
    try:
        while not (marker.exists() and marker.read_text()):
            assert child.poll() is None, child.communicate()
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=20)
    finally:
        child.kill()
    assert child.returncode == 130 and "interrupted: what is done is kept" in errors and "Traceback" not in errors
    ended_within_20_seconds(int(marker.read_text()))


def ended_within_20_seconds(*processes: int) -> None:
    for _ in range(200):
        if not any(Path(f"/proc/{process}").exists() for process in processes):
            return
        time.sleep(0.1)
    pytest.fail("a process is still there")


def hang(marker: str) -> None:
    Path(marker).write_text(str(os.getpid()))
    time.sleep(900)


def test_the_processes_of_a_pool_end_with_their_parent_however_that_ends(tmp_path: Path):
    markers = [tmp_path / "1", tmp_path / "2"]
    parent = start_python(
        "import test_grid\n"
        f"for _ in test_grid.grid.pooled(test_grid.hang, {[str(marker) for marker in markers]}, 2): pass"
    )
    try:
        while not all(marker.exists() and marker.read_text() for marker in markers):
            assert parent.poll() is None, parent.communicate()
            time.sleep(0.1)
    finally:
        parent.kill()
    ended_within_20_seconds(*(int(marker.read_text()) for marker in markers))


@pytest.mark.slow
def test_snakemake_plans_the_same_jobs_for_slurm(runs: Path, tmp_path: Path):
    """A dry run needs no Slurm: it stops short of the executor, whose settings it has read by then."""
    snakemake = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--dry-run", "--quiet", "rules"]
    settings = ["--config", "grids=small ablations", f"table={tmp_path / 'grid.csv'}"]
    options = ["--profile", ROOT / "profiles" / "slurm", *settings]
    made = subprocess.run(
        [*snakemake, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    jobs = {part for cell in grid.select(["small", "ablations"]) for part in cell.job().chain()}
    for rule, stage in (("victim", "poison"), ("perturbation", "adversary"), ("cell", "defend")):
        assert re.search(
            rf"^{rule} +{sum(job.stage == stage for job in jobs)}$", made.stdout + made.stderr, re.MULTILINE
        )


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_of_other_cells_stay_and_a_row_of_other_settings_is_replaced(runs: Path, tmp_path: Path, monkeypatch):
    fake(monkeypatch)
    output = tmp_path / "new" / "grid.csv"
    grid.run(grid.select(["small"]), output=output)
    table = read(output)
    first, other = (
        table[0],
        {**table[0], "attack": "BadNet 2", "value": "0.12300000000000001", "seed": "10", "run_id": "mine"},
    )
    with output.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows([other, {**first, "value": "0.9", "run_id": "of another default"}])
    grid.run(grid.select(["small"]), output=output)
    assert [row for row in read(output) if row["attack"] == "BadNet 2"] == [other]
    assert [row for row in read(output) if row["attack"] != "BadNet 2"] == table


def test_a_victim_made_again_for_a_further_defence_keeps_its_first_rows(runs: Path, tmp_path: Path, monkeypatch):
    fake(monkeypatch)
    output = tmp_path / "grid.csv"
    grid.run(grid.select(["small"]), output=output)
    elsewhere = [{**row, "device": "another machine"} for row in read(output) if row["defence"] == "none"]
    with output.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(elsewhere)
    grid.run(grid.select(["small"]), output=output)
    assert [row for row in read(output) if row["defence"] == "none"] == elsewhere
    assert {row["defence"] for row in read(output)} == {"none", "FT", "ABD"}


@pytest.mark.parametrize(
    "text", ["setting,value\na,1\n", f"{','.join(COLUMNS)}\na,b\n", f"{','.join(COLUMNS)}\n{'1,' * len(COLUMNS)}1\n"]
)
def test_another_table_is_not_overwritten(text: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried = fake(monkeypatch)
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(ValueError, match=r"other\.csv: not a table of the grid; its columns shall be attack,defence"):
        grid.run(grid.select(["small"]), output=tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == text and not tried


def test_the_papers_values_stand_beside_ours_as_shares(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake(monkeypatch)
    cells = grid.select(["table1", "ablations", "zoo"], seeds=[0])
    grid.run(cells, output=tmp_path / "grid.csv")
    values = {(r["attack"], r["defence"], r["metric"]): r["paper_value"] for r in read(tmp_path / "grid.csv")}
    assert values["BadNet", "ABD", "asr"] == "0.0536" and values["BadCLIP", "none", "ca_top1"] == "0.5862"
    assert values["Blended", "UAP + T", "asr"] == "0.3048" and values["BadCLIP", "I + T_eda", "asr"] == "0.757"
    assert values["BadNet", "PAR", "asr"] == "" == values["WaNet", "ABD", "asr"] == values["BadNet", "ABD", "ra"]
    # attacks, metrics, and columns of Tables I to III, of which FT has two labels
    assert sum(value != "" for value in values.values()) == 3 * 2 * 9


def test_the_papers_tables_agree_where_they_overlap_and_use_the_grids_labels():
    known: dict[tuple[str, ...], str] = {}
    for row in read(ROOT / "data" / "paper.csv"):
        assert row["attack"] in ATTACKS and row["defence"] in (*DEFENCES, "none") and row["metric"] in grid.METRICS
        key = (row["source"], row["attack"], row["defence"], row["metric"])
        assert 0 <= float(row["value"]) <= 100 and known.setdefault(key, row["value"]) == row["value"]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_one_item_is_a_line_and_the_others_are_made(processes: int):
    found = dict(grid.pooled(int, ["1", "x", "3"], processes))
    assert (found["1"], found["3"]) == (1, 3) and isinstance(found["x"], JobError)
    assert str(found["x"]) == "ValueError: invalid literal for int() with base 10: 'x'"


def test_a_process_that_dies_ends_the_work_with_one_line():
    with pytest.raises(JobError, match=r"a process died.*with fewer --processes"):
        list(grid.pooled(os._exit, [9, 9], 2))
