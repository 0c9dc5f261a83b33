"""The conditional transformer: p(tokens | embedding), one token after the other.

In: embeddings (B, D) of unit norm, tokens (B, T) int64. Out: logits (B, T, K), position i predicts token i.
Axes: B batch, L tokens of an image, T <= L of them, K codebook size, D CLIP dimension, E width, N condition tokens.

One concrete sequence, N = 1: the transformer reads [c, t0, t1, ..., t(L-2)] and predicts [t0, t1, ..., t(L-1)], so
token t(L-1) is predicted and never read. The unconditional case is the zero vector in place of an embedding.
Blocks are pre-norm with learned positions, fused q/k/v, exact GELU and biases, the GPT of the released CLIP-GEN model.
With `conditioning="adaln"` the embedding comes in by adaptive layer norm in every block instead (adaLN-Zero of DiT,
arXiv 2212.09748), and the N inputs before the first token are learned. With "words" N text tokens (B, N) int64 take the
embedding's place, for the supervised system of the comparison, and D is the size of their vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from .config import SampleConfig
from .runtime.kernels import PackedLinear, attend, largest
from .runtime.runs import ClipgenError, progress
from .store import nearest
from .transformer import Block, ImageTransformer, KVCache


class DecodingBlock:
    """A block for one position at a time, its weights packed."""

    def __init__(self, block: Block):
        self.norm1, self.norm2, self.heads = block.norm1, block.norm2, block.heads
        self.qkv, self.proj, self.fc1, self.fc2 = map(PackedLinear, (block.qkv, block.proj, block.fc1, block.fc2))

    def __call__(
        self, x: torch.Tensor, cache: KVCache, layer: int, change: tuple[torch.Tensor, ...] | None
    ) -> torch.Tensor:
        """x: (B, E). change: shift, scale and gate (B, E) of both halves, of adaptive layer norm only."""
        if change is None:
            x = self.proj.add(self._attend(self.norm1(x), cache, layer), x)
            return self.fc2.add(self.fc1.gelu(self.norm2(x)), x)
        shift1, scale1, gate1, shift2, scale2, gate2 = change
        x = x + gate1 * self.proj(self._attend(self.norm1(x) * (1 + scale1) + shift1, cache, layer))
        return x + gate2 * self.fc2(self.fc1.gelu(self.norm2(x) * (1 + scale2) + shift2))

    def _attend(self, x: torch.Tensor, cache: KVCache, layer: int) -> torch.Tensor:
        qkv = self.qkv(x).view(len(x), 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, heads, 1, E / heads)
        k, v = cache.extend(layer, qkv[1:])
        return attend(qkv[0].to(k.dtype), k, v).to(x.dtype).view(len(x), -1)


class Decoder:
    """The transformer one position after the other, for sampling: what `forward` gives, up to rounding, without gradients.

    Its weights are those of the moment it is made. `start` a batch, then `step` from token to token.
    """

    def __init__(self, transformer: ImageTransformer):
        self.transformer = transformer
        self.blocks = [DecodingBlock(block) for block in transformer.blocks]
        self.head = PackedLinear(transformer.head)

    def start(self, embeds: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of the first token behind the known ones.

        Args:
            embeds: (B, D), as in the transformer's forward.
            known: (B, T) int64, T < L.
        """
        model = self.transformer
        self.cache, self.changes = KVCache(model, len(embeds)), [None] * len(self.blocks)
        if model.adaptive:  # the same at every position
            condition = F.silu(model._condition(embeds)[:, 0])
            self.changes = [block.modulation(condition).chunk(6, dim=-1) for block in model.blocks]
        return model(embeds, F.pad(known, (0, 1)), self.cache)[:, -1]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read the next token of each row, (B,) int64; logits (B, K) float of the one after it."""
        model = self.transformer
        x = F.embedding(tokens, model.token_embedding.weight) + model.positions[0, self.cache.length]
        for layer, (block, change) in enumerate(zip(self.blocks, self.changes, strict=True)):
            x = block(x, self.cache, layer, change)
        self.cache.length += 1
        return self.head(model.norm(x)).float()


Seed = int | tuple[int, int]  # a pair names a candidate: (seed of the image, number of the candidate)


def filter_logits(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Divide by the temperature, then keep the k likeliest tokens, then the smallest set of probability >= p.

    Args:
        logits: (B, K) float32 or float64. Not changed in place.
        top_k: 0 keeps all.
        top_p: 1 keeps all (nucleus sampling, arXiv 1904.09751).

    Returns:
        (B, K) with -inf where a token is dropped; the likeliest token always stays, and so does every token that is as
        likely as the last one kept.
    """
    if temperature <= 0:
        raise ClipgenError(f"temperature is {temperature}: use a value above 0 (top_k=1 takes the likeliest token)")
    if not 0 < top_p <= 1 or top_k < 0:
        raise ClipgenError(f"top_p is {top_p} and top_k {top_k}: use 0 < top_p <= 1 and top_k >= 0")
    logits = logits / temperature
    kept = min(top_k or logits.shape[-1], logits.shape[-1])
    if kept == logits.shape[-1] and top_p == 1:
        return logits
    likeliest = largest(logits, kept)
    last = likeliest[..., -1:]
    if top_p < 1:
        probabilities = likeliest.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens
        last = likeliest.gather(-1, (before < top_p).sum(-1, keepdim=True) - 1)
    return logits.masked_fill(logits < last, -torch.inf)


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance on logits: u + scale * (c - u); scale 1 is the conditional model."""
    return unconditional + scale * (conditional - unconditional)


def guidance_at(position: int, length: int, settings: SampleConfig) -> float:
    """The guidance scale of one token: `guidance`, or on its way there from 1; 1 outside the interval.

    `linear` and `cosine` rise over the image (schedules of arXiv 2404.13040, over tokens here instead of noise levels).
    """
    share = position / max(length - 1, 1)
    first, last = settings.guidance_interval
    if not first <= share <= last:
        return 1.0
    rise = {"constant": 1.0, "linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2}[settings.guidance_schedule]
    return 1 + (settings.guidance - 1) * rise


def project(embeds: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
    """Replace each embedding (B, D) by the mean of its k nearest in a bank (M, D), of unit norm again.

    Brings a text embedding to where image embeddings lie, without a text in training (the retrieval of
    KNN-Diffusion, arXiv 2204.02849, as a mean).
    """
    return F.normalize(bank[nearest(bank, embeds, k)].mean(1), dim=-1)


def pick(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample a token for each row by inverting the cumulative distribution at one uniform number.

    Args:
        logits: (B, K), -inf where dropped.
        uniform: (B,) in [0, 1).

    Returns:
        (B,) int64.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    position = torch.searchsorted(cumulative, (uniform[:, None] * cumulative[:, -1:]), right=True)
    return position.squeeze(1).clamp(max=logits.shape[-1] - 1)


def row_noise(seeds: list[Seed], length: int, device: torch.device) -> torch.Tensor:
    """(B, length) float64 uniforms, each row a function of its own seed."""
    rows = [np.random.default_rng(seed).random(length) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).to(device)


@torch.inference_mode()
def generate(
    transformer: ImageTransformer,
    embeds: torch.Tensor,
    seeds: list[Seed],
    settings: SampleConfig,
    show_progress: bool = False,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample tokens for each embedding.

    Args:
        embeds: (B, D) of unit norm.
        seeds: one for each row; the same embedding and seed give the same tokens in a batch of any size.
        known: the first tokens of each row, (B, T) int64 with T < L; only those behind them are drawn.

    Returns:
        (B, L) int64.
    """
    return deque(token_by_token(transformer, embeds, seeds, settings, show_progress, known), maxlen=1).pop()


