"""The defences' image augmentations: float (B, 3, H, W) in [0, 1] in and out, functions of their inputs and a seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import torch
from torchvision import transforms
from torchvision.transforms import functional
from torchvision.transforms.v2.functional import equalize


def _each(transform: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, seed: int) -> torch.Tensor:
    """`transform` image by image on the CPU; torchvision draws from torch's global generator, put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([transform(image) for image in images.cpu()]).to(images.device)


POLICY = transforms.AutoAugment()  # the ImageNet policy, and torchvision's draws from it
OPERATIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "": lambda pixels, _: pixels,
    "AutoContrast": lambda pixels, _: functional.autocontrast(pixels),
    "Color": lambda pixels, level: functional.adjust_saturation(pixels, 1 + level),
    "Contrast": lambda pixels, level: functional.adjust_contrast(pixels, 1 + level),
    "Equalize": lambda pixels, _: equalize(pixels),
    "Invert": lambda pixels, _: functional.invert(pixels),
    "Posterize": lambda pixels, bits: functional.posterize(pixels, int(bits)),
    "Rotate": lambda pixels, angle: functional.rotate(pixels, angle),
    "Sharpness": lambda pixels, level: functional.adjust_sharpness(pixels, 1 + level),
    "ShearX": lambda pixels, slope: functional.affine(
        pixels, 0.0, [0, 0], 1.0, [math.degrees(math.atan(slope)), 0.0], center=[0, 0]
    ),
    "Solarize": lambda pixels, threshold: functional.solarize(pixels, threshold),
}
BINS = torch.arange(10)
LEVELS = {  # of an operation's ten bins, and whether a coin turns the sign
    **{name: (torch.linspace(0, 0.9, 10), True) for name in ("Color", "Contrast", "Sharpness")},
    "Posterize": (8 - (BINS / 2.25).round(), False),
    "Rotate": (torch.linspace(0, 30, 10), True),
    "ShearX": (torch.linspace(0, 0.3, 10), True),
    "Solarize": (torch.linspace(255, 0, 10), False),
}


def auto_augment(images: torch.Tensor, *, seed: int) -> torch.Tensor:
    """AutoAugment's ImageNet policy (Cubuk et al. 2019), drawn for each image; CleanCLIP's image augmentation.

    What `torchvision.transforms.AutoAugment` makes of one image after the other, with images that draw the same
    operation taken together, where they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = [_drawn() for _ in images]
    pixels = (images * 255).round().to(torch.uint8)  # its operations are defined on whole grey levels
    for operations in zip(*drawn, strict=True):  # first the first of each image, then the second
        order = torch.tensor(sorted(range(len(images)), key=operations.__getitem__))
        counts = sorted(Counter(operations).items())
        parts = pixels.index_select(0, order.to(pixels.device)).split([count for _, count in counts])
        done = [OPERATIONS[name](part, level) for ((name, level), _), part in zip(counts, parts, strict=True)]
        pixels = torch.cat(done).index_select(0, order.argsort().to(pixels.device))
    return pixels.to(images.dtype) / 255


def _drawn() -> list[tuple[str, float]]:
    """The two operations of one image, with their levels; "" where chance leaves one out."""
    policy, chances, coins = POLICY.get_params(len(POLICY.policies))
    drawn = []
    for (name, probability, place), chance, coin in zip(POLICY.policies[policy], chances, coins, strict=True):
        level = 0.0
        if place is not None:
            levels, signed = LEVELS[name]
            level = levels[place].item() * (-1 if signed and coin == 0 else 1)
        drawn.append((name, level) if chance <= probability else ("", 0.0))
    return drawn


def crop_colour_blur(images: torch.Tensor, *, seed: int) -> torch.Tensor:
    """RoCLIP's image augmentation: flip, random resized crop, colour jitter, grey, blur; drawn for each image.

    Lengths scale with the side; at 224 px the blur's kernel is 21 px and its sigma at most 2 px, as in RoCLIP's code.
    """
    side = images.shape[-1]
    transform = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            transforms.RandomResizedCrop(side, antialias=True),
            transforms.RandomApply([transforms.ColorJitter(0.5, 0.5, 0.5, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.GaussianBlur(2 * round(10 * side / 224) + 1, sigma=(0.1 * side / 224, 2 * side / 224)),
        ]
    )
    return _each(transform, images, seed).clamp(0, 1)


def random_erasing(
    images: torch.Tensor,
    generator: torch.Generator,
    *,
    probability: float,
    area: tuple[float, float],
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    colour: torch.Tensor | None = None,
) -> torch.Tensor:
    """Random Erasing (Zhong et al. 2020): a rectangle at a random place in each image is painted over.

    Args:
        probability: share of the images that lose a rectangle.
        area: range of the rectangle's share of the image, uniform; its sides are cut to the image's.
        aspect: range of height / width, log-uniform.
        colour: (3,), or None for fresh uniform noise in every pixel.
    """
    batch, channels, height, width = images.shape

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(batch).uniform_(low, high, generator=generator)

    pixels, ratio = uniform(*area) * height * width, uniform(*map(math.log, aspect)).exp()
    tall = (pixels * ratio).sqrt().round().clamp(1, height)
    wide = (pixels / ratio).sqrt().round().clamp(1, width)
    # A product may be rounded up to the next whole number.
    top = torch.minimum((uniform(0, 1) * (height - tall + 1)).floor(), height - tall)
    left = torch.minimum((uniform(0, 1) * (width - wide + 1)).floor(), width - wide)
    row, column = torch.arange(height), torch.arange(width)
    rows = (row >= top[:, None]) & (row < (top + tall)[:, None])  # (B, H)
    columns = (column >= left[:, None]) & (column < (left + wide)[:, None])  # (B, W)
    erased = rows[:, None, :, None] & columns[:, None, None, :] & (uniform(0, 1) < probability)[:, None, None, None]
    if colour is None:
        fill = torch.rand(batch, channels, height, width, generator=generator)
    else:
        fill = colour.view(1, -1, 1, 1)
    return torch.where(erased.to(images.device), fill.to(images), images)
