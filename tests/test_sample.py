import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipgen_lib.config import SampleConfig
from clipgen_lib.runtime.kernels import largest
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.sample import filter_logits, generate, guidance_at, guide, pick, project, row_noise, token_by_token
from clipgen_lib.store import nearest
from clipgen_lib.text_to_image import TextToImage, rerank, slerp

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


def filter_by_sorting(logits, temperature, top_k, top_p):
    """A full sort of every row, token after token: what is kept are the k largest values and those like the last of them,
    of these the first whose likelier ones hold less than p, and those like the last of them."""
    logits, keep = logits / temperature, torch.zeros_like(logits, dtype=torch.bool)
    for row, kept in zip(logits, keep, strict=True):
        values = row.sort(descending=True).values[: top_k or len(row)]
        probabilities = values.double().softmax(0)
        before = probabilities.cumsum(0) - probabilities
        last = max(i for i in range(len(values)) if i == 0 or before[i] < top_p)
        kept |= row >= values[last]
    return logits.masked_fill(~keep, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (0, 0.9), (50, 1.0), (50, 0.9), (1, 0.5), (300, 0.3), (1_000, 0.9)])
@pytest.mark.parametrize("ties", [False, True])
def test_filters_against_a_full_sort(dtype, top_k, top_p, ties):
    draw = torch.Generator().manual_seed(top_k)
    logits = torch.randn(4, 300, generator=draw, dtype=dtype) * 2
    logits = logits.round() / 2 if ties else logits  # about 15 different values
    assert torch.equal(filter_logits(logits, 0.8, top_k, top_p), filter_by_sorting(logits, 0.8, top_k, top_p))


def test_the_largest_are_those_of_a_sort():
    values = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))[:, 2]  # not contiguous
    for k in (1, 7, 40):
        assert torch.equal(largest(values, k), values.sort(dim=-1, descending=True).values[:, :k])


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


def test_guided_sampling_is_that_of_a_loop_without_a_cache_with_schedule_and_known_tokens(transformer, clip):
    embeds, noise = clip.texts(["a red circle", "a blue star"]), row_noise([3, 4], 64, torch.device("cpu"))
    tokens = torch.zeros(2, 64, dtype=torch.long)
    tokens[:, :5] = known = torch.arange(10).view(2, 5)
    settings = SampleConfig(guidance=4.0, guidance_schedule="cosine", top_p=0.8)
    with torch.inference_mode():
        for i in range(5, 64):
            c, u = (transformer(e, tokens[:, : i + 1])[:, -1] for e in (embeds, torch.zeros_like(embeds)))
            tokens[:, i] = pick(filter_logits(guide(c, u, guidance_at(i, 64, settings)), top_p=0.8), noise[:, i])
    assert torch.equal(generate(transformer, embeds, [3, 4], settings, known=known), tokens)


def test_bfloat16_weights_draw_and_stay_what_they_are(generator, transformer, clip):
    """Of most rows the first tokens are those of float32, and every image is one."""
    embeds = clip.texts(["a red circle", "a blue star"]).repeat(8, 1)
    plain = generate(transformer, embeds, list(range(16)), SampleConfig(guidance=2.0, top_k=10))
    half = generate(transformer.bfloat16(), embeds, list(range(16)), SampleConfig(guidance=2.0, top_k=10))
    assert transformer.head.weight.dtype == torch.bfloat16
    assert half.shape == plain.shape and int(half.max()) < transformer.codebook_size
    assert (half[:, 0] == plain[:, 0]).float().mean() >= 0.75 and not torch.equal(half, plain)
    generator.transformer.bfloat16()
    assert torch.isfinite(generator(["a red circle"], n=2)).all()


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
    order = rerank(clip, images, clip.texts(texts))
    for p, text in enumerate(texts):
        similarity = (clip.images(images[p]) @ clip.texts([text]).T).flatten()
        assert torch.equal(order[p], similarity.argsort(descending=True))
    best = generator("a red circle", n=2, seed=5, candidates=4)[0]
    text = clip.texts(["a red circle"])
    for j in range(2):  # each image is the best of its own four, of which the first is the one drawn without rerank
        pool = generator.draw(text.repeat(4, 1), [5 + j, (5 + j, 1), (5 + j, 2), (5 + j, 3)], generator.settings)
        assert torch.allclose(best[j], pool[(clip.images(pool) @ text.T).argmax()], atol=1e-5)
        assert torch.allclose(generator("a red circle", seed=5 + j)[0, 0], pool[0], atol=1e-5)


