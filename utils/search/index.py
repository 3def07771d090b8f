"""A search index on disk: packed codes, codebooks, model and paths, changed whole or not at all.

    INDEX/manifest.json          what the index is; names every other file, its bytes and SHA-256
    INDEX/codes.<hash>.bin       (N, code_bytes) packed codes, see utils.search.packing
    INDEX/paths.<hash>.bin       N paths relative to the root, each ended by a NUL byte
    INDEX/codebooks.<hash>.npy   (M, K, d) float32
    INDEX/model.<hash>.pt        the network that made the codes; queries need it
    INDEX/skipped.<hash>.jsonl   images that could not be read, with the reason
    INDEX/staging/               work of a build or add that is not finished

Files are named by their content and never changed. A change writes new files, then replaces the
manifest in one step, then deletes what no manifest names: a kill at any moment leaves the old index
or the new one.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from utils.errors import UserError
from utils.search.packing import code_bytes, unpack_codes, word_bits
from utils.trained import Trained, load_trained, save_trained

MANIFEST = "manifest.json"
STAGING = "staging"
LOCK = ".lock"
FORMAT = "product-quantization-index"
VERSION = 1
PARTS = {"codes": "bin", "paths": "bin", "codebooks": "npy", "model": "pt", "skipped": "jsonl"}
BLOCK = 1 << 20
_STAGED = re.compile(r"(job\.json|names\.bin)(\.tmp)?|shard-\d{4}-\d{4}-\d{6}\.(npz|tmp)")
_PART = re.compile(
    "|".join(rf"{part}\.([0-9a-f]{{16}}\.{end}|tmp(\.tmp)?)" for part, end in PARTS.items())
)
_OURS = re.compile(rf"{_PART.pattern}|manifest\.json(\.tmp)?|{STAGING}|\{LOCK}")
LOCK_SECONDS = 10
CODEWORD_ROUNDING = 1e-5


class Paths(Sequence):
    """N paths in one buffer, each ended by a NUL byte; made into text one at a time."""

    def __init__(self, buffer: np.ndarray) -> None:
        self._buffer = buffer
        self._ends: np.ndarray | None = None  # found when first asked for: it reads the whole file

    @property
    def ends(self) -> np.ndarray:
        if self._ends is None:
            self._ends = np.flatnonzero(self._buffer == 0)
        return self._ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = int(self.ends[i - 1]) + 1 if i else 0
        return os.fsdecode(self._buffer[start : int(self.ends[i])].tobytes())

    def __iter__(self) -> Iterator[str]:
        return iter(split_paths(self._buffer.tobytes()))


def split_paths(content: bytes) -> list[str]:
    """NUL-ended paths -> list of text."""
    return [os.fsdecode(name) for name in content.split(b"\0")[:-1]]


def join_paths(names: Iterable[str]) -> bytes:
    """List of text -> NUL-ended paths."""
    return b"".join(os.fsencode(name) + b"\0" for name in names)


@dataclass
class Index:
    """One state of an index, read at one moment; later changes by others do not reach it.

    Attributes:
        folder: where it is.
        manifest: the content of manifest.json.
        packed: (N, code_bytes) uint8, mapped from the file.
        paths: N paths, relative to `root`.
        codebooks: (M, K, d) float32.
        skipped: what could not be read: path and reason.
    """

    folder: Path
    manifest: dict
    packed: np.ndarray
    paths: Paths
    codebooks: np.ndarray
    skipped: list[dict[str, str]]

    @property
    def N(self) -> int:
        return self.manifest["items"]

    @property
    def M(self) -> int:
        return self.manifest["M"]

    @property
    def K(self) -> int:
        return self.manifest["K"]

    @property
    def kind(self) -> str:
        return self.manifest["images"]["kind"]

    @property
    def root(self) -> Path:
        return Path(self.manifest["images"]["root"])

    @property
    def identity(self) -> str:
        """Of the model that made the codes."""
        return self.manifest["model"]["identity"]

    def codes(self) -> np.ndarray:
        """(N, M) integers."""
        return unpack_codes(np.asarray(self.packed), self.M, self.K)

    def model(self) -> Trained:
        """The network that made the codes.

        Raises:
            UserError: if it is not what the manifest says.
        """
        path = self.file("model")
        try:
            _check_hash(self.folder, path, self.manifest["files"]["model"]["sha256"])
        except FileNotFoundError as error:
            raise UserError(
                f"--index={self.folder}: was built anew meanwhile; try again"
            ) from error
        trained = load_trained(path, flag="--index")
        if trained.identity != self.identity:
            raise UserError(_damaged(self.folder, "its model is not the one that its codes are of"))
        return trained

    def file(self, part: str) -> Path:
        """The file that holds a part."""
        return self.folder / self.manifest["files"][part]["name"]


def _check_hash(folder: Path, path: Path, wanted: str) -> None:
    digest = hash_file(path)
    if digest != wanted:
        raise UserError(_damaged(folder, f"{path.name} has SHA-256 {digest}, not {wanted}"))


# --- reading ------------------------------------------------------------------------------------


def open_index(folder: Path) -> Index:
    """The index as it is now.

    Raises:
        UserError: if there is none, its build is not finished, it is damaged, or of a version that
            this code does not read.
    """
    return _while_unchanged(folder, _open)


def _while_unchanged(folder: Path, work: Callable[[Path, dict], Index]) -> Index:
    """`work` on the present manifest; again if the index is changed under its hands."""
    for attempt in range(5):
        manifest = read_manifest(folder)
        try:
            return work(folder, manifest)
        except FileNotFoundError as error:
            if attempt == 4 or read_manifest(folder) == manifest:  # no change came in between
                missing = Path(error.filename or "").name
                raise UserError(_damaged(folder, f"{missing} is missing")) from error
        except OSError as error:
            raise UserError(f"--index={folder}: cannot be read: {error}") from error
    raise AssertionError("unreachable")


def _open(folder: Path, manifest: dict) -> Index:
    files = manifest["files"]
    for entry in files.values():
        found = (folder / entry["name"]).stat().st_size
        if found != entry["bytes"]:
            raise UserError(
                _damaged(folder, f"{entry['name']} has {found} bytes instead of {entry['bytes']}")
            )
    for part in ("codebooks", "skipped"):
        _check_hash(folder, folder / files[part]["name"], files[part]["sha256"])
    try:
        codebooks = np.load(folder / files["codebooks"]["name"], allow_pickle=False)
        skipped = (folder / files["skipped"]["name"]).read_text().splitlines()
        rows = [json.loads(line) for line in skipped]
        rows = [{"path": str(row["path"]), "reason": str(row["reason"])} for row in rows]
        # FAISS trusts what it is given: codes and codebooks that do not fit would crash it
        shape = (manifest["items"], code_bytes(manifest["M"], manifest["K"]))
        packed = _map(folder / files["codes"]["name"]).reshape(shape)
        wanted = (manifest["M"], manifest["K"], manifest["d"])
        if codebooks.shape != wanted or codebooks.dtype != np.float32:
            raise ValueError(f"codebooks are {codebooks.dtype} {codebooks.shape}, not {wanted}")
        if not np.isfinite(codebooks).all():
            raise ValueError("codebooks are not finite")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(_damaged(folder, f"its parts do not fit ({error})")) from error
    paths = Paths(_map(folder / files["paths"]["name"]))
    return Index(folder, manifest, packed, paths, codebooks, rows)


def _map(path: Path) -> np.ndarray:
    """A file as bytes, read as they are looked at; an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r")


