"""The comparison: one lever at a time on the paper's plain recipe, and the other systems in the same harness.

In: a finished run, whose stage 1 and store all rows share. Out: a folder of results/ for each of TABLES: a file and a
image for each row and seed, and table.json with mean and spread over seeds. A row that is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .. import evaluate, train_transformer
from ..config import SampleConfig, replace_fields
from ..data.images import grid
from ..runtime.checkpoints import module_hash, save_weights
from ..runtime.runs import RESULTS, ClipgenError, open_run, read_json, write_json
from ..store import TokenStore
from ..text_to_image import TextToImage
from ..transformer import ImageTransformer
from ..workbench import Workbench
from . import baselines


@dataclass(frozen=True)
class Row:
    """A recipe, as what it changes of the plain one."""

    name: str
    says: str
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


GUIDED = {"condition_dropout": 0.1}
LINEAR = {"guidance": 2.0, "guidance_schedule": "linear"}
ALONE = {**GUIDED, "embedding_weight": 0.0}
BEST = {"train": {**ALONE, "noise_cos": 0.85}, "sample": {**LINEAR, "candidates": 8}}
ONE_DRAWN = {**BEST, "sample": LINEAR}
TWIN = {"train": ALONE, "text": "paired"}  # what noise is for, it has
THREE = {"transformer": {"condition_tokens": 4}, "train": {"noise_cos": 0.7, **GUIDED}}
ROWS = (
    Row("plain", "the paper's recipe", seeds=(0, 1, 2)),
    Row("noise", "embeddings noised down to cosine 0.7", train={"noise_cos": 0.7}),
    Row("guidance, scale 1", "condition dropout 10%, no guidance", train=GUIDED),
    Row("guidance", "condition dropout 10%, guidance scale 1.5", train=GUIDED, sample={"guidance": 1.5}),
    Row("guidance, scale 2", "the same, scale 2", train=GUIDED, sample={"guidance": 2.0}),
    Row("guidance, scale 3", "the same, scale 3", train=GUIDED, sample={"guidance": 3.0}),
    Row("guidance linear", "the same, scale rising linearly to 2", train=GUIDED, sample=LINEAR),
    Row(
        "guidance cosine",
        "the same, scale rising as a cosine to 2",
        train=GUIDED,
        sample={"guidance": 2.0, "guidance_schedule": "cosine"},
    ),
    Row(
        "guidance interval",
        "the same, scale 1.5 on the first half of the tokens",
        train=GUIDED,
        sample={"guidance": 1.5, "guidance_interval": (0.0, 0.5)},
    ),
    Row("4 tokens", "4 condition tokens", transformer={"condition_tokens": 4}),
    Row("16 tokens", "16 condition tokens", transformer={"condition_tokens": 16}),
    Row("adaln", "adaptive layer norm in every block in place of a prefix", transformer={"conditioning": "adaln"}),
    Row("neighbours 1", "text replaced by its nearest training image's embedding", sample={"neighbours": 1}),
    Row("neighbours 10", "text replaced by the mean of its 10 nearest", sample={"neighbours": 10}),
    Row("neighbours 100", "text replaced by the mean of its 100 nearest", sample={"neighbours": 100}),
    Row("shift", "text moved by mean image minus mean text", sample={"shift": True}, text="unpaired"),
    Row(
        "centre and noise",
        "both modalities centred, then noise down to 0.7",
        train={"centre": True, "noise_cos": 0.7},
        text="unpaired",
    ),
    Row("rerank 8", "the best of 8 by the conditioning CLIP, which is the judge too", sample={"candidates": 8}),
    Row("no embedding loss", "token likelihood alone", train={"embedding_weight": 0.0}),
    Row("embedding loss x10", "weight 1.0", train={"embedding_weight": 1.0}),
    Row("embedding loss / 10", "weight 0.01", train={"embedding_weight": 0.01}),
    Row("embedding loss, gumbel", "sampled tokens", train={"embedding_path": "gumbel"}),
    Row("embedding loss, log", "log form", train={"embedding_form": "log"}),
    Row("embedding loss, half the batch", "on half of each batch", train={"embedding_share": 0.5}),
    Row("noise, 4 tokens, guidance", "three together", **THREE, sample={"guidance": 1.5}),
    Row(
        "the same, neighbours 10", "on the mean of the 10 nearest", **THREE, sample={"guidance": 1.5, "neighbours": 10}
    ),
    Row("the same, rerank 8", "and rerank of 8", **THREE, sample={"guidance": 1.5, "candidates": 8}),
    Row(
        "likelihood, guidance linear",
        "no embedding loss, dropout, guidance rising to 2",
        train=ALONE,
        sample=LINEAR,
        seeds=(0, 1, 2),
    ),
    Row(
        "likelihood, neighbours 30",
        "the same on the mean of the 30 nearest",
        train=ALONE,
        sample={**LINEAR, "neighbours": 30},
    ),
    Row(
        "likelihood, shift",
        "the same with texts moved by mean image minus mean text",
        train=ALONE,
        sample={**LINEAR, "shift": True},
        text="unpaired",
    ),
    Row("likelihood, rerank 8", "the same and rerank of 8", train=ALONE, sample=BEST["sample"], seeds=(0, 1, 2)),
    Row(
        "best, one drawn",
        "the same and noise down to 0.85, as far as a text lies from its image",
        **ONE_DRAWN,
        seeds=(0, 1, 2),
    ),
    Row(
        "best, shift, one drawn",
        "with texts moved by mean image minus mean text",
        train=BEST["train"],
        sample={**LINEAR, "shift": True},
        text="unpaired",
    ),
    Row("best", "the best recipe and rerank of 8", **BEST, seeds=(0, 1, 2)),
    Row("text twin", "trained on the embeddings of paired captions: what the gap costs", text="paired"),
    Row(
        "text twin, guided",
        "the same with 4 condition tokens, dropout and guidance 1.5",
        transformer={"condition_tokens": 4},
        train=GUIDED,
        sample={"guidance": 1.5},
        text="paired",
    ),
    Row(
        "text twin, best, one drawn",
        "the best recipe on paired captions, one drawn",
        **TWIN,
        sample=LINEAR,
        seeds=(0, 1, 2),
    ),
    Row("text twin, best", "the same and rerank of 8", **TWIN, sample=BEST["sample"]),
)


SYSTEMS = (
    Row("CLIP-GEN", "the best recipe of the ablation", **BEST),
    Row("CLIP-GEN, one drawn", "the same without rerank", **ONE_DRAWN),
    Row("CLIP-GEN, plain", "the paper's recipe"),
    Row("retrieval", "the training image nearest to the text", system="retrieval"),
    Row("VQGAN-CLIP", "latents optimised for CLIP similarity", system="vqgan-clip"),
    Row("text twin", "CLIP-GEN on the embeddings of paired captions, one drawn", **TWIN, sample=LINEAR),
    Row(
        "supervised",
        "the transformer on caption-image pairs, words before image (CogView)",
        transformer={"conditioning": "words"},
        train=ALONE,
        sample=LINEAR,
        text="paired",
        system="supervised",
    ),
    Row("GAN", "one-stage conditional GAN on caption-image pairs (DF-GAN)", text="paired", system="gan"),
)


# FID against CapS, a curve for each method that can be guided; the scale rises linearly to the one named.
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
GUIDED_SYSTEMS = ("CLIP-GEN, one drawn", "text twin", "supervised")
CURVES = tuple(
    replace(
        row,
        name=f"{row.name}, guidance {scale:g}",
        says=f"{row.says}; scale rising to {scale:g}",
        sample={**LINEAR, "guidance": scale},
    )
    for row in SYSTEMS
    if row.name in GUIDED_SYSTEMS
    for scale in SCALES
)


# Whether what holds in the Shapes world holds for photos, whose texts lie further from their images.
# The noise reaches as far as a training photo lies from its text: results/tiny-imagenet-20-clip/summary.json has the cosine.
PHOTO_TRAIN = {**ALONE, "noise_cos": 0.65}
PHOTOS = (
    Row("plain", "the paper's recipe"),
    Row(
        "best, one drawn",
        "the best recipe of the ablation, with noise as far as a text lies from its image here",
        train=PHOTO_TRAIN,
        sample=LINEAR,
    ),
    Row(
        "best, shift, one drawn",
        "with texts moved by mean image minus mean text",
        train=PHOTO_TRAIN,
        sample={**LINEAR, "shift": True},
        text="unpaired",
    ),
    Row("best", "the best recipe and rerank of 8", train=PHOTO_TRAIN, sample=BEST["sample"]),
    Row("text twin, one drawn", "the best recipe on paired captions", **TWIN, sample=LINEAR),
    Row("retrieval", "the training image nearest to the text", system="retrieval"),
)


@dataclass(frozen=True)
class Table:
    """A set of rows, on how many captions and oracle prompts of a kind each is measured, and what is printed of it."""

    name: str  # of its folder under results/
    rows: tuple[Row, ...]
    n_captions: int
    n_oracle: int
    columns: tuple[str, ...]
    draws_outside: bool = True  # also keep images for prompts outside of what was trained on


ORACLE_COLUMNS = ("oracle_error", "colour", "shape", "held_out_shape", "two_both", "caps", "fid_0")
TABLES = {
    table.name: table
    for table in (
        Table("ablation", ROWS, 500, 256, ORACLE_COLUMNS, draws_outside=False),
        Table("systems", SYSTEMS, 256, 128, (*ORACLE_COLUMNS, "seconds_per_image")),
        Table("curves", CURVES, 256, 0, ("caps", "fid_0", "fid_1"), draws_outside=False),
        Table("photos", PHOTOS, 1_000, 0, ("class_accuracy", "caps", "r_precision", "fid_0", "fid_1", "nll")),
    )
}


def run_table(
    wb: Workbench, table: Table, results: Path = RESULTS, steps: int = 0, only: Iterable[str] = ()
) -> list[dict]:
    """Train and evaluate the rows that are not there yet, and write results/<table>/table.json after each.

    Args:
        wb: a run with its VQGAN and store made; its preset gives all that a row does not name.
        steps: of each transformer; 0 takes the preset's.
        only: names of rows; none means all.

    Returns:
        What `entries` gives.
    """
    if unknown := set(only) - {row.name for row in table.rows}:
        raise ClipgenError(
            f"table {table.name!r} has no row {sorted(unknown)[0]!r}: choose from {', '.join(r.name for r in table.rows)}"
        )
    chosen = [row for row in table.rows if not only or row.name in only]
    # the first seed of every row comes before the second of any: an interrupted comparison has all its rows
    for row, seed in sorted(((r, s) for r in chosen for s in r.seeds), key=lambda pair: pair[1]):
        run_row(wb, table, row, seed, results, steps)
        write_json(results / table.name / "table.json", entries(results / table.name, table.rows))
    return entries(results / table.name, table.rows)


def recipe(wb: Workbench, row: Row, seed: int = 0, steps: int = 0) -> dict:
    """The configs of a row: the preset's, changed to the plain recipe, changed to the row's."""
    parts = {
        "transformer": wb.preset.transformer,
        "train": wb.preset.transformer_train,
        "sample": wb.preset.sample,
    }
    made = {name: replace_fields(part, {**PLAIN[name], **getattr(row, name)}) for name, part in parts.items()}
    if made["transformer"].conditioning == "words":  # as many as CLIP itself reads
        made["transformer"] = replace(made["transformer"], condition_tokens=wb.clip.tokenizer.context_length)
    if steps:
        made["train"] = replace(made["train"], steps=steps)
    if row.system in ("clip-gen", "supervised"):
        # a shift takes its text in sampling: the training is that of a row without it
        return {**made, "text": row.text if row.text == "paired" or made["train"].centre else "none", "seed": seed}
    own = {"retrieval": None, "vqgan-clip": wb.preset.vqgan_clip, "gan": wb.preset.fusion_gan}[row.system]
    return {"system": row.system, "config": own, "text": row.text, "seed": seed}


def run_row(wb: Workbench, table: Table, row: Row, seed: int, results: Path, steps: int) -> dict:
    """The numbers of one row and seed, from its file where that is there and of the same recipe."""
    made, store = recipe(wb, row, seed, steps), wb.store()
    of = {"vqgan": store.meta["vqgan_hash"], "clip": store.meta["clip_hash"], "data": store.meta["data_hash"]}
    config = replace(wb.preset.evaluate, n=min(table.n_captions, wb.preset.evaluate.n))
    classifier, n_oracle = wb.classifier(), min(table.n_oracle, wb.preset.evaluate.n_oracle)
    measured = {
        "evaluate": {**asdict(config), "n_oracle": n_oracle},
        "judge": wb.judge.weights_hash,
        "classifier": module_hash(classifier) if classifier else None,
    }
    kept = _plain_json({**made, **of, **measured})
    path = results / table.name / "rows" / f"{_slug(row.name)}-{seed}.json"
    outside = path.with_name(f"{path.stem}-outside.png")
    there = read_json(path)["recipe"] if path.exists() else kept
    if other := [key for key in of if there[key] != of[key]]:
        raise ClipgenError(
            f"{path.parent.parent} holds rows of another run (another {other[0]}): move that folder away, or compare with the run they are of"
        )
    is_there = path.exists() and _is_same(there, kept)
    if is_there and (outside.exists() or not table.draws_outside):
        return read_json(path)
    print(f"{row.name}, seed {seed}", flush=True)
    system, facts, seconds = _system(wb, row, made, of, results / "ablation" / "trainings")
    path.parent.mkdir(parents=True, exist_ok=True)
    if table.draws_outside:
        _draw_sheet(system, wb.outside_prompts(), outside)
    if is_there:
        return read_json(path)
    start = time.perf_counter()
    evaluators, generated = evaluate.Evaluators(wb.judge, classifier), results / table.name / "generated" / path.stem
    numbers, _ = evaluate.evaluate_generator(
        system, wb.images("val"), evaluators, config, generated / "captions", wb.seed
    )
    oracle = {}
    if wb.has_oracle and n_oracle:
        asked = ("text", "image") if row.system == "clip-gen" else ("text",)
        oracle = evaluate.evaluate_oracle(system, generated / "oracle", n_oracle, wb.seed, asked)
    drawn, prompts = time.perf_counter(), wb.preview_prompts()
    _draw_sheet(system, prompts, path.with_suffix(".png"))
    seconds |= {"evaluate": drawn - start, "per_image": (time.perf_counter() - drawn) / len(prompts)}
    result = {
        "name": row.name,
        "says": row.says,
        "seed": seed,
        "text": row.text,
        "recipe": kept,
        "evaluation": numbers,
        "oracle": oracle,
        "transformer": facts,
        "seconds": seconds,
    }
    write_json(path, result)
    return result


def _draw_sheet(system, prompts: list[str], path: Path) -> None:
    """One image for each prompt, with seeds 0, 1, ..., side by side in a file."""
    Image.fromarray(grid(system.generate_each(prompts, list(range(len(prompts)))), columns=len(prompts))).save(path)


def _system(wb: Workbench, row: Row, made: dict, of: dict, trainings: Path):
    """What draws for a row, what is known of its transformer, and the seconds its training took."""
    vqgan, clip, device, start = wb.vqgan(), wb.clip, wb.device, time.perf_counter()
    if row.system == "retrieval":
        return baselines.Retrieval(vqgan, clip, wb.store(), wb.images()), {}, {}
    if row.system == "vqgan-clip":
        return baselines.VQGANCLIP(vqgan, clip, made["config"]), {}, {}
    needed = _plain_json({**{key: value for key, value in made.items() if key != "sample"}, **of})
    # rows that differ in sampling alone share a training, named by all that decides it
    run = open_run(hashlib.sha256(json.dumps(needed, sort_keys=True).encode()).hexdigest()[:8], trainings)
    if row.system == "gan":
        if not (run.path / "generator").is_dir():
            save_weights(
                run.path / "generator", baselines.train_fusion_gan(wb.images(), clip, made["config"], made["seed"])
            )
            run.add_to_summary(seconds={"train": time.perf_counter() - start})
        generator = baselines.FusionGenerator.load(run.path / "generator", device)
        return baselines.FusionGAN(vqgan, clip, generator), {}, run.summary()["seconds"]
    if not (
        run.file("recipe.json").exists() and (run.path / "transformer").is_dir()
    ):  # weights are not in the repository
        text_mean = wb.text_mean() if made["train"].centre else None
        stores = [_store(wb, made, split) for split in ("train", "val")]
        start = time.perf_counter()
        transformer = train_transformer.train_transformer(
            run, *stores, made["transformer"], made["train"], vqgan, clip, made["seed"], device, text_mean=text_mean
        )
        facts = train_transformer.validation_losses(transformer.to(device), stores[1], vqgan, clip)
        run.add_to_summary(seconds={"train": time.perf_counter() - start}, transformer=facts)
        write_json(run.file("recipe.json"), needed)
    transformer, summary = ImageTransformer.load(run.path / "transformer", device), run.summary()
    if row.system == "supervised":
        system = baselines.Supervised(vqgan, clip, transformer, made["sample"])
    else:
        extras = wb.bank_and_offset(made["sample"])
        system = TextToImage.from_parts(vqgan, transformer, clip, wb.clip_source, made["sample"], *extras)
    return system, summary["transformer"], summary["seconds"]


def _store(wb: Workbench, made: dict, split: str) -> TokenStore:
    """What a recipe trains on: the run's store, or for a supervised one its tokens with captions beside them."""
    if made["text"] != "paired":
        return wb.store(split)
    words = made["transformer"].conditioning == "words"
    return baselines.paired_store(wb.store(split), wb.images(split).captions, wb.clip, words)


