"""Search your own images with a trained model.

    python search.py build --checkpoint RUN --images PICTURES --index INDEX
    python search.py query --index INDEX --image ONE.jpg --html result.html

An image is stored as M codeword numbers (32 bits at SPQ's usual size); a query keeps its descriptor
and is compared with codewords through look-up tables.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
from PIL import Image

from args import parse_search_args
from data.images import (
    CIFAR10_NAME,
    Cifar10Images,
    Files,
    ImageError,
    ImageSource,
    batched,
    load_square,
    open_images,
)
from utils.cli import run_main
from utils.device import choose_device
from utils.distributed import Ranks
from utils.errors import UserError
from utils.loop import TrainingStopped
from utils.search.build import Encoding, add, build, check_model, remove
from utils.search.engines import Lists, choose_engine, export, read_ivfpq, write_faiss
from utils.search.index import Index, join_paths, open_index, verify
from utils.search.page import MOST, Answer, Hit, as_json, as_page, as_table, draw, printable
from utils.trained import Trained, load_trained

SHOWN_PIXELS = 400  # of pictures in figures and pages, longest side
SHOWN_FAULTS = 10
OWN_DISTANCES = {"SPQ": "squared_l2", "GPQ": "inner_product"}  # that a method ranks by
QUERIES = {
    "SPQ": "they are not normalised",
    "GPQ": "their M sub-vectors and the codewords have length 1, so that FAISS's squared L2 is 2 * "
    "sum (1 - <x, c>), and its codes, the nearest in L2, are those of the largest inner product",
}


def main(argv: list[str] | None = None) -> None:
    """Parse, and do what the command says."""
    args = parse_search_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a path may hold letters that a terminal lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    COMMANDS[args.command](args)


# --- filling an index ---------------------------------------------------------------------------


def run_build(args: Namespace) -> None:
    """search.py build"""
    encoding = _encoding(args, load_trained(args.checkpoint))
    with _interruptible("build"):
        index = build(args.index, lambda: _images(args), encoding, args.overwrite)
    if index is not None:
        _tell_filled(index, 0)


def run_add(args: Namespace) -> None:
    """search.py add"""
    index = open_index(args.index)
    if args.checkpoint is not None:
        check_model(index, load_trained(args.checkpoint))
    encoding = _encoding(args, index.model())
    with _interruptible("add"):
        changed = add(args.index, lambda: _images(args), encoding)
    if changed is not None:
        _tell_filled(changed, index.N)


def run_remove(args: Namespace) -> None:
    """search.py remove"""
    index, removed = remove(args.index, lambda index: _to_remove(index, args))
    print(f"{removed} images removed, {index.N} left in {args.index}")


def _to_remove(index: Index, args: Namespace) -> Iterable[str]:
    known = list(index.paths)
    found: set[str] = set()
    if args.missing:
        if index.kind != "files":
            raise UserError(f"--missing: this index is of {index.kind}, whose images are no files")
        if not index.root.is_dir():
            raise UserError(
                f"--missing: the folder of images {index.root} itself is gone; if it was moved or "
                "is not mounted, removing all its images is hardly meant"
            )
        found |= {name for name in known if not os.path.lexists(index.root / name)}
    for path in args.paths:
        # as the index tells it, or as the shell does; the root is told without links
        folder, name = os.path.split(os.path.abspath(path))
        real = os.path.relpath(os.path.join(os.path.realpath(folder), name), index.root)
        told = {os.path.normpath(path), os.path.relpath(path, index.root), real}
        below = tuple(f"{name}{os.sep}" for name in told)
        these = {name for name in known if name in told or name.startswith(below)}
        if real == ".":  # the root itself
            these |= {name for name in known if not name.startswith(f"..{os.sep}")}
        if not these:
            raise UserError(f"{path}: is not in --index={args.index}; nothing was removed")
        found |= these
    return found


# --- looking at an index ------------------------------------------------------------------------


def run_info(args: Namespace) -> None:
    """search.py info"""
    index = open_index(args.index)
    if args.json:
        print(json.dumps(index.manifest, indent=2))
        return
    m = index.manifest
    size = sum(entry["bytes"] for entry in m["files"].values())
    rows = {
        "images": f"{m['items']} ({m['skipped']} could not be read)",
        "code": f"{m['code_bits']} bits: M={m['M']} codebooks, K={m['K']} words, d={m['d']}",
        "codes": f"{index.packed.nbytes} bytes; the index with paths and model {size} bytes",
        "images from": f"{m['images']['kind']} in {printable(m['images']['root'])}",
        "model": f"{m['model']['method']} {m['model']['identity'][:16]}, images of "
        f"{m['model']['input_size']} pixels",
        "made": f"{m['created']}, changed {m['changed']}",
    }
    for name, text in rows.items():
        print(f"{name + ':':13}{text}")
    _tell_skipped(index)


def run_verify(args: Namespace) -> None:
    """search.py verify"""
    index = verify(args.index)
    print(f"{args.index} is whole: {index.N} images, model {index.identity[:16]}")


def run_export(args: Namespace) -> None:
    """search.py export"""
    index = open_index(args.index)
    if not args.output.name or not args.output.parent.is_dir() or args.output.is_dir():
        raise UserError(f"--output={args.output}: is not a file in a folder that exists")
    paths = args.output.with_name(args.output.name + ".paths")
    for place in (args.output, paths):
        if place.exists() and not args.overwrite:
            raise UserError(f"--output={args.output}: {place} is there already; --overwrite it")
    if index.N == 0:
        raise UserError(f"--index={args.index}: is empty; add images first")
    like = read_ivfpq(args.like) if args.like else None
    lists = Lists(args.nlist, like, args.first_id)
    found = export(index.packed, index.codebooks, args.to, lists)
    try:
        write_faiss(found, args.output, {paths: join_paths(index.paths)})
    except OSError as error:
        raise UserError(f"--output={args.output}: cannot be written: {error}") from error
    print(
        f"{type(found).__name__} of {index.N} images: {args.output}\n"
        f"paths, each ended by a NUL byte, the first that of FAISS's id {args.first_id}: {paths}\n"
        f"Queries are descriptors x of the model; {QUERIES[index.manifest['model']['method']]}."
    )


# --- asking -------------------------------------------------------------------------------------


def run_query(args: Namespace) -> None:
    """search.py query"""
    index = open_index(args.index)
    if index.N == 0:
        raise UserError(f"--index={args.index}: is empty; add images first")
    if args.checkpoint is not None:
        check_model(index, load_trained(args.checkpoint))
    source, names, x = _read_queries(args, index, _encoding(args, index.model()))
    distance = args.distance or OWN_DISTANCES[index.manifest["model"]["method"]]
    engine = choose_engine(index.packed, index.codebooks, distance, args.engine)
    start = time.perf_counter()
    dist, found = engine.search(x, min(args.k, index.N))
    milliseconds = 1000 * (time.perf_counter() - start) / len(names)

    see_query, see_hit = _viewer(source, args), _viewer(_source_of(index, args), args)
    answers = []
    for q, (name, *row) in enumerate(zip(names, found.tolist(), dist.tolist(), strict=True)):
        # a page shows everything, a figure what fits on it, a table nothing
        shown = args.k if args.html else MOST if args.figure and q < MOST else 0
        hits = [
            Hit(rank, path := index.paths[i], d, see_hit(path) if rank <= shown else None)
            for rank, (i, d) in enumerate(zip(*row, strict=True), start=1)
        ]
        answers.append(Answer(name, see_query(name) if shown else None, hits))
    note = f"{index.N} images of {index.manifest['code_bits']} bits, {engine.name}"
    if args.json:
        content = {"engine": engine.name, "distance": distance, "images": index.N}
        print(json.dumps({**content, "queries": as_json(answers)}, indent=2))
    else:
        print("\n\n".join(as_table(answer) for answer in answers))
    print(f"{note}: {milliseconds:.1f} ms a query", file=sys.stderr)
    if args.figure:
        _write(args.figure, "--figure", lambda path: draw(answers, path, note))
    if args.html:
        page = as_page(answers, f"Images like {Path(args.image).name}", note)
        _write(args.html, "--html", lambda path: path.write_text(page, encoding="utf-8"))


def _read_queries(
    args: Namespace, index: Index, encoding: Encoding
) -> tuple[ImageSource, list[str], np.ndarray]:
    """The images that --image means: their source, their names and, encoded as the index's images
    were, their descriptors (Q, D). Unreadable ones of a folder are named and left out."""
    source: ImageSource
    if index.kind == CIFAR10_NAME and not os.path.lexists(args.image):
        source = Cifar10Images(args.root or index.root)
        source.names = [args.image]
    else:
        source = open_images(args.image, args.data_dir, flag="--image")
    names, descriptors, faults = [], [], list(source.faults)
    load = partial(encoding.load, source)
    with ThreadPoolExecutor(encoding.threads) as pool:
        for group in batched(source.names, encoding.batch_size):
            results = list(zip(group, pool.map(load, group), strict=True))
            good = [(name, found) for name, found in results if not isinstance(found, str)]
            faults += [(name, found) for name, found in results if isinstance(found, str)]
            if good:
                names += [name for name, _ in good]
                descriptors.append(encoding.describe(np.stack([array for _, array in good])))
    if not names:
        raise UserError(f"--image={args.image}: {printable(faults[0][0])} {faults[0][1]}")
    for name, reason in faults:
        print(f"left out: {printable(name)} {printable(reason)}", file=sys.stderr)
    return source, names, np.concatenate(descriptors)


def _source_of(index: Index, args: Namespace) -> ImageSource:
    """Where the index's own images are."""
    root = args.root or index.root
    if index.kind == CIFAR10_NAME and (args.figure or args.html):  # a table needs no data set
        return Cifar10Images(root)
    return Files(root, [], [], 0)


