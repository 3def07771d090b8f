"""Muon: orthogonal updates, one kernel at a time and many, torch's own Muon."""

import pytest
import torch
from torch import nn

from utils.muon import MOMENTUM, Muon, orthogonalize


@pytest.mark.parametrize(("rows", "columns"), [(8, 40), (40, 8), (16, 16), (1, 9)])
def test_orthogonalize_brings_all_singular_values_near_one(rows, columns):
    matrices = torch.randn(3, rows, columns)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape
    # five steps lift values down to some 0.01 of the norm; the smallest of a square one may be less
    kept = s / s.norm(dim=1, keepdim=True) > 0.02
    values = torch.linalg.svdvals(found)
    assert (values[kept.sort(dim=1, descending=True)[0]] > 0.6).all()
    assert (values < 1.3).all()
    wanted = u @ vh
    cosine = (found * wanted).sum((1, 2)) / (found.norm(dim=(1, 2)) * wanted.norm(dim=(1, 2)))
    assert (cosine > 0.9).all()


def kernels():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(6, 4, 3, 3)) for _ in range(3)] + [
        nn.Parameter(torch.randn(20, 6, 1, 1)),
        nn.Parameter(torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)),
    ]


def give_gradients(parameters, seed):
    torch.manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn_like(p)


def test_steps_equal_a_plain_loop_over_kernels():
    parameters, lr = kernels(), 0.07
    want = [p.detach().clone().contiguous() for p in parameters]
    momenta = [torch.zeros_like(w) for w in want]
    optimizer = Muon(parameters, lr)
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
        for w, v, p in zip(want, momenta, parameters, strict=True):
            v.copy_(MOMENTUM * v + p.grad)
            matrix = (p.grad + MOMENTUM * v).reshape(1, len(w), -1)
            update = orthogonalize(matrix)[0].reshape(w.shape)
            rows, columns = matrix.shape[1:]
            w.mul_(rows**0.5 / w.norm()).sub_(lr * max(1, rows / columns) ** 0.5 * update)
    for p, w in zip(parameters, want, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own since 2.9")
def test_a_step_equals_torch_s_on_a_matrix_of_that_length():
    torch.manual_seed(0)
    start = torch.randn(8, 36)
    start *= 8**0.5 / start.norm()
    ours, theirs = nn.Parameter(start.reshape(8, 4, 3, 3).clone()), nn.Parameter(start.clone())
    grad = torch.randn(8, 36)
    ours.grad, theirs.grad = grad.reshape(8, 4, 3, 3), grad.clone()
    Muon([ours], 0.1).step()
    torch.optim.Muon([theirs], lr=0.1, momentum=MOMENTUM, weight_decay=0.0).step()
    moved = (theirs - start).norm()
    # theirs mixes gradient and momentum with weights that add to one (the same direction), and
    # works in bfloat16
    assert (ours.detach().flatten(1) - theirs.detach()).norm() < 0.05 * moved


def test_a_kernel_s_length_does_not_matter_and_stays():
    one, two = kernels()[:1], kernels()[:1]
    with torch.no_grad():
        two[0].mul_(7)
    for parameters in (one, two):
        give_gradients(parameters, 5)
        Muon(parameters, 0.01).step()
    torch.testing.assert_close(one[0], two[0])
    assert one[0].norm().item() == pytest.approx(6**0.5, rel=0.05)


def test_the_rate_may_be_a_tensor():
    one, two = kernels(), kernels()
    for parameters, lr in ((one, 0.1), (two, torch.tensor(0.1))):
        give_gradients(parameters, 1)
        Muon(parameters, lr).step()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
