"""--dataset: from files to images, labels and roles, in memory or on disk."""

import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.augment import CROP_JITTER
from data.landmark_batches import (
    LANDMARK_SETS,
    DecodedSquares,
    load_landmarks,
    pairs_among,
    square_side,
)
from data.manifest import Split
from data.protocols import held_out
from data.splits import cifar_pool, load_split, split_cifar, with_labels
from data.store import Faults, RowStore, store_images
from utils.distributed import Ranks
from utils.errors import UserError

SHOWN_FAULTS = 5
# of the memory, what each of trained images, queries and database may take; more is read as it is
# needed, and the system keeps of it what there is room for
MEMORY_SHARE = 0.25
CGROUPS = Path("/sys/fs/cgroup")

Images = Tensor | RowStore | DecodedSquares  # uint8 (N, 3, side, side); indexed by rows


@dataclass(frozen=True)
class DataSet:
    """A data set as a training takes it.

    Attributes:
        split: names, labels, roles, as the flags ask for them.
        used: the same without the images that could not be read.
        train: images to train on, without labels.
        labelled: images whose labels are trained on, and these; None with an unsupervised method.
        query, db: images and labels of the two sides; None where there are no labels.
        rows: of `split.listing`, for each of the roles train, query, database that has images here.
        left_out: how many images of the split could not be read.
        pairs: (P, 2) places in `train` of a query and a positive, where the set names such.
    """

    split: Split
    used: Split
    train: Images
    labelled: tuple[Images, Tensor] | None
    query: tuple[Images, Tensor] | None
    db: tuple[Images, Tensor] | None
    rows: Mapping[str, Tensor]
    left_out: int
    pairs: Tensor | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in order of the labels."""
        return self.split.listing.classes


def load_dataset(args: Namespace, device: torch.device, semi: bool = False) -> DataSet:
    """The set that the flags ask for.

    CIFAR's images are held as they are. All others are decoded once and squeezed to --input_size
    in a store below --cache_dir; from there they go into memory, and those that are trained on to
    the device, if they take at most MEMORY_SHARE of it, and stay on disk otherwise. Landmarks stay
    in their files, and are decoded for each batch.

    Args:
        args: dataset, data_dir, image_dir, protocol, split, split_seed, if_download, validate,
            skip_missing, input_size, cache_dir, num_workers, max_pixels, limit_train, limit_db,
            limit_query, cached_views, eval_only; and labels_per_class if `semi`.
        device: that trains.
        semi: for a semi-supervised method, which sees the labels of some images
            (`data.protocols.semi_supervised`).
    Raises:
        UserError: if files are missing or damaged (without --skip_missing), or nothing is left.
    """
    if args.dataset in LANDMARK_SETS:
        return _load_landmarks(args)
    faults: Faults = []
    cpu = torch.device("cpu")
    if args.dataset.startswith("cifar"):
        images, split = _load_cifar(args)
    else:
        split = load_split(args)
    if semi:
        split = with_labels(split, args.labels_per_class, args.split_seed)
    wanted = (*_used_roles(split), *(["labelled"] if semi else []))
    if not args.dataset.startswith("cifar"):
        root = args.image_dir or args.data_dir
        names = split.listing.names
        images, faults = store_images(
            args.cache_dir, root, names, args.input_size, args.num_workers, args.max_pixels
        )
    used = _without(split, faults, args, images.path.parent) if faults else split
    roles = used.roles
    if "query" not in wanted:
        for flag in ("eval_only", "validate"):
            if getattr(args, flag):
                raise UserError(
                    f"--{flag}: this split has no labels to score with; a folder that has a folder "
                    "for each class takes --protocol=class-folders"
                )
    if args.validate:
        fixed = args.dataset.startswith("cifar") and split.protocol == "spq"
        roles = held_out(roles, split.listing.labels, None if fixed else args.split_seed)
    for role in wanted:
        if role not in roles or not len(roles[role]):
            raise UserError(f"--data_dir={args.data_dir}: no image is left for the role {role}")

    trained = roles["train"][: args.limit_train]
    known = roles["labelled"][: args.limit_train] if semi else None
    on_disk = args.cached_views and isinstance(images, RowStore)  # each is looked at once

    def hold_some(rows: Tensor, place: torch.device) -> Images:
        return images.part(rows) if on_disk else hold(images, rows, place)

    train, labelled = hold_some(trained, device), None
    if semi:
        labelled = hold_some(known, device), split.listing.labels[known].to(device)
    chosen = {"train": trained}
    if "query" not in wanted:
        return DataSet(split, used, train, labelled, None, None, chosen, len(faults))
    chosen["query"] = roles["query"][: args.limit_query]
    chosen["database"] = roles["database"][: args.limit_db]
    sides = []
    for rows in (chosen["query"], chosen["database"]):
        shared = torch.equal(rows, trained) and (isinstance(train, RowStore) or not train.is_cuda)
        held = train if shared else hold_some(rows, cpu)
        sides.append((held, split.listing.labels[rows]))
    return DataSet(split, used, train, labelled, *sides, chosen, len(faults))


def _load_landmarks(args: Namespace) -> DataSet:
    found = load_landmarks(args)
    listing, rows = found.split.listing, found.present()[: args.limit_train]
    side = args.input_size
    if args.augmentation == CROP_JITTER:
        side = square_side(max(args.crop_size, args.early_crop_size), args.crop_min_area)
    names = [listing.names[row] for row in rows.tolist()]
    images = DecodedSquares(args.data_dir, names, side, args.num_workers, args.max_pixels)
    pairs = None
    if found.pairs is not None:
        pairs = pairs_among(found.pairs, rows, len(listing.names))
    chosen = {"train": rows}
    return DataSet(found.split, found.used, images, None, None, None, chosen, found.left_out, pairs)


def load_all(args: Namespace) -> tuple[Images, Split, Tensor]:
    """All images of a set, as its listing has them, whatever they are for; and the rows of those
    that could not be read, which are black.

    Args:
        args: as for `load_dataset`, without limits.
    Raises:
        UserError: if files are missing or damaged (without --skip_missing).
    """
    if args.dataset.startswith("cifar"):
        return *_load_cifar(args), torch.empty(0, dtype=torch.int64)
    split = load_split(args)
    root, names = args.image_dir or args.data_dir, split.listing.names
    images, faults = store_images(
        args.cache_dir, root, names, args.input_size, args.num_workers, args.max_pixels
    )
    if faults:
        _without(split, faults, args, images.path.parent)
    bad = {name for name, _ in faults}
    return images, split, torch.tensor([name in bad for name in names]).nonzero()[:, 0]


def _used_roles(split: Split) -> tuple[str, ...]:
    """The roles that must have images."""
    asked = [role for role in ("query", "database") if len(split.roles.get(role, ()))]
    return ("train", "query", "database") if asked else ("train",)


def _load_cifar(args: Namespace) -> tuple[Tensor, Split]:
    pool = cifar_pool(args)
    if args.split is None:
        protocol = args.protocol or "spq"
        return pool.images, split_cifar(args.dataset, pool.labels, protocol, args.split_seed)
    split = load_split(args)
    if not torch.equal(split.listing.labels, pool.labels):
        raise UserError(f"--split={args.split}: its labels are not those of {args.dataset}")
    return pool.images, split


def _without(split: Split, faults: Faults, args: Namespace, store: Path) -> Split:
    """The split without images that could not be read.

    Raises:
        UserError: without --skip_missing.
    """
    told = [f"  {name!r} {reason}" for name, reason in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        told.append(f"  and {len(faults) - SHOWN_FAULTS} more")
    count = f"{len(faults)} of {len(split.listing.names)} images cannot be read"
    if not args.skip_missing:
        root = args.image_dir or args.data_dir
        advice = f"--skip_missing goes on without them; once they are mended, delete {store}"
        raise UserError("\n".join([f"{count} below {root}:", *told, advice]))
    if Ranks.from_environment().is_main:
        advice = f"once they are mended, delete {store}"
        print("\n".join([f"{count}, and are left out:", *told, advice]))
    bad = {name for name, _ in faults}
    good = torch.tensor([name not in bad for name in split.listing.names])
    roles = {role: rows[good[rows]] for role, rows in split.roles.items()}
    return Split(split.dataset, split.protocol, split.seed, split.listing, roles)


def hold(images: Images, rows: Tensor | None, device: torch.device) -> Images:
    """Some of the rows (None: all) where there is room: on the device, in memory, or on disk."""
    if rows is None or (len(rows) == len(images) and torch.equal(rows, torch.arange(len(images)))):
        chosen: Images = images
    else:
        chosen = images.part(rows) if isinstance(images, RowStore) else images[rows]
    if isinstance(chosen, RowStore):
        if chosen.nbytes > MEMORY_SHARE * _memory(torch.device("cpu")):
            return chosen
        chosen = chosen[:]
    if chosen.nbytes > MEMORY_SHARE * _memory(device):
        return chosen
    return chosen.to(device)


def _memory(device: torch.device) -> int:
    """Bytes of the device's memory that are free; or of the machine's, what this process may use of
    them beside the others that torchrun started."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, *_cgroup_limits()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _cgroup_limits(own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes of memory that containers and job schedulers allow; of Linux's control groups."""
    limits = [sys.maxsize]
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # another system
        return limits
    for _, controllers, place in lines:
        if controllers == "":  # version 2
            root, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(place.strip("/"))
        for folder in (group, *group.parents):  # a limit holds for all below
            try:
                limits.append(int((root / folder / name).read_text()))
            except (OSError, ValueError):  # no such file, or "max"
                continue
    return limits
