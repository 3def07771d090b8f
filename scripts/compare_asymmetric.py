r"""Query networks beside their gallery network: mAP of the three sides, and what a query costs.

    python scripts/compare_asymmetric.py --gallery=results/gpq_48bits_width32 \
        --group ssp runs/ssp_seed* --group hvs runs/hvs_seed* --output_dir=results/ssp

Each group has a name, and folders of main_SSP.py's runs that differ in their seed alone. The table
(`table.md`, also printed; `table.json`) has mean and standard deviation over them, of the last
evaluation, and of the one before training where all have it (--eval_before). Costs are of one
image: parameters, multiply-accumulates, and the median time on one thread of a CPU, when images
come one by one and when 64 come together. All networks take turns at it, so that a busy machine
slows all of them.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from args import add_network_weights, check_network, check_pretrained
from models import count_costs
from utils.asymmetric import SIDES
from utils.cli import run_main
from utils.embedders import load_network
from utils.errors import UserError
from utils.flags import HelpFormatter, Parser, number
from utils.logging import read_metrics
from utils.trained import build_from_flags

WARM_UP = 3  # rounds that are not timed
TOGETHER = 64  # images of a batch


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, read, time, print."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--gallery",
        required=True,
        metavar="NETWORK",
        help="of all groups, as extract_features.py takes it",
    )
    add_network_weights(parser.add_argument, ["gallery"])
    parser.add_argument(
        "--group",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "FOLDER"),
        help="a name, and runs that differ in their seed alone",
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--rounds",
        type=number(int, 1),
        default=50,
        help=f"how often one image, and {TOGETHER} together, are timed",
    )
    args = parser.parse_args(argv)
    check_network(parser, args, "gallery")
    check_pretrained(parser, args, ["gallery"])
    names = [name for name, *_ in args.group]
    for name, *folders in args.group:
        if not folders:
            parser.error(f"--group {name}: needs folders of runs")
        if names.count(name) > 1:
            parser.error(f"--group {name}: is there twice; allowed is a name for each group")
    groups = {name: figures_of([Path(f) for f in folders]) for name, *folders in args.group}
    sizes = {size for figures, _ in groups.values() for size in figures.pop("sizes")}
    if len(sizes) > 1:
        raise UserError(
            "--group: the galleries' features are of images of "
            f"{' and '.join(map(str, sorted(sizes)))} pixels; compare runs of one gallery"
        )
    asked = next(iter(sizes), None)
    gallery = load_network(args.gallery, args.gallery_weights, "--gallery", args.pretrained, asked)
    size = asked or gallery.squeezed or gallery.usual
    if size is None:
        parser.error(f"--gallery={args.gallery}: takes images of any size, so it has no one cost")
    networks: list[tuple[nn.Module, int]] = [(gallery.model, size)]
    rows = [{"name": "gallery network", "runs": 0}]
    for name, (figures, flags) in groups.items():
        if gallery.identity[:16] not in flags.get("gallery", ""):
            raise UserError(
                f"--group {name}: learned from {flags.get('gallery')}, and --gallery is "
                f"{gallery.told}; compare it with its own gallery network"
            )
        rows.append({"name": name} | figures)
        networks.append((query_network(flags), flags["input_size"]))
    for row, costs in zip(rows, costs_of(networks, args.rounds), strict=True):
        row |= costs
    for row in rows:
        row["times_cheaper"] = rows[0]["ms"] / row["ms"]
        row["times_cheaper_together"] = rows[0]["ms_together"] / row["ms_together"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = table_of(rows)
    (args.output_dir / "table.md").write_text(table)
    (args.output_dir / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table, end="")


def figures_of(folders: Sequence[Path]) -> tuple[dict, dict]:
    """mAP on each side after the training and, if known of all, before it: mean and deviation over
    runs; and `sizes` of the gallery's images, as far as they are known. And the runs' flags.

    Args:
        folders: of runs.
    Raises:
        UserError: if a folder is not that of a run of main_SSP.py that was evaluated after some
            training, or runs differ in more than their seed, do not differ in it, or were last
            evaluated after other steps.
    """
    found, before, flags = [], [], []
    for folder in folders:
        try:
            account = json.loads((folder / "args.json").read_text())
            entries = [e for e in read_metrics(folder) if e["kind"] == "eval"]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: is not the folder of a run ({error})") from error
        saved = [account, *account.get("resumed", [])][-1]["args"]
        if "embedding_dim" not in saved or not entries or not entries[-1]["step"]:
            raise UserError(f"{folder}: holds no evaluated run of main_SSP.py")
        flags.append(saved)
        found.append({e["distance"]: e for e in entries if e["step"] == entries[-1]["step"]})
        before.append({e["distance"]: e for e in entries if e["step"] == 0})
    free = {"seed", "output_dir", "resume", "eval_epoch", "log_every", "data_dir", "cache_dir"}
    free |= {"overwrite", "num_workers", "device", "gpu_id", "max_minutes", "max_steps"}
    # the size of the gallery's images is not known of older runs
    free |= {"checkpoint_every", "eval_before", "gallery_input_size"}
    steps = [figures[SIDES[0]]["step"] for figures in found]
    of_seed: dict[int, Path] = {}
    for folder, saved in zip(folders, flags, strict=True):
        known = sorted({*saved, *flags[0]} - free)
        other = [name for name in known if saved.get(name) != flags[0].get(name)]
        if other:
            raise UserError(
                f"{folder}: differs from {folders[0]} in --{other[0]}, not only in seed"
            )
        if (same := of_seed.setdefault(saved["seed"], folder)) is not folder:
            raise UserError(
                f"{folder}: has --seed={saved['seed']} as {same} has; allowed is a run of each seed"
            )
    for folder, step in zip(folders, steps, strict=True):
        if step != steps[0]:
            raise UserError(
                f"{folder}: was last evaluated after step {step}, and {folders[0]} after "
                f"{steps[0]}; train the shorter one to its end with --resume=auto"
            )
    metrics = {side: spread_of(found, side) for side in SIDES}
    if all(before):
        metrics["before"] = {side: spread_of(before, side) for side in SIDES}
    sizes = {saved.get("gallery_input_size") for saved in flags} - {None}
    return {"runs": len(folders), "sizes": sizes, **metrics}, flags[0]


def spread_of(found: Sequence[dict], side: str) -> dict:
    """Mean mAP@all of that side and its standard deviation over runs, None of a single one."""
    values = [figures[side]["mAP@all"] for figures in found]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mAP@all": statistics.mean(values), "deviation": deviation}


def query_network(flags: dict) -> nn.Module:
    """The network of a run's flags, untrained; its costs are those of the trained one."""
    network = build_from_flags("SSP", flags)
    # what is thrown away after the training is no part of a query's cost
    network.classifier = None
    return network


