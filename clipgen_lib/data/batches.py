"""Pure functions of the step: the learning rate and which rows a batch holds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from ..runtime import distributed
from ..runtime.runs import ClipgenError
from .datasets import ImageSet
from .images import crop
from .shards import WINDOW

ROUNDS = (
    12  # of the Feistel network: with 4 and 6, neighbours of a short range are measurably less apart than at random
)


def batch_rows(
    n: int, batch_size: int, seed: int, step: int, blocks: np.ndarray | None = None, window: int = WINDOW
) -> np.ndarray:
    """The rows of a training batch: shuffled epochs laid end to end, a function of seed and step alone.

    Resuming at any step therefore sees the very batches of an uninterrupted run, with no sampler state to keep. Time and
    memory are those of the batch, whatever n is.

    Args:
        blocks: (M + 1,) first row of each block of rows that lie together, then n. With it an epoch shuffles the blocks,
            then the rows of each `window` blocks among themselves, so that consecutive batches touch few blocks.

    Returns:
        (batch_size,) int64.
    """
    epochs, positions = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    first, second = np.random.SeedSequence([seed, 11]).generate_state(2, np.uint64)
    keys = _mixed(epochs.astype(np.uint64) ^ first)  # one for each epoch
    if blocks is None or len(blocks) - 1 <= window:
        return shuffled(positions, np.full(batch_size, n), keys)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        key = keys[here][:1]
        order, starts = _block_order(np.asarray(blocks, np.int64).tobytes(), int(key[0]))
        edges = np.append(starts[:-1:window], n)  # of the windows, in the order of this epoch
        at = np.searchsorted(edges, positions[here], "right") - 1
        inside = shuffled(
            positions[here] - edges[at], edges[at + 1] - edges[at], _mixed(at.astype(np.uint64) ^ key ^ second)
        )
        inside += edges[at]
        place = np.searchsorted(starts, inside, "right") - 1
        rows[here] = np.asarray(blocks)[order[place]] + inside - starts[place]
    return rows


@lru_cache(maxsize=4)
def _block_order(blocks: bytes, key: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks in the order of an epoch, (M,), and the position at which each begins and the last ends, (M + 1,)."""
    edges = np.frombuffer(blocks, np.int64)
    count = len(edges) - 1
    order = shuffled(np.arange(count), np.full(count, count), np.full(count, key, np.uint64))
    return order, np.concatenate([[0], np.cumsum(np.diff(edges)[order])])


def shuffled(index: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """What stands at `index` of a shuffled range(n), without the range: a keyed permutation, elementwise.

    A Feistel network over pairs (index // a, index % a) with a = ceil(sqrt(n)), whose halves are added modulo a, not
    xored; where it leaves range(n) it is applied again until it is back ("cycle walking"; both in Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, CT-RSA 2002). Since a^2 - n < 2a that is rare.

    Args:
        index, n: (B,) int64, 0 <= index < n < 2^52.
        key: (B,) uint64; another key is another permutation.
    """
    side = np.ceil(np.sqrt(n)).astype(np.uint64)
    rounds = [_mixed(key + np.uint64(i)) for i in range(ROUNDS)]
    found = np.array(index, np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        a = side[walking]
        left, right = np.divmod(found[walking], a)
        for round_key in rounds:
            left, right = right, (left + _mixed(right ^ round_key[walking])) % a
        found[walking] = left * a + right
        walking = walking[found[walking] >= n[walking]]
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Each uint64 to another that looks unrelated: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Crops(Dataset):
    """Rows as squares; a file that cannot be read gives its reason instead of an image."""

    def __init__(self, source: ImageSet, flip: bool, random_crop: bool, seed: int):
        self.source, self.flip, self.random_crop, self.seed = source, flip, random_crop, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, torch.Tensor | str]:
        row, position = key
        try:
            image = self.source[row]
        except ClipgenError as error:
            return row, str(error)
        at = (0.5, 0.5)
        if self.flip or self.random_crop:  # a function of seed and position: the same with any number of workers
            draw = np.random.default_rng([self.seed, 13, position]).random(3)
            at = (draw[0], draw[1]) if self.random_crop else at
            image = image.flip(2) if self.flip and draw[2] < 0.5 else image
        return row, crop(image, self.source.size, at)


def spare_workers(device: torch.device) -> int:
    """Processes, 8 at most, that can decode for this one beside networks on a device: cores that these leave idle."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    taken = distributed.world_size() * (1 if device.type == "cuda" else torch.get_num_threads())
    return min(8, max(0, cores - taken) // distributed.world_size())


class _Squares(NamedTuple):
    rows: list[int]  # those that could be read
    pictures: torch.Tensor  # (len(rows), 3, S, S) uint8
    failed: list[tuple[int, str]]  # row, why not


def _stacked(size: int, items: list[tuple[int, torch.Tensor | str]]) -> _Squares:
    """Items of `_Crops` as one batch; in a worker the images are laid straight into the memory that is shared, as one piece."""
    rows = [row for row, x in items if isinstance(x, torch.Tensor)]
    pictures = [x for _, x in items if isinstance(x, torch.Tensor)]
    failed = [(row, x) for row, x in items if isinstance(x, str)]
    return _Squares(
        rows, default_collate(pictures) if rows else torch.empty(0, 3, size, size, dtype=torch.uint8), failed
    )


@contextmanager
def dead_workers_told(images: ImageSet, workers: int) -> Iterator[None]:
    """A process that read images and was killed as one sentence: torch raises wherever the main thread is at that moment."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid", str(error)):
            raise
        raise ClipgenError(
            f"a process that reads images of {images.root} was killed, most often for want of memory or of /dev/shm ({str(error).splitlines()[0]}): take fewer workers than {workers}, or give more of both"
        ) from None


