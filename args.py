"""Every flag of the scripts; `python main_SPQ.py --help` and its like are the documentation.

A default stands here and nowhere else.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data.augment import AUGMENTATIONS, CROP_FLIP, CROP_JITTER
from data.images import MAX_PIXELS
from data.landmark_batches import LANDMARK_DEFAULTS, LANDMARK_PROTOCOLS, LANDMARK_SETS
from data.landmark_images import LONGEST
from data.landmarks import REVISITED_NAMES
from data.splits import DATASETS, PROTOCOL_HELP, PROTOCOLS, TOP_N, UNLABELLED
from models import QUANTIZERS
from models.embedding import PUBLISHED
from models.trunks import OWN, STEMS, check_arch, default_stem, has_fixed_size
from utils.evaluation import L2_DISTANCES
from utils.flags import BooleanFlag, HelpFormatter, Parser, is_file, number, power_of_two
from utils.optimizers import OPTIMIZERS
from utils.recipes import RECIPE_INPUT_SIZE, RECIPES
from utils.retrieval import DISTANCES
from utils.schedule import SCHEDULES

LOSSES = ("cqc", "cqc-paper", "contrastive")
SPQ_SCHEDULES = tuple(name for name in SCHEDULES if name != "staircase")
GPQ_SCHEDULES = tuple(name for name in SCHEDULES if name != "released")
SSP_SCHEDULES = ("cosine", "constant", "wsd")
SSP_METHODS = ("ssp", "regression", "aml", "hvs", "lce")
# flags of main_SSP.py that only these methods heed
METHOD_FLAGS = {
    "anchors": ("ssp",),
    "similarity_scale": ("ssp",),
    "classification_scale": ("hvs", "lce"),
    "new_margin": ("hvs", "lce"),
    "old_margin": ("hvs", "lce"),
    "contrastive_margin": ("aml",),
    "tuples": ("aml",),
    "pool": ("aml",),
    "negatives": ("aml",),
}
SSP_DATASETS = (*DATASETS, *LANDMARK_SETS)
OLD_MARGINS = {"hvs": 0.15, "lce": 0.2}
PIECES = ".pieces"  # added to the name of a file that is made piece by piece
FIGURE_ENDINGS = (".png", ".svg", ".pdf", ".jpg")
GPQ_WEIGHTS = ("n_pair_weight", "entropy_weight", "classification_weight")
# of views that kornia or batched makes
SIMCLR_FLAGS = {"crop_size", "early_crop_size", "early_share", "crop_min_area", "jitter_strength"}
_UNSET = object()


positive_int = number(int, 1)
count = number(int, 0)
positive = number(float, 0, strict=True)
not_negative = number(float, 0)


def count_or_all(text: str) -> int | str:
    try:
        return text if text == "all" else positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from None


def spq_parser() -> Parser:
    """The parser of main_SPQ.py."""
    parser = Parser(
        prog="main_SPQ.py",
        description="Self-supervised Product Quantization (ICCV 2021): train, evaluate, resume.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_recipe_flag(
        parser,
        "paper: as the paper is written; released: as the released code ran; fast: for short "
        "trainings, provisional",
    )
    add_data_flags(parser)
    add_model_flags(parser, "4, 8, 16 give the paper's 16, 32, 64")
    add_spq_flags(parser)
    add_augmentation_flags(parser, sorted(AUGMENTATIONS))
    add_training_flags(parser, SPQ_SCHEDULES)
    add_evaluation_flags(parser)
    add_run_flags(parser)
    return parser


def gpq_parser() -> Parser:
    """The parser of main_GPQ.py: what it shares with main_SPQ.py has GPQ's defaults."""
    parser = Parser(
        prog="main_GPQ.py",
        description="Generalized Product Quantization (CVPR 2020), semi-supervised: train, "
        "evaluate, resume.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_recipe_flag(
        parser,
        "paper: as the paper and its code have it, for a network that starts from published "
        "weights; fast: for one that starts from nothing",
    )
    add_data_flags(parser)
    add_model_flags(parser, "3, 6, 8, 12 give the paper's 12, 24, 32, 48")
    add_gpq_flags(parser)
    add_augmentation_flags(parser, [CROP_FLIP, *sorted(AUGMENTATIONS)])
    add_training_flags(parser, GPQ_SCHEDULES)
    add_evaluation_flags(parser)
    add_run_flags(parser)
    parser.set_defaults(
        arch="cifar_vgg",
        N_books=12,
        L_word=12,
        soft_quantization_scale=20.0,
        augmentation=CROP_FLIP,
        batch_size=500,
        epochs=300,
        lr=2e-4,
        beta1=0.5,
        weight_decay=0.0,
        lr_schedule="staircase",
        eval_epoch=50,
        # what has no flag here
        quantizer="prototype",
        distance="inner_product",
    )
    return parser


def ssp_parser() -> Parser:
    """The parser of main_SSP.py: what it shares with the others has SSP's defaults."""
    parser = Parser(
        prog="main_SSP.py",
        description="SSP, Structure Similarity Preservation (TMM 2024), and what it is compared "
        "with: train a light query network for the features of a large gallery network, evaluate, "
        "resume.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_recipe_flag(
        parser,
        "paper: as released, for landmarks; fast: for images of 32 pixels",
    )
    add_data_flags(parser, datasets=SSP_DATASETS)
    add_pooling_flags(add_trunk_flags(parser, "mobilenetv2_100"))
    add_ssp_flags(parser)
    add_augmentation_flags(parser, [CROP_FLIP, CROP_JITTER, *sorted(AUGMENTATIONS)])
    rate = " (default: 0.001 * batch_size / 256)"
    add_training_flags(
        parser,
        SSP_SCHEDULES,
        rate,
        "; from near 0, where the released code begins at 1e-4 (default: half of the epochs; "
        "gldv2: 0.4 of them)",
    )
    add_evaluation_flags(parser)
    add_run_flags(parser)
    parser.set_defaults(
        augmentation=CROP_FLIP,
        batch_size=64,
        epochs=10,
        optimizer="sgd",
        lr=None,
        warmup_epochs=None,
        weight_decay=1e-6,
        eval_epoch=5,
        # what has no flag here
        distance="query-gallery",
        freeze_trunk=False,
        cached_views=0,
    )
    return parser


def extract_parser() -> Parser:
    """The parser of extract_features.py."""
    parser = Parser(
        prog="extract_features.py",
        description="Embed all images of a set by a gallery network, for main_SSP.py.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gallery",
        required=True,
        metavar="NETWORK",
        help="the large network: checkpoint_last.pt or model.pt of SPQ or GPQ, or a run's folder; "
        "a network of timm by name, with --gallery_weights or --pretrained; for landmarks also "
        f"{' or '.join(PUBLISHED)} (these with --gallery_weights), or a run of SSP",
    )
    add_network_weights(parser.add_argument, ["gallery"])
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="where the features go, .safetensors",
    )
    add_data_flags(parser, limits=False, datasets=SSP_DATASETS)
    group = parser.add_argument_group("landmarks")
    flag = group.add_argument
    flag(
        "--longest",
        type=positive_int,
        default=LONGEST,
        metavar="PIXELS",
        help="longer side that images are reduced to",
    )
    flag(
        "--scales",
        type=scale_list,
        default="1",
        metavar="S,S,...",
        help="of each image, whose embeddings are averaged",
    )
    flag(
        "--features_dir",
        type=Path,
        metavar="DIR",
        help="keep features here, piece by piece, so that a killed run goes on; they may be "
        "deleted once --output is whole (default: --output with .pieces at its end, deleted then)",
    )
    flag = parser.add_argument
    add_amp_flag(flag, "", " (default: auto for landmarks, off for all others)")
    add_device_flags(flag, "GPU to use")
    return parser


