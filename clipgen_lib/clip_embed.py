"""Frozen CLIP: images and texts into one space of unit vectors.

In: images (B, 3, H, W) float in [-1, 1] of any size, or a list of texts. Out: (B, D) float32 of unit norm.
The only place that knows CLIP's input size, resize, mean and standard deviation. Any open_clip model will do; the
embedded one under data/shapes_clip knows the Shapes world and nothing else.
"""

import contextlib
import hashlib
import math
import os
import re
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

from .runtime import distributed
from .runtime.checkpoints import finite
from .runtime.runs import DATA, ROOT, ClipgenError, file_hash, read_json, reading, reason, shortened

EMBEDDED = "shapes"


def _plain(file: Path, folder: Path) -> str:
    """A weights file that open_clip reads without running code: `file`, or a copy of its tensors in `folder`.

    OpenAI's own files are TorchScript archives, which hold the network's code beside the tensors. Opening one runs some of
    that code, so that no other archive is opened than those that OpenAI has published. Raises ClipgenError for any other.
    """
    from open_clip.pretrained import get_pretrained_url, list_pretrained

    if not zipfile.is_zipfile(file):
        return str(file)
    with zipfile.ZipFile(file) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return str(file)
    # open_clip lists them by addresses that hold their SHA-256
    published = {get_pretrained_url(name, tag).split("/")[-2] for name, tag in list_pretrained() if tag == "openai"}
    with open(file, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() not in published:
            raise ClipgenError(f"{file} holds code, which is not run: give its state dict as .safetensors")
    warnings.filterwarnings("ignore", message=".*torch.jit.load.*", category=FutureWarning)
    sizes = ("input_resolution", "context_length", "vocab_size")  # numbers that lie among the tensors
    tensors = {k: v.clone() for k, v in torch.jit.load(file, map_location="cpu").state_dict().items() if k not in sizes}
    save_file(tensors, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def _check_config(config: Path, weights: Path) -> None:
    """Refuse a folder's config before it costs code or memory: a tower is named by a place (`hf-hub:...`, a path), or there
    are more layers than the weights have tensors, or more than twice their numbers."""
    import open_clip

    towers, layers, asked = read_json(config)["model_cfg"], [0], 0
    for part in (part for part in towers.values() if isinstance(part, dict)):
        layers += part["layers"] if isinstance(part.get("layers"), list) else [part.get("layers", 0)]
        for key in ("timm_model_name", "hf_model_name"):
            if not re.fullmatch(r"(\w[\w-]*/)?\w[\w.-]*", str(part.get(key, "none"))):
                named = shortened(str(part[key]))
                raise ClipgenError(f"{config} names a place, {named!r}, as {key}: restore the original file")
    with reading(weights, "restore it", "restore the original file"), safe_open(weights, framework="pt") as stream:
        shapes = [stream.get_slice(name).get_shape() for name in stream.keys()]  # noqa: SIM118 (not a dict)
    kind = "CoCa" if "multimodal_cfg" in towers else "CustomTextCLIP" if towers.pop("custom_text", False) else "CLIP"
    # towers of timm's have the sizes of its register, Hugging Face's would be fetched
    if max(layers) <= len(shapes) and "hf_model_name" not in str(towers):
        with torch.device("meta"), contextlib.suppress(*[Exception] if "timm_model_name" in str(towers) else []):
            asked = sum(parameter.numel() for parameter in getattr(open_clip, kind)(**towers).parameters())
    if max(layers) > len(shapes) or asked > 2 * sum(map(math.prod, shapes)):
        raise ClipgenError(f"{config} describes a CLIP of other sizes than {weights}: restore the original files")


def find_weights(name: str = EMBEDDED, pretrained: str | None = None) -> Path | None:
    """Where the weights of a CLIP (see `ClipEmbedder.load`) lie on this machine, None where they do not; asks no network."""
    folder = _folder(name)
    if name == EMBEDDED or os.path.isdir(folder):
        found = [folder / file for file in ("open_clip_model.safetensors", "open_clip_config.json")]
        return found[0] if all(path.is_file() for path in found) else None
    if os.path.isfile(pretrained or ""):
        return Path(pretrained)
    from huggingface_hub import try_to_load_from_cache
    from open_clip.pretrained import get_pretrained_cfg

    repository, _, file = get_pretrained_cfg(name, pretrained or "").get("hf_hub", "").rpartition("/")
    known = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    cached = (try_to_load_from_cache(repository, file) for file in known if repository)
    return next((Path(path) for path in cached if isinstance(path, str)), None)


def photo_notice(name: str, data: str) -> str:
    """A sentence where the embedded CLIP, which knows the Shapes world alone, is to read other images; else nothing."""
    if data == "shapes" or _folder(name) != _folder(EMBEDDED):
        return ""
    return (
        "This run's CLIP knows coloured shapes, not photos: what is generated will resemble your images, but prompts mean "
        "little to it. Name another with -p CLIP=ViT-B-32-quickgelu/openai (open_clip downloads it), or train one on images "
        "with captions or in class folders: clipgen train-clip --data FOLDER --run my-clip, then -p CLIP=results/my-clip/clip."
    )


def resized(images: torch.Tensor, sides: list[int], mode=v2.InterpolationMode.BICUBIC) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] with a shorter side, or both, of so many pixels: antialiased, kept in [-1, 1]."""
    found = v2.functional.resize(images, sides, mode)
    # bicubic overshoots; 8-bit images cannot
    return found if found.shape == images.shape else found.clamp(-1, 1)


def _folder(name: str) -> Path:
    return DATA / "shapes_clip" if name == EMBEDDED else ROOT / name


class ClipEmbedder(nn.Module):
    """An open_clip model behind two methods; its weights never change and never collect gradients."""

    def __init__(self, model: nn.Module, tokenizer, name: str, weights_hash: str):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        finite(model.state_dict())
        self.tokenizer, self.name, self.weights_hash = tokenizer, name, weights_hash
        preprocess = model.visual.preprocess_cfg
        for key, known in (("resize_mode", ("shortest", "squash")), ("interpolation", ("bicubic", "bilinear"))):
            if preprocess[key] not in known:
                raise ClipgenError(f"CLIP {name} has another {key} than {' and '.join(known)}: use another model")
        words = getattr(tokenizer, "vocab_size", 0)
        table = getattr(getattr(model, "text", model), "token_embedding", None)
        if table is not None and words > table.num_embeddings:
            what = f"the tokenizer of CLIP {name} has {words} words, its text tower {table.num_embeddings}"
            raise ClipgenError(f"{what}: put the merges of its training (bpe_merges.txt.gz) beside the weights")
        self.interpolation = v2.InterpolationMode(preprocess["interpolation"])
        self.size = preprocess["size"] if isinstance(preprocess["size"], int) else preprocess["size"][0]
        self.sides = [self.size] * (2 if preprocess["resize_mode"] == "squash" else 1)  # one is the shorter
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(1, 3, 1, 1), persistent=False)
        with torch.inference_mode():
            self.dim = self.texts(["a picture"]).shape[1]

    @classmethod
    def load(cls, name: str = EMBEDDED, pretrained: str | None = None, device: str | torch.device = "cpu") -> Self:
        """Load a CLIP.

        Args:
            name: `shapes` (the embedded one), a folder in open_clip's layout (open_clip_config.json and weights; a
                relative path counts from the project's root), or an open_clip model name such as `ViT-B-32-quickgelu`.
            pretrained: for a model name, open_clip's tag (`openai`) or a local checkpoint file.

        Raises ClipgenError where the name is unknown, weights are missing or unreadable, or the activation (QuickGELU) does not
        match them, which open_clip itself only warns of.
        """
        import open_clip

        tag = shortened(f"{name}/{pretrained}")
        if not isinstance(name, str) or not isinstance(pretrained, str | None):
            raise ClipgenError(f"CLIP {tag} is not named by texts: restore the original config")
        folder, is_file, arguments = _folder(name), os.path.isfile(pretrained or ""), {}
        if name == EMBEDDED or os.path.isdir(folder):
            weights, again = folder / "open_clip_model.safetensors", "train it with notebooks/appendix_train_clip.ipynb"
            with reading(weights, f"restore data/shapes_clip from the repository, or {again}", "restore it"):
                digest = file_hash(weights)
            merges = folder / "bpe_merges.txt.gz"
            arguments = {"bpe_path": str(merges)} if merges.is_file() else {}
            source, pretrained, is_file = f"local-dir:{folder}", None, False
        # open_clip's `hf-hub:` and `local-dir:`, with which a config could name anybody's files, are no names of models
        elif ":" in name or pretrained is None:
            raise ClipgenError(f"CLIP {tag} is no folder, and a model's name needs `pretrained`: give a tag or a file")
        else:
            source, digest = name, file_hash(Path(pretrained)) if is_file else tag
        try:
            with warnings.catch_warnings(), tempfile.TemporaryDirectory() as beside:
                warnings.filterwarnings("error", message=".*QuickGELU.*")
                if pretrained is None:
                    _check_config(folder / "open_clip_config.json", weights)
                weights = _plain(Path(pretrained), Path(beside)) if is_file else pretrained
                model = open_clip.create_model(source, pretrained=weights, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(source, **arguments)
            shown = Path(name).name if Path(name).is_absolute() else name  # results name no place on a machine
            shown = f"{shown}/{Path(pretrained).name}" if pretrained else shown
            return cls(model, tokenizer, shown, digest).to(device)
        except UserWarning as warning:
            raise ClipgenError(f"CLIP {tag}: {warning} Use the '-quickgelu' model name for these weights.") from None
        except (ClipgenError, MemoryError):
            raise
        except Exception as error:  # open_clip raises whatever its download, pickle or state-dict code raises
            cure = "check the name against open_clip.list_pretrained(), or give a checkpoint file: MODEL//path/to/file"
            raise ClipgenError(f"CLIP {tag} cannot be loaded ({reason(error)}): {cure}") from error

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> what the image encoder takes: antialiased resize, centre crop, mean and std."""
        square = v2.functional.center_crop(resized(images, self.sides, self.interpolation), [self.size])
        return ((square + 1) / 2 - self.mean) / self.std

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D) image features before normalisation; what CLIP-FID is computed on."""
        return self.model.encode_image(self.preprocess(images)).float()

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the image encoder's intermediate maps, each (B, channels, h, w)."""
        inside = self.model.visual.forward_intermediates(self.preprocess(images), intermediates_only=True)
        return inside["image_intermediates"]

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D) float32 of unit norm; gradients reach the images."""
        return F.normalize(self.features(images), dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        """B texts -> (B, D) float32 of unit norm; a text of which the model sees the beginning only is told on stderr, once."""
        for text in filter(self.is_truncated, texts):
            most = self.tokenizer.context_length
            distributed.tell(f"CLIP reads the first {most} tokens alone of {shortened(text, 60)!r}")
        parts = [self.tokenizer(texts[i : i + 256]).to(self.device) for i in range(0, len(texts), 256)]
        return F.normalize(torch.cat([self.model.encode_text(part) for part in parts]).float(), dim=-1)

    def is_truncated(self, text: str) -> bool:
        """Whether a text has more tokens than the context, so that CLIP sees its beginning only."""
        most = self.tokenizer.context_length
        tokens, none = self.tokenizer([text, ""], context_length=4 * most)
        return bool((tokens != none[-1])[most:].any())  # the last of no text is padding: 0, or 1 in SigLIP
