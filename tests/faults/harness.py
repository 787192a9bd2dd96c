"""Stages at a small size, disturbed in every way that a machine has, and what is left of them afterwards.

    python tests/faults/harness.py                    # 30 kills a stage and the other faults: data/results/faults.csv
    python tests/faults/harness.py --kills 2 --others 1 --output /tmp/faults.csv

A row a disturbance, written as soon as it is over; rows that are there are not measured again, so that the harness
itself may be interrupted. A run that was disturbed has *survived* if

- no file of its folder, read while it worked and after it was disturbed, was ever half a file,
- the same call made again ends with the metrics and the weights, to the bit, of a run that nobody disturbed,
- and went on at the step of the last checkpoint: what was saved is not done again.

Every run is a process of its own, forked from this one once everything is imported and the data are read, so that a
disturbance costs seconds and meets the stage at work. The checkpoints come at every step instead of every minute.
Only ranks, which a launcher starts, are interpreters of their own: this file with `--rank`.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]
import miniature
from conftest import ARCHITECTURE, LAYOUT, ROOT, use_stand_in, without_time, write_stand_in

from abd_core import adversary as adversary_module
from abd_core import data, disagreement, inputs, launch, poison, ranks, train
from abd_core.adversary import AdversaryConfig, adversary
from abd_core.config import AbdError, Config, derive_seed
from abd_core.defences import DefendConfig
from abd_core.defend import defend
from abd_core.generator import Perturbation
from abd_core.paths import Run, atomic, environment
from abd_core.poison import PoisonConfig
from abd_core.text import augment

TABLE = ROOT / "data" / "results" / "faults.csv"
COLUMNS = ("fault", "stage", "variant", "trial", "seconds", "step", "reads", "survived", "note", "versions", "git_sha")
SHORT = {"limit": 64, "epochs": 3, "batch_size": 16, "warmup_steps": 2, "lr": 1e-3}
POISON = PoisonConfig(**SHORT, rate=0.25)
ADVERSARY = AdversaryConfig(limit=64, share=0.5, steps=10, batch_size=8, width=16, lr=1e-2)
DEFEND = DefendConfig(**SHORT, share=0.75)
VARIANTS: dict[str, dict[str, Config]] = {
    "poison": {
        "badnet": POISON,
        "badclip": POISON.replace(attack="badclip", target="turtle", patch_steps=3),
        "wanet": POISON.replace(attack="wanet"),
    },
    "adversary": {"patch": ADVERSARY, "additive": ADVERSARY.replace(mode="additive", backdoor_images="clean")},
    "defend": {
        "abd": DEFEND,
        "abd-d": DEFEND.replace(defence="abd-d", search_steps=3),
        "roclip": DEFEND.replace(defence="roclip"),
    },
}
OWN, RANKS = "own pairs", "2 ranks"  # variants beside these: pairs that workers read, and a stage of several processes
BEGAN = "ABD_FAULTS_BEGAN"  # names the file in which a run notes at which step it began
WAITING = "is in use by another process: waiting for it"
PATIENCE = 1800  # seconds after which a run is taken for stuck


# --- one run in a process of its own ----------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a run happens: its folder for run folders, and the stand-in's files."""

    runs: Path
    stand_in: Path

    def folder(self) -> Path | None:
        """The run folder, once there is one."""
        made = [path for path in self.runs.glob("*/*") if path.parent.name in VARIANTS and path.is_dir()]
        return made[0] if made else None


def start(stage: str, config: Config, place: Place) -> Run:
    victim, patch = place.stand_in / "victim.safetensors", place.stand_in / "patch.safetensors"
    if stage == "poison":
        return poison.poison(config)
    if stage == "adversary":
        return adversary(config, victim)
    return defend(config, victim, perturbation=patch)


