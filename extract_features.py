"""Embed all images of a set by a gallery network: the first step of SSP.

python extract_features.py --gallery=results/gpq_48bits_width32 --output=gallery.safetensors
python extract_features.py --dataset=gldv2 --data_dir=landmarks --gallery=r101-delg \\
    --gallery_weights=R101-DELG.pth --output=gldv2.safetensors
"""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import torch

from args import PIECES, parse_extract_args
from data.datasets import load_all
from data.landmark_batches import LANDMARK_SETS, load_landmarks
from models import OwnGallery
from utils.cli import run_main
from utils.device import autocast, choose_amp, choose_device
from utils.distributed import Ranks
from utils.embedders import load_network
from utils.errors import UserError
from utils.evaluation import as_batches
from utils.flags import is_file
from utils.gallery import Gallery, check_writable, identify_names, write_gallery
from utils.landmark_features import Images, kept_features
from utils.progress import progress
from utils.trained import load_trained

PART = 10_000  # images of a list that are embedded one after the other under one name


def main(argv: list[str] | None = None) -> None:
    """Parse, load, embed, write."""
    args = parse_extract_args(argv)
    check_writable(args.output)
    device = choose_device(args, Ranks())
    of_landmarks = args.dataset in LANDMARK_SETS
    gallery = (embed_landmarks if of_landmarks else embed_squares)(args, device)
    write_gallery(args.output, gallery)
    N, D = gallery.features.shape
    print(f"{args.output}: {N} images, {D} dimensions, by {gallery.network}")
    if of_landmarks and args.features_dir == args.output.with_name(args.output.name + PIECES):
        shutil.rmtree(args.features_dir)


def embed_squares(args: Namespace, device: torch.device) -> Gallery:
    """Images of one size, by a network of this project or one of timm's; of those that cannot be
    read, with --skip_missing, the rows are NaN."""
    size = args.input_size if "input_size" in args.given else None
    if is_file(args.gallery):
        trained = load_trained(Path(args.gallery), "--gallery")  # SSP's query networks are none
        told = f"{trained.method} {trained.args['arch']} {trained.identity[:16]}"
        network, usual = OwnGallery(trained.model), trained.input_size
    else:
        found = load_network(args.gallery, args.gallery_weights, "--gallery", args.pretrained, size)
        network, told, usual = found.model, found.told, found.usual or args.input_size
    network.to(device).eval()
    args.amp = choose_amp(args.amp, device)
    args.input_size = size or usual
    images, split, unreadable = load_all(args)
    found = []
    with torch.no_grad(), progress(len(images), 0, "embedding", "image") as bar:
        for batch in as_batches(images, args.input_size, device):
            with autocast(args.amp, device):
                found.append(network.describe(batch).float().cpu())
            bar.update(len(batch))
    x = torch.cat(found)
    if not x.isfinite().all():
        row = int((~x.isfinite()).any(dim=1).nonzero()[0])
        hint = "; try --amp=off" if args.amp != "off" else ""
        raise UserError(
            f"--gallery={args.gallery}: {told} gives {split.listing.names[row]} an embedding that "
            f"is not finite{hint}"
        )
    x[unreadable] = torch.nan
    names = identify_names(split.listing.names)
    return Gallery(x, names, told, split.dataset, input_size=args.input_size)


def embed_landmarks(args: Namespace, device: torch.device) -> Gallery:
    """Images at their own aspect; of missing ones, with --skip_missing, there are no rows."""
    network = load_network(args.gallery, args.gallery_weights, "--gallery", args.pretrained)
    network.model.to(device)
    args.amp = choose_amp(args.amp, device)
    args.num_workers = args.num_workers or os.cpu_count()
    found = load_landmarks(args)
    rows = found.present()
    names = [found.split.listing.names[row] for row in rows.tolist()]
    x = torch.empty(len(names), network.model.embedding_dim)  # 13 GB of gldv2: no copies
    # what is kept is known by its part of the list: an image that must be taken out, as it cannot
    # be read, costs the features of its own part alone
    start = 0
    for part, n in enumerate(torch.bincount(rows // PART).tolist()):
        here = slice(start, start + n)
        if n:
            images = Images(f"{args.dataset}-{part * PART:07d}", names[here])
            x[here] = kept_features(network, images, args, device)
        start += n
    return Gallery(x, identify_names(names), network.told, args.dataset)


if __name__ == "__main__":
    run_main(main)
