"""The systems that CLIP-GEN is compared with, each behind the one call that the evaluation makes.

In: texts (or CLIP embeddings of images) and a seed for each. Out: one image for each, by `generate_each`, as of
`TextToImage`. All use the same CLIP, and all but the GAN and retrieval the same VQGAN.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from ..clip_embed import ClipEmbedder
from ..config import FusionGANConfig, SampleConfig, VQGANCLIPConfig
from ..data.batches import batch_rows
from ..data.datasets import ImageSet
from ..data.images import crop, to_float
from ..runtime.runs import ClipgenError, progress
from ..sample import decode, generate, seeded_uniforms
from ..store import TokenStore, nearest
from ..training import moving_average
from ..transformer import ImageTransformer
from ..vqgan import VQGAN


@dataclass
class System:
    """What the evaluation reads of every system.

    Each has `generate_each`, one image for each prompt and seed: (P, 3, H, W) in [-1, 1].
    """

    vqgan: VQGAN  # whose reconstruction is measured
    clip: ClipEmbedder

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def embed(self, prompts: list[str] | torch.Tensor) -> torch.Tensor:
        return prompts.to(self.device) if isinstance(prompts, torch.Tensor) else self.clip.texts(list(prompts))


@dataclass
class Retrieval(System):
    """The training image nearest in CLIP space: it trains nothing and generates nothing, the floor of effort."""

    store: TokenStore
    images: ImageSet  # the images that the store was made of

    def generate_each(self, prompts: list[str] | torch.Tensor, seeds: list[int]) -> torch.Tensor:
        """Seeds change nothing."""
        bank = self.store.embeds(slice(0, self.store.n_unmirrored))
        closest = nearest(bank, self.embed(prompts).cpu().float(), 1)[:, 0]
        images = [crop(self.images[int(row)], self.images.size) for row in self.store.arrays["rows"][closest.numpy()]]
        return to_float(torch.stack(images)).to(self.device)


@dataclass
class VQGANCLIP(System):
    """VQGAN-CLIP (Crowson et al., arXiv 2204.08583) by its published recipe, at the resolution of the VQGAN at hand.

    From random tokens, Adam on the latent grid. Each step looks the grid up in the codebook (straight-through), decodes
    it, and lowers the squared spherical distance of CLIP's embedding of augmented cutouts to the prompt's. Cutouts are
    square, of side between half and all of the image, flipped, turned, warped and noised as in the released notebook (but
    for its slight change of hue, which has no gradient here). All images of a batch get the same cutouts, so that an
    image does not depend on the others.
    """

    config: VQGANCLIPConfig

    def generate_each(self, prompts: list[str] | torch.Tensor, seeds: list[int]) -> torch.Tensor:
        embeds, size = self.embed(prompts).detach(), self.config.batch_size
        parts = [slice(first, first + size) for first in range(0, len(embeds), size)]
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            return torch.cat([self._optimise(embeds[part].clone(), seeds[part]) for part in parts])

    def _optimise(self, embeds: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        side, codes = self.vqgan.config.side, self.vqgan.quantizer.codes().detach().clone()
        tokens = (seeded_uniforms(seeds, side * side, embeds.device) * len(codes)).long()
        z = codes[tokens].unflatten(1, (side, side)).permute(0, 3, 1, 2).contiguous().requires_grad_()  # (B, C, h, w)
        lowest, highest = (bound[None, :, None, None] for bound in (codes.amin(0), codes.amax(0)))
        smooth = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": None}  # with a fill there is no gradient
        augment = nn.Sequential(
            v2.RandomResizedCrop(self.vqgan.config.image_size, scale=(0.25, 1.0), ratio=(1.0, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(30, translate=(0.1, 0.1), **smooth),
            v2.RandomPerspective(0.2, p=0.4, **smooth),
        )
        optimizer = torch.optim.Adam([z], lr=self.config.lr)
        torch.manual_seed(0)  # torchvision uses the global generator
        for _ in range(self.config.steps):
            images = self._decode(z).add(1).div(2).clamp(0, 1)
            cutouts = torch.cat([augment(images) for _ in range(self.config.cutouts)])
            cutouts = cutouts + self.config.noise * torch.rand(()) * torch.randn(cutouts.shape[1:]).to(cutouts)
            distance = (self.clip.images(cutouts * 2 - 1) - embeds.repeat(self.config.cutouts, 1)).norm(dim=1)
            loss = distance.div(2).clamp(max=1 - 1e-6).arcsin().pow(2).mul(2).mean() * len(embeds)  # a sum over images
            z.grad = torch.autograd.grad(loss, z)[0]
            optimizer.step()
            z.data.clamp_(lowest, highest)
        return self._decode(z).detach().clamp(-1, 1)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> images, through the nearest codes with a straight-through gradient."""
        return self.vqgan.decode_codes(self.vqgan.quantizer(z).codes)


