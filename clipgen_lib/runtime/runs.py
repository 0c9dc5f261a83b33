"""Runs and their files, errors, signals and progress bars.

A run is a folder `results/<run>/` with config.json, metrics.jsonl, summary.json, figures/ and notebooks/. A file is written
beside its place and renamed, so that an interruption leaves the previous version whole. Nothing here knows what a model is.
The environment variables CLIPGEN_HOME, CLIPGEN_RESULTS and CLIPGEN_DATA move the project's folder, the runs, and the data that
are made: Shapes worlds, and what the library `datasets` converts.
"""

from __future__ import annotations

import builtins
import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock, Timeout
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(os.environ.get("CLIPGEN_HOME", Path(__file__).resolve().parents[2]))
DATA = ROOT / "data"
MADE_DATA = Path(os.environ.get("CLIPGEN_DATA", DATA))
RESULTS = Path(os.environ.get("CLIPGEN_RESULTS", ROOT / "results"))
MOST_SEED = 2**63 - 1  # image j uses seed + j, and torch takes seeds below 2^64


class ClipgenError(Exception):
    """A mistake the user can mend: one sentence, on one line, that says what is wrong, where, and the cure."""

    exit_code = 1

    def __init__(self, sentence: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in sentence))  # names of files may hold anything


class Stopped(ClipgenError):
    """SIGTERM, SIGINT or SIGHUP, after what was done has been saved; ends a command as the signal would have."""

    def __init__(self, number: int, where: str):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} {where}: what was done is kept, and the same command resumes from there")
        self.exit_code = 128 + number


def reason(error: Exception) -> str:
    """What another library's error says, on one line of at most 200 characters."""
    return shortened(str(error)) or type(error).__name__


