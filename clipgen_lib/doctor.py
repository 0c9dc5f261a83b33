"""What this machine has, which weights are here, and which preset fits, on one page. Nothing is downloaded, no weights are read.

The memory of a training is an estimate for its larger stage: 20 bytes for each trained parameter (weights, gradients, two
moments of AdamW and the EMA, in float32), the float32 tensors that autograd keeps of one pass on the meta device (of which
autocast leaves 0.85 in the VQGAN, whose norms stay in float32, and 0.35 in the transformer, whose attention keeps no maps on
a GPU), the frozen networks, and 1.5 GB for Python and the driver. Operations are three times those that torch counts in one
forward pass of each stage, times batch and steps; a CPU core is taken to do 10^11 in a second.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import vgg16

from .clip_embed import find_weights
from .config import PRESETS, Preset, load_preset
from .runtime.checkpoints import ALEXNET, FID_INCEPTION, TORCHVISION_INCEPTION, VGG16, hub_folder
from .runtime.kernels import has_bf16
from .runtime.runs import DATA, RESULTS, versions
from .train_vqgan import PatchDiscriminator
from .transformer import ImageTransformer
from .vqgan import VQGAN

LONGEST_DAYS = 3  # of a training on a CPU before this page calls it too long


class Machine(NamedTuple):
    """Sizes are in GB of 10^9 bytes."""

    cores: int
    ram: float
    disk: float  # free where results/ lies
    gpus: tuple[tuple[str, float], ...] = ()  # name and memory of each


class Need(NamedTuple):
    parameters: int  # of both trained networks
    gigabytes: float
    operations: float  # of both trainings


def this_machine() -> Machine:
    disk = shutil.disk_usage(next(folder for folder in (RESULTS, *RESULTS.parents) if folder.exists())).free / 1e9
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = tuple((gpu.name, gpu.total_memory / 1e9) for gpu in found)
    return Machine(os.cpu_count() or 1, psutil.virtual_memory().total / 1e9, disk, gpus)


def weights_of(preset: Preset) -> list[str]:
    """Names of the weights without which a preset's training does not begin."""
    clip = f"{preset.clip.name}/{preset.clip.pretrained}" if preset.clip.pretrained else "data/shapes_clip"
    return [clip, VGG16.file] if preset.vqgan_train.perceptual == "lpips" else [clip]


def missing_weights() -> dict[str, str]:
    """Every weights file that a preset or a metric asks for: its name, and where it is not here how to get it, else an empty text."""
    known = []  # name, whether it is here, how to get it
    for preset in map(load_preset, PRESETS):
        cure = "open_clip downloads it on first use, or copy its Hugging Face cache here"
        cure = cure if preset.clip.pretrained else f"restore {DATA / 'shapes_clip'} from the repository"
        known.append((weights_of(preset)[0], find_weights(preset.clip.name, preset.clip.pretrained), cure))
    cure = "restore it from the repository: clipgen generate needs it"
    known.append(("data/shapes_generator", (DATA / "shapes_generator" / "model.safetensors").is_file(), cure))
    uses = (VGG16, "LPIPS loss"), (ALEXNET, "LPIPS"), (FID_INCEPTION, "FID"), (TORCHVISION_INCEPTION, "protocol dmgan")
    for file, use in uses:
        cure = f"for {use}: put it into {hub_folder()}, from {file.source}"
        known.append((file.file, (hub_folder() / file.file).is_file(), cure))
    return {name: "" if is_here else cure for name, is_here, cure in known}


