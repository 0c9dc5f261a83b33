"""Weights from elsewhere: the sources of a stage, and released weights of other projects, loaded strictly into our own modules.

In: a file as it was published. Out: a VQGAN, an ImageTransformer or a TextToImage that computes the same function as the
original. A release is a file, a module of ours and a family. A family is a key map (regular expressions, in order) and
what its originals compute differently. The map names every tensor of a file or ignores it by name, and fills every
tensor of ours; anything else is an error. Axes: K codebook size, C code dimension, E width.
"""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from ..clip_embed import ClipEmbedder
from ..config import Config, SampleConfig, SharedConfig, TransformerConfig, VQGANConfig
from ..runtime import runs
from ..runtime.runs import ROOT, ClipgenError, read_json, reason, shortened
from ..text_to_image import PRETRAINED, TextToImage
from ..transformer import ImageTransformer
from ..vqgan import EPSILON, VQGAN

Rename = tuple[str, str | Callable[[re.Match], str]]  # what `re.sub` takes: their name, our name


class Family(NamedTuple):
    """How the files of one project differ from our modules."""

    entry: str  # of the published dict, under which the tensors lie; of several names the first that is there
    ignored: str  # names that belong to training alone
    renames: Callable[[Config], list[Rename]]  # "{qkv}" in our name: three tensors of ours, fused in theirs
    epsilon: float = EPSILON  # of GroupNorm


class Release(NamedTuple):
    """One published file: its name, where it comes from, and the module of ours that it fills."""

    family: Family
    file: str
    source: str
    build: Callable[[], nn.Module]


def _vqgan(config: VQGANConfig) -> list[Rename]:
    """Names of taming-transformers, whose decoder counts its levels from the finest, and of LlamaGen."""
    last = len(config.channel_mult) - 1
    return [
        (r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}."),
        (r"^encoder\.conv_blocks\.", "encoder.down."),
        (r"^decoder\.conv_blocks\.", "decoder.up."),
        (r"\.res\.", ".block."),
        (r"\.(?:down|up)sample\.conv\.", ".resample.conv."),
        (r"\.mid\.(block_1|attn_1|block_2)\.", lambda m: f".mid.{('block_1', 'attn_1', 'block_2').index(m[1])}."),
        (r"^quantize\.embed(?:ding)?\.weight$", "quantizer.codebook"),
        (r"^quantize\.proj\.", "quantizer.projection."),
    ]


_HFAI_RES = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}  # of a residual block, a list in theirs


def _hfai_vqgan(config: VQGANConfig) -> list[Rename]:
    """Names of HFAiLab/clip-gen: all levels in one list, residual blocks as a list of layers, q, k and v fused."""
    last = len(config.channel_mult) - 1
    down = _flat_places(last, config.res_blocks, coarsest=last)
    up = _flat_places(last, config.res_blocks + 1, coarsest=0)
    return [
        (r"(?<=^encoder\.down\.)\d+", lambda m: down.get(int(m[0]), m[0])),
        (r"(?<=^decoder\.up\.)\d+", lambda m: up.get(int(m[0]), m[0])),
        (r"\.block\.([0236])\.(?=weight|bias)", lambda m: f".{_HFAI_RES[m[1]]}."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"\.attn\.in_proj_(weight|bias)$", r".{qkv}.\1"),
        (r"\.attn\.out_proj\.", ".proj_out."),
        (r"\.final\.0\.", ".norm_out."),
        (r"\.final\.2\.", ".conv_out."),
        (r"^encoder\.final\.3\.", "quant_conv."),
        (r"^decoder\.quant_conv_in\.", "post_quant_conv."),
        (r"^quantizer\.embedding\.weight$", "quantizer.codebook"),
    ]


def _flat_places(last: int, blocks: int, coarsest: int) -> dict[int, str]:
    """Where the n-th module of a flat list lies in our levels: residual blocks (and attention), then a resampling."""
    places = []
    for level in range(last + 1):
        kinds = ("block", "attn") if level == coarsest else ("block",)
        places += [f"{level}.{kind}.{block}" for block in range(blocks) for kind in kinds]
        places += [f"{level}.resample"] if level < last else []
    return dict(enumerate(places))


def _hfai_gpt(config: TransformerConfig) -> list[Rename]:
    return [
        (r"^pos_emb$", "positions"),
        (r"^tok_emb\.", "token_embedding."),
        (r"^cond_proj\.", "condition."),
        (r"\.encoder\.self_attn\.in_proj_(weight|bias)$", r".qkv.\1"),
        (r"\.encoder\.self_attn\.out_proj\.", ".proj."),
        (r"\.encoder\.linear(\d)\.", r".fc\1."),
        (r"\.encoder\.norm(\d)\.", r".norm\1."),
    ]


TAMING = Family("state_dict", r"^loss\.", _vqgan)
LLAMAGEN = Family("ema model state_dict", r"^quantize\.codebook_used$", _vqgan)
HFAI_VQGAN = Family("model", r"^discriminator\.", _hfai_vqgan, epsilon=1e-5)
HFAI_GPT = Family("model", r"^blocks\.\d+\.mask$", _hfai_gpt)

