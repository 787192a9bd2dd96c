"""Steps of training and of the adversary against the same in a plain loop: images a second, and memory on a GPU.

    python benchmarks/steps.py

On the CPU: the embedded benchmark's model and pairs, drawing of the views and captions included. On a GPU:
`RN50-quickgelu` at 224 px on random images that are there already, then from tars, and what that makes of the paper's
defence.
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import open_clip
import torch
from measure import ON, Report, peak_bytes, product_rate, seconds
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from abd_core import models
from abd_core.data import Pairs, load_pairs
from abd_core.defences import DEFENCES, DefendConfig
from abd_core.formats import load_image_pairs
from abd_core.generator import Generator, Perturbation, patch_side
from abd_core.losses import adversarial_loss, backdoor_loss
from abd_core.text import tokenize
from abd_core.train import Step, parameter_groups

LARGE = ON.type == "cuda"
NAME, BATCH, REPEATS = ("RN50-quickgelu", 128, 20) if LARGE else (models.EMBEDDED, 64, 12)
PAPER = 250_000 * 10  # image-caption pairs that the paper's defence sees


class DrawnPairs(Pairs):
    """The embedded captions, with random images of another resolution that are on the device already."""

    @property
    def resolution(self) -> int:
        return 224

    def images(self, indices: torch.Tensor, *, seed: int, step: int, **_: object) -> torch.Tensor:
        generator = torch.Generator(ON).manual_seed(step)
        return torch.rand(len(indices), 3, 224, 224, generator=generator, device=ON)


def plain_step(pairs: Pairs, patch: torch.Tensor | None) -> Callable[[int], None]:
    """float32, contiguous tensors, plain attention kernels' choice, AdamW parameter by parameter, open_clip's loss."""
    model = models.build(NAME).to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-5, foreach=False, fused=False)
    mean, std = (torch.tensor(values, device=ON).view(3, 1, 1) for values in models.NORMALISATION)
    criterion = open_clip.ClipLoss()

    def step(number: int) -> None:
        indices = torch.arange(BATCH) + BATCH * number
        images = pairs.images(indices, seed=0, step=number).to(ON)
        if patch is not None:
            for image, (top, left) in zip(images, torch.randint(9, (BATCH, 2)).tolist(), strict=True):
                image[:, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
        tokens = tokenize(pairs.captions(indices, seed=0, epoch=0), context_length=model.context_length).to(ON)
        image_features = model.encode_image((images - mean) / std, normalize=True)
        text_features = model.encode_text(tokens, normalize=True)
        loss = criterion(image_features, text_features, model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def step_of(name: str, pairs: Pairs, patch: torch.Tensor, *, compiled: bool = False) -> Callable[[int], None]:
    """A step of `train.fit` with this defence's loss."""
    kind, config = DEFENCES[name], DefendConfig(defence=name)
    perturbation = Perturbation("patch", patch, pairs.resolution, "random") if kind.needs_perturbation else None
    defence = kind(config, pairs, perturbation=perturbation)
    model = models.build(NAME).train()
    if compiled:
        model.visual.compile()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-5, fused=True)

    def step(number: int) -> None:
        loss = defence.loss(model, Step(torch.arange(BATCH) + BATCH * number, 0, number))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def adversary_step(pairs: Pairs, side: int, *, plain: bool) -> Callable[[int], None]:
    """The generator's step with Eq. (2). `plain` as AdvCLIP has it: float32, the patch pasted on the CPU."""
    suspect, normal = (models.frozen(models.build(NAME, seed=seed)) for seed in (0, 1))
    if plain:
        suspect, normal = (model.to(memory_format=torch.contiguous_format) for model in (suspect, normal))
    generator = Generator(side, width=128, seed=0).to(ON)
    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    mean, std = (torch.tensor(values, device=ON).view(3, 1, 1) for values in models.NORMALISATION)

    def image_features(model: open_clip.CLIP, images: torch.Tensor) -> torch.Tensor:
        if plain:
            return model.encode_image((images - mean) / std, normalize=True)
        return models.encode_image(model, images)

    def pasted(images: torch.Tensor, patch: torch.Tensor, source: torch.Generator) -> torch.Tensor:
        if not plain:
            return Perturbation("patch", patch, pairs.resolution, "random")(images, source)
        images, patch = images.cpu().clone(), patch.cpu()
        for i, (top, left) in enumerate(torch.randint(9, (len(images), 2)).tolist()):
            images[i, :, top : top + side, left : left + side] = patch
        return images.to(ON)

    def step(number: int) -> None:
        source = torch.Generator().manual_seed(number)
        indices = torch.arange(BATCH) + BATCH * number
        images = pairs.images(indices, seed=0, step=number).to(ON)
        captions = pairs.captions(indices, seed=0, epoch=0)
        with torch.no_grad():
            tokens = tokenize(captions, context_length=suspect.context_length).to(ON)
            text = suspect.encode_text(tokens, normalize=True) if plain else models.encode_text(suspect, tokens)
            original = image_features(suspect, images)
        perturbed = pasted(images, (generator() + 1) / 2, source)
        adversarial = image_features(suspect, perturbed)
        reference = image_features(normal, perturbed)
        loss = adversarial_loss(original, adversarial, text, tau=0.1) + backdoor_loss(reference, adversarial, tau=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


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


def loaded_speed(address: str, patch: torch.Tensor) -> float:
    """Images a second of fine-tuning from tars, reading and decoding included."""
    pairs = load_image_pairs(address, resolution=models.resolution(models.build(NAME)))
    step, batches, warm = step_of("ft", pairs, patch), len(pairs) // BATCH, 8
    numbers = [*range(batches)] * 6
    pairs.plan(torch.arange(BATCH) + BATCH * number for number in numbers)
    for done, number in enumerate(numbers):
        if done == warm:
            start = time.perf_counter()
        step(number)
    return BATCH * (len(numbers) - warm) / (time.perf_counter() - start)


def main() -> None:
    report = Report("training step")
    pairs = load_pairs()
    if LARGE:
        pairs = DrawnPairs(pairs.cells, pairs.labels, pairs.tags, pairs.ids)
    side = patch_side(0.03, pairs.resolution)
    patch = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0)).to(ON)
    case = f"{NAME}, batch {BATCH}"
    steps = {
        "plain loop": plain_step(pairs, None),
        "plain loop with a patch": plain_step(pairs, patch),
        **{kind: step_of(kind, pairs, patch) for kind in ("ft", "abd", "cleanclip")},
    }
    counts = dict.fromkeys(steps, 0)

    def next_step(name: str) -> None:
        counts[name] += 1
        steps[name](counts[name] % (len(pairs) // BATCH - 1))

    ceiling = product_rate(torch.bfloat16 if LARGE else torch.float32, size=8192 if LARGE else 1024)
    report.note(case, "ceiling", "matrix product", "TFLOP/s", ceiling / 1e12)
    taken = seconds({name: lambda name=name: next_step(name) for name in steps}, repeats=REPEATS)
    report.add(case, "step", "ms", {name: 1e3 * spent for name, spent in taken.items()}, n=REPEATS)
    for name, spent in taken.items():
        report.note(case, name, "speed", "images/s", BATCH / spent)
        with FlopCounterMode(display=False) as counter:
            next_step(name)
        report.note(case, name, "operations", "GFLOP", counter.get_total_flops() / 1e9)
        report.note(case, name, "share of the ceiling", "%", 100 * counter.get_total_flops() / spent / ceiling)
    if LARGE:
        for name in steps:
            report.note(case, name, "peak memory", "MiB", peak_bytes(lambda name=name: next_step(name)) / 2**20)
        report.note(case, "abd", "paper's defence, no loading", "GPU-hours", PAPER / BATCH * taken["abd"] / 3600)
        with TemporaryDirectory() as folder:
            speed = loaded_speed(tars(Path(folder), pairs.captions(torch.arange(20 * BATCH), seed=0, epoch=0)), patch)
        report.note(case, "ft from tars", "speed", "images/s", speed, ratio=speed * taken["ft"] / BATCH)
        report.note(case, "ft from tars", "paper's defence, with loading", "GPU-hours", PAPER / speed / 3600)
    report.write()
    report = Report("adversary step")
    steps = {
        name: adversary_step(pairs, side, plain=plain)
        for name, plain in {"plain AdvCLIP": True, "abd_core": False}.items()
    }
    counts = dict.fromkeys(steps, 0)
    taken = seconds({name: lambda name=name: next_step(name) for name in steps}, repeats=REPEATS)
    report.add(case, "step", "ms", {name: 1e3 * spent for name, spent in taken.items()}, n=REPEATS)
    report.write()
    if LARGE:  # on the CPU, the image encoder gains nothing by being compiled
        report = Report("compiled training step")
        steps = {"abd": step_of("abd", pairs, patch), "abd compiled": step_of("abd", pairs, patch, compiled=True)}
        counts = dict.fromkeys(steps, 0)
        start = time.perf_counter()
        next_step("abd compiled")
        report.note(case, "abd compiled", "first step", "s", time.perf_counter() - start)
        taken = seconds({name: lambda name=name: next_step(name) for name in steps}, repeats=REPEATS)
        report.add(case, "step", "ms", {name: 1e3 * spent for name, spent in taken.items()}, n=REPEATS)
        report.write()


if __name__ == "__main__":
    main()
