"""Anchors in the space of a gallery network: the second step of SSP.

python make_anchors.py --features=gallery.safetensors --M=32 --bits=8 --output=anchors.safetensors
python make_anchors.py --codebooks_of=results/gpq_48bits_width32 --output=anchors.safetensors
"""

import torch.nn.functional as F

from args import parse_anchors_args
from utils.cli import run_main
from utils.gallery import read_gallery, train_anchors, write_anchors
from utils.trained import load_trained


def main(argv: list[str] | None = None) -> None:
    """Parse, make, write."""
    args = parse_anchors_args(argv)
    if args.codebooks_of is not None:
        trained = load_trained(args.codebooks_of, "--codebooks_of")
        anchors = F.normalize(trained.model.quantizer.codebooks.detach().float(), dim=-1)
        made_of = f"the codebooks of {trained.method} {trained.identity[:16]}"
    else:
        gallery = read_gallery(args.features)
        anchors = train_anchors(
            gallery.features,
            args.M,
            args.bits,
            args.iterations,
            args.restarts,
            args.max_points,
            args.seed,
        )
        made_of = f"{len(gallery.features)} features by {gallery.network}"
    write_anchors(args.output, anchors, made_of)
    M, K, d = anchors.shape
    print(f"{args.output}: {M} x {K} anchors of {d} dimensions, {made_of}")


if __name__ == "__main__":
    run_main(main)
