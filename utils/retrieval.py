"""Exact search over product-quantized codes, by look-up tables, in bounded memory.

Knows tensors only: no model, no files, no labels.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

DISTANCES = ("squared_l2", "l2", "inner_product")
UNIT_TOLERANCE = 1e-3  # of lengths that must not be above 1

CHUNK_BYTES = 128 * 2**20  # ranked keys, and tables, of one chunk of queries
DB_CHUNK = 2**18  # items looked at together
MERGED_WORDS = 4096  # codebooks are merged while their joint table has no more entries
INDEX_BITS = 29  # a float32 widened to float64 leaves 29 bits of mantissa free


def lookup_tables(query: Tensor, codebooks: Tensor, distance: str = "squared_l2") -> Tensor:
    """Distance of every query slice to every codeword.

        squared_l2: lut[q, m, k] = || query[q, m] - codebooks[m, k] ||^2
        l2:         lut[q, m, k] = || query[q, m] - codebooks[m, k] ||
        inner_product:  lut[q, m, k] = 1 - <query[q, m], codebooks[m, k]>

    Args:
        query: (Q, D) descriptors, D = M * d.
        codebooks: (M, K, d).
        distance: "squared_l2" is standard ADC, and what FAISS ranks by. "l2" sums unsquared norms
            over the subspaces, as the released SPQ code does. "inner_product" is GPQ's, for
            sub-vectors and codewords of length 1, where it is half of squared_l2.
    Returns:
        lut (Q, M, K) float32, not negative.
    Raises:
        ValueError: if shapes do not fit, the distance is unknown, or it is "inner_product" and a
            sub-vector or codeword is longer than 1.
    Source: Jegou et al. 2011, equation 13 (squared_l2); GPQ, section 3.5 (inner_product).
    """
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; known: {', '.join(DISTANCES)}")
    M, _, d = codebooks.shape
    if query.dim() != 2 or query.shape[1] != M * d:
        raise ValueError(f"queries must be (Q, {M * d}); got {tuple(query.shape)}")
    parts = query.float().reshape(-1, M, d)
    if distance == "inner_product":
        words = codebooks.float()
        longest = max(v.norm(dim=-1).max().item() for v in (parts, words) if v.numel())
        if longest > 1 + UNIT_TOLERANCE:
            raise ValueError(
                f"inner_product is a distance between sub-vectors of length 1; one has {longest:g}"
            )
        with torch.autocast(query.device.type, enabled=False):  # else the product would be rounded
            return (1 - torch.einsum("qmd,mkd->qmk", parts, words)).clamp_(min=0)
    slices = parts.unbind(dim=1)
    # differences, not ||q||^2 - 2 <q, c> + ||c||^2: no cancellation when q is close to c; one
    # codebook at a time, so that (Q, K, d) is all that they take
    lut = torch.stack(
        [
            (part[:, None] - words).square().sum(-1)
            for part, words in zip(slices, codebooks.float(), strict=True)
        ],
        dim=1,
    )  # (Q, M, K)
    return lut.sqrt() if distance == "l2" else lut


def adc_distances(
    query: Tensor, db_codes: Tensor, codebooks: Tensor, distance: str = "squared_l2"
) -> Tensor:
    """Asymmetric distances from raw queries to coded items.

        dist[q, n] = sum_m lut[q, m, db_codes[n, m]]

    Needs Q * N floats; `search` and `ranked` bound their memory.

    Args:
        query: (Q, D) descriptors.
        db_codes: (N, M) integers in [0, K).
        codebooks: (M, K, d).
        distance: see `lookup_tables`.
    Returns:
        (Q, N) float32, smaller is closer.
    Raises:
        ValueError: as `lookup_tables`; or if codes are not integers (N, M) in [0, K).
    """
    M, K, _ = codebooks.shape
    columns, groups = _merge_codes(db_codes, M, K)
    tables = _merge_tables(lookup_tables(query, codebooks, distance), groups)
    return _sum_tables(tables, columns)


def search(
    query: Tensor,
    db_codes: Tensor,
    codebooks: Tensor,
    k: int,
    distance: str = "squared_l2",
) -> tuple[Tensor, Tensor]:
    """The k nearest coded items of each query, exactly.

    Args:
        query: (Q, D) descriptors.
        db_codes: (N, M) integers in [0, K).
        codebooks: (M, K, d).
        k: neighbours wanted; with fewer items in the database, all of them are returned.
        distance: see `lookup_tables`.
    Returns:
        dist (Q, min(k, N)) float32 ascending and index (Q, min(k, N)) int64. Items of equal
        distance come in order of their index.
    Raises:
        ValueError: if shapes or codes do not fit, k < 1, or a query or codeword is not finite.
    """
    N = len(db_codes)
    dist = torch.empty(len(query), max(0, min(k, N)), device=query.device)
    index = torch.empty(dist.shape, dtype=torch.int64, device=query.device)
    for rows, keys in _ranked_keys(query, db_codes, codebooks, k, distance):
        index[rows] = keys & _INDEX_MASK
        dist[rows] = (keys & ~_INDEX_MASK).view(torch.float64).float()
    return dist, index


def ranked(
    query: Tensor,
    db_codes: Tensor,
    codebooks: Tensor,
    k: int,
    distance: str = "squared_l2",
) -> Iterator[tuple[slice, Tensor]]:
    """As `search`, chunk by chunk, so that a whole ranking never has to fit into memory.

    Yields:
        (rows, index): a slice of the queries, and their neighbours (len(rows), min(k, N)) int64.
        The index is good until the next one is asked for: its memory is used again.
    """
    for rows, keys in _ranked_keys(query, db_codes, codebooks, k, distance):
        keys &= _INDEX_MASK
        yield rows, keys


def nearest(dist: Tensor, k: int, item_of: Tensor | None = None) -> Tensor:
    """The k items of smallest distance, where distances come from elsewhere than tables.

    Args:
        dist: (Q, U) distances, not negative; they are compared in float32.
        k: neighbours wanted; with fewer items, all of them are returned.
        item_of: (N,) integers: item n has the distances of column item_of[n]; None: N = U, and
            each item has its own.
    Returns:
        index (Q, min(k, N)) int64, nearest first. Items of equal distance come in order of their
        index.
    Raises:
        ValueError: if k < 1, there are no or too many items, or a distance is negative or not
            finite.
    """
    U = dist.shape[1]
    item_of = torch.arange(U, device=dist.device) if item_of is None else item_of
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not 0 < len(item_of) <= _INDEX_MASK:
        raise ValueError(f"a database holds 1 to {_INDEX_MASK} items; got {len(item_of)}")
    if not (int(item_of.min()) >= 0 and int(item_of.max()) < U):
        raise ValueError(f"item_of must lie in [0, {U})")
    dist = dist.float()
    if not (torch.isfinite(dist).all() and (dist >= 0).all()):
        raise ValueError("distances must be finite and not negative")
    smallest = _SmallestNumpy() if dist.device.type == "cpu" else _smallest_torch
    dist = dist.abs().contiguous()  # -0.0 orders before 0.0 as an integer
    return smallest([dist], [item_of], 0, k) & _INDEX_MASK


# --- how it works -------------------------------------------------------------------------------
#
# 1. The tables of up to three codebooks of 16 words are merged into one of 4,096 entries, so 8
#    codebooks cost 3 look-ups an item. Equal codes get bit-equal distances: the additions are the
#    same ones in the same order.
# 2. Distances are not negative, so their bits order as integers do. Widened to float64 a float32
#    leaves 29 low bits free: the item's index goes there. One integer sort then ranks exactly,
#    orders ties by index, and is vectorised (numpy partitions and sorts integers with AVX2 and
#    AVX-512 where the processor has them).

_INDEX_MASK = (1 << INDEX_BITS) - 1


def _merge_codes(db_codes: Tensor, M: int, K: int) -> tuple[list[Tensor], list[range]]:
    """Codes (N, M) -> for each group of codebooks its joint code (N,) int32, and the groups."""
    if db_codes.dim() != 2 or db_codes.shape[1] != M:
        raise ValueError(f"codes must be (N, {M}); got {tuple(db_codes.shape)}")
    if db_codes.is_floating_point() or db_codes.dtype == torch.bool:
        raise ValueError(f"codes must be integers; got {db_codes.dtype}")
    if db_codes.dtype == torch.uint16:  # torch compares few types of unsigned integers
        db_codes = db_codes.to(torch.int32)
    if not 0 < len(db_codes) <= _INDEX_MASK:
        raise ValueError(f"a database holds 1 to {_INDEX_MASK} items; got {len(db_codes)}")
    if not (int(db_codes.min()) >= 0 and int(db_codes.max()) < K):
        raise ValueError(f"codes must lie in [0, {K})")
    per_group = 1
    while per_group < M and K ** (per_group + 1) <= MERGED_WORDS:
        per_group += 1
    groups = [range(m, min(m + per_group, M)) for m in range(0, M, per_group)]
    columns = []
    for group in groups:
        joint = torch.zeros(len(db_codes), dtype=torch.int32, device=db_codes.device)
        for m in group:
            joint = joint * K + db_codes[:, m].to(torch.int32)
        columns.append(joint)
    return columns, groups


def _merge_tables(lut: Tensor, groups: list[range]) -> list[Tensor]:
    """lut (Q, M, K) -> for each group its joint table (Q, K^len(group))."""
    tables = []
    for group in groups:
        table = lut[:, group[0]]
        for m in group[1:]:
            table = (table[:, :, None] + lut[:, m, None, :]).flatten(1)  # (Q, words * K)
        tables.append(table.contiguous())
    return tables


def _sum_tables(tables: list[Tensor], columns: list[Tensor]) -> Tensor:
    """dist[q, n] = sum over groups g of tables[g][q, columns[g][n]], (Q, N) float32."""
    dist = tables[0].index_select(1, columns[0])
    for table, column in zip(tables[1:], columns[1:], strict=True):
        dist += table.index_select(1, column)
    return dist


def _ranked_keys(
    query: Tensor, db_codes: Tensor, codebooks: Tensor, k: int, distance: str
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the queries and their k smallest keys (rows, min(k, N)) int64, ascending.

    What is yielded belongs to the caller until it asks for more; then it may be overwritten.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    query, codebooks = query.detach(), codebooks.detach()
    if not torch.isfinite(query).all():
        raise ValueError("queries must be finite")
    if not torch.isfinite(codebooks).all():
        raise ValueError("codebooks must be finite")
    M, K, d = codebooks.shape
    columns, groups = _merge_codes(db_codes, M, K)
    N = len(db_codes)
    k = min(k, N)
    words = sum(K ** len(group) for group in groups)
    on_cpu = query.device.type == "cpu"
    # On the CPU a query's distances live in its thread's buffers; on a GPU those of all the rows
    # stand beside their keys.
    row_bytes = 8 * words + 8 * K * (M + d) + 16 * k + (0 if on_cpu else 28 * min(N, DB_CHUNK))
    step = max(1, min(256, CHUNK_BYTES // row_bytes))
    smallest = _SmallestNumpy() if on_cpu else _smallest_torch
    for start in range(0, len(query), step):
        rows = slice(start, min(start + step, len(query)))
        tables = _merge_tables(lookup_tables(query[rows], codebooks, distance), groups)
        best = None
        for first in range(0, N, DB_CHUNK):
            piece = [column[first : first + DB_CHUNK] for column in columns]
            keys = smallest(tables, piece, first, k)
            if best is not None:
                keys = torch.cat([best, keys], dim=1).sort(dim=1).values[:, :k]
            best = keys if N <= DB_CHUNK else keys.clone()
        yield rows, best


def _smallest_torch(tables: list[Tensor], columns: list[Tensor], first: int, k: int) -> Tensor:
    """Keys (Q, min(k, n)) of the k nearest of n items, the first of which has index `first`."""
    n = len(columns[0])
    index = torch.arange(first, first + n, device=columns[0].device)
    keys = _sum_tables(tables, columns).double().view(torch.int64) | index
    if k < n:
        return keys.topk(k, dim=1, largest=False, sorted=True).values
    return keys.sort(dim=1).values


class _SmallestNumpy:
    """As `_smallest_torch`: a query at a time, so that all it touches stays in the cache, with
    the queries shared out over torch's number of threads (numpy releases the interpreter lock).

    The result stands in a buffer that the next call uses again: fresh memory for every chunk
    would cost as much time as the search itself.
    """

    def __init__(self) -> None:
        self.buffer = np.empty(0, dtype=np.int64)

    def __call__(self, tables: list[Tensor], columns: list[Tensor], first: int, k: int) -> Tensor:
        n = len(columns[0])
        kept = min(k, n)
        look_up = [column.numpy().astype(np.intp) for column in columns]
        table_rows = [table.numpy() for table in tables]
        Q = len(table_rows[0])
        if self.buffer.size < Q * kept:
            self.buffer = np.empty(Q * kept, dtype=np.int64)
        out = self.buffer[: Q * kept].reshape(Q, kept)
        index = np.arange(first, first + n)

        def work(queries: range) -> None:
            dist, part = np.empty((2, n), dtype=np.float32)
            wide = np.empty(n, dtype=np.float64)
            keys = wide.view(np.int64)
            for q in queries:
                # "clip" writes into `out` directly; codes were checked to lie inside the tables
                table_rows[0][q].take(look_up[0], out=dist, mode="clip")
                for table, column in zip(table_rows[1:], look_up[1:], strict=True):
                    dist += table[q].take(column, out=part, mode="clip")
                np.copyto(wide, dist)
                np.bitwise_or(keys, index, out=keys)
                if kept < n:
                    keys.partition(kept - 1)
                    keys[:kept].sort()
                else:
                    keys.sort()
                out[q] = keys[:kept]

        threads = max(1, min(torch.get_num_threads(), Q))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, [range(i, Q, threads) for i in range(threads)]))
        return torch.from_numpy(out)
