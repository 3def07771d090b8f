"""Batches: every image once an epoch, the same order again, shares of ranks; their views."""

import itertools
import os
import threading

import pytest
import torch

from data.augment import BatchedAugment, SimCLRAugment
from data.batches import (
    AHEAD,
    CachedViewBatches,
    DeviceBatches,
    SemiSupervisedBatches,
    ViewBatches,
    batches_ahead,
)
from data.store import RowStore, fill_store
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


# --- views --------------------------------------------------------------------------------------


def images_of(n=40):
    return torch.randint(0, 256, (n, 3, 12, 12), dtype=torch.uint8)


def views_of(images, ahead, seed=5, ranks=None, augments=None):
    """Batches of 8 and their two random views."""
    augments = augments or [BatchedAugment(8)] * 2
    batches = DeviceBatches(images, 8, seed=1, ranks=ranks or Ranks())
    return ViewBatches(batches, lambda step: augments, seed, ahead)


@pytest.mark.parametrize("kind", [BatchedAugment, SimCLRAugment])
@pytest.mark.parametrize("ahead", [1, 3])
def test_views_at_a_step_are_the_same_whenever_asked(ahead, kind):
    images = images_of()
    augments = [kind(8)] * 2
    whole = views_of(images, ahead, augments=augments)
    first = [whole.batch(step) for step in range(12)]  # two epochs of five, and two steps
    assert len(whole) == 5
    for step in (7, 0, 11, 11, 3, 4):  # the same object, in any order
        assert all(map(torch.equal, whole.batch(step), first[step]))
    for start in (4, 7):  # a resumed run begins within a group of batches
        torch.manual_seed(99)
        resumed = views_of(images, ahead, augments=augments)
        for step in range(start, 12):
            assert all(map(torch.equal, resumed.batch(step), first[step]))


def test_what_else_draws_random_numbers_does_not_matter():
    images = images_of()
    one, two = (views_of(images, 2) for _ in range(2))
    for step in range(6):
        torch.rand(step)
        view = one.batch(step)
        assert all(map(torch.equal, view, two.batch(step)))


@pytest.mark.parametrize("ahead", [1, 4])
def test_every_step_has_the_images_of_its_batch(ahead):
    images = images_of(44)  # five batches of 8 in an epoch: groups of four cross its end
    views = views_of(images, ahead, augments=[lambda x: x, lambda x: 255 - x])
    for step in range(13):
        want = views.batches.batch(step)
        plain, negative = views.batch(step)
        assert torch.equal(plain, want)
        assert torch.equal(negative, 255 - want)


@pytest.mark.parametrize("ahead", [1, 4])
def test_views_steps_and_seeds_differ(ahead):
    images = images_of(1).expand(40, -1, -1, -1)  # one image: views differ by their draws alone
    views = views_of(images, ahead)
    seen = [view for step in range(6) for view in views.batch(step)]
    seen += views_of(images, ahead, seed=6).batch(0)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("ahead", [1, 4])
def test_ranks_draw_other_random_numbers(ahead):
    images = images_of(1).expand(40, -1, -1, -1)
    a, b = (views_of(images, ahead, ranks=Ranks(rank, 2)) for rank in range(2))
    for step in range(5):
        for one, two in zip(a.batch(step), b.batch(step), strict=True):
            assert one.shape == two.shape == (4, 3, 8, 8)
            assert not torch.equal(one, two)
            # not the same draws on other images either: no view occurs on both
            assert not (one[:, None] == two[None]).flatten(2).all(-1).any()


@pytest.mark.parametrize("ahead", [1, 4])
def test_the_augmentation_is_asked_for_at_the_first_step_of_a_group(ahead):
    asked = []

    def augments_at(step):
        asked.append(step)
        return [lambda images: images, lambda images: images[:, :, :6]]

    batches = DeviceBatches(images_of(), 8, seed=0, ranks=Ranks())
    views = ViewBatches(batches, augments_at, seed=0, ahead=ahead)
    for step in range(10):
        whole, half = views.batch(step)
        assert whole.shape == (8, 3, 12, 12)
        assert half.shape == (8, 3, 6, 12)  # views may differ in size
    assert asked == list(range(0, 10, ahead))


def test_a_gpu_augments_several_batches_at_once_as_far_as_memory_goes():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert batches_ahead(cpu, 512, 32) == 1
    assert batches_ahead(gpu, 512, 32) == AHEAD
    # float32 views of 2 x 256 images of 224 pixels take 294 MiB, more than is allowed for
    assert batches_ahead(gpu, 512, 224) == 1
    assert 1 < batches_ahead(gpu, 512, 80) < AHEAD


# --- rows elsewhere -----------------------------------------------------------------------------


class Rows:
    """Rows that are not where they are wanted, and who asked for which of them."""

    def __init__(self, rows):
        self.rows, self.asked, self.fails = rows, [], None
        self.go_on = threading.Event()
        self.go_on.set()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, which):
        self.asked.append((which.tolist(), threading.current_thread()))
        self.go_on.wait(timeout=20)
        if self.fails is not None and len(self.asked) > self.fails:
            raise UserError("the disk is gone")
        return self.rows[which]


