"""InfoNCE of both implementations against float64 cross-entropy over the whole matrix. Triton's kernels run interpreted
where there is no GPU (`conftest.py`)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import FRESH, Guards, guarded, runs_here, start_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from abd_core import losses
from abd_core.config import ConfigError
from abd_core.kernels import infonce, infonce_triton
from abd_core.kernels.infonce import info_nce, library_is_faster

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # rows beyond the matrix
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the largest
# Neither a block's multiple nor one block only; (queries, keys, dim, weights, separate positives, offset).
CASES = {
    "one pair": (1, 1, 1, (1.0, 1.0), False, 0),
    "clip": (150, 150, 40, (0.5, 0.5), False, 0),
    "unequal weights": (129, 129, 7, (0.3, 1.7), False, 0),
    "keys to queries": (65, 65, 64, (0.0, 1.0), False, 0),
    "other ranks' keys": (40, 170, 70, (1.0, 0.0), False, 97),
    "separate positives": (70, 70, 33, (1.0, 0.0), True, 0),
    "all of it": (67, 67, 130, (0.4, 0.9), True, 0),
    "positives among more keys": (30, 90, 16, (1.0, 0.0), True, 60),
}
IMPLEMENTATIONS = ["torch", "one chunk", "chunks", "triton", "parts"]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations, each at one go and in pieces; "torch" is the whole matrix, where it is small."""
    for limit, few in {"CHUNK_BYTES": 16 * 1024, "CPU_CHUNK_BYTES": 16 * 1024, "SOFTMAX_BYTES": 6 * 1024}.items():
        monkeypatch.setattr(infonce, limit, few if request.param == "chunks" else 1 << 30)
    if "chunk" in request.param:
        monkeypatch.setattr(infonce, "FEW", 0)
        monkeypatch.setattr(infonce, "FEW_ALONE", 0)
    if request.param == "parts":
        monkeypatch.setattr(infonce_triton, "PARTIALS", 1)
        monkeypatch.setattr(infonce_triton, "BUFFER_BYTES", 1)
    return runs_here({"one chunk": "torch", "chunks": "torch", "parts": "triton"}.get(request.param, request.param))


def features(count: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(FRESH + seed), dtype=torch.float64)
    return F.normalize(rows, dim=1).to(DEVICE, dtype)


def draw(case: str, dtype: torch.dtype, seed: int = 0) -> tuple[list[torch.Tensor], dict[str, Any]]:
    batch, count, dim, weights, separate, offset = CASES[case]
    tensors = [features(batch, dim, seed, dtype), features(count, dim, seed + 1, dtype), torch.tensor(30.0)]
    tensors += [features(batch, dim, seed + 2, dtype)] if separate else []
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors], {"weights": weights, "offset": offset}


def reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    positives: torch.Tensor | None = None,
    *,
    weights: tuple[float, float] = (1.0, 0.0),
    offset: int = 0,
) -> torch.Tensor:
    q, k, scale = queries.double(), keys.double(), scale.double()
    own = torch.arange(len(q), device=q.device) + offset
    logits = scale * q @ k.T
    if positives is not None:
        logits = logits.scatter(1, own[:, None], (scale * (q * positives.double()).sum(1))[:, None])
    loss = weights[0] * F.cross_entropy(logits, own)
    return loss + weights[1] * F.cross_entropy(logits.T, own) if weights[1] else loss


