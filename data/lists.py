"""Image lists with labels, in the formats that the field passes around."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

# MIRFLICKR's annotation files: 24 potential labels, and 14 of them again as "relevant"
FLICKR_LABELS = (
    *("animals", "baby", "bird", "car", "clouds", "dog", "female", "flower", "food", "indoor"),
    *("lake", "male", "night", "people", "plant_life", "portrait", "river", "sea", "sky"),
    *("structures", "sunset", "transport", "tree", "water"),
)
FLICKR_RELEVANT = (
    *("baby", "bird", "car", "clouds", "dog", "female", "flower", "male", "night", "people"),
    *("portrait", "river", "sea", "tree"),
)
FLICKR_IMAGES = ("mirflickr", "mirflickr25k", "images", ".")
FLICKR_ANNOTATIONS = ("mirflickr25k_annotations_v080", "annotations", "mirflickr/annotations", ".")
FLICKR_MOST = 1_000_000  # MIRFLICKR-1M
SHOWN = 3  # faults named in one message


@dataclass(frozen=True)
class Listing:
    """Images by their names, and their labels.

    Attributes:
        names: paths as written, with `/`, relative to the data folder.
        labels: (N,) int64 class numbers, or (N, C) uint8 of 0 and 1.
        classes: names, in order of the labels.
    """

    names: list[str]
    labels: Tensor
    classes: tuple[str, ...]

    @property
    def multilabel(self) -> bool:
        """Whether an image can have several labels, or none."""
        return self.labels.dim() == 2


def read_lines(path: Path, flag: str) -> list[str]:
    """The lines of a text file without those that are empty.

    Raises:
        UserError: if it cannot be read, or is no text.
    """
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        lines = text.decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}={path}: is not UTF-8 text ({error.reason})") from error
    return [line.strip() for line in lines if line.strip()]


def read_label_list(path: Path, flag: str = "--data_dir") -> Listing:
    """A file of lines `path l1 ... lC`, each l either 0 or 1, or of lines `path class`.

    C is the number of zeros and ones that end the first line, and must be so in every line, so a
    path may hold blanks.

    Raises:
        UserError: naming the file, and the first lines that are wrong.
    """
    lines = read_lines(path, flag)
    if not lines:
        raise UserError(f"{flag}={path}: is empty; a line is a path and its labels")
    C = _trailing_bits(lines[0])
    if C < 2:
        return _read_class_list(path, lines, flag)
    names, rows, faults = [], [], []
    for number, line in enumerate(lines, start=1):
        words = line.rsplit(maxsplit=C)
        if len(words) != C + 1 or not set(words[1:]) <= {"0", "1"} or _trailing_bits(line) != C:
            faults.append(f"line {number} has not {C} labels of 0 and 1")
            continue
        names.append(words[0])
        rows.append([word == "1" for word in words[1:]])
    _raise_faults(path, faults, flag)
    labels = torch.tensor(rows, dtype=torch.uint8)
    return _checked(Listing(names, labels, tuple(f"label {c}" for c in range(C))), path, flag)


def _trailing_bits(line: str) -> int:
    """How many words at the end of a line are 0 or 1; the first word is a path."""
    found = 0
    for word in reversed(line.split()[1:]):
        if word not in ("0", "1"):
            break
        found += 1
    return found


def _read_class_list(path: Path, lines: Sequence[str], flag: str) -> Listing:
    names, numbers, faults = [], [], []
    for number, line in enumerate(lines, start=1):
        name, _, word = line.rpartition(" ") if " " in line else line.rpartition("\t")
        if not name or not word.isdecimal():
            faults.append(f"line {number} does not end with a class number or labels of 0 and 1")
            continue
        names.append(name.strip())
        numbers.append(int(word))
    _raise_faults(path, faults, flag)
    labels = torch.tensor(numbers, dtype=torch.int64)
    classes = tuple(f"class {c}" for c in range(int(labels.max()) + 1))
    return _checked(Listing(names, labels, classes), path, flag)


def read_images_and_targets(images: Path, targets: Path, flag: str = "--data_dir") -> Listing:
    """`img.txt`, a path a line, and `targets.txt`, its zeros and ones in the same line.

    Raises:
        UserError: if the files do not fit each other.
    """
    names, lines = read_lines(images, flag), read_lines(targets, flag)
    if len(names) != len(lines):
        raise UserError(
            f"{flag}={images.parent}: {images.name} has {len(names)} images and {targets.name} "
            f"{len(lines)} lines of labels; each image has one"
        )
    if not names:
        raise UserError(f"{flag}={images}: is empty")
    rows = [re.split(r"[\s,]+", line) for line in lines]
    C, faults = len(rows[0]), []
    for number, row in enumerate(rows, start=1):
        if len(row) != C or not set(row) <= {"0", "1"}:
            faults.append(f"line {number} has not {C} labels of 0 and 1")
    _raise_faults(targets, faults, flag)
    labels = torch.tensor([[word == "1" for word in row] for row in rows], dtype=torch.uint8)
    listing = Listing(names, labels, tuple(f"label {c}" for c in range(C)))
    return _checked(listing, images, flag)


def read_mirflickr(folder: Path, relevant: bool = False, flag: str = "--data_dir") -> Listing:
    """MIRFLICKR-25000 as its authors hand it out: `im1.jpg` to `im25000.jpg`, and an annotation
    file of image numbers for each label.

    The images may lie in `mirflickr`, `mirflickr25k`, `images` or the folder itself, the
    annotations in `mirflickr25k_annotations_v080` or `annotations` (or beside the images).

    Args:
        folder: that both lie below.
        relevant: take the 14 `_r1` files as labels of their own: 38 instead of 24.
        flag: for messages.
    Returns:
        Images 1 to the last that is there or annotated. Those without a label are there too.
    Raises:
        UserError: naming the annotation files that are missing or damaged.
    """
    place = _first_with(folder, FLICKR_IMAGES, "im*.jpg")
    notes = _first_with(folder, FLICKR_ANNOTATIONS, "sky.txt")
    if place is None or notes is None:
        what = (
            "images im1.jpg, im2.jpg, ..." if place is None else "annotation files (sky.txt, ...)"
        )
        where = FLICKR_IMAGES if place is None else FLICKR_ANNOTATIONS
        raise UserError(
            f"{flag}={folder}: has no {what} in any of {', '.join(where)}; unpack mirflickr25k.zip "
            "and mirflickr25k_annotations_v080.zip there"
        )
    labels = [*FLICKR_LABELS, *(f"{name}_r1" for name in FLICKR_RELEVANT if relevant)]
    members, faults = {}, []
    for label in labels:
        file = notes / f"{label}.txt"
        if not file.is_file():
            faults.append(f"{file.name} is missing")
            continue
        words = " ".join(read_lines(file, flag)).split()
        if not all(word.isdecimal() for word in words):
            faults.append(f"{file.name} has lines that are no image number")
            continue
        members[label] = [int(word) for word in words]
    _raise_faults(notes, faults, flag)
    found = (re.fullmatch(r"im(\d+)\.jpg", entry.name) for entry in os.scandir(place))
    numbers = {int(match[1]) for match in found if match}
    numbers |= {number for listed in members.values() for number in listed}
    if min(numbers) < 1 or max(numbers) > FLICKR_MOST:
        raise UserError(f"{flag}={notes}: an image number is none of 1 to {FLICKR_MOST}")
    # up to the last: what is missing between them is found missing when it is read
    row_of = {number: number - 1 for number in range(1, max(numbers) + 1)}
    rows = torch.zeros(len(row_of), len(labels), dtype=torch.uint8)
    for column, label in enumerate(labels):
        rows[[row_of[number] for number in members[label]], column] = 1
    prefix = os.path.relpath(place, folder)
    prefix = "" if prefix == "." else f"{prefix}/"
    return Listing([f"{prefix}im{number}.jpg" for number in row_of], rows, tuple(labels))


def _first_with(folder: Path, places: Sequence[str], pattern: str) -> Path | None:
    """The first of these places that holds a file of such a name."""
    for place in places:
        if next((folder / place).glob(pattern), None) is not None:
            return folder / place
    return None


def _raise_faults(path: Path, faults: list[str], flag: str) -> None:
    if faults:
        more = f"; {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(f"{flag}={path}: {'; '.join(faults[:SHOWN])}{more}")


def _checked(listing: Listing, path: Path, flag: str) -> Listing:
    """The listing, each image in it once.

    Raises:
        UserError: naming those that are in it twice with different labels.
    """
    first: dict[str, int] = {}
    rows, faults = [], []
    for row, name in enumerate(listing.names):
        known = first.setdefault(name, row)
        if known == row:
            rows.append(row)
        elif not torch.equal(listing.labels[known], listing.labels[row]):
            faults.append(f"{name!r} is listed twice, with different labels")
    _raise_faults(path, faults, flag)
    if len(rows) == len(listing.names):
        return listing
    return Listing([listing.names[row] for row in rows], listing.labels[rows], listing.classes)
