"""The comparison: one lever at a time on the paper's plain recipe, every row on one tokenizer and one token store.

In: a finished run, whose stage 1 and store all rows share. Out: results/ablation/: a folder for each training, a file
for each row and seed, and table.json with mean and spread over seeds. A row that is there is not made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import evaluate, train
from .config import replace_fields
from .images import grid
from .runs import ClipgenError, open_run, read_json, write_json
from .sample import TextToImage
from .store import TokenStore
from .transformer import ImageTransformer
from .workbench import Workbench

N_CAPTIONS, N_ORACLE = 500, 256  # of each row's evaluation


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


# The method as the paper has it: one prefix token, clean embeddings, no guidance, both losses.
PLAIN = {
    "transformer": {"conditioning": "prefix", "condition_tokens": 1},
    "train": {"noise_cos": 1.0, "condition_dropout": 0.0, "centre": False, "embedding_weight": 0.1,
              "embedding_path": "straight-through", "embedding_form": "cosine"},
    "sample": {"guidance": 1.0, "guidance_schedule": "constant", "neighbours": 0, "candidates": 1},
}  # fmt: skip
GUIDED = {"condition_dropout": 0.1}
BEST = {"transformer": {"condition_tokens": 4}, "train": {"noise_cos": 0.7, **GUIDED}}

ROWS = (
    Row("plain", "the paper's recipe", seeds=(0, 1, 2)),
    Row("noise", "embeddings noised down to cosine 0.7", train={"noise_cos": 0.7}),
    Row("guidance", "condition dropout 10%, guidance scale 1.5", train=GUIDED, sample={"guidance": 1.5}),
    Row("guidance linear", "the same, scale rising linearly to 2", train=GUIDED, sample={"guidance": 2.0, "guidance_schedule": "linear"}),
    Row("guidance cosine", "the same, scale rising as a cosine to 2", train=GUIDED, sample={"guidance": 2.0, "guidance_schedule": "cosine"}),
    Row("guidance interval", "the same, scale 1.5 on the first half of the tokens", train=GUIDED, sample={"guidance": 1.5, "guidance_interval": (0.0, 0.5)}),
    Row("neighbours 1", "text replaced by its nearest training picture's embedding", sample={"neighbours": 1}),
    Row("neighbours 10", "text replaced by the mean of its 10 nearest", sample={"neighbours": 10}),
    Row("neighbours 100", "text replaced by the mean of its 100 nearest", sample={"neighbours": 100}),
    Row("rerank 8", "the best of 8 by the conditioning CLIP, which is the judge too", sample={"candidates": 8}),
    Row("best", "noise, 4 condition tokens, dropout and guidance 1.5", **BEST, sample={"guidance": 1.5}, seeds=(0, 1, 2)),
    Row("best, guidance 1", "the same without guidance", **BEST),
    Row("best, guidance 3", "the same with guidance 3", **BEST, sample={"guidance": 3.0}),
    Row("best, neighbours 10", "best on the mean of the 10 nearest", **BEST, sample={"guidance": 1.5, "neighbours": 10}),
    Row("best, rerank 8", "best and rerank of 8", **BEST, sample={"guidance": 1.5, "candidates": 8}),
    Row("text twin", "trained on the embeddings of paired captions: what the gap costs", text="paired"),
    Row("text twin, guided", "the same with 4 condition tokens, dropout and guidance 1.5", transformer={"condition_tokens": 4}, train=GUIDED, sample={"guidance": 1.5}, text="paired"),
    Row("4 tokens", "4 condition tokens", transformer={"condition_tokens": 4}),
    Row("16 tokens", "16 condition tokens", transformer={"condition_tokens": 16}),
    Row("adaln", "adaptive layer norm in every block in place of a prefix", transformer={"conditioning": "adaln"}),
    Row("centre and noise", "both modalities centred, then noise down to 0.7", train={"centre": True, "noise_cos": 0.7}, text="unpaired"),
    Row("no embedding loss", "token likelihood alone", train={"embedding_weight": 0.0}),
    Row("embedding loss x10", "weight 1.0", train={"embedding_weight": 1.0}),
    Row("embedding loss, gumbel", "sampled tokens, weight 1.0", train={"embedding_weight": 1.0, "embedding_path": "gumbel"}),
    Row("embedding loss, log", "log form, weight 1.0", train={"embedding_weight": 1.0, "embedding_form": "log"}),
    Row("embedding loss, half the batch", "weight 1.0 on half of each batch", train={"embedding_weight": 1.0, "embedding_share": 0.5}),
)  # fmt: skip


def run_rows(
    bench: Workbench, folder: Path, steps: int = 0, only: Iterable[str] = (), rows: tuple[Row, ...] = ROWS
) -> list[dict]:
    """Train and evaluate the rows that are not there yet, and write table.json after each.

    Args:
        bench: a run with its VQGAN and store made; its preset gives all that a row does not name.
        folder: results/ablation/, say.
        steps: of each training; 0 takes the preset's.
        only: names of rows; none means all.

    Returns:
        The table: what `table_of` gives.
    """
    known = {row.name for row in rows}
    if unknown := set(only) - known:
        raise ClipgenError(f"there is no row {sorted(unknown)[0]!r}: choose from {', '.join(r.name for r in rows)}")
    chosen = [row for row in rows if not only or row.name in only]
    # the first seed of every row comes before the second of any: an interrupted comparison has all its rows
    for row, seed in sorted(((r, s) for r in chosen for s in r.seeds), key=lambda pair: pair[1]):
        run_row(bench, folder, row, seed, steps)
        write_json(folder / "table.json", table_of(folder, rows))
    return table_of(folder, rows)


def recipe(bench: Workbench, row: Row, seed: int, steps: int) -> dict:
    """All that decides a row's numbers, as it is kept beside them."""
    parts = {"transformer": bench.preset.transformer, "train": bench.preset.transformer_train, "sample": bench.preset.sample}
    made = {name: replace_fields(part, {**PLAIN[name], **getattr(row, name)}) for name, part in parts.items()}
    if steps:
        made["train"] = replace(made["train"], steps=steps)
    return {**made, "text": row.text, "seed": seed}


