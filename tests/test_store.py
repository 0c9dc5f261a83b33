import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clipgen_lib import store as store_module
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import crop, to_float
from clipgen_lib.runtime.runs import ClipgenError, Stopped
from clipgen_lib.store import TokenStore, extract, shard_span


@pytest.fixture
def store(images, vqgan, clip, tmp_path):
    return extract(images, vqgan, clip, tmp_path / "store", batch_size=16)


def test_rows_are_what_the_encoders_say(store, images, vqgan, clip):
    assert len(store) == 40 and store.meta["L"] == 64 and store.meta["D"] == clip.dim
    row = 7
    x = to_float(crop(images[row], 64))[None]
    assert torch.equal(store.tokens(np.array([row]))[0], vqgan.encode(x).flatten())
    assert torch.allclose(store.embeds(np.array([row])), clip.images(x), atol=2e-3)  # float16 on disk
    assert torch.allclose(store.embeds(slice(None)).norm(dim=1), torch.ones(40), atol=1e-6)
    assert list(store.arrays["rows"]) == list(range(40))


def test_flipped_rows_follow(images, vqgan, clip, tmp_path):
    store = extract(images, vqgan, clip, tmp_path / "flipped", flip=True, batch_size=16)
    mirrored = to_float(crop(images[3], 64).flip(2))[None]
    assert len(store) == 80 and store.arrays["rows"][43] == 3
    assert torch.equal(store.tokens(np.array([43]))[0], vqgan.encode(mirrored).flatten())


def test_other_weights_are_refused(store, vqgan, clip):
    TokenStore.open(store.folder, vqgan, clip)
    with torch.no_grad():
        vqgan.quant_conv.bias += 1e-3
    with pytest.raises(ClipgenError, match="made by another VQGAN"):
        TokenStore.open(store.folder, vqgan, clip)

    class Other:
        weights_hash = "0" * 16

    with pytest.raises(ClipgenError, match="made by another CLIP"):
        TokenStore.open(store.folder, clip=Other())


def test_other_pictures_are_refused(store, world, vqgan, clip):
    with pytest.raises(ClipgenError, match="made from other images"):
        extract(open_images(world, "val"), vqgan, clip, store.folder)


def test_damaged_stores_are_refused(store, tmp_path):
    with pytest.raises(ClipgenError, match="no finished token store"):
        TokenStore.open(tmp_path / "none")
    tokens = store.folder / "00000" / "tokens.u16"
    tokens.write_bytes(tokens.read_bytes() + b"xx")
    with pytest.raises(ClipgenError, match="damaged .00000/tokens.u16 has 5122 bytes, not 5120"):
        TokenStore.open(store.folder)
    tokens.write_bytes(tokens.read_bytes()[:100])
    with pytest.raises(ClipgenError, match="damaged .00000/tokens.u16 has 100 bytes"):
        TokenStore.open(store.folder)
    meta = json.loads((store.folder / "meta.json").read_text())
    del meta["L"]
    (store.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ClipgenError, match="damaged"):
        TokenStore.open(store.folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"N": -40},
        {"L": 10**400},
        {"L": "64"},
        {"D": 2.5},
        {"K": None},
        {"N": True},
        {"flip": None},
        {"skipped": []},
        {"data_hash": 1},
    ]
    + [{"shards": n} for n in ([39], [41, -1], ["40"], 40, [], [[40]])]
    + [{"N": 0, "shards": []}],
)
def test_a_store_of_other_facts_is_one_sentence(store, entries):
    meta = json.loads((store.folder / "meta.json").read_text())
    (store.folder / "meta.json").write_text(json.dumps({**meta, **entries}))
    with pytest.raises(ClipgenError, match="damaged .*: delete it and extract again$"):
        TokenStore.open(store.folder)
    for key in ("flip", "data_hash", "skipped", "D"):
        (store.folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != key}))
        with pytest.raises(ClipgenError, match="damaged"):
            TokenStore.open(store.folder)


# ---------------------------------------------------------------------------------------------- shards


class Encoders:
    """Stand-ins for both encoders: quick, and different for every image."""

    dim, device, name, weights_hash = 4, torch.device("cpu"), "stand-in", "1" * 16

    class Codes(torch.nn.Module):
        config = SimpleNamespace(side=8, codebook_size=256)

        def encode(self, x):
            return ((x[:, :, ::8, ::8].mean(1) + 1) * 127).long()

    def images(self, x):
        return torch.nn.functional.normalize(x[:, :, :32].mean((2, 3)).repeat(1, 2)[:, :4] + 1.01)


