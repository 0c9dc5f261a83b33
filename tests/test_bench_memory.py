import dataclasses
import sys

import numpy as np
import pytest
import torch

from clipgen_lib import bench, bench_growth, bench_memory, bench_start, cost
from clipgen_lib.bench_growth import exponent, growth
from clipgen_lib.bench_memory import extrapolated, memory, peak_of, peak_while, points, reduced
from clipgen_lib.bench_start import started, startup
from clipgen_lib.config import load_preset
from clipgen_lib.runs import ClipgenError
from clipgen_lib.scale import in_a_pass, in_a_process
from clipgen_lib.timing import is_met

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------- start


def test_starts_are_of_fresh_processes_that_do_what_they_say(monkeypatch):
    assert started("-c", "import sys, clipgen_lib; print('torch' in sys.modules)") == "False\n"
    help_page = started("-m", "clipgen_lib", "--help")
    assert "Usage:" in help_page and "train-vqgan" in help_page and "bench" in help_page
    monkeypatch.setattr(bench_start, "FIRST_PICTURE", "import time; time.sleep(0.2)")  # the picture takes seconds
    found = startup(CPU, {}, rounds=1)
    seconds = {name: value["median"] for name, value in found["details"].items()}
    assert 0 < seconds["nothing"] < seconds["help"] and 0.2 < seconds["picture"] < seconds["nothing"] + 2
    assert [(line["asked"], line["most"], line["unit"]) for line in found["table"]] == [(0.1, True, "s"), (0.5, True, "s"), (5.0, True, "s")]  # fmt: skip
    assert found["table"][0]["value"]["median"] == max(0.0, seconds["import"] - seconds["nothing"])
    with pytest.raises(ClipgenError, match="has failed: ValueError: no"):
        started("-c", "raise ValueError('no')")


def test_the_first_picture_is_the_one_that_is_timed():
    load, _, draw = bench_start.FIRST_PICTURE.format(device="cpu").partition("; ")
    assert started("-c", f"{load}\nprint(({draw}).shape)") == "torch.Size([1, 1, 3, 64, 64])\n"


# ---------------------------------------------------------------------------------------------- memory