def test_calls_that_make_no_sense(generator, transformer, clip):
    for arguments in ({"prompts": []}, {"prompts": "x", "n": 0}, {"prompts": "x", "candidates": 0}):
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
    assert all(
        torch.equal(a, b) for a, b in zip(generator.state_dict().values(), again.state_dict().values(), strict=True)
    )
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


def test_guidance_schedules_by_hand():
    def scales(**settings):
        chosen = SampleConfig(guidance=3.0, **settings)
        return [round(guidance_at(i, 5, chosen), 6) for i in range(5)]

    assert scales() == [3, 3, 3, 3, 3]
    assert scales(guidance_schedule="linear") == [1, 1.5, 2, 2.5, 3]
    assert scales(guidance_schedule="cosine") == [1, 1.292893, 2, 2.707107, 3]
    assert scales(guidance_interval=(0.25, 0.5)) == [1, 3, 3, 1, 1]
    assert guidance_at(0, 1, SampleConfig(guidance=3.0)) == 3


def test_a_schedule_of_scale_one_is_no_guidance(transformer, clip):
    embeds = clip.texts(["a red circle", "a blue star"])
    plain = generate(transformer, embeds, [1, 2], PLAIN)
    for settings in (
        {"guidance": 1.0, "guidance_schedule": "linear"},
        {"guidance": 4.0, "guidance_interval": (0.0, 1e-9), "guidance_schedule": "cosine"},
    ):
        assert torch.equal(generate(transformer, embeds, [1, 2], SampleConfig(**settings)), plain)
    guided = generate(transformer, embeds, [1, 2], SampleConfig(guidance=4.0, guidance_interval=(0.5, 1.0)))
    assert torch.equal(guided[:, :32], plain[:, :32]) and not torch.equal(guided, plain)


def test_projection_is_the_mean_of_the_nearest(clip):
    bank = torch.nn.functional.normalize(torch.randn(50, clip.dim, generator=torch.Generator().manual_seed(0)), dim=1)
    embeds = clip.texts(["a red circle", "a blue star"])
    for k in (1, 4):
        found = project(embeds, bank, k)
        assert torch.allclose(found.norm(dim=1), torch.ones(2))
        for row, embed in zip(found, embeds, strict=True):
            near = bank[(bank @ embed).argsort(descending=True)[:k]]
            assert torch.allclose(row, near.mean(0) / near.mean(0).norm(), atol=1e-6)
    assert torch.allclose(project(bank[:3], bank, 1), bank[:3], atol=1e-6)


def test_large_banks_are_searched_by_faiss_with_the_same_result():
    pytest.importorskip("faiss", reason="faiss is not installed")
    bank, queries = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert torch.equal(nearest(bank, queries[:7], 5), nearest(bank, queries[:7], 5, exact_below=10))


def test_texts_are_projected_and_pictures_are_not(vqgan, transformer, clip, generator, tmp_path):
    bank = torch.nn.functional.normalize(torch.randn(20, clip.dim), dim=1)
    source = {"name": "shapes", "pretrained": None}
    banked = TextToImage.from_parts(vqgan, transformer, clip, source, SampleConfig(guidance=1.0, neighbours=3), bank)
    text = clip.texts(["a red circle"])
    assert torch.allclose(banked.condition(text, True, 3), project(text, bank.half().float(), 3), atol=1e-6)
    assert torch.equal(banked.condition(text, False, 3), text)
    assert torch.allclose(
        banked("a red circle", seed=2), banked(project(text, bank.half().float(), 3), seed=2), atol=1e-5
    )
    banked.save_pretrained(tmp_path / "model")
    again = TextToImage.from_pretrained(str(tmp_path / "model"))
    assert torch.equal(again("a red circle", seed=2), banked("a red circle", seed=2))
    with pytest.raises(ClipgenError, match="give from_parts a bank"):
        generator("a red circle", neighbours=3)


def test_texts_are_shifted_and_pictures_are_not(vqgan, transformer, clip, generator, tmp_path):
    offset, text = 0.3 * torch.randn(clip.dim), clip.texts(["a red circle"])
    source = {"name": "shapes", "pretrained": None}
    shifted = TextToImage.from_parts(
        vqgan, transformer, clip, source, SampleConfig(guidance=1.0, shift=True), offset=offset
    )
    moved = (text + offset) / (text + offset).norm()
    assert torch.allclose(shifted.condition(text, True, shift=True), moved, atol=1e-6)
    assert torch.equal(shifted.condition(text, False, shift=True), text)
    assert torch.equal(shifted("a red circle", seed=2), shifted(moved, seed=2))
    shifted.save_pretrained(tmp_path / "model")
    assert torch.equal(TextToImage.from_pretrained(str(tmp_path / "model")).offset, offset)
    with pytest.raises(ClipgenError, match="give from_parts an offset"):
        generator("a red circle", shift=True)


