import pytest
import torch

from clipgen_lib import sample
from clipgen_lib.config import SampleConfig
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.sample import filter_logits, generate, guidance_at, mean_of_nearest, slerp

PLAIN = SampleConfig(guidance=1.0)


@pytest.fixture(scope="module")
def embeds(clip):
    return clip.texts(["a red circle", "a blue star"])


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
    rng = torch.Generator().manual_seed(top_k)
    logits = torch.randn(4, 300, generator=rng, dtype=dtype) * 2
    logits = logits.round() / 2 if ties else logits  # about 15 different values
    assert torch.equal(filter_logits(logits, 0.8, top_k, top_p), filter_by_sorting(logits, 0.8, top_k, top_p))


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}])
def test_impossible_filters_are_refused(bad):
    with pytest.raises(ClipgenError, match="use"):
        filter_logits(torch.zeros(1, 4), **bad)


def test_sampled_tokens_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    tokens = sample.sample_token(probabilities.log().expand(10_000, 4), uniform)
    shares = torch.bincount(tokens, minlength=4) / 10_000
    assert torch.allclose(shares, probabilities, atol=1e-3) and shares[1] == 0


def test_guided_sampling_is_that_of_a_loop_without_a_cache_with_schedule_and_known_tokens(transformer, embeds):
    noise, tokens = sample.seeded_uniforms([3, 4], 64, torch.device("cpu")), torch.zeros(2, 64, dtype=torch.long)
    tokens[:, :5] = known = torch.arange(10).view(2, 5)
    settings = SampleConfig(guidance=4.0, guidance_schedule="cosine", top_p=0.8)
    with torch.inference_mode():
        for i in range(5, 64):
            c, u = (transformer(e, tokens[:, : i + 1])[:, -1] for e in (embeds, torch.zeros_like(embeds)))
            logits = u + guidance_at(i, 64, settings) * (c - u)
            tokens[:, i] = sample.sample_token(filter_logits(logits, top_p=0.8), noise[:, i])
    assert torch.equal(generate(transformer, embeds, [3, 4], settings, known=known), tokens)


def test_guidance_schedules_by_hand():
    for settings, scales in (
        ({}, [3, 3, 3, 3, 3]),
        ({"guidance_schedule": "linear"}, [1, 1.5, 2, 2.5, 3]),
        ({"guidance_schedule": "cosine"}, [1, 1.292893, 2, 2.707107, 3]),
        ({"guidance_interval": (0.25, 0.5)}, [1, 3, 3, 1, 1]),
    ):
        config = SampleConfig(guidance=3.0, **settings)
        assert [round(guidance_at(i, 5, config), 6) for i in range(5)] == scales
    assert guidance_at(0, 1, SampleConfig(guidance=3.0)) == 3


def test_a_schedule_of_scale_one_is_no_guidance(transformer, embeds):
    plain = generate(transformer, embeds, [1, 2], PLAIN)
    for settings in (
        {"guidance": 1.0, "guidance_schedule": "linear"},
        {"guidance": 4.0, "guidance_interval": (0.0, 1e-9), "guidance_schedule": "cosine"},
    ):
        assert torch.equal(generate(transformer, embeds, [1, 2], SampleConfig(**settings)), plain)
    guided = generate(transformer, embeds, [1, 2], SampleConfig(guidance=4.0, guidance_interval=(0.5, 1.0)))
    assert torch.equal(guided[:, :32], plain[:, :32]) and not torch.equal(guided, plain)


@pytest.mark.parametrize("k", [1, 4])
def test_projection_is_the_mean_of_the_nearest(embeds, k):
    bank = torch.nn.functional.normalize(torch.randn(50, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    for row, embed in zip(mean_of_nearest(embeds, bank, k), embeds, strict=True):
        mean = bank[(bank @ embed).argsort(descending=True)[:k]].mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)
    assert torch.allclose(mean_of_nearest(bank[:3], bank, 1), bank[:3], atol=1e-6)


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


def test_tokens_come_one_by_one(transformer, clip):
    embeds, settings = clip.texts(["a red circle", "a blue star", "x"]), SampleConfig(guidance=2.0, batch_size=2)
    previews = [tokens.clone() for tokens in sample.generate_tokens(transformer, embeds, [1, 2, 3], settings)]
    whole = generate(transformer, embeds, [1, 2, 3], settings)
    assert len(previews) == 2 * 64 and torch.equal(previews[-1], whole)
    for step, preview in enumerate(previews, start=1):  # two rows in the first batch, one in the second
        sampled = torch.tensor([[min(step, 64)], [min(step, 64)], [max(step - 64, 0)]]) > torch.arange(64)
        assert torch.equal(preview, torch.where(sampled, whole, -1))


def test_slerp_goes_along_the_great_circle(embeds):
    a, b = embeds.split(1)
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


def test_calls_that_make_no_sense(transformer, embeds):
    whole, size = torch.zeros(2, 64, dtype=torch.long), transformer.codebook_size
    for seeds, known, sentence in (
        ([0], None, "one for each"),
        ([0, 1], whole, "a row for each of the 2"),
        ([0, 1], whole[:1, :8], "a row for each of the 2"),
        ([0, 1], whole[:, :8] - 1, "outside 0 to 31"),
        ([0, 1], whole[:, :8] + size, "outside 0 to 31"),
    ):
        with pytest.raises(ClipgenError, match=sentence):
            generate(transformer, embeds, seeds, PLAIN, known=known)
    with pytest.raises(ClipgenError, match="eval"):
        generate(transformer.train(), embeds, [0, 1], PLAIN)
