"""Nearest neighbours, their purity and kNN accuracy: naive loops and cases by hand."""

import math

import pytest
import torch

from utils import neighbours
from utils.neighbours import knn_accuracy, nearest_by_cosine, neighbour_purity

N, D, K = 23, 5, 4


@pytest.mark.parametrize("exclude_self", [False, True])
def test_nearest_equals_sorting_all_cosines(exclude_self, monkeypatch):
    monkeypatch.setattr(neighbours, "CHUNK_BYTES", 4 * N * 7)  # 7 rows, the last 2
    x = torch.randn(N, D)
    index, sims = nearest_by_cosine(x, x, K, exclude_self)
    for n in range(N):
        cosines = [float(x[n] @ x[j] / (x[n].norm() * x[j].norm())) for j in range(N)]
        others = [j for j in range(N) if j != n or not exclude_self]
        want = sorted(others, key=lambda j: -cosines[j])[:K]
        assert index[n].tolist() == want
        assert sims[n].tolist() == pytest.approx([cosines[j] for j in want], abs=1e-6)


def test_cosines_are_float32_under_autocast():
    x = torch.randn(N, D)
    with torch.autocast("cpu", torch.bfloat16):
        index, sims = nearest_by_cosine(x, x, K)
    assert sims.dtype == torch.float32
    assert torch.equal(index, nearest_by_cosine(x, x, K)[0])


def test_copies_of_an_image_are_neighbours():
    x = torch.eye(3).repeat(2, 1)
    assert nearest_by_cosine(x, x, 1, exclude_self=True)[0][:, 0].tolist() == [3, 4, 5, 0, 1, 2]


def test_purity_by_hand():
    near = torch.tensor([[0, 1], [2, 0]])
    assert neighbour_purity(near, torch.tensor([5, 7]), torch.tensor([5, 7, 7])) == 0.5
    several = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    assert neighbour_purity(near, several[:2], several) == 0.75  # but for image 1 and image 2


def test_knn_weighs_votes_by_cosine():
    near, labels = torch.tensor([[0, 1, 2]]), torch.tensor([0, 1, 1])
    for first, want in ((0.9, 0), (0.5, 1)):
        sims = torch.tensor([[first, 0.5, 0.4]])
        assert (math.exp(first / 0.1) > math.exp(5) + math.exp(4)) == (want == 0)
        assert knn_accuracy(near, sims, torch.tensor([want]), labels) == 1.0
        assert knn_accuracy(near, sims, torch.tensor([1 - want]), labels) == 0.0
