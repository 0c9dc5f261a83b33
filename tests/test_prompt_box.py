import io
import re
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from clipgen_lib.cli import tidied
from clipgen_lib.data.images import to_arrays
from clipgen_lib.prompt_box import PromptBox


def shown(box):
    """The images in the box as (N, H, W, 3) uint8."""
    tiles = [np.asarray(Image.open(io.BytesIO(tile.children[0].value))) for tile in box.tiles.children]
    return np.stack(tiles)


def press(box, **values):
    """Fill fields, press the button and wait for what it has started."""
    for name, value in values.items():
        (box.prompt if name == "prompt" else box.fields[name]).value = value
    box.button.click()
    box.worker.join()
    assert not box.button.disabled and box.stop.disabled


def test_the_button_generates_what_the_fields_say(generator):
    generator.settings = replace(generator.settings, top_k=20)
    box = PromptBox(generator, "a red circle", n=2, seed=5)
    settings = vars(generator.settings) | {"seed": 5, "n": 2}
    assert len(box.fields) == 8 and all(field.value == settings[name] for name, field in box.fields.items())
    assert box.tiles.children == () and box.images is None
    press(box)
    plain = generator("a red circle", n=2, seed=5)[0]
    assert torch.equal(box.images, plain) and box.bar.value == 1 and not box.bar.description
    assert np.array_equal(shown(box)[:, ::4, ::4], to_arrays(plain)), "each pixel a square of four"
    scores = generator.similarity(plain, "a red circle")
    assert [tile.children[1].value for tile in box.tiles.children] == [f"CLIP {score:.2f}" for score in scores]

    chosen = {"guidance": 1.5, "guidance_schedule": "linear", "temperature": 0.8, "top_k": 7}
    chosen |= {"top_p": 0.8, "candidates": 2}
    press(box, prompt=" a blue star ", seed=8, n=3, **chosen)
    assert torch.equal(box.images, generator("a blue star", n=3, seed=8, **chosen)[0]) and len(shown(box)) == 3


def test_images_appear_while_they_are_generated(generator):
    box, seen = PromptBox(generator, "a red circle", n=1), []
    box.bar.observe(lambda change: seen.append((change.new, shown(box)[0, ::4, ::4], box.button.disabled)), "value")
    box.bar.observe(lambda change: seen.append(change.new), "description")
    box.generate()
    left, seen = [x for x in seen if isinstance(x, str)], [x for x in seen if not isinstance(x, str)]
    assert left[-1] == "" and all(re.fullmatch(r"\d+ s left", x) for x in left[:-1])
    assert [round(8 * share) for share, _, _ in seen] == list(range(1, 9)) and all(disabled for _, _, disabled in seen)
    for row, (_, image, _) in enumerate(seen, start=1):
        grey = (image == 128).all(axis=(1, 2))
        assert grey[8 * row :].all() and not grey[: 8 * row].any()


def test_stop_brings_back_the_images_before(generator):
    box = PromptBox(generator, "a red circle", n=1)
    box.button.click(), box.button.click()  # the second is too early, and does nothing
    box.worker.join()
    before, images = shown(box), box.images
    box.bar.observe(lambda change: 0.4 < change.new < 0.6 and box.stop.click(), "value")
    press(box, prompt="a blue star", n=2)
    assert "stopped" in box.message.value and box.bar.value < 0.7
    assert np.array_equal(shown(box), before) and torch.equal(box.images, images)
    box.bar.unobserve_all()
    press(box)
    assert box.bar.value == 1 and len(shown(box)) == 2 and not torch.equal(box.images[:1], images)


def test_what_is_wrong_appears_as_a_sentence(generator):
    box = PromptBox(generator, "a red circle", n=1)
    press(box)
    before = shown(box)
    for name, wrong, good, sentence in (
        ("temperature", 0, 1, "temperature is 0.0: use a value above 0"),
        ("n", 65, 1, "images is 65: give 1 to 64"),
        ("seed", -1, 0, "seed is -1: give 0 to"),
        ("prompt", "  ", "a red circle", "there is no prompt: write what to generate"),
    ):
        press(box, **{name: wrong})
        assert sentence in box.message.value and np.array_equal(shown(box), before)
        press(box, **{name: good})
        assert box.message.value == ""
    generator.vqgan.decode = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        box.generate()
    assert "ZeroDivisionError: division by zero" in box.message.value and not box.button.disabled
    assert np.array_equal(shown(box), before)


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("there is a Tiny red plus sign, above a rhombus", ""),
        ("three teddy bears", "has never read: three, teddy, bears."),
        ("a red 🧸 emoji", "has never read: 🧸, emoji."),
        ("a red circle " * 40, "only the beginning"),
    ],
)
def test_what_clip_does_not_know_is_said(generator, prompt, said):
    box = PromptBox(generator, prompt, n=1)
    box.generate()
    assert (said in box.message.value if said else not box.message.value) and box.bar.value == 1


def test_a_saved_notebook_has_neither_widgets_nor_animations():
    view = {"text/plain": "PromptBox()", "application/vnd.jupyter.widget-view+json": {"model_id": "0"}}
    kinds = [{"text/plain": "1"}, view, {"text/plain": "<Image>", "image/gif": "R0"}, {"image/png": "iV"}]
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", data) for data in kinds])
    cell.outputs.append(nbformat.v4.new_output("stream", text="said"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("x"), cell], metadata={"widgets": {}})
    saved = tidied(notebook)
    assert [output.get("data") for output in saved.cells[1].outputs] == [kinds[0], kinds[3], None]
    assert "widgets" not in saved.metadata
