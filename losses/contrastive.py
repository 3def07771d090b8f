"""Plain contrastive learning without the cross comparison (ablation SPQ-C)."""

from torch import Tensor

from losses.nt_xent import check_pairs, nt_xent


def contrastive_loss(x_a: Tensor, x_b: Tensor, z_a: Tensor, z_b: Tensor, tau: float) -> Tensor:
    """NTXent([x_a; x_b]) + NTXent([z_a; z_b]): like with like, never x with z.

    Args and errors as `losses.cqc.cqc_loss`.

    Source: SPQ, ablation SPQ-C. Departure: the paper does not spell the variant out; the term on
    x alone would leave the codebooks without a gradient, so z gets its own.
    """
    check_pairs(x_a, x_b, z_a, z_b, tau=tau)
    return nt_xent(x_a, x_b, tau) + nt_xent(z_a, z_b, tau)
