import numpy as np
import pytest
import torch
from conftest import same_weights

from clipgen_lib.config import ClassifierConfig
from clipgen_lib.data.batches import augmented_rows
from clipgen_lib.data.datasets import open_images
from clipgen_lib.metrics.classifier import Classifier, accuracy, train_classifier
from clipgen_lib.metrics.intervals import wilson
from clipgen_lib.runtime.runs import ClipgenError, open_run

SMALL = ClassifierConfig(width=8, steps=12, batch_size=8, lr=3e-3, warmup=2, precision="no", log_every=4, save_every=6)


def test_it_learns_saves_and_resumes_to_the_same_weights(two_classes, tmp_path):
    train, val = (open_images(two_classes, split, 32) for split in ("train", "val"))
    run = open_run("r", tmp_path)
    whole = train_classifier(run, train, SMALL)
    assert accuracy(whole, val) == {
        "n": 16,
        "accuracy": 1.0,
        "accuracy_interval": list(wilson(16, 16)),
    } and whole.names == ["bright", "dark"]
    swapped = {row: "dark" if name == "bright" else "bright" for row, name in enumerate(val.classes)}
    wrong = {"n": 16, "accuracy": 0.0, "accuracy_interval": list(wilson(0, 16))}
    assert accuracy(whole, val, swapped) == wrong == accuracy(whole, val, change=lambda x: -x)
    loaded, images = Classifier.load(run.path / "classifier"), torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded(images), whole(images)) and loaded.read(images) == whole.read(images)
    before, last = sorted((run.path / "checkpoints").iterdir())
    last.unlink()  # as if it had been interrupted after the checkpoint before
    assert same_weights(train_classifier(run, train, SMALL), whole) and before.exists() and last.exists()


def test_images_without_classes_are_one_sentence(images, tmp_path):
    with pytest.raises(ClipgenError, match="has no classes"):
        train_classifier(open_run("r", tmp_path), images, SMALL)


def test_an_unreadable_image_leaves_with_its_label(two_classes):
    (two_classes / "train" / "dark" / "3.png").write_bytes(b"no image")
    images = open_images(two_classes, "train", 32)
    rows, batch = augmented_rows(images, np.arange(16), 0, 0, flip=True)
    assert images.names.index("train/dark/3.png") not in rows and list(images.skipped) == ["train/dark/3.png"]
    assert len(rows) == len(batch) == 15
    bright = [images.classes[row] == "bright" for row in rows]
    assert ((batch.float().mean((1, 2, 3)) > 128).numpy() == bright).all()
