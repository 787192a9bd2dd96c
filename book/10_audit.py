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
#   model answers scatter, on a backdoored one they gather at the attacker's class;
# - **answers under corruptions** (noise, blotches, warps, waves, stripes): triggers that lie all over the image are seldom learnt exactly;
# - **additive perturbations** towards each class, and the **shift** of clean images' answers against the clean weights;
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
from abd_core.audit import AuditConfig, AuditInputs, audit, load_finding, picture, verdict_of
from abd_core.notebook import show_configs, stage_configs
from abd_core.poison import PoisonConfig, poison

attacker, inputs, config = stage_configs(globals(), poison=PoisonConfig, inputs=AuditInputs, audit=AuditConfig)
if not inputs.checkpoint:
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
pd.DataFrame(found["statistics"]).round(3).rename_axis("statistic")

# %% [markdown]
# Drift, place by place: the share of held-out images of other classes that each optimised patch sends to the suspected class.

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
# Attack by attack: how many victims a calibration finds that never saw that attack, and whether it names the target.

# %%
left_out(population, "compared") if len(population) else None

# %%
if len(population):  # ranking the victims' training pairs (abd_core.suspicion): average precision, chance beside it
    ranked = population[population["label"] == 1]
    display(ranked.groupby("attack")[[c for c in population if c.startswith("ap_")]].mean().round(3))

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
# **What was learnt.** A backdoor whose trigger is a patch gives itself away: the search needs neither its place nor its target. Triggers that lie
# all over the image show where corruptions of their kind set them off, and can go unseen where none does. A quiet audit is no proof of a
# clean model, and the probability is that of small CLIPs on small drawings: for another architecture it is a ranking, not a frequency.
