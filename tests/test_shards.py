import io
import json
import os
import pickle
import sys
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from clipgen_lib.config import ClassifierConfig, ClipTrainConfig, FusionGANConfig
from clipgen_lib.data import datasets as data
from clipgen_lib.data import shards
from clipgen_lib.data.batches import ordered_batches, training_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.shards import Index, Names, TarShards, split_of
from clipgen_lib.metrics.classifier import train_classifier
from clipgen_lib.runtime.runs import ClipgenError, open_run
from clipgen_lib.study.baselines import train_fusion_gan
from clipgen_lib.study.train_clip import ImagePairs


def picture(seed, size=(12, 10)):
    """The bytes of a small PNG that no other seed has."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, members):
    """A tar of (name, bytes) or TarInfo members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            info, content = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path, pictures, group=100, names=None, **columns):
    """Parquet as datasets writes it: images are (bytes, path), `names` those of the labels."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array(
        [{"bytes": b, "path": p} for b, p in pictures], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    features = {"image": {"_type": "Image"}} | ({"label": {"names": names, "_type": "ClassLabel"}} if names else {})
    notes = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"image": images, **columns}).replace_schema_metadata(notes)
    parquet.write_table(table, path, row_group_size=group)
    return path


def tar_world(root, n=40, shards=4):
    """Shards of n images in all, with captions."""
    for s in range(shards):
        members = []
        for i in range(s * n // shards, (s + 1) * n // shards):
            members += [(f"{i:03}.png", picture(i)), (f"{i:03}.txt", f"number {i}\nsaid again\n".encode())]
        write_tar(root / f"train-{s:03}.tar", members)
    write_tar(root / "val-000.tar", [(f"{i}.png", picture(i)) for i in range(900, 906)])
    return root


def pixels(images):
    return [images[row] for row in range(len(images))]


# ---------------------------------------------------------------------------------------------- the same images


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_photos_in_shards_are_those_of_the_folder(shared, tmp_path, kind):
    folders = {split: open_images(shared / "coco-mini", split, 64) for split in ("train", "val")}
    for split, folder in folders.items():
        rows = np.array_split(np.arange(len(folder)), 3)
        for shard, part in enumerate(rows):
            files = [(folder.paths[row].read_bytes(), folder.paths[row].name, folder.captions[row]) for row in part]
            if kind == "tar":
                said = [(name.replace(".jpg", ".json"), json.dumps({"caption": c}).encode()) for _, name, c in files]
                members = zip([(name, content) for content, name, _ in files], said, strict=True)
                write_tar(tmp_path / f"{split}-{shard:06}.tar", [member for pair in members for member in pair])
            else:
                file = tmp_path / "data" / f"{split}-{shard:05}-of-00003.parquet"
                write_parquet(file, [f[:2] for f in files], group=10, captions=[list(f[2]) for f in files])
    for split, folder in folders.items():
        found = open_images(tmp_path, split, 64)
        assert len(found) == len(folder) and not found.skipped and found.split == split
        assert all(torch.equal(a, b) for a, b in zip(pixels(found), pixels(folder), strict=True))
        assert found.captions == folder.captions and found.content_hash == folder.content_hash
        assert [n.rpartition("/")[2] for n in found.names] == [path.name for path in folder.paths]
        x, y = (torch.stack(list(training_batches(i, 8, 1, 0, 3))) for i in (found, folder))
        assert torch.equal(x, y)  # so few blocks are one window: the very batches of the folder


def test_shards_of_webdataset_itself(tmp_path):
    """Written by its ShardWriter; what its reader yields is what lies in our rows, whatever the order."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "shard-%06d.tar"), maxcount=7, verbose=0) as sink:
        for i in range(30):
            sink.write({"__key__": f"sub.d/{i:04}", "png": picture(i), "txt": f"number {i}", "cls": i % 3})
    files = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    assert len(files) == 5
    theirs = {
        s["__key__"]: (s["png"], s["txt"].decode(), s["cls"].decode())
        for s in webdataset.WebDataset(files, shardshuffle=False)
    }
    ours = {}
    for split in ("train", "val"):
        images = open_images(tmp_path, split)
        for row, name in enumerate(images.names):
            key = name.split("/", 1)[1].removesuffix(".png")
            ours[key] = (images.pictures.open(row), images.captions[row][0], images.classes[row])
    assert ours == theirs and len(ours) == 30


