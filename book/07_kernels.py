# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. Kernels: the loss without its matrix, and one pass over the pixels
#
# **Question.** What in this book's training is worth a kernel of its own, how do we know that it is right, and what does it gain?
#
# Two things run in every step of every stage. *InfoNCE* compares all images of a batch with all captions; Eq. (2), CLIP's loss and
# CleanCLIP's are made of it. *Perturbing* pastes, adds or blends a pattern on each image, clamps it, normalises it and hands it to the encoder in
# the encoder's precision. Each has one public function with two implementations: in torch, for any machine, and in Triton, for
# GPUs.

# %% tags=["parameters"]
benchmarks: str = ""  # path of a CSV that `make bench` wrote; empty: the committed one

# %%
from abd_core.notebook import show_configs, stage_configs
from abd_core.results import BenchmarksConfig, read_benchmarks

(config,) = stage_configs(globals(), benchmarks=BenchmarksConfig)
show_configs(config)
measured = read_benchmarks(config.path)

# %% [markdown]
# ## The problem: a matrix that nobody wants
#
# With unit features $q_i$ of images and $k_j$ of captions and the scale $s$, the logits are $l_{ij} = s \, q_i \cdot k_j$, and CLIP's loss is
#
# $$
# L = \frac{1}{2B} \sum_i \Big( \log \sum_j e^{l_{ij}} - l_{ii} \Big) + \frac{1}{2B} \sum_j \Big( \log \sum_i e^{l_{ij}} - l_{jj} \Big) .
# $$
#
# Written as in the formula, it keeps the $B \times B$ logits, and their softmax in both directions, until the backward pass. The features take
# $2 B D$ numbers. Mebibytes in float32 at $D = 1024$:

# %% tags=["nbval-check-output"]
import pandas as pd

batches = [64, 1024, 8192, 32768, 131072]
pd.DataFrame(
    {"features": [2 * 4 * b * 1024 / 2**20 for b in batches], "one matrix": [4 * b * b / 2**20 for b in batches]},
    index=pd.Index(batches, name="B"),
)

# %% [markdown]
# ## The derivation: two vectors are enough
#
# All that the gradient needs of the matrix are the sums of its rows and columns. With $r_i = \log \sum_j e^{l_{ij}}$ and $c_j = \log \sum_i
# e^{l_{ij}}$,
#
# $$
# B \, \frac{\partial L}{\partial l_{ij}} = \tfrac12 e^{l_{ij} - r_i} + \tfrac12 e^{l_{ij} - c_j} - \delta_{ij} =: p_{ij} ,
# \qquad
# \frac{\partial L}{\partial q} = \frac{s}{B} \, P k , \qquad \frac{\partial L}{\partial k} = \frac{s}{B} \, P^\top q ,
# \qquad
# \frac{\partial L}{\partial s} = \frac1B \sum_i q_i \cdot (P k)_i .
# $$
#
# So a tile of the matrix can be thrown away once its part of $r$ and $c$ is known, made again when its part of the gradient is due, and
# thrown away again. The last formula needs no matrix at all: $P k$ is there already. The parts of $r$ and $c$ go together like this, which never
# overflows, since each part is a logarithm:

# %%
import torch

generator = torch.Generator().manual_seed(0)
image, text = torch.nn.functional.normalize(torch.randn(2, 300, 16, generator=generator, dtype=torch.float64), dim=-1)
logits = 100 * image @ text.T
tiles = [tile.split(70, 1) for tile in logits.split(130)]
rows = torch.cat([torch.stack([tile.logsumexp(1) for tile in row]).logsumexp(0) for row in tiles])
columns = torch.stack([torch.cat([tile.logsumexp(0) for tile in row]) for row in tiles]).logsumexp(0)
print("largest error of a row:", (rows - logits.logsumexp(1)).abs().max().item())
print("largest error of a column:", (columns - logits.logsumexp(0)).abs().max().item())

