"""One root, one scheme of run folders, atomic writes.

A run folder `<runs>/<stage>/<key>/` is keyed by the digest of the stage's config and of its inputs. `load_or_make`
loads a finished one, resumes an interrupted one, and makes a missing one. `metrics.json` is written last: a folder that
has it is finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abd_core import escape, ranks
from abd_core.config import AbdError, Config, digest

# Settings that cost memory, in the order in which to lower them.
MEMORY_KNOBS = ("micro_batch", "batch_size", "width", "bank")


class RunError(AbdError):
    """A run folder or an input file is missing, damaged, or belongs to other settings."""


def root() -> Path:
    """The checkout: `ABD_ROOT` if set, else the folder above the package."""
    path = Path(os.environ.get("ABD_ROOT") or Path(__file__).resolve().parents[1])
    if not (path / "data" / "SHA256SUMS").is_file():
        raise RunError(f"no data/SHA256SUMS under {path}: set ABD_ROOT to a checkout of the project")
    return path


def data_dir() -> Path:
    """The embedded benchmark and what else is committed beside it."""
    return root() / "data"


def runs_dir() -> Path:
    """Where run folders go: `ABD_RUNS` if set, else `runs/` in the checkout. Made if missing."""
    path = Path(os.environ.get("ABD_RUNS") or root() / "runs").resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"run folders cannot be made in {path}: {error.strerror}; set ABD_RUNS to another folder"
        ) from None
    return path


def cache_dir() -> Path:
    """Unpacked archives; safe to delete. Made if missing."""
    path = runs_dir() / "cache"
    path.mkdir(exist_ok=True)
    return path


def shown(path: Path) -> str:
    """A path to print: relative to the checkout where it lies inside."""
    return escape.terminal(path.relative_to(root()) if path.is_relative_to(root()) else path)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary sibling to write; it takes the name `path` only when the block ends without an exception.

    Of several ranks the first one writes; what the others write is thrown away.

    Raises:
        RunError: there is no folder to write it into, or the disk takes no more.
    """
    if not os.path.isdir(path.parent):
        raise RunError(f"{path} cannot be written: {path.parent} is no folder")
    # A name of its own: containers that share the folder have the same process ids.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.unlink(missing_ok=True)  # whatever lies there, a link perhaps, is not written through
    try:
        yield temporary
        if not ranks.first():
            return
        temporary.chmod(0o644)  # safetensors makes its files private
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if refusal := _refusal(temporary):
            raise RunError(f"{path} cannot be written: {refusal}; make room, then start again") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _refusal(path: Path) -> str:
    """Why the disk takes no more of this file, "" if it does: each library wraps that error in one of its own."""
    try:
        with path.open("ab") as f:
            f.write(bytes(1 << 20))
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def write_json(path: Path, record: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises RunError where the file is missing, no regular file, or not JSON."""
    regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"damaged file: {path}: not JSON ({error})") from None


def regular(path: Path) -> Path:
    """The path itself. Raises RunError where no file is there, or one that may never end (a device, a pipe)."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a NUL in its name
        raise RunError(f"missing file: {path}") from None
    if stat.S_ISDIR(mode):
        raise RunError(f"missing file: {path}: a folder")
    if not stat.S_ISREG(mode):
        raise RunError(f"{path}: a device or a pipe: a regular file expected")
    return path


def unpacked(archive: zipfile.ZipFile) -> None:
    """Raises BadZipFile where a part is packed: `torch.save` packs none, and what unpacks may never end."""
    if packed := [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]:
        raise zipfile.BadZipFile(f"{packed[0]} is packed")


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file. Raises RunError where it is missing or no regular file."""
    with regular(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def environment() -> dict[str, Any]:
    """What a result depends on besides its config: versions, device, threads, git revision."""
    import open_clip

    # Of the package alone: results that are written into the checkout do not change what makes them.
    sha, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "git_sha": sha and sha + ("+changes" if changed else ""),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the package's folder, None where it is no repository or there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions(environment: Mapping[str, Any]) -> str:
    """What `environment` said, but for device and revision, as one cell of a table."""
    threads = f"{environment['threads']} thread" + ("" if environment["threads"] == 1 else "s")
    return ", ".join([*(f"{name} {environment[name]}" for name in ("python", "torch", "open_clip")), threads])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Run:
    """A finished run folder."""

    folder: Path
    metrics: dict[str, Any]

    def file(self, name: str) -> Path:
        return self.folder / name

    @property
    def name(self) -> str:
        """`<stage>/<key>`."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def load_or_make(
    stage: str,
    config: Config,
    inputs: Mapping[str, str],
    make: Callable[[Path], Mapping[str, Any]],
    *,
    force: bool = False,
    launch: Callable[[], None] | None = None,
) -> Run:
    """Load the finished run of (`stage`, `config`, `inputs`), or finish it by calling `make(folder)`.

    Several ranks call it together: the first one looks, locks and writes, and all call `make`.

    Args:
        inputs: digests of what the stage reads besides its config (weights, data, triggers).
        make: writes its files into the folder (each atomically; it resumes from what it finds there) and returns the
            metrics, JSON-able; `seconds` joins them, None where an earlier process did part of the work. Whatever it
            leaves in files named `resume.*` is removed afterwards.
        force: make it anew, even where it is finished.
        launch: has other processes finish the run; it takes the place of `make` in this one.

    Raises:
        RunError: the folder holds another config's run or is a link, a file of the finished run is missing or damaged,
            the disk is full, or memory does not suffice.
    """
    key = {"stage": stage, "config": config.key(), "inputs": dict(inputs)}
    folder = runs_dir() / stage / digest(key)[:12]
    if folder.is_symlink():
        raise RunError(f"{folder} is a link: run folders are folders; remove it")
    _there(folder)
    with _locked(folder) if ranks.first() else nullcontext():
        resumed = finished = False
        if ranks.first():
            if force:
                _empty(folder)
            if (folder / "config.json").exists():
                record = read_json(folder / "config.json")
                if not isinstance(record, dict) or {name: record.get(name) for name in key} != key:
                    raise RunError(f"{folder} holds a run of another config: delete it, or pass force=True")
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            finished = (folder / "metrics.json").exists()
            if finished:
                _forget(folder)
            else:
                resumed = bool({path.name for path in folder.iterdir()} - {".lock", "config.json"})
                places = {"places": config.places()} if config.places() else {}
                write_json(folder / "config.json", {**key, **places, "environment": environment()})
        if ranks.agreed(finished):
            return load_run(folder)
        if launch is None:
            start = time.perf_counter()
            try:
                with _told(stage, config):
                    metrics = dict(make(folder))
            except AbdError:
                if ranks.first() and {path.name for path in folder.iterdir()} <= {".lock", "config.json"}:
                    shutil.rmtree(folder)  # nothing was made: bad input leaves no trace
                raise
            metrics["seconds"] = None if resumed else round(time.perf_counter() - start, 1)
            ranks.barrier()
            if ranks.first():
                _finish(folder, metrics)
            ranks.barrier()
            return Run(folder, metrics)
    launch()  # without the lock, which the first of the launched processes takes
    return load_run(folder)


