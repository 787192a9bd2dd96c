# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 0. The benchmark: real pictures, real captions, and a small CLIP that reads them
#
# **Question.** On what can a backdoor in a CLIP be planted and removed within minutes, on a machine with no GPU,
# without any download?
#
# The paper {cite}`kuang2024abd` works with CC3M and ImageNet, which cannot be shipped. This repository carries a
# stand-in: the world's emoji. Several houses have drawn the same concepts, each in its own hand, and Unicode has
# given every concept a name and keywords. So there are pictures and captions, and there is an honest test: pictures
# by an artist from whom no model has seen anything.
#
# This chapter shows the data, then the clean CLIP {cite}`radford2021clip` that all other chapters start from. By
# default the clean CLIP is loaded from `data/base/`; `papermill book/00_benchmark.ipynb out.ipynb -p retrain true`
# trains it anew by the same recipe.

# %% tags=["parameters"]
seed: int = 0  # seed of every random draw
retrain: bool = False  # train the base anew instead of loading the committed one
epochs: int = 60  # passes over the pairs; another value than the committed base's needs retrain
batch_size: int = 128  # pairs a step; likewise
lr: float = 1e-3  # peak learning rate; likewise
model: str = ""  # open_clip architecture to train, with retrain; "": the committed base's
limit: int = 0  # use only this many pairs, seeded (0: all); for smoke runs, with retrain

# %% [markdown]
# The next cell checks the parameters, shows the whole recipe of the clean base, and loads or trains it.

# %%
from abd_core.notebook import show_configs, stage_configs
from abd_core.pretrain import PretrainConfig, pretrain

(config,) = stage_configs(globals(), pretrain=PretrainConfig)
show_configs(config)
base = pretrain(config)

# %% [markdown]
# ## What the data is
#
# Pictures come from seven sets of emoji by five houses, names and keywords from Unicode's CLDR. The split goes by
# house: two houses are held out whole. `dev` is for choosing defaults; `eval` is for reporting, and nothing is chosen
# on it. No house stands on two sides.

# %%
import pandas as pd
import torch

from abd_core import models, plots
from abd_core.data import TEST_VENDORS, TRAIN_VENDORS, artwork, load_pairs, load_test_set
from abd_core.paths import data_dir

plots.style()
concepts = pd.read_csv(data_dir() / "emoji.csv", dtype=str)
classes = pd.read_csv(data_dir() / "classes.csv")
split = {vendor: "train" for vendor in TRAIN_VENDORS} | {vendor: name for name, vendor in TEST_VENDORS.items()}

# %% tags=["nbval-check-output"]
drawn = concepts[list(split)].notna()
in_test = concepts.hexcode.isin(classes.hexcode)
counts = pd.DataFrame({"split": split, "images": drawn.sum(), "of the test classes": drawn[in_test].sum()})
views_of = {name: f"{len(load_test_set(name))} views of the test classes" for name in TEST_VENDORS}
counts["used as"] = [views_of.get(name, "training pairs") for name in counts.split]
counts.rename_axis("vendor")

# %% [markdown]
# The test classes were chosen by a rule that was fixed before any model was trained: every vendor draws the concept,
# its name has one or two words, it is a thing that can be drawn, and its name shares no word with another class. From
# what the rule admits, they were drawn with a fixed seed (`data/build.py`).

# %% tags=["nbval-check-output"]
pd.set_option("display.max_colwidth", None)
by_group = classes.groupby("group", sort=False).label
pd.DataFrame({"classes": by_group.size(), "names": by_group.agg(", ".join)})

# %% [markdown]
# ## The same concepts in seven hands

# %% mystnb={"figure": {"caption": "The same ten concepts in seven hands. Rows marked *train* are for training; *dev* and *eval* are held out whole."}, "image": {"alt": "Ten emoji as seven vendors draw them, a row a vendor"}}
def on_white(vendor, labels):
    """The vendor's artworks of the named concepts on white: float (N, 3, 64, 64) in [0, 1]."""
    cells = concepts.set_index("label").loc[labels, vendor].astype(int).tolist()
    pixels = artwork(vendor)[cells].float() / 255
    return pixels[:, :3] * pixels[:, 3:] + 1 - pixels[:, 3:]


