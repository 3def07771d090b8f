"""Cross-quantized contrastive loss, the objective of SPQ."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.nt_xent import _float, check_pairs, nt_xent

VARIANTS = ("released", "paper")


def cqc_loss(
    x_a: Tensor, x_b: Tensor, z_a: Tensor, z_b: Tensor, tau: float, variant: str = "released"
) -> Tensor:
    """Cross-quantized contrastive loss between two views a, b of the same B images.

    released:  NTXent([x_a; z_b]) + NTXent([x_b; z_a])
               x-x and z-z pairs are negatives too, see `losses.nt_xent.nt_xent`.
    paper:     CE(cos(x_a, z_b) / tau, diagonal) + CE(cos(x_b, z_a) / tau, diagonal)
               descriptors of one view meet only quantized descriptors of the other.

    Args:
        x_a, x_b: (B, D) descriptors of the two views.
        z_a, z_b: (B, D) quantized descriptors of the two views.
        tau: tau_cqc, divides the cosine (`--contrastive_temperature`).
        variant: "released" (the authors' code) or "paper" (equations 4 to 6).
    Returns:
        Scalar, in nats: the sum over the two directions, each a mean over its rows.
    Raises:
        ValueError: if shapes differ, tau is not positive or the variant is unknown.
    Source: SPQ, section 3.3. Departures: none; paper and code differ, both are given.
    """
    check_pairs(x_a, x_b, z_a, z_b, tau=tau)
    if variant == "released":
        return nt_xent(x_a, z_b, tau) + nt_xent(x_b, z_a, tau)
    if variant == "paper":
        return _cross_entropy(x_a, z_b, tau) + _cross_entropy(x_b, z_a, tau)
    raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")


def _cross_entropy(x: Tensor, z: Tensor, tau: float) -> Tensor:
    """Rows of x find their z among the B of the batch: mean cross-entropy, diagonal targets."""
    with torch.autocast(x.device.type, enabled=False):
        sim = F.normalize(_float(x), dim=1) @ F.normalize(_float(z), dim=1).T / tau  # (B, B)
        return F.cross_entropy(sim, torch.arange(x.shape[0], device=x.device))
