"""The prompt box: fields and a button in a notebook, and images that appear while they are drawn.

In: a `TextToImage`. Out: a widget; its `draw` is what the button does, with or without a browser that shows it.
The one module that needs ipywidgets.
"""

from __future__ import annotations

import html

import ipywidgets as widgets
import torch

from .data.images import png
from .runtime.runs import ClipgenError
from .text_to_image import Preview, TextToImage

WIDTH = 128  # pixels that an image is enlarged to on the page, about


class PromptBox(widgets.VBox):
    """Prompt, seed and settings of a generator, a button that draws, and the images with their CLIP scores.

    Every field starts at the generator's own setting. What is wrong with a call appears as its sentence in the box.
    """

    def __init__(self, generator: TextToImage, prompt: str = "", n: int = 8, seed: int = 0):
        self.generator = generator
        self.images: torch.Tensor | None = None  # (N, 3, H, W) in [-1, 1], those of the last drawing that ended
        settings, codes = generator.settings, generator.transformer.codebook_size
        self.prompt = widgets.Text(prompt, placeholder="what to draw", layout=widgets.Layout(flex="1 1 auto"))
        self.button = widgets.Button(description="Draw", button_style="primary", tooltip="draw images for this prompt")
        self.seed = _field(widgets.BoundedIntText, "seed", seed, 2**31 - 1)
        self.guidance = _field(widgets.BoundedFloatText, "guidance", settings.guidance, 20, step=0.25)
        self.temperature = _field(widgets.BoundedFloatText, "temperature", settings.temperature, 10, step=0.05)
        self.top_k = _field(
            widgets.BoundedIntText, "top-k", settings.top_k, codes, tooltip="likeliest tokens kept; 0 keeps all"
        )
        self.n = _field(widgets.BoundedIntText, "images", n, 64, least=1)
        self.candidates = _field(
            widgets.BoundedIntText, "rerank", settings.candidates, 64, least=1, tooltip="drawn for each one kept"
        )
        self.bar = widgets.FloatProgress(0.0, min=0.0, max=1.0, layout=widgets.Layout(width="100%", height="14px"))
        self.message = widgets.HTML()
        self.pictures = widgets.GridBox(layout=widgets.Layout(grid_template_columns="repeat(4, max-content)"))
        self.button.on_click(self.draw)
        fields = [self.seed, self.guidance, self.temperature, self.top_k, self.n, self.candidates]
        super().__init__(
            [
                widgets.HBox([self.prompt, self.button]),
                widgets.HBox(fields, layout=widgets.Layout(flex_flow="row wrap")),
                self.bar,
                self.message,
                self.pictures,
            ]
        )

    def draw(self, _button: widgets.Button | None = None) -> None:
        """Draw what the fields say; the button's handler."""
        self.button.disabled, self.bar.value, self.bar.bar_style = True, 0.0, ""
        self._say("")
        try:
            self._draw()
        except ClipgenError as error:
            self._say(str(error), wrong=True)
        except (
            BaseException
        ) as error:  # ipywidgets hides what a handler raises; an interrupted kernel is such a case too
            self._say(f"{type(error).__name__}: {error}", wrong=True)
            raise
        finally:
            self.button.disabled = False

    def _draw(self) -> None:
        prompt, n = self.prompt.value.strip(), self.n.value
        if not prompt:
            raise ClipgenError("there is no prompt: write what to draw")
        if self.generator.clip.is_truncated(prompt):
            self._say("CLIP reads only the beginning of so long a prompt")
        settings = {name: getattr(self, name).value for name in ("guidance", "temperature", "top_k", "candidates")}
        for look in self.generator.generate_progressively(prompt, n, self.seed.value, **settings):
            self._show(look)
        self.images = look.images
        self.bar.bar_style = "success"
        for tile, score in zip(
            self.pictures.children, self.generator.similarity(self.images, prompt).tolist(), strict=True
        ):
            tile.children[1].value = f"CLIP {score:.2f}"

    def _show(self, look: Preview) -> None:
        if len(self.pictures.children) != len(look.images):
            self.pictures.children = [_tile() for _ in look.images]
        scale = max(1, WIDTH // look.images.shape[-1])
        for tile, image in zip(self.pictures.children, look.images, strict=True):
            tile.children[0].value, tile.children[1].value = png(image, scale), ""
        self.bar.value = look.share

    def _say(self, text: str, wrong: bool = False) -> None:
        self.message.value = f'<span style="color: {"firebrick" if wrong else "inherit"}">{html.escape(text)}</span>'


def _field(kind: type, label: str, value: float, most: float, least: float = 0, **options: object) -> widgets.Widget:
    return kind(
        value=value,
        min=least,
        max=most,
        description=label,
        style={"description_width": "auto"},
        layout=widgets.Layout(width="150px"),
        **options,
    )


def _tile() -> widgets.VBox:
    """An image over its score."""
    return widgets.VBox(
        [widgets.Image(format="png"), widgets.Label()], layout=widgets.Layout(align_items="center", margin="4px")
    )
