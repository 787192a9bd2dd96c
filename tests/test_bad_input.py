"""Bad input, case by case: it ends in one line that names the thing, the place and what is allowed, before any work.

Each case is something a person may hand over: a setting, a file, a table, a folder, a variable of the environment. Of
each it is checked that the error is the project's own (so that a command ends non-zero with its text alone), that it is
one line with all the words of the case, that no run folder and no table were written, and that nothing was trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import miniature
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ARCHITECTURE, start_python
from safetensors.torch import load_file, save_file

from abd_core import adversary as adversary_module
from abd_core import badclip, defences, disagreement, fig2, grid, launch, paths, train
from abd_core import poison as poison_module
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.audit import AuditConfig, AuditInputs, audit, image_folder, read_classes
from abd_core.config import AbdError
from abd_core.defences import DefendConfig
from abd_core.defend import defend
from abd_core.evaluate import EvaluateConfig, measure
from abd_core.explore import own_image
from abd_core.fig2 import Fig2Config
from abd_core.formats import load_image_pairs
from abd_core.generator import Perturbation
from abd_core.notebook import given_parameters, stage_configs, summary
from abd_core.poison import PoisonConfig, poison
from abd_core.preflight import _captions as preflight_captions
from abd_core.pretrain import PretrainConfig, pretrain
from abd_core.results import BenchmarksConfig, ResultsConfig, read_benchmarks, read_results
from abd_core.text import augment, tokenize
from abd_core.triggers import TRIGGERS
from abd_core.verdict import read_population

SMALL = {"limit": 64, "epochs": 1, "batch_size": 16}


@dataclass
class World:
    """Where a case happens: whole files to damage, and a place for those that it writes."""

    stand_in: Path
    here: Path
    patch: Callable[..., None]

    @property
    def victim(self) -> Path:
        return self.stand_in / "victim.safetensors"

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.here / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def weights(self, change: Callable[[dict], object], name: str | None = ARCHITECTURE) -> Path:
        """The victim's weights with a change; `name` is the architecture that the file claims."""
        tensors = {key: tensor.clone() for key, tensor in load_file(self.victim).items()}
        change(tensors)
        save_file(tensors, self.here / "changed.safetensors", metadata=None if name is None else {"model": name})
        return self.here / "changed.safetensors"

    def perturbation(self, mode: str = "patch", side: int = 11, resolution: int = 64) -> Path:
        Perturbation(mode, torch.rand(3, side, side), resolution, "random").save(self.here / "p.safetensors")
        return self.here / "p.safetensors"

    def trigger(self, *, resolution: int = 64, target: str = "banana", **changes: object) -> Path:
        """A stored trigger whose record has changes."""
        path = self.here / "t.safetensors"
        TRIGGERS["badnet"].draw(resolution=resolution, target=target, seed=0, size=0.1).save(path)
        if changes:
            record = {"attack": "badnet", "resolution": resolution, "target": target}
            record["specification"] = {"size": 0.1, "position": "top-left", "seed": 0}
            pattern = changes.pop("pattern", load_file(path)["pattern"])
            record |= changes
            save_file({"pattern": pattern}, path, metadata={"record": json.dumps(record)})
        return path


Case = tuple[Callable[[World], object], tuple[str, ...]]
CASES: dict[str, Case] = {}


def case(name: str, call: Callable[[World], object], *words: str) -> None:
    assert name not in CASES, name
    CASES[name] = (call, words)


# --- parameters, as papermill hands them over -----------------------------------------------------------------

STAGES = {
    "poison": {"poison": PoisonConfig},
    "adversary": {"poison": PoisonConfig, "adversary": AdversaryConfig},
    "defend": {"poison": PoisonConfig, "adversary": AdversaryConfig, "defend": DefendConfig},
    "pretrain": {"pretrain": PretrainConfig},
    "evaluate": {"evaluate": EvaluateConfig},
    "results": {"results": ResultsConfig},
    "benchmarks": {"benchmarks": BenchmarksConfig},
    "fig2": {"fig2": Fig2Config},
}


def parameters(notebook: str, given: dict[str, object], *words: str) -> None:
    text = ", ".join(f"{name}={value!r}"[:40] for name, value in given.items())
    case(f"{notebook} -p {text}", lambda world: stage_configs(dict(given), **STAGES[notebook]), *words)


