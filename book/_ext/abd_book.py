"""Sphinx extension of this book: parts of pages that are computed when it is built, and small repairs of its HTML."""

from __future__ import annotations

import pkgutil
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx

import abd_core
from abd_core.explore import STYLE, results_html
from abd_core.results import ResultsConfig, read_results

ROOT = Path(__file__).resolve().parents[2]
GLANCE = ("none", "FT", "CleanCLIP", "RoCLIP", "PAR", "random erasing", "clean weights", "ABD", "ABD-D")


def modules() -> list[str]:
    """Every public module of the package, by the layers of `pyproject.toml` from the bottom up."""
    found = {
        module.name
        for module in pkgutil.walk_packages(abd_core.__path__, "abd_core.")
        if not module.name.rpartition(".")[2].startswith("_")
    }
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    ranked = [name for layer in reversed(layers) for name in re.findall(r"[\w.]+", layer)]

    def rank(name: str) -> tuple[int, str]:
        home = next((i for i, layer in enumerate(ranked) if f"{name}.".startswith(f"{layer}.")), len(ranked))
        return home, name

    return sorted(found, key=rank)


def reference() -> str:
    """A section a module, made from its docstrings."""
    return "\n\n".join(
        f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n   :member-order: bysource\n```"
        for name in modules()
    )


def glance() -> str:
    """The paper's attacks and the defences that most is asked about, from the committed table of results."""
    results = read_results(ResultsConfig().path)
    rows = results[results["split"] == "eval"]
    tables = []
    for attack in rows.dropna(subset="paper_value")["attack"].unique():
        shown = results_html(rows, attack, "asr", GLANCE)
        tables.append(f"<figure>{shown}</figure>")
    seeds = sorted(rows["seed"].unique())
    cost = costs(rows)
    return (
        f'{STYLE}\n<div class="abd-look abd-glance">{"".join(tables)}</div>\n\n'
        f"*Attack success rate, lower is better: means over {len(seeds)} seeds, with 95 % intervals; last column: the "
        f"paper's value. {cost}*"
    )


def costs(rows: pd.DataFrame) -> str:
    """What ABD costs in clean accuracy, in a sentence."""
    ca = rows[rows["metric"].eq("ca_top1") & rows["attack"].isin(["BadNet", "Blended", "BadCLIP"])]
    mean = ca.groupby("defence")["value"].mean()
    return (
        f"Clean accuracy over the same runs: {100 * mean['none']:.1f} % for the victims, {100 * mean['ABD']:.1f} % after "
        f"ABD, {100 * mean['FT']:.1f} % after fine-tuning alone."
    )


PARTS: dict[str, Callable[[], str]] = {"modules": reference, "glance": glance}


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the computed parts where a page has `<!-- computed: name -->`."""
    source[0] = re.sub(r"<!-- computed: (\w+) -->", lambda found: PARTS[found[1]](), source[0])


def describe(app: Sphinx, page: str, template: str, context: dict, tree: nodes.document | None) -> None:
    """Wide tables and code can be scrolled with the keyboard, and tables made by pandas say which way a header goes."""
    body = context.get("body")
    if not body:
        return
    body = re.sub(r'<div class="(highlight)">', r'<div class="\1" tabindex="0">', body)
    context["body"] = body


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill)
    app.connect("html-page-context", describe)
    app.add_js_file("sortable.js")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
