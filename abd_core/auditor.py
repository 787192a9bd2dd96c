"""Chapter 10's widget: drop in a checkpoint, watch the audit, read the verdict.

The audit runs in a process of its own, which reads the file as tensors and can be stopped at any time; what its
detectors have found by then is kept, and the next start goes on from there. Where `ABD_STATIC` is set, as for the book,
a finished audit's report stands in the widget's place.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import HTML

from abd_core import escape
from abd_core.audit import AuditConfig, AuditInputs, audit, next_step, picture, verdict_of
from abd_core.checkpoints import PICKLED
from abd_core.config import AbdError
from abd_core.detectors import DETECTORS
from abd_core.explore import STYLE, bar, html_table, static
from abd_core.explore import picture as image_element
from abd_core.paths import Run, atomic, runs_dir, shown

KINDS = (".safetensors", *PICKLED)
_BAR = re.compile(r"(\w+): +(\d+)%")  # of `train.progress`


class AuditorError(AbdError):
    """A checkpoint that was dropped in is of no kind that is read."""


def received(name: str, content: bytes) -> Path:
    """Where a file that was dropped in is kept: in the runs' folder under its digest; of its name, the kind counts.

    Raises:
        AuditorError: it is of no kind that is read, or empty.
    """
    kind = Path(name).suffix.lower()
    if kind not in KINDS:
        raise AuditorError(f"{name}: a file of weights expected ({', '.join(KINDS)})")
    if not content:
        raise AuditorError(f"{name}: an empty file")
    path = runs_dir() / "suspects" / f"{hashlib.sha256(content).hexdigest()[:16]}{kind}"
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return path


def report(run: Run, inputs: AuditInputs) -> str:
    """A finished audit as HTML: verdict, suspected classes by detector, recovered trigger, next step."""
    verdict, found = verdict_of(run), run.metrics
    rows = [
        (
            escape.markup(name),
            *(bar(min(max(found["suspicion"][d][k], 0) / 10, 1), hit=not k and verdict.alarm) for d in DETECTORS),
        )
        for k, name in enumerate(found["classes"][:5])
    ]
    suspects = html_table("suspected classes, most suspicious first", ["class", *DETECTORS], rows)
    pictures = "".join(
        f"<figure>{image_element(_pixels(shown_picture), name)}<figcaption>{escape.markup(name)}</figcaption></figure>"
        for name, shown_picture in picture(run).items()
    )
    sentence = verdict.sentence(found["classes"][0])
    lines = f"<p><b>{escape.markup(sentence)}</b></p><p>{escape.markup(verdict.basis)}</p>"
    page = f"<p>Page: {escape.markup(shown(run.file('audit.html')))}</p>"
    step = f"<pre>{html.escape(next_step(inputs, run))}</pre>"
    return f'{STYLE}{lines}<div class="abd-look">{pictures}</div>{suspects}{page}{step}'


def _pixels(picture: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


class Auditor:
    """Choose a suspect by dropping its file in or by its path, start, watch, stop, read.

    Attributes:
        widget: all of it, to display.
        controls: name -> control of `widget`.
        thread: what waits for the audit's process; None where none has been started.
    """

    def __init__(self, config: AuditConfig, inputs: AuditInputs) -> None:
        self.config, self.inputs = config, inputs
        self.thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        wide = {"width": "min(42rem, 95%)"}
        self.controls: dict[str, widgets.Widget] = {
            "file": widgets.FileUpload(accept=",".join(KINDS), description="checkpoint"),
            "path": widgets.Text(value=inputs.checkpoint, description="or its path", layout=wide),
            "start": widgets.Button(description="audit", tooltip="takes about a minute; goes on where it was stopped"),
            "stop": widgets.Button(description="stop", disabled=True),
        }
        self._bar = widgets.IntProgress(0, 0, 100)
        self._said, self._report = widgets.HTML(), widgets.HTML()
        self.controls["file"].observe(self._drop, "value")
        self.controls["start"].on_click(self.start)
        self.controls["stop"].on_click(self.stop)
        row = [*(self.controls[name] for name in ("file", "start", "stop")), self._bar]
        self.widget = widgets.VBox(
            [widgets.HBox(row, layout={"flex_flow": "row wrap"}), self.controls["path"], self._said, self._report]
        )

    def command(self) -> list[str]:
        """What runs the audit: the module's own command, told the settings."""
        told = {**self.inputs.to_dict(), **self.config.to_dict()}
        suspect = told.pop("checkpoint")
        options = [f"--{name.replace('_', '-')}={value}" for name, value in told.items()]
        return [sys.executable, "-m", "abd_core.audit", *options, "--", suspect]

    def start(self, button: Any = None) -> None:
        """Audit the chosen file in a process of its own."""
        self.inputs = self.inputs.replace(checkpoint=self.controls["path"].value.strip())
        self._bar.value, self._bar.description, self._report.value = 0, "", ""
        try:
            self._process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
            self._tell(f"no audit of {self.inputs.checkpoint}: {error}")
            return
        self._stopped = False
        self.controls["start"].disabled, self.controls["stop"].disabled = True, False
        self._tell("auditing ...")
        self.thread = threading.Thread(target=self._watch, args=(self._process,), daemon=True)
        self.thread.start()

    def stop(self, button: Any = None) -> None:
        """End the audit's process; what its detectors have found so far is kept."""
        if self._process is not None:
            self._stopped = True
            self._process.terminate()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Show the bars of the process, and its report or its error once it has ended."""
        assert process.stderr is not None
        written = ""
        while piece := os.read(process.stderr.fileno(), 4096):
            written = (written + piece.decode("utf-8", "replace"))[-8192:]
            if bars := _BAR.findall(written):
                self._bar.description, self._bar.value = bars[-1][0], int(bars[-1][1])
        code = process.wait()
        process.stderr.close()
        try:
            if code == 0:  # the rest is read from the run's folder
                self._report.value = report(audit(self.config, self.inputs), self.inputs)
                self._tell(f"done: {self.inputs.checkpoint}")
            elif code < 0 and self._stopped:
                self._tell("stopped: what the detectors have found is kept, and another start goes on from there")
            elif code < 0:
                self._tell(f"the audit's process was ended by signal {-code} ({signal.strsignal(-code)})")
            else:
                self._tell(([""] + [line for line in re.split(r"[\r\n]", written) if line.strip()])[-1])
        except AbdError as error:
            self._tell(str(error))
        finally:
            self.controls["start"].disabled, self.controls["stop"].disabled = False, True

    def _tell(self, text: str) -> None:
        self._said.value = escape.markup(text)

    def _drop(self, change: Any) -> None:
        if self.controls["file"].value:
            dropped = self.controls["file"].value[-1]
            self._drop_content(str(dropped["name"]), bytes(dropped["content"]))

    def _drop_content(self, name: str, content: bytes) -> None:
        try:
            self.controls["path"].value = str(received(name, content))
        except AbdError as error:
            self._tell(str(error))
            return
        self._tell(f"{name}: {len(content) / 1e6:.1f} MB received")


def auditor(config: AuditConfig, inputs: AuditInputs) -> widgets.Widget | HTML:
    """The widget to display; in a static page, the report of the audit of `inputs`."""
    if static():
        return HTML(report(audit(config, inputs), inputs))
    return Auditor(config, inputs).widget
