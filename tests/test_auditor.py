"""The audit's widget: what may be dropped in, a process that can be watched and stopped, what is read at its end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from IPython.display import HTML
from test_audit import CHEAP, CONFIG, cheap, suspect
from test_explore import alts

from abd_core import audit as audit_module
from abd_core import auditor
from abd_core.audit import AuditConfig, AuditInputs, audit
from abd_core.auditor import Auditor, AuditorError, received
from abd_core.config import ConfigError
from abd_core.paths import runs_dir

__all__ = ["cheap", "suspect"]  # fixtures

# The audit's own command on the stand-in, with the detectors of `CHEAP`.
CHILD = """
import sys
from pathlib import Path
from conftest import use_stand_in
from test_audit import CHEAP
from abd_core import audit

use_stand_in(Path({folder!r}))
audit.detectors = lambda preset: CHEAP
sys.exit(audit.main(sys.argv[1:]))
"""


def child(shown: Auditor, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the widget's process run `script` with the arguments of its own command."""
    own = shown.command()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setattr(shown, "command", lambda: [sys.executable, "-c", script, *own[3:]])


def ended(shown: Auditor) -> str:
    assert shown.thread is not None
    shown.thread.join()
    assert shown.controls["stop"].disabled and not shown.controls["start"].disabled
    return shown._said.value


def test_a_dropped_file_is_kept_under_its_digest_whatever_its_name(runs: Path):
    one = received("../../../etc/passwd.safetensors", b"weights")
    assert one.parent == runs_dir() / "suspects" and one.suffix == ".safetensors" and one.read_bytes() == b"weights"
    assert received("other.safetensors", b"weights") == one
    assert received("A.PT", b"weights").suffix == ".pt"
    assert received("b.safetensors", b"others") != one
    assert [path for path in runs.rglob("*") if path.name not in ("suspects", "cache")] and len(
        list((runs / "suspects").iterdir())
    ) == 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("weights.py", b"x", r"weights\.py: a file of weights expected"),
        ("weights", b"x", "a file of weights expected"),
        ("w.safetensors", b"", r"w\.safetensors: an empty file"),
    ],
)
def test_what_is_no_file_of_weights_is_refused_and_not_kept(name: str, content: bytes, said: str, runs: Path):
    with pytest.raises(AuditorError, match=said):
        received(name, content)
    assert not (runs / "suspects").exists()


def test_the_command_tells_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the command's arguments are read as is what the widget was given."""
    config = AuditConfig(seed=3, count=32, preset="published", share=0.25, limit=128, recovery_steps=2)
    inputs = AuditInputs(checkpoint="-odd name.safetensors", reference="none", images="folder", classes="c.txt")
    heard = []

    def stop(*given: object) -> None:
        heard.append(given)
        raise ConfigError("heard")

    monkeypatch.setattr(audit_module, "audit", stop)
    python, flag, module, *arguments = Auditor(config, inputs).command()
    assert (python, flag, module) == (sys.executable, "-m", "abd_core.audit")
    with pytest.raises(ConfigError, match="heard"):
        audit_module.main(arguments)
    assert heard == [(config, inputs)]


def test_a_suspect_that_is_dropped_in_is_audited_and_its_verdict_is_shown(suspect, monkeypatch: pytest.MonkeyPatch):
    shown = Auditor(CONFIG, AuditInputs())
    shown._drop_content("mine.safetensors", Path(suspect.checkpoint).read_bytes())
    assert "mine.safetensors" in shown._said.value and Path(shown.controls["path"].value).parent.name == "suspects"
    shown.inputs = shown.inputs.replace(checkpoint=shown.controls["path"].value)
    child(shown, CHILD.format(folder=str(Path(suspect.checkpoint).parent)), monkeypatch)
    shown.controls["start"].click()
    assert shown.controls["start"].disabled and not shown.controls["stop"].disabled
    assert ended(shown).startswith("done")
    assert shown._bar.description in CHEAP and shown._bar.value == 100
    page = shown._report.value
    run = audit(CONFIG, shown.inputs)  # loaded: the process has made it
    assert run.metrics["classes"][0] in page and "defend(" in page and page.count("<img") == len(alts(page)) == 2


def test_an_audit_can_be_stopped_and_says_so(runs: Path, monkeypatch: pytest.MonkeyPatch):
    shown = Auditor(CONFIG, AuditInputs(checkpoint="x.safetensors"))
    child(shown, "import sys, time; print('drift:  40%|', file=sys.stderr, flush=True); time.sleep(600)", monkeypatch)
    shown.controls["start"].click()
    while shown._bar.value != 40 and shown.thread.is_alive():
        time.sleep(0.1)
    assert (shown._bar.value, shown._bar.description) == (40, "drift")
    shown.controls["stop"].click()
    assert ended(shown).startswith("stopped") and not shown._report.value


def test_a_process_that_was_not_stopped_but_killed_says_by_what(runs: Path, monkeypatch: pytest.MonkeyPatch):
    shown = Auditor(CONFIG, AuditInputs(checkpoint="x.safetensors"))
    child(shown, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", monkeypatch)
    shown.controls["start"].click()
    assert ended(shown) == "the audit&#x27;s process was ended by signal 9 (Killed)"


@pytest.mark.parametrize("path", ["a\0b.safetensors", "a\ud800b.safetensors"], ids=["NUL", "surrogate"])
def test_a_path_that_no_process_can_be_given_is_said_and_another_can_be_tried(path: str):
    shown = Auditor(CONFIG, AuditInputs())
    shown.controls["path"].value = path
    shown.start()
    assert shown._said.value.startswith("no audit of a") and shown.thread is None
    assert shown.controls["stop"].disabled and not shown.controls["start"].disabled


def test_a_failure_shows_as_its_last_line_made_harmless(runs: Path, monkeypatch: pytest.MonkeyPatch):
    shown = Auditor(CONFIG, AuditInputs(checkpoint="x.safetensors"))
    child(shown, "import sys; sys.exit('first\\ndamaged file: <script>\\x1b[31m')", monkeypatch)
    shown.controls["start"].click()
    assert ended(shown) == "damaged file: &lt;script&gt;\\x1b[31m"


def test_a_static_page_has_the_report_of_a_finished_audit(suspect, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ABD_STATIC", "1")
    page = auditor.auditor(CONFIG, suspect)
    assert isinstance(page, HTML)
    assert audit(CONFIG, suspect).metrics["classes"][0] in page.data and "<table" in page.data
    monkeypatch.setenv("ABD_STATIC", "0")
    assert not isinstance(auditor.auditor(CONFIG, suspect), HTML)
