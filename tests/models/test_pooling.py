"""GeM: a naive loop, its limits, gradients, precision."""

import itertools

import pytest
import torch

from models.pooling import GeM


def naive_gem(x, p, eps):
    """As the formula reads, a channel at a time, in Python's floats."""
    N, C, H, W = x.shape
    out = torch.empty(N, C, dtype=torch.float64)
    for n in range(N):
        for c in range(C):
            total = 0.0
            for i in range(H):
                for j in range(W):
                    total += max(float(x[n, c, i, j]), eps) ** p
            out[n, c] = (total / (H * W)) ** (1 / p)
    return out


@pytest.mark.parametrize("p", [0.5, 1.0, 3.0, 4.7])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_equals_a_naive_loop(p, eps):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)  # half of it below eps
    # float64, but p itself is float32
    torch.testing.assert_close(GeM(p, eps=eps)(x), naive_gem(x, p, eps), rtol=1e-6, atol=1e-9)
    found = GeM(p, eps=eps)(x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive_gem(x, p, eps), rtol=1e-5, atol=1e-7)


def test_a_map_worked_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [-5.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]]])
    want = torch.tensor([[(9 / 4) ** (1 / 3), 2.0]])  # (1 + 8 + 0 + 0) / 4; a constant stays
    torch.testing.assert_close(GeM()(x), want)


def test_limits_are_the_average_and_the_maximum():
    x = torch.rand(2, 3, 5, 4) + 0.1
    torch.testing.assert_close(GeM(1.0)(x), x.mean(dim=(2, 3)))
    # (1 / 20)^(1 / p) of the maximum at least
    torch.testing.assert_close(GeM(1e5)(x), x.amax(dim=(2, 3)), rtol=1e-4, atol=0)
    pooled = [GeM(p)(x) for p in (0.5, 1.0, 2.0, 3.0, 8.0, 50.0)]
    assert all((a < b).all() for a, b in itertools.pairwise(pooled))  # grows with p


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_high_powers_stay_in_range(scale):
    x = (torch.rand(2, 3, 4, 4) * scale).requires_grad_()
    gem = GeM(12.0, trainable=True)  # 1e-5^12 and 1e5^12 are outside float32
    gem(x).sum().backward()
    # float32; homogeneous, as long as eps is small beside the values
    want = scale * naive_gem(x.detach().double() / scale, 12.0, 1e-6 / scale)
    torch.testing.assert_close(gem(x).detach().double(), want, rtol=1e-5, atol=0)
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(gem.p.grad)
    assert gem.p.grad != 0


@pytest.mark.parametrize("p", [1.5, 3.0])
def test_gradients_are_those_of_differences(p):
    gem = GeM(p, trainable=True, eps=0.05).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    x[(x - 0.05).abs() < 1e-3] = 1.0  # no differences across the corner
    x.requires_grad_()
    assert (x > 0.05).any()
    assert (x < 0.05).any()
    assert torch.autograd.gradcheck(lambda x, p: gem(x), (x, gem.p))


def test_p_is_a_parameter_only_if_it_learns():
    fixed, learning = GeM(), GeM(trainable=True)
    assert list(fixed.parameters()) == []
    assert list(fixed.state_dict()) == list(learning.state_dict()) == ["p"]
    learning(torch.rand(2, 3, 4, 4)).sum().backward()
    assert torch.isfinite(learning.p.grad)
    assert learning.p.grad > 0  # it grows with p


def test_a_map_without_positive_values_gives_eps():
    gem = GeM(trainable=True)
    x = -torch.rand(1, 2, 3, 3)
    x.requires_grad_()
    out = gem(x)
    torch.testing.assert_close(out, torch.full((1, 2), 1e-6))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.isfinite(gem.p.grad)


def test_autocast_does_not_coarsen_it():
    x = torch.rand(2, 8, 7, 7) * 10
    with torch.autocast("cpu", torch.bfloat16):
        found, coarse = GeM()(x), GeM()(x.bfloat16())
    assert torch.equal(found, GeM()(x))
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, GeM()(x.bfloat16().float()))
    torch.testing.assert_close(coarse, GeM()(x), rtol=2**-8, atol=0)  # bf16's inputs only


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["p", "eps"])
def test_bad_numbers_are_named(name, bad):
    with pytest.raises(ValueError, match=rf"^GeM's {name} must be above 0 and finite, not {bad}$"):
        GeM(**{name: bad})


def test_only_maps_are_pooled():
    with pytest.raises(ValueError, match=r"^GeM pools maps \(N, C, H, W\), not \(2, 3\)$"):
        GeM()(torch.rand(2, 3))
