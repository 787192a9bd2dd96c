"""Patterns on batches of images, and the way to the encoder: painted, clamped, normalised and cast in one pass.

`perturb` is the general form; `paste`, `add` and `blend` are what it is for. `warp` is for triggers that move pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from abd_core.kernels.dispatch import choose, launching, may_keep, sent

Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation a channel


def perturb(
    images: torch.Tensor,
    patterns: torch.Tensor | None = None,
    *,
    choice: torch.Tensor | None = None,
    keep: torch.Tensor | float = 0.0,
    gain: torch.Tensor | float = 1.0,
    top: torch.Tensor | int = 0,
    left: torch.Tensor | int = 0,
    normalise: Normalisation | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Images with a pattern each, as the encoder wants them: ((keep * x + gain * pattern) in [0, 1] - mean) / std.

    Outside of its pattern an image is left as it is, but for clamping and normalising. Differentiable once in images
    and patterns: the gradient passes where a value is in [0, 1], bounds included. The gradient of a pattern is summed
    over the batch in a fixed order: the same inputs give the same bits.

    Args:
        images: (B, C, H, W), floating point in [0, 1], or uint8, which is divided by 255.
        patterns: (P, C, h, w), floating point; None: no image gets one.
        choice: int64 (B,), each image's pattern, or -1 for none. None: the only one there is.
        keep, gain: of a pattern, (P,) or one number for all. (0, 1) pastes, (1, 1) adds, (1 - a, a) blends.
        top, left: int64 (B,) or one number for all, the upper left corner of the pattern in pixels.
        normalise: (mean, standard deviation), a number a channel; None: not normalised.
        dtype: of the result; None: the images' own, float32 for uint8.
        channels_last: the memory format of the result; not channels_last: contiguous.
        impl: "torch", "triton" (three channels), or "auto": triton on a CUDA device where it is installed.

    Raises:
        ValueError: shapes, places or `impl` do not fit. Compiled, the values of places and choices are not looked at.
    """
    if images.ndim != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"perturb: (B, C, H, W) of floats or uint8 expected, not {tuple(images.shape)} {images.dtype}")
    batch, channels, height, width = images.shape
    dtype = dtype or (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    if normalise is not None and not len(normalise[0]) == len(normalise[1]) == channels:
        raise ValueError(f"perturb: mean and standard deviation of {channels} channels expected")
    if patterns is None or not patterns.shape[0]:
        patterns = images.new_empty((0, channels, 1, 1), dtype=torch.float32)
    count, _, h, w = patterns.shape
    if patterns.shape[1] != channels or h > height or w > width:
        raise ValueError(f"perturb: {tuple(patterns.shape)} patterns for {tuple(images.shape)} images")
    if choice is None and count > 1:
        raise ValueError(f"perturb: which of {count} patterns goes to which image?")
    where = (count - 1 if choice is None else choice, top, left)
    compiling = torch.compiler.is_compiling()
    if not compiling:  # to look at values would break the graph
        # Places are drawn on the CPU, where looking at them costs no wait for the device.
        least, most = zip(*map(_bounds, where), strict=True)
        if count and (min(least[1:]) < 0 or most[1] > height - h or most[2] > width - w):
            raise ValueError(f"perturb: a {h}x{w} pattern leaves its {height}x{width} image")
        if least[0] < -1 or most[0] >= count:
            raise ValueError(f"perturb: choices from -1 to {count - 1} expected")
    work = torch.float64 if images.dtype == torch.float64 else torch.float32
    places = _table(where, batch, "a place", torch.int64, images)
    weights = _table((keep, gain), count, "a weight", work, images)
    mean, std = ([*map(float, values)] for values in normalise or ((), ()))
    patterns = sent(patterns, images.device).to(work)
    chosen = "torch" if impl == "auto" and channels != 3 else choose(impl, images)
    given = (images, patterns, places, weights, mean, std, dtype, channels_last, chosen)
    needed = torch.is_grad_enabled() and (images.requires_grad or patterns.requires_grad)
    return (_op if compiling else _eager if needed else _run)(*given)


def _bounds(value: torch.Tensor | int) -> tuple[int, int]:
    """The least and the greatest of some values; where there are none, 0."""
    if not isinstance(value, torch.Tensor):
        return value, value
    least, most = value.aminmax() if value.numel() else (torch.zeros(()), torch.zeros(()))
    return int(least), int(most)


def _table(
    values: tuple[torch.Tensor | float, ...], count: int, what: str, dtype: torch.dtype, like: torch.Tensor
) -> torch.Tensor:
    """A row of each value, or of the one for all, on the device of `like`: (values, count)."""
    device = like.device
    if may_keep(like) and not any(isinstance(value, torch.Tensor) for value in values):
        return _kept(values, count, dtype, device)
    # Pinned, as `sent` has it: the CPU goes on while it is read.
    pinned = device.type == "cuda" and not torch.compiler.is_compiling()
    table = torch.empty(len(values), count, dtype=dtype, pin_memory=pinned)
    for row, value in zip(table, values, strict=True):
        if not isinstance(value, torch.Tensor):
            row.fill_(value)
        elif value.shape == (count,):
            row.copy_(value.detach())
        else:
            raise ValueError(f"perturb: {what} for each of {count} expected, not {tuple(value.shape)}")
    return table.to(device, non_blocking=True)


@functools.lru_cache
def _kept(values: tuple[float, ...], count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`_table` of numbers: the same in each step, so that it is sent once."""
    with torch.inference_mode(False):  # it may be kept for a backward pass later on
        # Sent from the CPU, which waits for it: it may be for another stream than this one.
        return torch.tensor(values, dtype=dtype)[:, None].repeat(1, count).to(device)


def paste(images: torch.Tensor, patch: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1] with `patch` (C, h, w) pasted over at (`top`, `left`), int64 (B,), in pixels."""
    return perturb(images, patch[None], top=top, left=left)


def add(images: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """images (B, C, H, W) + delta (C, H, W), clamped to [0, 1]."""
    return perturb(images, delta[None], keep=1.0)


def blend(images: torch.Tensor, pattern: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - alpha) * images (B, C, H, W) + alpha * pattern (C, H, W), both in [0, 1]."""
    return perturb(images, pattern[None], keep=1 - alpha, gain=alpha)


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


# --- the operators ----------------------------------------------------------------------------------------------------


def _run(
    images: torch.Tensor,
    patterns: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    channels_last: bool,
    impl: str,
) -> torch.Tensor:
    """`perturb` with choice, top and left as the rows of `places`, keep and gain as those of `weights`."""
    if impl == "triton":
        from abd_core.kernels.perturb_triton import forward  # not installed everywhere

        with launching(images.device):
            return forward(images, patterns, places, weights, mean, std, dtype, channels_last)
    # One tensor in the result's layout from the first step on: on a CPU, fresh memory costs more than arithmetic.
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = _floats(images, patterns.dtype, form)
    window, keep, gain, chosen = _windows(x, patterns, places, weights)
    if window is None:
        x.mul_(keep).add_(gain * chosen.contiguous(memory_format=form))
    elif len(patterns):
        pixels = x.permute(0, 2, 3, 1)
        pixels[window] = keep * pixels[window] + gain * chosen.permute(0, 2, 3, 1)
    x.clamp_(0, 1)
    if mean:
        mean_of, std_of = x.new_tensor([mean, std])
        if channels_last:  # a row of pixels at a time, instead of three channels
            width = x.shape[-1]
            x.permute(0, 2, 3, 1).flatten(2).sub_(mean_of.repeat(width)).div_(std_of.repeat(width))
        else:
            x.sub_(mean_of.view(-1, 1, 1)).div_(std_of.view(-1, 1, 1))
    return x.to(dtype)


_op = torch.library.custom_op("abd_core::perturb", _run, mutates_args=())


@_op.register_fake
def _(images, patterns, places, weights, mean, std, dtype, channels_last, impl):  # type: ignore[no-untyped-def]
    shape = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(images, dtype=dtype, memory_format=shape)


def _run_backward(
    grad: torch.Tensor,
    images: torch.Tensor,
    patterns: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor,
    std: list[float],
    needed: list[bool],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of images, in their dtype, and of patterns; empty where not `needed`."""
    if impl == "triton":
        from abd_core.kernels.perturb_triton import backward  # not installed everywhere

        with launching(images.device):
            return backward(grad, images, patterns, places, weights, std, needed)
    window, keep, gain, chosen = _windows(images, patterns, places, weights)
    whole, form = window is None, layout(grad)
    last = not whole or form == torch.channels_last  # the order in memory, in which sums over the batch are fast
    x, through = _floats(images, patterns.dtype, form) if whole else images, grad
    if last:
        x, through, chosen = (tensor.permute(0, 2, 3, 1) for tensor in (x, through, chosen))
    if not whole:
        x, through = _floats(x[window], patterns.dtype), through[window]
    x.mul_(keep).add_(gain * chosen.contiguous())
    through = x.eq_(x.clamp(0, 1)).mul_(through)  # 1 where the gradient passes, else 0: in the values' place
    of_images = of_patterns = patterns.new_empty(0)
    deviation = patterns.new_tensor(std or [1.0]).view(-1, 1, 1)
    if needed[0]:
        if whole:
            of_images = (through * keep).permute(0, 3, 1, 2) if last else through * keep
        else:
            of_images = grad.to(patterns.dtype) * ((images >= 0) & (images <= 1))
            of_images.permute(0, 2, 3, 1)[window] = through * keep
        of_images = of_images.div_(deviation).to(images.dtype, memory_format=layout(images))
    if needed[1]:
        # One pattern after the other, in a fixed order: index_add has none on a GPU.
        alike = len(patterns) == 1 and not places[0].any()
        taken = [through] if alike else [through[places[0] == i] for i in range(len(patterns))]
        of_patterns = torch.stack([weight * part.sum(0) for weight, part in zip(weights[1], taken, strict=True)])
        of_patterns = (of_patterns.permute(0, 3, 1, 2) if last else of_patterns) / deviation
        of_patterns = of_patterns.contiguous()
    return of_images, of_patterns


_backward_op = torch.library.custom_op("abd_core::perturb_backward", _run_backward, mutates_args=())


@_backward_op.register_fake
def _(grad, images, patterns, places, weights, std, needed, impl):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(images, memory_format=layout(images)) if needed[0] else patterns.new_empty(0),
        patterns.new_empty(patterns.shape if needed[1] else 0),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4])
    ctx.std, ctx.impl = inputs[5], inputs[8]


@torch.autograd.function.once_differentiable
def _backward(ctx, grad, call=_backward_op):  # type: ignore[no-untyped-def]
    needed = [*ctx.needs_input_grad[:2]]
    images, patterns = call(grad, *ctx.saved_tensors, ctx.std, needed, ctx.impl)
    return (images if needed[0] else None, patterns if needed[1] else None, *[None] * 7)


_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The operator without the library's dispatch, which takes longer than a small batch itself."""

    @staticmethod
    def forward(ctx, *given):  # type: ignore[no-untyped-def]
        output = _run(*given)
        _setup(ctx, given, output)
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _backward(ctx, grad, _run_backward)


_eager = torch.compiler.disable(_Eager.apply)


# --- in torch ---------------------------------------------------------------------------------------------------------


def layout(images: torch.Tensor) -> torch.memory_format:
    """Channels last where images (B, C, H, W) lie so and not otherwise too, else contiguous."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _floats(
    pixels: torch.Tensor, dtype: torch.dtype, form: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """A copy of pixels, bytes divided by 255."""
    if form == layout(pixels):
        x = pixels.to(dtype, memory_format=form, copy=True)
    else:  # channel by channel, which on a CPU is some times as fast as all at once
        x = torch.empty(pixels.shape, dtype=dtype, device=pixels.device, memory_format=form)
        for channel, source in zip(x.unbind(1), pixels.unbind(1), strict=True):
            channel.copy_(source)
    return x.div_(255) if pixels.dtype == torch.uint8 else x


def _windows(
    x: torch.Tensor, patterns: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...] | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the patterns go and how.

    Returns:
        The windows' index into (B, H, W, C), or None for patterns of the whole image; each image's keep and gain, (B or
        1, 1, 1, 1); each image's pattern, (B or 1, C, h, w).
    """
    choice, top, left = places
    h, w = patterns.shape[2:]
    if len(patterns) == 1 and not choice.any():  # as nearly always: one pattern for all
        keep, gain = weights.view(2, 1, 1, 1, 1)
        chosen = patterns
    elif len(patterns):
        bare = (choice < 0).view(-1, 1, 1, 1)
        keep, gain = weights[:, choice.clamp_min(0)].view(2, -1, 1, 1, 1)
        keep, gain = torch.where(bare, 1, keep), torch.where(bare, 0, gain)
        chosen = patterns[choice.clamp_min(0)]
        chosen[choice < 0] = 0  # an infinity times a gain of 0 is no number
    else:
        keep, gain = weights.new_ones(1, 1, 1, 1), weights.new_zeros(1, 1, 1, 1)
        chosen, h, w = patterns.new_zeros(1, x.shape[1], 0, 0), 0, 0
    if (h, w) == tuple(x.shape[2:]):
        return None, keep, gain, chosen
    window = (
        torch.arange(len(x), device=x.device)[:, None, None],
        (top[:, None] + torch.arange(h, device=x.device))[:, :, None],
        (left[:, None] + torch.arange(w, device=x.device))[:, None, :],
    )
    return window, keep, gain, chosen
