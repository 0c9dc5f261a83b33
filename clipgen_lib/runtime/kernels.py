"""Scaled dot-product attention by the kernel that is fastest where it runs."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """torch's `scaled_dot_product_attention`, same arguments; on a CPU under autograd by three plain matrix operations.

    At the lengths of an image (64 to 256 tokens) that is three times as fast, there and back, as torch's own kernels: the
    fused one is slow in the backward pass, and the plain one looks for rows that are masked as a whole, of which there are none.
    A GPU and inference keep torch's own choice.
    """
    if q.device.type != "cpu" or not q.requires_grad or attn_mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p)
    scale = q.shape[-1] ** -0.5
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    if is_causal:
        later = q.new_full((1, q.shape[-2], k.shape[-2]), float("-inf")).triu(1)
        scores = torch.baddbmm(later.expand(len(flat_q), -1, -1), flat_q, flat_k.transpose(1, 2), alpha=scale)
    else:
        scores = torch.bmm(flat_q * scale, flat_k.transpose(1, 2))
    weights = F.dropout(scores.softmax(-1), dropout_p)
    return torch.bmm(weights.to(flat_v.dtype), flat_v).view(*q.shape[:-1], v.shape[-1])


class _Likelihood(torch.autograd.Function):
    """F.cross_entropy(F.linear(x, weight, bias), targets), a part of the rows at a time.

    Over a codebook of 16,384 the float logits of a batch and their gradient outweigh every other tensor of a step, and writing
    and reading them takes as long as the blocks do. Here a part of them lives in the cache, and what is kept for the backward
    pass is their gradient in the dtype of the weights: a quarter of the memory.
    """

    part = 2**21  # logits at a time on a CPU: 8 MB
    part_on_gpu = 2**27

    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        rows = max(1, (_Likelihood.part_on_gpu if x.is_cuda else _Likelihood.part) // len(weight))
        likelihoods, slopes = [], x.new_empty(len(x), len(weight))
        for part, target, slope in zip(x.split(rows), targets.split(rows), slopes.split(rows), strict=True):
            found, chosen = F.linear(part, weight, bias).float().log_softmax(-1), target[:, None]
            likelihoods.append(found.gather(1, chosen).sum())
            found.exp_().scatter_add_(1, chosen, found.new_full(chosen.shape, -1.0))
            slope.copy_(found)
        ctx.save_for_backward(x, weight, slopes)
        return -sum(likelihoods) / len(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, slopes = ctx.saved_tensors
        scale = gradient / len(x)
        bias_gradient = x.new_ones(1, len(x)) @ slopes  # `sum` would copy them all to add them up in float32
        return (slopes @ weight).mul_(scale), slopes.T @ (x * scale).to(x.dtype), bias_gradient[0].mul_(scale), None


class PackedLinear:
    """A linear layer for few rows at a time, without gradients: y = x W^T + b.

    On a CPU the weights are a copy in the layout of oneDNN's kernels, which read 4 to 64 rows' worth of them up to three
    times as fast as plain ones; elsewhere, and in a dtype that oneDNN does not know here, they are the layer's own.
    """

    rows = (
        16  # that the layout is chosen for; with fewer than 4 oneDNN takes one that is slower at every number of rows
    )

    def __init__(self, layer: nn.Linear):
        self.weight, self.bias = layer.weight.detach(), layer.bias.detach()
        self.is_packed = packs(self.weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, E) to (B, F)."""
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU, by the error function, of the layer's output."""
        if not self.is_packed:
            return F.gelu(F.linear(x, self.weight, self.bias))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")

    def add(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        """The layer's output on top of `to` (B, F)."""
        if not self.is_packed:
            return to + F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.binary(x, to, self.weight, self.bias, "add")


def packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN has kernels for such a weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def compiled(module: nn.Module, device: torch.device) -> nn.Module:
    """`torch.compile`, tried on a sum first: it needs a C++ compiler, which not every machine has."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, header or backend each raises its own
        warnings.warn(
            f"torch.compile does not work on this machine ({type(error).__name__}): training runs without it, somewhat slower; a C++ compiler and Python's headers would mend it",
            stacklevel=3,
        )
        return module
    return torch.compile(module)


def apply(optimizers: list, valid: torch.Tensor) -> None:
    """One step of each optimiser; where `valid`, () bool, is False, weights and moments stay as they are."""
    for optimizer in optimizers:
        bare = getattr(optimizer, "optimizer", optimizer)
        sharded = isinstance(bare.param_groups[0]["params"][0], DTensor)
        if getattr(optimizer, "scaler", None) is not None:  # looks for itself
            optimizer.step()
        elif getattr(bare, "_step_supports_amp_scaling", False) and not sharded:  # looks on the device: nobody waits
            bare.grad_scale, bare.found_inf = None, (~valid).float()
            optimizer.step()
        elif bool(valid):
            optimizer.step()
        optimizer.zero_grad()


def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row (B, K), falling: (B, k).

    On a CPU by numpy, whose partition and sort use the vector units: ten times as fast as torch's at K = 16,384.
    """
    if values.device.type != "cpu":
        return values.topk(k, dim=-1).values
    rows, rest = values.numpy(), values.shape[-1] - k
    rows = np.partition(rows, rest, axis=-1)[..., rest:] if rest else rows
    return torch.from_numpy(np.sort(rows, axis=-1)[..., ::-1].copy())
