"""InfoNCE in one or both directions without keeping the B x N matrix of logits, with a gradient for the scale.

Gradients are computed together with the loss, from tiles or chunks of logits that are thrown away, so that what is kept
until the backward pass is of the size of the features. `impl="torch"` runs anywhere; `"triton"` needs a CUDA device. A
matrix of a few megabytes, on a CPU, is made whole: there that is faster.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from abd_core.kernels.dispatch import choose, launching, may_keep, tf32

CHUNK_BYTES = 1 << 26  # of logits at a time in the torch implementation
CPU_CHUNK_BYTES = 1 << 24  # on a CPU: larger ones are memory that the system takes back and clears each time
SOFTMAX_BYTES = 1 << 21  # of those at a time where a softmax makes as many again
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MANY = 1 << 22  # logits from which on the matrix library makes up for its many launches
FEW = 1 << 20  # logits up to which, on a CPU, torch's own operations are faster; half as many in both directions
FEW_ALONE = 1 << 22  # and in one direction without gradients


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    weights: tuple[float, float] = (1.0, 0.0),
    positives: torch.Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018, Eq. (4)), weighted over its two directions.

    With logits l_ij = scale * <q_i, k_j>, and t(i) = i + offset the key that belongs to query i, it is

        weights[0] * mean_i( log sum_j exp l_ij - l_it(i) ) + weights[1] * mean_i( log sum_h exp l_ht(i) - l_it(i) )

    Differentiable once in all tensors. Logits, sums and gradients are float32 for half-precision features (products of
    float32 features are TF32 on a GPU where `torch.set_float32_matmul_precision` allows it), float64 for float64 ones.
    Under autocast, features are cast as for a matrix product. The same inputs give the same bits.

    Args:
        queries: (B, D), float16, bfloat16, float32 or float64; unit rows for cosines, but any finite rows are right.
        keys: (N, D), of the queries' dtype and device.
        scale: inverse temperature, a number or a tensor of one element.
        weights: of the direction from queries to keys, and of the one from keys to queries.
        positives: (B, D); their products with the queries take the place of l_it(i). None: the keys themselves.
        offset: 0 <= offset <= N - B; not 0 where the keys of other ranks come first.
        impl: "torch", "triton", or "auto": triton on a CUDA device where it is installed, but for large products of
            float32 without TF32.

    Returns:
        The loss, a float32 scalar (float64 for float64 features).

    Raises:
        ValueError: shapes, dtypes, devices, weights or `impl` do not fit.
    """
    logits = _check(queries, keys, weights, positives, offset)
    kind = "cpu" if queries.is_cpu else queries.device.type  # a device's type takes its time, beside a small batch
    if torch.is_autocast_enabled(kind):
        dtype = queries.dtype if queries.dtype == torch.float64 else torch.get_autocast_dtype(kind)
        queries, keys = queries.to(dtype), keys.to(dtype)
        positives = None if positives is None else positives.to(dtype)
        with torch.autocast(kind, enabled=False):  # it would reach into what follows
            return info_nce(queries, keys, scale, weights=weights, positives=positives, offset=offset, impl=impl)
    # In the features' place, but never in half precision: a scale of 100 has a gradient of its own.
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1:
            raise ValueError(f"info_nce: a scale of one element expected, not {tuple(scale.shape)}")
        if scale.dtype != wide or scale.device != queries.device:  # `to` takes its time with nothing to do, too
            scale = scale.to(queries.device, wide)
        scale = scale.reshape(()) if scale.ndim else scale
    else:
        scale = torch.full((), scale, dtype=wide, device=queries.device)
    on_cpu = kind == "cpu" and impl in ("auto", "torch")
    if on_cpu and logits * (1 + all(weights)) <= FEW:
        return _composed(queries, keys, scale, positives, weights, offset)
    choose(impl, queries)  # refuses what there is not
    needed = [queries, keys, scale, *([] if positives is None else [positives])]
    grads = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in needed)
    if on_cpu and not grads and not all(weights) and logits <= FEW_ALONE:
        return _composed(queries, keys, scale, positives, weights, offset)
    given = (queries, keys, scale, positives, float(weights[0]), float(weights[1]), offset, grads, impl)
    if torch.compiler.is_compiling():
        return _op(*given)[0]
    return _eager(*given) if grads else _run(*given)[0]


