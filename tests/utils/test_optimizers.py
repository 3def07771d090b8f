"""Optimizers by name: every parameter once, rates by share, state of a checkpoint."""

from argparse import Namespace

import pytest
import torch

from models import build_spq
from utils.muon import Muon
from utils.optimizers import OPTIMIZERS, build_optimizers, restore_optimizer, set_lr


def build(name, arch="resnet18", freeze=False, **changed):
    torch.manual_seed(0)
    width = 4 if arch == "resnet18" else 64
    model = build_spq(arch, width, "soft", M=2, K=4, d=4)
    if freeze:
        model.freeze_trunk()
    flags = {"optimizer": name, "lr": 0.01, "muon_lr": 0.2, "weight_decay": 0.1, "beta1": 0.9}
    return model, build_optimizers(Namespace(**(flags | {"cuda_graph": False} | changed)), model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_in_one_group_and_moves(name):
    model, optimizers = build(name)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    set_lr(optimizers, 0.005)  # half of the peak
    for optimizer in optimizers:
        optimizer.step()
    for n, p in model.named_parameters():
        assert not torch.equal(p, before[n]), n
    rates = {type(o).__name__: o.param_groups[0]["lr"] for o in optimizers}
    assert rates.pop("Muon", 0.1) == pytest.approx(0.1)
    assert list(rates.values()) == [0.005]


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_adam_s_first_moment_decays_by_beta1(name):
    model, optimizers = build(name, beta1=0.5, weight_decay=0.0)
    adam = optimizers[-1]
    assert adam.param_groups[0]["betas"] == (0.5, 0.999)
    parameter = model.quantizer.codebooks
    first, second = (torch.randn_like(parameter) for _ in range(2))
    for grad in (first, second):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        parameter.grad = grad
        adam.step()
    # from 0: half of the way to the first gradient, then half of the way to the second
    torch.testing.assert_close(adam.state[parameter]["exp_avg"], first / 4 + second / 2)


def test_muon_takes_the_convolutions_but_the_first():
    model, (muon, rest) = build("muon")
    assert isinstance(muon, Muon)
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert "trunk.stages.0.conv1.weight" in taken
    assert "trunk.stages.2.shortcut.0.weight" in taken
    assert "trunk.stem.0.weight" not in taken
    assert all(dict(model.named_parameters())[n].dim() == 4 for n in taken)
    assert len(taken) == 19  # 16 in the blocks, 3 in the shortcuts
    assert rest.param_groups[0]["weight_decay"] == 0.1


def test_restored_state_keeps_this_run_s_settings():
    _, (muon, adam) = build("muon")
    for optimizer in (muon, adam):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        optimizer.step()
    _, (muon_2, adam_2) = build("muon", weight_decay=0.7, beta1=0.5)
    restore_optimizer(muon_2, muon.state_dict())
    restore_optimizer(adam_2, adam.state_dict())
    assert adam_2.param_groups[0]["weight_decay"] == 0.7
    assert adam_2.param_groups[0]["betas"] == (0.5, 0.999)
    for one, two in ((muon, muon_2), (adam, adam_2)):
        for a, b in zip(one.state.values(), two.state.values(), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="parameter group"):
        restore_optimizer(adam_2, muon.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("arch", ["resnet18", "test_efficientnet"])
def test_frozen_parameters_are_left_to_no_optimizer(name, arch):
    model, optimizers = build(name, arch, freeze=True, weight_decay=0.5)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    learning = [*model.head.parameters(), model.quantizer.codebooks]
    assert sorted(held) == sorted(id(p) for p in learning)
    assert len(optimizers) == 1  # nothing is left for Muon
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)  # of the trunk too: decay and momentum must not reach it
    for optimizer in optimizers:
        optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == n.startswith("trunk."), n


def test_muon_leaves_kernels_of_groups_and_with_a_bias_to_adam():
    model, (muon, adam) = build("muon", "test_efficientnet")
    modules = dict(model.named_modules())
    taken = {id(p) for p in muon.param_groups[0]["params"]}
    rest = {id(p) for p in adam.param_groups[0]["params"]}
    kinds = {True: 0, False: 0}
    for name, module in modules.items():
        if isinstance(module, torch.nn.Conv2d):
            whole = module.bias is None and module.groups == 1 and module.in_channels > 3
            assert (id(module.weight) in taken, id(module.weight) in rest) == (whole, not whole)
            kinds[whole] += 1
            if "conv_dw" in name or "se." in name:
                assert not whole, name
    assert min(kinds.values()) > 3
    assert len(taken) + len(rest) == len(list(model.parameters()))


def test_a_frozen_run_s_state_is_restored():
    _, (adam,) = build("muon", freeze=True)
    for p in adam.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    adam.step()
    _, (again,) = build("muon", freeze=True)
    restore_optimizer(again, adam.state_dict())
    moments = [state["exp_avg"] for state in again.state.values()]
    assert len(moments) == 5
    for got, want in zip(again.state.values(), adam.state.values(), strict=True):
        assert torch.equal(got["exp_avg"], want["exp_avg"])
