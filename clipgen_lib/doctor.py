"""What this machine has and which preset fits it, before anything is trained.

In: nothing, or a `Machine`. Out: facts as plain data, and a table of them as text. Nothing is downloaded, no network is asked
and no weights are read.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement

from .clip_embed import EMBEDDED, find_weights
from .config import PRESETS, ClipConfig, Preset, load_preset
from .cost import count, need
from .runtime.checkpoints import ALEXNET, FID_INCEPTION, TORCHVISION_INCEPTION, VGG16, Weights, hub_folder
from .runtime.runs import DATA, RESULTS, ROOT, versions

CORE_SPEED = (
    100e9  # operations a second and core that the trainings of `laptop` and `reference` reach or pass in bfloat16
)


LONGEST_DAYS = 3.0  # of a training on a CPU before this page calls it too long


@dataclass(frozen=True)
class Machine:
    """Sizes are in GB of 10^9 bytes."""

    cores: int
    ram: float
    disk: float  # free where results/ lies
    gpus: tuple[tuple[str, float], ...] = ()  # name and memory of each that torch sees
    others: tuple[str, ...] = ()  # devices that torch sees beside these, such as mps


@dataclass(frozen=True)
class File:
    """Weights that something here asks for."""

    name: str
    serves: str
    path: Path | None  # where they lie; None where they are not on this machine
    cure: str


def this_machine() -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    place = next(folder for folder in (RESULTS, *RESULTS.parents) if folder.exists())
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    others = ("mps",) if torch.backends.mps.is_available() else ()
    return Machine(
        cores, _ram(), shutil.disk_usage(place).free / 1e9, tuple((g.name, g.total_memory / 1e9) for g in gpus), others
    )


def _ram() -> float:
    """GB of memory, or what the container is allowed of it."""
    import psutil

    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else ""
    return min(psutil.virtual_memory().total, int(allowed) if allowed.isdigit() else 1 << 62) / 1e9


def weights_here(presets: tuple[str, ...] = tuple(PRESETS)) -> list[File]:
    """Every weights file that a preset, a protocol or a metric asks for, whether it is here or not."""
    users: dict[ClipConfig, list[str]] = {}
    for name in presets:
        users.setdefault(load_preset(name).clip, []).append(name)
    found = []
    for clip, names in users.items():
        cure = (
            "restore data/shapes_clip from the repository"
            if clip.name == EMBEDDED
            else "open_clip downloads them on first use, or copy its Hugging Face cache here"
        )
        found.append(
            File(clip_name(clip), f"CLIP of {', '.join(names)}", find_weights(clip.name, clip.pretrained), cure)
        )
    folder = DATA / "shapes_generator"
    whole = all((folder / name).is_file() for name in ("config.json", "model.safetensors"))
    cure = "restore it from the repository, or make it: clipgen run --preset reference, then clipgen export --to data/shapes_generator"
    found.append(File(_short(folder), 'TextToImage.from_pretrained("shapes")', folder if whole else None, cure))
    for weights, serves in (
        (FID_INCEPTION, "FID protocols inception, clean, torchmetrics"),
        (TORCHVISION_INCEPTION, "FID protocol dmgan"),
        (ALEXNET, "LPIPS as a metric"),
        (VGG16, "LPIPS as a loss: " + ", ".join(name for name in presets if _needs_vgg(load_preset(name)))),
    ):
        found.append(_hub_file(weights, serves))
    return found


def _hub_file(weights: Weights, serves: str) -> File:
    path = hub_folder() / weights.file
    return File(
        weights.file,
        serves,
        path if path.is_file() else None,
        f"put it into {_short(hub_folder())}, from {weights.source}",
    )


def clip_name(clip: ClipConfig) -> str:
    return f"{clip.name}/{clip.pretrained}" if clip.pretrained else _short(ROOT / "data" / "shapes_clip")


def missing_packages() -> list[str]:
    """Packages of the library and its notebooks that are not installed or too old, each with what is asked for."""
    found = []
    for text in importlib.metadata.requires("clipgen_lib") or []:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": "notebooks"}):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True):
                continue
        found.append(f"{wanted.name}{wanted.specifier}")
    return found


@dataclass(frozen=True)
class Verdict:
    preset: str
    fits: bool  # the machine; files may still be missing
    missing: tuple[str, ...]  # files without which its training does not begin
    reason: str


def verdicts(machine: Machine, files: list[File]) -> list[Verdict]:
    """Whether each preset fits, and why, in the order of the presets."""
    return [_verdict(name, machine, files) for name in PRESETS]


def _verdict(name: str, machine: Machine, files: list[File]) -> Verdict:
    preset = load_preset(name)
    absent = {file.name for file in files if file.path is None}
    wanted = [clip_name(preset.clip)] + ([VGG16.file] if _needs_vgg(preset) else [])
    missing = tuple(name for name in wanted if name in absent)
    fits, reason = _fit(preset, machine)
    if fits and missing:
        reason += f"; first needs {' and '.join(missing)}"
    return Verdict(name, fits, missing, reason)


def _fit(preset: Preset, machine: Machine) -> tuple[bool, str]:
    days = 0.0 if machine.gpus else days_on_cpu(preset, machine.cores)
    if days > LONGEST_DAYS:
        return (
            False,
            f"needs a GPU of {need(preset).device:.0f} GB; stage 2 alone would last {_time(days)} on {_cores(machine)}",
        )
    asked, each = need(preset, len(machine.gpus)), "each" if len(machine.gpus) > 1 else "the"
    if asked.disk > machine.disk:
        return False, f"needs {asked.disk:.2g} GB of disk for checkpoints, {machine.disk:.2g} GB are free"
    if asked.ram > machine.ram:
        return False, f"needs {asked.ram:.1f} GB of memory, there are {machine.ram:.1f} GB"
    if not machine.gpus:
        return (
            True,
            f"takes {asked.ram:.1f} of {machine.ram:.0f} GB of memory; stage 2 lasts about {_time(days)} on {_cores(machine)}",
        )
    smallest = min(size for _, size in machine.gpus)
    if asked.device > smallest:
        return False, f"needs {asked.device:.0f} GB on {each} GPU, there are {smallest:.0f} GB"
    return True, f"takes {asked.device:.0f} of {smallest:.0f} GB on {each} GPU, with {asked.pictures} images a pass"


def days_on_cpu(preset: Preset, cores: int) -> float:
    """Days of stage 2 on a CPU: its counted operations at 10^11 a second and core."""
    stage2 = preset.transformer_train
    return count(preset)["transformer"] * stage2.batch_size * stage2.steps / (CORE_SPEED * cores) / 86_400


def _needs_vgg(preset: Preset) -> bool:
    return preset.vqgan_train.perceptual == "lpips"


def _cores(machine: Machine) -> str:
    return f"{machine.cores} core{'s' if machine.cores > 1 else ''}"


def _time(days: float) -> str:
    for size, unit in ((365, "years"), (1, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= 1.5 * size:
            return f"{days / size:,.0f} {unit}"
    return "a minute"


def lacks(machine: Machine, files: list[File], packages: list[str]) -> str:
    """What keeps the laptop preset from running here, as one sentence; empty where nothing does."""
    laptop = _verdict("laptop", machine, files)
    if packages:
        return f"packages are missing or too old ({', '.join(packages)}): run pip install --editable '.[notebooks]'"
    if laptop.missing:
        cure = next(file.cure for file in files if file.name == laptop.missing[0])
        return f"the laptop preset lacks {laptop.missing[0]}: {cure}"
    return "" if laptop.fits else f"the laptop preset does not fit: {laptop.reason}"


def report(machine: Machine, files: list[File], packages: list[str]) -> str:
    """The whole page as text, a dozen lines and a few."""
    gpus = [f"cuda:{i} {name}, {size:.0f} GB" for i, (name, size) in enumerate(machine.gpus)]
    lines = [
        f"machine    {_cores(machine)}, {machine.ram:.0f} GB of memory, {machine.disk:.0f} GB of disk free at {_short(RESULTS)}",
        f"devices    {'; '.join(['cpu', *machine.others, *gpus])}" + ("" if gpus else " (torch sees no GPU)"),
        "versions   " + ", ".join(f"{name} {found}" for name, found in versions().items()),
    ]
    lines += [f"missing    {package}" for package in packages]
    lines += ["", f"{'weights':38}{'here':6}for"]
    for file in files:
        lines.append(f"{file.name:38}{'yes' if file.path else 'no':6}{file.serves}")
        if file.path is None:
            lines.append(f"{'':44}{file.cure}")
    lines += ["", f"{'preset':12}{'fits':6}why (an estimate; clipgen_lib/doctor.py says what it assumes)"]
    found = verdicts(machine, files)
    lines += [f"{v.preset:12}{'yes' if v.fits else 'no':6}{v.reason}" for v in found]
    ready = [v.preset for v in found if v.fits and not v.missing]
    if ready:
        lines += ["", f"largest that can begin now: clipgen run --preset {ready[-1]}"]
    return "\n".join(lines)


def diagnose() -> tuple[str, str]:
    """The page for this machine, and what keeps the laptop preset from running on it: a sentence, or nothing."""
    machine, files, packages = this_machine(), weights_here(), missing_packages()
    return report(machine, files, packages), lacks(machine, files, packages)


def _short(path: Path) -> str:
    """A path as it is told: from the project's root or from home where it lies there."""
    for base, shown in ((ROOT, ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return f"{shown}{path.relative_to(base)}"
    return str(path)
