"""Images on disk: MS-COCO, any folder, tar and parquet shards, or the embedded Shapes world, behind one call.

In: a path. Out: an `ImageSet`, rows of uint8 images with optional captions, and batches of them. Training asks for
images only; captions are a property of their own that `store.py` and `train.py` never touch. A file that cannot be
read is left out, counted and listed in `ImageSet.skipped`. In memory are names and a cache of bounded size, not the images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..config import ShapesConfig
from ..runtime.runs import DATA, ClipgenError, file_hash, read_json, reason, shortened
from . import shapes
from .images import EXTENSIONS, load_image
from .shards import CLASS_PROMPT, Names, ParquetShards, TarShards, find_shards, open_shards, split_of

CACHE_BYTES = 2 << 30  # decoded images kept in memory by a loader without workers
VAL_SHARE = 0.1  # of a folder that has no split of its own, chosen by a hash of the file's path
FEWEST_VAL = 16  # held out of such a folder at least, or half of it: fewer cannot be halved and compared


class Files:
    """Plain files as a source of images; `clipgen_lib/shards.py` has the others.

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
        images: where the rows come from: an opened source, or files below `root`.

    Attributes:
        name: what the data are called in results.
        names: row -> the place of its image below `root`, posix; inside a shard, shard/member.
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
        """What an error calls an image: its path, or that of its shard and its name there."""
        return os.path.join(self.root, self.names[row])

    @property
    def paths(self) -> list[Path]:
        """The files of the rows, where these are files of their own."""
        if not isinstance(self.pictures, Files):
            raise ClipgenError(
                f"{self.root} holds shards, whose images have no paths: unpack them to a folder for what needs files"
            )
        return [self.root / name for name in self.names]

    @cached_property
    def _captions(self) -> list[tuple[str, ...]] | None:
        return self.pictures.captions(self.skipped)

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """The captions of each row, for evaluation only; read when first asked for."""
        if self._captions is None:
            raise ClipgenError(
                f"{self.root} has no captions: put name.txt beside name.jpg, sort images into a folder for each class, or use a COCO root"
            )
        return self._captions

    @property
    def has_captions(self) -> bool:
        return self._captions is not None

    @cached_property
    def classes(self) -> list[str] | None:
        """The class name of each row where images are sorted by class, else None; read when first asked for."""
        return self.pictures.classes()

    @property
    def is_named_by_class(self) -> bool:
        """Whether the captions are no more than the names of classes: then a mirrored image has the same one."""
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
        """16 hex digits of the images' bytes, in order, whatever they are called: what statistics are kept under."""
        if isinstance(self.pictures, Files):
            return file_hash(*self.paths)
        digest = hashlib.sha256()
        for row in range(len(self)):
            with suppress(ClipgenError):  # it is listed when it is read as an image
                digest.update(self.pictures.open(row))
        return digest.hexdigest()[:16]