def run_row(bench: Workbench, folder: Path, row: Row, seed: int, steps: int) -> dict:
    """The numbers of one row and seed, from its file where it is there and of the same recipe."""
    made = recipe(bench, row, seed, steps)
    vqgan, store = bench.vqgan(), bench.store()
    kept = _plain_json(
        {**made, "vqgan": store.meta["vqgan_hash"], "clip": store.meta["clip_hash"], "data": store.meta["data_hash"]}
    )
    path = folder / "rows" / f"{_slug(row.name)}-{seed}.json"
    if path.exists() and (there := read_json(path))["recipe"] == kept:
        return there
    print(f"{row.name}, seed {seed}", flush=True)
    transformer, seconds = _trained(bench, folder, made, kept)
    bank = store.embeds(slice(None)) if made["sample"].neighbours else None
    generator = TextToImage.from_parts(vqgan, transformer.to(bench.device), bench.clip, bench.clip_source, made["sample"], bank)
    start = time.perf_counter()
    config = replace(bench.preset.evaluate, n=min(N_CAPTIONS, bench.preset.evaluate.n))
    numbers, _ = evaluate.evaluate_generator(generator, bench.images("val"), bench.judge, config, bench.seed)
    oracle = (
        evaluate.evaluate_oracle(generator, min(N_ORACLE, bench.preset.evaluate.n_oracle), bench.seed)
        if bench.has_oracle
        else {}
    )
    prompts = bench.preview_prompts()
    pictures = generator.draw_each(prompts, list(range(len(prompts))))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(pictures, columns=len(prompts))).save(path.with_suffix(".png"))
    held_out = train.held_out_losses(transformer, _store(bench, row.text, "val"), vqgan, bench.clip)
    result = {"name": row.name, "says": row.says, "seed": seed, "text": row.text, "recipe": kept, "evaluation": numbers,
              "oracle": oracle, "transformer": held_out, "seconds": {**seconds, "evaluate": time.perf_counter() - start}}  # fmt: skip
    write_json(path, result)
    return result


def _trained(bench: Workbench, folder: Path, made: dict, kept: dict) -> tuple[ImageTransformer, dict]:
    """The transformer of a recipe: rows that differ in sampling alone share it."""
    needed = {key: value for key, value in kept.items() if key != "sample"}
    for config in sorted((folder / "trainings").glob("*/recipe.json")):
        if read_json(config) == needed and (config.parent / "transformer").is_dir():
            return ImageTransformer.load(config.parent / "transformer", bench.device), open_run(config.parent.name, folder / "trainings").summary()["seconds"]  # fmt: skip
    name = f"{len(list((folder / 'trainings').glob('*/recipe.json'))):02d}"
    run = open_run(name, folder / "trainings")
    stores = [_store(bench, made["text"], split) for split in ("train", "val")]
    start = time.perf_counter()
    text_mean = bench.text_mean() if made["train"].centre else None
    transformer = train.train_transformer(run, *stores, made["transformer"], made["train"], bench.vqgan(),
                                          bench.clip, made["seed"], bench.device, text_mean=text_mean)  # fmt: skip
    seconds = {"train": time.perf_counter() - start}
    run.add_to_summary(seconds=seconds)
    write_json(run.file("recipe.json"), needed)
    return transformer, seconds


