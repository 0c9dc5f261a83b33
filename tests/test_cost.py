from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipgen_lib.config import load_preset
from clipgen_lib.cost import count, lines_of, project
from clipgen_lib.images import to_float
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


def test_operations_are_those_of_real_networks(laptop, clip, vqgan, transformer):
    """What is counted on networks without content is what real ones do."""
    small = replace(laptop, vqgan=vqgan.config, transformer=transformer.config)
    images = to_float(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter:
        vqgan.encode(images), clip.images(images)
    assert counter.get_total_flops() == pytest.approx(count(small)["extract"], rel=1e-3)
    embeds = clip.images(images)
    with FlopCounterMode(display=False) as counter:
        tokens = generate(transformer, embeds, [0], replace(small.sample, guidance=2.0))
        vqgan.decode(tokens.view(1, 8, 8))
    assert counter.get_total_flops() == pytest.approx(count(small)["sample"], rel=0.1)  # a cache skips half of attention


def test_counts_follow_the_presets_fields(laptop):
    shallow = count(replace(laptop, transformer=replace(laptop.transformer, layers=3)))
    assert shallow["vqgan"] == count(laptop)["vqgan"] and shallow["extract"] == count(laptop)["extract"]
    assert 0.5 < shallow["transformer"] / count(laptop)["transformer"] < 0.6
    checked = count(replace(laptop, transformer=replace(laptop.transformer, gradient_checkpointing=True)))
    assert 1.2 < checked["transformer"] / count(laptop)["transformer"] < 1.34
    unguided = count(replace(laptop, sample=replace(laptop.sample, guidance=1.0)))
    assert unguided["sample"] < 0.7 * count(laptop)["sample"]


def test_projection_by_hand(laptop):
    operations, found = count(laptop), project(laptop, 1_000, peak=1e12, gpus=2, share=0.5)
    assert found["hours"]["transformer"] == pytest.approx(8_000 * 32 * operations["transformer"] / 1e12 / 3600)
    assert found["hours"]["extract"] == pytest.approx(2_000 * operations["extract"] / 1e12 / 3600)
    assert found["gpu_hours"] == pytest.approx(2 * sum(found["hours"].values()))
    assert found["store_gigabytes"] == pytest.approx(2_000 * (2 * 64 + 2 * 256) / 1e9)
    assert "laptop, 1,000 pictures, 50% of 1 TFLOP/s" in lines_of([found])
