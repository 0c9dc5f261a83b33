import contextlib
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from clipgen_lib.data.datasets import open_images
from clipgen_lib.evaluate import open_folder
from clipgen_lib.metrics import passes
from clipgen_lib.metrics.features import FeatureNetwork
from clipgen_lib.metrics.passes import (
    CaptionFit,
    Change,
    Embeddings,
    FirstPictures,
    SetStatistics,
    StatisticsFile,
    measure,
)
from clipgen_lib.runtime.runs import ClipgenError, Stopped

SAME = Change("none", lambda x: x)


class StandIn(torch.nn.Module):
    """A fixed small network in the place of Inception that counts its calls; `fails_at` kills that call."""

    def __init__(self, fails_at=0):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.randn(10, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
        self.calls, self.fails_at = 0, fails_at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return torch.nn.functional.conv2d(x, self.kernel, stride=3).relu().mean((2, 3))


def statistics(module, radii=(0, 2), parts=2, head=True):
    head = torch.randn(7, 10, generator=torch.Generator().manual_seed(1)) if head else None
    return SetStatistics(FeatureNetwork("inception", module, "stand-in", "0", head), radii, parts)


def fill(sink, pictures):
    sink.add([], sink.find([], pictures))


def same_state(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_killed_and_started_again_it_is_the_same(world, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "SAVE_SECONDS", 0)
    images, texts = open_images(world, "train"), {i: f"a thing {i}" for i in range(0, 40, 3)}
    sinks = lambda module: {"s": statistics(module), "e": Embeddings(clip, range(5, 30)), "c": CaptionFit(clip, texts)}
    whole, parted = sinks(StandIn()), sinks(StandIn(fails_at=9))  # two calls a batch: in the fifth of seven
    measure(images, whole, SAME, 6, "", False, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measure(images, parted, SAME, 6, "", False, tmp_path / "parted")
    assert len(list((tmp_path / "parted").glob("partial-*"))) == 1
    again = sinks(module := StandIn())
    measure(images, again, SAME, 6, "", False, tmp_path / "parted")
    assert module.calls == 6 and not list((tmp_path / "parted").glob("partial-*"))
    assert all(same_state(whole[name].state(), again[name].state()) for name in whole)
    assert whole["s"].n == 40 and whole["c"].n == 14


def test_a_signal_saves_first(world, tmp_path):
    images, whole = open_images(world, "train"), statistics(StandIn())
    measure(images, {"s": whole}, SAME, 6, "", False, tmp_path / "whole")

    class Signalled(StandIn):
        def forward(self, x):
            if self.calls == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x)

    with pytest.raises(
        Stopped, match="stopped by SIGTERM after 4 of 7 batches .features.: what was done is kept"
    ) as stopped:
        measure(images, {"s": statistics(Signalled())}, SAME, 6, "features", False, tmp_path / "parted")
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    again = statistics(module := StandIn())
    measure(images, {"s": again}, SAME, 6, "features", False, tmp_path / "parted")
    assert module.calls == 6 and same_state(whole.state(), again.state())


def test_seen_before_is_read_and_the_same(world, tmp_path):
    images, first = open_images(world, "val"), statistics(StandIn())
    measure(images, {"s": first}, SAME, 5, "", False, tmp_path)
    module = StandIn()
    second = statistics(module)
    measure(images, {"s": second}, SAME, 7, "", False, tmp_path)
    assert module.calls == 0 and same_state(first.state(), second.state())
    other = statistics(module, radii=(0,))  # other facts, another change, other images: made anew
    measure(images, {"s": other}, SAME, 12, "", False, tmp_path)
    assert module.calls == 1
    measure(images, {"s": statistics(module)}, Change("darker", lambda x: x / 2 - 0.5), 12, "", False, tmp_path)
    measure(open_images(world, "train"), {"s": statistics(module)}, SAME, 40, "", False, tmp_path)
    assert module.calls == 5 and len(list(tmp_path.iterdir())) == 4


def test_kept_by_content_not_by_name(world, tmp_path):
    images = open_images(world, "val")
    for folder, brighter in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / folder).mkdir()
        for i, path in enumerate(images.paths):
            array = np.asarray(Image.open(path)).copy()
            array[0, 0, 0] ^= brighter * (i == 5)
            Image.fromarray(array).save(tmp_path / folder / f"{folder}{i:03}.png")
    calls = []
    for folder in "abc":
        module = StandIn()
        measure(open_folder(tmp_path / folder), {"s": statistics(module)}, SAME, 12, "", False, tmp_path / "kept")
        calls.append(module.calls)
    assert calls == [2, 0, 2]  # one level of one pixel is other content


def test_unreadable_files_are_known_from_the_cache_too(world, tmp_path):
    images = open_images(world, "val")
    for i, path in enumerate(images.paths):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes()[: 60 if i == 3 else None])
    for _ in range(2):
        folder, found = open_folder(tmp_path, 64), statistics(StandIn())
        measure(folder, {"s": found}, SAME, 4, "", False, tmp_path / "kept")
        assert found.n == 11 and list(folder.skipped) == ["3.png"]


def test_halves_are_every_other_picture():
    x = torch.rand(11, 3, 20, 20) * 2 - 1
    parted, first, second = statistics(StandIn()), statistics(StandIn(), parts=1), statistics(StandIn(), parts=1)
    for part in x.split(3):
        fill(parted, part)
    fill(first, x[::2])
    fill(second, x[1::2])
    assert parted.floor() == pytest.approx(first.distance(second), rel=1e-5)


def test_nan_pixels_are_an_error_not_black():
    x = torch.zeros(2, 3, 20, 20)
    x[1, 0, 3, 3] = torch.nan
    with pytest.raises(ClipgenError, match="NaN or infinite pixels"):
        fill(statistics(StandIn()), x)


def test_first_pictures():
    shown = FirstPictures(5)
    for part in torch.arange(9.0).view(9, 1, 1, 1).split(2):
        fill(shown, part)
    assert [float(x) for x in shown.pictures] == [0, 1, 2, 3, 4]


def test_statistics_of_pytorch_fid(tmp_path):
    mu, sigma = np.zeros(4), np.eye(4)
    np.savez_compressed(tmp_path / "good.npz", mu=mu, sigma=sigma)
    assert np.array_equal(StatisticsFile(tmp_path / "good.npz").moments(0)[1], sigma)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("mu")
    np.savez(tmp_path / "other.npz", mean=mu)
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=sigma)
    np.savez(tmp_path / "shape.npz", mu=mu, sigma=np.eye(5))
    np.savez(tmp_path / "nan.npz", mu=mu * np.nan, sigma=sigma)
    for name in ("short", "text", "other", "pickle", "shape", "nan", "absent"):
        with pytest.raises(ClipgenError, match=f"{name}.npz .*(make it again|check the path)"):
            StatisticsFile(tmp_path / f"{name}.npz")


def test_a_damaged_cache_is_made_again(images, tmp_path):
    found = []
    for damaged in (False, True):
        for path in tmp_path.glob("*.safetensors"):
            path.write_bytes(b"cut")
        module = StandIn()
        sink = statistics(module, (0,), 1)
        with pytest.warns(UserWarning, match="made again") if damaged else contextlib.nullcontext():
            measure(images, {"s": sink}, SAME, 16, "x", False, tmp_path)
        assert module.calls == 3
        found.append(sink.moments(0))
    assert (found[0][0] == found[1][0]).all() and (found[0][1] == found[1][1]).all()