def made(images, folder, vqgan=None, clip=None, **settings):
    """A store of 40 images and their mirror images in shards of 24, the second of both kinds."""
    return extract(
        images,
        vqgan or Encoders.Codes(),
        clip or Encoders(),
        folder,
        True,
        4,
        show_progress=False,
        shard_rows=24,
        **settings,
    )


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_at_most_128_shards_of_whole_thousands():
    for n, shards in ((1, 1), (2_048, 1), (2_049, 2), (262_144, 128), (262_145, 65), (10_000_000, 126)):
        span = shard_span(n)
        assert span % 2_048 == 0 and -(-n // span) == shards <= 128


def test_shards_are_read_as_one(images, tmp_path):
    store, whole = (
        made(images, tmp_path / "parts"),
        extract(images, Encoders.Codes(), Encoders(), tmp_path / "whole", True),
    )
    assert store.meta["shards"] == [24, 24, 24, 8] and whole.meta["shards"] == [80]
    rows = np.random.default_rng(0).integers(0, 80, 300)
    for chosen in (
        rows,
        rows[:1],
        rows[:0],
        list(rows[:3]),
        slice(None),
        slice(20, 60),
        slice(70, 5, -7),
        slice(24, 48),
        slice(9, 9),
    ):
        assert torch.equal(store.tokens(chosen), whole.tokens(chosen)) and torch.equal(
            store.embeds(chosen), whole.embeds(chosen)
        )
    assert [int(row) for row in store.arrays["rows"]] == 2 * list(range(40)) and store.arrays["rows"][43] == 3
    assert torch.equal(store.mean_embed(), whole.mean_embed()) and store.n_unmirrored == 40
    for row in (-1, 80):
        with pytest.raises(IndexError):
            store.tokens(np.array([3, row]))


def test_a_store_without_shards_is_one(images, tmp_path):
    store = extract(images, Encoders.Codes(), Encoders(), tmp_path / "store")
    before = store.tokens(slice(None))
    for path in (store.folder / "00000").iterdir():
        path.rename(store.folder / path.name)
    meta = json.loads((store.folder / "meta.json").read_text())
    del meta["shards"]
    (store.folder / "meta.json").write_text(json.dumps(meta))
    assert torch.equal(TokenStore.open(store.folder).tokens(slice(None)), before)


def test_a_shard_cut_in_half_is_named(images, tmp_path):
    store = made(images, tmp_path / "store")
    path = store.folder / "00002" / "embeds.f16"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ClipgenError, match="damaged .00002/embeds.f16 has 96 bytes, not 192.: delete it and extract again"
    ):
        TokenStore.open(store.folder)
    path.unlink()
    with pytest.raises(ClipgenError, match="damaged .*00002/embeds.f16"):
        TokenStore.open(store.folder)


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch):
    """Kills at a moment by its number: before files reach the disk, before a state does, or before an image is encoded.

    `kill_at(None)` lives on; `kill_at.moments` says how many there were.
    """

    def chosen(number):
        chosen.number, chosen.moments = number, 0

    def deadly(real):
        def call(*arguments):
            chosen.moments += 1
            if chosen.moments == chosen.number:
                raise Killed
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", deadly(os.fsync))
    monkeypatch.setattr(store_module, "write_json", deadly(store_module.write_json))
    monkeypatch.setattr(Path, "rename", deadly(Path.rename))
    monkeypatch.setattr(Encoders.Codes, "encode", deadly(Encoders.Codes.encode))
    return chosen


@pytest.fixture
def broken(images, tmp_path):
    """The images as a folder, one of which cannot be read."""
    for split in ("train", "val"):
        (tmp_path / "p" / split).mkdir(parents=True)
        for row, path in enumerate(images.paths):
            content = path.read_bytes()
            (tmp_path / "p" / split / path.name).write_bytes(content[:60] if row == 30 else content)
    return open_images(tmp_path / "p", "train", 64)


def test_killed_at_any_moment_and_started_again_it_is_the_same(broken, tmp_path, kill_at, monkeypatch):
    monkeypatch.setattr(store_module, "SAVE_SECONDS", 0)
    kill_at(None)
    store = made(broken, tmp_path / "whole")
    whole, moments = contents(store.folder), kill_at.moments
    assert store.meta["shards"] == [24, 23, 23, 8] and list(store.meta["skipped"]) == ["train/000000000030.png"]
    assert moments > 60
    for moment in range(1, moments + 1, 5):
        folder = tmp_path / str(moment)
        for again in (moment, 2):  # twice, the second time in what the first has left
            kill_at(again)
            with pytest.raises(Killed):
                made(broken, folder)
        assert not folder.exists()
        kill_at(None)
        assert contents(made(broken, folder).folder) == whole, moment
        assert not folder.with_name(f"{moment}.partial").exists() and kill_at.moments <= moments


def test_what_a_kill_leaves_half_written_is_cleared(broken, tmp_path, kill_at):
    kill_at(None)
    whole = contents(made(broken, tmp_path / "whole").folder)
    kill_at(30)
    with pytest.raises(Killed):
        made(broken, tmp_path / "store")
    partial = tmp_path / "store.partial"
    (partial / ".meta.json.1").write_text("{")
    (partial / "00000" / ".shard.json.1").write_text("{")
    (partial / "tokens.u16").write_bytes(b"of a store without shards")
    (partial / "00000" / "rows.i32").write_bytes(b"cut")  # a finished shard, damaged
    (partial / "00099").mkdir()
    kill_at(None)
    assert contents(made(broken, tmp_path / "store").folder) == whole


