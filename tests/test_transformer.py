from dataclasses import replace

import pytest
import torch

from clipgen_lib import transformer
from clipgen_lib.config import TransformerConfig
from clipgen_lib.runtime.checkpoints import save_weights
from clipgen_lib.runtime.kernels import PackedLinear, attend, packs
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.sample import Decoder
from clipgen_lib.transformer import ImageTransformer, KVCache

SMALL = TransformerConfig(layers=2, width=32, heads=2, condition_tokens=1)


def build(**changes):
    torch.manual_seed(0)
    model = ImageTransformer(replace(SMALL, **changes), codebook_size=20, n_tokens=9, clip_dim=8)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    for block in model.blocks:
        if block.modulation is not None:  # gates begin shut
            torch.nn.init.normal_(block.modulation.weight, std=0.5)
    return model.eval()


def inputs(batch=3):
    draw = torch.Generator().manual_seed(2)
    return torch.nn.functional.normalize(torch.randn(batch, 8, generator=draw), dim=1), torch.randint(
        0, 20, (batch, 9), generator=draw
    )


@pytest.mark.parametrize("part", [7 * 20, 2**21])  # logits at a time: seven rows of 27, all of them
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_likelihood_in_parts_is_cross_entropy(part, bfloat16, monkeypatch):
    """Its value and every gradient, also where the logits of some rows have a say of their own."""
    monkeypatch.setattr(transformer._Likelihood, "part", part)
    model, (embeds, tokens), rows, found = build(condition_tokens=4).train(), inputs(), torch.tensor([0, 2]), []
    for in_parts in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            if in_parts:
                nll, logits = model(embeds, tokens, logits_of=rows)
            else:
                whole = model(embeds, tokens)
                nll, logits = torch.nn.functional.cross_entropy(whole.flatten(0, 1), tokens.flatten()), whole[rows]
        assert logits.shape == (2, 9, 20) and logits.dtype == nll.dtype == torch.float32
        gradients = torch.autograd.grad(3 * nll + logits.pow(2).mean(), list(model.parameters()))
        found.append([nll, logits, *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= (2e-2 if bfloat16 else 2e-6) * theirs.norm() + 1e-9
    assert torch.equal(
        model(embeds, tokens, logits_of=rows[:0])[0].detach(), model(embeds, tokens, logits_of=rows)[0].detach()
    )


@pytest.mark.parametrize("conditioning", ["prefix", "adaln"])
@pytest.mark.parametrize("condition_tokens", [1, 4])
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 4], [9]])
def test_cached_and_uncached_agree(conditioning, condition_tokens, chunks):
    model, (embeds, tokens) = build(conditioning=conditioning, condition_tokens=condition_tokens), inputs()
    whole, cache, parts, known = model(embeds, tokens), KVCache(model, 3), [], 0
    for chunk in chunks:
        known += chunk
        parts.append(model(embeds, tokens[:, :known], cache))
    assert whole.shape == (3, 9, 20)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["prefix", "adaln", "words"])
@pytest.mark.parametrize("known", [0, 1, 5])
def test_decoding_agrees_with_forward(conditioning, known):
    model, (embeds, tokens) = build(conditioning=conditioning, condition_tokens=4), inputs()
    if conditioning == "words":
        embeds = torch.arange(12).view(3, 4) % 8
    with torch.inference_mode():
        whole, decoder = model(embeds, tokens), Decoder(model)
        for _ in range(2):  # a second batch begins anew
            parts = [decoder.start(embeds, tokens[:, :known])]
            parts += [decoder.step(tokens[:, i]) for i in range(known, 8)]
            assert torch.allclose(torch.stack(parts, 1), whole[:, known:], atol=1e-5)
        assert torch.allclose(decoder.start(embeds[:1], tokens[:1, :0]), whole[:1, 0], atol=1e-5)


def test_decoding_in_bfloat16_is_near_float32():
    model, (embeds, tokens) = build(condition_tokens=4), inputs()
    with torch.inference_mode():
        whole, decoder = model(embeds, tokens), Decoder(model.bfloat16())
        parts = [decoder.start(embeds, tokens[:, :2])] + [decoder.step(tokens[:, i]) for i in range(2, 8)]
        found = torch.stack(parts, 1)
    assert found.dtype == torch.float32 and (found - whole[:, 2:]).abs().max() < 0.02 * whole.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 4, 17])
