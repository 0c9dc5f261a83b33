"""Sampling: from an embedding to an image.

In: embeddings (B, D) of unit norm and a seed for each row. Out: tokens (B, L), or images (B, 3, H, W) in [-1, 1].
Filters are pure functions of logits. `TextToImage` is the whole inference path in one object and one call.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file
from torch import nn

from .clip_embed import ClipEmbedder
from .config import SampleConfig, VQGANConfig, from_dict, replace_fields
from .runtime import distributed
from .runtime.runs import DATA, ClipgenError, fresh_folder, read_json, reason, shortened
from .sample import Seed, generate, project, token_by_token
from .study.released import GENERATORS, load_released
from .transformer import ImageTransformer, centre
from .vqgan import VQGAN

PRETRAINED = {"shapes": DATA / "shapes_generator"}  # generators that come with the project
EXPORTED = {"config.json", "model.safetensors"}  # the files of one
Prompts = str | list[str] | torch.Tensor  # texts, images (P, 3, H, W) in [-1, 1], or CLIP embeddings of images (P, D)


class PromptEmbeds(NamedTuple):
    """P prompts as the models take them."""

    embeds: torch.Tensor  # (P, D), CLIP's own: candidates are ranked by these
    condition: torch.Tensor  # (P, D), what the transformer takes for them


class Preview(NamedTuple):
    """A look at images that are being drawn."""

    images: torch.Tensor  # (B, 3, H, W) in [-1, 1]; what is not drawn yet is mid grey, 0
    share: float  # of the tokens that are drawn, from 0 to 1


def slerp(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """The point at `share` of the way from unit vectors a (..., D) to b along the great circle between them.

    0 gives a and 1 gives b, exactly; equal shares are equal angles, and every point is of unit norm.

    Raises:
        ClipgenError: a and b point in opposite directions, so that no way is the shortest.
    """
    half = torch.atan2(
        (a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True)
    )  # keeps small angles exact
    if bool((half > math.pi / 2 - 1e-4).any()):
        raise ClipgenError(
            "two embeddings point in opposite directions and nothing lies between them: choose another pair"
        )
    turns = (
        2 * half / math.pi
    )  # half turns, the unit of sinc; sin(sx) / sin(x) is s sinc(sx) / sinc(x), which x = 0 does not break
    left, right = (s * torch.sinc(s * turns) / torch.sinc(turns) for s in (1 - share, share))
    return left * a + right * b


def rerank(clip: ClipEmbedder, images: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Order n candidates of each prompt by CLIP similarity, best first.

    Args:
        images: (P, n, 3, H, W) in [-1, 1], n candidates of each of P prompts.
        embeds: (P, D), CLIP's embeddings of the prompts.

    Returns:
        (P, n) int64 indices into the candidates.
    """
    shown = clip.images(images.flatten(0, 1)).view(*images.shape[:2], -1)
    return torch.einsum("pnd,pd->pn", shown, embeds).argsort(dim=1, descending=True)


