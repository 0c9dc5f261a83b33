"""Faults put into running commands, and what became of them.

In: the commands of one small run on the Shapes world, each in a process of its own, as a user would start it. Out: a table of what
was injected, what survived it, how much work was lost, and whether anything came out other than without the fault. A command
has survived a fault if it ended by itself or by one sentence, and the same command, given again, came to the end. Its result is
corrupted if a single byte of it differs from that of the run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .config import PRESETS, load_preset
from .runs import DATA, RESULTS, ClipgenError, file_hash, progress, read_json, versions, write_json

STEPS = ("train-clip", "train-vqgan", "extract", "train-transformer", "evaluate")
TRAINED = {"train-clip": 60, "train-vqgan": 120, "train-transformer": 160}  # training steps
OUTPUTS = {"train-clip": "clip", "train-vqgan": "vqgan", "extract": "store", "train-transformer": "transformer"}
BARS = {step: ("training",) for step in TRAINED} | {"extract": ("extracting",), "evaluate": ("features", "drawing for")}
SIZE = {"shapes": {"n_train": 1_536}}  # of preset `smoke` changed: an extraction of two shards
RUN = "run"
PATIENCE = 300  # seconds that a command may take before it counts as hung


@dataclass
class Row:
    """What became of one fault at one step; `lost_steps` is the most that one injection cost, in units of the step's bar."""

    step: str
    fault: str
    injected: int = 0
    survived: int = 0
    lost_steps: int = 0
    unit: str = "steps"
    corrupted: int = 0
    note: str = ""


# ---------------------------------------------------------------------------------------------- the command that is harmed


def child() -> None:
    """Run a command of `clipgen` that writes down how far each of its bars has come: what `python -m clipgen_lib.faults` does.

    Arguments: file for the record, changes of preset `smoke` as JSON, and the command's own.
    """
    from . import data, passes, runs
    from .cli import main

    record, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    small = load_preset("smoke", **changes)
    PRESETS["smoke"] = lambda: replace(small, name="custom")
    passes.SAVE_SECONDS = 0  # after every batch: a pass of this size takes seconds
    data.CACHE_BYTES = 0  # a picture is read again in every epoch

    class Recorded(runs.tqdm):
        def __init__(self, *arguments, total: int = 0, desc: str = "", initial: int = 0, **settings):
            super().__init__(*arguments, total=total, desc=desc, initial=initial, **settings)
            self.done = initial
            self.write_down(desc, "from", initial)
            self.label = desc

        def update(self, n: int = 1) -> None:
            super().update(n)
            self.done += n
            self.write_down(self.label, "at", self.done)

        @staticmethod
        def write_down(*words: object) -> None:
            with open(record, "a") as stream:
                stream.write("\t".join(map(str, words)) + "\n")

    runs.tqdm = Recorded
    sys.argv[1:] = sys.argv[3:]
    main()


def bars(record: Path) -> dict[str, tuple[int, int]]:
    """Of each bar of a command: where it began and how far it came."""
    found: dict[str, tuple[int, int]] = {}
    for line in record.read_text().splitlines() if record.exists() else []:
        words = line.split("\t")
        if len(words) == 3 and words[2].isdigit():
            label, kind, at = words[0], words[1], int(words[2])
            found[label] = (at, at) if kind == "from" else (found[label][0], at)
    return found