parameters("poison", {"epoch": 3}, "unknown parameter 'epoch'", "did you mean 'epochs'?")
parameters("poison", {"attack": "wanett"}, "PoisonConfig.attack", "'wanett'", "one of 'badnet', 'blended'")
parameters("poison", {"attack": ["badnet"]}, "PoisonConfig.attack", "['badnet']", "str expected")
parameters("poison", {"attack": None}, "PoisonConfig.attack", "None", "str expected")
parameters("poison", {"rate": 1.5}, "PoisonConfig.rate", "1.5", "≥ 0 and ≤ 1")
parameters("poison", {"rate": -0.1}, "PoisonConfig.rate", "-0.1", "≥ 0 and ≤ 1")
parameters("poison", {"rate": "10%"}, "PoisonConfig.rate", "'10%'", "float expected")
parameters("poison", {"rate": math.nan}, "PoisonConfig.rate", "nan", "≥ 0 and ≤ 1")
parameters("poison", {"rate": "nan"}, "PoisonConfig.rate", "nan", "≥ 0 and ≤ 1")
parameters("poison", {"lr": "inf"}, "PoisonConfig.lr", "inf", "> 0 and ≤ 1")
parameters("poison", {"lr": 0}, "PoisonConfig.lr", "0.0", "> 0 and ≤ 1")
parameters("poison", {"seed": -1}, "PoisonConfig.seed", "-1", "≥ 0")
parameters("poison", {"seed": 1.5}, "PoisonConfig.seed", "1.5", "int expected")
parameters("poison", {"seed": "zero"}, "PoisonConfig.seed", "'zero'", "int expected")
parameters("poison", {"seed": True}, "PoisonConfig.seed", "True", "int expected")
parameters("poison", {"epochs": 0}, "PoisonConfig.epochs", "0", "≥ 1")
parameters("poison", {"epochs": "10e400"}, "PoisonConfig.epochs", "'10e400'", "int expected")
parameters("poison", {"batch_size": 1}, "PoisonConfig.batch_size", "1", "≥ 2")
parameters("poison", {"target": 7}, "PoisonConfig.target", "7", "str expected")
parameters("poison", {"target": {"name": "banana"}}, "PoisonConfig.target", "str expected")
parameters("poison", {"trigger_position": "middle"}, "PoisonConfig.trigger_position", "'middle'", "'centre'")
parameters("poison", {"trigger_size": 0}, "PoisonConfig.trigger_size", "0.0", "> 0 and ≤ 1")
parameters("poison", {"trigger_size": 2}, "PoisonConfig.trigger_size", "2.0", "> 0 and ≤ 1")
parameters("poison", {"blend_alpha": 0.5}, "PoisonConfig.blend_alpha", "attack 'badnet' does not read it", "blended")
parameters("poison", {"attack": "sig", "wave_amplitude": 2}, "PoisonConfig.wave_amplitude", "2.0", "> 0 and ≤ 1")
parameters("poison", {"attack": "wanet", "warp_points": -1}, "PoisonConfig.warp_points", "-1", "≥ 0")
parameters("poison", {"rate": 0.1, "poison_rate": 0.2}, "'poison_rate'", "already set under its other name")
parameters("adversary", {"mode": "sticker"}, "AdversaryConfig.mode", "'sticker'", "'additive', 'patch'")
parameters("adversary", {"magnitude": 0}, "AdversaryConfig.magnitude", "0.0", "> 0 and ≤ 1")
parameters("adversary", {"placement": "left"}, "AdversaryConfig.placement", "'left'", "'fixed', 'random'")
parameters("adversary", {"corner": 1}, "AdversaryConfig.corner", "1.0", "≥ 0 and < 1")
parameters("adversary", {"tau": -1}, "AdversaryConfig.tau", "-1.0", "≥ 0")
parameters("adversary", {"backdoor_weight": "inf"}, "AdversaryConfig.backdoor_weight", "inf", "a finite number")
parameters("adversary", {"negatives": "none"}, "AdversaryConfig.negatives", "'none'", "'victim', 'clean'")
parameters("adversary", {"width": 8}, "AdversaryConfig.width", "8", "≥ 16")
parameters("adversary", {"share": 0}, "Config.share", "0.0", "> 0 and ≤ 1")
parameters("adversary", {"poison_target": []}, "PoisonConfig.target", "[]", "str expected")
parameters("defend", {"defence": "prayer"}, "DefendConfig.defence", "'prayer'", "'abd', 'abd-d', 'ft'")
parameters("defend", {"view": "neither"}, "DefendConfig.view", "'neither'", "'replace', 'both', 'clean'")
parameters("defend", {"eda": "yes"}, "DefendConfig.eda", "'yes'", "bool expected")
parameters("defend", {"batch_norm": "off"}, "DefendConfig.batch_norm", "'off'", "'own', 'train', 'frozen'")
parameters("defend", {"patch_place": "west"}, "DefendConfig.patch_place", "'west'", "'stored', 'random'")
parameters("defend", {"defence": "ft", "eda": False}, "DefendConfig.eda", "defence 'ft' does not read it")
parameters("defend", {"defence": "wise-ft", "mixing": 2}, "DefendConfig.mixing", "2.0", "≥ 0 and ≤ 1")
parameters("defend", {"defence": "par", "shift_limit": 5}, "DefendConfig.shift_limit", "5.0", "≥ 0 and ≤ 4")
parameters("defend", {"defence": "roclip", "bank": 0}, "DefendConfig.bank", "0", "≥ 1")
parameters(
    "defend",
    {"defence": "random-erasing", "erase_low": 0.5, "erase_high": 0.1},
    *("DefendConfig.erase_low", "0.5", "≤ erase_high = 0.1"),
)
parameters(
    "defend",
    {"defence": "abd-d", "window_low": 0.5, "window_high": 0.1},
    *("DefendConfig.window_low", "0.5", "≤ window_high = 0.1"),
)
parameters("defend", {"learning_rate": 0.1}, "unknown parameter 'learning_rate'", "known")
parameters("pretrain", {"retrain": "maybe"}, "PretrainConfig.retrain", "'maybe'", "bool expected")
parameters("evaluate", {"split": "train"}, "EvaluateConfig.split", "'train'", "'dev', 'eval'")
parameters("results", {"results": 5}, "ResultsConfig.results", "5", "str expected")
parameters("benchmarks", {"benchmarks": False}, "BenchmarksConfig.benchmarks", "False", "str expected")
parameters("fig2", {"similarities": None}, "Fig2Config.similarities", "None", "str expected")

# --- settings that only the data can refuse ---------------------------------------------------------------------