# ---------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-000000.tar", "train"),
        ("imagenet-val-000007.tar", "val"),
        ("data/validation-00000-of-00002.parquet", "val"),
        ("coco_train2017_003.tar", "train"),
        ("val/part-1.tar", "val"),
        ("test-00000-of-00001.parquet", "test"),
        ("trainings-0.tar", None),
        ("000.tar", None),
        ("train/val-0.tar", "train"),
    ],
)
def test_splits_by_name(name, split):
    assert split_of(name) == split


def test_split_folders_and_unnamed_shards(tmp_path):
    write_tar(tmp_path / "train" / "0.tar", [("a.png", picture(1))])
    write_tar(tmp_path / "val" / "0.tar", [("b.png", picture(2))])
    write_tar(tmp_path / "more.tar", [("c.png", picture(3))])
    assert list(open_images(tmp_path, "train").names) == ["train/0.tar/a.png"]
    val = open_images(tmp_path, "val")
    assert list(val.names) == ["val/0.tar/b.png"] and list(val.skipped) == ["more.tar"]
    with pytest.raises(ClipgenError, match="train and val, not 'test'"):
        open_images(tmp_path, "test")


def test_a_test_split_is_held_out_where_there_is_no_val(tmp_path):
    write_tar(tmp_path / "train-0.tar", [("a.png", picture(1))])
    write_tar(tmp_path / "test-0.tar", [("b.png", picture(2))])
    assert list(open_images(tmp_path, "val").names) == ["test-0.tar/b.png"]
    write_tar(tmp_path / "val-0.tar", [("c.png", picture(3))])
    assert list(open_images(tmp_path, "val").names) == ["val-0.tar/c.png"]


def test_without_splits_the_rule_is_that_of_folders(tmp_path):
    shard = write_tar(tmp_path / "s" / "all.tar", [(f"{i}.png", picture(i)) for i in range(200)])
    for i in range(200):
        file = tmp_path / "f" / "all.tar" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    for path in (shard, shard.parent):
        for split in ("train", "val"):
            images, folder = open_images(path, split), open_images(tmp_path / "f", split)
            assert set(images.names) == set(folder.names) and 150 < max(len(images), 200 - len(images)) < 200
            assert torch.equal(images[3], folder[list(folder.names).index(images.names[3])])
    assert open_images(shard).name == "all" and open_images(shard.parent).name == "s"


def test_hash_follows_names_and_sizes(tmp_path):
    before = open_images(tar_world(tmp_path / "a"), "train")
    assert (
        before.hash == open_images(tar_world(tmp_path / "b"), "train").hash != open_images(tmp_path / "a", "val").hash
    )
    write_tar(tmp_path / "b" / "train-003.tar", [("030.png", picture(30, (13, 10)))])
    assert before.hash != open_images(tmp_path / "b", "train").hash


# ---------------------------------------------------------------------------------------------- captions and classes


def test_tar_captions_and_classes(tmp_path):
    members = [
        ("a.png", picture(0)),
        ("a.cls", b"4"),
        ("a.json", b'{"caption": " one ", "width": 3}'),
        ("b.png", picture(1)),
        ("b.cls", b"0\n"),
        ("b.json", b'{"caption": ["one", "two"]}'),
        ("c.png", picture(2)),
        ("c.cls", b"4"),
        ("c.json", b'{"caption": '),
        ("c.seg.png", b""),
        ("d.png", picture(3)),
        ("d.cls", b"2"),
        ("d.json", b'{"caption": "json"}'),
        ("d.txt", b"text\n\nmore"),
    ]
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", members[:1])
    images = open_images(tmp_path, "train")
    assert images.classes == ["4", "0", "4", "2"]
    assert not images.skipped  # nobody has read a caption
    assert images.captions == [("one",), ("one", "two"), (), ("text", "more")]
    assert list(images.skipped) == ["train-0.tar/c.json"]
    val = open_images(tmp_path, "val")
    assert val.classes is None and not val.has_captions
    with pytest.raises(ClipgenError, match="has no captions"):
        _ = val.captions


