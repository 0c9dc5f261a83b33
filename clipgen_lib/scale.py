"""Measurements of what decides how far this goes: pictures a second of every stage on this machine, and the token store.

In: a preset and a device, or a folder on the disk that is measured and numbers of rows. Out: figures for a JSON file, with the
machine and the versions they hold for. Pictures, tokens and, where no file of weights is at hand, weights are random: none of
these changes what a step costs. What is counted instead of measured is in `clipgen_lib/cost.py`.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from .clip_embed import ClipEmbedder
from .config import ClipConfig, OptimConfig, Preset, load_preset
from .cost import count, need, vgg_features
from .data import ImageSet
from .images import crop, load_image, to_float
from .runs import ClipgenError, Run, progress, versions, write_json
from .sample import generate
from .schedule import batch_rows
from .store import FILES, MADE_OF, TokenStore, pictures_at_once, shard_span
from .timing import cpu_name, matmul_peak, spread, waiter
from .train import train_transformer, train_vqgan
from .transformer import ImageTransformer
from .vqgan import VQGAN

STAGES = ("vqgan", "extract", "transformer", "sample")
CPU_OPERATIONS = 5e11  # of one pass on a CPU, at most: some ten seconds
ENDLESS = 1_000_000  # steps: the clock ends a training, not its configuration


# ---------------------------------------------------------------------------------------------- the clock


class Enough(Exception):
    """Raised by a clock that has seen what it wanted."""


class Clock:
    """Takes the time of the same piece of work again and again, after some that warm the machine up.

    On a GPU each time waits until all that was asked of it is done.

    Args:
        repeats: at most so many are measured; fewer, but 2 at least, once they have taken `seconds`.
        told: called after each piece of work.
    """

    def __init__(self, device: str, warm_up: int, repeats: int, seconds: float, told: Callable[[], object] = lambda: None):
        self.device, self.warm_up, self.repeats, self.most, self.told = device, warm_up, repeats, seconds, told
        self.times: list[float] = []

    def tick(self) -> None:
        """The end of a piece of work.

        Raises:
            Enough: it was the last one.
        """
        waiter(torch.device(self.device))()
        self.times.append(time.perf_counter())
        self.told()
        found = self.seconds
        if len(found) >= self.repeats or (len(found) >= 2 and sum(found) > self.most):
            raise Enough

    @property
    def seconds(self) -> list[float]:
        """Of each piece of work after those that warm up."""
        return np.diff(self.times[self.warm_up - 1 :]).tolist()


def timed(work: Callable[[Clock], object], clock: Clock) -> list[float]:
    """Seconds of each step of `work`, which calls the clock's `tick` after it, for ever."""
    with suppress(Enough):
        work(clock)
    return clock.seconds


def repeated(action: Callable[[], object]) -> Callable[[Clock], None]:
    """An action again and again, as `timed` takes it."""

    def work(clock: Clock) -> None:
        while True:
            action()
            clock.tick()

    return work


# ---------------------------------------------------------------------------------------------- the stages


