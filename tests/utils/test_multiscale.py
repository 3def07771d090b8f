"""Embeddings at several sizes: the mean of unit vectors, of unit length."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.multiscale import SCALES, multiscale_features


class Spy(nn.Module):
    """Unit vectors that depend on the image's size and content; notes what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.seen = []

    def describe(self, images):
        self.seen.append(images)
        turned = torch.cos(torch.arange(5) * images.shape[-1])
        return F.normalize(images.mean(dim=(2, 3)) @ self.weight.T * turned, dim=1)


def test_it_is_the_mean_over_the_scales():
    network, image = Spy(), torch.rand(3, 20, 31)
    found = multiscale_features(network, image)
    assert pytest.approx((1, math.sqrt(2), 1 / math.sqrt(2))) == SCALES
    assert [tuple(x.shape) for x in network.seen] == [
        (1, 3, 20, 31),
        (1, 3, 28, 44),  # 28.28, 43.84
        (1, 3, 14, 22),  # 14.14, 21.92
    ]
    assert torch.equal(network.seen[0][0], image)
    each = [network.describe(x)[0] for x in list(network.seen)]
    mean = sum(each) / 3
    assert mean.norm() < 0.99  # the embeddings differ, or their mean would say nothing
    torch.testing.assert_close(found, mean / mean.norm())
    assert found.shape == (5,) and found.dtype == torch.float32 and not found.requires_grad


def test_resizing_is_bilinear_and_antialiased():
    network, image = Spy(), torch.rand(3, 24, 24)
    multiscale_features(network, image, (0.5, 2))
    small, large = network.seen
    # bilinear to a half, antialiased: a tent of 4 pixels, (1 3 3 1) / 8
    tent = torch.tensor([1.0, 3, 3, 1]) / 8
    inner = F.conv2d(image[:, None], torch.outer(tent, tent)[None, None], stride=2, padding=1)
    torch.testing.assert_close(small[0, :, 1:-1, 1:-1], inner[:, 0, 1:-1, 1:-1])
    torch.testing.assert_close(
        large, F.interpolate(image[None], (48, 48), mode="bilinear", align_corners=False)
    )


def test_one_scale_is_the_network_alone():
    network, image = Spy(), torch.rand(3, 9, 7)
    x = network.describe(image[None])[0]
    torch.testing.assert_close(multiscale_features(network, image, (1,)), x)
    tiny = multiscale_features(network, image, [1e-3])  # a pixel is left
    assert network.seen[-1].shape == (1, 3, 1, 1) and tiny.isfinite().all()


@pytest.mark.parametrize(
    ("image", "scales", "message"),
    [
        (torch.rand(1, 3, 4, 4), SCALES, r"image must be \(3, H, W\) .* not \(1, 3, 4, 4\)"),
        (torch.rand(4, 4, 3), SCALES, r"not \(4, 4, 3\)"),
        (torch.rand(3, 0, 4), SCALES, r"not \(3, 0, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), SCALES, "floating point, not .* torch.uint8"),
        (torch.rand(3, 4, 4), (), r"scales must be finite numbers above 0, not \(\)"),
        (torch.rand(3, 4, 4), (1, 0), r"not \(1, 0\)"),
        (torch.rand(3, 4, 4), (-1,), r"not \(-1,\)"),
        (torch.rand(3, 4, 4), (math.inf,), r"not \(inf,\)"),
        (torch.rand(3, 4, 4), (math.nan,), r"not \(nan,\)"),
    ],
)
def test_what_it_does_not_take(image, scales, message):
    with pytest.raises(ValueError, match=message):
        multiscale_features(Spy(), image, scales)
