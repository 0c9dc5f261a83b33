"""A classifier of real images that scores generated ones: is the image for "a photo of a goldfish" classified as a goldfish?

In: images sorted into class folders. Out: `<run>/classifier/`, a timm network trained on the real images only. It has seen
neither CLIP nor a generated image: unlike CapS, its accuracy is independent of the networks it evaluates.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ClassifierConfig, from_dict
from ..data.batches import augmented_rows, batch_rows, ordered_batches
from ..data.datasets import ImageSet
from ..data.images import to_float, to_uint8
from ..runtime.checkpoints import load_weights, save_weights
from ..runtime.runs import ClipgenError, Run
from ..training import autocast, fit
from .intervals import wilson


class Classifier(nn.Module):
    """A timm network and the names of its classes."""

    def __init__(self, config: ClassifierConfig, names: list[str]):
        import timm

        super().__init__()
        self.config, self.names = config, list(map(str, names))
        shape = {"channels": tuple(config.width * 2**i for i in range(4)), "output_stride": 16}
        self.network = timm.create_model("resnet18", num_classes=len(self.names), **shape)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, classes) logits."""
        return self.network(images)

    @torch.inference_mode()
    def read(self, images: torch.Tensor) -> list[str]:
        """The class of each image (B, 3, H, W) in [-1, 1], rounded to 8 bits first, as files are."""
        return [self.names[i] for i in self(to_float(to_uint8(images))).argmax(1).tolist()]

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
    model = Classifier(config, sorted(set(images.classes))).to(run.device)
    labels = torch.tensor([model.names.index(name) for name in images.classes])

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rows = batch_rows(len(images), config.batch_size, run.seed, step)
        rows, batch = augmented_rows(images, rows, run.seed, step, flip=True)
        with autocast(config, torch.device(run.device)):
            logits = model(to_float(batch).to(run.device))
        return F.cross_entropy(logits.float(), labels[rows].to(run.device), label_smoothing=0.1), {}

    fit(run, "classifier", model, config, loss_of, {**model.describe(), "data": images.hash})
    save_weights(run.path / "classifier", model)
    return model.eval().requires_grad_(False)


def accuracy(
    classifier: Classifier, images: ImageSet, classes: dict[int, str] | None = None, change: Callable = lambda x: x
) -> dict[str, float]:
    """Share of images, (B, 3, H, W) in [-1, 1] and changed first, classified as their class; None takes those of `images`."""
    device, correct = next(classifier.parameters()).device, []
    classes = dict(enumerate(images.classes)) if classes is None else classes
    for rows, batch in ordered_batches(images, list(classes), 250):
        names = classifier.read(change(to_float(batch).to(device)))
        correct += [name == classes[row] for row, name in zip(rows, names, strict=True)]
    share = {"accuracy": sum(correct) / len(correct), "accuracy_interval": list(wilson(sum(correct), len(correct)))}
    return {"n": len(correct), **share}
