"""Embedding networks: unit length, gradients, published weights, costs; class weights."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import build_gpq, build_spq
from models.classifier import CosineClassifier, ResidualTransform
from models.embedding import (
    KINDS,
    EmbeddingNetwork,
    MapTrunk,
    OwnGallery,
    build_embedding,
    count_costs,
    load_published,
)
from models.pooling import GeM
from models.trunks import TimmTrunk, build_trunk, load_weights

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY = "test_efficientnet"  # 256 channels, a thirty-second of the resolution
ARCHS = {"delg": TINY, "gem": TINY, "query": TINY, "small": "resnet18"}


def small(kind, **changes):
    width = {"width": 8} if kind == "small" else {}
    arguments = {"D": 24, "channels": 40, "trainable_p": True, **width, **changes}
    return build_embedding(kind, ARCHS[kind], **arguments)


def scramble(net):
    """Weights and statistics that are all different, none of them 0 or 1; biases are small, so that
    what comes out depends on the image."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name in ("trunk.mean", "trunk.std") or not value.is_floating_point():
                continue
            if value.dim() > 1:
                scale = (2 / value[0].numel()) ** 0.5
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
            elif name.endswith(("bias", "running_mean")):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            else:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return net


# --- what they compute --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (48, 97), (32, 32)])
def test_embeddings_have_unit_length(kind, shape):
    network = small(kind).eval()
    images = torch.rand(3, 3, *shape)
    with torch.no_grad():
        x = network(images)
        assert torch.equal(x, network.describe(images))
    assert x.shape == (3, 24) == (3, network.embedding_dim)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.norm(dim=1), torch.ones(3))
    assert not torch.allclose(x[0], x[1], rtol=0, atol=1e-6)


def by_hand(network, images):
    """The network from its parts, as the method's page writes it."""

    def unit(x):
        return x / x.square().sum(dim=1, keepdim=True).sqrt()

    trunk, whiten = network.trunk, network.whiten
    x = trunk.net.forward_features((images - trunk.mean) / trunk.std)
    if network.expand is not None:
        x = torch.einsum("nchw, oc -> nohw", x, network.expand.weight[:, :, 0, 0]).clamp(min=0)
    p = float(network.pool.p)
    x = unit(x.clamp(min=1e-6).pow(p).mean(dim=(2, 3)).pow(1 / p))
    return unit(x @ whiten.weight.T + whiten.bias)


@pytest.mark.parametrize("kind", ["delg", "gem", "query"])
def test_map_networks_compute_as_written_out(kind):
    network = scramble(small(kind, p=2.5)).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        # float32, sums in another order
        torch.testing.assert_close(network(images), by_hand(network, images), rtol=1e-4, atol=1e-5)


def test_another_pooling_sees_no_negative_values():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = EmbeddingNetwork(Tiny(), 5, pool, channels=10).eval()  # GeM would raise them anyway
    images = torch.rand(2, 3, 9, 12)
    with torch.no_grad():
        maps = network.expand(network.trunk(images))
        assert maps.min() < 0
        x = network.whiten(F.normalize(maps.clamp(min=0).mean(dim=(2, 3)), dim=1))
        torch.testing.assert_close(network(images), F.normalize(x, dim=1))