def throughput(
    preset: Preset, device: str = "cpu", repeats: int = 5, seconds: float = 15.0, show_progress: bool = True
) -> dict:
    """Pictures a second of every stage of a preset on this machine, and the share of what its matrix products reach.

    Steps are those of the trainings themselves (`train_vqgan` with its discriminator and the adaptive weight,
    `train_transformer` with all its preset asks for), of an extraction and of `generate`, on as many pictures as the preset has in
    a pass; fewer where memory is short, or on a CPU where a pass would take longer than some ten seconds (`notes` says so).
    CLIP and VGG16 have random weights where the preset names ones to download.

    Args:
        repeats, seconds: of each stage, see `Clock`.

    Returns:
        `stages`: of each the `pictures` of a step beside those of the preset, `seconds` of a step and `pictures_per_second`
        (median, least, most), `operations` of a picture as `cost.count` counts them, `operations_per_second`, and the `share` of
        the `peak` in float32 and bfloat16, measured in this run. `store`: rows per second of random batches. `jpeg`: decoding
        by one process. `machine`, `versions`.

    Raises:
        ClipgenError: not even one picture at a time fits into the memory.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    small, pictures, notes = fitted(preset, device)
    operations, warm_up = count(small), 1 if device == "cpu" else 4
    weights = {stage: operations[stage] * pictures[stage] for stage in STAGES}
    torch.manual_seed(0)
    clip, found = clip_of(preset.clip, device), {}
    with (
        tempfile.TemporaryDirectory() as place,
        progress(round((warm_up + repeats) * sum(weights.values()) / 1e9), f"measuring {preset.name}", show_progress) as bar,
    ):
        peak = matmul_peak(torch.device(device))
        store = Path(place) / "store"
        synthetic_store(store, 20_000, small.vqgan.side**2, clip.dim, codes=small.vqgan.codebook_size)
        for stage in STAGES:
            before = bar.n
            work = WORK[stage](small, device, clip, Path(place), pictures[stage])
            clock = Clock(device, warm_up, repeats, seconds, partial(bar.update, weights[stage] / 1e9))
            found[stage] = _stage(
                timed(work, clock), pictures[stage], in_a_pass(preset, device)[stage], operations[stage], peak
            )
            found[stage]["precision"] = (
                getattr(small, f"{stage}_train").precision if stage in ("vqgan", "transformer") else "no"
            )
            if torch.device(device).type == "cuda":
                found[stage]["gigabytes"] = torch.cuda.max_memory_allocated(device) / 1e9
            bar.update(before + (warm_up + repeats) * weights[stage] / 1e9 - bar.n)
            del work
            _free(device)
        opened = TokenStore.open(store)
        reading = spread([1 / s for s in timed(_read(opened), Clock("cpu", 5, 40, seconds))], 256)
    return {
        "preset": preset.name, "device": torch.device(device).type, "peak": peak, "stages": found,
        "store": {"batch_size": 256, "rows_per_second": reading}, "jpeg": decode_speed(preset.vqgan.image_size, seconds=seconds),
        "notes": notes, "machine": machine(device) | {"load_before": load}, "versions": _versions(),
    }  # fmt: skip


def fitted(preset: Preset, device: str) -> tuple[Preset, dict[str, int], list[str]]:
    """The preset with as many pictures in a pass as this machine has memory and, on a CPU, time for.

    Returns:
        A preset whose trainings never end, write nothing and have the discriminator's full say from the second step on; the
        pictures of a step in each stage; what differs from the preset, in words.
    """
    on_cpu, operations, wanted = device == "cpu", count(preset), in_a_pass(preset, device)
    limit = {stage: max(1, int(CPU_OPERATIONS / operations[stage])) if on_cpu else n for stage, n in wanted.items()}
    each, free = {stage: min(n, limit[stage]) for stage, n in wanted.items()}, _free_gigabytes(device)
    while _gigabytes(small := with_pictures(preset, each, on_cpu), each, on_cpu) > free:
        if max(each.values()) == 1:
            raise ClipgenError(f"preset {preset.name} needs {_gigabytes(small, each, on_cpu):.0f} GB with one picture at a time, and {free:.0f} GB are free: measure a smaller preset")  # fmt: skip
        each = {stage: max(1, n // 2) for stage, n in each.items()}
    notes = [f"{stage}: {each[stage]} pictures in a pass, the preset has {n}" for stage, n in wanted.items() if each[stage] < n]
    if preset.clip.pretrained or preset.vqgan_train.perceptual == "lpips":
        notes.append("random weights in CLIP and VGG16")
    if on_cpu and (preset.vqgan_train.compile or preset.transformer_train.compile):
        notes.append("torch.compile is left out on a CPU")
    sizes = {"vqgan": small.vqgan_train.batch_size, "transformer": small.transformer_train.batch_size}
    return small, each | sizes, notes


def in_a_pass(preset: Preset, device: str) -> dict[str, int]:
    """Pictures that each stage of a preset has in memory at a time."""
    trains = {"vqgan": preset.vqgan_train, "transformer": preset.transformer_train}
    each = {stage: train.batch_size // train.accumulate for stage, train in trains.items()}
    return each | {"extract": pictures_at_once(preset.vqgan, device), "sample": preset.sample.batch_size}


def with_pictures(preset: Preset, each: dict[str, int], on_cpu: bool, passes: int = 1) -> Preset:
    """A preset to be measured, of so many pictures in a pass; whole batches where these are the preset's own.

    Args:
        passes: to a step, at most, where it is not the preset's own batch.
    """

    def changed(train: OptimConfig, n: int) -> OptimConfig:
        whole = n == train.batch_size // train.accumulate and not on_cpu
        to_a_step = min(passes, train.accumulate)
        sizes = {} if whole else {"batch_size": n * to_a_step, "accumulate": to_a_step}
        return replace(train, **sizes, steps=ENDLESS, save_every=ENDLESS, log_every=1, compile=train.compile and not on_cpu,
                       workers=0 if on_cpu else train.workers)  # fmt: skip

    stage1 = replace(changed(preset.vqgan_train, each["vqgan"]), adversarial_ramp=(0.0, 0.0))
    stage2 = changed(preset.transformer_train, each["transformer"])
    shapes = replace(preset.shapes, n_train=2 * stage1.batch_size)
    return replace(preset, shapes=shapes, vqgan_train=stage1, transformer_train=stage2)


def _gigabytes(small: Preset, each: dict[str, int], on_cpu: bool) -> float:
    """What the largest stage takes: a training by `need`, an extraction by half a dozen of its widest maps in float32."""
    config = small.vqgan
    maps = 6 * 4 * config.channels * (config.image_size // config.patch) ** 2 * each["extract"] / 1e9
    return max(need(small, 0 if on_cpu else 1).device, maps)


def _free_gigabytes(device: str) -> float:
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    import psutil

    return psutil.virtual_memory().available / 1e9


def _stage(seconds: list[float], pictures: int, preset_pictures: int, operations: float, peak: dict[str, float]) -> dict:
    rate = pictures * operations / float(np.median(seconds))
    return {
        "pictures": pictures, "preset_pictures": preset_pictures, "repeats": len(seconds), "seconds": spread(seconds),
        "pictures_per_second": spread([1 / s for s in seconds], pictures), "operations": operations,
        "operations_per_second": rate, "share": {name: rate / value for name, value in peak.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class _Watched(Run):
    """A run whose log tells the time instead of writing it down."""

    clock: Clock

    def log(self, stage: str, step: int, **scalars: float) -> None:
        self.clock.tick()


class _Noise(ImageSet):
    """Random bytes in memory in place of pictures: nothing is read or decoded."""

    hash = "noise"

    def __init__(self, n: int, size: int):
        super().__init__("noise", "train", Path(), [Path(str(i)) for i in range(n)], size)
        self._cache = dict(enumerate(torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)))


@dataclass(frozen=True)
class _VGG:
    """Feature maps of a VGG16 of random weights where the perceptual loss would take CLIP's: LPIPS, but for its weights."""

    network: nn.Module

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return list(self.network(images))


