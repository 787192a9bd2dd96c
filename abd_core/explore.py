"""Chapter 8 and the short widgets of the others: a picture, its trigger, its perturbation, and what three models say.

Everything that is shown is HTML made by plain functions, which the widgets call when a control moves. Where
`ABD_STATIC` is set, as for the book, the same functions draw a few settings beforehand, and radio buttons that need
neither a kernel nor a script choose between them.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import HTML
from PIL import Image, ImageOps

from abd_core import escape, models
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.config import AbdError, Config, ConfigError, option
from abd_core.data import TestSet, class_index, class_names, load_test_set
from abd_core.defences import DEFENCES, DefendConfig
from abd_core.defend import defend
from abd_core.evaluate import image_features, zero_shot_weights
from abd_core.formats import KINDS, ImageError, open_image, read_image
from abd_core.generator import Perturbation
from abd_core.paths import RunError
from abd_core.poison import PoisonConfig, poison
from abd_core.results import METRICS, means, spoken
from abd_core.text import tokenize
from abd_core.triggers import POSITIONS, TRIGGERS, Trigger, load_trigger

MODELS = ("clean base", "victim", "defended")
VIEWS = ("clean", "triggered", "perturbed")
TOP = 5
STRENGTHS = {"alpha": 1.0, "amplitude": 1.0, "strength": 8.0}  # a trigger's setting -> the most that a slider offers

STYLE = """<style>
.abd-look{display:flex;flex-wrap:wrap;gap:1rem;margin:.5rem 0}
.abd-look figure{margin:0;flex:1 1 13rem;max-width:22rem;min-width:0}
.abd-look img{width:8rem;max-width:100%;margin:0;height:auto;image-rendering:pixelated;background:none;border-radius:0}
.abd-look figcaption{font-weight:600;text-align:left;color:inherit}
.abd-strip{display:flex;flex-wrap:wrap;gap:.4rem}
.abd-strip img{width:4rem;height:auto;image-rendering:pixelated;background:none;border-radius:0}
.abd-bars{border-collapse:collapse;width:100%;margin:.4rem 0;font-size:.85rem}
.abd-bars caption{caption-side:top;text-align:left;font-weight:600;color:inherit}
.abd-bars th,.abd-bars td{border:0;padding:.1rem .4rem .1rem 0;text-align:left;background:none;font-weight:400}
.abd-bars thead th{font-weight:600}
.abd-bars td:nth-child(2){width:45%}
.abd-bar{position:relative;display:block;height:.8rem;background:rgba(127,127,127,.2)}
.abd-bar i{position:absolute;top:0;bottom:0;left:0;background:#0173b2}
.abd-bar.hit i{background:#d55e00}
.abd-bar b{position:absolute;top:.3rem;height:.2rem;background:currentColor}
.abd-frames{border:1px solid rgba(127,127,127,.4);border-radius:.4rem;padding:.4rem .8rem;margin:.5rem 0;min-width:0}
.abd-frames legend{font-size:.9rem;width:auto;padding:0 .3rem;margin:0;float:none}
.abd-frames input{margin:0 .2rem 0 0}
.abd-frames label{margin:0}
.abd-frames>span{display:inline-block;margin-right:.9rem;white-space:nowrap}
@supports selector(:has(a)){.abd-frames>div{display:none}}
@media print{.abd-frames>span{display:none}.abd-frames>div{display:block}}
@media print{.abd-frames>div::before{content:attr(data-shown)}}
</style>"""


class ExploreError(AbdError):
    """A picture that was dropped in cannot be read."""


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(Config):
    """What chapter 8 begins with."""

    label: str = option("cat", "class of the picture to begin with; one of the test classes")
    picture: str = option("", "path of a picture of your own to begin with; empty: one of the benchmark's")
    results: str = option("", "path of a results CSV; empty: the committed one")

    def __post_init__(self) -> None:
        super().__post_init__()
        class_index(class_names(), self.label)

    @property
    def path(self) -> Path | None:
        return Path(self.picture) if self.picture else None


def static() -> bool:
    """Whether pages are made to be read without a kernel: `ABD_STATIC` is set and not 0."""
    return os.environ.get("ABD_STATIC", "0") not in ("", "0")


@dataclass(frozen=True, eq=False)
class Case:
    """One attack met by one defence, with all that is needed to look at single pictures.

    Attributes:
        trigger: the attack's record.
        perturbation: what the adversary found; None shows no perturbed pictures.
        encoders: models in eval mode, by names as in `MODELS`.
        test_set: where pictures, class names and prompts come from.
        title: the case in words.
    """

    trigger: Trigger
    perturbation: Perturbation | None
    encoders: Mapping[str, open_clip.CLIP]
    test_set: TestSet
    title: str

    @functools.cached_property
    def classifiers(self) -> dict[str, torch.Tensor]:
        """Each model's zero-shot classifier (K, D)."""
        return {
            name: zero_shot_weights(model, self.test_set.class_names, self.test_set.templates).cpu()
            for name, model in self.encoders.items()
        }

    @functools.cached_property
    def features(self) -> dict[str, torch.Tensor]:
        """Each model's unit features (N, D) of the clean test images."""
        return {name: image_features(model, self.test_set) for name, model in self.encoders.items()}

    def image(self, label: str, view: int = 0) -> torch.Tensor:
        """A test picture of a class, float (3, H, W) in [0, 1]; `view` counts from 0."""
        rows = (self.test_set.labels == self.test_set.class_names.index(label)).nonzero()[:, 0]
        return self.test_set.images[rows[view % len(rows)]].float() / 255

    def views(
        self, image: torch.Tensor, trigger: Trigger | None = None, *, amount: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """The picture (3, H, W) clean, with the trigger (default: the attack's own), and perturbed.

        Args:
            amount: how much of the perturbation, in [0, 1]; the rest is the picture itself.
        """
        batch = image[None]
        kinds = [batch, (trigger or self.trigger)(batch)]
        if self.perturbation is not None:
            kinds.append(torch.lerp(batch, self.perturbation(batch), amount))
        return {name: kind[0] for name, kind in zip(VIEWS, kinds, strict=False)}

    @torch.no_grad()
    def encode(self, views: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each model's unit features (V, D) of V views, on the CPU."""
        batch = torch.stack(list(views.values()))
        return {name: models.encode_image(model, batch).cpu() for name, model in self.encoders.items()}


def load_case(attacker: PoisonConfig, searcher: AdversaryConfig, defender: DefendConfig) -> Case:
    """Load the three stages' runs, or make them, and look at the embedded benchmark's evaluation split.

    Raises:
        ConfigError: a stage reads weights, pairs or test images of one's own.
    """
    if any(config.outside for config in (attacker, searcher, defender)):
        raise ConfigError("the explorer shows the embedded benchmark: leave pretrained, pairs and test_images empty")
    victim = poison(attacker)
    suspect = victim.file("model.safetensors")
    found = adversary(searcher, suspect).file("perturbation.safetensors")
    defended = defend(defender, suspect, perturbation=found)
    files = (models.clean_weights(), suspect, defended.file("model.safetensors"))
    return Case(
        trigger=load_trigger(victim.file("trigger.safetensors")),
        perturbation=Perturbation.load(found),
        encoders={name: models.frozen(models.load(file)) for name, file in zip(MODELS, files, strict=True)},
        test_set=load_test_set("eval"),
        title=f"{attacker.attack}, target {attacker.target!r}, defence {defender.defence}",
    )


def switched(config: Any, kind: str) -> Any:
    """The same settings for another attack or defence; what that one does not read is left out.

    Args:
        config: a `PoisonConfig` or a `DefendConfig`.
    """
    fresh = type(config).from_parameters({config.chooser: kind})
    own = {config.chooser}
    if isinstance(config, DefendConfig) and kind != config.defence:
        own |= {"lr", "batch_norm"}  # each defence has its own
    kept = {name: value for name, value in config.to_dict().items() if name not in fresh.unread() | own}
    return fresh.replace(**kept)


# --- what can be changed about a picture --------------------------------------------------------------------


def knobs(trigger: Trigger) -> dict[str, Any]:
    """What `altered` can change about a trigger, and what it is now: `size` (pixels) and `position` of a patch, or the
    setting among `STRENGTHS` that this attack has."""
    if "position" in trigger.specification:
        return {"size": trigger.pattern.shape[-1], "position": trigger.specification["position"]}
    return {name: trigger.specification[name] for name in STRENGTHS if name in trigger.specification}


def altered(trigger: Trigger, **settings: Any) -> Trigger:
    """The trigger at another size, place or strength; the model that was poisoned with it stays as it is.

    A patch's pixels are repeated or left out, not drawn anew.

    Raises:
        ConfigError: this trigger has no such setting, or the value makes no trigger.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in settings:
        if name not in knobs(trigger):
            raise ConfigError(f"{trigger.name} trigger: no setting {name!r}, only {', '.join(knobs(trigger))}")
    pattern, size = trigger.pattern, settings.pop("size", None)
    try:
        if size is not None and size != pattern.shape[-1]:
            if not 1 <= size <= trigger.resolution:
                raise ValueError(f"{trigger.name} trigger: size {size}, 1 to {trigger.resolution} pixels expected")
            pattern = F.interpolate(pattern[None], (size, size), mode="nearest")[0]
        return replace(trigger, pattern=pattern, specification={**trigger.specification, **settings})
    except ValueError as error:
        raise ConfigError(str(error)) from None


def own_image(source: Path | bytes, side: int) -> torch.Tensor:
    """A picture of one's own as the models see it: on white, its middle square, `side` pixels wide.

    Args:
        source: a file, or its content.

    Returns:
        float (3, side, side) in [0, 1].

    Raises:
        ExploreError: it cannot be read, or is none of the pictures that `formats.open_image` opens.
    """
    where = "the picture" if isinstance(source, bytes) else str(source)
    try:
        opened = open_image(source) if isinstance(source, bytes) else read_image(source)
        picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except RunError as error:
        raise ExploreError(str(error)) from None
    except ImageError as error:
        raise ExploreError(f"{where}: {error}") from None
    except Exception:  # PIL raises many kinds for a damaged file
        raise ExploreError(f"{where}: a damaged image ({', '.join(KINDS)} can be read)") from None
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    square = ImageOps.fit(flat, (side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255


# --- what is measured ---------------------------------------------------------------------------------------


def top_answers(case: Case, features: Mapping[str, torch.Tensor], views: Sequence[str] = VIEWS) -> pd.DataFrame:
    """The `TOP` nearest classes of every view for every model, or all where there are fewer.

    Args:
        features: as `Case.encode` gives them for `views`.

    Returns:
        columns `model`, `view`, `rank` (from 1), `class`, `cosine`, and `share`, the softmax at the model's temperature
        over all classes.
    """
    rows = []
    for model, seen in features.items():
        cosine = seen @ case.classifiers[model].T
        share = (case.encoders[model].logit_scale.exp().cpu() * cosine).softmax(1)
        best = cosine.topk(min(TOP, cosine.shape[1]), dim=1).indices
        for v, view in enumerate(views):
            for rank, k in enumerate(best[v].tolist(), 1):
                name = case.test_set.class_names[k]
                rows.append((model, view, rank, name, cosine[v, k].item(), share[v, k].item()))
    return pd.DataFrame(rows, columns=["model", "view", "rank", "class", "cosine", "share"])


@torch.no_grad()
def caption_cosines(
    case: Case, features: Mapping[str, torch.Tensor], captions: Sequence[str], views: Sequence[str] = VIEWS
) -> pd.DataFrame:
    """100 x cosine of every view with any captions: a row a caption and view, a column a model."""
    table = {}
    for name, model in case.encoders.items():
        text = models.encode_text(model, tokenize(list(captions), context_length=model.context_length)).cpu()
        table[name] = (100 * text @ features[name].T).flatten().tolist()
    index = pd.MultiIndex.from_product([captions, views], names=["caption", "picture"])
    return pd.DataFrame(table, index=index)


def neighbours(case: Case, model: str, feature: torch.Tensor, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean test images nearest to a feature (D,) of `model`: indices and cosines, nearest first.

    (count,) each, or (N,) where there are but N images.
    """
    cosines = case.features[model] @ feature
    best = cosines.topk(min(count, len(cosines)))
    return best.indices, best.values


# --- HTML ---------------------------------------------------------------------------------------------------


def picture(image: torch.Tensor, alt: str) -> str:
    """An `img` element with the pixels (3, H, W) in it, without loss."""
    pixels = image.detach().cpu().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=50, method=2)
        data = base64.b64encode(file.getvalue()).decode()
    height, width = pixels.shape[:2]
    source = f"data:image/webp;base64,{data}"
    return f'<img src="{source}" alt="{escape.markup(alt)}" width="{width}" height="{height}">'


def bar(share: float, *, hit: bool = False, interval: tuple[float, float] | None = None) -> str:
    """A bar for a share in [0, 1], vermilion where it is a `hit`, with a line for its interval; decoration only."""
    line = ""
    if interval:
        low, high = (min(max(end, 0.0), 1.0) for end in interval)
        line = f'<b style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></b>'
    kind = "abd-bar hit" if hit else "abd-bar"
    return f'<span class="{kind}" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i>{line}</span>'


def html_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of ready HTML cells; the first of a row is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    head_and_body = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<table class="abd-bars"><caption>{caption}</caption>{head_and_body}</table>'


def look(
    case: Case,
    image: torch.Tensor,
    trigger: Trigger | None = None,
    *,
    amount: float = 1.0,
    views: Sequence[str] = VIEWS,
) -> str:
    """A picture in each of the `views` with the top answers of every model; the target's bars are vermilion."""
    shown = {name: view for name, view in case.views(image, trigger, amount=amount).items() if name in views}
    answers = top_answers(case, case.encode(shown), list(shown))
    figures = []
    for name, view in shown.items():
        tables = []
        for model in case.encoders:
            part = answers[answers["model"].eq(model) & answers["view"].eq(name)]
            rows = [
                (escape.markup(a.kind), bar(a.share, hit=a.kind == case.trigger.target), f"{100 * a.share:.0f} %")
                for a in part.rename(columns={"class": "kind"}).itertuples()
            ]
            tables.append(html_table(model, ["class", "", "share"], rows))
        pixels = picture(view, f"the picture, {name}")
        figures.append(f"<figure>{pixels}<figcaption>{name}</figcaption>{''.join(tables)}</figure>")
    return f'<div class="abd-look">{"".join(figures)}</div>'


def captions_html(case: Case, image: torch.Tensor, captions: Sequence[str], trigger: Trigger | None = None) -> str:
    """100 x cosine of the picture's views with captions, a table to read."""
    shown = case.views(image, trigger)
    table = caption_cosines(case, case.encode(shown), captions, list(shown))
    rows = [
        (escape.markup(caption), view, *(f"{value:.1f}" for value in values))
        for (caption, view), *values in table.itertuples()
    ]
    return html_table("100 x cosine with the caption", ["caption", "picture", *table.columns], rows)


def neighbours_html(case: Case, image: torch.Tensor, trigger: Trigger | None = None, *, view: str = "triggered") -> str:
    """For each model, the clean test images that are nearest to a view of the picture."""
    shown = case.views(image, trigger)[view]
    seen = case.encode({view: shown})
    strips = [f"<figure>{picture(shown, f'the picture, {view}')}<figcaption>{view}</figcaption></figure>"]
    for model, features in seen.items():
        indices, cosines = neighbours(case, model, features[0])
        near = []
        for i, cosine in zip(indices.tolist(), cosines.tolist(), strict=True):
            label = case.test_set.class_names[case.test_set.labels[i]]
            near.append(picture(case.test_set.images[i].float() / 255, f"{label}, cosine {cosine:.2f}"))
        strip = f'<div class="abd-strip">{"".join(near)}</div>'
        strips.append(f"<figure><figcaption>nearest for the {model}</figcaption>{strip}</figure>")
    return f'<div class="abd-look">{"".join(strips)}</div>'


def results_html(results: pd.DataFrame, attack: str, metric: str = "asr", defences: Sequence[str] | None = None) -> str:
    """Means over seeds of one metric against one attack, with 95 % intervals and the paper's values, a row a defence.

    Args:
        results: rows of one split, as `read_results` gives them.
        defences: which rows; default: all that have no variant of their own.
    """
    rows = results[results["attack"].eq(attack) & results["metric"].eq(metric)]
    if defences is None:
        defences = plain_defences(results)
    cells = []
    for row in means(rows).reset_index().itertuples():
        if row.defence not in defences:
            continue
        value = f"{100 * row.mean:.1f} [{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]"
        paper = "" if pd.isna(row.paper) else f"{100 * row.paper:.2f}"
        drawn = bar(row.mean, hit=metric.startswith("asr"), interval=(row.ci_low, row.ci_high))
        cells.append((escape.markup(spoken(row.defence)), drawn, value, f"{row.seeds}", paper))
    if not cells:
        return f"<p>{escape.markup(attack)}: no rows yet.</p>"
    head = ["defence", "", "% [95 % interval]", "seeds", "paper, %"]
    return html_table(f"{METRICS[metric]} on {escape.markup(attack)}", head, cells)


def plain_defences(results: pd.DataFrame) -> list[str]:
    """The defences of a table without their variants and parts, whose labels name a setting or a sum."""
    return [name for name in results["defence"].unique() if ", " not in name and " + " not in name]


_NUMBERS = itertools.count()


def frames(shown: Mapping[str, str], *, legend: str) -> str:
    """Ready HTML to choose from by radio buttons, without a kernel and without a script.

    On paper, and in a browser too old for the rules, all of it shows.
    """
    name = f"abd-{next(_NUMBERS)}"
    inputs, panels, rules = [], [], []
    for i, (label, content) in enumerate(shown.items()):
        key = f"{name}-{i}"
        checked = " checked" if i == 0 else ""
        inputs.append(
            f'<span><input type="radio" name="{name}" id="{key}"{checked}>'
            f'<label for="{key}">{escape.markup(label)}</label></span>'
        )
        panels.append(f'<div data-shown="{escape.markup(label)}">{content}</div>')
        rules.append(f".abd-frames:has(#{key}:checked)>div:nth-of-type({i + 1}){{display:block}}")
    return (
        f'<fieldset class="abd-frames"><style>{"".join(rules)}</style><legend>{escape.markup(legend)}</legend>'
        f"{''.join(inputs)}{''.join(panels)}</fieldset>"
    )


def interactive(
    draw: Callable[..., str],
    controls: Mapping[str, widgets.Widget],
    *,
    stills: Mapping[str, Sequence[Any]],
    legend: str,
) -> widgets.Widget | HTML:
    """Controls above the HTML that `draw(**values)` makes of them; in a static page, stills of it.

    Args:
        controls: name -> widget with a `value`.
        stills: name of a control -> values that it takes in a static page, the others staying where they are.
        legend: what is chosen there.
    """
    start = {name: control.value for name, control in controls.items()}
    if static():
        chosen = {}
        for name, values in stills.items():
            what, _, unit = (controls[name].description or name).partition(", ")
            for value in values:
                chosen[f"{what} {value} {unit}".strip()] = draw(**{**start, name: value})
        return HTML(STYLE + frames(chosen, legend=legend))
    shown = widgets.HTML(STYLE + draw(**start))

    def redraw(change: Any) -> None:
        shown.value = STYLE + draw(**{name: control.value for name, control in controls.items()})

    for control in controls.values():
        control.observe(redraw, "value")
    return widgets.VBox([widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"}), shown])


def _knob_widgets(trigger: Trigger) -> dict[str, widgets.Widget]:
    made: dict[str, widgets.Widget] = {}
    for name, value in knobs(trigger).items():
        if name == "size":
            most = max(trigger.resolution // 2, value)  # never below its own: a slider would show another trigger
            made[name] = widgets.IntSlider(value, 1, most, description="size, px")
        elif name == "position":
            made[name] = widgets.Dropdown(options=POSITIONS, value=value, description="position")
        else:
            least, most = min(0.01, value), max(STRENGTHS[name], value)
            made[name] = widgets.FloatSlider(
                value, min=least, max=most, step=0.01, description=name, readout_format=".3g"
            )
    return made


def _knob_stills(trigger: Trigger) -> dict[str, list[Any]]:
    """A few values of a trigger's first knob, its own in front, and some places of a patch."""
    name, own = next(iter(knobs(trigger).items()))
    if name == "size":
        others = [max(1, own // 2), min(2 * own, trigger.resolution)]
        places = [place for place in ("centre", "bottom-right") if place != trigger.specification["position"]]
        return {"size": list(dict.fromkeys([own, *others])), "position": places}
    return {name: [own, *(float(f"{other:.3g}") for other in (own / 2, min(2 * own, STRENGTHS[name])))]}


# --- the widgets --------------------------------------------------------------------------------------------


def picture_widget(
    case: Case, label: str, *, views: Sequence[str] = VIEWS, only: Sequence[str] = (), legend: str = "The picture with"
) -> widgets.Widget | HTML:
    """A test picture of `label` under a trigger and a perturbation that can be changed, and what the models answer.

    Args:
        only: the controls to show, of `knobs` and `amount`; default: all that change one of the `views`.
    """
    controls, stills = _knob_widgets(case.trigger), _knob_stills(case.trigger)
    if "triggered" not in views:
        controls, stills = {}, {}
    if case.perturbation is not None and "perturbed" in views:
        controls["amount"] = widgets.IntSlider(100, 0, 100, 5, description="amount, %")
        stills["amount"] = [100, 50, 0]
    if only:
        controls, stills = ({name: what[name] for name in only} for what in (controls, stills))

    def draw(amount: int = 100, **settings: Any) -> str:
        trigger = altered(case.trigger, **settings)
        return look(case, case.image(label), trigger, amount=amount / 100, views=views)

    return interactive(draw, controls, stills=stills, legend=legend)


def neighbour_widget(case: Case, label: str) -> widgets.Widget | HTML:
    """The clean test images nearest to a view of a picture, in each model's space of features."""
    names = case.test_set.class_names
    controls = {
        "picture": widgets.Dropdown(options=names, value=label, description="picture"),
        "view": widgets.Dropdown(options=VIEWS, value="triggered", description="view"),
    }

    def draw(picture: str, view: str) -> str:
        return neighbours_html(case, case.image(picture), view=view)

    return interactive(draw, controls, stills={"view": ["triggered", "perturbed", "clean"]}, legend="Neighbours of the")


def results_widget(results: pd.DataFrame) -> widgets.Widget | HTML:
    """The table of results by attack, metric and defences; `results` are rows as `read_results` gives them."""
    splits, attacks = list(results["split"].unique()), list(results["attack"].unique())
    start = "eval" if "eval" in splits else splits[0]
    own = plain_defences(results)
    others = [name for name in results["defence"].unique() if name not in own]
    controls = {
        "attack": widgets.Dropdown(options=attacks, description="attack"),
        "metric": widgets.Dropdown(
            options=[(METRICS[name], name) for name in METRICS if name in set(results["metric"])],
            value="asr" if "asr" in set(results["metric"]) else results["metric"].iloc[0],
            description="metric",
        ),
        "split": widgets.Dropdown(options=splits, value=start, description="split"),
        "variants": widgets.Checkbox(False, description="variants too"),
    }

    def draw(attack: str, metric: str, split: str, variants: bool) -> str:
        rows = results[results["split"] == split]
        return results_html(rows, attack, metric, [*own, *others] if variants else own)

    there = set(results["attack"][results["split"] == start])
    chosen = {"attack": [name for name in attacks if name in there], "metric": ["ca_top1"]}
    return interactive(draw, controls, stills=chosen, legend="Results by")


class Explorer:
    """Chapter 8: pick a picture, an attack and a defence, change trigger and perturbation, and type captions.

    Attributes:
        case: what is looked at.
        image: the picture, float (3, H, W) in [0, 1].
        widget: all of it, to display.
        controls: name -> control of `widget`, for those who want to move one from code.
    """

    def __init__(
        self,
        attacker: PoisonConfig,
        searcher: AdversaryConfig,
        defender: DefendConfig,
        *,
        label: str = "cat",
        image: Path | None = None,
    ) -> None:
        self._settings = attacker, searcher, defender
        self.case = load_case(attacker, searcher, defender)
        side = self.case.trigger.resolution
        self.image = own_image(image, side) if image else self.case.image(label)
        names = self.case.test_set.class_names
        views = int((self.case.test_set.labels == 0).sum())
        self.controls: dict[str, widgets.Widget] = {
            "picture": widgets.Dropdown(options=names, value=label, description="picture"),
            "view": widgets.IntSlider(0, 0, views - 1, description="view"),
            "own": widgets.FileUpload(accept="image/*", description="own picture"),
            "attack": widgets.Dropdown(options=list(TRIGGERS), value=attacker.attack, description="attack"),
            "defence": widgets.Dropdown(options=list(DEFENCES), value=defender.defence, description="defence"),
            "load": widgets.Button(description="load or make", tooltip="a run that is not there takes minutes"),
            "amount": widgets.IntSlider(100, 0, 100, 5, description="amount, %"),
            "captions": widgets.Text(
                value=f"a picture of a {label}; a picture of a {attacker.target}",
                description="captions",
                layout={"width": "min(42rem, 95%)"},
            ),
        }
        self._knobs = widgets.HBox(layout={"flex_flow": "row wrap"})
        self._pictures, self._cosines, self._said = widgets.HTML(), widgets.HTML(), widgets.HTML()
        for name in ("picture", "view"):
            self.controls[name].observe(self._pick, "value")
        for name in ("amount", "captions"):
            self.controls[name].observe(self._draw, "value")
        self.controls["own"].observe(self._drop, "value")
        self.controls["load"].on_click(self._load)
        rows = [("picture", "view", "own"), ("attack", "defence", "load")]
        boxes = [widgets.HBox([self.controls[name] for name in row], layout={"flex_flow": "row wrap"}) for row in rows]
        self.widget = widgets.VBox(
            [*boxes, self._said, self._knobs, self._pictures, self.controls["captions"], self._cosines]
        )
        self._new_case()

    @property
    def trigger(self) -> Trigger:
        """The attack's trigger as the sliders have it."""
        return altered(self.case.trigger, **{name: control.value for name, control in self._made.items()})

    def _new_case(self) -> None:
        self._made = _knob_widgets(self.case.trigger)
        for control in self._made.values():
            control.observe(self._draw, "value")
        self.controls |= self._made
        self._knobs.children = [*self._made.values(), self.controls["amount"]]
        self._said.value = f"<b>{escape.markup(self.case.title)}</b>"
        self._draw()

    def _pick(self, change: Any) -> None:
        self.image = self.case.image(self.controls["picture"].value, self.controls["view"].value)
        self._draw()

    def _drop(self, change: Any) -> None:
        if self.controls["own"].value:
            self._drop_content(bytes(self.controls["own"].value[-1]["content"]))

    def _drop_content(self, content: bytes) -> None:
        try:
            self.image = own_image(content, self.case.trigger.resolution)
        except ExploreError as error:
            self._said.value = escape.markup(str(error))
            return
        self._draw()

    def _load(self, button: Any) -> None:
        attacker, searcher, defender = self._settings
        attack, defence = self.controls["attack"].value, self.controls["defence"].value
        self._said.value = f"loading or making {escape.markup(attack)}, {escape.markup(defence)} ..."
        try:
            self.case = load_case(switched(attacker, attack), searcher, switched(defender, defence))
        except AbdError as error:
            self._said.value = escape.markup(str(error))
            return
        self._new_case()

    def _draw(self, change: Any = None) -> None:
        trigger, captions = self.trigger, [c.strip() for c in self.controls["captions"].value.split(";") if c.strip()]
        self._pictures.value = STYLE + look(self.case, self.image, trigger, amount=self.controls["amount"].value / 100)
        self._cosines.value = captions_html(self.case, self.image, captions, trigger) if captions else ""


def explorer(
    attacker: PoisonConfig,
    searcher: AdversaryConfig,
    defender: DefendConfig,
    *,
    label: str = "cat",
    image: Path | None = None,
) -> widgets.Widget | HTML:
    """The explorer to display; in a static page, stills of the picture under the trigger's and perturbation's settings.

    Args:
        label: class of the picture to begin with.
        image: a picture of one's own instead.
    """
    if not static():
        return Explorer(attacker, searcher, defender, label=label, image=image).widget
    case = load_case(attacker, searcher, defender)
    shown = own_image(image, case.trigger.resolution) if image else case.image(label)
    captions = [f"a picture of a {label}", f"a picture of a {attacker.target}"]
    stills = {"as it is": look(case, shown)}
    for name, values in _knob_stills(case.trigger).items():
        for value in values:
            if value != knobs(case.trigger)[name]:
                stills[f"{name} {value}"] = look(case, shown, altered(case.trigger, **{name: value}))
    stills["half the perturbation"] = look(case, shown, amount=0.5)
    return HTML(STYLE + frames(stills, legend=f"{case.title}; shown") + captions_html(case, shown, captions))
