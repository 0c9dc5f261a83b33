"""Faults put into the commands of a small run, and what became of them: `make chaos`, or `python tests/chaos.py --kills 5`.

In: the public commands on preset smoke, each in a process of its own. First nothing happens to them; then each step is begun
again on a copy of what was there before it, harmed from outside, and given again. Out: results/chaos/table.json.

A step has survived a fault if it ended by itself, by the signal or by one sentence, and the same command, given again, came to its
end. Its result is corrupted if a byte of its final files (weights, token store, PNG files, numbers of the evaluation) differs from
the undisturbed run's. `lost_steps` is the most work that one injection cost: training steps, or images of the other steps.
"""

from __future__ import annotations

import argparse
import hashlib
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from clipgen_lib.runtime.runs import RESULTS, read_json, write_json

ROOT = Path(__file__).parents[1]
PATIENCE = 600  # seconds after which a command counts as hung
RUN = ["--preset", "smoke", "--run", "run", "--device", "cpu"]
COMMANDS = {
    "train-vqgan": ["train-vqgan", *RUN, "--steps", "60"],
    "extract": ["extract", *RUN],
    "train-transformer": ["train-transformer", *RUN, "--steps", "80"],
    "evaluate": ["evaluate", *RUN],
    "generate": [
        "generate",
        "a large red star",
        "--run",
        "run",
        "-n",
        "128",
        "-o",
        "{results}/run/out.png",
        "--device",
        "cpu",
    ],
}
STEPS = list(COMMANDS)
OUTPUTS = {  # final files of each step in its run's folder
    "train-vqgan": "vqgan/*",
    "extract": "store/**/*",
    "train-transformer": "transformer/*",
    "evaluate": "generated/**/*.png",
    "generate": "out.png",
}
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


