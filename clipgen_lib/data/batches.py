"""Batches of images as pure functions of seed and step: which rows, cropped where, mirrored or not.

In: an `ImageSet`. Out: (B, 3, S, S) uint8. Resuming at any step therefore sees the very batches of an uninterrupted run,
with no sampler state to keep, and any number of worker processes gives the same ones.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from ..config import VQGANTrainConfig
from ..runtime import distributed
from ..runtime.runs import ClipgenError
from .datasets import ImageSet
from .images import BadImage, crop

Batch = tuple[list[int], torch.Tensor]  # rows that could be read, (len(rows), 3, S, S) uint8
Squares = tuple[*Batch, list[tuple[int, str]]]  # and the rows that could not, each with why


@lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 11, epoch]).permutation(n)


def batch_rows(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of a training batch, (batch_size,) int64: a permutation of n rows for each epoch, end to end, cut into batches."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    return np.concatenate([_epoch_order(n, seed, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])


class _Reader(Dataset):
    """(rows, positions) -> their squares: centre crops, or augmented as seed and position in the training say."""

    def __init__(self, images: ImageSet, seed: int = 0, flip: bool = False, random_crop: bool = False):
        self.images, self.seed, self.flip, self.random_crop = images, seed, flip, random_crop

    def __getitem__(self, key: tuple[Sequence[int], Sequence[int]]) -> Squares | ClipgenError:
        good, squares, failed, size = [], [], [], self.images.size
        for row, position in zip(*key, strict=True):
            try:
                image, at = self.images[row], (0.5, 0.5)
                if self.flip or self.random_crop:  # the same with any number of workers and processes
                    top, left, side = np.random.default_rng([self.seed, 13, position]).random(3)
                    at = (top, left) if self.random_crop else at
                    image = image.flip(2) if self.flip and side < 0.5 else image
                squares.append(crop(image, size, at))
                good.append(row)
            except BadImage as error:
                failed.append((row, str(error)))
            except ClipgenError as error:
                return error  # not raised in a worker, from where torch brings a traceback
        # in a worker default_collate stacks straight into the memory that is shared
        stacked = default_collate(squares) if good else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return good, stacked, failed


def _load(reader: _Reader, keys: Iterable[tuple[Sequence[int], Sequence[int]]], workers: int) -> Iterator[Squares]:
    """Squares in the order of the keys, read ahead by workers; what is no image is told to `images.skipped`."""
    # a generator of its own: a loader otherwise takes numbers from the global one, and a resumed run would differ
    generator, images = torch.Generator().manual_seed(0), reader.images
    with dead_workers_told(images, workers):
        for found in DataLoader(reader, batch_size=None, sampler=keys, num_workers=workers, generator=generator):
            if isinstance(found, ClipgenError):
                raise found
            images.skipped |= {images.names[row]: why for row, why in found[2]}
            yield found


def training_batches(images: ImageSet, config: VQGANTrainConfig, seed: int, start: int = 0) -> Iterator[torch.Tensor]:
    """Batches start..config.steps-1 of an endless shuffled stream: (batch_size / processes, 3, S, S) uint8.

    Order, crops and mirroring depend on seed and step alone; process r takes the r-th even share of each batch. An
    unreadable image is recorded in `images.skipped` and another image of the share takes its place. Raises ClipgenError
    where no image of a whole share can be decoded, one cannot be read at all, or a worker process was killed.
    """
    size, world = config.batch_size, distributed.world_size()
    share = slice(distributed.rank() * size // world, (distributed.rank() + 1) * size // world)
    keys = (
        (batch_rows(len(images), size, seed, step)[share].tolist(), range(step * size, (step + 1) * size)[share])
        for step in range(start, config.steps)
    )
    reader = _Reader(images, seed, config.flip, config.random_crop)
    for rows, squares, failed in _load(reader, keys, config.workers):
        if not rows:
            raise ClipgenError(f"none of {len(failed)} images of {images.root} could be read ({failed[0][1]})")
        again = torch.arange(len(failed)) % len(rows)
        yield torch.cat([squares, squares[again]]) if failed else squares


def ordered_batches(images: ImageSet, rows: Sequence[int], batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Centre crops of the given rows in order, unreadable ones left out. Raises ClipgenError where none can be read."""
    batches, count = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)], 0
    for kept, squares in image_batches(images, batches, workers):
        count += len(kept)
        if kept:
            yield kept, squares
    if len(rows) and not count:
        why = next(reversed(images.skipped.values()))
        raise ClipgenError(f"none of {len(rows)} {images.split} images of {images.root} could be read ({why})")


def image_batches(images: ImageSet, batches: Iterable[Sequence[int]], workers: int = 0) -> Iterator[Batch]:
    """The same of batches of any sizes, all by one loader."""
    for rows, squares, _ in _load(_Reader(images), ((rows, rows) for rows in batches), workers):
        yield rows, squares


def augmented_rows(
    images: ImageSet, rows: np.ndarray, seed: int, step: int, flip: bool
) -> tuple[np.ndarray, torch.Tensor]:
    """Images of given rows for a training that needs to know which is which (CLIP, a classifier).

    Each is cropped to between half and all of its area and resized back, and mirrored or not, as seed and step say.
    Returns the rows that could be read, (b,), and their images, (b, 3, S, S) uint8; the others are in `images.skipped`.
    Raises ClipgenError where none of them is an image, or one cannot be read at all.
    """
    crops = v2.Compose([v2.RandomResizedCrop(images.size, (0.5, 1.0)), v2.RandomHorizontalFlip(0.5 * flip)])
    good = {}
    with torch.random.fork_rng(devices=[]):  # torchvision takes numbers from the global generator
        torch.manual_seed((seed << 32) + step)
        for row in map(int, rows):
            try:
                good[row] = crops(images[row])
            except BadImage as error:
                images.skipped[images.names[row]] = str(error)
    if not good:
        raise ClipgenError(f"none of {len(rows)} images of {images.root} could be read: check the data")
    return np.array(list(good)), torch.stack(list(good.values()))


@contextmanager
def dead_workers_told(images: ImageSet, workers: int) -> Iterator[None]:
    """A pass over images: tells how many were left out, and a reader that was killed as one sentence.

    Around the pass, since torch raises that wherever the main thread is at that moment.
    """
    before = len(images.skipped)
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid", str(error)):
            raise
        what = f"a process that reads images of {images.root} was killed ({str(error).splitlines()[0]})"
        raise ClipgenError(f"{what}: take fewer workers than {workers}, or give it more memory or /dev/shm") from None
    finally:
        if len(images.skipped) > before:
            why = f"the last: {next(reversed(images.skipped.values()))}"
            distributed.tell(f"{len(images.skipped)} files of {images.root} have been left out, {why}")
