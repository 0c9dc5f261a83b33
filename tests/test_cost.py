from dataclasses import replace

import pytest

from clipgen_lib.config import load_preset
from clipgen_lib.cost import STATE_BYTES, count, project


@pytest.fixture(scope="module")
def laptop():
    return load_preset("laptop")


@pytest.fixture(scope="module")
def counted(laptop):
    return count(laptop)


def test_operations_of_the_transformer_are_those_of_its_matrices(laptop, counted):
    """2 a weight and token forwards, 4 backwards, and attention's 2 x 2 T^2 E a layer forwards, all tokens with all."""
    model, length, codes, dim = laptop.transformer, laptop.vqgan.side**2, laptop.vqgan.codebook_size, 256
    block = 12 * model.width**2 * length + 2 * length**2 * model.width
    head, condition = model.width * codes * length, dim * model.width
    expected = 6 * (model.layers * block + head) + 4 * condition  # embeddings need no gradient
    assert counted["transformer"]["flops"] == pytest.approx(expected, rel=0.01)
    decode_and_two_passes = counted["sample"]["flops"]
    assert decode_and_two_passes > 2 / 3 * counted["transformer"]["flops"] * 0.99


def test_counts_follow_the_presets_fields(laptop, counted):
    shallow = count(replace(laptop, transformer=replace(laptop.transformer, layers=3)))
    assert shallow["vqgan"] == counted["vqgan"] and shallow["extract"] == counted["extract"]
    assert 0.45 < shallow["transformer"]["activation_bytes"] / counted["transformer"]["activation_bytes"] < 0.7
    checked = count(replace(laptop, transformer=replace(laptop.transformer, gradient_checkpointing=True)))
    assert checked["transformer"]["activation_bytes"] < 0.5 * counted["transformer"]["activation_bytes"]
    assert checked["transformer"]["flops"] > 1.2 * counted["transformer"]["flops"]


def test_projection_by_hand(laptop):
    counted = {
        "vqgan": {"flops": 1e9, "parameters": 1e6, "activation_bytes": 1e7},
        "extract": {"flops": 1e8, "embed_dim": 256},
        "transformer": {"flops": 2e9, "parameters": 2e6, "activation_bytes": 2e7},
        "sample": {"flops": 1e9},
    }
    training = replace(laptop.transformer_train, accumulate=2)
    found = project(replace(laptop, transformer_train=training), counted, 1_000, peak=1e12, gpus=2, share=0.5)
    assert found["hours"]["transformer"] == pytest.approx(8_000 * 32 * 2e9 / (1e12 * 0.5 * 2) / 3600)
    assert found["hours"]["extract"] == pytest.approx(2_000 * 1e8 / 1e12 / 3600)
    assert found["gpu_hours"] == pytest.approx(2 * sum(found["hours"].values()))
    assert found["gigabytes"]["transformer"] == pytest.approx((STATE_BYTES * 2e6 + 32 / 2 / 2 * 2e7) / 1e9)
    assert found["store_gigabytes"] == pytest.approx(2_000 * (2 * 64 + 2 * 256) / 1e9)
