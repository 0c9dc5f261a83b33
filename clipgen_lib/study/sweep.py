"""A sweep: a run for each cell of a grid over fields of a preset, side by side, and the table of what they measured.

In: a base preset, values of some of its fields, a number of seeds. Out: results/<sweep>/ with a folder for each cell, which is a
run as any other, sweep.json (the base) and table.json. A stage that several cells have in common is made once.
"""

import difflib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas
import torch

from ..config import Preset, changed, load_preset
from ..runtime import runs
from ..runtime.runs import ClipgenError, open_run, shortened
from ..workbench import Workbench, begun_with
from .compare import TABLES, mean_and_std, result_of, shared

MADE_IN = {"vqgan": "vqgan", "store": "store/train", "transformer": "transformer"}  # folder of a stage that is done
SHOWN = [
    "transformer.nll",
    "evaluation.fid.0",
    "evaluation.caps",
    "evaluation.classes.accuracy",
]  # of runs side by side
SHOWN += [f"oracle.text.{name}" for name in ("one.colour", "one.shape", "two.both", "held_out.shape")]
COLUMNS = dict.fromkeys(TABLES["ablation"].columns + TABLES["photos"].columns)  # printed where a cell has them


def cells_of(grid: Sequence[str], first_seed: int = 0, seeds: int = 1) -> dict[str, dict]:
    """The cells of a grid: name -> changes of the base preset, as `config.changed` takes them.

    Args:
        grid: texts such as "transformer.width=128,256"; a value that is a list stands in brackets.
        first_seed, seeds: each combination once with each of so many values of transformer_train.seed, from the first on.

    Raises:
        ClipgenError: a text that is no field with its values, or a field or a value given twice.
    """
    axes: dict[str, list[str]] = {}
    for text in [*grid, f"transformer_train.seed={','.join(map(str, range(first_seed, first_seed + seeds)))}"]:
        place, _, values = text.partition("=")
        values = [value.strip() for value in re.split(r",(?![^\[]*\])", values)]
        if not re.fullmatch(r"\w+\.\w+|scale", place) or not all(values) or len(set(values)) < len(values):
            wrong = f"grid {shortened(text)!r} is not PART.FIELD=VALUE,VALUE with each value once"
            raise ClipgenError(f"{wrong}: write for example transformer.width=128,256")
        if place in axes:
            raise ClipgenError(f"{place} has two grids: give its values in one, and the number of seeds by --seeds")
        axes[place] = values
    cells = {}
    for values in itertools.product(*axes.values()):
        parts, fields = {}, dict(zip(axes, values, strict=True))
        for place, value in fields.items():
            part, _, field = place.partition(".")
            parts[part] = {**parts.get(part, {}), field: value} if field else value
        name = ",".join(f"{place}={value}" for place, value in fields.items()).replace("transformer_train.seed", "seed")
        cells[re.sub(r"[^\w .+=@,()-]", "-", name.replace("[", "(").replace("]", ")"))] = parts
    return cells


