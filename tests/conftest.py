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
def tiny_model(tmp_path_factory) -> Path:
    """A small SPQ network's weights, 16 bits, images of 16 pixels; not to be changed."""
    return small_images.save_model(tmp_path_factory.mktemp("model") / "model.pt", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """The same network with other weights."""
    return small_images.save_model(tmp_path_factory.mktemp("other") / "model.pt", seed=1)