def test_parquet_labels_have_the_names_of_the_schema(tmp_path):
    pictures = [(picture(i), None) for i in range(6)]
    write_parquet(
        tmp_path / "train-00000-of-00001.parquet", pictures, 4, ["golden_retriever", "bus"], label=[0, 1, 1, 0, 1, 0]
    )
    write_parquet(tmp_path / "test-00000-of-00001.parquet", pictures, 4, ["golden_retriever", "bus"], label=[-1] * 6)
    images = open_images(tmp_path, "train")
    assert images.classes == [["golden retriever", "bus"][i] for i in (0, 1, 1, 0, 1, 0)]
    assert images.captions[1] == ("a photo of a bus",) and images.is_named_by_class
    assert list(images.names)[:2] == [f"train-00000-of-00001.parquet/00000{i}" for i in range(2)]  # no paths kept
    assert open_images(tmp_path, "val").classes is None  # -1 is no class


@pytest.mark.parametrize("column, said", [("text", "one"), ("sentences", ["one", "two"])])
def test_parquet_captions_of_either_kind(tmp_path, column, said):
    file = write_parquet(
        tmp_path / "x.parquet", [(picture(i), f"dir/{i}.png") for i in range(40)], 16, **{column: [said] * 40}
    )
    images = open_images(file, "val")
    assert images.captions == [(said,) if isinstance(said, str) else tuple(said)] * len(images)
    assert all(torch.equal(images[r], data.load_image(picture(int(n[10:-4])), 64)) for r, n in enumerate(images.names))


# ---------------------------------------------------------------------------------------------- what is broken


