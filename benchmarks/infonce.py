"""InfoNCE: time and memory of the loss alone, against open_clip's `ClipLoss` and, on a GPU, the public kernels.

    python benchmarks/infonce.py

On a GPU, memeff (of the extra `bench`) and inf-cl (`pip install inf-cl`) take part; what is not installed is left out,
and so are they, with the reason, on a case that they fail on. "backward" is what comes after the loss is there:
`info_nce` has made its gradients by then, and only scales them. The loss of one direction alone, which Eq. (2) and the
in-modal losses are, stands against the plain composition.
"""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F
from measure import ON, Report, peak_bytes, product_rate, seconds

from abd_core.kernels.infonce import info_nce

SCALE = 100.0
if ON.type == "cpu":
    SIZES = {torch.float32: (64, 128, 512, 2048, 4096)}
else:
    SIZES = {torch.bfloat16: (128, 1024, 4096, 8192, 32768, 65536, 131072), torch.float32: (128, 4096, 8192)}
ONE_WAY = {dtype: tuple(sorted({64, *(size for size in sizes if size <= 4096)})) for dtype, sizes in SIZES.items()}
LARGEST = {"open_clip": 65536, "open_clip compiled": 65536, "inf-cl": 8192, "abd_core torch": 8192}  # tried
OTHERS = {"memeff*", "inf-cl"}  # kernels that are not for every case
DIM = 256 if ON.type == "cpu" else 1024
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def losses() -> dict[str, Loss]:
    """Name -> loss of (image features, text features, scale); those with a star have no gradient for the scale."""
    eager = open_clip.ClipLoss()
    found: dict[str, Loss] = {"open_clip": eager, "open_clip compiled": torch.compile(open_clip.ClipLoss())}
    for impl in ("torch", "triton") if ON.type == "cuda" else ("torch",):
        found[f"abd_core {impl}"] = lambda x, y, s, impl=impl: info_nce(x, y, s, weights=(0.5, 0.5), impl=impl)
    if ON.type == "cuda":
        try:
            from memeff import MemoryEfficientCLIPLoss

            memeff = MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)
            found["memeff*"] = lambda x, y, _: memeff(x, y)
        except ImportError:
            print("memeff is not installed: left out")
        try:
            from inf_cl import cal_flash_loss

            found["inf-cl"] = lambda x, y, s: (
                cal_flash_loss(x, y, scale=s).mean() / 2 + cal_flash_loss(y, x, scale=s).mean() / 2
            )
        except ImportError:
            print("inf-cl is not installed: left out")
    return found


def one_way() -> dict[str, Loss]:
    """As `losses`, from images to texts alone."""

    def plain(x: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(s * x @ y.T, torch.arange(len(x), device=x.device))

    found: dict[str, Loss] = {"plain torch": plain}
    for impl in ("torch", "triton") if ON.type == "cuda" else ("torch",):
        found[f"abd_core {impl}"] = lambda x, y, s, impl=impl: info_nce(x, y, s, impl=impl)
    return found


def main() -> None:
    report = Report("infonce", *(["triton", "memeff", "inf-cl"] if ON.type == "cuda" else []))
    for dtype, sizes in SIZES.items():
        name = str(dtype).removeprefix("torch.")
        ceiling = product_rate(dtype)
        report.note(name, "ceiling", "matrix product", "TFLOP/s", ceiling / 1e12)
        cases = [(size, "", losses) for size in sizes] + [(size, ", one way", one_way) for size in ONE_WAY[dtype]]
        for size, ways, kinds in cases:
            repeats = 5 if size > 32768 else max(9, min(501, 10**9 // size**2))  # many of what is short
            case = f"B={size}, D={DIM}, {name}{ways}"
            image, text = (F.normalize(torch.randn(size, DIM, device=ON), dim=1).to(dtype) for _ in range(2))
            leaves = (image.requires_grad_(), text.requires_grad_(), torch.tensor(SCALE, device=ON, requires_grad=True))

            def forward(loss: Loss, leaves=leaves) -> None:
                with torch.no_grad():
                    loss(*leaves)

            def backward(value: torch.Tensor, leaves=leaves) -> None:
                value.backward()
                for leaf in leaves:
                    leaf.grad = None

            def both(loss: Loss, leaves=leaves, backward=backward) -> None:
                backward(loss(*leaves))

            tried = {n: loss for n, loss in kinds().items() if size <= LARGEST.get(n, size)}
            for other in OTHERS & tried.keys():
                try:
                    both(tried[other])
                except Exception as error:  # of their own kinds: no such precision, too little shared memory
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    print(f"{case}: {other} fails and is left out: {reason}", flush=True)
                    del tried[other]
            made = {n: lambda loss=loss, leaves=leaves: loss(*leaves) for n, loss in tried.items()}
            report.times(case, "backward", seconds(dict.fromkeys(tried, backward), repeats=repeats, given=made))
            for what, run in {"forward": forward, "forward + backward": both}.items():
                calls = {n: lambda loss=loss, run=run: run(loss) for n, loss in tried.items()}
                taken = report.times(case, what, seconds(calls, repeats=repeats))
            if kinds is losses:
                # Four products of 2 B B D operations each; features read and gradients written once.
                report.note(case, "any", "operations", "GFLOP", 8 * size**2 * DIM / 1e9)
                report.note(case, "any", "least traffic", "GB", 4 * size * DIM * dtype.itemsize / 1e9)
                for variant, spent in taken.items():
                    report.note(case, variant, "share of the ceiling", "%", 100 * 8 * size**2 * DIM / spent / ceiling)
            if ON.type == "cuda":
                peaks = {n: peak_bytes(call) / 2**20 for n, call in calls.items()}
                report.add(case, "peak memory", "MiB", peaks)
            report.write()


if __name__ == "__main__":
    main()
