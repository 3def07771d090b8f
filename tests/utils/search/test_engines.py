"""FAISS ranks as our exact search does; exports are what other programs load."""

import faiss
import numpy as np
import pytest
import torch
from faiss.contrib.ondisk import merge_ondisk

from models import PrototypeQuantizer
from models.quantizer import intra_normalize
from utils.errors import UserError
from utils.retrieval import adc_distances
from utils.search.engines import (
    FaissEngine,
    Lists,
    OwnEngine,
    choose_engine,
    decode,
    export,
    merge_codebooks,
    read_ivfpq,
    write_faiss,
)
from utils.search.packing import pack_codes

# (M, K, d): bytes shared by 8, 4, 2 codes, an odd number of them, whole bytes, and across bytes
SHAPES = [(8, 16, 16), (3, 16, 4), (5, 4, 3), (7, 2, 4), (4, 256, 8), (4, 8, 4), (1, 4096, 8)]
# float32 sums of up to 128 squares around 2 each, in another order
TOLERANCE = 1e-4


def coded(M, K, d, N=3000, Q=5):
    rng = np.random.default_rng(M * K)
    codebooks = rng.normal(size=(M, K, d)).astype(np.float32)
    codes = rng.integers(0, K, (N, M))
    query = rng.normal(size=(Q, M * d)).astype(np.float32)
    return query, codes, pack_codes(codes, K), codebooks


def unit(M, K, d, N=3000):
    """The same with codewords and sub-vectors of length 1, as GPQ's have."""
    query, codes, packed, codebooks = coded(M, K, d, N)
    codebooks /= np.linalg.norm(codebooks, axis=2, keepdims=True)
    parts = query.reshape(-1, M, d)
    query = (parts / np.linalg.norm(parts, axis=2, keepdims=True)).reshape(len(query), M * d)
    return query, codes, packed, codebooks


def assert_same_ranking(query, codes, codebooks, dist, index, distance="squared_l2"):
    """Equal distances at each rank, and each item at its own distance: equal up to ties."""
    every = adc_distances(
        torch.from_numpy(query), torch.from_numpy(codes), torch.from_numpy(codebooks), distance
    ).numpy()
    k = dist.shape[1]
    assert np.abs(dist - np.sort(every, axis=1)[:, :k]).max() < TOLERANCE
    assert np.abs(dist - np.take_along_axis(every, index, axis=1)).max() < TOLERANCE
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ["faiss", "own"])
def test_engines_rank_exactly(shape, engine):
    query, codes, packed, codebooks = coded(*shape)
    found = choose_engine(packed, codebooks, engine=engine).search(query, 100)
    assert_same_ranking(query, codes, codebooks, *found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["faiss", "faiss-ivfpq"])
def test_exports_rank_exactly(tmp_path, shape, kind):
    query, codes, packed, codebooks = coded(*shape)
    write_faiss(export(packed, codebooks, kind), tmp_path / "x.faiss")
    index = faiss.read_index(str(tmp_path / "x.faiss"))
    assert index.ntotal == len(codes)
    if kind == "faiss-ivfpq":
        assert 1 < index.nlist <= len(codes) // 64 + 1
        index.nprobe = index.nlist
    assert_same_ranking(query, codes, codebooks, *index.search(query, 100))


def test_ties_come_in_order_of_index():
    query, _, _, codebooks = coded(4, 16, 4)
    codes = np.tile(np.arange(16)[:, None] % [16, 8, 4, 2], (20, 1))  # each code 20 times
    packed = pack_codes(codes, 16)
    for engine in ("faiss", "own"):
        dist, index = choose_engine(packed, codebooks, engine=engine).search(query, 60)
        ties = dist[:, 1:] == dist[:, :-1]
        assert ties.any()
        assert (np.diff(index, axis=1)[ties] > 0).all()


