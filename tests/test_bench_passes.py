import os
from pathlib import Path

import pytest
import torch

from clipgen_lib import bench, bench_passes, timing
from clipgen_lib.bench_passes import encoded, evaluation, extraction, features, noise, photos, statistics
from clipgen_lib.data import ImageSet
from clipgen_lib.images import crop, to_float
from clipgen_lib.metrics import frechet_distance, spread_moments
from clipgen_lib.protocols import FeatureNetwork
from clipgen_lib.runs import ClipgenError
from clipgen_lib.store import disk_work, extract

CPU = torch.device("cpu")


def test_both_are_sections():
    assert bench.SECTIONS["extraction"] is extraction and bench.SECTIONS["evaluation"] is evaluation


def test_photos_are_as_large_as_asked_and_some_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_passes, "DISTINCT", 2)
    paths = photos(tmp_path / "p", 5, 48, 40)
    images = ImageSet("p", "train", tmp_path / "p", paths, 40)
    assert [tuple(images[i].shape) for i in range(5)] == 5 * [(3, 40, 48)]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])


def test_the_bare_encoders_give_what_the_store_holds(tmp_path, vqgan, clip):
    paths = photos(tmp_path / "p", 9, 80, 64)
    images = ImageSet("p", "train", tmp_path / "p", paths, 64)
    x = to_float(torch.stack([crop(images[i], 64) for i in range(9)]))
    store = extract(images, vqgan, clip, tmp_path / "store", batch_size=4, show_progress=False)
    tokens, embeds = encoded(vqgan, clip, x, 4)
    assert torch.equal(store.tokens(slice(None)), tokens.flatten(1))
    assert (store.arrays["embeds"][:] == embeds.numpy().astype("float16")).all()


def test_extraction_is_measured_and_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_passes.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(bench_passes, "SIZES", {"photos": (96, 72)})
    found = extraction(CPU, {}, 2, presets=("smoke",), pictures=12, batches=(4, 256), kinds=("photos",))
    assert not list(tmp_path.iterdir())
    (part,), (time, read, disk) = found["details"], found["table"]
    assert part["pictures"] == 12 and set(part["bare_by_batch"]) == {"4", "12"} and part["best"] in (4, 12)
    assert set(part["seconds"]) == {"bare", "extract", "read", "disk"} and part["batch_size"] == 64
    assert 0 < part["share_of_extraction"]["disk"] < 1 and 0 < sum(part["profile"].values()) <= 1.001
    assert part["pictures_per_second"]["bare"] == pytest.approx(12 / part["seconds"]["bare"]["median"])
    assert time["value"]["median"] > 0 and time["asked"] == 1.1 and time["most"] and "96x72" in time["what"]
    assert read["asked"] is None and disk["unit"] == "%" and 0 < disk["value"]["median"] < 1


def test_the_work_of_the_disk_is_done_and_taken_away(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def counted(number):
        synced.append(os.fstat(number).st_size)
        sync(number)

    monkeypatch.setattr(os, "fsync", counted)
    disk_work(tmp_path / "disk", torch.zeros(10, 4, dtype=torch.long), torch.zeros(10, 3))
    assert synced[:3] == [80, 60, 40] and not list(tmp_path.iterdir())


class StandIn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.nn.functional.conv2d(x, self.kernel, stride=3).relu().mean((2, 3))


def test_a_pass_sums_the_features_of_the_bare_network():
    network, x = FeatureNetwork("clip", StandIn(), "stand-in", "0"), noise(0, 30, CPU, 24)
    found, sink = features(network, x, 8, 2).double(), statistics(network, x, 8, (0, 1))
    mean, covariance = sink.moments(0)
    assert sink.n == 30 and torch.allclose(torch.from_numpy(mean), found.mean(0))
    assert torch.allclose(torch.from_numpy(covariance), found.T.cov())
    assert torch.equal(sink.sample.features().sort(0).values, found.float().sort(0).values)


def test_inception_without_its_weights_has_its_size(clip, monkeypatch, tmp_path):
    monkeypatch.setattr("clipgen_lib.protocols.hub_folder", lambda: tmp_path)
    network, name = bench_passes._inception(clip)
    assert name == "Inception (random weights)"
    assert network(noise(0, 1, CPU)).shape == (1, 2_048) and network.logits(torch.zeros(2, 2_048)).shape == (2, 1_008)


def test_evaluation_is_measured(clip, monkeypatch):
    monkeypatch.setattr(
        bench_passes, "_inception", lambda clip: (FeatureNetwork("inception", StandIn(), "", "0"), "a stand-in")
    )
    monkeypatch.setattr(bench_passes, "COUNTS", (50, 100))
    found = evaluation(CPU, {}, 2, dim=32, pictures=8, counts=(50, 100))
    peers = [line["peer"].split()[0] for line in found["table"]]
    assert peers == ["pytorch-fid", "its", "time", "time", "time", "own"]
    values = found["details"]["distance"]["values"]
    assert values["ours"] == pytest.approx(values["pytorch_fid"], rel=1e-6) == frechet_distance(*spread_moments(32))
    assert found["table"][1]["value"]["median"] == abs(values["ours"] / values["pytorch_fid"] - 1) < 1e-6
    assert all(timing.is_met(line) is not None and line["value"]["median"] >= 0 for line in found["table"][:5])
    assert set(found["details"]["memory"]) == {"50", "100"} and min(found["details"]["memory"].values()) > 50e6
    assert "features of the embedded CLIP, 5 radii of blur" in found["details"]


def test_evaluation_goes_without_pytorch_fid(monkeypatch):
    monkeypatch.setattr(bench_passes, "peers", lambda: {"pytorch-fid": timing.ABSENT})
    monkeypatch.setattr(
        bench_passes, "_inception", lambda clip: (FeatureNetwork("inception", StandIn(), "", "0"), "a stand-in")
    )
    monkeypatch.setattr(
        bench_passes.scale, "in_a_process", lambda what, n, device, module: {"own": 1_000_000 * int(n), "files": 0}
    )
    found = evaluation(CPU, {}, 1, pictures=4, counts=(500, 4_000))
    assert found["table"][0]["peer"] == "time of the bare forward" and "distance" not in found["details"]
    assert found["table"][-1]["value"]["median"] == pytest.approx(3.5) and not timing.is_met(found["table"][-1])


def test_the_process_that_is_measured_is_of_this_module():
    with pytest.raises(ClipgenError, match="process whose memory is measured has failed"):
        bench_passes.scale.in_a_process("no_such_function", module=bench_passes.__name__)
    assert Path(bench_passes.__file__).stem == bench_passes.__name__.rpartition(".")[2]
