"""Weights on their own: loaded as saved, refused if they do not fit, known by identity."""

import numpy as np
import pytest
import timm
import torch
from small_images import ARGS, save_model

from models import GPQ, build_gpq, build_spq
from models.trunks import TimmTrunk
from utils.checkpoint import MODEL, load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.trained import Trained, identify, load_trained, save_trained


def test_weights_come_back_as_they_were(tmp_path, tiny_model):
    trained = load_trained(tiny_model)
    save_trained(tmp_path / "model.pt", trained)
    again = load_trained(tmp_path)  # a folder stands for the file in it
    assert again.identity == trained.identity
    assert again.args == trained.args == ARGS
    for name, value in trained.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    assert not again.model.training
    assert again.input_size == 16


def test_a_training_checkpoint_is_a_model_too(tmp_path, finished):
    trained = load_trained(finished)
    save_trained(tmp_path / "model.pt", trained)
    assert load_trained(tmp_path / "model.pt").identity == trained.identity
    assert (tmp_path / "model.pt").stat().st_size < 0.5 * (
        finished / "checkpoint_last.pt"
    ).stat().st_size
    saved = load_checkpoint(finished / "checkpoint_last.pt")["model"]
    assert all(torch.equal(trained.model.state_dict()[name], saved[name]) for name in saved)


def test_identity_is_of_all_that_decides_a_code(tmp_path, tiny_model, other_model):
    trained = load_trained(tiny_model)
    assert load_trained(other_model).identity != trained.identity
    larger = trained.args | {"input_size": 32}
    assert identify("SPQ", larger, trained.model) != trained.identity
    assert identify("SPQ", trained.args | {"lr": 1.0}, trained.model) == trained.identity
    with torch.no_grad():  # the last bit of one weight
        weight = trained.model.quantizer.codebooks[0, 0]
        weight[0] = float(np.nextafter(np.float32(weight[0]), np.float32(9)))
    assert identify("SPQ", trained.args, trained.model) != trained.identity


