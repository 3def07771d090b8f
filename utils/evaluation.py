"""Encode queries and database with a model, and score the retrieval."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.metrics import evaluate_retrieval
from utils.retrieval import DISTANCES

EVAL_BATCH = 500


@torch.no_grad()
def _batches(images: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """uint8 (N, 3, H, W) -> float batches in [0, 1], resized to `size` if need be."""
    for start in range(0, len(images), EVAL_BATCH):
        batch = images[start : start + EVAL_BATCH].to(device).float() / 255.0
        if batch.shape[-2:] != (size, size):
            batch = F.interpolate(batch, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        yield batch


@torch.no_grad()
def describe_images(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """Descriptors x (N, D) float32 of uint8 images, in the model's present mode."""
    device = next(model.parameters()).device
    return torch.cat([model.describe(batch).float() for batch in _batches(images, size, device)])


@torch.no_grad()
def encode_images(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """Codes (N, M) uint8 (int32 if K > 256) of uint8 images, in the model's present mode."""
    device = next(model.parameters()).device
    dtype = torch.uint8 if model.quantizer.K <= 256 else torch.int32
    return torch.cat([model.encode(batch).to(dtype) for batch in _batches(images, size, device)])


class RetrievalEvaluation:
    """A retrieval benchmark: queries against a database, raw queries against codes.

    Args:
        query: images (Q, 3, H, W) uint8 and labels.
        db: images (N, 3, H, W) uint8 and labels.
        size: side that images are encoded at, pixels.
        top_n: the N of mAP@N.
        headline: the distance whose figures lead.

    Attributes:
        encoded: the query descriptors and database codes of the last evaluation; None before.
    """

    def __init__(
        self,
        query: tuple[Tensor, Tensor],
        db: tuple[Tensor, Tensor],
        size: int,
        top_n: int,
        headline: str,
    ) -> None:
        self.query, self.db = query, db
        self.size, self.top_n = size, top_n
        self.distances = sorted(DISTANCES, key=lambda distance: distance != headline)
        self.encoded: tuple[Tensor, Tensor] | None = None

    def encode(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Query descriptors (Q, D) and database codes (N, M). Leaves the model's mode as it was."""
        was_training = model.training
        model.eval()
        try:
            query = describe_images(model, self.query[0], self.size)
            db_codes = encode_images(model, self.db[0], self.size)
        finally:
            model.train(was_training)
        self.encoded = (query, db_codes)
        return self.encoded

    def __call__(self, model: nn.Module) -> list[dict]:
        """Metrics under each distance, the headline first. Leaves the model's mode as it was."""
        query, db_codes = self.encode(model)
        codebooks = model.quantizer.codebooks.detach().float()
        return [
            {"code_bits": model.quantizer.code_bits}
            | evaluate_retrieval(
                query,
                self.query[1],
                db_codes,
                self.db[1],
                codebooks,
                distance,
                self.top_n,
            )
            for distance in self.distances
        ]
