"""Patterns on images: pasted, added, blended; and images warped."""

from __future__ import annotations

import pytest
import torch

from abd_core.kernels.perturb import add, blend, paste, warp

H, W = 9, 11


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES, PATCH = draw(4, 3, H, W), draw(3, 2, 5, seed=1)
TOP, LEFT = torch.tensor([0, 7, 3, 3]), torch.tensor([0, 6, 2, 2])  # both corners, and two at one place


def pasted(images: torch.Tensor, patch: torch.Tensor, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """By slices, image by image."""
    result = images.clone()
    _, h, w = patch.shape
    for i, (y, x) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
        result[i, :, y : y + h, x : x + w] = patch
    return result


def test_a_patch_goes_to_each_image_s_own_place_and_changes_nothing_else():
    before = IMAGES.clone()
    assert torch.equal(paste(IMAGES, PATCH, TOP, LEFT), pasted(IMAGES, PATCH, TOP, LEFT))
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("shape", [(1, 1), (H, W), (1, W)])
def test_any_patch_that_fits_is_pasted(shape: tuple[int, int]):
    patch, corner = draw(3, *shape, seed=2), torch.zeros(4, dtype=torch.long)
    assert torch.equal(paste(IMAGES, patch, corner, corner), pasted(IMAGES, patch, corner, corner))


def test_the_gradient_of_a_patch_is_the_sum_of_the_images_gradients_at_its_places():
    images, patch = IMAGES.clone().requires_grad_(), PATCH.clone().requires_grad_()
    output = draw(4, 3, H, W, seed=3)
    (paste(images, patch, TOP, LEFT) * output).sum().backward()
    windows = [output[i, :, y : y + 2, x : x + 5] for i, (y, x) in enumerate(zip(TOP, LEFT, strict=True))]
    torch.testing.assert_close(patch.grad, torch.stack(windows).sum(0))
    hidden = pasted(torch.ones_like(IMAGES), torch.zeros_like(PATCH), TOP, LEFT)
    torch.testing.assert_close(images.grad, output * hidden)


@pytest.mark.parametrize(("top", "left"), [(-1, 0), (0, -1), (H - 1, 0), (0, W - 4)])
def test_a_patch_that_leaves_its_image_is_refused(top: int, left: int):
    tops, lefts = torch.tensor([0, 0, top, 0]), torch.tensor([0, 0, left, 0])
    with pytest.raises(ValueError, match="a 2x5 patch leaves its 9x11 image"):
        paste(IMAGES, PATCH, tops, lefts)


def test_a_patch_larger_than_the_image_is_refused():
    zero = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="a 10x3 patch"):
        paste(IMAGES, draw(3, H + 1, 3), zero, zero)


def test_a_patch_of_another_precision_takes_the_images():
    images = IMAGES.float()
    assert paste(images, PATCH, TOP, LEFT).dtype == torch.float32


def test_addition_is_clamped_to_zero_and_one():
    delta = 4 * draw(3, H, W, seed=4) - 2
    expected = torch.tensor([min(1, max(0, x)) for x in (IMAGES + delta).flatten().tolist()], dtype=torch.float64)
    assert torch.equal(add(IMAGES, delta).flatten(), expected)


def test_the_gradient_of_an_addition_passes_where_nothing_is_clamped():
    delta = (4 * draw(3, H, W, seed=4) - 2).requires_grad_()
    output = draw(4, 3, H, W, seed=5)
    (add(IMAGES, delta) * output).sum().backward()
    inside = ((IMAGES + delta > 0) & (IMAGES + delta < 1)).double()
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(delta.grad, (output * inside.detach()).sum(0))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_a_blend_is_the_convex_combination(alpha: float):
    pattern = draw(3, H, W, seed=6)
    torch.testing.assert_close(blend(IMAGES, pattern, alpha), (1 - alpha) * IMAGES + alpha * pattern)


def test_the_gradient_of_a_blend_is_shared_out_by_its_weight():
    images, pattern = IMAGES.clone().requires_grad_(), draw(3, H, W, seed=6).requires_grad_()
    blend(images, pattern, 0.2).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(IMAGES, 0.8))
    torch.testing.assert_close(pattern.grad, torch.full_like(pattern, 4 * 0.2))


def test_a_warp_by_whole_pixels_moves_the_image_and_repeats_its_border():
    flow = torch.stack([torch.full((H, W), 2.0), torch.full((H, W), -3.0)]).double()
    rows = [max(y - 3, 0) for y in range(H)]
    columns = [min(x + 2, W - 1) for x in range(W)]
    torch.testing.assert_close(warp(IMAGES, flow), IMAGES[:, :, rows][:, :, :, columns])


def test_a_warp_by_half_a_pixel_is_the_mean_of_two():
    flow = torch.stack([torch.full((H, W), 0.5), torch.zeros(H, W)]).double()
    expected = (IMAGES[..., :-1] + IMAGES[..., 1:]) / 2
    torch.testing.assert_close(warp(IMAGES, flow)[..., :-1], expected)


def test_the_gradient_of_a_warp_is_right_in_the_images_and_in_the_flow():
    images = draw(1, 1, 4, 5).requires_grad_()
    flow = (0.2 + 0.2 * draw(2, 4, 5, seed=7)).requires_grad_()  # off the whole pixels, where it has kinks
    assert torch.autograd.gradcheck(warp, (images, flow))


def test_an_image_of_one_pixel_stays_what_it_is():
    assert torch.equal(warp(draw(2, 3, 1, 1), torch.ones(2, 1, 1)), draw(2, 3, 1, 1))
