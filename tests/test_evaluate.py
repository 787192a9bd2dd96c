"""CA, ASR and RA, and their intervals."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import numpy as np
import open_clip
import pytest
import torch
from conftest import ARCHITECTURE, write_stand_in

from abd_core import evaluate as module
from abd_core import models, paths, text
from abd_core.config import ConfigError
from abd_core.data import load_test_set
from abd_core.evaluate import EvaluateConfig, evaluate, measure, rate, similarities, zero_shot_weights
from abd_core.triggers import BadNet


def wilson(p: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The textbook interval: the roots of (p - q)^2 = z^2 q (1 - q) / n."""
    roots = np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p])
    return float(min(roots.real)), float(max(roots.real))


def hits(*groups: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Trials and their clusters from (hits, trials) a cluster."""
    trials = [(j < k, i) for i, (k, n) in enumerate(groups) for j in range(n)]
    flags, clusters = zip(*trials, strict=True)
    return torch.tensor(flags), torch.tensor(clusters)


# --- intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 2), (3, 10), (50, 100), (999, 1000)])
def test_single_trials_have_wilson_s_interval(k: int, n: int):
    measured = rate(*hits(*[(1, 1)] * k, *[(0, 1)] * (n - k)))
    assert (measured.value, measured.n) == (k / n, n)
    assert (measured.ci_low, measured.ci_high) == pytest.approx(wilson(k / n, n), abs=1e-9)


@pytest.mark.parametrize("agreeing", [0, 1, 30, 50])
def test_clusters_that_agree_within_count_as_one_trial_each(agreeing: int):
    measured = rate(*hits(*[(10, 10)] * agreeing, *[(0, 10)] * (50 - agreeing)))
    assert (measured.ci_low, measured.ci_high) == pytest.approx(wilson(agreeing / 50, 50), abs=1e-9)


def test_clusters_that_are_all_alike_gain_nothing_beyond_the_number_of_trials():
    measured = rate(*hits(*[(6, 10)] * 50))
    assert (measured.ci_low, measured.ci_high) == pytest.approx(wilson(0.6, 500), abs=1e-9)


def test_the_interval_of_unequal_clusters_follows_the_ratio_estimator_with_a_full_and_an_empty_cluster_added():
    groups = [(1, 4), (3, 3), (0, 7), (5, 9), (2, 2)]
    k, n = len(groups), sum(size for _, size in groups)
    p = sum(h for h, _ in groups) / n
    added = [*groups, (n / k, n / k), (0, n / k)]
    share = sum(h for h, _ in added) / sum(size for _, size in added)
    variance = sum((h - size * share) ** 2 for h, size in added) / sum(size for _, size in added) ** 2
    measured = rate(*hits(*groups))
    effective = k / (k + 2) * share * (1 - share) / variance
    assert effective < n
    assert (measured.ci_low, measured.ci_high) == pytest.approx(wilson(p, effective), abs=1e-9)


def test_the_interval_of_a_handful_of_hits_does_not_jump():
    highs = [rate(*hits((count, 10), *[(0, 10)] * 99)).ci_high for count in range(4)]
    assert all(0.9 < after / before < 1.2 for before, after in pairwise(highs))


def test_no_trials_are_refused():
    with pytest.raises(ValueError, match="no trials"):
        rate(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))


def test_the_order_of_trials_and_the_names_of_clusters_do_not_matter():
    flags, clusters = hits((1, 4), (3, 3), (0, 7))
    order = torch.randperm(len(flags))
    assert rate(flags, clusters) == rate(flags[order], 100 - 7 * clusters[order])


def test_an_interval_contains_its_value_and_stays_within_zero_and_one():
    for seed in range(200):
        draw = np.random.default_rng(seed)
        groups = [(int(draw.integers(0, n + 1)), int(n)) for n in draw.integers(1, 9, size=draw.integers(1, 12))]
        measured = rate(*hits(*groups))
        assert 0 <= measured.ci_low <= measured.value <= measured.ci_high <= 1, groups


@pytest.mark.parametrize(
    ("p", "agreement"),
    [(0.6, 0.0), (0.6, 0.5), (0.1, 0.3), (0.95, 0.3), (0.5, 1.0), (0.02, 0.0), (0.02, 0.5), (0.99, 0.5)],
)
def test_the_95_percent_interval_covers_the_truth_in_at_least_93_percent_of_clustered_samples(
    p: float, agreement: float
):
    """100 clusters of 10: with probability `agreement` a trial takes its cluster's common outcome."""
    draw = np.random.default_rng(7)
    clusters = torch.arange(100).repeat_interleave(10)
    covered = 0
    for _ in range(1_000):
        common = np.repeat(draw.random(100) < p, 10)
        outcome = np.where(draw.random(1_000) < agreement, common, draw.random(1_000) < p)
        measured = rate(torch.from_numpy(outcome), clusters)
        covered += measured.ci_low <= p <= measured.ci_high
    assert covered >= 930


def test_a_rate_prints_as_percent_with_its_interval():
    assert str(module.Rate(0.5, 10, 0.25, 0.754)) == "50.0 [25.0, 75.4]"


# --- zero-shot ----------------------------------------------------------------------------------------------


def test_the_classifier_is_that_of_open_clip(stand_in, fp32):
    model = models.build(ARCHITECTURE, seed=3)
    names, templates = ("banana", "hot dog", "cat"), text.TEMPLATES
    ours = zero_shot_weights(model, names, templates)
    theirs = open_clip.build_zero_shot_classifier(
        model,
        tokenizer=lambda prompts: open_clip.tokenize(prompts, context_length=model.context_length),
        classnames=names,
        templates=[template.format for template in templates],
    )
    assert ours.shape == (3, model.text_projection.shape[1])
    torch.testing.assert_close(ours, theirs.T, atol=1e-6, rtol=1e-5)


def test_an_evaluation_encodes_the_prompts_once_and_leaves_the_model_s_mode(stand_in, monkeypatch):
    model, test, calls = models.load(stand_in / "base.safetensors").train(), load_test_set("eval", views=1), []
    prompts = module.zero_shot_weights
    monkeypatch.setattr(module, "zero_shot_weights", lambda net, *a: (calls.append(net.training), prompts(net, *a))[1])
    with_trigger = evaluate(model, test, trigger=lambda images: 1 - images, target=0)
    assert calls == [False] and model.training
    assert with_trigger.ca == evaluate(model, test).ca


def test_similarities_are_cosines_of_single_images_in_eval_mode_whatever_the_batches(stand_in, fp32):
    model = models.build(ARCHITECTURE, seed=3).train()
    test = load_test_set("eval", views=1)
    got = similarities(model, test, change=lambda images: 1 - images, batch_size=33)
    assert model.training
    model.eval()
    with torch.no_grad():
        images = models.encode_image(model, 1 - test.images.float() / 255).double().numpy()
        classes = zero_shot_weights(model, test.class_names, test.templates).double().numpy()
    np.testing.assert_allclose(got.numpy(), images @ classes.T, atol=1e-5)


# --- CA, ASR, RA --------------------------------------------------------------------------------------------

CLASSES, TARGET = 12, 4


def planted(monkeypatch: pytest.MonkeyPatch, clean: list[int], triggered: list[int]) -> module.Evaluation:
    """An evaluation over two images a class of a model with these predictions; runners-up follow in cyclic order."""

    def ranked(first: list[int]) -> torch.Tensor:
        scores = torch.zeros(len(first), CLASSES)
        for i, winner in enumerate(first):
            scores[i, (torch.arange(CLASSES) + winner) % CLASSES] = -torch.arange(CLASSES, dtype=torch.float)
        return scores

    monkeypatch.setattr(module, "zero_shot_weights", lambda *_: None)
    monkeypatch.setattr(
        module, "similarities", lambda model, test, *, change=None, weights: ranked(triggered if change else clean)
    )
    labels = torch.arange(CLASSES).repeat_interleave(2)
    names = tuple(f"class {i}" for i in range(CLASSES))
    test = module.TestSet(torch.zeros(24, 3, 8, 8, dtype=torch.uint8), labels, names, ("a {}",), "eval")
    return evaluate(torch.nn.Identity(), test, trigger=lambda images: images, target=TARGET)


LABELS = [i // 2 for i in range(24)]


def test_asr_leaves_the_target_class_out_and_asr_all_counts_it(monkeypatch: pytest.MonkeyPatch):
    fooled = [TARGET if i < 12 else label for i, label in enumerate(LABELS)]  # classes 0-5, the target among them
    result = planted(monkeypatch, LABELS, fooled)
    assert (result.asr.value, result.asr.n) == (10 / 22, 22)
    assert (result.asr_all.value, result.asr_all.n) == (12 / 24, 24)
    assert (result.ra.value, result.ra.n) == (14 / 24, 24)  # the target's two images and classes 6-11


def test_a_model_that_calls_everything_the_target_has_full_asr_and_the_target_s_share_of_ra(monkeypatch):
    result = planted(monkeypatch, [TARGET] * 24, [TARGET] * 24)
    assert (result.asr.value, result.asr_all.value, result.ra.value) == (1.0, 1.0, 2 / 24)
    assert result.ca[1].value == 2 / 24


def test_a_model_that_only_knows_the_target_has_no_asr(monkeypatch: pytest.MonkeyPatch):
    fooled = [label if label == TARGET else (label + 1) % CLASSES for label in LABELS]
    fooled = [label if label != TARGET or LABELS[i] == TARGET else 0 for i, label in enumerate(fooled)]
    assert planted(monkeypatch, LABELS, fooled).asr.value == 0


@pytest.mark.parametrize(
    ("behind", "expected"),
    [(0, [1, 1, 1]), (1, [0, 1, 1]), (4, [0, 1, 1]), (5, [0, 0, 1]), (9, [0, 0, 1]), (10, [0, 0, 0])],
)
def test_top_k_counts_a_label_among_the_first_k(monkeypatch: pytest.MonkeyPatch, behind: int, expected: list[int]):
    result = planted(monkeypatch, [(label - behind) % CLASSES for label in LABELS], LABELS)
    assert [result.ca[k].value for k in (1, 5, 10)] == expected


def test_without_a_trigger_only_ca_is_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "zero_shot_weights", lambda *_: None)
    monkeypatch.setattr(module, "similarities", lambda model, test, *, weights: torch.eye(CLASSES))
    images = torch.zeros(CLASSES, 3, 8, 8, dtype=torch.uint8)
    test = module.TestSet(images, torch.arange(CLASSES), tuple("abcdefghijkl"), ("a {}",), "dev")
    record = evaluate(torch.nn.Identity(), test).to_dict()
    assert record["split"] == "dev"
    assert record.keys() == {"split", "ca_top1", "ca_top5", "ca_top10"}
    assert record["ca_top1"]["value"] == 1 and record["ca_top1"]["n"] == CLASSES


# --- measure ------------------------------------------------------------------------------------------------


def test_ca_is_measured_from_weights_alone(stand_in):
    assert inspect.signature(measure).parameters["trigger"].default is None
    run = measure(stand_in / "victim.safetensors")
    assert {"ca_top1", "ca_top5", "ca_top10"} <= run.metrics.keys() and "asr" not in run.metrics
    assert run.metrics["ca_top1"]["n"] == 100


@pytest.fixture
def trigger_file(tmp_path):
    trigger = BadNet.draw(resolution=64, target="banana", seed=0, size=0.1, position="centre", alpha=0)
    trigger.save(tmp_path / "trigger.safetensors")
    return tmp_path / "trigger.safetensors"


def test_measure_equals_evaluate_and_is_loaded_the_second_time(stand_in, trigger_file, monkeypatch):
    weights = stand_in / "victim.safetensors"
    run = measure(weights, trigger=trigger_file, config=EvaluateConfig(split="dev"))
    names = load_test_set("dev", views=1).class_names
    trigger = module.load_trigger(trigger_file)
    direct = evaluate(
        models.load(weights), load_test_set("dev", views=1), trigger=trigger, target=names.index("banana")
    )
    assert {name: value for name, value in run.metrics.items() if name != "seconds"} == direct.to_dict()
    monkeypatch.setattr(module, "evaluate", None)
    assert measure(weights, trigger=trigger_file, config=EvaluateConfig(split="dev")).metrics == run.metrics


def test_other_weights_trigger_or_split_are_another_measurement(stand_in, trigger_file, tmp_path):
    weights, other = stand_in / "victim.safetensors", write_stand_in(tmp_path / "other.safetensors", seed=9)
    folders = {
        measure(weights).folder,
        measure(other).folder,
        measure(weights, trigger=trigger_file).folder,
        measure(weights, config=EvaluateConfig(split="dev")).folder,
    }
    assert len(folders) == 4


@pytest.mark.parametrize("missing", ["weights", "trigger"])
def test_a_missing_file_is_named(stand_in, tmp_path, missing: str):
    files = {"weights": stand_in / "victim.safetensors", "trigger": None, missing: tmp_path / "none.safetensors"}
    with pytest.raises(paths.RunError, match=r"missing file: .*none\.safetensors"):
        measure(files["weights"], trigger=files["trigger"])


def test_a_target_that_is_no_class_is_refused(stand_in, tmp_path):
    trigger = BadNet.draw(resolution=64, target="bananna", seed=0, size=0.1, position="centre", alpha=0)
    trigger.save(tmp_path / "trigger.safetensors")
    with pytest.raises(ConfigError, match="bananna"):
        measure(stand_in / "victim.safetensors", trigger=tmp_path / "trigger.safetensors")


def test_a_trigger_for_another_resolution_is_refused(stand_in, tmp_path):
    trigger = BadNet.draw(resolution=224, target="banana", seed=0, size=0.1, position="centre", alpha=0)
    trigger.save(tmp_path / "trigger.safetensors")
    with pytest.raises(ConfigError, match=r"trigger\.safetensors: the trigger is for another resolution: 224 px"):
        measure(stand_in / "victim.safetensors", trigger=tmp_path / "trigger.safetensors")


def test_an_interval_at_half_of_a_hundred_is_ten_points_to_either_side():
    """A sanity check against a value that everybody knows, independent of the formulas above."""
    measured = rate(*hits(*[(1, 1)] * 50, *[(0, 1)] * 50))
    assert math.isclose(measured.ci_high - 0.5, 0.5 - measured.ci_low)
    assert 0.09 < measured.ci_high - 0.5 < 0.11
