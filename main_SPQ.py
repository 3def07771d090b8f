"""SPQ: Self-supervised Product Quantization for deep unsupervised image retrieval (ICCV 2021).

    python main_SPQ.py --gpu_id=0 --batch_size=256 --N_books=8 --N_words=16 --eval_epoch=100

Two random views of each image; descriptors x of one view are compared with soft-quantized
descriptors z of the other, so trunk and codebooks learn together and without labels.
"""

from argparse import Namespace
from functools import partial

import torch
from torch import Tensor, nn

from args import parse_args, spq_parser
from data.augment import AUGMENTATIONS
from data.batches import DeviceBatches, ViewBatches, batches_ahead
from data.cifar10 import CLASSES, hold_out, load_cifar10
from data.folder import load_folder
from losses import contrastive_loss, cqc_loss
from models import build_spq
from utils.cli import run_main
from utils.distributed import Ranks
from utils.evaluation import RetrievalEvaluation
from utils.loop import Trainer
from utils.report import report
from utils.setup import start_run

LOSSES = {
    "cqc": partial(cqc_loss, variant="released"),
    "cqc-paper": partial(cqc_loss, variant="paper"),
    "contrastive": contrastive_loss,  # ablation SPQ-C
}


def main(argv: list[str] | None = None) -> None:
    """Parse, load, train, evaluate."""
    run = start_run("SPQ", parse_args(spq_parser(), argv))
    args = run.args

    evaluate = None
    if args.dataset == "folder":  # no labels: nothing to evaluate with
        images = load_folder(args.data_dir, args.input_size)
    else:  # CIFAR-10's protocol: the training images are the database, the test images the queries
        train, test = load_cifar10(args.data_dir, download=args.if_download)
        run.check_labels(train.labels, test.labels)
        if args.validate:  # settings are chosen without a look at the test images
            train, test = hold_out(train)
        images = train.images
        db = (train.images[: args.limit_db], train.labels[: args.limit_db])
        query = (test.images[: args.limit_query], test.labels[: args.limit_query])
        evaluate = RetrievalEvaluation(query, db, args.input_size, args.Top_N, args.distance)

    images = images[: args.limit_train].to(run.device)
    trainer = build_trainer(args, images, evaluate, run.ranks, run.checkpoint)
    metrics = trainer.evaluate() if args.eval_only else trainer.fit()
    report(run, trainer, metrics, CLASSES)


def build_trainer(
    args: Namespace,
    images: Tensor,
    evaluate: RetrievalEvaluation | None,
    ranks: Ranks,
    checkpoint: dict | None = None,
) -> Trainer:
    """The method: two random views, one network, descriptors of one against z of the other.

    Args:
        args: flags, with `amp` resolved.
        images: training set (N, 3, H, W) uint8, on the device.
        evaluate: what mAP is computed by; None without labels.
        ranks: this process among the others.
        checkpoint: state to go on from.
    """
    device = images.device
    batches = DeviceBatches(images, args.batch_size, args.seed, ranks)
    early_steps = round(args.early_share * args.epochs * len(batches))

    early, late = (
        AUGMENTATIONS[args.augmentation](size, args.crop_min_area, args.jitter_strength).to(device)
        for size in (args.early_crop_size, args.crop_size)
    )

    def augments_at(step: int) -> list[nn.Module]:  # one for each view
        return 2 * [early if step < early_steps else late]

    ahead = batches_ahead(device, 2 * args.batch_size, args.crop_size)
    batches = ViewBatches(batches, augments_at, args.seed, ahead)

    # channels_last is the faster layout, but on a CPU not for odd numbers of channels
    layout = torch.channels_last if args.width % 8 == 0 else torch.contiguous_format
    model = build_spq(
        args.arch,
        args.width,
        args.quantizer,
        M=args.N_books,
        K=args.N_words,
        d=args.L_word,
        alpha=args.soft_quantization_scale,
    ).to(device, memory_format=layout)
    if args.compile:
        model.trunk.compile(dynamic=False)
    criterion = LOSSES[args.loss]

    def embed(model: nn.Module, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if args.joint_views:  # batch norm over both views: one pass of twice the size
            x, z = model(torch.cat(views))
            return *x.chunk(2), *z.chunk(2)
        (x_a, z_a), (x_b, z_b) = (model(view) for view in views)
        return x_a, x_b, z_a, z_b

    def loss_of(x_a: Tensor, x_b: Tensor, z_a: Tensor, z_b: Tensor) -> Tensor:
        return criterion(x_a, x_b, z_a, z_b, tau=args.contrastive_temperature)

    return Trainer(args, "SPQ", model, embed, loss_of, batches, evaluate, ranks, checkpoint)


if __name__ == "__main__":
    run_main(main)
