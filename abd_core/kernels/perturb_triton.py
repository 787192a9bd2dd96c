"""`perturb` in Triton: one pass over the pixels in the order in which the result lies in memory.

The gradient of the patterns has a program for each block of a pattern's pixels and each share of the batch; the shares
are summed in their order, without atomics.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

BLOCK = 1024  # elements a program
NUM_WARPS = 4
SHARES = 8  # of the batch, in the gradient of the patterns


@triton.jit
def _place(element, channels, area, LAST: tl.constexpr):
    """Channel and pixel of an element of an image whose channels lie last or first."""
    if LAST:
        channel = element % channels
        pixel = element // channels
    else:
        channel = element // area
        pixel = element % area
    return channel, pixel


@triton.jit
def _at(channel, pixel, channels, area, LAST: tl.constexpr):
    return pixel * channels + channel if LAST else channel * area + pixel


@triton.jit
def _load(images, sample, channel, pixel, channels, area, mask, LAST: tl.constexpr, BYTES: tl.constexpr):
    """Pixels as float32 in [0, 1]."""
    at = images + sample.to(tl.int64) * channels * area + _at(channel, pixel, channels, area, LAST)
    value = tl.load(at, mask=mask, other=0).to(tl.float32)
    return value / 255.0 if BYTES else value


@triton.jit
def _forward_kernel(
    images,
    patterns,
    places,
    weights,
    mean,
    inverse_std,
    out,
    batch,
    count,
    channels,
    height,
    width,
    h,
    w,
    PAINT: tl.constexpr,
    NORMALISE: tl.constexpr,
    IMAGES_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    area = height * width
    mask = element < channels * area
    channel, pixel = _place(element, channels, area, OUT_LAST)
    value = _load(images, sample, channel, pixel, channels, area, mask, IMAGES_LAST, BYTES)
    if PAINT:
        choice = tl.load(places + sample)
        y = pixel // width - tl.load(places + batch + sample)
        x = pixel % width - tl.load(places + 2 * batch + sample)
        inside = mask & (choice >= 0) & (y >= 0) & (y < h) & (x >= 0) & (x < w)
        at = patterns + ((choice * channels + channel) * h + y) * w + x
        keep = tl.load(weights + choice, mask=choice >= 0, other=1.0)
        gain = tl.load(weights + count + choice, mask=choice >= 0, other=0.0)
        value = tl.where(inside, keep * value + gain * tl.load(at, mask=inside, other=0.0), value)
    value = tl.minimum(tl.maximum(value, 0.0), 1.0)
    if NORMALISE:
        value -= tl.load(mean + channel, mask=mask, other=0.0)
        value *= tl.load(inverse_std + channel, mask=mask, other=1.0)
    tl.store(out + sample.to(tl.int64) * channels * area + element, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _images_kernel(
    grad,
    images,
    patterns,
    places,
    weights,
    inverse_std,
    out,
    batch,
    count,
    channels,
    height,
    width,
    h,
    w,
    PAINT: tl.constexpr,
    NORMALISE: tl.constexpr,
    IMAGES_LAST: tl.constexpr,
    GRAD_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    area = height * width
    mask = element < channels * area
    channel, pixel = _place(element, channels, area, IMAGES_LAST)
    value = _load(images, sample, channel, pixel, channels, area, mask, IMAGES_LAST, False)
    through = _load(grad, sample, channel, pixel, channels, area, mask, GRAD_LAST, False)
    if NORMALISE:
        through *= tl.load(inverse_std + channel, mask=mask, other=1.0)
    if PAINT:
        choice = tl.load(places + sample)
        y = pixel // width - tl.load(places + batch + sample)
        x = pixel % width - tl.load(places + 2 * batch + sample)
        inside = mask & (choice >= 0) & (y >= 0) & (y < h) & (x >= 0) & (x < w)
        at = patterns + ((choice * channels + channel) * h + y) * w + x
        keep = tl.load(weights + choice, mask=choice >= 0, other=1.0)
        gain = tl.load(weights + count + choice, mask=choice >= 0, other=0.0)
        value = tl.where(inside, keep * value + gain * tl.load(at, mask=inside, other=0.0), value)
        through = tl.where(inside, keep * through, through)
    through = tl.where((value >= 0) & (value <= 1), through, 0.0)
    tl.store(out + sample.to(tl.int64) * channels * area + element, through.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _patterns_kernel(
    grad,
    images,
    patterns,
    places,
    weights,
    inverse_std,
    out,  # (SHARES, P, C, h, w)
    batch,
    count,
    channels,
    height,
    width,
    h,
    w,
    share,  # samples a program
    NORMALISE: tl.constexpr,
    IMAGES_LAST: tl.constexpr,
    GRAD_LAST: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    area = height * width
    mask = element < channels * h * w
    channel, pixel = _place(element, channels, h * w, GRAD_LAST)  # neighbours in a sample's gradient too
    y = pixel // w
    x = pixel % w
    own = (which * channels + channel) * h * w + pixel
    pattern = tl.load(patterns + own, mask=mask, other=0.0)
    keep = tl.load(weights + which)
    gain = tl.load(weights + count + which)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, share):
        sample = tl.program_id(2) * share + i
        meant = mask & (sample < batch)
        meant = meant & (tl.load(places + sample, mask=sample < batch, other=-1) == which)
        top = tl.load(places + batch + sample, mask=sample < batch, other=0)
        left = tl.load(places + 2 * batch + sample, mask=sample < batch, other=0)
        at = (top + y) * width + left + x
        value = _load(images, sample, channel, at, channels, area, meant, IMAGES_LAST, BYTES)
        value = keep * value + gain * pattern
        through = _load(grad, sample, channel, at, channels, area, meant, GRAD_LAST, False)
        total += tl.where((value >= 0) & (value <= 1), through, 0.0)
    if NORMALISE:
        total *= tl.load(inverse_std + channel, mask=mask, other=1.0)
    tl.store(out + tl.program_id(2) * count * channels * h * w + own, gain * total, mask=mask)


@functools.lru_cache
def _constants(values: tuple[float, ...], device: torch.device, inverse: bool) -> torch.Tensor:
    tensor = torch.tensor(values or (1.0,), dtype=torch.float32, device=device)
    return 1 / tensor if inverse else tensor


def _laid_out(images: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Images (B, C, H, W) without gaps, and whether their channels lie last."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return (images if last else images.contiguous()), last


def _check(images: torch.Tensor) -> None:
    if images.dtype == torch.float64:
        raise ValueError("perturb: impl = 'triton' has no float64; 'torch' has")
    if not images.is_cuda and not isinstance(_forward_kernel, InterpretedFunction):
        raise ValueError(f"perturb: impl = 'triton' needs a CUDA device, not {images.device}")


def forward(
    images: torch.Tensor,
    patterns: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """`perturb._op`. Raises ValueError for float64, and for tensors that are not on a CUDA device."""
    _check(images)
    source, last = _laid_out(images)
    batch, channels, height, width = images.shape
    shape = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=shape)
    _forward_kernel[(triton.cdiv(channels * height * width, BLOCK), batch)](
        source,
        patterns.contiguous(),
        places,
        weights,
        _constants(tuple(mean), images.device, False),
        _constants(tuple(std), images.device, True),
        out,
        batch,
        len(patterns),
        channels,
        height,
        width,
        *patterns.shape[2:],
        PAINT=len(patterns) > 0,
        NORMALISE=bool(mean),
        IMAGES_LAST=last,
        OUT_LAST=channels_last,
        BYTES=images.dtype == torch.uint8,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return out


def backward(
    grad: torch.Tensor,
    images: torch.Tensor,
    patterns: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    std: list[float],
    needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`perturb._backward_op`."""
    _check(images)
    (source, last), (grad, grad_last) = _laid_out(images), _laid_out(grad)
    (batch, channels, height, width), (count, _, h, w) = images.shape, patterns.shape
    patterns = patterns.contiguous()
    inputs = (grad, source, patterns, places, weights, _constants(tuple(std), images.device, True))
    sizes = (batch, count, channels, height, width, h, w)
    fixed = {"NORMALISE": bool(std), "IMAGES_LAST": last, "GRAD_LAST": grad_last, "BLOCK": BLOCK}
    of_images, of_patterns = patterns.new_empty(0), patterns.new_empty(0)
    if needed[0]:
        of_images = torch.empty_like(source)
        grid = (triton.cdiv(channels * height * width, BLOCK), batch)
        _images_kernel[grid](*inputs, of_images, *sizes, PAINT=count > 0, **fixed, num_warps=NUM_WARPS)
    if needed[1]:
        share = triton.cdiv(batch, SHARES)
        parts = patterns.new_empty((triton.cdiv(batch, share), *patterns.shape))
        _patterns_kernel[(triton.cdiv(channels * h * w, BLOCK), count, len(parts))](
            *inputs, parts, *sizes, share, BYTES=images.dtype == torch.uint8, **fixed, num_warps=NUM_WARPS
        )
        of_patterns = parts.sum(0)
    return of_images, of_patterns
