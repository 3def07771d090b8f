"""The paper's figures on CIFAR-10 on one accelerator, in pieces that resume each other.

    python scripts/reproduce_cifar10.py --dry_run      # the plan: entries, minutes, commands
    python scripts/reproduce_cifar10.py --minutes=9 --state_dir=runs/campaign --output_dir=results/gpu

The second works for at most 9 minutes of wall-clock time, everything included, and exits with 75 if
work is left; the same command again goes on where it was, also after a kill at any moment. In one go:

    until python scripts/reproduce_cifar10.py --minutes=9; do [ $? -eq 75 ] || break; done

Entries, in this order, with their minutes of --total_minutes=25 (--shares, --only):

    throughput   1.5   scripts/benchmark.py: how long an epoch takes with which speed flags
    32bits       8     --recipe=fast
    16bits       5     --recipe=fast
    64bits       5     --recipe=fast
    released     rest  --recipe=released at 32 bits

A run's number of epochs is what fits into its minutes at the speed measured; it is fixed when the
run starts and stands in STATE_DIR/campaign.json, so that the printed command repeats the run. A run
that turns out slower takes longer, at the cost of what comes last. What fails is written down with
its last lines, and the next entry has its turn; a run that fails with speed flags (--compile,
--cuda_graph) is tried without them first.

OUTPUT_DIR gets what is to be kept, after every piece: table.md, curves.png, benchmark.json,
campaign.json, and a folder a run with args.json, metrics.jsonl, console.log, learning_curve.png,
retrieval.png and, at its end, the weights in parts of at most 15 MiB. It prints what the trainings
print, then the table. Exit codes: 0 all done, 75 call again, 1 something failed, 2 bad input.
"""
# ruff: noqa: E402  the clock starts before torch is imported, which can take half a minute

import time

_STARTED = time.monotonic()

import argparse
import ctypes
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import uuid
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from args import add_cifar10_flags, code_bits, parse_args, spq_parser
from utils.checkpoint import LAST
from utils.cli import run_main
from utils.errors import UserError
from utils.figures import COLUMN, DISTANCE_NAMES, PRINT, Paths, learning_curve, save
from utils.flags import BooleanFlag, HelpFormatter, Parser, number
from utils.logging import METRICS, read_metrics
from utils.loop import TIME_IS_OVER, TrainingStopped
from utils.run_figures import CLASS_COLOURS, CLASS_MARKERS
from utils.trained import load_trained, save_trained

