"""Rows of equal size on disk, made once, chunk by chunk, and read without being held in memory.

Images squeezed to one size are such rows, and so are features. Making them survives a kill, and a
store whose sources changed afterwards is refused.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from data.images import Files, load_square
from utils.errors import UserError

VERSION = 1
CHUNK = 1024  # images between two marks of how far the making has come
ROWS, STATE, STAMPS, LOCK = "rows.bin", "state.json", "stamps.i64", "lock"
SHOWN = 5
Faults = list[tuple[str, str]]


class RowStore:
    """Rows of one shape in a file, read when they are asked for.

    `store[rows]` reads rows into a new tensor, by one `pread` each; so indexed it stands in for a
    tensor. The file is not mapped into memory: pages of a mapping count as the process's own until
    the system wants them back, and a job scheduler would end the process for them.

    Args:
        path: file of at least max(rows) + 1 rows.
        shape: of one row.
        dtype: torch.uint8, torch.float16 and so on.
        rows: which of them there are, in their order.
        stamps: SHA-256 of what tells that the sources are unchanged.
    """

    def __init__(
        self, path: Path, shape: Sequence[int], dtype: torch.dtype, rows: Tensor, stamps: str = ""
    ) -> None:
        self.path, self.row_shape, self.dtype, self.rows = path, tuple(shape), dtype, rows
        self.stamps = stamps
        self._file = path.open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *row)."""
        return (len(self), *self.row_shape)

    @property
    def nbytes(self) -> int:
        """Memory that all of them would take."""
        return len(self) * self._row_bytes

    @property
    def identity(self) -> str:
        """SHA-256 that stands for the rows: of where they are, which, and of their sources."""
        digest = hashlib.sha256(f"{self.path.parent.name} {self.stamps}".encode())
        digest.update(memoryview(self.rows.contiguous().numpy()))
        return digest.hexdigest()

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    def __getitem__(self, which: Tensor | slice) -> Tensor:
        rows = self.rows[which.cpu() if isinstance(which, Tensor) else which]
        out = torch.empty((*rows.shape, *self.row_shape), dtype=self.dtype)
        content = memoryview(out.view(-1).view(torch.uint8).numpy())
        size, file = self._row_bytes, self._file.fileno()
        flat = rows.reshape(-1)
        for i in flat.argsort().tolist():  # in the order of the disk
            if os.preadv(file, [content[i * size : (i + 1) * size]], int(flat[i]) * size) != size:
                raise UserError(f"{self.path}: ends too early; delete its folder, it is made anew")
        return out

    def part(self, which: Tensor | slice) -> "RowStore":
        """Some of the rows, in the order asked for."""
        return RowStore(self.path, self.row_shape, self.dtype, self.rows[which], self.stamps)


# --- making -------------------------------------------------------------------------------------


def fill_store(
    place: Path,
    n: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    make: Callable[[int, int], tuple[Tensor, Faults]],
    what: str,
    chunk: int = CHUNK,
    stamp: Callable[[int, int], np.ndarray] | None = None,
    names: Sequence[str] | None = None,
) -> tuple[RowStore, Faults]:
    """The store in folder `place`, made if it is not there, gone on with if that was cut off.

    Args:
        place: a folder of its own; its name stands for all that decides what is in it.
        n: rows.
        shape, dtype: of a row.
        make: (start, stop) -> those rows, and the (name, reason) of rows that could not be made.
        what: said by the progress bar.
        chunk: rows made together; a kill loses no more than those.
        stamp: (start, stop) -> int64 (stop - start, S), by which a change of the sources shows.
        names: of the sources, for messages.
    Returns:
        The store, and what could not be made.
    Raises:
        UserError: if sources changed, the disk is too small, or the folder cannot be used.
    """
    size = math.prod(shape) * dtype.itemsize
    with _own_folder(place):
        done, faults = _state(place, n)
        if done and stamp is not None:
            _refuse_changed(place, stamp(0, done), names)
        if done < n:
            _check_room(place, n - done, size)
            mode = "r+b" if done else "wb"
            with (
                (place / ROWS).open(mode) as rows,
                (place / STAMPS).open(mode) as stamps,
                progress(n, done, what) as bar,
            ):
                for start in range(done, n, chunk):
                    stop = min(n, start + chunk)
                    before = None if stamp is None else np.ascontiguousarray(stamp(start, stop))
                    made, wrong = make(start, stop)
                    faults += wrong
                    rows.seek(start * size)
                    rows.write(made.contiguous().view(-1).view(torch.uint8).numpy().data)
                    if before is not None:
                        stamps.seek(start * before[0].nbytes)
                        stamps.write(before.data)
                    for file in (rows, stamps):  # on the disk before the mark says so
                        file.flush()
                        os.fsync(file.fileno())
                    _mark(place, stop, faults)
                    bar.update(stop - start)
                    if faults:
                        bar.set_postfix(faulty=len(faults), refresh=False)
        if (place / ROWS).stat().st_size < n * size:
            raise UserError(f"{place}: is damaged (too short); delete that folder, it is made anew")
        stamps_digest = hashlib.sha256((place / STAMPS).read_bytes()).hexdigest()
    return RowStore(place / ROWS, shape, dtype, torch.arange(n), stamps_digest), faults


