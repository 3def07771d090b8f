"""Checkpoints: written whole or not at all, read without running code from the file."""

import glob
import io
import os
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.errors import UserError

LAST, WEIGHTS = "checkpoint_last.pt", "model.pt"
FORMAT = "product-quantization-checkpoint"
MODEL = "product-quantization-model"  # weights alone, without the state of the training
VERSION = 1
KEYS = {
    "format",
    "version",
    "method",
    "args",
    "model",
    "optimizer",
    "scaler",
    "step",
    "last_eval",
}


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` to `path` so that a kill at any moment leaves the old file or the new one.

    Args:
        path: the checkpoint; a file beside it with the ending `.tmp` is used on the way.
        state: all of KEYS but format and version.
    Raises:
        OSError: if the disk is full or the folder cannot be written; the old file stays.
    """
    write_torch(path, {"format": FORMAT, "version": VERSION, **state})


def write_torch(path: Path, content: dict) -> None:
    """torch.save, whole or not at all.

    Raises:
        OSError: as `save_checkpoint`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch reports a short write as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}") from error
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def put_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OSError: as `save_checkpoint`.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def load_checkpoint(path: Path, flag: str = "--resume", weights_alone: bool = False) -> dict:
    """Read a checkpoint onto the CPU, with weights_only=True: a file cannot run code.

    Args:
        path: the file.
        flag: for messages.
        weights_alone: whether a file without the state of the training will do; its "step" is then
            None, and so are "optimizer", "scaler" and "last_eval".
    Returns:
        What `save_checkpoint` was given, and "path".
    Raises:
        UserError: if there is no such file, or it is no checkpoint of this project.
    """
    state = read_torch(path, flag)
    alone = isinstance(state, dict) and state.get("format") == MODEL
    if alone:
        if not weights_alone:
            raise UserError(
                f"{flag}={path}: holds weights without the state of a training, which cannot be "
                "gone on with; evaluate them by --eval_only, or start another training from their "
                f"trunk by --weights={path}"
            )
        unknown = dict.fromkeys(KEYS - {"method", "args", "model"})
        state = unknown | state | {"format": FORMAT}
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= KEYS:
        raise UserError(
            f"{flag}={path}: is a torch file but not a checkpoint of this project; "
            f"allowed is a {LAST} that a main script wrote"
        )
    if state["version"] != VERSION:
        raise UserError(
            f"{flag}={path}: has checkpoint version {state['version']}; this code reads {VERSION}"
        )
    counted = isinstance(state["step"], int) or alone
    if not isinstance(state["args"], dict) or not counted:
        raise UserError(f"{flag}={path}: is a damaged checkpoint: no arguments or no step in it")
    return state | {"path": str(path)}


def read_torch(path: Path, flag: str) -> object:
    """Read a file that torch.save wrote onto the CPU; runs no code, checks every check sum.

    A large file may be there in parts, `NAME.part00`, `NAME.part01` and so on, instead.

    Raises:
        UserError: if there is no such file, or it is none of torch's, or a damaged one.
    """
    try:
        parts = [] if path.is_file() else find_parts(path)
        if not path.is_file() and not parts:
            raise UserError(
                f"{flag}={path}: no such file; give a checkpoint, or a folder with {LAST} or "
                f"{WEIGHTS}"
            )
        file = io.BytesIO(b"".join(part.read_bytes() for part in parts)) if parts else path
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the check sums
                raise zipfile.BadZipFile("a check sum is wrong")
        if parts:
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read: {error}") from error
    except UserError:
        raise
    except Exception as error:  # torch raises whatever its reader trips over
        raise UserError(
            f"{flag}={path}: is not a checkpoint, or a damaged one ({type(error).__name__}); "
            f"allowed are a {LAST} and a {WEIGHTS} of this project"
        ) from error


def find_parts(path: Path) -> list[Path]:
    """The parts that a file is kept in, in their order; none if there are none."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.part[0-9][0-9]"))


def file_of_run(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these files that a run's folder holds, whole or in parts.

    Raises:
        OSError: if it cannot be looked at.
    """
    known = (folder / name for name in names)
    return next((path for path in known if path.is_file() or find_parts(path)), None)


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that `--resume` means.

    Args:
        resume: a file, a folder that holds `checkpoint_last.pt` or else `model.pt`, whole or in
            parts, or "auto": such a file in `output_dir`, or else the newest other `.pt` there.
        output_dir: of the run.
    Returns:
        Its path; None if "auto" finds none, which means a fresh start.
    Raises:
        UserError: if the path cannot be looked at.
    """
    try:
        if resume != "auto":
            path = Path(resume)
            if not path.is_dir():
                return path
            return file_of_run(path, (LAST, WEIGHTS)) or path / LAST
        known = file_of_run(output_dir, (LAST, WEIGHTS))
        if known is not None:
            return known
        found = list(output_dir.glob("*.pt")) if output_dir.is_dir() else []
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    except OSError as error:
        raise UserError(f"--resume={resume}: cannot be read: {error}") from error


def check_same(saved: dict, args: Namespace, names: list[str], why: str, path: Path) -> None:
    """Flags that must be as they were when the checkpoint was made.

    Raises:
        UserError: naming each flag, its value, and the one that the checkpoint has.
    """
    wrong = [name for name in names if saved.get(name) != getattr(args, name)]
    if wrong:
        given = " ".join(f"--{name}={getattr(args, name)}" for name in wrong)
        needed = " ".join(f"--{name}={saved.get(name)}" for name in wrong)
        raise UserError(f"{given}: the checkpoint {path} was made with {needed}; {why}")
