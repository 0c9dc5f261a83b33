"""Image sets behind one call: MS-COCO, folders, archives, data sets of the Hugging Face hub, or the embedded Shapes world.

In: a path or a hub id. Out: an `ImageSet`: row -> uint8 image, with optional captions and classes. Training asks for images
only: captions and classes are read when they are first asked for. An image that cannot be read is left out, counted and
listed in `ImageSet.skipped`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..config import ShapesConfig
from ..runtime.distributed import tell
from ..runtime.runs import MADE_DATA, ClipgenError, read_json, reason, shortened
from . import shapes
from .folders import SPLIT, TRAIN_NAMES, VAL_NAMES, Listing, choose_split, class_names, folder_classes, list_folder
from .images import MAX_BYTES, BadImage, load_image, patiently, read_text

if TYPE_CHECKING:
    import datasets as hf

CACHE_BYTES = 2 << 30  # decoded images that a process keeps in memory
VAL_SHARE = 0.1  # of images that have no splits of their own, chosen by a hash of the name
FEWEST_VAL = 16  # images of such a val split at least, or half of all: fewer cannot be halved and compared
UNPACKED = 100  # most times the size of an archive that its content may have where that is more than MAX_BYTES
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentences")
CLASS_COLUMNS = ("label", "class", "cls")
CLASS_PROMPT = "a photo of a {}"
# captions and class of each row, None where there are none
Texts = tuple[list[tuple[str, ...]] | None, list[str] | None]


class ImageSet(Dataset):
    """One split: row -> (3, H, W) uint8 with a short side of `size` pixels.

    Args:
        name: what the data are called in results.
        source: names below `root`, or an opened `datasets.Dataset` with one column, the encoded images.
        describe: () -> (captions, classes) of the rows, each None where there are none; called when they are asked for.

    `names` are paths below `root`, or names in the archive. `skipped`, name -> why it was left out, grows as images fail.
    """

    def __init__(
        self, name: str, split: str, root: Path, source: list | hf.Dataset, size: int, describe: Callable = None
    ):
        self.name, self.split, self.root, self.size, self._describe = name, split, root, size, describe
        self.table = None if isinstance(source, list) else source
        self.names = source if self.table is None else _member_names(source)
        self.skipped: dict[str, str] = {}
        self._cache: dict[int, torch.Tensor] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> torch.Tensor:
        """Raises BadImage where the image cannot be decoded, ClipgenError where its file cannot be read."""
        if row not in self._cache:
            image = load_image(self.encoded(row), self.size, self.names[row])
            if self._cached_bytes + image.nbytes > CACHE_BYTES:
                return image
            self._cached_bytes += image.nbytes
            self._cache[row] = image
        return self._cache[row]

    def encoded(self, row: int) -> Path | bytes:
        """The file of an image, or its bytes in an archive. Raises BadImage where that gives a path instead: it is not opened."""
        if self.table is None:
            return self.root / self.names[row]
        (image,) = patiently(lambda: self.table[row], self.root).values()
        if image is None or not isinstance(image["bytes"], bytes):
            raise BadImage(f"{self.names[row]} has no bytes in the archive: write the images themselves into it")
        return image["bytes"]

    @cached_property
    def _texts(self) -> Texts:
        captions, classes = self._describe() if self._describe else (None, None)
        named = classes and [(CLASS_PROMPT.format(name),) for name in classes]
        return captions if any(captions or ()) else named, classes

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """The captions of each row, else "a photo of a <class>"; for evaluation only. Raises ClipgenError without both."""
        if self._texts[0] is None:
            cure = "add metadata.jsonl or name.txt beside name.jpg, or sort the images into a folder for each class"
            raise ClipgenError(f"{self.root} has no captions: {cure}")
        return self._texts[0]

    @property
    def has_captions(self) -> bool:
        return self._texts[0] is not None

    @property
    def classes(self) -> list[str] | None:
        """The class name of each row, None where the images are not sorted by class."""
        return self._texts[1]

    @property
    def is_named_by_class(self) -> bool:
        """Whether the captions are only the names of classes: then a mirrored image has the same one."""
        return self.classes is not None and self.captions == [(CLASS_PROMPT.format(name),) for name in self.classes]

    @property
    def hash(self) -> str:
        """16 hex digits of the names and sizes: the same for the same files, wherever they lie."""
        digest = hashlib.sha256(f"{self.size} {self.table.data.nbytes if self.table else ''}".encode())
        for name in self.names:
            path = self.root / name
            size = "" if self.table else patiently(path.stat, path).st_size
            digest.update(f"{name}:{size};".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]


def open_images(
    path: str | Path, split: str = "train", size: int = 64, world: ShapesConfig = ShapesConfig(), seed: int = 0
) -> ImageSet:
    """Open a split of a data set; `data/README.md` shows each kind.

    Args:
        path: `shapes` (the embedded world, made on first use); a COCO root (`annotations/captions_<split>.json` beside
            `<split>/`); a folder of images, read recursively; a parquet file, a WebDataset tar or a folder of either; or a
            data set of the Hugging Face hub (`owner/name`). `?caption=COLUMN&class=COLUMN&image=COLUMN` after it names
            columns of an archive or of metadata.jsonl that are not found by themselves, several captions or attributes with commas
            between them; `?year=2017` names one of COCO's years.
        split: `train` or `val`, or any other split that is there; `held_out` of `shapes`. Images without splits of their own
            are split 90 to 10 by a hash of their names. What was found is told on stderr, once.
        size: short side in pixels.
        world, seed: size and seed of the Shapes world.

    Raises ClipgenError where there is nothing, no image, no such split, or metadata or an archive that cannot be read.
    """
    if str(path) == "shapes":
        root = MADE_DATA / f"shapes-{world.n_train}-{world.n_val}-{seed}"
        return _open_coco(shapes.make_world(root, world.n_train, world.n_val, seed), split, size, "shapes")
    text, _, query = (str(path), "", "") if os.path.exists(path) else str(path).partition("?")
    root, named = Path(text).expanduser(), dict(parse_qsl(query))
    if not named.keys() <= {"image", "caption", "class", "year"}:
        raise ClipgenError(f"{shortened(query)!r} names no columns: give ?image=A&caption=B&class=C, or some of them")
    if any(root.glob("annotations/captions_*.json")):
        return _open_coco(root, split, size, root.resolve().name, named.get("year", ""))
    if archives := _archives(root):
        first = Path(next(iter(archives.values()))[0])
        if root.is_dir() and (names := list_folder(root).names):
            raise ClipgenError(f"{root} holds {len(names):,} images and the archive {first.name}: give each its folder")
        kind = {".tar": "webdataset", ".parquet": "parquet"}[first.suffix.lower()]
        return _open_table(root, kind, split, size, named, archives)
    if root.is_dir():
        return _open_folder(root, split, size, named)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not os.path.lexists(root):
        return _open_table(root, text, split, size, named, {})
    hint = "unpack the archive and give its folder" if root.is_file() else "check the path, or use 'shapes'"
    raise ClipgenError(f"{root} is not a folder of images: {hint}")


def open_folder(root: Path, size: int = 0) -> ImageSet:
    """Every image of a folder's listing, without splits and captions, to be scored; `size` 0 takes the images' own.

    Raises ClipgenError where there is no folder, fewer than 2 images, or without `size` images that are not squares of one size.
    """
    root, sizes = Path(root).expanduser(), set()
    if not root.is_dir():
        raise ClipgenError(f"{root} is not a folder of images: check the path, or unpack the archive")
    listing = list_folder(root).without_strays()
    tell(f"{root}: every one of {listing.describe()}")
    if (n := len(listing.names)) < 2:
        raise ClipgenError(f"{root} holds {n} images, too few to compare: give a folder of at least 2")
    for name in listing.names if not size else ():
        with suppress(OSError, Image.DecompressionBombError), Image.open(root / name) as image:  # reading will say why
            sizes.add(image.size)
    if not size and len(sizes) != 1:
        some = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
        what = f"the images in {root} have {len(sizes)} different sizes ({some}, ...): say by --size which they get"
        raise ClipgenError(what if sizes else f"none of {n} images in {root} could be read: restore them")
    width, height = (size, size) if size else sizes.pop()
    if width != height:
        raise ClipgenError(f"the images in {root} are {width}x{height}: say by --size which square is cut from them")
    return ImageSet(root.resolve().name, "all", root, listing.names, width)


def _split_by_hash(names: list[str], split: str, where: Path) -> np.ndarray:
    """The rows of a split of images without splits: val are those of the smallest hashes, so that new files move few."""
    digests = (hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names)
    order = np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64, len(names))
    count = int((order >> np.uint64(56) < 256 * VAL_SHARE).sum())
    is_val = np.zeros(len(names), bool)
    is_val[np.argsort(order, kind="stable")[: max(count, min(FEWEST_VAL, len(names) // 2))]] = True
    rows = np.flatnonzero(is_val == (split == "val"))
    if not len(rows):
        raise ClipgenError(f"{where} has {len(names)} images, too few for a {split} split: add more, or make val/")
    return rows


def _open_coco(root: Path, split: str, size: int, name: str, year: str = "") -> ImageSet:
    files = {p.stem.removeprefix("captions_"): p for p in sorted(root.glob("annotations/captions_*.json"))}
    chosen, is_divided = choose_split(files, split, root, year)
    chosen = chosen or next(iter(files))
    path, content, there = files[chosen], read_json(files[chosen]), set(list_folder(root).names)
    try:
        places, left_out = _coco_places(content, chosen, there)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClipgenError(f"{path} is not in COCO's layout ({shortened(repr(error))}): restore it") from None
    if not places:
        missing = f"none of the {len(content['images'])} images of {path.name}"
        raise ClipgenError(f"{root / chosen} holds {missing}: unpack {chosen}.zip there")
    keys = sorted(places)
    if is_divided:
        keys = [keys[row] for row in _split_by_hash([places[key] for key in keys], split, root)]
    names, describe = [places[key] for key in keys], partial(_describe_coco, path, keys)
    images = ImageSet(name, split if is_divided else chosen, root, names, size, describe)
    images.skipped |= left_out
    if name != "shapes":
        some = f", left out: {len(left_out)}, the first {' '.join(next(iter(left_out.items())))}" if left_out else ""
        tell(f"{root}: {images.split}, {len(images):,} images, captions in {path.name}{some}")
    return images


def _coco_places(content: dict, chosen: str, there: set[str]) -> tuple[dict[int, str], dict[str, str]]:
    """Image id -> its file, looked up in the listing so that no name leads out of it; what is left out -> why."""
    texts, places, left_out, ids = _coco_texts(content), {}, {}, set()
    for image in content["images"]:
        key, name = int(np.int64(image["id"])), str(image["file_name"])
        tops = (f"{chosen}/", f"images/{chosen}/", "images/", "")
        place = next((top + name for top in tops if top + name in there), None)
        if place and key not in ids:
            places[key] = place
        else:
            why = "its id stands in the annotations twice" if key in ids else "the folder has no such file"
            left_out[shortened(name).encode(errors="replace").decode()] = f"named in the annotations, but {why}"
        ids.add(key)
    for key in sorted(texts.keys() - ids):
        left_out[shortened(f"image_id {key}")] = "captions without an entry among the images"
    if empty := len(content["annotations"]) - sum(map(len, texts.values())):
        left_out[f"{empty} captions"] = "null or empty"
    return places, left_out


def _coco_texts(content: dict) -> dict[int, list[str]]:
    """Image id -> its captions; null and empty ones are dropped."""
    texts: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        texts.setdefault(int(annotation["image_id"]), []).extend(_captions([annotation["caption"]]))
    return texts


def _describe_coco(path: Path, keys: list[int]) -> Texts:
    """Captions of images by their ids; the file is read again, so that a training need not keep them."""
    texts = _coco_texts(read_json(path))
    return [tuple(texts.get(key, ())) for key in keys], None


def _open_folder(root: Path, split: str, size: int, named: dict[str, str]) -> ImageSet:
    listing = list_folder(root).without_strays()
    if not listing.names:
        raise ClipgenError(f"{root} holds no images ({listing.describe()}): give another folder")
    groups = listing.splits()
    chosen, is_divided = choose_split(groups, split, root, named.get("year", ""))
    tell(f"{root}: {listing.describe()}")
    names = groups[chosen] if chosen else listing.names
    if is_divided:
        names = [names[row] for row in _split_by_hash(names, split, root)]
    describe = partial(_describe_folder, root, names, listing, named)
    return ImageSet(root.resolve().name, split if is_divided else chosen, root, names, size, describe)


def _describe_folder(root: Path, names: list[str], listing: Listing, named: dict[str, str]) -> Texts:
    """What metadata files say of the images; else captions by name.txt beside name.jpg, classes by folders."""
    entries: dict[str, dict] = {}
    folders = {above for name in names for above in PurePosixPath(name).parents} if listing.metadata else ()
    for path in map(PurePosixPath, listing.metadata):
        # a name by which images are known, never one to open
        found = _metadata(root / path) if path.parent in folders else ()
        entries |= {os.path.normpath(path.parent / str(entry.get("file_name"))): entry for entry in found}
    rows = [entries.get(os.path.normpath(name), {}) for name in names]
    known = dict.fromkeys(key for row in rows for key in row if key != "file_name")
    columns = {key: [row.get(key) for row in rows] for key in known}
    captions, classes = _read_texts(columns, columns.get, named, root)
    if captions is None:
        stems = [name.rpartition(".")[0] for name in names]
        captions = [_captions(read_text(root / listing.texts[stem])) if stem in listing.texts else () for stem in stems]
    if classes is None and (found := folder_classes(names, bool(listing.splits()))):
        classes = class_names(found, root)
    return captions, classes


def _metadata(path: Path) -> list[dict]:
    """The entries of metadata.jsonl or metadata.csv. Raises ClipgenError where it cannot be read."""
    try:
        lines, is_csv = io.StringIO(read_text(path)), path.suffix == ".csv"
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        entries = list(csv.DictReader(lines, strict=True)) if is_csv else [_json_entry(*pair) for pair in numbered]
        if some := next((number for number, entry in enumerate(entries, 2) if None in entry), 0):
            raise ValueError(f"entry {some - 1} has more columns than the header: put captions with commas into quotes")
        if entries and not any("file_name" in entry for entry in entries):
            raise ValueError(f"it has no column file_name but {shortened(', '.join(map(str, entries[0])), 80)}")
    except (ValueError, csv.Error) as error:
        raise ClipgenError(f"{path} cannot be read ({reason(error)}): restore it") from None
    return entries


def _json_entry(number: int, line: str) -> dict:
    with suppress(ValueError, RecursionError):
        if isinstance(entry := json.loads(line), dict):
            return entry
    raise ValueError(f"line {number} is no JSON object")


def _archives(root: Path) -> dict[str, list[str]]:
    """The parquet or tar files at a path, by the splits that their names tell (train-0001.tar, data/val-00000-of-00002.parquet).

    They are the path itself, or those in a folder, in its `data`, and in folders named as splits.
    """
    folders = [root / top / name for top in ("", "data") for name in ("", *TRAIN_NAMES, *VAL_NAMES)]
    files = [root] if root.is_file() else [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    files = [f for f in files if f.suffix.lower() in (".parquet", ".tar") and f.is_file() and f.name[0] != "."]
    files = sorted(file for file in files if file.name != "metadata.parquet")
    groups: dict[str, list[str]] = {}
    for file in files:
        if file.suffix != files[0].suffix:
            raise ClipgenError(f"{root} holds {files[0].name} and {file.name}: give each kind its folder")
        with open(file, "rb") as stream:
            is_tar, is_gzip = file.suffix.lower() == ".tar", stream.read(2) == b"\x1f\x8b"
            stream.seek(max(file.stat().st_size - 512, 0))
            if is_tar and stream.read().strip(b"\0"):  # tarfile would say nothing
                cure = "is compressed: unpack it by gunzip" if is_gzip else "is cut short or no tar: restore it"
                raise ClipgenError(f"{file} {cure}")
        parts = re.split(r"[-_./\d]+", os.path.relpath(file, root).lower())
        found = next((part for part in parts if SPLIT.fullmatch(part)), "images")
        groups.setdefault(found, []).append(str(file.absolute()))
    return groups


def _check_sizes(file: Path) -> None:
    """Raises ClipgenError where the headers of an archive promise far more than it holds, or more than an image needs."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    size = file.stat().st_size
    if file.suffix.lower() == ".tar":
        with tarfile.open(file, "r:") as tar:
            sizes = [member.size for member in tar]
        total, most = sum(sizes), size * (max(sizes, default=0) <= MAX_BYTES)
    else:
        with ParquetFile(file) as table:
            columns = map(table.schema.column, range(len(table.schema)))
            texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
            total = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
        most = max(MAX_BYTES, UNPACKED * size)
        with ParquetFile(file, read_dictionary=texts) as table:  # a value that is repeated is stored once: look at some
            for some in islice(table.iter_batches(16), int(total <= most)):
                parts = [column.chunk(0) for column in pa.Table.from_batches([some]).flatten().columns]
                parts = [part.dictionary_decode() if isinstance(part, pa.DictionaryArray) else part for part in parts]
                total = max(total, sum(part.nbytes for part in parts) / len(some) * table.metadata.num_rows)
    if total > most:
        what = f"{file} of {size / 1e9:.3g} GB unpacks to {total / 1e9:.3g} GB, or members of 1 GB"
        raise ClipgenError(f"{what}: make it again")


