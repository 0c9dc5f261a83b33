"""Speed of the stages beside what one would run instead: `clipgen bench`.

In: a device. Out: seconds as medians with their spread, ratios to peers that ran in turns with us (A B A B), and shares of
what the machine itself reaches, measured in the same run. Absolute seconds hold for this machine and this moment only.
A section is a function of a device that returns a dict; `SECTIONS` names them, and `run` puts them into one file.
Axes: B batch, T tokens known so far, K codebook size.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .config import SampleConfig, TransformerConfig, replace_fields
from .runs import read_json, versions, write_json
from .sample import filter_logits, generate, pick, row_noise
from .transformer import ImageTransformer

PEERS = ("transformers",)  # of the extra `bench`; what is absent is named in the result
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The sampled transformer: 27 million weights
MODEL = TransformerConfig(layers=6, width=512, heads=8, condition_tokens=1)
CODES, TOKENS, CLIP_DIM = 16_384, 256, 512
DRAWN = SampleConfig(guidance=1.0, top_k=500, top_p=0.95)
STRIDE = 16  # of the uncached way every 16th step is run, and its time counted 16 times

GOALS = {  # at least so many times as fast as a peer, or that share of the limit, by batch
    "uncached": {1: 8.0, 4: 15.0},
    "huggingface": {1: 1.8, 4: 1.8, 16: 1.5, 64: 1.5},
    "limit": {1: 0.6},
}
GUIDED = 1.3  # times the seconds of as many rows without guidance, at most


# ---------------------------------------------------------------------------------------------- harness


def in_turns(
    actions: dict[str, Callable[[], object]], rounds: int, wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each action in each round, all actions in every round, after one call of each that does not count.

    Args:
        wait: called before a clock is read, such as `torch.cuda.synchronize`.
    """
    for action in actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            wait()
            start = clock()
            action()
            wait()
            seconds[name].append(clock() - start)
    return seconds


def spread(values: list[float], times: float = 1.0) -> dict[str, float]:
    """Median, least and most of values, each `times` as large."""
    return {"median": times * float(np.median(values)), "least": times * min(values), "most": times * max(values)}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times as long they take as we do: the median over rounds, each pair measured at the same time, and its spread."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def waiter(device: torch.device) -> Callable[[], object]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


@torch.inference_mode()
def matmul_peak(device: torch.device, rounds: int = 10) -> dict[str, float]:
    """Operations a second of a large square matrix product, the best of some, by the name of its dtype.

    float32 as torch is set: on a GPU without TF32 unless that is switched on, while convolutions may use it.
    """
    side = 8_192 if device.type == "cuda" else 2_048
    squares = {name: torch.randn(side, side, device=device).to(dtype) for name, dtype in DTYPES.items()}
    seconds = in_turns({name: partial(torch.matmul, x, x) for name, x in squares.items()}, rounds, waiter(device))
    return {name: 2 * side**3 / min(values) for name, values in seconds.items()}


