r"""Query networks beside their gallery network: mAP of the three sides, and what a query costs.

    python scripts/compare_asymmetric.py --gallery=results/gpq_48bits_width32 \
        --group ssp runs/ssp_seed* --group hvs runs/hvs_seed* --output_dir=results/ssp

Each group has a name, and folders of main_SSP.py's runs that differ in their seed alone. The table
(`table.md`, also printed; `table.json`) has mean and standard deviation over them, of the last
evaluation. Costs are of one image: parameters, multiply-accumulates, and the median time on one
thread of a CPU. All networks take turns at it, so that a busy machine slows all of them.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import OwnGallery, count_costs
from utils.asymmetric import SIDES
from utils.cli import run_main
from utils.errors import UserError
from utils.flags import HelpFormatter, Parser, number
from utils.logging import read_metrics
from utils.trained import build_from_flags, load_trained

WARM_UP = 3  # rounds that are not timed


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, read, time, print."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--gallery", type=Path, required=True, help="of all groups")
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
        "--rounds", type=number(int, 1), default=50, help="images that are timed, one by one"
    )
    args = parser.parse_args(argv)
    trained = load_trained(args.gallery, "--gallery")
    networks: list[tuple[nn.Module, int]] = [(OwnGallery(trained.model), trained.input_size)]
    rows = [{"name": "gallery network", "runs": 0}]
    for name, *folders in args.group:
        if not folders:
            parser.error(f"--group {name}: needs folders of runs")
        figures, flags = figures_of([Path(f) for f in folders], trained.identity[:16])
        rows.append({"name": name} | figures)
        networks.append((query_network(flags), flags["input_size"]))
    for row, costs in zip(rows, costs_of(networks, args.rounds), strict=True):
        row |= costs
    for row in rows:
        row["times_cheaper"] = rows[0]["ms"] / row["ms"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = table_of(rows)
    (args.output_dir / "table.md").write_text(table)
    (args.output_dir / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table, end="")


def figures_of(folders: Sequence[Path], gallery: str) -> tuple[dict, dict]:
    """mAP of the last evaluation on each side, mean and deviation over runs; and their flags.

    Args:
        folders: of runs.
        gallery: the first 16 hex digits of the gallery network's identity.
    Raises:
        UserError: if a folder is not that of a run of main_SSP.py, or of one that learned from
            another gallery, or runs differ in more than their seed, do not differ in it, or
            were last evaluated after other steps.
    """
    found, flags = [], []
    for folder in folders:
        try:
            account = json.loads((folder / "args.json").read_text())
            entries = [e for e in read_metrics(folder) if e["kind"] == "eval"]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: is not the folder of a run ({error})") from error
        saved = [account, *account.get("resumed", [])][-1]["args"]
        if "embedding_dim" not in saved or not entries:
            raise UserError(f"{folder}: holds no evaluated run of main_SSP.py")
        if gallery not in saved.get("gallery", ""):
            raise UserError(
                f"{folder}: learned from {saved.get('gallery')}, and --gallery is {gallery}; "
                "compare it with its own gallery network"
            )
        flags.append(saved)
        found.append({e["distance"]: e for e in entries if e["step"] == entries[-1]["step"]})
    free = {"seed", "output_dir", "resume", "eval_epoch", "log_every", "data_dir", "cache_dir"}
    free |= {"overwrite", "num_workers", "device", "gpu_id", "max_minutes", "max_steps"}
    free |= {"checkpoint_every"}
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
    metrics = {}
    for side in SIDES:
        values = [figures[side]["mAP@all"] for figures in found]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        metrics[side] = {"mAP@all": statistics.mean(values), "deviation": deviation}
    return {"runs": len(folders), **metrics}, flags[0]


def query_network(flags: dict) -> nn.Module:
    """The network of a run's flags, untrained; its costs are those of the trained one."""
    network = build_from_flags("SSP", flags)
    # what is thrown away after the training is no part of a query's cost
    network.classifier = None
    return network


@torch.no_grad()
def costs_of(networks: Sequence[tuple[nn.Module, int]], rounds: int) -> list[dict]:
    """Of each network with its side of images: parameters, multiply-accumulates, and median
    milliseconds of one image on one thread. In each round each network has its turn."""
    costs = [count_costs(Describes(network.eval()), size) for network, size in networks]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times: list[list[float]] = [[] for _ in networks]
        images = [torch.rand(1, 3, size, size) for _, size in networks]
        for i in range(WARM_UP + rounds):
            for (network, _), image, taken in zip(networks, images, times, strict=True):
                start = time.perf_counter()
                network.describe(image)
                if i >= WARM_UP:
                    taken.append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    pairs = zip(costs, times, strict=True)
    return [found | {"ms": statistics.median(taken)} for found, taken in pairs]


class Describes(nn.Module):
    """A network by what answers queries."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.describe(images)


def table_of(rows: Sequence[dict]) -> str:
    """Markdown, a line each."""
    head = ["query network", "runs", *SIDES, "parameters", "MACs", "ms a query", "times cheaper"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["name"], str(row["runs"] or "")]
        for side in SIDES:
            figure = row.get(side)
            spread = figure and figure["deviation"]
            more = "" if spread is None else f" ± {spread:.4f}"
            cells.append(f"{figure['mAP@all']:.4f}{more}" if figure else "")
        cells += [f"{row['parameters'] / 1e6:.3f} M", f"{row['macs'] / 1e6:.2f} M"]
        cells += [f"{row['ms']:.2f}", f"{row['times_cheaper']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
