"""Backdoor triggers. A trigger is called on images in [0, 1] at model resolution and knows its full specification.

Another attack is one subclass and one line in `TRIGGERS`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from abd_core.config import ConfigError, unknown
from abd_core.data import rng
from abd_core.kernels.perturb import blend, paste
from abd_core.paths import RunError, atomic

POSITIONS = ("top-left", "top-right", "bottom-left", "bottom-right", "centre", "random")


def corner(
    position: str, *, image: int, patch: int, count: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper left corners, int64 (count,) each, of square patches at a named position; one pixel off the border.

    Raises:
        ValueError: "random" without a generator.
    """
    end = max(image - patch - 1, 0)
    named = {
        "top-left": (min(1, end), min(1, end)),
        "top-right": (min(1, end), end),
        "bottom-left": (end, min(1, end)),
        "bottom-right": (end, end),
        "centre": ((image - patch) // 2, (image - patch) // 2),
    }
    if position == "random":
        if generator is None:
            raise ValueError("corner: position 'random' needs a generator")
        places = torch.randint(0, image - patch + 1, (2, count), generator=generator)
        return places[0], places[1]
    top, left = named[position]
    return torch.full((count,), top), torch.full((count,), left)


@dataclass(frozen=True, eq=False)
class Trigger(ABC):
    """A trigger with its pixels and everything needed to apply it again.

    Attributes:
        pattern: float (3, h, w) in [0, 1].
        resolution: side in pixels of the images that it is made for; another side is refused.
        target: name of the class that the attacker wants.
        specification: the attack's settings, JSON-able.
    """

    name: ClassVar[str]

    pattern: torch.Tensor
    resolution: int
    target: str
    specification: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raises ValueError where the fields do not make a trigger."""
        if not isinstance(self.resolution, int) or not isinstance(self.target, str):
            raise ValueError(f"{self.name} trigger: resolution {self.resolution!r}, target {self.target!r}")
        if self.pattern.ndim != 3 or len(self.pattern) != 3 or max(self.pattern.shape[1:]) > self.resolution:
            raise ValueError(
                f"{self.name} trigger: a {tuple(self.pattern.shape)} pattern for images of {self.resolution} px"
            )
        if not self.pattern.numel() or not ((self.pattern >= 0) & (self.pattern <= 1)).all():
            raise ValueError(f"{self.name} trigger: pixels outside [0, 1]")

    @classmethod
    @abstractmethod
    def draw(cls, *, resolution: int, target: str, seed: int, size: float, position: str, alpha: float) -> Self:
        """A trigger with a fresh pattern from `seed`; subclasses say which of the settings they use."""

    @abstractmethod
    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Triggered copies of images (B, 3, H, W)."""

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Triggered copies of images (B, 3, R, R) in [0, 1]; `generator` draws places per image (default: seed 0).

        Raises:
            ValueError: the images have another resolution than the trigger.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(
                f"{self.name} trigger is for 3x{self.resolution}x{self.resolution} images, got {tuple(images.shape)}"
            )
        return self.apply(images, rng(0, "trigger") if generator is None else generator)

    def save(self, path: Path) -> None:
        """Pixels (losslessly) and specification in one safetensors file."""
        record = {"resolution": self.resolution, "target": self.target, "specification": dict(self.specification)}
        with atomic(path) as temporary:
            save_file(
                {"pattern": self.pattern.contiguous()},
                temporary,
                metadata={"attack": self.name, "record": json.dumps(record)},
            )


class BadNet(Trigger):
    """A local patch of fixed uniform noise (Gu et al. 2017). `size` is its side as a share of the image's."""

    name = "badnet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.specification.get("position") not in POSITIONS:
            raise ValueError(f"{self.name} trigger: position {self.specification.get('position')!r}")

    @classmethod
    def draw(cls, *, resolution: int, target: str, seed: int, size: float, position: str, alpha: float) -> Self:
        side = max(1, round(size * resolution))
        pattern = torch.rand(3, side, side, generator=rng(seed, "trigger", cls.name))
        return cls(pattern, resolution, target, {"size": size, "position": position, "seed": seed})

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        top, left = corner(
            self.specification["position"],
            image=self.resolution,
            patch=self.pattern.shape[-1],
            count=len(images),
            generator=generator,
        )
        return paste(images, self.pattern, top, left)


class Blended(Trigger):
    """Fixed uniform noise all over, blended in with weight `alpha` (Chen et al. 2017)."""

    name = "blended"

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha = self.specification.get("alpha")
        if not isinstance(alpha, float) or not 0 < alpha <= 1:
            raise ValueError(f"{self.name} trigger: alpha {alpha!r}")

    @classmethod
    def draw(cls, *, resolution: int, target: str, seed: int, size: float, position: str, alpha: float) -> Self:
        pattern = torch.rand(3, resolution, resolution, generator=rng(seed, "trigger", cls.name))
        return cls(pattern, resolution, target, {"alpha": alpha, "seed": seed})

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return blend(images, self.pattern, self.specification["alpha"])


TRIGGERS: dict[str, type[Trigger]] = {kind.name: kind for kind in (BadNet, Blended)}


def load_trigger(path: Path) -> Trigger:
    """The trigger that `Trigger.save` wrote.

    Raises:
        RunError: the file is missing, damaged, or not a trigger's record.
        ConfigError: it names an attack that is not in `TRIGGERS`.
    """
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            pattern = f.get_tensor("pattern")
        record = json.loads(metadata["record"])
        attack = metadata["attack"]
        if attack not in TRIGGERS:
            raise unknown("attack", attack, TRIGGERS)
        return TRIGGERS[attack](pattern, record["resolution"], record["target"], dict(record["specification"]))
    except OSError:
        raise RunError(f"missing file: {path}") from None
    except ConfigError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"damaged file: {path}: no trigger record ({error})") from None