def test_means_of_both_modalities_are_taken_off(generator, clip):
    text = clip.texts(["a red circle"])
    assert torch.equal(generator.condition(text, True), text)
    generator.transformer.text_mean.copy_(0.3 * text[0].flip(0))
    generator.transformer.image_mean.copy_(0.5 * text[0].roll(1))
    for is_text, mean in ((True, 0.3 * text[0].flip(0)), (False, 0.5 * text[0].roll(1))):
        expected = (text - mean) / (text - mean).norm()
        assert torch.allclose(generator.condition(text, is_text), expected, atol=1e-6)


def test_exported_weights_are_half_as_large_and_draw_the_same(generator, tmp_path):
    generator.export(tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    parameters = sum(v.numel() for v in generator.state_dict().values())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 2.1 * parameters + 20_000
    again = TextToImage.from_pretrained(tmp_path / "out")
    assert (
        again.transformer.head.weight.dtype == torch.float32
        and generator.transformer.head.weight.dtype == torch.float32
    )
    prompt = "a red circle"
    assert torch.allclose(generator(prompt, n=2), again(prompt, n=2), atol=0.02)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_known_tokens_stay_and_the_rest_goes_on_from_them(transformer, clip, guidance):
    embeds, settings = clip.texts(["a red circle", "a blue star", "a green heart"]), SampleConfig(guidance=guidance)
    plain = generate(transformer, embeds, [1, 2, 3], settings)
    for length in (0, 1, 40, 63):  # its own beginning leads to its own end
        assert torch.equal(generate(transformer, embeds, [1, 2, 3], settings, known=plain[:, :length]), plain)
    other = (plain + 1) % transformer.codebook_size
    for batch_size in (2, 64):
        chosen = SampleConfig(guidance=guidance, batch_size=batch_size)
        found = generate(transformer, embeds, [1, 2, 3], chosen, known=other[:, :32])
        assert torch.equal(found[:, :32], other[:, :32]) and not torch.equal(found[:, 32:], plain[:, 32:])


def test_known_tokens_that_do_not_fit(transformer, clip):
    embeds, whole = clip.texts(["a red circle"]), torch.zeros(1, 64, dtype=torch.long)
    for known in (whole, whole[:, :8].repeat(2, 1)):
        with pytest.raises(ClipgenError, match="a row for each of the 1"):
            generate(transformer, embeds, [0], PLAIN, known=known)
    for wrong in (-1, transformer.codebook_size):
        with pytest.raises(ClipgenError, match="outside 0 to 31"):
            generate(transformer, embeds, [0], PLAIN, known=whole[:, :8] + wrong)


def test_tokens_come_one_by_one(transformer, clip):
    embeds, settings = (
        clip.texts(["a red circle", "a blue star", "a green heart"]),
        SampleConfig(guidance=2.0, batch_size=2),
    )
    looks = [tokens.clone() for tokens in token_by_token(transformer, embeds, [1, 2, 3], settings)]
    whole = generate(transformer, embeds, [1, 2, 3], settings)
    assert len(looks) == 2 * 64 and torch.equal(looks[-1], whole)
    for step, look in enumerate(looks, start=1):  # two rows in the first batch, one in the second
        drawn = torch.tensor([[min(step, 64)], [min(step, 64)], [max(step - 64, 0)]]) > torch.arange(64)
        assert torch.equal(look, torch.where(drawn, whole, -1))


@pytest.mark.parametrize(
    "settings", [{}, {"candidates": 3}, {"batch_size": 2}, {"candidates": 2, "batch_size": 1, "top_k": 5}]
)
def test_drawing_progressively_ends_in_the_plain_picture(generator, settings):
    looks = list(generator.draw_progressively("a red circle", n=3, seed=4, **settings))
    assert torch.equal(looks[-1].images, generator("a red circle", n=3, seed=4, **settings)[0])
    shares = [look.share for look in looks]
    assert shares == sorted(set(shares)) and 0 < shares[0] < 1 and shares[-1] == 1
    assert all(look.images.shape == (3, 3, 64, 64) for look in looks)


def test_squares_not_drawn_are_mid_grey(generator):
    looks = list(generator.draw_progressively("a red circle", n=2, seed=4, every=20))
    assert [round(look.share * 64) for look in looks] == [20, 40, 60, 64]
    final = looks[-1].images
    for look, drawn in zip(looks[:-1], (20, 40, 60), strict=True):
        squares = look.images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        assert (squares[:, drawn:] == 0).all() and (squares[:, :drawn] != 0).flatten(2).any(2).all()
    assert torch.allclose(looks[2].images[:, :, :40], final[:, :, :40], atol=1e-5), (
        "far from what comes nothing changes"
    )


def test_progressive_calls_that_make_no_sense(generator):
    with pytest.raises(ClipgenError, match="2 prompts"):
        next(generator.draw_progressively(["a red circle", "a blue star"], n=3))
    with pytest.raises(ClipgenError, match="temperature is 0"):
        next(generator.draw_progressively("a red circle", temperature=0))


def test_completion_keeps_the_upper_half(generator, transformer):
    images = generator(["a red circle", "a blue star"], seed=20)[:, 0]
    tokens = generator.vqgan.encode(images).flatten(1)
    for rows, prompts in ((4, "a green heart"), (2, ["a green heart", "a pink ring"])):
        done = generator.complete(images, prompts, rows=rows, n=2, seed=7)
        assert done.shape == (2, 2, 3, 64, 64)
        texts = generator.embed([prompts] * 2 if isinstance(prompts, str) else prompts)
        known = tokens[:, : 8 * rows].repeat_interleave(2, 0)
        expected = generate(
            transformer, texts.repeat_interleave(2, 0), [7, 8, 7, 8], generator.settings, known=known
        )  # image j of each with seed + j
        assert torch.equal(expected[:, : 8 * rows], known)
        assert torch.allclose(done.flatten(0, 1), generator.vqgan.decode(expected.view(-1, 8, 8)), atol=1e-5)
    assert torch.equal(
        generator.complete(images, "a green heart", n=2, seed=7), generator.complete(images, "a green heart", 4, 2, 7)
    )


def test_completion_shows_the_upper_half_as_the_tokenizer_does(generator):
    """The decoder reaches a few squares: above those nothing depends on what is drawn."""
    images = generator(["a red circle"], seed=20)[:, 0]
    done = generator.complete(images, "a green heart", rows=6, n=3)[0]
    reconstructed = generator.vqgan.decode(generator.vqgan.encode(images))
    reach = 2 * 8
    assert torch.allclose(done[:, :, : 48 - reach], reconstructed[:, :, : 48 - reach].expand(3, -1, -1, -1), atol=1e-4)


def test_completions_that_make_no_sense(generator):
    images = torch.zeros(2, 3, 64, 64)
    for rows in (-1, 8):
        with pytest.raises(ClipgenError, match=f"rows is {rows} of a grid of 8"):
            generator.complete(images, "x", rows=rows)
    with pytest.raises(ClipgenError, match="1 prompts for 2 images"):
        generator.complete(images, ["x"])
    with pytest.raises(ClipgenError, match=r"give \(P, 3, 64, 64\)"):
        generator.complete(images[..., :32], "x")


def test_slerp_goes_along_the_great_circle(clip):
    a, b = clip.texts(["a red circle"]), clip.texts(["a blue star"])
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)
    points = torch.cat([slerp(a, b, share) for share in (0, 0.25, 0.5, 0.75, 1)])
    assert torch.allclose(points.norm(dim=1), torch.ones(5), atol=1e-6)
    angles = (points[1:] * points[:-1]).sum(1).acos()
    assert torch.allclose(angles, torch.arccos((a * b).sum()).expand(4) / 4, atol=1e-3)
    assert torch.allclose(slerp(a, a, 0.3), a), "no way to go"
    right, up = torch.eye(2)
    assert torch.allclose(slerp(right, up, 1 / 3), torch.tensor([3**0.5 / 2, 0.5]))
    with pytest.raises(ClipgenError, match="opposite"):
        slerp(a, -a, 0.5)


