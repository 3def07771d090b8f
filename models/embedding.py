"""Networks for asymmetric retrieval: images to embeddings of unit length.

A large gallery network embeds the database, a light query network learns to land in its space.
Images are (N, 3, H, W) in [0, 1]; the networks normalise them.
"""

import copy
import difflib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.network import QuantizationNetwork
from models.pooling import GeM
from models.trunks import TimmTrunk, build_trunk, check_arch, has_fixed_size

# networks whose weights are published: name -> kind, trunk
PUBLISHED = {"r101-delg": ("delg", "resnet101"), "r101-gem": ("gem", "resnet101")}
KINDS = ("delg", "gem", "query", "small")
TRIAL_SIZE = 128  # pixels; a network is tried with when it is built, some take no fewer than 75


class MapTrunk(TimmTrunk):
    """A convolutional network of timm up to its last feature map.

        map = net.forward_features( (images - mean) / std )

    mean and std are those of the model's own data configuration. What the network has behind its
    map (a last norm, a convolution of the pooled map) is taken away: it would never learn.
    `models.trunks.load_weights` takes it like any trunk of timm.

    Args:
        arch: name in timm.
    Attributes:
        feature_dim: C.
    Raises:
        ValueError: if there is no such model, it takes images of one size only, or what it gives is
            no map (N, C, H, W).
    """

    def __init__(self, arch: str) -> None:
        import timm  # here, as in models.trunks

        check_arch(arch)
        if not timm.is_model(arch.partition(".")[0]):
            raise ValueError(f"{arch} is not timm's; allowed are its convolutional networks")
        if has_fixed_size(arch):
            raise ValueError(f"{arch} takes images of one size; convolutional networks take any")
        super().__init__(arch, "imagenet", TRIAL_SIZE)
        self.feature_dim = self.net.num_features
        self._keep_what_is_used(arch)

    def _try(self, arch: str, input_size: int) -> None:
        """Nothing: `_keep_what_is_used` tries the network, on the meta device too."""

    @torch.enable_grad()
    def _keep_what_is_used(self, arch: str) -> None:
        """Put identities in place of the children whose weights the map does not depend on."""
        self.eval()  # the image that tries it must not move running statistics
        try:
            out = self(torch.zeros(1, 3, TRIAL_SIZE, TRIAL_SIZE, device=self.mean.device))
        except Exception as error:  # each network trips over a wrong size in its own way
            detail = str(error) or type(error).__name__
            raise ValueError(f"{arch} takes no images of {TRIAL_SIZE} pixels: {detail}") from error
        if out.dim() != 4 or out.shape[1] != self.feature_dim:
            want = f"(1, {self.feature_dim}, H, W)"
            raise ValueError(f"{arch} gives {tuple(out.shape)} for an image, no map {want}")
        names, parameters = zip(*self.net.named_parameters(), strict=True)
        grads = torch.autograd.grad(out.sum(), parameters, allow_unused=True)
        unused = [name for name, grad in zip(names, grads, strict=True) if grad is None]
        used = {name.partition(".")[0] for name in names if name not in unused}
        partly = [name for name in unused if name.partition(".")[0] in used]
        if partly:
            raise ValueError(f"{arch}'s map does not depend on {', '.join(partly[:4])}")
        children = {name.partition(".")[0] for name in unused}
        for child in children:
            setattr(self.net, child, nn.Identity())
        # load_weights passes over what belongs to the classifier
        head = self.net.pretrained_cfg.get("classifier") or ()
        head = (head,) if isinstance(head, str) else tuple(head)
        self.net.pretrained_cfg["classifier"] = (*head, *sorted(children))
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> map (N, feature_dim, h, w)."""
        return self.net.forward_features((images - self.mean) / self.std)


class EmbeddingNetwork(nn.Module):
    """Images to embeddings of unit length.

    With pooling, from the trunk's map:

        map = relu(expand(trunk(images)))               the 1x1 convolution only with `channels`
        x   = l2( whiten( l2( pool(map) ) ) )

    Without, from the features (N, F) that the trunk gives: x = l2( whiten( trunk(images) ) ).
    `whiten` is linear with a bias; R101-DELG's 1x1 convolution of the pooled 1x1 map is the same.

    Args:
        trunk: maps images to (N, trunk.feature_dim, h, w), or to (N, trunk.feature_dim) without
            `pool`.
        D: dimension of the embeddings.
        pool: map (N, C, h, w) -> (N, C).
        channels: output of the 1x1 convolution, without bias; None: there is none.
    Attributes:
        embedding_dim: D.
    Raises:
        ValueError: if D or channels is not positive, or there are channels but no pooling.
    Source: SSP, section 4 and its released networks, whose 1x1 convolution has no bias. Departures:
        whitening and both scalings are float32 under mixed precision.
    """

    def __init__(
        self,
        trunk: nn.Module,
        D: int = 2048,
        pool: nn.Module | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        if D < 1:
            raise ValueError(f"the embeddings' dimension D must be above 0, not {D}")
        if channels is not None and (channels < 1 or pool is None):
            raise ValueError(f"channels must be above 0 and need a pooling; got {channels}, {pool}")
        self.trunk, self.pool, self.expand = trunk, pool, None
        if channels is not None:
            self.expand = nn.Conv2d(trunk.feature_dim, channels, 1, bias=False)
        self.whiten = nn.Linear(channels or trunk.feature_dim, D)
        self.embedding_dim = D

    def describe(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1], of any size -> embeddings (N, D), float32, unit length."""
        x = self.trunk(images)  # (N, C, h, w), or (N, F)
        if self.expand is not None:
            x = F.relu(self.expand(x))  # (N, channels, h, w); GeM would raise what is below eps too
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round x to 8 bits
            if self.pool is not None:
                x = F.normalize(self.pool(x), dim=1)  # (N, C)
            x = self.whiten(x.to(self.whiten.weight.dtype))
            return F.normalize(x.float(), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """As `describe`."""
        return self.describe(images)


class OwnGallery(nn.Module):
    """A trained network of this project as a gallery: its descriptors, scaled to unit length.

        x = l2( model.describe(images) )

    The scaling is of the whole descriptor; a GPQ network's sub-vectors stay of one length. It is
    frozen, and the model that it is given with it: no gradient, always in evaluation mode.

    Args:
        model: an SPQ or GPQ network.
    Attributes:
        embedding_dim: D = M * d.
    """

    def __init__(self, model: QuantizationNetwork) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.embedding_dim = model.quantizer.M * model.quantizer.d

    def train(self, mode: bool = True) -> "OwnGallery":
        """Takes the mode, but the model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> embeddings (N, D), float32, unit length."""
        return F.normalize(self.model.describe(images).float(), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """As `describe`."""
        return self.describe(images)


class PooledGallery(nn.Module):
    """A published trunk as a gallery, as it is: its pooled features, scaled to unit length.

        x = l2( pool(trunk(images)) )       a convolutional network's map, pooled by GeM
        x = l2( trunk(images) )             without `pool`: the features that the trunk gives

    There is no whitening: nothing in it has learned to retrieve. It is frozen.

    Args:
        trunk: maps images to (N, trunk.feature_dim, h, w), or to (N, trunk.feature_dim) without
            `pool`.
        pool: map (N, C, h, w) -> (N, C).
    Attributes:
        embedding_dim: trunk.feature_dim.
    """

    def __init__(self, trunk: nn.Module, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk, self.pool = trunk, pool
        self.embedding_dim = trunk.feature_dim
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> embeddings (N, D), float32, unit length."""
        x = self.trunk(images)
        with torch.autocast(x.device.type, enabled=False):
            x = (x if self.pool is None else self.pool(x)).float()
            return F.normalize(x, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """As `describe`."""
        return self.describe(images)


def build_pooled(arch: str, input_size: int | None = None) -> tuple[PooledGallery, int, bool]:
    """Any model of timm as a gallery, untrained.

    Args:
        arch: name in timm.
        input_size: side of the images; None: what its published weights learned from.
    Returns:
        The network, that side, and whether it takes images of one size only. A network that takes
        any is pooled by GeM of p = 3.
    Raises:
        ValueError: if there is no such model, or it cannot be had with that size.
    """
    import timm

    check_arch(arch)
    if not timm.is_model(arch.partition(".")[0]):
        raise ValueError(f"{arch} is not timm's")
    config = timm.get_pretrained_cfg(arch)
    size = input_size or (config.input_size[-1] if config is not None else 224)
    try:
        return PooledGallery(MapTrunk(arch), GeM(3.0)), size, False
    except ValueError:
        # a transformer; or what gives no map of features, or does without a part of itself
        return PooledGallery(build_trunk(arch, input_size=size)), size, True


def build_embedding(
    kind: str,
    arch: str,
    width: int = 64,
    D: int = 2048,
    p: float = 3.0,
    trainable_p: bool = False,
    channels: int = 2048,
    stem: str | None = None,
    input_size: int = 32,
) -> EmbeddingNetwork:
    """The embedding network of that kind, untrained.

    | kind  | network                                                                          |
    |-------|----------------------------------------------------------------------------------|
    | delg  | gallery: map, GeM of a fixed p, whitening; R101-DELG with arch `resnet101`, p 3   |
    | gem   | gallery: the same with a p that learns; R101-GeM with arch `resnet101`            |
    | query | map, 1x1 convolution to `channels`, ReLU, GeM, whitening; SSP's query network     |
    |       | with `mobilenetv2_100` or `efficientnet_b3`                                      |
    | small | `build_trunk`'s features, whitening: for images of 32 pixels                      |

    Args:
        kind: as above.
        arch: a convolutional network of timm; for `small` whatever `build_trunk` has.
        width: channels of our own trunks' first stage (`small` only).
        D: dimension of the embeddings.
        p: exponent of GeM, or where it starts.
        trainable_p: whether a query network's p learns.
        channels: output of a query network's 1x1 convolution.
        stem, input_size: as for `build_trunk` (`small` only).
    Raises:
        ValueError: naming what is known, if kind or arch is not; or if a number is not positive.
    Source: SSP, section 4. Departures: its released code takes `tf_efficientnet_b3`, with
        TensorFlow's padding.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"; similar is {near[0]}" if near else ""
        raise ValueError(f"unknown kind {kind!r}{hint}; known: {', '.join(KINDS)}")
    for name, value in (("width", width), ("D", D), ("channels", channels)):
        if value < 1:
            raise ValueError(f"{name} must be above 0, not {value}")
    if kind == "small":
        return EmbeddingNetwork(build_trunk(arch, width, stem, input_size), D)
    if width != 64:
        raise ValueError(f"width {width}: only the kind small has one")
    pool = GeM(p, trainable=kind == "gem" or (kind == "query" and trainable_p))
    return EmbeddingNetwork(MapTrunk(arch), D, pool, channels if kind == "query" else None)


# --- published weights --------------------------------------------------------------------------

PREFIXES = ("module", "backbone", "globalmodel")
# torchvision's ResNet as a sequence: position -> name; ReLU and max-pool (2, 3) have no weights
POSITIONS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
BLOCKS = {f"block{i + 1}": f"layer{i}" for i in range(1, 5)}  # block1 is the stem
CLASSIFIERS = ("fc.", "classifier.")


def load_published(network: EmbeddingNetwork, weights: Mapping[str, Tensor]) -> list[str]:
    """Put published weights into a gallery network, by their names; all of them or none.

    Known names are those of

    - torchvision and timm: `conv1.`, `bn1.`, `layer1.` to `layer4.`; of other networks timm's;
    - cnnimageretrieval-pytorch, and SSP's R101-GeM, the ResNet as a sequence: `features.0.` and
      `.1.` (the stem), `features.4.` to `.7.`, `pool.p` (1,), `whiten.weight` (D, C) and
      `whiten.bias`;
    - SSP's R101-DELG: `backbone.block1.0.` and `.1.` (the stem), `backbone.block2.` to `block5.`,
      `whiten.weight` (D, C, 1, 1) of a 1x1 convolution and `whiten.bias`; its p is 3 and not there;
    - any of these behind torch's `module.`.

    These were read off the public code (MCC-WH/SSP, filipradenovic/cnnimageretrieval-pytorch, and
    torchvision against timm), not off the weights' files, which were not at hand. Assumed only, as
    harmless: `backbone.` or `globalmodel.` in front of torchvision's names, and `pooling.p` for
    `pool.p`. feymanpriv/DELG's own names (`globalmodel.s1.b1.f.a.`) are refused: its head does not
    scale to unit length before the whitening, so its weights would not give its embeddings here.

    Entries of a classifier (`fc.`, `classifier.`) are passed over. cnnimageretrieval-pytorch's
    networks without `-w` in their name keep their whitening beside the weights, as a mean m and a
    projection P: give it as `whiten.weight` = P and `whiten.bias` = -P m.

    Args:
        network: of kind `delg` or `gem`.
        weights: by name.
    Returns:
        What stays as it was: `pool.p`, if it is fixed and the weights have none.
    Raises:
        ValueError: naming the first few that are missing, unknown, there twice or of another shape;
            or if the network is no gallery network.
    """
    if not isinstance(network.trunk, MapTrunk) or network.expand is not None:
        raise ValueError("published weights are for gallery networks, of the kinds delg and gem")
    places = network.trunk.net.state_dict()
    places |= {f"whiten.{n}": v for n, v in network.whiten.state_dict().items()}
    places |= {f"pool.{n}": v for n, v in network.pool.state_dict().items()}
    found: dict[str, Tensor] = {}
    unknown, twice, misshapen = [], [], []
    for name, value in weights.items():
        place = _place(name)
        if place.startswith(CLASSIFIERS):
            continue
        if place not in places:
            unknown.append(f"{name} is not known")
            continue
        if place in found:
            twice.append(f"{name} is there twice, as {place}")
            continue
        want = places[place].shape
        flat = value.reshape(want) if _same_but_for_ones(value.shape, want, place) else value
        if flat.shape != want:
            misshapen.append(f"{name} is {tuple(value.shape)}, not {tuple(want)}")
        elif place == "pool.p" and not flat > 0:
            misshapen.append(f"{name} is {float(flat)}, not above 0")
        found[place] = flat
    kept = []
    if "pool.p" not in found and not isinstance(network.pool.p, nn.Parameter):
        kept.append("pool.p")
        found["pool.p"] = places["pool.p"]
    for place in places:  # files of older torch have no such counters
        if place.endswith("num_batches_tracked"):
            found.setdefault(place, places[place])
    faults = [f"{place} is missing" for place in places if place not in found]
    faults += unknown + twice + misshapen
    if faults:
        more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError("; ".join(faults[:4]) + more)
    network.pool.load_state_dict({"p": found.pop("pool.p")})
    network.whiten.load_state_dict({n: found.pop(f"whiten.{n}") for n in ("weight", "bias")})
    network.trunk.net.load_state_dict(found)
    return kept


def _place(name: str) -> str:
    """A published name -> that of timm's ResNet, `pool.p`, `whiten.*`; others stay as they are."""
    head, _, rest = name.partition(".")
    while head in PREFIXES:
        head, _, rest = rest.partition(".")
    if head in ("features", "block1"):
        position, _, rest = rest.partition(".")
        known = position in POSITIONS and (head == "features" or position in ("0", "1"))
        return f"{POSITIONS[position]}.{rest}" if known else name
    if head == "pooling":
        head = "pool"
    return f"{BLOCKS.get(head, head)}.{rest}"


def _same_but_for_ones(shape: torch.Size, want: torch.Size, place: str) -> bool:
    """Whether it is a whitening as a 1x1 convolution, or a p of shape (1,)."""
    ones = {"whiten.weight": (1, 1), "pool.p": (1,)}.get(place)
    return ones is not None and shape == (*want, *ones)


# --- costs --------------------------------------------------------------------------------------


def count_costs(network: nn.Module, size: int | tuple[int, int]) -> dict[str, int]:
    """What one image costs.

    Multiply-accumulates are those of convolutions and matrix products, attention's too, half of
    what torch's FlopCounterMode counts; batch norm, activations and pooling are not in it. Nothing
    is computed: a copy of the network runs on tensors without values, in evaluation mode.

    Args:
        network: images -> anything; may be on any device, "meta" too.
        size: side of the image, or (height, width), pixels.
    Returns:
        `parameters`: numbers that the network holds as parameters, frozen ones too; `macs`.
    Raises:
        ValueError: if the size is not positive.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"the image's size must be above 0, not {size}")
    # a copy: some networks keep tensors from one call to the next
    tried = copy.deepcopy(network).eval()  # batch norm refuses to train on a single value
    counter = FlopCounterMode(display=False)
    state = {**dict(tried.named_parameters()), **dict(tried.named_buffers())}
    # fused attention of a CPU is not known to the counter
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FakeTensorMode(), counter:
        fake = {name: torch.empty(v.shape, dtype=v.dtype) for name, v in state.items()}
        functional_call(tried, fake, (torch.empty(1, 3, height, width),))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": parameters, "macs": counter.get_total_flops() // 2}