shown = ["banana", "cat", "turtle", "sushi", "tent", "bus", "trophy", "trumpet", "camera", "candle"]
plots.images(
    {f"{vendor} ({name})": on_white(vendor, shown) for vendor, name in split.items()},
    title="A row a vendor: " + ", ".join(shown),
);

# %% [markdown]
# Some houses draw alike and some do not. The two sets by Google (`noto`, `noto-v1`) and the two by Microsoft
# (`fluent-emoji`, `fluent-emoji-flat`) are related, so they are all for training.
#
# ## Captions
#
# A caption is a template with the concept's name, and in about half of the cases one or two keywords. It is drawn
# afresh each epoch.

# %%
pairs = load_pairs()
first = torch.tensor([pairs.labels.index(label) for label in shown])
captions = {f"epoch {e + 1}": pairs.captions(first[:4], seed=config.seed, epoch=e) for e in range(5)}
pd.DataFrame(captions, index=shown[:4]).T

# %% [markdown]
# ## Views
#
# No model sees an artwork as it is. For training, each step makes a new *view*: a random background with a faint
# texture, a turn, a scale, a shift, at times a mirror image, other colours, or grey.

# %% mystnb={"figure": {"caption": "Training views: background, place, size and colours change with every step."}, "image": {"alt": "Ten artworks and four random training views of each"}}
views = {f"view at step {step}": pairs.images(first, seed=config.seed, step=step) for step in range(1, 5)}
plots.images({"artwork": on_white(pairs.cells[first[0]][0], shown), **views}, title="Training views of one batch");

# %% [markdown]
# For testing, every class has ten fixed views of its one artwork by the held-out vendor. They have a background and a
# small turn, scale and shift; they keep their colours and are never mirrored. Ten views of one drawing are not ten
# independent pictures; the intervals below allow for that.

# %% mystnb={"figure": {"caption": "Test views: ten of every class and split, the same in every run."}, "image": {"alt": "Ten fixed test views each of banana, cat and turtle by both held-out vendors"}}
tests = {name: load_test_set(name) for name in TEST_VENDORS}
rows = {
    f"{name}: {label}": test.images[test.labels == test.class_names.index(label)].float() / 255
    for label in shown[:3]
    for name, test in tests.items()
}
plots.images(rows, title="Test views, all ten of a class: 64 x 64 pixels");

# %% [markdown]
# ## The clean base
#
# The model is an open_clip CLIP {cite}`ilharco2021openclip` of the family that the paper uses: a ModifiedResNet for
# images, a transformer for texts, only much smaller (`abd_core/model_configs/emoji-rn14.json`). It was trained from
# scratch on the training pairs with CLIP's loss, by the recipe that the settings above show, and is stored in half
# precision.

# %%
published = models.clean_weights()
weights = base.file("model.safetensors") if config.retrain else published
model = models.load(weights)
parts = {"image tower": model.visual, "token embedding": model.token_embedding, "text transformer": model.transformer}
sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in {**parts, "whole model": model}.items()}
pd.DataFrame({"million parameters": pd.Series(sizes) / 1e6}).round(2)

# %% mystnb={"figure": {"caption": "How the clean base was trained."}, "image": {"alt": "Three curves over epochs: the loss falls, the logit scale and clean accuracy on the development split rise"}}
history = pd.read_csv(base.file("history.csv")).assign(dev_ca=lambda h: 100 * h.dev_ca)
history = history.rename(columns={"dev_ca": "CA on dev, %", "logit_scale": "logit scale"})
panels = [["loss"], ["logit scale"], ["CA on dev, %"]]
plots.curves(history, x="epoch", panels=panels, title="Training of the clean base");

# %% [markdown]
# ## How well does it read?
#
# Clean accuracy (CA) is zero-shot: an image goes to the class whose prompts are nearest to it, with no trained
# classifier. The concepts are not new to the model, which has seen other artists' drawings of them; the artist is.
# Top-5 and top-10 ask whether the right class is among the nearest five or ten. The intervals are Wilson's
# {cite}`wilson1927interval` at the effective sample size of a sample that is clustered by class
# (`abd_core.evaluate.rate`).
#
# The figures are computed here from the stored weights. With `retrain`, the new model stands beside the committed one.

# %%
from abd_core.evaluate import EvaluateConfig, measure, rate, similarities

