"""One loss a file: tensors in, scalar out."""

from losses.contrastive import contrastive_loss
from losses.cqc import cqc_loss

__all__ = ["contrastive_loss", "cqc_loss"]
