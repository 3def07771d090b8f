"""Embeddings of landmark images at their own aspect, kept on disk piece by piece."""

import hashlib
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.landmark_images import read_landmarks
from utils.device import autocast, out_of_memory
from utils.embedders import Network
from utils.errors import UserError
from utils.evaluation import to_unit
from utils.gallery import Gallery, identify_names, read_gallery, write_gallery
from utils.multiscale import multiscale_features
from utils.progress import progress

PIECE = 500  # images whose features are kept together


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


def _embed_one(network: Network, image: Tensor, scales: Sequence[float]) -> Tensor:
    """The embedding (D,) of an image (3, H, W) uint8."""
    if network.squeezed is not None:
        return network.model.describe(to_unit(image[None], network.squeezed))[0]
    return multiscale_features(network.model, image.float() / 255, scales)


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
    names = images.paths[piece]
    boxes = None if images.boxes is None else images.boxes[piece]
    # each image has a size of its own: one after the other
    pixels = read_landmarks(
        args.data_dir, names, args.longest, boxes, args.max_pixels, args.num_workers
    )
    found = []
    for name, image in zip(names, pixels, strict=True):
        image = image.to(device)  # (3, H, W) uint8
        try:
            with autocast(args.amp, device):
                x = _embed_one(network, image, args.scales)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            detail = " ".join(str(error).split())[:200]
            raise UserError(
                f"{network.told}: does not take {name} at {image.shape[2]} x {image.shape[1]} "
                f"pixels and --scales ({detail}); take another network"
            ) from error
        x = x.float().cpu()
        if not x.isfinite().all():
            hint = "; try --amp=off" if args.amp != "off" else ""
            raise UserError(
                f"--amp={args.amp}: {network.told} gives {name} an embedding that is not "
                f"finite{hint}"
            )
        found.append(x)
        done(1)
    return torch.stack(found)
