"""SSP: Structure Similarity Preservation for asymmetric image retrieval (TMM 2024).

    python extract_features.py --gallery=results/gpq_48bits_width32 --output=gallery.safetensors
    python make_anchors.py --features=gallery.safetensors --output=anchors.safetensors
    python main_SSP.py --features=gallery.safetensors --anchors=anchors.safetensors --arch=cifar_vgg

Landmarks, --dataset=sfm120k or gldv2, are decoded from their files for each batch;
scripts/ssp_sfm.sh and its like have the commands.

A large network embedded the gallery once; a light one learns to answer queries in the same space:
its embedding must be as similar to anchors in that space as the gallery's feature is.
"""

from argparse import Namespace
from dataclasses import replace
from functools import partial
from shlex import quote

import torch
from torch import Tensor, nn

from args import parse_args, ssp_parser
from data.datasets import DataSet, load_dataset
from data.landmark_batches import LANDMARK_SETS
from data.views import taught_batches
from losses import (
    hvs_loss,
    lce_loss,
    regression_loss,
    structure_similarity_loss,
    tuple_contrastive_loss,
)
from models import AsymmetricNetwork
from models.embedding import PUBLISHED
from utils.asymmetric import AsymmetricEvaluation
from utils.cli import run_main
from utils.distributed import Ranks
from utils.errors import UserError
from utils.gallery import Gallery, class_means, identity_of, read_anchors, read_gallery
from utils.loop import Trainer, kept_statistics
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
    gallery = read_features(run, data)
    check_gallery(run, gallery)
    features = {role: of_rows(gallery.features, rows) for role, rows in data.rows.items()}
    labels = training_labels(args, data)
    classes = classes_of(run, data)
    D = gallery.features.shape[1]
    run = run.with_flags(embedding_dim=D, n_classes=classes, gallery=gallery.network)
    run = run.with_flags(gallery_input_size=gallery.input_size)
    model = start_model(run)
    evaluate = None
    if data.query is not None:
        known = features["query"], features["database"]
        evaluate = AsymmetricEvaluation(data.query, data.db, known, args.input_size, args.Top_N)
    trainer = build_trainer(
        run, model, data, features["train"], labels, evaluate, anchors_for(run, gallery)
    )
    metrics = trainer.evaluate() if args.eval_only else trainer.fit()
    report(run, trainer, metrics, data.classes, data.left_out)
    if args.dataset in LANDMARK_SETS and run.ranks.is_main:
        print(how_to_score(run, gallery.network))


def read_features(run: Run, data: DataSet) -> Gallery:
    """The gallery's, a row for each image of the set's listing.

    Of a landmark set with missing images they may also be of those alone that are there; rows of
    the others are then 0, and nothing asks for them.

    Raises:
        UserError: if they are of other images.
    """
    path, names, dataset = run.args.features, data.split.listing.names, data.split.dataset
    used = torch.cat(list(data.rows.values())).unique()
    try:
        return read_gallery(path, names, dataset, rows=used)
    except UserError:
        if run.args.dataset not in LANDMARK_SETS or not data.left_out:
            raise
        present = data.used.roles["train"]
        known = [names[row] for row in present.tolist()]
        try:
            found = read_gallery(path, known, dataset)
        except UserError:
            found = None
        if found is None:
            raise
    features = torch.zeros(len(names), found.features.shape[1])
    features[present] = found.features
    return replace(found, features=features)


def of_rows(features: Tensor, rows: Tensor) -> Tensor:
    """These rows; all of them without a copy, which of millions takes gigabytes."""
    every = len(rows) == len(features) and torch.equal(rows, torch.arange(len(rows)))
    return features if every else features[rows]


def how_to_score(run: Run, network: str) -> str:
    """The command that goes on with a query network for landmarks."""
    name = network.split()[0]
    gallery = f"{name} --gallery_weights=FILE" if name in PUBLISHED else "NETWORK"
    return (
        f"Score it on revisited Oxford (or rparis6k), its gallery network being {network}:\n"
        f"  python evaluate_landmarks.py --dataset=roxford5k --data_dir=DIR --gallery={gallery} "
        f"--query={quote(str(run.args.output_dir))}"
    )


