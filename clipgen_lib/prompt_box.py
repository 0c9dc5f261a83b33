"""The prompt box: fields and buttons in a notebook, and images that appear while they are generated.

In: a `TextToImage`. Out: a widget; its `generate` is what the button does, with or without a browser that shows it.
This is the only module that needs ipywidgets.
"""

import html
import re
import time
from functools import cache
from threading import Event, Thread

import ipywidgets as widgets
import torch

from .data import shapes
from .data.images import png
from .runtime.runs import ClipgenError
from .text_to_image import TextToImage

WIDTH = 256  # pixels that an image is enlarged to, about; the page scales it
LABELS = {"seed": "seed", "n": "images", "guidance": "guidance", "guidance_schedule": "schedule"}
LABELS |= {"temperature": "temperature", "top_k": "top-k", "top_p": "top-p", "candidates": "rerank"}
LIMITS = {"seed": (0, 2**31 - 1), "n": (1, 64), "candidates": (1, 64)}  # the generator checks the others
WORDS = re.compile(r"\w+|[^\x00-\x7f\s]")  # in lower case; an emoji is one


class PromptBox(widgets.VBox):
    """Prompt, seed and settings of a generator, buttons, and the images with their CLIP scores.

    Every field starts at the generator's setting. The button, or Enter, generates in `worker`, a thread, so that the
    stop button is heard. What is wrong appears as a sentence in the box, and the images before stay.
    """

    def __init__(self, generator: TextToImage, prompt: str = "", n: int = 8, seed: int = 0):
        self.generator, self.worker, self._stopped = generator, Thread(), Event()
        self.images: torch.Tensor | None = None  # (N, 3, H, W) in [-1, 1], the last finished ones
        values = vars(generator.settings) | {"seed": seed, "n": n}
        self.fields = {name: _field(label, values[name]) for name, label in LABELS.items()}
        self.prompt = widgets.Text(prompt, placeholder="what to generate", layout=widgets.Layout(flex="1 1 auto"))
        self.button = widgets.Button(description="Generate", button_style="primary")
        self.stop = widgets.Button(description="Stop", disabled=True)
        self.bar = widgets.FloatProgress(0.0, min=0.0, max=1.0, layout=widgets.Layout(width="100%"))
        self.message = widgets.HTML()
        columns = "repeat(auto-fill, minmax(240px, 1fr))"  # as many as the page has room for
        self.tiles = widgets.GridBox(layout=widgets.Layout(grid_template_columns=columns, grid_gap="8px"))
        self.button.on_click(self._start)
        self.stop.on_click(lambda _: self._stopped.set())
        self.prompt.on_msg(lambda _, content, __: content.get("event") == "submit" and self._start())  # Enter
        line = widgets.HBox(list(self.fields.values()), layout=widgets.Layout(flex_flow="row wrap"))
        top = widgets.HBox([self.prompt, self.button, self.stop])
        super().__init__([top, line, self.bar, self.message, self.tiles])

    def _start(self, *_: object) -> None:
        if not self.button.disabled:
            self.button.disabled, self.worker = True, Thread(target=self.generate, daemon=True)
            self.worker.start()

    def generate(self) -> None:
        """Generate what the fields say, in this thread."""
        before = [[part.value for part in tile.children] for tile in self.tiles.children]
        self._stopped.clear()
        self.button.disabled, self.stop.disabled = True, False
        self.bar.value, self.bar.bar_style, self.message.value = 0.0, "", ""
        try:
            prompt, values = self.prompt.value.strip(), {name: field.value for name, field in self.fields.items()}
            if not prompt:
                raise ClipgenError("there is no prompt: write what to generate")
            for name, (low, high) in LIMITS.items():
                if not low <= values[name] <= high:
                    raise ClipgenError(f"{LABELS[name]} is {values[name]}: give {low} to {high}")
            self.message.value = html.escape(self._notice(prompt))
            start, scale = time.monotonic(), max(1, WIDTH // self.generator.vqgan.config.image_size)
            for preview in self.generator.generate_progressively(prompt, **values):
                if self._stopped.is_set():
                    raise ClipgenError("stopped: the images before are back")
                self._fill([[png(image, scale), ""] for image in preview.images])
                self.bar.description = f"{(time.monotonic() - start) * (1 / preview.share - 1):.0f} s left"
                self.bar.value = preview.share
            self.images, self.bar.bar_style = preview.images, "success"
            for tile, score in zip(self.tiles.children, self.generator.similarity(self.images, prompt), strict=True):
                tile.children[1].value = f"CLIP {score:.2f}"
        except BaseException as error:  # ipywidgets hides the errors of a handler, an interrupted kernel among them
            self._fill(before)
            kind = "" if isinstance(error, ClipgenError) else f"{type(error).__name__}: "
            self.message.value, self.bar.bar_style = html.escape(f"{kind}{error}"), "danger"
            if kind:
                raise
        finally:
            self.bar.description, self.button.disabled, self.stop.disabled = "", False, True

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


def _field(label: str, value: float | str) -> widgets.Widget:
    kind = {int: widgets.IntText, float: widgets.FloatText, str: widgets.Dropdown}[type(value)]
    options = {"options": ["constant", "linear", "cosine"]} if kind is widgets.Dropdown else {}
    layout, style = widgets.Layout(flex="1 1 100px", width="auto"), {"description_width": "auto"}
    return kind(value=value, description=label, layout=layout, style=style, **options)
