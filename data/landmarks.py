"""Landmark image sets as their authors lay them out: what is listed, labels, ground truth.

Nothing here opens an image. Paths are relative to the data folder, with `/`; `missing_files` says
which of them are not there. Each set lies in a folder of its own name below the data folder, or the
data folder is that folder itself.
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.lists import read_lines
from utils.errors import UserError
from utils.unpickle import read_pickle

SFM_NAMES = ("retrieval-SfM-120k", "retrieval-SfM-30k")
SFM_PARTS = ("train", "val")
REVISITED_NAMES = ("roxford5k", "rparis6k")
DISTRACTORS_NAME = "revisitop1m"
GLDV2_NAME = "gldv2"
GRADES = ("easy", "hard", "junk")
CID = re.compile(r"[\w-]{6,}", re.ASCII)  # becomes folders: no dots, no slashes
GLDV2_ID = re.compile(r"[\w-]{3,}", re.ASCII)
LANDMARK = re.compile(r"[0-9]{1,18}")
SHOWN = 3  # faults named in one message
ASKED, ASKING = 1000, 16  # files that a thread asks for, and threads


@dataclass(frozen=True)
class SfM:
    """One part of retrieval-SfM: images, the 3-D model that each belongs to, matching pairs.

    Attributes:
        paths: of the N images.
        clusters: (N,) int64, the 3-D model; images of two models show different places.
        queries, positives: (P,) int64, images; queries[p] and positives[p] show the same thing.
    """

    paths: list[str]
    clusters: np.ndarray
    queries: np.ndarray
    positives: np.ndarray


@dataclass(frozen=True)
class GLDv2:
    """The training images of Google Landmarks v2.

    Attributes:
        paths: of the N images.
        labels: (N,) int64 in [0, C).
        landmark_ids: (C,) int64, the numbers of the landmarks in the file, ascending.
    """

    paths: list[str]
    labels: np.ndarray
    landmark_ids: np.ndarray


@dataclass(frozen=True)
class Revisited:
    """Revisited Oxford or Paris.

    Attributes:
        query_paths: of the Q query images.
        boxes: (Q, 4) float64, left, top, right, bottom in pixels: the part that is the query.
        db_paths: of the N images that are searched.
        ground_truth: for each query `easy`, `hard` and `junk`, int64 images of the database, as
            `utils.landmark_metrics.evaluate_revisited` takes them. No image is in two of them.
    """

    query_paths: list[str]
    boxes: np.ndarray
    db_paths: list[str]
    ground_truth: list[dict[str, np.ndarray]]


# --- retrieval-SfM --------------------------------------------------------------------------------


def read_sfm(
    data_dir: Path, part: str = "train", name: str = SFM_NAMES[0], flag: str = "--data_dir"
) -> SfM:
    """`<name>.pkl` of retrieval-SfM, beside its images `ims/ef/cd/ab/...abcdef`.

    The file is a dict of parts, each of them a dict with `cids` (names of images), `cluster` (a
    number for each), and `qidxs` and `pidxs` (images of the same part). More keys may be there.

    Args:
        data_dir: folder that holds the set.
        part: train or val.
        name: retrieval-SfM-120k or retrieval-SfM-30k.
        flag: for messages.
    Raises:
        UserError: if the file is not there, lacks a key, or its lists do not fit each other.
    Source: Radenovic et al., TPAMI 2019; the layout is that of cnnimageretrieval-pytorch.
    """
    _check_choice(name, SFM_NAMES, flag, "set")
    _check_choice(part, SFM_PARTS, flag, "part")
    path, prefix = _find(Path(data_dir), name, (f"{name}.pkl",), flag)
    whole = _Dict(read_pickle(path, flag), path, flag)
    found = _Dict(whole.get(part), path, flag, f"{part}: ")
    cids = found.names("cids", lambda cid: CID.fullmatch(cid) is not None)
    N = len(cids)
    clusters = found.integers("cluster")
    queries, positives = found.integers("qidxs", N), found.integers("pidxs", N)
    if len(clusters) != N:
        raise found.fault(f"'cluster' has {len(clusters)} numbers for {N} images of 'cids'")
    if len(queries) != len(positives):
        raise found.fault(
            f"'qidxs' has {len(queries)} images and 'pidxs' {len(positives)}; they are pairs"
        )
    paths = [f"{prefix}ims/{cid[-2:]}/{cid[-4:-2]}/{cid[-6:-4]}/{cid}" for cid in cids]
    return SfM(paths, clusters, queries, positives)


# --- Google Landmarks v2 --------------------------------------------------------------------------


def read_gldv2(data_dir: Path, clean: bool = True, flag: str = "--data_dir") -> GLDv2:
    """`train_clean.csv` or `train.csv` of Google Landmarks v2, beside the folder `train` of images
    `train/a/b/c/abc....jpg`, or within that folder.

    The clean list has the columns `landmark_id,images`, a landmark a line, its images separated by
    blanks; the full one `id,url,landmark_id`, an image a line. Labels are numbered anew from 0, in
    order of the landmarks' own numbers.

    Args:
        data_dir: folder that holds `gldv2`, or is it.
        clean: the list.
        flag: for messages.
    Raises:
        UserError: if the file is not there, or naming the first lines that are wrong.
    Source: Weyand et al., CVPR 2020; the clean list is that of Yokoo et al., CVPRW 2020.
    """
    file = "train_clean.csv" if clean else "train.csv"
    path, prefix = _find(Path(data_dir), GLDV2_NAME, (file, f"train/{file}"), flag)
    names, landmarks, lines = (_clean_rows if clean else _all_rows)(path, flag)
    faults: list[str] = []
    first: dict[str, int] = {}
    for i, (name, landmark) in enumerate(zip(names, landmarks, strict=True)):
        where = f"line {lines[i]} has the"
        if not GLDV2_ID.fullmatch(name):
            faults.append(f"{where} image {name[:40]!r}; allowed are letters and digits, 3 or more")
        elif not LANDMARK.fullmatch(landmark):
            faults.append(f"{where} landmark {landmark[:40]!r}; it must be a number")
        elif (known := first.setdefault(name, i)) != i:
            faults.append(f"{where} image {name!r}, which line {lines[known]} has already")
    if not names:
        faults.append("lists no image")
    _raise(path, faults, flag)
    ids, labels = np.unique(np.array(landmarks, dtype=np.int64), return_inverse=True)
    paths = [f"{prefix}train/{name[0]}/{name[1]}/{name[2]}/{name}.jpg" for name in names]
    return GLDv2(paths, labels.astype(np.int64), ids)


Rows = tuple[list[str], list[str], list[int]]  # images, their landmarks, numbers of the lines


def _clean_rows(path: Path, flag: str) -> Rows:
    names, landmarks, numbers = [], [], []
    # no csv module: a landmark's line may be longer than a field of its may be
    (_, header), *lines = read_lines(path, flag) or [(1, "")]
    if [word.strip(' "') for word in header.split(",")] != ["landmark_id", "images"]:
        _raise(path, [f"begins with {header[:60]!r}; it must be 'landmark_id,images'"], flag)
    for number, line in lines:
        landmark, _, listed = line.replace('"', "").partition(",")
        images = listed.split() or [""]
        names += images
        landmarks += [landmark.strip()] * len(images)
        numbers += [number] * len(images)
    return names, landmarks, numbers


def _all_rows(path: Path, flag: str) -> Rows:
    names, landmarks, numbers = [], [], []
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if not {"id", "landmark_id"} <= set(header):
                told = ",".join(header)[:60]
                _raise(path, [f"begins with {told!r}; it must be 'id,url,landmark_id'"], flag)
            at_name, at_landmark = header.index("id"), header.index("landmark_id")
            for row in reader:
                if row:
                    whole = len(row) == len(header)
                    names.append(row[at_name] if whole else ",".join(row))
                    landmarks.append(row[at_landmark] if whole else "")
                    numbers.append(reader.line_num)
    except (OSError, csv.Error) as error:
        raise UserError(f"{flag}={path}: cannot be read: {error}") from error
    return names, landmarks, numbers


def split_gldv2(labels: np.ndarray, val_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images to train with, and images of the same landmarks to validate with.

    Of a landmark's n images, max(1, floor(val_share * n)) validate, drawn at random; a landmark of
    one image trains. So every landmark is trained, each of two images or more is validated, and
    small landmarks give more than their share.

    Args:
        labels: (N,) integers.
        val_share: in (0, 1).
        seed: the same numbers give the same split.
    Returns:
        (train, val): int64 image numbers, each ascending, together all of them.
    Raises:
        ValueError: if val_share is out of range.
    Source: as DELG's training sets are made. Departure: there a single image validates.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"val_share must lie between 0 and 1, got {val_share}")
    labels = np.asarray(labels)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by landmark, each at random
    _, start, n = np.unique(labels[order], return_index=True, return_counts=True)
    # 0.29 * 100 is a little less than 29
    n_val = np.where(n < 2, 0, np.maximum(1, np.floor(val_share * n + 1e-9))).astype(np.int64)
    place = np.arange(len(labels)) - np.repeat(start, n)
    is_val = place < np.repeat(n_val, n)
    return np.sort(order[~is_val]), np.sort(order[is_val])


# --- revisited Oxford and Paris -------------------------------------------------------------------


def read_revisited(data_dir: Path, name: str, flag: str = "--data_dir") -> Revisited:
    """`gnd_<name>.pkl` of revisited Oxford or Paris, beside its images `jpg/<image>.jpg`.

    The file is a dict with `imlist`, `qimlist` (names of images, without their ending), and `gnd`,
    which has for each query `bbx` (left, top, right, bottom) and `easy`, `hard`, `junk`.

    Args:
        data_dir: folder that holds the set.
        name: roxford5k or rparis6k.
        flag: for messages.
    Raises:
        UserError: if the file is not there, lacks a key, its lists do not fit each other, a number
            is out of range, or an image is listed twice for a query.
    Source: Radenovic et al., CVPR 2018; the layout is that of revisitop.
    """
    _check_choice(name, REVISITED_NAMES, flag, "set")
    path, prefix = _find(Path(data_dir), name, (f"gnd_{name}.pkl",), flag)
    found = _Dict(read_pickle(path, flag), path, flag)
    db = found.names("imlist", _is_below)
    queries = found.names("qimlist", _is_below)
    gnd = found.items("gnd")
    if len(gnd) != len(queries):
        raise found.fault(f"'gnd' has {len(gnd)} entries for {len(queries)} queries of 'qimlist'")
    boxes, truth = np.empty((len(gnd), 4)), []
    for q, entry in enumerate(gnd):
        graded = _Dict(entry, path, flag, f"gnd[{q}]: ")
        boxes[q] = _box(graded)
        truth.append({grade: graded.integers(grade, len(db)) for grade in GRADES})
        images, times = np.unique(np.concatenate(list(truth[q].values())), return_counts=True)
        if (times > 1).any():
            image = images[times > 1][0]
            grades = [g for g in GRADES for _ in np.flatnonzero(truth[q][g] == image)]
            raise graded.fault(
                f"image {image} is listed as {' and '.join(grades)}; an image has one grade"
            )
    folder = f"{prefix}jpg"
    return Revisited(
        [f"{folder}/{image}.jpg" for image in queries],
        boxes,
        [f"{folder}/{image}.jpg" for image in db],
        truth,
    )


def read_distractors(data_dir: Path, flag: str = "--data_dir") -> list[str]:
    """Paths of the million images of revisitop1m: `revisitop1m.txt`, a name with its ending
    a line, beside the folder `jpg`.

    Raises:
        UserError: if the list is not there, or naming the first lines that are wrong.
    """
    path, prefix = _find(Path(data_dir), DISTRACTORS_NAME, (f"{DISTRACTORS_NAME}.txt",), flag)
    first: dict[str, int] = {}
    faults = []
    for number, name in read_lines(path, flag):
        if not _is_below(name):
            faults.append(f"line {number} has {name[:60]!r}, which is not below the folder jpg")
        elif first.setdefault(name, number) != number:
            faults.append(f"line {number} has {name[:60]!r} of line {first[name]} again")
    if not first and not faults:
        faults.append("lists no image")
    _raise(path, faults, flag)
    return [f"{prefix}jpg/{name}" for name in first]


def missing_files(paths: Iterable[str], root: Path) -> list[str]:
    """Those of the paths that are no file below `root`, in their order; of millions on a network's
    disk many are asked for at a time."""
    paths = list(paths)

    def missing(start: int) -> list[str]:
        some = paths[start : start + ASKED]
        return [path for path in some if not os.path.isfile(os.path.join(root, path))]

    with ThreadPoolExecutor(ASKING) as pool:
        return [path for part in pool.map(missing, range(0, len(paths), ASKED)) for path in part]


# --- checks ---------------------------------------------------------------------------------------


def _find(data_dir: Path, name: str, files: Sequence[str], flag: str) -> tuple[Path, str]:
    """A set's list, and what its folder adds to paths relative to `data_dir`."""
    for prefix in (f"{name}/", ""):
        for file in files:
            if (data_dir / prefix / file).is_file():
                return data_dir / prefix / file, prefix
    raise UserError(
        f"{flag}={data_dir}: has neither {name}/{files[0]} nor {files[0]}; put the set's list "
        "there, named as its authors name it"
    )


