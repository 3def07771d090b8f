"""Class weights and the residual transform that the compared methods HVS and LCE learn with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineClassifier(nn.Module):
    """A weight vector for each class, compared by angle; no bias.

        sim[n, c] = cos(x[n], weight[c])

    Margin and scale are the loss's.

    Args:
        classes: C, at least 2.
        D: dimension of the embeddings.
    Attributes:
        weight: (C, D), Xavier uniform.
    Raises:
        ValueError: if there are fewer than two classes, or D is not positive.
    Source: SSP, section 4 (HVS, LCE) and its released ArcFace layer. Departures: none.
    """

    def __init__(self, classes: int, D: int) -> None:
        super().__init__()
        if classes < 2 or D < 1:
            raise ValueError(f"there must be 2 classes or more and D above 0; got {classes}, {D}")
        self.weight = nn.Parameter(torch.empty(classes, D))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (N, D) -> cosines (N, C), float32."""
        with torch.autocast(x.device.type, enabled=False):  # a margin is smaller than bf16's steps
            return F.linear(F.normalize(x.float(), dim=1), F.normalize(self.weight.float(), dim=1))


class ResidualTransform(nn.Module):
    """LCE's map from the new embedding space to the old one.

        y = x + norm2( W2 prelu( norm1( W1 x ) ) )

    W1 (D/2, D) and W2 (D, D/2) have no bias, which batch norm would take away again; prelu has a
    slope for each of the D/2 channels. In training a batch needs two rows or more, and every call
    moves the running statistics; main_SSP.py keeps class weights, which are no embeddings, out of
    them.

    Args:
        D: dimension of the embeddings, even.
    Raises:
        ValueError: if D is odd or not positive.
    Source: LCE's residual bottleneck transformation, as SSP's released code has it. Departures:
        batch norm's momentum is torch's 0.1; the released 0.9 gives the newest batch nine tenths
        of the running statistics, and has the value of frameworks in which it weighs the old ones.
    """

    def __init__(self, D: int) -> None:
        super().__init__()
        if D < 2 or D % 2:
            raise ValueError(f"the transform goes through D / 2 dimensions; D = {D} is not even")
        self.transform = nn.Sequential(
            nn.Linear(D, D // 2, bias=False),
            nn.BatchNorm1d(D // 2, eps=2e-5),
            nn.PReLU(D // 2),
            nn.Linear(D // 2, D, bias=False),
            nn.BatchNorm1d(D, eps=2e-5),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (N, D) -> (N, D) float32, not scaled to unit length."""
        with torch.autocast(x.device.type, enabled=False):
            return x + self.transform(x)
