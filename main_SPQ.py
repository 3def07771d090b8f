"""SPQ: Self-supervised Product Quantization for deep unsupervised image retrieval (ICCV 2021).

    python main_SPQ.py --gpu_id=0 --batch_size=256 --N_books=8 --N_words=16 --eval_epoch=100

Random views of each image; descriptors x of one view are compared with soft-quantized descriptors
z of another, so backbone and codebooks learn together and without labels. In the second stage
(--neighbour_share) an image and one of its nearest neighbours also learn to use the same codewords.
"""

from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from args import parse_args, spq_parser
from data.datasets import Images, load_dataset
from data.views import kept_views, random_views
from losses import contrastive_loss, cqc_loss, neighbour_consistency_loss
from models import SPQ
from utils.cli import run_main
from utils.evaluation import RetrievalEvaluation, headline_first
from utils.loop import Trainer
from utils.pretrained import start_model
from utils.report import report
from utils.setup import Run, start_run

LOSSES = {
    "cqc": partial(cqc_loss, variant="released"),
    "cqc-paper": partial(cqc_loss, variant="paper"),
    "contrastive": contrastive_loss,  # ablation SPQ-C
}


def main(argv: list[str] | None = None) -> None:
    """Parse, load, train, evaluate."""
    run = start_run("SPQ", parse_args(spq_parser(), argv))
    args = run.args

    model = start_model(run)
    data = load_dataset(args, run.device)
    run = run.with_data(data.split, data.used, data.left_out)
    evaluate = None
    if data.query is not None:  # labels are scored with, never trained on
        sides, distances = (data.query, data.db), headline_first(args.distance)
        evaluate = RetrievalEvaluation(
            *sides, args.input_size, args.Top_N, distances, diagnose=args.validate
        )
    trainer = build_trainer(run, model, data.train, evaluate)
    metrics = trainer.evaluate() if args.eval_only else trainer.fit()
    report(run, trainer, metrics, data.classes, data.left_out)


def build_trainer(
    run: Run, model: SPQ, images: Images, evaluate: RetrievalEvaluation | None
) -> Trainer:
    """The method: random views, one network, descriptors of one view against z of another.

    Args:
        run: flags, device, processes, and the checkpoint to go on from.
        model: on the device.
        images: training set (N, 3, H, W) uint8.
        evaluate: what mAP is computed by; None without labels.
    """
    args, ranks = run.args, run.ranks
    if args.cached_views and not args.eval_only:
        batches = kept_views(args, images, evaluate, model, ranks)
    else:
        batches = random_views(args, images, model, ranks)
    if args.compile:
        model.trunk.compile(dynamic=False)
    criterion, V = LOSSES[args.loss], args.views

    def embed(network: nn.Module, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """x and z of V views of each image; in the second stage, which has a view of a neighbour
        too, also the soft assignments of all views."""
        if args.joint_views:  # batch norm over all views: one pass of a larger batch
            x, z = (rows.chunk(len(views)) for rows in network(torch.cat(views)))
        else:
            x, z = zip(*map(network, views), strict=True)
        if len(views) == V:
            return *x, *z
        return *x[:V], *z[:V], *(model.quantizer.assign(rows, model.alpha) for rows in x)

    def loss_of(*rows: Tensor) -> Tensor | dict[str, Tensor]:
        x, z, assign = rows[:V], rows[V : 2 * V], rows[2 * V :]
        pairs = [
            criterion(x[a], x[b], z[a], z[b], tau=args.contrastive_temperature)
            for a, b in combinations(range(V), 2)
        ]
        cqc = sum(pairs) / len(pairs)
        if not assign:
            return cqc
        *own, neighbour = assign
        terms = [neighbour_consistency_loss(p, neighbour, args.neighbour_entropy) for p in own]
        return {"cqc": args.neighbour_cqc * cqc, "neighbour": sum(terms) / V}

    start = batches.neighbours and batches.neighbours.start
    return Trainer(
        args, "SPQ", model, embed, loss_of, batches, evaluate, ranks, run.checkpoint, start
    )


if __name__ == "__main__":
    run_main(main)