def shortened(text: str, most: int = 200) -> str:
    """Any text, such as a name from a file, as one line of at most `most` characters."""
    line = " ".join(text[: 8 * most].split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _sync(folder: Path, below: bool = True) -> None:
    """Put a folder on the disk itself, and all `below` it, readable as the umask says: safetensors writes for one user."""
    paths = [folder, *(folder.rglob("*") if below else ())]
    if len(paths) > 100:  # one by one, 20,000 images take minutes
        os.sync()
        return
    for path in paths:
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _settle(target: Path) -> None:
    """What was moved aside comes back where nothing has taken its place, and is deleted where something has."""
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def fresh_folder(target: Path, file: str = "") -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends without an error, or one `file` in it.

    All is on the disk before it gets its name, so that even a loss of power leaves the old or the new, and readable as the
    umask says. An old folder is moved aside first and deleted last; after a kill in between, `open_run` puts it back.
    Raises ClipgenError where the disk is full or cannot be written; the old one stays.
    """
    folder = _beside(target, f"{os.getpid()}.new")
    try:
        with room_on_disk(target):
            folder.mkdir(parents=True, exist_ok=True)
            yield folder / file
            _sync(folder)
            _settle(target)
            if not file and target.exists():
                target.rename(_beside(target, "old"))
            (folder / file).rename(target)
            _sync(target.parent, below=False)
    finally:
        _settle(target)
        for _ in range(2):  # a call of it that failed may succeed now
            shutil.rmtree(folder, ignore_errors=True)


def fresh_file(target: Path) -> AbstractContextManager[Path]:
    """As `fresh_folder`, for one file: a temporary name, in a folder beside `target`."""
    return fresh_folder(target, target.name)


NO_ROOM = "free some, then run the same command to resume"
CURES = {
    NO_ROOM: {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
    "get the right to it from its owner, or choose another place": {errno.EACCES, errno.EPERM},
    "choose another place; CLIPGEN_RESULTS and CLIPGEN_DATA move what is made": {errno.EROFS},
    "close other programs, or raise the limit by 'ulimit -n'": {errno.EMFILE, errno.ENFILE},
    "restore it, or run the step that makes it": {errno.ENOENT, errno.ENOTDIR, errno.EISDIR},
}


def explained(kind: str, text: str) -> str:
    """An error of the disk or the memory as one sentence with its cure; "" for any other.

    In: its class's name and its text, which is all there is of an error in a notebook's kernel, or in safetensors.
    """
    numbers = {int(number) for number in re.findall(r"(?:Errno |os error |code: )(\d+)", text)}
    text = shortened(re.sub(r"\[Errno \d+\] ", "", text)) or kind
    if "MemoryError" in kind or re.search(r"n't allocate memory|annot allocate memory|killed by signal", text):
        return f"the memory is used up ({text}): close other programs or take a smaller preset, then run it again"
    if kind != "SafetensorError" and not issubclass(getattr(builtins, kind, str), OSError):
        return ""
    otherwise = "see that its disk is there and well, then run the same command to resume"
    return f"{text}: {next((cure for cure, known in CURES.items() if known & numbers), otherwise)}"


@contextmanager
def room_on_disk(target: Path | str = "", lacking: Callable[[], float] = lambda: 0) -> Iterator[None]:
    """An error of the disk or the memory in writing `target` becomes a `ClipgenError`; on a full disk it tells the `lacking` bytes."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        kind = "OSError" if isinstance(error, OSError) else type(error).__name__
        if not (sentence := explained(kind, str(error))):
            raise
        missing = f" ({lacking() / 1e9:.3g} GB are missing)" if lacking() > 0 else ""
        if target and sentence.endswith(NO_ROOM):
            sentence = f"no room for {target}{missing}: {NO_ROOM}"
        raise ClipgenError(sentence if str(target) in sentence else f"{target}: {sentence}") from None


@contextmanager
def held(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Keep `path` to this process while the block writes it; the lock of a process that died is free.

    What killed processes left half written, beside it or below, is swept first. Raises ClipgenError where it is published or,
    without `wait`, another process holds it: who, and since when.
    """
    refuse_published(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(_beside(path, "lock")), _beside(path, "holder")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        told = holder.read_text(errors="replace") if holder.is_file() else f"{path} is being made by another process"
        raise ClipgenError(f"{told}: wait for it, or stop it and run this again") from None
    try:
        who = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        holder.write_text(f"{what} is being made in {path} by {who}")
        for left in [*path.parent.glob(f".{glob.escape(path.name)}.*"), *path.rglob(".*.new"), *path.rglob(".*.old")]:
            if left.suffix == ".new":
                shutil.rmtree(left, ignore_errors=True)
            elif left.suffix == ".old":
                _settle(left.with_name(left.stem[1:]))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def refuse_published(folder: Path) -> None:
    """Raises `ClipgenError` where a file `published` in it, or in its sweep, says that it is; CLIPGEN_PUBLISH=1 allows to make it anew."""
    published = [place for place in (folder, folder.parent) if (place / "published").exists()]
    if published and os.environ.get("CLIPGEN_PUBLISH") != "1":
        cure = "write elsewhere by --run or CLIPGEN_RESULTS, or set CLIPGEN_PUBLISH=1 to make it anew"
        raise ClipgenError(f"{published[0]} is a published result: {cure}")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    with fresh_file(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: dict | list) -> None:
    write_atomic(path, json.dumps(content, indent=2) + "\n")


class Unreadable(ClipgenError):
    """A file that cannot be read now, by this user or at all; its content may be whole."""


@contextmanager
def reading(path: Path, missing: str, cure: str, wrong: str = "is damaged") -> Iterator[None]:
    """Turns what goes wrong in reading the file `path` within the block, but want of memory, into a `ClipgenError`.

    `missing` and `cure` say what to do where there is no such file, and where its content is at fault.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise ValueError("it is no plain file")
        open(path, "rb").close()  # not all libraries tell a file that may not be read from a missing one
        yield
    except (ClipgenError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ClipgenError(f"{error.filename or path} is missing: {missing}") from None
    except PermissionError as error:
        raise Unreadable(f"no right to read {error.filename or path}: ask its owner for it (chmod a+r)") from None
    except Exception as error:
        if getattr(error, "errno", None):  # the system's, not a library's about the content
            raise Unreadable(f"{path} cannot be read ({reason(error)}): mend that, then run this again") from None
        raise ClipgenError(f"{path} {wrong} ({reason(error)}): {cure}") from None


def read_json(path: Path, cure: str = "restore it, or run its step again") -> dict:
    """Read a JSON object; a missing or broken file is one sentence."""
    with reading(Path(path), "run the step that writes it first", cure, wrong="is not valid JSON"):
        if Path(path).stat().st_size > 2**30:
            raise ValueError("it has more than 1 GB")
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise ClipgenError(f"{path} holds a JSON {type(content).__name__}, not an object: {cure}")
    return content


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """Names of the entries in which two nested dicts differ, tuples and lists alike."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += differences(x, y, f"{prefix}{key}.")
        elif (list(x) if isinstance(x, tuple) else x) != (list(y) if isinstance(y, tuple) else y):
            found.append(f"{prefix}{key}")
    return found


def file_hash(path: Path) -> str:
    """The first 16 hex digits of the SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    import clipgen_lib  # its own: the installed one's may be of another folder

    packages = "torch torchvision open_clip_torch accelerate torchmetrics numpy pillow pytorch-fid lpips"
    found = dict.fromkeys(packages.split(), "not installed")
    for package in found:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {"python": sys.version.split()[0], "clipgen_lib": clipgen_lib.__version__} | found


def progress(total: int, label: str, show: bool = True, initial: int = 0) -> tqdm:
    """A text progress bar with an ETA on stderr; `show=False` or CLIPGEN_PROGRESS=0 turns it off."""
    options = {"disable": not show or os.environ.get("CLIPGEN_PROGRESS") == "0", "leave": False, "dynamic_ncols": True}
    return tqdm(total=total, desc=label, file=Unbroken(sys.stderr), initial=initial, **options)


class Unbroken:
    """A stream that may be lost: writing to a closed terminal, or to a pipe that nobody reads, ends nothing."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str = "") -> None:
        with suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()

    flush = write


class Stop:
    """Whether SIGTERM, SIGINT or SIGHUP has come since `stoppable` began."""

    def __init__(self) -> None:
        self.number = 0

    def raise_if_asked(self, save: Callable[[], None], where: str) -> None:
        """Save and raise `Stopped` where a signal has come."""
        if self.number:
            save()
            raise Stopped(self.number, where)


@contextmanager
def stoppable(also: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """Within the block the first SIGTERM, SIGINT or SIGHUP is only noted, for a loop that checks between two steps and saves first.

    It calls `also`. A second signal is obeyed at once. SIGHUP, of a closed terminal, stays ignored under nohup. Outside of the
    main thread, where Python handles no signals, nothing changes.
    """
    stop, before = Stop(), ExitStack()

    def note(number: int, frame: object) -> None:
        stop.number = number
        before.close()
        also()

    with before:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            is_ignored = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if threading.current_thread() is threading.main_thread() and not is_ignored:
                before.callback(signal.signal, number, signal.signal(number, note))
        yield stop


MERGED = ("seconds", "parameters", "skipped", "skipped_steps")  # entries of summary.json that several steps write


@dataclass(frozen=True)
class Run:
    """One folder under results/ and the few files every step shares, with the seed and the device of its steps."""

    path: Path
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MOST_SEED:
            raise ClipgenError(f"seed {shortened(repr(self.seed), 80)} is not a whole number from 0 to 2^63 - 1")

    @property
    def name(self) -> str:
        return self.path.name

    def file(self, *parts: str) -> Path:
        """A path inside the run, to write to, its folder made. Raises ClipgenError where the run is published."""
        refuse_published(self.path)
        path = self.path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, stage: str, step: int, **scalars: float) -> None:
        """Append one line to metrics.jsonl."""
        finite = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}  # JSON has no NaN
        with room_on_disk(self.path / "metrics.jsonl"), open(self.file("metrics.jsonl"), "a") as stream:
            stream.write(json.dumps({"stage": stage, "step": step} | finite) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Drop what a stage logged after `step`: a resumed run writes those lines again."""
        kept = [line for line in self._lines() if line["stage"] != stage or line["step"] <= step]
        write_atomic(self.file("metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in kept))

    def metrics(self, stage: str) -> list[dict]:
        """The logged lines of one stage in order of their steps."""
        return sorted((line for line in self._lines() if line["stage"] == stage), key=lambda line: line["step"])

    def _lines(self) -> Iterator[dict]:
        path = self.path / "metrics.jsonl"
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # a line cut short by a kill; its step is logged again on resuming
                continue
            if isinstance(line, dict) and isinstance(line.get("stage"), str) and isinstance(line.get("step"), int):
                yield line

    def keep(self, figure: Figure, name: str) -> Figure:
        """Save a figure as figures/<name>.png and return it for display."""
        import matplotlib.pyplot as plt

        figure.savefig(self.file("figures", f"{name}.png"), dpi=100)
        plt.close(figure)
        return figure

    def summary(self) -> dict:
        path, cure = self.path / "summary.json", "delete it: a step that is run again fills its part"
        return read_json(path, cure) if path.exists() else {"run": self.name}

    def add_to_summary(self, **entries: object) -> dict:
        """Put entries into summary.json, those of several steps (MERGED) into what is there, and return the whole."""
        summary = self.summary()
        summary |= {k: {**summary.get(k, {}), **v} if k in MERGED else v for k, v in entries.items()}
        write_json(self.file("summary.json"), summary)
        return summary


def open_run(name: str, results: Path | None = None) -> Run:
    """The run of that name, a plain folder name, or SWEEP/CELL of two; nothing is written."""
    parts = name.split("/") if isinstance(name, str) else [""]
    plain = (re.fullmatch(r"[^\W_][\w .+=@,()-]*", part) and part == part.strip(" .") for part in parts)
    if not all(plain) or len(parts) > 2 or len(parts[0]) > 100 or len(parts[-1]) > 200:
        cure = "use at most 100 letters, digits, '-' and '_'"
        raise ClipgenError(f"run name {shortened(repr(name), 80)} is not a plain folder name: {cure}")
    path = (results or RESULTS) / name
    if len(parts) == 2 and (path.parent / "config.json").exists():
        raise ClipgenError(f"{path.parent} is a run, not a sweep of several: choose another name than {name!r}")
    if (path / "sweep.json").exists():
        raise ClipgenError(f"{path} is a sweep: name one of its runs, which 'clipgen runs {name}' lists")
    if any(path.glob(".*.old")):  # a kill came between two renames, if no other process is at it
        with suppress(ClipgenError), held(path, f"run {name!r}"):
            pass
    return Run(path)
