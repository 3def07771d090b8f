"""Score networks on revisited Oxford or Paris, as the landmark papers do.

    python evaluate_landmarks.py --dataset=roxford5k --data_dir=landmarks --features_dir=features \\
        --gallery=r101-delg --gallery_weights=R101-DELG.pth --query=runs/ssp

The database is embedded by the gallery network, each query, cut to its box, by the query network;
both at several scales. What is ranked is the cosine.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from args import parse_landmarks_args
from data.landmarks import DISTRACTORS_NAME, missing_files, read_distractors, read_revisited
from utils.asymmetric import SIDES
from utils.checkpoint import put_text
from utils.cli import run_main
from utils.device import choose_amp, choose_device
from utils.distributed import Ranks
from utils.embedders import Network, load_network
from utils.errors import UserError
from utils.gallery import check_writable
from utils.landmark_features import Images, kept_features
from utils.landmark_metrics import SETUPS, evaluate_revisited

KS = (1, 5, 10)
SHOWN = 5  # missing images that are named
SOURCES = {
    "roxford5k": "gnd_roxford5k.pkl is on the project page of Revisiting Oxford and Paris "
    "(Radenovic et al., CVPR 2018), the images are those of Oxford's Visual Geometry Group, "
    "Oxford Buildings, all in one folder jpg",
    "rparis6k": "gnd_rparis6k.pkl is on the project page of Revisiting Oxford and Paris "
    "(Radenovic et al., CVPR 2018), the images are those of Oxford's Visual Geometry Group, "
    "Paris Buildings, all in one folder jpg",
    DISTRACTORS_NAME: "revisitop1m.txt and its images are on the project page of Revisiting Oxford "
    "and Paris, as R1M",
}

T = TypeVar("T")


def main(argv: list[str] | None = None) -> None:
    """Parse, check that everything is there, embed, score."""
    args = parse_landmarks_args(argv)
    if args.output is not None and not args.dry_run:
        check_writable(args.output)
    faults: list[str] = []
    queries, parts, truth = find_images(args, faults)
    gallery = network_of(faults, args, "gallery")
    query = gallery
    if args.query is not None:
        query = network_of(faults, args, "query")
    if gallery and query:
        attempt(faults, check_dimensions, gallery, query)
    if args.dry_run:
        for found, flag in ((gallery, "--gallery"), (query, "--query")):
            if found:
                print(f"{flag}: {found.told}, {found.model.embedding_dim} dimensions")
    if faults:
        raise UserError("; ".join(faults))
    if args.dry_run:
        print("Everything is there.")
        return

    device = choose_device(args, Ranks())
    args.amp = choose_amp(args.amp, device)
    for network in (gallery, query):
        network.model.to(device)
    known: dict[tuple[str, str], Tensor] = {}

    def features(network: Network, images: Images) -> Tensor:
        key = network.identity, images.name
        if key not in known:
            known[key] = kept_features(network, images, args, device)
        return known[key]

    by_name = {"query": query, "gallery": gallery}
    rows = []
    for side in SIDES if args.all_sides else SIDES[:1]:
        asks, asked = (by_name[name] for name in side.split("-"))
        db = [features(asked, part) for part in parts]
        rows.append({"side": side} | score(features(asks, queries), db, truth))
    report(args, query, gallery, rows, sum(len(part.paths) for part in parts))


# --- what is needed -------------------------------------------------------------------------------


def attempt(faults: list[str], function: Callable[..., T], *args: object) -> T | None:
    """The function's result; or None, and what is wrong is added to the faults."""
    try:
        return function(*args)
    except UserError as error:
        faults.append(str(error))
        return None


def network_of(faults: list[str], args: Namespace, name: str) -> Network | None:
    """That of --gallery or --query."""
    network, weights = getattr(args, name), getattr(args, f"{name}_weights")
    return attempt(faults, load_network, network, weights, f"--{name}", args.pretrained)


