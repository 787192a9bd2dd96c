"""The one training loop of all CLIP stages: AdamW, warm-up and cosine, bf16 where native, resume, progress, history.

Every random draw is a function of (seed, epoch, step), so a resume file needs weights, optimiser and position only.
`python -m abd_core.train JOB` runs a training stage, alone or as one of several ranks: see `abd_core.launch`.
"""

from __future__ import annotations

import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pandas as pd
import torch
from tqdm import tqdm

from abd_core import graphs, ranks
from abd_core.config import Config, ConfigError, TrainingError, option
from abd_core.data import rng
from abd_core.paths import RunError, atomic, regular, unpacked

CHECKPOINT_SECONDS = 60.0  # how much work a killed process may lose
COLLAPSED = 1e-5  # unit features that differ by less are one and the same


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Settings of the loop that every training stage shares."""

    seed: int = option(0, "seed of every random draw", ge=0)
    epochs: int = option(8, "passes over the pairs", ge=1)
    batch_size: int = option(128, "pairs a step", ge=2)
    lr: float = option(5e-4, "peak learning rate", gt=0, le=1)
    warmup_steps: int = option(50, "steps of linear warm-up", ge=0)
    weight_decay: float = option(0.1, "AdamW's decay; none on norms, biases and logit_scale", ge=0)
    limit: int = option(0, "use only this many pairs, seeded (0: all); for smoke runs", ge=0)
    accumulate: int = option(1, "batches whose gradients are averaged in a step", ge=1, later=True)
    micro_batch: int = option(
        0, "rows that a process encodes at a time, for less memory (GradCache); 0: all of its own", ge=0, later=True
    )
    sync_batch_norm: bool = option(
        False, "BatchNorm takes its statistics over all processes, else over each one's rows", later=True
    )
    num_processes: int = option(
        1, "processes on this machine that share each batch; a GPU each where there are GPUs", ge=1, place=True
    )


@dataclass(frozen=True)
class Step:
    """Where the loop stands: `indices` (B,) of the batch's pairs, the epoch, and the number of the batch for seeds."""

    indices: torch.Tensor
    epoch: int
    step: int


class NoBar:
    """A bar of a rank that shows none."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix(self, *_: object, **__: object) -> None:
        pass


def progress(*, stage: str, total: int, initial: int = 0, unit: str = "step") -> tqdm | NoBar:
    """One bar a stage, as text on stderr, with rate and time left; redrawn seldom where nobody watches.

    Plain text and a fixed width, because papermill passes it on to a terminal as it is (a widget would show nothing
    there, and leave its state in the notebook). Of several ranks, the first one alone has a bar.
    """
    if not ranks.first():
        return NoBar()
    watched = sys.stderr.isatty() or ("ipykernel" in sys.modules and "CI" not in os.environ)  # hosts of CI set it
    return tqdm(desc=stage, total=total, initial=initial, unit=unit, ncols=80, mininterval=1 if watched else 10)


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up over `warmup` steps (the first one is peak / warmup, not 0), then a cosine that ends at 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and filters only; vectors and scalars (norms, biases, logit_scale) are left alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def save_resume(path: Path, record: Mapping[str, Any]) -> None:
    """Plain containers and tensors only, so that `load_resume` never has to unpickle code."""
    with atomic(path) as temporary:
        torch.save(dict(record), temporary)


def load_resume(path: Path) -> dict[str, Any] | None:
    """What `save_resume` wrote, or None where there is nothing. Raises RunError where the file is damaged."""
    if not path.exists():
        return None
    regular(path)
    try:
        with zipfile.ZipFile(path) as parts:  # torch.load leaves the parts' checksums unread
            unpacked(parts)
            if damaged := parts.testzip():
                raise zipfile.BadZipFile(damaged)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file makes torch raise many kinds; code in it is refused before it runs
        raise RunError(f"damaged file: {path}: {type(error).__name__}; delete its folder, or pass force=True") from None


def check_finite(model: torch.nn.Module, where: str, advice: str = "") -> None:
    """Raises TrainingError, naming the first tensor, where a weight or a running statistic is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(f"{where}: {name} holds NaN or infinity{advice}")


class Figures:
    """A batch's loss and further figures on their way from the device; they are waited for when they are read."""

    def __init__(self, figures: Mapping[str, torch.Tensor | float]) -> None:
        self.sent = {
            name: value.detach().to("cpu", non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in figures.items()
        }
        on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in figures.values())
        self.there = torch.cuda.Event() if on_gpu else None
        if self.there:
            self.there.record()

    def read(self) -> dict[str, float]:
        if self.there:
            self.there.synchronize()
        return {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in self.sent.items()}


