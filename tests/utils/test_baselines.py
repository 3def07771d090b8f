"""Quantizers of given features: sizes of codes, rankings against loops, what they minimise."""

import faiss
import numpy as np
import pytest
import torch

from utils.baselines import (
    METHODS,
    PCA_ABOVE,
    PCA_DIMS,
    RANDOM,
    Hashing,
    Product,
    Space,
    fit,
    ranked_l2,
)
from utils.metrics import evaluate_rankings
from utils.search.packing import pack_codes, unpack_codes

COMPRESSING = [name for name in METHODS if name not in ("exact", "cosine")]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """FAISS's threads wait for one another by spinning: on small data that is all they do."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def gaussian(N, D, seed=0):
    """Correlated features: variances from 1 down, then rotated."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(D, D)))
    x = rng.normal(size=(N, D)) / np.arange(1, D + 1) + 3.0  # far from the origin
    return (x @ rotation).astype(np.float32)


def clusters(N, D=32, classes=4, seed=0):
    """Tight clusters around corners of a cube, and their classes."""
    labels = np.arange(N) % classes
    corners = np.random.default_rng(0).choice([-1.0, 1.0], size=(classes, D))
    noise = np.random.default_rng(seed + 1).normal(0, 0.02, size=(N, D))
    return (corners[labels] + noise).astype(np.float32), torch.from_numpy(labels)


def order_of(quantizer, query, codes, k):
    return torch.cat([index.clone() for _, index in quantizer.ranked(query, codes, k)]).numpy()


def naive_order(dist, k):
    """Sorted by distance, then by index, a query at a time."""
    return [sorted(range(len(row)), key=lambda n: (row[n], n))[:k] for row in dist.tolist()]


@pytest.mark.parametrize("bits", [16, 64])
@pytest.mark.parametrize("k", [1, 40, 300])
def test_hamming_ranking_equals_a_loop_that_counts_bits(bits, k):
    rng = np.random.default_rng(0)
    db, query = rng.normal(size=(300, bits)), rng.normal(size=(7, bits))
    db[150:] = db[:150]  # every code twice
    db[:, 6:] = 1.0  # 64 codes for 300 items: many more ties
    quantizer = Hashing("signs", bits, lambda x: x)
    dist = np.array([[np.sum((a > 0) != (b > 0)) for b in db] for a in query])
    assert len(np.unique(dist[0])) < 30
    assert order_of(quantizer, query, quantizer.encode(db), k).tolist() == naive_order(dist, k)


def test_product_ranking_equals_decoding_and_faiss_own_index():
    x, query = gaussian(400, 32), gaussian(9, 32, seed=1)
    x[200:] = x[:200]
    quantizer = fit("pq", Space(x), 32, 0)
    codes = quantizer.encode(x)
    words = quantizer.codebooks.numpy()
    numbers = unpack_codes(codes, 8, 16)
    decoded = np.concatenate([words[m, numbers[:, m]] for m in range(8)], axis=1)
    dist = ((query[:, None].astype(float) - decoded[None]) ** 2).sum(-1)
    got = order_of(quantizer, query, codes, 50)
    ranked_dist = np.take_along_axis(dist, got, 1)
    # tables are added in float32: near ties may come in another order than in float64
    np.testing.assert_allclose(ranked_dist, np.sort(dist, axis=1)[:, :50], rtol=1e-5)
    twin = [[n for n in row if n + 200 in row or n - 200 in row] for row in got.tolist()]
    for row, both in zip(got.tolist(), twin, strict=True):
        assert all(row.index(n) < row.index(n + 200) for n in both if n < 200)

    index = faiss.IndexPQ(32, 8, 4)
    faiss.copy_array_to_vector(words.ravel(), index.pq.centroids)
    index.is_trained = True
    index.add(x)
    assert index.code_size * 8 == 32
    faiss_dist, _ = index.search(query, 50)
    np.testing.assert_allclose(ranked_dist, faiss_dist, rtol=1e-4)


