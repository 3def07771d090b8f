"""SPQ network: shapes, layers, gradients."""

import pytest
import torch

from losses import contrastive_loss, cqc_loss
from models import SPQ, build_quantizer, build_spq, build_trunk


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


def frozen(arch, width):
    model = build_spq(arch, width, "soft", M=4, K=8, d=4, input_size=32)
    model.freeze_trunk()
    return model


NETWORKS = [("resnet18", 8), ("test_efficientnet", 64), ("test_vit", 64)]


@pytest.mark.parametrize(("arch", "width"), NETWORKS)
def test_a_frozen_trunk_stays_as_it_was_while_head_and_codebooks_learn(arch, width):
    model = frozen(arch, width)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # a careless optimizer: of all parameters, and with weight decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        x_a, z_a = model(torch.rand(8, 3, 32, 32))
        x_b, z_b = model(torch.rand(8, 3, 32, 32))
        cqc_loss(x_a, x_b, z_a, z_b, tau=0.5).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("trunk."), name
    assert all(p.grad is None for p in model.trunk.parameters())


def test_a_trunk_that_learns_does_move():
    model = build_spq("test_efficientnet", 64, "soft", M=4, K=8, d=4, input_size=32)
    assert model.train().trunk.training
    before = {name: value.clone() for name, value in model.trunk.named_buffers()}
    model(torch.rand(8, 3, 32, 32))
    moved = [n for n, v in model.trunk.named_buffers() if not torch.equal(v, before[n])]
    assert "net.bn1.running_mean" in moved


def test_a_frozen_trunk_is_always_in_evaluation_mode():
    model = small().train()
    model.freeze_trunk()  # from here on, not from the next `train`
    for mode in (True, False, True):
        assert not any(module.training for module in model.trunk.modules())
        assert model.training == model.head.training == model.quantizer.training
        assert model.train(mode) is model
        assert model.training == model.head.training == mode
    assert not any(p.requires_grad for p in model.trunk.parameters())
    assert all(p.requires_grad for p in [*model.head.parameters(), model.quantizer.codebooks])


@pytest.mark.parametrize(("arch", "width"), NETWORKS)
def test_features_are_described_as_their_images(arch, width):
    model = frozen(arch, width)
    images = torch.rand(4, 3, 32, 32)
    features = model.trunk(images)
    assert features.shape == (4, model.trunk.feature_dim)
    assert torch.equal(model.describe(features), model.describe(images))
    assert torch.equal(model.encode(features), model.encode(images))
    for a, b in zip(model(features), model(images), strict=True):
        assert torch.equal(a, b)
    # as they are kept: 11 bits
    half = model.describe(features.half())
    assert half.dtype == torch.float32
    scale = model.describe(images).abs().max().item()
    torch.testing.assert_close(half, model.describe(images), rtol=0, atol=0.01 * scale)
