"""Embeddings of one image at several sizes, averaged."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (1.0, 2**0.5, 2**-0.5)


@torch.no_grad()
def multiscale_features(
    network: nn.Module, image: Tensor, scales: Sequence[float] = SCALES
) -> Tensor:
    """The mean of an image's unit embeddings at several sizes, scaled to unit length.

        x = l2( 1/S sum_s describe( resize(image, s) ) )

    Sizes are rounded to whole pixels, at least 1; resizing is bilinear and antialiased, scale 1
    leaves the image as it is.

    Args:
        network: in evaluation mode; its `describe` maps images (1, 3, H, W) in [0, 1] of any size
            to embeddings (1, D) of unit length.
        image: (3, H, W), floating point in [0, 1], on the network's device.
        scales: S factors.
    Returns:
        (D,) float32, without gradient.
    Raises:
        ValueError: if the image is not such a one, or there is no scale, or one is not positive.
    Source: SSP, section IV; its released code. Departures: that does not antialias, which aliases
        at scales below 1; and it rounds sizes down. In cnnimageretrieval-pytorch networks without
        whitening take a generalised mean with GeM's p instead; with whitening it is this one.
    """
    if image.dim() != 3 or len(image) != 3 or not image.numel() or not image.is_floating_point():
        raise ValueError(
            f"image must be (3, H, W) of floating point, not {tuple(image.shape)} of {image.dtype}"
        )
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"scales must be finite numbers above 0, not {tuple(scales)}")
    height, width = image.shape[1:]
    total: Tensor | float = 0.0
    for scale in scales:
        size = max(1, round(height * scale)), max(1, round(width * scale))
        scaled = image[None]  # (1, 3, H, W)
        if size != (height, width):
            scaled = F.interpolate(scaled, size, mode="bilinear", antialias=True)
        total = total + network.describe(scaled)[0].float()  # (D,)
    return F.normalize(total / len(scales), dim=0)
