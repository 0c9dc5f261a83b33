"""A classifier of real images that judges drawn ones: does what was drawn for "a photo of a goldfish" look like one?

In: images sorted into class folders. Out: `<run>/classifier/`, a timm network trained on the real images only. It has
seen neither CLIP nor a drawn image, so that, unlike CapS, it is not the judge in its own cause.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ClassifierConfig, from_dict
from ..data.batches import augmented_rows, batch_rows, ordered_batches
from ..data.datasets import ImageSet
from ..data.images import to_float, to_uint8
from ..runtime.checkpoints import built_strictly, read_weights, save_weights
from ..runtime.runs import ClipgenError, Run, read_json
from ..training import fit


class Classifier(nn.Module):
    """A timm network and the names of its classes."""

    def __init__(self, config: ClassifierConfig, names: list[str]):
        import timm

        super().__init__()
        self.config, self.names = config, list(names)
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
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Classifier:
        """Read what `train_classifier` wrote to a folder, in eval mode."""
        folder = Path(folder)
        described = read_json(folder / "config.json")
        config, names = from_dict(ClassifierConfig, described.get("config")), described.get("names")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ClipgenError(f"{folder / 'config.json'} lacks the names of the classes: restore the original file")
        model = built_strictly(lambda: cls(config, names), read_weights(folder), folder)
        return model.to(device).eval().requires_grad_(False)


def train_classifier(
    run: Run, images: ImageSet, config: ClassifierConfig, seed: int = 0, device: str = "cpu", show_progress: bool = True
) -> Classifier:
    """Train on class folders, or go on from the run's checkpoint, and write `<run>/classifier/`.

    Raises:
        ClipgenError: no class folders, or a loss that is not finite.
    """
    if images.classes is None:
        raise ClipgenError(f"{images.root} has no classes: sort its images into a folder for each class")
    torch.manual_seed(seed)
    model = Classifier(config, sorted(set(images.classes))).to(device)
    labels = torch.tensor([model.names.index(name) for name in images.classes])

    def loss_of(step: int) -> tuple[torch.Tensor, dict]:
        rows = batch_rows(len(images), config.batch_size, seed, step)
        rows, pictures = augmented_rows(images, rows, seed, step, flip=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.bfloat16):
            logits = model(to_float(pictures).to(device))
        return F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.1), {}

    run = replace(run, seed=seed, device=device)
    fit(run, "classifier", model, config, loss_of, {**model.describe(), "data": images.hash})
    save_weights(run.path / "classifier", model)
    return model.eval().requires_grad_(False)


def accuracy(classifier: Classifier, images: ImageSet) -> dict[str, float]:
    """Share of a split's images whose class is read right."""
    device = next(classifier.parameters()).device
    right = [
        found == images.classes[row]
        for rows, batch in ordered_batches(images, range(len(images)), 250)
        for row, found in zip(rows, classifier.read(to_float(batch).to(device)), strict=True)
    ]
    return {"n": len(right), "accuracy": sum(right) / len(right)}
