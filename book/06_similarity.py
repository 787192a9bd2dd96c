# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6. Similarity: are adversarial images like backdoor images?
#
# **Question.** ABD rests on one observation, the paper's Fig. 2 {cite}`kuang2024abd`: in a poisoned model, images with an
# adversarial perturbation resemble images with the trigger. Does that hold here: for captions, in the space of image
# features, and in the model's answers?
#
# Three kinds of the same test images are compared. *Original* images are the evaluation split's own, *backdoor* images
# carry the attacker's trigger, *adversarial* images carry the perturbation of chapter 2. Three models see them: the clean
# base, the victim made from it, and the defended model of chapter 3. The paper shows one model, and does not say which
# attack it was; the clean base is the control that its figure lacks. What both models show is no mark of a backdoor.
#
# First comes one run in detail: one victim of one attack at one seed, one perturbation of it, and one defended model, those
# of the parameters below. Its intervals are about the test images of this run alone, and another attack or seed may
# answer otherwise. So the same measures follow [over attacks and seeds](#over-attacks-and-seeds), from a table, with
# other perturbations and a control.
#
# All of this is analysis after the fact. It needs the trigger and the target, which no defence is given.

# %% tags=["parameters"]
attack: str = "badnet"  # attack: badnet, blended, badclip, wanet, sig, label-consistent, blended-text, ... (`TRIGGERS`)
target: str = "banana"  # class that triggered images shall be taken for; one of the test classes
seed: int = 0  # seed of every random draw
defence: str = "abd"  # abd, ft (fine-tuning alone), cleanclip, roclip, par, clean, wise-ft, or a control (`DEFENCES`)
mode: str = "patch"  # perturbation: additive (magnitude is an L-inf bound) or patch (a share of the area)
magnitude: float = 0.03  # L-inf bound on [0,1] pixels (additive) or share of the area (patch)
placement: str = "random"  # a patch's place: fixed (one for all images) or random (drawn for each)
backdoor_weight: float = 1.0  # weight of Eq. (2); negative drives the encoders apart, 0 is the UAP without it
steps: int = 200  # adversary: optimiser steps
share: float = 0.5  # share of the pairs that the defender holds, seeded
epochs: int = 3  # defence: passes over the pairs
lr: float = 0.0  # defence: peak learning rate; 0: the defence's own
poison_rate: float = 0.1  # attacker: share of the pairs that is poisoned
poison_epochs: int = 10  # attacker: passes over the pairs
model: str = ""  # open_clip architecture; "": the one that the weights name (chapter 9: data and weights of one's own)
pretrained: str = ""  # clean weights: a file, a folder or an open_clip tag of model; "": the embedded base
pairs: str = ""  # image-caption pairs: .csv, .tsv, .parquet or .tar, braces for many; "": the embedded ones
test_images: str = ""  # labelled test images: a folder, such as ImageNet's validation set; "": the embedded ones
limit: int = 0  # use only this many pairs, seeded (0: all); for smoke runs
similarities: str = ""  # path of a CSV that `abd_core.fig2` wrote; empty: the committed one

# %% tags=["nbval-check-output"]
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.defend import DefendConfig, defend
from abd_core.fig2 import Fig2Config
from abd_core.notebook import show_configs, stage_configs
from abd_core.poison import PoisonConfig, poison, verdict
from abd_core.preflight import preflight

attacker, searcher, config, over = stage_configs(
    globals(), poison=PoisonConfig, adversary=AdversaryConfig, defend=DefendConfig, fig2=Fig2Config
)
show_configs(attacker, searcher, config)
preflight(attacker, searcher, config)

# %%
victim = poison(attacker)
print(verdict(victim))
found = adversary(searcher, victim.file("model.safetensors"))
defended = defend(config, victim.file("model.safetensors"), perturbation=found.file("perturbation.safetensors"))

# %% [markdown]
# ## The three kinds of images

