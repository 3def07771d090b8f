"""Packed codes: exact both ways, the size that is promised, FAISS's own layout."""

import faiss
import numpy as np
import pytest

from utils.search.packing import code_bytes, pack_codes, unpack_codes, word_bits

SHAPES = [(M, K) for M in (1, 3, 8) for K in (2, 4, 8, 16, 32, 256, 512, 4096, 65536)]


@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_round_trip_in_faiss_layout(M, K):
    codes = np.random.default_rng(0).integers(0, K, (40, M))
    codes[0], codes[1] = 0, K - 1
    packed = pack_codes(codes, K)
    assert packed.shape == (40, code_bytes(M, K))
    assert (unpack_codes(packed, M, K) == codes).all()
    assert (packed == faiss.pack_bitstrings(codes.astype(np.int32), word_bits(K))).all()


def test_32_bits_are_4_bytes():
    assert code_bytes(M=8, K=16) == 4
    packed = pack_codes(np.array([[1, 2, 3, 4, 5, 6, 7, 15]]), 16)
    assert packed.tolist() == [[0x21, 0x43, 0x65, 0xF7]]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        code_bytes(8, 17)
    with pytest.raises(ValueError, match=r"lie in \[0, 16\)"):
        pack_codes(np.array([[16]]), 16)
    with pytest.raises(ValueError, match="integers"):
        pack_codes(np.zeros((2, 2)), 16)
    with pytest.raises(ValueError, match=r"\(N, 4\) uint8"):
        unpack_codes(np.zeros((2, 3), dtype=np.uint8), 8, 16)
