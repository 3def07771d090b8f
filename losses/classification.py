"""Classification by class prototypes, GPQ's second loss, and the logits that its third shares."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prototype_logits(x: Tensor, prototypes: Tensor, M: int, beta: float) -> Tensor:
    """Cosine classifier over sub-vectors.

        logits[n, c] = mean over m of <beta x[n, m], beta p[c, m]>

    Args:
        x: (N, D) intra-normalised descriptors.
        prototypes: p, (C, D), intra-normalised.
        M: sub-vectors.
        beta: scales both sides (`--classification_scale`), so that logits reach beta^2.
    Returns:
        (N, C), at least float32.
    Raises:
        ValueError: if shapes do not fit, or M or beta is not positive.
    Source: GPQ, section 3.3. Departures: none.
    """
    if x.dim() != 2 or prototypes.dim() != 2 or x.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"x must be (N, D) and prototypes (C, D); got {tuple(x.shape)} and "
            f"{tuple(prototypes.shape)}"
        )
    if not (M > 0 and beta > 0):
        raise ValueError(f"M and beta must be positive, got M={M}, beta={beta}")
    with torch.autocast(x.device.type, enabled=False):
        # the inner product over all D is the sum of those over the M sub-vectors
        dtype = torch.promote_types(torch.promote_types(x.dtype, prototypes.dtype), torch.float32)
        return beta**2 / M * (x.to(dtype) @ prototypes.to(dtype).T)


def classification_loss(
    x: Tensor, labels: Tensor, prototypes: Tensor, M: int, beta: float = 4.0
) -> Tensor:
    """Softmax cross-entropy of labelled descriptors over the classes.

        loss = mean over n of  -sum_c y[n, c] log softmax_c( logits[n] ),   sum_c y[n, c] = 1

    with the logits of `prototype_logits`.

    Args:
        x: (N, D) intra-normalised descriptors.
        labels: (N,) class numbers, or (N, C) of 0 and 1: then the target is shared out evenly over
            an image's labels, and an image without one is passed over.
        prototypes: (C, D), intra-normalised.
        M: sub-vectors.
        beta: scales descriptors and prototypes.
    Returns:
        Scalar, in nats; 0 if no image has a label.
    Raises:
        ValueError: as `prototype_logits`; or if labels do not fit.
    Source: GPQ, equation 5. Departures: several labels are this project's reading.
    """
    logits = prototype_logits(x, prototypes, M, beta)
    if labels.dim() == 1 and len(labels) == len(x):
        return F.cross_entropy(logits, labels)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels must be (N,) or (N, C) = {tuple(logits.shape)}; got {tuple(labels.shape)}"
        )
    y = labels.to(logits.dtype)
    counts = y.sum(dim=1, keepdim=True)
    nats = -(y / counts.clamp(min=1) * F.log_softmax(logits, dim=1)).sum(dim=1)
    return nats.sum() / (counts > 0).sum().clamp(min=1)