def anchors_parser() -> Parser:
    """The parser of make_anchors.py."""
    parser = Parser(
        prog="make_anchors.py",
        description="Anchors for main_SSP.py: the centroids of a product quantizer on gallery "
        "features, or the codebooks of an SPQ or GPQ model.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="of another image set by the same gallery network, or of this one: what "
        "extract_features.py wrote, or .npy or .pkl (N, D)",
    )
    source.add_argument(
        "--codebooks_of",
        type=Path,
        metavar="FILE",
        help="checkpoint_last.pt or model.pt of SPQ or GPQ, whose codebooks are the anchors",
    )
    flag("--output", type=Path, required=True, metavar="FILE", help="where they go, .safetensors")
    flag("--M", type=positive_int, default=32, metavar="M", help="subspaces")
    flag(
        "--bits",
        type=number(int, 1, high=16),
        default=8,
        metavar="N",
        help="log2 of the anchors in each subspace",
    )
    flag("--iterations", type=positive_int, default=10, metavar="N", help="of k-means")
    flag("--restarts", type=positive_int, default=2, metavar="N", help="of k-means; the best stays")
    flag(
        "--max_points",
        type=positive_int,
        default=1000,
        metavar="N",
        help="features a centroid that k-means looks at",
    )
    flag("--seed", type=number(int, 0, high=2**31 - 1), default=0, metavar="N", help="of k-means")
    return parser


def scale_list(text: str) -> tuple[float, ...]:
    return tuple(positive(word) for word in text.split(","))


def landmarks_parser() -> Parser:
    """The parser of evaluate_landmarks.py."""
    parser = Parser(
        prog="evaluate_landmarks.py",
        description="Score networks on revisited Oxford or Paris: easy, medium and hard, queries "
        "by one network against a database by another.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--dataset", choices=REVISITED_NAMES, required=True, help="which of the two")
    flag(
        "--data_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder that holds the set's folder (gnd_NAME.pkl and jpg), or is it",
    )
    flag(
        "--distractors",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="put the million images of revisitop1m, also in --data_dir, into the database",
    )
    flag(
        "--gallery",
        required=True,
        metavar="NETWORK",
        help=f"network of the database: {' or '.join(PUBLISHED)} with --gallery_weights; a network "
        "of timm by name, with --gallery_weights or --pretrained; or checkpoint_last.pt or "
        "model.pt of SPQ, GPQ or SSP, or a run's folder. SPQ, GPQ, SSP's networks for small images "
        "and timm's transformers take squares of one size: images are squeezed to it, at one scale",
    )
    add_network_weights(flag, ["gallery", "query"])
    flag(
        "--query",
        metavar="NETWORK",
        help="network of the queries, as --gallery (default: the gallery's)",
    )
    flag(
        "--all_sides",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="also the figures of each network alone, queries and database by the same; both then "
        "embed everything",
    )
    flag(
        "--longest",
        type=positive_int,
        default=LONGEST,
        metavar="PIXELS",
        help="longer side that images, or queries once they are cut to their box, are reduced to",
    )
    flag(
        "--scales",
        type=scale_list,
        default="1,1.4142,0.7071",
        metavar="S,S,...",
        help="of each image, whose embeddings are averaged",
    )
    add_amp_flag(flag)
    add_device_flags(flag, "GPU to use")
    flag("--num_workers", type=positive_int, default=4, metavar="N", help="threads that decode")
    flag(
        "--max_pixels",
        type=positive_int,
        default=MAX_PIXELS,
        metavar="N",
        help="width * height of the largest image that is decoded",
    )
    flag(
        "--features_dir",
        type=Path,
        metavar="DIR",
        help="keep features here: a killed run goes on, and another with the same network, images "
        "and settings need not embed again (default: they are not kept)",
    )
    flag("--output", type=Path, metavar="FILE", help="write the figures here, .json")
    flag(
        "--dry_run",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="only see whether everything is there: ground truth, each image, weights",
    )
    return parser


def add_network_weights(flag: Callable[..., argparse.Action], roles: Sequence[str]) -> None:
    """Where the weights of networks by name come from."""
    for role in roles:
        flag(
            f"--{role}_weights",
            type=Path,
            metavar="FILE",
            help=f"weights of a --{role} by name, .safetensors or torch's: of all of it, whitening "
            "included; or of a network of timm alone, whose pooled features (of a convolutional "
            "one by GeM, p 3) are then the embedding, without whitening",
        )
    flag(
        "--pretrained",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="networks of timm by name have timm's weights, from its hub (tf_efficientnet_lite0 "
        "and _lite2 from packages of requirements.txt), if no file is named",
    )


def add_cifar10_flags(parser: argparse.ArgumentParser) -> None:
    """Where CIFAR-10 is, for scripts that know no other set."""
    flag = parser.add_argument
    flag(
        "--data_dir",
        type=Path,
        default=Path("./datasets"),
        metavar="DIR",
        help="folder with cifar-10-batches-bin or cifar-10-batches-py",
    )
    flag(
        "--if_download",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="fetch CIFAR-10 into --data_dir if it is not complete there",
    )


def add_recipe_flag(parser: Parser, meaning: str) -> None:
    """Named sets of defaults; `meaning` says what they are for."""
    recipes = RECIPES[_method(parser)]
    sets = "; ".join(
        f"{name}: {' '.join(f'--{flag}={value}' for flag, value in flags.items())}"
        for name, flags in recipes.items()
        if flags
    )
    parser.add_argument(
        "--recipe",
        choices=sorted(recipes),
        default="paper",
        help=f"a named set of defaults, which any flag beside it overrides; {meaning}. "
        f"Where they differ from the defaults below: {sets}",
    )


