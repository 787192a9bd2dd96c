"""AdvCLIP's networks at any size, and the universal perturbation that they end in."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from conftest import Bomb
from safetensors.torch import save_file

from abd_core.generator import Discriminator, Generator, Perturbation, patch_side
from abd_core.paths import RunError

SIDES = pytest.mark.parametrize("side", [1, 7, 11, 38, 64, 224])
WIDTH = 16


# --- generator ----------------------------------------------------------------------------------------------


@SIDES
def test_the_generator_gives_one_image_of_any_side_with_values_between_minus_one_and_one(side: int):
    image = Generator(side, width=WIDTH)()
    assert image.shape == (3, side, side)
    assert image.abs().max() <= 1
    assert side == 1 or image.std() > 0


@SIDES
def test_the_gradient_reaches_every_parameter(side: int):
    generator = Generator(side, width=WIDTH)
    weights = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0))
    (generator() * weights).sum().backward()
    assert [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@SIDES
def test_every_pixel_depends_on_the_latent(side: int):
    """No gaps, which a transposed convolution with a stride above its kernel would leave."""
    generator = Generator(side, width=WIDTH)
    with torch.no_grad():
        before = generator()
        generator.z.copy_(torch.randn(generator.z.shape, generator=torch.Generator().manual_seed(1)))
        after = generator()
    assert (before != after).any(0).all()


def test_a_generator_repeats_with_its_seed_and_leaves_the_global_stream_alone():
    torch.manual_seed(1)
    first = Generator(11, width=WIDTH, seed=3)()
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(first, Generator(11, width=WIDTH, seed=3)())
    assert not torch.equal(first, Generator(11, width=WIDTH, seed=4)())


def test_the_latent_is_fixed_and_not_trained():
    generator = Generator(11, width=WIDTH)
    assert generator.z.shape == (16, 100, 1, 1)
    assert "z" in generator.state_dict() and "z" not in dict(generator.named_parameters())


# --- discriminator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (224, 224), (40, 64)])
def test_the_discriminator_gives_a_logit_an_image(size: tuple[int, int]):
    net = Discriminator(width=WIDTH)
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = net(images)
    assert logits.shape == (3,)
    logits.sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert [name for name, p in net.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_an_image_s_logit_does_not_depend_on_the_rest_of_the_batch():
    net, images = Discriminator(width=WIDTH), torch.rand(4, 3, 64, 64)
    torch.testing.assert_close(net(images)[1:2], net(images[1:2]), rtol=1e-4, atol=1e-5)


def test_a_discriminator_repeats_with_its_seed():
    images = torch.rand(2, 3, 32, 32)
    logits = [Discriminator(width=WIDTH, seed=seed)(images) for seed in (3, 3, 4)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


# --- perturbation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("area", "resolution", "side"),
    [(0.03, 224, 38), (0.03, 64, 11), (1.0, 64, 64), (0.25, 64, 32), (1e-9, 64, 1), (0.03, 1, 1), (0.1, 64, 20)],
)
def test_a_patch_has_the_largest_whole_side_within_its_share_of_the_area(area: float, resolution: int, side: int):
    assert patch_side(area, resolution) == side
    assert side == 1 or side**2 <= area * resolution**2 < (side + 1) ** 2


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


ADDITIVE = Perturbation("additive", 0.03 * (2 * picture(3, 64, 64, seed=1) - 1), 64)
FIXED = Perturbation("patch", picture(3, 11, 11, seed=1), 64, "fixed", (49, 3))
RANDOM = Perturbation("patch", picture(3, 11, 11, seed=1), 64, "random")
KINDS = pytest.mark.parametrize("perturbation", [ADDITIVE, FIXED, RANDOM], ids=["additive", "fixed", "random"])


@KINDS
def test_perturbed_images_stay_within_zero_and_one_and_the_input_as_it_was(perturbation: Perturbation):
    for images in (picture(4, 3, 64, 64), torch.zeros(2, 3, 64, 64), torch.ones(2, 3, 64, 64)):
        before = images.clone()
        perturbed = perturbation(images)
        assert perturbed.shape == images.shape
        assert perturbed.min() >= 0 and perturbed.max() <= 1
        assert torch.equal(images, before) and not torch.equal(perturbed, images)


def test_an_additive_perturbation_is_clamped_addition_within_its_bound():
    images = picture(4, 3, 64, 64)
    perturbed = ADDITIVE(images)
    assert torch.equal(
        perturbed, torch.minimum(torch.maximum(images + ADDITIVE.delta, torch.zeros(())), torch.ones(()))
    )
    assert (perturbed - images).abs().max() <= 0.03 + 1e-6


def test_a_fixed_patch_lies_at_its_corner_in_every_image():
    images = picture(4, 3, 64, 64)
    expected = images.clone()
    expected[:, :, 49:60, 3:14] = FIXED.delta
    assert torch.equal(FIXED(images), expected)


def corners(perturbation: Perturbation, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Where the patch lies in each of `count` images: int64 (count, 2)."""
    pasted = perturbation(torch.zeros(count, 3, 64, 64), generator)[:, 0] > 0
    assert (pasted.sum((1, 2)) == 121).all()
    return torch.stack([pasted.any(2).int().argmax(1), pasted.any(1).int().argmax(1)], 1)