def _store(bench: Workbench, text: str, split: str) -> TokenStore:
    return paired_texts(bench, split) if text == "paired" else bench.store(split)


def paired_texts(bench: Workbench, split: str) -> TokenStore:
    """The store with embeddings of captions in place of the pictures' own: supervised, for the twin alone.

    A row for each caption. Mirrored rows are left out, since a caption may say left or right.
    """
    store, captions = bench.store(split), bench.images(split).captions
    n_plain = len(store) // (2 if store.meta["flip"] else 1)
    pairs = [(i, text) for i, row in enumerate(store.arrays["rows"][:n_plain]) for text in captions[row]]
    embeds = torch.cat([bench.clip.texts([text for _, text in pairs[i : i + 512]]).cpu() for i in range(0, len(pairs), 512)])
    rows = np.array([i for i, _ in pairs])
    arrays = {
        "tokens": store.arrays["tokens"][rows],
        "embeds": embeds.numpy().astype(np.float16),
        "rows": store.arrays["rows"][rows],
    }
    return replace(store, meta=store.meta | {"N": len(pairs)}, arrays=arrays)


def metrics(result: dict) -> dict[str, float]:
    """The columns of a row's result; `oracle_error` is one minus the mean of colour and shape of one-object texts."""
    e, o = result["evaluation"], result["oracle"]
    found = {"fid_0": e["fid"]["0"], "fid_1": e["fid"]["1"], "rfid": e["rfid"]["0"]}
    found |= {key: e[key] for key in ("caps", "r_precision") if key in e}
    if o:
        one, image = o["text"]["one"], o["image"]["one"]
        found |= {"oracle_error": 1 - (one["colour"] + one["shape"]) / 2}
        found |= {key: one[key] for key in ("colour", "shape", "size", "count")}
        found |= {f"held_out_{key}": o["text"]["held_out"][key] for key in ("colour", "shape")}
        found |= {"two_both": o["text"]["two"]["both"], "relation": o["text"]["two"]["relation"]}
        found |= {f"image_{key}": image[key] for key in ("colour", "shape")}
    return found | result["transformer"] | {f"seconds_{key}": value for key, value in result["seconds"].items()}


def table_of(folder: Path, rows: tuple[Row, ...] = ROWS) -> list[dict]:
    """One entry for each row that has a result: name, what it is, seeds, and mean and std of every metric."""
    table = []
    for row in rows:
        results = [read_json(p) for s in row.seeds if (p := folder / "rows" / f"{_slug(row.name)}-{s}.json").exists()]
        if results:
            columns = [metrics(result) for result in results]
            spread = {key: {"mean": float(np.mean([c[key] for c in columns])), "std": float(np.std([c[key] for c in columns]))}
                      for key in columns[0]}  # fmt: skip
            table.append(
                {"name": row.name, "says": row.says, "text": row.text, "seeds": [r["seed"] for r in results], **spread}
            )
    return table


def sheets(folder: Path, rows: tuple[Row, ...] = ROWS) -> dict[str, Path]:
    """The picture of each row's first seed that is there: name -> file."""
    paths = {row.name: folder / "rows" / f"{_slug(row.name)}-{row.seeds[0]}.png" for row in rows}
    return {name: path for name, path in paths.items() if path.exists()}


def lines_of(table: list[dict], columns: tuple[str, ...] = ("oracle_error", "colour", "shape", "held_out_shape", "two_both", "caps", "fid_0", "fid_1")) -> str:  # fmt: skip
    """The table as lines a person can read; a spread is shown where there is more than one seed."""

    def cell(entry: dict, key: str) -> str:
        if key not in entry:
            return "-"
        mean, std = entry[key]["mean"], entry[key]["std"]
        text = f"{mean:.0f}" if key.startswith("fid") else f"{mean:.3f}"
        more = f"{std:.0f}" if key.startswith("fid") else f"{std:.3f}"
        return f"{text} ± {more}" if len(entry["seeds"]) > 1 else text

    head = f"{'':32}" + "".join(f"{key:>17}" for key in columns)
    return "\n".join(
        [head, *(f"{entry['name']:32}" + "".join(f"{cell(entry, key):>17}" for key in columns) for entry in table)]
    )


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def _plain_json(values: dict) -> dict:
    """Configs as dicts and tuples as lists, as they come back from a file."""
    return json.loads(
        json.dumps({key: asdict(value) if hasattr(value, "__dataclass_fields__") else value for key, value in values.items()})
    )