def _open_table(root: Path, source: str, split: str, size: int, named: dict[str, str], files: dict) -> ImageSet:
    """What the library `datasets` reads, a hub id or archives, as Arrow files below data/cache and an image set of them."""
    import datasets as hf

    if os.environ.get("CLIPGEN_PROGRESS") == "0":
        hf.disable_progress_bars()
    hf.logging.set_verbosity(hf.logging.CRITICAL)  # what it would log is in our sentence
    cache = os.environ.get("HF_DATASETS_CACHE", str(MADE_DATA / "cache"))
    try:
        builder = hf.load_dataset_builder(source, data_files=files or None, cache_dir=cache)
        for file in sum(files.values(), []) if not os.path.isdir(builder.cache_dir) else ():
            _check_sizes(Path(file))
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except ClipgenError:
        raise
    except Exception as error:  # of any file and any address: the library raises whatever its readers raise
        where = root if files else f"{source} is no folder here, and as a data set of the Hugging Face hub it"
        why = reason(error.__cause__ or error)
        raise ClipgenError(f"{where} cannot be read ({why}): check its name, or restore its files") from None
    chosen, is_divided = choose_split(splits, split, root, named.get("year", ""))
    images, texts = _columns(splits[chosen or next(iter(splits))], named, root)
    counts = ", ".join(f"{name} {len(table):,}" for name, table in splits.items())
    tell(f"{root}: {counts} images; other columns: {shortened(', '.join(texts.column_names)) or 'none'}")
    if is_divided:
        rows = _split_by_hash(_member_names(images), split, root)
        images, texts = images.select(rows), texts.select(rows)
    name = root.resolve().stem if root.is_file() else root.resolve().name
    return ImageSet(name, split, root, images, size, partial(_describe_table, texts, named, root))


