"""Small worlds and models, made once; everything on the CPU."""

import atexit
import io
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["CLIPGEN_PROGRESS"] = "0"
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # each makes its own Shapes worlds: two at once would wait
    os.environ["CLIPGEN_DATA"] = tempfile.mkdtemp(prefix=f"clipgen-{worker}-")
    atexit.register(shutil.rmtree, os.environ["CLIPGEN_DATA"], ignore_errors=True)

from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import SampleConfig, ShapesConfig, load_preset
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.shapes import make_world
from clipgen_lib.store import extract
from clipgen_lib.text_to_image import TextToImage
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared():
    """Real photos beside the project; tests that need them say so where they are not."""
    if not (SHARED / "coco-mini").is_dir():
        pytest.skip("the real photos of shared/data are not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("shapes") / "world", n_train=40, n_val=12, seed=3)


@pytest.fixture(scope="module")
def images(world):
    return open_images(world, "train", 64, ShapesConfig())


@pytest.fixture
def images_folder(world, tmp_path):
    """A plain folder of 40 PNG images, without captions, that a test may change."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((world / "train").glob("*.png")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def clip():
    return ClipEmbedder.load("shapes")


@pytest.fixture(scope="session")
def preset():
    """The smoke preset, smaller still."""
    smoke = load_preset("smoke")
    few = {"steps": 6, "warmup": 2, "log_every": 2, "save_every": 3}
    codes = {"codebook_size": 32, "code_dim": 8, "l2_norm": True, "codebook_update": "gradient", "restart_after": 3}
    return replace(
        smoke,
        vqgan=replace(smoke.vqgan, channels=8, z_channels=16, **codes),
        vqgan_train=replace(smoke.vqgan_train, batch_size=4, **few),
        transformer=replace(smoke.transformer, width=32, layers=2, heads=2, condition_tokens=2),
        transformer_train=replace(smoke.transformer_train, batch_size=8, **few),
    )


@pytest.fixture(scope="module")
def vqgan(preset):
    torch.manual_seed(0)
    return VQGAN(preset.vqgan).eval().requires_grad_(False)


@pytest.fixture
def transformer(preset, clip):
    torch.manual_seed(1)
    model = ImageTransformer(preset.transformer, preset.vqgan.codebook_size, preset.vqgan.side**2, clip.dim)
    torch.nn.init.normal_(model.head.weight, std=0.5)  # a fresh head is all but uniform; here choices must matter
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def store(images, vqgan, clip, tmp_path_factory):
    """The token store of `images`: 40 rows."""
    return extract(images, vqgan, clip, tmp_path_factory.mktemp("store") / "store")


class StandIn(torch.nn.Module):
    """A fixed small network in place of Inception, with its interface: (B, 3, H, W) -> [(B, 12, 1, 1)]."""

    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.randn(12, 3, 5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return [torch.nn.functional.conv2d(x, self.kernel, stride=3).relu().mean((2, 3), keepdim=True)]


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


class Identity(torch.nn.Module):
    """A stand-in network for torchmetrics: what it is given are the features already."""

    def forward(self, x):
        return x


class Killed(BaseException):
    """Stands for a kill signal: nothing of ours catches it."""


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def assert_compiled_is_plain(train, warnings):
    """`train(compile)` returns a module of nearly the same weights either way, where torch.compile works."""
    modules = [train(compile) for compile in (False, True)]
    if any("does not work on this machine" in str(w.message) for w in warnings):
        pytest.skip("torch.compile does not work on this machine")
    a, b = (torch.cat([x.flatten().double() for x in module.state_dict().values()]) for module in modules)
    if torch.__version__.startswith(
        "2.6"
    ):  # its compiler rounds more; AdamW's first steps go by the sign of a gradient of 0
        assert ((a - b).abs() > 1e-3).double().mean() < 0.01 and (a - b).abs().max() < 0.02
    else:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.fixture
def generator(vqgan, transformer, clip):
    settings = SampleConfig(guidance=2.0, top_p=0.9)
    return TextToImage.from_parts(vqgan, transformer, clip, {"name": "shapes", "pretrained": None}, settings)


@pytest.fixture(scope="session")
def clipgen():
    """`clipgen(*arguments, results=...)`: the command in a process of its own; returns what `subprocess.run` returns."""

    def run(*arguments, results):
        command = [sys.executable, "-m", "clipgen_lib", *map(str, arguments)]
        environment = {**os.environ, "CLIPGEN_RESULTS": str(results)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def smoke_run(clipgen, tmp_path_factory):
    """The folder of a run `smoke` of preset smoke, made once by the notebooks 01 to 04, with a tracker."""
    results = tmp_path_factory.mktemp("results")
    done = clipgen("run", "--preset", "smoke", "--run", "smoke", "--tracker", "tensorboard", results=results)
    assert done.returncode == 0, done.stderr[-3000:]
    return results / "smoke"


def saved(image, kind, **options):
    """The bytes of a file of one image."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


class Faulty:
    """A store that calls `fault(n)` with the n-th batch, from 0; where that returns True the embeddings are NaN."""

    def __init__(self, store, fault):
        self.store, self.fault, self.count = store, fault, -1
        self.meta, self.tokens, self.moments = store.meta, store.tokens, store.moments

    def __len__(self):
        return len(self.store)

    def embeds(self, rows):
        self.count += 1
        return self.store.embeds(rows) * (float("nan") if self.fault(self.count) else 1.0)


@pytest.fixture
def two_classes(tmp_path):
    """Dark and bright noise in class folders, eight images each in train and val."""
    for split in ("train", "val"):
        for name, level in (("dark", 40), ("bright", 215)):
            (tmp_path / "classes" / split / name).mkdir(parents=True)
            for i in range(8):
                noise = np.random.default_rng([i, level, split == "val"]).integers(-30, 31, (64, 64, 3))
                image = Image.fromarray((level + noise).astype(np.uint8))
                image.save(tmp_path / "classes" / split / name / f"{i}.png")
    return tmp_path / "classes"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for runs in place of the project's results/; it is not there yet."""
    monkeypatch.setattr("clipgen_lib.runtime.runs.RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def class_folders(world, tmp_path):
    """`class_folders({"train/dog": 4, ...})`: a folder of such folders, each with so many images of the world."""

    def make(sizes):
        paths = iter(sorted((world / "train").glob("*.png")))
        for name, size in sizes.items():
            (tmp_path / "classes" / name).mkdir(parents=True)
            for path in islice(paths, size):
                shutil.copy(path, tmp_path / "classes" / name)
        return tmp_path / "classes"

    return make
