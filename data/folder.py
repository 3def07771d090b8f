"""A folder of images in memory, for training without labels."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.images import batched, load_square, open_images
from utils.errors import UserError

SHOWN_FAULTS = 5
MEMORY_SHARE = 0.5  # of the machine's memory that the images may take


def load_folder(folder: Path, side: int) -> Tensor:
    """All images below a folder, squeezed to `side` x `side` pixels.

    Images that cannot be read are left out; their number and the first ones are printed.

    Returns:
        (N, 3, side, side) uint8, in order of the paths.
    Raises:
        UserError: if there is no such folder, no image in it, or the images do not fit into
            memory.
    """
    if not folder.is_dir():
        raise UserError(f"--data_dir={folder}: is not a folder of images")
    source = open_images(str(folder), folder, flag="--data_dir")
    size = len(source.names) * 3 * side * side
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > MEMORY_SHARE * memory:
        raise UserError(
            f"--data_dir={folder}: {len(source.names)} images of {side} pixels take "
            f"{size / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f}; lower --input_size"
        )
    images = torch.empty(len(source.names), 3, side, side, dtype=torch.uint8)
    kept, faults = 0, list(source.faults)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(
            total=len(source.names),
            unit="image",
            desc="reading",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        ) as bar,
    ):
        for names in batched(source.names, 1024):
            read = pool.map(lambda name: load_square(source, name, side), names)
            for name, result in zip(names, read, strict=True):
                if isinstance(result, str):
                    faults.append((name, result))
                else:
                    images[kept] = torch.from_numpy(result)
                    kept += 1
            bar.update(len(names))
    for name, reason in faults[:SHOWN_FAULTS]:
        print(f"left out: {name!r} {reason}")
    if faults:
        print(f"{len(faults)} left out, {kept} images to train on")
    if not kept:
        raise UserError(f"--data_dir={folder}: none of its images can be read")
    return images[:kept]
