"""GPQ: a trunk, a linear head, and a quantizer whose codebooks are built from class prototypes."""

import torch
from torch import Tensor, nn

from models.network import QuantizationNetwork
from models.quantizer import PrototypeQuantizer, intra_normalize


class GPQ(QuantizationNetwork):
    """Generalized Product Quantization network.

    images -> trunk -> linear -> intra-normalised descriptors x -> quantizer -> z.

    Args:
        trunk: maps images (N, 3, H, W) to features (N, trunk.feature_dim).
        quantizer: codebooks and class prototypes over D = M * d dimensions.
    Source: GPQ, section 3.1. Departures: none; what the released code does otherwise is said at
        `models.quantizer.PrototypeQuantizer`.
    """

    quantizer: PrototypeQuantizer

    def __init__(self, trunk: nn.Module, quantizer: PrototypeQuantizer) -> None:
        head = nn.Linear(trunk.feature_dim, quantizer.M * quantizer.d)
        nn.init.xavier_uniform_(head.weight)
        nn.init.zeros_(head.bias)
        super().__init__(trunk, head, quantizer)

    def describe(self, images: Tensor, reversal: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> intra-normalised descriptors x (N, D), float32.

        Args:
            images: or features (N, trunk.feature_dim), as `project` takes them.
            reversal: (N,) strengths of a gradient reversal in front of the intra-normalisation:
                the unlabelled images' side of the mini-max; None: no reversal.
        """
        x = self.project(images)
        if reversal is not None:
            x = reverse_gradient(x, reversal)
        return intra_normalize(x, self.quantizer.M)

    def forward(self, images: Tensor, reversal: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Arguments of `describe` -> descriptors x and soft-quantized z, both (N, D)."""
        x = self.describe(images, reversal)
        return x, self.quantizer.soft(x)


class _Reversal(torch.autograd.Function):
    """The identity; backward: -strength * gradient, row by row."""

    @staticmethod
    def forward(ctx, x: Tensor, strength: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(strength)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        (strength,) = ctx.saved_tensors
        return -strength[:, None] * grad, None


def reverse_gradient(x: Tensor, strength: Tensor) -> Tensor:
    """Gradient reversal: x itself, whose gradient is turned round.

        y[n] = x[n],   dL/dx[n] = -strength[n] * dL/dy[n]

    What lies in front of it ascends the loss that what lies behind it descends.

    Args:
        x: (N, D).
        strength: (N,), 1 turns the gradient round at full size, 0 stops it.
    Returns:
        (N, D).
    Raises:
        ValueError: if there is not a strength for each row.
    Source: Ganin & Lempitsky 2015; GPQ, section 3.4 (strength 1). Departures: none.
    """
    if x.dim() != 2 or strength.shape != x.shape[:1]:
        raise ValueError(f"x must be (N, D) and strength (N,); got {x.shape}, {strength.shape}")
    return _Reversal.apply(x, strength.to(x.dtype))