def test_fastscan_overlaps():
    query, _, packed, codebooks = coded(8, 16, 16, N=20_000, Q=50)
    index = export(packed, codebooks, "faiss-fastscan")
    _, exact = choose_engine(packed, codebooks).search(query, 1000)
    _, found = index.search(query, 1000)
    pairs = zip(exact.tolist(), found.tolist(), strict=True)
    overlap = np.mean([len(set(a) & set(b)) / 1000 for a, b in pairs])
    assert overlap > 0.98  # look-up tables of 8 bits; the figure on real codes is in results/


def test_ivfpq_probes_some_lists_and_finds_most_of_clustered_codes():
    rng = np.random.default_rng(0)
    codebooks = rng.normal(size=(8, 16, 4)).astype(np.float32)
    centres = rng.integers(0, 16, (40, 8))
    codes = centres[rng.integers(0, 40, 8000)]
    codes[np.arange(8000), rng.integers(0, 8, 8000)] = rng.integers(0, 16, 8000)
    packed = pack_codes(codes, 16)
    index = export(packed, codebooks, "faiss-ivfpq", Lists(nlist=64))
    assert index.nprobe < index.nlist
    query = decode(packed[:100], codebooks)
    dist, _ = index.search(query, 1)
    assert (dist[:, 0] < TOLERANCE).mean() > 0.9  # a code finds itself, or its like


def test_auto_takes_faiss_only_where_it_ranks_exactly():
    _, _, packed, codebooks = coded(8, 16, 4)
    assert isinstance(choose_engine(packed, codebooks, "squared_l2"), FaissEngine)
    assert isinstance(choose_engine(packed, codebooks, "l2"), OwnEngine)
    assert "exact squared L2" in choose_engine(packed, codebooks).name
    with pytest.raises(UserError, match=r"--engine=faiss: cannot rank by l2"):
        choose_engine(packed, codebooks, "l2", "faiss")


@pytest.mark.parametrize("shape", [*SHAPES, (12, 16, 12)])
def test_engines_agree_in_inner_products(shape):
    query, codes, packed, codebooks = unit(*shape)
    kinds = {"faiss": FaissEngine, "own": OwnEngine, "auto": FaissEngine}
    found = {}
    for engine, kind in kinds.items():
        chosen = choose_engine(packed, codebooks, "inner_product", engine)
        assert type(chosen) is kind
        found[engine] = chosen.search(query, 100)
        assert_same_ranking(query, codes, codebooks, *found[engine], "inner_product")
    assert all(map(np.array_equal, found["faiss"], found["auto"]))
    assert np.abs(found["faiss"][0] - found["own"][0]).max() < TOLERANCE
    # half of squared L2, whose ranking it is
    dist, index = choose_engine(packed, codebooks).search(query, 100)
    assert np.array_equal(index, found["faiss"][1])
    assert np.abs(dist / 2 - found["faiss"][0]).max() < TOLERANCE


@pytest.mark.parametrize("engine", ["faiss", "own"])
def test_a_query_s_subvectors_may_be_zero_but_not_longer_than_1(engine):
    query, codes, packed, codebooks = unit(4, 16, 4)
    query[:, :4] = 0  # the first of four: as far from all words, 1
    dist, index = choose_engine(packed, codebooks, "inner_product", engine).search(query, 5)
    chosen = codebooks[np.arange(4), codes[index]]  # (Q, 5, M, d)
    want = 4 - np.einsum("qmd,qkmd->qk", query.reshape(-1, 4, 4), chosen)
    assert np.abs(dist - want).max() < TOLERANCE
    with pytest.raises(ValueError, match="length 1"):
        choose_engine(packed, codebooks, "inner_product", engine).search(query * 1.01, 5)


