"""`perturb` in Triton: one pass over the pixels, a thread at eight neighbours and their three channels.

Eight pixels of three channels are three whole vectors in memory, whether channels lie first or last: bytes and halves
are read and written in vectors, and changing from one layout to the other is a matter of registers.

The gradient of the patterns has a program for each block of a pattern's pixels and each share of the batch; the shares
are summed in their order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from abd_core.kernels.dispatch import cdiv
from abd_core.kernels.perturb import layout

GROUPS, NUM_WARPS = 64, 2  # of eight pixels a program
REGISTERS = {} if torch.version.hip else {"maxnreg": 48}  # a thread: few, so that many wait for memory at once
PROGRAMS = 1024  # that share a gradient of the patterns, about


@triton.jit
def _apart(x):
    """The eight columns of (G, 8), each (G,)."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2, 2)))  # by the lowest bit of the column first
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _together(x0, x1, x2, x3, x4, x5, x6, x7):
    """(G, 8) of its columns."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.join(even, odd), (x0.shape[0], 8))


@triton.jit
def _block(size, GROUPS: tl.constexpr):
    """Which image (or pattern) of `size` pixels and which block of it a program has: one axis has room for all."""
    blocks = tl.cdiv(size, 8 * GROUPS)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def _floats(base, at, mask):
    """Pixels or a gradient as float32; bytes stay from 0 to 255."""
    return tl.load(base + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _load(image, group, AREA: tl.constexpr, LAST: tl.constexpr):
    """Red, green and blue (G, 8) of the pixels 8 * group (G,) and following, of one image."""
    eight = tl.arange(0, 8)[None, :]
    if LAST:
        at = 24 * group[:, None] + eight
        u0, u1, u2, u3, u4, u5, u6, u7 = _apart(_floats(image, at, at < 3 * AREA))
        at += 8
        v0, v1, v2, v3, v4, v5, v6, v7 = _apart(_floats(image, at, at < 3 * AREA))
        at += 8
        w0, w1, w2, w3, w4, w5, w6, w7 = _apart(_floats(image, at, at < 3 * AREA))
        red = _together(u0, u3, u6, v1, v4, v7, w2, w5)
        green = _together(u1, u4, u7, v2, v5, w0, w3, w6)
        blue = _together(u2, u5, v0, v3, v6, w1, w4, w7)
    else:
        at = 8 * group[:, None] + eight
        red = _floats(image, at, at < AREA)
        green = _floats(image + AREA, at, at < AREA)
        blue = _floats(image + 2 * AREA, at, at < AREA)
    return red, green, blue


@triton.jit
def _store(image, block, red, green, blue, AREA: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr):
    """The counterpart of `_load`, for a block of pixels."""
    kind: tl.constexpr = image.dtype.element_ty
    if LAST:
        r0, r1, r2, r3, r4, r5, r6, r7 = _apart(red)
        g0, g1, g2, g3, g4, g5, g6, g7 = _apart(green)
        b0, b1, b2, b3, b4, b5, b6, b7 = _apart(blue)
        u = tl.reshape(_together(r0, g0, b0, r1, g1, b1, r2, g2), (GROUPS // 2, 2, 8))
        v = tl.reshape(_together(b2, r3, g3, b3, r4, g4, b4, r5), (GROUPS // 2, 2, 8))
        w = tl.reshape(_together(g5, b5, r6, g6, b6, r7, g7, b7), (GROUPS // 2, 2, 8))
        # Memory takes 32 bytes at a time, two vectors of halves. Two threads' six vectors u v w u v w are written as
        # uv, wu, vw, so that each write fills what it touches: for this, the two exchange v.
        bits = v.to(tl.int32, bitcast=True)
        v = (tl.sum(bits, 1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
        first = tl.arange(0, 2)[None, :, None] == 0
        at = 24 * GROUPS * block + 48 * tl.arange(0, GROUPS // 2)[:, None] + tl.arange(0, 16)[None, :]
        uv = tl.reshape(tl.where(first, u, v).to(kind), (GROUPS // 2, 16))
        wu = tl.reshape(tl.where(first, w, u).to(kind), (GROUPS // 2, 16))
        vw = tl.reshape(tl.where(first, v, w).to(kind), (GROUPS // 2, 16))
        tl.store(image + at, uv, mask=at < 3 * AREA)
        tl.store(image + at + 16, wu, mask=at + 16 < 3 * AREA)
        tl.store(image + at + 32, vw, mask=at + 32 < 3 * AREA)
    else:
        at = 8 * (GROUPS * block + tl.arange(0, GROUPS))[:, None] + tl.arange(0, 8)[None, :]
        tl.store(image + at, red.to(kind), mask=at < AREA)
        tl.store(image + AREA + at, green.to(kind), mask=at < AREA)
        tl.store(image + 2 * AREA + at, blue.to(kind), mask=at < AREA)


@triton.jit
def _field(choice, group, patterns, weights, count, AREA: tl.constexpr, UNIT: tl.constexpr):
    """What a pattern of the images' size adds, (G, 8) a channel, and the share that an image keeps; -1: 0 and all."""
    at = 8 * group[:, None] + tl.arange(0, 8)[None, :]
    mask = (at < AREA) & (choice >= 0)
    which = tl.maximum(choice, 0)
    gain = tl.load(weights + count + which)
    share = UNIT * tl.where(choice >= 0, tl.load(weights + which), 1.0)
    own = patterns + which * 3 * AREA + at
    red = gain * tl.load(own, mask=mask, other=0.0)
    green = gain * tl.load(own + AREA, mask=mask, other=0.0)
    blue = gain * tl.load(own + 2 * AREA, mask=mask, other=0.0)
    return red, green, blue, share


