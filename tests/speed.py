"""Speed of every stage beside what one would run instead: `make bench`, or `python tests/speed.py --only sampling`.

Each row times our way and a peer in turns (A B A B) within one run, by `torch.utils.benchmark`. It gives the median and the
interquartile range of the seconds of a call, and the ratio peer / ours: above 1 we are faster. Ratios hold on other machines
roughly, seconds do not. Weights are random where none come with the project, which costs the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.benchmark import Timer

from clipgen_lib import train_vqgan as stage1
from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import Preset, SampleConfig, TransformerConfig, VQGANConfig, load_preset
from clipgen_lib.data.batches import ordered_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import to_float
from clipgen_lib.metrics.distances import frechet_distance
from clipgen_lib.runtime.runs import RESULTS, Run, read_json, versions, write_json
from clipgen_lib.sample import filter_logits, generate
from clipgen_lib.store import extract
from clipgen_lib.train_transformer import Frozen, train_transformer
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

ENDLESS = 1_000_000  # training steps: the clock ends a training, not its configuration
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODEL = TransformerConfig(layers=6, width=512, heads=8)  # 27 million weights with 16,384 codes
CODES, TOKENS, CLIP_DIM = 16_384, 256, 512
SAMPLE = SampleConfig(guidance=1.0, top_k=500, top_p=0.95)
STRIDE = 16  # of the uncached way every 16th step is run, and its time counted 16 times
UNCACHED, GPT2, ENCODERS = "the whole prefix anew for every token", "Hugging Face GPT-2", "the encoders alone"
Way = Callable[[float], list[float]]  # takes the least seconds to spend; returns the seconds of each call


def timed(action: Callable[..., object], *arguments: object, factor: float = 1.0) -> Way:
    """A function with its arguments as a way; torch's Timer waits for a GPU and counts no first call."""
    timer = Timer("action()", globals={"action": partial(action, *arguments)}, num_threads=torch.get_num_threads())
    return lambda seconds: [factor * x for x in timer.blocked_autorange(min_run_time=seconds).times]


def training(train: Callable[..., object], device: str, **arguments: object) -> Way:
    """A training as it is (data, clipping, optimiser, EMA, log) as a way; a call is a step, the first three do not count."""

    def way(seconds: float) -> list[float]:
        times: list[float] = []

        class ClockedRun(Run):
            """Notes the time after each step instead of writing it down, and ends the training after a while."""

            def log(self, stage: str, step: int, **scalars: float) -> None:
                times.append(time.perf_counter())
                if len(times) > 4 and times[-1] - times[2] > seconds:
                    raise TimeoutError

        with tempfile.TemporaryDirectory() as place, suppress(TimeoutError):
            train(ClockedRun(Path(place), device=device), **arguments)
        return np.diff(times[2:]).tolist()

    return way


