"""Product quantizer: naive loops, exact round trips, gradients, limits."""

import math

import pytest
import torch

from models import ProductQuantizer, build_quantizer

M, K, d, N = 3, 4, 5, 7


@pytest.fixture
def pq():
    return ProductQuantizer(M, K, d).double()


def naive_assign(x, codebooks, alpha):
    """The formula, one number at a time."""
    assign = torch.zeros(len(x), M, K, dtype=x.dtype)
    for n in range(len(x)):
        for m in range(M):
            x_m = x[n, m * d : (m + 1) * d]
            weights = [
                math.exp(-alpha * sum((x_m[i] - codebooks[m, k, i]).item() ** 2 for i in range(d)))
                for k in range(K)
            ]
            for k in range(K):
                assign[n, m, k] = weights[k] / sum(weights)
    return assign


def test_soft_equals_naive_loop(pq):
    x = torch.randn(N, M * d, dtype=torch.float64)
    assign = naive_assign(x, pq.codebooks.detach(), alpha=2.0)
    z = torch.zeros(N, M * d, dtype=torch.float64)
    for n in range(N):
        for m in range(M):
            for k in range(K):
                z[n, m * d : (m + 1) * d] += assign[n, m, k] * pq.codebooks[m, k].detach()
    # float64 throughout; the vectorised form drops ||x||^2, which costs a few roundings
    torch.testing.assert_close(pq.assign(x, 2.0), assign, atol=1e-12, rtol=0)
    torch.testing.assert_close(pq.soft(x, 2.0), z, atol=1e-12, rtol=0)


def test_encode_is_the_nearest_codeword(pq):
    x = torch.randn(N, M * d, dtype=torch.float64)
    codes = pq.encode(x)
    for n in range(N):
        for m in range(M):
            dist = (x[n, m * d : (m + 1) * d] - pq.codebooks[m]).square().sum(-1)
            assert codes[n, m] == dist.argmin()


def test_codewords_round_trip_exactly(pq):
    codes = torch.randint(0, K, (50, M))
    assert torch.equal(pq.encode(pq.decode(codes)), codes)


@pytest.mark.parametrize("offset", [0.0, 5.0, 50.0])
def test_codewords_round_trip_in_float32_far_from_the_origin(pq, offset):
    pq = pq.float()
    with torch.no_grad():
        pq.codebooks.mul_(0.05).add_(offset)
    codes = torch.randint(0, K, (50, M))
    assert torch.equal(pq.encode(pq.decode(codes)), codes)


def test_codes_that_are_no_integers_are_refused(pq):
    with pytest.raises(ValueError, match="integers"):
        pq.decode(torch.zeros(2, M))


def test_decode_concatenates_the_named_codewords(pq):
    z = pq.decode(torch.tensor([[1, 0, 3]]))[0]
    want = torch.cat([pq.codebooks[0, 1], pq.codebooks[1, 0], pq.codebooks[2, 3]])
    assert torch.equal(z, want)


def test_soft_tends_to_hard_as_alpha_grows(pq):
    x = torch.randn(N, M * d, dtype=torch.float64)
    hard = pq.decode(pq.encode(x))
    gaps = [(pq.soft(x, alpha) - hard).abs().max().item() for alpha in (1.0, 10.0, 100.0, 1e5)]
    assert gaps[0] > gaps[2] > gaps[3]
    assert gaps[3] < 1e-6


def test_soft_tends_to_the_mean_codeword_as_alpha_vanishes(pq):
    z = pq.soft(torch.randn(N, M * d, dtype=torch.float64), 1e-12)
    mean = pq.codebooks.mean(dim=1).flatten().expand(N, -1)
    torch.testing.assert_close(z, mean, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", ["soft", "assign"])
def test_gradients_by_finite_differences(shape):
    pq = ProductQuantizer(2, 3, 2).double()
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def run(x, codebooks):
        return torch.func.functional_call(pq, {"codebooks": codebooks}, (x,))

    pq.forward = lambda x: getattr(pq, shape)(x, 2.0)
    assert torch.autograd.gradcheck(run, (x, pq.codebooks))


def test_hard_has_the_hard_value_and_the_soft_gradient(pq):
    x = torch.randn(N, M * d, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(N, M * d, dtype=torch.float64)
    hard = pq.hard(x, 2.0)
    torch.testing.assert_close(hard, pq.decode(pq.encode(x)), atol=1e-12, rtol=0)
    got = torch.autograd.grad((hard * weights).sum(), [x, pq.codebooks])
    want = torch.autograd.grad((pq.soft(x, 2.0) * weights).sum(), [x, pq.codebooks])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0


def test_computes_in_float32_under_autocast():
    pq = ProductQuantizer(M, K, d)
    x = torch.randn(N, M * d)
    with torch.autocast("cpu", torch.bfloat16):
        z = pq.soft(x, 5.0)
    assert z.dtype == torch.float32
    assert torch.equal(z, pq.soft(x, 5.0))


def test_initial_codewords_are_xavier_uniform_over_K_by_Md():
    pq = ProductQuantizer(8, 16, 16)
    bound = math.sqrt(6 / (16 + 8 * 16))
    assert pq.codebooks.abs().max() <= bound
    # of 2,048 uniform numbers the largest is within 2% of the bound but for odds of 1e-18
    assert pq.codebooks.abs().max() > 0.98 * bound


@pytest.mark.parametrize(("m", "k", "bits"), [(4, 16, 16), (8, 16, 32), (16, 16, 64), (8, 256, 64)])
def test_code_bits(m, k, bits):
    assert ProductQuantizer(m, k, 2).code_bits == bits


def test_single_quantizer_spans_all_dimensions():
    vq = build_quantizer("vq", 8, 16, 4)
    assert vq.codebooks.shape == (1, 16, 32)
    assert vq.code_bits == 4


def test_wrong_shapes_are_named(pq):
    with pytest.raises(ValueError, match=r"\(N, 15\)"):
        pq.soft(torch.zeros(2, 14), 1.0)
    with pytest.raises(ValueError, match=r"codes must be \(N, 3\)"):
        pq.decode(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        pq.decode(torch.full((1, M), K))
    with pytest.raises(ValueError, match="positive"):
        ProductQuantizer(0, 16, 16)
    with pytest.raises(ValueError, match="unknown quantizer"):
        build_quantizer("opq", 8, 16, 16)
