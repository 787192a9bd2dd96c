"""CUDA graphs of a model's encoders: one launch in the place of the thousands that keep a fast GPU waiting for the CPU.

What is recorded are the same kernels with the same inputs, so that results stay what they were. On a CPU, nothing here
does anything.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import torch

WARM = 2  # calls of a kind that run as they are: kernels are chosen and compiled in them, not while one is recorded


class _Context:
    """Lives as long as a forward pass may get its backward pass."""


class _Call(torch.nn.Module):
    """A method of a model as a module of its own, whose parameters can be exchanged."""

    def __init__(self, model: torch.nn.Module, method: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.method(inputs)


class Recording:
    """One kind of call of an encoder, recorded: its forward pass and, where something is trained, its backward pass.

    Inputs, features and gradients have fixed places. Features are copied from theirs; gradients are handed out as they
    are, and are good until the next backward pass. A forward pass has one: it writes over the activations.
    """

    def __init__(self, call: _Call, inputs: torch.Tensor) -> None:
        self.inputs = inputs.detach().clone().requires_grad_(inputs.requires_grad)
        # Other leaves that share the weights' memory: what autograd keeps of the weights belongs to another stream.
        named = {name: p for name, p in call.named_parameters() if p.requires_grad and torch.is_grad_enabled()}
        leaves = {name: p.detach().requires_grad_() for name, p in named.items()}
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        kind = self.inputs.device.type
        cast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False)
        # thread_local: the threads that load and pin images go on meanwhile.
        with cast, torch.cuda.graph(self.forward_graph, capture_error_mode="thread_local"):
            features = torch.func.functional_call(call, leaves, (self.inputs,))
        self.parameters: list[torch.nn.Parameter] = []
        self.grads: list[torch.Tensor | None] = [None]  # of the inputs, then of the parameters
        if features.requires_grad:
            self.grad = torch.empty_like(features)
            wanted = [*leaves.values(), *([self.inputs] if inputs.requires_grad else [])]
            with torch.cuda.graph(
                self.backward_graph, pool=self.forward_graph.pool(), capture_error_mode="thread_local"
            ):
                found = torch.autograd.grad(features, wanted, self.grad, allow_unused=True)
            if inputs.requires_grad:
                self.grads[0] = found[-1]
            for parameter, grad in zip(named.values(), found, strict=False):
                if grad is not None:  # None: of the other encoder
                    self.parameters.append(parameter)
                    self.grads.append(grad)
        self.features, self.differentiable = features.detach(), features.requires_grad
        self.turn = 0  # number of forward passes
        self.waiting: weakref.ref[_Context] | None = None  # the last one's

    def waits(self) -> bool:
        """Whether what the last forward pass left is still needed by a backward pass."""
        return self.waiting is not None and self.waiting() is not None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        self.inputs.detach().copy_(inputs)
        self.forward_graph.replay()
        return self.features.clone()

    def backward(self, grad: torch.Tensor, turn: int) -> list[torch.Tensor | None]:
        if turn != self.turn:
            raise RuntimeError("a recorded encoder ran again before the gradient of its last features was taken")
        if self.waiting is None:
            raise RuntimeError("a recorded encoder gives the gradient of its features once")
        if self.parameters and self.parameters[0].grad is not None:  # they add up, and may lie where new ones come
            for parameter in self.parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()
        self.grad.copy_(grad)
        self.backward_graph.replay()
        self.waiting = None
        return [None if g is None else g.detach() for g in self.grads]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, inputs: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        features = recording.forward(inputs)
        ctx.recording, ctx.turn, ctx.lifetime = recording, recording.turn, _Context()
        recording.waiting = weakref.ref(ctx.lifetime)
        return features

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *ctx.recording.backward(grad, ctx.turn))


class Encoder:
    """A method of `model` that encodes a batch, recorded when a kind of call comes for the third time.

    Calls are of a kind if they agree in shape, layout and type of the batch, in what is trained, and in all modes.
    Recorded are those with gradients, and those of a frozen model; where memory is short or a model does what cannot
    be recorded, a warning says so and calls of that kind run as they are.
    """

    def __init__(self, model: torch.nn.Module, method: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.call, self.method = _Call(model, method), method
        self.modules, self.parameters = list(model.modules()), list(model.parameters())
        self.seen: dict[Hashable, int] = {}
        self.recordings: dict[Hashable, Recording | None] = {}

    def kind(self, inputs: torch.Tensor) -> Hashable:
        device = inputs.device.type
        return (
            (inputs.shape, inputs.stride(), inputs.dtype, inputs.requires_grad),
            (torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            tuple(module.training for module in self.modules),
            tuple(parameter.requires_grad for parameter in self.parameters),
        )

    def __call__(self, inputs: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        if more or options or not (torch.is_grad_enabled() or not any(p.requires_grad for p in self.parameters)):
            return self.method(inputs, *more, **options)
        kind = self.kind(inputs)
        if kind not in self.recordings:
            self.seen[kind] = self.seen.get(kind, 0) + 1
            if self.seen[kind] <= WARM:
                return self.method(inputs)
            try:
                with torch.cuda.stream(torch.cuda.current_stream()):  # which a failed recording would not put back
                    self.recordings[kind] = Recording(self.call, inputs)
            except RuntimeError as error:
                self.recordings[kind] = None
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"an encoder is not recorded as a CUDA graph and runs as it is: {reason}", stacklevel=2)
        recording = self.recordings[kind]
        if recording is None or recording.waits():
            return self.method(inputs)
        if not recording.differentiable:
            return recording.forward(inputs)
        return _Replay.apply(recording, inputs, *recording.parameters)


@contextmanager
def recorded(model: open_clip.CLIP, *, on: bool = True) -> Iterator[None]:
    """Inside, the encoders of a CLIP on a GPU are recorded and replayed: see `Encoder`.

    Its weights must stay where they are: they may be changed in place, not moved.

    Args:
        on: False does nothing, for a loop that encodes in parts or over several ranks.
    """
    if not on or not next(model.parameters()).is_cuda:
        yield
        return
    if isinstance(model.encode_text, Encoder):  # already: one model may stand for two
        yield
        return
    model.visual.forward = Encoder(model.visual, model.visual.forward)
    model.encode_text = Encoder(model, model.encode_text)
    try:
        yield
    finally:
        del model.visual.forward, model.encode_text