class Command:
    """A step that runs in a process of its own, on one thread; its output goes to a file beside the results."""

    def __init__(self, step: str, results: Path, *more: str):
        words = [word.format(results=results) for word in COMMANDS[step]] + list(more)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {
            "CLIPGEN_RESULTS": str(results),
            "CLIPGEN_PROGRESS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": path,
        }
        self.log = results.with_name(f"{step}-{time.monotonic_ns()}.log")
        with open(self.log, "w") as output:
            command = [sys.executable, "-m", "clipgen_lib", *words]
            streams = {"stdout": output, "stderr": output, "start_new_session": True}
            self.process = subprocess.Popen(command, env=os.environ | settings, cwd=ROOT, **streams)

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
        """Whether the condition came true before the command ended."""
        start = time.monotonic()
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() - start > PATIENCE:
                self.signal(signal.SIGKILL)
                raise SystemExit(f"{' '.join(self.process.args)} hangs: it wrote {self.said[-500:]!r}")
            time.sleep(0.02)
        return False

    def signal(self, number: int) -> None:
        """To the command and to the workers it may have."""
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Wait for it; returns its exit status."""
        self.wait_until(lambda: False)
        return self.process.returncode

    @property
    def ended_by_a_sentence(self) -> bool:
        return self.process.returncode != 0 and "Traceback" not in self.said and "Error: " in self.said


def outputs(step: str, results: Path) -> dict[str, str]:
    """SHA-256 of each final file of a step, and of an evaluation its numbers, which do not say how long they took."""
    run = results / "run"
    files = sorted(path for path in run.glob(OUTPUTS[step]) if path.is_file())
    found = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if step == "evaluate":
        numbers = read_json(run / "summary.json")
        found |= {key: json.dumps(numbers.get(key), sort_keys=True) for key in ("evaluation", "oracle")}
    return found


def lost(before: Bars, after: Bars) -> int:
    """Work that a command had done and does again, by the bars that both runs of it show.

    The bar of an evaluation's images, "generating <folder>", counts images that are there and not generated again.
    """
    labels = [label for label in before.keys() & after.keys() if not label.startswith("generating ")]
    return sum(max(after[label][0] - before[label][1], 0) for label in labels)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class Harness:
    """The undisturbed run, and copies of what was there before each of its steps."""

    def __init__(self, home: Path, seed: int):
        self.home, self.seed = home, seed
        self.seconds: dict[str, float] = {}  # that the bars of each step are at work
        self.wanted: dict[str, dict[str, str]] = {}

    def make_undisturbed(self) -> None:
        results = self.home / "undisturbed" / "results"
        results.mkdir(parents=True)
        for step in STEPS:
            shutil.copytree(results, self.home / "before" / step)
            command = Command(step, results)
            command.wait_until(command.bars)
            start = time.monotonic()
            if command.end() != 0:
                raise SystemExit(f"{step} fails without any fault: {command.said[-500:]}")
            self.seconds[step], self.wanted[step] = time.monotonic() - start, outputs(step, results)

    def copy(self, step: str) -> Path:
        """The results as they were before a step, in a folder of their own."""
        place = Path(tempfile.mkdtemp(prefix=f"{step}-", dir=self.home))
        return Path(shutil.copytree(self.home / "before" / step, place / "results"))

    def finish(self, row: Row, results: Path, before: Bars) -> None:
        """Give a harmed command again, and enter into the row what came of it."""
        command = Command(row.step, results)
        row.survived += command.end() == 0
        row.lost_steps = max(row.lost_steps, lost(before, command.bars()))
        row.corrupted += outputs(row.step, results) != self.wanted[row.step]
        shutil.rmtree(results.parent)

    def signals(self, step: str, number: int, times: int) -> Row:
        """Signals at random moments; up to three in a row hit the same run, each after it has resumed from the one before."""
        row, rng = Row(step, signal.Signals(number).name), random.Random(f"{self.seed} {step} {number}")
        while row.injected < times:
            results, before, in_a_row = self.copy(step), {}, min(3, times - row.injected)
            hits = 0
            for _ in range(in_a_row):
                command = Command(step, results)
                command.wait_until(command.bars)
                moment = time.monotonic() + rng.uniform(0, self.seconds[step] / in_a_row)
                if not command.wait_until(lambda moment=moment: time.monotonic() >= moment):
                    break  # it was faster: nothing was injected
                command.signal(number)
                status = command.end()
                hits += 1
                row.lost_steps = max(row.lost_steps, lost(before, command.bars()))
                row.survived += status == -number or (status == 128 + number and command.ended_by_a_sentence)
                before = command.bars()
            row.injected += hits
            row.survived -= hits > 0  # the last one has survived when the rest is done
            self.finish(row, results, before)
        return row

    def cut_checkpoint(self, step: str) -> Row:
        """Killed, and the newest checkpoint cut in half: the one before it takes its place."""
        row, results = Row(step, "newest checkpoint cut in half", injected=1), self.copy(step)
        command, stage = Command(step, results), step.removeprefix("train-")
        paths = lambda: sorted((results / "run" / "checkpoints").glob(f"{stage}-*[0-9].safetensors"))
        command.wait_until(lambda: len(paths()) >= 2)
        command.signal(signal.SIGKILL)
        command.end()
        cut_in_half(paths()[-1])
        self.finish(row, results, command.bars())
        return row

    def cut_input(self, step: str, victim: str, remade_by: str) -> Row:
        """A finished file cut in half is refused by one sentence; what holds it is deleted and made again."""
        results = self.copy(step)
        path = sorted((results / "run").glob(victim))[0]
        row = Row(step, f"{path.relative_to(results / 'run')} cut in half", injected=1)
        cut_in_half(path)
        reader = Command(step, results)
        reader.end()
        refused = reader.ended_by_a_sentence
        shutil.rmtree(results / "run" / victim.partition("/")[0])
        remade = Command(remade_by, results).end() == 0
        self.finish(row, results, {})
        row.survived = int(row.survived and remade and refused)
        return row

    def bad_images(self) -> Row:
        """Eight of 64 images cut short: they are left out and listed, and the training comes to its end."""
        row, results = Row("train-vqgan", "images cut short", injected=8), self.copy("train-vqgan")
        photos = results.parent / "photos"
        photos.mkdir()
        for path in sorted((ROOT / "data").glob("shapes-256-*/train/*.png"))[:64]:
            shutil.copy(path, photos)
        for path in sorted(photos.iterdir())[::8]:
            path.write_bytes(path.read_bytes()[:100])
        done = Command("train-vqgan", results, "--data", str(photos)).end() == 0
        row.survived = 8 if done and read_json(results / "run" / "summary.json").get("skipped") else 0
        shutil.rmtree(results.parent)
        return row


def faults(harness: Harness, kills: int) -> Iterator[Callable[[], Row]]:
    """Everything that is injected, `kills` SIGKILLs among it, as functions."""
    for number, step in enumerate(STEPS):
        if share := len(range(number, kills, len(STEPS))):
            yield lambda step=step, share=share: harness.signals(step, signal.SIGKILL, share)
        yield lambda step=step: harness.signals(step, signal.SIGTERM, 1)
    yield lambda: harness.cut_checkpoint("train-vqgan")
    yield lambda: harness.cut_checkpoint("train-transformer")
    yield lambda: harness.cut_input("extract", "vqgan/model.safetensors", "train-vqgan")
    yield lambda: harness.cut_input("train-transformer", "store/train/**/tokens*", "extract")
    yield lambda: harness.cut_input("generate", "transformer/model.safetensors", "train-transformer")
    yield harness.bad_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="SIGKILLs at random moments in all  [default: 25]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "chaos" / "table.json")
    chosen = parser.parse_args()
    home, rows = Path(tempfile.mkdtemp(prefix="clipgen-chaos-")), []
    try:
        harness = Harness(home, chosen.seed)
        harness.make_undisturbed()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for row in pool.map(lambda inject: inject(), faults(harness, chosen.kills)):
                rows.append(asdict(row))
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    write_json(chosen.output, rows)
    total = {key: sum(row[key] for row in rows) for key in ("injected", "survived", "corrupted")}
    print(", ".join(f"{value} {key}" for key, value in total.items()))
    sys.exit(total["corrupted"] > 0 or total["survived"] < total["injected"])


if __name__ == "__main__":
    main()
