"""The book and the explorer in Chromium, as readers and researchers meet them.

`make test` looks at a few pages; `make test-browser` at all of them, and at the explorer in JupyterLab. With
`ABD_SCREENSHOTS` set to a folder, pictures of the pages at two widths and the measured figures are kept there.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from conftest import ROOT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (Debian: apt-get install chromium)"),
]
SHORT = ("intro", "02_adversary", "08_explore")
MOST = 3_000_000  # bytes that a page may load
WIDTHS = (360, 1440)
PAINT = """() => new Promise(done => {
  let last = 0;
  new PerformanceObserver(list => { for (const entry of list.getEntries()) last = entry.startTime; })
    .observe({type: "largest-contentful-paint", buffered: true});
  setTimeout(() => done(last), 300);
})"""


def chapters() -> list[str]:
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    return [contents["root"], *(c["file"] for part in contents["parts"] for c in part["chapters"])]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(built_book: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built_book)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


def kept(name: str) -> Path | None:
    """Where a screenshot goes, if any are wanted."""
    folder = os.environ.get("ABD_SCREENSHOTS")
    if not folder:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) / name


def look(browser: Any, site: str, name: str) -> None:
    """Open a page at every width and in both themes, and hold it to all that a page must be."""
    faults, requests, loaded = [], [], []
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("response", lambda got: faults.append(f"{got.status} {got.url}") if got.status >= 400 else None)
        page.on("request", lambda request: requests.append(request.url))
        page.on("requestfinished", lambda request: loaded.append(request.sizes()["responseBodySize"]))
        page.goto(f"{site}/{name}.html", wait_until="networkidle")
        if width == WIDTHS[0]:
            paint, total = page.evaluate(PAINT), sum(loaded)
            assert total <= MOST, f"{name}: {total} bytes"
            if (report := kept("figures.jsonl")) is not None:
                with report.open("a") as f:
                    f.write(json.dumps({"page": name, "bytes": total, "largest paint, ms": round(paint)}) + "\n")
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{name} at {width} px: {wide} px too wide"
        if (shot := kept(f"{name}-{width}.png")) is not None:
            page.screenshot(path=shot)
        page.add_style_tag(content="*, ::before, ::after { transition: none !important }")  # colours change at once
        for theme in ("light", "dark") if width == WIDTHS[1] else ("light",):
            page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
            done = axe.Axe().run(page, options={"resultTypes": ["violations"], "preload": False})
            serious = [
                f"{rule['id']}: {rule['nodes'][0]['html'][:160]} ({len(rule['nodes'])})"
                for rule in done.response["violations"]
                if rule["impact"] in ("serious", "critical")
            ]
            assert not serious, f"{name}, {width} px, {theme}"
            if theme == "dark" and (shot := kept(f"{name}-dark.png")) is not None:
                page.screenshot(path=shot)
        page.close()
    assert not faults, name
    assert not [url for url in requests if not url.startswith((site, "data:", "blob:"))], name


@pytest.mark.parametrize("name", SHORT)
def test_a_page_is_quiet_stays_at_home_fits_and_can_be_read_by_everybody(browser, site, name):
    look(browser, site, name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in chapters() if name not in SHORT])
def test_so_does_every_other_page(browser, site, name):
    look(browser, site, name)


def test_a_reader_chooses_a_still_sorts_a_table_and_opens_a_solution(browser, site):
    page = browser.new_page()
    page.goto(f"{site}/08_explore.html", wait_until="networkidle")
    box = page.locator(".abd-frames").first

    def shown():
        return [div.is_visible() for div in box.locator(":scope > div").all()]

    assert shown().count(True) == 1 and shown()[0]
    box.locator("label").nth(1).click()
    assert shown().count(True) == 1 and shown()[1]
    solution = page.get_by_text("Look at the vermilion bars")
    assert not solution.is_visible()
    page.locator("summary", has_text="Exercise").click()
    assert solution.is_visible()

    page.goto(f"{site}/04_results.html", wait_until="networkidle")
    table = page.locator("table.dataframe", has=page.locator("button.sort")).first

    def cells():
        return [row.locator("td, th").nth(column).inner_text() for row in table.locator("tbody tr").all()]

    button = table.locator("button.sort").last
    column = button.evaluate("button => button.closest('th').cellIndex")
    button.focus()
    page.keyboard.press("Enter")
    up = cells()
    page.keyboard.press("Enter")
    down = cells()

    def first(text):
        found = re.match(r"[-+]?\d+\.?\d*", text)
        return (0, float(found[0]), "") if found else (1, 0, text.lower())

    assert sorted(up) != up or sorted(down) != down
    assert [first(cell) for cell in up] == sorted(map(first, up))
    assert [first(cell) for cell in down] == sorted(map(first, up), reverse=True)
    page.close()


def test_formulas_are_set_without_a_network(browser, site):
    context = browser.new_context(offline=False)
    page = context.new_page()
    page.route(re.compile(r"^(?!http://127\.0\.0\.1).*"), lambda route: route.abort())
    page.goto(f"{site}/02_adversary.html", wait_until="networkidle")
    page.wait_for_selector("mjx-container")
    assert page.locator("mjx-container").count() >= 4
    context.close()


# --- JupyterLab

SMOKE = {"poison_epochs": 1, "limit": 256, "steps": 2, "epochs": 1}
# Chapter -> the control that is moved, and which of the pictures it changes.
MOVED = {
    "08_explore": ("size, px", 1),
    "01_poison": ("size, px", 1),
    "02_adversary": ("amount, %", 1),
    "03_defend": ("size, px", 1),
    "06_similarity": ("view", 0),
}


TOKEN = "only-on-this-machine"


def api(address: str, path: str, method: str = "GET") -> Any:
    """An answer of JupyterLab's server."""
    headers = {"Authorization": f"token {TOKEN}"}
    return urllib.request.urlopen(
        urllib.request.Request(f"{address}/api/{path}", method=method, headers=headers), timeout=9
    )


