"""Every picture of a paper from a run's folder, as PNG and SVG, with the numbers drawn.

    python scripts/make_figures.py runs/quickstart_32bits
    python scripts/make_figures.py runs/quickstart_32bits --only=tsne,codeword_usage

1.6 minutes on 2 cores for a network of width 16 and all of CIFAR-10. `figures.json` beside the
pictures has their numbers.
"""

import argparse
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from args import add_cifar10_flags, count_or_all, flags_of_run
from data.cifar10 import CLASSES
from data.datasets import load_dataset
from utils import run_figures
from utils.analysis import (
    codeword_purity,
    codeword_usage,
    embed,
    first_of_each_class,
    perplexity,
    sample_pairs,
    separation,
)
from utils.cli import run_main
from utils.errors import UserError
from utils.evaluation import RetrievalEvaluation, headline_first
from utils.figures import DISTANCE_NAMES, learning_curve, retrieval_grid
from utils.flags import HelpFormatter, Parser, number
from utils.logging import METRICS, read_metrics
from utils.trained import load_trained

NUMBERS = "figures.json"
FORMATS = ("png", "svg")
COLUMNS = 10  # nearest images of the retrieval grid


class Scene:
    """A trained model before a data set; what a picture needs is computed when first asked for.

    Attributes:
        args: the flags of this script, `Top_N` resolved.
        trained: the model.
        flags: those it was trained with.
    """

    def __init__(self, args: Namespace) -> None:
        self.trained = load_trained(args.run_dir, "RUN_DIR")
        self.flags = flags_of_run(self.trained.method, self.trained.args)
        if self.flags.dataset != "cifar10":
            raise UserError(
                f"RUN_DIR={args.run_dir}: was trained on {self.flags.dataset}; allowed are runs on "
                "cifar10"
            )
        top_n = args.Top_N or self.flags.Top_N
        self.args = Namespace(**{**vars(args), "Top_N": top_n})
        self.headline = self.flags.distance
        self.codebooks = self.trained.model.quantizer.codebooks.detach().float()
        self.name = f"{self.trained.method}, {self.trained.model.quantizer.code_bits:g} bits"

    @cached_property
    def evaluation(self) -> RetrievalEvaluation:
        """The run's own queries and database."""
        given = ("data_dir", "if_download", "limit_db", "limit_query")
        told = {name: getattr(self.args, name) for name in given}
        flags = Namespace(**vars(self.flags) | told)
        is_gpq = self.trained.method == "GPQ"
        data = load_dataset(flags, torch.device("cpu"), semi=is_gpq)
        distances = [self.headline] if is_gpq else headline_first(self.headline)
        return RetrievalEvaluation(
            data.query, data.db, self.trained.input_size, self.args.Top_N, distances
        )

    @cached_property
    def encoded(self) -> tuple[Tensor, Tensor]:
        """Query descriptors (Q, D) and database codes (N, M)."""
        query, db = self.evaluation.query, self.evaluation.db
        print(f"encoding {len(query[0]):,} queries and {len(db[0]):,} items ...", flush=True)
        # the memory layout of the training, so that the codes are the training's own
        odd = self.flags.width % 8
        layout = torch.contiguous_format if odd else torch.channels_last
        return self.evaluation.encode(self.trained.model.to(memory_format=layout))

    @cached_property
    def metrics(self) -> list[dict]:
        """Of each distance, the headline first."""
        return self.evaluation.score(*self.encoded, self.codebooks)

    @cached_property
    def chance(self) -> float:
        """Precision of a random order: that of the whole database."""
        return self.metrics[0]["pr_curve"]["precision"][-1]

    def source(self) -> dict[str, str | int | float | None]:
        """What decides the numbers, beside the flags that stand with each picture."""
        return {
            "method": self.trained.method,
            "code_bits": self.trained.model.quantizer.code_bits,
            "identity": self.trained.identity,
            "limit_db": self.args.limit_db,
            "limit_query": self.args.limit_query,
            "seed": self.args.seed,
        }


# --- one picture each: draws into `paths`, returns its numbers ----------------------------------


def make_learning_curve(scene: Scene, paths: list[Path]) -> dict | None:
    """Loss and mAP as the run logged them; None without a log."""
    entries = read_metrics(scene.args.run_dir)
    losses = [e["loss"] for e in entries if e["kind"] == "train" and "loss" in e]
    if not losses:
        print(f"learning_curve: left out, {scene.args.run_dir / METRICS} is not there or empty")
        return None
    name = f"mAP@{scene.flags.Top_N}"  # as logged, whatever --Top_N says
    scored = [e for e in entries if e.get("distance") == scene.headline and name in e]
    score = f", {name} {scored[-1][name]:.3f}" if scored else ""
    learning_curve(entries, paths, name, scene.headline, scene.name + score)
    return {
        "steps": entries[-1]["step"],
        "last_loss": losses[-1],
        "distance": scene.headline,
        name: [{"step": e["step"], "epoch": e["epoch"], "value": e[name]} for e in scored],
    }


