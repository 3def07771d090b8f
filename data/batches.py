"""Batches: of a set on the training device without copies, of a larger one read ahead."""

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from data.store import RowStore
from utils.distributed import Ranks
from utils.errors import UserError

# batches that a GPU augments together, where the cost is that of launching kernels; and the most
# memory that their views may take
AHEAD, AHEAD_BYTES = 8, 2**28


class DeviceBatches:
    """Shuffled batches of rows (images, or features) on the device.

    The order of an epoch depends on the seed and the epoch alone, so any step can be drawn again
    after a resume. The last incomplete batch is dropped. With several ranks each gets its slice
    of the same global batch. Rows that are on the device already are only indexed there; while a
    batch of others is trained on, a thread reads the next one.

    Args:
        rows: (N, ...) on the device, in memory or on disk; images (N, 3, H, W) uint8.
        batch_size: rows of the global batch.
        seed: of the order.
        ranks: this process among the others.
        device: that batches are wanted on; None: where the rows are.
    Raises:
        UserError: if the batch is larger than the set, or cannot be shared out evenly.
    """

    def __init__(
        self,
        rows: Tensor | RowStore,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        device: torch.device | None = None,
    ) -> None:
        if batch_size > len(rows):
            raise UserError(
                f"--batch_size={batch_size}: is larger than the training set; allowed are 2 to "
                f"{len(rows)}"
            )
        if batch_size % ranks.world_size:
            raise UserError(
                f"--batch_size={batch_size}: must be a multiple of the {ranks.world_size} processes"
            )
        self.rows, self.batch_size, self.seed, self.ranks = rows, batch_size, seed, ranks
        self.home = rows.device if isinstance(rows, Tensor) else None
        self.device = device or self.home or torch.device("cpu")
        self._order: tuple[int, Tensor] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.rows) // self.batch_size

    def batch(self, step: int) -> Tensor:
        """This rank's rows of the batch at `step`, counted from 0 over the whole training."""
        if self.home == self.device:
            return self.rows[self.chosen(step)]
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        ready = self._ahead is not None and self._ahead[0] == step
        found = self._ahead[1] if ready else self._reader.submit(self._read, self.chosen(step))
        batch = found.result()
        self._ahead = (step + 1, self._reader.submit(self._read, self.chosen(step + 1)))
        return batch.to(self.device, non_blocking=True)

    def chosen(self, step: int) -> Tensor:
        """Which rows those are, (B,) int64."""
        epoch, i = divmod(step, len(self))
        if self._order is None or self._order[0] != epoch:
            # torch's generator heeds the low 32 bits of a seed only
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
            order = torch.randperm(len(self.rows), generator=generator)
            self._order = (epoch, order.to(self.home or "cpu"))
        share = self.batch_size // self.ranks.world_size
        start = i * self.batch_size + self.ranks.rank * share
        return self._order[1][start : start + share]

    def _read(self, which: Tensor) -> Tensor:
        rows = self.rows[which]
        return rows.pin_memory() if self.device.type == "cuda" else rows


class NeighbourRows(DeviceBatches):
    """For each row of a batch a random one of its nearest neighbours, from step `start` on.

    Neighbours are mined once, when the first of these batches is drawn; checkpoints keep them.

    Args:
        batches: the batches whose rows are replaced by neighbours.
        start: step of the first batch.
        mine: returns the row numbers (N, k) of the neighbours under the current model.
    """

    def __init__(self, batches: DeviceBatches, start: int, mine: Callable[[], Tensor]) -> None:
        b = batches
        super().__init__(b.rows, b.batch_size, b.seed, b.ranks, b.device)
        self.start, self.mine = start, mine
        self.neighbours: Tensor | None = None

    def chosen(self, step: int) -> Tensor:
        """The neighbours' rows, (B,) int64: a random one of the k, by seed, rank and step."""
        rows = super().chosen(step)
        if self.neighbours is None:
            found = self.ranks.collect(self.mine().to("cpu", torch.int32))[0]
            self.neighbours = found.to(rows.device)  # the first rank's, which a checkpoint holds
        key = f"{self.seed} {self.ranks.rank} {step} neighbour"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        column = torch.randint(self.neighbours.shape[1], (len(rows),), generator=generator)
        return self.neighbours[rows, column.to(rows.device)].long()

    def state(self) -> dict[str, int | Tensor | None]:
        """What a checkpoint holds."""
        found = None if self.neighbours is None else self.neighbours.cpu()
        return {"start": self.start, "neighbours": found}

    def restore(self, state: dict | None) -> None:
        """Take the neighbours of a checkpoint.

        Raises:
            UserError: if the stage has begun, at another step than these flags say.
        """
        if not state or state["neighbours"] is None:
            return
        if state["start"] != self.start:
            raise UserError(
                f"--epochs: the second stage began at step {state['start']}, and would begin at "
                f"step {self.start}; once it has begun, --epochs and --device stay as they were"
            )
        self.neighbours = state["neighbours"].to(self.home or "cpu")


