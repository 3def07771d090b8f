"""Learning rates as a plain function of the optimisation step."""

import math
from collections.abc import Callable

SCHEDULES = ("cosine", "constant", "wsd", "staircase", "released")
RELEASED_CONSTANT_EPOCHS = 10
DECAY_SHARE = 0.3  # of the steps in which "wsd" falls
SECOND_STAGE_LR = 0.3  # peak rate of the second stage, as a share of the first's
STAIR_STEPS, STAIR_FACTOR = 100, 0.95


def lr_schedule(
    kind: str,
    lr: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0.0,
    second_stage: int | None = None,
) -> Callable[[int], float]:
    """Learning rate at each step, counted from 0 over the whole training.

        cosine:    lr * (1 + cos(pi * t)) / 2, t the fraction of the steps after warm-up done
        constant:  lr
        wsd:       lr, then linearly to 0 in the last 0.3 of the steps (warm-up, stable,
                   decay); until the fall begins, `epochs` may still be changed
        staircase: lr * 0.95^floor(t / 100), t the steps after warm-up done
        released:  lr for 10 epochs, then lr * (1 + cos(pi * (epoch - 10) / steps_per_epoch)) / 2,
                   which swings up again: with CIFAR-10's 195 steps its period is 390 epochs

    During the first `warmup_epochs` the rate rises linearly to lr (not with "released"). With a
    second stage the schedule ends where that begins; the stage has a cosine of its own, from
    0.3 lr to 0.

    Args:
        kind: one of SCHEDULES.
        lr: peak learning rate.
        epochs: length of the training; the cosine ends there.
        steps_per_epoch: optimisation steps of one epoch.
        warmup_epochs: may be a fraction.
        second_stage: the step at which a second stage begins, which lasts to the end.
    Raises:
        ValueError: if the kind is unknown.
    Source: SPQ's released training loop ("released"), GPQ's ("staircase"); Loshchilov & Hutter
        2017 (cosine); Hägele et al. 2024 (wsd).
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}; known: {', '.join(SCHEDULES)}")
    end = epochs * steps_per_epoch
    total = end if second_stage is None else second_stage
    warmup = 0 if kind == "released" else round(warmup_epochs * steps_per_epoch)

    def lr_at(step: int) -> float:
        if second_stage is not None and step >= second_stage:
            return SECOND_STAGE_LR * lr * _cosine(step - total, end - total)
        if step < warmup:
            return lr * (step + 1) / warmup
        if kind == "constant":
            return lr
        if kind == "wsd":
            return lr * min(1.0, (total - step) / max(1, DECAY_SHARE * total))
        if kind == "staircase":
            return lr * STAIR_FACTOR ** ((step - warmup) // STAIR_STEPS)
        if kind == "cosine":
            return lr * _cosine(step - warmup, total - warmup)
        epoch = step // steps_per_epoch - RELEASED_CONSTANT_EPOCHS
        return lr if epoch < 0 else lr * (1 + math.cos(math.pi * epoch / steps_per_epoch)) / 2

    return lr_at


def _cosine(step: int, steps: int) -> float:
    """Falls from 1 to 0 over so many steps."""
    return (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2
