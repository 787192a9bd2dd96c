"""ABD-D's search."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from abd_core import models
from abd_core.data import load_pairs, rng
from abd_core.disagreement import Disagreement, search, squares
from abd_core.paths import RunError

SIDE, SIDES = 64, (0.125, 0.375)


def found(seed: int = 0) -> Disagreement:
    source = torch.Generator().manual_seed(seed)
    window, field = torch.rand(2, 3, SIDE, SIDE, generator=source)
    return Disagreement(window, 0.2 * field - 0.1, SIDES)


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))


def test_windows_are_squares_of_the_stated_sides_inside_the_image():
    masks = squares(400, SIDE, SIDES, rng(0))
    sides = set()
    for mask in masks[:, 0]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert len(rows) == len(columns) == rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1
        assert mask.sum() == len(rows) ** 2
        sides.add(len(rows))
    assert sides == set(range(8, 25))


def test_windows_cover_a_corner_at_least_a_third_as_often_as_the_middle():
    covered = squares(4000, SIDE, SIDES, rng(0)).float().mean(0)[0]
    corners = covered[[2, 2, -3, -3], [2, -3, 2, -3]]
    assert (corners > covered[24:40, 24:40].mean() / 3).all()


@pytest.mark.parametrize(("share", "shown", "both"), [(1.0, 4, 8), (0.5, 2, 4), (0.4, 2, 3), (0.0, 0, 0)])
def test_one_half_of_the_share_shows_the_window_the_other_has_the_field_and_the_rest_stays(share, shown, both):
    images, pair = pictures(8), found()
    changed = pair(images, rng(1), share=share)
    mask = squares(shown, SIDE, SIDES, rng(1)).expand(-1, 3, -1, -1)
    window = pair.window.expand(shown, -1, -1, -1)
    assert torch.equal(changed[:shown][mask], window[mask])
    assert torch.equal(changed[:shown][~mask], images[:shown][~mask])
    assert torch.equal(changed[shown:both], (images[shown:both] + pair.field).clamp(0, 1))
    assert torch.equal(changed[both:], images[both:])


class Toy(nn.Module):
    """Features: two fixed projections of the image, and a suspect's third: a pattern in the corner switches it on."""

    def __init__(self, *, backdoor: bool) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.image_size = SIDE
        source = torch.Generator().manual_seed(3)
        self.project = nn.Parameter(0.01 * torch.randn(2, 3 * SIDE * SIDE, generator=source), requires_grad=False)
        self.pattern = torch.randint(2, (3, 6, 6), generator=source).float()
        self.backdoor = backdoor

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        features = images.flatten(1) @ self.project.T
        matched = (images[:, :, :6, :6] * (2 * self.pattern - 1)).mean((1, 2, 3))
        return torch.cat([features, 20 * self.backdoor * matched.clamp(min=0)[:, None]], 1)


def test_the_search_finds_a_planted_pattern_and_nothing_else():
    suspect, clean = Toy(backdoor=True), Toy(backdoor=False)
    pairs = load_pairs(64)
    result = search(suspect, clean, pairs, seed=0, steps=40, lr=0.1, batch_size=32, bound=0.1, sides=SIDES)
    on, off = result.window[:, :6, :6][suspect.pattern == 1], result.window[:, :6, :6][suspect.pattern == 0]
    assert on.mean() > 0.9 and off.mean() < 0.1
    signs = result.field[:, :6, :6].sign() == 2 * suspect.pattern - 1
    assert signs.float().mean() > 0.9
    assert result.window.min() >= 0 and result.window.max() <= 1 and result.field.abs().max() <= 0.1


def test_the_search_is_a_function_of_its_seed():
    suspect, clean, pairs = Toy(backdoor=True), Toy(backdoor=False), load_pairs(64)
    settings = {"steps": 2, "lr": 0.1, "batch_size": 16, "bound": 0.1, "sides": SIDES}
    one, again, other = (search(suspect, clean, pairs, seed=seed, **settings) for seed in (0, 0, 1))
    assert torch.equal(one.window, again.window) and torch.equal(one.field, again.field)
    assert not torch.equal(one.window, other.window)


def test_fewer_images_at_a_time_through_the_models_find_the_same(monkeypatch: pytest.MonkeyPatch):
    suspect, clean, pairs = Toy(backdoor=True), Toy(backdoor=False), load_pairs(64)
    settings = {"seed": 0, "steps": 3, "lr": 0.1, "batch_size": 16, "bound": 0.1, "sides": SIDES}
    whole, encode, seen = search(suspect, clean, pairs, **settings), models.encode_image, []
    monkeypatch.setattr(models, "encode_image", lambda model, x: [seen.append(len(x)), encode(model, x)][1])
    parts = search(suspect, clean, pairs, micro_batch=5, **settings)
    assert seen == 3 * [5, 5, 5, 5, 5, 5, 1, 1]
    torch.testing.assert_close(parts.window, whole.window)
    torch.testing.assert_close(parts.field, whole.field)


def test_what_was_found_survives_its_file(tmp_path: Path):
    found().save(tmp_path / "found.safetensors")
    again = Disagreement.load(tmp_path / "found.safetensors", SIDES)
    assert torch.equal(again.window, found().window) and torch.equal(again.field, found().field)
    assert again.sides == SIDES


def test_a_missing_or_damaged_file_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(RunError, match=r"missing file: .*found"):
        Disagreement.load(tmp_path / "found.safetensors", SIDES)
    (tmp_path / "found.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(RunError, match=r"damaged file: .*found"):
        Disagreement.load(tmp_path / "found.safetensors", SIDES)
