"""The analysis of Fig. 2: pairings of images and captions, shifts of features, drift of answers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ARCHITECTURE

from abd_core import models, plots, similarity
from abd_core.config import ConfigError
from abd_core.data import load_test_set
from abd_core.evaluate import prompt_features, rate, zero_shot_weights
from abd_core.similarity import COMPARISONS, PAIRINGS, Estimate
from abd_core.text import tokenize
from abd_core.triggers import BadNet

KINDS = ("original", "backdoor", "adversarial")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def cells(table: pd.DataFrame, row: str, name: str) -> Estimate:
    found = table[table[row] == name].iloc[0]
    return Estimate(found["value"], found["ci_low"], found["ci_high"])


def leave_out(statistic, rows: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """The jackknife's definition: the statistic again and again without one cluster."""
    without = np.array([statistic(rows[clusters != cluster].mean(0)) for cluster in np.unique(clusters)])
    count = len(without)
    half = 1.96 * math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    value = statistic(rows.mean(0))
    return value, value - half, value + half


# --- intervals ----------------------------------------------------------------------------------------------


def test_the_mean_of_single_trials_has_the_textbook_interval():
    values = draw(40).numpy()
    half = 1.96 * values.std(ddof=1) / math.sqrt(40)
    got = similarity.clustered_mean(torch.from_numpy(values), torch.arange(40))
    assert got == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))


