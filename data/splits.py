"""What --dataset and --protocol mean: which images there are, their labels, and what each is for.

    python -m data.splits make --dataset=flickr25k --data_dir=datasets/flickr25k --output=my.split
    python -m data.splits make --dataset=cifar10 --protocol=gpq --labels_per_class=50 \\
        --data_dir=datasets --output=50.split
    python -m data.splits check my.split --data_dir=datasets/flickr25k

`make` writes the split as a file (`data.manifest`), `check` compares a file with the images.
"""

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.cifar10 import CLASSES as CIFAR10_CLASSES
from data.cifar10 import LabelledImages, load_cifar10
from data.cifar100 import load_cifar100
from data.images import Files, ImageError, open_images
from data.lists import Listing, read_images_and_targets, read_label_list, read_mirflickr
from data.manifest import Roles, Split, read_split, write_split
from data.protocols import at_random, gpq, per_class, semi_supervised
from utils.errors import UserError
from utils.flags import number

# --protocol, the paper's first
PROTOCOLS = {
    "cifar10": ("spq", "I", "II", "59k", "gpq"),
    "cifar100": ("spq", "I", "II"),
    "flickr25k": ("spq", "38-labels"),
    "nuswide": ("100-500",),
    "folder": ("all", "class-folders"),
    "lists": ("lists",),
}
DATASETS = tuple(PROTOCOLS)
CIFAR = ("cifar10", "cifar100")
FIXED = "lists"  # the protocol of lists that say themselves what an image is for
UNLABELLED = "all"  # the protocol of a folder: everything is trained on, nothing evaluated
TOP_N = {"flickr25k": 5000, "nuswide": 5000}  # the papers'; 1000 for all others
UNKNOWN = ("unlabelled", "unlabeled")  # class folders of images whose class is not known
LIST_FILES = {"train": "train.txt", "query": "test.txt", "database": "database.txt"}
# above class folders, as many sets are handed out
PART_FOLDERS = ({"train", "test"}, {"train", "val"}, {"train", "val", "test"})
SHOWN = 5

PROTOCOL_HELP = (
    "cifar10 and cifar100: spq, the training images are trained on and the database, the test "
    "images the queries; I, 1,000 queries a class (cifar100: 100), the others trained on and the "
    "database; II, the same, 500 a class (cifar100: 50) trained on; 59k, 100 queries and 500 "
    "trained on a class, all but the queries the database; gpq, that paper's. flickr25k: spq, "
    "2,000 queries, 5,000 of the others trained on; 38-labels, the same with the relevant labels "
    "as labels of their own. nuswide: 100-500, 100 queries and 500 trained on for each label, of "
    "the images that have one. folder: all, trained on without labels; class-folders, the first "
    "folder of a path is its class, a tenth of each are queries (where the first folders are train "
    "and test, or val, the second one, and all below test, or val, are); images in unlabelled/ "
    "have no class and are only trained on. A folder with train.txt, "
    "test.txt and database.txt has "
    "its split already, and needs none of these"
)


def load_split(args: Namespace) -> Split:
    """The split that the flags ask for.

    Args:
        args: dataset, data_dir, image_dir (None: data_dir), protocol (None: the paper's),
            split_seed, split (a file, or None), if_download.
    Raises:
        UserError: if files are missing or damaged, or contradict each other or the flags.
    """
    if args.split is not None:
        split = read_split(args.split)
        if split.dataset != args.dataset:
            raise UserError(
                f"--split={args.split}: is of {split.dataset}; allowed is --dataset={split.dataset}"
            )
        return split
    if not (args.dataset in CIFAR or args.data_dir.is_dir()):
        raise UserError(f"--data_dir={args.data_dir}: is not a folder")
    split = _SPLITS[args.dataset](args)
    labels = split.listing.labels
    if split.listing.multilabel and not labels[split.roles["query"]].any():
        raise UserError(
            f"--data_dir={args.data_dir}: all labels of the {len(split.roles['query'])} queries "
            "are 0, so nothing could be scored"
        )
    return split


