"""Text-to-image: the whole inference path in one object and one call.

In: texts, images or embeddings, and a seed. Out: images (B, 3, H, W) float in [-1, 1].
Prompt -> CLIP embedding -> condition -> tokens (sample.py) -> image (vqgan.py) -> the best of some candidates by CLIP.
Axes: P prompts, n images of each, B = P * n, D CLIP dimension, L = h * w tokens.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import nn

from . import sample
from .clip_embed import ClipEmbedder
from .config import SampleConfig, VQGANConfig, from_dict
from .runtime.checkpoints import load_strictly, read_weights, save_tensors
from .runtime.runs import DATA, ClipgenError, fresh_folder, read_json, reason, shortened
from .transformer import ImageTransformer
from .vqgan import VQGAN

PRETRAINED = {
    name: DATA / f"{name}_generator" for name in ("shapes", "fashion")
}  # generators that come with the project
EXPORTED = {"config.json", "model.safetensors"}  # the files of one
Prompts = str | list[str] | torch.Tensor  # texts, images (P, 3, H, W) in [-1, 1], or CLIP embeddings of images (P, D)
# CLIP's own embeddings of P prompts, which candidates are ranked by, and the input of the transformer, (P, D) both
PromptEmbeds = tuple[torch.Tensor, torch.Tensor]


class Preview(NamedTuple):
    """Images that are not finished yet."""

    images: torch.Tensor  # (B, 3, H, W) in [-1, 1]; squares whose token is not sampled yet are mid grey, 0
    share: float  # of the tokens that are sampled, from 0 to 1


class TextToImage(nn.Module, PyTorchModelHubMixin, library_name="clipgen_lib", tags=["text-to-image", "clip-gen"]):
    """Text or image in, images out.

    `save_pretrained(folder)` writes config.json and model.safetensors (VQGAN and transformer); the config names the CLIP,
    which is loaded by name. `from_pretrained(folder_or_hub_id)` reads them; its `clip={"name": ..., "pretrained": ...}`
    replaces the CLIP of the config, for weights that lie elsewhere.
    `generator.transformer.bfloat16()` halves the memory that every step reads: other tokens for a seed, of equal quality.
    """

    def __init__(self, vqgan: dict, transformer: dict, clip: dict, sample: dict, bank_rows: int = 0):
        super().__init__()
        self.vqgan = VQGAN(from_dict(VQGANConfig, vqgan)).eval().requires_grad_(False)
        self.transformer = ImageTransformer.from_description(transformer).eval().requires_grad_(False)
        self.settings: SampleConfig = from_dict(SampleConfig, sample)
        if not isinstance(clip, dict) or not {"name"} <= clip.keys() <= {"name", "pretrained"}:
            raise ClipgenError(f"the generator names its CLIP as {shortened(str(clip))}: give `name` and `pretrained`")
        self.clip_source = clip
        self.register_buffer("bank", torch.zeros(bank_rows, self.transformer.clip_dim, dtype=torch.float16))
        self.register_buffer("moments", torch.zeros(4, self.transformer.clip_dim))  # as `sample.aligned` takes them
        self._clip: list[ClipEmbedder] = []  # in a list, so that its weights are not among ours

    @classmethod
    def from_parts(
        cls,
        vqgan: VQGAN,
        transformer: ImageTransformer,
        clip: ClipEmbedder,
        clip_source: dict,
        settings: SampleConfig,
        bank_and_moments: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> Self:
        """Put trained parts together; parts that do not fit each other are a ClipgenError.

        Args:
            clip_source: how to load this CLIP again: its `name` and `pretrained`.
            bank_and_moments: embeddings (M, D) of the training images, for `neighbours`; moments (4, D) of image and text
                embeddings, for `align`.
        """
        bank, moments = bank_and_moments
        if transformer.codebook_size != vqgan.config.codebook_size or transformer.n_tokens != vqgan.config.side**2:
            raise ClipgenError("VQGAN and transformer differ in codebook or token count: use both from one run")
        if transformer.clip_dim != clip.dim:
            raise ClipgenError(f"the transformer takes {transformer.clip_dim} dimensions: use the CLIP of its training")
        bank = torch.zeros(0, clip.dim) if bank is None else bank
        generator = cls(vqgan.describe(), transformer.describe(), clip_source, asdict(settings), len(bank))
        generator.bank.copy_(bank)
        generator.moments.copy_(torch.zeros(4, clip.dim) if moments is None else moments)
        generator.vqgan.load_state_dict(vqgan.state_dict())
        generator.transformer.load_state_dict(transformer.state_dict())
        generator._clip.append(clip)
        return generator.to(clip.device)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: object) -> Self:
        """Read `shapes` or `fashion`, which come with the project, a folder of `save_pretrained`, or a hub id.

        `options` are `clip`, or those of `PyTorchModelHubMixin.from_pretrained` (revision, cache_dir, ...). A generator
        that is missing, damaged or cannot be downloaded is a ClipgenError.
        """
        folder = Path(PRETRAINED.get(str(name), name))
        try:
            if (folder / "config.json").exists():
                read_json(folder / "config.json")  # the mixin would wait for ever where it is a pipe
            with contextlib.redirect_stdout(None):  # the mixin prints where it reads from
                return super().from_pretrained(PRETRAINED.get(str(name), name), **options)
        except ClipgenError:
            raise
        except Exception as error:  # files may hold any bytes: hub, mixin and torch raise errors of many types
            unread = f"{shortened(str(name))!r} is no generator that can be read here ({reason(error)})"
            raise ClipgenError(
                f"{unread}: give 'shapes', 'fashion', a folder of save_pretrained, or a hub id"
            ) from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **options: object):
        """The mixin's hook; `options` are the entries of config.json. A config of other sizes than its weights is refused before it costs memory."""
        hub = ("revision", "cache_dir", "force_download", "local_files_only", "token", "proxies", "resume_download")
        download = {key: options.pop(key) for key in hub if key in options}
        with torch.device("meta"):
            model = cls(**options)
        file = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            file = hf_hub_download(model_id, file.name, **download)
        load_strictly(model, read_weights(Path(file).parent), Path(model_id))
        return model.to(map_location)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The mixin's hook: the weights with their SHA-256, which `_from_pretrained` checks."""
        save_tensors(save_directory / "model.safetensors", self)

    def export(self, folder: Path) -> None:
        """Write float16 weights as `from_pretrained` reads them; a folder with other files in it is refused."""
        if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= EXPORTED):
            raise ClipgenError(f"{folder} holds other things than an exported generator: give a new folder")
        with fresh_folder(folder) as fresh:
            copy.deepcopy(self).half().save_pretrained(fresh)
            (fresh / "README.md").unlink()  # the mixin's model card says nothing about this model

    @property
    def device(self) -> torch.device:
        return self.transformer.head.weight.device

    @property
    def clip(self) -> ClipEmbedder:
        if not self._clip:
            self._clip.append(ClipEmbedder.load(**self.clip_source, device=self.device))
        return self._clip[0]

    def __call__(self, prompts: Prompts, n: int = 1, seed: int = 0, **settings: object) -> torch.Tensor:
        """Generate n images for each prompt, (P, n, 3, H, W) float in [-1, 1]; for an image these are variations of it.

        Args:
            prompts: texts, images (P, 3, H, W) in [-1, 1], or CLIP embeddings of images (P, D) of unit norm.
            seed: image j of every prompt uses seed + j, whatever else is in the batch.
            settings: fields of SampleConfig for this call: guidance, candidates, temperature, top_k, top_p, batch_size.
        """
        return self.generate_each(*_repeat(prompts, n, seed), **settings).unflatten(0, (-1, n))

    @torch.inference_mode()
    def generate_each(
        self, prompts: list[str] | torch.Tensor, seeds: list[int], known: torch.Tensor | None = None, **settings: object
    ) -> torch.Tensor:
        """One image for each prompt and seed, the nearest of `candidates` in CLIP space: (P, 3, H, W) in [-1, 1].

        `known` are the first tokens of each image, (P, T) int64; without it all are sampled.
        """
        config = replace(self.settings, **settings)
        *_, last = self._previews(self._prompt_embeds(prompts, config), seeds, config, known, every=0)
        return last.images

    @torch.inference_mode()
    def generate_progressively(
        self, prompt: Prompts, n: int = 1, seed: int = 0, every: int = 0, **settings: object
    ) -> Iterator[Preview]:
        """Generate n images for one prompt and yield previews (n, 3, H, W) on the way, candidate after candidate.

        A preview comes after every `every` tokens of an image; 0 takes a row of the token grid. The last one has share 1
        and the images of the plain call.
        """
        config, every = replace(self.settings, **settings), every or self.vqgan.config.side
        prompts, seeds = _repeat(prompt, n, seed)
        if len(seeds) != n:
            raise ClipgenError(f"{len(seeds) // n} prompts to generate progressively: give one")
        yield from self._previews(self._prompt_embeds(prompts, config), seeds, config, None, every)

    @torch.inference_mode()
    def complete(
        self, images: torch.Tensor, prompts: Prompts, rows: int = 0, n: int = 1, seed: int = 0, **settings: object
    ) -> torch.Tensor:
        """Keep the tokens of the upper part of images and generate the rest: (P, n, 3, H, W), image j with seed + j.

        Args:
            images: (P, 3, H, W) in [-1, 1], of the VQGAN's size.
            prompts: one for all of them, or one for each.
            rows: rows of the token grid that are kept; 0 takes half of them.
        """
        side, size = self.vqgan.config.side, self.vqgan.config.image_size
        rows = rows or side // 2
        if not 0 < rows < side:
            raise ClipgenError(f"rows is {rows} of a grid of {side}: keep at least 1 and at most {side - 1}")
        if images.shape[1:] != (3, size, size):
            raise ClipgenError(f"images to complete are {tuple(images.shape)}: give (P, 3, {size}, {size})")
        prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        if len(prompts) != len(images):
            raise ClipgenError(f"{len(prompts)} prompts for {len(images)} images: give one for all or one for each")
        known = self.vqgan.encode(images.to(self.device))[:, :rows].flatten(1).repeat_interleave(n, 0)
        return self.generate_each(*_repeat(prompts, n, seed), known, **settings).unflatten(0, (-1, n))

    @torch.inference_mode()
    def blend(
        self, a: Prompts, b: Prompts, shares: list[float], n: int = 1, seed: int = 0, **settings: object
    ) -> torch.Tensor:
        """Generate what lies between two prompts, each a text, an image (1, 3, H, W) or an embedding (1, D).

        `shares` are places from 0 (a) to 1 (b) on the great circle between the two embeddings. Returns (shares, n, 3, H,
        W) float in [-1, 1], image j of each share with seed + j.
        """
        config = replace(self.settings, **settings)
        ends = [self._prompt_embeds(prompt, config) for prompt in (a, b)]
        if any(len(embeds) != 1 for embeds, _ in ends):
            raise ClipgenError("a blend has one prompt at each end: give a text, an image (1, 3, H, W) or an embedding")
        shares, seeds = _repeat(list(shares), n, seed)
        between = tuple(torch.cat([sample.slerp(x, y, share) for share in shares]) for x, y in zip(*ends, strict=True))
        *_, last = self._previews(between, seeds, config, None, every=0)
        return last.images.unflatten(0, (-1, n))

    @torch.inference_mode()
    def embed(self, prompts: Prompts) -> torch.Tensor:
        """CLIP embeddings (P, D) of texts or of images (P, 3, H, W) in [-1, 1]; embeddings are returned as they are."""
        if not isinstance(prompts, torch.Tensor):
            return self.clip.texts([prompts] if isinstance(prompts, str) else list(prompts))
        if prompts.ndim == 4 and prompts.shape[1] == 3:
            return self.clip.images(prompts.to(self.device))
        dim = self.transformer.clip_dim
        if prompts.ndim != 2 or prompts.shape[1] != dim:
            wanted = f"images (P, 3, H, W), embeddings (P, {dim}) or texts"
            raise ClipgenError(f"a prompt of shape {tuple(prompts.shape)} is of no known kind: give {wanted}")
        return prompts.to(self.device)

    @torch.inference_mode()
    def similarity(self, images: torch.Tensor, prompt: Prompts) -> torch.Tensor:
        """CLIP scores (B,) of images (B, 3, H, W) in [-1, 1]: cosines with one prompt."""
        return self.embed(images) @ self.embed(prompt)[0]

    def condition(self, embeds: torch.Tensor, is_text: bool, neighbours: int = 0, align: str = "none") -> torch.Tensor:
        """The transformer's input for CLIP embeddings (P, D) of texts or images: aligned or replaced, (P, D)."""
        if is_text and align != "none":
            if not self.moments.any():
                needs = "align needs the moments of image and text embeddings, which this generator lacks"
                raise ClipgenError(f"{needs}: export the run with its captions by --data, or give from_parts moments")
            embeds = sample.aligned(embeds, self.moments, align)
        if is_text and neighbours:
            if not len(self.bank):
                raise ClipgenError(f"neighbours={neighbours} needs embeddings of images: give from_parts a bank")
            embeds = sample.mean_of_nearest(embeds, self.bank.to(embeds.dtype), neighbours)
        return embeds

    def _prompt_embeds(self, prompts: Prompts, config: SampleConfig) -> PromptEmbeds:
        embeds, is_text = self.embed(prompts), not isinstance(prompts, torch.Tensor)
        return embeds, self.condition(embeds, is_text, config.neighbours, config.align)

    def _previews(
        self, asked: PromptEmbeds, seeds: list[int], config: SampleConfig, known: torch.Tensor | None, every: int
    ) -> Iterator[Preview]:
        """Candidate after candidate, with a preview after every `every` tokens (0: none), then the best images."""
        embeds, condition = asked
        candidates = []
        for j in range(config.candidates):
            candidate_seeds = [(seed, j) for seed in seeds] if j else seeds
            steps = sample.generate_tokens(self.transformer, condition, candidate_seeds, config, known)
            for step, tokens in enumerate(steps, start=1):
                if every and step % every == 0 and bool((tokens < 0).any()):
                    images = sample.decode(self.vqgan, tokens, config.batch_size)
                    yield Preview(images, (j + float((tokens >= 0).float().mean())) / config.candidates)
            candidates.append(sample.decode(self.vqgan, tokens, config.batch_size))
        best = candidates[0] if len(candidates) == 1 else sample.best_of(self.clip, candidates, embeds)
        yield Preview(best, 1.0)


def _repeat(prompts: Prompts | list[float], n: int, seed: int) -> tuple[list | torch.Tensor, list[int]]:
    """Each prompt n times, and the seeds: image j of every prompt has seed + j."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if len(prompts) == 0 or n < 1:
        raise ClipgenError("nothing to generate: give at least one prompt and n >= 1")
    seeds = [seed + j for _ in range(len(prompts)) for j in range(n)]
    if isinstance(prompts, torch.Tensor):
        return prompts.repeat_interleave(n, 0), seeds
    return [prompt for prompt in prompts for _ in range(n)], seeds
