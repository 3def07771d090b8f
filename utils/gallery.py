"""What a gallery network leaves for SSP: its features of a set, and anchors made of such features.

Both are .safetensors files with a header that says what they are of; features may also come as a
plain .npy array. Neither can run code.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.unpickle import read_pickle

FEATURES, ANCHORS = "gallery-features", "gallery-anchors"
PICKLES = (".pkl", ".pickle")
LEAST_LENGTH = 1e-12  # of a feature: shorter ones have no direction


@dataclass(frozen=True)
class Gallery:
    """Embeddings of all images of a set by a gallery network.

    Attributes:
        features: (N, D) float32 of unit length, a row for each image of the set's listing.
        names_sha256: `identify_names` of that listing; None of a file that does not tell.
        network: what made them, in words, `identity_of` it at the end.
        dataset: of the images, "cifar10"; None of a file that does not tell.
        tells_network: whether `network` is one's; an array has its file's name and a hash.
        input_size: side of the squares that were embedded, pixels; None: it is not known, or
            images were taken as they are.
    """

    features: Tensor
    names_sha256: str | None
    network: str
    dataset: str | None = None
    tells_network: bool = True
    input_size: int | None = None


def identity_of(network: str) -> str:
    """What tells a network from others: the 16 hex digits that end its words, or else all of it."""
    last = network.rpartition(" ")[2]
    return last if re.fullmatch(r"[0-9a-f]{16}", last) else network


def identify_names(names: Sequence[str]) -> str:
    """SHA-256 of the names of a set's images, in their order."""
    joined = "\0".join(names).encode(errors="surrogateescape")  # of names that are not UTF-8
    return hashlib.sha256(joined).hexdigest()


