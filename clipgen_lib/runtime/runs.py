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
from contextlib import contextmanager, suppress
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
        super().__init__(
            f"stopped by {signal.Signals(number).name} {where}: what was done is kept, and the same command resumes from there"
        )
        self.exit_code = 128 + number


def reason(error: Exception) -> str:
    """What another library's error says, on one line of at most 200 characters."""
    return shortened(str(error)) or type(error).__name__


def shortened(text: str, most: int = 200) -> str:
    """Any text, such as a name from a file, as one line of at most `most` characters."""
    line = " ".join(text[: 8 * most].split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk itself, so that a loss of power leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def _finish(folder: Path) -> None:
    """Put all below a new folder on the disk, readable as the umask says: safetensors writes for its owner alone."""
    paths, mode = [folder, *folder.rglob("*")], folder.stat().st_mode & 0o666
    if len(paths) > 100:  # one by one, 20,000 images take minutes
        os.sync()
        return
    for path in paths:
        if path.is_file():
            path.chmod(mode)
        _sync(path)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _settle(target: Path) -> None:
    """What was moved aside comes back where nothing has taken its place, and is deleted where something has."""
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends without an error.

    The old one is moved aside first and deleted last; after a kill in between, `held` and `open_run` put it back.

    Raises:
        ClipgenError: the disk is full; the old folder stays.
    """
    folder = _beside(target, f"{os.getpid()}.new")
    _settle(target)
    try:
        with room_on_disk(target):
            folder.mkdir(parents=True)
            yield folder
            _finish(folder)
            if target.exists():
                target.rename(_beside(target, "old"))
            folder.rename(target)
            _sync(target.parent)
    finally:
        _settle(target)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fresh_file(target: Path) -> Iterator[Path]:
    """A temporary name in a folder beside `target`: what is written there takes its place when the block ends without an error.

    The content is on the disk before it gets its name, so that even a loss of power leaves the old file or the new one.

    Raises:
        ClipgenError: the disk is full; the old file stays.
    """
    folder = _beside(target, f"{os.getpid()}.new")
    try:
        with room_on_disk(target):
            folder.mkdir(parents=True, exist_ok=True)
            yield folder / target.name
            _finish(folder)
            (folder / target.name).replace(target)
            _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def room_on_disk(target: Path, lacking: Callable[[], float] = lambda: 0) -> Iterator[None]:
    """Turns the error of a full disk or quota within the block into a `ClipgenError`; any other names `target` at least.

    Args:
        lacking: the bytes that are missing, where that can be told.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _numbers(str(error)) & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(target)
            raise
        missing = f" ({lacking() / 1e9:.3g} GB are missing)" if lacking() > 0 else ""
        raise ClipgenError(f"no room for {target}{missing}: free some, then run the same command to resume") from None


def _numbers(text: str) -> set[int]:
    """The errno values in an error's text, by which alone safetensors and a notebook's kernel tell them."""
    return {int(number) for number in re.findall(r"(?:Errno |os error |code: )(\d+)", text)}


OF_THE_MACHINE = {
    kind.__name__ for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, OSError)
}
CURES = (
    ({errno.EACCES, errno.EPERM}, "ask its owner for the right to it, or choose another place"),
    ({errno.EROFS}, "choose a place that can be written; CLIPGEN_RESULTS and CLIPGEN_DATA move what is made"),
    ({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, "free some room, then run the same command to resume"),
    ({errno.EMFILE, errno.ENFILE}, "close other programs or raise the limit by 'ulimit -n', then run the same command"),
    ({errno.ENOENT, errno.ENOTDIR, errno.EISDIR}, "restore it, or run the step that makes it"),
)


def explained(kind: str, text: str) -> str:
    """An error of the machine (disk, rights, memory) as one sentence with its cure, from its class's name and its text.

    Empty for any other error. It serves the errors of a notebook's kernel too, of which there is no more than that.
    """
    if "MemoryError" in kind or re.search(r"annot allocate memory|can't allocate memory|killed by signal", text):
        cure = "close other programs, or take a smaller batch or preset, then run the same command to resume"
        return f"the memory is used up ({shortened(text) or kind}): {cure}"
    if kind not in OF_THE_MACHINE and kind != "SafetensorError":
        return ""
    numbers = _numbers(text)
    if errno.ENOMEM in numbers:
        return explained("MemoryError", text)
    cures = [cure for known, cure in CURES if known & numbers]
    return f"{shortened(text) or kind}: {cures[0] if cures else 'see that the disk is there, then run the same command again'}"


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Keep `path` to this process while the block writes it; the lock of a process that died is free.

    What killed processes left half written, beside it or below, is swept first.

    Raises:
        ClipgenError: another process holds it: who, and since when; or it is published.
    """
    refuse_published(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(_beside(path, "lock")), _beside(path, "holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        told = holder.read_text(errors="replace") if holder.is_file() else f"{path} is being made by another process"
        raise ClipgenError(f"{told}: wait for it, or stop it and run this again") from None
    try:
        who = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        holder.write_text(f"{what} is being made in {path} by {who}")
        left = [*path.parent.glob(f".{glob.escape(path.name)}.*"), *path.rglob(".*.new"), *path.rglob(".*.old")]
        for found in left:
            if found.suffix == ".new":
                shutil.rmtree(found, ignore_errors=True)
            elif found.suffix == ".old":
                _settle(found.with_name(found.stem[1:]))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def refuse_published(folder: Path) -> None:
    """Raises `ClipgenError` where a folder is published: a file of that name in it says so, and CLIPGEN_PUBLISH=1 allows it."""
    if (folder / "published").exists() and os.environ.get("CLIPGEN_PUBLISH") != "1":
        raise ClipgenError(
            f"{folder} is a published result: choose another name by --run, or set CLIPGEN_PUBLISH=1 to make it anew"
        )


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    with fresh_file(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: dict | list) -> None:
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object; a missing or broken file is one sentence."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ClipgenError(f"{path} is missing: run the step that writes it first") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of JSON, of UTF-8, of numbers of 5,000 digits
        raise ClipgenError(f"{path} is not valid JSON ({reason(error)}): restore it, or run its step again") from None
    if not isinstance(content, dict):
        raise ClipgenError(f"{path} holds a JSON {type(content).__name__}, not an object: restore the original file")
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


def file_hash(*paths: Path) -> str:
    """The first 16 hex digits of the SHA-256 of the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    packages = "clipgen_lib torch torchvision open_clip_torch accelerate torchmetrics numpy pillow pytorch-fid lpips"
    found = {"python": sys.version.split()[0]}
    for package in packages.split():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def progress(total: int, label: str, show: bool = True, initial: int = 0) -> tqdm:
    """A text progress bar with an ETA on stderr; `show=False` or CLIPGEN_PROGRESS=0 turns it off."""
    hidden = not show or os.environ.get("CLIPGEN_PROGRESS") == "0"
    stream = Unbroken(sys.stderr)
    return tqdm(total=total, desc=label, file=stream, initial=initial, leave=False, disable=hidden, dynamic_ncols=True)


class Unbroken:
    """A stream that may be lost: writing to a closed terminal, or to a pipe that nobody reads, ends nothing."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()


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
def stoppable() -> Iterator[Stop]:
    """Within the block the first SIGTERM, SIGINT or SIGHUP is only noted, for a loop that checks between two steps and saves.

    SIGHUP, of a terminal that is closed, is ignored as before under nohup. A second signal is obeyed at once. Outside of the main thread, where Python handles no signals, nothing changes.
    """
    stop, before = Stop(), {}

    def note(number: int, frame: object) -> None:
        stop.number = number
        restore()

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()


MERGED = ("seconds", "parameters", "skipped", "skipped_steps")  # entries of summary.json that several steps write


@dataclass(frozen=True)
class Run:
    """One folder under results/ and the few files every step shares, with the seed and the device of its steps."""

    path: Path
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MOST_SEED:
            raise ClipgenError(
                f"seed {shortened(repr(self.seed), 80)} is not a whole number from 0 to 2^63 - 1: give one"
            )

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
        line = {"stage": stage, "step": step} | finite
        with room_on_disk(self.path / "metrics.jsonl"), open(self.file("metrics.jsonl"), "a") as stream:
            stream.write(json.dumps(line) + "\n")

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
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else {"run": self.name}

    def add_to_summary(self, **entries: object) -> dict:
        """Put entries into summary.json, those of several steps (MERGED) into what is there, and return the whole."""
        summary = self.summary()
        for key, value in entries.items():
            summary[key] = {**summary.get(key, {}), **value} if key in MERGED else value
        write_json(self.file("summary.json"), summary)
        return summary


def open_run(name: str, results: Path | None = None) -> Run:
    """The run of that name, a plain folder name; nothing is written."""
    if not isinstance(name, str) or not re.fullmatch(r"[^\W_][\w .+=@,()-]{0,99}", name) or name != name.strip(" ."):
        raise ClipgenError(
            f"run name {shortened(repr(name), 80)} is not a plain folder name: use at most 100 letters, digits, '-' and '_'"
        )
    path = (results or RESULTS) / name
    if any(path.glob(".*.old")):  # a kill came between two renames, if no other process is at it
        with suppress(ClipgenError), held(path, f"run {name!r}"):
            pass
    return Run(path)
