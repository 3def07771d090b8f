"""Shared fixtures."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import small_cifar
import small_images

import data.cifar10


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_files(tmp_path_factory) -> Path:
    """A folder with the small set's files; not to be changed."""
    return small_cifar.make(tmp_path_factory.mktemp("cifar"))


@pytest.fixture
def small_set(small_files, monkeypatch) -> Path:
    """The small set, its hashes in place of the published ones."""
    monkeypatch.setattr(data.cifar10, "BIN_SHA256", small_cifar.hashes(small_files))
    monkeypatch.setattr(data.cifar10, "ROWS", small_cifar.ROWS)
    return small_files


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small_files):
    """A run of two epochs that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.cifar10.BIN_SHA256", small_cifar.hashes(small_files))
        patch.setattr("data.cifar10.ROWS", small_cifar.ROWS)
        folder = tmp_path_factory.mktemp("finished")
        small_cifar.run(small_files, folder, "--eval_epoch=1")
    return folder


@pytest.fixture(scope="session")
def finished_gpq(tmp_path_factory, small_files):
    """A run of main_GPQ.py that nothing disturbed: six epochs, an evaluation after the third."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.cifar10.BIN_SHA256", small_cifar.hashes(small_files))
        patch.setattr("data.cifar10.ROWS", small_cifar.ROWS)
        folder = tmp_path_factory.mktemp("finished_gpq")
        small_cifar.run_gpq(small_files, folder, "--eval_epoch=3")
    return folder


@pytest.fixture(scope="session")
def gallery(tmp_path_factory, small_files, finished_gpq):
    """What the first two commands of SSP leave: features.safetensors of the small set by
    `finished_gpq`, and anchors.safetensors made of them; not to be changed."""
    import extract_features
    import make_anchors

    folder = tmp_path_factory.mktemp("gallery")
    features = folder / "features.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.cifar10.BIN_SHA256", small_cifar.hashes(small_files))
        patch.setattr("data.cifar10.ROWS", small_cifar.ROWS)
        words = [f"--gallery={finished_gpq}", f"--output={features}", f"--data_dir={small_files}"]
        extract_features.main([*words, "--device=cpu"])
    words = [f"--features={features}", "--M=3", "--bits=4"]
    make_anchors.main([*words, f"--output={folder / 'anchors.safetensors'}"])
    return folder


@pytest.fixture(scope="session")
def finished_ssp(tmp_path_factory, small_files, gallery):
    """A run of main_SSP.py that nothing disturbed: two epochs, an evaluation after each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.cifar10.BIN_SHA256", small_cifar.hashes(small_files))
        patch.setattr("data.cifar10.ROWS", small_cifar.ROWS)
        patch.setattr("utils.figures.PNG_DPI", 50)
        folder = tmp_path_factory.mktemp("finished_ssp")
        words = [f"--anchors={gallery / 'anchors.safetensors'}", "--eval_epoch=1"]
        small_cifar.run_ssp(small_files, folder, gallery / "features.safetensors", *words)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A small SPQ network's weights, 16 bits, images of 16 pixels; not to be changed."""
    return small_images.save_model(tmp_path_factory.mktemp("model") / "model.pt", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """The same network with other weights."""
    return small_images.save_model(tmp_path_factory.mktemp("other") / "model.pt", seed=1)
