"""SPQ: a trunk, a head to D = M * d dimensions, and a product quantizer."""

import torch
from torch import Tensor, nn

from models.quantizer import ProductQuantizer


class SPQ(nn.Module):
    """Self-supervised Product Quantization network.

    images -> trunk -> linear, ReLU, linear -> descriptors x -> quantizer -> z.

    Args:
        trunk: maps images (N, 3, H, W) to features (N, trunk.feature_dim).
        quantizer: product (or single) quantizer over D = M * d dimensions.
        alpha: sharpness of the soft assignment (`--soft_quantization_scale`).
        hard: quantize hard with a straight-through gradient (ablation SPQ-H).
    Source: SPQ, section 3.1. Descriptors are not intra-normalised, as the paper says.
    """

    def __init__(
        self, trunk: nn.Module, quantizer: ProductQuantizer, alpha: float = 5.0, hard: bool = False
    ) -> None:
        super().__init__()
        self.trunk = trunk
        features, D = trunk.feature_dim, quantizer.M * quantizer.d
        self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, D))
        nn.init.xavier_uniform_(self.head[2].weight)
        self.quantizer = quantizer
        self.alpha, self.hard = alpha, hard

    def describe(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> descriptors x (N, D), float32."""
        features = self.trunk(images)
        with torch.autocast(features.device.type, enabled=False):  # bf16 would round x to 8 bits
            return self.head(features.to(self.quantizer.codebooks.dtype))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [0, 1] -> descriptors x and quantized z, both (N, D)."""
        x = self.describe(images)
        quantize = self.quantizer.hard if self.hard else self.quantizer.soft
        return x, quantize(x, self.alpha)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> integer codes (N, M), what a database stores."""
        return self.quantizer.encode(self.describe(images))
