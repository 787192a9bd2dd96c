"""Reading image-caption pairs against the bare decoding and resizing of their JPEG files: images a second.

    python benchmarks/loading.py

A ratio is the share of the bare rate: of one core, times the number of workers where there are some, which more workers
than free cores cannot reach; or, of the CPU's time, that of the reading and of all workers together, their start
included. The images are smooth noise of 500 x 375 px, about as many bytes as CC3M's.
"""

from __future__ import annotations

import csv
import io
import os
import resource
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from measure import Report
from PIL import Image

from abd_core.formats import Images, decode, in_batches, loader, read_index, unwrapped

SIZE, RESOLUTION, BATCH = (500, 375), 224, 32
COUNT, REPEATS = 1024, 5
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


def cpu_seconds() -> float:
    """CPU time of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def read(table: pa.Table, workers: int) -> float:
    """Images a second, from when what was read ahead of the first batch is used up."""
    batches = in_batches(table.num_rows, BATCH)
    skipped, start = 2 * workers + 1 if workers else 0, time.perf_counter()
    for number, batch in enumerate(loader(Images(table, RESOLUTION), batches, processes=workers), 1):
        unwrapped(batch)
        if number == skipped:
            start = time.perf_counter()
    return (len(batches) - skipped) * BATCH / (time.perf_counter() - start)


def main() -> None:
    report = Report("loading")
    files = [jpeg(number) for number in range(COUNT)]
    assert decode(files[0], RESOLUTION).shape == (3, RESOLUTION, RESOLUTION)
    with TemporaryDirectory() as folder:
        tables = {kind: read_index(address).table for kind, address in write(Path(folder), files).items()}

        def bare_rate() -> float:
            start = time.perf_counter()
            bare(files)
            return COUNT / (time.perf_counter() - start)

        variants: dict[str, Callable[[], float]] = {"decode and resize alone": bare_rate}
        cores = len(os.sched_getaffinity(0))
        for kind, table in tables.items():
            for workers in (count for count in (0, 1, 2, 4, 8) if count <= cores):
                variants[f"{kind}, {workers} workers"] = lambda t=table, w=workers: read(t, w)  # type: ignore[misc]
        rates: dict[str, list[float]] = {name: [] for name in variants}
        spent: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(REPEATS):  # all take turns, so that a slow moment of the machine meets all alike
            for name, call in variants.items():
                start = cpu_seconds()
                rates[name].append(call())
                spent[name].append(COUNT / (cpu_seconds() - start))
    for metric, unit, values in (("speed", "images/s", rates), ("thrift", "images/CPU-s", spent)):
        median = {name: statistics.median(found) for name, found in values.items()}
        first = next(iter(median.values()))
        for name, rate in median.items():
            busy = max(1, int(name.split()[1])) if metric == "speed" and "workers" in name else 1
            report.note(CASE, name, metric, unit, rate, ratio=rate / (busy * first), n=REPEATS)
    report.note(CASE, "decode and resize alone", "bytes of an image", "kB", sum(map(len, files)) / COUNT / 1000)
    report.write()


if __name__ == "__main__":
    main()
