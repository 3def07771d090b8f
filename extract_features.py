"""Embed all images of a set by a gallery network: the first step of SSP.

python extract_features.py --gallery=results/gpq_48bits_width32 --output=gallery.safetensors
"""

import torch

from args import parse_extract_args
from data.datasets import load_all
from models import OwnGallery
from utils.cli import run_main
from utils.device import choose_device
from utils.distributed import Ranks
from utils.evaluation import as_batches
from utils.gallery import Gallery, identify_names, write_gallery
from utils.progress import progress
from utils.trained import load_trained


def main(argv: list[str] | None = None) -> None:
    """Parse, load, embed, write."""
    args = parse_extract_args(argv)
    device = choose_device(args, Ranks())
    trained = load_trained(args.gallery, "--gallery")
    network = OwnGallery(trained.model).to(device).eval()
    if "input_size" not in args.given:
        args.input_size = trained.input_size
    images, split = load_all(args)
    found = []
    with (
        torch.no_grad(),
        progress(len(images), 0, "embedding", "image") as bar,
    ):
        for batch in as_batches(images, args.input_size, device):
            found.append(network.describe(batch).cpu())
            bar.update(len(batch))
    features = torch.cat(found)
    told = f"{trained.method} {trained.args['arch']} {trained.identity[:16]}"
    gallery = Gallery(features, identify_names(split.listing.names), told, split.dataset)
    write_gallery(args.output, gallery)
    N, D = features.shape
    print(f"{args.output}: {N} images, {D} dimensions, by {told}")


if __name__ == "__main__":
    run_main(main)