def test_half_precision_weights_load_as_float32(tmp_path, tiny_model):
    trained = load_trained(tiny_model)
    half = {
        name: v.bfloat16() if v.is_floating_point() else v
        for name, v in trained.model.state_dict().items()
    }
    torch.save(
        {"format": MODEL, "version": 1, "method": "SPQ", "args": ARGS, "model": half},
        tmp_path / "half.pt",
    )
    model = load_trained(tmp_path / "half.pt").model
    assert model.quantizer.codebooks.dtype == torch.float32
    assert torch.equal(model.quantizer.codebooks, half["quantizer.codebooks"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is a torch file but not of this project; allowed is a checkpoint_l"),
        ({"version": 99}, "has version 99; this code reads 1"),
        ({"method": "GPQ2"}, "is a model of GPQ2; allowed are SPQ and GPQ"),
        ({"args": ARGS | {"N_books": 8}}, "its weights and its flags do not fit"),
        ({"args": {}}, "its weights and its flags do not fit"),
        ({"args": ARGS | {"width": "wide"}}, "its weights and its flags do not fit"),
        ({"args": ARGS | {"input_size": 0}}, "its weights and its flags do not fit"),
        ({"args": ARGS | {"input_size": 16.5}}, "its weights and its flags do not fit"),
        ({"args": ARGS | {"input_size": 10**6}}, "its weights and its flags do not fit"),
        ({"model": {}}, "its weights and its flags do not fit"),
        ({"model": None}, "its weights and its flags do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, tiny_model, change, message):
    content = torch.load(tiny_model, weights_only=True) | change
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=rf"--checkpoint=.*x\.pt: .*{message}"):
        load_trained(tmp_path / "x.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = save_model(tmp_path / "x.pt", seed=0)
    content = torch.load(path, weights_only=True)
    content["model"]["head.0.weight"][0, 0] = float("nan")
    torch.save(content, path)
    with pytest.raises(UserError, match="has weights that are not finite"):
        load_trained(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--checkpoint=.*nothing\.pt: no such file"):
        load_trained(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match=r"holds neither checkpoint_last\.pt nor model\.pt"):
        load_trained(tmp_path)  # a folder without a model


def test_a_model_file_is_no_training_to_go_on_with(tmp_path, tiny_model):
    with pytest.raises(UserError, match="without the state of a training"):
        load_checkpoint(tiny_model)
    with pytest.raises(OSError, match=r"could not write|No such file"):
        save_checkpoint(tmp_path / "none" / "x.pt", {})


def test_a_small_file_cannot_ask_for_much_memory(tmp_path, tiny_model):
    content = torch.load(tiny_model, weights_only=True)
    weights = content["model"]
    content["model"] = {
        name: v.flatten()[:1].clone().expand(v.shape) if v.dim() else v
        for name, v in weights.items()
    }
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="weights that are larger than their file"):
        load_trained(tmp_path / "x.pt")


def timm_model(path, arch, stem, input_size):
    args = ARGS | {"arch": arch, "stem": stem, "width": 64, "input_size": input_size}
    model = build_spq(arch, 64, "soft", 4, 16, 4, stem=stem, input_size=input_size).eval()
    save_trained(path, Trained(model, "SPQ", args, identify("SPQ", args, model)))
    return model


@pytest.mark.parametrize(
    ("arch", "stem", "size"),
    [
        ("test_efficientnet", "imagenet", 32),
        ("test_vit", "imagenet", 48),
        ("resnet18", "imagenet", 32),
        ("resnet34", "cifar", 16),
    ],
)
def test_a_timm_trunk_comes_back(tmp_path, arch, stem, size):
    model = timm_model(tmp_path / "model.pt", arch, stem, size)
    trained = load_trained(tmp_path)
    assert isinstance(trained.model.trunk, TimmTrunk)
    assert trained.identity == identify("SPQ", trained.args, model)
    assert not any(module.training for module in trained.model.modules())
    images = torch.rand(3, 3, size, size)
    assert torch.equal(trained.model.describe(images), model.describe(images))
    assert torch.equal(trained.model.encode(images), model.encode(images))


def test_a_timm_trunk_loads_where_timm_reads_rates_while_it_builds(tmp_path, monkeypatch):
    timm_model(tmp_path / "model.pt", "test_vit", "imagenet", 32)
    create, rates = timm.create_model, []

    def older(*args, **kwargs):
        rates.append(torch.linspace(0, 1, 3).tolist())  # on no device that has no numbers
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", older)
    load_trained(tmp_path)
    assert rates == 2 * [[0.0, 0.5, 1.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "vit_giant_patch14_224"}, "weights of another shape"),
        ({"arch": "hf-hub:timm/test_vit"}, "unknown arch"),
        ({"arch": ["test_vit"]}, "do not fit"),
        ({"stem": "cifar"}, "has no CIFAR stem"),
        ({"width": 8}, "width 8"),
        ({"input_size": 64}, "weights of another shape"),
        ({"input_size": 10**6}, "input_size 1000000"),
    ],
)
def test_flags_that_do_not_fit_a_timm_trunk_are_refused(tmp_path, monkeypatch, change, message):
    timm_model(tmp_path / "x.pt", "test_vit", "imagenet", 32)
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["args"] |= change
    torch.save(content, tmp_path / "x.pt")
    # only for a network that has its memory: a file must not be able to ask for a giant's
    monkeypatch.setattr(TimmTrunk, "_try", lambda *_: pytest.fail("was built"))
    with pytest.raises(UserError, match=rf"x\.pt: is damaged: .*{message}"):
        load_trained(tmp_path / "x.pt")


def test_files_from_before_there_were_stems_are_who_they_were(tmp_path):
    assert "stem" not in ARGS
    model = build_spq("resnet18", 8, "soft", 4, 16, 4)
    with torch.no_grad():
        for number, value in enumerate(model.state_dict().values()):
            value.fill_(number)
    # as the code of that time found it, which indices and their users' logs hold
    known = "f3d311d119645dbe04ff1da3ba3d415133b7a0d98e6fe6dbe7d7cc4d276f7610"
    assert identify("SPQ", ARGS, model) == known
    save_trained(tmp_path / "model.pt", Trained(model, "SPQ", ARGS, known))
    assert load_trained(tmp_path).identity == known
    now = ARGS | {"stem": "cifar", "pretrained": False, "weights": None, "freeze_trunk": False}
    save_trained(tmp_path / "model.pt", Trained(model, "SPQ", now, known))
    assert load_trained(tmp_path).identity == known


GPQ_ARGS = ARGS | {"arch": "cifar_vgg", "stem": "cifar", "quantizer": "prototype", "n_classes": 5}
GPQ_ARGS |= {"N_books": 3, "soft_quantization_scale": 20.0}


def gpq_model(path):
    model = build_gpq("cifar_vgg", 8, M=3, K=16, d=4, classes=5, stem="cifar", input_size=16)
    trained = Trained(model.eval(), "GPQ", GPQ_ARGS, identify("GPQ", GPQ_ARGS, model))
    save_trained(path, trained)
    return trained


def test_a_gpq_model_comes_back_as_it_was(tmp_path):
    made = gpq_model(tmp_path / "first.pt")
    save_trained(tmp_path / "model.pt", load_trained(tmp_path / "first.pt"))
    again = load_trained(tmp_path)
    assert (again.method, again.args, again.identity) == ("GPQ", GPQ_ARGS, made.identity)
    assert isinstance(again.model, GPQ)
    assert not again.model.training
    assert again.model.quantizer.alpha == 20
    kept = {name for name in again.model.state_dict() if name.startswith("quantizer.")}
    assert kept == {"quantizer.words", "quantizer.prototypes"}  # codebooks are made of these
    images = torch.rand(40, 3, 16, 16)
    assert torch.equal(again.model.quantizer.codebooks, made.model.quantizer.codebooks)
    assert torch.equal(again.model.describe(images), made.model.describe(images))
    codes = again.model.encode(images)
    assert torch.equal(codes, made.model.encode(images))
    assert len(codes.unique(dim=0)) > 1


def test_alpha_decides_the_codes_of_gpq_and_not_of_spq(tmp_path, tiny_model):
    images, change = torch.rand(40, 3, 16, 16), {"soft_quantization_scale": 2.0}
    gpq_model(tmp_path / "gpq.pt")
    for path, method, decides in ((tmp_path / "gpq.pt", "GPQ", True), (tiny_model, "SPQ", False)):
        content = torch.load(path, weights_only=True)
        torch.save(content | {"args": content["args"] | change}, tmp_path / "other.pt")
        one, other = load_trained(path), load_trained(tmp_path / "other.pt")
        assert one.identity == identify(method, one.args, one.model)
        assert (one.identity != other.identity) == decides
        # the codewords move, and with them what a code stands for
        moved = not torch.equal(one.model.quantizer.codebooks, other.model.quantizer.codebooks)
        assert moved == decides
        codes = [trained.model.encode(images) for trained in (one, other)]
        assert decides or torch.equal(*codes)


@pytest.mark.parametrize("n_classes", [0, 4, 10**9, "5", None])
def test_a_gpq_file_with_other_classes_is_refused(tmp_path, n_classes):
    gpq_model(tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["args"] |= {"n_classes": n_classes}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: is damaged: its weights and its flags do not fit"):
        load_trained(tmp_path / "x.pt")
    del content["args"]["n_classes"]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"is damaged: .*n_classes"):
        load_trained(tmp_path / "x.pt")


def test_a_model_of_one_method_is_none_of_the_other(tmp_path, tiny_model):
    gpq_model(tmp_path / "x.pt")
    for path, method in ((tmp_path / "x.pt", "SPQ"), (tiny_model, "GPQ")):
        content = torch.load(path, weights_only=True)
        torch.save(content | {"method": method}, tmp_path / "y.pt")
        with pytest.raises(UserError, match=r"y\.pt: is damaged"):
            load_trained(tmp_path / "y.pt")
