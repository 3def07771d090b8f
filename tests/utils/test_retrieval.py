"""Exact search: against naive loops, ties, chunks, both code paths, bad input."""

import pytest
import torch
import torch.nn.functional as F

from utils import retrieval
from utils.retrieval import adc_distances, lookup_tables, nearest, ranked, search

M, K, d = 5, 16, 3
DISTANCES = pytest.mark.parametrize("distance", ["squared_l2", "l2"])


@pytest.fixture
def data():
    codebooks = torch.randn(M, K, d)
    return torch.randn(9, M * d), torch.randint(0, K, (300, M)), codebooks


def naive(query, codes, codebooks, distance):
    dist = torch.zeros(len(query), len(codes), dtype=torch.float64)
    for q in range(len(query)):
        for n in range(len(codes)):
            for m in range(M):
                difference = query[q, m * d : (m + 1) * d] - codebooks[m, codes[n, m]]
                squared = difference.double().square().sum()
                dist[q, n] += squared.sqrt() if distance == "l2" else squared
    return dist


@DISTANCES
def test_distances_equal_naive_loop(data, distance):
    query, codes, codebooks = data
    want = naive(query[:3], codes[:40], codebooks, distance)
    got = adc_distances(query[:3], codes[:40], codebooks, distance)
    # sums of a few float32 terms of order 10: some units in the last place
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-5)


@DISTANCES
def test_search_ranks_as_a_stable_sort(data, distance):
    query, codes, codebooks = data
    want, index = adc_distances(query, codes, codebooks, distance).sort(dim=1, stable=True)
    got = search(query, codes, codebooks, 40, distance)
    assert torch.equal(got[0], want[:, :40])
    assert torch.equal(got[1], index[:, :40])


def test_squared_and_plain_l2_rank_differently(data):
    by_square = search(*data, 50, "squared_l2")[1]
    by_norm = search(*data, 50, "l2")[1]
    assert not torch.equal(by_square, by_norm)


def test_ties_come_in_order_of_index(data):
    query, _, codebooks = data
    codes = torch.randint(0, K, (3, M))[torch.randint(0, 3, (200,))]  # 200 items, 3 codes
    for k in (10, 150, 200):
        dist, index = search(query, codes, codebooks, k)
        tied = dist[:, 1:] == dist[:, :-1]
        assert tied.float().mean() > 0.9
        assert (index[:, 1:] > index[:, :-1])[tied].all()


def test_an_item_made_of_the_query_s_codewords_is_found_at_distance_zero(data):
    _, codes, codebooks = data
    query = torch.stack([codebooks[m, codes[:8, m]] for m in range(M)], dim=1).flatten(1)
    dist, index = search(query, codes, codebooks, 1)
    assert torch.equal(dist, torch.zeros(8, 1))
    assert torch.equal(codes[index[:, 0]], codes[:8])


@pytest.mark.parametrize("k", [1, 37, 299, 300, 1000])
@DISTANCES
def test_in_pieces_as_in_one(data, k, distance, monkeypatch):
    whole = search(*data, k, distance)
    monkeypatch.setattr(retrieval, "DB_CHUNK", 64)  # 300 items in 5 pieces
    monkeypatch.setattr(retrieval, "CHUNK_BYTES", 1)  # a query at a time
    pieces = search(*data, k, distance)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])
    assert whole[0].shape == (9, min(k, 300))


@pytest.mark.parametrize("k", [40, 300])
def test_cpu_path_equals_the_device_path(data, k, monkeypatch):
    by_numpy = search(*data, k)
    monkeypatch.setattr(retrieval, "_SmallestNumpy", lambda: retrieval._smallest_torch)
    by_torch = search(*data, k)
    assert torch.equal(by_numpy[0], by_torch[0])
    assert torch.equal(by_numpy[1], by_torch[1])


@pytest.mark.parametrize("words", [2, 16, 256])
def test_any_number_of_words(words):
    codebooks = torch.randn(7, words, 2)
    query, codes = torch.randn(4, 14), torch.randint(0, words, (100, 7))
    lut = lookup_tables(query, codebooks)
    want = sum(lut[:, m, codes[:, m]] for m in range(7))
    torch.testing.assert_close(adc_distances(query, codes, codebooks), want)


def test_uint8_codes_search_as_int64(data):
    query, codes, codebooks = data
    assert torch.equal(
        search(query, codes.byte(), codebooks, 9)[1], search(query, codes, codebooks, 9)[1]
    )