def _check(
    queries: torch.Tensor,
    keys: torch.Tensor,
    weights: tuple[float, float],
    positives: torch.Tensor | None,
    offset: int,
) -> int:
    """How many logits there are. Each look at a tensor takes its time, beside a small batch.

    Raises:
        ValueError: something does not fit.
    """
    shape, of_keys, dtype, device = queries.shape, keys.shape, queries.dtype, queries.device
    if len(shape) != 2 or len(of_keys) != 2 or shape[1] != of_keys[1] or 0 in shape:
        raise ValueError(f"info_nce: queries (B, D) and keys (N, D) expected, not {tuple(shape)} and {tuple(of_keys)}")
    if dtype not in DTYPES:
        raise ValueError(f"info_nce: features of float16, bfloat16, float32 or float64 expected, not {dtype}")
    if keys.dtype != dtype or keys.device != device:
        raise ValueError(f"info_nce: keys are {keys.dtype} on {keys.device}, queries {dtype} on {device}")
    if positives is not None:
        if positives.dtype != dtype or positives.device != device:
            here = f"{positives.dtype} on {positives.device}"
            raise ValueError(f"info_nce: positives are {here}, queries {dtype} on {device}")
        if positives.shape != shape:
            raise ValueError(f"info_nce: positives {tuple(shape)} expected, not {tuple(positives.shape)}")
    batch, count = shape[0], of_keys[0]
    if not 0 <= offset <= count - batch:
        raise ValueError(f"info_nce: offset {offset} with {batch} queries and {count} keys")
    if not (weights[0] or weights[1]):
        raise ValueError("info_nce: a direction with a weight other than 0 expected")
    if weights[1] and count != batch:
        raise ValueError(f"info_nce: both directions need as many keys as queries, not {count} and {batch}")
    return batch * count


def library_is_faster(dtype: torch.dtype, logits: int) -> bool:
    """Whether a GPU's matrix library beats a kernel's own products of features of this dtype.

    It does in float32 without TF32, for which there are no tensor cores (`benchmarks/infonce.py`).
    """
    return dtype == torch.float32 and logits >= MANY and not tf32()


# --- the operator -----------------------------------------------------------------------------------------------------


