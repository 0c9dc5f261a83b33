"""The conditional transformer: p(tokens | embedding), one token after the other.

In: embeddings (B, D) of unit norm, tokens (B, T) int64. Out: logits (B, T, K), position i predicts token i.
Axes: B batch, L tokens of a picture, T <= L of them, K codebook size, D CLIP dimension, E width, N condition tokens.

One concrete sequence, N = 1: the transformer reads [c, t0, t1, ..., t(L-2)] and predicts [t0, t1, ..., t(L-1)], so
token t(L-1) is predicted and never read. The unconditional case is the zero vector in place of an embedding.
Blocks are pre-norm with learned positions, fused q/k/v, exact GELU and biases, the GPT of the released CLIP-GEN model.
With `conditioning="adaln"` the embedding comes in by adaptive layer norm in every block instead (adaLN-Zero of DiT,
arXiv 2212.09748), and the N inputs before the first token are learned. With "words" N text tokens (B, N) int64 take the
embedding's place, for the supervised system of the comparison, and D is the size of their vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import attend
from .config import Config, TransformerConfig, from_dict
from .runs import ClipgenError, built_strictly, read_json, read_weights


@dataclass(frozen=True)
class TransformerSizes(Config):
    """What a transformer takes from its store, beside its own config."""

    codebook_size: int
    n_tokens: int
    clip_dim: int


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

    def extend(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """Write new keys and values (2, B, heads, T, E / heads) behind those held and return all of them."""
        end = self.length + new.shape[3]
        self.blocks[layer][:, :, :, self.length : end] = new
        return self.blocks[layer][:, :, :, :end]


def centre(embeds: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Take a modality's mean (D,) off unit vectors (B, D) and make them unit vectors again; a zero mean changes nothing."""
    return F.normalize(embeds - mean, dim=-1) if bool(mean.any()) else embeds


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.modulation = nn.Linear(config.width, 6 * config.width) if config.conditioning == "adaln" else None
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv, self.proj = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.fc1, self.fc2 = nn.Linear(config.width, 4 * config.width), nn.Linear(4 * config.width, config.width)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, layer: int = 0, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: (B, T, E). condition: (B, 1, E), of adaptive layer norm only."""
        if self.modulation is None:
            x = x + self._attend(self.norm1(x), cache, layer)
            return x + self._feed(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        x = x + gate1 * self._attend(self.norm1(x) * (1 + scale1) + shift1, cache, layer)
        return x + gate2 * self._feed(self.norm2(x) * (1 + scale2) + shift2)

    def _attend(self, x: torch.Tensor, cache: KVCache | None, layer: int) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        mask = None
        if cache is not None:
            k, v = cache.extend(layer, qkv[1:])
            q = q.to(k.dtype)
            if length > 1 and cache.length > 0:  # several new positions behind old ones
                mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=x.device).tril(cache.length)
        causal = length > 1 and mask is None
        dropout = self.dropout if self.training else 0.0
        h = attend(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
        h = self.proj(h.transpose(1, 2).reshape(batch, length, width).to(x.dtype))
        return F.dropout(h, self.dropout, self.training)

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training)


class Head(nn.Linear):
    """The last layer, (..., E): float logits (..., K), or with targets (...) int64 their mean negative log-likelihood, a scalar."""

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return super().forward(x).float()
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        else:
            weight, bias = self.weight, self.bias
        return _Likelihood.apply(x.flatten(0, -2), weight, bias, targets.flatten())


class _Likelihood(torch.autograd.Function):
    """F.cross_entropy(F.linear(x, weight, bias), targets), a part of the rows at a time.

    Over a codebook of 16,384 the float logits of a batch and their gradient outweigh every other tensor of a step, and writing
    and reading them takes as long as the blocks do. Here a part of them lives in the cache, and what is kept for the backward
    pass is their gradient in the dtype of the weights: a quarter of the memory.
    """

    part = 2**21  # logits at a time on a CPU: 8 MB
    part_on_gpu = 2**27

    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        rows = max(1, (_Likelihood.part_on_gpu if x.is_cuda else _Likelihood.part) // len(weight))
        likelihoods, slopes = [], x.new_empty(len(x), len(weight))
        for part, target, slope in zip(x.split(rows), targets.split(rows), slopes.split(rows), strict=True):
            found, chosen = F.linear(part, weight, bias).float().log_softmax(-1), target[:, None]
            likelihoods.append(found.gather(1, chosen).sum())
            found.exp_().scatter_add_(1, chosen, found.new_full(chosen.shape, -1.0))
            slope.copy_(found)
        ctx.save_for_backward(x, weight, slopes)
        return -sum(likelihoods) / len(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, slopes = ctx.saved_tensors
        scale = gradient / len(x)
        bias_gradient = x.new_ones(1, len(x)) @ slopes  # `sum` would copy them all to add them up in float32
        return (slopes @ weight).mul_(scale), slopes.T @ (x * scale).to(x.dtype), bias_gradient[0].mul_(scale), None


class ImageTransformer(nn.Module):
    """Decoder-only transformer over picture tokens given a CLIP embedding.

    `image_mean` and `text_mean` (D,) are what `centre` takes off embeddings before they come in; zero, the usual case,
    where the training did not.
    """

    def __init__(self, config: TransformerConfig, codebook_size: int, n_tokens: int, clip_dim: int):
        super().__init__()
        self.config, self.codebook_size, self.n_tokens, self.clip_dim = config, codebook_size, n_tokens, clip_dim
        width, self.adaptive = config.width, config.conditioning == "adaln"
        if config.conditioning == "words":
            self.condition = nn.Embedding(clip_dim, width)
        else:
            self.condition = nn.Linear(clip_dim, width if self.adaptive else config.condition_tokens * width)
        self.prefix = nn.Parameter(torch.zeros(1, config.condition_tokens, width)) if self.adaptive else None
        for name in ("image_mean", "text_mean"):
            self.register_buffer(name, torch.zeros(clip_dim))
        self.token_embedding = nn.Embedding(codebook_size, width)
        self.positions = nn.Parameter(torch.zeros(1, config.condition_tokens + n_tokens - 1, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.head = Head(width, codebook_size)
        self.apply(self._initialise)
        nn.init.normal_(self.positions, std=0.02)
        for block in self.blocks:  # residual branches start smaller the deeper the stack (GPT-2)
            for layer in (block.proj, block.fc2):
                nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)
            if block.modulation is not None:  # every gate is shut: a block begins as nothing (adaLN-Zero)
                nn.init.zeros_(block.modulation.weight)
        if self.prefix is not None:
            nn.init.normal_(self.prefix, std=0.02)
        # unit-norm inputs have entries of about D^-0.5: this keeps the condition as loud as a token embedding
        nn.init.normal_(self.condition.weight, std=0.5)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(
        self, embeds: torch.Tensor, tokens: torch.Tensor, cache: KVCache | None = None, logits_of: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits of each token given the embedding and the tokens before it; in a training their likelihood.

        Args:
            embeds: (B, D) of unit norm, or zero rows for the unconditional case.
            tokens: (B, T) int64, 1 <= T <= L; the last one is predicted, never read.
            cache: with one, only positions that it does not hold are computed and returned, and it then holds them.
            logits_of: (b,) int64, the rows whose logits are wanted beside the likelihood of all.

        Returns:
            (B, T, K) float logits, or the last (B, T - already held, K) of them with a cache. With `logits_of` the mean
            negative log-likelihood of the tokens, in nats, and the (b, T, K) logits of those rows.
        """
        first = self.config.condition_tokens
        if tokens.shape[1] > self.n_tokens:
            raise ClipgenError(f"{tokens.shape[1]} tokens given to a transformer of {self.n_tokens}: use the VQGAN it was trained with")  # fmt: skip
        held = cache.length if cache is not None else 0
        x = self.token_embedding(tokens[:, max(held - first, 0) : -1])  # (B, new tokens, E)
        condition = None
        if held == 0 or self.adaptive:
            condition = self._condition(embeds).to(x.dtype)  # (B, N or 1, E)
        if held == 0:
            x = torch.cat([self.prefix.expand(len(embeds), -1, -1) if self.adaptive else condition, x], dim=1)
        x = x + self.positions[:, held : held + x.shape[1]]
        for layer, block in enumerate(self.blocks):
            if self.config.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, None, layer, condition, use_reentrant=False)
            else:
                x = block(x, cache, layer, condition)
        if cache is not None:
            cache.length += x.shape[1]
        if held == 0:
            x = x[:, first - 1 :]  # the last condition token predicts t0
        x = self.norm(x)
        return self.head(x) if logits_of is None else (self.head(x, tokens), self.head(x[logits_of]))

    def _condition(self, embeds: torch.Tensor) -> torch.Tensor:
        """(B, N or 1, E) in the dtype of the weights; text tokens in place of embeddings stay whole numbers."""
        embeds = embeds.to(self.condition.weight.dtype) if embeds.is_floating_point() else embeds
        return self.condition(embeds).view(len(embeds), -1, self.config.width)

    def describe(self) -> dict:
        return asdict(self.config) | {"codebook_size": self.codebook_size, "n_tokens": self.n_tokens, "clip_dim": self.clip_dim}

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> ImageTransformer:
        """Read what `train_transformer` wrote to a folder, in eval mode."""
        sizes = read_json(Path(folder) / "config.json")
        sizes = {k: v for k, v in sizes.items() if k != "trained_with"}
        model = built_strictly(lambda: cls.from_description(sizes), read_weights(Path(folder)), Path(folder))
        return model.to(device).eval()

    @classmethod
    def from_description(cls, sizes: dict) -> ImageTransformer:
        """Build from what `describe` returns; an entry that is missing, unknown or of another kind is refused."""
        own = {f.name for f in fields(TransformerSizes)}
        config = from_dict(TransformerConfig, {k: v for k, v in sizes.items() if k not in own})
        return cls(config, **asdict(from_dict(TransformerSizes, {k: v for k, v in sizes.items() if k in own})))


