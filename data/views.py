"""What a training step is fed with: fresh random views, or kept features of views."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from data.augment import AUGMENTATIONS
from data.batches import CachedViewBatches, DeviceBatches, ViewBatches, batches_ahead
from data.datasets import Images, hold
from data.features import kept_features
from models import SPQ
from utils.distributed import Ranks
from utils.evaluation import RetrievalEvaluation


def random_views(
    args: Namespace, images: Images, ranks: Ranks, device: torch.device
) -> ViewBatches:
    """Two views of each image of a batch, new ones at each step."""
    batches = DeviceBatches(images, args.batch_size, args.seed, ranks, device)
    early_steps = round(args.early_share * args.epochs * len(batches))
    early, late = (
        augmentation(args, size, device) for size in (args.early_crop_size, args.crop_size)
    )

    def augments_at(step: int) -> Sequence[nn.Module]:  # one for each view
        return 2 * [early if step < early_steps else late]

    ahead = batches_ahead(device, 2 * args.batch_size, args.crop_size)
    return ViewBatches(batches, augments_at, args.seed, ahead)


def augmentation(args: Namespace, size: int, device: torch.device) -> nn.Module:
    """--augmentation, of crops of `size` pixels."""
    make = AUGMENTATIONS[args.augmentation]
    return make(size, args.crop_min_area, args.jitter_strength).to(device)


def kept_views(
    args: Namespace,
    images: Images,
    evaluate: RetrievalEvaluation | None,
    model: SPQ,
    ranks: Ranks,
) -> CachedViewBatches:
    """Two views of each image of a batch, out of the image itself and --cached_views random ones,
    which went through the frozen trunk once. Where there is an evaluation it gets the features of
    its images too.

    Raises:
        UserError: if the features cannot be kept on disk.
    """
    device = next(model.parameters()).device
    model.eval()
    augment = augmentation(args, args.crop_size, device)
    key = [args.cached_views, args.augmentation, args.crop_size, args.crop_min_area]
    key += [args.jitter_strength, args.seed]
    rows = kept_features(args, model.trunk, images, args.cached_views * [augment], key, "views")
    plain = partial(kept_features, args, model.trunk, augments=None, settings=[args.input_size])
    whole = plain(images, what="images")
    if evaluate is not None:
        # every process, so that those that do not evaluate wait here, and not for a sign of life
        found = [
            plain(side[0], what=what)
            for side, what in ((evaluate.query, "queries"), (evaluate.db, "database"))
        ]
        if ranks.is_main:
            evaluate.features = tuple(hold(part, None, torch.device("cpu")) for part in found)
    batches, wholes = (
        DeviceBatches(hold(part, None, device), args.batch_size, args.seed, ranks, device)
        for part in (rows, whole)
    )
    return CachedViewBatches(batches, args.seed, wholes)
