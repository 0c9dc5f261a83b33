"""Speed of the stages beside what one would run instead, and beside what the machine can do: `clipgen bench`.

In: a device. Out: results/speed/cpu.json or gpu.json. A section is a function of a device and the limits of the machine, which
are measured just before it; what it returns has a `table` of `timing.row`s, each with what was asked for beside what was reached.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from .bench_growth import growth
from .bench_memory import memory
from .bench_passes import evaluation, extraction
from .bench_sampling import sampling
from .bench_start import startup
from .bench_training import transformer, vqgan
from .runs import read_json, write_json
from .timing import DTYPES, is_met, limits, machine

SECTIONS: dict[str, Callable[..., dict]] = {
    "sampling": sampling, "transformer": transformer, "vqgan": vqgan, "extraction": extraction, "evaluation": evaluation,
    "start": startup, "memory": memory, "growth": growth,
}  # fmt: skip


def run(only: tuple[str, ...], output: Path, device: torch.device, rounds: int = 3) -> dict:
    """Measure sections, all where none is named, and write each as it ends; those that are in the file and not run stay.

    Returns:
        what the file holds: for each section what it found, with the machine and its limits in the same run.
    """
    path = output / ("gpu.json" if device.type == "cuda" else "cpu.json")
    found = read_json(path) if path.exists() else {}
    for name in only or SECTIONS:
        before, reached = machine(device), limits(device)
        measured = SECTIONS[name](device, reached, rounds)
        found[name] = {"machine": {**before, "load_after": os.getloadavg()[0]}, "limits": reached, **measured}
        found = {name: found[name] for name in SECTIONS if name in found}
        write_json(path, found)
    return found


def lines_of(found: dict) -> str:
    """The tables of a results file, every goal beside what was reached."""
    return "\n\n".join(_lines(name, part) for name, part in found.items())


def _lines(name: str, part: dict) -> str:
    where, reached = part["machine"], part["limits"]
    peaks = ", ".join(f"matmul {dtype} {reached[f'matmul_{dtype}'] / 1e9:.0f} GFLOP/s" for dtype in DTYPES)
    lines = [f"{name}: {where['device']}, {where['threads']} threads, load {where['load']:.1f} to {where['load_after']:.1f}; {peaks}, copy {reached['copy'] / 1e9:.1f} GB/s"]  # fmt: skip
    wide = [max(len(line[key]) for line in part["table"]) for key in ("what", "peer")]
    for line in part["table"]:
        cells = f"{line['what']:{wide[0]}}  {line['peer']:{wide[1]}}  {shown(line['value'], line['unit']):26}  "
        lines.append(f"{cells}{_asked(line)}".rstrip())
    return "\n".join(lines + [f"{peer}: {version}" for peer, version in where["peers"].items()])


def shown(value: dict[str, float], unit: str) -> str:
    """Median with least and most, in their unit."""
    scaled = [value[key] * (100 if unit == "%" else 1) for key in ("median", "least", "most")]
    median, least, most = (f"{x:,.0f}" if x >= 1_000 else f"{x:.3g}" for x in scaled)
    return f"{median}{unit if unit in 'x%' else ' ' + unit}" + (f" ({least} to {most})" if least != most else "")


def _asked(line: dict) -> str:
    if line["asked"] is None:
        return ""
    bound = shown(dict.fromkeys(("median", "least", "most"), line["asked"]), line["unit"])
    return f"{'at most' if line['most'] else 'at least'} {bound}: {'met' if is_met(line) else 'not met'}"