def cleared(name: str, path: Path) -> None:
    """A chapter without outputs, at smoke size unless finished runs are given (`ABD_LAB_RUNS`)."""
    notebook = nbformat.read(ROOT / "book" / f"{name}.ipynb", as_version=4)
    small = {} if "ABD_LAB_RUNS" in os.environ else SMOKE
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if "parameters" in cell.metadata.get("tags", []):
                own = [f"{key} = {value!r}" for key, value in small.items() if f"\n{key}: " in cell.source]
                cell.source = "\n".join([cell.source, *own])
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, float]]:
    """JupyterLab on a folder with the chapters in it, and when it was started; all share the runs."""
    folder = tmp_path_factory.mktemp("lab")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name in MOVED:
        cleared(name, folder / f"{name}.ipynb")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ABD_RUNS": os.environ.get("ABD_LAB_RUNS", str(folder / "runs")),
    }
    environment.pop("ABD_STATIC", None)
    options = [
        f"--port={port}",
        "--no-browser",
        f"--IdentityProvider.token={TOKEN}",
        "--ServerApp.port_retries=0",
        "--allow-root",
    ]
    log, start = (folder / "lab.log").open("w"), time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options], cwd=folder, env=environment, stdout=log, stderr=log
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            api(address, "").close()
            break
        except OSError:
            time.sleep(0.25)
    yield address, start
    server.terminate()
    server.wait(20)


@pytest.mark.long
@pytest.mark.parametrize("name", MOVED)
def test_in_jupyterlab_a_control_is_moved_and_the_picture_changes(browser, lab, name):
    address, start = lab
    label, place = MOVED[name]
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset&token={TOKEN}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    page.locator(".jp-StatusBar-Widget", has_text="Idle").wait_for(timeout=120_000)  # what runs before that is lost
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    pictures = page.locator(".jp-OutputArea .abd-look").first
    pictures.wait_for(state="attached", timeout=480_000)  # Lab shows the last cell: the first outputs are above
    changing = pictures.locator("img").nth(place)
    before = changing.get_attribute("src")
    if label == "view":
        page.locator(".widget-dropdown", has_text=label).locator("select").select_option("perturbed")
    else:
        slider = page.locator(".widget-slider", has_text=label).locator(".noUi-handle")
        slider.scroll_into_view_if_needed()
        slider.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight" if label == "size, px" else "ArrowLeft")
    changed = "([place, before]) => document.querySelectorAll('.jp-OutputArea .abd-look img')[place].src !== before"
    page.wait_for_function(changed, arg=[place, before], timeout=240_000)
    assert changing.get_attribute("src") != before
    if (shot := kept(f"lab-{name}.png")) is not None:
        page.screenshot(path=shot)
        print(f"{name}: from starting JupyterLab to the changed picture: {time.perf_counter() - start:.1f} s")
    page.close()
    with api(address, "kernels") as answer:
        kernels = json.load(answer)
    for kernel in kernels:  # the next chapter has the machine for itself
        api(address, f"kernels/{kernel['id']}", method="DELETE").close()