def test_equal_inner_products_come_in_order_of_index():
    query, _, _, codebooks = unit(4, 16, 4)
    codes = np.tile(np.arange(16)[:, None] % [16, 8, 4, 2], (20, 1))  # each code 20 times
    packed = pack_codes(codes, 16)
    orders = []
    for engine in ("faiss", "own"):
        found = choose_engine(packed, codebooks, "inner_product", engine).search(query, 60)
        ties = found[0][:, 1:] == found[0][:, :-1]
        assert ties.mean() > 0.9
        assert (np.diff(found[1], axis=1)[ties] > 0).all()
        orders.append(found[1])
    assert np.array_equal(*orders)


def test_inner_products_are_for_codewords_of_length_1():
    query, _, packed, codebooks = unit(8, 16, 4)
    assert "exact inner product" in choose_engine(packed, codebooks, "inner_product").name
    whole_bytes = unit(4, 256, 8)
    assert "exact inner product" in choose_engine(*whole_bytes[2:], "inner_product").name
    longer, shorter, rounded = codebooks.copy(), codebooks.copy(), codebooks.copy()
    longer[5, 3] *= 1.01
    shorter[0, 0] = 0
    rounded[5, 3] *= 1.0005
    for engine in ("auto", "faiss", "own"):
        for words in (longer, shorter):
            with pytest.raises(
                UserError,
                match=r"--distance=inner_product: .* codewords have length 1.*squared_l2 and l2",
            ):
                choose_engine(packed, words, "inner_product", engine)
            choose_engine(packed, words, "squared_l2", engine)
        choose_engine(packed, rounded, "inner_product", engine).search(query, 3)


@pytest.mark.parametrize(("M", "K", "d"), [(12, 16, 12), (3, 16, 12), (4, 256, 6)])
def test_faiss_s_own_encoder_gives_a_gpq_model_s_codes(M, K, d):
    """So descriptors may be added to an exported index without this project."""
    quantizer = PrototypeQuantizer(M, K, d, classes=10)
    x = intra_normalize(torch.randn(2000, M * d), M)
    with torch.no_grad():
        codebooks = quantizer.codebooks
        sim = torch.einsum("nmd,mkd->nmk", x.unflatten(1, (M, d)).double(), codebooks.double())
        first, second = sim.topk(2, dim=2).values.unbind(2)
        codes = quantizer.encode(x)
    clear = (first - second > 1e-6).all(dim=1)  # no rounding decides between two codewords
    assert clear.float().mean() > 0.9
    assert torch.equal(codes[clear], sim.argmax(dim=2)[clear])
    packed = pack_codes(codes.numpy(), K)
    index = export(packed[:1], codebooks.numpy(), "faiss")
    index.add(x[clear].numpy())
    stored = faiss.vector_to_array(index.codes).reshape(index.ntotal, -1)
    assert np.array_equal(stored[1:], packed[clear.numpy()])
    # and finds by squared L2 what the inner product ranks first
    engine = choose_engine(stored, codebooks.numpy(), "inner_product")
    query = x[:5].numpy()
    dist, found = index.search(query, 50)
    ranked = engine.search(query, 50)
    assert np.abs(dist / 2 - ranked[0]).max() < TOLERANCE
    every = adc_distances(x[:5], torch.cat([codes[:1], codes[clear]]), codebooks, "inner_product")
    assert np.abs(np.take_along_axis(every.numpy(), found, axis=1) - dist / 2).max() < TOLERANCE


def test_unsquared_distances_are_those_of_the_released_code():
    query, codes, packed, codebooks = coded(8, 16, 4)
    dist, index = choose_engine(packed, codebooks, "l2").search(query, 10)
    words = codebooks[np.arange(8), codes[index[0, 0]]]
    naive = np.linalg.norm(query[0].reshape(8, 4) - words, axis=1).sum()
    assert abs(dist[0, 0] - naive) < TOLERANCE


def test_what_faiss_cannot_do_is_said():
    _, _, packed, codebooks = coded(4, 256, 8)
    with pytest.raises(UserError, match=r"faiss-fastscan: .* 16 codewords only, .* has 256; allow"):
        export(packed, codebooks, "faiss-fastscan")
    with pytest.raises(UserError, match=r"--nlist=5000: is more than the 3000 images"):
        export(packed, codebooks, "faiss-ivfpq", Lists(nlist=5000))