def _run(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    positives: torch.Tensor | None,
    row_weight: float,
    column_weight: float,
    offset: int,
    grads: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and its gradients with respect to queries, keys, scale and positives; empty tensors unless `grads`.

    To be right, the gradient of the scale is to be divided by B, the others are to be multiplied by scale / B.
    """
    if impl == "auto" and library_is_faster(queries.dtype, len(queries) * len(keys)):
        impl = "torch"
    if choose(impl, queries) == "triton":
        from abd_core.kernels.infonce_triton import forward  # not installed everywhere
    else:
        forward = _forward
    given = (queries, keys, scale, positives, (row_weight, column_weight), offset, grads)
    kind = queries.device.type
    # Compiled, autocast may be on here; to turn it off takes its time.
    plain = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
    with launching(queries.device), plain:
        return forward(*given)


_op = torch.library.custom_op("abd_core::info_nce", _run, mutates_args=())


@_op.register_fake
def _(queries, keys, scale, positives, row_weight, column_weight, offset, grads, impl):  # type: ignore[no-untyped-def]
    def like(tensor: torch.Tensor | None) -> torch.Tensor:
        return scale.new_empty(tensor.shape if grads and tensor is not None else (0,))

    return scale.new_empty(()), like(queries), like(keys), like(scale), like(positives)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output[1:], inputs[2])
    ctx.dtype, ctx.batch, ctx.separate = inputs[0].dtype, len(inputs[0]), inputs[3] is not None


@torch.autograd.function.once_differentiable
def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    dq, dk, dscale, dp, scale = ctx.saved_tensors
    mean = grad / ctx.batch
    factor = mean * scale

    def scaled(gradient: torch.Tensor) -> torch.Tensor:
        if gradient.dtype == ctx.dtype:
            return gradient * factor
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=ctx.dtype))  # one launch, not two

    own = scaled(dp) if ctx.separate else None
    return scaled(dq), scaled(dk), mean * dscale, own, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The operator without the library's dispatch, which takes longer than a small batch itself."""

    @staticmethod
    def forward(ctx, *given):  # type: ignore[no-untyped-def]
        output = _run(*given)
        _setup(ctx, given, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _backward(ctx, grad)


_eager = torch.compiler.disable(_Eager.apply)


# --- in torch ---------------------------------------------------------------------------------------------------------


def _composed(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    positives: torch.Tensor | None,
    weights: tuple[float, float],
    offset: int,
) -> torch.Tensor:
    """The loss by torch's own operations on a CPU, with the whole matrix."""
    q, k = queries, keys
    if q.dtype != scale.dtype:
        q, k = q.to(scale.dtype), k.to(scale.dtype)
    logits = F.linear(scale * q, k)  # one call, not two: a small batch's times are those of calls
    if positives is not None:
        logits = logits.diagonal_scatter(scale * (q * positives.to(scale.dtype)).sum(1), offset)
    start, stop = offset, offset + q.shape[0]
    own = _count(start, stop) if may_keep(logits) else torch.arange(start, stop, device=q.device)
    row_weight, column_weight = weights
    loss = F.cross_entropy(logits, own) if row_weight else logits.new_zeros(())
    loss = loss if row_weight in (0, 1) else row_weight * loss
    return loss + column_weight * F.cross_entropy(logits.T, own) if column_weight else loss


@functools.lru_cache
def _count(start: int, stop: int) -> torch.Tensor:
    """`torch.arange` on the CPU, kept: to make it anew takes some 5 % of a small batch's loss with its gradients."""
    with torch.inference_mode(False):  # it may be kept for a backward pass later on
        return torch.arange(start, stop, device="cpu")


def _forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    positives: torch.Tensor | None,
    weights: tuple[float, float],
    offset: int,
    grads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chunks of rows: a pass for the columns' sums where there is more than one chunk, and a pass for all the rest.

    Without `grads`, or without a column's weight, there is one pass.
    """
    batch, (row_weight, column_weight) = len(queries), weights
    q, k = queries.to(scale.dtype), keys.to(scale.dtype)
    p = None if positives is None else positives.to(scale.dtype)
    row = len(k) * k.element_size()
    once = grads and column_weight and batch * row <= CHUNK_BYTES  # made whole, it takes one pass and not two
    limit = CHUNK_BYTES if once or not q.is_cpu else CPU_CHUNK_BYTES
    rows = max(1, min(batch, limit // row))
    if not grads:
        value = _value(q, k, scale, p, weights, offset, rows)
        return value, q.new_empty(0), q.new_empty(0), q.new_empty(0), q.new_empty(0)
    columns = q.new_full((len(k),), -torch.inf)
    if column_weight and rows < batch:
        for _, _, logits in _chunks(q, k, scale, p, offset, rows):
            columns = torch.logaddexp(columns, logits.logsumexp(0))
    total = q.new_zeros(())
    dq, dk = q.new_empty(q.shape), k.new_zeros(k.shape)
    dp = q.new_empty((0,) if p is None else q.shape)
    for part, diagonal, logits in _chunks(q, k, scale, p, offset, rows):
        own = logits.diagonal(diagonal).clone()
        # The probabilities, weighted. The last direction's overwrite the logits.
        share: torch.Tensor | None = None
        if row_weight:
            top = logits.amax(1, keepdim=True)
            share = logits - top if column_weight else logits.sub_(top)
            sums = share.exp_().sum(1, keepdim=True)
            total += row_weight * (top + sums.log() - own[:, None]).sum()
            share *= row_weight / sums
        if column_weight:
            if rows == batch:
                columns = logits.logsumexp(0)
            total += column_weight * (columns[diagonal : diagonal + len(own)] - own).sum()
            odds = logits.sub_(columns).exp_().mul_(column_weight)
            share = odds if share is None else share.add_(odds)
        assert share is not None  # a weight is not 0
        pull = share.diagonal(diagonal)
        pull -= row_weight + column_weight
        if p is not None:
            dp[part] = pull[:, None] * q[part]
            alone = pull[:, None] * p[part]
            pull.zero_()
        torch.mm(share, k, out=dq[part])
        if p is not None:
            dq[part] += alone
        dk.addmm_(share.T, q[part])
    # d loss / d scale = sum of the logits' gradients x cosines, and the inner sum over keys is in dq already.
    return total / batch, dq, dk, (q * dq).sum(), dp


def _chunks(
    q: torch.Tensor, k: torch.Tensor, scale: torch.Tensor, p: torch.Tensor | None, offset: int, rows: int
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """Rows, the diagonal on which their positives lie, logits."""
    for start in range(0, len(q), rows):
        part = slice(start, start + rows)
        logits = torch.mm(scale * q[part], k.t())
        if p is not None:
            logits.diagonal(start + offset).copy_(scale * (q[part] * p[part]).sum(1))
        yield part, start + offset, logits


def _value(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: torch.Tensor,
    p: torch.Tensor | None,
    weights: tuple[float, float],
    offset: int,
    rows: int,
) -> torch.Tensor:
    """The loss alone, from one pass over chunks of rows."""
    row_weight, column_weight = weights
    total, owns = q.new_zeros(()), q.new_empty(len(q))
    columns = q.new_full((len(k),), -torch.inf)
    few = max(1, SOFTMAX_BYTES // (len(k) * k.element_size())) if q.is_cpu else rows
    for part, diagonal, logits in _chunks(q, k, scale, p, offset, rows):
        if row_weight:
            own = torch.arange(diagonal, diagonal + len(logits), device=q.device)
            for some, theirs in zip(logits.split(few), own.split(few), strict=True):
                total += row_weight * F.cross_entropy(some, theirs, reduction="sum")
        if column_weight:
            owns[part] = logits.diagonal(diagonal)
            columns = torch.logaddexp(columns, logits.logsumexp(0))
    if column_weight:
        total += column_weight * (columns - owns).sum()
    return total / len(q)
