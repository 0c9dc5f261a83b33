import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import saved
from PIL import Image
from pyarrow import parquet

from clipgen_lib.data.batches import VQGANTrainConfig, training_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.evaluate import open_folder, open_reference
from clipgen_lib.runtime.runs import ClipgenError


def save(root, *names, colour="red"):
    """Small images of one colour below a folder; returns the folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), colour).save(root / name, "PNG")
    return root


@pytest.fixture
def secret(tmp_path):
    """A file outside of any data set, plain red."""
    return str(save(tmp_path, "secret.png") / "secret.png")


def files_of(images):
    return [images.encoded(row) for row in range(len(images))]


def both(path, size=8):
    return [open_images(path, split, size) for split in ("train", "val")]


# ---------------------------------------------------------------------------------------------- COCO


def coco(root, names, annotations=({"image_id": 0, "caption": " a red field\n"},), split="val2017"):
    """Annotations of images that are named, or told by an entry of their own; the images are not there yet."""
    images = [name if isinstance(name, dict) else {"id": i, "file_name": name} for i, name in enumerate(names)]
    (root / "annotations").mkdir(exist_ok=True, parents=True)
    content = {"images": images, "annotations": annotations}
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return root


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
        wanted = [name for name in archive.namelist() if name.startswith("val/") or name.endswith("_1.JPEG")]
        archive.extractall(tmp_path, wanted)
    tiny = open_images(tmp_path, "val")
    assert len(tiny) == 1000 and len(set(tiny.classes)) == 20 and tiny.is_named_by_class


def test_coco_years(tmp_path):
    for split in ("val2017", "val2014"):
        images = open_images(save(coco(tmp_path, ["a.png"], split=split), f"{split}/a.png"), split)
        assert images.split == split and images.captions == [("a red field",)] and images.classes is None
    assert open_images(f"{tmp_path}?year=2014", "val").split == "val2014"
    assert open_images(f"{tmp_path}?year=2017", "val2014").split == "val2014"  # named as a whole
    with pytest.raises(ClipgenError, match=r"has val2014 and val2017 for split 'val': choose by .*\?year=2017"):
        open_images(tmp_path, "val")


def test_coco_captions_without_images(tmp_path):
    root = save(coco(tmp_path, ["a.png"], [{"image_id": 7, "caption": "lost"}]), "val2017/a.png")
    assert open_images(root, "val").skipped == {"image_id 7": "captions without an entry among the images"}
    (root / "val2017" / "a.png").unlink()
    with pytest.raises(ClipgenError, match="none of the 1 images"):
        open_images(root, "val")


@pytest.mark.parametrize(
    "place, name", [("val2017", "a.png"), ("images/val2017", "a.png"), ("images", "val2017/a.png")]
)
def test_coco_images_lie_where_their_makers_put_them(tmp_path, place, name):
    names = [name, name.replace("a.png", "b.png"), name.replace("a.png", "c.png")]
    texts = [{"image_id": i, "caption": text} for i, text in ((0, None), (0, " "), (0, "a field"), (1, "Ä\n"), (1, 3))]
    root = save(coco(tmp_path / "coco", [*names, {"id": 0, "file_name": names[1]}], texts), f"{place}/{name}")
    save(tmp_path, "linked.png", colour="blue")
    os.symlink(tmp_path / "linked.png", root / place / names[1])
    os.symlink("nowhere", root / place / names[2])
    images = open_images(root, "val", 8)
    assert images.names == [f"{place}/{name}" for name in names[:2]] and images.captions == [("a field",), ("Ä",)]
    assert torch.equal(images[1][:, 0, 0], torch.tensor([0, 0, 255], dtype=torch.uint8))
    twice = "named in the annotations, but its id stands in the annotations twice"
    lost = "named in the annotations, but the folder has no such file"
    assert images.skipped == {names[1]: twice, names[2]: lost, "3 captions": "null or empty"}


def test_a_coco_root_without_captions_is_a_folder(tmp_path, capsys):
    save(tmp_path, *(f"{split}{year}/{year}.png" for split in ("train", "val", "test") for year in (2014, 2017)))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    images = open_images(f"{tmp_path}?year=2014")
    assert images.names == ["train2014/2014.png"] and not images.has_captions
    assert open_images(f"{tmp_path}?year=2017", "val").names == ["val2017/2017.png"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "train2014 1" in told and "captions in no file" in told


def test_coco_broken_annotations(tmp_path):
    root = save(coco(tmp_path, ["a.png"]), "val2017/a.png")
    path = root / "annotations" / "captions_val2017.json"
    texts = ['{"images": [', "[]", '{"images": [{"id": 0}], "annotations": []}', '{"images": 3, "annotations": []}']
    for key in ("Infinity", "NaN", "1" + "0" * 400, "9223372036854775808", '"x"'):
        texts.append('{"images": [{"id": KEY, "file_name": "a.png"}], "annotations": []}'.replace("KEY", key))
    for text in texts:
        path.write_text(text)
        with pytest.raises(ClipgenError, match="captions_val2017.json"):
            open_images(root, "val")
    os.truncate(path, 2**31)
    with pytest.raises(ClipgenError, match="it has more than 1 GB"):
        open_images(root, "val")


def test_coco_names_stay_inside_the_folder(tmp_path, secret):
    root = save(tmp_path / "coco", "val2017/a.png")
    names = ["a.png", "../../secret.png", "../secret.png", "val2017/../../secret.png", secret]
    names += [str(root / "val2017" / "a.png"), "a\0b", "\ud800", "x" * 10_000]
    images = open_images(coco(root, names), "val")
    assert images.names == ["val2017/a.png"] and len(images.skipped) == 8
    assert max(map(len, images.skipped)) <= 200 and "".join(images.skipped).encode()


# ---------------------------------------------------------------------------------------------- folders


def test_folder_with_captions_and_a_split_by_hash(tmp_path):
    for i in range(60):
        text = save(tmp_path, f"deep/{i}.png") / "deep" / f"{i}.{'txt' if i % 2 else 'TXT'}"
        text.write_text(f"first {i}\n\nsecond\n")
    train, val = both(tmp_path)
    assert len(train) == 44 and len(val) == 16 and not set(train.names) & set(val.names)
    assert train.captions == [(f"first {path.stem}", "second") for path in files_of(train)]
    for path in files_of(val):
        next(path.parent.glob(f"{path.stem}.[tT]*")).unlink()
    assert not open_images(tmp_path, "val").has_captions
    for path in files_of(val)[:10] + files_of(train)[:40]:
        path.unlink()
    train, again = both(tmp_path)
    assert len(train) == len(again) == 5 and set(again.names) & set(val.names)  # few images change their split


def test_class_folders_give_prompts(tmp_path, capsys):
    save(tmp_path, *(f"{split}/{name}/x.png" for split in ("train", "val") for name in ("golden_retriever", "bus")))
    images = open_images(tmp_path, "val")
    assert images.classes == ["bus", "golden retriever"] and images.is_named_by_class
    assert images.captions == [("a photo of a bus",), ("a photo of a golden retriever",)]
    what = "4 images (train 2, val 2), 2 classes (bus, golden_retriever), captions in no file; left out: nothing"
    assert capsys.readouterr().err == f"{tmp_path}: {what}\n"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_a_folder(tmp_path, secret, kind):
    """The layout of datasets' imagefolder: the names in it are looked up, never opened."""
    root = save(tmp_path / "data", "train/a.png", "train/deep/b.png", "val/c.png", "held_out/d.png")
    names = ["deep/b.png", "a.png", "../x.png", "../../secret.png", secret]
    entries = [{"file_name": n, "text": f"of {n}", "brand": n[0], "image": secret} for n in names]
    lines = [json.dumps(entry) for entry in entries]
    if kind == "csv":
        lines = ["file_name,text,brand,image", *(",".join(entry.values()) for entry in entries)]
    (root / "train" / f"metadata.{kind}").write_text("\n".join(lines))
    images = open_images(root, "train")
    assert images.names == ["train/a.png", "train/deep/b.png"]
    assert images.captions == [("of a.png",), ("of deep/b.png",)] and images.classes is None
    named = open_images(f"{root}?caption=brand&class=brand", "train")
    assert named.captions == [("a",), ("d",)] and named.classes == ["a", "d"]
    both = open_images(f"{root}?caption=brand,text&class=text,brand", "train")
    assert both.captions[1] == ("d", "of deep/b.png") and both.classes[1] == "text=of deep/b.png, brand=d"
    assert open_images(root, "held_out").names == ["held_out/d.png"]
    assert not open_images(root, "val").has_captions


