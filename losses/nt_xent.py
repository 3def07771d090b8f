"""NT-Xent, the contrastive loss of SimCLR, over a set of 2B rows."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(u: Tensor, v: Tensor, tau: float) -> Tensor:
    """Normalised-temperature cross-entropy over the 2B rows of [u; v].

        sim[i, j] = cos(row_i, row_j) / tau
        loss = mean over the 2B rows i of  -log( exp(sim[i, i']) / sum_{j != i} exp(sim[i, j]) )

    where i' is the row's counterpart in the other half. All other rows are negatives, those of
    the same half too.

    Args:
        u, v: (B, D), row b of one is the positive of row b of the other.
        tau: temperature, divides.
    Returns:
        Scalar, in nats.
    Raises:
        ValueError: if the shapes differ or tau is not positive.
    Source: Chen et al. 2020 (SimCLR), equation 1. Departures: none.
    """
    check_pairs(u, v, tau=tau)
    B = u.shape[0]
    with torch.autocast(u.device.type, enabled=False):
        rows = F.normalize(_float(torch.cat([u, v])), dim=1)  # (2B, D)
        sim = rows @ rows.T / tau  # (2B, 2B); one matrix product, no (2B, 2B, D) tensor
        sim.fill_diagonal_(float("-inf"))  # a row is not its own negative
        counterpart = torch.arange(2 * B, device=u.device).roll(B)
        return F.cross_entropy(sim, counterpart)


def check_pairs(*tensors: Tensor, tau: float) -> None:
    """All tensors (B, D) of one shape and tau > 0, or ValueError."""
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"descriptors must all be (B, D) of one shape; got {shapes}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")


def _float(x: Tensor) -> Tensor:
    """At least float32: cosines and exponentials in bf16 lose the small differences."""
    return x if x.dtype == torch.float64 else x.float()
