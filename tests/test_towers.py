"""What open_clip computes for nothing is left out, and nothing else changes: against open_clip's own towers."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from abd_core import models, towers
from abd_core.text import tokenize

CAPTIONS = ["a cat", "", "a photo of a very old and very big house by the sea " * 3, "🍌 banana!", "dog dog dog"]


def theirs(name: str) -> open_clip.CLIP:
    """open_clip's own model with the weights of `models.build`."""
    model = open_clip.create_model(name, load_weights=False).double()
    model.load_state_dict(models.build(name, seed=1).double().state_dict())
    return model


class Counted(TorchDispatchMode):
    """Counts the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def gradients(model: nn.Module, features: torch.Tensor, part: str) -> dict[str, torch.Tensor]:
    """Of a scalar of the features for the parameters whose names begin with `part`; 0 where there is none."""
    weights = torch.linspace(-1, 2, features.numel(), dtype=features.dtype).view_as(features)
    model.zero_grad()
    (features.square() * weights).sum().backward()
    named = [(name, p) for name, p in model.named_parameters() if name.startswith(part)]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


@pytest.mark.parametrize("name", ["emoji-rn14", "RN50-quickgelu", "ViT-B-32"])
def test_text_features_and_their_gradients_are_those_of_open_clip(name: str) -> None:
    ours, reference = models.build(name, seed=1).double(), theirs(name)
    tokens = tokenize(CAPTIONS, context_length=ours.context_length)
    expected, found = reference.encode_text(tokens), towers.encode_text(ours, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for part in ("token_embedding", "positional", "transformer", "ln_final", "text_projection"):
        torch.testing.assert_close(
            gradients(ours, towers.encode_text(ours, tokens), part),
            gradients(reference, reference.encode_text(tokens), part),
            rtol=1e-9,
            atol=1e-12,
        )


def test_no_token_after_the_end_of_its_caption_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoded = models.build(), []
    monkeypatch.setattr(
        model.token_embedding, "forward", lambda t: encoded.append(t) or nn.Embedding.forward(model.token_embedding, t)
    )
    tokens = tokenize(CAPTIONS, context_length=20)
    towers.encode_text(model, tokens)
    assert len(encoded[0]) == (tokens != 0).sum() < tokens.numel()


def test_in_bf16_a_batch_of_captions_is_filled_up_to_a_multiple_of_tokens_which_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products in bf16 are compiled for each number of rows, which is another one in each batch."""
    model, linear = models.build(seed=1), F.linear
    seen: set[int] = set()
    monkeypatch.setattr(F, "linear", lambda x, *given: seen.add(len(x)) or linear(x, *given))
    results = []
    for multiple in (64, 1):
        monkeypatch.setattr(towers, "ROWS", multiple)
        for captions in (CAPTIONS, CAPTIONS[:2], ["dog " * 30] * 8):
            tokens = tokenize(captions, context_length=20)
            seen.clear()
            with torch.autocast("cpu", torch.bfloat16):
                features = towers.encode_text(model, tokens)
            room = len(tokens) * (int(tokens.argmax(1).max()) + 1)
            count = int((tokens != 0).sum())
            assert seen == {min(math.ceil(count / multiple) * multiple, room), len(tokens)}
            results.append((features, gradients(model, features, "")))
    for filled, plain in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(filled, plain, rtol=2**-6, atol=1e-3)


def test_a_text_tower_that_looks_ahead_or_pools_elsewhere_is_open_clips() -> None:
    tokens = tokenize(CAPTIONS, context_length=20)
    for name, value in {"attn_mask": None, "text_pool_type": "last"}.items():
        model = models.build().double()
        setattr(model, name, value)
        assert towers.encode_text(model, tokens).equal(model.encode_text(tokens))


@pytest.mark.parametrize(
    ("name", "resolution", "training"),
    [("emoji-rn14", 64, True), ("emoji-rn14", 64, False), ("RN50-quickgelu", 224, False)],
)
def test_image_features_statistics_and_gradients_are_those_of_open_clip(
    name: str, resolution: int, training: bool
) -> None:
    ours, reference = models.build(name, seed=1).double().train(training), theirs(name).train(training)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, resolution, resolution, generator=generator, dtype=torch.float64)
    results = []
    for model in (ours, reference):
        leaf = images.clone(memory_format=torch.channels_last).requires_grad_()
        features = model.encode_image(leaf)
        results.append((features, gradients(model, features, "visual"), leaf.grad, dict(model.named_buffers())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-9)


def test_the_pool_multiplies_one_row_an_image_by_each_of_its_matrices() -> None:
    images, counts = torch.rand(4, 3, 64, 64), []
    for pool in (towers.OneQueryPool, AttentionPool2d):
        model = models.build()
        model.visual.attnpool.__class__ = pool
        features = []
        hook = model.visual.layer4.register_forward_hook(lambda *given, kept=features: kept.append(given[2].detach()))
        with torch.no_grad():
            model.encode_image(images)
        hook.remove()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.visual.attnpool(features[0])
        counts.append(counter.get_total_flops())
    assert counts[0] < 0.5 * counts[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [5, 8, 12, 24])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)]
)
def test_batch_norm_of_few_channels_is_torchs(
    channels: int, dtype: torch.dtype, tolerance: float, training: bool
) -> None:
    """Against torch's in float64, of the same rounded numbers."""
    torch.manual_seed(channels)
    reference = nn.BatchNorm2d(channels).double().train(training)
    for tensor in (reference.weight.data, reference.running_var):
        tensor.copy_(torch.empty(channels).uniform_(0.5, 2))
    for tensor in (reference.bias.data, reference.running_mean):
        tensor.copy_(torch.empty(channels).uniform_(-1, 1))
    parameters = torch.promote_types(dtype, torch.float32)
    ours = copy.deepcopy(reference).to(parameters)
    ours.__class__ = towers.ThinBatchNorm
    x, grad = (3 * torch.randn(2, 6, channels, 8, 16) + 2).to(dtype).unbind()
    results = []
    for module, kind in ((ours, dtype), (reference, torch.float64)):
        leaf = x.to(kind, memory_format=torch.channels_last).requires_grad_()
        y = module(leaf)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.backward(grad.to(kind, memory_format=torch.channels_last))
        sums = {"weight": module.weight.grad, "bias": module.bias.grad, **module.state_dict()}
        results.append(((y, leaf.grad), sums))
    (maps, sums), (expected, expected_sums) = results
    close = functools.partial(torch.testing.assert_close, check_dtype=False)
    for ours_, theirs_ in zip(maps, expected, strict=True):
        close(ours_, theirs_, rtol=tolerance, atol=tolerance * theirs_.abs().max().item())
    for name, value in expected_sums.items():
        exact = 1e-12 if dtype == torch.float64 else 1e-4
        close(sums[name], value, rtol=exact, atol=exact * grad.abs().max().item())


