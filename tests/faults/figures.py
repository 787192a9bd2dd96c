"""The figures of the page "Trust and failure", from the harnesses' tables and the tests' own: `book/trust.md`.

python tests/faults/figures.py    # writes them between the page's marks
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]
from test_bad_input import CASES, ODD
from test_hostile import REFUSED

from abd_core.paths import atomic

PAGE = CHECKOUT / "book" / "trust.md"
MARKS = ("<!-- figures -->\n", "<!-- /figures -->\n")


def rows(name: str) -> list[dict[str, str]]:
    path = CHECKOUT / "data" / "results" / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def faults(table: list[dict[str, str]]) -> list[str]:
    if not table:
        return ["Disturbed runs: not measured yet (`make test-faults`)."]
    stages = list(dict.fromkeys(row["stage"] for row in table))
    all_, survived = Counter(), Counter()
    for row in table:
        all_[row["fault"], row["stage"]] += 1
        survived[row["fault"], row["stage"]] += row["survived"] == "yes"
    lines = [
        "Disturbed runs that ended with the metrics and weights of an undisturbed one, of those tried:",
        "",
        f"| disturbance | {' | '.join(stages)} |",
        f"|---|{'---|' * len(stages)}",
    ]
    for fault in dict.fromkeys(row["fault"] for row in table):
        cells = [f"{survived[fault, stage]} of {n}" if (n := all_[fault, stage]) else "–" for stage in stages]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    reads = sum(int(row["reads"]) for row in table)
    return [*lines, "", f"Files read meanwhile, and none of them half a file: {reads:,}."]


def fuzzing(table: list[dict[str, str]]) -> list[str]:
    if not table:
        return ["Fuzzing: not measured yet (`make fuzz`)."]
    lines = ["| fuzzed | minutes | inputs | crashes |", "|---|--:|--:|--:|"]
    return lines + [
        f"| {row['target']} | {row['minutes']} | {int(row['examples']):,} | {row['crashes']} |" for row in table
    ]


def figures() -> str:
    """The page's part between the marks, marks included."""
    counts = [
        f"Cases of bad input that end in one line, all in `tests/test_bad_input.py`: {len(CASES)}.",
        f"Odd captions that pass: {len(ODD)}.",
        f"Hostile files that are refused, all in `tests/test_hostile.py`: {len(REFUSED)}.",
    ]
    parts = [faults(rows("faults.csv")), [" ".join(counts)], fuzzing(rows("fuzz.csv"))]
    return MARKS[0] + "\n" + "\n\n".join("\n".join(part) for part in parts) + "\n\n" + MARKS[1]


def page() -> str:
    """The whole page with the figures of today."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    return before + figures() + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    text = page()
    with atomic(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
