import math
from dataclasses import replace

import open_clip
import pytest
import torch

from clipgen_lib.clip_embed import ClipEmbedder
from clipgen_lib.config import ClipTrainConfig
from clipgen_lib.data import shapes
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import to_float
from clipgen_lib.metrics.features import efficientnet_lite
from clipgen_lib.metrics.oracle import read_scene
from clipgen_lib.runtime.runs import ClipgenError, open_run
from clipgen_lib.study.train_clip import (
    ImagePairs,
    ScenePairs,
    caption_accuracy,
    contrastive_loss,
    pool_scene,
    retrieval,
    train_clip,
)

SMALL = ClipTrainConfig(scenes=64, steps=2, batch_size=16, warmup=1, log_every=1, save_every=1)


def test_scene_batches_are_a_function_of_seed_and_step():
    images, texts, together = ScenePairs(SMALL, 0).batch(1)
    assert images.shape == (16, 3, 64, 64) and len(texts) == 16 and torch.equal(together, torch.eye(16))
    again, other = ScenePairs(SMALL, 0).batch(1), ScenePairs(SMALL, 1).batch(1)
    assert torch.equal(images, again[0]) and texts == again[1] and not torch.equal(images, other[0])


def test_it_knows_shapes(clip):
    """Far under what it was trained to, far over chance: a broken file, tokenizer or resize would fail here."""
    assert retrieval(clip, 200, n_objects=1)["true_at_1"] > 0.6


def test_twins_exchange_places():
    twins = readable = 0
    for index in range(0, 200, 2):
        a, b = pool_scene(0, index), pool_scene(0, index + 1)
        if len(a.objects) == 2:
            twins += 1
            said, swapped = ({(t.shape, t.colour): (t.x, t.y) for t in scene.objects} for scene in (a, b))
            assert said.keys() == swapped.keys() and all(said[k] != swapped[k] for k in said)
            links = {shapes.relation(*scene.objects) for scene in (a, b)}
            assert len(links) == 2 or a.objects[0].shape != b.objects[0].shape
            readable += {(t.shape, t.colour) for t in read_scene(shapes.render(b))} == said.keys()
    assert twins > 20 and readable >= 0.95 * twins  # corners of two like-coloured objects may touch


def test_contrastive_loss_is_that_of_open_clip():
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    scale = torch.tensor(20.0)
    ours = contrastive_loss(images, texts, scale, torch.eye(6))
    torch.testing.assert_close(ours, open_clip.ClipLoss()(images, texts, scale))
    # two images of one wording share their probability, so that the best that can be reached is its entropy
    same, perfect = torch.block_diag(torch.ones(2, 2), torch.eye(4)), torch.block_diag(torch.ones(2, 1), torch.eye(4))
    loss = contrastive_loss(perfect, perfect, torch.tensor(50.0), same).item()
    assert loss == pytest.approx(2 * math.log(2) / 6, abs=1e-5)


def test_clip_learns_from_images_with_class_names(two_classes, tmp_path):
    """Two classes that any network can tell: after a few steps the words fit the images."""
    train, val = (open_images(two_classes, split, 64) for split in ("train", "val"))
    config = replace(SMALL, steps=24, lr=1e-3, warmup=2, precision="no", save_every=24, image_width=16)
    pairs = ImagePairs(train, config, 0)
    images, texts, together = pairs.batch(3)
    assert images.shape == (16, 3, 64, 64) and together.sum() == 128
    assert set(texts) == {"a photo of a bright", "a photo of a dark"}
    assert torch.equal(images, pairs.batch(3)[0]) and not torch.equal(images, pairs.batch(4)[0])
    folder = train_clip(open_run("r", tmp_path), pairs, config)
    clip = ClipEmbedder.load(str(folder))
    assert clip.model.visual.conv1.out_channels == 16 // 2
    images = clip.images(to_float(torch.stack([val[row] for row in range(16)])))
    cosine = (images * clip.texts([texts[0] for texts in val.captions])).sum(1).mean().item()
    found = caption_accuracy(clip, val)
    assert found.pop("cosine") == pytest.approx(cosine, abs=1e-5) and found == {"n": 16, "wordings": 2, "accuracy": 1.0}


def test_the_image_tower_begins_with_imagenets_weights(two_classes, tmp_path):
    """Before any step its features are those of EfficientNet-Lite0, projected, on images enlarged to 96 pixels."""
    images = open_images(two_classes, "train", 64)
    config = replace(SMALL, image_tower="efficientnet", steps=0)
    folder = train_clip(open_run("r", tmp_path), ImagePairs(images, config, 0), config)
    visual = ClipEmbedder.load(str(folder)).model.visual
    x = torch.rand(2, 3, 96, 96)
    features = efficientnet_lite(0)[0].forward_features(x).mean((2, 3))
    assert torch.cosine_similarity(visual.trunk(x), features).min() > 0.9995 and features.std() > 0.1  # kept in float16
    assert visual(x).shape == (2, 256) and visual.image_size == (96, 96)


def test_clip_needs_pairs(images_folder):
    with pytest.raises(ClipgenError, match="has no captions"):
        ImagePairs(open_images(images_folder, "train", 8), SMALL, 0)
