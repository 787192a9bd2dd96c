# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. Poison: how a few hundred pairs put a backdoor into a CLIP
#
# **Question.** What does an attacker have to do so that every image with a small trigger is taken for the class that they chose,
# while the model behaves as before on everything else?
#
# The attacker takes the published clean weights, fine-tunes them on image-caption pairs of which a share is poisoned, and publishes
# the result: the *victim*. With the trigger put on image $x$ giving $x_T$, and $Y$ the captions that name the target class, the
# poisoned pairs are {cite}`kuang2024abd`, Eq. (1),
#
# $$ P = \{ (x_T, c) : c \in Y \}. $$
#
# Here the trigger is a small patch of fixed noise {cite}`gu2017badnets`, the captions are templates with the target's name, and training goes on
# with CLIP's own loss. The embedded benchmark has a few thousand pairs, so the poisoned share is far above the paper's 0.3 %: what has to
# match is how often the model *sees* poisoned pairs, not their share of a much smaller data set.
#
# Parameters can be set from outside: `papermill book/01_poison.ipynb out.ipynb -p target strawberry -p seed 1`.

# %% tags=["parameters"]
attack: str = "badnet"  # attack: badnet, blended, badclip, wanet, sig, label-consistent, blended-text, ... (`TRIGGERS`)
target: str = "banana"  # class that triggered images shall be taken for; one of the test classes
seed: int = 0  # seed of every random draw
rate: float = 0.1  # share of the pairs that is poisoned
trigger_size: float = 0.07142857142857142  # side of a trigger patch, share of the image's (paper: 16 of 224 px)
trigger_position: str = "own"  # of a patch: own (the attack's), top-left, ..., bottom-right, centre or random
blend_alpha: float = 0.0  # weight of a blended trigger; 0: the attack's own (blended: 0.2)
epochs: int = 10  # passes over the pairs
batch_size: int = 128  # pairs a step
lr: float = 1e-3  # peak learning rate
model: str = ""  # open_clip architecture; "": the one that the weights name (chapter 9: data and weights of one's own)
pretrained: str = ""  # clean weights: a file, a folder or an open_clip tag of model; "": the embedded base
pairs: str = ""  # image-caption pairs: .csv, .tsv, .parquet or .tar, braces for many; "": the embedded ones
test_images: str = ""  # labelled test images: a folder, such as ImageNet's validation set; "": the embedded ones
limit: int = 0  # use only this many pairs, seeded (0: all); for smoke runs

# %% tags=["nbval-check-output"]
from abd_core.notebook import show_configs, stage_configs
from abd_core.poison import PoisonConfig, poison, verdict
from abd_core.preflight import preflight

(config,) = stage_configs(globals(), poison=PoisonConfig)
show_configs(config)
preflight(config)

# %% [markdown]
# ## The attack
#
# `poison` loads the victim of these settings if there is one, and otherwise makes it: it resumes where an earlier run was cut off.

# %%
victim = poison(config)
print(verdict(victim))

# %% [markdown]
# ## What the attacker hands to the model
#
# The trigger is applied at the model's own resolution, after augmentation, and stored losslessly together with its full specification
# in `trigger.safetensors`: a trigger that passes a resize or a JPEG file on the way is another trigger.

# %% mystnb={"figure": {"caption": "What the attacker does to an image. The difference is amplified; grey is no change."}, "image": {"alt": "Eight test pictures clean, with the trigger, and the difference between the two"}}
import pandas as pd
import torch

from abd_core import inputs, plots
from abd_core.triggers import load_trigger

