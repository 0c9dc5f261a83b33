"""The notebooks in a real browser: JupyterLab as README starts it and a headless Chromium, to images that are there.

Needs playwright (extra `test`) and a Chromium that the system has; it is skipped, and says so, where either is not.
CLIPGEN_BROWSER names the browser's file.
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
from contextlib import suppress
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from clipgen_lib.runtime.runs import write_json
from clipgen_lib.text_to_image import PRETRAINED

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture
def page():
    """An empty page of a headless Chromium."""
    browser = os.environ.get("CLIPGEN_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("the quickstart was not tried in a browser: install chromium, or name one by CLIPGEN_BROWSER")
    why = "the quickstart was not tried in a browser: install playwright"
    sync_api = pytest.importorskip("playwright.sync_api", reason=why)
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])  # as root there is none
        page = opened.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(10 * 60_000)  # milliseconds
        yield page
        opened.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`lab(name)`: the address of a notebook in a JupyterLab that README's command has started, with no settings of the user's.

    The project is a copy of its notebooks; `quickstart.ipynb` is the quickstart without its outputs.
    """
    base = tmp_path_factory.mktemp("lab")
    project, settings = base / "project", base / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab"
    shutil.copytree(NOTEBOOKS[0].parent, project / "notebooks")
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, project / "notebooks" / "quickstart.ipynb")
    write_json(settings / "notebook-extension/tracker.jupyterlab-settings", {"windowingMode": "none"})
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    write_json(settings / "apputils-extension/notification.jupyterlab-settings", quiet)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --allow-root --port={port} --ServerApp.port_retries=0 --IdentityProvider.token=quickstart"
    command = [Path(sys.executable).with_name("jupyter"), "lab", "notebooks", "--ip=127.0.0.1", *options.split()]
    places = "JUPYTER_CONFIG_DIR JUPYTER_RUNTIME_DIR JUPYTERLAB_WORKSPACES_DIR JUPYTERLAB_SETTINGS_DIR CLIPGEN_RESULTS"
    environment = os.environ | {place: str(base / place) for place in places.split()}
    with open(base / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):  # half seconds
            assert server.poll() is None, (base / "server.log").read_text()
            with suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
                break
            time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab did not start: {(base / 'server.log').read_text()}")
        yield lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?reset&token=quickstart"
    finally:
        server.terminate()  # and with it its kernels
        server.wait(timeout=30)


FIRST_IMAGE, GALLERY = ".clipgen-tiles img.widget-image", ".clipgen-gallery > *"
BYTES = "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"


def first_image(page):
    """The pixels of the box's first image, as the browser has them."""
    return np.asarray(Image.open(io.BytesIO(bytes(page.locator(FIRST_IMAGE).first.evaluate(BYTES)))).convert("RGB"))


def publish(page):
    """The box as README and the quickstart show it, in 256 colours."""
    page.set_viewport_size({"width": 1280, "height": 1040})
    page.get_by_placeholder("what to generate").evaluate("field => field.closest('.jp-Cell').scrollIntoView()")
    page.wait_for_timeout(1_000)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(ROOT / "results" / "reference" / "figures" / "prompt_box.png", optimize=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_image_of_a_saved_notebook_is_there(page, lab, path):
    cells = nbformat.read(path, as_version=4).cells
    saved = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    page.goto(lab(path.name))
    texts = sum(cell.cell_type == "markdown" for cell in cells)
    for selector, number in ((".jp-Notebook .jp-Cell", len(cells)), (".jp-MarkdownOutput", texts)):
        page.wait_for_function(f"document.querySelectorAll('{selector}').length === {number}")
    images = "[...document.querySelectorAll('.jp-Notebook img')]"
    page.wait_for_function(f"{images}.length >= {saved} && {images}.every(image => image.complete)")
    widths = page.evaluate(f"{images}.map(image => [image.naturalWidth, image.getAttribute('src').slice(0, 60)])")
    assert len(widths) == saved and all(width > 0 for width, _ in widths), widths


def test_a_prompt_typed_in_a_browser_gives_a_new_image(page, lab):
    if not (PRETRAINED["shapes"] / "model.safetensors").is_file():
        pytest.skip("the quickstart was not tried in a browser: data/shapes_generator holds no weights")
    page.goto(lab("quickstart.ipynb"))
    page.get_by_text(re.compile(r"\| Idle$")).wait_for()  # without a kernel JupyterLab runs nothing
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"
    page.wait_for_function(f"{prompts}.every(text => /\\d/.test(text))")
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
    field.fill("a large green heart")
    field.press("Enter")
    page.wait_for_function(f"document.querySelector('{FIRST_IMAGE}').src !== '{source}'")
    page.locator("button:not([disabled])", has_text="Generate").wait_for()
    page.get_by_text(re.compile(r"^CLIP -?0\.\d\d$")).nth(7).wait_for()
    after = first_image(page)
    assert after.shape == before.shape and np.abs(after.astype(int) - before).mean() > 1 and after.std() > 5
    assert page.evaluate("new Set(window.seen).size") > 3, "images appear while they are generated"

    def fill(label, value):
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).press("Enter")

    fill("temperature", "0")
    button.click()
    page.get_by_text("temperature is 0.0: use a value above 0").wait_for()
    assert np.array_equal(first_image(page), after)

    page.get_by_role("button", name="Save", exact=True).nth(1).click()
    page.get_by_text(re.compile(r"^saved as quickstart/generated/a-large-green-heart-1-\w{8}\.png$")).wait_for()
    fill("temperature", "1")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Image (0)").click()
    file = io.BytesIO()
    Image.fromarray(after).save(file, "PNG")
    chooser.value.set_files([{"name": "heart.png", "mimeType": "image/png", "buffer": file.getvalue()}])
    page.get_by_role("button", name="Clear image").wait_for()
    fill("images", "4")
    button.click()
    page.locator(GALLERY).nth(19).wait_for()
    varied = first_image(page)
    assert page.get_by_text("variation of an image").count() == 4 and not np.array_equal(varied, after)
    if os.environ.get("CLIPGEN_PUBLISH") == "1":
        publish(page)
    page.get_by_role("button", name="Use", exact=True).nth(5).click()  # the second green heart
    seed = page.get_by_label("seed", exact=True).element_handle()
    page.wait_for_function("field => field.value === '1'", arg=seed)
    assert field.input_value() == "a large green heart" and field.is_enabled()

    fill("images", "64"), fill("rerank", "64")
    button.click()
    page.locator(FIRST_IMAGE).nth(63).wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("stopped: the images before are back").wait_for()
    assert page.locator(FIRST_IMAGE).count() == 4 and np.array_equal(first_image(page), varied)
