"""One run, step by step: what the notebooks and the command line call.

In: a preset, the name of a run and its data. Out: the files of `results/<run>/`, one method for each step; a step that is done
or interrupted is resumed from its files. Captions serve previews, evaluation and, where a preset asks for it, a mean text
embedding; no training sees whose caption is whose.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

from . import evaluate, train_transformer, train_vqgan
from .clip_embed import ClipEmbedder, photo_notice
from .config import PRESETS, Config, Preset, SampleConfig, changed, checked_dataclass, from_dict, load_preset, with_clip
from .data.batches import ordered_batches
from .data.datasets import ImageSet, open_images
from .data.images import grid, to_float
from .metrics import oracle
from .metrics.captions import choose_captions, split_prompts
from .metrics.classifier import Classifier, accuracy, train_classifier
from .runtime import distributed, runs
from .runtime.checkpoints import module_hash
from .runtime.runs import ROOT, ClipgenError, Run, reason, shortened
from .store import TokenStore, extract
from .study.released import load_vqgan, named_sources, placed, source_place
from .text_to_image import TextToImage
from .training import chosen_tracker, finish, named_step
from .transformer import ImageTransformer
from .vqgan import VQGAN

if TYPE_CHECKING:
    import pandas

PREVIEW_PROMPTS = (
    "a large red circle",
    "a small blue star",
    "a large green heart",
    "a small yellow cross",
    "a pink ring left of a blue square",
    "a purple triangle above an orange diamond",
)


class UserPrompts(NamedTuple):
    """Prompts for a user's data, where they come from, and images for a figure."""

    prompts: list[str] | torch.Tensor  # texts, or CLIP embeddings (P, D) of images
    titles: list[str]  # of each prompt; with generated images, of each image
    source: str
    images: torch.Tensor | None = None  # (N, 3, H, W) in [-1, 1]: those of the embeddings, or generated, row by row
    columns: int = 0  # of the figure