def test_broken_shards_are_skipped_and_listed(tmp_path):
    root = tar_world(tmp_path)
    whole = (root / "train-000.tar").read_bytes()
    (root / "train-000.tar").write_bytes(whole[: 3 * len(whole) // 5])  # inside a member
    (root / "train-001.tar").write_bytes(b"no archive at all" * 99)
    (root / "train-002.tar").write_bytes(b"")
    write_tar(root / "train-004.tar", [("only.txt", b"no image")])
    (root / "train-005.tar").write_bytes(b"\x1f\x8b" + whole)
    cut = (root / "train-003.tar").read_bytes()
    (root / "train-006.tar").write_bytes(cut[:2048] + b"\xff" * 512 + cut[2560:])  # a header in the middle
    images = open_images(root, "train")
    shard_of = Counter(name.split("/")[0] for name in images.names)
    assert 3 <= shard_of["train-000.tar"] < 10 and shard_of["train-003.tar"] == 10
    assert list(shard_of) == ["train-000.tar", "train-003.tar", "train-006.tar"]
    assert {
        "train-000.tar",
        "train-001.tar",
        "train-002.tar",
        "train-004.tar",
        "train-005.tar",
    } <= images.skipped.keys()
    assert "cut short" in images.skipped["train-000.tar"] and "no tar" in images.skipped["train-001.tar"]
    assert "cut short" in images.skipped["train-006.tar"] and "compressed" in images.skipped["train-005.tar"]
    assert images.skipped["train-004.tar/only"] == "it has no image beside it"
    assert all(torch.equal(images[row], data.load_image(picture(row), 64)) for row in range(shard_of["train-000.tar"]))
    for file in root.glob("train-*.tar"):
        file.write_bytes(b"x" * 700)
    with pytest.raises(ClipgenError, match="none of the 7 shards"):
        open_images(root, "train")


def test_a_cut_between_two_members_is_seen(tmp_path):
    root = tar_world(tmp_path)
    whole = (root / "val-000.tar").read_bytes()
    (root / "val-000.tar").write_bytes(whole[: 1024 * 2])  # two members of a header and a block each
    images = open_images(root, "val")
    assert len(images) == 2 and "behind its member 2" in images.skipped["val-000.tar"]


def test_members_that_point_outside_are_not_read(tmp_path):
    link, device = tarfile.TarInfo("link.png"), tarfile.TarInfo("device.png")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    good = ("./deep/good.png", picture(0))
    bad = [("/etc/a.png", picture(1)), ("../b.png", picture(2)), ("x/../../c.png", picture(3)), ("d\n.png", picture(4))]
    write_tar(tmp_path / "train-0.tar", [link, *bad, good, device])
    write_tar(tmp_path / "val-0.tar", [good, ("._mac.png", b""), ("deep/good.jpg", b"")])
    before = sorted(tmp_path.rglob("*"))
    images, val = open_images(tmp_path, "train"), open_images(tmp_path, "val")
    assert list(images.names) == ["train-0.tar/deep/good.png"] and len(images.skipped) == 6
    assert "outside" in images.skipped["train-0.tar/x/../../c.png"] and "link" in images.skipped["train-0.tar/link.png"]
    assert list(val.names) == ["val-0.tar/deep/good.png"] and "already" in val.skipped["val-0.tar/deep/good.jpg"]
    assert sorted(tmp_path.rglob("*")) == before


def test_parquet_that_cannot_be_used(tmp_path):
    pictures = [(picture(i), f"{i}.png") for i in range(8)]
    whole = write_parquet(tmp_path / "train-0.parquet", pictures, 4).read_bytes()
    write_parquet(tmp_path / "val-0.parquet", pictures, 4)
    (tmp_path / "train-1.parquet").write_bytes(whole[:-100])
    (tmp_path / "train-2.parquet").write_bytes(b"nothing")
    write_parquet(tmp_path / "train-3.parquet", [(None, "../../etc/a.png"), (b"no image", "b.png")])
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"image": ["a.png"]}), tmp_path / "train-4.parquet")
    images = open_images(tmp_path, "train", 16)
    assert list(images.skipped) == ["train-1.parquet", "train-2.parquet", "train-4.parquet"] and len(images) == 10
    assert list(images.names)[8:] == ["train-3.parquet/a.png", "train-3.parquet/b.png"]
    rows, _ = next(ordered_batches(images, range(10), 10))
    assert rows == list(range(8)) and "embed the files" in images.skipped["train-3.parquet/a.png"]
    assert images.skipped["train-3.parquet/b.png"].startswith("train-3.parquet/b.png is not an image")


def test_a_picture_that_goes_bad_is_replaced(tmp_path):
    images = open_images(tar_world(tmp_path), "train", 8)
    before = next(training_batches(images, 40, 0, 0, 1))
    images._cache.clear()
    offset, size = (int(images.names.columns[name][7]) for name in ("offset", "size"))
    with open(tmp_path / "train-000.tar", "r+b") as stream:
        stream.seek(offset)
        stream.write(b"\0" * size)
    with open(tmp_path / "train-003.tar", "r+b") as stream:
        stream.truncate(4000)
    batch = next(training_batches(images, 40, 0, 1, 2))
    lost = {"train-000.tar/007.png", *(f"train-003.tar/{i:03}.png" for i in range(32, 40))}
    assert batch.shape == before.shape and set(images.skipped) == lost
    assert "behind the end" in images.skipped["train-003.tar/035.png"]


