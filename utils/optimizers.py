"""Optimizers by name, and their learning rates on the device."""

from argparse import Namespace
from collections.abc import Iterable

import torch
from torch import nn

from utils.muon import Muon

OPTIMIZERS = ("adam", "adamw", "sgd", "muon")


def build_optimizers(args: Namespace, model: nn.Module) -> list[torch.optim.Optimizer]:
    """--optimizer over all parameters that learn, fused into few kernels.

    One optimizer, or two with `muon`: Muon with --muon_lr for the convolutions behind the first,
    Adam for all else, and for convolutions that have a bias (no norm follows them) or groups. Each
    group has `share`, its peak rate as a multiple of --lr.

    With `args.cuda_graph` on a GPU the learning rates are tensors there, which a replayed graph
    reads anew.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]  # not those of a frozen trunk
    device = parameters[0].device
    graphed = args.cuda_graph and device.type == "cuda"

    def rate(value: float) -> float | torch.Tensor:
        return torch.tensor(value, device=device) if graphed else value

    found: list[torch.optim.Optimizer] = []
    if args.optimizer == "muon":
        kernels = [m.weight for m in model.modules() if _is_muon_s(m)]
        if kernels:
            found.append(Muon(kernels, rate(args.muon_lr)))
        taken = {id(p) for p in kernels}
        parameters = [p for p in parameters if id(p) not in taken]
    common = {"lr": rate(args.lr), "weight_decay": args.weight_decay, "fused": True}
    if args.optimizer == "sgd":
        found.append(torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common))
    else:
        kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
        betas = (args.beta1, 0.999)
        found.append(kind(parameters, betas=betas, capturable=graphed, **common))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["share"] = args.muon_lr / args.lr if isinstance(optimizer, Muon) else 1.0
    return found


def _is_muon_s(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.weight.requires_grad
        and module.in_channels > 3  # not the first: images
        and module.bias is None  # Muon keeps a kernel's length, which a norm behind it hides
        and module.groups == 1  # nor is a kernel of groups one matrix
    )


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Learning rate of all groups, from the next step on, each times its share."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * group["share"])
            else:
                group["lr"] = lr * group["share"]


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Momenta and step counts from a checkpoint; the settings stay those of this run's flags.

    Raises:
        ValueError, KeyError: if the state is of other parameters.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