def small_and_heard() -> None:
    """A checkpoint a step, and a note of where each loop over steps begins."""
    train.CHECKPOINT_SECONDS = adversary_module.CHECKPOINT_SECONDS = -1.0
    bar = train.progress

    def heard(*, stage: str, total: int, initial: int = 0, **options: Any) -> Any:
        if stage != "search" and ranks.first():
            with open(os.environ[BEGAN], "a") as f:
                f.write(f"{initial}\n")
        return bar(stage=stage, total=total, initial=initial, **options)

    for module in (train, adversary_module, disagreement):
        module.progress = heard


class Child:
    """A forked process that runs a stage and says at its end what came of it.

    Args:
        before: called in the process before the stage, to bring the disturbance about.
    """

    def __init__(self, stage: str, config: Config, place: Place, before: Callable[[], object] | None = None) -> None:
        self.said = place.stand_in / f"said-{time.monotonic_ns()}"
        self.log, self.began = self.said.with_suffix(".log"), self.said.with_suffix(".began")
        self.started, self.code = time.monotonic(), None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1), os.dup2(log, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ["ABD_RUNS"], os.environ[BEGAN] = str(place.runs), str(self.began)
            code = self._work(stage, config, place, before)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _work(self, stage: str, config: Config, place: Place, before: Callable[[], object] | None) -> int:
        small_and_heard()
        if before:
            before()
        try:
            run = start(stage, config, place)
            began = [int(line) for line in self.began.read_text().split()] if self.began.exists() else []
            said: dict[str, Any] = {"folder": str(run.folder), "metrics": run.metrics, "began": began}
        except AbdError as error:
            said = {"error": str(error)}
        self.said.write_text(json.dumps(said))
        return 0 if "metrics" in said else 3

    def over(self) -> bool:
        """Whether it has ended; it is reaped then."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        while not self.over():
            if time.monotonic() - self.started > PATIENCE:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Broken(f"no end after {PATIENCE} s")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def result(self) -> dict[str, Any]:
        return json.loads(self.said.read_text()) if self.said.exists() else {}

    def printed(self) -> str:
        return self.log.read_text()


# --- what may be read, and when ---------------------------------------------------------------------------------------


class Broken(Exception):
    """A file was read that is half a file, or a promise was not kept."""


def whole(path: Path) -> None:
    """Read a file as its readers do. Raises where it is not whole."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as f:
            [f.get_tensor(name) for name in f.keys()]  # noqa: SIM118 (safe_open is no mapping)
    elif path.suffix == ".pt":
        train.load_resume(path)
    elif path.suffix == ".csv":
        if not path.read_text().endswith("\n"):
            raise Broken(f"{path.name} ends within a line")
        pd.read_csv(path)


def read_all(place: Place) -> int:
    """Read every file that a reader may meet; how many there were. Raises Broken where one is half a file."""
    folder, count = place.folder(), 0
    for path in sorted(folder.rglob("*")) if folder else []:
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            whole(path)
            count += 1
        except FileNotFoundError:  # resume files go when a run ends
            continue
        except Exception as error:
            if path.exists():
                raise Broken(f"{path.name}: {type(error).__name__}: {error}") from error
    return count


def saved_step(place: Place) -> int:
    """The step at which the next process must go on; 0 where nothing is saved."""
    folder = place.folder()
    saved = train.load_resume(folder / "resume.pt") if folder else None
    return saved["step"] if saved else 0


# --- the undisturbed run that others are compared with ----------------------------------------------------------------


@dataclass
class Reference:
    metrics: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    seconds: float
    bytes: int


class Bench:
    """A stand-in of the base in a temporary folder, and undisturbed runs by stage and variant, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.references, self.count = folder, {}, 0
        (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(LAYOUT))
        use_stand_in(folder)
        write_stand_in(folder / "base.safetensors", seed=0)
        write_stand_in(folder / "victim.safetensors", seed=1)
        pixels = torch.rand(3, 11, 11, generator=torch.Generator().manual_seed(0))
        Perturbation("patch", pixels, 64, "random").save(folder / "patch.safetensors")
        os.environ["ABD_RUNS"] = str(folder / "warm")
        for split in data.TEST_VENDORS:  # what every child would read again
            inputs.load_test_set(split)
        pairs = data.load_pairs(SHORT["limit"])
        pairs.images(torch.arange(2), seed=0, step=0)
        for share in (1.0, DEFEND.share):
            part = pairs.subset(share, seed=0)
            for epoch in range(SHORT["epochs"]):
                captions = part.captions(torch.arange(len(part)), seed=0, epoch=epoch)
                augment(captions, seed=0, epoch=epoch, ids=part.ids)

        self.variants = {stage: dict(variants) for stage, variants in VARIANTS.items()}
        shards = miniature.write_shards(folder / "pairs", miniature.samples(SHORT["limit"], size=(80, 70)))
        for stage, variants in self.variants.items():
            plain = next(iter(variants.values()))
            variants[OWN] = plain.replace(pairs=shards)
            if stage in launch.STAGES:
                variants[RANKS] = plain.replace(num_processes=2)
        launch.PROGRAM = (__file__, "--rank", str(folder))
        os.environ["ABD_WORKERS"] = os.environ["OMP_NUM_THREADS"] = "1"

    def place(self) -> Place:
        self.count += 1
        runs = self.folder / f"runs-{self.count}"
        runs.mkdir()
        return Place(runs, self.folder)

    def reference(self, stage: str, variant: str) -> Reference:
        if (stage, variant) not in self.references:
            place = self.place()
            child = Child(stage, self.variants[stage][variant], place)
            if child.wait() != 0:
                raise SystemExit(f"{stage}, {variant}: an undisturbed run failed:\n{child.printed()}")
            seconds = time.monotonic() - child.started
            folder = Path(child.result()["folder"])
            size = sum(path.stat().st_size for path in folder.iterdir())
            self.references[stage, variant] = Reference(child.result()["metrics"], tensors(folder), seconds, size)
            shutil.rmtree(place.runs)
        return self.references[stage, variant]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}: {name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def compare(child: Child, reference: Reference, *, step: int | None) -> None:
    """Raises Broken where a run that went on differs from the undisturbed one, or did again what was saved."""
    result = child.result()
    if child.code != 0:
        raise Broken(f"the rerun failed: {result.get('error') or child.printed()[-300:]}")
    if without_time(result["metrics"]) != without_time(reference.metrics):
        raise Broken("other metrics")
    ours = tensors(Path(result["folder"]))
    if ours.keys() != reference.tensors.keys():
        raise Broken("other files")
    if changed := [name for name, tensor in reference.tensors.items() if not torch.equal(ours[name], tensor)]:
        raise Broken(f"other weights: {changed[0]}")
    if list(Path(result["folder"]).glob(".*.tmp")) or list(Path(result["folder"]).glob("resume.*")):
        raise Broken("something half-done was left")
    if step is not None and result["began"] != [step]:
        raise Broken(f"went on at {result['began']}, saved was step {step}")


# --- the faults -------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    seconds: float = 0.0
    step: int = 0
    reads: int = 0
    note: str = ""


def signalled(number: int, codes: tuple[int, ...]) -> Callable[..., Outcome]:
    """A signal at a random moment of a run, and then the same run again."""

    def fault(bench: Bench, stage: str, variant: str, draw: random.Random) -> Outcome:
        reference, config = bench.reference(stage, variant), VARIANTS[stage][variant]
        for _ in range(20):  # a moment after the end is no disturbance: draw again
            place, reads = bench.place(), 0
            child, moment = Child(stage, config, place), draw.uniform(0, reference.seconds)
            while time.monotonic() - child.started < moment and not child.over():
                reads += read_all(place)
                time.sleep(0.01)
            elapsed = time.monotonic() - child.started
            folder = place.folder()
            if not child.over() and not (folder and (folder / "metrics.json").exists()):
                os.kill(child.pid, number)
                child.wait()
                folder = place.folder()
            if child.code in codes and not (folder and (folder / "metrics.json").exists()):
                break
            child.wait()
            shutil.rmtree(place.runs)
        else:
            raise Broken("no moment met the run at work")
        reads += read_all(place)
        step = saved_step(place)
        again = Child(stage, config, place)
        again.wait()
        compare(again, reference, step=step)
        shutil.rmtree(place.runs)
        return Outcome(elapsed, step, reads)

    return fault


LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def own_mounts() -> Iterator[None]:
    """A mount namespace of this process's own. Raises OSError where the system does not permit one."""
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER, CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    yield


def full_disk(bench: Bench, stage: str, variant: str, draw: random.Random) -> Outcome:
    """A disk that is full at a random byte, then has room: one line says so, and the rerun ends as if it had not been.

    A small tmpfs where the system permits one, else a limit on a file's size, which fails in the same calls.
    """
    reference, config = bench.reference(stage, variant), VARIANTS[stage][variant]
    report = bench.folder / "full.json"
    for _ in range(20):
        place, size = bench.place(), int(draw.uniform(64 << 10, 2 * reference.bytes))
        pid = os.fork()
        if not pid:  # what it mounts goes with it
            try:
                report.write_text(json.dumps(_fill(stage, config, place, size, reference)))
            except BaseException as error:
                report.write_text(json.dumps({"broken": f"{type(error).__name__}: {error}"}))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        shutil.rmtree(place.runs)
        said = json.loads(report.read_text())
        if "broken" in said:
            raise Broken(said["broken"])
        if said:
            return Outcome(**said)
    raise Broken("no size was too small")


def _fill(stage: str, config: Config, place: Place, size: int, reference: Reference) -> dict[str, Any]:
    """The fields of the outcome; none where the disk sufficed."""
    how, before = "a tmpfs", None
    try:
        with own_mounts():
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place.runs]
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        how = "files"

        def before() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    first = Child(stage, config, place, before)
    if first.wait() == 0:
        return {}
    line = first.result().get("error", "")
    if first.code != 3 or "cannot be" not in line or "\n" in line:
        raise Broken(f"exit {first.code}, no clear line: {line or first.printed()[-300:]}")
    reads, step = read_all(place), saved_step(place)
    if how == "a tmpfs":
        subprocess.run(["mount", "-o", "remount,size=1g", place.runs], check=True, capture_output=True)
    again = Child(stage, config, place)
    again.wait()
    compare(again, reference, step=step)
    file = Path(line.split(" cannot be")[0]).name
    return {"step": step, "reads": reads, "note": f"{how} of {size >> 10} KiB, full at {file}"}