def test_packed_layers_are_the_plain_ones(dtype, rows):
    """float64 is never packed: that is the way where oneDNN has no kernels."""
    torch.manual_seed(0)
    layer, x, to = (
        torch.nn.Linear(48, 33).to(dtype),
        torch.randn(rows, 48, dtype=dtype),
        torch.randn(rows, 33, dtype=dtype),
    )
    atol = 0.03 if dtype == torch.bfloat16 else 1e-5
    with torch.inference_mode():
        packed, wanted = PackedLinear(layer), layer(x)
        assert packed.is_packed == packs(layer.weight) and not (packed.is_packed and dtype == torch.float64)
        assert torch.allclose(packed(x), wanted, atol=atol)
        assert torch.allclose(packed.gelu(x), torch.nn.functional.gelu(wanted), atol=atol)
        assert torch.allclose(packed.add(x, to), wanted + to, atol=atol)


def test_position_i_sees_only_what_comes_before():
    model, (embeds, tokens) = build(), inputs()
    before = model(embeds, tokens)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 20
    after = model(embeds, changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.allclose(before[:, 6:], after[:, 6:])
    changed = tokens.clone()
    changed[:, -1] = 0
    assert torch.equal(model(embeds, changed), before)  # the last token is predicted, never read


@pytest.mark.parametrize("conditioning", ["prefix", "adaln"])
def test_every_position_sees_the_condition(conditioning):
    model, (embeds, tokens) = build(conditioning=conditioning, condition_tokens=2), inputs()
    assert ((model(embeds, tokens) - model(embeds.flip(0), tokens)).abs().amax(-1)[0] > 1e-4).all()


def test_adaptive_blocks_begin_as_nothing():
    torch.manual_seed(0)
    model, (embeds, tokens) = ImageTransformer(replace(SMALL, conditioning="adaln"), 20, 9, 8).eval(), inputs()
    assert torch.equal(model(embeds, tokens), model(embeds.flip(0), tokens))  # no gate open, no condition heard
    model(embeds, tokens).pow(2).mean().backward()
    assert model.blocks[0].modulation.weight.grad.abs().sum() > 0  # but the gates learn


def test_mode_does_not_change_meaning():
    model, (embeds, tokens) = build(), inputs()
    assert torch.allclose(model.train()(embeds, tokens), model.eval()(embeds, tokens), atol=1e-6)
    dropping = build(dropout=0.5)
    assert not torch.allclose(dropping.train()(embeds, tokens), dropping.eval()(embeds, tokens))


@pytest.mark.parametrize("conditioning", ["prefix", "adaln"])
def test_gradient_checkpointing_gives_the_same_gradients(conditioning):
    gradients = []
    for checkpointing in (False, True):
        model, (embeds, tokens) = (
            build(conditioning=conditioning, gradient_checkpointing=checkpointing).train(),
            inputs(),
        )
        model(embeds, tokens).pow(2).mean().backward()
        gradients.append(model.blocks[0].qkv.weight.grad)
    assert torch.allclose(*gradients, atol=1e-7)


def test_too_many_tokens_is_one_sentence():
    with pytest.raises(ClipgenError, match="12 tokens given to a transformer of 9"):
        build()(inputs()[0], torch.zeros(3, 12, dtype=torch.long))


def test_saved_and_loaded_is_bit_equal(tmp_path):
    model, (embeds, tokens) = build(), inputs()
    save_weights(tmp_path / "t", model, trained_with={"vqgan": "x"})
    assert torch.equal(ImageTransformer.load(tmp_path / "t")(embeds, tokens), model(embeds, tokens))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_formula_whatever_the_kernel(causal):
    """softmax(q k^T / sqrt(d)) v by hand, with and without autograd, and the same gradients from both kernels."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=draw) for _ in range(3))
    scores = q @ k.transpose(-1, -2) / 2
    wanted = (scores + (torch.full((5, 5), -torch.inf).triu(1) if causal else 0)).softmax(-1) @ v
    assert torch.allclose(attend(q, k, v, is_causal=causal), wanted, atol=1e-6)
    gradients = []
    for kernel in (attend, torch.nn.functional.scaled_dot_product_attention):
        leaf = q.clone().requires_grad_()
        h = kernel(leaf, k, v, is_causal=causal)
        assert torch.allclose(h, wanted, atol=1e-6)
        h.pow(2).sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, atol=1e-5)


def test_attention_under_autograd_drops_weights():
    q, k, v = torch.randn(3, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    dropped = attend(q.requires_grad_(), k, v, dropout_p=0.5)
    torch.manual_seed(1)
    weights = torch.nn.functional.dropout((q @ k.transpose(-1, -2) / 2).softmax(-1).flatten(0, 1), 0.5).view(2, 3, 5, 5)
    assert torch.allclose(dropped, weights @ v, atol=1e-6) and (weights == 0).any()
