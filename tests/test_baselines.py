from dataclasses import replace

import pytest
import torch
from conftest import same_weights

from clipgen_lib.config import FusionGANConfig, SampleConfig, VQGANCLIPConfig
from clipgen_lib.data.datasets import open_images
from clipgen_lib.data.images import crop, to_float
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.store import extract
from clipgen_lib.study.baselines import VQGANCLIP, FusionGAN, FusionGenerator, Retrieval, Supervised, train_fusion_gan
from clipgen_lib.transformer import ImageTransformer

TEXTS = ["a red circle", "a blue star", "a large green heart"]
GAN = FusionGANConfig(channels=4, steps=2, batch_size=4)


def test_retrieval_finds_an_image_by_its_own_embedding(images, vqgan, clip, tmp_path):
    system = Retrieval(vqgan, clip, extract(images, vqgan, clip, tmp_path / "store", flip=True), images)
    wanted = to_float(torch.stack([crop(images[row], 64) for row in (7, 3)]))
    assert torch.equal(system.generate_each(clip.images(wanted), [0, 1]), wanted)
    embeds = system.store.embeds(slice(0, len(images)))
    best = int((embeds @ clip.texts(TEXTS[:1])[0]).argmax())
    assert torch.equal(system.generate_each(TEXTS[:1], [5])[0], to_float(images[best]))


def test_vqgan_clip_moves_images_towards_their_texts(vqgan, clip):
    def similarity(steps):
        system = VQGANCLIP(vqgan, clip, VQGANCLIPConfig(steps=steps, cutouts=2))
        with torch.inference_mode():  # as the evaluation calls it
            generated = system.generate_each(TEXTS, [0, 1, 2])
        assert generated.shape == (3, 3, 64, 64) and generated.abs().max() <= 1
        return (clip.images(generated) * clip.texts(TEXTS)).sum(1)

    assert (similarity(12) > similarity(0) + 0.01).all()
    assert all(p.grad is None for module in (vqgan, clip) for p in module.parameters())


def test_an_image_of_vqgan_clip_does_not_depend_on_its_company(vqgan, clip):
    system = VQGANCLIP(vqgan, clip, VQGANCLIPConfig(steps=3, cutouts=2))
    state, together = torch.get_rng_state(), system.generate_each(TEXTS, [4, 5, 6])
    alone = system.generate_each(TEXTS[1:2], [5])
    assert (together[1] - alone[0]).abs().mean() < 0.02  # a code at a boundary may fall either way
    assert torch.equal(torch.get_rng_state(), state)


def test_supervised_reads_words(vqgan, clip, preset):
    torch.manual_seed(0)
    config = replace(preset.transformer, conditioning="words", condition_tokens=clip.tokenizer.context_length)
    model = ImageTransformer(config, preset.vqgan.codebook_size, preset.vqgan.side**2, clip.tokenizer.vocab_size).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    words, tokens = clip.tokenizer(TEXTS), torch.randint(0, 32, (3, 64))
    assert not torch.allclose(model(words, tokens)[0], model(words.flip(0), tokens)[0])
    system = Supervised(vqgan, clip, model, SampleConfig(guidance=1.5))
    generated = system.generate_each(TEXTS, [1, 2, 3])
    assert torch.allclose(system.generate_each(TEXTS[1:2], [2]), generated[1:2], atol=1e-5)
    assert torch.allclose(system.generate_each(TEXTS, [1, 2, 3], guidance=1.5, batch_size=2), generated, atol=1e-5)


@pytest.fixture(scope="module")
def gan(images, clip):
    return train_fusion_gan(images, clip, GAN)


def test_fusion_gan_is_a_function_of_text_and_seed(gan, images, vqgan, clip):
    same, other = (train_fusion_gan(images, clip, GAN, seed) for seed in (0, 1))
    assert same_weights(gan, same) and not torch.equal(gan.end.weight, other.end.weight)
    system = FusionGAN(vqgan, clip, gan)
    generated = system.generate_each(TEXTS, [1, 2, 3])
    assert generated.shape == (3, 3, 64, 64) and generated.abs().max() <= 1
    assert torch.allclose(system.generate_each(TEXTS[1:2], [2]), generated[1:2], atol=1e-5)
    assert not torch.allclose(system.generate_each(TEXTS[:1], [9]), generated[:1], atol=1e-3)


@pytest.mark.parametrize("change", [{"generator_lr": 1e-2}, {"critic_lr": 1e-1}, {"ema_decay": 0.1}, {"batch_size": 3}])
def test_every_field_of_the_gan_matters(gan, images, clip, change):
    assert not same_weights(gan, train_fusion_gan(images, clip, replace(GAN, **change)))


def test_the_gan_needs_captions(clip, images_folder):
    with pytest.raises(ClipgenError, match="caption"):
        train_fusion_gan(open_images(images_folder, "train", 64), clip, GAN)


def test_fusion_generator_reaches_the_size():
    for size in (64, 128):
        model = FusionGenerator(FusionGANConfig(channels=4), size, 8)
        assert model(torch.randn(2, 64), torch.randn(2, 8)).shape == (2, 3, size, size)
    with pytest.raises(ClipgenError, match="cannot reach 96"):
        FusionGenerator(FusionGANConfig(), 96, 8)