def clock_jump(bench: Bench, stage: str, variant: str, draw: random.Random) -> Outcome:
    """Python's wall clock jumps by up to ten years at each look, and the files of a killed run are of another time."""
    reference, config = bench.reference(stage, variant), VARIANTS[stage][variant]
    wall = time.time

    def jumping() -> None:
        time.time = lambda: wall() + draw.uniform(-3e8, 3e8)

    for _ in range(20):
        place = bench.place()
        child, moment = Child(stage, config, place, jumping), draw.uniform(0, reference.seconds)
        while time.monotonic() - child.started < moment and not child.over():
            time.sleep(0.01)
        if not child.over():
            os.kill(child.pid, signal.SIGKILL)
        if child.wait() == -signal.SIGKILL:
            break
        shutil.rmtree(place.runs)
    else:
        raise Broken("no moment met the run at work")
    for path in place.runs.rglob("*"):
        when = wall() + draw.uniform(-3e8, 3e8)
        os.utime(path, (when, when))
    step = saved_step(place)
    again = Child(stage, config, place, jumping)
    again.wait()
    compare(again, reference, step=step)
    reads = read_all(place)
    shutil.rmtree(place.runs)
    return Outcome(moment, step, reads)


def two_processes(bench: Bench, stage: str, variant: str, draw: random.Random) -> Outcome:
    """Two on one run folder: one works, the other says that it waits, and both end with the same run."""
    reference, config, place = bench.reference(stage, variant), VARIANTS[stage][variant], bench.place()
    one = Child(stage, config, place)
    time.sleep(draw.uniform(0, reference.seconds / 2))
    two = Child(stage, config, place)
    reads = 0
    while not (one.over() and two.over()):
        reads += read_all(place)
        time.sleep(0.01)
    began = [child.result().get("began") for child in (one, two)]
    for child in (one, two):
        compare(child, reference, step=None)
    if sorted(map(str, began)) != ["[0]", "[]"]:
        raise Broken(f"both worked: {began}")
    if not any(WAITING in child.printed() for child in (one, two)):
        raise Broken("the one that waited did not say so")
    shutil.rmtree(place.runs)
    return Outcome(0.0, 0, reads)


