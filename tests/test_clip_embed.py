import json
import math
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import ClipTrainConfig
from clipgen_lib.data import shapes
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import from_arrays, to_float
from clipgen_lib.runtime.checkpoints import load_checkpoint
from clipgen_lib.runtime.runs import DATA, ClipgenError, open_run
from clipgen_lib.study.train_clip import (
    ImagePairs,
    ScenePairs,
    caption_accuracy,
    contrastive_loss,
    pool_scene,
    retrieval,
    train_clip,
)

EMBEDDED = DATA / "shapes_clip"


def test_unit_norm_and_shape(clip):
    images, texts = clip.images(torch.rand(3, 3, 64, 64) * 2 - 1), clip.texts(["a red circle", "a star"])
    assert (
        images.shape == (3, clip.dim) and texts.shape == (2, clip.dim) and images.dtype == texts.dtype == torch.float32
    )
    for embeds in (images, texts):
        assert torch.allclose(embeds.norm(dim=1), torch.ones(len(embeds)), atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (150, 100), (40, 90), (301, 203)])
def test_preprocessing_is_that_of_open_clip(clip, size):
    """Against the model's own transform, which works on 8-bit PIL images: equal up to its rounding."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        size, Image.BICUBIC
    )
    wanted = image_transform_v2(PreprocessCfg(**clip.model.visual.preprocess_cfg), is_train=False)(picture)
    ours = clip.preprocess(from_arrays(np.asarray(picture)[None]))[0]
    assert ours.shape == wanted.shape == (3, 64, 64)
    assert (ours - wanted).abs().max() * clip.std.min() < 2.1 / 255  # bicubic in 8 bits rounds twice


def test_same_embedding_as_open_clip_itself(clip):
    model = open_clip.create_model(f"local-dir:{EMBEDDED}").eval()
    images = from_arrays(np.stack([shapes.render(shapes.scene_at(5, i)) for i in range(4)]))
    with torch.no_grad():
        wanted = model.encode_image(((images + 1) / 2 - clip.mean) / clip.std, normalize=True)
    assert torch.allclose(clip.images(images), wanted, atol=1e-5)


def test_gradients_reach_pictures_and_not_weights(clip):
    images = torch.zeros(1, 3, 80, 64, requires_grad=True)
    clip.images(images)[0, 0].backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in clip.parameters())


def test_it_knows_shapes(clip):
    """Far under what it was trained to, far over chance: a broken file, tokenizer or resize would fail here."""
    assert retrieval(clip, 200, n_objects=1)["true_at_1"] > 0.6


def test_embedded_weights_are_small_and_half():
    assert (EMBEDDED / "open_clip_model.safetensors").stat().st_size < 12.5e6


def test_long_texts_are_noticed(clip):
    assert not clip.is_truncated("a small red circle left of a large blue star")
    assert clip.is_truncated("a small red circle " * 20)
    assert clip.texts(["a small red circle " * 20]).shape == (1, clip.dim)


def test_missing_and_wrong_models(tmp_path, monkeypatch):
    with pytest.raises(ClipgenError, match="needs `pretrained`"):
        ClipEmbedder.load("ViT-B-32")
    with pytest.raises(ClipgenError, match="cannot be loaded"):
        ClipEmbedder.load("no-such-model", "openai")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipgenError, match="open_clip_model.safetensors is missing"):
        ClipEmbedder.load(str(tmp_path / "empty"))
    cut = tmp_path / "cut"
    shutil.copytree(EMBEDDED, cut)
    (cut / "open_clip_model.safetensors").write_bytes((EMBEDDED / "open_clip_model.safetensors").read_bytes()[:5000])
    with pytest.raises(ClipgenError, match="cannot be loaded"):
        ClipEmbedder.load(str(cut))
    bare = tmp_path / "bare"  # without its merges open_clip takes its own tokenizer of 49,408 words
    shutil.copytree(EMBEDDED, bare, ignore=shutil.ignore_patterns("*.gz"))
    with pytest.raises(ClipgenError, match="49408 words, its text tower"):
        ClipEmbedder.load(str(bare))


def test_a_quickgelu_mismatch_is_an_error(tmp_path, monkeypatch):
    """open_clip only warns when OpenAI's weights meet the model without QuickGELU."""
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *a, **k: str(tmp_path / "none.pt"))
    with pytest.raises(ClipgenError, match="quickgelu"):
        ClipEmbedder.load("ViT-B-32", "openai")


