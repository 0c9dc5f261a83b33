"""Measurements of what grows with the data: here the token store.

In: a folder on the disk that is measured, and numbers of rows. Out: figures for a JSON file, with the versions they hold for.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .runs import ClipgenError, progress, versions, write_json
from .store import FILES, TokenStore, shard_span


def store_speed(
    folder: Path, rows: int = 10_000_000, tokens: int = 64, dim: int = 256, batch_size: int = 256, batches: int = 2_000,
    repeats: int = 5, smaller: tuple[int, ...] = (100_000, 1_000_000), show_progress: bool = True,
) -> dict:  # fmt: skip
    """How fast a synthetic store opens and gives random batches, and what memory a process that reads it takes.

    Rows are random bits on the disk, written shard by shard as an extraction does. The peer is numpy alone: the same rows in
    one flat file for tokens and one for embeddings, `np.memmap`, indexed by the rows. Everything is deleted again.

    Args:
        folder: a new folder, made and deleted; the files take about 2 rows * (2 tokens + 2 dim + 4) bytes.
        batches: that are read in each of `repeats` rounds; a read gives int64 tokens and unit-norm float32 embeddings.
        smaller: further numbers of rows whose memory is measured.

    Returns:
        `open_seconds`; for `store` and `peer` the rows per second, `cold` (one round, the kernel having dropped the files'
        pages) and `warm` (all pages read before); for each number of rows in `memory` the resident bytes of a fresh process
        that has read the batches: its `own`, and those of `files`, which the kernel takes back when it likes.

    Raises:
        ClipgenError: the folder exists.
    """
    if folder.exists():
        raise ClipgenError(f"{folder} exists: give a new folder, which is deleted when all is measured")
    found: dict = {"rows": rows, "tokens": tokens, "dim": dim, "batch_size": batch_size, "batches": batches, "repeats": repeats}
    try:
        counts = sorted({*smaller, rows})
        with progress(sum(counts), "writing synthetic stores", show_progress) as bar:
            for n in counts:
                synthetic_store(folder / str(n), n, tokens, dim, bar.update)
        _flat_copy(TokenStore.open(folder / str(rows)), folder / "flat")
        _forget(folder)  # while no page of it is mapped
        store = TokenStore.open(folder / str(rows))
        found["shards"] = len(store.meta["shards"])
        found["bytes"] = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
        found["open_seconds"] = _spread([_seconds(TokenStore.open, store.folder) for _ in range(repeats)])
        flat = _flat_arrays(folder / "flat", store)
        readers = {"store": lambda chosen: (store.tokens(chosen), store.embeds(chosen)), "peer": lambda chosen: _by_numpy(flat, chosen)}  # fmt: skip
        draws = [np.random.default_rng([1, i]).integers(0, rows, (batches, batch_size)) for i in range(repeats + 1)]
        cold = {name: _rate(read, draws[0]) for name, read in readers.items()}
        _read_through(folder)
        warm = {name: [] for name in readers}
        for chosen in draws[1:]:  # in turns, so that other work on the machine slows both
            for name, read in readers.items():
                warm[name].append(_rate(read, chosen))
        found |= {name: {"cold": cold[name], "warm": _spread(warm[name])} for name in readers}
        found["memory"] = {str(n): _memory(folder / str(n), batch_size, batches) for n in counts}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {**found, "machine": machine, "versions": {name: versions()[name] for name in ("python", "torch", "numpy")}}


def synthetic_store(
    folder: Path, rows: int, tokens: int, dim: int, told: Callable[[int], object] = lambda n: None, seed: int = 0
) -> None:
    """A store of random rows in the layout of `extract`, 1,024 codes. `told` is called with the rows of each shard written."""
    span, counts = shard_span(rows), []
    for shard, first in enumerate(range(0, rows, span)):
        draw, n = np.random.default_rng([seed, shard]), min(span, rows - first)
        parts = {
            "tokens": draw.integers(0, 1_024, (n, tokens), dtype=np.uint16),
            "embeds": (draw.random((n, dim), dtype=np.float32) - 0.5) * (12 / dim) ** 0.5,  # of about unit norm
            "rows": np.arange(first, first + n),
        }
        (folder / f"{shard:05d}").mkdir(parents=True)
        for key, (name, dtype) in FILES.items():
            parts[key].astype(dtype).tofile(folder / f"{shard:05d}" / name)
        counts.append(n)
        told(n)
    write_json(folder / "meta.json", {"N": rows, "L": tokens, "K": 1_024, "D": dim, "flip": False, "skipped": {}, "shards": counts})  # fmt: skip


def _flat_copy(store: TokenStore, folder: Path) -> None:
    """The tokens and embeddings of a store, each in one file."""
    folder.mkdir()
    for key in ("tokens", "embeds"):
        with open(folder / FILES[key][0], "wb") as stream:
            for part in store.arrays[key].parts:
                part.tofile(stream)


def _flat_arrays(folder: Path, store: TokenStore) -> dict[str, np.memmap]:
    return {key: np.memmap(folder / FILES[key][0], FILES[key][1], "r").reshape(len(store), -1) for key in ("tokens", "embeds")}


def _by_numpy(flat: dict[str, np.memmap], rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What a store gives, by plain indexing."""
    tokens = torch.from_numpy(flat["tokens"][rows].astype(np.int64))
    return tokens, torch.nn.functional.normalize(torch.from_numpy(flat["embeds"][rows].astype(np.float32)), dim=-1)


def _rate(read: Callable[[np.ndarray], object], chosen: np.ndarray) -> float:
    """Rows per second of batches of rows, chosen (batches, batch_size)."""
    start = time.perf_counter()
    for batch in chosen:
        read(batch)
    return chosen.size / (time.perf_counter() - start)


def _seconds(action: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def _forget(folder: Path) -> None:
    """Bring the files of a folder to disk and tell the kernel that their pages are not needed."""
    for path in sorted(folder.rglob("*.*")):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_through(folder: Path) -> None:
    for path in sorted(folder.rglob("*.*")):
        with open(path, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def _memory(store: Path, batch_size: int, batches: int) -> dict[str, int]:
    """Resident bytes of a fresh process after random batches of a store: its own, and of the files."""
    command = "import sys; from clipgen_lib.scale import print_memory; print_memory(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", command, str(store), str(batch_size), str(batches)],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return json.loads(done.stdout)


def print_memory(store: str, batch_size: str, batches: str) -> None:
    """Read random batches of a store and print what memory this process has then, as JSON."""
    opened = TokenStore.open(Path(store))
    chosen = np.random.default_rng(0).integers(0, len(opened), (int(batches), int(batch_size)))
    _rate(lambda rows: (opened.tokens(rows), opened.embeds(rows)), chosen)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {"own": status["RssAnon"], "files": status["RssFile"]}
    print(json.dumps({key: 1024 * int(text.split()[0]) for key, text in kilobytes.items()}))
