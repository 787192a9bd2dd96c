"""Preflight: each thing that would break a long run is seen before it starts, on one screen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import miniature
import pytest
import torch

from abd_core import adversary as adversary_module
from abd_core import formats, models, paths
from abd_core import preflight as preflight_module
from abd_core.adversary import AdversaryConfig
from abd_core.config import AbdError, ConfigError
from abd_core.data import load_test_set
from abd_core.defences import DEFENCES, DefendConfig
from abd_core.poison import PoisonConfig
from abd_core.preflight import PreflightError, main, preflight

PAIRS = miniature.samples(60)


@pytest.fixture
def outside(stand_in: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings of small stages on pairs and test images of one's own, with an empty cache."""
    cache = (runs / "cache").resolve()
    (runs / "cache").unlink()
    (runs / "cache").mkdir()
    for path in cache.glob("wordnet-*"):
        (runs / "cache" / path.name).symlink_to(path)
    monkeypatch.setenv("ABD_WORKERS", "0")
    monkeypatch.setattr(preflight_module, "STEPS", 4)
    monkeypatch.setattr(preflight_module, "WARM", 1)
    miniature.write_folders(tmp_path / "test", each=10)
    (tmp_path / "names.txt").write_text("\n".join(miniature.THINGS))
    return {
        "pairs": miniature.write_shards(tmp_path / "pairs", PAIRS),
        "test_images": str(tmp_path / "test"),
        "test_classes": str(tmp_path / "names.txt"),
    }


def configs(outside: dict[str, str], **poison) -> tuple[PoisonConfig, AdversaryConfig, DefendConfig]:
    return (
        PoisonConfig(**outside, **{"batch_size": 10, **poison}),
        AdversaryConfig(**outside, steps=7, batch_size=8, width=16),
        DefendConfig(**outside, batch_size=6, epochs=5),
    )


def screen(capsys: pytest.CaptureFixture) -> dict[str, str]:
    """Name of a check -> its line."""
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Preflight") and len(lines) <= 24 and max(map(len, lines)) < 250
    return {line[5:17].strip(): line for line in lines[1:]}


def test_the_embedded_benchmark_needs_none(stand_in: Path, capsys: pytest.CaptureFixture):
    preflight(PoisonConfig(), AdversaryConfig(), DefendConfig())
    assert capsys.readouterr().out == ""


def test_a_blank_image_among_others_is_no_reason_to_refuse_an_attack_that_moves_pixels(stand_in: Path):
    test, line = load_test_set("dev"), preflight_module._trigger
    images = test.images.clone()
    images[0] = 255
    assert "wanet changes" in line(PoisonConfig(attack="wanet"), dataclasses.replace(test, images=images))[0]
    images[:] = 255
    with pytest.raises(AbdError, match="leaves an image"):
        line(PoisonConfig(attack="wanet"), dataclasses.replace(test, images=images))


def test_too_few_of_the_embedded_pairs_are_named_before_any_work(stand_in: Path):
    with pytest.raises(ConfigError, match="batch_size = 64: at most 7 expected"):
        preflight(PoisonConfig(), AdversaryConfig(), DefendConfig(share=0.001))


@pytest.mark.slow
def test_all_in_order_is_one_screen_with_hours_and_is_not_measured_twice(outside, capsys, monkeypatch):
    preflight(*configs(outside))
    seen = screen(capsys)
    assert all(line.startswith("ok  ") for line in seen.values())
    assert list(seen) == [
        *("weights", "pairs", "test images", "captions", "target", "trigger", "disk", "poison", "adversary", "defend")
    ]
    assert "60 pairs, 0 damaged" in seen["pairs"] and "54 images of 6 classes" in seen["test images"]
    assert "10 captions name it; 6 pairs will be poisoned" in seen["target"]
    assert "60 steps" in seen["poison"]  # 60 pairs in batches of 10, 10 epochs
    assert "7 steps" in seen["adversary"]
    assert "25 steps" in seen["defend"]  # half of the pairs in batches of 6, 5 epochs
    assert all("hours" in seen[stage] and "memory" in seen[stage] for stage in ("poison", "adversary", "defend"))
    assert not list(paths.runs_dir().glob("poison/*")) and not list(paths.runs_dir().glob("defend/*"))
    monkeypatch.setattr(preflight_module, "_rehearsed", None)
    preflight(*configs(outside))
    assert screen(capsys) == seen


