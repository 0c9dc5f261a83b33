"""Peak memory of every stage of every preset, measured: a section of `clipgen bench`.

In: a device. Out: GB of 10^9 bytes, each beside what `cost.stage_gigabytes` counts from the networks. A stage is measured in a
process of its own, by the project's own training steps on random pictures. Where the pictures of a pass would take too long, as on
a CPU, fewer are measured twice and a straight line is drawn through them: what a step keeps grows by the same for each picture.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .config import PRESETS, Preset, load_preset
from .cost import CUDA_GIGABYTES, count, stage_gigabytes
from .runs import progress
from .scale import STAGES, WORK, Enough, clip_of, in_a_pass, in_a_process, synthetic_store, with_pictures
from .timing import row, spread

CARD = 24.0  # GB that a step of the coco preset's transformer may take, its driver's context included
DIRECT = 5e11  # operations of a pass on a CPU that is measured as it is, at most: some five seconds
SMALLER = 5e11  # of the larger of two smaller passes, which has 2 pictures at least
STEPS = {"vqgan": 2, "transformer": 2}  # the moments of AdamW are there from the second on; other stages have one
PASSES = 2  # to a step, at most, where the preset has more: its gradients are there from the second on
ROWS = 2_000  # of a synthetic store; its length is not in memory

NOTES = (
    "GB are 10^9 bytes; a spread is not given: a step takes the same each time",
    "on a GPU what torch has allocated at most, on a CPU the most that was resident less what the process had with the library loaded",
    "a CPU's figure holds pages of code that the step is the first to use, some 0.05 GB",
    "autocast keeps other tensors in float32 on a CPU than on a GPU; sampling on a CPU packs a copy of the weights",
    "not in it: the context of a GPU's driver, processes that decode pictures, torch.compile on a CPU",
    "CLIP and VGG16 have random weights where the preset names ones to download",
    "extrapolated as a straight line: too flat where another moment of the stage is the largest at few pictures, as in drawing",
    "counted: cost.stage_gigabytes, parameters and tensors kept, and a tenth more",
)

Point = tuple[int, int]  # pictures in a pass, and of these the ones that the embedding loss decodes


def memory(
    device: torch.device, limits: dict, rounds: int = 1, presets: tuple[str, ...] = tuple(PRESETS), stages: tuple[str, ...] = STAGES
) -> dict:  # fmt: skip
    """Most memory that a step of each stage takes, in a pass of the preset's own number of pictures (`NOTES` say what that is).

    Args:
        rounds: not used: a step takes the same each time.

    Returns:
        `table`, `rounds` (1), `notes`, `same` (presets whose passes are those of another, which is measured in their place), and `details`:
        of each preset and stage `pictures`, `gigabytes`, `counted` by `cost` for this device, and the `points` that were
        measured, each with what is counted for it.
    """
    chosen, same = _distinct({name: load_preset(name) for name in presets})
    plan = {(name, stage): points(preset, stage, device.type) for name, preset in chosen.items() for stage in stages}
    work = {
        (*key, point): _operations(chosen[key[0]], key[1], point, device.type) for key, many in plan.items() for point in many
    }
    found: dict = {"table": [], "rounds": 1, "notes": NOTES, "same": same, "details": {name: {} for name in chosen}}
    with progress(round(sum(work.values())), "peak memory") as bar:
        for (name, stage), measured_at in plan.items():
            peaks = []
            for point in measured_at:
                peaks.append(peak_of(name, stage, point, device))
                bar.update(round(work[name, stage, point]))
            details = _details(chosen[name], stage, measured_at, peaks, device.type)
            found["details"][name][stage] = details
            names = [name, *(other for other, twin in same.items() if twin == name)]
            found["table"] += _rows(names, stage, details)
    return found


def _distinct(presets: dict[str, Preset]) -> tuple[dict[str, Preset], dict[str, str]]:
    """Presets without those whose passes are the same as an earlier one's, and which one that is."""
    kept: dict[str, Preset] = {}
    same: dict[str, str] = {}
    for name, preset in presets.items():
        twin = next((other for other, seen in kept.items() if _sizes(seen) == _sizes(preset)), None)
        if twin:
            same[name] = twin
        else:
            kept[name] = preset
    return kept, same