def test_a_damaged_row_group_costs_its_pictures_only(tmp_path):
    pictures = [(picture(i, (40, 40)), f"{i}.png") for i in range(8)]
    file = write_parquet(tmp_path / "train-0.parquet", pictures, 4)
    write_parquet(tmp_path / "val-0.parquet", pictures, 4)
    images = open_images(tmp_path, "train", 16)
    whole = file.read_bytes()
    import pyarrow.parquet as parquet

    column = parquet.ParquetFile(file).metadata.row_group(1).column(0)
    assert column.path_in_schema == "image.bytes"
    start = column.dictionary_page_offset or column.data_page_offset
    file.write_bytes(whole[:start] + b"\xff" * 60 + whole[start + 60 :])
    rows, _ = next(ordered_batches(images, range(8), 8))
    assert rows == [0, 1, 2, 3] and list(images.skipped) == [f"train-0.parquet/{i}.png" for i in range(4, 8)]


def test_no_shards_to_use_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "gz").mkdir()
    with tarfile.open(tmp_path / "gz" / "train-0.tar.gz", "w:gz"):
        pass
    for path in (tmp_path / "gz", tmp_path / "gz" / "train-0.tar.gz"):
        with pytest.raises(ClipgenError, match="unpack it to .tar"):
            open_images(path)
    both = write_tar(tmp_path / "both" / "a.tar", [("a.png", picture(0))]).parent
    (both / "a.parquet").write_bytes(b"")
    with pytest.raises(ClipgenError, match="both .tar and .parquet"):
        open_images(both)
    (both / "a.parquet").rename(both / "b.png")
    with pytest.raises(ClipgenError, match="both images"):
        open_images(both)
    one = write_tar(tmp_path / "one.tar", [("a.png", picture(0))])
    with pytest.raises(ClipgenError, match="too few for a (train|val) split"):
        _ = open_images(one, "train"), open_images(one, "val")
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ClipgenError, match="pip install pyarrow"):
        open_images(tmp_path / "x.parquet")


def test_a_folder_of_pictures_stays_one(tmp_path):
    for i in range(4):
        for split in ("train", "val"):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "metadata.parquet").write_bytes(b"")
    (tmp_path / "backup.tar.gz").write_bytes(b"")
    assert len(open_images(tmp_path, "train").paths) == 4
    with pytest.raises(ClipgenError, match="no paths"):
        _ = open_images(write_tar(tmp_path / "s.tar", [(f"{i}.png", picture(i)) for i in range(40)])).paths


def test_damaged_tars_never_raise_anything_else(tmp_path):
    """500 tars with bytes changed, cut or repeated: what can be read is read, and the rest listed."""
    good = write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(i, (3, 3))) for i in range(6)]).read_bytes()[
        : 6 * 1024 + 1024
    ]
    draw = np.random.default_rng(0)
    found = Counter()
    for _ in range(500):
        content = bytearray(good)
        for _ in range(draw.integers(1, 4)):
            at, count = int(draw.integers(len(content))), int(draw.integers(1, 40))
            if draw.random() < 0.7:  # headers are what matters
                at = at // 1024 * 1024 + int(draw.integers(512))
            content[at : at + count] = (
                draw.integers(0, 256, count, dtype=np.uint8).tobytes() if draw.random() < 0.8 else b""
            )
        (tmp_path / "a.tar").write_bytes(content)
        scan = TarShards.scan(tmp_path / "a.tar")
        assert len(scan.members) == len(scan.rows) and all(0 <= row[0] < len(content) for row in scan.rows)
        found[len(scan.members)] += 1
        assert len(scan.members) == 6 or scan.skipped
    assert found[0] and found[6] and len(found) > 4


