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
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from data.images import MAX_PIXELS, Files, load_square
from utils.errors import UserError
from utils.progress import progress

VERSION = 1
# images between two marks of how far the making has come, and the most memory that they may take
CHUNK, CHUNK_BYTES = 1024, 2**28
STAMP_BLOCK = 512  # files that a thread looks at in one go
ROWS, STATE, STAMPS, LOCK = "rows.bin", "state.json", "stamps.i64", "lock"
SHOWN = 5
PATIENCE = 2.0  # seconds before it is said that another process is waited for
Faults = list[tuple[str, str]]


class RowStore:
    """Rows of one shape in a file, read when they are asked for.

    `store[rows]` reads rows into a new tensor, neighbours by one `pread`; so indexed it stands in
    for a tensor. The file is not mapped into memory: pages of a mapping count as the process's own
    until the system wants them back, and a job scheduler would end the process for them. It stays
    open, so a store that is deleted meanwhile can be read to the end.

    Args:
        path: file of at least max(rows) + 1 rows.
        shape: of one row.
        dtype: torch.uint8, torch.float16 and so on.
        rows: which of them there are, in their order.
        stamps: SHA-256 of what tells that the sources are unchanged.
        file: opened before; None opens it.
    """

    def __init__(
        self,
        path: Path,
        shape: Sequence[int],
        dtype: torch.dtype,
        rows: Tensor,
        stamps: str = "",
        file: FileIO | None = None,
    ) -> None:
        self.path, self.row_shape, self.dtype, self.rows = path, tuple(shape), dtype, rows
        self.stamps = stamps
        self._file = file or path.open("rb", buffering=0)

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
        size, flat = self._row_bytes, rows.reshape(-1)
        order = flat.argsort()  # in that of the disk
        steps = torch.stack([flat[order].diff(), order.diff()])
        starts = [0, *((steps != 1).any(dim=0).nonzero()[:, 0] + 1).tolist()]  # of neighbours
        ends = [*starts[1:], len(flat)]
        firsts, places = flat[order].tolist(), order.tolist()
        try:
            if len(starts) > 1 and hasattr(os, "posix_fadvise"):  # the disk may begin with all
                for start, end in zip(starts, ends, strict=True):
                    place, length = firsts[start] * size, (end - start) * size
                    os.posix_fadvise(self._file.fileno(), place, length, os.POSIX_FADV_WILLNEED)
            for start, end in zip(starts, ends, strict=True) if len(flat) else ():
                first = places[start] * size
                part = content[first : first + (end - start) * size]
                self._read(part, firsts[start] * size)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        return out

    def _read(self, content: memoryview, place: int) -> None:
        """Fill memory from that place of the file on."""
        while content:
            read = os.preadv(self._file.fileno(), [content], place)  # 2 GiB at the most
            if read == 0:
                raise UserError(f"{self.path}: ends too early; delete its folder, it is made anew")
            content, place = content[read:], place + read

    def part(self, which: Tensor | slice) -> "RowStore":
        """Some of the rows, in the order asked for."""
        rows = self.rows[which.cpu() if isinstance(which, Tensor) else which]
        return RowStore(self.path, self.row_shape, self.dtype, rows, self.stamps, self._file)


# --- making -------------------------------------------------------------------------------------


