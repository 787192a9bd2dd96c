# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 9. Paper scale: RN50, CC3M, ImageNet, one GPU or many
#
# **Question.** What does it take to run these notebooks on the paper's model and data, and how does one know, before it
# starts, that a run of hours will not fail?
#
# Nothing of this was downloaded to make this book, and none of the paper's numbers has been reproduced with it. What is
# here: the formats are read and tested on miniatures of the real thing, the steps were timed, and every setting of the
# paper is in a file. `make test-slow` takes `RN50-quickgelu` at 224 px, with random weights in each foreign format,
# through all stages on 240 JPEG files in each format of pairs, and out again by the export; on a thousand test folders;
# and through the notebooks. The rest is yours to run.
#
# ## What to download, and how to lay it out
#
# | what | from | as |
# |---|---|---|
# | weights | open_clip, once, by its tag `openai` | a tag, a file (`.pt`, `.safetensors`) or a Hugging Face folder |
# | CC3M, image and caption | the list of links of Conceptual Captions, with img2dataset | tars, or a table beside the images |
# | ImageNet-1K validation | image-net.org | 1,000 folders by WordNet id, or the flat files and the devkit |
#
# ```bash
# sed -i '1s/^/caption\turl\n/' Train_GCC-training.tsv
# img2dataset --url_list Train_GCC-training.tsv --input_format tsv --url_col url --caption_col caption \
#     --output_format webdataset --output_folder cc3m --image_size 256 --resize_mode keep_ratio
# ```
#
# - **Pairs** (`pairs`): tars as img2dataset writes them; or a CSV, TSV or Parquet table that names image files relative
#   to itself, with CleanCLIP's columns `image,caption`, open_clip's `filepath`, `title`, or those that `columns` names; or
#   a Parquet table that holds its images, as Hugging Face's datasets do. Braces stand for many files:
#   `cc3m/{00000..00331}.tar`. Any address that fsspec opens will do (`s3://`, `gs://`; their packages come extra). Nothing
#   is unpacked, but for images that a Parquet table holds: they are copied into the cache once. Every image is read to its
#   end once, and damaged ones are left out, counted and listed, up to the share `max_damaged`.
# - **Subsets**: `limit` draws pairs by the digest of their ids, so the same pairs are drawn however the files are cut.
#   `python -m abd_core.formats 'cc3m/{00000..00331}.tar' --count 500000 --manifest subset.csv` writes them down, and
#   `manifest` takes them from there.
# - **Test images** (`test_images`): ImageNet's 1,000 folders need nothing else. The flat `ILSVRC2012_val_*.JPEG`, as a
#   folder or as the tar that they come in, need `devkit`, which labels them. Labels go by WordNet id, never by name:
#   two classes are called "crane" and two "maillot", and lists on the web that went by name give 100 of the 50,000 images
#   the wrong label. Any other folder of class folders needs a file of names, `test_classes`.
# - **Which RN50?** The paper says that its weights were trained on LAION-400M. open_clip publishes no RN50 of that data;
#   its RN50s are `openai`, `yfcc15m` and `cc12m`, all trained with QuickGELU. In open_clip's own table of results
#   (`docs/openclip_results.csv`) they reach 59.8, 32.8 and 36.5 % on ImageNet. The paper's victims reach what the row
#   *none* of the last table here says, a little below OpenAI's, so the profile says `RN50-quickgelu`, `openai`. Without
#   QuickGELU the same weights lose accuracy and say nothing; here a warning does.
#
# ## The commands
#
# `profiles/paper/` has the paper's section III-A as parameters of the notebooks. Each can be overridden by `-p`. Where the
# data is stands once in a file of one's own, here `mine.yaml`:
#
# ```yaml
# pairs: "/data/cc3m/{00000..00331}.tar"
# test_images: /data/imagenet/val
# ```
#
# ```bash
# # one GPU: the whole path, and the defended model for use elsewhere
# python -m abd_core.preflight -f profiles/paper/03_defend.yaml -f mine.yaml
# papermill book/01_poison.ipynb out1.ipynb -f profiles/paper/01_poison.yaml -f mine.yaml
# papermill book/03_defend.ipynb out3.ipynb -f profiles/paper/03_defend.yaml -f mine.yaml
# python -m abd_core.export runs/defend/KEY defended
#
# # one machine with eight: poisoning and defending share each batch
# papermill book/03_defend.ipynb out3.ipynb -f profiles/paper/03_defend.yaml -f mine.yaml \
#     -p num_processes 8 -p poison_sync_batch_norm true
#
# # several machines: a stage at a time, its settings in job.json, the files on a disk that all machines see
# srun --nodes 4 --ntasks-per-node 1 torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d \
#     --rdzv-endpoint "$(scontrol show hostnames | head -1):29500" --rdzv-id "$SLURM_JOB_ID" -m abd_core.train job.json
#
# # all attacks, defences and seeds on Slurm, one GPU a job
# snakemake --profile profiles/paper/slurm \
#     --config grids="table1 ablations" parameters="profiles/paper/03_defend.yaml mine.yaml" table=mine.csv
# papermill book/04_results.ipynb out4.ipynb -p results mine.csv
# ```
#
# `batch_size` counts the pairs of all processes together. Where BatchNorm trains, each process normalises over its own
# rows alone, with eight of them an eighth of the batch, unless `sync_batch_norm` takes the statistics over all. Poisoning
# trains it. ABD does not by default, and the adversary is always searched by one process, so `num_processes` is no
# setting of it. `accumulate` averages the gradients of several batches in one step; `micro_batch` encodes a few rows at a
# time, for contrastive batches that do not fit.
#
# With `-p checkpoint suspect.pt`, notebook 3 defends a model of your own instead: no attack is run, and `pretrained` is what
# the model was made from.
#
# A job for torchrun is `{"stage": "poison", "config": {...}}`, with the names and values of `01_poison.yaml` and
# `mine.yaml`; the top of `abd_core/launch.py` has that of a defence. A notebook with the same settings finds what it made.
#
# The grid gives every cell the profile's settings. So each rival defence trains with the learning rate, batch size and
# epochs that the paper gives for ABD, not with those that its own authors chose. To give one its own, edit its label at the
# top of `abd_core/grid.py`, or run the notebook with `-p defence cleanclip -p lr 1e-5`.
#
# A clean model is trained from scratch on pairs of one's own by `python -m abd_core.train job.json`, with
# `{"stage": "pretrain", "config": {"retrain": true, "model": "RN50-quickgelu", "pairs": "...", "test_images": "..."}}` in
# that file; it prints the folder that the weights are in. A checkpoint is audited with images of the pairs by
# `python -m abd_core.audit suspect.pt --pairs ... --classes names.txt`. The explorer (chapter 8) and the population that the
# audit is calibrated on (chapter 10) are of the embedded benchmark alone.
#
# `ABD_WORKERS` is the number of processes that read images (one a core, at most 16), `ABD_RUNS` the folder that everything
# is written to. An interrupted stage goes on where it was.