@contextmanager
def photos(n: int, width: int = 64, height: int = 64, seed: int = 0) -> Iterator[Path]:
    """A folder of n JPEG files of smooth random colours, of which 16 differ (with a seed all), in a temporary folder."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n if seed else 16, height // 8, width // 8, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        for i in range(n):
            Image.fromarray(small[i % len(small)]).resize((width, height), Image.BICUBIC).save(folder / f"{i:06d}.jpg")
        yield folder


class Table:
    """The rows measured so far, and how they are measured."""

    def __init__(self, device: str, dtypes: list[str], quick: bool):
        self.device, self.dtypes, self.quick, self.rows = device, dtypes, quick, []
        self.precision = {"float32": "no", "bfloat16": "bf16"}[dtypes[-1]]  # of the trainings
        self.seconds, self.rounds = (0.5, 1) if quick else (3.0, 3)  # of a turn; turns

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")

    def compare(self, section: str, name: str, ours: Way, peers: dict[str, Way | None], rounds: int = 3) -> None:
        """Time our way and its peers in turns, and add a row for each peer; None stands for one that is not installed."""
        ways = {"ours": ours} | {peer: way for peer, way in peers.items() if way}
        turns = [{key: way(self.seconds) for key, way in ways.items()} for _ in range(min(rounds, self.rounds))]
        for peer, way in peers.items():
            row = {"section": section, "name": name, "ours": summary([turn["ours"] for turn in turns])}
            row |= {"peer": {"name": peer}, "ratio": None, "unit": "s"}
            if way:
                row["peer"] |= summary([turn[peer] for turn in turns])
                ratios = [float(np.median(turn[peer]) / np.median(turn["ours"])) for turn in turns]
                row |= {"ratio": float(np.median(ratios)), "ratio_range": [min(ratios), max(ratios)]}
            self.rows.append(row)
            times = f"{row['peer']['median']:9.4g} s, ratio {row['ratio']:.3g}" if way else "not installed"
            print(f"{section:12} {name:32} {row['ours']['median']:9.4g} s, {peer}: {times}", flush=True)


def summary(rounds: list[list[float]]) -> dict[str, float]:
    """Median and interquartile range of the seconds of all calls, and how many there were."""
    seconds = np.concatenate(rounds)
    low, median, high = np.percentile(seconds, (25, 50, 75))
    return {"median": float(median), "iqr": float(high - low), "calls": len(seconds)}


def sampling(table: Table) -> None:
    """Seconds to sample a batch of token rows, with top-k 500 and top-p 0.95, in two dtypes."""
    length = TOKENS // 4 if table.quick else TOKENS
    torch.manual_seed(0)
    transformer = ImageTransformer(MODEL, CODES, length, CLIP_DIM).to(table.device).eval().requires_grad_(False)
    for dtype in table.dtypes:
        transformer = transformer.to(DTYPES[dtype])
        for batch in (1, 4, 16, 64):
            embeds = F.normalize(torch.randn(batch, CLIP_DIM), dim=1).to(table.device)
            ours = timed(generate, transformer, embeds, list(range(batch)), SAMPLE)
            peers = {UNCACHED: timed(uncached, transformer, embeds, factor=STRIDE)} if batch <= 4 else {}
            peers[GPT2] = gpt2_sampling(batch, length, DTYPES[dtype], table.device)
            table.compare("sampling", f"{dtype}, batch {batch}", ours, peers, rounds=2)


@torch.inference_mode()
def uncached(transformer: ImageTransformer, embeds: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L) with the whole prefix through the transformer for every token, at the middle one of each STRIDE steps."""
    tokens = torch.zeros(len(embeds), transformer.n_tokens, dtype=torch.long, device=embeds.device)
    for i in range(STRIDE // 2, transformer.n_tokens, STRIDE):
        logits = transformer(embeds, tokens[:, : i + 1])[:, -1].float()
        kept = filter_logits(logits, top_k=SAMPLE.top_k, top_p=SAMPLE.top_p)
        tokens[:, i] = torch.multinomial(kept.softmax(-1), 1)[:, 0]
    return tokens


def gpt2(length: int) -> torch.nn.Module | None:
    """Hugging Face's GPT-2 of the size of MODEL, without dropout; None where `transformers` is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes = {"n_embd": MODEL.width, "n_layer": MODEL.layers, "n_head": MODEL.heads, "n_positions": length + 1}
    others = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "pad_token_id"), 0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=CODES, bos_token_id=None, eos_token_id=None, **sizes, **others))


def gpt2_sampling(batch: int, length: int, dtype: torch.dtype, device: str) -> Way | None:
    """Its own sampling with its own cache; one token takes the place of the condition."""
    if model := gpt2(length):
        model = model.to(device, dtype).eval()
        start = torch.ones(batch, 1, dtype=torch.long, device=device)
        settings = {"do_sample": True, "top_k": SAMPLE.top_k, "top_p": SAMPLE.top_p, "max_new_tokens": length}
        settings |= {"min_new_tokens": length, "attention_mask": torch.ones_like(start)}
        return timed(lambda: model.generate(start, **settings))


def endless(preset: Preset, batch: int, precision: str) -> Preset:
    """The preset with one batch size for both trainings, whose discriminator has its full weight from the beginning."""
    changes = {"steps": ENDLESS, "save_every": ENDLESS, "log_every": 1, "batch_size": batch, "accumulate": 1}
    changes |= {"compile": False, "workers": 0, "precision": precision}
    perceptual = preset.vqgan_train.perceptual.replace("lpips", "clip")  # the weights of LPIPS may be absent
    vqgan = replace(preset.vqgan_train, adversarial_ramp=(0.0, 0.0), perceptual=perceptual, **changes)
    return replace(preset, vqgan_train=vqgan, transformer_train=replace(preset.transformer_train, **changes))


def transformer(table: Table) -> None:
    """A step of the transformer's training (4 rows of 256 tokens) beside one of GPT-2's."""
    clip = ClipEmbedder.load("shapes", device=table.device)
    codes = VQGANConfig(image_size=64, patch=4, channels=32, channel_mult=(1,), res_blocks=1, codebook_size=CODES)
    preset = endless(Preset(transformer=MODEL, vqgan=codes), 4, table.precision)
    preset = replace(preset, transformer_train=replace(preset.transformer_train, embedding_weight=0.0))
    vqgan = VQGAN(codes).to(table.device).eval().requires_grad_(False)
    with photos(64) as folder:
        store = extract(open_images(folder, "train", 64), vqgan, clip, folder.with_name("store"))
        inputs = {"stores": (store, store), "preset": preset, "frozen": Frozen(vqgan, clip)}
        ours = training(train_transformer, table.device, **inputs)
        table.compare("transformer", f"batch 4, {table.dtypes[-1]}", ours, {GPT2: gpt2_training(4, table)})


def gpt2_training(batch: int, table: Table) -> Way | None:
    """A step as Hugging Face's Trainer takes it: autocast, fused AdamW, clipped gradients; without an EMA."""
    if not (model := gpt2(TOKENS)):
        return None
    model = model.to(table.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, CODES, (batch, TOKENS), device=table.device)

    def step() -> None:
        with table.autocast():
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step)