@torch.no_grad()
def costs_of(networks: Sequence[tuple[nn.Module, int]], rounds: int) -> list[dict]:
    """Of each network with its side of images: parameters, multiply-accumulates, and on one thread
    the median milliseconds of an image by itself (`ms`) and of an image among TOGETHER
    (`ms_together`). In each round each network has its turn."""
    costs = [count_costs(Describes(network.eval()), size) for network, size in networks]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, images in (("ms", 1), ("ms_together", TOGETHER)):
            for found, time_s in zip(costs, times_of(networks, images, rounds), strict=True):
                found[name] = 1000 * time_s / images
    finally:
        torch.set_num_threads(threads)
    return costs


def times_of(networks: Sequence[tuple[nn.Module, int]], images: int, rounds: int) -> list[float]:
    """Median seconds of each network for that many images together."""
    times: list[list[float]] = [[] for _ in networks]
    batches = [torch.rand(images, 3, size, size) for _, size in networks]
    for i in range(WARM_UP + rounds):
        for (network, _), batch, taken in zip(networks, batches, times, strict=True):
            start = time.perf_counter()
            network.describe(batch)
            if i >= WARM_UP:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


class Describes(nn.Module):
    """A network by what answers queries."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.describe(images)


def table_of(rows: Sequence[dict]) -> str:
    """Markdown, a line each."""
    head = ["query network", "runs", *SIDES, *(f"{side}, before" for side in SIDES[:2])]
    head += ["parameters", "MACs", "ms a query", "times cheaper"]
    head += [f"ms a query of {TOGETHER}", f"times cheaper of {TOGETHER}"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        before = row.get("before", {})
        figures = [row.get(side) for side in SIDES] + [before.get(side) for side in SIDES[:2]]
        cells = [row["name"], str(row["runs"] or ""), *map(figure_cell, figures)]
        cells += [f"{row['parameters'] / 1e6:.3f} M", f"{row['macs'] / 1e6:.2f} M"]
        cells += [f"{row['ms']:.2f}", f"{row['times_cheaper']:.1f}"]
        cells += [f"{row['ms_together']:.2f}", f"{row['times_cheaper_together']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure_cell(figure: dict | None) -> str:
    """Mean and deviation, as far as they are known."""
    if figure is None:
        return ""
    deviation = figure["deviation"]
    return f"{figure['mAP@all']:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


if __name__ == "__main__":
    run_main(main)
