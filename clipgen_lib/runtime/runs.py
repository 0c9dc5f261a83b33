"""Runs and their files, errors, signals and progress bars.

A run is a folder `results/<run>/` with config.json, metrics.jsonl, summary.json, figures/ and notebooks/. A file is written
beside its place and renamed, so that an interruption leaves the previous version whole. Nothing here knows what a model is.
The environment variables CLIPGEN_HOME and CLIPGEN_RESULTS move the project's folder and the runs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(os.environ.get("CLIPGEN_HOME", Path(__file__).resolve().parents[2]))
DATA = ROOT / "data"
RESULTS = Path(os.environ.get("CLIPGEN_RESULTS", ROOT / "results"))


class ClipgenError(Exception):
    """A mistake the user can mend: one sentence, on one line, that says what is wrong, where, and the cure."""

    exit_code = 1

    def __init__(self, sentence: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in sentence))  # names of files may hold anything


class Stopped(ClipgenError):
    """SIGTERM or SIGINT, after what was done has been saved; ends a command as the signal would have."""

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


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fresh_file(target: Path) -> Iterator[Path]:
    """A temporary name beside `target`: what is written there takes its place when the block ends without an error.

    The content is on the disk before it gets its name, so that even a loss of power leaves the old file or the new one.

    Raises:
        ClipgenError: the disk is full; the old file stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with room_on_disk(target):
            yield beside
            with open(beside, "rb") as stream:
                os.fsync(stream.fileno())
            beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def room_on_disk(target: Path, lacking: Callable[[], float] = lambda: 0) -> Iterator[None]:
    """Turns the error of a full disk or quota within the block into a `ClipgenError`.

    Args:
        lacking: the bytes that are missing, where that can be told.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors gives the error's number in its text only
        numbers = {getattr(error, "errno", None), *map(int, re.findall(r"os error (\d+)", str(error)))}
        if not numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        missing = f" ({lacking() / 1e9:.3g} GB are missing)" if lacking() > 0 else ""
        raise ClipgenError(f"no room for {target}{missing}: free some, then run the same command to resume") from None


@contextmanager
def held(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Keep `path` to this process while the block writes it; the lock of a process that died is free.

    Raises:
        ClipgenError: without `wait`, another process holds it: who, and since when.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = (path.with_name(f".{path.name}.{kind}") for kind in ("lock", "holder"))
    try:
        with FileLock(lock, timeout=-1 if wait else 0):
            holder.write_text(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout:
        who = holder.read_text(errors="replace") if holder.is_file() else "another process"
        raise ClipgenError(
            f"{what} is being made in {path} by {who}: wait for it, or stop it and run this again"
        ) from None


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


def read_json(path: Path) -> dict:
    """Read a JSON object; a missing or broken file is one sentence."""
    cures = ("run the step that writes it first", "restore it, or run its step again")
    with reading(Path(path), *cures, wrong="is not valid JSON"):
        if Path(path).stat().st_size > 2**30:
            raise ValueError("it has more than 1 GB")
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
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
    return tqdm(total=total, desc=label, initial=initial, leave=False, disable=hidden, dynamic_ncols=True)


class Stop:
    """Whether SIGTERM or SIGINT has come since `stoppable` began."""

    def __init__(self) -> None:
        self.number = 0

    def raise_if_asked(self, save: Callable[[], None], where: str) -> None:
        """Save and raise `Stopped` where a signal has come."""
        if self.number:
            save()
            raise Stopped(self.number, where)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within the block the first SIGTERM or SIGINT is only noted, for a loop that checks between two steps and saves first.

    A second signal is obeyed at once. Outside of the main thread, where Python handles no signals, nothing changes.
    """
    stop, before = Stop(), {}

    def note(number: int, frame: object) -> None:
        stop.number = number
        restore()

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
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

    @property
    def name(self) -> str:
        return self.path.name

    def file(self, *parts: str) -> Path:
        """A path inside the run, its folder made."""
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
    """The run of that name, its folder made; the name is a plain folder name."""
    if not name or name != Path(name).name or name.startswith("."):
        raise ClipgenError(f"run name {name!r} is not a plain folder name: use letters, digits, '-' and '_'")
    path = (results or RESULTS) / name
    (path / "figures").mkdir(parents=True, exist_ok=True)
    return Run(path)
