"""Quantizers of given features: what a quantizer learned with its features is held against.

Each is fitted on the database's features alone, without queries and without labels. A fitted one
has a `name`, the `distance` it ranks by, `code_size` (bytes of one stored item), `code_bits` (of
its code), `encode(x)` ((N, D) float32 -> (N, code_size) uint8) and `ranked(query, codes, k)`,
which yields slices of the queries with their k nearest items as `utils.retrieval.ranked` does,
items of equal distance in order of their index.

That order is what makes a result repeatable. With 16 bits there are 17 Hamming distances for
50,000 items: thousands tie, and an index that keeps whichever it meets first would cut the top
1000 at will. Nothing here is cut before it is sorted by (distance, index).

| name | codes | ranked by |
|---|---|---|
| lsh | sign of random projections | Hamming distance |
| itq | sign of rotated principal components | Hamming distance |
| sh | sign of waves along the principal components | Hamming distance |
| pq, opq, rq | bits / 4 numbers of K = 16 codewords, as SPQ has them | asymmetric squared L2 |
| exact, cosine | the features themselves, 32 bits a dimension | squared L2, of unit vectors |

FAISS trains rotations, principal components and codebooks. k-means and OPQ's rotation learn from
all items where FAISS allows it (its default is 256 points a codeword: 4,096 of 50,000).
"""

from collections.abc import Callable, Iterator
from functools import cached_property

import faiss
import numpy as np
import torch
from torch import Tensor

from utils.retrieval import nearest, ranked
from utils.search.packing import pack_codes, unpack_codes

CODEWORD_BITS = 4  # K = 16
PCA_DIMS = 128
PCA_ABOVE = 1024  # features of more dimensions are reduced before OPQ and RQ, and so named
QUERY_CHUNK = 256  # queries whose distances to all items are held at once, in float64
ALL_POINTS = 10**9  # for k-means: learn from every item
# FAISS's numbers of rounds: k-means 25, ITQ 50, OPQ 50, and 5 candidates in RQ's beam

Transform = Callable[[np.ndarray], np.ndarray]


class Space:
    """The features of a database (N, D) float32, and their principal components when asked for."""

    def __init__(self, db: np.ndarray) -> None:
        self.db = np.ascontiguousarray(db, dtype=np.float32)

    @cached_property
    def components(self) -> tuple[Transform, np.ndarray]:
        """Projection on the first principal components, largest variance first, and the
        database's (N, min(PCA_DIMS, D, N)), mean zero."""
        N, D = self.db.shape
        pca = faiss.PCAMatrix(D, min(PCA_DIMS, D, N))
        pca.train(self.db)
        return pca.apply, pca.apply(self.db)

    @property
    def reduced(self) -> tuple[str, Transform, np.ndarray]:
        """What OPQ and RQ learn on: the features, or if those are long, their components. A
        prefix for the name, the transform and the transformed database."""
        if self.db.shape[1] <= PCA_ABOVE:
            return "", _unchanged, self.db
        project, db = self.components
        return f"PCA-{db.shape[1]} + ", project, db


class Hashing:
    """Items are signs: bit b is 1 where project(x)[b] > 0.

    dist = number of bits that differ. Signs as codebooks of the two words -1 and 1 make that a
    quarter of a squared L2 distance, so `utils.retrieval.ranked` ranks it, exactly.
    """

    distance = "Hamming"

    def __init__(self, name: str, bits: int, project: Transform) -> None:
        self.name, self.bits, self.project = name, bits, project
        self.code_size, self.code_bits = bits // 8, bits

    def encode(self, x: np.ndarray) -> np.ndarray:
        return pack_codes((self.project(x) > 0).astype(np.uint8), 2)

    def ranked(
        self, query: np.ndarray, codes: np.ndarray, k: int
    ) -> Iterator[tuple[slice, Tensor]]:
        query_bits, db_bits = (
            torch.from_numpy(unpack_codes(packed, self.bits, 2))
            for packed in (self.encode(query), codes)
        )
        signs = torch.tensor([[-1.0], [1.0]]).expand(self.bits, 2, 1)  # (M = bits, K = 2, d = 1)
        return ranked(2.0 * query_bits - 1.0, db_bits, signs, k)


