"""Training in the loop and the adversary's step against the same in a plain loop: images a second, memory on a GPU.

    python benchmarks/steps.py [--seconds N] [--compiled]

On the CPU: the embedded benchmark's model and pairs, drawing of views and captions included. Before each step that is
compared with the plain loop, one of that is taken, so that a slow moment of the machine meets both. On a GPU:
`RN50-quickgelu` at 224 px on random images that are there already, then from tars, and what that makes of the paper's
defence. Then where the time of a step goes, by torch's profiler. What has been measured is written as it comes; after N
seconds no further turn is begun.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import statistics
import string
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import open_clip
import torch
from measure import ON, Report, product_rate
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from abd_core import adversary, defences, graphs, models, towers
from abd_core.adversary import AdversaryConfig
from abd_core.data import Pairs, TrainingPairs, load_pairs
from abd_core.defences import DEFENCES, DefendConfig, FineTuningDefence
from abd_core.formats import load_image_pairs
from abd_core.generator import Perturbation, patch_side
from abd_core.text import augment, synonyms, tokenize
from abd_core.train import Step, parameter_groups

LARGE = ON.type == "cuda"
NAME, BATCH, STEPS, WARM, TURNS = ("RN50-quickgelu", 128, 24, 6, 3) if LARGE else (models.EMBEDDED, 64, 12, 4, 10)
WIDTH = 1024 if LARGE else 128  # of the adversary's generator and discriminator: AdvCLIP's, and the profile's
PAPER = 250_000 * 10  # image-caption pairs that the paper's defence sees
# Part of a step -> what the names of its operations, or of the ranges that they run in, begin with.
PARTS = {
    "images": ("images",),
    "augmentation": ("augmentation",),
    "optimiser": ("optimizer.step",),
    "convolution": ("aten::convolution", "aten::conv2d", "convolutionbackward"),
    "BatchNorm": ("aten::batch_norm", "nativebatchnorm", "cudnnbatchnorm", "_normalised"),
    "pooling": ("aten::avg_pool", "avgpool"),
    "attention and linear": (
        *("aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::matmul", "aten::scaled_dot_product"),
        *("addmmbackward", "mmbackward", "bmmbackward", "scaleddotproduct"),
    ),
}


class DrawnPairs(Pairs):
    """The embedded captions, with random images of another resolution that are on the device already."""

    @property
    def resolution(self) -> int:
        return 224

    def images(self, indices: torch.Tensor, *, seed: int, step: int, **_: object) -> torch.Tensor:
        generator = torch.Generator(ON).manual_seed(step)
        return torch.rand(len(indices), 3, 224, 224, generator=generator, device=ON)


def plain_step(pairs: Pairs, patch: torch.Tensor | None) -> Callable[[int], None]:
    """open_clip's model and loss as they are, in float32; AdamW parameter by parameter; with a patch, ABD's step."""
    model = open_clip.create_model(NAME, load_weights=False).to(ON).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-5, foreach=False, fused=False)
    mean, std = (torch.tensor(values, device=ON).view(3, 1, 1) for values in models.NORMALISATION)
    criterion = open_clip.ClipLoss()

    def step(number: int) -> None:
        indices = torch.arange(BATCH) + BATCH * number
        images = pairs.images(indices, seed=0, step=number).to(ON)
        if patch is not None:
            for image, (top, left) in zip(images, torch.randint(9, (BATCH, 2)).tolist(), strict=True):
                image[:, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
        captions = pairs.captions(indices, seed=0, epoch=0)
        if patch is not None:
            captions = augment(captions, seed=0, epoch=0, ids=[pairs.ids[i] for i in indices.tolist()])
        tokens = tokenize(captions, context_length=model.context_length).to(ON)
        image_features = model.encode_image((images - mean) / std, normalize=True)
        text_features = model.encode_text(tokens, normalize=True)
        loss = criterion(image_features, text_features, model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


class Spent(NamedTuple):
    """Of a run's steps from step `WARM` on."""

    seconds: float  # a step
    memory: int = 0  # bytes reserved at the peak, on a GPU
    beside: float = 0.0  # seconds of a step of what ran beside them, if anything did


