"""A classifier of real images that scores generated ones: is the image for "a photo of a goldfish" classified as a goldfish?

In: images sorted into class folders, or with columns of attributes (type and colour). Out: `<run>/classifier/`, a timm network
trained on the real images only. It has seen neither CLIP nor a generated image: unlike CapS, its accuracy is independent of the
networks it evaluates.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from ..clip_embed import resized
from ..config import ClassifierConfig, from_dict
from ..data.batches import augmented_rows, batch_rows, ordered_batches
from ..data.datasets import ImageSet
from ..data.images import to_float, to_uint8
from ..runtime.checkpoints import load_weights, save_weights
from ..runtime.runs import ClipgenError, Run
from ..training import autocast, fit
from .features import efficientnet_lite
from .intervals import wilson


def attributes(name: str) -> dict[str, str]:
    """What a class name says: "type=handbag, colour=red" of type and colour, any other name of its `class`."""
    parts = [part.partition("=") for part in name.split(", ")]
    return {key: value for key, _, value in parts} if all(sign for _, sign, _ in parts) else {"class": name}


class Classifier(nn.Module):
    """A timm network with a head for each attribute, and the names of their values: attribute -> values."""

    def __init__(self, config: ClassifierConfig, names: dict[str, list[str]]):
        import timm

        super().__init__()
        self.config, self.names = config, {key: list(map(str, of)) for key, of in dict(names).items()}
        shape = {"num_classes": sum(map(len, self.names.values()))}
        if config.network == "resnet18":
            shape |= {"channels": tuple(config.width * 2**i for i in range(4)), "output_stride": 16}
        else:
            shape |= {"bn_momentum": 0.1}  # its own, 0.01, would keep ImageNet's statistics for hundreds of steps
        self.network = timm.create_model(config.network, **shape)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 3, H, W) in [-1, 1] -> logits (B, values) of each attribute."""
        if self.config.network != "resnet18":
            images = resized(images, [96, 96])
        return self.network(images).split([len(values) for values in self.names.values()], 1)

    @torch.inference_mode()
    def read(self, images: torch.Tensor) -> list[dict[str, str]]:
        """The attributes of each image (B, 3, H, W) in [-1, 1], rounded to 8 bits first, as files are."""
        found = [logits.argmax(1).tolist() for logits in self(to_float(to_uint8(images)))]
        values = [[of[i] for i in rows] for of, rows in zip(self.names.values(), found, strict=True)]
        return [dict(zip(self.names, image, strict=True)) for image in zip(*values, strict=True)]

    def describe(self) -> dict:
        return {"config": asdict(self.config), "names": self.names}

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Self:
        """Read what `train_classifier` wrote to a folder, in eval mode."""
        make = lambda described: cls(from_dict(ClassifierConfig, described.get("config")), described.get("names"))
        return load_weights(Path(folder), make).to(device).eval().requires_grad_(False)


def train_classifier(run: Run, images: ImageSet, config: ClassifierConfig) -> Classifier:
    """Train on class folders, or resume from the last checkpoint, and write `<run>/classifier/`.

    ClipgenError where there are no class folders, or a loss is not finite.
    """
    if images.classes is None:
        raise ClipgenError(f"{images.root} has no classes: sort its images into a folder for each class")
    torch.manual_seed(run.seed)
    known = [attributes(name) for name in images.classes]
    if len({tuple(one) for one in known}) > 1:
        raise ClipgenError(f"some classes of {images.root} are named attribute=value, ..., others not: name all alike")
    names = {key: sorted({one[key] for one in known}) for key in known[0]}
    model = Classifier(config, names)
    if config.network == "tf_efficientnet_lite0":  # but for its last layer
        weights = {k: v for k, v in efficientnet_lite(0)[0].state_dict().items() if "classifier" not in k}
        model.network.load_state_dict(weights, strict=False)
    model = model.to(run.device)
    labels = torch.tensor([[of.index(one[key]) for key, of in names.items()] for one in known]).to(run.device)

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rows = batch_rows(len(images), config.batch_size, run.seed, step)
        rows, batch = augmented_rows(images, rows, run.seed, step, flip=True)
        with autocast(config, torch.device(run.device)):
            logits = model(to_float(batch).to(run.device))
        pairs = zip(logits, labels[rows].T, strict=True)
        return sum(F.cross_entropy(x.float(), of, label_smoothing=0.1) for x, of in pairs), {}

    fit(run, "classifier", model, config, loss_of, {**model.describe(), "data": images.hash})
    save_weights(run.path / "classifier", model)
    return model.eval().requires_grad_(False)


def accuracy(
    classifier: Classifier, images: ImageSet, classes: dict[int, str] | None = None, change: Callable = lambda x: x
) -> dict:
    """Share of images, (B, 3, H, W) in [-1, 1] and changed first, classified as their class; None takes those of `images`.

    Returns `n`, `accuracy`, which asks that all attributes are right, and `accuracy_interval`; `attributes` has the last two of each
    attribute, where there are several.
    """
    device, correct = next(classifier.parameters()).device, []
    classes = dict(enumerate(images.classes)) if classes is None else classes
    for rows, batch in ordered_batches(images, list(classes), 250):
        found = classifier.read(change(to_float(batch).to(device)))
        asked = (attributes(classes[row]) for row in rows)
        correct += [[a.get(key) == b[key] for key in b] for a, b in zip(asked, found, strict=True)]
    scores = _share([all(one) for one in correct])
    each = {key: _share(hits) for key, hits in zip(classifier.names, zip(*correct, strict=True), strict=True)}
    return {"n": len(correct), **scores, **({"attributes": each} if len(each) > 1 else {})}


def _share(hits: Sequence[bool]) -> dict:
    return {"accuracy": sum(hits) / len(hits), "accuracy_interval": list(wilson(sum(hits), len(hits)))}