def find_images(
    args: Namespace, faults: list[str]
) -> tuple[Images, list[Images], list[Mapping[str, np.ndarray]]]:
    """Queries, parts of the database, and what is relevant to each query; adds to the faults what
    is not there, and where it is to be had."""
    queries, parts, truth = Images("", []), [], []
    revisited = attempt(faults, read_revisited, args.data_dir, args.dataset)
    if revisited is None:
        faults.append(SOURCES[args.dataset])
    else:
        queries = Images(f"{args.dataset}-queries", revisited.query_paths, revisited.boxes)
        parts = [Images(f"{args.dataset}-database", revisited.db_paths)]
        truth = revisited.ground_truth
        find_missing(args, [queries, *parts], args.dataset, faults)
    if args.distractors:
        paths = attempt(faults, read_distractors, args.data_dir)
        if paths is None:
            faults.append(SOURCES[DISTRACTORS_NAME])
        else:
            parts.append(Images(DISTRACTORS_NAME, paths))
            find_missing(args, parts[-1:], DISTRACTORS_NAME, faults)
    return queries, parts, truth


def find_missing(args: Namespace, lists: list[Images], name: str, faults: list[str]) -> None:
    """Add the images of a set that are not there to the faults."""
    listed = list(dict.fromkeys(path for images in lists for path in images.paths))
    missing = missing_files(listed, args.data_dir)
    if args.dry_run:
        told = ", ".join(f"{len(images.paths)} in {images.name}" for images in lists)
        print(f"{name}: {told}; {len(missing)} missing")
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        faults.append(
            f"--data_dir={args.data_dir}: {len(missing)} of {len(listed)} images of {name} are "
            f"missing: {', '.join(missing[:SHOWN])}{more}"
        )
        faults.append(SOURCES[name])


def check_dimensions(gallery: Network, query: Network) -> None:
    """
    Raises:
        UserError: if the two networks' embeddings cannot be compared.
    """
    D, D_query = gallery.model.embedding_dim, query.model.embedding_dim
    if D != D_query:
        raise UserError(
            f"--query: its embeddings have {D_query} dimensions and the gallery's {D}; allowed is "
            "a network that learned from this gallery's features"
        )


# --- figures --------------------------------------------------------------------------------------


def score(query: Tensor, db: list[Tensor], truth: list[Mapping[str, np.ndarray]]) -> dict:
    """For each setup the number of queries in the means, mAP and mP@k, in [0, 1]; None where no
    query counts.

    Args:
        query: (Q, D) of unit length.
        db: (N, D) of unit length, in parts: the set's own images first, then distractors.
        truth: as `evaluate_revisited` takes it.
    """
    sim = torch.cat([query @ part.T for part in db], dim=1)  # (Q, N)
    ranks = sim.argsort(dim=1, descending=True, stable=True)
    found = evaluate_revisited(ranks, truth, KS)
    names = ("mAP", *(f"mP@{k}" for k in KS))
    return {
        setup: {"queries": found[setup]["queries"]}
        | {name: found[setup][name] if found[setup]["queries"] else None for name in names}
        for setup in SETUPS
    }


def report(args: Namespace, query: Network, gallery: Network, rows: list[dict], n_db: int) -> None:
    """Print the figures in per cent, as they are published, and write --output in [0, 1]."""
    print(f"{args.dataset}: {n_db} images in the database, by {gallery.told}")
    learned = f", which learned from {query.learned_from}" if query.learned_from else ""
    print(f"queries by {query.told}{learned}; figures in per cent")
    names = ("mAP", *(f"mP@{k}" for k in KS))
    print(f"{'':16}{'':8}{'queries':>8}" + "".join(f"{name:>8}" for name in names))
    for row in rows:
        for setup in SETUPS:
            figures = row[setup]
            cells = (figures[name] for name in names)
            told = "".join(f"{'-' if x is None else f'{100 * x:.2f}':>8}" for x in cells)
            print(f"{row['side']:16}{setup:8}{figures['queries']:>8}{told}")
    if args.output is not None:
        content = {
            "dataset": args.dataset,
            "database": n_db,
            "distractors": args.distractors,
            "gallery": gallery.told,
            "query": query.told,
            "query_learned_from": query.learned_from,
            "dimensions": gallery.model.embedding_dim,
            "longest": args.longest,
            "scales": args.scales,
            "amp": args.amp,
            "sides": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        put_text(args.output, json.dumps(content, indent=2) + "\n")
        print(f"{args.output}: written")


if __name__ == "__main__":
    run_main(main)
