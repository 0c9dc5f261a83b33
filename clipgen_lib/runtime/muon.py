"""Muon: the momentum of a weight matrix, replaced by the nearest orthogonal matrix (kellerjordan.github.io/posts/muon).

Matrices of one shape are orthogonalised together, since those of a small model take longer to call than to multiply. That, and
`parts`, is what this class has beyond timm's.
"""

import torch
from torch import Tensor, nn

from .kernels import has_bf16

# Of x -> a x + b x^3 + c x^5 on the singular values, the first three steps from [1e-3, 1] towards 1 (Polar Express,
# arXiv 2505.16932), which the paper applies to x / 1.01, against rounding in bfloat16. Five steps train no better here.
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, (..., m, n): singular values of 0.002 to 1 times the norm come to 0.18 to 1.9.

    Computed in bfloat16 where the device does, in float32 elsewhere; returns float32.
    """
    x = matrices.to(torch.bfloat16 if has_bf16(matrices.device) else torch.float32)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x  # the smaller of the two products
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in COEFFICIENTS:
        x = x / 1.01
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if is_tall else x).float()


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with `parts` > 0, fused AdamW for those with 0.

    `parts` is of how many matrices, one below the other, each parameter of the group consists: 3 of fused queries, keys and
    values, which are orthogonalised each by itself. A convolution counts as the matrix (out, in x height x width). An update
    is scaled to AdamW's root mean square (arXiv 2502.16982), so that both share their learning rate.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], momentum: float = 0.95):
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"] if group["parts"] else ():
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step(parameters, group)
        super().step()

    def _step(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Of parameters of one shape; without its gradient AdamW then leaves a parameter as it is."""
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:  # the step is AdamW's, which looks for it when a state is loaded
                state.update(step=torch.zeros(()), momentum=torch.zeros_like(parameter))
            momentum = state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
            updates.append(parameter.grad.lerp(momentum, self.momentum).flatten(1))  # Nesterov's
            parameter.grad = None
        stacked = torch.stack(updates)
        matrices = stacked.view(len(updates) * group["parts"], -1, stacked.shape[-1])
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
        for parameter, update in zip(parameters, orthogonalised(matrices).view_as(stacked), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)