class Clock:
    """Seconds a step, and bytes at the peak, from step `WARM` of a loop on.

    The bytes are those that torch has reserved: what a CUDA graph keeps is among them, and not among those allocated.

    Args:
        beside: is called with a step's number before the step, and timed on its own.
    """

    def __init__(self, profiler: profile | None = None, beside: Callable[[int], None] | None = None) -> None:
        self.profiler, self.beside = profiler, beside
        self.before = torch.cuda.memory_reserved() if LARGE else 0
        self.apart = 0.0  # seconds of what ran beside

    def at(self, step: int) -> None:
        """To be called as step number `step` begins."""
        began = time.perf_counter()
        if self.beside:
            self.beside(step)
        if step == WARM:
            if LARGE:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            if self.profiler:
                self.profiler.start()
            self.start, self.apart = time.perf_counter(), 0.0
        elif self.beside:
            self.apart += time.perf_counter() - began

    def read(self, steps: int) -> Spent:
        """To be called after so many steps."""
        if LARGE:
            torch.cuda.synchronize()
        taken = time.perf_counter() - self.start - self.apart
        if self.profiler:
            self.profiler.stop()
        memory = torch.cuda.max_memory_reserved() - self.before if LARGE else 0
        return Spent(taken / (steps - WARM), memory, self.apart / (steps - WARM - 1))


def beside(pairs: Pairs) -> Callable[[int], None] | None:
    """The plain loop's step, to be taken beside those that are compared with it; none on a GPU, which it would stop."""
    return None if LARGE else plain_step(pairs, None)


def plain_loop(pairs: Pairs, patch: torch.Tensor | None) -> Spent:
    clock = Clock(beside=None if patch is None else beside(pairs))
    step = plain_step(pairs, patch)
    for number in range(WARM + STEPS):
        clock.at(number)
        step(number)
    return clock.read(WARM + STEPS)


class Timed:
    """Pairs that tell a clock when the images of a step are asked for."""

    def __init__(self, pairs: TrainingPairs, clock: Clock) -> None:
        self.pairs, self.clock, self.step = pairs, clock, 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pairs, name)

    def images(self, *given: Any, **more: Any) -> torch.Tensor:
        self.clock.at(self.step)
        self.step += 1
        with record_function("images"):
            return self.pairs.images(*given, **more)


def defence_of(name: str, pairs: TrainingPairs, patch: torch.Tensor) -> FineTuningDefence:
    """The defence with BatchNorm in training, as the plain loop has it."""
    kind = DEFENCES[name]
    assert issubclass(kind, FineTuningDefence)
    perturbation = Perturbation("patch", patch, pairs.resolution, "random") if kind.needs_perturbation else None
    config = DefendConfig(defence=name, batch_size=BATCH, epochs=1, batch_norm="train")
    return kind(config, pairs, perturbation=perturbation)


def loop(
    name: str,
    pairs: TrainingPairs,
    patch: torch.Tensor,
    *,
    recorded: bool = True,
    trimmed: bool = True,
    compiled: bool = False,
    profiler: profile | None = None,
) -> Spent:
    """The stage's own training, `train.fit`, with this defence.

    Args:
        recorded: its encoders are CUDA graphs.
        trimmed: they leave out what no feature comes from (`towers`), else they are open_clip's own.
        compiled: the image encoder is compiled, and no graphs.
    """
    clock = Clock(profiler, None if profiler else beside(pairs))
    timed = Timed(pairs, clock)
    with ExitStack() as stack:
        if not recorded or compiled:
            stack.enter_context(mock.patch.object(graphs, "WARM", 10**9))
        if not trimmed:
            own = {"trim": lambda model: None, "encode_text": lambda model, tokens: model.encode_text(tokens)}
            stack.enter_context(mock.patch.multiple(towers, **own))
        model = models.build(NAME)
        if compiled:
            model.visual.compile()
        folder = stack.enter_context(TemporaryDirectory())
        defence_of(name, timed, patch).defend(model, Path(folder))
    return clock.read(timed.step)


def shares(name: str, pairs: TrainingPairs, patch: torch.Tensor) -> dict[str, float]:
    """Part -> % of the time of a defence's steps: of the CPU's, or of the GPU's own; "other" is what is left.

    No graphs: a recorded operation has no name. What a GPU waits for the CPU is in "other".
    """

    def in_range(function: Callable) -> Callable:
        return record_function("augmentation")(function)

    def own(event: Any) -> float:
        return event.self_device_time_total if LARGE else event.self_cpu_time_total

    def part(event: Any) -> str:
        """That of the outermost range or operation that has one."""
        found = "other"
        while event is not None:
            known = event.name.lower().removeprefix("autograd::engine::evaluate_function: ")
            found = next((part for part, names in PARTS.items() if known.startswith(names)), found)
            event = event.cpu_parent
        return found

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if LARGE else [])]
    profiler = profile(activities=activities)
    with (
        mock.patch.object(defences, "auto_augment", in_range(defences.auto_augment)),
        mock.patch.object(Perturbation, "__call__", in_range(Perturbation.__call__)),
    ):
        spent = loop(name, pairs, patch, recorded=False, profiler=profiler).seconds
    steps = len(pairs) // BATCH - WARM
    taken = Counter({part: 0.0 for part in PARTS})
    for event in profiler.events():
        taken[part(event)] += own(event) / 1e6
    found = {part: 100 * taken[part] / (steps * spent) for part in PARTS}
    return {**found, "other": 100 - sum(found.values())}


