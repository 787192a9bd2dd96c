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
from abd_core.explore import STYLE, bar
from abd_core.results import ResultsConfig, means, read_results, spoken

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
    """ASR against the paper's attacks of the defences that most is asked about, and what they cost, as a table."""
    results = read_results(ResultsConfig().path)
    rows = results[results["split"] == "eval"]
    attacks = list(rows.dropna(subset="paper_value")["attack"].unique())
    summary = means(rows)

    def cell(attack: str, defence: str, metric: str) -> str:
        if (attack, defence, metric) not in summary.index:
            return "<td>not measured</td>"
        row = summary.loc[(attack, defence, metric)]
        spread = "" if pd.isna(row["half"]) else f" ± {100 * row['half']:.1f}"
        value = f"<b>{100 * row['mean']:.1f}</b>{spread} ({row['seeds']:.0f})"
        paper = "" if pd.isna(row["paper"]) else f"<br>paper: {100 * row['paper']:.2f}"
        drawn = bar(row["mean"], hit=metric == "asr", interval=(row["ci_low"], row["ci_high"]))
        return f"<td>{drawn}{value}{paper}</td>"

    head = "".join(f'<th scope="col">ASR on {attack}, %</th>' for attack in attacks)
    body = "".join(
        f'<tr><th scope="row">{spoken(defence)}</th>'
        + "".join(cell(attack, defence, "asr") for attack in attacks)
        + cell(attacks[0], defence, "ca_top1")
        + "</tr>"
        for defence in GLANCE
    )
    return (
        f'{STYLE}\n<div class="scrolls" tabindex="0"><table class="abd-bars abd-glance"><thead><tr>'
        f'<th scope="col">defence</th>{head}<th scope="col">CA on {attacks[0]}, %</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n\n"
        "*Attack success rate (ASR, lower is better) and clean accuracy (CA, higher is better): mean ± half the 95 % "
        "t-interval over seeds (number of seeds). The paper's values are for CLIP's RN50 on ImageNet.*"
    )


def pipeline() -> str:
    """The drawn pipeline as a part of the page, so that it follows the theme."""
    drawing = (ROOT / "book" / "_static" / "pipeline.svg").read_text(encoding="utf-8")
    return f'```{{raw}} html\n<div class="scrolls" tabindex="0">{drawing}</div>\n```'


PARTS: dict[str, Callable[[], str]] = {"modules": reference, "glance": glance, "pipeline": pipeline}


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


# What the theme brings along and no page needs: a script of 1.5 MB that draws the icons of its font again, and Thebe,
# which would fetch itself from a network. The list of references has no list's children, and is none.
REPAIRS = (
    (r'<script defer src="[^"]*fontawesome\.js[^"]*"></script>', ""),
    (r"<script>const THEBE_JS_URL = .*?</script>", ""),
    (r'<script [^>]*src="[^"]*sphinx-thebe\.js[^"]*"></script>', ""),
    (r'<script type="text/x-thebe-config">.*?</script>', ""),
    (r"<script>kernelName = .*?</script>", ""),
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),
)


def repair(app: Sphinx, failed: Exception | None) -> None:
    """Take `REPAIRS` to every page that was written."""
    if failed is None and app.builder.format == "html":
        for path in Path(app.outdir).rglob("*.html"):
            text = path.read_text(encoding="utf-8")
            repaired = text
            for pattern, instead in REPAIRS:
                repaired = re.sub(pattern, instead, repaired, flags=re.S)
            if repaired != text:
                path.write_text(repaired, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill)
    app.connect("html-page-context", describe)
    app.connect("build-finished", repair)
    app.add_js_file("page.js")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
