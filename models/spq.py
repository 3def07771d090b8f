"""SPQ: a trunk, a head to D = M * d dimensions, and a product quantizer."""

from torch import Tensor, nn

from models.network import QuantizationNetwork
from models.quantizer import ProductQuantizer


class SPQ(QuantizationNetwork):
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
        features, D = trunk.feature_dim, quantizer.M * quantizer.d
        head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, D))
        nn.init.xavier_uniform_(head[2].weight)
        super().__init__(trunk, head, quantizer)
        self.alpha, self.hard = alpha, hard

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images, as `describe` takes them -> descriptors x and quantized z, both (N, D)."""
        x = self.describe(images)
        quantize = self.quantizer.hard if self.hard else self.quantizer.soft
        return x, quantize(x, self.alpha)
