"""The comparison: one change at a time on the paper's plain recipe, and other systems under the same evaluation.

In: a finished run, whose VQGAN and store all recipes share. Out: a folder of results/ for each of TABLES, with a JSON file
and an image for each recipe and seed, and table.json with mean and spread over seeds. A result that is there is kept.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from .. import evaluate, train_transformer
from ..config import SampleConfig, TransformerConfig, TransformerTrainConfig, from_dict, replaced
from ..data.images import grid
from ..runtime.checkpoints import module_hash
from ..runtime.runs import RESULTS, ClipgenError, Run, open_run, read_json, write_json
from ..text_to_image import TextToImage
from ..transformer import ImageTransformer
from ..workbench import Workbench
from . import baselines


@dataclass(frozen=True)
class Recipe:
    """A row of a table: what it changes of the plain recipe; tables.yaml says what each field means."""

    name: str
    description: str
    transformer: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    sample: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
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
    has_outside: bool = True  # also keeps images for prompts outside of the training data


def _recipes(rows: list[dict], scales: list[float]) -> tuple[Recipe, ...]:
    """The rows of a table: each on top of the one that it is `based_on`, and with `scales` once at each guidance scale."""
    made: dict[str, Recipe] = {}
    for row in rows:
        row = {"seeds": [0], **row}
        base = made.get(row.pop("based_on", ""))
        changes = {part: {**(getattr(base, part) if base else {}), **row.pop(part, {})} for part in PLAIN}
        made[row["name"]] = Recipe(**{**row, "seeds": tuple(row["seeds"])}, **changes)
    curves = (
        replace(recipe, name=f"{recipe.name}, guidance {scale:g}", sample={**recipe.sample, "guidance": scale})
        for recipe, scale in itertools.product(made.values(), scales)
    )
    return tuple(curves) or tuple(made.values())


_content = yaml.safe_load((Path(__file__).parent / "tables.yaml").read_text(encoding="utf-8"))
PLAIN: dict[str, dict] = _content.pop("plain")
TABLES = {
    name: Table(name, _recipes(table.pop("rows"), table.pop("scales", [])), **table) for name, table in _content.items()
}


def run_table(
    wb: Workbench, table: Table, results: Path = RESULTS, steps: int = 0, only: Iterable[str] = ()
) -> list[dict]:
    """Train and evaluate the recipes that have no result yet; write and return the table.

    Args:
        wb: a run with its VQGAN and store made; its preset gives all that a recipe does not name.
        steps: of each transformer; 0 takes the preset's.
        only: names of recipes; none means all.
    """
    names = [recipe.name for recipe in table.recipes]
    if unknown := set(only) - set(names):
        raise ClipgenError(f"table {table.name!r} has no row {sorted(unknown)[0]!r}: choose from {', '.join(names)}")
    wanted = [(seed, recipe) for recipe in table.recipes for seed in recipe.seeds if not only or recipe.name in only]
    # the first seed of every recipe comes before the second of any: an interrupted comparison has all its rows
    for seed, recipe in sorted(wanted, key=lambda pair: pair[0]):
        run_recipe(wb, table, recipe, seed, configs_of(wb, recipe, seed, steps), results)
        write_json(results / table.name / "table.json", read_table(results / table.name, table.recipes))
    return read_table(results / table.name, table.recipes)


def configs_of(wb: Workbench, recipe: Recipe, seed: int = 0, steps: int = 0) -> dict:
    """The configs of a recipe: the preset's, changed to the plain recipe, changed to this one, as far as they matter."""
    preset, others = wb.preset, {"retrieval": None, "vqgan-clip": wb.preset.vqgan_clip, "gan": wb.preset.fusion_gan}
    if recipe.system in others:
        return {"system": recipe.system, "config": others[recipe.system], "text": recipe.text, "seed": seed}
    parts = {"transformer": preset.transformer, "train": preset.transformer_train, "sample": preset.sample}
    configs = {part: replaced(config, _changes(recipe, part)) for part, config in parts.items()}
    if configs["transformer"].conditioning == "words":  # as many as CLIP itself reads
        configs["transformer"] = replace(configs["transformer"], condition_tokens=wb.clip.tokenizer.context_length)
    if steps:
        configs["train"] = replace(configs["train"], steps=steps)
    # a shift uses its text in sampling only: its training is that of a recipe without it
    trains_on_text = recipe.text == "paired" or configs["train"].centre
    return {**configs, "text": recipe.text if trains_on_text else "none", "seed": seed}


def _changes(recipe: Recipe, part: str) -> dict:
    """What a recipe decides of a part of the preset; the number of words is CLIP's own."""
    changes = {**PLAIN[part], **getattr(recipe, part)}
    return {k: v for k, v in changes.items() if k != "condition_tokens" or changes["conditioning"] != "words"}


