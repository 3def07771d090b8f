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
from utils.device import AMP_DTYPES
from utils.evaluation import Rows, as_batches

BATCH = 256  # images in one pass through the trunk
CHUNK = 1024  # images whose features are computed between two marks


def identify_rows(images: Rows) -> str:
    """SHA-256 of the images, or of what stands for them on disk."""
    if isinstance(images, Tensor):
        content = images.cpu().contiguous().view(-1).numpy()
        return hashlib.sha256(memoryview(content)).hexdigest()
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
    images: Tensor,
    size: int,
    augments: list[Callable[[Tensor], Tensor]] | None,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """Features (N, V, F) float16 of V views of each image, V = 1 without augmentation.

    Args:
        trunk: in evaluation mode.
        images: (N, 3, H, W) uint8.
        size: side that images are encoded at; views have the size that their augmentation makes.
        augments: one for each view; None: the images as they are.
        autocast: context of the computation.
    """
    device = next(trunk.parameters()).device
    found = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH].to(device)
        views = [next(as_batches(part, size, device))] if augments is None else None
        views = views or [augment(part) for augment in augments]
        with autocast():
            found.append(torch.stack([trunk(view).half() for view in views], dim=1).cpu())
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
    dtype = AMP_DTYPES[args.amp]
    device = next(trunk.parameters()).device

    def autocast() -> AbstractContextManager:
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

    compute = partial(
        trunk_features, trunk, size=args.input_size, augments=augments, autocast=autocast
    )

    def make(start: int, stop: int) -> tuple[Tensor, Faults]:
        torch.manual_seed(zlib.crc32(f"{args.seed} {start} kept".encode()))
        return compute(images[start:stop]), []

    shape = (1 if augments is None else len(augments), trunk.feature_dim)
    label = f"features of {what}"
    return fill_store(place, len(images), shape, torch.float16, make, label, chunk=CHUNK)[0]
