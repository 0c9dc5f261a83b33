"""How time grows with batch, length, width and the number of pictures: a section of `clipgen bench`.

In: a device. Out: curves for a plot, and of each the exponent p of the power law x^p that fits it best. A training step and a
drawing grow from one small transformer; what belongs to a store or a set of pictures grows from ten thousand rows to a million, or
must not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .bench_sampling import directions, drawing
from .config import SampleConfig, TransformerConfig
from .metrics import GaussianStatistics, Moments, frechet_distance
from .optim import build_optimizer
from .runs import progress
from .scale import in_a_process, synthetic_store
from .store import TokenStore
from .timing import in_turns, row, spread, waiter
from .transformer import ImageTransformer

BASE = TransformerConfig(layers=2, width=128, heads=2)
CODES, LENGTH, BATCH, CLIP_DIM = 1_024, 64, 4, 256
CURVES = {"batch": (1, 2, 4, 8, 16, 32), "length": (64, 128, 256, 512, 1_024), "width": (128, 256, 512, 1_024)}
DRAWN = SampleConfig(guidance=1.0, top_k=100, batch_size=1_024)
STORES = (10_000, 100_000, 262_144, 1_048_576)  # rows; the last two have 128 shards, as many as a store ever has
SETS = (1_000, 10_000, 100_000)  # pictures whose features are summed
READ = 256  # rows of a random batch
FLAT = 1.5  # times as long or as much with the largest N as with the smallest, at most


def growth(
    device: torch.device, limits: dict, rounds: int = 3, curves: dict[str, tuple[int, ...]] = CURVES, stores: tuple[int, ...] = STORES,
    sets: tuple[int, ...] = SETS,
) -> dict:  # fmt: skip
    """Seconds of a training step and of a drawing over batch, length and width, and of what N pictures cost.

    All sizes of a curve are timed in turns. A step is a forward and backward pass in bfloat16 and AdamW's; a drawing is in float32,
    without guidance. Rows are random, read from pages that the kernel holds.

    Returns:
        `table`, `rounds`, and `details`: for each curve `x` and for each of its kinds of work the spread of seconds at each x
        (of `memory` the bytes of a process's own).
    """
    found: dict = {"table": [], "rounds": rounds, "details": {}}
    for name, sizes in curves.items():
        curve = {"x": list(sizes)} | _transformer_curve(name, sizes, device, rounds)
        found["details"][name] = curve
        for kind, shown in (("train", "a training step"), ("sample", "a drawing")):
            found["table"].append(row(f"{shown} over {name}", f"exponent, {sizes[0]} to {sizes[-1]}", _fitted(sizes, curve[kind]), unit=""))  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        found["details"]["store"] = _store_curve(stores, Path(place), rounds)
    found["details"]["set"] = _set_curve(sets, rounds)
    found["table"] += _flat_rows(found["details"]["store"], found["details"]["set"])
    return found


def exponent(x: tuple[int, ...] | list[int], y: list[float]) -> float:
    """p of the power law y = c x^p that fits best: the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _fitted(x: tuple[int, ...], curve: list[dict[str, float]]) -> dict[str, float]:
    return spread([exponent(x, [value["median"] for value in curve])])


# ---------------------------------------------------------------------------------------------- a transformer


def _transformer_curve(name: str, sizes: tuple[int, ...], device: torch.device, rounds: int) -> dict[str, list[dict]]:
    sized = [{"batch": BATCH, "length": LENGTH, "width": BASE.width} | {name: size} for size in sizes]
    found = {}
    for kind, make in (("train", training), ("sample", sampling)):
        actions = {str(sides[name]): make(device=device, **sides) for sides in sized}
        seconds = in_turns(actions, rounds, waiter(device), label=f"{kind} over {name}")
        found[kind] = [spread(values) for values in seconds.values()]
    return found


def _transformer(length: int, width: int, device: torch.device) -> ImageTransformer:
    torch.manual_seed(0)
    config = replace(BASE, width=width, heads=max(1, width * BASE.heads // BASE.width))
    return ImageTransformer(config, CODES, length, CLIP_DIM).to(device)


def training(batch: int, length: int, width: int, device: torch.device) -> Callable[[], object]:
    """A training step of a transformer on random tokens, as an action."""
    transformer = _transformer(length, width, device).train()
    optimizer = build_optimizer(transformer, "adamw", 1e-4, 0.95, 0.05)
    embeds, tokens = directions(transformer, batch), torch.randint(0, CODES, (batch, length), device=device)
    none = torch.zeros(0, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            nll, _ = transformer(embeds, tokens, logits_of=none)
        nll.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling(batch: int, length: int, width: int, device: torch.device) -> Callable[[], object]:
    """A drawing of a batch of token rows by a transformer of random weights, as an action."""
    return drawing(_transformer(length, width, device).eval().requires_grad_(False), batch, DRAWN)


# ---------------------------------------------------------------------------------------------- N


def _store_curve(sizes: tuple[int, ...], place: Path, rounds: int, batches: int = 50) -> dict:
    """Opening stores of some sizes, reading a random batch of each, and own memory of a process that has read some."""
    with progress(sum(sizes), "writing synthetic stores") as bar:
        for n in sizes:
            synthetic_store(place / str(n), n, LENGTH, CLIP_DIM, bar.update)
    stores = {n: TokenStore.open(place / str(n)) for n in sizes}
    for store in stores.values():  # every page is mapped before a clock runs
        for part in (*store.arrays["tokens"].parts, *store.arrays["embeds"].parts):
            part[:, 0].max()
    draw = np.random.default_rng(0)

    def read(store: TokenStore) -> None:
        for rows in draw.integers(0, len(store), (batches, READ)):
            store.tokens(rows), store.embeds(rows)

    opening = in_turns({str(n): partial(TokenStore.open, place / str(n)) for n in sizes}, 3 * rounds, label="opening stores")
    reading = in_turns({str(n): partial(read, store) for n, store in stores.items()}, 3 * rounds, label="reading stores")
    memory = [in_a_process("print_memory", place / str(n), READ, batches)["own"] for n in sizes]
    return {
        "x": list(sizes), "shards": [len(store.meta["shards"]) for store in stores.values()],
        "open": [spread(values) for values in opening.values()], "batch": [spread(values, 1 / batches) for values in reading.values()],
        "memory": [spread([float(own)]) for own in memory],
    }  # fmt: skip


def _set_curve(sizes: tuple[int, ...], rounds: int, dim: int = 512) -> dict:
    """Summing features of N pictures, and the Frechet distance of the sums to a reference."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(1_000, dim, generator=draw) * torch.linspace(0.1, 2, dim)
    reference = _summed(features, 2)

    summing = in_turns(
        {str(n): partial(_summed, features, n // len(features)) for n in sizes}, rounds, label="summing features"
    )
    distances = {}
    for n in sizes:
        moved = _summed(features + 0.1 * torch.randn(1_000, dim, generator=draw), n // len(features))
        distances[str(n)] = partial(frechet_distance, *reference, *moved)
    distance = in_turns(distances, 3 * rounds, label="distances")
    return {
        "x": list(sizes), "sum": [spread(values) for values in summing.values()],
        "distance": [spread(values) for values in distance.values()],
    }  # fmt: skip


def _summed(features: torch.Tensor, times: int) -> Moments:
    """Moments of batches of features, each added so many times: what an addition costs does not depend on its values."""
    statistics = GaussianStatistics()
    for _ in range(max(1, times)):
        statistics.add(features)
    return statistics.moments()


def _flat_rows(store: dict, sets: dict) -> list[dict]:
    """What must not grow with N, beside what it may at most; and the exponents of what does.

    Opening a store and a batch of it go through all its shards, whose number grows with N to 128: these are asked to be flat from
    where it has reached that.
    """
    whole = store["shards"].index(max(store["shards"]))
    flat = {
        "a random batch, as many shards": (store["x"][whole:], store["batch"][whole:]),
        "opening a store, as many shards": (store["x"][whole:], store["open"][whole:]),
        "own memory of a process that reads a store": (store["x"], store["memory"]),
        "Frechet distance after N pictures": (sets["x"], sets["distance"]),
    }
    found = [
        row(what, f"of {x[-1]:,} as of {x[0]:,}", spread([curve[-1]["median"] / curve[0]["median"]]), FLAT, most=True)
        for what, (x, curve) in flat.items()
    ]
    for what, (x, curve) in {
        "a random batch of a store": (store["x"], store["batch"]),
        "opening a store": (store["x"], store["open"]),
        "summing features": (sets["x"], sets["sum"]),
    }.items():
        found.append(row(f"{what} over N", f"exponent, {x[0]:,} to {x[-1]:,}", _fitted(x, curve), unit=""))
    return found