case(
    "a target that is no class", lambda w: poison(PoisonConfig(target="bananna")), "'bananna'", "did you mean 'banana'?"
)
case("a target that is empty", lambda w: poison(PoisonConfig(target="")), "unknown class ''")
case("more pairs than there are", lambda w: poison(PoisonConfig(limit=10**9)), "limit = 1000000000", "has ", " pairs")
case("a batch larger than the pairs", lambda w: poison(PoisonConfig(limit=64)), "batch_size = 128", "at most 64")
case(
    "an attack without pairs of its target",
    lambda w: poison(PoisonConfig(**SMALL, attack="badclip")),
    *("attack 'badclip'", "none of the 64 pairs", "'banana'"),
)
case(
    "a share that leaves nothing",
    lambda w: adversary(AdversaryConfig(limit=64, share=0.001), w.victim),
    *("share = 0.001", "64 pairs leaves none"),
)
case(
    "an adversary's batch larger than the pairs",
    lambda w: adversary(AdversaryConfig(limit=64, batch_size=100), w.victim),
    *("AdversaryConfig.batch_size = 100", "at most 32"),
)
case(
    "a defence's batch larger than the pairs",
    lambda w: defend(DefendConfig(limit=64, defence="ft", batch_size=100), w.victim),
    *("batch_size = 100", "at most 32"),
)
case("ABD without a perturbation", lambda w: defend(DefendConfig(limit=64), w.victim), "'abd'", "adversary stage")
case(
    "a place for an additive perturbation",
    lambda w: defend(
        DefendConfig(limit=64, patch_place="centre"), w.victim, perturbation=w.perturbation("additive", 64)
    ),
    *("DefendConfig.patch_place = 'centre'", "additive"),
)
case(
    "another base without retraining", lambda w: pretrain(PretrainConfig(seed=3)), "PretrainConfig.seed", "retrain=True"
)

# --- weights -------------------------------------------------------------------------------------------------

WEIGHTS: dict[str, tuple[Callable[[World], Path], tuple[str, ...]]] = {
    "missing": (lambda w: w.here / "none.safetensors", ("missing file", "none.safetensors")),
    "a folder": (lambda w: w.here, ("missing file", "a folder")),
    "a device": (lambda w: Path("/dev/zero"), ("/dev/zero", "a regular file expected")),
    "a dangling link": (lambda w: linked(w.here / "link", w.here / "nowhere"), ("missing file", "link")),
    "empty": (lambda w: w.file("m.safetensors", b""), ("damaged file", "m.safetensors", "not safetensors")),
    "a text": (lambda w: w.file("m.safetensors", "weights"), ("damaged file", "m.safetensors", "not safetensors")),
    "zeros": (lambda w: w.file("m.safetensors", bytes(999)), ("damaged file", "m.safetensors", "not safetensors")),
    "cut off": (
        lambda w: w.file("m.safetensors", w.victim.read_bytes()[:-9]),
        ("damaged file", "m.safetensors", "not safetensors"),
    ),
    "without a model's name": (
        lambda w: w.weights(lambda t: None, None),
        ("changed.safetensors", "tensor", "but RN50-quickgelu needs"),
    ),
    "of an unknown model": (lambda w: w.weights(lambda t: None, "RN51"), ("'RN51'", "open_clip does not know")),
    "of another model": (lambda w: w.weights(lambda t: None, "emoji-rn14"), ("tensor", "but emoji-rn14 needs")),
    "a tensor missing": (lambda w: w.weights(lambda t: t.pop("logit_scale")), ("tensor logit_scale is None",)),
    "a tensor too many": (lambda w: w.weights(lambda t: t.update(x=torch.ones(1))), ("tensor x is (1,)", "None")),
    "NaN in a tensor": (
        lambda w: w.weights(lambda t: t["logit_scale"].fill_(math.nan)),
        ("tensor logit_scale", "NaN or infinity"),
    ),
}


def linked(link: Path, to: Path) -> Path:
    link.symlink_to(to)
    return link


for what, (made, words) in WEIGHTS.items():
    case(f"a victim, {what}", lambda w, made=made: measure(made(w)), *words)
for what in ("missing", "cut off", "of another model", "NaN in a tensor"):
    made, words = WEIGHTS[what]
    case(f"a suspect to defend, {what}", lambda w, made=made: defend(DefendConfig(defence="clean"), made(w)), *words)
    case(
        f"a suspect to search, {what}",
        lambda w, made=made: adversary(AdversaryConfig(limit=64), made(w)),
        *words,
    )
case(
    "clean weights of another architecture",
    lambda w: defend(
        DefendConfig(defence="wise-ft"), w.victim, clean=Path(paths.data_dir() / "base/model.safetensors")
    ),
    *("model.safetensors", "another architecture"),
)
case(
    "clean weights that are missing",
    lambda w: defend(DefendConfig(defence="wise-ft"), w.victim, clean=w.here / "none"),
    *("missing file", "none"),
)

# --- perturbations and triggers ------------------------------------------------------------------------------


def perturbed(world: World, path: Path) -> object:
    return defend(DefendConfig(limit=64, batch_size=16), world.victim, perturbation=path)


def record(world: World, **changes: object) -> Path:
    values = {"mode": "patch", "resolution": 64, "placement": "random", "corner": [0, 0], **changes}
    delta = values.pop("delta", torch.rand(3, 11, 11))
    save_file({"delta": delta}, world.here / "p.safetensors", metadata={"record": json.dumps(values)})
    return world.here / "p.safetensors"


