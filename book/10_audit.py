# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10. Audit: may this checkpoint be trusted?
#
# **Question.** Somebody hands you a CLIP. Is it backdoored, towards what, and what should you do next?
#
# The audit holds the suspect's weights, clean images, class names and, where there are some, the published clean weights it may come from.
# It knows no trigger, no target and no poisoned data, and executes nothing that the checkpoint brings. Its detectors ask:
#
# - **drift**: where do universal patches lead that are optimised towards no class at all {cite}`zhou2023advclip,wang2020tnd`? On a clean
#   model answers should scatter, on a backdoored one gather at the attacker's class; the table of statistics says how far either holds;
# - **answers under corruptions** (noise, blotches, warps, waves, stripes): triggers that lie all over the image are seldom learnt exactly;
# - **additive perturbations** towards each class, and, where there are clean weights, two differences: the **shift** of clean images'
#   answers, and the change of the **zero-shot head**, the weights that read each class off the image tower {cite}`ilharco2023task`;
# - **trigger inversion** towards the most suspected classes and random ones {cite}`wang2019cleanse`, and on the image encoder alone
#   {cite}`feng2023decree`. Their published settings are the preset `published`; ours take far fewer steps.
#
# With its defaults this notebook audits chapter 1's victim. For your own model: `-p checkpoint suspect.safetensors`.

# %% tags=["parameters"]
checkpoint: str = ""  # the suspect's weights, safetensors; empty: chapter 1's victim
reference: str = "embedded"  # clean weights that it may come from: a file, embedded (the base), or none
images: str = ""  # folder of clean images; empty: the embedded pairs'
classes: str = ""  # text file with a class name a line; empty: the test set's
seed: int = 0  # seed of every random draw
count: int = 256  # clean images that are looked at; half to optimise on, half to measure on
preset: str = "ours"  # detectors' settings: ours (fast), or published (their sources' own)
share: float = 0.5  # share of the embedded pairs that the auditor holds, seeded
recovery_steps: int = 15  # gradient steps on the recovered trigger
attack: str = "badnet"  # chapter 1's victim: its attack
target: str = "banana"  # chapter 1's victim: class that triggered images shall be taken for
poison_epochs: int = 10  # chapter 1's victim: passes over the pairs
limit: int = 0  # use only this many pairs, seeded (0: all); for smoke runs

# %%
from abd_core.audit import AuditConfig, AuditInputs, audit, check_places, load_finding, picture, verdict_of
from abd_core.notebook import show_configs, stage_configs
from abd_core.poison import PoisonConfig, poison

attacker, inputs, config = stage_configs(globals(), poison=PoisonConfig, inputs=AuditInputs, audit=AuditConfig)
if not inputs.checkpoint:
    check_places(inputs)  # before a victim is made
    inputs = inputs.replace(checkpoint=str(poison(attacker).file("model.safetensors")))
show_configs(config)

# %%
run = audit(config, inputs)
verdict = verdict_of(run)

# %% [markdown]
# ## What the detectors say
#
# Each class's suspicion: tenths of the images that go there (drift, answers under corruptions), or robust standard deviations above the
# median class. A detector is heard up to 10, and the sum ranks the classes.

# %%
import pandas as pd

from abd_core import plots
from abd_core.detectors import DETECTORS

plots.style()
found = run.metrics
table = pd.DataFrame(found["suspicion"], index=found["classes"]).rename(
    columns={n: k.title for n, k in DETECTORS.items()}
)
table.head(5).round(1).T

# %%
from abd_core.paths import read_json

shown = pd.DataFrame(found["statistics"]).round(3).rename_axis("statistic")
for mode, below in read_json(run.file("audit.json"))["clean_models_below"].items():  # the population's, further down
    shown[f"{mode}: clean below"] = pd.Series({n: f"{k} of {of}" for n, (k, of) in below.items()}, dtype=object)
shown.astype(object).fillna("")

# %% [markdown]
# Drift, place by place: the largest share of held-out images of other classes that each optimised patch sends to one class.

# %% mystnb={"figure": {"caption": "The evidence in pictures; the paper has no such audit."}, "image": {"alt": "Maps, one for each size of patch, of the largest share of images that go to one class by the place of the patch; then pictures of the recovered trigger"}}
import matplotlib.pyplot as plt

