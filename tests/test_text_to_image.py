import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipgen_lib.config import SampleConfig
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.sample import generate, mean_of_nearest, slerp
from clipgen_lib.text_to_image import TextToImage
from clipgen_lib.transformer import ImageTransformer

SOURCE = {"name": "shapes", "pretrained": None}
RED, BLUE, GREEN = "a red circle", "a blue star", "a green heart"


def assert_near(images, others):
    torch.testing.assert_close(images, others, atol=1e-5, rtol=1e-5)


def decoded(generator, embeds, seeds, known=None):
    """The images that the parts of a generator give one after the other."""
    tokens = generate(generator.transformer, embeds, seeds, generator.settings, known=known)
    return generator.vqgan.decode(tokens.view(-1, 8, 8))


def test_bfloat16_weights_generate_and_stay_what_they_are(generator, transformer, clip):
    """Of most rows the first tokens are those of float32, and every image is one."""
    embeds, settings = clip.texts([RED, BLUE]).repeat(8, 1), SampleConfig(guidance=2.0, top_k=10)
    plain = generate(transformer, embeds, list(range(16)), settings)
    half = generate(transformer.bfloat16(), embeds, list(range(16)), settings)
    assert transformer.head.weight.dtype == torch.bfloat16
    assert half.shape == plain.shape and int(half.max()) < transformer.codebook_size
    assert (half[:, 0] == plain[:, 0]).float().mean() >= 0.75 and not torch.equal(half, plain)
    generator.transformer.bfloat16()
    assert torch.isfinite(generator([RED], n=2)).all()


def test_same_prompt_and_seed_give_the_same_image_at_any_batch_size(generator):
    together = generator([RED, BLUE, GREEN], n=3, seed=7)
    assert together.shape == (3, 3, 3, 64, 64)
    for p, prompt in enumerate([RED, BLUE, GREEN]):
        assert_near(generator(prompt, n=3, seed=7)[0], together[p])
        assert_near(generator(prompt, n=1, seed=9)[0, 0], together[p, 2])
    assert_near(generator([RED, BLUE, GREEN], n=3, seed=7, batch_size=2), together)


def test_each_image_is_the_best_of_its_own_candidates(clip, generator):
    best, texts = generator([RED, BLUE], n=2, seed=5, candidates=4), clip.texts([RED, BLUE])
    for p, text in enumerate(texts):
        for j in range(2):  # the first candidate is the image without rerank
            pool = decoded(generator, text.expand(4, -1), [5 + j, (5 + j, 1), (5 + j, 2), (5 + j, 3)])
            assert_near(best[p, j], pool[(clip.images(pool) @ text).argmax()])
            assert_near(generator([RED, BLUE][p], seed=5 + j)[0, 0], pool[0])


def with_transformer_of(generator, *sizes):
    transformer = ImageTransformer(generator.transformer.config, *sizes)
    return TextToImage.from_parts(generator.vqgan, transformer, generator.clip, {}, SampleConfig())


