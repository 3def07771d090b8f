"""SPQ network: shapes, layers, gradients."""

import pytest
import torch

from losses import contrastive_loss, cqc_loss
from models import SPQ, build_quantizer, build_trunk


def small(kind="soft"):
    quantizer = build_quantizer(kind, 4, 8, 4)
    return SPQ(build_trunk("resnet18", 8), quantizer, hard=kind == "hard")


def test_published_network_has_the_published_layers():
    trunk = build_trunk("resnet18", 64)
    convolutions = [m for m in trunk.modules() if isinstance(m, torch.nn.Conv2d)]
    assert trunk.feature_dim == 512
    assert len([c for c in convolutions if c.kernel_size == (3, 3)]) == 17
    assert convolutions[0].stride == (1, 1)
    # weights of ResNet-18 with a 3x3 stem and no classifier, worked by hand:
    # 3 * 64 * 9 + 4 * 64^2 * 9 and per later stage c/2 * c * 9 + 3 * c^2 * 9 + c/2 * c
    want = 3 * 64 * 9 + 4 * 64 * 64 * 9
    for c in (128, 256, 512):
        want += c // 2 * c * 9 + 3 * c * c * 9 + c // 2 * c
    assert sum(c.weight.numel() for c in convolutions) == want


def test_stages_halve_the_resolution_three_times():
    trunk = build_trunk("resnet18", 8)
    out = trunk.stages(trunk.stem(torch.rand(2, 3, 32, 32)))
    assert out.shape == (2, 64, 4, 4)


def test_forward_gives_descriptors_and_their_quantization():
    model = small()
    x, z = model(torch.rand(6, 3, 32, 32))
    assert x.shape == z.shape == (6, 16)
    torch.testing.assert_close(z, model.quantizer.soft(x, model.alpha))


@pytest.mark.parametrize("kind", ["soft", "hard", "vq"])
@pytest.mark.parametrize("loss", [cqc_loss, contrastive_loss])
def test_every_parameter_gets_a_gradient(kind, loss):
    model = small(kind)
    x_a, z_a = model(torch.rand(8, 3, 32, 32))
    x_b, z_b = model(torch.rand(8, 3, 32, 32))
    loss(x_a, x_b, z_a, z_b, tau=0.5).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_unknown_trunk_is_named():
    with pytest.raises(ValueError, match=r"resnet19.*resnet18"):
        build_trunk("resnet19", 8)