@pytest.mark.parametrize("training", [True, False])
def test_a_relu_in_place_behind_a_batch_norm_of_few_channels_copies_nothing(training: bool) -> None:
    """Autograd clones the gradient of a view that is changed in place, into another layout of memory."""
    module = towers.ThinBatchNorm(4).train(training)
    x = torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    with Counted() as counted:
        torch.relu_(module(x)).square().sum().backward()
    assert counted.calls["aten.threshold_backward.default"] == 1
    assert counted.calls["aten.clone.default"] == 0


@pytest.mark.parametrize(
    ("dtype", "batch", "product"),
    [(torch.bfloat16, 16, True), (torch.bfloat16, 17, False), (torch.float32, 16, False), (torch.float64, 1, False)],
)
def test_a_convolution_of_few_points_is_a_product_in_bf16(dtype: torch.dtype, batch: int, product: bool) -> None:
    """Against torch's convolution in float64, of the same rounded numbers."""
    torch.manual_seed(batch)
    reference = nn.Conv2d(8, 24, 1, bias=False).double()
    reference.weight.data = reference.weight.data.to(dtype).double()
    ours = copy.deepcopy(reference).to(dtype)
    ours.__class__ = towers.PointConv
    x, grad = (torch.randn(batch, channels, 16, 16).to(dtype) for channels in (8, 24))  # 256 places an image
    results = []
    for module, kind in ((ours, dtype), (reference, torch.float64)):
        leaf = x.to(kind, memory_format=torch.channels_last).requires_grad_()
        with Counted() as counted:
            y = module(leaf)
            y.backward(grad.to(kind, memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (counted.calls["aten.convolution.default"] == 0) == (product and module is ours)
        results.append((y, leaf.grad, module.weight.grad))
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for found, expected in zip(*results, strict=True):
        close = tolerance * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=close, check_dtype=False)


def test_the_weights_of_a_product_are_trained_as_plain_adamw_trains_them() -> None:
    """On a CPU, torch's fused AdamW is silently wrong where a gradient lies otherwise than a weight."""
    torch.manual_seed(0)
    module = nn.Conv2d(8, 24, 1, bias=False).to(memory_format=torch.channels_last)
    module.__class__ = towers.PointConv
    x = torch.randn(4, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16), Counted() as counted:
        y = module(x.bfloat16())
    assert counted.calls["aten.convolution.default"] == 0
    (y.float() - torch.randn(4, 24, 4, 4)).square().mean().backward()
    trained = []
    for fused in (True, False):
        weight = nn.Parameter(module.weight.detach().clone(memory_format=torch.preserve_format))
        weight.grad = module.weight.grad
        torch.optim.AdamW([weight], lr=0.1, fused=fused, foreach=False).step()
        trained.append(weight.detach())
    torch.testing.assert_close(*trained)


def test_only_convolutions_of_points_become_products() -> None:
    visual = models.build().visual
    changed = {name for name, module in visual.named_modules() if isinstance(module, towers.PointConv)}
    convolutions = {name: module for name, module in visual.named_modules() if isinstance(module, nn.Conv2d)}
    assert changed == {name for name, module in convolutions.items() if module.kernel_size == (1, 1)}
    assert 0 < len(changed) < len(convolutions)
    others = {"stride": 2, "padding": 1, "groups": 2, "bias": True}
    for name, value in others.items():
        other = nn.Conv2d(4, 4, 1, **{"bias": False, name: value})
        visual.other = other
        towers.trim(SimpleNamespace(visual=visual))
        assert type(other) is nn.Conv2d


def test_batch_norm_in_training_passes_gradcheck() -> None:
    torch.manual_seed(0)
    module = towers.ThinBatchNorm(4).double()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.rand(2, 4, dtype=torch.float64).requires_grad_().unbind()

    def normalised(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(normalised, (x, weight, bias))


def test_a_trace_of_the_image_encoder_gives_its_features() -> None:
    visual = models.build().visual.eval()
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    traced = torch.jit.trace(visual, images, check_trace=False)
    torch.testing.assert_close(traced(images), visual(images), rtol=1e-4, atol=1e-5)


def test_a_compiled_image_encoder_has_the_same_features_and_running_statistics_in_half_precision() -> None:
    model, compiled = models.build(seed=0).train(), models.build(seed=0).train()
    compiled.visual.compile(backend="aot_eager")  # the whole of torch.compile but for its code generator
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            models.encode_image(compiled, images), models.encode_image(model, images), rtol=0.05, atol=0.01
        )
    for ours, theirs in zip(compiled.visual.buffers(), model.visual.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.01)
