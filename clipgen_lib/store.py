"""The token store: every image once through both frozen encoders, kept as flat memory-mapped files.

In: images, a frozen VQGAN, a frozen CLIP image encoder. Out: a folder with meta.json, tokens.u16 (N, L), embeds.f16 (N, D) and
rows.i32 (N,), which says of which image each row is. Stage 2 trains from the store alone. No caption comes near it.
meta.json holds a SHA-256 over itself and the three files, which is checked when a store is opened.

An extraction writes each batch to its own place in files of full size, so that any number of processes, killed and started
again at will, write the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .clip_embed import ClipEmbedder
from .config import VQGANConfig
from .data.batches import dead_workers_told, image_batches
from .data.datasets import ImageSet
from .data.images import to_float
from .runtime import distributed
from .runtime.checkpoints import module_hash
from .runtime.runs import (
    ClipgenError,
    file_hash,
    fresh_folder,
    held,
    progress,
    read_json,
    reading,
    room_on_disk,
    shortened,
    stoppable,
    write_atomic,
    write_json,
)
from .vqgan import VQGAN

FILES = {"tokens": ("tokens.u16", np.uint16), "embeds": ("embeds.f16", np.float16), "rows": ("rows.i32", np.int32)}
SAVE_SECONDS = 5.0  # between two states on disk: after every batch a GPU would wait for the disk


@dataclass(frozen=True)
class TokenStore:
    """An opened store; rows are read by index, in any order, without loading the rest."""

    folder: Path
    meta: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: Path, vqgan: VQGAN | None = None, clip: ClipEmbedder | None = None) -> TokenStore:
        """Map a finished store.

        Its SHA-256 is computed by the first opening of a process, and again where a file has changed.

        Args:
            vqgan, clip: where given, the store must have been made by these very weights.

        Raises:
            ClipgenError: missing, unfinished or damaged store, one made by other weights, or no right to read it.
        """
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise ClipgenError(f"{folder} holds no finished token store: run the extraction (notebook 02) first")
        meta = read_json(folder / "meta.json")
        for kind, given in (("VQGAN", vqgan and module_hash(vqgan)), ("CLIP", clip and clip.weights_hash)):
            made_by = shortened(str(meta.get(f"{kind.lower()}_hash")))
            if given is not None and given != made_by:
                raise ClipgenError(f"{folder} is of another {kind} ({made_by}, not {given}): extract it again")
        again = "delete its folder and extract again"
        with reading(folder / "meta.json", again, again, "is of a damaged store"):
            if meta.get("hash") != _hash(folder, meta):
                raise ValueError("its hash differs from when it was written")
            return cls(folder, meta, {key: _mapped(folder, key, meta) for key in FILES})

    def __len__(self) -> int:
        return self.meta["N"]

    def tokens(self, rows: np.ndarray | slice) -> torch.Tensor:
        """(len(rows), L) int64."""
        return torch.from_numpy(self.arrays["tokens"][rows].astype(np.int64))

    def embeds(self, rows: np.ndarray | slice) -> torch.Tensor:
        """(len(rows), D) float32, unit-norm again after float16."""
        return F.normalize(torch.from_numpy(self.arrays["embeds"][rows].astype(np.float32)), dim=-1)

    @property
    def n_unmirrored(self) -> int:
        """Rows before the mirrored ones."""
        return len(self) // (2 if self.meta["flip"] else 1)

    def mean_embed(self) -> torch.Tensor:
        """Mean (D,) of all embeddings, of which few are in memory at a time."""
        parts = (self.embeds(slice(i, i + 65_536)).double().sum(0) for i in range(0, len(self), 65_536))
        return (sum(parts) / len(self)).float()

    def nearest(self, embed: torch.Tensor, k: int) -> np.ndarray:
        """The k rows whose images are nearest in CLIP space to one embedding (D,), nearest first."""
        return nearest(self.embeds(slice(None)), embed[None].cpu().float(), k)[0].numpy()


def nearest(bank: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    """Rows of a bank of unit vectors (M, D) nearest to each query (B, D) by cosine: (B, k) int64, nearest first."""
    return (queries @ bank.T).topk(min(k, len(bank)), dim=1).indices


# once for each state of a file; a pipe, which has no size, is not opened
_file_hash = lru_cache(maxsize=64)(lambda path, size, mtime: file_hash(path) if size else "")


def _hash(folder: Path, meta: dict) -> str:
    """16 hex digits of the SHA-256 over the entries of a meta.json, its own hash left out, and the hashes of the three files."""
    paths = [folder / name for name, _ in FILES.values()]
    hashes = [_file_hash(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps({**meta, "hash": hashes}, sort_keys=True).encode()).hexdigest()[:16]


def _row_shape(key: str, meta: dict) -> tuple[int, ...]:
    return {"tokens": (meta["L"],), "embeds": (meta["D"],), "rows": ()}[key]


def _row_bytes(key: str, meta: dict) -> int:
    return math.prod(_row_shape(key, meta)) * np.dtype(FILES[key][1]).itemsize


def _mapped(folder: Path, key: str, meta: dict) -> np.ndarray:
    name, dtype = FILES[key]
    return np.asarray(np.memmap(folder / name, dtype, "r", shape=(meta["N"], *_row_shape(key, meta))))


# ---------------------------------------------------------------------------------------------- extraction


@torch.inference_mode()
def extract(
    images: ImageSet, vqgan: VQGAN, clip: ClipEmbedder, folder: Path, flip: bool = False, workers: int = 0
) -> TokenStore:
    """Run both frozen encoders over all images, once, and return the opened store.

    A finished store of the same images and weights is opened as it is. An interrupted extraction resumes after the last
    batch on disk. With `flip`, mirrored images follow as rows of their own. Images that cannot be decoded have no row and
    are listed in meta.json. Of a launch, each process encodes an even share; all return the whole store.

    Raises:
        ClipgenError: the folder holds a store made from other images or by other weights, or other files; another
            process extracts into it; the disk is full; or (Stopped) SIGTERM or SIGINT has come.
        OSError: an image could not be read now; the same call resumes.
    """
    folder, partial = Path(folder), Path(folder).with_name(Path(folder).name + ".partial")
    meta = {
        "N": len(images) * (2 if flip else 1),
        "L": vqgan.config.side**2,
        "K": vqgan.config.codebook_size,
        "D": clip.dim,
        "vqgan_hash": module_hash(vqgan),
        "clip_hash": clip.weights_hash,
        "clip": clip.name,
        "data": images.name,
        "split": images.split,
        "data_hash": images.hash,
        "transform": f"short side {images.size}, centre crop",
        "flip": flip,
    }
    mark, size = folder / "meta.json", encode_batch_size(vqgan.config, clip.device)
    parts = [range(0, len(images)), range(len(images), meta["N"])]  # no batch has images and mirrored ones
    batches = [part[i : i + size] for part in parts for i in range(0, len(part), size)]
    lock = held(folder, "a token store") if distributed.is_main() and not mark.is_file() else nullcontext()
    with room_on_disk(partial, lambda: _lacking(partial, meta)), lock:
        if not distributed.broadcast(mark.is_file()):  # asked again: another process may have come to its end just now
            done = _prepared(partial, {**meta, "batch_size": size}, len(batches)) if distributed.is_main() else None
            todo = np.flatnonzero(distributed.broadcast(done) == 0)
            mine = np.array_split(todo, distributed.world_size())[distributed.rank()].tolist()
            _encode(images, vqgan, clip, _Writer(partial, meta), {i: batches[i] for i in mine}, workers)
            distributed.barrier()
            if distributed.is_main():
                _finish(partial, folder, meta, images)
            distributed.barrier()
    if distributed.is_main():
        for left in (partial, folder / "progress"):  # also by a process that was killed here
            shutil.rmtree(left, ignore_errors=True)
    store = TokenStore.open(folder, vqgan, clip)
    if any(store.meta.get(key) != meta[key] for key in ("data_hash", "flip", "transform")):
        raise ClipgenError(f"{folder} was made from other images: delete it or choose another run name")
    images.skipped.update(store.meta["skipped"])
    return store


def encode_batch_size(config: VQGANConfig, device: str | torch.device = "cpu") -> int:
    """On a GPU 256 images of 64 pixels, 16 of 256, which take the same memory.

    On a CPU as many as keep the encoder's widest map within 4 MB, 4 to 64: beyond its caches larger batches are slower.
    """
    if torch.device(device).type == "cuda":
        return min(256, max(16, 2**20 // config.image_size**2))
    return min(64, max(4, 2**20 // (config.channels * (config.image_size // config.patch) ** 2)))


def _encode(
    images: ImageSet, vqgan: VQGAN, clip: ClipEmbedder, writer: _Writer, batches: dict[int, range], workers: int
) -> None:
    """Encode batches of positions (below n an image, from n on its mirror image) and write them to their places."""
    n, saved = len(images), time.monotonic()
    rows = [range(batch.start % n, batch.start % n + len(batch)) for batch in batches.values()]
    with (
        stoppable() as stop,
        progress(sum(map(len, rows)), f"extracting {images.split}", distributed.is_main()) as bar,
        dead_workers_told(images, workers),
        closing(image_batches(images, rows, workers)) as reading,
    ):
        for (index, batch), (kept, squares) in zip(batches.items(), reading, strict=True):
            block = writer.block(index, batch.start, len(batch), clip.device)
            if kept:
                squares = squares.pin_memory() if clip.device.type == "cuda" else squares
                x = to_float(squares.to(clip.device, non_blocking=True))
                x = x.flip(3) if batch.start >= n else x
                places = torch.tensor(kept) - batch.start % n
                block["rows"][places] = torch.tensor(kept)
                block["tokens"][places.to(x.device)] = vqgan.encode(x).flatten(1)
                block["embeds"][places.to(x.device)] = clip.images(x)
            bar.update(len(batch))
            stop.raise_if_asked(lambda: writer.save(images.skipped), f"in the extraction of {images.split}")
            if time.monotonic() - saved >= SAVE_SECONDS:
                writer.save(images.skipped)
                saved = time.monotonic()
        writer.save(images.skipped)
        stop.raise_if_asked(lambda: None, f"after the extraction of {images.split}")


class _Writer:
    """Blocks of rows on their way to disk. They stay on the device until they are saved, so that a GPU need not wait."""

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.pending: list[tuple[int, int, dict[str, torch.Tensor]]] = []  # batch, first position, columns

    def block(self, batch: int, first: int, n: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Columns of n positions, to be filled; a position without an image keeps row -1."""
        columns = {
            "tokens": torch.zeros(n, self.meta["L"], dtype=torch.int64, device=device),
            "embeds": torch.zeros(n, self.meta["D"], device=device),
            "rows": torch.full((n,), -1),
        }
        self.pending.append((batch, first, columns))
        return columns

    def save(self, skipped: dict[str, str]) -> None:
        """Bring the blocks to their places on disk and, once they are safe there, the marks that they are done."""
        for key, (name, dtype) in FILES.items():
            # written, not mapped: a full disk is then an error and not a signal that kills
            with open(self.folder / name, "r+b") as stream:
                for _, first, columns in self.pending:
                    stream.seek(first * _row_bytes(key, self.meta))
                    stream.write(columns[key].cpu().numpy().astype(dtype).tobytes())
                stream.flush()
                os.fsync(stream.fileno())
        told = self.folder / "progress" / f"skipped-{distributed.rank()}.json"
        write_json(told, {**(read_json(told) if told.is_file() else {}), **skipped})
        with open(self.folder / "progress" / "done", "r+b") as stream:
            for batch, _, _ in self.pending:
                stream.seek(batch)
                stream.write(b"\1")
            stream.flush()
            os.fsync(stream.fileno())
        self.pending.clear()


