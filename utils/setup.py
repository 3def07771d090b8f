"""What every main script does before its own work: device, ranks, seed, folder, checkpoint."""

import json
import os
import shutil
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from utils.checkpoint import LAST, check_same, find_checkpoint, load_checkpoint, put_text
from utils.device import choose_amp, choose_device, choose_kernels
from utils.distributed import Ranks
from utils.errors import UserError
from utils.logging import plain

SPLIT = "split.json"  # in a run's folder: the first line of the split it used
# flags that older checkpoints do not have
OLDER = {"stem": "cifar", "split": None, "split_seed": 0, "image_dir": None, "dataset": "cifar10"}
OLDER |= {"freeze_trunk": False, "cached_views": 0}
# and GPQ's, whose views were of one kind
OLDER_GPQ = {"augmentation": "crop-flip", "crop_min_area": 0.08, "jitter_strength": 1.0}
# flags that give a model its shape: a checkpoint fits only if they are equal
SHAPE_FLAGS = ["arch", "stem", "width", "N_books", "N_words", "L_word", "quantizer"]
SHAPE_FLAGS += ["method", "gem_p", "trainable_p"]
# flags that an evaluation takes from the checkpoint unless they are given
MODEL_FLAGS = [*SHAPE_FLAGS, "input_size", "batch_size", "limit_train", "epochs", "validate"]
MODEL_FLAGS += ["freeze_trunk", "soft_quantization_scale", "n_classes", "tuples"]
MODEL_FLAGS += ["recipe", "augmentation", "optimizer"]  # to be printed
# and which it takes unless any of them is given
SPLIT_FLAGS = ["protocol", "split", "split_seed", "labels_per_class"]
# flags that may differ on a resume without a word
FREE_FLAGS = {
    "resume",
    "output_dir",
    "data_dir",
    "image_dir",
    "cache_dir",
    "skip_missing",
    "max_pixels",
    "if_download",
    "max_steps",
    "max_minutes",
    "cuda_graph",
    "deterministic",
    "eval_only",
    "eval_epoch",
    "checkpoint_every",
    "log_every",
    "gpu_id",
    "device",
    "limit_db",
    "limit_query",
    "num_workers",
    "overwrite",
    "compile",
    "distance",
    "Top_N",
}


class Split(Protocol):
    """Images, their labels and what each is for, `data.manifest.Split` for one."""

    sha256: str

    def head(self) -> dict:
        """What it is, in JSON's types, its "classes" among it."""

    def summary(self) -> str:
        """The same in a line."""


@dataclass(frozen=True)
class Run:
    """One run of a main script.

    Attributes:
        method: "SPQ", "GPQ" or "SSP".
        args: the flags, `amp` resolved to what is used.
        device: where it computes.
        ranks: this process among the others.
        checkpoint: state to go on from, or None.
    """

    method: str
    args: Namespace
    device: torch.device
    ranks: Ranks
    checkpoint: dict | None

    def with_flags(self, **flags: str | int | float) -> "Run":
        """This run with more that decides what it is, kept as its flags are."""
        return replace(self, args=Namespace(**vars(self.args) | flags))

    def with_data(self, split: Split, used: Split, left_out: int) -> "Run":
        """This run with the split it uses in its flags; says it and keeps it in `split.json`.

        Args:
            split: what the flags asked for, as two people can share it.
            used: the same without images that could not be read.
            left_out: how many these are.
        Raises:
            UserError: if the run that is gone on with used another one, or labels are not below
                --num_cls.
        """
        head = split.head()
        used_sha256 = head["sha256"] if used is split else used.sha256
        args, changed = self.args, self.with_flags(split_sha256=used_sha256)
        C = len(head["classes"])
        if args.num_cls is not None and args.num_cls < C:
            raise UserError(
                f"--num_cls={args.num_cls}: the data set has {C} classes; allowed is {C} or more"
            )
        saved = self.checkpoint["args"].get("split_sha256") if self.checkpoint else None
        other = saved not in (None, used_sha256)
        if other and not args.eval_only:
            raise UserError(
                f"--data_dir={args.data_dir}: its split is {used_sha256[:16]}, and the run "
                f"that --resume={args.resume} goes on with began with {saved[:16]}; give back the "
                "flags (--labels_per_class, too), images and lists it had, or begin another run"
            )
        if self.ranks.is_main:
            without = f", without {left_out} images that cannot be read" if left_out else ""
            print(f"{used.summary()}, sha256 {head['sha256'][:16]}{without}")
            if other:
                print("This is another split than the one that the model was trained by.")
            if not args.eval_only:
                head |= {"left_out": left_out, "used_sha256": used_sha256}
                put_text(args.output_dir / SPLIT, json.dumps(head, indent=2) + "\n")
        return changed