def stored(folder, rows):
    def make(start, stop):
        return rows[start:stop], []

    return fill_store(folder, len(rows), rows.shape[1:], rows.dtype, make, "rows")[0]


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(1, 2)])
def test_rows_on_disk_give_the_batches_of_rows_on_the_device(tmp_path, ranks):
    images = images_of(44)
    store = stored(tmp_path / "s", images)
    device = torch.device("cpu")
    want = DeviceBatches(images, 8, seed=3, ranks=ranks)
    found = DeviceBatches(store, 8, seed=3, ranks=ranks, device=device)
    assert len(found) == len(want) == 5
    for step in [*range(12), 7, 7, 0, 11, 3]:  # over the ends of epochs, back and forth
        assert torch.equal(found.batch(step), want.batch(step))
    part = torch.arange(40, 4, -2)
    want = DeviceBatches(images[part], 8, seed=3, ranks=ranks)
    found = DeviceBatches(store.part(part), 8, seed=3, ranks=ranks, device=device)
    assert all(torch.equal(found.batch(step), want.batch(step)) for step in range(5))


def test_rows_in_memory_for_another_device():
    images = images_of(20)
    found = DeviceBatches(images, 4, 0, Ranks(), torch.device("meta")).batch(2)  # in place of a GPU
    assert found.device.type == "meta"
    assert found.shape == (4, 3, 12, 12)


def test_views_of_rows_on_disk(tmp_path):
    images = images_of(40)
    augments = [BatchedAugment(8)] * 2
    stores = (images, stored(tmp_path / "s", images))
    one, two = (
        ViewBatches(DeviceBatches(rows, 8, 1, Ranks()), lambda step: augments, 5, ahead=3)
        for rows in stores
    )
    for step in range(12):
        assert all(map(torch.equal, one.batch(step), two.batch(step)))


def test_the_next_batch_is_read_while_this_one_is_trained_on():
    rows = Rows(images_of(40))
    batches = DeviceBatches(rows, 8, 0, Ranks(), torch.device("cpu"))
    batches.batch(0)
    batches._ahead[1].result(timeout=20)
    asked = [which for which, _ in rows.asked]
    assert asked == [batches.chosen(step).tolist() for step in (0, 1)]
    rows.go_on.clear()  # from here on the disk does not answer
    batches.batch(1)  # is there already
    rows.go_on.set()
    for step in range(2, 9):
        batches.batch(step)
    batches._ahead[1].result(timeout=20)
    asked = [which for which, _ in rows.asked]
    assert asked == [batches.chosen(step).tolist() for step in range(10)]  # each once
    threads = {thread for _, thread in rows.asked}
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_rows_on_the_device_are_read_without_a_thread():
    batches = DeviceBatches(images_of(40), 8, 0, Ranks())
    batches.batch(0)
    assert batches._reader is None


def test_errors_of_the_reading_thread_reach_the_caller():
    rows = Rows(images_of(40))
    rows.fails = 3
    batches = DeviceBatches(rows, 8, 0, Ranks(), torch.device("cpu"))
    for step in range(3):
        batches.batch(step)
    for _ in range(2):  # and go on doing so
        with pytest.raises(UserError, match="the disk is gone"):
            batches.batch(3)


def test_a_store_cut_off_in_training_is_told(tmp_path):
    store = stored(tmp_path / "s", images_of(40))
    batches = DeviceBatches(store, 8, 0, Ranks())
    os.truncate(tmp_path / "s" / "rows.bin", 0)
    with pytest.raises(UserError, match="ends too early"):
        batches.batch(0)


# --- kept views ---------------------------------------------------------------------------------


def views_kept(n=40, V=5):
    """Features (n, V, 2): number of the image, number of the view."""
    return torch.cartesian_prod(torch.arange(n), torch.arange(V)).reshape(n, V, 2).half()


def cached(seed=0, ranks=None, rows=None, order=1):
    rows = views_kept() if rows is None else rows
    return CachedViewBatches(DeviceBatches(rows, 8, order, ranks or Ranks()), seed)


def test_two_different_views_of_each_image():
    batches = cached()
    assert len(batches) == 5
    pairs = torch.zeros(5, 5)
    for step in range(100):
        one, two = batches.batch(step)
        assert one.shape == two.shape == (8, 2)
        assert one.dtype == two.dtype == torch.float32
        rows = batches.batches.chosen(step)
        assert torch.equal(one[:, 0].long(), rows)
        assert torch.equal(two[:, 0].long(), rows)
        pairs.index_put_((one[:, 1].long(), two[:, 1].long()), torch.tensor(1.0), accumulate=True)
    assert (pairs.diagonal() == 0).all()
    # 800 draws among 20 pairs: 40 of each, with a standard deviation of 6
    others = pairs[~torch.eye(5, dtype=torch.bool)]
    assert others.min() > 10
    assert others.max() < 80


