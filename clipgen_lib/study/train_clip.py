"""Train a small CLIP where none can be downloaded: the only training of the project that sees captions.

In: scenes of the Shapes world, or images with captions. Out: a folder in open_clip's own layout (config, safetensors
in float16, BPE merges) that `ClipEmbedder.load` reads like any other. Model and tokenizer are open_clip's.
Axes: B batch, D CLIP dimension.
"""

import gzip
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from ..clip_embed import ClipEmbedder, resized
from ..config import ClipTrainConfig
from ..data import shapes
from ..data.batches import augmented_rows, batch_rows
from ..data.datasets import ImageSet
from ..data.images import from_arrays, to_float
from ..metrics.captions import embed_pairs
from ..metrics.features import efficientnet_lite
from ..runtime.runs import Run, fresh_folder, progress
from ..training import autocast, fit

CONTEXT = 32
EMBED_DIM = 256
TEXT = {"context_length": CONTEXT, "width": 192, "heads": 3, "layers": 4}
IMAGE = {
    # A small ResNet rather than a ViT: three times the images per second on a CPU at this size.
    "resnet": {"image_size": shapes.CANVAS, "layers": [2, 2, 2, 2], "patch_size": None},
    # It begins with ImageNet's weights and takes 64 pixels enlarged to 96, at a quarter more time than 64.
    "efficientnet": {
        "image_size": 96,
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
}
KINDS = {"mixed": None, "one": 1, "two": 2, "three": 3}  # objects of the scenes whose captions are retrieved
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}


def pool_scene(seed: int, index: int) -> shapes.Scene:
    """The index-th scene of the training pool, a wild one (`shapes.random_scene`).

    One scene in eight shows a held-out pair: CLIP knows every pair, the generator does not. After a scene of two
    objects comes the same scene with the places exchanged, so that each batch holds "a left of b" beside "b left of a".
    """
    even = index - index % 2
    scene = shapes.scene_at(seed, 50_000_000 + even, held_out=even % 16 == 0, wild=True)
    if index == even or len(scene.objects) != 2:
        return scene if index == even else shapes.scene_at(seed, 50_000_000 + index, wild=True)
    a, b = scene.objects
    # a large object may not fit the place of a small one, so sizes stay where they are
    stay = ("x", "y") if a.size == b.size else ("x", "y", "size", "radius")
    at_a, at_b = ({key: getattr(one, key) for key in stay} for one in (a, b))
    return replace(scene, objects=(replace(a, **at_b), replace(b, **at_a)))


class ScenePairs:
    """Scenes of the Shapes world, rendered once, and captions chosen anew for each batch."""

    def __init__(self, config: ClipTrainConfig, seed: int):
        self.config, self.seed, self.hash = config, seed, f"scenes-{config.scenes}-{seed}"
        self.pool = [pool_scene(seed, index) for index in range(config.scenes)]
        self.corpus = [text for scene in self.pool[:4000] for text in shapes.captions(scene)]
        self.images = np.empty((len(self.pool), shapes.CANVAS, shapes.CANVAS, 3), np.uint8)
        with progress(len(self.pool), "rendering") as bar:
            for image, scene in zip(self.images, self.pool, strict=True):
                image[:] = shapes.render(scene)
                bar.update()

    def batch(self, step: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1], a text for each, and which belong together (B, B): each to its own.

        Whole (2j, 2j + 1) pairs of scenes come together; a function of seed and step, so that resuming is exact.
        """
        half, per_epoch = self.config.batch_size // 2, self.config.scenes // self.config.batch_size
        order = np.random.default_rng([self.seed, 7, step // per_epoch]).permutation(self.config.scenes // 2)
        first = 2 * order[(step % per_epoch) * half :][:half]
        rows, rng = np.stack([first, first + 1], 1).ravel(), np.random.default_rng([self.seed, step])
        texts = [shapes.caption(self.pool[row], rng)[0] for row in rows]
        return from_arrays(self.images[rows]), texts, torch.eye(len(rows))


class ImagePairs:
    """Images with captions; where these are class names, images are mirrored too (no name says left or right)."""

    def __init__(self, images: ImageSet, config: ClipTrainConfig, seed: int):
        self.images, self.config, self.seed = images, config, seed
        self.hash = hashlib.sha256(repr([images.hash, images.captions]).encode()).hexdigest()[:16]
        self.rows = np.array([row for row, texts in enumerate(images.captions) if texts])
        self.corpus = sorted({text for texts in images.captions for text in texts})

    def batch(self, step: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """As of scenes, but images with the same words all belong together (UniCL, arXiv 2204.03610)."""
        rows = self.rows[batch_rows(len(self.rows), self.config.batch_size, self.seed, step)]
        rows, images = augmented_rows(self.images, rows, self.seed, step, flip=self.images.is_named_by_class)
        rng = np.random.default_rng([self.seed, step])
        texts = [self.images.captions[row][rng.integers(len(self.images.captions[row]))] for row in rows]
        together = np.equal.outer(texts, texts)
        return to_float(images), texts, torch.from_numpy(together).float()


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, together: torch.Tensor
) -> torch.Tensor:
    """The symmetric cross-entropy of CLIP (arXiv 2103.00020, section 2.3), where several texts may fit an image.

    Embeddings are (B, D) of unit norm, `scale` the inverse temperature. `together` is (B, B) of 0 and 1, symmetric;
    texts that fit an image share its probability. The identity gives open_clip's `ClipLoss`.
    """
    logits, targets = scale * images @ texts.T, together / together.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def train_tokenizer(texts: list[str], path: Path) -> int:
    """Learn BPE merges on texts and write them as open_clip's SimpleTokenizer reads them; returns its vocabulary size."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = [" ".join(m) if isinstance(m, list) else m for m in json.loads(bpe.to_str())["model"]["merges"]]
    with gzip.GzipFile(path, "wb", mtime=0) as stream:  # no time stamp: the same texts give the same file
        stream.write("\n".join(["#version: 0.2", *merges]).encode())
    return SimpleTokenizer(bpe_path=str(path), context_length=CONTEXT).vocab_size


