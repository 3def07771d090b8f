"""Learning-rate schedules."""

import math

import pytest
import torch

from utils.schedule import lr_schedule


def test_cosine_falls_from_peak_to_zero_after_a_linear_warm_up():
    lr_at = lr_schedule("cosine", 2.0, epochs=10, steps_per_epoch=10, warmup_epochs=1)
    assert [lr_at(s) for s in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert lr_at(10) == pytest.approx(2.0)
    assert lr_at(55) == pytest.approx(1.0)  # half of the 90 steps after warm-up
    assert lr_at(100) == pytest.approx(0.0)
    assert lr_at(1000) == pytest.approx(0.0)


def test_constant():
    lr_at = lr_schedule("constant", 0.1, 5, 7)
    assert {lr_at(s) for s in range(100)} == {0.1}


def test_released_equals_torch_s_scheduler_stepped_once_an_epoch():
    steps_per_epoch, lr = 195, 3e-4
    lr_at = lr_schedule("released", lr, epochs=2000, steps_per_epoch=steps_per_epoch)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps_per_epoch)
    for epoch in range(600):
        # torch's recursive form drifts by roundings; absolute to 1e-9 of a rate of 3e-4
        assert lr_at(epoch * steps_per_epoch + 3) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-9
        )
        optimizer.step()
        if epoch >= 10:  # the cosine starts, at its peak, in epoch 10
            scheduler.step()


def test_released_swings_with_a_period_of_twice_the_steps_per_epoch():
    lr_at = lr_schedule("released", 1.0, 2000, 195)
    assert lr_at((10 + 195) * 195) == pytest.approx(0.0)
    assert lr_at((10 + 390) * 195) == pytest.approx(1.0)
    assert math.isclose(lr_at(0), 1.0)


def test_staircase_equals_torch_s_steps_of_0_95():
    lr_at = lr_schedule("staircase", 2e-4, epochs=300, steps_per_epoch=10)
    assert [lr_at(s) for s in (0, 99, 100, 199, 200)] == pytest.approx(
        [2e-4, 2e-4, 1.9e-4, 1.9e-4, 1.805e-4]
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.95)
    for step in range(3000):
        assert lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_staircase_counts_from_the_end_of_its_warm_up():
    lr_at = lr_schedule("staircase", 1.0, 300, 10, warmup_epochs=2.5)
    assert [lr_at(s) for s in (0, 9, 24)] == pytest.approx([0.04, 0.4, 1.0])
    assert [lr_at(s) for s in (25, 124, 125)] == pytest.approx([1.0, 1.0, 0.95])


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        lr_schedule("step", 1.0, 1, 1)


def test_a_second_stage_has_a_cosine_of_its_own():
    lr_at = lr_schedule("cosine", 1.0, epochs=4, steps_per_epoch=10, second_stage=30)
    alone = lr_schedule("cosine", 1.0, epochs=3, steps_per_epoch=10)
    assert [lr_at(step) for step in range(30)] == [alone(step) for step in range(30)]
    later = lr_schedule("cosine", 0.3, epochs=1, steps_per_epoch=10)
    assert [lr_at(30 + i) for i in range(10)] == pytest.approx([later(i) for i in range(10)])


def test_wsd_is_constant_and_falls_linearly_at_the_end():
    lr_at = lr_schedule("wsd", 2.0, epochs=2, steps_per_epoch=10, warmup_epochs=0.2)
    assert [lr_at(step) for step in range(20)] == pytest.approx(
        [1, 2] + 12 * [2] + [2 * left / 6 for left in (6, 5, 4, 3, 2, 1)]
    )
