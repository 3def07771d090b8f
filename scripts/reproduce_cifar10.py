"""The whole measuring campaign on one accelerator, in pieces that resume each other.

    python scripts/reproduce_cifar10.py --dry_run                        # the plan
    python scripts/reproduce_cifar10.py --minutes=9 --state_dir=DIR --output_dir=results/gpu

A call works for at most `--minutes` of wall-clock time, everything included, and exits with 75 if
work is left: call it again, and it goes on where it was, also after a kill. In turn:

    throughput   some minutes  how long an epoch takes, with and without --compile and --cuda_graph;
                               the released loop beside ours, a step's profile, peak memory
    32bits       8 min         --recipe=fast
    16bits       4.5 min
    64bits       4.5 min
    released     what is left  --recipe=released, 32 bits

`--total_minutes=25` counts everything, over all calls; what has begun is brought to its end. If the
measuring took so long that the runs no longer fit, they share what is left in proportion, but none
gets less than half of its minutes. A run gets as many epochs as fit into them at the measured
speed; the number is kept in DIR/campaign.json with the command, which repeats the run. A run or a
part of the benchmark that failed waits for `--retry`.
DIR holds the runs with their checkpoints and may lie anywhere; the output folder gets what is to be
kept, after every piece: benchmark.json, table.md, curves.png, and for each run its logs and
pictures, and its weights in bfloat16, in parts of 15 MiB if they are larger. search.py and
make_figures.py read those from the folder.
"""

# ruff: noqa: E402  the clock starts before torch is imported, which can take half a minute

import time

STARTED = time.monotonic()

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from args import parse_args, spq_parser
from scripts.compare_runs import draw_curves, read_run, table
from utils.checkpoint import LAST, load_checkpoint
from utils.cli import run_main
from utils.errors import UserError
from utils.flags import BooleanFlag, Parser, number
from utils.logging import read_metrics
from utils.loop import TIME_IS_OVER, TrainingStopped
from utils.trained import Trained, build_with_weights, save_trained

ROOT = Path(__file__).resolve().parent.parent
MAIN = [sys.executable, "main_SPQ.py"]
FREE = "--deterministic=False"
SPEED_FLAGS = [[], [FREE], [FREE, "--cuda_graph"], [FREE, "--cuda_graph", "--compile"]]
SAME_LOSS = 0.1  # most that a faster training's loss may differ by, as a share of it
# parts of benchmark_training.py
BENCHMARKS = {
    "epoch": ["--variants=released,plain,joint_views,joint_views+compile+cuda_graph+free"],
    "profile": [],
    "memory": ["--batch_sizes=256,1024", "--accumulates=1"],
}
# name -> minutes of 25 (None: what is left), and flags
RUNS: dict[str, tuple[float | None, list[str]]] = {
    "32bits": (8.0, ["--recipe=fast", "--N_books=8"]),
    "16bits": (4.5, ["--recipe=fast", "--N_books=4"]),
    "64bits": (4.5, ["--recipe=fast", "--N_books=16"]),
    "released": (None, ["--recipe=released", "--N_books=8"]),
}
TOTAL_MINUTES = 25.0  # that the minutes above are of
PILOT_EPOCHS = 4  # of a speed measurement
WHOLE_CALL = 0.5  # of a call's minutes; what does not end in so much never will
LEAST_SHARE = 0.5  # of its minutes that a run gets at least
USED_SHARE = 0.9  # for training, of a run's minutes after its start; the rest is evaluation
EVALUATIONS = 5  # in a run
CHECKPOINT_SECONDS = 60  # between checkpoints
BENCHMARK_SECONDS = 120  # that each part of the benchmark may take
MARGIN_SECONDS = 40  # kept back in a call for a last checkpoint and the results
PART_BYTES = 15 * 2**20  # of weights in one file
ASKED_TO_LEAVE = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM)