def test_training_reads_no_caption(tmp_path):
    """What says something of the images is read when it is asked for: a broken file of it stops no training."""
    files = [f"{split}/{i}.png" for split in ("train", "val") for i in range(4)]
    (save(tmp_path / "photos", *files) / "train" / "metadata.jsonl").write_text('{"file_name": ')
    root = save(coco(tmp_path / "coco", ["a.png", "b.png"]), "val2017/a.png", "val2017/b.png")
    opened = {
        r"metadata.jsonl cannot be read .line 1 is no JSON object.": open_images(tmp_path / "photos", "train", 8),
        "captions_val2017.json is missing": open_images(root, "val", 8),
    }
    (root / "annotations" / "captions_val2017.json").unlink()
    config = VQGANTrainConfig(steps=1, batch_size=2, workers=0)
    for sentence, images in opened.items():
        assert next(training_batches(images, config, seed=0)).shape == (2, 3, 8, 8) and images.hash
        with pytest.raises(ClipgenError, match=sentence):
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
    train, val = both(save(tmp_path, *(f"{name}.jpg" for name in files.split())))
    assert ["".join(path.stem for path in files_of(images)) for images in (train, val)] == wanted
    assert train.classes == (classes and list(classes))


@pytest.mark.parametrize("above", ["", "train/"])
def test_a_vehicle_is_a_class_and_a_lone_train_is_divided(tmp_path, above):
    train, val = both(save(tmp_path, *(f"{above}{name}/{i}.png" for name in ("bus", "car", "train") for i in range(8))))
    assert len(train) == len(val) == 12 and set(train.classes) == {"bus", "car", "train"}
    assert not set(train.names) & set(val.names)