def test_a_member_of_negative_size_ends_the_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(i, (3, 3))) for i in range(3)])
    content = bytearray(path.read_bytes())
    header = content[1024:1536]
    header[124:136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")  # as base 256
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    content[1024:1536] = header
    path.write_bytes(content)
    scan = TarShards.scan(path)
    assert scan.members == ["0.png"] and "damaged behind its member 1" in scan.skipped[""]


# ---------------------------------------------------------------------------------------------- order, processes, memory


def parquet_world(root, n=96, group=4):
    for s in range(3):
        rows = range(s * n // 3, (s + 1) * n // 3)
        write_parquet(root / f"train-{s:05}-of-00003.parquet", [(picture(i), f"{i:03}.png") for i in rows], group)
    write_parquet(root / "validation-00000-of-00001.parquet", [(picture(i), f"{i:03}.png") for i in range(n, n + 3)])
    return root


@pytest.mark.parametrize("make", [tar_world, parquet_world])
def test_ranks_and_workers_read_each_picture_once(tmp_path, monkeypatch, make):
    monkeypatch.setattr(shards, "TAR_BLOCK", 2)
    monkeypatch.setattr(TarShards, "window", 16)
    n, log = (40 if make is tar_world else 96), tmp_path / "log"
    real = data.load_image

    def counted(source, size, name=""):
        with open(log, "a") as stream:  # appended by whichever process reads
            stream.write(name.rpartition("/")[2] + "\n")
        return real(source, size, name)

    monkeypatch.setattr(data, "load_image", counted)
    images = open_images(make(tmp_path / "world"), "train", 8)
    assert len(images.blocks) - 1 > images.window == 16
    kwargs = {"batch_size": 8, "seed": 3, "flip": True, "random_crop": True}
    ranks = [
        list(training_batches(images, start=0, stop=n // 8, rank=r, world=2, workers=2, **kwargs)) for r in range(2)
    ]
    read = log.read_text().split()
    assert len(read) == n and len(set(read)) == n
    whole = list(training_batches(images, start=0, stop=n // 8, **kwargs))
    assert all(torch.equal(torch.cat(parts), batch) for batch, *parts in zip(whole, *ranks, strict=True))
    late = list(
        training_batches(images, start=3, stop=5, world=1, workers=1, **kwargs)
    )  # resumed in the middle of an epoch
    assert all(torch.equal(a, b) for a, b in zip(late, whole[3:5], strict=True))


def test_an_epoch_reads_each_row_group_once(tmp_path, monkeypatch):
    images = open_images(parquet_world(tmp_path), "train", 8)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    real, read = shards.ParquetShards._pictures, []
    images.pictures._group.make = lambda shard, group: (
        read.append((shard, group)),
        real(images.pictures, shard, group),
    )[1]
    images.pictures._group.budget = 16 * real(images.pictures, 0, 0).nbytes + 999
    list(training_batches(images, 8, 0, 0, 12))
    assert len(images.blocks) == 25 and len(set(read)) == 24 and len(read) == 24
    assert len(images.pictures._group.kept) == 16
    monkeypatch.setattr(shards, "GROUP_BYTES", 5 * int(images.names.columns["group_bytes"].max()))
    assert open_images(tmp_path, "train").window == 5


@pytest.mark.parametrize("training", ["clip", "classifier", "gan"])
def test_every_training_reads_each_row_group_once_in_an_epoch(tmp_path, monkeypatch, training):
    """96 images in 24 row groups, of which 16 are kept; every fifth image has no caption."""
    pa = pytest.importorskip("pyarrow")
    said = pa.array([None if i % 5 == 0 else f"number {i}" for i in range(96)])
    labels = {} if training == "gan" else {"label": pa.array([str(i % 2) for i in range(96)])}
    write_parquet(
        tmp_path / "train-0.parquet", [(picture(i), f"{i:03}.png") for i in range(96)], 4, caption=said, **labels
    )
    write_parquet(tmp_path / "val-0.parquet", [(picture(i), f"{i:03}.png") for i in range(96, 99)])
    images = open_images(tmp_path, "train", 8)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    read = []
    n = len([texts for texts in images.captions if texts])
    real = shards.ParquetShards._pictures
    images.pictures._group.make = lambda shard, group: (read.append(group), real(images.pictures, shard, group))[1]
    images.pictures._group.budget = 16 * real(images.pictures, 0, 0).nbytes + 999
    assert n == 76 and images.window == 16
    if training == "clip":
        pairs = ImagePairs(images, ClipTrainConfig(batch_size=4), 0)
        seen = [pairs.batch(step)[1] for step in range(19)]
        assert len({text for texts in seen for text in texts}) == 76
    elif training == "classifier":
        config = ClassifierConfig(
            width=8, steps=24, batch_size=4, warmup=1, bfloat16=False, log_every=24, save_every=24
        )
        train_classifier(open_run("r", tmp_path), images, config, show_progress=False)
    else:
        config = FusionGANConfig(channels=2, noise_dim=2, steps=19, batch_size=4)
        words = SimpleNamespace(dim=4, device="cpu", texts=lambda texts: torch.ones(len(texts), 4))
        train_fusion_gan(images, words, config, show_progress=False)
    assert len(read) == 24 and len(set(read)) == 24


def test_a_set_travels_to_processes_that_are_not_forked(tmp_path):
    for make in (tar_world, parquet_world):
        images = open_images(make(tmp_path / make.__name__), "train", 8)
        before = images[5]
        images._cache.clear()
        again = pickle.loads(pickle.dumps(images))
        assert torch.equal(again[5], before) and again.hash == images.hash


class Dies(torch.utils.data.Dataset):
    """A set whose third row is where the kernel kills the process."""

    root, names, size, blocks, window = "photos", ["a", "b", "c", "d"], 8, None, 1

    def __len__(self):
        return 4

    def __getitem__(self, row):
        if row == 2:
            os.kill(os.getpid(), 9)
        return torch.zeros(3, 8, 8, dtype=torch.uint8)


def test_a_killed_worker_is_one_sentence():
    for batches in (training_batches(Dies(), 2, 0, 0, 4, workers=1), ordered_batches(Dies(), range(4), 2, 1)):
        with pytest.raises(ClipgenError, match="images of photos was killed.* take fewer workers than 1") as error:
            list(batches)
        assert "\n" not in str(error.value)


def test_a_million_rows_take_less_than_100_megabytes():
    n = 10**6
    letters = "".join(f"{i:012}.jpg" for i in range(n)).encode()
    members = Names(np.frombuffer(letters, np.uint8), np.arange(1, n + 1) * 16)
    columns = {name: np.zeros(n, dtype) for name, dtype in TarShards.COLUMNS.items()}
    index = Index([f"train-{s:06}.tar" for s in range(100)], np.arange(0, n + 1, n // 100), members, columns)
    assert index.nbytes < 100e6
    assert (
        index[0] == "train-000000.tar/000000000000.jpg"
        and index[-1] == index[n - 1] == "train-000099.tar/000000999999.jpg"
    )
    assert index[123_456] == "train-000012.tar/000000123456.jpg"
    part = index.kept(np.arange(n) % 1000 == 7)
    assert len(part) == 1000 and part[13] == "train-000001.tar/000000013007.jpg" and part.starts[2] == 20


def test_an_index_that_took_long_is_kept(tmp_path, monkeypatch):
    root = tar_world(tmp_path / "world")
    (root / "train-002.tar").write_bytes(b"x" * 2000)
    monkeypatch.setattr(shards, "DATA", tmp_path / "data")
    open_images(root, "train")
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(shards, "SLOW_SCAN", 0.0)
    first = open_images(root, "train", 8)
    (kept,) = (tmp_path / "data" / "shard_index").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(TarShards, "scan", lambda path: pytest.fail("the shards were read again"))
        again = open_images(root, "train", 8)
    assert (
        list(again.names) == list(first.names) and again.skipped == first.skipped and again.captions == first.captions
    )
    assert all(torch.equal(a, b) for a, b in zip(pixels(first), pixels(again), strict=True))
    kept.write_bytes(kept.read_bytes()[:300])  # a cache that is damaged is made again
    assert open_images(root, "train").hash == open_images(root, "train").hash
    write_tar(root / "train-002.tar", [("new.png", picture(77))])
    assert "train-002.tar/new.png" in list(open_images(root, "train").names)
