"""Perturbing a batch: one pass of `perturb` against plain torch, torchvision and kornia, eager and compiled.

    python benchmarks/perturb.py

kornia is of the extra `bench`. The three others paste or add in plain torch, for which neither library has a function
with a place for each image.
"""

from __future__ import annotations

from collections.abc import Callable

import kornia
import torch
from measure import ON, Report, copy_rate, device_seconds, peak_bytes, seconds
from torchvision.transforms.v2 import functional as vision

from abd_core.kernels.perturb import perturb
from abd_core.models import NORMALISATION

BATCH, SIDE, PATCH = (128, 64, 11) if ON.type == "cpu" else (256, 224, 38)
DTYPE = torch.float32 if ON.type == "cpu" else torch.bfloat16
REPEATS, IN_A_ROW = 51 if ON.type == "cpu" else 15, 20


def painted(images: torch.Tensor, patch: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """A patch at each image's own place, in plain torch."""
    side = torch.arange(PATCH, device=images.device)
    row, column = (top[:, None] + side)[:, :, None], (left[:, None] + side)[:, None, :]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    pixels = patch.permute(1, 2, 0).expand(len(images), PATCH, PATCH, 3)
    return images.permute(0, 2, 3, 1).index_put((sample, row, column), pixels).permute(0, 3, 1, 2)


def main() -> None:
    report = Report("perturb", "torchvision", "kornia", *(["triton"] if ON.type == "cuda" else []))
    ceiling = copy_rate(megabytes=256)
    report.note("copy", "ceiling", "memory bandwidth", "GB/s", ceiling / 1e9)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8).to(ON)
    top, left = torch.randint(SIDE - PATCH + 1, (2, BATCH), generator=generator)
    places = (top.to(ON), left.to(ON))
    mean, std = NORMALISATION

    def plain(pattern: torch.Tensor) -> torch.Tensor:
        x = images.float() / 255
        x = painted(x, pattern, *places) if pattern.shape[-1] == PATCH else (x + pattern).clamp(0, 1)
        x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
        return x.to(DTYPE).contiguous(memory_format=torch.channels_last)

    def torchvision(pattern: torch.Tensor) -> torch.Tensor:
        x = vision.to_dtype(images, torch.float32, scale=True)
        x = painted(x, pattern, *places) if pattern.shape[-1] == PATCH else (x + pattern).clamp(0, 1)
        return vision.normalize(x, [*mean], [*std]).to(DTYPE).contiguous(memory_format=torch.channels_last)

    def by_kornia(pattern: torch.Tensor) -> torch.Tensor:
        x = images.float() / 255
        x = painted(x, pattern, *places) if pattern.shape[-1] == PATCH else (x + pattern).clamp(0, 1)
        x = kornia.enhance.normalize(x, x.new_tensor(mean), x.new_tensor(std))
        return x.to(DTYPE).contiguous(memory_format=torch.channels_last)

    def ours(pattern: torch.Tensor, impl: str) -> torch.Tensor:
        settings = {"keep": 0.0, "top": top, "left": left} if pattern.shape[-1] == PATCH else {"keep": 1.0}
        options = {"normalise": NORMALISATION, "dtype": DTYPE, "channels_last": True, "impl": impl}
        return perturb(images, pattern[None], **settings, **options)

    variants: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "torch eager": plain,
        "torchvision eager": torchvision,
        "kornia eager": by_kornia,
        "torch compiled": torch.compile(plain),
        "torchvision compiled": torch.compile(torchvision),
        "kornia compiled": torch.compile(by_kornia),
    }
    for impl in ("torch", "triton") if ON.type == "cuda" else ("torch",):
        variants[f"abd_core {impl}"] = lambda pattern, impl=impl: ours(pattern, impl)
    moved = images.nbytes + images.numel() * DTYPE.itemsize
    shape = f"{BATCH}x3x{SIDE}x{SIDE} uint8 to {str(DTYPE).removeprefix('torch.')}"
    for kind, side in {"patch": PATCH, "additive": SIDE}.items():
        pattern = torch.rand(3, side, side, generator=generator).to(ON).requires_grad_()
        weight = torch.randn(BATCH, 3, SIDE, SIDE, device=ON).to(DTYPE).contiguous(memory_format=torch.channels_last)

        def forward(call: Callable, pattern=pattern) -> None:
            with torch.no_grad():
                call(pattern)

        def backward(out: torch.Tensor, pattern=pattern, weight=weight) -> None:
            torch.autograd.grad(out, pattern, weight, retain_graph=True)

        def both(call: Callable, pattern=pattern, weight=weight) -> None:
            torch.autograd.grad(call(pattern), pattern, weight)

        def timed(what: str, calls: dict[str, Callable[[], object]], case=f"{kind}, {shape}") -> dict[str, float]:
            """Seconds a call; on a GPU those of the device, in which a share of the bandwidth is to be counted."""

            taken = report.times(case, what, seconds(calls, repeats=REPEATS))
            if ON.type == "cuda":
                row = seconds(calls, repeats=REPEATS, in_a_row=IN_A_ROW)
                report.times(case, f"{what}, in a row", row, calls=IN_A_ROW)
                taken = device_seconds(calls, repeats=REPEATS)
                report.add(case, f"{what}, device", "ms", {n: 1e3 * s for n, s in taken.items()}, n=REPEATS)
            return taken

        case = f"{kind}, {shape}"
        taken = timed("forward", {n: lambda call=call: forward(call) for n, call in variants.items()})
        report.note(
            case, "any", "operations", "GFLOP", 5 * images.numel() / 1e9
        )  # scale, add, clamp, subtract, multiply
        report.note(case, "any", "least traffic", "GB", moved / 1e9)
        for variant, spent in taken.items():
            report.note(case, variant, "forward, of bandwidth", "%", 100 * moved / spent / ceiling)
        made = {n: call(pattern) for n, call in variants.items()}
        taken = timed("backward", {n: lambda out=out: backward(out) for n, out in made.items()})
        seen = BATCH * 3 * side * side * (DTYPE.itemsize + images.itemsize)  # with the pixels, for the clamp
        for variant, spent in taken.items():
            report.note(case, variant, "backward, of bandwidth", "%", 100 * seen / spent / ceiling)
        del made
        calls = {n: lambda call=call: both(call) for n, call in variants.items()}
        timed("forward + backward", calls)
        if ON.type == "cuda":
            report.add(case, "peak memory", "MiB", {n: peak_bytes(call) / 2**20 for n, call in calls.items()})
        report.write()


if __name__ == "__main__":
    main()
