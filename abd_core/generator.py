"""AdvCLIP's generator and discriminator for any resolution, and the universal perturbation that they produce."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from abd_core.data import rng
from abd_core.kernels.perturb import add, paste
from abd_core.paths import RunError, atomic, regular

LATENTS, LATENT = 16, 100  # AdvCLIP's fixed z: 16 vectors of 100


class Generator(nn.Module):
    """One universal image in [-1, 1] from fixed noise (Zhou et al. 2023, AdvCLIP).

    Transposed convolutions (kernel 4, stride 2: no gaps, unlike the original's kernel 4, stride 8) lead 16 fixed latent
    vectors from 4 px to at least `side` px, halving the channels from `width` down; a convolution merges the 16 images
    into one.

    Args:
        side: side of the output in pixels, >= 1.
        width: channels at 4 px; AdvCLIP's 1024.

    Shape: forward() -> (3, side, side).
    """

    def __init__(self, side: int, *, width: int = 1024, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.register_buffer("z", torch.randn(LATENTS, LATENT, 1, 1))
            doublings = max(1, math.ceil(math.log2(max(side, 8) / 4)))
            channels = [max(width >> i, 16) for i in range(doublings + 1)]
            layers: list[nn.Module] = [
                nn.ConvTranspose2d(LATENT, channels[0], 4, bias=False),
                nn.BatchNorm2d(channels[0]),
                nn.ReLU(),
            ]
            for before, after in pairwise(channels):
                layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            self.grow = nn.Sequential(*layers, nn.Conv2d(channels[-1], 3, 3, padding=1))
            self.merge = nn.Conv2d(3 * LATENTS, 3, 3, padding=1)
        self.side = side

    def forward(self) -> torch.Tensor:
        images = self.grow(self.z)
        merged = self.merge(images.flatten(0, 1)[None])
        if merged.shape[-1] != self.side:
            merged = nn.functional.interpolate(
                merged, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True
            )
        return merged[0].tanh()


class Discriminator(nn.Module):
    """A logit an image: clean (high) or perturbed (low). Four strided convolutions, as in AdvCLIP and DCGAN.

    Shape: (B, 3, H, W) in [0, 1], H and W >= 16 -> (B,).
    """

    def __init__(self, *, width: int = 1024, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            channels = [3, *(max(width >> i, 16) for i in (3, 2, 1, 0))]
            layers: list[nn.Module] = []
            for before, after in pairwise(channels):
                layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2)]
            self.score = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.score(images).mean((1, 2, 3))


def patch_side(area: float, resolution: int) -> int:
    """Side in pixels of a square patch of at most `area` (share) of the image: 38 at 0.03 of 224 px, as in AdvCLIP."""
    return max(1, math.isqrt(int(area * resolution * resolution)))


@dataclass(frozen=True, eq=False)
class Perturbation:
    """A universal perturbation.

    Attributes:
        mode: "additive" (`delta` is added, then clamped) or "patch" (`delta` is pasted over).
        delta: float (3, R, R) in [-strength, strength], or (3, s, s) in [0, 1].
        resolution: R, side in pixels of the images that it is made for.
        placement: of a patch: "fixed" (`corner`) or "random" (drawn for each image).
        corner: (top, left) in pixels of a fixed patch.
    """

    mode: str
    delta: torch.Tensor
    resolution: int
    placement: str = "fixed"
    corner: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Raises ValueError where the fields do not make a perturbation."""
        side = self.delta.shape[-1]
        if self.mode not in ("additive", "patch") or self.placement not in ("fixed", "random"):
            raise ValueError(f"perturbation: mode {self.mode!r}, placement {self.placement!r}")
        if type(self.resolution) is not int or not 0 < side <= self.resolution:
            raise ValueError(f"perturbation: {side} px wide for images of {self.resolution!r} px")
        if self.delta.shape[-3:] != (3, side, side) or (self.mode == "additive" and side != self.resolution):
            raise ValueError(f"perturbation: {self.mode} of {tuple(self.delta.shape)} for {self.resolution} px")
        room = range(self.resolution - side + 1)
        if self.mode == "patch" and not (len(self.corner) == 2 and all(place in room for place in self.corner)):
            raise ValueError(f"perturbation: {side} px wide at {self.corner} of {self.resolution} px")
        kind = self.delta.dtype
        if not kind.is_floating_point or kind.itemsize < 2:  # torch computes nothing in floats of 8 bits
            raise ValueError(f"perturbation: pixels in {kind}, float16, bfloat16, float32 or float64 expected")
        if not torch.isfinite(self.delta).all():
            raise ValueError("perturbation: NaN or infinity among its pixels")

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Perturbed copies of images (B, 3, R, R) in [0, 1]; differentiable in `delta`.

        Args:
            generator: for random places (default: seed 0).

        Raises:
            ValueError: the images have another resolution.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(
                f"perturbation is for 3x{self.resolution}x{self.resolution} images, got {tuple(images.shape)}"
            )
        if self.mode == "additive":
            return add(images, self.delta)
        if self.placement == "random":
            room = self.resolution - self.delta.shape[-1] + 1
            source = rng(0, "perturbation") if generator is None else generator
            top, left = torch.randint(room, (2, len(images)), generator=source)
        else:
            top, left = (torch.full((len(images),), place) for place in self.corner)
        return paste(images, self.delta, top, left)

    def save(self, path: Path) -> None:
        """Pixels and specification in one safetensors file."""
        record = {
            "mode": self.mode,
            "resolution": self.resolution,
            "placement": self.placement,
            "corner": list(self.corner),
        }
        with atomic(path) as temporary:
            save_file(
                {"delta": self.delta.detach().cpu().contiguous()}, temporary, metadata={"record": json.dumps(record)}
            )

    @staticmethod
    def load(path: Path) -> Perturbation:
        """Raises RunError where the file is missing, damaged or no record of one perturbation."""
        regular(path)
        try:
            with safe_open(path, framework="pt") as f:
                record = json.loads((f.metadata() or {})["record"])
                delta = f.get_tensor("delta")
            if delta.ndim != 3:  # `stages.safetensors` holds many
                raise ValueError(f"{tuple(delta.shape)} pixels, (3, height, width) expected")
            return Perturbation(
                record["mode"], delta, record["resolution"], record["placement"], tuple(record["corner"])
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise RunError(f"damaged file: {path}: no perturbation record ({error})") from None
