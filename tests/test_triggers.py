"""Backdoor triggers: what they change, and that their record is all that is needed to apply them again."""

from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from abd_core.config import ConfigError
from abd_core.detectors import windows
from abd_core.paths import RunError
from abd_core.triggers import POSITIONS, TRIGGERS, Blended, Trigger, corner, load_trigger, watermark

SIDE = 32
ALL = {(y, x) for y in range(SIDE) for x in range(SIDE)}
PATCH = {(y, x) for y in range(23, 31) for x in range(23, 31)}
# Attack -> which pixels of a 32 px image it may change, with size 0.25 at the lower right or weight 0.2.
TOUCHED = {
    "badnet": PATCH,
    "blended": ALL,
    "badclip": PATCH,
    "badnet-stripes": PATCH,
    "blended-stripes": ALL,
    "blended-triangles": ALL,
    "blended-text": {(y, x) for y, x in watermark(SIDE, torch.Generator())[0].nonzero().tolist()},
    "wanet": ALL,
    "sig": {(y, x) for y, x in ALL if 6 * x % (SIDE / 2)},  # all but the sine's zeros
    "label-consistent": PATCH,
    "badnet-frame": {(y, x) for y, x in ALL if {y, x} & {0, SIDE - 1}},
    "badnet-scattered": {(y, x) for y in (5, 16, 26) for x in (5, 16, 26)},
}
CORNERS = {(y, x) for y in (0, SIDE - 1) for x in (0, SIDE - 1)}  # where a warp may look beyond the image
SPARED = {"wanet": CORNERS}
PATCHES = [attack for attack in TRIGGERS if TOUCHED[attack] == PATCH]
NOISE = ["badnet", "blended", "badclip", "label-consistent"]
SEEDED = [
    *NOISE,
    "badnet-stripes",
    "blended-stripes",
    "wanet",
    "badnet-frame",
    "badnet-scattered",
]  # the others have one pattern only
ATTACKS = pytest.mark.parametrize("attack", TRIGGERS)


def drawn(attack: str, **changes) -> Trigger:
    settings = {
        "resolution": SIDE,
        "target": "banana",
        "seed": 0,
        "size": 0.25,
        "position": "bottom-right",
        "alpha": 0.2,
        "points": 4,
        "strength": 0.5,
        "amplitude": 60 / 255,
        **changes,
    }
    return TRIGGERS[attack].draw(**settings)


