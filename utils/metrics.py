"""Retrieval metrics, each under its stated definition. Knows tensors only.

Three definitions of average precision are in use; a number means little without its own.
With rel[i] = 1 if the item at rank i is relevant, and P(i) = sum_{j <= i} rel[j] / i:

    AP@n, found:     sum_{i <= n} P(i) rel[i] / (relevant items found within the top n)
    AP@n, relevant:  sum_{i <= n} P(i) rel[i] / (relevant items in the database)
    AP over all:     n = the whole database, where the two agree

The released SPQ code and most of the hashing literature report the first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.retrieval import ranked

PRECISION_CUTOFFS = (1, 10, 100, 1000)
CURVE_POINTS = 50


def relevance(query_labels: Tensor, labels: Tensor) -> Tensor:
    """Which items are relevant to which query.

    Args:
        query_labels: (Q,) class numbers, or (Q, C) 0/1 of a multi-label set.
        labels: (..., ) class numbers or (..., C) 0/1: one list for all queries, (N,) or (N, C),
            or one for each query, (Q, n) or (Q, n, C).
    Returns:
        (Q, N) or (Q, n) bool: same class, or at least one label shared.
    Raises:
        ValueError: if one side is single-label and the other multi-label, or C differs.
    """
    if query_labels.dim() == 1:
        if labels.dim() not in (1, 2):
            raise ValueError("single-label queries need single-label items")
        return query_labels[:, None] == labels
    if query_labels.shape[-1] != labels.shape[-1]:
        raise ValueError(f"queries have {query_labels.shape[-1]} labels, items {labels.shape[-1]}")
    if labels.dim() == 2:
        return query_labels.float() @ labels.float().T > 0
    return torch.einsum("qc,qnc->qn", query_labels.float(), labels.float()) > 0


def average_precision(rel: Tensor, n_relevant: Tensor | None = None) -> Tensor:
    """Average precision of ranked lists.

        AP[q] = sum_i P(q, i) * rel[q, i] / normaliser[q],   P(q, i) = hits in the top i / i

    Args:
        rel: (Q, n) bool, best first; cut it to the top n beforehand.
        n_relevant: (Q,) all relevant items of the database: the normaliser "relevant". None
            divides by the relevant items found in `rel`: the normaliser "found".
    Returns:
        (Q,) float64 in [0, 1]; 0 where the normaliser is 0.
    """
    query, position = rel.nonzero(as_tuple=True)  # in order of query, then rank
    found = rel.sum(dim=1)
    before = found.cumsum(0) - found  # hits of the queries before this one
    hit = torch.arange(len(query), device=rel.device) - before[query] + 1  # 1, 2, ... in a query
    precision = hit.double() / (position + 1)
    total = torch.zeros(len(rel), dtype=torch.float64, device=rel.device)
    total.index_add_(0, query, precision)
    normaliser = found if n_relevant is None else n_relevant
    return torch.where(normaliser > 0, total / normaliser.clamp(min=1), 0.0)


def hits_at(rel: Tensor, cutoffs: Sequence[int]) -> Tensor:
    """Relevant items within the top n, for each n of ascending `cutoffs`: (Q, len(cutoffs)).

    A cutoff past the end of the list counts the whole list.
    """
    parts, start = [], 0
    for stop in cutoffs:
        parts.append(rel[:, start:stop].sum(dim=1))
        start = max(start, stop)
    return torch.stack(parts, dim=1).cumsum(dim=1)


def curve_cutoffs(n: int) -> list[int]:
    """About CURVE_POINTS ranks from 1 to n, evenly spaced in the logarithm."""
    points = torch.logspace(0, torch.log10(torch.tensor(float(n))).item(), CURVE_POINTS)
    return sorted({min(n, round(p)) for p in points.tolist()} | {n})


def evaluate_retrieval(
    query: Tensor,
    query_labels: Tensor,
    db_codes: Tensor,
    db_labels: Tensor,
    codebooks: Tensor,
    distance: str = "squared_l2",
    top_n: int = 1000,
    whole_ranking: bool = True,
) -> dict[str, float | int | str | dict[str, list[float]]]:
    """Every retrieval metric of one set of queries against one coded database.

    Args:
        query: (Q, D) descriptors.
        query_labels, db_labels: single-label (Q,), (N,) or multi-label (Q, C), (N, C).
        db_codes: (N, M) integers.
        codebooks: (M, K, d).
        distance: as `utils.retrieval.lookup_tables`.
        top_n: the n of mAP@n; larger than the database means the whole database.
        whole_ranking: also rank everything: mAP@all and the precision-recall curve.
    Returns:
        `mAP@n` (normaliser: found), `mAP@n_all_relevant` (normaliser: all relevant), `mAP@all`,
        `precision@1`, ..., `recall@n`, `pr_curve` (mean recall and precision over queries at
        ranks spaced evenly in the logarithm), `queries`, `queries_without_relevant`. Queries
        without a relevant item count as AP 0 in every mean, as in the released protocol.
    Raises:
        ValueError: if numbers of labels and vectors differ, or there are no queries.
    """
    N = len(db_codes)
    if len(query) != len(query_labels) or len(db_labels) != N:
        raise ValueError(
            f"{len(query)} queries with {len(query_labels)} labels, {N} items with "
            f"{len(db_labels)} labels"
        )
    if len(query) == 0:
        raise ValueError("there are no queries")
    if top_n < 1:
        raise ValueError(f"top_n must be at least 1, got {top_n}")
    n_precision = [n for n in PRECISION_CUTOFFS if n <= top_n]
    n_curve = curve_cutoffs(N if whole_ranking else min(top_n, N))
    sums: dict[str, Tensor] = {}

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0) + values.double().sum(dim=0)

    for rows, index in ranked(query, db_codes, codebooks, N if whole_ranking else top_n, distance):
        labels = query_labels[rows]
        n_relevant = _count_relevant(labels, db_labels)
        rel = relevance(labels, db_labels[index])  # (rows, n), best first
        top = rel[:, :top_n]
        add("found", average_precision(top))
        add("relevant", average_precision(top, n_relevant))
        if whole_ranking:
            add("all", average_precision(rel))
        hits = hits_at(top, [*n_precision, top_n]).double()
        add("precision", hits[:, :-1] / torch.tensor(n_precision, device=hits.device))
        add("recall", hits[:, -1] / n_relevant.clamp(min=1))
        hits = hits_at(rel, n_curve).double()
        add("curve_precision", hits / torch.tensor(n_curve, device=hits.device))
        add("curve_recall", hits / n_relevant.clamp(min=1)[:, None])
        add("no_relevant", n_relevant == 0)

    mean = {name: (total / len(query)).tolist() for name, total in sums.items()}
    result = {
        "distance": distance,
        f"mAP@{top_n}": mean["found"],
        f"mAP@{top_n}_all_relevant": mean["relevant"],
    }
    if whole_ranking:
        result["mAP@all"] = mean["all"]
    for n, value in zip(n_precision, mean["precision"], strict=True):
        result[f"precision@{n}"] = value
    result[f"recall@{top_n}"] = mean["recall"]
    result["pr_curve"] = {
        "rank": n_curve,
        "recall": mean["curve_recall"],
        "precision": mean["curve_precision"],
    }
    result["queries"] = len(query)
    result["queries_without_relevant"] = int(sums["no_relevant"].item())
    return result


def _count_relevant(query_labels: Tensor, db_labels: Tensor) -> Tensor:
    """(rows,) relevant items of the whole database for each query."""
    if query_labels.dim() == 1:  # count each class once, not each pair
        classes, inverse = query_labels.unique(return_inverse=True)
        return (classes[:, None] == db_labels).sum(dim=1)[inverse]
    return relevance(query_labels, db_labels).sum(dim=1)