class TextToImage(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="clipgen_lib",
    tags=["text-to-image", "clip-gen"],
    repo_url="https://arxiv.org/abs/2203.00386",
):
    """Text or image in, images out.

    `save_pretrained(folder)` writes config.json and model.safetensors (VQGAN and transformer); CLIP is named in the
    config and loaded by name. `from_pretrained(folder_or_hub_id)` is the way back; `clip={"name": ..., "pretrained": ...}`
    given to it takes the place of the CLIP in the config, for weights that lie elsewhere.
    `generator.transformer.bfloat16()` halves what every step reads: other tokens for a seed, of the same quality.
    """

    def __init__(self, vqgan: dict, transformer: dict, clip: dict, sample: dict, bank_rows: int = 0):
        super().__init__()
        self.vqgan = VQGAN(from_dict(VQGANConfig, vqgan)).eval().requires_grad_(False)
        self.transformer = ImageTransformer.from_description(transformer).eval().requires_grad_(False)
        self.settings: SampleConfig = from_dict(SampleConfig, sample)
        if not isinstance(clip, dict) or not {"name"} <= clip.keys() <= {"name", "pretrained"}:
            raise ClipgenError(
                f"the generator's config names its CLIP as {shortened(str(clip))}: give `name` and `pretrained` alone"
            )
        self.clip_source = clip
        self.register_buffer("bank", torch.zeros(bank_rows, self.transformer.clip_dim, dtype=torch.float16))
        self.register_buffer("offset", torch.zeros(self.transformer.clip_dim))
        self._clip: list[ClipEmbedder] = []  # in a list, so that its weights are not among ours

    @classmethod
    def from_parts(
        cls,
        vqgan: VQGAN,
        transformer: ImageTransformer,
        clip: ClipEmbedder,
        clip_source: dict,
        settings: SampleConfig,
        bank: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> TextToImage:
        """Put trained parts together.

        Args:
            clip_source: how to load this CLIP again: its `name` and `pretrained`.
            bank: embeddings (M, D) of the training images, for `neighbours`.
            offset: mean embedding of images minus that of texts, (D,), for `shift`.
        """
        if transformer.codebook_size != vqgan.config.codebook_size or transformer.n_tokens != vqgan.config.side**2:
            raise ClipgenError("VQGAN and transformer differ in codebook or token count: use both from one run")
        if transformer.clip_dim != clip.dim:
            raise ClipgenError(
                f"the transformer expects CLIP embeddings of {transformer.clip_dim} dimensions, {clip.name} gives {clip.dim}: use the CLIP of its training"
            )
        whole = cls(
            vqgan.describe(), transformer.describe(), clip_source, asdict(settings), 0 if bank is None else len(bank)
        )
        if bank is not None:
            whole.bank.copy_(bank)
        if offset is not None:
            whole.offset.copy_(offset)
        whole.vqgan.load_state_dict(vqgan.state_dict())
        whole.transformer.load_state_dict(transformer.state_dict())
        whole._clip.append(clip)
        return whole.to(clip.device)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: object) -> TextToImage:
        """A generator by the name of one that comes with the project (`shapes`), a folder of `save_pretrained`, or a hub id.

        Args:
            options: `clip`, or whatever `PyTorchModelHubMixin.from_pretrained` takes (revision, cache_dir, ...).

        Raises:
            ClipgenError: nothing of that name is here or can be downloaded, or what is there is no generator.
        """
        try:
            with contextlib.redirect_stdout(None):  # the mixin prints where it reads from
                return super().from_pretrained(PRETRAINED.get(str(name), name), **options)
        except ClipgenError:
            raise
        except (
            Exception
        ) as error:  # of a config and weights of any bytes: hub, mixin and torch raise whatever they like
            raise ClipgenError(
                f"{shortened(str(name))!r} is no generator that can be read here ({reason(error)}): give 'shapes', a folder that save_pretrained wrote, or a hub id"
            ) from error

    @classmethod
    def _from_pretrained(cls, **options: object) -> TextToImage:
        with torch.device("meta"):  # a config of other sizes than its weights' is refused before it costs anything
            return super()._from_pretrained(**options)

    @classmethod
    def _load_as_safetensor(cls, model: TextToImage, model_file: str, map_location: str, strict: bool) -> TextToImage:
        """What the mixin calls: the file's tensors take the places of those that have no memory yet, each of its own dtype."""
        with torch.device(map_location):
            tensors, wanted = load_file(model_file, map_location), model.state_dict()
            model.load_state_dict(
                {k: v.to(wanted[k].dtype) if k in wanted else v for k, v in tensors.items()}, assign=True
            )
        return model

    @classmethod
    def _load_as_pickle(cls, model: TextToImage, model_file: str, map_location: str, strict: bool) -> TextToImage:
        raise ClipgenError(f"{model_file} holds pickled weights, which are not read: ask for model.safetensors")

    def export(self, folder: Path) -> None:
        """Write float16 weights as `from_pretrained` reads them, in place of an earlier export.

        Raises:
            ClipgenError: the folder holds anything else, which would be lost.
        """
        if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= EXPORTED):
            raise ClipgenError(f"{folder} holds other things than an exported generator: give a new folder")
        with fresh_folder(folder) as fresh:
            copy.deepcopy(self).half().save_pretrained(fresh)
            (fresh / "README.md").unlink()  # a model card that says nothing of this model
            (fresh / "model.safetensors").chmod(0o644)

    @classmethod
    def from_released(cls, name: str, folder: str | Path, device: str | torch.device = "cpu") -> TextToImage:
        """A generator that others have trained, from their published files.

        Args:
            name: `hfai-coco`: HFAiLab/clip-gen, trained on MS-COCO, from vqgan_coco.pt and gpt_coco.pt.
            folder: where those files lie. OpenAI's ViT-B-32.pt is used from there too, and downloaded where it is not;
                `save_pretrained` names the CLIP `openai` in both cases. Another CLIP under that file name is kept as a path.

        Raises:
            ClipgenError: unknown name; a file missing, damaged, with code in it, or of another model.
        """
        if name not in GENERATORS:
            raise ClipgenError(f"unknown generator {name!r}: choose one of {', '.join(GENERATORS)}")
        released, file = GENERATORS[name], Path(folder) / GENERATORS[name].clip_file
        vqgan, transformer = (load_released(part, folder, device) for part in (released.vqgan, released.transformer))
        source = {**released.clip, "pretrained": str(file.resolve())} if file.is_file() else released.clip
        clip = ClipEmbedder.load(**source, device=device)
        source = released.clip if clip.weights_hash == released.clip_hash else source
        return cls.from_parts(vqgan, transformer, clip, source, released.sample)

    @property
    def device(self) -> torch.device:
        return self.transformer.head.weight.device

    @property
    def clip(self) -> ClipEmbedder:
        if not self._clip:
            self._clip.append(ClipEmbedder.load(**self.clip_source, device=self.device))
        return self._clip[0]

    @torch.inference_mode()
    def __call__(
        self, prompts: Prompts, n: int = 1, seed: int = 0, show_progress: bool = False, **settings: object
    ) -> torch.Tensor:
        """Draw n images for each prompt; given images, these are variations of them.

        Args:
            prompts: texts, images (P, 3, H, W) in [-1, 1], or CLIP embeddings of images (P, D) of unit norm.
            seed: image j of every prompt uses seed + j, whatever else is in the batch.
            settings: fields of SampleConfig for this call: guidance, candidates, temperature, top_k, top_p, batch_size.

        Returns:
            (P, n, 3, H, W) float in [-1, 1].
        """
        return self.generate_each(*_repeat(_listed(prompts), n, seed), show_progress, **settings).unflatten(0, (-1, n))

    @torch.inference_mode()
    def generate_each(
        self, prompts: list[str] | torch.Tensor, seeds: list[int], show_progress: bool = False, **settings: object
    ) -> torch.Tensor:
        """One image for each prompt and seed, the nearest of `candidates` in CLIP space: (P, 3, H, W) in [-1, 1]."""
        chosen = replace_fields(self.settings, settings)
        return self._draw_best(self._ask(prompts, chosen), seeds, chosen, show_progress)

    @torch.inference_mode()
    def draw_progressively(
        self, prompt: Prompts, n: int = 1, seed: int = 0, every: int = 0, **settings: object
    ) -> Iterator[Preview]:
        """Draw n images for one prompt and show them on the way.

        Args:
            every: tokens of an image between two looks; 0 takes a row of its squares.
            settings: fields of SampleConfig, as in a plain call. Candidates are seen one round after the other.

        Yields:
            Looks with images (n, 3, H, W). The last has share 1 and the images of the plain call.
        """
        chosen, every = replace_fields(self.settings, settings), every or self.vqgan.config.side
        prompts, seeds = _repeat(_listed(prompt), n, seed)
        if len(seeds) != n:
            raise ClipgenError(f"{len(seeds) // n} prompts to draw progressively: give one")
        asked, pools = self._ask(prompts, chosen), []
        for j in range(chosen.candidates):
            steps = token_by_token(self.transformer, asked.condition, _candidates(seeds, j), chosen)
            for step, tokens in enumerate(steps, start=1):
                share = float((tokens >= 0).float().mean())
                if step % every == 0 and share < 1:
                    yield Preview(self._unfinished(tokens, chosen.batch_size), (j + share) / chosen.candidates)
            pools.append(self._decode(tokens, chosen.batch_size))
        yield Preview(self._nearest(pools, asked.embeds), 1.0)

    @torch.inference_mode()
    def complete(
        self,
        images: torch.Tensor,
        prompts: Prompts,
        rows: int = 0,
        n: int = 1,
        seed: int = 0,
        show_progress: bool = False,
        **settings: object,
    ) -> torch.Tensor:
        """Keep the upper part of images and draw the rest.

        What is kept is its tokens: the image shows it as the VQGAN does, and its lowest pixels may change a little
        with what comes below them.

        Args:
            images: (P, 3, H, W) in [-1, 1], of the VQGAN's size.
            prompts: one for all of them, or one for each.
            rows: rows of the token grid that are kept; 0 takes half of them.

        Returns:
            (P, n, 3, H, W) float in [-1, 1], image j of each with seed + j.
        """
        side, size = self.vqgan.config.side, self.vqgan.config.image_size
        chosen, rows = replace_fields(self.settings, settings), rows or side // 2
        if not 0 < rows < side:
            raise ClipgenError(f"rows is {rows} of a grid of {side}: keep at least 1 and at most {side - 1}")
        if images.shape[1:] != (3, size, size):
            raise ClipgenError(f"images to complete are {tuple(images.shape)}: give (P, 3, {size}, {size})")
        prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        if len(prompts) != len(images):
            raise ClipgenError(f"{len(prompts)} prompts for {len(images)} images: give one for all or one for each")
        known = self.vqgan.encode(images.to(self.device))[:, :rows].flatten(1)
        prompts, seeds = _repeat(prompts, n, seed)
        asked = self._ask(prompts, chosen)
        return self._draw_best(asked, seeds, chosen, show_progress, known.repeat_interleave(n, 0)).unflatten(0, (-1, n))

    @torch.inference_mode()
    def blend(
        self,
        a: Prompts,
        b: Prompts,
        shares: list[float],
        n: int = 1,
        seed: int = 0,
        show_progress: bool = False,
        **settings: object,
    ) -> torch.Tensor:
        """Draw what lies between two prompts, each a text, an image (1, 3, H, W) or an embedding (1, D).

        Args:
            shares: how much of b is in it, from 0 to 1: points on the great circle between the two embeddings.

        Returns:
            (len(shares), n, 3, H, W) float in [-1, 1], image j of each share with seed + j.
        """
        chosen = replace_fields(self.settings, settings)
        ends = [self._ask(_listed(prompt), chosen) for prompt in (a, b)]
        if any(len(end.embeds) != 1 for end in ends):
            raise ClipgenError(
                "a blend has one prompt at each end: give a text, an image (1, 3, H, W) or an embedding (1, D)"
            )
        shares, seeds = _repeat(list(shares), n, seed)
        between = PromptEmbeds(
            *(torch.cat([slerp(x, y, share) for share in shares]) for x, y in zip(*ends, strict=True))
        )
        return self._draw_best(between, seeds, chosen, show_progress).unflatten(0, (-1, n))

    def walk(
        self, a: Prompts, b: Prompts, frames: int = 16, seed: int = 0, show_progress: bool = False, **settings: object
    ) -> torch.Tensor:
        """Images at equal steps from one prompt to another, all of one seed: (frames, 3, H, W) in [-1, 1]."""
        if frames < 2:
            raise ClipgenError(f"a walk of {frames} frames: give at least 2, its two ends")
        shares = torch.linspace(0, 1, frames).tolist()
        return self.blend(a, b, shares, 1, seed, show_progress, **settings)[:, 0]

    @torch.inference_mode()
    def embed(self, prompts: Prompts) -> torch.Tensor:
        """CLIP embeddings (P, D) of texts or of images (P, 3, H, W) in [-1, 1]; embeddings stay what they are."""
        if not isinstance(prompts, torch.Tensor):
            return self.clip.texts(list(_listed(prompts)))
        if prompts.ndim == 4 and prompts.shape[1] == 3:
            return self.clip.images(prompts.to(self.device))
        if prompts.ndim != 2 or prompts.shape[1] != self.transformer.clip_dim:
            raise ClipgenError(
                f"a prompt of shape {tuple(prompts.shape)} is neither images (P, 3, H, W) nor embeddings (P, {self.transformer.clip_dim}): give one of them, or texts"
            )
        return prompts.to(self.device)

    @torch.inference_mode()
    def similarity(self, images: torch.Tensor, prompt: Prompts) -> torch.Tensor:
        """CLIP scores (B,) of images (B, 3, H, W) in [-1, 1]: cosines with one prompt."""
        return self.embed(images) @ self.embed(prompt)[0]

    def _ask(self, prompts: list[str] | torch.Tensor, chosen: SampleConfig) -> PromptEmbeds:
        embeds = self.embed(prompts)
        return PromptEmbeds(
            embeds, self.condition(embeds, not isinstance(prompts, torch.Tensor), chosen.neighbours, chosen.shift)
        )

    def condition(self, embeds: torch.Tensor, is_text: bool, neighbours: int = 0, shift: bool = False) -> torch.Tensor:
        """What the transformer takes for CLIP embeddings (P, D) of texts or images: shifted, projected, centred, (P, D).

        Raises:
            ClipgenError: neighbours asked for without a bank, or a shift without an offset.
        """
        if is_text and shift:
            if not self.offset.any():
                raise ClipgenError(
                    "shift needs the means of images and texts: give from_parts an offset, or set it in the preset"
                )
            embeds = F.normalize(embeds + self.offset.to(embeds.dtype), dim=-1)
        if is_text and neighbours:
            if not len(self.bank):
                raise ClipgenError(
                    f"neighbours={neighbours} needs the embeddings of the training images: give from_parts a bank, or train with them in the preset"
                )
            embeds, is_text = project(embeds, self.bank.to(embeds.dtype), neighbours), False
        return centre(embeds, self.transformer.text_mean if is_text else self.transformer.image_mean)

    @torch.inference_mode()
    def draw(
        self,
        condition: torch.Tensor,
        seeds: list[Seed],
        settings: SampleConfig,
        show_progress: bool = False,
        known: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One image for each row of `condition` (B, D) and seed, from known first tokens (B, T) on: (B, 3, H, W) in [-1, 1]."""
        return self._decode(
            generate(self.transformer, condition, seeds, settings, show_progress, known), settings.batch_size
        )

    def _draw_best(
        self,
        asked: PromptEmbeds,
        seeds: list[int],
        chosen: SampleConfig,
        show_progress: bool,
        known: torch.Tensor | None = None,
    ) -> torch.Tensor:
        pools = [
            self.draw(asked.condition, _candidates(seeds, j), chosen, show_progress, known)
            for j in range(chosen.candidates)
        ]
        return self._nearest(pools, asked.embeds)

    def _nearest(self, pools: list[torch.Tensor], embeds: torch.Tensor) -> torch.Tensor:
        """Of one image of each prompt in every pool the nearest to its embedding."""
        if len(pools) == 1:
            return pools[0]
        pool = torch.stack(pools, dim=1)
        best = torch.cat([rerank(self.clip, p, e)[:, 0] for p, e in zip(pool.split(64), embeds.split(64), strict=True)])
        return pool[torch.arange(len(pool), device=pool.device), best]

    def _decode(self, tokens: torch.Tensor, batch_size: int) -> torch.Tensor:
        side = self.vqgan.config.side
        return torch.cat([self.vqgan.decode(t.view(-1, side, side)) for t in tokens.split(batch_size)])

    def _unfinished(self, tokens: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Images of tokens (B, L) with -1 for those not drawn, whose squares are mid grey.

        The decoder sees the last token drawn in their place: a drawn square may change a little when its neighbour comes.
        """
        drawn, side = tokens >= 0, self.vqgan.config.side
        last = tokens.gather(1, (drawn.sum(1, keepdim=True) - 1).clamp(min=0)).clamp(min=0)
        images = self._decode(torch.where(drawn, tokens, last), batch_size)
        return images * F.interpolate(drawn.view(-1, 1, side, side).to(images.dtype), images.shape[-2:])


def generate_together(
    generator: TextToImage,
    prompts: list[str] | torch.Tensor,
    seeds: list[int],
    show_progress: bool = False,
    **settings: object,
) -> torch.Tensor:
    """What `generator.generate_each` gives, every process of a launch drawing its share of it: (P, 3, H, W), on the CPU, for all."""
    first, end = (len(seeds) * (distributed.rank() + i) // distributed.world_size() for i in (0, 1))
    drawn = None
    if first < end:
        show = show_progress and distributed.is_main()
        drawn = generator.generate_each(prompts[first:end], seeds[first:end], show_progress=show, **settings).cpu()
    parts = [part for part in distributed.gather(drawn) if part is not None]
    return distributed.broadcast(torch.cat(parts) if parts else None)


def _listed(prompts: Prompts) -> list[str] | torch.Tensor:
    return [prompts] if isinstance(prompts, str) else prompts


def _repeat(things: list | torch.Tensor, n: int, seed: int) -> tuple[list | torch.Tensor, list[int]]:
    """Each thing n times over, and the seeds: image j of every one has seed + j."""
    if len(things) == 0 or n < 1:
        raise ClipgenError("nothing to draw: give at least one prompt and n >= 1")
    seeds = [seed + j for _ in range(len(things)) for j in range(n)]
    if isinstance(things, torch.Tensor):
        return things.repeat_interleave(n, 0), seeds
    return [thing for thing in things for _ in range(n)], seeds


def _candidates(seeds: list[int], number: int) -> list[Seed]:
    """Seeds of the candidates of one number; those of number 0 are the images drawn without rerank."""
    return [(seed, number) if number else seed for seed in seeds]


def load_run(
    path: Path,
    clip: ClipEmbedder,
    clip_source: dict,
    settings: SampleConfig,
    bank: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> TextToImage:
    """The generator of a run: its VQGAN, its transformer, and the CLIP they were trained with.

    Raises:
        ClipgenError: a part is missing, or the transformer was trained with another VQGAN or CLIP.
    """
    from .runtime.checkpoints import module_hash

    vqgan = VQGAN.load(path / "vqgan", clip.device)
    transformer = ImageTransformer.load(path / "transformer", clip.device)
    trained_with = read_json(path / "transformer" / "config.json").get("trained_with")
    now = {"vqgan": module_hash(vqgan), "clip": clip.weights_hash}
    if trained_with != now:
        raise ClipgenError(
            f"the transformer in {path} was trained with other weights ({trained_with}) than those there now ({now}): train it again"
        )
    return TextToImage.from_parts(vqgan, transformer, clip, clip_source, settings, bank, offset)
