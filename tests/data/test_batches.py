"""Batches: every image once an epoch, the same order again, shares of ranks."""

import pytest
import torch

from data.batches import DeviceBatches
from utils.distributed import Ranks
from utils.errors import UserError


def numbered(n):
    return torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1)


def test_an_epoch_has_every_image_once_and_drops_the_incomplete_batch():
    batches = DeviceBatches(numbered(25), 4, seed=0, ranks=Ranks())
    assert len(batches) == 6
    epoch = torch.cat([batches.batch(s) for s in range(6)]).flatten()
    assert len(epoch.unique()) == 24


def test_order_depends_on_seed_and_epoch_alone():
    one, two = (DeviceBatches(numbered(50), 10, seed=3, ranks=Ranks()) for _ in range(2))
    forward = [one.batch(s) for s in range(12)]
    backward = [two.batch(s) for s in reversed(range(12))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(forward[0], forward[5])  # the next epoch
    other = DeviceBatches(numbered(50), 10, seed=4, ranks=Ranks())
    assert not torch.equal(other.batch(0), forward[0])


def test_ranks_share_the_global_batch():
    whole = DeviceBatches(numbered(40), 8, seed=0, ranks=Ranks()).batch(3)
    parts = [DeviceBatches(numbered(40), 8, seed=0, ranks=Ranks(r, 2)).batch(3) for r in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_impossible_batches_are_named():
    with pytest.raises(UserError, match=r"--batch_size=50: is larger than the training set; .* 40"):
        DeviceBatches(numbered(40), 50, seed=0, ranks=Ranks())
    with pytest.raises(UserError, match="--batch_size=9: must be a multiple of the 2 processes"):
        DeviceBatches(numbered(40), 9, seed=0, ranks=Ranks(0, 2))