def test_clusters_that_agree_within_count_as_one_trial_each():
    values = draw(12)
    alone = similarity.clustered_mean(values, torch.arange(12))
    assert similarity.clustered_mean(values.repeat_interleave(10), torch.arange(120) // 10) == pytest.approx(alone)


def test_the_interval_of_a_curved_statistic_over_unequal_clusters_is_that_of_leaving_each_out():
    rows = draw(30, 4, seed=1)
    clusters = torch.tensor([0] * 1 + [7] * 9 + [3] * 4 + [5] * 16)

    def curved(row):
        return row[..., 0] * row[..., 1] / (1 + row[..., 2] ** 2)

    expected = leave_out(curved, rows.numpy(), clusters.numpy())
    assert similarity.jackknife(curved, rows, clusters) == pytest.approx(expected)
    assert expected[1] < expected[0] < expected[2]


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_the_95_percent_interval_covers_the_mean_in_at_least_93_percent_of_clustered_samples(agreement: float):
    """99 clusters of 10, as on the benchmark; skewed towards high values, as cosines are."""
    source = np.random.default_rng(3)
    clusters = torch.arange(99).repeat_interleave(10)
    common = np.repeat(source.beta(5, 2, size=(1000, 99)), 10, axis=1)
    samples = agreement * common + (1 - agreement) * source.beta(5, 2, size=(1000, 990))
    got = [similarity.clustered_mean(torch.from_numpy(sample), clusters) for sample in samples]
    assert sum(e.ci_low <= 5 / 7 <= e.ci_high for e in got) >= 930


def test_one_cluster_has_no_interval():
    with pytest.raises(ValueError, match="1 cluster"):
        similarity.clustered_mean(draw(5), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(("low", "high", "word"), [(0.1, 2, "yes"), (-2, -0.1, "no"), (-0.1, 0.1, "open")])
def test_an_estimate_is_positive_only_where_its_whole_interval_is(low: float, high: float, word: str):
    assert Estimate((low + high) / 2, low, high).positive == word


# --- pairings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 10, 99])
def test_a_derangement_moves_everything_and_loses_nothing(count: int):
    moved = similarity.derangement(count, seed=0)
    assert sorted(moved.tolist()) == list(range(count))
    assert not (moved == torch.arange(count)).any()


def test_a_derangement_is_seeded_and_drawn_from_all_cycles():
    assert torch.equal(similarity.derangement(50, seed=1), similarity.derangement(50, seed=1))
    cycles = {tuple(similarity.derangement(4, seed=seed).tolist()) for seed in range(100)}
    assert len(cycles) == math.factorial(3)


def test_nothing_can_be_deranged_alone():
    with pytest.raises(ValueError, match="derangement of 1"):
        similarity.derangement(1, seed=0)


CLASSES, TEMPLATES, TARGET = 6, 3, 2
LABELS = torch.arange(CLASSES).repeat_interleave(5)


def planted() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Images and prompts whose products tell the kind of image, the class and the template: kind.class template."""
    prompts = torch.eye(CLASSES * TEMPLATES).view(CLASSES, TEMPLATES, -1)
    code = torch.tensor([0.1 * k + 0.01 * t for k in range(CLASSES) for t in range(TEMPLATES)])
    return {kind: (code + i + 1).expand(len(LABELS), -1) for i, kind in enumerate(KINDS)}, prompts


def decoded(seed: int = 0) -> pd.DataFrame:
    images, prompts = planted()
    table = similarity.cosines(images, prompts, LABELS, target=TARGET, seed=seed)
    code = table["cosine"].round().astype(int)  # 100 x cosine
    return table.assign(kind=[KINDS[c // 100 - 1] for c in code], named=code % 100 // 10, template=code % 10)


def test_each_pairing_holds_its_kind_of_image_against_its_caption():
    table = decoded()
    assert list(table["pairing"].unique()) == list(PAIRINGS)
    for name, part in table.groupby("pairing"):
        kind, caption = name.replace(" image, ", " ").removesuffix(" caption").split()
        assert set(part["kind"]) == {kind}
        if caption == "original":
            assert (part["named"] == part["label"]).all()
        elif caption == "backdoor":
            assert (part["named"] == TARGET).all()
        else:
            assert caption == "unrelated"
            assert not (part["named"] == part["label"]).any() and TARGET not in set(part["named"])
            assert set(part["named"].value_counts()) == {5}  # every class as often as it has images


def test_the_captions_of_an_image_share_their_template_and_all_templates_are_used():
    table = decoded()
    assert (table.groupby("image")["template"].nunique() == 1).all()
    assert set(table["template"]) == set(range(TEMPLATES))


def test_images_of_the_target_class_are_left_out_and_all_others_are_in():
    table = decoded()
    others = [i for i, label in enumerate(LABELS.tolist()) if label != TARGET]
    for _, part in table.groupby("pairing"):
        assert part["image"].tolist() == others and part["label"].tolist() == LABELS[others].tolist()


def test_without_two_classes_beside_the_target_no_caption_is_unrelated_and_one_line_says_so():
    images, prompts = planted()
    with pytest.raises(ConfigError, match="images of 1 classes beside the target, at least 2 expected"):
        similarity.cosines(images, prompts, (LABELS > 2).long(), target=0, seed=0)


def test_captions_are_drawn_by_the_seed():
    pd.testing.assert_frame_equal(decoded(1), decoded(1))
    one, other = decoded(1), decoded(2)
    unrelated = one["pairing"] == "adversarial image, unrelated caption"
    assert not one["template"].equals(other["template"])
    assert not one["named"][unrelated].equals(other["named"][unrelated])


def test_the_cosines_of_a_model_are_those_of_its_single_images_and_captions(stand_in, fp32):
    model, test = models.build(ARCHITECTURE, seed=3), load_test_set("eval", views=1)
    trigger = BadNet.draw(resolution=64, target="banana", seed=0, size=0.2, position="centre", alpha=0)
    images = similarity.features(model, test, trigger=trigger, perturbation=lambda images: 1 - images)
    target = test.class_names.index("banana")
    prompts = prompt_features(model, test.class_names, test.templates)
    table = similarity.cosines(images, prompts, test.labels, target=target, seed=0)
    shown = test.images.float() / 255
    for kind, pixels in {"original": shown, "backdoor": trigger(shown), "adversarial": 1 - shown}.items():
        part = table[table["pairing"] == f"{kind} image, backdoor caption"].head(5)
        captions = [template.format("banana") for template in test.templates]
        with torch.no_grad():
            image = models.encode_image(model, pixels[part["image"].tolist()]).double().numpy()
            text = models.encode_text(model, tokenize(captions, context_length=model.context_length)).double().numpy()
        distance = np.abs(100 * image @ text.T - part["cosine"].to_numpy()[:, None])
        assert (distance.min(1) < 1e-3).all()  # of one template each


def test_the_paper_s_order_is_its_five_values_in_falling_order_and_then_the_control():
    values = [PAIRINGS[name].paper for name, _ in COMPARISONS[:4]] + [PAIRINGS[COMPARISONS[3][1]].paper]
    assert values == [28.49, 25.02, 19.82, 16.04, 5.04]
    assert all(before[1] == after[0] for before, after in pairwise(COMPARISONS[:4]))
    assert COMPARISONS[4] == ("adversarial image, backdoor caption", "original image, backdoor caption")


def table_of(values: dict[str, np.ndarray], labels: np.ndarray) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"pairing": name, "image": range(len(labels)), "label": labels, "cosine": cosine})
        for name, cosine in values.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_means_have_clustered_intervals_and_the_paper_s_values_beside_them():
    labels = np.repeat(np.arange(8), 4)
    values = {name: draw(32, seed=i).numpy() + 10 * i for i, name in enumerate(PAIRINGS)}
    got = similarity.means(table_of(values, labels))
    assert list(got["pairing"]) == list(PAIRINGS) and set(got["n"]) == {32}
    for name, cosine in values.items():
        expected = leave_out(lambda row: row[0], cosine[:, None], labels)
        assert cells(got, "pairing", name) == pytest.approx(expected)
    assert got["paper"].tolist() == pytest.approx([25.02, 28.49, 19.82, 16.04, 5.04, math.nan], nan_ok=True)


def test_orderings_compare_each_image_with_itself_and_say_yes_no_or_open():
    labels = np.repeat(np.arange(20), 3)
    common, noise = 50 * draw(60).numpy(), draw(60, seed=1).numpy()
    values = {
        "backdoor image, backdoor caption": common + 5 + noise,
        "original image, original caption": common,
        "adversarial image, original caption": common + noise - noise.mean(),
        "adversarial image, backdoor caption": common + 9 + noise,
        "adversarial image, unrelated caption": common - 3,
        "original image, backdoor caption": common,
    }
    got = similarity.orderings(table_of(values, labels))
    assert list(zip(got["higher"], got["lower"], strict=True)) == list(COMPARISONS)
    assert got["holds"].tolist() == ["yes", "open", "no", "yes", "yes"]
    assert got["paper"].tolist() == pytest.approx([3.47, 5.20, 3.78, 11.00, math.nan], nan_ok=True)
    expected = leave_out(lambda row: row[0], 5 + noise[:, None], labels)
    assert tuple(got.loc[0, ["value", "ci_low", "ci_high"]]) == pytest.approx(expected)


# --- features -----------------------------------------------------------------------------------------------


def test_principal_components_are_those_of_numpy_s_svd_up_to_their_signs():
    points = draw(50, 7, seed=2) @ torch.diag(torch.arange(1, 8, dtype=torch.double)) + 3
    coordinates, shares = similarity.pca(points)
    centred = points.numpy() - points.numpy().mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    expected = (left * sizes)[:, :2]
    np.testing.assert_allclose(np.abs(coordinates.numpy()), np.abs(expected), atol=1e-9)
    variances = np.sort(np.linalg.eigvalsh(np.cov(points.numpy().T)))[::-1]
    np.testing.assert_allclose(shares.numpy(), (variances / variances.sum())[:2])


def test_the_signs_of_principal_components_do_not_hang_on_the_order_of_the_points():
    points, order = draw(50, 7), torch.randperm(50)
    torch.testing.assert_close(similarity.pca(points[order])[0], similarity.pca(points)[0][order])
    axes = torch.linalg.lstsq(points - points.mean(0), similarity.pca(points)[0]).solution
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


def test_all_components_keep_every_distance_and_share_the_whole_variance():
    points = draw(20, 5)
    coordinates, shares = similarity.pca(points, components=5)
    torch.testing.assert_close(torch.cdist(coordinates, coordinates), torch.cdist(points, points))
    assert shares.sum().item() == pytest.approx(1)


def test_shifts_are_those_of_numpy():
    labels = np.repeat(np.arange(6), 5)
    original, backdoor, adversarial = (unit(draw(30, 8, seed=seed)).numpy() for seed in (1, 2, 3))
    images = {name: torch.from_numpy(x) for name, x in zip(KINDS, (original, backdoor, adversarial), strict=True)}
    got = similarity.shifts(images, torch.from_numpy(labels))

    def cosine(row: np.ndarray) -> float:
        return row[:8] @ row[8:] / np.linalg.norm(row[:8]) / np.linalg.norm(row[8:])

    both = np.concatenate([backdoor - original, adversarial - original], axis=1)
    gained = (adversarial * backdoor).sum(1) - (original * backdoor).sum(1)
    expected = {
        "cosine of the mean shifts": leave_out(cosine, both, labels),
        "cosine gained with the backdoor image": leave_out(lambda row: row[0], gained[:, None], labels),
        "length, backdoor": leave_out(lambda row: np.linalg.norm(row[:8]), both, labels),
        "length, adversarial": leave_out(lambda row: np.linalg.norm(row[8:]), both, labels),
    }
    assert got["measure"].tolist() == list(expected) and set(got["n"]) == {30}
    for name, estimate in expected.items():
        assert cells(got, "measure", name) == pytest.approx(estimate), name


@pytest.mark.parametrize(("step", "cosine"), [(0.5, 1), (-0.5, -1)])
def test_a_perturbation_on_the_trigger_s_line_has_its_direction_or_the_opposite_one(step: float, cosine: int):
    original, backdoor = unit(draw(30, 8)), unit(draw(30, 8, seed=1))
    images = {"original": original, "backdoor": backdoor, "adversarial": original + step * (backdoor - original)}
    got = similarity.shifts(images, torch.arange(30) // 5)
    assert cells(got, "measure", "cosine of the mean shifts") == pytest.approx((cosine, cosine, cosine))
    gained = cells(got, "measure", "cosine gained with the backdoor image")
    assert math.copysign(1, gained.ci_low) == math.copysign(1, gained.ci_high) == cosine
    lengths = [cells(got, "measure", f"length, {name}").value for name in ("adversarial", "backdoor")]
    assert lengths[0] / lengths[1] == pytest.approx(0.5)


# --- drift --------------------------------------------------------------------------------------------------

NAMES = tuple("abcdef")


def test_the_shares_of_the_drift_are_counted_by_hand_and_sum_to_one_with_those_that_stayed():
    #                       a  a  b  b  c  c  d  d  e  e
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    before = torch.tensor([0, 5, 1, 1, 2, 5, 3, 3, 4, 0])
    after_ = torch.tensor([5, 5, 5, 0, 2, 5, 5, 0, 1, 0])  # moved: 0, 2, 3, 6, 7, 8
    got = similarity.drift(before, after_, labels, NAMES).set_index("name")
    assert got["value"].to_dict() == {"f": 0.3, "a": 0.2, "b": 0.1, "c": 0.0, "d": 0.0, "e": 0.0}
    assert got["rank"].to_dict() == {"f": 1, "a": 2, "b": 3, "c": 6, "d": 6, "e": 6}
    assert list(got.index) == ["f", "a", "b", "c", "d", "e"] and set(got["n"]) == {10}
    assert got["value"].sum() + (before == after_).double().mean().item() == pytest.approx(1)
    expected = rate((before != after_) & (after_ == 5), labels)
    assert tuple(got.loc["f", ["ci_low", "ci_high"]]) == (expected.ci_low, expected.ci_high)


def test_ranks_are_bounded_by_the_classes_whose_joint_intervals_lie_apart():
    labels = torch.arange(200).repeat_interleave(10)
    before, place = (
        torch.zeros(2000, dtype=torch.int64),
        torch.arange(2000) * 7 % 10 + torch.arange(2000) // 10 % 50 / 50,
    )
    edges = torch.tensor([5.0, 7.0, 8.6])  # half of the images go to e, a fifth to b, 0.16 to c, the others stay
    after_ = torch.tensor([4, 1, 2, 0])[torch.bucketize(place, edges)]
    got = similarity.drift(before, after_, labels, NAMES).set_index("name")
    low, high = 0.0, 10.0  # z of the level 0.95^(1/6), by bisection of the error function
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) ** 6 < 0.95 else (low, middle)
    joint = [rate((before != after_) & (after_ == k), labels, z=low) for k in range(6)]
    for k, own in enumerate(joint):
        above = sum(other.ci_low > own.ci_high for other in joint)
        below = sum(other.ci_high < own.ci_low for other in joint)
        assert tuple(got.loc[NAMES[k], ["rank_low", "rank_high"]]) == (1 + above, 6 - below)
    bounds = {name: tuple(got.loc[name, ["rank_low", "rank_high"]]) for name in NAMES}
    assert bounds == {"e": (1, 1), "b": (2, 3), "c": (2, 3), "a": (4, 6), "d": (4, 6), "f": (4, 6)}
    assert got.loc["c", "ci_high"] < got.loc["b", "ci_low"]  # apart one by one, but not all classes together


def test_where_nothing_moves_no_class_is_named():
    got = similarity.drift(LABELS, LABELS, LABELS, NAMES)
    assert (got["value"] == 0).all() and (got["rank"] == 6).all()
    assert (got["rank_low"] == 1).all() and (got["rank_high"] == 6).all()


def test_a_perturbation_that_a_model_takes_for_the_target_is_named(fp32):
    """The embedded base, and a "perturbation" that is a picture of a banana."""
    model, test = models.load(models.clean_weights()), load_test_set("eval", views=1)
    target = test.class_names.index("banana")
    banana = test.images[target].float() / 255
    images = similarity.features(
        model, test, trigger=lambda images: images, perturbation=lambda images: banana.expand_as(images)
    )
    classifier = zero_shot_weights(model, test.class_names, test.templates)
    answers = {kind: (rows @ classifier.T).argmax(1) for kind, rows in images.items()}
    before, after_ = answers["original"], answers["adversarial"]
    first = similarity.drift(before, after_, test.labels, test.class_names).iloc[0]
    assert (first["name"], first["rank"], first["rank_low"], first["rank_high"]) == ("banana", 1, 1, 1)
    assert first["value"] == pytest.approx((before != target).double().mean().item())
    assert torch.equal(answers["backdoor"], before)  # its trigger changes nothing


@pytest.mark.parametrize(("answers", "bits"), [([3] * 30, 0), (LABELS.tolist(), math.log2(6))])
def test_entropy_is_zero_for_one_answer_and_log_k_for_all_alike(answers: list[int], bits: float):
    got = similarity.drift_measures(torch.tensor(answers), LABELS, LABELS, classes=6, target=0)
    assert cells(got, "measure", "entropy before, bits").value == pytest.approx(bits, abs=1e-12)
    assert cells(got, "measure", "entropy after, bits").value == pytest.approx(math.log2(6))


def test_the_measures_of_the_drift_are_those_of_numpy():
    source = np.random.default_rng(1)
    before, after_ = source.integers(0, 6, 30), source.integers(2, 6, 30)
    got = similarity.drift_measures(
        torch.from_numpy(before), torch.from_numpy(after_), LABELS, classes=6, target=TARGET
    )
    for name, hits in {
        "answers changed, %": before != after_,
        "moved to the target, %": (before != after_) & (after_ == TARGET),
    }.items():
        expected = rate(torch.from_numpy(hits), LABELS)
        share = 100 * np.array([hits.mean(), expected.ci_low, expected.ci_high])
        assert cells(got, "measure", name) == pytest.approx(tuple(share))

    def entropy(shares: np.ndarray) -> float:
        return -sum(p * math.log2(p) for p in shares if p > 0)

    for name, answers in {"entropy before, bits": before, "entropy after, bits": after_}.items():
        expected = leave_out(entropy, np.eye(6)[answers], LABELS.numpy())
        assert cells(got, "measure", name) == pytest.approx(expected)
    assert set(got["n"]) == {30}


# --- to read ------------------------------------------------------------------------------------------------


def test_a_table_to_read_keeps_the_order_of_rows_and_columns():
    rows = [("z", "victim", 1.26), ("a", "victim", 2), ("z", "base", -3), ("a", "base", 4)]
    long = pd.DataFrame(
        [{"what": what, "model": model, "value": v, "ci_low": v - 1, "ci_high": v + 1} for what, model, v in rows]
    )
    got = plots.estimates(long, index="what", columns="model")
    assert got.index.tolist() == ["z", "a"] and got.columns.tolist() == ["victim", "base"]
    assert got.loc["z"].tolist() == ["1.3 [0.3, 2.3]", "-3.0 [-4.0, -2.0]"]