def limits(device: torch.device, rounds: int = 5) -> dict:
    """What the machine reaches: `matmul_peak`, and bytes/s, read and written, of a copy of 256 MB, a median."""
    source = torch.randn(256 * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = in_turns({"copy": lambda: target.copy_(source)}, rounds, waiter(device))["copy"]
    peaks = {f"matmul_{name}": value for name, value in matmul_peak(device).items()}
    return {**peaks, "copy": 2 * source.nbytes / float(np.median(seconds))}


def cpu_name() -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def machine(device: torch.device) -> dict:
    """What was measured on, and how much other work it had: the load of the last minute, in processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    found = {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    return {**found, "versions": {name: versions()[name] for name in ("python", "torch", "numpy")}, "peers": peers()}


def peers() -> dict[str, str]:
    """Version of each peer, or that it is absent."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent: install the extra `bench`"
    return found


def profiled(action: Callable[[], object], device: torch.device, top: int = 8) -> dict[str, float]:
    """Shares of the time of one call by operation, the largest first; on a GPU by kernel."""
    from torch.profiler import ProfilerActivity, profile

    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as profiler:
        action()
    times = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    total = sum(times.values())
    return {name: times[name] / total for name in sorted(times, key=times.get, reverse=True)[:top]}


def run(only: tuple[str, ...], output: Path, device: torch.device, **options: object) -> dict:
    """Run sections and write them to cpu.json or gpu.json in a folder; sections that are there already and not run stay.

    Returns:
        what the file holds: a dict for each section, with the machine and its limits in the same run.
    """
    path = output / ("gpu.json" if device.type == "cuda" else "cpu.json")
    found = read_json(path) if path.exists() else {}
    for name in only or SECTIONS:
        before = machine(device)
        measured = SECTIONS[name](device, limits(device), **options)
        found[name] = {"machine": {**before, "load_after": os.getloadavg()[0]}, **measured}
        write_json(path, found)
    return found


# ---------------------------------------------------------------------------------------------- sampling


def sampling(
    device: torch.device, reached: dict, batches: tuple[int, ...] = (1, 4, 16), rounds: int = 3, model: TransformerConfig = MODEL,
    codes: int = CODES, length: int = TOKENS,
) -> dict:  # fmt: skip
    """Seconds to draw a batch of token rows with random weights: ours, without a cache, by Hugging Face, with guidance.

    Args:
        reached: what `limits` gave.

    Returns:
        `limits`, `rows`, one for each dtype and batch, and `guidance`, one for each dtype.
    """
    found: dict = {"limits": reached, "rounds": rounds, "uncached_stride": STRIDE, "rows": [], "guidance": []}
    torch.manual_seed(0)
    transformer = ImageTransformer(model, codes, length, CLIP_DIM).to(device).eval().requires_grad_(False)
    for dtype in DTYPES:
        transformer = transformer.to(DTYPES[dtype])
        least = read_bytes(transformer) * length / reached["copy"]
        for batch in batches:
            ours = drawing(transformer, batch, DRAWN)
            actions = {"ours": ours}
            if batch in GOALS["uncached"]:
                actions["uncached"] = partial(uncached, transformer, batch, DRAWN, STRIDE)
            if "absent" not in peers()["transformers"]:
                actions["huggingface"] = huggingface(model, codes, length, batch, DTYPES[dtype], device)
            seconds = in_turns(actions, rounds, waiter(device))
            if "uncached" in seconds:
                seconds["uncached"] = [STRIDE * value for value in seconds["uncached"]]
            ratios = {name: ratio(seconds["ours"], values) for name, values in seconds.items() if name != "ours"}
            ratios["limit"] = spread([least / value for value in seconds["ours"]])
            found["rows"].append({
                "dtype": dtype, "batch": batch, "seconds": {name: spread(values) for name, values in seconds.items()},
                "limit_seconds": least, "ratios": ratios, "profile": profiled(ours, device),
            })  # fmt: skip
        found["guidance"].append({"dtype": dtype, **_guidance(transformer, rounds, device)})
    return found


def _guidance(transformer: ImageTransformer, rounds: int, device: torch.device, batch: int = 4) -> dict:
    """Guided seconds against those of as many rows of the transformer, and of as many pictures, without guidance."""
    guided = replace_fields(DRAWN, {"guidance": 3.0})
    actions = {
        "guided": drawing(transformer, batch, guided),
        "rows": drawing(transformer, 2 * batch, DRAWN),
        "pictures": drawing(transformer, batch, DRAWN),
    }
    seconds = in_turns(actions, rounds, waiter(device))
    return {"batch": batch, **{f"of_{name}": ratio(seconds[name], seconds["guided"]) for name in ("rows", "pictures")}}


def read_bytes(transformer: ImageTransformer) -> int:
    """Bytes of the weights that every step reads in full: blocks, last norm, head."""
    parts = (*transformer.blocks, transformer.norm, transformer.head)
    return sum(weight.nbytes for part in parts for weight in part.parameters())


def drawing(transformer: ImageTransformer, batch: int, settings: SampleConfig) -> Callable[[], torch.Tensor]:
    """Our way: tokens (B, L) of pictures with seeds 0 to B - 1."""
    embeds = directions(transformer, batch)
    return lambda: generate(transformer, embeds, list(range(batch)), settings)


def directions(transformer: ImageTransformer, batch: int) -> torch.Tensor:
    """Embeddings (B, D) of unit norm, the same at each call."""
    draw = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(batch, transformer.clip_dim, generator=draw), dim=1).to(transformer.head.weight.device)


