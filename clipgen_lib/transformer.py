"""The conditional transformer: p(tokens | embedding), one token after the other.

In: embeddings (B, D) of unit norm, tokens (B, T) int64. Out: logits (B, T, K), position i predicts token i.
Axes: B batch, L tokens of an image, T <= L of them, K codebook size, D CLIP dimension, E width, N condition tokens.

One concrete sequence, N = 1: the transformer reads [c, t0, t1, ..., t(L-2)] and predicts [t0, t1, ..., t(L-1)], so
token t(L-1) is predicted and never read. The unconditional case is the zero vector in place of an embedding.
Blocks are pre-norm with learned positions, fused q/k/v, exact GELU and biases, the GPT of the released CLIP-GEN model.
With `conditioning="words"` N text tokens (B, N) int64 take the embedding's place, for the supervised system of the
comparison, and D is the size of their vocabulary. With `rope` queries and keys are turned by the row and column of their
token as well, and with `qk_norm` they are of one length in every head.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .config import Config, Count, TransformerConfig, checked_dataclass, from_dict
from .runtime.checkpoints import load_weights
from .runtime.kernels import attend, dropout
from .runtime.runs import ClipgenError


@checked_dataclass
class TransformerSizes(Config):
    """What a transformer takes from its store, beside its own config."""

    codebook_size: Count
    n_tokens: Count
    clip_dim: Count


class KVCache:
    """Keys and values of all blocks, allocated once: one tensor (2, B, heads, N + L - 1, E / heads) for each block.

    On a CPU they are float32 whatever the weights are: its attention of one position is slower in bfloat16.
    """

    def __init__(self, transformer: ImageTransformer, batch: int):
        weight = transformer.head.weight
        config, length = transformer.config, transformer.positions.shape[1]
        shape = (2, batch, config.heads, length, config.width // config.heads)
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        self.blocks = [torch.empty(shape, device=weight.device, dtype=dtype) for _ in range(config.layers)]
        self.length = 0  # positions held so far

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write new keys and values (B, heads, T, E / heads) behind those held; returns all of them, (2, B, heads, ...)."""
        held, end = self.blocks[layer], self.length + k.shape[2]
        held[0, :, :, self.length : end], held[1, :, :, self.length : end] = k, v
        return held[:, :, :, :end]


def rotations(config: TransformerConfig, n_tokens: int) -> torch.Tensor:
    """By which angles the entries of queries and keys turn: cosine and signed sine, (2, N + L - 1, E / heads).

    2-D rotary positions (arXiv 2104.09864 and, for images, 2403.13298): half of the angles grow with the row of the token
    that a position reads, half with its column, by 1 to 1/100 radian from one to the next; condition tokens do not turn.
    """
    side, speeds = math.isqrt(n_tokens), config.width // config.heads // 4
    read = torch.arange(n_tokens - 1)
    places = torch.stack([read // side, read % side], dim=1) + 1
    angles = (places[:, :, None] * 100.0 ** -(torch.arange(speeds) / max(speeds - 1, 1))).flatten(1)
    angles = F.pad(angles, (0, 0, config.condition_tokens, 0))
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, cosine], dim=1), torch.cat([-sine, sine], dim=1)])