def test_residual_ranking_equals_decoding_with_ties_by_index():
    x, query = gaussian(300, 16), gaussian(5, 16, seed=1)
    x[150:] = x[:150]
    quantizer = fit("rq", Space(x), 16, 0)
    codes = quantizer.encode(x)
    decoded = quantizer.quantizer.decode(codes).astype(float)
    dist = ((query[:, None] - decoded[None]) ** 2).sum(-1).astype(np.float32)
    assert order_of(quantizer, query, codes, 300).tolist() == naive_order(dist, 300)


def test_exact_ranking_is_exact_far_from_the_origin(monkeypatch):
    monkeypatch.setattr("utils.baselines.QUERY_CHUNK", 4)
    x, query = gaussian(200, 8) + 1000, gaussian(10, 8, seed=1) + 1000
    dist = ((query[:, None].astype(float) - x[None].astype(float)) ** 2).sum(-1)
    parts = list(ranked_l2(query, x, 30))
    assert [(rows.start, rows.stop) for rows, _ in parts] == [(0, 4), (4, 8), (8, 10)]
    got = torch.cat([index for _, index in parts])
    assert got.tolist() == naive_order(dist.astype(np.float32), 30)
    direct = fit("exact", Space(x), 16, 0)
    assert order_of(direct, query, direct.encode(x), 30).tolist() == got.tolist()


def test_cosine_ignores_length():
    x, query = gaussian(100, 8), gaussian(6, 8, seed=1)
    lengths = np.random.default_rng(0).uniform(0.1, 10, size=(100, 1)).astype(np.float32)
    cosine = fit("cosine", Space(x), 16, 0)
    sim = query @ x.T / np.linalg.norm(x, axis=1)
    for items in (x, x * lengths):
        best = order_of(cosine, query, cosine.encode(items), 1)[:, 0]
        assert best.tolist() == sim.argmax(axis=1).tolist()


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("method", COMPRESSING)
def test_a_code_has_the_bits_that_it_is_said_to_have(method, bits):
    x = gaussian(300, 64)
    quantizer = fit(method, Space(x), bits, 0)
    codes = quantizer.encode(x)
    assert codes.dtype == np.uint8
    assert codes.shape == (300, bits // 8)
    assert 8 * quantizer.code_size == bits
    if hasattr(quantizer, "quantizer"):
        assert 8 * quantizer.quantizer.code_size == bits
    # and its bits are used: all of them vary over the database
    assert np.unpackbits(codes, axis=1).std(axis=0).min() > 0


@pytest.mark.parametrize("method", ["exact", "cosine"])
def test_uncompressed_features_cost_32_bits_a_dimension(method):
    quantizer = fit(method, Space(gaussian(20, 24)), 16, 0)
    assert quantizer.encode(gaussian(20, 24)).shape == (20, 4 * 24)
    assert 8 * quantizer.code_size == 32 * 24


@pytest.mark.parametrize("method", METHODS)
def test_separate_clusters_are_found_and_shuffled_codes_are_chance(method):
    db, db_labels = clusters(400)
    query, query_labels = clusters(40, seed=1)
    quantizer = fit(method, Space(db), 16, 0)
    codes = quantizer.encode(db)

    def score(codes):
        rankings = quantizer.ranked(query, np.ascontiguousarray(codes), 100)
        return evaluate_rankings(rankings, query_labels, db_labels, 100, 100)

    # 100 items of each class. Among 4 classes, two may share their signs on a few directions.
    assert score(codes)["mAP@100"] > 0.97
    chance = score(codes[np.random.default_rng(2).permutation(400)])
    # four distinct lists of 100 draws at odds of 1 in 4: +- .043 each; AP is a little above that
    assert 0.15 < chance["precision@100"] < 0.35
    assert 0.15 < chance["mAP@100"] < 0.45


@pytest.mark.parametrize("method", METHODS)
def test_seed_decides_where_it_is_said_to(method):
    x = gaussian(300, 32)
    one, again, other = (fit(method, Space(x), 16, seed).encode(x) for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert np.array_equal(one, other) == (method not in RANDOM)


def reconstruction_error(quantizer, space):
    return ((quantizer.transform(space.db) - decode(quantizer, space.db)) ** 2).sum(1).mean()


def decode(quantizer, x):
    return quantizer.quantizer.decode(quantizer.encode(x))


def test_opq_and_rq_lose_less_than_pq_on_correlated_features():
    space = Space(gaussian(1000, 32))
    pq, opq, rq = (reconstruction_error(fit(m, space, 16, 0), space) for m in ("pq", "opq", "rq"))
    assert opq < 0.9 * pq
    assert rq < 0.9 * pq


def test_opq_only_rotates():
    space = Space(gaussian(500, 32))
    rotated = fit("opq", space, 16, 0).transform(space.db)
    lengths = np.linalg.norm(space.db, axis=1)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), lengths, rtol=1e-4)


