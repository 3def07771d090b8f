"""Losses against naive double loops; gradients; symmetries; bad input."""

import math

import pytest
import torch

from losses import contrastive_loss, cqc_loss
from losses.nt_xent import nt_xent

B, D, TAU = 5, 6, 0.4


@pytest.fixture
def views():
    return [torch.randn(B, D, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def cos(u, v):
    return (u @ v / (u.norm() * v.norm())).item()


def naive_nt_xent(u, v, tau):
    rows = [*u.detach(), *v.detach()]
    total = 0.0
    for i in range(len(rows)):
        positive = math.exp(cos(rows[i], rows[(i + B) % (2 * B)]) / tau)
        others = sum(math.exp(cos(rows[i], rows[j]) / tau) for j in range(2 * B) if j != i)
        total -= math.log(positive / others)
    return total / (2 * B)


def naive_cross(x, z, tau):
    total = 0.0
    for i in range(B):
        all_z = sum(math.exp(cos(x[i], z[j]) / tau) for j in range(B))
        total -= math.log(math.exp(cos(x[i], z[i]) / tau) / all_z)
    return total / B


def test_nt_xent_equals_naive_loop(views):
    x, z = views[:2]
    assert nt_xent(x, z, TAU).item() == pytest.approx(naive_nt_xent(x, z, TAU), abs=1e-12)


def test_released_variant_equals_naive_loop(views):
    x_a, x_b, z_a, z_b = views
    want = naive_nt_xent(x_a, z_b, TAU) + naive_nt_xent(x_b, z_a, TAU)
    assert cqc_loss(*views, TAU).item() == pytest.approx(want, abs=1e-12)


def test_paper_variant_equals_naive_loop(views):
    x_a, x_b, z_a, z_b = (v.detach() for v in views)
    want = naive_cross(x_a, z_b, TAU) + naive_cross(x_b, z_a, TAU)
    assert cqc_loss(*views, TAU, "paper").item() == pytest.approx(want, abs=1e-12)


def test_contrastive_compares_like_with_like(views):
    x_a, x_b, z_a, z_b = views
    want = naive_nt_xent(x_a, x_b, TAU) + naive_nt_xent(z_a, z_b, TAU)
    assert contrastive_loss(*views, TAU).item() == pytest.approx(want, abs=1e-12)


def released(*views):
    return cqc_loss(*views, TAU, "released")


def paper(*views):
    return cqc_loss(*views, TAU, "paper")


def contrastive(*views):
    return contrastive_loss(*views, TAU)


ALL = pytest.mark.parametrize("loss", [released, paper, contrastive])


@ALL
def test_gradients_by_finite_differences(loss, views):
    assert torch.autograd.gradcheck(loss, views)


@ALL
def test_swapping_the_views_changes_nothing(loss, views):
    x_a, x_b, z_a, z_b = views
    torch.testing.assert_close(loss(x_a, x_b, z_a, z_b), loss(x_b, x_a, z_b, z_a))


@ALL
def test_permuting_the_batch_changes_nothing(loss, views):
    order = torch.randperm(B)
    torch.testing.assert_close(loss(*views), loss(*(v[order] for v in views)))


@ALL
def test_lengths_do_not_matter(loss, views):
    torch.testing.assert_close(loss(*views), loss(*(3.0 * v for v in views)))


@ALL
def test_matching_views_cost_less_than_mismatched(loss):
    rows = torch.eye(B, dtype=torch.float64)
    assert loss(rows, rows, rows, rows) < loss(rows, rows.roll(1, 0), rows, rows.roll(1, 0))


def test_known_value_of_orthogonal_rows():
    # paper's loss: positives have cosine 1, the B - 1 others 0, in both directions
    rows = torch.eye(B, dtype=torch.float64)
    want = 2 * math.log(1 + (B - 1) * math.exp(-1 / TAU))
    assert paper(rows, rows, rows, rows).item() == pytest.approx(want, abs=1e-12)


def test_float32_under_autocast(views):
    single = [v.detach().float() for v in views]
    with torch.autocast("cpu", torch.bfloat16):
        loss = released(*single)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, released(*single))


def test_bad_input_is_named(views):
    with pytest.raises(ValueError, match="tau must be positive"):
        cqc_loss(*views, 0.0)
    with pytest.raises(ValueError, match="unknown variant 'other'"):
        cqc_loss(*views, TAU, "other")
    with pytest.raises(ValueError, match="of one shape"):
        cqc_loss(views[0][:2], *views[1:], TAU)