def with_labels(split: Split, labels_per_class: int | None, seed: int) -> Split:
    """The split of a semi-supervised method: what is labelled stands in it, see
    `data.protocols.semi_supervised`.

    Args:
        split: what its roles are without that.
        labels_per_class: labelled images of each class (default: all that there are).
        seed: of which ones, where the split has neither a seed nor the role `labelled`, of which
            the first of each class are taken.
    Raises:
        UserError: if there are no labels, or too few images.
    """
    if len(split.listing.classes) < 2:
        raise UserError(
            f"--dataset={split.dataset}: its split ({split.protocol}) has no labels, and some are "
            "needed here; allowed are --protocol=class-folders, where the images lie in a folder "
            "for each class, and --dataset=lists"
        )
    drawn = None
    if labels_per_class is not None and "labelled" not in split.roles:
        drawn = seed if split.seed is None else split.seed
    roles = semi_supervised(split.roles, split.listing.labels, labels_per_class, drawn)
    return replace(split, roles=roles, seed=split.seed if drawn is None else drawn)


def _protocol(args: Namespace) -> str:
    return args.protocol or PROTOCOLS[args.dataset][0]


# --- the sets -----------------------------------------------------------------------------------


def cifar_pool(args: Namespace) -> LabelledImages:
    """The training images of CIFAR-10 or CIFAR-100, then the test images."""
    load = {"cifar10": load_cifar10, "cifar100": load_cifar100}[args.dataset]
    train, test = load(args.data_dir, download=args.if_download)
    pooled = (torch.cat(pair) for pair in zip(train, test, strict=True))
    return LabelledImages(*pooled)


def _cifar_split(args: Namespace) -> Split:
    labels = cifar_pool(args).labels
    return split_cifar(args.dataset, labels, _protocol(args), args.split_seed)


