import json

import numpy as np
import pytest
import torch

from clipgen_lib import store as store_module
from clipgen_lib.data import open_images
from clipgen_lib.images import crop, to_float
from clipgen_lib.runs import ClipgenError
from clipgen_lib.store import TokenStore, extract


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
    with pytest.raises(ClipgenError, match="made from other pictures"):
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


def test_interrupted_extraction_goes_on(store, images, vqgan, clip, tmp_path, monkeypatch):
    real, calls = store_module.ordered_batches, []

    def breaks(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        yield from real(*args)

    monkeypatch.setattr(store_module, "ordered_batches", breaks)
    with pytest.raises(KeyboardInterrupt):  # rounds of 16 batches of 1: the third round never comes
        extract(images, vqgan, clip, tmp_path / "again", batch_size=1)
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(store_module, "ordered_batches", lambda *a: (calls.append(a), real(*a))[1])
    extract(images, vqgan, clip, tmp_path / "again", batch_size=1)
    assert len(calls) == 3 and calls[2][1] == range(32, 40)
    for name in ("tokens.u16", "rows.i32"):
        assert (tmp_path / "again" / "00000" / name).read_bytes() == (store.folder / "00000" / name).read_bytes()


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