# %% tags=["parameters"]
benchmarks: str = ""  # path of a CSV that `make bench` wrote; empty: the committed one

# %%
from abd_core.notebook import show_configs, stage_configs
from abd_core.results import BenchmarksConfig, read_benchmarks

(config,) = stage_configs(globals(), benchmarks=BenchmarksConfig)
show_configs(config)
measured = read_benchmarks(config.path)

# %% [markdown]
# How many jobs is that grid? Victims (`poison`), searches of a perturbation (`adversary`) and defended models (`defend`):

# %% tags=["nbval-check-output"]
from collections import Counter

import pandas as pd

from abd_core.grid import STAGES, select
from abd_core.notebook import given_parameters
from abd_core.paths import root

profile = given_parameters([root() / "profiles" / "paper" / "03_defend.yaml"], [])
jobs = {job for cell in select(["table1", "ablations"]) for job in cell.job(profile).chain()}
counts = Counter(job.stage for job in jobs)
pd.DataFrame({"jobs": counts}).loc[list(STAGES)]

# %% [markdown]
# `model` is one of open_clip's architectures that are a plain CLIP: an image tower and CLIP's own text tower and tokens.
# SigLIP, CoCa and models with a text tower of their own are refused in one line.

# %%
import open_clip

from abd_core import models

taken = models.architectures()
print(f"{len(taken)} of {len(open_clip.list_models())} architectures, the embedded benchmark's among them")

