"""What a training step is fed with: fresh random views, kept features of views, or views of images
with and without labels."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from data.augment import AUGMENTATIONS, CropFlip
from data.batches import (
    CachedViewBatches,
    DeviceBatches,
    SemiSupervisedBatches,
    ViewBatches,
    batches_ahead,
)
from data.datasets import Images, hold
from data.features import kept_features
from models import QuantizationNetwork
from models.vgg import MEAN
from utils.distributed import Ranks
from utils.errors import UserError
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


def labelled_and_unlabelled(
    args: Namespace,
    labelled: tuple[Images, Tensor],
    unlabelled: Images,
    ranks: Ranks,
    device: torch.device,
) -> SemiSupervisedBatches:
    """A view of each image of a labelled batch, its labels, and an unlabelled batch's views.

    Of fewer labelled images than --batch_size all are in every batch, as far as they can be shared
    out evenly.
    """
    images, labels = labelled
    parts = ranks.world_size * args.accumulate
    sizes = [min(args.batch_size, len(rows) // parts * parts) for rows in (images, unlabelled)]
    # a seed of its own for each side
    seeds = (args.seed, args.seed + 2**31)
    augment = CropFlip(args.input_size, [value / 255 for value in MEAN]).to(device)
    sides = []
    for rows, size, seed in zip((images, unlabelled), sizes, seeds, strict=True):
        if size < 2 * parts:
            raise UserError(
                f"--accumulate={args.accumulate}: {len(rows)} images cannot be shared out over "
                f"{parts} parts of at least 2"
            )
        batches = DeviceBatches(rows, size, seed, ranks, device)
        ahead = batches_ahead(device, size, args.input_size)
        sides.append(ViewBatches(batches, lambda step: [augment], seed, ahead))
    ramp = round(args.reversal_warmup_epochs * len(sides[0]))

    def reversal_at(step: int) -> float:
        return args.reversal_weight * min(1.0, (step + 1) / max(1, ramp))

    return SemiSupervisedBatches(sides[0], labels.to(device), sides[1], reversal_at)


def augmentation(args: Namespace, size: int, device: torch.device) -> nn.Module:
    """--augmentation, of crops of `size` pixels."""
    make = AUGMENTATIONS[args.augmentation]
    return make(size, args.crop_min_area, args.jitter_strength).to(device)


def kept_views(
    args: Namespace,
    images: Images,
    evaluate: RetrievalEvaluation | None,
    model: QuantizationNetwork,
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
