"""Faults put into the commands of a small run, and what became of them: `make chaos`, or `python tests/chaos.py --quick`.

In: the public commands on preset smoke, each in a process of its own, forked from one that has imported the packages, not the
library. First nothing happens to them; then each step is begun again on a copy of what was there before it, harmed from
outside, and given again. Out: results/chaos/table.json, written after each row; rows that are there are not tried again.

A step has survived a fault if it ended by itself, by the signal or by one sentence, and the same command, given again, came to its
end. Its result is corrupted if a byte of its final files (weights, token store, PNG files, numbers of the evaluation) differs from
the undisturbed run's. `lost_steps` is the most work that one injection cost: training steps, or images of the other steps. `left`
counts temporary files that are there in the end, `tracebacks` and `hangs` the commands that ended so.

System calls are counted in the undisturbed run; strace then kills the command before one of those that change the disk, or makes
one that touches the run's files fail. Power loss is a kill before a renaming after which whatever was not synced is gone:
a file made since is empty, one that grew has its old length. Names of files, which may be lost too, are left as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 1_800  # seconds after which a command counts as hung
RUN = ["--preset", "smoke", "--run", "run", "--device", "cpu"]
STEPS = {  # of each: final files in its run's folder, and what the command is given
    "train-vqgan": ("vqgan/*", [*RUN, "--steps", "50"]),
    "extract": ("store/**/*", RUN),
    "train-transformer": ("transformer/*", [*RUN, "--steps", "50"]),
    "evaluate": ("generated/**/*.png", RUN),
    "generate": ("out.png", ["a large red star", *RUN[2:], "-n", "64", "-o", "{results}/run/out.png"]),
}
PACKAGES = ["torch", "torchvision.transforms.v2", "timm.optim", "open_clip", "accelerate", "torchmetrics"]
# the calls before which a kill matters, and those that are made to fail
RENAMES = ["rename", "renameat", "renameat2"]
CHANGES = [*RENAMES, "unlink", "unlinkat", "mkdir", "rmdir", "fsync", "ftruncate"]
ERRORS = ["openat:EIO", "openat:EACCES", "openat:EMFILE", "read:EIO", "write:ENOSPC", "fsync:EIO", "rename:EROFS"]
TRACED = ",".join({*CHANGES, *(error.split(":")[0] for error in ERRORS), "sync"})
SIGNALS = {"SIGKILL": 8, "SIGTERM": 2, "SIGHUP": 1}  # how often each fault is injected into a step
TWICE, CUT, KILLED, POWER = "two at once", "newest checkpoint cut short", "killed at a system call", "power loss"
AT_CALLS = {KILLED: 16, POWER: 8} | {error.replace(":", " fails: "): 4 for error in ERRORS}
COUNTS = ("injected", "survived", "lost_steps", "corrupted", "tracebacks", "hangs", "left")
FORK = get_context("fork")
BAR = re.compile(r"([^\s:|][^\r\n:|]*):[^\r\n|]*\|[^\r\n|]*\| *(\d+)/(\d+) ")  # of tqdm: label, how far it is, its end
Bars = dict[str, tuple[int, int]]


def clipgen(words: list[str], results: Path, log: Path, ready: Event, go: Event) -> None:
    """In a process of its own: import the library with these settings, wait until strace is there, and run the command."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ |= {"CLIPGEN_RESULTS": str(results), "CLIPGEN_DATA": str(results.with_name("data"))}
    from clipgen_lib import cli, workbench  # noqa: F401

    ready.set()
    go.wait(PATIENCE)
    cli.main(words, prog_name="clipgen")


