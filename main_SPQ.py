"""SPQ: Self-supervised Product Quantization for deep unsupervised image retrieval (ICCV 2021).

    python main_SPQ.py --gpu_id=0 --batch_size=256 --N_books=8 --N_words=16 --eval_epoch=100

Two random views of each image; descriptors x of one view are compared with soft-quantized
descriptors z of the other, so trunk and codebooks learn together and without labels.
"""

from functools import partial

import torch
from torch import Tensor, nn

from args import parse_args, spq_parser
from data.datasets import Images, load_dataset
from data.views import kept_views, random_views
from losses import contrastive_loss, cqc_loss
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
        distances = headline_first(args.distance)
        evaluate = RetrievalEvaluation(data.query, data.db, args.input_size, args.Top_N, distances)
    trainer = build_trainer(run, model, data.train, evaluate)
    metrics = trainer.evaluate() if args.eval_only else trainer.fit()
    report(run, trainer, metrics, data.classes, data.left_out)


def build_trainer(
    run: Run, model: SPQ, images: Images, evaluate: RetrievalEvaluation | None
) -> Trainer:
    """The method: two random views, one network, descriptors of one against z of the other.

    Args:
        run: flags, device, processes, and the checkpoint to go on from.
        model: on the device.
        images: training set (N, 3, H, W) uint8.
        evaluate: what mAP is computed by; None without labels.
    """
    args, ranks, device = run.args, run.ranks, run.device

    if args.cached_views and not args.eval_only:
        batches = kept_views(args, images, evaluate, model, ranks)
    else:
        batches = random_views(args, images, ranks, device)
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

    return Trainer(args, "SPQ", model, embed, loss_of, batches, evaluate, ranks, run.checkpoint)


if __name__ == "__main__":
    run_main(main)