def start_run(method: str, args: Namespace) -> Run:
    """Choose device and precision, join the other processes, seed, and read the checkpoint.

    Raises:
        UserError: if the GPU is not there, the output folder cannot be used or holds another run,
            or the checkpoint does not fit.
    """
    ranks = Ranks.from_environment()
    device = choose_device(args, ranks)
    ranks.connect(device)
    parts = ranks.world_size * args.accumulate
    if args.accumulate > 1 and args.batch_size % parts:
        raise UserError(
            f"--batch_size={args.batch_size}: must be a multiple of {parts}, --accumulate times "
            f"the {ranks.world_size} processes"
        )
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if args.compile and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(
            "--compile=True: needs a C++ compiler to train on the CPU; install g++, or leave "
            "--compile away"
        )
    checkpoint = _find_run(method, args, ranks)
    given = args.given
    args = Namespace(**{k: v for k, v in vars(args).items() if k != "given"})
    if args.eval_only:  # what was not said is as the model was trained
        saved = checkpoint["args"]
        if saved["dataset"] != args.dataset and "dataset" not in given:
            raise UserError(
                f"--dataset={args.dataset}: {checkpoint['path']} was trained on "
                f"{saved['dataset']}; say which is meant, --dataset={saved['dataset']} with its "
                "--data_dir for one"
            )
        taken = list(MODEL_FLAGS)
        if saved["dataset"] == args.dataset and not given.intersection(SPLIT_FLAGS):
            taken += SPLIT_FLAGS
        found = {name: saved[name] for name in taken if name not in given and name in saved}
        found |= {"split": Path(found["split"])} if found.get("split") else {}
        args = Namespace(**{**vars(args), **found})
    if checkpoint is not None:
        why = "a model of another shape does not fit"
        known = [name for name in SHAPE_FLAGS if name in args]
        check_same(checkpoint["args"], args, known, why, Path(checkpoint["path"]))
        _say_what_changed(args, checkpoint, ranks)
    amp = args.amp
    if amp == "auto" and checkpoint is not None:
        amp = checkpoint["args"].get("amp", "auto")  # as the run began, so that it ends the same
        amp = "auto" if amp == "fp16" and device.type == "cpu" else amp
    amp = ranks.collect(choose_amp(amp, device))[0]
    args = Namespace(**{**vars(args), "amp": amp})
    choose_kernels(args.deterministic)
    torch.manual_seed(args.seed)  # of the weights; views have seeds of their own
    if ranks.is_main:
        print(" ".join(f"{name}={value}" for name, value in plain(args).items()))
        precision = "float32" if amp == "off" else amp
        print(f"{method} on {device}, trunk in {precision}, output in {args.output_dir}")
    return Run(method, args, device, ranks, checkpoint)


def _find_run(method: str, args: Namespace, ranks: Ranks) -> dict | None:
    """The checkpoint to go on from, if any; refuses to lose a run that is in the way."""
    output_dir = args.output_dir
    alone = args.eval_only  # which needs no more than weights
    path = find_checkpoint(args.resume, output_dir) if args.resume else None
    ranks.barrier()  # nobody writes before all have looked
    _check_output(args, path)
    if path is None:
        if args.eval_only:
            raise UserError(
                f"--resume={args.resume}: no checkpoint in --output_dir={output_dir} to evaluate"
            )
        if args.resume and ranks.is_main:
            print(f"--resume=auto: no checkpoint in {output_dir} yet, starting from the beginning")
        return None
    checkpoint = load_checkpoint(path, weights_alone=alone)
    older = OLDER | (OLDER_GPQ if checkpoint["method"] == "GPQ" else {})
    saved = older | checkpoint["args"]
    protocol = "all" if saved["dataset"] == "folder" else "spq"
    checkpoint["args"] = {"protocol": protocol} | saved
    if checkpoint["method"] != method:
        raise UserError(
            f"--resume={path}: is a checkpoint of {checkpoint['method']}, not of {method}"
        )
    return checkpoint


def _say_what_changed(args: Namespace, checkpoint: dict, ranks: Ranks) -> None:
    if not ranks.is_main:
        return
    now, saved = plain(args), checkpoint["args"]
    changed = [
        f"--{name}={now[name]} (was {saved.get(name)})"
        for name in now
        if name not in FREE_FLAGS and now[name] not in (saved.get(name, now[name]), "auto")
    ]
    note = f", with changed {', '.join(changed)}" if changed and not args.eval_only else ""
    verb = "Evaluating" if args.eval_only else "Going on from"
    step = checkpoint["step"]
    where = "weights of a step that is not told" if step is None else f"step {step}"
    print(f"{verb} {checkpoint['path']}, {where}{note}")


def _check_output(args: Namespace, resumed: Path | None) -> None:
    output_dir = args.output_dir
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir={output_dir}: cannot be made: {error}") from error
    if not os.access(output_dir, os.W_OK | os.X_OK):
        raise UserError(
            f"--output_dir={output_dir}: cannot be written; allowed is a folder of yours"
        )
    old = output_dir / LAST
    goes_on = resumed is not None and resumed.resolve().parent == output_dir.resolve()
    if old.exists() and not (goes_on or args.overwrite or args.eval_only):
        raise UserError(
            f"--output_dir={output_dir}: holds a run already ({old}). Go on with it by "
            "--resume=auto, choose another folder, or lose it by --overwrite"
        )