def test_itq_is_closer_to_its_signs_than_any_random_rotation():
    space = Space(gaussian(1000, 32))
    v = space.components[1][:, :16]
    itq = fit("itq", space, 16, 0).project(space.db)
    np.testing.assert_allclose(np.linalg.norm(itq, axis=1), np.linalg.norm(v, axis=1), rtol=1e-3)
    # || B - V R ||^2 is least where sum |V R| is greatest: the lengths are the same
    rng = np.random.default_rng(0)
    random = [np.linalg.qr(rng.normal(size=(16, 16)))[0] for _ in range(50)]
    assert np.abs(itq).sum() > 1.005 * max(np.abs(v @ rotation).sum() for rotation in random)


def test_lsh_is_centred():
    ones = np.unpackbits(fit("lsh", Space(gaussian(2000, 32)), 16, 0).encode(gaussian(2000, 32)), 1)
    assert 0.4 < ones.mean(axis=0).min() <= ones.mean(axis=0).max() < 0.6


def test_spectral_hashing_gives_a_long_component_several_bits():
    rng = np.random.default_rng(0)
    x = np.zeros((4000, 16), dtype=np.float32)
    x[:, 0] = rng.uniform(0, 8.5, 4000)
    x[:, 1] = rng.uniform(0, 1, 4000)  # waves of w = k pi / 8.5, and of pi: k = 1 .. 8 come first
    x[:, 2:] = rng.uniform(0, 0.1, (4000, 14))
    bits = unpack_codes(fit("sh", Space(x), 16, 0).encode(x), 16, 2)
    along = bits[x[:, 0].argsort()]
    for k in range(1, 9):  # the k-th wave changes its sign k times along the long component
        column = along[:, k - 1].astype(int)
        assert np.abs(np.diff(column)).sum() == pytest.approx(k, abs=6), k
    column = bits[x[:, 1].argsort(), 8].astype(int)
    assert np.abs(np.diff(column)).sum() < 40  # the ninth bit halves the second one


def test_long_features_are_reduced_before_opq_and_rq_and_say_so():
    rng = np.random.default_rng(0)
    space = Space(rng.normal(size=(200, PCA_ABOVE + 8)).astype(np.float32))
    quantizer = fit("opq", space, 16, 0)
    assert quantizer.name == f"PCA-{PCA_DIMS} + OPQ"
    assert quantizer.transform(space.db).shape == (200, PCA_DIMS)
    assert fit("rq", space, 16, 0).name == f"PCA-{PCA_DIMS} + RQ"
    assert fit("pq", space, 16, 0).name == "PQ"


def test_given_codebooks_encode_to_the_nearest_word():
    codebooks = torch.randn(4, 16, 2).numpy()
    numbers = torch.randint(0, 16, (50, 4)).numpy()
    x = np.concatenate([codebooks[m, numbers[:, m]] for m in range(4)], axis=1)
    quantizer = Product("SPQ", np.ascontiguousarray, codebooks)
    assert np.array_equal(quantizer.encode(x), pack_codes(numbers, 16))


def test_what_cannot_be_fitted_is_named():
    space = Space(gaussian(50, 12))
    with pytest.raises(ValueError, match="unknown method 'kmeans'; known: exact"):
        fit("kmeans", space, 16, 0)
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        fit("lsh", space, 12, 0)
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        fit("pq", space, 10, 0)
    with pytest.raises(ValueError, match="itq needs a dimension for each of 16 bits, there are 12"):
        fit("itq", space, 16, 0)
    with pytest.raises(ValueError, match="12 dimensions cannot be cut into 8 slices"):
        fit("pq", space, 32, 0)
    with pytest.raises(ValueError, match="must have 16 words, got 4"):
        Product("SPQ", np.ascontiguousarray, np.zeros((2, 4, 2)))