class Command:
    """A step in a process of its own, on one thread; its output goes to a file beside the results.

    So does that of strace, if `strace` has options for it; None runs the step without.
    """

    def __init__(self, step: str, results: Path, strace: list[str] | None = None):
        words = [step, *(word.format(results=results) for word in STEPS[step][1])]
        self.log = results.with_name(f"{step}-{time.monotonic_ns()}.log")
        self.tracer, self.hung = None, False
        ready, go = FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=clipgen, args=(words, results, self.log, ready, go))
        self.process.start()
        while not ready.wait(1) and self.process.is_alive():
            pass
        if strace is not None:
            words = ["strace", "-f", "-y", "-qq", "-o", str(self.log.with_suffix(".strace")), *strace]
            words += ["-e", f"trace={TRACED}", "-p", str(self.process.pid)]
            self.tracer = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            status = Path(f"/proc/{self.process.pid}/status")
            while "TracerPid:\t0" in status.read_text() and self.tracer.poll() is None:
                time.sleep(0.01)
        go.set()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def trace(self) -> str:
        return self.log.with_suffix(".strace").read_text(errors="replace")

    def bars(self) -> Bars:
        """Of each progress bar what was left to do at its beginning, and what is left."""
        bars: Bars = {}
        for label, at, end in BAR.findall(self.output):
            left = int(end) - int(at)
            bars[label] = (bars[label][0] if label in bars else left, left)
        return bars

    def calls(self, place: Path) -> list[tuple[str, int]]:
        """Its system calls that touch files below `place`: the name, and the number among all calls of this name."""
        numbers, calls = Counter(), []
        for name, rest in re.findall(rf"^{self.process.pid} +(\w+)\((.*)", self.trace, re.M):
            numbers[name] += 1
            if str(place) in rest and str(self.log) not in rest:
                calls.append((name, numbers[name]))
        return calls

    def wait_until(self, condition: Callable[[], object]) -> bool:
        """Whether the condition came true before the command ended; one that hangs is killed."""
        start = time.monotonic()
        while self.process.exitcode is None and not condition():
            if time.monotonic() - start > PATIENCE:
                self.hung = True
                self.kill(signal.SIGKILL)
            time.sleep(0.02)
        return self.process.exitcode is None

    def kill(self, number: int) -> None:
        """Send a signal to the command and to the workers it may have."""
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Wait for it, and for strace; returns its exit status, negative for a signal."""
        self.wait_until(lambda: False)
        if self.tracer:
            with suppress(subprocess.TimeoutExpired):
                self.tracer.wait(60)
            self.tracer.kill()  # waits for a worker that was left behind
        return self.process.exitcode


def outputs(step: str, results: Path) -> dict[str, str]:
    """SHA-256 of each final file of a step, and of an evaluation its numbers, which do not say how long they took."""
    run = results / "run"
    files = sorted(path for path in run.glob(STEPS[step][0]) if path.is_file() and not path.name.startswith("."))
    found = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if step == "evaluate" and (run / "summary.json").is_file():
        numbers = json.loads((run / "summary.json").read_text())
        found |= {key: json.dumps(numbers.get(key), sort_keys=True) for key in ("evaluation", "oracle")}
    return found


def lost(before: Bars, after: Bars) -> int:
    """Work that a command had done and does again, by the bars that both runs of it show.

    The bar of an evaluation's images, "generating <folder>", counts images that are there and not generated again.
    """
    labels = [label for label in before.keys() & after.keys() if not label.startswith("generating ")]
    return sum(max(after[label][0] - before[label][1], 0) for label in labels)


def lose_power(trace: str, place: Path, before: Path) -> None:
    """Take from the files below `place` what was not synced after it was written, as strace has seen it."""
    synced: set[str] = set()
    for line in trace.splitlines():
        if found := re.search(r" (?:fsync|fdatasync)\(\d+<(.+?)>\)", line):
            synced.add(found[1])
        elif found := re.search(r" rename\w*\(.*?\"(.+?)\".*\"(.+?)\"\S*\) += 0", line):
            synced = {found[2] + name[len(found[1]) :] if name.startswith(found[1]) else name for name in synced}
        elif re.search(r" sync\(\)", line):
            synced |= {str(path) for path in place.rglob("*")}
        elif found := re.search(r" write\(\d+<(.+?)>", line):
            synced.discard(found[1])
    files = [path for path in place.rglob("*") if path.is_file() and path.suffix not in (".log", ".strace")]
    for path in (path for path in files if str(path) not in synced):
        old = before / path.relative_to(place)
        if not old.is_file() or old.stat().st_mtime_ns != path.stat().st_mtime_ns:
            os.truncate(path, old.stat().st_size if old.is_file() else 0)


class Harness:
    """The undisturbed run, copies of what was there before each of its steps, and the system calls of each step."""

    def __init__(self, home: Path):
        self.home = home
        self.seconds: dict[str, float] = {}  # that the bars of each step are at work
        self.wanted: dict[str, dict[str, str]] = {}
        self.calls: dict[str, list[tuple[str, int]]] = {}

    def make_undisturbed(self, traced: bool) -> None:
        place = self.home / "undisturbed"
        for folder in ("results", "data"):
            (place / folder).mkdir(parents=True)
        for step in STEPS:
            shutil.copytree(place, self.home / "before" / step, ignore=shutil.ignore_patterns("*.log", "*.strace"))
            command = Command(step, place / "results", [] if traced else None)
            command.wait_until(command.bars)
            start = time.monotonic()
            if command.end() != 0:
                raise SystemExit(f"{step} fails without any fault: {command.output[-2000:]}")
            self.seconds[step] = time.monotonic() - start
            self.wanted[step] = outputs(step, place / "results")
            self.calls[step] = command.calls(place) if traced else []

    def row(self, step: str, fault: str, times: int) -> dict[str, object]:
        """Inject a fault so many times into a step; returns what became of it."""
        row = {"step": step, "fault": fault} | dict.fromkeys(COUNTS, 0)
        rng, others = random.Random(f"{step} {fault}"), {TWICE: self.twice, CUT: self.cut_checkpoint}
        harm = self.by_signal if fault in SIGNALS else others.get(fault, self.at_call)
        for _ in range(4 * times):  # a command that was faster than its signal is tried again
            place = Path(tempfile.mkdtemp(prefix=f"{step}-", dir=self.home))
            shutil.copytree(self.home / "before" / step, place, dirs_exist_ok=True)
            where = 0.9 * rng.random() if fault in SIGNALS else (row["injected"] + 0.5) / times
            if harmed := harm(step, fault, where, place / "results"):
                self.count(row, place / "results", harmed)
            shutil.rmtree(place)
            if row["injected"] == times:
                break
        return row

    def count(self, row: dict, results: Path, harmed: list[Command]) -> None:
        """Give a harmed command again, unless it came to its end, and enter into the row what came of it."""
        ended = [one.end() <= 0 or ("Error: " in one.output and "Traceback" not in one.output) for one in harmed]
        last = harmed[-1]
        if last.end() != 0 and row["fault"] != TWICE:
            last = Command(row["step"], results)
            last.end()
            row["lost_steps"] = max(row["lost_steps"], lost(harmed[-1].bars(), last.bars()))
        commands = list(dict.fromkeys([*harmed, last]))
        text = "\n".join(command.output[-3_000:] for command in commands)
        left = [str(path) for path in results.parent.rglob("*") if re.search(r"\.(tmp|new|old|partial)", path.name)]
        has_survived, has_hung = last.end() == 0 and all(ended), any(command.hung for command in commands)
        row["injected"] += 1
        row["survived"] += has_survived
        row["corrupted"] += outputs(row["step"], results) != self.wanted[row["step"]]
        row["tracebacks"] += "Traceback" in text
        row["hangs"] += has_hung
        row["left"] += len(left)
        if "Traceback" in text or has_hung or left or not has_survived:
            print(f"--- {row['step']}, {row['fault']}", text, *left, sep="\n", file=sys.stderr, flush=True)

    # Each way to harm a step begins it on `results`, harms it at `where`, from 0 at its beginning to 1 at its end, and
    # returns the commands that were harmed, none if it came to nothing.

    def by_signal(self, step: str, fault: str, where: float, results: Path) -> list[Command]:
        command = Command(step, results)
        command.wait_until(command.bars)
        moment = time.monotonic() + where * self.seconds[step]
        if not command.wait_until(lambda: time.monotonic() >= moment):
            return []
        command.kill(signal.Signals[fault])
        return [command]

    def at_call(self, step: str, fault: str, where: float, results: Path) -> list[Command]:
        """Killed before a call that changes the disk, with or without loss of power, or a call that fails."""
        name, _, error = fault.partition(" fails: ")
        names = [name] if error else RENAMES if fault == POWER else CHANGES
        calls = [call for call in self.calls[step] if call[0] in names]
        if not calls:
            return []
        call, n = calls[int(where * len(calls))]
        what = f"error={error}" if error else "signal=KILL"
        command = Command(step, results, ["-e", f"inject={call}:{what}:when={n}"])
        command.end()
        if fault == POWER:
            lose_power(command.trace, results.parent, self.home / "before" / step)
        return [command]

    def twice(self, step: str, fault: str, where: float, results: Path) -> list[Command]:
        """Two identical commands: one does it, the other says so or finds it done; the former is the last."""
        return sorted([Command(step, results), Command(step, results)], key=lambda one: -one.end())

    def cut_checkpoint(self, step: str, fault: str, where: float, results: Path) -> list[Command]:
        """Killed, and the newest checkpoint cut short: the one before it takes its place."""
        command, pattern = Command(step, results), f"{step.removeprefix('train-')}-*[0-9].safetensors"
        checkpoints = lambda: sorted((results / "run" / "checkpoints").glob(pattern))
        if not command.wait_until(lambda: len(checkpoints()) >= 2):
            return []
        command.kill(signal.SIGKILL)
        command.end()
        os.truncate(checkpoints()[-1], 1_000)
        return [command]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--only", default="", help="steps and faults with these words in them alone")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "results" / "chaos" / "table.json")
    chosen = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "CLIPGEN_PROGRESS": "1"}
    sys.path.insert(0, str(ROOT))
    for package in PACKAGES:
        importlib.import_module(package)
    rows = json.loads(chosen.output.read_text()) if chosen.output.is_file() else []
    if not (with_strace := shutil.which("strace") is not None):
        print("strace is not installed: no system call is harmed")
    faults = SIGNALS | {TWICE: 4} | (AT_CALLS if with_strace else {})
    jobs = [(step, fault, 1 if chosen.quick else times) for step in STEPS for fault, times in faults.items()]
    jobs += [(step, CUT, 1) for step in ("train-vqgan", "train-transformer")]
    there, failed = {(row["step"], row["fault"]) for row in rows}, False
    home = Path(tempfile.mkdtemp(prefix="clipgen-chaos-"))
    try:
        harness = Harness(home)
        harness.make_undisturbed(with_strace)
        with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
            todo = [job for job in jobs if job[:2] not in there and chosen.only in " ".join(job[:2])]
            for done in as_completed([pool.submit(harness.row, *job) for job in todo]):
                if error := done.exception():  # its row is tried again by the next call
                    failed = True
                    print(f"no row: {error!r}", file=sys.stderr, flush=True)
                    continue
                rows.append(done.result())
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                rows.sort(key=lambda row: list(STEPS).index(row["step"]))
                chosen.output.parent.mkdir(parents=True, exist_ok=True)
                chosen.output.write_text(json.dumps(rows, indent=2) + "\n")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    total = {key: sum(row[key] for row in rows) for key in COUNTS if key != "lost_steps"}
    print(", ".join(f"{value} {key}" for key, value in total.items()))
    bad = total["corrupted"] + total["tracebacks"] + total["hangs"] + total["left"]
    sys.exit(failed or bad > 0 or total["survived"] < total["injected"])


if __name__ == "__main__":
    main()
