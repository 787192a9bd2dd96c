"""The training loop: its schedule, its groups, and that a killed run ends as if nothing had happened."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURE, Bomb

from abd_core import models, train
from abd_core.config import ConfigError, derive_seed
from abd_core.paths import RunError
from abd_core.train import Step, TrainConfig, TrainingError, fit, learning_rate, load_resume, parameter_groups

CONFIG = TrainConfig(epochs=3, batch_size=4, lr=1e-2, warmup_steps=2, weight_decay=0.1)
COUNT = 18  # pairs: 4 steps an epoch, 2 pairs left out of each


class Killed(BaseException):
    """Stands for a process that ends in the middle of a step."""


class Toy(torch.nn.Module):
    """As small as a model can be that has a matrix, a vector, running statistics and a logit_scale."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.double()  # the bias before the norm has no gradient but rounding, which Adam would scale up


def toy_loss(model: Toy, *, kill_at: int | None = None, seen: list[Step] | None = None) -> Callable:
    data = torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(at: Step) -> tuple[torch.Tensor, dict[str, float]]:
        if at.step == kill_at:
            raise Killed
        if seen is not None:
            seen.append(at)
        source = torch.Generator().manual_seed(derive_seed("noise", at.step))
        noise = torch.randn(4, 6, generator=source, dtype=torch.float64)
        output = model.norm(model.linear(data[at.indices])) * model.logit_scale.exp()
        return (output - noise).square().mean(), {"first": at.indices[0].item()}

    return loss


def trained(folder: Path, *kills: int, config: TrainConfig = CONFIG) -> tuple[dict, pd.DataFrame]:
    """Weights and history after a run that is killed at the steps `kills`, each time with a fresh model."""
    folder.mkdir(exist_ok=True)
    for kill in kills:
        model = Toy()
        with pytest.raises(Killed):
            fit(model, toy_loss(model, kill_at=kill), count=COUNT, config=config, folder=folder, stage="toy")
    model = Toy()
    history = fit(model, toy_loss(model), count=COUNT, config=config, folder=folder, stage="toy")
    return model.state_dict(), history


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


# --- schedule and groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "warmup", "total", "share"),
    [
        (0, 0, 10, 1.0),
        (0, 5, 10, 0.2),
        (3, 5, 10, 0.8),
        (4, 5, 10, 1.0),
        (5, 5, 10, 1.0),
        (5, 0, 10, 0.5),
        (30, 20, 40, 0.5),
        (25, 20, 40, (1 + math.sqrt(0.5)) / 2),
        (9, 0, 10, (1 - math.cos(math.pi / 10)) / 2),
        (0, 1, 1, 1.0),
        (1, 50, 2, 0.04),
    ],
)
def test_the_learning_rate_warms_up_to_its_peak_and_falls_as_a_cosine(step: int, warmup: int, total: int, share: float):
    assert learning_rate(step, peak=3.0, warmup=warmup, total=total) == pytest.approx(3.0 * share)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1_000), (50, 1_000), (500, 1_000)])
def test_the_learning_rate_is_never_zero_reaches_its_peak_and_ends_near_zero(warmup: int, total: int):
    rates = [learning_rate(step, peak=1.0, warmup=warmup, total=total) for step in range(total)]
    assert min(rates) > 0
    assert max(rates) == 1.0
    assert rates == sorted(rates[:warmup]) + sorted(rates[warmup:], reverse=True)
    assert rates[-1] < 1e-4


def test_norms_biases_and_logit_scale_are_not_decayed(stand_in):
    model = models.build(ARCHITECTURE)
    model.transformer.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [[names[id(p)] for p in group["params"]] for group in (decayed, plain)]
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(grouped[0]) | set(grouped[1]) == trained_names
    assert len(grouped[0]) + len(grouped[1]) == len(trained_names)
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm)
        for leaf in ("weight", "bias")
    }
    untouched = (norms | {name for name in trained_names if name.endswith("bias")} | {"logit_scale"}) & trained_names
    assert untouched == set(grouped[1])
    assert "token_embedding.weight" in grouped[0] and "visual.conv1.weight" in grouped[0]


