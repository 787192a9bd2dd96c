"""What the benchmarks share: timing, the machine's ceilings, and one tidy table of all that was ever measured.

A row is one figure of one variant in one case. `ratio` compares it with the case's first variant *in the same run*: for
times and memory, the first one's value divided by this one's. Compare ratios, not times of two runs or two machines.
Where the variants took turns, it is the median of the turns' ratios, with a 95 % interval, `ratio_low` to `ratio_high`.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch.profiler import ProfilerActivity, profile

from abd_core.models import device
from abd_core.paths import atomic, environment, versions

TABLE = Path(__file__).parent / "results.csv"
COLUMNS = (
    *("benchmark", "device", "case", "variant", "metric", "value", "unit"),
    *("ratio", "ratio_low", "ratio_high", "n", "versions", "git_sha"),
)
FEWEST = 5  # turns that an interval is given of
ON = device()


def seconds(
    variants: Mapping[str, Callable[..., object]],
    *,
    repeats: int,
    given: Mapping[str, Callable[[], Any]] | None = None,
    in_a_row: int = 1,
) -> dict[str, list[float]]:
    """Seconds a call of each variant, turn by turn; all take turns, so that a slow moment of the machine meets all.

    They go there and back: none has the same one before it always.

    Args:
        given: what makes the argument of a variant's calls, anew for each turn and outside of its time.
        in_a_row: calls a turn; on a GPU only the last one is waited for.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, call in [*variants.items()][:: 1 if turn % 2 else -1]:
            arguments = [given[name]()] if given else []
            start = _now()
            for _ in range(in_a_row):
                call(*arguments)
            if turn:  # the first call compiles and fills caches
                taken[name].append((_now() - start) / in_a_row)
    return taken


def compared(first: Sequence[float], own: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """How many times the first one's seconds are one's own, the median over turns; its 95 % interval, None of too few.

    The interval is by bootstrap over the turns.
    """
    ratios = [one / other for one, other in zip(first, own, strict=False)]  # a run that is cut short ends in a turn
    if len(ratios) < FEWEST:
        return statistics.median(ratios), None
    found = stats.bootstrap((ratios,), np.median, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return statistics.median(ratios), (found.low, found.high)


def _now() -> float:
    if ON.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def device_seconds(variants: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Mean seconds a call of each variant that the GPU works; gaps in which it waits for the CPU are left out."""
    taken = {}
    for name, call in variants.items():
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
        taken[name] = sum(event.self_device_time_total for event in profiler.key_averages()) / repeats / 1e6
    return taken


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory that a call needs at its peak beyond what was taken before; 0 on the CPU, which keeps no count."""
    if ON.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def own_seconds(calls: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Seconds that the device itself works at a call: what a share of its ceilings is counted in."""
    if ON.type == "cuda":
        return device_seconds(calls, repeats=repeats)
    return {name: statistics.median(turns) for name, turns in seconds(calls, repeats=repeats).items()}


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of this machine's product of two large square matrices: the ceiling of what is made of products."""
    size = 8192 if ON.type == "cuda" else 4096
    a, b = (torch.randn(size, size, device=ON).to(dtype) for _ in range(2))
    return 2 * size**3 / own_seconds({"product": lambda: a @ b}, repeats=9)["product"]


def copy_rate(*, megabytes: int) -> float:
    """Bytes read and written a second by this machine's copy: the ceiling of what passes over memory once."""
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=ON)
    target = torch.empty_like(source)
    return 2 * source.nbytes / own_seconds({"copy": lambda: target.copy_(source)}, repeats=9)["copy"]


def _installed(package: str) -> str:
    """Its name and version; "" where it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _named(row: Mapping[str, object]) -> tuple[object, ...]:
    """What a row is the only one of."""
    return tuple(row[key] for key in ("benchmark", "device", "case", "variant", "metric"))


class Report:
    """Figures of one benchmark on this device; `write` puts each in the place of an earlier one of the same case.

    Args:
        packages: names of those that take part beside torch and open_clip, where they are installed.
    """

    def __init__(self, benchmark: str, *packages: str) -> None:
        made = environment()
        self.origin = {
            "benchmark": benchmark,
            "device": made["device"],
            "versions": ", ".join([versions(made), *map(_installed, filter(_installed, packages))]),
            "git_sha": made["git_sha"],
        }
        self.rows: dict[tuple[object, ...], dict[str, object]] = {}

    def add(self, case: str, metric: str, unit: str, values: Mapping[str, float], *, n: int = 1) -> None:
        """One figure of each variant; smaller is better. `n`: repeats behind it."""
        first = next(iter(values.values()))
        for variant, value in values.items():
            self.note(case, variant, metric, unit, value, ratio=first / value if value else None, n=n)

    def times(
        self,
        case: str,
        metric: str,
        taken: Mapping[str, Sequence[float]],
        *,
        beside: Mapping[str, Sequence[float]] | None = None,
        calls: int = 1,
    ) -> dict[str, float]:
        """Each variant's median turn, noted in ms and returned in seconds, of its seconds turn by turn.

        Args:
            beside: what the first variant took within a variant's own turns, where that is known.
            calls: those in a turn.
        """
        found = {variant: statistics.median(turns) for variant, turns in taken.items()}
        first = next(iter(taken.values()), ())
        for variant, turns in taken.items():
            ratio, within = (1.0, None) if turns is first else compared((beside or {}).get(variant, first), turns)
            n = calls * len(turns)
            self.note(case, variant, metric, "ms", 1e3 * found[variant], ratio=ratio, within=within, n=n)
        return found

    def note(
        self,
        case: str,
        variant: str,
        metric: str,
        unit: str,
        value: float,
        *,
        ratio: float | None = None,
        within: tuple[float, float] | None = None,
        n: int = 1,
    ) -> None:
        """One figure, in the place of an earlier one; its ratio where it is compared, and the ratio's interval."""
        low, high = within or (None, None)
        ratios = {"ratio": ratio, "ratio_low": low, "ratio_high": high}
        figures = {name: "" if r is None else f"{r:.3g}" for name, r in ratios.items()}
        row = {**self.origin, "case": case, "variant": variant, "metric": metric, "value": f"{value:.4g}", "unit": unit}
        self.rows[_named(row)] = {**row, **figures, "n": n}
        said = figures["ratio"] + (f" ({figures['ratio_low']} to {figures['ratio_high']})" if within else "")
        print(f"{case:34} {variant:28} {metric:22} {value:10.4g} {unit:9} {said:>6}", flush=True)

    def write(self) -> None:
        kept = []
        if TABLE.exists():
            with TABLE.open(newline="", encoding="utf-8") as f:
                kept = [row for row in csv.DictReader(f) if _named(row) not in self.rows]
        with atomic(TABLE) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *self.rows.values()])
