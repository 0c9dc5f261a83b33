"""The comparison: one change at a time on the paper's plain recipe, and other systems under the same evaluation.

In: a finished run, whose VQGAN and store all recipes share. Out: a folder of results/ for each of TABLES, with a JSON file
and an image for each recipe and seed, and table.json with mean and spread over seeds. A result that is there is kept.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .. import evaluate, train_transformer
from ..config import SampleConfig, TransformerConfig, TransformerTrainConfig, from_dict
from ..data.images import grid
from ..runtime.checkpoints import module_hash
from ..runtime.runs import RESULTS, ClipgenError, Run, open_run, read_json, write_json
from ..text_to_image import TextToImage
from ..transformer import ImageTransformer
from ..workbench import Workbench
from . import baselines


@dataclass(frozen=True)
class Recipe:
    """A row of a table: what it changes of the plain recipe."""

    name: str
    description: str
    transformer: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    sample: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    text: str = "none"  # in training: none, unpaired (only its mean) or paired
    system: str = "clip-gen"  # or supervised, vqgan-clip, gan, retrieval


# The method as the paper has it: one prefix token, clean embeddings, no guidance, both losses.
PLAIN = {
    "transformer": {"conditioning": "prefix", "condition_tokens": 1},
    "train": {
        "noise_cos": 1.0,
        "condition_dropout": 0.0,
        "centre": False,
        "embedding_weight": 0.1,
        "embedding_path": "straight-through",
        "embedding_form": "cosine",
    },
    "sample": {"guidance": 1.0, "guidance_schedule": "constant", "neighbours": 0, "shift": False, "candidates": 1},
}
DROPOUT = {"condition_dropout": 0.1}
NLL_ONLY = {**DROPOUT, "embedding_weight": 0.0}
NOISED = {**NLL_ONLY, "noise_cos": 0.85}  # as far as a text lies from its image
LINEAR = {"guidance": 2.0, "guidance_schedule": "linear"}
COSINE = {"guidance": 2.0, "guidance_schedule": "cosine"}
INTERVAL = {"guidance": 1.5, "guidance_interval": (0.0, 0.5)}
SHIFT = {**LINEAR, "shift": True}
RERANK = {**LINEAR, "candidates": 8}
TEXT = {"train": NLL_ONLY, "text": "paired"}  # needs no noise
FOUR = {"condition_tokens": 4}
THREE = {"transformer": FOUR, "train": {"noise_cos": 0.7, **DROPOUT}}
CENTRED = {"centre": True, "noise_cos": 0.7}
SEEDS = (0, 1, 2)
ABLATION = (
    Recipe("plain", "the paper's recipe", seeds=SEEDS),
    Recipe("noise", "embeddings noised down to cosine 0.7", train={"noise_cos": 0.7}),
    Recipe("guidance, scale 1", "condition dropout 10%, no guidance", train=DROPOUT),
    Recipe("guidance", "condition dropout 10%, guidance scale 1.5", train=DROPOUT, sample={"guidance": 1.5}),
    Recipe("guidance, scale 2", "the same, scale 2", train=DROPOUT, sample={"guidance": 2.0}),
    Recipe("guidance, scale 3", "the same, scale 3", train=DROPOUT, sample={"guidance": 3.0}),
    Recipe("guidance linear", "the same, scale rising linearly to 2", train=DROPOUT, sample=LINEAR),
    Recipe("guidance cosine", "the same, scale rising as a cosine to 2", train=DROPOUT, sample=COSINE),
    Recipe("guidance interval", "scale 1.5 on the first half of the tokens", train=DROPOUT, sample=INTERVAL),
    Recipe("4 tokens", "4 condition tokens", FOUR),
    Recipe("16 tokens", "16 condition tokens", {"condition_tokens": 16}),
    Recipe("adaln", "adaptive layer norm in every block in place of a prefix", {"conditioning": "adaln"}),
    Recipe("neighbours 1", "text replaced by its nearest training image's embedding", sample={"neighbours": 1}),
    Recipe("neighbours 10", "text replaced by the mean of its 10 nearest", sample={"neighbours": 10}),
    Recipe("neighbours 100", "text replaced by the mean of its 100 nearest", sample={"neighbours": 100}),
    Recipe("shift", "text moved by mean image minus mean text", sample={"shift": True}, text="unpaired"),
    Recipe("centre and noise", "both modalities centred, then noise down to 0.7", train=CENTRED, text="unpaired"),
    Recipe("rerank 8", "the best of 8 by the conditioning CLIP, which evaluates too", sample={"candidates": 8}),
    Recipe("no embedding loss", "NLL alone", train={"embedding_weight": 0.0}),
    Recipe("embedding loss x10", "weight 1.0", train={"embedding_weight": 1.0}),
    Recipe("embedding loss / 10", "weight 0.01", train={"embedding_weight": 0.01}),
    Recipe("embedding loss, gumbel", "sampled tokens", train={"embedding_path": "gumbel"}),
    Recipe("embedding loss, log", "log form", train={"embedding_form": "log"}),
    Recipe("embedding loss, half the batch", "on half of each batch", train={"embedding_share": 0.5}),
    Recipe("noise, 4 tokens, guidance", "three together", **THREE, sample={"guidance": 1.5}),
    Recipe("the same, neighbours 10", "and the 10 nearest", **THREE, sample={"guidance": 1.5, "neighbours": 10}),
    Recipe("the same, rerank 8", "and rerank of 8", **THREE, sample={"guidance": 1.5, "candidates": 8}),
    Recipe("NLL only, guidance linear", "no embedding loss, guidance to 2", {}, NLL_ONLY, LINEAR, SEEDS),
    Recipe("NLL only, neighbours 30", "and the 30 nearest", train=NLL_ONLY, sample={**LINEAR, "neighbours": 30}),
    Recipe("NLL only, shift", "with texts moved by the means", train=NLL_ONLY, sample=SHIFT, text="unpaired"),
    Recipe("NLL only, rerank 8", "and rerank of 8", {}, NLL_ONLY, RERANK, SEEDS),
    Recipe("best, no rerank", "the same and noise down to 0.85", {}, NOISED, LINEAR, SEEDS),
    Recipe("best, shift, no rerank", "with texts moved by the means", train=NOISED, sample=SHIFT, text="unpaired"),
    Recipe("best", "the best recipe and rerank of 8", {}, NOISED, RERANK, SEEDS),
    Recipe("text-conditioned", "upper bound: trained on the embeddings of paired captions", text="paired"),
    Recipe("text-conditioned, guided", "and 4 tokens, guidance 1.5", FOUR, DROPOUT, {"guidance": 1.5}, text="paired"),
    Recipe("text-conditioned, best, no rerank", "the best recipe on captions", **TEXT, sample=LINEAR, seeds=SEEDS),
    Recipe("text-conditioned, best", "the same and rerank of 8", **TEXT, sample=RERANK),
)
WORDS = {"conditioning": "words"}
SYSTEMS = (
    Recipe("CLIP-GEN", "the best recipe of the ablation", train=NOISED, sample=RERANK),
    Recipe("CLIP-GEN, no rerank", "the same without rerank", train=NOISED, sample=LINEAR),
    Recipe("CLIP-GEN, plain", "the paper's recipe"),
    Recipe("retrieval", "the training image nearest to the text", system="retrieval"),
    Recipe("VQGAN-CLIP", "latents optimised for CLIP similarity", system="vqgan-clip"),
    Recipe("text-conditioned", "CLIP-GEN on the embeddings of paired captions, no rerank", **TEXT, sample=LINEAR),
    Recipe("supervised", "words before image tokens (CogView)", WORDS, **TEXT, sample=LINEAR, system="supervised"),
    Recipe("GAN", "one-stage conditional GAN on pairs (DF-GAN)", text="paired", system="gan"),
)
# FID against CapS, a curve for each system with guidance; the scale rises linearly to the one named.
CURVES = tuple(
    replace(system, name=f"{system.name}, guidance {scale:g}", sample={**LINEAR, "guidance": scale})
    for system in SYSTEMS
    if system.name in ("CLIP-GEN, no rerank", "text-conditioned", "supervised")
    for scale in (1.0, 1.5, 2.0, 3.0, 5.0)
)
# Photos, whose texts lie further from their images: results/tiny-imagenet-20-clip/summary.json has the cosine.
PHOTO_TRAIN = {**NLL_ONLY, "noise_cos": 0.65}
PHOTOS = (
    Recipe("plain", "the paper's recipe"),
    Recipe("best, no rerank", "the best recipe, noise as far as a text lies here", train=PHOTO_TRAIN, sample=LINEAR),
    Recipe("best, shift, no rerank", "texts moved by the means", train=PHOTO_TRAIN, sample=SHIFT, text="unpaired"),
    Recipe("best", "the best recipe and rerank of 8", train=PHOTO_TRAIN, sample=RERANK),
    Recipe("text-conditioned, no rerank", "the best recipe on paired captions", **TEXT, sample=LINEAR),
    Recipe("retrieval", "the training image nearest to the text", system="retrieval"),
)


@dataclass(frozen=True)
class Table:
    """Recipes, on how many captions and oracle prompts of a kind each is measured, and which columns are printed."""

    name: str  # of its folder under results/
    recipes: tuple[Recipe, ...]
    n_captions: int
    n_oracle: int
    columns: tuple[str, ...]
    has_outside: bool = True  # also keeps images for prompts outside of the training data


ORACLE_COLUMNS = ("oracle_error", "colour", "shape", "held_out_shape", "two_both", "caps", "fid_0")
PHOTO_COLUMNS = ("class_accuracy", "caps", "r_precision", "fid_0", "fid_1", "nll")
TABLES = {
    "ablation": Table("ablation", ABLATION, 500, 256, ORACLE_COLUMNS, has_outside=False),
    "systems": Table("systems", SYSTEMS, 256, 128, (*ORACLE_COLUMNS, "seconds_per_image")),
    "curves": Table("curves", CURVES, 256, 0, ("caps", "fid_0", "fid_1"), has_outside=False),
    "photos": Table("photos", PHOTOS, 1_000, 0, PHOTO_COLUMNS),
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
    configs = {part: replace(config, **_changes(recipe, part)) for part, config in parts.items()}
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


def run_recipe(wb: Workbench, table: Table, recipe: Recipe, seed: int, configs: dict, results: Path) -> dict:
    """The result of one recipe and seed, from its file where that is there and of the same configs."""
    meta, classifier, config = wb.store().meta, wb.classifier(), wb.preset.evaluate
    inputs = {key: meta[f"{key}_hash"] for key in ("vqgan", "clip", "data")}
    judges = {"judge": wb.evaluation_clip.weights_hash, "classifier": module_hash(classifier) if classifier else None}
    n_oracle = min(table.n_oracle, config.n_oracle) if wb.has_oracle else 0
    config = replace(config, n=min(table.n_captions, config.n), n_oracle=n_oracle)
    kept = _plain_json({**configs, **inputs, "evaluate": config, **judges})
    path = results / table.name / "rows" / f"{_slug(recipe.name)}-{seed}.json"
    if path.exists():
        before = read_json(path)
        if other := [key for key in inputs if before["recipe"][key] != inputs[key]]:
            cure = "move that folder away, or compare with the run they are of"
            raise ClipgenError(f"{path.parent.parent} holds rows of another run (another {other[0]}): {cure}")
        then = before["recipe"] | _plain_json(_configs(before["recipe"]))
        if then == {key: value for key, value in kept.items() if key in then}:
            return before
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
    return result | {"seconds": seconds}


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
    stores = {split: wb.store(split) for split in ("train", "val")}
    if configs["text"] == "paired":
        words = preset.transformer.conditioning == "words"
        captions = {split: wb.images(split).captions for split in stores}
        stores = {k: baselines.paired_store(v, captions[k], wb.clip, words) for k, v in stores.items()}
    start = time.perf_counter()
    transformer = train_transformer.train_transformer(run, stores["train"], stores["val"], preset, frozen)
    facts = train_transformer.validation_losses(transformer.to(run.device), stores["val"], frozen)
    run.add_to_summary(seconds={"train": time.perf_counter() - start}, transformer=facts)


def metrics(result: dict) -> dict[str, float]:
    """The columns of a result; `oracle_error` is one minus the mean of colour and shape accuracy of one-object texts."""
    evaluation, oracle = result["evaluation"], result["oracle"]
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
        paths = [folder / "rows" / f"{_slug(recipe.name)}-{seed}.json" for seed in recipe.seeds]
        results = [result for path in paths if path.exists() and _is_of(recipe, (result := read_json(path))["recipe"])]
        if not results:
            continue
        columns = [metrics(result) for result in results]
        shared = {key: [c[key] for c in columns] for key in columns[0] if all(key in c for c in columns)}
        row = {"name": recipe.name, "description": recipe.description, "text": recipe.text}
        row["seeds"] = [result["seed"] for result in results]
        table.append(row | {k: {"mean": float(np.mean(v)), "std": float(np.std(v))} for k, v in shared.items()})
    return table


def guidance_curves(table: list[dict], systems: list[dict]) -> dict[str, dict[str, dict]]:
    """The tables `curves` and `systems` as `plots.tradeoff` draws them: a line for a system with guidance, else a point."""
    curves: dict[str, dict[str, dict]] = {}
    for row in table:
        name, _, scale = row["name"].rpartition(", guidance ")
        curves.setdefault(name, {})[scale] = row
    return curves | {row["name"]: {"": row} for row in systems if row["name"] not in curves}


def image_files(folder: Path, recipes: tuple[Recipe, ...], kind: str = "") -> dict[str, Path]:
    """The images of each recipe's first seed, name -> file; `kind` "-outside" gives the prompts outside of the data."""
    paths = {recipe.name: folder / "rows" / f"{_slug(recipe.name)}-{recipe.seeds[0]}{kind}.png" for recipe in recipes}
    return {name: path for name, path in paths.items() if path.exists()}


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


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def _is_of(recipe: Recipe, row: dict) -> bool:
    """Whether the configs in a row are the plain ones with the recipe's changes, whatever the preset decides."""
    configs = _configs(row)
    return row.get("system", recipe.system) == recipe.system and all(
        config == replace(config, **_changes(recipe, part)) for part, config in configs.items()
    )


def _configs(row: dict) -> dict:
    """The configs in a row that may be older than some of their fields: these did what the default does."""
    kinds = {"transformer": TransformerConfig, "train": TransformerTrainConfig, "sample": SampleConfig}
    return {part: from_dict(kind, row[part], whole=False) for part, kind in kinds.items() if part in row}


def _plain_json(values: dict) -> dict:
    """Configs as dicts and tuples as lists, as they come back from a file."""
    return json.loads(json.dumps(values, default=asdict))
