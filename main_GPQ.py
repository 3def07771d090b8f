"""GPQ: Generalized Product Quantization for semi-supervised image retrieval (CVPR 2020).

    python main_GPQ.py --gpu_id=0 --N_books=12 --labels_per_class=500

Labelled images find the quantized descriptors of their like; class prototypes classify them, and
build the codebooks; unlabelled images gather around prototypes by an entropy mini-max.
"""

from torch import Tensor, nn

from args import gpq_parser, parse_args
from data.datasets import DataSet, load_dataset
from data.views import labelled_and_unlabelled
from losses import classification_loss, n_pair_pq_loss, subspace_entropy_loss
from models import GPQ
from utils.cli import run_main
from utils.evaluation import RetrievalEvaluation
from utils.loop import Trainer
from utils.pretrained import start_model
from utils.report import report
from utils.setup import Run, start_run


def main(argv: list[str] | None = None) -> None:
    """Parse, load, train, evaluate."""
    run = start_run("GPQ", parse_args(gpq_parser(), argv))
    args = run.args

    data = load_dataset(args, run.device, semi=True)
    run = run.with_data(data.split, data.used, data.left_out)
    if "n_classes" not in args:  # else as the model to be evaluated has them
        run = run.with_flags(n_classes=len(data.classes))
    model = start_model(run)
    evaluate = None
    if data.query is not None:
        evaluate = RetrievalEvaluation(
            data.query, data.db, args.input_size, args.Top_N, [args.distance]
        )
    trainer = build_trainer(run, model, data, evaluate)
    metrics = trainer.evaluate() if args.eval_only else trainer.fit()
    report(run, trainer, metrics, data.classes, data.left_out)


def build_trainer(
    run: Run, model: GPQ, data: DataSet, evaluate: RetrievalEvaluation | None
) -> Trainer:
    """The method: three losses over labelled and unlabelled images.

    Args:
        run: flags, device, processes, and the checkpoint to go on from.
        model: on the device.
        data: labelled and unlabelled images.
        evaluate: what mAP is computed by; None without queries.
    """
    args, ranks = run.args, run.ranks
    batches = labelled_and_unlabelled(args, data.labelled, data.train, evaluate, model, ranks)
    if args.compile:
        model.trunk.compile(dynamic=False)
    M, beta = args.N_books, args.classification_scale

    def embed(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        labelled, labels, *others = batch
        x, z = model(labelled)
        if not others:  # --entropy_weight=0
            return x, z, labels
        unlabelled, reversal = others
        x_u, _ = model(unlabelled, reversal)  # batch norm sees one side at a time, as released
        return x, z, labels, x_u

    def loss_of(
        x: Tensor, z: Tensor, labels: Tensor, x_u: Tensor | None = None
    ) -> dict[str, Tensor]:
        prototypes = model.quantizer.unit_prototypes()
        classified = classification_loss(x, labels, prototypes, M, beta)
        terms = {
            "n_pair": args.n_pair_weight * n_pair_pq_loss(x, z, labels),
            "classification": args.classification_weight * classified,
        }
        if x_u is not None:
            entropy = subspace_entropy_loss(x_u, prototypes, M, beta)
            terms["entropy"] = args.entropy_weight * entropy
        return terms

    return Trainer(args, "GPQ", model, embed, loss_of, batches, evaluate, ranks, run.checkpoint)


if __name__ == "__main__":
    run_main(main)
