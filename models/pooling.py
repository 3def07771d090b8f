"""GeM: the generalised mean over the positions of a feature map."""

import math

import torch
from torch import Tensor, nn


class GeM(nn.Module):
    """Generalised-mean pooling.

        pooled[n, c] = ( mean over i, j of max(x[n, c, i, j], eps)^p )^(1 / p)

    p = 1 is the average, p -> infinity the maximum. Each channel is divided by its largest value
    before the power and multiplied by it afterwards, which changes nothing in the formula but keeps
    the power from running out of float32's range: 1e-6^p would at p = 8.

    Args:
        p: exponent, above 0.
        trainable: whether p is a parameter, and learns, or a buffer.
        eps: what smaller values are raised to; the power has no gradient at 0.
    Raises:
        ValueError: if p or eps is not above 0, or not finite.
    Source: Radenovic et al. 2019, equation 3; SSP pools with a fixed p = 3. Departures: the
        division by the largest value; p is a scalar, in cnnimageretrieval-pytorch of shape (1,).
    """

    def __init__(self, p: float = 3.0, trainable: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        for name, value in (("p", p), ("eps", eps)):
            if not 0 < value < math.inf:
                raise ValueError(f"GeM's {name} must be above 0 and finite, not {value}")
        exponent = torch.tensor(float(p))
        if trainable:
            self.p = nn.Parameter(exponent)
        else:
            self.register_buffer("p", exponent)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) -> (N, C), in float32 or what is finer, under autocast too.

        Raises:
            ValueError: if x has not four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"GeM pools maps (N, C, H, W), not {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round x^p to 8 bits
            x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=self.eps)
            # a constant: it cancels, so there is no gradient through it to lose
            largest = x.detach().amax(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
            mean = (x / largest).pow(self.p).mean(dim=(2, 3))  # (N, C), at least 1 / (H W)
            return largest.flatten(1) * mean.pow(1 / self.p)