def _check_choice(value: str, allowed: Sequence[str], flag: str, what: str) -> None:
    if value not in allowed:
        raise UserError(f"{flag}: there is no {what} {value!r}; allowed are {', '.join(allowed)}")


def _raise(path: Path, faults: list[str], flag: str) -> None:
    if faults:
        more = f"; {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(f"{flag}={path}: {'; '.join(faults[:SHOWN])}{more}")


def _is_below(name: str) -> bool:
    """Whether a name, taken as a path, lies below its folder."""
    odd = "\0" in name or "\\" in name
    return not odd and all(part not in ("", ".", "..") for part in name.split("/"))


class _Dict:
    """A dict of a file, which says what is wrong with its entries.

    Raises:
        UserError: everywhere.
    """

    def __init__(self, value: object, path: Path, flag: str, where: str = "") -> None:
        self.path, self.flag, self.where = path, flag, where
        if not isinstance(value, dict):
            raise self.fault(f"is of type {type(value).__name__}; it must be a dict")
        self.value = value

    def fault(self, text: str) -> UserError:
        return UserError(f"{self.flag}={self.path}: {self.where}{text}")

    def get(self, key: str) -> object:
        if key not in self.value:
            told = sorted(k[:40] for k in self.value if isinstance(k, str))
            has = ", ".join(told[:12]) or "nothing"
            raise self.fault(f"{key!r} is missing; there are {has}")
        return self.value[key]

    def items(self, key: str) -> list:
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.ndim != 1:
            raise self.fault(f"{key!r} is an array of {value.ndim} dimensions; it must be a list")
        if isinstance(value, (tuple, np.ndarray)):
            value = list(value)
        if not isinstance(value, list):
            raise self.fault(f"{key!r} is of type {type(value).__name__}; it must be a list")
        return value

    def names(self, key: str, is_name: Callable[[str], bool]) -> list[str]:
        """Names of images, one at least."""
        listed = self.items(key)
        good = [isinstance(name, str) and is_name(name) for name in listed]
        if not all(good) or not listed:
            told = "it is empty"
            if listed:
                name = listed[good.index(False)]
                shown = repr(name[:40]) if isinstance(name, str) else f"a {type(name).__name__}"
                told = f"number {good.index(False)} is {shown}"
            raise self.fault(f"{key!r} must be names of images; {told}")
        return [str(name) for name in listed]

    def integers(self, key: str, n: int | None = None) -> np.ndarray:
        """A list of integers, in [0, n) if n is told -> (len,) int64."""
        listed = self.items(key)
        # before an array is made of it: nested lists ask for much memory
        good = all(type(x) is int or isinstance(x, np.integer) for x in listed)  # no bool
        values = np.array(listed if good else [], dtype=None if listed and good else np.int64)
        if not good or not np.can_cast(values.dtype, np.int64):  # not what has more bits
            raise self.fault(f"{key!r} must be a list of integers")
        if n is not None and ((values < 0) | (values >= n)).any():
            outside = values[(values < 0) | (values >= n)][0]
            raise self.fault(f"{key!r} has the image {outside}; allowed is 0 to {n - 1}")
        return values.astype(np.int64)


def _box(entry: _Dict) -> np.ndarray:
    """(4,) float64."""
    listed = entry.items("bbx")
    real = (int, float, np.integer, np.floating)
    try:
        if len(listed) != 4 or not all(isinstance(x, real) for x in listed):
            raise TypeError
        box = np.array([float(x) for x in listed])
    except (OverflowError, TypeError):
        raise entry.fault("'bbx' must be 4 numbers: left, top, right, bottom") from None
    if not np.isfinite(box).all() or (box[:2] >= box[2:]).any():
        raise entry.fault(
            f"'bbx' is {box.tolist()}; it must be left, top, right, bottom, with left < right and "
            "top < bottom"
        )
    return box
