"""CUDA graphs of the encoders: on a GPU, training with them is training without; the bookkeeping, on a CPU too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURE
from torch.utils._python_dispatch import TorchDispatchMode

from abd_core import graphs, models, towers
from abd_core.defences import freeze_batch_norm
from abd_core.graphs import WARM, Encoder, recorded
from abd_core.losses import clip_loss
from abd_core.train import Step, TrainConfig, TrainingError, fit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RTOL, ATOL = (1e-2, 1e-3) if DEVICE == "cuda" else (1e-5, 1e-6)  # on a GPU: convolutions in TF32, summed in any order


class Tape(TorchDispatchMode):
    """Stands for a CUDA graph on a CPU: keeps the operations, and does them again in the same memory.

    As on a GPU, nothing that is recorded has an effect before the first replay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple] = []
        self.own: set[int] = set()  # memory that came with the recording
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []  # other memory that it wrote into

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        writes = func._schema.is_mutable
        others = [a for a in args if isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() not in self.own]
        before = [(tensor.data, tensor.clone()) for tensor in others]
        out = func(*args, **(kwargs or {}))
        self.before += [(now, then) for now, then in before if not torch.equal(now, then)]
        outs = [out] if isinstance(out, torch.Tensor) else [o for o in out or () if isinstance(o, torch.Tensor)]
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if writes or any(o.numel() and o.untyped_storage().data_ptr() not in given for o in outs):  # else a view
            self.done.append((func, args, kwargs or {}, [] if writes else outs))
            self.own |= {o.untyped_storage().data_ptr() for o in outs} - given
        return out

    def undo(self) -> None:
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before.clear()

    def pool(self) -> int:
        return 0

    def replay(self) -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, outs in self.done:
                again = func(*args, **kwargs)
                news = [again] if isinstance(again, torch.Tensor) else [a for a in again or () if a is not None]
                for old, new in zip(outs, news, strict=False):
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, tapes in the place of CUDA graphs."""
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(towers, "encode_text", lambda model, tokens: model.encode_text(tokens))  # as on a GPU

    @contextmanager
    def recording(tape: Tape, **_: object) -> Iterator[None]:
        with tape:
            yield
        tape.undo()

    @contextmanager
    def nothing(*_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


@contextmanager
def replaced(model) -> Iterator[tuple[Encoder, Encoder]]:
    """`recorded`, wherever the model is; yields the two encoders."""
    model.visual.forward = image = Encoder(model.visual, model.visual.forward)
    model.encode_text = text = Encoder(model, model.encode_text)
    yield image, text
    del model.visual.forward, model.encode_text


def batch(step: int, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 400, (rows, 20), generator=source)
    tokens[:, 12] = 49407
    return torch.rand(rows, 3, 64, 64, generator=source), tokens


def trained(model, steps: int, *, rows: Callable[[int], int] = lambda step: 6, frozen: bool = False) -> list[float]:
    """Losses of so many steps of SGD, with BatchNorm in training unless `frozen`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        model.train()
        if frozen:
            freeze_batch_norm(model)
        images, tokens = batch(step, rows(step))
        image, text = models.encode_image(model, images), models.encode_text(model, tokens)
        loss = clip_loss(image, text, model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, atol: float = ATOL) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=RTOL, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("frozen", [False, True], ids=["BatchNorm in training", "BatchNorm frozen"])
def test_training_with_recorded_encoders_is_training_without(frozen: bool, stand_in: Path, taped, fp32):
    plain = models.build(ARCHITECTURE)
    model = copy.deepcopy(plain)
    losses = trained(plain, 6, frozen=frozen)
    with replaced(model) as encoders:
        again = trained(model, 6, frozen=frozen)
        assert [len(e.recordings) for e in encoders] == [1, 1]
        assert [r.turn for e in encoders for r in e.recordings.values()] == [6 - WARM, 6 - WARM]
    assert again == pytest.approx(losses, rel=RTOL)
    assert_close(plain.state_dict(), model.state_dict())
    counts = [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert set(counts) == {0 if frozen else 6}


def test_batches_of_other_sizes_run_as_they_are(stand_in: Path, taped, fp32):
    plain = models.build(ARCHITECTURE)
    model = copy.deepcopy(plain)
    sizes = [6, 6, 6, 4, 6, 5, 6]
    losses = trained(plain, 7, rows=sizes.__getitem__)
    with replaced(model) as encoders:
        assert trained(model, 7, rows=sizes.__getitem__) == pytest.approx(losses, rel=RTOL)
        assert [r.turn for e in encoders for r in e.recordings.values()] == [3, 3]
    assert_close(plain.state_dict(), model.state_dict())


def gradients(model, times: int = 1) -> dict[str, torch.Tensor]:
    """Of the loss of two batches, encoded one after the other before the backward pass, `times` times added up."""
    model.zero_grad(set_to_none=True)
    for _ in range(times):
        features = [(models.encode_image(model, i), models.encode_text(model, t)) for i, t in (batch(0), batch(1))]
        sum(clip_loss(*pair, model.logit_scale.exp()) for pair in features).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("times", [1, 3])
def test_gradients_are_right_where_an_encoder_runs_twice_before_them_and_where_they_add_up(
    times: int, stand_in: Path, taped, fp32
):
    model = models.build(ARCHITECTURE).train()
    freeze_batch_norm(model)
    expected = gradients(model, times)
    with replaced(model):
        gradients(model, 2)
        assert_close(expected, gradients(model, times))


def test_features_stay_what_they_were_when_the_encoder_runs_again(stand_in: Path, taped, fp32):
    model = models.frozen(models.build(ARCHITECTURE))
    with replaced(model) as encoders, torch.no_grad():
        kept = [models.encode_image(model, batch(step)[0]) for step in range(6)]
        assert [r.turn for r in encoders[0].recordings.values()] == [6 - WARM]
    with torch.no_grad():
        for step, features in enumerate(kept):
            torch.testing.assert_close(features, models.encode_image(model, batch(step)[0]), rtol=RTOL, atol=ATOL)


def test_a_frozen_encoder_hands_on_the_gradient_of_its_images(stand_in: Path, taped, fp32):
    model = models.frozen(models.build(ARCHITECTURE))

    def of_images(step: int) -> torch.Tensor:
        images = batch(step)[0].to(DEVICE).requires_grad_()
        models.encode_image(model, images).square().mul(torch.arange(32, device=DEVICE)).sum().backward()
        assert images.grad is not None
        return images.grad

    expected = [of_images(step) for step in range(5)]
    with replaced(model) as encoders:
        for step, grad in enumerate(expected):
            torch.testing.assert_close(of_images(step), grad, rtol=RTOL, atol=ATOL * grad.abs().max().item())
        assert [r.turn for r in encoders[0].recordings.values()] == [5 - WARM]


def test_a_recorded_encoder_refuses_a_second_backward_pass_whose_activations_are_gone(stand_in: Path, taped, fp32):
    model = models.build(ARCHITECTURE).train()
    with replaced(model) as encoders:
        trained(model, WARM + 1)
        images = batch(0)[0].to(DEVICE)
        features = models.encode_image(model, images)
        assert [r.turn for r in encoders[0].recordings.values()] == [2]
        features.square().sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="gives the gradient of its features once"):
            features.sum().backward()