def refused(capsys: pytest.CaptureFixture, *given) -> dict[str, str]:
    """The failed lines of a preflight."""
    with pytest.raises(PreflightError, match="checks failed") as error:
        preflight(*given)
    assert "\n" not in str(error.value)
    failed = {name: line for name, line in screen(capsys).items() if line.startswith("FAIL")}
    assert all(f"{name}: {line[18:]}" in str(error.value) for name, line in failed.items())
    assert not list(paths.cache_dir().glob("preflight-*"))
    return failed


@pytest.mark.parametrize(
    ("changes", "check", "line"),
    [
        ({"pairs": "nowhere.csv"}, "pairs", "missing file: nowhere.csv"),
        ({"test_images": "nowhere"}, "test images", "missing file: nowhere"),
        ({"limit": 61}, "pairs", "limit = 61"),
        ({"target": "bananna"}, "target", "did you mean 'banana'"),
        ({"attack": "blended", "blend_alpha": 1e-4}, "trigger", "leaves an image of 64 px as it is"),
    ],
)
def test_what_is_missing_or_would_not_work_is_named(changes, check, line, outside, capsys, monkeypatch):
    monkeypatch.setattr(preflight_module, "_rehearsed", lambda *a: ("", 0.0))
    failed = refused(capsys, PoisonConfig(**{**outside, **changes}))
    assert line in failed[check]


def test_an_attack_that_needs_captions_of_the_target_is_told_that_there_are_none(
    outside, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(preflight_module, "_rehearsed", lambda *a: ("", 0.0))
    (tmp_path / "names.txt").write_text("\n".join([*miniature.THINGS[:-1], "unicorn"]))
    failed = refused(capsys, PoisonConfig(**outside, attack="badclip", target="unicorn"))
    assert "no caption names it" in failed["target"]


def test_empty_captions_damaged_weights_and_a_full_disk_are_seen(outside, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight_module, "_rehearsed", lambda *a: ("", 0.0))
    blank = {**outside, "pairs": miniature.write_shards(tmp_path / "blank", [(n, d, " ") for n, d, _ in PAIRS])}
    assert "100% of" in refused(capsys, PoisonConfig(**blank))["captions"]
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    failed = refused(capsys, PoisonConfig(**outside, pretrained=str(tmp_path / "w.safetensors")))
    assert list(failed) == ["weights"]
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1 << 20}))
    assert "0.0 GiB free" in refused(capsys, PoisonConfig(**outside))["disk"]


def test_hostile_captions_and_class_names_do_not_paint_the_terminal(outside, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight_module, "_rehearsed", lambda *a: ("", 0.0))
    wild = "\x1b[2J\x1b]0;owned\x07banana\u202e"
    (tmp_path / "names.txt").write_text("\n".join([*miniature.THINGS[:-1], wild]))
    pairs = miniature.write_shards(tmp_path / "wild", [(name, data, wild) for name, data, _ in PAIRS])
    preflight(PoisonConfig(**{**outside, "pairs": pairs}, target=wild, batch_size=10))
    shown = capsys.readouterr().out
    assert r"\x1b[2J" in shown and not any(c in shown for c in "\x1b\x07\u202e")