def test_queries_must_be_finite():
    query, _, packed, codebooks = coded(8, 16, 4)
    query[0, 0] = np.nan
    for engine in ("faiss", "own"):
        with pytest.raises(ValueError, match="finite"):
            choose_engine(packed, codebooks, engine=engine).search(query, 3)


def test_merged_codebooks_hold_every_combination():
    codebooks = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    merged = merge_codebooks(codebooks, 2)
    assert merged.shape == (1, 16, 6)
    for a in range(4):
        for b in range(4):
            assert merged[0, a + 4 * b].tolist() == [*codebooks[0, a], *codebooks[1, b]]


def test_a_few_codes_only():
    query, codes, packed, codebooks = coded(8, 16, 4, N=3)
    for kind in ("faiss", "faiss-fastscan", "faiss-ivfpq"):
        assert export(packed, codebooks, kind).search(query, 3)[1].min() >= 0
    assert_same_ranking(query, codes, codebooks, *choose_engine(packed, codebooks).search(query, 3))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    _, _, packed, codebooks = coded(8, 16, 4)
    (tmp_path / "x.faiss").write_bytes(b"old")
    (tmp_path / "x.faiss.tmp").mkdir()  # in the way
    with pytest.raises(OSError, match=r"x\.faiss\.tmp"):
        write_faiss(export(packed, codebooks, "faiss"), tmp_path / "x.faiss")
    assert (tmp_path / "x.faiss").read_bytes() == b"old"


def test_parts_of_a_set_are_searched_and_merged_by_faiss_as_the_whole(tmp_path):
    """docs/scaling.md rests on this."""
    query, codes, packed, codebooks = coded(8, 16, 4)
    first = export(packed[:1000], codebooks, "faiss-ivfpq", Lists(nlist=16))
    write_faiss(first, tmp_path / "first")
    lists = Lists(like=read_ivfpq(tmp_path / "first"), first_id=1000)
    write_faiss(export(packed[1000:], codebooks, "faiss-ivfpq", lists), tmp_path / "second")
    parts = [faiss.read_index(str(tmp_path / name)) for name in ("first", "second")]
    for part in parts:
        part.nprobe = 16
    together = faiss.IndexShards(32, False, False)  # ids are the set's already
    for part in parts:
        together.add_shard(part)
    assert_same_ranking(query, codes, codebooks, *together.search(query, 100))

    empty = faiss.read_index(str(tmp_path / "first"))
    empty.reset()
    files = [str(tmp_path / name) for name in ("first", "second")]
    merge_ondisk(empty, files, str(tmp_path / "lists"))
    faiss.write_index(empty, str(tmp_path / "merged"))
    merged = faiss.read_index(str(tmp_path / "merged"))
    merged.nprobe = 16
    assert_same_ranking(query, codes, codebooks, *merged.search(query, 100))


def test_lists_of_another_model_are_refused(tmp_path):
    _, _, packed, codebooks = coded(8, 16, 4)
    like = export(packed, codebooks + 1, "faiss-ivfpq")
    with pytest.raises(UserError, match="--like: is an index of other codebooks"):
        export(packed, codebooks, "faiss-ivfpq", Lists(like=like))
    write_faiss(export(packed, codebooks, "faiss"), tmp_path / "pq")
    with pytest.raises(UserError, match=r"--like=.*pq: is an IndexPQ; allowed is an export to fai"):
        read_ivfpq(tmp_path / "pq")
    (tmp_path / "text").write_text("no index")
    with pytest.raises(UserError, match=r"--like=.*text: is not a FAISS index"):
        read_ivfpq(tmp_path / "text")
    with pytest.raises(UserError, match=r"--like=.*none: cannot be read"):
        read_ivfpq(tmp_path / "none")