def test_random_places_are_inside_and_uniform_for_each_image_on_its_own():
    generator = torch.Generator().manual_seed(0)
    places = torch.cat([corners(RANDOM, 540, generator) for _ in range(10)])
    assert places.amin(0).tolist() == [0, 0] and places.amax(0).tolist() == [53, 53]
    for axis in (0, 1):
        counts = torch.bincount(places[:, axis], minlength=54)
        assert ((counts - 100).square() / 100).sum() < 110  # chi-squared with 53 degrees of freedom: p < 1e-5
    assert abs(torch.corrcoef(places.T.double())[0, 1].item()) < 0.07  # 5 standard deviations


def test_random_places_repeat_with_their_generator():
    assert torch.equal(corners(RANDOM, 30), corners(RANDOM, 30))
    draws = [corners(RANDOM, 30, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@KINDS
def test_the_gradient_reaches_the_perturbation(perturbation: Perturbation):
    delta = perturbation.delta.clone().requires_grad_()
    moved = Perturbation(perturbation.mode, delta, 64, perturbation.placement, perturbation.corner)
    moved(0.5 * picture(4, 3, 64, 64) + 0.25).sum().backward()
    torch.testing.assert_close(delta.grad, torch.full_like(delta, 4.0))


@KINDS
@pytest.mark.parametrize("shape", [(2, 3, 63, 64), (2, 3, 224, 224), (2, 1, 64, 64)])
def test_images_of_another_resolution_are_refused(perturbation: Perturbation, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="perturbation is for 3x64x64 images, got"):
        perturbation(torch.zeros(shape))


@KINDS
def test_a_stored_perturbation_is_the_same_to_the_bit(perturbation: Perturbation, tmp_path: Path):
    perturbation.save(tmp_path / "p.safetensors")
    stored = Perturbation.load(tmp_path / "p.safetensors")
    assert torch.equal(stored.delta, perturbation.delta)
    names = ("mode", "resolution", "placement", "corner")
    assert [getattr(stored, name) for name in names] == [getattr(perturbation, name) for name in names]
    assert torch.equal(stored(picture(4, 3, 64, 64)), perturbation(picture(4, 3, 64, 64)))


RECORD = {"mode": "patch", "resolution": 64, "placement": "fixed", "corner": [1, 2]}


@pytest.mark.parametrize(
    ("tensor", "metadata"),
    [
        ("delta", None),
        ("delta", {"record": "{"}),
        ("delta", {"record": "[1]"}),
        *(("delta", {"record": json.dumps({k: v for k, v in RECORD.items() if k != gone})}) for gone in RECORD),
        *(("delta", {"record": json.dumps({**RECORD, "corner": at})}) for at in (1, [0], [-1, 0], [0, 60], [0.5, 0])),
        ("delta", {"record": json.dumps({**RECORD, "mode": "additive"})}),
        ("pattern", {"record": json.dumps(RECORD)}),
    ],
)
def test_a_record_that_lacks_something_is_refused(tensor: str, metadata: dict | None, tmp_path: Path):
    save_file({tensor: torch.zeros(3, 5, 5)}, tmp_path / "p.safetensors", metadata=metadata)
    with pytest.raises(RunError, match=r"damaged file: .*p\.safetensors: no perturbation record") as error:
        Perturbation.load(tmp_path / "p.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint8, torch.uint16])
def test_pixels_of_another_kind_than_floats_that_can_be_computed_with_are_refused(dtype: torch.dtype, tmp_path: Path):
    pixels = {"delta": torch.zeros(3, 5, 5).to(dtype)}
    save_file(pixels, tmp_path / "p.safetensors", metadata={"record": json.dumps(RECORD)})
    with pytest.raises(RunError, match=f"no perturbation record .*{dtype}"):
        Perturbation.load(tmp_path / "p.safetensors")


def test_a_resolution_that_is_no_number_is_refused(tmp_path: Path):
    record = {**RECORD, "resolution": True, "corner": [0, 0]}
    save_file({"delta": torch.zeros(3, 1, 1)}, tmp_path / "p.safetensors", metadata={"record": json.dumps(record)})
    with pytest.raises(RunError, match=r"no perturbation record .*images of True px"):
        Perturbation.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize("shape", [(), (4, 3, 5, 5)])
def test_the_perturbation_on_the_way_or_a_number_is_not_taken_for_one(shape: tuple[int, ...], tmp_path: Path):
    save_file({"delta": torch.zeros(shape)}, tmp_path / "p.safetensors", metadata={"record": json.dumps(RECORD)})
    with pytest.raises(RunError, match=r"no perturbation record .*\(3, height, width\) expected"):
        Perturbation.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b[::-1]])
def test_a_damaged_file_is_refused(damage, tmp_path: Path):
    RANDOM.save(tmp_path / "p.safetensors")
    (tmp_path / "p.safetensors").write_bytes(damage((tmp_path / "p.safetensors").read_bytes()))
    with pytest.raises(RunError, match="damaged file"):
        Perturbation.load(tmp_path / "p.safetensors")


def test_a_pickle_in_a_perturbation_s_place_is_not_executed(tmp_path: Path):
    (tmp_path / "p.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(RunError, match="damaged file"):
        Perturbation.load(tmp_path / "p.safetensors")
    assert not (tmp_path / "marker").exists()


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(RunError, match=r"missing file: .*none\.safetensors"):
        Perturbation.load(tmp_path / "none.safetensors")


def test_a_generated_patch_covers_the_share_of_the_area_that_it_is_meant_to():
    side = patch_side(0.03, 64)
    image = (Generator(side, width=WIDTH)() + 1) / 2
    perturbed = Perturbation("patch", image.detach(), 64, "random")(torch.zeros(8, 3, 64, 64))
    assert math.isclose((perturbed[:, 0] > 0).double().mean().item(), 0.0295, abs_tol=1e-4)
