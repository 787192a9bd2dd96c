"""The notebooks as papermill runs them: at smoke size, from another folder, with good and with bad parameters."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import torch
from papermill.exceptions import PapermillExecutionError
from safetensors.torch import load_file

from abd_core.adversary import AdversaryConfig
from abd_core.audit import AuditConfig, AuditInputs
from abd_core.config import AbdError
from abd_core.defend import DefendConfig
from abd_core.explore import ExploreConfig
from abd_core.fig2 import Fig2Config
from abd_core.inputs import SuspectInputs
from abd_core.models import EMBEDDED
from abd_core.notebook import SHARED, given_parameters, summary
from abd_core.poison import PoisonConfig
from abd_core.pretrain import PretrainConfig
from abd_core.results import BenchmarksConfig, ResultsConfig

BOOK = Path(__file__).parents[1] / "book"
STAGES = {
    "00_benchmark": {"pretrain": PretrainConfig},
    "01_poison": {"poison": PoisonConfig},
    "02_adversary": {"poison": PoisonConfig, "adversary": AdversaryConfig},
    "03_defend": {
        "poison": PoisonConfig,
        "adversary": AdversaryConfig,
        "suspect": SuspectInputs,
        "defend": DefendConfig,
    },
    "04_results": {"results": ResultsConfig},  # these two run in test_results.py
    "05_ablations": {"results": ResultsConfig},
    "06_similarity": {
        "poison": PoisonConfig,
        "adversary": AdversaryConfig,
        "defend": DefendConfig,
        "fig2": Fig2Config,
    },
    "07_kernels": {"benchmarks": BenchmarksConfig},
    "09_paper_scale": {"benchmarks": BenchmarksConfig},
    "08_explore": {
        "poison": PoisonConfig,
        "adversary": AdversaryConfig,
        "defend": DefendConfig,
        "explore": ExploreConfig,
    },
    "10_audit": {"poison": PoisonConfig, "inputs": AuditInputs, "audit": AuditConfig},
}
SMOKE = {
    "00_benchmark": {"retrain": True, "epochs": 1, "limit": 256},
    "01_poison": {"epochs": 1, "limit": 256},
    "02_adversary": {"poison_epochs": 1, "limit": 256, "steps": 2},
    "03_defend": {"poison_epochs": 1, "limit": 256, "steps": 2, "epochs": 1},
    "06_similarity": {"poison_epochs": 1, "limit": 256, "steps": 2, "epochs": 1},
    "07_kernels": {},
    "09_paper_scale": {},
    "08_explore": {"poison_epochs": 1, "limit": 256, "steps": 2, "epochs": 1},
    "10_audit": {"poison_epochs": 1, "limit": 256, "count": 16, "recovery_steps": 1},
}
SETS = {
    "00_benchmark": [{}, {"seed": 1, "batch_size": 64}],
    "01_poison": [{}, {"attack": "blended", "target": "strawberry", "seed": 1, "rate": "0.5"}],
    "02_adversary": [{}, {"mode": "additive", "backdoor_images": "clean", "negatives": "clean", "placement": "fixed"}],
    "03_defend": [
        {},
        {"attack": "blended", "mode": "additive", "view": "both", "batch_norm": "frozen", "eda": "false"},
    ],
    "06_similarity": [{}, {"attack": "blended", "target": "strawberry", "mode": "additive", "defence": "ft"}],
    "07_kernels": [{}],
    "09_paper_scale": [{}],
    "08_explore": [{"attack": "blended", "target": "strawberry", "label": "turtle", "defence": "ft"}],
    "10_audit": [{}],
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ABD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ABD_STATIC", "1")


def run(name, parameters, out="out.ipynb"):
    return papermill.execute_notebook(BOOK / f"{name}.ipynb", out, parameters, progress_bar=False)


def outputs(notebook, kind):
    return [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == kind]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "extra"), [(name, extra) for name in SETS for extra in SETS[name]])
def test_notebook_runs_alone_from_any_folder_and_ends_with_tables_and_figures(name, extra):
    notebook = run(name, {**SMOKE[name], **extra})
    shown = outputs(notebook, "display_data") + outputs(notebook, "execute_result")
    assert any("image/png" in output.data or "<img" in output.data.get("text/html", "") for output in shown)
    assert any("text/html" in output.data for output in shown)
    assert not [o for o in shown if "application/vnd.jupyter.widget-view+json" in o.data]
    if name == "03_defend":
        text = summary(Path("out.ipynb"))
        assert "ASR" in text and "ATTACK DID NOT TAKE" in text and Path(text.split("Figure: ")[1].strip()).is_file()
    if name == "06_similarity":
        text = summary(Path("out.ipynb"))
        assert text.count("(paper ") == 4 and Path(text.split("Figure: ")[1].strip()).is_file()


@pytest.mark.slow
def test_a_checkpoint_of_ones_own_is_defended_as_the_same_victim_is_and_no_attack_success_is_claimed(tmp_path):
    run("03_defend", SMOKE["03_defend"])
    (weights,) = tmp_path.glob("runs/poison/*/model.safetensors")
    (known,) = tmp_path.glob("runs/defend/*/metrics.json")
    with_prefix = {f"module.{name}": tensor for name, tensor in load_file(weights).items()}
    torch.save({"epoch": 3, "state_dict": with_prefix}, "suspect.pt")  # as CleanCLIP's code saves
    for run_folder in (weights.parent, known.parent.parent):
        shutil.move(run_folder, tmp_path / "aside" / run_folder.name)
    run("03_defend", {**SMOKE["03_defend"], "checkpoint": "suspect.pt", "model": EMBEDDED})
    (made,) = tmp_path.glob("runs/defend/*/metrics.json")
    assert made.parent.name == known.parent.name  # the key holds the digests of all that was read
    assert not list(tmp_path.glob("runs/poison/*"))
    text = summary(Path("out.ipynb"))
    assert "CA" in text and "ASR" not in text and str(made.with_name("model.safetensors")) in text


@pytest.mark.slow
def test_the_kernels_chapter_shows_the_figures_of_the_table_that_it_is_given():
    table = pd.read_csv(BenchmarksConfig().path)
    chosen = table.index[table["variant"].str.startswith("abd_core") & table["ratio"].notna()][0]
    table.loc[chosen, "ratio"] = 777.77
    table.to_csv("other.csv", index=False)
    run("07_kernels", {"benchmarks": "other.csv"})
    assert "777.77" in summary(Path("out.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [lambda row: False, lambda row: row["benchmark"] == "infonce"])
def test_the_kernels_chapter_runs_on_a_table_that_lacks_rows(kept):
    table = pd.read_csv(BenchmarksConfig().path)
    table[table.apply(kept, axis=1).astype(bool)].to_csv("few.csv", index=False)
    run("07_kernels", {"benchmarks": "few.csv"})


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_has_a_type_a_comment_and_the_default_of_its_setting(name):
    shown = papermill.inspect_notebook(BOOK / f"{name}.ipynb")
    stages = list(STAGES[name].items())
    for parameter, record in shown.items():
        assert record["help"] and record["inferred_type_name"] != "None", parameter
        stage, _, field = parameter.partition("_")
        homes = [kind for _, kind in reversed(stages) if parameter in kind.names()]
        homes = homes if parameter in SHARED else homes[:1]
        homes = [(kind, parameter) for kind in homes] or [(dict(stages)[stage], field)]
        for kind, setting in homes:
            default = {f.name: f.default for f in dataclasses.fields(kind)}[setting]
            assert ast.literal_eval(record["default"]) == default, parameter


@pytest.mark.parametrize(
    ("name", "parameters", "line"),
    [
        ("01_poison", {"epoch": 3}, "ConfigError: unknown parameter 'epoch'; did you mean 'epochs'?"),
        ("01_poison", {"target": "bananna"}, "ConfigError: unknown class 'bananna'; did you mean 'banana'?"),
        (
            "01_poison",
            {"attack": "wanett"},
            "ConfigError: PoisonConfig.attack = 'wanett': one of 'badnet', 'blended', ",
        ),
        ("01_poison", {"rate": 1.5}, "ConfigError: PoisonConfig.rate = 1.5: ≥ 0 and ≤ 1 expected"),
        ("02_adversary", {"mode": "sticker"}, "ConfigError: AdversaryConfig.mode = 'sticker'"),
        ("03_defend", {"poison_rate": "lots"}, "ConfigError: PoisonConfig.rate = 'lots': float expected"),
        ("03_defend", {"checkpoint": "nowhere.pt"}, "RunError: missing file: nowhere.pt"),
        (
            "03_defend",
            {"checkpoint": "x.pt", "attack": "blended"},
            "ConfigError: checkpoint = 'x.pt': no attack is run",
        ),
        ("03_defend", {"batch_size": 4000}, "ConfigError: batch_size = 4000: at most 3522 expected"),
        ("08_explore", {"results": "nowhere.csv"}, "RunError: missing file: nowhere.csv"),
        ("10_audit", {"images": "nowhere"}, "RunError: missing folder: nowhere"),
        ("00_benchmark", {"epochs": 2}, "ConfigError: PretrainConfig.epochs: the committed base was trained otherwise"),
        ("08_explore", {"label": "catt"}, "ConfigError: unknown class 'catt'; did you mean 'cat'?"),
        ("10_audit", {"checkpoint": "nowhere.safetensors"}, "RunError: missing file: nowhere.safetensors"),
        ("10_audit", {"preset": "theirs"}, "ConfigError: AuditConfig.preset = 'theirs': one of 'ours', 'published'"),
        ("04_results", {"results": "nowhere.csv"}, "RunError: missing file: nowhere.csv"),
        ("07_kernels", {"benchmarks": "nowhere.csv"}, "RunError: missing file: nowhere.csv"),
    ],
)
def test_bad_parameter_ends_in_one_line_before_any_work(name, parameters, line, tmp_path):
    with pytest.raises(PapermillExecutionError) as caught:
        run(name, parameters)
    assert line in caught.value.evalue or line in f"{caught.value.ename}: {caught.value.evalue}"
    assert len(caught.value.traceback) == 1 and "\n" not in caught.value.traceback[0]
    assert not list((tmp_path / "runs").glob("*/*/history.csv"))


@pytest.mark.parametrize("name", STAGES)
def test_committed_notebook_has_the_outputs_of_a_whole_run(name):
    notebook = nbformat.read(BOOK / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not outputs(notebook, "error")
    assert os.path.getsize(BOOK / f"{name}.ipynb") < 3e6
    assert "widgets" not in notebook.metadata
    assert any("nbval-check-output" in cell.metadata.get("tags", []) for cell in cells)


@pytest.mark.slow
def test_the_live_explorer_runs_and_leaves_no_megabytes_behind(monkeypatch):
    monkeypatch.delenv("ABD_STATIC")
    notebook = run("08_explore", SMOKE["08_explore"])
    shown = outputs(notebook, "display_data") + outputs(notebook, "execute_result")
    assert sum("application/vnd.jupyter.widget-view+json" in output.data for output in shown) >= 3
    assert os.path.getsize("out.ipynb") < 1e6


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["book", "."])
def test_the_command_line_works_from_the_root_and_from_the_book(folder, tmp_path):
    command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    notebook = BOOK.relative_to(BOOK.parent) / "03_defend.ipynb" if folder == "." else Path("03_defend.ipynb")
    out = tmp_path / "out.ipynb"
    given = {"attack": "blended", **SMOKE["03_defend"]}
    options = [part for name, value in given.items() for part in ("-p", name, str(value))]
    done = subprocess.run([*command, str(notebook), str(out), *options], cwd=BOOK.parent / folder, check=False)
    assert (
        done.returncode == 0 and "blended" in summary(out) + nbformat.read(out, as_version=4).cells[3].outputs[0].text
    )


@pytest.mark.parametrize("name", STAGES)
def test_the_command_line_lists_each_parameter_with_its_type_and_help(name):
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(BOOK / f"{name}.ipynb")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for parameter, record in papermill.inspect_notebook(BOOK / f"{name}.ipynb").items():
        line = shown.split(f"  {parameter}: {record['inferred_type_name']}")[1]
        assert record["help"][:20] in " ".join(line.split()), parameter


@pytest.mark.slow
def test_a_wrong_number_in_a_notebook_makes_nbval_fail(tmp_path):
    notebook = nbformat.read(BOOK / "07_kernels.ipynb", as_version=4)
    checked = next(i for i, cell in enumerate(notebook.cells) if "nbval-check-output" in cell.metadata.get("tags", []))
    del notebook.cells[checked + 1 :]
    options = ["--nbval-lax", "--nbval-current-env", "-n0", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    options += ["--nbval-sanitize-with", str(BOOK.parent / "tests" / "nbval_sanitize.cfg")]
    results = []
    for wrong in (False, True):
        if wrong:
            text = notebook.cells[checked].outputs[0].data["text/plain"]
            number = re.findall(r"\d+\.\d+", text)[-1]
            notebook.cells[checked].outputs[0].data["text/plain"] = text.replace(number, f"{float(number) + 1}")
        nbformat.write(notebook, tmp_path / "copy.ipynb")
        command = [sys.executable, "-m", "pytest", *options, "copy.ipynb"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        results.append((done.returncode, "mismatch" in done.stdout))
    assert results == [(0, False), (1, True)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("seed: 2021-13-45", "not YAML .month must be in 1..12"),
        ("target: !!timestamp x", "not YAML"),
        ("target: 2021-01-01", "'target' is of kind date: text, a number or a list of them expected"),
        ("_seed: 3", "'_seed' is no parameter's name"),
    ],
)
def test_parameters_that_no_notebook_would_see_are_refused_in_one_line(text, error, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(AbdError, match=rf"p.yaml: {error}"):
        given_parameters([tmp_path / "p.yaml"], [])


def test_a_private_name_on_the_command_line_is_refused():
    with pytest.raises(AbdError, match="-p: '_seed' is no parameter's name"):
        given_parameters([], [("_seed", "3")])


def test_the_summary_s_command_shows_its_usage():
    done = subprocess.run([sys.executable, "-m", "abd_core.notebook"], capture_output=True, text=True, check=False)
    assert done.stderr == "usage: python -m abd_core.notebook EXECUTED.ipynb\n"


def test_the_readme_shows_what_the_committed_notebook_printed():
    shown = (BOOK.parent / "README.md").read_text().split("<!-- demo output -->\n```text\n")[1].split("```")[0]
    assert shown == summary(BOOK / "03_defend.ipynb") + "Executed notebook: runs/demo/03_defend.ipynb\n"
