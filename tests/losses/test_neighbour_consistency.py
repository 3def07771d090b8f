"""The second stage's loss against naive loops; gradients; extremes; bad input."""

import math

import pytest
import torch

from losses import neighbour_consistency_loss

B, M, K, WEIGHT = 5, 3, 4, 2.0


@pytest.fixture
def pair():
    logits = torch.randn(2, B, M, K, dtype=torch.float64)
    return tuple(logits.softmax(dim=-1).requires_grad_())


def test_equals_naive_loop(pair):
    p, q = (assign.tolist() for assign in pair)
    agreement = 0.0
    for i in range(B):
        for m in range(M):
            agreement += math.log(sum(p[i][m][k] * q[i][m][k] for k in range(K))) / (B * M)
    entropy = 0.0
    for m in range(M):
        for k in range(K):
            mean = sum(p[i][m][k] + q[i][m][k] for i in range(B)) / (2 * B)
            entropy -= mean * math.log(mean) / M
    want = -agreement - WEIGHT * entropy
    assert neighbour_consistency_loss(*pair, WEIGHT).item() == pytest.approx(want, abs=1e-12)


def test_gradients_by_finite_differences(pair):
    assert torch.autograd.gradcheck(lambda p, q: neighbour_consistency_loss(p, q, WEIGHT), pair)


def test_image_and_neighbour_may_change_places(pair):
    one, two = neighbour_consistency_loss(*pair, WEIGHT), neighbour_consistency_loss(*pair[::-1], 2)
    torch.testing.assert_close(one, two)


def test_the_smallest_loss_agrees_surely_and_uses_every_codeword():
    sure = torch.eye(K, dtype=torch.float64)[:, None].repeat(1, M, 1)  # (K, M, K)
    least = -WEIGHT * math.log(K)
    assert neighbour_consistency_loss(sure, sure, WEIGHT).item() == pytest.approx(least)
    collapsed = sure[:1].repeat(K, 1, 1)
    assert neighbour_consistency_loss(collapsed, collapsed, WEIGHT).item() == pytest.approx(0)
    even = torch.full_like(sure, 1 / K)
    unsure = neighbour_consistency_loss(even, even, WEIGHT).item()
    assert unsure == pytest.approx(math.log(K) - WEIGHT * math.log(K))


def test_assignments_that_never_meet_give_a_finite_loss():
    p = torch.eye(K)[:, None]
    assert math.isfinite(neighbour_consistency_loss(p, p.roll(1, dims=0), WEIGHT))


def test_bad_input_is_named(pair):
    with pytest.raises(ValueError, match=r"\(B, M, K\) of one shape"):
        neighbour_consistency_loss(pair[0], pair[1][:2], WEIGHT)
    with pytest.raises(ValueError, match=r"\(B, M, K\) of one shape"):
        neighbour_consistency_loss(pair[0][0], pair[1][0], WEIGHT)