def vqgan(table: Table) -> None:
    """A step of the VQGAN's training beside the bare forward and backward passes of its networks."""
    clip = ClipEmbedder.load("shapes", device=table.device)
    for name, batch in (("laptop", 16), ("gpu64", 3)):
        preset = endless(load_preset(name), batch, table.precision)
        with photos(64) as folder:
            images = open_images(folder, "train", 64)
            inputs = {"splits": (images, images), "preset": preset, "clip": clip}
            peers = {"bare forward and backward passes": bare_passes(preset, clip, table)}
            ours = training(stage1.train_vqgan, table.device, **inputs)
            table.compare("vqgan", f"{name}, batch {batch}, {table.dtypes[-1]}", ours, peers)


def bare_passes(preset: Preset, clip: ClipEmbedder, table: Table) -> Way:
    """Generator and discriminator once forward and backward: no optimiser, no adaptive weight, no EMA."""
    train, size, device = preset.vqgan_train, preset.vqgan.image_size, table.device
    generator = VQGAN(preset.vqgan).to(device).train()
    critic = stage1.PatchDiscriminator(train.discriminator_channels, train.discriminator_layers).to(device)
    images = torch.rand(train.batch_size, 3, size, size, device=device) * 2 - 1
    perceptual = stage1.perceptual_loss(train.perceptual, clip)

    def step() -> None:
        critic.requires_grad_(False)
        with table.autocast():
            fake, quantized = generator(images)
            loss = F.l1_loss(fake, images) + F.mse_loss(fake, images) + perceptual(images, fake)
            loss = loss - critic(fake).mean()
        (loss + quantized.codebook_loss + quantized.commitment_loss).backward()
        critic.requires_grad_(True)
        with table.autocast():
            real_logits, fake_logits = critic(torch.cat([images, fake.detach()])).chunk(2)
            loss = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
        loss.backward()
        generator.zero_grad()
        critic.zero_grad()

    return timed(step)


def extraction(table: Table) -> None:
    """Files to a token store beside both encoders alone on the same images in memory."""
    extraction_row(table, "laptop", 1_024, 64)
    extraction_row(table, "laptop", 256, 64, 640, 480)
    extraction_row(table, "gpu64", 48, 4)


def extraction_row(table: Table, preset: str, n: int, batch: int, width: int = 64, height: int = 64) -> None:
    vqgan = VQGAN(load_preset(preset).vqgan).to(table.device).eval().requires_grad_(False)
    clip, numbers = ClipEmbedder.load("shapes", device=table.device), count()
    with photos(n, width, height) as folder:
        images = open_images(folder)
        batches = [to_float(x).to(table.device) for _, x in ordered_batches(images, range(len(images)), batch)]
        ours = timed(lambda: extract(open_images(folder), vqgan, clip, folder.with_name(f"store{next(numbers)}")))
        bare = timed(lambda: [(vqgan.encode(x), clip.images(x)) for x in batches])
        table.compare("extraction", f"{preset}, {len(images)} JPEGs of {width}x{height}", ours, {ENCODERS: bare})