def test_local_checkpoint_file_of_a_known_architecture(tmp_path):
    """An open_clip name with a checkpoint file, the way real weights are used offline."""
    config = json.loads((EMBEDDED / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(EMBEDDED / "bpe_merges.txt.gz")}
    (tmp_path / "tiny-shapes.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    embedder = ClipEmbedder.load("tiny-shapes", str(EMBEDDED / "open_clip_model.safetensors"))
    images = torch.rand(2, 3, 64, 64)
    weights = {
        k: v for k, v in ClipEmbedder.load("shapes").model.state_dict().items() if k == "visual.attnpool.q_proj.weight"
    }
    assert all(torch.equal(embedder.model.state_dict()[k], v) for k, v in weights.items())
    assert embedder.images(images).shape == (2, 256) and embedder.name.startswith("tiny-shapes/")


def test_twins_exchange_places():
    twins = readable = 0
    for index in range(0, 200, 2):
        a, b = pool_scene(0, index), pool_scene(0, index + 1)
        if len(a.objects) == 2:
            twins += 1
            said = {(t.shape, t.colour): (t.x, t.y) for t in a.objects}
            swapped = {(t.shape, t.colour): (t.x, t.y) for t in b.objects}
            assert said.keys() == swapped.keys() and all(said[k] != swapped[k] for k in said)
            assert (
                shapes.relation(*a.objects) != shapes.relation(*b.objects) or a.objects[0].shape != b.objects[0].shape
            )
            read = shapes.read_scene(shapes.render(b))
            readable += {(t.shape, t.colour) for t in read} == said.keys()
    assert twins > 20 and readable >= 0.95 * twins  # corners of two like-coloured objects may touch


SMALL = ClipTrainConfig(scenes=64, steps=2, batch_size=16, warmup=1, log_every=1, save_every=1)


def test_a_clip_loss_that_is_not_finite_changes_no_weight(tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen_lib.study.train_clip.contrastive_loss", lambda images, *_: images.sum() * float("nan"))
    with pytest.raises(ClipgenError, match="not finite at 2 steps in a row before step 2"):
        train_clip(open_run("r", tmp_path), ScenePairs(SMALL, 0), SMALL, seed=0, show_progress=False)
    state, _ = load_checkpoint(tmp_path / "r" / "checkpoints" / "clip-00000001.safetensors")
    assert all(torch.isfinite(x).all() for x in state["model"].values())


def test_contrastive_loss_is_that_of_open_clip():
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    scale = torch.tensor(20.0)
    ours = contrastive_loss(images, texts, scale, torch.eye(6))
    torch.testing.assert_close(ours, open_clip.ClipLoss()(images, texts, scale))
    # two images of one wording share their probability, so that the best that can be reached is its entropy
    same, perfect = torch.block_diag(torch.ones(2, 2), torch.eye(4)), torch.block_diag(torch.ones(2, 1), torch.eye(4))
    assert contrastive_loss(perfect, perfect, torch.tensor(50.0), same).item() == pytest.approx(
        2 * math.log(2) / 6, abs=1e-5
    )


def test_clip_learns_from_pictures_with_class_names(tmp_path):
    """Two classes that any network can tell: after a few steps the words fit the images."""
    for split in ("train", "val"):
        for name, colour in (("night", 20), ("day", 235)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(8):
                noise = np.random.default_rng([i, colour]).integers(-15, 16, (64, 64, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(tmp_path / "data" / split / name / f"{i}.png")
    train, val = (open_images(tmp_path / "data", split, 64) for split in ("train", "val"))
    config = replace(SMALL, steps=24, lr=1e-3, warmup=2, bfloat16=False)
    pairs = ImagePairs(train, config, 0)
    images, texts, together = pairs.batch(3)
    assert (
        images.shape == (16, 3, 64, 64)
        and together.sum() == 128
        and set(texts) == {"a photo of a day", "a photo of a night"}
    )
    renamed = ImagePairs(train, config, 0)
    train._captions = [("one",) for _ in train.captions]
    assert ImagePairs(train, config, 0).hash != renamed.hash  # a checkpoint of other captions is refused
    train._captions = [(f"a photo of a {name}",) for name in train.classes]
    assert torch.equal(images, pairs.batch(3)[0]) and not torch.equal(images, pairs.batch(4)[0])
    folder = train_clip(open_run("r", tmp_path), pairs, config, seed=0, show_progress=False)
    clip = ClipEmbedder.load(str(folder))
    pictures = clip.images(to_float(torch.stack([val[row] for row in range(16)])))
    cosine = (pictures * clip.texts([texts[0] for texts in val.captions])).sum(1).mean().item()
    found = caption_accuracy(clip, val)
    assert found.pop("cosine") == pytest.approx(cosine, abs=1e-5) and found == {"n": 16, "wordings": 2, "accuracy": 1.0}


def test_clip_needs_pairs(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "data" / f"{i}.png")
    with pytest.raises(ClipgenError, match="has no captions"):
        ImagePairs(open_images(tmp_path / "data", "train", 8), SMALL, 0)
