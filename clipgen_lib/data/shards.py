"""Images inside archives: WebDataset tar shards and Hugging Face parquet, each read where it lies.

In: the files of a set. Out: a source of images, row -> bytes in any order, with captions and classes for who asks. In memory
is an index of where each image lies, some 50 bytes each; of parquet a few row groups besides. Nothing is unpacked to disk,
no name inside an archive is ever used as a path, and a process reads by itself (`os.pread`, row groups of its own), so that
loader workers and ranks share nothing. What cannot be used is left out and listed: shard -> why, or shard/member -> why.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..runtime.runs import DATA, ClipgenError, progress, write_atomic

WINDOW = 16  # blocks whose rows are shuffled together
from .images import EXTENSIONS

if TYPE_CHECKING:
    import pyarrow


CLASS_PROMPT = "a photo of a {}"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of gzip, bzip2, xz and zstandard
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


CAPTION_COLUMNS = ("caption", "captions", "text", "sentences")
OPEN_FILES = 64  # shards that a process keeps open


TAR_BLOCK, TAR_WINDOW = 64, 64  # neighbours in a tar that stay near each other in an epoch; blocks shuffled as one


GROUP_BYTES = 512 << 20  # row groups of parquet that a process keeps
SLOW_SCAN = 5.0  # seconds from which on an index is kept on disk


class Names(Sequence[str]):
    """Many short strings in one array of bytes: 8 bytes each beside their letters, and no objects for forks to touch."""

    def __init__(self, letters: np.ndarray, ends: np.ndarray):
        self.letters, self.ends = letters, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Names:
        letters, ends = bytearray(), []
        for text in texts:
            letters += text.encode("utf-8", "surrogateescape")
            ends.append(len(letters))
        return cls(np.frombuffer(bytes(letters), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        row = range(len(self))[row]
        start = self.ends[row - 1] if row else 0
        return self.letters[start : self.ends[row]].tobytes().decode("utf-8", "surrogateescape")

    def kept(self, mask: np.ndarray) -> Names:
        lengths = np.diff(self.ends, prepend=0)
        return Names(self.letters[np.repeat(mask, lengths)], np.cumsum(lengths[mask]))


@dataclass(frozen=True, eq=False)
class Index(Sequence[str]):
    """Where each image lies; as a sequence, the names of images: shard/member.

    Attributes:
        shards: paths below the root, posix.
        starts: (S + 1,) the first row of each shard, then the number of rows.
        members: names inside the shards.
        columns: facts of each row, (N,) each.
    """

    shards: list[str]
    starts: np.ndarray
    members: Names
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: int) -> str:
        row = range(len(self))[row]
        return f"{self.shards[self.shard(row)]}/{self.members[row]}"

    def shard(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, "right")) - 1

    def kept(self, mask: np.ndarray) -> Index:
        """The rows where `mask` (N,) is true."""
        before = np.concatenate([[0], np.cumsum(mask)])
        columns = {name: column[mask] for name, column in self.columns.items()}
        return Index(self.shards, before[self.starts], self.members.kept(mask), columns)

    @property
    def nbytes(self) -> int:
        parts = (self.starts, self.members.letters, self.members.ends, *self.columns.values())
        return sum(part.nbytes for part in parts)


class Scan(NamedTuple):
    """What one look through a shard found: member names, a tuple of facts of each, and what is left out ("": the shard)."""

    members: list[str]
    rows: list[tuple[int, ...]]
    skipped: dict[str, str]


class Recent:
    """What `make` gave for the keys asked last, within a budget of their `cost`; each process has its own."""

    def __init__(self, make: Callable, budget: int, cost: Callable[[object], int]):
        self.make, self.budget, self.cost = make, budget, cost
        self._forget()

    def _forget(self) -> None:
        self.process, self.kept, self.spent = os.getpid(), OrderedDict(), 0

    def __call__(self, *key: int) -> object:
        if self.process != os.getpid():  # after a fork: the parent goes on with its own
            self._forget()
        if key not in self.kept:
            made = self.make(*key)
            self.spent += self.cost(made)
            self.kept[key] = made
            while self.spent > self.budget and len(self.kept) > 1:
                self.spent -= self.cost(self.kept.popitem(last=False)[1])
        self.kept.move_to_end(key)
        return self.kept[key]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kept": OrderedDict(), "spent": 0, "process": 0}


def _one(thing: object) -> int:
    return 1


def _nbytes(array: object) -> int:
    return array.nbytes


class TarShards:
    """WebDataset's layout: `key.jpg` with, for who asks, `key.txt` or `key.json` (its `caption`) and `key.cls` beside it."""

    COLUMNS = {
        "offset": np.int64,
        "size": np.uint32,
        "text": np.int64,
        "text_size": np.uint32,
        "is_json": np.bool_,
        "label": np.int64,
        "label_size": np.uint32,
    }
    window = TAR_WINDOW

    def __init__(self, root: Path, names: Index):
        self.root, self.names = root, names
        self._file = Recent(self._opened, OPEN_FILES, _one)

    def kept(self, mask: np.ndarray) -> TarShards:
        return TarShards(self.root, self.names.kept(mask))

    @property
    def blocks(self) -> np.ndarray:
        """(M + 1,) the first row of each block of neighbours, then N."""
        parts = [np.arange(start, stop, TAR_BLOCK) for start, stop in pairwise(self.names.starts)]
        return np.concatenate([*parts, self.names.starts[-1:]])

    def open(self, row: int) -> bytes:
        """The file of an image.

        Raises:
            ClipgenError: the shard cannot be read there any more.
        """
        return self._read(row, "offset", "size")

    def facts(self) -> Iterator[str]:
        """What the hash of a set is made of."""
        return (f"{name}:{size};" for name, size in zip(self.names, self.names.columns["size"], strict=True))

    def captions(self, skipped: dict[str, str]) -> list[tuple[str, ...]] | None:
        """The captions of each row, None where no row has any; what cannot be read is put into `skipped`."""
        columns = self.names.columns
        if not (columns["text"] >= 0).any():
            return None
        return [self._caption(row, skipped) if columns["text"][row] >= 0 else () for row in range(len(self.names))]

    def _caption(self, row: int, skipped: dict[str, str]) -> tuple[str, ...]:
        try:
            text = self._read(row, "text", "text_size").decode("utf-8", "replace")
            said = json.loads(text).get("caption") if self.names.columns["is_json"][row] else text.splitlines()
            return _lines(said)
        except (ClipgenError, ValueError, TypeError, AttributeError, RecursionError) as error:
            skipped[PurePosixPath(self.names[row]).with_suffix(".json").as_posix()] = (
                f"its caption cannot be read ({error})"
            )
            return ()

    def classes(self) -> list[str] | None:
        """The text of each row's `key.cls`, None where a row has none."""
        if (self.names.columns["label"] < 0).any():
            return None
        rows = range(len(self.names))
        return [self._read(row, "label", "label_size").decode("utf-8", "replace").strip() for row in rows]

    def _read(self, row: int, offset: str, size: str) -> bytes:
        shard, columns = self.names.shard(row), self.names.columns
        wanted = int(columns[size][row])
        try:
            content = os.pread(self._file(shard).fileno(), wanted, int(columns[offset][row]))
        except OSError as error:
            raise ClipgenError(f"{self.root / self.names[row]} cannot be read ({error}): restore the shard") from None
        if len(content) < wanted:
            raise ClipgenError(f"{self.root / self.names[row]} lies behind the end of its shard: restore the shard")
        return content

    def _opened(self, shard: int) -> io.FileIO:
        return open(self.root / self.names.shards[shard], "rb", buffering=0)

    @classmethod
    def scan(cls, path: Path) -> Scan:
        """Go through the headers of a shard; images before a cut are kept."""
        samples: dict[str, dict[str, tuple[str, int, int]]] = {}
        skipped: dict[str, str] = {}
        seen, start, length = 0, b"", path.stat().st_size
        try:
            with open(path, "rb") as stream:
                start = stream.read(8)
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # it would keep them all
                    if member.size < 0 or tar.offset <= member.offset or member.offset_data + member.size > length:
                        break
                    seen += 1
                    name = PurePosixPath(member.name).as_posix()
                    reason = _unusable(member)
                    if reason:
                        skipped[name] = reason
                    elif member.isreg() and (parts := re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name)):
                        _add(samples.setdefault(parts[1], {}), parts[2].lower(), name, member, skipped)
                tar.fileobj.seek(tar.offset)
                if member is not None or tar.fileobj.read(512) != bytes(512):
                    skipped[""] = f"it is cut short or damaged behind its member {seen}: what comes before that is used"
        except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
            if start.startswith(MAGIC):
                skipped[""] = "it is compressed: unpack it to .tar"
            elif not seen:
                skipped[""] = f"it is no tar that can be read ({error}): restore it"
            else:
                skipped[""] = (
                    f"it is cut short or damaged behind its member {seen} ({error}): what comes before that is used"
                )
        for key in [key for key, fields in samples.items() if "image" not in fields]:
            skipped[key] = "it has no image beside it"
            del samples[key]
        if not samples:
            skipped.setdefault("", "it holds no images")
        return Scan([fields["image"][0] for fields in samples.values()], [_facts(f) for f in samples.values()], skipped)


