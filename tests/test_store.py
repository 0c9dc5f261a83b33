import copy
import errno
import itertools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Killed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipgen_lib.data.datasets import ImageSet, open_images
from clipgen_lib.data.images import crop, to_float
from clipgen_lib.runtime.runs import ClipgenError, Stopped
from clipgen_lib.store import TokenStore, encode_batch_size, extract, nearest


def test_rows_are_what_the_encoders_say(store, images, vqgan, clip):
    assert len(store) == store.n_unmirrored == 40 and store.meta["L"] == 64 and store.meta["D"] == clip.dim
    x, row = to_float(crop(images[7], 64))[None], np.array([7])
    assert torch.equal(store.tokens(row)[0], vqgan.encode(x).flatten())
    assert torch.allclose(store.embeds(row), clip.images(x), atol=2e-3)  # float16 on disk
    assert torch.allclose(store.embeds(slice(None)).norm(dim=1), torch.ones(40), atol=1e-6)
    assert torch.equal(store.tokens(slice(None))[[5, 3]], store.tokens(np.array([5, 3])))
    embeds = store.embeds(slice(None))
    assert torch.allclose(store.moments(), torch.stack([embeds.mean(0), embeds.std(0, correction=0)]), atol=1e-6)
    assert list(store.arrays["rows"]) == list(range(40)) and (store.folder / "tokens.u16").stat().st_size == 40 * 64 * 2
    assert {path.name for path in store.folder.iterdir()} == {"meta.json", "tokens.u16", "embeds.f16", "rows.i32"}


def test_nearest(store):
    embed = store.embeds(np.array([11]))[0]
    found, similarity = store.nearest(embed, 5), store.embeds(slice(None)) @ embed
    assert found[0] == 11 and len(found) == 5 and similarity[found[-1]] >= similarity.sort().values[-5] - 1e-6
    assert nearest(store.embeds(slice(0, 3)), embed[None], 5).shape == (1, 3)


def test_mirrored_rows_follow(images, vqgan, clip, tmp_path):
    store = extract(images, vqgan, clip, tmp_path / "flipped", flip=True)
    mirrored = to_float(crop(images[3], 64).flip(2))[None]
    assert len(store) == 80 and store.n_unmirrored == 40 and store.arrays["rows"][43] == 3
    assert torch.equal(store.tokens(np.array([43]))[0], vqgan.encode(mirrored).flatten())


def test_other_weights_and_other_images_are_refused(store, world, vqgan, clip):
    TokenStore.open(store.folder, vqgan, clip)
    with pytest.raises(ClipgenError, match="made from other images"):
        extract(open_images(world, "val"), vqgan, clip, store.folder)
    other = copy.deepcopy(vqgan)
    with torch.no_grad():
        other.quant_conv.bias += 1e-3
    for kind, weights in (("VQGAN", (other, clip)), ("CLIP", (None, SimpleNamespace(weights_hash="0" * 16)))):
        with pytest.raises(ClipgenError, match=f"is of another {kind}"):
            TokenStore.open(store.folder, *weights)


# ---------------------------------------------------------------------------------------------- interruptions


class Codes(torch.nn.Module):
    """A stand-in VQGAN, quick and different for every image, with batches of 4; `at_call` happens before that call."""

    config = SimpleNamespace(side=8, codebook_size=256, channels=64, image_size=64, patch=1)

    def __init__(self, at_call=0, happens=None):
        super().__init__()
        self.calls, self.at_call, self.happens = [], at_call, happens

    def encode(self, x):
        self.calls.append(len(x))
        if len(self.calls) == self.at_call:
            self.happens()
        return ((x[:, :, ::8, ::8].mean(1) + 1) * 127).long()


def embeds(weights_hash="1" * 16, dim=4):
    """A stand-in CLIP."""
    images = lambda x: torch.nn.functional.normalize(x[:, :, :32].mean((2, 3)).repeat(1, 2)[:, :4] + 1.01)
    facts = {"dim": dim, "device": torch.device("cpu"), "name": "stand-in", "weights_hash": weights_hash}
    return SimpleNamespace(**facts, images=images)


def kill():
    raise Killed


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def extracted(images, folder, codes=None):
    """The files of a store that the stand-ins make, with mirrored rows."""
    return contents(extract(images, codes or Codes(), embeds(), folder, flip=True).folder)