# %% [markdown]
# ## Preflight: a screen before the hours
#
# Where anything but the embedded benchmark is read, the first cell of a notebook checks it all: files, columns, captions,
# the target among the classes, a trigger that is still there when the image is stored in 8 bits, the disk. Then it
# rehearses: twenty steps or more of each stage at its own batch size, on its own pairs, read by its own workers, counted
# once what these read at the start is used up. They give the memory and the projected hours, evaluation included, of one
# process. Several share the batch, and need less of both. On a CPU the memory is the highest so far in the process that
# trains, so it never falls from a stage to the next. A screen without a failure is kept, and is shown again, "as found
# before", where settings and machine are the same.
#
# Here it is on a miniature: some of the embedded pictures as a tar of JPEG files, and a test folder a class.

# %%
import io
import tarfile

import torch
from PIL import Image

from abd_core.data import load_pairs, load_test_set
from abd_core.paths import cache_dir

folder, pictures, tests = cache_dir() / "chapter-9", load_pairs(240), load_test_set("eval", views=1)


def encoded(pixels):
    """An image, float (3, R, R) in [0, 1], as a JPEG file."""
    data = io.BytesIO()
    Image.fromarray(pixels.mul(255).byte().permute(1, 2, 0).numpy()).save(data, "JPEG", quality=95)
    return data.getvalue()


