"""The comparison: one change at a time on the paper's plain recipe, and other systems under the same evaluation.

In: a finished run, whose VQGAN and store all rows share. Out: a folder of results/ for each of TABLES, with a run for each recipe
and seed, table.json with mean and spread over seeds, and images of each run in rows/. A run that is finished is kept.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from scipy.stats import ttest_ind_from_stats

from ..config import Preset, SharedConfig, changed
from ..data.images import grid
from ..metrics.classifier import Classifier
from ..runtime import runs
from ..runtime.runs import ClipgenError, Run
from ..store import TokenStore
from ..text_to_image import TextToImage
from ..transformer import ImageTransformer
from ..vqgan import VQGAN
from ..workbench import Workbench, begun_with
from . import baselines
from .released import named_sources


@dataclass(frozen=True)
class Recipe:
    """A row of a table: what it changes of the plain recipe; tables.yaml says what each field means."""

    name: str
    description: str
    transformer: dict = field(default_factory=dict)
    transformer_train: dict = field(default_factory=dict)
    sample: dict = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    text: str = "none"  # in training: none, unpaired (only its mean) or paired
    system: str = "clip-gen"  # or supervised, vqgan-clip, gan, retrieval


@dataclass(frozen=True)
class Table:
    """Recipes, on how many captions and oracle prompts of a kind each is measured, and which columns are printed."""

    name: str  # of its folder under results/
    recipes: tuple[Recipe, ...]
    n_captions: int
    n_oracle: int
    columns: list[str]


_content = yaml.safe_load((Path(__file__).parent / "tables.yaml").read_text(encoding="utf-8"))
PLAIN: dict[str, dict] = _content.pop("plain")
TABLES = {
    name: Table(name, tuple(Recipe(**row) for row in table.pop("rows")), **table) for name, table in _content.items()
}


@dataclass(frozen=True)
class Row(Workbench):
    """A run of a table: what its recipe needs of pairs and other systems, and a `Workbench` does not have."""

    recipe: Recipe
    base: Workbench  # the run whose VQGAN and store it takes
    clip = property(attrgetter("base.clip"))

    @classmethod
    def begun(cls, base: Workbench, name: str, recipe: Recipe, preset: Preset) -> "Row":
        """Begin or open the run, with VQGAN and store taken; a run of another recipe is a ClipgenError."""
        opened = Workbench.open(preset, name, base.data, base.seed, base.device)
        row = cls(opened.run, opened.preset, opened.data, recipe, base)
        row.extract()
        return row

    def classifier(self) -> Classifier | None:
        return self.base.classifier()

    def store(self, split: str = "train") -> TokenStore:
        store, words = super().store(split), self.preset.transformer.conditioning == "words"
        if self.recipe.text != "paired":
            return store
        return baselines.paired_store(store, self.images(split).captions, self.clip, words)

    def assembled(self, vqgan: VQGAN, transformer: ImageTransformer, extras: tuple) -> TextToImage | baselines.System:
        if self.recipe.system == "supervised":
            return baselines.Supervised(vqgan, self.clip, transformer, self.preset.sample)
        return super().assembled(vqgan, transformer, extras)

    def system(self) -> TextToImage | baselines.System:
        """What is evaluated; trained first, or resumed, where it is to be trained."""
        if self.recipe.system == "retrieval":
            return baselines.Retrieval(self.vqgan(), self.clip, self.store(), self.images())
        if self.recipe.system == "vqgan-clip":
            return baselines.VQGANCLIP(self.vqgan(), self.clip, self.preset.vqgan_clip)
        if self.recipe.system == "gan":
            seed = self.seed + self.preset.transformer_train.seed
            with self._timed("gan", resumable=False):
                generator = baselines.train_fusion_gan(self.images(), self.clip, self.preset.fusion_gan, seed)
            return baselines.FusionGAN(self.vqgan(), self.clip, generator)
        self.train_transformer()
        return self.generator()


def run_table(wb: Workbench, table: Table, steps: int = 0, only: Iterable[str] = ()) -> list[dict]:
    """Train and evaluate the rows that are not finished; write and return the table.

    Args:
        wb: a run with its VQGAN and store made; its preset gives all that a recipe does not name.
        steps: of each transformer; 0 takes the preset's.
        only: names of recipes; none means all.

    Raises:
        ClipgenError: no such row, or rows that are there were begun with another recipe, run or data.
    """
    names = [recipe.name for recipe in table.recipes]
    if unknown := set(only) - set(names):
        raise ClipgenError(f"table {table.name!r} has no row {sorted(unknown)[0]!r}: choose from {', '.join(names)}")
    rows, folder, store = rows_of(wb, table, steps), runs.RESULTS / table.name, wb.store().meta["hash"]
    for name in rows:
        if Run(runs.RESULTS / name).summary().get("store", {}).get("hash", store) != store:
            cure = "move that folder away, or compare with the run they are of"
            raise ClipgenError(f"{folder} holds rows of another run (another store): {cure}")
    with runs.held(folder / "table.json", f"table {table.name!r}"):
        runs.write_json(folder / "sweep.json", asdict(begun_with(wb.run.path / "config.json")))  # for `clipgen runs`
        for name, (recipe, preset) in rows.items():
            if (only and recipe.name not in only) or result_of(runs.RESULTS / name, preset):
                continue
            print(name, flush=True)
            source = preset.shared.transformer
            if source and not (runs.RESULTS / source / "transformer").is_dir():  # not made, or a clone without weights
                Row.begun(wb, source, *rows[source]).train_transformer()
            row = Row.begun(wb, name, recipe, preset)
            system = row.system()
            for kind, prompts in (("", wb.preview_prompts()), ("-outside", wb.outside_prompts())):
                _save_images(system, prompts, folder / "rows" / f"{row.run.name}{kind}.png")
            row.evaluate(generator=system)  # last: it marks a row as finished
            runs.write_json(folder / "table.json", _table(table.recipes, rows))
    return _table(table.recipes, rows)


def rows_of(wb: Workbench, table: Table, steps: int = 0) -> dict[str, tuple[Recipe, Preset]]:
    """The runs of a table, name -> recipe and preset. Rows that differ in sampling alone take the training of the first.

    The first seed of every recipe comes before the second of any: an interrupted comparison has all its rows.
    """
    order = sorted(((seed, recipe) for recipe in table.recipes for seed in recipe.seeds), key=lambda pair: pair[0])
    recipes = {row_name(recipe, seed): recipe for seed, recipe in order}
    presets = {row_name(recipe, seed): preset_of(wb, table, recipe, seed, steps) for seed, recipe in order}
    planned = shared(presets, table.name, {})
    return {f"{table.name}/{name}": (recipe, planned[name]) for name, recipe in recipes.items()}


def shared(cells: dict[str, Preset], sweep: str, begun: dict[str, Preset]) -> dict[str, Preset]:
    """The presets of cells, each taking a stage from the first cell that makes the same one.

    Cells that have been `begun`, of this grid or an earlier one, come first and stay as they are. A source that the base preset
    names for a stage stays, too.
    """
    makers, planned = {}, {}
    makes_first = sorted(begun, key=lambda name: sum(map(bool, asdict(begun[name].shared).values())))
    for name in dict.fromkeys([*makes_first, *cells]):
        preset = begun.get(name) or cells[name]
        clip, train, sources = (preset.clip.name, preset.clip.pretrained), preset.vqgan_train, asdict(preset.shared)
        outside = {stage: source for stage, source in sources.items() if source and not source.startswith(f"{sweep}/")}
        made = (preset.shapes, preset.vqgan, train, train.perceptual == "clip" and clip)
        decided_by = {"vqgan": outside.get("vqgan", made)}
        decided_by["store"] = (decided_by["vqgan"], clip, preset.transformer_train.flip)
        decided_by["transformer"] = (decided_by["store"], preset.name, preset.transformer, preset.transformer_train)
        first = {stage: makers.setdefault((stage, key), name) for stage, key in decided_by.items()}
        taken = {stage: f"{sweep}/{maker}" for stage, maker in first.items() if maker != name} | outside
        planned[name] = begun.get(name) or replace(preset, shared=replace(preset.shared, **taken))
    return {name: planned[name] for name in cells}


def preset_of(wb: Workbench, table: Table, recipe: Recipe, seed: int = 0, steps: int = 0) -> Preset:
    """The preset of a row: the run's, changed to the plain recipe, then to this one; its name tells the system."""
    parts = {part: {**plain, **getattr(recipe, part)} for part, plain in PLAIN.items()}
    parts["transformer_train"] |= {"seed": seed} | ({"steps": steps} if steps else {})
    if parts["transformer"]["conditioning"] == "words":  # as many as CLIP itself reads
        parts["transformer"]["condition_tokens"] = wb.clip.tokenizer.context_length
    most = wb.preset.evaluate
    parts["evaluate"] = {"n": min(table.n_captions, most.n), "n_oracle": min(table.n_oracle, most.n_oracle)}
    parts["evaluate"] |= {"nearest": 0, "also": (), "judges": ()}  # too slow for every row
    parts["shared"] = asdict(named_sources(SharedConfig(store=str(wb.run.path))))
    name = f"{wb.preset.name}, {recipe.system}" + ", paired" * (recipe.text == "paired")
    return replace(changed(wb.preset, parts), name=name)