def _vqgan_steps(small: Preset, device: str, clip: ClipEmbedder, place: Path, pictures: int) -> Callable[[Clock], object]:
    train, images = small.vqgan_train, _Noise(2 * pictures, small.vqgan.image_size)
    if train.perceptual == "lpips":
        train, clip = replace(train, perceptual="clip"), random_vgg(device)
    return lambda clock: train_vqgan(
        _Watched(place, clock), images, images, small.vqgan, train, clip, device=device, show_progress=False
    )


def random_vgg(device: str) -> _VGG:
    return _VGG(vgg_features().to(device).requires_grad_(False))


def _extraction(small: Preset, device: str, clip: ClipEmbedder, place: Path, pictures: int) -> Callable[[Clock], object]:
    vqgan = VQGAN(small.vqgan).to(device).eval()
    squares = torch.randint(0, 256, (pictures, 3, small.vqgan.image_size, small.vqgan.image_size), dtype=torch.uint8)

    @torch.inference_mode()
    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        x = to_float(squares).to(device)
        return vqgan.encode(x).cpu(), clip.images(x).cpu()

    return repeated(encode)


def _transformer_steps(small: Preset, device: str, clip: ClipEmbedder, place: Path, pictures: int) -> Callable[[Clock], object]:
    store, vqgan = TokenStore.open(place / "store"), VQGAN(small.vqgan).eval()
    return lambda clock: train_transformer(
        _Watched(place, clock), store, store, small.transformer, small.transformer_train, vqgan, clip, device=device,
        show_progress=False, text_mean=torch.zeros(clip.dim),
    )  # fmt: skip