def relatives(child: Child) -> list[tuple[int, str]]:
    """The processes that the child has started: their ids and command lines."""
    found = []
    for thread in Path(f"/proc/{child.pid}/task").glob("*/children"):
        for pid in thread.read_text().split():
            with suppress(OSError):
                found.append((int(pid), Path(f"/proc/{pid}/cmdline").read_text()))
    return found


def worker_dies(bench: Bench, stage: str, variant: str, draw: random.Random) -> Outcome:
    """A process that reads images is killed at a random moment: one line says so, and the rerun goes on."""
    reference, config = bench.reference(stage, variant), bench.variants[stage][variant]
    own = Path("/proc/self/cmdline").read_text()  # a worker is a fork, another process is git
    for _ in range(100):
        place, reads = bench.place(), 0
        child, moment = Child(stage, config, place), draw.uniform(0, reference.seconds)
        while not child.over():
            workers = [pid for pid, command in relatives(child) if command == own]
            if workers and time.monotonic() - child.started >= moment:
                os.kill(draw.choice(workers), signal.SIGKILL)
                break
            reads += read_all(place)
            time.sleep(0.001)
        elapsed = time.monotonic() - child.started
        if child.wait() != 0:  # else it was over, or the worker had read all that it had to
            break
        shutil.rmtree(place.runs)
    else:
        raise Broken("no moment met a worker at work")
    return went_on(child, "a process that reads images died", place, reference, stage, config, elapsed, reads)


