"""Nothing at run time needs a network: the demo in small, in a network namespace that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CHILD = """
import fcntl, socket, struct, sys
from papermill.__main__ import papermill

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # the kernel's sockets are local: the loop must be up
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 1 | 64))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    print("no network:", error.strerror, flush=True)
sys.argv = ["papermill", "--no-progress-bar", *{arguments!r}]
papermill()
"""
SMALL = {"limit": 256, "poison_epochs": 1, "steps": 2, "epochs": 1}
ALONE = ["unshare", "--map-root-user", "--net"]


def permitted() -> bool:
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not permitted(), reason="no network namespace is permitted here")
def test_the_demo_runs_without_a_network(tmp_path: Path):
    given = [part for name, value in SMALL.items() for part in ("-p", name, str(value))]
    arguments = [str(ROOT / "book" / "03_defend.ipynb"), str(tmp_path / "out.ipynb"), *given]
    environment = {
        **os.environ,
        **{"ABD_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT), "ABD_STATIC": "1"},
        **{name: "http://192.0.2.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")},
    }
    done = subprocess.run(
        [*ALONE, sys.executable, "-c", CHILD.format(arguments=arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no network: Network is unreachable" in done.stdout
    assert list((tmp_path / "runs").glob("defend/*/metrics.json"))
