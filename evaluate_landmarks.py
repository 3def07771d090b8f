"""Score networks on revisited Oxford or Paris, as the landmark papers do.

    python evaluate_landmarks.py --dataset=roxford5k --data_dir=landmarks --features_dir=features \\
        --gallery=r101-delg --gallery_weights=R101-DELG.pth --query=runs/ssp

The database is embedded by the gallery network, each query, cut to its box, by the query network;
both at several scales. What is ranked is the cosine.
"""

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from args import PUBLISHED, parse_landmarks_args
from data.features import identify_trunk
from data.landmark_images import read_landmarks
from data.landmarks import DISTRACTORS_NAME, missing_files, read_distractors, read_revisited
from models import OwnGallery, build_embedding
from models.embedding import load_published
from utils.asymmetric import SIDES
from utils.checkpoint import LAST, WEIGHTS, file_of_run, load_checkpoint, put_text
from utils.cli import run_main
from utils.device import AMP_DTYPES, choose_amp, choose_device
from utils.distributed import Ranks
from utils.errors import UserError
from utils.evaluation import to_unit
from utils.gallery import Gallery, identify_names, read_gallery, write_gallery
from utils.landmark_metrics import SETUPS, evaluate_revisited
from utils.multiscale import multiscale_features
from utils.pretrained import read_weights
from utils.progress import progress
from utils.trained import _RealSteps, build_from_flags, load_trained

PIECE = 500  # images whose features are kept together
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


@dataclass(frozen=True)
class Network:
    """What embeds images.

    Attributes:
        model: in evaluation mode; its `describe` gives embeddings (N, D) of unit length.
        told: it, in words.
        identity: SHA-256 of its weights.
        squeezed: side of the squares that it takes, pixels; None: it takes images as they are.
        learned_from: of SSP's, whose features it learned from, in words.
    """

    model: nn.Module
    told: str
    identity: str
    squeezed: int | None = None
    learned_from: str | None = None


@dataclass(frozen=True)
class Images:
    """A list of images.

    Attributes:
        name: of the list, a file name.
        paths: below --data_dir.
        boxes: (N, 4), what the images are cut to; None: nothing.
    """

    name: str
    paths: list[str]
    boxes: np.ndarray | None = None


def main(argv: list[str] | None = None) -> None:
    """Parse, check that everything is there, embed, score."""
    args = parse_landmarks_args(argv)
    faults: list[str] = []
    queries, parts, truth = find_images(args, faults)
    gallery = attempt(faults, load_network, args.gallery, args.gallery_weights, "--gallery")
    query = gallery
    if args.query is not None:
        query = attempt(faults, load_network, args.query, args.query_weights, "--query")
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


def load_network(name: str, weights: Path | None, flag: str) -> Network:
    """The network that --gallery or --query mean, on the CPU.

    Raises:
        UserError: if a file is missing or damaged, or weights do not fit.
    """
    found = load_own(Path(name), flag) if weights is None else load_by_name(name, weights, flag)
    if not all(value.isfinite().all() for value in found.model.state_dict().values()):
        raise UserError(f"{flag}={name}: has weights that are not finite")
    return found


def load_by_name(name: str, path: Path, flag: str) -> Network:
    """A network with published weights."""
    weights = read_weights(path, f"{flag}_weights")
    kind, arch = PUBLISHED.get(name, ("gem", name))
    # both projections, a linear layer and a 1x1 convolution, are (D, C, ...)
    whiten = [v for n, v in weights.items() if n.endswith("whiten.weight") and v.dim() >= 2]
    try:
        model = build_embedding(kind, arch, D=len(whiten[0]) if whiten else 2048)
    except ValueError as error:
        raise UserError(f"{flag}={name}: {error}") from error
    try:
        load_published(model, weights)
    except ValueError as error:
        raise UserError(f"{flag}_weights={path}: does not fit {flag}={name}: {error}") from error
    identity = identify_trunk(model)
    return Network(model.eval(), f"{name} {identity[:16]}", identity)


def load_own(path: Path, flag: str) -> Network:
    """A network that this project trained: SPQ's or GPQ's descriptors, or SSP's query network."""
    try:
        file = file_of_run(path, (LAST, WEIGHTS)) if path.is_dir() else path
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read: {error}") from error
    if file is None:
        raise UserError(f"{flag}={path}: holds neither {LAST} nor {WEIGHTS}")
    state = load_checkpoint(file, flag, weights_alone=True)
    method, args = state["method"], state["args"]
    if method == "SSP":
        model = _build_ssp(state, f"{flag}={path}").eval()
        squeezed = args["input_size"] if model.pool is None else None
        identity = identify_trunk(model)
    else:
        trained = load_trained(file, flag)
        model, squeezed = OwnGallery(trained.model), trained.input_size
        identity = trained.identity  # by which extract_features.py names it
    told = f"{method} {args['arch']} {identity[:16]}"
    return Network(model, told, identity, squeezed, args.get("gallery"))


