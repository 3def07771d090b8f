"""Subspace entropy, the mini-max loss of GPQ over unlabelled images."""

import torch
from torch import Tensor

from losses.classification import prototype_logits

EPSILON = 1e-5  # of the released code: log(p + 1e-5)


def subspace_entropy_loss(x: Tensor, prototypes: Tensor, M: int, beta: float = 4.0) -> Tensor:
    """Negative entropy of the class probabilities of unlabelled descriptors.

        p[n] = softmax over c of logits[n, c]
        loss = mean over n of  sum_c p[n, c] log(p[n, c] + e)

    with the logits of `losses.classification.prototype_logits` and e = 1e-5. What descends it
    raises the entropy: the prototypes. The network in front of a gradient reversal
    (`models.gpq.reverse_gradient`) ascends it and so lowers the entropy: its descriptors gather
    around the prototypes, which move towards them.

    Args:
        x: (N, D) intra-normalised descriptors, behind a gradient reversal.
        prototypes: (C, D), intra-normalised.
        M: sub-vectors.
        beta: scales descriptors and prototypes.
    Returns:
        Scalar in [-log C, 0], in nats (to within e).
    Raises:
        ValueError: as `prototype_logits`.
    Source: GPQ, equations 7 and 8; Saito et al. 2019 (MME). Departures: none.
    """
    p = torch.softmax(prototype_logits(x, prototypes, M, beta), dim=1)
    return (p * torch.log(p + EPSILON)).sum(dim=1).mean()