def progress(total: int, done: int, what: str, unit: str = "image") -> tqdm:
    """A bar that draws often on a terminal and seldom into a log."""
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=what,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )


@contextlib.contextmanager
def _own_folder(place: Path) -> Iterator[None]:
    """The folder, made and locked: of several processes that want it one makes it, the others wait.
    Faults of the file system end in a sentence."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / LOCK)
        try:
            lock.acquire(timeout=2)
        except Timeout:
            print(f"{place}: waiting for another process that is making it ...", file=sys.stderr)
            lock.acquire()
        with lock:
            lock.release()  # `with` holds it a second time
            yield
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written ({error.strerror or error}); --cache_dir names another"
        ) from error


def _check_room(place: Path, rows: int, size: int) -> None:
    free = shutil.disk_usage(place).free
    if rows * size > free:
        raise UserError(
            f"{place}: {rows} rows of {size} bytes take {rows * size / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} are free; make room, or name another --cache_dir"
        )


def _refuse_changed(place: Path, now: np.ndarray, names: Sequence[str] | None) -> None:
    known = np.fromfile(place / STAMPS, dtype=np.int64)[: now.size]
    if known.size < now.size:
        raise UserError(f"{place}: is damaged; delete that folder, and it is made anew")
    changed = (now != known.reshape(now.shape)).any(axis=1).nonzero()[0]
    if len(changed):
        told = ", ".join(names[i] for i in changed[:SHOWN]) if names else ""
        raise UserError(
            f"{place}: {len(changed)} of the files it was made from have changed since "
            f"({told}); delete that folder, and it is made anew"
        )


def _state(place: Path, n: int) -> tuple[int, Faults]:
    """How many rows are made, and which of them could not be."""
    path = place / STATE
    if not path.exists():
        return 0, []
    try:
        state = json.loads(path.read_text())
        done, faults = state["done"], [(name, reason) for name, reason in state["faults"]]
        if state["version"] != VERSION or not 0 <= done <= n:
            raise ValueError(f"version {state['version']}, {done} of {n} rows")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete its folder") from error
    return done, faults


def _mark(place: Path, done: int, faults: Faults) -> None:
    temporary = place / f"{STATE}.tmp"
    temporary.write_text(json.dumps({"version": VERSION, "done": done, "faults": faults}))
    os.replace(temporary, place / STATE)


# --- images -------------------------------------------------------------------------------------


def store_images(
    cache_dir: Path, root: Path, names: Sequence[str], side: int, num_workers: int = 0
) -> tuple[RowStore, Faults]:
    """Images of any kind and size, decoded once and squeezed to `side` x `side` pixels, uint8.

    Args:
        cache_dir: folder of caches; each list of images and each size has one of its own below it.
        root: that names are relative to.
        names: of the images.
        side: pixels; bicubic, as SPQ resizes FLICKR25K and NUS-WIDE.
        num_workers: threads that decode; 0: one a core.
    Returns:
        The store, a row (3, side, side) for each image (black where there is none), and the
        `(name, reason)` of those that could not be read.
    Raises:
        UserError: as `fill_store`.
    """
    digest = hashlib.sha256()
    for text in (os.path.realpath(root), str(side), *names):
        digest.update(os.fsencode(text) + b"\0")
    place = cache_dir / f"images-{side}px-{digest.hexdigest()[:16]}"
    source = Files(root, list(names), [], 0)

    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:

        def make(start: int, stop: int) -> tuple[Tensor, Faults]:
            part = names[start:stop]
            images = torch.zeros(len(part), 3, side, side, dtype=torch.uint8)
            faults = []
            read = pool.map(lambda name: load_square(source, name, side), part)
            for row, (name, result) in enumerate(zip(part, read, strict=True)):
                if isinstance(result, str):
                    faults.append((name, result))
                else:
                    images[row] = torch.from_numpy(result)
            return images, faults

        def stamp(start: int, stop: int) -> np.ndarray:
            found = pool.map(lambda name: _stamp(os.path.join(root, name)), names[start:stop])
            return np.array(list(found), dtype=np.int64)

        what = f"storing at {side} pixels"
        shape = (3, side, side)
        return fill_store(
            place, len(names), shape, torch.uint8, make, what, stamp=stamp, names=names
        )


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of a file, by which a change shows; -1 if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns)