def test_too_large_a_batch_is_a_line_and_not_a_traceback(outside, capsys, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(preflight_module, "search", fails)
    failed = refused(capsys, AdversaryConfig(**outside, batch_size=8))
    assert "lower batch_size" in failed["adversary"]
    assert "batch_size = 128: at most 60 expected" in refused(capsys, PoisonConfig(**outside))["poison"]


@pytest.mark.slow
@pytest.mark.parametrize("defence", DEFENCES)
def test_every_defence_can_be_rehearsed(defence: str, outside, capsys):
    options = {"search_steps": 2} if defence == "abd-d" else {}
    preflight(DefendConfig(**outside, defence=defence, batch_size=6, **options))
    line = screen(capsys)["defend"]
    assert "trains nothing" in line if defence in ("clean", "wise-ft") else "hours" in line


def test_the_hours_are_the_steps_times_the_seconds_of_one(outside, monkeypatch):
    """A clock that only training moves: 2 s a batch."""
    clock = [0.0]

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return clock[0]

    images = formats.ImagePairs.images

    def slow(self, indices, **options):
        clock[0] += 2.0
        return images(self, indices, **options)

    monkeypatch.setattr(preflight_module, "time", Clock)
    monkeypatch.setattr(formats.ImagePairs, "images", slow)
    monkeypatch.setattr(adversary_module, "CHECKPOINT_SECONDS", 1e9)
    poison, adversary, defend = configs(outside)
    clean = models.clean_weights()
    _, pairs = preflight_module._pairs(poison, clean)
    _, test = preflight_module._test(poison, clean)
    for config, steps in ((poison, 60), (adversary, 7), (defend, 25)):
        _, hours = preflight_module._rehearsed(config, clean, pairs, test)
        assert hours == pytest.approx(2 * steps / 3600)


class Readers:
    """Workers on a clock of their own: each takes `seconds` for a batch, and two batches a worker are under way."""

    def __init__(self, clock: list[float], workers: int, seconds: float) -> None:
        self.clock, self.workers, self.seconds = clock, workers, seconds

    def plan(self, batches: Iterable[torch.Tensor]) -> None:
        self.free, self.ready, self.taken = [self.clock[0]] * self.workers, list[float](), 0
        self.left = len(list(batches))
        for _ in range(2 * self.workers):
            self.begin()

    def begin(self) -> None:
        if self.left > len(self.ready):
            worker = len(self.ready) % self.workers
            self.free[worker] = max(self.free[worker], self.clock[0]) + self.seconds
            self.ready.append(self.free[worker])

    def images(self, indices: torch.Tensor, *, seed: int, step: int) -> None:
        self.clock[0] = max(self.clock[0], self.ready[self.taken])
        self.taken += 1
        self.begin()


@pytest.mark.parametrize("workers", [1, 4, 16])
@pytest.mark.parametrize("reading", [0.5, 0.9, 1.1, 2.0, 10.0])
def test_the_rate_is_that_of_the_readers_where_they_are_slower_and_of_the_steps_where_these_are(
    workers: int, reading: float, monkeypatch: pytest.MonkeyPatch
):
    """A step takes a second and the first one 100, in which the readers fill all that they may read ahead."""
    clock = [0.0]
    monkeypatch.setenv("ABD_WORKERS", str(workers))
    monkeypatch.setattr(preflight_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    timed = preflight_module._Timed(Readers(clock, workers, reading * workers))
    batches = torch.arange(preflight_module._rehearsal()).split(1)
    timed.plan(batches)
    for step, batch in enumerate(batches):
        timed.images(batch, seed=0, step=step)
        clock[0] += 1.0 if step else 100.0
    assert timed.seconds() == pytest.approx(max(1.0, reading), rel=0.02)


def test_few_batches_and_a_single_one_have_a_rate_too(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setenv("ABD_WORKERS", "4")
    monkeypatch.setattr(preflight_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for count in (1, 2, 3, 7):
        timed = preflight_module._Timed(Readers(clock, 4, 0.0))
        timed.plan(torch.arange(count).split(1))
        for step in range(count):
            timed.images(torch.tensor([step]), seed=0, step=step)
            clock[0] += 3.0
        assert timed.seconds() == pytest.approx(3.0)


def test_figures_say_what_they_leave_out(outside, capsys):
    poison, adversary, _ = configs(outside)
    preflight(poison)
    whole = screen(capsys)["poison"]
    assert "one process" not in whole and "without" not in whole
    preflight(poison.replace(num_processes=2))
    assert screen(capsys)["poison"].endswith("all of one process, not of 2")
    preflight(poison.replace(quiet_weight=1.0))
    assert "without the perturbed images of quiet_weight" in screen(capsys)["poison"]
    preflight(adversary.replace(normal="fine-tuned"))
    assert screen(capsys)["adversary"].endswith("without the fine-tuning that stands in for clean weights")


@pytest.mark.slow
def test_it_runs_alone_with_papermill_s_parameters(outside, tmp_path, capsys):
    (tmp_path / "p.yaml").write_text("poison_batch_size: 10\nbatch_size: 6\nsteps: 3\nwidth: 16\nepochs: 1\n")
    given = [part for name, value in outside.items() for part in ("-p", name, value)]
    main(["-f", str(tmp_path / "p.yaml"), *given, "--stages", "poison"])
    assert "60 steps" in screen(capsys)["poison"]
    with pytest.raises(AbdError, match="nothing to check"):
        main([])
    with pytest.raises(AbdError, match="unknown parameter 'pears'"):
        main(["-p", "pears", "x"])
