"""The query network: what it gives, what learns with each method's loss, how its trunk is named."""

import pytest
import torch
from torch.nn import functional as F

from losses import (
    hvs_loss,
    lce_loss,
    regression_loss,
    structure_similarity_loss,
    tuple_contrastive_loss,
)
from models import AsymmetricNetwork, build_asymmetric
from models.embedding import MapTrunk
from models.trunks import load_weights
from utils.trained import build_from_flags

D, C, N, R = 8, 5, 6, 2
NETWORKS = {"small": ("cifar_vgg", 8), "query": ("mobilenetv2_035", 64)}


def build(kind="small", **flags):
    arch, width = NETWORKS[kind]
    return build_asymmetric(arch, width, D, **flags)


def images(side=32):
    return torch.rand(N, 3, side, side)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def loss_of(method, model, side):
    """A method's loss of a batch of images."""
    x, gallery, labels = model(images(side)), unit(N, D), torch.arange(N) % C
    if method == "ssp":
        return structure_similarity_loss(x, gallery, unit(2, 4, D // 2), 10.0)
    if method == "regression":
        return regression_loss(x, gallery)
    if method == "aml":
        return tuple_contrastive_loss(x, gallery, unit(N, R, D), 2.0) + regression_loss(x, gallery)
    new, old = model.classifier.weight, unit(C, D)
    if method == "hvs":
        return hvs_loss(x, labels, new, old)
    to_old = model.transform
    return lce_loss(x, to_old(x), labels, new, to_old(new), old)


def flags_of(method):
    return {"classes": C if method in ("hvs", "lce") else 0, "transforms": method == "lce"}


@pytest.mark.parametrize("method", ["ssp", "regression", "aml", "hvs", "lce"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_parameter_learns_with_each_method(kind, method):
    model = build(kind, **flags_of(method), trainable_p=True)
    # of a map of one pixel GeM is that pixel, whatever p
    loss_of(method, model, 64 if kind == "query" else 32).backward()
    parameters = dict(model.named_parameters())
    assert ("classifier.weight" in parameters) == (method in ("hvs", "lce"))
    assert any(name.startswith("transform.") for name in parameters) == (method == "lce")
    assert ("pool.p" in parameters) == (kind == "query")
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("transforms", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_searches_has_unit_length(kind, transforms):
    model = build(kind, classes=C, transforms=transforms).eval()
    x = model.describe(images())
    assert (x.shape, x.dtype) == ((N, D), torch.float32)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(N))
    torch.testing.assert_close(model(images()).norm(dim=1), torch.ones(N))


def test_lce_searches_with_the_transformed_embedding():
    model = build(**flags_of("lce"))
    for _ in range(3):  # batch norm that has seen something
        model.transform(model(images()))
    model.eval()
    batch = images()
    own, searching = model(batch), model.describe(batch)
    torch.testing.assert_close(searching, F.normalize(model.transform(own), dim=1))
    assert (own - searching).abs().max() > 0.1
    # the others search with what the loss sees
    plain = build(**flags_of("hvs")).eval()
    assert torch.equal(plain(batch), plain.describe(batch))


def test_mixed_precision_keeps_what_searches_in_float32():
    model = build(**flags_of("lce")).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = model.describe(images())
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.norm(dim=1), torch.ones(N))  # bfloat16 is off by 0.004


@pytest.mark.parametrize(
    ("arch", "stem", "kind"),
    [
        ("cifar_vgg", None, "small"),
        ("resnet18", "cifar", "small"),
        ("resnet18", "imagenet", "query"),
        ("mobilenetv2_035", None, "query"),
    ],
)
def test_which_network_it_is(arch, stem, kind):
    with torch.device("meta"):
        model = build_asymmetric(arch, 64, D, stem=stem)
    assert isinstance(model, AsymmetricNetwork)
    assert isinstance(model.trunk, MapTrunk) == (kind == "query")
    assert (model.pool is None) == (kind == "small")
    channels = None if model.expand is None else model.expand.out_channels
    assert channels == {"small": None, "query": 2048}[kind]
    assert (model.embedding_dim, model.classifier, model.transform) == (D, None, None)


def test_flags_of_a_run_give_its_network():
    args = {"arch": "mobilenetv2_035", "width": 64, "embedding_dim": D, "n_classes": C}
    args |= {"method": "lce", "gem_p": 4.0, "trainable_p": False, "stem": "imagenet"}
    args |= {"input_size": 64}
    with torch.device("meta"):
        lce = build_from_flags("SSP", args)
        ssp = build_from_flags("SSP", args | {"method": "ssp", "n_classes": 0})
        learns = build_from_flags("SSP", args | {"trainable_p": True})
    assert lce.classifier.weight.shape == (C, D)
    assert lce.transform is not None
    assert (ssp.classifier, ssp.transform) == (None, None)
    assert "pool.p" in dict(learns.named_parameters())
    assert "pool.p" not in dict(lce.named_parameters())
    assert build("query", p=4.0).pool.p == 4.0


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_trunk_is_loaded_by_its_names(kind):
    given, taken = build(kind, **flags_of("lce")), build(kind)
    state = given.state_dict()
    names = {name.partition(".")[0] for name in state}
    rest = {"expand", "pool"} if kind == "query" else set()
    assert names == {"trunk", "whiten", "classifier", "transform"} | rest
    weights = {name: value for name, value in state.items() if name.startswith("trunk.")}
    load_weights(taken.trunk, weights)
    got = taken.state_dict()
    assert all(torch.equal(got[name], value) for name, value in weights.items())
    assert not torch.equal(got["whiten.weight"], state["whiten.weight"])


def test_a_transform_needs_an_even_dimension():
    with pytest.raises(ValueError, match="D = 7 is not even"):
        build_asymmetric("cifar_vgg", 8, 7, C, transforms=True)
    with pytest.raises(ValueError, match="2 classes or more"):
        build_asymmetric("cifar_vgg", 8, 8, 1)