class PackedLinear:
    """A linear layer for few rows at a time, without gradients: y = x W^T + b.

    On a CPU the weights are a copy in the layout of oneDNN's kernels, which read 4 to 64 rows' worth of them up to three
    times as fast as plain ones; elsewhere, and in a dtype that oneDNN does not know here, they are the layer's own.
    """

    rows = 16  # that the layout is chosen for; with fewer than 4 oneDNN takes one that is slower at every number of rows

    def __init__(self, layer: nn.Linear):
        self.weight, self.bias = layer.weight.detach(), layer.bias.detach()
        self.is_packed = packs(self.weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, E) to (B, F)."""
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU, by the error function, of the layer's output."""
        if not self.is_packed:
            return F.gelu(F.linear(x, self.weight, self.bias))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")

    def add(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """The layer's output on top of `to` (B, F)."""
        if not self.is_packed:
            return to + F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.binary(x, to, self.weight, self.bias, "add")


def packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN has kernels for such a weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class DecodingBlock:
    """A block for one position at a time, its weights packed."""

    def __init__(self, block: Block):
        self.norm1, self.norm2, self.heads = block.norm1, block.norm2, block.heads
        self.qkv, self.proj, self.fc1, self.fc2 = map(PackedLinear, (block.qkv, block.proj, block.fc1, block.fc2))

    def __call__(self, x: torch.Tensor, cache: KVCache, layer: int, change: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
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
