"""What a run writes down: args.json, metrics.jsonl, TensorBoard."""

import json
import os
import platform
import shutil
import subprocess
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import torch

from utils.device import describe_hardware
from utils.errors import UserError

METRICS = "metrics.jsonl"
ROOT = Path(__file__).resolve().parent.parent


def plain(args: Namespace) -> dict[str, str | int | float | bool | None]:
    """Flags as JSON and checkpoints can hold them: paths become text."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items())}


def git_commit() -> str | None:
    """The commit this code is at, with `+changes` if files differ from it; None outside git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return (commit + ("+changes" if changed else "")) if commit else None


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    names = ("torch", "torchvision", "kornia", "timm", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def read_metrics(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line cut off by a kill is passed over."""
    path = output_dir / METRICS
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # the writer was killed in this line
        if not isinstance(entry, dict) or not {"kind", "step"} <= entry.keys():
            break
        entries.append(entry)
    return entries


class RunLog:
    """Writes the log of one run; a process that is not the main one writes nothing.

    Args:
        output_dir: made if missing.
        step: the step that the run goes on from; 0 begins a new log. Lines of later steps, which
            a killed run wrote after its last checkpoint, are dropped, so that each stands once.
        evaluated: the last step whose evaluation the checkpoint knows of; lines of later
            evaluations are dropped likewise.
        active: False for all ranks but the main one.
    Raises:
        UserError: if the log cannot be written.
    """

    def __init__(self, output_dir: Path, step: int, evaluated: int, active: bool = True) -> None:
        self.output_dir, self.active = output_dir, active
        if not active:
            return
        # imported here: it takes a second, and --help and wrong flags should not wait for it
        from torch.utils.tensorboard import SummaryWriter

        path, board = output_dir / METRICS, output_dir / "tensorboard"
        last = {"train": step, "eval": evaluated}
        known = read_metrics(output_dir) if step else []
        kept = [entry for entry in known if entry["step"] <= last.get(entry["kind"], step)]
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(METRICS + ".tmp")
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            os.replace(temporary, path)
            self._file = path.open("a")
            if step == 0:
                shutil.rmtree(board, ignore_errors=True)  # of a run that --overwrite gave up
            self._board = SummaryWriter(str(board), purge_step=step + 1)
        except OSError as error:
            raise UserError(f"--output_dir={output_dir}: cannot write the log: {error}") from error

    def write_args(self, args: Namespace, device: torch.device, step: int) -> None:
        """Arguments, commit, versions and hardware; those of a resumed run come after the
        first's, under "resumed", with the step they begin at."""
        if not self.active:
            return
        found = {
            "args": plain(args),
            "commit": git_commit(),
            "versions": versions(),
            "hardware": describe_hardware(device),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        path = self.output_dir / "args.json"
        if step and path.is_file():
            try:
                first = json.loads(path.read_text())
                found = first | {"resumed": [*first.get("resumed", []), {"step": step, **found}]}
            except (ValueError, TypeError, AttributeError):
                pass  # cut off by a kill: this part's account is all there is
        path.write_text(json.dumps(found, indent=2) + "\n")

    def write(self, entry: dict) -> None:
        """One JSON object as one line of metrics.jsonl, its numbers to TensorBoard too."""
        if not self.active:
            return
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        kind = entry["kind"] + ("/" + entry["distance"] if "distance" in entry else "")
        for name, value in entry.items():
            if isinstance(value, float) and name != "epoch":
                self._board.add_scalar(f"{kind}/{name}", value, entry["step"])

    def close(self) -> None:
        """Flush and close."""
        if self.active:
            self._file.close()
            self._board.close()
