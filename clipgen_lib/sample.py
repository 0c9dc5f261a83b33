"""Sampling: from embeddings to tokens, one token after the other.

In: embeddings (B, D) of unit norm and a seed for each row. Out: tokens (B, L) int64.
Axes: B batch, L tokens of an image, K codebook size, D CLIP dimension, E width.

Every step takes the logits of the next token, guides them away from the unconditional ones, drops unlikely tokens, and
inverts the cumulative distribution at one uniform number. These numbers are a function of the row's own seed, so the
same embedding and seed give the same tokens in a batch of any size.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from .clip_embed import ClipEmbedder
from .config import SampleConfig
from .runtime.kernels import PackedLinear, attend, largest
from .runtime.runs import ClipgenError
from .store import nearest
from .transformer import Block, ImageTransformer, KVCache, turned
from .vqgan import VQGAN

Seed = int | tuple[int, int]  # a pair is a candidate: (seed of the image, number from 1); number 0 is the seed alone


def filter_logits(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Divide by the temperature, then keep the k likeliest tokens, then the smallest set of probability >= p.

    Args:
        logits: (B, K) float32 or float64. Not changed in place.
        top_k: 0 keeps all.
        top_p: 1 keeps all (nucleus sampling, arXiv 1904.09751).

    Returns (B, K) with -inf where a token is dropped. The likeliest token always stays, and so does every token that is as
    likely as the last one kept. Raises ClipgenError: temperature, top_k or top_p is out of range.
    """
    if temperature < 1e-3:
        raise ClipgenError(f"temperature is {temperature}: use a value above 0.001 (top_k=1 takes the likeliest token)")
    if not 0 < top_p <= 1 or top_k < 0:
        raise ClipgenError(f"top_p is {top_p} and top_k {top_k}: use 0 < top_p <= 1 and top_k >= 0")
    logits = logits / temperature
    n_kept = min(top_k or logits.shape[-1], logits.shape[-1])
    if n_kept == logits.shape[-1] and top_p == 1:
        return logits
    likeliest = largest(logits, n_kept)  # (B, n_kept), falling
    threshold = likeliest[..., -1:]
    if top_p < 1:
        probabilities = likeliest.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens
        threshold = likeliest.gather(-1, (before < top_p).sum(-1, keepdim=True) - 1)
    return logits.masked_fill(logits < threshold, -torch.inf)