def row_name(recipe: Recipe, seed: int) -> str:
    """Of the folder of a row, and of its images."""
    return "-".join([*re.findall(r"[^\W_]+", recipe.name), str(seed)])


def result_of(folder: Path, preset: Preset | None = None) -> dict | None:
    """The summary of a run that was evaluated as its preset says, with the seed of its training.

    None of any other, and where `preset` is given of a run with another one.
    """
    with suppress(ClipgenError):
        summary, begun = Run(folder).summary(), begun_with(folder / "config.json").preset
        as_begun = not runs.differences(summary.get("sample", {}), asdict(begun.sample))
        if "evaluation" in summary and as_begun and preset in (None, begun):
            return {**summary, "seed": begun.transformer_train.seed}
    return None


@torch.inference_mode()
def _save_images(system: TextToImage | baselines.System, prompts: list[str], path: Path) -> None:
    """One image for each prompt, with seeds 0, 1, ..., side by side in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(system.generate_each(prompts, list(range(len(prompts)))), columns=len(prompts))).save(path)


def metrics(result: dict) -> dict[str, float | list[float]]:
    """The columns of a result, and `<column>_interval` of those that have a 95% interval.

    `oracle_error` is one minus the mean of colour and shape accuracy of one-object texts; its interval, from the mean of
    theirs, is rather too wide.
    """
    evaluation, oracle = result["evaluation"], result.get("oracle", {})
    columns = _taken(evaluation, "", "caps", "r_precision")
    if "nll" in evaluation:
        columns |= {f"{kind}_nll": evaluation["nll"][kind] for kind in ("image", "text")}
    if fid := evaluation["fid"]:
        columns |= {"fid_0": fid["0"], "fid_1": fid["1"], "rfid": evaluation["rfid"]["0"]}
    if classes := evaluation.get("classes"):
        columns |= {**_taken(classes, "class_", "accuracy"), "class_accuracy_real": classes["real"]}
        columns |= {"class_accuracy_reconstruction": classes["reconstruction"]}
        for attribute, scores in classes.get("attributes", {}).items():
            columns |= _taken(scores, f"{attribute}_", "accuracy")
    if oracle:
        one, two, held_out = (oracle["text"][kind] for kind in ("one", "two", "held_out"))
        columns |= {"oracle_error": 1 - (one["colour"] + one["shape"]) / 2}
        if "colour_interval" in one:
            ends = zip(one["colour_interval"], one["shape_interval"], strict=True)
            columns["oracle_error_interval"] = sorted(1 - (colour + shape) / 2 for colour, shape in ends)
        columns |= _taken(one, "", "colour", "shape", "size", "count")
        columns |= _taken(held_out, "held_out_", "colour", "shape")
        columns |= _taken(two, "two_", "both") | _taken(two, "", "relation")
        for kind, scores in oracle["text"].items():
            columns |= _taken(scores, f"{kind}_", "atoms", "whole")
    if "image" in oracle:
        columns |= _taken(oracle["image"]["one"], "image_", "colour", "shape")
    seconds = {f"seconds_{key}": value for key, value in result["seconds"].items()}
    return columns | result.get("transformer", {}) | seconds


def _taken(scores: dict, prefix: str, *keys: str) -> dict:
    """Some scores and their intervals, those that there are, by other names."""
    names = [name for key in keys for name in (key, f"{key}_interval") if name in scores]
    return {prefix + name: scores[name] for name in names}


def _table(recipes: tuple[Recipe, ...], rows: dict[str, tuple[Recipe, Preset]]) -> list[dict]:
    """For each recipe with a finished run its name, seeds, and mean and std of every metric."""
    table = []
    for recipe in recipes:
        results = [result_of(runs.RESULTS / name, preset) for name, (of, preset) in rows.items() if of is recipe]
        if results := list(filter(None, results)):
            row = {"name": recipe.name, "description": recipe.description, "text": recipe.text}
            table.append(row | mean_and_std(results))
    return table


def read_table(folder: Path, recipes: tuple[Recipe, ...]) -> list[dict]:
    """The rows of these recipes in the table.json of a folder; none where there is no such file. Raises ClipgenError: a damaged one."""
    path, rows = folder / "table.json", {}
    if path.exists():
        with runs.reading(
            path, "make it by clipgen compare", "restore it, or delete it and make it by clipgen compare"
        ):
            rows = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
    return [rows[recipe.name] for recipe in recipes if recipe.name in rows]


def mean_and_std(results: list[dict]) -> dict:
    """The seeds of some results, and mean and std over them of every number that all of `metrics` have.

    Of a single result there is also the `interval`, where it was measured.
    """
    columns = [metrics(result) for result in results]
    numbers = [key for key, value in columns[0].items() if isinstance(value, (int, float))]
    common = {key: [c[key] for c in columns] for key in numbers if all(key in c for c in columns)}
    row: dict = {"seeds": [result["seed"] for result in results]}
    row |= {k: {"mean": float(np.mean(v)), "std": float(np.std(v))} for k, v in common.items()}
    for key in common if len(results) == 1 else ():
        if interval := columns[0].get(f"{key}_interval"):
            row[key]["interval"] = interval
    return row


def differs(row: dict, other: dict, key: str) -> bool:
    """Whether a metric of two rows differs beyond chance, at a level of 5%.

    Of three or more seeds each by Welch's t-test, of one each where the intervals do not overlap (which is stricter);
    False of other numbers of seeds, and where a row has no such metric or interval.
    """
    a, b, n, m = row.get(key), other.get(key), len(row["seeds"]), len(other["seeds"])
    if a and b and min(n, m) >= 3:
        # the table's std has no n - 1 (ddof 0), the test's has
        stds = (some["std"] * math.sqrt(count / (count - 1)) for some, count in ((a, n), (b, m)))
        first, second = zip((a["mean"], b["mean"]), stds, (n, m), strict=True)
        return bool(ttest_ind_from_stats(*first, *second, equal_var=False).pvalue < 0.05)
    if a and b and n == m == 1 and "interval" in a and "interval" in b:
        return a["interval"][1] < b["interval"][0] or b["interval"][1] < a["interval"][0]
    return False


def image_files(folder: Path, recipes: tuple[Recipe, ...], kind: str = "") -> dict[str, Path]:
    """The images of each recipe's first seed, name -> file; `kind` "-outside" gives the prompts outside of the data."""
    files = {r.name: folder / "rows" / f"{row_name(r, r.seeds[0])}{kind}.png" for r in recipes}
    return {name: path for name, path in files.items() if path.exists()}


def table_text(table: list[dict], columns: tuple[str, ...]) -> str:
    """The table as lines of text: mean and std of several seeds, value and interval of one; `*` where one `differs` from the first row."""

    def cell(row: dict, key: str) -> str:
        if key not in row:
            return "-"
        form, spread = ".0f" if key.startswith("fid") else ".3f", ""
        if len(row["seeds"]) > 1:
            spread = f" ± {row[key]['std']:{form}}"
        elif interval := row[key].get("interval"):
            spread = f" ({interval[0]:{form}} to {interval[1]:{form}})"
        return f"{'*' * differs(row, table[0], key)}{row[key]['mean']:{form}}{spread}"

    lines = [("", *columns), *((row["name"], *(cell(row, key) for key in columns)) for row in table)]
    first, *widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    text = "\n".join(name.ljust(first) + "".join(map(str.rjust, cells, widths)) for name, *cells in lines)
    if any(cell.startswith("*") for _, *cells in lines for cell in cells):
        text += f"\n* differs from {table[0]['name']} beyond chance, each number by itself: of three or more seeds by Welch's "
        text += "t-test, p < 0.05; of one where the 95% intervals do not overlap"
    return text