def test_ranked_yields_what_search_returns(data):
    index = torch.cat([part.clone() for _, part in ranked(*data, 25)])
    assert torch.equal(index, search(*data, 25)[1])


def test_bad_input_is_named(data):
    query, codes, codebooks = data
    with pytest.raises(ValueError, match=r"queries must be \(Q, 15\)"):
        search(query[:, :-1], codes, codebooks, 5)
    with pytest.raises(ValueError, match=r"codes must be \(N, 5\)"):
        search(query, codes[:, :-1], codebooks, 5)
    with pytest.raises(ValueError, match=r"\[0, 16\)"):
        search(query, codes + 1, codebooks, 5)
    with pytest.raises(ValueError, match="unknown distance 'cosine'"):
        search(query, codes, codebooks, 5, "cosine")
    with pytest.raises(ValueError, match="k must be at least 1"):
        search(query, codes, codebooks, 0)
    with pytest.raises(ValueError, match="1 to"):
        search(query, codes[:0], codebooks, 5)
    with pytest.raises(ValueError, match="finite"):
        search(query * float("nan"), codes, codebooks, 5)
    with pytest.raises(ValueError, match="codebooks must be finite"):
        search(query, codes, codebooks * float("nan"), 5)
    for wrong in (codes.float(), codes > 0):
        with pytest.raises(ValueError, match="codes must be integers"):
            search(query, wrong, codebooks, 5)


def test_parameters_and_unsigned_codes_search_as_they_are(data):
    query, codes, codebooks = data
    want = search(query, codes, codebooks, 9)[1]
    learned = torch.nn.Parameter(codebooks)
    assert torch.equal(search(query.requires_grad_(), codes, learned, 9)[1], want)
    assert torch.equal(search(query, codes.to(torch.uint16), codebooks, 9)[1], want)


def test_memory_stays_bounded_with_many_words(monkeypatch):
    rows = []
    tables = retrieval.lookup_tables
    monkeypatch.setattr(
        retrieval, "lookup_tables", lambda q, *rest: rows.append(len(q)) or tables(q, *rest)
    )
    K, d = 4096, 64
    search(torch.randn(256, d), torch.randint(0, K, (10, 1)), torch.randn(1, K, d), 5)
    # (rows, K, d) float32 differences and their squares
    assert max(rows) * K * d * 8 <= retrieval.CHUNK_BYTES


@pytest.mark.parametrize("k", [1, 20, 60, 99])
def test_nearest_of_given_distances_orders_ties_by_index(k):
    dist = torch.randint(0, 5, (4, 60)) / 4.0
    want = [sorted(range(60), key=lambda n: (row[n], n))[:k] for row in dist.tolist()]
    assert nearest(dist, k).tolist() == want
    item_of = torch.randint(0, 60, (200,))  # items that share their distances
    shared = dist[:, item_of]
    want = [sorted(range(200), key=lambda n: (row[n], n))[:k] for row in shared.tolist()]
    assert nearest(dist, k, item_of).tolist() == want


def test_nearest_takes_minus_zero_for_zero():
    assert nearest(torch.tensor([[0.0, -0.0, 0.0]]), 3).tolist() == [[0, 1, 2]]