def test_blends_and_walks_begin_and_end_at_the_plain_pictures(generator):
    a, b = "a red circle", "a blue star"
    picture = generator(a, seed=30)[0]
    blended = generator.blend(a, b, [0, 0.5, 1], n=2, seed=3)
    assert blended.shape == (3, 2, 3, 64, 64)
    assert torch.allclose(blended[0], generator(a, n=2, seed=3)[0], atol=1e-5)
    assert torch.allclose(blended[2], generator(b, n=2, seed=3)[0], atol=1e-5)
    middle = slerp(generator.embed(a), generator.embed(b), 0.5)
    assert torch.allclose(blended[1], generator(middle, n=2, seed=3)[0], atol=1e-5)
    mixed = generator.blend(picture, b, [0, 1], seed=3)[:, 0]
    assert torch.allclose(mixed, torch.cat([generator(picture, seed=3)[0], generator(b, seed=3)[0]]), atol=1e-5)
    frames = generator.walk(a, b, frames=5, seed=3)
    assert frames.shape == (5, 3, 64, 64) and torch.allclose(frames[[0, 2, 4]], blended[:, 0], atol=1e-5)
    assert torch.allclose(
        generator.walk(a, b, 2, seed=3, candidates=2)[0], generator(a, seed=3, candidates=2)[0, 0], atol=1e-5
    )
    for wrong in (
        lambda: generator.walk(a, b, frames=1),
        lambda: generator.blend(a, b, []),
        lambda: generator.blend([a, b], b, [0.5]),
    ):
        with pytest.raises(ClipgenError):
            wrong()