def _loader(crops: _Crops, batches: Iterable, workers: int) -> Iterator[_Squares]:
    # a generator of its own: a loader otherwise draws from the global one, and a resumed run would differ
    own = torch.Generator().manual_seed(0)
    with dead_workers_told(crops.source, workers):
        together = partial(_stacked, crops.source.size)
        yield from DataLoader(crops, batch_sampler=batches, num_workers=workers, collate_fn=together, generator=own)


def training_batches(
    images: ImageSet,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    flip: bool = False,
    random_crop: bool = False,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[torch.Tensor]:
    """Batches start..stop-1 of an endless shuffled stream: (batch_size / world, 3, S, S) uint8.

    Order and augmentation depend on seed and step alone; rank r takes the r-th of `world` even shares of each batch, as it
    stands. An unreadable file is recorded in `images.skipped` and another image of the share takes its place.

    Raises:
        ClipgenError: no image of a whole share can be read, or a worker process was killed.
    """
    if batch_size % world:
        raise ClipgenError(f"batch_size {batch_size} does not divide by {world} processes: change one of them")
    steps, share = range(start, stop), batch_size // world

    def keys(step: int) -> list[tuple[int, int]]:
        rows = batch_rows(len(images), batch_size, seed, step, images.blocks, images.window).tolist()
        return [(rows[i], step * batch_size + i) for i in range(rank * share, (rank + 1) * share)]

    for rows, pictures, failed in _loader(
        _Crops(images, flip, random_crop, seed), _Steps(map(keys, steps), len(steps)), workers
    ):
        _record(images, failed)
        if not rows:
            raise ClipgenError(
                f"none of {len(failed)} images of {images.root} could be read ({failed[0][1]}): check the data"
            )
        again = torch.arange(len(failed)) % len(rows)
        yield torch.cat([pictures, pictures[again]]) if failed else pictures


class _Steps:
    """An iterator with a length, as DataLoader wants its batch sampler."""

    def __init__(self, batches: Iterator, length: int):
        self.batches, self.length = batches, length

    def __iter__(self) -> Iterator:
        return self.batches

    def __len__(self) -> int:
        return self.length


def ordered_batches(
    images: ImageSet, rows: list[int] | range, batch_size: int, workers: int = 0
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Centre crops of the given rows in order: (rows that could be read, (b, 3, S, S) uint8), unreadable ones left out."""
    yield from picture_batches(images, [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)], workers)


def picture_batches(
    images: ImageSet, batches: Sequence[Sequence[int]], workers: int = 0
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The same of batches of any sizes, all by one loader, whose workers read ahead of what is asked for."""
    keys = ([(row, 0) for row in rows] for rows in batches)
    for rows, pictures, failed in _loader(_Crops(images, False, False, 0), _Steps(keys, len(batches)), workers):
        _record(images, failed)
        yield rows, pictures


def _record(images: ImageSet, failed: list[tuple[int, str]]) -> None:
    for row, why in failed:
        images.skipped[images.names[row]] = why.replace(images.place(row), images.names[row])


def augmented_rows(
    images: ImageSet, rows: np.ndarray, seed: int, step: int, flip: bool
) -> tuple[np.ndarray, torch.Tensor]:
    """Images of given rows for a training that needs to know which is which (CLIP, a classifier).

    Each is cropped to between half and all of its area and resized back, and mirrored or not, as seed and step say.

    Returns:
        The rows that could be read, (b,), and their images, (b, 3, S, S) uint8; the others are in `images.skipped`.

    Raises:
        ClipgenError: none of them can be read.
    """
    crops = v2.Compose(
        [v2.RandomResizedCrop(images.size, (0.5, 1.0), antialias=True), v2.RandomHorizontalFlip(0.5 * flip)]
    )
    good = {}
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed((seed << 32) + step)
        for row in map(int, rows):
            try:
                good[row] = crops(images[row])
            except ClipgenError as error:
                _record(images, [(row, str(error))])
    if not good:
        raise ClipgenError(f"none of {len(rows)} images of {images.root} could be read: check the data")
    return np.array(list(good)), torch.stack(list(good.values()))
