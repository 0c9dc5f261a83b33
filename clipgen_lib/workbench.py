"""The two trainings, each a flat loop over steps on one Accelerator.

Stage 1: images in, a VQGAN out. Stage 2: a token store in, a transformer out. Batches, rates, noise and dropout are
functions of seed and step, and the rest of the state is in the checkpoint, so that a resumed run is the uninterrupted
one. Several processes share each batch and come to the same weights as one, up to the order of sums. A step without a finite
loss and gradient changes no weight and is counted. Neither stage sees a caption: previews of text prompts come in as embeddings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import evaluate, train_transformer, train_vqgan
from .clip_embed import ClipEmbedder, photo_notice
from .config import Preset, SampleConfig, load_preset
from .data.batches import ordered_batches
from .data.datasets import ImageSet, open_images
from .data.images import grid, to_float
from .metrics import captions, oracle
from .metrics.captions import choose_captions, split_prompts
from .metrics.classifier import Classifier, accuracy, train_classifier
from .runtime import distributed
from .runtime.checkpoints import load_checkpoint, save_weights
from .runtime.runs import (
    RESULTS,
    ROOT,
    ClipgenError,
    Run,
    differences,
    open_run,
    read_json,
    shortened,
    versions,
    write_atomic,
    write_json,
)
from .store import TokenStore, extract, pictures_at_once
from .text_to_image import TextToImage, load_run
from .train_vqgan import PatchDiscriminator, adversarial_loss
from .training import checkpoints
from .transformer import ImageTransformer
from .vqgan import VQGAN


def take_best(run: Run, stage: str) -> dict:
    """Put the EMA of the best checkpoint in the place of a stage's last weights; returns its `step` and `score`.

    Args:
        stage: `vqgan`, whose score is the squared error of held-out reconstructions, or `transformer`, whose score is the
            held-out likelihood in nats a token.

    Raises:
        ClipgenError: the stage is not trained, or none of its checkpoints has a score.
    """
    module = {"vqgan": VQGAN, "transformer": ImageTransformer}[stage].load(run.path / stage)
    if not (paths := checkpoints(run, stage, best_first=True)):
        raise ClipgenError(
            f"{run.path / 'checkpoints'} holds no checkpoint of the {stage} with a score: train it first"
        )
    state, meta = load_checkpoint(paths[0])
    module.load_state_dict(state["ema"]["module"])
    before = read_json(run.path / stage / "config.json")
    save_weights(run.path / stage, module, **{key: value for key, value in before.items() if key == "trained_with"})
    return {"step": meta["step"], "score": meta["score"]}


PREVIEW_PROMPTS = (
    "a large red circle",
    "a small blue star",
    "a large green heart",
    "a small yellow cross",
    "a pink ring left of a blue square",
    "a purple triangle above an orange diamond",
)


FEWEST_HELD_OUT = 4  # two halves of two: fewer have no covariance


class OwnPrompts(NamedTuple):
    """Prompts of a user's own, and where they come from."""

    prompts: list[str] | torch.Tensor  # texts, or CLIP embeddings (P, D) of images
    titles: list[str]
    source: str
    pictures: torch.Tensor | None = None  # (P, 3, H, W) in [-1, 1], those of the embeddings


class ImageGrid(NamedTuple):
    """Images for a figure."""

    images: torch.Tensor  # (N, 3, H, W) in [-1, 1], row by row
    titles: list[str]  # of each image
    columns: int
    source: str