def operations(name: str, pairs: Pairs, patch: torch.Tensor) -> int:
    """Floating-point operations of a step of a defence or of the plain loop."""
    with FlopCounterMode(display=False) as counter:
        if name == "plain loop":
            plain_step(pairs, None)(0)
        else:
            defence = defence_of(name, pairs, patch)
            defence.loss(models.build(NAME).train(), Step(torch.arange(BATCH), 0, 0)).backward()
    return counter.get_total_flops()


class PastedOnCPU(Perturbation):
    """Image by image on the CPU, as AdvCLIP does it."""

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        images, patch = images.cpu().clone(), self.delta.cpu()
        side = patch.shape[-1]
        places = torch.randint(self.resolution - side + 1, (len(images), 2), generator=generator)
        for i, (top, left) in enumerate(places.tolist()):
            images[i, :, top : top + side, left : left + side] = patch
        return images.to(ON)


def adversary_loop(pairs: TrainingPairs, *, plain: bool) -> Spent:
    """The stage's own search: generator, discriminator, all terms of the loss.

    Args:
        plain: the same nets and losses as AdvCLIP arranges them: open_clip's towers in float32, no graphs, the patch
            pasted on the CPU.
    """
    mean, std = (torch.tensor(values, device=ON).view(3, 1, 1) for values in models.NORMALISATION)
    clock = Clock()
    timed = Timed(pairs, clock)

    def encode_image(model: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
        return model.encode_image((images - mean) / std, normalize=True)

    def encode_text(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
        return model.encode_text(tokens.to(ON), normalize=True)

    with ExitStack() as stack:
        if plain:
            stack.enter_context(mock.patch.object(graphs, "WARM", 10**9))
            stack.enter_context(mock.patch.object(towers, "trim", lambda model: None))
            stack.enter_context(mock.patch.multiple(models, encode_image=encode_image, encode_text=encode_text))
            stack.enter_context(mock.patch.object(adversary, "Perturbation", PastedOnCPU))
        suspect, normal = (models.frozen(models.build(NAME, seed=seed)) for seed in (0, 1))
        if plain:
            suspect, normal = (model.to(memory_format=torch.contiguous_format) for model in (suspect, normal))
        folder = stack.enter_context(TemporaryDirectory())
        config = AdversaryConfig(batch_size=BATCH, steps=WARM + STEPS, width=WIDTH)
        adversary.search(config, timed, suspect, normal, Path(folder))
    return clock.read(timed.step)


def tars(folder: Path, captions: Sequence[str]) -> str:
    """Address of tars with a JPEG file of 480 x 360 px a caption, of smooth noise, as img2dataset writes them."""
    generator = torch.Generator().manual_seed(0)
    for shard, part in enumerate(torch.arange(len(captions)).chunk(4)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in part.tolist():
                small = torch.randint(256, (36, 48, 3), generator=generator, dtype=torch.uint8).numpy()
                data = io.BytesIO()
                Image.fromarray(small).resize((480, 360), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
                for ending, content in {"jpg": data.getvalue(), "txt": captions[i].encode()}.items():
                    member = tarfile.TarInfo(f"{i:06}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{0..3}.tar")


def measured(
    report: Report, case: str, runs: Mapping[str, Callable[[], Spent]], *, until: float, turns: int = TURNS
) -> dict[str, float]:
    """Median seconds a step of each run; they take turns, there and back, and the table is written after each turn.

    "first run" are the seconds of all of a run's steps and of what comes before them, such as compiling; "later run"
    are those where something may have been kept. Both hold the steps that are taken beside.
    """
    spent: dict[str, list[Spent]] = {}
    whole: dict[str, list[float]] = {}
    median: dict[str, float] = {}
    for turn in range(turns):
        if time.monotonic() > until:
            break
        for name, run in [*runs.items()][:: -1 if turn % 2 else 1]:
            if time.monotonic() > until:
                break
            began = time.perf_counter()
            spent.setdefault(name, []).append(run())
            whole.setdefault(name, []).append(time.perf_counter() - began)
            gc.collect()
            if LARGE:
                torch.cuda.empty_cache()
        taken = {name: [run.seconds for run in own] for name, own in spent.items()}
        others = {name: [run.beside for run in own] for name, own in spent.items() if own[0].beside}
        median = report.times(case, "step", taken, beside=others, calls=STEPS)
        for name, seconds in median.items():
            report.note(case, name, "speed", "images/s", BATCH / seconds, n=STEPS * len(taken[name]))
            report.note(case, name, "first run", "s", whole[name][0])
            if later := whole[name][1:]:
                report.note(case, name, "later run", "s", statistics.median(later), n=len(later))
            if memory := spent[name][-1].memory:
                report.note(case, name, "peak memory reserved", "MiB", memory / 2**20)
        report.write()
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description="Times training steps on this machine into benchmarks/results.csv.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further turn after so many")
    parser.add_argument("--compiled", action="store_true", help="also with a compiled image encoder: minutes more")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    if given.compiled:
        cache = TemporaryDirectory()  # nothing has been compiled before the first run
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    report = Report("training step")
    pairs = load_pairs().take(range((WARM + STEPS) * BATCH))
    if LARGE:
        pairs = DrawnPairs(pairs.cells, pairs.labels, pairs.tags, pairs.ids)
    captions = pairs.captions(torch.arange(len(pairs)), seed=0, epoch=0)
    for word in {word.strip(string.punctuation) for caption in captions for word in caption.split()}:
        synonyms(word)  # looked up once in a run, not in each of its epochs
    side = patch_side(0.03, pairs.resolution)
    patch = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0)).to(ON)
    case = f"{NAME}, batch {BATCH}"
    with models.autocast(ON):  # the dtype in which the defences' products run
        half = torch.is_autocast_enabled(ON.type)
        ceiling = product_rate(torch.get_autocast_dtype(ON.type) if half else torch.float32)
    report.note(case, "ceiling", "matrix product", "TFLOP/s", ceiling / 1e12)
    runs: dict[str, Callable[[], Spent]] = {
        "plain loop": lambda: plain_loop(pairs, None),
        "ft": lambda: loop("ft", pairs, patch),
        "abd": lambda: loop("abd", pairs, patch),
        "abd, open_clip's towers": lambda: loop("abd", pairs, patch, trimmed=False),
    }
    if LARGE:
        runs["ft, no graphs"] = lambda: loop("ft", pairs, patch, recorded=False)
        runs["abd, no graphs"] = lambda: loop("abd", pairs, patch, recorded=False)
    runs["plain loop, patch and EDA"] = lambda: plain_loop(pairs, patch)
    runs["cleanclip"] = lambda: loop("cleanclip", pairs, patch)
    if given.compiled:
        runs["ft, compiled"] = lambda: loop("ft", pairs, patch, compiled=True)
        runs["abd, compiled"] = lambda: loop("abd", pairs, patch, compiled=True)
    taken = measured(report, case, runs, until=time.monotonic() + 0.45 * given.seconds)
    for name in ("plain loop", "ft", "abd", "cleanclip"):
        if name in taken and time.monotonic() < until:
            count = operations(name, pairs, patch)
            report.note(case, name, "operations", "GFLOP", count / 1e9)
            report.note(case, name, "share of the ceiling", "%", 100 * count / taken[name] / ceiling)
    for name in ("ft", "abd", "cleanclip"):
        if name in taken and time.monotonic() < until:
            for part, share in shares(name, pairs, patch).items():
                report.note(case, name, f"time in {part}", "%", share)
    report.write()
    if LARGE and "abd" in taken and time.monotonic() < until:
        report.note(case, "abd", "paper's defence, no loading", "GPU-hours", PAPER / BATCH * taken["abd"] / 3600)
        with TemporaryDirectory() as folder:
            address = tars(Path(folder), pairs.captions(torch.arange(20 * BATCH), seed=0, epoch=0))
            stored = load_image_pairs(address, resolution=pairs.resolution)
            stored = stored.take([*range(len(stored))] * 4)  # an epoch long enough for workers to get under way
            for name in ("ft", "abd"):
                if time.monotonic() < until:
                    spent = loop(name, stored, patch).seconds
                    variant, speed = f"{name} from tars", BATCH / spent
                    report.note(case, variant, "speed", "images/s", speed, ratio=taken[name] / spent)
                    report.note(case, variant, "paper's defence, with loading", "GPU-hours", PAPER / speed / 3600)
        report.write()
    adversaries = {"plain AdvCLIP": True, "abd_core": False}
    runs = {name: partial(adversary_loop, pairs, plain=plain) for name, plain in adversaries.items()}
    measured(Report("adversary step"), f"{case}, width {WIDTH}", runs, until=until, turns=2 if LARGE else TURNS)


if __name__ == "__main__":
    main()
