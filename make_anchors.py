"""Anchors in the space of a gallery network: the second step of SSP.

python make_anchors.py --features=gallery.safetensors --M=32 --bits=8 --output=anchors.safetensors
python make_anchors.py --codebooks_of=results/gpq_48bits_width32 --output=anchors.safetensors
"""

import torch.nn.functional as F

from args import parse_anchors_args
from utils.cli import run_main
from utils.gallery import check_writable, read_gallery, train_anchors, write_anchors
from utils.trained import load_trained


def main(argv: list[str] | None = None) -> None:
    """Parse, make, write."""
    args = parse_anchors_args(argv)
    check_writable(args.output)
    if args.codebooks_of is not None:
        trained = load_trained(args.codebooks_of, "--codebooks_of")
        anchors = F.normalize(trained.model.quantizer.codebooks.detach().float(), dim=-1)
        network = f"{trained.method} {trained.args['arch']} {trained.identity[:16]}"
        made_of = f"the codebooks of {network}"
    else:
        gallery = read_gallery(args.features, rows="known")
        known = ~gallery.features.isnan().any(dim=1)
        features = gallery.features if known.all() else gallery.features[known]
        anchors = train_anchors(
            features,
            args.M,
            args.bits,
            args.iterations,
            args.restarts,
            args.max_points,
            args.seed,
        )
        network = gallery.network if gallery.tells_network else None
        made_of = f"{len(features)} features by {gallery.network}"
        if not known.all():
            missing = int((~known).sum())
            print(f"{missing} images could not be read and have no features; made of the others")
    write_anchors(args.output, anchors, made_of, network)
    M, K, d = anchors.shape
    print(f"{args.output}: {M} x {K} anchors of {d} dimensions, {made_of}")


if __name__ == "__main__":
    run_main(main)