def rank_dies(bench: Bench, stage: str, variant: str, draw: random.Random) -> Outcome:
    """A rank is killed once a random number of steps is saved: one line says so, and the rerun goes on."""
    reference, config = bench.reference(stage, variant), bench.variants[stage][variant]
    for _ in range(20):
        place, reads = bench.place(), 0
        child, after = Child(stage, config, place), draw.randrange(9)
        while not child.over():
            folder = place.folder()
            if folder and (folder / "config.json").exists() and saved_step(place) >= after:
                ranks_ = [pid for pid, command in relatives(child) if "--rank" in command]
                time.sleep(draw.uniform(0, 0.1))
                if ranks_:
                    with suppress(ProcessLookupError):
                        os.kill(draw.choice(ranks_), signal.SIGKILL)
                    break
            reads += read_all(place)
            time.sleep(0.01)
        elapsed = time.monotonic() - child.started
        folder = place.folder()
        if child.wait() != 0 and not (folder and (folder / "metrics.json").exists()):  # else the run was over
            break
        shutil.rmtree(place.runs)
    else:
        raise Broken("no moment met the ranks at work")
    return went_on(
        child, "of 2 ended by signal 9: run the stage again", place, reference, stage, config, elapsed, reads
    )


def went_on(
    child: Child,
    words: str,
    place: Place,
    reference: Reference,
    stage: str,
    config: Config,
    elapsed: float,
    reads: int,
) -> Outcome:
    """What came of a run that ended by itself, and of the same call made again. Raises Broken."""
    line = child.result().get("error", "")
    if child.code != 3 or words not in line or "\n" in line:
        raise Broken(f"exit {child.code}, no clear line: {line or child.printed()[-300:]}")
    reads += read_all(place)
    step = saved_step(place)
    again = Child(stage, config, place)
    again.wait()
    compare(again, reference, step=step)
    shutil.rmtree(place.runs)
    return Outcome(elapsed, step, reads, line.partition(" (")[0].partition(":")[0])


