"""Reading image-caption pairs against the bare decoding and resizing of their JPEG files: images a second.

    python benchmarks/loading.py

A ratio is the share of the bare rate of as many processes as there are workers, all at work at the same time, by the
clock ("speed") or by the CPU's time ("CPU time": that of the workers and of the process that they read for). It is
taken turn by turn, and its median reported, as the median of each figure is. More workers than free cores reach no
such share by the clock. Both are taken once the workers are under way; what it takes to start one and to end it is a
figure of its own. The images are smooth noise of 500 x 375 px, about as many bytes as CC3M's.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import resource
import statistics
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from measure import Report
from PIL import Image

from abd_core.formats import Images, decode, in_batches, loader, read_index, unwrapped

SIZE, RESOLUTION, BATCH = (500, 375), 224, 32
COUNT, PASSES, REPEATS = 1024, 3, 9
BARE = "decode and resize alone"
CASE = f"JPEG, {SIZE[0]}x{SIZE[1]} px to {RESOLUTION} px"


def jpeg(number: int) -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (SIZE[1] // 6, SIZE[0] // 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()


def write(folder: Path, files: list[bytes]) -> dict[str, str]:
    """The same pairs as a tar and as a CSV table with files; returns their addresses."""
    with tarfile.open(folder / "0.tar", "w") as tar, (folder / "0.csv").open("w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["image", "caption"])
        for number, data in enumerate(files):
            for ending, content in {"jpg": data, "txt": b"a caption"}.items():
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            (folder / f"{number:05}.jpg").write_bytes(data)
            table.writerow([f"{number:05}.jpg", "a caption"])
    return {"tar": str(folder / "0.tar"), "files": str(folder / "0.csv")}


def bare(files: list[bytes]) -> None:
    """What any loader in Python has to do."""
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        short = min(image.size)
        image = image.resize([int(RESOLUTION * side / short) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - RESOLUTION) // 2 for side in image.size)
        np.asarray(image.crop((left, top, left + RESOLUTION, top + RESOLUTION)))


def bare_rates(files: list[bytes], processes: int) -> dict[str, float]:
    """Images a second of clock time and of CPU time that so many processes decode at the same time."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        runs = list(pool.map(_bare_run, [files] * processes))
    elapsed = max(end for _, end, _ in runs) - min(start for start, _, _ in runs)
    count = processes * len(files)
    return {"speed": count / elapsed, "CPU time": count / sum(spent for *_, spent in runs)}


def _bare_run(files: list[bytes]) -> tuple[float, float, float]:
    """When it began and ended, and the CPU's seconds that it took."""
    start, spent = time.perf_counter(), time.process_time()
    bare(files)
    return start, time.perf_counter(), time.process_time() - spent


def busy_seconds() -> float:
    """CPU time up to now of this process and of those that it has started and that live."""
    spent = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def ended_seconds() -> float:
    """CPU time of this process and of those that it has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


def rates(table: pa.Table, workers: int) -> dict[str, float]:
    """As `bare_rates`, from when what was read ahead of the first batch is used up; CPU seconds to start a worker."""
    batches, before = in_batches(table.num_rows, BATCH) * PASSES, ended_seconds()
    skipped = 2 * workers + 1 if workers else 0
    start = time.perf_counter(), busy_seconds()
    for number, batch in enumerate(loader(Images(table, RESOLUTION), batches, processes=workers), 1):
        unwrapped(batch)
        if number == skipped:
            start = time.perf_counter(), busy_seconds()
        if number == len(batches):
            end = time.perf_counter(), busy_seconds()
    elapsed, spent = end[0] - start[0], end[1] - start[1]
    count = PASSES * table.num_rows
    done = count - skipped * BATCH
    found = {"speed": done / elapsed, "CPU time": done / spent}
    if workers:
        found["start"] = (ended_seconds() - before - count / found["CPU time"]) / workers
    return found


def main() -> None:
    report = Report("loading")
    files = [jpeg(number) for number in range(COUNT)]
    assert decode(files[0], RESOLUTION).shape == (3, RESOLUTION, RESOLUTION)
    counts = [count for count in (0, 1, 2, 4, 8) if count <= len(os.sched_getaffinity(0))]
    with TemporaryDirectory() as folder:
        tables = {kind: read_index(address).table for kind, address in write(Path(folder), files).items()}
        variants: dict[str, tuple[int, Callable[[], dict[str, float]]]] = {}
        for count in counts[1:]:
            name = BARE if count == 1 else f"{BARE}, {count} processes"
            variants[name] = count, lambda n=count: bare_rates(files, n)  # type: ignore[misc]
        for kind, table in tables.items():
            for count in counts:
                variants[f"{kind}, {count} workers"] = count, lambda t=table, n=count: rates(t, n)  # type: ignore[misc]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for _ in range(REPEATS):  # all take turns, so that a slow moment of the machine meets all alike
            for name, (_, call) in variants.items():
                found[name].append(call())
    alone = {count: found[name] for name, (count, _) in variants.items() if name.startswith(BARE)}
    for metric, unit in (("speed", "images/s"), ("CPU time", "images/CPU-s"), ("start", "CPU-s a worker")):
        for name, (count, _) in variants.items():
            own = [turn[metric] for turn in found[name] if metric in turn]
            against = [turn[metric] for turn in alone[max(1, count)] if metric in turn]
            if own:
                shares = [value / other for value, other in zip(own, against, strict=False)]
                share = statistics.median(shares) if shares else None
                report.note(CASE, name, metric, unit, statistics.median(own), ratio=share, n=REPEATS)
    report.note(CASE, BARE, "bytes of an image", "kB", sum(map(len, files)) / COUNT / 1000)
    report.write()


if __name__ == "__main__":
    main()
