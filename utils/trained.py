"""A trained model as others use it: loaded from its file, ready to encode, known by its weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models import (
    GPQ,
    SPQ,
    AsymmetricNetwork,
    QuantizationNetwork,
    build_asymmetric,
    build_gpq,
    build_spq,
)
from utils.checkpoint import FORMAT as CHECKPOINT
from utils.checkpoint import LAST, MODEL, VERSION, WEIGHTS, file_of_run, read_torch, write_torch
from utils.errors import UserError

# what besides the weights decides which code an image gets
SHAPE = ("arch", "width", "quantizer", "N_books", "N_words", "L_word", "input_size")
DECISIVE = {"SPQ": SHAPE, "GPQ": (*SHAPE, "soft_quantization_scale")}  # by method


@dataclass(frozen=True)
class Trained:
    """A trained network and what it was trained as.

    Attributes:
        model: in evaluation mode, on the CPU, float32.
        method: "SPQ" or "GPQ".
        args: the flags it was trained with, as JSON holds them.
        identity: SHA-256 over the weights and over what else decides a code; two models with the
            same identity give the same codes.
    """

    model: QuantizationNetwork
    method: str
    args: dict
    identity: str

    @property
    def input_size(self) -> int:
        """Side that images are encoded at, pixels."""
        return self.args["input_size"]


def load_trained(path: Path, flag: str = "--checkpoint") -> Trained:
    """Load a training checkpoint, or the weights that `save_trained` wrote.

    Args:
        path: the file, or a run's folder: its `checkpoint_last.pt`, or else its `model.pt`, whole
            or in parts.
        flag: for messages.
    Raises:
        UserError: if there is no such file, it is damaged, or it is of another program.
    """
    try:
        if path.is_dir():
            found = file_of_run(path, (LAST, WEIGHTS))
            if found is None:
                raise UserError(f"{flag}={path}: holds neither {LAST} nor {WEIGHTS}")
            path = found
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read: {error}") from error
    state = read_torch(path, flag)
    if not isinstance(state, dict) or state.get("format") not in (CHECKPOINT, MODEL):
        raise UserError(
            f"{flag}={path}: is a torch file but not of this project; allowed is a {LAST} or "
            "model.pt that a main script or search.py wrote"
        )
    if state.get("version") != VERSION:
        raise UserError(
            f"{flag}={path}: has version {state.get('version')}; this code reads {VERSION}"
        )
    method = state.get("method")
    if method not in DECISIVE:
        raise UserError(
            f"{flag}={path}: is a model of {method}; allowed are {' and '.join(DECISIVE)}"
        )
    try:
        args = dict(state["args"])
        model = build_with_weights(method, args, state["model"])
        identity = identify(method, args, model)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{flag}={path}: is damaged: its weights and its flags do not fit ({detail})"
        ) from error
    if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
        raise UserError(f"{flag}={path}: has weights that are not finite; train it again")
    return Trained(model.float().eval(), method, args, identity)


def save_trained(path: Path, trained: Trained) -> None:
    """Write weights and flags without the optimizer's state, a third of a checkpoint's size.

    Raises:
        OSError: if it cannot be written; an old file stays.
    """
    content = {"method": trained.method, "args": trained.args, "model": trained.model.state_dict()}
    write_torch(path, {"format": MODEL, "version": VERSION, **content})


def identify(method: str, args: Mapping, model: QuantizationNetwork) -> str:
    """SHA-256 hex digest of all that decides which code an image gets."""
    decisive = [args.get(name) for name in DECISIVE[method]]
    digest = hashlib.sha256(json.dumps([method, decisive]).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_with_weights(
    method: str, args: Mapping, weights: Mapping[str, Tensor]
) -> QuantizationNetwork | AsymmetricNetwork:
    """The network of a file: of these flags, with these weights.

    The file must not be able to ask for a network that fills the memory, so one without memory is
    built first.

    Raises:
        AttributeError, KeyError, RuntimeError, TypeError, ValueError: if flags and weights do not
            fit.
    """
    values = weights.values()
    there = [v.untyped_storage() for v in values if not v.is_meta]
    stored = {storage.data_ptr(): storage.nbytes() for storage in there}
    if sum(v.numel() * v.element_size() for v in values) > sum(stored.values()):
        raise ValueError("weights that are larger than their file")
    size = sum(v.numel() for v in values)
    if type(args["input_size"]) is not int or not 8 <= args["input_size"] <= 1024:
        raise ValueError(f"input_size {args['input_size']}")
    with torch.device("meta"), _RealSteps():
        model = build_from_flags(method, args)
    if size != sum(value.numel() for value in model.state_dict().values()):
        raise ValueError("weights of another shape")
    model = build_from_flags(method, args)
    model.load_state_dict(weights)
    return model


class _RealSteps(TorchFunctionMode):
    """`torch.linspace` with numbers where the device is "meta": older timm reads rates out of it
    while it builds a network."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        kwargs = dict(kwargs or {}) | ({"device": "cpu"} if func is torch.linspace else {})
        return func(*args, **kwargs)


def build_from_flags(method: str, args: Mapping) -> QuantizationNetwork | AsymmetricNetwork:
    """An untrained network of a method, of the shape that its main script's flags name.

    Raises:
        KeyError, ValueError: if a flag is missing, or there is no such network.
    """
    return {"SPQ": _build_spq, "GPQ": _build_gpq, "SSP": _build_ssp}[method](args)


def _build_spq(args: Mapping) -> SPQ:
    return build_spq(
        args["arch"],
        args["width"],
        args["quantizer"],
        M=args["N_books"],
        K=args["N_words"],
        d=args["L_word"],
        alpha=args["soft_quantization_scale"],
        stem=args.get("stem"),  # older ones have no such flag
        input_size=args["input_size"],
    )


def _build_gpq(args: Mapping) -> GPQ:
    return build_gpq(
        args["arch"],
        args["width"],
        M=args["N_books"],
        K=args["N_words"],
        d=args["L_word"],
        classes=args["n_classes"],
        alpha=args["soft_quantization_scale"],
        stem=args["stem"],
        input_size=args["input_size"],
    )


def _build_ssp(args: Mapping) -> AsymmetricNetwork:
    return build_asymmetric(
        args["arch"],
        args["width"],
        args["embedding_dim"],
        args["n_classes"],
        transforms=args["method"] == "lce",
        p=args["gem_p"],
        trainable_p=args["trainable_p"],
        stem=args["stem"],
        input_size=args["input_size"],
    )
