"""Several processes do what one does: the same gradients, the same counts, the same model after any of them died.

Run as a program, this file is what a rank does in these tests.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import miniature
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURE, ROOT, use_stand_in, without_time
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.api import SignalException

from abd_core import evaluate as evaluation
from abd_core import formats, launch, models, ranks, train
from abd_core.config import ConfigError
from abd_core.data import load_pairs, load_test_set
from abd_core.defences import DEFENCES, DefendConfig, FineTuningDefence, freeze_batch_norm
from abd_core.defend import defend
from abd_core.formats import load_image_pairs
from abd_core.generator import Perturbation
from abd_core.labelled import load_labelled
from abd_core.paths import RunError, read_json, sha256
from abd_core.poison import PoisonConfig, poison
from abd_core.train import Step, TrainConfig, fit
from abd_core.triggers import TRIGGERS

BATCH = 12  # a multiple of 2, 3 and 4
PAIRS = 24

# A defence, its settings, and how the ranks share its batch. Whatever normalises with the rows of one process alone
# must be left out: those are frozen, or synchronised.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ft": ("ft", {"batch_norm": "frozen"}, {}),
    "abd": ("abd", {"view": "both"}, {}),
    "cleanclip": ("cleanclip", {}, {}),
    "par": ("par", {"batch_norm": "frozen"}, {}),
    "roclip": ("roclip", {"bank": 20}, {}),
    "matched roclip": ("roclip", {"bank": 20, "match_every": 1}, {}),
    "ft, statistics of all": ("ft", {"batch_norm": "train"}, {"sync": True}),
    "cleanclip, statistics of all": ("cleanclip", {"batch_norm": "train"}, {"sync": True}),
    "ft, 3 rows at a time": ("ft", {"batch_norm": "frozen"}, {"micro": 3}),
    "abd, 2 rows at a time": ("abd", {"view": "both"}, {"micro": 2}),
}


def gradients(case: str) -> dict[str, torch.Tensor]:
    """Of one batch's loss, in double precision: gradients by parameter, and what the step left in the buffers."""
    defence, settings, sharing = CASES[case]
    torch.manual_seed(0)
    model = models.build(ARCHITECTURE, seed=3).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
    config = DefendConfig(defence=defence, batch_size=BATCH, limit=PAIRS, **settings)
    patch = Perturbation("patch", torch.rand(3, 11, 11), 64, "random")
    made = DEFENCES[defence](config, load_pairs(PAIRS), perturbation=patch)
    assert isinstance(made, FineTuningDefence)
    if defence == "par":
        made.victim = models.frozen(models.build(ARCHITECTURE, seed=4).double())
    if defence == "roclip":
        bank = torch.nn.functional.normalize(torch.randn(20, 32, dtype=torch.float64), dim=1)
        model.register_buffer("bank", bank)
        model.register_buffer("oldest", torch.tensor(3))
    model.train()
    if config.batch_norm == "frozen":
        freeze_batch_norm(model)
    with (
        ranks.synchronised(model, on=sharing.get("sync", False)),
        ranks.shared_batch(BATCH, micro=sharing.get("micro", 0)),
    ):
        value = made.loss(model, Step(torch.randperm(PAIRS)[:BATCH], 0, 5))
        value.backward()
    ranks.average_gradients(model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "loss": value.detach(),
        **found,
        **{f"buffer {name}": b for name, b in model.named_buffers() if name != "attn_mask"},
    }


def full_precision() -> None:
    models.autocast = lambda on=None: torch.autocast("cpu", enabled=False)  # type: ignore[assignment]


def trigger() -> Any:
    return TRIGGERS["badnet"].draw(resolution=64, target="banana", seed=0, size=0.2, position="centre", alpha=0.0)


def counts(stand_in: Path) -> dict[str, Any]:
    """An evaluation in 4 batches, and the features of 100 images in 4 of which the last one is smaller."""
    model = models.load(stand_in / "victim.safetensors")
    features = evaluation.image_features(model, load_test_set("eval", views=1), batch_size=30)
    measured = evaluation.evaluate(model, load_test_set("eval"), trigger=trigger(), target=4)
    return {**measured.to_dict(), "features": features.tolist()}