@dataclass(frozen=True)
class Sweep:
    """A sweep whose presets, data, CLIP and device have been checked; nothing is written yet."""

    name: str
    preset: str  # a name or a file, of which the cells' presets are changes
    begun: dict  # what sweep.json says: the base preset and the data
    cells: dict[str, Preset]
    data: str
    device: str
    jobs: int = 1  # cells at a time

    @property
    def folder(self) -> Path:
        return runs.RESULTS / self.name

    @classmethod
    def checked(cls, name: str, preset: str, changes: str, cells: tuple[Sequence[str], int], **of_run: str) -> "Sweep":
        """A sweep from what the command takes. Cells that are there are kept, whatever their grid was, and new ones are added.

        Args:
            changes: of the preset, for all cells.
            cells: the grid and the number of seeds, as for `cells_of`.
            of_run: `data`, `device` and `clip`, as for `Workbench.open`.

        Raises:
            ClipgenError: a wrong value of any cell, two cells alike, or a sweep that was begun with another base or data.
        """
        wb, config = Workbench.checked(load_preset(preset, changes), f"{name}/base", **of_run)
        grid = cells_of(cells[0], wb.preset.transformer_train.seed, cells[1])
        presets = {open_run(f"{name}/{cell}").name: changed(wb.preset, parts) for cell, parts in grid.items()}
        if len(set(presets.values())) < len(presets):
            raise ClipgenError(f"some cells of sweep {name!r} have the same settings: give each value once")
        folder, now = wb.run.path.parent, asdict(config)
        runs.refuse_published(folder)
        path = folder / "sweep.json"
        if path.exists() and (other := runs.differences(asdict(begun_with(path)), now)):
            cure = "choose another name or give the base that it was begun with"
            raise ClipgenError(f"sweep {name!r} was begun with another {', '.join(other[:3])}: {cure}")
        there = {path.parent.name: begun_with(path).preset for path in sorted(folder.glob("*seed=*/config.json"))}
        begun = {cell: found for cell, found in there.items() if cell in presets or result_of(folder / cell)}
        return cls(name, preset, now, shared(presets, name, begun), wb.data, wb.device)

    def lacks(self, cell: str) -> str:
        """The stages that a cell is to take of others and that are not made yet."""
        inside = [item for item in asdict(self.cells[cell].shared).items() if item[1].startswith(f"{self.name}/")]
        lacking = [(stage, source) for stage, source in inside if not (runs.RESULTS / source / MADE_IN[stage]).is_dir()]
        return ", ".join(f"the {stage} of {source}" for stage, source in lacking)

    def start(self, cell: str) -> subprocess.Popen:
        """`clipgen run` of a cell, in a process of its own; what it says goes into the cell's sweep.log."""
        count, place, wanted = torch.cuda.device_count(), list(self.cells).index(cell), asdict(self.cells[cell])
        device = f"cuda:{place % count}" if self.device == "cuda" and count > 1 else self.device
        command = f"-m clipgen_lib run -p DEVICE={device} --preset".split()
        command = [sys.executable, *command, self.preset, "--run", f"{self.name}/{cell}", "-p", f"DATA={self.data}"]
        for field in runs.differences(asdict(load_preset(self.preset)), wanted):
            part, name = field.split(".")
            value = wanted[part][name]
            command += ["--set", f"{field}={value if isinstance(value, str) else json.dumps(value)}"]
        environment = os.environ | {"CLIPGEN_PROGRESS": "0"}
        if self.jobs > 1:  # threads that wait for each other make a busy machine many times slower
            environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // self.jobs, 1)))
        with open(open_run(f"{self.name}/{cell}").file("sweep.log"), "w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def run(self) -> dict[str, str]:
        """Make the cells that are not finished, and table.json after each; returns those that failed, with why.

        A cell begins when the stages that it takes of others are there. Raises `runs.Stopped` after a signal, when the cells
        that were being made have saved and ended.
        """
        waiting = [cell for cell in self.cells if not result_of(self.folder / cell)]
        running, failed = {}, {}

        def stopped() -> None:  # a closed terminal and Ctrl-C reach the cells' processes by themselves
            for process in running.values() if stop.number == signal.SIGTERM else ():
                process.terminate()

        bar = runs.progress(len(self.cells), f"sweep {self.name}", initial=len(self.cells) - len(waiting))
        with runs.held(self.folder / "table.json", f"sweep {self.name!r}"), bar, runs.stoppable(stopped) as stop:
            runs.write_json(self.folder / "sweep.json", self.begun)
            while running or not stop.number:
                ready = [cell for cell in waiting if not self.lacks(cell)]
                for cell in ready[: 0 if stop.number else self.jobs - len(running)]:
                    waiting.remove(cell)
                    running[cell] = self.start(cell)
                if not running:
                    break
                time.sleep(0.2)
                for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                    said = (self.folder / cell / "sweep.log").read_text(encoding="utf-8", errors="replace").strip()
                    last = shortened(said.rpartition("\n")[2].removeprefix("Error: "), 600)
                    failed |= {cell: last} if running.pop(cell).returncode else {}
                    runs.write_json(self.folder / "table.json", self.table())
                    bar.update()
        if stop.number:
            raise runs.Stopped(stop.number, f"in sweep {self.name!r}")
        return failed | {cell: f"it needs {self.lacks(cell)}" for cell in waiting}

    def table(self) -> list[dict]:
        """A row for each combination of values, of this grid and earlier ones: its name, seeds, and mean and std of every metric."""
        rows: dict[str, list[dict]] = {}
        folders = [self.folder / cell for cell in self.cells]
        for folder in dict.fromkeys([*folders, *sorted(self.folder.glob("*seed=*"))]):
            if result := result_of(folder):
                rows.setdefault(re.sub(r",?seed=\d+$", "", folder.name) or "base", []).append(result)
        return [{"name": name, **mean_and_std(results)} for name, results in rows.items()]


def differing(table: pandas.DataFrame) -> list[str]:
    """The fields of the preset in which the runs of a table (`Workbench.runs`) differ; where a stage was taken from is none."""
    fields = pandas.json_normalize(asdict(Preset())).columns.intersection(table.columns, sort=False)
    return [name for name in fields if not name.startswith("shared.") and table[name].dropna().map(str).nunique() > 1]


def chosen(table: pandas.DataFrame, where: Sequence[str], sort: str) -> pandas.DataFrame:
    """Of a table of runs those for which each FIELD=VALUE holds, in the order of a field; of no field, in that of their names.

    Raises ClipgenError: no run has such a field.
    """
    for field in filter(None, (*(text.partition("=")[0] for text in where), sort)):
        if field not in table:
            nearest = [name for name in table if field in name][:5] or difflib.get_close_matches(field, table, 5, 0)
            raise ClipgenError(f"no run has a field {shortened(field)!r}: the nearest are {', '.join(nearest)}")
    for text in where:
        field, sign, value = text.partition("=")
        if not sign:
            raise ClipgenError(f"{shortened(text)!r} is not FIELD=VALUE: write for example transformer.width=256")
        number = pandas.to_numeric(value, errors="coerce")  # nan, which equals nothing, of a text
        table = table[[number == found or str(found).casefold() == value.casefold() for found in table[field]]]
    as_text = lambda column: column.map(str, na_action="ignore") if column.dtype == object else column
    return table.sort_values(sort, key=as_text, kind="stable") if sort else table
