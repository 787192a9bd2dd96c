# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Adversary: one perturbation, in search of the backdoor
#
# **Question.** Can somebody who knows neither trigger nor target find a pattern that moves the victim's features the way the trigger does?
#
# AdvCLIP {cite}`zhou2023advclip` trains a generator that turns fixed noise into *one* universal perturbation for all images. It is pushed to take images
# away from their own features and captions ($L_{adv}$), to tear up the graph of their neighbours ($L_{topo}$), to change little
# ($L_q$), and to fool a discriminator ($L_{GAN}$). ABD adds the backdoor loss {cite}`kuang2024abd`, Eq. (2), between the normal model's feature $x$
# and the poisoned model's feature $x_{bd}$ of an image:
#
# $$ L_{bd} = -\log \frac{\exp(\mathrm{sim}(x, x_{bd}) / \tau)}{\sum_i \exp(\mathrm{sim}(x, x_i) / \tau)}. $$
#
# The paper leaves several readings of this open. Each is a parameter below; `AdversaryConfig` documents them. The clean weights that the
# victim was made from belong to the defender here, as Eq. (2) needs them; the trigger, the target and the poisoned pairs do not.

# %% tags=["parameters"]
attack: str = "badnet"  # attack on the victim that is loaded or made: badnet, blended, ... (chapter 1)
target: str = "banana"  # its target class
seed: int = 0  # seed of every random draw
mode: str = "patch"  # reading of 'magnitude 0.03': additive (an L-inf bound) or patch (a share of the area)
magnitude: float = 0.03  # L-inf bound on [0,1] pixels (additive) or share of the area (patch)
placement: str = "random"  # a patch's place: fixed (one for all images) or random (drawn for each)
corner: float = 0.7678571428571429  # upper left corner of a fixed patch as a share of the side, both ways
backdoor_images: str = "adversarial"  # images that enter Eq. (2) through the normal encoder: adversarial or clean
backdoor_weight: float = 1.0  # weight of Eq. (2); negative drives the encoders apart, 0 is the UAP without it
negatives: str = "victim"  # the x_i of Eq. (2): other images' victim features or clean features
tau: float = 0.1  # temperature of L_adv and Eq. (2); 0: the victim's own
width: int = 128  # channels of generator and discriminator at their widest (AdvCLIP: 1024)
steps: int = 200  # optimiser steps
batch_size: int = 16  # pairs a step
lr: float = 2e-4  # Adam's learning rate
share: float = 0.5  # share of the pairs that the defender holds, seeded
poison_epochs: int = 10  # attacker: passes over the pairs
poison_rate: float = 0.1  # attacker: share of the pairs that is poisoned
model: str = ""  # open_clip architecture; "": the one that the weights name (chapter 9: data and weights of one's own)
pretrained: str = ""  # clean weights: a file, a folder or an open_clip tag of model; "": the embedded base
pairs: str = ""  # image-caption pairs: .csv, .tsv, .parquet or .tar, braces for many; "": the embedded ones
test_images: str = ""  # labelled test images: a folder, such as ImageNet's validation set; "": the embedded ones
limit: int = 0  # use only this many pairs, seeded (0: all); for smoke runs

# %% tags=["nbval-check-output"]
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.notebook import show_configs, stage_configs
from abd_core.poison import PoisonConfig, poison, verdict
from abd_core.preflight import preflight

attacker, config = stage_configs(globals(), poison=PoisonConfig, adversary=AdversaryConfig)
show_configs(attacker, config)
preflight(attacker, config)

# %%
victim = poison(attacker)
print(verdict(victim))
found = adversary(config, victim.file("model.safetensors"))

# %% [markdown]
# ## The generator at work
#
# The perturbation on the way, from the first steps to the last (additive ones are amplified: grey is no change).

# %% mystnb={"figure": {"caption": "The universal perturbation on its way, and on pictures of the development split."}, "image": {"alt": "The generator's output from first to last step, and eight pictures clean, perturbed, and their difference"}}
import pandas as pd
import torch
from safetensors.torch import load_file

from abd_core import inputs, models, plots, similarity
from abd_core.evaluate import similarities
from abd_core.generator import Perturbation
from abd_core.triggers import load_trigger

