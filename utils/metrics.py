"""Retrieval metrics, each under its stated definition. Knows tensors only.

Three definitions of average precision are in use; a number means little without its own.
With rel[i] = 1 if the item at rank i is relevant, and P(i) = sum_{j <= i} rel[j] / i:

    AP@n, found:     sum_{i <= n} P(i) rel[i] / (relevant items found within the top n)
    AP@n, relevant:  sum_{i <= n} P(i) rel[i] / (relevant items in the database)
    AP over all:     n = the whole database, where the two agree

The released SPQ code and most of the hashing literature report the first.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from utils.retrieval import ranked

PRECISION_CUTOFFS = (1, 10, 100, 1000)  # and n itself
CURVE_POINTS = 50


def tie_order(N: int) -> Tensor:
    """A fixed random order of N database items, (N,) int64, to be evaluated in.

    Rankings break ties by index. Folders and lists often come sorted by class; among the many items
    of one code, ties by index would then favour the first classes.
    """
    return torch.randperm(N, generator=torch.Generator().manual_seed(0))


def relevance(query_labels: Tensor, db_labels: Tensor) -> Tensor:
    """Which items are relevant to which query.

    Args:
        query_labels: (Q,) class numbers, or (Q, C) 0/1 of a multi-label set.
        db_labels: (N,) or (N, C) likewise.
    Returns:
        (Q, N) bool: same class, or at least one label shared.
    Raises:
        ValueError: if one side is single-label and the other multi-label, or C differs.
    """
    if query_labels.dim() != db_labels.dim():
        raise ValueError("queries and items must both be single-label or both multi-label")
    if query_labels.dim() == 1:
        return query_labels[:, None] == db_labels
    if query_labels.shape[1] != db_labels.shape[1]:
        raise ValueError(f"queries have {query_labels.shape[1]} labels, items {db_labels.shape[1]}")
    return query_labels.float() @ db_labels.float().T > 0


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
    ranks = [np.flatnonzero(row) + 1 for row in rel.cpu().numpy()]
    normaliser = [len(r) for r in ranks] if n_relevant is None else n_relevant.tolist()
    pairs = zip(ranks, normaliser, strict=True)
    values = [_precision_sum(r) / n if n else 0.0 for r, n in pairs]
    return torch.tensor(values, dtype=torch.float64)


def _precision_sum(ranks: np.ndarray) -> float:
    """sum of P(i) over the ascending ranks i (from 1) of the relevant items."""
    return float((np.arange(1, len(ranks) + 1) / ranks).sum())


def ap_definition(top_n: int | str) -> str:
    """What `mAP@n` of `evaluate_retrieval` is, in words; of "all" too."""
    if top_n == "all":
        return "AP over the whole ranking"
    return f"AP over the relevant images found in the top {top_n}"


def curve_cutoffs(n: int) -> list[int]:
    """About CURVE_POINTS ranks from 1 to n, evenly spaced in the logarithm."""
    return sorted({min(n, round(p)) for p in np.geomspace(1, n, CURVE_POINTS).tolist()} | {n})


def evaluate_retrieval(
    query: Tensor,
    query_labels: Tensor,
    db_codes: Tensor,
    db_labels: Tensor,
    codebooks: Tensor,
    distance: str = "squared_l2",
    top_n: int | str = 1000,
    whole_ranking: bool = True,
) -> dict[str, float | int | str | dict[str, list[float]]]:
    """Every retrieval metric of one set of queries against one coded database.

    Args:
        query: (Q, D) descriptors.
        query_labels, db_labels: single-label (Q,), (N,) or multi-label (Q, C), (N, C).
        db_codes: (N, M) integers.
        codebooks: (M, K, d).
        distance: as `utils.retrieval.lookup_tables`.
        top_n: the n of mAP@n; larger than the database means the whole database. "all": the whole
            database; mAP@all is then the only mAP.
        whole_ranking: also rank everything: mAP@all and a curve down to the last rank.
    Returns:
        `mAP@n` (normaliser: found), `mAP@n_all_relevant` (normaliser: all relevant), `mAP@all`,
        `precision@1`, ..., `precision@n` (hits in the top i / i, for those i that the database
        has items for), `recall@n`, `pr_curve` (mean recall and precision over queries at
        ranks spaced evenly in the logarithm), `queries`, `queries_without_relevant`. Queries
        without a relevant item count as 0 in every mean, as in the released protocol.
    Raises:
        ValueError: if numbers of labels and vectors differ, or there are no queries.
    """
    N = len(db_codes)
    n = max(1, N) if top_n == "all" else top_n
    _check_numbers(len(query), len(query_labels), N, len(db_labels), n)
    whole_ranking = whole_ranking or top_n == "all"
    depth = N if whole_ranking else min(n, N)
    rankings = ranked(query, db_codes, codebooks, depth, distance)
    figures = evaluate_rankings(rankings, query_labels, db_labels, depth, n, whole_ranking)
    if top_n == "all":  # what is named after N is the same as mAP@all, or means nothing
        kept = {f"precision@{cutoff}" for cutoff in PRECISION_CUTOFFS}
        named = (f"@{n}", f"@{n}_all_relevant")
        figures = {k: v for k, v in figures.items() if k in kept or not k.endswith(named)}
    return {"distance": distance} | figures


def evaluate_rankings(
    rankings: Iterable[tuple[slice, Tensor]],
    query_labels: Tensor,
    db_labels: Tensor,
    depth: int,
    top_n: int = 1000,
    whole_ranking: bool = False,
) -> dict[str, float | int | dict[str, list[float]]]:
    """Every retrieval metric of rankings that are given, whatever they were ranked by.

    Args:
        rankings: pairs (rows, index): a slice of the queries, and for each of them the items
            (len(rows), depth) int64, best first. The slices hold every query once; an index is
            done with before the next pair is asked for.
        query_labels, db_labels: single-label (Q,), (N,) or multi-label (Q, C), (N, C).
        depth: how far the rankings go, at least min(top_n, N).
        top_n: the n of mAP@n; larger than the database means the whole database.
        whole_ranking: the rankings hold the whole database: report mAP@all.
    Returns:
        As `evaluate_retrieval`, without the name of a distance.
    Raises:
        ValueError: if there are no queries, rankings are too short, or they miss a query.
    """
    Q, N = len(query_labels), len(db_labels)
    _check_numbers(Q, Q, N, N, top_n)
    if not (N if whole_ranking else min(top_n, N)) <= depth <= N:
        raise ValueError(f"rankings of {depth} items are too short or too long for {N} items")
    relevant_of = _Relevance(query_labels.cpu(), db_labels.cpu())
    cutoffs = sorted({n for n in (*PRECISION_CUTOFFS, top_n) if n <= min(top_n, N)})
    curve = curve_cutoffs(depth)
    # a row a query: AP found, AP relevant, AP all, all relevant, hits in the top n, at each
    # cutoff, and at each rank of the curve
    table = np.zeros((Q, 5 + len(cutoffs) + len(curve)))

    def score(q: int, index: np.ndarray, buffer: np.ndarray) -> None:
        relevant, n_relevant = relevant_of(q)
        found = relevant.take(index, out=buffer, mode="clip")  # best first
        ranks = np.flatnonzero(found) + 1
        hits, *more = np.searchsorted(ranks, [top_n, *cutoffs, *curve], side="right")
        head = _precision_sum(ranks[:hits])
        table[q] = [
            head / max(1, hits),
            head / max(1, n_relevant),
            _precision_sum(ranks) / max(1, n_relevant),
            n_relevant,
            hits,
            *more,
        ]

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        ranked_queries = 0
        for rows, part in rankings:
            index = part.cpu().numpy()
            if index.shape != (rows.stop - rows.start, depth):
                raise ValueError(f"queries {rows} have rankings of shape {index.shape}")
            ranked_queries += len(index)

            def work(share: range, rows: slice = rows, index: np.ndarray = index) -> None:
                buffer = np.empty(depth, dtype=bool)
                for i in share:
                    score(rows.start + i, index[i], buffer)

            list(pool.map(work, [range(t, len(index), threads) for t in range(threads)]))
    if ranked_queries != Q:
        raise ValueError(f"{Q} queries, but rankings of {ranked_queries}")

    n_relevant, hits = table[:, 3], table[:, 4]
    at_cutoffs, at_curve = np.split(table[:, 5:], [len(cutoffs)], axis=1)
    found, relevant, whole = table[:, :3].mean(axis=0).tolist()
    share = 1 / np.maximum(1, n_relevant)
    result = {f"mAP@{top_n}": found, f"mAP@{top_n}_all_relevant": relevant}
    if whole_ranking:
        result["mAP@all"] = whole
    for n, value in zip(cutoffs, at_cutoffs.mean(axis=0).tolist(), strict=True):
        result[f"precision@{n}"] = value / n
    result[f"recall@{top_n}"] = float((hits * share).mean())
    result["pr_curve"] = {
        "rank": curve,
        "recall": (at_curve * share[:, None]).mean(axis=0).tolist(),
        "precision": (at_curve.mean(axis=0) / curve).tolist(),
    }
    result["queries"] = Q
    result["queries_without_relevant"] = int((n_relevant == 0).sum())
    return result


def _check_numbers(Q: int, query_labels: int, N: int, db_labels: int, top_n: int) -> None:
    """Raise ValueError unless every vector has its label and there is something to score."""
    if query_labels != Q or db_labels != N:
        raise ValueError(
            f"{Q} queries with {query_labels} labels, {N} items with {db_labels} labels"
        )
    if Q == 0:
        raise ValueError("there are no queries")
    if top_n < 1:
        raise ValueError(f"top_n must be at least 1, got {top_n}")


class _Relevance:
    """The relevant items of a query, (N,) bool, and their number; found once for each class."""

    def __init__(self, query_labels: Tensor, db_labels: Tensor) -> None:
        single = query_labels.dim() == 1
        # multi-label sets are compared by a matrix product: converted once, not at every query
        self.query_labels = query_labels if single else query_labels.float()
        self.db_labels = db_labels if single else db_labels.float()
        self.of_class: dict[int, tuple[np.ndarray, int]] = {}
        if single:
            for c in query_labels.unique().tolist():
                self.of_class[c] = self._find(torch.tensor([c]))

    def _find(self, labels: Tensor) -> tuple[np.ndarray, int]:
        relevant = relevance(labels, self.db_labels)[0].numpy()
        return relevant, int(relevant.sum())

    def __call__(self, q: int) -> tuple[np.ndarray, int]:
        if self.of_class:
            return self.of_class[int(self.query_labels[q])]
        return self._find(self.query_labels[q : q + 1])
