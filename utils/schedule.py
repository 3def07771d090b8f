"""Learning rates as a plain function of the optimisation step."""

import math
from collections.abc import Callable

SCHEDULES = ("cosine", "constant", "staircase", "released")
RELEASED_CONSTANT_EPOCHS = 10
STAIR_STEPS, STAIR_FACTOR = 100, 0.95


def lr_schedule(
    kind: str, lr: float, epochs: int, steps_per_epoch: int, warmup_epochs: float = 0.0
) -> Callable[[int], float]:
    """Learning rate at each step, counted from 0 over the whole training.

        cosine:    lr * (1 + cos(pi * t)) / 2, t the fraction of the steps after warm-up done
        constant:  lr
        staircase: lr * 0.95^floor(t / 100), t the steps after warm-up done
        released:  lr for 10 epochs, then lr * (1 + cos(pi * (epoch - 10) / steps_per_epoch)) / 2,
                   which swings up again: with CIFAR-10's 195 steps its period is 390 epochs

    During the first `warmup_epochs` the rate rises linearly to lr (not with "released").

    Args:
        kind: one of SCHEDULES.
        lr: peak learning rate.
        epochs: length of the training; the cosine ends there.
        steps_per_epoch: optimisation steps of one epoch.
        warmup_epochs: may be a fraction.
    Raises:
        ValueError: if the kind is unknown.
    Source: SPQ's released training loop ("released"), GPQ's ("staircase"); Loshchilov & Hutter
        2017 (cosine).
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}; known: {', '.join(SCHEDULES)}")
    total = epochs * steps_per_epoch
    warmup = 0 if kind == "released" else round(warmup_epochs * steps_per_epoch)

    def lr_at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        if kind == "constant":
            return lr
        if kind == "staircase":
            return lr * STAIR_FACTOR ** ((step - warmup) // STAIR_STEPS)
        if kind == "cosine":
            t = min(1.0, (step - warmup) / max(1, total - warmup))
            return lr * (1 + math.cos(math.pi * t)) / 2
        epoch = step // steps_per_epoch - RELEASED_CONSTANT_EPOCHS
        return lr if epoch < 0 else lr * (1 + math.cos(math.pi * epoch / steps_per_epoch)) / 2

    return lr_at
