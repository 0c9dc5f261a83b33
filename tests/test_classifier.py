import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from clipgen_lib.config import ClassifierConfig
from clipgen_lib.data.batches import augmented_rows
from clipgen_lib.data.datasets import open_images
from clipgen_lib.metrics.classifier import Classifier, accuracy, train_classifier
from clipgen_lib.runtime.runs import ClipgenError, open_run

SMALL = ClassifierConfig(width=8, steps=12, batch_size=8, lr=3e-3, warmup=2, precision="no", log_every=4, save_every=6)


@pytest.fixture
def folders(tmp_path):
    """Dark and bright noise, eight images each in train and val."""
    for split in ("train", "val"):
        for name, level in (("dark", 40), ("bright", 215)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(8):
                noise = np.random.default_rng([i, level, split == "val"]).integers(-30, 31, (32, 32, 3))
                Image.fromarray((level + noise).astype(np.uint8)).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def test_it_learns_saves_and_resumes_to_the_same_weights(folders, tmp_path):
    train, val = (open_images(folders, split, 32) for split in ("train", "val"))
    whole = train_classifier(open_run("whole", tmp_path), train, SMALL)
    assert accuracy(whole, val) == {"n": 16, "accuracy": 1.0} and whole.names == ["bright", "dark"]
    swapped = {row: "dark" if name == "bright" else "bright" for row, name in enumerate(val.classes)}
    assert accuracy(whole, val, swapped) == {"n": 16, "accuracy": 0.0} == accuracy(whole, val, change=lambda x: -x)
    loaded = Classifier.load(tmp_path / "whole" / "classifier")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded(images), whole(images)) and loaded.read(images) == whole.read(images)
    first = tmp_path / "parts" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints", first)
    for path in first.iterdir():
        if f"{SMALL.steps:06d}" in path.name:
            path.unlink()  # as if it had been interrupted after the checkpoint before the last
    assert len(list(first.iterdir())) == 1
    again = train_classifier(open_run("parts", tmp_path), train, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_images_without_classes_are_one_sentence(images, tmp_path):
    with pytest.raises(ClipgenError, match="has no classes"):
        train_classifier(open_run("r", tmp_path), images, SMALL)


def test_an_unreadable_image_leaves_with_its_label(folders):
    (folders / "train" / "dark" / "3.png").write_bytes(b"no image")
    images = open_images(folders, "train", 32)
    bad = next(row for row, path in enumerate(images.paths) if path.name == "3.png" and path.parent.name == "dark")
    rows, batch = augmented_rows(images, np.arange(16), 0, 0, flip=True)
    assert bad not in rows and len(rows) == len(batch) == 15 and list(images.skipped) == ["train/dark/3.png"]
    bright = [images.classes[row] == "bright" for row in rows]
    assert ((batch.float().mean((1, 2, 3)) > 128).numpy() == bright).all()
