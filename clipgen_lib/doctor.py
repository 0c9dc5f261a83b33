"""What this machine has, which weights are here, and which preset fits, on one page. Nothing is downloaded, no weights are read.

NEEDS holds what the trainings of a preset take, an estimate that tests/test_doctor.py computes. A CPU core is taken to do 10^11
operations in a second.
"""

import os
import shutil
from typing import NamedTuple

import psutil
import torch

from .clip_embed import find_weights
from .config import PRESETS, Preset, load_preset
from .runtime.checkpoints import ALEXNET, FID_INCEPTION, TORCHVISION_INCEPTION, VGG16, hub_folder
from .runtime.kernels import has_bf16
from .runtime.runs import DATA, RESULTS, versions

LONGEST_DAYS = 3  # of a training on a CPU before this page calls it too long


class Machine(NamedTuple):
    """Sizes are in GB of 10^9 bytes."""

    cores: int
    ram: float
    disk: float  # free where results/ lies
    gpus: tuple[tuple[str, float], ...] = ()  # name and memory of each


class Need(NamedTuple):
    parameters: float  # of both trained networks, in millions
    gigabytes: float  # of the device's memory, by the larger of the two trainings
    operations: float  # of both trainings


NEEDS = {
    "smoke": Need(0.2, 1.5, 1.2e11),
    "laptop": Need(2.0, 1.6, 1.0e14),
    "reference": Need(6.2, 2.3, 1.4e15),
    "fashion": Need(2.5, 2.0, 3.8e14),
    "gpu64": Need(116.0, 19.1, 3.2e18),
    "coco": Need(408.6, 53.0, 4.7e19),
    "imagenet": Need(408.6, 53.0, 2.1e20),
}


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


def fit(preset: str, machine: Machine) -> tuple[bool, str]:
    """Whether the trainings of a preset fit a machine, and why."""
    parameters, gigabytes, operations = NEEDS[preset]
    place, memory = min((("GPU", size) for _, size in machine.gpus), default=("memory", machine.ram))
    reason = f"{parameters}M parameters, {gigabytes} of {memory:.0f} GB of {place}, {operations:.0e} operations"
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
        f"\n{'preset':12}{'fits':6}by an estimate for its trainings, which are faster with bfloat16; tests/test_doctor.py computes it",
    ]
    for name in PRESETS:
        fits, reason = fit(name, machine)
        absent = [file for file in weights_of(load_preset(name)) if weights[file]]
        lines.append(f"{name:12}{'yes' if fits else 'no':6}{reason}{' needs ' if absent else ''}{' and '.join(absent)}")
        if name == "laptop" and (absent or not fits):
            why = f"lacks {absent[0]}: {weights[absent[0]]}" if absent else f"does not fit: {reason}"
            problem = f"the laptop preset {why}"
    return "\n".join(lines), problem
