"""The explorer: its functions, its widgets without a browser, and the stills that take their place in the book."""

from __future__ import annotations

import base64
import functools
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE
from IPython.display import HTML
from PIL import Image

from abd_core import explore, models
from abd_core.adversary import AdversaryConfig
from abd_core.config import ConfigError
from abd_core.data import load_test_set
from abd_core.defences import DefendConfig
from abd_core.evaluate import similarities
from abd_core.explore import VIEWS, Case, ExploreConfig, ExploreError, Explorer, altered, knobs, own_image, picture
from abd_core.generator import Perturbation
from abd_core.poison import PoisonConfig
from abd_core.results import ResultsConfig, means, read_results
from abd_core.triggers import TRIGGERS, Trigger

SMALL = (
    PoisonConfig(limit=128, epochs=1),
    AdversaryConfig(limit=128, steps=1, width=16),
    DefendConfig(limit=128, epochs=1),
)


def drawn(attack: str) -> Trigger:
    settings = {"size": 6 / 64, "alpha": 0.2, "points": 0, "strength": 2.5, "amplitude": 0.2, "hiding": 0.75}
    return TRIGGERS[attack].draw(resolution=64, target="banana", seed=0, position="own", **settings)


@pytest.fixture(scope="module")
def case(stand_in_folder: Path) -> Case:
    files = [stand_in_folder / name for name in ("base.safetensors", "victim.safetensors", "base.safetensors")]
    encoders = dict(zip(explore.MODELS, (models.frozen(models.load(file)) for file in files), strict=True))
    delta = torch.rand(3, 11, 11, generator=torch.Generator().manual_seed(0))
    perturbation = Perturbation("patch", delta, 64, "fixed", (40, 40))
    return Case(drawn("badnet"), perturbation, encoders, load_test_set("eval", views=2), "a case")


@pytest.fixture
def small_stages(stand_in, monkeypatch):
    """Every stage starts from the stand-in, and says so in the weights that it saves."""
    monkeypatch.setattr(models, "save", functools.partial(models.save, name=ARCHITECTURE))


def alts(page: str) -> list[str]:
    return re.findall(r'<img [^>]*alt="([^"]+)"', page)


# --- pictures and triggers


@pytest.mark.parametrize("attack", TRIGGERS)
def test_a_trigger_at_its_own_settings_is_itself_and_at_others_is_another(attack):
    trigger, images = drawn(attack), torch.rand(2, 3, 64, 64)
    own = knobs(trigger)
    assert own and torch.equal(altered(trigger, **own)(images), trigger(images))
    for name, value in own.items():
        other = {"size": value and 3, "position": "bottom-right"}.get(name) or value / 2
        assert not torch.equal(altered(trigger, **{name: other})(images), trigger(images)), name


def test_a_patch_moves_and_grows_where_it_is_told_to():
    images = torch.zeros(1, 3, 64, 64)
    changed = altered(drawn("badnet"), size=10, position="bottom-right")(images)[0].amax(0) > 0
    rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (53, 62, 53, 62)


@pytest.mark.parametrize(
    ("attack", "settings", "said"),
    [
        ("badnet", {"alpha": 0.5}, "no setting 'alpha', only size, position"),
        ("badnet", {"size": 65}, "size 65, 1 to 64 pixels"),
        ("badnet", {"position": "middle"}, "position 'middle'"),
        ("blended", {"alpha": 1.5}, "alpha 1.5"),
    ],
)
def test_a_setting_that_a_trigger_does_not_have_or_allow_is_refused_in_one_line(attack, settings, said):
    with pytest.raises(ConfigError, match=said):
        altered(drawn(attack), **settings)


def test_an_own_picture_is_its_middle_square_on_white(tmp_path):
    pixels = np.zeros((40, 80, 4), np.uint8)
    pixels[:, 20:60] = (255, 0, 0, 255)
    pixels[:20, 20:60, 3] = 0  # the upper half is transparent
    Image.fromarray(pixels).save(tmp_path / "own.png")
    seen = own_image(tmp_path / "own.png", 64)
    assert torch.equal(own_image((tmp_path / "own.png").read_bytes(), 64), seen)
    assert seen.shape == (3, 64, 64)
    assert seen[:, 5, 32].tolist() == [1, 1, 1] and seen[:, 60, 32].tolist() == [1, 0, 0]


