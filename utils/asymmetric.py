"""Asymmetric retrieval: queries by a light network, against features that a large one gave."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from utils.analysis import first_rows_of_each_class
from utils.baselines import ranked_l2
from utils.evaluation import Rows, describe_images, evaluating
from utils.metrics import evaluate_rankings

# what is asked by what, the headline first
SIDES = ("query-gallery", "query-query", "gallery-gallery")
FLOAT_BITS = 32


class AsymmetricEvaluation:
    """A retrieval benchmark between two networks, by the cosine of their embeddings.

    Three figures, named by the network of the queries and that of the database: "query-gallery" is
    what SSP is for, "query-query" the light network alone, "gallery-gallery" what the large one
    reaches.

    Args:
        query: images (Q, 3, H, W) uint8 and labels, (Q,) or (Q, C).
        db: images (N, 3, H, W) uint8 and labels, (N,) or (N, C).
        gallery: the large network's embeddings of both, (Q, D) and (N, D), of unit length.
        size: side that images are encoded at, pixels.
        top_n: the n of mAP@n, or "all".

    Attributes:
        encoded: the light network's embeddings of queries (Q, D) and database (N, D); None before
            the first evaluation.
        distances: SIDES, as other evaluations name what they rank by.
    """

    distances = SIDES

    def __init__(
        self,
        query: tuple[Rows, Tensor],
        db: tuple[Rows, Tensor],
        gallery: tuple[Tensor, Tensor],
        size: int,
        top_n: int | str,
    ) -> None:
        self.query, self.db, self.gallery = query, db, gallery
        self.size, self.top_n = size, top_n
        self.encoded: tuple[Tensor, Tensor] | None = None
        self._ceiling: dict | None = None  # of the gallery network, which does not change

    def encode(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The light network's embeddings of both sides. Leaves the model's mode as it was."""
        with evaluating(model):
            query, db = (
                describe_images(model, images, self.size).cpu()
                for images in (self.query[0], self.db[0])
            )
        self.encoded = (query, db)
        return self.encoded

    def __call__(self, model: nn.Module) -> list[dict]:
        """Metrics of SIDES in their order. Leaves the model's mode as it was."""
        x, db = self.encode(model)
        gallery_query, gallery_db = self.gallery
        if self._ceiling is None:
            self._ceiling = self._score("gallery-gallery", gallery_query, gallery_db)
        return [
            self._score("query-gallery", x, gallery_db),
            self._score("query-query", x, db),
            dict(self._ceiling),
        ]

    def examples(self, model: nn.Module, columns: int) -> tuple[Tensor, Tensor]:
        """The first query of each class (R,) and its nearest items of the gallery (R, columns), of
        what is encoded."""
        query, _ = self.encoded
        rows = first_rows_of_each_class(self.query[1])
        if not len(rows):
            return rows, torch.zeros(0, columns, dtype=torch.int64)
        k = min(columns, len(self.gallery[1]))
        found = ranked_l2(query[rows].numpy(), self.gallery[1].numpy(), k)
        return rows, torch.cat([index for _, index in found])

    def _score(self, name: str, query: Tensor, db: Tensor) -> dict:
        N = len(db)
        n = N if self.top_n == "all" else self.top_n
        figures = evaluate_rankings(
            # of unit vectors: half the squared distance is 1 - cos
            ranked_l2(query.numpy(), db.numpy(), N),
            self.query[1],
            self.db[1],
            N,
            n,
            whole_ranking=True,
        )
        figures = _without_n(figures, n) if self.top_n == "all" else figures
        return {"code_bits": FLOAT_BITS * db.shape[1], "distance": name} | figures


def _without_n(figures: dict, n: int) -> dict:
    """mAP@all alone, where n is the number of all items."""
    named: Sequence[str] = (f"mAP@{n}", f"mAP@{n}_all_relevant", f"recall@{n}")
    return {name: value for name, value in figures.items() if name not in named}
