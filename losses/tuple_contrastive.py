"""Contrastive loss of tuples, the metric part of AML: queries against gallery features."""

import torch
from torch import Tensor

from losses.nt_xent import _float


def tuple_contrastive_loss(
    x_query: Tensor, gallery_positive: Tensor, gallery_negatives: Tensor, margin: float = 0.7
) -> Tensor:
    """A query is drawn to its positive and pushed from each negative that is within the margin.

        loss = mean over n of   1/2 || q[n] - p[n] ||^2
                              + sum_r 1/2 max(0, margin - || q[n] - g[n, r] ||)^2

    with q the query network's embeddings, p and g the gallery's features. Only q gets a gradient;
    a negative that lies exactly on its query gives none, for want of a direction.

    Args:
        x_query: q, (N, D) embeddings by the query network.
        gallery_positive: p, (N, D) features of an image like each query.
        gallery_negatives: g, (N, R, D) features of R images unlike it.
        margin: a distance, in the embeddings' unit (`--contrastive_margin`).
    Returns:
        Scalar, a squared distance, at least float32.
    Raises:
        ValueError: if shapes do not fit or margin is not positive.
    Source: Budnik & Avrithis 2021 (AML), the asymmetric contrastive loss, as SSP compares with it;
        Radenovic et al. 2018 for tuples and 1/2. Departure: SSP's released code has no hinge.
    """
    alike = x_query.dim() == 2 and gallery_positive.shape == x_query.shape
    if not alike or gallery_negatives.dim() != 3 or gallery_negatives.shape[::2] != x_query.shape:
        raise ValueError(
            "x_query and gallery_positive must be (N, D) and gallery_negatives (N, R, D); got "
            f"{tuple(x_query.shape)}, {tuple(gallery_positive.shape)} and "
            f"{tuple(gallery_negatives.shape)}"
        )
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}")
    with torch.autocast(x_query.device.type, enabled=False):
        q, p, g = _float(x_query), _float(gallery_positive.detach()), gallery_negatives.detach()
        near = (q - p).square().sum(dim=1)  # (N,)
        # (N, R); the gradient of vector_norm is 0 at 0, where that of a root is infinite
        far = torch.linalg.vector_norm(q[:, None] - _float(g), dim=2)
        return 0.5 * (near + (margin - far).clamp(min=0).square().sum(dim=1)).mean()
