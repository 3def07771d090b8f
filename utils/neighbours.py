"""Nearest neighbours of descriptors by cosine, and how well they agree with labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.metrics import relevance

CHUNK_BYTES = 2**28  # of similarities that are in memory together
KNN_NEIGHBOURS, KNN_TEMPERATURE = 200, 0.1  # the usual ones


def nearest_by_cosine(
    x: Tensor, among: Tensor, k: int, exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The k rows of `among` with the largest cosine to each row of x, exactly.

    Args:
        x: (N, D).
        among: (L, D), on the same device.
        k: neighbours, at most L; L - 1 with `exclude_self`.
        exclude_self: x and `among` are the same rows, and no row is its own neighbour.
    Returns:
        Indices (N, k) int64 and cosines (N, k) float32, best first.
    """
    found = []
    with torch.autocast(x.device.type, enabled=False):
        x, among = F.normalize(x.float(), dim=1), F.normalize(among.float(), dim=1)
        rows = max(1, CHUNK_BYTES // (4 * len(among)))
        for start in range(0, len(x), rows):
            sim = x[start : start + rows] @ among.T  # (rows, L)
            if exclude_self:
                row = torch.arange(len(sim), device=sim.device)
                sim[row, start + row] = -torch.inf
            found.append(sim.topk(k, dim=1))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def neighbour_purity(neighbours: Tensor, labels: Tensor, among_labels: Tensor) -> float:
    """Share of the neighbours that are relevant: of the same class, or with a label in common.

    Args:
        neighbours: (N, k) rows of the set that `among_labels` belongs to.
        labels: (N,), or 0/1 (N, C).
        among_labels: (L,), or 0/1 (L, C).
    """
    rows = max(1, CHUNK_BYTES // (4 * len(among_labels)))
    parts = zip(neighbours.split(rows), labels.split(rows), strict=True)
    hits = [relevance(own, among_labels).gather(1, near).double().sum() for near, own in parts]
    return float(sum(hits) / neighbours.numel())


def knn_accuracy(neighbours: Tensor, sims: Tensor, labels: Tensor, among_labels: Tensor) -> float:
    """Accuracy of weighted k-nearest-neighbour classification.

        vote[n, c] = sum over the neighbours j of class c of  exp(cos(n, j) / 0.1)

    Args:
        neighbours: (N, k) rows of the set that `among_labels` belongs to.
        sims: (N, k) their cosines.
        labels: (N,) classes.
        among_labels: (L,) classes.
    Source: Wu et al. 2018 (instance discrimination), section 3.4, with k = 200 and temperature 0.1.
    """
    votes = torch.zeros(len(labels), int(among_labels.max()) + 1, device=sims.device)
    votes.scatter_add_(1, among_labels[neighbours], (sims / KNN_TEMPERATURE).exp())
    return float((votes.argmax(dim=1) == labels).double().mean())