def add_data_flags(parser: Parser, limits: bool = True, datasets: Sequence[str] = DATASETS) -> None:
    """Where the images are and how they are cropped; `limits`: and which of them are used."""
    group = parser.add_argument_group("data")
    flag = group.add_argument
    flag(
        "--dataset",
        choices=datasets,
        default="cifar10",
        help="folder: your own images, all below --data_dir; lists: "
        "train.txt, test.txt (the queries) and database.txt in --data_dir, lines of a path and its "
        "labels; README tells what the others need"
        + (
            ". sfm120k, gldv2: landmarks, decoded from their files for each batch; they have no "
            "queries (evaluate_landmarks.py), and defaults of their own: "
            + "; ".join(
                f"{name} --input_size={d.input_size} --batch_size={d.batch_size} "
                f"--epochs={d.epochs} --augmentation={CROP_JITTER} "
                f"--jitter_strength={d.jitter_strength:g}"
                for name, d in LANDMARK_DEFAULTS.items()
            )
            if LANDMARK_SETS[0] in datasets
            else ""
        ),
    )
    flag(
        "--data_dir",
        type=Path,
        default=Path("./datasets"),
        metavar="DIR",
        help="where the set is; README tells which files it needs there",
    )
    flag(
        "--image_dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder that the paths in lists are relative to (default: --data_dir)",
    )
    flag(
        "--if_download",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="fetch CIFAR-10 or CIFAR-100 into --data_dir if it is not complete there",
    )
    flag(
        "--protocol",
        default=None,
        metavar="NAME",
        help=f"which images are trained on, queries and database. {PROTOCOL_HELP} (default: the "
        "first named, the paper's; for GPQ gpq on cifar10 and class-folders in a folder)",
    )
    flag(
        "--split",
        type=Path,
        default=None,
        metavar="FILE",
        help="the very split that `python -m data.splits make` wrote (default: --protocol makes "
        "it)",
    )
    flag(
        "--split_seed",
        type=number(int, 0, high=2**31 - 1),
        default=0,
        metavar="N",
        help="of what a protocol draws at random; apart from --seed, so that seeds of the training "
        "share a split",
    )
    flag(
        "--skip_missing",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="leave out images that are missing or damaged, and say how many with the result; "
        "without, they stop the run",
    )
    flag(
        "--cache_dir",
        type=Path,
        default=Path("./cache"),
        metavar="DIR",
        help="where images are kept as decoded and resized, and features of a frozen trunk; may be "
        "deleted at any time",
    )
    flag(
        "--num_workers",
        type=count,
        default=0,
        metavar="N",
        help="threads that decode images, once, into --cache_dir; 0: one a core",
    )
    flag(
        "--max_pixels",
        type=positive_int,
        default=MAX_PIXELS,
        metavar="N",
        help="width * height of the largest image that is decoded",
    )
    flag(
        "--input_size",
        type=number(int, 8, high=1024),
        default=None,
        metavar="PIXELS",
        help="side of the images that are encoded and, unless --crop_size says otherwise, "
        "trained on (default: 32 for CIFAR, 64 for all others, the papers' sizes)",
    )
    if not limits:
        return
    flag(
        "--num_cls",
        type=positive_int,
        default=None,
        metavar="N",
        help="classes that the data set may have (default: as many as there are)",
    )
    flag(
        "--validate",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="choose settings without the queries of the split: a tenth of the training images "
        "are queries instead, neither trained on nor in the database (CIFAR's own split: the last "
        "5,000)",
    )
    flag(
        "--limit_train",
        type=positive_int,
        default=None,
        metavar="N",
        help="trial: train on the first N images; GPQ: N with labels and N without (default: all)",
    )
    flag(
        "--limit_db",
        type=positive_int,
        default=None,
        metavar="N",
        help="trial: search among the first N images (default: all)",
    )
    flag(
        "--limit_query",
        type=positive_int,
        default=None,
        metavar="N",
        help="trial: ask the first N queries (default: all)",
    )


def add_trunk_flags(parser: Parser, default: str) -> argparse._ArgumentGroup:
    """The network that is trained."""
    group = parser.add_argument_group("model")
    flag = group.add_argument
    flag(
        "--arch",
        default=default,
        metavar="NAME",
        help="trunk: resnet18, cifar_vgg (GPQ's), or any model of timm, resnet50 for one",
    )
    flag(
        "--stem",
        choices=STEMS,
        default=None,
        help="how a ResNet begins. cifar: a 3x3 convolution, for images of 32 to 64 pixels; "
        "imagenet: 7x7 with stride 2 and a max-pool (default: cifar for resnet18 and cifar_vgg, "
        "else imagenet)",
    )
    flag(
        "--width",
        type=positive_int,
        default=64,
        metavar="CHANNELS",
        help="channels of the first stage of resnet18 or cifar_vgg; 64 is the published network, "
        "16 suits a CPU",
    )
    flag(
        "--pretrained",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="start from published weights: timm fetches them; those of "
        "tf_efficientnet_lite0 and _lite2 come with requirements.txt",
    )
    flag(
        "--weights",
        type=Path,
        default=None,
        metavar="FILE",
        help="start from the weights in this file: .safetensors, .pth or a checkpoint of this "
        "project (default: none)",
    )
    return group


def add_pooling_flags(group: argparse._ArgumentGroup) -> None:
    """GeM, behind timm's trunks."""
    group.add_argument(
        "--gem_p",
        type=positive,
        default=3.0,
        metavar="P",
        help="exponent of the generalised mean that pools the map of a trunk of timm's: 1 is the "
        "average, large the maximum",
    )
    group.add_argument(
        "--trainable_p",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="learn this exponent; --gem_p is where it starts",
    )


def add_model_flags(parser: Parser, lengths: str) -> None:
    """Trunk and codebooks; `lengths` says which --N_books give the paper's codes."""
    flag = add_trunk_flags(parser, "resnet18").add_argument
    flag(
        "--freeze_trunk",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="train all but the trunk",
    )
    flag(
        "--cached_views",
        type=count,
        default=0,
        metavar="N",
        help="with --freeze_trunk: each image itself and N random views of it go through the "
        "backbone once, and each step takes --views of these (GPQ: one). 0: new views at each step",
    )
    flag(
        "--N_books",
        type=positive_int,
        default=8,
        metavar="M",
        help=f"codebooks; a code has M * log2(K) bits: {lengths}",
    )
    flag(
        "--N_words",
        type=power_of_two,
        default=16,
        metavar="K",
        help="codewords in each codebook, a power of two",
    )
    flag(
        "--L_word",
        type=positive_int,
        default=16,
        metavar="d",
        help="dimensions of a codeword; descriptors have D = M * d",
    )
    flag(
        "--soft_quantization_scale",
        type=positive,
        default=5.0,
        metavar="ALPHA",
        help="alpha, the sharpness of the soft assignment, multiplies the distance; 1 to 20 is "
        "usual",
    )


def add_spq_flags(parser: Parser) -> None:
    """What only SPQ has: its loss and its ablations."""
    group = parser.add_argument_group("SPQ")
    flag = group.add_argument
    flag(
        "--loss",
        choices=LOSSES,
        default="cqc-paper",
        help="cqc-paper: only x against z of the other view; cqc: as released, all other rows are "
        "negatives; contrastive: x with x, z with z (SPQ-C)",
    )
    flag(
        "--contrastive_temperature",
        type=positive,
        default=0.5,
        metavar="TAU",
        help="tau_cqc, divides the cosines; 0.5 is the released value, 0.2 was better in short "
        "trainings",
    )
    flag(
        "--views",
        type=number(int, 2, high=16),
        default=2,
        metavar="V",
        help="random views of each image in a step; the loss is the mean over all pairs of them. "
        "4 with half the --batch_size sends as many images through the network",
    )
    flag(
        "--joint_views",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="all views through the network in one pass: batch norm takes its statistics over all "
        "of them, and a GPU has larger operations",
    )
    flag(
        "--neighbour_share",
        type=number(float, 0.0, high=1.0),
        default=0.0,
        metavar="SHARE",
        help="second stage: share of the epochs, at the end of the training, in which an image and "
        "one of its nearest neighbours also learn to use the same codewords. Crops cover at least "
        "0.2 of the image; the learning rate falls from 0.3 of --lr to 0 by a cosine. 0: no second "
        "stage",
    )
    flag(
        "--neighbours",
        type=positive_int,
        default=20,
        metavar="K",
        help="second stage: neighbours of each image, by the cosine of descriptors",
    )
    flag(
        "--neighbour_entropy",
        type=not_negative,
        default=2.0,
        metavar="WEIGHT",
        help="second stage: weight of the entropy that keeps all codewords in use",
    )
    flag(
        "--neighbour_cqc",
        type=not_negative,
        default=0.3,
        metavar="WEIGHT",
        help="second stage: weight of the contrastive --loss",
    )
    flag(
        "--quantizer",
        choices=QUANTIZERS,
        default="soft",
        help="soft: the method; hard: straight-through (SPQ-H); vq: one codebook of K words over "
        "all D dimensions, log2(K) bits (SPQ-Q)",
    )
    flag(
        "--distance",
        choices=L2_DISTANCES,
        default="squared_l2",
        help="of the headline figure; both are always reported. squared_l2 is standard ADC, l2 "
        "what the released code ranks by",
    )


