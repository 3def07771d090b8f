"""Usage, perplexity, pairs and maps: cases by hand, naive loops, scikit-learn as oracle."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from utils import analysis
from utils.analysis import (
    Pairs,
    codeword_purity,
    codeword_usage,
    embed,
    first_of_each_class,
    perplexity,
    sample_pairs,
    separation,
)
from utils.metrics import relevance
from utils.retrieval import adc_distances


def test_usage_by_hand():
    codes = torch.tensor([[0, 3], [0, 3], [1, 3], [2, 3]], dtype=torch.uint8)
    assert codeword_usage(codes, 4).tolist() == [[0.5, 0.25, 0.25, 0], [0, 0, 0, 1]]


def test_usage_equals_counting():
    codes = torch.randint(0, 8, (100, 3))
    usage = codeword_usage(codes, 8)
    for m in range(3):
        for k in range(8):
            assert usage[m, k] == sum(int(c) == k for c in codes[:, m]) / 100


def test_usage_refuses_codes_that_no_codebook_has():
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 4\)"):
        codeword_usage(torch.tensor([[0], [4]]), 4)
    with pytest.raises(ValueError, match="N > 0"):
        codeword_usage(torch.empty(0, 2, dtype=torch.int64), 4)


def test_perplexity_by_hand():
    rows = [[1 / 4] * 4, [0, 1, 0, 0], [1 / 2, 0, 0, 1 / 2], [1 / 2, 1 / 4, 1 / 4, 0]]
    # the last: entropy 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2
    want = [4, 1, 2, 2**1.5]
    assert perplexity(torch.tensor(rows)).tolist() == pytest.approx(want)


def test_codeword_purity_equals_counting():
    codes, labels = torch.randint(0, 4, (50, 3)), torch.randint(0, 5, (50,))
    right = 0
    for m in range(3):
        for k in range(4):
            mine = [int(labels[n]) for n in range(50) if codes[n, m] == k]
            right += max((mine.count(c) for c in range(5)), default=0)
    assert codeword_purity(codes, labels) == pytest.approx(right / 150)


def problem(multi_label=False):
    """Few enough vectors that every pair has a distance of its own."""
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(4))[:12]
    make = (
        (lambda n: torch.randint(0, 2, (n, 3))) if multi_label else (lambda n: torch.arange(n) % 3)
    )
    return {
        "query": torch.randn(9, 6),
        "query_labels": make(9),
        "db_codes": codes,
        "db_labels": make(12),
        "codebooks": torch.randn(2, 4, 3),
    }


@pytest.mark.parametrize("multi_label", [False, True])
def test_each_pair_has_its_distance_and_its_relevance(multi_label):
    p = problem(multi_label)
    table = adc_distances(p["query"], p["db_codes"], p["codebooks"]).flatten()
    truth = relevance(p["query_labels"], p["db_labels"]).flatten()
    assert 0 < truth.sum() < len(truth)
    pairs = sample_pairs(**p, pairs=5000, seed=0)
    gap, which = (pairs.dist[:, None] - table).abs().min(dim=1)
    assert gap.max() < 1e-5  # float32: the sums are taken in another order
    assert table.sort().values.diff().min() > 1e-4  # so the distance tells which pair it is
    assert torch.equal(pairs.relevant, truth[which])
    # 108 pairs, 5000 draws: each is expected 46 times
    counts = torch.bincount(which, minlength=len(table))
    assert counts.min() > 15
    assert counts.max() < 95


def test_pairs_depend_on_the_seed_and_not_on_the_chunks(monkeypatch):
    p = problem()
    want = sample_pairs(**p, pairs=100, seed=3)
    monkeypatch.setattr(analysis, "PAIR_CHUNK", 7)
    got = sample_pairs(**p, pairs=100, seed=3)
    assert torch.equal(got.relevant, want.relevant)
    assert torch.equal(got.dist, want.dist)
    assert not torch.equal(sample_pairs(**p, pairs=100, seed=4).dist, want.dist)


def test_separation_equals_scikit_learn_s_area_with_ties():
    dist = torch.randint(0, 6, (200,)).float()
    relevant = torch.rand(200) < 0.3
    want = roc_auc_score(relevant.numpy(), -dist.numpy())
    assert separation(Pairs(dist, relevant)) == pytest.approx(want, abs=1e-12)


def test_separation_at_its_ends():
    dist, relevant = torch.tensor([1.0, 2, 3, 4]), torch.tensor([True, True, False, False])
    assert separation(Pairs(dist, relevant)) == 1
    assert separation(Pairs(dist, ~relevant)) == 0
    assert separation(Pairs(torch.ones(4), relevant)) == 0.5
    assert math.isnan(separation(Pairs(dist, torch.ones(4, dtype=torch.bool))))


def test_equal_vectors_stand_at_one_place_and_clusters_stay_clusters():
    centres = torch.tensor([[0.0, 0, 0], [50, 0, 0]])
    vectors = centres.repeat_interleave(20, dim=0) + torch.randn(40, 3)
    of = torch.randint(0, 40, (300,))
    made = embed(vectors[of], seed=0)
    assert made.points.shape == (300, 2)
    assert np.isfinite(made.points).all()
    assert made.distinct == len(of.unique())
    place = {}
    for i, point in zip(of.tolist(), made.points.tolist(), strict=True):
        assert place.setdefault(i, point) == point
    assert len({tuple(p) for p in place.values()}) == made.distinct
    # the nearest other vector on the map is of the same cluster
    names = list(place)
    points = torch.tensor([place[i] for i in names])
    nearest = torch.cdist(points, points).fill_diagonal_(math.inf).argmin(dim=1)
    assert all(names[i] // 20 == names[n] // 20 for i, n in enumerate(nearest.tolist()))


@pytest.mark.parametrize("distinct", [1, 2, 3, 4])
def test_a_map_of_hardly_any_vectors(distinct):
    made = embed(torch.randn(distinct, 5).repeat(10, 1), seed=0)
    assert made.distinct == distinct
    assert np.isfinite(made.points).all()
    assert len(np.unique(made.points, axis=0)) == distinct


def test_a_map_of_numbers():
    made = embed(torch.arange(12.0)[:, None], seed=0)
    assert made.points.shape == (12, 2)
    assert np.isfinite(made.points).all()


def test_a_seed_gives_one_map():
    x = torch.randn(30, 4)
    assert np.array_equal(embed(x, 1).points, embed(x, 1).points)


def test_a_map_needs_finite_vectors():
    for bad in (torch.full((5, 2), math.nan), torch.empty(0, 2)):
        with pytest.raises(ValueError, match="finite"):
            embed(bad, seed=0)


def test_first_query_of_each_class_and_its_nearest():
    codebooks = torch.tensor([[[0.0], [10], [20], [30]]])
    query, labels = torch.tensor([[19.0], [21], [1], [9]]), torch.tensor([2, 2, 0, 2])
    codes = torch.tensor([[3], [2], [1], [0]])
    rows, index = first_of_each_class(query, labels, codes, codebooks, 2, "squared_l2")
    assert rows.tolist() == [2, 0]  # classes 0 and 2
    assert index.tolist() == [[3, 2], [1, 2]]


def test_the_first_query_of_each_label_once_and_none_without_labels():
    query = torch.rand(4, 4)
    codes, codebooks = torch.zeros(3, 2, dtype=torch.int64), torch.rand(2, 2, 2)
    labels = torch.tensor([[0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]])
    rows, index = first_of_each_class(query, labels, codes, codebooks, 2, "squared_l2")
    assert rows.tolist() == [1, 3]  # the second image is the first of two labels
    assert index.shape == (2, 2)
    rows, index = first_of_each_class(query, labels * 0, codes, codebooks, 2, "squared_l2")
    assert len(rows) == len(index) == 0
