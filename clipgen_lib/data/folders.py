"""What lies in a folder of images: one listing for training, for images that are scored and for those they are scored against.

In: a folder. Out: a `Listing`: the images below it, what their folders say of splits and classes, and what is left out and why.
Links are followed; a name that stands in a data file is only ever looked up in a listing, never opened.
"""

import errno
import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

from ..runtime.distributed import tell
from ..runtime.runs import ClipgenError, shortened
from .images import EXTENSIONS, patiently, read_text

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "dev", "test", "testing")  # the best name first
SPLIT = re.compile(rf"({'|'.join(TRAIN_NAMES + VAL_NAMES)})(\d{{4}})?", re.IGNORECASE)  # COCO adds a year
METADATA = ("metadata.jsonl", "metadata.csv")
HELPERS = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "annotations", "thumbs.db", "desktop.ini"}
IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages"}
LABEL_FOLDERS = {"labels", "label", "masks", "mask", "trimaps", "segmentationclass", "segmentationobject"}
SYNSETS = ("LOC_synset_mapping.txt", "words.txt")  # ImageNet's and Tiny ImageNet's: WordNet id, then its names


class Listing(NamedTuple):
    names: list[str]  # of images, below the folder, sorted
    metadata: list[str]  # files of METADATA
    texts: dict[str, str]  # name -> name.txt
    left_out: Counter  # why -> how many

    def splits(self) -> dict[str, list[str]]:
        """The images by the first folder on their way that is named as a split; empty where none is.

        Others are to be trained on where there is no `train`, else a split by their own folder's name. A lone `train`
        beside folders of images is a class: the vehicle.
        """
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(_split_of(name.rpartition("/")[0]).lower(), []).append(name)
        others = groups.pop("", [])
        if not groups or (groups.keys() == {"train"} and any("/" in name for name in others)):
            return {}
        has_train = any(split.startswith("train") for split in groups)
        for name in others:
            groups.setdefault(name[: max(name.find("/"), 0)] if has_train else "train", []).append(name)
        return groups

    def without_strays(self) -> Self:
        """Without the images beside class folders, at most one in ten, with which none would have a class; metadata keep them."""
        groups, strays = self.splits(), set()
        for names in groups.values() or [self.names]:
            some = {name for name in names if not _folders(name.rpartition("/")[0], bool(groups))}
            is_few = not self.metadata and 0 < 10 * len(some) <= len(names)
            if is_few and folder_classes([name for name in names if name not in some], bool(groups)):
                strays |= some
        left_out = self.left_out + Counter({"images beside class folders": len(strays)})
        return self._replace(names=[name for name in self.names if name not in strays], left_out=left_out)

    def describe(self) -> str:
        """Splits, classes, captions and what is left out, in a line."""
        groups = self.splits()
        splits = ", ".join(f"{split or 'no split'} {len(names):,}" for split, names in sorted(groups.items()))
        largest = max(groups.values(), key=len, default=self.names)
        classes = sorted(set(folder_classes(largest, bool(groups)) or ()))
        captions = self.metadata[:3] or ["name.txt"] * any(name.rpartition(".")[0] in self.texts for name in self.names)
        named = f" ({shortened(', '.join(classes), 60)})" if classes else ""
        left_out = ", ".join(f"{count:,} {why}" for why, count in self.left_out.most_common()) or "nothing"
        found = f"{len(self.names):,} images ({splits or 'no splits'}), {len(classes):,} classes{named}"
        return f"{found}, captions in {', '.join(captions) or 'no file'}; left out: {left_out}"


def list_folder(root: Path) -> Listing:
    """All images below a folder; hidden and helper folders, and labels beside images, are left out.

    Raises ClipgenError where a folder cannot be read.
    """
    return patiently(lambda: _walk(root), root)


def _walk(root: Path) -> Listing:
    found, left_out = {"image": [], "metadata": [], "text": [], "folder": [("", ())]}, Counter()
    while found["folder"]:
        place, above = found["folder"].pop()
        status = os.stat(root / place)
        below = (*above, (status.st_dev, status.st_ino))
        if below[-1] in above:
            left_out["links to a folder around them"] += 1
            continue
        with os.scandir(root / place) as listed:
            entries = list(listed)
        has_images = any(entry.name.lower() in IMAGE_FOLDERS for entry in entries)
        for entry in entries:
            name, kind = place + entry.name, _kind(entry, has_images)
            if kind in found:
                found[kind].append((f"{name}/", below) if kind == "folder" else name)
            elif kind:
                left_out[kind] += 1
    return Listing(sorted(found["image"]), sorted(found["metadata"]), {n[:-4]: n for n in found["text"]}, left_out)


