"""The revisited Oxford and Paris protocol: Easy, Medium and Hard, with junk. Knows arrays only.

Of each query, the images of the database are easy, hard, junk or (unlisted) negative:

    setup    positives      junk
    easy     easy           junk, hard
    medium   easy, hard     junk
    hard     hard           junk, easy

Junk is taken out of the ranking before anything is counted.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

SETUPS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
LISTS = ("easy", "hard", "junk")


def evaluate_revisited(
    ranks: np.ndarray | Tensor,
    ground_truth: Sequence[Mapping[str, np.ndarray]],
    ks: Sequence[int] = (1, 5, 10),
    n_db: int | None = None,
) -> dict[str, dict[str, float | int | np.ndarray]]:
    """Mean average precision and mean precision at k, in the three setups.

    With r[0] < r[1] < ... the ranks (from 0, without junk) of a query's P positives, the area under
    its precision-recall curve by trapezoids is

        AP = sum_j (p0[j] + p1[j]) / (2 P),   p1[j] = (j + 1) / (r[j] + 1),
                                              p0[j] = j / r[j], and 1 where r[j] = 0,

    and  P@k = (positives among the first k') / k',   k' = min(k, rank from 1 of the last positive),
    so that a query with few positives can still reach 1.

    Args:
        ranks: (Q, n) integers, images of the database by their number, best first. n may be less
            than n_db, a ranking's head: positives outside it are then not found. They add nothing
            to AP, which becomes a lower bound, and as the last of them is further down, k' = k.
            P@k is the whole ranking's as long as k images are left without junk.
        ground_truth: for each query, `easy`, `hard` and `junk`: 1-D integers in [0, n_db), each
            image at most once.
        ks: the k of P@k.
        n_db: images in the database, distractors included; None: the rankings are whole, n.
    Returns:
        For each of `easy`, `medium`, `hard`: `mAP`; `mP@k` for each k; `AP`, (Q,) float64, and
        `P@k`, (Q, len(ks)), both NaN for queries without positives, which no mean counts;
        `queries`, the number of those that count. All in [0, 1]; means over nothing are NaN.
    Raises:
        ValueError: if an image is ranked twice or listed twice, a number is out of range, or shapes
            do not fit.
    Source: Radenovic et al., CVPR 2018, and the evaluation published with it. Departure: that takes
        the last positive that was found for the last one, which flatters rankings cut short, and
        fails if none was found.
    """
    ranks = np.asarray(ranks.cpu() if isinstance(ranks, Tensor) else ranks)
    if ranks.ndim != 2 or ranks.dtype.kind not in "iu":
        raise ValueError(f"ranks must be (Q, n) integers, got {ranks.shape} of {ranks.dtype}")
    Q, n = ranks.shape
    if Q != len(ground_truth) or Q == 0:
        raise ValueError(f"{Q} rankings for {len(ground_truth)} queries")
    n_db = n if n_db is None else n_db
    if not ks or not all(isinstance(k, (int, np.integer)) and k >= 1 for k in ks):
        raise ValueError(f"ks must be integers from 1, got {ks!r}")
    AP = {setup: np.full(Q, np.nan) for setup in SETUPS}
    precision = {setup: np.full((Q, len(ks)), np.nan) for setup in SETUPS}
    for q in range(Q):
        place = _places(ranks[q], n_db, q)
        lists = _checked_lists(ground_truth[q], n_db, q)
        for setup, (good, bad) in SETUPS.items():
            positives = np.concatenate([lists[name] for name in good])
            junk = np.concatenate([lists[name] for name in bad])
            if len(positives):
                found = _ranks_without_junk(place[positives], place[junk])
                AP[setup][q] = _trapezoids(found, len(positives))
                precision[setup][q] = _precisions(found, len(positives), ks)
    return {setup: _means(AP[setup], precision[setup], ks) for setup in SETUPS}


def _places(ranking: np.ndarray, n_db: int, q: int) -> np.ndarray:
    """(n_db,) int64: where each image stands in a ranking, from 0; -1 if it does not."""
    if len(ranking) and not 0 <= int(ranking.min()) <= int(ranking.max()) < n_db:
        raise ValueError(
            f"ranks[{q}] has numbers from {ranking.min()} to {ranking.max()}; allowed is 0 to "
            f"{n_db - 1}. Of a ranking's head, n_db must be told"
        )
    place = np.full(n_db, -1)
    place[ranking] = np.arange(len(ranking))
    if np.count_nonzero(place >= 0) != len(ranking):
        twice = np.flatnonzero(np.bincount(ranking.astype(np.int64)) > 1)[0]
        raise ValueError(f"ranks[{q}] has image {twice} more than once")
    return place


def _checked_lists(truth: Mapping[str, np.ndarray], n_db: int, q: int) -> dict[str, np.ndarray]:
    """A query's lists as int64."""
    lists = {}
    for name in LISTS:
        if name not in truth:
            raise ValueError(f"ground_truth[{q}] has no {name!r}")
        values = np.asarray(truth[name])
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise ValueError(f"ground_truth[{q}][{name!r}] must be 1-D integers")
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < n_db:
            raise ValueError(
                f"ground_truth[{q}][{name!r}] has numbers from {values.min()} to {values.max()}; "
                f"allowed is 0 to {n_db - 1}"
            )
        lists[name] = values.astype(np.int64)
    images, times = np.unique(np.concatenate(list(lists.values())), return_counts=True)
    if (times > 1).any():
        raise ValueError(f"ground_truth[{q}] lists image {images[times > 1][0]} more than once")
    return lists


def _ranks_without_junk(positives: np.ndarray, junk: np.ndarray) -> np.ndarray:
    """Places, -1 for what was not found -> ascending ranks of the positives that were."""
    positives, junk = np.sort(positives[positives >= 0]), np.sort(junk[junk >= 0])
    return positives - np.searchsorted(junk, positives)


def _trapezoids(found: np.ndarray, P: int) -> float:
    j = np.arange(len(found))
    before = np.where(found == 0, 1.0, j / np.maximum(found, 1))
    return float((before + (j + 1) / (found + 1)).sum() / (2 * P))


def _precisions(found: np.ndarray, P: int, ks: Sequence[int]) -> list[float]:
    whole = len(found) == P
    cut = [min(k, int(found[-1]) + 1) if whole else k for k in ks]
    return [np.count_nonzero(found < k) / k for k in cut]


def _means(
    AP: np.ndarray, precision: np.ndarray, ks: Sequence[int]
) -> dict[str, float | int | np.ndarray]:
    counted = ~np.isnan(AP)

    def mean(values: np.ndarray) -> float:
        return float(values[counted].mean()) if counted.any() else float("nan")

    means = {f"mP@{k}": mean(column) for k, column in zip(ks, precision.T, strict=True)}
    return {"mAP": mean(AP), **means, "AP": AP, "P@k": precision, "queries": int(counted.sum())}