case("a perturbation, missing", lambda w: perturbed(w, w.here / "none"), "missing file", "none")
case("a perturbation, a text", lambda w: perturbed(w, w.file("p", "pixels")), "damaged file", "no perturbation record")
case("a perturbation that is a model", lambda w: perturbed(w, w.victim), "damaged file", "no perturbation record")
case("a perturbation of another size", lambda w: perturbed(w, w.perturbation(resolution=32)), "32 px", "64 px")
case("a perturbation of no mode", lambda w: perturbed(w, record(w, mode="blur")), "damaged file", "mode 'blur'")
case("a perturbation too wide", lambda w: perturbed(w, record(w, resolution=8)), "damaged file", "11 px wide", "8 px")
case(
    "a perturbation with NaN",
    lambda w: perturbed(w, record(w, delta=torch.full((3, 5, 5), math.nan))),
    *("damaged file", "NaN or infinity among its pixels"),
)
case("a perturbation without a corner", lambda w: perturbed(w, record(w, corner=None)), "damaged file", "no perturb")
case("a perturbation's size as a word", lambda w: perturbed(w, record(w, resolution="64")), "damaged file", "'64' px")

case("a trigger, missing", lambda w: measure(w.victim, trigger=w.here / "none"), "missing file", "none")
case("a trigger, a text", lambda w: measure(w.victim, trigger=w.file("t", "x")), "damaged file", "no trigger record")
case("a trigger that is a model", lambda w: measure(w.victim, trigger=w.victim), "damaged file", "no trigger record")
case("a trigger of another size", lambda w: measure(w.victim, trigger=w.trigger(resolution=32)), "32 px", "64 px")
case("a trigger of another set's class", lambda w: measure(w.victim, trigger=w.trigger(target="tench")), "'tench'")
case("a trigger of an unknown attack", lambda w: measure(w.victim, trigger=w.trigger(attack="badnett")), "'badnet'?")
case(
    "a trigger at no place",
    lambda w: measure(w.victim, trigger=w.trigger(specification={"position": "moon"})),
    *("damaged file", "position 'moon'"),
)
case(
    "a trigger outside of [0, 1]",
    lambda w: measure(w.victim, trigger=w.trigger(pattern=torch.full((3, 6, 6), 2.0))),
    *("damaged file", "pixels outside [0, 1]"),
)
case(
    "a trigger larger than its images",
    lambda w: measure(w.victim, trigger=w.trigger(pattern=torch.ones(3, 65, 65))),
    *("damaged file", "(3, 65, 65)", "64 px"),
)

# --- pairs of one's own: tables, tars, images, captions, subsets ------------------------------------------------


def trained(world: World, address: Path | str, **settings: object) -> object:
    return poison(PoisonConfig(**{**SMALL, "limit": 0, "pairs": str(address), **settings}))


