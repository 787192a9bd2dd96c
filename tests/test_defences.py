"""The defences: each one's losses against their formulas, its batch against its paper, and what it owns."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import ARCHITECTURE, LAYOUT, without_time, write_stand_in
from open_clip.transform import OPENAI_DATASET_MEAN
from safetensors.torch import load_file
from torchvision import transforms

from abd_core import augment as image_augment
from abd_core import defences, inputs, losses, models, paths, train
from abd_core.adversary import AdversaryConfig
from abd_core.config import ConfigError, derive_seed
from abd_core.data import Pairs, load_pairs, rng
from abd_core.defences import CORNERS, DEFENCES, DefendConfig, FineTuningDefence, placed
from abd_core.defend import defend
from abd_core.generator import Perturbation, patch_side
from abd_core.inputs import TrainInputs
from abd_core.losses import clip_loss
from abd_core.paths import Run
from abd_core.text import augment, tokenize
from abd_core.train import Step, TrainConfig

SHORT = {"limit": 64, "share": 0.5, "epochs": 2, "batch_size": 16, "warmup_steps": 2}
BRIEF = {"abd-d": {"search_steps": 2}}
TRAINED = sorted(name for name, kind in DEFENCES.items() if issubclass(kind, FineTuningDefence))
EVERY = pytest.mark.parametrize("name", sorted(DEFENCES))
B, D = 7, 5


@pytest.fixture
def victim(stand_in: Path) -> Path:
    return stand_in / "victim.safetensors"


@pytest.fixture
def base(stand_in: Path) -> Path:
    return stand_in / "base.safetensors"


def a_patch(**changes: Any) -> Perturbation:
    pixels = torch.rand(3, 11, 11, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(Perturbation("patch", pixels, 64, "random"), **changes)


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    a_patch().save(tmp_path / "patch.safetensors")
    return tmp_path / "patch.safetensors"


def run(name: str, victim: Path, patch: Path | None = None, *, force: bool = False, **settings: Any) -> Run:
    chosen = {**SHORT, **BRIEF.get(name, {}), **settings}
    return defend(DefendConfig(defence=name, **chosen), victim, perturbation=patch, force=force)


def weights(path: Path | Run) -> dict[str, torch.Tensor]:
    return load_file(path if isinstance(path, Path) else path.file("model.safetensors"))


def differing(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name].float(), two[name].float())]


# --- losses -------------------------------------------------------------------------------------------------


def unit(seed: int, batch: int = B) -> torch.Tensor:
    rows = torch.randn(batch, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def nce(queries: np.ndarray, keys: np.ndarray, scale: float) -> float:
    total = 0.0
    for i, query in enumerate(queries):
        logits = [scale * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
        total += np.log(sum(np.exp(logit - max(logits)) for logit in logits)) + max(logits) - logits[i]
    return total / len(queries)


def clip(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    return (nce(image, text, scale) + nce(text, image, scale)) / 2


def distance(now: np.ndarray, then: np.ndarray) -> float:
    return sum(float((a - b) @ (a - b)) for a, b in zip(now, then, strict=True)) / len(now)


def test_the_in_modal_loss_is_infonce_from_plain_to_augmented_features_in_both_modalities():
    image, augmented_image, text, augmented_text = (unit(seed) for seed in range(4))
    value = losses.in_modal_loss(image, augmented_image, text, augmented_text, 9.0)
    a, b, c, d = (x.numpy() for x in (image, augmented_image, text, augmented_text))
    assert value.item() == pytest.approx((nce(a, b, 9.0) + nce(c, d, 9.0)) / 2, rel=1e-9)
    assert value.item() != pytest.approx((nce(b, a, 9.0) + nce(d, c, 9.0)) / 2, rel=1e-3)


def test_gradients_of_the_in_modal_loss_are_those_of_finite_differences():
    inputs = [unit(seed, 4).requires_grad_() for seed in range(4)]
    assert torch.autograd.gradcheck(lambda *xs: losses.in_modal_loss(*xs, 3.0), inputs)


def test_the_nearest_row_of_a_bank_is_that_of_the_highest_cosine_and_carries_no_gradient():
    queries, bank = unit(0).requires_grad_(), unit(1, 50).requires_grad_()
    found = losses.nearest(queries, bank)
    for query, row in zip(queries.detach().numpy(), found.numpy(), strict=True):
        best = max(bank.detach().numpy(), key=lambda entry: float(query @ entry))
        assert np.array_equal(row, best)
    assert not found.requires_grad


def test_the_feature_shift_is_the_mean_squared_distance_up_to_its_limit_and_nothing_beyond():
    now, then = unit(0), unit(1)
    shift = distance(now.numpy(), then.numpy())
    assert losses.feature_shift(now, then, limit=shift + 1e-6).item() == pytest.approx(shift, rel=1e-9)
    assert losses.feature_shift(now, then, limit=shift - 1e-6).item() == 0
    now.requires_grad_()
    losses.feature_shift(now, then, limit=shift - 1e-6).backward()
    assert now.grad is not None and not now.grad.any()
    assert torch.autograd.gradcheck(lambda x: losses.feature_shift(x, then, limit=4.0), [now])


# --- image augmentations ------------------------------------------------------------------------------------


UNPAINTED = 1 / 3  # torch.rand gives multiples of 2^-24


def outside(batch: int = 200, side: int = 64) -> torch.Tensor:
    """Images of a value that no augmentation paints: what is erased can be told."""
    return torch.full((batch, 3, side, side), UNPAINTED)


def rectangles(images: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Top, left, height and width of what was painted over in each image; a whole rectangle, or the test fails."""
    for painted in (images != UNPAINTED).all(1):
        rows, columns = painted.any(1).nonzero()[:, 0], painted.any(0).nonzero()[:, 0]
        if len(rows):
            top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
            assert painted.sum() == (bottom - top) * (right - left)
            yield top, left, bottom - top, right - left