def _viewer(source: ImageSource, args: Namespace) -> Callable[[str], Image.Image | None]:
    """name -> its picture, reduced; None if it cannot be read any more."""

    def see(name: str) -> Image.Image | None:
        try:
            image = source.read(name, args.max_pixels, SHOWN_PIXELS)
        except ImageError:
            return None
        image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
        return image

    return see


# --- parts --------------------------------------------------------------------------------------


def _encoding(args: Namespace, trained: Trained) -> Encoding:
    Image.MAX_IMAGE_PIXELS = args.max_pixels  # Pillow's own guard, for what it opens by itself
    ranks = Ranks.from_environment()
    return Encoding(
        trained,
        choose_device(args, ranks, quiet=True),
        args.batch_size,
        partial(load_square, side=trained.input_size, max_pixels=args.max_pixels),
        args.num_workers or os.cpu_count() or 1,
        getattr(args, "strict", False),
        ranks,
    )


def _images(args: Namespace) -> ImageSource:
    return open_images(args.images, args.data_dir, args.if_download)


@contextlib.contextmanager
def _interruptible(command: str) -> Iterator[None]:
    """A request to end, of the keyboard or the system, lets finished work be written down."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise TrainingStopped(
            f"Interrupted; give the same `search.py {command}` again to go on", 128 + number
        )

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _tell_filled(index: Index, before: int) -> None:
    added = f", {index.N - before} of them new" if before else ""
    print(
        f"{index.folder}: {index.N} images{added}, {index.manifest['code_bits']} bits each, "
        f"{index.packed.nbytes} bytes of codes"
    )
    _tell_skipped(index)


def _tell_skipped(index: Index) -> None:
    skipped = index.skipped
    if skipped:
        print(f"{len(skipped)} left out, all in {index.file('skipped')}:")
    for row in skipped[:SHOWN_FAULTS]:
        print(f"  {printable(row['path'])}: {printable(row['reason'])}")
    if len(skipped) > SHOWN_FAULTS:
        print(f"  and {len(skipped) - SHOWN_FAULTS} more")


def _write(path: Path, flag: str, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be written: {error}") from error
    print(f"wrote {path}", file=sys.stderr)


COMMANDS = {
    "build": run_build,
    "add": run_add,
    "remove": run_remove,
    "info": run_info,
    "verify": run_verify,
    "query": run_query,
    "export": run_export,
}

if __name__ == "__main__":
    run_main(main)
