"""Splits as files: which image is trained on, asked with, searched among.

A split is a text file. Its first line is a JSON object: data set, protocol, seed, class names,
counts, and the SHA-256 of all lines that follow. Each of these is a JSON array
`[roles, labels, path]`, the path relative to the data folder. Two people whose files have the same
SHA-256 used the same split. `python -m data.splits` makes and checks them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
        """One line: what it is."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        counts = ", ".join(f"{n} {role}" for role, n in self.counts().items() if n)
        C = len(self.listing.classes)
        kind = f"{C} labels" if self.listing.multilabel else f"{C} classes"
        return f"{self.dataset}, protocol {self.protocol}{seed}: {counts}; {kind}"

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
        labels = [row.nonzero()[:, 0].tolist() for row in listing.labels]
    else:
        labels = [[label] for label in listing.labels.tolist()]
    rows = zip(roles, labels, listing.names, strict=True)
    return [json.dumps(list(row), separators=(",", ":")) + "\n" for row in rows]


def write_split(path: Path, split: Split) -> None:
    """Write a split, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(split.head()) + "\n")
            file.writelines(_lines(split))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--output={path}: cannot be written: {error}") from error


def read_split(path: Path, flag: str = "--split") -> Split:
    """Read a split and check it against its own hash and counts.

    Raises:
        UserError: if it cannot be read, was changed, or contradicts itself.
    """
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
        head = json.loads(first)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise UserError(f"{flag}={path}: is no split; python -m data.splits make writes one")
        if head.get("version") != VERSION:
            raise UserError(
                f"{flag}={path}: has version {head.get('version')}; this code reads {VERSION}"
            )
        if hashlib.sha256(rest.encode()).hexdigest() != head["sha256"]:
            raise UserError(f"{flag}={path}: was changed: its lines do not have its hash")
        split = _parse(head, rest.splitlines())
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{flag}={path}: is damaged, or no split ({detail})") from error
    return split


def _parse(head: Mapping, lines: Sequence[str]) -> Split:
    rows = [json.loads(line) for line in lines]
    classes = tuple(str(name) for name in head["classes"])
    names = [name for _, _, name in rows]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("a path that is no text")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise ValueError("a path that leads out of the data folder")
    if head["multilabel"]:
        labels = torch.zeros(len(rows), len(classes), dtype=torch.uint8)
        for row, (_, found, _) in enumerate(rows):
            if not all(0 <= label < len(classes) for label in found):
                raise ValueError(f"labels {found} of {len(classes)}")
            labels[row, found] = 1
    else:
        labels = torch.tensor([label for _, (label,), _ in rows], dtype=torch.int64)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise ValueError(f"classes outside of 0 to {len(classes) - 1}")
    roles: dict[str, list[int]] = {role: [] for role in ROLES}
    for row, (found, _, _) in enumerate(rows):
        for role in found:
            roles[role].append(row)
    counts = {role: len(rows) for role, rows in roles.items()} | {"images": len(names)}
    if any(head[name] != count for name, count in counts.items()):
        raise ValueError(f"its first line counts otherwise than its lines, {counts}")
    if len(set(names)) < len(names):
        raise ValueError("an image that is there twice")
    listing = Listing(names, labels, classes)
    tensors = {role: torch.tensor(found, dtype=torch.int64) for role, found in roles.items()}
    return Split(str(head["dataset"]), str(head["protocol"]), head["seed"], listing, tensors)
