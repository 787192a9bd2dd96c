"""Draw the embedded benchmark from the packages in `package.json`.

    cd data && npm install --ignore-scripts --no-package-lock && python build.py

Writes, beside this file:

- `sheets/<vendor>.webp`  lossless RGBA, 64 px cells, 32 a row, in the order of `emoji.csv`'s `<vendor>` columns;
- `emoji.csv`             a row a concept: code point, label, tags, group, its cell in each vendor's sheet (or empty);
- `classes.csv`           the zero-shot test classes and how each was chosen;
- `samples.json`          a few SVG sources a vendor, so that a test can redraw them without the packages;
- `SHA256SUMS`            checksums of all of these.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import random
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

HERE = Path(__file__).resolve().parent
CELL, ROW = 64, 32  # pixels a side of a cell; cells a row of a sheet
VENDORS = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "emojione", "twemoji")
GROUPS = (
    "smileys-emotion",
    "people-body",
    "component",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "symbols",
    "flags",
)
NUM_CLASSES, CLASS_SEED, ALWAYS = 100, 0, ("banana", "strawberry", "lemon")
CLASS_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
SAMPLE_LABELS = ("banana", "dog", "rocket")


def slug(label: str) -> str:
    """`'woman’s hat'` -> `'womanshat'`: the one spelling on which all vendors' icon names agree."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", ascii_label.lower())


def svg_of(icons: dict, name: str) -> str:
    """The icon `name` of an IconifyJSON set as a square SVG document; aliases with their flips and turns."""
    body, flip_h, flip_v, turns = None, False, False, 0
    entry: dict = {}
    while body is None:
        if name in icons["icons"]:
            entry = icons["icons"][name]
            body = entry["body"]
        else:
            alias = icons["aliases"][name]
            flip_h ^= alias.get("hFlip", False)
            flip_v ^= alias.get("vFlip", False)
            turns += alias.get("rotate", 0)
            name = alias["parent"]
    width = entry.get("width", icons.get("width", 16))
    height = entry.get("height", icons.get("height", 16))
    left, top = entry.get("left", 0), entry.get("top", 0)
    side = max(width, height)
    x, y = left - (side - width) / 2, top - (side - height) / 2
    cx, cy = x + side / 2, y + side / 2
    turn = f"rotate({90 * (turns % 4)} {cx} {cy})"
    flip = f"translate({2 * cx * flip_h} {2 * cy * flip_v}) scale({-1 if flip_h else 1} {-1 if flip_v else 1})"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{x} {y} {side} {side}"><g transform="{turn} {flip}">{body}</g></svg>'
    )


def render(svg: str) -> np.ndarray:
    """uint8 (64, 64, 4) straight-alpha RGBA; colour is 0 where alpha is 0, so that equal pictures are equal bytes."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=CELL, height=CELL, skip_system_fonts=True)
    image = np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    image[image[..., 3] == 0] = 0
    return image


def choose_classes(concepts: list[dict]) -> list[dict]:
    """The test classes: drawn by every vendor, named in one or two words, picturing a thing, no two sharing a word.

    The rule was fixed before any model was trained; from what it admits, 100 are drawn with a fixed seed.
    """
    admitted = [
        c
        for c in concepts
        if all(c[v] != "" for v in VENDORS) and len(c["label"].split()) <= 2 and c["group"] in CLASS_GROUPS
    ]
    admitted.sort(key=lambda c: len(c["label"].split()))  # stable: one word first, then Unicode's order
    seen: set[str] = set()
    distinct = []
    for concept in admitted:
        words = set(re.findall(r"[a-z]+", concept["label"].lower()))
        if not words & seen:
            distinct.append(concept)
            seen |= words
    fixed = [c for c in distinct if c["label"] in ALWAYS]
    rest = [c for c in distinct if c["label"] not in ALWAYS]
    chosen = fixed + random.Random(CLASS_SEED).sample(rest, NUM_CLASSES - len(fixed))
    print(
        f"{len(admitted)} concepts admitted, {len(distinct)} with distinct names, {len(chosen)} drawn", file=sys.stderr
    )
    return sorted(chosen, key=lambda c: int(c["order"]))


def write_csv(path: Path, rows: list[dict], fields: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(packages: Path, out: Path) -> None:
    base = json.loads((packages / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    concepts = [
        {
            "hexcode": e["hexcode"],
            "order": e["order"],
            "label": e["label"],
            "tags": "|".join(e.get("tags", [])),
            "group": GROUPS[e["group"]],
        }
        for e in sorted((e for e in base if "group" in e), key=lambda e: e["order"])
    ]
    (out / "sheets").mkdir(parents=True, exist_ok=True)
    samples: dict[str, dict[str, str]] = {}
    for vendor in VENDORS:
        icons = json.loads((packages / f"@iconify-json/{vendor}/icons.json").read_text(encoding="utf-8"))
        # A concept takes the icon of its own name first; an alias must not lend one picture to two concepts.
        own = {slug(n): n for n in icons["icons"]}
        alias = {slug(n): n for n in icons.get("aliases", {})}
        taken: set[str] = set()
        cells: list[np.ndarray] = []
        samples[vendor] = {}
        for names in (own, alias):
            for concept in concepts:
                name = names.get(slug(concept["label"]))
                if name is None or concept.get(vendor, "") != "":
                    concept.setdefault(vendor, "")
                    continue
                svg = svg_of(icons, name)
                if svg in taken:
                    continue
                taken.add(svg)
                concept[vendor] = len(cells)
                cells.append(render(svg))
                if concept["label"] in SAMPLE_LABELS:
                    samples[vendor][concept["label"]] = svg
        rows = -(-len(cells) // ROW)
        sheet = np.zeros((rows * CELL, ROW * CELL, 4), np.uint8)
        for i, cell in enumerate(cells):
            y, x = CELL * (i // ROW), CELL * (i % ROW)
            sheet[y : y + CELL, x : x + CELL] = cell
        path = out / "sheets" / f"{vendor}.webp"
        Image.fromarray(sheet).save(path, lossless=True, quality=100, method=6, exact=True)
        print(f"{vendor}: {len(cells)} images, {path.stat().st_size / 1e6:.2f} MB", file=sys.stderr)

    concepts = [c for c in concepts if any(c[v] != "" for v in VENDORS)]
    write_csv(out / "emoji.csv", concepts, ["hexcode", "label", "tags", "group", *VENDORS])
    write_csv(out / "classes.csv", choose_classes(concepts), ["label", "hexcode", "group"])
    (out / "samples.json").write_text(json.dumps(samples, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    files = sorted([*(out / "sheets").glob("*.webp"), out / "emoji.csv", out / "classes.csv", out / "samples.json"])
    sums = "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(out)}\n" for f in files)
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=HERE / "node_modules", help="folder of the installed packages")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write")
    args = parser.parse_args()
    main(args.packages, args.out)