drift, _ = load_finding(run.file("drift.safetensors"))
shares = drift.shares.amax(1).view(-1, 3, 3)
figure, axes = plt.subplots(1, len(shares) + 2, figsize=(3 * (len(shares) + 2), 3), layout="constrained")
for axis, share, mask in zip(axes, shares, drift.masks[::9], strict=False):
    axis.imshow(share, vmin=0, vmax=1, cmap="magma")
    axis.set(title=f"patch of {int(mask.sum() ** 0.5)} px", xticks=[], yticks=[])
    for place, value in enumerate(share.flatten().tolist()):
        ink = "black" if value > 0.6 else "white"
        axis.text(place % 3, place // 3, f"{100 * value:.0f} %", ha="center", va="center", color=ink)
for axis, (name, shown_picture) in zip(axes[len(shares) :], picture(run).items(), strict=True):
    axis.imshow(shown_picture)
    axis.set(title=name, xticks=[], yticks=[])
figure.suptitle("Largest share of images that go to one class, by the patch's place; the recovered trigger")
figure.savefig(run.file("evidence.png"))

# %% [markdown]
# ## What the verdict is worth
#
# The probability comes from a population of small CLIPs, clean and poisoned, that were audited in the same way. One half chose the regression
# and the threshold; the table is of the other half, with 95 % intervals. "alone" is the audit without clean weights.

# %%
from abd_core.verdict import MODES, calibrate, left_out, performance, read_population

population = read_population()
chosen, reported = (population[population["half"] == half] for half in ("choose", "report"))
fitted = {mode: calibrate(chosen, mode) for mode in MODES}
worth = {mode: performance(reported, f, mode) for mode, f in fitted.items() if f is not None}
print(population.groupby(["kind", "half"]).size().to_string() if len(population) else "No population yet.")
if worth:
    display(pd.DataFrame({mode: {name: f"{r} of {r.n}" for name, r in rates.items()} for mode, rates in worth.items()}))

# %% [markdown]
# Alarms by what the models are. A fifth of the clean ones saw five drawings of one class over and over, with their own captions and no
# trigger. Where an attack did not take, the model has seen triggers and answers few or none: it counts as neither kind.

# %%
import numpy as np

from abd_core.verdict import scored

states = {"backdoored": 1, "attack did not take": -1}
groups = np.select(
    [*(population["label"] == label for label in states.values()), population.get("rate", 0) > 0],
    [*states, "clean, one class repeated"],
    "clean",
)
for mode in worth:
    everyone = scored(population.assign(label=0), fitted[mode], mode)
    alarms = everyone.groupby([groups, "half"])["alarm"].agg(lambda alarm: f"{alarm.sum()} of {len(alarm)}")
    display(alarms.unstack().rename_axis(f"alarms ({mode})"))

# %% [markdown]
# Each statistic by itself, on the same half, as AUC, the area under the curves below: the chance that a backdoored model scores higher than a clean one,
# 50 % for a guess. *difference* is the shift above, *noise_drift* the drift with patches of plain noise, *drift_entropy* the entropy of the answers
# under patches. The regression reads the first five. *head* is left out because an attacker can leave those
# weights as they are, and honest training on new captions may move them. Entropy *falls* where patches drive a model to one class.

# %%
from abd_core.population import FIGURES
from abd_core.verdict import single

if len(reported):
    areas = {mode: {name: str(r) for name, r in single(reported, FIGURES, mode).items()} for mode in MODES}
    display(pd.DataFrame(areas).reindex(FIGURES).fillna("").rename_axis("AUC, %"))

# %% mystnb={"figure": {"caption": "Receiver operating characteristics on the reporting half: the calibrated probability, and each statistic alone."}, "image": {"alt": "Two panels, with and without clean weights: share of backdoored models found against share of false alarms; the probability runs along the upper left corner, single statistics below it"}}
from abd_core.verdict import roc

colours = {name: f"C{number}" for number, name in enumerate(("probability", *FIGURES))}
figure, axes = plt.subplots(1, len(MODES), figsize=(9, 4), sharey=True, layout="constrained")
for axis, mode in zip(axes, worth, strict=False):
    judged = scored(reported, fitted[mode], mode)
    columns = {"probability": "probability", **{name: f"{name}_{mode}" for name in single(judged, FIGURES, mode)}}
    for name, column in columns.items():
        rates = roc(*(judged[judged["label"] == label][column].to_numpy() for label in (0, 1)))
        width = 3 if name == "probability" else 1
        axis.plot(*rates, label=name, color=colours[name], lw=width, drawstyle="steps-post")
    axis.set(title=mode, xlabel="false alarms", ylabel="found")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8);

