"""Fill and change an index: encode images in shards, go on after a kill, add, remove."""

import contextlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from utils.distributed import Ranks
from utils.errors import UserError
from utils.evaluation import describe_images, encode_images
from utils.progress import progress
from utils.search.index import (
    MANIFEST,
    STAGING,
    Index,
    check_folder,
    commit,
    join_paths,
    open_index,
    read_manifest,
    split_paths,
    writing,
)
from utils.search.packing import code_bytes, pack_codes
from utils.trained import Trained

JOB = "job.json"
NAMES = "names.bin"
FLUSH_SECONDS = 20.0  # at most this much work is lost by a kill
WAIT = timedelta(days=7)  # that a rank waits for the others


class ImageSource(Protocol):
    """A set of images with names, `data.images.Files` for one.

    Attributes:
        kind: "files", or a data set's name.
        root: folder that names are relative to.
        names: of all images, each once; the order of the set.
        faults: (name, reason) of what could not even be listed.
    """

    kind: str
    root: Path
    names: list[str]
    faults: list[tuple[str, str]]


@dataclass(frozen=True)
class Encoding:
    """How images become codes.

    Attributes:
        trained: the model.
        device: where it runs.
        batch_size: images in one forward pass.
        load: (source, name) -> the image as the model takes it, uint8 (3, side, side), or the
            reason why there is none.
        threads: that load.
        strict: stop at the first image that cannot be read.
        ranks: the processes that share the work.
    """

    trained: Trained
    device: torch.device
    batch_size: int
    load: Callable[[ImageSource, str], np.ndarray | str]
    threads: int
    strict: bool = False
    ranks: Ranks = Ranks()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        self.trained.model.to(self.device)

    def describe(self, images: np.ndarray) -> torch.Tensor:
        """uint8 (N, 3, side, side) -> descriptors (N, D) float32."""
        model, side = self.trained.model, self.trained.input_size
        return describe_images(model, torch.from_numpy(images), side).cpu()

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, 3, side, side) -> packed codes (N, code_bytes)."""
        model, side = self.trained.model, self.trained.input_size
        codes = encode_images(model, torch.from_numpy(images), side)
        return pack_codes(codes.cpu().numpy(), model.quantizer.K)


# --- what is asked for --------------------------------------------------------------------------


def build(
    folder: Path, source_of: Callable[[], ImageSource], encoding: Encoding, overwrite: bool
) -> Index | None:
    """Make an index of all images of a source; goes on where a killed build was.

    Args:
        folder: the index to make.
        source_of: opens the images; called once in each process.
        encoding: model and how it is run.
        overwrite: replace an index that is there when the new one is complete; give up an
            unfinished build of another model or folder.
    Returns:
        The index; None on all ranks but the main one.
    Raises:
        UserError: if another index or another's unfinished build is there, the disk is full, or an
            image cannot be read and `encoding.strict`.
    """

    def check() -> None:
        check_folder(folder)
        if (folder / MANIFEST).exists() and not overwrite:
            found = open_index(folder)
            raise UserError(
                f"--index={folder}: holds an index of {found.N} images already; `search.py add` "
                "brings it new ones, --overwrite builds it anew"
            )

    return _run(folder, "build", source_of, encoding, check, overwrite)


def add(folder: Path, source_of: Callable[[], ImageSource], encoding: Encoding) -> Index | None:
    """Add to an index the images of a source that it does not have yet.

    An image counts as there if its path is; one whose content has changed must be removed first.

    Returns, Raises: as `build`; UserError too if the model is not the index's.
    """

    def check() -> None:
        index = open_index(folder)
        check_model(index, encoding.trained)

    return _run(folder, "add", source_of, encoding, check, overwrite=False)


def remove(folder: Path, wanted: Callable[[Index], Iterable[str]]) -> tuple[Index, int]:
    """Take images out of an index.

    Args:
        folder: the index.
        wanted: from the index as it is, the paths to remove.
    Returns:
        The index without them, and how many they were.
    Raises:
        UserError: if the index cannot be read or written.
    """
    read_manifest(folder)  # before the folder is touched
    with writing(folder):
        index = open_index(folder)
        names = list(index.paths)
        gone = set(wanted(index))
        keep = np.fromiter((name not in gone for name in names), dtype=bool, count=len(names))
        if keep.all():
            return index, 0
        kept = [name for name, stays in zip(names, keep, strict=True) if stays]
        packed, skipped = np.asarray(index.packed)[keep], _skipped(index)
        images, created = index.manifest["images"], index.manifest["created"]
        changed = commit(folder, index.model(), images, packed, kept, skipped, created)
        return changed, int((~keep).sum())


def check_model(index: Index, trained: Trained) -> None:
    """Codes of one model mean nothing to another.

    Raises:
        UserError: if the model is not the one that the index was made with.
    """
    if index.identity != trained.identity:
        raise UserError(
            f"--checkpoint: is model {trained.identity[:16]}, and the codes in "
            f"--index={index.folder} were made by model {index.identity[:16]}; codes of one model "
            "mean nothing to another. Give the model that the index was built with (or leave "
            "--checkpoint away: the index has its own copy), or build it anew with --overwrite"
        )


# --- how it is done -----------------------------------------------------------------------------


def _run(
    folder: Path,
    kind: str,
    source_of: Callable[[], ImageSource],
    encoding: Encoding,
    check: Callable[[], None],
    overwrite: bool,
) -> Index | None:
    ranks = encoding.ranks
    ranks.connect(torch.device("cpu"), timeout=WAIT)
    if not ranks.is_main:
        problem = ranks.collect(None)[0]
        if problem is None:
            try:
                _encode_share(folder, source_of(), encoding)
            except UserError as error:  # the main rank does not know it
                print(f"process {ranks.rank}: error: {error}", file=sys.stderr)
                raise
        return None
    with contextlib.ExitStack() as stack:
        try:
            check()  # before the folder is touched
            source = source_of()
            if encoding.strict and source.faults:
                name, reason = source.faults[0]
                raise UserError(f"--strict: {name!r} {reason}")
            stack.enter_context(writing(folder))
            check()  # nobody changes it from here on
            todo = _plan(folder, kind, source, encoding.trained, overwrite)
        except UserError as error:
            ranks.collect(str(error))  # the others end too, without a word
            raise
        ranks.collect(None)
        _encode_share(folder, source, encoding)
        if kind == "add" and not todo:
            shutil.rmtree(folder / STAGING)
            return open_index(folder)
        return _merge(folder, kind, source, encoding)


def _plan(
    folder: Path, kind: str, source: ImageSource, trained: Trained, overwrite: bool
) -> list[str]:
    """Write down what is to be encoded, in terms of the index's own paths; keeps the shards of a
    killed run if they are of the same job."""
    staging = folder / STAGING
    root, known = source.root, set()
    if kind == "add":
        index = open_index(folder)
        if index.kind != source.kind:
            raise UserError(
                f"--images: are {source.kind}, and --index={folder} is of {index.kind}; allowed is "
                f"more {index.kind}, or an index of its own"
            )
        root, known = index.root, set(index.paths)
    job = {"kind": kind, "identity": trained.identity, "root": str(root)}
    if staging.is_dir():
        try:
            found = json.loads((staging / JOB).read_text())
        except (OSError, ValueError):
            found = None  # killed in its first moment
        if kind == "build" and found is not None and found != job and not overwrite:
            differs = [name for name in job if found.get(name) != job[name]]
            what = {"kind": "command", "identity": "model", "root": "folder of images"}
            raise UserError(
                f"--index={folder}: holds an unfinished build of another "
                f"{' and '.join(what[name] for name in differs)}; give the same command again to "
                "go on with it, or --overwrite to give it up"
            )
        if found != job:
            shutil.rmtree(staging)
    staging.mkdir(exist_ok=True)
    _replace(staging / JOB, json.dumps(job).encode())
    names = [_rebase(name, source.root, root) for name in source.names]
    todo = [name for name in names if name not in known]
    _replace(staging / NAMES, join_paths(todo))
    return todo


def _rebase(name: str, old: Path, new: Path) -> str:
    """A path relative to `old`, told relative to `new`."""
    return name if old == new else os.path.relpath(os.path.join(old, name), new)


def _encode_share(folder: Path, source: ImageSource, encoding: Encoding) -> None:
    """Encode this rank's share of what is planned, and write it as shards."""
    staging, ranks = folder / STAGING, encoding.ranks
    job = json.loads((staging / JOB).read_text())
    planned = split_paths((staging / NAMES).read_bytes())
    root = Path(job["root"])
    shards = _read_shards(staging, encoding)
    runs = [int(path.name.split("-")[1]) for path in staging.glob("shard-*.npz")]
    left = [name for name in planned if not _is_done(shards, name, root, source.kind)]
    ranks.barrier()  # nobody writes shards before all have read them
    mine = left[ranks.rank :: ranks.world_size]
    done = len(planned) - len(left)
    if done and ranks.is_main:
        print(f"Going on: {done} of {len(planned)} images are encoded already.")
    shard = _Shard(staging, encoding, run=1 + max(runs, default=0))
    failure = None
    with (
        ThreadPoolExecutor(encoding.threads) as pool,
        progress(
            total=len(planned) if ranks.world_size == 1 else len(mine),
            done=done if ranks.world_size == 1 else 0,
            what="encoding" if ranks.world_size == 1 else f"encoding, process {ranks.rank}",
            unit="image",
            shown=ranks.is_main,
        ) as bar,
    ):
        read = _Reader(pool, encoding, source, root)
        size = encoding.batch_size
        groups = (mine[i : i + size] for i in range(0, len(mine), size))
        try:
            coming = read.start(next(groups, []))
            while coming and failure is None:
                group, coming = coming, read.start(next(groups, []))  # decode the next meanwhile
                results = [(name, stamp, future.result()) for name, stamp, future in group]
                good = [result for result in results if not isinstance(result[2], str)]
                bad = [result for result in results if isinstance(result[2], str)]
                packed = encoding.encode(np.stack([image for *_, image in good])) if good else None
                shard.append(good, packed, bad)
                bar.update(len(results))
                bar.set_postfix(skipped=shard.skipped, refresh=False)
                if bad and encoding.strict:
                    failure = f"--strict: {bad[0][0]!r} {bad[0][2]}"
        finally:  # an interruption loses nothing
            pool.shutdown(wait=False, cancel_futures=True)
            shard.flush()
    failures = [found for found in ranks.collect(failure) if found]
    if failures:
        raise UserError(f"{failures[0]}; mend or remove it, or leave --strict away")


