# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Defend: fine-tune the backdoor away
#
# **Question.** Does fine-tuning on perturbed images and augmented captions break the backdoor, and what does it cost?
#
# The defender holds the victim's weights, the clean weights it came from and a share of clean pairs. ABD {cite}`kuang2024abd` fine-tunes the victim with CLIP's
# ordinary loss on (image + universal perturbation, EDA(caption)). The perturbation is the one of chapter 2; EDA {cite}`wei2019eda` replaces words by
# WordNet synonyms, inserts, swaps and deletes, afresh each epoch.
#
# The perturbation's place is drawn for each image by default: it is made without knowledge of the trigger's place, and a patch that
# happens to cover the trigger would prove nothing. This notebook loads or makes everything that it needs.
#
# To clean a model of your own, give its weights as `checkpoint`, and the clean weights that it was made from as `pretrained`. No attack
# is run then, and no trigger is known: the clean accuracy is measured, the attack success is not. Whoever has no clean weights gives the
# checkpoint there too, and `adversary_normal fine-tuned`. The [audit](10_audit) asks whether there is a backdoor, before and after.

# %% tags=["parameters"]
checkpoint: str = ""  # the suspect's weights, to defend a model of your own; "": the victim of the attack below
attack: str = "badnet"  # attack: badnet, blended, badclip, wanet, sig, label-consistent, blended-text, ... (`TRIGGERS`)
target: str = "banana"  # class that triggered images shall be taken for; one of the test classes
seed: int = 0  # seed of every random draw
defence: str = "abd"  # abd, abd-d, ft (fine-tuning), cleanclip, roclip, par, clean, wise-ft, a control (`DEFENCES`)
mode: str = "patch"  # perturbation: additive (magnitude is an L-inf bound) or patch (a share of the area)
magnitude: float = 0.03  # L-inf bound on [0,1] pixels (additive) or share of the area (patch)
placement: str = "random"  # a patch's place: fixed (one for all images) or random (drawn for each)
backdoor_weight: float = 1.0  # weight of Eq. (2); negative drives the encoders apart, 0 is the UAP without it
view: str = "replace"  # replace (perturbed images alone), both (perturbed and clean), or clean (no perturbed ones)
eda: bool = True  # augment captions by EDA
batch_norm: str = "own"  # BatchNorm's statistics: train (the batch's), frozen (the victim's), own (the defence's)
share: float = 0.5  # share of the pairs that the defender holds, seeded
epochs: int = 3  # passes over the pairs
batch_size: int = 64  # pairs a step
lr: float = 0.0  # peak learning rate; 0: the defence's own
trigger_position: str = "own"  # attacker: own (the attack's), top-left, ..., bottom-right, centre or random
poison_rate: float = 0.1  # attacker: share of the pairs that is poisoned
poison_epochs: int = 10  # attacker: passes over the pairs
steps: int = 200  # adversary: optimiser steps
model: str = ""  # open_clip architecture; "": the one that the weights name (chapter 9: data and weights of one's own)
pretrained: str = ""  # clean weights: a file, a folder or an open_clip tag of model; "": the embedded base
pairs: str = ""  # image-caption pairs: .csv, .tsv, .parquet or .tar, braces for many; "": the embedded ones
test_images: str = ""  # labelled test images: a folder, such as ImageNet's validation set; "": the embedded ones
limit: int = 0  # use only this many pairs, seeded (0: all); for smoke runs

# %%
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.defend import DefendConfig, defend
from abd_core.inputs import SuspectInputs, check_no_attack, suspect_weights
from abd_core.notebook import show_configs, stage_configs
from abd_core.poison import PoisonConfig, poison, verdict
from abd_core.preflight import preflight

attacker, searcher, source, config = stage_configs(
    globals(), poison=PoisonConfig, adversary=AdversaryConfig, suspect=SuspectInputs, defend=DefendConfig
)
check_no_attack(source, attacker)
stages = (searcher, config) if source.checkpoint else (attacker, searcher, config)
show_configs(*stages)
preflight(*stages)

# %% [markdown]
# ## The victim, the perturbation, the defence
#
# The first line is the attacker's; the defence is handed the victim's weights and nothing else of it.

# %%
victim = None if source.checkpoint else poison(attacker)
print(verdict(victim) if victim else f"{source.checkpoint}: no attack on it is known.")

# %%
suspect = victim.file("model.safetensors") if victim else suspect_weights(source, config)
perturbation_file = None
if config.needs_perturbation:
    perturbation_file = adversary(searcher, suspect).file("perturbation.safetensors")
defended = defend(config, suspect, perturbation=perturbation_file)

# %% [markdown]
# ## What the defended model sees while it learns

# %% mystnb={"figure": {"caption": "What the defended model learns from."}, "image": {"alt": "Eight training pictures clean, perturbed, and their difference"}}
import pandas as pd
import torch

from abd_core import inputs, models, plots
from abd_core.defences import placed
from abd_core.evaluate import EvaluateConfig, measure, zero_shot_weights
from abd_core.generator import Perturbation
from abd_core.paths import shown
from abd_core.text import augment
from abd_core.triggers import load_trigger

