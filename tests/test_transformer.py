from dataclasses import replace

import pytest
import torch

from clipgen_lib.config import TransformerConfig
from clipgen_lib.runtime.checkpoints import save_weights
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.sample import CachedDecoder
from clipgen_lib.transformer import ImageTransformer, KVCache, rotations, turned

SMALL = TransformerConfig(layers=2, width=32, heads=2, condition_tokens=1)
KINDS = [{}, {"rope": True}, {"qk_norm": True}, {"rope": True, "qk_norm": True}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def build(**changes):
    torch.manual_seed(0)
    model = ImageTransformer(replace(SMALL, **changes), codebook_size=20, n_tokens=9, clip_dim=8)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    for block in model.blocks:
        for norm in (block.q_norm, block.k_norm):
            for parameter in norm.parameters():
                torch.nn.init.normal_(parameter, 1.0, 0.5)
    return model.eval()


@pytest.fixture
def embeds():
    return torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=1)


@pytest.fixture
def tokens():
    return torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(2))


@every_kind
@pytest.mark.parametrize("condition_tokens", [1, 4])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 4], [9]])
def test_cached_and_uncached_agree(kind, condition_tokens, chunks, embeds, tokens):
    model = build(**kind, condition_tokens=condition_tokens)
    whole, cache, parts, known = model(embeds, tokens), KVCache(model, 3), [], 0
    for chunk in chunks:
        known += chunk
        parts.append(model(embeds, tokens[:, :known], cache))
    assert whole.shape == (3, 9, 20) and torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, {"conditioning": "words"}], ids=str)
@pytest.mark.parametrize("known", [0, 1, 5])
def test_decoding_agrees_with_forward(kind, known, embeds, tokens):
    model = build(**kind, condition_tokens=4)
    embeds = torch.arange(12).view(3, 4) % 8 if "words" in kind.values() else embeds
    with torch.inference_mode():
        whole, decoder = model(embeds, tokens), CachedDecoder(model)
        for _ in range(2):  # a second batch begins anew
            parts = [decoder.start(embeds, tokens[:, :known])]
            parts += [decoder.step(tokens[:, i]) for i in range(known, 8)]
            assert torch.allclose(torch.stack(parts, 1), whole[:, known:], atol=1e-5)
        assert torch.allclose(decoder.start(embeds[:1], tokens[:1, :0]), whole[:1, 0], atol=1e-5)


def test_decoding_in_bfloat16_is_near_float32(embeds, tokens):
    model = build(condition_tokens=4)
    with torch.inference_mode():
        whole, decoder = model(embeds, tokens), CachedDecoder(model.bfloat16())
        parts = [decoder.start(embeds, tokens[:, :2])] + [decoder.step(tokens[:, i]) for i in range(2, 8)]
        found = torch.stack(parts, 1)
    assert found.dtype == torch.float32 and (found - whole[:, 2:]).abs().max() < 0.02 * whole.abs().max()


def test_position_i_sees_only_what_comes_before(embeds, tokens):
    model, changed, last = build(), tokens.clone(), tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 20
    before, after = model(embeds, tokens), model(embeds, changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.allclose(before[:, 6:], after[:, 6:])
    last[:, -1] = 0
    assert torch.equal(model(embeds, last), before)  # the last token is predicted, never read


def test_every_position_sees_the_condition(embeds, tokens):
    model = build(condition_tokens=2)
    assert ((model(embeds, tokens) - model(embeds.flip(0), tokens)).abs().amax(-1)[0] > 1e-4).all()


def test_mode_does_not_change_meaning(embeds, tokens):
    for model, is_same in ((build(), True), (build(dropout=0.5), False)):
        assert torch.allclose(model.train()(embeds, tokens), model.eval()(embeds, tokens), atol=1e-6) == is_same


def test_gradient_checkpointing_gives_the_same_gradients(embeds, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = build(gradient_checkpointing=checkpointing).train()
        model(embeds, tokens).pow(2).mean().backward()
        gradients.append(model.blocks[0].qkv.weight.grad)
    assert torch.allclose(*gradients, atol=1e-7)


def test_too_many_tokens_is_one_sentence(embeds):
    with pytest.raises(ClipgenError, match="12 tokens for a transformer of 9"):
        build()(embeds, torch.zeros(3, 12, dtype=torch.long))


def test_saved_and_loaded_is_bit_equal(embeds, tokens, tmp_path):
    save_weights(tmp_path / "t", model := build(), trained_with={"vqgan": "x"})
    assert torch.equal(ImageTransformer.load(tmp_path / "t")(embeds, tokens), model(embeds, tokens))


def test_turned_queries_and_keys_agree_by_how_far_apart_their_tokens_are():
    side, config = 4, replace(SMALL, rope=True)
    qk = torch.randn(2, 1, 2, 1, 16, generator=torch.Generator().manual_seed(3)).expand(-1, -1, -1, side**2, -1)
    q, k = (turned(x, rotations(config, side**2)) for x in qk)
    scores = (q[0, 0] @ k[0, 0].T)[1:, 1:]  # of the tokens 0 to 14; position 0 reads the condition
    of = lambda row, column: row * side + column
    assert torch.allclose(scores[of(1, 0), of(0, 2)], scores[of(3, 1), of(2, 3)], atol=1e-5)
    assert torch.allclose(scores[of(0, 3), of(0, 1)], scores[of(3, 2), of(3, 0)], atol=1e-5)
    assert (scores[of(1, 0), of(0, 2)] - scores[of(0, 3), of(0, 1)]).abs() > 1e-2
    assert torch.equal(q[0, :, 0], qk[0, 0, :, 0]) and torch.allclose(
        q.norm(dim=-1), qk[0].norm(dim=-1)
    )  # a condition token does not turn
    with pytest.raises(ClipgenError, match="do not divide by 4, as rope needs"):
        replace(SMALL, width=12, rope=True)


def test_normalised_queries_and_keys_do_not_see_how_long_they_are(embeds, tokens):
    model = build(qk_norm=True)
    before = model(embeds, tokens)
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight[: 2 * SMALL.width] *= 3.0
            block.qkv.bias[: 2 * SMALL.width] *= 3.0
    assert torch.allclose(model(embeds, tokens), before, atol=5e-3)  # but for the epsilon under the root
    with torch.no_grad():
        model.blocks[0].q_norm.weight *= 3.0
    assert not torch.allclose(model(embeds, tokens), before, atol=1e-2)