def test_a_trained_model_is_not_recorded_where_no_gradient_is_asked_for(stand_in: Path, taped, fp32):
    model = models.build(ARCHITECTURE)
    with replaced(model) as encoders, torch.no_grad():
        for step in range(5):
            models.encode_image(model, batch(step)[0])
        assert encoders[0].recordings == {}


def test_what_cannot_be_recorded_runs_as_it_is_and_a_warning_says_so(
    stand_in: Path, taped, fp32, monkeypatch: pytest.MonkeyPatch
):
    plain = models.build(ARCHITECTURE)
    model = copy.deepcopy(plain)

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "Recording", fails)
    with replaced(model), pytest.warns(UserWarning, match="runs as it is: CUDA out of memory"):
        losses = trained(model, 5)
    assert losses == pytest.approx(trained(plain, 5), rel=RTOL)


def test_on_a_cpu_nothing_is_recorded_and_afterwards_a_model_is_as_it_was(stand_in: Path):
    model = models.build(ARCHITECTURE)
    with recorded(model):
        assert isinstance(model.visual.__dict__.get("forward"), Encoder) == (DEVICE == "cuda")
    assert "forward" not in model.visual.__dict__ and "encode_text" not in model.__dict__


# --- the loop on a GPU ------------------------------------------------------------------------------------------------


def fitted(folder: Path, *, on: bool, monkeypatch: pytest.MonkeyPatch, spoilt: int = -1) -> tuple[dict, object]:
    """Weights and history of three epochs of four steps, with or without graphs; the loss of step `spoilt` is NaN."""
    if not on:
        monkeypatch.setattr(graphs, "WARM", 10**9)
    model = models.build(ARCHITECTURE)

    def loss(at: Step) -> tuple[torch.Tensor, dict]:
        model.train()
        images, tokens = batch(at.step, len(at.indices))
        image, text = models.encode_image(model, images), models.encode_text(model, tokens)
        value = clip_loss(image, text, model.logit_scale.exp())
        return (value * float("nan") if at.step == spoilt else value), {"scale": model.logit_scale.detach().exp()}

    folder.mkdir()
    config = TrainConfig(epochs=3, batch_size=6, lr=1e-3, warmup_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an encoder is not recorded")
        history = fit(model, loss, count=24, config=config, folder=folder, stage="toy")
    return model.state_dict(), history


@pytest.mark.gpu
def test_on_a_gpu_the_loop_gives_the_same_with_graphs_as_without(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights, history = fitted(tmp_path / "graphs", on=True, monkeypatch=monkeypatch)
    plain, plain_history = fitted(tmp_path / "plain", on=False, monkeypatch=monkeypatch)
    assert history["loss"].tolist() == pytest.approx(plain_history["loss"].tolist(), rel=1e-2)
    assert history["scale"].tolist() == pytest.approx(plain_history["scale"].tolist(), rel=1e-3)
    assert_close(plain, weights, atol=2e-2)  # Adam makes steps of its own size of gradients that are but rounding


@pytest.mark.gpu
def test_on_a_gpu_a_loss_that_is_no_number_stops_the_run_a_step_late_and_names_its_step(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(TrainingError, match="toy: loss is nan at epoch 1, step 5: "):
        fitted(tmp_path / "run", on=True, monkeypatch=monkeypatch, spoilt=5)
    assert not (tmp_path / "run" / "history.csv").exists()
