"""Splits as files: which image is trained on, asked with, searched among.

A split is a text file. Its first line is a JSON object: data set, protocol, seed, class names,
counts, and the SHA-256 of all lines that follow. Each of these is a JSON array
`[roles, labels, path]`, the path relative to the data folder. Two people whose files have the same
SHA-256 used the same split. `python -m data.splits` makes and checks them.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from data.lists import Listing
from utils.errors import UserError

FORMAT, VERSION = "product-quantization-split", 1
ROLES = ("train", "labelled", "query", "database")
Roles = Mapping[str, Tensor]  # name -> rows, ascending


@dataclass(frozen=True)
class Split:
    """Images, their labels, and what each is for.

    Attributes:
        dataset, protocol: names, as `--dataset` and `--protocol` have them.
        seed: of a random split; None if nothing in it is random.
        listing: names, labels and classes of all images.
        roles: rows of `listing` for `train`, `labelled` (whose labels a semi-supervised method may
            see), `query` and `database`; an image may have several.
    """

    dataset: str
    protocol: str
    seed: int | None
    listing: Listing
    roles: Roles

    @property
    def sha256(self) -> str:
        """Of names, labels and roles, in their order."""
        return hashlib.sha256("".join(_lines(self)).encode()).hexdigest()

    def summary(self) -> str:
        """One line: what it is, and whether queries are searched among or trained on."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        counts = ", ".join(f"{n} {role}" for role, n in self.counts().items() if n)
        C = len(self.listing.classes)
        kind = f"{C} labels" if self.listing.multilabel else f"{C} classes"
        kind = kind if C > 1 else "no labels"
        shared = ""
        for role, told in (("database", "in the database"), ("train", "trained on")):
            if "query" in self.roles and role in self.roles:
                n = int(torch.isin(self.roles["query"], self.roles[role]).sum())
                shared += f"; queries also {told}: {n}" if n else ""
        return f"{self.dataset}, protocol {self.protocol}{seed}: {counts}; {kind}{shared}"

    def counts(self) -> dict[str, int]:
        """Images in each role."""
        return {role: len(self.roles[role]) if role in self.roles else 0 for role in ROLES}

    def head(self) -> dict:
        """The first line of its file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "dataset": self.dataset,
            "protocol": self.protocol,
            "seed": self.seed,
            "multilabel": self.listing.multilabel,
            "classes": list(self.listing.classes),
            "images": len(self.listing.names),
            **self.counts(),
            "sha256": self.sha256,
        }


def _lines(split: Split) -> list[str]:
    """A line for each image, and its line end."""
    listing = split.listing
    roles: list[list[str]] = [[] for _ in listing.names]
    for role in ROLES:
        for row in split.roles[role].tolist() if role in split.roles else ():
            roles[row].append(role)
    if listing.multilabel:
        found = iter(listing.labels.nonzero()[:, 1].tolist())
        labels = [list(islice(found, n)) for n in (listing.labels > 0).sum(dim=1).tolist()]
    else:
        labels = [[label] for label in listing.labels.tolist()]
    rows = zip(roles, labels, listing.names, strict=True)
    return [json.dumps(list(row), separators=(",", ":")) + "\n" for row in rows]


def write_split(path: Path, split: Split) -> None:
    """Write a split, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    temporary = path.parent / f"{path.name}.tmp"
    try:
        if path.is_dir():
            raise IsADirectoryError("is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(split.head()) + "\n")
                file.writelines(_lines(split))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output={path}: cannot be written: {error}") from error


def read_split(path: Path, flag: str = "--split") -> Split:
    """Read a split and check it against its own hash and counts.

    Raises:
        UserError: if it cannot be read, was changed, or contradicts itself.
    """
    try:
        first, _, rest = path.read_text(encoding="utf-8-sig").partition("\n")
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        first = rest = ""
    head = None
    with contextlib.suppress(ValueError, RecursionError):
        head = json.loads(first)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise UserError(f"{flag}={path}: is no split; python -m data.splits make writes one")
    if head.get("version") != VERSION:
        raise UserError(
            f"{flag}={path}: has version {head.get('version')}; this code reads {VERSION}"
        )
    try:
        if hashlib.sha256(rest.encode()).hexdigest() != head["sha256"]:
            raise UserError(
                f"{flag}={path}: was changed: its lines do not have its hash; fetch it again, or "
                "make another with python -m data.splits make"
            )
        return _parse(head, rest.splitlines())
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{flag}={path}: is damaged ({detail})") from error


def _parse(head: Mapping, lines: Sequence[str]) -> Split:
    rows = [json.loads(line) for line in lines]
    classes = tuple(str(name) for name in head["classes"])
    names = [name for _, _, name in rows]
    if not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise ValueError("a path that is no text")
    if any(name.startswith("/") or ".." in PurePosixPath(name).parts for name in names):
        raise ValueError("a path that leads out of the data folder")
    labels = _label_tensor([found for _, found, _ in rows], len(classes), head["multilabel"])
    roles: dict[str, list[int]] = {role: [] for role in ROLES}
    for row, (found, _, _) in enumerate(rows):
        for role in found:
            roles[role].append(row)
    counts = {role: len(rows) for role, rows in roles.items()} | {"images": len(names)}
    if any(head[name] != count for name, count in counts.items()):
        raise ValueError(f"its first line counts otherwise than its lines, {counts}")
    if not roles["train"] or bool(roles["query"]) != bool(roles["database"]):
        raise ValueError("it must have images to train on, and queries if it has a database")
    if len(set(names)) < len(names):
        raise ValueError("an image that is there twice")
    listing = Listing(names, labels, classes)
    # as when it was made: a role that no image has is not there
    held = {role: torch.tensor(found, dtype=torch.int64) for role, found in roles.items() if found}
    split = Split(str(head["dataset"]), str(head["protocol"]), head["seed"], listing, held)
    if split.sha256 != head["sha256"]:
        raise ValueError("its lines are not as this code writes them")
    return split


def _label_tensor(found: Sequence[Sequence[int]], C: int, multilabel: bool) -> Tensor:
    """Label numbers of each image -> (N,) int64, or (N, C) uint8 of 0 and 1."""
    for labels in found:
        if not all(isinstance(label, int) and 0 <= label < C for label in labels):
            raise ValueError(f"labels {labels}, of 0 to {C - 1}")
    if not multilabel:
        return torch.tensor([label for (label,) in found], dtype=torch.int64)
    rows = torch.zeros(len(found), C, dtype=torch.uint8)
    row = [i for i, labels in enumerate(found) for _ in labels]
    rows[row, [label for labels in found for label in labels]] = 1
    return rows
