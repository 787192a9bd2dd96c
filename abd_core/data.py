"""Image-caption pairs to train on and zero-shot sets to test on; here the embedded emoji benchmark.

Images are float tensors (B, 3, H, W) in [0, 1] everywhere; `models.encode_image` applies CLIP's mean and std. All
randomness is a function of (seed, epoch, step), so a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from abd_core.config import ConfigError, derive_seed, digest, unknown
from abd_core.paths import RunError, data_dir, sha256
from abd_core.text import TEMPLATES

CELL, ROW = 64, 32  # pixels a side of an artwork; artworks a row of a sheet (data/build.py)
TRAIN_VENDORS = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "emojione")
# One held-out artist's house a split: nothing is trained on either, and defaults are chosen on `dev` alone.
TEST_VENDORS = {"dev": "fxemoji", "eval": "twemoji"}


@dataclass(frozen=True, kw_only=True)
class Views:
    """How an artwork becomes an image: a random background, placement and colour.

    Degrees, shares of the side, and probabilities; `scale` is the range of the artwork's side in sides of the image.
    """

    rotate: float
    scale: tuple[float, float]
    shift: float
    flip: float
    colour: float
    grey: float

    def __call__(self, artwork: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """uint8 (B, 4, H, W) straight-alpha RGBA -> float (B, 3, H, W) in [0, 1]."""
        batch, _, height, width = artwork.shape

        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return torch.empty(batch, *shape).uniform_(low, high, generator=rng)

        # In place wherever it can be: on a CPU, new memory takes longer than the arithmetic.
        # A plain colour plus a low-frequency texture of random strength.
        texture = F.interpolate(uniform(-1, 1, 3, 4, 4), (height, width), mode="bilinear", align_corners=True)
        background = uniform(0, 1, 3, 1, 1)
        background = texture.mul_(uniform(0, 0.4, 1, 1, 1)).add_(background).clamp_(0, 1)

        angle, side = uniform(-self.rotate, self.rotate).deg2rad(), uniform(*self.scale)
        mirror = torch.where(uniform(0, 1) < self.flip, -1.0, 1.0)
        cos, sin = torch.cos(angle) / side, torch.sin(angle) / side
        shift = uniform(-2 * self.shift, 2 * self.shift, 2)
        affine = torch.stack(
            [torch.stack([mirror * cos, -mirror * sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
        )
        premultiplied = artwork.float().div_(255)
        premultiplied[:, :3].mul_(premultiplied[:, 3:])
        grid = F.affine_grid(affine, [batch, 4, height, width], align_corners=False)
        placed = F.grid_sample(premultiplied, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        images = background.mul_(1 - placed[:, 3:]).add_(placed[:, :3])

        contrast = 1 + uniform(-self.colour, self.colour, 3, 1, 1)
        brightness = uniform(-self.colour, self.colour, 1, 1, 1)
        images.sub_(0.5).mul_(contrast).add_(0.5).add_(0.5 * brightness)
        grey = uniform(0, 1) < self.grey
        images[grey] = images[grey].mean(1, keepdim=True)
        return images.clamp_(0, 1)


TRAIN_VIEWS = Views(rotate=15, scale=(0.75, 1.05), shift=0.06, flip=0.5, colour=0.25, grey=0.05)
TEST_VIEWS = Views(rotate=10, scale=(0.8, 1.0), shift=0.05, flip=0.0, colour=0.0, grey=0.0)


def rng(*parts: object) -> torch.Generator:
    """A CPU generator for the stream that `parts` name."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@functools.cache
def checksums() -> dict[str, str]:
    """File name -> SHA-256 of what is committed in `data/`."""
    lines = (data_dir() / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: checksum for checksum, name in (line.split(maxsplit=1) for line in lines)}


def _checked(name: str) -> None:
    if sha256(data_dir() / name) != checksums()[name]:
        raise RunError(f"damaged file: data/{name}: its checksum is not the one in data/SHA256SUMS; check it out again")