def _kind(entry: os.DirEntry, has_images: bool) -> str:
    """folder, image, metadata or text; else why it is left out, nothing for a file that says something of the others."""
    name, ending = entry.name.lower(), os.path.splitext(entry.name)[1].lower()
    if name.startswith(".") or name in HELPERS:
        return "hidden or helper files and folders"
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
        is_folder = is_file = False
    if is_folder:
        return "folders of labels beside images" if has_images and name in LABEL_FOLDERS else "folder"
    if not is_file:
        return "links that lead nowhere" if entry.is_symlink() else "special files"
    if name in METADATA or ending in EXTENSIONS:
        return "metadata" if name in METADATA else "image"
    if ending in ("", ".txt", ".json", ".jsonl", ".csv", ".md"):
        return "text" if ending == ".txt" else ""
    cure = " (pip install pillow-heif)" if ending in (".heic", ".heif") else ""
    return f"{shortened(ending, 12)} files that Pillow here cannot read{cure}"


@lru_cache(maxsize=1 << 16)  # thousands of images share a folder
def _split_of(place: str) -> str:
    """The first folder of a place that is named as a split."""
    return next(filter(SPLIT.fullmatch, place.split("/")), "")


def choose_split(there: Iterable[str], split: str, where: Path, year: str = "") -> tuple[str | None, bool]:
    """Which of the names there is meant by a split (None: all), and whether train and val are still to be divided by a hash.

    Raises ClipgenError where there is no such split, or several of different years (train2014, train2017) and none chosen.
    """
    there, known = sorted(there), {"train": TRAIN_NAMES, "val": VAL_NAMES}
    if split in there and split not in known:  # val2014 beside a train split of another year
        return split, False

    def find(names: tuple[str, ...]) -> str | None:
        fits = [re.compile(rf"{re.escape(name)}(\d{{4}})?", re.IGNORECASE) for name in names]
        found = [[key for key in there if fit.fullmatch(key) and key.endswith(year)] for fit in fits]
        first = next(filter(None, found), [None])
        if len(first) > 1:
            some = " and ".join(first)
            raise ClipgenError(f"{where} has {some} for split {split!r}: choose by {where}?year={first[-1][-4:]}")
        return first[0]

    if not any(map(SPLIT.fullmatch, there)):
        if split not in known:
            raise ClipgenError(f"{where} has the splits train and val, not {split!r}")
        return None, True
    chosen, is_divided = find(known.get(split, (split,))), split in known and not find(VAL_NAMES)
    chosen = chosen or (find(TRAIN_NAMES) if is_divided else None)
    if chosen is None:
        raise ClipgenError(
            f"{where} has no split {split!r}: use one of {shortened(', '.join(there))} (evaluate.split of a preset, or --split)"
        )
    return chosen, is_divided


def folder_classes(names: list[str], has_splits: bool) -> list[str] | None:
    """The class of each image: its folder at the first level where they differ, the split's not counted; None without."""
    parts = [_folders(name.rpartition("/")[0], has_splits) for name in names]
    for level in range(min(map(len, parts), default=0)):
        if len({folders[level] for folders in parts}) > 1:
            return [folders[level] for folders in parts]
    return None


@lru_cache(maxsize=1 << 16)
def _folders(place: str, has_splits: bool) -> list[str]:
    """The folders on the way to a place, the split's not counted."""
    folders = place.split("/") if place else []
    if has_splits and (split := _split_of(place)):
        folders.remove(split)
    return folders


def class_names(classes: list[str], root: Path) -> list[str]:
    """Classes as words; WordNet ids (n01440764) by ImageNet's own lists, where one lies in the folder or beside it."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in set(classes)):
        return [name.replace("_", " ").replace("-", " ") for name in classes]
    cure = "put words.txt or LOC_synset_mapping.txt there"
    for path in (folder / file for folder in (root, root.parent) for file in SYNSETS):
        lines = [line.split(None, 1) for line in read_text(path).splitlines()] if path.is_file() else []
        known = {line[0]: line[1].split(",")[0].strip() for line in lines if len(line) == 2}
        if not (lacking := set(classes) - known.keys()):
            return [known[name] for name in classes]
        cure = f"{path} has no line {min(lacking)}" if lines else cure
    tell(f"prompts of {root} say WordNet ids such as {classes[0]}: {cure}")
    return classes
