import pytest
import torch

from clipgen_lib.config import TransformerConfig, VQGANConfig
from clipgen_lib.runtime.runs import ClipgenError
from clipgen_lib.training import build_optimizer
from clipgen_lib.transformer import ImageTransformer
from clipgen_lib.vqgan import VQGAN

SMALL = VQGANConfig(image_size=16, patch=2, channels=8, channel_mult=(1, 1), z_channels=8, codebook_size=16)


def names_in(module, optimizer, chosen):
    found = {id(p) for group in optimizer.param_groups if chosen(group) for p in group["params"]}
    return {name for name, p in module.named_parameters() if id(p) in found}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_trained_parameter_once_and_decay_where_it_belongs(kind):
    for module in (VQGAN(SMALL), ImageTransformer(TransformerConfig(2, 8, 2), 16, 4, 8)):
        optimizer = build_optimizer(module, kind, 1e-3, 0.9, 0.1)
        listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in module.parameters() if p.requires_grad)
        spared = names_in(module, optimizer, lambda group: group["weight_decay"] == 0)
        assert all(
            p.ndim < 2 or "codebook" in n or "positions" in n for n, p in module.named_parameters() if n in spared
        )
        assert all(n in spared for n, p in module.named_parameters() if p.ndim < 2)


def test_muon_steps_are_orthogonal_in_hidden_layers_only():
    torch.manual_seed(0)
    transformer = ImageTransformer(TransformerConfig(1, 8, 2), 16, 4, 8)
    optimizer = build_optimizer(transformer, "muon", 0.1, 0.9, 0.0)
    before = {n: p.detach().clone() for n, p in transformer.named_parameters()}
    for parameter in transformer.parameters():
        parameter.grad = torch.randn_like(parameter)
        if parameter.ndim == 2:  # a gradient far from orthogonal: each column a third of the one before
            parameter.grad *= 3.0 ** -torch.arange(parameter.shape[1])
    optimizer.step()
    hidden = names_in(transformer, optimizer, lambda group: not group["use_fallback"])
    assert hidden == {f"blocks.0.{n}.weight" for n in ("qkv", "proj", "fc1", "fc2")}
    step = {n: p.detach() - before[n] for n, p in transformer.named_parameters() if n in hidden}

    def spread(matrix):
        values = torch.linalg.svdvals(matrix)
        return (values[0] / values[4]).item()  # the largest to the fifth; further ones are lost in bfloat16

    for name, parameter in transformer.named_parameters():
        if name in hidden:
            assert spread(step[name]) < 0.2 * spread(parameter.grad), name
    # the scale of the arXiv 2502.16982 form is 0.2 lr, AdamW's first step on every entry is lr
    assert all(0.01 < step[name].pow(2).mean().sqrt().item() < 0.04 for name in hidden)
    outer = (transformer.head.weight.detach() - before["head.weight"]).abs()
    assert outer.min() > 0.09 and outer.max() < 0.11


def test_unknown_optimizer_is_one_sentence():
    with pytest.raises(ClipgenError, match="choose adamw or muon"):
        build_optimizer(torch.nn.Linear(2, 2), "sgd", 1.0, 0.9, 0.0)
