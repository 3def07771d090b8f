"""One loss a file: tensors in, scalar out."""

from losses.classification import classification_loss, prototype_logits
from losses.contrastive import contrastive_loss
from losses.cqc import cqc_loss
from losses.entropy import subspace_entropy_loss
from losses.n_pair_pq import n_pair_pq_loss

__all__ = [
    "classification_loss",
    "contrastive_loss",
    "cqc_loss",
    "n_pair_pq_loss",
    "prototype_logits",
    "subspace_entropy_loss",
]
