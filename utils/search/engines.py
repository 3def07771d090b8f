"""Search engines over packed codes: FAISS where it ranks exactly, our own for the rest; exports."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from tqdm import tqdm

from utils.errors import UserError
from utils.retrieval import UNIT_TOLERANCE, search
from utils.search.packing import code_bytes, unpack_codes, word_bits

KMEANS_ROUNDS = 10  # what FAISS takes for inverted lists
PIECE = 1 << 16  # codes decoded together
SCORES = 1 << 26  # of codes and centres, in memory together
TRAINING_POINTS = 64  # for each inverted list: what FAISS's k-means is content with, and more


class OwnEngine:
    """`utils.retrieval.search`: every distance the project knows, ties in order of index."""

    def __init__(self, packed: np.ndarray, codebooks: np.ndarray, distance: str) -> None:
        M, K, _ = codebooks.shape
        self.codes = torch.from_numpy(unpack_codes(np.asarray(packed), M, K))
        self.codebooks, self.distance = torch.from_numpy(codebooks), distance
        self.name = f"own exact search, {distance}"

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest items: dist (Q, k) ascending, index (Q, k) int64; k at most N."""
        dist, index = search(
            torch.from_numpy(query), self.codes, self.codebooks, k, distance=self.distance
        )
        return dist.numpy(), index.numpy()