def metrics(result: dict) -> dict[str, float]:
    """The columns of a row's result; `oracle_error` is one minus the mean of colour and shape of one-object texts."""
    e, o = result["evaluation"], result["oracle"]
    found = {"fid_0": e["fid"]["0"], "fid_1": e["fid"]["1"], "rfid": e["rfid"]["0"]} if e["fid"] else {}
    found |= {key: e[key] for key in ("caps", "r_precision") if key in e}
    if "classes" in e:
        found |= {
            "class_accuracy": e["classes"]["accuracy"],
            "class_accuracy_real": e["classes"]["real"],
            "class_accuracy_reconstruction": e["classes"]["reconstruction"],
        }
    if o:
        one = o["text"]["one"]
        found |= {"oracle_error": 1 - (one["colour"] + one["shape"]) / 2}
        found |= {key: one[key] for key in ("colour", "shape", "size", "count")}
        found |= {f"held_out_{key}": o["text"]["held_out"][key] for key in ("colour", "shape")}
        found |= {"two_both": o["text"]["two"]["both"], "relation": o["text"]["two"]["relation"]}
        if "image" in o:
            found |= {f"image_{key}": o["image"]["one"][key] for key in ("colour", "shape")}
    return found | result["transformer"] | {f"seconds_{key}": value for key, value in result["seconds"].items()}


