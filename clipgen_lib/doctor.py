"""What this machine has, which weights are here, and which preset fits, on one page. Nothing is downloaded, no weights are read.

The memory of a training is an estimate for its larger stage: 20 bytes for each trained parameter (weights, gradients, two
moments of AdamW and the EMA, in float32), the tensors that autograd keeps of one pass (counted in float32 on the meta device,
of which autocast keeps the share KEPT), the frozen networks, and 1.5 GB for Python and the driver. Operations are those that
torch counts in one pass of each stage, times batch and steps; a CPU core is taken to do 10^11 in a second.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from .clip_embed import EMBEDDED, find_weights
from .config import PRESETS, Preset
from .runtime.checkpoints import ALEXNET, FID_INCEPTION, TORCHVISION_INCEPTION, VGG16, hub_folder
from .runtime.runs import DATA, RESULTS, versions
from .train_vqgan import PatchDiscriminator
from .transformer import ImageTransformer
from .vqgan import VQGAN

KEPT = {"vqgan": 0.85, "transformer": 0.35}  # norms stay in float32; attention on a GPU keeps no maps
LONGEST = 3 * 86_400  # seconds of a training on a CPU before this page calls it too long


class Machine(NamedTuple):
    """Sizes are in GB of 10^9 bytes."""

    cores: int
    ram: float
    disk: float  # free where results/ lies
    gpus: tuple[tuple[str, float], ...] = ()  # name and memory of each


class Weights(NamedTuple):
    """Weights that something here asks for."""

    name: str
    used_by: str
    is_here: bool
    cure: str


class Need(NamedTuple):
    parameters: int  # of both trained networks
    gigabytes: float
    operations: float  # of both trainings


def this_machine() -> Machine:
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    allowed = limit.read_text().strip() if limit.is_file() else ""
    ram = min(psutil.virtual_memory().total, int(allowed) if allowed.isdigit() else 1 << 62) / 1e9
    disk = shutil.disk_usage(next(folder for folder in (RESULTS, *RESULTS.parents) if folder.exists())).free / 1e9
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Machine(os.cpu_count() or 1, ram, disk, tuple((gpu.name, gpu.total_memory / 1e9) for gpu in gpus))


def clip_name(preset: Preset) -> str:
    return f"{preset.clip.name}/{preset.clip.pretrained}" if preset.clip.pretrained else "data/shapes_clip"


def uses_vgg(preset: Preset) -> bool:
    return preset.vqgan_train.perceptual == "lpips"


def all_weights() -> list[Weights]:
    """Every weights file that a preset or a metric asks for, whether it is here or not."""
    found = []
    for name, preset in {clip_name(preset): preset for preset in PRESETS.values()}.items():
        is_here = find_weights(preset.clip.name, preset.clip.pretrained) is not None
        cure = "open_clip downloads them on first use, or copy its Hugging Face cache here"
        if preset.clip.name == EMBEDDED:
            cure = f"restore {DATA / 'shapes_clip'} from the repository"
        users = ", ".join(other for other, p in PRESETS.items() if p.clip == preset.clip)
        found.append(Weights(name, f"CLIP of {users}", is_here, cure))
    is_here = (DATA / "shapes_generator" / "model.safetensors").is_file()
    cure = "restore it from the repository, or make it: clipgen run --preset reference, then clipgen export"
    found.append(Weights("data/shapes_generator", 'TextToImage.from_pretrained("shapes")', is_here, cure))
    for weights, used_by in (
        (FID_INCEPTION, "FID protocols inception, clean, torchmetrics"),
        (TORCHVISION_INCEPTION, "FID protocol dmgan"),
        (ALEXNET, "LPIPS as a metric"),
        (VGG16, "LPIPS as a loss: " + ", ".join(name for name, preset in PRESETS.items() if uses_vgg(preset))),
    ):
        cure = f"put it into {hub_folder()}, from {weights.source}"
        found.append(Weights(weights.file, used_by, (hub_folder() / weights.file).is_file(), cure))
    return found


def need(preset: Preset) -> Need:
    """What the two trainings of a preset take on one device; the module's docstring says what is assumed."""
    config, size = preset.vqgan, preset.vqgan.image_size
    clip_dim, clip_size = (512, 151e6) if preset.clip.pretrained else (256, 6e6)  # ViT-B/32, the embedded CLIP
    with torch.device("meta"):
        vqgan, transformer = (
            VQGAN(config),
            ImageTransformer(preset.transformer, config.codebook_size, config.side**2, clip_dim),
        )
        critic = PatchDiscriminator(preset.vqgan_train.discriminator_channels, preset.vqgan_train.discriminator_layers)
        vgg = vgg16().features.requires_grad_(False) if uses_vgg(preset) else nn.Identity()

        def vqgan_loss() -> torch.Tensor:
            fake, quantized = vqgan(torch.empty(1, 3, size, size))
            return quantized.commitment_loss + critic(fake).mean() + vgg(fake).mean()

        def transformer_loss() -> torch.Tensor:
            tokens = torch.zeros(1, config.side**2, dtype=torch.long)
            return F.cross_entropy(transformer(torch.empty(1, clip_dim), tokens).flatten(0, 1), tokens.flatten())

        first = _stage(nn.ModuleList([vqgan, critic]), vqgan_loss, preset.vqgan_train, KEPT["vqgan"])
        second = _stage(transformer, transformer_loss, preset.transformer_train, KEPT["transformer"])
    frozen = 4 * (clip_size + _size(vgg)) / 1e9
    gigabytes = 1.5 + frozen + max(first[0], second[0])
    return Need(_size(vqgan) + _size(transformer), gigabytes, first[1] + second[1])


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _stage(trained: nn.Module, loss, train, share: float) -> tuple[float, float]:
    """GB and operations of one stage."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[id(tensor)] = tensor  # held, so that no other tensor gets its number
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()
    activations = sum(tensor.nbytes for tensor in kept.values()) * share * train.batch_size / train.accumulate
    return (20 * _size(trained) + activations) / 1e9, counter.get_total_flops() * train.batch_size * train.steps


def verdict(preset: Preset, machine: Machine) -> tuple[bool, str]:
    """Whether a preset fits the machine's memory, and why."""
    parameters, gigabytes, operations = need(preset)
    seconds = operations / (1e11 * machine.cores)
    memory, place = (
        min((size for _, size in machine.gpus), default=machine.ram),
        "the GPU" if machine.gpus else "memory",
    )
    reason = f"{parameters / 1e6:,.1f}M parameters, {gigabytes:.1f} of {memory:.0f} GB of {place}, {operations:.1e} operations"
    if machine.gpus:
        return gigabytes <= memory, reason
    return gigabytes <= memory and seconds <= LONGEST, f"{reason}: {seconds / 3600:,.1f} hours on {machine.cores} cores"