def read_manifest(folder: Path) -> dict:
    """manifest.json, its own check sum and its numbers checked.

    Raises:
        UserError: as `open_index`.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if (folder / STAGING).is_dir():
            raise UserError(
                f"--index={folder}: its build is not finished; give the same build command again"
            ) from None
        raise UserError(
            f"--index={folder}: is not an index (no {MANIFEST}); `search.py build` makes one"
        ) from None
    except OSError as error:
        raise UserError(f"--index={folder}: cannot be read: {error}") from error
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise ValueError("another format")
        version = int(manifest["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(_damaged(folder, f"{MANIFEST} cannot be read ({error})")) from error
    if version != VERSION:
        raise UserError(f"--index={folder}: has version {version}; this code reads {VERSION}")
    # compared as bytes: the file must be what `_render` writes, to the last space
    if content != _render(manifest):
        raise UserError(_damaged(folder, f"{MANIFEST} has changed"))
    try:
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(_damaged(folder, f"{MANIFEST} makes no sense ({error})")) from error
    return manifest


def _check_manifest(manifest: dict) -> None:
    """Raise unless every entry is of its kind: an index may come from a stranger."""
    numbers = [manifest[name] for name in ("items", "skipped", "M", "K", "d", "code_bits")]
    numbers += [entry["bytes"] for entry in manifest["files"].values()]
    numbers.append(manifest["model"]["input_size"])
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a number is none")
    if manifest["M"] < 1 or manifest["d"] < 1:
        raise ValueError("no codebooks")
    if manifest["code_bits"] != manifest["M"] * word_bits(manifest["K"]):
        raise ValueError("code_bits")
    if manifest["files"].keys() != PARTS.keys():
        raise ValueError("its files")
    for part, entry in manifest["files"].items():
        if not re.fullmatch(rf"{part}\.[0-9a-f]{{16}}\.{PARTS[part]}", entry["name"]):
            raise ValueError(f"the name of {part}")
    texts = [manifest["created"], manifest["changed"]]
    texts += [manifest["model"][name] for name in ("method", "identity")]
    texts.append(manifest["images"]["kind"])
    if not all(re.fullmatch(r"[\w:-]{1,64}", text, re.ASCII) for text in texts):
        raise ValueError("a text")
    if not isinstance(manifest["images"]["root"], str):
        raise ValueError("the folder of images")


def _damaged(folder: Path, what: str) -> str:
    return (
        f"--index={folder}: is damaged: {what}. Take it from a backup, or build it anew with "
        "--overwrite"
    )


def _render(manifest: Mapping) -> bytes:
    """The manifest as it is written, with the SHA-256 of all the rest in its last entry."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return (json.dumps({**rest, "sha256": digest}, indent=2) + "\n").encode()


