"""Several processes ("ranks") that train one model on one batch, and each do a share of its work.

The batch is global: `batch_size` pairs, the same ones with the same augmentations, whatever the number of ranks. Rank r
of w encodes the rows r, r + w, r + 2w, ...; features are gathered with gradients, every rank computes the loss of all
of them, and gradients are averaged, so that weights stay equal on all ranks and are those that one process would reach,
up to rounding. Of BatchNorm in training this is true with `synchronised` alone; without, each rank normalises with the
statistics of its own rows, as DistributedDataParallel does, and the running statistics are the mean over ranks.

In a process that was not launched as one of several, all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from abd_core.config import ConfigError

TIMEOUT = timedelta(hours=2)  # for the others: the first rank may be drawing up data, or evaluating


def rank() -> int:
    """This process among all of the job, 0 <= rank < `world()`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this rank is the one that writes files and shows progress."""
    return rank() == 0


def launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def group() -> Iterator[None]:
    """Joins the ranks of a launched process: NCCL where each has a GPU, else gloo.

    Raises:
        ConfigError: a machine has fewer GPUs than ranks.
    """
    device = None
    if torch.cuda.is_available():
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)) > here:
            raise ConfigError(f"num_processes: {os.environ['LOCAL_WORLD_SIZE']} on a machine of {here} GPUs")
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    dist.init_process_group("gloo" if device is None else "nccl", timeout=TIMEOUT, device_id=device)
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Returns once every rank has called it."""
    if world() > 1:
        dist.barrier()


def agreed(value: bool) -> bool:
    """The first rank's `value`, on every rank; to decide what depends on files or clocks."""
    if world() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return bool(told[0])


# --- the shared batch -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    count: int
    micro: int


_split: _Split | None = None


@contextmanager
def shared_batch(count: int, *, micro: int = 0) -> Iterator[None]:
    """What is encoded inside is a batch of `count` pairs that the ranks share, or some views of each of them.

    Args:
        micro: 0, or the number of a rank's rows that are encoded at a time. Their activations are thrown away and
            computed again for the gradient (cached-feature accumulation, GradCache, Gao et al. 2021): memory is that of
            `micro` rows, the loss and its gradient are those of the whole batch. BatchNorm in training takes the
            statistics of `micro` rows.
    """
    global _split
    before, _split = _split, _Split(count, micro)
    try:
        yield
    finally:
        _split = before


def share(count: int) -> slice:
    """Those of `count` rows that are this rank's. Raises ConfigError where they cannot be shared evenly."""
    if count % world():
        raise ConfigError(f"a batch of {count} rows: a multiple of num_processes = {world()} expected")
    return slice(rank(), None, world())


def own_rows(count: int) -> slice:
    """Those of `count` images of pairs that this rank has to read; it encodes no other.

    All of them outside of a shared batch, and where they are but some of its pairs.
    """
    return share(count) if _split is not None and _split.count == count else slice(None)


def encoded(
    encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, model: torch.nn.Module
) -> torch.Tensor:
    """`encode(inputs)`, (B, ...) -> (B, D), by `model`; of a shared batch, each rank encodes its rows."""
    if _split is None:
        return encode(inputs)
    own = inputs[share(len(inputs))]
    if _split.micro and torch.is_grad_enabled():

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), _StatisticsLeftAlone(model)

        parts = [checkpoint(encode, part, use_reentrant=False, context_fn=contexts) for part in own.split(_split.micro)]
        features = torch.cat(parts)
    elif _split.micro:
        features = torch.cat([encode(part) for part in own.split(_split.micro)])
    else:
        features = encode(own)
    return features if world() == 1 else _Gather.apply(features)


