"""Quantizer built from class prototypes: naive loops, one table everywhere, round trips, limits."""

import math

import pytest
import torch
from torch.func import functional_call

from models import PrototypeQuantizer
from models.quantizer import intra_normalize
from utils.retrieval import adc_distances

M, K, d, C, N = 3, 5, 4, 6, 7
ALPHA = 5.0
EXACT = {"atol": 1e-12, "rtol": 0}  # float64 throughout: some roundings of numbers up to 1


@pytest.fixture
def pq():
    return PrototypeQuantizer(M, K, d, C, ALPHA).double()


@pytest.fixture
def x():
    return intra_normalize(torch.randn(N, M * d, dtype=torch.float64), M)


# --- the formulas, one number at a time, on lists -------------------------------------------------


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def unit(v):
    length = math.sqrt(dot(v, v))
    return [a / length for a in v] if length else v


def part(row, m):
    """The m-th sub-vector of a row."""
    return row[m * d : (m + 1) * d].tolist()


def weights(v, table, alpha):
    """Softmax of -alpha * (1 - inner product) over the rows of a table."""
    powers = [math.exp(-alpha * (1 - dot(v, row))) for row in table]
    return [power / sum(powers) for power in powers]


def mixture(shares, table):
    mixed = [0.0] * d
    for share, row in zip(shares, table, strict=True):
        mixed = [a + share * b for a, b in zip(mixed, row, strict=True)]
    return unit(mixed)


def naive_codebooks(pq):
    words, prototypes = pq.words.detach(), pq.prototypes.detach()
    codebooks = []
    for m in range(M):
        table = [unit(part(prototypes[c], m)) for c in range(C)]
        shares = [weights(words[m, k].tolist(), table, pq.alpha) for k in range(K)]
        codebooks.append([mixture(shares[k], table) for k in range(K)])
    return codebooks


def naive_soft(x, codebooks, alpha):
    """Soft assignment (N, M, K), and z (N, D)."""
    assign = [[weights(part(row, m), codebooks[m], alpha) for m in range(M)] for row in x]
    z = [[v for m in range(M) for v in mixture(shares[m], codebooks[m])] for shares in assign]
    return torch.tensor(assign, dtype=torch.float64), torch.tensor(z, dtype=torch.float64)


def test_codebooks_equal_naive_loop(pq):
    want = torch.tensor(naive_codebooks(pq), dtype=torch.float64)
    torch.testing.assert_close(pq.codebooks.detach(), want, **EXACT)


def test_soft_equals_naive_loop(pq, x):
    assign, z = naive_soft(x, naive_codebooks(pq), ALPHA)
    torch.testing.assert_close(pq.assign(x).detach(), assign, **EXACT)
    torch.testing.assert_close(pq.soft(x).detach(), z, **EXACT)


def test_intra_normalize_equals_naive_loop():
    x = torch.randn(N, M * d, dtype=torch.float64)
    want = [[v for m in range(M) for v in unit(part(row, m))] for row in x]
    torch.testing.assert_close(
        intra_normalize(x, M), torch.tensor(want, dtype=torch.float64), **EXACT
    )


def test_codewords_and_soft_quantized_subvectors_have_length_one(pq, x):
    for vectors in (pq.codebooks, pq.soft(x).reshape(N, M, d), x.reshape(N, M, d)):
        lengths = vectors.norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), **EXACT)


