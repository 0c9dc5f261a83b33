import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from timm.optim.muon import zeropower_via_newtonschulz

from clipgen_lib.config import OptimConfig
from clipgen_lib.runtime.kernels import PackedLinear, attend, dropout, has_bf16, nll_from_hidden, packs
from clipgen_lib.runtime.muon import COEFFICIENTS, orthogonalised
from clipgen_lib.training import autocast


@pytest.mark.parametrize("logits_at_once", [7 * 20, 0])  # seven rows of 27 at a time, all of them
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_nll_in_parts_is_cross_entropy(logits_at_once, bfloat16):
    """Its value and every gradient."""
    torch.manual_seed(0)
    head, found = torch.nn.Linear(16, 20), []
    hidden, targets = torch.randn(3, 9, 16, requires_grad=True), torch.randint(0, 20, (3, 9))
    for in_parts in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            if in_parts:
                nll = nll_from_hidden(hidden, head, targets, logits_at_once)
            else:
                nll = F.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten())
        assert nll.dtype == torch.float32
        found.append([nll, *torch.autograd.grad(3 * nll, [hidden, head.weight, head.bias])])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= (2e-2 if bfloat16 else 2e-6) * theirs.norm() + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 4, 17])
def test_packed_layers_are_the_plain_ones(dtype, rows):
    """float64 is never packed: that is the way where oneDNN has no kernels."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(48, 33).to(dtype), torch.randn(rows, 48, dtype=dtype)
    to = torch.randn(rows, 33, dtype=dtype)
    atol = 0.03 if dtype == torch.bfloat16 else 1e-5
    with torch.inference_mode():
        packed, wanted = PackedLinear(layer), layer(x)
        assert packed.is_packed == packs(layer.weight) and not (packed.is_packed and dtype == torch.float64)
        assert torch.allclose(packed(x), wanted, atol=atol)
        assert torch.allclose(packed(x, gelu=True), F.gelu(wanted), atol=atol)
        assert torch.allclose(packed.add(x, to), wanted + to, atol=atol)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_formula_whatever_the_kernel(causal):
    """softmax(q k^T / sqrt(d)) v by hand, with and without autograd, and the same gradients from both kernels."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=rng) for _ in range(3))
    scores = q @ k.transpose(-1, -2) / 2
    wanted = (scores + (torch.full((5, 5), -torch.inf).triu(1) if causal else 0)).softmax(-1) @ v
    assert torch.allclose(attend(q, k, v, is_causal=causal), wanted, atol=1e-6)
    gradients = []
    for kernel in (attend, F.scaled_dot_product_attention):
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
    weights = dropout((q @ k.transpose(-1, -2) / 2).softmax(-1).flatten(0, 1), 0.5).view(2, 3, 5, 5)
    assert torch.allclose(dropped, weights @ v, atol=1e-6) and (weights == 0).any()


def test_a_machine_that_cannot_compile_says_so_and_goes_without(tmp_path):
    """In a process of its own, since torch reads the name of the compiler once."""
    program = "import torch; from clipgen_lib.runtime.kernels import compile_in_place; layer = torch.nn.Linear(3, 2); "
    program += "compile_in_place(layer, torch.device('cpu')); print(layer(torch.ones(1, 3)).shape)"
    # no pool of processes, for whose end torch waits, and no cache, for whose key torch 2.6 hashes all of Triton
    settings = {"CACHE_DIR": str(tmp_path), "COMPILE_THREADS": "1", "FX_GRAPH_CACHE": "0"}
    environment = {**os.environ, "CXX": "/nowhere/c++"} | {f"TORCHINDUCTOR_{k}": v for k, v in settings.items()}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "torch.compile does not work on this machine" in done.stderr and "torch.Size([1, 2])" in done.stdout


def test_a_training_computes_in_bfloat16_only_where_the_device_does():
    device = torch.device("cpu")
    weight = torch.ones(2, 2)
    with autocast(OptimConfig(precision="bf16"), device):
        assert (weight @ weight).dtype == (torch.bfloat16 if has_bf16(device) else torch.float32)
    with autocast(OptimConfig(precision="no"), device):
        assert (weight @ weight).dtype == torch.float32
    assert has_bf16(torch.device("cuda"))


def test_orthogonalised_matrices_keep_their_singular_vectors_and_agree_with_those_of_timm():
    rng = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 16, 24, generator=rng)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalised(matrices)
    assert torch.allclose(found, orthogonalised(matrices.mT).mT, atol=1e-6)
    core = u.mT @ found @ vt.mT  # in the matrices' own singular vectors: about 1 on the diagonal, nothing beside it
    diagonal = torch.diagonal(core, dim1=-2, dim2=-1)
    rounding = 0.15 if has_bf16(core.device) else 1e-4
    assert (
        diagonal.min() > 0.17 and diagonal.max() < 1.95 and (core - torch.diag_embed(diagonal)).abs().max() < rounding
    )
    steps = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in COEFFICIENTS]
    theirs = torch.stack([zeropower_via_newtonschulz(x, 3, steps, dtype=torch.float32) for x in matrices])
    assert (found - theirs).abs().max() < rounding


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_its_share_and_passes_gradients(p):
    torch.manual_seed(0)
    x = torch.ones(1_001, 999, requires_grad=True)
    y = dropout(x, p)
    y.sum().backward()
    assert abs((y == 0).float().mean().item() - p) < 0.004 and abs(y.mean().item() - 1) < 0.02
    assert torch.equal(x.grad, y.detach()) and len(y.unique()) == 2  # what is kept is scaled, alike in both directions
    kept = (y.detach() > 0).float()
    assert abs(torch.corrcoef(torch.stack([kept[:, :-1].flatten(), kept[:, 1:].flatten()]))[0, 1].item()) < 0.005
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p), y)  # a function of the global generator


def test_dropout_of_nothing_and_of_all():
    x = torch.randn(5, 7)
    assert torch.equal(dropout(x, 0.0), x) and not dropout(x, 1.0).any()
