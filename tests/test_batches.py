import os
import pickle
import resource
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from clipgen_lib.config import VQGANTrainConfig
from clipgen_lib.data.batches import augmented_rows, batch_rows, image_batches, ordered_batches, training_batches
from clipgen_lib.data.datasets import open_images
from clipgen_lib.runtime.runs import ClipgenError


@pytest.fixture
def photos(tmp_path):
    """Seven images of several sizes and colours, of which numbers 4 and 6 cannot be read."""
    for name in ("photos/train", "photos/val"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (20, 16)).save(tmp_path / "photos" / "val" / "0.png")
    for i in range(7):
        path = tmp_path / "photos" / "train" / f"{i}.png"
        Image.new("RGB", (20 + i, 16), (30 * i, 0, 0)).save(path)
        if i in (4, 6):
            path.write_bytes(b"no image")
    return open_images(tmp_path / "photos", "train", 16)


def config(**entries):
    return VQGANTrainConfig(**{"steps": 7, "batch_size": 8, "flip": True, "random_crop": True, "workers": 0, **entries})


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1025])
def test_every_row_exactly_once_an_epoch(n):
    for seed in (0, 1, 2**31):
        for epoch in (0, 1, 10**6):
            assert np.array_equal(np.sort(batch_rows(n, n, seed, epoch)), np.arange(n))


def test_batches_of_any_size_are_cut_from_the_same_epochs():
    whole = np.concatenate([batch_rows(23, 23, 5, epoch) for epoch in range(3)])
    assert np.array_equal(whole[23:46], np.random.default_rng([5, 11, 1]).permutation(23))
    for size in (1, 4, 69):
        cut = np.concatenate([batch_rows(23, size, 5, step) for step in range(69 // size)])
        assert np.array_equal(cut, whole[: len(cut)])


def test_seeds_and_epochs_differ():
    orders = {tuple(batch_rows(50, 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_batches_are_a_function_of_seed_and_step(images):
    whole = torch.stack(list(training_batches(images, config(), 5)))
    assert whole.shape == (7, 8, 3, 64, 64) and whole.dtype == torch.uint8
    assert torch.equal(whole[4:], torch.stack(list(training_batches(images, config(), 5, start=4))))
    assert torch.equal(whole[:2], torch.stack(list(training_batches(images, config(steps=2, workers=2), 5))))
    assert not torch.equal(whole[0], next(training_batches(images, config(), 6)))
    assert not list(training_batches(images, config(), 5, start=7))


def test_plain_batches_are_centre_crops_in_the_order_of_the_rows(images):
    (batch,) = training_batches(images, config(steps=1, flip=False, random_crop=False), 1)
    assert all(torch.equal(x, images[row]) for row, x in zip(batch_rows(40, 8, 1, 0), batch, strict=True))


def test_half_of_the_images_are_mirrored(images):
    plain, flipped = (
        torch.cat(list(training_batches(images, config(flip=flip, random_crop=False), 0))) for flip in (False, True)
    )
    same, mirrored = ((x == flipped).flatten(1).all(1) for x in (plain, plain.flip(3)))
    assert (same | mirrored).all() and 0.3 < (mirrored & ~same).float().mean() < 0.7


def test_an_unreadable_image_is_told_and_replaced(photos):
    (batch,) = training_batches(photos, config(steps=1, batch_size=7), seed=0)
    assert batch.shape == (7, 3, 16, 16) and sorted(photos.skipped) == ["train/4.png", "train/6.png"]
    assert photos.skipped["train/4.png"].startswith("train/4.png is not an image")
    assert {int(x[0, 0, 0]) for x in batch} == {0, 30, 60, 90, 150}
    for path in map(photos.encoded, range(7)):
        path.write_bytes(b"no image")
    with pytest.raises(ClipgenError, match="none of 7 images"):
        next(training_batches(open_images(photos.root, "train", 16), config(batch_size=7), seed=0))


def test_workers_stack_what_one_process_reads(photos):
    """Batches of several sizes by one loader, one of them without an image, with an unreadable file in another."""
    batches, found = [range(0, 3), [5, 4], [6], [1, 0]], []
    for workers in (0, 2):
        images = open_images(photos.root, "train", 16)
        found.append([(rows, squares.tolist()) for rows, squares in image_batches(images, batches, workers)])
        assert list(images.skipped) == ["train/4.png", "train/6.png"]
    assert found[0] == found[1] and [rows for rows, _ in found[0]] == [[0, 1, 2], [5], [], [1, 0]]


def test_what_was_left_out_is_told_after_a_pass(photos, capsys):
    assert [rows for rows, _ in ordered_batches(photos, range(7), 3)] == [[0, 1, 2], [3, 5]]
    (told,) = capsys.readouterr().err.splitlines()
    assert "2 files of" in told and "6.png is not an image" in told
    with pytest.raises(ClipgenError, match="none of 2 train images of .* could be read .*not an image"):
        list(ordered_batches(photos, [4, 6], 3))


def test_augmented_rows_are_a_function_of_seed_and_step(photos):
    before = torch.random.get_rng_state()
    rows, squares = augmented_rows(photos, np.arange(7), 1, 2, flip=True)
    assert rows.tolist() == [0, 1, 2, 3, 5] and squares.shape == (5, 3, 16, 16)
    assert torch.equal(squares, augmented_rows(photos, np.arange(7), 1, 2, flip=True)[1])
    assert torch.equal(before, torch.random.get_rng_state()) and len(photos.skipped) == 2
    with pytest.raises(ClipgenError, match="none of 2 images"):
        augmented_rows(photos, np.array([4, 6]), 1, 2, flip=True)


@pytest.mark.parametrize("fault, workers", [("missing", 0), ("missing", 1), ("a folder", 0), ("descriptors", 0)])
def test_a_read_that_fails_stops_and_leaves_nothing_out(photos, monkeypatch, fault, workers):
    """Bad bytes are left out; a file that was listed and cannot be read is no bad image, but is tried again for seconds."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if fault != "descriptors":
        photos.encoded(2).unlink()
    if fault == "a folder":
        photos.encoded(2).mkdir()
    with pytest.raises(ClipgenError, match="2.png cannot be read|Too many open files") as error:
        for rows, _ in ordered_batches(photos, range(7), 2, workers):
            if fault == "descriptors":
                assert rows == [0, 1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert "run the same command again" in str(error.value) and "Traceback" not in str(error.value)
    assert not photos.skipped and (workers or sum(waits) > 3)


def test_a_read_that_fails_for_a_moment_loses_nothing(photos):
    away = photos.root.with_name("away")
    photos.root.rename(away)
    threading.Timer(0.3, lambda: away.rename(photos.root)).start()
    assert [rows for rows, _ in ordered_batches(photos, range(7), 7)] == [[0, 1, 2, 3, 5]]


def test_a_set_travels_to_processes_that_are_not_forked(photos):
    assert torch.equal(pickle.loads(pickle.dumps(photos))[1], photos[1])


class Deadly:
    """An image set whose reading kills the process that reads, as a machine without memory does."""

    size, root, names, skipped = 16, "photos", ["a.png"], {}

    def __getitem__(self, row):
        os.kill(os.getpid(), 9)


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(ClipgenError, match="a process that reads images of photos was killed"):
        next(ordered_batches(Deadly(), [0], 1, workers=1))
