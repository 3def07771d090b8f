"""Small sets in the exact layouts of FLICKR25K and NUS-WIDE; each label has its colour."""

from pathlib import Path

import numpy as np
from PIL import Image

from data.lists import FLICKR_LABELS, FLICKR_RELEVANT

NUSWIDE_LABELS = 21


def draw(path: Path, colours: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    """A JPEG of 40 x 30 pixels: the mean colour of its labels, with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mean = colours[labels > 0].mean(axis=0) if labels.any() else np.full(3, 128.0)
    pixels = np.clip(mean + rng.normal(0, 12, (30, 40, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90)


def some_labels(n: int, C: int, rng: np.random.Generator) -> np.ndarray:
    """(n, C) zeros and ones: each image one label in turn, and another one now and then."""
    labels = np.zeros((n, C), dtype=np.uint8)
    labels[np.arange(n), np.arange(n) % C] = 1
    labels[np.arange(n), rng.integers(0, C, n)] |= rng.random(n) < 0.3
    return labels


def make_mirflickr(folder: Path, n: int, seed: int = 0) -> np.ndarray:
    """`mirflickr/im1.jpg` and so on, and an annotation file a label; returns (n, 24) labels."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(20, 235, (len(FLICKR_LABELS), 3))
    labels = some_labels(n, len(FLICKR_LABELS), rng)
    for i, row in enumerate(labels, start=1):
        draw(folder / "mirflickr" / f"im{i}.jpg", colours, row, rng)
    notes = folder / "mirflickr25k_annotations_v080"
    notes.mkdir()
    for c, name in enumerate(FLICKR_LABELS):
        members = np.flatnonzero(labels[:, c]) + 1
        (notes / f"{name}.txt").write_text("".join(f"{i}\r\n" for i in members))
        if name in FLICKR_RELEVANT:
            (notes / f"{name}_r1.txt").write_text("".join(f"{i}\r\n" for i in members[::2]))
    return labels


def make_targets(folder: Path, n: int, C: int = 24, seed: int = 0) -> np.ndarray:
    """`img.txt` with a path a line, `targets.txt` with its labels."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(20, 235, (C, 3))
    labels = some_labels(n, C, rng)
    names = [f"mirflickr/im{i}.jpg" for i in range(1, n + 1)]
    for name, row in zip(names, labels, strict=True):
        draw(folder / name, colours, row, rng)
    (folder / "img.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "targets.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in labels))
    return labels


def make_nuswide(folder: Path, n: int, seed: int = 0) -> np.ndarray:
    """`train.txt`, `test.txt` and `database.txt` over `Flickr/<concept>/<number>.jpg`: every fifth
    image a query, half of the others trained on."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(20, 235, (NUSWIDE_LABELS, 3))
    labels = some_labels(n, NUSWIDE_LABELS, rng)
    lines: dict[str, list[str]] = {"train": [], "test": [], "database": []}
    for i, row in enumerate(labels):
        name = f"Flickr/concept{row.argmax()}/{i:04d}_{7919 * (i + 1)}.jpg"
        draw(folder / name, colours, row, rng)
        line = f"{name} {' '.join(map(str, row))}\n"
        if i % 5 == 0:
            lines["test"].append(line)
            continue
        lines["database"].append(line)
        if i % 2:
            lines["train"].append(line)
    for role, found in lines.items():
        (folder / f"{role}.txt").write_text("".join(found))
    return labels