def open_images(
    path: str | Path, split: str = "train", size: int = 64, world: ShapesConfig = ShapesConfig(), seed: int = 0
) -> ImageSet:
    """Open a split of a data set; what lies at `path` decides how it is read.

    Args:
        path: `shapes` (the embedded world, made on first use), a COCO root (`annotations/captions_<split>.json` and
            `<split>/`), WebDataset tar shards or Hugging Face parquet (one file or a folder of them, read where they lie,
            see `data/README.md`), or any folder of images, read recursively.
        split: `train` or `val`; on a COCO root any split, where `train` finds `train2017` or `train2014`; on `shapes`
            also `heldout`. A folder with no `train` and `val` folders of its own, or shards not named so, are split 90 to 10,
            a small set so that 16 images or half of it are held out.
        size: short side in pixels.
        world, seed: size and seed of the Shapes world.

    Raises:
        ClipgenError: nothing there, no images, unknown split, annotations that cannot be read.
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
        raise ClipgenError(f"{root} is not a folder of images: {hint}")
    if is_coco:
        return _open_coco(root, split, size, root.resolve().name)
    return _open_folder(root, split, size)


def _open_coco(root: Path, split: str, size: int, name: str) -> ImageSet:
    found = sorted(root.glob(f"annotations/captions_{split}*.json"))
    exact = [p for p in found if p.stem == f"captions_{split}"]
    found = exact or [p for p in found if p.stem.removeprefix(f"captions_{split}").isdigit()]
    if len(found) != 1:
        there = ", ".join(sorted(p.stem.removeprefix("captions_") for p in root.glob("annotations/captions_*.json")))
        raise ClipgenError(
            f"{root} has {len(found)} caption files for split {split!r}: name one of those there ({there or 'none'})"
        )
    folder = root / found[0].stem.removeprefix("captions_")
    content = read_json(found[0])
    try:
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        texts, keys = _coco_texts(content), np.array(sorted(names), np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClipgenError(
            f"{found[0]} is not in COCO's caption layout ({type(error).__name__}: {reason(error)}): restore the original file"
        ) from None
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
            f"{folder} holds none of the {len(names)} images of {found[0].name}: unpack {folder.name}.zip there"
        )
    pictures = Files(root, Names.of(used.values()), partial(_coco_captions, found[0], np.array(list(used), np.int64)))
    return ImageSet(name, folder.name, root, pictures, size, skipped)


def _unusable(folder: Path, file_name: str) -> str:
    """Why a name from the annotations is no image of the folder; else nothing."""
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
        skipped |= {
            name: "its name says of no split that it belongs to it: put train or val into it" for name in unnamed
        }
    else:
        held = _held_out(pictures.names)
        if held.all() if split == "train" else not held.any():
            raise ClipgenError(
                f"{path} has {len(held)} images, too few for a {split} split: add more, or name shards train-... and val-..."
            )
        pictures = pictures.kept(held if split == "val" else ~held)
    return ImageSet(
        path.resolve().stem if path.is_file() else path.resolve().name, split, root, pictures, size, skipped
    )


def _open_folder(root: Path, split: str, size: int) -> ImageSet:
    has_splits = (root / "train").is_dir() and (root / "val").is_dir()
    if split not in ("train", "val"):
        raise ClipgenError(f"a folder of images has the splits train and val, not {split!r}")
    top = root / split if has_splits else root
    everything = sorted(
        p for p in top.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file() and not _is_hidden(p, top)
    )
    if not everything:
        raise ClipgenError(f"{top} holds no images ({', '.join(EXTENSIONS)}): give another folder")
    names = Names.of(path.relative_to(root).as_posix() for path in everything)
    names = names if has_splits else names.kept(_held_out(names) == (split == "val"))
    if not len(names):
        raise ClipgenError(
            f"{root} has {len(everything)} images, too few for a {split} split: add more, or make train/ and val/ folders"
        )
    in_folders = all(name.count("/") > has_splits for name in names)
    is_classes = in_folders and len({p.relative_to(top).parts[0] for p in everything}) > 1
    classes = partial(_folder_classes, names, int(has_splits)) if is_classes else None
    pictures = Files(root, names, partial(_folder_captions, root, names, classes), classes)
    return ImageSet(root.resolve().name, split, root, pictures, size)


def _folder_classes(names: Sequence[str], depth: int) -> list[str]:
    """The folder at that depth of each name, as words."""
    return [name.split("/")[depth].replace("_", " ").replace("-", " ") for name in names]


def _folder_captions(root: Path, names: Names, classes: Callable[[], list[str]] | None) -> list[tuple[str, ...]] | None:
    """The lines of name.txt beside each image, else what its class makes, None without both."""
    written = [_caption_file(root / name) for name in names]
    if any(written):
        return written
    return classes and [(CLASS_PROMPT.format(name),) for name in classes()]


def _is_hidden(path: Path, top: Path) -> bool:
    """Whether a file or a folder above it begins with a dot: thumbnails and notes of file managers, not images."""
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