plots.style()
clean_pairs = inputs.training_pairs(config, suspect).subset(config.share, seed=config.seed)
first = torch.arange(0, len(clean_pairs), max(1, len(clean_pairs) // 8))[:8]
clean = clean_pairs.images(first, seed=config.seed, step=0).cpu()
rows = {"clean": clean}
if perturbation_file:
    perturbed = placed(Perturbation.load(perturbation_file), config.patch_place)(clean)
    rows |= {"perturbed": perturbed, "difference": plots.amplified(perturbed - clean)}
plots.images(rows, title="Training images");

# %% tags=["nbval-check-output"]
captions = clean_pairs.captions(first, seed=config.seed, epoch=0)
ids = [clean_pairs.ids[i] for i in first]
fresh = {f"EDA, epoch {e + 1}": augment(captions, seed=config.seed, epoch=e, ids=ids) for e in range(2)}
pd.DataFrame({"caption": captions, **fresh})

# %% mystnb={"figure": {"caption": "CLIP's loss while the victim is fine-tuned."}, "image": {"alt": "The loss of the defence falls over the epochs"}}
if (history := defended.file("history.csv")).exists():  # not every defence trains
    plots.curves(pd.read_csv(history), x="epoch", panels=[["loss"]], title="Defence: the loss")

# %% [markdown]
# ## Before and after
#
# Only here does the attack's record come back, to measure what the defence did not know. The evaluation split's artwork is by a vendor
# that neither training, nor poisoning, nor the choice of any default has seen. Of a checkpoint there is no such record.

# %%
trigger, on_eval = victim and victim.file("trigger.safetensors"), EvaluateConfig(**inputs.test_inputs(config))
clean_base, after = inputs.clean_weights(config), defended.file("model.safetensors")
if victim:
    evaluations = {"clean base": victim.metrics["base_eval"], "victim": victim.metrics["eval"]}
else:
    before = {"clean base": clean_base, "victim": suspect}
    evaluations = {name: measure(path, config=on_eval).metrics for name, path in before.items()}
evaluations["defended"] = measure(after, trigger=trigger, config=on_eval).metrics
plots.wide_table(evaluations)

# %% mystnb={"figure": {"caption": "Before and after, with 95 % intervals. The paper on BadNet: CA 58.69 % and ASR 96.51 % for the victim, 53.47 % and 5.36 % after ABD."}, "image": {"alt": "Bars of clean accuracy and attack success rate of the clean base, the victim and the defended model"}}
against = f"{attacker.attack}, target {attacker.target!r}" if victim else f"{shown(suspect)}: no attack is known"
title = f"{config.defence} against {against}, seed {config.seed}"
figure = plots.bars(evaluations, title=title, metrics=["ca_top1", "asr" if victim else "ca_top5"])
figure.savefig(defended.file("before_after.png"))

# %% [markdown]
# ## Pictures whose answer changed

# %% mystnb={"image": {"alt": "Eight test pictures with the trigger"}}
if victim:
    test_set = inputs.test_set(config, "eval", suspect)
    names, pattern = test_set.class_names, load_trigger(trigger)
    chosen = torch.arange(5, len(test_set), len(test_set) // 8)[:8]
    triggered = pattern(test_set.images[chosen].float() / 255)
    answers = {}
    for label, path in {"victim": suspect, "defended": after}.items():
        encoder = models.load(path)
        weights = zero_shot_weights(encoder, names, test_set.templates)
        with torch.no_grad():
            answers[label] = [names[i] for i in (models.encode_image(encoder, triggered) @ weights.T).argmax(1)]
    plots.images({"triggered": triggered})
    display(pd.DataFrame({"true class": [names[i] for i in test_set.labels[chosen]], **answers}).T)

# %% [markdown]
# ## One picture, before and after
#
# The trigger at other sizes and places, and what the three models answer. A defence that has only forgotten the trigger at its
# own place shows here.

# %%
from abd_core.explore import Case, picture_widget

if victim:
    encoders = {name: models.load(p) for name, p in zip(evaluations, (clean_base, suspect, after), strict=True)}
    label = "cat" if "cat" in names else names[test_set.labels[0]]
    display(picture_widget(Case(pattern, None, encoders, test_set, title), label, views=("clean", "triggered")))

# %% [markdown]
# ## Summary

# %% tags=["summary"]
print(plots.wide_table(evaluations, ["ca_top1", "asr", "ra"]).to_string())
print(verdict(victim) if victim else f"Model: {shown(after)}")
print(f"Figure: {shown(defended.file('before_after.png'))}")

# %% [markdown]
# <details><summary><b>Exercise.</b> Run the defence with <code>-p defence ft</code> and with <code>-p defence random-erasing</code>. How much
# of ABD's effect on this backdoor is the perturbation's?</summary>
#
# **Solution.** The difference between ABD and fine-tuning alone is what perturbed images and reworded captions add, and that BatchNorm keeps the
# victim's statistics (chapter 5's *I + T* differs in the first two alone); the difference between ABD and random erasing is what it adds that the
# images are perturbed by *this* pattern. Chapters 4 and 5 have them over seeds, with intervals. One run cannot tell such differences from luck.
#
# </details>
#
# In the code: [`abd_core.defend`](api.md#abd_coredefend), [`abd_core.defences`](api.md#abd_coredefences).
#
# **What was learnt.** The table says what one run at one seed did to one backdoor. It does not say whether that is luck, or whether the
# perturbation is what did it. [Chapter 4](04_results) sets all defences beside each other, over seeds and attacks; [chapter 5](05_ablations)
# takes ABD apart, sets plain noise in the place of its perturbation, and has the search for each defence's settings, on another
# split and other seeds than those that are reported.
