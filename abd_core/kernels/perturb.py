"""Putting patterns on batches of images: a patch at a place of each image's own, addition, blending; warping them."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def paste(images: torch.Tensor, patch: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Images with `patch` pasted over; a new tensor, differentiable in both.

    Args:
        images: (B, C, H, W).
        patch: (C, h, w).
        top, left: int64 (B,), the patch's upper left corner in each image, in pixels.

    Raises:
        ValueError: a patch would leave its image.
    """
    batch, _, height, width = images.shape
    _, h, w = patch.shape
    if (top < 0).any() or (left < 0).any() or (top > height - h).any() or (left > width - w).any():
        raise ValueError(f"paste: a {h}x{w} patch leaves its {height}x{width} image")
    row = (top[:, None] + torch.arange(h)).to(images.device)[:, :, None]  # (B, h, 1)
    column = (left[:, None] + torch.arange(w)).to(images.device)[:, None, :]  # (B, 1, w)
    sample = torch.arange(batch, device=images.device)[:, None, None]
    pixels = patch.to(images).permute(1, 2, 0).expand(batch, h, w, -1)
    return images.permute(0, 2, 3, 1).index_put((sample, row, column), pixels).permute(0, 3, 1, 2)


def add(images: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """images (B, C, H, W) + delta (C, H, W), clamped to [0, 1]."""
    return (images + delta.to(images)).clamp(0, 1)


def blend(images: torch.Tensor, pattern: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - alpha) * images (B, C, H, W) + alpha * pattern (C, H, W); in [0, 1] where both are."""
    return torch.lerp(images, pattern.to(images).expand_as(images), alpha)


def warp(images: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Images whose pixels take the value that is `flow` away, bilinear, beyond the border its value; differentiable.

    Args:
        images: (B, C, H, W).
        flow: (2, H, W), how far to the right and how far down to look, in pixels.
    """
    batch, _, height, width = images.shape
    flow = flow.to(images)
    x = torch.arange(width).to(images) + flow[0]  # (H, W)
    y = torch.arange(height).to(images)[:, None] + flow[1]
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)
    return F.grid_sample(
        images, grid.expand(batch, -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=True
    )