def _columns(table: hf.Dataset, named: dict[str, str], root: Path) -> tuple[hf.Dataset, hf.Dataset]:
    """The column of encoded images, by name or by kind, and all that is no image."""
    import datasets as hf

    is_image = lambda x: isinstance(x, hf.Image) or isinstance(x, dict) and x.keys() == {"bytes", "path"}
    found = [name for name, feature in table.features.items() if is_image(feature)]
    found = found or [name for name, feature in table.features.items() if getattr(feature, "dtype", "") == "binary"]
    image = named.get("image") or ("image" if "image" in found else next(iter(found), "image"))
    if image not in found:
        there = shortened(", ".join(table.column_names))
        raise ClipgenError(f"{root} has no column {image!r} of images (it has {there}): name one with ?image=COLUMN")
    images = table.select_columns([image]).cast_column(image, hf.Image(decode=False))  # load_image decodes them
    return images, table.remove_columns(found).flatten()


def _member_names(images: hf.Dataset) -> list[str]:
    """The images' names in their archive where all differ, else the numbers of the rows."""
    column = f"{images.column_names[0]}.path"
    paths = images.flatten().select_columns([column])[column][:]
    names = [PurePosixPath((path or "").replace("\\", "/")).name for path in paths]
    if len(set(names)) == len(names) and all(name.isprintable() and name not in ("", "..") for name in names):
        return names
    return [f"{row:06d}{PurePosixPath(name).suffix}" for row, name in enumerate(names)]