def with_gradients(loss: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The loss of (queries, keys, scale[, positives]) and its gradients."""
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def assert_close(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float, *, floor: float = 1e-3
) -> None:
    for got, wanted in zip(ours, theirs, strict=True):
        error = (got.double() - wanted.double()).abs().max().item()
        assert error <= tolerance * max(wanted.abs().max().item(), floor)


def called(impl: str, settings: dict[str, Any]) -> Callable[..., torch.Tensor]:
    return lambda q, k, s, p=None: info_nce(q, k, s, positives=p, impl=impl, **settings)


def half_of(impl: str) -> torch.dtype:
    """Triton's interpreter has no bf16 products."""
    return torch.float16 if impl == "triton" and DEVICE == "cpu" else torch.bfloat16


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["single", "half"])
def test_loss_and_gradients_are_those_of_the_whole_matrix(case: str, precision: str, impl: str):
    dtype = torch.float32 if precision == "single" else half_of(impl)
    tensors, settings = draw(case, dtype)
    ours = with_gradients(called(impl, settings), tensors)
    wanted = with_gradients(lambda *inputs: reference(*inputs, **settings), tensors)
    assert [tensor.dtype for tensor in ours[1:]] == [tensor.dtype for tensor in tensors] and ours[0].shape == ()
    # One pair has no gradient. A GPU, which fuses products and sums, leaves the rounding of logits of the scale's size.
    rounded = case == "one pair" and DEVICE == "cuda"
    assert_close(ours, wanted, TOLERANCE[dtype], floor=tensors[2].item() if rounded else 1e-3)