def train_clip(run: Run, pairs: ScenePairs | ImagePairs, config: ClipTrainConfig) -> Path:
    """Train from scratch, or resume from the run's checkpoint, and write `<run>/clip/`; returns that folder."""
    torch.manual_seed(run.seed)
    merges = run.file("clip_bpe_merges.txt.gz")
    text_config = {**TEXT, "vocab_size": train_tokenizer(pairs.corpus, merges)}
    width = {"width": config.image_width} if config.image_tower == "resnet" else {}
    towers = {"embed_dim": EMBED_DIM, "vision_cfg": IMAGE[config.image_tower] | width, "text_cfg": text_config}
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=CONTEXT, bpe_path=str(merges))
    model, side = CLIP(**towers).to(run.device), towers["vision_cfg"]["image_size"]
    if config.image_tower == "efficientnet":
        weights = efficientnet_lite(0)[0].state_dict()
        model.visual.trunk.load_state_dict({k: v for k, v in weights.items() if "classifier" not in k})
        model.visual.to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(PREPROCESS[k], device=run.device).view(1, 3, 1, 1) for k in ("mean", "std"))

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as in CLIP
        images, texts, together = pairs.batch(step)
        images = resized(images.to(run.device), [side])
        with autocast(config, torch.device(run.device)):
            embeds = model(((images + 1) / 2 - mean) / std, tokenizer(texts).to(run.device))[:3]
        return contrastive_loss(*(x.float() for x in embeds), together.to(run.device)), {"scale": embeds[2].detach()}

    fit(run, "clip", model, config, loss_of, {"data": pairs.hash})
    with fresh_folder(run.path / "clip") as folder:
        halves = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_file(halves, folder / "open_clip_model.safetensors")
        content = {"model_cfg": towers, "preprocess_cfg": PREPROCESS}
        (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
        (folder / "bpe_merges.txt.gz").write_bytes(merges.read_bytes())
    return run.path / "clip"


@torch.inference_mode()
def retrieval(clip: ClipEmbedder, n_scenes: int = 1000, seed: int = 1, n_objects: int | None = None) -> dict:
    """How well CLIP finds the caption of a held-out wild scene among one caption for each of `n` scenes.

    Scenes have 1, 2 or 3 objects; None mixes them as the world does. `true_at_1` is the share of scenes of which the
    caption that ranks first is true (several wordings are), `own_at_1` of those where it is their own to the letter.
    """
    scenes = [shapes.scene_at(seed, 70_000_000 + i, i % 8 == 0, n_objects, wild=True) for i in range(n_scenes)]
    pairs = [shapes.caption(scene, np.random.default_rng([seed, i])) for i, scene in enumerate(scenes)]
    captions, claims = zip(*pairs, strict=True)
    rendered = from_arrays(np.stack([shapes.render(scene) for scene in scenes])).to(clip.device)
    images = torch.cat([clip.images(part) for part in rendered.split(250)])
    texts = clip.texts(list(captions))
    best = (images @ texts.T).argmax(1).tolist()
    true = [shapes.holds(claims[j], scene) for j, scene in zip(best, scenes, strict=True)]
    own = [captions[j] == captions[i] for i, j in enumerate(best)]
    return {"n": n_scenes, "true_at_1": float(np.mean(true)), "own_at_1": float(np.mean(own))}


@torch.inference_mode()
def caption_accuracy(clip: ClipEmbedder, images: ImageSet) -> dict[str, float]:
    """How well CLIP fits `n` images to their first captions, each wording once.

    `accuracy` is the share of images whose caption ranks first of all `wordings`, `cosine` the mean of image and own
    caption: how far a text lies from its image, which is how far noise should reach.
    """
    first = [(row, texts[0]) for row, texts in enumerate(images.captions) if texts]
    kept, shown, texts = embed_pairs(images, first, clip)
    wordings, places, own = np.unique([text for _, text in kept], return_index=True, return_inverse=True)
    accuracy = ((shown @ texts[places].T).argmax(1).numpy() == own).mean()
    cosine = (shown * texts).sum(1).double().mean()
    return {"n": len(kept), "wordings": len(wordings), "accuracy": float(accuracy), "cosine": float(cosine)}