# %% [markdown]
# ## The kernels
#
# `info_nce` in Triton makes a tile with the tensor cores, in float32 registers, whatever the features' precision. A first kernel writes each tile's
# row and column sums, and they are put together in a fixed order: no atomics, so the same inputs give the same bits. A second one
# makes the tile again, turns it into $p$, and writes it in the features' precision into a buffer of some rows, from which the matrix library makes $P k$
# and $P^\top q$. The positives' $p - 1$ has no part in that: it would be rounded to the features' precision, and where a product adds up thousands of
# small numbers in float32, one that is nearly 1 makes it round all that follow at its own size. A third kernel adds the positives' part afterwards, in
# float32. Gradients are made together with the loss and only scaled in the backward pass. In torch, chunks of rows do the same, but for small
# matrices on a CPU: up to four megabytes of logits, two in both directions, are made whole and left to autograd, which takes fewer calls, and without
# gradients up to sixteen in one direction. In one direction, or without gradients, one pass over chunks is enough; both with gradients need a second one
# for the columns' sums, and are made whole up to 64. Else a CPU's chunks are of sixteen megabytes: larger ones are memory that the system takes back
# and has to clear again in the next call. In float32 there
# are no tensor cores without TF32, and with gradients the matrix library alone is faster than the kernel: large batches go there unless the kernel
# is asked for. A
# backward pass all in one kernel, which would not write $p$ at all, has not been built and so not been compared.
#
# One function serves all losses of the book: weights for the two directions, positives that come from elsewhere (Eq. (2) with the clean
# encoder's features), more keys than queries (features of other ranks).

# %%
import inspect

from abd_core.kernels.infonce import info_nce
from abd_core.kernels.perturb import perturb

for function in (info_nce, perturb):
    print(f"{function.__name__}{inspect.signature(function)}\n")

# %% [markdown]
# `perturb` reads an image once, in bytes or floats, and writes it once, in the encoder's precision and memory layout:
# $x' = (\mathrm{clamp}(a x + b \, \delta) - \mu) / \sigma$, where $(a, b)$ is $(0, 1)$ for a patch, $(1, 1)$ for an addition and
# $(1 - \alpha, \alpha)$ for a blend, and the pattern $\delta$ and its place are each image's own. Backward, the gradient of a pattern
# is a sum over the batch: each program takes some of the pattern's pixels, and some images of the batch at a time, which it adds up in a fixed order.
# A pattern of the images' size has enough blocks for all of a GPU, and is summed where it is returned; for a small one, several programs share the
# batch, and their sums are added up in turn.
# Forward, what counts is how results are written. A thread has eight pixels, which with channels last are three vectors of 16 bytes side by side, while
# memory takes 32 bytes at a time: each vector on its own would be half of that, and the L2 cache puts the halves together. So two neighbours exchange a
# vector, and each write fills what it touches.
#
# The stages do not use all of it at once. They need perturbed images in $[0, 1]$ too, for other losses and to be shown: a perturbation is put on
# in one call, in floats, and normalised and cast in another one, on the way into the encoder. The measurements are of both in one pass.
#
# ## The proof
#
# Against the formula in float64, on random features; the error is in units of the largest entry. The tests ask the same of awkward shapes, of
# scales up to 100 with every cosine at -1, and with NaN around features, gradients and results in memory, on inputs that each run draws anew. Without a GPU they run Triton's kernels in its
# interpreter, and compile them for two generations of GPUs.

# %%
import open_clip

from abd_core.losses import ClipLoss


def errors(batch: int, scale: float) -> dict[str, float]:
    """Largest relative errors of loss and gradients in float32."""
    exact = [*torch.nn.functional.normalize(torch.randn(2, batch, 64, generator=generator).double(), dim=-1)]
    found = []
    for kind, loss in ((torch.float64, open_clip.ClipLoss()), (torch.float32, ClipLoss())):
        leaves = [leaf.to(kind).requires_grad_() for leaf in (*exact, torch.tensor(scale))]
        value = loss(*leaves)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    names = ("loss", "images", "texts", "scale")
    return {n: ((a - b).abs().max() / a.abs().max()).item() for n, a, b in zip(names, *found, strict=True)}


cases = [(batch, scale) for batch in (7, 300) for scale in (1.0, 14.3, 100.0)]
pd.DataFrame([errors(*case) for case in cases], index=pd.MultiIndex.from_tuples(cases, names=["B", "scale"])).map(
    "{:.0e}".format
)

# %% [markdown]
# What is kept until the backward pass, counted by autograd's own hooks, in numbers per feature (open_clip's loss keeps several matrices):

# %%
kept: dict[str, float] = {}
for name, loss in {"open_clip": open_clip.ClipLoss(), "abd_core": ClipLoss()}.items():
    leaves = [torch.randn(1024, 64, generator=generator).requires_grad_() for _ in range(2)]
    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t, s=sizes: s.update({t.data_ptr(): t.numel()}) or t, lambda t: t
    ):
        loss(*leaves, torch.tensor(10.0))
    kept[name] = sum(sizes.values()) / (2 * 1024 * 64)