def program(stand_in: str, mode: str, *arguments: str) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    use_stand_in(Path(stand_in))
    if mode == "stage":  # a checkpoint a step; the one that ABD_KILL names dies once, in the middle of a step
        train.CHECKPOINT_SECONDS = -1.0
        victim, step, marker = (os.environ.get("ABD_KILL") or "-1,0,").split(",")
        average = ranks.average_gradients
        seen = []

        def average_or_die(model: torch.nn.Module) -> None:
            seen.append(None)
            if ranks.rank() == int(victim) and len(seen) == int(step) and not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            average(model)

        ranks.average_gradients = average_or_die
        launch.main(list(arguments))
        return
    out = Path(arguments[0])
    if mode == "read":  # with a first rank that is slow
        with ranks.group():
            for name in ("check", "decode") if ranks.first() else ():
                setattr(formats, name, delayed(getattr(formats, name)))
            pairs = load_image_pairs(arguments[1], resolution=24)
            test = load_labelled(arguments[2], classes=arguments[3], split="eval", resolution=24, dev_share=0)
            (out / f"{ranks.rank()}.json").write_text(json.dumps([pairs.digest, test.digest, test.images.tolist()]))
        return
    with ranks.group():
        (out / f"{ranks.rank()}.json").write_text(json.dumps(counts(Path(stand_in))))
        full_precision()
        torch.save({case: gradients(case) for case in CASES}, out / f"{ranks.rank()}.pt")


def delayed(call: Callable) -> Callable:
    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return call(*arguments)

    return slow


SEVERAL = [2, *(pytest.param(processes, marks=pytest.mark.long) for processes in (3, 4))]


@pytest.fixture(scope="module")
def shares(
    tmp_path_factory: pytest.TempPathFactory, stand_in_folder: Path, session_runs: Path
) -> Callable[[int], Path]:
    """The folder in which each of so many ranks has left its gradients and counts."""

    @functools.cache
    def folder(processes: int) -> Path:
        out = tmp_path_factory.mktemp("shares")
        torchrun(processes, str(stand_in_folder), "measure", str(out))
        return out

    return folder


def torchrun(processes: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", SEVERAL)
def test_the_gradients_of_several_processes_are_those_of_one(
    processes: int, stand_in: Path, shares: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
):
    """Of every kind of defence, in double precision, to 1e-10 of the largest."""
    monkeypatch.setattr(models, "autocast", lambda on=None: torch.autocast("cpu", enabled=False))
    found = [torch.load(shares(processes) / f"{rank}.pt") for rank in range(processes)]
    for case in CASES:
        alone = gradients(case)
        largest = max(t.abs().max() for name, t in alone.items() if not name.startswith("buffer"))
        assert largest > 1e-3
        for share in found:
            assert share[case].keys() == alone.keys()
            for name, expected in alone.items():
                assert share[case][name].dtype == expected.dtype
                assert (share[case][name] - expected).abs().max() <= 1e-10 * max(1, largest), (case, name)
        for name, tensor in found[0][case].items():  # to the bit, or weights would drift apart
            assert all(torch.equal(share[case][name], tensor) for share in found), (case, name)


def test_rows_that_are_encoded_a_few_at_a_time_give_the_gradient_of_the_whole_batch(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "autocast", lambda on=None: torch.autocast("cpu", enabled=False))
    for case, whole in {"ft, 3 rows at a time": "ft", "abd, 2 rows at a time": "abd"}.items():
        few, all_ = gradients(case), gradients(whole)
        assert few.keys() == all_.keys()
        assert max((few[name] - all_[name]).abs().max() for name in all_) < 1e-10


def test_a_few_rows_at_a_time_keep_the_activations_of_those_alone(stand_in: Path):
    """Of the image tower: at no time are more rows than that on their way through its last layer's graph."""
    model, kept = models.build(ARCHITECTURE).train(), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    images = torch.rand(12, 3, 64, 64)
    sizes = {}
    for micro in (0, 3):
        kept.clear()
        with ranks.shared_batch(12, micro=micro), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            models.encode_image(model, images)
        sizes[micro] = sum(kept)
    assert sizes[3] < sizes[0] / 10


def test_batch_norm_counts_rows_once_that_are_encoded_twice(stand_in: Path):
    model = models.build(ARCHITECTURE).train()
    images = torch.rand(12, 3, 64, 64)
    with ranks.shared_batch(12, micro=4):
        features = models.encode_image(model, images)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before["visual.bn1.num_batches_tracked"] == 3
    features.square().sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.visual.bn1.track_running_stats


@pytest.mark.parametrize("half", [False, True])
def test_synchronised_batch_norm_of_one_process_is_batch_norm(half: bool):
    torch.manual_seed(0)
    plain, ours = torch.nn.BatchNorm2d(5).double(), torch.nn.BatchNorm2d(5).double()
    if half:
        plain, ours = plain.float(), ours.float()
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
        plain.bias.uniform_(-1, 1)
    ours.load_state_dict(plain.state_dict())
    x = (3 + 2 * torch.randn(4, 5, 3, 3)).to(torch.bfloat16 if half else torch.float64)
    weights, found = torch.randn(4, 5, 3, 3).to(x), []
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-12, "atol": 1e-12}
    for module in (plain, ours):
        source = x.clone().requires_grad_()
        with ranks.synchronised(module, on=module is ours):
            y = module(source)
            assert y.dtype == x.dtype
            (y * weights).sum().backward()
        found.append([y, source.grad, module.weight.grad, module.bias.grad, module.running_mean, module.running_var])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    assert type(ours) is torch.nn.BatchNorm2d and ours.num_batches_tracked == 1
    with ranks.synchronised(ours.eval()):
        torch.testing.assert_close(ours(x), plain.eval()(x), **tolerance)


