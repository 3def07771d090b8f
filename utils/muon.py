"""Muon: momentum whose update has all its singular values made one."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steep at 0: five steps bring 0.01 to about 1
STEPS, MOMENTUM = 5, 0.95


def orthogonalize(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, roughly: singular values end between 0.7 and 1.2.

        X <- a X + (b X X^T + c (X X^T)^2) X,  five times, from X / ||X||

    Args:
        matrices: (n, rows, columns).
    Returns:
        (n, rows, columns).
    Source: Jordan et al. 2024, "Muon". Departure: float32 on a CPU, bfloat16 on a GPU as there.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    a, b, c = NEWTON_SCHULZ
    for _ in range(STEPS):
        gram = x @ x.mT  # (n, rows, rows), the shorter side
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for convolution kernels that batch norm follows.

        v <- momentum v + g,   u = orthogonalize(g + momentum v)
        w <- w sqrt(rows) / ||w|| - lr max(1, rows / columns)^0.5 u

    on each kernel as a matrix (out, in * height * width). What follows such a kernel does not see
    its length, so it is kept constant and `lr` is a relative step. Kernels of one shape are worked
    on together.

    Args:
        params: kernels, at least two-dimensional.
        lr: peak 0.05 to 0.2.
    Source: Jordan et al. 2024; the constant length is airbench's (Jordan 2024).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float | Tensor) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all kernels that have a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, kernels in alike.items():
                self._update(shape, kernels, group["lr"])

    def _update(self, shape: torch.Size, kernels: list[nn.Parameter], lr: float | Tensor) -> None:
        for p in kernels:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in kernels]
        grads = [p.grad for p in kernels]
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, grads)
        ahead = torch._foreach_add(grads, momenta, alpha=MOMENTUM)
        updates = orthogonalize(torch.stack([g.flatten(1) for g in ahead]))
        rows, columns = updates.shape[1:]
        updates = updates * (lr * max(1.0, rows / columns) ** 0.5)
        for p, update in zip(kernels, updates, strict=True):
            p.mul_(rows**0.5 / p.norm()).sub_(update.view(shape))