def print_known_peak(megabytes: str) -> None:
    """Hold a part of so many MB, and the rest of them for a moment: printed from a fresh process."""
    half = int(megabytes) * 500_000

    def action() -> None:
        held = torch.ones(half, dtype=torch.uint8)
        held.add(1)
        torch.ones(half // 2, dtype=torch.uint8)

    print(f'{{"bytes": {peak_while(action, CPU)}}}')


def test_a_known_allocation_is_measured(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    assert in_a_process("print_known_peak", 300, module=__name__)["bytes"] == pytest.approx(300e6, rel=0.1)


def test_a_line_or_a_plane_goes_through_what_is_linear():
    line = [(1, 0), (2, 0)]
    assert extrapolated(line, [7.0 + 3 * n for n, _ in line], (64, 0)) == pytest.approx(7 + 3 * 64)
    plane = [(1, 1), (2, 1), (2, 2)]
    assert extrapolated(plane, [5.0 + 0.06 * n + 0.8 * m for n, m in plane], (64, 8)) == pytest.approx(5 + 0.06 * 64 + 0.8 * 8)
    assert extrapolated([(16, 2)], [4.5], (16, 2)) == pytest.approx(4.5)


def test_small_passes_are_measured_whole_and_large_ones_at_fewer_pictures():
    laptop, coco = load_preset("laptop"), load_preset("coco")
    assert [points(laptop, stage, "cpu") for stage in ("vqgan", "transformer")] == [[(16, 0)], [(32, 0)]]
    assert points(load_preset("smoke"), "transformer", "cpu") == [(32, 2)]
    assert points(coco, "transformer", "cpu") == [(1, 1), (2, 1), (2, 2)] and points(coco, "vqgan", "cpu") == [(1, 0), (2, 0)]
    assert points(coco, "transformer", "cuda") == [(64, 8)] and points(coco, "vqgan", "cuda") == [(32, 0)]


def test_a_reduced_preset_is_the_preset_but_for_its_pictures():
    coco = load_preset("coco")
    small = reduced(coco, "transformer", 2, 1, on_cpu=True)
    assert small.transformer == coco.transformer and small.vqgan == coco.vqgan and small.clip == coco.clip
    train = small.transformer_train
    assert (train.batch_size, train.accumulate, train.embedding_share) == (4, 2, 0.5)  # the second pass finds gradients there
    whole = reduced(coco, "transformer", 64, 8, on_cpu=False)
    assert (whole.transformer_train.batch_size, whole.transformer_train.accumulate) == (256, 4)
    assert reduced(load_preset("laptop"), "sample", 3, 0, on_cpu=True).sample.batch_size == 3


def test_extrapolation_meets_what_is_measured_directly():
    """Of a laptop's extraction, of which both can be had."""
    few = [(64, 0), (128, 0)]
    peaks = [peak_of("laptop", "extract", point, CPU) for point in few]
    assert peaks[0] < peaks[1]
    assert extrapolated(few, peaks, (256, 0)) == pytest.approx(peak_of("laptop", "extract", (256, 0), CPU), rel=0.1)


def test_presets_of_one_size_are_measured_once(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_memory, "peak_of", lambda name, stage, point, device: asked.append((name, stage, point)) or 1e9 * sum(point))  # fmt: skip
    found = memory(CPU, {}, presets=("coco", "imagenet"), stages=("transformer",))
    assert found["same"] == {"imagenet": "coco"} and asked == [("coco", "transformer", p) for p in ((1, 1), (2, 1), (2, 2))]
    details = found["details"]["coco"]["transformer"]
    assert details["pictures"] == 64 and details["gigabytes"] == pytest.approx(72)
    run, counted = found["table"]
    assert run["what"] == "coco, imagenet: transformer, 64 pictures" and run["asked"] == counted["asked"] == 24.0
    assert run["value"]["median"] == pytest.approx(73) and not is_met(run), "with the driver's context"
    assert "extrapolated from 1 and 2 pictures" in run["peer"] and is_met(counted)
    lines = bench._lines("memory", {"machine": {"device": "x", "threads": 1, "load": 0.0, "load_after": 0.0, "peers": {}},
                                    "limits": dict.fromkeys(("matmul_float32", "matmul_bfloat16", "copy"), 1e9), **found})  # fmt: skip
    assert "73 GB" in lines and "at most 24 GB: not met" in lines


def test_what_is_counted_is_what_a_laptop_takes():
    """Within the pages of code that a process uses first in a step."""
    counted = cost.stage_gigabytes(load_preset("laptop"), "transformer", 32, "cpu")
    assert counted < peak_of("laptop", "transformer", (32, 0), CPU) / 1e9 < counted + 0.12


def test_storages_are_counted_where_they_are_most():
    with cost._imagined("cpu", autocast=False):
        x = torch.empty(1_000, 1_000)

        def call() -> torch.Tensor:
            y = x + 1  # 4 MB
            y = (y * 2).view(-1)  # 4 more, then the first are freed
            return y.add_(1)[:10] + 0

        assert cost._most_at_once(call) == 8_000_000
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and not torch.is_autocast_enabled("cpu")


def test_need_is_that_of_the_larger_training_where_there_is_no_embedding_loss():
    laptop = load_preset("laptop")
    stages = [cost.stage_gigabytes(laptop, stage, in_a_pass(laptop, "cpu")[stage]) for stage in ("vqgan", "transformer")]
    assert cost.need(laptop).device == pytest.approx(max(stages) + cost.CUDA_GIGABYTES)
    weighted = dataclasses.replace(
        laptop, transformer_train=dataclasses.replace(laptop.transformer_train, embedding_weight=1.0)
    )
    none, two, four = (cost.stage_gigabytes(weighted, "transformer", 32, decoded=n) for n in (0, 2, 4))
    assert (
        none == pytest.approx(stages[1]) and four - two > 0 and two - none > four - two
    )  # the frozen VQGAN comes with the first


# ---------------------------------------------------------------------------------------------- growth


def test_the_exponent_of_a_power_law_is_found():
    x = (64, 128, 256, 512)
    assert exponent(x, [3e-4 * n**1.7 for n in x]) == pytest.approx(1.7)
    assert exponent(x, [2.0] * 4) == pytest.approx(0)


def test_curves_are_measured_and_what_is_flat_is_told_apart():
    found = growth(CPU, {}, 1, {"batch": (1, 8), "length": (16, 64)}, stores=(3_000, 5_000), sets=(1_000, 4_000))
    details = found["details"]
    assert details["batch"]["x"] == [1, 8] and details["length"]["x"] == [16, 64]
    for name in ("batch", "length"):
        assert all(0 < v["least"] <= v["median"] for kind in ("train", "sample") for v in details[name][kind])
    assert details["store"]["shards"] == [2, 3] and details["store"]["memory"][0]["median"] > 50e6
    goals = {line["what"]: line["asked"] for line in found["table"]}
    assert goals["a training step over batch"] is None and goals["Frechet distance after N pictures"] == 1.5
    assert sum(asked == 1.5 for asked in goals.values()) == 4 and all(
        np.isfinite(line["value"]["median"]) for line in found["table"]
    )


def test_steps_of_the_curves_have_their_sizes():
    step = bench_growth.training(3, 12, 256, CPU)
    transformer = step.__closure__[[*step.__code__.co_freevars].index("transformer")].cell_contents
    before = transformer.head.weight.clone()
    step()
    assert (transformer.n_tokens, transformer.config.width, transformer.config.heads) == (12, 256, 4)
    assert not torch.equal(before, transformer.head.weight)
    assert bench_growth.sampling(3, 12, 128, CPU)().shape == (3, 12)
