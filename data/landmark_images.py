"""Landmark images as retrieval sees them: at their own aspect, queries cut to their box."""

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from data.images import FORMATS, MAX_PIXELS, ImageError, read_image
from utils.errors import UserError

LONGEST = 1024  # pixels of the longer side, as revisited Oxford and Paris are evaluated
AHEAD = 2  # images read ahead for each thread

# EXIF's orientation -> what turns the stored pixels upright, and what turns them back
_FLIPS = Image.Transpose
TURNS = {
    2: (_FLIPS.FLIP_LEFT_RIGHT, _FLIPS.FLIP_LEFT_RIGHT),
    3: (_FLIPS.ROTATE_180, _FLIPS.ROTATE_180),
    4: (_FLIPS.FLIP_TOP_BOTTOM, _FLIPS.FLIP_TOP_BOTTOM),
    5: (_FLIPS.TRANSPOSE, _FLIPS.TRANSPOSE),
    6: (_FLIPS.ROTATE_270, _FLIPS.ROTATE_90),
    7: (_FLIPS.TRANSVERSE, _FLIPS.TRANSVERSE),
    8: (_FLIPS.ROTATE_90, _FLIPS.ROTATE_270),
}


def read_landmark(
    path: str | Path,
    longest: int = LONGEST,
    box: Sequence[float] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """One image, decoded as `data.images.read_image` does, cut, and reduced at its own aspect.

        (W, H) -> (W, H) * min(1, longest / max(W, H)), rounded, each at least 1

    It is reduced by Pillow's antialiased bicubic filter: of those that the project uses for
    squares too it is nearest to the Lanczos filter of the published evaluations. Smaller images
    are not enlarged.

    Args:
        path: of the file.
        longest: pixels that the longer side may have.
        box: left, top, right, bottom in pixels of the file as it is stored, before EXIF's
            orientation turns it; rounded, and clipped to the image. None: the whole image.
        max_pixels: width * height of the largest image that is decoded.
    Returns:
        (3, H, W) uint8.
    Raises:
        ImageError: if it cannot be decoded, or no pixel of it is within the box.
        ValueError: if longest is not positive.
    Source: Radenovic et al., CVPR 2018, as cnnimageretrieval-pytorch and SSP's released code read
        images. Departures: the filter; orientations are heeded; there a cut is reduced as much as
        its whole image would be, which is the same where no image is longer than `longest`; these
        sets' are of 1,024 pixels. (SSP's released test script does not cut at all.)
    """
    if longest < 1:
        raise ValueError(f"longest must be above 0, not {longest}")
    image = read_image(path, max_pixels)
    if box is not None:
        image = _cut(image, box, _orientation(path))
    width, height = image.size
    if max(width, height) > longest:
        scale = longest / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # (3, H, W)


def read_landmarks(
    root: Path,
    names: Sequence[str],
    longest: int = LONGEST,
    boxes: np.ndarray | None = None,
    max_pixels: int = MAX_PIXELS,
    threads: int = 4,
    flag: str = "--data_dir",
) -> Iterator[Tensor]:
    """`read_landmark` of each image, in order, read ahead by a few threads.

    At most AHEAD * threads images wait in memory.

    Args:
        root: folder that names are relative to.
        names: of the images.
        longest, max_pixels: as for `read_landmark`.
        boxes: (len(names), 4); None: whole images.
        threads: that read.
        flag: for messages.
    Raises:
        UserError: naming the first image that cannot be used, when its turn comes.
    """

    def read(i: int) -> Tensor:
        box = None if boxes is None else boxes[i]
        try:
            return read_landmark(os.path.join(root, names[i]), longest, box, max_pixels)
        except ImageError as error:
            raise UserError(f"{flag}={root}: {names[i]} {error}") from error

    pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
    waiting: deque[Future] = deque()
    try:
        for i in range(len(names)):
            waiting.append(pool.submit(read, i))
            if len(waiting) == AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _orientation(path: str | Path) -> int:
    """EXIF's, of a file that can be decoded; 1 where it has none."""
    formats = [name for name in FORMATS if name in Image.OPEN]
    # damaged EXIF data: read_image did not turn it either
    with contextlib.suppress(Exception), Image.open(path, formats=formats) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _cut(image: Image.Image, box: Sequence[float], orientation: int) -> Image.Image:
    """The part of an upright image that a box of the stored one means."""
    upright, back = TURNS.get(orientation, (None, None))
    stored = image if back is None else image.transpose(back)
    left, top, right, bottom = (round(float(x)) for x in box)
    width, height = stored.size
    clipped = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        told = ", ".join(f"{float(x):g}" for x in box)
        raise ImageError(f"has {width} x {height} pixels, none of them within its box ({told})")
    part = stored.crop(clipped)
    return part if upright is None else part.transpose(upright)
