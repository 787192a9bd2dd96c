"""The rendered book as files: every link and anchor, alternative texts, captions, the reference; no browser needed."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import ROOT, load_script

from abd_core.results import ResultsConfig, means, read_results
from abd_core.similarity import PAIRINGS

BOOK = ROOT / "book"
EXTENSION = load_script(BOOK / "_ext" / "abd_book.py")
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))


class Page(HTMLParser):
    """What a page links to, loads and defines."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := found.get(name))}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        if tag == "img":
            self.images.append(found)
        source = found.get("src") or (found.get("href") if tag == "link" else None)
        if source:
            self.loads.append(source)


@cache
def parsed(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def pages(book: Path) -> list[Path]:
    """The pages that people read, and the code behind them."""
    return sorted(book.rglob("*.html"))


def chapters() -> list[str]:
    contents = yaml.safe_load((BOOK / "_toc.yml").read_text())
    return [contents["root"], *(c["file"] for part in contents["parts"] for c in part["chapters"])]


def test_every_page_of_the_contents_is_built_and_every_source_is_in_the_contents(built_book):
    assert all((built_book / f"{name}.html").is_file() for name in chapters())
    sources = {path.stem for path in [*BOOK.glob("*.md"), *NOTEBOOKS]}
    assert sources == set(chapters())


def test_every_internal_link_and_anchor_leads_somewhere(built_book):
    broken = []
    for path in pages(built_book):
        for link in parsed(path).links:
            target, anchor = urldefrag(link)
            if re.match(r"[a-z]+:", target):
                continue
            file = (path.parent / unquote(target)).resolve() if target else path
            if not file.is_file() or (anchor and file.suffix == ".html" and unquote(anchor) not in parsed(file).ids):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_no_page_loads_anything_from_elsewhere(built_book):
    outside = [
        f"{path.name}: {source}"
        for path in pages(built_book)
        for source in parsed(path).loads
        if re.match(r"(https?:)?//", source)
    ]
    assert not outside
    assert (built_book / "_static" / "mathjax" / "tex-chtml.js").is_file()
    for path in pages(built_book):
        assert "widget-view+json" not in path.read_text(encoding="utf-8"), path.name


def test_every_image_has_an_alternative_text(built_book):
    without = [
        f"{path.name}: {image.get('src')[:60]}"
        for path in pages(built_book)
        for image in parsed(path).images
        if not (image.get("alt") or "").strip() or image["alt"].startswith("_images/")
    ]
    assert not without
    assert sum(len(parsed(path).images) for path in pages(built_book)) > 50


def test_the_reference_has_every_module_and_every_public_function(built_book):
    ids = parsed(built_book / "api.html").ids
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "abd_core").rglob("*.py")
        if not path.name.startswith("_")
    }
    assert names <= set(EXTENSION.modules())
    assert not [name for name in names if f"module-{name}" not in ids]
    assert {"abd_core.poison.poison", "abd_core.losses.backdoor_loss", "abd_core.explore.Explorer"} <= ids


def test_the_result_at_a_glance_is_that_of_the_table(built_book):
    text = (built_book / "intro.html").read_text(encoding="utf-8")
    rows = read_results(ResultsConfig().path).query("split == 'eval'")
    cell = means(rows).loc[("BadNet", "ABD", "asr")]
    assert f"<b>{100 * cell['mean']:.1f}</b> ± {100 * cell['half']:.1f} ({cell['seeds']:.0f})" in text
    assert "computed:" not in text and 'id="pipeline-title"' in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_opens_with_its_question_has_an_exercise_and_closes_with_what_was_learnt(path):
    cells = nbformat.read(path, as_version=4).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert "**Question.**" in texts[0]
    assert any("**What was learnt" in text for text in texts[-2:])
    assert re.search(
        r"<details><summary><b>Exercise.</b>.*</summary>\n.*\*\*Solution\.\*\*.*</details>", "".join(texts), re.S
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_has_a_text_and_the_paper_s_numbers_in_captions_are_the_paper_s(path):
    paper = pd.read_csv(ROOT / "data" / "paper.csv")
    known = {f"{value:.2f}" for value in [*paper["value"], *(pairing.paper for pairing in PAIRINGS.values())]}
    for cell in nbformat.read(path, as_version=4).cells:
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            told = cell.metadata.get("mystnb", {})
            assert told.get("image", {}).get("alt"), cell.source
            caption = told.get("figure", {}).get("caption", "")
            assert set(re.findall(r"\d+\.\d\d\b", caption)) <= known, caption
