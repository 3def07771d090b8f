"""Optimizers by name: every parameter once, rates by share, state of a checkpoint."""

from argparse import Namespace

import pytest
import torch

from models import build_spq
from utils.muon import Muon
from utils.optimizers import OPTIMIZERS, build_optimizers, restore_optimizer, set_lr


def build(name, **changed):
    torch.manual_seed(0)
    model = build_spq("resnet18", 4, "soft", M=2, K=4, d=4)
    flags = {"optimizer": name, "lr": 0.01, "muon_lr": 0.2, "weight_decay": 0.1}
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
    _, (muon_2, adam_2) = build("muon", weight_decay=0.7)
    restore_optimizer(muon_2, muon.state_dict())
    restore_optimizer(adam_2, adam.state_dict())
    assert adam_2.param_groups[0]["weight_decay"] == 0.7
    for one, two in ((muon, muon_2), (adam, adam_2)):
        for a, b in zip(one.state.values(), two.state.values(), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="parameter group"):
        restore_optimizer(adam_2, muon.state_dict())
