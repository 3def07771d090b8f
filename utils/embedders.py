"""Networks that embed landmark images, by name or by file, for evaluate_landmarks.py and
extract_features.py."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from data.features import identify_trunk
from models import OwnGallery, build_embedding
from models.embedding import PUBLISHED, load_published
from utils.checkpoint import LAST, WEIGHTS, file_of_run, load_checkpoint
from utils.errors import UserError
from utils.pretrained import read_weights
from utils.trained import build_with_weights, load_trained


@dataclass(frozen=True)
class Network:
    """What embeds images.

    Attributes:
        model: in evaluation mode; its `describe` gives embeddings (N, D) of unit length.
        told: it, in words.
        identity: SHA-256 of its weights.
        squeezed: side of the squares that it takes, pixels; None: it takes images as they are.
        learned_from: of SSP's, whose features it learned from, in words.
    """

    model: nn.Module
    told: str
    identity: str
    squeezed: int | None = None
    learned_from: str | None = None


def load_network(name: str, weights: Path | None, flag: str) -> Network:
    """The network that --gallery or --query mean, on the CPU.

    Raises:
        UserError: if a file is missing or damaged, or weights do not fit.
    """
    found = load_own(Path(name), flag) if weights is None else load_by_name(name, weights, flag)
    if not all(value.isfinite().all() for value in found.model.state_dict().values()):
        raise UserError(f"{flag}={name}: has weights that are not finite")
    return found


def load_by_name(name: str, path: Path, flag: str) -> Network:
    """A network with published weights."""
    weights = read_weights(path, f"{flag}_weights")
    kind, arch = PUBLISHED.get(name, ("gem", name))
    # both projections, a linear layer and a 1x1 convolution, are (D, C, ...)
    whiten = [v for n, v in weights.items() if n.endswith("whiten.weight") and v.dim() >= 2]
    try:
        model = build_embedding(kind, arch, D=len(whiten[0]) if whiten else 2048)
    except ValueError as error:
        raise UserError(f"{flag}={name}: {error}") from error
    try:
        load_published(model, weights)
    except ValueError as error:
        raise UserError(f"{flag}_weights={path}: does not fit {flag}={name}: {error}") from error
    identity = identify_trunk(model)
    return Network(model.eval(), f"{name} {identity[:16]}", identity)


def load_own(path: Path, flag: str) -> Network:
    """A network that this project trained: SPQ's or GPQ's descriptors, or SSP's query network."""
    try:
        file = file_of_run(path, (LAST, WEIGHTS)) if path.is_dir() else path
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read: {error}") from error
    if file is None:
        raise UserError(f"{flag}={path}: holds neither {LAST} nor {WEIGHTS}")
    state = load_checkpoint(file, flag, weights_alone=True)
    method, args = state["method"], state["args"]
    if method == "SSP":
        model = _build_ssp(state, f"{flag}={path}").eval()
        squeezed = args["input_size"] if model.pool is None else None
        identity = identify_trunk(model)
    else:
        trained = load_trained(file, flag)
        model, squeezed = OwnGallery(trained.model), trained.input_size
        identity = trained.identity  # by which extract_features.py names it
    told = f"{method} {args['arch']} {identity[:16]}"
    return Network(model, told, identity, squeezed, args.get("gallery"))


def _build_ssp(state: dict, where: str) -> nn.Module:
    try:
        return build_with_weights("SSP", state["args"], state["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where}: is damaged: its weights and its flags do not fit ({detail})"
        ) from error