class Product:
    """Product quantizer on transformed features.

        dist[q, n] = sum_m || transform(query)[q, m] - codebooks[m, codes[n, m]] ||^2

    Args:
        codebooks: (M, 16, d) float32.
    """

    distance = "asymmetric L2"

    def __init__(self, name: str, transform: Transform, codebooks: np.ndarray) -> None:
        self.name, self.transform = name, transform
        M, K, d = codebooks.shape
        self.codebooks = torch.from_numpy(np.array(codebooks, dtype=np.float32))
        self.quantizer = faiss.ProductQuantizer(M * d, M, CODEWORD_BITS)
        if self.quantizer.ksub != K:
            raise ValueError(f"codebooks must have {self.quantizer.ksub} words, got {K}")
        self.code_bits = M * CODEWORD_BITS
        faiss.copy_array_to_vector(self.codebooks.numpy().ravel(), self.quantizer.centroids)
        self.code_size = self.quantizer.code_size

    def encode(self, x: np.ndarray) -> np.ndarray:
        return self.quantizer.compute_codes(self.transform(x))

    def ranked(
        self, query: np.ndarray, codes: np.ndarray, k: int
    ) -> Iterator[tuple[slice, Tensor]]:
        M, K, _ = self.codebooks.shape
        numbers = torch.from_numpy(unpack_codes(codes, M, K))
        return ranked(torch.from_numpy(self.transform(query)), numbers, self.codebooks, k)


class Residual:
    """Residual quantizer on transformed features: an item is a sum of M codewords of D dimensions.

    dist[q, n] = || transform(query)[q] - sum_m codebooks[m, codes[n, m]] ||^2
    """

    distance = "asymmetric L2"

    def __init__(self, name: str, transform: Transform, quantizer: faiss.ResidualQuantizer) -> None:
        self.name, self.transform, self.quantizer = name, transform, quantizer
        self.code_size, self.code_bits = quantizer.code_size, quantizer.M * CODEWORD_BITS

    def encode(self, x: np.ndarray) -> np.ndarray:
        return self.quantizer.compute_codes(self.transform(x))

    def ranked(
        self, query: np.ndarray, codes: np.ndarray, k: int
    ) -> Iterator[tuple[slice, Tensor]]:
        # a code is decoded once, so that items with the same code are at the very same distance
        distinct, item_of = np.unique(codes, axis=0, return_inverse=True)
        items = self.quantizer.decode(np.ascontiguousarray(distinct))
        return ranked_l2(self.transform(query), items, k, item_of.reshape(-1))


class Uncompressed:
    """The features as they are, float32; `unit` scales them to length 1, which makes the squared
    L2 distance 2 - 2 cos."""

    def __init__(self, name: str, D: int, unit: bool = False) -> None:
        self.name, self.unit = name, unit
        self.distance = "cosine" if unit else "L2"
        self.code_size, self.code_bits = 4 * D, 32 * D

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        return unit_length(x) if self.unit else np.ascontiguousarray(x, dtype=np.float32)

    def encode(self, x: np.ndarray) -> np.ndarray:
        return self._scaled(x).view(np.uint8)

    def ranked(
        self, query: np.ndarray, codes: np.ndarray, k: int
    ) -> Iterator[tuple[slice, Tensor]]:
        return ranked_l2(self._scaled(query), codes.view(np.float32), k)


Quantizer = Hashing | Product | Residual | Uncompressed


