"""Codes as they are stored: log2(K) bits a codeword number, nothing between them.

The layout is FAISS's: the lowest bits of the first byte are the first codebook's, so with K = 16
two codes share a byte, the even codebook in its low half.
"""

import numpy as np


def word_bits(K: int) -> int:
    """log2(K).

    Raises:
        ValueError: if K is not a power of two from 2 to 65536.
    """
    if not 2 <= K <= 65536 or K & (K - 1):
        raise ValueError(f"K must be a power of two from 2 to 65536, got {K}")
    return K.bit_length() - 1


def code_bytes(M: int, K: int) -> int:
    """Bytes of one stored image: M * log2(K) bits, rounded up to whole bytes."""
    return (M * word_bits(K) + 7) // 8


def pack_codes(codes: np.ndarray, K: int) -> np.ndarray:
    """Codes (N, M), integers in [0, K) -> (N, code_bytes) uint8.

    Raises:
        ValueError: if codes are not integers (N, M) in [0, K).
    """
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be integers (N, M); got {codes.dtype} {codes.shape}")
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < K:
        raise ValueError(f"codes must lie in [0, {K})")
    bits = word_bits(K)
    N, M = codes.shape
    if bits == 8:
        return codes.astype(np.uint8)
    if bits == 4:
        padded = np.zeros((N, M + M % 2), dtype=np.uint8)
        padded[:, :M] = codes
        return padded[:, 0::2] | padded[:, 1::2] << 4
    wide = codes.astype("<u2").reshape(N, M, 1).view(np.uint8)  # (N, M, 2)
    planes = np.unpackbits(wide, axis=2, count=bits, bitorder="little")  # (N, M, bits)
    return np.packbits(planes.reshape(N, M * bits), axis=1, bitorder="little")


def unpack_codes(packed: np.ndarray, M: int, K: int) -> np.ndarray:
    """(N, code_bytes) uint8 -> codes (N, M), uint8 or, if K > 256, uint16.

    Raises:
        ValueError: if the packed codes have another number of bytes.
    """
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != code_bytes(M, K):
        raise ValueError(
            f"packed codes must be (N, {code_bytes(M, K)}) uint8 for M={M}, K={K}; "
            f"got {packed.dtype} {packed.shape}"
        )
    bits, N = word_bits(K), len(packed)
    if bits == 8:
        return packed.copy()
    if bits == 4:
        codes = np.stack([packed & 15, packed >> 4], axis=2)  # (N, bytes, 2)
        return codes.reshape(N, -1)[:, :M].copy()
    planes = np.unpackbits(packed, axis=1, count=M * bits, bitorder="little").reshape(N, M, bits)
    wide = np.packbits(planes, axis=2, bitorder="little")  # (N, M, 1 or 2)
    codes = wide[..., 0] if bits <= 8 else np.ascontiguousarray(wide).view("<u2")[..., 0]
    return codes.astype(np.uint8 if bits <= 8 else np.uint16)