def report(machine: Machine | None = None) -> tuple[str, str]:
    """The page, and what keeps the laptop preset from running here: a sentence, or nothing."""
    machine, weights = machine or this_machine(), all_weights()
    missing = {entry.name: entry for entry in weights if not entry.is_here}
    gpus = "".join(f"; cuda:{i} {name}, {size:.0f} GB" for i, (name, size) in enumerate(machine.gpus))
    lines = [
        f"machine    {machine.cores} cores, {machine.ram:.0f} GB of memory, {machine.disk:.0f} GB of disk free at {RESULTS}",
        f"devices    cpu{gpus or ' (torch sees no GPU)'}",
        "versions   " + ", ".join(f"{name} {found}" for name, found in versions().items()),
        f"\n{'weights':38}{'here':6}for",
    ]
    for entry in weights:
        lines.append(f"{entry.name:38}{'yes' if entry.is_here else 'no':6}{entry.used_by}")
        lines += [] if entry.is_here else [f"{'':44}{entry.cure}"]
    lines.append(f"\n{'preset':12}{'fits':6}an estimate for the trainings; clipgen_lib/doctor.py says what it assumes")
    problem = ""
    for name, preset in PRESETS.items():
        fits, reason = verdict(preset, machine)
        wanted = [clip_name(preset)] + ([VGG16.file] if uses_vgg(preset) else [])
        absent = [name for name in wanted if name in missing]
        lines.append(
            f"{name:12}{'yes' if fits else 'no':6}{reason}" + (f"; needs {' and '.join(absent)}" if absent else "")
        )
        if name == "laptop" and (absent or not fits):
            problem = (
                f"the laptop preset lacks {absent[0]}: {missing[absent[0]].cure}"
                if absent
                else f"the laptop preset does not fit: {reason}"
            )
    return "\n".join(lines), problem