@triton.jit
def _paint(
    red,
    green,
    blue,
    sample,
    block,
    patterns,
    places,
    weights,
    batch,
    count,
    h,
    w,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A block of an image with its pattern in a window, and the share that the image has in each pixel, (G, 8)."""
    choice = tl.load(places + sample).to(tl.int32)
    top = tl.load(places + batch + sample).to(tl.int32)
    left = tl.load(places + 2 * batch + sample).to(tl.int32)
    share = tl.full((GROUPS, 8), 1.0, tl.float32)
    begin = block * GROUPS * 8
    end = begin + GROUPS * 8 - 1
    if (choice >= 0) & (end // WIDTH >= top) & (begin // WIDTH < top + h):  # few blocks meet a window
        eight = tl.arange(0, 8)[None, :]
        at = begin + 8 * tl.arange(0, GROUPS)[:, None]
        if WIDTH % 8 > 0:  # eight neighbours may be of two rows; else one address serves them all
            at = at + eight
            eight = 0 * eight
        y = at // WIDTH - top
        x = at % WIDTH - left
        own = patterns + choice.to(tl.int64) * 3 * h * w + (y * w + x) + eight
        x = x + eight
        inside = (at + eight < AREA) & (y >= 0) & (y < h) & (x >= 0) & (x < w)
        share = tl.where(inside, tl.load(weights + choice), 1.0)
        gain = tl.load(weights + count + choice)
        size = h * w
        red = share * red + gain * tl.load(own, mask=inside, other=0.0)
        green = share * green + gain * tl.load(own + size, mask=inside, other=0.0)
        blue = share * blue + gain * tl.load(own + 2 * size, mask=inside, other=0.0)
    return red, green, blue, share


@triton.jit
def _normalised(value, MEAN: tl.constexpr, FACTOR: tl.constexpr):
    """Clamped and normalised; NaN stays NaN."""
    value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, 1.0, propagate_nan=tl.PropagateNan.ALL) * FACTOR - MEAN * FACTOR


@triton.jit
def _forward_kernel(
    images,
    patterns,
    places,
    weights,
    out,
    batch,
    count,
    h,
    w,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,  # patterns of the images' size
    PAINT: tl.constexpr,
    MEAN: tl.constexpr,
    FACTOR: tl.constexpr,
    IMAGES_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    UNIT: tl.constexpr,  # 1 / 255 for bytes, else 1
    GROUPS: tl.constexpr,
):
    sample, block = _block(AREA, GROUPS)
    image = sample.to(tl.int64) * 3 * AREA
    group = block * GROUPS + tl.arange(0, GROUPS)
    red, green, blue = _load(images + image, group, AREA, IMAGES_LAST)
    if PAINT and WHOLE:
        choice = tl.load(places + sample)
        more_red, more_green, more_blue, share = _field(choice, group, patterns, weights, count, AREA, UNIT)
        red, green, blue = share * red + more_red, share * green + more_green, share * blue + more_blue
    else:
        red, green, blue = UNIT * red, UNIT * green, UNIT * blue
        if PAINT:
            red, green, blue, _ = _paint(
                red, green, blue, sample, block, patterns, places, weights, batch, count, h, w, AREA, WIDTH, GROUPS
            )
    red = _normalised(red, MEAN[0], FACTOR[0])
    green = _normalised(green, MEAN[1], FACTOR[1])
    blue = _normalised(blue, MEAN[2], FACTOR[2])
    _store(out + image, block, red, green, blue, AREA, OUT_LAST, GROUPS)


@triton.jit
def _passed(through, value, share, FACTOR: tl.constexpr):
    """The gradient of an image's values, of that of the result."""
    return tl.where((value >= 0) & (value <= 1), share * (FACTOR * through), 0.0)


@triton.jit
def _images_kernel(
    grad,
    images,
    patterns,
    places,
    weights,
    out,
    batch,
    count,
    h,
    w,
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,  # patterns of the images' size
    PAINT: tl.constexpr,
    FACTOR: tl.constexpr,
    IMAGES_LAST: tl.constexpr,
    GRAD_LAST: tl.constexpr,
    GROUPS: tl.constexpr,
):
    sample, block = _block(AREA, GROUPS)
    image = sample.to(tl.int64) * 3 * AREA
    group = block * GROUPS + tl.arange(0, GROUPS)
    red, green, blue = _load(images + image, group, AREA, IMAGES_LAST)
    of_red, of_green, of_blue = _load(grad + image, group, AREA, GRAD_LAST)
    share = 1.0
    if PAINT and WHOLE:
        choice = tl.load(places + sample)
        more_red, more_green, more_blue, share = _field(choice, group, patterns, weights, count, AREA, 1.0)
        red, green, blue = share * red + more_red, share * green + more_green, share * blue + more_blue
    elif PAINT:
        red, green, blue, share = _paint(
            red, green, blue, sample, block, patterns, places, weights, batch, count, h, w, AREA, WIDTH, GROUPS
        )
    of_red = _passed(of_red, red, share, FACTOR[0])
    of_green = _passed(of_green, green, share, FACTOR[1])
    of_blue = _passed(of_blue, blue, share, FACTOR[2])
    _store(out + image, block, of_red, of_green, of_blue, AREA, IMAGES_LAST, GROUPS)


@triton.jit
def _window(image, at, mask, AREA: tl.constexpr, LAST: tl.constexpr):
    """Red, green and blue of pixels anywhere in an image."""
    step: tl.constexpr = 1 if LAST else AREA
    if LAST:
        at *= 3
    red = _floats(image, at, mask)
    return red, _floats(image + step, at, mask), _floats(image + 2 * step, at, mask)


@triton.jit
def _patterns_kernel(
    grad,
    images,
    patterns,
    places,
    weights,
    out,  # (shares of the batch, P, 3, h, w)
    batch,
    count,
    h,
    w,
    each,  # samples a program
    AREA: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,  # patterns of the images' size
    FACTOR: tl.constexpr,
    IMAGES_LAST: tl.constexpr,
    GRAD_LAST: tl.constexpr,
    UNIT: tl.constexpr,  # 1 / 255 for bytes, else 1
    GROUPS: tl.constexpr,
):
    size = AREA if WHOLE else h * w
    which, block = _block(size, GROUPS)
    group = block * GROUPS + tl.arange(0, GROUPS)
    pixel = 8 * group[:, None] + tl.arange(0, 8)[None, :]
    mask = pixel < size
    own = patterns + which.to(tl.int64) * 3 * size + pixel
    gain = tl.load(weights + count + which)
    red = gain * tl.load(own, mask=mask, other=0.0)
    green = gain * tl.load(own + size, mask=mask, other=0.0)
    blue = gain * tl.load(own + 2 * size, mask=mask, other=0.0)
    keep = UNIT * tl.load(weights + which)
    of_red = tl.zeros((GROUPS, 8), tl.float32)
    of_green = tl.zeros((GROUPS, 8), tl.float32)
    of_blue = tl.zeros((GROUPS, 8), tl.float32)
    first = tl.program_id(1) * each
    for i in range(0, tl.minimum(each, batch - first)):
        sample = first + i
        if tl.load(places + sample) == which:
            image = sample.to(tl.int64) * 3 * AREA
            if WHOLE:
                r, g, b = _load(images + image, group, AREA, IMAGES_LAST)
                dr, dg, db = _load(grad + image, group, AREA, GRAD_LAST)
            else:
                top = tl.load(places + batch + sample).to(tl.int32)
                left = tl.load(places + 2 * batch + sample).to(tl.int32)
                at = (top + pixel // w) * WIDTH + left + pixel % w
                r, g, b = _window(images + image, at, mask, AREA, IMAGES_LAST)
                dr, dg, db = _window(grad + image, at, mask, AREA, GRAD_LAST)
            of_red += _passed(dr, keep * r + red, gain, FACTOR[0])
            of_green += _passed(dg, keep * g + green, gain, FACTOR[1])
            of_blue += _passed(db, keep * b + blue, gain, FACTOR[2])
    own = out + (tl.program_id(1) * count + which).to(tl.int64) * 3 * size + pixel
    tl.store(own, of_red, mask=mask)
    tl.store(own + size, of_green, mask=mask)
    tl.store(own + 2 * size, of_blue, mask=mask)


def _unit(images: torch.Tensor) -> float:
    """What a stored 1 stands for."""
    return 1 / 255 if images.dtype == torch.uint8 else 1.0


def _factors(std: list[float]) -> tuple[float, ...]:
    """What each channel is multiplied with, a constant of the compiled kernel."""
    return tuple(1 / value for value in std) or (1.0, 1.0, 1.0)


def _laid_out(images: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Images (B, C, H, W) without gaps, and whether their channels lie last."""
    form = layout(images)
    return images.contiguous(memory_format=form), form == torch.channels_last


def _check(images: torch.Tensor) -> None:
    if images.shape[1] != 3:
        raise ValueError(f"perturb: impl = 'triton' needs 3 channels, not {images.shape[1]}; 'torch' takes any")
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
    (batch, _, height, width), (count, _, h, w) = images.shape, patterns.shape
    shape = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=shape)
    _forward_kernel[(cdiv(height * width, 8 * GROUPS) * batch,)](
        source,
        patterns.contiguous(),
        places,
        weights,
        out,
        batch,
        count,
        h,
        w,
        AREA=height * width,
        WIDTH=width,
        WHOLE=(h, w) == (height, width),
        PAINT=count > 0,
        MEAN=tuple(mean) or (0.0, 0.0, 0.0),
        FACTOR=_factors(std),
        IMAGES_LAST=last,
        OUT_LAST=channels_last,
        UNIT=_unit(images),
        GROUPS=GROUPS,
        num_warps=NUM_WARPS,
        **REGISTERS,
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
    (batch, _, height, width), (count, _, h, w) = images.shape, patterns.shape
    patterns = patterns.contiguous()
    inputs = (grad, source, patterns, places, weights)
    sizes = (batch, count, h, w)
    fixed = {"AREA": height * width, "WIDTH": width, "FACTOR": _factors(std), "GROUPS": GROUPS}
    fixed |= {"WHOLE": (h, w) == (height, width)}
    fixed |= {"IMAGES_LAST": last, "GRAD_LAST": grad_last, "num_warps": NUM_WARPS}
    of_images, of_patterns = patterns.new_empty(0), patterns.new_empty(0)
    if needed[0]:
        of_images = torch.empty_like(source)
        grid = (cdiv(height * width, 8 * GROUPS) * batch,)
        _images_kernel[grid](*inputs, of_images, *sizes, PAINT=count > 0, **fixed)
    if needed[1]:
        blocks = count * cdiv(h * w, 8 * GROUPS)
        each = max(1, cdiv(batch, cdiv(PROGRAMS, blocks)))  # a batch may be empty
        shares = cdiv(batch, each)
        parts = patterns.new_empty((shares, *patterns.shape))
        _patterns_kernel[(blocks, shares)](*inputs, parts, *sizes, each, UNIT=_unit(images), **fixed)
        of_patterns = parts.sum(0)
    return of_images, of_patterns
