"""Honest timing: ways that take turns, medians with their spread, and what the machine itself reaches.

In: what is to be timed, as functions without arguments. Out: seconds, ratios and rows of a table that says what was asked for.
Absolute seconds hold for one machine and one moment; two ways that are timed in turns (A B A B) suffer alike from other work.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .runs import progress, versions

PEERS = ("transformers", "pytorch-fid")  # what some ways need; the first is of the extra `bench`
ABSENT = "absent: install the extra `bench`"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def in_turns(
    actions: dict[str, Callable[[], object]], rounds: int, wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter, label: str = "",
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each action in each round, all actions in every round, after one call of each that does not count.

    Args:
        wait: called before a clock is read, such as `torch.cuda.synchronize`.
        label: of a progress bar; empty shows none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    with progress((rounds + 1) * len(actions), label, bool(label)) as bar:
        for number in range(rounds + 1):
            for name, action in actions.items():
                wait()
                start = clock()
                action()
                wait()
                if number:
                    seconds[name].append(clock() - start)
                bar.update()
    return seconds


def spread(values: list[float], times: float = 1.0) -> dict[str, float]:
    """Median, least and most of values, each `times` as large."""
    return {"median": times * float(np.median(values)), "least": times * min(values), "most": times * max(values)}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times as long they take as we do: the median over rounds, each pair measured at the same time, and its spread."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def waiter(device: torch.device) -> Callable[[], object]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


@torch.inference_mode()
def matmul_peak(device: torch.device, rounds: int = 10) -> dict[str, float]:
    """Operations a second of a large square matrix product, the best of some, by the name of its dtype.

    float32 as torch is set: on a GPU without TF32 unless that is switched on, while convolutions may use it.
    """
    side = 8_192 if device.type == "cuda" else 2_048
    squares = {name: torch.randn(side, side, device=device).to(dtype) for name, dtype in DTYPES.items()}
    seconds = in_turns({name: partial(torch.matmul, x, x) for name, x in squares.items()}, rounds, waiter(device))
    return {name: 2 * side**3 / min(values) for name, values in seconds.items()}


def limits(device: torch.device, rounds: int = 5) -> dict:
    """What the machine reaches: `matmul_peak`, and bytes/s, read and written, of a copy of 256 MB, a median."""
    source = torch.randn(256 * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = in_turns({"copy": lambda: target.copy_(source)}, rounds, waiter(device))["copy"]
    peaks = {f"matmul_{name}": value for name, value in matmul_peak(device).items()}
    return {**peaks, "copy": 2 * source.nbytes / float(np.median(seconds))}


def cpu_name() -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def machine(device: torch.device) -> dict:
    """What was measured on, and how much other work it had: the load of the last minute, in processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    found = {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    return {**found, "versions": {name: versions()[name] for name in ("python", "torch", "numpy")}, "peers": peers()}


def peers() -> dict[str, str]:
    """Version of each peer, or that it is absent."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ABSENT
    return found


def profiled(action: Callable[[], object], device: torch.device, top: int = 8) -> dict[str, float]:
    """Shares of the time of one call by operation, the largest first; on a GPU by kernel."""
    from torch.profiler import ProfilerActivity, profile

    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as profiler:
        action()
    times = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    total = sum(times.values())
    return {name: times[name] / total for name in sorted(times, key=times.get, reverse=True)[:top]}


def row(
    what: str, peer: str, value: dict[str, float], asked: float | None = None, most: bool = False, unit: str = "x"
) -> dict:  # fmt: skip
    """A line of the table: a value with its spread, beside what it was measured against and what was asked of it.

    Args:
        peer: what is run instead, or the limit of which it is a share.
        asked: at least, or with `most` at most; None where nothing is.
        unit: `x`, so many times as fast as the peer; `%`, a share; `s`; `GB`.
    """
    return {"what": what, "peer": peer, "value": value, "asked": asked, "most": most, "unit": unit}


def is_met(row: dict) -> bool | None:
    """Whether the median is what was asked for; None where nothing was."""
    median, asked = row["value"]["median"], row["asked"]
    return None if asked is None else median <= asked if row["most"] else median >= asked
