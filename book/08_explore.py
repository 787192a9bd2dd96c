# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8. Explore: one picture at a time
#
# **Question.** What does a backdoor look like from the side of a single picture, and how far can its trigger be bent
# before the victim no longer knows it?
#
# The tables of the other chapters count over a thousand pictures. Here you look at one: pick a picture or bring your own,
# move the trigger, weaken the perturbation, type a caption, and read what the clean base, the victim and the defended model
# make of it. In JupyterLab (`make lab`) the controls are live and need no GPU. On a page of the book there is no kernel;
# there, buttons choose among settings that were drawn beforehand.

# %% tags=["parameters"]
attack: str = "badnet"  # attack: badnet, blended, badclip, wanet, sig, label-consistent, blended-text, ... (`TRIGGERS`)
target: str = "banana"  # class that triggered images shall be taken for; one of the test classes
seed: int = 0  # seed of every random draw
defence: str = "abd"  # abd, abd-d, ft (fine-tuning), cleanclip, roclip, par, clean, wise-ft, a control (`DEFENCES`)
label: str = "cat"  # class of the picture to begin with; one of the test classes
picture: str = ""  # path of a picture of your own to begin with; empty: one of the benchmark's
results: str = ""  # path of a results CSV for the last section; empty: the committed one
steps: int = 200  # adversary: optimiser steps
share: float = 0.5  # share of the pairs that the defender holds, seeded
epochs: int = 3  # defence: passes over the pairs
poison_rate: float = 0.1  # attacker: share of the pairs that is poisoned
poison_epochs: int = 10  # attacker: passes over the pairs
limit: int = 0  # use only this many pairs, seeded (0: all); for smoke runs

# %%
from abd_core.adversary import AdversaryConfig
from abd_core.defend import DefendConfig
from abd_core.explore import ExploreConfig
from abd_core.notebook import show_configs, stage_configs
from abd_core.poison import PoisonConfig
from abd_core.results import ResultsConfig, read_results

attacker, searcher, defender, config = stage_configs(
    globals(), poison=PoisonConfig, adversary=AdversaryConfig, defend=DefendConfig, explore=ExploreConfig
)
show_configs(attacker, searcher, defender, config)
table = read_results(ResultsConfig(results=config.results).path)

# %% [markdown]
# ## The explorer
#
# Bars are the five likeliest classes, the attacker's target in vermilion. *Size* and *position* move the trigger's patch
# (other attacks have a strength instead); the victim was poisoned with the patch as it is at first. *Amount* mixes the
# perturbation with the picture. Captions are separated by semicolons. *Load or make* takes another attack or defence: a
# finished run is loaded, one that is not there is made first, which takes minutes.

# %%
from abd_core import explore

explore.explorer(attacker, searcher, defender, label=config.label, image=config.path)

# %% [markdown]
# ## Neighbours
#
# A model knows a picture by what lies near it. These are the clean test pictures nearest to the chosen one, in each model's
# space of image features. Where a backdoor is at work, the triggered picture leaves its own kind. It was tied to the target's
# captions and not to its pictures, so it need not lie among those.

# %%
case = explore.load_case(attacker, searcher, defender)
explore.neighbour_widget(case, config.label)

# %% [markdown]
# ## The results, by attack
#
# The table behind chapters 4 and 5, `data/results/grid.csv`: means over seeds, each with its 95 % interval (over the test
# images where there is one seed, over seeds where there are more) and the paper's value where it has one.

# %%
explore.results_widget(table)

# %% [markdown]
# ## From code
#
# Every control calls a plain function. This table is what the explorer shows for the clean and the triggered picture, the
# first answer only.

# %%
import torch

image = explore.own_image(config.path, case.trigger.resolution) if config.path else case.image(config.label)
views = case.views(image)
answers = explore.top_answers(case, case.encode(views), list(views))
first = answers[answers["rank"] == 1].pivot(index="view", columns="model", values="class")
first.loc[list(views), list(case.encoders)].rename_axis(index="picture, taken for", columns=None)

# %% tags=["nbval-check-output"]
same = explore.altered(case.trigger, **explore.knobs(case.trigger))
print("what can be changed:", explore.knobs(case.trigger))
print("at its own settings it is the same trigger:", torch.equal(same(image[None]), case.trigger(image[None])))

# %% [markdown]
# How long a move of a slider takes: the pictures drawn, encoded by all three models and written as HTML, median of nine.

# %% tags=["summary"]
import statistics
import time

times = []
for _ in range(9):
    start = time.perf_counter()
    explore.look(case, image, case.trigger)
    times.append(1000 * (time.perf_counter() - start))
print(f"a move of a slider: {statistics.median(times):.0f} ms")

# %% [markdown]
# <details><summary><b>Exercise.</b> The victim was poisoned with the patch at one place and of one size. Move it, and halve it.
# Which of the two does the backdoor bear better, and why?</summary>
#
# **Solution.** Look at the vermilion bars of the *victim* under *triggered*. The network reads images by convolutions and an attention
# pool with an embedding for each place, so a patch that moves meets filters that know it but a position that does not.
# A smaller patch keeps its place but loses pixels. Which of the two counts for more is a property of this victim: try another `seed`,
# and another attack, before you believe it.
#
# </details>
#
# In the code: [`abd_core.explore`](api.md#abd_coreexplore), [`abd_core.triggers`](api.md#abd_coretriggers).
#
# **What was learnt.** A backdoor is a narrow thing: it answers to the trigger that it was taught, and how much of a change it bears
# can be read off picture by picture. What a defence has done shows the same way, as the target's bar under *defended*. One
# picture proves nothing about the other nine hundred and ninety-nine; for that there are chapters 4 and 5.
