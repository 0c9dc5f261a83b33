"""Small worlds and models, made once; everything on the CPU."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

os.environ["CLIPGEN_PROGRESS"] = "0"

from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import ShapesConfig, load_preset
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.shapes import make_world
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared():
    """Real photos beside the project; tests that need them say so where they are not."""
    if not (SHARED / "coco-mini").is_dir():
        pytest.skip("the real photos of shared/data are not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("shapes") / "world", n_train=40, n_val=12, seed=3)


@pytest.fixture
def images(world):
    return open_images(world, "train", 64, ShapesConfig())


@pytest.fixture(scope="session")
def clip():
    return ClipEmbedder.load("shapes")


@pytest.fixture(scope="session")
def preset():
    """The smoke preset, smaller still."""
    smoke = load_preset("smoke")
    return replace(
        smoke,
        vqgan=replace(
            smoke.vqgan,
            channels=8,
            z_channels=16,
            codebook_size=32,
            code_dim=8,
            l2_norm=True,
            codebook_update="gradient",
            restart_after=3,
        ),
        vqgan_train=replace(smoke.vqgan_train, steps=6, batch_size=4, warmup=2, log_every=2, save_every=3),
        transformer=replace(smoke.transformer, width=32, layers=2, heads=2, condition_tokens=2),
        transformer_train=replace(smoke.transformer_train, steps=6, batch_size=8, warmup=2, log_every=2, save_every=3),
    )


@pytest.fixture
def vqgan(preset):
    torch.manual_seed(0)
    return VQGAN(preset.vqgan).eval().requires_grad_(False)


@pytest.fixture
def transformer(preset, clip):
    torch.manual_seed(1)
    model = ImageTransformer(preset.transformer, preset.vqgan.codebook_size, preset.vqgan.side**2, clip.dim)
    torch.nn.init.normal_(model.head.weight, std=0.5)  # a fresh head is all but uniform; here choices must matter
    return model.eval().requires_grad_(False)