measured = {"committed": published} | ({"retrained": weights} if config.retrain else {})
evaluations = {
    f"{label}, {name}": measure(path, config=EvaluateConfig(split=name)).metrics
    for label, path in measured.items()
    for name in TEST_VENDORS
}
plots.wide_table(evaluations)

# %% mystnb={"figure": {"caption": "Zero-shot accuracy of the clean base with 95 % intervals. The paper's victims, CLIP's RN50 on ImageNet, have a top-1 CA of 58.48 to 58.69 %."}, "image": {"alt": "Bars of top-1, top-5 and top-10 clean accuracy of the clean base on both splits"}}
plots.bars(evaluations, title="Clean base: zero-shot accuracy", metrics=("ca_top1", "ca_top5", "ca_top10"));

# %% [markdown]
# ## What is easy, what is hard
#
# The same top-1 accuracy on the evaluation split by group of classes, and the classes that it misses most with the
# answer it gives instead.

# %% mystnb={"figure": {"caption": "Top-1 clean accuracy by group of classes, with 95 % intervals."}, "image": {"alt": "Horizontal bars of top-1 clean accuracy for each group of classes"}}
from dataclasses import asdict

test = tests["eval"]
answers = similarities(model, test).argmax(1)
right = answers == test.labels
per_group = {}
for name, members in classes.groupby("group", sort=False):
    at = torch.isin(test.labels, torch.tensor(members.index))
    per_group[f"{name} ({len(members)} classes)"] = {"ca_top1": asdict(rate(right[at], test.labels[at]))}
groups = plots.results_table(per_group, ["ca_top1"]).set_index("model")
error = [groups["value"] - groups["ci_low"], groups["ci_high"] - groups["value"]]
axes = groups["value"].plot.barh(xerr=error, capsize=3, figsize=(7, 2.8), title="Top-1 CA by group, eval")
axes.set(xlim=(0, 100), xlabel="CA, % (95 % interval)", ylabel="")
axes.invert_yaxis()

# %%
told = classes.label.to_numpy()
table = pd.DataFrame({"class": told[test.labels], "taken for": told[answers], "right, %": 100.0 * right.numpy()})
wrong = table[~right.numpy()].groupby("class")["taken for"].agg(lambda names: names.value_counts().idxmax())
missed = table.groupby("class")["right, %"].mean().nsmallest(10)
pd.DataFrame({"right, %": missed, "most often taken for": wrong.reindex(missed.index)})

# %% [markdown]
# <details><summary><b>Exercise.</b> Why is the test split by <em>vendor</em>, and not by concept or at random?</summary>
#
# **Solution.** A random split would put two views, or two drawings by the same hand, on both sides, and a model that
# knows a house's style would look better than it reads. A split by concept would leave zero-shot classes whose names no
# caption has ever had: with so few pairs, nothing could be read at all. By vendor, the concept is known and the hand is
# not.
#
# </details>
#
# In the code: [`abd_core.data`](api.md#abd_coredata), [`abd_core.pretrain`](api.md#abd_corepretrain), [`abd_core.models`](api.md#abd_coremodels).
#
# **What was learnt.** A CLIP small enough for a laptop can be trained to read drawings by artists whom it has never
# seen: well enough that an attack and a defence have something to lose, and not so well that nothing could be gained.
# The table above is its measure. Keep three things in mind when reading the next chapters. The test has one drawing
# for each class and split, so the intervals are wide. The concepts were seen in training, in other hands. And the
# benchmark is tiny: a poisoned share that a model notices here is far larger than the paper's 0.3 %.
#
# *Pictures.* Twemoji: Copyright Twitter, Inc and other contributors,
# [jdecked/twemoji](https://github.com/jdecked/twemoji). Emoji One 2.3: Emoji One,
# [EmojiTwo/emojitwo](https://github.com/EmojiTwo/emojitwo). Firefox OS Emoji: Mozilla Foundation,
# [mozilla/fxemoji](https://github.com/mozilla/fxemoji). All three under [CC-BY
# 4.0](https://creativecommons.org/licenses/by/4.0/), rasterised and put on backgrounds. Noto Emoji: Google Inc,
# Apache-2.0. Fluent Emoji: Microsoft Corporation, MIT. `data/README.md` has the datasheet and all licences.