def pictures(count: int = 5, side: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_table_covers_every_attack():
    assert TOUCHED.keys() == TRIGGERS.keys()


@ATTACKS
def test_a_triggered_image_stays_within_zero_and_one_and_changes_only_where_it_may(attack: str):
    changed = set()
    for images in (pictures(), torch.zeros(2, 3, SIDE, SIDE), torch.ones(2, 3, SIDE, SIDE)):
        triggered = drawn(attack)(images)
        assert triggered.shape == images.shape
        assert triggered.min() >= 0 and triggered.max() <= 1
        changed |= {(y, x) for y, x in (triggered != images).any(1).any(0).nonzero().tolist()}
    assert TOUCHED[attack] - SPARED.get(attack, set()) <= changed <= TOUCHED[attack]


@ATTACKS
def test_the_input_is_left_as_it_was(attack: str):
    images = pictures()
    drawn(attack)(images)
    assert torch.equal(images, pictures())


@ATTACKS
def test_a_trigger_repeats_with_its_seed_and_not_with_another(attack: str):
    torch.manual_seed(1)
    first = drawn(attack, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first(pictures()), drawn(attack, seed=3)(pictures()))
    assert torch.equal(first.pattern, drawn(attack, seed=4).pattern) is (attack not in SEEDED)


@ATTACKS
def test_a_trigger_is_differentiable_in_the_images_wherever_they_show(attack: str):
    images = (0.3 + 0.4 * pictures()).requires_grad_()  # so that nothing is clamped
    drawn(attack)(images).sum().backward()
    hidden = images.grad.abs().sum((0, 1)) == 0
    covered = {(y, x) for y, x in hidden.nonzero().tolist()}
    assert covered == (PATCH if attack in PATCHES else set())


@pytest.mark.parametrize("attack", ["badnet", "badclip", "blended", "sig"])
def test_the_gradient_reaches_the_pattern(attack: str):
    trigger = drawn(attack)
    pattern = trigger.pattern.clone().requires_grad_()
    images = 0.3 + 0.4 * pictures()
    replace(trigger, pattern=pattern)(images).sum().backward()
    weight = {"blended": 0.2, "sig": 2 * 60 / 255}.get(attack, 1.0)
    torch.testing.assert_close(pattern.grad, torch.full_like(pattern, 5 * weight))


@pytest.mark.parametrize("attack", NOISE)
def test_a_pattern_of_noise_is_uniform(attack: str):
    pattern = drawn(attack, size=1.0).pattern
    assert pattern.shape == (3, SIDE, SIDE)
    assert len(pattern.unique()) > 0.99 * pattern.numel()
    shares = torch.histc(pattern, 4, 0, 1) / pattern.numel()
    assert (shares - 0.25).abs().max() < 0.05  # 6 standard deviations


@pytest.mark.parametrize("attack", PATCHES)
def test_a_patch_is_the_same_in_every_image(attack: str):
    trigger = drawn(attack)
    windows = trigger(pictures())[:, :, 23:31, 23:31]
    assert all(torch.equal(window, trigger.pattern) for window in windows)


@pytest.mark.parametrize(
    ("attack", "position"),
    [("badnet", "top-left"), ("badnet-stripes", "top-left"), ("label-consistent", "top-left"), ("badclip", "centre")],
)
def test_an_attack_s_own_position_is_the_published_one_or_the_top_left(attack: str, position: str):
    assert drawn(attack, position="own").specification["position"] == position


@pytest.mark.parametrize(
    ("attack", "alpha"),
    [("blended", 0.2), ("blended-stripes", 0.06), ("blended-triangles", 0.15), ("blended-text", 0.5)],
)
def test_a_weight_of_zero_stands_for_the_attack_s_own(attack: str, alpha: float):
    assert drawn(attack, alpha=0.0).specification["alpha"] == alpha
    assert drawn(attack, alpha=0.3).specification["alpha"] == 0.3


@pytest.mark.parametrize("attack", ["badnet-stripes", "blended-stripes"])
def test_stripes_are_one_pixel_wide_and_of_pure_colours(attack: str):
    pattern = drawn(attack, size=1.0).pattern
    assert torch.equal(pattern, pattern[:, :1].expand_as(pattern))
    colours = pattern[:, 0].T.tolist()
    assert {tuple(c) for c in colours} <= set(itertools.product((0.0, 1.0), repeat=3))
    assert len({tuple(c) for c in colours}) > 4
    changes = sum(a != b for a, b in itertools.pairwise(colours))
    assert changes > SIDE / 2


@pytest.mark.parametrize("side", [32, 64, 224])
def test_triangles_fill_sixteen_by_sixteen_cells_in_two_greys(side: int):
    pattern, cell = drawn("blended-triangles", resolution=side).pattern, side // 16
    for y, x in itertools.product(range(side), repeat=2):
        expected = 0.4 if y % cell >= x % cell else 0.8
        assert pattern[0, y, x] == pytest.approx(expected)
    assert torch.equal(pattern, pattern[:1].expand_as(pattern))


@pytest.mark.parametrize("side", [32, 64, 224])
def test_a_watermark_is_red_writing_across_the_middle(side: int):
    pattern = drawn("blended-text", resolution=side).pattern
    assert pattern[1:].max() == 0 and pattern[0].max() > 0.5
    rows, columns = (pattern[0] > 0).any(1).nonzero()[:, 0], (pattern[0] > 0).any(0).nonzero()[:, 0]
    assert 0.8 * side < columns[-1] - columns[0] < 0.95 * side
    assert abs(rows.double().mean() - side / 2) < 0.06 * side and len(rows) < 0.3 * side
    assert 0.02 < (pattern[0] > 0).double().mean() < 0.2


def test_a_watermark_is_blended_where_its_letters_are_and_nowhere_else():
    trigger, images = drawn("blended-text", alpha=0.5), pictures()
    letters = trigger.pattern > 0
    expected = torch.where(letters, (images + trigger.pattern) / 2, images)
    torch.testing.assert_close(trigger(images), expected)
    assert torch.equal(trigger(images)[:, 1:], images[:, 1:])


@pytest.mark.parametrize("hiding", [0.25, 0.5, 1.0])
def test_label_consistent_blends_the_replaced_image_over_the_target_s_and_then_puts_the_patch_on(hiding: float):
    trigger = drawn("label-consistent", hiding=hiding)
    images, replaced = pictures(), pictures().flip(0)
    expected = trigger((1 - hiding) * images + hiding * replaced)
    torch.testing.assert_close(trigger.poisoned(images, replaced, torch.Generator()), expected)


@pytest.mark.parametrize("attack", [name for name in TRIGGERS if name != "label-consistent"])
def test_poisoned_images_of_the_other_attacks_are_triggered_and_nothing_else(attack: str):
    trigger = drawn(attack)
    made = trigger.poisoned(pictures(), pictures().flip(0), torch.Generator())
    assert torch.equal(made, trigger(pictures()))


@pytest.mark.parametrize("side", [64, 224])
def test_no_window_of_the_audit_reaches_the_frame_and_none_holds_two_of_the_scattered_pieces(side: int):
    frame, pieces = (TRIGGERS[name].mask(side) for name in ("badnet-frame", "badnet-scattered"))
    piece = round(8 / 224 * side)
    assert frame.sum() == 4 * (side - 1) and pieces.sum() == 9 * piece**2
    for window in windows(side, (16 / 224, 38 / 224)):
        assert not (window[0].bool() & frame).any()
        assert (window[0].bool() & pieces).sum() <= piece**2


@pytest.mark.parametrize("side", [32, 64, 224])
def test_sig_is_its_formula(side: int):
    images = pictures(2, side)
    columns = np.arange(side)
    wave = 60 / 255 * np.sin(2 * np.pi * columns * 6 / side)
    expected = np.clip(images.double().numpy() + wave, 0, 1)
    assert np.abs(drawn("sig", resolution=side)(images).double().numpy() - expected).max() < 1e-6


def warped(images: np.ndarray, control: np.ndarray, strength: float) -> np.ndarray:
    """WaNet by loops: the paper's equations for a square image, cubic convolution with a = -0.75, bilinear look-up."""
    side, k = images.shape[-1], control.shape[-1]

    def cubic(t: float) -> float:
        a, t = -0.75, abs(t)
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        return near if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    def upsampled(values: np.ndarray, y: float, x: float) -> float:
        total = 0.0
        for i, j in itertools.product(range(int(y) - 1, int(y) + 3), range(int(x) - 1, int(x) + 3)):
            value = values[min(max(i, 0), k - 1), min(max(j, 0), k - 1)]
            total += cubic(y - i) * cubic(x - j) * value
        return total

    noise = 2 * control - 1
    noise = noise / np.abs(noise).mean()
    result = np.empty_like(images)
    for y, x in itertools.product(range(side), repeat=2):
        at = (y * (k - 1) / (side - 1), x * (k - 1) / (side - 1))
        # The paper's grid runs from -1 to 1, and s is divided by the 32 px of its images.
        row, column = (
            np.clip(2 * p / (side - 1) - 1 + strength / side * upsampled(n, *at), -1, 1)
            for p, n in ((y, noise[1]), (x, noise[0]))
        )
        row, column = (row + 1) / 2 * (side - 1), (column + 1) / 2 * (side - 1)
        top, left = min(int(row), side - 2), min(int(column), side - 2)
        v, u = row - top, column - left
        window = images[..., top : top + 2, left : left + 2]
        result[..., y, x] = np.einsum("bcij,i,j->bc", window, [1 - v, v], [1 - u, u])
    return result


@pytest.mark.parametrize(("side", "strength"), [(32, 0.5), (32, 4.0), (64, 0.5)])
def test_wanet_is_the_warp_of_its_paper(side: int, strength: float):
    trigger, images = drawn("wanet", resolution=side, strength=strength), pictures(2, side)
    assert trigger.pattern.shape == (2, 4, 4)
    expected = warped(images.double().numpy(), trigger.pattern.double().numpy(), strength)
    assert np.abs(trigger(images).double().numpy() - expected).max() < 1e-4
    assert np.abs(images.numpy() - expected).max() > 0.05


@pytest.mark.parametrize("side", [32, 64, 224])
def test_half_of_wanet_s_strength_is_its_mean_displacement_in_pixels_with_one_point_a_pixel(side: int):
    trigger = drawn("wanet", resolution=side, points=0, strength=1.0)
    assert trigger.pattern.shape == (2, side, side)
    assert trigger.flow.abs().mean().item() == pytest.approx(0.5 * (side - 1) / side, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_blended_is_the_convex_combination_with_its_noise(alpha: float):
    trigger, images = drawn("blended", alpha=alpha), pictures()
    expected = (1 - alpha) * images.double() + alpha * trigger.pattern.double()
    torch.testing.assert_close(trigger(images).double(), expected, atol=1e-6, rtol=0)


def test_random_places_differ_between_images_and_repeat_with_their_generator():
    trigger, images = drawn("badnet", position="random"), torch.zeros(64, 3, SIDE, SIDE)

    def places(generator: torch.Generator | None) -> list[tuple[int, int]]:
        triggered = trigger(images, generator)[:, 0] > 0
        assert (triggered.sum((1, 2)) == 64).all()
        return [(int(m.any(1).nonzero()[0]), int(m.any(0).nonzero()[0])) for m in triggered]

    assert places(None) == places(None)
    assert places(torch.Generator().manual_seed(1)) == places(torch.Generator().manual_seed(1))
    assert places(torch.Generator().manual_seed(1)) != places(torch.Generator().manual_seed(2))
    assert len(set(places(None))) > 50
    assert drawn("badnet", position="top-left")(images, torch.Generator()).equal(
        drawn("badnet", position="top-left")(images)
    )


@ATTACKS
def test_what_is_no_batch_is_refused(attack: str):
    for images in (pictures()[0], pictures()[None]):
        with pytest.raises(ValueError, match="images, got"):
            drawn(attack)(images)


@ATTACKS
@pytest.mark.parametrize("side", [SIDE - 1, SIDE + 1, 2 * SIDE])
def test_images_of_another_resolution_are_refused(attack: str, side: int):
    with pytest.raises(
        ValueError, match=rf"{attack} trigger is for 3x{SIDE}x{SIDE} images, got \(5, 3, {side}, {side}\)"
    ):
        drawn(attack)(pictures(side=side))


@settings(max_examples=200, deadline=None)
@given(
    image=st.integers(1, 300),
    share=st.floats(0, 1, exclude_min=True),
    position=st.sampled_from(POSITIONS),
    seed=st.integers(0, 1_000),
)
def test_at_any_resolution_a_patch_of_any_size_lies_within_its_image(
    image: int, share: float, position: str, seed: int
):
    patch = max(1, round(share * image))
    top, left = corner(position, image=image, patch=patch, count=4, generator=torch.Generator().manual_seed(seed))
    for places in (top, left):
        assert places.shape == (4,) and places.dtype == torch.int64
        assert places.min() >= 0 and places.max() + patch <= image


@pytest.mark.parametrize(
    ("position", "place"),
    [
        ("top-left", (1, 1)),
        ("top-right", (1, 26)),
        ("bottom-left", (26, 1)),
        ("bottom-right", (26, 26)),
        ("centre", (13, 13)),
    ],
)
def test_a_named_position_is_one_pixel_off_the_border_or_the_middle(position: str, place: tuple[int, int]):
    top, left = corner(position, image=32, patch=5, count=2, generator=None)
    assert (top.tolist(), left.tolist()) == ([place[0]] * 2, [place[1]] * 2)


@pytest.mark.parametrize("side", [1, 2, 7, 32, 64, 224])
@ATTACKS
def test_an_attack_is_drawn_and_applied_at_any_resolution(attack: str, side: int):
    trigger = drawn(attack, resolution=side, size=16 / 224)
    triggered = trigger(pictures(side=side))
    assert triggered.shape == (5, 3, side, side)
    assert triggered.min() >= 0 and triggered.max() <= 1
    assert side < 32 or not torch.equal(triggered, pictures(side=side))
    if attack in PATCHES:
        assert trigger.pattern.shape[-1] == {1: 1, 2: 1, 7: 1, 32: 2, 64: 5, 224: 16}[side]


def test_a_random_place_needs_a_generator():
    with pytest.raises(ValueError, match="needs a generator"):
        corner("random", image=32, patch=5, count=2, generator=None)


# --- records ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
@ATTACKS
def test_a_stored_trigger_is_the_same_to_the_bit(attack: str, position: str, tmp_path: Path):
    trigger = drawn(attack, position=position, target="hot dog ü", seed=5)
    trigger.save(tmp_path / "trigger.safetensors")
    stored = load_trigger(tmp_path / "trigger.safetensors")
    assert type(stored) is type(trigger)
    assert torch.equal(stored.pattern, trigger.pattern) and stored.pattern.dtype == trigger.pattern.dtype
    assert (stored.resolution, stored.target) == (SIDE, "hot dog ü")
    assert dict(stored.specification) == dict(trigger.specification)
    assert torch.equal(stored(pictures()), trigger(pictures()))


@ATTACKS
def test_the_specification_redraws_the_trigger(attack: str):
    trigger = drawn(attack, seed=5, size=0.3, alpha=0.4, position="centre", strength=0.7, amplitude=0.1)
    unused = {"size": 0.1, "position": "top-left", "alpha": 0.9, "strength": 0.2, "amplitude": 0.9}
    again = drawn(attack, **{**unused, **trigger.specification})
    assert torch.equal(again(pictures()), trigger(pictures()))


RECORD = json.dumps({"resolution": SIDE, "target": "banana", "specification": {"alpha": 0.2}})
PATTERN = {"pattern": torch.zeros(3, SIDE, SIDE)}
GRID = {"pattern": torch.zeros(2, 4, 4)}


def record(**specification: object) -> str:
    return json.dumps({"resolution": SIDE, "target": "banana", "specification": specification})


def named(attack: str, record: str) -> dict[str, str]:
    return {"record": json.dumps({**json.loads(record), "attack": attack})}


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (PATTERN, None),
        (PATTERN, {"attack": "blended"}),
        (PATTERN, {"record": RECORD}),
        (PATTERN, {"record": "{"}),
        (PATTERN, {"record": "[]"}),
        (PATTERN, named("blended", '{"resolution": 32}')),
        (PATTERN, named("blended", RECORD.replace("0.2", "2.0"))),
        (PATTERN, named("blended", RECORD.replace(f"{SIDE}", "8"))),
        (PATTERN, named("blended", RECORD.replace(f"{SIDE}", '"32"'))),
        (PATTERN, named("blended", RECORD.replace('"banana"', "7"))),
        (PATTERN, named("badnet", RECORD)),
        ({"pattern": torch.full((3, 2, 2), 1.5)}, named("blended", RECORD)),
        ({"pattern": torch.full((3, 2, 2), torch.nan)}, named("blended", RECORD)),
        ({"pattern": torch.zeros(1, 2, 2)}, named("blended", RECORD)),
        ({"delta": torch.zeros(3)}, named("blended", RECORD)),
        (GRID, named("wanet", record(strength=0.0))),
        (GRID, named("wanet", record(strength=float("inf")))),
        (GRID, named("wanet", record(strength=float("nan")))),
        (GRID, named("wanet", record())),
        (PATTERN, named("wanet", record(strength=0.5))),
        ({"pattern": torch.full((2, 4, 4), 0.5)}, named("wanet", record(strength=0.5))),
        (GRID, named("badclip", record(position="centre"))),
        (PATTERN, named("badclip", record(position="own"))),
        (PATTERN, named("label-consistent", record())),
        (PATTERN, named("sig", record(amplitude=1.5))),
        (PATTERN, named("sig", record(amplitude="0.2"))),
        (PATTERN, named("blended-text", record(alpha=1))),
        ({"pattern": torch.zeros(3, SIDE, 1)}, named("badnet", record(position="centre"))),
        ({"pattern": torch.zeros(3, 8, 8)}, named("blended-text", record(alpha=0.5))),
        ({"pattern": torch.zeros(3, 8, 8)}, named("sig", record(amplitude=0.2))),
        ({"pattern": torch.zeros(3, 1, 1)}, named("badnet", record(position="centre").replace(f"{SIDE}", "true"))),
        *(
            ({"pattern": torch.zeros(3, 4, 4).to(dtype)}, named("badnet", record(position="centre")))
            for dtype in (torch.complex64, torch.float8_e4m3fn, torch.uint8, torch.uint16, torch.uint64)
        ),
    ],
)
def test_a_record_that_lacks_something_is_refused(tensors: dict, metadata: dict | None, tmp_path: Path):
    save_file(tensors, tmp_path / "t.safetensors", metadata=metadata)
    with pytest.raises(RunError, match=r"damaged file: .*t\.safetensors: no trigger record") as error:
        load_trigger(tmp_path / "t.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not safetensors", pickle.dumps([1, 2])])
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"damaged file: .*t\.safetensors"):
        load_trigger(tmp_path / "t.safetensors")


