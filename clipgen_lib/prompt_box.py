"""The prompt box: fields and a button in a notebook, and images that appear while they are generated.

In: a `TextToImage`. Out: a widget; its `generate` is what the button does, with or without a browser that shows it.
This is the only module that needs ipywidgets.
"""

import html

import ipywidgets as widgets
import torch

from .data.images import png
from .runtime.runs import ClipgenError
from .text_to_image import Preview, TextToImage

WIDTH = 128  # pixels that an image is enlarged to on the page, about


class PromptBox(widgets.VBox):
    """Prompt, seed and settings of a generator, a button, and the images with their CLIP scores.

    Every field starts at the generator's setting. An error appears as its sentence in the box.
    """

    def __init__(self, generator: TextToImage, prompt: str = "", n: int = 8, seed: int = 0):
        self.generator = generator
        self.images: torch.Tensor | None = None  # (N, 3, H, W) in [-1, 1], the last finished ones
        settings, codes = generator.settings, generator.transformer.codebook_size
        self.prompt = widgets.Text(prompt, placeholder="what to generate", layout=widgets.Layout(flex="1 1 auto"))
        self.button = widgets.Button(description="Generate", button_style="primary")
        self.seed = _field(widgets.BoundedIntText, "seed", seed, max=2**31 - 1)
        self.guidance = _field(widgets.BoundedFloatText, "guidance", settings.guidance, max=20, step=0.25)
        self.temperature = _field(widgets.BoundedFloatText, "temperature", settings.temperature, max=10, step=0.05)
        self.top_k = _field(widgets.BoundedIntText, "top-k", settings.top_k, max=codes, tooltip="0 keeps all tokens")
        self.n = _field(widgets.BoundedIntText, "images", n, min=1, max=64)
        self.candidates = _field(
            widgets.BoundedIntText, "rerank", settings.candidates, min=1, max=64, tooltip="candidates for each image"
        )
        self.bar = widgets.FloatProgress(0.0, min=0.0, max=1.0, layout=widgets.Layout(width="100%", height="14px"))
        self.message = widgets.HTML()
        self.tiles = widgets.GridBox(layout=widgets.Layout(grid_template_columns="repeat(4, max-content)"))
        self.button.on_click(self.generate)
        fields = [self.seed, self.guidance, self.temperature, self.top_k, self.n, self.candidates]
        line = widgets.HBox(fields, layout=widgets.Layout(flex_flow="row wrap"))
        super().__init__([widgets.HBox([self.prompt, self.button]), line, self.bar, self.message, self.tiles])

    def generate(self, _button: widgets.Button | None = None) -> None:
        """Generate what the fields say; the button's handler."""
        self.button.disabled, self.bar.value, self.bar.bar_style = True, 0.0, ""
        self._say("")
        try:
            self._generate()
        except ClipgenError as error:
            self._say(str(error), is_error=True)
        except BaseException as error:  # ipywidgets hides the errors of a handler, an interrupted kernel among them
            self._say(f"{type(error).__name__}: {error}", is_error=True)
            raise
        finally:
            self.button.disabled = False

    def _generate(self) -> None:
        prompt, n = self.prompt.value.strip(), self.n.value
        if not prompt:
            raise ClipgenError("there is no prompt: write what to generate")
        if self.generator.clip.is_truncated(prompt):
            self._say("CLIP reads only the beginning of so long a prompt")
        settings = {name: getattr(self, name).value for name in ("guidance", "temperature", "top_k", "candidates")}
        for preview in self.generator.generate_progressively(prompt, n, self.seed.value, **settings):
            self._show(preview)
        self.images = preview.images
        self.bar.bar_style = "success"
        for tile, score in zip(self.tiles.children, self.generator.similarity(self.images, prompt), strict=True):
            tile.children[1].value = f"CLIP {score:.2f}"

    def _show(self, preview: Preview) -> None:
        if len(self.tiles.children) != len(preview.images):
            self.tiles.children = [_tile() for _ in preview.images]
        scale = max(1, WIDTH // preview.images.shape[-1])
        for tile, image in zip(self.tiles.children, preview.images, strict=True):
            tile.children[0].value, tile.children[1].value = png(image, scale), ""
        self.bar.value = preview.share

    def _say(self, text: str, is_error: bool = False) -> None:
        colour = "firebrick" if is_error else "inherit"
        self.message.value = f'<span style="color: {colour}">{html.escape(text)}</span>'


def _field(kind: type, label: str, value: float, **options: object) -> widgets.Widget:
    style, layout = {"description_width": "auto"}, widgets.Layout(width="150px")
    return kind(value=value, description=label, style=style, layout=layout, **options)


def _tile() -> widgets.VBox:
    """An image over its score."""
    layout = widgets.Layout(align_items="center", margin="4px")
    return widgets.VBox([widgets.Image(format="png"), widgets.Label()], layout=layout)