class Features:
    """Looks on as images are encoded, so that features that have become one and the same are noticed.

    It keeps the last batch's, and nothing is computed before `check`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.last: torch.Tensor | None = None
        tower = getattr(model, "visual", None)
        self.hook = tower.register_forward_hook(self._keep) if tower is not None else None

    def _keep(self, tower: torch.nn.Module, inputs: Any, features: torch.Tensor) -> None:
        self.last = features.detach()

    def check(self, where: str) -> None:
        """Raises TrainingError where all images of the last batch have one feature, up to rounding in half precision.

        A batch has different images, and no CLIP that is of any use takes them for the same.
        """
        if self.last is not None and len(self.last) > 1:
            unit = torch.nn.functional.normalize(self.last.float(), dim=-1)
            if (unit - unit[0]).abs().max() < COLLAPSED:
                raise TrainingError(f"{where}: collapsed features: the model takes all images of a batch for the same")

    def close(self) -> None:
        if self.hook is not None:
            self.hook.remove()


def steps_an_epoch(count: int, config: TrainConfig) -> int:
    """Steps that `count` pairs suffice for. Raises ConfigError where they suffice for none."""
    together = config.batch_size * config.accumulate
    if count < together:
        what = "batch_size" if config.accumulate == 1 else "batch_size * accumulate"
        raise ConfigError(f"{what} = {together}: at most {count} expected, the number of pairs")
    return count // together


def fit(
    model: open_clip.CLIP,
    loss: Callable[[Step], tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]],
    *,
    count: int,
    config: TrainConfig,
    folder: Path,
    stage: str,
    after_epoch: Callable[[int], Mapping[str, float]] | None = None,
    plan: Callable[[list[torch.Tensor]], None] | None = None,
    as_graphs: bool = True,
) -> pd.DataFrame:
    """Train `model` in place, resuming from `folder` where an earlier process got part of the way.

    Args:
        loss: of one step's batch: the scalar to minimise, and figures to log.
        count: number of pairs; those of an epoch that are too few for a step are dropped.
        folder: receives `history.csv` (a row an epoch), and `resume.pt` on the way.
        after_epoch: further figures for an epoch's row.
        plan: is told this rank's part of an epoch's batches before its first step, `TrainingPairs.plan`.
        as_graphs: encoders run as CUDA graphs on a GPU, see `graphs`; not where `loss` takes gradients itself.

    Returns:
        The history.

    Raises:
        ConfigError: fewer pairs than a step takes, or a batch that the ranks cannot share evenly.
        TrainingError: the loss or a weight became NaN or infinite, or all images got the same feature. The checkpoint
            before it is left as it was. On a GPU it comes a step late, since the GPU is not made to wait for the CPU.
    """
    together = config.batch_size * config.accumulate
    steps = steps_an_epoch(count, config)
    if config.batch_size % ranks.world():
        raise ConfigError(f"batch_size = {config.batch_size}: a multiple of {ranks.world()} expected, the processes")
    total = steps * config.epochs
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    start, rows, sums = 0, [], {}
    if resume := load_resume(folder / "resume.pt"):
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        start, rows, sums = resume["step"], resume["rows"], resume["sums"]
    saved, features = time.monotonic(), Features(model)
    on_gpu = next(model.parameters()).is_cuda
    unread: list[tuple[str, list[Figures]]] = []  # of the last step, where a GPU is still at work on it

    def check_loss(value: float, where: str) -> None:
        if not math.isfinite(value):
            advice = f"lower lr = {config.lr:g}"
            check_finite(model, f"{stage}: loss is {value} at {where}", f": {advice}")
            raise TrainingError(f"{stage}: loss is {value} at {where}: {advice}")

    def add_up() -> None:
        """The figures of steps whose figures were not read yet."""
        nonlocal sums
        while unread:
            where, parts = unread.pop(0)
            figures: dict[str, float] = {}
            for more in (part.read() for part in parts):
                check_loss(more["loss"], where)
                figures = {name: figures.get(name, 0.0) + figure / config.accumulate for name, figure in more.items()}
            sums = {name: sums.get(name, 0.0) + figure for name, figure in figures.items()}

    with (
        closing(features),
        progress(stage=stage, total=total, initial=start) as bar,
        ranks.synchronised(model, on=config.sync_batch_norm),
        graphs.recorded(model, on=as_graphs and ranks.world() == 1 and not config.micro_batch),
    ):
        for step in range(start, total):
            epoch, position = divmod(step, steps)
            if position == 0 or step == start:
                order = torch.randperm(count, generator=rng(config.seed, stage, "order", epoch))
                if plan:
                    ahead = order[position * together : steps * together].split(config.batch_size)
                    plan([batch[ranks.share(len(batch))] for batch in ahead])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, peak=config.lr, warmup=config.warmup_steps, total=total)
            optimizer.zero_grad(set_to_none=True)
            where, parts = f"epoch {epoch}, step {step}", []
            for part, batch in enumerate(order[position * together :][:together].split(config.batch_size)):
                with ranks.shared_batch(len(batch), micro=config.micro_batch):
                    value, more = loss(Step(batch, epoch, step * config.accumulate + part))
                parts.append(Figures({"loss": value, **more}))
                if not on_gpu:
                    check_loss(parts[-1].read()["loss"], where)
                add_up()  # of the step before, now that a GPU has this one to do
                (value / config.accumulate).backward()
            unread.append((where, parts))
            ranks.average_gradients(model)
            ranks.average_statistics(model)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            bar.update()
            if position == steps - 1:
                add_up()
                features.check(f"{stage}: {where}")
                row = {"epoch": epoch + 1, **{name: s / steps for name, s in sums.items()}}
                row |= dict(after_epoch(epoch)) if after_epoch else {}
                rows, sums = [*rows, row], {}
                bar.set_postfix(loss=f"{row['loss']:.3g}", refresh=False)
            if ranks.first() and time.monotonic() - saved > CHECKPOINT_SECONDS:  # what they hold is the same on all
                add_up()
                check_finite(model, f"{stage}: {where}")
                record = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                save_resume(folder / "resume.pt", {**record, "rows": rows, "sums": sums})
                saved = time.monotonic()
    check_finite(model, f"{stage}: last step")
    history = pd.DataFrame(rows)
    with atomic(folder / "history.csv") as temporary:
        history.to_csv(temporary, index=False)
    return history


if __name__ == "__main__":
    from abd_core.launch import main

    main(sys.argv[1:])