def _describe_table(texts: hf.Dataset, named: dict[str, str], root: Path) -> Texts:
    def values(column: str) -> list:
        found, names = texts[column][:], getattr(texts.features[column], "names", None)
        if names is None:  # else it is a ClassLabel: numbers of names
            return found
        names = class_names(names, root)
        return [names[v] if v is not None and 0 <= v < len(names) else None for v in found]

    return _read_texts(texts[:100], values, named, root)


def _read_texts(samples: dict[str, list], values: Callable[[str], list], named: dict[str, str], root: Path) -> Texts:
    """Captions and classes from columns: named by the user, else by their names, else captions of two words and more.

    In: `samples`, some values of each column, and `values`, column -> all of them. Raises ClipgenError where a named column is
    not there.
    """
    words = {}  # of a caption, on average
    for column, some in samples.items():
        if texts := [text for value in some for text in _captions(value)]:
            words[column] = sum(len(text.split()) for text in texts) / len(texts)
    bare = {column.rpartition(".")[2]: column for column in reversed(words)}  # json.caption is a caption
    longest = max(words, key=words.get, default=None)
    longest = longest if words.get(longest, 0) >= 2 else None
    found = next((bare[name] for name in CAPTION_COLUMNS if name in bare), longest)
    told = named["caption"].split(",") if "caption" in named else [found] if found else []
    labels = named["class"].split(",") if "class" in named else [name for name in CLASS_COLUMNS if name in samples][:1]
    for column in (*told, *labels):
        if column not in samples:
            there = shortened(", ".join(samples)) or "none"
            raise ClipgenError(f"{root} has no column {column!r}: name one of those there ({there})")
    captions = [sum(map(_captions, row), ()) for row in zip(*map(values, told), strict=True)]
    rows = list(zip(*map(values, labels), strict=True))
    known = bool(rows) and not any(None in row for row in rows)
    return captions if any(captions) else None, [_class_name(labels, row) for row in rows] if known else None


def _class_name(labels: list[str], row: tuple) -> str:
    """The value of the class column, or of several "type=handbag, colour=red"."""
    if len(labels) == 1:
        return str(row[0])
    return ", ".join(f"{label}={str(value).replace(', ', ' ')}" for label, value in zip(labels, row, strict=True))


def _captions(value: object) -> tuple[str, ...]:
    """Captions without their outer blanks, from the lines of a text, a list of texts or anything else."""
    texts = value.splitlines() if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
