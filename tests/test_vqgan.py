from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clipgen_lib.config import load_preset
from clipgen_lib.runtime.checkpoints import save_weights
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.vqgan import VQGAN, VectorQuantizer, codebook_statistics, norm


@pytest.fixture(params=[True, False], ids=["cosine", "euclidean"])
def quantizer(request, preset):
    torch.manual_seed(0)
    return VectorQuantizer(replace(preset.vqgan, l2_norm=request.param))


def vectors(requires_grad=False):
    return torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


def test_nearest_code_by_hand(quantizer):
    z, codes = vectors(), quantizer.codes()
    found = quantizer(z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 8)
    flat = F.normalize(flat, dim=-1) if quantizer.l2_norm else flat
    assert torch.equal(found.tokens, torch.cdist(flat, codes).argmin(1).view(2, 4, 4))
    assert torch.allclose(found.codes, quantizer.lookup(found.tokens), atol=1e-6)


def test_each_loss_moves_its_own_side_and_both_are_equal_in_value(quantizer):
    z = vectors(requires_grad=True)
    found = quantizer(z)
    found.codebook_loss.backward()
    assert z.grad is None
    moved = quantizer.codebook.grad.abs().sum(1) > 0
    assert set(moved.nonzero().flatten().tolist()) <= set(found.tokens.flatten().tolist()) and moved.any()
    quantizer.codebook.grad = None
    found.commitment_loss.backward()
    assert z.grad.abs().sum() > 0 and quantizer.codebook.grad is None
    assert found.codebook_loss.item() == pytest.approx(found.commitment_loss.item(), rel=1e-6)


def test_gradient_passes_straight_through(preset):
    z, weight = vectors(requires_grad=True), torch.randn(2, 8, 4, 4)
    (VectorQuantizer(replace(preset.vqgan, l2_norm=False))(z).codes * weight).sum().backward()
    assert torch.allclose(z.grad, weight)


def test_ema_codes_become_the_mean_of_their_vectors(preset):
    changes = {"codebook_update": "ema", "codebook_decay": 0.0, "restart_after": 0}
    quantizer = VectorQuantizer(replace(preset.vqgan, l2_norm=False, **changes))
    found = quantizer(vectors())
    quantizer.update_codebook(found.vectors, found.tokens, torch.Generator())
    token = int(found.tokens.flatten()[0])
    mean = found.vectors[found.tokens == token].mean(0)
    assert torch.allclose(quantizer.codebook[token], mean, atol=1e-5)
    assert found.codebook_loss.item() == 0 and not quantizer.codebook.requires_grad


def test_dead_codes_restart_from_encoder_outputs_where_they_restart_at_all(quantizer):
    found, before = quantizer(vectors()), quantizer.codebook.detach().clone()
    used = torch.bincount(found.tokens.flatten(), minlength=len(before)) > 0
    for restart_after in (0, 0, 0, 0, 6, 6):
        assert torch.equal(quantizer.codebook, before)
        quantizer.restart_after = restart_after
        quantizer.update_codebook(found.vectors, found.tokens, torch.Generator())
    outputs = found.vectors.reshape(-1, 8)
    assert torch.equal(quantizer.codebook[used], before[used])
    assert all((outputs == code).all(1).any() for code in quantizer.codebook[~used])


def test_encode_and_decode_meet_their_contract(vqgan):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    tokens = vqgan.encode(images)
    assert tokens.shape == (2, 8, 8) and tokens.dtype == torch.int64 and tokens.max() < 32
    decoded, quantized = vqgan(images)
    assert torch.equal(quantized.tokens, tokens)
    assert torch.allclose(vqgan.decode(tokens), decoded.clamp(-1, 1), atol=1e-5)
    with pytest.raises(ClipgenError, match="do not divide by 8"):
        vqgan.encode(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize("mult, patch", [((1, 2, 2), 1), ((1, 1, 2, 2), 1), ((1, 1, 2, 2, 4), 1), ((1, 2), 4)])
def test_downsampling_factors(preset, mult, patch):
    config = replace(preset.vqgan, channel_mult=mult, patch=patch)
    assert config.factor == patch * 2 ** (len(mult) - 1)
    assert VQGAN(config).encode(torch.zeros(1, 3, 64, 64)).shape == (1, config.side, config.side)


@pytest.mark.parametrize("channels, groups", [(128, 32), (96, 32), (64, 32), (32, 32), (48, 12), (16, 4)])
def test_groups_of_the_norm(channels, groups):
    assert norm(channels, local=False).num_groups == groups


def test_a_gumbel_quantiser_is_not_trained(preset):
    with pytest.raises(ClipgenError, match="is not trained here"):
        VQGAN(replace(preset.vqgan, codebook_update="gumbel")).train()(torch.rand(2, 3, 64, 64))


def test_saved_weights_are_loaded_bit_equal_and_any_others_refused(vqgan, tmp_path):
    save_weights(tmp_path / "v", vqgan)
    images, path = torch.rand(1, 3, 64, 64), tmp_path / "v" / "model.safetensors"
    assert torch.equal(VQGAN.load(tmp_path / "v")(images)[0], vqgan(images)[0])
    changed = path.read_bytes()[:-400] + bytes(400)  # numbers like any others
    for content, sentence in ((b"broken", "is damaged"), (changed, "its SHA-256 differs from when it was written")):
        path.write_bytes(content)
        with pytest.raises(ClipgenError, match=sentence):
            VQGAN.load(tmp_path / "v")
    with pytest.raises(ClipgenError, match="missing"):
        VQGAN.load(tmp_path / "w")
    save_weights(tmp_path / "v", vqgan, codebook_size=64)
    with pytest.raises(ClipgenError, match="does not fit"):
        VQGAN.load(tmp_path / "v")


def test_codebook_statistics_by_hand():
    found = codebook_statistics(torch.tensor([2, 2, 0, 0, 0, 0, 0, 0]))
    assert found == pytest.approx({"codebook_usage": 0.25, "perplexity": 2.0})
    assert codebook_statistics(torch.ones(8))["perplexity"] == pytest.approx(8)


@pytest.mark.parametrize("local", [True, False])
def test_a_local_token_depends_on_its_own_square_alone(local):
    """The encoder's output at one position is the same whatever lies outside its square; without `local` it is not."""
    torch.manual_seed(0)
    encoder = VQGAN(replace(load_preset("smoke").vqgan, local=local, z_channels=16)).encoder.eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # residual branches begin at zero and would hide a difference
    images, changed = torch.rand(2, 1, 3, 64, 64)
    changed[..., 16:24, 8:16] = images[..., 16:24, 8:16]  # the square of row 2, column 1
    with torch.no_grad():
        same = torch.isclose(encoder(images), encoder(changed), atol=1e-6).all(1)[0]
    assert bool(same[2, 1]) == local and same.sum() == int(local)
