import numpy as np
import pytest
import torch

from clipgen_lib.config import SampleConfig
from clipgen_lib.runs import ClipgenError
from clipgen_lib.sample import TextToImage, filter_logits, generate, guide, pick, rerank, row_noise

PLAIN = SampleConfig(guidance=1.0)


@pytest.fixture
def generator(vqgan, transformer, clip):
    return TextToImage.from_parts(
        vqgan, transformer, clip, {"name": "shapes", "pretrained": None}, SampleConfig(guidance=2.0, top_p=0.9)
    )


def filter_by_hand(row, temperature, top_k, top_p):
    row = row.double() / temperature
    order = row.argsort(descending=True)
    kept, total = [], 0.0
    candidates = order[: top_k or len(order)]
    probabilities = row[candidates].softmax(0)
    for token, probability in zip(candidates.tolist(), probabilities.tolist(), strict=True):
        if total >= top_p and kept:
            break
        kept.append(token)
        total += probability
    return sorted(kept)


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1, 0, 1.0), (0.7, 5, 1.0), (1, 0, 0.8), (1.3, 12, 0.6), (1, 1, 1.0), (1, 0, 1e-6)]
)
def test_filters_against_the_plain_way(temperature, top_k, top_p):
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    filtered = filter_logits(logits, temperature, top_k, top_p)
    assert torch.equal(logits, before)
    for row, out in zip(logits, filtered, strict=True):
        kept = torch.isfinite(out).nonzero().flatten().tolist()
        assert kept == filter_by_hand(row, temperature, top_k, top_p)
        assert torch.allclose(out[kept], row[kept] / temperature)


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}])
def test_impossible_filters_are_refused(bad):
    with pytest.raises(ClipgenError, match="use"):
        filter_logits(torch.zeros(1, 4), **bad)


def test_guidance_one_is_no_guidance():
    c, u = torch.randn(2, 5), torch.randn(2, 5)
    assert torch.allclose(guide(c, u, 1.0), c) and torch.allclose(guide(c, u, 0.0), u)
    assert torch.allclose(guide(c, u, 3.0), u + 3 * (c - u))


def test_pick_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    picked = pick(probabilities.log().expand(10_000, 4), uniform)
    shares = torch.bincount(picked, minlength=4) / 10_000
    assert torch.allclose(shares, probabilities, atol=1e-3) and shares[1] == 0


def test_guided_sampling_differs_and_unguided_does_not(transformer, clip):
    embeds = clip.texts(["a red circle", "a blue star"])
    plain = generate(transformer, embeds, [0, 1], PLAIN)
    assert plain.shape == (2, 64) and plain.dtype == torch.int64
    assert not torch.equal(plain, generate(transformer, embeds, [0, 1], SampleConfig(guidance=3.0)))
    assert not torch.equal(plain, generate(transformer, embeds, [5, 6], PLAIN))


def test_sampling_is_that_of_a_loop_without_a_cache(transformer, clip):
    embeds, noise = clip.texts(["a red circle", "a blue star"]), row_noise([3, 4], 64, torch.device("cpu"))
    tokens = torch.zeros(2, 64, dtype=torch.long)
    with torch.inference_mode():
        for i in range(64):
            c, u = (transformer(e, tokens[:, : i + 1])[:, -1] for e in (embeds, torch.zeros_like(embeds)))
            tokens[:, i] = pick(filter_logits(guide(c, u, 2.0), 0.9, 10, 0.95), noise[:, i])
    settings = SampleConfig(guidance=2.0, temperature=0.9, top_k=10, top_p=0.95)
    assert torch.equal(generate(transformer, embeds, [3, 4], settings), tokens)


def test_same_prompt_and_seed_give_the_same_picture_at_any_batch_size(generator):
    prompts = ["a red circle", "a blue star", "a green heart"]
    together = generator(prompts, n=3, seed=7)
    assert together.shape == (3, 3, 3, 64, 64)
    for p, prompt in enumerate(prompts):
        assert torch.allclose(generator(prompt, n=3, seed=7)[0], together[p], atol=1e-5)
        assert torch.allclose(generator(prompt, n=1, seed=9)[0, 0], together[p, 2], atol=1e-5)
    assert torch.allclose(generator(prompts, n=3, seed=7, batch_size=2), together, atol=1e-5)


def test_embeddings_go_in_as_well(generator, clip):
    embeds = clip.texts(["a red circle"])
    assert torch.allclose(generator(embeds, n=2, seed=1), generator("a red circle", n=2, seed=1), atol=1e-5)


def test_rerank_puts_the_most_similar_first(clip, generator):
    images = torch.rand(2, 5, 3, 64, 64) * 2 - 1
    texts = ["a red circle", "a blue star"]
    order = rerank(clip, images, texts)
    for p, text in enumerate(texts):
        similarity = (clip.images(images[p]) @ clip.texts([text]).T).flatten()
        assert torch.equal(order[p], similarity.argsort(descending=True))
    best = generator("a red circle", n=1, seed=0, candidates=4)[0, 0]
    drawn = generator("a red circle", n=4, seed=0)[0]
    assert torch.allclose(best, drawn[(clip.images(drawn) @ clip.texts(["a red circle"]).T).argmax()], atol=1e-5)


def test_calls_that_make_no_sense(generator, transformer, clip):
    for arguments in ({"prompts": []}, {"prompts": "x", "n": 0}, {"prompts": "x", "n": 4, "candidates": 2}):
        with pytest.raises(ClipgenError):
            generator(**arguments)
    with pytest.raises(ClipgenError, match="no field 'guidence'"):
        generator("x", guidence=2)
    with pytest.raises(ClipgenError, match="one for each"):
        generate(transformer, clip.texts(["x"]), [0, 1], PLAIN)
    with pytest.raises(ClipgenError, match="eval"):
        generate(transformer.train(), clip.texts(["x"]), [0], PLAIN)


def test_saved_and_loaded_draws_the_same(generator, tmp_path):
    generator.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} >= {"config.json", "model.safetensors"}
    again = TextToImage.from_pretrained(str(tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(generator.state_dict().values(), again.state_dict().values(), strict=True))
    assert np.array_equal(again("a red circle", seed=3).numpy(), generator("a red circle", seed=3).numpy())


def test_parts_that_do_not_fit(vqgan, clip, preset):
    from clipgen_lib.transformer import ImageTransformer

    for size, tokens, dim, word in (
        (16, 64, clip.dim, "codebook"),
        (32, 16, clip.dim, "token count"),
        (32, 64, 8, "8 dimensions"),
    ):
        with pytest.raises(ClipgenError, match=word):
            TextToImage.from_parts(vqgan, ImageTransformer(preset.transformer, size, tokens, dim), clip, {}, PLAIN)