class WordStore(TokenStore):
    """A store whose condition is words: `embeds` gives text tokens (B, T) int64, 0 where a text has ended."""

    def embeds(self, rows: np.ndarray | slice) -> torch.Tensor:
        return torch.from_numpy(self.arrays["embeds"][rows].astype(np.int64))


@torch.inference_mode()
def paired_store(store: TokenStore, captions: list[tuple[str, ...]], clip: ClipEmbedder, words: bool) -> TokenStore:
    """A row for each caption of each image: its tokens, and the caption's embedding or its words.

    Mirrored rows are left out, since a caption may say left or right.
    """
    pairs = [(i, text) for i, row in enumerate(store.arrays["rows"][: store.n_unmirrored]) for text in captions[row]]
    if not pairs:
        raise ClipgenError(f"{store.folder} has no captions beside its images: a supervised baseline needs pairs")
    rows, texts = np.array([i for i, _ in pairs]), [text for _, text in pairs]
    if words:
        embeds = clip.tokenizer(texts).numpy().astype(np.uint16)
    else:
        embeds = clip.texts(texts).cpu().numpy().astype(np.float16)
    arrays = {"tokens": store.arrays["tokens"][rows], "embeds": embeds, "rows": store.arrays["rows"][rows]}
    meta = store.meta | {"N": len(pairs), "flip": False, "D": clip.tokenizer.vocab_size if words else clip.dim}
    return (WordStore if words else TokenStore)(store.folder, meta, arrays)


@dataclass
class Supervised(System):
    """The transformer trained on pairs, with the text's own tokens before the image's (CogView, arXiv 2105.13290)."""

    transformer: ImageTransformer
    settings: SampleConfig

    @torch.inference_mode()
    def generate_each(self, prompts: list[str] | torch.Tensor, seeds: list[int], **settings: object) -> torch.Tensor:
        """Prompts may be their words too, as of a `WordStore`."""
        words = prompts if isinstance(prompts, torch.Tensor) else self.clip.tokenizer(list(prompts))
        settings = replace(self.settings, **settings)
        tokens = generate(self.transformer, words.to(self.device), seeds, settings)
        return decode(self.vqgan, tokens, settings.batch_size)


class Fusion(nn.Module):
    """Two text-conditioned affine maps with activations before a convolution: half of DF-GAN's DFBlock."""

    def __init__(self, channels_in: int, channels_out: int, condition: int):
        super().__init__()
        self.affine = nn.ModuleList(nn.Linear(condition, 2 * channels_in) for _ in range(2))
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        for layer in self.affine:  # begins as the identity
            nn.init.zeros_(layer.weight)
            layer.bias.data = torch.cat([torch.ones(channels_in), torch.zeros(channels_in)])

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        for layer in self.affine:
            scale, shift = layer(condition)[..., None, None].chunk(2, dim=1)
            x = F.leaky_relu(x * scale + shift, 0.2)
        return self.conv(x)