def entries(folder: Path, rows: tuple[Row, ...]) -> list[dict]:
    """The table in a folder: one entry for each row that has a result: name, what it is, seeds, and mean and std of every metric.

    A result that was made by another recipe than the row has now is left out.
    """
    table = []
    for row in rows:
        results = [read_json(p) for s in row.seeds if (p := folder / "rows" / f"{_slug(row.name)}-{s}.json").exists()]
        results = [result for result in results if _is_of(row, result["recipe"])]
        if results:
            columns = [metrics(result) for result in results]
            shared = [key for key in columns[0] if all(key in c for c in columns)]
            spread = {
                key: {
                    "mean": float(np.mean([c[key] for c in columns])),
                    "std": float(np.std([c[key] for c in columns])),
                }
                for key in shared
            }
            table.append(
                {"name": row.name, "says": row.says, "text": row.text, "seeds": [r["seed"] for r in results], **spread}
            )
    return table


def guidance_curves(table: list[dict], systems: list[dict]) -> dict[str, dict[str, dict]]:
    """The rows of the tables `curves` and `systems` as `plots.tradeoff` draws them: a line for each guided method, a point else."""
    curves: dict[str, dict[str, dict]] = {}
    for entry in table:
        name, _, scale = entry["name"].rpartition(", guidance ")
        curves.setdefault(name, {})[scale] = entry
    return curves | {entry["name"]: {"": entry} for entry in systems if entry["name"] not in curves}