def test_one_listing_for_all_and_it_is_told(tmp_path, capsys):
    """What is passed over in a training is passed over in scoring too, and counted."""
    photos = save(tmp_path / ".photos", "a.png", "deep/b.jfif")  # the dot of a folder that was asked for means nothing
    save(photos, ".ipynb_checkpoints/a.png", ".Trash/a.png", "@eaDir/a.png", "__MACOSX/a.png", "._a.png")
    save(tmp_path / "elsewhere", "c.png")
    for name in ("x.heic", "deep/y.HEIC", "x.mov", "notes.txt"):
        (photos / name).write_bytes(b"")
    links = {"linked": tmp_path / "elsewhere", "deep/loop": "..", "away.png": "nowhere", "self.png": "self.png"}
    for name, target in links.items():
        os.symlink(target, photos / name)
    os.mkfifo(photos / "pipe.png")
    trained = [name for images in both(photos) for name in images.names]
    assert sorted(trained) == open_folder(photos, 8).names == open_reference(photos, 8).names
    assert sorted(trained) == ["a.png", "deep/b.jfif", "linked/c.png"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "3 images (no splits)" in told[0]
    left_out = ["5 hidden or helper", "2 links that lead nowhere", "1 links to a folder around them", "1 special files"]
    assert all(part in line for line in told for part in left_out), told
    assert "2 .heic files that Pillow" in told[0] and "1 .mov files" in told[0] and "txt" not in told[0]


@pytest.mark.parametrize(
    "content", ["n01440764 tench, Tinca tinca\nn02084071 dog, x\n", "n02084071\tdog\nn01440764\ttench\n"]
)
def test_wordnet_ids_are_named_where_a_list_says_how(tmp_path, capsys, content):
    save(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "val") for name in ("n01440764", "n02084071")))
    assert open_images(tmp_path).captions[0] == ("a photo of a n01440764",)
    assert "say WordNet ids such as n01440764: put words.txt" in capsys.readouterr().err
    (tmp_path / ("words.txt" if "\t" in content else "LOC_synset_mapping.txt")).write_text(content)
    assert open_images(tmp_path).captions == [("a photo of a tench",), ("a photo of a dog",)]