FAULTS: dict[str, Callable[[Bench, str, str, random.Random], Outcome]] = {
    "SIGKILL": signalled(signal.SIGKILL, (-signal.SIGKILL,)),
    "SIGTERM": signalled(signal.SIGTERM, (-signal.SIGTERM,)),
    "Ctrl-C": signalled(signal.SIGINT, (130, -signal.SIGINT)),
    "full disk": full_disk,
    "clock jump": clock_jump,
    "two processes": two_processes,
    "worker dies": worker_dies,
    "rank dies": rank_dies,
}
SPECIAL = {"worker dies": OWN, "rank dies": RANKS}  # the variant of a fault that not every run can meet


def variants(bench: Bench, fault: str, stage: str) -> list[str]:
    """What a fault is tried on, in turn: none where the stage has no such processes."""
    if fault in SPECIAL:
        return [SPECIAL[fault]] if SPECIAL[fault] in bench.variants[stage] else []
    return list(VARIANTS[stage])


# --- the table --------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def measure(bench: Bench, fault: str, stage: str, trial: int) -> dict[str, Any]:
    """The row of one disturbance."""
    tried = variants(bench, fault, stage)
    variant = tried[trial % len(tried)]
    draw = random.Random(derive_seed("fault", fault, stage, trial))
    try:
        outcome, survived = FAULTS[fault](bench, stage, variant, draw), "yes"
    except (Broken, AssertionError, OSError, KeyError) as error:
        outcome, survived = Outcome(note=" ".join(f"{type(error).__name__}: {error}".split())[:400]), "no"
    made = environment()
    return {
        **{"fault": fault, "stage": stage, "variant": variant, "trial": trial, "seconds": round(outcome.seconds, 3)},
        **{"step": outcome.step, "reads": outcome.reads, "survived": survived, "note": outcome.note},
        "versions": f"python {made['python']}, torch {made['torch']}",
        "git_sha": made["git_sha"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturb the stages, and write what was left of them.")
    parser.add_argument("--kills", type=int, default=30, metavar="N", help="SIGKILLs a stage (30)")
    parser.add_argument("--others", type=int, default=3, metavar="N", help="of every other fault, a stage (3)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="only these")
    parser.add_argument("--output", type=Path, default=TABLE, metavar="CSV", help="the table (data/results/faults.csv)")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = list(read_table(given.output))
    done = {(row["fault"], row["stage"], int(row["trial"])) for row in rows}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="abd-faults-") as folder:
        bench = Bench(Path(folder))
        for trial in range(max(given.kills, given.others)):
            for fault in given.faults:
                for stage in VARIANTS:
                    if not variants(bench, fault, stage):
                        continue
                    if trial >= (given.kills if fault == "SIGKILL" else given.others) or (fault, stage, trial) in done:
                        continue
                    rows.append(measure(bench, fault, stage, trial))
                    write_table(given.output, rows)
                    row = rows[-1]
                    print(
                        f"{fault}, {stage} ({row['variant']}), trial {trial}: survived: {row['survived']} {row['note']}"
                    )
    lost = [row for row in rows if row["survived"] != "yes"]
    print(f"{len(rows) - len(lost)} of {len(rows)} disturbances survived: {given.output}")
    return 1 if lost else 0


def rank(folder: Path, job: str) -> None:
    """What a rank does: a stage's job on the stand-in in `folder`."""
    torch.set_num_threads(1)
    use_stand_in(folder)
    small_and_heard()
    launch.main([job])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main())
