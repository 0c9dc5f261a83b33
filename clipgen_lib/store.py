"""The token store: every image once through both frozen encoders, kept as flat memory-mapped files.

In: images, a frozen VQGAN, a frozen CLIP image encoder. Out: a folder with meta.json and shards 00000/, 00001/, ..., each
with tokens.u16 (n, L), embeds.f16 (n, D), rows.i32 (n,) (which image a row came from) and a shard.json that says how it
was made. Which images a shard covers depends on their number alone, so that any number of processes, killed and started
again at will, write the same bytes. Stage 2 trains from the store alone. No caption comes near it.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .clip_embed import ClipEmbedder
from .config import VQGANConfig
from .data.batches import dead_workers_told, picture_batches
from .data.datasets import ImageSet
from .data.images import to_float
from .runtime import distributed
from .runtime.checkpoints import module_hash
from .runtime.runs import (
    ClipgenError,
    Stop,
    file_hash,
    progress,
    read_json,
    reason,
    room_on_disk,
    shortened,
    stoppable,
    write_json,
)
from .vqgan import VQGAN

FILES = {"tokens": ("tokens.u16", np.uint16), "embeds": ("embeds.f16", np.float16), "rows": ("rows.i32", np.int32)}
MADE_OF = ("vqgan_hash", "clip_hash", "clip", "data", "split", "data_hash", "transform")  # the texts in meta.json
MOST_SHARDS = 128  # quickly opened, and enough of them for every process of a launch to have its share
SHARD_ROWS = 2_048  # of images that a shard covers, or a multiple of it
SAVE_SECONDS = 5.0  # between two states on disk: after every batch a GPU would wait for the disk


class Parts:
    """Arrays that are laid end to end and read as one: rows by index in any order, or a slice of them, always as a copy."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])  # the last is the number of rows

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            return self._gathered(rows) if rows.ndim else self._gathered(rows[None])[0]
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self._gathered(np.arange(start, stop, step))
        reached = zip(self.starts.tolist(), self.parts, strict=False)
        return np.concatenate([part[max(start - first, 0) : max(stop - first, 0)] for first, part in reached])

    def _gathered(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n,) of any order; the files are read in theirs."""
        order = rows.argsort()
        asked = rows[order]
        if len(asked) and not 0 <= asked[0] <= asked[-1] < len(self):
            raise IndexError(f"rows {asked[0]} to {asked[-1]} of an array of {len(self)}")
        bounds = asked.searchsorted(self.starts)
        within = asked - np.repeat(self.starts[:-1], np.diff(bounds))
        found = np.empty((len(rows), *self.parts[0].shape[1:]), self.parts[0].dtype)
        bounds = bounds.tolist()
        for part, first, end in zip(self.parts, bounds, bounds[1:], strict=False):
            if (
                first < end
            ):  # checked above: with another mode than "raise" numpy writes to `out` without a copy between
                part.take(within[first:end], 0, found[first:end], "clip")
        unsorted = np.empty_like(found)
        unsorted[order] = found
        return unsorted


@dataclass(frozen=True)
class TokenStore:
    """An opened store; rows are read by index, in any order, without loading the rest."""

    folder: Path
    meta: dict
    arrays: dict[str, Parts | np.ndarray]

    @classmethod
    def open(cls, folder: Path, vqgan: VQGAN | None = None, clip: ClipEmbedder | None = None) -> TokenStore:
        """Map a finished store.

        Args:
            vqgan, clip: where given, the store must have been made by these very weights.

        Raises:
            ClipgenError: missing, unfinished or damaged store, or one made by other weights.
        """
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise ClipgenError(f"{folder} holds no finished token store: run the extraction (notebook 02) first")
        meta = read_json(folder / "meta.json")
        for kind, given in (("VQGAN", vqgan and module_hash(vqgan)), ("CLIP", clip and clip.weights_hash)):
            made_by = shortened(str(meta.get(f"{kind.lower()}_hash")))
            if given is not None and given != made_by:
                raise ClipgenError(
                    f"{folder} was made by another {kind} (weights {made_by}, not {given}): extract again with this one"
                )
        try:
            _check(meta)
            shards = (
                {folder / _name(j): n for j, n in enumerate(meta["shards"])}
                if "shards" in meta
                else {folder: meta["N"]}
            )
            mapped = [_mapped(shard, n, _widths(meta)) for shard, n in shards.items()]
        except (OSError, ValueError, OverflowError) as error:
            raise ClipgenError(f"{folder} is damaged ({reason(error)}): delete it and extract again") from None
        return cls(folder, meta, {key: Parts([arrays[key] for arrays in mapped]) for key in FILES})

    def __len__(self) -> int:
        return self.meta["N"]

    def tokens(self, rows: np.ndarray | slice) -> torch.Tensor:
        """(len(rows), L) int64."""
        return torch.from_numpy(self.arrays["tokens"][rows]).long()

    def embeds(self, rows: np.ndarray | slice) -> torch.Tensor:
        """(len(rows), D) float32, unit-norm again after float16."""
        return F.normalize(torch.from_numpy(self.arrays["embeds"][rows]).float(), dim=-1)

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


def _name(shard: int) -> str:
    return f"{shard:05d}"


def _check(meta: dict) -> None:
    """Refuse a meta.json in which anything is not what `extract` writes there.

    Raises:
        ValueError: it is missing, of another kind, or counts that do not fit one another.
    """
    counts, shards = [meta.get(key) for key in ("N", "L", "K", "D")], meta.get("shards", [meta.get("N")])
    if not all(_is_count(n, 1) for n in counts):
        raise ValueError("N, L, K and D in meta.json are not all counts")
    if not (isinstance(shards, list) and all(map(_is_count, shards)) and sum(shards) == counts[0]):
        raise ValueError("shards in meta.json are not counts with the sum N")
    if not (
        all(isinstance(meta.get(key), str) for key in MADE_OF)
        and isinstance(meta.get("flip"), bool)
        and _is_skipped(meta)
    ):
        raise ValueError("meta.json lacks what the store was made of")


def _is_count(n: object, least: int = 0) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= least


def _is_skipped(state: dict) -> bool:
    """Whether `skipped` of a state is name -> why."""
    skipped = state.get("skipped")
    return isinstance(skipped, dict) and all(isinstance(why, str) for why in skipped.values())


def _widths(meta: dict) -> dict[str, tuple[int, ...]]:
    """Shape of one row of each file."""
    return {"tokens": (meta["L"],), "embeds": (meta["D"],), "rows": ()}


def _row_bytes(meta: dict) -> dict[str, int]:
    return {key: math.prod(width) * np.dtype(FILES[key][1]).itemsize for key, width in _widths(meta).items()}


def _mapped(folder: Path, n: int, widths: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The files of one shard of n rows.

    Raises:
        ValueError: a file of another size. OSError: no such file.
    """
    arrays = {}
    for key, (name, dtype) in FILES.items():
        shape = (n, *widths[key])
        size, wanted = (folder / name).stat().st_size, math.prod(shape) * np.dtype(dtype).itemsize
        if size != wanted:
            raise ValueError(f"{folder.name}/{name} has {size} bytes, not {wanted}")
        arrays[key] = np.asarray(np.memmap(folder / name, dtype, "r", shape=shape)) if size else np.empty(shape, dtype)
    return arrays