def _build_ssp(state: dict, where: str) -> nn.Module:
    try:
        saved = state["model"]
        with torch.device("meta"), _RealSteps():  # nothing is made of a size that is not the file's
            wanted = build_from_flags("SSP", state["args"]).state_dict()
        if {n: v.shape for n, v in wanted.items()} != {n: v.shape for n, v in saved.items()}:
            raise ValueError("weights of another shape")
        size = state["args"]["input_size"]
        if type(size) is not int or not 8 <= size <= 1024:
            raise ValueError(f"input_size {size}")
        model = build_from_flags("SSP", state["args"])
        model.load_state_dict(saved)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where}: is damaged: its weights and its flags do not fit ({detail})"
        ) from error
    return model


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


# --- features -------------------------------------------------------------------------------------


def kept_features(
    network: Network, images: Images, args: Namespace, device: torch.device
) -> Tensor:
    """Embeddings (N, D) float32 on the CPU, of unit length: those that --features_dir has, and the
    others made now and, if there is such a folder, kept there piece by piece.

    A piece is used again for the same weights, settings, names, boxes and sizes of files.

    Raises:
        UserError: if an image or a piece cannot be read.
        OSError: if a piece cannot be written.
    """
    N = len(images.paths)
    x = torch.empty(N, network.model.embedding_dim)  # of a million images 8 GB: no copies
    folder = None
    if args.features_dir is not None:
        folder = args.features_dir / f"{images.name}-{identify_features(network, images, args)}"
    with progress(N, 0, images.name, "image") as bar:
        for start in range(0, N, PIECE):
            piece = slice(start, min(start + PIECE, N))
            names = images.paths[piece]
            path = None if folder is None else folder / f"{start:07d}.safetensors"
            if path is not None and path.is_file():
                bar.update(len(names))
            else:
                x[piece] = embed(network, images, args, device, piece, bar.update)
                if path is None:
                    continue
                about = identify_names(names), network.told, images.name
                write_gallery(path, Gallery(x[piece], *about))
            try:  # new ones too, so that figures do not depend on what was there
                x[piece] = read_gallery(path, names, images.name, "--features_dir").features
            except UserError as error:
                raise UserError(
                    f"--features_dir={path}: is damaged; delete it, and it is made again"
                ) from error
    return x


def identify_features(network: Network, images: Images, args: Namespace) -> str:
    """16 hex digits of all that decides the embeddings of these images."""
    boxes = None if images.boxes is None else images.boxes.tolist()
    sizes = [os.path.getsize(args.data_dir / path) for path in images.paths]
    seen_as = network.squeezed or args.scales
    known = (network.identity, seen_as, args.longest, args.amp, PIECE, images.paths, boxes, sizes)
    return hashlib.sha256(repr(known).encode(errors="surrogateescape")).hexdigest()[:16]


@torch.no_grad()
def embed(
    network: Network,
    images: Images,
    args: Namespace,
    device: torch.device,
    piece: slice,
    done: Callable[[int], object],
) -> Tensor:
    """Embeddings (n, D) float32 on the CPU, of n of the images.

    Raises:
        UserError: if an image cannot be read, or its embedding is not finite.
    """
    dtype = AMP_DTYPES[args.amp]
    names = images.paths[piece]
    boxes = None if images.boxes is None else images.boxes[piece]
    # each image has a size of its own: one after the other
    pixels = read_landmarks(
        args.data_dir, names, args.longest, boxes, args.max_pixels, args.num_workers
    )
    found = []
    for name, image in zip(names, pixels, strict=True):
        image = image.to(device)  # (3, H, W) uint8
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            if network.squeezed is not None:
                x = network.model.describe(to_unit(image[None], network.squeezed))[0]  # (D,)
            else:
                x = multiscale_features(network.model, image.float() / 255, args.scales)  # (D,)
        x = x.float().cpu()
        if not x.isfinite().all():
            raise UserError(
                f"--amp={args.amp}: {network.told} gives {name} an embedding that is not finite; "
                "try --amp=off"
            )
        found.append(x)
        done(1)
    return torch.stack(found)


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