@functools.cache
def artwork(vendor: str) -> torch.Tensor:
    """All artworks of a vendor, uint8 (N, 4, 64, 64), in the order of the cells that `emoji.csv` names."""
    name = f"sheets/{vendor}.webp"
    _checked(name)
    try:
        with Image.open(data_dir() / name) as image:
            sheet = torch.from_numpy(np.array(image.convert("RGBA")))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise RunError(f"damaged file: data/{name}: not an image ({error})") from None
    cells = sheet.unfold(0, CELL, CELL).unfold(1, CELL, CELL)  # (rows, ROW, 4, 64, 64)
    return cells.reshape(-1, 4, CELL, CELL).contiguous()


@functools.cache
def _table(name: str) -> list[dict[str, str]]:
    _checked(name)
    with (data_dir() / name).open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def class_names() -> list[str]:
    """The zero-shot classes of the embedded benchmark, in label order."""
    return [row["label"] for row in _table("classes.csv")]


def class_index(names: Sequence[str], target: str) -> int:
    """Where `target` stands among the class names. Raises ConfigError where it is none of them, or two."""
    if target not in names:
        raise unknown("class", target, names)
    if list(names).count(target) > 1:  # ImageNet has two missiles and two pairs of sunglasses
        raise ConfigError(
            f"class {target!r}: {list(names).count(target)} classes have that name; choose another target"
        )
    return list(names).index(target)


class TrainingPairs(Protocol):
    """Image-caption pairs as the stages use them: the embedded `Pairs`, or `formats.ImagePairs` of one's own."""

    def __len__(self) -> int: ...

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""

    @property
    def digest(self) -> str:
        """Identity of the pairs, for a run's key."""

    @property
    def ids(self) -> Sequence[Any]:
        """Stable sample ids, for seeds and records."""

    def shows(self, target: str) -> torch.Tensor:
        """Which pairs show the target by their captions, bool (N,)."""

    def subset(self, share: float, *, seed: int) -> Self:
        """A seeded share of the pairs, in their order."""

    def take(self, indices: Sequence[int]) -> Self:
        """The pairs at these indices."""

    def plan(self, batches: Iterable[torch.Tensor]) -> None:
        """What `images` will be asked for: batches of indices in their order. It may be read ahead."""

    def images(self, indices: torch.Tensor, *, seed: int, step: int) -> torch.Tensor:
        """The images of the pairs `indices` (B,): float (B, 3, R, R) in [0, 1], on any device."""

    def captions(self, indices: torch.Tensor, *, seed: int, epoch: int) -> list[str]:
        """One caption a pair."""


@dataclass(frozen=True)
class Pairs:
    """Image-caption pairs of the embedded benchmark.

    Attributes:
        cells: (vendor, cell) of every pair's artwork.
        labels: every pair's name in words.
        tags: every pair's further keywords.
        ids: stable sample ids, for seeds and records.
    """

    cells: tuple[tuple[str, int], ...]
    labels: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]
    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def resolution(self) -> int:
        """Side of the images in pixels."""
        return CELL

    @functools.cached_property
    def digest(self) -> str:
        """Identity of these pairs: which artworks (by checksum) under which names."""
        sheets = {vendor: checksums()[f"sheets/{vendor}.webp"] for vendor, _ in self.cells}
        return digest([sheets, self.cells, self.labels, self.tags])

    @functools.cached_property
    def _artwork(self) -> torch.Tensor:
        return torch.stack([artwork(vendor)[cell] for vendor, cell in self.cells])

    def subset(self, share: float, *, seed: int) -> Pairs:
        """A seeded random share of the pairs, in their order. Raises ConfigError where nothing would be left."""
        count = round(share * len(self))
        if count < 1:
            raise ConfigError(f"share = {share:g} of {len(self)} pairs leaves none")
        return self.take(sorted(torch.randperm(len(self), generator=rng(seed, "subset"))[:count].tolist()))

    def take(self, indices: Sequence[int]) -> Pairs:
        def pick(values: tuple) -> tuple:
            return tuple(values[i] for i in indices)

        return Pairs(pick(self.cells), pick(self.labels), pick(self.tags), pick(self.ids))

    def shows(self, target: str) -> torch.Tensor:
        """Which pairs have the target's name, bool (N,)."""
        return torch.tensor([label == target for label in self.labels], dtype=torch.bool)

    def plan(self, batches: Iterable[torch.Tensor]) -> None:
        """Nothing is read ahead: the artwork is in memory."""

    def images(self, indices: torch.Tensor, *, seed: int, step: int, views: Views = TRAIN_VIEWS) -> torch.Tensor:
        """Fresh views of the pairs `indices` (B,): float (B, 3, 64, 64) in [0, 1]."""
        return views(self._artwork[indices], rng(seed, "views", step))

    def captions(self, indices: torch.Tensor, *, seed: int, epoch: int) -> list[str]:
        """One of each pair's captions, drawn afresh every epoch: a template with the name, at times with keywords."""
        texts = []
        for i in indices.tolist():
            draw = np.random.default_rng(derive_seed(seed, "caption", epoch, self.ids[i]))
            text = TEMPLATES[draw.integers(len(TEMPLATES))].format(self.labels[i])
            if self.tags[i] and draw.random() < 0.5:
                chosen = draw.permutation(len(self.tags[i]))[:2]
                text = ", ".join([text.rstrip("."), *(self.tags[i][t] for t in chosen)])
            texts.append(text)
        return texts