@pytest.fixture
def broken(images, tmp_path):
    """The images as a folder, one of which cannot be read."""
    for split in ("train", "val"):
        shutil.copytree(images.root / "train", tmp_path / "p" / split)
        os.truncate(tmp_path / "p" / split / "000000000030.png", 60)
    return open_images(tmp_path / "p", "train", 64)


@pytest.mark.parametrize("seconds", [0, 5])
@pytest.mark.parametrize("is_whole", [True, False])
def test_killed_and_started_again_it_is_the_same(images, broken, tmp_path, monkeypatch, is_whole, seconds):
    monkeypatch.setattr("clipgen_lib.store.SAVE_SECONDS", seconds)  # with 0 each batch is a chunk
    images = images if is_whole else broken
    whole = extracted(images, tmp_path / "whole")
    store = TokenStore.open(tmp_path / "whole")
    assert len(store) == 78 + 2 * is_whole and list(store.meta["skipped"]) == (
        [] if is_whole else ["train/000000000030.png"]
    )
    assert list(store.arrays["rows"]) == 2 * [row for row in range(40) if is_whole or row != 30]
    for at in (1, 2, 9, 20) if seconds else (9,):
        folder = tmp_path / f"killed-{at}"
        for again in (at, 2):  # twice, the second time in what the first has left
            with pytest.raises(Killed):
                extracted(images, folder, Codes(again, kill))
        assert not folder.exists()
        last, partial = Codes(), folder.with_name(f"{folder.name}.partial")
        assert extracted(images, folder, last) == whole and len(last.calls) == (20 if seconds else 11)
        assert not partial.exists()
        shutil.copytree(tmp_path / "whole", partial)  # as after a kill at the very end
        assert extracted(images, folder) == whole and not partial.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_batch_and_stops(broken, tmp_path, number):
    whole = extracted(broken, tmp_path / "whole")
    first, second = Codes(8, lambda: os.kill(os.getpid(), number)), Codes()
    with pytest.raises(Stopped, match="the same command resumes") as stopped:
        extracted(broken, tmp_path / "store", first)
    assert stopped.value.exit_code == 128 + number and len(first.calls) == 8
    assert extracted(broken, tmp_path / "store", second) == whole
    assert sum(first.calls) + sum(second.calls) == 78  # every image once


@pytest.mark.parametrize("of", ["the last chunk", "some chunks", "other weights"])
def test_what_lacks_is_encoded_again(images, tmp_path, monkeypatch, of):
    """A chunk that is cut short or gone, here and there, and all chunks of other weights."""
    monkeypatch.setattr("clipgen_lib.store.SAVE_SECONDS", 0)
    whole = extracted(images, tmp_path / "whole")
    clip, last = embeds(("2" if of == "other weights" else "1") * 16), Codes()
    with pytest.raises(Stopped):
        extracted(images, tmp_path / "store", Codes(15, lambda: os.kill(os.getpid(), signal.SIGINT)))
    chunks = sorted((tmp_path / "store.partial").glob("*.zip"))
    assert len(chunks) == 15
    for chunk in chunks[2:4] if of == "some chunks" else ():
        chunk.unlink()
    os.truncate(chunks[14], chunks[14].stat().st_size - 1)
    store = extract(images, last, clip, tmp_path / "store", flip=True)
    assert len(last.calls) == {"the last chunk": 6, "some chunks": 8, "other weights": 20}[of]
    assert store.meta["clip_hash"] == clip.weights_hash
    assert (contents(store.folder) == whole) == (of != "other weights")


def test_one_process_at_a_time_extracts(images, tmp_path):
    """A second one, started while the first is at work, is told so; the first one's store is whole."""
    folder, refused = tmp_path / "store", []

    def second():
        with pytest.raises(ClipgenError, match=f"token store is being made .* {os.getpid()} .*: wait for it") as error:
            extracted(images, folder)
        refused.append(error)

    assert extracted(images, folder, Codes(5, second)) == extracted(images, tmp_path / "whole") and len(refused) == 1


def test_a_read_error_ends_no_extraction_as_if_it_were_done(images, tmp_path):
    class FailingDisk(ImageSet):
        def __getitem__(self, row):
            if row >= 20:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().__getitem__(row)

    whole = extracted(images, tmp_path / "whole")
    failing = FailingDisk(images.name, images.split, images.root, images.names, images.size)
    with pytest.raises(ClipgenError, match="Input/output error"):
        extracted(failing, tmp_path / "store")
    assert not (tmp_path / "store").exists() and extracted(images, tmp_path / "store") == whole


