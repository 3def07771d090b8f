"""Networks that embed images, by name or by file, for extract_features.py and
evaluate_landmarks.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from data.features import identify_trunk
from models import OwnGallery, build_embedding, build_pooled
from models.embedding import PUBLISHED, load_published
from models.trunks import load_weights
from utils.checkpoint import LAST, WEIGHTS, file_of_run, load_checkpoint
from utils.errors import UserError
from utils.flags import is_file
from utils.pretrained import published_weights, read_weights
from utils.trained import build_with_weights, load_trained


@dataclass(frozen=True)
class Network:
    """What embeds images.

    Attributes:
        model: in evaluation mode; its `describe` gives embeddings (N, D) of unit length.
        told: it, in words.
        identity: SHA-256 of its weights.
        squeezed: side of the squares that it takes, pixels; None: it takes images as they are.
        usual: side of the squares that its weights learned from; None: it is not known.
        learned_from: of SSP's, whose features it learned from, in words.
    """

    model: nn.Module
    told: str
    identity: str
    squeezed: int | None = None
    learned_from: str | None = None
    usual: int | None = None


def load_network(
    name: str,
    weights: Path | None,
    flag: str,
    pretrained: bool = False,
    input_size: int | None = None,
) -> Network:
    """The network that --gallery or --query mean, on the CPU.

    Args:
        name: of a published network, of one of timm's, or a file.
        weights: file of the weights of a network by name.
        flag: for messages.
        pretrained: a network by name takes what its own authors published.
        input_size: side of the images, for networks that are built for one size.
    Raises:
        UserError: if a file is missing or damaged, or weights do not fit.
    """
    if weights is not None:
        found = load_by_name(name, weights, flag, input_size)
    elif pretrained and not is_file(name):
        found = load_pooled(name, None, flag, "--pretrained", input_size)
    else:
        found = load_own(Path(name), flag)
    if not all(value.isfinite().all() for value in found.model.state_dict().values()):
        raise UserError(f"{flag}={name}: has weights that are not finite")
    return found


def load_by_name(name: str, path: Path, flag: str, input_size: int | None = None) -> Network:
    """A network with published weights: an embedding network, or with weights of a trunk alone a
    trunk whose features are pooled."""
    weights = read_weights(path, f"{flag}_weights")
    kind, arch = PUBLISHED.get(name, ("gem", name))
    # both projections, a linear layer and a 1x1 convolution, are (D, C, ...)
    whiten = [v for n, v in weights.items() if n.endswith("whiten.weight") and v.dim() >= 2]
    if not whiten and name not in PUBLISHED:
        return load_pooled(name, weights, flag, f"{flag}_weights={path}", input_size)
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


def load_pooled(
    name: str, weights: Mapping[str, Tensor] | None, flag: str, source: str, input_size: int | None
) -> Network:
    """A network of timm as it was published; its weights are fetched if they are not given."""
    try:
        model, size, one_size = build_pooled(name, input_size)
    except ValueError as error:
        raise UserError(f"{flag}={name}: {error}") from error
    if weights is None:
        source, weights = published_weights(name, flag, f"{flag}_weights")
    try:
        load_weights(model.trunk, weights)
    except Exception as error:  # timm's readers of foreign names trip over whatever is missing
        detail = " ".join(str(error).split())[:400]
        raise UserError(f"{source}: does not fit {flag}={name}: {detail}") from error
    identity = identify_trunk(model)
    told = f"{name} {identity[:16]}"
    return Network(model.eval(), told, identity, size if one_size else None, usual=size)


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