def frechet(table: Table) -> None:
    """The Frechet distance of two sets of 2,048 features beside pytorch-fid's, which must be the same to 1e-6."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    dim = 512 if table.quick else 2_048
    rng, scale = np.random.default_rng(0), np.linspace(0.1, 2, dim)
    sets = [rng.normal(size=(2 * dim, dim)) * scale for _ in range(2)]
    moments = [part for x in sets for part in (x.mean(0), np.cov(x, rowvar=False))]
    ours, peer = timed(frechet_distance, *moments), timed(calculate_frechet_distance, *moments)
    table.compare("frechet", f"{dim:,} dimensions", ours, {"pytorch-fid": peer}, rounds=1)
    if (difference := abs(frechet_distance(*moments) / calculate_frechet_distance(*moments) - 1)) > 1e-6:
        raise SystemExit(f"the Frechet distances differ by {difference:.2g} of their value")


def scoring(table: Table) -> None:
    """Whole processes that score two folders (tests/scoring.py) beside pytorch-fid; also the distance and peak memory of each.

    First with nothing known of either folder, then where the second has been a reference before.
    """
    n, found = 500 if table.quick else 5_000, {}

    def score(name: str, data: str, *folders: Path) -> None:
        words = [sys.executable, Path(__file__).parent / "scoring.py", name, *folders]
        with tempfile.TemporaryDirectory() as fresh:
            environment = os.environ | {"CLIPGEN_DATA": data or fresh}
            found[name] = json.loads(subprocess.run(words, capture_output=True, check=True, env=environment).stdout)

    with photos(n, seed=1) as a, photos(n, seed=2) as b, tempfile.TemporaryDirectory() as data:
        ours, known, peer = (
            timed(score, *words, a, b) for words in (("ours", ""), ("ours", data), ("pytorch-fid", ""))
        )
        for name, way in ((f"two folders of {n:,} images", ours), ("the same, one scored before", known)):
            table.compare("scoring", name, way, {"pytorch-fid": peer}, rounds=1)
            table.rows[-1]["found"] = dict(found)


def start(table: Table) -> None:
    """Whole processes, from their start to their end."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    python = lambda *words: timed(partial(subprocess.run, capture_output=True, check=True), [sys.executable, *words])
    nothing, networks = {"python -c pass": python("-c", "pass")}, "import torch, torchvision, open_clip"
    code = 'from clipgen_lib import TextToImage; TextToImage.from_pretrained("shapes")("a small red star")'
    table.compare("start", "import clipgen_lib", python("-c", "import clipgen_lib"), nothing)
    table.compare("start", "clipgen --help", python("-m", "clipgen_lib", "--help"), nothing)
    table.compare("start", "first image", python("-c", code), {networks: python("-c", networks)})


SECTIONS = (sampling, transformer, vqgan, extraction, frechet, scoring, start)


def machine(device: str) -> dict:
    """What was measured on: names, threads, versions, and what a large matrix product reaches."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = cpu.partition("model name\t: ")[2].partition("\n")[0] or "unknown"
    side = 8_192 if device == "cuda" else 1_024
    squares = {key: torch.randn(side, side, device=device).to(dtype) for key, dtype in DTYPES.items()}
    reached = {key: 2e-9 * side**3 / min(timed(torch.matmul, x, x)(0.5)) for key, x in squares.items()}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else name,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "matmul_gflops": reached,
        "versions": {key: versions()[key] for key in ("python", "torch", "numpy")},
    }


def main() -> None:
    names = [section.__name__ for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=names, action="append", help="measure this section; may be repeated")
    parser.add_argument("--quick", action="store_true", help="less time for each row, smaller sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", type=Path, help="json file  [default: results/speed/cpu.json or gpu.json]")
    chosen = parser.parse_args()
    output = chosen.output or RESULTS / "speed" / ("gpu.json" if chosen.device == "cuda" else "cpu.json")
    os.environ["CLIPGEN_PROGRESS"] = "0"
    found, wanted = {"machine": machine(chosen.device), "rows": []}, chosen.only or names
    reached = found["machine"]["matmul_gflops"]  # an old CPU takes hours in bfloat16: it is left out there
    table = Table(chosen.device, [key for key in DTYPES if reached[key] > reached["float32"] / 2], chosen.quick)
    if chosen.only and output.exists():  # rows of other sections stay
        found["rows"] = [row for row in read_json(output)["rows"] if row["section"] not in wanted]
    for section in SECTIONS:
        if section.__name__ in wanted:
            section(table)
    write_json(output, found | {"rows": sorted(found["rows"] + table.rows, key=lambda r: names.index(r["section"]))})


if __name__ == "__main__":
    main()
