"""N-pair product quantization loss, GPQ's metric learning between descriptors and their codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

REG_SHARE = 0.25  # of the N-pair loss's own regularisation


def n_pair_pq_loss(x: Tensor, z: Tensor, labels: Tensor, reg: float = 0.002) -> Tensor:
    """Descriptors find the quantized descriptors of images with the same labels.

        sim[i, j]    = <x[i], z[j]>  = M cos(x[i], z[j])  for intra-normalised x and z
        target[i, j] = (Y Y^T)[i, j] / sum_j (Y Y^T)[i, j]
        loss = mean over i of  -sum_j target[i, j] log softmax_j( sim[i] )
               + 0.25 reg (mean ||x||^2 + mean ||z||^2)

    with Y the labels as rows of 0 and 1. The last line is a constant for intra-normalised vectors.

    Args:
        x: (B, D) descriptors.
        z: (B, D) their soft-quantized ones.
        labels: (B,) class numbers, or (B, C) of 0 and 1, where an image without a label is like
            itself alone.
        reg: weight of the squared lengths.
    Returns:
        Scalar, in nats.
    Raises:
        ValueError: if the shapes do not fit.
    Source: GPQ, equations 3 and 4; Sohn 2016. Departures: none here, but z is intra-normalised,
        which the released code's is not; images without labels are this project's reading.
    """
    if x.dim() != 2 or x.shape != z.shape:
        raise ValueError(f"x and z must be (B, D) alike; got {tuple(x.shape)}, {tuple(z.shape)}")
    if labels.dim() not in (1, 2) or len(labels) != len(x):
        raise ValueError(f"{len(x)} images need labels (B,) or (B, C); got {tuple(labels.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(x.dtype, z.dtype), torch.float32)
        x, z = x.to(dtype), z.to(dtype)
        if labels.dim() == 1:
            shared = (labels[:, None] == labels).to(dtype)  # (B, B)
        else:
            shared = labels.to(dtype) @ labels.to(dtype).T  # labels in common
            shared = shared + torch.diag((shared.diagonal() == 0).to(dtype))
        target = shared / shared.sum(dim=1, keepdim=True)
        lengths = x.square().sum(dim=1).mean() + z.square().sum(dim=1).mean()
        return F.cross_entropy(x @ z.T, target) + REG_SHARE * reg * lengths
