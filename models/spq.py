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
        self.trunk_is_frozen = False

    def freeze_trunk(self) -> None:
        """From now on only head and codebooks learn; the trunk stays in evaluation mode."""
        self.trunk_is_frozen = True
        self.trunk.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "SPQ":
        """Training or evaluation mode, of a frozen trunk always evaluation."""
        super().train(mode)
        if self.trunk_is_frozen:
            self.trunk.eval()
        return self

    def describe(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> descriptors x (N, D), float32.

        What has two dimensions is taken for features (N, trunk.feature_dim) that the trunk gave
        before; with a frozen trunk they can be kept.
        """
        features = self.trunk(images) if images.dim() == 4 else images
        with torch.autocast(features.device.type, enabled=False):  # bf16 would round x to 8 bits
            return self.head(features.to(self.quantizer.codebooks.dtype))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images, as `describe` takes them -> descriptors x and quantized z, both (N, D)."""
        x = self.describe(images)
        quantize = self.quantizer.hard if self.hard else self.quantizer.soft
        return x, quantize(x, self.alpha)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> integer codes (N, M), what a database stores."""
        return self.quantizer.encode(self.describe(images))