def check_gallery(run: Run, gallery: Gallery) -> None:
    """A training goes on with the gallery that it began with; an evaluation says if it has another.

    Raises:
        UserError: if it was another network's, or has embeddings of another dimension.
    """
    args, network = run.args, gallery.network
    flags = run.checkpoint["args"] if run.checkpoint else {}
    saved, D = flags.get("gallery", network), gallery.features.shape[1]
    other = identity_of(saved) != identity_of(network)
    if other and not args.eval_only:
        raise UserError(
            f"--features={args.features}: are by {network}, and the run that "
            f"--resume={args.resume} goes on with learns those by {saved}; give it these, or "
            "begin another run"
        )
    if flags.get("embedding_dim", D) != D:
        raise UserError(
            f"--features={args.features}: have {D} dimensions, and the network of "
            f"--resume={args.resume} gives {flags['embedding_dim']}; give it features by {saved}, "
            "which it learned from"
        )
    if other and run.ranks.is_main:
        print(f"The features are by {network}, and the network learned from those by {saved}.")


def anchors_for(run: Run, gallery: Gallery) -> Tensor | None:
    """--anchors, where the training wants them.

    Raises:
        UserError: as `read_anchors`.
    """
    args = run.args
    if args.method != "ssp" or args.anchors is None or args.eval_only:
        return None
    network = gallery.network if gallery.tells_network else None
    return read_anchors(args.anchors, gallery.features.shape[1], network)


def training_labels(args: Namespace, data: DataSet) -> Tensor | None:
    """Labels of the training images for the methods that need them; an evaluation does not.

    Raises:
        UserError: if there are none, or an image has several.
    """
    if args.method not in (*CLASSIFIES, "aml"):
        return None
    labels = data.split.listing.labels
    if len(data.classes) < 2 or labels.dim() > 1:
        if args.eval_only:
            return None
        folders = ", or --protocol=class-folders, where each class has a folder"
        raise UserError(
            f"--method={args.method}: needs one label for each image; allowed without are ssp and "
            f"regression{folders if args.dataset == 'folder' else ''}"
        )
    return labels[data.rows["train"]]


def classes_of(run: Run, data: DataSet) -> int:
    """Of the classifier beside the embedding: those of the training set, also where the network is
    evaluated on another."""
    if run.args.method not in CLASSIFIES:
        return 0
    saved = run.checkpoint["args"].get("n_classes") if run.args.eval_only else None
    return len(data.classes) if saved is None else saved


def check_parts(args: Namespace, ranks: Ranks) -> None:
    """
    Raises:
        UserError: if gradients of several processes would not be averaged. The loss of a batch in
            parts is taken once, before the parts' backward passes; that of what it learns beside
            the network would come outside of what DistributedDataParallel averages.
    """
    if args.method in CLASSIFIES and args.accumulate > 1 and ranks.world_size > 1:
        raise UserError(
            f"--accumulate={args.accumulate}: --method={args.method} learns its classifier in the "
            f"loss, which {ranks.world_size} processes cannot take in parts; allowed is "
            "--accumulate=1, with a smaller --batch_size or more processes"
        )


def build_trainer(
    run: Run,
    model: AsymmetricNetwork,
    data: DataSet,
    features: Tensor,
    labels: Tensor | None,
    evaluate: AsymmetricEvaluation | None,
    anchors: Tensor | None = None,
) -> Trainer:
    """The methods: one network, and what its embeddings are held against.

    Args:
        run: flags, device, processes, and the checkpoint to go on from.
        model: on the device.
        data: images to train on.
        features: the gallery's, of these images, (N, D) of unit length.
        labels: of these images, (N,); None where the method needs none.
        evaluate: what mAP is computed by; None without labels.
        anchors: (M, K, d), for ssp.
    Raises:
        UserError: if a batch in parts, or the images, do not suit the method.
    """
    args, ranks, device = run.args, run.ranks, run.device
    check_parts(args, ranks)
    batches = taught_batches(args, data.train, features, labels, model, ranks, data.pairs)
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
        x_old = model.transform(x)
        with kept_statistics(model.transform):  # which are those of embeddings
            new_old = model.transform(new)
        return lce_loss(x, x_old, labels, new, new_old, old, args.classification_scale, **margins)

    losses = {"regression": regression_loss, "aml": aml, "hvs": hvs, "lce": lce, "ssp": ssp}
    loss_of = losses[args.method]
    if anchors is not None:
        loss_of = partial(ssp, anchors.to(device))
    if args.method in CLASSIFIES and not args.eval_only:
        loss_of = partial(loss_of, class_means(features, labels, len(data.classes)).to(device))
    shape = embed_tuples if args.method == "aml" else embed
    return Trainer(args, "SSP", model, shape, loss_of, batches, evaluate, ranks, run.checkpoint)


if __name__ == "__main__":
    run_main(main)