def turned(x: torch.Tensor, turn: torch.Tensor | None) -> torch.Tensor:
    """Queries or keys (B, heads, T, d), entry i and entry i + d / 2 turned in their plane by `rotations` (2, T, d)."""
    if turn is None:
        return x
    cosine, sine = turn.to(x.dtype)
    return torch.addcmul(x * cosine, x.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sine)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv, self.proj = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.fc1, self.fc2 = nn.Linear(config.width, 4 * config.width), nn.Linear(4 * config.width, config.width)
        qk_norm, per_head = nn.LayerNorm if config.qk_norm else nn.Identity, config.width // config.heads
        self.q_norm, self.k_norm = qk_norm(per_head), qk_norm(per_head)  # arXiv 2302.05442

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, layer: int = 0, turn: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: (B, T, E). turn: `rotations` of the T positions."""
        x = x + self._attend(self.norm1(x), cache, layer, turn)
        return x + self._feed(self.norm2(x))

    def _attend(self, x: torch.Tensor, cache: KVCache | None, layer: int, turn: torch.Tensor | None) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = turned(self.q_norm(qkv[0]), turn), turned(self.k_norm(qkv[1]), turn), qkv[2]
        mask = None
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            q = q.to(k.dtype)
            if length > 1 and cache.length > 0:  # several new positions behind old ones
                mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=x.device).tril(cache.length)
        share = self.dropout if self.training else 0.0
        h = attend(q, k, v, attn_mask=mask, is_causal=length > 1 and mask is None, dropout_p=share)
        return dropout(self.proj(h.transpose(1, 2).reshape(batch, length, width).to(x.dtype)), share)

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout if self.training else 0.0)


class ImageTransformer(nn.Module):
    """Decoder-only transformer over image tokens given a CLIP embedding."""

    def __init__(self, config: TransformerConfig, codebook_size: int, n_tokens: int, clip_dim: int):
        super().__init__()
        self.config, self.codebook_size, self.n_tokens, self.clip_dim = config, codebook_size, n_tokens, clip_dim
        width = config.width
        if config.conditioning == "words":
            self.condition = nn.Embedding(clip_dim, width)
        else:
            self.condition = nn.Linear(clip_dim, config.condition_tokens * width)
        self.register_buffer("rotations", rotations(config, n_tokens) if config.rope else None)
        self.token_embedding = nn.Embedding(codebook_size, width)
        self.positions = nn.Parameter(torch.zeros(1, config.condition_tokens + n_tokens - 1, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codebook_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.02)
        for block in self.blocks:  # residual branches start smaller the deeper the stack (GPT-2)
            for layer in (block.proj, block.fc2):
                nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)
        # unit-norm inputs have entries of about D^-0.5: this keeps the condition as loud as a token embedding
        nn.init.normal_(self.condition.weight, std=0.5)

    def forward(self, embeds: torch.Tensor, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits (B, T, K) float of each token given the embedding and the tokens before it.

        Args:
            embeds: (B, D) of unit norm, or zero rows for the unconditional case.
            tokens: (B, T) int64, 1 <= T <= L; the last one is predicted, never read.
            cache: with one, only positions that it does not hold are computed and returned, and it then holds them.
        """
        return self.head(self.hidden(embeds, tokens, cache)).float()

    def hidden(self, embeds: torch.Tensor, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """What the head reads, (B, T, E), of the arguments of `forward`; `runtime.kernels.nll_from_hidden` takes it."""
        first = self.config.condition_tokens
        if tokens.shape[1] > self.n_tokens:
            raise ClipgenError(f"{tokens.shape[1]} tokens for a transformer of {self.n_tokens}: use its own VQGAN")
        past_len = cache.length if cache is not None else 0
        x = self.token_embedding(tokens[:, max(past_len - first, 0) : -1])  # (B, new tokens, E)
        if past_len == 0:
            x = torch.cat([self.embed_condition(embeds).to(x.dtype), x], dim=1)
        x = x + self.positions[:, past_len : past_len + x.shape[1]]
        turn = self.turn(past_len, x.shape[1])
        for layer, block in enumerate(self.blocks):
            if self.config.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, None, layer, turn, use_reentrant=False)
            else:
                x = block(x, cache, layer, turn)
        if cache is not None:
            cache.length += x.shape[1]
        if past_len == 0:
            x = x[:, first - 1 :]  # the last condition token predicts t0
        return self.norm(x)

    def turn(self, first: int, count: int = 1) -> torch.Tensor | None:
        """The rotations of `count` positions, or None where there are none."""
        return None if self.rotations is None else self.rotations[:, first : first + count]

    def embed_condition(self, embeds: torch.Tensor) -> torch.Tensor:
        """(B, N, E) in the dtype of the weights; text tokens in place of embeddings stay whole numbers."""
        embeds = embeds.to(self.condition.weight.dtype) if embeds.is_floating_point() else embeds
        return self.condition(embeds).view(len(embeds), -1, self.config.width)

    def describe(self) -> dict:
        return asdict(self.config) | {f.name: getattr(self, f.name) for f in fields(TransformerSizes)}

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> ImageTransformer:
        """Read what `train_transformer` wrote to a folder, in eval mode."""
        return load_weights(Path(folder), cls.from_description).to(device).eval()

    @classmethod
    def from_description(cls, sizes: dict) -> ImageTransformer:
        """Build from what `describe` returns; an entry that is missing, unknown or of another kind is refused."""
        own = {f.name for f in fields(TransformerSizes)}
        config = from_dict(TransformerConfig, {k: v for k, v in sizes.items() if k not in {*own, "trained_with"}})
        return cls(config, **asdict(from_dict(TransformerSizes, {k: v for k, v in sizes.items() if k in own})))