def test_another_extraction_begins_anew(broken, tmp_path, kill_at):
    kill_at(30)
    with pytest.raises(Killed):
        made(broken, tmp_path / "store")
    kill_at(None)
    other = Encoders()
    other.weights_hash = "2" * 16
    assert made(broken, tmp_path / "store", clip=other).meta["clip_hash"] == "2" * 16
    shards = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("*/shard.json")]
    assert {shard["of"]["clip_hash"] for shard in shards} == {"2" * 16}


@pytest.mark.parametrize(
    "entries", [{"read": None}, {"rows": "4"}, {"rows": -1}, {"read": 10**9}, {"skipped": 5}, {"rows": 30}]
)
def test_a_state_that_is_none_begins_its_shard_anew(images, tmp_path, entries):
    wanted = contents(made(images, tmp_path / "whole").folder)
    (made(images, tmp_path / "store").folder).rename(tmp_path / "store.partial")
    (tmp_path / "store.partial" / "meta.json").unlink()
    path = tmp_path / "store.partial" / "00001" / "shard.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    assert contents(made(images, tmp_path / "store").folder) == wanted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_batch_and_stops(broken, tmp_path, number, monkeypatch):
    whole = contents(made(broken, tmp_path / "whole").folder)
    encode, calls = Encoders.Codes.encode, []

    def signalled(self, x):
        calls.append(len(x))
        if len(calls) == 8:  # in the second shard
            os.kill(os.getpid(), number)
        return encode(self, x)

    monkeypatch.setattr(Encoders.Codes, "encode", signalled)
    with pytest.raises(Stopped, match="the same command goes on") as stopped:
        made(broken, tmp_path / "store")
    assert stopped.value.exit_code == 128 + number and len(calls) == 8
    assert contents(made(broken, tmp_path / "store").folder) == whole
    assert sum(calls) == 78  # every image once


def test_a_full_disk_is_one_sentence(broken, tmp_path, monkeypatch):
    whole = contents(made(broken, tmp_path / "whole").folder)
    sync, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ClipgenError, match="no room for .*: free some, and the same command goes on"):
            made(broken, tmp_path / "store")
        patched.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
        with pytest.raises(ClipgenError, match=r"no room for .*store.partial \([.e\d-]+ GB are missing\)"):
            made(broken, tmp_path / "store")
    assert contents(made(broken, tmp_path / "store").folder) == whole


def test_interrupted_extraction_goes_on(store, images, vqgan, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SAVE_SECONDS", 0)
    real, asked = store_module.picture_batches, []

    def breaks(images, rows, workers):
        asked.append(rows)
        for number, batch in enumerate(real(images, rows, workers)):
            if number == 7 and len(asked) == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(store_module, "picture_batches", breaks)
    with pytest.raises(KeyboardInterrupt):
        extract(images, vqgan, clip, tmp_path / "again", batch_size=4)
    assert not (tmp_path / "again").exists()
    extract(images, vqgan, clip, tmp_path / "again", batch_size=4)
    assert asked[0] == [range(i, i + 4) for i in range(0, 40, 4)] and asked[1] == asked[0][7:]
    for name in ("tokens.u16", "rows.i32"):
        assert (tmp_path / "again" / "00000" / name).read_bytes() == (store.folder / "00000" / name).read_bytes()


def test_a_part_is_read_in_the_same_batches_wherever_it_was_left():
    """Of 10 images and their mirror images, positions 6 to 17: no batch across the mirror, and none that a halt moves."""
    whole = store_module._batches(range(6, 17), 0, 10, 3)
    assert whole == [range(6, 9), range(9, 10), range(10, 13), range(13, 16), range(16, 17)]
    for done in range(len(whole)):
        assert store_module._batches(range(6, 17), sum(map(len, whole[:done])), 10, 3) == whole[done:]
    assert store_module._batches(range(6, 17), 11, 10, 3) == []


def test_unreadable_pictures_have_no_row(tmp_path, world, vqgan, clip):
    from PIL import Image

    for i in range(6):
        (tmp_path / "p" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / "val").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(tmp_path / "p" / "train" / f"{i}.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "p" / "val" / "0.png")
    (tmp_path / "p" / "train" / "2.png").write_bytes(b"broken")
    store = extract(open_images(tmp_path / "p"), vqgan, clip, tmp_path / "store", batch_size=4)
    assert len(store) == 5 and list(store.arrays["rows"]) == [0, 1, 3, 4, 5]
    assert list(store.meta["skipped"]) == ["train/2.png"]
    assert (store.folder / "00000" / "tokens.u16").stat().st_size == 5 * 64 * 2


def test_nearest(store):
    embed = store.embeds(np.array([11]))[0]
    found = store.nearest(embed, 5)
    assert found[0] == 11 and len(found) == 5
    similarity = store.embeds(slice(None)) @ embed
    assert similarity[found[-1]] >= similarity.sort().values[-5] - 1e-6
