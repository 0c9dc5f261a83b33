"""VQGAN: images to discrete tokens and back.

In: images (B, 3, H, W) float in [-1, 1]. Out: tokens (B, h, w) int64 below K, and images again.
Axes: B batch, H W pixels, h w token grid, K codebook size, C code dimension, Z channels before and after the code.

The encoder and decoder are those of taming-transformers (Esser et al. 2021, arXiv 2012.09841): residual blocks with
GroupNorm (epsilon 1e-6) and swish, one attention block in the middle and at the coarsest level, stride-2
convolutions padded on the right and below. `patch` folds pixels into channels first (1: not at all, as there).
`local` leaves out attention and group statistics, by which a token would depend on the whole image, and gives the
encoder kernels no wider than their stride: a token then depends on its own square of pixels alone.
"""

import itertools
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from .config import VQGANConfig, from_dict
from .runtime import distributed
from .runtime.checkpoints import load_weights
from .runtime.kernels import attend
from .runtime.runs import ClipgenError

EPSILON = 1e-6  # added to the variance in every norm


class ChannelNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the channels of each position: nothing passes between positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(1, keepdim=True, dtype=torch.float32) + EPSILON).to(x.dtype)
        return x * scale * self.weight.to(x.dtype) + self.bias.to(x.dtype)


def norm(channels: int, local: bool) -> nn.Module:
    groups = 32 if channels % 32 == 0 else channels // 4
    return ChannelNorm(channels) if local else nn.GroupNorm(groups, channels, eps=EPSILON)


class ResBlock(nn.Module):
    """The branch begins as nothing and grows (Fixup, arXiv 1901.09321), as that of attention: short trainings get further."""

    def __init__(self, channels_in: int, channels_out: int, local: bool, kernel: int = 3):
        super().__init__()
        self.norm1 = norm(channels_in, local)
        self.conv1 = nn.Conv2d(channels_in, channels_out, kernel, padding="same")
        self.norm2 = norm(channels_out, local)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel, padding="same")
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over positions, projections as 1x1 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels, local=False)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, h*w, channels)
        h = attend(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


def downsample(channels: int, local: bool) -> nn.Sequential:
    pad = nn.Identity() if local else nn.ZeroPad2d((0, 1, 0, 1))
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(channels, channels, 2 if local else 3, stride=2)))


def upsample(channels: int) -> nn.Sequential:
    repeat = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(repeat=repeat, conv=nn.Conv2d(channels, channels, 3, padding=1)))


class Level(nn.Module):
    """The blocks of one resolution, of these widths: residual blocks, each followed by attention if so asked, then a resampling."""

    def __init__(self, widths: list[int], config: VQGANConfig, attention: bool, kernel: int, resample: nn.Module):
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResBlock(a, b, config.local, kernel) for a, b in pairs)
        attention = attention and not config.local
        self.attn = nn.ModuleList(AttentionBlock(b) if attention else nn.Identity() for _, b in pairs)
        self.resample = resample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            x = self.attn[index](block(x))
        return self.resample(x)


def middle(channels: int, local: bool, kernel: int = 3) -> nn.Sequential:
    """The blocks between the coarsest levels: residual, attention, residual."""
    between = nn.Identity() if local else AttentionBlock(channels)
    first, last = (ResBlock(channels, channels, local, kernel) for _ in range(2))
    return nn.Sequential(first, between, last)


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, Z, h, w)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        last, kernel = len(widths) - 1, 1 if config.local else 3
        self.unfold = nn.PixelUnshuffle(config.patch)
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.channels, kernel, padding="same")
        self.down = nn.Sequential()
        for i, (before, width) in enumerate(itertools.pairwise([config.channels, *widths])):
            resample = downsample(width, config.local) if i < last else nn.Identity()
            self.down.append(Level([before] + [width] * config.res_blocks, config, i == last, kernel, resample))
        self.mid = middle(widths[-1], config.local, kernel)
        self.norm_out = norm(widths[-1], config.local)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, kernel, padding="same")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.down(self.conv_in(self.unfold(images))))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, Z, h, w) -> (B, 3, H, W) float, not clamped."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.channel_mult)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config.local)
        self.up = nn.Sequential()
        for i, (before, width) in enumerate(itertools.pairwise([widths[0], *widths])):
            resample = upsample(width) if i < len(widths) - 1 else nn.Identity()
            self.up.append(Level([before] + [width] * (config.res_blocks + 1), config, i == 0, 3, resample))
        self.norm_out = norm(widths[-1], config.local)
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)
        self.fold = nn.PixelShuffle(config.patch)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.last(self.features(z))

    def features(self, z: torch.Tensor) -> torch.Tensor:
        """What the last layer reads."""
        return F.silu(self.norm_out(self.up(self.mid(self.conv_in(z)))))

    def last(self, features: torch.Tensor) -> torch.Tensor:
        return self.fold(self.conv_out(features)).float()


