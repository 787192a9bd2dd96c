"""Ranking training pairs: the estimators against known values, and a planted poison."""

from __future__ import annotations

import pytest
import torch

from abd_core import models, suspicion
from abd_core.suspicion import (
    average_precision,
    local_intrinsic_dimensionality,
    neighbour_distances,
    precision_recall,
    scores,
)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def test_neighbour_distances_are_those_of_all_couples():
    features = unit(torch.randn(1200, 8, generator=torch.Generator().manual_seed(0)))  # more than a chunk
    every = torch.cdist(features.double(), features.double()).fill_diagonal_(torch.inf)
    expected = every.topk(5, largest=False).values
    assert torch.allclose(neighbour_distances(features, 5).double(), expected, atol=2e-3)
    with pytest.raises(ValueError, match="at least 6"):
        neighbour_distances(features[:5], 5)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_local_intrinsic_dimensionality_is_the_dimension_of_a_uniform_cloud(dimension):
    """In a ball of d dimensions distances to the k nearest go as u^(1/d)."""
    draws = torch.rand(4000, 40, generator=torch.Generator().manual_seed(1), dtype=torch.double) ** (1 / dimension)
    estimates = local_intrinsic_dimensionality(draws.sort(1).values)
    assert estimates.median().item() == pytest.approx(dimension, rel=0.1)


def test_a_dimension_needs_two_neighbours():
    distances = neighbour_distances(unit(torch.randn(8, 4, generator=torch.Generator().manual_seed(0))), 1)
    with pytest.raises(ValueError, match="from 1 nearest: at least 2 expected"):
        local_intrinsic_dimensionality(distances)
    with pytest.raises(ValueError, match="0 nearest: at least 1 expected"):
        neighbour_distances(torch.zeros(8, 4), 0)


def test_average_precision_by_hand():
    poisoned = torch.tensor([True, False, True, False])
    precision, recall = precision_recall(torch.tensor([4.0, 3, 2, 1]), poisoned)
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2]) and recall.tolist() == [0.5, 0.5, 1, 1]
    assert average_precision(torch.tensor([4.0, 3, 2, 1]), poisoned) == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="no poisoned"):
        precision_recall(torch.ones(3), torch.zeros(3, dtype=torch.bool))


def test_images_with_one_trigger_crowd_together(monkeypatch):
    source = torch.Generator().manual_seed(0)
    image, text = unit(torch.randn(200, 16, generator=source)), unit(torch.randn(200, 16, generator=source))
    poisoned = torch.arange(200) < 30
    image[poisoned] = unit(text[0] + 0.1 * torch.randn(30, 16, generator=source))
    text[poisoned] = text[0].clone()
    clean_image = unit(torch.randn(200, 16, generator=source))
    features = {"suspect": (image, text), "clean": (clean_image, text)}
    monkeypatch.setattr(suspicion, "pair_features", lambda model, images, captions: features[model])
    found = scores("suspect", torch.zeros(200, 3, 1, 1), ["a"] * 200, reference="clean")
    assert set(found) == {"misfit", "gap", "lid", "crowding"}
    assert average_precision(found["crowding"], poisoned) > 0.99 and average_precision(found["gap"], poisoned) > 0.9
    assert set(scores("suspect", torch.zeros(200, 3, 1, 1), ["a"] * 200)) == {"misfit", "lid", "crowding"}
    with pytest.raises(ValueError, match="200 images, 3 captions"):
        scores("suspect", torch.zeros(200, 3, 1, 1), ["a"] * 3)


def test_pair_features_are_those_of_the_model_in_any_batches(stand_in, fp32):
    model = models.frozen(models.load(stand_in / "base.safetensors"))
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    captions = ["a cat", "a dog", "a house", "a train", "the moon"]
    whole = suspicion.pair_features(model, images, captions)
    parts = suspicion.pair_features(model, images, captions, batch_size=2)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts, strict=True))
    assert torch.allclose(whole[0], models.encode_image(model, images).cpu(), atol=1e-5)