def table(
    world: World, *, damaged: int = 0, captions: tuple[str, ...] = ("a banana", "a cat", "a dog", "a hat")
) -> Path:
    """A table of four pairs in its own folder, so many of whose images are cut off."""
    for number in range(len(captions)):
        content = miniature.picture(number)
        world.file(f"{number}.jpg", content[: len(content) // 2] if number < damaged else content)
    rows = [f"{number}.jpg,{caption}" for number, caption in enumerate(captions)]
    return world.file("p.csv", "\n".join(["image,caption", *rows]) + "\n")


def parquet(world: World, **columns: list) -> Path:
    pq.write_table(pa.table(columns), world.here / "p.parquet")
    return world.here / "p.parquet"


def tar(world: World, *members: tuple[str, bytes], cut: int | None = None) -> Path:
    return world.file("p.tar", miniature.tar_bytes(members)[:cut])


def checked(world: World, path: Path) -> object:
    """As the preflight of a long run looks at the captions."""
    return preflight_captions(load_image_pairs(str(path), resolution=64), world.stand_in / "base.safetensors")


JPEG = miniature.picture(0)
for name, content, words in [
    ("p.csv", b"", ("damaged file", "No columns to parse")),
    ("p.csv", b"path,words\nx,y\n", ("its columns are 'path', 'words'", "columns='url,text'")),
    ("p.csv", b"image,caption\n,empty\n", ("damaged file", "row 1 names no image")),
    ("p.csv", b"image,caption\n\xff\xfe,x\n", ("damaged file", "codec can't decode")),
    ("p.csv", b'image,caption\n"x,y\n', ("damaged file", "p.csv")),
    ("p.csv", b"image,caption\nx,y\nx,y,z\n", ("damaged file", "Expected 2 fields in line 3, saw 3")),
    ("p.csv", b"image,caption\nx.jpg,y,z\n1.jpg,2,3\n", ("damaged file", "does not match length of data")),
    ("p.csv", b"image,caption\n", ("no pairs in it",)),
    ("p.csv", b"image,caption\nhttp://host/1.jpg,x\n", ("it names 'http://host/1.jpg'", "another kind")),
    ("p.csv", b"image,caption\nreference::refs.json,x\n", ("it names 'reference::refs.json'", "another kind")),
    ("p.csv", b"image,caption\nnone.jpg,x\n", ("1 of 1 pairs are damaged", "missing file", "max_damaged = 0.01")),
    ("p.tsv", b"filepath\twords\nx\ty\n", ("its columns are 'filepath', 'words'",)),
    ("p.tsv", b"filepath\ttitle\n\ty\n", ("damaged file", "row 1 names no image")),
    ("p.parquet", b"PAR1 not at all", ("damaged file", "p.parquet")),
    ("p.parquet", b"", ("damaged file", "p.parquet")),
    ("p.tar", b"", ("damaged file", "no whole tar")),
    ("p.tar", b"x" * 2000, ("damaged file", "no whole tar")),
    ("p.tar.gz", b"x", ("p.tar.gz", "tars without compression")),
    ("p.zip", b"x", ("p.zip", "tars without compression")),
]:
    case(
        f"pairs, {name} with {content[:50]!r}",
        lambda w, name=name, content=content: trained(w, w.file(name, content)),
        *words,
    )
for address, words in [
    ("no.csv", ("missing file", "no.csv")),
    ("{0..3}.tar", ("missing file", "0.tar")),
    ("", ("is a folder", "{00000..00331}.tar")),
    ("{a.csv,b.tar}", ("files of one kind expected",)),
    ("{3..1}.tar", ("3 to 1 is no range",)),
    ("{0..9999}{0..9999}.tar", ("at most 100000 expected",)),
    ("{0..1}" * 9, ("at most 8 ranges and lists expected",)),
]:
    case(f"pairs, {address!r}", lambda w, address=address: trained(w, f"{w.here}/{address}"), *words)
case("pairs of an unknown protocol", lambda w: trained(w, "nosuch://a/b.csv"), "cannot be read", "nosuch://a/b.csv")
case("pairs of a bucket that is not there", lambda w: trained(w, "memory://no/p.parquet"), "missing file", "p.parquet")
case("columns, a typing error", lambda w: trained(w, table(w), columns="image,captoin"), "did you mean 'caption'?")
case("columns, one", lambda w: trained(w, table(w), columns="image"), "columns = 'image'", "two names")
case("columns, three", lambda w: trained(w, table(w), columns="a,b,c"), "columns = 'a,b,c'", "two names")
case(
    "a Parquet file without captions",
    lambda w: trained(w, parquet(w, image=["x.jpg"], width=[3])),
    *("p.parquet", "its columns are 'image', 'width'"),
)
case(
    "a Parquet file whose images are lists",
    lambda w: trained(w, parquet(w, image=[[1, 2]], caption=["x"])),
    *("p.parquet", "column 'image' holds list", "paths of image files, or images as bytes"),
)
case(
    "a Parquet file whose captions are numbers",
    lambda w: trained(w, parquet(w, image=["x.jpg"], caption=[3])),
    *("p.parquet", "column 'caption' holds int64", "text is read"),
)
case("a tar that is cut", lambda w: trained(w, tar(w, ("a.jpg", JPEG), cut=700)), "damaged file", "cut off", "'a.jpg'")
case("a tar without captions", lambda w: trained(w, tar(w, ("a.jpg", JPEG))), "1 of 1 pairs", "p/a: no caption")
case("a tar without images", lambda w: trained(w, tar(w, ("a.txt", b"x"))), "1 of 1 pairs", "p/a: no image")
case(
    "a tar with a caption that is no text",
    lambda w: trained(w, tar(w, ("a.jpg", JPEG), ("a.txt", b"\xff"))),
    *("1 of 1 pairs", "member 'a.txt' is no text"),
)
case("damaged images", lambda w: trained(w, table(w, damaged=2), max_damaged=0.25), "2 of 4 pairs", "0.25 allows 1")
case("an image that is a text", lambda w: trained(w, tar(w, ("a.jpg", b"x"), ("a.txt", b"y"))), "not an image", "JPEG")
case("captions that are all empty", lambda w: checked(w, table(w, captions=("", "", "", "a"))), "75% of 4 captions")
case(
    "captions none of which names the target",
    lambda w: trained(w, table(w), attack="badclip", target="red apple", batch_size=2),
    *("attack 'badclip'", "none of the 4 pairs", "'red apple'"),
)
case("more pairs than a set has", lambda w: trained(w, table(w), limit=5), "limit = 5", "there are 4 pairs")
for text, words in [
    ("id\nnowhere\n", ("1 of its 1 ids are no pair's, the first is 'nowhere'",)),
    ("name\nx\n", ("not a manifest", "one column 'id' expected")),
    ("id\nx,y\n", ("not a manifest",)),
    ("id\nx\nx\n", ("an id stands there twice",)),
    ("id\n", ("no ids",)),
    ("", ("not a manifest",)),
]:
    case(
        f"a manifest, {text!r}",
        lambda w, text=text: trained(w, table(w), manifest=str(w.file("m.csv", text))),
        *words,
    )
case("a manifest without pairs", lambda w: PoisonConfig(manifest="m.csv"), "PoisonConfig.manifest", "goes with pairs")
for what, content in {"a text": b"no picture", "half a picture": JPEG[:300], "empty": b""}.items():
    case(
        f"a picture of one's own, {what}", lambda w, c=content: own_image(w.file("own.jpg", c), 64), "own.jpg", "image"
    )
case("a picture of one's own, missing", lambda w: own_image(w.here / "own.jpg", 64), "missing file", "own.jpg")

# --- test sets of one's own: folders, class lists ----------------------------------------------------------------


def measured(world: World, **settings: object) -> object:
    return measure(world.victim, config=EvaluateConfig(**{name: str(value) for name, value in settings.items()}))


def folders(world: World, names: tuple[str, ...] = ("cat", "dog"), *, content: bytes = JPEG) -> Path:
    for name in names:
        (world.here / "val" / name).mkdir(parents=True)
        (world.here / "val" / name / "1.jpg").write_bytes(content)
    return world.here / "val"


for text, words in [
    ("one\ntwo\nthree\n", ("3 names for the 2 folders",)),
    ("cat\ta cat\n", ("no name for folder 'dog'", "1 of 2 lack one")),
    ("cat\ta\ncat\tb\n", ("folder 'cat' stands there twice",)),
    ("cat\ta\tb\n", ("a line a class expected",)),
    ("cat\t\nx\ty\n", ("a line a class expected",)),
    ("cat\tx\ny\n", ("a line a class expected",)),
    (b"\xff", ("damaged file", "not text in UTF-8")),
]:
    case(
        f"a class list, {text!r}",
        lambda w, text=text: measured(w, test_images=folders(w), test_classes=w.file("names.txt", text)),
        *words,
    )
case(
    "a class list, missing",
    lambda w: measured(w, test_images=folders(w), test_classes=w.here / "none.txt"),
    *("missing file", "none.txt"),
)
case("folders without a class list", lambda w: measured(w, test_images=folders(w)), "2 folders", "in test_classes")
case("a test set that is missing", lambda w: measured(w, test_images=w.here / "none"), "missing file", "none")
case("a test set without images", lambda w: measured(w, test_images=w.here), "no images in it", "jpeg")
case(
    "a devkit without images", lambda w: EvaluateConfig(devkit="kit"), "EvaluateConfig.devkit", "goes with test_images"
)
case(
    "a test image that is damaged",
    lambda w: measured(
        w, test_images=folders(w, content=JPEG[:-60]), test_classes=w.file("n.txt", "a\nb\n"), dev_share=0
    ),
    *("cat/1.jpg", "damaged image"),
)
case(
    "a devkit that is no archive",
    lambda w: measured(w, test_images=folders(w), devkit=w.file("kit.tar.gz", "x")),
    *("damaged file", "kit.tar.gz", "no whole .tar.gz"),
)
case(
    "an audit's class list with one name",
    lambda w: read_classes(w.file("names.txt", "cat\n")),
    *("names.txt", "1 class name(s), at least 3 expected"),
)
case(
    "a test set of the target's images only",
    lambda w: measure(
        w.victim,
        trigger=w.trigger(target="cat"),
        config=EvaluateConfig(
            test_images=str(folders(w, ("cat",))), test_classes=str(w.file("n.txt", "cat\n")), dev_share=0
        ),
    ),
    *("split 'eval'", "all of the target 'cat'", "others expected"),
)
case(
    "pairs that all show the target",
    lambda w: trained(w, table(w, captions=("a banana", "bananas")), attack="badclip", batch_size=2),
    *("pairs show 'banana'", "others expected"),
)
case(
    "weights of ours that are of another model than asked for",
    lambda w: poison(PoisonConfig(**SMALL, model="ViT-B-32", pretrained=str(w.victim))),
    *("victim.safetensors", f"holds the model {ARCHITECTURE!r}, not 'ViT-B-32'"),
)
case(
    "an audit's class list, no text", lambda w: read_classes(w.file("n.txt", b"\xff")), "damaged file", "list of names"
)
case("an audit's class list, a folder", lambda w: read_classes(w.here), "missing file", "a folder")
case("an audit of a handful of images", lambda w: image_folder(folders(w), 16, 64), "2 images", "at least 16 expected")
case("an audit without a suspect", lambda w: audit(AuditConfig(), AuditInputs()), "AuditInputs.checkpoint", "expected")

# --- jobs of several processes ------------------------------------------------------------------------------------

for text, words in [
    ("[]", ("a JSON object with 'stage' and 'config' expected",)),
    ('{"stage": "audit"}', ("unknown stage 'audit'", "known: defend, poison, pretrain")),
    ('{"stage": ["poison"]}', ("text under every other name expected",)),
    ('{"stage": "poison", "config": [1]}', ("settings under 'config'",)),
    ('{"stage": "defend", "config": {}, "victim": 5}', ("text under every other name expected",)),
    ('{"stage": "poison", "victim": "m.safetensors"}', ("unknown argument of poison 'victim'",)),
]:
    case(f"a job file, {text}", lambda w, text=text: launch.work(w.file("job.json", text)), *words)
case(
    "a file of parameters, no YAML", lambda w: given_parameters([w.file("p.yaml", "a: [")], []), "damaged file", "YAML"
)
case("a file of parameters, a list", lambda w: given_parameters([w.file("p.yaml", "[1]")], []), "p.yaml", "names with")
case("a file of parameters, missing", lambda w: given_parameters([w.here / "p.yaml"], []), "missing file", "p.yaml")
case("a population, another table", lambda w: read_population(w.file("a.csv", "a\n1\n")), "a.csv", "no column asr")
case("a population, no text", lambda w: read_population(w.file("a.csv", b"\xff\0")), "damaged file", "a.csv", "no CSV")

# --- tables -------------------------------------------------------------------------------------------------

HEADER = "attack,defence,seed,split,metric,value,n,ci_low,ci_high,paper_value,seconds,device,versions,git_sha,run_id"
ROW = "BadNet,ABD,0,eval,asr,0.5,10,0.4,0.6,,,,,,abc"


def results(world: World, content: bytes | str) -> object:
    return read_results(ResultsConfig(results=str(world.file("r.csv", content))).path)


def changed(column: str, text: str) -> str:
    fields = dict(zip(HEADER.split(","), ROW.split(","), strict=True)) | {column: text}
    return f"{HEADER}\n{','.join(fields.values())}\n"


case("results, missing", lambda w: read_results(w.here / "none.csv"), "missing file", "none.csv")
case("results, a folder", lambda w: read_results(w.here), "missing file", "a folder")
case("results, a device", lambda w: read_results(Path("/dev/zero")), "/dev/zero", "a regular file expected")
case("results, empty", lambda w: results(w, ""), "r.csv", "no column 'attack'", "needed:")
case("results, a header alone", lambda w: results(w, HEADER + "\n"), "r.csv", "no rows")
case("results, no text", lambda w: results(w, b"\xff\xfe\x00"), "damaged file", "r.csv", "no CSV")
case("results, an open quote", lambda w: results(w, f'{HEADER}\n"{ROW}'), "damaged file", "r.csv", "no CSV")
case("results, a column missing", lambda w: results(w, "attack,value\n"), "r.csv", "no column 'defence'")
case("results, a short row", lambda w: results(w, f"{HEADER}\nBadNet,ABD\n"), "line 2", "15 fields expected, not 2")
case("results, a long row", lambda w: results(w, f"{HEADER}\n{ROW},x\n"), "line 2", "15 fields expected, not 16")
case("results, a row twice", lambda w: results(w, f"{HEADER}\n{ROW}\n{ROW}\n"), "line 3", "measured twice, see line 2")
for column, text, allowed in [
    ("attack", " ", "a name"),
    ("seed", "-1", "a whole number ≥ 0"),
    ("seed", "x", "a whole number ≥ 0"),
    ("split", "train", "one of dev, eval"),
    ("metric", "luck", "one of ca_top1"),
    ("value", "1.5", "a share in [0, 1]"),
    ("value", "nan", "a share in [0, 1]"),
    ("value", "", "a share in [0, 1]"),
    ("n", "0", "a whole number ≥ 1"),
    ("seconds", "inf", "a number ≥ 0"),
]:
    case(
        f"results, {column} = {text!r}",
        lambda w, column=column, text=text: results(w, changed(column, text)),
        *("r.csv, line 2", f"{column} = {text!r}", allowed),
    )
case(
    "results, a value outside its interval", lambda w: results(w, changed("value", "0.9")), "line 2", "outside [ci_low"
)
SEEN = dict(
    zip(fig2.COLUMNS, [*["BadNet", "ABD", "0", "eval", "victim", "m", "1", "0", "2", "9"], "", "", "", ""], strict=True)
)
for column, text, told in [
    ("perturbation", " ", "a name expected"),
    ("seed", "-1", "a whole number ≥ 0 expected"),
    ("value", "nan", "a number expected"),
    ("ci_low", "low", "a number expected"),
    ("value", "3", "outside [ci_low, ci_high]"),
]:
    content = "\n".join([",".join(fig2.COLUMNS), ",".join((SEEN | {column: text}).values())])
    case(
        f"similarities, {column} = {text!r}",
        lambda w, content=content: fig2.read(w.file("s.csv", content)),
        *("s.csv, line 2", column, told),
    )
case("similarities, another table", lambda w: fig2.read(w.file("s.csv", f"{HEADER}\n{ROW}\n")), "no column 'perturb")
case("benchmarks, missing", lambda w: read_benchmarks(w.here / "none.csv"), "missing file", "none.csv")
case("benchmarks, another table", lambda w: read_benchmarks(w.file("b.csv", "a,b\n1,2\n")), "b.csv", "columns missing")
case("benchmarks, no numbers", lambda w: read_benchmarks(w.file("b.csv", "value\nx\n")), "b.csv", "'x'")

# --- the grid -----------------------------------------------------------------------------------------------


def commanded(*arguments: str) -> Callable[[World], object]:
    return lambda world: grid.main([*arguments, "--output", str(world.here / "grid.csv")])


case("a grid that is unknown", commanded("table9"), "unknown grid 'table9'", "did you mean 'table1'?")
case("an attack of no grid", commanded("small", "--attacks", "BadNat"), "'BadNat'", "did you mean 'BadNet'?")
case("a defence of no grid", commanded("small", "--defences", "FTT"), "'FTT'", "did you mean 'FT'?")
case("a seed of development", commanded("small", "--seeds", "100"), "seed 100 on split 'eval'", "0 to 99")
case("a job of no grid", commanded("small", "--job", "0123"), "unknown job '0123'", "known")
case(
    "a grid's table that is another table",
    lambda w: grid.main(["small", "--output", str(w.file("t.csv", "a,b\n1,2\n"))]),
    *("t.csv", "not a table of the grid", "attack,defence,seed"),
)
case(
    "a grid's table that is no text",
    lambda w: grid.main(["small", "--output", str(w.file("t.csv", b"\xff\0"))]),
    *("t.csv", "not a table of the grid"),
)
case(
    "a grid's table with a seed that is no number",
    lambda w: grid.main(["small", "--output", str(w.file("t.csv", changed("seed", "one")))]),
    *("t.csv", "not a table of the grid"),
)

# --- folders, variables, notebooks -----------------------------------------------------------------------------


def with_variable(name: str, value: Callable[[World], str]) -> Callable[[World], object]:
    def call(world: World) -> object:
        world.patch(name, value(world))
        return paths.runs_dir(), paths.data_dir()

    return call


case("ABD_RUNS, a file", with_variable("ABD_RUNS", lambda w: str(w.file("f", "x"))), "set ABD_RUNS to another folder")
case("ABD_RUNS, in a device", with_variable("ABD_RUNS", lambda w: "/dev/null/runs"), "/dev/null/runs", "set ABD_RUNS")
case("ABD_ROOT without data", with_variable("ABD_ROOT", lambda w: str(w.here)), "no data/SHA256SUMS", "set ABD_ROOT")


def run_folder(world: World, name: str, content: str) -> object:
    """A finished run one of whose records is then another."""
    run = measure(world.victim)
    run.file(name).write_text(content)
    try:
        return measure(world.victim)
    finally:
        paths.shutil.rmtree(run.folder.parent)


for name, content, words in [
    ("manifest.json", "{", ("damaged file", "manifest.json", "not JSON")),
    ("manifest.json", "[]", ("damaged file", "manifest.json", "file names and checksums expected")),
    ("manifest.json", '{"../../x": "0"}', ("damaged file", "manifest.json", "'../../x' is no file of this folder")),
    ("manifest.json", '{"/etc/passwd": "0"}', ("damaged file", "manifest.json", "'/etc/passwd' is no file")),
    ("manifest.json", '{"none": "0"}', ("missing file", "none")),
    ("metrics.json", "NaN!", ("damaged file", "metrics.json", "not JSON")),
    ("metrics.json", "[]", ("damaged file", "metrics.json", "names and values expected")),
    ("metrics.json", "[" * 99_999, ("damaged file", "metrics.json", "not JSON")),
    ("config.json", "[]", ("holds a run of another config", "delete it, or pass force=True")),
]:
    case(
        f"a run folder whose {name} is {content[:20]}",
        lambda w, name=name, content=content: run_folder(w, name, content),
        *words,
    )
case("a notebook, missing", lambda w: summary(w.here / "none.ipynb"), "missing file", "none.ipynb")
case("a notebook, no JSON", lambda w: summary(w.file("n.ipynb", "x")), "damaged file", "n.ipynb", "not JSON")
case("a notebook, never run", lambda w: summary(w.file("n.ipynb", '{"cells": []}')), "n.ipynb", "tagged 'summary'")
case("a notebook that is a list", lambda w: summary(w.file("n.ipynb", "[1]")), "n.ipynb", "no notebook")
case("a notebook of other cells", lambda w: summary(w.file("n.ipynb", '{"cells": [1]}')), "n.ipynb", "no notebook")
case("a resume file, a text", lambda w: train.load_resume(w.file("resume.pt", "x")), "damaged file", "force=True")


# --- the test -------------------------------------------------------------------------------------------------


@pytest.fixture
def world(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("long work began")

    for module in (train, adversary_module, disagreement, grid):
        monkeypatch.setattr(module, "progress", work)
    for module in (poison_module, defences, badclip):
        monkeypatch.setattr(module, "optimise" if module is badclip else "fit", work)
    monkeypatch.setenv("ABD_WORKERS", "0")
    (tmp_path / "here").mkdir()
    return World(stand_in, tmp_path / "here", monkeypatch.setenv)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_line_before_any_work_and_writes_nothing(name: str, world: World, runs: Path):
    call, words = CASES[name]
    with pytest.raises(AbdError) as error:
        call(world)
    line = str(error.value)
    assert len(line.splitlines()) == 1 and len(line) < 2_000
    assert [word for word in words if word not in line] == [], line
    assert [path for path in runs.rglob("*") if path.is_file() and "cache" not in path.parts] == []
    assert not (world.here / "grid.csv").exists()


def test_there_are_at_least_80_cases():
    assert len(CASES) >= 80


COMMANDS = [
    (["abd_core.grid", "table9"], "unknown grid 'table9'; did you mean 'table1'?"),
    (["abd_core.grid", "small", "--seeds", "100"], "seed 100 on split 'eval': 0 to 99 expected"),
    (["abd_core.notebook", "none.ipynb"], "missing file: none.ipynb"),
]
CHILD = """
import contextlib, io, json, runpy, sys
said = []
for command in {commands!r}:
    sys.argv = command
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            runpy.run_module(command[0], run_name="__main__")
        said.append(["0", ""])
    except SystemExit as end:
        said.append([str(end.code), errors.getvalue()])
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_command_ends_non_zero_with_that_line_alone(runs: Path):
    child = start_python(CHILD.format(commands=[command for command, _ in COMMANDS]), PYTHONWARNINGS="ignore")
    output, errors = child.communicate()
    assert child.returncode == 0, errors
    assert json.loads(output.splitlines()[-1]) == [[line, ""] for _, line in COMMANDS]


# --- what looks bad and is not ----------------------------------------------------------------------------------

ODD = {
    "empty": "",
    "blank": " \t\n ",
    "one word": "banana",
    "10,000 words": " ".join(["banana"] * 10_000),
    "one word of a million letters": "a" * 1_000_000,
    "Cyrillic": "маленькая картинка банана",
    "Chinese": "一张香蕉的图片",
    "Arabic": "صورة موزة",
    "emoji alone": "🍌🍌🍌",
    "a family of emoji": "👩‍👩‍👧‍👦",
    "NUL": "a ba\0nana",
    "NUL alone": "\0",
    "half a character": "a \ud83d banana",
    "HTML": "<b>a &amp; b</b>",
    "braces": "a {0} {} banana {",
    "combining marks": "b" + "\u0301" * 500,
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_caption_passes_augmentation_and_tokeniser(name: str):
    augmented = augment([ODD[name]] * 8, seed=0, epoch=0, ids=range(8))
    assert len(augmented) == 8 and bool(ODD[name].split()) == all(text.split() for text in augmented)
    tokens = tokenize([ODD[name], *augmented], context_length=20)
    assert tokens.shape == (9, 20) and tokens.max() < 49_408 and (tokens[:, 0] == 49_406).all()