pd.DataFrame([kept], index=["numbers kept per number in the features"]).round(1)

# %% [markdown]
# ## The measurement
#
# All variants of a case take turns in one process, so a slow moment of the machine meets all of them. Ratios are to a case's first variant; where that is
# not the first of the legend, the case says "1:" and its name. A ratio is the median of those of the turns, and the line at the end of its bar the 95 %
# interval by bootstrap over the turns, too narrow where the machine's state lasts for many of them. A training step on a CPU lasts long enough for the
# machine to change in a turn: there a step of the plain loop comes before each that is compared with it. (The H200's rows are from before: ratios of
# medians, no intervals.) The times themselves, in ms, are in `benchmarks/results.csv`. A star marks an implementation without a gradient for the scale.
# Devices that have been measured, and the revisions (runs) of which there are figures:

# %%
from abd_core import plots

plots.style()
figures = measured.assign(run=measured["git_sha"].fillna("").str.slice(0, 7))
groups = figures.groupby(["device", "benchmark", "run", "versions"], sort=False)
groups.agg(cases=("case", "nunique"), figures=("value", "size"))

# %% [markdown]
# A ratio is of one run. Where a case was measured again, but not all of its variants, those of the earlier run are not shown beside the others:

# %%
latest = figures.groupby(["device", "benchmark", "case", "metric"])["run"].transform("last")
earlier = figures[figures["run"].ne(latest) & figures["ratio"].notna()]
measured = figures.drop(earlier.index)
earlier.set_index(["device", "benchmark", "case"])[["variant", "metric", "run"]]

# %% [markdown]
# What `make bench` times and has not been measured on a device that is listed:

# %%
named = {
    "infonce": ["open_clip", "open_clip compiled", "abd_core torch", "backward", "forward + backward"],
    "perturb": ["torchvision compiled", "kornia eager", "kornia compiled", "abd_core torch", "forward + backward"],
    "training step": [
        *("plain loop", "plain loop, patch and EDA", "ft", "abd", "cleanclip", "ft, compiled", "time in convolution")
    ],
    "adversary step": ["plain AdvCLIP", "abd_core", "RN50-quickgelu, batch 128, width 1024"],
    "loading": [],
    "audit": [],
}
on_gpus = {
    "infonce": ["float32", "abd_core triton", "memeff*", "inf-cl"],
    "perturb": ["abd_core triton", "peak memory", "forward, in a row"],
    "training step": ["ft, no graphs", "abd from tars", "peak memory reserved"],
}
on_cpus = {"adversary step": ["plain AdvCLIP", "abd_core", "emoji-rn14, batch 64, width 128"]}
for device, part in measured.groupby("device", sort=False):
    gpu = device.startswith("NVIDIA")
    for benchmark, names in named.items():
        rows = part[part["benchmark"] == benchmark]
        wanted = names + on_gpus.get(benchmark, []) if gpu else on_cpus.get(benchmark, names)
        found = {*rows["variant"], *rows["metric"], *rows["case"]}
        missing = ", ".join(f'"{name}"' for name in wanted if name not in found) if len(rows) else "everything"
        print(f"{device}: {benchmark}: {missing}" if missing else f"{device}: {benchmark}: complete")

# %% [markdown]
# The H200's rows of InfoNCE from 65,536 on are of a run of their own. All of them are from before the positives were left out of the products: a small
# kernel and a sum now take the place of a product of the features' size and its sum. memeff's kernel does not fit this GPU in float32 at $D = 1024$, so it has no rows
# of that. The H200's rows of `perturb`, forward, are from before what is no number stayed none: the clamp made it 0 then, and took two instructions a value
# less. The kernels of its gradient are as they were measured.
#
# ### By the clock

# %% mystnb={"figure": {"caption": "InfoNCE forward and backward, ratios to the first implementation."}, "image": {"alt": "Bars of how many times faster each implementation of InfoNCE is than the first"}}
contrast = measured[measured["benchmark"] == "infonce"]
plots.speeds(contrast, "forward + backward", title="InfoNCE, loss and gradients: speed");