class _Gather(torch.autograd.Function):
    """Own features (B / w, D) -> everybody's (B, D), in the order of the batch.

    Every rank computes the same loss from them, so each has the whole gradient already: a rank takes its own rows of
    it, times w, because `average_gradients` divides by w.
    """

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor) -> torch.Tensor:
        everybody = [torch.empty_like(features) for _ in range(world())]
        dist.all_gather(everybody, features.contiguous())
        return torch.stack(everybody, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return world() * grad[rank() :: world()]


def average_gradients(model: torch.nn.Module) -> None:
    """Every gradient becomes its mean over the ranks."""
    if world() > 1:
        _average([p.grad for p in model.parameters() if p.grad is not None])


def average_statistics(model: torch.nn.Module) -> None:
    """The running statistics of every BatchNorm in training become their means over the ranks."""
    if world() > 1:
        modules = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
        modules = [m for m in modules if not isinstance(m, _Synchronised)]  # which are equal already
        _average([t for m in modules for t in (m.running_mean, m.running_var) if t is not None])


@torch.no_grad()
def _average(tensors: list[torch.Tensor]) -> None:
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for group_ in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in group_])
        dist.all_reduce(flat)
        flat /= world()
        for tensor, part in zip(group_, flat.split([t.numel() for t in group_]), strict=True):
            tensor.copy_(part.view_as(tensor))


def gathered(parts: Mapping[int, torch.Tensor], count: int) -> torch.Tensor:
    """Rows (count, D) on the CPU of which each rank has some: `parts` maps a first row to rows (n, D)."""
    if world() == 1:
        return torch.cat([parts[start] for start in sorted(parts)])
    place = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    width = torch.tensor(max((part.shape[1] for part in parts.values()), default=0), device=place)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    everything = torch.zeros(count, int(width), device=place)
    for start, part in parts.items():
        everything[start : start + len(part)] = part
    return summed(everything).cpu()  # each row has one summand that is not 0


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' tensors, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


# --- BatchNorm ------------------------------------------------------------------------------------------------------


class _StatisticsLeftAlone(AbstractContextManager):
    """BatchNorm computes as it does in training and updates copies: its inputs come again, once a backward pass."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modules = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training]
        self.kept = [dict(m._buffers) for m in self.modules]
        for module, buffers in zip(self.modules, self.kept, strict=True):
            module._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *_: object) -> None:
        for module, buffers in zip(self.modules, self.kept, strict=True):
            module._buffers.update(buffers)


@torch.no_grad()
def follow(module: _BatchNorm, mean: torch.Tensor, variance: torch.Tensor, count: float) -> None:
    """Let the running statistics of `module` follow a batch's, whose (biased) variance is over `count` numbers."""
    assert module.running_mean is not None and module.running_var is not None and module.momentum is not None
    module.running_mean.lerp_(mean, module.momentum)
    module.running_var.lerp_(variance * count / (count - 1), module.momentum)
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)


class _Synchronised(_BatchNorm):
    """BatchNorm whose batch is that of all ranks, which hold equally many rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            follow(self, mean, variance, world() * x.numel() / x.shape[1])
        return y

    def _check_input_dim(self, x: torch.Tensor) -> None:
        pass


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias over all ranks' rows and all places of a channel."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = x.to(weight.dtype)
        over, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        count = world() * x.numel() / x.shape[1]
        mean = summed(wide.sum(over)) / count
        centred = wide - mean.view(shape)
        variance = summed(centred.square().sum(over)) / count
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        y = centred * (inverse * weight).view(shape) + bias.view(shape)
        return y.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        over, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        count = world() * x.numel() / x.shape[1]
        grad, normal = grad.to(weight.dtype), (x.to(weight.dtype) - mean.view(shape)) * inverse.view(shape)
        bias_grad, weight_grad = grad.sum(over), (grad * normal).sum(over)
        sums = summed(torch.stack([bias_grad, weight_grad])) / count
        x_grad = (grad - sums[0].view(shape) - normal * sums[1].view(shape)) * (inverse * weight).view(shape)
        return x_grad.to(x.dtype), weight_grad, bias_grad, None


@contextmanager
def synchronised(model: torch.nn.Module, *, on: bool = True) -> Iterator[None]:
    """Inside, every BatchNorm of `model` in training takes its statistics over all ranks (SyncBatchNorm)."""
    modules = [m for m in model.modules() if isinstance(m, _BatchNorm)] if on else []
    kinds = [type(m) for m in modules]
    for module in modules:
        module.__class__ = _Synchronised
    try:
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = kind