folder.mkdir(exist_ok=True)
every = torch.arange(len(pictures))
with tarfile.open(folder / "00000.tar", "w") as tar:
    images, captions = pictures.images(every, seed=0, step=0), pictures.captions(every, seed=0, epoch=0)
    for number, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        for ending, content in {"jpg": encoded(pixels), "txt": caption.encode()}.items():
            member = tarfile.TarInfo(f"{number:09}.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
for pixels, label in zip(tests.images, tests.labels.tolist(), strict=True):
    place = folder / "val" / f"{label:03}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "0.jpg").write_bytes(encoded(pixels / 255))
(folder / "names.txt").write_text("\n".join(tests.class_names));

# %%
from abd_core.adversary import AdversaryConfig
from abd_core.defend import DefendConfig
from abd_core.poison import PoisonConfig
from abd_core.preflight import preflight

data = {
    "pairs": str(folder / "00000.tar"),
    "test_images": str(folder / "val"),
    "test_classes": str(folder / "names.txt"),
    "dev_share": 0.0,
}
preflight(
    PoisonConfig(**data, batch_size=16), AdversaryConfig(**data, batch_size=8), DefendConfig(**data, batch_size=8)
)

# %% [markdown]
# ## Hours, memory, disk
#
# From the steps that `make bench` has timed on a GPU: `RN50-quickgelu` at 224 px in the paper's numbers of pairs.
# Evaluation and the one pass that checks all images come on top.
#
# - All steps were timed at the batch of the column `case`. The paper's attack has that one, its defence 64, its adversary
#   16; at a smaller batch a GPU does fewer images a second.
# - *from tars* reads and decodes its images, the others have them there already. Each was timed in one run, those from
#   tars in an earlier one, of earlier code ([chapter 7](07_kernels)): which of the two is faster, these rows do not tell.
# - *cores* is the rate divided by what one core reads in a second: the loader's images a second of CPU time, of the next
#   section. They were measured on another machine, with larger images than the command above stores: a first guess.
# - *GiB* is of the variant in the last column: for rows from tars, the same steps without reading.
# - *plain loop* is open_clip's model in float32 with nothing done for speed, about what reference code does. The paper
#   reports about 8 A100-hours for an attack and 14 for the defence; *paper / this* is how many times as long that is. What
#   lies between the plain loop and the paper is another GPU, reading, evaluation, and perhaps the adversary: the paper
#   gives the sums alone.
# - The adversary's steps are the profile's whole search: generator and discriminator at a width of 1024, all terms of the
#   loss. *plain AdvCLIP* is the same as AdvCLIP arranges it: open_clip's towers in float32, the patch pasted on the CPU.

# %%
attacker, searcher, defender = stage_configs(dict(profile), **STAGES)
seen = {
    "poison": attacker.limit * attacker.epochs,
    "adversary": searcher.steps * searcher.batch_size,
    "defend": round(defender.share * defender.limit) * defender.epochs,
}
timed_as = {
    "poison": ["ft from tars", "ft", "plain loop"],
    "adversary": ["abd_core", "plain AdvCLIP"],
    "defend": ["abd from tars", "abd", "plain loop, patch and EDA", "plain loop with a patch"],
}
reported = {"poison": 8, "defend": 14}  # A100-hours of the paper
loading = measured[measured["benchmark"] == "loading"]
reading = loading[loading["metric"].eq("CPU time") & loading["variant"].str.fullmatch(r"tar, [1-9]\d* workers")]
a_core = reading["value"].min()
large = measured["benchmark"].isin(["training step", "adversary step"]) & measured["case"].str.startswith("RN50")
rows = []
for (device, case), part in measured[large].groupby(["device", "case"], sort=False):
    speed = part[part["metric"].eq("speed")].set_index("variant")["value"]
    memory = part[part["metric"].str.startswith("peak memory")].set_index("variant")["value"] / 1024
    for stage, variants in timed_as.items():
        for variant in [variant for variant in variants if variant in speed.index]:
            rate, pairs = speed[variant], seen[stage]
            hours = pairs / rate / 3600
            times = reported.get(stage, float("nan")) / hours
            like = next((v for v in (variant, variant.removesuffix(" from tars")) if v in memory.index), "")
            used = memory.get(like, float("nan"))
            rows.append([device, case, stage, variant, pairs, round(rate), hours, times, rate / a_core, used, like])
columns = ["device", "case", "stage", "timed as", "pairs seen", "images/s", "hours"]
columns += ["paper / this", "cores", "GiB", "GiB of"]
projected = pd.DataFrame(rows, columns=columns)
projected.round(2).astype(object).fillna("")

# %% [markdown]
# Disk, beside the data itself: the decoded test images, which are kept, and for each victim and each defended model its
# weights, of the grid above as many as it has of both; while one trains, two files to resume from, each with weights and
# AdamW's two moments.

# %% tags=["nbval-check-output"]
model = models.build(defender.model)
weights = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
images = 50_000 * 3 * models.resolution(model) ** 2
sizes = {"ImageNet's test images": images, "weights": weights, "while it trains": 7 * weights}
sizes["weights of the whole grid"] = weights * (counts["poison"] + counts["defend"])
pd.DataFrame({"GB": {name: round(size / 1e9, 2) for name, size in sizes.items()}})

# %% [markdown]
# ## Does the loader keep up?
#
# The loader's images a second against the bare decoding and resizing of the same files by as many processes at the same
# time: 1 is all that so many cores can do. By the clock, the share is per worker, and falls where there were fewer free
# cores than workers; this package asks 0.9 of itself there. Of CPU time, it counts that of the workers and of the process
# that they read for. What it takes to start a worker and to end it is a figure of its own in the table: it comes once an
# epoch.

# %% mystnb={"figure": {"caption": "Reading pairs from tars and from files, as a share of bare decoding and resizing."}, "image": {"alt": "Bars of the loader's share of bare decoding, by the clock and of CPU time"}}
from abd_core import plots

plots.style()
both = {"speed": "by the clock", "CPU time": "of CPU time"}
workers = loading[loading["variant"].str.endswith("workers")]
plots.shares(workers, both, of="bare decoding and resizing", title="Reading image-caption pairs");

# %%
timed = loading[loading["metric"].isin(["speed", "CPU time", "start"])]
timed.pivot_table(index=["device", "variant"], columns="metric", values=["value", "ratio"]).round(2)

# %% [markdown]
# ## A second setting: RN50's size on the embedded benchmark
#
# The other chapters' CLIP, `emoji-rn14`, has a ResNet with half of an RN50's blocks, 8 of 16, each far narrower. `emoji-rn50` has RN50's two
# towers as they are, for the embedded pictures' 64 px and captions of 20 tokens. It is trained from scratch on the embedded pairs, attacked and
# defended. The defences have the settings that were chosen for the small one; its own training has a larger batch, and that and the attack
# have the peak learning rate that CLIP's own had for an RN50. Nothing was searched for it. On a GPU that takes minutes:
#
# ```bash
# BASE=$(python -m abd_core.train profiles/rn50/pretrain.json)
# python -m abd_core.grid table1 --defences FT ABD ABD-D --seeds 0 1 2 --processes 4 -f profiles/rn50/03_defend.yaml \
#     -p pretrained "$BASE/model.safetensors" --output data/results/rn50.csv
# ```
#
# `data/rn50/` has the record of the base that was attacked, without its 200 MB of weights.

# %%
from abd_core.paths import read_json
from abd_core.results import read_results

place = root() / "data" / "results" / "rn50.csv"
if place.exists():
    large_base = read_json(root() / "data" / "rn50" / "metrics.json")
    display(plots.wide_table({f"clean base, {split}": large_base[split] for split in ("dev", "eval")}))
    second = read_results(place)
    display(plots.table(second, second["attack"].unique(), second["defence"].unique()))
else:
    print("not measured yet")

# %% [markdown]
# The backdoors take in a network of this size as they do in the small one. What does not carry over are the settings of the
# defences: those that train at the small one's 1e-3 (FT, ABD) lose far more clean accuracy than there, and with it most of
# every backdoor, with perturbed images or without; ABD-D, which trains at half of that, loses a third as much. A learning
# rate belongs to a model: each needs a search of its own. On BadCLIP, FT and ABD leave a part of the attack, as in chapter 4,
# and the intervals over three seeds are wide.

# %% [markdown]
# ## What to expect
#
# The paper's tables I (its comparison), II (its ablation) and III (its universal perturbation), CA and ASR in percent;
# *none* is the victim, and *I + T* in its Table II is plain fine-tuning. `data/paper.csv` also has the figures of others for the same attacks, which
# differ much: settings matter.

# %% tags=["nbval-check-output"]
paper = pd.read_csv(root() / "data" / "paper.csv")
ours = paper[paper["source"] == "ABD"].replace({"metric": {"ca_top1": "CA", "asr": "ASR"}})
expected = ours.pivot(index=["table", "defence"], columns=["attack", "metric"], values="value")
expected.loc[list(dict.fromkeys(zip(ours["table"], ours["defence"], strict=True)))]

# %% [markdown]
# When yours differs:
#
# | what you see | what to check |
# |---|---|
# | clean CA far below the paper's victims | QuickGELU (a warning); the test set's labels; `dev_share` 0; the 80 templates are open_clip's |
# | THE ATTACK DID NOT TAKE | the learning rate. At the paper's 1e-6, users of the reference code report that the attack did not take, and that it does at 1e-5: `-p poison_lr 1e-5` |
# | Blended's ASR above the paper's | the paper's value is low beside what others report, and its plain fine-tuning raises it; do not chase it |
# | a defence costs more CA | `batch_norm`: here a perturbed image does not enter the statistics; the paper does not say |
# | ABD works on one trigger place only | `placement`, `mode`: a patch that lies where the trigger lies defends by covering it (chapter 5) |
# | slower than the preflight said | `ABD_WORKERS` above the free cores; a file system where small random reads are slow: copy the tars to a local disk |
# | fewer pairs than you gave | the list of damaged ones: `damaged-*.csv` in the runs' `cache` |
#
# What the paper leaves open is listed in the README under "Open readings of the paper", each with its option.

# %% [markdown]
# ## Summary

# %% tags=["summary"]
asked = {"poison": attacker.batch_size, "adversary": searcher.batch_size, "defend": defender.batch_size}
for device, case, stage, variant, count, speed, hours, *_ in rows:
    batch = int(case.split("batch ")[1].split(",")[0])
    other = "" if batch == asked[stage] else f"; the paper's is {asked[stage]}"
    timed = f"{speed} images/s, timed as '{variant}' at batch {batch}{other}"
    print(f"{stage}: {count} pairs in {hours:.1f} hours on one {device} ({timed})")
for device, part in workers.groupby("device", sort=False):
    least = part.groupby("metric")["ratio"].min()
    shares = " and ".join(f"{100 * least[metric]:.0f} % {name}" for metric, name in both.items())
    print(f"loader: at least {shares} of bare decoding and resizing on {device}")

# %% [markdown]
# <details><summary><b>Exercise.</b> The paper poisons 0.3 % of 500,000 pairs and passes over them ten times. The embedded
# benchmark poisons a tenth of its pairs. Which of the two shows the model more poisoned pairs?</summary>
#
# **Solution.** The paper: 1,500 pairs in 10 epochs are 15,000. The embedded benchmark has a few thousand pairs, so a tenth of
# them, ten times, are about as many as there are pairs. What plants a backdoor is how often it is seen, not its share.
#
# </details>
#
# In the code: [`abd_core.formats`](api.md#abd_coreformats), [`abd_core.labelled`](api.md#abd_corelabelled),
# [`abd_core.inputs`](api.md#abd_coreinputs), [`abd_core.preflight`](api.md#abd_corepreflight).
#
# **What was learnt.** Model, data and settings are parameters, so the paper's run is the same notebook. For the GPU above, the
# hours of its attack, its adversary and its defence are projected from measured steps, with the cores that reading takes.
# Whether the paper's numbers come out, only that run will say.