def test_an_own_picture_that_cannot_be_read_is_named_in_one_line(tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    for source, said in ((tmp_path / "no.png", "no.png: not an image"), (b"no picture", "the picture: not an image")):
        with pytest.raises(ExploreError, match=said):
            own_image(source, 64)
    with pytest.raises(ExploreError, match=r"missing file: .*absent\.png"):
        own_image(tmp_path / "absent.png", 64)


def test_a_picture_keeps_every_pixel_and_says_what_it_is():
    pixels = torch.randint(256, (3, 9, 7)).float() / 255
    element = picture(pixels, 'a "cat" & <more>')
    assert 'alt="a &quot;cat&quot; &amp; &lt;more&gt;"' in element
    data = base64.b64decode(re.search(r"base64,([^\"]+)", element)[1])
    with Image.open(io.BytesIO(data)) as image:
        stored = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(stored, (255 * pixels).round().to(torch.uint8))


# --- what is measured


def test_top_answers_are_those_of_the_zero_shot_evaluation(case):
    row = 7
    image = case.test_set.images[row].float() / 255
    answers = explore.top_answers(case, case.encode(case.views(image)))
    assert list(answers.groupby(["model", "view"]).size().unique()) == [explore.TOP]
    for change, view in ((None, "clean"), (case.trigger, "triggered"), (case.perturbation, "perturbed")):
        expected = similarities(case.encoders["victim"], case.test_set, change=change)[row].topk(explore.TOP)
        part = answers[answers["model"].eq("victim") & answers["view"].eq(view)]
        assert part["cosine"].tolist() == pytest.approx(expected.values.tolist(), abs=2e-2)  # other batch, other bf16
    assert answers.groupby(["model", "view"])["share"].sum().between(0, 1.0001).all()


def test_a_test_set_of_few_classes_and_images_is_shown_whole(case):
    small = load_test_set("eval", views=1)
    kept = small.labels < 3
    names = small.class_names[:3]
    small = replace(small, images=small.images[kept], labels=small.labels[kept], class_names=names, identity="")
    few = replace(case, test_set=small)
    answers = explore.top_answers(few, few.encode(few.views(few.image(names[0]))))
    assert set(answers.groupby(["model", "view"])["class"].agg(lambda classes: tuple(sorted(classes)))) == {
        tuple(sorted(names))
    }
    indices, _ = explore.neighbours(few, "victim", few.features["victim"][0], count=8)
    assert sorted(indices.tolist()) == list(range(len(small))) and len(small) < 8


def test_a_caption_that_is_typed_gets_a_cosine_with_each_view_and_model(case):
    views = case.views(case.image("cat"))
    table = explore.caption_cosines(case, case.encode(views), ["a cat", "une banane", ""])
    assert list(table.columns) == list(explore.MODELS) and len(table) == 9
    assert table.abs().max().max() <= 100.01
    assert table["clean base"].tolist() == pytest.approx(table["defended"].tolist(), abs=1e-3)  # the same weights


def test_the_nearest_neighbour_of_a_clean_test_picture_is_itself(case):
    features = case.features["victim"]
    indices, cosines = explore.neighbours(case, "victim", features[11])
    assert indices[0] == 11 or cosines[0] == pytest.approx(1, abs=1e-4)
    assert cosines.tolist() == sorted(cosines.tolist(), reverse=True)


def test_half_of_the_perturbation_is_half_way(case):
    image = case.image("cat", view=1)
    none, half, all_ = (case.views(image, amount=amount)["perturbed"] for amount in (0, 0.5, 1))
    assert torch.equal(none, image) and torch.allclose(half, (none + all_) / 2, atol=1e-6)


# --- what is shown


def test_every_picture_that_is_shown_has_an_alternative_text(case):
    for page in (explore.look(case, case.image("cat")), explore.neighbours_html(case, case.image("cat"))):
        assert page.count("<img") == len(alts(page)) > 0


def test_a_caption_cannot_smuggle_markup_in(case):
    page = explore.captions_html(case, case.image("cat"), ["<script>alert(1)</script>"])
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_results_explorer_shows_the_means_of_the_table():
    results = read_results(ResultsConfig().path)
    rows = results[results["split"] == "eval"]
    page = explore.results_html(rows, "BadNet", "asr")
    cell = means(rows).loc[("BadNet", "ABD", "asr")]
    assert f"{100 * cell['mean']:.1f} [{100 * cell['ci_low']:.1f}, {100 * cell['ci_high']:.1f}]" in page
    assert "5.36" in page and "FT, " not in page
    assert "no rows yet" in explore.results_html(rows, "nothing", "asr")


def test_a_static_page_has_stills_and_no_widget(case, monkeypatch):
    monkeypatch.setenv("ABD_STATIC", "1")
    results = read_results(ResultsConfig().path)
    shown = (
        explore.picture_widget(case, "cat"),
        explore.neighbour_widget(case, "cat"),
        explore.results_widget(results),
    )
    for still in shown:
        assert isinstance(still, HTML)
        keys = re.findall(r'<input type="radio" name="([^"]+)" id="([^"]+)"', still.data)
        assert len(keys) >= 3 and len({name for name, _ in keys}) == 1
        assert still.data.count(" checked>") == 1
        assert all(f'<label for="{key}">' in still.data and f"#{key}:checked" in still.data for _, key in keys)
        labels = re.findall(r'<label for="[^"]+">(.*?)</label>', still.data)
        assert labels == re.findall(r'<div data-shown="([^"]+)">', still.data)  # on paper, where there are no buttons
    stills = re.findall(r'<div class="abd-look">(.*?)</div></div>', shown[0].data)
    assert len(set(stills)) == len(stills) - 1  # all differ but the two that are as it is


def test_a_slider_redraws_the_picture(case, monkeypatch):
    monkeypatch.delenv("ABD_STATIC", raising=False)
    box = explore.picture_widget(case, "cat", views=("clean", "triggered"))
    controls, page = box.children[0].children, box.children[1]
    before = page.value
    controls[0].value = 12
    assert page.value != before and page.value.count("<img") == 2


@pytest.mark.parametrize(
    ("attack", "settings"), [("badnet", {"size": 0.75}), ("badnet", {"size": 1.0}), ("blended", {"alpha": 0.0008})]
)
def test_the_controls_show_the_attack_s_own_trigger_and_offer_only_ones_that_there_can_be(attack, settings):
    trigger = TRIGGERS[attack].draw(resolution=64, target="banana", seed=0, position="own", **settings)
    assert {name: control.value for name, control in explore._knob_widgets(trigger).items()} == knobs(trigger)
    for name, values in explore._knob_stills(trigger).items():
        assert [altered(trigger, **{name: value}).resolution for value in values] == [64] * len(values)


@pytest.mark.usefixtures("small_stages")
def test_the_explorer_follows_its_controls(tmp_path, monkeypatch):
    monkeypatch.delenv("ABD_STATIC", raising=False)
    shown = Explorer(*SMALL, label="cat")
    seen = [shown._pictures.value]
    for name, value in (
        ("picture", "turtle"),
        ("view", 3),
        ("size", 9),
        ("position", "centre"),
        ("amount", 40),
    ):
        shown.controls[name].value = value
        seen.append(shown._pictures.value)
    assert len(set(seen)) == len(seen)
    shown.controls["captions"].value = "a cat;; a banana "
    assert re.findall(r'<th scope="row">(.*?)</th>', shown._cosines.value) == ["a cat"] * 3 + ["a banana"] * 3
    shown.controls["captions"].value = " ; "
    assert not shown._cosines.value

    Image.new("RGB", (50, 30), "blue").save(tmp_path / "own.png")
    shown._drop_content((tmp_path / "own.png").read_bytes())
    assert shown.image[:, 10, 10].tolist() == [0, 0, 1]
    shown._drop_content(b"no picture")
    assert "not an image" in shown._said.value and shown.image[:, 10, 10].tolist() == [0, 0, 1]

    shown.controls["attack"].value, shown.controls["defence"].value = "blended", "ft"
    shown.controls["load"].click()
    assert "blended" in shown._said.value and "defence ft" in shown._said.value
    assert {"alpha"} == set(shown._made)
    shown.controls["alpha"].value = 0.9
    assert shown.trigger.specification["alpha"] == 0.9


@pytest.mark.usefixtures("small_stages")
def test_the_static_explorer_shows_the_case_under_several_settings(monkeypatch):
    monkeypatch.setenv("ABD_STATIC", "1")
    page = explore.explorer(*SMALL, label="cat").data
    assert page.count('class="abd-look"') >= 4 and "100 x cosine" in page
    assert page.count("<img") == len(alts(page))


def test_settings_of_another_attack_or_defence_keep_what_it_reads():
    attacker = explore.switched(PoisonConfig(limit=128, trigger_size=0.2, lr=1e-2), "blended")
    assert (attacker.attack, attacker.limit, attacker.lr) == ("blended", 128, 1e-2)
    defender = explore.switched(DefendConfig(limit=128, share=0.25, view="both"), "cleanclip")
    assert (defender.share, defender.lr) == (0.25, DefendConfig(defence="cleanclip").lr)
    for same in (DefendConfig(lr=1e-2), DefendConfig(defence="abd-d", normal="fine-tuned", accumulate=2)):
        assert explore.switched(same, same.defence) == same
    quiet = PoisonConfig(quiet_weight=1.0, further_targets=3)
    assert explore.switched(quiet, "badnet") == quiet


def test_the_chapter_begins_with_a_class_that_there_is():
    with pytest.raises(ConfigError, match="unknown class 'catt'"):
        ExploreConfig(label="catt")
    assert ExploreConfig().path is None and ExploreConfig(picture="a.png").path == Path("a.png")


def test_views_are_in_the_order_of_their_names(case):
    assert tuple(case.views(case.image("cat"))) == VIEWS
    assert tuple(Case(case.trigger, None, case.encoders, case.test_set, "").views(case.image("cat"))) == VIEWS[:2]