@pytest.mark.parametrize(("low", "high"), [(0.02, 0.1), (0.03, 0.03)])
def test_random_erasing_paints_rectangles_of_the_stated_areas_and_aspects_anywhere(low: float, high: float):
    erased = image_augment.random_erasing(outside(), rng(0), probability=1, area=(low, high), aspect=(0.5, 2))
    found = list(rectangles(erased))
    assert len(found) == 200
    for _, _, height, width in found:
        for share, bound in ((low, -1), (high, 1)):  # rounding moves either side by half a pixel
            allowed = (height - bound / 2) * (width - bound / 2)
            assert bound * allowed <= bound * share * 64 * 64
        assert (height + 0.5) / (width - 0.5) >= 0.5 and (height - 0.5) / (width + 0.5) <= 2
    assert min(top for top, *_ in found) < 4 and max(top + height for top, _, height, _ in found) > 60
    assert min(left for _, left, *_ in found) < 4 and max(left + width for _, left, _, width in found) > 60
    noise = erased[erased != UNPAINTED]
    assert 0 <= noise.min() < 0.01 and 0.99 < noise.max() <= 1


def test_random_erasing_leaves_the_stated_share_of_images_alone_and_repeats_with_its_seed():
    def erase(seed: int) -> torch.Tensor:
        return image_augment.random_erasing(outside(), rng(seed), probability=0.25, area=(0.02, 0.4))

    assert 30 < len(list(rectangles(erase(0)))) < 70
    assert torch.equal(erase(0), erase(0)) and not torch.equal(erase(0), erase(1))


def test_a_rectangle_that_would_leave_the_image_is_cut_to_it():
    erased = image_augment.random_erasing(outside(20), rng(0), probability=1, area=(0.9, 1.0), aspect=(4, 5))
    assert {height for _, _, height, _ in rectangles(erased)} == {64}


