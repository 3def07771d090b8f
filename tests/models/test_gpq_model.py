"""GPQ network and its VGG: layers, normalisation, gradients, mini-max, precision, frozen trunk."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses import classification_loss, n_pair_pq_loss, subspace_entropy_loss
from models import GPQ, PrototypeQuantizer, build_gpq, build_trunk
from models.gpq import reverse_gradient
from models.quantizer import intra_normalize
from models.vgg import CifarVGG
from utils.search.index import codebooks_of
from utils.trained import Trained

M, K, d, C, WIDTH = 3, 8, 4, 5, 2
MEAN = torch.tensor([125.642, 123.738, 114.46]).view(1, 3, 1, 1) / 255
STD = torch.tensor([63.01, 62.157, 66.94]).view(1, 3, 1, 1) / 255


@pytest.fixture
def model():
    return build_gpq("cifar_vgg", WIDTH, M, K, d, C)


def images(n, side=8):
    return torch.rand(n, 3, side, side)


def full_loss(model, labelled, labels, unlabelled, strength=1.0, beta=4.0):
    """As main_GPQ.py adds it up, with its default weights."""
    x, z = model(labelled)
    x_u, _ = model(unlabelled, torch.full((len(unlabelled),), strength))
    prototypes = model.quantizer.unit_prototypes()
    return (
        n_pair_pq_loss(x, z, labels)
        + 0.1 * classification_loss(x, labels, prototypes, M, beta)
        + 0.1 * subspace_entropy_loss(x_u, prototypes, M, beta)
    )


# --- CifarVGG -------------------------------------------------------------------------------------


def test_published_network_has_the_published_layers():
    with torch.device("meta"):
        trunk = CifarVGG()
    channels = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512]
    assert [len(stage) for stage in trunk.stages] == [6, 6, 9, 9]
    layers = [layer for stage in trunk.stages for layer in stage]
    assert [type(layer) for layer in layers] == 10 * [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    before = 3
    for convolution, norm, out in zip(layers[::3], layers[1::3], channels, strict=True):
        assert convolution.weight.shape == (out, before, 3, 3)
        assert (convolution.stride, convolution.padding) == ((1, 1), (1, 1))
        assert convolution.bias is None
        assert norm.num_features == out
        before = out
    assert trunk.feature_dim == 768
    assert trunk(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 768)
    # nothing learns beside convolutions and batch norm
    weights = sum(a * b * 9 for a, b in zip([3, *channels[:-1]], channels, strict=True))
    assert sum(p.numel() for p in trunk.parameters()) == weights + 2 * sum(channels)


def test_three_pools_halve_the_resolution():
    with torch.device("meta"):
        trunk = CifarVGG()
    shapes = []
    for stage in trunk.stages:
        stage.register_forward_hook(lambda _, given, out: shapes.append(tuple(out.shape)))
    trunk(torch.empty(2, 3, 32, 32, device="meta"))
    assert shapes == [(2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8), (2, 512, 4, 4)]


def naive_batch_norm(maps, norm):
    mean, var = (v.view(1, -1, 1, 1) for v in (norm.running_mean, norm.running_var))
    weight, bias = (v.view(1, -1, 1, 1) for v in (norm.weight, norm.bias))
    return weight * (maps - mean) / (var + 1e-5).sqrt() + bias


def test_features_are_those_of_ten_convolutions_written_out():
    trunk = CifarVGG(WIDTH).double().eval()
    with torch.no_grad():
        for name, value in trunk.named_parameters():
            if value.dim() == 1:
                value.copy_(torch.rand_like(value) + 0.5 * name.endswith("weight"))
        for norm in (layer for layer in trunk.modules() if isinstance(layer, nn.BatchNorm2d)):
            norm.running_mean.copy_(torch.randn(norm.num_features))
            norm.running_var.copy_(torch.rand(norm.num_features) + 0.5)
    views = images(2, side=16).double()
    maps = (views - trunk.mean) / trunk.std
    for i, stage in enumerate(trunk.stages):
        for convolution, norm in zip(stage[::3], stage[1::3], strict=True):
            maps = F.conv2d(maps, convolution.weight, padding=1)
            maps = naive_batch_norm(maps, norm).clamp(min=0)
        if i < 3:
            side = maps.shape[-1] // 2
            maps = maps.reshape(2, -1, side, 2, side, 2).amax(dim=(3, 5))
        if i == 2:
            third = maps.mean(dim=(2, 3))
    want = torch.cat([maps.mean(dim=(2, 3)), third], dim=1)
    assert want.std(dim=1).min() > 0.1
    # float64, sums of up to 144 numbers in another order, ten layers deep
    torch.testing.assert_close(trunk(views), want, atol=1e-10, rtol=1e-10)


def test_an_image_of_the_mean_colour_is_zero_in_front_of_the_first_convolution():
    trunk, given = CifarVGG(WIDTH), []
    trunk.stages[0][0].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    for value in (0.0, 1.0, -1.5):
        trunk((MEAN + value * STD).expand(2, 3, 8, 8))
        want = torch.full((2, 3, 8, 8), value)
        # float32: a rounding of the mean's 0.5, divided by a deviation of 0.25
        torch.testing.assert_close(given.pop(), want, atol=1e-6, rtol=0)


def test_the_normalisation_moves_with_the_network_and_does_not_learn():
    trunk = CifarVGG(WIDTH)
    assert {"mean", "std"} <= set(trunk.state_dict())
    assert not {"mean", "std"} & {name for name, _ in trunk.named_parameters()}


@pytest.mark.parametrize("width", [1, 6])
def test_width_scales_all_channels(width):
    trunk = build_trunk("cifar_vgg", width)
    out = [layer.out_channels for layer in trunk.modules() if isinstance(layer, nn.Conv2d)]
    assert out == [width * i for i in (1, 1, 2, 2, 4, 4, 4, 8, 8, 8)]
    assert trunk(images(2)).shape == (2, 12 * width)
    assert trunk.feature_dim == 12 * width


def test_initial_convolutions_are_xavier_uniform():
    for layer in CifarVGG(8).modules():
        if isinstance(layer, nn.Conv2d):
            bound = (6 / (9 * (layer.in_channels + layer.out_channels))) ** 0.5
            # of 216 uniform numbers or more the largest is within 5% of the bound, odds of 1e-5
            assert 0.95 * bound < layer.weight.abs().max() <= bound


# --- the network ----------------------------------------------------------------------------------


def test_forward_gives_intra_normalised_descriptors_and_their_quantization(model):
    model.eval()
    views = images(6)
    x, z = model(views)
    features = model.trunk(views)
    projected = features @ model.head.weight.T + model.head.bias
    # float32, sums of 24 features
    torch.testing.assert_close(x, intra_normalize(projected, M), atol=1e-5, rtol=0)
    assert torch.equal(z, model.quantizer.soft(x))
    assert torch.equal(model.describe(views), x)
    assert torch.equal(model.encode(views), model.quantizer.encode(x))
    for a, b in zip(model(features), (x, z), strict=True):
        assert torch.equal(a, b)


def test_a_search_gets_the_table_that_the_network_trains_with(model):
    with torch.no_grad():
        model.quantizer.prototypes.normal_()
    table = codebooks_of(Trained(model, "GPQ", {}, ""))
    assert torch.equal(torch.from_numpy(table), model.quantizer.codebooks)
    x = model.describe(images(20))
    codes = model.quantizer.encode(x)
    sim = torch.einsum("nmd,mkd->nmk", x.reshape(-1, M, d), torch.from_numpy(table))
    assert torch.equal(codes, sim.argmax(dim=-1))


def test_the_network_is_built_as_it_is_asked_for():
    model = build_gpq("cifar_vgg", 4, M=12, K=16, d=12, classes=10, alpha=7.0)
    assert model.head.weight.shape == (144, 48)
    assert torch.equal(model.head.bias, torch.zeros(144))
    bound = (6 / (144 + 48)) ** 0.5  # Xavier's
    # of 6,912 uniform numbers the largest is within 1% of the bound but for odds of 1e-30
    assert 0.99 * bound < model.head.weight.abs().max() <= bound
    assert model.quantizer.words.shape == (12, 16, 12)
    assert model.quantizer.prototypes.shape == (10, 144)
    assert model.quantizer.alpha == 7.0
    with pytest.raises(ValueError, match="classes and alpha must be positive"):
        build_gpq("cifar_vgg", 4, 12, 16, 12, classes=0)


MULTI = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 0]] * 2)


@pytest.mark.parametrize("labels", [torch.arange(8) % C, MULTI], ids=["single", "multi"])
def test_every_parameter_gets_a_gradient_and_moves(model, labels):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = full_loss(model, images(8), labels, images(8))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    names = {name.partition(".")[0] for name in before}
    assert names == {"trunk", "head", "quantizer"}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("part", ["n_pair", "classification", "entropy"])
def test_each_loss_reaches_trunk_head_and_prototypes(model, part):
    x, z = model(images(8), None if part != "entropy" else torch.ones(8))
    prototypes, labels = model.quantizer.unit_prototypes(), torch.arange(8) % C
    loss = {
        "n_pair": lambda: n_pair_pq_loss(x, z, labels),
        "classification": lambda: classification_loss(x, labels, prototypes, M),
        "entropy": lambda: subspace_entropy_loss(x, prototypes, M),
    }[part]()
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    # words are only in codebooks, and so in z
    missing = set() if part == "n_pair" else {"quantizer.words"}
    assert reached == {name for name, _ in model.named_parameters()} - missing


def test_quantized_descriptors_pass_gradients_to_words_prototypes_and_descriptors(model):
    features, weights = torch.rand(6, model.trunk.feature_dim), torch.randn(6, M * d)
    learned = [model.head.weight, model.quantizer.words, model.quantizer.prototypes]
    got = torch.autograd.grad((model(features)[1] * weights).sum(), learned)
    want = torch.autograd.grad(
        (model.quantizer.soft(model.describe(features)) * weights).sum(), learned
    )
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        assert torch.equal(a, b)


def test_training_lowers_the_loss(model):
    labels, labelled, unlabelled = torch.arange(8) % C, images(8), images(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = full_loss(model, labelled, labels, unlabelled)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# --- gradient reversal ----------------------------------------------------------------------------


def entropy_of(model, features):
    """Mean entropy of the class probabilities, in nats."""
    with torch.no_grad():
        x = model.describe(features).reshape(-1, M, d)
        p = model.quantizer.unit_prototypes().reshape(-1, M, d)
        logits = 16 * torch.stack([x[:, m] @ p[:, m].T for m in range(M)]).mean(dim=0)
        return torch.distributions.Categorical(logits=logits).entropy().mean().item()


def change_of_entropy(model, features, moved, strength):
    """By one small step of gradient descent on some tensors alone."""
    reversal = None if strength is None else torch.full((len(features),), strength)
    x = model.describe(features, reversal)
    loss = subspace_entropy_loss(x, model.quantizer.unit_prototypes(), M)
    before = entropy_of(model, features)
    with torch.no_grad():
        for tensor, gradient in zip(moved, torch.autograd.grad(loss, moved), strict=True):
            assert gradient.isfinite().all()
            tensor -= 1e-3 * gradient
    return entropy_of(model, features) - before


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_descent_on_prototypes_raises_the_entropy_and_on_the_network_lowers_it(seed):
    torch.manual_seed(seed)
    model = build_gpq("cifar_vgg", WIDTH, M, K, d, C).double()
    features = torch.rand(30, model.trunk.feature_dim, dtype=torch.float64, requires_grad=True)
    prototypes, head = [model.quantizer.prototypes], list(model.head.parameters())
    for _ in range(2):
        assert change_of_entropy(model, features, prototypes, 1.0) > 0
        assert change_of_entropy(model, features, head, 1.0) < 0
        assert change_of_entropy(model, features, [features], 1.0) < 0
        # without a reversal all raise it, and at strength 0 the network stands still
        assert change_of_entropy(model, features, head, None) > 0
        assert change_of_entropy(model, features, [features], None) > 0
        assert change_of_entropy(model, features, prototypes, 0.0) > 0
        assert change_of_entropy(model, features, [*head, features], 0.0) == 0


def test_descent_on_the_trunk_lowers_the_entropy():
    model = build_gpq("cifar_vgg", WIDTH, M, K, d, C).double().eval()
    views, weights = images(8).double(), list(model.trunk.parameters())
    assert change_of_entropy(model, views, weights, 1.0) < 0
    assert change_of_entropy(model, views, weights, None) > 0


def test_reversal_turns_each_row_s_gradient_by_its_own_strength():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 6, dtype=torch.float64)
    strength = torch.tensor([1.0, 0.0, 2.0, 0.25])
    y = reverse_gradient(x, strength)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.equal(gradient, -strength.double()[:, None] * weights)


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_reversal_scales_the_network_s_gradient_and_leaves_the_prototypes_alone(model, strength):
    model = model.double().eval()
    views = images(4).double()
    network = [*model.trunk.parameters(), *model.head.parameters()]
    found = []
    for reversal in (None, torch.full((4,), strength)):
        x, z = model(views, reversal)
        prototypes = model.quantizer.unit_prototypes()
        loss = subspace_entropy_loss(x, prototypes, M) + (x * z).sum()
        gradients = torch.autograd.grad(loss, [*network, *model.quantizer.parameters()])
        found.append((x, z, gradients))
    (x, z, plain), (x_reversed, z_reversed, turned) = found
    assert torch.equal(x, x_reversed)
    assert torch.equal(z, z_reversed)
    for i, (a, b) in enumerate(zip(plain, turned, strict=True)):
        assert a.abs().max() > 0
        factor = -strength if i < len(network) else 1.0
        torch.testing.assert_close(b, factor * a, rtol=1e-9, atol=1e-12)  # float64


def test_reversal_of_another_shape_is_named(model):
    for x, strength in (
        (torch.zeros(4, 6), torch.ones(3)),
        (torch.zeros(4, 6), torch.ones(4, 1)),
        (torch.zeros(4, 6), torch.tensor(1.0)),
        (torch.zeros(4), torch.ones(4)),
    ):
        with pytest.raises(ValueError, match=r"x must be \(N, D\) and strength \(N,\); got"):
            reverse_gradient(x, strength)
    with pytest.raises(ValueError, match="strength"):
        model(images(4), torch.ones(3))


# --- precision, frozen trunk ----------------------------------------------------------------------


def test_descriptors_and_losses_are_float32_under_autocast(model):
    features = torch.rand(8, model.trunk.feature_dim)
    labels, reversal = torch.arange(8) % C, torch.ones(8)

    def run(features):
        x, z = model(features)
        x_u, _ = model(features.flip(0), reversal)
        prototypes = model.quantizer.unit_prototypes()
        losses = (
            n_pair_pq_loss(x, z, labels),
            classification_loss(x, labels, prototypes, M),
            subspace_entropy_loss(x_u, prototypes, M),
        )
        return x, z, x_u, *losses

    for given in (features, features.bfloat16()):  # the latter is what a trunk gives there
        with torch.autocast("cpu", torch.bfloat16):
            got = run(given)
        want = run(given.float())
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)
        gradients = [
            torch.autograd.grad(sum(outputs[3:]), [*model.head.parameters()])
            for outputs in (got, want)
        ]
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)


def test_the_trunk_does_compute_in_bf16_under_autocast(model):
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        features = model.trunk(images(2))
        x, z = model(images(2))
    assert features.dtype == torch.bfloat16
    assert x.dtype == z.dtype == torch.float32


def test_a_frozen_trunk_stays_in_evaluation_mode_while_the_rest_learns(model):
    model.train().freeze_trunk()
    assert not model.trunk.training  # from here on, not from the next `train`
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # a careless optimizer: of all parameters, and with weight decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for mode in (True, False, True):
        model.train(mode)
        assert not any(module.training for module in model.trunk.modules())
        assert model.training == model.head.training == model.quantizer.training == mode
        optimizer.zero_grad()
        full_loss(model, images(8), torch.arange(8) % C, images(8)).backward()
        optimizer.step()
    assert all(p.grad is None for p in model.trunk.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("trunk."), name


def test_a_trunk_that_learns_follows_the_mode(model):
    before = {name: value.clone() for name, value in model.trunk.named_buffers()}
    assert model.train().trunk.training
    model(images(4))
    moved = [n for n, v in model.trunk.named_buffers() if not torch.equal(v, before[n])]
    assert len(moved) == 30  # mean, variance and count of ten batch norms
    assert not model.eval().trunk.training


def test_any_trunk_with_a_feature_dimension_will_do():
    model = GPQ(build_trunk("resnet18", 4), PrototypeQuantizer(M, K, d, C))
    x, z = model(images(2))
    assert x.shape == z.shape == (2, M * d)
