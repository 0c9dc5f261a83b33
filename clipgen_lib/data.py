"""Pictures on disk: MS-COCO, any folder, tar and parquet shards, or the embedded Shapes world, behind one call.

In: a path. Out: an `ImageSet`, rows of uint8 pictures with optional captions, and batches of them. Training asks for
pictures only; captions are a property of their own that `store.py` and `train.py` never touch. A file that cannot be
read is left out, counted and listed in `ImageSet.skipped`. In memory are names and a cache of bounded size, not the pictures.
"""

from __future__ import annotations

import hashlib
import os  # os.path.expanduser leaves the home of nobody as it stands, where Path.expanduser raises
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from . import processes, shapes
from .config import ShapesConfig
from .images import EXTENSIONS, crop, load_image
from .runs import DATA, ClipgenError, file_hash, read_json, reason, shortened
from .schedule import batch_rows
from .shards import CLASS_PROMPT, Names, ParquetShards, TarShards, find_shards, open_shards, split_of

CACHE_BYTES = 2 << 30  # decoded pictures kept in memory by a loader without workers
VAL_SHARE = 0.1  # of a folder that has no split of its own, chosen by a hash of the file's path
FEWEST_VAL = 16  # held out of such a folder at least, or half of it: fewer cannot be halved and compared


class Files:
    """Plain files as a source of pictures; `clipgen_lib/shards.py` has the others.

    Args:
        names: places of the files below `root`, posix.
        captions, classes: what gives those of each row, or None; asked when they are wanted, and never by a training.
    """

    blocks, window = None, 1

    def __init__(
        self,
        root: Path,
        names: Names,
        captions: Callable[[], list[tuple[str, ...]] | None] | None = None,
        classes: Callable[[], list[str]] | None = None,
    ):
        self.root, self.names, self._captions, self._classes = root, names, captions, classes

    def open(self, row: int) -> Path:
        return self.root / self.names[row]

    def facts(self) -> Iterator[str]:
        return (f"{name}:{os.stat(os.path.join(self.root, name)).st_size};" for name in self.names)

    def captions(self, skipped: dict[str, str]) -> list[tuple[str, ...]] | None:
        return self._captions and self._captions()

    def classes(self) -> list[str] | None:
        return self._classes and self._classes()


class ImageSet(Dataset):
    """One split: row -> (3, H, W) uint8 with a short side of `size` pixels.

    Args:
        pictures: where the rows come from: an opened source, or files below `root`.

    Attributes:
        name: what the data are called in results.
        names: row -> the place of its picture below `root`, posix; inside a shard, shard/member.
        blocks, window: which rows lie together and how many such blocks are shuffled as one (see `batch_rows`); None for
            files, which are as near in any order.
        skipped: name -> why it was left out; grows as files turn out to be unreadable.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: Path,
        pictures: Files | TarShards | ParquetShards | list[Path],
        size: int,
        skipped: dict[str, str] | None = None,
    ):
        if isinstance(pictures, list):
            pictures = Files(root, Names.of(path.relative_to(root).as_posix() for path in pictures))
        self.name, self.split, self.root, self.pictures, self.size = name, split, root, pictures, size
        self.names, self.blocks, self.window = pictures.names, pictures.blocks, pictures.window
        self.skipped = dict(skipped or {})
        self._cache: dict[int, torch.Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> torch.Tensor:
        if row not in self._cache:
            image = load_image(self.pictures.open(row), self.size, self.place(row))
            if self._cached_bytes + image.nbytes > CACHE_BYTES:
                return image
            self._cached_bytes += image.nbytes
            self._cache[row] = image
        return self._cache[row]

    def place(self, row: int) -> str:
        """What an error calls a picture: its path, or that of its shard and its name there."""
        return os.path.join(self.root, self.names[row])

    @property
    def paths(self) -> list[Path]:
        """The files of the rows, where these are files of their own."""
        if not isinstance(self.pictures, Files):
            raise ClipgenError(f"{self.root} holds shards, whose pictures have no paths: unpack them to a folder for what needs files")  # fmt: skip
        return [self.root / name for name in self.names]

    @cached_property
    def _captions(self) -> list[tuple[str, ...]] | None:
        return self.pictures.captions(self.skipped)

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """The captions of each row, for evaluation only; read when first asked for."""
        if self._captions is None:
            raise ClipgenError(f"{self.root} has no captions: put name.txt beside name.jpg, sort pictures into a folder for each class, or use a COCO root")  # fmt: skip
        return self._captions

    @property
    def has_captions(self) -> bool:
        return self._captions is not None

    @cached_property
    def classes(self) -> list[str] | None:
        """The class name of each row where pictures are sorted by class, else None; read when first asked for."""
        return self.pictures.classes()

    @property
    def is_named_by_class(self) -> bool:
        """Whether the captions are no more than the names of classes: then a mirrored picture has the same one."""
        return self.classes is not None and self._captions == [(CLASS_PROMPT.format(name),) for name in self.classes]

    def blocks_of(self, rows: np.ndarray) -> np.ndarray | None:
        """`blocks` of some of the rows, rising: positions among these in place of rows."""
        return None if self.blocks is None else np.searchsorted(rows, self.blocks)

    @property
    def hash(self) -> str:
        """16 hex digits of the relative paths and file sizes: the same for the same files, wherever they lie."""
        digest = hashlib.sha256(str(self.size).encode())
        for fact in self.pictures.facts():
            digest.update(fact.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    @cached_property
    def content_hash(self) -> str:
        """16 hex digits of the pictures' bytes, in order, whatever they are called: what statistics are kept under."""
        if isinstance(self.pictures, Files):
            return file_hash(*self.paths)
        digest = hashlib.sha256()
        for row in range(len(self)):
            with suppress(ClipgenError):  # it is listed when it is read as a picture
                digest.update(self.pictures.open(row))
        return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- opening