@pytest.mark.parametrize("side", [64, 224])
def test_the_torchvision_augmentations_are_the_papers_and_draw_from_their_own_seed(
    side: int, monkeypatch: pytest.MonkeyPatch
):
    images = torch.rand(3, 3, side, side, generator=rng(0))
    built: dict[str, tuple] = {}
    for kind in ("RandomResizedCrop", "ColorJitter", "RandomGrayscale", "GaussianBlur", "RandomHorizontalFlip"):
        original = getattr(transforms, kind)

        def spy(*args: Any, kind: str = kind, original: Any = original, **kwargs: Any) -> Any:
            built[kind] = (*args, *kwargs.values())
            return original(*args, **kwargs)

        monkeypatch.setattr(image_augment.transforms, kind, spy)
    state = torch.random.get_rng_state()
    for transform in (image_augment.auto_augment, image_augment.crop_colour_blur):
        one = transform(images, seed=1)
        assert one.shape == images.shape and one.dtype == images.dtype and one.min() >= 0 and one.max() <= 1
        assert torch.equal(one, transform(images, seed=1)) and not torch.equal(one, transform(images, seed=2))
        assert not torch.equal(one, images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert built["ColorJitter"] == (0.5, 0.5, 0.5, 0.1) and built["RandomGrayscale"] == (0.2,)
    assert built["RandomResizedCrop"][0] == side and built["RandomHorizontalFlip"] == ()
    kernel, (_, sigma) = built["GaussianBlur"]
    assert (kernel, sigma) == {64: (7, pytest.approx(2 * 64 / 224)), 224: (21, 2.0)}[side]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_auto_augment_is_torchvision_s_imagenet_policy_on_each_image(device: str):
    images = torch.rand(500, 3, 64, 64, generator=rng(0))  # enough for each of its operations at each sign
    images[::7] = images[::7].mean((2, 3), keepdim=True)  # with flat ones, which have no contrast to stretch
    images[::5] = images[::5, :, :1, :1] + 0.3 * images[::5].square()  # and with dull ones
    images = images.clamp(0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET)
        expected = [policy((image * 255).round().to(torch.uint8)) for image in images]
    made = image_augment.auto_augment(images.to(device), seed=5)
    assert made.device.type == device
    if device == "cpu":
        assert torch.equal(made, torch.stack(expected) / 255)
    else:  # another device may round a grey level, or the place of a turned pixel, the other way
        apart = (made.cpu() * 255 - torch.stack(expected)).abs()
        assert apart.gt(1.5).float().mean() < 1e-3


# --- settings -----------------------------------------------------------------------------------------------

FIELDS = {field.name: field for field in dataclasses.fields(DefendConfig)}
OTHERS = {  # another value than the default, of every setting that only some defences read
    "view": "both",
    "eda": False,
    "patch_place": "centre",
    "normal": "fine-tuned",
    "perturbed_share": 1.0,
    "search_steps": 3,
    "search_lr": 0.3,
    "window_low": 0.25,
    "window_high": 0.5,
    "field_bound": 0.3,
    "patch_area": 0.1,
    "erase_probability": 1.0,
    "erase_low": 0.1,
    "erase_high": 0.05,
    "noise_sigma": 0.1,
    "in_modal_weight": 0.0,
    "bank": 4,
    "match_every": 1,
    "shift_weight": 0.0,
    "shift_limit": 0.0,
    "mixing": 0.25,
}


@EVERY
@pytest.mark.parametrize("setting", OTHERS)
def test_a_setting_that_a_defence_does_not_read_is_refused_in_one_line_that_names_its_readers(setting: str, name: str):
    value = OTHERS[setting]
    if setting in DEFENCES[name].settings:
        assert getattr(DefendConfig(defence=name, **{setting: value}), setting) == value
    else:
        with pytest.raises(ConfigError) as error:
            DefendConfig(defence=name, **{setting: value})
        line = str(error.value)
        assert line.startswith(f"DefendConfig.{setting} = {value!r}: defence {name!r} does not read it, only ")
        readers = line.split("only ")[1].split(", ")
        assert readers == [other for other, kind in DEFENCES.items() if setting in kind.settings]


def test_the_settings_of_the_defences_are_fields_and_all_others_are_common_to_those_that_train():
    named = {setting for kind in DEFENCES.values() for setting in kind.settings}
    assert named == set(OTHERS)
    assert FIELDS.keys() - named == {*TrainConfig.names(), *TrainInputs.names(), "defence", "share", "batch_norm"}


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_has_its_own_settings_of_the_loop_unless_others_are_given(name: str):
    kind, config = DEFENCES[name], DefendConfig(defence=name)
    assert (config.lr, config.batch_norm) == (kind.lr, kind.batch_norm)
    other = {"train": "frozen", "frozen": "train"}[kind.batch_norm]
    given = DefendConfig(defence=name, lr=0.3, batch_norm=other)
    assert (given.lr, given.batch_norm) == (0.3, other)
    assert given.replace(seed=1) == DefendConfig(defence=name, lr=0.3, batch_norm=other, seed=1)


def test_an_empty_range_of_erased_areas_is_refused():
    with pytest.raises(ConfigError, match=r"DefendConfig\.erase_low = 0\.5: ≤ erase_high = 0\.4 expected"):
        DefendConfig(defence="random-erasing", erase_low=0.5)


def test_the_published_settings_are_the_defaults():
    config = DefendConfig()
    assert config.in_modal_weight == 1
    assert (config.bank, config.match_every) == (21845, 2)
    assert (config.shift_weight, config.shift_limit) == (0.5, 2.15)
    assert (config.erase_probability, config.erase_low, config.erase_high) == (0.5, 0.02, 0.4)
    assert config.mixing == 0.5


def test_the_controls_are_as_large_and_as_strong_as_the_adversary_s_perturbation():
    config, found = DefendConfig(), AdversaryConfig()
    assert config.patch_area == config.noise_sigma == found.magnitude
    assert found.mode == "patch" and found.placement == "random"


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for change in OTHERS for name in DEFENCES if change in DEFENCES[name].settings],
)
def test_each_setting_that_a_defence_reads_changes_the_model(name: str, change: str, victim: Path, patch: Path):
    other = {change: OTHERS[change]}
    if change.startswith("erase"):
        other = {"erase_low": 0.02, "erase_high": 0.2, **other} if change != "erase_high" else other
    assert differing(weights(run(name, victim, patch)), weights(run(name, victim, patch, **other)))


# --- what each owns -----------------------------------------------------------------------------------------


@EVERY
def test_every_defence_says_in_one_line_what_its_owner_must_have(name: str):
    kind = DEFENCES[name]
    assert "\n" not in kind.owns and len(kind.owns) <= 80
    assert ("clean pairs" in kind.owns) == kind.needs_pairs
    assert ("clean weights" in kind.owns) == (kind.needs_clean_weights or kind.needs_perturbation)
    assert ("perturbation" in kind.owns) == kind.needs_perturbation


@EVERY
def test_a_run_is_keyed_by_what_its_defence_needs_and_by_nothing_else(name: str, victim: Path, patch: Path, base: Path):
    kind = DEFENCES[name]
    inputs = paths.read_json(run(name, victim, patch).file("config.json"))["inputs"]
    expected = {"victim": paths.sha256(victim), "dev": inputs["dev"]}
    if kind.needs_pairs:
        expected["pairs"] = load_pairs(64).subset(0.5, seed=0).digest
    if kind.needs_perturbation:
        expected["perturbation"] = paths.sha256(patch)
    if kind.needs_clean_weights:
        expected["clean"] = paths.sha256(base)
    assert inputs == expected