def run_recipe(wb: Workbench, table: Table, recipe: Recipe, seed: int, configs: dict, results: Path) -> None:
    """Write the result of one recipe and seed; a file that is there and of the same configs is kept."""
    meta, classifier, config = wb.store().meta, wb.classifier(), wb.preset.evaluate
    inputs = {key: meta[f"{key}_hash"] for key in ("vqgan", "clip", "data")}
    judges = {"judge": wb.evaluation_clip.weights_hash, "classifier": module_hash(classifier) if classifier else None}
    n_oracle = min(table.n_oracle, config.n_oracle) if wb.has_oracle else 0
    config = replace(config, n=min(table.n_captions, config.n), n_oracle=n_oracle)
    kept = _plain_json({**configs, **inputs, "evaluate": config, **judges})
    path = _row_file(results / table.name, recipe, seed)
    if path.exists():
        before = read_json(path)
        if other := [key for key in inputs if before["recipe"][key] != inputs[key]]:
            cure = "move that folder away, or compare with the run they are of"
            raise ClipgenError(f"{path.parent.parent} holds rows of another run (another {other[0]}): {cure}")
        then = before["recipe"] | _plain_json(_configs(before["recipe"]))
        if then == {key: value for key, value in kept.items() if key in then}:
            return
    print(f"{recipe.name}, seed {seed}", flush=True)
    system, scores, seconds = _system(wb, recipe, configs, inputs, results / "ablation" / "trainings")
    start, folder = time.perf_counter(), results / table.name / "generated" / path.stem
    evaluators = evaluate.Evaluators(wb.evaluation_clip, classifier)
    scored = (system, wb.images("val"), evaluators, config, folder / "captions", wb.seed)
    result = {"name": recipe.name, "description": recipe.description, "seed": seed, "text": recipe.text, "recipe": kept}
    result |= {"evaluation": evaluate.evaluate_generator(*scored)[0], "oracle": {}, "transformer": scores}
    if n_oracle:
        modalities = ("text", "image") if recipe.system == "clip-gen" else ("text",)
        result["oracle"] = evaluate.evaluate_oracle(system, folder / "oracle", n_oracle, wb.seed, modalities)
    evaluated, prompts = time.perf_counter(), wb.preview_prompts()
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_images(system, prompts, path.with_suffix(".png"))
    seconds |= {"evaluate": evaluated - start, "per_image": (time.perf_counter() - evaluated) / len(prompts)}
    if table.has_outside:
        _save_images(system, wb.outside_prompts(), path.with_name(f"{path.stem}-outside.png"))
    write_json(path, result | {"seconds": seconds})


def _save_images(system, prompts: list[str], path: Path) -> None:
    """One image for each prompt, with seeds 0, 1, ..., side by side in a file."""
    Image.fromarray(grid(system.generate_each(prompts, list(range(len(prompts)))), columns=len(prompts))).save(path)


def _system(wb: Workbench, recipe: Recipe, configs: dict, inputs: dict, trainings: Path) -> tuple[object, dict, dict]:
    """The system of a recipe, the scores of its transformer on validation images, and the seconds of its training."""
    vqgan, clip = wb.vqgan(), wb.clip
    if recipe.system == "retrieval":
        return baselines.Retrieval(vqgan, clip, wb.store(), wb.images()), {}, {}
    if recipe.system == "vqgan-clip":
        return baselines.VQGANCLIP(vqgan, clip, configs["config"]), {}, {}
    if recipe.system == "gan":
        start = time.perf_counter()
        generator = baselines.train_fusion_gan(wb.images(), clip, configs["config"], configs["seed"])
        return baselines.FusionGAN(vqgan, clip, generator), {}, {"train": time.perf_counter() - start}
    # recipes that differ in sampling alone share a training, named by all that decides it
    needed = _plain_json({**{key: value for key, value in configs.items() if key != "sample"}, **inputs})
    name = hashlib.sha256(json.dumps(needed, sort_keys=True).encode()).hexdigest()[:8]
    run, sample = replace(open_run(name, trainings), seed=configs["seed"], device=wb.device), configs["sample"]
    if not (run.file("recipe.json").exists() and (run.path / "transformer").is_dir()):  # a clone has no weights
        _train(wb, run, configs)
        write_json(run.file("recipe.json"), needed)
    transformer, summary = ImageTransformer.load(run.path / "transformer", wb.device), run.summary()
    if recipe.system == "supervised":
        return baselines.Supervised(vqgan, clip, transformer, sample), summary["transformer"], summary["seconds"]
    parts = (vqgan, transformer, clip, wb.clip_source, sample, wb.bank_and_offset(sample))
    return TextToImage.from_parts(*parts), summary["transformer"], summary["seconds"]


def _train(wb: Workbench, run: Run, configs: dict) -> None:
    """Train the transformer of a recipe, and put its seconds and validation losses into the run's summary."""
    preset = replace(wb.preset, transformer=configs["transformer"], transformer_train=configs["train"])
    frozen = train_transformer.Frozen(wb.vqgan(), wb.clip, wb.text_mean() if configs["train"].centre else None)
    splits, words = ("train", "val"), preset.transformer.conditioning == "words"
    stores = tuple(map(wb.store, splits))
    if configs["text"] == "paired":
        pairs = zip(stores, splits, strict=True)
        stores = tuple(baselines.paired_store(s, wb.images(split).captions, wb.clip, words) for s, split in pairs)
    start = time.perf_counter()
    transformer = train_transformer.train_transformer(run, stores, preset, frozen)
    facts = train_transformer.validation_losses(transformer.to(run.device), stores[1], frozen)
    run.add_to_summary(seconds={"train": time.perf_counter() - start}, transformer=facts)