def add_gpq_flags(parser: Parser) -> None:
    """What only GPQ has: labels, three losses and a gradient reversal."""
    group = parser.add_argument_group("GPQ")
    flag = group.add_argument
    flag(
        "--labels_per_class",
        type=positive_int,
        default=None,
        metavar="N",
        help="see the labels of N images of each class only: the first ones of the split's "
        "labelled images; of a split without such, random ones of the training images "
        "(--split_seed). All others, the database's too, are trained on without labels (default: "
        "the labels of all of these)",
    )
    flag(
        "--classification_scale",
        type=positive,
        default=4.0,
        metavar="BETA",
        help="scales descriptors and prototypes, so that logits reach its square",
    )
    flag(
        "--n_pair_weight",
        type=not_negative,
        default=1.0,
        metavar="WEIGHT",
        help="of the N-pair product quantization loss; 0 takes it away",
    )
    flag(
        "--entropy_weight",
        type=not_negative,
        default=0.1,
        metavar="WEIGHT",
        help="lambda_1, of the subspace entropy; 0 leaves the unlabelled images out",
    )
    flag(
        "--classification_weight",
        type=not_negative,
        default=0.1,
        metavar="WEIGHT",
        help="lambda_2, of the classification loss; 0 takes it away",
    )
    flag(
        "--reversal_weight",
        type=not_negative,
        default=1.0,
        metavar="STRENGTH",
        help="of the gradient reversal: what the network descends of the entropy, for what the "
        "prototypes ascend; 0: the prototypes alone feel it",
    )
    flag(
        "--reversal_warmup_epochs",
        type=not_negative,
        default=0.0,
        metavar="N",
        help="the reversal's strength rises linearly over the first N epochs, fractions allowed",
    )


def add_ssp_flags(parser: Parser) -> None:
    """What only SSP has: the gallery's features, the method, and what each method takes."""
    group = parser.add_argument_group("SSP")
    flag = group.add_argument
    flag(
        "--method",
        choices=SSP_METHODS,
        default="ssp",
        help="ssp: similarities to the anchors as the gallery's; regression: the gallery's "
        "features themselves; aml: regression, and tuples mined by the labels; hvs: classification "
        "by the labels, and by the gallery's classifier; lce: hvs with a transformed embedding",
    )
    flag(
        "--features",
        type=Path,
        default=None,
        metavar="FILE",
        help="of all images of the set by the gallery network: what extract_features.py wrote, or "
        ".npy or .pkl (N, D) with a row for each image of the set's listing; must be named",
    )
    flag(
        "--anchors",
        type=Path,
        default=None,
        metavar="FILE",
        help="what make_anchors.py wrote; ssp wants them",
    )
    flag(
        "--similarity_scale",
        type=positive,
        default=10.0,
        metavar="SCALE",
        help="ssp: multiplies the cosines to the anchors",
    )
    flag(
        "--classification_scale",
        type=positive,
        default=round(2048**0.5, 4),
        metavar="S",
        help="hvs, lce: multiplies the cosines to the classes, sqrt(2048)",
    )
    flag(
        "--new_margin",
        type=number(float, 0, high=math.pi),
        default=0.15,
        metavar="RADIANS",
        help="hvs, lce: of the classifier that is learned",
    )
    flag(
        "--old_margin",
        type=number(float, 0, high=math.pi),
        default=None,
        metavar="RADIANS",
        help="hvs, lce: of the gallery's classifier (default: 0.15 for hvs, 0.2 for lce)",
    )
    flag(
        "--contrastive_margin",
        type=positive,
        default=0.7,
        metavar="DISTANCE",
        help="aml: that negatives are pushed away to",
    )
    flag(
        "--tuples",
        type=positive_int,
        default=2000,
        metavar="N",
        help="aml: queries an epoch; --batch_size counts tuples",
    )
    flag(
        "--pool",
        type=positive_int,
        default=20000,
        metavar="N",
        help="aml: images that the negatives of an epoch are found among",
    )
    flag(
        "--negatives",
        type=positive_int,
        default=5,
        metavar="R",
        help="aml: of each query, of different classes",
    )


def add_augmentation_flags(parser: Parser, choices: Sequence[str]) -> None:
    """How views of an image are made."""
    group = parser.add_argument_group("augmentation")
    flag = group.add_argument
    flag(
        "--augmentation",
        choices=choices,
        default="kornia",
        help="what makes the views; kornia: SimCLR's; batched: the same transforms in a few large "
        "operations, kornia's to within rounding and faster"
        + (
            "; crop-flip: padded, cropped back to the image's size and mirrored, as released; the "
            "other flags of this group are not for it"
            if CROP_FLIP in choices
            else ""
        )
        + (
            f"; {CROP_JITTER}: a crop of at least 0.8 of the area (--crop_min_area), and colour "
            "jitter (0.4, 0.4, 0.2, 0.1)"
            if CROP_JITTER in choices
            else ""
        ),
    )
    flag(
        "--crop_size",
        type=number(int, 8, high=1024),
        default=None,
        metavar="PIXELS",
        help="side of the training crops; smaller than --input_size trains faster "
        "(24 instead of 32 costs 0.56 of the time) (default: --input_size)",
    )
    flag(
        "--early_crop_size",
        type=number(int, 8, high=1024),
        default=None,
        metavar="PIXELS",
        help="side of the crops in the first --early_share of the training (progressive "
        "resolution): small ones make cheap steps while the network learns the coarse "
        "(default: --crop_size)",
    )
    flag(
        "--early_share",
        type=number(float, 0.0, high=1.0),
        default=0.0,
        metavar="SHARE",
        help="share of the steps that --early_crop_size is for",
    )
    flag(
        "--crop_min_area",
        type=number(float, 0.01, high=1.0),
        default=0.08,
        metavar="SHARE",
        help="smallest crop, as a share of the image's area; 1 takes it whole",
    )
    flag(
        "--jitter_strength",
        type=number(float, 0.0, high=2.5),
        default=1.0,
        metavar="FACTOR",
        help="multiplies the colour jitter's ranges (0.4, 0.4, 0.4, 0.1)",
    )


