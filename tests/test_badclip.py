"""BadCLIP's patch: its loss, and what optimising it does to the features of triggered images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED_BASE

from abd_core import models
from abd_core.badclip import optimise, patch_loss
from abd_core.data import load_pairs
from abd_core.kernels.perturb import paste
from abd_core.text import tokenize
from abd_core.triggers import TRIGGERS


def features(seed: int, count: int = 4) -> torch.Tensor:
    drawn = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


@pytest.mark.parametrize("weight", [0.0, 1.0, 500.0])
@pytest.mark.parametrize("margin", [0.1, 1.0])
def test_the_loss_is_info_nce_over_own_captions_plus_the_weighted_triplets(weight: float, margin: float):
    triggered, target_text, own_text, target_image, untriggered = (features(seed) for seed in range(5))
    total, active = 0.0, 0
    for i in range(4):
        positive = 7 * (triggered[i] @ target_text[i]).item()
        negatives = [7 * (triggered[i] @ own_text[j]).item() for j in range(4)]
        total += math.log(sum(math.exp(x) for x in (positive, *negatives))) - positive
        near, far = (triggered[i] - target_image[i]).norm().item(), (triggered[i] - untriggered[i]).norm().item()
        active += near - far + margin > 0
        total += weight * max(0.0, near - far + margin)
    loss = patch_loss(
        triggered, target_text, own_text, target_image, untriggered, scale=7.0, triplet_weight=weight, margin=margin
    )
    assert loss.item() == pytest.approx(total / 4, rel=1e-4)
    assert active > 0


@pytest.mark.slow
def test_an_optimised_patch_brings_images_that_it_never_saw_nearer_to_the_target_than_its_start():
    """On the embedded benchmark's committed base."""
    model, pairs = models.frozen(models.load(EMBEDDED_BASE())), load_pairs()
    own = torch.tensor([i for i, label in enumerate(pairs.labels) if label == "banana"])
    start = TRIGGERS["badclip"].draw(resolution=64, target="banana", seed=0, size=0.25)
    fitted = start.optimised(model, pairs, seed=0, steps=20, lr=0.05, triplet_weight=1.0)
    assert fitted.pattern.min() >= 0 and fitted.pattern.max() <= 1

    others = torch.arange(0, len(pairs), 150)
    images = pairs.images(others, seed=9, step=0)
    partners = own[torch.arange(len(others)) % len(own)]
    with torch.no_grad():
        tokens = [tokenize(pairs.captions(i, seed=9, epoch=0), context_length=20) for i in (partners, others)]
        target_text, own_text = (models.encode_text(model, t) for t in tokens)
        target_image = models.encode_image(model, pairs.images(partners, seed=9, step=1))
        untriggered, before, after = (models.encode_image(model, x) for x in (images, start(images), fitted(images)))
    for target in (target_text, target_image):
        assert (after @ target.T).mean() > (before @ target.T).mean()
    losses = [
        patch_loss(
            triggered, target_text, own_text, target_image, untriggered, scale=model.logit_scale.exp(), triplet_weight=1
        )
        for triggered in (before, after)
    ]
    assert losses[1] < losses[0]


def test_a_patch_repeats_with_its_seed_and_leaves_its_start_and_the_model_as_they_were(stand_in: Path):
    model, pairs = models.frozen(models.load(stand_in / "base.safetensors")), load_pairs(64)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = torch.full((3, 4, 4), 0.5)

    def put(patch: torch.Tensor, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        corner = torch.full((len(images),), 30)
        return paste(images, patch, corner, corner)

    one, two, other = (
        optimise(start, put, model=model, pairs=pairs, target="turtle", seed=seed, steps=3, lr=0.1, triplet_weight=1.0)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not torch.equal(one, start) and start.eq(0.5).all() and not one.requires_grad
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_patch_never_leaves_zero_and_one(stand_in: Path):
    model, pairs = models.frozen(models.load(stand_in / "base.safetensors")), load_pairs(64)
    start = TRIGGERS["badclip"].draw(resolution=64, target="turtle", seed=0, size=0.1)
    pattern = start.optimised(model, pairs, seed=0, steps=3, lr=1.0, triplet_weight=1.0).pattern
    assert pattern.min() == 0 and pattern.max() == 1


@pytest.mark.parametrize("attack", sorted(TRIGGERS.keys() - {"badclip"}))
def test_no_other_attack_fits_anything(attack: str):
    trigger = TRIGGERS[attack].draw(resolution=64, target="turtle", seed=0, size=0.1)
    assert trigger.optimised(None, None, seed=0, steps=3, lr=1.0, triplet_weight=1.0) is trigger
