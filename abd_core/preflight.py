"""Before a long run on data of one's own: is everything there, does it fit, and how long will it take?

    python -m abd_core.preflight -f profiles/paper/03_defend.yaml -p pairs 'cc3m/{00000..00331}.tar' -p ...

The hours are projected from a rehearsal: the stage's own training steps, on its own pairs, read by its own workers.
"""

from __future__ import annotations

import argparse
import gc
import math
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from abd_core import formats, inputs, models
from abd_core.adversary import AdversaryConfig, search
from abd_core.config import AbdError, Config, digest
from abd_core.data import TestSet, TrainingPairs, class_index, load_pairs
from abd_core.defences import DEFENCES, DefendConfig, FineTuningDefence
from abd_core.evaluate import check_others, image_features
from abd_core.generator import Perturbation, patch_side
from abd_core.inputs import TrainInputs
from abd_core.notebook import add_parameters, given_parameters, stage_configs
from abd_core.paths import cache_dir, environment, read_json, runs_dir, shown, write_json
from abd_core.poison import PoisonConfig, drawn_trigger
from abd_core.text import tokenize
from abd_core.train import TrainConfig, steps_an_epoch
from abd_core.triggers import TRIGGERS

STEPS, WARM = 20, 5  # of a rehearsal: so many are counted at least, after so many that are not
SAMPLE = 256  # captions and test images that are looked at
GIB = 1 << 30
# Settings of poisoning that its rehearsal by plain fine-tuning shares.
_ALIKE = ("seed", "batch_size", "lr", "weight_decay", "accumulate", "micro_batch", "sync_batch_norm", *inputs.SHARED)
STAGES: dict[str, type[Config]] = {"poison": PoisonConfig, "adversary": AdversaryConfig, "defend": DefendConfig}


class PreflightError(AbdError):
    """Something is missing, does not fit or would not work; the screen above it says what."""


@dataclass(frozen=True)
class Check:
    """One line of the screen."""

    name: str
    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name:12} {self.text}"


