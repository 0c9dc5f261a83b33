import json

import pytest
import torch
from PIL import Image

from clipgen_lib.data.batches import ordered_batches, picture_batches, spare_workers, training_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.runtime.runs import ClipgenError


def save(path, colour="red", size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def coco_root(root, files, images=None, annotations=None, split="val2017"):
    for name in files:
        save(root / split / name)
    images = [{"id": i, "file_name": name} for i, name in enumerate(files)] if images is None else images
    annotations = annotations if annotations is not None else [{"image_id": 0, "id": 1, "caption": " a red field\n"}]
    (root / "annotations").mkdir(exist_ok=True, parents=True)
    (root / "annotations" / f"captions_{split}.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    return root


def test_shapes_are_read_as_coco(world):
    images = open_images(world, "val")
    assert len(images) == 12 and images.has_captions and all(len(c) == 5 for c in images.captions)
    assert images[0].shape == (3, 64, 64)


def test_real_coco(shared):
    images = open_images(shared / "coco-mini", "val", 64)
    assert images.split == "val2017" and len(images) == 79 and len(images.captions[0]) >= 5
    rows, batch = next(ordered_batches(images, range(8), 8))
    assert batch.shape == (8, 3, 64, 64) and rows == list(range(8))


def test_coco_years_and_missing_pictures(tmp_path):
    root = coco_root(tmp_path, ["a.png", "b.png"])
    (root / "val2017" / "b.png").unlink()
    images = open_images(root, "val")
    assert len(images) == 1 and images.captions == [("a red field",)]
    assert images.skipped == {"b.png": "named in the annotations, but the file is missing"}
    coco_root(tmp_path, ["c.png"], split="val2014")
    with pytest.raises(ClipgenError, match="val2014, val2017"):
        open_images(root, "val")
    assert open_images(root, "val2014").split == "val2014"


def test_coco_captions_without_pictures(tmp_path):
    root = coco_root(tmp_path, ["a.png"], annotations=[{"image_id": 7, "id": 1, "caption": "lost"}])
    assert open_images(root, "val").skipped == {"image_id 7": "captions without an entry among the images"}
    with pytest.raises(ClipgenError, match="none of the 1 images"):
        open_images(coco_root(tmp_path / "x", [], images=[{"id": 0, "file_name": "gone.png"}]), "val")


def test_coco_broken_annotations(tmp_path):
    root = coco_root(tmp_path, ["a.png"])
    path = root / "annotations" / "captions_val2017.json"
    for text in (
        '{"images": [',
        "[]",
        '{"images": [{"id": 0}], "annotations": []}',
        '{"images": 3, "annotations": []}',
    ):
        path.write_text(text)
        with pytest.raises(ClipgenError, match="captions_val2017.json"):
            open_images(root, "val")


def test_coco_file_names_stay_inside(tmp_path):
    save(tmp_path / "outside.png")
    root = coco_root(
        tmp_path / "coco",
        ["a.png"],
        images=[{"id": 0, "file_name": "a.png"}, {"id": 1, "file_name": "../../outside.png"}],
    )
    images = open_images(root, "val")
    assert len(images) == 1 and "outside the image folder" in images.skipped["../../outside.png"]


def test_coco_names_and_ids_that_nothing_can_have(tmp_path):
    names = ["a.png", "a\0b", "\ud800", "x" * 10_000, str(tmp_path / "coco" / "val2017" / "a.png")]
    root = coco_root(
        tmp_path / "coco", ["a.png"], images=[{"id": i, "file_name": name} for i, name in enumerate(names)]
    )
    images = open_images(root, "val")
    assert len(images) == 1 and len(images.skipped) == 4 and max(map(len, images.skipped)) <= 200
    assert [why.rpartition(" ")[2] for why in images.skipped.values()] == ["name", "name", "name", "folder"]
    assert "".join(images.skipped).encode()
    path = root / "annotations" / "captions_val2017.json"
    for key in ("Infinity", "NaN", "1" + "0" * 400, "9223372036854775808", '"x"'):
        path.write_text('{"images": [{"id": KEY, "file_name": "a.png"}], "annotations": []}'.replace("KEY", key))
        with pytest.raises(ClipgenError, match="captions_val2017.json is not in COCO's caption layout"):
            open_images(root, "val")


def test_folder_with_captions_and_automatic_split(tmp_path):
    for i in range(60):
        save(tmp_path / "deep" / f"{i}.png")
        (tmp_path / "deep" / f"{i}.txt").write_text(f"first {i}\n\nsecond\n")
    train, val = open_images(tmp_path, "train"), open_images(tmp_path, "val")
    assert len(train) + len(val) == 60 and len(val) >= 1 and not set(train.paths) & set(val.paths)
    assert train.captions[0] == (f"first {train.paths[0].stem}", "second")
    for path in val.paths:
        path.with_suffix(".txt").unlink()
    assert not open_images(tmp_path, "val").has_captions


def test_class_folders_give_prompts(tmp_path):
    for split in ("train", "val"):
        for name in ("golden_retriever", "bus"):
            save(tmp_path / split / name / "x.png")
    images = open_images(tmp_path, "val")
    assert images.classes == ["bus", "golden retriever"]
    assert images.captions == [("a photo of a bus",), ("a photo of a golden retriever",)]


def test_no_pictures_and_no_captions(tmp_path):
    with pytest.raises(ClipgenError, match="holds no images"):
        open_images(tmp_path)
    with pytest.raises(ClipgenError, match="is not a folder"):
        open_images(tmp_path / "nowhere")
    save(tmp_path / "a.png")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ClipgenError, match="unpack"):
        open_images(tmp_path / "x.zip")
    with pytest.raises(ClipgenError, match="no captions"):
        _ = open_images(tmp_path, "train" if not _is_val(tmp_path) else "val").captions
    with pytest.raises(ClipgenError, match="splits train and val"):
        open_images(tmp_path, "test")


def _is_val(root):
    try:
        return len(open_images(root, "val")) == 1
    except ClipgenError:
        return False


def test_damaged_files_are_counted_and_replaced(tmp_path):
    for i in range(4):
        save(tmp_path / "train" / f"{i}.png")
        save(tmp_path / "val" / f"{i}.png")
    (tmp_path / "train" / "2.png").write_bytes((tmp_path / "train" / "1.png").read_bytes()[:40])
    images = open_images(tmp_path, "train", 16)
    batch = next(training_batches(images, 4, seed=0, start=0, stop=1))
    assert batch.shape == (4, 3, 16, 16)
    assert list(images.skipped) == ["train/2.png"] and images.skipped["train/2.png"].startswith("train/2.png is")
    rows, batch = next(ordered_batches(images, range(4), 4))
    assert rows == [0, 1, 3] and len(batch) == 3
    for i in range(4):
        (tmp_path / "train" / f"{i}.png").write_text("x")
    with pytest.raises(ClipgenError, match="none of 4 images"):
        next(training_batches(open_images(tmp_path, "train", 16), 4, seed=0, start=0, stop=1))


def test_batches_are_a_function_of_seed_and_step(images):
    def batches(start, stop, **kw):
        return torch.stack(list(training_batches(images, 8, 5, start, stop, flip=True, random_crop=True, **kw)))

    whole = batches(0, 7)
    assert torch.equal(whole[4:], batches(4, 7))
    assert torch.equal(whole[:2], batches(0, 2, workers=2))
    ranks = [batches(0, 2, rank=r, world=2) for r in range(2)]
    assert torch.equal(whole[:2], torch.cat(ranks, dim=1))
    assert not torch.equal(whole[0], next(training_batches(images, 8, 6, 0, 1, flip=True, random_crop=True)))
    with pytest.raises(ClipgenError, match="3 processes"):
        next(training_batches(images, 8, 0, 0, 1, world=3))


def test_training_reads_no_caption(tmp_path, monkeypatch):
    """A folder's text files and classes are read when asked for; so are COCO's captions, again from their file."""
    for split in ("train", "val"):
        for i in range(4):
            save(tmp_path / split / f"{i % 2}" / f"{i}.png")
            (tmp_path / split / f"{i % 2}" / f"{i}.txt").write_text(f"number {i}")
    root = coco_root(tmp_path / "coco", ["a.png", "b.png"])
    with monkeypatch.context() as patch:
        for name in ("_folder_captions", "_folder_classes", "_coco_captions", "_caption_file"):
            patch.setattr(f"clipgen_lib.data.{name}", lambda *_: pytest.fail("a caption was read"))
        for images in (open_images(tmp_path, "train", 8), open_images(root, "val", 8)):
            next(training_batches(images, 2, 0, 0, 1))
            assert images.hash and images.content_hash
    images = open_images(tmp_path, "train", 8)
    assert images.captions == [(f"number {i}",) for i in (0, 2, 1, 3)] and images.classes == ["0", "0", "1", "1"]
    images = open_images(root, "val", 8)
    assert images.captions == [("a red field",), ()]


def test_hash_follows_the_files(tmp_path):
    for name in ("train/a.png", "val/b.png"):
        save(tmp_path / name)
    before = open_images(tmp_path, "train").hash
    assert before == open_images(tmp_path, "train").hash
    save(tmp_path / "train" / "c.png")
    assert before != open_images(tmp_path, "train").hash


def test_a_small_folder_holds_out_enough_to_compare(tmp_path):
    for i in range(40):
        save(tmp_path / f"{i}.png")
    train, val = open_images(tmp_path, "train"), open_images(tmp_path, "val")
    assert len(train) == 24 and len(val) == 16 and not set(train.paths) & set(val.paths)
    for i in range(30):
        (tmp_path / f"{i}.png").unlink()
    assert len(open_images(tmp_path, "train")) == len(open_images(tmp_path, "val")) == 5
    assert set(open_images(tmp_path, "val").paths) & set(val.paths)


def test_hidden_files_are_no_pictures(tmp_path):
    for name in ("a.png", "b.png", "._a.png", ".thumbnails/a.png"):
        save(tmp_path / ".album" / name)  # a dot above the folder that was asked for means nothing
    paths = [p for split in ("train", "val") for p in open_images(tmp_path / ".album", split).paths]
    assert sorted(p.name for p in paths) == ["a.png", "b.png"]


def test_spare_cores_decode(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    for threads, processes, found in ((7, 1, (5, 8)), (16, 1, (0, 8)), (2, 4, (1, 2)), (1, 20, (0, 0))):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        monkeypatch.setattr("clipgen_lib.runtime.distributed.world_size", lambda n=processes: n)
        assert (spare_workers(cpu), spare_workers(cuda)) == found


def test_workers_stack_what_one_process_reads(tmp_path):
    """Batches of several sizes by one loader, one of them without an image, with an unreadable file in another."""
    for i in range(7):
        save(tmp_path / "train" / f"{i}.png", (9 * i, 0, 0), (20 + i, 16))
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "4.png").write_bytes(b"no image")
    (tmp_path / "train" / "6.png").write_bytes(b"no image")
    batches, found = [range(0, 3), [5, 4], [6], [1, 0]], []
    for workers in (0, 2):
        images = open_images(tmp_path, "train", 16)
        found.append([(rows, pictures.tolist()) for rows, pictures in picture_batches(images, batches, workers)])
        assert list(images.skipped) == ["train/4.png", "train/6.png"]
    assert found[0] == found[1] and [rows for rows, _ in found[0]] == [[0, 1, 2], [5], [], [1, 0]]
