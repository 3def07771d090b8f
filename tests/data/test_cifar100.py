"""CIFAR-100 in torchvision's layout, fabricated: small files with their own MD5 sums."""

import hashlib
import http.client
import pickle
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from data import cifar100
from data.cifar100 import FOLDER, load_cifar100
from utils.errors import UserError

SIZES = {"train": 30, "test": 12}


@pytest.fixture
def content():
    """What the pickles hold, as the authors wrote them."""
    rng = np.random.default_rng(0)
    return {
        name: {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "fine_labels": [(7 * i) % 100 for i in range(n)],
            "coarse_labels": [i % 20 for i in range(n)],
        }
        for name, n in SIZES.items()
    }


@pytest.fixture
def data_dir(content, tmp_path, monkeypatch):
    folder = tmp_path / "sets" / FOLDER
    folder.mkdir(parents=True)
    names = {"fine_label_names": [f"name {c}" for c in range(100)]}
    sums = {}
    for name, held in [*content.items(), ("meta", names)]:
        (folder / name).write_bytes(pickle.dumps(held))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    source = cifar100.CIFAR100
    monkeypatch.setattr(source, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(source, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": sums["meta"]})
    return folder.parent


def test_images_and_fine_labels_are_those_of_the_files(data_dir, content):
    for part, (name, held) in zip(load_cifar100(data_dir), content.items(), strict=True):
        assert part.images.shape == (SIZES[name], 3, 32, 32)
        assert part.images.is_contiguous()
        # red plane, green plane, blue plane
        assert (part.images.flatten(1).numpy() == held["data"]).all()
        assert part.labels.tolist() == held["fine_labels"]


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_damaged_pickle_is_named_and_never_opened(data_dir, tmp_path):
    (data_dir / FOLDER / "test").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match=r"/test has md5 \w+, expected \w+\. Unpack"):
        load_cifar100(data_dir)
    assert not (tmp_path / "sprung").exists()


def test_missing_files_are_named(data_dir, tmp_path):
    for name in ("train", "meta"):
        (data_dir / FOLDER / name).unlink()
    with pytest.raises(
        UserError, match=r"/train is missing; .*/meta is missing\. Unpack .*pass --if_download"
    ):
        load_cifar100(data_dir)
    with pytest.raises(UserError, match=r"train is missing; .*test is missing"):
        load_cifar100(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--data_dir=.*file: is not a folder"):
        load_cifar100(tmp_path / "file", download=True)


@pytest.mark.parametrize("spoilt", ["train", "test", "meta"])
def test_a_download_mends_each_file(spoilt, data_dir, tmp_path, monkeypatch):
    good = shutil.copytree(data_dir, tmp_path / "good")
    (data_dir / FOLDER / spoilt).write_bytes(b"half")
    asked = []

    def deliver(url, root, filename, md5):
        asked.append((url, filename, md5))
        shutil.copytree(good / FOLDER, Path(root) / FOLDER, dirs_exist_ok=True)

    monkeypatch.setattr(cifar100, "download_and_extract_archive", deliver)
    for folder in (data_dir, tmp_path / "a" / "new"):
        assert len(load_cifar100(folder, download=True)[0].labels) == SIZES["train"]
    load_cifar100(data_dir, download=True)  # complete: nothing is fetched
    assert len(asked) == 2
    assert asked[0][1:] == ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route to host"),
        http.client.IncompleteRead(b"", 9),
        RuntimeError("File not found or corrupted."),
        PermissionError(13, "Permission denied"),
    ],
)
def test_a_download_that_fails_ends_in_a_sentence(error, data_dir, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cifar100, "download_and_extract_archive", fail)
    (data_dir / FOLDER / "train").unlink()
    with pytest.raises(
        UserError, match=r"--data_dir=.*cannot be read or fetched: .*Unpack cifar-100-python"
    ):
        load_cifar100(data_dir, download=True)


def test_a_download_of_something_else_is_told(data_dir, monkeypatch):
    monkeypatch.setattr(cifar100, "download_and_extract_archive", lambda *_, **__: None)
    (data_dir / FOLDER / "test").unlink()
    with pytest.raises(UserError, match=r"/test is missing\. Unpack .*tar\.gz there$"):
        load_cifar100(data_dir, download=True)


def test_what_another_process_fetched_meanwhile_is_not_fetched_again(data_dir, monkeypatch):
    path = data_dir / FOLDER / "test"
    held = path.read_bytes()
    path.unlink()

    class Waited(cifar100.FileLock):
        """The other process is done when the lock is had."""

        def acquire(self, *args, **kwargs):
            path.write_bytes(held)
            return super().acquire(*args, **kwargs)

    def refuse(*_, **__):
        raise AssertionError("fetched again")

    monkeypatch.setattr(cifar100, "FileLock", Waited)
    monkeypatch.setattr(cifar100, "download_and_extract_archive", refuse)
    assert len(load_cifar100(data_dir, download=True)[1].labels) == SIZES["test"]