def _finish(folder: Path, metrics: Mapping[str, Any]) -> None:
    hidden = (".", "resume.", "manifest.json")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(hidden))
    write_json(folder / "manifest.json", {str(p.relative_to(folder)): sha256(p) for p in files})
    write_json(folder / "metrics.json", metrics)
    _forget(folder)  # only now: whoever is killed before takes up the last step, not the first


def _forget(folder: Path) -> None:
    """Remove what a finished run was resumed from."""
    for leftover in folder.glob("resume.*"):
        leftover.unlink()


@contextmanager
def readers_told() -> Iterator[None]:
    """A process that reads images and dies ends the work with one line. (torch raises it at whatever is under way.)"""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise RunError(
            f"a process that reads images died ({str(error).splitlines()[0]}); start again to go on, with a smaller "
            "ABD_WORKERS where memory is short"
        ) from None


@contextmanager
def _told(stage: str, config: Config) -> Iterator[None]:
    """Where memory does not suffice, say what to lower."""
    try:
        with readers_told():
            yield
    except (MemoryError, RuntimeError) as error:  # torch has no kind of its own for the CPU's
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        there = {name: getattr(config, name) for name in MEMORY_KNOBS if name in config.names()}
        knobs = [f"{name} = {value}" for name, value in there.items() if value]
        advice = f"lower {', '.join(knobs)}" if knobs else "end other programs, or use a larger machine"
        if there.get("micro_batch") == 0:
            advice += ", or set micro_batch"
        raise RunError(f"{stage}: out of memory: {advice}") from error


def load_run(folder: Path) -> Run:
    """A finished run, its files checked against their recorded checksums.

    Raises:
        RunError: a file is missing or damaged, or the list of files names one outside the folder.
    """
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict):
        raise RunError(f"damaged file: {folder / 'manifest.json'}: file names and checksums expected")
    for name, checksum in manifest.items():
        if not _within(folder, name):
            raise RunError(f"damaged file: {folder / 'manifest.json'}: {name!r} is no file of this folder")
        if sha256(folder / name) != checksum:
            raise RunError(f"damaged file: {folder / name}: its checksum changed; delete {folder}, or pass force=True")
    metrics = read_json(folder / "metrics.json")
    if not isinstance(metrics, dict):
        raise RunError(f"damaged file: {folder / 'metrics.json'}: names and values expected")
    return Run(folder, metrics)


def _within(folder: Path, name: str) -> bool:
    """Whether a name is that of a file in the folder, and no link leads elsewhere."""
    try:
        return not Path(name).is_absolute() and (folder / name).resolve() == folder.resolve() / name
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL in it, links in a circle
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _there(folder: Path) -> None:
    """Make a run folder where it is missing. Raises RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a second process says so and waits. The system frees the lock of a process that died."""
    path = folder / ".lock"
    while True:
        try:  # never through a link, whose target would be made or changed
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(f"{path} cannot be opened: {error.strerror}") from None
        with os.fdopen(opened, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{shown(folder)} is in use by another process: waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_open(path, lock.fileno()):
                yield
                return
        _there(folder)  # whoever held the lock has removed the folder: its input was bad


def _is_open(path: Path, opened: int) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(opened))
    except FileNotFoundError:
        return False
