"""ArcFace: classification by angles to class weights, with a margin on the own class."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def arcface_logits(
    x: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float
) -> Tensor:
    """Scaled cosines to the class weights, that of the own class as if its angle were wider.

        theta[n, c]  = angle between x[n] and weight[c], in [0, pi]
        logits[n, c] = scale cos(theta + margin)          c = labels[n], theta + margin <= pi
                       scale (cos theta + cos margin - 1) c = labels[n], theta + margin > pi
                       scale cos theta                    c != labels[n]

    Past pi the cosine would rise again and reward what points away from its class. The second line
    goes on falling from the -scale that the first one ends at.

    No arc cosine is taken, and no root of 1 - cos^2, whose gradients are infinite at the ends:

        cos(theta + margin) = cos theta cos margin - sin theta sin margin,
        sin theta = || x / ||x|| - cos theta  weight[c] / ||weight[c]|| ||

    The gradient of such a length is at most 1, and 0 where x is parallel to its class.

    Args:
        x: (N, D) embeddings of any length.
        weight: (C, D) class weights of any length.
        labels: (N,) class numbers in [0, C).
        scale: s, multiplies the cosines (`--classification_scale`).
        margin: m, in radians, in [0, pi].
    Returns:
        (N, C), at least float32.
    Raises:
        ValueError: if shapes do not fit, labels are not integers, scale is not positive or margin
            is out of its range.
    Source: Deng et al. 2019, equation 3. Departure: where theta + margin > pi the authors' code
        has cos theta - margin sin margin, which falls too, but with a step at pi - margin.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be (N, D) and weight (C, D); got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != x.shape[:1] or labels.dtype == torch.bool or labels.is_floating_point():
        raise ValueError(
            f"{len(x)} embeddings need labels (N,), integers; got {tuple(labels.shape)} of "
            f"{labels.dtype}"
        )
    if not (scale > 0 and 0 <= margin <= math.pi):
        raise ValueError(
            f"scale must be positive and margin in [0, pi], got scale={scale}, margin={margin}"
        )
    labels = labels.long()  # uint8 would index as a mask
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        x, weight = F.normalize(x.to(dtype), dim=1), F.normalize(weight.to(dtype), dim=1)
        own = weight[labels]  # (N, D)
        cos = (x * own).sum(dim=1, keepdim=True)  # (N, 1)
        sin = torch.linalg.vector_norm(x - cos * own, dim=1, keepdim=True)
        cos_m, sin_m = math.cos(margin), math.sin(margin)
        widened = torch.where(cos >= -cos_m, cos * cos_m - sin * sin_m, cos + cos_m - 1)
        return scale * (x @ weight.T).scatter(1, labels[:, None], widened)


def arcface_loss(
    x: Tensor, weight: Tensor, labels: Tensor, scale: float = 2048**0.5, margin: float = 0.15
) -> Tensor:
    """Softmax cross-entropy of the logits of `arcface_logits`.

        loss = mean over n of  -log softmax_c( logits[n] )[labels[n]]

    Args and errors as `arcface_logits`; scale and margin by default as SSP's comparisons have them.

    Returns:
        Scalar, in nats.
    Source: Deng et al. 2019, equation 3. Departures: as `arcface_logits`.
    """
    return F.cross_entropy(arcface_logits(x, weight, labels, scale, margin), labels.long())
