import datetime
import io
import re
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch
from conftest import saved
from PIL import Image

from clipgen_lib.cli import tidied
from clipgen_lib.data.images import from_arrays, to_arrays
from clipgen_lib.prompt_box import PromptBox, read_image
from clipgen_lib.runtime.runs import ClipgenError, open_run


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


def upload(box, content, name="cat.png"):
    file = {"name": name, "type": "image/png", "size": len(content), "content": content}
    box.upload.value = ({**file, "last_modified": datetime.datetime.now(datetime.UTC)},)


@pytest.fixture
def photo():
    """An image of the generator's size as a file, and in [-1, 1]."""
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return saved(Image.fromarray(array), "PNG"), from_arrays(array[None])


def test_an_uploaded_image_is_varied_until_it_is_cleared(generator, photo):
    box, (content, image) = PromptBox(generator, "a red circle", n=2, seed=5), photo
    for name, wrong in (("cut.png", content[:200]), ("note.png", b"no image")):
        upload(box, wrong, name)
        assert name in box.message.value and box.image is None and not box.prompt.disabled
    upload(box, content)
    assert box.message.value == "" and box.prompt.disabled and box.upload.value == ()
    press(box)
    assert torch.equal(box.images, generator(image, n=2, seed=5)[0])
    box.clear.click()
    press(box)
    assert torch.equal(box.images, generator("a red circle", n=2, seed=5)[0])


def buttons(box, row):
    """The buttons Use and Save of an image in the gallery, and what is said of it."""
    _, beside = box.gallery.children[row].children
    return *beside.children[1].children, beside.children[0].value


def test_the_gallery_brings_back_what_made_an_image(generator, photo):
    box = PromptBox(generator, "a red <circle>", n=2, seed=5)
    press(box, guidance=1.5, guidance_schedule="linear")
    upload(box, photo[0])
    press(box, seed=8, n=62, guidance=3.0)
    assert len(box.gallery.children) == 64 and "seed 69," in buttons(box, 61)[2]
    use, _, text = buttons(box, 63)
    assert "a red &lt;circle&gt;" in text and "seed 6, guidance 1.5, schedule linear" in text
    use.click()
    assert (box.prompt.value, box.fields["seed"].value, box.fields["guidance"].value) == ("a red <circle>", 6, 1.5)
    press(box, n=1)
    assert torch.equal(box.images, generator("a red <circle>", 1, 6, guidance=1.5, guidance_schedule="linear")[0])
    assert len(box.gallery.children) == 64 and "seed 5," in buttons(box, 63)[2]
    assert use.comm is None and box.prompt.comm and buttons(box, 63)[0].comm, "the one that left the gallery is closed"
    buttons(box, 1)[0].click()
    assert box.prompt.disabled and torch.equal(box.image, photo[1])


def test_a_saved_image_can_be_made_again(generator, photo, tmp_path):
    box = PromptBox(generator, "a red circle", n=2, seed=5, run=open_run("quickstart", tmp_path))
    press(box, top_k=7, candidates=2)
    upload(box, photo[0])
    press(box)
    for row in (1, 3):  # a variation, a text
        buttons(box, row)[1].click()
    names = sorted(path.name for path in (tmp_path / "quickstart" / "generated").iterdir())
    assert [name[:-13] for name in names] == ["a-red-circle-6", "variation-of-an-image-6"]
    assert f"saved as quickstart/generated/{names[0]}" in box.message.value
    weights = set()
    for name, prompt in zip(names, ("a red circle", photo[1]), strict=True):
        made = read_image(tmp_path / "quickstart" / "generated" / name)
        assert (
            made.prompt == prompt if isinstance(prompt, str) else torch.equal(made.prompt, generator.embed(box.image))
        )
        again = generator(made.prompt, seed=made.seed, **made.settings)[0]
        assert np.array_equal(to_arrays(again), to_arrays(made.image[None])) and made.settings["top_k"] == 7
        weights |= set(made.weights.items())
    assert dict(weights).keys() == {"generator", "clip"} and len(weights) == 2
    for content in (photo[0], b"no image"):
        (tmp_path / "other.png").write_bytes(content)
        with pytest.raises(ClipgenError, match="other.png was not saved by a prompt box"):
            read_image(str(tmp_path / "other.png"))
    (tmp_path / "quickstart" / "published").touch()
    buttons(box, 0)[1].click()
    assert "is a published result" in box.message.value and torch.equal(
        box.images, generator(photo[1], 2, 5, top_k=7, candidates=2)[0]
    )


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
