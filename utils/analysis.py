"""What a trained quantizer does with a data set, in numbers. Knows tensors only."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.retrieval import search

PAIR_CHUNK = 2**16  # pairs whose vectors are in memory together
TSNE_NEIGHBOURS = 30.0  # scikit-learn's default; 5 to 50 is usual


def codeword_usage(codes: Tensor, K: int) -> Tensor:
    """Share of the items on each codeword.

        usage[m, k] = #{n : codes[n, m] = k} / N

    Args:
        codes: (N, M) integers in [0, K).
        K: codewords in a codebook.
    Returns:
        (M, K) float64; each row sums to 1.
    Raises:
        ValueError: if there are no items, or a code lies outside [0, K).
    """
    if codes.dim() != 2 or len(codes) == 0:
        raise ValueError(f"codes must be (N, M) with N > 0; got {tuple(codes.shape)}")
    if not (int(codes.min()) >= 0 and int(codes.max()) < K):
        raise ValueError(f"codes must lie in [0, {K})")
    counts = torch.stack([torch.bincount(column.long(), minlength=K) for column in codes.T])
    return counts.double() / len(codes)


def perplexity(usage: Tensor) -> Tensor:
    """How many codewords a codebook uses, counted by the entropy of their shares.

        perplexity[m] = exp( -sum_k usage[m, k] * ln usage[m, k] ),   0 ln 0 = 0

    K if all are used alike, 1 if the codebook has collapsed onto one.

    Args:
        usage: (M, K) shares, each row summing to 1.
    Returns:
        (M,) float64 in [1, K].
    """
    return torch.special.entr(usage.double()).sum(dim=1).exp()


def codeword_purity(codes: Tensor, labels: Tensor) -> float:
    """Share of the items whose class is the most frequent one on their codeword.

        purity = mean over m of  sum_k max_c #{n : codes[n, m] = k, labels[n] = c} / N

    Args:
        codes: (N, M) integers.
        labels: (N,) classes.
    """
    classes = int(labels.max()) + 1
    pairs = [torch.bincount(column.long() * classes + labels) for column in codes.T]
    largest = [F.pad(n, (0, -len(n) % classes)).view(-1, classes).amax(1).sum() for n in pairs]
    return float(sum(largest)) / codes.numel()


class Pairs(NamedTuple):
    """Distances (P,) float32 of pairs, and (P,) bool whether query and item are relevant."""

    dist: Tensor
    relevant: Tensor


def sample_pairs(
    query: Tensor,
    query_labels: Tensor,
    db_codes: Tensor,
    db_labels: Tensor,
    codebooks: Tensor,
    pairs: int,
    seed: int,
) -> Pairs:
    """Asymmetric squared-L2 distances of random (query, item) pairs.

        dist[p] = sum_m || query[q_p, m] - codebooks[m, db_codes[n_p, m]] ||^2

    q_p and n_p are drawn evenly and with replacement, so relevant pairs come as often as they do
    in the whole Q x N table.

    Args:
        query: (Q, D) descriptors, D = M * d.
        query_labels, db_labels: single-label (Q,), (N,) or multi-label 0/1 (Q, C), (N, C).
        db_codes: (N, M) integers in [0, K).
        codebooks: (M, K, d).
        pairs: P.
        seed: of the draw.
    Returns:
        The pairs; relevant means the same class, or a label shared.
    Source: Jegou et al. 2011, equation 13; as `utils.retrieval.adc_distances`, pair by pair.
    """
    generator = torch.Generator().manual_seed(seed)
    q_of = torch.randint(len(query), (pairs,), generator=generator)
    n_of = torch.randint(len(db_codes), (pairs,), generator=generator)
    subspace = torch.arange(len(codebooks))
    dist = torch.empty(pairs)
    relevant = torch.empty(pairs, dtype=torch.bool)
    for start in range(0, pairs, PAIR_CHUNK):
        rows = slice(start, start + PAIR_CHUNK)
        q, n = q_of[rows], n_of[rows]
        words = codebooks[subspace, db_codes[n].long()].flatten(1)  # (P, M, d) -> (P, D)
        dist[rows] = (query[q] - words).square().sum(dim=1)
        same = query_labels[q] == db_labels[n]
        if same.dim() == 2:  # multi-label
            same = (query_labels[q].bool() & db_labels[n].bool()).any(dim=1)
        relevant[rows] = same
    return Pairs(dist, relevant)


def separation(pairs: Pairs) -> float:
    """Chance that a relevant pair is closer than an irrelevant one; a tie counts as half.

    The area under the ROC curve of -dist: 1 is perfect, 0.5 is no better than chance. NaN if one
    kind of pair is missing.
    """
    near = pairs.dist[pairs.relevant].double().sort().values
    far = pairs.dist[~pairs.relevant].double()
    if not (len(near) and len(far)):
        return float("nan")
    closer = torch.searchsorted(near, far)  # relevant pairs strictly closer than each far one
    not_farther = torch.searchsorted(near, far, right=True)
    return float((closer + not_farther).double().mean() / (2 * len(near)))


class Embedding(NamedTuple):
    """A map of P vectors.

    Attributes:
        points: (P, 2) float32; equal vectors stand at one place.
        distinct: number of different vectors.
        neighbours: t-SNE's perplexity, the effective number of neighbours; 0 if it did not run.
    """

    points: np.ndarray
    distinct: int
    neighbours: float


def embed(x: Tensor, seed: int) -> Embedding:
    """t-SNE of vectors onto the plane, in Euclidean distance.

    Equal vectors (images that share a code) are embedded once: t-SNE would push the copies of one
    vector apart into a ring that means nothing, and it fails where all are equal. So a
    vector counts once however many images have it.

    Args:
        x: (P, D) float.
        seed: of the start, which follows the first two principal components.
    Returns:
        The map. A single different vector stands at the origin, without t-SNE.
    Raises:
        ValueError: if x is empty or not finite.
    Source: van der Maaten and Hinton 2008, Barnes-Hut (2014), as scikit-learn has it.
    """
    if x.dim() != 2 or len(x) == 0 or not torch.isfinite(x).all():
        raise ValueError(f"vectors must be (P, D), finite, P > 0; got {tuple(x.shape)}")
    # imported here: it takes a second, and whoever trains does not need it
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    vectors, place = np.unique(x.detach().float().numpy(), axis=0, return_inverse=True)
    U, D = vectors.shape
    if U == 1:
        return Embedding(np.zeros((len(x), 2), dtype=np.float32), 1, 0.0)
    if D == 1:  # the start takes two principal components
        vectors = np.concatenate([vectors, np.zeros_like(vectors)], axis=1)
    # at least three times as many vectors as neighbours, below which neighbourhoods say nothing
    neighbours = min(TSNE_NEIGHBOURS, (U - 1) / 3)
    tsne = TSNE(perplexity=neighbours, init="pca", learning_rate="auto", random_state=seed)
    # one thread: the order of a parallel sum differs from machine to machine, and so would the map
    with threadpool_limits(1):
        points = tsne.fit_transform(vectors)
    return Embedding(points[place.reshape(-1)], U, neighbours)


def first_of_each_class(
    query: Tensor,
    query_labels: Tensor,
    db_codes: Tensor,
    codebooks: Tensor,
    columns: int,
    distance: str,
    rows: int = 10,
) -> tuple[Tensor, Tensor]:
    """The first query of each class and its nearest items: chosen by position, not by success.

    Args:
        query: (Q, D) descriptors.
        query_labels: (Q,) class numbers, or (Q, C) zeros and ones.
        db_codes: (N, M) integers.
        codebooks: (M, K, d).
        columns: items for each query.
        distance: as `utils.retrieval.lookup_tables`.
        rows: classes at most.
    Returns:
        Queries (R,) and items (R, min(columns, N)), int64 on the CPU, nearest first; R = 0 if no
        query has a label.
    """
    chosen = first_rows_of_each_class(query_labels, rows)
    _, index = search(query[chosen.to(query.device)], db_codes, codebooks, columns, distance)
    return chosen, index.cpu()


def first_rows_of_each_class(labels: Tensor, rows: int = 10) -> Tensor:
    """The first image of each class, (R,) int64 on the CPU, at most `rows`; none without labels.

    Args:
        labels: (Q,) class numbers, or (Q, C) zeros and ones.
        rows: classes at most.
    """
    if labels.dim() == 1:
        members = [labels == c for c in labels.unique().tolist()]
    else:
        members = [column > 0 for column in labels.T if column.any()]
    first = dict.fromkeys(int(member.nonzero()[0]) for member in members)
    return torch.tensor(list(first)[:rows], dtype=torch.int64)
