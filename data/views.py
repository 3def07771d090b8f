"""What a training step is fed with: fresh random views, kept features of views, or views of images
with and without labels."""

from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from data.augment import AUGMENTATIONS, CROP_FLIP, CROP_JITTER, CropFlip, CropJitter
from data.batches import (
    CachedViewBatches,
    DeviceBatches,
    NeighbourRows,
    SemiSupervisedBatches,
    ViewBatches,
    batches_ahead,
)
from data.datasets import Images, hold
from data.features import kept_features
from data.taught import TaughtBatches, TupleBatches, Tuples, able_queries, mine_tuples
from models import AsymmetricNetwork, QuantizationNetwork
from models.vgg import MEAN
from utils.device import autocast
from utils.distributed import Ranks
from utils.errors import UserError
from utils.evaluation import RetrievalEvaluation, describe_images, evaluating
from utils.neighbours import nearest_by_cosine

SECOND_STAGE_AREA = 0.2  # smallest crop in the second stage, as a share of the image


def random_views(
    args: Namespace, images: Images, model: QuantizationNetwork, ranks: Ranks
) -> ViewBatches:
    """--views random views of each image of a batch, new ones at each step; in the second stage
    (--neighbour_share) also one of a mined neighbour."""
    device = next(model.parameters()).device
    batches = DeviceBatches(images, args.batch_size, args.seed, ranks, device)
    augment_at = augmentation_at(args, len(batches), device)
    views = args.views + bool(args.neighbour_share)
    ahead = batches_ahead(device, views * args.batch_size, args.crop_size)
    start = second_stage(args, len(batches), ahead)
    later = augmentation(args, args.crop_size, device, SECOND_STAGE_AREA)

    def augments_at(step: int) -> Sequence[nn.Module]:  # one for each view
        if start is not None and step >= start:
            return views * [later]
        return args.views * [augment_at(step)]

    neighbours = mined_neighbours(args, batches, start, model)
    return ViewBatches(batches, augments_at, args.seed, ahead, neighbours)


def second_stage(args: Namespace, epoch_steps: int, ahead: int = 1) -> int | None:
    """The step at which the second stage begins; None without one.

    Args:
        args: epochs, neighbour_share.
        epoch_steps: batches in an epoch.
        ahead: batches that are augmented together, at the first of which it begins.
    """
    if not args.neighbour_share:
        return None
    return round((1 - args.neighbour_share) * args.epochs * epoch_steps) // ahead * ahead


def mined_neighbours(
    args: Namespace, batches: DeviceBatches, start: int | None, model: QuantizationNetwork
) -> NeighbourRows | None:
    """Batches of neighbours, the --neighbours nearest by the cosine of the model's descriptors as
    they are at `start`; None without a second stage."""
    if start is None:
        return None
    k = min(args.neighbours, len(batches.rows) - 1)

    def mine() -> Tensor:
        lower, eager = autocast(args.amp, batches.device), torch.compiler.set_stance("force_eager")
        with evaluating(model), lower, eager:  # compiled for the shapes of training alone
            x = describe_images(model, batches.rows, args.input_size)
        return nearest_by_cosine(x, x, k, exclude_self=True)[0]

    return NeighbourRows(batches, start, mine)


def labelled_and_unlabelled(
    args: Namespace,
    labelled: tuple[Images, Tensor],
    unlabelled: Images,
    evaluate: RetrievalEvaluation | None,
    model: QuantizationNetwork,
    ranks: Ranks,
) -> SemiSupervisedBatches:
    """A view of each image of a labelled batch, its labels, and an unlabelled batch's views; new
    ones at each step, or with --cached_views kept ones, as `kept_views` has them.

    Of fewer images than --batch_size all are in every batch. With --entropy_weight=0 unlabelled
    ones are left out.

    Raises:
        UserError: if there are too few images, they cannot be shared out evenly, or features cannot
            be kept on disk.
    """
    device = next(model.parameters()).device
    images, labels = labelled
    parts = ranks.world_size * args.accumulate
    # an epoch is a pass over the labelled images
    epoch_steps = len(images) // max(1, min(args.batch_size, len(images)))
    augment_at = augmentation_at(args, epoch_steps, device)
    # one number for both sides, so that their crops grow at the same step
    ahead = batches_ahead(device, args.batch_size, args.crop_size)
    sides = []
    # a seed of its own for each side
    asked = [(images, args.seed, "labelled images")]
    if args.entropy_weight:
        asked.append((unlabelled, args.seed + 2**31, "unlabelled images"))
    for rows, seed, what in asked:
        size = min(args.batch_size, len(rows))
        if size < 2 * parts or size % parts:
            raise UserError(
                f"--batch_size={args.batch_size}: {size} {what} in a batch cannot be shared out "
                f"evenly over --accumulate={args.accumulate} times {ranks.world_size} processes, "
                "at least 2 to each; take fewer of these, or another --batch_size"
            )
        if args.cached_views and not args.eval_only:
            sides.append(_kept(args, rows, model, ranks, size, seed, what, views=1))
        else:
            batches = DeviceBatches(rows, size, seed, ranks, device)
            sides.append(ViewBatches(batches, lambda step: [augment_at(step)], seed, ahead))
    if args.cached_views and evaluate is not None and not args.eval_only:
        _keep_evaluation(args, evaluate, model, ranks)
    ramp = round(args.reversal_warmup_epochs * len(sides[0]))

    def reversal_at(step: int) -> float:
        return args.reversal_weight * min(1.0, (step + 1) / max(1, ramp))

    sides = [*sides, None][:2]
    return SemiSupervisedBatches(sides[0], labels.to(device), sides[1], reversal_at)