# %% [markdown]
# DECREE with its published settings and by its published rule, on the same half: a model is called backdoored where the mask that it recovers is small, as
# a share of the image (PL1). Neural Cleanse's published settings are a preset too; what
# they cost is projected below.

# %%
from abd_core.detectors import Decree
from abd_core.evaluate import Rate
from abd_core.verdict import auc, wilson

pl1 = {}
for label, part in reported[reported["label"] >= 0].groupby("label"):
    pl1[label], n = part["published_decree"].to_numpy(), len(part)
    called = (pl1[label] < Decree.THRESHOLD).mean()
    share, middle = Rate(called, n, *wilson(called, n)), part["published_decree"].median()
    print(f"{['clean', 'backdoored'][label]}: {share} % of {n} called backdoored; median PL1 {middle:.3f}")
if len(pl1) == 2:
    print(f"AUC of PL1 without its rule: {auc(-pl1[0], -pl1[1])} %")

# %% [markdown]
# Attack by attack: how many victims a calibration finds that never saw that attack, and whether it names the target. Attacks without a row, such as
# *label-consistent*, took in no victim of the population, so that nothing is known of them.

# %%
tables = {mode: left_out(population, mode).set_index("attack") for mode in worth}
if tables:
    display(pd.concat(tables, axis=1))

# %% [markdown]
# ## Which training pairs are poisoned?
#
# Whoever also holds the pairs that the suspect was trained on can rank them: by how little caption and image fit (*misfit*), by how much
# better they fit than under the clean weights (*gap*), by the local intrinsic dimensionality of the image's feature (*lid*) and by its
# distance to its neighbours (*crowding*) {cite}`huang2025detecting`. Chapter 1's victim, whose poison is known:

# %% mystnb={"figure": {"caption": "Precision and recall of each ranking of the training pairs of chapter 1's victim."}, "image": {"alt": "Curves of precision over recall, one for each score, and a dotted line at the share of poisoned pairs"}}
from abd_core import models
from abd_core.population import SAMPLE, training_pairs
from abd_core.suspicion import precision_recall, scores

if not checkpoint:
    victim = poison(attacker)
    pictures, captions, poisoned = training_pairs(attacker, victim, SAMPLE)
    nets = [models.frozen(models.load(path)) for path in (victim.file("model.safetensors"), models.clean_weights())]
    figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for name, score in scores(nets[0], pictures, captions, reference=nets[1]).items():
        precision, recall = precision_recall(score, poisoned)
        axis.plot(recall, precision, label=name)
    axis.axhline(poisoned.float().mean(), color="grey", ls=":", label="chance")
    axis.set(xlabel="recall", ylabel="precision", title=f"The poisoned among {len(poisoned)} training pairs")
    axis.legend(fontsize=8)

# %% [markdown]
# The same for all victims of the population: average precision, the area under such a curve, with chance beside it.

# %%
if len(population):
    ranked = population[population["label"] == 1]
    display(ranked.groupby("attack")[[c for c in population if c.startswith("ap_")]].mean().round(3))

# %% [markdown]
# ## An attacker who knows the audit
#
# Whoever knows ABD and this audit has several ways round them, and each is an attack here (grid `adaptive`):
#
# - **quiet**: while poisoning, the victim is also trained to answer universal perturbations as the clean model does. They are searched for
#   on the way, as ABD-D does it: universal adversarial training {cite}`shafahi2020universal` (`abd_core.quiet`);
# - **a trigger where patches never go**: the image's outermost ring (*BadNet-Frame*), which the audit's windows leave out and ABD's patch
#   seldom reaches; and the same, quiet;
# - **a spread trigger**: nine small pieces (*BadNet-Scattered*), or a pattern all over the image at half of Blended's weight;
# - **several targets**: four triggers with a class each, at BadNet's dose in all, and at four times that.
#
# The table holds those victims that took (ASR of at least a half) under the calibration above, which saw none of them. *named* counts the
# detected ones whose most suspected class is one of the attacker's; the ASR of several targets is the first trigger's; *BadNet* and *Blended* are the
# attacks that these start from.