def test_small_networks_are_trunk_and_linear_layer():
    network = scramble(small("small")).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        x = network.trunk(images) @ network.whiten.weight.T + network.whiten.bias
        want = x / x.square().sum(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(network(images), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    network = small(kind)
    target = F.normalize(torch.randn(6, 24), dim=1)
    (network(torch.rand(6, 3, 64, 64)) - target).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_whether_p_learns():
    learns = {kind: isinstance(small(kind).pool.p, nn.Parameter) for kind in KINDS[:3]}
    assert learns == {"delg": False, "gem": True, "query": True}
    assert not isinstance(small("query", trainable_p=False).pool.p, nn.Parameter)
    assert float(small("delg").pool.p) == 3.0
    assert small("gem", p=2.25).pool.p.item() == 2.25
    assert small("small").pool is None


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_is_close(kind):
    network = small(kind).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        want = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            found, x = network(images), network.trunk(images)
            if network.expand is not None:
                x = network.expand(x).relu()
        if network.pool is not None:
            x = F.normalize(network.pool(x), dim=1)
        exact = F.normalize(network.whiten(x.float()), dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)  # only the convolutions are coarse
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert (found * want).sum(dim=1).min() > 0.995  # bf16 has 8 bits, over some 20 layers


# --- trunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [TINY, "mobilenetv3_small_050", "convnext_atto", "resnet10t"])
def test_a_map_trunk_holds_only_what_its_map_needs(arch):
    trunk = MapTrunk(arch)
    assert trunk.training
    out = trunk.eval()(torch.rand(1, 3, 64, 96))
    assert out.shape[:2] == (1, trunk.feature_dim)
    assert out.shape[2] * 3 == out.shape[3] * 2
    grads = torch.autograd.grad(out.sum(), list(trunk.parameters()), allow_unused=True)
    assert all(grad is not None for grad in grads)
    for name, value in trunk.named_buffers():
        assert not name.endswith("running_mean") or value.abs().max() == 0, name


def test_the_map_s_average_is_what_the_classifier_would_see():
    whole = build_trunk(TINY, input_size=64).eval()
    trunk = MapTrunk(TINY).eval()
    trunk.load_state_dict(scramble(whole).state_dict())
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(trunk(images).mean(dim=(2, 3)), whole(images))


def test_what_is_taken_away_stays_with_timm():
    MapTrunk("convnext_atto")
    network = timm.create_model("convnext_atto", num_classes=0)
    assert network.pretrained_cfg["classifier"] == "head.fc"
    assert "head.norm.weight" in network.state_dict()


@pytest.mark.parametrize("arch", [TINY, "mobilenetv3_small_050"])
def test_timm_s_weights_load_into_a_map_trunk(arch):
    weights = scramble(timm.create_model(arch)).state_dict()
    trunk = MapTrunk(arch)
    assert isinstance(trunk, TimmTrunk)
    assert load_weights(trunk, weights) == []
    for name, value in trunk.net.state_dict().items():
        assert torch.equal(value, weights[name]), name
    incomplete = {n: v for n, v in weights.items() if not n.startswith("blocks.1")}
    with pytest.raises(ValueError, match=r"blocks\.1\..* is missing"):
        load_weights(trunk, incomplete)


def test_the_meta_device_gives_the_same_network():
    with torch.device("meta"):
        empty = build_embedding("query", "mobilenetv3_small_050", D=8, channels=12)
    full = build_embedding("query", "mobilenetv3_small_050", D=8, channels=12)
    shapes = [{n: v.shape for n, v in net.state_dict().items()} for net in (empty, full)]
    assert shapes[0] == shapes[1]


# --- names --------------------------------------------------------------------------------------


def test_published_networks_by_their_names():
    with torch.device("meta"):
        delg = build_embedding("delg", "resnet101")
        gem = build_embedding("gem", "resnet101")
        query = build_embedding("query", "mobilenetv2_100")
    resnet = 42_500_160  # torchvision's 44,549,160 without the classifier's 2,049,000
    head = 2048 * 2048 + 2048
    assert sum(p.numel() for p in delg.parameters()) == resnet + head
    assert sum(p.numel() for p in gem.parameters()) == resnet + head + 1
    assert sum(p.numel() for p in query.parameters()) == 2_223_872 + 1280 * 2048 + head
    assert {n.embedding_dim for n in (delg, gem, query)} == {2048}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dleg", TINY), r"^unknown kind 'dleg'; similar is delg; known: delg, gem, query, small$"),
        (("xyz", TINY), r"^unknown kind 'xyz'; known: delg, gem, query, small$"),
        (("delg", "resnet1011"), r"unknown arch 'resnet1011'; similar are .*resnet101"),
        (("small", "resnet19"), r"unknown arch 'resnet19'; similar are .*resnet1"),
        (("query", "cifar_vgg"), r"^cifar_vgg is not timm's; allowed are its convolutional"),
        (("query", "test_vit"), r"^test_vit takes images of one size; convolutional"),
        (("delg", TINY, 16), r"^width 16: only the kind small has one$"),
        (("small", "resnet18", 0), r"^width must be above 0, not 0$"),
        (("delg", TINY, 64, 0), r"^D must be above 0, not 0$"),
        (("delg", TINY, 64, 8, -1.0), r"^GeM's p must be above 0 and finite, not -1\.0$"),
        (("query", TINY, 64, 8, 3.0, False, 0), r"^channels must be above 0, not 0$"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_embedding(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x.permute(0, 2, 3, 1),
            r"gives \(1, 4, 4, 256\) for an image, no map \(1, 256, H, W",
        ),
        (lambda x: x.flatten(2), r"gives \(1, 256, 16\) for an image, no map \(1, 256, H, W\)$"),
        (lambda x: x[:, :, 9], rf"^{TINY} takes no images of 128 pixels: index 9 is out of bounds"),
    ],
)
def test_what_is_no_map_is_refused(change, message, monkeypatch):
    network = type(timm.create_model(TINY))
    rows = network.forward_features
    monkeypatch.setattr(network, "forward_features", lambda self, x: change(rows(self, x)))
    with pytest.raises(ValueError, match=message):
        MapTrunk(TINY)


def test_a_map_that_leaves_out_blocks_is_refused(monkeypatch):
    def skip(self, x):  # all blocks but those of the first stage; conv_head and bn2 as a whole
        x = self.blocks[0](self.bn1(self.conv_stem(x)))
        return x.mean(dim=1, keepdim=True).expand(-1, 256, -1, -1)

    monkeypatch.setattr(type(timm.create_model(TINY)), "forward_features", skip)
    message = rf"^{TINY}'s map does not depend on blocks\.1\.[^,]*(, blocks\.1\.[^,]*){{3}}$"
    with pytest.raises(ValueError, match=message):
        MapTrunk(TINY)


def test_bad_parts_are_named():
    trunk = nn.Identity()
    trunk.feature_dim = 4
    with pytest.raises(ValueError, match=r"dimension D must be above 0, not 0$"):
        EmbeddingNetwork(trunk, 0)
    with pytest.raises(ValueError, match=r"^channels must be above 0 and need a pooling; got 4, N"):
        EmbeddingNetwork(trunk, 4, channels=4)
    with pytest.raises(ValueError, match=r"^channels must be above 0 and need a pooling; got 0, G"):
        EmbeddingNetwork(trunk, 4, GeM(), channels=0)


# --- published weights --------------------------------------------------------------------------


def published(naming):
    """A ResNet-18 of torchvision with a whitening as public code holds it: its weights, and what
    they compute for normalised images."""
    net = scramble(torchvision.models.resnet18()).eval()
    whole = nn.Module()
    children = list(net.children())[:-2]  # conv1, bn1, relu, maxpool, layer1 to layer4
    body = nn.Sequential(*children)
    p, whiten = 3.0, scramble(nn.Linear(512, 24))
    if naming == "plain":
        for name, child in list(net.named_children()):  # with the classifier
            whole.add_module(name, child)
    elif naming == "features":
        whole.features = body
        whole.pool = nn.Module()
        whole.pool.p = nn.Parameter(torch.tensor([2.5]))
        p = 2.5
    elif naming == "blocks":
        whole.backbone = nn.Module()
        whole.backbone.block1 = body[:4]
        for i in range(4):
            whole.backbone.add_module(f"block{i + 2}", body[4 + i])
    else:
        whole.add_module(naming, net)
    whole.whiten = whiten
    if naming == "blocks":
        whole.whiten = nn.Conv2d(512, 24, 1)
        whole.whiten.weight = nn.Parameter(whiten.weight[:, :, None, None].detach())
        whole.whiten.bias = whiten.bias

    @torch.no_grad()
    def embed(images):
        x = F.normalize(body(images).clamp(min=1e-6).pow(p).mean(dim=(2, 3)).pow(1 / p), dim=1)
        return F.normalize(whiten(x), dim=1)

    return {name: value.detach().clone() for name, value in whole.state_dict().items()}, embed


NAMINGS = ["plain", "features", "blocks", "backbone", "globalmodel"]


@pytest.fixture(scope="module")
def gallery():
    return {kind: build_embedding(kind, "resnet18", D=24) for kind in ("delg", "gem")}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_published_weights_compute_what_they_did(naming, wrapped, gallery):
    weights, embed = published(naming)
    kind = "gem" if naming == "features" else "delg"
    network = scramble(gallery[kind]).eval()
    with torch.no_grad():
        network.pool.p.fill_(3.0)
    if wrapped:
        weights = {f"module.{name}": value for name, value in weights.items()}
    assert load_published(network, weights) == ([] if kind == "gem" else ["pool.p"])
    images = torch.rand(2, 3, 64, 96)
    images[1, 0] *= 0.2  # bluish green
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
    want = embed((images - mean) / std)
    with torch.no_grad():
        # float32 through 18 layers, sums in another order
        torch.testing.assert_close(network(images), want, rtol=1e-3, atol=1e-4)
    assert (want[0] - want[1]).abs().max() > 1e-2  # not all images alike


def test_a_fixed_p_takes_the_published_one(gallery):
    weights, _ = published("features")
    assert load_published(gallery["delg"], weights) == []
    assert float(gallery["delg"].pool.p) == 2.5
    assert not isinstance(gallery["delg"].pool.p, nn.Parameter)
    weights["pooling.p"] = weights.pop("pool.p") + 1
    assert load_published(gallery["delg"], weights) == []
    assert float(gallery["delg"].pool.p) == 3.5


def test_counters_may_be_missing(gallery):
    weights, _ = published("features")
    old = {n: v for n, v in weights.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(weights)
    assert load_published(gallery["gem"], old) == []


@pytest.mark.parametrize(
    ("naming", "change", "message"),
    [
        ("plain", {"layer3.0.bn2.bias": None}, r"^layer3\.0\.bn2\.bias is missing$"),
        ("plain", {"whiten.bias": None}, r"^whiten\.bias is missing$"),
        ("features", {"pool.p": None}, r"^pool\.p is missing$"),
        ("features", {"features.2.weight": torch.ones(1)}, r"^features\.2\.weight is not known$"),
        ("features", {"lwhiten.bias": torch.ones(1)}, r"^lwhiten\.bias is not known$"),
        (
            "blocks",
            {"backbone.block1.4.0.bn1.bias": torch.ones(64)},
            r"^backbone\.block1\.4\.0\.bn1\.bias is not known$",
        ),
        (
            "blocks",
            {"backbone.block6.0.x": torch.ones(1)},
            r"^backbone\.block6\.0\.x is not known$",
        ),
        ("features", {"bn1.bias": torch.ones(64)}, r"^bn1\.bias is there twice, as bn1\.bias$"),
        (
            "plain",
            {"whiten.weight": torch.ones(24, 5)},
            r"^whiten\.weight is \(24, 5\), not \(24, 5",
        ),
        (
            "plain",
            {"whiten.weight": torch.ones(24, 512, 3, 3)},
            r"is \(24, 512, 3, 3\), not \(24, 5",
        ),
        ("plain", {"bn1.bias": torch.ones(64, 1, 1)}, r"^bn1\.bias is \(64, 1, 1\), not \(64,\)$"),
        ("features", {"pool.p": torch.ones(2)}, r"^pool\.p is \(2,\), not \(\)$"),
        ("features", {"pool.p": torch.zeros(1)}, r"^pool\.p is 0\.0, not above 0$"),
        (
            "plain",
            {f"new{i}": torch.ones(1) for i in range(6)},
            r"new3\.? is not known, and 2 more$",
        ),
    ],
)
def test_published_weights_that_do_not_fit_change_nothing(naming, change, message, gallery):
    network = gallery["gem" if naming == "features" else "delg"]
    weights, _ = published(naming)
    weights = {n: v for n, v in (weights | change).items() if v is not None}
    before = {n: v.clone() for n, v in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_published(network, weights)
    assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())


def test_another_program_s_names_are_refused(gallery):
    names = ("stem.conv.weight", "s1.b1.f.a.weight", "head.pool.p", "head.fc.weight")
    weights = {f"globalmodel.{name}": torch.ones(1) for name in names}
    with pytest.raises(ValueError, match=r"is missing; .* more$"):
        load_published(gallery["gem"], weights)


@pytest.mark.parametrize("kind", ["query", "small"])
def test_published_weights_are_for_galleries(kind):
    with pytest.raises(ValueError, match=r"are for gallery networks, of the kinds delg and gem$"):
        load_published(small(kind), {})


# --- our own networks as galleries --------------------------------------------------------------


def own(method):
    if method == "SPQ":
        return build_spq("resnet18", 8, "soft", M=2, K=4, d=6)
    return build_gpq("cifar_vgg", 8, M=2, K=4, d=6, classes=3)


@pytest.mark.parametrize("method", ["SPQ", "GPQ"])
def test_an_own_gallery_gives_descriptors_of_unit_length(method):
    model = own(method)
    gallery = OwnGallery(model)
    assert gallery.embedding_dim == 12
    images = torch.rand(3, 3, 32, 40)
    x = gallery(images)
    assert torch.equal(x, gallery.describe(images))
    assert x.shape == (3, 12)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.norm(dim=1), torch.ones(3))
    with torch.no_grad():
        raw = model.describe(images)
    torch.testing.assert_close(x * raw.norm(dim=1, keepdim=True), raw)


@pytest.mark.parametrize("method", ["SPQ", "GPQ"])
def test_an_own_gallery_is_frozen(method):
    model = own(method).train()
    gallery = OwnGallery(model)
    before = {n: v.clone() for n, v in gallery.state_dict().items()}
    assert gallery.train() is gallery
    assert not any(module.training for module in model.modules())
    x = gallery(torch.rand(4, 3, 32, 32, requires_grad=True))
    assert not x.requires_grad
    assert not any(p.requires_grad for p in gallery.parameters())
    assert all(torch.equal(v, before[n]) for n, v in gallery.state_dict().items())


# --- costs --------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Strided, grouped and 1x1 convolutions, and a linear layer."""

    feature_dim = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        )

    def forward(self, images):
        return self.layers(images)