@pytest.mark.parametrize(
    "files, csv, path, split, sentence",
    [
        ("", "", "", "train", "holds no images"),
        ("", "", "/nowhere", "train", "is not a folder"),
        ("x.zip", "", "/x.zip", "train", "unpack"),
        ("a.png", "", "", "val", "1 images, too few for a val split"),
        ("0.png 1.png", "", "", "test", "splits train and val"),
        ("0.png 1.png", "", "", "val", "no captions"),
        ("test/test/0.png test/test/1.png", "", "/test", "train", "has no split 'train': use one of test"),
        ("train/a/0.png val/a/0.png", "", "", "other", "has no split 'other': use one of train, val"),
        ("train2014/0.png train2017/0.png", "", "", "train", "has train2014 and train2017 .*: choose by .*year=2017"),
        ("train/0.png val/0.png", "", "?color=red", "train", "names no columns"),
        ("x.parquet x.tar", "", "", "train", "holds x.parquet and x.tar"),
        ("0.png 1.png x.parquet", "", "", "train", "holds 2 images and the archive x.parquet"),
        ("0.png 1.png", "file_name,text\n0.png,a cat, red\n", "", "train", "entry 1 has more columns than the header"),
        ("0.png 1.png", 'file_name,text\n0.png,"a cat\n1.png,"a dog\n', "", "train", "metadata.csv cannot be read"),
        ("0.png 1.png", "file_name;text\n0.png;a cat\n", "", "train", "has no column file_name but file_name;text"),
        (
            "0.png 1.png",
            "file_name,a,b\n0.png,x,y\n",
            "?caption=c",
            "val",
            "no column 'c': name one of those there .a, b",
        ),
    ],
)
def test_what_is_not_there_or_would_be_misread_is_one_sentence(tmp_path, files, csv, path, split, sentence):
    save(tmp_path, *files.split())
    if csv:
        (tmp_path / "metadata.csv").write_text(csv)
    with pytest.raises(ClipgenError, match=sentence):
        _ = open_images(f"{tmp_path}{path}", split, 8).captions


def test_hash_follows_the_files(tmp_path):
    before = open_images(save(tmp_path / "a", "train/a.png", "val/b.png"), "train").hash
    assert before == open_images(tmp_path / "a", "train").hash != open_images(tmp_path / "a", "train", 32).hash
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    shutil.rmtree(tmp_path / "a")
    assert open_images(tmp_path / "copy", "train").hash == before  # wherever they lie
    os.rename(tmp_path / "copy" / "train" / "a.png", tmp_path / "copy" / "train" / "c.png")
    assert open_images(tmp_path / "copy", "train").hash != before


# ---------------------------------------------------------------------------------------------- archives


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Arrow files go to a folder of the tests."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8))


