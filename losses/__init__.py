"""One loss a file: tensors in, scalar out."""

from losses.arcface import arcface_logits, arcface_loss
from losses.backward_compatible import hvs_loss, lce_loss
from losses.classification import classification_loss, prototype_logits
from losses.contrastive import contrastive_loss
from losses.cqc import cqc_loss
from losses.entropy import subspace_entropy_loss
from losses.n_pair_pq import n_pair_pq_loss
from losses.neighbour_consistency import neighbour_consistency_loss
from losses.regression import regression_loss
from losses.structure_similarity import structure_similarity_loss
from losses.tuple_contrastive import tuple_contrastive_loss

__all__ = [
    "arcface_logits",
    "arcface_loss",
    "classification_loss",
    "contrastive_loss",
    "cqc_loss",
    "hvs_loss",
    "lce_loss",
    "n_pair_pq_loss",
    "neighbour_consistency_loss",
    "prototype_logits",
    "regression_loss",
    "structure_similarity_loss",
    "subspace_entropy_loss",
    "tuple_contrastive_loss",
]