def lost(step: str, before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> int:
    """Work of a step that was done before a fault and is done again after it; bars within the step's own are left out."""
    mine = [label for label in before if label in after and label.startswith(BARS[step])]
    return sum(max(before[label][1] - after[label][0], 0) for label in mine)


# ---------------------------------------------------------------------------------------------- commands in a place of their own


@dataclass(frozen=True)
class Place:
    """A home of the project with data and results of its own, in which one step after the other is run."""

    home: Path

    @property
    def run(self) -> Path:
        return self.home / "results" / RUN

    def start(self, step: str, data: str = "shapes", **changes: dict) -> Command:
        """Begin a step; `changes` are of the parts of preset `smoke`."""
        record = self.home / f"record-{time.monotonic_ns()}"
        trained = ["--steps", str(TRAINED[step])] if step in TRAINED else []
        device = [] if step == "train-clip" else ["--device", "cpu"]
        command = [sys.executable, "-c", "from clipgen_lib.faults import child; child()", str(record), json.dumps({**SIZE, **changes}),
                   step, "--preset", "smoke", "--run", RUN, "--data", data, *trained, *device]  # fmt: skip
        package = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "CLIPGEN_HOME": str(self.home), "CLIPGEN_RESULTS": str(self.home / "results"),
                       "CLIPGEN_PROGRESS": "0", "PYTHONPATH": package}  # fmt: skip
        with open(record.with_suffix(".log"), "w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        return Command(process, record)

    def outputs(self, step: str) -> dict[str, str]:
        """Hashes of what a step leaves behind; of `evaluate` its numbers, without how long they took."""
        if step == "evaluate":
            numbers = read_json(self.run / "summary.json")
            return {key: json.dumps(numbers.get(key), sort_keys=True) for key in ("evaluation", "oracle")}
        folder = self.run / OUTPUTS[step]
        return {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Command:
    """A step that is running."""

    process: subprocess.Popen
    record: Path

    def has_begun(self, at: int = 0) -> bool:
        """Whether a bar has come so far."""
        return any(end >= at for _, end in bars(self.record).values())

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true before the command ended.

        Raises:
            ClipgenError: neither within `PATIENCE` seconds.
        """
        start = time.monotonic()
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() - start > PATIENCE:
                self.signal(signal.SIGKILL)
                raise ClipgenError(f"a command hangs: it was killed after {PATIENCE} s, and {self.record.with_suffix('.log')} holds what it wrote")  # fmt: skip
            time.sleep(0.02)
        return False

    def signal(self, number: int) -> None:
        """To the command and the workers it has."""
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Wait for it; returns its exit status."""
        self.wait_until(lambda: False)
        return self.process.returncode

    @property
    def said(self) -> str:
        return self.record.with_suffix(".log").read_text(errors="replace")

    @property
    def ended_by_a_sentence(self) -> bool:
        return self.process.returncode != 0 and "Traceback" not in self.said and "Error: " in self.said


# ---------------------------------------------------------------------------------------------- faults


class Harness:
    """The run that nothing happens to, and copies of it in which one step is begun, harmed, and begun again."""

    def __init__(self, home: Path, seed: int):
        self.home, self.random, self.seconds = home, random.Random(seed), {}
        self.whole = Place(home / "whole")
        (self.whole.home / "data").mkdir(parents=True)
        (self.whole.home / "data" / "shapes_clip").symlink_to(DATA / "shapes_clip")

    def make_whole(self, steps: tuple[str, ...] = STEPS) -> None:
        """The run that nothing happens to, and how long the bars of each step are at work."""
        for step in steps:
            command = self.whole.start(step)
            command.wait_until(command.has_begun)
            start = time.monotonic()
            if command.end() != 0:
                raise ClipgenError(f"{step} fails without any fault: {command.said.strip().splitlines()[-1]}")
            self.seconds[step] = time.monotonic() - start

    def copy(self, step: str) -> Place:
        """A place where everything before a step is done."""
        place = Place(Path(tempfile.mkdtemp(prefix=f"{step}-", dir=self.home)))
        (place.home / "data").mkdir()
        for folder in (self.whole.home / "data").iterdir():
            if folder.name != "statistics":
                (place.home / "data" / folder.name).symlink_to(folder.resolve())
        place.run.mkdir(parents=True)
        for earlier in STEPS[: STEPS.index(step)]:
            if earlier in OUTPUTS and (self.whole.run / OUTPUTS[earlier]).exists():
                shutil.copytree(self.whole.run / OUTPUTS[earlier], place.run / OUTPUTS[earlier])
        return place

    def finish(self, row: Row, place: Place, before: dict[str, tuple[int, int]], **changes: dict) -> None:
        """Give a harmed step's command again, and enter into the row what came of it."""
        command = place.start(row.step, **changes)
        row.survived += command.end() == 0
        row.lost_steps = max(row.lost_steps, lost(row.step, before, bars(command.record)))
        row.corrupted += place.outputs(row.step) != self.whole.outputs(row.step)
        shutil.rmtree(place.home)

    def kills(self, step: str, number: int, times: int, in_a_row: int = 3) -> Row:
        """Signals at random moments; several in a row hit the same run, each after it has gone on from the one before."""
        row = Row(step, signal.Signals(number).name, unit="steps" if step in TRAINED else "pictures")
        while row.injected < times:
            place, before = self.copy(step), {}
            for _ in range(min(in_a_row, times - row.injected)):
                command = place.start(step)
                command.wait_until(command.has_begun)
                moment = time.monotonic() + self.random.uniform(0, 1.2 * self.seconds[step] / in_a_row)
                if not command.wait_until(lambda moment=moment: time.monotonic() >= moment):
                    break  # it was faster: nothing was injected
                command.signal(number)
                status = command.end()
                row.injected += 1
                row.lost_steps = max(row.lost_steps, lost(row.step, before, bars(command.record)))
                if number == signal.SIGKILL or (status == 128 + number and command.ended_by_a_sentence):
                    row.survived += 1
                before = bars(command.record)
            row.survived -= 1  # the last one has survived when the rest is done
            self.finish(row, place, before)
        return row

    def cut_checkpoint(self, step: str) -> Row:
        """Killed, and the newest checkpoint cut in half: the one before it takes its place."""
        row, place = Row(step, "checkpoint cut in half", injected=1), self.copy(step)
        command = place.start(step)
        paths = lambda: sorted((place.run / "checkpoints").glob("*-[0-9]*.safetensors"))
        command.wait_until(lambda: len(paths()) >= 2)
        command.signal(signal.SIGKILL)
        command.end()
        cut_in_half(paths()[-1])
        self.finish(row, place, bars(command.record))
        return row

    def cut_shard(self) -> list[Row]:
        """A shard of the token store cut in half: while the store is being made, and after it was finished."""
        making, place = (
            Row("extract", "shard of an unfinished store cut in half", injected=1, unit="pictures"),
            self.copy("extract"),
        )
        command = place.start("extract")
        arrays = lambda: sorted((place.run / "store").rglob("*.partial/**/tokens.u16"))
        command.wait_until(lambda: bool(arrays()) and command.has_begun(1))
        command.signal(signal.SIGKILL)
        command.end()
        cut_in_half(arrays()[0])
        self.finish(making, place, bars(command.record))
        reading, place = Row("train-transformer", "shard of the store cut in half", injected=1), self.copy("train-transformer")
        cut_in_half(sorted((place.run / "store" / "train").rglob("tokens.u16"))[0])
        command = place.start("train-transformer")
        command.end()
        if command.ended_by_a_sentence:  # which says to delete the store and to extract again
            shutil.rmtree(place.run / "store")
            extracted = place.start("extract").end() == 0
            self.finish(reading, place, {})
            reading.survived *= extracted
        return [making, reading]

    def full_disk(self, step: str, share: float) -> Row:
        """A disk that is full after a share of what the step leaves behind, and then has room again."""
        row, place = Row(step, "disk full", injected=1, unit="steps" if step in TRAINED else "pictures"), self.copy(step)
        used = sum(path.stat().st_size for path in place.run.rglob("*") if path.is_file())
        extra = sum(path.stat().st_size for path in (self.whole.run / OUTPUTS[step]).rglob("*") if path.is_file())
        kept = [path.stat().st_size for path in (self.whole.run / "checkpoints").glob(f"{step.removeprefix('train-')}-*")]
        disk = place.home / "results"
        if not mounted(disk, used + int(share * (max(kept) if kept else extra)) + 200_000):
            shutil.rmtree(place.home)
            return replace(row, injected=0, note="not tried: no right to mount a small disk")
        try:
            command = place.start(step)
            command.end()
            by_sentence = command.ended_by_a_sentence and "no room for" in command.said
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            before, again = bars(command.record), place.start(step)
            row.survived = int(again.end() == 0 and by_sentence)
            row.lost_steps = lost(row.step, before, bars(again.record))
            row.corrupted = int(place.outputs(step) != self.whole.outputs(step))
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        shutil.rmtree(place.home)
        return row

    def dead_worker(self) -> Row:
        """A process that decodes pictures is killed, as a machine short of memory does."""
        import psutil

        row, place = Row("train-vqgan", "worker that dies", injected=1), self.copy("train-vqgan")
        workers = {"vqgan_train": {"workers": 2}}
        command = place.start("train-vqgan", **workers)
        command.wait_until(lambda: command.has_begun(30))
        psutil.Process(command.process.pid).children()[0].kill()
        command.end()
        by_sentence = command.ended_by_a_sentence
        self.finish(row, place, bars(command.record), **workers)
        row.survived *= by_sentence
        return row

    def bad_picture(self) -> Row:
        """A picture that goes bad between two epochs is left out and listed; the training goes on without it."""
        row, place = Row("train-vqgan", "picture that goes bad between epochs", injected=1), self.copy("train-vqgan")
        photos = place.home / "photos"
        for path in sorted((self.whole.home / "data").glob("shapes-*/train/*.png"))[:64]:
            (photos / path.name).parent.mkdir(exist_ok=True)
            shutil.copy(path, photos / path.name)
        command = place.start("train-vqgan", str(photos), vqgan_train={"workers": 1})
        command.wait_until(lambda: command.has_begun(10))
        for path in sorted(photos.iterdir())[:8]:
            path.write_bytes(path.read_bytes()[:100])
        done = command.end() == 0
        skipped = read_json(place.run / "summary.json").get("skipped", {}) if done else {}
        row.survived = int(done and bool(skipped))
        row.note = f"{len(skipped)} of 8 files listed, the others held out"
        shutil.rmtree(place.home)
        return row

    def cut_tar(self) -> Row:
        """A tar shard of pictures cut in half: what is before the cut is used, the rest listed."""
        import tarfile

        row, place = Row("extract", "tar shard of pictures cut in half", injected=1, unit="pictures"), self.copy("extract")
        shards = place.home / "shards"
        shards.mkdir()
        for split in ("train", "val"):
            pictures = sorted((self.whole.home / "data").glob(f"shapes-*/{split}/*.png"))
            for number, part in enumerate((pictures[:32], pictures[32:64])):
                with tarfile.open(shards / f"{split}-{number:06d}.tar", "w") as tar:
                    for path in part:
                        tar.add(path, path.name)
        cut_in_half(shards / "train-000001.tar")
        command = place.start("extract", str(shards))
        done = command.end() == 0
        meta = read_json(place.run / "store" / "train" / "meta.json") if done else {"N": 0, "skipped": {}}
        row.survived = int(done and 64 < meta["N"] < 128 and bool(meta["skipped"]))
        row.note = f"{meta['N'] // 2} of 64 pictures read"
        shutil.rmtree(place.home)
        return row


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def mounted(folder: Path, size: int) -> bool:
    """Put a disk of so many bytes, in memory, under what a folder holds; False where that is not allowed."""
    if not shutil.which("mount"):
        return False
    aside = folder.with_name(folder.name + "-aside")
    folder.rename(aside)
    folder.mkdir()
    done = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode
        == 0
    )
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    return done


def run_faults(kills: int = 20, seed: int = 0, folder: Path | None = None) -> list[dict]:
    """Inject everything, print nothing, and write `results/faults/table.json`; returns its rows.

    Args:
        kills: SIGKILLs at random moments in all, shared by the five steps.
    """
    home = Path(tempfile.mkdtemp(prefix="clipgen-faults-"))
    harness = Harness(home, seed)
    shares = np.bincount(np.arange(kills) % len(STEPS), minlength=len(STEPS))
    trainings = tuple(TRAINED)
    todo: list[Callable[[], Row | list[Row]]] = [
        *(lambda step=step, n=int(n): harness.kills(step, signal.SIGKILL, n) for step, n in zip(STEPS, shares, strict=True)),
        *(lambda step=step: harness.kills(step, signal.SIGTERM, 1) for step in STEPS),
        *(lambda step=step: harness.cut_checkpoint(step) for step in trainings),
        harness.cut_shard,
        *(lambda step=step, share=share: harness.full_disk(step, share) for step, share in
          (("train-vqgan", 1.6), ("extract", 0.5), ("train-transformer", 1.6))),
        harness.dead_worker,
        harness.bad_picture,
        harness.cut_tar,
    ]  # fmt: skip
    rows: list[Row] = []
    try:
        with progress(len(todo) + 1, "injecting faults") as bar:
            harness.make_whole()
            bar.update()
            for inject in todo:
                found = inject()
                rows += found if isinstance(found, list) else [found]
                bar.update()
    finally:
        shutil.rmtree(home, ignore_errors=True)
    table = [asdict(row) for row in rows]
    write_json((folder or RESULTS / "faults") / "table.json", table)
    write_json((folder or RESULTS / "faults") / "facts.json", {"seed": seed, "trained": TRAINED, "versions": versions()})
    return table


def lines_of(table: list[dict]) -> str:
    """The table as lines a person can read, and their sum."""
    lines = [f"{'step':19}{'fault':42}{'injected':>9}{'survived':>9}{'lost at most':>18}{'corrupted':>10}"]
    for row in table:
        cost = f"{row['lost_steps']} {row['unit']}"
        lines.append(f"{row['step']:19}{row['fault']:42}{row['injected']:>9}{row['survived']:>9}{cost:>18}{row['corrupted']:>10}  {row['note']}".rstrip())  # fmt: skip
    total = {key: sum(row[key] for row in table) for key in ("injected", "survived", "corrupted")}
    lines.append(f"{total['injected']} faults injected, {total['survived']} survived, {total['corrupted']} corrupted results")
    return "\n".join(lines)