def _unusable(member: tarfile.TarInfo) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name points outside of the shard"
    if any(ord(letter) < 32 for letter in member.name):
        return "its name has control characters"
    if not (member.isreg() or member.isdir()) or member.issparse():
        return "it is a link, a device or a sparse file"
    return "it is larger than any image" if member.size > 1 << 30 else ""


def _add(fields: dict, ending: str, name: str, member: tarfile.TarInfo, skipped: dict[str, str]) -> None:
    """Put a member into its sample; endings that mean nothing here are passed over."""
    kind = "image" if f".{ending}" in EXTENSIONS else ending if ending in ("txt", "json", "cls") else None
    if kind in fields:
        skipped[name] = f"its key has a {kind} already"
    elif kind:
        fields[kind] = (name, member.offset_data, member.size)


def _facts(fields: dict[str, tuple[str, int, int]]) -> tuple[int, ...]:
    """Of a sample, in the order of TarShards.COLUMNS."""
    absent = ("", -1, 0)
    text = fields.get("txt") or fields.get("json", absent)
    return *fields["image"][1:], *text[1:], "txt" not in fields, *fields.get("cls", absent)[1:]


def _lines(said: str | Sequence[str] | None) -> tuple[str, ...]:
    """Captions without their outer blanks, from one, several or none."""
    said = [said] if isinstance(said, str) else said or []
    return tuple(text.strip() for text in said if text and text.strip())


