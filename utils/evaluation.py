"""Encode queries and database with a model, and score the retrieval."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.analysis import codeword_purity, first_of_each_class
from utils.metrics import evaluate_retrieval, tie_order
from utils.neighbours import KNN_NEIGHBOURS, knn_accuracy, nearest_by_cosine, neighbour_purity

# in a batch: images of 32 pixels, and fewer of larger ones
EVAL_BATCH, EVAL_PIXELS, LEAST_BATCH = 500, 500 * 32 * 32, 50


# that SPQ's figures are reported under
L2_DISTANCES = ("squared_l2", "l2")


def headline_first(distance: str) -> list[str]:
    """L2_DISTANCES, that one first."""
    return sorted(L2_DISTANCES, key=lambda other: other != distance)


class Rows(Protocol):
    """Images (N, 3, H, W) uint8 or features (N, F), by rows: a tensor, or rows on disk."""

    shape: Sequence[int]

    def __len__(self) -> int: ...

    def __getitem__(self, which: slice | Tensor) -> Tensor: ...


@torch.no_grad()
def as_batches(images: Rows, size: int, device: torch.device) -> Iterator[Tensor]:
    """uint8 (N, 3, H, W) -> float batches in [0, 1], resized to `size` if need be; features (N, F)
    or (N, 1, F) -> float batches (B, F)."""
    features = len(images.shape) < 4
    most = EVAL_BATCH if features else images_at_once(size)
    for start in range(0, len(images), most):
        batch = images[start : start + most].to(device)
        yield batch.float().flatten(1) if features else to_unit(batch, size)


def images_at_once(size: int) -> int:
    """How many images of that side go through a network together when it does not learn."""
    return max(LEAST_BATCH, min(EVAL_BATCH, EVAL_PIXELS // size**2))


def to_unit(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) -> float in [0, 1], resized to `size` if need be."""
    images = images.float() / 255.0
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def describe_images(model: nn.Module, images: Rows, size: int) -> Tensor:
    """Descriptors x (N, D) float32 of uint8 images or of features, in the model's present mode."""
    device = next(model.parameters()).device
    return torch.cat([model.describe(batch).float() for batch in as_batches(images, size, device)])


@torch.no_grad()
def encode_images(model: nn.Module, images: Rows, size: int) -> Tensor:
    """Codes (N, M) uint8 (int32 if K > 256) of uint8 images or of features, in the model's mode."""
    device = next(model.parameters()).device
    dtype = torch.uint8 if model.quantizer.K <= 256 else torch.int32
    return torch.cat([model.encode(batch).to(dtype) for batch in as_batches(images, size, device)])


class RetrievalEvaluation:
    """A retrieval benchmark: queries against a database, raw queries against codes.

    Args:
        query: images (Q, 3, H, W) uint8 and labels, (Q,) or (Q, C).
        db: images (N, 3, H, W) uint8 and labels, (N,) or (N, C).
        size: side that images are encoded at, pixels.
        top_n: the N of mAP@N, or "all".
        distances: that are ranked by; the first one's figures lead.
        diagnose: also compute `neighbour_purity@20` and, with single labels, `knn_accuracy` (of
            descriptors) and `codeword_purity` (of codes). The database's descriptors are then in
            memory, 4 D bytes each.

    Attributes:
        features: of the queries and of the database, to encode in place of the images, which a
            frozen trunk need not see again; None.
        encoded: the query descriptors and database codes of the last evaluation; None before.
    """

    def __init__(
        self,
        query: tuple[Rows, Tensor],
        db: tuple[Rows, Tensor],
        size: int,
        top_n: int | str,
        distances: Sequence[str],
        diagnose: bool = False,
    ) -> None:
        self.query, self.db = query, db
        self.size, self.top_n = size, top_n
        self.distances = tuple(distances)
        self.diagnose = diagnose
        self.diagnosis: dict[str, float] = {}
        self.features: tuple[Rows, Rows] | None = None
        self.encoded: tuple[Tensor, Tensor] | None = None

    def encode(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Query descriptors (Q, D) and database codes (N, M). Leaves the model's mode as it was."""
        images = self.features or (self.query[0], self.db[0])
        with evaluating(model):
            query = describe_images(model, images[0], self.size)
            if self.diagnose:
                db = describe_images(model, images[1], self.size)
                db_codes = torch.cat([model.quantizer.encode(x) for x in db.split(EVAL_BATCH)])
                self.diagnosis = self._diagnose(query, db, db_codes)
            else:
                db_codes = encode_images(model, images[1], self.size)
        self.encoded = (query, db_codes)
        return self.encoded

    def _diagnose(self, query: Tensor, db: Tensor, db_codes: Tensor) -> dict[str, float]:
        """Quality of the descriptors and of the codewords, which both limit mAP."""
        labels, db_labels = self.query[1].to(db.device), self.db[1].to(db.device)
        k = min(KNN_NEIGHBOURS, len(db))
        neighbours, sims = nearest_by_cosine(query, db, k)
        found = {
            "neighbour_purity@20": neighbour_purity(neighbours[:, :20], labels, db_labels),
        }
        if labels.dim() == 1:
            found["knn_accuracy"] = knn_accuracy(neighbours, sims, labels, db_labels)
            found["codeword_purity"] = codeword_purity(db_codes, db_labels)
        return found

    def __call__(self, model: nn.Module) -> list[dict]:
        """Metrics under each distance, the headline first. Leaves the model's mode as it was."""
        query, db_codes = self.encode(model)
        found = self.score(query, db_codes, model.quantizer.codebooks.detach().float())
        bits = {"code_bits": model.quantizer.code_bits}
        return [bits | self.diagnosis | figures for figures in found]

    def score(self, query: Tensor, db_codes: Tensor, codebooks: Tensor) -> list[dict]:
        """Metrics of query descriptors (Q, D) and database codes (N, M) under each distance; items
        at equal distances come in a fixed random order (`utils.metrics.tie_order`)."""
        order = tie_order(len(db_codes))
        db = db_codes[order.to(db_codes.device)], self.db[1][order.to(self.db[1].device)]
        return [
            evaluate_retrieval(query, self.query[1], *db, codebooks, distance, self.top_n)
            for distance in self.distances
        ]

    def examples(self, model: nn.Module, columns: int) -> tuple[Tensor, Tensor]:
        """The first query of each class (R,) and its nearest items (R, columns), on the CPU, of
        what is encoded."""
        x, codes = self.encoded
        codebooks = model.quantizer.codebooks.detach().float()
        labels, distance = self.query[1], self.distances[0]
        return first_of_each_class(x, labels, codes, codebooks, columns, distance)
