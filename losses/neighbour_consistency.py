"""Neighbour consistency of soft assignments, the objective of SPQ's second stage."""

import torch
from torch import Tensor


def neighbour_consistency_loss(
    assign: Tensor, neighbour_assign: Tensor, entropy_weight: float
) -> Tensor:
    """Assigns an image and its neighbour to the same codewords and keeps all codewords in use.

        agreement = mean over i, m of  log <p_m(x_i), p_m(x_j)>,   x_j a neighbour of x_i
        entropy   = mean over m of  H( mean over i of (p_m(x_i) + p_m(x_j)) / 2 )
        loss      = -agreement - entropy_weight * entropy

    p_m is the soft assignment of the m-th codebook: each codebook acts as one clustering head.
    The agreement is largest where both assignments are the same single codeword; the entropy H
    keeps a codebook from collapsing onto one codeword.

    Args:
        assign: (B, M, K) soft assignments of B images, rows summing to 1
            (`models.quantizer.ProductQuantizer.assign`).
        neighbour_assign: (B, M, K), of a neighbour of each.
        entropy_weight: lambda, multiplies the entropy (`--neighbour_entropy`).
    Returns:
        Scalar, in nats.
    Raises:
        ValueError: if the shapes differ or are not (B, M, K).
    Source: Van Gansbeke et al. 2020 (SCAN), equation 2, for class probabilities; CGHash (ACM MM
        2023) brings groups of neighbours to binary codes. Departures: the M soft assignments take
        the place of one class distribution; the mean assignment is over images and
        neighbours.
    """
    if assign.shape != neighbour_assign.shape or assign.dim() != 3:
        shapes = [tuple(assign.shape), tuple(neighbour_assign.shape)]
        raise ValueError(f"assignments must both be (B, M, K) of one shape; got {shapes}")
    with torch.autocast(assign.device.type, enabled=False):
        tiny = torch.finfo(assign.dtype).tiny
        agreement = (assign * neighbour_assign).sum(dim=-1).clamp_min(tiny).log().mean()
        usage = (assign + neighbour_assign).mean(dim=0) / 2  # (M, K)
        entropy = torch.special.entr(usage).sum(dim=-1).mean()
        return -agreement - entropy_weight * entropy
