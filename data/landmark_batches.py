"""The landmark sets that SSP trains on, retrieval-SfM-120k and Google Landmarks v2: what is listed,
and images decoded from their files whenever a batch wants them.

    python -m data.landmark_batches --dataset=gldv2 --data_dir=landmarks

says how many images are listed and which of them are missing.
"""

import argparse
import math
import os
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import MAX_PIXELS, ImageError, read_image
from data.landmarks import missing_files, read_gldv2, read_sfm
from data.lists import Listing
from data.manifest import Split
from utils.distributed import Ranks
from utils.errors import UserError

# --protocol: which list of the set's authors, the paper's first
LANDMARK_PROTOCOLS = {"sfm120k": ("train",), "gldv2": ("clean", "full")}
LANDMARK_SETS = tuple(LANDMARK_PROTOCOLS)
SHOWN = 5  # missing images that are named
RATIO = 4 / 3  # longer side over shorter: more of an image would be squeezed too much


@dataclass(frozen=True)
class Defaults:
    """What the flags of main_SSP.py mean where they are not given.

    Attributes:
        input_size: pixels.
        batch_size, epochs: as published.
        warmup_share: of the epochs.
        jitter_strength: multiplies the colour jitter; 0 leaves colours as they are.
    """

    input_size: int
    batch_size: int
    epochs: int
    warmup_share: float
    jitter_strength: float


LANDMARK_DEFAULTS = {
    "sfm120k": Defaults(362, 64, 10, 5 / 10, 0.0),
    "gldv2": Defaults(512, 128, 5, 2 / 5, 1.0),
}
SOURCES = {
    "sfm120k": "retrieval-SfM-120k.pkl and the images, ims.tar.gz, are on the page of "
    "cnnimageretrieval-pytorch (Radenovic et al., TPAMI 2019), retrieval-SfM-120k",
    "gldv2": "train_clean.csv, train.csv and the images, train/images_000.tar to images_499.tar, "
    "are on the page of Google Landmarks Dataset v2 (Weyand et al., CVPR 2020)",
}


@dataclass(frozen=True)
class Landmarks:
    """A landmark set to train on.

    Attributes:
        split: all its images in the order of its list, their landmarks as labels; all train.
        used: the same without missing ones.
        pairs: (P, 2) rows of `split.listing`, query and positive, if the set names such.
        left_out: how many images are missing.
    """

    split: Split
    used: Split
    pairs: Tensor | None
    left_out: int

    def present(self) -> Tensor:
        """Rows of the images that are there, ascending."""
        return self.used.roles["train"]


def load_landmarks(args: Namespace) -> Landmarks:
    """The set that the flags ask for; opens no image.

    Labels of sfm120k are its 3-D models, those of gldv2 its landmarks, both numbered from 0.

    Args:
        args: dataset, protocol, data_dir, skip_missing.
    Raises:
        UserError: if the list is missing or wrong, images are missing (without --skip_missing), or
            all are.
    """
    split, pairs = read_landmark_split(args.dataset, args.protocol, args.data_dir)
    names = split.listing.names
    missing = missing_files(names, args.data_dir)
    if not missing:
        return Landmarks(split, split, pairs, 0)
    told = tell_missing(missing, len(names), args.data_dir)
    if not args.skip_missing:
        raise UserError(f"{told}. {SOURCES[args.dataset]}. --skip_missing goes on without them")
    if len(missing) == len(names):
        raise UserError(f"{told}. {SOURCES[args.dataset]}")
    if Ranks.from_environment().is_main:
        print(f"{told}; they are left out")
    gone = set(missing)
    present = torch.tensor([name not in gone for name in names]).nonzero()[:, 0]
    used = Split(split.dataset, split.protocol, split.seed, split.listing, {"train": present})
    return Landmarks(split, used, pairs, len(missing))


def read_landmark_split(dataset: str, protocol: str, data_dir: Path) -> tuple[Split, Tensor | None]:
    """What the set's authors list, and the (P, 2) pairs that match, if they name such.

    Raises:
        UserError: if the list is missing or wrong.
    """
    pairs = None
    if dataset == "sfm120k":
        sfm = read_sfm(data_dir, protocol)
        paths = sfm.paths
        numbers, labels = np.unique(sfm.clusters, return_inverse=True)
        pairs = torch.from_numpy(np.stack([sfm.queries, sfm.positives], axis=1))
    else:
        gld = read_gldv2(data_dir, clean=protocol == "clean")
        paths, labels, numbers = gld.paths, gld.labels, gld.landmark_ids
    classes = tuple(map(str, numbers.tolist()))
    listing = Listing(paths, torch.from_numpy(labels.astype(np.int64)), classes)
    return Split(dataset, protocol, None, listing, {"train": torch.arange(len(paths))}), pairs


