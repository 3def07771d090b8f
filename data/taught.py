"""What a query network is taught with: views of images beside the gallery's features of them, and
tuples of a query, its like, and what it is taken for."""

import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batches import ViewBatches
from data.datasets import Images
from utils.distributed import Ranks
from utils.errors import UserError

SIMILAR_CHUNK = 512  # queries that are compared with the pool together


class TaughtBatches:
    """Views of images, the gallery's features of these images, and their labels.

    Args:
        views: one view of each image.
        gallery: (N, D) features, a row for each image.
        labels: (N,) or (N, C); None where there are none.
    """

    def __init__(self, views: ViewBatches, gallery: Tensor, labels: Tensor | None) -> None:
        self.views, self.gallery, self.labels = views, gallery, labels
        self.images = views.images

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.views)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """This rank's views (B, 3, S, S) at `step`, the gallery's features (B, D), and labels."""
        (view,) = self.views.batch(step)
        rows = self.views.batches.chosen(step)
        found = (view, self.gallery[rows.to(self.gallery.device)].to(view.device))
        if self.labels is None:
            return found
        return *found, self.labels[rows.to(self.labels.device)].to(view.device)


@dataclass(frozen=True)
class Tuples:
    """Rows of images: query (T,), positive (T,), negatives (T, R)."""

    query: Tensor
    positive: Tensor
    negatives: Tensor

    def rows(self) -> Tensor:
        """(T, 2 + R): query, positive, negatives."""
        return torch.cat([self.query[:, None], self.positive[:, None], self.negatives], dim=1)


def able_queries(clusters: Tensor) -> int:
    """How many images have another one in their cluster."""
    counts = clusters.unique(return_counts=True)[1]
    return int(counts[counts > 1].sum())


def mine_tuples(
    describe: Callable[[Tensor], Tensor],
    gallery: Tensor,
    clusters: Tensor,
    queries: int,
    pool: int,
    negatives: int,
    generator: torch.Generator,
    pairs: Tensor | None = None,
) -> Tuples:
    """Hard tuples: each query with a random image of its cluster, and the images of other clusters
    whose gallery features are most like it, no two of one cluster.

    Args:
        describe: rows (n,) -> embeddings (n, D) by the query network as it is now.
        gallery: (N, D) features.
        clusters: (N,) class or cluster of each image.
        queries: drawn at random from the images whose cluster has another one.
        pool: images, drawn at random, that negatives are looked for among.
        negatives: R of each query.
        generator: of the draw.
        pairs: (P, 2) rows of queries and positives that match; queries are then drawn from these,
            each with its own positive. None: as above.
    Returns:
        At most `queries` tuples.
    Raises:
        UserError: if no cluster has two images, or there is no pair, or too few clusters.
    Source: SSP, section IV, its comparison with AML; Radenovic et al. 2018. Departure: a positive
        is never among the negatives, which the released code does not see to.
    """
    clusters = clusters.cpu()
    N = len(clusters)
    _, number, counts = clusters.unique(return_inverse=True, return_counts=True)
    able = (counts[number] > 1).nonzero()[:, 0]
    if not len(able if pairs is None else pairs) or len(counts) <= negatives:
        raise UserError(
            f"--method=aml: wants classes of two images or more, and more than {negatives} of them "
            f"(--negatives); this set has {len(counts)} classes, {len(able)} images in such"
            + (f", {len(pairs)} pairs" if pairs is not None else "")
        )
    if pairs is None:
        query, positive = _random_pairs(number, counts, able, queries, generator)
    else:
        drawn = torch.randperm(len(pairs), generator=generator)[:queries]
        query, positive = pairs[drawn].unbind(dim=1)

    rows = torch.randperm(N, generator=generator)[:pool]
    candidates, of_cluster = gallery[rows.to(gallery.device)], number[rows]
    present = len(of_cluster.unique())
    if present <= negatives:
        raise UserError(
            f"--pool={pool}: holds images of {present} classes, and a tuple has {negatives} "
            "negatives of different ones (--negatives); a larger pool has more"
        )
    found = []
    for part in query.split(SIMILAR_CHUNK):
        x = describe(part)
        candidates = candidates.to(x.device)
        sim = (x @ candidates.T).cpu()
        sim[number[part][:, None] == of_cluster] = -torch.inf
        found.append(_best_of_clusters(sim, rows, of_cluster, negatives, len(counts)))
    return Tuples(query, positive, torch.cat(found))


