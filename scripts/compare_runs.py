r"""Runs side by side: a table of their last epochs, and mAP over minutes of training.

    python scripts/compare_runs.py --group released runs/released_seed* \
        --group fast runs/fast_seed* --output_dir=results/recipes

Each group has a name, and folders of runs that differ in their seed alone; the table (`table.md`,
also printed) has mean and standard deviation over them, the picture (`curves.png`) their curves.
Minutes are of training alone: images divided by the logged speed, so that evaluations and pauses
between two parts of an interrupted run do not count. `--at_minutes=30` also reads the curves there:
the last evaluation no later than that.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from args import flags_of_run
from utils.cli import run_main
from utils.errors import UserError
from utils.figures import COLUMN, PRINT, save
from utils.logging import plain, read_metrics
from utils.setup import FREE_FLAGS

# colours and signs of the groups, told apart in grey print too
STYLES = [("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#666666", "v")]

# what the figures of two runs must have in common to be set side by side
ASKED = ("Top_N", "limit_query", "limit_db", "dataset")


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        epoch, minutes: of training, until then.
        metrics: as logged, by distance.
    """

    epoch: float
    minutes: float
    metrics: Mapping[str, dict]


def read_run(folder: Path) -> tuple[dict, list[Point]]:
    """A run's flags, those of its last part if it was resumed, and its evaluations.

    Raises:
        UserError: if the folder is not that of a run, or nothing was evaluated in it.
    """
    try:
        account = json.loads((folder / "args.json").read_text())
        args = [account, *account.get("resumed", [])][-1]["args"]
        entries = read_metrics(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: is not the folder of a run ({error})") from error
    if "embedding_dim" in args:
        raise UserError(
            f"{folder}: is a run of main_SSP.py; scripts/compare_asymmetric.py compares these"
        )
    minutes, last, points = 0.0, 0, {}
    for entry in entries:
        if entry["kind"] == "train":
            # older logs do not tell how long a step took
            step_s = entry.get("step_s", args["batch_size"] / entry["images_per_s"])
            minutes += (entry["step"] - last) * step_s / 60
            last = entry["step"]
        elif entry["kind"] == "eval":
            point = points.setdefault(entry["step"], Point(entry["epoch"], minutes, {}))
            point.metrics[entry["distance"]] = entry
    if not points:
        raise UserError(f"{folder}: no evaluation in its metrics.jsonl yet")
    return args, list(points.values())


def figure_of(point: Point, name: str, distance: str | None = None) -> float:
    """One metric of an evaluation, under a distance or, without, the main one."""
    main = "inner_product" if "inner_product" in point.metrics else "squared_l2"
    return point.metrics[distance or main][name]


def method_of(args: Mapping) -> str:
    """Of a run by its flags."""
    return "GPQ" if args.get("quantizer") == "prototype" else "SPQ"


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation if there are several."""
    mean = statistics.fmean(values)
    more = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean:.4f}{more}"


def check_comparable(groups: Mapping[str, list[tuple[dict, list[Point]]]]) -> None:
    """Runs of a group may differ in their seed, all runs in anything but what is asked of them.

    A flag that an older run does not know counts as its default.

    Raises:
        UserError: if they differ in more.
    """
    methods = {method_of(args) for runs in groups.values() for args, _ in runs}
    if len(methods) > 1:
        raise UserError("--group: runs of SPQ and of GPQ have no figures in common")
    defaults = plain(flags_of_run(methods.pop(), {}))
    flags = {group: [defaults | as_now(args) for args, _ in runs] for group, runs in groups.items()}
    for name in ASKED:
        values = {repr(args[name]) for runs in flags.values() for args in runs}
        if len(values) > 1:
            told = " and ".join(sorted(values))
            raise UserError(f"--group: runs with different --{name} ({told}) cannot be compared")
    for group, runs in flags.items():
        names = set().union(*runs) - FREE_FLAGS - {"seed", "given"}
        changed = {n for args in runs for n in names if args.get(n) != runs[0].get(n)}
        if changed:
            raise UserError(f"--group {group}: its runs differ in {', '.join(sorted(changed))}")


def as_now(args: Mapping) -> dict:
    """Flags of a run under the names that they have now."""
    now = dict(args)
    if now.pop("freeze_bn", False):  # from the first evaluation on
        now["freeze_bn_epoch"] = now["eval_epoch"]
    return now


def table(groups: Mapping[str, list[tuple[dict, list[Point]]]], at_minutes: float | None) -> str:
    """Markdown, a row for each group: its last evaluations, SPQ's by squared L2 but for the last
    column, GPQ's by inner product."""
    args, points = next(iter(groups.values()))[0]
    name = f"mAP@{args['Top_N']}"
    # what is shown: metric and distance, by the heads of their columns
    shown = {f"{name}, found": (name, None), f"{name}, all": (f"{name}_all_relevant", None)}
    shown = {} if name == "mAP@all" else shown
    shown |= {"mAP@all": ("mAP@all", None)}
    shown |= {f"{name}, found, l2": (name, "l2")} if "l2" in points[-1].metrics else {}
    head = ["run", "bits", "recipe", "seeds", "epochs", "minutes of training", "queries", *shown]
    head += [f"{name}, found, at {at_minutes:g} minutes"] if at_minutes else []
    lines = [head, ["---"] * len(head)]
    for group, runs in groups.items():
        last = [points[-1] for _, points in runs]
        args = runs[0][0]
        bits = {f"{m['code_bits']:g}" for point in last for m in point.metrics.values()}
        row = [group, "/".join(sorted(bits)), str(args.get("recipe", "")), str(len(runs))]
        row.append("/".join(sorted({f"{p.epoch:.4g}" for p in last})))
        row.append(f"{statistics.fmean(p.minutes for p in last):.1f}")
        asked = {str(m["queries"]) for point in last for m in point.metrics.values()}
        row.append("/".join(sorted(asked)) + (" held out" if args.get("validate") else ""))
        row += [spread([figure_of(p, *column) for p in last]) for column in shown.values()]
        if at_minutes:
            early = [[p for p in points if p.minutes <= at_minutes] for _, points in runs]
            known = all(early)
            row.append(spread([figure_of(p[-1], name) for p in early]) if known else "none yet")
        lines.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


@plt.rc_context(PRINT)
def draw_curves(groups: Mapping[str, list[tuple[dict, list[Point]]]], path: Path) -> None:
    """mAP over minutes of training, a line for each run."""
    figure, axis = plt.subplots(figsize=(COLUMN, 2.8), constrained_layout=True)
    name = f"mAP@{next(iter(groups.values()))[0][0]['Top_N']}"
    for i, (group, runs) in enumerate(groups.items()):
        colour, marker = STYLES[i % len(STYLES)]
        for j, (_, points) in enumerate(runs):
            axis.plot(
                [p.minutes for p in points],
                [figure_of(p, name) for p in points],
                color=colour,
                marker=marker,
                label=group if j == 0 else None,
            )
    axis.set_xlabel("minutes of training")
    kind = method_of(next(iter(groups.values()))[0][0])
    axis.set_ylabel(name if kind == "GPQ" else f"{name} (squared L2)")
    axis.set_xlim(left=0)
    axis.legend()
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--group", nargs="+", action="append", required=True, help="a name, and folders of runs")
    flag("--output_dir", type=Path, required=True, help="for table.md and curves.png")
    flag("--at_minutes", type=float, help="also compare at this time of training")
    args = parser.parse_args(argv)
    empty = [group[0] for group in args.group if len(group) == 1]
    if empty:
        parser.error(f"--group {empty[0]}: has a name and no folder")
    groups = {name: [read_run(Path(f)) for f in folders] for name, *folders in args.group}
    check_comparable(groups)
    text = table(groups, args.at_minutes)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "table.md").write_text(text)
    draw_curves(groups, args.output_dir / "curves.png")
    print(text, end="")


if __name__ == "__main__":
    run_main(main)