def add_training_flags(
    parser: Parser, schedules: Sequence[str], lr: str = "", warmup: str = ""
) -> None:
    """Optimiser, schedule, length; `lr` and `warmup` say a default that is no number."""
    group = parser.add_argument_group("training")
    flag = group.add_argument
    flag(
        "--batch_size",
        type=number(int, 2),
        default=256,
        metavar="B",
        help="images in a step, over all processes; GPQ: so many with labels and so many without. "
        "The last incomplete batch is dropped",
    )
    flag(
        "--epochs",
        type=positive_int,
        default=2000,
        metavar="N",
        help="passes over the training images, for GPQ over the labelled ones; the schedule ends "
        "here",
    )
    flag(
        "--freeze_bn_epoch",
        type=not_negative,
        default=None,
        metavar="N",
        help="from epoch N on, batch norm keeps its running statistics and normalises by them: "
        "what the released code does unawares after its first evaluation (default: never)",
    )
    flag(
        "--accumulate",
        type=positive_int,
        default=1,
        metavar="N",
        help="send a batch through the network in N parts, so that memory holds the activations "
        "of one; the loss is still that of the whole batch. Costs a second forward pass; batch "
        "norm's statistics are those of a part",
    )
    flag(
        "--max_minutes",
        type=positive,
        default=None,
        metavar="MINUTES",
        help="save and leave after so long, with exit code 75; --resume=auto goes on. Counted from "
        "this call's first step; loading, and the evaluation after the last step, come on top. "
        "torchrun itself then ends with 1 (default: no such stop)",
    )
    flag(
        "--max_steps",
        type=positive_int,
        default=None,
        metavar="N",
        help="stop after N optimisation steps in all, resumed ones included; the schedule does not "
        "change (default: no such stop)",
    )
    flag(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adam",
        help="sgd has momentum 0.9 and wants a higher --lr; muon: Muon for the convolutions behind "
        "the first, Adam for all else",
    )
    flag(
        "--muon_lr",
        type=positive,
        default=0.1,
        metavar="LR",
        help="peak learning rate of Muon, as a part of a kernel's length a step; 0.05 to 0.2",
    )
    flag(
        "--lr",
        type=positive,
        default=3e-4,
        metavar="LR",
        help=f"peak learning rate; a short training wants more, 2e-3 for Adam{lr}",
    )
    flag(
        "--beta1",
        type=number(float, 0.0, high=0.999),
        default=0.9,
        metavar="BETA",
        help="decay of Adam's first moment",
    )
    flag(
        "--weight_decay",
        type=not_negative,
        default=1e-5,
        metavar="WD",
        help="L2 penalty (adamw: decoupled decay; Muon's kernels have none)",
    )
    flag(
        "--lr_schedule",
        choices=schedules,
        default="cosine",
        help="cosine: falls to 0 over all epochs (to the second stage, if there is one); wsd: "
        "constant, then linear to 0 over the last 0.3 of these; --epochs may be changed on a "
        "resume until the decay begins; "
        + (
            "released: constant for 10 epochs, then a cosine that swings with a period of 2 * "
            "steps-per-epoch epochs"
            if "released" in schedules
            else "staircase: times 0.95 every 100 steps, as released"
            if "staircase" in schedules
            else "constant: does not"
        ),
    )
    flag(
        "--warmup_epochs",
        type=not_negative,
        default=0.0,
        metavar="N",
        help="linear warm-up, fractions allowed"
        + ("; not with --lr_schedule=released" if "released" in schedules else "")
        + warmup,
    )
    add_amp_flag(flag, " (quantizer and loss are float32)")
    flag(
        "--compile",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="torch.compile the trunk: a minute at the start, then faster steps; needs a C++ "
        "compiler on the CPU",
    )
    flag(
        "--cuda_graph",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="on one GPU, not with fp16: replay the training step as one CUDA graph; for networks "
        "so narrow or batches so small that launching kernels takes longer than running them",
    )
    flag(
        "--deterministic",
        action=BooleanFlag,
        default=True,
        metavar="BOOL",
        help="on a GPU, only cuDNN's kernels that give the same at every run; without, the fastest "
        "of all of them",
    )
    flag(
        "--seed",
        type=number(int, 0, high=2**31 - 1),
        default=0,
        metavar="N",
        help="of weights, order and augmentation",
    )


def add_evaluation_flags(parser: Parser) -> None:
    """Retrieval."""
    group = parser.add_argument_group("evaluation")
    flag = group.add_argument
    flag(
        "--eval_epoch",
        type=positive_int,
        default=100,
        metavar="N",
        help="evaluate every N epochs, and at the end",
    )
    flag(
        "--eval_before",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="evaluate before the first step too, where the training starts from",
    )
    flag(
        "--Top_N",
        type=count_or_all,
        default=None,
        metavar="N",
        help="the N of mAP@N, or all: the whole ranking (default: all for GPQ; for SPQ 5000 on "
        "FLICKR25K and NUS-WIDE, 1000 on all others)",
    )
    flag(
        "--eval_only",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="evaluate the checkpoint, the model.pt, or the run's folder with one of them that "
        "--resume names, and stop",
    )


def add_amp_flag(
    flag: Callable[..., argparse.Action], of_the_rest: str = "", default: str = ""
) -> None:
    """Precision of the trunk; what is said of all else, and of a default that depends."""
    flag(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help=f"precision of the trunk{of_the_rest}; auto: the lower one where the device is faster "
        f"in it{default}",
    )


def add_device_flags(flag: Callable[..., argparse.Action], gpu: str) -> None:
    """Where it computes; `gpu` says what the GPU is for."""
    flag("--gpu_id", type=count, default=0, metavar="N", help=gpu)
    flag(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: the GPU if there is one",
    )


def add_run_flags(parser: Parser) -> None:
    """Device, output, resuming."""
    group = parser.add_argument_group("run")
    flag = group.add_argument
    add_device_flags(flag, "GPU to train on (without torchrun)")
    flag(
        "--output_dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="checkpoint, logs and figures (default: ./runs/<method>_<dataset>_<bits>bits)",
    )
    flag(
        "--resume",
        default=None,
        metavar="CHECKPOINT",
        help="go on from a checkpoint, or a run's folder, or `auto`: from the newest checkpoint in "
        "--output_dir, and from "
        "the start if there is none (default: a new run)",
    )
    flag(
        "--overwrite",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="start anew in an --output_dir that holds a run, which is lost",
    )
    flag(
        "--checkpoint_every",
        type=positive_int,
        default=500,
        metavar="STEPS",
        help="optimisation steps between checkpoints; one is also written every 10 minutes, "
        "before each evaluation and at the end",
    )
    flag(
        "--log_every",
        type=positive_int,
        default=None,
        metavar="STEPS",
        help="steps between lines of metrics.jsonl; on a GPU each waits for all work so far "
        "(default: 10 on a CPU, an epoch on a GPU)",
    )


PARSERS = {"SPQ": spq_parser, "GPQ": gpq_parser, "SSP": ssp_parser}
PATH_FLAGS = ("data_dir", "image_dir", "cache_dir", "split", "output_dir", "weights")
PATH_FLAGS += ("features", "anchors")