def taught_batches(
    args: Namespace,
    images: Images,
    gallery: Tensor,
    labels: Tensor | None,
    model: AsymmetricNetwork,
    ranks: Ranks,
    pairs: Tensor | None = None,
) -> TaughtBatches | TupleBatches:
    """What --method trains a query network with: views of images and the gallery's features of
    them, with labels if it has them; or for aml tuples, mined anew each epoch, from `pairs` (P, 2)
    of query and positive where the set names such.

    Raises:
        UserError: if there are too few images or classes.
    """
    device = next(model.parameters()).device
    if isinstance(images, Tensor):  # of millions of images, features are as large as the memory
        gallery = gallery.to(device)
    if args.method != "aml" or args.eval_only:
        size = args.batch_size
        if args.eval_only:  # which draws none of them
            size = ranks.world_size * max(1, min(size, len(images)) // ranks.world_size)
        batches = DeviceBatches(images, size, args.seed, ranks, device)
        augment_at = augmentation_at(args, len(batches), device)
        ahead = batches_ahead(device, args.batch_size, args.crop_size)
        views = ViewBatches(batches, lambda step: [augment_at(step)], args.seed, ahead)
        labels = None if labels is None else labels.to(device)
        return TaughtBatches(views, gallery, labels)

    def describe(rows: Tensor) -> Tensor:
        home = images.device if isinstance(images, Tensor) else "cpu"
        lower, eager = autocast(args.amp, device), torch.compiler.set_stance("force_eager")
        with evaluating(model), lower, eager:  # compiled for the shapes of training alone
            return describe_images(model, images[rows.to(home)], args.input_size)

    def mine(epoch: int) -> Tuples:
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + epoch) % 2**32)
        sizes = (args.tuples, args.pool, args.negatives)
        return mine_tuples(describe, gallery, labels, *sizes, generator, pairs)

    able = able_queries(labels) if pairs is None else len(pairs)
    tuples = min(args.tuples, able)
    epoch_steps = max(1, tuples // args.batch_size)  # of fewer tuples all are in every batch
    return TupleBatches(
        images,
        gallery,
        mine,
        tuples,
        args.negatives,
        args.batch_size,
        augmentation_at(args, epoch_steps, device),
        args.seed,
        ranks,
        device,
    )


def augmentation(
    args: Namespace, size: int, device: torch.device, least_area: float = 0.0
) -> nn.Module:
    """--augmentation, of crops of `size` pixels and at least --crop_min_area and `least_area`."""
    if args.augmentation == CROP_FLIP:
        return CropFlip(size, [value / 255 for value in MEAN]).to(device)
    make = CropJitter if args.augmentation == CROP_JITTER else AUGMENTATIONS[args.augmentation]
    return make(size, max(args.crop_min_area, least_area), args.jitter_strength).to(device)


def augmentation_at(
    args: Namespace, epoch_steps: int, device: torch.device
) -> Callable[[int], nn.Module]:
    """The augmentation at a step: crops of --early_crop_size in the first --early_share."""
    early_steps = round(args.early_share * args.epochs * epoch_steps)
    early, late = (
        augmentation(args, size, device) for size in (args.early_crop_size, args.crop_size)
    )
    return lambda step: early if step < early_steps else late


def kept_views(
    args: Namespace,
    images: Images,
    evaluate: RetrievalEvaluation | None,
    model: QuantizationNetwork,
    ranks: Ranks,
) -> CachedViewBatches:
    """--views different views of each image of a batch, out of the image itself and --cached_views
    random ones, which go through the frozen trunk once; in the second stage also a neighbour. An
    evaluation gets the features of its images too.

    Raises:
        UserError: if the features cannot be kept on disk.
    """
    size, views = args.batch_size, args.views
    batches = _kept(args, images, model, ranks, size, args.seed, "images", views)
    start = second_stage(args, len(batches))
    batches.neighbours = mined_neighbours(args, batches.whole, start, model)
    if evaluate is not None:
        _keep_evaluation(args, evaluate, model, ranks)
    return batches


def _kept(
    args: Namespace,
    images: Images,
    model: QuantizationNetwork,
    ranks: Ranks,
    batch_size: int,
    seed: int,
    what: str,
    views: int,
) -> CachedViewBatches:
    """Batches of features of the images themselves and of --cached_views views of each."""
    augment = augmentation(args, args.crop_size, next(model.parameters()).device)
    # what decides the views
    if args.augmentation == CROP_FLIP:
        key = [args.cached_views, "crop and flip", args.input_size, args.seed]
    else:
        key = [args.cached_views, args.augmentation, args.crop_size, args.crop_min_area]
        key += [args.jitter_strength, args.seed]
    model.eval()
    augments = args.cached_views * [augment]
    rows = kept_features(args, model.trunk, images, augments, key, f"views of {what}")
    whole = kept_features(args, model.trunk, images, None, [args.input_size], what)
    device = next(model.parameters()).device
    batches, wholes = (
        DeviceBatches(hold(part, None, device), batch_size, seed, ranks, device)
        for part in (rows, whole)
    )
    return CachedViewBatches(batches, seed, wholes, views)


def _keep_evaluation(
    args: Namespace, evaluate: RetrievalEvaluation, model: QuantizationNetwork, ranks: Ranks
) -> None:
    """Give an evaluation the features of its images."""
    # every process, so that those that do not evaluate wait here, and not for a sign of life
    found = [
        kept_features(args, model.trunk, side[0], None, [args.input_size], what)
        for side, what in ((evaluate.query, "queries"), (evaluate.db, "database"))
    ]
    if ranks.is_main:
        evaluate.features = tuple(hold(part, None, torch.device("cpu")) for part in found)
