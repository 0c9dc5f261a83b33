import io
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from clipgen_lib.cli import tidied
from clipgen_lib.config import SampleConfig
from clipgen_lib.data.images import to_arrays
from clipgen_lib.prompt_box import PromptBox
from clipgen_lib.text_to_image import TextToImage


@pytest.fixture
def generator(vqgan, transformer, clip):
    settings = SampleConfig(guidance=2.0, top_k=20, top_p=0.9)
    return TextToImage.from_parts(vqgan, transformer, clip, {"name": "shapes", "pretrained": None}, settings)


def shown(box):
    """The images in the box as (N, H, W, 3) uint8."""
    tiles = [np.asarray(Image.open(io.BytesIO(tile.children[0].value))) for tile in box.tiles.children]
    return np.stack(tiles)


def test_the_button_generates_what_the_fields_say(generator):
    box = PromptBox(generator, "a red circle", n=2, seed=5)
    assert (box.guidance.value, box.temperature.value, box.top_k.value, box.candidates.value) == (2.0, 1.0, 20, 1)
    assert box.tiles.children == () and box.images is None
    box.button.click()
    plain = generator("a red circle", n=2, seed=5)[0]
    assert torch.equal(box.images, plain) and box.bar.value == 1 and not box.button.disabled
    assert np.array_equal(shown(box)[:, ::2, ::2], to_arrays(plain)), "each pixel a square of two"
    scores = generator.similarity(plain, "a red circle")
    assert [tile.children[1].value for tile in box.tiles.children] == [f"CLIP {score:.2f}" for score in scores]

    box.prompt.value, box.seed.value, box.n.value = " a blue star ", 8, 3
    box.guidance.value, box.temperature.value, box.top_k.value, box.candidates.value = 1.5, 0.8, 7, 2
    box.button.click()
    chosen = {"guidance": 1.5, "temperature": 0.8, "top_k": 7, "candidates": 2}
    assert torch.equal(box.images, generator("a blue star", n=3, seed=8, **chosen)[0]) and len(shown(box)) == 3


def test_images_appear_while_they_are_generated(generator):
    box, seen = PromptBox(generator, "a red circle", n=1), []
    box.bar.observe(lambda change: seen.append((change.new, shown(box)[0, ::2, ::2], box.button.disabled)), "value")
    box.generate()
    assert [round(8 * share) for share, _, _ in seen] == list(range(1, 9)) and all(disabled for _, _, disabled in seen)
    for row, (_, image, _) in enumerate(seen, start=1):
        grey = (image == 128).all(axis=(1, 2))
        assert grey[8 * row :].all() and not grey[: 8 * row].any()


def test_what_is_wrong_appears_as_a_sentence(generator):
    box = PromptBox(generator, "a red circle", n=1)
    box.generate()
    before = shown(box)
    box.temperature.value = 0
    box.generate()
    assert "temperature is 0.0: use a value above 0" in box.message.value
    assert np.array_equal(shown(box), before) and not box.button.disabled
    box.temperature.value, box.prompt.value = 1, "  "
    box.generate()
    assert "there is no prompt: write what to generate" in box.message.value
    box.prompt.value = "a red circle " * 40
    box.generate()
    assert "only the beginning" in box.message.value and box.bar.value == 1
    box.prompt.value = "a red circle"
    box.generate()
    assert "beginning" not in box.message.value
    generator.vqgan.decode = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        box.generate()
    assert "ZeroDivisionError: division by zero" in box.message.value and not box.button.disabled


def test_a_saved_notebook_has_neither_widgets_nor_animations():
    view = {"text/plain": "PromptBox()", "application/vnd.jupyter.widget-view+json": {"model_id": "0"}}
    kinds = [{"text/plain": "1"}, view, {"text/plain": "<Image>", "image/gif": "R0"}, {"image/png": "iV"}]
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", data) for data in kinds])
    cell.outputs.append(nbformat.v4.new_output("stream", text="said"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("x"), cell], metadata={"widgets": {}})
    saved = tidied(notebook)
    assert [o.get("data") for o in saved.cells[1].outputs] == [
        kinds[0],
        kinds[3],
        None,
    ] and "widgets" not in saved.metadata


def test_sampling_does_without_widgets():
    code = "import sys, clipgen_lib.sample, clipgen_lib.cli; sys.exit('ipywidgets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
