"""Speed of sampling beside the uncached form, Hugging Face's GPT-2 and the machine's bandwidth: a section of `clipgen bench`.

Axes: B batch, T tokens known so far, K codebook size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .config import SampleConfig, TransformerConfig, replace_fields
from .sample import filter_logits, generate, pick, row_noise
from .timing import ABSENT, DTYPES, in_turns, peers, profiled, ratio, row, spread, waiter
from .transformer import ImageTransformer

# 27 million weights
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
WAYS = {"uncached": "the whole prefix anew for every token", "huggingface": "Hugging Face GPT-2 with its cache"}


def sampling(
    device: torch.device, limits: dict, rounds: int = 3, batches: tuple[int, ...] = (1, 4, 16, 64), model: TransformerConfig = MODEL,
    codes: int = CODES, length: int = TOKENS,
) -> dict:  # fmt: skip
    """Seconds to draw a batch of token rows with random weights: ours, without a cache, by Hugging Face, with guidance.

    Args:
        limits: what `timing.limits` gave.

    Returns:
        `table`, `rounds`, `uncached_stride` and `details`, with the seconds and the profile of each dtype and batch.
    """
    found: dict = {"table": [], "rounds": rounds, "uncached_stride": STRIDE, "details": []}
    torch.manual_seed(0)
    transformer = ImageTransformer(model, codes, length, CLIP_DIM).to(device).eval().requires_grad_(False)
    for dtype in DTYPES:
        transformer = transformer.to(DTYPES[dtype])
        least = read_bytes(transformer) * length / limits["copy"]
        for batch in batches:
            what, ours = f"{dtype}, batch {batch}", drawing(transformer, batch, DRAWN)
            actions = {"ours": ours}
            if batch in GOALS["uncached"]:
                actions["uncached"] = partial(uncached, transformer, batch, DRAWN, STRIDE)
            if peers()["transformers"] != ABSENT:
                actions["huggingface"] = huggingface(model, codes, length, batch, DTYPES[dtype], device)
            seconds = in_turns(actions, rounds, waiter(device), label=f"sampling, {what}")
            seconds |= {"uncached": [STRIDE * value for value in seconds["uncached"]]} if "uncached" in seconds else {}
            for name in actions.keys() - {"ours"}:
                found["table"].append(row(what, WAYS[name], ratio(seconds["ours"], seconds[name]), GOALS[name].get(batch)))
            reached = spread([least / value for value in seconds["ours"]])
            found["table"].append(row(what, "of the bandwidth limit", reached, GOALS["limit"].get(batch), unit="%"))
            found["details"].append({
                "dtype": dtype, "batch": batch, "seconds": {name: spread(values) for name, values in seconds.items()},
                "limit_seconds": least, "bytes": read_bytes(transformer) * length, "profile": profiled(ours, device),
                "operations": 2 * batch * length * read_bytes(transformer) // transformer.head.weight.element_size(),
            })  # fmt: skip
        found["table"] += _guidance(transformer, dtype, rounds, device)
    return found


def _guidance(transformer: ImageTransformer, dtype: str, rounds: int, device: torch.device, batch: int = 4) -> list[dict]:
    """Guided seconds as a share of those of as many rows of the transformer, and of as many pictures, without guidance."""
    guided = replace_fields(DRAWN, {"guidance": 3.0})
    actions = {
        "guided": drawing(transformer, batch, guided),
        f"time of {2 * batch} rows without": drawing(transformer, 2 * batch, DRAWN),
        f"time of {batch} rows without": drawing(transformer, batch, DRAWN),
    }
    seconds = in_turns(actions, rounds, waiter(device), label=f"sampling, {dtype}, guidance")
    what, asked = f"{dtype}, guided batch {batch}", (GUIDED, None)
    return [row(what, peer, ratio(seconds[peer], seconds["guided"]), goal, most=True)
            for peer, goal in zip(list(actions)[1:], asked, strict=True)]  # fmt: skip


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
    peer = gpt2(model, codes, length).to(device, dtype).eval()
    start = torch.ones(batch, 1, dtype=torch.long, device=device)
    settings = {"do_sample": True, "top_k": DRAWN.top_k, "top_p": DRAWN.top_p, "temperature": DRAWN.temperature}
    mask = torch.ones_like(start)
    return lambda: peer.generate(start, attention_mask=mask, max_new_tokens=length, min_new_tokens=length, **settings)


def gpt2(model: TransformerConfig, codes: int, length: int) -> torch.nn.Module:
    """Hugging Face's GPT-2 of the same size, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes = GPT2Config(vocab_size=codes, n_positions=length + 1, n_embd=model.width, n_layer=model.layers, n_head=model.heads,
                       bos_token_id=None, eos_token_id=None, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return GPT2LMHeadModel(sizes)