def test_accumulated_batches_are_one_step_with_their_mean_gradient(tmp_path: Path):
    """Against AdamW written out: a step sees the mean over its batches, and every batch has a number of its own."""

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
            self.logit_scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    data = torch.randn(25, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, plain, seen = Line(), Line(), []

    def loss(at: Step, model: Line = model) -> tuple[torch.Tensor, dict[str, float]]:
        seen.append(at)
        return (model.weight - data[at.indices]).square().mean(), {"number": float(at.step)}

    config = TrainConfig(epochs=2, batch_size=4, accumulate=3, lr=1e-2, warmup_steps=0, weight_decay=0.0)
    history = fit(model, loss, count=25, config=config, folder=tmp_path, stage="toy")  # type: ignore[arg-type]
    assert [at.step for at in seen] == list(range(12)) and [at.epoch for at in seen] == [0] * 6 + [1] * 6
    assert history["number"].tolist() == [2.5, 8.5]
    optimizer = torch.optim.AdamW([plain.weight], betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    for step, batches in enumerate([seen[:3], seen[3:6], seen[6:9], seen[9:12]]):
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, peak=1e-2, warmup=0, total=4)
        optimizer.zero_grad()
        for at in list(batches):
            (loss(at, plain)[0] / 3).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, plain.weight)
    with pytest.raises(ConfigError, match=r"batch_size \* accumulate = 28: at most 25 expected"):
        fit(model, loss, count=25, config=config.replace(accumulate=7), folder=tmp_path, stage="toy")  # type: ignore[arg-type]


# --- evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", SEVERAL)
def test_a_shared_evaluation_gives_the_counts_of_one_process(processes: int, stand_in: Path, shares: Callable):
    """And its features, to the bit."""
    alone = json.loads(json.dumps(counts(stand_in)))
    for rank in range(processes):
        assert json.loads((shares(processes) / f"{rank}.json").read_text()) == alone


def test_a_rank_has_every_so_many_th_row_of_a_whole_batch_and_all_rows_of_a_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "world", lambda: 4)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert ranks.own_rows(8) == slice(None)
    with ranks.shared_batch(8):
        assert list(range(8))[ranks.own_rows(8)] == [1, 5]
        assert ranks.own_rows(4) == slice(None)
    with pytest.raises(ConfigError, match="a batch of 7 rows: a multiple of num_processes = 4 expected"):
        ranks.share(7)