def pick_device(device: str = "auto") -> str:
    """`auto` is a GPU where torch sees one, in a launch this process's own; a name that torch does not know or have is one sentence."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ClipgenError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}): use 'auto' or 'cpu'"
        ) from None
    return device


@dataclass(frozen=True)
class Workbench:
    """A run, opened: its preset and data, and the steps of the method as methods."""

    run: Run
    preset: Preset
    data: str
    seed: int
    device: str

    @classmethod
    def open(
        cls, preset: str, run: str, data: str = "shapes", seed: int = 0, device: str = "auto", clip: str = ""
    ) -> Workbench:
        """Open or begin a run; one begun with another preset, data, seed or CLIP is refused.

        Args:
            clip: the conditioning CLIP in place of the preset's: a folder in open_clip's layout, or an open_clip
                model and its weights, such as `ViT-B-32-quickgelu/openai`.
        """
        chosen, opened = load_preset(preset, **({"clip": clip_fields(clip)} if clip else {})), open_run(run)
        config = {"preset": asdict(chosen), "data": _portable(data), "seed": seed}
        path = opened.file("config.json")
        if path.exists():
            differing = differences(_begun_with(path), config)
            if differing:
                raise ClipgenError(
                    f"run {run!r} was begun with another {shortened(', '.join(differing[:3]))}: choose another run name or delete {path.parent}"
                )
        elif distributed.is_main():
            write_json(path, config)
        wb = cls(opened, chosen, data, seed, pick_device(device))
        if not opened.summary().get("versions"):
            wb._record(run=run, preset=preset, seed=seed, versions=versions())
        return wb

    @classmethod
    def reopen(cls, run: str, device: str = "auto", data: str = "") -> Workbench:
        """Open a run that exists with the preset, seed and CLIP it was begun with; `data` says where its images lie now."""
        if not (RESULTS / run / "config.json").is_file():
            raise ClipgenError(
                f"there is no run {run!r} under {RESULTS.name}/: begin it with 'clipgen run --run {run}'"
            )
        config = _begun_with(RESULTS / run / "config.json")
        clip = config["preset"]["clip"]
        name = "/".join(part for part in (clip["name"], clip["pretrained"]) if part)
        return cls.open(config["preset"]["name"], run, data or config["data"], config["seed"], device, name)

    # ------------------------------------------------------------------------------------------ parts

    def images(self, split: str = "train") -> ImageSet:
        return open_images(self.data, split, self.preset.vqgan.image_size, self.preset.shapes, self.seed)

    @property
    def has_oracle(self) -> bool:
        return self.data == "shapes"

    @property
    def clip_source(self) -> dict:
        return {"name": self.preset.clip.name, "pretrained": self.preset.clip.pretrained}

    @property
    def notice(self) -> str:
        """What a reader should know of this run's CLIP and images; empty where they go together, as far as can be told."""
        return photo_notice(self.preset.clip.name, self.data)

    @cached_property
    def clip(self) -> ClipEmbedder:
        return ClipEmbedder.load(**self.clip_source, device=self.device)

    @cached_property
    def judge(self) -> ClipEmbedder:
        """The CLIP that scores; the conditioning one where the preset names no other, and the result says so."""
        if self.preset.clip.judge_name is None:
            return self.clip
        return ClipEmbedder.load(self.preset.clip.judge_name, self.preset.clip.judge_pretrained, self.device)

    def vqgan(self) -> VQGAN:
        return VQGAN.load(self.run.path / "vqgan", self.device)

    def classifier(self) -> Classifier | None:
        """The judge of classes where one has been trained for this run (`train_classifier`), else None."""
        folder = self.run.path / "classifier"
        return Classifier.load(folder, self.device) if folder.is_dir() else None

    def store(self, split: str = "train") -> TokenStore:
        return TokenStore.open(self.run.path / "store" / split, self.vqgan(), self.clip)

    def bank_and_offset(self, sample: SampleConfig) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What some sampling needs beside the weights, each None where it does not.

        Embeddings of the training images (N, D), where texts are looked up among them; mean image minus mean text
        (D,), where texts are shifted by it.
        """
        bank = self.store().embeds(slice(None)) if sample.neighbours else None
        return bank, self.store().mean_embed() - self.text_mean() if sample.shift else None

    def text_mean(self) -> torch.Tensor:
        """Mean embedding (D,) of up to 10,000 captions of training images, for a training that centres or a shift.

        Whose caption is whose is not looked at: this is unpaired text, the one object that is not an image in a training.
        """
        texts = [texts[0] for texts in self.images().captions if texts]
        if not texts:
            raise ClipgenError(
                f"{self.images().root} has no captions to take the mean of: put name.txt beside name.jpg, or do without shift and centre"
            )
        if len(texts) > 10_000:
            texts = [texts[i] for i in np.random.default_rng([self.seed, 41]).choice(len(texts), 10_000, replace=False)]
        return torch.cat([self.clip.texts(texts[i : i + 256]).cpu() for i in range(0, len(texts), 256)]).mean(0)

    @torch.inference_mode()
    def text_image_pairs(self, n: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of up to n images of the val split and of the first caption of each, both (n, D) on the CPU."""
        images = self.images("val")
        rows = [row for row, texts in enumerate(images.captions) if texts][:n]
        pictures, texts = [], []
        for part, batch in ordered_batches(images, rows, 100):
            pictures.append(self.clip.images(to_float(batch).to(self.device)).cpu())
            texts.append(self.clip.texts([images.captions[row][0] for row in part]).cpu())
        return torch.cat(pictures), torch.cat(texts)

    def generator(self) -> TextToImage:
        return load_run(
            self.run.path, self.clip, self.clip_source, self.preset.sample, *self.bank_and_offset(self.preset.sample)
        )

    # ------------------------------------------------------------------------------------------ steps

    def train_vqgan(self, steps: int = 0) -> VQGAN:
        """Stage 1, and its PSNR and codebook use on the val split; `steps` above 0 replaces the preset's."""
        config = replace(self.preset.vqgan_train, **({"steps": steps} if steps else {}))
        images, held_out = self.images(), self.images("val")
        if len(held_out) < FEWEST_HELD_OUT:
            raise ClipgenError(
                f"{held_out.root} holds {len(images)} images to train on and {len(held_out)} to test on: give at least {FEWEST_HELD_OUT} of each"
            )
        with self._timed("vqgan"):
            vqgan = train_vqgan.train_vqgan(
                self.run, images, held_out, self.preset.vqgan, config, self.clip, self.seed, self.device
            )
        data = {"name": images.name, "hash": images.hash, "n_train": len(images), "n_eval": len(held_out)}
        scores = evaluate.evaluate_vqgan(vqgan.to(self.device), held_out)
        self._record(data=data, vqgan=scores)
        return vqgan

    def extract(self) -> TokenStore:
        """Both splits through the frozen encoders; returns the train store."""
        vqgan, settings = self.vqgan(), self.preset.transformer_train
        with self._timed("extract"):
            for split, flip in (("val", False), ("train", settings.flip)):
                images = self.images(split)
                store = extract(
                    images,
                    vqgan,
                    self.clip,
                    self.run.path / "store" / split,
                    flip,
                    pictures_at_once(vqgan.config, self.device),
                    settings.workers,
                )
                if images.skipped:
                    self._record(skipped=images.skipped)
        return store

    def train_transformer(self, steps: int = 0) -> None:
        """Stage 2, with previews from the same prompts and seeds at every checkpoint."""
        config = replace(self.preset.transformer_train, **({"steps": steps} if steps else {}))
        vqgan, store, held_out = self.vqgan(), self.store(), self.store("val")
        texts, embeds, extras = (
            self.preview_prompts(),
            held_out.embeds(slice(0, 6)),
            self.bank_and_offset(self.preset.sample),
        )

        def preview(transformer, step):
            generator = TextToImage.from_parts(
                vqgan, transformer, self.clip, self.clip_source, self.preset.sample, *extras
            )
            pictures = torch.cat(
                [generator.generate_each(p, list(range(len(p))), candidates=1) for p in (texts, embeds)]
            )
            Image.fromarray(grid(pictures, columns=len(pictures))).save(self.run.file("previews", f"{step:06d}.png"))

        with self._timed("transformer"):
            transformer = train_transformer.train_transformer(
                self.run,
                store,
                held_out,
                self.preset.transformer,
                config,
                vqgan,
                self.clip,
                self.seed,
                self.device,
                True,
                self.text_mean() if config.centre else None,
                preview,
            )
        scores = train_transformer.validation_losses(transformer.to(self.device), held_out, vqgan, self.clip)
        clip_size = sum(p.numel() for p in self.clip.parameters())
        self._record(transformer=scores, parameters={"clip": clip_size})

    def train_classifier(self) -> dict[str, float]:
        """The judge of classes, on real images of the train split; returns its accuracy on those of the val split."""
        images, held_out = self.images(), self.images("val")
        if held_out.classes is None:
            raise ClipgenError(
                f"the val split of {held_out.root} has no classes to try a classifier on: sort its images into a folder for each class"
            )
        with self._timed("classifier"):
            run = replace(self.run, seed=self.seed, device=self.device)
            classifier = train_classifier(run, images, self.preset.classifier)
        self._record(classifier=accuracy(classifier, held_out))
        return self.run.summary()["classifier"]

    def preview_prompts(self, n: int = 6) -> list[str]:
        """Prompts for images on the way: fixed ones for shapes, else captions of the val split."""
        if self.has_oracle:
            return list(PREVIEW_PROMPTS[:n])
        images = self.images("val")
        chosen = captions.choose_captions(images, n, self.seed) if images.has_captions else []
        return [text for _, text in chosen] or ["a photo"] * n

    def outside_prompts(self, n: int = 6) -> list[str]:
        """Prompts for what no training image shows: held-out pairs of the Shapes world, else three that no photo shows."""
        if self.has_oracle:
            return [prompt.text for prompt in oracle.prompts("held_out", n, self.seed)]
        return ["a flying penguin", "a dog with a cigar", "a lemon with face and hair"]

    def own_prompts(self, text: str = "", n: int = 8) -> OwnPrompts:
        """What to draw for a user: prompts in a text, else captions that lie beside the images, else images themselves.

        Args:
            text: prompts with `|` between them; all of them are taken.
            n: captions at most, no wording twice, of held-out images (of training images where those have none). Without
                any caption half as many held-out images, whose embeddings take the place of a text's.

        Raises:
            ClipgenError: a text without a prompt in it.
        """
        if texts := split_prompts(text):
            return OwnPrompts(texts, texts, "prompts of your own")
        for images in (self.images("val"), self.images("train")):
            if images.has_captions and any(images.captions):
                pairs = choose_captions(images, sum(map(len, images.captions)), self.seed)
                texts = list(dict.fromkeys(text for _, text in pairs))[:n]
                return OwnPrompts(texts, texts, f"captions of the {images.split} split")
        images = self.images("val")
        rows, batch = next(ordered_batches(images, range(min(max(n // 2, 1), len(images))), n))
        pictures = to_float(batch)
        embeds = torch.cat([self.clip.images(part.to(self.device)) for part in pictures.split(16)])
        source = "no captions here and no PROMPTS given: variations of held-out images, from their embeddings"
        return OwnPrompts(embeds, [images.names[row].rpartition("/")[2] for row in rows], source, pictures)

    @torch.inference_mode()
    def draw_prompts(self, text: str = "", n: int = 8, each: int = 4, guidance: float = 0.0) -> ImageGrid:
        """Some images for each of `own_prompts`, image j with seed + j; variations behind the image that they vary.

        What was asked for goes into summary.json under `prompts`. `guidance` above 0 replaces the preset's.
        """
        own, settings = self.own_prompts(text, n), {"guidance": guidance} if guidance else {}
        images = self.generator()(own.prompts, n=each, seed=self.seed, **settings).cpu()
        titles = [[title] * each for title in own.titles]
        if own.pictures is not None:
            images = torch.cat([own.pictures[:, None], images], dim=1)
            titles = [[title] + ["variation"] * each for title in own.titles]
        self._record(prompts={"source": own.source, "asked": own.titles})
        return ImageGrid(images.flatten(0, 1), sum(titles, []), 2 * images.shape[1], own.source)

    def class_rows(self, real: int = 4, drawn: int = 6, most: int = 20) -> dict[str, torch.Tensor]:
        """Where folders are classes: held-out images of each class, then images drawn for its text, seeds in order.

        Returns:
            Class name -> (real + drawn, 3, H, W) in [-1, 1], for the first `most` classes that have so many images; empty
            where there are no classes.
        """
        images, rows = self.images("val"), {}
        for row, name in enumerate(images.classes or []):
            rows.setdefault(name, []).append(row)
        rows = {
            name: chosen[:real] for name, chosen in rows.items() if len(chosen) >= real and images.captions[chosen[0]]
        }
        names = list(rows)[:most]
        if not names:
            return {}
        texts = [images.captions[rows[name][0]][0] for name in names]
        batches = ordered_batches(images, [row for name in names for row in rows[name]], real)
        shown = [
            torch.cat([to_float(batch), pictures.cpu()])
            for (_, batch), pictures in zip(batches, self.generator()(texts, n=drawn, seed=self.seed), strict=True)
        ]
        return {name: pictures for name, pictures in zip(names, shown, strict=True) if len(pictures) == real + drawn}

    def evaluate(self, guidance: float = 0.0) -> dict:
        """All metrics into summary.json; `guidance` above 0 replaces the preset's. Returns what was shown.

        The generated images stay in generated/; captions.txt says which image's caption each of them was generated for.
        """
        generator, settings = self.generator(), {"guidance": guidance} if guidance else {}
        evaluators, folder = evaluate.Evaluators(self.judge, self.classifier()), self.run.path / "generated"
        with self._timed("evaluate", resumable=False):
            numbers, shown = evaluate.evaluate_generator(
                generator,
                self.images("val"),
                evaluators,
                self.preset.evaluate,
                folder / "captions",
                self.seed,
                **settings,
            )
            entries = {"evaluation": numbers, "sample": {**asdict(self.preset.sample), **settings}}
            if self.has_oracle:
                n = self.preset.evaluate.n_oracle
                entries["oracle"] = evaluate.evaluate_oracle(generator, folder / "oracle", n, self.seed, **settings)
        if not distributed.is_main():
            return shown
        start, texts = time.perf_counter(), shown["prompts"][:16]
        generator.generate_each(texts, list(range(len(texts))), **settings)
        seconds = {**self.run.summary().get("seconds", {}), "per_image": (time.perf_counter() - start) / len(texts)}
        seconds["total"] = sum(seconds.get(k, 0.0) for k in ("vqgan", "extract", "transformer", "evaluate"))
        self._record(**entries, seconds=seconds)
        if shown["captions"]:
            write_atomic(self.run.file("captions.txt"), shown["captions"])
        return shown

    def export(self, folder: Path, n: int, candidates: int) -> dict:
        """Write the generator to a folder in float16, and on shapes ask the oracle of what was written.

        Args:
            n: prompts of each kind. candidates: images for each one kept in the second column; the first keeps every one.

        Returns:
            What summary.json says under `export`: `bytes` of weights, and `oracle` by the number of candidates.
        """
        self.generator().export(folder)
        written = TextToImage.from_pretrained(folder).to(self.device)
        entry: dict = {"bytes": (folder / "model.safetensors").stat().st_size}
        if self.has_oracle:
            entry["oracle"] = {}
            for count in sorted({1, candidates}):
                place = self.run.path / "generated" / f"export-{count}"
                scores = evaluate.evaluate_oracle(written, place, n, self.seed, ("text",), candidates=count)
                entry["oracle"][str(count)] = scores["text"]
        self._record(export=entry)
        return entry

    def _record(self, **entries: object) -> None:
        """Put entries into summary.json; in a launch the first process does."""
        if distributed.is_main():
            self.run.add_to_summary(**entries)

    @contextmanager
    def _timed(self, step: str, resumable: bool = True) -> Iterator[None]:
        """Wall seconds of a step into summary.json; the parts of an interrupted and resumed step add up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            before = self.run.summary().get("seconds", {}).get(step, 0.0) if resumable else 0.0
            self._record(seconds={step: before + time.perf_counter() - start})


def _begun_with(path: Path) -> dict:
    """The config.json of a run: its preset as nested dicts, data and seed.

    What a run did before a field existed is what the field's default does.

    Raises:
        ClipgenError: missing, or not what `Workbench.open` writes.
    """
    config = read_json(path)
    preset, data, seed, defaults = config.get("preset"), config.get("data"), config.get("seed"), asdict(Preset())
    is_whole = isinstance(data, str) and isinstance(seed, int) and isinstance(preset, dict)
    if is_whole:
        preset = {**defaults, "name": None, **preset}
        is_whole = all(isinstance(preset[part], type(value)) for part, value in defaults.items())
    if is_whole:
        preset = {k: {**v, **preset[k]} if isinstance(v, dict) else preset[k] for k, v in defaults.items()}
        is_whole = isinstance(preset["clip"]["name"], str) and isinstance(preset["clip"]["pretrained"], str | None)
    if not is_whole:
        raise ClipgenError(
            f"{path} lacks the preset, data or seed that the run was begun with: restore the original file, or delete {path.parent}"
        )
    return {**config, "preset": preset}


def _portable(data: str) -> str:
    """The name of a data folder rather than where it lies on this machine.

    Raises:
        ClipgenError: no folder can have that name.
    """
    try:
        return data if data == "shapes" else Path(os.path.expanduser(data)).resolve().name
    except (OSError, ValueError):  # too long, a NUL in it, half of a pair of surrogates
        raise ClipgenError(f"data {shortened(data)!r} is no path: give the folder of your images") from None


def clip_fields(clip: str) -> dict[str, str | None]:
    """Name and weights of a CLIP from one word: a folder (inside the project by its place there), `shapes`, or model/weights.

    Weights are a tag of open_clip's, or a checkpoint file: from the project's root, or with its whole path (model//place/file).
    """
    folder = ROOT / os.path.expanduser(clip)
    if os.path.isdir(clip) and not os.path.isdir(folder):
        folder = Path(clip).resolve()
    if os.path.isdir(folder):
        return {"name": str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder), "pretrained": None}
    name, _, weights = clip.partition("/")
    if weights and os.path.isfile(ROOT / weights):
        return {"name": name, "pretrained": str(ROOT / weights)}
    if "/" in weights:
        raise ClipgenError(
            f"CLIP {shortened(clip)!r} is neither a folder here nor MODEL/WEIGHTS: train it with clipgen train-clip, or write for example ViT-B-32-quickgelu/openai"
        )
    return {"name": name, "pretrained": weights or None}


def count_and_step(preset: Preset, clip_dim: int, optimise: bool = True) -> dict[str, float]:
    """Build both stages of a preset and take one optimiser step of each on one random image, on the CPU.

    Shows that a large preset is sound before a cluster is asked for it.

    Returns:
        Parameters of each stage, its loss where `optimise`, and `state_gigabytes`: weights, gradients, two AdamW
        moments and the EMA in float32 of the larger stage. Activations come on top and grow with the batch.
    """
    torch.manual_seed(0)
    config = preset.vqgan
    vqgan = VQGAN(config)
    images = to_float(torch.randint(0, 256, (1, 3, config.image_size, config.image_size)))
    found: dict[str, float] = {"vqgan": sum(p.numel() for p in vqgan.parameters())}
    if optimise:
        critic = PatchDiscriminator(preset.vqgan_train.discriminator_channels, preset.vqgan_train.discriminator_layers)
        with torch.autocast("cpu", torch.bfloat16):
            fake, quantized = vqgan(images)
            loss = (
                F.l1_loss(fake, images)
                + quantized.codebook_loss
                + quantized.commitment_loss
                + adversarial_loss(critic(fake))
            )
        found["vqgan_loss"] = _one_step(loss, vqgan)
    tokens = vqgan.encode(images).flatten(1)
    del vqgan
    transformer = ImageTransformer(preset.transformer, config.codebook_size, config.side**2, clip_dim)
    found["transformer"] = sum(p.numel() for p in transformer.parameters())
    if optimise:
        with torch.autocast("cpu", torch.bfloat16):
            logits = transformer(F.normalize(torch.randn(1, clip_dim), dim=-1), tokens)
        found["transformer_nll"] = _one_step(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), transformer)
    found["state_gigabytes"] = 5 * 4 * max(found["vqgan"], found["transformer"]) / 1e9
    return found


def _one_step(loss: torch.Tensor, module: torch.nn.Module) -> float:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