def _random_pairs(
    number: Tensor, counts: Tensor, able: Tensor, queries: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Queries among the rows `able`, and for each another image of its cluster."""
    N = len(number)
    query = able[torch.randperm(len(able), generator=generator)[:queries]]
    order = number.argsort(stable=True)  # images of a cluster side by side
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    place = torch.empty_like(order)
    place[order] = torch.arange(N)
    own, size = place[query] - start[number[query]], counts[number[query]]
    step = 1 + (torch.rand(len(query), generator=generator) * (size - 1)).long()
    return query, order[start[number[query]] + (own + step) % size]  # never the query itself


def _best_of_clusters(
    sim: Tensor, rows: Tensor, of_cluster: Tensor, negatives: int, clusters: int
) -> Tensor:
    """The most similar of each cluster first, then the best `negatives` of these: (n, R) rows."""
    n, P = sim.shape
    best = sim.new_full((n, clusters), -torch.inf)
    owner = of_cluster.expand(n, P)
    best.scatter_reduce_(1, owner, sim, "amax")
    top = best.topk(negatives, dim=1).indices  # clusters
    chosen = []
    for r in range(negatives):
        of_this = of_cluster == top[:, r, None]
        chosen.append(sim.masked_fill(~of_this, -torch.inf).argmax(dim=1))
    return rows[torch.stack(chosen, dim=1)]


class TupleBatches:
    """Batches of tuples, mined anew for each epoch by the query network as it is then.

    What was mined is part of a checkpoint (`state`), so that a run that was interrupted within an
    epoch goes on with the same tuples.

    Args:
        images: (N, 3, H, W) uint8.
        gallery: (N, D) features.
        mine: epoch -> tuples of that epoch; the same number each time.
        tuples: mined in an epoch.
        negatives: R of each.
        batch_size: tuples of the global batch.
        augment_at: step -> the augmentation, uint8 images -> a view of each.
        seed: of the views.
        ranks: this process among the others.
        device: that batches are wanted on.
    Raises:
        UserError: if there is no tuple, or a batch cannot be shared out evenly.
    """

    def __init__(
        self,
        images: Images,
        gallery: Tensor,
        mine: Callable[[int], Tuples],
        tuples: int,
        negatives: int,
        batch_size: int,
        augment_at: Callable[[int], Callable[[Tensor], Tensor]],
        seed: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        if not tuples:
            raise UserError("--method=aml: wants classes of two images or more; here are none")
        self.batch_size = min(batch_size, tuples)
        if self.batch_size % ranks.world_size:
            raise UserError(
                f"--batch_size={self.batch_size}: must be a multiple of the {ranks.world_size} "
                "processes"
            )
        self.rows, self.gallery, self.mine, self.tuples = images, gallery, mine, tuples
        self.augment_at, self.seed, self.ranks, self.device = augment_at, seed, ranks, device
        self.images = self.batch_size * (2 + negatives)
        self._mined: tuple[int, Tensor] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.tuples // self.batch_size

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's views (B, 2 + R, 3, S, S) of query, positive and negatives at `step`, and the
        gallery's features (B, 2 + R, D) of these images."""
        epoch, i = divmod(step, len(self))
        if self._mined is None or self._mined[0] != epoch:
            rows = self.mine(epoch).rows() if self.ranks.is_main else None
            self._mined = epoch, self.ranks.collect(rows)[0]  # the main rank's for all
        rows = self._chosen(i)
        images = self._images(step, rows).to(self.device)
        torch.manual_seed(zlib.crc32(f"{self.seed} {self.ranks.rank} {step} tuples".encode()))
        views = self.augment_at(step)(images).unflatten(0, rows.shape)
        return views, self.gallery[rows.to(self.gallery.device)].to(self.device)

    def _chosen(self, i: int) -> Tensor:
        """This rank's rows (B, 2 + R) of the i-th batch of the epoch."""
        share = self.batch_size // self.ranks.world_size
        start = i * self.batch_size + self.ranks.rank * share
        return self._mined[1][start : start + share]

    def _images(self, step: int, rows: Tensor) -> Tensor:
        """Images of these rows; of those that are no tensor the next step's, if it is of the same
        epoch, are read meanwhile by a thread."""
        if isinstance(self.rows, Tensor):
            return self.rows[rows.flatten().to(self.rows.device)]
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        ready = self._ahead is not None and self._ahead[0] == step
        found = self._ahead[1].result() if ready else self.rows[rows.flatten()]
        self._ahead = None
        if i := (step + 1) % len(self):
            following = self._chosen(i).flatten()
            self._ahead = step + 1, self._reader.submit(self.rows.__getitem__, following)
        return found

    def state(self) -> dict:
        """What a checkpoint must have, so that a resumed run goes on with the same tuples."""
        if self._mined is None:
            return {}
        return {"epoch": self._mined[0], "rows": self._mined[1]}

    def restore(self, state: dict) -> None:
        """Go on with what `state` gave."""
        self._mined, self._ahead = (state["epoch"], state["rows"]) if state else None, None