def open_images(
    path: str | Path, split: str = "train", size: int = 64, world: ShapesConfig = ShapesConfig(), seed: int = 0
) -> ImageSet:
    """Open a split of a data set; what lies at `path` decides how it is read.

    Args:
        path: `shapes` (the embedded world, made on first use), a COCO root (`annotations/captions_<split>.json` and
            `<split>/`), WebDataset tar shards or Hugging Face parquet (one file or a folder of them, read where they lie,
            see `data/README.md`), or any folder of pictures, read recursively.
        split: `train` or `val`; on a COCO root any split, where `train` finds `train2017` or `train2014`; on `shapes`
            also `heldout`. A folder with no `train` and `val` folders of its own, or shards not named so, are split 90 to 10,
            a small set so that 16 pictures or half of it are held out.
        size: short side in pixels.
        world, seed: size and seed of the Shapes world.

    Raises:
        ClipgenError: nothing there, no pictures, unknown split, annotations that cannot be read.
    """
    if str(path) == "shapes":
        root = DATA / f"shapes-{world.n_train}-{world.n_val}-{seed}"
        path = shapes.make_world(root, world.n_train, world.n_val, seed)
        return _open_coco(Path(path), split, size, "shapes")
    root = Path(os.path.expanduser(path))
    is_coco = (root / "annotations").is_dir()
    if not is_coco and (files := find_shards(root)):
        return _open_shards(root, files, split, size)
    if not root.is_dir():
        hint = "unpack the archive and give its folder" if root.is_file() else "check the path, or use 'shapes'"
        raise ClipgenError(f"{root} is not a folder of pictures: {hint}")
    if is_coco:
        return _open_coco(root, split, size, root.resolve().name)
    return _open_folder(root, split, size)