def metrics(result: dict) -> dict[str, float]:
    """The columns of a result; `oracle_error` is one minus the mean of colour and shape accuracy of one-object texts."""
    evaluation, oracle = result["evaluation"], result.get("oracle", {})
    columns = {key: evaluation[key] for key in ("caps", "r_precision") if key in evaluation}
    if fid := evaluation["fid"]:
        columns |= {"fid_0": fid["0"], "fid_1": fid["1"], "rfid": evaluation["rfid"]["0"]}
    if classes := evaluation.get("classes"):
        columns |= {"class_accuracy": classes["accuracy"], "class_accuracy_real": classes["real"]}
        columns |= {"class_accuracy_reconstruction": classes["reconstruction"]}
    if oracle:
        one, two, held_out = (oracle["text"][kind] for kind in ("one", "two", "held_out"))
        columns |= {"oracle_error": 1 - (one["colour"] + one["shape"]) / 2}
        columns |= {key: one[key] for key in ("colour", "shape", "size", "count")}
        columns |= {f"held_out_{key}": held_out[key] for key in ("colour", "shape")}
        columns |= {"two_both": two["both"], "relation": two["relation"]}
    if "image" in oracle:
        columns |= {f"image_{key}": oracle["image"]["one"][key] for key in ("colour", "shape")}
    return columns | result["transformer"] | {f"seconds_{key}": value for key, value in result["seconds"].items()}


def read_table(folder: Path, recipes: tuple[Recipe, ...]) -> list[dict]:
    """The table in a folder: for each recipe that has a result its name, seeds, and mean and std of every metric.

    A result of other configs than the recipe has now is left out.
    """
    table = []
    for recipe in recipes:
        paths = [_row_file(folder, recipe, seed) for seed in recipe.seeds]
        results = [result for path in paths if path.exists() and _is_of(recipe, (result := read_json(path))["recipe"])]
        if not results:
            continue
        row = {"name": recipe.name, "description": recipe.description, "text": recipe.text}
        table.append(row | mean_and_std(results))
    return table


def mean_and_std(results: list[dict]) -> dict:
    """The seeds of some results, and mean and std over them of every number that all of `metrics` have."""
    columns = [{k: v for k, v in metrics(result).items() if isinstance(v, (int, float))} for result in results]
    common = {key: [c[key] for c in columns] for key in columns[0] if all(key in c for c in columns)}
    row = {"seeds": [result["seed"] for result in results]}
    return row | {k: {"mean": float(np.mean(v)), "std": float(np.std(v))} for k, v in common.items()}


def image_files(folder: Path, recipes: tuple[Recipe, ...], kind: str = "") -> dict[str, Path]:
    """The images of each recipe's first seed, name -> file; `kind` "-outside" gives the prompts outside of the data."""
    files = {recipe.name: _row_file(folder, recipe, recipe.seeds[0], f"{kind}.png") for recipe in recipes}
    return {name: path for name, path in files.items() if path.exists()}


def table_text(table: list[dict], columns: tuple[str, ...]) -> str:
    """The table as lines of text; a spread is shown where there is more than one seed."""

    def cell(row: dict, key: str) -> str:
        if key not in row:
            return "-"
        form = ".0f" if key.startswith("fid") else ".3f"
        spread = f" ± {row[key]['std']:{form}}" if len(row["seeds"]) > 1 else ""
        return f"{row[key]['mean']:{form}}{spread}"

    lines = [("", *columns), *((row["name"], *(cell(row, key) for key in columns)) for row in table)]
    first, *widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join(name.ljust(first) + "".join(map(str.rjust, cells, widths)) for name, *cells in lines)


def _row_file(folder: Path, recipe: Recipe, seed: int, ending: str = ".json") -> Path:
    words = "".join(c if c.isalnum() else " " for c in recipe.name).split()
    return folder / "rows" / f"{'-'.join([*words, str(seed)])}{ending}"


def _is_of(recipe: Recipe, row: dict) -> bool:
    """Whether the configs in a row are the plain ones with the recipe's changes, whatever the preset decides."""
    are_of = (config == replaced(config, _changes(recipe, part)) for part, config in _configs(row).items())
    return row.get("system", recipe.system) == recipe.system and all(are_of)


def _configs(row: dict) -> dict:
    """The configs in a row that may be older than some of their fields: these did what the default does."""
    kinds = {"transformer": TransformerConfig, "train": TransformerTrainConfig, "sample": SampleConfig}
    return {part: from_dict(kind, row[part], whole=False) for part, kind in kinds.items() if part in row}


def _plain_json(values: dict) -> dict:
    """Configs as dicts and tuples as lists, as they come back from a file."""
    return json.loads(json.dumps(values, default=asdict))
