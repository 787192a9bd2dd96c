"""`info_nce` in Triton: logits live in registers, one tile at a time.

Forward: each tile of q @ k.T gives its rows' and its columns' log-sum-exp; the tiles' are then put together in a fixed
order, without atomics. Gradients: the tile is made again, turned into the gradient of the logits, and written in the
features' dtype into a buffer of some rows, from which two matrix products make the gradients of queries and keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

BUFFER_BYTES = 1 << 30  # of the logits' gradients at a time
PARTIALS = 1 << 26  # how many of the columns' partial sums there may be at a time
NUM_WARPS, NUM_STAGES = 8, 3
GROUP = 8  # tiles of so many blocks of rows come after one another, so that blocks of keys are read from the cache


@triton.jit
def _tile(
    q,
    k,
    scale,
    own,
    batch,
    count,
    dim,
    offset,
    rows,
    columns,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    OWN: tl.constexpr,
    LOG2E: tl.constexpr,
):
    """Logits of a tile in units of log2(e), and where the positives lie in it; -inf outside the matrix."""
    inner = tl.arange(0, BLOCK_D)
    logits = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    q_at = q + rows.to(tl.int64)[:, None] * dim + inner[None, :]
    k_at = k + columns.to(tl.int64)[None, :] * dim + inner[:, None]
    for start in range(0, dim, BLOCK_D):
        left = inner < dim - start
        a = tl.load(q_at + start, mask=(rows < batch)[:, None] & left[None, :], other=0.0)
        b = tl.load(k_at + start, mask=(columns < count)[None, :] & left[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    logits *= tl.load(scale) * LOG2E
    positive = columns[None, :] == rows[:, None] + offset
    if OWN:
        logits = tl.where(positive, tl.load(own + rows, mask=rows < batch, other=0.0)[:, None] * LOG2E, logits)
    return tl.where((rows < batch)[:, None] & (columns < count)[None, :], logits, -float("inf")), positive


@triton.jit
def _place(first, batch, count, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """A program's block of rows (counted from `first`) and block of columns."""
    down, across = tl.cdiv(batch - first, BLOCK_Q), tl.cdiv(count, BLOCK_K)
    program = tl.program_id(0)
    group = program // (GROUP * across)
    size = tl.minimum(down - group * GROUP, GROUP)
    inside = program % (GROUP * across)
    return group * GROUP + inside % size, inside // size


@triton.jit
def _sums_kernel(
    q,
    k,
    scale,
    own,  # (B,) logits of the positives: read where OWN, else written
    row_sums,  # (blocks of columns, batch - first) log-sum-exp of a row in a block of columns
    column_sums,  # (blocks of rows, N)
    first,
    batch,
    count,
    dim,
    offset,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOG2E: tl.constexpr,
):
    row_block, column_block = _place(first, batch, count, BLOCK_Q, BLOCK_K, GROUP)
    rows = first + row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    logits, positive = _tile(q, k, scale, own, batch, count, dim, offset, rows, columns, BLOCK_D, PRECISION, OWN, LOG2E)
    if ROWS:
        top = tl.max(logits, 1)
        top = tl.where(top == -float("inf"), 0.0, top)  # rows beyond the matrix
        sums = (top + tl.log2(tl.sum(tl.exp2(logits - top[:, None]), 1))) / LOG2E
        at = row_sums + column_block.to(tl.int64) * (batch - first) + rows - first
        tl.store(at, sums, mask=rows < batch)
    if COLUMNS:
        top = tl.max(logits, 0)
        top = tl.where(top == -float("inf"), 0.0, top)
        sums = (top + tl.log2(tl.sum(tl.exp2(logits - top[None, :]), 0))) / LOG2E
        tl.store(column_sums + row_block.to(tl.int64) * count + columns, sums, mask=columns < count)
    if not OWN:
        met = (rows < batch) & (rows + offset >= column_block * BLOCK_K)
        met = met & (rows + offset < (column_block + 1) * BLOCK_K)
        tl.store(own + rows, tl.sum(tl.where(positive, logits, 0.0), 1) / LOG2E, mask=met)


