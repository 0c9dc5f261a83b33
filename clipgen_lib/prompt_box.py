"""The prompt box: fields and buttons in a notebook, images that appear while they are generated, and a gallery of them.

In: a `TextToImage`. Out: a widget; its `generate` is what the button does, with or without a browser that shows it. A saved
image tells how it was made, and `read_image` reads that. This is the only module that needs ipywidgets.
"""

import hashlib
import html
import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import ipywidgets as widgets
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .config import SampleConfig, from_dict
from .data import shapes
from .data.images import crop, load_image, png, to_arrays, to_float
from .runtime.checkpoints import module_hash
from .runtime.runs import ClipgenError, Run, open_run, reading, shortened, write_atomic
from .text_to_image import TextToImage

WIDTH = 256  # pixels that an image is enlarged to, about; the page scales it
MOST_KEPT = 64  # images in the gallery
SMALL = "font-size: 12px; line-height: 1.3; color: var(--jp-ui-font-color1)"
LABELS = {"seed": "seed", "n": "images", "guidance": "guidance", "guidance_schedule": "schedule"}
LABELS |= {"temperature": "temperature", "top_k": "top-k", "top_p": "top-p", "candidates": "rerank"}
LIMITS = {"seed": (0, 2**31 - 1), "n": (1, 64), "candidates": (1, 64)}  # the generator checks the others
WORDS = re.compile(r"\w+|[^\x00-\x7f\s]")  # in lower case; an emoji is one


class Made(NamedTuple):
    """An image, and what makes it again: `generator(prompt, seed=seed, **settings)[0, 0]`."""

    image: torch.Tensor  # (3, H, W) in [-1, 1]
    prompt: str | torch.Tensor  # a text, an image (1, 3, H, W) or, of a file, its CLIP embedding (1, D)
    seed: int
    settings: dict  # all fields of SampleConfig
    weights: dict[str, str] = {}  # of a file: hashes of the generator's and of its CLIP's


def read_image(path: str | Path) -> Made:
    """An image that the prompt box has saved. Raises ClipgenError: another file, or a damaged one."""
    path = Path(path)
    with reading(path, "save one first", "give one that it has saved", "was not saved by a prompt box"):
        with Image.open(path, formats=["PNG"]) as opened:
            size, facts = min(opened.size), json.loads(opened.info["clipgen"])
        prompt = facts["prompt"] if isinstance(facts["prompt"], str) else torch.tensor(facts["prompt"])
        settings = asdict(from_dict(SampleConfig, facts["settings"]))
        return Made(to_float(load_image(path, size)), prompt, int(facts["seed"]), settings, facts["weights"])