def make_precision_recall(scene: Scene, paths: list[Path]) -> dict:
    """Each distance over the whole ranking."""
    curves = {
        f"{DISTANCE_NAMES[m['distance']]}, mAP@all {m['mAP@all']:.3f}": m["pr_curve"]
        for m in scene.metrics
    }
    run_figures.precision_recall(curves, scene.chance, paths)
    kept = ("mAP@all", f"mAP@{scene.args.Top_N}", f"mAP@{scene.args.Top_N}_all_relevant")
    kept += ("pr_curve", "queries", "queries_without_relevant")
    found = {m["distance"]: {k: m[k] for k in kept if k in m} for m in scene.metrics}
    return found | {"chance": scene.chance}


def make_precision_at_n(scene: Scene, paths: list[Path]) -> dict:
    """Each distance down to the top N."""
    found = {}
    for m in scene.metrics:
        curve = m["pr_curve"]
        points = dict(zip(curve["rank"], curve["precision"], strict=True))
        points |= {int(k.split("@")[1]): m[k] for k in m if k.startswith("precision@")}
        most = max(points) if scene.args.Top_N == "all" else scene.args.Top_N
        ranks = sorted(n for n in points if n <= most)
        found[m["distance"]] = {"rank": ranks, "precision": [points[n] for n in ranks]}
    curves = {DISTANCE_NAMES[distance]: curve for distance, curve in found.items()}
    run_figures.precision_at_n(curves, scene.chance, paths)
    return found | {"chance": scene.chance}


def make_retrieval(scene: Scene, paths: list[Path]) -> dict:
    """The first query of each class and what it finds."""
    x, codes = scene.encoded
    (images, labels), (db_images, db_labels) = scene.evaluation.query, scene.evaluation.db
    rows, index = first_of_each_class(x, labels, codes, scene.codebooks, COLUMNS, scene.headline)
    name = f"mAP@{scene.args.Top_N}"
    title = f"{scene.name}, {name} {scene.metrics[0][name]:.3f}"
    right = db_labels[index] == labels[rows][:, None]
    names = [CLASSES[label] for label in labels[rows].tolist()]
    retrieval_grid(images[rows], names, db_images[index], right, paths, title)
    counts = right.sum(dim=1).tolist()
    return {"queries": rows.tolist(), "items": index.tolist(), "right": counts}


def make_tsne(scene: Scene, paths: list[Path]) -> dict:
    """Query images, drawn by seed: their descriptors x and what their codes decode to."""
    x, _ = scene.encoded
    labels = scene.evaluation.query[1]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(scene.args.seed))
    chosen = order[: scene.args.points]
    maps = {
        "descriptors": embed(x[chosen], scene.args.seed),
        "quantized descriptors": embed(quantized(scene, x[chosen]), scene.args.seed),
    }
    titles = {
        f"{name}, {made.distinct:,} different of {len(chosen):,}": made.points
        for name, made in maps.items()
    }
    run_figures.tsne(titles, labels[chosen].tolist(), CLASSES, paths)
    counts = {
        name.replace(" ", "_"): {"distinct": made.distinct, "neighbours": made.neighbours}
        for name, made in maps.items()
    }
    return {"points": len(chosen)} | counts


def quantized(scene: Scene, x: Tensor) -> Tensor:
    """decode(encode(x)): the codewords that stand for x in a search, (N, D)."""
    quantizer = scene.trained.model.quantizer
    return quantizer.decode(quantizer.encode(x)).detach()


def make_codeword_usage(scene: Scene, paths: list[Path]) -> dict:
    """Of the database's codes."""
    _, codes = scene.encoded
    usage = codeword_usage(codes, scene.codebooks.shape[1])
    perplexities = perplexity(usage).tolist()
    run_figures.codeword_usage(usage.numpy(), perplexities, paths)
    K = usage.shape[1]
    print(
        f"  perplexity of each codebook, at most {K}: {' '.join(f'{p:.2f}' for p in perplexities)}"
    )
    return {
        "perplexity": perplexities,
        "at_most": K,
        "unused": (usage == 0).sum(dim=1).tolist(),
        "different_codes": len(torch.unique(codes, dim=0)),
        "items": len(codes),
        "usage": usage.tolist(),
    }


def make_codeword_classes(scene: Scene, paths: list[Path]) -> dict:
    """Classes of the database's items on each codeword of the first codebook."""
    _, codes = scene.encoded
    labels, (K, C) = scene.evaluation.db[1], (scene.codebooks.shape[1], len(CLASSES))
    counts = torch.bincount(codes[:, 0].long() * C + labels, minlength=K * C).view(K, C)
    purity = codeword_purity(codes, labels)
    title = f"{scene.name}, codebook 1; purity of all codebooks {purity:.2f}"
    run_figures.codeword_classes(counts.numpy(), CLASSES, title, paths)
    return {"codeword_purity": purity, "codebook_1": counts.tolist()}