@cache
def need(preset: Preset) -> Need:
    """What the two trainings of a preset take on one device; the module's docstring says what is assumed."""
    config, train = preset.vqgan, preset.vqgan_train
    clip_dim, clip_size = (512, 151e6) if preset.clip.pretrained else (256, 6e6)  # ViT-B/32, the embedded CLIP
    with torch.device("meta"):
        vqgan, critic = VQGAN(config), PatchDiscriminator(train.discriminator_channels, train.discriminator_layers)
        transformer = ImageTransformer(preset.transformer, config.codebook_size, config.side**2, clip_dim)
        vgg = vgg16().features.requires_grad_(False) if VGG16.file in weights_of(preset) else nn.Identity()

        def vqgan_pass() -> object:
            fake, _ = vqgan(torch.empty(1, 3, config.image_size, config.image_size))
            return critic(fake), vgg(fake)

        embeds, tokens = torch.empty(1, clip_dim), torch.zeros(1, config.side**2, dtype=torch.long)
        transformer_pass = lambda: transformer(embeds, tokens).log_softmax(-1)
        kept, operations = zip(_one_pass(vqgan_pass), _one_pass(transformer_pass), strict=True)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (vqgan, transformer, critic, vgg)]
    trained, gigabytes, total = (sizes[0] + sizes[2], sizes[1]), [], 0.0
    for i, (stage, share) in enumerate(((train, 0.85), (preset.transformer_train, 0.35))):
        gigabytes.append((20 * trained[i] + share * kept[i] * stage.batch_size / stage.accumulate) / 1e9)
        total += 3 * operations[i] * stage.batch_size * stage.steps
    return Need(sizes[0] + sizes[1], 1.5 + 4 * (clip_size + sizes[3]) / 1e9 + max(gigabytes), total)


def _one_pass(forward: Callable[[], object]) -> tuple[int, int]:
    """Bytes that autograd keeps for the backward pass of one image, and operations of the forward pass."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[id(tensor)] = tensor  # held, so that no other tensor gets its number
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward()
    return sum(tensor.nbytes for tensor in kept.values()), counter.get_total_flops()


def fit(preset: Preset, machine: Machine) -> tuple[bool, str]:
    """Whether the trainings of a preset fit a machine, and why."""
    parameters, gigabytes, operations = need(preset)
    place, memory = min((("GPU", size) for _, size in machine.gpus), default=("memory", machine.ram))
    reason = f"{parameters / 1e6:.1f}M parameters, {gigabytes:.1f} of {memory:.0f} GB of {place}, {operations:.0e} operations"
    if machine.gpus:
        return gigabytes <= memory, reason
    days = operations / (1e11 * machine.cores) / 86_400
    return gigabytes <= memory and days <= LONGEST_DAYS, f"{reason}, {days:,.2f} days on {machine.cores} cores"


def report(machine: Machine | None = None) -> tuple[str, str]:
    """The page, and what keeps the laptop preset from running here: a sentence, or nothing."""
    machine, weights, problem = machine or this_machine(), missing_weights(), ""
    gpus = "".join(f"; cuda:{i} {name}, {size:.0f} GB" for i, (name, size) in enumerate(machine.gpus))
    bfloat16 = "with" if has_bf16(torch.device("cpu")) else "without"
    lines = [
        f"machine    {machine.cores} cores, {machine.ram:.0f} GB of memory, {machine.disk:.0f} GB of disk free at {RESULTS}",
        f"devices    cpu {bfloat16} bfloat16{gpus or ' (torch sees no GPU)'}",
        "versions   " + ", ".join(f"{name} {found}" for name, found in versions().items()),
        "\nweights",
        *(f"{name:38}{'missing; ' + cure if cure else 'here'}" for name, cure in weights.items()),
        f"\n{'preset':12}{'fits':6}by an estimate for its trainings, which are faster with bfloat16; clipgen_lib/doctor.py says what it assumes",
    ]
    for name in PRESETS:
        preset = load_preset(name)
        fits, reason = fit(preset, machine)
        absent = [file for file in weights_of(preset) if weights[file]]
        lines.append(f"{name:12}{'yes' if fits else 'no':6}{reason}{' needs ' if absent else ''}{' and '.join(absent)}")
        if name == "laptop" and (absent or not fits):
            why = f"lacks {absent[0]}: {weights[absent[0]]}" if absent else f"does not fit: {reason}"
            problem = f"the laptop preset {why}"
    return "\n".join(lines), problem