# f16 with 16,384 codes; the other sizes are the defaults of VQGANConfig
_F16 = partial(VQGANConfig, image_size=256, code_dim=256, l2_norm=False)
_COSINE = partial(VQGANConfig, image_size=256, code_dim=8)
_ZOO = "github.com/CompVis/taming-transformers (model zoo: vqgan_"
_LLAMAGEN = "github.com/FoundationVision/LlamaGen (tokenizers: "
_HFAI = "github.com/HFAiLab/clip-gen (release v0.1.0)"
_GUMBEL = _F16(channel_mult=(1, 1, 2, 4), codebook_size=8_192, codebook_update="gumbel")
_VQGANS = {
    "taming-f16-1024": (TAMING, "last.ckpt", f"{_ZOO}imagenet_f16_1024)", _F16(codebook_size=1_024)),
    "taming-f16-16384": (TAMING, "last.ckpt", f"{_ZOO}imagenet_f16_16384)", _F16()),
    "taming-gumbel-f8": (TAMING, "last.ckpt", f"{_ZOO}gumbel_f8)", _GUMBEL),
    "hfai-vqgan-coco": (HFAI_VQGAN, "vqgan_coco.pt", _HFAI, _F16()),
    "llamagen-f16": (LLAMAGEN, "vq_ds16_c2i.pt", f"{_LLAMAGEN}vq_ds16_c2i)", _COSINE()),
    "llamagen-f8": (LLAMAGEN, "vq_ds8_c2i.pt", f"{_LLAMAGEN}vq_ds8_c2i)", _COSINE(channel_mult=(1, 2, 2, 4))),
}
RELEASES = {name: Release(*facts, partial(VQGAN, config)) for name, (*facts, config) in _VQGANS.items()}
_GPT = partial(ImageTransformer, TransformerConfig(layers=24, width=1_024, heads=16), 16_384, 256, 512)
RELEASES["hfai-gpt-coco"] = Release(HFAI_GPT, "gpt_coco.pt", _HFAI, _GPT)


def load_hfai_coco(folder: str | Path, device: str | torch.device = "cpu") -> TextToImage:
    """HFAiLab/clip-gen, trained on MS-COCO, with the sampling of their demo, from vqgan_coco.pt and gpt_coco.pt.

    Their clip_vit_b32.pt or OpenAI's ViT-B-32.pt is used from the folder too, and downloaded where both are missing. A file
    that is missing, damaged, of another model or with code in it is a ClipgenError.
    """
    vqgan, transformer = (load_released(name, folder, device) for name in ("hfai-vqgan-coco", "hfai-gpt-coco"))
    source = {"name": "ViT-B-32-quickgelu", "pretrained": "openai"}
    files = (Path(folder).resolve() / name for name in ("clip_vit_b32.pt", "ViT-B-32.pt"))
    clip = ClipEmbedder.load(source["name"], str(next(filter(Path.is_file, files), "openai")), device)
    settings = SampleConfig(guidance=1.0, top_k=500, top_p=0.95)
    return TextToImage.from_parts(vqgan, transformer, clip, source, settings)