def ranked_l2(
    query: np.ndarray, items: np.ndarray, k: int, item_of: np.ndarray | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Exact squared L2 ranking of vectors, ties by index.

        dist[q, n] = || query[q] - items[item_of[n]] ||^2

    computed in float64 as ||q||^2 - 2 <q, x> + ||x||^2, where nothing of a float32 is lost to
    cancellation, and compared in float32.

    Args:
        query: (Q, D).
        items: (U, D).
        item_of: (N,) integers in [0, U); None: N = U, item n is items[n].
    Yields:
        (rows, index): as `utils.retrieval.ranked`.
    """
    x = torch.from_numpy(items).double()
    norms = x.square().sum(1)
    owner = None if item_of is None else torch.from_numpy(item_of)
    for start in range(0, len(query), QUERY_CHUNK):
        q = torch.from_numpy(query[start : start + QUERY_CHUNK]).double()
        dist = torch.addmm(norms, q, x.T, alpha=-2).add_(q.square().sum(1, keepdim=True))
        yield slice(start, start + len(q)), nearest(dist.clamp_(min=0), k, owner)


def unit_length(x: np.ndarray) -> np.ndarray:
    """Rows scaled to unit L2 norm; a row of zeros stays."""
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _unchanged(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, dtype=np.float32)


# --- methods: (database's features, bits, seed) -> a fitted quantizer ---------------------------


def fit_exact(space: Space, bits: int, seed: int) -> Uncompressed:
    """No compression, squared L2."""
    return Uncompressed("uncompressed", space.db.shape[1])


def fit_cosine(space: Space, bits: int, seed: int) -> Uncompressed:
    """No compression, cosine."""
    return Uncompressed("uncompressed", space.db.shape[1], unit=True)


def fit_lsh(space: Space, bits: int, seed: int) -> Hashing:
    """Locality-sensitive hashing: bit b = [<r_b, x - mean> > 0], r_b random directions.

    Source: Indyk & Motwani 1998; Charikar 2002 (sign of random projections, for cosine).
    Departures: features are centred, as hashing papers do; the r_b are orthonormal, as in FAISS's
    IndexLSH, whose seed cannot be set.
    """
    D = space.db.shape[1]
    rotation = faiss.RandomRotationMatrix(D, bits)
    rotation.init(seed)
    middle = rotation.apply(space.db.mean(axis=0, dtype=np.float64, keepdims=True).astype("f4"))
    return Hashing("LSH", bits, lambda x: rotation.apply(x) - middle)


def fit_itq(space: Space, bits: int, seed: int) -> Hashing:
    """PCA-ITQ: signs of R V, V the first `bits` principal components.

        min over rotations R and signs B of || B - V R ||^2, B and R in turn

    Source: Gong & Lazebnik 2011. Departures: none. FAISS's ITQTransform would scale the centred
    features to unit length before the PCA; its parts PCAMatrix and ITQMatrix do not.
    """
    project, db = space.components
    itq = faiss.ITQMatrix(bits)
    itq.seed = seed
    itq.train(np.ascontiguousarray(db[:, :bits]))
    return Hashing("PCA-ITQ", bits, lambda x: itq.apply(np.ascontiguousarray(project(x)[:, :bits])))


def fit_sh(space: Space, bits: int, seed: int) -> Hashing:
    """Spectral hashing: signs of waves along the first `bits` principal components.

        bit = [ sin(pi / 2 + w (v_i - low_i)) > 0 ],   w = k pi / (high_i - low_i),  k = 1, 2, ...

    over the component's range [low_i, high_i]; of all (i, k) the `bits` of lowest frequency w, so
    that a long component gets several bits.

    Source: Weiss et al. 2008, section 3.2. Departures: none. FAISS's IndexIVFSpectralHash is
    another method (one period for all directions, inverted lists), so only the PCA is FAISS's.
    """
    project, db = space.components
    low, high = db[:, :bits].min(axis=0), db[:, :bits].max(axis=0)
    modes = np.arange(1, bits + 1)
    with np.errstate(divide="ignore"):  # a constant component: frequency infinite, never chosen
        frequency = np.pi * modes[:, None] / (high - low)  # (modes, components)
    lowest = np.argsort(frequency, axis=None, kind="stable")[:bits]
    _, component = np.unravel_index(lowest, frequency.shape)
    w = frequency.ravel()[lowest]
    return Hashing(
        "spectral hashing",
        bits,
        lambda x: np.sin(np.pi / 2 + w * (project(x)[:, component] - low[component])),
    )


def fit_pq(space: Space, bits: int, seed: int) -> Product:
    """Product quantization: k-means in each of M = bits / 4 slices of D / M dimensions.

    The slices are the features' own: of pixels, stretches of rows of one colour after another.

    Source: Jegou et al. 2011. Departures: K = 16 words, as in SPQ, not 256.
    """
    return Product("PQ", _unchanged, _train_pq(space.db, bits, seed))


def fit_opq(space: Space, bits: int, seed: int) -> Product:
    """Optimized product quantization: the rotation R that serves the product quantizer best.

        min over rotations R and product codes of || R x - decode(codes) ||^2, in turn

    Source: Ge et al. 2013, the non-parametric solution, from a random rotation. Departures: K = 16;
    k-means between the turns sees at most 1,000 items a codeword (set inside FAISS).
    """
    prefix, before, db = space.reduced
    D, M = db.shape[1], bits // CODEWORD_BITS
    first = faiss.RandomRotationMatrix(D, D)
    first.init(seed)
    inner = faiss.ProductQuantizer(D, M, CODEWORD_BITS)  # else FAISS would rotate for K = 256
    inner.cp.seed = seed
    inner.cp.min_points_per_centroid = 1
    opq = faiss.OPQMatrix(D, M)
    opq.pq = inner
    opq.max_train_points = ALL_POINTS
    faiss.copy_array_to_vector(faiss.vector_to_array(first.A), opq.A)
    opq.train(db)

    def rotate(x: np.ndarray) -> np.ndarray:
        return opq.apply(before(x))

    codebooks = _train_pq(opq.apply(db), bits, seed)
    return Product(f"{prefix}OPQ", rotate, codebooks)


def fit_rq(space: Space, bits: int, seed: int) -> Residual:
    """Residual quantization: M = bits / 4 codewords of K = 16, each for what the ones before left.

        x ~ sum_m codebooks[m, codes[m]],  all of D dimensions

    Source: Chen et al. 2010; encoded with a beam of 5 candidates (FAISS's default), which finds
    better sums than one word after the other.
    """
    prefix, before, db = space.reduced
    quantizer = faiss.ResidualQuantizer(db.shape[1], bits // CODEWORD_BITS, CODEWORD_BITS)
    # plain k-means at each stage: the progressive one takes ten times as long for 3% less error
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    _k_means_of_all(quantizer.cp, seed)
    quantizer.train(db)
    return Residual(f"{prefix}RQ", before, quantizer)


METHODS = {
    "exact": fit_exact,
    "cosine": fit_cosine,
    "lsh": fit_lsh,
    "sh": fit_sh,
    "itq": fit_itq,
    "pq": fit_pq,
    "opq": fit_opq,
    "rq": fit_rq,
}
RANDOM = ("lsh", "itq", "pq", "opq", "rq")  # the seed changes them


def fit(method: str, space: Space, bits: int, seed: int) -> Quantizer:
    """The quantizer of METHODS fitted on a database.

    Args:
        bits: of a code, a multiple of 8; of 4 for pq, opq and rq.
    Raises:
        ValueError: if the features have too few dimensions, or cannot be cut into bits / 4 slices.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    unit = 4 if method in ("pq", "opq", "rq") else 8
    if bits < unit or (bits % unit and method not in ("exact", "cosine")):
        raise ValueError(f"bits must be a multiple of {unit}, got {bits}")
    have = space.db.shape[1]
    if method in ("itq", "sh"):
        have = min(PCA_DIMS, *space.db.shape)
    if method in ("lsh", "itq", "sh") and have < bits:
        raise ValueError(f"{method} needs a dimension for each of {bits} bits, there are {have}")
    if method in ("pq", "opq"):
        D = space.db.shape[1] if method == "pq" else space.reduced[2].shape[1]
        if D % (bits // CODEWORD_BITS):
            raise ValueError(f"{D} dimensions cannot be cut into {bits // CODEWORD_BITS} slices")
    return METHODS[method](space, bits, seed)


def _train_pq(x: np.ndarray, bits: int, seed: int) -> np.ndarray:
    """Codebooks (M, 16, d) of k-means in each slice."""
    D, M = x.shape[1], bits // CODEWORD_BITS
    quantizer = faiss.ProductQuantizer(D, M, CODEWORD_BITS)
    _k_means_of_all(quantizer.cp, seed)
    quantizer.train(x)
    return faiss.vector_to_array(quantizer.centroids).reshape(M, quantizer.ksub, D // M)


def _k_means_of_all(parameters: faiss.ClusteringParameters, seed: int) -> None:
    parameters.seed = seed
    parameters.max_points_per_centroid = ALL_POINTS
    parameters.min_points_per_centroid = 1
