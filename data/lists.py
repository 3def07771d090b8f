"""Image lists with labels, in the formats that the field passes around."""

import os
import posixpath
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
FLICKR_NAME = re.compile(r"im(\d{1,9})\.jpg", re.IGNORECASE)
FLICKR_MOST = 1_000_000  # MIRFLICKR-1M
MOST_CLASSES = 100_000
SHOWN = 3  # faults named in one message
CODINGS = ({"0", "1"}, {"-1", "1"})  # of labels; one in a file
Lines = list[tuple[int, str]]  # number, counted from 1, and text


@dataclass(frozen=True)
class Listing:
    """Images by their names, and their labels.

    Attributes:
        names: paths with `/`, relative to the data folder.
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


def read_lines(path: Path, flag: str) -> Lines:
    """The lines of a text file, numbered, without those that are empty.

    Bytes that are no UTF-8 stay as they are, as the file system has them in names.

    Raises:
        UserError: if it cannot be read, or is no text.
    """
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read: {error.strerror or error}") from error
    if b"\0" in content:
        raise UserError(f"{flag}={path}: is no text, or in UTF-16; save it as text in UTF-8")
    # no splitlines(), for which a name may hold line ends
    lines = re.split(r"\r\n|\r|\n", content.decode("utf-8", "surrogateescape"))
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    return [(number, line) for number, line in numbered if line]


def read_label_list(path: Path, flag: str = "--data_dir", root: Path | None = None) -> Listing:
    """A file of lines `path l1 ... lC`, each l either 0 or 1 (or -1 and 1), or of lines
    `path class`; between them blanks, tabs or commas.

    C is the number of such labels that end the first line, and must be so in every line, so a
    path may hold blanks.

    Args:
        path: of the list.
        flag: for messages.
        root: folder that its paths lie below (default: the list's own).
    Raises:
        UserError: naming the file, and the first lines that are wrong.
    """
    lines = read_lines(path, flag)
    if not lines:
        raise UserError(f"{flag}={path}: is empty; a line is a path and its labels")
    C = _labels_at_end(lines[0][1])
    if C < 2:
        return _read_class_list(path, lines, flag, root or path.parent)
    names, rows, faults = [], [], []
    for number, line in lines:
        if _labels_at_end(line) != C:
            faults.append(f"line {number} has not {C} labels of 0 and 1, as the first has")
            continue
        name, labels = _split_line(line, C)
        names.append(name)
        rows.append((number, labels))
    _raise_faults(path, faults, flag)
    labels = _labels_of(rows, C, path, flag)
    listing = Listing(names, labels, tuple(f"label {c}" for c in range(C)))
    return _checked(listing, path, flag, root or path.parent)


def _split_line(line: str, n: int) -> tuple[str, list[str]]:
    """(path, the n words that end the line); a comma separates as a blank does."""
    # commas become blanks, so the path keeps its length, and is then taken with its own commas
    path, *words = line.replace(",", " ").rsplit(maxsplit=n) or [""]
    return line[: len(path)], words


def _labels_at_end(line: str) -> int:
    """How many words at the end of a line are 0, 1 or -1; the first word is a path."""
    found = 0
    for word in reversed(line.replace(",", " ").split()[1:]):
        if word not in ("0", "1", "-1"):
            break
        found += 1
    return found


def _labels_of(rows: Sequence[tuple[int, list[str]]], C: int, path: Path, flag: str) -> Tensor:
    """Numbered lines of C words each -> (N, C) uint8 of 0 and 1.

    Raises:
        UserError: naming the first lines that have another number of words, or other words.
    """
    words = {word for _, row in rows for word in row}
    coding = CODINGS[1] if "-1" in words else CODINGS[0]
    faults = []
    for number, row in rows:
        other = next((word for word in row if word not in coding), None)
        if len(row) != C:
            faults.append(f"line {number} has not {C} labels of 0 and 1, as the first has")
        elif other is not None:
            told = " beside -1" if other == "0" else ""
            faults.append(
                f"line {number} has {other!r}{told}; allowed are 0 and 1, or -1 and 1, in one file"
            )
    _raise_faults(path, faults, flag)
    return torch.tensor([[word == "1" for word in row] for _, row in rows], dtype=torch.uint8)


def _read_class_list(path: Path, lines: Lines, flag: str, root: Path) -> Listing:
    names, numbers, faults = [], [], []
    for number, line in lines:
        name, words = _split_line(line, 1)
        if not words or not re.fullmatch(r"[0-9]+", words[0]):
            faults.append(f"line {number} does not end with a class number or labels of 0 and 1")
        elif len(words[0]) > 9 or int(words[0]) >= MOST_CLASSES:
            faults.append(
                f"line {number} has class {words[0][:20]}; allowed is 0 to {MOST_CLASSES - 1}"
            )
        else:
            names.append(name)
            numbers.append(int(words[0]))
    _raise_faults(path, faults, flag)
    labels = torch.tensor(numbers, dtype=torch.int64)
    classes = tuple(f"class {c}" for c in range(int(labels.max()) + 1))
    return _checked(Listing(names, labels, classes), path, flag, root)


def read_images_and_targets(
    images: Path, targets: Path, flag: str = "--data_dir", root: Path | None = None
) -> Listing:
    """`img.txt`, a path a line, and `targets.txt`, its zeros and ones (or -1 and 1) in the same
    line.

    Args:
        images, targets: the two files.
        flag: for messages.
        root: folder that the paths lie below (default: that of `images`).
    Raises:
        UserError: if the files do not fit each other.
    """
    named, labelled = read_lines(images, flag), read_lines(targets, flag)
    if len(named) != len(labelled):
        raise UserError(
            f"{flag}={images.parent}: {images.name} has {len(named)} images and {targets.name} "
            f"{len(labelled)} lines of labels; each image has one"
        )
    if not named:
        raise UserError(f"{flag}={images}: is empty")
    for (at_image, name), (at_labels, _) in zip(named, labelled, strict=True):
        if at_image != at_labels:
            raise UserError(
                f"{flag}={images.parent}: {name!r} is line {at_image} of {images.name}, and its "
                f"labels line {at_labels} of {targets.name}; an image and its labels have one "
                "line number, so take the empty lines out of both"
            )
    rows = [(number, line.replace(",", " ").split()) for number, line in labelled]
    C = max(1, len(rows[0][1]))
    labels = _labels_of(rows, C, targets, flag)
    listing = Listing([name for _, name in named], labels, tuple(f"label {c}" for c in range(C)))
    return _checked(listing, images, flag, root or images.parent)


def read_mirflickr(
    folder: Path, relevant: bool = False, flag: str = "--data_dir", root: Path | None = None
) -> Listing:
    """MIRFLICKR-25000 as its authors hand it out: `im1.jpg` to `im25000.jpg`, and an annotation
    file of image numbers for each label.

    The images may lie in `mirflickr`, `mirflickr25k`, `images` or the folder itself, the
    annotations in `mirflickr25k_annotations_v080` or `annotations` (or beside the images).

    Args:
        folder: that both lie below.
        relevant: take the 14 `_r1` files as labels of their own: 38 instead of 24.
        flag: for messages.
        root: folder that the images lie below, if another.
    Returns:
        Images 1 to the last that is there or annotated. Those without a label are there too.
    Raises:
        UserError: naming the annotation files that are missing or damaged.
    """
    root = root or folder
    place = _first_with(root, FLICKR_IMAGES, FLICKR_NAME)
    notes = _first_with(folder, FLICKR_ANNOTATIONS, re.compile(r"sky\.txt"))
    if place is None or notes is None:
        below, what, where = (
            (root, "images im1.jpg, im2.jpg, ...", FLICKR_IMAGES)
            if place is None
            else (folder, "annotation files (sky.txt, ...)", FLICKR_ANNOTATIONS)
        )
        raise UserError(
            f"{flag}={below}: has no {what} in any of {', '.join(where)}; unpack mirflickr25k.zip "
            "and mirflickr25k_annotations_v080.zip there"
        )
    labels = [*FLICKR_LABELS, *(f"{name}_r1" for name in FLICKR_RELEVANT if relevant)]
    members, faults = {}, []
    for label in labels:
        file = notes / f"{label}.txt"
        if not file.is_file():
            faults.append(f"{file.name} is missing")
            continue
        words = [word for _, line in read_lines(file, flag) for word in line.split()]
        wrong = [word for word in words if not _is_image_number(word)]
        if wrong:
            faults.append(
                f"{file.name} has lines that are no image number of 1 to {FLICKR_MOST}, "
                f"{wrong[0][:20]!r} for one"
            )
            continue
        members[label] = [int(word) for word in words]
    _raise_faults(notes, faults, flag)
    names = {}
    for name in sorted(os.listdir(place)):  # of im1.JPG and im1.jpg the latter
        match = FLICKR_NAME.fullmatch(name)
        if match and _is_image_number(match[1]):
            names[int(match[1])] = name
    last = max([*names, *(number for listed in members.values() for number in listed)], default=0)
    # up to the last: what is missing between them is found missing when it is read
    rows = torch.zeros(last, len(labels), dtype=torch.uint8)
    for column, label in enumerate(labels):
        rows[[number - 1 for number in members[label]], column] = 1
    prefix = os.path.relpath(place, root)
    prefix = "" if prefix == "." else f"{prefix}/"
    found = [f"{prefix}{names.get(n, f'im{n}.jpg')}" for n in range(1, last + 1)]
    return Listing(found, rows, tuple(labels))


def _is_image_number(word: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", word) is not None and 1 <= int(word) <= FLICKR_MOST


def _first_with(folder: Path, places: Sequence[str], pattern: re.Pattern) -> Path | None:
    """The first of these places that holds a file of such a name."""
    for place in places:
        if (folder / place).is_dir():
            with os.scandir(folder / place) as entries:
                if any(pattern.fullmatch(entry.name) for entry in entries):
                    return folder / place
    return None


def _raise_faults(path: Path, faults: list[str], flag: str) -> None:
    if faults:
        more = f"; {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(f"{flag}={path}: {'; '.join(faults[:SHOWN])}{more}")


def _checked(listing: Listing, path: Path, flag: str, root: Path) -> Listing:
    """The listing, its paths relative to `root`, each image in it once.

    Raises:
        UserError: naming paths that lead elsewhere, and images that are in it twice with different
            labels.
    """
    roots = [os.path.normpath(root.absolute()), os.path.realpath(root)]
    first: dict[str, int] = {}
    names, rows, outside, faults = [], [], [], []
    for row, written in enumerate(listing.names):
        name = _relative(written, roots)
        if name is None:
            outside.append(written)
            continue
        known = first.setdefault(name, row)
        if known == row:
            names.append(name)
            rows.append(row)
        elif not torch.equal(listing.labels[known], listing.labels[row]):
            faults.append(f"{name!r} is listed twice, with different labels")
    if outside:
        raise UserError(
            f"{flag}={path}: {len(outside)} of its paths do not lie below {root}, {outside[0]!r} "
            "for one; write them relative to the folder of the images, and name that by --image_dir"
        )
    _raise_faults(path, faults, flag)
    return Listing(names, listing.labels[rows], listing.classes)


def _relative(name: str, roots: Sequence[str]) -> str | None:
    """A path as lists have them, relative to the first of the roots that it lies below; None if it
    lies elsewhere."""
    if "/" not in name:
        name = name.replace("\\", "/")  # from Windows
    name = posixpath.normpath(name)
    if posixpath.isabs(name):
        found = [name[len(root) :] for root in roots if name.startswith(f"{root.rstrip('/')}/")]
        name = found[0].lstrip("/") if found else ".."
    leads_out = name in (".", "..") or name.startswith("../") or re.match(r"[A-Za-z]:/", name)
    return None if leads_out else name