def split_cifar(dataset: str, labels: Tensor, protocol: str, seed: int) -> Split:
    """One of CIFAR's protocols over the pooled labels: training images first, a sixth test images.

    Source: SPQ, section 4.1 (spq); the protocols I and II of Yang et al. 2018, as MeCoQ's code has
    them; DeepHash's "cifar10" (59k); GPQ, section 4.1 (gpq).
    """
    n, C = len(labels) * 5 // 6, int(labels.max()) + 1
    names = [f"train/{i:05d}.png" for i in range(n)]
    names += [f"test/{i:05d}.png" for i in range(len(labels) - n)]
    rows, a_class = torch.arange(len(labels)), len(labels) // C
    sixth, twelfth = a_class // 6, a_class // 12
    used = None if protocol in ("spq", "gpq") else seed
    if protocol == "spq":
        roles = {"train": rows[:n], "query": rows[n:], "database": rows[:n]}
    elif protocol == "gpq":
        roles = gpq(labels, labelled=twelfth)
    elif protocol == "59k":
        roles = per_class(labels, a_class // 60, twelfth, seed)
    else:
        roles = per_class(labels, sixth, None if protocol == "I" else twelfth, seed)
    classes = CIFAR10_CLASSES if dataset == "cifar10" else tuple(f"class {c}" for c in range(C))
    return Split(dataset, protocol, used, Listing(names, labels, classes), roles)


def _flickr25k_split(args: Namespace) -> Split:
    """MIRFLICKR's own files, `img.txt` with `targets.txt`, or three lists."""
    folder, protocol = args.data_dir, _protocol(args)
    has_lists, has_targets = _has_lists(folder), (folder / "img.txt").is_file()
    if protocol != "spq" and (has_lists or has_targets):
        raise UserError(
            f"--protocol={protocol}: needs MIRFLICKR's annotation files, and {folder} has "
            f"{'train.txt and test.txt' if has_lists else 'img.txt and targets.txt'}, with labels "
            "of their own; leave the flag away, or name another --data_dir"
        )
    if has_lists:
        return _lists_split(args)
    if has_targets:
        listing = _images_and_targets(args)
    else:
        listing = read_mirflickr(folder, relevant=protocol == "38-labels", root=args.image_dir)
    N, queries, trained = len(listing.names), 2000, 5000  # of 25,000
    if 2 * (queries + trained) > N:  # a part of the set, for a trial
        queries, trained = max(1, N * 2 // 25), max(1, N // 5)
        protocol = f"{protocol}-in-proportion"
    roles = at_random(N, queries, trained, args.split_seed)
    return Split("flickr25k", protocol, args.split_seed, listing, roles)


def _nuswide_split(args: Namespace) -> Split:
    """The three lists that are passed around, or a random split of `img.txt` and `targets.txt`."""
    folder = args.data_dir
    if _has_lists(folder):
        return _lists_split(args)
    if not (folder / "img.txt").is_file():
        raise UserError(
            f"--data_dir={folder}: has neither train.txt, test.txt and database.txt (lines of a "
            "path and 0 or 1 for each label) nor img.txt and targets.txt"
        )
    listing = _images_and_targets(args)
    some = listing.labels.any(dim=1).nonzero()[:, 0]  # the set is images with one of its labels
    names = [listing.names[row] for row in some.tolist()]
    listing = Listing(names, listing.labels[some], listing.classes)
    roles = per_class(listing.labels, 100, 500, args.split_seed)
    return Split("nuswide", _protocol(args), args.split_seed, listing, roles)


def _images_and_targets(args: Namespace) -> Listing:
    images, targets = args.data_dir / "img.txt", args.data_dir / "targets.txt"
    return read_images_and_targets(images, targets, root=args.image_dir)


def _has_lists(folder: Path) -> bool:
    return all((folder / LIST_FILES[role]).is_file() for role in ("train", "query"))


def _lists_split(args: Namespace) -> Split:
    """`train.txt`, `test.txt` (the queries) and `database.txt`; without that one, what is trained
    on is the database."""
    if not _has_lists(args.data_dir):
        raise UserError(
            f"--data_dir={args.data_dir}: needs train.txt, test.txt (the queries) and, where it is "
            "not train.txt, database.txt; a line is a path and its labels, 0 or 1 each, or a path "
            "and a class number"
        )
    files = {role: args.data_dir / name for role, name in LIST_FILES.items()}
    if not files["database"].is_file():
        files["database"] = files["train"]
    listings = {role: read_label_list(path, root=args.image_dir) for role, path in files.items()}
    return join_lists(args.dataset, listings, args.data_dir)


def join_lists(dataset: str, listings: dict[str, Listing], folder: Path) -> Split:
    """One listing of several, each image once.

    Raises:
        UserError: if they disagree on what labels there are, or on an image's.
    """
    if len({tuple(listing.labels.shape[1:]) for listing in listings.values()}) > 1:
        told = ", ".join(
            f"{role}: {x.labels.shape[1] if x.multilabel else 'a class'}"
            for role, x in listings.items()
        )
        raise UserError(f"--data_dir={folder}: its lists have different labels ({told})")
    row_of: dict[str, int] = {}
    labels: list[Tensor] = []
    roles: dict[str, Tensor] = {}
    for role, listing in listings.items():
        rows = []
        for name, label in zip(listing.names, listing.labels, strict=True):
            row = row_of.setdefault(name, len(row_of))
            if row == len(labels):
                labels.append(label)
            elif not torch.equal(labels[row], label):
                raise UserError(f"--data_dir={folder}: {name!r} has two different sets of labels")
            rows.append(row)
        roles[role] = torch.tensor(rows).sort().values
    classes = max((listing.classes for listing in listings.values()), key=len)
    return Split(dataset, FIXED, None, Listing(list(row_of), torch.stack(labels), classes), roles)


def _folder_split(args: Namespace) -> Split:
    """A person's own pictures: all are trained on. By `class-folders` the first folder of a path is
    its class, and a tenth of each class are queries; or, below `train` and `test` (or `val`), the
    second one, and the images below `test` are. What lies in `unlabelled` is trained on alone."""
    source = open_images(str(args.data_dir), args.data_dir, flag="--data_dir")
    if source.faults:
        name, reason = source.faults[0]
        raise UserError(
            f"--data_dir={args.data_dir}: {len(source.faults)} folders cannot be read, {name!r} "
            f"for one ({reason}); make them readable, or move them away"
        )
    names = [name.replace(os.sep, "/") for name in source.names]
    if _protocol(args) == UNLABELLED:
        labels, classes = torch.zeros(len(names), dtype=torch.int64), ("image",)
        roles = {"train": torch.arange(len(names))}
        return Split("folder", UNLABELLED, None, Listing(names, labels, classes), roles)
    return _class_folders(names, args)


def _class_folders(names: list[str], args: Namespace) -> Split:
    tops = {name.partition("/")[0] for name in names if "/" in name}
    parted = tops in PART_FOLDERS
    inner = [name.partition("/")[2] if parted else name for name in names]
    loose = [name for name, rest in zip(names, inner, strict=True) if "/" not in rest]
    if loose:
        raise UserError(
            f"--protocol=class-folders: {len(loose)} images lie in no class folder, {loose[0]!r} "
            f"for one; move them into one ({UNKNOWN[0]}/ if their class is not known), or train "
            "without labels by main_SPQ.py --protocol=all"
        )
    mine = [rest.partition("/")[0] for rest in inner]
    classes = tuple(sorted({*mine} - {*UNKNOWN}))
    if len(classes) < 2:
        where = classes[0] if classes else UNKNOWN[0]
        raise UserError(
            f"--protocol=class-folders: all images lie in {where!r}, and needed are two "
            "classes; name the folder of the class folders, or train without labels by main_SPQ.py "
            "--protocol=all"
        )
    number = {name: c for c, name in enumerate(classes)}
    labels = torch.tensor([number.get(name, -1) for name in mine])
    known = labels >= 0
    if not known.all():  # a class number each, or for some none: rows of 0 and 1
        labels = (labels[:, None] == torch.arange(len(classes))).to(torch.uint8)
    listing = Listing(names, labels, classes)
    if parted:
        top = [name.partition("/")[0] for name in names]
        asked = "test" if "test" in tops else "val"  # val beside test has no role
        others, query = (
            torch.tensor([row for row, part in enumerate(top) if part == wanted])
            for wanted in ("train", asked)
        )
        roles = {"train": others, "query": query, "database": others}
        return Split("folder", "class-folders", None, listing, _only_known(roles, known))
    sizes = labels.sum(dim=0, dtype=torch.int64) if listing.multilabel else labels.bincount()
    if int(sizes.min()) < 2:
        few = classes[int(sizes.argmin())]
        raise UserError(f"--protocol=class-folders: class {few!r} has one image; needed are two")
    roles = per_class(labels, 0.1, None, args.split_seed)
    return Split("folder", "class-folders", args.split_seed, listing, _only_known(roles, known))


def _only_known(roles: Roles, known: Tensor) -> Roles:
    """Images of no known class are trained on without labels, and neither asked nor searched: they
    would count as wrong."""
    if known.all():
        return roles
    sure = {role: roles[role][known[roles[role]]] for role in ("query", "database")}
    if not (len(sure["query"]) and len(sure["database"])):
        raise UserError("--protocol=class-folders: no image of a known class is left to search for")
    return {"train": roles["train"], "labelled": sure["database"], **sure}


_SPLITS: dict[str, Callable[[Namespace], Split]] = {
    "cifar10": _cifar_split,
    "cifar100": _cifar_split,
    "flickr25k": _flickr25k_split,
    "nuswide": _nuswide_split,
    "folder": _folder_split,
    "lists": _lists_split,
}


# --- python -m data.splits ----------------------------------------------------------------------


def find_faults(
    split: Split, root: Path, decode: bool, num_workers: int | None = None
) -> list[tuple[str, str]]:
    """(name, reason) of every image of the split that is not there or, with `decode`, damaged."""
    source = Files(root, list(split.listing.names), [], 0)

    def fault(name: str) -> str | None:
        if not os.path.isfile(os.path.join(root, name)):
            return "is missing"
        try:
            if decode:
                source.read(name)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(num_workers) as pool:
        found = zip(source.names, pool.map(fault, source.names), strict=True)
        return [(name, reason) for name, reason in found if reason is not None]


def main(argv: Sequence[str] | None = None) -> int:
    """`make` and `check`; returns the exit code."""
    args = _parse_args(argv)
    if args.command == "make":
        split = load_split(args)
        if args.labels_per_class is not None:
            split = with_labels(split, args.labels_per_class, args.split_seed)
        write_split(args.output, split)
        print(f"{split.summary()}\nsha256 {split.sha256}\nwrote {args.output}")
        return 0
    split = read_split(args.file, flag="split")
    root = args.image_dir or args.data_dir
    if split.dataset not in CIFAR and not root.is_dir():
        flag = "data_dir" if args.image_dir is None else "image_dir"
        raise UserError(f"--{flag}={root}: is not a folder")
    print(f"{split.summary()}\nsha256 {split.sha256}, as its lines have it")
    if split.dataset in CIFAR:
        args = Namespace(
            dataset=split.dataset, data_dir=args.data_dir, if_download=args.if_download
        )
        same = torch.equal(cifar_pool(args).labels, split.listing.labels)
        told = "by hash" if same else f"but not the labels of {split.dataset}; make another split"
        print(f"{len(split.listing.names)} images, {told}")
        return 0 if same else 1
    faults = find_faults(split, root, args.decode)
    told = "read whole" if args.decode else "there"
    print(f"{len(split.listing.names) - len(faults)} of {len(split.listing.names)} images {told}")
    for name, reason in faults[:SHOWN]:
        print(f"  {name!r} {reason}")
    if len(faults) > SHOWN:
        print(f"  and {len(faults) - SHOWN} more")
    return 1 if faults else 0


def _parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(prog="python -m data.splits", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write a split")
    check = commands.add_parser("check", help="compare a split with the images that are there")
    make.add_argument("--dataset", required=True, choices=DATASETS)
    make.add_argument("--protocol", help=PROTOCOL_HELP)
    make.add_argument(
        "--labels_per_class",
        type=number(int, 1),
        metavar="N",
        help="for GPQ: the labels of so many images of each class are seen",
    )
    make.add_argument(
        "--split_seed",
        type=number(int, 0, high=2**31 - 1),
        default=0,
        help="of what is drawn at random",
    )
    make.add_argument("--output", type=Path, required=True, metavar="FILE", help="to write")
    make.set_defaults(split=None)
    check.add_argument("file", type=Path, metavar="SPLIT")
    check.add_argument("--decode", action="store_true", help="also read every image")
    for command in (make, check):
        flag = command.add_argument
        flag("--data_dir", type=Path, required=True, metavar="DIR", help="where the set is")
        flag("--image_dir", type=Path, metavar="DIR", help="that paths are relative to, if another")
        flag("--if_download", action="store_true", help="fetch CIFAR if it is not there")
    args = parser.parse_args(argv)
    if args.command == "make" and args.protocol not in (None, *PROTOCOLS[args.dataset]):
        parser.error(
            f"--protocol={args.protocol}: {args.dataset} has {', '.join(PROTOCOLS[args.dataset])}"
        )
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, OSError) as fault:  # 2, as the main scripts; 1 is what `check` found
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
