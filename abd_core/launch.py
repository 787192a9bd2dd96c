r"""Training stages over several processes: started from a notebook, or by torchrun on as many machines as there are.

With `num_processes` above 1 a training stage starts that many ranks on this machine by torch's elastic launcher, which
is what torchrun is. They run `python -m abd_core.train JOB`, and the stage returns the run that they have finished. JOB
is a JSON file, which can be written by hand too, e.g.::

    {"stage": "defend", "config": {"defence": "abd", "batch_size": 1024}, "victim": "victim.safetensors",
     "perturbation": "perturbation.safetensors"}

One machine with 8 GPUs, and 4 machines with 8 GPUs each under Slurm (`runs/` on a file system that all see)::

    torchrun --standalone --nproc-per-node 8 -m abd_core.train job.json
    srun --nodes 4 --ntasks-per-node 1 torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d \
        --rdzv-endpoint "$(scontrol show hostnames | head -1):29500" --rdzv-id "$SLURM_JOB_ID" \
        -m abd_core.train job.json

`batch_size` counts the pairs of all ranks together (see `abd_core.ranks`), so the number of processes is no part of a
run's key: the run is found again by any number of them, and can go on with another one after an interruption.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from abd_core import ranks
from abd_core.config import AbdError, ConfigError, unknown
from abd_core.paths import RunError, read_json

# Stages that train: function and config, imported by name because they stand above this module.
STAGES = {
    "pretrain": ("abd_core.pretrain", "PretrainConfig"),
    "poison": ("abd_core.poison", "PoisonConfig"),
    "defend": ("abd_core.defend", "DefendConfig"),
}
PROGRAM = ("-m", "abd_core.train")  # what a rank runs, before the job's file
ERRORS = "ABD_LAUNCH_ERRORS"  # names the file in which a rank leaves its error; not in the job, which others may write


def launcher(stage: str, config: Any, **arguments: Path | None) -> Callable[[], None] | None:
    """What `load_or_make` calls to have the stage run by `config.num_processes` ranks; None where this process does it.

    Args:
        arguments: the stage's further arguments.
    """
    if config.num_processes == 1 or ranks.launched():
        return None
    job = {
        "stage": stage,
        "config": config.to_dict(),
        **{name: str(path) for name, path in arguments.items() if path is not None},
    }
    return lambda: _launch(job, config.num_processes)


def _launch(job: Mapping[str, Any], processes: int) -> None:
    """Raises RunError where a rank fails: with the line that a stage's own error has, or that it died."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ConfigError(f"num_processes = {processes}: at most {torch.cuda.device_count()} expected, the GPUs here")
    with tempfile.TemporaryDirectory(prefix="abd-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        said = Path(folder) / "errors"
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.2,
        )
        try:
            with _errors(said), _threads(processes), _quiet(), _own_signals():
                elastic_launch(settings, sys.executable)(*PROGRAM, str(file))
        except ChildFailedError as error:
            if said.exists():
                raise RunError(said.read_text(encoding="utf-8")) from None
            rank, failure = error.get_first_failure()
            how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
            raise RunError(f"rank {rank} of {processes} ended by {how}: run the stage again to go on") from None


@contextmanager
def _errors(said: Path) -> Iterator[None]:
    """The ranks know where to leave their error."""
    os.environ[ERRORS] = str(said)
    try:
        yield
    finally:
        del os.environ[ERRORS]


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """The cores are shared out among the ranks, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


@contextmanager
def _own_signals() -> Iterator[None]:
    """The launcher's signal handlers go when it ends, and an interrupt is one: a notebook's kernel lives on."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the launcher's own reports of a failed rank, of which the error says what matters."""
    logger = logging.getLogger("torch.distributed.elastic")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def work(file: Path) -> None:
    """What each rank does: join the others, and run the job's stage, whose own errors end the process with one line.

    Raises:
        ConfigError: the job names no stage that trains, or an argument that the stage has not, or lacks one.
        RunError: the file is missing, no JSON object, or has something else where names and paths are expected.
    """
    job = read_json(file)
    if not isinstance(job, dict) or "stage" not in job:
        raise RunError(f"{file}: a JSON object with 'stage' and 'config' expected")
    arguments, errors = dict(job), os.environ.get(ERRORS)
    stage, settings = arguments.pop("stage"), arguments.pop("config", {})
    if not isinstance(settings, dict) or not all(isinstance(text, str) for text in (stage, *arguments.values())):
        raise RunError(f"{file}: settings under 'config', and text under every other name expected")
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    module = importlib.import_module(STAGES[stage][0])
    function, kind = getattr(module, stage), getattr(module, STAGES[stage][1])
    taken = inspect.signature(function).parameters
    known = [name for name in taken if name not in ("config", "force")]
    for name in arguments:
        if name not in known:
            raise unknown(f"argument of {stage}", name, known)
    for name in known:
        if name not in arguments and taken[name].default is inspect.Parameter.empty:
            raise ConfigError(f"{file}: {stage} needs {name!r}: a path under that name expected")
    with ranks.group() if ranks.launched() else nullcontext():
        try:
            config = kind.from_parameters(settings)
            run = function(config, **{name: Path(path) for name, path in arguments.items()})
        except AbdError as error:
            if errors is not None:  # started by `launcher`, which says it
                Path(errors).write_text(str(error), encoding="utf-8")
                sys.exit(1)
            sys.exit(str(error) if ranks.first() else 1)
        if errors is None and ranks.first():
            print(run.folder)


def main(arguments: list[str]) -> None:
    """`python -m abd_core.train JOB`, in one process or in each of several; the first prints the run's folder."""
    if len(arguments) != 1:
        sys.exit("usage: torchrun ... -m abd_core.train JOB  (or python -m abd_core.train JOB)")
    try:
        work(Path(arguments[0]))
    except AbdError as error:
        sys.exit(str(error))