def test_a_rank_reads_only_its_own_images_of_a_batch(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = ["image,caption"]
    for number in range(4):
        Image.new("RGB", (20, 20), (50 * number + 50, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,picture {number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    pairs = load_image_pairs(str(tmp_path / "pairs.csv"), resolution=16)
    order = torch.tensor([2, 0, 3, 1])
    whole = pairs.images(order, seed=0, step=0)
    assert (whole.amax((1, 2, 3)) > 0).all()
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    for number in (2, 3):  # they are the other rank's
        (tmp_path / f"{number}.png").unlink()
    with ranks.shared_batch(4):
        own = pairs.images(order, seed=0, step=0)
    assert torch.equal(own[1::2], whole[1::2]) and not own[::2].any()


@pytest.mark.slow
def test_ranks_wait_for_the_first_that_fills_the_cache(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ABD_WORKERS", "1")
    table = miniature.write_table(tmp_path / "pairs", "cleanclip", miniature.samples(4))
    miniature.write_folders(tmp_path / "things", each=1)
    (tmp_path / "names.txt").write_text("\n".join(miniature.THINGS))
    read = [str(table), str(tmp_path / "things"), str(tmp_path / "names.txt")]
    torchrun(2, str(stand_in), "read", str(tmp_path), *read)
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()


def test_a_rank_that_is_not_the_first_writes_nothing_and_shows_no_bar(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    before = set(tmp_path.rglob("*"))
    models.save(models.build(ARCHITECTURE), tmp_path / "m.safetensors")
    trigger().save(tmp_path / "t.safetensors")
    with train.progress(stage="toy", total=3) as bar:
        bar.update()
        bar.set_postfix(loss="1", refresh=False)
    assert set(tmp_path.rglob("*")) == before
    assert capfd.readouterr().err == ""


# --- stages -------------------------------------------------------------------------------------------------

POISON = {"limit": 48, "epochs": 2, "batch_size": 16, "rate": 0.3, "warmup_steps": 1, "seed": 3}


@pytest.fixture
def several(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PoisonConfig]:
    """Ranks start from the stand-in too, and write a checkpoint a step."""
    monkeypatch.setattr(launch, "PROGRAM", (__file__, str(stand_in), "stage"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda **changes: PoisonConfig(**{**POISON, "num_processes": 2, **changes})


def undisturbed(runs: Path, config: PoisonConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mapping[str, Any]:
    """What the stage makes in another folder of runs with nobody dying."""
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "undisturbed" / "cache").symlink_to((runs / "cache").resolve())
    with monkeypatch.context() as patch:
        patch.setenv("ABD_RUNS", str(tmp_path / "undisturbed"))
        run = poison(config)
    return {
        "weights": load_file(run.file("model.safetensors")),
        "history": pd.read_csv(run.file("history.csv")),
        "metrics": without_time(run.metrics),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "step"), [(1, 4), *(pytest.param(*p, marks=pytest.mark.long) for p in [(0, 4), (0, 1), (1, 6)])]
)
def test_a_run_goes_on_after_any_rank_was_killed_and_ends_as_if_nothing_had_happened(
    victim: int, step: int, several: Callable, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = several()
    expected = undisturbed(runs, config, monkeypatch, tmp_path)
    monkeypatch.setenv("ABD_KILL", f"{victim},{step},{tmp_path / 'killed'}")
    with pytest.raises(RunError, match=rf"rank {victim} of 2 ended by signal 9: run the stage again to go on"):
        poison(config)
    (folder,) = (runs / "poison").iterdir()
    assert (tmp_path / "killed").exists() and not (folder / "metrics.json").exists()
    assert (folder / "resume.pt").exists() == (step > 1)
    run = poison(config)
    weights = load_file(run.file("model.safetensors"))
    assert [key for key, tensor in expected["weights"].items() if not torch.equal(weights[key], tensor)] == []
    pd.testing.assert_frame_equal(pd.read_csv(run.file("history.csv")), expected["history"], check_exact=True)
    assert without_time(run.metrics) == expected["metrics"]
    assert not [path.name for path in run.folder.iterdir() if path.suffix == ".tmp" or path.name.startswith("resume")]
    assert sorted(read_json(run.file("manifest.json"))) == sorted(
        path.name for path in run.folder.iterdir() if path.name not in (".lock", "manifest.json", "metrics.json")
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_two_processes_began_can_be_finished_by_one(
    several: Callable, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = several(sync_batch_norm=True)
    monkeypatch.setenv("ABD_KILL", f"1,4,{tmp_path / 'killed'}")
    with pytest.raises(RunError, match="rank 1 of 2 ended by signal 9"):
        poison(config)
    (folder,) = (runs / "poison").iterdir()
    done = train.load_resume(folder / "resume.pt")
    assert done is not None and done["step"] == 3
    run = poison(config.replace(num_processes=1))
    assert run.folder == folder and pd.read_csv(run.file("history.csv"))["epoch"].tolist() == [1, 2]


@pytest.mark.slow
@pytest.mark.long
def test_two_machines_of_one_process_each_make_what_one_of_two_makes(
    several: Callable, stand_in: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As the documented line starts them: a torchrun on each, here both on this machine."""
    config = several()
    expected = undisturbed(runs, config, monkeypatch, tmp_path)
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"stage": "poison", "config": config.replace(num_processes=1).to_dict()}))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=7"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    agents = [
        subprocess.Popen([*command, __file__, str(stand_in), "stage", str(job)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    (folder,) = (runs / "poison").iterdir()
    assert "".join(printed).split() == [str(folder)]
    weights = load_file(folder / "model.safetensors")
    assert [key for key, tensor in expected["weights"].items() if not torch.equal(weights[key], tensor)] == []


@pytest.mark.slow
@pytest.mark.long
def test_a_stage_of_two_processes_ends_where_one_ends_and_shares_its_run_folder(
    several: Callable, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """With the statistics of all rows, up to rounding, which 6 steps of AdamW let grow."""
    config = several(sync_batch_norm=True)
    alone = undisturbed(runs, config.replace(num_processes=1), monkeypatch, tmp_path)
    capfd.readouterr()
    run = poison(config)
    assert capfd.readouterr().err.count("poison:") >= 1
    assert run.file("model.safetensors").exists() and read_json(run.file("config.json"))["places"] == {
        "num_processes": 2
    }
    history = pd.read_csv(run.file("history.csv"))
    assert history["loss"].tolist() == pytest.approx(alone["history"]["loss"].tolist(), rel=2e-2)
    assert run.metrics["poisoned"] == alone["metrics"]["poisoned"]
    assert poison(config.replace(num_processes=1)).folder == run.folder


@pytest.mark.slow
@pytest.mark.long
def test_a_defence_that_searches_first_is_the_same_of_two_processes(
    several: Callable, stand_in: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first rank's findings are what all train on."""
    config = DefendConfig(defence="abd-d", limit=48, epochs=1, batch_size=8, search_steps=2, sync_batch_norm=True)
    together = defend(config.replace(num_processes=2), stand_in / "victim.safetensors")
    found, losses = sha256(together.file("found.safetensors")), pd.read_csv(together.file("history.csv"))["loss"]
    alone = defend(config, stand_in / "victim.safetensors", force=True)
    assert alone.folder == together.folder
    assert sha256(alone.file("found.safetensors")) == found
    assert pd.read_csv(alone.file("history.csv"))["loss"].tolist() == pytest.approx(losses.tolist(), rel=2e-2)


def test_an_error_of_a_stage_comes_back_as_its_one_line(several: Callable, capfd: pytest.CaptureFixture):
    with pytest.raises(RunError, match=r"batch_size = 15: a multiple of 2 expected, the processes") as error:
        poison(several(batch_size=15))
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err


def test_the_notebook_s_signal_handlers_come_back_and_an_interrupt_is_one():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), launch._own_signals():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SignalException("interrupted", signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_number_of_processes_is_no_part_of_a_run_s_key_and_new_settings_only_where_they_are_set():
    plain = PoisonConfig()
    assert {"num_processes", "accumulate", "micro_batch", "sync_batch_norm"} & plain.to_dict().keys() == set()
    assert PoisonConfig(num_processes=8).key() == plain.key()
    for changes in ({"accumulate": 2}, {"micro_batch": 8}, {"sync_batch_norm": True}):
        assert PoisonConfig(**changes).key() == {**plain.key(), **changes}
    everything = PoisonConfig(num_processes=8, accumulate=2)
    assert everything.replace(seed=1) == PoisonConfig(num_processes=8, accumulate=2, seed=1)
    assert PoisonConfig.from_parameters(json.loads(json.dumps(everything.to_dict()))) == everything


def test_a_defence_that_does_not_train_starts_no_processes(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_launch", lambda job, processes: pytest.fail("launched"))
    run = defend(DefendConfig(defence="clean", num_processes=2, limit=48), stand_in / "victim.safetensors")
    assert run.file("model.safetensors").exists()


# --- jobs ---------------------------------------------------------------------------------------------------


def test_a_job_runs_in_one_process_too_and_prints_its_folder(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    job = {"stage": "defend", "config": {"defence": "clean"}, "victim": str(stand_in / "victim.safetensors")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    launch.main([str(tmp_path / "job.json")])
    folder = Path(capsys.readouterr().out.strip())
    assert folder == defend(DefendConfig(defence="clean"), stand_in / "victim.safetensors").folder


FAULTS = {
    "no stage": ({"config": {}}, "a JSON object with 'stage' and 'config' expected"),
    "unknown stage": ({"stage": "os"}, "unknown stage 'os'; known: defend, poison, pretrain"),
    "unknown argument": ({"stage": "defend", "victims": "a"}, "unknown argument of defend 'victims'; did you mean 'v"),
    "missing argument": ({"stage": "defend"}, "job.json: defend needs 'victim': a path under that name expected"),
    "unknown setting": ({"stage": "poison", "config": {"epoch": 1}}, "unknown PoisonConfig parameter 'epoch'"),
}


@pytest.mark.parametrize(("job", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_job_is_refused_in_one_line(job: dict, message: str, tmp_path: Path):
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(SystemExit, match=message) as error:
        launch.main([str(tmp_path / "job.json")])
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    program(*sys.argv[1:])