# %% mystnb={"figure": {"caption": "The three kinds of images."}, "image": {"alt": "Eight pictures: original, with the trigger, and with the perturbation"}}
import matplotlib.pyplot as plt
import pandas as pd
import torch

from abd_core import inputs, models, plots, similarity
from abd_core.data import class_index
from abd_core.evaluate import prompt_features, zero_shot_weights
from abd_core.generator import Perturbation
from abd_core.paths import shown
from abd_core.triggers import load_trigger

plots.style()
trigger = load_trigger(victim.file("trigger.safetensors"))
perturbation = Perturbation.load(found.file("perturbation.safetensors"))
test_set = inputs.test_set(config, "eval", victim.file("model.safetensors"))
names, labels = test_set.class_names, test_set.labels
original = test_set.images[torch.arange(5, len(test_set), len(test_set) // 8)][:8].float() / 255
plots.images(
    {"original": original, "backdoor": trigger(original), "adversarial": perturbation(original)},
    title=f"{trigger.title} trigger, and the perturbation: {searcher.mode}, magnitude {searcher.magnitude:g}",
);

# %% [markdown]
# ## Images and captions
#
# The paper's five pairings, as 100 x cosine of image and caption. Test pictures have no captions of their own here, so
# the *original caption* is one of the benchmark's templates, drawn for each image by the seed, with the name of the
# image's class; the *backdoor caption* is the same template with the target's name. The *unrelated caption* names another
# class that is not the target, by a seeded derangement of the classes. (The paper speaks of "unrelated" and of "other
# target" captions, and says no more.) Images of the target class are left out, because their original captions are
# backdoor captions.
#
# A sixth pairing is ours: the original image with the backdoor caption. A backdoor moves the target's caption too. How far
# an *adversarial* image is on the target's side can only be told against the same image without the perturbation.

# %%
weights = {
    "clean base": inputs.clean_weights(config),
    "victim": victim.file("model.safetensors"),
    "defended": defended.file("model.safetensors"),
}
encoders = {name: models.load(path) for name, path in weights.items()}
images = {
    name: similarity.features(model, test_set, trigger=trigger, perturbation=perturbation)
    for name, model in encoders.items()
}

# %% mystnb={"figure": {"caption": "Cosines of images and captions. Diamonds, the paper's values: 25.02, 28.49, 19.82, 16.04 and 5.04."}, "image": {"alt": "Violins of the cosine of image and caption for six pairings and three models"}}
cosines, goal = {}, class_index(names, trigger.target)
for name, encoder in encoders.items():
    prompts = prompt_features(encoder, names, test_set.templates)
    cosines[name] = similarity.cosines(images[name], prompts, labels, target=goal, seed=config.seed)


def by_model(tables):
    return pd.concat(tables, names=["model"]).reset_index("model")


means = by_model({name: similarity.means(table) for name, table in cosines.items()})
title = f"{attacker.attack}, target {trigger.target!r}, seed {config.seed}"
plots.distributions(by_model(cosines), means, row="pairing", value="cosine", xlabel="100 x cosine", title=title);

# %% [markdown]
# Violins are the single images, dots the means with 95 % intervals, diamonds the paper's values; they stand below the
# models' lines, since the paper does not say what its model was. The level of a cosine is a model's own: the paper's RN50
# was trained on photographs of the web, this one on emoji. What can be compared is the order.

# %%
pairings = plots.estimates(means, index="pairing", columns="model")
pairings.insert(0, "paper", means.groupby("pairing", sort=False)["paper"].first())
pairings["n"] = means.groupby("pairing", sort=False)["n"].first()
pairings.rename_axis("100 x cosine [95 % interval]")

# %% [markdown]
# **Does the paper's order hold?** Its five values in falling order make four comparisons; the last row is the control. Each
# image is compared with itself, and the interval is that of the mean difference. "Yes" and "no" stand where the interval
# lies wholly on one side of 0. The clean base has no backdoor: a comparison that holds on it as well says nothing about one.

# %%
compared = by_model({name: similarity.orderings(table) for name, table in cosines.items()})
compared["order"] = compared["higher"] + " > " + compared["lower"]
orders = plots.estimates(compared, index="order", columns="model")
orders.insert(0, "paper", compared.groupby("order", sort=False)["paper"].first().round(2))
holds = compared.pivot(index="order", columns="model", values="holds").loc[orders.index, list(encoders)]
orders = orders.join(holds.add_prefix("ordering holds? "))
orders["n"] = compared.groupby("order", sort=False)["n"].first()
orders.rename_axis("difference of 100 x cosine [95 % interval]")

# %% [markdown]
# ## The space of image features
#
# The first two principal components of the three kinds of images together, for each model by itself. The arrows lead from
# the mean of the original images to the means of the others. A plane shows no more of the space than the share of the
# variance on its axes.

# %% mystnb={"figure": {"caption": "Image features in two principal components. The paper's Fig. 2 shows cosines only."}, "image": {"alt": "Clouds of image features in two principal components, a panel a model"}}
panels, variances = {}, {}
for name, kinds in images.items():
    points, variances[name] = similarity.pca(torch.cat(list(kinds.values())))
    panels[name] = dict(zip(kinds, points.split(len(test_set)), strict=True))
plots.clouds(panels, variances, title=f"Image features in two principal components: {title}");

# %% [markdown]
# What the picture cannot give, measured in the whole space: whether the perturbation moves images in the direction in which
# the trigger moves them (cosine of the mean shifts: 1 is the same direction, 0 none in common), and whether an adversarial
# image is nearer to the same image with the trigger than the original is (a gain above 0). Here too the clean base is the
# control: what it shows as well as the victim is no mark of the backdoor.

# %%
shifts = by_model({name: similarity.shifts(kinds, labels) for name, kinds in images.items()})
moves = plots.estimates(shifts, index="measure", columns="model", digits=3)
moves.assign(n=len(test_set)).rename_axis("all test images [95 % interval]")

# %% [markdown]
# ## The set of captions: where adversarial images go
#
# Zero-shot, an image is given the class whose captions are nearest. Where do the images go whose answer the perturbation
# changes? If it had found the backdoor, the victim's would go to the target, and the clean base's elsewhere. The trigger
# itself is the yardstick: this is what a found backdoor looks like.

# %%
answers = {}
for name, encoder in encoders.items():
    classifier = zero_shot_weights(encoder, names, test_set.templates).cpu()
    answers[name] = {kind: (seen @ classifier.T).argmax(1) for kind, seen in images[name].items()}
drifts = {
    f"{name}, {kind}": similarity.drift(given["original"], given[kind], labels, names)
    for kind in ("adversarial", "backdoor")
    for name, given in answers.items()
}
pd.DataFrame(
    {
        who: [f"{row.name}: {100 * row.value:.1f}" for row in table.head(8).itertuples(index=False)]
        for who, table in drifts.items()
    },
    index=range(1, 9),
).rename_axis("% of images that move to")

# %% [markdown]
# The target among these classes. What counts is the share of images that move to it, beside the share that the trigger
# itself moves there. The rank counts from the class that most images move to; where few images move to any one class, its
# interval leaves nearly all ranks open, and the rank says nothing. The entropy is that of all answers: largest where all
# classes are named equally often, 0 where all answers are one class.

# %%
measures = {
    (name, kind): similarity.drift_measures(given["original"], given[kind], labels, classes=len(names), target=goal)
    for kind in ("adversarial", "backdoor")
    for name, given in answers.items()
}
drifted = pd.concat(measures, names=["model", "images"]).reset_index(["model", "images"])
drifted["seen"] = drifted["model"] + ", " + drifted["images"]
ranks = pd.concat(drifts).droplevel(1).query("name == @trigger.target")
drift_table = plots.estimates(drifted, index="seen", columns="measure")
drift_table.insert(2, "target's rank", [f"{r.rank} [{r.rank_low}, {r.rank_high}]" for r in ranks.itertuples()])
drift_table.assign(n=len(test_set)).rename_axis("model, images [95 % interval]")

# %% [markdown]
# ## Nearest pictures
#
# The clean test pictures that lie nearest to one picture with the trigger, with the perturbation, and as it is, in each model's
# space.

# %%
from abd_core.explore import Case, neighbour_widget

label = "cat" if "cat" in names else names[labels[0]]
neighbour_widget(Case(trigger, perturbation, encoders, test_set, title), label)

# %% [markdown]
# ## Over attacks and seeds
#
# The same measures for each attack of the paper at several seeds, on the evaluation split. `python -m abd_core.fig2` makes
# the table, `data/results/similarity.csv`. Six kinds of changed images are held against those with the trigger:
#
# - *ABD*: the perturbation of chapter 2 at its defaults, a patch;
# - *ABD, literal*: the other reading of the paper, added to all pixels within the bound;
# - *ABD, untrained patch*: what the same generator makes after a single step;
# - *ABD-D, window* and *ABD-D, field*: the two perturbations of this project's variant, a square of an image and what is
#   added everywhere, both sought where victim and clean base *disagree* ([chapter 4](04_results));
# - *noise patch*: the control. Nobody searched for it; it has the size of ABD's patch, and uniform noise in it.
#
# Intervals here are over seeds. *victim - clean base* is what the poisoning has added, taken seed by seed. A perturbation
# that has found the backdoor lies above 0 there and above the noise patch, near to the trigger itself.
#
# How many images move to the target, in %:

# %%
from abd_core import escape, fig2

table = fig2.read(over.path)
seen = table[table["measure"] == f"adversarial: {fig2.MOVED}"]
own = table[(table["measure"] == f"backdoor: {fig2.MOVED}") & (table["perturbation"] == "ABD")]
seen = pd.concat([seen, own.assign(perturbation="the trigger itself")])
seen = seen[seen["model"] != fig2.DEFENDED]
moving = fig2.over_seeds(pd.concat([seen, fig2.beyond_base(seen)]))
several = list(table["attack"].unique())
over_table = plots.seeds_table(moving, index=["attack", "perturbation"]).loc[several]
over_table

# %% mystnb={"figure": {"caption": "Images that move to the target, in %, means with 95 % intervals over seeds. The paper has no such figure."}, "image": {"alt": "A panel an attack: for each perturbation and the trigger, the share of images that move to the target, on the victim and on the clean base"}}
figure, grid = plt.subplots(1, len(several), figsize=(10.5, 3.6), sharey=True, layout="constrained", squeeze=False)
for axes, name in zip(grid[0], several, strict=True):
    part = moving[(moving["attack"] == name) & moving["model"].isin([fig2.SUSPECT, fig2.BASE])]
    plots.intervals(axes, part, row="perturbation")
    axes.set(xlabel="% of images", title=escape.figure(name))
figure.legend(*grid[0][0].get_legend_handles_labels(), frameon=False, ncols=2, loc="outside lower center")
figure.suptitle("Who moves to the target?");

# %% [markdown]
# In which direction the changed images move: cosine of their mean shift with the trigger's own. Here too the clean base is
# the control, and so is the noise patch: what both have in common with a trigger is no backdoor.

# %%
turned = table[(table["measure"] == "cosine of the mean shifts") & (table["model"] != fig2.DEFENDED)]
turning = fig2.over_seeds(pd.concat([turned, fig2.beyond_base(turned)]))
plots.seeds_table(turning, index=["attack", "perturbation"], digits=2)

# %% [markdown]
# And the paper's order of captions, with ABD's perturbation in both readings. Differences of 100 x cosine; the last
# comparison of each is the control that the paper does not make.

# %%
ordered = fig2.orders(table[table["perturbation"].isin(["ABD", "ABD, literal"])])
ordered = fig2.over_seeds(ordered[ordered["model"] != fig2.DEFENDED]).sort_values("perturbation", kind="stable")
ordered["seen"] = ordered["attack"] + ", " + ordered["model"]
plots.seeds_table(ordered, index=["perturbation", "measure"], columns="seen")

# %% [markdown]
# Does the paper's order hold on the victims, by these intervals?

# %%
HOLDS = {"yes": "holds", "no": "does not hold", "open": "too close to tell"}
on_victims = ordered[ordered["model"] == fig2.SUSPECT]
plots.bullets(
    f"*{escape.markdown(perturbation)}*, {order}: "
    + "; ".join(
        f"{HOLDS[similarity.Estimate(row.value, row.ci_low, row.ci_high).positive]} on *{escape.markdown(row.attack)}*"
        for row in part.itertuples()
    )
    for (perturbation, order), part in on_victims.groupby(["perturbation", "measure"], sort=False)
)

# %% [markdown]
# The cosines themselves, with ABD's perturbation, on the three models:

# %%
pairs = table[table["perturbation"].eq("ABD") & table["measure"].str.endswith(" caption")]
plots.seeds_table(fig2.over_seeds(pairs), index=["attack", "measure"], columns="model")

# %% [markdown]
# What the first of these tables says by its intervals: do more images move to the target on the victim than on the
# clean base? In points, and "surely" where the interval leaves out zero:

# %%
SIDES = {"yes": "surely more", "no": "surely fewer", "open": "too close to tell"}
beyond = moving[moving["model"].str.contains(" - ")]
plots.bullets(
    f"{escape.markdown(name)}: "
    + "; ".join(
        f"{SIDES[similarity.Estimate(row.value, row.ci_low, row.ci_high).positive]} on *{escape.markdown(row.attack)}*"
        f" ({row.value:+.1f} [{row.ci_low:+.1f}, {row.ci_high:+.1f}])"
        for row in part.itertuples()
    )
    for name, part in beyond.groupby("perturbation", sort=False)
)

# %% [markdown]
# ### The target's own images
#
# And clean images of the target class, which no attack and no defence is about? Those that a model gives their class, in %,
# over seeds:

# %%
clean = table[table["measure"] == fig2.OWN]
before = clean[clean["perturbation"].eq("ABD") & clean["model"].ne(fig2.DEFENDED)]
after = clean[clean["perturbation"].ne("ABD-D, field") & clean["model"].eq(fig2.DEFENDED)]  # one model has both
after = after.assign(model="after " + after["perturbation"].str.removesuffix(", window"))
recognised = fig2.over_seeds(pd.concat([before, after]).assign(perturbation=""))
plots.seeds_table(recognised, index=["model"], columns="attack")

# %%
ends = recognised.groupby("model", sort=False)["value"].agg(["min", "max"]).round(0).astype(int)
plots.bullets(
    f"{name}: {low} %" if low == high else f"{name}: {low} to {high} %, by attack"
    for name, low, high in ends.itertuples()
)

# %% [markdown]
# The poison names its target so often, beside the few clean pairs that do, that the name comes to stand for the trigger. Clean
# accuracy, a mean over a hundred classes, loses a point at most by it and hides it; class by class it shows, to anyone with
# labelled images and without any trigger. No table of the paper has it. How much of it carries over hangs on how often clean
# pairs name the target: here a few of thousands do.

# %% [markdown]
# ## Summary

# %% mystnb={"figure": {"caption": "The chapter in one figure; diamonds are the paper's values."}, "image": {"alt": "Three panels with intervals: cosines of images and captions, cosines of shifts, and shares that moved to the target"}}
figure, grid = plt.subplots(1, 3, figsize=(10.5, 4.8), width_ratios=(2, 1, 1), layout="constrained")
plots.intervals(grid[0], means, row="pairing")
plots.intervals(grid[1], shifts[shifts["measure"].str.contains("cosine")], row="measure")
plots.intervals(grid[2], drifted[drifted["measure"] == "moved to the target, %"], row="images")
grid[0].set(xlabel="100 x cosine", title="Images and captions")
grid[1].set(xlabel="cosine", title="Shifts of image features")
grid[2].set(xlabel="% of images", title=f"Moved to {trigger.target!r}")
figure.legend(*grid[0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center")
figure.suptitle(f"Adversarial and backdoor images: {title}")
figure.savefig(defended.file("similarity.png"))

# %% tags=["summary"]
print(pairings.drop(columns="n").to_string())
print("\nOn the victim, by how much [95 % interval], and the same on the clean base:")
control = compared[compared["model"] == "clean base"].set_index("order")
for row in compared[compared["model"] == "victim"].itertuples():
    paper = "not in the paper" if pd.isna(row.paper) else f"paper {row.paper:+.2f}"
    base = f"clean base: {control['holds'][row.order]}, {control['value'][row.order]:+.1f}"
    print(f"  {row.order}? {row.holds}: {row.value:+.1f} [{row.ci_low:+.1f}, {row.ci_high:+.1f}] ({paper}; {base})")
turned = "cosine of the mean shifts"
print(f"  {turned}: {moves.loc[turned, 'victim']}; clean base: {moves.loc[turned, 'clean base']}")
moved = drift_table["moved to the target, %"]
for kind, change in {"adversarial": "perturbation", "backdoor": "trigger"}.items():
    told = f"{moved[f'victim, {kind}']}; clean base: {moved[f'clean base, {kind}']}"
    print(f"  % of images that the {change} moves to the target: {told}")
print("\nOver attacks and seeds, % of images that move to the target:")
print(over_table.to_string())
print(f"\nFigure: {shown(defended.file('similarity.png'))}")

# %% [markdown]
# <details><summary><b>Exercise.</b> Why is the <em>clean base</em> in every table, although it has no backdoor?</summary>
#
# **Solution.** Because an order of cosines that holds on a model without a backdoor is no sign of one. The paper's
# figure has no such row; here it is the control.
#
# </details>
#
# In the code: [`abd_core.similarity`](api.md#abd_coresimilarity), [`abd_core.evaluate`](api.md#abd_coreevaluate).
#
# **What was learnt.** Fig. 2's case for ABD is that adversarial images lie nearer to the backdoor caption than to unrelated ones.
# By itself that order shows little: a victim whose target caption has come nearer to *all* images passes it too, and a
# target that is at home among the test classes may pass it on the clean base. Three things have to come together before
# one may say that the perturbation has found the backdoor: it brings images nearer to the backdoor caption than they were,
# its mean shift has a direction in common with the trigger's, and the answers that it changes go to the target, about as
# often as the trigger's do; all of it on the victim and not on the clean base. The summary has the figures of one run for
# both. Over attacks and seeds, by their means:

# %%
ranges = moving.groupby(["perturbation", "model"], sort=False)["value"].agg(["min", "max"]).round(0).astype(int)


def spread(name, model):
    low, high = ranges.loc[(name, model)]
    return f"{low} %" if low == high else f"{low} to {high} %, by attack,"


plots.bullets(
    f"of the images with *{escape.markdown(name)}*, {spread(name, fig2.SUSPECT)} move to the target on the victims, and"
    f" {spread(name, fig2.BASE).removesuffix(',')} on the clean base"
    for name in moving["perturbation"].unique()
)

# %% [markdown]
# In plain words: a perturbation that leads about as many images to the target as the trigger does has found the backdoor. One that
# leads there no more than plain noise has not, whatever it does for the defence; [chapter 5](05_ablations) asks why it helps all the same.