def test_attention_is_counted_and_what_a_network_keeps_stays_usable():
    trunk = build_trunk("vit_tiny_patch16_224", input_size=32)  # 4 patches and a class token
    D, T, depth = 192, 5, 12
    block = T * D * 3 * D + 2 * T * T * D + T * D * D + 2 * T * D * 4 * D
    assert count_costs(trunk, 32)["macs"] == 4 * 3 * 16 * 16 * D + depth * block
    keeps = build_trunk("levit_128s", input_size=224).eval()  # its attention's biases
    count_costs(keeps, 224)
    with torch.no_grad():
        assert keeps(torch.rand(1, 3, 224, 224)).isfinite().all()


# 9 x 12 pixels -> 5 x 6: 3x3 of 3 channels to 8, 3x3 within each of 8, 1x1 of 8 to 10, then 10 to 5
TINY_MACS = 30 * 9 * 3 * 8 + 30 * 9 * 8 + 30 * 8 * 10 + 10 * 5
TINY_PARAMETERS = (9 * 3 * 8 + 8) + 2 * 8 + 9 * 8 + 8 * 10 + (10 * 5 + 5) + 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_costs_worked_by_hand(device):
    with torch.device(device):
        network = EmbeddingNetwork(Tiny(), 5, GeM(trainable=True), channels=10)
    network.trunk.layers[1].eval()
    modes = [module.training for module in network.modules()]
    before = {n: v.clone() for n, v in network.state_dict().items()}
    costs = count_costs(network, (9, 12))
    assert costs == {"parameters": TINY_PARAMETERS, "macs": TINY_MACS}
    assert [module.training for module in network.modules()] == modes
    if device == "cpu":
        assert all(torch.equal(v, before[n]) for n, v in network.state_dict().items())
        network.eval()(torch.rand(1, 3, 9, 12))  # works on: its weights are its own still