# %% [markdown]
# *One way* is one direction alone, which Eq. (2) and the in-modal losses are. Up to $B = 512$ the CPU's rows of *abd_core torch* are the plain composition
# too, in both directions from one product where open_clip makes two. In one direction, what the check of the arguments takes is saved again by keeping
# the numbers of the positives from call to call: both are some microseconds, and up to $B = 512$ the two are as fast as one another to a percent. The
# loss alone, without gradients, is the plain composition up to $B = 2048$.

# %% mystnb={"figure": {"caption": "Perturbing a batch, ratios to the first implementation."}, "image": {"alt": "Bars of how many times faster each implementation of perturbing is than the first"}}
painting = measured[measured["benchmark"] == "perturb"]
plots.speeds(painting, "forward", title="Perturbing a batch: speed");

# %% mystnb={"figure": {"caption": "The gradient of a perturbation, ratios to the first implementation."}, "image": {"alt": "Bars of how many times faster each gradient of a perturbation is than the first"}}
plots.speeds(painting, "backward", title="The gradient of a perturbation: speed");

# %% [markdown]
# ### The GPU's own time
#
# On a GPU, a call on its own mostly waits for the CPU that launches it: the figures above count that. Where the CPU runs ahead, as it does
# in a loop that reads nothing back, the time of the device itself is what counts. How many times less of it than the first implementation each one takes:

# %%
def wide(rows: pd.DataFrame, *index: str) -> pd.DataFrame:
    """A column a variant with three digits that count, empty where it was not tried."""
    table = rows.pivot_table(index=["device", *index], columns="variant", values="value", sort=False)
    return table.map(lambda value: "" if pd.isna(value) else f"{value:.0f}" if value >= 100 else f"{value:.3g}")


of_device = painting[painting["metric"].str.endswith(", device")]
wide(of_device.assign(value=of_device["ratio"]), "case", "metric")

# %% [markdown]
# ### How near the ceiling
#
# In % of what the same run measured: of the rate of a matrix product for InfoNCE, loss and gradients by the clock, which
# counts four products of $2 B^2 D$ operations, and of the bandwidth of a copy for perturbing, in the device's own time, which counts each pixel read and
# written once. (The gradient of a small patch moves too little to be bound by bandwidth. Where a batch is one chunk, *abd_core torch* makes three of the
# four products, as open_clip does: of both, these shares count a third more than was done.)

# %%
wide(contrast[contrast["metric"] == "share of the ceiling"], "run", "case")

# %%
of_bandwidth = painting[painting["metric"].isin(["forward, of bandwidth", "backward, of bandwidth"])]
wide(of_bandwidth, "run", "case", "metric")

# %% [markdown]
# Memory beyond the inputs, gradients included, in MiB (measured on GPUs):

# %%
wide(contrast[contrast["metric"] == "peak memory"], "run", "case")

# %% mystnb={"figure": {"caption": "Achieved speed and the ceilings that each benchmark measured."}, "image": {"alt": "Operations per second over operations per byte, under the measured ceilings"}}
measures = {"infonce": "forward + backward", "perturb": "forward"}
own_time = measured.replace({"metric": {"forward, device": "forward"}})  # the shorter of the two is taken
plots.roofline(own_time, measures, title="Achieved, and each benchmark's ceilings");

# %% [markdown]
# ### What was asked, and what was reached
#
# The bars that were set before there was a kernel, against the figures on an H200 and on two cores, of an AMD EPYC and of an Intel Xeon with a matrix
# unit for bf16 (AMX). Rows are of several revisions (`git_sha` in the table): the H200's of training steps, of reading tars and of the adversary are of
# earlier kernels than those of the kernels themselves, and the EPYC's of training steps and of the adversary are of towers without what is
# said of bf16 below (*Computing less*).

# %%
import itertools
import operator

rows = measured.assign(size=pd.to_numeric(measured["case"].str.extract(r"B=(\d+), .*bfloat16")[0]))
triton = rows[rows["variant"] == "abd_core triton"]
both = triton.merge(rows[rows["variant"] == "memeff*"], on=["device", "case", "metric"], suffixes=("", " of memeff"))
# Quotients of two rows are no ratios of turns, and have no interval.
against = both.assign(times=both["value of memeff"] / both["value"])
of_product = triton[triton["size"].eq(32768) & triton["metric"].eq("share of the ceiling")]
bars = [("InfoNCE, B = 32768: % of the ceiling", 45, of_product, "value")]
large = triton[triton["size"].ge(4096) & triton["size"].le(65536) & triton["metric"].eq("forward + backward")]
bars += [("InfoNCE, B >= 4096: times as fast as open_clip, at least", 1, large, "ratio")]
for what in ("forward + backward", "forward"):
    bars += [(f"InfoNCE, {what}: times as fast as memeff, at least", 1, against[against["metric"] == what], "times")]