def guidance_at(position: int, length: int, settings: SampleConfig) -> float:
    """The guidance scale of the token at `position` of `length`; 1 outside of `guidance_interval`.

    `constant` is `guidance` everywhere; `linear` and `cosine` rise from 1 to `guidance` over the image (the schedules of
    arXiv 2404.13040, over tokens here instead of noise levels).
    """
    share = position / max(length - 1, 1)
    first, last = settings.guidance_interval
    if not first <= share <= last:
        return 1.0
    rise = {"constant": 1.0, "linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2}[settings.guidance_schedule]
    return 1 + (settings.guidance - 1) * rise


def mean_of_nearest(embeds: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
    """Replace each embedding (B, D) by the mean of its k nearest in a bank (M, D), of unit norm again.

    Brings a text embedding to where image embeddings lie, without a text in training (the retrieval of
    KNN-Diffusion, arXiv 2204.02849, as a mean).
    """
    return F.normalize(bank[nearest(bank, embeds, k)].mean(1), dim=-1)


def aligned(embeds: torch.Tensor, moments: torch.Tensor, way: str) -> torch.Tensor:
    """Move text embeddings (B, D) to where image embeddings lie, by unpaired statistics, of unit norm again.

    `moments` (4, D) are mean and standard deviation of images' embeddings, then of texts'. `shift` adds the difference of the
    means; `standardise` gives each dimension the images' deviation, too (per-modality standardisation, I0T, arXiv 2412.14384).
    """
    image_mean, image_std, text_mean, text_std = moments.to(embeds.dtype)
    scale = image_std / text_std.clamp_min(1e-6) if way == "standardise" else 1.0
    return F.normalize(image_mean + scale * (embeds - text_mean), dim=-1)


def slerp(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """The point at `share` of the way from unit vectors a (..., D) to b along the great circle between them.

    0 gives a and 1 gives b, exactly; equal shares are equal angles, and every point is of unit norm. Raises
    ClipgenError: a and b point in opposite directions, so that no way is the shortest.
    """
    half = torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))  # exact at small angles
    if bool((half > math.pi / 2 - 1e-4).any()):
        raise ClipgenError("the embeddings point in opposite directions, nothing lies between: choose others")
    turns = 2 * half / math.pi  # in half turns, the unit of sinc: sin(s x) / sin(x) = s sinc(s x) / sinc(x), also at 0
    left, right = (s * torch.sinc(s * turns) / torch.sinc(turns) for s in (1 - share, share))
    return left * a + right * b


def best_of(clip: ClipEmbedder, candidates: list[torch.Tensor], embeds: torch.Tensor) -> torch.Tensor:
    """Of some candidates (P, 3, H, W) for each of P prompts the nearest to its CLIP embedding (P, D): (P, 3, H, W)."""
    images, best = torch.stack(candidates, dim=1), []  # (P, candidates, 3, H, W)
    for part, embed in zip(images.split(64), embeds.split(64), strict=True):
        shown = clip.images(part.flatten(0, 1)).view(*part.shape[:2], -1)  # (P, candidates, D)
        scores = torch.einsum("pnd,pd->pn", shown, embed)
        best.append(part[torch.arange(len(part), device=part.device), scores.argmax(1)])
    return torch.cat(best)


def seeded_uniforms(seeds: list[Seed], length: int, device: torch.device) -> torch.Tensor:
    """(B, length) float64 in [0, 1), each row a function of its own seed."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(length) for seed in seeds])).to(device)


def sample_token(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample a token for each row, (B,) int64, by inverting the cumulative distribution at one uniform number.

    Args:
        logits: (B, K), -inf where a token is dropped.
        uniform: (B,) in [0, 1).
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return tokens.squeeze(1).clamp(max=logits.shape[-1] - 1)


class CachedBlock:
    """A transformer block for one position at a time, with packed weights."""

    def __init__(self, block: Block):
        self.norm1, self.norm2, self.heads = block.norm1, block.norm2, block.heads
        self.q_norm, self.k_norm = block.q_norm, block.k_norm
        self.qkv, self.proj, self.fc1, self.fc2 = map(PackedLinear, (block.qkv, block.proj, block.fc1, block.fc2))

    def __call__(self, x: torch.Tensor, cache: KVCache, layer: int, turn: torch.Tensor | None) -> torch.Tensor:
        """x: (B, E)."""
        x = self.proj.add(self.attend(self.norm1(x), cache, layer, turn), x)
        return self.fc2.add(self.fc1(self.norm2(x), gelu=True), x)

    def attend(self, x: torch.Tensor, cache: KVCache, layer: int, turn: torch.Tensor | None) -> torch.Tensor:
        """Attention of the new position (B, E) to all positions so far."""
        qkv = self.qkv(x).view(len(x), 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, heads, 1, E / heads)
        q, k = turned(self.q_norm(qkv[0]), turn), turned(self.k_norm(qkv[1]), turn)
        k, v = cache.extend(layer, k, qkv[2])
        return attend(q.to(k.dtype), k, v).to(x.dtype).view(len(x), -1)


class CachedDecoder:
    """The transformer one position after the other: the logits of `forward`, up to rounding, without gradients.

    It holds a copy of the weights at the time it is built. Call `start` for a batch, then `step` for each token.
    """

    def __init__(self, transformer: ImageTransformer):
        self.transformer = transformer
        self.blocks = [CachedBlock(block) for block in transformer.blocks]
        self.head = PackedLinear(transformer.head)

    def start(self, embeds: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Read the condition (B, D) and the known tokens (B, T) int64, T < L; logits (B, K) of the token after them."""
        model = self.transformer
        self.cache = KVCache(model, len(embeds))
        return model(embeds, F.pad(known, (0, 1)), self.cache)[:, -1]  # padded: forward does not read the last token

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read the next token of each row, (B,) int64; logits (B, K) float of the one after it."""
        model = self.transformer
        x = F.embedding(tokens, model.token_embedding.weight) + model.positions[0, self.cache.length]
        turn = model.turn(self.cache.length)
        for layer, block in enumerate(self.blocks):
            x = block(x, self.cache, layer, turn)
        self.cache.length += 1
        return self.head(model.norm(x)).float()


def generate(*arguments: object, **named: object) -> torch.Tensor:
    """The tokens of an image for each embedding, (B, L) int64: the last that `generate_tokens` yields."""
    *_, tokens = generate_tokens(*arguments, **named)
    return tokens


@torch.inference_mode()
def generate_tokens(
    transformer: ImageTransformer,
    embeds: torch.Tensor,
    seeds: list[Seed],
    settings: SampleConfig,
    known: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Sample the tokens of an image for each embedding, one token after the other.

    Args:
        embeds: (B, D), the conditions as `TextToImage.condition` prepares them.
        seeds: one for each row; the same embedding and seed give the same tokens in a batch of any size.
        known: the first tokens of each row, (B, T) int64 with T < L; only those behind them are sampled.

    Yields (B, L) int64 after every step, -1 where no token is sampled yet; the same tensor each time, so copy what is kept.
    Raises ClipgenError: the transformer is in training mode, or seeds or known tokens do not fit the embeddings.
    """
    known = embeds.new_empty(len(embeds), 0, dtype=torch.int64) if known is None else known
    _check(transformer, embeds, seeds, known)
    guided, first, length = settings.guidance != 1, known.shape[1], transformer.n_tokens
    tokens = F.pad(known.to(embeds.device), (0, length - first), value=-1)  # (B, L)
    decoder = CachedDecoder(transformer)
    for start in range(0, len(embeds), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        condition, known_rows = embeds[rows], tokens[rows, :first]
        if guided:  # the conditional and the unconditional half in one forward pass
            condition, known_rows = torch.cat([condition, torch.zeros_like(condition)]), known_rows.repeat(2, 1)
        uniforms = seeded_uniforms(seeds[rows], length, embeds.device)
        logits = decoder.start(condition, known_rows)
        for i in range(first, length):
            if guided:
                conditional, unconditional = logits.chunk(2)  # classifier-free guidance on logits (arXiv 2207.12598)
                logits = unconditional + guidance_at(i, length, settings) * (conditional - unconditional)
            logits = filter_logits(logits, settings.temperature, settings.top_k, settings.top_p)
            tokens[rows, i] = new = sample_token(logits, uniforms[:, i])
            yield tokens
            if i + 1 < length:
                logits = decoder.step(new.repeat(2) if guided else new)


def decode(vqgan: VQGAN, tokens: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] of flat tokens (B, L), decoded batch by batch.

    They are mid grey where a token is -1, not sampled yet; the decoder sees the last sampled token there.
    """
    sampled, side = tokens >= 0, vqgan.config.side
    last = tokens.gather(1, (sampled.sum(1, keepdim=True) - 1).clamp(min=0)).clamp(min=0)
    tokens = torch.where(sampled, tokens, last).view(-1, side, side)
    images = torch.cat([vqgan.decode(part) for part in tokens.split(batch_size)])
    return images * F.interpolate(sampled.view(-1, 1, side, side).to(images.dtype), images.shape[-2:])


def _check(transformer: ImageTransformer, embeds: torch.Tensor, seeds: list[Seed], known: torch.Tensor) -> None:
    if len(seeds) != len(embeds):
        raise ClipgenError(f"{len(seeds)} seeds for {len(embeds)} embeddings: give one for each")
    if transformer.training:
        raise ClipgenError("the transformer is in training mode: call .eval() before sampling")
    if len(known) != len(embeds) or known.shape[1] >= transformer.n_tokens:
        wanted = f"a row for each of the {len(embeds)} embeddings, shorter than the {transformer.n_tokens} of an image"
        raise ClipgenError(f"known tokens are {tuple(known.shape)}: give {wanted}")
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < transformer.codebook_size:
        raise ClipgenError(f"known tokens lie outside 0 to {transformer.codebook_size - 1}: use its own VQGAN")
