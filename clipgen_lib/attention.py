"""Scaled dot-product attention by the kernel that is fastest where it runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """torch's `scaled_dot_product_attention`, same arguments; on a CPU under autograd by its plain matmul kernel.

    At the lengths of a picture (64 to 256 tokens) the fused CPU kernel is the slower one in the backward pass. A GPU
    and inference keep torch's own choice.
    """
    if q.device.type == "cpu" and q.requires_grad:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q, k, v, **options)