def tell_missing(missing: list[str], listed: int, data_dir: Path) -> str:
    """A sentence: how many, and the first ones."""
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return (
        f"--data_dir={data_dir}: {len(missing)} of {listed} images are missing: "
        f"{', '.join(missing[:SHOWN])}{more}"
    )


def pairs_among(pairs: Tensor, rows: Tensor, listed: int) -> Tensor:
    """The pairs of which both images are among `rows`, as places in `rows`.

    Args:
        pairs: (P, 2) rows of a listing.
        rows: (N,) of the listing.
        listed: rows of the listing.
    Returns:
        (Q, 2), Q <= P, in their order.
    """
    place = torch.full((listed,), -1)
    place[rows] = torch.arange(len(rows))
    found = place[pairs]
    return found[(found >= 0).all(dim=1)]


class DecodedSquares:
    """Images of files as squares, decoded anew whenever they are asked for.

    `squares[rows]` decodes these by a pool of threads and gives them in their order, so that it
    stands in for a tensor (N, 3, side, side) uint8 where only rows are asked for. No more is in
    memory than what is asked for, and in each thread the image that it works on.

    A batch wants images of one shape, and these have many. Each is cut to at most 4:3, in its
    middle, and squeezed to a square. Random crops of the square come after that, for a whole batch
    at a time, on the device that trains.

    Args:
        root: folder that names are relative to.
        names: of the N images.
        side: pixels.
        threads: that decode; 0: one a core.
        max_pixels: width * height of the largest image that is decoded.
    Source: torchvision's RandomResizedCrop, which gives crops of 3:4 to 4:3 squeezed to a square,
        and cuts an image in its middle as here where no such crop fits. Departures: there the crop
        is of the image itself, here of its square; and published trainings on SfM-120k take whole
        images at their own aspect, one at a time, where here both sets are cropped at random.
    """

    def __init__(
        self,
        root: Path,
        names: list[str],
        side: int,
        threads: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root, self.names, self.side, self.max_pixels = root, names, side, max_pixels
        self._pool = ThreadPoolExecutor(threads or os.cpu_count(), thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, 3, side, side)."""
        return (len(self), 3, self.side, self.side)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Images (n, 3, side, side) uint8 of these rows, on the CPU.

        Raises:
            UserError: naming the first that cannot be decoded.
        """
        if isinstance(rows, slice):
            rows = torch.arange(len(self))[rows]
        found = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)

        def decode(place: int, row: int) -> None:
            found[place] = self._read(self.names[row])

        work = [self._pool.submit(decode, *at) for at in enumerate(rows.tolist())]
        try:
            for one in work:
                one.result()
        finally:
            for one in work:
                one.cancel()
        return found

    def _read(self, name: str) -> Tensor:
        try:
            image = read_image(os.path.join(self.root, name), self.max_pixels, self.side)
        except ImageError as error:
            raise UserError(
                f"--data_dir={self.root}: {name} {error}; put it right and go on with "
                "--resume=auto, or remove it and begin another run with --skip_missing"
            ) from error
        return to_square(image, self.side)


def to_square(image: Image.Image, side: int) -> Tensor:
    """The middle of an RGB image, at most 4:3, squeezed to a square: (3, side, side) uint8."""
    width, height = image.size
    w, h = min(width, height * RATIO), min(height, width * RATIO)
    left, top = (width - w) / 2, (height - h) / 2
    box = left, top, left + w, top + h
    if image.size != (side, side):
        bicubic = Image.Resampling.BICUBIC
        image = image.resize((side, side), bicubic, box=box, reducing_gap=2.0)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # (3, side, side)


def square_side(crop_size: int, min_area: float) -> int:
    """Pixels of squares whose smallest random crops need not be enlarged to `crop_size`."""
    return math.ceil(crop_size / math.sqrt(min_area))


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring; 2 if something is missing."""
    parser = argparse.ArgumentParser(prog="python -m data.landmark_batches")
    parser.add_argument("--dataset", choices=LANDMARK_SETS, required=True)
    parser.add_argument("--protocol", help="gldv2: clean (default) or full")
    parser.add_argument("--data_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    known = LANDMARK_PROTOCOLS[args.dataset]
    if args.protocol not in (None, *known):
        parser.error(f"--protocol={args.protocol}: {args.dataset} has {', '.join(known)}")
    try:
        split, _ = read_landmark_split(args.dataset, args.protocol or known[0], args.data_dir)
    except UserError as error:
        print(f"{error}. {SOURCES[args.dataset]}", file=sys.stderr)
        return 2
    names = split.listing.names
    missing = missing_files(names, args.data_dir)
    print(f"{args.dataset}: {len(names)} images listed, {len(missing)} missing")
    if missing:
        told = tell_missing(missing, len(names), args.data_dir)
        print(f"{told}. {SOURCES[args.dataset]}", file=sys.stderr)
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
