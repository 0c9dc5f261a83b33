"""The quickstart in a real browser: JupyterLab and a headless Chromium, from an opened notebook to a new image.

Needs playwright (extra `test`) and a Chromium that the system has; it is skipped, and says so, where either is not.
CLIPGEN_BROWSER names the browser's file; CLIPGEN_SCREENSHOT a PNG file to write the page to.
"""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from clipgen_lib.runtime.runs import write_json
from clipgen_lib.text_to_image import PRETRAINED

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "00_quickstart.ipynb"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MINUTE = 60_000  # milliseconds
PROMPT = "a large green heart"


@pytest.fixture
def page():
    """An empty page of a headless Chromium."""
    browser = os.environ.get("CLIPGEN_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("the quickstart was not tried in a browser: install chromium, or name one by CLIPGEN_BROWSER")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the quickstart was not tried in a browser: install playwright"
    )
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])  # as root there is none
        yield opened.new_page(viewport={"width": 1280, "height": 640})
        opened.close()


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab with nothing but the notebook in it, its outputs taken away, and none of the user's settings."""
    if not (PRETRAINED["shapes"] / "model.safetensors").is_file():
        pytest.skip("the quickstart was not tried in a browser: data/shapes_generator holds no weights")
    root, notebook = tmp_path / "lab", nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (root / "notebooks").mkdir(parents=True)
    nbformat.write(notebook, root / "notebooks" / NOTEBOOK.name)
    write_json(
        tmp_path / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings", {"windowingMode": "none"}
    )
    news = {"fetchNews": "false", "checkForUpdates": False}
    write_json(tmp_path / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings", news)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=quickstart",
        f"--ServerApp.root_dir={root}",
    ]
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "CLIPGEN_RESULTS": "lab/results",
    }
    environment = os.environ | {key: str(tmp_path / folder) for key, folder in folders.items()}
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api", server, tmp_path / "server.log")
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/{NOTEBOOK.name}?token=quickstart"
    finally:
        server.terminate()  # and with it its kernels
        server.wait(timeout=30)


def wait_for(address, server, log, seconds=60):
    for _ in range(2 * seconds):
        assert server.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(address, timeout=5)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()}")


FIRST_IMAGE = ".jp-OutputArea-output img.widget-image"
BYTES = "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"


def first_image(page):
    """The pixels of the box's first image, as the browser has them."""
    return np.asarray(Image.open(io.BytesIO(bytes(page.locator(FIRST_IMAGE).first.evaluate(BYTES)))).convert("RGB"))


def test_a_prompt_typed_in_a_browser_gives_a_new_image(page, lab):
    page.goto(lab)
    page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=MINUTE)  # without a kernel JupyterLab runs nothing
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"
    page.wait_for_function(f"{prompts}.every(text => /\\d/.test(text))", timeout=3 * MINUTE)
    assert page.locator("[data-mime-type$='stderr'], [data-mime-type$='error']").count() == 0

    page.keyboard.press("Control+b")  # the notebook alone, without the list of files
    field, button = page.get_by_placeholder("what to generate"), page.get_by_role("button", name="Generate", exact=True)
    field.evaluate("field => field.closest('.jp-Cell').scrollIntoView()")
    before, source = first_image(page), page.locator(FIRST_IMAGE).first.get_attribute("src")
    assert page.locator(FIRST_IMAGE).count() == 8 and before.std() > 5
    page.evaluate(
        """selector => { window.seen = []; const image = document.querySelector(selector);
        new MutationObserver(() => window.seen.push(image.src)).observe(image, {attributeFilter: ['src']}); }""",
        FIRST_IMAGE,
    )
    field.fill(PROMPT)
    button.click()
    page.wait_for_function(
        "([s, old]) => document.querySelector(s).src !== old", arg=[FIRST_IMAGE, source], timeout=MINUTE
    )
    page.locator("button:not([disabled])", has_text="Generate").wait_for(timeout=MINUTE)
    page.get_by_text(re.compile(r"^CLIP -?0\.\d\d$")).nth(7).wait_for(timeout=MINUTE)
    after = first_image(page)
    assert after.shape == before.shape and np.abs(after.astype(int) - before).mean() > 1 and after.std() > 5
    assert page.evaluate("new Set(window.seen).size") > 3, "images appear while they are generated"
    if target := os.environ.get("CLIPGEN_SCREENSHOT"):
        page.screenshot(path=target)

    temperature = page.get_by_label("temperature")
    temperature.fill("0")
    temperature.press("Enter")
    button.click()
    page.get_by_text("temperature is 0.0: use a value above 0").wait_for(timeout=MINUTE)
    assert np.array_equal(first_image(page), after)
