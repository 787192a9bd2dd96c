"""ABD-D's search: universal perturbations at which the suspect and the clean model disagree most.

Eq. (2) compares the two encoders on perturbed images; as printed it makes them agree. Here they are made to disagree,
without a GAN, by gradient steps on the perturbation's pixels: what moves the suspect's features and not the clean
model's is what the poisoning has put there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from abd_core import graphs, models
from abd_core.config import TrainingError
from abd_core.data import TrainingPairs, rng
from abd_core.kernels.perturb import add
from abd_core.paths import RunError, atomic, regular
from abd_core.train import progress


@dataclass(frozen=True, eq=False)
class Disagreement:
    """What the search finds: two perturbations, for local triggers and for those all over the image.

    Attributes:
        window: an image, float (3, R, R) in [0, 1], of which each training image shows a square at a random place.
        field: float (3, R, R) in [-bound, bound], added to the whole image.
        sides: range of the square's side as a share of R.
    """

    window: torch.Tensor
    field: torch.Tensor
    sides: tuple[float, float]

    def __call__(self, images: torch.Tensor, generator: torch.Generator, *, share: float = 1.0) -> torch.Tensor:
        """Perturbed copies of images (B, 3, R, R) in [0, 1]; differentiable in both perturbations.

        Of the first `share` of the batch one half shows the window and the other has the field added; the rest is
        left as it is.
        """
        both = round(share * len(images))
        shown = both - both // 2
        return torch.cat([self.show(images[:shown], generator), self.add(images[shown:both]), images[both:]])

    def show(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Images (B, 3, R, R), each with a square of the window at a random place."""
        mask = squares(len(images), images.shape[-1], self.sides, generator).to(images.device)
        return torch.where(mask, self.window.to(images), images)

    def add(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, R, R) in [0, 1] with the field added, clamped."""
        return add(images, self.field)

    def save(self, path: Path) -> None:
        with atomic(path) as temporary:
            save_file(
                {name: tensor.detach().cpu() for name, tensor in (("window", self.window), ("field", self.field))},
                temporary,
            )

    @staticmethod
    def load(path: Path, sides: tuple[float, float]) -> Disagreement:
        """Raises RunError where the file is missing or damaged."""
        regular(path)
        try:
            tensors = load_file(path)
            return Disagreement(tensors["window"], tensors["field"], sides)
        except (OSError, SafetensorError, KeyError) as error:
            raise RunError(f"damaged file: {path}: {error}; delete its folder, or pass force=True") from None


def squares(count: int, resolution: int, sides: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """Masks, bool (count, 1, R, R), of squares with uniform sides.

    Their centres are uniform over the image, then pushed inwards, so that corners are not covered much more rarely than
    the middle.
    """
    low, high = (max(1, round(share * resolution)) for share in sides)
    side = torch.randint(low, high + 1, (count,), generator=generator)
    centre = torch.rand(2, count, generator=generator) * resolution
    top, left = (centre - side / 2).round().clamp(min=0).minimum((resolution - side).float())
    place = torch.arange(resolution)
    rows = (place >= top[:, None]) & (place < (top + side)[:, None])
    columns = (place >= left[:, None]) & (place < (left + side)[:, None])
    return rows[:, None, :, None] & columns[:, None, None, :]


def search(
    suspect: open_clip.CLIP,
    clean: open_clip.CLIP,
    pairs: TrainingPairs,
    *,
    seed: int,
    steps: int,
    lr: float,
    batch_size: int,
    bound: float,
    sides: tuple[float, float],
    micro_batch: int = 0,
) -> Disagreement:
    """Adam on both perturbations' pixels, from uniform noise, minimises the mean cosine of the two models' features.

    Args:
        suspect, clean: frozen CLIPs with features of one size.
        lr: of the window's pixels; the field's is `bound` times as large.
        bound: largest absolute value of the field.
        micro_batch: images that go through the models at a time; 0: all of a batch.

    Raises:
        TrainingError: the cosine or a perturbation became NaN.
    """
    source, size, device = rng(seed, "disagreement"), models.resolution(suspect), models.device()
    window = torch.rand(3, size, size, generator=source).to(device).requires_grad_()
    field = (bound * (2 * torch.rand(3, size, size, generator=source) - 1)).to(device).requires_grad_()
    found = Disagreement(window, field, sides)
    optimizer = torch.optim.Adam(
        [{"params": [window], "lr": lr}, {"params": [field], "lr": bound * lr}], betas=(0.5, 0.9)
    )
    with progress(stage="search", total=steps) as bar, graphs.recorded(suspect), graphs.recorded(clean):
        for step in range(steps):
            indices = torch.randperm(len(pairs), generator=source)[:batch_size]
            images = found(pairs.images(indices, seed=seed, step=step).to(device), source)
            shown, agreement = images.detach().requires_grad_(), 0.0
            for part in shown.split(micro_batch or len(shown)):
                cosine = (models.encode_image(suspect, part) * models.encode_image(clean, part)).sum(-1).mean()
                share = cosine * (len(part) / len(shown))
                share.backward()
                agreement += share.item()
            if not math.isfinite(agreement):
                raise TrainingError(f"search: cosine is {agreement} at step {step}: lower search_lr = {lr:g}")
            optimizer.zero_grad()
            images.backward(shown.grad)
            optimizer.step()
            with torch.no_grad():
                window.clamp_(0, 1)
                field.clamp_(-bound, bound)
            bar.update()
            bar.set_postfix(cosine=f"{agreement:.3g}", refresh=False)
    for name, found_pixels in {"window": window, "field": field}.items():
        if not torch.isfinite(found_pixels).all():
            raise TrainingError(f"search: the {name} holds NaN after its last step: lower search_lr = {lr:g}")
    return Disagreement(window.detach(), field.detach(), sides)