@torch.inference_mode()
def token_by_token(
    transformer: ImageTransformer,
    embeds: torch.Tensor,
    seeds: list[Seed],
    settings: SampleConfig,
    show_progress: bool = False,
    known: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """The sampling loop, with a look at its tokens after every step; arguments are those of `generate`.

    Yields:
        (B, L) int64, -1 where nothing is drawn yet; the same tensor each time, so copy what is to be kept.
    """
    if len(seeds) != len(embeds):
        raise ClipgenError(f"{len(seeds)} seeds for {len(embeds)} embeddings: give one for each")
    if transformer.training:
        raise ClipgenError("the transformer is in training mode: call .eval() before sampling")
    tokens = torch.full((len(embeds), transformer.n_tokens), -1, device=embeds.device)
    first = 0 if known is None else _place_known(tokens, known, transformer.codebook_size)
    decoder = Decoder(transformer)
    with progress(len(embeds) * (transformer.n_tokens - first), "sampling", show_progress) as bar:
        for start in range(0, len(embeds), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            for i, choice in _batch_steps(decoder, embeds[part], seeds[part], settings, tokens[part, :first]):
                tokens[part, i] = choice
                bar.update(len(choice))
                yield tokens


def _place_known(tokens: torch.Tensor, known: torch.Tensor, codebook_size: int) -> int:
    """Write known tokens (B, T) to the front of (B, L) and return T."""
    if len(known) != len(tokens) or known.shape[1] >= tokens.shape[1]:
        raise ClipgenError(
            f"known tokens are {tuple(known.shape)}: give a row for each of the {len(tokens)} embeddings, shorter than the {tokens.shape[1]} of an image"
        )
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < codebook_size:
        raise ClipgenError(
            f"known tokens lie outside 0 to {codebook_size - 1}: use those of the VQGAN that this transformer was trained with"
        )
    tokens[:, : known.shape[1]] = known
    return known.shape[1]


def _batch_steps(decoder, embeds, seeds, settings, known) -> Iterator[tuple[int, torch.Tensor]]:
    """Position and tokens (B,) of each step of one batch."""
    guided, first, length = settings.guidance != 1, known.shape[1], decoder.transformer.n_tokens
    if guided:  # both halves in one forward pass
        embeds, known = torch.cat([embeds, torch.zeros_like(embeds)]), known.repeat(2, 1)
    noise = row_noise(seeds, length, embeds.device)
    logits = decoder.start(embeds, known)
    for i in range(first, length):
        if guided:
            logits = guide(*logits.chunk(2), guidance_at(i, length, settings))
        choice = pick(filter_logits(logits, settings.temperature, settings.top_k, settings.top_p), noise[:, i])
        yield i, choice
        if i + 1 < length:
            logits = decoder.step(choice.repeat(2) if guided else choice)
