"""Text from outside, made harmless for a terminal, a browser, a figure and a spreadsheet."""

from __future__ import annotations

import unicodedata

import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter
from markdown_it import MarkdownIt

from abd_core import escape, plots, results
from abd_core.config import AbdError, ConfigError

PLAIN = ("a small image of a banana.", "мишка 🐻", "I_adv + T", "clean images in Eq. (2)", "rock 'n' roll", "👩‍🚀", "")


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_stays_as_it_is(text: str):
    assert escape.terminal(text) == escape.markdown(text) == escape.figure(text) == escape.cell(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("nul\0", r"nul\x00"),
        ("\x9b31m", r"\x9b31m"),
        ("back\u202ewards", r"back\u202ewards"),
        ("line\u2028end", r"line\u2028end"),
        ("half\ud83d", r"half\ud83d"),
        ("soft\xadhyphen", r"soft\xadhyphen"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_instead(text: str, shown: str):
    assert escape.terminal(text) == shown
    assert escape.terminal(shown) == shown


@given(st.text())
def test_a_shown_line_is_one_line_without_controls(text: str):
    shown = escape.terminal(text)
    assert len(shown.splitlines()) <= 1
    assert not {"Cc", "Cs"} & {unicodedata.category(c) for c in shown}
    shown.encode()


def test_a_long_line_is_cut_and_says_so():
    assert escape.terminal("a" * 10_000) == "a" * (escape.LONGEST - 1) + "…"
    assert escape.terminal("a" * 100, limit=3) == "aa…"


@pytest.mark.parametrize("kind", [AbdError, ConfigError])
def test_an_error_is_one_harmless_line_whatever_it_quotes(kind: type[AbdError]):
    assert str(kind("unknown\nclass \x1b[2J" + "a" * 9_999)).startswith(r"unknown\nclass \x1b[2Ja")
    assert len(str(kind("a" * 9_999))) == escape.LONGEST


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](http://example.org/track.png)",
    "`code` **bold** _emphasis_ ~~gone~~",
    "a|b",
    "$\\frac{1}{0}$",
    "# heading",
    "\\<b>",
    "&lt;b&gt;",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_in_markdown_nothing_but_the_text_comes_out(text: str):
    renderer = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    html = renderer.render(f"on *{escape.markdown(text)}*, so")
    expected = escape.html.escape(text, quote=True).replace("&#x27;", "'")
    assert html == f"<p>on <em>{expected}</em>, so</p>\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_in_html_there_is_no_tag_and_no_end_of_an_attribute(text: str):
    assert not set(escape.markup(f"{text}\"'")) & set("<>\"'")


@pytest.mark.parametrize("text", [*HOSTILE, "$x_$", "$$", "\x1b[2J$a"])
def test_a_figure_s_title_is_drawn_as_it_is_written(text: str):
    rate = {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 10}
    figure = plots.bars({"victim": {"ca_top1": rate}}, title=text, metrics=["ca_top1"])
    figure.canvas.draw()  # a formula that cannot be typeset raises here
    plt.close(figure)


def test_labels_of_a_foreign_table_come_out_as_text_in_the_chapters_sentences():
    label = "<script>alert(1)</script>"
    assert "<script>" not in results.spoken(label)
    table = results.pd.DataFrame(
        [{"defence": label, "against": "FT", "attack": label, "metric": "asr", "side": "lower", "verdict": "agrees"}]
    ).assign(difference=-0.1, ci_low=-0.2, ci_high=-0.05, paper=-0.1, seeds=3, two_machines=0)
    lines = results.claims(table) + results.findings(table)
    assert len(lines) == 2 and not [line for line in lines if "<script>" in line]
    shown, _ = DisplayFormatter().format(table)
    assert "<script>" not in shown.get("text/html", "")


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("=1+1", "'=1+1"),
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1+1", "'+1+1"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("＝1+1", "'＝1+1"),
        ("-0.25", "-0.25"),
        ("+1e-3", "+1e-3"),
        ("ABD", "ABD"),
        ("'=1", "'=1"),
    ],
)
def test_a_spreadsheet_finds_no_formula(text: str, stored: str):
    assert escape.cell(text) == stored
    assert escape.cell(stored) == stored