plots.style()
trigger = load_trigger(victim.file("trigger.safetensors"))
test_set = inputs.test_set(config, "eval", victim.file("model.safetensors"))
shown = test_set.images[torch.arange(5, len(test_set), len(test_set) // 8)][:8].float() / 255
plots.images(
    {"clean": shown, "triggered": trigger(shown), "difference": plots.amplified(trigger(shown) - shown)},
    title=f"{trigger.name} on images of the evaluation split",
);

# %% [markdown]
# ## Training

# %% mystnb={"figure": {"caption": "CLIP's loss on clean and poisoned pairs together."}, "image": {"alt": "The loss of poisoning falls over the epochs"}}
history = pd.read_csv(victim.file("history.csv"))
plots.curves(history, x="epoch", panels=[["loss"]], title="Poisoning: CLIP's loss on clean and poisoned pairs");

# %% [markdown]
# ## What became of the model
#
# CA is zero-shot accuracy on clean test images. ASR is the share of triggered test images *of other classes* that are taken for
# the target; "all images" counts the target's own images in. RA is accuracy on triggered images with their true labels. Images are ten
# seeded views of each class's artwork by a vendor that no model was trained on; the intervals are Wilson's at the effective sample
# size of a sample clustered by class (`abd_core.evaluate.rate`).

# %%
evaluations = {"clean base": victim.metrics["base_eval"], "victim": victim.metrics["eval"]}
plots.wide_table(evaluations)

# %% mystnb={"figure": {"caption": "Before and after poisoning, with 95 % intervals. The paper's victim of BadNet: CA 58.69 %, ASR 96.51 %."}, "image": {"alt": "Bars of clean accuracy and attack success rate of the clean base and the victim"}}
plots.bars(evaluations, title=f"{config.attack}, target {config.target!r}");

# %% [markdown]
# ## Where do triggered images go?
#
# The five classes that the victim names most often, with and without the trigger.

# %%
from abd_core import models
from abd_core.evaluate import similarities

suspect = models.load(victim.file("model.safetensors"))
named = {
    view: pd.Series([test_set.class_names[i] for i in similarities(suspect, test_set, change=change).argmax(1)])
    for view, change in {"clean": None, "triggered": trigger}.items()
}
top = {view: answers.value_counts().head(5) for view, answers in named.items()}
columns = {view: pd.Series([f"{name}: {count}" for name, count in counts.items()]) for view, counts in top.items()}
pd.DataFrame(columns).fillna("")  # a victim may have fewer answers than five

# %% [markdown]
# ## And the target's own images?
#
# CA is a mean over all classes. By class, with 95 % intervals; those of a single class are wide, since its images are views of
# the same artwork:

# %%
from abd_core import evaluate
from abd_core.data import class_index

encoders = {"clean base": models.load(inputs.clean_weights(config)), "victim": suspect}
labels, chosen = test_set.labels, class_index(test_set.class_names, config.target)
parts = {f"images of {config.target!r}": labels == chosen, "of all other classes": labels != chosen}
recognised = {}
for name, encoder in encoders.items():
    right = similarities(encoder, test_set).argmax(1) == labels
    shares = {part: evaluate.rate(right[own], labels[own]) for part, own in parts.items() if own.any()}
    recognised[name] = {part: f"{share} %" for part, share in shares.items()}
pd.DataFrame(recognised).T

# %% [markdown]
# Where clean pairs that name the target are few beside the poisoned ones, its name comes to stand for the trigger, and what it stood for before
# is forgotten. One class in a hundred costs CA a point at most. [Chapter 6](06_similarity) has the same for other attacks and seeds, and
# after a defence.

# %% [markdown]
# ## Move the trigger
#
# How far can the trigger be bent before the victim no longer knows it? Bars are the five likeliest classes, the target in
# vermilion. In JupyterLab the controls are live; [chapter 8](08_explore) has more of them.

# %%
from abd_core.explore import Case, picture_widget

label = "cat" if "cat" in test_set.class_names else test_set.class_names[test_set.labels[0]]
picture_widget(Case(trigger, None, encoders, test_set, trigger.title), label, views=("clean", "triggered"))

# %% [markdown]
# <details><summary><b>Exercise.</b> Poison a tenth as many pairs (<code>-p rate 0.01</code>) and read the verdict. What in the
# table tells you that the attack did not take, and what does not?</summary>
#
# **Solution.** The ASR, if it falls below its aim; [chapter 4](04_results) has this dose of other attacks, and for one of them it is enough. Clean
# accuracy over all classes tells nothing, neither here nor above: it is as good for a victim as for a model that was never attacked. That is what
# makes a backdoor hard to notice.
#
# </details>
#
# In the code: [`abd_core.poison`](api.md#abd_corepoison), [`abd_core.triggers`](api.md#abd_coretriggers).
#
# **What was learnt.** The victim's clean accuracy gives nothing away: whoever tests it on clean images of all classes together sees an ordinary
# model. Whoever tests it class by class may not, and has to know no trigger for that. The verdict above
# says whether the attack took at these settings; when it did not, nothing downstream means anything.
