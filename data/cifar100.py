"""CIFAR-100 as uint8 tensors, from torchvision's layout on disk, every file checked by its hash."""

from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import download_and_extract_archive

from data.cifar10 import LabelledImages, file_faults
from utils.errors import UserError

FOLDER = CIFAR100.base_folder  # cifar-100-python


def load_cifar100(
    data_dir: str | Path, download: bool = False
) -> tuple[LabelledImages, LabelledImages]:
    """The 50,000 training and the 10,000 test images, with the 100 fine labels.

    Args:
        data_dir: folder that holds `cifar-100-python`.
        download: fetch the set when it is not complete there.
    Returns:
        (train, test).
    Raises:
        UserError: if it is not there (the bad files are named), or the download failed.
    """
    folder = Path(data_dir) / FOLDER
    published = [*CIFAR100.train_list, *CIFAR100.test_list]
    published.append([CIFAR100.meta["filename"], CIFAR100.meta["md5"]])

    def faults() -> list[str]:
        return [text for name, md5 in published for text in file_faults(folder / name, "md5", md5)]

    if Path(data_dir).exists() and not Path(data_dir).is_dir():
        raise UserError(f"--data_dir={data_dir}: is not a folder")
    try:
        wrong = faults()
        if wrong and download:
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            with FileLock(Path(data_dir) / ".cifar100.lock", timeout=3600):
                if faults():  # no other process was first
                    # not CIFAR100(download=True), which leaves a damaged `meta` as it is
                    archive, md5 = CIFAR100.filename, CIFAR100.tgz_md5
                    download_and_extract_archive(
                        CIFAR100.url, str(data_dir), filename=archive, md5=md5
                    )
            wrong = faults()
        if wrong:
            hint = "" if download else ", or pass --if_download"
            raise UserError(
                f"--data_dir={data_dir}: {'; '.join(wrong)}. Unpack cifar-100-python.tar.gz "
                f"there{hint}"
            )
        return _read(data_dir, train=True), _read(data_dir, train=False)
    except Timeout:
        raise UserError(
            f"--data_dir={data_dir}: another process has been downloading for an hour; if none is "
            "running, delete .cifar100.lock there"
        ) from None
    # RuntimeError: a download that is not what it should be; HTTPException: one that was cut off
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(
            f"--data_dir={data_dir}: cannot be read or fetched: {error}. Unpack "
            "cifar-100-python.tar.gz there"
        ) from error


def _read(data_dir: str | Path, train: bool) -> LabelledImages:
    # torchvision unpickles; only files whose hash is the published one get this far
    source = CIFAR100(str(data_dir), train=train)
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2)  # (N, 32, 32, 3) -> planes
    return LabelledImages(images.contiguous(), torch.tensor(source.targets))
