"""Features of a frozen trunk, computed once and kept on disk."""

import hashlib
import zlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from data.store import Faults, RowStore, fill_store
from utils.device import autocast
from utils.errors import UserError
from utils.evaluation import Rows, images_at_once, to_unit

CHUNK = 1024  # images whose features are computed between two marks


def identify_rows(images: Rows) -> str:
    """SHA-256 of the images, or of what stands for them on disk."""
    if isinstance(images, Tensor):
        digest = hashlib.sha256(f"{tuple(images.shape)}".encode())
        digest.update(memoryview(images.cpu().contiguous().view(-1).numpy()))
        return digest.hexdigest()
    return images.identity


def identify_trunk(trunk: nn.Module) -> str:
    """SHA-256 of a trunk's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(trunk.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(memoryview(value.cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


@torch.no_grad()
def trunk_features(
    trunk: nn.Module,
    images: Rows,
    size: int,
    augments: Sequence[Callable[[Tensor], Tensor]] | None,
    lower: Callable[[], AbstractContextManager],
    rows: slice = slice(None),
) -> Tensor:
    """Features (N, V, F) float16 of V views of each image, V = 1 without augmentation.

    Args:
        trunk: in evaluation mode.
        images: (N, 3, H, W) uint8.
        size: side that images are encoded at; views have the size that their augmentation makes.
        augments: one for each view; None: the images as they are.
        lower: context of the trunk's computation, of lower precision or not.
        rows: which of the images.
    """
    device = next(trunk.parameters()).device
    start, stop, _ = rows.indices(len(images))
    most = images_at_once(size)
    found = []
    for first in range(start, stop, most):
        part = images[first : min(stop, first + most)].to(device)
        views = []
        for augment in augments or [partial(to_unit, size=size)]:
            view = augment(part)
            with lower():
                views.append(trunk(view).half())
        found.append(torch.stack(views, dim=1).cpu())
    return torch.cat(found)


def kept_features(
    args: Namespace,
    trunk: nn.Module,
    images: Rows,
    augments: Sequence[nn.Module] | None,
    settings: Sequence,
    what: str,
) -> RowStore:
    """Features (V, F) float16 of each image, from --cache_dir or made now, which survives a kill.

    Args:
        args: arch, cache_dir, amp, input_size, seed.
        trunk: frozen, in evaluation mode.
        images: (N, 3, H, W) uint8.
        augments: what makes the V views; None: V = 1, the images as they are.
        settings: what else decides the features.
        what: they are of, for the progress bar.
    Raises:
        UserError: if they cannot be kept there.
    """
    known = (identify_trunk(trunk), identify_rows(images), args.amp, *settings)
    key = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    place = args.cache_dir / f"features-{args.arch}-{key}"
    device = next(trunk.parameters()).device
    lower = partial(autocast, args.amp, device)
    compute = partial(trunk_features, trunk, images, args.input_size, augments, lower)

    def make(start: int, stop: int) -> tuple[Tensor, Faults]:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(zlib.crc32(f"{args.seed} {start} kept".encode()))
            found = compute(rows=slice(start, stop))
        if not found.isfinite().all():
            raise UserError(
                f"--cached_views: features of {args.arch} are too large for float16; leave the "
                "flag away"
            )
        return found, []

    shape = (1 if augments is None else len(augments), trunk.feature_dim)
    label = f"features of {what}"
    return fill_store(place, len(images), shape, torch.float16, make, label, chunk=CHUNK)[0]
