"""SSP: Structure Similarity Preservation for asymmetric image retrieval (TMM 2024).

    python extract_features.py --gallery=results/gpq_48bits_width32 --output=gallery.safetensors
    python make_anchors.py --features=gallery.safetensors --output=anchors.safetensors
    python main_SSP.py --features=gallery.safetensors --anchors=anchors.safetensors --arch=cifar_vgg

A large network embedded the gallery once; a light one learns to answer queries in the same space:
its embedding must be as similar to anchors in that space as the gallery's feature is.
"""

from functools import partial

from torch import Tensor, nn

from args import parse_args, ssp_parser
from data.datasets import DataSet, load_dataset
from data.views import taught_batches
from losses import (
    hvs_loss,
    lce_loss,
    regression_loss,
    structure_similarity_loss,
    tuple_contrastive_loss,
)
from models import AsymmetricNetwork
from utils.asymmetric import AsymmetricEvaluation
from utils.cli import run_main
from utils.errors import UserError
from utils.gallery import class_means, read_anchors, read_gallery
from utils.loop import Trainer
from utils.pretrained import start_model
from utils.report import report
from utils.setup import Run, start_run

CLASSIFIES = ("hvs", "lce")  # methods that learn a classifier beside the embedding


def main(argv: list[str] | None = None) -> None:
    """Parse, load, train, evaluate."""
    run = start_run("SSP", parse_args(ssp_parser(), argv))
    args = run.args

    data = load_dataset(args, run.device)
    run = run.with_data(data.split, data.used, data.left_out)
    gallery = read_gallery(args.features, data.split.listing.names, data.split.dataset)
    check_gallery(run, gallery.network)
    features = {role: gallery.features[rows] for role, rows in data.rows.items()}
    labels = training_labels(args.method, data)
    classes = len(data.classes) if args.method in CLASSIFIES else 0
    D = gallery.features.shape[1]
    run = run.with_flags(embedding_dim=D, n_classes=classes, gallery=gallery.network)
    model = start_model(run)
    evaluate = None
    if data.query is not None:
        known = features["query"], features["database"]
        evaluate = AsymmetricEvaluation(data.query, data.db, known, args.input_size, args.Top_N)
    trainer = build_trainer(run, model, data, features["train"], labels, evaluate)
    metrics = trainer.evaluate() if args.eval_only else trainer.fit()
    report(run, trainer, metrics, data.classes, data.left_out)


def check_gallery(run: Run, network: str) -> None:
    """A training goes on with the gallery that it began with.

    Raises:
        UserError: if it was another network's.
    """
    saved = run.checkpoint["args"].get("gallery", network) if run.checkpoint else network
    if saved != network and not run.args.eval_only:
        raise UserError(
            f"--features={run.args.features}: are by {network}, and the run that "
            f"--resume={run.args.resume} goes on with learns those by {saved}; give it these, or "
            "begin another run"
        )


def training_labels(method: str, data: DataSet) -> Tensor | None:
    """Labels of the training images for the methods that need them.

    Raises:
        UserError: if there are none, or an image has several.
    """
    if method not in (*CLASSIFIES, "aml"):
        return None
    labels = data.split.listing.labels
    if len(data.classes) < 2 or labels.dim() > 1:
        raise UserError(
            f"--method={method}: needs one label for each image; allowed without are ssp and "
            "regression"
        )
    return labels[data.rows["train"]]


def build_trainer(
    run: Run,
    model: AsymmetricNetwork,
    data: DataSet,
    features: Tensor,
    labels: Tensor | None,
    evaluate: AsymmetricEvaluation | None,
) -> Trainer:
    """The methods: one network, and what its embeddings are held against.

    Args:
        run: flags, device, processes, and the checkpoint to go on from.
        model: on the device.
        data: images to train on.
        features: the gallery's, of these images, (N, D) of unit length.
        labels: of these images, (N,); None where the method needs none.
        evaluate: what mAP is computed by; None without labels.
    """
    args, ranks, device = run.args, run.ranks, run.device
    batches = taught_batches(args, data.train, features, labels, model, ranks)
    if args.compile:
        model.trunk.compile(dynamic=False)

    def embed(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        views, *held_against = batch
        return model(views), *held_against

    def embed_tuples(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        views, gallery = batch  # (B, 2 + R, 3, S, S), (B, 2 + R, D)
        return model(views.flatten(0, 1)).unflatten(0, views.shape[:2]), gallery

    def ssp(anchors: Tensor, x: Tensor, gallery: Tensor) -> Tensor:
        return structure_similarity_loss(x, gallery, anchors, args.similarity_scale)

    def aml(x: Tensor, gallery: Tensor) -> dict[str, Tensor]:
        query, positive, negatives = x[:, 0], gallery[:, 1], gallery[:, 2:]
        return {
            "contrastive": tuple_contrastive_loss(
                query, positive, negatives, args.contrastive_margin
            ),
            "regression": regression_loss(x.flatten(0, 1), gallery.flatten(0, 1)),
        }

    margins = {"new_margin": args.new_margin, "old_margin": args.old_margin}

    def hvs(old: Tensor, x: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
        new = model.classifier.weight
        return hvs_loss(x, labels, new, old, args.classification_scale, **margins)

    def lce(old: Tensor, x: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
        new = model.classifier.weight
        to_old = model.transform
        return lce_loss(
            x, to_old(x), labels, new, to_old(new), old, args.classification_scale, **margins
        )

    losses = {"regression": regression_loss, "aml": aml, "hvs": hvs, "lce": lce, "ssp": ssp}
    loss_of = losses[args.method]
    if args.method == "ssp" and args.anchors is not None:
        loss_of = partial(ssp, read_anchors(args.anchors, features.shape[1]).to(device))
    if args.method in CLASSIFIES:
        loss_of = partial(loss_of, class_means(features, labels, len(data.classes)).to(device))
    shape = embed_tuples if args.method == "aml" else embed
    return Trainer(args, "SSP", model, shape, loss_of, batches, evaluate, ranks, run.checkpoint)


if __name__ == "__main__":
    run_main(main)
