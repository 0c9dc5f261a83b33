"""Pictures on disk: MS-COCO, any folder, or the embedded Shapes world, behind one call.

In: a path. Out: an `ImageSet`, rows of uint8 pictures with optional captions, and batches of them. Training asks for
pictures only; captions are a property of their own that `store.py` and `train.py` never touch. A file that cannot be
read is left out, counted and listed in `ImageSet.skipped`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from . import shapes
from .config import ShapesConfig
from .images import EXTENSIONS, crop, load_image
from .runs import DATA, ClipgenError, file_hash, read_json
from .schedule import batch_rows

CACHE_BYTES = 2 << 30  # decoded pictures kept in memory by a loader without workers
VAL_SHARE = 0.1  # of a folder that has no split of its own, chosen by a hash of the file's path
FEWEST_VAL = 16  # held out of such a folder at least, or half of it: fewer cannot be halved and compared
CLASS_PROMPT = "a photo of a {}"


class ImageSet(Dataset):
    """One split: row -> (3, H, W) uint8 with a short side of `size` pixels.

    Attributes:
        name: what the data are called in results.
        skipped: file -> why it was left out; grows as files turn out to be unreadable.
        classes: row -> class name where folders are classes, else None.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: Path,
        paths: list[Path],
        size: int,
        captions: list[tuple[str, ...]] | None = None,
        classes: list[str] | None = None,
        skipped: dict[str, str] | None = None,
    ):
        self.name, self.split, self.root, self.paths, self.size = name, split, root, paths, size
        self.classes, self.skipped = classes, dict(skipped or {})
        self._captions = captions
        self._cache: dict[int, torch.Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        if row not in self._cache:
            image = load_image(self.paths[row], self.size)
            if self._cached_bytes + image.nbytes > CACHE_BYTES:
                return image
            self._cached_bytes += image.nbytes
            self._cache[row] = image
        return self._cache[row]

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """The captions of each row, for evaluation only."""
        if self._captions is None:
            raise ClipgenError(f"{self.root} has no captions: put name.txt beside name.jpg, sort pictures into a folder for each class, or use a COCO root")  # fmt: skip
        return self._captions

    @property
    def has_captions(self) -> bool:
        return self._captions is not None

    @property
    def is_named_by_class(self) -> bool:
        """Whether the captions are no more than the names of classes: then a mirrored picture has the same one."""
        return self.classes is not None and self._captions == [(CLASS_PROMPT.format(name),) for name in self.classes]

    @property
    def hash(self) -> str:
        """16 hex digits of the relative paths and file sizes: the same for the same files, wherever they lie."""
        digest = hashlib.sha256(str(self.size).encode())
        for path in self.paths:
            digest.update(f"{path.relative_to(self.root).as_posix()}:{path.stat().st_size};".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def content_hash(self) -> str:
        """16 hex digits of the files' bytes, in order, whatever they are called: what statistics are kept under."""
        return file_hash(*self.paths)


# ---------------------------------------------------------------------------------------------- opening


def open_images(
    path: str | Path, split: str = "train", size: int = 64, world: ShapesConfig = ShapesConfig(), seed: int = 0
) -> ImageSet:
    """Open a split of a data set; what lies at `path` decides how it is read.

    Args:
        path: `shapes` (the embedded world, made on first use), a COCO root (`annotations/captions_<split>.json` and
            `<split>/`), or any folder of pictures, read recursively.
        split: `train` or `val`; on a COCO root any split, where `train` finds `train2017` or `train2014`; on `shapes`
            also `heldout`. A folder with no `train` and `val` folders of its own is split 90 to 10, a small one so that 16
            pictures or half of it are held out.
        size: short side in pixels.
        world, seed: size and seed of the Shapes world.

    Raises:
        ClipgenError: nothing there, no pictures, unknown split, annotations that cannot be read.
    """
    if str(path) == "shapes":
        root = DATA / f"shapes-{world.n_train}-{world.n_val}-{seed}"
        path = shapes.make_world(root, world.n_train, world.n_val, seed)
        return _open_coco(Path(path), split, size, "shapes")
    root = Path(path).expanduser()
    if not root.is_dir():
        hint = "unpack the archive and give its folder" if root.is_file() else "check the path, or use 'shapes'"
        raise ClipgenError(f"{root} is not a folder of pictures: {hint}")
    if (root / "annotations").is_dir():
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
        texts: dict[int, list[str]] = {}
        for annotation in content["annotations"]:
            texts.setdefault(int(annotation["image_id"]), []).append(str(annotation["caption"]).strip())
    except (KeyError, TypeError, ValueError) as error:
        raise ClipgenError(f"{found[0]} is not in COCO's caption layout ({type(error).__name__}: {error}): restore the original file") from None  # fmt: skip
    paths, captions, skipped = [], [], {}
    for key, file_name in sorted(names.items()):
        path = folder / file_name
        if not path.resolve().is_relative_to(folder.resolve()):
            skipped[file_name] = "the annotations point outside the image folder"
        elif not path.is_file():
            skipped[file_name] = "named in the annotations, but the file is missing"
        else:
            paths.append(path)
            captions.append(tuple(texts.get(key, ())))
    for key in sorted(texts.keys() - names.keys()):
        skipped[f"image_id {key}"] = "captions without an entry among the images"
    if not paths:
        raise ClipgenError(
            f"{folder} holds none of the {len(names)} pictures of {found[0].name}: unpack {folder.name}.zip there"
        )
    return ImageSet(name, folder.name, root, paths, size, captions, skipped=skipped)


def _open_folder(root: Path, split: str, size: int) -> ImageSet:
    has_splits = (root / "train").is_dir() and (root / "val").is_dir()
    if split not in ("train", "val"):
        raise ClipgenError(f"a folder of pictures has the splits train and val, not {split!r}")
    top = root / split if has_splits else root
    everything = sorted(p for p in top.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file() and not _is_hidden(p, top))
    if not everything:
        raise ClipgenError(f"{top} holds no pictures ({', '.join(EXTENSIONS)}): give another folder")
    held_out = set() if has_splits else _held_out(everything, root)
    paths = everything if has_splits else [p for p in everything if (p in held_out) == (split == "val")]
    if not paths:
        raise ClipgenError(f"{root} has {len(everything)} pictures, too few for a {split} split: add more, or make train/ and val/ folders")  # fmt: skip
    folders = [p.relative_to(top).parts[0] if len(p.relative_to(top).parts) > 1 else "" for p in paths]
    is_classes = all(folders) and len({p.relative_to(top).parts[0] for p in everything}) > 1
    classes = [name.replace("_", " ").replace("-", " ") for name in folders] if is_classes else None
    written = [_caption_file(p) for p in paths]
    captions = None
    if any(written):
        captions = written
    elif classes:
        captions = [(CLASS_PROMPT.format(name),) for name in classes]
    return ImageSet(root.resolve().name, split, root, paths, size, captions, classes)


def _is_hidden(path: Path, top: Path) -> bool:
    """Whether a file or a folder above it begins with a dot: thumbnails and notes of file managers, not pictures."""
    return any(part.startswith(".") for part in path.relative_to(top).parts)


def _held_out(paths: list[Path], root: Path) -> set[Path]:
    """The files of the val split: those with the smallest hashes of their names, so that new files move few of the old ones."""
    digests = {path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest() for path in paths}
    count = sum(digest[0] < 256 * VAL_SHARE for digest in digests.values())
    return set(sorted(paths, key=digests.get)[: max(count, min(FEWEST_VAL, len(paths) // 2))])


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


def _loader(crops: _Crops, batches: list | Iterator, workers: int) -> Iterator[list[tuple[int, torch.Tensor | str]]]:
    # a generator of its own: a loader otherwise draws from the global one, and a resumed run would differ
    own = torch.Generator().manual_seed(0)
    return iter(DataLoader(crops, batch_sampler=batches, num_workers=workers, collate_fn=list, generator=own))


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

    Order and augmentation depend on seed and step alone. An unreadable file is recorded in `images.skipped` and
    another picture of the batch takes its place.

    Raises:
        ClipgenError: no picture of a whole batch can be read.
    """
    if batch_size % world:
        raise ClipgenError(f"batch_size {batch_size} does not divide by {world} processes: change one of them")
    steps = range(start, stop)
    keys = (
        [(int(r), step * batch_size + i) for i, r in enumerate(batch_rows(len(images), batch_size, seed, step))][rank::world]
        for step in steps
    )
    for items in _loader(_Crops(images, flip, random_crop, seed), _Steps(keys, len(steps)), workers):
        good = [x for _, x in items if isinstance(x, torch.Tensor)]
        _record(images, items)
        if not good:
            raise ClipgenError(f"none of {len(items)} pictures of {images.root} could be read ({items[0][1]}): check the data")
        good += [good[i % len(good)] for i in range(len(items) - len(good))]
        yield torch.stack(good)


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
    keys = [[(row, 0) for row in rows[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    for items in _loader(_Crops(images, False, False, 0), keys, workers):
        good = [(row, x) for row, x in items if isinstance(x, torch.Tensor)]
        _record(images, items)
        yield [row for row, _ in good], torch.stack([x for _, x in good]) if good else torch.empty(0, 3, images.size, images.size, dtype=torch.uint8)  # fmt: skip


def _record(images: ImageSet, items: list[tuple[int, torch.Tensor | str]]) -> None:
    for row, x in items:
        if isinstance(x, str):
            name = images.paths[row].relative_to(images.root).as_posix()
            images.skipped[name] = x.replace(str(images.paths[row]), name)


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