def flags_of_run(method: str, saved: Mapping) -> argparse.Namespace:
    """The flags of a run from its checkpoint or args.json; what it does not know has its
    default."""
    known = vars(parse_args(PARSERS[method](), [], whole=False))
    del known["given"]
    flags = known | dict(saved)
    places = {name: Path(flags[name]) for name in PATH_FLAGS if flags.get(name) is not None}
    return argparse.Namespace(**flags | places)


def code_bits(args: argparse.Namespace) -> int:
    """Bits of one stored image: M * log2(K); one codebook with --quantizer=vq."""
    books = 1 if args.quantizer == "vq" else args.N_books
    return books * int(math.log2(args.N_words))


def parse_args(
    parser: Parser, argv: Sequence[str] | None = None, whole: bool = True
) -> argparse.Namespace:
    """Parse and check what can be checked without data; exits with code 2 on bad input.

    Args:
        parser: of a main script.
        argv: its command line; None: this process's.
        whole: whether files that it cannot do without must be named.
    Returns:
        The flags, and `given`: the names of those that were on the command line.
    """
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    recipe = RECIPES[_method(parser)][args.recipe]
    args = parser.parse_args(words, argparse.Namespace(**recipe))
    unset = argparse.Namespace(**dict.fromkeys(vars(args), _UNSET))
    said = vars(parser.parse_args(words, unset)).items()
    args.given = frozenset(name for name, value in said if value is not _UNSET)
    if _method(parser) == "SSP":
        _resolve_landmarks(args, frozenset(recipe))
    _resolve_data(parser, args)
    _resolve_model(parser, args)
    if _method(parser) == "SSP":
        _resolve_ssp(parser, args, whole)
    weights = [getattr(args, name, None) for name in GPQ_WEIGHTS]
    if not any(weights) and None not in weights:
        names = ", ".join(f"--{name}" for name in GPQ_WEIGHTS)
        parser.error(f"{names}: are all 0, so nothing would be learned; one must be above it")
    if "beta1" in args.given and args.optimizer == "sgd":
        parser.error("--beta1: does nothing with --optimizer=sgd; allowed are the others")
    reversal = args.given & {"reversal_weight", "reversal_warmup_epochs"}
    if reversal and not args.entropy_weight:
        parser.error(f"--{min(reversal)}: does nothing with --entropy_weight=0")
    if "reversal_warmup_epochs" in args.given:
        if not args.reversal_weight:
            parser.error("--reversal_warmup_epochs: does nothing with --reversal_weight=0")
        if args.reversal_warmup_epochs > args.epochs:
            parser.error(
                f"--reversal_warmup_epochs={args.reversal_warmup_epochs:g}: must be at most "
                f"--epochs={args.epochs}"
            )
    if args.eval_only and args.eval_before:
        parser.error("--eval_before: does nothing with --eval_only, which trains nothing")
    if args.eval_only and args.resume is None:
        parser.error("--eval_only: needs --resume, a checkpoint or auto")
    if args.resume == "":
        parser.error("--resume=: is empty; allowed are a checkpoint, its folder, and auto")
    if args.warmup_epochs and args.lr_schedule == "released":
        parser.error(
            f"--warmup_epochs={args.warmup_epochs:g}: the released schedule has no warm-up; "
            "allowed are 0, or another --lr_schedule"
        )
    if args.overwrite and args.resume is not None:
        parser.error("--overwrite: contradicts --resume; allowed is one of them")
    if args.batch_size % args.accumulate or args.batch_size < 2 * args.accumulate:
        parser.error(
            f"--accumulate={args.accumulate}: must divide --batch_size={args.batch_size} into "
            "parts of at least 2 images"
        )
    if args.accumulate > 1 and args.cuda_graph:
        parser.error("--cuda_graph: holds one whole step; allowed with --accumulate=1")
    if args.augmentation == CROP_FLIP:
        unused = args.given & SIMCLR_FLAGS
        unused -= set() if args.early_share else {"early_share"}
        if unused:
            parser.error(
                f"--{min(unused)}: does nothing with --augmentation={CROP_FLIP}, whose views have "
                "the image's size and colours; allowed with batched and kornia"
            )
        args.crop_size = args.early_crop_size = None  # a recipe's, of the views that it names
        args.early_share = 0.0
    if args.cached_views and "views" in args:
        most = args.cached_views + 1
        if "views" in args.given and args.views > most:
            parser.error(
                f"--views={args.views}: --cached_views={args.cached_views} gives {most} views of "
                "each image; raise it, or lower --views"
            )
        args.views = min(args.views, most)  # a recipe's
    if args.cached_views:
        early = args.given & {"early_crop_size", "early_share"}
        if early:
            parser.error(f"--{min(early)}: kept views have one size; leave --cached_views away")
        args.early_share = 0.0
    if "early_crop_size" in args.given and not args.early_share:
        parser.error("--early_crop_size: does nothing without --early_share, 0.5 for one")
    if "early_share" in args.given and args.early_share and args.early_crop_size is None:
        parser.error("--early_share: does nothing without --early_crop_size, 16 for one")
    if "muon_lr" in args.given and args.optimizer != "muon":
        parser.error(f"--muon_lr: does nothing with --optimizer={args.optimizer}; allowed is muon")
    if "warmup_epochs" not in args.given:  # a recipe's, in a training that is shorter still
        args.warmup_epochs = min(args.warmup_epochs, args.epochs)
    if args.warmup_epochs > args.epochs:
        parser.error(
            f"--warmup_epochs={args.warmup_epochs:g}: must be at most --epochs={args.epochs}"
        )
    for name in ("crop_size", "early_crop_size"):
        taken = name in recipe and name not in args.given and args.augmentation != CROP_FLIP
        if taken:
            grown = recipe[name] * args.input_size / RECIPE_INPUT_SIZE
            setattr(args, name, max(8, round(grown)))
    if args.crop_size is None:
        args.crop_size = args.input_size
    if args.early_crop_size is None:
        args.early_crop_size = args.crop_size
    sizes = {args.input_size, args.crop_size, args.early_crop_size}
    if len(sizes) > 1 and has_fixed_size(args.arch):
        parser.error(
            f"--crop_size={args.crop_size}: {args.arch} is built for images of one size; allowed "
            f"for it and --early_crop_size is --input_size={args.input_size}"
        )
    if args.output_dir is None:
        what = args.method if _method(parser) == "SSP" else f"{code_bits(args)}bits"
        args.output_dir = Path("runs") / f"{_method(parser)}_{args.dataset}_{what}"
    return args


def parse_extract_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse extract_features.py's command line; exits with code 2 on bad input."""
    parser = extract_parser()
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    args.given = frozenset(
        word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")
    )
    args.validate, args.Top_N, args.eval_only = False, None, False
    _resolve_data(parser, args)
    _check_safetensors(parser, args)
    is_own = is_file(args.gallery) and args.gallery_weights is None
    if args.dataset in LANDMARK_SETS or not is_own:
        check_network(parser, args, "gallery")
    check_pretrained(parser, args, ["gallery"])
    if args.dataset in LANDMARK_SETS:
        if "input_size" in args.given:
            parser.error("--input_size: landmarks are embedded at their own aspect; --longest")
        if args.features_dir is None:
            args.features_dir = args.output.with_name(args.output.name + PIECES)
        return args
    if "amp" not in args.given:  # of small images a GPU has enough in float32
        args.amp = "off"
    unused = args.given & {"longest", "scales", "features_dir"}
    if unused:
        parser.error(
            f"--{min(unused)}: does nothing with --dataset={args.dataset}; allowed with "
            f"{' and '.join(LANDMARK_SETS)}"
        )
    return args


