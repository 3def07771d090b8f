"""Regression of embeddings to gallery features: on its own, and as a part of AML."""

import torch
from torch import Tensor

from losses.nt_xent import _float


def regression_loss(x_query: Tensor, x_gallery: Tensor) -> Tensor:
    """Squared distance of each embedding to the gallery's feature of the same image.

        loss = mean over n of || x_query[n] - x_gallery[n] ||^2

    A sum over the D dimensions, so that for vectors of unit length it is 2 - 2 cos. Only x_query
    gets a gradient.

    Args:
        x_query: (N, D) embeddings by the query network.
        x_gallery: (N, D) the gallery's features.
    Returns:
        Scalar, a squared distance, at least float32.
    Raises:
        ValueError: if the shapes do not fit.
    Source: Budnik & Avrithis 2021 (AML), regression. Departures: none.
    """
    if x_query.dim() != 2 or x_query.shape != x_gallery.shape:
        raise ValueError(
            f"x_query and x_gallery must be (N, D) alike; got {tuple(x_query.shape)}, "
            f"{tuple(x_gallery.shape)}"
        )
    with torch.autocast(x_query.device.type, enabled=False):
        return (_float(x_query) - _float(x_gallery.detach())).square().sum(dim=1).mean()
