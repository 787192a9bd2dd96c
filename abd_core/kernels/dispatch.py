"""What the kernels share: which implementation runs, how its inputs come to its device, and what may be kept."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch

IMPLEMENTATIONS = ("auto", "torch", "triton")


def choose(impl: str, like: torch.Tensor) -> str:
    """ "torch" or "triton": what `impl` stands for with tensors like this one. Triton has no float64.

    Raises:
        ValueError: there is no such implementation.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}: 'auto', 'torch' or 'triton' expected")
    if impl != "auto":
        return impl
    fits = like.is_cuda and like.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
    return "triton" if fits else "torch"


def tf32() -> bool:
    """Whether a GPU's products of float32 may be rounded to TF32, by whichever of torch's two settings for that."""
    return torch.backends.cuda.matmul.fp32_precision not in ("ieee", "none")


def cdiv(size: int, block: int) -> int:
    """How many blocks a size takes; `triton.cdiv` takes some microseconds."""
    return -(-size // block)


def may_keep(like: torch.Tensor) -> bool:
    """Whether what is made for a tensor like this one may be kept for later calls: not while a call is traced."""
    return type(like) is torch.Tensor and not torch.compiler.is_compiling()


def launching(device: torch.device) -> AbstractContextManager:
    """Inside, the device is the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def sent(tensor: torch.Tensor, to: torch.device) -> torch.Tensor:
    """The tensor on a device. The CPU does not wait for a GPU that is still busy: the way leads over pinned memory."""
    if to.type != "cuda" or tensor.is_cuda:
        return tensor.to(to)
    pinned = torch.empty_like(tensor, pin_memory=True)  # its own memory; `pin_memory()` refuses what was expanded
    return pinned.copy_(tensor).to(to, non_blocking=True)