def test_the_choice_depends_on_seed_step_and_rank_alone():
    one, two = cached(), cached()
    first = [one.batch(step) for step in range(12)]
    torch.manual_seed(9)
    for step in (7, 0, 11, 3, 3):
        assert all(map(torch.equal, two.batch(step), first[step]))
    views = [batch[0][:, 1] for batch in first]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(views, 2))
    assert not torch.equal(cached(seed=1).batch(0)[0], first[0][0])
    halves = [cached(ranks=Ranks(rank, 2)).batch(0)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves)[:, 0], first[0][0][:, 0])  # the images of one process
    assert not torch.equal(halves[0][:, 1], halves[1][:, 1])


def test_two_views_are_enough_and_they_may_lie_on_disk(tmp_path):
    rows = views_kept(V=2)
    store = stored(tmp_path / "s", rows)
    assert isinstance(store, RowStore)
    for step in range(6):
        one, two = cached(rows=rows).batch(step)
        assert (one[:, 1] + two[:, 1] == 1).all()
        assert all(map(torch.equal, cached(rows=store).batch(step), (one, two)))


def test_one_view_of_each_image():
    batches = CachedViewBatches(DeviceBatches(views_kept(), 8, 1, Ranks()), seed=0, views=1)
    counts = torch.zeros(5)
    for step in range(100):
        (view,) = batches.batch(step)
        assert view.shape == (8, 2)
        assert torch.equal(view[:, 0].long(), batches.batches.chosen(step))
        assert torch.equal(view, batches.batch(step)[0])
        counts += torch.bincount(view[:, 1].long(), minlength=5)
    # 800 draws of five: 160 of each, with a standard deviation of 11
    assert counts.min() > 110
    assert counts.max() < 210


# --- labelled and unlabelled images -------------------------------------------------------------


def semi(n=20, u=33, B=6, ranks=None, ahead=1, labels=None, rows=None):
    """Batches of n labelled images and u others; every pixel of an image is its number."""
    ranks, sides = ranks or Ranks(), []
    labelled = numbered(n).expand(-1, 3, 4, 4) if rows is None else rows
    for images, seed in ((labelled, 1), (100 + numbered(u).expand(-1, 3, 4, 4), 2)):
        batches = DeviceBatches(images, B, seed, ranks, torch.device("cpu"))
        sides.append(ViewBatches(batches, lambda step: [lambda x: x.float()], seed, ahead))
    labels = torch.arange(n) * 7 % 20 if labels is None else labels
    return SemiSupervisedBatches(sides[0], labels, sides[1], lambda step: 0.25 * step)


def numbers(view):
    return view[:, 0, 0, 0].long()


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("multilabel", [False, True])
def test_labels_belong_to_their_images_at_every_step(ahead, multilabel):
    labels = torch.arange(20) * 7 % 20
    if multilabel:
        labels = torch.stack([labels >> bit & 1 for bit in range(5)], dim=1).to(torch.uint8)
    batches, again = (semi(ahead=ahead, labels=labels) for _ in range(2))
    assert len(batches) == 3
    first = []
    for step in range(13):  # over the ends of epochs, which groups of four cross
        first.append(batches.batch(step))
        view, found, other, _ = first[-1]
        assert view.shape == other.shape == (6, 3, 4, 4)
        assert torch.equal(found, labels[numbers(view)])
        assert (numbers(other) >= 100).all()
    for step in (7, 0, 12, 12, 3, 2):  # whenever it is asked
        for whose in (batches, again):
            assert all(map(torch.equal, whose.batch(step), first[step]))


def test_labels_belong_to_images_that_are_read_from_disk(tmp_path):
    on_disk = semi(rows=stored(tmp_path / "s", numbered(20).expand(-1, 3, 4, 4).contiguous()))
    want = semi()
    for step in [*range(7), 2, 11]:
        assert all(map(torch.equal, on_disk.batch(step), want.batch(step)))


def test_an_epoch_is_a_pass_over_the_labelled_images():
    batches = semi(n=18, u=33)  # 3 and 5 batches
    seen = [batches.batch(step) for step in range(15)]
    for epoch in range(5):
        part = seen[3 * epoch : 3 * epoch + 3]
        assert sorted(torch.cat([numbers(view) for view, *_ in part]).tolist()) == [*range(18)]
    for turn in range(3):  # the others go round at their own pace
        part = seen[5 * turn : 5 * turn + 5]
        assert len(torch.cat([numbers(other) for _, _, other, _ in part]).unique()) == 30
    assert len(semi(n=32, u=12)) == 5  # fewer of them than labelled ones


def test_each_unlabelled_image_has_the_strength_of_its_step():
    for ahead in (1, 4):
        batches = semi(ahead=ahead)
        for step in (0, 1, 6, 3):
            strength = batches.batch(step)[3]
            assert strength.dtype == torch.float32
            assert strength.tolist() == 6 * [0.25 * step]


def test_ranks_share_both_sides_and_the_labels():
    whole, parts = semi(), [semi(ranks=Ranks(rank, 2)) for rank in (0, 1)]
    for step in (0, 4, 9):
        shares = zip(*(part.batch(step) for part in parts), strict=True)
        for pair, want in zip(shares, whole.batch(step), strict=True):
            assert torch.equal(torch.cat(pair), want)
