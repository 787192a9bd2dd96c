"""The files for those who carry the project on say what is so."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import yaml
from conftest import ROOT

TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
PROSE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


@pytest.mark.parametrize("name", PROSE)
def test_every_make_target_that_is_named_is_there(name):
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / name).read_text()))
    assert named and named <= TARGETS


@pytest.mark.parametrize("name", PROSE)
def test_every_file_that_is_linked_is_there(name):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
    ours = [link for link in links if not link.startswith("../../")]  # those of the host, beside the checkout
    assert not [link for link in ours if not (ROOT / link).exists()]


def test_the_workflow_runs_what_every_machine_runs_on_every_claimed_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    commands = {step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step}
    assert commands == {f"make {what} CONSTRAINTS=constraints.txt" for what in ("test", "book")}
    claimed = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == claimed


def test_the_hooks_are_checks_of_make_test():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text()
    tools = {re.search(r"\.venv/bin/([\w-]+)", hook["entry"])[1] for hook in hooks}
    assert tools == {"ruff", "mypy", "lint-imports", "jupytext"}
    assert all(f"$(BIN)/{tool}" in recipe for tool in tools)


def test_the_devcontainer_makes_a_target_of_the_makefile():
    record = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    target = re.search(r"make (\S+)", record["onCreateCommand"])[1]
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_citation_file_has_what_its_format_asks_for():
    record = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(record) and record["cff-version"] == "1.2.0"
    assert record["license"] == "MIT" and record["type"] == "software"
    assert all({"family-names", "given-names"} <= set(a) or "name" in a for a in record["authors"])
    (paper,) = record["references"]
    assert "2409.15968" in paper["url"] and next(a["family-names"] for a in paper["authors"]) == "Kuang"
