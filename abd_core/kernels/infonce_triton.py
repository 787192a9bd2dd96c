"""`info_nce` in Triton: logits live in registers, one tile at a time.

Forward: each tile of q @ k.T gives its rows' and its columns' log-sum-exp; the tiles' are then put together in a fixed
order, without atomics. Gradients: the tile is made again, turned into the gradient of the logits, and written in the
features' dtype into a buffer of some rows, from which two matrix products make the gradients of queries and keys. The
positives are left out of the products and added afterwards: a probability less 1 among thousands of small ones would
be rounded to the features' dtype, and would make a running sum round all that follow it at its own size. What is small
is put together by few launches, since at small batches they are what takes the time.

Logits and their sums are kept in units of log2(e), so that their exponentials are powers of 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from abd_core.kernels.dispatch import cdiv, tf32

BUFFER_BYTES = 1 << 30  # of the logits' gradients at a time
PARTIALS = 1 << 26  # how many of the columns' partial sums there may be at a time
BLOCKS = {2: (128, 128, 64), 4: (64, 64, 32)}  # bytes of a number -> rows, columns and features of a tile
SUMS_WARPS, GRADIENT_WARPS, NUM_STAGES = 4, 8, 3
LOG2E = math.log2(math.e)
OWN_BLOCK = 1024  # features that a program adds a positive's part to at a time
COMBINED, PARTS = 128, 16  # log-sum-exps that a program puts together, and how many parts of each at a time
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
    EVEN: tl.constexpr,  # BLOCK_D divides dim
    PRECISION: tl.constexpr,
    OWN: tl.constexpr,
    LOG2E: tl.constexpr,
):
    """Logits of a tile in units of log2(e), and where the positives lie in it; -inf outside the matrix."""
    inner = tl.arange(0, BLOCK_D)
    logits = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    # Beyond the matrix the first row is read instead: no mask is needed in the loop.
    q_at = q + tl.where(rows < batch, rows, 0).to(tl.int64)[:, None] * dim + inner[None, :]
    k_at = k + tl.where(columns < count, columns, 0).to(tl.int64)[None, :] * dim + inner[:, None]
    for start in range(0, dim, BLOCK_D):
        if EVEN:
            a = tl.load(q_at + start)
            b = tl.load(k_at + start)
        else:
            left = inner < dim - start
            a = tl.load(q_at + start, mask=left[None, :], other=0.0)
            b = tl.load(k_at + start, mask=left[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    logits *= tl.load(scale) * LOG2E
    positive = columns[None, :] == rows[:, None] + offset
    if OWN:
        logits = tl.where(positive, tl.load(own + rows, mask=rows < batch, other=0.0)[:, None], logits)
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
    EVEN: tl.constexpr,
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
    logits, positive = _tile(
        q, k, scale, own, batch, count, dim, offset, rows, columns, BLOCK_D, EVEN, PRECISION, OWN, LOG2E
    )
    if ROWS:
        top = tl.max(logits, 1)
        top = tl.where(top == -float("inf"), 0.0, top)  # rows beyond the matrix
        sums = top + tl.log2(tl.sum(tl.exp2(logits - top[:, None]), 1))
        at = row_sums + column_block.to(tl.int64) * (batch - first) + rows - first
        tl.store(at, sums, mask=rows < batch)
    if COLUMNS:
        top = tl.max(logits, 0)
        top = tl.where(top == -float("inf"), 0.0, top)
        sums = top + tl.log2(tl.sum(tl.exp2(logits - top[None, :]), 0))
        tl.store(column_sums + row_block.to(tl.int64) * count + columns, sums, mask=columns < count)
    if not OWN:
        met = (rows < batch) & (rows + offset >= column_block * BLOCK_K)
        met = met & (rows + offset < (column_block + 1) * BLOCK_K)
        tl.store(own + rows, tl.sum(tl.where(positive, logits, 0.0), 1), mask=met)


@triton.jit
def _combine_kernel(
    parts,  # (sides, number, count) log-sum-exps
    own,
    out,  # (sides, count)
    terms,  # a program's share of the loss
    number,
    count,
    weight,
    second_weight,  # of the second side, where the grid has two
    AGAIN: tl.constexpr,  # `out` holds those of earlier parts
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # at a time
):
    """Log-sum-exp over all parts in their order, and weight * (log-sum-exp - logit of the positive), summed."""
    side = tl.program_id(1).to(tl.int64)
    parts += side * number * count
    out += side * count
    terms += side * tl.num_programs(0)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    top = tl.load(out + at, mask=mask, other=0.0) if AGAIN else tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.where(top == -float("inf"), 0.0, 1.0)
    some = tl.arange(0, PARTS)
    for start in range(0, number, PARTS):
        here = parts + (start + some).to(tl.int64)[:, None] * count + at[None, :]
        part = tl.load(here, mask=(start + some < number)[:, None] & mask[None, :], other=-float("inf"))
        higher = tl.maximum(top, tl.max(part, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(part - safe[None, :]), 0)
        top = higher
    top = tl.where(mask, top, 0.0)
    total = tl.where(mask, total, 1.0)
    sums = top + tl.log2(total)
    tl.store(out + at, sums, mask=mask)
    gap = tl.where(mask, sums - tl.load(own + at, mask=mask, other=0.0), 0.0)
    tl.store(terms + tl.program_id(0), tl.where(side == 0, weight, second_weight) * tl.sum(gap))


@triton.jit
def _gradient_kernel(
    q,
    k,
    scale,
    own,
    row_sums,  # (B,)
    column_sums,  # (N,)
    out,  # (rows of the buffer, N): gradient of the logits, times B and a unit, and 0 where the positives lie
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
    EVEN: tl.constexpr,
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
    logits, positive = _tile(
        q, k, scale, own, batch, count, dim, offset, rows, columns, BLOCK_D, EVEN, PRECISION, OWN, LOG2E
    )
    share = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    if ROWS:
        sums = tl.load(row_sums + rows, mask=rows < batch, other=0.0)
        share += row_weight * tl.exp2(logits - sums[:, None])
    if COLUMNS:
        sums = tl.load(column_sums + columns, mask=columns < count, other=0.0)
        share += column_weight * tl.exp2(logits - sums[None, :])
    share = tl.where(positive, 0.0, share)
    at = out + (rows - first).to(tl.int64)[:, None] * count + columns[None, :]
    tl.store(at, share.to(out.dtype.element_ty), mask=(rows < batch)[:, None] & (columns < count)[None, :])


@triton.jit
def _own_kernel(
    q,
    p,  # (B, dim) positives
    own,
    row_sums,  # (B,)
    column_sums,  # (B,)
    dq,
    dp,  # (B, dim): written where OWN, else added to, being rows of the keys' gradient
    terms,  # (B,) of the scale's gradient
    dim,
    row_weight,
    column_weight,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add a positive's part to the gradients of its row, and take the row's product with q."""
    row = tl.program_id(0).to(tl.int64)
    logit = tl.load(own + row)
    pull = 0.0
    if ROWS:
        pull += row_weight * (tl.exp2(logit - tl.load(row_sums + row)) - 1)
    if COLUMNS:
        pull += column_weight * (tl.exp2(logit - tl.load(column_sums + row)) - 1)
    inner = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, dim, BLOCK):
        at, mask = row * dim + start + inner, start + inner < dim
        query = tl.load(q + at, mask=mask, other=0.0).to(tl.float32)
        of_query = tl.load(dq + at, mask=mask, other=0.0) + pull * tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dq + at, of_query, mask=mask)
        of_key = pull * query
        if not OWN:
            of_key += tl.load(dp + at, mask=mask, other=0.0)
        tl.store(dp + at, of_key, mask=mask)
        total += of_query * query
    tl.store(terms + row, tl.sum(total))


def forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    positives: torch.Tensor | None,
    weights: tuple[float, float],
    offset: int,
    grads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`infonce._op`.

    Raises:
        ValueError: float64 features, or tensors that are not on a CUDA device (unless Triton interprets its kernels).
    """
    if queries.dtype == torch.float64:
        raise ValueError("info_nce: impl = 'triton' has no float64; 'torch' has")
    if not queries.is_cuda and not isinstance(_sums_kernel, InterpretedFunction):
        raise ValueError(f"info_nce: impl = 'triton' needs a CUDA device, not {queries.device}")
    q, k = queries.contiguous(), keys.contiguous()
    (batch, dim), count, (row_weight, column_weight) = q.shape, len(k), weights
    block_q, block_k, block_d = BLOCKS[q.element_size()]
    fixed = {
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "EVEN": dim % block_d == 0,
        "GROUP": GROUP,
        "PRECISION": "tf32" if tf32() else "ieee",
        "OWN": positives is not None,
        "ROWS": row_weight != 0,
        "COLUMNS": column_weight != 0,
        "LOG2E": LOG2E,
        "num_stages": NUM_STAGES,
    }
    across = cdiv(count, block_k)

    def tiles(start: int, end: int) -> tuple[int]:
        return (cdiv(end - start, block_q) * across,)

    own = q.new_empty(batch, dtype=torch.float32)
    if positives is not None:
        torch.mul((q.float() * positives.float()).sum(1), scale * LOG2E, out=own)
    sums = own.new_empty(batch * (row_weight != 0) + count * (column_weight != 0))
    rows, columns = sums.split([batch * (row_weight != 0), count * (column_weight != 0)])
    blocks = [cdiv(len(side), COMBINED) for side in (rows, columns)]
    terms = own.new_empty(sum(blocks))
    of_rows, of_columns = row_weight / batch / LOG2E, column_weight / batch / LOG2E
    step = max(1, PARTIALS * block_q // count // COMBINED) * COMBINED
    for start in range(0, batch, step):
        end = min(start + step, batch)
        down = cdiv(end - start, block_q)
        sizes = [across * (end - start) * (row_weight != 0), down * count * (column_weight != 0)]
        parts = own.new_empty(sum(sizes))
        row_parts, column_parts = parts.split(sizes)
        shape = (start, end, count, dim, offset)
        _sums_kernel[tiles(start, end)](
            q, k, scale, own, row_parts, column_parts, *shape, **fixed, num_warps=SUMS_WARPS
        )
        if row_weight and column_weight and step >= batch:  # as many keys as queries: both sides have one size
            _combine_kernel[(blocks[0], 2)](
                parts, own, sums, terms, across, batch, of_rows, of_columns, False, COMBINED, PARTS
            )
            continue
        if row_weight:
            many, part = cdiv(end - start, COMBINED), slice(start, end)
            of_loss = terms[start // COMBINED :]
            given = (across, end - start, of_rows, 0.0, False, COMBINED, PARTS)
            _combine_kernel[(many, 1)](row_parts, own[part], rows[part], of_loss, *given)
        if column_weight:  # as many keys as queries: a column's positive is that of the row
            given = (down, count, of_columns, 0.0, start > 0, COMBINED, PARTS)
            _combine_kernel[(blocks[1], 1)](column_parts, own, columns, terms[blocks[0] :], *given)
    loss = terms.sum()
    if not grads:
        return loss, own.new_empty(0), own.new_empty(0), own.new_empty(0), own.new_empty(0)  # which share no memory

    # float16 loses digits below 6e-5, which is much for a probability: the buffer holds it in a unit that fills it.
    unit = 2.0 ** (15 - math.frexp(abs(row_weight) + abs(column_weight))[1]) if q.dtype == torch.float16 else 1.0
    dq, dk = own.new_empty(0), own.new_empty(0)
    step = max(1, BUFFER_BYTES // (count * q.element_size() * block_q)) * block_q
    if step < batch:
        dq = torch.empty_like(q, dtype=torch.float32)
    buffer = q.new_empty(min(step, batch), count)
    for start in range(0, batch, step):
        end = min(start + step, batch)
        share = buffer[: end - start]
        shape = (start, end, count, dim, offset)
        _gradient_kernel[tiles(start, end)](
            *(q, k, scale, own, rows, columns, share, *shape, row_weight * unit, column_weight * unit),
            **fixed,
            num_warps=GRADIENT_WARPS,
        )
        if step < batch:
            dq[start:end] = _product(share, k)
        else:
            dq = _product(share, k)
        of_keys = _product(share.T, q[start:end])
        dk = dk + of_keys if start else of_keys
    if unit != 1:
        dq, dk = dq / unit, dk / unit
    # Of separate positives, dp is a gradient of its own; else it is their part of the keys'.
    where = slice(offset, offset + batch)
    p, dp = (k[where], dk[where]) if positives is None else (positives.contiguous(), torch.empty_like(dq))
    of_scale, used = torch.empty_like(own), {name: fixed[name] for name in ("OWN", "ROWS", "COLUMNS")}
    _own_kernel[(batch,)](q, p, own, rows, columns, dq, dp, of_scale, dim, *weights, OWN_BLOCK, **used)
    # d loss / d scale = sum of the logits' gradients x cosines, and the inner sum over keys is in dq already.
    return loss, dq, dk, of_scale.sum(), own.new_empty(0) if positives is None else dp


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32, whatever the dtype of the factors."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