NOISE = [saved(noise(seed), "PNG") for seed in range(40)]  # files of small images that all differ


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path, images, names=None, column="image", kind=pa.binary(), **columns):
    """Parquet as datasets writes it: images are (bytes, path), `names` those of the labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", kind), ("path", pa.string())])
    table = pa.table({column: pa.array([{"bytes": b, "path": p} for b, p in images], struct), **columns})
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
            files = [(folder.encoded(row).read_bytes(), folder.encoded(row).name) for row in part]
            texts = [folder.captions[row][0] for row in part]
            if kind == "tar":
                members = {name: content for content, name in files}
                for (_, name), text in zip(files, texts, strict=True):
                    members[name.replace(".jpg", ".json")] = json.dumps({"caption": text}).encode()
                write_tar(tmp_path / f"{split}-{number:06}.tar", dict(sorted(members.items())))
            else:
                write_parquet(tmp_path / "data" / f"{split}-{number:05}-of-00003.parquet", files, caption=texts)
    config = VQGANTrainConfig(steps=2, batch_size=8, workers=2)
    for split, folder in folders.items():
        found = open_images(tmp_path, split, 64)
        assert len(found) == len(folder) and not found.skipped and found.split == split
        assert all(torch.equal(found[row], folder[row]) for row in range(0, len(found), 9))
        assert [texts[0] for texts in found.captions] == [texts[0] for texts in folder.captions]
        assert found.names == [path.name for path in files_of(folder)]
        x, y = (torch.stack(list(training_batches(images, config, 1))) for images in (found, folder))
        assert torch.equal(x, y)


def test_archives_without_splits_are_split_by_hash(tmp_path):
    labels = {"names": ["big_cat", "dog"], "label": pa.array([i % 2 for i in range(40)])}
    path = write_parquet(tmp_path / "all.parquet", [(NOISE[i], f"{i}.png") for i in range(40)], **labels)
    train, val = both(path, 10)
    assert len(train) == 24 and len(val) == 16 and not set(train.names) & set(val.names) and train.name == "all"
    assert val.classes == [["big cat", "dog"][int(name[:-4]) % 2] for name in val.names] and val.is_named_by_class
    assert train.hash == open_images(path, "train", 10).hash != val.hash
    original = Image.open(io.BytesIO(NOISE[int(val.names[3][:-4])]))
    assert np.array_equal(val[3].permute(1, 2, 0), original)


def test_columns_by_kind_or_by_name(tmp_path):
    texts = {"id": [f"{i}" for i in range(40)], "title": [f"a blue shirt no {i}" for i in range(40)]}
    path = write_parquet(tmp_path / "x.parquet", [(content, None) for content in NOISE], column="photo", **texts)
    images = open_images(path, "train", 10)
    assert images.names[0].isdigit() and images.captions[0][0].startswith("a blue shirt no ")  # the most words
    assert open_images(f"{path}?caption=id&class=title", "train", 10).classes[0].startswith("a blue shirt")
    assert len(open_images(f"{path}?image=photo", "val", 10)) == 16
    with pytest.raises(ClipgenError, match="has no column 'title' of images"):
        open_images(f"{path}?image=title", "train", 10)
    parquet.write_table(pa.table({"a": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ClipgenError, match="no column 'image' of images .it has a"):
        open_images(tmp_path / "numbers.parquet")


def test_classes_and_captions_beside_images_in_a_tar(tmp_path):
    members = {}
    for i, content in enumerate(NOISE):
        members |= {f"{i}.png": content, f"{i}.txt": b"one\ntwo", f"{i}.cls": b"3"}
    images = open_images(write_tar(tmp_path / "x.tar", members), "val", 10)
    assert images.captions == [("one", "two")] * 16 and images.classes == ["3"] * 16


def images_read(path):
    """How many images of an archive are read; they are noise, not the plain red of the secret, and the others are told."""
    count = 0
    rows = [(images, row) for images in both(path, 10) for row in range(len(images))]
    for images, row in rows:
        try:
            assert images[row].float().std() > 50
            count += 1
        except ClipgenError as error:
            assert "has no bytes" in str(error) or "not an image" in str(error)
    return count


def test_no_member_of_a_tar_is_a_file_outside(tmp_path, secret):
    members = {f"../{i}.png": content for i, content in enumerate(NOISE[:20])}
    members[secret] = NOISE[0]  # a file that is there, which the library datasets takes for the member's path
    path = write_tar(tmp_path / "data" / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        for name, kind in (("0l.png", tarfile.SYMTYPE), ("1l.png", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, secret
            tar.addfile(link)
    assert images_read(path) == 20


@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.large_string()], ids=str)
def test_no_value_of_a_parquet_file_is_a_path(tmp_path, secret, kind):
    path = write_parquet(tmp_path / "data" / "x.parquet", [(secret, secret)] * 20, kind=kind)
    if kind == pa.string():  # nothing says that these are images
        parquet.write_table(parquet.read_table(path).replace_schema_metadata(None), path)
    assert images_read(path) == 0
    write_parquet(path, [(content, secret) for content in NOISE[:20]])
    assert images_read(path) == 20
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(0, "image", pa.array([secret] * 20)), path)
    with pytest.raises(ClipgenError, match="x.parquet"):
        open_images(path)


def write_sparse_tar(path):
    """A tar with a hole of 6 GB."""
    sparse, content = tarfile.TarInfo("0.png"), b"0\n".ljust(512, b"\0")
    entries = {"major": "1", "minor": "0", "realsize": "6000000000", "name": "0.png"}
    sparse.pax_headers = {f"GNU.sparse.{key}": value for key, value in entries.items()}
    sparse.size = len(content)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse, io.BytesIO(content))


def test_archives_that_promise_too_much_are_refused(tmp_path):
    """A value stored once for all rows, zeros in a page, a hole in a sparse member."""
    value, places = pa.array([os.urandom(200_000)], pa.binary()), pa.array([0] * 20_000, pa.int32())
    once = pa.table({"image": pa.DictionaryArray.from_arrays(places, value)})
    parquet.write_table(once, tmp_path / "once.parquet")
    zeros, options = (
        pa.table({"image": pa.array([bytes(2_000_000)] * 10)}),
        {"use_dictionary": False, "compression": "zstd"},
    )
    with parquet.ParquetWriter(tmp_path / "zeros.parquet", zeros.schema, **options) as writer:
        for _ in range(60):
            writer.write_table(zeros)
    write_sparse_tar(tmp_path / "sparse.tar")
    for name in ("once.parquet", "zeros.parquet", "sparse.tar"):
        assert (tmp_path / name).stat().st_size < 1_000_000
        with pytest.raises(ClipgenError, match=f"{name} of .* GB unpacks to"):
            open_images(tmp_path / name)


def test_damaged_archives_are_one_sentence(tmp_path):
    tar = write_tar(tmp_path / "x.tar", {f"{i}.png": content for i, content in enumerate(NOISE)})
    for path in (tar, write_parquet(tmp_path / "x.parquet", [(content, None) for content in NOISE])):
        whole = path.read_bytes()
        for content in (b"", b"no archive", whole[: len(whole) // 2]):
            path.write_bytes(content)
            with pytest.raises(ClipgenError, match=path.name) as error:
                open_images(path)
            assert "\n" not in str(error.value)


def test_a_hub_id_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = "^nobody/no-such-images is no folder here, and as a data set of the Hugging Face hub"
    with pytest.raises(ClipgenError, match=sentence):
        open_images("nobody/no-such-images")


def test_strays_beside_class_folders_and_other_slips_are_told(tmp_path, capsys):
    photos = save(tmp_path / "photos", *(f"{name}/{i}.png" for name in ("n01440764", "n02084071") for i in range(10)))
    (save(photos, "stray.png") / "words.txt").write_text("n01440764\ttench\n")
    images = open_images(photos, "train", 8)
    assert "stray.png" not in images.names and set(images.classes) == {"n01440764", "n02084071"}
    told = capsys.readouterr().err
    for sentence in ("2 classes", "left out: 1 images beside class folders", "words.txt has no line n02084071"):
        assert sentence in told
    (tmp_path / "x.tar").write_bytes(gzip.compress(write_tar(tmp_path / "y.tar", {"0.png": NOISE[0]}).read_bytes()))
    with pytest.raises(ClipgenError, match="x.tar is compressed: unpack it by gunzip"):
        open_images(tmp_path / "x.tar")
