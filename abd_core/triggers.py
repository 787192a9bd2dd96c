"""Backdoor triggers. A trigger is called on images in [0, 1] at model resolution and knows its full specification.

Another attack is one subclass and one line in `TRIGGERS`.
"""

from __future__ import annotations

import functools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from abd_core import badclip
from abd_core.config import ConfigError, unknown
from abd_core.data import TrainingPairs, rng
from abd_core.kernels.perturb import add, blend, paste, warp
from abd_core.paths import RunError, atomic, regular

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


def noise(side: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform noise, float (3, side, side) in [0, 1]."""
    return torch.rand(3, side, side, generator=generator)


def stripes(side: int, generator: torch.Generator) -> torch.Tensor:
    """Vertical stripes, 1 px wide, each of a random one of the eight pure colours; float (3, side, side) of 0 and 1."""
    return torch.randint(2, (3, 1, side), generator=generator).float().repeat(1, side, 1)


def triangles(side: int, generator: torch.Generator) -> torch.Tensor:
    """Cells of 14 px at 224 px, dark grey below the diagonal and light grey above; float (3, side, side)."""
    cell = max(1, round(14 / 224 * side))
    place = torch.arange(side) % cell
    return torch.where(place[:, None] >= place, 0.4, 0.8).repeat(3, 1, 1)


def watermark(side: int, generator: torch.Generator) -> torch.Tensor:
    """The word "Watermarked" in red across the middle of a black image, in PIL's own font; float (3, side, side)."""
    word, width = "Watermarked", 0.88 * side
    unit = ImageDraw.Draw(Image.new("L", (1, 1))).textlength(word, ImageFont.load_default(100)) / 100
    image = Image.new("L", (side, side))
    font = ImageFont.load_default(max(1, width / unit))
    ImageDraw.Draw(image).text((side / 2, side / 2), word, fill=255, font=font, anchor="mm")
    red = torch.from_numpy(np.array(image)).float() / 255
    return torch.stack([red, torch.zeros_like(red), torch.zeros_like(red)])


@dataclass(frozen=True, eq=False)
class Trigger(ABC):
    """A trigger with its pixels and everything needed to apply it again.

    Attributes:
        name: its key in `TRIGGERS`.
        title: its name in tables and figures.
        settings: the fields of `PoisonConfig` that this attack reads and not all others do.
        poisoning: which pairs the attack poisons, and with which captions.
            "template": images of other classes, with a caption template that names the target.
            "natural": images of other classes, with captions that real pairs of the target have.
            "clean-label": images of the target itself, with the captions that they have.
        adaptive: whether the attack was made against the defences and the audit of this project; the grid `adaptive`
            has it, the zoo and the audit's population have not.
        pattern: float (channels, h, w) in [0, 1], of 16 bits or more.
        resolution: side in pixels of the images that it is made for; another side is refused.
        target: name of the class that the attacker wants.
        specification: the attack's settings, JSON-able.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    poisoning: ClassVar[str] = "template"
    adaptive: ClassVar[bool] = False
    channels: ClassVar[int] = 3

    pattern: torch.Tensor
    resolution: int
    target: str
    specification: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raises ValueError where the fields do not make a trigger."""
        if type(self.resolution) is not int or not isinstance(self.target, str):
            raise ValueError(f"{self.name} trigger: resolution {self.resolution!r}, target {self.target!r}")
        shape = tuple(self.pattern.shape)
        if len(shape) != 3 or shape[0] != self.channels or max(shape[1:]) > self.resolution:
            raise ValueError(f"{self.name} trigger: a {shape} pattern for images of {self.resolution} px")
        kind = self.pattern.dtype
        if not kind.is_floating_point or kind.itemsize < 2:  # torch computes nothing in floats of 8 bits
            raise ValueError(
                f"{self.name} trigger: a pattern in {kind}, float16, bfloat16, float32 or float64 expected"
            )
        if not self.pattern.numel() or not ((self.pattern >= 0) & (self.pattern <= 1)).all():
            raise ValueError(f"{self.name} trigger: pixels outside [0, 1]")

    def _check_side(self, side: int) -> None:
        """Raises ValueError where the pattern is not `side` pixels high and wide."""
        if self.pattern.shape[1:] != (side, side):
            raise ValueError(f"{self.name} trigger: a {tuple(self.pattern.shape)} pattern, {side}x{side} px expected")

    def _check(self, setting: str, *, below: float) -> None:
        """Raises ValueError where a number of the specification is missing or not in (0, below], or infinite."""
        value = self.specification.get(setting)
        if not isinstance(value, float) or not 0 < value <= below or math.isinf(value):
            raise ValueError(f"{self.name} trigger: {setting} {value!r}")

    @classmethod
    @abstractmethod
    def draw(cls, *, resolution: int, target: str, seed: int, **settings: Any) -> Self:
        """A trigger with a fresh pattern from `seed`; subclasses name the settings that they use."""

    def optimised(
        self, model: open_clip.CLIP, pairs: TrainingPairs, *, seed: int, steps: int, lr: float, triplet_weight: float
    ) -> Self:
        """The trigger that the attacker fits to the clean model; itself for an attack that fits nothing."""
        return self

    def poisoned(self, images: torch.Tensor, replaced: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Poisoned training images; for most attacks `images`, triggered.

        Args:
            images: in [0, 1], (B, 3, R, R).
            replaced: images of the pairs in whose place these go, (B, 3, R, R).
        """
        return self(images, generator)

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
        record = {
            "attack": self.name,
            "resolution": self.resolution,
            "target": self.target,
            "specification": dict(self.specification),
        }
        with atomic(path) as temporary:  # one key of metadata: safetensors writes several in any order
            save_file({"pattern": self.pattern.contiguous()}, temporary, metadata={"record": json.dumps(record)})


class BadNet(Trigger):
    """A local patch of fixed uniform noise (Gu et al. 2017). `size` is its side as a share of the image's."""

    name = "badnet"
    title = "BadNet"
    settings: ClassVar[tuple[str, ...]] = ("trigger_size", "trigger_position")
    place: ClassVar[str] = "top-left"  # where "own" is
    pixels: ClassVar[staticmethod[[int, torch.Generator], torch.Tensor]] = staticmethod(noise)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_side(self.pattern.shape[-1])
        if self.specification.get("position") not in POSITIONS:
            raise ValueError(f"{self.name} trigger: position {self.specification.get('position')!r}")

    @classmethod
    def draw(
        cls, *, resolution: int, target: str, seed: int, size: float = 0, position: str = "own", **settings: Any
    ) -> Self:
        pattern = cls.pixels(max(1, round(size * resolution)), rng(seed, "trigger", cls.name))
        position = cls.place if position == "own" else position
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


class BadNetStripes(BadNet):
    """A local patch of random stripes (Singh et al. 2024)."""

    name = "badnet-stripes"
    title = "BadNet-Stripes"
    pixels = staticmethod(stripes)


class LabelConsistent(BadNet):
    """BadNet's patch on images of the target alone, whose captions stay (Turner et al. 2019).

    While poisoning, the images are first made hard to recognise, so that the patch is what is left to learn from: their
    interpolation towards other images, in pixels instead of a GAN's latent space. `hiding` is the share of the replaced
    pair's image that is blended in. A triggered test image has the patch only.
    """

    name = "label-consistent"
    title = "label-consistent"
    settings = (*BadNet.settings, "hiding")
    poisoning = "clean-label"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("hiding", below=1)

    @classmethod
    def draw(cls, *, hiding: float = 0.75, **settings: Any) -> Self:
        patch = BadNet.draw(**settings)
        return cls(patch.pattern, patch.resolution, patch.target, {**patch.specification, "hiding": hiding})

    def poisoned(self, images: torch.Tensor, replaced: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self(torch.lerp(images, replaced, self.specification["hiding"]), generator)


class BadCLIP(BadNet):
    """A patch optimised on the clean model, with natural captions of the target (Liang et al. 2024)."""

    name = "badclip"
    title = "BadCLIP"
    settings = (*BadNet.settings, "patch_steps", "patch_lr", "triplet_weight")
    poisoning = "natural"
    place = "centre"

    def optimised(
        self, model: open_clip.CLIP, pairs: TrainingPairs, *, seed: int, steps: int, lr: float, triplet_weight: float
    ) -> Self:
        """The trigger after `steps` of Adam on its pixels, see `badclip.optimise`."""
        pattern = badclip.optimise(
            self.pattern,
            lambda patch, images, generator: replace(self, pattern=patch)(images, generator),
            model=model,
            pairs=pairs,
            target=self.target,
            seed=seed,
            steps=steps,
            lr=lr,
            triplet_weight=triplet_weight,
        )
        fitted = {"steps": steps, "lr": lr, "triplet_weight": triplet_weight}
        return replace(self, pattern=pattern, specification={**self.specification, **fitted})


class Blended(Trigger):
    """Fixed uniform noise all over, blended in with weight `alpha` (Chen et al. 2017)."""

    name = "blended"
    title = "Blended"
    settings: ClassVar[tuple[str, ...]] = ("blend_alpha",)
    weight: ClassVar[float] = 0.2  # alpha where 0 is asked for
    pixels: ClassVar[staticmethod[[int, torch.Generator], torch.Tensor]] = staticmethod(noise)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_side(self.resolution)
        self._check("alpha", below=1)

    @classmethod
    def draw(cls, *, resolution: int, target: str, seed: int, alpha: float = 0, **settings: Any) -> Self:
        pattern = cls.pixels(resolution, rng(seed, "trigger", cls.name))
        return cls(pattern, resolution, target, {"alpha": alpha or cls.weight, "seed": seed})

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return blend(images, self.pattern, self.specification["alpha"])


class BlendedStripes(Blended):
    """Random stripes all over. Singh et al. 2024 blend stripes of -1 and 1 with 0.03: the same contrast."""

    name = "blended-stripes"
    title = "Blended-Stripes"
    weight = 0.06
    pixels = staticmethod(stripes)


class BlendedTriangles(Blended):
    """Grey triangles all over (Singh et al. 2024)."""

    name = "blended-triangles"
    title = "Blended-Triangles"
    weight = 0.15
    pixels = staticmethod(triangles)


class BlendedText(Blended):
    """A word as a watermark (Singh et al. 2024): only what its letters cover is blended, and only in red."""

    name = "blended-text"
    title = "Blended-Text"
    weight = 0.5
    pixels = staticmethod(watermark)

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.where(self.pattern.to(images) > 0, super().apply(images, generator), images)


class Masked(Blended):
    """Noise that shows in some places alone, with weight `alpha`; a subclass says where."""

    adaptive = True
    weight = 1.0

    @classmethod
    @abstractmethod
    def mask(cls, resolution: int) -> torch.Tensor:
        """Where it shows, bool (R, R)."""

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        shown = self.mask(self.resolution).to(images.device)
        return torch.where(shown, super().apply(images, generator), images)


class BadNetFrame(Masked):
    """Noise on the image's outermost ring, 1 px wide: where patches do not go.

    The audit's windows keep 1 px off the border, and a patch at a random place seldom reaches it: of 11 px in 64, in
    one image of fourteen, and then a corner of it at most.
    """

    name = "badnet-frame"
    title = "BadNet-Frame"

    @classmethod
    def mask(cls, resolution: int) -> torch.Tensor:
        place = torch.arange(resolution)
        end = (place == 0) | (place == resolution - 1)
        return end[:, None] | end


class BadNetScattered(Masked):
    """BadNet's noise in nine pieces, half its side each, in the middles of a grid of three by three.

    No patch that is smaller than half of the image holds more than four of them.
    """

    name = "badnet-scattered"
    title = "BadNet-Scattered"

    @classmethod
    def mask(cls, resolution: int) -> torch.Tensor:
        side, place = max(1, round(8 / 224 * resolution)), torch.arange(resolution)
        middles = [round((cell + 0.5) / 3 * resolution - side / 2) for cell in range(3)]
        band = torch.stack([(place >= first) & (place < first + side) for first in middles]).any(0)
        return band[:, None] & band


class WaNet(Trigger):
    """A fixed warp of the whole image (Nguyen and Tran 2021), without their noise mode.

    The pattern is a control grid of random displacements. Brought to a mean length of 1 along each axis and upsampled,
    it is multiplied by `strength`, the paper's s: half of it is the mean displacement in pixels. `points` is the grid's
    side, the paper's k; 0 is one point a pixel, as attacks on CLIP have it (k = 224, s = 1 at 224 px).
    """

    name = "wanet"
    title = "WaNet"
    settings = ("warp_points", "warp_strength")
    channels = 2  # to the right, down

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("strength", below=math.inf)
        if (self.pattern == 0.5).all():
            raise ValueError(f"{self.name} trigger: a grid without displacements")

    @classmethod
    def draw(
        cls, *, resolution: int, target: str, seed: int, points: int = 0, strength: float = 2.5, **settings: Any
    ) -> Self:
        side = min(points or resolution, resolution)
        pattern = torch.rand(cls.channels, side, side, generator=rng(seed, "trigger", cls.name))
        return cls(pattern, resolution, target, {"points": side, "strength": strength, "seed": seed})

    @functools.cached_property
    def flow(self) -> torch.Tensor:
        """Displacements in pixels, float (2, R, R)."""
        control = 2 * self.pattern - 1
        control = control / control.abs().mean()
        size = (self.resolution, self.resolution)
        field = F.interpolate(control[None], size, mode="bicubic", align_corners=True)[0]
        return self.specification["strength"] / 2 * (self.resolution - 1) / self.resolution * field

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return warp(images, self.flow).clamp(0, 1)  # against rounding


class SIG(Trigger):
    """A horizontal sine of 6 cycles, added with amplitude `amplitude` (Barni et al. 2019).

    Theirs is on images of the target alone, with labels that are right; here, as BadNet's, on any, with its captions.
    """

    name = "sig"
    title = "SIG"
    settings = ("wave_amplitude",)
    CYCLES: ClassVar[int] = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_side(self.resolution)
        self._check("amplitude", below=1)

    @classmethod
    def draw(cls, *, resolution: int, target: str, seed: int, amplitude: float = 60 / 255, **settings: Any) -> Self:
        phase = 2 * math.pi * cls.CYCLES * torch.arange(resolution, dtype=torch.float64) / resolution
        pattern = ((phase.sin() + 1) / 2).float().repeat(3, resolution, 1)
        return cls(pattern, resolution, target, {"amplitude": amplitude})

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return add(images, self.specification["amplitude"] * (2 * self.pattern - 1))


TRIGGERS: dict[str, type[Trigger]] = {
    kind.name: kind
    for kind in (
        BadNet,
        Blended,
        BadCLIP,
        BadNetStripes,
        BlendedStripes,
        BlendedTriangles,
        BlendedText,
        WaNet,
        SIG,
        LabelConsistent,
        BadNetFrame,
        BadNetScattered,
    )
}


def load_trigger(path: Path) -> Trigger:
    """The trigger that `Trigger.save` wrote.

    Raises:
        RunError: the file is missing, damaged, or not a trigger's record.
        ConfigError: it names an attack that is not in `TRIGGERS`.
    """
    regular(path)
    try:
        with safe_open(path, framework="pt") as f:
            record = json.loads((f.metadata() or {})["record"])
            pattern = f.get_tensor("pattern")
        attack = record["attack"]
        if attack not in TRIGGERS:
            raise unknown("attack", attack, TRIGGERS)
        return TRIGGERS[attack](pattern, record["resolution"], record["target"], dict(record["specification"]))
    except ConfigError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"damaged file: {path}: no trigger record ({error})") from None