def test_abd_d_without_clean_weights_reads_none(victim: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "clean_weights", lambda config: pytest.fail("clean weights read"))
    made = run("abd-d", victim, normal="fine-tuned")
    assert "clean" not in paths.read_json(made.file("config.json"))["inputs"]
    assert made.file("normal.safetensors").exists() and not (made.folder / "normal").exists()


def test_only_abd_needs_a_perturbation_and_only_three_defences_read_the_clean_weights():
    assert [name for name, kind in DEFENCES.items() if kind.needs_perturbation] == ["abd"]
    assert [name for name, kind in DEFENCES.items() if kind.needs_clean_weights] == ["abd-d", "clean", "wise-ft"]
    assert sorted(name for name, kind in DEFENCES.items() if not kind.needs_pairs) == ["clean", "wise-ft"]


# --- clean weights and WiSE-FT ------------------------------------------------------------------------------


def test_going_back_gives_exactly_the_clean_weights_and_their_accuracy(victim: Path, base: Path):
    back = run("clean", victim)
    assert differing(weights(back), weights(base)) == []
    assert back.metrics["before"] != back.metrics["after"]
    itself = run("clean", base)
    assert itself.metrics["before"] == itself.metrics["after"] == back.metrics["after"]


@pytest.mark.parametrize(("mixing", "end"), [(0.0, "base"), (1.0, "victim")])
def test_the_end_points_of_wise_ft_are_the_clean_model_and_the_victim(
    mixing: float, end: str, stand_in: Path, tmp_path: Path
):
    trained = train_a_little(stand_in / "victim.safetensors", tmp_path)
    expected = trained if end == "victim" else stand_in / "base.safetensors"
    assert differing(weights(run("wise-ft", trained, mixing=mixing)), weights(expected)) == []
    assert len(differing(weights(trained), weights(stand_in / "base.safetensors"))) > 50


def train_a_little(victim: Path, folder: Path) -> Path:
    """Weights in full precision, with other BatchNorm statistics and counters than the clean model's."""
    model = models.load(victim).train()
    for step in range(2):
        models.encode_image(model, torch.rand(4, 3, 64, 64, generator=rng(step)))
    models.save(model, folder / "trained.safetensors", name=ARCHITECTURE)
    return folder / "trained.safetensors"


@pytest.mark.parametrize("mixing", [0.25, 0.5, 0.9])
def test_wise_ft_interpolates_every_float_batch_norm_s_statistics_too(mixing: float, base: Path, tmp_path: Path):
    trained = train_a_little(base.with_name("victim.safetensors"), tmp_path)
    clean, victim, mixed = weights(base), weights(trained), weights(run("wise-ft", trained, mixing=mixing))
    counters = [name for name in mixed if not mixed[name].is_floating_point()]
    assert {int(victim[name]) for name in counters} == {2} and {int(clean[name]) for name in counters} == {0}
    for name, tensor in mixed.items():
        if name in counters:
            assert int(tensor) == (2 if mixing >= 0.5 else 0)
        else:
            exact = mixing * victim[name].double().numpy() + (1 - mixing) * clean[name].double().numpy()
            np.testing.assert_allclose(tensor.double().numpy(), exact, rtol=1e-5, atol=1e-6)
    moved = [name for name in mixed if "running_" in name and not torch.equal(mixed[name], victim[name])]
    assert len(moved) > 10


@pytest.mark.parametrize("name", ["clean", "wise-ft"])
def test_a_defence_that_does_not_train_leaves_weights_and_no_history(name: str, victim: Path):
    made = run(name, victim)
    files = {path.name for path in made.folder.iterdir() if not path.name.startswith(".")}
    assert files == {"model.safetensors", "config.json", "metrics.json", "manifest.json"}
    assert made.metrics.keys() == {"before", "after", "seconds"}


@pytest.mark.parametrize("name", ["clean", "wise-ft"])
def test_other_clean_weights_are_another_run(name: str, victim: Path, base: Path, tmp_path: Path):
    other = write_stand_in(tmp_path / "other.safetensors", seed=2)
    config = DefendConfig(defence=name, **SHORT)
    default, named, changed = (
        defend(config, victim),
        defend(config, victim, clean=base),
        defend(config, victim, clean=other),
    )
    assert default.folder == named.folder != changed.folder
    assert differing(weights(default), weights(changed))
    ft = DefendConfig(**SHORT, defence="ft")
    assert defend(ft, victim, clean=other).folder == defend(ft, victim).folder


@pytest.mark.parametrize("name", ["clean", "wise-ft"])
def test_clean_weights_that_are_missing_or_of_another_architecture_are_refused(
    name: str, victim: Path, tmp_path: Path, runs: Path
):
    config = DefendConfig(defence=name, **SHORT)
    with pytest.raises(paths.RunError, match=r"missing file: .*none\.safetensors"):
        defend(config, victim, clean=tmp_path / "none.safetensors")
    assert not (runs / "defend").exists()
    (tmp_path / "narrow.json").write_text(json.dumps({**LAYOUT, "embed_dim": 16}))
    open_clip.add_model_config(tmp_path / "narrow.json")
    models.save(models.build("narrow"), tmp_path / "narrow.safetensors", name="narrow")
    with pytest.raises(
        ConfigError, match=r"narrow\.safetensors: the clean weights \(pretrained\) are of another architecture"
    ):
        defend(config, victim, clean=tmp_path / "narrow.safetensors")
    assert not list(runs.glob("*/*/metrics.json"))


