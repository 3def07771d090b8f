"""SimCLR's augmentation, by kornia, on the device that trains."""

import kornia.augmentation as K
import torch
from torch import Tensor, nn


class SimCLRAugment(nn.Module):
    """uint8 images -> one random float view of each.

    RandomResizedCrop(crop_size), RandomHorizontalFlip(0.5), ColorJitter(0.4, 0.4, 0.4, 0.1;
    p 0.8), RandomGrayscale(0.2), RandomGaussianBlur(3x3, sigma 0.1 to 2.0, p 0.5). Call it once
    for each view.
    Random numbers come from torch's global generator: seeded runs repeat.

    Args:
        crop_size: side of the square crops, pixels.
    Source: SPQ, section 4.2; Chen et al. 2020. Departures: none (32 px is the published size).
    """

    def __init__(self, crop_size: int = 32) -> None:
        super().__init__()
        self.transforms = nn.Sequential(
            # "resample" crops the whole batch in one warp; the default loops over images
            K.RandomResizedCrop((crop_size, crop_size), cropping_mode="resample"),
            K.RandomHorizontalFlip(p=0.5),
            K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=0.5),
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 -> views (B, 3, crop_size, crop_size) float32 in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return self.transforms(images.float() / 255.0)