def _sizes(preset: Preset) -> tuple:
    """All of a preset that its memory depends on."""
    trains = tuple(
        replace(train, steps=0, batch_size=train.batch_size // train.accumulate, accumulate=min(train.accumulate, PASSES))
        for train in (preset.vqgan_train, preset.transformer_train)
    )
    return preset.clip, preset.vqgan, preset.transformer, *trains, preset.sample


# ---------------------------------------------------------------------------------------------- what is measured


def points(preset: Preset, stage: str, kind: str, direct: float = DIRECT, smaller: float = SMALLER) -> list[Point]:
    """Where a stage is measured: with the pictures that the preset has in a pass, or, where they take too long, with fewer.

    The embedding loss decodes some rows of a pass, whose number then grows on its own: a third point tells it apart.
    """
    whole, each = in_a_pass(preset, kind)[stage], count(preset)[stage]
    if kind == "cuda" or whole * each <= direct:
        return [(whole, _decoded(preset, stage, whole))]
    most = min(whole, max(2, int(smaller / each)))
    if not _decoded(preset, stage, whole):
        return [(most // 2, 0), (most, 0)]
    return [(most // 2, 1), (most, 1), (most, 2)]


def _decoded(preset: Preset, stage: str, pictures: int) -> int:
    train = preset.transformer_train
    return max(1, round(train.embedding_share * pictures)) if stage == "transformer" and train.embedding_weight else 0


def _operations(preset: Preset, stage: str, point: Point, kind: str) -> float:
    """GFLOP of a measurement, and as many as a second's for the start of its process."""
    passes = min(PASSES, {"vqgan": preset.vqgan_train, "transformer": preset.transformer_train}[stage].accumulate) if stage in STEPS else 1  # fmt: skip
    return STEPS.get(stage, 1) * passes * point[0] * count(preset)[stage] / 1e9 + (5e2 if kind == "cpu" else 5e4)


def extrapolated(measured_at: list[Point], values: list[float], wanted: Point) -> float:
    """The value at `wanted` of the plane, straight line or constant through what was measured."""
    basis = np.array([(1.0, *point) for point in measured_at])
    used = [0, *(i for i in (1, 2) if np.ptp(basis[:, i]) > 0)]
    weights = np.linalg.lstsq(basis[:, used], np.array(values), rcond=None)[0]
    return float(np.array((1.0, *wanted))[used] @ weights)


def _details(preset: Preset, stage: str, measured_at: list[Point], peaks: list[float], kind: str) -> dict:
    whole = in_a_pass(preset, kind)[stage]
    wanted = (whole, _decoded(preset, stage, whole))
    return {
        "pictures": whole, "gigabytes": extrapolated(measured_at, peaks, wanted) / 1e9,
        "counted": stage_gigabytes(preset, stage, whole, kind),
        "counted_cuda": stage_gigabytes(preset, stage, whole, "cuda"),
        "points": [
            {"pictures": n, "decoded": decoded, "gigabytes": peak / 1e9, "counted": stage_gigabytes(preset, stage, n, kind, decoded)}
            for (n, decoded), peak in zip(measured_at, peaks, strict=True)
        ],
    }  # fmt: skip


def _rows(names: list[str], stage: str, details: dict) -> list[dict]:
    """What was measured of a stage; of the one that is to fit a card also what is counted, both with the driver's context."""
    smaller = [point["pictures"] for point in details["points"]]
    how = "measured" if smaller == [details["pictures"]] else f"extrapolated from {' and '.join(map(str, sorted(set(smaller))))} pictures"  # fmt: skip
    what = f"{', '.join(names)}: {stage}, {details['pictures']} pictures"
    is_asked = "coco" in names and stage == "transformer"
    value = details["gigabytes"] + (CUDA_GIGABYTES if is_asked else 0)
    asked = CARD if is_asked else None
    peer = f"{how}; counted {details['counted']:.3g} GB" + (f"; with {CUDA_GIGABYTES:.0f} GB of a driver" if is_asked else "")
    found = [row(what, peer, spread([value]), asked, most=True, unit="GB")]
    if is_asked:
        counted = spread([details["counted_cuda"] + CUDA_GIGABYTES])
        found.append(
            row(what, f"counted for a GPU; with {CUDA_GIGABYTES:.0f} GB of a driver", counted, asked, most=True, unit="GB")
        )
    return found


# ---------------------------------------------------------------------------------------------- in a process of its own


def peak_of(name: str, stage: str, point: Point, device: torch.device) -> float:
    """Bytes that a stage of a preset takes at most in a fresh process."""
    return in_a_process("print_peak", name, stage, *point, device, module=__name__)["bytes"]


def print_peak(name: str, stage: str, pictures: str, decoded: str, device: str) -> None:
    """Take the steps of a stage and print the most memory they took, as JSON; then end at once."""
    import open_clip  # noqa: F401  what the stage loads anyway is no part of it

    os.environ["CLIPGEN_PROGRESS"] = "0"
    small = reduced(load_preset(name), stage, int(pictures), int(decoded), torch.device(device).type == "cpu")
    with tempfile.TemporaryDirectory() as place:
        taken = peak_while(lambda: _step(small, stage, int(pictures), device, Path(place)), torch.device(device))
    print(json.dumps({"bytes": taken}), flush=True)


def reduced(preset: Preset, stage: str, pictures: int, decoded: int, on_cpu: bool) -> Preset:
    """A preset with so many pictures in a pass of a stage, of which so many are decoded by the embedding loss."""
    each = in_a_pass(preset, "cpu" if on_cpu else "cuda") | {stage: pictures}
    small = with_pictures(preset, each, on_cpu, PASSES)
    shapes = replace(preset.shapes, n_train=2 * max(small.vqgan_train.batch_size, small.transformer_train.batch_size))
    share = decoded / pictures if decoded else small.transformer_train.embedding_share
    return replace(
        small, shapes=shapes, transformer_train=replace(small.transformer_train, embedding_share=share),
        sample=replace(small.sample, batch_size=each["sample"]),
    )  # fmt: skip


class _Ticks:
    """What counts the steps of a stage in place of a clock, and ends it after some."""

    def __init__(self, steps: int):
        self.left = steps

    def tick(self) -> None:
        self.left -= 1
        if not self.left:
            raise Enough


def _step(small: Preset, stage: str, pictures: int, device: str, place: Path) -> None:
    torch.manual_seed(0)
    clip, config, train = clip_of(small.clip, device), small.vqgan, small.vqgan_train
    if stage == "transformer":
        synthetic_store(place / "store", ROWS, config.side**2, clip.dim, codes=config.codebook_size)
    in_batch = train.batch_size if stage == "vqgan" else pictures
    with suppress(Enough):
        WORK[stage](small, device, clip, place, in_batch)(_Ticks(STEPS.get(stage, 1)))


def peak_while(action: Callable[[], object], device: torch.device) -> int:
    """Bytes that an action takes at most beyond what is taken before it: allocated on a GPU, resident in this process on a CPU.

    Linux alone tells the second; where it does not let the mark be set back, an earlier peak that is higher is no part of it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    action()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