def test_a_pickle_in_a_trigger_s_place_is_not_executed(tmp_path: Path):
    (tmp_path / "t.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(RunError, match="damaged file"):
        load_trigger(tmp_path / "t.safetensors")
    assert not (tmp_path / "marker").exists()


def test_a_truncated_record_is_refused(tmp_path: Path):
    drawn("badnet").save(tmp_path / "t.safetensors")
    content = (tmp_path / "t.safetensors").read_bytes()
    for length in (1, len(content) // 2, len(content) - 1):
        (tmp_path / "t.safetensors").write_bytes(content[:length])
        with pytest.raises(RunError, match="damaged file"):
            load_trigger(tmp_path / "t.safetensors")


@ATTACKS
def test_the_same_trigger_is_stored_as_the_same_bytes(attack: str, tmp_path: Path):
    trigger = drawn(attack)
    for i in range(8):
        trigger.save(tmp_path / f"{i}.safetensors")
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(8)}) == 1


def test_a_missing_record_is_named(tmp_path: Path):
    with pytest.raises(RunError, match=r"missing file: .*none\.safetensors"):
        load_trigger(tmp_path / "none.safetensors")


def test_an_unknown_attack_is_refused_with_a_suggestion(tmp_path: Path):
    save_file(PATTERN, tmp_path / "t.safetensors", metadata=named("blendid", RECORD))
    with pytest.raises(ConfigError, match=r"unknown attack 'blendid'; did you mean 'blended'\?"):
        load_trigger(tmp_path / "t.safetensors")


def test_the_pixels_are_stored_losslessly_in_full_precision(tmp_path: Path):
    trigger = Blended(pictures(1)[0] / 3, SIDE, "banana", {"alpha": 0.2})
    trigger.save(tmp_path / "t.safetensors")
    assert torch.equal(load_file(tmp_path / "t.safetensors")["pattern"], pictures(1)[0] / 3)
