"""Weights on disk: safetensors with their hashes, and the published files that metrics and losses need. No pickle is read.

A file is written beside its place and renamed, so that an interruption leaves the previous version whole.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .runs import ClipgenError, file_hash, fresh_file, fresh_folder, read_json, reading, reason, write_json


def save_checkpoint(path: Path, state: dict, meta: dict) -> None:
    """Write a nested state (tensors, numbers, strings, lists, dicts) as one safetensors file, atomically.

    Everything that is not a tensor travels as JSON in the file's metadata, so that loading runs no code. A SHA-256 over all of
    it goes there too. Raises ClipgenError where the disk is full; a file that was there stays.
    """
    tensors: dict = {}
    header = {"state": json.dumps(_take_tensors(state, tensors)), "meta": json.dumps(meta)}
    with fresh_file(path) as beside:
        save_file(tensors, beside, {**header, "sha256": _digest(header, tensors)})


def load_checkpoint(path: Path) -> tuple[dict, dict]:
    """Read what `save_checkpoint` wrote, on the CPU: (state, meta).

    Raises ClipgenError where it is missing, cut short, changed since it was written, not one of ours, or may not be read.
    """
    with reading(path, "run the step that writes it first", "delete it, run its step again"):
        with safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (not a dict)
        if header.pop("sha256") != _digest(header, tensors):
            raise ValueError("its SHA-256 differs from when it was written")
        put = lambda node: tensors[node["tensor"]] if "tensor" in node else dict(node["pairs"])
        state, meta = json.loads(header["state"], object_hook=put), json.loads(header["meta"])
        if not isinstance(state, dict) or not isinstance(meta, dict):
            raise ValueError("no state in it")
        return state, meta


def checkpoint_meta(path: Path) -> dict:
    """The `meta` of a checkpoint, its tensors left unread; empty where the file is damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            return json.loads((stream.metadata() or {})["meta"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return {}


def _digest(header: dict[str, str], tensors: dict) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _take_tensors(node: object, tensors: dict) -> object:
    """Replace every tensor by a reference into `tensors`, where its copy goes, since safetensors refuses shared memory.

    Dicts become pairs, since JSON turns integer keys to text.
    """
    if isinstance(node, torch.Tensor):
        key = f"{len(tensors):06d}"
        tensors[key] = node.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": key}
    if isinstance(node, dict):
        return {"pairs": [[k, _take_tensors(v, tensors)] for k, v in node.items()]}
    if isinstance(node, (list, tuple)):
        return [_take_tensors(v, tensors) for v in node]
    return node


def save_tensors(path: Path, module: nn.Module) -> None:
    """Write a module's weights, with the SHA-256 that `read_weights` checks, as a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, path, {"sha256": _digest({}, tensors)})


def save_weights(folder: Path, module: nn.Module, **facts: object) -> None:
    """Write `config.json` (from the module's `describe()`, plus facts) and `model.safetensors`, atomically."""
    with fresh_folder(folder) as fresh:
        save_tensors(fresh / "model.safetensors", module)
        write_json(fresh / "config.json", {**module.describe(), **facts})


def read_weights(folder: Path) -> dict:
    """The tensors of `folder/model.safetensors`; missing, not finite, or other than `save_weights` wrote them is one sentence."""
    path, missing = folder / "model.safetensors", "run the step that trains it first, or choose the run that has it"
    with reading(path, missing, "delete it, run its step again"):
        tensors = finite(load_file(path))
        with safe_open(path, framework="pt") as stream:
            written = (stream.metadata() or {}).get("sha256")  # other projects' have none
        if written not in (None, _digest({}, tensors)):
            raise ValueError("its SHA-256 differs from when it was written")
        return tensors


def finite(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors themselves. Raises ValueError where one holds NaN or an infinity, with which nothing can be computed."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return tensors


def load_strictly(module: nn.Module, tensors: dict, source: Path) -> None:
    """Give a module these tensors, in its own dtypes; any name or shape that differs is an error that names the first ones."""
    wanted = module.state_dict()  # copied: what safetensors gives is the file itself, which may change
    tensors = {name: x.to(wanted[name].dtype, copy=True) if name in wanted else x for name, x in tensors.items()}
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ClipgenError(f"{source} does not fit its config ({reason(error)}): use both of one run") from None


def load_weights(folder: Path, make: Callable[[dict], nn.Module]) -> nn.Module:
    """The module that `make` builds of what `save_weights` wrote into config.json, with the weights beside it.

    It is built without memory first: a config of other sizes than its weights' is refused before it costs anything. Raises
    ClipgenError where the config describes nothing that can be built, or the weights are damaged or of something else.
    """
    described = read_json(folder / "config.json")
    try:
        with torch.device("meta"):
            module = make(described)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise ClipgenError(f"{folder}/config.json describes no network ({reason(error)}): restore it") from None
    load_strictly(module, read_weights(folder), folder)
    return module


def module_hash(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class MissingWeights(ClipgenError):
    """Weights or a package that this machine lacks: what does not need them can go on."""


@dataclass(frozen=True)
class Weights:
    file: str
    sha256: str  # its first digits
    source: str


FID_INCEPTION = Weights(
    "pt_inception-2015-12-05-6726825d.pth", "6726825d0af5f729", "release fid_weights of mseitzer/pytorch-fid on GitHub"
)
TORCHVISION_INCEPTION = Weights(
    "inception_v3_google-0cc3c7bd.pth", "0cc3c7bd", "the page of inception_v3 in torchvision's documentation of models"
)
ALEXNET = Weights("alexnet-owt-7be5be79.pth", "7be5be79", "page of alexnet in torchvision's documentation of models")
VGG16 = Weights("vgg16-397923af.pth", "397923af", "the page of vgg16 in torchvision's documentation of models")


def hub_folder() -> Path:
    """Where torch's hub, and so this library, looks for weights files."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def weights_file(weights: Weights, needed_by: str, otherwise: str) -> Path:
    """Where a weights file lies; not there, or not the published one, is one sentence."""
    folder = hub_folder()
    path = folder / weights.file
    if not path.is_file():
        shown = f"~/{folder.relative_to(Path.home())}" if folder.is_relative_to(Path.home()) else folder
        what = f"{needed_by} needs {weights.file} (SHA-256 {weights.sha256}..., {weights.source})"
        raise MissingWeights(f"{what}: put it into {shown}, or {otherwise}")
    if not (found := file_hash(path)).startswith(weights.sha256):
        raise ClipgenError(f"{path} has another SHA-256, {found}: delete it and fetch it again from {weights.source}")
    return path


# a context: within it torch.load runs no code of any file, also where the package that calls it does not ask for that
weights_alone = partial(patch.dict, os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1")