def load_released(name: str | Release, path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The VQGAN or ImageTransformer of one of `RELEASES`, or of a release of your own, in eval mode and float32.

    Args:
        path: the published file, or the folder that holds it under its published name. A .safetensors file holds the
            tensors themselves, without the entry around them.

    Raises:
        ClipgenError: unknown name; file missing, damaged or with code in it; tensors of another model.
    """
    if isinstance(name, str) and name not in RELEASES:
        raise ClipgenError(f"unknown release {name!r}: choose one of {', '.join(RELEASES)}")
    release, path = RELEASES[name] if isinstance(name, str) else name, Path(path)
    path = path if path.is_file() or path.suffix in (".pt", ".ckpt", ".safetensors") else path / release.file
    if not path.is_file():
        raise ClipgenError(f"{path.name} is missing: get it from {release.source} and put it into {path.parent}")
    try:
        tensors = read_tensors(path, release.family.entry)
        return build(release.build, release.family, tensors).to(device)
    except ClipgenError as error:
        raise ClipgenError(f"{path} is no {release.file} ({error}): get it from {release.source}") from None


def build(make: Callable[[], nn.Module], family: Family, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module of ours, in eval mode, that computes what the original computes with these tensors.

    `make` is called on torch's meta device; `tensors` have their published names and are not changed in place. A tensor
    too many, one too few or one of another shape is a ClipgenError.
    """
    with torch.device("meta"):
        module = make()
    wanted, renamed = module.state_dict(), {}
    for name, tensor in tensors.items():
        if not re.search(family.ignored, name):
            renamed |= _renamed(name, tensor, family.renames(module.config))
    for name, tensor in renamed.items():  # a linear layer and a convolution with a kernel of 1x1 are the same numbers
        shape = wanted[name].shape if name in wanted else tensor.shape
        fits = tensor.shape[:2] == shape[:2] and tensor.numel() == shape.numel()
        renamed[name] = (tensor.reshape(shape) if fits else tensor).float().clone()  # each in its own memory
    if family.epsilon != EPSILON:
        renamed = rescale(renamed, (EPSILON / family.epsilon) ** 0.5)
    unreleased = wanted.keys() & {"quantizer.idle"}  # zero is how they begin
    renamed |= {name: torch.zeros_like(wanted[name], device="cpu") for name in unreleased}
    try:
        module.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        raise ClipgenError(reason(error)) from None
    return module.eval()


def _renamed(name: str, tensor: torch.Tensor, renames: list[Rename]) -> dict[str, torch.Tensor]:
    """A published tensor under our name, or its three parts under theirs."""
    for pattern, ours in renames:
        name = re.sub(pattern, ours, name)
    parts = zip("qkv", tensor.chunk(3), strict=False) if "{qkv}" in name else [("", tensor)]
    return {name.replace("{qkv}", letter): part for letter, part in parts}


def rescale(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The weights of a VQGAN, under our names, such that the input of every GroupNorm is `scale` times what it was.

    GroupNorm of s * x with epsilon s^2 * e is that of x with epsilon e. So weights trained with e compute the same
    function with ours, s = sqrt(EPSILON / e). Only norms read the residual stream: layers that write to it are scaled,
    of linear maps within it the bias alone.
    """
    writes = r"\b(conv_in|conv1|conv2|proj_out)\.(weight|bias)$|\b(nin_shortcut|resample\.conv)\.bias$"
    return {name: tensor * scale if re.search(writes, name) else tensor for name, tensor in tensors.items()}


# Stands for the class that Lightning's checkpoints of 2020 and 2021 keep as a key; nothing of it is used.
_CALLBACK = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def read_tensors(path: Path, entry: str) -> dict[str, torch.Tensor]:
    """The tensors of a published file, on the CPU, by name; no code in the file is run.

    They lie under `entry`, or the first of its words that is there, in a .pt or .ckpt file. A file that is damaged, holds code or has no such entry is a ClipgenError.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([_CALLBACK]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise whatever their zip, pickle and header code raises
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ClipgenError(f"it holds code, {code[1]}, which is not run") from None
        why = str(error).split("WeightsUnpickler error: ")[-1].split(". ")[0].split("\n")[0].strip()
        raise ClipgenError(f"cut short, damaged or no weights at all; {why or type(error).__name__}") from None
    found = [content[key] for key in entry.split() if key in content] if isinstance(content, dict) else []
    tensors = found[0] if found else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ClipgenError(f"no tensors under {entry!r}")
    return tensors


def placed(text: str, *bases: Path) -> tuple[Path, str]:
    """Where a file or folder lies that is looked for in `bases`, then here; and its name, which is the same from anywhere.

    That is its place in the first base that it lies in, else its absolute path, or the text where nothing is there.
    """
    expanded = os.path.expanduser(text)
    tried = [*(base / expanded for base in bases if text[:1] != "."), expanded]
    if not (found := next(filter(os.path.exists, tried), None)):
        return Path(text), text
    path = Path(os.path.abspath(found))
    places = (path.relative_to(base) for base in map(Path.absolute, bases) if path.is_relative_to(base))
    return path, str(next(places, path))


def source_place(source: str) -> tuple[Path, str]:
    """Where a source lies, and its name: of a run its own, of `shapes`, another folder or RELEASE=FILE as by `placed`.

    A run that has its weights goes before a generator of the project of that name.
    """
    release, _, file = source.partition("=")
    if release in _VQGANS:
        path, name = placed(file, ROOT)
        return path, f"{release}={name}"
    is_run = os.path.isdir(runs.RESULTS / source / "vqgan")
    return placed(source if is_run else str(PRETRAINED.get(source, source)), runs.RESULTS, ROOT)


def named_sources(shared: SharedConfig) -> SharedConfig:
    """Each source by one name, wherever it is given from. A store or transformer alone brings the VQGAN of its run."""
    sources = (shared.vqgan or shared.store or shared.transformer, shared.store, shared.transformer)
    return SharedConfig(*(source and source_place(source)[1] for source in sources))


def load_vqgan(source: str) -> VQGAN:
    """A tokenizer on the CPU: of a run, of a folder of its weights or a generator's, of `shapes`, or of RELEASE=FILE.

    Raises ClipgenError: none is there, or it is damaged or of another model.
    """
    release, folder = source.partition("=")[0], source_place(source)[0]
    if release in _VQGANS:
        return load_released(release, folder)
    if not os.path.isdir(folder):
        what = f"VQGAN {shortened(source)!r} is neither a run, a folder of weights nor RELEASE=FILE"
        raise ClipgenError(f"{what}: write for example taming-f16-16384=last.ckpt, or one of {', '.join(_VQGANS)}")
    if not (folder / "model.safetensors").exists():
        return VQGAN.load(folder / "vqgan")
    is_generator = "vqgan" in read_json(folder / "config.json")
    return TextToImage.from_pretrained(folder).vqgan if is_generator else VQGAN.load(folder)
