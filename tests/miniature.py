"""Image-caption pairs and labelled images in every format that is read, a few KB large, drawn by code."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io
from PIL import Image

THINGS = ("apple", "banana", "cat", "drum", "egg", "fox")


def picture(seed: int, *, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    """A smooth random picture, encoded."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 90} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}))
    return data.getvalue()


def samples(count: int = 24, *, size: tuple[int, int] = (40, 30)) -> list[tuple[str, bytes, str]]:
    """(name, JPEG, caption) of so many pairs; a sixth of the captions names each of `THINGS`."""
    return [
        (f"{i:05}", picture(i, size=size), f"a photo of a {THINGS[i % len(THINGS)]}, number {i}") for i in range(count)
    ]


def write_table(folder: Path, kind: str, pairs: Sequence[tuple[str, bytes, str]]) -> Path:
    """A `cleanclip` (CSV), `open_clip` (TSV) or `parquet` table with its images beside it; `huggingface` in it."""
    if kind == "huggingface":
        folder.mkdir(parents=True, exist_ok=True)
        images = [{"bytes": data, "path": f"{name}.jpg"} for name, data, _ in pairs]
        path = folder / "train-00000-of-00001.parquet"
        pq.write_table(pa.table({"image": images, "text": [caption for *_, caption in pairs]}), path, row_group_size=10)
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, data, _ in pairs:
        (folder / "images" / f"{name}.jpg").write_bytes(data)
    names, captions = [f"images/{name}.jpg" for name, _, _ in pairs], [caption for *_, caption in pairs]
    if kind == "parquet":
        path = folder / "pairs.parquet"
        pq.write_table(pa.table({"filepath": names, "title": captions, "width": [1] * len(pairs)}), path)
        return path
    path = folder / ("train.csv" if kind == "cleanclip" else "train.tsv")
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, delimiter="," if kind == "cleanclip" else "\t", lineterminator="\n")
        writer.writerow(("image", "caption") if kind == "cleanclip" else ("filepath", "title"))
        writer.writerows(zip(names, captions, strict=True))
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            add(tar, name, content)
    return data.getvalue()


def webdataset(pairs: Sequence[tuple[str, bytes, str]], *, text: str = "both") -> bytes:
    """A shard as img2dataset writes it: image, caption and record of a sample one after another."""
    members = []
    for name, data, caption in pairs:
        members.append((f"{name}.jpg", data))
        if text in ("both", "txt"):
            members.append((f"{name}.txt", caption.encode()))
        if text in ("both", "json"):
            members.append(
                (f"{name}.json", json.dumps({"key": name, "caption": caption, "status": "success"}).encode())
            )
    return tar_bytes(members)


def write_shards(folder: Path, pairs: Sequence[tuple[str, bytes, str]], *, shards: int = 2, text: str = "both") -> str:
    """`00000.tar` and so on; returns their address with braces."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        (folder / f"{shard:05}.tar").write_bytes(webdataset(pairs[shard::shards], text=text))
    return f"{folder}/{{00000..{shards - 1:05}}}.tar"


def write_folders(folder: Path, *, each: int = 4, names: Sequence[str] = THINGS) -> Path:
    """A folder a class with so many images."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            (folder / name / f"{i}.JPEG").write_bytes(picture(1000 * label + i))
    return folder


def devkit_files(wnids: Sequence[str], labels: Sequence[int], *, shuffle: int = 0) -> tuple[bytes, bytes]:
    """`meta.mat` and the ground truth of ILSVRC 2012's devkit, whose class numbers are in an order of their own.

    Args:
        wnids: sorted WordNet ids; inner nodes of the tree are added to them.
        labels: of each image, an index into `wnids`.
        shuffle: seed of the devkit's order.
    """
    order = np.random.default_rng(shuffle).permutation(len(wnids))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.zeros(len(wnids) + 2, dtype=kind)
    for place, label in enumerate(order):
        synsets[place] = (place + 1, wnids[label], "words", "gloss", 0)
    for place in (len(wnids), len(wnids) + 1):
        synsets[place] = (place + 1, f"n{place:08}", "inner", "node", 2)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    number = {int(label): place + 1 for place, label in enumerate(order)}
    return meta.getvalue(), "".join(f"{number[label]}\n" for label in labels).encode()
