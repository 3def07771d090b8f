"""The query network of asymmetric retrieval, and what some methods learn beside it."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.classifier import CosineClassifier, ResidualTransform
from models.embedding import EmbeddingNetwork, build_embedding
from models.trunks import OWN


class AsymmetricNetwork(EmbeddingNetwork):
    """A light network whose embeddings are compared with those of a large one.

    Args:
        trunk, D, pool, channels: as for `EmbeddingNetwork`.
        classes: of a classifier over the embeddings, for HVS and LCE; 0: there is none.
        transforms: whether a residual transform leads from its own space to the gallery's (LCE).
    Attributes:
        classifier, transform: these; None.
    Raises:
        ValueError: as `EmbeddingNetwork`, `CosineClassifier` and `ResidualTransform`.
    Source: SSP, section III. Departures: none.
    """

    def __init__(
        self,
        trunk: nn.Module,
        D: int,
        pool: nn.Module | None = None,
        channels: int | None = None,
        classes: int = 0,
        transforms: bool = False,
    ) -> None:
        super().__init__(trunk, D, pool, channels)
        self.classifier = CosineClassifier(classes, D) if classes else None
        self.transform = ResidualTransform(D) if transforms else None

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> embeddings (N, D) in its own space, which the losses
        take."""
        return super().describe(images)

    def describe(self, images: Tensor) -> Tensor:
        """Images -> what searches the gallery, (N, D) float32 of unit length."""
        x = self(images)
        return x if self.transform is None else F.normalize(self.transform(x).float(), dim=1)


def build_asymmetric(
    arch: str,
    width: int,
    D: int,
    classes: int = 0,
    transforms: bool = False,
    p: float = 3.0,
    trainable_p: bool = False,
    stem: str | None = None,
    input_size: int = 32,
) -> AsymmetricNetwork:
    """An untrained query network: of our own trunks with the CIFAR stem their pooled features and a
    linear layer (`small`), of timm's SSP's head over the last map (`query`).

    Raises:
        ValueError: as `models.embedding.build_embedding`.
    """
    kind = "small" if arch in OWN and stem in ("cifar", None) else "query"
    parts = build_embedding(kind, arch, width, D, p, trainable_p, stem=stem, input_size=input_size)
    channels = None if parts.expand is None else parts.expand.out_channels
    return AsymmetricNetwork(parts.trunk, D, parts.pool, channels, classes, transforms)
