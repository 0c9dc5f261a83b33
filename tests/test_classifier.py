import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import same_weights
from PIL import Image

from clipgen_lib.config import ClassifierConfig
from clipgen_lib.data.batches import augmented_rows
from clipgen_lib.data.datasets import open_images
from clipgen_lib.metrics.classifier import Classifier, accuracy, train_classifier
from clipgen_lib.metrics.features import efficientnet_lite
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
    } and whole.names == {"class": ["bright", "dark"]}
    swapped = {row: "dark" if name == "bright" else "bright" for row, name in enumerate(val.classes)}
    wrong = {"n": 16, "accuracy": 0.0, "accuracy_interval": list(wilson(0, 16))}
    assert accuracy(whole, val, swapped) == wrong == accuracy(whole, val, change=lambda x: -x)
    loaded, images = Classifier.load(run.path / "classifier"), torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded(images)[0], whole(images)[0]) and loaded.read(images) == whole.read(images)
    before, last = sorted((run.path / "checkpoints").iterdir())
    last.unlink()  # as if it had been interrupted after the checkpoint before
    assert same_weights(train_classifier(run, train, SMALL), whole) and before.exists() and last.exists()


def test_attributes_are_read_each_by_itself_and_together(tmp_path):
    """Squares of two colours at two heights, of which one pair is kept apart: the classifier reads it, attribute by attribute."""
    for split, kept in (("train", lambda red, top: not (red and top)), ("val", lambda red, top: red and top)):
        (tmp_path / split).mkdir()
        pairs = [pair for pair in product((True, False), repeat=2) if kept(*pair)]
        for i, (red, top) in enumerate(pairs * 16):
            array = np.full((32, 32, 3), 255 - i, np.uint8)
            array[slice(2, 14) if top else slice(18, 30), 8:24] = (200, 0, 0) if red else (0, 0, 200)
            Image.fromarray(array).save(tmp_path / split / f"{i}.png")
        rows = [{"colour": "red, dark" if r else "blue", "side": "top" if x else "bottom"} for r, x in pairs * 16]
        lines = [json.dumps({"file_name": f"{i}.png", **row}) for i, row in enumerate(rows)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    train, val = (open_images(f"{tmp_path}?class=colour,side", split, 32) for split in ("train", "val"))
    assert val.classes == ["colour=red dark, side=top"] * 16
    model = train_classifier(open_run("r", tmp_path / "results"), train, replace(SMALL, steps=60))
    assert model.names == {"colour": ["blue", "red dark"], "side": ["bottom", "top"]}
    known = accuracy(model, train)
    assert known["accuracy"] == 1.0 and {k: s["accuracy"] for k, s in known["attributes"].items()} == {
        "colour": 1,
        "side": 1,
    }
    half = accuracy(model, train, {row: name.replace("side=top", "side=up") for row, name in enumerate(train.classes)})
    assert half["attributes"]["colour"]["accuracy"] == 1.0 and half["accuracy"] == pytest.approx(2 / 3)
    assert half["attributes"]["side"] == {"accuracy": half["accuracy"], "accuracy_interval": list(wilson(32, 48))}
    unseen = accuracy(model, val)
    assert unseen["accuracy"] <= min(scores["accuracy"] for scores in unseen["attributes"].values())


def test_classes_of_which_only_some_name_attributes_are_one_sentence(tmp_path):
    lines = [json.dumps({"file_name": f"{i}.png", "class": name}) for i, name in enumerate(("plain", "a=b, c=d") * 9)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    for i in range(18):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    with pytest.raises(ClipgenError, match="name all alike"):
        train_classifier(open_run("r", tmp_path / "results"), open_images(tmp_path, "train", 32), SMALL)


def test_a_network_may_begin_with_imagenets_weights(two_classes, tmp_path):
    """Its layers before any step are those of EfficientNet-Lite0; thirty steps tell most images apart."""
    train, val = (open_images(two_classes, split, 32) for split in ("train", "val"))
    config = replace(SMALL, network="tf_efficientnet_lite0", steps=30, lr=5e-4, save_every=30)
    fresh = train_classifier(open_run("fresh", tmp_path), train, replace(config, steps=0))
    known = efficientnet_lite(0)[0].state_dict()
    kept = {key: value for key, value in fresh.network.state_dict().items() if "classifier" not in key}
    assert all(torch.equal(value, known[key]) for key, value in kept.items()) and len(kept) > 200
    model = train_classifier(open_run("r", tmp_path), train, config)
    assert accuracy(model, val)["accuracy"] > 0.8
    assert accuracy(Classifier.load(tmp_path / "r" / "classifier"), val) == accuracy(model, val)


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