@triton.jit
def _gradient_kernel(
    q,
    k,
    scale,
    own,
    row_sums,  # (B,)
    column_sums,  # (N,)
    out,  # (rows of the buffer, N): gradient of the logits, times B
    first,
    batch,
    count,
    dim,
    offset,
    row_weight,
    column_weight,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOG2E: tl.constexpr,
):
    row_block, column_block = _place(first, batch, count, BLOCK_Q, BLOCK_K, GROUP)
    rows = first + row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    logits, positive = _tile(q, k, scale, own, batch, count, dim, offset, rows, columns, BLOCK_D, PRECISION, OWN, LOG2E)
    share = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    if ROWS:
        sums = tl.load(row_sums + rows, mask=rows < batch, other=0.0) * LOG2E
        share += row_weight * tl.exp2(logits - sums[:, None])
    if COLUMNS:
        sums = tl.load(column_sums + columns, mask=columns < count, other=0.0) * LOG2E
        share += column_weight * tl.exp2(logits - sums[None, :])
    # Separate positives have no part in the products with the keys.
    share = tl.where(positive, 0.0 if OWN else share - (row_weight + column_weight), share)
    at = out + (rows - first).to(tl.int64)[:, None] * count + columns[None, :]
    tl.store(at, share.to(out.dtype.element_ty), mask=(rows < batch)[:, None] & (columns < count)[None, :])


def forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    positives: torch.Tensor | None,
    weights: tuple[float, float],
    offset: int,
    grads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and its gradients with respect to queries, keys, scale and positives, as `infonce._op` returns them.

    Raises:
        ValueError: float64 features, or tensors that are not on a CUDA device (unless Triton interprets its kernels).
    """
    if queries.dtype == torch.float64:
        raise ValueError("info_nce: impl = 'triton' has no float64; 'torch' has")
    if not queries.is_cuda and not isinstance(_sums_kernel, InterpretedFunction):
        raise ValueError(f"info_nce: impl = 'triton' needs a CUDA device, not {queries.device}")
    q, k = queries.contiguous(), keys.contiguous()
    (batch, dim), count, (row_weight, column_weight) = q.shape, len(k), weights
    block = 64 if q.dtype == torch.float32 else 128
    fixed = {
        "BLOCK_Q": block,
        "BLOCK_K": block,
        "BLOCK_D": 32 if q.dtype == torch.float32 else 64,
        "GROUP": GROUP,
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "OWN": positives is not None,
        "ROWS": row_weight != 0,
        "COLUMNS": column_weight != 0,
        "LOG2E": math.log2(math.e),
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
    }
    across = triton.cdiv(count, block)

    def tiles(start: int, end: int) -> tuple[int]:
        return (triton.cdiv(end - start, block) * across,)

    own = q.new_empty(batch, dtype=torch.float32)
    if positives is not None:
        torch.mul((q.float() * positives.float()).sum(1), scale, out=own)
    rows = own.new_empty(batch if row_weight else 0)
    columns = own.new_full((count if column_weight else 0,), -torch.inf)
    step = max(1, PARTIALS // max(count, 1)) * block
    for start in range(0, batch, step):
        end = min(start + step, batch)
        row_parts = own.new_empty((across, end - start) if row_weight else 0)
        column_parts = own.new_empty((triton.cdiv(end - start, block), count) if column_weight else 0)
        shape = (start, end, count, dim, offset)
        _sums_kernel[tiles(start, end)](q, k, scale, own, row_parts, column_parts, *shape, **fixed)
        if row_weight:
            rows[start:end] = row_parts.logsumexp(0)
        if column_weight:
            columns = torch.logaddexp(columns, column_parts.logsumexp(0))
    loss = own.new_zeros(())
    if row_weight:
        loss += row_weight * (rows - own).mean()
    if column_weight:
        loss += column_weight * (columns - own).mean()  # as many keys as queries: offset is 0
    if not grads:
        return (
            loss,
            own.new_empty(0),
            own.new_empty(0),
            own.new_empty(0),
            own.new_empty(0),
        )  # an operator's do not alias

    dq, dk = torch.empty_like(q, dtype=torch.float32), torch.zeros_like(k, dtype=torch.float32)
    step = max(1, BUFFER_BYTES // (count * q.element_size() * block)) * block
    buffer = q.new_empty(min(step, batch), count)
    for start in range(0, batch, step):
        end = min(start + step, batch)
        share = buffer[: end - start]
        shape = (start, end, count, dim, offset)
        _gradient_kernel[tiles(start, end)](q, k, scale, own, rows, columns, share, *shape, *weights, **fixed)
        dq[start:end] = _product(share, k)
        dk += _product(share.T, q[start:end])
    dp = own.new_empty(0)
    if positives is not None:
        pull = own.new_full((batch,), -(row_weight + column_weight))
        if row_weight:
            pull += row_weight * (own - rows).exp()
        if column_weight:
            pull += column_weight * (own - columns).exp()
        dp = pull[:, None] * q
        dq += pull[:, None] * positives
    # d loss / d scale = sum of the logits' gradients x cosines, and the inner sum over keys is in dq already.
    dscale = (dq * q).sum() / batch
    for each in (dq, dk, dp):
        each *= scale / batch
    return loss, dq, dk, dscale, dp


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32, whatever the dtype of the factors."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