def _prepared(partial: Path, job: dict, n_batches: int) -> np.ndarray:
    """(n_batches,) uint8, 1 where a batch is done: of the same extraction as its files say, else of new files at full size."""
    folder, done = partial.with_suffix(""), partial / "progress" / "done"
    if folder.exists() and any(folder.iterdir()):
        raise ClipgenError(f"{folder} holds other files than a finished token store: delete it, or give a new folder")
    sizes = {partial / name: job["N"] * _row_bytes(key, job) for key, (name, _) in FILES.items()} | {done: n_batches}
    mark, text = partial / "progress" / "job.json", json.dumps(job)
    is_same = mark.is_file() and mark.read_text(errors="replace") == text
    if not (is_same and all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())):
        shutil.rmtree(partial, ignore_errors=True)
    if _lacking(partial, job) > 0:  # told before the work rather than in it
        raise OSError(errno.ENOSPC, "the store will not fit")
    if not partial.is_dir():
        (partial / "progress").mkdir(parents=True)
        for path, size in sizes.items():
            with open(path, "wb") as stream:
                stream.truncate(size)
        write_atomic(mark, text)
    return np.fromfile(done, np.uint8)


def _lacking(partial: Path, meta: dict) -> int:
    """Bytes that a store needs beyond what is written already and what is free."""
    there = sum(512 * getattr(path.stat(), "st_blocks", 0) for path in partial.glob("*.*"))
    place = next(folder for folder in partial.parents if folder.is_dir())
    return meta["N"] * sum(_row_bytes(key, meta) for key in FILES) - there - shutil.disk_usage(place).free


def _finish(partial: Path, folder: Path, meta: dict, images: ImageSet) -> None:
    """Write meta.json of what all processes have made, drop positions without an image, and give the store its name."""
    rows = np.fromfile(partial / "rows.i32", FILES["rows"][1])
    good = np.flatnonzero(rows >= 0)
    if not len(good):
        raise ClipgenError(f"none of the {len(images)} images of {images.root} could be read: check the data")
    skipped = dict(images.skipped)
    for told in partial.glob("progress/skipped-*.json"):
        skipped |= read_json(told)
    done = {**meta, "N": len(good), "skipped": dict(sorted(skipped.items()))}
    if len(good) == len(rows):
        write_json(partial / "meta.json", {**done, "hash": _hash(partial, done)})
        partial.rename(folder)
    else:
        with fresh_folder(folder) as made:
            for key, (name, _) in FILES.items():
                _copy_rows(_mapped(partial, key, meta), good, made / name)
            write_json(made / "meta.json", {**done, "hash": _hash(made, done)})


def _copy_rows(array: np.ndarray, rows: np.ndarray, path: Path) -> None:
    with open(path, "wb") as stream:
        for i in range(0, len(rows), 65_536):
            stream.write(array[rows[i : i + 65_536]].tobytes())
