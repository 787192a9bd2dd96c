"""How long an audit takes: each of its parts on this machine, and how many images it puts through an encoder.

    python benchmarks/audit.py

On the CPU: the clean base on the embedded images, 100 classes. On a GPU: `RN50-quickgelu` at 224 px with random
weights, on random images, 1,000 classes. The images are counted with a model that costs nothing, for 100 and for 1,000
classes; divided by the speed of a training step on another machine they project the time there. Of the published
settings a few steps are timed, and the rest is projected from these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from measure import ON, Report

from abd_core import models
from abd_core.audit import AuditConfig, detectors, recover
from abd_core.data import TEST_VIEWS, class_names, load_pairs
from abd_core.detectors import Observed, observe
from abd_core.text import TEMPLATES

LARGE = ON.type == "cuda"
STEPS = 5  # of the published settings' thousands
CONFIG = AuditConfig()


class Free(torch.nn.Module):
    """Features without a network; counts the images that it is given."""

    context_length = 20
    visual = None

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.0))
        self.images = 0

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(tokens), 8)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return images.float()[:, 0, 8, :8]


def seen(model: torch.nn.Module, images: torch.Tensor, count: int) -> Observed:
    names = [*class_names(), *(f"class {i}" for i in range(1000))][:count]
    return observe(model, images, names, TEMPLATES)


def parts(model: torch.nn.Module, images: torch.Tensor, count: int, meter: Callable[[], float]) -> dict[str, float]:
    """What each part of an audit takes of what `meter` reads; what is done for the reference too is counted twice."""
    start, taken = meter(), {}
    observed = seen(model, images, count)
    taken["images and classes"] = 2 * (meter() - start)
    for name, detector in detectors("ours").items():
        start = meter()
        finding = detector.measure(observed, seed=0, ranked=range(count))
        taken[name] = (1 + (detector.compares or detector.follows)) * (meter() - start)
        if name == "drift":
            drift = finding
    start = meter()
    recover(observed, 0, drift, seed=0, steps=CONFIG.recovery_steps)
    return {**taken, "recovery": meter() - start}


def main() -> None:
    report = Report("audit")
    for count in (100, 1000):
        free = Free()
        total = sum(parts(free, torch.rand(CONFIG.count, 3, 64, 64), count, partial(getattr, free, "images")).values())
        report.note(f"{count} classes", "whole audit", "images encoded", "images", total)
    if LARGE:
        name, count = "RN50-quickgelu", 1000
        model, images = models.build(name), torch.rand(CONFIG.count, 3, 224, 224, device=ON)
    else:
        name, count, model = models.EMBEDDED, len(class_names()), models.load(models.clean_weights())
        images = load_pairs().images(torch.arange(CONFIG.count), seed=0, step=0, views=TEST_VIEWS)
    case = f"{name}, {count} classes"
    taken = parts(model, images, count, time.perf_counter)
    for part, value in {**taken, "whole audit": sum(taken.values())}.items():
        report.note(case, part, "time", "s", value)
    observed = seen(model, images, count)
    for part, detector in detectors("published").items():
        if detector.published:
            steps, detector.steps = detector.steps, STEPS
            start = time.perf_counter()
            detector.measure(observed, seed=0)
            value = (time.perf_counter() - start) * steps / STEPS / 3600
            report.note(case, f"{part}, published", "projected time", "h", value, n=STEPS)
    report.write()


if __name__ == "__main__":
    main()