class UpBlock(nn.Module):
    """Twice the size, then two text-conditioned convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, condition: int):
        super().__init__()
        self.first = Fusion(channels_in, channels_out, condition)
        self.second = Fusion(channels_out, channels_out, condition)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.shortcut(x) + self.second(self.first(x, condition), condition)


def _widths(config: FusionGANConfig, image_size: int) -> list[int]:
    """Channels from full resolution down to 4x4."""
    if image_size not in (4 * 2**i for i in range(1, 9)):
        raise ClipgenError(f"the GAN doubles from 4 pixels and cannot reach {image_size}: choose a power of two")
    return [config.channels * min(2**i, 4) for i in range((image_size // 4).bit_length())]


class FusionGenerator(nn.Module):
    """Noise (B, Z) and a text embedding (B, D) -> (B, 3, H, W) in [-1, 1], doubling from 4x4."""

    def __init__(self, config: FusionGANConfig, image_size: int, clip_dim: int):
        super().__init__()
        widths, self.noise_dim = _widths(config, image_size)[::-1], config.noise_dim
        self.begin = nn.Linear(config.noise_dim, widths[0] * 16)
        condition = config.noise_dim + clip_dim
        self.blocks = nn.ModuleList(UpBlock(a, b, condition) for a, b in itertools.pairwise(widths))
        self.end = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, noise: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        condition = torch.cat([noise, embeds * embeds.shape[1] ** 0.5], dim=1)  # entries of about 1 in both
        x = self.begin(noise).view(len(noise), -1, 4, 4)
        for block in self.blocks:
            x = block(x, condition)
        return self.end(F.leaky_relu(x, 0.2)).tanh()


class Critic(nn.Module):
    """DF-GAN's one-way discriminator: does this image, with this text, look real?"""

    def __init__(self, config: FusionGANConfig, image_size: int, clip_dim: int):
        super().__init__()
        widths = _widths(config, image_size)
        steps = list(itertools.pairwise(widths))
        self.begin = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in steps)
        self.shortcut = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in steps)
        self.joint = nn.Conv2d(widths[-1] + clip_dim, widths[-1], 3, padding=1)
        self.end = nn.Conv2d(widths[-1], 1, 4)

    def forward(self, images: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        x = self.begin(images)
        for down, shortcut in zip(self.down, self.shortcut, strict=True):
            x = F.leaky_relu(down(x), 0.2) + F.avg_pool2d(shortcut(x), 2)
        text = (embeds * embeds.shape[1] ** 0.5)[..., None, None].expand(-1, -1, 4, 4)
        return self.end(F.leaky_relu(self.joint(torch.cat([x, text], dim=1)), 0.2)).flatten()


@dataclass
class FusionGAN(System):
    """A one-stage conditional GAN trained on pairs (DF-GAN, arXiv 2008.05865), as small as it can be."""

    generator: FusionGenerator

    @torch.inference_mode()
    def generate_each(self, prompts: list[str] | torch.Tensor, seeds: list[int]) -> torch.Tensor:
        uniform = seeded_uniforms(seeds, self.generator.noise_dim, self.device).clamp(1e-6, 1 - 1e-6)
        noise = torch.special.ndtri(uniform).float()  # normal, each row a function of its own seed
        pairs = zip(noise.split(64), self.embed(prompts).split(64), strict=True)
        return torch.cat([self.generator(n, e) for n, e in pairs])


def critic_loss(critic: Critic, real: torch.Tensor, fake: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Hinge loss on real, generated and mismatched pairs, and the matching-aware gradient penalty at real pairs
    (arXiv 2008.05865, equations 1 and 2: k = 2, p = 6)."""
    pair = real.clone().requires_grad_(), embeds.clone().requires_grad_()
    matched, generated = critic(*pair), critic(fake.detach(), embeds)
    mismatched = critic(real, embeds.roll(1, 0))
    hinge = F.relu(1 - matched).mean() + 0.5 * (F.relu(1 + generated).mean() + F.relu(1 + mismatched).mean())
    grads = torch.autograd.grad(matched.sum(), pair, create_graph=True)
    norms = torch.cat([grad.flatten(1) for grad in grads], dim=1).norm(dim=1)
    return hinge + 2 * norms.pow(6).mean()


def train_fusion_gan(images: ImageSet, clip: ClipEmbedder, config: FusionGANConfig, seed: int = 0) -> FusionGenerator:
    """Train DF-GAN's two networks on images and the CLIP embeddings of their captions; returns the EMA generator."""
    pairs = [(row, texts) for row, texts in enumerate(images.captions) if texts]
    torch.manual_seed(seed)
    generator, critic = (kind(config, images.size, clip.dim).to(clip.device) for kind in (FusionGenerator, Critic))
    optimizer = torch.optim.Adam(generator.parameters(), config.generator_lr, betas=(0.0, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), config.critic_lr, betas=(0.0, 0.9))
    ema = moving_average(generator, config.ema_decay)
    rng = np.random.default_rng([seed, 31])
    with progress(config.steps, "training GAN") as bar:
        for step in range(config.steps):
            batch = [pairs[i] for i in batch_rows(len(pairs), config.batch_size, seed, step)]
            with torch.no_grad():
                embeds = clip.texts([texts[rng.integers(len(texts))] for _, texts in batch]).clone()
            real = to_float(torch.stack([crop(images[row], images.size) for row, _ in batch])).to(clip.device)
            fake = generator(torch.randn(len(batch), config.noise_dim, device=clip.device), embeds)

            loss = critic_loss(critic, real, fake, embeds)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()

            critic.requires_grad_(False)
            generator_loss = -critic(fake, embeds).mean()
            optimizer.zero_grad()
            generator_loss.backward()
            optimizer.step()
            critic.requires_grad_(True)
            ema.update_parameters(generator)
            bar.update()
            if (step + 1) % config.log_every == 0 and not np.isfinite([loss.item(), generator_loss.item()]).all():
                raise ClipgenError(f"the GAN's losses are not finite by step {step + 1}: lower its learning rates")
    return ema.module
