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
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 1_800  # seconds after which a command counts as hung
RUN = ["--preset", "smoke", "--run", "run", "--device", "cpu"]
COMMANDS = {
    "train-vqgan": ["train-vqgan", *RUN, "--steps", "50"],
    "extract": ["extract", *RUN],
    "train-transformer": ["train-transformer", *RUN, "--steps", "50"],
    "evaluate": ["evaluate", *RUN],
    "generate": ["generate", "a large red star", *RUN[2:], "-n", "64", "-o", "{results}/run/out.png"],
}
OUTPUTS = dict(  # final files of each step in its run's folder
    zip(COMMANDS, ("vqgan/*", "store/**/*", "transformer/*", "generated/**/*.png", "out.png"), strict=True)
)
PACKAGES = ["torch", "torchvision.transforms.v2", "timm.optim", "open_clip", "accelerate", "torchmetrics"]
# the calls before which a kill matters, and those that are made to fail
CHANGES = ["rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "rmdir", "fsync", "ftruncate"]
ERRORS = ["openat:EIO", "openat:EACCES", "openat:EMFILE", "read:EIO", "write:ENOSPC", "fsync:EIO", "rename:EROFS"]
TRACED = ",".join({*CHANGES, *(error.split(":")[0] for error in ERRORS), "sync"})
FORK = get_context("fork")
BAR = re.compile(r"([^\r\n:|]+):[^\r\n|]*\|[^\r\n|]*\| *(\d+)/(\d+) ")  # of tqdm: label, how far it is, its end
Bars = dict[str, tuple[int, int]]


@dataclass
class Row:
    """What became of one kind of fault at one step."""

    step: str
    fault: str
    injected: int = 0
    survived: int = 0
    lost_steps: int = 0
    corrupted: int = 0
    tracebacks: int = 0
    hangs: int = 0
    left: int = 0


def clipgen(words: list[str], results: Path, log: Path, ready: Event, go: Event) -> None:
    """In a process of its own: import the library with these settings, wait until strace is there, and run the command."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ |= {"CLIPGEN_RESULTS": str(results), "CLIPGEN_DATA": str(results.with_name("data"))}
    sys.argv = ["clipgen", *words]
    for module in ("cli", "workbench", "study"):
        importlib.import_module(f"clipgen_lib.{module}")
    ready.set()
    go.wait(PATIENCE)
    runpy.run_module("clipgen_lib", run_name="__main__")


class Command:
    """A step in a process of its own, on one thread; its output goes to a file beside the results, and so does strace's."""

    def __init__(self, step: str, results: Path, *more: str, inject: str = "", traced: bool = False):
        words = [word.format(results=results) for word in COMMANDS[step]] + list(more)
        self.log = results.with_name(f"{step}-{time.monotonic_ns()}.log")
        self.trace, self.tracer, ready, go = self.log.with_suffix(".strace"), None, FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=clipgen, args=(words, results, self.log, ready, go))
        self.process.start()
        while not ready.wait(1) and self.process.is_alive():
            pass
        if traced or inject:
            options = ["-e", f"trace={TRACED}", *(["-e", f"inject={inject}"] if inject else [])]
            command = ["strace", "-f", "-y", "-qq", "-o", str(self.trace), "-p", str(self.process.pid), *options]
            self.tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            status = Path(f"/proc/{self.process.pid}/status")
            while "TracerPid:\t0" in status.read_text() and self.tracer.poll() is None:
                time.sleep(0.01)
        go.set()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def bars(self) -> Bars:
        """Of each progress bar what was left to do at its beginning, and what is left."""
        found: Bars = {}
        for label, at, end in BAR.findall(self.said):
            left = int(end) - int(at)
            found[label.strip()] = (found.get(label.strip(), (left, left))[0], left)
        return found

    def wait_until(self, condition: Callable[[], object]) -> bool:
        """Whether the condition came true before the command ended; one that hangs is killed."""
        start = time.monotonic()
        while self.process.exitcode is None and not condition():
            if time.monotonic() - start > PATIENCE:
                self.log.write_text(self.said + "\nHUNG\n")
                self.signal(signal.SIGKILL)
            time.sleep(0.02)
        return self.process.exitcode is None

    def signal(self, number: int) -> None:
        """To the command and to the workers it may have."""
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Wait for it, and for strace; returns its exit status, negative for a signal."""
        self.wait_until(lambda: False)
        if self.tracer:
            self.tracer.wait()
        return self.process.exitcode


def outputs(step: str, results: Path) -> dict[str, str]:
    """SHA-256 of each final file of a step, and of an evaluation its numbers, which do not say how long they took."""
    run = results / "run"
    files = sorted(path for path in run.glob(OUTPUTS[step]) if path.is_file() and not path.name.startswith("."))
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
        self.calls: dict[str, list[tuple[str, int]]] = {}  # (system call, its number among those of its kind)

    def make_undisturbed(self, traced: bool) -> None:
        place = self.home / "undisturbed"
        for folder in ("results", "data"):
            (place / folder).mkdir(parents=True)
        for step in COMMANDS:
            shutil.copytree(place, self.home / "before" / step, ignore=shutil.ignore_patterns("*.log", "*.strace"))
            command = Command(step, place / "results", traced=traced)
            command.wait_until(command.bars)
            start = time.monotonic()
            if command.end() != 0:
                raise SystemExit(f"{step} fails without any fault: {command.said[-2000:]}")
            self.seconds[step] = time.monotonic() - start
            self.wanted[step], self.calls[step], numbers = outputs(step, place / "results"), [], Counter()
            lines = command.trace.read_text(errors="replace").splitlines() if traced else []
            for call, rest in re.findall(rf"^{command.process.pid} +(\w+)\((.*)", "\n".join(lines), re.M):
                numbers[call] += 1
                if str(place) in rest and str(command.log) not in rest:
                    self.calls[step].append((call, numbers[call]))

    def copy(self, step: str) -> Path:
        """The results as they were before a step, in a folder of their own."""
        place = Path(tempfile.mkdtemp(prefix=f"{step}-", dir=self.home))
        return shutil.copytree(self.home / "before" / step, place, dirs_exist_ok=True) / "results"

    def finish(self, row: Row, results: Path, harmed: list[Command], again: bool = True) -> None:
        """Give a harmed command again, unless it came to its end, and enter into the row what came of it."""
        ended = [one.end() <= 0 or ("Error: " in one.said and "Traceback" not in one.said) for one in harmed]
        command = Command(row.step, results) if again else harmed[-1]
        row.survived += command.end() == 0 and all(ended)
        row.lost_steps = max([row.lost_steps, *(lost(one.bars(), command.bars()) for one in harmed if again)])
        row.corrupted += outputs(row.step, results) != self.wanted[row.step]
        said = "\n".join(one.said[-3_000:] for one in [*harmed, command])
        left = [str(path) for path in results.parent.rglob("*") if re.search(r"\.(tmp|new|old|partial)", path.name)]
        row.tracebacks += "Traceback" in said
        row.hangs += "HUNG" in said
        row.left += len(left)
        if "Traceback" in said or "HUNG" in said or left or command.end() != 0 or not all(ended):
            print(f"--- {row.step}, {row.fault}", said, *left, sep="\n", file=sys.stderr, flush=True)
        shutil.rmtree(results.parent)

    def signals(self, step: str, number: int, times: int) -> Row:
        """A signal at random moments; where the command was faster, it is tried again."""
        row, rng = Row(step, signal.Signals(number).name), random.Random(f"{step} {number}")
        tries = iter(range(4 * times))
        while row.injected < times and next(tries, None) is not None:
            command = Command(step, results := self.copy(step))
            command.wait_until(command.bars)
            moment = time.monotonic() + rng.uniform(0, 0.9 * self.seconds[step])
            if command.wait_until(lambda moment=moment: time.monotonic() >= moment):
                command.signal(number)
                row.injected += 1
                self.finish(row, results, [command])
        return row

    def at_calls(self, step: str, fault: str, times: int) -> Row:
        """Killed before calls that change the disk, with or without loss of power, or calls that fail (`openat:EIO`)."""
        name, _, error = fault.partition(":")
        row = Row(step, f"{name} fails: {error}" if error else fault)
        names = [name] if error else CHANGES[:3] if fault == "power loss" else CHANGES
        calls = [call for call in self.calls[step] if call[0] in names]
        for i in range(times if calls else 0):  # from the first to the last
            call, n = calls[(2 * i + 1) * len(calls) // (2 * times)]
            what = f"error={error}" if error else "signal=KILL"
            command = Command(step, results := self.copy(step), inject=f"{call}:{what}:when={n}", traced=True)
            command.end()
            if fault == "power loss":
                lose_power(command.trace.read_text(errors="replace"), results.parent, self.home / "before" / step)
            row.injected += 1
            self.finish(row, results, [command], again=command.end() != 0)
        return row

    def twice_at_once(self, step: str, times: int) -> Row:
        """Two identical commands: one does it, the other says so or finds it done."""
        row = Row(step, "two at once")
        for _ in range(times):
            results = self.copy(step)
            both = [Command(step, results), Command(step, results)]
            row.injected += 1
            self.finish(row, results, sorted(both, key=lambda one: -one.end()), again=False)
        return row

    def cut_checkpoint(self, step: str) -> Row:
        """Killed, and the newest checkpoint cut short: the one before it takes its place."""
        row, results = Row(step, "newest checkpoint cut short", injected=1), self.copy(step)
        command, stage = Command(step, results), step.removeprefix("train-")
        paths = lambda: sorted((results / "run" / "checkpoints").glob(f"{stage}-*[0-9].safetensors"))
        command.wait_until(lambda: len(paths()) >= 2)
        command.signal(signal.SIGKILL)
        command.end()
        os.truncate(paths()[-1], 1_000)
        self.finish(row, results, [command])
        return row


def faults(harness: Harness, quick: bool, with_strace: bool) -> Iterator[tuple[str, Callable[..., Row], tuple]]:
    """Everything that is injected: the fault's name, the method that does it, and its arguments."""
    at_calls = {"killed at a system call": 16, "power loss": 8} | dict.fromkeys(ERRORS, 4) if with_strace else {}
    for step in COMMANDS:
        for number, times in ((signal.SIGKILL, 5), (signal.SIGTERM, 2), (signal.SIGHUP, 1)):
            yield number.name, harness.signals, (step, number, 1 if quick else times)
        yield "two at once", harness.twice_at_once, (step, 1 if quick else 4)
        for fault, times in at_calls.items():
            yield fault.replace(":", " fails: "), harness.at_calls, (step, fault, 1 if quick else times)
    for step in ("train-vqgan", "train-transformer"):
        yield "newest checkpoint cut short", harness.cut_checkpoint, (step,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="each fault once, few kinds of errors")
    parser.add_argument("--only", default="", help="steps and faults with these words in them alone")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "results" / "chaos" / "table.json")
    chosen = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path.insert(0, str(ROOT))
    for package in PACKAGES:
        importlib.import_module(package)
    rows = json.loads(chosen.output.read_text()) if chosen.output.is_file() else []
    rows = [row for row in rows if row.keys() == {field.name for field in fields(Row)}]
    if not (with_strace := shutil.which("strace") is not None):
        print("strace is not installed: no system call is harmed")
    home = Path(tempfile.mkdtemp(prefix="clipgen-chaos-"))
    try:
        harness = Harness(home)
        harness.make_undisturbed(with_strace)
        with ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
            there = {(row["step"], row["fault"]) for row in rows}
            todo = {
                (given[0], name): (call, *given) for name, call, given in faults(harness, chosen.quick, with_strace)
            }
            todo = [job for key, job in todo.items() if key not in there and chosen.only in " ".join(key)]
            for done in [pool.submit(*job) for job in todo]:
                rows.append(asdict(done.result()))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                chosen.output.parent.mkdir(parents=True, exist_ok=True)
                chosen.output.write_text(json.dumps(rows, indent=2) + "\n")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    total = {key: sum(row[key] for row in rows) for key in list(rows[0])[2:] if key != "lost_steps"}
    print(", ".join(f"{value} {key}" for key, value in total.items()))
    bad = total["corrupted"] + total["tracebacks"] + total["hangs"] + total["left"]
    sys.exit(bad > 0 or total["survived"] < total["injected"])


if __name__ == "__main__":
    main()
