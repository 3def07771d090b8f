"""What the retrieval networks share: a trunk, a head to D = M * d dimensions, a quantizer."""

import torch
from torch import Tensor, nn

from models.quantizer import Quantizer


class QuantizationNetwork(nn.Module):
    """images -> trunk -> head -> descriptors x -> codes.

    Args:
        trunk: maps images (N, 3, H, W) to features (N, trunk.feature_dim).
        head: maps features to (N, D).
        quantizer: over D = M * d dimensions.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, quantizer: Quantizer) -> None:
        super().__init__()
        self.trunk, self.head, self.quantizer = trunk, head, quantizer
        self.trunk_is_frozen = False

    def freeze_trunk(self) -> None:
        """From now on only head and quantizer learn; the trunk stays in evaluation mode."""
        self.trunk_is_frozen = True
        self.trunk.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "QuantizationNetwork":
        """Training or evaluation mode, of a frozen trunk always evaluation."""
        super().train(mode)
        if self.trunk_is_frozen:
            self.trunk.eval()
        return self

    def project(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> trunk -> head, (N, D) float32.

        What has two dimensions is taken for features (N, trunk.feature_dim) that the trunk gave
        before; with a frozen trunk they can be kept.
        """
        features = self.trunk(images) if images.dim() == 4 else images
        with torch.autocast(features.device.type, enabled=False):  # bf16 would round x to 8 bits
            return self.head(features.to(next(self.head.parameters()).dtype))

    def describe(self, images: Tensor) -> Tensor:
        """Images, or features as `project` takes them -> descriptors x (N, D), float32."""
        return self.project(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> integer codes (N, M), what a database stores."""
        return self.quantizer.encode(self.describe(images))