# --- batches and losses -------------------------------------------------------------------------------------

FIRST = Step(torch.arange(3, 13), 0, 4)  # no matching epoch of RoCLIP's
SECOND = Step(torch.arange(5, 15), 1, 9)  # a matching one


def features(model: open_clip.CLIP, images: torch.Tensor, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """What a copy of the model in train mode makes of them, in double precision."""
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        text = models.encode_text(twin, tokenize(captions, context_length=twin.context_length))
        return models.encode_image(twin, images).double().numpy(), text.double().numpy()


class Bench:
    """A defence on a few pairs, one step at a time, without the stage around it."""

    def __init__(self, victim: Path, name: str, perturbation: Perturbation | None = None, **settings: Any) -> None:
        self.config = DefendConfig(defence=name, seed=3, **settings)
        self.pairs: Pairs = load_pairs(40)
        self.model = models.load(victim).train()
        self.scale = self.model.logit_scale.exp().item()
        kind = DEFENCES[name]
        assert issubclass(kind, FineTuningDefence)
        self.defence = kind(self.config, self.pairs, perturbation=perturbation)

    def images(self, at: Step) -> torch.Tensor:
        return self.pairs.images(at.indices, seed=3, step=at.step)

    def captions(self, at: Step, *, eda: bool) -> list[str]:
        plain = self.pairs.captions(at.indices, seed=3, epoch=at.epoch)
        return augment(plain, seed=3, epoch=at.epoch, ids=[self.pairs.ids[i] for i in at.indices]) if eda else plain

    def loss(self, at: Step) -> float:
        return self.defence.loss(self.model, at).item()

    def within(self, monkeypatch: pytest.MonkeyPatch, body: Callable[[], None]) -> None:
        """Do `body` in the place of the training loop, while the defence has its state."""
        monkeypatch.setattr(defences, "fit", lambda *args, **kwargs: body())
        self.defence.defend(self.model, Path())


@pytest.mark.parametrize("at", [FIRST, SECOND])
def test_fine_tuning_s_loss_is_clip_s_on_the_clean_pairs(at: Step, victim: Path, fp32: None):
    bench = Bench(victim, "ft")
    image, text = features(bench.model, bench.images(at), bench.captions(at, eda=False))
    assert bench.loss(at) == pytest.approx(clip(image, text, bench.scale), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_cleanclip_adds_the_in_modal_loss_of_autoaugmented_images_and_eda_captions(
    weight: float, victim: Path, fp32: None
):
    bench = Bench(victim, "cleanclip", in_modal_weight=weight)
    clean = bench.images(FIRST)
    augmented = image_augment.auto_augment(clean, seed=derive_seed(3, "autoaugment", FIRST.step))
    captions = bench.captions(FIRST, eda=False) + bench.captions(FIRST, eda=True)
    image, text = features(bench.model, torch.cat([clean, augmented]), captions)  # one batch: BatchNorm sees both
    in_modal = (nce(image[:10], image[10:], bench.scale) + nce(text[:10], text[10:], bench.scale)) / 2
    expected = clip(image[:10], text[:10], bench.scale) + weight * in_modal
    assert bench.loss(FIRST) == pytest.approx(expected, rel=1e-5)
    assert in_modal > 0.01


def roclip_images(bench: Bench, at: Step) -> torch.Tensor:
    seed = derive_seed(3, "crop, colour, blur", at.step)
    return image_augment.crop_colour_blur(bench.images(at), seed=seed)


def test_roclip_matches_images_with_the_nearest_text_of_its_bank_in_every_second_epoch(
    victim: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
):
    bench = Bench(victim, "roclip")

    def body() -> None:
        bank = bench.model.bank.double().numpy().copy()
        image, text = features(bench.model, roclip_images(bench, FIRST), bench.captions(FIRST, eda=True))
        assert bench.loss(FIRST) == pytest.approx(clip(image, text, bench.scale), rel=1e-5)
        assert np.array_equal(bench.model.bank.double().numpy(), bank)  # fills in matching epochs only
        image, text = features(bench.model, roclip_images(bench, SECOND), bench.captions(SECOND, eda=True))
        matched = np.stack([max(bank, key=lambda entry, row=row: float(row @ entry)) for row in image])
        assert bench.loss(SECOND) == pytest.approx(clip(image, matched, bench.scale), rel=1e-5)
        assert clip(image, matched, bench.scale) != pytest.approx(clip(image, text, bench.scale), rel=1e-2)

    bench.within(monkeypatch, body)


@pytest.mark.parametrize("size", [4, 24, 40, 21845])
def test_roclip_s_bank_starts_with_captions_of_the_victim_and_forgets_the_oldest(
    size: int, victim: Path, monkeypatch: pytest.MonkeyPatch
):
    bench = Bench(victim, "roclip", bank=size)

    def text(captions: list[str]) -> torch.Tensor:
        return models.encode_text(bench.model, tokenize(captions, context_length=bench.model.context_length)).detach()

    def body() -> None:
        everything = torch.arange(40)
        first = text(bench.pairs.captions(everything, seed=3, epoch=0))
        bank = bench.model.bank
        assert len(bank) == min(size, 40)
        origin = torch.cdist(bank, first).min(1)
        assert origin.values.max() < 1e-2 and len(set(origin.indices.tolist())) > 0.8 * len(bank)
        expected = deque(bank.clone(), maxlen=len(bank))
        for step in range(7):
            at = Step((torch.arange(10) + 9 * step) % 40, 1, step)
            bench.loss(at)
            expected.extend(text(bench.captions(at, eda=True)))
            oldest = int(bench.model.oldest)
            turned = torch.cat([bank[oldest:], bank[:oldest]])
            torch.testing.assert_close(turned, torch.stack(list(expected)), rtol=1e-2, atol=1e-3)

    bench.within(monkeypatch, body)
    assert not any(name in ("bank", "oldest") for name in bench.model.state_dict())


def test_no_gradient_reaches_the_text_encoder_through_roclip_s_bank(victim: Path, monkeypatch: pytest.MonkeyPatch):
    bench = Bench(victim, "roclip")

    def trained() -> set[str]:
        return {name for name, p in bench.model.named_parameters() if p.grad is not None and p.grad.any()}

    def body() -> None:
        bench.defence.loss(bench.model, SECOND).backward()
        assert not bench.model.bank.requires_grad
        assert "token_embedding.weight" not in trained() and {"visual.conv1.weight", "logit_scale"} <= trained()
        bench.defence.loss(bench.model, FIRST).backward()
        assert {"token_embedding.weight", "visual.conv1.weight", "logit_scale"} <= trained()

    bench.within(monkeypatch, body)


@pytest.mark.parametrize(("weight", "limit"), [(0.5, 2.15), (0.3, 4.0), (0.5, 0.0)])
def test_par_pushes_features_away_from_the_victim_s_up_to_its_limit(
    weight: float, limit: float, victim: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
):
    bench = Bench(victim, "par", shift_weight=weight, shift_limit=limit)
    before = models.frozen(models.load(victim))

    def body() -> None:
        with torch.no_grad():  # some way into training
            for parameter in bench.model.parameters():
                parameter += 0.1 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=rng(1))
        scale = bench.model.logit_scale.exp().item()
        images = bench.defence.augmented(bench.images(FIRST), rng(3, "par", FIRST.step))
        captions = bench.captions(FIRST, eda=False)
        image, text = features(bench.model, images, captions)
        with torch.no_grad():
            tokens = tokenize(captions, context_length=before.context_length)
            victim_image, victim_text = models.encode_image(before, images), models.encode_text(before, tokens)
        shifts = [distance(image, victim_image.double().numpy()), distance(text, victim_text.double().numpy())]
        assert min(shifts) > 1e-3
        expected = clip(image, text, scale) - weight * sum(s for s in shifts if s <= limit)
        assert bench.loss(FIRST) == pytest.approx(expected, rel=1e-4)

    bench.within(monkeypatch, body)


def test_par_leaves_the_temperature_alone_and_others_train_it(victim: Path):
    before, after = weights(victim)["logit_scale"], weights(run("par", victim))["logit_scale"]
    assert torch.equal(before.float(), after)
    assert not torch.equal(before.float(), weights(run("ft", victim))["logit_scale"])


def test_par_adds_positive_noise_to_half_of_the_images_and_a_small_square_to_half():
    images = torch.full((400, 3, 64, 64), 0.2)
    changed = defences.PAR.augmented(images, rng(0))
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
    squares = (changed == mean).all(1)
    sizes = squares.flatten(1).sum(1)
    assert set(sizes[sizes > 0].tolist()) <= {16, 25, 36, 49} and 150 < (sizes > 0).sum() < 250  # 4.5 to 6.4 px
    noisy = ((changed > 0.2) & ~squares[:, None]).flatten(1).float().mean(1) > 0.4
    assert 150 < noisy.sum() < 250
    rest = ~squares[:, None].expand_as(changed)
    assert changed[rest].min() == pytest.approx(0.2) and changed.max() <= 1
    added = (changed - images)[noisy & (sizes == 0)]
    assert (added == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert added.square().mean().sqrt() == pytest.approx(0.2 / 2**0.5, rel=0.02)


def perturbed(bench: Bench, at: Step) -> torch.Tensor:
    """What ABD or a control should make of the batch's images, written out anew."""
    clean, config = bench.images(at), bench.config
    if config.defence == "gaussian-noise":
        return (clean + 0.03 * torch.randn(clean.shape, generator=rng(3, "noise", at.step))).clamp(0, 1)
    if config.defence == "random-erasing":
        return image_augment.random_erasing(clean, rng(3, "erase", at.step), probability=0.5, area=(0.02, 0.4))
    noise = torch.rand(3, 11, 11, generator=rng(3, "noise patch"))
    pixels = a_patch().delta if config.defence == "abd" else noise
    places = torch.randint(54, (2, len(clean)), generator=rng(3, "place", at.step)).T.tolist()
    for image, (top, left) in zip(clean, places, strict=True):
        image[:, top : top + 11, left : left + 11] = pixels
    return clean


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize("first", ["abd", "ft"])
def test_another_defence_in_a_copy_has_its_own_learning_rate_and_batch_norm(first: str, name: str):
    own = DefendConfig(defence=name)
    assert DefendConfig(defence=first).replace(defence=name) == own
    assert (own.lr, own.batch_norm) == (DEFENCES[name].lr, DEFENCES[name].batch_norm)
    changed = DefendConfig(defence=first, lr=2e-3).replace(seed=1)
    assert changed.lr == 2e-3 and DefendConfig(defence=first).replace(defence="par", lr=3e-3).lr == 3e-3


@pytest.mark.parametrize("view", ["replace", "both", "clean"])
@pytest.mark.parametrize("eda", [True, False])
@pytest.mark.parametrize("name", ["abd", "noise-patch", "random-erasing", "gaussian-noise"])
def test_abd_and_its_controls_differ_in_the_image_s_perturbation_alone(
    name: str, eda: bool, view: str, victim: Path, fp32: None
):
    bench = Bench(victim, name, a_patch() if name == "abd" else None, view=view, eda=eda)
    clean, changed = bench.images(FIRST), perturbed(bench, FIRST)
    batch = {"replace": [changed], "both": [changed, clean], "clean": [clean]}[view]
    image, text = features(bench.model, torch.cat(batch), bench.captions(FIRST, eda=eda))
    expected = np.mean([clip(part, text, bench.scale) for part in np.split(image, len(batch))])
    assert bench.loss(FIRST) == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(clean, changed)


def test_i_plus_t_eda_needs_no_perturbation_and_without_eda_it_is_fine_tuning(victim: Path):
    loop = {"lr": 1e-3, "batch_norm": "frozen"}
    with_eda = run("abd", victim, view="clean", **loop)
    neither = run("abd", victim, view="clean", eda=False, **loop)
    tuned = run("ft", victim, **loop)
    assert differing(weights(neither), weights(tuned)) == []
    assert differing(weights(with_eda), weights(tuned))


# --- controls and places ------------------------------------------------------------------------------------


def test_the_noise_patch_is_one_for_all_images_and_steps_of_a_run_and_another_for_another_seed(victim: Path):
    def patches(seed: int, step: int) -> torch.Tensor:
        bench = Bench(victim, "noise-patch", patch_place="bottom-right")
        bench.defence.config = bench.config.replace(seed=seed)
        images = bench.defence.perturb(torch.zeros(5, 3, 64, 64), Step(torch.arange(5), 0, step))
        return images[:, :, 53:, 53:]

    one = patches(0, 0)
    assert all(torch.equal(patch, one[0]) for patch in [*one, *patches(0, 7)])
    assert not torch.equal(one, patches(1, 0))
    assert 0 <= one.min() < 0.05 and 0.95 < one.max() <= 1


def test_the_noise_patch_has_the_size_and_the_places_of_abd_s(victim: Path):
    side = patch_side(AdversaryConfig().magnitude, 64)
    ours = Perturbation("patch", torch.full((3, side, side), 1.0), 64, AdversaryConfig().placement)
    where = []
    for name in ("abd", "noise-patch"):
        bench = Bench(victim, name, ours if name == "abd" else None)
        where.append((bench.defence.perturb(outside(50), FIRST) != UNPAINTED).all(1))
    assert torch.equal(*where) and (where[0].flatten(1).sum(1) == side * side).all()
    assert len(torch.unique(where[0], dim=0)) > 40


@pytest.mark.parametrize("name", ["random-erasing", "gaussian-noise"])
def test_erasing_and_noise_are_drawn_afresh_for_each_image_and_step(name: str, victim: Path):
    settings = {"erase_probability": 1.0} if name == "random-erasing" else {}
    bench = Bench(victim, name, **settings)
    images = torch.full((6, 3, 64, 64), 0.5)
    one, two = (bench.defence.perturb(images, at) for at in (FIRST, SECOND))
    assert len({image.numpy().tobytes() for image in (*one, *two)}) == 12
    assert torch.equal(one, bench.defence.perturb(images, FIRST))
    if name == "gaussian-noise":
        assert (one - images).std().item() == pytest.approx(0.03, rel=0.02)
        assert abs((one - images).mean().item()) < 1e-3


@pytest.mark.parametrize(
    ("place", "corner"),
    [
        ("top-left", (0, 0)),
        ("top-right", (0, 53)),
        ("bottom-left", (53, 0)),
        ("bottom-right", (53, 53)),
        ("centre", (26, 26)),
    ],
)
@pytest.mark.parametrize("stored", [a_patch(), a_patch(placement="fixed", corner=(7, 9))], ids=["random", "fixed"])
def test_a_patch_goes_where_the_setting_says_whatever_its_file_says(place: str, corner: tuple, stored: Perturbation):
    images = placed(stored, place)(outside(4))
    assert list(rectangles(images)) == [(*corner, 11, 11)] * 4
    top, left = corner
    assert torch.equal(images[0, :, top : top + 11, left : left + 11], stored.delta)


def test_a_patch_is_placed_at_random_or_left_where_its_file_says():
    fixed = a_patch(placement="fixed", corner=(7, 9))
    assert list(rectangles(placed(fixed, "stored")(outside(3)))) == [(7, 9, 11, 11)] * 3
    assert len(set(rectangles(placed(fixed, "random")(outside(50), rng(0))))) > 40
    assert placed(a_patch(), "stored").placement == "random"


def test_every_place_of_a_trigger_is_covered_by_a_patch_at_the_place_of_that_name():
    """A trigger no larger than the patch, one pixel off the border as triggers are."""
    for place in CORNERS:
        covered = (placed(a_patch(), place)(outside(1)) != UNPAINTED).all(1)[0]
        start = {"top": 1, "left": 1, "bottom": 64 - 6 - 1, "right": 64 - 6 - 1, "centre": 29}
        top, left = (start[word] for word in (place.split("-") * 2)[:2])
        assert covered[top : top + 6, left : left + 6].all()


@pytest.mark.parametrize("place", ["random", *CORNERS])
def test_an_additive_perturbation_has_no_place_and_is_refused_before_anything_is_made(
    place: str, victim: Path, tmp_path: Path, runs: Path
):
    Perturbation("additive", torch.zeros(3, 64, 64), 64).save(tmp_path / "additive.safetensors")
    with pytest.raises(ConfigError, match=rf"patch_place = '{place}': the perturbation is additive"):
        run("abd", victim, tmp_path / "additive.safetensors", patch_place=place)
    assert not (runs / "defend").exists()


# --- seeds and resume ---------------------------------------------------------------------------------------


@EVERY
def test_the_same_seed_gives_the_same_weights_and_another_seed_others_where_anything_is_drawn(
    name: str, victim: Path, patch: Path
):
    first = run(name, victim, patch)
    made = weights(first)
    again = run(name, victim, patch, force=True)
    assert without_time(again.metrics) == without_time(first.metrics)
    assert differing(weights(again), made) == []
    assert bool(differing(weights(run(name, victim, patch, seed=1)), made)) == (name in TRAINED)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_defence_killed_at_any_step_ends_with_the_weights_of_an_undisturbed_one(
    name: str, victim: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"bank": 24} if name == "roclip" else {}  # smaller than the pairs, so that it turns
    whole = run(name, victim, patch, epochs=4, **settings)
    expected, history = weights(whole), whole.file("history.csv").read_text()
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    steps: list[int] = []
    original = DEFENCES[name].loss

    def killed(self: FineTuningDefence, model: open_clip.CLIP, at: Step) -> torch.Tensor:
        steps.append(at.step)
        value = original(self, model, at)  # its state has changed when the process dies
        if len(steps) in (1, 4, 8):
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr(DEFENCES[name], "loss", killed)
    for attempt in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(name, victim, patch, epochs=4, force=attempt == 0, **settings)
    again = run(name, victim, patch, epochs=4, **settings)
    assert steps == [0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7]
    assert differing(weights(again), expected) == []
    assert again.file("history.csv").read_text() == history
    assert without_time(again.metrics) == without_time(whole.metrics)


def test_the_loss_of_a_batch_reaches_the_weights(victim: Path, fp32: None):
    """One step at batch 16 of plain fine-tuning, done by hand."""
    made = weights(run("ft", victim, limit=32, epochs=1, warmup_steps=0, weight_decay=0.0))
    model = models.load(victim).train()
    pairs = load_pairs(32).subset(0.5, seed=0)
    batch = torch.randperm(16, generator=rng(0, "defend", "order", 0))
    text = tokenize(pairs.captions(batch, seed=0, epoch=0), context_length=model.context_length)
    image = models.encode_image(model, pairs.images(batch, seed=0, step=0))
    clip_loss(image, models.encode_text(model, text), model.logit_scale.exp()).backward()
    before = models.load(victim).state_dict()
    for name, parameter in model.named_parameters():
        step = (made[name] - before[name]).flatten()
        gradient = parameter.grad.flatten()
        strong = gradient.abs() > 1e-4  # Adam's first step is lr against the gradient's sign
        torch.testing.assert_close(step[strong], -1e-3 * gradient[strong].sign(), rtol=0.05, atol=1e-5)


@pytest.mark.parametrize(("processes", "pairs", "batch"), [(1, 100, 64), (1, 40, 40), (3, 100, 63), (4, 100, 64)])
def test_the_batch_of_the_fine_tuned_stand_in_is_shared_out_evenly(
    processes: int, pairs: int, batch: int, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    monkeypatch.setattr(defences.FineTuning, "defend", lambda self, model, folder: seen.append(self.config.batch_size))
    monkeypatch.setattr(models, "save", lambda model, path: None)
    monkeypatch.setattr(defences.ranks, "world", lambda: processes)
    monkeypatch.setattr(defences.ranks, "agreed", bool)  # there is no group to ask
    defences.fine_tuned(models.load(stand_in / "victim.safetensors"), load_pairs(pairs), tmp_path, seed=0)
    assert seen == [batch]
