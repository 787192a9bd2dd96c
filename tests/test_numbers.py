"""Numbers that go wrong: the run stops, says where, and keeps its last good checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURE
from test_train import CONFIG, COUNT, Toy, toy_loss

from abd_core import adversary as adversary_module
from abd_core import badclip, disagreement, models, train
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.config import Config, TrainingError
from abd_core.data import load_pairs, load_test_set
from abd_core.evaluate import evaluate
from abd_core.generator import Discriminator, Generator
from abd_core.paths import RunError, load_or_make
from abd_core.poison import PoisonConfig
from abd_core.train import Step, fit, load_resume

ADVERSARY = AdversaryConfig(limit=64, steps=4, batch_size=8, width=16)


@pytest.fixture(autouse=True)
def _a_checkpoint_a_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(adversary_module, "CHECKPOINT_SECONDS", -1.0)


def ends_in_one_line(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(TrainingError) as error:
        call()
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_goes_wrong_is_named_at_the_step_after_and_the_checkpoint_before_it_is_kept(
    value: float, tmp_path: Path
):
    model = Toy()
    good = toy_loss(model)

    def loss(at: Step) -> tuple[torch.Tensor, dict[str, float]]:
        if at.step == 5:
            with torch.no_grad():
                model.linear.weight[0, 0] = value
        return good(at)

    run = lambda: fit(model, loss, count=COUNT, config=CONFIG, folder=tmp_path, stage="toy")  # noqa: E731
    ends_in_one_line(run, "toy", "epoch 1, step 5", "linear.weight", "lower lr = 0.01")
    kept = load_resume(tmp_path / "resume.pt")
    assert kept["step"] == 5 and all(torch.isfinite(t).all() for t in kept["model"].values())


class Tower(Toy):
    """A toy with an image tower that may map all images to one feature."""

    def __init__(self, collapses_at: int) -> None:
        super().__init__()
        self.visual = torch.nn.Linear(6, 6).double()
        self.collapses_at = collapses_at

    def loss(self, at: Step) -> tuple[torch.Tensor, dict[str, float]]:
        if at.step == self.collapses_at:
            with torch.no_grad():
                self.visual.weight.zero_()
        images = torch.randn(4, 6, generator=torch.Generator().manual_seed(at.step), dtype=torch.float64)
        return (self.visual(images) * 0).sum() + self.logit_scale * 0, {}


def test_collapsed_features_stop_the_run_at_the_end_of_their_epoch(tmp_path: Path):
    model = Tower(collapses_at=5)
    run = lambda: fit(model, model.loss, count=COUNT, config=CONFIG, folder=tmp_path, stage="toy")  # noqa: E731
    ends_in_one_line(run, "toy: epoch 1, step 7", "collapsed features")
    assert load_resume(tmp_path / "resume.pt")["step"] == 7
    assert not model.visual._forward_hooks


def test_features_that_differ_do_not_stop_the_run(tmp_path: Path):
    model = Tower(collapses_at=-1)
    assert len(fit(model, model.loss, count=COUNT, config=CONFIG, folder=tmp_path, stage="toy")) == 3


# --- the adversary ------------------------------------------------------------------------------------------


def spoiled(kind: type[torch.nn.Module], parameter: str, call: int) -> type[torch.nn.Module]:
    """The same network, one of whose weights turns NaN at its n-th forward pass."""

    class Spoiled(kind):
        calls = 0

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            Spoiled.calls += 1
            if Spoiled.calls == call:
                with torch.no_grad():
                    self.get_parameter(parameter).view(-1)[0] = math.nan
            return super().forward(*inputs)

    return Spoiled


@pytest.mark.parametrize(
    ("name", "kind", "parameter", "words"),
    [
        ("Generator", Generator, "merge.weight", ("step 2: generator: merge.weight holds NaN", "lower lr")),
        ("Discriminator", Discriminator, "score.0.weight", ("discriminator: score.0.weight holds NaN", "step ")),
    ],
)
def test_a_gan_that_diverges_is_stopped_and_its_tensor_named(
    name: str, kind: type, parameter: str, words: tuple[str, ...], stand_in: Path, runs: Path, monkeypatch
):
    call = 5 if name == "Generator" else 7  # of two calls a step (the second is kept), and of three
    monkeypatch.setattr(adversary_module, name, spoiled(kind, parameter, call))
    ends_in_one_line(lambda: adversary(ADVERSARY, stand_in / "victim.safetensors"), "adversary: ", *words)
    kept = load_resume(next(runs.glob("adversary/*/resume.pt")))
    assert kept["step"] == 2 and all(torch.isfinite(t).all() for t in kept[name.lower()].values())
    assert not list(runs.glob("adversary/*/perturbation.safetensors"))


@pytest.mark.parametrize("name", ["topology_loss", "discriminator_loss"])
def test_a_loss_of_the_gan_that_is_no_number_stops_it_and_names_the_step(
    name: str, stand_in: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(adversary_module, name, lambda *a: torch.tensor(math.nan, requires_grad=True))
    ends_in_one_line(lambda: adversary(ADVERSARY, stand_in / "victim.safetensors"), "adversary: ", "nan at step 0")


# --- BadCLIP's patch, ABD-D's search, evaluation ---------------------------------------------------------------


def optimised(stand_in: Path) -> torch.Tensor:
    return badclip.optimise(
        torch.rand(3, 4, 4),
        lambda patch, images, source: images + patch.mean(),
        model=models.frozen(models.load(stand_in / "base.safetensors")),
        pairs=load_pairs(64),
        target="turtle",
        seed=0,
        steps=2,
        lr=0.03,
        triplet_weight=1.0,
    )


def test_a_patch_whose_loss_or_pixels_are_no_numbers_is_not_optimised_further(stand_in: Path, monkeypatch):
    good = badclip.patch_loss
    monkeypatch.setattr(badclip, "VIEWS", 64)
    monkeypatch.setattr(badclip, "patch_loss", lambda *a, **k: good(*a, **k) * math.nan)
    ends_in_one_line(lambda: optimised(stand_in), "badclip", "loss is nan at step 0", "lower patch_lr = 0.03")
    # A finite loss with a gradient that is not: the root's slope at zero.
    monkeypatch.setattr(badclip, "patch_loss", lambda image, *a, **k: good(image, *a, **k) + (0 * image.sum()).sqrt())
    ends_in_one_line(lambda: optimised(stand_in), "badclip", "the patch holds NaN after step 0")


def test_a_search_whose_cosine_is_no_number_stops(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    suspect, clean = (models.frozen(models.load(stand_in / f"{name}.safetensors")) for name in ("victim", "base"))
    encode = models.encode_image
    monkeypatch.setattr(models, "encode_image", lambda model, images: encode(model, images) * math.nan)
    settings = {"seed": 0, "steps": 2, "lr": 0.1, "batch_size": 4, "bound": 0.1, "sides": (0.1, 0.3)}
    ends_in_one_line(
        lambda: disagreement.search(suspect, clean, load_pairs(64), **settings),
        *("search", "cosine is nan at step 0", "lower search_lr = 0.1"),
    )


def test_a_model_that_gives_no_numbers_is_not_evaluated(stand_in: Path):
    model = models.build(ARCHITECTURE)
    with torch.no_grad():
        next(model.visual.parameters()).fill_(math.nan)
    ends_in_one_line(lambda: evaluate(model, load_test_set("dev", views=1)), "evaluation", "image 0", "class ")


# --- memory -------------------------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[[Path], dict]:
    def make(folder: Path) -> dict:
        raise error

    return make


def too_much(folder: Path) -> dict:
    return {"size": len(torch.empty(1 << 60, dtype=torch.uint8))}


@pytest.mark.parametrize(
    "make",
    [too_much, raising(MemoryError()), raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))],
)
@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (PoisonConfig(batch_size=96), "poison: out of memory: lower batch_size = 96, or set micro_batch"),
        (ADVERSARY, "adversary: out of memory: lower batch_size = 8, width = 16"),
        (Config(), "other: out of memory: end other programs, or use a larger machine"),
    ],
)
def test_where_memory_does_not_suffice_the_settings_to_lower_are_named(
    make: Callable, config: Config, advice: str, runs: Path
):
    with pytest.raises(RunError) as error:
        load_or_make(advice.split(":")[0], config, {}, make)
    assert str(error.value) == advice


def test_another_runtime_error_stays_what_it_is(runs: Path):
    with pytest.raises(RuntimeError, match=r"^no memory of this$"):
        load_or_make("other", Config(), {}, raising(RuntimeError("no memory of this")))