def parse_anchors_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse make_anchors.py's command line; exits with code 2 on bad input."""
    parser = anchors_parser()
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    _check_safetensors(parser, args)
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    unused = sorted(given & {"M", "bits", "iterations", "restarts", "max_points", "seed"})
    if unused and args.codebooks_of is not None:
        parser.error(
            f"--{unused[0]}: does nothing with --codebooks_of, whose codebooks are taken as they "
            "are; allowed with --features"
        )
    return args


def parse_landmarks_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse evaluate_landmarks.py's command line; exits with code 2 on bad input."""
    parser = landmarks_parser()
    args = parser.parse_args(argv)
    check_network(parser, args, "gallery")
    if args.query is not None:
        check_network(parser, args, "query")
    elif args.query_weights is not None:
        parser.error("--query_weights: of which network? Name it by --query")
    elif args.all_sides:
        parser.error("--all_sides: without --query there is one network, and all sides are one")
    check_pretrained(parser, args, ["gallery", "query"])
    if args.output is not None and args.output.suffix != ".json":
        parser.error(f"--output={args.output}: allowed is a name that ends in .json")
    return args


def check_pretrained(parser: Parser, args: argparse.Namespace, roles: Sequence[str]) -> None:
    """--pretrained is for a network by name without a file of weights."""
    networks = [(getattr(args, role), getattr(args, f"{role}_weights")) for role in roles]
    if args.pretrained and all(w is not None or n is None or is_file(n) for n, w in networks):
        parser.error(
            "--pretrained: does nothing here; allowed with a network of timm by name, without a "
            "file of its weights"
        )


def check_network(parser: Parser, args: argparse.Namespace, role: str) -> None:
    """Networks by name need weights, and files have them."""
    flag, name, weights = f"--{role}", getattr(args, role), getattr(args, f"{role}_weights")
    if name not in PUBLISHED and is_file(name):
        if weights is not None:
            parser.error(f"{flag}_weights: {flag}={name} is a file, which has its weights")
        return
    if name not in PUBLISHED:
        try:
            check_arch(name)
        except ValueError as error:
            parser.error(
                f"{flag}={name}: is no file, and neither of {' and '.join(PUBLISHED)}; {error}"
            )
    if weights is None and (name in PUBLISHED or not args.pretrained):
        allowed = "" if name in PUBLISHED else ", or --pretrained"
        parser.error(
            f"{flag}={name}: needs {flag}_weights, a file{allowed}; allowed without are "
            "checkpoints of SPQ, GPQ and SSP"
        )


def _check_safetensors(parser: Parser, args: argparse.Namespace) -> None:
    if args.output.suffix != ".safetensors":
        parser.error(f"--output={args.output}: allowed is a name that ends in .safetensors")


def _resolve_landmarks(args: argparse.Namespace, recipe: frozenset[str]) -> None:
    """What landmark sets, and views of landmarks, have where neither a flag nor a recipe says
    otherwise."""
    given = args.given | recipe
    found = LANDMARK_DEFAULTS.get(args.dataset)
    if found is not None:
        wanted = {"input_size": found.input_size, "batch_size": found.batch_size}
        wanted |= {"epochs": found.epochs, "augmentation": CROP_JITTER}
        vars(args).update({name: value for name, value in wanted.items() if name not in given})
        if "warmup_epochs" not in given:
            args.warmup_epochs = found.warmup_share * args.epochs
    if args.augmentation == CROP_JITTER:
        if "crop_min_area" not in given:
            args.crop_min_area = 0.8
        if found is not None and "jitter_strength" not in given:
            args.jitter_strength = found.jitter_strength


def _resolve_ssp(parser: Parser, args: argparse.Namespace, whole: bool) -> None:
    """What depends on --method."""
    if args.features is None and whole:
        parser.error("--features: the gallery's must be named; extract_features.py makes them")
    for name, methods in METHOD_FLAGS.items():
        if name in args.given and args.method not in methods:
            parser.error(
                f"--{name}: does nothing with --method={args.method}; allowed with "
                f"{' and '.join(methods)}"
            )
    pooled = args.arch not in OWN or args.stem != "cifar"
    unused = sorted(args.given & {"gem_p", "trainable_p"})
    if unused and not pooled:
        parser.error(f"--{unused[0]}: {args.arch} has an average at its end; allowed for timm's")
    if args.method == "ssp" and args.anchors is None and whole and not args.eval_only:
        parser.error("--anchors: --method=ssp needs them; make_anchors.py makes them")
    if args.old_margin is None:
        args.old_margin = OLD_MARGINS.get(args.method)
    if args.lr is None:
        args.lr = 1e-3 * args.batch_size / 256
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 2


def _method(parser: Parser) -> str:
    """main_SPQ.py's is SPQ."""
    return parser.prog.removeprefix("main_").removesuffix(".py")


def _resolve_data(parser: Parser, args: argparse.Namespace) -> None:
    """What depends on --dataset."""
    name = args.dataset
    is_cifar = name.startswith("cifar")
    if not is_cifar and "data_dir" not in args.given:
        parser.error(f"--dataset={name}: needs --data_dir, the folder that it is in")
    known = (PROTOCOLS | LANDMARK_PROTOCOLS)[name]
    if name in LANDMARK_SETS:
        for flag in ("image_dir", "if_download", "split"):
            if getattr(args, flag):
                parser.error(
                    f"--{flag}: --dataset={name} is read as its authors lay it out; --data_dir "
                    "says it all"
                )
        for flag in ("validate", "eval_only"):
            if getattr(args, flag):
                parser.error(
                    f"--{flag}: {name} has no queries to score with; evaluate_landmarks.py scores "
                    "on roxford5k and rparis6k"
                )
    if args.protocol is not None and args.split is not None:
        parser.error("--protocol: contradicts --split, which is of one already")
    if args.protocol not in (None, *known):
        parser.error(f"--protocol={args.protocol}: {name} has {', '.join(known)}")
    if args.protocol is None and args.split is None:
        usual = {"cifar10": "gpq", "folder": "class-folders"} if _method(parser) == "GPQ" else {}
        args.protocol = usual.get(name, known[0])
    if args.image_dir is not None and (is_cifar or name == "folder"):
        parser.error(f"--image_dir: --dataset={name} has no lists of paths; --data_dir says it all")
    if args.protocol == UNLABELLED and args.validate:
        parser.error(
            "--validate: a folder has no labels to score with; with a folder for each class pass "
            "--protocol=class-folders"
        )
    if args.input_size is None:
        args.input_size = 32 if is_cifar else 64
    if args.Top_N is None:
        args.Top_N = "all" if _method(parser) == "GPQ" else TOP_N.get(name, 1000)