def test_costs_of_known_networks():
    with torch.device("meta"):
        network = build_embedding("delg", "resnet101")
    # timm's own benchmark: 7.83 GMACs for resnet101 at 224 pixels, 2 MMACs of them the classifier
    assert count_costs(network, 224)["macs"] / 1e9 == pytest.approx(7.80, abs=0.02)
    twice, once = (count_costs(network, size)["macs"] for size in (448, 224))
    head = 2048 * 2048
    assert twice - head == 4 * (once - head)
    # a square and its side are one; 32 pixels leave batch norm a single value
    assert count_costs(network, 32) == count_costs(network, (32, 32))
    costs = count_costs(OwnGallery(own("SPQ")), 32)
    assert costs["parameters"] == sum(p.numel() for p in own("SPQ").parameters())


@pytest.mark.parametrize("size", [0, (32, 0), -1])
def test_costs_need_a_size(size):
    with pytest.raises(ValueError, match="size must be above 0"):
        count_costs(Tiny(), size)


# --- class weights ------------------------------------------------------------------------------


def test_cosines_of_class_weights():
    classifier = CosineClassifier(5, 6)
    assert list(classifier.state_dict()) == ["weight"]
    assert classifier.weight.shape == (5, 6)
    x = torch.randn(3, 6) * 7
    want = torch.empty(3, 5)
    for n in range(3):
        for c in range(5):
            w = classifier.weight[c].detach()
            want[n, c] = (x[n] @ w) / math.sqrt(float(x[n] @ x[n])) / math.sqrt(float(w @ w))
    torch.testing.assert_close(classifier(x).detach(), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(x), classifier.float()(x))
    for bad in ((1, 6), (5, 0)):
        with pytest.raises(ValueError, match=r"2 classes or more and D above 0; got \d, \d$"):
            CosineClassifier(*bad)