def hash_file(path: Path) -> str:
    """SHA-256 hex digest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def verify(folder: Path) -> Index:
    """Read every byte and check it against the manifest, and the parts against each other.

    Raises:
        UserError: naming the first thing that is wrong.
    """
    return _while_unchanged(folder, _verify)


def _verify(folder: Path, manifest: dict) -> Index:
    index = _open(folder, manifest)
    for part, entry in manifest["files"].items():
        _check_hash(folder, index.file(part), entry["sha256"])
    if len(index.paths) != index.N:
        raise UserError(_damaged(folder, f"{len(index.paths)} paths for {index.N} codes"))
    if len(set(index.paths)) != index.N:
        raise UserError(_damaged(folder, "a path stands in it twice"))
    trained = index.model()
    # GPQ's are computed from its weights, which another processor may round otherwise
    allowed = CODEWORD_ROUNDING if trained.method == "GPQ" else 0
    if np.abs(index.codebooks - codebooks_of(trained)).max() > allowed:
        raise UserError(_damaged(folder, "its codebooks are not those of its model"))
    return index


def codebooks_of(trained: Trained) -> np.ndarray:
    """(M, K, d) float32."""
    return trained.model.quantizer.codebooks.detach().float().cpu().numpy()


# --- writing ------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """An index is made in a folder of its own, so that nothing of anyone else's is ever deleted.

    Raises:
        UserError: if the folder holds anything but an index, finished or not.
    """
    try:
        if not folder.exists():
            return
        foreign = [path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)]
        if (folder / STAGING).exists():  # somebody's pictures may be called so
            staged = (folder / STAGING).iterdir()
            names = (path.name for path in staged if not _STAGED.fullmatch(path.name))
            foreign += [f"{STAGING}/{name}" for name in names]
    except OSError as error:
        raise UserError(f"--index={folder}: cannot be used: {error}") from error
    if foreign:
        first = ", ".join(sorted(foreign)[:3])
        raise UserError(
            f"--index={folder}: holds other files ({first}); allowed is a new or empty folder, or "
            "an index"
        )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The right to change an index; one process at a time has it. A kill gives it back.

    Raises:
        UserError: if another process has it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(
            f"--index={folder}: another process is changing it; try again when it has ended"
        ) from None
    except OSError as error:
        raise UserError(f"--index={folder}: cannot be written: {error}") from error
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--index={folder}: cannot be written: {error}; the index is as it was before"
        ) from error
    finally:
        lock.release()


def commit(
    folder: Path,
    trained: Trained,
    images: Mapping,
    packed: np.ndarray,
    names: Iterable[str],
    skipped: Sequence[tuple[str, str]],
    created: str | None = None,
) -> Index:
    """Make this the index, in one step. Call it inside `writing`.

    Args:
        folder: the index.
        trained: the model that made the codes.
        images: {"kind": "files" or "cifar10", "root": folder that names are relative to}.
        packed: (N, code_bytes) uint8.
        names: N paths.
        skipped: (path, reason) of what could not be read.
        created: when the index was first made (default: now).
    Raises:
        OSError: if the disk is full or the folder cannot be written; the old index stays.
    """
    try:
        _commit(folder, trained, images, packed, names, skipped, created)
    except OSError:
        with contextlib.suppress(OSError, UserError):  # what was written takes room in vain
            (folder / f"{MANIFEST}.tmp").unlink(missing_ok=True)
            _sweep(folder, read_manifest(folder) if (folder / MANIFEST).exists() else None)
        raise
    return open_index(folder)


def _commit(
    folder: Path,
    trained: Trained,
    images: Mapping,
    packed: np.ndarray,
    names: Iterable[str],
    skipped: Sequence[tuple[str, str]],
    created: str | None,
) -> None:
    M, K, d = codebooks_of(trained).shape
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows = [{"path": name, "reason": reason} for name, reason in skipped]
    files = {
        "codes": _write_bytes(folder, "codes", np.ascontiguousarray(packed)),
        "paths": _write_bytes(folder, "paths", join_paths(names)),
        "codebooks": _write(
            folder, "codebooks", lambda path: _save_array(path, codebooks_of(trained))
        ),
        "model": _model_file(folder, trained),
        "skipped": _write_bytes(
            folder, "skipped", "".join(json.dumps(row) + "\n" for row in rows).encode()
        ),
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "items": len(packed),
        "skipped": len(skipped),
        "code_bits": M * word_bits(K),
        "M": M,
        "K": K,
        "d": d,
        "images": dict(images),
        "model": {
            "method": trained.method,
            "identity": trained.identity,
            "input_size": trained.input_size,
        },
        "created": created or now,
        "changed": now,
        "files": files,
    }
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_bytes(_render(manifest))
    _sync(temporary)
    os.replace(temporary, folder / MANIFEST)  # from here on it is the new index
    with contextlib.suppress(OSError):
        _sync(folder)
        _sweep(folder, manifest)


def _model_file(folder: Path, trained: Trained) -> dict:
    """The entry of the model's file: the one there, if it is the same model. (torch.save writes
    the same weights into other bytes now and then.)"""
    try:
        old = read_manifest(folder)
        entry = old["files"]["model"]
        if old["model"]["identity"] == trained.identity and (
            hash_file(folder / entry["name"]) == entry["sha256"]
        ):
            return entry
    except (UserError, OSError, KeyError, TypeError):
        pass  # no index yet, or none to rely on
    return _write(folder, "model", lambda path: save_trained(path, trained))


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _write_bytes(folder: Path, part: str, content: bytes | np.ndarray) -> dict:
    return _write(folder, part, lambda path: path.write_bytes(content))


def _write(folder: Path, part: str, write) -> dict:  # noqa: ANN001 (a function of a path)
    """Write a part under the name of its content; returns its entry in the manifest."""
    temporary = folder / f"{part}.tmp"
    try:
        write(temporary)
        _sync(temporary)
        digest = hash_file(temporary)
        name = f"{part}.{digest[:16]}.{PARTS[part]}"
        size = temporary.stat().st_size
        os.replace(temporary, folder / name)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return {"name": name, "bytes": size, "sha256": digest}


def _sync(path: Path) -> None:
    """Onto the disk, a power cut included."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path, manifest: Mapping | None) -> None:
    """Delete parts that the manifest does not name: of the state before, or of a killed change."""
    keep = {entry["name"] for entry in manifest["files"].values()} if manifest else set()
    for path in folder.iterdir():
        if _PART.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)
