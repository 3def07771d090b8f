"""Networks and the product quantizer: no losses, no flags, no files."""

from models.asymmetric import AsymmetricNetwork, build_asymmetric
from models.embedding import (
    EmbeddingNetwork,
    OwnGallery,
    PooledGallery,
    build_embedding,
    build_pooled,
    count_costs,
)
from models.gpq import GPQ
from models.network import QuantizationNetwork
from models.quantizer import ProductQuantizer, PrototypeQuantizer
from models.spq import SPQ
from models.trunks import build_trunk

__all__ = [
    "GPQ",
    "QUANTIZERS",
    "SPQ",
    "AsymmetricNetwork",
    "EmbeddingNetwork",
    "OwnGallery",
    "PooledGallery",
    "ProductQuantizer",
    "PrototypeQuantizer",
    "QuantizationNetwork",
    "build_asymmetric",
    "build_embedding",
    "build_gpq",
    "build_pooled",
    "build_quantizer",
    "build_spq",
    "build_trunk",
    "count_costs",
]

# --quantizer: how z is made from x
QUANTIZERS = ("soft", "hard", "vq")


def build_quantizer(kind: str, M: int, K: int, d: int) -> ProductQuantizer:
    """Quantizer of D = M * d dimensions: `soft` and `hard` share the product quantizer, `vq` is one
    codebook of K codewords over all D dimensions (log2(K) bits).

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {kind!r}; known: {', '.join(QUANTIZERS)}")
    return ProductQuantizer(1, K, M * d) if kind == "vq" else ProductQuantizer(M, K, d)


def build_spq(
    arch: str,
    width: int,
    quantizer: str,
    M: int,
    K: int,
    d: int,
    alpha: float = 5.0,
    stem: str | None = None,
    input_size: int = 32,
) -> SPQ:
    """An untrained SPQ network: trunk (`build_trunk`), head and quantizer by their names.

    Raises:
        ValueError: if trunk or quantizer is unknown, or a number is not positive.
    """
    parts = build_trunk(arch, width, stem, input_size), build_quantizer(quantizer, M, K, d)
    return SPQ(*parts, alpha=alpha, hard=quantizer == "hard")


def build_gpq(
    arch: str,
    width: int,
    M: int,
    K: int,
    d: int,
    classes: int,
    alpha: float = 20.0,
    stem: str | None = None,
    input_size: int = 32,
) -> GPQ:
    """An untrained GPQ network: trunk (`build_trunk`), head, codebooks and class prototypes.

    Raises:
        ValueError: if the trunk is unknown, or a number is not positive.
    """
    trunk = build_trunk(arch, width, stem, input_size)
    return GPQ(trunk, PrototypeQuantizer(M, K, d, classes, alpha))