def sheets(folder: Path, rows: tuple[Row, ...], kind: str = "") -> dict[str, Path]:
    """The image of each row's first seed that is there: name -> file; `kind` "-outside" gives the prompts outside."""
    paths = {row.name: folder / "rows" / f"{_slug(row.name)}-{row.seeds[0]}{kind}.png" for row in rows}
    return {name: path for name, path in paths.items() if path.exists()}


def lines_of(table: list[dict], columns: tuple[str, ...]) -> str:
    """The table as lines a person can read; a spread is shown where there is more than one seed."""

    def cell(entry: dict, key: str) -> str:
        if key not in entry:
            return "-"
        form = ".0f" if key.startswith("fid") else ".3f"
        spread = f" ± {entry[key]['std']:{form}}" if len(entry["seeds"]) > 1 else ""
        return f"{entry[key]['mean']:{form}}{spread}"

    rows = [("", *columns), *((entry["name"], *(cell(entry, key) for key in columns)) for entry in table)]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    lines = ("".join(f"{text:>{width}}" for text, width in zip(cells, widths[1:], strict=True)) for _, *cells in rows)
    return "\n".join(f"{row[0]:{widths[0]}}{line}" for row, line in zip(rows, lines, strict=True))


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def _is_same(there: dict, wanted: dict) -> bool:
    """Whether a row's recipe is the wanted one, as far as it says: older rows do not name how they were measured."""
    return _filled(there) == {key: value for key, value in wanted.items() if key in there}


def _is_of(row: Row, recipe: dict) -> bool:
    """Whether a recipe is the plain one with the row's changes; what the presets decide is not looked at."""
    if "train" not in recipe:
        return recipe["system"] == row.system
    recipe = _filled(recipe)
    wanted = {part: {**PLAIN[part], **getattr(row, part)} for part in PLAIN}
    if wanted["transformer"]["conditioning"] == "words":
        del wanted["transformer"]["condition_tokens"]  # as many as CLIP reads
    wanted = _plain_json(wanted)
    return all(recipe[part][key] == value for part, values in wanted.items() for key, value in values.items())


def _filled(recipe: dict) -> dict:
    """A sampling field that did not exist when a row was made did what its default does."""
    return (
        {**recipe, "sample": {**_plain_json(asdict(SampleConfig())), **recipe["sample"]}}
        if "sample" in recipe
        else recipe
    )


def _plain_json(values: dict) -> dict:
    """Configs as dicts and tuples as lists, as they come back from a file."""
    return json.loads(json.dumps(values, default=asdict))