def test_each_end_of_a_blend_is_conditioned_as_what_it_is(generator):
    """With means taken off, a text loses the texts' and an image the images'."""
    text, picture = "a red circle", generator("a blue star")[0]
    generator.transformer.text_mean.copy_(0.3 * generator.embed(text)[0].flip(0))
    generator.transformer.image_mean.copy_(0.5 * generator.embed(text)[0].roll(1))
    ends = generator.condition(generator.embed(text), True), generator.condition(generator.embed(picture), False)
    expected = generator.draw(slerp(*ends, 0.4), [6], generator.settings)
    assert torch.allclose(generator.blend(text, picture, [0.4], seed=6)[0], expected, atol=1e-5)


def test_pictures_go_in_as_prompts(generator, clip):
    pictures = generator(["a red circle", "a blue star"])[:, 0]
    assert torch.equal(generator.embed(pictures), clip.images(pictures))
    assert torch.equal(generator.embed(clip.images(pictures)), clip.images(pictures))
    assert torch.allclose(generator(pictures, n=2, seed=1), generator(clip.images(pictures), n=2, seed=1), atol=1e-5)
    scores = generator.similarity(pictures, "a red circle")
    assert torch.allclose(scores, (clip.images(pictures) @ clip.texts(["a red circle"]).T)[:, 0])
    for wrong in (pictures[0], pictures[:, :1], clip.images(pictures)[:, :-1]):
        with pytest.raises(ClipgenError, match="neither images"):
            generator(wrong)


def test_an_export_takes_nobody_elses_folder(generator, tmp_path):
    generator.export(tmp_path / "out")
    generator.export(tmp_path / "out")  # an earlier export is replaced
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ClipgenError, match="holds other things"):
        generator.export(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("broken", ["absent", "empty", "weights"])
def test_what_is_no_generator_is_one_sentence(generator, tmp_path, broken, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "out"
    if broken == "empty":
        folder.mkdir()
    if broken == "weights":
        generator.export(folder)
        (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ClipgenError, match="is no generator that can be read here .*: give 'shapes'"):
        TextToImage.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "entries"),
    [
        ("clip", {"device": "cuda"}),
        ("clip", {"name": ["shapes"]}),
        ("transformer", {"clip_dim": None}),
        ("transformer", {"n_tokens": -1}),
        ("transformer", {"codebook_size": 10**400}),
        ("vqgan", {"channels": 100_000}),
        ("transformer", {"width": 2**30, "heads": 2}),
    ],
)
def test_a_generator_of_other_sizes_is_refused_before_it_is_built(generator, tmp_path, part, entries):
    """100,000 channels are terabytes: nothing of that kind is asked for."""
    generator.export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config[part] |= entries
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    with pytest.raises(ClipgenError) as refusal:
        assert TextToImage.from_pretrained(tmp_path / "out").clip
    assert "memory" not in str(refusal.value) and len(str(refusal.value)) < 600 and time.perf_counter() - start < 10


def test_a_generator_without_one_of_its_weights_is_none(generator, tmp_path):
    generator.export(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        p.dtype == torch.float32 and p.device.type == "cpu"
        for p in TextToImage.from_pretrained(tmp_path / "out").parameters()
    )
    del tensors["transformer.head.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ClipgenError, match="transformer.head.weight"):
        TextToImage.from_pretrained(tmp_path / "out")
