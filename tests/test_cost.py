import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from clipgen_lib.cli import main
from clipgen_lib.config import load_preset
from clipgen_lib.cost import COCO, count, data_set_of, lines_of, measured_decoding, measured_share, need, project
from clipgen_lib.data.images import to_float
from clipgen_lib.sample import generate


@pytest.fixture(scope="module")
def laptop():
    return load_preset("laptop")


def test_operations_of_the_transformer_are_those_of_its_matrices(laptop):
    """2 for each weight and token forwards, 4 backwards, and attention's 2 x 2 T^2 E a layer forwards."""
    model, length, codes, dim = laptop.transformer, laptop.vqgan.side**2, laptop.vqgan.codebook_size, 256
    block = 12 * model.width**2 * length + 2 * length**2 * model.width
    head, condition = model.width * codes * length, dim * model.width
    expected = 6 * (model.layers * block + head) + 4 * condition  # embeddings need no gradient
    assert count(laptop)["transformer"] == pytest.approx(expected, rel=0.01)


def test_operations_are_those_of_real_networks(laptop, clip, vqgan, transformer, monkeypatch):
    """What is counted on networks without content is what real ones do."""
    monkeypatch.setattr(
        "clipgen_lib.runtime.kernels.packs", lambda weight: False
    )  # packed layers are unknown to torch's counter
    small = replace(laptop, vqgan=vqgan.config, transformer=transformer.config)
    images = to_float(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter:
        vqgan.encode(images), clip.images(images)
    assert counter.get_total_flops() == pytest.approx(count(small)["extract"], rel=1e-3)
    embeds = clip.images(images)
    with FlopCounterMode(display=False) as counter:
        tokens = generate(transformer, embeds, [0], replace(small.sample, guidance=2.0))
        vqgan.decode(tokens.view(1, 8, 8))
    assert counter.get_total_flops() == pytest.approx(
        count(small)["sample"], rel=0.1
    )  # a cache skips half of attention


def test_counts_follow_the_presets_fields(laptop):
    shallow = count(replace(laptop, transformer=replace(laptop.transformer, layers=3)))
    assert shallow["vqgan"] == count(laptop)["vqgan"] and shallow["extract"] == count(laptop)["extract"]
    assert 0.5 < shallow["transformer"] / count(laptop)["transformer"] < 0.6
    checked = count(replace(laptop, transformer=replace(laptop.transformer, gradient_checkpointing=True)))
    assert 1.2 < checked["transformer"] / count(laptop)["transformer"] < 1.34
    unguided = count(replace(laptop, sample=replace(laptop.sample, guidance=1.0)))
    assert unguided["sample"] < 0.7 * count(laptop)["sample"]


def test_the_embedding_loss_is_counted_on_its_share_of_the_batch(laptop, vqgan, clip):
    def counted(**changed):
        return count(replace(laptop, transformer_train=replace(laptop.transformer_train, **changed)))["transformer"]

    plain = counted(embedding_weight=0.0)
    one, two = (counted(embedding_weight=1.0, embedding_share=share) - plain for share in (1 / 32, 2 / 32))
    assert (
        two == pytest.approx(2 * one) and counted(embedding_weight=1.0, embedding_share=0.0) - plain == one
    )  # at least a row
    codes = torch.zeros(1, vqgan.config.code_dim, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        clip.images(vqgan.decode_codes(codes)).sum().backward()
    small = replace(laptop, vqgan=vqgan.config, transformer=replace(laptop.transformer, layers=1))
    trained = replace(laptop.transformer_train, embedding_weight=1.0, embedding_share=1.0)
    whole, none = (
        count(replace(small, transformer_train=replace(trained, embedding_weight=w)))["transformer"] for w in (1.0, 0.0)
    )
    assert whole - none == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_projection_by_hand(laptop):
    operations, found = count(laptop), project(laptop, 1_000, peak=1e12, gpus=2, share=0.5, decoded=100.0)
    waited = 8_000 * 2 * 1 / 2 * 4 * need(laptop).transformer / 450e9 / 3600
    assert found["communication"]["transformer"] == pytest.approx(waited) and waited > 0
    assert found["hours"]["transformer"] == pytest.approx(8_000 * 32 * operations["transformer"] / 1e12 / 3600 + waited)
    assert found["efficiency"]["transformer"] == pytest.approx(1 - waited / found["hours"]["transformer"])
    assert found["hours"]["extract"] == pytest.approx(2_000 * operations["extract"] / 1e12 / 3600)
    assert found["gpu_hours"] == pytest.approx(2 * sum(found["hours"].values()))
    assert found["store_gigabytes"] == pytest.approx(2_000 * (2 * 64 + 2 * 256) / 1e9)
    assert found["batch"] == {"vqgan": 8, "transformer": 16} and found["notes"] == []
    assert found["pictures_per_second"]["extract"] == pytest.approx(0.5e12 / operations["extract"])
    assert found["cores"]["vqgan"] == pytest.approx(3_500 * 8 / (3600 * found["hours"]["vqgan"]) / 100)
    lines = lines_of([found])
    assert "laptop, 1,000 images, 50% of 1 TFLOP/s" in lines and "(assumed, not measured)" in lines
    assert "at 100 JPEGs/s a core (measured)" in lines and "images beside it" in lines


def test_one_gpu_waits_for_nobody_and_nodes_wait_longest(laptop):
    one, eight, nine = (project(laptop, 1_000, 1e15, gpus, 0.5) for gpus in (1, 8, 9))
    assert one["communication"] == {"vqgan": 0, "transformer": 0} and one["efficiency"]["all"] == pytest.approx(1)
    step = 8_000 * 4 * need(laptop).transformer / 3600
    assert eight["communication"]["transformer"] == pytest.approx(2 * 7 / 8 * step / 450e9)
    assert nine["communication"]["transformer"] == pytest.approx(2 * 8 / 9 * step / 50e9)
    assert eight["efficiency"]["all"] > nine["efficiency"]["all"] and one["cores"] is None


def test_batches_that_do_not_divide_are_told_and_paid(laptop):
    coco = load_preset("coco")
    whole, uneven = project(coco, COCO.images, 1e15, 64), project(coco, COCO.images, 1e15, 48)
    assert whole["notes"] == ["64 GPUs: set accumulate of vqgan_train to 1, not 2: each GPU has 1 of its batch"]
    assert uneven["notes"][0] == "48 GPUs: batch_size 64 of vqgan_train does not divide, taken as 96, 2 on each"
    worked = uneven["hours"]["vqgan"] - uneven["communication"]["vqgan"]
    assert worked == pytest.approx(250_000 * 2 * count(coco)["vqgan"] / 4e14 / 3600)
    assert project(coco, COCO.images, 1e15, 128)["batch"]["vqgan"] == 1  # the smallest there is
    assert whole["picture_gigabytes"] == 18 and "18 GB of images (cocodataset.org" in lines_of([whole])
    assert whole["ram_gigabytes"] == pytest.approx(need(coco, 64).ram / 8)  # of a node


def test_a_measured_share_takes_the_place_of_the_assumed_one(laptop, tmp_path):
    assert measured_share(tmp_path / "gpu.json", "laptop", 1e12) is None and measured_decoding(tmp_path, 64) == 0
    stages = {stage: {"operations_per_second": n * 1e11} for n, stage in enumerate(count(laptop), start=1)}
    jpeg = {"size": 64, "pictures_per_second": {"median": 120.0}}
    (tmp_path / "cpu.json").write_text(
        json.dumps({"laptop": {"jpeg": {"size": 64, "pictures_per_second": {"median": 80.0}}}})
    )
    assert measured_decoding(tmp_path, 64) == 80 and measured_decoding(tmp_path, 256) == 0
    (tmp_path / "gpu.json").write_text(json.dumps({"laptop": {"stages": stages, "jpeg": jpeg}}))
    share = measured_share(tmp_path / "gpu.json", "laptop", 1e12)
    assert share == {"vqgan": 0.1, "extract": 0.2, "transformer": pytest.approx(0.3), "sample": 0.4}
    assert measured_share(tmp_path / "gpu.json", "coco", 1e12) is None and measured_decoding(tmp_path, 64) == 120
    found = project(laptop, 1_000, 1e12, 1, share)
    assert found["hours"]["extract"] == pytest.approx(2_000 * count(laptop)["extract"] / 2e11 / 3600)
    assert "10% in vqgan, 20% in extract" in lines_of([found]) and "assumed, not measured" not in lines_of([found])


def test_the_command_counts_on_the_preset_s_own_data(tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen_lib.runtime.runs.RESULTS", tmp_path)
    done = CliRunner().invoke(main, ["cost", "laptop", "--gpus", "1", "-o", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())[0]
    assert done.exit_code == 0 and (found["images"], found["share"], found["decoded"]) == (COCO.images, 0.4, 0)
    assert "40% of 989 TFLOP/s" in done.output and data_set_of("imagenet").images == 1_281_167
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = CliRunner().invoke(main, ["scale"])
    assert refused.exit_code == 1 and "start it without accelerate launch or torchrun" in refused.output
