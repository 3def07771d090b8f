"""ResNet-18 for 32x32 images, with a width that scales down to two CPU cores."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an identity (or projected) shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        # in place: on a CPU fresh memory costs about as much time as the arithmetic
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out.add_(self.shortcut(x)), inplace=True)


class CifarResNet(nn.Module):
    """ResNet with the CIFAR stem: a 3x3 stride-1 convolution and no max-pool.

    Four stages of `width * (1, 2, 4, 8)` channels; the first keeps the resolution, each later one
    halves it. Global average pooling gives `feature_dim = 8 * width` features.

    Args:
        blocks: basic blocks in each of the four stages; (2, 2, 2, 2) is ResNet-18.
        width: channels of the first stage. 64 is the published network; 16 has a sixteenth of its
            multiplications and suits a CPU.
    Source: SPQ, section 4.2; He et al. 2016, with the CIFAR stem. Departures: `width`.
    """

    def __init__(self, blocks: tuple[int, int, int, int], width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        stages, in_channels = [], width
        for i, n_blocks in enumerate(blocks):
            channels = width * 2**i
            for j in range(n_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stages.append(BasicBlock(in_channels, channels, stride))
                in_channels = channels
        self.stages = nn.Sequential(*stages)
        self.feature_dim = in_channels

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> features (N, feature_dim)."""
        out = self.stages(self.stem(images))  # (N, 8 * width, H / 8, W / 8)
        return torch.flatten(F.adaptive_avg_pool2d(out, 1), 1)


def resnet18(width: int = 64) -> CifarResNet:
    """ResNet-18 with the CIFAR stem."""
    return CifarResNet((2, 2, 2, 2), width)
