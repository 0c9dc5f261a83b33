"""Optimisers: which parameters are decayed, which are orthogonalised, and at what rate.

In: a module and the rate, decay and kind of its training. Out: a torch optimizer; `set_rate` is called before each step.
"""

from __future__ import annotations

import torch
from torch import nn

from .runs import ClipgenError

# Layers that read or write something other than features; an orthogonal update there means nothing (as in the first
# description of Muon, kellerjordan.github.io/posts/muon, embeddings and heads stay with AdamW).
_OUTER_LAYERS = ("conv_in", "conv_out", "quant_conv", "embedding", "condition", "modulation", "head")
_NEVER_DECAYED = ("codebook", "positions", "prefix")


def build_optimizer(module: nn.Module, kind: str, lr: float, beta2: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or Muon on the hidden layers and Nesterov AdamW on the rest.

    Muon (here timm's) replaces the momentum of a matrix or kernel by the nearest orthogonal matrix; scaled to AdamW's
    root mean square (arXiv 2502.16982) it shares AdamW's learning rate. Matrices and kernels decay; biases, norms,
    positions and the codebook do not.

    Raises:
        ClipgenError: unknown kind.
    """
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "outer": [], "undecayed": []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or any(part in name for part in _NEVER_DECAYED):
            groups["undecayed"].append(parameter)
        else:
            groups["outer" if any(part in name for part in _OUTER_LAYERS) else "hidden"].append(parameter)
    decays = {"hidden": weight_decay, "outer": weight_decay, "undecayed": 0.0}
    settings = {key: {"params": groups[key], "weight_decay": decay} for key, decay in decays.items() if groups[key]}
    if kind == "adamw":
        return torch.optim.AdamW(settings.values(), lr=lr, betas=(0.9, beta2), fused=True)
    if kind == "muon":
        from timm.optim import Muon

        settings = [{**group, "use_fallback": key != "hidden"} for key, group in settings.items()]
        return Muon(
            settings, lr=lr, betas=(0.9, beta2), adjust_lr_fn="match_rms_adamw", ns_steps=3, ns_coefficients="polar_express"
        )
    raise ClipgenError(f"unknown optimizer {kind!r}: choose adamw or muon")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
