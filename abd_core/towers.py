"""open_clip's towers without the work that no feature comes from; the weights, and the features, stay what they are.

A caption's feature is that of its last token, and attention looks back only: what stands after the end, which is half
of a batch of captions, need not be computed. An image's feature, in a ResNet, is the attention's answer to one query,
not to one for every place of the image. And on a CPU, torch's BatchNorm takes channels one by one where they are fewer
than its vectors are long, as in the stem of a narrow ResNet; in bf16, the convolution library is slow at few places of
many channels, and products are compiled anew for each number of rows.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from abd_core import ranks

VECTOR = 16  # float32 numbers in a vector of AVX-512
POINTS = 4096  # places of a batch up to which a convolution of points is a product, in bf16
ROWS = 64  # a text batch has a multiple of, under autocast


class OneQueryPool(AttentionPool2d):
    """`AttentionPool2d`, whose result is the answer to the mean's query, asked that query alone.

    A query meets keys W x + b as W' q meets x, up to b' q, the same for all x; and to mix values W x is W times
    the mix: what multiplied every place by two matrices multiplies one row an image.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of a map (B, C, H, W)."""
        places = x.flatten(2).transpose(1, 2)
        places = torch.cat([places.mean(1, keepdim=True), places], 1)
        places = places + self.positional_embedding.to(x.dtype)
        keys, values = (p.weight.unflatten(0, (self.num_heads, -1)) for p in (self.k_proj, self.v_proj))
        query = self.q_proj(places[:, 0]).unflatten(1, (self.num_heads, -1)) * keys.shape[1] ** -0.5
        scores = torch.einsum("bhc,bpc->bhp", torch.einsum("bhd,hdc->bhc", query, keys), places)
        scores = scores + query.flatten(1).mul(self.k_proj.bias).unflatten(1, query.shape[1:]).sum(2, keepdim=True)
        mix = torch.einsum("bhp,bpc->bhc", scores.softmax(2).to(places.dtype), places)
        return self.c_proj(torch.einsum("bhc,hdc->bhd", mix, values).flatten(1) + self.v_proj.bias)


def _lanes(x: torch.Tensor) -> int:
    """How many of its numbers fill a vector; of float64, two vectors."""
    return VECTOR * 4 // min(x.element_size(), 4)


def _places(x: torch.Tensor) -> int:
    """How many places of a map (B, C, H, W) fill whole vectors together."""
    return _lanes(x) // math.gcd(_lanes(x), x.shape[1])


def _eager_cpu(x: torch.Tensor) -> bool:
    """Whether a map is on a CPU, channels last in memory, and neither traced nor compiled."""
    return (
        not torch.jit.is_tracing()  # what is traced may be read where nothing of this is known
        and not torch.compiler.is_compiling()  # a compiler fuses layers with their neighbours
        and not x.is_cuda
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _table(x: torch.Tensor) -> torch.Tensor:
    """A map (B, C, H, W), channels last in memory, with `_places` in a row: (B * H * W / P, P * C), the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, _places(x) * x.shape[1])