@pytest.mark.parametrize(("precision", "keys", "tolerance"), [("single", 8192, 5e-7), ("half", 64, 8e-5)])
def test_a_positive_is_not_rounded_with_the_others_nor_they_with_it(
    precision: str, keys: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    """The others would be where a product adds in its order, as a GPU's does: each at the size of the sum so far."""

    def in_order(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(a), b.shape[1], device=DEVICE)
        for column, row in zip(a.float().T, b.float(), strict=True):
            out.addr_(column, row)
        return out

    monkeypatch.setattr(infonce_triton, "_product", in_order)
    impl, dtype = runs_here("triton"), torch.float32 if precision == "single" else half_of("triton")
    tensors = [features(64, 64, 0, dtype), features(keys, 64, 1, dtype), torch.tensor(1.0, device=DEVICE)]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    wanted = torch.autograd.grad(reference(*exact), exact[:2])
    _, *ours, _, _ = infonce._op(*tensors, None, 1.0, 0.0, 0, True, impl)
    for got, right in zip(ours, wanted, strict=True):  # float32, before they take the features' dtype
        assert (got / 64 - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("weight", [1.0, 1e-4, 1e4])
def test_small_probabilities_keep_their_digits_in_half_precision(weight: float):
    """Of many keys each has a small share, and a small weight makes it smaller: float16 has digits down to 6e-5."""
    impl, dtype = runs_here("triton"), torch.float16
    tensors = [features(64, 32, 0, dtype), features(2048, 32, 1, dtype), torch.tensor(1.0, device=DEVICE)]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    wanted = torch.autograd.grad(reference(*exact), exact[:2])
    _, *ours, _, _ = infonce._op(*tensors, None, weight, 0.0, 0, True, impl)
    for got, right in zip(ours, wanted, strict=True):
        assert (got / weight / 64 - right).abs().max() <= 1e-5 * right.abs().max()


def test_either_of_torch_s_settings_for_tf32_is_heard():
    code = """
import torch
from abd_core.kernels.dispatch import tf32
from abd_core.kernels.infonce import info_nce
assert not tf32()
{}
assert tf32() is {}
info_nce(torch.randn(4, 8), torch.randn(4, 8), 1.0)
"""
    settings = {
        'torch.set_float32_matmul_precision("high")': True,
        'torch.backends.cuda.matmul.fp32_precision = "tf32"': True,
        'torch.backends.fp32_precision = "tf32"': True,
        'torch.backends.mkldnn.matmul.fp32_precision = "bf16"': False,
    }
    children = [start_python(code.format(line, told)) for line, told in settings.items()]
    for child in children:
        _, err = child.communicate(timeout=120)
        assert child.returncode == 0, err


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("chunk", "few"), [(1, 0), (1 << 30, 0), (1 << 30, 1 << 18)])
def test_gradients_are_those_of_finite_differences(case: str, chunk: int, few: int, monkeypatch: pytest.MonkeyPatch):
    for limit in ("CHUNK_BYTES", "CPU_CHUNK_BYTES"):
        monkeypatch.setattr(infonce, limit, chunk)
    monkeypatch.setattr(infonce, "FEW", few)
    batch, count, dim, weights, separate, offset = CASES[case]
    small = [features(min(n, 4 + n // 40), min(dim, 3), i, torch.float64) for i, n in enumerate((batch, count, batch))]
    scale = torch.tensor(3.0, dtype=torch.float64, device=DEVICE)
    tensors = [*small[:2], scale, *(small[2:] if separate else [])]
    settings = {"weights": weights, "offset": min(offset, len(small[1]) - len(small[0]))}
    inputs = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(called("torch", settings), inputs)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["opposite", "equal", "found", "one cluster"])
def test_extreme_cosines_and_scales_stay_exact(kind: str, scale: float, impl: str):
    q = features(70, 16, 0)
    k = {"opposite": -q, "equal": q[:1].expand(70, 16), "found": q, "one cluster": -F.normalize(q + 9 * q[:1], dim=1)}[
        kind
    ]
    if kind == "one cluster":
        q = F.normalize(q + 9 * q[:1], dim=1)  # every cosine is near -1
    tensors = [tensor.clone().requires_grad_() for tensor in (q, k, torch.tensor(scale, device=DEVICE))]
    settings = {"weights": (0.5, 0.5)}
    ours = with_gradients(called(impl, settings), tensors)
    wanted = with_gradients(lambda *inputs: reference(*inputs, **settings), tensors)
    # What is left of two nearly equal probabilities has their rounding, in units of the logits.
    for got, right, size in zip(ours, wanted, (scale, scale, scale, 1.0), strict=True):
        assert torch.isfinite(got).all()
        assert (got - right).abs().max() <= 1e-5 * max(right.abs().max().item(), size, 1e-3)


@pytest.mark.parametrize("case", ["unequal weights", "other ranks' keys", "all of it", "positives among more keys"])
@pytest.mark.parametrize("precision", ["single", "half"])
def test_nothing_beyond_features_and_results_is_read_or_written(case: str, precision: str, impl: str):
    tensors, settings = draw(case, torch.float32 if precision == "single" else half_of(impl))
    tensors = [guarded(tensor.detach()).requires_grad_() for tensor in tensors]
    with Guards() as guards:
        value = called(impl, settings)(*tensors)
        found = torch.autograd.grad(value, tensors, guarded(torch.ones_like(value)))
    assert guards.untouched()
    assert all(torch.isfinite(got).all() for got in (value, *found))


def test_rows_that_lie_apart_in_memory_are_right(impl: str):
    q, k = features(40, 66, 0)[:, ::2], features(33, 40, 1).T
    assert not q.is_contiguous() and not k.is_contiguous()
    scale = torch.tensor(5.0, device=DEVICE)
    torch.testing.assert_close(info_nce(q, k, scale, impl=impl).double(), reference(q, k, scale), rtol=1e-5, atol=0)


def test_the_same_inputs_give_the_same_bits(impl: str):
    tensors, settings = draw("all of it", torch.float32)
    first, second = (with_gradients(called(impl, settings), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes, and of that of each operation, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = {}

    @property
    def size(self) -> int:
        return max(self.of.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [tensor.nbytes for tensor in torch.utils._pytree.tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        name = function.overloadpacket.__name__
        self.of[name] = max(self.of.get(name, 0), *made, 0)
        return out


def test_the_matrix_is_neither_made_nor_kept(impl: str, monkeypatch: pytest.MonkeyPatch):
    for limit in ("CHUNK_BYTES", "CPU_CHUNK_BYTES"):
        monkeypatch.setattr(infonce, limit, 4 * 400 * 64)
    monkeypatch.setattr(infonce, "FEW", 400 * 400 - 1)
    monkeypatch.setattr(infonce_triton, "BUFFER_BYTES", 1)  # one block of 64 rows
    tensors = [features(400, 8, 0).requires_grad_(), features(400, 8, 1).requires_grad_()]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        info_nce(*tensors, 5.0, weights=(0.5, 0.5), impl=impl)
    assert 0 < max(kept) <= 4 * 400 * 8
    q, k, scale = *(tensor.detach() for tensor in tensors), torch.tensor(5.0, device=DEVICE)
    forward = infonce_triton.forward if impl == "triton" else infonce._forward
    with Largest() as made:
        forward(q, k, scale, None, (0.5, 0.5), 0, True)
    assert 4 * 400 * 8 <= made.size <= 4 * 400 * 64


@pytest.mark.parametrize("case", CASES)
def test_without_gradients_the_loss_is_the_same(case: str, impl: str):
    tensors, settings = draw(case, torch.float32)
    with torch.no_grad():
        alone = called(impl, settings)(*tensors)
    assert_close([alone], [reference(*tensors, **settings)], TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("weights", "grads", "whole"), [((0.5, 0.5), True, True), ((1.0, 0.0), True, False), ((0.5, 0.5), False, False)]
)
def test_on_a_cpu_chunks_are_small_but_where_the_whole_saves_a_pass(
    weights: tuple[float, float], grads: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(infonce, "CPU_CHUNK_BYTES", 4 * 400 * 16)
    monkeypatch.setattr(infonce, "SOFTMAX_BYTES", 4 * 400 * 5)
    q, k, scale = features(400, 8, 0).cpu(), features(400, 8, 1).cpu(), torch.tensor(5.0)
    with Largest() as made:
        infonce._forward(q, k, scale, None, weights, 0, grads)
    assert made.size == 4 * 400 * (400 if whole else 16)
    assert grads or made.of["_log_softmax"] == 4 * 400 * 5


@pytest.mark.parametrize("grads", [False, True])
def test_of_a_small_batch_one_direction_on_a_cpu_takes_the_operations_of_the_plain_one(
    grads: bool, monkeypatch: pytest.MonkeyPatch
):
    if not grads:  # without gradients, larger ones count as small
        monkeypatch.setattr(infonce, "FEW", 0)
    q, k, scale = features(40, 8, 0).cpu().requires_grad_(grads), features(40, 8, 1).cpu(), torch.tensor(5.0)
    own = torch.arange(40)
    info_nce(q, k, scale)  # which counts the positives, once
    with Largest() as plain:
        F.cross_entropy(scale * q @ k.t(), own)
    with Largest() as ours:
        info_nce(q, k, scale)
    assert ours.of == plain.of


def test_only_what_needs_a_gradient_costs_one():
    q, k = features(20, 4, 0), features(20, 4, 1)
    with torch.no_grad():
        plain = info_nce(q.clone().requires_grad_(), k, 2.0)
    assert not plain.requires_grad and plain.grad_fn is None
    outputs = infonce._op(q, k, torch.tensor(2.0, device=DEVICE), None, 1.0, 0.0, 0, False, "torch")
    assert [output.numel() for output in outputs] == [1, 0, 0, 0, 0]


def test_gradients_of_gradients_are_right_or_refused(impl: str):
    tensors, settings = draw("unequal weights", torch.float32)
    first = torch.autograd.grad(called(impl, settings)(*tensors), tensors[0], create_graph=True)[0]
    if impl == "torch" and infonce.FEW and DEVICE == "cpu":  # autograd's own
        wanted = torch.autograd.grad(reference(*tensors, **settings), tensors[0], create_graph=True)[0]
        ours, theirs = (torch.autograd.grad(one.double().square().sum(), tensors) for one in (first, wanted))
        assert_close(list(ours), list(theirs), 1e-5)
        return
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        torch.autograd.grad(first.sum(), tensors[0])


def test_it_is_an_operator_that_compiles_without_a_break(impl: str):
    tensors, settings = draw("all of it", torch.float32)
    compiled = torch.compile(called(impl, settings), backend="aot_eager", fullgraph=True)
    plain = with_gradients(called(impl, settings), tensors)
    assert_close(with_gradients(compiled, tensors), plain, 1e-7)
    q, k, scale, p = (tensor.detach().clone().requires_grad_() for tensor in tensors)
    torch.library.opcheck(infonce._op, (q, k, scale, p, 0.4, 0.9, 0, True, impl))
    torch.library.opcheck(infonce._op, (q, k, scale, None, 0.4, 0.9, 0, True, impl))
    lying = (q.detach().T.contiguous().T.requires_grad_(), k, scale, p.detach().T.contiguous().T.requires_grad_())
    torch.library.opcheck(infonce._op, (*lying, 0.4, 0.9, 0, True, impl))


def test_under_autocast_products_are_of_its_dtype():
    tensors, settings = draw("clip", torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = with_gradients(called("torch", settings), tensors)
    rounded = [t.detach().bfloat16().requires_grad_() for t in tensors[:2]] + tensors[2:]
    assert_close(cast, with_gradients(called("torch", settings), rounded), 1e-2)
    assert torch.equal(cast[0], called("torch", settings)(*rounded)) and cast[1].dtype == torch.float32


def test_what_is_compiled_under_autocast_is_what_is_called_under_it(impl: str):
    tensors, settings = draw("clip", torch.float32)
    loss = called(impl, settings)
    with torch.autocast(DEVICE, half_of(impl)):
        plain = with_gradients(loss, tensors)
        compiled = with_gradients(torch.compile(loss, fullgraph=True), tensors)
    assert_close(compiled, plain, 1e-2)
    assert compiled[1].dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_a_call_that_keeps_no_tensors_leaves_later_ones_their_gradients(mode: Callable):
    tensors, settings = draw("clip", torch.float32)
    expected = with_gradients(called("torch", settings), tensors)
    infonce._count.cache_clear()
    with mode():
        called("torch", settings)(*(torch.empty(t.shape, device=DEVICE) for t in tensors))
    found = with_gradients(called("torch", settings), tensors)
    assert all(map(torch.equal, found, expected))


def test_the_module_is_called_like_open_clip_s():
    tensors, _ = draw("clip", torch.float32)
    ours, theirs = losses.ClipLoss(), open_clip.ClipLoss()
    assert_close(with_gradients(ours, tensors), with_gradients(theirs, tensors), 1e-5)
    bias = torch.tensor(-3.0, device=DEVICE)
    told = ours(*tensors, logit_bias=bias, output_dict=True)
    assert told.keys() == theirs(*tensors, logit_bias=bias, output_dict=True).keys()
    torch.testing.assert_close(told["contrastive_loss"], theirs(*tensors, logit_bias=bias), rtol=1e-5, atol=0)


def test_the_module_is_made_like_open_clip_s():
    ours, theirs = (inspect.signature(kind).parameters for kind in (losses.ClipLoss, open_clip.ClipLoss))
    assert [*ours] == [*theirs]
    assert {n for n in ours if ours[n].default != theirs[n].default} == {"gather_with_grad"}  # theirs is not exact
    tensors, _ = draw("clip", torch.float32)
    made = losses.ClipLoss(True, False, True, 0, 1, False)
    assert torch.equal(made(*tensors), losses.ClipLoss()(*tensors))


@pytest.mark.parametrize(
    ("option", "word"), [({"use_horovod": True}, "False expected"), ({"gather_with_grad": False}, "True expected")]
)
def test_what_of_open_clip_s_module_has_no_counterpart_is_refused(option: dict[str, bool], word: str):
    with pytest.raises(ConfigError, match=rf"^ClipLoss\.{next(iter(option))} = .*: {word}, [^\n]*$"):
        losses.ClipLoss(world_size=2, **option)


RANK = """
import json, sys, torch, torch.distributed as dist
from abd_core.losses import ClipLoss
rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
generator = torch.Generator().manual_seed(0)
whole = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
own = whole.chunk(world, 1)[rank].clone().requires_grad_()
loss = ClipLoss(rank=rank, world_size=world)(own[0], own[1], scale)
loss.backward()
for tensor in (loss.detach(), scale.grad):
    dist.all_reduce(tensor)
print(json.dumps([loss.item() / world, scale.grad.item() / world, (own.grad / world).tolist()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_have_the_loss_and_the_gradients_of_one_process(world: int, tmp_path):
    script = "import sys\nsys.argv[1:] = {}\n" + RANK
    children = [start_python(script.format([str(r), str(world), str(tmp_path / "s")])) for r in range(world)]
    told = []
    for child in children:
        out, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
        told.append(json.loads(out))
    whole = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensors = [whole[0].clone(), whole[1].clone(), torch.tensor(4.0, dtype=torch.float64)]
    loss, images, texts, scale = with_gradients(losses.clip_loss, [t.requires_grad_() for t in tensors])
    joint = torch.cat([torch.tensor(part[2], dtype=torch.float64) for part in told], 1)
    torch.testing.assert_close(joint, torch.stack([images, texts]), rtol=1e-10, atol=1e-12)
    for part in told:
        assert part[:2] == pytest.approx([loss.item(), scale.item()], rel=1e-10)


COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from abd_core.kernels import infonce_triton as kernels

sizes = {"first": "i32", "batch": "i32", "count": "i32", "dim": "i32", "offset": "i32"}
for half in (True, False):
    kind, (rows, columns, inner) = ("*bf16", kernels.BLOCKS[2]) if half else ("*fp32", kernels.BLOCKS[4])
    floats = dict.fromkeys(["scale", "own", "row_sums", "column_sums"], "*fp32")
    types = {"q": kind, "k": kind, "out": kind, "row_weight": "fp32", "column_weight": "fp32", **floats, **sizes}
    fixed = {"BLOCK_Q": rows, "BLOCK_K": columns, "BLOCK_D": inner, "GROUP": kernels.GROUP, "PRECISION": "tf32"}
    fixed |= {"EVEN": True, "OWN": False, "ROWS": True, "COLUMNS": True, "LOG2E": 1.44}
    used = {kernels._sums_kernel: kernels.SUMS_WARPS, kernels._gradient_kernel: kernels.GRADIENT_WARPS}
    for kernel, warps in used.items():
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        even = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in ("dim", "count")]
        source = ASTSource(
            kernel,
            signature,
            {(names.index(name),): value for name, value in fixed.items()},
            {(i,): [["tt.divisibility", 16]] for i in even},
        )
        options = {"num_warps": warps, "num_stages": kernels.NUM_STAGES}
        for capability in (80, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(made.asm["cubin"])
                tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
                told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
            assert "REG" in told and " STACK:0 " in told, told
            print(kernel.__name__, half, capability, made.metadata.shared)

kernel, fixed = kernels._combine_kernel, {"AGAIN": False, "BLOCK": kernels.COMBINED, "PARTS": kernels.PARTS}
numbers = {"number": "i32", "count": "i32", "weight": "fp32", "second_weight": "fp32"}
types = {**numbers, **dict.fromkeys(fixed, "constexpr")}
signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in fixed.items()})
print(kernel.__name__, len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))

kernel, fixed = kernels._own_kernel, {"BLOCK": kernels.OWN_BLOCK, "ROWS": True, "COLUMNS": True}
numbers = {"dim": "i32", "row_weight": "fp32", "column_weight": "fp32"}
for separate in (True, False):
    types = {**numbers, **dict.fromkeys([*fixed, "OWN"], "constexpr"), "q": "*bf16", "p": "*bf16"}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in {**fixed, "OWN": separate}.items()}
    source = ASTSource(kernel, signature, constants)
    print(kernel.__name__, len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


@pytest.mark.slow
def test_kernels_compile_for_gpus_without_spilling_registers():
    child = start_python(COMPILE, TRITON_INTERPRET="0")
    out, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    assert len(out.splitlines()) == 11


BAD: dict[str, tuple[Callable[..., object], str]] = {
    "no matrix": (lambda q: info_nce(q[0], q, 1.0), r"\(B, D\) and keys \(N, D\) expected, not \(4,\) and \(6, 4\)"),
    "another dim": (lambda q: info_nce(q, q[:, 1:], 1.0), r"not \(6, 4\) and \(6, 3\)"),
    "nothing": (lambda q: info_nce(q[:0], q, 1.0), r"not \(0, 4\) and \(6, 4\)"),
    "integers": (lambda q: info_nce(q.long(), q.long(), 1.0), "float16, .* or float64 expected, not torch.int64"),
    "eighths": (lambda q: info_nce(*[q.to(torch.float8_e4m3fn)] * 2, 1.0), "float64 expected, not torch.float8_e4m3fn"),
    "two dtypes": (lambda q: info_nce(q, q.double(), 1.0), "keys are torch.float64 on .*, queries torch.float32"),
    "positives": (lambda q: info_nce(q, q, 1.0, positives=q[1:]), r"positives \(6, 4\) expected, not \(5, 4\)"),
    "few keys": (lambda q: info_nce(q, q[1:], 1.0), "offset 0 with 6 queries and 5 keys"),
    "offset": (lambda q: info_nce(q[1:], q, 1.0, offset=2), "offset 2 with 5 queries and 6 keys"),
    "two ways": (lambda q: info_nce(q[1:], q, 1.0, weights=(1, 1)), "as many keys as queries, not 6 and 5"),
    "no way": (lambda q: info_nce(q, q, 1.0, weights=(0, 0)), "a direction with a weight other than 0"),
    "scales": (lambda q: info_nce(q, q, q[0]), r"a scale of one element expected, not \(4,\)"),
    "impl": (lambda q: info_nce(q, q, 1.0, impl="cuda"), "impl = 'cuda': 'auto', 'torch' or 'triton' expected"),
    "float64": (lambda q: info_nce(q.double(), q.double(), 1.0, impl="triton"), "has no float64; 'torch' has"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_in_one_line(case: str):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(features(6, 4, 0))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_triton_without_a_gpu_is_refused():
    code = "import torch; from abd_core.kernels.infonce import info_nce; info_nce(*torch.ones(2, 2, 2), 1, impl={!r})"
    child = start_python(code.format("triton"), TRITON_INTERPRET="0")
    _, err = child.communicate(timeout=120)
    assert child.returncode and "impl = 'triton' needs a CUDA device, not cpu" in err.splitlines()[-1]
    child = start_python(code.format("auto"), TRITON_INTERPRET="0")
    assert child.communicate(timeout=120) and child.returncode == 0


def test_only_large_products_of_float32_without_tf32_are_the_matrix_library_s():
    assert library_is_faster(torch.float32, 2048 * 2048) and not library_is_faster(torch.float32, 2047 * 2048)
    assert not library_is_faster(torch.bfloat16, 1 << 30)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert not library_is_faster(torch.float32, 1 << 30)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_large_batches_are_right_and_fit(dtype: torch.dtype):
    tensors = [features(8200, 1024, i, dtype).requires_grad_() for i in (0, 1)]
    tensors.append(torch.tensor(60.0, device="cuda", requires_grad=True))
    settings = {"weights": (0.5, 0.5)}
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = with_gradients(called("torch", settings), exact)
    del exact
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = with_gradients(called("triton", settings), tensors)
    assert torch.cuda.max_memory_allocated() - before < 3 * infonce_triton.BUFFER_BYTES
    assert_close(ours, wanted, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "batch", "impl"), [(torch.float32, 2100, "torch"), (torch.float32, 300, "triton")])
def test_on_a_gpu_auto_leaves_large_products_of_float32_to_the_matrix_library(dtype, batch: int, impl: str):
    tensors = [features(batch, 64, i, dtype).requires_grad_() for i in (0, 1)]
    tensors.append(torch.tensor(60.0, device="cuda", requires_grad=True))
    auto, named = (with_gradients(called(i, {"weights": (0.5, 0.5)}), tensors) for i in ("auto", impl))
    assert all(torch.equal(a, b) for a, b in zip(auto, named, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_tf32_is_used_where_torch_allows_it():
    tensors, settings = draw("clip", torch.float32)
    exact = with_gradients(called("triton", settings), tensors)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        quick = with_gradients(called("triton", settings), tensors)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(quick[0], exact[0])
    assert_close(quick, exact, 1e-2)


@pytest.mark.gpu
def test_on_a_gpu_a_hundred_runs_give_the_same_bits():
    tensors = [features(3000, 520, i, torch.bfloat16).requires_grad_() for i in (0, 1)]
    tensors.append(torch.tensor(60.0, device="cuda", requires_grad=True))
    first = with_gradients(called("triton", {"weights": (0.5, 0.5)}), tensors)
    for _ in range(100):
        again = with_gradients(called("triton", {"weights": (0.5, 0.5)}), tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