@torch.inference_mode()
def uncached(transformer: ImageTransformer, batch: int, settings: SampleConfig, stride: int = 1) -> torch.Tensor:
    """The plain way, as HFAiLab/clip-gen samples: the whole prefix through the transformer for every token.

    Args:
        stride: only the middle one of so many steps is run; the others take token 0. 1 gives the tokens of `generate`.
    """
    embeds, length = directions(transformer, batch), transformer.n_tokens
    tokens = torch.zeros(batch, length, dtype=torch.long, device=embeds.device)
    noise = row_noise(list(range(batch)), length, embeds.device)
    for i in range(stride // 2, length, stride):
        logits = transformer(embeds, tokens[:, : i + 1])[:, -1]
        tokens[:, i] = pick(filter_logits(logits, settings.temperature, settings.top_k, settings.top_p), noise[:, i])
    return tokens


def huggingface(
    model: TransformerConfig, codes: int, length: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], torch.Tensor]:
    """Hugging Face's GPT-2 of the same size with its own cache and sampling; one token takes the place of the condition."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = GPT2Config(vocab_size=codes, n_positions=length + 1, n_embd=model.width, n_layer=model.layers, n_head=model.heads,
                        bos_token_id=None, eos_token_id=None, pad_token_id=0)  # fmt: skip
    peer = GPT2LMHeadModel(config).to(device, dtype).eval()
    start = torch.ones(batch, 1, dtype=torch.long, device=device)
    settings = {"do_sample": True, "top_k": DRAWN.top_k, "top_p": DRAWN.top_p, "temperature": DRAWN.temperature}
    mask = torch.ones_like(start)
    return lambda: peer.generate(start, attention_mask=mask, max_new_tokens=length, min_new_tokens=length, **settings)


def lines_of(found: dict) -> str:
    """The tables of a results file, every goal beside what was reached."""
    return "\n\n".join(LINES[name](part) for name, part in found.items() if name in LINES)


def sampling_lines(found: dict) -> str:
    """Times as fast as each peer and share of the bandwidth limit, with least and most of the rounds, and the goals."""
    lines = [f"sampling {TOKENS} tokens; medians of {found['rounds']} rounds in turns (least to most), goals in brackets"]
    lines.append(f"{'dtype':10}{'batch':>5}{'seconds':>9}" + "".join(f"{name:>28}" for name in GOALS))
    for row in found["rows"]:
        cells = [_cell(row["ratios"].get(name), goals.get(row["batch"])) for name, goals in GOALS.items()]
        lines.append(f"{row['dtype']:10}{row['batch']:>5}{row['seconds']['ours']['median']:>9.2f}" + "".join(f"{cell:>28}" for cell in cells))  # fmt: skip
    for row in found["guidance"]:
        rows, pictures = (_cell(row[key], None) for key in ("of_rows", "of_pictures"))
        lines.append(f"{row['dtype']}, guided batch {row['batch']}: {rows} times {2 * row['batch']} rows without [at most {GUIDED}], {pictures} times {row['batch']} pictures without")  # fmt: skip
    where = found["machine"]
    peak = ", ".join(f"matmul {name} {found['limits'][f'matmul_{name}'] / 1e9:.0f} GFLOP/s" for name in DTYPES)
    lines.append(f"{where['device']}, {where['threads']} threads, load {where['load']:.1f} to {where['load_after']:.1f}; {peak}, copy {found['limits']['copy'] / 1e9:.1f} GB/s")  # fmt: skip
    return "\n".join(lines + [f"peer {name}: {version}" for name, version in where["peers"].items()])


def _cell(value: dict[str, float] | None, goal: float | None) -> str:
    if value is None:
        return "-"
    return f"{value['median']:.2f} ({value['least']:.2f} to {value['most']:.2f})" + (f" [{goal:g}]" if goal else "")


SECTIONS: dict[str, Callable[..., dict]] = {"sampling": sampling}
LINES: dict[str, Callable[[dict], str]] = {"sampling": sampling_lines}