FORMAT, VERSION = "product-quantization-campaign", 1
STATE, TABLE, CURVES, BENCHMARK = "campaign.json", "table.md", "curves.png", "benchmark.json"
PAPER = {16: 0.768, 32: 0.793, 64: 0.812}  # mAP@1000; that of 16 bits is quoted from memory
TOTAL_MINUTES = 25.0  # that the entries' minutes are meant for
SPEED_FLAGS = ("cuda_graph", "compile")  # in the order in which they are given up
EVALUATIONS = 8  # in a run, about
CHECKPOINT_SECONDS = 60  # of training between checkpoints: what a kill can cost
PART_BYTES = 15 * 2**20  # of weights in one file
BEAT_SECONDS = 5.0  # between notes of the time used: what a kill can hide
LAST_LINES = 20  # of a failed run's output that are kept
TRAIN_IMAGES = 50_000
COPIED = ("args.json", METRICS, "console.log")  # of a run, as text
DISTANCE = "squared_l2"  # of the table's figures; `l2` is the released code's
# flags of main_SPQ.py that are the campaign's own business
OWN_FLAGS = {
    "recipe", "N_books", "epochs", "eval_epoch", "compile", "cuda_graph", "device", "data_dir",
    "if_download", "dataset", "output_dir", "resume", "overwrite", "eval_only", "max_minutes",
    "max_steps",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line of the plan.

    Attributes:
        name: also its folder's.
        minutes: of TOTAL_MINUTES; None for what is left.
        recipe, N_books: of its run.
    """

    name: str
    minutes: float | None
    recipe: str = ""
    N_books: int = 0


THROUGHPUT = Entry("throughput", 1.5)
RUNS = (
    Entry("32bits", 8.0, "fast", 8),
    Entry("16bits", 5.0, "fast", 4),
    Entry("64bits", 5.0, "fast", 16),
    Entry("released", None, "released", 8),
)
ENTRIES = (THROUGHPUT, *RUNS)


@dataclass(frozen=True)
class Speed:
    """How long things take, and which speed flags that is with.

    Attributes:
        epoch_s, eval_s: an epoch of training, an evaluation; seconds.
        flags: without dashes.
        source: who says so.
    """

    epoch_s: float
    eval_s: float
    flags: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code, its last lines, and whether it was told to."""

    code: int
    lines: tuple[str, ...]
    stopped: bool


class Cut(Exception):
    """The time of this call is over, or a signal came; work is left."""


# --- one call -----------------------------------------------------------------------------------


class Campaign:
    """One call: what is known from the calls before it, and the time that it has.

    Args:
        args: the flags.
        program: the command that trains, to which flags are added.
        benchmark: the command that measures, likewise.
        started: when this call began, by time.monotonic().
    """

    def __init__(
        self, args: Namespace, program: list[str], benchmark: list[str], started: float
    ) -> None:
        self.args, self.program, self.benchmark = args, program, benchmark
        self.started = started
        self.end = started + 60 * args.minutes
        self.state = read_state(args.state_dir / STATE)
        self.used_before: float = self.state["used_s"]
        self.lock: int | None = None
        self.process: subprocess.Popen | None = None
        self.signal = 0
        self.skipped: dict[str, str] = {}  # entries without enough time, and why

    # --- time and state -------------------------------------------------------------------------

    @property
    def start_s(self) -> float:
        """What a run takes before its first step, seconds: as last measured."""
        return self.state["start_s"] or self.args.start_seconds

    @property
    def left_s(self) -> float:
        """Seconds of this call, without the margin at its end."""
        return self.end - self.args.margin_seconds - time.monotonic()

    @property
    def total_left_s(self) -> float:
        """Seconds of the whole campaign."""
        return 60 * self.args.total_minutes - self.used_s

    @property
    def used_s(self) -> float:
        """Seconds that all calls have taken."""
        return self.used_before + time.monotonic() - self.started

    def save(self) -> None:
        """Write the state, whole or not at all."""
        self.state["used_s"] = self.used_s
        write_text(self.args.state_dir / STATE, json.dumps(self.state, indent=1) + "\n")

    def check_time(self) -> None:
        """
        Raises:
            Cut: if a run started now would spend more time on starting than on training.
        """
        if self.signal or self.left_s < 2 * self.start_s:
            raise Cut

    def open(self) -> None:
        """Make the folders and keep other calls out.

        Raises:
            UserError: if a folder cannot be used, or another call is at work.
        """
        for flag in ("state_dir", "output_dir"):
            folder = getattr(self.args, flag)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--{flag}={folder}: cannot be made: {error}") from error
        check_output(self.args.output_dir, self.state["id"])
        path = self.args.state_dir / "lock"
        self.lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        told = False
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:  # held by another call, or by the training that a killed one left
                if not told:
                    print("waiting for the training of an earlier call to save and leave ...")
                told = True
                if self.left_s < 2 * self.start_s:
                    raise UserError(
                        f"--state_dir={self.args.state_dir}: another call is at work there; wait "
                        "for its end, or name another folder"
                    ) from None
                time.sleep(0.2)
        if told:  # it may have written since
            self.state = read_state(self.args.state_dir / STATE)
            self.used_before = self.state["used_s"]

    def close(self) -> None:
        """Let other calls in."""
        if self.lock is not None:
            os.close(self.lock)

    # --- programs -------------------------------------------------------------------------------

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first lets the program save and leave, the second ends it."""
        process, again = self.process, self.signal
        self.signal = number
        if process is not None:
            (process.kill if again else process.terminate)()

    def attend(
        self, command: Sequence[str], log: Path, seconds: float, stdout: Path | None = None
    ) -> Ended:
        """Run a program, its output to the terminal and, appended, to a log.

        Args:
            command: the words.
            log: the file.
            seconds: after which it gets SIGTERM; it is killed shortly before the call ends.
            stdout: a file for what it prints, if that is no matter of the log.
        """
        stop_at = time.monotonic() + seconds
        kill_at = max(stop_at + 1, self.end - self.args.margin_seconds / 4)
        lines: deque[str] = deque(maxlen=LAST_LINES)
        stopped = killed = False
        with log.open("a") as file, (stdout or Path(os.devnull)).open("w") as result:
            process = self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=result if stdout else subprocess.PIPE,
                stderr=subprocess.PIPE if stdout else subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches it once, by `on_signal`
                pass_fds=[self.lock],  # held as long as it lives
                preexec_fn=_leave_with_parent if _LIBC else None,
            )
            if self.signal:  # came while it was started
                process.terminate()

            def read() -> None:
                for line in process.stderr if stdout else process.stdout:
                    if line.strip():  # a progress bar leaves empty ones
                        lines.append(line.rstrip())
                        print(lines[-1], flush=True)
                        print(lines[-1], file=file, flush=True)

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            while True:
                now = time.monotonic()
                if now >= stop_at and not stopped:
                    process.terminate()
                    stopped = True
                if now >= kill_at and not killed:
                    process.kill()
                    killed = True
                wakes = kill_at if stopped else stop_at
                try:
                    code = process.wait(max(0.01, min(BEAT_SECONDS, wakes - now)))
                    break
                except subprocess.TimeoutExpired:
                    self.save()
            self.process = None
            try:
                os.killpg(process.pid, signal.SIGKILL)  # helpers that it may have left
            except (ProcessLookupError, PermissionError):
                pass
            reader.join(timeout=5)
        return Ended(code, tuple(lines), stopped or bool(self.signal))

    # --- throughput -----------------------------------------------------------------------------

    def measure(self) -> None:
        """Call the benchmark's parts; what they print goes into the state.

        Raises:
            Cut: if the time of this call is over.
            UserError: if no speed came of it.
        """
        parts: dict = self.state["throughput"]
        share = self.minutes_of(THROUGHPUT) * 60
        first = next((e for e in RUNS if e.name in self.args.only), RUNS[0])
        flags = self.flags_of(first)
        sizes = [f"--width={flags.width}", f"--batch_size={flags.batch_size}"]
        for part in ("epoch", "profile", "augmentation"):
            if part in parts and not (part == "epoch" and not self.variants()):
                continue
            self.check_time()
            began, seconds = time.monotonic(), share - self.state["throughput_s"]
            if seconds <= 0:
                parts[part] = {"error": f"no time: {THROUGHPUT.name} has {share / 60:g} minutes"}
                continue
            print(f"throughput, {part}: at most {seconds:.0f} s", flush=True)
            result = self.args.state_dir / f"{part}.json"
            ended = self.attend(
                [*self.benchmark, f"--part={part}", *sizes],
                self.args.state_dir / "throughput.log",
                min(seconds, self.left_s),
                result,
            )
            self.state["throughput_s"] += time.monotonic() - began
            if ended.stopped and self.state["throughput_s"] < share:
                self.save()
                raise Cut
            try:
                found = json.loads(result.read_text())
                if not isinstance(found.get(part), dict):
                    raise ValueError(f"nothing under {part!r}")
                parts[part] = found
            except (ValueError, AttributeError) as error:
                why = "took longer than its minutes" if ended.stopped else f"exit {ended.code}"
                lines = list(ended.lines)
                parts[part] = {"error": f"{why}, {error}", "output": lines}
                print(f"throughput, {part}: {why}; left out")
            self.save()
        if not self.variants():
            self.state["throughput_s"] = 0.0  # another call tries it again
            self.save()
            raise UserError(
                f"throughput: benchmark.py --part=epoch gave no time for an epoch "
                f"({parts['epoch'].get('error', 'every variant failed')}); look at "
                f"{self.args.state_dir / 'throughput.log'}, call again, or go on with "
                "--skip_throughput --epoch_seconds=SECONDS"
            )

    def variants(self) -> list[tuple[float, frozenset[str], bool]]:
        """What the benchmark has measured: seconds an epoch, speed flags, joint views or not."""
        found = self.state["throughput"].get("epoch", {}).get("epoch", {})
        usable = []
        for name, figures in found.items():
            seconds = figures.get("epoch_s") if isinstance(figures, dict) else None
            if isinstance(seconds, int | float) and 0 < seconds < math.inf:
                flags = frozenset(f for f in SPEED_FLAGS if f in name)
                usable.append((float(seconds), flags, "joint" in name))
        return usable

    # --- plan -----------------------------------------------------------------------------------

    def minutes_of(self, entry: Entry) -> float | None:
        """Its share of --total_minutes; None for what is left."""
        if entry.name in self.args.shares:
            return self.args.shares[entry.name]
        if entry.minutes is None:
            return None
        return entry.minutes * self.args.total_minutes / TOTAL_MINUTES

    def flags_of(self, entry: Entry, flags: Sequence[str] = ()) -> Namespace:
        """What main_SPQ.py makes of an entry's flags."""
        words = [f"--recipe={entry.recipe}", f"--N_books={entry.N_books}", *self.args.extra]
        return parse_args(spq_parser(), [*words, *flags])

    def speed_of(self, entry: Entry) -> Speed | None:
        """The fastest way that is known to work; None if nothing is known."""
        args, dropped = self.args, set(self.state["dropped"])
        asked = None if args.speed_flags is None else set(args.speed_flags) - dropped
        if args.epoch_seconds is not None:
            flags = tuple(f for f in SPEED_FLAGS if f in (asked or ()))
            return Speed(args.epoch_seconds, args.eval_seconds, flags, "--epoch_seconds")
        joint = self.flags_of(entry).joint_views
        known = [v for v in self.variants() if not v[1] & dropped]
        if asked is not None:
            known = [v for v in known if v[1] == asked] or [(v[0], asked, v[2]) for v in known]
        known = [v for v in known if v[2] == joint] or known
        if not known:
            return None
        seconds, chosen, _ = min(known, key=lambda v: v[0])
        flags, source = tuple(f for f in SPEED_FLAGS if f in chosen), "benchmark.py"
        eval_s = args.eval_seconds
        for name, run in self.state["runs"].items():  # what a whole run took says more
            if run["status"] == "done" and run.get("measured"):
                eval_s = run["measured"]["eval_s"]
                if run["recipe"] == entry.recipe and set(run["speed_flags"]) == chosen:
                    seconds, source = run["measured"]["epoch_s"], name
        return Speed(seconds, eval_s, flags, source)

    def plan(self, entry: Entry) -> dict | str:
        """A run's epochs and flags, or why it cannot be run.

        Raises:
            UserError: if nothing is known of the speed.
        """
        share = self.minutes_of(entry)
        seconds = self.total_left_s if share is None else min(60 * share, self.total_left_s)
        if share is not None and seconds < 0.5 * 60 * share:
            return f"{max(0.0, seconds / 60):.1f} of its {share:g} minutes are left"
        speed = self.speed_of(entry)
        if speed is None:
            raise UserError(
                f"{entry.name}: no speed has been measured to plan by; leave throughput in --only, "
                "or say --skip_throughput --epoch_seconds=SECONDS"
            )
        starts = math.ceil(seconds / (60 * self.args.minutes)) * self.start_s
        epochs = int((seconds - starts - EVALUATIONS * speed.eval_s) / speed.epoch_s)
        flags = self.flags_of(entry)
        least = max(1, math.ceil(flags.warmup_epochs))
        if epochs < least:
            return (
                f"{max(0.0, seconds / 60):.1f} minutes are left, less than {least} epochs of "
                f"{speed.epoch_s:.3g} s and the evaluations take"
            )
        images = min(TRAIN_IMAGES, flags.limit_train or TRAIN_IMAGES)
        pace = CHECKPOINT_SECONDS / speed.epoch_s * max(1, images // flags.batch_size)
        return {
            "status": "running",
            "recipe": entry.recipe,
            "bits": code_bits(flags),
            "minutes": round(seconds / 60, 2),
            "epochs": epochs,
            "eval_epoch": math.ceil(epochs / EVALUATIONS),
            "checkpoint_every": max(1, round(pace)),
            "N_books": entry.N_books,
            "extra": self.args.extra,
            "speed_flags": list(speed.flags),
            "planned_by": {"epoch_s": speed.epoch_s, "eval_s": speed.eval_s, "of": speed.source},
            "used_s": 0.0,
            "starts": 0,
            "notes": [],
        }

    def command(self, name: str, run: dict) -> list[str]:
        """The words that train a run, but where it is kept and how long it may take."""
        return [*self.program, *run_flags(run), *self.places(), *self.keeping(name, run)]

    def places(self) -> list[str]:
        args = self.args
        words = ["--data_dir", str(args.data_dir), f"--device={args.device}"]
        return words + (["--if_download"] if args.if_download else [])

    def keeping(self, name: str, run: dict) -> list[str]:
        every = f"--checkpoint_every={run['checkpoint_every']}"
        given = any(word.startswith("--checkpoint_every") for word in run["extra"])
        return [
            *([] if given else [every]),
            f"--output_dir={self.args.state_dir / name}",
            "--resume=auto",
        ]

    # --- runs -----------------------------------------------------------------------------------

    def train(self, entry: Entry) -> None:
        """Go on with a run, or start it.

        Raises:
            Cut: if the time of this call is over.
        """
        runs, name, folder = self.state["runs"], entry.name, self.args.state_dir / entry.name
        run = runs.get(name)
        if run is None:
            planned = self.plan(entry)
            if isinstance(planned, str):
                self.skipped[name] = planned
                print(f"{name}: not run, {planned}")
                return
            run = runs[name] = planned
        if run["status"] == "failed" and self.args.retry_failed:
            run["status"] = "running"
        tried: list[str] = []  # flags given up since the last try that worked
        while run["status"] == "running":
            self.check_time()
            self.save()
            folder.mkdir(parents=True, exist_ok=True)
            minutes = (self.left_s - self.start_s) / 60
            command = [*self.command(name, run), f"--max_minutes={minutes:.4f}"]
            print(f"\n{name}: {run['epochs']} epochs; {shlex.join(command)}", flush=True)
            began, began_at = time.monotonic(), time.time()
            ended = self.attend(command, folder / "console.log", self.left_s)
            run["used_s"] += time.monotonic() - began
            run["starts"] += 1
            self.note_start(folder, began_at)
            steps = [e["step"] for e in read_metrics(folder) if e["kind"] == "train"]
            if ended.code == 0:
                run["status"] = "done"
                run["measured"] = measured(run, folder)
            elif ended.code != TIME_IS_OVER and not ended.stopped:
                flag = next((f for f in SPEED_FLAGS if f in run["speed_flags"]), None)
                if flag is None or not may_be_its_fault(ended, run["speed_flags"]):
                    run["status"] = "failed"
                    run["exit_code"], run["output"] = ended.code, list(ended.lines)
                    print(f"{name}: failed with exit code {ended.code}")
                else:
                    tried.append(flag)
                    run = self.give_up(entry, run, flag, ended, max(steps, default=0))
                    runs[name] = run
                    self.save()
                    continue
            if run["status"] != "failed":
                self.state["dropped"] = sorted({*self.state["dropped"], *tried})
            self.save()
            self.publish()
            if run["status"] == "running":
                raise Cut

    def give_up(self, entry: Entry, run: dict, flag: str, ended: Ended, step: int) -> dict:
        """The run without one of its speed flags: planned anew if it has not trained yet."""
        last = ended.lines[-1] if ended.lines else "no output"
        note = f"exit code {ended.code} at step {step} with --{flag}, tried again without: {last}"
        print(f"{entry.name}: {note}")
        rest = [f for f in run["speed_flags"] if f != flag]
        run = run | {"speed_flags": rest, "notes": [*run["notes"], note]}
        if step or self.args.epoch_seconds is not None:
            return run
        without = set(SPEED_FLAGS) - set(rest)
        speeds = [s for s, flags, _ in self.variants() if not flags & without]
        if speeds:  # the same minutes at a lower speed
            scale = run["planned_by"]["epoch_s"] / max(min(speeds), run["planned_by"]["epoch_s"])
            epochs = max(1, int(run["epochs"] * scale))
            run |= {"epochs": epochs, "eval_epoch": math.ceil(epochs / EVALUATIONS)}
        return run

    def note_start(self, folder: Path, began_at: float) -> None:
        """How long it took to the first step: args.json is written just before it."""
        try:
            seconds = (folder / "args.json").stat().st_mtime - began_at
        except OSError:
            return
        if seconds > 0:
            self.state["start_s"] = seconds

    # --- results --------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write OUTPUT_DIR anew from what is there; every file whole or not at all."""
        args, out = self.args, self.args.output_dir
        self.save()
        hidden = {str(args.state_dir / e.name): f"runs/{e.name}" for e in RUNS}

        def text(content: str) -> str:
            for place, name in hidden.items():  # no folders of this machine
                content = content.replace(place, name)
            return content

        write_text(out / STATE, text((args.state_dir / STATE).read_text()))
        if self.state["throughput"]:
            write_text(out / BENCHMARK, json.dumps(merged(self.state["throughput"]), indent=2))
        curves = {}
        for name, run in self.state["runs"].items():
            source, target = args.state_dir / name, out / name
            target.mkdir(exist_ok=True)
            for file in COPIED:
                if (source / file).is_file():
                    write_text(target / file, text((source / file).read_text(errors="replace")))
            entries, flags = read_metrics(source), run_args(source)
            if not flags or not any(e["kind"] == "train" for e in entries):
                continue
            metric = f"mAP@{flags['Top_N']}"
            title = f"{name}, recipe {run['recipe']}"
            learning_curve(entries, target / "learning_curve.png", metric, DISTANCE, title)
            curves[f"{name}, {run['recipe']}"] = curve(entries, flags["batch_size"], metric)
            if run["status"] == "done":
                if (source / "retrieval.png").is_file():
                    copy(source / "retrieval.png", target / "retrieval.png")
                run["weights"] = write_weights(source, target, args.bf16_weights)
        if any(curves.values()):
            draw_curves(curves, self.top_n(), out / CURVES)
        write_text(out / TABLE, self.table())
        self.save()

    def top_n(self) -> int:
        return self.flags_of(RUNS[0]).Top_N

    def table(self) -> str:
        """The results as Markdown, read from the runs' logs."""
        n = self.top_n()
        head = f"bits | recipe | epochs | training minutes | mAP@{n}, found | mAP@{n}, all"
        head += f" | mAP@all | mAP@{n}, found, l2 | paper | command"
        lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
        remarks, hardware = [], None
        for entry in RUNS:
            run = self.state["runs"].get(entry.name)
            if run is None:
                if entry.name in self.skipped:
                    remarks.append(f"Not run: {entry.name}, {self.skipped[entry.name]}.")
                continue
            folder = self.args.state_dir / entry.name
            lines.append(row(entry, run, folder))
            hardware = hardware or run_args(folder, "hardware")
            remarks += [f"{entry.name}: {note}" for note in run["notes"]]
            if run["status"] == "failed":
                last = run["output"][-1] if run["output"] else "no output"
                remarks.append(f"Failed: {entry.name}, exit code {run['exit_code']}: {last}")
            if (parts := run.get("weights", {}).get("parts", 0)) > 1:
                remarks.append(
                    f"Weights of {entry.name} are in {parts} parts: "
                    f"`cat {entry.name}/model.pt.part* > {entry.name}/model.pt`"
                )
        if any(run.get("weights", {}).get("bf16") for run in self.state["runs"].values()):
            remarks.append(
                "Weights are kept in bf16 (convolutions and head; the rest in float32); the "
                "figures are of the weights before that."
            )
        return "\n".join(
            [
                f"# SPQ on CIFAR-10, {self.used_s / 60:.1f} minutes in all",
                "",
                f"Last epoch, one seed, {DISTANCE_NAMES[DISTANCE]} unless the column says l2. AP "
                f'is divided by the relevant images found in the top {n} ("found"), or by all '
                'relevant ones ("all"). Minutes are of training alone. The paper\'s .768 is '
                "quoted from memory.",
                *(["", f"On {hardware.get('gpu', hardware['processor'])}."] if hardware else []),
                "",
                *lines,
                "",
                *[f"- {remark}" for remark in remarks],
            ]
        )


# --- the state file -----------------------------------------------------------------------------


def read_state(path: Path) -> dict:
    """The campaign's state; that of a new one if there is no file.

    Raises:
        UserError: if it is damaged, or no campaign's.
    """
    try:
        state = json.loads(path.read_text())
        if (state["format"], state["version"]) != (FORMAT, VERSION):
            raise ValueError(f"version {state['version']}")
        return state
    except FileNotFoundError:
        return {
            "format": FORMAT,
            "version": VERSION,
            "id": uuid.uuid4().hex,
            "used_s": 0.0,
            "start_s": None,
            "throughput": {},
            "throughput_s": 0.0,
            "dropped": [],
            "runs": {},
        }
    except OSError as error:
        raise UserError(f"--state_dir={path.parent}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--state_dir={path.parent}: {path.name} is damaged or not a campaign's ({error}); "
            "choose another folder, or delete it there and the runs are started anew"
        ) from error


def check_output(folder: Path, identity: str) -> None:
    """
    Raises:
        UserError: if the folder holds results that are not this campaign's.
    """
    names = [STATE, TABLE, CURVES, BENCHMARK, *(entry.name for entry in RUNS)]
    found = [name for name in names if (folder / name).exists()]
    try:
        ours = json.loads((folder / STATE).read_text())["id"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if found and not ours:
        raise UserError(
            f"--output_dir={folder}: holds {found[0]}, which is not of the campaign in --state_dir;"
            " choose another --output_dir, or the --state_dir that it came from"
        )


def write_text(path: Path, content: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


# --- reading runs -------------------------------------------------------------------------------


def run_flags(run: dict) -> list[str]:
    """Flags of main_SPQ.py that repeat a run."""
    return [
        f"--recipe={run['recipe']}",
        f"--N_books={run['N_books']}",
        *run["extra"],
        f"--epochs={run['epochs']}",
        f"--eval_epoch={run['eval_epoch']}",
        *(f"--{flag}" for flag in run["speed_flags"]),
    ]


def run_args(folder: Path, part: str = "args") -> dict:
    """What a run's args.json tells; empty if it is not there or cut off."""
    try:
        return json.loads((folder / "args.json").read_text())[part]
    except (OSError, ValueError, KeyError):
        return {}


def minutes_by_step(entries: list[dict], batch_size: int) -> dict[int, float]:
    """Minutes of training alone up to each logged step.

    A line's `images_per_s` is the mean since the line before it, or since the run was resumed there,
    without evaluations.
    """
    minutes, last, total = {0: 0.0}, 0, 0.0
    for e in entries:
        if e["kind"] == "train":
            total += (e["step"] - last) * batch_size / e["images_per_s"] / 60
            last = e["step"]
            minutes[last] = total
    return minutes


def last_evaluation(entries: list[dict]) -> dict[str, dict]:
    """The last metrics, by distance; empty before the first evaluation."""
    evals = [e for e in entries if e["kind"] == "eval"]
    return {e["distance"]: e for e in evals if e["step"] == evals[-1]["step"]}


def curve(entries: list[dict], batch_size: int, metric: str) -> list[tuple[float, float]]:
    """(minutes of training, metric) of each evaluation."""
    minutes = minutes_by_step(entries, batch_size)
    evals = [e for e in entries if e["kind"] == "eval" and e["distance"] == DISTANCE]
    return [(minutes[e["step"]], e[metric]) for e in evals if e["step"] in minutes]


def measured(run: dict, folder: Path) -> dict[str, float] | None:
    """Seconds of an epoch of training and of an evaluation, starting included, over a whole run."""
    entries, flags = read_metrics(folder), run_args(folder)
    evals = sum(e["kind"] == "eval" and e["distance"] == DISTANCE for e in entries)
    if not flags or not evals:
        return None
    training = 60 * max(minutes_by_step(entries, flags["batch_size"]).values())
    other = max(0.0, run["used_s"] - training)
    return {"epoch_s": training / run["epochs"], "eval_s": other / evals}


def may_be_its_fault(ended: Ended, flags: Sequence[str]) -> bool:
    """Whether leaving a speed flag away could help: bad input (exit code 2) that does not name
    one is no such case."""
    return ended.code != 2 or any(flag in line for flag in flags for line in ended.lines)


def merged(parts: dict) -> dict:
    """One object of what the benchmark's parts printed."""
    found = {}
    for part, printed in parts.items():
        found |= {part: printed} if "error" in printed else printed
    return found


# --- writing results ----------------------------------------------------------------------------


def row(entry: Entry, run: dict, folder: Path) -> str:
    """A run's line of the table."""
    entries, flags = read_metrics(folder), run_args(folder)
    found = last_evaluation(entries)
    figures = ["", "", "", ""]
    minutes, epochs = "", f"{run['epochs']}"
    if flags and found:
        name = f"mAP@{flags['Top_N']}"
        main = found[DISTANCE]
        keys = (name, f"{name}_all_relevant", "mAP@all")
        figures = [score(main[key]) for key in keys] + [score(found["l2"][name])]
        by_step = minutes_by_step(entries, flags["batch_size"])
        minutes = f"{by_step[max(s for s in by_step if s <= main['step'])]:.1f}"
        if run["status"] != "done":
            epochs = f"{main['epoch']:g} of {epochs}"
    elif run["status"] != "done":
        epochs = f"0 of {epochs}"
    paper = score(PAPER[run["bits"]], 3) if run["bits"] in PAPER else ""
    command = f"`python main_SPQ.py {shlex.join(run_flags(run))} --output_dir=runs/{entry.name}`"
    cells = [f"{run['bits']}", run["recipe"], epochs, minutes, *figures, paper, command]
    return "| " + " | ".join(cells) + " |"


def score(value: float, digits: int = 4) -> str:
    """.3516"""
    return f"{value:.{digits}f}".removeprefix("0")


@plt.rc_context(PRINT)
def draw_curves(curves: dict[str, list[tuple[float, float]]], top_n: int, path: Paths) -> None:
    """mAP over minutes of training alone, a line a run."""
    figure, axis = plt.subplots(figsize=(COLUMN, 2.8), constrained_layout=True)
    styles = ("-", "--", "-.", ":")
    for i, (name, points) in enumerate(curves.items()):
        if points:
            axis.plot(
                *zip(*points, strict=True),
                color=CLASS_COLOURS[i],
                marker=CLASS_MARKERS[i],
                linestyle=styles[i % len(styles)],
                label=f"{name}: {score(points[-1][1], 3)}",
            )
    axis.set_xlabel("minutes of training alone")
    axis.set_ylabel(f"mAP@{top_n} ({DISTANCE_NAMES[DISTANCE]})")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")
    save(figure, path)


def write_weights(source: Path, target: Path, bf16: bool) -> dict[str, int | bool]:
    """model.pt, or in parts that `cat` joins if it is larger than PART_BYTES.

    Args:
        source: a run's folder.
        target: where they go.
        bf16: keep the large tensors of the trunk in bf16; `load_trained` makes them float32 again.
            Batch norm and codebooks, a few thousand numbers, stay as they are.
    """
    trained = load_trained(source / LAST)
    if bf16:
        for weight in trained.model.trunk.parameters():
            if weight.ndim > 1:
                weight.data = weight.data.bfloat16()
    whole = source / "model.tmp"
    save_trained(whole, trained)
    content = whole.read_bytes()
    whole.unlink()
    parts = [content[i : i + PART_BYTES] for i in range(0, len(content), PART_BYTES)]
    digits = len(str(len(parts) - 1))
    names = [f"model.pt.part{i:0{digits}d}" for i in range(len(parts))]
    names = names if len(parts) > 1 else ["model.pt"]
    for old in target.glob("model.pt*"):
        if old.name not in names:
            old.unlink()
    for name, part in zip(names, parts, strict=True):
        temporary = target / (name + ".tmp")
        temporary.write_bytes(part)
        os.replace(temporary, target / name)
    return {"bf16": bf16, "parts": len(parts)}


def pack(folder: Path, path: Path) -> None:
    """Everything but weights, as one tar; names begin at the folder."""
    temporary = path.with_name(path.name + ".tmp")
    skipped = {path.resolve(), temporary.resolve()}
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.resolve() not in skipped]
    with tarfile.open(temporary, "w") as tar:
        for file in files:
            if not file.name.startswith("model.pt") and file.suffix != ".tmp":
                tar.add(file, str(file.relative_to(folder)))
    os.replace(temporary, path)
    print(f"packed all but the weights: {path}")


# --- children -----------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _leave_with_parent() -> None:
    """In a child: SIGTERM, on which a training saves and leaves, when this process is killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


# --- command line -------------------------------------------------------------------------------


def entry_names(text: str) -> list[str]:
    """A type for argparse: names divided by commas, in the order of ENTRIES."""
    known, names = [entry.name for entry in ENTRIES], text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{','.join(unknown)}: no such entry; allowed are {', '.join(known)}"
        )
    return [name for name in known if name in names]


def shares(text: str) -> dict[str, float]:
    """A type for argparse: NAME:MINUTES,NAME:MINUTES."""
    minutes = number(float, 0, strict=True)
    found = {}
    for part in text.split(","):
        name, colon, value = part.partition(":")
        if not colon:
            raise argparse.ArgumentTypeError(f"{part}: must be NAME:MINUTES, as in 32bits:8")
        (name,) = entry_names(name)
        found[name] = minutes(value)
    return found


def speed_flags(text: str) -> list[str]:
    """A type for argparse: names divided by commas, or none."""
    names = [] if text == "none" else text.split(",")
    if unknown := [name for name in names if name not in SPEED_FLAGS]:
        raise argparse.ArgumentTypeError(
            f"{','.join(unknown)}: no speed flag; allowed are {', '.join(SPEED_FLAGS)} and none"
        )
    return names


def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags, checked."""
    parser = Parser(
        prog="reproduce_cifar10.py",
        description="The paper's figures on CIFAR-10 on one accelerator, in pieces that resume "
        "each other.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    positive, not_negative = number(float, 0, strict=True), number(float, 0)
    flag(
        "--minutes",
        type=positive,
        default=9.0,
        metavar="MINUTES",
        help="wall-clock time of this call, everything included; it ends before",
    )
    flag(
        "--total_minutes",
        type=positive,
        default=TOTAL_MINUTES,
        metavar="MINUTES",
        help="of the whole campaign, all calls together; a run that has started is finished",
    )
    flag(
        "--state_dir",
        type=Path,
        default=Path("runs/reproduce_cifar10"),
        metavar="DIR",
        help="the campaign's state, and the runs with their checkpoints",
    )
    flag(
        "--output_dir",
        type=Path,
        default=Path("results/reproduce_cifar10"),
        metavar="DIR",
        help="what is to be kept: table, pictures, logs, weights; no file above 16 MiB",
    )
    flag(
        "--shares",
        type=shares,
        default={},
        metavar="NAME:MINUTES,...",
        help="minutes of entries (default: throughput:1.5,32bits:8,16bits:5,64bits:5 of 25, more or "
        "less with --total_minutes; released has what is left)",
    )
    flag(
        "--only",
        type=entry_names,
        default=[entry.name for entry in ENTRIES],
        metavar="NAME,...",
        help="of throughput, 32bits, 16bits, 64bits, released (default: all)",
    )
    flag(
        "--dry_run",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="print the plan, and do nothing",
    )
    flag(
        "--pack",
        type=Path,
        default=None,
        metavar="FILE",
        help="at the end of the call write all of --output_dir but the weights into one tar",
    )
    flag(
        "--bf16_weights",
        action=BooleanFlag,
        default=True,
        metavar="BOOL",
        help="keep the weights in half the bytes",
    )
    flag(
        "--retry_failed",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="go on with runs that failed in an earlier call",
    )
    flag(
        "--skip_throughput",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="measure nothing, but believe --epoch_seconds",
    )
    flag(
        "--epoch_seconds",
        type=positive,
        default=None,
        metavar="SECONDS",
        help="with --skip_throughput: of an epoch of training",
    )
    flag(
        "--speed_flags",
        type=speed_flags,
        default=None,
        metavar="NAME,...",
        help="of compile, cuda_graph, or none (default: the fastest that throughput found to work; "
        "none with --skip_throughput)",
    )
    flag(
        "--eval_seconds",
        type=not_negative,
        default=10.0,
        metavar="SECONDS",
        help="of an evaluation, until a run has shown",
    )
    flag(
        "--start_seconds",
        type=positive,
        default=15.0,
        metavar="SECONDS",
        help="of a run before its first step, until a run has shown",
    )
    flag(
        "--margin_seconds",
        type=positive,
        default=30.0,
        metavar="SECONDS",
        help="at the end of a call, to save and to write the results",
    )
    flag(
        "--extra",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help='further flags of main_SPQ.py for all runs, as in --extra="--width=16 --lr=1e-3"',
    )
    flag("--device", choices=("auto", "cuda", "cpu"), default="auto", help="of the trainings")
    add_cifar10_flags(parser)
    args = parser.parse_args(argv)
    if args.skip_throughput != (args.epoch_seconds is not None):
        parser.error("--skip_throughput and --epoch_seconds: allowed are both of them, or neither")
    if args.skip_throughput:
        args = Namespace(**{**vars(args), "only": [n for n in args.only if n != THROUGHPUT.name]})
    if 60 * args.minutes <= args.margin_seconds + 2 * args.start_seconds:
        parser.error(
            f"--minutes={args.minutes:g}: leaves no time to train; allowed is more than "
            f"{(args.margin_seconds + 2 * args.start_seconds) / 60:g}, or lower --margin_seconds "
            "and --start_seconds"
        )
    extra = spq_parser()
    extra.prog = "--extra"  # who is to blame
    given = parse_args(extra, args.extra).given
    if own := sorted(given & OWN_FLAGS):
        parser.error(
            f"--extra: --{own[0]} is the campaign's to set (--help tells how); allowed are other "
            "flags of main_SPQ.py"
        )
    return args


def check_shares(campaign: Campaign) -> None:
    """
    Raises:
        UserError: if the entries' minutes are more than there are.
    """
    args = campaign.args
    minutes = {e.name: campaign.minutes_of(e) or 0 for e in ENTRIES if e.name in args.only}
    if (asked := sum(minutes.values())) > args.total_minutes + 1e-9:
        raise UserError(
            f"--shares: {', '.join(f'{n} {m:g}' for n, m in minutes.items() if m)} make {asked:g} "
            f"minutes; allowed are --total_minutes={args.total_minutes:g}: lower a share, or raise "
            "that"
        )


def show_plan(campaign: Campaign) -> None:
    """What --dry_run prints."""
    args, runs = campaign.args, campaign.state["runs"]
    print(
        f"{args.total_minutes:g} minutes in all, {campaign.used_before / 60:.1f} used; "
        f"{args.minutes:g} a call"
    )
    left = 60 * args.total_minutes - campaign.used_before
    for entry in ENTRIES:
        if entry.name not in args.only:
            continue
        share = campaign.minutes_of(entry)
        minutes = "rest" if share is None else f"{share:g} min"
        if entry is THROUGHPUT:
            done = ", measured" if campaign.variants() else ""
            print(f"{entry.name:11} {minutes:>7}{done}")
            for part in ("epoch", "profile", "augmentation"):
                print(f"    {shlex.join([*campaign.benchmark, f'--part={part}'])}")
            left -= 0 if done else 60 * share
            continue
        run = runs.get(entry.name)
        told = f", {run['status']}" if run else ""
        if run is None and campaign.speed_of(entry) is not None:
            campaign.used_before = 60 * args.total_minutes - left
            campaign.started = time.monotonic()
            planned = campaign.plan(entry)
            run, told = (
                (None, f", not run: {planned}") if isinstance(planned, str) else (planned, "")
            )
        left -= 60 * share if share and entry.name not in runs else 0
        if run:
            words, told = campaign.command(entry.name, run), f", {run['epochs']} epochs{told}"
        else:
            told = told or ", epochs as the measured speed allows"
            words = ["--recipe=" + entry.recipe, f"--N_books={entry.N_books}", *args.extra]
            words = [*campaign.program, *words, "--epochs=EPOCHS", *campaign.places()]
        print(f"{entry.name:11} {minutes:>7}{told}\n    {shlex.join(words)}")


def main(
    argv: Sequence[str] | None = None,
    started: float | None = None,
    program: list[str] | None = None,
    benchmark: list[str] | None = None,
) -> None:
    """Work for --minutes.

    Args:
        argv: flags; those of the command line by default.
        started: when the call began, by time.monotonic(); now by default.
        program, benchmark: what to run in place of main_SPQ.py and scripts/benchmark.py.
    Raises:
        TrainingStopped: with exit code 75 if work is left, 1 if something failed.
        UserError: on bad input.
    """
    began = time.monotonic() if started is None else started
    args = parse(argv)
    program = program or [sys.executable, relative(ROOT / "main_SPQ.py")]
    benchmark = benchmark or [sys.executable, relative(ROOT / "scripts" / "benchmark.py")]
    campaign = Campaign(args, program, benchmark, began)
    check_shares(campaign)
    if args.dry_run:
        show_plan(campaign)
        return
    campaign.open()
    handled = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, campaign.on_signal) for number in handled}
    try:
        work(campaign)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        campaign.close()


def work(campaign: Campaign) -> None:
    """The entries in their order, then the results."""
    args, cut = campaign.args, False
    try:
        for entry in ENTRIES:
            if entry.name in args.only:
                task: Callable[[], None] = partial(campaign.train, entry)
                (campaign.measure if entry is THROUGHPUT else task)()
    except Cut:
        cut = True
    finally:
        campaign.publish()
        if args.pack is not None:
            pack(args.output_dir, args.pack)
    print(f"\n{(args.output_dir / TABLE).read_text()}")
    if campaign.signal:
        raise TrainingStopped(
            "Interrupted; the same command goes on", exit_code=128 + campaign.signal
        )
    if cut:
        raise TrainingStopped(
            f"{campaign.used_s / 60:.1f} of {args.total_minutes:g} minutes are used and work is "
            "left; give the same command again",
            exit_code=TIME_IS_OVER,
        )
    runs = campaign.state["runs"]
    failed = [n for n in args.only if n in runs and runs[n]["status"] == "failed"]
    if failed:
        raise TrainingStopped(
            f"Failed: {', '.join(failed)}; see {args.output_dir / TABLE}. Mend it and call again "
            "with --retry_failed",
            exit_code=1,
        )
    print(f"All done: {args.output_dir / TABLE}")


def relative(path: Path) -> str:
    """As seen from here, if it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    run_main(partial(main, started=_STARTED))