class Quantized(NamedTuple):
    codes: torch.Tensor  # (B, C, h, w), straight-through: the value of the code, the gradient of the encoder's output
    tokens: torch.Tensor  # (B, h, w) int64
    vectors: torch.Tensor  # (B, h, w, C), detached: what the encoder gave, for `update_codebook`
    codebook_loss: torch.Tensor  # scalar; moves codes towards encoder outputs (zero where codes move by EMA)
    commitment_loss: torch.Tensor  # scalar; moves encoder outputs towards codes


class VectorQuantizer(nn.Module):
    """Nearest code, by cosine on unit vectors (`l2_norm`; ViT-VQGAN, arXiv 2110.04627) or by euclidean distance.

    The two losses are those of VQ-VAE (arXiv 1711.00937, equation 3): ||sg[z] - e||^2 and ||z - sg[e]||^2, and beta belongs to
    the second. With `codebook_update="ema"` codes follow the mean of their vectors instead (same paper, appendix A.1). A code
    unused for `restart_after` training steps becomes a random encoder output (Jukebox, arXiv 2005.00341, section 3.1).
    With "gumbel", of released VQGANs (arXiv 1611.01144), the token is the largest of K projections; not trained here.
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.l2_norm, self.ema = config.l2_norm, config.codebook_update == "ema"
        self.decay, self.restart_after = config.codebook_decay, config.restart_after
        size, dim = config.codebook_size, config.code_dim
        # unit vectors in every direction, or (euclidean) the small uniform box of taming
        codes = F.normalize(torch.randn(size, dim), dim=-1) if self.l2_norm else (torch.rand(size, dim) * 2 - 1) / size
        self.codebook = nn.Parameter(codes, requires_grad=not self.ema)
        self.projection = nn.Linear(dim, size) if config.codebook_update == "gumbel" else None
        self.register_buffer("idle", torch.zeros(size, dtype=torch.long))  # training steps since a code was last used
        if self.ema:
            self.register_buffer("counts", torch.ones(size))
            self.register_buffer("sums", codes.clone())

    def codes(self) -> torch.Tensor:
        """The codebook (K, C) as it is looked up: of unit norm where `l2_norm`."""
        return F.normalize(self.codebook, dim=-1) if self.l2_norm else self.codebook

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, h, w) int64 -> (B, C, h, w)."""
        return F.embedding(tokens, self.codes()).permute(0, 3, 1, 2)

    def forward(self, z: torch.Tensor) -> Quantized:
        if self.training and self.projection is not None:
            raise ClipgenError("a Gumbel quantiser is not trained here: choose 'gradient' or 'ema', or call .eval()")
        z = z.float().permute(0, 2, 3, 1)  # (B, h, w, C)
        z = F.normalize(z, dim=-1) if self.l2_norm else z
        flat, codes = z.reshape(-1, z.shape[-1]), self.codes()
        with torch.no_grad():
            if self.projection is None:
                tokens = (codes.pow(2).sum(1) - 2 * flat @ codes.T).argmin(1)  # |z|^2 is the same for every code
            else:
                tokens = self.projection(flat).argmax(1)
            tokens = tokens.view(z.shape[:-1])
        codes = F.embedding(tokens, codes)
        codebook_loss = codes.new_zeros(()) if self.ema else F.mse_loss(codes, z.detach())
        commitment_loss = F.mse_loss(z, codes.detach())
        straight_through = (z + (codes - z).detach()).permute(0, 3, 1, 2)
        return Quantized(straight_through, tokens, z.detach(), codebook_loss, commitment_loss)

    @torch.no_grad()
    def update_codebook(self, vectors: torch.Tensor, tokens: torch.Tensor, rng: torch.Generator) -> None:
        """After an optimiser step: move codes by EMA, count idle steps, restart dead codes.

        Statistics and restarts are of the whole batch, so that every process comes to the codebook that one alone would.

        Args:
            vectors: (B, h, w, C). tokens: (B, h, w) int64; what the quantiser gave for this process's share of the batch.
            rng: on the CPU, in the same state on every process.
        """
        flat, tokens = vectors.reshape(-1, vectors.shape[-1]), tokens.flatten()
        used = distributed.all_reduce_sum(torch.bincount(tokens, minlength=len(self.codebook)).float())
        if self.ema:
            sums = distributed.all_reduce_sum(torch.zeros_like(self.codebook).index_add_(0, tokens, flat))
            self.counts.mul_(self.decay).add_(used, alpha=1 - self.decay)
            self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            means = self.sums / self.counts.clamp_min(1e-3)[:, None]
            self.codebook.copy_(F.normalize(means, dim=-1) if self.l2_norm else means)
        self.idle.add_(1).masked_fill_(used > 0, 0)
        if self.restart_after:
            dead, fresh = (self.idle >= self.restart_after)[:, None], self._sample(flat, rng)
            self.codebook.copy_(torch.where(dead, fresh, self.codebook))
            if self.ema:
                self.sums.copy_(torch.where(dead, fresh, self.sums))
                self.counts.masked_fill_(dead[:, 0], 1.0)
            self.idle.masked_fill_(dead[:, 0], 0)

    def _sample(self, flat: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """K of the vectors (N, C) that all processes hold, the same on each of them."""
        rows = torch.randint(len(flat) * distributed.world_size(), (len(self.codebook),), generator=rng)
        rows = rows.to(flat.device) - len(flat) * distributed.rank()
        mask = (rows >= 0) & (rows < len(flat))  # the vectors of this process
        return distributed.all_reduce_sum(torch.where(mask[:, None], flat[rows.clamp(0, len(flat) - 1)], 0.0))


class VQGAN(nn.Module):
    """Encoder, quantiser and decoder; `encode` and `decode` are each other's inverse up to what tokens can hold."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.quantizer = VectorQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def forward(self, images: torch.Tensor, until_last_layer: bool = False) -> tuple[torch.Tensor, Quantized]:
        """(B, 3, H, W) in [-1, 1] -> reconstructions of the same shape (not clamped), and the quantiser's output.

        With `until_last_layer` what `decoder.last` reads takes the place of the reconstructions, for the adaptive weight.
        """
        quantized = self.quantizer(self.quant_conv(self.encoder(images)))
        features = self.decoder.features(self.post_quant_conv(quantized.codes))
        return features if until_last_layer else self.decoder.last(features), quantized

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> tokens (B, h, w) int64.

        Raises ClipgenError: H or W is not a multiple of the downsampling factor.
        """
        (height, width), factor = images.shape[-2:], self.config.factor
        if height % factor or width % factor:
            raise ClipgenError(f"images of {height}x{width} pixels do not divide by {factor}: resize them to multiples")
        return self.quantizer(self.quant_conv(self.encoder(images))).tokens

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, h, w) int64 -> images (B, 3, H, W), clamped to [-1, 1]."""
        return self.decode_codes(self.quantizer.lookup(tokens)).clamp(-1, 1)

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (B, C, h, w), perhaps soft, -> images, not clamped; differentiable in the codes."""
        return self.decoder(self.post_quant_conv(codes))

    def describe(self) -> dict:
        return asdict(self.config)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Self:
        """Read what `train_vqgan` wrote to a folder, in eval mode."""
        return load_weights(Path(folder), lambda described: cls(from_dict(VQGANConfig, described))).to(device).eval()


def codebook_statistics(counts: torch.Tensor) -> dict[str, float]:
    """Share of codes used at all, and perplexity exp(entropy) of their frequencies, from how often each (K,) was used."""
    frequencies = counts.double() / counts.sum()
    entropy = -(frequencies * frequencies.clamp_min(1e-12).log()).sum()
    return {"codebook_usage": float((frequencies > 0).double().mean()), "perplexity": float(entropy.exp())}