def make_distance_histogram(scene: Scene, paths: list[Path]) -> dict:
    """Of pairs drawn by seed."""
    x, codes = scene.encoded
    labels, db_labels = scene.evaluation.query[1], scene.evaluation.db[1]
    pairs = sample_pairs(
        x, labels, codes, db_labels, scene.codebooks, scene.args.pairs, scene.args.seed
    )
    kinds = {"relevant": pairs.dist[pairs.relevant], "irrelevant": pairs.dist[~pairs.relevant]}
    run_figures.distance_histogram(kinds["relevant"].numpy(), kinds["irrelevant"].numpy(), paths)
    found = {
        name: {"pairs": len(dist), "mean": float(dist.mean()), "std": float(dist.std(correction=0))}
        for name, dist in kinds.items()
        if len(dist)
    }
    if len(found) == 2:
        chance = separation(pairs)
        print(f"  a relevant pair is closer than an irrelevant one with a chance of {chance:.3f}")
        found["chance_relevant_is_closer"] = chance
    return found


PICTURES = {
    "learning_curve": make_learning_curve,
    "precision_recall": make_precision_recall,
    "precision_at_n": make_precision_at_n,
    "retrieval": make_retrieval,
    "tsne": make_tsne,
    "codeword_usage": make_codeword_usage,
    "codeword_classes": make_codeword_classes,
    "distance_histogram": make_distance_histogram,
}


def picture_names(text: str) -> list[str]:
    """A type for argparse: names divided by commas, in the order of PICTURES."""
    names = text.split(",")
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{','.join(unknown)}: no such picture; allowed are {', '.join(PICTURES)}"
        )
    return [name for name in PICTURES if name in names]


def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags."""
    parser = Parser(
        prog="make_figures.py",
        description="Every picture of a paper from a run on CIFAR-10, as PNG and SVG.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    whole = number(int, 1)
    flag(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="a training's --output_dir: checkpoint_last.pt or model.pt, and metrics.jsonl",
    )
    flag(
        "--output_dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="where the pictures go; older ones are replaced (default: RUN_DIR/figures)",
    )
    add_cifar10_flags(parser)
    flag(
        "--limit_db",
        type=whole,
        default=None,
        metavar="N",
        help="search among the first N images (default: all)",
    )
    flag(
        "--limit_query",
        type=whole,
        default=None,
        metavar="N",
        help="ask the first N queries (default: all)",
    )
    flag(
        "--points",
        type=whole,
        default=2000,
        metavar="N",
        help="query images in the t-SNE maps; time grows a little faster than N",
    )
    flag(
        "--pairs",
        type=whole,
        default=1_000_000,
        metavar="N",
        help="(query, item) pairs in the distance histogram",
    )
    flag(
        "--Top_N",
        type=count_or_all,
        default=None,
        metavar="N",
        help="the N of mAP@N and the end of precision@N (default: the run's)",
    )
    flag(
        "--seed",
        type=number(int, 0, high=2**31 - 1),
        default=0,
        metavar="N",
        help="of the points, the pairs and t-SNE",
    )
    flag(
        "--only",
        type=picture_names,
        default=list(PICTURES),
        metavar="NAME,NAME",
        help=f"of {', '.join(PICTURES)} (default: all)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the pictures one by one; what is done stays if a later one fails."""
    args = parse(argv)
    if not args.run_dir.is_dir():
        found = "is a file" if args.run_dir.exists() else "no such folder"
        raise UserError(
            f"RUN_DIR={args.run_dir}: {found}; allowed is the --output_dir of a training, a folder "
            "with checkpoint_last.pt or model.pt"
        )
    scene = Scene(args)
    folder = args.output_dir or args.run_dir / "figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir={folder}: cannot be made: {error}") from error
    for name in args.only:
        start = time.perf_counter()
        print(f"{name} ...", flush=True)
        paths = [folder / f"{name}.{kind}" for kind in FORMATS]
        numbers = PICTURES[name](scene, paths)
        if numbers is not None:
            note_numbers(folder / NUMBERS, scene.source(), name, numbers)
            print(f"  {' '.join(map(str, paths))}, {time.perf_counter() - start:.1f} s")
    print(f"numbers: {folder / NUMBERS}")


def note_numbers(path: Path, source: dict, name: str, numbers: dict) -> None:
    """Put one picture's numbers into the file; those of another model or data set are dropped."""
    try:
        content = json.loads(path.read_text())
        if content["source"] != source:
            content = {"source": source}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not ours
        content = {"source": source}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content | {name: numbers}, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    run_main(main)