class ParquetShards:
    """Hugging Face datasets' layout: a column of struct{bytes, path}; captions, and labels with their names in the schema."""

    COLUMNS = {"group": np.int32, "row": np.int32, "group_bytes": np.int64}

    def __init__(self, root: Path, names: Index):
        self.root, self.names = root, names
        self._file = Recent(self._opened, OPEN_FILES, _one)
        self._group = Recent(self._pictures, GROUP_BYTES, _nbytes)

    def kept(self, mask: np.ndarray) -> ParquetShards:
        return ParquetShards(self.root, self.names.kept(mask))

    @property
    def blocks(self) -> np.ndarray:
        """(M + 1,) the first row of each row group, then N."""
        changes = np.flatnonzero(np.diff(self.names.columns["group"])) + 1
        return np.unique(np.concatenate([changes, self.names.starts]))

    @property
    def window(self) -> int:
        """Row groups that are shuffled together: as many as a process keeps, else each image would read a whole one."""
        largest = int(self.names.columns["group_bytes"].max(initial=1))
        return min(max(GROUP_BYTES // max(largest, 1), 1), WINDOW)

    def open(self, row: int) -> bytes:
        """The file of an image.

        Raises:
            ClipgenError: its row group cannot be read, or holds a path in its place.
        """
        columns = self.names.columns
        try:
            group = self._group(self.names.shard(row), int(columns["group"][row]))
            content = group[int(columns["row"][row])].as_py()
        except (*_arrow_errors(), IndexError) as error:
            raise ClipgenError(
                f"{self.root / self.names[row]} cannot be read ({_first_line(error)}): restore the shard"
            ) from None
        if content is None:
            raise ClipgenError(f"{self.root / self.names[row]} is a path without bytes: embed the files in the parquet")
        return content

    def facts(self) -> Iterator[str]:
        """What the hash of a set is made of; sizes are those of row groups, since parquet keeps no others."""
        return (f"{name}:{size};" for name, size in zip(self.names, self.names.columns["group_bytes"], strict=True))

    def captions(self, skipped: dict[str, str]) -> list[tuple[str, ...]] | None:
        """The captions of each row, else those that its class makes, None without both; unreadable ones go to `skipped`."""
        found = self._values(_caption_column, skipped)
        if any(found):
            return [_lines(said) for said in found]
        classes = self.classes()
        return classes and [(CLASS_PROMPT.format(name),) for name in classes]

    def classes(self) -> list[str] | None:
        """The name of each row's `label`, or its number as text; None where a row has none."""
        found = self._values(_label_column, {})
        if not found or any(label is None for label in found):
            return None
        names = _label_names(self._file(self.names.shard(0)).schema_arrow)
        if all(isinstance(label, int) for label in found) and not 0 <= min(found) <= max(found) < (
            len(names) or 1 << 63
        ):
            return None
        return [_plain(names[label] if names else str(label)) for label in found]

    def _values(self, column_of: Callable[[pyarrow.Schema], str | None], skipped: dict[str, str]) -> list:
        """The values of a column for each row; None where a shard has no such column or cannot be read."""
        found: list = []
        for start, stop in pairwise(self.blocks):
            shard, group = self.names.shard(start), int(self.names.columns["group"][start])
            values = None
            try:
                file = self._file(shard)
                if name := column_of(file.schema_arrow):
                    values = file.read_row_group(group, [name], use_threads=False).column(0).to_pylist()
            except _arrow_errors() as error:
                skipped[self.names.shards[shard]] = (
                    f"captions of its row group {group} cannot be read ({_first_line(error)})"
                )
            found += [values[row] if values else None for row in self.names.columns["row"][start:stop]]
        return found

    def _opened(self, shard: int) -> pyarrow.parquet.ParquetFile:
        return _parquet().ParquetFile(self.root / self.names.shards[shard])

    def _pictures(self, shard: int, group: int) -> pyarrow.ChunkedArray:
        file = self._file(shard)
        column = f"{_picture_column(file.schema_arrow)}.bytes"
        return file.read_row_group(group, [column], use_threads=False).flatten().column(0)

    @classmethod
    def scan(cls, path: Path) -> Scan:
        """Read the footer of a shard and the paths in its column of images."""
        try:
            file = _parquet().ParquetFile(path)
            column = _picture_column(file.schema_arrow)
            if column is None:
                return Scan(
                    [],
                    [],
                    {"": "it has no column of images, struct{bytes, path} named image: write it as datasets does"},
                )
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            paths = _paths(file, column)
            rows = [(i, row, _group_bytes(g, column)) for i, g in enumerate(groups) for row in range(g.num_rows)]
            if len(paths) != len(rows):
                raise ValueError(f"it has {len(paths)} paths for {len(rows)} rows")
        except _arrow_errors() as error:
            return Scan([], [], {"": f"it is cut short or no parquet ({_first_line(error)}): restore it"})
        return Scan(_member_names(paths), rows, {} if rows else {"": "it holds no images"})


def _parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise ClipgenError("parquet files need pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow.parquet


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError, KeyError


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _features(schema: pyarrow.Schema) -> dict:
    """What datasets wrote of the columns into the schema; nothing where it did not."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _picture_column(schema: pyarrow.Schema) -> str | None:
    """The column of images: the one called image, else the first that the schema calls one."""
    import pyarrow.types as types

    marked = [
        name
        for name, feature in _features(schema).items()
        if isinstance(feature, dict) and feature.get("_type") == "Image"
    ]
    for name in ("image", *marked):
        if (
            name in schema.names
            and types.is_struct(kind := schema.field(name).type)
            and kind.get_field_index("bytes") >= 0
        ):
            return name
    return None


def _caption_column(schema: pyarrow.Schema) -> str | None:
    import pyarrow.types as types

    def is_text(kind: pyarrow.DataType) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    for name in CAPTION_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if is_text(kind) or ((types.is_list(kind) or types.is_large_list(kind)) and is_text(kind.value_type)):
                return name
    return None


def _label_column(schema: pyarrow.Schema) -> str | None:
    import pyarrow.types as types

    if "label" not in schema.names:
        return None
    kind = schema.field("label").type
    return "label" if types.is_integer(kind) or types.is_string(kind) else None


def _label_names(schema: pyarrow.Schema) -> list[str]:
    label = _features(schema).get("label")
    names = label.get("names") if isinstance(label, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def _group_bytes(group: pyarrow.parquet.RowGroupMetaData, column: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == f"{column}.bytes")


def _paths(file: pyarrow.parquet.ParquetFile, column: str) -> list[str | None]:
    """The file name of each image; None where none is kept."""
    if file.schema_arrow.field(column).type.get_field_index("path") < 0:
        return [None] * file.metadata.num_rows
    return file.read([f"{column}.path"], use_threads=False).flatten().column(0).to_pylist()


def _member_names(paths: list[str | None]) -> list[str]:
    """Bare file names where all rows of a shard have different ones, else the rows' numbers with the files' endings."""
    bare = [PurePosixPath((path or "").replace("\\", "/")).name for path in paths]
    if len(set(bare)) == len(bare) and all(name.isprintable() and name not in ("", "..") for name in bare):
        return bare
    endings = (PurePosixPath(name).suffix.lower() for name in bare)
    return [f"{row:06d}{ending if ending in EXTENSIONS else ''}" for row, ending in enumerate(endings)]


def find_shards(path: Path) -> list[Path]:
    """The shards at a path: itself, or those in a folder, in its `data`, and in folders of these that are named as splits.

    Raises:
        ClipgenError: compressed tars, tar beside parquet, or shards beside images.
    """
    folders = [path, path / "data"] if path.is_dir() else []
    folders += [folder / name for folder in folders for name in SPLITS]
    files = [path] if path.is_file() else [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    files = sorted(
        file for file in files if file.name.lower().endswith((".tar", ".parquet", *COMPRESSED)) and file.is_file()
    )
    files = [file for file in files if not file.name.startswith(".") and file.name != "metadata.parquet"]
    packed = [file for file in files if file.name.lower().endswith(COMPRESSED)]
    found = [file for file in files if file not in packed]
    if not packed and not found:
        return []
    pictures = path.rglob("*") if path.is_dir() else ()
    beside = next(
        (file for file in pictures if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")), None
    )
    if beside and found:
        raise ClipgenError(
            f"{path} holds both images ({beside.name}) and shards ({found[0].name}): move one kind to a folder of its own"
        )
    if beside:
        return []
    if packed:
        raise ClipgenError(
            f"{packed[0]} is compressed, and images are read from any place of a shard: unpack it to .tar"
        )
    if len({file.suffix.lower() for file in found}) > 1:
        raise ClipgenError(f"{path} holds both .tar and .parquet shards: move one kind to a folder of its own")
    return found


def split_of(shard: str) -> str | None:
    """`train`, `val` or `test` as the first part of a shard's path that says so; None where none does."""
    parts = (re.sub(r"\d+$", "", part) for part in re.split(r"[-_./]", shard.lower()))
    return next((SPLITS[part] for part in parts if part in SPLITS), None)


def open_shards(
    root: Path, files: list[Path], show_progress: bool = True
) -> tuple[TarShards | ParquetShards, dict[str, str]]:
    """The images of shards of one kind below `root`, and what was left out of them.

    An index that took long to make is kept under data/shard_index, by the names, sizes and times of the files.

    Raises:
        ClipgenError: no shard holds an image that can be used; parquet without pyarrow.
    """
    kind = TarShards if files[0].suffix.lower() == ".tar" else ParquetShards
    if kind is ParquetShards:
        _parquet()
    facts = [(str(f.resolve()), (stat := f.stat()).st_size, stat.st_mtime_ns) for f in files]
    shards = [file.relative_to(root).as_posix() for file in files]
    kept = DATA / "shard_index" / f"{hashlib.sha256(repr([kind.COLUMNS, shards, facts]).encode()).hexdigest()[:16]}.npz"
    index, skipped = _read_index(kept) or (None, {})
    if index is None:
        began = time.monotonic()
        index, skipped = _scanned(kind, files, shards, show_progress)
        if time.monotonic() - began > SLOW_SCAN:
            with contextlib.suppress(OSError):  # no room or no right to write: it is made again next time
                _write_index(kept, index, skipped)
    if not len(index):
        name, why = next(iter(skipped.items()))
        raise ClipgenError(f"none of the {len(files)} shards in {root} holds an image that can be used ({name}: {why})")
    return kind(root, index), skipped


def _scanned(kind: type, files: list[Path], shards: list[str], show_progress: bool) -> tuple[Index, dict[str, str]]:
    members, ends, columns, counts, skipped, letters = [], [], [], [0], {}, 0
    with ThreadPoolExecutor(8) as pool, progress(len(files), "reading shards", show_progress and len(files) > 8) as bar:
        for shard, scan in zip(shards, pool.map(kind.scan, files), strict=True):
            names = Names.of(scan.members)
            members.append(names.letters)
            ends.append(names.ends + letters)
            letters += len(names.letters)
            rows = list(zip(*scan.rows, strict=True)) or [()] * len(kind.COLUMNS)
            columns.append([np.array(row, dtype) for row, dtype in zip(rows, kind.COLUMNS.values(), strict=True)])
            counts.append(len(names))
            skipped |= {f"{shard}/{name}" if name else shard: why for name, why in scan.skipped.items()}
            bar.update()
    joined = {name: np.concatenate(parts) for name, parts in zip(kind.COLUMNS, zip(*columns, strict=True), strict=True)}
    return Index(shards, np.cumsum(counts), Names(np.concatenate(members), np.concatenate(ends)), joined), skipped


def _write_index(path: Path, index: Index, skipped: dict[str, str]) -> None:
    stream = io.BytesIO()
    notes = np.frombuffer(json.dumps([index.shards, skipped]).encode(), np.uint8)
    columns = {f"column_{name}": column for name, column in index.columns.items()}
    np.savez(
        stream, notes=notes, starts=index.starts, letters=index.members.letters, ends=index.members.ends, **columns
    )
    write_atomic(path, stream.getvalue())


def _read_index(path: Path) -> tuple[Index, dict[str, str]] | None:
    """What `_write_index` wrote; None where nothing whole is there."""
    try:
        with np.load(path) as arrays:
            shards, skipped = json.loads(arrays["notes"].tobytes())
            columns = {
                name.removeprefix("column_"): arrays[name] for name in arrays.files if name.startswith("column_")
            }
            return Index(shards, arrays["starts"], Names(arrays["letters"], arrays["ends"]), columns), skipped
    except Exception:  # of a cache: whatever is wrong with it, it is made again
        return None