def _line(table: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor, out: torch.Tensor) -> None:
    """out = slope * table + offset, by channels; computed in the type of `slope`, rounded once to that of `out`."""
    slope, offset = (t.repeat(table.shape[1] // len(t)) for t in (slope, offset))
    zero, one, unused = torch.zeros_like(slope), torch.ones_like(slope), slope.new_empty(2, 0).unbind()
    torch.native_batch_norm(table, slope, offset, zero, one, False, 0.0, 0.0, out=(out, *unused))


class _Normalised(torch.autograd.Function):
    """BatchNorm of a map, channels last, by the given mean and variance or by the batch's; also these two.

    The map that comes out is no view: the ReLU that follows works in place, and autograd would copy what a view is of.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        given: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        table = _table(x)
        if given:
            mean, variance = given
        else:
            one, zero = weight.new_ones(table.shape[1]), weight.new_zeros(table.shape[1])
            _, means, inverse = torch.native_batch_norm(table, one, zero, None, None, True, 0.0, eps)
            means, variances = (t.view(-1, len(weight)) for t in (means, inverse.pow(-2) - eps))
            mean = means.mean(0)
            variance = variances.mean(0) + (means - mean).square().mean(0)
        slope, y = weight * (variance + eps).rsqrt(), torch.empty_like(x)
        _line(table, slope, bias - slope * mean, _table(y))
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.by_batch, ctx.eps = given is None, eps
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        table, grads = _table(x), _table(grad.contiguous(memory_format=torch.channels_last))
        repeated = (t.repeat(table.shape[1] // len(t)) for t in (weight, mean, variance))
        _, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            grads, table, *repeated, None, None, False, ctx.eps, [False, True, True]
        )
        by_weight, by_bias = (t.view(-1, len(weight)).sum(0) for t in (by_weight, by_bias))
        inverse, by_input = (variance + ctx.eps).rsqrt(), torch.empty_like(x)
        slope, share = weight * inverse, len(weight) / x.numel() if ctx.by_batch else 0.0  # of a place in its mean
        _line(grads, slope, -slope * by_bias * share, _table(by_input))
        if ctx.by_batch:
            back, through_mean = -slope * inverse * by_weight * share, torch.empty_like(x)
            _line(table, back, -back * mean, _table(through_mean))
            by_input += through_mean
        return by_input, by_weight, by_bias, None, None


class ThinBatchNorm(nn.BatchNorm2d):
    """`BatchNorm2d` for few channels on a CPU: several places of the map lie side by side in one row of a table."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fits = (
            _eager_cpu(x)
            and self.weight.dtype.itemsize >= 4
            and x.shape[1] < _lanes(x)
            and x.shape[2] * x.shape[3] % _places(x) == 0
        )
        if not fits:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        given = None if self.training else (self.running_mean, self.running_var)
        y, mean, variance = _Normalised.apply(x, self.weight, self.bias, given, self.eps)
        if self.training:
            ranks.follow(self, mean, variance, x.numel() / self.num_features)
        return y


class PointConv(nn.Conv2d):
    """`Conv2d` of one place at a time: on a CPU in bf16, of few places, it is a product of two matrices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (_eager_cpu(x) and x.dtype == torch.bfloat16 and x.numel() <= POINTS * self.in_channels):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


def _points(module: nn.Module) -> bool:
    """Whether it is a convolution that answers for each place of a map, by all channels of that place."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
        and module.bias is None
    )


def trim(model: open_clip.CLIP) -> None:
    """Let a ResNet's pooling ask its one query, thin layers of BatchNorm work on vectors, and points be multiplied."""
    for module in model.visual.modules():
        if _points(module):
            module.__class__ = PointConv
        if type(module) is AttentionPool2d:
            module.__class__ = OneQueryPool
        if type(module) is nn.BatchNorm2d and module.num_features < 2 * VECTOR:  # that many fill one in bf16
            module.__class__ = ThinBatchNorm


def encode_text(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """`model.encode_text(tokens)`, (B, D), on a CPU: tokens after each caption's end are left out.

    Under autocast some of them stay, unseen by any feature: they fill the rows up to a multiple of `ROWS`, since
    products in bf16 are compiled for each number of rows.

    On a GPU, whose recorded encoders need batches of one shape, and for a model with an encoder of its own, one whose
    attention also looks ahead, or whose feature comes from another token, it is `model.encode_text`.

    Args:
        tokens: (B, context_length), the highest number of a row at its end.
    """
    own = getattr(model.encode_text, "__func__", None) is not open_clip.CLIP.encode_text
    if tokens.is_cuda or own or model.attn_mask is None or model.text_pool_type != "argmax":
        return model.encode_text(tokens)
    ends = tokens.argmax(1)
    width = int(ends.max()) + 1
    places = torch.arange(width).expand(len(tokens), width)
    kept = places <= ends[:, None]
    rows = kept.flatten().nonzero().squeeze(1)  # of the tokens that count, in the (B * width) of all
    last = kept.sum(1).cumsum(0) - 1  # each caption's end among them
    if torch.is_autocast_enabled("cpu"):
        spare = (~kept).flatten().nonzero().squeeze(1)
        rows = torch.cat([rows, spare[: -len(rows) % ROWS]])

    def attention(block: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
        projected = F.linear(x, block.in_proj_weight, block.in_proj_bias)
        padded = projected.new_zeros(kept.numel(), projected.shape[1]).index_copy(0, rows, projected)
        query, key, value = padded.view(len(tokens), width, 3, block.num_heads, -1).permute(2, 0, 3, 1, 4)
        # The plain attention is the faster one here: its backward takes a third of the fused one's time.
        with sdpa_kernel(SDPBackend.MATH):
            answers = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return block.out_proj(answers.transpose(1, 2).reshape(kept.numel(), -1).index_select(0, rows))

    dtype = model.transformer.get_cast_dtype()
    x = model.token_embedding(tokens[:, :width].flatten()[rows]).to(dtype)
    x = x + F.embedding(places.flatten()[rows], model.positional_embedding).to(dtype)
    for block in model.transformer.resblocks:
        x = x + block.ls_1(attention(block.attn, block.ln_1(x)))
        if block is model.transformer.resblocks[-1]:
            x = x[last]
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    x = model.ln_final(x)
    projection = model.text_projection
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
