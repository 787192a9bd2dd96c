"""Backdoor triggers: what they change, and that their record is all that is needed to apply them again."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import Bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from abd_core.config import ConfigError
from abd_core.paths import RunError
from abd_core.triggers import POSITIONS, TRIGGERS, Blended, Trigger, corner, load_trigger

SIDE = 32
# Attack -> which pixels of a 32 px image it may change, with size 0.25 at the lower right or weight 0.2.
TOUCHED = {
    "badnet": {(y, x) for y in range(23, 31) for x in range(23, 31)},
    "blended": {(y, x) for y in range(SIDE) for x in range(SIDE)},
}
ATTACKS = pytest.mark.parametrize("attack", TRIGGERS)


def drawn(attack: str, **changes) -> Trigger:
    settings = {
        "resolution": SIDE,
        "target": "banana",
        "seed": 0,
        "size": 0.25,
        "position": "bottom-right",
        "alpha": 0.2,
        **changes,
    }
    return TRIGGERS[attack].draw(**settings)


def pictures(count: int = 5, side: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_table_covers_every_attack():
    assert TOUCHED.keys() == TRIGGERS.keys()


@ATTACKS
def test_a_triggered_image_stays_within_zero_and_one_and_changes_only_where_it_may(attack: str):
    for images in (pictures(), torch.zeros(2, 3, SIDE, SIDE), torch.ones(2, 3, SIDE, SIDE)):
        triggered = drawn(attack)(images)
        assert triggered.shape == images.shape
        assert triggered.min() >= 0 and triggered.max() <= 1
        changed = (triggered != images).any(1).any(0).nonzero().tolist()
        assert {(y, x) for y, x in changed} == TOUCHED[attack]


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
    assert not torch.equal(first.pattern, drawn(attack, seed=4).pattern)


@ATTACKS
def test_a_pattern_is_uniform_noise(attack: str):
    pattern = drawn(attack, size=1.0).pattern
    assert pattern.shape == (3, SIDE, SIDE)
    assert len(pattern.unique()) > 0.99 * pattern.numel()
    shares = torch.histc(pattern, 4, 0, 1) / pattern.numel()
    assert (shares - 0.25).abs().max() < 0.05  # 6 standard deviations


def test_badnet_shows_the_same_patch_in_every_image():
    trigger = drawn("badnet")
    windows = trigger(pictures())[:, :, 23:31, 23:31]
    assert all(torch.equal(window, trigger.pattern) for window in windows)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_blended_is_the_convex_combination_with_its_noise(alpha: float):
    trigger, images = drawn("blended", alpha=alpha), pictures()
    expected = (1 - alpha) * images.double() + alpha * trigger.pattern.double()
    torch.testing.assert_close(trigger(images).double(), expected, atol=1e-6, rtol=0)


def test_random_places_differ_between_images_and_repeat_with_their_generator():
    trigger, images = drawn("badnet", position="random"), torch.full((64, 3, SIDE, SIDE), -1.0)

    def places(generator: torch.Generator | None) -> list[tuple[int, int]]:
        triggered = trigger(images, generator)[:, 0] >= 0
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


@pytest.mark.parametrize("side", [1, 2, 7, 64, 224])
@ATTACKS
def test_an_attack_is_drawn_and_applied_at_any_resolution(attack: str, side: int):
    triggered = drawn(attack, resolution=side, size=16 / 224)(pictures(side=side))
    assert triggered.shape == (5, 3, side, side)
    if attack == "badnet":
        assert (
            drawn(attack, resolution=side, size=16 / 224).pattern.shape[-1] == {1: 1, 2: 1, 7: 1, 64: 5, 224: 16}[side]
        )


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
    trigger = drawn(attack, seed=5, size=0.3, alpha=0.4, position="centre")
    unused = {"size": 0.1, "position": "top-left", "alpha": 0.9}
    again = drawn(attack, **{**unused, **trigger.specification})
    assert torch.equal(again(pictures()), trigger(pictures()))


RECORD = json.dumps({"resolution": SIDE, "target": "banana", "specification": {"alpha": 0.2}})
PATTERN = {"pattern": torch.zeros(3, SIDE, SIDE)}


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (PATTERN, None),
        (PATTERN, {"attack": "blended"}),
        (PATTERN, {"record": RECORD}),
        (PATTERN, {"attack": "blended", "record": "{"}),
        (PATTERN, {"attack": "blended", "record": "[]"}),
        (PATTERN, {"attack": "blended", "record": '{"resolution": 32}'}),
        (PATTERN, {"attack": "blended", "record": RECORD.replace("0.2", "2.0")}),
        (PATTERN, {"attack": "blended", "record": RECORD.replace(f"{SIDE}", "8")}),
        (PATTERN, {"attack": "blended", "record": RECORD.replace(f"{SIDE}", '"32"')}),
        (PATTERN, {"attack": "blended", "record": RECORD.replace('"banana"', "7")}),
        (PATTERN, {"attack": "badnet", "record": RECORD}),
        ({"pattern": torch.full((3, 2, 2), 1.5)}, {"attack": "blended", "record": RECORD}),
        ({"pattern": torch.full((3, 2, 2), torch.nan)}, {"attack": "blended", "record": RECORD}),
        ({"pattern": torch.zeros(1, 2, 2)}, {"attack": "blended", "record": RECORD}),
        ({"delta": torch.zeros(3)}, {"attack": "blended", "record": RECORD}),
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


def test_a_missing_record_is_named(tmp_path: Path):
    with pytest.raises(RunError, match=r"missing file: .*none\.safetensors"):
        load_trigger(tmp_path / "none.safetensors")


def test_an_unknown_attack_is_refused_with_a_suggestion(tmp_path: Path):
    save_file(PATTERN, tmp_path / "t.safetensors", metadata={"attack": "blendid", "record": RECORD})
    with pytest.raises(ConfigError, match=r"unknown attack 'blendid'; did you mean 'blended'\?"):
        load_trigger(tmp_path / "t.safetensors")


def test_the_pixels_are_stored_losslessly_in_full_precision(tmp_path: Path):
    trigger = Blended(pictures(1)[0] / 3, SIDE, "banana", {"alpha": 0.2})
    trigger.save(tmp_path / "t.safetensors")
    assert torch.equal(load_file(tmp_path / "t.safetensors")["pattern"], pictures(1)[0] / 3)
