"""Networks and the product quantizer: no losses, no flags, no files."""

from collections.abc import Callable

from torch import nn

from models.quantizer import ProductQuantizer
from models.resnet import resnet18
from models.spq import SPQ

__all__ = [
    "QUANTIZERS",
    "SPQ",
    "TRUNKS",
    "ProductQuantizer",
    "build_quantizer",
    "build_spq",
    "build_trunk",
]

# --arch: name -> function of `width`, giving a module with `feature_dim`. New trunks go here.
TRUNKS: dict[str, Callable[[int], nn.Module]] = {"resnet18": resnet18}

# --quantizer: how z is made from x
QUANTIZERS = ("soft", "hard", "vq")


def build_trunk(arch: str, width: int) -> nn.Module:
    """The trunk registered as `arch`.

    Raises:
        ValueError: if no trunk has that name.
    """
    if arch not in TRUNKS:
        raise ValueError(f"unknown arch {arch!r}; known: {', '.join(sorted(TRUNKS))}")
    return TRUNKS[arch](width)


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
    arch: str, width: int, quantizer: str, M: int, K: int, d: int, alpha: float = 5.0
) -> SPQ:
    """An untrained SPQ network: trunk, head and quantizer by their names.

    Raises:
        ValueError: if trunk or quantizer is unknown, or a number is not positive.
    """
    parts = build_trunk(arch, width), build_quantizer(quantizer, M, K, d)
    return SPQ(*parts, alpha=alpha, hard=quantizer == "hard")
