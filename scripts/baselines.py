"""Quantize the same features by other methods, and set jointly learned codes beside them.

    python scripts/baselines.py                                 # all, half an hour on 2 busy cores
    python scripts/baselines.py --methods=pq,opq --bits=32 --features=pixels
    python scripts/baselines.py runs/GPQ_cifar10_48bits --methods=gpq,pq,opq --features=descriptors
    OMP_WAIT_POLICY=PASSIVE python scripts/baselines.py         # twice as fast beside other work

CIFAR-10 as main_SPQ.py has it: database = the 50,000 training images, queries = the 10,000 test
images; or, with the folder of one run, the set and the split that the run was trained on. Every
method is fitted on the database's features alone: no queries, no labels. Features:

    pixels       3,072 values in [0, 1]
    descriptors  x of the network trained at that very bit length, D = 16 M for SPQ, 12 M for GPQ
    unit         the same scaled to unit length (the loss that trained them compares by cosine)
    pooled       the trunk's output before the head, of the same network; where its trunk is frozen,
                 the very features that it was trained on
    pooled_unit  the same scaled to unit length

Methods: the network's own codebooks (on descriptors), those of utils/baselines.py, and the features
uncompressed. PQ, OPQ and RQ have the networks' shape, K = 16 and M = bits / 4, and rank by
asymmetric squared L2; LSH, spectral hashing and ITQ rank by Hamming distance. Ties come in a
fixed random order. mAP@1000 divides by the relevant images found in the top 1000; for GPQ the whole
database is ranked, and mAP@all leads.

Each finished row is written at once: killed, the same command goes on from there.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from args import add_cifar10_flags, flags_of_run
from data.cifar10 import load_cifar10
from data.datasets import Images, load_dataset
from data.features import kept_features
from utils.baselines import METHODS, PCA_DIMS, RANDOM, Product, Space, fit, unit_length
from utils.cli import run_main
from utils.device import describe_hardware
from utils.errors import UserError
from utils.evaluation import describe_images
from utils.flags import BooleanFlag, HelpFormatter, Parser, number
from utils.logging import git_commit, versions
from utils.metrics import evaluate_rankings, tie_order
from utils.trained import Trained, load_trained

ROOT = Path(__file__).resolve().parent.parent
RUN_DIRS = [ROOT / f"results/cpu15min_{bits}bits" for bits in (16, 32, 64)]
FEATURES = ("pixels", "descriptors", "unit", "pooled", "pooled_unit")
UNIT = ("unit", "pooled_unit")  # where cosine is L2
OWN = ("spq", "gpq")  # the networks' own codes
NAMES = (*OWN, *METHODS)
SIGNS = ("lsh", "sh", "itq")  # a bit each
BITS = (12, 16, 24, 32, 48, 64)
USUAL_BITS = [16, 32, 64]
TOP_N = 1000
FILE, TABLE = "baselines.json", "table.md"
FIGURES = (f"mAP@{TOP_N}", f"mAP@{TOP_N}_all_relevant", "precision@100", f"precision@{TOP_N}")
WHOLE = "mAP@all"  # leads where the whole database is ranked


# --- command line -------------------------------------------------------------------------------


def some_of(what: str, known: Sequence) -> Callable[[str], list]:
    """A type for argparse: a comma-separated list out of `known`."""

    def parse(text: str) -> list:
        by_name = {str(value): value for value in known}
        for word in text.split(","):
            if word not in by_name:
                raise argparse.ArgumentTypeError(
                    f"unknown {what} {word!r}; known: {', '.join(by_name)}"
                )
        return [by_name[word] for word in dict.fromkeys(text.split(","))]

    return parse


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Flags; run folders come first."""
    parser = Parser(
        prog="baselines.py",
        description=__doc__.splitlines()[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag(
        "run_dirs",
        nargs="*",
        type=Path,
        default=RUN_DIRS,
        metavar="RUN_DIR",
        help="folders of trained models, one a bit length (default: results/cpu15min_*bits)",
    )
    flag(
        "--features",
        type=some_of("features", FEATURES),
        default=list(FEATURES),
        metavar="A,B",
        help=f"what is quantized: {', '.join(FEATURES)} (default: all)",
    )
    flag(
        "--methods",
        type=some_of("method", NAMES),
        default=list(NAMES),
        metavar="A,B",
        help=f"{', '.join(NAMES)} (default: all)",
    )
    flag(
        "--bits",
        type=some_of("bits", BITS),
        default=None,
        metavar="A,B",
        help="lengths of a code (default: 16,32,64, or those of the runs that are named)",
    )
    add_cifar10_flags(parser)
    flag("--seed", type=number(int, 0, high=2**30), default=0, metavar="N", help="the first seed")
    flag(
        "--seeds",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="of LSH, ITQ and k-means: seeds from --seed on; the table has their mean",
    )
    flag(
        "--limit_db",
        type=number(int, PCA_DIMS),
        default=None,
        metavar="N",
        help="trial: search among the first N images (default: all)",
    )
    flag(
        "--limit_query",
        type=number(int, 1),
        default=None,
        metavar="N",
        help="trial: ask the first N queries (default: all)",
    )
    flag(
        "--output",
        type=Path,
        default=ROOT / "results" / "baselines",
        metavar="DIR",
        help=f"folder of {FILE} and {TABLE} (default: results/baselines)",
    )
    flag(
        "--overwrite",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="give up the rows that --output holds and begin anew",
    )
    return parser.parse_args(arguments)


# --- features -----------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A network cut off before its head."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def describe(self, images: Tensor) -> Tensor:
        return self.trunk(images)


class Source:
    """Features of database and queries, kept until those of another network are asked for."""

    def __init__(self, db: Images, query: Images, runs: dict[int, Trained]) -> None:
        self.images, self.runs = (db, query), runs
        self.of_network = lru_cache(maxsize=1)(self._of_network)
        self.get = lru_cache(maxsize=1)(self._get)

    @torch.no_grad()
    def _of_network(self, bits: int) -> dict[str, list[np.ndarray]]:
        start, trained = time.perf_counter(), self.runs[bits]
        network = Pooled(trained.model.trunk).eval()
        if trained.args.get("cached_views"):
            args, size = flags_of_run(trained.method, trained.args), trained.input_size
            kept = [
                kept_features(args, network.trunk, images, None, [size], what)
                for images, what in zip(self.images, ("database", "queries"), strict=True)
            ]
            pooled = [features[:].float().flatten(1) for features in kept]
        else:
            size = trained.input_size
            pooled = [describe_images(network, images, size) for images in self.images]
        x = [trained.model.describe(features).numpy() for features in pooled]
        print(f"features of the {bits}-bit network: {time.perf_counter() - start:.0f} s")
        return {
            "pooled": [features.numpy() for features in pooled],
            "pooled_unit": [unit_length(features.numpy()) for features in pooled],
            "descriptors": x,
            "unit": [unit_length(part) for part in x],
        }

    def _get(self, features: str, bits: int | None) -> tuple[Space, np.ndarray]:
        """Database and queries; `bits` says whose network, None for pixels."""
        if features == "pixels":
            db, query = (images.flatten(1).numpy() / np.float32(255) for images in self.images)
        else:
            db, query = self.of_network(bits)[features]
        return Space(db), query


def is_usual(args: Mapping) -> bool:
    """Whether a run is of CIFAR-10 with the training images as the database."""
    usual = {"dataset": "cifar10", "protocol": "spq", "split": None, "validate": False}
    return all(args.get(name, value) == value for name, value in usual.items())


def load_images(
    args: argparse.Namespace, runs: dict[int, Trained]
) -> tuple[tuple[Images, Tensor], tuple[Images, Tensor]]:
    """Images and labels of database and queries: CIFAR-10, or what the one run was trained on.

    Raises:
        UserError: if several runs are of other sets, or pixels of such a set are asked for.
    """
    others = [run for run in runs.values() if not is_usual(run.args)]
    if not others:
        train, test = load_cifar10(args.data_dir, args.if_download)
        return train, test
    if len(runs) > 1:
        raise UserError("RUN_DIR: one of them is not of CIFAR-10's own split; name that one alone")
    if "pixels" in args.features:
        raise UserError("--features: the pixels of this run's images are too many; leave them out")
    first = others[0]
    args = flags_of_run(first.method, first.args)
    data = load_dataset(args, torch.device("cpu"), semi=first.method == "GPQ")
    if data.db is None:
        raise UserError("RUN_DIR: its images have no labels to score with")
    return data.db, data.query


def load_runs(run_dirs: list[Path]) -> dict[int, Trained]:
    """The trained models, by their bits.

    Raises:
        UserError: if a folder has no model, two have the same bits, or a model is not K = 16.
    """
    runs: dict[int, Trained] = {}
    for folder in run_dirs:
        if not folder.is_dir():
            raise UserError(f"RUN_DIR {folder}: is no folder; allowed are folders of runs")
        trained = load_trained(folder, "RUN_DIR")
        quantizer = trained.model.quantizer
        bits = int(quantizer.code_bits)
        if quantizer.K != 16 or bits not in BITS:
            raise UserError(
                f"RUN_DIR {folder}: has {bits} bits of K = {quantizer.K} codewords; allowed are "
                f"{', '.join(map(str, BITS))} bits of K = 16, the shape that the other methods are "
                "given"
            )
        if bits in runs:
            raise UserError(f"RUN_DIR {folder}: a second model of {bits} bits; one a bit length")
        runs[bits] = trained
    return runs


# --- rows ---------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, runs: dict[int, Trained]) -> list[dict]:
    """What has to be measured, in the order of work: a network's features stay in memory."""
    jobs = []
    for bits in args.bits:
        for features in args.features:
            for method in args.methods:
                own = runs[bits].method.lower() if bits in runs else None
                if method in OWN and (features != "descriptors" or method != own):
                    continue
                if method in SIGNS and bits % 8:
                    print(f"left out: {method} at {bits} bits, whose codes are whole bytes")
                    continue
                if method == "cosine" and features in UNIT:  # is L2 there
                    continue
                whole = method in ("exact", "cosine") and features == "pixels"  # no bits in it
                seeds = range(args.seed, args.seed + args.seeds) if method in RANDOM else [None]
                for seed in seeds:
                    job = {
                        "features": features,
                        "method": method,
                        "bits": None if whole else bits,
                        "seed": seed,
                    }
                    if job not in jobs:
                        jobs.append(job)
    # all of the pixels first, then network by network
    return sorted(jobs, key=lambda job: job["features"] != "pixels")


def measure(
    job: dict, source: Source, runs: dict[int, Trained], query_labels: Tensor, db_labels: Tensor
) -> dict:
    """One row: fit on the database, encode it, rank it for every query."""
    space, query = source.get(job["features"], None if job["features"] == "pixels" else job["bits"])
    times = [time.perf_counter()]
    if job["method"] in OWN:
        codebooks = runs[job["bits"]].model.quantizer.codebooks.detach().float().numpy()
        quantizer = Product(job["method"].upper(), np.ascontiguousarray, codebooks)
    else:
        try:
            quantizer = fit(job["method"], space, job["bits"] or 16, job["seed"] or 0)
        except ValueError as error:
            raise UserError(
                f"--methods: {error}; leave the method or these --features away"
            ) from error
    times.append(time.perf_counter())
    order = tie_order(len(space.db))
    codes = quantizer.encode(space.db)[order.numpy()]
    times.append(time.perf_counter())
    whole = any(run.method == "GPQ" for run in runs.values())
    depth = len(codes) if whole else min(TOP_N, len(codes))
    rankings = quantizer.ranked(query, codes, depth)
    figures = evaluate_rankings(rankings, query_labels, db_labels[order], depth, TOP_N, whole)
    times.append(time.perf_counter())
    del figures["pr_curve"]
    seconds = dict(zip(("fit_s", "encode_s", "rank_s"), np.diff(times).tolist(), strict=True))
    return {
        **job,
        "name": quantizer.name,
        "code_bits": quantizer.code_bits,
        "dimensions": space.db.shape[1],
        "distance": quantizer.distance,
        **figures,
        **{name: round(value, 2) for name, value in seconds.items()},
        "model": None if job["features"] == "pixels" else runs[job["bits"]].identity,
    }


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("features", "method", "bits", "seed"))


def kept_rows(args: argparse.Namespace, settings: dict, runs: dict[int, Trained]) -> list[dict]:
    """The rows that --output already holds.

    Raises:
        UserError: if the file is damaged, or was made with other limits or other models.
    """
    path = args.output / FILE
    if args.overwrite or not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        rows, then = found["rows"], found["settings"]
        known = {(row["bits"], row["model"]) for row in rows}
        tables(rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--output={args.output}: {FILE} is damaged; --overwrite begins anew"
        ) from (error)
    other = [f"{name}={then.get(name)}" for name in settings if then.get(name) != settings[name]]
    other += [
        f"another {bits}-bit model"
        for bits, model in sorted(known, key=str)
        if model is not None and bits in runs and runs[bits].identity != model
    ]
    if other:
        raise UserError(
            f"--output={args.output}: holds rows of {', '.join(other)}; take another folder, or "
            "--overwrite to begin anew"
        )
    return rows


def write(folder: Path, head: dict, rows: list[dict]) -> None:
    """Both files, each put into its place whole; the JSON has a line a row."""
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    text = json.dumps(head, indent=2)[:-2] + f',\n  "rows": [\n{lines}\n  ]\n}}\n'
    put(folder / FILE, text)
    put(folder / TABLE, tables(rows))


def put(path: Path, text: str) -> None:
    """Write a file in one step: whoever reads it finds it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# --- tables -------------------------------------------------------------------------------------


def cell(rows: list[dict], figure: str) -> str:
    """Mean over seeds, with the standard deviation of a single one where there are several."""
    if not rows:
        return ""
    values = [row[figure] for row in rows]
    text = f"{np.mean(values):.4f}".removeprefix("0")
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.4f}".replace("± 0", "± ")
    return text


def grouped(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows that differ in the seed alone, in the order of features, methods and bits."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(key(row)[:3], []).append(row)
    order = sorted(groups, key=lambda k: (FEATURES.index(k[0]), NAMES.index(k[1]), k[2] or 0))
    return {k: groups[k] for k in order}


def figures_of(rows: list[dict]) -> tuple[str, ...]:
    """Names of what is shown, the headline first."""
    return (WHOLE, *FIGURES) if rows and WHOLE in rows[0] else FIGURES


def definition(rows: list[dict]) -> str:
    """Of the headline."""
    found = f"mAP@{TOP_N}, AP over the relevant images found"
    return f"{WHOLE}, AP over the whole ranking" if figures_of(rows)[0] == WHOLE else found


def headline(rows: list[dict]) -> str:
    """The headline's figure, a line a method, a column a bit length."""
    groups = grouped(rows)
    columns = sorted({k[2] for k in groups if k[2]}) or USUAL_BITS
    lines = [
        "| features | method | ranked by | " + " | ".join(f"{b} bits" for b in columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for features, method in dict.fromkeys(k[:2] for k in groups):
        of_bits = {k[2]: group for k, group in groups.items() if k[:2] == (features, method)}
        first = next(iter(of_bits.values()))[0]
        of_all = of_bits.get(None, [])
        values = [cell(of_bits.get(b, of_all), figures_of(rows)[0]) for b in columns]
        lines.append(
            f"| {features} | {first['name']} | {first['distance']} | {' | '.join(values)} |"
        )
    return "\n".join(lines)


def tables(rows: list[dict]) -> str:
    """The headline, then every figure."""
    queries = {row["queries"] for row in rows}
    first = min((row["seed"] for row in rows if row["seed"] is not None), default="none")
    lines = [
        "# Baselines",
        "",
        f"Made by `python scripts/baselines.py`. {', '.join(map(str, sorted(queries)))} queries. "
        f"The random methods ran with seed {first}; a row with ± has the mean of several seeds and "
        "the standard deviation of one. Uncompressed features are the reference for the codes of "
        "their column; descriptors, unit and pooled are of the network trained at those bits. Of "
        "the seconds, principal components count with the method that asks for them first.",
        "",
        f"## {definition(rows)}",
        "",
        headline(rows),
        "",
        "## All figures",
        "",
        "| features | bits | method | bits stored | ranked by | "
        + " | ".join(figures_of(rows))
        + " | fit, s |",
        "|---|---|---|---|---|" + "---|" * (len(figures_of(rows)) + 1),
    ]
    for (features, _, bits), group in grouped(rows).items():
        row = group[0]
        # a small trial has no precision@1000
        values = [cell([r for r in group if f in r], f) for f in figures_of(rows)]
        fit_s = np.mean([r["fit_s"] for r in group])
        lines.append(
            f"| {features} | {bits or 'any'} | {row['name']} | {row['code_bits']} | "
            f"{row['distance']} | {' | '.join(values)} | {fit_s:.1f} |"
        )
    return "\n".join(lines) + "\n"


# --- main ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not yet measured, and print the table."""
    args = parse(arguments)
    runs = load_runs(args.run_dirs)
    if args.bits is None:
        args.bits = sorted(runs) or USUAL_BITS
    if len(runs) > 1 and any(run.method == "GPQ" for run in runs.values()):
        raise UserError("RUN_DIR: one of them is of GPQ; name that one alone")
    if args.features != ["pixels"]:
        missing = [str(bits) for bits in args.bits if bits not in runs]
        if missing:
            raise UserError(
                f"--bits: no RUN_DIR has a model of {', '.join(missing)} bits; name one, leave "
                "the bits out, or take --features=pixels"
            )
    settings = {"limit_db": args.limit_db, "limit_query": args.limit_query, "top_n": TOP_N}
    rows = kept_rows(args, settings, runs)
    db, query = load_images(args, runs)
    (db_images, db_labels), (images, labels) = (
        side if limit is None else tuple(part[:limit] for part in side)
        for side, limit in ((db, args.limit_db), (query, args.limit_query))
    )
    source = Source(db_images, images, runs)
    head = {
        "settings": settings,
        "commit": git_commit(),
        "versions": versions() | {"faiss-cpu": metadata.version("faiss-cpu")},
        "hardware": describe_hardware(torch.device("cpu")),
    }
    done = {key(row) for row in rows}
    jobs = plan(args, runs)
    for i, job in enumerate(jobs, start=1):
        if key(job) in done:
            continue
        row = measure(job, source, runs, labels, db_labels)
        rows.append(row)
        write(args.output, head, rows)
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        print(
            f"[{i}/{len(jobs)}] {row['features']}, {row['name']}, {row['code_bits']} bits{seed}, "
            f"{row['distance']}: {figures_of([row])[0]} {row[figures_of([row])[0]]:.4f} (fit "
            f"{row['fit_s']:.1f} s, "
            f"encode {row['encode_s']:.1f} s, rank {row['rank_s']:.1f} s)",
            flush=True,
        )
    put(args.output / TABLE, tables(rows))
    print(f"\n{definition(rows)}:\n\n{headline(rows)}\n")
    print(f"All figures: {args.output / FILE} and {args.output / TABLE}")


if __name__ == "__main__":
    run_main(main)
