"""Structure similarity, the loss of SSP: queries resemble anchors as their gallery features do."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_LENGTH = 1e-6  # shorter sub-vectors are divided by this, so that gradients end somewhere


def structure_similarity_loss(
    x_query: Tensor, x_gallery: Tensor, anchors: Tensor, scale: float = 10.0
) -> Tensor:
    """Divergence between two networks' views of one image, each described by its similarities to
    the anchors of the gallery's space.

        p[n, m] = softmax over k of  scale cos(x_gallery[n, m], anchors[m, k])
        q[n, m] = softmax over k of  scale cos(x_query[n, m], anchors[m, k])
        loss = mean over n and m of  sum_k p[n, m, k] log( p[n, m, k] / q[n, m, k] )

    Only x_query gets a gradient: gallery features and anchors are constants. The backward pass
    keeps one (N, M, K) table of each side, nothing larger.

    Args:
        x_query: (N, D) embeddings by the query network, D = M * d.
        x_gallery: (N, D) the gallery's features of the same images.
        anchors: (M, K, d) of unit length; they are scaled to it here once more, as sub-vectors
            are.
        scale: multiplies the cosines (`--similarity_scale`); at 0 every image is like every other.
    Returns:
        Scalar, in nats, at least float32; 0 where the two agree in every cosine.
    Raises:
        ValueError: if shapes do not fit, or scale is negative.
    Source: SSP (Wu et al. 2024). Departures: none.
    """
    if x_query.dim() != 2 or x_query.shape != x_gallery.shape:
        raise ValueError(
            f"x_query and x_gallery must be (N, D) alike; got {tuple(x_query.shape)}, "
            f"{tuple(x_gallery.shape)}"
        )
    if anchors.dim() != 3 or anchors.shape[0] * anchors.shape[2] != x_query.shape[1]:
        raise ValueError(
            f"anchors must be (M, K, d) with M * d = D = {x_query.shape[1]}; got "
            f"{tuple(anchors.shape)}"
        )
    if not scale >= 0:
        raise ValueError(f"scale must not be negative, got {scale}")
    with torch.autocast(x_query.device.type, enabled=False):
        dtypes = (x_query.dtype, x_gallery.dtype, anchors.dtype, torch.float32)
        dtype = reduce(torch.promote_types, dtypes)
        with torch.no_grad():
            anchors = scale * F.normalize(anchors.to(dtype), dim=-1)  # scaled here: no table twice
            log_p = _log_softmax(x_gallery.to(dtype), anchors)
            p = log_p.exp()
        log_q = _log_softmax(x_query.to(dtype), anchors)
        return (p * (log_p - log_q)).sum(dim=2).mean()


def _log_softmax(x: Tensor, anchors: Tensor) -> Tensor:
    """Over the anchors (M, K, d), which carry the scale, of the cosines of x (N, D): (N, M, K)."""
    x = F.normalize(x.unflatten(1, (len(anchors), -1)), dim=-1, eps=LEAST_LENGTH)  # (N, M, d)
    return torch.log_softmax(torch.einsum("nmd,mkd->nmk", x, anchors), dim=-1)