def _drawing(small: Preset, device: str, clip: ClipEmbedder, place: Path, pictures: int) -> Callable[[Clock], object]:
    config, embeds = small.vqgan, torch.nn.functional.normalize(torch.randn(pictures, clip.dim), dim=-1).to(device)
    vqgan = VQGAN(config).to(device).eval()
    transformer = ImageTransformer(small.transformer, config.codebook_size, config.side**2, clip.dim).to(device).eval()

    @torch.inference_mode()
    def draw() -> torch.Tensor:
        tokens = generate(transformer, embeds, list(range(pictures)), small.sample)
        return vqgan.decode(tokens.view(-1, config.side, config.side))

    return repeated(draw)


WORK = dict(zip(STAGES, (_vqgan_steps, _extraction, _transformer_steps, _drawing), strict=True))


def clip_of(config: ClipConfig, device: str) -> ClipEmbedder:
    """The preset's CLIP, of random weights where it would be downloaded."""
    if config.pretrained is None:
        return ClipEmbedder.load(config.name, device=device)
    import open_clip

    logging.disable(logging.WARNING)  # it warns that the weights are random
    model = open_clip.create_model(config.name, pretrained=None)
    logging.disable(logging.NOTSET)
    return ClipEmbedder(model, open_clip.get_tokenizer(config.name), config.name, "random").to(device)


def _read(store: TokenStore) -> Callable[[Clock], object]:
    steps = iter(range(ENDLESS))

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        rows = batch_rows(len(store), 256, 0, next(steps))
        return store.tokens(rows), store.embeds(rows)

    return repeated(read)


def _free(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# ---------------------------------------------------------------------------------------------- the machine


def machine(device: str = "cpu") -> dict:
    """What figures of this process hold for."""
    found = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {})


def _versions() -> dict[str, str]:
    return {name: versions()[name] for name in ("python", "torch", "numpy")}


def decode_speed(size: int, photos: int = 16, repeats: int = 5, seconds: float = 15.0) -> dict:
    """Pictures a second that one process reads from JPEG bytes and crops to `size`, of synthetic photos as large as COCO's."""
    files = [photo(seed) for seed in range(photos)]

    def decode() -> None:
        for file in files:
            crop(load_image(file, size), size)

    taken = timed(repeated(decode), Clock("cpu", 1, repeats, seconds))
    return {"pixels": [640, 480], "bytes": float(np.mean(list(map(len, files)))), "size": size,
            "pictures_per_second": spread([1 / s for s in taken], photos)}  # fmt: skip


