"""CLIP-GEN workbench: language-free text-to-image training, sampling and evaluation (arXiv 2203.00386).

The pipeline in order, a module for each step:

    vqgan, train_vqgan              images <-> tokens (stage 1)
    store                           every image once into tokens and a CLIP embedding
    transformer, train_transformer  p(tokens | embedding) (stage 2)
    sample, text_to_image           a prompt or an image -> images
    evaluate                        images -> FID-k, CapS, accuracies

`config` holds the presets, `workbench` runs one step after the other. The public names below are loaded on first use, so that
`import clipgen_lib` imports no torch.
"""

from importlib import import_module

__version__ = "0.2.0"
_LAZY = {
    "ClipEmbedder": "clip_embed",
    "ImageTransformer": "transformer",
    "TextToImage": "text_to_image",
    "TokenStore": "store",
    "VQGAN": "vqgan",
    "Workbench": "workbench",
    "generate": "sample",
    "load_preset": "config",
    "open_images": "data.datasets",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
