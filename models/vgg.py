"""GPQ's VGG-like network for 32x32 images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of GPQ's labelled images, in units of 1/255
MEAN, STD = (125.642, 123.738, 114.46), (63.01, 62.157, 66.94)


class CifarVGG(nn.Module):
    """Ten 3x3 convolutions with batch norm and ReLU, and two pooled branches.

    Four stages of 2, 2, 3 and 3 convolutions with `width * (1, 2, 4, 8)` channels, a 2x2 max-pool
    after each of the first three. Features are the averages of the last map and of what comes out
    of the third pool, side by side: `feature_dim = (8 + 4) * width`. Inputs are normalised by the
    mean and deviation of CIFAR-10's images.

    Args:
        width: channels of the first stage; 64 is the published network.
    Source: GPQ, section 4.1 and its released network. Departures: `width`; convolutions have no
        bias, which batch norm would take away again; batch norm's epsilon is torch's.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, (torch.tensor(values) / 255.0).view(1, 3, 1, 1))
        self.stages = nn.ModuleList()
        in_channels = 3
        for i, n_convolutions in enumerate((2, 2, 3, 3)):
            channels = width * 2**i
            layers: list[nn.Module] = []
            for _ in range(n_convolutions):
                convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
                nn.init.xavier_uniform_(convolution.weight)
                layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
                in_channels = channels
            self.stages.append(nn.Sequential(*layers))
        self.feature_dim = (8 + 4) * width

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> features (N, feature_dim)."""
        *first, last = self.stages
        out = (images - self.mean) / self.std
        for stage in first:
            out = F.max_pool2d(stage(out), 2)
        maps = last(out), out  # (N, 8 width, H / 8, W / 8), (N, 4 width, H / 8, W / 8)
        return torch.cat([F.adaptive_avg_pool2d(m, 1).flatten(1) for m in maps], dim=1)