class _Timed:
    """The same pairs, with a note of when each batch's images were asked for since the last plan.

    Once the training is warm, reading ahead begins anew: what workers read while the first steps took their time would
    hide how fast they are.
    """

    def __init__(self, pairs: TrainingPairs) -> None:
        self.pairs, self.batches, self.times = pairs, list[torch.Tensor](), list[float]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pairs, name)

    def __len__(self) -> int:
        return len(self.pairs)

    def plan(self, batches: Iterable[torch.Tensor]) -> None:
        self.batches = list(batches)
        self.times.clear()
        self.pairs.plan(self.batches)

    def images(self, indices: torch.Tensor, *, seed: int, step: int) -> torch.Tensor:
        if self.batches and len(self.times) == WARM:
            self.pairs.plan(self.batches[WARM:])
        self.times.append(time.perf_counter())
        return self.pairs.images(indices, seed=seed, step=step)

    def seconds(self) -> float:
        """Mean seconds from one batch to the next, after those that the workers began with.

        Workers that are slower than the training deliver in bursts, of a batch each: most gaps are next to nothing, and
        a mean over whole rounds of them is their rate. Of fewer batches, the later half counts.
        """
        times = self.times if len(self.times) > 1 else [*self.times, time.perf_counter()]
        counted = times[_skipped() if len(times) >= _rehearsal() else (len(times) - 1) // 2 :]
        return (counted[-1] - counted[0]) / (len(counted) - 1)


def _skipped() -> int:
    """Batches of a rehearsal that are not counted: the training's first, and those that workers read at once."""
    return WARM + 2 * formats.workers()


def _rehearsal() -> int:
    """Batches of a whole rehearsal: as many gaps between them as are whole rounds of the workers are counted."""
    workers = max(1, formats.workers())
    return _skipped() + math.ceil(STEPS / workers) * workers + 1


def preflight(*configs: Any) -> None:
    """Check what these stages (upstream first) will read and need, and print it on one screen.

    On the embedded benchmark nothing is printed, and all that is checked is whether its pairs suffice for a step. What
    was found in order is kept in the cache, and shown again without a second rehearsal for the same settings on the
    same machine.

    Raises:
        PreflightError: a check failed.
        ConfigError: too few of the embedded pairs.
    """
    if not any(config.outside for config in configs):
        for config in configs:
            if isinstance(config, TrainConfig):
                pairs = load_pairs(config.limit)
                steps_an_epoch(len(pairs.subset(getattr(config, "share", 1.0), seed=config.seed)), config)
        return
    machine = {name: environment()[name] for name in ("device", "threads")} | {"workers": formats.workers()}
    asked = [[type(c).__name__, c.key(), c.places()] for c in configs]
    kept = cache_dir() / f"preflight-{digest([asked, machine])[:16]}.json"
    if kept.exists():
        print("\n".join(["Preflight, as found before:", *read_json(kept)]))
        return
    print("Preflight:")
    checks = []
    for check in _checks(configs):
        print(check, flush=True)
        checks.append(check)
    if failed := [f"{check.name}: {check.text}" for check in checks if not check.ok]:
        raise PreflightError(f"preflight: {len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}")
    write_json(kept, [str(check) for check in checks])


def _checks(configs: Sequence[Any]) -> Iterable[Check]:
    """The checks in their order; one that stands on a failed one is left out."""
    first, found = configs[0], dict[str, Any]()

    def tried(name: str, call: Callable[[], tuple[str, Any]]) -> Check:
        try:
            text, found[name] = call()
            return Check(name, True, text)
        except AbdError as error:
            return Check(name, False, str(error))
        except torch.OutOfMemoryError:
            return Check(name, False, "the device's memory is too small for this batch size: lower batch_size")

    yield tried("weights", lambda: _weights(first))
    if "weights" not in found:
        return
    clean = found["weights"]
    yield tried("pairs", lambda: _pairs(first, clean))
    yield tried("test images", lambda: _test(first, clean))
    if "pairs" in found:
        yield tried("captions", lambda: _captions(found["pairs"], clean))
    for config in configs:
        if isinstance(config, PoisonConfig) and "test images" in found:
            yield tried("target", lambda c=config: _target(c, found["test images"], found.get("pairs")))  # type: ignore[misc]
            yield tried("trigger", lambda c=config: _trigger(c, found["test images"]))  # type: ignore[misc]
    yield tried("disk", lambda: _disk(configs, clean))
    if "pairs" in found and "test images" in found:
        for config in configs:
            stage = next(name for name, kind in STAGES.items() if isinstance(config, kind))
            yield tried(stage, lambda c=config: _rehearsed(c, clean, found["pairs"], found["test images"]))  # type: ignore[misc]
            _free()  # for the next, and for the ranks that will start beside this process


def _weights(config: TrainInputs) -> tuple[str, Path]:
    path = inputs.clean_weights(config)
    model = models.load(path)
    count = sum(p.numel() for p in model.parameters())
    return f"{model.architecture}, {count / 1e6:.1f} M parameters, images of {models.resolution(model)} px", path


def _pairs(config: Any, clean: Path) -> tuple[str, TrainingPairs]:
    pairs = inputs.training_pairs(config, clean)
    left_out = len(getattr(pairs, "damaged", ()))
    return f"{len(pairs)} pairs, {left_out} damaged ones left out", pairs


def _captions(pairs: TrainingPairs, clean: Path) -> tuple[str, None]:
    sample = torch.arange(len(pairs))[:: max(1, len(pairs) // SAMPLE)]
    captions = pairs.captions(sample, seed=0, epoch=0)
    length = models.load(clean).context_length
    tokens = tokenize(captions, context_length=length)
    empty = sum(not caption.strip() for caption in captions) / len(captions)
    cut = (tokens[:, -1] != 0).float().mean().item()  # the last token is the end's, or there is none to spare
    words = statistics.median(len(caption.split()) for caption in captions)
    if empty > 0.5:
        raise AbdError(f"{empty:.0%} of {len(captions)} captions are empty")
    text = f"median of {words:g} words, {empty:.1%} empty, {cut:.1%} fill or exceed {length} tokens; first: "
    return text + repr(captions[0][:60]), None


def _test(config: Any, clean: Path) -> tuple[str, TestSet]:
    dev, test = (inputs.test_set(config, split, clean) for split in ("dev", "eval"))
    parts = "all of them for both splits" if not config.dev_share and config.test_images else f"{len(dev)} for dev"
    return f"{len(test)} images of {len(test.class_names)} classes to evaluate on, {parts}", test


def _target(config: PoisonConfig, test: TestSet, pairs: TrainingPairs | None) -> tuple[str, None]:
    number = class_index(test.class_names, config.target)
    check_others(test, number)
    text = f"{config.target!r} is class {number}, with {int((test.labels == number).sum())} test images"
    if pairs is None:
        return text, None
    named = int(pairs.shows(config.target).sum())
    if TRIGGERS[config.attack].poisoning != "template" and not named:
        raise AbdError(f"attack {config.attack!r} needs pairs of {config.target!r}, and no caption names it")
    poisoned = min(round(config.rate * len(pairs)), len(pairs) - named)
    return f"{text}; {named} captions name it; {poisoned} pairs will be poisoned", None


def _trigger(config: PoisonConfig, test: TestSet) -> tuple[str, None]:
    """Put it on test images as the stages do, and store them in 8 bits: what is left of it?"""
    size = test.images.shape[-1]
    trigger = drawn_trigger(config, resolution=size)
    clean = test.images[:: max(1, len(test) // 32)][:32]
    triggered = trigger(clean.float() / 255).mul(255).round().to(torch.uint8)
    changed = (triggered != clean).any(1).float().mean((1, 2))
    strength = (triggered.float() - clean.float()).abs().amax((1, 2, 3)).mean().item()
    blank = (clean == clean[..., :1, :1]).flatten(1).all(1)  # which an attack that moves pixels leaves
    if blank.all() or not changed[~blank].min() > 0:
        raise AbdError(f"attack {config.attack!r} leaves an image of {size} px as it is, once stored in 8 bits")
    text = f"{config.attack} changes {changed.mean():.1%} of an image's pixels, by up to {strength:.0f} of 255 levels"
    return f"{text}; put on at {size} px, after resizing", None


def _disk(configs: Sequence[Any], clean: Path) -> tuple[str, None]:
    """A training stage keeps its weights, and on the way two resume files of weights and AdamW's two moments."""
    model = 4 * sum(tensor.numel() for tensor in models.load(clean).state_dict().values())
    needed = 7 * model * sum(not isinstance(config, AdversaryConfig) for config in configs) + GIB
    free = shutil.disk_usage(runs_dir()).free
    text = f"about {needed / GIB:.1f} GiB needed in {shown(runs_dir())}, {free / GIB:.1f} GiB free"
    if needed > free:
        raise AbdError(text)
    return text, None


def _rehearsed(config: Any, clean: Path, pairs: TrainingPairs, test: TestSet) -> tuple[str, float]:
    """Run `STEPS` steps of a stage, and say what they tell of the whole."""
    own = pairs if isinstance(config, PoisonConfig) else pairs.subset(config.share, seed=config.seed)
    batches = max(_rehearsal(), getattr(config, "accumulate", 1))
    few = _Timed(own.take(range(min(len(own), batches * config.batch_size))))
    model = models.load(clean)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as folder:
        if isinstance(config, AdversaryConfig):
            total = config.steps
            frozen = models.frozen(model)
            search(config.replace(steps=min(batches, total)), few, frozen, frozen, Path(folder))
        else:
            defence = _defence(config, few, clean, models.resolution(model))
            if defence is None:
                return "trains nothing", 0.0
            total = len(own) // config.batch_size * config.epochs
            defence.defend(model, Path(folder))
    step = few.seconds()
    hours = (step * total + _evaluations(config, test) * _evaluation_seconds(model, test)) / 3600
    rate = config.batch_size / step
    text = f"{hours:.2g} hours: {total} steps, {rate:.3g} pairs/s with {formats.workers()} workers; {_memory()}"
    if (processes := getattr(config, "num_processes", 1)) > 1:
        text += f"; all of one process, not of {processes}"
    if getattr(config, "quiet_weight", 0):
        text += "; without the perturbed images of quiet_weight, which take about as long again"
    if getattr(config, "normal", "clean") == "fine-tuned":
        text += "; without the fine-tuning that stands in for clean weights"
    return text, hours


def _free() -> None:
    """Give the GPU back what torch keeps of it for later."""
    gc.collect()
    torch.cuda.empty_cache()


def _defence(config: Any, pairs: Any, clean: Path, size: int) -> FineTuningDefence | None:
    """What trains as the stage does: the defence itself, and for poisoning, plain fine-tuning."""
    if isinstance(config, PoisonConfig):
        shared = {name: getattr(config, name) for name in _ALIKE}
        config = DefendConfig(defence="ft", **shared)
    kind = DEFENCES[config.defence]
    if not issubclass(kind, FineTuningDefence):
        return None
    side = patch_side(0.03, size)
    patch = Perturbation("patch", torch.rand(3, side, side), size, "random")
    return kind(config.replace(epochs=1), pairs, perturbation=patch, clean=clean)


def _evaluations(config: Any, test: TestSet) -> int:
    """Passes over the test set: poison measures two models with and without trigger, a defence is measured so."""
    return 4 if isinstance(config, PoisonConfig) else 2 if isinstance(config, DefendConfig) else 0


def _evaluation_seconds(model: Any, test: TestSet) -> float:
    """Seconds of a pass over the test set, its classes' prompts included."""
    few = TestSet(test.images[:SAMPLE], test.labels[:SAMPLE], test.class_names, test.templates, test.split)
    prompts = [test.templates[0].format(name) for name in test.class_names[:64]]
    model.eval()
    image_features(model, few)
    start = time.perf_counter()
    image_features(model, few)
    images = (time.perf_counter() - start) / len(few) * len(test)
    start = time.perf_counter()
    with torch.no_grad():
        models.encode_text(model, tokenize(prompts, context_length=model.context_length)).cpu()
    texts = (time.perf_counter() - start) / len(prompts) * len(test.class_names) * len(test.templates)
    return images + texts


def _memory() -> str:
    """The most memory taken: on the GPU by this rehearsal, CUDA graphs' included; else by this process so far."""
    if torch.cuda.is_available():
        used, whole = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
        return f"GPU memory {used / GIB:.1f} of {whole / GIB:.1f} GiB"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"memory up to here {used / GIB:.1f} GiB, and the workers'"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m abd_core.preflight", description="Checks before a long run.")
    add_parameters(parser)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these (all)")
    given = parser.parse_args(arguments)
    configs = dict(zip(STAGES, stage_configs(given_parameters(given.parameters, given.p), **STAGES), strict=True))
    if not any(config.outside for config in configs.values()):
        raise PreflightError("preflight: nothing to check: pairs, test_images and pretrained are the embedded ones")
    preflight(*(configs[stage] for stage in STAGES if stage in given.stages))


if __name__ == "__main__":
    try:
        main()
    except AbdError as error:
        sys.exit(str(error))