def test_what_cannot_become_a_store_is_one_sentence(images_folder, images, tmp_path):
    with pytest.raises(ClipgenError, match="other files than a finished token store"):
        extracted(images, images_folder)
    assert len(list(images_folder.iterdir())) == 40
    with pytest.raises(ClipgenError, match=r"no room for .*store.partial \([.e+\d]+ GB are missing\): free some"):
        extract(images, Codes(), embeds(dim=2**44), tmp_path / "store")  # more than any disk has
    assert not (tmp_path / "store.partial").exists()
    for path in images_folder.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ClipgenError, match="none of the 24 images"):
        extracted(open_images(images_folder), tmp_path / "store")


AGAIN = ": delete its folder and extract again$"


@pytest.mark.parametrize("name", ["tokens.u16", "embeds.f16", "rows.i32"])
def test_damaged_stores_are_refused(images, tmp_path, name):
    path = extract(images, Codes(), embeds(), tmp_path / "store").folder / name
    whole, later = path.read_bytes(), itertools.count(path.stat().st_mtime + 1)
    one = whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
    for content in (one, bytes(len(whole)), whole[:-2] + b"\xff\x7f", whole + b"xx", whole[:100]):
        for written in (content, whole):
            path.write_bytes(written)
            os.utime(path, (next(later),) * 2)  # it is verified once for each state, and clocks tick slowly
            if written != whole:
                with pytest.raises(ClipgenError, match=f"damaged store .*hash differs.*{AGAIN}"):
                    TokenStore.open(path.parent)
        assert len(TokenStore.open(path.parent)) == 40


def test_what_is_no_store_is_one_sentence(images, tmp_path):
    def refused(sentence):
        with pytest.raises(ClipgenError, match=sentence):
            TokenStore.open(tmp_path / "store")

    refused("no finished token store")
    store = extract(images, Codes(), embeds(), tmp_path / "store", flip=True)
    tokens, meta = store.folder / "tokens.u16", store.folder / "meta.json"
    facts = [("N", 39), ("N", True), ("L", 10**400), ("L", "64"), ("D", 2.5), ("K", 10**7), ("flip", False)]
    for key, value in [*facts, ("skipped", []), ("hash", None), ("vqgan_hash", "0" * 16)]:
        meta.write_text(json.dumps({**store.meta, key: value}))
        refused(f"damaged .*{AGAIN}")
    meta.write_text(json.dumps(store.meta))
    tokens.unlink()
    refused(f"tokens.u16 is missing{AGAIN}")
    os.mkfifo(tokens)
    refused("damaged store")
    meta.write_text("{")
    refused(f"meta.json is not valid JSON .*{AGAIN}")


@pytest.mark.parametrize("side, patch, on_cpu, on_gpu", [(64, 1, 4, 256), (64, 4, 32, 256), (256, 4, 4, 16)])
def test_batches_fit_the_caches_or_the_gpu(side, patch, on_cpu, on_gpu):
    config = SimpleNamespace(channels=128, image_size=side, patch=patch)
    assert (encode_batch_size(config), encode_batch_size(config, "cuda")) == (on_cpu, on_gpu)


# ---------------------------------------------------------------------------------------------- any bytes


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_whatever_lies_in_a_store_is_one_sentence(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    meta = {"N": 3, "L": 2, "K": 9, "D": 2, "flip": False, "skipped": {}, "vqgan_hash": "x", "hash": "x"}
    odd = st.none() | st.booleans() | st.integers(-5, 5) | st.just(10**400) | st.text(max_size=3) | st.just([])
    meta |= data.draw(st.dictionaries(st.sampled_from(sorted(meta)), odd, max_size=2))
    content = json.dumps(meta).encode()
    content = data.draw(st.sampled_from([content, content, content[: len(content) // 2], b"[]", b"[" * 9_999, b"\xff"]))
    (folder / "meta.json").write_bytes(content)
    for name in ("tokens.u16", "embeds.f16", "rows.i32"):
        (folder / name).write_bytes(bytes(data.draw(st.sampled_from([12, 12, 12, 0, 5]))))
    with pytest.raises(ClipgenError) as error:
        TokenStore.open(folder)
    assert str(folder) in str(error.value) and len(str(error.value).replace(str(folder), "")) < 600
