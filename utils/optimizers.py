"""Optimizers by name, and their learning rate on the device."""

from argparse import Namespace

import torch
from torch import nn

OPTIMIZERS = ("adam", "adamw", "sgd")


def build_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """--optimizer over all parameters, fused into few kernels.

    With `args.cuda_graph` on a GPU the learning rate is a tensor there, which a replayed graph
    reads anew.
    """
    parameters = list(model.parameters())
    graphed = args.cuda_graph and parameters[0].device.type == "cuda"
    lr = torch.tensor(args.lr, device=parameters[0].device) if graphed else args.lr
    common = {"lr": lr, "weight_decay": args.weight_decay, "fused": True}
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return kind(parameters, capturable=graphed, **common)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Learning rate of all groups, from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Momenta and step counts from a checkpoint; the settings stay those of this run's flags.

    Raises:
        ValueError, KeyError: if the state is of other parameters.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