def nearest(bank: torch.Tensor, queries: torch.Tensor, k: int, exact_below: int = 1_000_000) -> torch.Tensor:
    """Rows of a bank of unit vectors (M, D) nearest to each query (B, D) by cosine: (B, k) int64, nearest first.

    Above `exact_below` rows by faiss (also exhaustive, a block of rows at a time) where it is installed.
    """
    k = min(k, len(bank))
    if len(bank) > exact_below and find_spec("faiss"):
        import faiss

        _, rows = faiss.knn(queries.cpu().numpy(), bank.cpu().numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(rows).to(bank.device)
    return (queries @ bank.T).topk(k, dim=1).indices


def shard_span(n: int, rows: int = SHARD_ROWS) -> int:
    """How many of n images a shard covers: the smallest multiple of `rows` that gives at most MOST_SHARDS shards."""
    return rows * -(-n // (rows * MOST_SHARDS))


def pictures_at_once(config: VQGANConfig, device: str | torch.device = "cpu") -> int:
    """Of an extraction: on a GPU 256 images of 64 pixels, 16 of 256, which take the same memory.

    On a CPU as many as keep the encoder's widest map within 4 MB, 4 to 64: beyond its caches larger batches are slower.
    """
    if torch.device(device).type == "cuda":
        return min(256, max(16, 2**20 // config.image_size**2))
    return min(64, max(4, 2**20 // (config.channels * (config.image_size // config.patch) ** 2)))


@torch.inference_mode()
def extract(
    images: ImageSet,
    vqgan: VQGAN,
    clip: ClipEmbedder,
    folder: Path,
    flip: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    show_progress: bool = True,
    shard_rows: int = SHARD_ROWS,
) -> TokenStore:
    """Run both frozen encoders over all images, once, and return the opened store.

    A finished store of the same images and weights is opened as it is. An interrupted extraction goes on where it
    stopped. With `flip`, mirrored images follow as rows of their own. Images that cannot be read have no row and
    are listed in meta.json. Of a launch, process r makes the shards r, r + count, ...; all return the whole store.

    Raises:
        ClipgenError: the folder holds a store made from other images or by other weights, the disk is full, or (Stopped)
            SIGTERM or SIGINT has come.
    """
    folder, partial = Path(folder), Path(folder).with_name(Path(folder).name + ".partial")
    side = vqgan.config.side
    meta = {
        "N": len(images) * (2 if flip else 1),
        "L": side * side,
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
    if distributed.broadcast((folder / "meta.json").is_file()):
        store = TokenStore.open(folder, vqgan, clip)
        if any(store.meta.get(key) != meta[key] for key in ("data_hash", "flip", "transform")):
            raise ClipgenError(f"{folder} was made from other images: delete it or choose another run name")
        images.skipped.update(store.meta["skipped"])
        return store
    job = {**meta, "span": shard_span(meta["N"], shard_rows), "batch_size": batch_size}
    starts = range(0, meta["N"], job["span"])
    with room_on_disk(partial, lambda: _lacking(partial, meta)):
        if distributed.is_main():
            if _lacking(partial, meta) > 0:  # told before the work rather than in it
                raise OSError(errno.ENOSPC, "the store will not fit")
            _tidy(partial, {_name(j) for j in range(len(starts))})
        distributed.barrier()
        mine = range(distributed.rank(), len(starts), distributed.world_size())
        shards = {j: _Shard(partial / _name(j), {**job, "shard": j}) for j in mine}
        parts = {j: range(starts[j], min(starts[j] + job["span"], meta["N"])) for j in mine}
        total, done = sum(map(len, parts.values())), sum(shard.state["read"] for shard in shards.values())
        show = show_progress and distributed.is_main()  # its own share
        plan = {j: _batches(parts[j], shards[j].state["read"], len(images), batch_size) for j in mine}
        rows = [range(part.start % len(images), part.start % len(images) + len(part)) for j in mine for part in plan[j]]
        with (
            stoppable() as stop,
            progress(total, f"extracting {images.split}", show, done) as bar,
            dead_workers_told(images, workers),
            closing(
                picture_batches(images, rows, workers)
            ) as reading,  # one for all shards: workers that start anew are slow
        ):
            for j in mine:
                _fill(shards[j], plan[j], reading, images, vqgan, clip, stop, bar)
            stop.raise_if_asked(lambda: None, f"after the extraction of {images.split}")
        distributed.barrier()
        if distributed.is_main():
            _finish(partial, folder, meta, len(starts), images)
        distributed.barrier()
    store = TokenStore.open(folder, vqgan, clip)
    images.skipped.update(store.meta["skipped"])
    return store


def _batches(part: range, read: int, n: int, batch_size: int) -> list[range]:
    """What is left of a part after the first `read` of it; no batch holds images and mirrored ones, from n on, at once."""
    found, first = [], part.start + read
    while first < part.stop:
        stop = min(first + batch_size, part.stop, n if first < n else part.stop)
        found.append(range(first, stop))
        first = stop
    return found


def _fill(
    shard: _Shard,
    batches: list[range],
    reading: Iterator[tuple[list[int], torch.Tensor]],
    images: ImageSet,
    vqgan: VQGAN,
    clip: ClipEmbedder,
    stop: Stop,
    bar,
) -> None:
    """Make what a shard still lacks; `reading` gives the images of its batches, and after them those of the next shard."""
    known, images.skipped = images.skipped, shard.state["skipped"]  # those of this part alone, whoever makes it
    saved = time.monotonic()
    try:
        for batch in batches:
            kept, squares = next(reading)
            if kept:
                x = _on(clip.device, squares)
                x = to_float(x.flip(3) if batch.start >= len(images) else x)
                shard.append(vqgan.encode(x).flatten(1), clip.images(x), kept)
            shard.state["read"] += len(batch)
            bar.update(len(batch))
            stop.raise_if_asked(shard.save, f"in the extraction of {images.split}")
            if time.monotonic() - saved >= SAVE_SECONDS:
                shard.save()
                saved = time.monotonic()
        if batches:
            shard.save()
        shard.finish()
    finally:
        images.skipped = known


def _on(device: torch.device, squares: torch.Tensor) -> torch.Tensor:
    """Images on a device; a GPU fetches them while it computes on others."""
    return squares.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else squares.to(device)


class _Shard:
    """A shard in the making: three files that grow, and shard.json, written after them, which says how far they are good.

    Attributes:
        state: `of` (what is being made), `read` (images gone through), `rows` (written), `skipped`, and when all is there
            `hash` (of the files' bytes).
    """

    def __init__(self, folder: Path, of: dict):
        self.folder, self.row_bytes = folder, _row_bytes(of)
        self.paths = {key: folder / name for key, (name, _) in FILES.items()}
        self.state: dict = {"of": of, "read": 0, "rows": 0, "skipped": {}}
        folder.mkdir(exist_ok=True)
        if (folder / "shard.json").is_file():
            found = read_json(folder / "shard.json")
            if found.get("of") == of and self._is_there(found):
                self.state = found
        self.pending: list[
            dict[str, torch.Tensor]
        ] = []  # batches that are not on disk; what a GPU gives may be on its way
        self.gpu: torch.device | None = None

    def _is_there(self, state: dict) -> bool:
        """Whether a state is one of ours and the files hold what it says."""
        read, rows = state.get("read"), state.get("rows")
        if not (_is_count(read) and _is_count(rows) and rows <= read <= state["of"]["span"] and _is_skipped(state)):
            return False
        wanted = {self.paths[key]: rows * size for key, size in self.row_bytes.items()}
        beyond = [path.stat().st_size - size if path.is_file() else -1 for path, size in wanted.items()]
        if "hash" in state:
            return not any(beyond) and file_hash(*self.paths.values()) == state["hash"]
        return min(beyond) >= 0

    def append(self, tokens: torch.Tensor, embeds: torch.Tensor, rows: list[int]) -> None:
        """tokens: (b, L) int64. embeds: (b, D) float32."""
        self.gpu = tokens.device if tokens.is_cuda else None
        tokens, embeds = (x.to("cpu", non_blocking=x.is_cuda) for x in (tokens, embeds))
        self.pending.append({"tokens": tokens, "embeds": embeds, "rows": torch.tensor(rows)})

    def save(self) -> None:
        """Bring the files and then the state to disk."""
        if self.gpu is not None:
            torch.cuda.synchronize(self.gpu)  # here alone it is waited for
        for key, path in self.paths.items():
            # written, not mapped: a full disk is then an error and not a signal that kills
            with open(path, "ab") as stream:
                stream.truncate(self.state["rows"] * self.row_bytes[key])  # what a kill left behind the rows that count
                stream.writelines(batch[key].numpy().astype(FILES[key][1]).tobytes() for batch in self.pending)
                stream.flush()
                os.fsync(stream.fileno())
        self.state["rows"] += sum(len(batch["rows"]) for batch in self.pending)
        self.pending.clear()
        write_json(self.folder / "shard.json", self.state)

    def finish(self) -> None:
        if "hash" not in self.state:
            self.state["hash"] = file_hash(*self.paths.values())
            write_json(self.folder / "shard.json", self.state)


def disk_work(folder: Path, tokens: torch.Tensor, embeds: torch.Tensor) -> None:
    """Bring rows, tokens (n, L) and embeddings (n, D), to disk as a shard of an extraction, and delete them: its work there alone."""
    folder.mkdir(parents=True)
    try:
        shard = _Shard(folder / _name(0), {"L": tokens.shape[1], "D": embeds.shape[1]})
        shard.append(tokens, embeds, list(range(len(tokens))))
        shard.save()
        shard.finish()
    finally:
        shutil.rmtree(folder)


def _finish(partial: Path, folder: Path, meta: dict, shards: int, images: ImageSet) -> None:
    """Write meta.json of what all processes have made, and give the store its name."""
    made = [read_json(partial / _name(j) / "shard.json") for j in range(shards)]
    counts, skipped = [shard["rows"] for shard in made], dict(images.skipped)
    for shard in made:
        skipped |= shard["skipped"]
    if not any(counts):
        raise ClipgenError(f"none of the {len(images)} images of {images.root} could be read: check the data")
    write_json(partial / "meta.json", {**meta, "N": sum(counts), "shards": counts, "skipped": skipped})
    partial.rename(folder)


def _tidy(partial: Path, names: set[str]) -> None:
    """Make the folder, or clear it of all but shards, and those of files that a kill has left half written."""
    partial.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        if not path.is_dir():
            path.unlink()
        elif path.name not in names:
            shutil.rmtree(path)
    for path in partial.glob("*/.*"):
        path.unlink()


def _lacking(partial: Path, meta: dict) -> int:
    """Bytes that a store needs beyond what is there already and what is free."""
    there = sum(path.stat().st_size for name, _ in FILES.values() for path in partial.glob(f"*/{name}"))
    place = next(folder for folder in partial.parents if folder.is_dir())
    return meta["N"] * sum(_row_bytes(meta).values()) - there - shutil.disk_usage(place).free