plots.style()
perturbation = Perturbation.load(found.file("perturbation.safetensors"))
on_the_way = load_file(found.file("stages.safetensors"))["delta"]
test_set = inputs.test_set(config, "dev", victim.file("model.safetensors"))
shown = test_set.images[torch.arange(5, len(test_set), len(test_set) // 8)][:8].float() / 255
plots.images(
    {
        "generator": plots.amplified(on_the_way) if config.mode == "additive" else on_the_way,
        "clean": shown,
        "perturbed": perturbation(shown),
        "difference": plots.amplified(perturbation(shown) - shown),
    },
    title=f"Universal perturbation: {config.mode}, magnitude {config.magnitude:g}",
);

# %% mystnb={"figure": {"caption": "Losses of the adversary, running means over ten steps."}, "image": {"alt": "Curves of the adversary's losses over its steps"}}
history = pd.read_csv(found.file("history.csv"))
panels = [["adversarial"], ["backdoor"], ["topology"], ["gan", "discriminator"]]
panels = [panel for panel in panels if set(panel) <= set(history)]
plots.curves(history, x="step", panels=panels, title="Losses of the adversary", window=10);

# %% [markdown]
# ## Does it look like the backdoor to the victim?
#
# Two looks at it. First, to which classes do perturbed images drift, on the clean model and on the victim? If the perturbation has
# found the backdoor, the victim's answers pile up on the target and the clean model's do not. Then, as only an evaluation may, it is held
# against the true trigger: the cosine, in the victim's feature space, of the mean shift that the perturbation causes and the one that the
# trigger causes, and whether perturbed images are nearer to the same images with the trigger than unperturbed ones are (a gain above 0).
# Chapter 6 looks closer.

# %%
weights = {"clean model": inputs.clean_weights(config), "victim": victim.file("model.safetensors")}
encoders = {name: models.load(path) for name, path in weights.items()}
answers = {
    name: pd.Series([test_set.class_names[i] for i in similarities(model, test_set, change=perturbation).argmax(1)])
    for name, model in encoders.items()
}
drift = pd.DataFrame({name: named.value_counts(normalize=True) for name, named in answers.items()}).fillna(0)
drift.sort_values("victim", ascending=False).head(8).mul(100).round(1).rename_axis("% of perturbed images taken for")

# %%
trigger = load_trigger(victim.file("trigger.safetensors"))
shifts = {
    name: similarity.shifts(
        similarity.features(model, test_set, trigger=trigger, perturbation=perturbation), test_set.labels
    )
    for name, model in encoders.items()
}
table = pd.concat(shifts, names=["model"]).reset_index("model")
moves = plots.estimates(table, index="measure", columns="model", digits=3).rename_axis("[95 % interval]")
moves

# %% [markdown]
# ## How much of it does it take?
#
# The perturbation mixed with a picture, from all of it to none. Bars are the five likeliest classes, the target in vermilion.

# %%
from abd_core.explore import Case, picture_widget

case = Case(trigger, perturbation, encoders, test_set, "perturbed pictures")
label = "cat" if "cat" in test_set.class_names else test_set.class_names[test_set.labels[0]]
picture_widget(case, label, views=("clean", "perturbed"), only=("amount",))

# %% [markdown]
# ## Summary

# %% tags=["summary"]
for name, named in answers.items():
    print(f"{name}: takes {(named == trigger.target).mean():.1%} of the perturbed images for {trigger.target!r}")
print("cosine of the mean shifts in the victim:", moves.loc["cosine of the mean shifts", "victim"])

# %% [markdown]
# <details><summary><b>Exercise.</b> Set <code>backdoor_weight</code> to 0, and to -1. In which of the three runs do the victim's
# answers drift to the target, and the clean model's do not?</summary>
#
# **Solution.** Compare the two columns of the drift table between the runs. As printed, Eq. (2) rewards agreement of
# the two encoders, so that a negative weight, which drives them apart, asks more directly for what only the victim
# knows. Whether it then finds *this* backdoor depends on the seed and on the place of the patch, so run more than one.
# Chapter 5 compares over seeds what the defence then leaves of the backdoor, not where the answers drift to.
#
# </details>
#
# In the code: [`abd_core.adversary`](api.md#abd_coreadversary), [`abd_core.generator`](api.md#abd_coregenerator), [`abd_core.losses`](api.md#abd_corelosses).
#
# **What was learnt.** A pattern that leads images astray is soon found; one that leads them where the trigger does is another matter. The
# summary says how much of the backdoor the perturbation shares at these settings. Whether that is what makes the defence work is a
# further question: controls (a patch of plain noise, random erasing) have to show it, in [chapter 5](05_ablations).
