"""What makes a CPU or a large codebook fast, apart from the method: each with the plain form that it is equal to.

This is the only file that uses private functions of another library, and each has a public way to the same values.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
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
    weights = dropout(scores.softmax(-1), dropout_p)
    return torch.bmm(weights.to(flat_v.dtype), flat_v).view(*q.shape[:-1], v.shape[-1])


def dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout` in training; on a CPU p is rounded to 1/256, and one random number of 64 bits decides of eight entries.

    Numbers are drawn one after the other there: one for each entry takes as long as all the rest of a step.
    """
    dropped = round(256 * p)
    if x.device.type != "cpu" or dropped in (0, 256):
        return F.dropout(x, p)
    numbers = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
    is_kept = numbers[: x.numel()].view(x.shape) >= dropped
    return x * is_kept.to(x.dtype).mul_(256 / (256 - dropped))


def nll_from_hidden(hidden: Tensor, head: nn.Linear, targets: Tensor, logits_at_once: int = 0) -> Tensor:
    """Mean negative log-likelihood in nats, a scalar: F.cross_entropy(head(hidden), targets) without all logits in memory.

    Over a codebook of 16,384 the float logits of a batch and their gradient outweigh every other tensor of a step, and writing
    and reading them takes as long as the blocks do. Here some rows of them at a time live in the cache, and what is kept for
    the backward pass is their gradient in the dtype of the weights: a quarter of the memory.

    Args:
        hidden: (..., E), in any dtype; under autocast it is computed in autocast's. targets: (...) int64 below K.
        logits_at_once: 0 takes what fits the cache of a CPU (8 MB), or a small part of a GPU's memory.
    """
    device = hidden.device.type
    is_cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_cast else hidden.dtype
    rows = max(1, (logits_at_once or (2**21 if device == "cpu" else 2**27)) // head.out_features)
    weight, bias = head.weight.to(dtype), head.bias.to(dtype)
    return _NLL.apply(hidden.flatten(0, -2).to(dtype), weight, bias, targets.flatten(), rows)


class _NLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, rows):
        log_likelihoods, grads = [], x.new_empty(len(x), len(weight))  # grads: softmax minus one-hot, of every logit
        for part, target, grad in zip(x.split(rows), targets.split(rows), grads.split(rows), strict=True):
            log_p, index = F.linear(part, weight, bias).float().log_softmax(-1), target[:, None]
            log_likelihoods.append(log_p.gather(1, index).sum())
            log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0))
            grad.copy_(log_p)
        ctx.save_for_backward(x, weight, grads)
        return -sum(log_likelihoods) / len(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, grads = ctx.saved_tensors
        scale = gradient / len(x)
        bias_grad = x.new_ones(1, len(x)) @ grads  # `sum` would copy them all to add them up in float32
        return (grads @ weight).mul_(scale), grads.T @ (x * scale).to(x.dtype), bias_grad[0].mul_(scale), None, None


class PackedLinear:
    """A linear layer for few rows at a time, without gradients: y = x W^T + b.

    On a CPU the weights are a copy in the layout of oneDNN's kernels, which read 4 to 64 rows' worth of them up to three
    times as fast as plain ones; elsewhere, and in a dtype that oneDNN does not know here, they are the layer's own.
    """

    rows = 16  # the layout is chosen for; for fewer than 4 oneDNN takes one that is slower at every number of rows

    def __init__(self, layer: nn.Linear):
        self.weight, self.bias = layer.weight.detach(), layer.bias.detach()
        self.is_packed = packs(self.weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.rows)

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        """(B, E) to (B, F), with GELU by the error function where asked for."""
        if not self.is_packed:
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y) if gelu else y
        activation = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *activation)

    def add(self, x: Tensor, to: Tensor) -> Tensor:
        """The layer's output on top of `to` (B, F)."""
        if not self.is_packed:
            return to + F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.binary(x, to, self.weight, self.bias, "add")


def packs(weight: Tensor) -> bool:
    """Whether this build of torch has oneDNN's kernels for such a weight on this machine."""
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if weight.device.type != "cpu" or not all(hasattr(torch.ops.mkldnn, name) for name in needed):
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or weight.dtype == torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16. A CPU without such instructions emulates it, a hundred times slower than float32."""
    if device.type != "cpu":
        return True
    if hasattr(torch.cpu, "get_capabilities"):  # since torch 2.10
        return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """`module.compile()`, where torch.compile works: it needs a C++ compiler, which not every machine has."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        module.compile()
    except Exception as error:  # a missing compiler, header or backend each raises its own
        why = f"torch.compile does not work on this machine ({type(error).__name__})"
        warnings.warn(f"{why}, only slower without: a C++ compiler and Python's headers mend it", stacklevel=2)


def largest(values: Tensor, k: int) -> Tensor:
    """The k largest of each row (B, K), falling: (B, k).

    On a CPU by numpy, whose partition and sort use the vector units: ten times as fast as torch's at K = 16,384.
    """
    if values.device.type != "cpu":
        return values.topk(k, dim=-1).values
    rows, rest = values.numpy(), values.shape[-1] - k
    rows = np.partition(rows, rest, axis=-1)[..., rest:] if rest else rows
    return torch.from_numpy(np.sort(rows, axis=-1)[..., ::-1].copy())