def test_nearest_names_bad_input():
    with pytest.raises(ValueError, match="not negative"):
        nearest(torch.tensor([[-1.0, 2.0]]), 1)
    with pytest.raises(ValueError, match="finite"):
        nearest(torch.tensor([[float("nan"), 2.0]]), 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        nearest(torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match=r"item_of must lie in \[0, 2\)"):
        nearest(torch.ones(1, 2), 1, torch.tensor([0, 2]))


# --- inner products -----------------------------------------------------------------------------


@pytest.fixture
def unit():
    """As `data`, sub-vectors and codewords of length 1; 40 codes, so that there are ties."""
    codebooks = F.normalize(torch.randn(M, K, d), dim=-1)
    query = F.normalize(torch.randn(9, M, d), dim=-1).flatten(1)
    codes = torch.randint(0, K, (40, M))[torch.randint(0, 40, (300,))]
    return query, codes, codebooks


def test_inner_products_equal_a_naive_loop(unit):
    query, codes, codebooks = unit
    dist = adc_distances(query, codes, codebooks, "inner_product")
    lut = lookup_tables(query, codebooks, "inner_product")
    assert lut.shape == (9, M, K)
    for q in range(3):
        for n in range(40):
            want = 0.0
            for m in range(M):
                word = codebooks[m, codes[n, m]]
                part = query[q, m * d : (m + 1) * d]
                one = 1 - sum(a * b for a, b in zip(part.tolist(), word.tolist(), strict=True))
                # a few float32 products of at most 1
                assert lut[q, m, codes[n, m]].item() == pytest.approx(one, abs=1e-6)
                want += one
            assert dist[q, n].item() == pytest.approx(want, abs=5e-6)


def test_inner_product_is_half_of_squared_l2_and_ranks_as_it_does(unit):
    query, codes, codebooks = unit
    luts = [lookup_tables(query, codebooks, name) for name in ("squared_l2", "inner_product")]
    torch.testing.assert_close(luts[0] / 2, luts[1], rtol=0, atol=1e-6)  # float32, around 1
    exact = adc_distances(query, codes, codebooks, "squared_l2").double().sort(dim=1).values
    gaps = exact.diff(dim=1)
    assert (gaps[gaps != 0] > 2e-5).all()  # no rounding of sums up to 20 turns an order round
    assert (gaps == 0).float().mean() > 0.5
    for k in (7, 120, 300):
        by_square, by_product = (
            search(query, codes, codebooks, k, name) for name in ("squared_l2", "inner_product")
        )
        assert torch.equal(by_square[1], by_product[1])
        torch.testing.assert_close(by_square[0] / 2, by_product[0], rtol=0, atol=5e-6)
        ties = by_product[0].diff(dim=1) == 0
        assert torch.equal(ties, by_square[0].diff(dim=1) == 0)
        assert (by_product[1].diff(dim=1)[ties] > 0).all()


@pytest.mark.parametrize("k", [40, 300])
def test_inner_products_by_every_path_and_in_pieces(unit, k, monkeypatch):
    whole = search(*unit, k, "inner_product")
    monkeypatch.setattr(retrieval, "DB_CHUNK", 64)
    monkeypatch.setattr(retrieval, "CHUNK_BYTES", 1)
    pieces = search(*unit, k, "inner_product")
    monkeypatch.setattr(retrieval, "_SmallestNumpy", lambda: retrieval._smallest_torch)
    by_torch = search(*unit, k, "inner_product")
    for found in (pieces, by_torch):
        # a table of fewer rows may be summed in another order
        torch.testing.assert_close(found[0], whole[0], rtol=0, atol=5e-6)
        assert torch.equal(found[1], whole[1])


def test_inner_products_are_no_distance_of_longer_vectors(unit):
    query, codes, codebooks = unit
    with pytest.raises(ValueError, match=r"between sub-vectors of length 1; one has 1\.5$"):
        search(1.5 * query, codes, codebooks, 5, "inner_product")
    one = codebooks.clone()
    one[3, 7] *= 2  # a single codeword
    with pytest.raises(ValueError, match=r"between sub-vectors of length 1; one has 2$"):
        search(query, codes, one, 5, "inner_product")
    part = query.clone()
    part[4, -d:] *= 1.01  # a single sub-vector
    with pytest.raises(ValueError, match=r"one has 1\.01$"):
        lookup_tables(part, codebooks, "inner_product")
    # the whole of a query is longer than 1, and rounding is allowed for
    lookup_tables(1.0005 * query, codebooks, "inner_product")
    assert lookup_tables(query[:0], codebooks, "inner_product").shape == (0, M, K)


def test_inner_products_of_codewords_with_themselves_are_no_negative_distance(unit):
    _, codes, codebooks = unit
    words = torch.stack([codebooks[m, codes[:8, m]] for m in range(M)], dim=1).flatten(1)
    for factor in (1.0, 1.0005):
        lut = lookup_tables(factor * words, codebooks, "inner_product")
        assert (lut >= 0).all()
        dist, index = search(factor * words, codes, codebooks, 1, "inner_product")
        assert torch.equal(codes[index[:, 0]], codes[:8])
        assert dist.max() < 1e-6
    # a sub-vector of zeros, which intra-normalisation leaves, is equally far from all codewords
    words[:, :d] = 0
    assert (lookup_tables(words, codebooks, "inner_product")[:, 0] == 1).all()


def test_inner_products_are_not_rounded_where_a_network_s_are():
    codebooks = torch.nn.functional.normalize(torch.randn(M, K, d), dim=-1)
    query = torch.nn.functional.normalize(torch.randn(4, M, d), dim=-1).flatten(1)
    want = lookup_tables(query, codebooks, "inner_product")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lookup_tables(query, codebooks, "inner_product"), want)