def photo(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG of noise with the spectrum of photos, 1/f; about as many bytes as a photo of COCO's, 150 kB."""
    draw = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1
    planes = [np.fft.irfft2(np.fft.rfft2(draw.standard_normal((height, width))) / f, (height, width)) for _ in range(3)]
    grey, *tints = (plane / plane.std() for plane in planes)
    pixels = 127 + 50 * np.stack([grey + 0.3 * tints[0], grey, grey + 0.3 * tints[1]], 2)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def projected_seconds(preset: Preset, measured: dict) -> dict[str, float]:
    """Seconds of each step of a run on the Shapes world, by what `throughput` has measured; keys are those of summary.json.

    Left out is what is not a step of a stage: checkpoints, held-out scores, previews, reading and decoding.
    """
    rate = {stage: values["pictures_per_second"]["median"] for stage, values in measured["stages"].items()}
    stage1, stage2, world = preset.vqgan_train, preset.transformer_train, preset.shapes
    return {
        "vqgan": stage1.steps * stage1.batch_size / rate["vqgan"],
        "extract": (world.n_train * (2 if stage2.flip else 1) + world.n_val) / rate["extract"],
        "transformer": stage2.steps * stage2.batch_size / rate["transformer"],
        "per_image": 1 / rate["sample"],
    }


def lines_of(found: list[dict]) -> str:
    """Throughputs of some presets as lines a person can read."""
    lines = []
    for result in found:
        peak, here = result["peak"], result["machine"]
        lines.append(f"{result['preset']} on {here.get('gpu', here['cpu'])}, {here['threads']} threads of {here['cores']} cores; matrix products {peak['float32'] / 1e9:.0f} GFLOP/s in float32, {peak['bfloat16'] / 1e9:.0f} in bfloat16")  # fmt: skip
        lines.append(f"{'stage':12}{'pictures/s':>12}{'from':>10}{'to':>10}{'a step':>8}{'GFLOP each':>12}{'GFLOP/s':>9}{'of float32':>12}{'of bfloat16':>12}")  # fmt: skip
        for stage, values in result["stages"].items():
            rate, share = values["pictures_per_second"], values["share"]
            lines.append(f"{stage:12}{rate['median']:>12.3g}{rate['least']:>10.3g}{rate['most']:>10.3g}{values['pictures']:>8}{values['operations'] / 1e9:>12.3g}{values['operations_per_second'] / 1e9:>9.0f}{share['float32']:>12.0%}{share['bfloat16']:>12.0%}")  # fmt: skip
        store, jpeg = result["store"]["rows_per_second"], result["jpeg"]
        lines.append(f"reading: {store['median']:,.0f} rows/s of a small store; {jpeg['pictures_per_second']['median']:.0f} JPEGs/s by one process, {jpeg['bytes'] / 1e3:.0f} kB each, to {jpeg['size']} pixels")  # fmt: skip
        lines += [*result["notes"], ""]
    return "\n".join(lines[:-1])


# ---------------------------------------------------------------------------------------------- the store


def store_speed(
    folder: Path, rows: int = 10_000_000, tokens: int = 64, dim: int = 256, batch_size: int = 256, batches: int = 2_000,
    repeats: int = 5, smaller: tuple[int, ...] = (100_000, 1_000_000), training_steps: int = 10, show_progress: bool = True,
) -> dict:  # fmt: skip
    """How fast a synthetic store opens and gives random batches, and what memory a process that reads or trains on it takes.

    Rows are random bits on the disk, written shard by shard as an extraction does. The peer is numpy alone: the same rows in
    one flat file for tokens and one for embeddings, `np.memmap`, indexed by the rows. Everything is deleted again.

    Args:
        folder: a new folder, made and deleted; the files take about 2 rows * (2 tokens + 2 dim + 4) bytes.
        batches: that are read in each of `repeats` rounds; a read gives int64 tokens and unit-norm float32 embeddings.
        smaller: further numbers of rows whose memory is measured.
        training_steps: of the laptop preset's transformer, whose memory is measured; its VQGAN and CLIP want 64 tokens of 256
            dimensions.

    Returns:
        `open_seconds`; for `store` and `peer` the rows per second, `cold` (one round, the kernel having dropped the files'
        pages) and `warm` (all pages read before); for each number of rows in `memory` the resident bytes of a fresh process
        that has read the batches: its `own`, and those of `files`, which the kernel takes back when it likes; in
        `training_memory` the most of a process that has taken the mean of all embeddings, trained and looked at held-out rows.

    Raises:
        ClipgenError: the folder exists.
    """
    if folder.exists():
        raise ClipgenError(f"{folder} exists: give a new folder, which is deleted when all is measured")
    found: dict = {"rows": rows, "tokens": tokens, "dim": dim, "batch_size": batch_size, "batches": batches, "repeats": repeats,
                   "training_steps": training_steps}  # fmt: skip
    try:
        counts = sorted({*smaller, rows})
        with progress(sum(counts), "writing synthetic stores", show_progress) as bar:
            for n in counts:
                synthetic_store(folder / str(n), n, tokens, dim, bar.update)
        _flat_copy(TokenStore.open(folder / str(rows)), folder / "flat")
        _forget(folder)  # while no page of it is mapped
        store = TokenStore.open(folder / str(rows))
        found["shards"] = len(store.meta["shards"])
        found["bytes"] = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
        found["open_seconds"] = spread([_seconds(TokenStore.open, store.folder) for _ in range(repeats)])
        flat = _flat_arrays(folder / "flat", store)
        readers = {"store": lambda chosen: (store.tokens(chosen), store.embeds(chosen)), "peer": lambda chosen: _by_numpy(flat, chosen)}  # fmt: skip
        draws = [np.random.default_rng([1, i]).integers(0, rows, (batches, batch_size)) for i in range(repeats + 1)]
        cold = {name: _rate(read, draws[0]) for name, read in readers.items()}
        _read_through(folder)
        warm = {name: [] for name in readers}
        for chosen in draws[1:]:  # in turns, so that other work on the machine slows both
            for name, read in readers.items():
                warm[name].append(_rate(read, chosen))
        found |= {name: {"cold": cold[name], "warm": spread(warm[name])} for name in readers}
        found["memory"] = {str(n): in_a_process("print_memory", folder / str(n), batch_size, batches) for n in counts}
        found["training_memory"] = {
            str(n): in_a_process("print_training_memory", folder / str(n), training_steps) for n in counts
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**found, "machine": machine(), "versions": _versions()}


def synthetic_store(
    folder: Path, rows: int, tokens: int, dim: int, told: Callable[[int], object] = lambda n: None, seed: int = 0,
    codes: int = 1_024,
) -> None:  # fmt: skip
    """A store of random rows in the layout of `extract`. `told` is called with the rows of each shard written."""
    span, counts = shard_span(rows), []
    for shard, first in enumerate(range(0, rows, span)):
        draw, n = np.random.default_rng([seed, shard]), min(span, rows - first)
        parts = {
            "tokens": draw.integers(0, codes, (n, tokens), dtype=np.uint16),
            "embeds": (draw.random((n, dim), dtype=np.float32) - 0.5) * (12 / dim) ** 0.5,  # of about unit norm
            "rows": np.arange(first, first + n),
        }
        (folder / f"{shard:05d}").mkdir(parents=True)
        for key, (name, dtype) in FILES.items():
            parts[key].astype(dtype).tofile(folder / f"{shard:05d}" / name)
        counts.append(n)
        told(n)
    made_by = dict.fromkeys(MADE_OF, "random")
    sizes = {"N": rows, "L": tokens, "K": codes, "D": dim}
    write_json(folder / "meta.json", {**sizes, **made_by, "flip": False, "skipped": {}, "shards": counts})


def _flat_copy(store: TokenStore, folder: Path) -> None:
    """The tokens and embeddings of a store, each in one file."""
    folder.mkdir()
    for key in ("tokens", "embeds"):
        with open(folder / FILES[key][0], "wb") as stream:
            for part in store.arrays[key].parts:
                part.tofile(stream)


def _flat_arrays(folder: Path, store: TokenStore) -> dict[str, np.memmap]:
    return {key: np.memmap(folder / FILES[key][0], FILES[key][1], "r").reshape(len(store), -1) for key in ("tokens", "embeds")}


def _by_numpy(flat: dict[str, np.memmap], rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What a store gives, by plain indexing."""
    tokens = torch.from_numpy(flat["tokens"][rows].astype(np.int64))
    return tokens, torch.nn.functional.normalize(torch.from_numpy(flat["embeds"][rows].astype(np.float32)), dim=-1)


def _rate(read: Callable[[np.ndarray], object], chosen: np.ndarray) -> float:
    """Rows per second of batches of rows, chosen (batches, batch_size)."""
    start = time.perf_counter()
    for batch in chosen:
        read(batch)
    return chosen.size / (time.perf_counter() - start)


def _seconds(action: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def _forget(folder: Path) -> None:
    """Bring the files of a folder to disk and tell the kernel that their pages are not needed."""
    for path in sorted(folder.rglob("*.*")):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_through(folder: Path) -> None:
    for path in sorted(folder.rglob("*.*")):
        with open(path, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def in_a_process(what: str, *arguments: object, module: str = __name__) -> dict:
    """The JSON that a function of a module prints in a fresh process, which gives memory back as soon as it is freed."""
    command = f"import sys; from {module} import {what}; {what}(*sys.argv[1:])"
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc, which else keeps what is freed
    done = subprocess.run([sys.executable, "-c", command, *map(str, arguments)], env=os.environ | at_once, capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise ClipgenError(f"the process whose memory is measured has failed: {said[-1]}")
    return json.loads(done.stdout)


def resident() -> dict[str, int]:
    """Resident bytes of this process: its own, and of files that it has mapped."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {"own": status["RssAnon"], "files": status["RssFile"]}
    return {key: 1024 * int(text.split()[0]) for key, text in kilobytes.items()}


def print_memory(store: str, batch_size: str, batches: str) -> None:
    """Read random batches of a store and print what memory this process has then, as JSON."""
    opened = TokenStore.open(Path(store))
    chosen = np.random.default_rng(0).integers(0, len(opened), (int(batches), int(batch_size)))
    _rate(lambda rows: (opened.tokens(rows), opened.embeds(rows)), chosen)
    print(json.dumps(resident()))


@dataclass(frozen=True)
class _Weighed(Run):
    """A run that weighs its process whenever something is logged, which is after every step and every look at held-out rows."""

    found: list[dict[str, int]]

    def log(self, stage: str, step: int, **scalars: float) -> None:
        self.found.append(resident())
        super().log(stage, step, **scalars)


def print_training_memory(store: str, steps: str) -> None:
    """Take steps of the laptop preset's stage 2 on a store and print the most memory this process had after one, as JSON."""
    opened, laptop = TokenStore.open(Path(store)), load_preset("laptop")
    config = replace(laptop.transformer_train, steps=int(steps), centre=True, log_every=1, save_every=int(steps))
    vqgan = VQGAN(replace(laptop.vqgan, codebook_size=opened.meta["K"])).eval()
    with tempfile.TemporaryDirectory(dir=Path(store).parent) as place:
        run = _Weighed(Path(place), [])
        train_transformer(run, opened, opened, laptop.transformer, config, vqgan, ClipEmbedder.load(), show_progress=False,
                          text_mean=torch.zeros(opened.meta["D"]))  # fmt: skip
    print(json.dumps({key: max(seen[key] for seen in run.found) for key in ("own", "files")}))


def store_lines(found: dict) -> str:
    """The store benchmark as lines a person can read."""
    lines = [
        f"store of {found['rows']:,} rows ({found['bytes'] / 1e9:.1f} GB): opens in {found['open_seconds']['median']:.3f} s"
    ]
    for name, shown in (("store", "this store"), ("peer", "numpy on flat files")):
        warm = found[name]["warm"]
        lines.append(f"{shown}: {warm['median']:,.0f} rows/s in random batches of {found['batch_size']} ({warm['least']:,.0f} to {warm['most']:,.0f}); {found[name]['cold']:,.0f} from the disk")  # fmt: skip
    for key, shown in (("memory", "reading"), ("training_memory", f"training {found['training_steps']} steps")):
        sizes = ", ".join(f"{values['own'] / 1e6:.0f} MB at {int(n):,}" for n, values in found[key].items())
        lines.append(f"own memory of a process {shown}: {sizes} rows")
    return "\n".join(lines)