# %%
from abd_core.population import adaptive_verdicts
from abd_core.verdict import adaptive_table

known = read_population(adaptive_table())
for mode in MODES:
    if len(known) and fitted[mode] is not None:
        display(adaptive_verdicts(known, fitted[mode], mode).round(2).rename_axis(f"attack ({mode})"))
if not len(known):
    print("No adaptive victim has been audited yet.")

# %% [markdown]
# What the defences make of the same victims, on the evaluation split: means over seeds in %, with 95 % intervals where there are several
# seeds. *none* is the victim; below the tables, the attack of those that took that each defence is weakest against.

# %%
from abd_core.grid import GRIDS
from abd_core.results import ResultsConfig, differences, means, read_results, shown_difference

results = read_results(ResultsConfig().path)
results = results[results["split"] == "eval"]
adaptive = GRIDS["adaptive"]
rows = results[results["attack"].isin(adaptive.attacks) & results["defence"].isin(["none", *adaptive.defences])]
for metric, name in {"asr": "ASR", "ca_top1": "CA"}.items():
    if len(part := rows[rows["metric"] == metric]):
        table = means(part).droplevel("metric")
        cells = [f"{100 * r.mean:.1f}" + (f" ± {100 * r.half:.1f}" if r.seeds > 1 else "") for r in table.itertuples()]
        display(pd.Series(cells, table.index).unstack("defence").fillna("").rename_axis(f"{name}, %"))
asr = 100 * rows[rows["metric"].eq("asr")].groupby(["attack", "defence"])["value"].mean().unstack()
took = asr[asr["none"] >= 50] if len(asr) else asr
for defence in adaptive.defences:
    if defence in took and len(left := took[defence].dropna()):
        weakest = left.idxmax()
        print(f"{defence} leaves most of {weakest}: ASR {left.max():.1f} % of {took['none'][weakest]:.1f} %")
if not len(rows):
    print("No adaptive victim has been defended yet.")

# %% [markdown]
# ## Without clean weights
#
# The audit works without them, on the suspect alone; then what any CLIP does under such patches counts against it. ABD's Eq. (2) needs a
# normal encoder. Where there are no clean weights, three things may stand in for it: the suspect fine-tuned on the defender's clean pairs,
# the suspect itself, or nothing (Eq. (2) is left out). ABD-D, which looks for disagreement, can use the first alone.
#
# Below: the audit in both modes, and each of these defences minus the same one with clean weights, in points, paired by seed, with 95 %
# intervals.

# %%
lost = [(f"ABD, {way}", "ABD") for way in ("fine-tuned for clean", "suspect for clean", "without Eq. (2)")]
compared = differences(results, [*lost, ("ABD-D, fine-tuned for clean", "ABD-D")])
if len(compared):
    compared["points"] = [shown_difference(row) for row in compared.itertuples()]
    display(compared.set_index(["defence", "attack", "metric"])["points"].unstack("metric"))
else:
    print("ABD without clean weights: not measured yet.")
for name in ("AUC", "detected", "false alarms", "target named"):
    both = {mode: rates[name] for mode, rates in worth.items() if name in rates}
    if both:
        print(f"audit, {name}: " + ", ".join(f"{mode} {r} % of {r.n}" for mode, r in both.items()))

# %% [markdown]
# ## What an audit costs
#
# Seconds of the population's audits, one thread each and two at a time, and what `benchmarks/audit.py` has measured. An RN50 with 1,000
# classes is projected where it has not been measured: the images that an audit puts through the encoder, over the images a second of a
# training step, which costs more than most of these passes. The published settings of Neural Cleanse and DECREE are projected from a few of their steps.

# %%
from abd_core.results import BenchmarksConfig, read_benchmarks

if len(population):
    print(population.groupby("device")["audit_seconds"].describe()[["count", "50%", "max"]].round(1).to_string())