class Campaign:
    """What is done, what is known, and how much time this call has.

    Args:
        args: the flags.
        plan: the runs in their order, and the minutes of each; None: what is left.
        main: command that runs main_SPQ.py.
        started: when this call began, by time.monotonic().
    """

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Mapping[str, float | None],
        main: Sequence[str],
        started: float,
    ) -> None:
        self.args, self.plan, self.main, self.started = args, plan, list(main), started
        self.end = started + 60 * args.minutes - args.margin_seconds
        self.path = args.state_dir / "campaign.json"
        self.state: dict = {"used_s": 0.0, "speed": {}, "runs": {}}
        if self.path.exists():
            self.state = json.loads(self.path.read_text())
        self.used_before: float = self.state["used_s"]
        self.save()

    def save(self) -> None:
        """Write the state, whole or not at all."""
        self.state["used_s"] = self.used_before + time.monotonic() - self.started
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=1) + "\n")
        os.replace(temporary, self.path)

    def left(self) -> float:
        """Seconds of this call.

        Raises:
            TrainingStopped: if there are too few to begin anything.
        """
        seconds = self.end - time.monotonic()
        if seconds < self.args.start_seconds:
            raise TrainingStopped("Work is left: give the same command again", TIME_IS_OVER)
        return seconds

    def used_s(self) -> float:
        """Seconds that all calls have taken."""
        self.save()
        return self.state["used_s"]

    def seconds_of(self, name: str) -> float:
        """Seconds that a run gets which begins now: as planned, if the plan can still be kept."""
        left = 60 * self.args.total_minutes - self.used_s()
        planned = self.plan[name]
        if planned is None:
            return left
        waiting = sum(m or 0 for n, m in self.plan.items() if n not in self.state["runs"])
        share = min(1.0, left / (60 * waiting))
        return 60 * planned * max(LEAST_SHARE, share)

    def places(self) -> list[str]:
        """Flags that say where every run finds what it needs."""
        args = self.args
        download = ["--if_download"] if args.if_download else []
        return ["--data_dir", str(args.data_dir), f"--device={args.device}", *download]

    # --- speed ----------------------------------------------------------------------------------

    def measure(self, name: str, flags: Sequence[str]) -> None:
        """Seconds of an epoch under each set of speed flags, by short trainings; the fastest that
        works, and trains as the plain one does, is kept."""
        known = self.state["speed"].setdefault(name, {})
        several = name == "fast" and self.args.device != "cpu"
        for speed_flags in SPEED_FLAGS if several else SPEED_FLAGS[:1]:
            key = " ".join(speed_flags)
            if key not in known:
                known[key] = self.pilot([*flags, *self.args.extra, *speed_flags])
                plain = known[""].get("loss")
                if plain and abs(known[key].get("loss", plain) - plain) > SAME_LOSS * abs(plain):
                    known[key] = {"error": f"loss {known[key]['loss']} and not {plain}"}
                print(f"{name} {key or 'without speed flags'}: {known[key]}", flush=True)
                self.save()
        if not any("epoch_s" in figures for figures in known.values()):
            del self.state["speed"][name]
            self.save()
            raise UserError(
                f"{name}: no short training worked; see {self.args.state_dir}/pilot.log"
            )

    def pilot(self, flags: Sequence[str]) -> dict:
        """A training of four epochs, small crops in the first two if the recipe has any; the second
        and the fourth count, as the others compile. `start_s` is what it took beside its epochs and
        what they compile."""
        begun = time.monotonic()
        share = parse_args(spq_parser(), flags).early_share
        folder, seconds = self.args.state_dir / "pilot", self.left()
        command = [*self.main, *flags, *(["--early_share=0.5"] if share else []), *self.places()]
        command += ["--overwrite", f"--epochs={PILOT_EPOCHS}", "--warmup_epochs=0"]
        command += ["--neighbour_share=0"]  # the second stage has another loss and other steps
        command += [f"--eval_epoch={PILOT_EPOCHS}", "--limit_query=100", "--limit_db=1000"]
        command += ["--checkpoint_every=1000000000", f"--output_dir={folder}"]
        code, tail = self.call(command, self.args.state_dir / "pilot.log", seconds)
        if code == TIME_IS_OVER and seconds > WHOLE_CALL * (60 * self.args.minutes):
            return {"error": f"not done after {seconds:.0f} s"}
        if code == TIME_IS_OVER:
            raise TrainingStopped("Work is left: give the same command again", TIME_IS_OVER)
        if code:
            return {"error": tail}
        lines = [entry for entry in read_metrics(folder) if entry["kind"] == "train"]
        batch = json.loads((folder / "args.json").read_text())["args"]["batch_size"]
        spent = dict.fromkeys(range(1, PILOT_EPOCHS + 1), 0.0)  # seconds of each epoch
        for before, entry in zip([{"step": 0}, *lines], lines, strict=False):
            steps = entry["step"] - before["step"]
            spent[math.ceil(entry["epoch"])] += steps * batch / entry["images_per_s"]
        epoch_s = share * spent[2] + (1 - share) * spent[PILOT_EPOCHS]
        usual = 2 * spent[2] + 2 * spent[PILOT_EPOCHS]
        return {
            "epoch_s": epoch_s,
            "start_s": max(0.0, time.monotonic() - begun - usual),
            "steps": lines[-1]["step"] / PILOT_EPOCHS,
            "loss": lines[-1]["loss"],
        }

    def benchmark(self) -> None:
        """benchmark_training.py: the released loop beside ours, a step's profile, peak memory."""
        found = self.state.setdefault("benchmark", {})
        for part, flags in BENCHMARKS.items():
            if part in found and not (self.args.retry and "error" in found[part]):
                continue
            log, seconds = self.args.state_dir / f"benchmark_{part}.log", self.left()
            log.unlink(missing_ok=True)
            command = [sys.executable, "scripts/benchmark_training.py", f"--part={part}", *flags]
            command += self.args.benchmark
            code, tail = self.call(command, log, min(seconds, BENCHMARK_SECONDS))
            if code == TIME_IS_OVER and seconds < BENCHMARK_SECONDS:
                raise TrainingStopped("Work is left: give the same command again", TIME_IS_OVER)
            _, start, text = log.read_text().rpartition("\n{\n")
            try:  # a part that failed may have told something before
                found[part] = json.JSONDecoder().raw_decode(start[1:] + text)[0][part]
            except (ValueError, KeyError):
                found[part] = {"error": tail}
            self.save()

    # --- runs -----------------------------------------------------------------------------------

    def train(self, name: str, flags: Sequence[str]) -> None:
        """Go on with a run, or begin it; its length is fixed at the beginning."""
        run = self.state["runs"].get(name)
        if run is None:
            speed = self.state["speed"]["released" if name == "released" else "fast"]
            best = min(
                (s for s in speed if "epoch_s" in speed[s]), key=lambda s: speed[s]["epoch_s"]
            )
            seconds = self.seconds_of(name)
            if seconds < self.args.start_seconds:
                print(f"{name}: --total_minutes={self.args.total_minutes:g} are used up")
                return
            seconds = USED_SHARE * (seconds - speed[best]["start_s"])
            epochs = max(1, int(seconds / speed[best]["epoch_s"]))
            every = CHECKPOINT_SECONDS * speed[best]["steps"] / speed[best]["epoch_s"]
            words = [*flags, *best.split(), f"--checkpoint_every={max(1, round(every))}"]
            words += [f"--epochs={epochs}", f"--eval_epoch={max(1, epochs // EVALUATIONS)}"]
            words += self.args.extra
            run = {"flags": words, "status": "begun"}
            self.state["runs"][name] = run
            self.save()
        if run["status"] == "done":
            return
        folder = self.args.state_dir / name
        seconds = self.left()
        command = [*self.main, *run["flags"], *self.places(), "--resume=auto"]
        command += [f"--output_dir={folder}", f"--max_minutes={seconds / 60:.3f}"]
        code, tail = self.call(command, self.args.state_dir / f"{name}.log", seconds)
        if code == 0:
            keep_weights(folder, self.args.output_dir / name)
            run["status"] = "done"
        elif code != TIME_IS_OVER:
            run["status"], run["error"] = "failed", f"exit code {code}: {tail}"
            print(f"{name} failed ({run['error']}); going on with the next", file=sys.stderr)
        self.save()
        self.publish()
        if code == TIME_IS_OVER:
            raise TrainingStopped("Work is left: give the same command again", TIME_IS_OVER)

    def call(self, command: Sequence[str], log: Path, seconds: float) -> tuple[int, str]:
        """Run a command, its output appended to a log; exit code and last lines.

        After `seconds` it is asked to leave (a training saves first), half a margin later killed.
        """
        print(f"\n{shlex.join(command)}", flush=True)
        with log.open("a") as file:
            print(shlex.join(command), file=file, flush=True)
            process = subprocess.Popen(  # a session of its own: Ctrl-C reaches it through us, once
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.end_process(process)
                code = TIME_IS_OVER
            except BaseException:  # asked to leave: nobody trains on behind our back
                self.end_process(process)
                raise
        code = TIME_IS_OVER if code in ASKED_TO_LEAVE else code
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
        print(tail, flush=True)
        return code, tail

    def end_process(self, process: subprocess.Popen) -> None:
        """Ask it to leave; later kill it, and whatever it has started."""
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(self.args.margin_seconds / 2)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    # --- results --------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write what is to be kept; a run that has not been evaluated yet is left out."""
        out, groups = self.args.output_dir, {}
        out.mkdir(parents=True, exist_ok=True)
        (out / "benchmark.json").write_text(json.dumps(self.state, indent=1) + "\n")
        for name in self.state["runs"]:
            source, target = self.args.state_dir / name, out / name
            if not (source / "metrics.jsonl").exists():
                continue
            target.mkdir(exist_ok=True)
            for file in [*source.glob("*.json*"), *source.glob("*.png")]:
                shutil.copy(file, target)
            shutil.copy(self.args.state_dir / f"{name}.log", target / "console.log")
            if any(entry["kind"] == "eval" for entry in read_metrics(source)):
                groups[name] = [read_run(source)]
        if groups:
            failed = {n: r["error"] for n, r in self.state["runs"].items() if "error" in r}
            lines = [
                f"`python main_SPQ.py {shlex.join(self.state['runs'][n]['flags'])} "
                f"--output_dir=runs/{n}`"
                for n in groups
            ]
            text = table(groups, None) + "\n" + "\n\n".join(lines) + "\n"
            text += "".join(f"\n{name} failed: {why}\n" for name, why in failed.items())
            (out / "table.md").write_text(text)
            draw_curves(groups, out / "curves.png")
            print(f"\n{text}", flush=True)


def keep_weights(source: Path, target: Path) -> None:
    """A run's weights as model.pt, or in parts (model.pt.part00 and so on) if it is large; of each
    of the methods.

    Matrices are rounded to bfloat16, which moves a code here and there; codebooks, biases and batch
    norm stay float32.
    """
    state = load_checkpoint(source / LAST, weights_alone=True)
    model = build_with_weights(state["method"], state["args"], state["model"])
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.startswith("quantizer."):
            weight.data = weight.data.bfloat16()
    for old in target.glob("model.pt*"):
        old.unlink()
    target.mkdir(parents=True, exist_ok=True)
    path = target / "model.pt"
    save_trained(path, Trained(model, state["method"], state["args"], ""))
    content = path.read_bytes()
    if len(content) > PART_BYTES:
        path.unlink()
        for i, start in enumerate(range(0, len(content), PART_BYTES)):
            (target / f"model.pt.part{i:02d}").write_bytes(content[start : start + PART_BYTES])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = Parser(prog="reproduce_cifar10.py", description=__doc__.splitlines()[0])
    flag, positive = parser.add_argument, number(float, 0, strict=True)
    flag("--minutes", type=positive, default=9.0, help="of this call (default: 9)")
    flag("--total_minutes", type=positive, default=TOTAL_MINUTES, help="of all (default: 25)")
    flag("--state_dir", type=Path, default=Path("runs/campaign"), help="the runs")
    flag("--output_dir", type=Path, default=Path("results/campaign"), help="what is to be kept")
    flag("--only", default=",".join(RUNS), help=f"some of {','.join(RUNS)} (default: all)")
    flag("--data_dir", type=Path, default=Path("datasets"), help="where CIFAR-10 is")
    flag("--if_download", action=BooleanFlag, default=False, help="fetch it if it is not there")
    flag("--device", choices=("auto", "cuda", "cpu"), default="auto", help="to train on")
    flag("--extra", type=shlex.split, default=[], help="more flags of main_SPQ.py, in quotes")
    flag("--benchmark", type=shlex.split, default=[], help="flags of benchmark_training.py")
    flag("--margin_seconds", type=positive, default=MARGIN_SECONDS, help="kept back in a call")
    flag("--start_seconds", type=positive, default=30.0, help="least time to begin anything in")
    flag("--retry", action=BooleanFlag, default=False, help="try again what failed")
    flag("--dry_run", action=BooleanFlag, default=False, help="print the plan, and do nothing")
    args = parser.parse_args(argv)
    unknown = set(args.only.split(",")) - RUNS.keys()
    if unknown:
        parser.error(f"--only={args.only}: allowed are {', '.join(RUNS)}")
    if 60 * args.minutes <= args.margin_seconds + args.start_seconds:
        least = (args.margin_seconds + args.start_seconds) / 60
        parser.error(f"--minutes={args.minutes:g}: must be more than {least:g}")
    return args


def main(argv: Sequence[str] | None = None, main_command: Sequence[str] = MAIN) -> None:
    """Work on the campaign for --minutes.

    Raises:
        TrainingStopped: with exit code 75 if work is left, 1 if a run failed.
    """
    args = parse(argv)
    names = [name for name in RUNS if name in args.only.split(",")]
    share = args.total_minutes / TOTAL_MINUTES
    plan = {name: RUNS[name][0] and RUNS[name][0] * share for name in names}
    if args.dry_run:
        for name, minutes in plan.items():
            told = f"{minutes:g} minutes" if minutes else "what is left"
            print(f"{name}: {told}, python main_SPQ.py {shlex.join(RUNS[name][1])}")
        return
    if args.device == "auto" and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU here; --device=cpu trains without one")
    args.state_dir.mkdir(parents=True, exist_ok=True)
    started = STARTED if argv is None else time.monotonic()
    ends = [signal.SIGTERM, signal.SIGHUP]  # SIGHUP: the terminal is gone; nohup ignores it
    ends = [number for number in ends if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in ends}
    try:
        with FileLock(args.state_dir / "lock", timeout=0):
            work(Campaign(args, plan, main_command, started))
    except Timeout:
        raise UserError(f"--state_dir={args.state_dir}: another campaign works there") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """On a signal: through the `except` of `Campaign.call`, which ends what runs."""
    raise SystemExit(128 + number)


def work(campaign: Campaign) -> None:
    """Everything in turn, as far as the time goes.

    Raises:
        TrainingStopped: with exit code 75 if work is left, 1 if a run failed.
    """
    args, runs, names = campaign.args, campaign.state["runs"], list(campaign.plan)
    for run in runs.values():
        if args.retry and run["status"] == "failed":
            run["status"] = "begun"
            del run["error"]
    if names != ["released"]:
        campaign.measure("fast", RUNS["32bits"][1])
    if "released" in names:
        campaign.measure("released", RUNS["released"][1])
    campaign.benchmark()
    for name in names:
        if runs.get(name, {}).get("status") != "failed":
            campaign.train(name, RUNS[name][1])
    campaign.publish()
    failed = [n for n in names if runs.get(n, {}).get("status") == "failed"]
    if failed:
        raise TrainingStopped(
            f"Failed: {', '.join(failed)}; see {args.state_dir}/NAME.log, and --retry goes on",
            exit_code=1,
        )
    print(f"All done: {args.output_dir / 'table.md'}")


if __name__ == "__main__":
    run_main(main)
