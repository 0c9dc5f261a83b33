import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from clipgen_lib.data.batches import VQGANTrainConfig, training_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.evaluate import open_folder, open_reference
from clipgen_lib.runtime.runs import ClipgenError


def save(path, colour="red", size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def encoded(seed):
    """The bytes of a small PNG that no other seed has."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


# ---------------------------------------------------------------------------------------------- COCO


def coco_root(root, files, images=None, annotations=None, split="val2017"):
    for name in files:
        save(root / split / name)
    images = [{"id": i, "file_name": name} for i, name in enumerate(files)] if images is None else images
    annotations = annotations if annotations is not None else [{"image_id": 0, "id": 1, "caption": " a red field\n"}]
    (root / "annotations").mkdir(exist_ok=True, parents=True)
    content = {"images": images, "annotations": annotations}
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return root


def test_shapes_are_read_as_coco(world):
    images = open_images(world, "val")
    assert len(images) == 12 and images.has_captions and all(len(c) == 5 for c in images.captions)
    assert images[0].shape == (3, 64, 64) and images.classes is None


def test_real_photos(shared, tmp_path):
    images = open_images(shared / "coco-mini", "val", 64)
    assert images.split == "val2017" and len(images) == 79 and len(images.captions[0]) >= 5
    assert images[0].shape[0] == 3 and min(images[0].shape[1:]) == 64
    sizes = {split: len(open_images(shared / "fashion", split)) for split in ("train", "val", "held_out")}
    assert sizes == {"train": 6626, "val": 800, "held_out": 517}
    assert open_images(shared / "fashion", "val").captions[0] == ("Nike Men As Ss Trainin Blue T-Shirts",)
    named = open_images(f"{shared / 'fashion'}?caption=prompt&class=type", "val")
    assert named.captions[0] == ("a blue T-shirt",) and named.classes[0] == "T-shirt"
    with zipfile.ZipFile(shared / "tiny-imagenet-20.zip") as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("val/")])
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.endswith("_1.JPEG")])
    tiny = open_images(tmp_path, "val")
    assert len(tiny) == 1000 and len(set(tiny.classes)) == 20 and tiny.is_named_by_class


def test_coco_years_and_missing_images(tmp_path):
    root = coco_root(tmp_path, ["a.png", "b.png"])
    (root / "val2017" / "b.png").unlink()
    images = open_images(root, "val")
    assert len(images) == 1 and images.captions == [("a red field",)]
    assert images.skipped == {"b.png": "named in the annotations, but the folder has no such file"}
    coco_root(tmp_path, ["c.png"], split="val2014")
    with pytest.raises(ClipgenError, match=r"has val2014 and val2017 for split 'val': choose by .*\?year=2017"):
        open_images(root, "val")
    assert open_images(root, "val2014").split == "val2014" == open_images(f"{root}?year=2014", "val").split


def test_coco_captions_without_images(tmp_path):
    root = coco_root(tmp_path, ["a.png"], annotations=[{"image_id": 7, "id": 1, "caption": "lost"}])
    assert open_images(root, "val").skipped == {"image_id 7": "captions without an entry among the images"}
    with pytest.raises(ClipgenError, match="none of the 1 images"):
        open_images(coco_root(tmp_path / "x", [], images=[{"id": 0, "file_name": "gone.png"}]), "val")


@pytest.mark.parametrize(
    "place, name", [("val2017", "a.png"), ("images/val2017", "a.png"), ("images", "val2017/a.png")]
)
def test_coco_images_lie_where_their_makers_put_them(tmp_path, place, name):
    save(tmp_path / "elsewhere" / "linked.png", "blue")
    root, names = tmp_path / "coco", [name, name.replace("a.png", "b.png"), name.replace("a.png", "c.png")]
    save(root / place / name)
    os.symlink(tmp_path / "elsewhere" / "linked.png", root / place / names[1])
    os.symlink("nowhere", root / place / names[2])
    entries = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    texts = [{"image_id": i, "caption": text} for i, text in ((0, None), (0, " "), (0, "a field"), (1, "Ä\n"), (1, 3))]
    images = open_images(coco_root(root, [], [*entries, {"id": 0, "file_name": names[1]}], texts), "val", 8)
    assert images.names == [f"{place}/{name}" for name in names[:2]] and images.captions == [("a field",), ("Ä",)]
    assert torch.equal(images[1][:, 0, 0], torch.tensor([0, 0, 255], dtype=torch.uint8))
    twice = "named in the annotations, but its id stands in the annotations twice"
    lost = "named in the annotations, but the folder has no such file"
    assert images.skipped == {names[1]: twice, names[2]: lost, "3 captions": "null or empty"}


def test_a_coco_root_without_captions_is_a_folder(tmp_path, capsys):
    for year in (2014, 2017):
        for split in ("train", "val", "test"):
            save(tmp_path / f"{split}{year}" / f"{year}.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(ClipgenError, match=r"has train2014 and train2017 for split 'train': choose by .*year=2017"):
        open_images(tmp_path)
    images = open_images(f"{tmp_path}?year=2014")
    assert images.names == ["train2014/2014.png"] and not images.has_captions
    assert open_images(f"{tmp_path}?year=2017", "val").names == ["val2017/2017.png"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "train2014 1" in told and "captions in no file" in told


def test_coco_broken_annotations(tmp_path):
    root = coco_root(tmp_path, ["a.png"])
    path = root / "annotations" / "captions_val2017.json"
    keys = ("Infinity", "NaN", "1" + "0" * 400, "9223372036854775808", '"x"')
    texts = ['{"images": [', "[]", '{"images": [{"id": 0}], "annotations": []}', '{"images": 3, "annotations": []}']
    texts += ['{"images": [{"id": KEY, "file_name": "a.png"}], "annotations": []}'.replace("KEY", key) for key in keys]
    for text in texts:
        path.write_text(text)
        with pytest.raises(ClipgenError, match="captions_val2017.json"):
            open_images(root, "val")
    with open(path, "wb") as stream:
        stream.truncate(2**31)
    with pytest.raises(ClipgenError, match="it has more than 1 GB"):
        open_images(root, "val")


def test_coco_names_stay_inside_the_folder(tmp_path):
    save(tmp_path / "outside.png")
    inside = str(tmp_path / "coco" / "val2017" / "a.png")
    names = ["a.png", "../../outside.png", inside, "a\0b", "\ud800", "x" * 10_000]
    root = coco_root(tmp_path / "coco", ["a.png"], [{"id": i, "file_name": name} for i, name in enumerate(names)])
    images = open_images(root, "val")
    assert images.names == ["val2017/a.png"] and len(images.skipped) == 5
    assert max(map(len, images.skipped)) <= 200 and "".join(images.skipped).encode()


# ---------------------------------------------------------------------------------------------- folders


def test_folder_with_captions_and_a_split_by_hash(tmp_path):
    for i in range(60):
        save(tmp_path / "deep" / f"{i}.png")
        (tmp_path / "deep" / f"{i}.txt").write_text(f"first {i}\n\nsecond\n")
    train, val = open_images(tmp_path, "train"), open_images(tmp_path, "val")
    assert len(train) == 44 and len(val) == 16 and not set(train.paths) & set(val.paths)
    assert train.captions[0] == (f"first {train.paths[0].stem}", "second")
    for path in val.paths:
        path.with_suffix(".txt").unlink()
    assert not open_images(tmp_path, "val").has_captions
    for path in val.paths[:10] + train.paths[:40]:
        path.unlink()
    train, again = open_images(tmp_path, "train"), open_images(tmp_path, "val")
    assert len(train) == len(again) == 5 and set(again.names) & set(val.names)  # few images change their split


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Validation"), ("train", "test")])
def test_class_folders_give_prompts(tmp_path, names):
    for split in names:
        for name in ("golden_retriever", "bus"):
            save(tmp_path / split / name / "x.png")
    images = open_images(tmp_path, "val")
    assert images.classes == ["bus", "golden retriever"] and images.is_named_by_class
    assert images.captions == [("a photo of a bus",), ("a photo of a golden retriever",)]
    with pytest.raises(ClipgenError, match="has no split 'other': use one of"):
        open_images(tmp_path, "other")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_a_folder(tmp_path, kind):
    """The layout of datasets' imagefolder: the names in it are looked up, never opened."""
    for name in ("train/a.png", "train/deep/b.png", "val/c.png", "held_out/d.png"):
        save(tmp_path / name)
    entries = [{"file_name": n, "text": f"of {n}", "brand": n[0]} for n in ("deep/b.png", "a.png", "../../x.png")]
    lines = [json.dumps(entry) for entry in entries]
    if kind == "csv":
        lines = ["file_name,text,brand", *(",".join(entry.values()) for entry in entries)]
    (tmp_path / "train" / f"metadata.{kind}").write_text("\n".join(lines))
    images = open_images(tmp_path, "train")
    assert images.names == ["train/a.png", "train/deep/b.png"]
    assert images.captions == [("of a.png",), ("of deep/b.png",)] and images.classes is None
    named = open_images(f"{tmp_path}?caption=brand&class=brand", "train")
    assert named.captions == [("a",), ("d",)] and named.classes == ["a", "d"]
    with pytest.raises(ClipgenError, match="no column 'colour': name one of those there .text, brand"):
        _ = open_images(f"{tmp_path}?caption=colour", "train").captions
    with pytest.raises(ClipgenError, match="names no columns"):
        open_images(f"{tmp_path}?color=red", "train")
    assert open_images(tmp_path, "held_out").names == ["held_out/d.png"]
    assert not open_images(tmp_path, "val").has_captions


def test_training_reads_no_caption(tmp_path):
    """What says something of the images is read when it is asked for: a broken file of it stops no training."""
    for split in ("train", "val"):
        for i in range(4):
            save(tmp_path / split / f"{i}.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": ')
    images = open_images(tmp_path, "train", 8)
    config = VQGANTrainConfig(steps=1, batch_size=2, workers=0)
    assert next(training_batches(images, config, seed=0)).shape == (2, 3, 8, 8) and images.hash
    with pytest.raises(ClipgenError, match="metadata.jsonl cannot be read"):
        _ = images.captions
    root = coco_root(tmp_path / "coco", ["a.png", "b.png"])
    images = open_images(root, "val", 8)
    (root / "annotations" / "captions_val2017.json").unlink()
    assert next(training_batches(images, config, seed=0)).shape == (2, 3, 8, 8)
    with pytest.raises(ClipgenError, match="captions_val2017.json is missing"):
        _ = images.captions


LAYOUTS = {  # files -> those of train, those of val, classes of train
    "any case, a test": ("Train/a/0 Train/b/1 Validation/a/2 TEST/b/3", "01", "2", "ab"),
    "training and dev": ("training/0 dev/1 test/2", "0", "1", None),
    "one level down": ("data/train/a/0 data/train/b/1 data/valid/a/2 data/test/b/3", "01", "2", "ab"),
    "ILSVRC": ("I/Data/CLS-LOC/train/n01/0 I/Data/CLS-LOC/train/n02/1 I/Data/CLS-LOC/val/2", "01", "2", ["n01", "n02"]),
    "train and test": ("train/a/0 train/b/1 test/2", "01", "2", "ab"),
    "classes and a test": ("cat/0 dog/1 test/2", "01", "2", ["cat", "dog"]),
    "images and masks": ("images/train/0 images/val/1 masks/train/0 masks/val/1", "0", "1", None),
    "labels inside a split": ("train/images/0 train/labels/0 val/images/1 val/labels/1", "0", "1", None),
    "classes with images": ("train/a/images/0 train/b/images/1 val/images/2", "01", "2", "ab"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_splits_and_no_classes(tmp_path, layout):
    files, *wanted, classes = LAYOUTS[layout]
    for name in files.split():
        save(tmp_path / f"{name}.jpg")
    train, val = (open_images(tmp_path, split, 8) for split in ("train", "val"))
    assert ["".join(path.stem for path in images.paths) for images in (train, val)] == wanted
    assert train.classes == (classes and list(classes))


def test_a_vehicle_is_a_class_and_a_lone_train_is_divided(tmp_path):
    for name in ("bus", "car", "train"):
        for i in range(8):
            save(tmp_path / "vehicles" / name / f"{i}.png")
            save(tmp_path / "lone" / "train" / name / f"{i}.png")
            save(tmp_path / "test" / "test" / f"{name}{i}.png")
    for root in ("vehicles", "lone"):
        train, val = (open_images(tmp_path / root, split, 8) for split in ("train", "val"))
        assert len(train) == len(val) == 12 and set(train.classes) == {"bus", "car", "train"}
        assert not set(train.names) & set(val.names)
    with pytest.raises(ClipgenError, match="has no split 'train': use one of test"):
        open_images(tmp_path / "test")


def test_one_listing_for_all_and_it_is_told(tmp_path, capsys):
    """What is passed over in a training is passed over in scoring too, and counted."""
    for name in ("a.png", "deep/b.jfif", "elsewhere/c.png"):
        save(tmp_path / "photos" / name if "else" not in name else tmp_path / name)
    for name in (".ipynb_checkpoints/a.png", ".Trash/a.png", "@eaDir/a.png", "__MACOSX/a.png", "._a.png"):
        save(tmp_path / "photos" / name)
    for name in ("x.heic", "deep/y.HEIC", "x.mov", "notes.txt"):
        (tmp_path / "photos" / name).write_bytes(b"")
    links = {"linked": tmp_path / "elsewhere", "deep/loop": "..", "away.png": "nowhere", "self.png": "self.png"}
    for name, target in links.items():
        os.symlink(target, tmp_path / "photos" / name)
    os.mkfifo(tmp_path / "photos" / "pipe.png")
    wanted = ["a.png", "deep/b.jfif", "linked/c.png"]
    trained = [name for split in ("train", "val") for name in open_images(tmp_path / "photos", split).names]
    scored, reference = open_folder(tmp_path / "photos", 8), open_reference(tmp_path / "photos", 8)
    assert sorted(trained) == scored.names == reference.names == wanted
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "3 images (no splits)" in told[0]
    for part in (
        "5 hidden or helper",
        "2 links that lead nowhere",
        "1 links to a folder around them",
        "1 special files",
    ):
        assert all(part in line for line in told), (part, told)
    assert "2 .heic files that Pillow" in told[0] and "1 .mov files" in told[0] and "txt" not in told[0]


@pytest.mark.parametrize(
    "content", ["n01440764 tench, Tinca tinca\nn02084071 dog, x\n", "n02084071\tdog\nn01440764\ttench\n"]
)
def test_wordnet_ids_are_named_where_a_list_says_how(tmp_path, capsys, content):
    for name in ("n01440764", "n02084071"):
        save(tmp_path / "train" / name / "0.png")
        save(tmp_path / "val" / name / "0.png")
    assert open_images(tmp_path).captions[0] == ("a photo of a n01440764",)
    assert "say WordNet ids such as n01440764: put words.txt" in capsys.readouterr().err
    (tmp_path / ("words.txt" if "\t" in content else "LOC_synset_mapping.txt")).write_text(content)
    assert open_images(tmp_path).captions == [("a photo of a tench",), ("a photo of a dog",)]


def test_no_images_and_no_captions(tmp_path):
    with pytest.raises(ClipgenError, match="holds no images"):
        open_images(tmp_path)
    with pytest.raises(ClipgenError, match="is not a folder"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ClipgenError, match="unpack"):
        open_images(tmp_path / "x.zip")
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    with pytest.raises(ClipgenError, match="no captions"):
        _ = open_images(tmp_path, "val").captions
    with pytest.raises(ClipgenError, match="splits train and val"):
        open_images(tmp_path, "test")
    (tmp_path / "b.png").unlink()
    with pytest.raises(ClipgenError, match="1 images, too few for a val split"):
        open_images(tmp_path, "val")


def test_hash_follows_the_files(tmp_path):
    for name in ("train/a.png", "val/b.png"):
        save(tmp_path / name)
    before = open_images(tmp_path, "train").hash
    assert before == open_images(tmp_path, "train").hash != open_images(tmp_path, "train", 32).hash
    os.rename(tmp_path / "train", tmp_path / "other")
    shutil.copytree(tmp_path / "other", tmp_path / "copy" / "train")
    save(tmp_path / "copy" / "val" / "b.png")
    assert open_images(tmp_path / "copy", "train").hash == before  # wherever they lie
    os.rename(tmp_path / "copy" / "train" / "a.png", tmp_path / "copy" / "train" / "c.png")
    assert open_images(tmp_path / "copy", "train").hash != before


def test_hidden_files_are_no_images(tmp_path):
    for name in ("a.png", "b.png", "._a.png", ".thumbnails/a.png"):
        save(tmp_path / ".album" / name)  # a dot above the folder that was asked for means nothing
    paths = [p for split in ("train", "val") for p in open_images(tmp_path / ".album", split).paths]
    assert sorted(p.name for p in paths) == ["a.png", "b.png"]


# ---------------------------------------------------------------------------------------------- archives


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Arrow files go to a folder of the tests."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path, images, names=None, column="image", **columns):
    """Parquet as datasets writes it: images are (bytes, path), `names` those of the labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array([{"bytes": b, "path": p} for b, p in images], kind), **columns})
    features = {column: {"_type": "Image"}} | {name: {"dtype": "string", "_type": "Value"} for name in columns}
    features |= {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
    notes = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    parquet.write_table(table.replace_schema_metadata(notes), path)
    return path


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_photos_in_archives_are_those_of_the_folder(shared, tmp_path, kind):
    folders = {split: open_images(shared / "coco-mini", split, 64) for split in ("train", "val")}
    for split, folder in folders.items():
        for number, part in enumerate(np.array_split(np.arange(len(folder)), 3)):
            files = [(folder.paths[row].read_bytes(), folder.paths[row].name, folder.captions[row][0]) for row in part]
            if kind == "tar":
                texts = [(name.replace(".jpg", ".json"), json.dumps({"caption": c}).encode()) for _, name, c in files]
                members = zip([(name, content) for content, name, _ in files], texts, strict=True)
                write_tar(tmp_path / f"{split}-{number:06}.tar", [member for pair in members for member in pair])
            else:
                file = tmp_path / "data" / f"{split}-{number:05}-of-00003.parquet"
                write_parquet(file, [f[:2] for f in files], caption=[f[2] for f in files])
    for split, folder in folders.items():
        found = open_images(tmp_path, split, 64)
        assert len(found) == len(folder) and not found.skipped and found.split == split
        assert all(torch.equal(found[row], folder[row]) for row in range(0, len(found), 9))
        assert [texts[0] for texts in found.captions] == [texts[0] for texts in folder.captions]
        assert found.names == [path.name for path in folder.paths]
        config = VQGANTrainConfig(steps=2, batch_size=8, workers=2)
        x, y = (torch.stack(list(training_batches(images, config, 1))) for images in (found, folder))
        assert torch.equal(x, y)


def test_archives_without_splits_are_split_by_hash(tmp_path):
    labels = {"names": ["big_cat", "dog"], "label": pa.array([i % 2 for i in range(40)])}
    path = write_parquet(tmp_path / "all.parquet", [(encoded(i), f"{i}.png") for i in range(40)], **labels)
    train, val = open_images(path, "train", 10), open_images(path, "val", 10)
    assert len(train) == 24 and len(val) == 16 and not set(train.names) & set(val.names) and train.name == "all"
    assert val.classes == [["big cat", "dog"][int(name[:-4]) % 2] for name in val.names] and val.is_named_by_class
    assert train.hash == open_images(path, "train", 10).hash != val.hash
    original = Image.open(io.BytesIO(encoded(int(val.names[3][:-4]))))
    assert np.array_equal(val[3].permute(1, 2, 0), original)


def test_columns_by_kind_or_by_name(tmp_path):
    texts = {"id": [f"{i}" for i in range(40)], "title": [f"a blue shirt no {i}" for i in range(40)]}
    path = write_parquet(tmp_path / "x.parquet", [(encoded(i), None) for i in range(40)], column="photo", **texts)
    images = open_images(path, "train", 10)
    assert images.names[0].isdigit() and images.captions[0][0].startswith("a blue shirt no ")  # the most words
    assert open_images(f"{path}?caption=id&class=title", "train", 10).classes[0].startswith("a blue shirt")
    assert len(open_images(f"{path}?image=photo", "val", 10)) == 16
    with pytest.raises(ClipgenError, match="has no column 'title' of images"):
        open_images(f"{path}?image=title", "train", 10)


def test_classes_and_captions_beside_images_in_a_tar(tmp_path):
    members = [
        (f"{i}.{end}", c) for i in range(40) for end, c in (("png", encoded(i)), ("txt", b"one\ntwo"), ("cls", b"3"))
    ]
    images = open_images(write_tar(tmp_path / "x.tar", members), "val", 10)
    assert images.captions == [("one", "two")] * 16 and images.classes == ["3"] * 16


def outside(kind, folder, secret):
    """A data set that names a file outside of it wherever a name can stand; what is to be read of it."""
    good = [encoded(i) for i in range(20)]
    if kind in ("coco", "metadata"):
        names = [str(secret), "../secret.png", "val2017/../../secret.png", "good.png"]
        (folder / "val2017").mkdir(parents=True)
        (folder / "val2017" / "good.png").write_bytes(good[0])
        if kind == "coco":
            return coco_root(folder, [], [{"id": i, "file_name": name} for i, name in enumerate(names)])
        lines = [json.dumps({"file_name": name, "image": str(secret), "text": "a text"}) for name in names]
        (folder / "val2017" / "metadata.jsonl").write_text("\n".join(lines))
        return folder
    if kind == "tar":  # the last is named as a file that is there, which the library datasets takes for its path
        path = write_tar(folder / "x.tar", [(f"../{i}.png", content) for i, content in enumerate(good)])
        with tarfile.open(path, "a") as tar:
            for name, kind in (
                ("0l.png", tarfile.SYMTYPE),
                ("1l.png", tarfile.LNKTYPE),
                (str(secret), tarfile.REGTYPE),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = kind, str(secret), len(good[0]) * (kind == tarfile.REGTYPE)
                tar.addfile(member, io.BytesIO(good[0]))
        return path
    shape = {"string bytes": pa.string(), "large string bytes": pa.large_string()}.get(kind, pa.binary())
    content = good if kind == "path" else [str(secret)] * 20
    struct = pa.array(
        [{"bytes": c, "path": str(secret)} for c in content], pa.struct([("bytes", shape), ("path", pa.string())])
    )
    table = pa.table({"image": [str(secret)] * 20 if kind == "string" else struct})
    notes = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}
    folder.mkdir()
    parquet.write_table(table.replace_schema_metadata(notes if kind != "string bytes" else None), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize(
    "kind", ["coco", "metadata", "tar", "path", "string", "string bytes", "large string bytes", "path as bytes"]
)
def test_nothing_in_a_data_file_is_a_path_outside(tmp_path, kind):
    save(tmp_path / "secret.png")
    read = 0
    try:
        path = outside(kind, tmp_path / "data", tmp_path / "secret.png")
        splits = [open_images(path, split, 10) for split in ("train", "val")[kind in ("coco", "metadata") :]]
    except ClipgenError as error:
        assert kind == "string" and "x.parquet" in str(error)
        return
    for images, row in [(part, row) for part in splits for row in range(len(part))]:
        try:
            assert images[row].float().std() > 50  # noise, not the plain red of the secret
            read += 1
        except ClipgenError as error:
            assert "has no bytes" in str(error) or "not an image" in str(error)
    assert read == {"coco": 1, "metadata": 1, "tar": 20, "path": 20}.get(kind, 0)


def bombs(folder):
    """Small archives that promise much: a value stored once for all rows, zeros in a page, a hole in a sparse member."""
    once = pa.DictionaryArray.from_arrays(
        pa.array([0] * 20_000, pa.int32()), pa.array([os.urandom(200_000)], pa.binary())
    )
    parquet.write_table(pa.table({"image": once}), folder / "once.parquet")
    parquet.write_table(
        pa.table({"image": pa.array([bytes(2_000_000)] * 600)}),
        folder / "zeros.parquet",
        use_dictionary=False,
        compression="zstd",
    )
    sparse = tarfile.TarInfo("0.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "6000000000"}
    sparse.pax_headers["GNU.sparse.name"], content = "0.png", b"0\n".ljust(512, b"\0")
    sparse.size = len(content)
    with tarfile.open(folder / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse, io.BytesIO(content))


def test_archives_that_promise_too_much_are_refused(tmp_path):
    bombs(tmp_path)
    for name in ("once.parquet", "zeros.parquet", "sparse.tar"):
        assert (tmp_path / name).stat().st_size < 1_000_000
        with pytest.raises(ClipgenError, match=f"{name} of .* GB unpacks to"):
            open_images(tmp_path / name)


def test_damaged_archives_are_one_sentence(tmp_path):
    whole = {".tar": write_tar(tmp_path / "whole.tar", [(f"{i}.png", encoded(i)) for i in range(30)])}
    whole[".parquet"] = write_parquet(tmp_path / "whole.parquet", [(encoded(i), None) for i in range(30)])
    for ending, path in whole.items():
        for content in (b"", b"no archive", path.read_bytes()[: path.stat().st_size // 2]):
            (tmp_path / f"x{ending}").write_bytes(content)
            with pytest.raises(ClipgenError, match=f"x{ending}") as error:
                open_images(tmp_path / f"x{ending}")
            assert "\n" not in str(error.value)
    with pytest.raises(ClipgenError, match="holds whole.parquet and whole.tar"):
        open_images(tmp_path)
    parquet.write_table(pa.table({"a": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ClipgenError, match="no column 'image' of images .it has a"):
        open_images(tmp_path / "numbers.parquet")


def test_a_hub_id_that_cannot_be_reached_is_one_sentence():
    code = "from clipgen_lib.data.datasets import open_images\nopen_images('nobody/no-such-images')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert (
        "ClipgenError: nobody/no-such-images is no folder here, and as a data set of the Hugging Face hub"
        in done.stderr
    )


# ---------------------------------------------------------------------------------------------- any bytes


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_whatever_lies_in_metadata_is_read_or_one_sentence(data, tmp_path_factory):
    """COCO's annotations and metadata.jsonl with odd entries or bytes."""
    root = tmp_path_factory.mktemp("any")
    odd = st.sampled_from([None, True, -1, 10**400, 0.5, "", "../x.png", "a\0b", "\ud800", "x" * 10_000, [], {}, [[]]])
    images = [
        {"id": i, "file_name": f"{i}.png"}
        | data.draw(st.dictionaries(st.sampled_from(["id", "file_name"]), odd, max_size=1))
        for i in range(3)
    ]
    texts = [
        {"image_id": 0, "caption": "a"} | data.draw(st.dictionaries(st.sampled_from(["image_id", "caption"]), odd))
    ]
    coco_root(root / "coco", ["0.png", "1.png"], images, texts)
    lines = [json.dumps(entry).encode() for entry in images] + data.draw(st.lists(st.binary(max_size=9), max_size=1))
    for split in ("train", "val"):
        save(root / "folder" / split / "0.png")
        (root / "folder" / split / "metadata.jsonl").write_bytes(b"\n".join(lines))
    for path, named in ((root / "coco", "captions_val2017.json"), (root / "folder", "metadata.jsonl")):
        try:
            opened = open_images(path, "val", 8)
            assert all(
                isinstance(text, str) for texts in (opened.captions if opened.has_captions else []) for text in texts
            )
        except ClipgenError as error:
            text = str(error).replace(str(root), "")
            assert (named in text or "holds none" in text) and len(text) < 600


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("file_name,text\n0.png,a cat, red\n", "entry 1 has more columns than the header"),
        ('file_name,text\n0.png,"a cat\n1.png,"a dog\n', "metadata.csv cannot be read"),
        ("file_name;text\n0.png;a cat\n", "has no column file_name but file_name;text"),
    ],
)
def test_metadata_that_would_be_misread_are_refused(tmp_path, text, sentence):
    for i in range(4):
        save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ClipgenError, match=sentence):
        _ = open_images(tmp_path, "train", 8).captions


def test_captions_in_capitals_and_images_beside_an_archive(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.TXT").write_text("a cat")
    assert open_images(tmp_path, "train", 8).captions == [("a cat",)] * 2
    write_parquet(tmp_path / "labels.parquet", [(encoded(i), None) for i in range(4)])
    with pytest.raises(ClipgenError, match="holds 4 images and the archive labels.parquet"):
        open_images(tmp_path, "train", 8)


def test_strays_beside_class_folders_and_other_slips_are_told(tmp_path, capsys):
    for name in ("n01440764", "n02084071"):
        for i in range(10):
            save(tmp_path / "photos" / name / f"{i}.png")
    save(tmp_path / "photos" / "stray.png")
    (tmp_path / "photos" / "words.txt").write_text("n01440764\ttench\n")
    images = open_images(tmp_path / "photos", "train", 8)
    assert "stray.png" not in images.names and set(images.classes) == {"n01440764", "n02084071"}
    told = capsys.readouterr().err
    assert (
        "2 classes" in told
        and "left out: 1 images beside class folders" in told
        and "words.txt has no line n02084071" in told
    )
    (tmp_path / "x.tar").write_bytes(gzip.compress(write_tar(tmp_path / "y.tar", [("0.png", encoded(0))]).read_bytes()))
    with pytest.raises(ClipgenError, match="x.tar is compressed: unpack it by gunzip"):
        open_images(tmp_path / "x.tar")