@functools.cache
def load_pairs(limit: int = 0) -> Pairs:
    """The training pairs: every concept in the hand of every training vendor that draws it.

    Args:
        limit: keep only this many, seeded (0: all); for smoke runs.
    """
    rows = [(vendor, row) for vendor in TRAIN_VENDORS for row in _table("emoji.csv") if row[vendor]]
    pairs = Pairs(
        cells=tuple((vendor, int(row[vendor])) for vendor, row in rows),
        labels=tuple(row["label"] for _, row in rows),
        tags=tuple(tuple(row["tags"].split("|")) if row["tags"] else () for _, row in rows),
        ids=tuple(range(len(rows))),
    )
    if limit > len(pairs):
        raise ConfigError(f"limit = {limit}: the embedded benchmark has {len(pairs)} pairs")
    return pairs.subset(limit / len(pairs), seed=0) if limit else pairs


@dataclass(frozen=True)
class TestSet:
    """A zero-shot test set.

    Attributes:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,), indices into `class_names`.
        class_names: K names.
        templates: prompt templates with one `{}`.
        split: "dev" or "eval".
        identity: digest of all of it where that is known already; "": it is taken from the fields.
    """

    __test__ = False  # not a pytest class

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    split: str
    identity: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def digest(self) -> str:
        return self.identity or digest(
            [derive_seed(self.images.numpy().tobytes()), self.labels.tolist(), self.class_names, self.templates]
        )


@functools.cache
def load_test_set(split: str, views: int = 10) -> TestSet:
    """The embedded test set: `views` seeded views of every test class's one artwork by the split's held-out vendor.

    Raises:
        ConfigError: `split` is neither "dev" nor "eval".
    """
    if split not in TEST_VENDORS:
        raise unknown("split", split, TEST_VENDORS)
    vendor = TEST_VENDORS[split]
    cell = {row["hexcode"]: int(row[vendor]) for row in _table("emoji.csv") if row[vendor]}
    pictures = artwork(vendor)[[cell[row["hexcode"]] for row in _table("classes.csv")]]
    images = torch.stack([TEST_VIEWS(pictures, rng("test view", split, view)) for view in range(views)], 1)
    labels = torch.arange(len(pictures)).repeat_interleave(views)
    # Not of the pixels: those are rounded differently by another processor, and a run's key is the same on all.
    files = [checksums()[name] for name in (f"sheets/{vendor}.webp", "emoji.csv", "classes.csv")]
    return TestSet(
        images=images.flatten(0, 1).mul(255).round().to(torch.uint8),
        labels=labels,
        class_names=tuple(class_names()),
        templates=TEMPLATES,
        split=split,
        identity=digest([files, dataclasses.asdict(TEST_VIEWS), split, views, TEMPLATES]),
    )