for kind, (what, asked) in itertools.product(("patch", "additive"), (("forward", 85), ("backward", 60))):
    chosen = triton[triton["case"].str.startswith(kind) & triton["metric"].eq(f"{what}, of bandwidth")]
    bars += [(f"perturb, {kind}, {what}: % of the bandwidth of a copy", asked, chosen, "value")]
timings = {
    "forward, device": "the GPU's own time",
    "forward, in a row": "by the clock, 20 calls in a row",
    "forward": "by the clock, one call",
}
for metric, whose in timings.items():
    chosen = triton[triton["benchmark"].eq("perturb") & triton["metric"].eq(metric)]
    bars += [(f"perturb, forward, {whose}: times as fast as torch, at least", 4, chosen, "ratio")]
trained = rows[rows["variant"].eq("abd") & rows["case"].str.startswith("RN50") & rows["metric"].eq("step")]
bars += [("ABD's training step: times as fast as the plain loop, at least", 3, trained, "ratio")]
plainly = rows[rows["variant"].eq("ft") & rows["metric"].eq("step")][["device", "case", "value"]]
beside = trained.merge(plainly, on=["device", "case"], suffixes=("", " of ft"))
beside = beside.assign(times=beside["value of ft"] / beside["value"])
bars += [("and as FT's, which perturbs nothing, at least", 0.9, beside, "times")]
trained = rows[rows["variant"].isin(["ft", "abd"]) & rows["case"].str.startswith("emoji") & rows["metric"].eq("step")]
bars += [("FT's and ABD's training steps: times as fast as the plain loop, at least", 2, trained, "ratio")]
widest = triton[triton["size"].eq(131072) & triton["metric"].eq("peak memory")]
hours = rows[rows["metric"] == "paper's defence, with loading"]
limits = [
    ("InfoNCE, B = 131072: peak memory with the gradients, MiB, at most", 4096, widest, "value"),
    ("The paper's defence with loading: hours, at most", 1, hours, "value"),
]
reached = {}
for wanted, worst, enough in ((bars, pd.Series.idxmin, operator.ge), (limits, pd.Series.idxmax, operator.le)):
    for what, asked, chosen, column in wanted:
        for device, part in chosen.dropna(subset=column).groupby("device"):
            row = part.loc[worst(part[column])]
            verdict, within = "yes" if enough(row[column], asked) else "NO", ""
            if column == "ratio" and pd.notna(row["ratio_low"]):
                within = f"{row['ratio_low']:.3g} to {row['ratio_high']:.3g}"
                verdict += ", within the noise" if row["ratio_low"] < asked < row["ratio_high"] else ""
            figures = {"asked": asked, "measured": f"{row[column]:.3g}", "95 % interval": within}
            reached[device, what] = {**figures, "reached": verdict}
pd.DataFrame(reached).T

# %% [markdown]
# By the clock, one call of `perturb` is not what the bar asks, since it waits for the CPU that launches it; of twenty in a row, and in the GPU's own time, it
# is. Its share of the bandwidth varies by a point or two from run to run; the bar's copy is of 256 MiB, in which a kernel's start and end count for less
# than in a batch of 110, and a patch's share counts the copy of its places to the GPU. The gradient of a patch reads so little that the start of its
# kernels is most of its time.
# On the EPYC FT's and ABD's steps are twice as fast as the plain loop's by a little, and on the Xeon not quite. Its matrix unit multiplies
# bf16 several times as fast as its cores multiply float32 (the ceilings in `benchmarks/results.csv`), so that products are the smaller part of a step.
# The rest passes over memory or costs its start: BatchNorm, ReLU, sums, casts and the optimiser, which the plain loop has too. A compiler fuses some of
# that, and compiled they are about twice as fast. In turns of some seconds each, which others' use of the machine meets
# unequally, runs of nearly the same code came out on either side of two; that is why steps are taken beside one another now. The
# plain loop's own time in the table is of runs of its own, at other moments, and divided by another's it is not that ratio. ABD has longer captions too,
# since EDA adds words to them, and the plain loop's are left as they are: *plain loop, patch and EDA* is ABD's step in plain torch.
# At large batches memeff's loss alone, without gradients, is the faster one, and needs less memory; it has no gradient for the scale, and with gradients
# it takes longer. Per batch:

# %%
sizes = rows[rows["size"].notna() & rows["variant"].isin(["abd_core triton", "memeff*"])]
sizes = sizes[sizes["metric"].isin(["forward", "forward + backward", "peak memory"])]
sides = sizes.pivot_table(index=["device", "size"], columns=["metric", "variant"], values="value")
sides.rename(index=int, level="size").map("{:.4g}".format)

# %% [markdown]
# And `perturb` against the fastest of all other compositions, compiled ones among them. How many times as fast ours is:

# %%
painted = rows[rows["benchmark"].eq("perturb") & rows["unit"].eq("ms")]
ours = painted["variant"].str.startswith("abd_core")
places = ["device", "case", "metric"]
fastest = pd.concat([part.groupby(places)["value"].min() for part in (painted[~ours], painted[ours])], axis=1)
ratios = (fastest.iloc[:, 0] / fastest.iloc[:, 1]).unstack(["device", "case"])
ratios.reindex(painted["metric"].unique()).map(lambda ratio: "" if pd.isna(ratio) else f"{ratio:.2f}")

# %% [markdown]
# Below 1 a compiled composition is faster. On the GPU that is so by the clock for additions, and wherever there is a gradient: a call of ours costs
# the CPU more than the device. The device itself is done sooner with ours, but for the gradient of a patch, which is too small to fill it. On the CPU a
# compiled composition is as fast or faster; there ours is made to be no slower than the plain one, which needs no compiler.

# %% [markdown]
# ## Where a kernel does not matter
#
# A training step of the defences, against a plain loop: open_clip's model in float32, AdamW parameter by parameter.

# %% mystnb={"figure": {"caption": "Whole training steps, ratios to the first."}, "image": {"alt": "Bars of how many times faster each training step is than the first"}}
steps = measured[measured["benchmark"] == "training step"]
plots.speeds(steps, "step", title="Training steps: speed");

# %%
both_ways = contrast[~contrast["case"].str.endswith("one way")]
loss_times = both_ways[both_ways["variant"].str.startswith("abd_core") & both_ways["metric"].eq("forward + backward")]
shares = {}
for device, part in steps[steps["variant"].eq("ft") & steps["metric"].eq("step")].groupby("device"):
    small = loss_times[loss_times["device"].eq(device) & loss_times["case"].str.startswith("B=128,")]
    shares[device] = {"loss at B = 128, ms": small["value"].min(), "training step, ms": part["value"].min()}
share = pd.DataFrame(shares, index=["loss at B = 128, ms", "training step, ms"]).T
share["share of the loss, %"] = 100 * share.iloc[:, 0] / share.iloc[:, 1]
share.map("{:.3g}".format)

# %% [markdown]
# **The loss.** At the paper's batches of 64 to 128 it is a small part of a step, and no kernel for it will be noticed. It is noticed where batches are so
# large that the matrix does not fit, as in pre-training, and from some thousands on in the memory of a step.
#
# **The rest.** How much could still be gained is bounded by the share of the rate of a matrix product, in the precision of the defences' steps, at which
# the steps run already:

# %%
whole = steps[steps["metric"].eq("share of the ceiling")].pivot(index="variant", columns="device", values="value")
whole.reindex(steps["variant"].unique()).dropna(how="all").map(lambda share: "" if pd.isna(share) else f"{share:.0f} %")

# %% [markdown]
# **Computing less.** A caption's feature is that of its last token, which looks back only, so that what stands after it need not be encoded. A ResNet's
# feature is the pool's answer to one query: with the matrices of its keys and values on the side of the query, they multiply one row an image in the
# place of one a pixel. And torch's BatchNorm takes channels one by one where they are fewer than a vector holds; seen as a table with several pixels a
# row, they fill vectors. In bf16, a CPU's convolutions of one pixel at a time are slow where maps are small: they are the products that they amount to.
# And a product in bf16 is compiled for each number of rows, which is another one in each batch of captions: batches are filled up to a multiple of 64
# tokens, with some of those that no feature sees ([`abd_core.towers`](api.md#abd_coretowers)). Rows named "open_clip's towers" are of the same loop without all this.
#
# **Waiting for the CPU.** Where the share is small, a step waits for something else: on a fast GPU for the CPU, which launches the encoders' many
# small kernels, splits captions into tokens and rewrites them (EDA). For that reason training on a GPU records the forward and the backward pass of
# each encoder as a CUDA graph, which is one launch, and reads the loss of a step while the next one is under way. Rows named "no graphs" are of the
# same loop without graphs.
#
# **Augmenting together.** AutoAugment, which CleanCLIP asks for, draws two operations for each image. Images that draw the same one are given to it
# together and on their own device, with the pixels that torchvision makes of one image after the other.
#
# **By part.** Where the time of a step goes, in % of it, by torch's profiler and without graphs; "other" is Python, the loss, EDA, and what a GPU waits:

