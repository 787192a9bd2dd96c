"""Fuzz the targets for hours: `make fuzz MINUTES=30` a target; a row a target in data/results/fuzz.csv.

    python tests/fuzz/fuzz.py --minutes 30
    python tests/fuzz/fuzz.py --minutes 1 --targets image tar --output /tmp/fuzz.csv

Inputs that reach something new or crash are kept in `.hypothesis/`, the corpus of the next run. A row is written once
its target is through; targets that have one of at least these minutes are left out, so the run may be interrupted.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ABD_RUNS", tempfile.mkdtemp(prefix="abd-fuzz-runs-"))
CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from targets import TARGETS, Target

from abd_core.paths import atomic, environment

TABLE = CHECKOUT / "data" / "results" / "fuzz.csv"
COLUMNS = ("target", "minutes", "examples", "crashes", "note", "versions", "git_sha")
ROUND = 500  # examples between two looks at the clock


def fuzz(target: Target, minutes: float) -> dict[str, Any]:
    """Run one target for so many minutes, or until it crashes."""
    start, number, examples, note = time.monotonic(), 0, 0, ""

    def counted(example: Any) -> None:
        nonlocal examples
        examples += 1
        target.check(example)

    while time.monotonic() - start < 60 * minutes and not note:
        number += 1
        run = settings(
            max_examples=ROUND,
            deadline=None,
            database=DirectoryBasedExampleDatabase(CHECKOUT / ".hypothesis" / "fuzz"),
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        try:
            seed(time.time_ns() + number)(run(given(target.strategy)(counted)))()
        except Exception as error:
            note = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    minutes = round((time.monotonic() - start) / 60, 1)
    return {"minutes": minutes, "examples": examples, "crashes": int(bool(note)), "note": note}


def read_table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the targets, and write what came of it.")
    parser.add_argument("--minutes", type=float, default=30, metavar="N", help="minutes a target (30)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="only these")
    parser.add_argument("--output", type=Path, default=TABLE, metavar="CSV", help="the table (data/results/fuzz.csv)")
    given_ = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {row["target"]: dict(row) for row in read_table(given_.output)}
    for name in given_.targets:
        row = rows.get(name)
        if row and float(row["minutes"]) >= given_.minutes and row["crashes"] == "0":
            continue
        made = environment()
        versions = f"python {made['python']}, torch {made['torch']}"
        rows[name] = {"target": name, **fuzz(TARGETS[name], given_.minutes), "versions": versions}
        rows[name]["git_sha"] = made["git_sha"]
        print(rows[name], flush=True)
        given_.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic(given_.output) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[target] for target in TARGETS if target in rows)
    return int(any(str(row["crashes"]) != "0" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
