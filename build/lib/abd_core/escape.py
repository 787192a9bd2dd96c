"""Text that others wrote, made harmless where it is shown: on a terminal, in HTML, Markdown, a figure or a CSV cell.

Captions, class names, labels of a table and paths come from outside. A terminal obeys control sequences in them, a
browser tags and scripts, a spreadsheet formulas. Whoever prints or stores such text passes it through one of these
first; none of them changes text that is plain already.
"""

from __future__ import annotations

import html
import re
import unicodedata

LONGEST = 2_000  # characters of one line; a caption may have a million
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_MARKDOWN = re.compile(r"[\\`*\[\]#|~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word means nothing


def terminal(text: object, *, limit: int = LONGEST) -> str:
    """One printable line: control, format and surrogate characters as Python writes them (`\\x1b`), the end cut off.

    Args:
        limit: longest line in characters; the cut is marked by "…".

    Example::

        >>> terminal("red: \\x1b[31m")
        'red: \\\\x1b[31m'
    """
    text = str(text)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(_visible(c) for c in text)


def _visible(character: str) -> str:
    # Cc: control; Cf: among others what turns the direction of writing round; Cs: lone surrogates; Zl, Zp: line ends.
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in "\u200c\u200d":
        return character  # joiners, without which emoji and some scripts fall apart, move nothing
    return repr(character)[1:-1]


def markup(text: object) -> str:
    """For HTML, between tags and in quoted attributes: the five special characters as entities, controls visible."""
    return html.escape(terminal(text))


def markdown(text: object) -> str:
    """For Markdown that a browser shows: no tag, link, emphasis, code, table cell or formula begins in it."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(terminal(text), quote=False))


def figure(text: object) -> str:
    """For a title or label of matplotlib, which would typeset what stands between two dollar signs."""
    return terminal(text).replace("$", r"\$")


def cell(text: str) -> str:
    """For a CSV cell: a text that a spreadsheet would take for a formula gets an apostrophe before it.

    Numbers stay as they are, also negative ones. Applied twice it changes no more than once.
    """
    if not text.startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
