"""HVS and LCE: a query network is compatible if the gallery's own classifier works on it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.arcface import arcface_loss
from losses.nt_xent import _float


def hvs_loss(
    x: Tensor,
    labels: Tensor,
    new_weight: Tensor,
    old_weight: Tensor,
    scale: float = 2048**0.5,
    new_margin: float = 0.15,
    old_margin: float = 0.15,
) -> Tensor:
    """Classification of the query network's embeddings, by a classifier that is learned with them
    and by the gallery's, which is frozen.

        loss = arcface(x, new_weight, new_margin) + arcface(x, old_weight, old_margin)

    with `losses.arcface.arcface_loss`. x enters both; old_weight gets no gradient.

    Args:
        x: (N, D) embeddings by the query network.
        labels: (N,) class numbers, for both classifiers.
        new_weight: (C, D), learned.
        old_weight: (C, D), the gallery's, its classes in the same order.
        scale: multiplies the cosines to the classes (`--classification_scale`).
        new_margin, old_margin: of the two classifiers, in radians.
    Returns:
        Scalar, in nats, at least float32.
    Raises:
        ValueError: as `arcface_logits`; or if the two classifiers differ in shape.
    Source: Duggal et al. 2021 (HVS), with the settings of SSP's comparison. Departures: none.
    """
    if new_weight.shape != old_weight.shape:
        raise ValueError(
            f"new_weight and old_weight must be (C, D) alike; got {tuple(new_weight.shape)}, "
            f"{tuple(old_weight.shape)}"
        )
    new = arcface_loss(x, new_weight, labels, scale, new_margin)
    return new + arcface_loss(x, old_weight.detach(), labels, scale, old_margin)


def lce_loss(
    x: Tensor,
    transformed: Tensor,
    labels: Tensor,
    new_weight: Tensor,
    transformed_new_weight: Tensor,
    old_weight: Tensor,
    scale: float = 2048**0.5,
    new_margin: float = 0.15,
    old_margin: float = 0.2,
    old_share: float = 0.5,
    alignment: float = 10.0,
) -> Tensor:
    """As `hvs_loss`, but a learned transform T leads from the query network's space to the
    gallery's, and takes the new class weights to the old ones.

        loss =  arcface(x, new_weight, new_margin)
              + old_share arcface(T(x), old_weight, old_margin)
              + alignment mean over c of || unit(T(new_weight[c])) - unit(old_weight[c]) ||

    with unit(v) = v / ||v|| and `losses.arcface.arcface_loss`. The new classifier judges x itself,
    the gallery's judges T(x), which is what searches the gallery. The last line is a distance, not
    its square: its pull does not fade near 0. old_weight gets no gradient.

    Args:
        x: (N, D) embeddings by the query network, before the transform.
        transformed: T(x), (N, D).
        labels: (N,) class numbers, for both classifiers.
        new_weight: (C, D), learned.
        transformed_new_weight: T(new_weight), (C, D).
        old_weight: (C, D), the gallery's, its classes in the same order.
        scale: multiplies the cosines to the classes (`--classification_scale`).
        new_margin, old_margin: of the two classifiers, in radians.
        old_share: weight of the gallery's classifier.
        alignment: weight of the distance between class weights.
    Returns:
        Scalar, at least float32.
    Raises:
        ValueError: as `arcface_logits`; or if embeddings or class weights differ in shape.
    Source: Meng et al. 2021 (LCE), with the settings of SSP's comparison. Departures: none.
    """
    if x.shape != transformed.shape:
        raise ValueError(
            f"x and transformed must be (N, D) alike; got {tuple(x.shape)}, "
            f"{tuple(transformed.shape)}"
        )
    shapes = [tuple(w.shape) for w in (new_weight, transformed_new_weight, old_weight)]
    if len(set(shapes)) != 1:
        raise ValueError(
            "new_weight, transformed_new_weight and old_weight must be (C, D) alike; got "
            f"{', '.join(map(str, shapes))}"
        )
    old_weight = old_weight.detach()
    new = arcface_loss(x, new_weight, labels, scale, new_margin)
    old = arcface_loss(transformed, old_weight, labels, scale, old_margin)
    moved, target = (F.normalize(_float(w), dim=1) for w in (transformed_new_weight, old_weight))
    distance = torch.linalg.vector_norm(moved - target, dim=1)  # (C,); gradient 0 at distance 0
    return new + old_share * old + alignment * distance.mean()