def fill_store(
    place: Path,
    n: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    make: Callable[[int, int], tuple[Tensor, Faults]],
    what: str,
    chunk: int = CHUNK,
    stamps: np.ndarray | None = None,
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
        stamps: int64 (n, S), by which a change of the sources shows; taken before they are read.
        names: of the sources, for messages.
    Returns:
        The store, and what could not be made.
    Raises:
        UserError: if sources changed, the disk is too small, or the folder is damaged or cannot be
            used.
    """
    size = math.prod(shape) * dtype.itemsize
    with _own_folder(place):
        done, faults = _state(place, n)
        _refuse_shorter(place / ROWS, done * size)
        if done and stamps is not None:
            _refuse_shorter(place / STAMPS, stamps[:done].nbytes)
            _refuse_changed(place, stamps[:done], names)
        if done < n:
            _check_room(place, n - done, size)
            with progress(n, done, what, "image") as bar:
                for start in range(done, n, chunk):
                    stop = min(n, start + chunk)
                    rows, wrong = make(start, stop)
                    if rows.shape != (stop - start, *shape) or rows.dtype != dtype:
                        raise ValueError(
                            f"{what}: rows {start} to {stop} came as {rows.dtype} {rows.shape}"
                        )
                    faults += wrong
                    content = rows.contiguous().view(-1).view(torch.uint8).numpy()
                    _write(place / ROWS, start * size, content)
                    if stamps is not None:
                        _write(place / STAMPS, stamps[:start].nbytes, stamps[start:stop])
                    _mark(place, stop, faults)
                    bar.update(stop - start)
                    if faults:
                        bar.set_postfix(faulty=len(faults), refresh=False)
        digest = "" if stamps is None else hashlib.sha256(stamps.tobytes()).hexdigest()
        return RowStore(place / ROWS, shape, dtype, torch.arange(n), digest), faults


@contextlib.contextmanager
def _own_folder(place: Path) -> Iterator[None]:
    """The folder, made and locked: of several processes that want it one makes it, the others wait.
    Faults of the file system end in a sentence."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / LOCK)
        try:
            lock.acquire(timeout=PATIENCE)
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


def _write(path: Path, place: int, content: np.ndarray) -> None:
    """Into a file, from that place on; it is on the disk before the mark says so."""
    with path.open("r+b" if place else "wb") as file:
        file.seek(place)
        file.write(np.ascontiguousarray(content).data)
        file.flush()
        os.fsync(file.fileno())


def _check_room(place: Path, rows: int, size: int) -> None:
    free = shutil.disk_usage(place).free
    if rows * size > free:
        raise UserError(
            f"{place}: {rows} rows of {size} bytes take {rows * size / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} are free; make room, or name another --cache_dir"
        )


def _refuse_shorter(path: Path, least: int) -> None:
    found = path.stat().st_size if path.exists() else 0
    if found < least:
        raise UserError(
            f"{path}: is damaged ({found} bytes, {least} were written); delete its folder, and it "
            "is made anew"
        )


def _refuse_changed(place: Path, now: np.ndarray, names: Sequence[str] | None) -> None:
    known = np.fromfile(place / STAMPS, dtype=now.dtype, count=now.size)
    changed = (now != known.reshape(now.shape)).any(axis=1).nonzero()[0]
    if len(changed):
        told = ", ".join(repr(names[i]) for i in changed[:SHOWN]) if names else ""
        more = ", ..." if len(changed) > SHOWN else ""
        raise UserError(
            f"{place}: {len(changed)} of the files it was made from have changed since "
            f"({told}{more}); delete that folder, and it is made anew"
        )


def _state(place: Path, n: int) -> tuple[int, Faults]:
    """How many rows are made, and which of them could not be."""
    path = place / STATE
    if not path.exists():
        return 0, []
    try:
        state = json.loads(path.read_text())
        done, faults = state["done"], [(name, reason) for name, reason in state["faults"]]
        if state["version"] != VERSION or not isinstance(done, int) or not 0 <= done <= n:
            raise ValueError(f"version {state['version']}, {done} of {n} rows")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: is damaged ({error}); delete its folder, and it is made anew"
        ) from error
    return done, faults


def _mark(place: Path, done: int, faults: Faults) -> None:
    temporary = place / f"{STATE}.tmp"
    state = {"version": VERSION, "done": done, "faults": faults}
    _write(temporary, 0, np.frombuffer(json.dumps(state).encode(), dtype=np.uint8))
    os.replace(temporary, place / STATE)


# --- images -------------------------------------------------------------------------------------


def store_images(
    cache_dir: Path,
    root: Path,
    names: Sequence[str],
    side: int,
    num_workers: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> tuple[RowStore, Faults]:
    """Images of any kind and size, decoded once and squeezed to `side` x `side` pixels, uint8.

    Args:
        cache_dir: folder of caches; each list of images and each size has one of its own below it.
        root: that names are relative to.
        names: of the images.
        side: pixels; bicubic, as SPQ resizes FLICKR25K and NUS-WIDE.
        num_workers: threads that decode; 0: one a core.
        max_pixels: width * height of the largest image that is decoded.
    Returns:
        The store, a row (3, side, side) for each image (black where there is none), and the
        `(name, reason)` of those that could not be read.
    Raises:
        UserError: as `fill_store`.
    """
    digest = hashlib.sha256()
    for text in (os.path.realpath(root), str(side), str(max_pixels), *names):
        digest.update(os.fsencode(text) + b"\0")
    place = cache_dir / f"images-{side}px-{digest.hexdigest()[:16]}"
    source = Files(root, list(names), [], 0)
    shape = (3, side, side)

    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        stamps = _stamps(root, names, pool)
        if len(stamps) and (stamps < 0).all():
            raise UserError(
                f"{root}: none of the {len(names)} images is there, {names[0]!r} for one; "
                "--image_dir names the folder that their paths are relative to"
            )

        def make(start: int, stop: int) -> tuple[Tensor, Faults]:
            images = torch.zeros(stop - start, *shape, dtype=torch.uint8)

            def read(row: int) -> tuple[str, str] | None:
                found = load_square(source, names[start + row], side, max_pixels)
                if isinstance(found, str):
                    return names[start + row], found
                images[row] = torch.from_numpy(found)
                return None

            faults = pool.map(read, range(stop - start))
            return images, [fault for fault in faults if fault is not None]

        what = f"storing at {side} pixels"
        chunk = max(1, min(CHUNK, CHUNK_BYTES // math.prod(shape)))
        return fill_store(place, len(names), shape, torch.uint8, make, what, chunk, stamps, names)


def _stamps(root: Path, names: Sequence[str], pool: ThreadPoolExecutor) -> np.ndarray:
    """Size and time of each file, int64 (N, 2), by which a change shows; -1 if it is not there."""

    def look(block: Sequence[str]) -> np.ndarray:
        found = np.full((len(block), 2), -1, dtype=np.int64)
        for row, name in enumerate(block):
            with contextlib.suppress(OSError):
                known = os.stat(os.path.join(root, name))
                found[row] = known.st_size, known.st_mtime_ns
        return found

    blocks = (names[i : i + STAMP_BLOCK] for i in range(0, len(names), STAMP_BLOCK))
    return np.concatenate([np.empty((0, 2), dtype=np.int64), *pool.map(look, blocks)])