class PromptBox(widgets.VBox):
    """Prompt, seed and settings of a generator, buttons, the images with their CLIP scores, and a gallery of earlier ones.

    Every field starts at the generator's setting. An uploaded image is varied in place of the text. The button, or Enter,
    generates in `worker`, a thread, so that the stop button is heard. What is wrong appears as a sentence in the box, and the
    images before stay. Images are saved in the run's folder generated/.
    """

    def __init__(self, generator: TextToImage, prompt: str = "", n: int = 8, seed: int = 0, run: Run | None = None):
        self.generator, self.run = generator, run or open_run("quickstart")
        self.worker, self._stopped = Thread(), Event()
        self.image: torch.Tensor | None = None  # (1, 3, H, W) in [-1, 1], to be varied
        self.images: torch.Tensor | None = None  # (N, 3, H, W) in [-1, 1], the last finished ones
        values = vars(generator.settings) | {"seed": seed, "n": n}
        self.fields = {name: _field(label, values[name]) for name, label in LABELS.items()}
        self.prompt = widgets.Text(prompt, placeholder="what to generate", layout=widgets.Layout(flex="1 1 auto"))
        self.button = widgets.Button(description="Generate", button_style="primary")
        self.stop = widgets.Button(description="Stop", disabled=True)
        self.bar = widgets.FloatProgress(0.0, min=0.0, max=1.0, layout=widgets.Layout(width="100%"))
        self.message = widgets.HTML()
        self.tiles = widgets.GridBox(layout=_grid(240))
        self.upload = widgets.FileUpload(accept="image/*", description="Image", tooltip="an image to vary")
        self.thumbnail = widgets.Image(layout=widgets.Layout(height="28px", width="28px"))
        self.clear = widgets.Button(description="Clear image")
        self.gallery = widgets.GridBox(layout=_grid(260, max_height="360px", overflow="auto", margin="8px 0"))
        self.tiles.add_class("clipgen-tiles"), self.gallery.add_class("clipgen-gallery")
        self._vary(None)
        self.upload.observe(self._take, "value")
        self.clear.on_click(lambda _: self._vary(None))
        self.button.on_click(self._start)
        self.stop.on_click(lambda _: self._stopped.set())
        self.prompt.on_msg(lambda _, content, __: content.get("event") == "submit" and self._start())  # Enter
        line = widgets.HBox(list(self.fields.values()), layout=widgets.Layout(flex_flow="row wrap"))
        top = widgets.HBox([self.prompt, self.thumbnail, self.clear, self.upload, self.button, self.stop])
        super().__init__([top, line, self.bar, self.message, self.tiles, self.gallery])

    def _start(self, *_: object) -> None:
        if not self.button.disabled:
            self.button.disabled, self.worker = True, Thread(target=self.generate, daemon=True)
            self.worker.start()

    def generate(self) -> None:
        """Generate what the fields say, in this thread."""
        before = [[part.value for part in tile.children] for tile in self.tiles.children]
        self._stopped.clear()
        self.button.disabled, self.stop.disabled, self.bar.value, self.bar.bar_style = True, False, 0.0, ""
        try:
            with self._told(before):
                self._generate()
        finally:
            self.bar.description, self.button.disabled, self.stop.disabled = "", False, True

    def _generate(self) -> None:
        prompt, values = self.image, {name: field.value for name, field in self.fields.items()}
        if prompt is None and not (prompt := self.prompt.value.strip()):
            raise ClipgenError("there is no prompt: write what to generate")
        for name, (low, high) in LIMITS.items():
            if not low <= values[name] <= high:
                raise ClipgenError(f"{LABELS[name]} is {values[name]}: give {low} to {high}")
        self.message.value = html.escape(self._notice(prompt)) if isinstance(prompt, str) else ""
        start, scale = time.monotonic(), max(1, WIDTH // self.generator.vqgan.config.image_size)
        asked = prompt if isinstance(prompt, str) else self.generator.embed(prompt)  # once, as a file has it
        for preview in self.generator.generate_progressively(asked, **values):
            if self._stopped.is_set():
                raise ClipgenError("stopped: the images before are back")
            self._fill([[png(image, scale), ""] for image in preview.images])
            self.bar.description = f"{(time.monotonic() - start) * (1 / preview.share - 1):.0f} s left"
            self.bar.value = preview.share
        self.images, self.bar.bar_style = preview.images, "success"
        for tile, score in zip(self.tiles.children, self.generator.similarity(self.images, asked), strict=True):
            tile.children[1].value = f"CLIP {score:.2f}"
        self._keep(prompt, **values)

    @contextmanager
    def _told(self, before: list[list] | None = None) -> Iterator[None]:
        """Errors of the block as sentences in the box, with the tiles `before`; a bug is raised as well."""
        self.message.value = ""
        try:
            yield
        except BaseException as error:  # ipywidgets hides the errors of a handler, an interrupted kernel among them
            if before is not None:
                self._fill(before)
                self.bar.bar_style = "danger"
            kind = "" if isinstance(error, ClipgenError) else f"{type(error).__name__}: "
            self.message.value = html.escape(f"{kind}{error}")
            if kind:
                raise

    def _take(self, change: dict) -> None:
        """An uploaded file becomes the image to vary."""
        size, self.upload.value = self.generator.vqgan.config.image_size, ()  # so that the same one may come again
        for file in change["new"]:
            with self._told():
                self._vary(None)
                self._vary(to_float(crop(load_image(bytes(file["content"]), size, file["name"]), size))[None])

    def _vary(self, image: torch.Tensor | None) -> None:
        """Take an image (1, 3, H, W) in place of the text, or with None the text."""
        self.image, self.prompt.disabled = image, image is not None
        self.thumbnail.value = b"" if image is None else png(image[0])
        self.thumbnail.layout.display = self.clear.layout.display = "none" if image is None else None

    def _keep(self, prompt: str | torch.Tensor, seed: int, n: int, **values: float | str) -> None:
        """Put the new images into the gallery, the newest first."""
        settings = asdict(replace(self.generator.settings, **values))
        made = [Made(image.cpu(), prompt, seed + j, settings) for j, image in enumerate(self.images)]
        kept = [*map(self._card, made), *self.gallery.children]
        self.gallery.children = kept[:MOST_KEPT]
        for card in kept[MOST_KEPT:]:
            _close(card)

    def _card(self, made: Made) -> widgets.HBox:
        """An image of the gallery, how it was made, and its buttons."""
        title = made.prompt if isinstance(made.prompt, str) else "variation of an image"
        values = {**made.settings, "seed": made.seed}
        settings = ", ".join(f"{label} {values[name]}" for name, label in LABELS.items() if name in values)
        use, save = (widgets.Button(description=d, layout=widgets.Layout(width="64px")) for d in ("Use", "Save"))
        use.on_click(lambda _: self._use(made))
        save.on_click(lambda _: self._save(made, title))
        told = f'<div style="{SMALL}" title="{html.escape(title)}"><b>{html.escape(shortened(title, 60))}</b><br>{settings}'
        image = widgets.Image(value=png(made.image), layout=widgets.Layout(width="96px", height="96px"))
        return widgets.HBox([image, widgets.VBox([widgets.HTML(told + "</div>"), widgets.HBox([use, save])])])

    def _use(self, made: Made) -> None:
        """Prompt, seed and settings of an image back into the fields."""
        self._vary(None if isinstance(made.prompt, str) else made.prompt)
        self.prompt.value = made.prompt if isinstance(made.prompt, str) else self.prompt.value
        for name in self.fields.keys() - {"n"}:
            self.fields[name].value = {**made.settings, "seed": made.seed}[name]

    def _save(self, made: Made, title: str) -> None:
        with self._told():
            weights = {"generator": module_hash(self.generator), "clip": self.generator.clip.weights_hash}
            prompt = title if isinstance(made.prompt, str) else self.generator.embed(made.prompt).tolist()
            info, stream = PngInfo(), io.BytesIO()
            facts = made._asdict() | {"image": None, "prompt": prompt, "weights": weights}
            info.add_itxt("clipgen", json.dumps(facts))
            Image.fromarray(to_arrays(made.image[None])[0]).save(stream, "PNG", pnginfo=info)
            words = re.sub(r"[^a-z0-9]+", "-", title.lower())[:60].strip("-") or "image"
            name = f"{words}-{made.seed}-{hashlib.sha256(stream.getvalue()).hexdigest()[:8]}.png"
            write_atomic(self.run.file("generated", name), stream.getvalue())
            self.message.value = html.escape(f"saved as {self.run.name}/generated/{name}")

    def _notice(self, prompt: str) -> str:
        """What of a prompt CLIP does not read, or does not know where its words are known; empty where all is well."""
        known = _words_of_shapes() if self.generator.clip_source["name"] == "shapes" else None
        unknown = [word for word in dict.fromkeys(WORDS.findall(prompt.lower())) if known and word not in known]
        notices = ["CLIP reads only the beginning of so long a prompt."] * self.generator.clip.is_truncated(prompt)
        return " ".join(notices + [f"This CLIP knows shapes and has never read: {', '.join(unknown)}."] * bool(unknown))

    def _fill(self, tiles: list[list]) -> None:
        """Show images, as PNG files, over their labels."""
        if len(self.tiles.children) != len(tiles):
            wide = widgets.Layout(width="100%")
            empty = ([widgets.Image(format="png", layout=wide), widgets.Label()] for _ in tiles)
            self.tiles.children = [widgets.VBox(parts, layout=widgets.Layout(align_items="center")) for parts in empty]
        for tile, values in zip(self.tiles.children, tiles, strict=True):
            tile.children[0].value, tile.children[1].value = values


@cache
def _words_of_shapes() -> set[str]:
    """The words of the Shapes world's captions."""
    texts = (text for i in range(50) for text in shapes.captions(shapes.scene_at(0, i, wild=True), 20))
    return {word for text in texts for word in WORDS.findall(text)}


def _close(widget: widgets.Widget) -> None:
    """A widget and those in it leave the page and the memory."""
    for part in getattr(widget, "children", ()):
        _close(part)
    widget.close()


def _grid(width: int, **layout: str) -> widgets.Layout:
    """As many columns of at least that many pixels as the page has room for."""
    return widgets.Layout(grid_template_columns=f"repeat(auto-fill, minmax({width}px, 1fr))", grid_gap="8px", **layout)


def _field(label: str, value: float | str) -> widgets.Widget:
    kind = {int: widgets.IntText, float: widgets.FloatText, str: widgets.Dropdown}[type(value)]
    options = {"options": ["constant", "linear", "cosine"]} if kind is widgets.Dropdown else {}
    layout, style = widgets.Layout(flex="1 1 100px", width="auto"), {"description_width": "auto"}
    return kind(value=value, description=label, layout=layout, style=style, **options)