class FaissEngine:
    """FAISS's IndexPQ, exact in squared L2, and in inner product where that is half of it.

    Codebooks of less than 8 bits are first merged into codebooks of 8: with K = 16 the words of
    codebooks m and m + 1 side by side are 256 words of 2d dimensions, and the two packed codes are
    the very byte that names one of them. Distances stay the same, look-ups halve, and FAISS has a
    fast path for bytes: 3.7 to 5.1 times its speed on codes of 4 bits, measured on 10^6 codes
    (results/benchmark_search_1m.json).
    """

    def __init__(
        self, packed: np.ndarray, codebooks: np.ndarray, distance: str = "squared_l2"
    ) -> None:
        M, K, d = codebooks.shape
        self.M, self.distance = M, distance
        measure = "squared L2" if distance == "squared_l2" else "inner product"
        bits = word_bits(K)
        self.pad = 0
        if bits in (1, 2, 4):
            together = 8 // bits
            self.pad = -M % together  # codebooks of one word more, which all lie at the origin
            filled = np.zeros((M + self.pad, K, d), dtype=np.float32)
            filled[:M] = codebooks
            codebooks = merge_codebooks(filled, together)
            self.name = f"FAISS IndexPQ, exact {measure} ({together} codebooks a byte)"
        else:
            self.name = f"FAISS IndexPQ, exact {measure}"
        self.pad *= d
        self.index = index_pq(packed, codebooks)

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest items: dist (Q, k) ascending, index (Q, k) int64; k at most N."""
        if not np.isfinite(query).all():
            raise ValueError("queries must be finite")
        parts = query.astype(np.float32, copy=False).reshape(len(query), self.M, -1)
        lengths = np.square(parts).sum(axis=2)  # (Q, M), squared
        if self.distance == "inner_product" and lengths.max(initial=0) > (1 + UNIT_TOLERANCE) ** 2:
            raise ValueError("queries for an inner product must have sub-vectors of length 1")
        query = np.pad(parts.reshape(len(query), -1), ((0, 0), (0, self.pad)))
        dist, index = self.index.search(np.ascontiguousarray(query), k)
        order = np.lexsort((index, dist))  # ties in order of index
        dist = np.take_along_axis(dist, order, 1)
        if self.distance == "inner_product":  # 1 - <q, c> = (||q - c||^2 - ||q||^2 + 1) / 2
            dist = np.maximum(0, (dist - lengths.sum(axis=1, keepdims=True) + self.M) / 2)
        return dist, np.take_along_axis(index, order, 1)


def choose_engine(
    packed: np.ndarray, codebooks: np.ndarray, distance: str = "squared_l2", engine: str = "auto"
) -> OwnEngine | FaissEngine:
    """The engine that --engine means; `auto` is FAISS where its ranking is exact.

    Args:
        packed: (N, code_bytes) uint8, see utils.search.packing.
        codebooks: (M, K, d) float32.
        distance: "squared_l2", "l2", or for codewords of length 1 "inner_product".
        engine: "auto", "faiss" or "own".
    Raises:
        UserError: if FAISS is asked for what it cannot do, or codewords for an inner product have
            other lengths.
    """
    lengths = np.linalg.norm(codebooks, axis=2)
    if distance == "inner_product" and abs(lengths - 1).max() > UNIT_TOLERANCE:
        raise UserError(
            "--distance=inner_product: is a distance only where codewords have length 1, as GPQ's "
            "have; allowed for this index are squared_l2 and l2"
        )
    if engine == "own" or (engine == "auto" and distance == "l2"):
        return OwnEngine(packed, codebooks, distance)
    if distance == "l2":
        raise UserError(
            "--engine=faiss: cannot rank by l2, only by squared_l2 and inner_product; allowed for "
            "l2 are auto and own"
        )
    return FaissEngine(packed, codebooks, distance)


def merge_codebooks(codebooks: np.ndarray, together: int) -> np.ndarray:
    """Codebooks whose words are all combinations of the words of `together` neighbours.

        merged[g, sum_i K^i * k_i] = [ codebooks[g * together + i, k_i] for i = 0, 1, ... ]

    Args:
        codebooks: (M, K, d), M a multiple of `together`.
        together: how many become one.
    Returns:
        (M / together, K^together, together * d).
    """
    K = codebooks.shape[1]
    word = np.arange(K**together)
    parts = [
        codebooks[i::together][:, word // K**i % K]  # (M / together, K^together, d)
        for i in range(together)
    ]
    return np.concatenate(parts, axis=2)


def index_pq(packed: np.ndarray, codebooks: np.ndarray) -> faiss.IndexPQ:
    """A FAISS IndexPQ in squared L2 that holds these very codebooks and codes.

    Raises:
        ValueError: if the codes have another number of bytes; FAISS would read beyond them.
    """
    M, K, d = codebooks.shape
    if packed.ndim != 2 or packed.shape[1] != code_bytes(M, K):
        raise ValueError(f"codes of {packed.shape} do not fit {M} codebooks of {K} words")
    index = faiss.IndexPQ(M * d, M, word_bits(K))
    faiss.copy_array_to_vector(_floats(codebooks).ravel(), index.pq.centroids)
    faiss.copy_array_to_vector(np.ascontiguousarray(packed).ravel(), index.codes)
    index.ntotal = len(packed)
    index.is_trained = True
    return index


# --- exports ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lists:
    """How faiss-ivfpq is divided.

    Attributes:
        nlist: inverted lists (default: 4 sqrt(N), at most N / 64).
        like: take the lists' centres from this index, so that indexes of several parts of a set
            can be merged or searched together.
        first_id: FAISS's id of the first image; later ones count on.
    """

    nlist: int | None = None
    like: faiss.IndexIVFPQ | None = None
    first_id: int = 0


def export(
    packed: np.ndarray, codebooks: np.ndarray, kind: str, lists: Lists | None = None
) -> faiss.Index:
    """The codes as a FAISS index that any program with FAISS searches.

    Args:
        packed: (N, code_bytes) uint8.
        codebooks: (M, K, d) float32.
        kind: "faiss": IndexPQ, exact; "faiss-fastscan": IndexPQFastScan, K = 16 only, many times
            as fast, look-up tables rounded to 8 bits, so the ranking is approximate;
            "faiss-ivfpq": IndexIVFPQ without residuals, exact if all lists are probed.
        lists: of faiss-ivfpq.
    Raises:
        UserError: if FAISS cannot hold these codes in that index.
    """
    K = codebooks.shape[1]
    if kind == "faiss-fastscan":
        if K != 16:
            raise UserError(
                f"--to=faiss-fastscan: FAISS scans fast with 16 codewords only, this index has "
                f"{K}; allowed are faiss and faiss-ivfpq"
            )
        return faiss.IndexPQFastScan(index_pq(packed, codebooks))
    if kind == "faiss-ivfpq":
        return _index_ivfpq(packed, codebooks, lists or Lists())
    return index_pq(packed, codebooks)


def _index_ivfpq(packed: np.ndarray, codebooks: np.ndarray, lists: Lists) -> faiss.IndexIVFPQ:
    M, K, d = codebooks.shape
    N = len(packed)
    centres = _centres(packed, codebooks, lists)
    coarse = faiss.IndexFlatL2(M * d)
    coarse.add(centres)
    index = faiss.IndexIVFPQ(coarse, M * d, len(centres), M, word_bits(K))
    index.by_residual = False  # the codes are of the descriptors themselves
    faiss.copy_array_to_vector(_floats(codebooks).ravel(), index.pq.centroids)
    index.is_trained = True
    for start in tqdm(
        range(0, N, PIECE), unit_scale=PIECE, unit="code", desc="into lists", disable=N <= PIECE
    ):
        piece = np.ascontiguousarray(packed[start : start + PIECE])
        nearest = _nearest(decode(piece, codebooks), centres)
        ids = lists.first_id + np.arange(start, start + len(piece))
        order = np.argsort(nearest, kind="stable")
        numbers, starts = np.unique(nearest[order], return_index=True)
        for number, rows in zip(numbers, np.split(order, starts[1:]), strict=True):
            # swig_ptr does not keep its array alive: these two names do
            own_ids, own_codes = ids[rows], piece[rows]
            index.invlists.add_entries(
                int(number), len(rows), faiss.swig_ptr(own_ids), faiss.swig_ptr(own_codes)
            )
    index.ntotal = N
    index.nprobe = min(index.nlist, max(1, index.nlist // 16))
    return index


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Number of the nearest centre in L2, (N,) int64. A matrix product of torch: on two cores it
    is several times as fast as FAISS's flat search, and the lists are most of an export's time."""
    words = torch.from_numpy(centres)
    norms = words.square().sum(1)
    rows = max(1, SCORES // len(centres))
    parts = [
        torch.addmm(norms, part, words.T, alpha=-2).argmin(1)  # (rows, nlist) -> (rows,)
        for part in torch.from_numpy(x).split(rows)
    ]
    return torch.cat(parts).numpy()


def _centres(packed: np.ndarray, codebooks: np.ndarray, lists: Lists) -> np.ndarray:
    """Of the inverted lists, (nlist, D) float32."""
    N, D = len(packed), codebooks.shape[0] * codebooks.shape[2]
    if lists.like is not None:
        found = faiss.vector_to_array(lists.like.pq.centroids)
        if not np.array_equal(found, _floats(codebooks).ravel()):
            raise UserError("--like: is an index of other codebooks; allowed is one of this model")
        return lists.like.quantizer.reconstruct_n(0, lists.like.nlist)
    nlist = lists.nlist or min(max(1, N // TRAINING_POINTS), round(4 * N**0.5))
    if nlist > N:
        raise UserError(f"--nlist={nlist}: is more than the {N} images; allowed are 1 to {N}")
    sample = np.random.default_rng(0).permutation(N)[: TRAINING_POINTS * nlist]
    kmeans = faiss.Kmeans(D, nlist, niter=KMEANS_ROUNDS, seed=1, min_points_per_centroid=1)
    kmeans.train(decode(packed[np.sort(sample)], codebooks))
    return kmeans.centroids


def read_ivfpq(path: Path) -> faiss.IndexIVFPQ:
    """A file that `write_faiss` wrote of a faiss-ivfpq export.

    Raises:
        UserError: if it is not there, or is something else.
    """
    try:
        index = faiss.deserialize_index(np.fromfile(path, dtype=np.uint8))
    except OSError as error:
        raise UserError(f"--like={path}: cannot be read: {error}") from error
    except RuntimeError as error:
        raise UserError(f"--like={path}: is not a FAISS index, or a damaged one") from error
    if not isinstance(index, faiss.IndexIVFPQ):
        raise UserError(
            f"--like={path}: is an {type(index).__name__}; allowed is an export to faiss-ivfpq"
        )
    return index


def decode(packed: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Packed codes -> the descriptors they stand for, (N, D) float32."""
    M, K, _ = codebooks.shape
    codes = unpack_codes(np.ascontiguousarray(packed), M, K)
    return _floats(codebooks)[np.arange(M), codes].reshape(len(packed), -1)


def _floats(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def write_faiss(index: faiss.Index, path: Path, beside: Mapping[Path, bytes] | None = None) -> None:
    """Write a FAISS index, whole or not at all.

    Args:
        index: to be written.
        path: where.
        beside: further files that belong to it. All are complete before the first takes its place.
    Raises:
        OSError: if a file cannot be written; old ones stay.
    """
    # not by FAISS's own writer, which hides why a write failed
    contents = {**(beside or {}), path: faiss.serialize_index(index)}
    made = {place: place.with_name(place.name + ".tmp") for place in contents}
    try:
        for place, temporary in made.items():
            with temporary.open("wb") as file:
                file.write(contents[place])
                file.flush()
                os.fsync(file.fileno())
        for place, temporary in made.items():
            os.replace(temporary, place)
    except OSError:
        for temporary in made.values():
            if temporary.is_file():
                temporary.unlink()
        raise
