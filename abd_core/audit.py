"""May this checkpoint be trusted? An audit: detectors, a suspected target, a recovered trigger, a report.

It reads a suspect's weights, images, class names and, where there are some, clean reference weights: never an attack's
record. Weights are read as tensors, nothing in a checkpoint is executed.

    python -m abd_core.audit suspect.safetensors
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from abd_core import escape, models
from abd_core.config import AbdError, Config, ConfigError, derive_seed, digest, option
from abd_core.data import CELL, TEST_VIEWS, class_names, load_pairs, rng
from abd_core.detectors import CHUNK, DETECTORS, Detector, Finding, Observed, encode, observe
from abd_core.evaluate import Rate, rate
from abd_core.formats import read_image
from abd_core.generator import Perturbation
from abd_core.inputs import PairSource, own_pairs
from abd_core.kernels.perturb import add
from abd_core.paths import Run, RunError, atomic, load_or_make, read_json, regular, sha256, shown, write_json
from abd_core.text import TEMPLATES
from abd_core.verdict import Verdict, clean_below, judge

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
DEGENERATE = 0.5  # a model that gives more than this share of clean images to one class is no working classifier
BOUND = 8 / 255  # of a recovered additive trigger


@dataclass(frozen=True, kw_only=True)
class AuditInputs(PairSource):
    """What is audited, and with what; file names, none of which is part of a run's key: their contents are."""

    checkpoint: str = option("", "the suspect's weights, safetensors; empty in a notebook: chapter 1's victim")
    reference: str = option("embedded", "clean weights it may come from: a file, embedded (the base), or none")
    images: str = option("", "folder of clean images; empty: those of pairs, or the embedded ones")
    classes: str = option("", "text file with a class name a line; empty: the test set's")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images and self.pairs:
            raise ConfigError(f"AuditInputs.images = {self.images!r}: pairs = {self.pairs!r} too: one of them expected")


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Config):
    """Settings of an audit."""

    seed: int = option(0, "seed of every random draw", ge=0)
    count: int = option(256, "clean images that are looked at; half to optimise on, half to measure on", ge=16)
    preset: str = option(
        "ours", "detectors' settings: ours (fast), or published (their sources' own)", choices=("ours", "published")
    )
    share: float = option(0.5, "share of the pairs that the auditor holds, seeded", gt=0, le=1)
    limit: int = option(0, "use only this many pairs before the share is taken (0: all); for smoke runs", ge=0)
    recovery_steps: int = option(15, "gradient steps on the recovered trigger", ge=1)


# --- what is read ---------------------------------------------------------------------------------------------