def test_lengths_of_prototypes_do_not_matter_but_those_of_words_do(pq):
    before = pq.codebooks.detach()
    with torch.no_grad():
        pq.prototypes.mul_(torch.rand(C, 1, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(pq.codebooks.detach(), before, **EXACT)
    with torch.no_grad():
        pq.words.mul_(2.0)  # the inner product with a longer word is larger: sharper shares
    assert (pq.codebooks - before).abs().max() > 1e-3


def test_the_order_of_classes_does_not_matter(pq):
    before = pq.codebooks.detach()
    with torch.no_grad():
        pq.prototypes.copy_(pq.prototypes[torch.randperm(C)])
    torch.testing.assert_close(pq.codebooks.detach(), before, **EXACT)


# --- zeros ----------------------------------------------------------------------------------------


def test_a_zero_subvector_stays_zero():
    x = torch.randn(2, M * d, dtype=torch.float64)
    x[0, d : 2 * d] = 0.0
    lengths = intra_normalize(x, M).reshape(2, M, d).norm(dim=-1)
    want = torch.ones(2, M, dtype=torch.float64)
    want[0, 1] = 0.0
    torch.testing.assert_close(lengths, want, **EXACT)


def test_a_zero_subvector_is_assigned_evenly(pq, x):
    x[2, :d] = 0.0
    even = torch.full((K,), 1 / K, dtype=torch.float64)
    torch.testing.assert_close(pq.assign(x)[2, 0].detach(), even, **EXACT)
    mean = naive_soft(x, naive_codebooks(pq), ALPHA)[1]
    torch.testing.assert_close(pq.soft(x).detach(), mean, **EXACT)


def test_a_prototype_with_a_zero_subvector_is_still_mixed_in(pq):
    with torch.no_grad():
        pq.prototypes[4, 2 * d :] = 0.0
    want = torch.tensor(naive_codebooks(pq), dtype=torch.float64)
    torch.testing.assert_close(pq.codebooks.detach(), want, **EXACT)


def test_equal_shares_of_opposite_prototypes_give_a_codeword_of_zeros():
    pq = PrototypeQuantizer(1, 2, 2, classes=2)
    with torch.no_grad():
        pq.words.zero_()
        pq.prototypes.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert torch.equal(pq.codebooks, torch.zeros(1, 2, 2))
    assert torch.equal(pq.soft(torch.tensor([[1.0, 0.0]])), torch.zeros(1, 2))


# --- one table everywhere -------------------------------------------------------------------------


def check_one_table(pq, x):
    """That soft, encode, decode and a search by `codebooks` know one table."""
    table = pq.codebooks.detach()
    z = naive_soft(x, table.tolist(), pq.alpha)[1]
    torch.testing.assert_close(pq.soft(x).detach(), z, **EXACT)
    codes = pq.encode(x)
    for n in range(len(x)):
        for m in range(M):
            x_m = x[n, m * d : (m + 1) * d]
            assert codes[n, m] == (table[m] @ x_m).argmax()
            assert codes[n, m] == (table[m] - x_m).square().sum(-1).argmin()
    stored = torch.stack([table[m, codes[:, m]] for m in range(M)], dim=1)  # (N, M, d)
    assert torch.equal(pq.decode(codes), stored.flatten(1))
    sim = torch.einsum("qmd,nmd->qn", x.reshape(-1, M, d), stored)
    # look-up tables are float32
    for distance, scale in (("inner_product", 1), ("squared_l2", 2)):
        dist = adc_distances(x, codes, pq.codebooks.detach(), distance).double()
        torch.testing.assert_close(dist, scale * (M - sim), atol=1e-5, rtol=0)


def test_one_table_is_mixed_picked_from_decoded_and_searched_by(pq):
    x = intra_normalize(torch.randn(60, M * d, dtype=torch.float64), M)
    check_one_table(pq, x)
    assert len(pq.encode(x).unique()) == K  # a table whose words all differ enough to be picked


@pytest.mark.parametrize("changed", ["prototypes", "words"])
def test_prototypes_and_words_change_codes_decode_and_soft_together(pq, changed):
    x = intra_normalize(torch.randn(60, M * d, dtype=torch.float64), M)
    codes, z = pq.encode(x), pq.soft(x)
    decoded, table = pq.decode(codes), pq.codebooks
    with torch.no_grad():
        parameter = getattr(pq, changed)
        parameter.add_(torch.randn_like(parameter))
    assert (pq.codebooks - table).abs().amax(dim=-1).min() > 1e-3  # every codeword moves
    assert (pq.encode(x) != codes).any()
    assert (pq.decode(codes) - decoded).abs().max() > 1e-3
    assert (pq.soft(x) - z).abs().amax(dim=-1).min() > 1e-3
    check_one_table(pq, x)


def test_loaded_weights_bring_their_table_along(pq, x):
    other = PrototypeQuantizer(M, K, d, C, ALPHA).double()
    assert set(other.state_dict()) == {"words", "prototypes"}
    other.load_state_dict(pq.state_dict())
    assert torch.equal(other.codebooks, pq.codebooks)
    assert torch.equal(other.encode(x), pq.encode(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(M, K, d, C), (12, 16, 12, 10)])
def test_codewords_round_trip_exactly(shape, dtype):
    pq = PrototypeQuantizer(*shape).to(dtype)
    codes = torch.randint(0, shape[1], (50, shape[0]))
    x = pq.decode(codes)
    assert torch.equal(pq.encode(x), codes)
    assert torch.equal(pq.decode(pq.encode(x)), x)


def test_soft_tends_to_hard_as_alpha_grows(pq, x):
    p = pq.unit_prototypes().detach().reshape(C, M, d).transpose(0, 1)
    with torch.no_grad():
        pq.words.copy_(1e4 * p[:, :K])  # so far out that the table is the same for every alpha
    gaps = []
    for alpha in (1.0, 10.0, 100.0, 1e6):
        pq.alpha = alpha
        torch.testing.assert_close(pq.codebooks, p[:, :K], **EXACT)
        hard = pq.decode(pq.encode(x))
        gaps.append((pq.soft(x) - hard).abs().max().item())
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[3] < 1e-6


def test_everything_tends_to_the_mean_prototype_as_alpha_vanishes(pq, x):
    pq.alpha = 1e-12
    p = pq.unit_prototypes().reshape(C, M, d)
    mean = torch.nn.functional.normalize(p.mean(dim=0), dim=-1)
    # the mean of six unit vectors is not near 0, so errors of 1e-12 stay below 1e-9
    torch.testing.assert_close(pq.codebooks, mean[:, None].expand(M, K, d), atol=1e-9, rtol=0)
    torch.testing.assert_close(pq.soft(x), mean.flatten().expand(N, -1), atol=1e-9, rtol=0)


# --- gradients, precision, initial values ---------------------------------------------------------


@pytest.mark.parametrize("what", ["codebooks", "assign", "soft", "decode"])
def test_gradients_by_finite_differences(what):
    pq = PrototypeQuantizer(2, 3, 2, classes=4, alpha=3.0).double()
    x = intra_normalize(torch.randn(3, 4, dtype=torch.float64), 2).requires_grad_()
    codes = torch.tensor([[0, 2], [1, 1]])
    pq.forward = {
        "codebooks": lambda x: pq.codebooks,
        "assign": pq.assign,
        "soft": pq.soft,
        "decode": lambda x: pq.decode(codes),
    }[what]

    def run(x, words, prototypes):
        return functional_call(pq, {"words": words, "prototypes": prototypes}, (x,))

    inputs = (x, pq.words, pq.prototypes)
    assert torch.autograd.gradcheck(run, inputs)
    total = (run(*inputs) * torch.randn_like(run(*inputs))).sum()
    for gradient in torch.autograd.grad(total, inputs[1:]):
        assert gradient.abs().max() > 0


def test_gradients_of_intra_normalize_by_finite_differences():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: intra_normalize(x, 2), x)


def test_computes_in_float32_under_autocast():
    pq = PrototypeQuantizer(M, K, d, C)
    x = intra_normalize(torch.randn(N, M * d), M)
    want = pq.codebooks, pq.assign(x), pq.soft(x), pq.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = pq.codebooks, pq.assign(x), pq.soft(x), pq.encode(x)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert got[2].dtype == torch.float32


def test_initial_words_and_prototypes_are_xavier_uniform():
    pq = PrototypeQuantizer(12, 16, 12, classes=100)
    assert pq.words.shape == (12, 16, 12)
    assert pq.prototypes.shape == (100, 144)
    for parameter, rows in ((pq.words, 16), (pq.prototypes, 100)):
        bound = math.sqrt(6 / (rows + 144))
        # of 2,304 uniform numbers or more the largest is within 2% of the bound but for odds of
        # 1e-20
        assert 0.98 * bound < parameter.abs().max() <= bound
    assert pq.code_bits == 48


def test_bad_input_is_named(pq):
    for method in (pq.assign, pq.soft, pq.encode):
        with pytest.raises(ValueError, match=r"\(N, 12\) for M=3, d=4; got \(2, 11\)"):
            method(torch.zeros(2, 11))
    with pytest.raises(ValueError, match="classes and alpha must be positive, got 0"):
        PrototypeQuantizer(M, K, d, classes=0)
    with pytest.raises(ValueError, match="positive, got M=3, K=0, d=4"):
        PrototypeQuantizer(M, 0, d, classes=2)
    with pytest.raises(ValueError, match="codes must be integers"):
        pq.decode(torch.zeros(2, M))
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 5\)"):
        pq.decode(torch.full((1, M), K))
    for wrong in (torch.zeros(2, 10), torch.zeros(12), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match=r"\(N, D\) with D a multiple of M=3; got \("):
            intra_normalize(wrong, M)


def test_a_zero_subvector_has_a_gradient_that_ends():
    x = torch.zeros(1, M * d, requires_grad=True)
    intra_normalize(x, M).sum().backward()
    assert x.grad.abs().max() <= 1.001e6  # 1 / 1e-6, the least length that is divided by
    with pytest.raises(ValueError, match="multiple of M=0"):
        intra_normalize(x, 0)
