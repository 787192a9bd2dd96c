"""The ways to install the project agree: `pyproject.toml` for pip, `environment.yml` for conda."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# The packages that conda-forge calls by another name than PyPI.
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base", "seaborn": "seaborn-base"}
CONDA_ONLY = {"python", "pip"}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def bounds(lines: list[str]) -> dict[str, SpecifierSet]:
    """`["numpy>=2.4,<3"]` -> `{"numpy": SpecifierSet(">=2.4,<3")}`."""
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r.specifier for r in requirements}


def pip_packages() -> dict[str, SpecifierSet]:
    """What pip installs with every extra, under conda's names."""
    lines = list(chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))
    return {CONDA_NAMES.get(name, name): specifier for name, specifier in bounds(lines).items()}


def conda_packages() -> dict[str, SpecifierSet]:
    lines = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
    return bounds(lines + [line for line in by_pip() if not line.startswith("-")])


def by_pip() -> list[str]:
    """What conda leaves to pip."""
    (left,) = (line["pip"] for line in ENVIRONMENT["dependencies"] if isinstance(line, dict))
    return left


def claimed_pythons() -> list[str]:
    """The minor versions in the classifiers, oldest first."""
    minors = re.findall(r"Python :: 3\.(\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    return [f"3.{minor}" for minor in sorted(map(int, minors))]


def test_conda_and_pip_install_the_same_packages_within_the_same_bounds() -> None:
    conda = {name: spec for name, spec in conda_packages().items() if name not in CONDA_ONLY}
    assert conda == pip_packages()


def test_every_package_has_a_lower_and_an_upper_bound() -> None:
    for name, specifier in pip_packages().items():
        assert {clause.operator for clause in specifier} == {">=", "<"}, name


def test_conda_installs_the_project_itself_beside_its_packages() -> None:
    assert [line for line in by_pip() if line.startswith("-")] == ["-e ."]


def test_the_claimed_pythons_are_consecutive_and_are_those_that_conda_allows() -> None:
    minors = [int(version.split(".")[1]) for version in claimed_pythons()]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert conda_packages()["python"] == SpecifierSet(f">=3.{minors[0]},<3.{minors[-1] + 1}")


def test_pip_starts_at_the_oldest_claimed_python() -> None:
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={claimed_pythons()[0]}")


def test_the_lock_of_ci_pins_every_package_within_its_bounds_and_names_no_host() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!]+", line)] == []
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for name, specifier in bounds(
        list(chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))
    ).items():
        assert pinned.get(name) and specifier.contains(pinned[name]), name
    for path in (".ci/run", ".github/workflows/test.yml"):
        called = re.findall(r"^(?:      - run: )?make .*", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert called and [line for line in called if "CONSTRAINTS=constraints.txt" not in line] == []