def image_folder(folder: Path, count: int, resolution: int) -> torch.Tensor:
    """Images of a folder (and those below it), as CLIP sees them: RGB, cut to a square, float (N, 3, R, R) in [0, 1].

    Of more than `count`, evenly spaced ones in the order of their names.

    Raises:
        RunError: no such folder, an image that cannot be read, or fewer than 16 images.
    """
    if not folder.is_dir():
        raise RunError(f"missing folder: {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < 16:
        raise RunError(f"{folder}: {len(files)} images ({', '.join(SUFFIXES)}), at least 16 expected")
    chosen = [files[i * len(files) // min(count, len(files))] for i in range(min(count, len(files)))]
    rows = []
    for path in chosen:
        try:
            image = read_image(path).convert("RGB")
            square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
        except Exception as error:  # PIL raises many kinds for a damaged file
            raise RunError(f"damaged file: {path}: not an image ({error})") from None
        rows.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    return torch.stack(rows).float() / 255


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, a line each, also after a folder's name and a tab, as test sets have them.

    Raises:
        RunError: no such file, or no text.
        ConfigError: fewer than three names.
    """
    try:
        lines = regular(path).read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise RunError(f"damaged file: {path}: not a list of names ({error})") from None
    names = tuple(dict.fromkeys(line.rpartition("\t")[2].strip() for line in lines if line.strip()))
    if len(names) < 3:
        raise ConfigError(f"{path}: {len(names)} class name(s), at least 3 expected")
    return names


def _images(inputs: AuditInputs, config: AuditConfig, resolution: int) -> torch.Tensor:
    if inputs.images:
        images = image_folder(Path(inputs.images), config.count, resolution)
    elif inputs.pairs:
        own = own_pairs(inputs, resolution=resolution, limit=config.limit).subset(config.share, seed=config.seed)
        if len(own) < 16:
            raise ConfigError(f"pairs = {inputs.pairs!r}: {len(own)} for the audit, at least 16 expected")
        drawn = torch.randperm(len(own), generator=rng(config.seed, "audit images"))[: config.count]
        images = own.images(drawn).cpu()
    else:
        pairs = load_pairs(config.limit).subset(config.share, seed=config.seed)
        if pairs.resolution != resolution:
            raise ConfigError(
                f"the embedded images are {pairs.resolution} px, the suspect's {resolution} px: pass images or pairs"
            )
        if len(pairs) < 16:
            raise ConfigError(f"AuditConfig.limit = {config.limit}: {len(pairs)} for the audit, at least 16 expected")
        drawn = torch.randperm(len(pairs), generator=rng(config.seed, "audit images"))[: config.count]
        images = pairs.images(drawn, seed=config.seed, step=0, views=TEST_VIEWS)
    order = torch.randperm(len(images), generator=rng(config.seed, "audit order"))  # names may sort by class
    return images[order]


def looked_at(config: AuditConfig, inputs: AuditInputs) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The images (N, 3, R, R) in [0, 1] and the class names that an audit of `inputs.checkpoint` looks at."""
    names = read_classes(Path(inputs.classes)) if inputs.classes else tuple(class_names())
    return _images(inputs, config, models.resolution(models.load(Path(inputs.checkpoint)))), names


# --- findings on disk -------------------------------------------------------------------------------------------


def save_finding(finding: Finding, path: Path, *, seconds: float) -> None:
    record = json.dumps({"numbers": dict(finding.numbers), "seconds": seconds})
    tensors = {name: getattr(finding, name).contiguous() for name in ("shares", "patterns", "masks")}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"record": record})


def load_finding(path: Path) -> tuple[Finding, float]:
    """What `save_finding` wrote, and the seconds it took. Raises RunError where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as f:
            record = json.loads((f.metadata() or {})["record"])
            tensors = {name: f.get_tensor(name) for name in ("shares", "patterns", "masks")}
        return Finding(**tensors, numbers=record["numbers"]), record["seconds"]
    except OSError:
        raise RunError(f"missing file: {path}") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"damaged file: {path}: no detector's finding ({error})") from None


def detectors(preset: str) -> dict[str, Detector]:
    """One of each, with our settings or, where its source has some, with the published ones."""
    return {name: kind(**(kind.published if preset == "published" else {})) for name, kind in DETECTORS.items()}


def settings(preset: str) -> str:
    """Digest of which detectors there are, and with what settings: others make another audit."""
    return digest({name: vars(detector) for name, detector in detectors(preset).items()})


def _measured(
    detector: Detector, observed: Observed, path: Path, *, seed: int, ranked: Sequence[int] = ()
) -> tuple[Finding, float]:
    """The detector's finding, from `path` where an earlier process got so far."""
    if not path.exists():
        start = time.perf_counter()
        finding = detector.measure(observed, seed=seed, ranked=ranked)
        save_finding(finding, path, seconds=round(time.perf_counter() - start, 2))
    return load_finding(path)


def baseline(config: AuditConfig, reference: Path, images: torch.Tensor, names: Sequence[str]) -> Run:
    """Load or make what the comparing detectors measure of clean weights; audits of many suspects share it."""
    inputs = {"reference": sha256(reference), **_digests(images, names), "detectors": settings(config.preset)}

    def make(folder: Path) -> Mapping[str, Any]:
        observed = observed_of(reference, images, names)
        for detector in detectors(config.preset).values():
            if detector.compares:
                _measured(detector, observed, folder / f"{detector.name}.safetensors", seed=config.seed)
        return {}

    return load_or_make("baseline", config, inputs, make)


def _digests(images: torch.Tensor, names: Sequence[str]) -> dict[str, str]:
    pixels = images.mul(255).round().to(torch.uint8).numpy().tobytes()
    return {"images": digest(derive_seed(pixels)), "classes": digest(list(names))}


def observed_of(weights: Path, images: torch.Tensor, names: Sequence[str]) -> Observed:
    """What the detectors look at: the model at `weights`, on `images` and class `names` as `looked_at` gives them."""
    return observe(models.load(weights), images.to(models.device()), names, TEMPLATES)


# --- the audit ------------------------------------------------------------------------------------------------


def audit(config: AuditConfig, inputs: AuditInputs, *, force: bool = False) -> Run:
    """Load or make the audit of a suspect.

    Its folder holds a `<detector>.safetensors` each, `recovered.safetensors` (the recovered trigger, a `Perturbation`
    that a defence can be given), `saliency.safetensors`, and, written anew from the present calibration whenever it is
    called, `audit.json` and `audit.html`. Its metrics hold the detectors' statistics and the suspected class with and
    without the reference (a detector that `follows` is measured for both, `<detector>-<mode>.safetensors`), the classes
    in the order of suspicion, the recovered trigger's success on images of other classes, and the times.

    Raises:
        RunError: a file is missing or damaged.
        ConfigError: no checkpoint is named, or images, reference and suspect do not fit together.
    """
    if not inputs.checkpoint:
        raise ConfigError("AuditInputs.checkpoint = '': the file of the suspect's weights expected")
    suspect, reference = Path(inputs.checkpoint), _reference(inputs)
    images, names = looked_at(config, inputs)
    size = images.shape[-1]
    if reference is not None and (other := models.resolution(models.load(reference))) != size:
        raise ConfigError(
            f"AuditInputs.reference = {inputs.reference!r}: clean weights for {other} px, the suspect's are for {size}"
            " px: those that it comes from expected, or 'none'"
        )
    keys = {"suspect": sha256(suspect), **_digests(images, names), "detectors": settings(config.preset)}
    if reference is not None:
        keys["reference"] = sha256(reference)

    def make(folder: Path) -> Mapping[str, Any]:
        compared = baseline(config, reference, images, names) if reference is not None else None
        observed = observed_of(suspect, images, names)
        used = detectors(config.preset)
        statistics: dict[str, dict[str, float]] = {}
        suspected, seconds = {}, {}
        for mode in ("alone",) if compared is None else ("alone", "compared"):
            statistics[mode] = {}
            scores: dict[str, torch.Tensor] = {}
            for name, detector in used.items():
                known = None
                if detector.compares and compared is not None and mode == "compared":
                    known, _ = load_finding(compared.file(f"{name}.safetensors"))
                stem = f"{name}-{mode}" if detector.follows else name
                led = _ranking(scores) if detector.follows else ()
                path = folder / f"{stem}.safetensors"
                finding, seconds[stem] = _measured(detector, observed, path, seed=config.seed, ranked=led)
                statistics[mode] |= detector.statistics(finding, known)
                scores[name] = detector.suspicion(finding, known)
            ranked = _ranking(scores)
            suspected[mode] = names[ranked[0]]
        start = time.perf_counter()
        drift, _ = load_finding(folder / "drift.safetensors")
        found = recover(observed, ranked[0], drift, seed=config.seed, steps=config.recovery_steps)
        found.perturbation.save(folder / "recovered.safetensors")
        with atomic(folder / "saliency.safetensors") as temporary:
            save_file({"saliency": found.saliency.contiguous()}, temporary)
        seconds["recovery"] = round(time.perf_counter() - start, 2)
        shares = torch.bincount(observed.predicted, minlength=len(names)).float() / len(images)
        return {
            "statistics": statistics,
            "suspected": suspected,
            "classes": [names[k] for k in ranked[:10]],
            "suspicion": {name: [round(s[k].item(), 3) for k in ranked[:10]] for name, s in scores.items()},
            "recovered": {"kind": found.perturbation.mode, "asr": found.asr and dataclasses.asdict(found.asr)},
            "works": bool(shares.max().item() <= DEGENERATE),
            "largest_share": shares.max().item(),
            "images": len(images),
            "class_count": len(names),
            "detector_seconds": seconds,
            "measuring_seconds": round(sum(seconds.values()), 1),
        }

    run = load_or_make("audit", config, keys, make, force=force)
    write_report(run, inputs, config)
    return run


def check_places(inputs: AuditInputs) -> None:
    """Raises RunError where a file or folder that is named, but for the suspect's, is missing."""
    if inputs.images and not Path(inputs.images).is_dir():
        raise RunError(f"missing folder: {inputs.images}")
    for path in (_reference(inputs), Path(inputs.classes) if inputs.classes else None):
        if path is not None:
            regular(path)


def _reference(inputs: AuditInputs) -> Path | None:
    named = {"embedded": models.clean_weights(), "none": None}
    return named[inputs.reference] if inputs.reference in named else Path(inputs.reference)


def _ranking(scores: Mapping[str, torch.Tensor]) -> list[int]:
    """Classes by the sum of what each detector says (`Detector.suspicion`), each heard up to 10."""
    return torch.stack([s.clamp(0, 10) for s in scores.values()]).sum(0).argsort(descending=True, stable=True).tolist()


# --- the recovered trigger --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recovered:
    """A trigger that the audit made: what it is, its success on held-out images, and where the model looks under it.

    Attributes:
        asr: None where the model gives all held-out images to the class anyway.
        saliency: float (R, R) in [0, 1]: mean magnitude of the target cosine's gradient by pixels of stamped images.
    """

    perturbation: Perturbation
    asr: Rate | None
    saliency: torch.Tensor


def recover(observed: Observed, target: int, drift: Finding, *, seed: int, steps: int, batch: int = 24) -> Recovered:
    """The better of two triggers towards class `target`: the drifting patch, driven on towards it, and a small field.

    Args:
        drift: the finding that has patches and their shares; the patch which sent most images to `target` is taken.
    """
    images, size = observed.images, observed.images.shape[-1]
    slot = int(drift.shares[:, target].argmax())
    rows, columns = drift.masks[slot, 0].nonzero(as_tuple=True)
    top, left, side = int(rows.min()), int(columns.min()), int(rows.max() - rows.min()) + 1
    square = drift.patterns[slot, :, top : top + side, left : left + side].clone()
    starts = {"patch": square, "additive": torch.zeros(3, size, size)}
    held = images[observed.half :]
    other = (observed.predicted[observed.half :] != target).cpu()
    reached: dict[str, float] = {}
    made: dict[str, tuple[Perturbation, Rate | None]] = {}
    for mode, start in starts.items():
        source = rng(seed, "recover", mode)
        delta = start.to(images.device).requires_grad_()
        optimizer = torch.optim.Adam([delta], lr=0.1 if mode == "patch" else BOUND / 4, betas=(0.5, 0.9))
        for _ in range(steps):
            drawn = torch.randperm(observed.half, generator=source)[:batch]
            features = models.encode_image(
                observed.model, Perturbation(mode, delta, size, "fixed", (top, left))(images[drawn])
            )
            optimizer.zero_grad()
            (-(features @ observed.classes[target]).mean()).backward()
            optimizer.step()
            with torch.no_grad():
                delta.clamp_(*((0, 1) if mode == "patch" else (-BOUND, BOUND)))
        found = Perturbation(mode, delta.detach(), size, "fixed", (top, left))
        answers = (encode(observed.model, found(held)) @ observed.classes.T).argmax(1).cpu()
        hits = (answers == target)[other]
        asr = rate(hits, torch.arange(len(hits))) if len(hits) else None
        made[mode], reached[mode] = (found, asr), asr.value if asr else 0.0
    perturbation, asr = made[max(reached, key=lambda mode: reached[mode])]  # the patch, where both reach the same
    stamped = perturbation(held[:CHUNK]).detach().requires_grad_()
    near = (models.encode_image(observed.model, stamped) @ observed.classes[target]).sum()
    (gradient,) = torch.autograd.grad(near, stamped)
    saliency = gradient.abs().mean((0, 1)).cpu()
    stored = dataclasses.replace(perturbation, delta=perturbation.delta.cpu())
    return Recovered(stored, asr, saliency / saliency.max().clamp_min(1e-12))


# --- the report -------------------------------------------------------------------------------------------------


def verdict_of(run: Run) -> Verdict:
    """What the committed calibration says of an audit's statistics, and what it rests on."""
    mode = "compared" if "compared" in run.metrics["statistics"] else "alone"
    preset, metrics = read_json(run.file("config.json"))["config"]["preset"], run.metrics
    terms = {"classes": metrics["class_count"], "images": metrics["images"], "works": metrics["works"]}
    return judge(metrics["statistics"][mode], mode=mode, preset=preset, **terms)


def next_step(inputs: AuditInputs, run: Run) -> str:
    """A defence with the suspect and what the audit found, as Python to run at the checkout's root."""
    recovered = run.file("recovered.safetensors")
    suspect, trigger = (shown(Path(name).resolve()) for name in (inputs.checkpoint, recovered))
    own = {name: value for name, value in inputs.places().items() if name in PairSource.names()}
    if Perturbation.load(recovered).resolution != CELL:  # the embedded ones are too small
        own = {"pairs": "ADDRESS OF CLEAN PAIRS", "test_images": "FOLDER OF TEST IMAGES", **own}
    given = "".join(f", {name}={value!r}" for name, value in own.items())
    lines = [
        "from pathlib import Path",
        "from abd_core.defend import DefendConfig, defend",
        f"defended = defend(DefendConfig(defence='abd', view='both'{given}), Path({suspect!r}),",
        f"                  perturbation=Path({trigger!r}))",
        "print(defended.metrics, defended.file('model.safetensors'))",
    ]
    return "\n".join(lines)


def picture(run: Run, *, scale: int = 4) -> dict[str, Image.Image]:
    """The recovered trigger on grey and the saliency, enlarged, as pictures."""
    found = Perturbation.load(run.file("recovered.safetensors"))
    grey = torch.full((1, 3, found.resolution, found.resolution), 0.5)
    shown_trigger = found(grey)[0]
    if found.mode == "additive":
        shown_trigger = add(grey, found.delta * 0.5 / found.delta.abs().max().clamp_min(1e-8))[0]
    with safe_open(run.file("saliency.safetensors"), framework="pt") as f:
        saliency = f.get_tensor("saliency")
    rows = {"recovered trigger": shown_trigger, "where it acts": saliency.expand(3, -1, -1)}
    side = found.resolution * max(1, scale * 64 // found.resolution)
    return {
        name: Image.fromarray(
            pixels.permute(1, 2, 0).clamp(0, 1).mul(255).round().to(torch.uint8).contiguous().numpy()
        ).resize((side, side), Image.Resampling.NEAREST)
        for name, pixels in rows.items()
    }


def record(run: Run, inputs: AuditInputs, config: AuditConfig) -> dict[str, Any]:
    """The audit as one JSON-able record."""
    verdict, metrics = verdict_of(run), run.metrics
    rests_on = {
        name: {"title": kind.title, "source": kind.source, "says": metrics["suspicion"][name][0]}
        for name, kind in DETECTORS.items()
    }
    return {
        "verdict": dataclasses.asdict(verdict),
        "sentence": verdict.sentence(metrics["classes"][0]),
        "suspected_target": metrics["classes"][0],
        "runners_up": metrics["classes"][1:4],
        "statistics": metrics["statistics"],
        "clean_models_below": {
            mode: clean_below(values, mode) if config.preset == "ours" else {}  # the population's settings
            for mode, values in metrics["statistics"].items()
        },
        "detectors": rests_on,
        "recovered_trigger": {**metrics["recovered"], "file": "recovered.safetensors"},
        "inputs": {**inputs.to_dict(), "digests": read_json(run.file("config.json"))["inputs"]},
        "config": config.to_dict(),
        "seconds": metrics["measuring_seconds"],
        "next_step": next_step(inputs, run),
    }


def write_report(run: Run, inputs: AuditInputs, config: AuditConfig) -> None:
    """Write `audit.json` and the self-contained page `audit.html` into the run's folder."""
    whole = record(run, inputs, config)
    write_json(run.file("audit.json"), whole)
    with atomic(run.file("audit.html")) as temporary:
        temporary.write_text(page(whole, picture(run)), encoding="utf-8")


def page(whole: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> str:
    """The record as HTML with its pictures inside: no script, nothing that is loaded from elsewhere."""

    def cell(value: Any) -> str:
        return f"<td>{escape.markup(f'{value:.3g}' if isinstance(value, float) else value)}</td>"

    def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
        top = "".join(f"<th>{escape.markup(name)}</th>" for name in head)
        body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
        return f"<table><tr>{top}</tr>{body}</table>"

    def image(name: str, picture: Image.Image) -> str:
        held = io.BytesIO()
        picture.save(held, "PNG")
        data = base64.b64encode(held.getvalue()).decode()
        label = escape.markup(name)
        return (
            f'<figure><img alt="{label}" src="data:image/png;base64,{data}"><figcaption>{label}</figcaption></figure>'
        )

    trigger = whole["recovered_trigger"]
    reach = (
        f"{Rate(**trigger['asr'])} % of {trigger['asr']['n']} images of other classes" if trigger["asr"] else "no image"
    )
    rows = [[d["title"], d["says"], d["source"]] for d in whole["detectors"].values()]
    below = {
        mode: {name: f"{k} of {n}" for name, (k, n) in v.items()} for mode, v in whole["clean_models_below"].items()
    }
    figures = [
        [mode, name, value, below[mode].get(name, "")]
        for mode, values in whole["statistics"].items()
        for name, value in values.items()
    ]
    given = [[name, value] for part in ("inputs", "config") for name, value in whole[part].items()]
    style = (
        "body{font:15px/1.5 sans-serif;max-width:48em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left}figure{display:inline-block;margin:0 1em 0 0}"
        "pre{background:#eee;padding:.6em;overflow:auto}img{image-rendering:pixelated}"
    )
    parts = [
        f"<h1>Audit</h1><p><b>{escape.markup(whole['sentence'])}</b></p>",
        f"<p>{escape.markup(whole['verdict']['basis'])}</p>",
        f"<p>Suspected target: <b>{escape.markup(whole['suspected_target'])}</b>; "
        f"runners-up: {escape.markup(', '.join(whole['runners_up']))}.</p>",
        f"<p>The recovered trigger ({escape.markup(trigger['kind'])}) sends {reach} there.</p>",
        "".join(image(name, picture) for name, picture in pictures.items()),
        "<h2>Detectors</h2><p>How far the suspected class stands out: tenths of the images that go there (drift, "
        "answers under corruptions), else robust standard deviations above the median class.</p>",
        table(["detector", "suspected class", "source"], rows),
        "<h2>Statistics</h2>",
        table(["against the reference", "statistic", "value", "clean models below"], figures),
        f"<h2>Next step</h2><pre>{html.escape(whole['next_step'])}</pre>",
        "<h2>Settings</h2>",
        table(["setting", "value"], given),
    ]
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Audit</title><style>{style}</style></head>'
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m abd_core.audit", description="Audits a CLIP checkpoint.")
    parser.add_argument("checkpoint")
    kinds: tuple[type[Config], ...] = (AuditInputs, AuditConfig)
    for field in (field for kind in kinds for field in dataclasses.fields(kind) if field.name != "checkpoint"):
        name, text = field.name.replace("_", "-"), field.metadata["help"]
        parser.add_argument(f"--{name}", default=field.default, metavar="VALUE", help=f"{text} ({field.default!r})")
    given = vars(parser.parse_args(arguments))
    inputs = AuditInputs.from_parameters({name: given[name] for name in AuditInputs.names()})
    run = audit(AuditConfig.from_parameters({name: given[name] for name in AuditConfig.names()}), inputs)
    print(escape.terminal(read_json(run.file("audit.json"))["sentence"]))
    print(f"Report: {shown(run.file('audit.html'))}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AbdError as error:
        sys.exit(str(error))