def _open_coco(root: Path, split: str, size: int, name: str) -> ImageSet:
    found = sorted(root.glob(f"annotations/captions_{split}*.json"))
    exact = [p for p in found if p.stem == f"captions_{split}"]
    found = exact or [p for p in found if p.stem.removeprefix(f"captions_{split}").isdigit()]
    if len(found) != 1:
        there = ", ".join(sorted(p.stem.removeprefix("captions_") for p in root.glob("annotations/captions_*.json")))
        raise ClipgenError(f"{root} has {len(found)} caption files for split {split!r}: name one of those there ({there or 'none'})")  # fmt: skip
    folder = root / found[0].stem.removeprefix("captions_")
    content = read_json(found[0])
    try:
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        texts, keys = _coco_texts(content), np.array(sorted(names), np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClipgenError(f"{found[0]} is not in COCO's caption layout ({type(error).__name__}: {reason(error)}): restore the original file") from None  # fmt: skip
    used, skipped = {}, {}
    for key in keys.tolist():
        if why := _unusable(folder, names[key]):
            skipped[shortened(names[key]).encode(errors="replace").decode()] = why
        else:
            used[key] = (folder / names[key]).relative_to(root).as_posix()
    for key in sorted(texts.keys() - names.keys()):
        skipped[shortened(f"image_id {key}")] = "captions without an entry among the images"
    if not used:
        raise ClipgenError(
            f"{folder} holds none of the {len(names)} pictures of {found[0].name}: unpack {folder.name}.zip there"
        )
    pictures = Files(root, Names.of(used.values()), partial(_coco_captions, found[0], np.array(list(used), np.int64)))
    return ImageSet(name, folder.name, root, pictures, size, skipped)


def _unusable(folder: Path, file_name: str) -> str:
    """Why a name from the annotations is no picture of the folder; else nothing."""
    path = folder / file_name
    try:
        if Path(file_name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
            return "the annotations point outside the image folder"
        return "" if path.is_file() else "named in the annotations, but the file is missing"
    except (OSError, ValueError):  # too long, a NUL in it, half of a pair of surrogates
        return "named in the annotations, but no file can have this name"


def _coco_texts(content: dict) -> dict[int, list[str]]:
    """Image id -> its captions."""
    texts: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        texts.setdefault(int(annotation["image_id"]), []).append(str(annotation["caption"]).strip())
    return texts


def _coco_captions(path: Path, keys: np.ndarray) -> list[tuple[str, ...]]:
    """Of images in the order of their ids; the file is read again, so that a training need not keep them."""
    texts = _coco_texts(read_json(path))
    return [tuple(texts.get(key, ())) for key in keys.tolist()]


def _open_shards(path: Path, files: list[Path], split: str, size: int) -> ImageSet:
    root = path if path.is_dir() else path.parent
    if split not in ("train", "val"):
        raise ClipgenError(f"shards have the splits train and val, not {split!r}")
    splits = {file: split_of(file.relative_to(root).as_posix()) for file in files}
    held_out = "val" if "val" in splits.values() else "test"
    has_splits = {"train", held_out} <= set(splits.values())
    wanted = "train" if split == "train" else held_out
    pictures, skipped = open_shards(root, [f for f in files if splits[f] == wanted] if has_splits else files)
    if has_splits:
        unnamed = (f.relative_to(root).as_posix() for f in files if splits[f] is None)
        skipped |= {name: "its name says of no split that it belongs to it: put train or val into it" for name in unnamed}
    else:
        held = _held_out(pictures.names)
        if held.all() if split == "train" else not held.any():
            raise ClipgenError(f"{path} has {len(held)} pictures, too few for a {split} split: add more, or name shards train-... and val-...")  # fmt: skip
        pictures = pictures.kept(held if split == "val" else ~held)
    return ImageSet(path.resolve().stem if path.is_file() else path.resolve().name, split, root, pictures, size, skipped)


def _open_folder(root: Path, split: str, size: int) -> ImageSet:
    has_splits = (root / "train").is_dir() and (root / "val").is_dir()
    if split not in ("train", "val"):
        raise ClipgenError(f"a folder of pictures has the splits train and val, not {split!r}")
    top = root / split if has_splits else root
    everything = sorted(p for p in top.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file() and not _is_hidden(p, top))
    if not everything:
        raise ClipgenError(f"{top} holds no pictures ({', '.join(EXTENSIONS)}): give another folder")
    names = Names.of(path.relative_to(root).as_posix() for path in everything)
    names = names if has_splits else names.kept(_held_out(names) == (split == "val"))
    if not len(names):
        raise ClipgenError(f"{root} has {len(everything)} pictures, too few for a {split} split: add more, or make train/ and val/ folders")  # fmt: skip
    in_folders = all(name.count("/") > has_splits for name in names)
    is_classes = in_folders and len({p.relative_to(top).parts[0] for p in everything}) > 1
    classes = partial(_folder_classes, names, int(has_splits)) if is_classes else None
    pictures = Files(root, names, partial(_folder_captions, root, names, classes), classes)
    return ImageSet(root.resolve().name, split, root, pictures, size)


def _folder_classes(names: Sequence[str], depth: int) -> list[str]:
    """The folder at that depth of each name, as words."""
    return [name.split("/")[depth].replace("_", " ").replace("-", " ") for name in names]


def _folder_captions(root: Path, names: Names, classes: Callable[[], list[str]] | None) -> list[tuple[str, ...]] | None:
    """The lines of name.txt beside each picture, else what its class makes, None without both."""
    written = [_caption_file(root / name) for name in names]
    if any(written):
        return written
    return classes and [(CLASS_PROMPT.format(name),) for name in classes()]


def _is_hidden(path: Path, top: Path) -> bool:
    """Whether a file or a folder above it begins with a dot: thumbnails and notes of file managers, not pictures."""
    return any(part.startswith(".") for part in path.relative_to(top).parts)


def _held_out(names: Sequence[str]) -> np.ndarray:
    """Which rows are the val split, (N,) bool: those with the smallest hashes of their names, so that new files move few."""
    digests = (hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names)
    order = np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64, len(names))
    count = int((order >> np.uint64(56) < 256 * VAL_SHARE).sum())
    held = np.zeros(len(names), bool)
    held[np.argsort(order, kind="stable")[: max(count, min(FEWEST_VAL, len(names) // 2))]] = True
    return held


def _caption_file(image: Path) -> tuple[str, ...]:
    """The lines of name.txt beside name.jpg; none where there is no such file."""
    path = image.with_suffix(".txt")
    if not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8", errors="replace")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


# ---------------------------------------------------------------------------------------------- batches


class _Crops(Dataset):
    """Rows as squares; a file that cannot be read gives its reason instead of a picture."""

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
    taken = processes.count() * (1 if device.type == "cuda" else torch.get_num_threads())
    return min(8, max(0, cores - taken) // processes.count())


class _Squares(NamedTuple):
    rows: list[int]  # those that could be read
    pictures: torch.Tensor  # (len(rows), 3, S, S) uint8
    failed: list[tuple[int, str]]  # row, why not


def _stacked(size: int, items: list[tuple[int, torch.Tensor | str]]) -> _Squares:
    """Items of `_Crops` as one batch; in a worker the pictures are laid straight into the memory that is shared, as one piece."""
    rows = [row for row, x in items if isinstance(x, torch.Tensor)]
    pictures = [x for _, x in items if isinstance(x, torch.Tensor)]
    failed = [(row, x) for row, x in items if isinstance(x, str)]
    return _Squares(rows, default_collate(pictures) if rows else torch.empty(0, 3, size, size, dtype=torch.uint8), failed)


@contextmanager
def dead_workers_told(images: ImageSet, workers: int) -> Iterator[None]:
    """A process that read pictures and was killed as one sentence: torch raises wherever the main thread is at that moment."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid", str(error)):
            raise
        raise ClipgenError(f"a process that reads pictures of {images.root} was killed, most often for want of memory or of /dev/shm ({str(error).splitlines()[0]}): take fewer workers than {workers}, or give more of both") from None  # fmt: skip


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
    stands. An unreadable file is recorded in `images.skipped` and another picture of the share takes its place.

    Raises:
        ClipgenError: no picture of a whole share can be read, or a worker process was killed.
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
                f"none of {len(failed)} pictures of {images.root} could be read ({failed[0][1]}): check the data"
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


def augmented_rows(images: ImageSet, rows: np.ndarray, seed: int, step: int, flip: bool) -> tuple[np.ndarray, torch.Tensor]:
    """Pictures of given rows for a training that needs to know which is which (CLIP, a classifier).

    Each is cropped to between half and all of its area and resized back, and mirrored or not, as seed and step say.

    Returns:
        The rows that could be read, (b,), and their pictures, (b, 3, S, S) uint8; the others are in `images.skipped`.

    Raises:
        ClipgenError: none of them can be read.
    """
    crops = v2.Compose([v2.RandomResizedCrop(images.size, (0.5, 1.0), antialias=True), v2.RandomHorizontalFlip(0.5 * flip)])
    good = {}
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed((seed << 32) + step)
        for row in map(int, rows):
            try:
                good[row] = crops(images[row])
            except ClipgenError as error:
                _record(images, [(row, str(error))])
    if not good:
        raise ClipgenError(f"none of {len(rows)} pictures of {images.root} could be read: check the data")
    return np.array(list(good)), torch.stack(list(good.values()))
