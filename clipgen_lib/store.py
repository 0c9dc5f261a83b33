"""The token store: every image once through both frozen encoders, kept as flat memory-mapped files.

In: images, a frozen VQGAN, a frozen CLIP image encoder. Out: a folder with meta.json, tokens.u16 (N, L), embeds.f16 (N, D) and
rows.i32 (N,), which says of which image each row is. Stage 2 trains from the store alone. No caption comes near it.
meta.json holds a SHA-256 over itself and the three files, which is checked when a store is opened.

An extraction writes batches in a row as chunks, files of their own, which the first process puts together at the end: any number
of processes, killed and started again at will, write the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
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
from .runtime import distributed, runs
from .runtime.checkpoints import module_hash
from .runtime.runs import ClipgenError, file_hash, fresh_file, fresh_folder, held, read_json, reading, shortened
from .vqgan import VQGAN

FILES = {"tokens": ("tokens.u16", np.uint16), "embeds": ("embeds.f16", np.float16), "rows": ("rows.i32", np.int32)}
SAVE_SECONDS = 5.0  # of a chunk: after every batch a GPU would wait for the disk
AGAIN = "delete its folder and extract again"


@dataclass(frozen=True)
class TokenStore:
    """An opened store; rows are read by index, in any order, without loading the rest."""

    folder: Path
    meta: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def open_for(cls, folder: Path, images: ImageSet, vqgan: VQGAN, clip: ClipEmbedder, flip: bool) -> TokenStore:
        """As `open`; made of these images, mirrored or not, too, or it is a ClipgenError."""
        store, wanted = cls.open(folder, vqgan, clip), _of_images(images, flip)
        if any(store.meta.get(key) != wanted[key] for key in ("data_hash", "flip", "transform")):
            raise ClipgenError(f"{folder} was made from other images: give those, or another run")
        return store

    @classmethod
    def open(cls, folder: Path, vqgan: VQGAN | None = None, clip: ClipEmbedder | None = None) -> TokenStore:
        """Map a finished store; where `vqgan` or `clip` is given, it must have been made by these very weights.

        Its SHA-256 is computed by the first opening of a process, and again where a file has changed. Raises ClipgenError
        where the store is missing, unfinished, damaged or made by other weights, or may not be read.
        """
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise ClipgenError(f"{folder} holds no finished token store: run the extraction (notebook 02) first")
        meta = read_json(folder / "meta.json", AGAIN)
        for kind, given in (("VQGAN", vqgan and module_hash(vqgan)), ("CLIP", clip and clip.weights_hash)):
            made_by = shortened(str(meta.get(f"{kind.lower()}_hash")))
            if given is not None and given != made_by:
                raise ClipgenError(f"{folder} is of another {kind} ({made_by}, not {given}): extract it again")
        with reading(folder / "meta.json", AGAIN, AGAIN, "is of a damaged store"):
            if meta.get("hash") != _hash(folder, meta):
                raise ValueError("its hash differs from when it was written")
            row, arrays = {"tokens": (meta["L"],), "embeds": (meta["D"],), "rows": ()}, {}
            for key, (name, dtype) in FILES.items():
                arrays[key] = np.asarray(np.memmap(folder / name, dtype, "r", shape=(meta["N"], *row[key])))
            return cls(folder, meta, arrays)

    def __len__(self) -> int:
        return self.meta["N"]

    def tokens(self, rows: np.ndarray | slice) -> torch.Tensor:
        """(len(rows), L) int64."""
        return torch.from_numpy(self.arrays["tokens"][rows].astype(np.int64))

    def embeds(self, rows: np.ndarray | slice) -> torch.Tensor:
        """(len(rows), D) float32, unit-norm again after float16."""
        return F.normalize(torch.from_numpy(self.arrays["embeds"][rows].astype(np.float32)), dim=-1)

    def take(self, folder: Path) -> None:
        """Put this store into another folder too: by hard links, by copies where links are impossible."""
        with fresh_folder(folder) as made:
            for name in ("meta.json", *(name for name, _ in FILES.values())):
                try:
                    (made / name).hardlink_to(self.folder / name)
                except OSError:
                    shutil.copyfile(self.folder / name, made / name)

    @property
    def n_unmirrored(self) -> int:
        """Rows before the mirrored ones."""
        return len(self) // (2 if self.meta["flip"] else 1)

    def moments(self) -> torch.Tensor:
        """Mean and standard deviation of all embeddings, (2, D); few of them are in memory at a time."""
        total = squares = torch.zeros(self.meta["D"], dtype=torch.float64)
        for first in range(0, len(self), 65_536):
            x = self.embeds(slice(first, first + 65_536)).double()
            total, squares = total + x.sum(0), squares + (x**2).sum(0)
        mean = total / len(self)
        return torch.stack([mean, (squares / len(self) - mean**2).clamp_min(0).sqrt()]).float()

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


def _of_images(images: ImageSet, flip: bool) -> dict:
    """What the meta.json of a store says of its images."""
    facts = {"data": images.name, "split": images.split, "data_hash": images.hash}
    return facts | {"transform": f"short side {images.size}, centre crop", "flip": flip}


@torch.inference_mode()
def extract(
    images: ImageSet, vqgan: VQGAN, clip: ClipEmbedder, folder: Path, flip: bool = False, workers: int = 0
) -> TokenStore:
    """Run both frozen encoders over all images, once, and return the opened store.

    A finished store of the same images and weights is opened as it is. An interrupted extraction resumes after the last
    chunk on disk. With `flip`, mirrored images follow as rows of their own. Images that cannot be decoded have no row
    and are listed in meta.json. Of a launch, each process encodes an even share; all return the whole store. Raises
    ClipgenError: the folder holds a store made from other images or by other weights, or other files; another process
    extracts into it; the disk is full; an image could not be read now; or (Stopped) SIGTERM or SIGINT has come.
    """
    folder, partial = Path(folder), Path(folder).with_name(Path(folder).name + ".partial")
    n, config = len(images), vqgan.config
    meta = {"N": 2 * n if flip else n, "L": config.side**2, "K": config.codebook_size, "D": clip.dim}
    meta |= {"vqgan_hash": module_hash(vqgan), "clip_hash": clip.weights_hash, "clip": clip.name}
    meta |= _of_images(images, flip)
    mark, size = folder / "meta.json", encode_batch_size(config, clip.device)
    parts = [range(0, n), range(n, meta["N"])]  # no batch has images and mirrored ones
    batches = [part[i : i + size] for part in parts for i in range(0, len(part), size)]
    lock = held(folder, "a token store") if distributed.is_main() and not mark.is_file() else nullcontext()
    with runs.room_on_disk(partial, lambda: _lacking(partial, meta)), lock:
        if not distributed.broadcast(mark.is_file()):  # asked again: another process may have come to its end just now
            todo = _missing(partial, {**meta, "batch_size": size}, len(batches)) if distributed.is_main() else None
            mine = np.array_split(distributed.broadcast(todo), distributed.world_size())[distributed.rank()].tolist()
            _encode(images, vqgan, clip, partial, {i: batches[i] for i in mine}, workers)
            distributed.barrier()
            if distributed.is_main():
                _put_together(partial, folder, meta, images)
            distributed.barrier()
    if distributed.is_main():  # also after a process that was killed here
        shutil.rmtree(partial, ignore_errors=True)
    store = TokenStore.open_for(folder, images, vqgan, clip, flip)
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
    images: ImageSet, vqgan: VQGAN, clip: ClipEmbedder, partial: Path, batches: dict[int, range], workers: int
) -> None:
    """Encode batches of positions (below n an image, from n on its mirror image) and write them as chunks."""
    n, saved, encoded = len(images), time.monotonic(), {}  # what is encoded stays on the device until it is written
    rows = [range(batch.start % n, batch.start % n + len(batch)) for batch in batches.values()]
    save = lambda: _save(partial, encoded, images.skipped) if encoded else None
    with (
        runs.stoppable() as stop,
        runs.progress(sum(map(len, rows)), f"extracting {images.split}", distributed.is_main()) as bar,
        dead_workers_told(images, workers),
        closing(image_batches(images, rows, workers)) as found,
    ):
        for (index, batch), (kept, squares) in zip(batches.items(), found, strict=True):
            if index - 1 not in encoded or time.monotonic() - saved >= SAVE_SECONDS:
                save()
                saved = time.monotonic()
            encoded[index] = {}  # nothing of a batch without an image
            if kept:
                squares = squares.pin_memory() if clip.device.type == "cuda" else squares
                x = to_float(squares.to(clip.device, non_blocking=True))
                x = x.flip(3) if batch.start >= n else x
                encoded[index] = {"tokens": vqgan.encode(x), "embeds": clip.images(x), "rows": torch.tensor(kept)}
            bar.update(len(batch))
            stop.raise_if_asked(save, f"in the extraction of {images.split}")
        save()
        stop.raise_if_asked(lambda: None, f"after the extraction of {images.split}")


def _save(partial: Path, encoded: dict[int, dict[str, torch.Tensor]], skipped: dict[str, str]) -> None:
    """Write batches in a row as one chunk: a zip of their part of each file, named by the first and the last of them."""
    path = partial / f"{min(encoded):09d}-{max(encoded):09d}.zip"
    with fresh_file(path) as beside, zipfile.ZipFile(beside, "w") as chunk:
        for key, (_, dtype) in FILES.items():
            arrays = (block[key].cpu().numpy().astype(dtype) for block in encoded.values() if block)
            chunk.writestr(key, b"".join(array.tobytes() for array in arrays))
        chunk.writestr("skipped", json.dumps(skipped))
    encoded.clear()


def _missing(partial: Path, job: dict, n_batches: int) -> list[int]:
    """The batches that no chunk holds; chunks of another extraction, or cut short, are deleted.

    Raises ClipgenError where the folder of the store holds something else, OSError where the store will not fit.
    """
    folder, mark, missing = partial.with_suffix(""), partial / "job.json", set(range(n_batches))
    if folder.exists() and any(folder.iterdir()):
        raise ClipgenError(f"{folder} holds other files than a finished token store: delete it, or give a new folder")
    if not (mark.is_file() and mark.read_text(errors="replace") == json.dumps(job)):
        shutil.rmtree(partial, ignore_errors=True)
    for path in partial.glob("*.zip"):
        first, last = map(int, path.stem.split("-"))
        with open(path, "rb") as stream:
            if zipfile.is_zipfile(stream):
                missing -= set(range(first, last + 1))
            else:
                path.unlink()
    if _lacking(partial, job) > 0:  # told before the work rather than in it
        raise OSError(errno.ENOSPC, "the store will not fit")
    runs.write_atomic(mark, json.dumps(job))
    return sorted(missing)


def _lacking(partial: Path, meta: dict) -> int:
    """Bytes that the chunks and the store of them need beyond what is written already and what is free."""
    there = sum(path.stat().st_size for path in partial.glob("*.zip"))
    place = next(folder for folder in partial.parents if folder.is_dir())
    return 2 * meta["N"] * (2 * meta["L"] + 2 * meta["D"] + 4) - there - shutil.disk_usage(place).free


def _put_together(partial: Path, folder: Path, meta: dict, images: ImageSet) -> None:
    """Write the store of all chunks."""
    skipped = dict(images.skipped)
    with fresh_folder(folder) as made:
        for key, (name, _) in FILES.items():
            with open(made / name, "wb") as stream:
                stream.writelines(_parts(partial, key))
        for told in _parts(partial, "skipped"):
            skipped |= json.loads(told)
        if not (n := (made / "rows.i32").stat().st_size // 4):
            raise ClipgenError(f"none of the {len(images)} images of {images.root} could be read: check the data")
        meta = {**meta, "N": n, "skipped": dict(sorted(skipped.items()))}
        runs.write_json(made / "meta.json", {**meta, "hash": _hash(made, meta)})


def _parts(partial: Path, key: str) -> Iterator[bytes]:
    """What each chunk holds of a file, in order."""
    for path in sorted(partial.glob("*.zip")):
        with reading(path, "extract again", "delete it and extract again"), zipfile.ZipFile(path) as chunk:
            yield chunk.read(key)