def _resolve_model(parser: Parser, args: argparse.Namespace) -> None:
    """What depends on --arch."""
    if args.arch not in OWN:
        try:
            check_arch(args.arch)
        except ValueError as error:
            parser.error(f"--arch: {error}")
    if args.stem is None:
        args.stem = default_stem(args.arch)
    if args.arch == "cifar_vgg" and args.stem != "cifar":
        parser.error(f"--stem={args.stem}: cifar_vgg has no such; allowed is cifar")
    own = args.arch in OWN and args.stem == "cifar"
    if args.width != 64 and not own:
        parser.error(
            f"--width={args.width}: --arch={args.arch} --stem={args.stem} has one width; leave it "
            "away, or take --arch=resnet18 or cifar_vgg with --stem=cifar"
        )
    if args.pretrained and args.weights is not None:
        parser.error("--weights: contradicts --pretrained; allowed is one of them")
    if args.freeze_trunk and not (args.pretrained or args.weights or args.resume):
        parser.error(
            "--freeze_trunk: a trunk without weights would stay as it was drawn; add --pretrained "
            "or --weights"
        )
    if args.cached_views and not args.freeze_trunk:
        parser.error("--cached_views: a trunk that learns has no features to keep; --freeze_trunk")


# --- search.py ----------------------------------------------------------------------------------


def search_parser() -> Parser:
    """The parser of search.py: a subcommand for each thing one does with an index."""
    parser = Parser(
        prog="search.py",
        description="Search your own images: build an index with a trained model, ask it, keep it "
        "up to date, hand it to FAISS.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> Parser:
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=HelpFormatter, allow_abbrev=False
        )
        sub.add_argument("--index", type=Path, required=True, metavar="DIR", help="the index")
        return sub

    build = command("build", "Encode images and make an index of them; goes on after a kill.")
    build.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="trained model: checkpoint_last.pt or model.pt, or the folder of a run",
    )
    add_encoding_flags(build)
    build.add_argument(
        "--overwrite",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="replace an index, or give up an unfinished build, in --index",
    )

    add = command("add", "Add the images that the index does not have yet.")
    add_model_check_flag(add)
    add_encoding_flags(add)

    remove = command("remove", "Take images out of the index.")
    remove.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="as the index tells it, or as a file's path; a folder means all below it",
    )
    remove.add_argument(
        "--missing",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="also remove every image whose file is gone",
    )

    info = command("info", "Tell what the index is.")
    add_json_flag(info)
    command("verify", "Read every byte of the index and check it.")

    query = command("query", "Find the images most like a given one.")
    query.add_argument(
        "--image",
        required=True,
        metavar="FILE",
        help="an image, a folder of images, or a list of them; with an index of cifar10 also a "
        "name like test/00017.png",
    )
    query.add_argument("--k", type=positive_int, default=10, metavar="N", help="images wanted")
    add_json_flag(query)
    query.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw queries and results (.png, .svg, .pdf)"
    )
    query.add_argument(
        "--html", type=Path, metavar="FILE", help="write a web page that needs no other file"
    )
    query.add_argument(
        "--engine",
        choices=("auto", "faiss", "own"),
        default="auto",
        help="auto: FAISS where its ranking is exact, the project's own search otherwise",
    )
    query.add_argument(
        "--distance",
        choices=DISTANCES,
        default=None,
        help="squared_l2 is standard; l2 is what the released SPQ code ranks by; inner_product is "
        "GPQ's, which ranks its codes as squared_l2 does (default: the model's own, squared_l2 or "
        "inner_product)",
    )
    query.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="where the images lie now, for --figure and --html (default: where they were)",
    )
    add_model_check_flag(query)
    add_decoding_flags(query)

    export = command("export", "Write the codes as a FAISS index, and the paths beside it.")
    export.add_argument(
        "--to",
        required=True,
        choices=("faiss", "faiss-fastscan", "faiss-ivfpq"),
        help="faiss: IndexPQ, exact; faiss-fastscan: fastest, K = 16 only, approximate; "
        "faiss-ivfpq: inverted lists, for large sets",
    )
    export.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the FAISS index to write"
    )
    export.add_argument(
        "--nlist",
        type=positive_int,
        metavar="N",
        help="inverted lists of faiss-ivfpq (default: 4 sqrt(N), at most N / 64)",
    )
    export.add_argument(
        "--like",
        type=Path,
        metavar="FILE",
        help="faiss-ivfpq: take the centres of the lists from another export, so that both can be "
        "merged or searched together (default: k-means)",
    )
    export.add_argument(
        "--first_id",
        type=count,
        default=0,
        metavar="N",
        help="faiss-ivfpq: FAISS's id of the first image, so that parts of a set do not collide",
    )
    export.add_argument(
        "--overwrite",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="replace a file at --output",
    )
    return parser


def add_encoding_flags(parser: Parser) -> None:
    """Which images, and how they are encoded."""
    flag = parser.add_argument
    flag(
        "--images",
        required=True,
        metavar="DIR",
        help="a folder (with all below it), a text file with a path a line, or cifar10",
    )
    flag(
        "--if_download",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="with --images=cifar10: fetch it into --data_dir if it is not there",
    )
    flag(
        "--strict",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="stop at the first image that cannot be read, instead of leaving it out",
    )
    add_decoding_flags(parser)


def add_decoding_flags(parser: Parser) -> None:
    """How images are read, and where the model runs."""
    flag = parser.add_argument
    flag(
        "--data_dir",
        type=Path,
        default=Path("./datasets"),
        metavar="DIR",
        help="where CIFAR-10 is",
    )
    flag(
        "--max_pixels",
        type=positive_int,
        default=MAX_PIXELS,
        metavar="N",
        help="width * height of the largest image that is decoded; decoding takes up to 16 bytes a "
        "pixel in each of the --num_workers threads",
    )
    flag(
        "--batch_size",
        type=positive_int,
        default=128,
        metavar="N",
        help="images that go through the network together",
    )
    flag(
        "--num_workers",
        type=positive_int,
        default=None,
        metavar="N",
        help="threads that decode (default: one a core)",
    )
    add_device_flags(flag, "GPU to use (without torchrun)")


def add_model_check_flag(parser: Parser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=None,
        metavar="FILE",
        help="only to make sure that the index is of this model; it has its own copy (default: no "
        "such check)",
    )


def add_json_flag(parser: Parser) -> None:
    parser.add_argument(
        "--json",
        action=BooleanFlag,
        default=False,
        metavar="BOOL",
        help="print one JSON document",
    )


def parse_search_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse search.py's command line; exits with code 2 on bad input."""
    parser = search_parser()
    args = parser.parse_args(argv)
    words = [getattr(args, "images", None), getattr(args, "image", None)]
    if "" in [*words, *getattr(args, "paths", ())]:
        parser.error("an empty path: allowed are names of files and folders")
    figure = getattr(args, "figure", None)
    if figure is not None and figure.suffix.lower() not in FIGURE_ENDINGS:
        parser.error(f"--figure={figure}: allowed endings are {', '.join(FIGURE_ENDINGS)}")
    if args.command == "remove" and not args.paths and not args.missing:
        parser.error("remove: nothing to remove; allowed are paths, and --missing")
    if args.command == "export":
        lists = [name for name in ("nlist", "like", "first_id") if getattr(args, name)]
        if lists and args.to != "faiss-ivfpq":
            parser.error(f"--{lists[0]}: only --to=faiss-ivfpq has inverted lists")
        if args.nlist and args.like:
            parser.error("--nlist: contradicts --like, which has its number of lists")
    return args