class ViewBatches:
    """Random views of shuffled batches, augmented several batches at a time.

    Views at a step depend on the seed, the step, the rank and `ahead` alone, so any step can be
    drawn again after a resume. An augmentation is a chain of small operations whose launches cost
    a GPU more than their arithmetic; `ahead` batches share them.

    Args:
        batches: the images.
        augments_at: step -> the augmentation of each view from that step on; asked at the first
            step of every `ahead`.
        seed: of the random numbers.
        ahead: batches that are augmented together.
        neighbours: from its `start` on, a view of a neighbour of each image comes last.
    """

    def __init__(
        self,
        batches: DeviceBatches,
        augments_at: Callable[[int], Sequence[Callable[[Tensor], Tensor]]],
        seed: int,
        ahead: int = 1,
        neighbours: NeighbourRows | None = None,
    ) -> None:
        self.batches, self.augments_at, self.seed, self.ahead = batches, augments_at, seed, ahead
        self.neighbours = neighbours
        self.images = batches.batch_size
        self._made: tuple[int, list[Tensor]] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.batches)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """This rank's views at `step`, each (B, 3, S, S) float32 in [0, 1]."""
        group, i = divmod(step, self.ahead)
        if self._made is None or self._made[0] != group:
            self._made = None  # frees the views before it
            self._made = (group, self._make(group * self.ahead))
        return tuple(views[i] for views in self._made[1])

    def state(self) -> dict | None:
        """The neighbours, for a checkpoint."""
        return self.neighbours.state() if self.neighbours else None

    def restore(self, state: dict | None) -> None:
        """Take the neighbours of a checkpoint."""
        if self.neighbours:
            self.neighbours.restore(state)

    def _make(self, start: int) -> list[Tensor]:
        steps = range(start, start + self.ahead)
        augments = self.augments_at(start)
        sources = len(augments) * [torch.cat([self.batches.batch(step) for step in steps])]
        if self.neighbours is not None and start >= self.neighbours.start:
            sources[-1] = torch.cat([self.neighbours.batch(step) for step in steps])
        rank = self.batches.ranks.rank
        torch.manual_seed(zlib.crc32(f"{self.seed} {rank} {start}".encode()))
        return [
            augment(images).unflatten(0, (self.ahead, -1))
            for augment, images in zip(augments, sources, strict=True)
        ]


def batches_ahead(device: torch.device, views: int, side: int) -> int:
    """How many batches of so many float32 views of side x side pixels to augment together."""
    if device.type != "cuda":
        return 1
    return max(1, min(AHEAD, AHEAD_BYTES // (views * 3 * 4 * side**2)))


class CachedViewBatches:
    """Views of shuffled batches, drawn from precomputed features of views.

    Args:
        batches: of rows (V, F): the features of V views of an image.
        seed: of the choice, which depends on it, the step and the rank alone.
        whole: the same batches of rows (1, F), of the images themselves: one more view.
        views: of each image at a step, all different.
        neighbours: of rows (1, F); from its `start` on, a neighbour of each image comes last.
    """

    def __init__(
        self,
        batches: DeviceBatches,
        seed: int,
        whole: DeviceBatches | None = None,
        views: int = 2,
        neighbours: NeighbourRows | None = None,
    ) -> None:
        self.batches, self.seed, self.whole, self.views = batches, seed, whole, views
        self.neighbours = neighbours
        self.images = batches.batch_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.batches)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Features of `views` different views of each image at `step`, (B, F) float32 each; in the
        second stage also those of a neighbour."""
        rows = self.batches.batch(step)  # (B, V, F)
        if self.whole is not None:
            rows = torch.cat([rows, self.whole.batch(step)], dim=1)
        B, V, _ = rows.shape
        key = f"{self.seed} {self.batches.ranks.rank} {step} cached"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        order = torch.rand(B, V, generator=generator).argsort(dim=1).to(rows.device)
        image = torch.arange(B, device=rows.device)
        found = [rows[image, order[:, i]].float() for i in range(self.views)]
        if self.neighbours is not None and step >= self.neighbours.start:
            found.append(self.neighbours.batch(step)[:, 0].float())
        return tuple(found)

    def state(self) -> dict | None:
        """The neighbours, for a checkpoint."""
        return self.neighbours.state() if self.neighbours else None

    def restore(self, state: dict | None) -> None:
        """Take the neighbours of a checkpoint."""
        if self.neighbours:
            self.neighbours.restore(state)


class SemiSupervisedBatches:
    """Views of labelled images, their labels, and views of images without labels.

    An epoch is a pass over the labelled images; the others go round at their own pace.

    Args:
        labelled: views of labelled images, one of each; or kept features of them.
        labels: of all labelled images, (N,) or (N, C), on the device.
        unlabelled: views of the others; None: they are left out.
        reversal_at: step -> strength of the gradient reversal.
    """

    def __init__(
        self,
        labelled: ViewBatches | CachedViewBatches,
        labels: Tensor,
        unlabelled: ViewBatches | CachedViewBatches | None,
        reversal_at: Callable[[int], float],
    ) -> None:
        self.labelled, self.labels, self.unlabelled = labelled, labels, unlabelled
        self.reversal_at = reversal_at
        self.images = labelled.images + (unlabelled.images if unlabelled else 0)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.labelled)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """This rank's labelled views (B, 3, S, S) at `step` and their labels (B,) or (B, C); and
        unless they are left out, unlabelled views (U, 3, S, S) and the gradient reversal's strength
        for each of these."""
        (view,) = self.labelled.batch(step)
        labels = self.labels[self.labelled.batches.chosen(step).to(self.labels.device)]
        if self.unlabelled is None:
            return view, labels
        (other,) = self.unlabelled.batch(step)
        strength = torch.full((len(other),), self.reversal_at(step), device=other.device)
        return view, labels, other, strength