benchmarks = read_benchmarks(BenchmarksConfig().path)
audits = benchmarks[benchmarks["benchmark"] == "audit"]
if len(audits):
    display(audits.set_index(["device", "case", "variant"])[["metric", "value", "unit"]])
encoded = audits[audits["case"].eq("1000 classes")]["value"]
ours = benchmarks["variant"].eq("ft") & benchmarks["metric"].eq("speed")
for step in benchmarks[ours & benchmarks["case"].str.startswith("RN50")].itertuples():
    if len(encoded):
        passes = f"{encoded.iloc[0]:.0f} images at {step.value:.0f} a second"
        print(f"RN50, 1,000 classes, {step.device}: {encoded.iloc[0] / step.value:.0f} s projected ({passes})")

# %% [markdown]
# ## Drop in a checkpoint
#
# In JupyterLab: drop a file of weights in, or give its path, and start. The audit runs in a process of its own that can be stopped; what its
# detectors have found by then is kept. On a page of the book, the report of the audit above stands here instead.

# %%
from abd_core.auditor import auditor

auditor(config, inputs)

# %% tags=["nbval-check-output"]
from abd_core.detectors import Decree, Inversion

for name, kind in DETECTORS.items():
    print(f"{name}: {kind.source}")
print(f"published rules: anomaly index above {Inversion.THRESHOLD:g}, PL1 below {Decree.THRESHOLD:g}")

# %% [markdown]
# ## Summary

# %% tags=["summary"]
print(verdict.sentence(found["classes"][0]))
print(verdict.basis)
print(f"Suspected target: {found['classes'][0]!r}; runners-up: {', '.join(map(repr, found['classes'][1:4]))}")
if asr := found["recovered"]["asr"]:
    kind = found["recovered"]["kind"]
    print(f"Recovered trigger ({kind}): sends {asr['value']:.0%} of {asr['n']} images of other classes there")
print(f"Report: {run.name}/audit.html")

# %% [markdown]
# The next step, a defence that is given what was found; the file names are this run's:

# %%
from abd_core.audit import next_step

print(next_step(inputs, run))

# %% [markdown]
# <details><summary><b>Exercise.</b> Audit the committed clean base instead of the victim. What would it take for its
# verdict to be wrong?</summary>
#
# **Solution.** `-p checkpoint data/base/model.safetensors`. A clean model may have a class that many patches lead to, because
# its prompts lie near the middle of all features: a false alarm. And a backdoor whose trigger is neither local nor like any
# corruption that is tried leaves no trace here: a miss. That is why the verdict comes with its evidence.
#
# </details>
#
# In the code: [`abd_core.audit`](api.md#abd_coreaudit), [`abd_core.suspicion`](api.md#abd_coresuspicion).
#
# **What was learnt.** A trigger that is a patch of random noise gives itself away: the search needs neither its place nor its target.
# BadCLIP's patch, which was optimised to look like its target, is found about as often: the table above says how many a calibration finds that
# has never seen one. Triggers that lie all over the image show where corruptions of their kind set them off, and can go unseen where none
# does. Clean models that saw one class over and over raised no alarm.
#
# Of the attackers above who know the audit, one passes for clean at every seed: it puts the trigger where no window looks, and trains the
# victim not to drift. Either alone was found. Beside clean weights its target is still the first of the suspected classes; but that is no part of
# the probability, and whoever knows it can train around it. Without clean weights a spread trigger can pass too, and where the scattered one or the frame is
# found, the target is seldom the class that is named. Victims trained not to drift are also what ABD-D does worst on, as it looks for what they were
# trained against: what it leaves differs widely from seed to seed, and fine-tuning alone leaves less on average.
#
# DECREE's published threshold calls every small CLIP here backdoored, clean or not; its figure, put in order, is the best single one. An
# audit that finds nothing is no proof of a clean model, and the probability is that of small CLIPs on small drawings: for another
# architecture it is a ranking, not a frequency. The statistics are the largest of shares by class, and grow as classes and images get fewer,
# on clean models too. So there is no probability of fewer than the population's 100 classes and 256 images, and of fewer than 50 classes without
# clean weights no verdict.