def pick_device(device: str = "auto") -> str:
    """`auto` is a GPU where torch sees one, else the CPU.

    Raises ClipgenError: a device that torch does not know or have.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type != "cuda":
            torch.ones(1, device=chosen).item()
        elif (chosen.index or 0) >= torch.cuda.device_count():  # nothing is put there: that is for who trains
            raise RuntimeError("torch sees no such GPU")
    except Exception as error:  # each kind of device has its own
        raise ClipgenError(f"device {device!r} cannot be used here ({reason(error)}): use 'auto' or 'cpu'") from None
    return device


# entries of summary.json that a training which begins anew leaves there: others are of weights that it replaces
OF_EARLIER = {"vqgan": {"run", "preset", "seed", "begun", "versions", "classifier"}}
OF_EARLIER["transformer"] = OF_EARLIER["vqgan"] | {"data", "vqgan", "store", *runs.MERGED}


@checked_dataclass
class RunConfig(Config):
    """The config.json of a run."""

    preset: Preset
    data: str  # a label: what the images are called
    seed: int
    data_hash: str | None = None  # of its train split, by which data are known; None of the Shapes world

    @property
    def hash(self) -> str:
        """Of all but the label, for summary.json: by it a lost config.json is known."""
        return hashlib.sha256(json.dumps([asdict(self.preset), self.seed, self.data_hash]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Workbench:
    """A run, opened: its preset and data, and the steps of the method as methods."""

    run: Run  # with its seed and device
    preset: Preset
    data: str
    seed = property(attrgetter("run.seed"))
    device = property(attrgetter("run.device"))

    @classmethod
    def open(
        cls, preset: str | Preset, run: str, data: str = "shapes", seed: int = 0, device: str = "auto", clip: str = ""
    ) -> Workbench:
        """Open or begin a run; a run begins when all of `checked` is well, which raises ClipgenError where it is not.

        Args:
            preset: its name, or one of your own.
            data: `shapes` or what `open_images` reads; "" takes the run's own, unseen.
            clip: the conditioning CLIP in place of the preset's: a folder in open_clip's layout, or an open_clip
                model and its weights, such as `ViT-B-32-quickgelu/openai`.
        """
        wb, config = cls.checked(preset, run, data, seed, device, clip)
        if distributed.is_main() and not (wb.run.path / "config.json").exists():
            runs.write_json(wb.run.file("config.json"), asdict(config))
        if not wb.run.summary().get("versions"):
            if (wb.run.path / "vqgan").is_dir():
                lost = f"{wb.run.path / 'summary.json'} was lost and begins anew"
                distributed.tell(f"{lost}: a step that is run again, from its last checkpoint, fills its part")
            wb._record(run=run, preset=wb.preset.name, seed=seed, versions=runs.versions(), begun=config.hash)
        return wb

    @classmethod
    def checked(
        cls, preset: str | Preset, run: str, data: str = "shapes", seed: int = 0, device: str = "auto", clip: str = ""
    ) -> tuple[Workbench, RunConfig]:
        """What `open` opens, and its config.json, with nothing written. Data are the same where their content is.

        Raises:
            ClipgenError: a wrong value, no such data or device, or a run begun with another preset, data, seed or CLIP; a
                stage to be taken from elsewhere that is missing, damaged or of other networks or images.
        """
        chosen_tracker()  # refuses one that is not there
        chosen = preset if isinstance(preset, Preset) else load_preset(preset)
        chosen = replace(with_clip(chosen, clip_fields(clip)) if clip else chosen, shared=named_sources(chosen.shared))
        opened = replace(runs.open_run(run), seed=seed, device=pick_device(device))
        path = opened.path / "config.json"
        begun = begun_with(path) if path.exists() else None
        known = {} if begun else opened.summary()
        if (known.get("preset", chosen.name), known.get("seed", seed)) != (chosen.name, seed):
            before = f"preset {known['preset']} and seed {known['seed']}"
            raise ClipgenError(f"{path} is missing, and run {run!r} was begun with {before}: give these")
        wb = cls(opened, chosen, data or getattr(begun, "data", ""))
        try:  # the name of a folder rather than where it lies on this machine
            label = wb.data if wb.data == "shapes" else Path(os.path.expanduser(wb.data or "\0")).resolve().name
        except (OSError, ValueError):  # too long, a NUL in it, half of a pair of surrogates
            raise ClipgenError(f"data {shortened(wb.data)!r} is no path: give the folder of your images") from None
        if begun is None and chosen.shared.vqgan:
            wb = wb._with_sources()
        elif begun and chosen.shared == begun.preset.shared:  # checked when the run began, and perhaps taken
            taken = [name for name in ("vqgan", "transformer") if getattr(chosen.shared, name)]
            wb = replace(wb, preset=replace(chosen, **{name: getattr(begun.preset, name) for name in taken}))
        if begun is None:  # judges that are missing are told now, too
            _ = chosen.evaluate.classifier and wb.classifier(), *map(clip_fields, chosen.evaluate.judges)
        config = RunConfig(wb.preset, label, seed)
        if begun and not data:  # unseen
            config = replace(config, data_hash=begun.data_hash)
        elif data != "shapes" and (begun is None or begun.data_hash):
            images = wb.images()
            config = replace(config, data_hash=images.hash)
            if begun is None:  # broken captions and a split without images are told now, not after hours of training
                _ = images.has_captions, *map(wb.images, {"val", chosen.evaluate.split, *chosen.evaluate.also_splits})
        if begun and begun.data_hash and begun.data_hash == config.data_hash:  # whatever it is called now
            config = replace(config, data=begun.data)
        if begun and (differing := runs.differences(asdict(begun), asdict(config))):
            runs.refuse_published(path.parent)
            named = ", ".join(dict.fromkeys(name.removesuffix("_hash") for name in differing[:3]))
            if "preset.name" in differing:
                named = f"preset ({begun.preset.name}, not {chosen.name})"
            cure = f"choose another run name or delete {path.parent}"
            raise ClipgenError(f"run {run!r} was begun with another {named}: {cure}")
        if known.get("begun", config.hash) != config.hash:
            what = f"{path} is missing, and run {run!r} was begun with other settings or data than these"
            raise ClipgenError(f"{what}: give those, or restore it")
        return wb, config

    @classmethod
    def reopen(cls, run: str, device: str = "auto", data: str = "") -> Workbench:
        """Open a run that exists with the preset, seed and CLIP it was begun with; `data` says where its images lie now."""
        path = runs.open_run(run).path / "config.json"
        if not path.is_file():
            lost = f"{path} is missing: restore it, or give a stage the preset, data and seed of its beginning"
            none = f"there is no run {run!r}: begin it with 'clipgen run --run {run}' or train-vqgan"
            raise ClipgenError(lost if path.parent.is_dir() else none)
        begun = begun_with(path)
        return cls.open(begun.preset, run, data, begun.seed, device)

    @staticmethod
    def runs(sweep: str = "") -> pandas.DataFrame:
        """All runs under results/ with those of its sweeps, or those of one sweep: a row each, indexed by name.

        Columns are the dotted fields of config.json, as for --set (`transformer.width`), and of summary.json
        (`evaluation.caps`), which has the settings of the last evaluation (`sample.guidance`). A file that is missing or damaged
        leaves its part of the row empty. Raises ClipgenError: no such sweep.
        """
        import pandas

        sweeps = sorted(path.parent for path in runs.RESULTS.glob("*/sweep.json"))
        if sweep and runs.RESULTS / sweep not in sweeps:
            there = ", ".join(path.name for path in sweeps) or "none yet"
            raise ClipgenError(f"there is no sweep {shortened(sweep)!r} in {runs.RESULTS}: choose from {there}")
        roots = [runs.RESULTS / sweep] if sweep else [runs.RESULTS, *sweeps]
        paths = (path for root in roots for path in root.glob("*/*.json") if path.stem in ("config", "summary"))
        facts = {}
        for folder in sorted({path.parent for path in paths}):
            row = facts.setdefault(str(folder.relative_to(runs.RESULTS)), {})
            with suppress(ClipgenError):
                begun = begun_with(folder / "config.json")
                fields = {**asdict(begun.preset), "preset": begun.preset.name, "data": begun.data, "seed": begun.seed}
                fields = json.loads(json.dumps(fields))  # lists for tuples, as in summary.json
                row |= pandas.json_normalize(fields).drop(columns="name").to_dict("records")[0]
            with suppress(ClipgenError):
                row |= pandas.json_normalize(Run(folder).summary()).to_dict("records")[0]
        return pandas.DataFrame.from_dict(facts, orient="index")

    def images(self, split: str = "train") -> ImageSet:
        return open_images(self.data, split, self.preset.vqgan.image_size, self.preset.shapes, self.seed)

    def _with_sources(self) -> Workbench:
        """With the sizes of the networks that are taken from elsewhere in its preset; all that is taken has been checked."""
        shared, vqgan = self.preset.shared, load_vqgan(self.preset.shared.vqgan)
        wb = replace(self, preset=replace(self.preset, vqgan=vqgan.config))
        if shared.store:
            stores, flip = source_place(shared.store)[0] / "store", self.preset.transformer_train.flip
            TokenStore.open_for(stores / "val", wb.images("val"), vqgan, wb.clip, flip=False)
            TokenStore.open_for(stores / "train", wb.images(), vqgan, wb.clip, flip)
        if shared.transformer:
            config = wb._transformer(source_place(shared.transformer)[0] / "transformer", vqgan).config
            wb = replace(wb, preset=replace(wb.preset, transformer=config))
        return wb

    @property
    def has_oracle(self) -> bool:
        return self.data == "shapes"

    @property
    def clip_source(self) -> dict:
        return {"name": self.preset.clip.name, "pretrained": self.preset.clip.pretrained}

    @property
    def notice(self) -> str:
        """What to know of this run's CLIP: that it does not know such images, or changes the noise; else empty."""
        noise_cos = self.preset.transformer_train.noise_cos
        of_preset = load_preset(self.preset.name) if self.preset.name in PRESETS else self.preset
        photos, own = photo_notice(self.preset.clip.name, self.data), of_preset.transformer_train.noise_cos
        why = f"Noise goes down to cosine {noise_cos}, not the preset's {own}: 0.32 is published for ViT-B/32, 0.85 found for CLIPs trained here."
        return photos if noise_cos == own else f"{photos} {why}".strip()

    @cached_property
    def clip(self) -> ClipEmbedder:
        return ClipEmbedder.load(**self.clip_source, device=self.device)

    def vqgan(self) -> VQGAN:
        return VQGAN.load(self.run.path / "vqgan", self.device)

    def classifier(self) -> Classifier | None:
        """The classifier of this run (`train_classifier`), or of the one that evaluate.classifier names; None where this run has none."""
        name = self.preset.evaluate.classifier
        folder = (runs.open_run(name).path if name else self.run.path) / "classifier"
        if name and not folder.is_dir():
            raise ClipgenError(
                f"run {name!r} has no classifier: make it by clipgen train-classifier --run {name} --data ..."
            )
        return Classifier.load(folder, self.device) if folder.is_dir() else None

    def store(self, split: str = "train") -> TokenStore:
        folder = self.run.path / "store" / split
        if self.preset.shared.vqgan and not folder.is_dir():
            self.extract()
        return TokenStore.open(folder, self.vqgan(), self.clip)

    def generator(self) -> TextToImage:
        """The run's networks put together; a transformer trained with others is a ClipgenError."""
        vqgan = self.vqgan()
        transformer = self._transformer(self.run.path / "transformer", vqgan)
        return self.assembled(vqgan, transformer, self.bank_and_moments(self.preset.sample))

    def assembled(self, vqgan: VQGAN, transformer: ImageTransformer, extras: tuple) -> TextToImage:
        """A generator of these networks, with what `bank_and_moments` gives."""
        return TextToImage.from_parts(vqgan, transformer, self.clip, self.clip_source, self.preset.sample, extras)

    def _transformer(self, folder: Path, vqgan: VQGAN) -> ImageTransformer:
        """A transformer from a folder; trained with another VQGAN or CLIP it is a ClipgenError."""
        transformer, now = ImageTransformer.load(folder, self.device), self._frozen(vqgan)
        if (then := runs.read_json(folder / "config.json").get("trained_with")) != now:
            raise ClipgenError(f"{folder} was trained with {then}, here is {now}: train it again")
        return transformer

    def _frozen(self, vqgan: VQGAN) -> dict[str, str]:
        """The hashes of what a transformer is trained with."""
        return {"vqgan": module_hash(vqgan), "clip": self.clip.weights_hash}

    def bank_and_moments(self, sample: SampleConfig) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What `neighbours` and `align` need beside the weights, each None where the setting is off.

        Returns:
            Embeddings of the training images (N, D); mean and deviation of image and of text embeddings (4, D).
        """
        bank = self.store().embeds(slice(None)) if sample.neighbours else None
        return bank, self.moments() if sample.align != "none" else None

    def moments(self) -> torch.Tensor:
        """Mean and deviation of the embeddings of the training images and of texts, (4, D)."""
        return torch.cat([self.store().moments(), self.text_moments()])

    @torch.inference_mode()
    def text_moments(self) -> torch.Tensor:
        """Mean and deviation (2, D) of the embeddings of up to 10,000 captions of training images: unpaired text, for `align`.

        Raises ClipgenError: the images have no captions.
        """
        texts = [texts[0] for texts in self.images().captions if texts]
        if not texts:
            cure = "put name.txt beside name.jpg, or do without align"
            raise ClipgenError(f"{self.images().root} has no captions to take moments of: {cure}")
        if len(texts) > 10_000:
            chosen = np.random.default_rng([self.seed, 41]).choice(len(texts), 10_000, replace=False)
            texts = [texts[i] for i in chosen]
        embeds = self.clip.texts(texts).cpu()
        return torch.stack([embeds.mean(0), embeds.std(0, correction=0)])

    def train_vqgan(self, steps: int = 0, step_of: Callable = train_vqgan.generator_step) -> dict[str, float]:
        """Stage 1, or the VQGAN of a source; returns its PSNR and codebook use on the val split.

        `steps` above 0 replaces the preset's. `step_of` computes the generator's loss: a function with the arguments and
        results of `generator_step`.
        """
        preset = changed(self.preset, {"vqgan_train": {"steps": steps}} if steps else {})
        images, val_images = self.images(), self.images("val")
        if len(val_images) < 4:  # two halves of two: fewer have no covariance
            found = f"{len(images)} images to train on and {len(val_images)} to test on"
            raise ClipgenError(f"{val_images.root} holds {found}: give at least 4 of each")
        next(ordered_batches(val_images, range(len(val_images)), 16))  # raises where there is not one to test on
        named, is_kept = named_step(step_of, train_vqgan.generator_step), self._is_kept("vqgan")
        with self._timed("vqgan", begun=is_kept):
            if source := self.preset.shared.vqgan:
                vqgan = self.vqgan() if (self.run.path / "vqgan").is_dir() else load_vqgan(source)
                if vqgan.config != self.preset.vqgan:
                    raise ClipgenError(f"the VQGAN of {source} has other sizes than when the run began: restore it")
                vqgan = finish(self.run, "vqgan", vqgan, {})
                named = {"source": source, "hash": module_hash(vqgan)}
            elif is_kept:
                vqgan, named = self.vqgan(), self.run.summary().get("vqgan", {})
            else:
                vqgan = train_vqgan.train_vqgan(self.run, (images, val_images), preset, self.clip, step_of)
            data = {"name": images.name, "hash": images.hash, "n_train": len(images), "n_eval": len(val_images)}
            scores = evaluate.evaluate_vqgan(vqgan.to(self.device), val_images)
            self._record(data=data, vqgan=scores | named)
        return scores

    def extract(self) -> TokenStore:
        """Both splits through the frozen encoders, or its source's store; returns the train store."""
        source, train = self.preset.shared.store, self.preset.transformer_train
        if self.preset.shared.vqgan and not (self.run.path / "vqgan").is_dir():
            self.train_vqgan()
        vqgan = self.vqgan()
        with self._timed("extract"):
            for split, flip in (("val", False), ("train", train.flip)):
                images, folder = self.images(split), self.run.path / "store" / split
                if source and distributed.is_main() and not folder.is_dir():
                    TokenStore.open(source_place(source)[0] / "store" / split, vqgan, self.clip).take(folder)
                store = extract(images, vqgan, self.clip, folder, flip, train.workers)
                if images.skipped:
                    self._record(skipped=images.skipped)
            if source:
                self._record(store={"source": source, "hash": store.meta["hash"]})
        return store

    def train_transformer(self, steps: int = 0, step_of: Callable = train_transformer.transformer_step) -> dict:
        """Stage 2, with previews at every checkpoint, or its source's transformer, with one preview; returns validation losses.

        Arguments as of `train_vqgan`. Where the VQGAN is taken from elsewhere, it and the store are made first if they lack.
        """
        preset = changed(self.preset, {"transformer_train": {"steps": steps}} if steps else {})
        stores, vqgan = (self.store(), self.store("val")), self.vqgan()
        prompts = self.preview_prompts(), stores[1].embeds(slice(0, 6))
        extras = self.bank_and_moments(preset.sample)

        def preview(transformer, step):  # always of the same prompts and seeds
            generator = self.assembled(vqgan, transformer, extras)
            images = torch.cat([generator.generate_each(p, list(range(len(p))), candidates=1) for p in prompts])
            sheet = grid(images, columns=len(images))
            Image.fromarray(sheet).save(self.run.file("previews", f"{step:06d}.png"))
            return sheet

        is_kept = self._is_kept("transformer", trained_with=self._frozen(vqgan))
        with self._timed("transformer", begun=is_kept):
            frozen = train_transformer.Frozen(vqgan, self.clip)
            if source := preset.shared.transformer:
                folders = self.run.path / "transformer", source_place(source)[0] / "transformer"
                folder = next(filter(Path.is_dir, folders), folders[1])
                trained, facts = self._transformer(folder, vqgan), runs.read_json(folder / "config.json")
                trained = finish(self.run, "transformer", trained, {}, trained_with=facts["trained_with"])
                named = {"source": source, "hash": module_hash(trained)}
                if distributed.is_main():
                    preview(trained, 0)
            elif is_kept:
                trained = self._transformer(self.run.path / "transformer", vqgan)
                named = self.run.summary().get("transformer", {})
            else:
                trained = train_transformer.train_transformer(self.run, stores, preset, frozen, preview, step_of)
                named = named_step(step_of, train_transformer.transformer_step)
            scores = train_transformer.validation_losses(trained.to(self.device), stores[1], frozen)
            clip_size = sum(p.numel() for p in self.clip.parameters())
            self._record(transformer=scores | named, parameters={"clip": clip_size})
        return scores

    def train_classifier(self) -> dict[str, float]:
        """The classifier of classes, on real images of the train split; returns its accuracy on the val split."""
        images, val_images = self.images(), self.images("val")
        if val_images.classes is None:
            lacking = f"the val split of {val_images.root} has no classes to try a classifier on"
            raise ClipgenError(f"{lacking}: sort its images into a folder for each class")
        with self._timed("classifier"):
            classifier = train_classifier(self.run, images, self.preset.classifier)
            scores = accuracy(classifier, val_images)
            self._record(classifier=scores)
        return scores

    def preview_prompts(self, n: int = 6) -> list[str]:
        """Prompts for previews: fixed ones for shapes, else captions of the val split."""
        if self.has_oracle:
            return list(PREVIEW_PROMPTS[:n])
        images = self.images("val")
        chosen = choose_captions(images, n, self.seed) if images.has_captions else []
        return [text for _, text in chosen] or ["a photo"] * n

    def outside_prompts(self, n: int = 6) -> list[str]:
        """Prompts for what no training image shows: held-out pairs of the Shapes world, else three unlikely photos."""
        if self.has_oracle:
            return [prompt.text for prompt in oracle.prompts("held_out", n, self.seed)]
        return ["a flying penguin", "a dog with a cigar", "a lemon with face and hair"]

    def user_prompts(self, text: str = "", n: int = 8) -> UserPrompts:
        """What to generate for a user: prompts in a text, else captions that lie beside the images, else the images' embeddings.

        Args:
            text: prompts with `|` between them; all of them are taken.
            n: captions at most, no wording twice, of validation images (of training images where those have none).
                Without any caption, half as many validation images.

        Raises:
            ClipgenError: a text without a prompt in it.
        """
        if texts := split_prompts(text):
            return UserPrompts(texts, texts, "prompts of your own")
        val_images = self.images("val")
        for images in (val_images, self.images("train")):
            if images.has_captions and any(images.captions):
                pairs = choose_captions(images, sum(map(len, images.captions)), self.seed)
                texts = list(dict.fromkeys(text for _, text in pairs))[:n]
                return UserPrompts(texts, texts, f"captions of the {images.split} split")
        rows, batch = next(ordered_batches(val_images, range(min(max(n // 2, 1), len(val_images))), n))
        shown = to_float(batch)
        embeds = torch.cat([self.clip.images(part.to(self.device)) for part in shown.split(16)])
        titles = [val_images.names[row].rpartition("/")[2] for row in rows]
        source = "no captions here and no PROMPTS given: variations of validation images, from their embeddings"
        return UserPrompts(embeds, titles, source, shown)

    @torch.inference_mode()
    def generate_for_user(self, text: str = "", n: int = 8, each: int = 4, guidance: float = 0.0) -> UserPrompts:
        """Some images for each of `user_prompts`, image j with seed + j; variations behind the image that they vary.

        The prompts go into summary.json. `guidance` above 0 replaces the preset's.
        """
        user, settings = self.user_prompts(text, n), {"guidance": guidance} if guidance else {}
        images = self.generator()(user.prompts, n=each, seed=self.seed, **settings).cpu()  # (P, each, 3, H, W)
        titles = [[title] * each for title in user.titles]
        if user.images is not None:
            images = torch.cat([user.images[:, None], images], dim=1)
            titles = [[title] + ["variation"] * each for title in user.titles]
        self._record(prompts={"source": user.source, "asked": user.titles})
        return user._replace(images=images.flatten(0, 1), titles=sum(titles, []), columns=2 * images.shape[1])

    def class_rows(self, real: int = 4, generated: int = 6, most: int = 20) -> dict[str, torch.Tensor]:
        """Where folders are classes: validation images of each class, then images generated for its text.

        Returns:
            Class name -> (real + generated, 3, H, W) in [-1, 1], for the first `most` classes that have so many images;
            empty where there are no classes.
        """
        images, rows, shown = self.images("val"), {}, {}
        for row, name in enumerate(images.classes or []):
            rows.setdefault(name, []).append(row)
        classes = [(name, of) for name, of in rows.items() if len(of) >= real and images.captions[of[0]]][:most]
        generator = self.generator() if classes else None
        for name, of in classes:
            _, batch = next(ordered_batches(images, of[:real], real))
            images_of_text = generator(images.captions[of[0]][0], n=generated, seed=self.seed)[0]
            shown[name] = torch.cat([to_float(batch), images_of_text.cpu()])
        return shown

    def evaluate(self, guidance: float = 0.0, generator: TextToImage | None = None, split: str = "") -> dict:
        """All metrics into summary.json, of the run's generator or another. Returns the first prompts and images.

        The generated images stay in generated/; captions.txt says which image's caption each of them was generated for,
        prompts.txt what the oracle asked for. `guidance` above 0 replaces the preset's. Another split than the preset's is scored
        without the oracle, beside what is there: `evaluation SPLIT`, captions-SPLIT.txt; those of evaluate.also_splits after it.
        """
        generator, settings = generator or self.generator(), {"guidance": guidance} if guidance else {}
        judges = [ClipEmbedder.load(**clip_fields(name), device=self.device) for name in self.preset.evaluate.judges]
        by, folder = evaluate.Evaluators(self.clip, self.classifier(), judges), self.run.path / "generated"
        config = self.preset.evaluate
        other = "" if split in ("", config.split) else split
        with self._timed(f"evaluate {other}".strip(), resumable=False):
            place, val = folder / "-".join(filter(None, ("captions", other))), self.images(other or config.split)
            numbers, shown = evaluate.evaluate_generator(generator, val, by, config, place, self.seed, **settings)
            if val.split == "val2014" and (train := self.images()).split == "train2017":
                known = {name[-16:] for name in train.names}  # 000000000042.jpg, behind COCO_val2014_ in 2014
                seen = f"{sum(name[-16:] in known for name in val.names):,} of {len(val):,} images of val2014"
                numbers["warnings"].append(f"{seen} are in train2017, on which the run was trained: train on train2014")
            if config.nearest and distributed.is_main():
                made = ImageSet("captions", "all", place, sorted(path.name for path in place.glob("*.png")), val.size)
                numbers["nearest"], shown["nearest"] = evaluate.nearest_images(made, self.images(), val, config, by)
            entries = {f"evaluation {other}".strip(): numbers, "sample": {**asdict(self.preset.sample), **settings}}
            if self.has_oracle and config.n_oracle and not other:
                of_images = ("image", "reconstruction") if isinstance(generator, TextToImage) else ()
                asked = folder / "oracle", config.n_oracle, self.seed, ("text", *of_images)
                entries["oracle"] = evaluate.evaluate_oracle(generator, *asked, **settings)
        if distributed.is_main():
            start, texts = time.perf_counter(), shown["prompts"][:16]
            generator.generate_each(texts, list(range(len(texts))), **settings)
            seconds = {**self.run.summary().get("seconds", {}), "per_image": (time.perf_counter() - start) / len(texts)}
            seconds["total"] = sum(seconds.get(k, 0.0) for k in ("vqgan", "extract", "transformer", "evaluate"))
            self._record(**entries, seconds=seconds)
            if shown["captions"]:
                runs.write_atomic(self.run.file(f"{place.name}.txt"), shown["captions"])
            if "oracle" in entries:
                runs.write_atomic(self.run.file("prompts.txt"), evaluate.oracle_list(config.n_oracle, self.seed))
        distributed.barrier()  # the numbers are written
        for further in () if split else config.also_splits:
            self.evaluate(guidance, generator, further)
        return shown

    def export(self, folder: Path, n: int, candidates: int, with_moments: bool) -> dict:
        """Write the generator to a folder in float16, with `moments` where asked for, and on shapes ask the oracle of it.

        Args:
            n: prompts of each kind. candidates: images for each one kept in the second column; the first keeps every one.

        Returns:
            What summary.json says under `export`: `bytes` of weights, and `oracle` by the number of candidates.
        """
        with self._timed("export", resumable=False):
            generator = self.generator()
            if with_moments:
                generator.moments.copy_(self.moments())
            generator.export(folder)
            written = TextToImage.from_pretrained(folder).to(self.device)
            entry, oracle = {"bytes": (folder / "model.safetensors").stat().st_size}, {}
            for count in sorted({1, candidates}) if self.has_oracle else []:
                place = self.run.path / "generated" / f"export-{count}"
                scores = evaluate.evaluate_oracle(written, place, n, self.seed, ("text",), candidates=count)
                oracle[str(count)] = scores["text"]
            entry |= {"oracle": oracle} if oracle else {}
            self._record(export=entry)
        return entry

    def _is_kept(self, stage: str, **facts: object) -> bool:
        """Whether a training of these facts is done and its checkpoints were deleted since: it would begin anew."""
        folder, has_checkpoint = self.run.path / stage, any(self.run.path.glob(f"checkpoints/{stage}-*"))
        is_kept = folder.is_dir() and not has_checkpoint and not getattr(self.preset.shared, stage)
        is_kept = is_kept and facts.items() <= runs.read_json(folder / "config.json").items()
        distributed.tell(
            f"{folder} is kept as it is, without a checkpoint to go on from: delete it to train anew" * is_kept
        )
        return is_kept

    def _record(self, **entries: object) -> None:
        """Put entries into summary.json; in a launch only the first process does."""
        if distributed.is_main():
            self.run.add_to_summary(**entries)

    @contextmanager
    def _timed(self, step: str, resumable: bool = True, begun: bool = False) -> Iterator[None]:
        """The run kept to this process, or launch, for a step, and the step's wall seconds put into summary.json.

        The parts of an interrupted and resumed step add up; a training that has not `begun` drops what was recorded after it.
        """
        start, refused = time.perf_counter(), ""
        begun = begun or step not in OF_EARLIER or any(self.run.path.glob(f"checkpoints/{step}-*"))
        resumable = resumable and (begun or getattr(self.preset.shared, step) and (self.run.path / step).is_dir())
        with ExitStack() as stack:
            try:
                if distributed.is_main():
                    stack.enter_context(runs.held(self.run.path, f"{step} of run {self.run.name!r}"))
            except ClipgenError as error:
                refused = str(error)
            if refused := distributed.broadcast(refused):
                raise ClipgenError(refused)
            if step in OF_EARLIER and not resumable and distributed.is_main():
                kept = {key: value for key, value in self.run.summary().items() if key in OF_EARLIER[step]}
                runs.write_json(self.run.file("summary.json"), kept)
            try:
                yield
            finally:
                before = self.run.summary().get("seconds", {}).get(step, 0.0) if resumable else 0.0
                self._record(seconds={step: before + time.perf_counter() - start})


def begun_with(path: Path) -> RunConfig:
    """What a run was begun with. A field that its config.json lacks has the default."""
    found = runs.read_json(path)
    try:
        preset = from_dict(Preset, found.get("preset"), whole=False)
        return RunConfig(preset, *map(found.get, ("data", "seed", "data_hash")))
    except ClipgenError as error:
        what = f"{path} does not say what the run was begun with ({error})"
        raise ClipgenError(f"{what}: restore it, or delete {path.parent}") from None


def clip_fields(clip: str) -> dict[str, str | None]:
    """Name and weights of a CLIP from one text: `shapes`, a folder, or MODEL/WEIGHTS.

    A folder inside the project is named by its place there. WEIGHTS is a tag of open_clip's or a checkpoint file. Both are looked
    for in the project first, then here.
    """
    path, place = placed(clip, ROOT)
    if os.path.isdir(path) or clip == "shapes":
        return {"name": place, "pretrained": None}
    name, _, weights = clip.partition("/")
    if weights and os.path.isfile(file := placed(weights, ROOT)[0]):
        return {"name": name, "pretrained": str(file.resolve())}
    from open_clip import list_pretrained

    if (name, weights) not in list_pretrained():
        cure = "train it with clipgen train-clip, or write for example ViT-B-32-quickgelu/openai"
        raise ClipgenError(f"CLIP {shortened(clip)!r} is neither a folder here nor an open_clip MODEL/WEIGHTS: {cure}")
    return {"name": name, "pretrained": weights}