def test_the_residual_transform_as_written_out():
    transform = ResidualTransform(6)
    first, _, slope, second, _ = transform.transform
    with torch.no_grad():
        slope.weight.copy_(torch.tensor([0.1, 0.5, -0.3]))
    x = torch.randn(8, 6)

    def norm(y):
        return (y - y.mean(0)) / (y.var(0, unbiased=False) + 2e-5).sqrt()

    inner = norm(x @ first.weight.T)
    inner = torch.where(inner > 0, inner, slope.weight * inner)
    want = x + norm(inner @ second.weight.T)
    torch.testing.assert_close(transform(x), want, rtol=1e-4, atol=1e-5)  # float32
    assert sum(p.numel() for p in transform.parameters()) == 2 * 3 * 6 + 2 * 3 + 3 + 2 * 6
    loss = (transform(x) * torch.randn(8, 6)).sum()
    loss.backward()
    for name, parameter in transform.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    once = transform.eval()(x[:1])
    assert once.shape == (1, 6)
    torch.testing.assert_close(once, transform(x)[:1])  # a row does not depend on its batch


@pytest.mark.parametrize("D", [0, 1, 7, -2])
def test_the_residual_transform_needs_an_even_dimension(D):
    with pytest.raises(ValueError, match=rf"D / 2 dimensions; D = {D} is not even"):
        ResidualTransform(D)