def check_writable(path: Path, flag: str = "--output") -> None:
    """What takes hours to make is not found to have no place at the end.

    Raises:
        UserError: if no file can be written there.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be written: {error}; name another file") from error


def write_gallery(path: Path, gallery: Gallery) -> None:
    """Write features, whole or not at all.

    Raises:
        OSError: if they cannot be written; an old file stays.
    """
    about = {"format": FEATURES}
    if gallery.tells_network:
        about["network"] = gallery.network
    if gallery.names_sha256 is not None:
        about["names_sha256"] = gallery.names_sha256
    if gallery.dataset is not None:
        about["dataset"] = gallery.dataset
    if gallery.input_size is not None:
        about["input_size"] = str(gallery.input_size)
    _write(path, {"features": gallery.features}, about)


def read_gallery(
    path: Path,
    names: Sequence[str] | None = None,
    dataset: str | None = None,
    flag: str = "--features",
    rows: Tensor | Literal["known"] | None = None,
) -> Gallery:
    """Read the features of a set, and check that they are of that set.

    Args:
        path: .safetensors of `write_gallery`; or .npy, or .pkl of such an array, (N, D), whose rows
            are taken to be in the order of the names.
        names: of the set's images; None: of whatever set.
        dataset: the set, as images of several have the same names; None: whatever set.
        flag: for messages.
        rows: (n,), those that are used, and alone must be features; "known": all but those of NaN,
            which stand for images that could not be read; None: all.
    Raises:
        UserError: if there is no such file, or it is of other images, or holds what is no feature.
    """
    if path.suffix == ".npy":
        try:
            features = torch.from_numpy(np.load(path, allow_pickle=False))
        except (EOFError, MemoryError, OSError, TypeError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(f"{flag}={path}: cannot be read as an array ({detail})") from error
        about: Mapping[str, str] = {}
    elif path.suffix in PICKLES:
        features, about = _array_of(path, flag), {}
    else:
        features, about = _read(path, FEATURES, flag)
    if features.dim() != 2 or not features.is_floating_point() or not features.numel():
        raise UserError(
            f"{flag}={path}: holds {tuple(features.shape)} numbers of {features.dtype}; allowed "
            "are features (N, D) of floating point"
        )
    known = about.get("names_sha256")
    of_set = about.get("dataset")
    fits = names is None or (len(features) == len(names) and known in (None, identify_names(names)))
    if not fits or (dataset is not None and of_set not in (None, dataset)):
        told = f" of {of_set}" if of_set else ""
        raise UserError(
            f"{flag}={path}: is of {len(features)} other images{told}; this set has "
            f"{len(features if names is None else names)}. Make features of it with "
            "extract_features.py and the same --dataset and --data_dir"
        )
    features = features.float()
    network = about.get("network")
    told = network or f"{path.name} {_identify(features)}"
    length = torch.linalg.vector_norm(features, dim=1)
    if isinstance(rows, str):
        rows = (~features.isnan().all(dim=1)).nonzero()[:, 0]
    used = torch.ones(len(features), dtype=torch.bool)
    if rows is not None:
        used = ~used
        used[rows] = True
    for wrong, what in (
        (~length.isfinite(), "a feature that is not finite"),
        (length < LEAST_LENGTH, "a feature 0"),
    ):
        if (wrong & used).any():
            row = int((wrong & used).nonzero()[0])
            image = row if names is None else f"{row}, {names[row]!r},"
            raise UserError(f"{flag}={path}: image {image} has {what}; make its features again")
    side = about.get("input_size", "")
    size = int(side) if re.fullmatch(r"[1-9][0-9]{0,5}", side) else None
    # of unit length but for rounding; other networks' files are brought to it
    return Gallery(F.normalize(features), known, told, of_set, network is not None, size)


def _identify(features: Tensor) -> str:
    """16 hex digits of a SHA-256 over features (N, D) float32."""
    return hashlib.sha256(features.contiguous().numpy()).hexdigest()[:16]


def _array_of(path: Path, flag: str) -> Tensor:
    """The one array (N, D) of a pickle: itself, or a value of a dictionary, read without running
    code from it."""
    found = read_pickle(path, flag)
    values = list(found.values()) if isinstance(found, dict) else [found]
    arrays = [
        v for v in values if isinstance(v, np.ndarray) and v.ndim == 2 and v.dtype.kind == "f"
    ]
    if len(arrays) != 1:
        raise UserError(
            f"{flag}={path}: holds {len(arrays)} arrays (N, D) of floating point; allowed is one, "
            "as it is or in a dictionary"
        )
    # a copy that is aligned, in this machine's order of bytes, and may be written to
    return torch.from_numpy(arrays[0].astype(arrays[0].dtype.newbyteorder("=")))


def write_anchors(path: Path, anchors: Tensor, made_of: str, network: str | None = None) -> None:
    """Write anchors (M, K, d), whole or not at all.

    Args:
        made_of: in words.
        network: in whose space they are, as `Gallery.network`; None: it is not known.
    Raises:
        OSError: if they cannot be written; an old file stays.
    """
    about = {"format": ANCHORS, "made_of": made_of}
    if network is not None:
        about["network"] = network
    _write(path, {"anchors": anchors}, about)


def read_anchors(path: Path, D: int, network: str | None = None, flag: str = "--anchors") -> Tensor:
    """Read anchors (M, K, d) float32 for features of D = M * d dimensions.

    Args:
        network: that made the features, as `Gallery.network`; None: it is not known, and may be
            that of the anchors.
    Raises:
        UserError: if there is no such file, or the anchors do not fit the features.
    """
    anchors, about = _read(path, ANCHORS, flag)
    if anchors.dim() != 3 or not anchors.numel() or not anchors.isfinite().all():
        raise UserError(f"{flag}={path}: holds no anchors (M, K, d)")
    M, _, d = anchors.shape
    if M * d != D:
        raise UserError(
            f"{flag}={path}: {M} codebooks of {d} dimensions are for features of {M * d}, and "
            f"these have {D}; make others with make_anchors.py and these --features"
        )
    own = about.get("network")
    if network is not None and own is not None and identity_of(own) != identity_of(network):
        raise UserError(
            f"{flag}={path}: are in the space of {own}, and the features are by {network}; make "
            "others with make_anchors.py and features by that network"
        )
    return anchors.float()


def train_anchors(
    features: Tensor,
    M: int,
    bits: int,
    iterations: int = 10,
    restarts: int = 2,
    max_points: int = 1000,
    seed: int = 0,
) -> Tensor:
    """Anchors: the centroids of a product quantizer, scaled to unit length.

        anchors[m] = k-means of the m-th slices of the features, K = 2^bits centroids,
                     each divided by its L2 norm

    Args:
        features: (N, D) float32, D = M * d.
        M: subspaces.
        bits: log2 of the anchors in each.
        iterations, restarts: of k-means; the best restart is kept.
        max_points: features a centroid that k-means looks at, drawn at random of more.
        seed: of k-means.
    Returns:
        (M, K, d) float32.
    Raises:
        UserError: if D is no multiple of M, or there are fewer features than centroids.
    Source: SSP, section III; its released settings are the defaults, with M = 32 and 8 bits.
        Departures: make_anchors.py gives it all rows of its file, those of queries and of the
        database too, if the file has them.
    """
    import faiss  # here: who trains on anchors that are there already does not need it

    N, D = features.shape
    if D % M:
        fitting = [m for m in range(1, D + 1) if D % m == 0]
        near = min(fitting, key=lambda m: abs(m - M))
        raise UserError(f"--M={M}: does not divide the features' {D} dimensions; {near} does")
    if N < 2**bits:
        raise UserError(
            f"--bits={bits}: {2**bits} anchors need as many features, and there are {N}; allowed "
            f"are up to {N.bit_length() - 1} bits"
        )
    quantizer = faiss.ProductQuantizer(D, M, bits)
    quantizer.cp.niter, quantizer.cp.nredo = iterations, restarts
    quantizer.cp.max_points_per_centroid, quantizer.cp.min_points_per_centroid = max_points, 1
    quantizer.cp.seed = seed
    quantizer.train(np.ascontiguousarray(features.numpy(), dtype=np.float32))
    centroids = faiss.vector_to_array(quantizer.centroids).reshape(M, 2**bits, D // M)
    return F.normalize(torch.from_numpy(centroids), dim=-1)


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """A classifier of the gallery's space: the mean feature of each class, scaled to unit length.

        w[c] = mean of features[n] over labels[n] = c,  divided by its L2 norm

    Args:
        features: (N, D).
        labels: (N,) class numbers.
        classes: C.
    Returns:
        (C, D); 0 for a class without an image.
    Source: stands for the gallery network's own classifier, which SSP's comparison with HVS and LCE
        takes; one trained with the features would be that (Departure).
    """
    sums = features.new_zeros(classes, features.shape[1])
    sums.index_add_(0, labels.to(features.device), features)
    return F.normalize(sums, dim=-1)


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, about)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"could not write {path}: {error}") from error  # safetensors has its own


def _read(path: Path, kind: str, flag: str) -> tuple[Tensor, Mapping[str, str]]:
    """The tensor of such a file, and its header."""
    from safetensors import safe_open

    name, maker = {
        FEATURES: ("features", "extract_features.py"),
        ANCHORS: ("anchors", "make_anchors.py"),
    }[kind]
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != kind:
                raise UserError(f"{flag}={path}: is not what {maker} writes")
            return file.get_tensor(name), about
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{flag}={path}: no such file; {maker} makes it") from None
    except Exception as error:  # safetensors raises an exception of its own, and OSError
        raise UserError(
            f"{flag}={path}: cannot be read ({error}); {maker} writes such files"
        ) from error