def test_the_loop_is_adamw_with_that_schedule_and_those_groups(tmp_path: Path):
    """Against plain, unfused AdamW, written out."""
    weights, history = trained(tmp_path)
    model, seen = Toy(), []
    loss = toy_loss(model, seen=seen)
    groups = [
        {"params": [model.linear.weight], "weight_decay": 0.1},
        {"params": [model.linear.bias, model.norm.weight, model.norm.bias, model.logit_scale], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=False)
    values = []
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 10)))
        order = torch.randperm(COUNT, generator=train.rng(0, "toy", "order", step // 4))
        value, _ = loss(Step(order[4 * (step % 4) : 4 * (step % 4) + 4], step // 4, step))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-7, atol=1e-8)
    means = [sum(values[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert history["loss"].tolist() == pytest.approx(means, rel=1e-7)


def test_filters_whose_channels_lie_last_are_trained_as_plain_adamw_trains_them(
    stand_in, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a CPU, torch's fused AdamW is silently wrong where a gradient, or a moment, lies otherwise than a weight."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(model: torch.nn.Module, kill_at: int | None = None) -> Callable:
        def of(at: Step) -> tuple[torch.Tensor, dict]:
            if at.step == kill_at:
                raise Killed
            return (model.visual(images[at.indices]) - images[at.indices].mean()).square().mean(), {}

        return of

    config, folder = TrainConfig(epochs=4, batch_size=4, lr=1e-3, warmup_steps=4, weight_decay=0.1), tmp_path
    with pytest.raises(Killed):
        model = models.build(ARCHITECTURE).double().cpu().train()
        fit(model, loss(model, kill_at=2), count=4, config=config, folder=folder, stage="toy")
    model = models.build(ARCHITECTURE).double().cpu().train()
    assert any(p.ndim == 4 and not p.is_contiguous() for p in model.visual.parameters())
    fit(model, loss(model), count=4, config=config, folder=folder, stage="toy")
    plain = models.build(ARCHITECTURE).double().cpu().train().to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(parameter_groups(plain, 0.1), betas=(0.9, 0.98), eps=1e-6, foreach=False, fused=False)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=1e-3, warmup=4, total=4)
        optimizer.zero_grad()
        order = torch.randperm(4, generator=train.rng(0, "toy", "order", step))
        loss(plain)(Step(order, step, step))[0].backward()
        optimizer.step()
    for (name, got), right in zip(model.visual.named_parameters(), plain.visual.parameters(), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-8, msg=name)


def test_an_epoch_visits_whole_batches_of_different_pairs_in_an_order_of_its_own(tmp_path: Path):
    model, seen = Toy(), []
    fit(model, toy_loss(model, seen=seen), count=COUNT, config=CONFIG, folder=tmp_path, stage="toy")
    assert [(at.epoch, at.step) for at in seen] == [(step // 4, step) for step in range(12)]
    epochs = [torch.cat([at.indices for at in seen if at.epoch == epoch]).tolist() for epoch in range(3)]
    assert all(len(order) == len(set(order)) == 16 and set(order) <= set(range(COUNT)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3


def test_the_history_has_a_row_an_epoch_with_all_figures_and_is_stored(tmp_path: Path):
    model = Toy()
    history = fit(
        model,
        toy_loss(model),
        count=COUNT,
        config=CONFIG,
        folder=tmp_path,
        stage="toy",
        after_epoch=lambda epoch: {"twice": 2 * epoch},
    )
    assert list(history.columns) == ["epoch", "loss", "first", "twice"]
    assert history["epoch"].tolist() == [1, 2, 3] and history["twice"].tolist() == [0, 2, 4]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history)


@pytest.mark.parametrize(("sign", "bound"), [(-1, math.log(100)), (1, 0.0)])
def test_the_logit_scale_stays_between_one_and_a_hundred(sign: int, bound: float, tmp_path: Path):
    model, config = Toy(), CONFIG.replace(lr=1.0, epochs=9)
    fit(model, lambda at: (sign * model.logit_scale, {}), count=COUNT, config=config, folder=tmp_path, stage="toy")
    assert model.logit_scale.item() == pytest.approx(bound)


# --- resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1.0, 60.0], ids=["a checkpoint a step", "no checkpoint"])
@pytest.mark.parametrize("kills", [(0,), (1,), (4,), (6,), (11,), (2, 5, 9)])
def test_a_killed_run_ends_with_the_weights_and_history_of_an_undisturbed_one(
    kills: tuple[int, ...], seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weights, history = trained(tmp_path / "whole")
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", seconds)
    killed_weights, killed_history = trained(tmp_path / "killed", *kills)
    assert_same_bits(killed_weights, weights)
    pd.testing.assert_frame_equal(killed_history, history, check_exact=True)
    stored = [(tmp_path / name / "history.csv").read_bytes() for name in ("whole", "killed")]
    assert stored[0] == stored[1]


def test_a_run_killed_after_its_last_step_trains_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    weights, history = trained(tmp_path)
    model, seen = Toy(), []
    again = fit(model, toy_loss(model, seen=seen), count=COUNT, config=CONFIG, folder=tmp_path, stage="toy")
    assert seen == []
    assert_same_bits(model.state_dict(), weights)
    pd.testing.assert_frame_equal(again, history)


def test_a_resumed_run_repeats_no_step_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    model, seen = Toy(), []
    with pytest.raises(Killed):
        fit(model, toy_loss(model, kill_at=7), count=COUNT, config=CONFIG, folder=tmp_path, stage="toy")
    fit(model, toy_loss(model, seen=seen), count=COUNT, config=CONFIG, folder=tmp_path, stage="toy")
    assert [at.step for at in seen] == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("other", [{"seed": 1}, {"lr": 2e-2}, {"weight_decay": 0.9}, {"warmup_steps": 5}])
def test_another_setting_gives_other_weights(tmp_path: Path, other: dict):
    one, _ = trained(tmp_path / "one")
    two, _ = trained(tmp_path / "two", config=CONFIG.replace(**other))
    assert not torch.equal(one["linear.weight"], two["linear.weight"])


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "one byte": content[:1],
        "half": content[: len(content) // 2],
        "the end is missing": content[:-10],
        "text": b"these are no weights",
        "zeros": bytes(len(content)),
    }


@pytest.mark.parametrize("damage", damaged(b""))
def test_a_damaged_resume_file_is_refused_in_one_line(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    trained(tmp_path)
    path = tmp_path / "resume.pt"
    path.write_bytes(damaged(path.read_bytes())[damage])
    with pytest.raises(RunError, match=r"damaged file: .*resume\.pt.*force=True") as error:
        trained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_in_a_resume_file_is_refused(tmp_path: Path):
    saved = torch.arange(1_000.0)
    train.save_resume(tmp_path / "resume.pt", {"model": saved})
    content = bytearray((tmp_path / "resume.pt").read_bytes())
    content[content.index(saved.numpy().tobytes()) + 500] ^= 1
    (tmp_path / "resume.pt").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "resume.pt")["model"], saved)  # torch alone does not notice
    with pytest.raises(RunError, match="damaged file"):
        load_resume(tmp_path / "resume.pt")


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_code_in_a_resume_file_is_not_executed(write: Callable, tmp_path: Path):
    with (tmp_path / "resume.pt").open("wb") as f:
        write({"model": Bomb(tmp_path / "marker"), "step": 1}, f)
    with pytest.raises(RunError, match="damaged file"):
        load_resume(tmp_path / "resume.pt")
    assert not (tmp_path / "marker").exists()


def test_the_bomb_of_these_tests_would_go_off(tmp_path: Path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path):
    assert load_resume(tmp_path / "resume.pt") is None


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_names_stage_and_step(value: float, tmp_path: Path):
    model = Toy()
    good = toy_loss(model)

    def loss(at: Step) -> tuple[torch.Tensor, dict[str, float]]:
        result, figures = good(at)
        return (result * value if at.step == 6 else result), figures

    with pytest.raises(TrainingError, match=rf"toy: loss is {value} at epoch 1, step 6: lower lr = 0\.01") as error:
        fit(model, loss, count=COUNT, config=CONFIG, folder=tmp_path, stage="toy")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "history.csv").exists()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("seconds", [-1.0, 60.0], ids=["before a checkpoint", "at the end"])
def test_weights_that_are_no_numbers_stop_the_run_and_are_named(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", seconds)
    model = Toy()
    good = toy_loss(model)

    def loss(at: Step) -> tuple[torch.Tensor, dict[str, float]]:
        if at.step == 11:
            model.linear.weight.register_hook(lambda grad: grad * math.nan)
        return good(at)

    with pytest.raises(TrainingError, match=r"toy: .*linear\.weight holds NaN or infinity"):
        fit(model, loss, count=COUNT, config=CONFIG, folder=tmp_path, stage="toy")
    assert not (tmp_path / "history.csv").exists()
    if seconds < 0:
        assert load_resume(tmp_path / "resume.pt")["step"] == 11


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_pairs_than_a_batch_are_refused(count: int, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"batch_size = 4: at most {count} expected"):
        fit(Toy(), toy_loss(Toy()), count=count, config=CONFIG, folder=tmp_path, stage="toy")


def test_a_bar_is_redrawn_seldom_in_the_log_of_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.delenv("CI", raising=False)
    with train.progress(stage="a stage", total=1) as watched:
        assert watched.mininterval == 1
    monkeypatch.setenv("CI", "true")
    with train.progress(stage="a stage", total=1) as logged:
        assert logged.mininterval == 10