class _Reader:
    """Decodes groups of images in threads."""

    def __init__(
        self, pool: ThreadPoolExecutor, encoding: Encoding, source: ImageSource, root: Path
    ) -> None:
        self.pool, self.encoding, self.source, self.root = pool, encoding, source, root

    def start(self, names: list[str]) -> list[tuple]:
        """(name, stamp of the file, image or reason to come) of each."""
        return [(name, *self._start(name)) for name in names]

    def _start(self, name: str) -> tuple:
        stamp = _stamp(name, self.root, self.source.kind)  # before it is read
        own = _rebase(name, self.root, self.source.root)
        return stamp, self.pool.submit(self.encoding.load, self.source, own)


def _stamp(name: str, root: Path, kind: str) -> tuple[int, int]:
    """Size and time of change of a file: if they differ, it is another image now."""
    if kind != "files":
        return 0, 0
    try:
        found = os.stat(os.path.join(root, name))
        return found.st_size, found.st_mtime_ns
    except (OSError, ValueError):
        return -1, -1


# --- shards -------------------------------------------------------------------------------------


class _Shard:
    """Collects encoded images and writes them every FLUSH_SECONDS, each file whole.

    Files are named by run (1 + those that were killed), rank and number, so that of an image that
    was encoded twice the later code comes last.
    """

    def __init__(self, staging: Path, encoding: Encoding, run: int) -> None:
        self.staging, self.encoding, self.run = staging, encoding, run
        self.count, self.skipped = 0, 0
        self._clear()

    def _clear(self) -> None:
        self.names: list[str] = []
        self.stamps: list[tuple[int, int]] = []
        self.packed: list[np.ndarray] = []
        self.bad: list[tuple[str, tuple[int, int], str]] = []
        self.since = time.monotonic()

    def append(self, good: list[tuple], packed: np.ndarray | None, bad: list[tuple]) -> None:
        self.names += [name for name, *_ in good]
        self.stamps += [stamp for _, stamp, _ in good]
        self.packed += [] if packed is None else [packed]
        self.bad += bad
        self.skipped += len(bad)
        if time.monotonic() - self.since > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what there is as one file, under a name that no other has."""
        if not self.names and not self.bad:
            return
        M, K = _shape(self.encoding.trained)
        empty = np.empty((0, code_bytes(M, K)), dtype=np.uint8)
        reasons = json.dumps([reason for *_, reason in self.bad]).encode()
        stamps = self.stamps + [stamp for _, stamp, _ in self.bad]
        names = join_paths(self.names) + join_paths(name for name, *_ in self.bad)
        rank = self.encoding.ranks.rank
        path = self.staging / f"shard-{self.run:04d}-{rank:04d}-{self.count:06d}.npz"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(
                file,
                packed=np.concatenate([empty, *self.packed]),
                names=np.frombuffer(names, dtype=np.uint8),
                stamps=np.asarray(stamps, dtype=np.int64).reshape(-1, 2),
                reasons=np.frombuffer(reasons, dtype=np.uint8),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self.count += 1
        self._clear()


def _read_shards(staging: Path, encoding: Encoding) -> dict[str, tuple]:
    """name -> (size, time of change, packed code or else reason) of all that is done so far."""
    found: dict[str, tuple] = {}
    width = code_bytes(*_shape(encoding.trained))
    for path in sorted(staging.glob("shard-*.npz")):
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("a check sum is wrong")
            with np.load(path, allow_pickle=False) as shard:
                names = split_paths(shard["names"].tobytes())
                packed, stamps = shard["packed"], shard["stamps"].tolist()
                reasons = json.loads(shard["reasons"].tobytes())
            if packed.shape[1] != width:
                raise ValueError("codes of another length")
            codes = packed.tobytes()
            values = [codes[i : i + width] for i in range(0, len(codes), width)] + reasons
            rows = zip(names, stamps, values, strict=True)
            found |= {name: (*stamp, value) for name, stamp, value in rows}
        except Exception as error:  # a damaged file can break the reader anywhere
            print(f"{path.name} is damaged ({error}); its images are encoded again.")
            path.unlink(missing_ok=True)
    return found


def _is_done(shards: dict[str, tuple], name: str, root: Path, kind: str) -> bool:
    """Encoded, and its file unchanged since; what could not be read is tried again."""
    entry = shards.get(name)
    if entry is None or isinstance(entry[2], str):
        return False
    return _stamp(name, root, kind) == entry[:2]


def _merge(folder: Path, kind: str, source: ImageSource, encoding: Encoding) -> Index:
    """All shards, in the order of the plan, behind what the index has; then one commit."""
    staging = folder / STAGING
    planned = split_paths((staging / NAMES).read_bytes())
    shards = _read_shards(staging, encoding)
    good = [name for name in planned if not isinstance(shards[name][2], str)]
    new_faults = [(name, shards[name][2]) for name in planned if isinstance(shards[name][2], str)]
    width = code_bytes(*_shape(encoding.trained))
    content = b"".join(shards[name][2] for name in good)
    packed = np.frombuffer(content, dtype=np.uint8).reshape(-1, width)
    names, created = good, None
    if kind == "add":
        index = open_index(folder)
        packed, names = np.concatenate([index.packed, packed]), [*index.paths, *good]
        faults = [(_rebase(name, source.root, index.root), why) for name, why in source.faults]
        new_faults = faults + new_faults
        here = set(names)
        old = [fault for fault in _skipped(index) if fault[0] not in here]
        skipped = list(dict(old + new_faults).items())
        images, created = index.manifest["images"], index.manifest["created"]
    else:
        if not good:
            raise UserError(
                f"--images: none of the {len(planned)} images could be read; the first: "
                f"{new_faults[0][0]!r} {new_faults[0][1]}"
            )
        skipped = list(dict(source.faults + new_faults).items())
        images = {"kind": source.kind, "root": str(source.root)}
    index = commit(folder, encoding.trained, images, packed, names, skipped, created)
    shutil.rmtree(staging, ignore_errors=True)
    return index


def _skipped(index: Index) -> list[tuple[str, str]]:
    return [(row["path"], row["reason"]) for row in index.skipped]


def _shape(trained: Trained) -> tuple[int, int]:
    return trained.model.quantizer.M, trained.model.quantizer.K


def _replace(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