@pytest.mark.parametrize(
    "reason, call",
    [
        ("nothing to generate", lambda g, _: g([])),
        ("n >= 1", lambda g, _: g("x", n=0)),
        ("candidates", lambda g, _: g("x", candidates=0)),
        ("no field 'guidence'", lambda g, _: g("x", guidence=2)),
        ("2 prompts to generate progressively", lambda g, _: next(g.generate_progressively(["x", "y"], n=3))),
        ("temperature is 0", lambda g, _: next(g.generate_progressively("x", temperature=0))),
        ("rows is -1 of a grid of 8", lambda g, images: g.complete(images, "x", rows=-1)),
        ("rows is 8 of a grid of 8", lambda g, images: g.complete(images, "x", rows=8)),
        ("1 prompts for 2 images", lambda g, images: g.complete(images, ["x"])),
        (r"give \(P, 3, 64, 64\)", lambda g, images: g.complete(images[..., :32], "x")),
        ("nothing to generate", lambda g, _: g.blend("x", "y", [])),
        ("one prompt at each end", lambda g, _: g.blend(["x", "y"], "y", [0.5])),
        ("no known kind: give images", lambda g, images: g(images[0])),
        ("no known kind: give images", lambda g, images: g(images[:, :1])),
        ("no known kind: give images", lambda g, images: g(torch.zeros(1, 8))),
        ("give from_parts a bank", lambda g, _: g("x", neighbours=3)),
        ("give from_parts moments", lambda g, _: g("x", align="shift")),
        ("differ in codebook", lambda g, _: with_transformer_of(g, 16, 64, 256)),
        ("token count", lambda g, _: with_transformer_of(g, 32, 16, 256)),
        ("8 dimensions", lambda g, _: with_transformer_of(g, 32, 64, 8)),
    ],
)
def test_calls_that_make_no_sense(generator, reason, call):
    with pytest.raises(ClipgenError, match=reason):
        call(generator, torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize("setting", [{"neighbours": 3}, {"align": "shift"}, {"align": "standardise"}])
def test_texts_are_moved_to_where_images_lie_and_images_are_not(vqgan, transformer, clip, tmp_path, setting):
    bank, moments = torch.nn.functional.normalize(torch.randn(20, clip.dim), dim=1), torch.rand(4, clip.dim) + 0.1
    text, settings = clip.texts([RED]), SampleConfig(guidance=1.0, **setting)
    generator = TextToImage.from_parts(vqgan, transformer, clip, SOURCE, settings, (bank, moments))
    moved = text - moments[2] + moments[0]
    moved = (text - moments[2]) / moments[3] * moments[1] + moments[0] if "standardise" in setting.values() else moved
    moved = mean_of_nearest(text, bank.half().float(), 3) if "neighbours" in setting else moved / moved.norm()
    assert torch.allclose(generator.condition(text, True, **setting), moved, atol=1e-6)
    assert torch.equal(generator.condition(text, False, **setting), text)
    assert_near(generator(RED, seed=2), generator(moved, seed=2))
    generator.save_pretrained(tmp_path / "model")
    again = TextToImage.from_pretrained(str(tmp_path / "model"))
    assert torch.equal(again(RED, seed=2), generator(RED, seed=2))


@pytest.mark.parametrize(
    "settings", [{}, {"candidates": 3}, {"batch_size": 2}, {"candidates": 2, "batch_size": 1, "top_k": 5}]
)
def test_generating_progressively_ends_in_the_plain_image(generator, settings):
    previews = list(generator.generate_progressively(RED, n=3, seed=4, **settings))
    assert torch.equal(previews[-1].images, generator(RED, n=3, seed=4, **settings)[0])
    shares = [preview.share for preview in previews]
    assert shares == sorted(set(shares)) and 0 < shares[0] < 1 and shares[-1] == 1
    assert all(preview.images.shape == (3, 3, 64, 64) for preview in previews)


def test_squares_not_sampled_are_mid_grey(generator):
    *previews, final = generator.generate_progressively(RED, n=2, seed=4, every=20)
    assert [round(preview.share * 64) for preview in (*previews, final)] == [20, 40, 60, 64]
    for preview, sampled in zip(previews, (20, 40, 60), strict=True):
        squares = preview.images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        assert (squares[:, sampled:] == 0).all() and (squares[:, :sampled] != 0).flatten(2).any(2).all()
    assert_near(previews[2].images[:, :, :40], final.images[:, :, :40])  # far from what comes


def test_completion_keeps_the_upper_half(generator):
    images = generator([RED, BLUE], seed=20)[:, 0]
    tokens = generator.vqgan.encode(images).flatten(1)
    for rows, prompts in ((4, GREEN), (2, [GREEN, "a pink ring"])):
        done = generator.complete(images, prompts, rows=rows, n=2, seed=7)
        texts = generator.embed([prompts] * 2 if isinstance(prompts, str) else prompts)
        known, embeds = tokens[:, : 8 * rows].repeat_interleave(2, 0), texts.repeat_interleave(2, 0)
        assert done.shape == (2, 2, 3, 64, 64)
        # image j of each with seed + j
        assert_near(done.flatten(0, 1), decoded(generator, embeds, [7, 8, 7, 8], known))


def test_completion_shows_the_upper_half_as_the_tokenizer_does(generator):
    """The decoder reaches a few squares: above those nothing depends on what is sampled."""
    images = generator([RED], seed=20)[:, 0]
    done = generator.complete(images, GREEN, rows=6, n=3)[0]
    reconstructed = generator.vqgan.decode(generator.vqgan.encode(images))
    reach = 2 * 8
    assert torch.allclose(done[:, :, : 48 - reach], reconstructed[:, :, : 48 - reach].expand(3, -1, -1, -1), atol=1e-4)


def test_blends_begin_and_end_at_the_plain_images(generator):
    image, blended = generator(RED, seed=30)[0], generator.blend(RED, BLUE, [0, 0.5, 1], n=2, seed=3)
    middle = slerp(generator.embed(RED), generator.embed(BLUE), 0.5)
    for found, prompt in zip(blended, (RED, middle, BLUE), strict=True):
        assert_near(found, generator(prompt, n=2, seed=3)[0])
    mixed = generator.blend(image, BLUE, [0, 1], seed=3)
    assert_near(mixed, torch.cat([generator(image, seed=3), generator(BLUE, seed=3)]))


def test_images_go_in_as_prompts(generator, clip):
    images = generator([RED, BLUE])[:, 0]
    assert torch.equal(generator.embed(images), clip.images(images))
    assert torch.equal(generator.embed(clip.images(images)), clip.images(images))
    assert_near(generator(images, n=2, seed=1), generator(clip.images(images), n=2, seed=1))
    assert torch.allclose(generator.similarity(images, RED), (clip.images(images) @ clip.texts([RED]).T)[:, 0])


# ---------------------------------------------------------------------------------------------- exported folders


@pytest.fixture
def exported(generator, tmp_path):
    generator.export(tmp_path / "out")
    return tmp_path / "out"


def test_exported_weights_are_half_as_large_and_generate_the_same(generator, exported):
    assert {path.name for path in exported.iterdir()} == {"config.json", "model.safetensors"}
    parameters = sum(v.numel() for v in generator.state_dict().values())
    assert (exported / "model.safetensors").stat().st_size < 2.1 * parameters + 20_000
    again = TextToImage.from_pretrained(exported)
    assert all(x.dtype == torch.float32 for g in (generator, again) for x in g.parameters())
    assert torch.allclose(generator(RED, n=2), again(RED, n=2), atol=0.02)


def test_an_export_takes_nobody_elses_folder(generator, exported):
    generator.export(exported)  # an earlier export is replaced
    (exported / "thesis.txt").write_text("years of work")
    with pytest.raises(ClipgenError, match="holds other things"):
        generator.export(exported)
    assert (exported / "thesis.txt").read_text() == "years of work"


def without_head(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.head.weight"]
    save_file(tensors, folder / "model.safetensors")


def config_with(part, **entries):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config[part] |= entries
        (folder / "config.json").write_text(json.dumps(config))

    return change


NO_GENERATOR = "is no generator that can be read here .*: give 'shapes', 'fashion'"


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (shutil.rmtree, NO_GENERATOR),
        (lambda folder: [path.unlink() for path in folder.iterdir()], NO_GENERATOR),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "is damaged"),
        (without_head, "transformer.head.weight"),
        (config_with("clip", device="cuda"), None),
        (config_with("clip", name=["shapes"]), None),
        (config_with("transformer", clip_dim=None), None),
        (config_with("transformer", n_tokens=-1), None),
        (config_with("transformer", codebook_size=10**400), None),
        (config_with("vqgan", channels=100_000), None),  # terabytes: nothing of that kind is asked for
        (config_with("transformer", width=2**30, heads=2), None),
    ],
)
def test_what_is_no_generator_is_one_sentence_before_anything_is_built(exported, monkeypatch, damage, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    damage(exported)
    with pytest.raises(ClipgenError, match=sentence) as refusal:
        assert TextToImage.from_pretrained(exported).clip
    assert "memory" not in str(refusal.value) and len(str(refusal.value)) < 600