# %%
profiled = steps[steps["metric"].str.startswith("time in ")]
table = wide(profiled.assign(metric=profiled["metric"].str.removeprefix("time in ")), "metric")
table if len(table) else "not measured yet on any device"

# %% [markdown]
# A compiler can fuse what stands between the convolutions. In rows named "compiled", `torch.compile` has made the image encoder, which takes time in
# a first run. After how many steps has it paid?

# %%
figures = steps.pivot_table(index=["device", "case", "variant"], columns="metric", values="value")
pays = {}
for device, case, variant in figures.index:
    if variant == "ft, compiled" and figures.loc[device, case, variant].notna()["step"]:
        own, plain = figures.loc[device, case, variant], figures.loc[device, case, variant.removesuffix(", compiled")]
        saved, spent = (plain["step"] - own["step"]) / 1e3, own["first run"] - plain["first run"]  # seconds
        pays[device] = {
            "step, ms": f"{own['step']:.1f}",
            "times as fast": f"{plain['step'] / own['step']:.2f}",
            "seconds more at first": f"{spent:.1f}",
            "pays after steps": f"{max(0.0, spent) / saved:,.0f}" if saved > 0 else "never",
        }
pd.DataFrame(pays).T

# %% [markdown]
# (Of *ft, compiled*, the first of the compiled rows; *abd, compiled* finds what that has left.) A compiler has no faster convolutions. On a CPU it saves
# little; on a GPU it stands in the place of the graphs, which save more. So no stage compiles anything of itself. A device that is not in the table has not
# been measured.
#
# What the steps make of the paper's defence (250,000 pairs, 10 epochs; the paper gives 14 hours on an A100), projected from a step. Rows
# of different runs are of different code, and not to be set against each other:

# %%
variants = ["ft", "abd", "ft from tars", "abd from tars"]
hours = steps[steps["unit"].isin(["GPU-hours", "images/s"]) & steps["variant"].isin(variants)]
hours.set_index(["device", "case", "variant"])[["metric", "value", "unit", "run"]]

# %% [markdown]
# ## Summary

# %% tags=["summary"]
compared = measured[measured["ratio"].notna()]
first = compared.groupby(["device", "benchmark", "case", "metric"])["variant"].transform("first")
ours = compared["variant"].str.startswith("abd_core") | compared["variant"].isin(["ft", "abd", "cleanclip"])
best = compared.assign(first=first, of=compared["variant"].where(compared["benchmark"].eq("training step"), ""))
for (device, benchmark, of, metric), part in best[ours & first.ne(compared["variant"])].groupby(
    ["device", "benchmark", "of", "metric"], sort=False
):
    ratios = part.groupby("case", sort=False)["ratio"].max()
    what, to = ", ".join(filter(None, [benchmark, of, metric])), part["first"].iloc[0]
    print(f"{device}: {what}: {ratios.min():.2f} to {ratios.max():.2f} times {to}")

# %% [markdown]
# <details><summary><b>Exercise.</b> The loss without its matrix computes every similarity twice. Why can it be faster
# all the same?</summary>
#
# **Solution.** The matrix need not be written to memory and read again. Where memory is slower than arithmetic, which
# the roofline shows, to compute again costs less than to fetch.
#
# </details>
#
# In the code: [`abd_core.kernels.infonce`](api.md#abd_corekernelsinfonce), [`abd_core.kernels.perturb`](api.md#abd_corekernelsperturb).
#
# **What was learnt.** Two vectors stand for the matrix, so memory grows with the batch and not with its square, and the gradient for the scale comes for
# nothing. The summary says what that gains on which device, by the clock unless it says "device"; what is not listed has not been measured.
