"""What a query network is taught with: aligned rows, mined tuples against naive searches."""

from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data.taught
from data.batches import DeviceBatches, ViewBatches
from data.taught import TaughtBatches, TupleBatches, Tuples, able_queries, mine_tuples
from data.views import taught_batches
from utils.distributed import Ranks
from utils.errors import UserError

N, D, R = 60, 6, 3
CPU = torch.device("cpu")


@pytest.fixture
def gallery():
    return F.normalize(torch.randn(N, D), dim=1)


@pytest.fixture
def light():
    """What the query network gives for each image."""
    return F.normalize(torch.randn(N, D), dim=1)


@pytest.fixture
def clusters():
    """Ten of different sizes, numbered with gaps; the last image is alone in its own."""
    found = torch.randint(0, 9, (N,)) * 7 + 3
    found[-1] = 500
    return found


def mine(light, gallery, clusters, queries=20, pool=N, negatives=R, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, pool, negatives)
    return mine_tuples(lambda rows: light[rows], gallery, clusters, *sizes, generator)


# --- mining ---------------------------------------------------------------------------------------


def test_pairs_of_the_set_are_kept_together(light, gallery, clusters):
    pairs = torch.tensor([[0, 9], [0, 31], [5, 5], [40, 2], [17, 3]])
    generator = torch.Generator().manual_seed(0)
    sizes = (4, N, R)
    found = mine_tuples(lambda rows: light[rows], gallery, clusters, *sizes, generator, pairs=pairs)
    drawn = [[q, p] for q, p in zip(found.query.tolist(), found.positive.tolist(), strict=True)]
    assert len(drawn) == 4 and all(pair in pairs.tolist() for pair in drawn)
    assert len({tuple(pair) for pair in drawn}) == 4
    for q, negatives in zip(found.query, found.negatives, strict=True):
        assert not (clusters[negatives] == clusters[q]).any()
    with pytest.raises(UserError, match="images in such, 0 pairs"):
        mine_tuples(lambda rows: light[rows], gallery, clusters, *sizes, generator, pairs=pairs[:0])


@pytest.mark.parametrize("chunk", [512, 7])
def test_tuples_are_what_a_naive_search_finds(light, gallery, clusters, chunk, monkeypatch):
    monkeypatch.setattr(data.taught, "SIMILAR_CHUNK", chunk)
    found = mine(light, gallery, clusters)
    assert [tuple(part.shape) for part in (found.query, found.positive)] == [(20,), (20,)]
    assert len(found.query.unique()) == 20
    for q, p, negatives in zip(found.query, found.positive, found.negatives, strict=True):
        assert q != p
        assert clusters[q] == clusters[p]
        best = {}  # of each other cluster the most similar
        for n in range(N):
            c, sim = int(clusters[n]), float(light[q] @ gallery[n])
            if c != clusters[q] and sim > best.get(c, (-9.0, 0))[0]:
                best[c] = (sim, n)
        assert negatives.tolist() == [n for _, n in sorted(best.values(), reverse=True)[:R]]
    assert torch.equal(found.rows()[:, 0], found.query)
    assert torch.equal(found.rows()[:, 1], found.positive)
    assert torch.equal(found.rows()[:, 2:], found.negatives)


def test_negatives_come_from_the_pool(light, gallery, clusters):
    seen = []
    for seed in range(5):
        found = mine(light, gallery, clusters, queries=N, pool=12, seed=seed)
        pool = found.negatives.unique()
        assert len(pool) <= 12
        seen.append(tuple(pool.tolist()))
    assert len(set(seen)) == 5


def test_queries_are_of_clusters_with_another_image(light, gallery, clusters):
    able = [n for n in range(N) if (clusters == clusters[n]).sum() > 1]
    assert able_queries(clusters) == len(able) < N
    assert sorted(mine(light, gallery, clusters, queries=10 * N).query.tolist()) == able


def test_every_image_of_the_cluster_may_be_the_positive(light, gallery):
    clusters = torch.arange(N) // 4 % 15  # fifteen of four
    pairs = set()
    for seed in range(60):
        found = mine(light, gallery, clusters, queries=N, seed=seed)
        pairs |= set(zip(found.query.tolist(), found.positive.tolist(), strict=True))
    # 3 others of each: that one never comes in 60 draws has a chance of 1e-8
    assert len(pairs) == 3 * N


def test_the_generator_decides(light, gallery, clusters):
    one, again, other = (mine(light, gallery, clusters, seed=seed).rows() for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    with_other_weights = mine(light.roll(1, 0), gallery, clusters, seed=1)
    assert torch.equal(with_other_weights.query, one[:, 0])
    assert torch.equal(with_other_weights.positive, one[:, 1])
    assert not torch.equal(with_other_weights.negatives, one[:, 2:])


def test_as_many_clusters_as_negatives_need_just_do(light, gallery):
    clusters = torch.arange(N) % (R + 1)
    found = mine(light, gallery, clusters)
    for q, negatives in zip(found.query, found.negatives, strict=True):
        assert {int(c) for c in clusters[negatives]} == {0, 1, 2, 3} - {int(clusters[q])}


@pytest.mark.parametrize(
    ("clusters", "pool", "message"),
    [
        (torch.arange(N), N, r"wants classes of two images or more.*60 classes, 0 images in such"),
        (torch.arange(N) % R, N, r"more than 3 of them \(--negatives\); this set has 3 classes"),
        (torch.arange(N) % 30, 3, r"--pool=3: holds images of . classes, and a tuple has 3 neg"),
    ],
)
def test_what_cannot_be_mined_is_named(light, gallery, clusters, pool, message):
    with pytest.raises(UserError, match=message):
        mine(light, gallery, clusters, pool=pool)


# --- batches of tuples ----------------------------------------------------------------------------


class Grey(nn.Module):
    """A view: the images in [0, 1]; and some noise, so that its seed is seen."""

    def __init__(self, noise=0.0, size=4):
        super().__init__()
        self.noise, self.size = noise, size

    def forward(self, images):
        found = images[:, :, : self.size, : self.size].float() / 255
        return found + self.noise * torch.rand_like(found)


def numbered():
    """Images whose pixels all have the image's number."""
    return torch.arange(N, dtype=torch.uint8)[:, None, None, None].expand(N, 3, 4, 4).contiguous()


def some_tuples(epoch, queries=12):
    generator = torch.Generator().manual_seed(epoch)
    rows = torch.stack([torch.randperm(N, generator=generator)[: 2 + R] for _ in range(queries)])
    return Tuples(rows[:, 0], rows[:, 1], rows[:, 2:])


def tuple_batches(gallery, batch_size=4, ranks=None, noise=0.0, tuples=12, asked=None, seed=0):
    def mine(epoch):
        if asked is not None:
            asked.append(epoch)
        return some_tuples(epoch, tuples)

    augment = Grey(noise)
    return TupleBatches(
        numbered(),
        gallery,
        mine,
        tuples,
        R,
        batch_size,
        lambda step: augment,
        seed,
        ranks or Ranks(),
        CPU,
    )


def shown(views):
    """Which images views are of."""
    return (views[:, :, 0, 0, 0] * 255).round().long()


def test_views_and_features_are_of_the_mined_images(gallery):
    asked = []
    batches = tuple_batches(gallery, asked=asked)
    assert (len(batches), batches.images) == (3, 4 * (2 + R))
    for step in range(7):
        views, features = batches.batch(step)
        assert views.shape == (4, 2 + R, 3, 4, 4)
        epoch, i = divmod(step, 3)
        want = some_tuples(epoch).rows()[4 * i : 4 * i + 4]
        assert torch.equal(shown(views), want)
        assert torch.equal(features, gallery[want])
    assert asked == [0, 1, 2]  # once an epoch


def test_views_depend_on_seed_step_and_rank_alone(gallery):
    one = tuple_batches(gallery, noise=0.1)
    want = [one.batch(step)[0] for step in range(3)]
    again = tuple_batches(gallery, noise=0.1)
    torch.rand(5)
    assert torch.equal(again.batch(2)[0], want[2])
    assert not torch.equal(tuple_batches(gallery, noise=0.1, seed=1).batch(2)[0], want[2])
    noises = {float((v - shown(v)[..., None, None, None] / 255).sum()) for v in want}
    assert len(noises) == 3


def test_ranks_share_out_the_global_batch(gallery, monkeypatch):
    whole = tuple_batches(gallery)
    told = some_tuples(0).rows()
    # the main rank's are collected; what another one would have mined is not asked for
    monkeypatch.setattr(Ranks, "collect", lambda self, value: [told, None])
    asked = []
    parts = [tuple_batches(gallery, ranks=Ranks(rank, 2), asked=asked) for rank in range(2)]
    assert {len(part) for part in parts} == {len(whole)}
    assert {part.images for part in parts} == {whole.images}
    for step in range(3):
        found = [part.batch(step) for part in parts]
        views, features = (torch.cat(side) for side in zip(*found, strict=True))
        want = told[4 * step : 4 * step + 4]
        assert torch.equal(shown(views), want)
        assert torch.equal(features, gallery[want])
    assert asked == [0]
    with pytest.raises(UserError, match=r"--batch_size=3: must be a multiple of the 2 processes"):
        tuple_batches(gallery, batch_size=3, ranks=Ranks(0, 2))


def test_a_restored_state_goes_on_with_the_same_tuples(gallery):
    asked = []
    first = tuple_batches(gallery)
    assert first.state() == {}
    want = [first.batch(step) for step in range(3)]
    state = first.state()
    second = tuple_batches(gallery, asked=asked)
    second.mine = lambda epoch: asked.append(epoch) or some_tuples(epoch + 100)
    second.restore(state)
    for step in range(3):
        for got, other in zip(second.batch(step), want[step], strict=True):
            assert torch.equal(got, other)
    assert asked == []
    second.batch(3)  # the next epoch's are mined
    assert asked == [1]
    second.restore({})  # of a checkpoint before the first step
    second.batch(0)
    assert asked == [1, 0]


def test_fewer_tuples_than_a_batch_are_all_in_every_batch(gallery):
    batches = tuple_batches(gallery, batch_size=50)
    assert (len(batches), batches.images) == (1, 12 * (2 + R))
    assert len(batches.batch(0)[0]) == 12
    with pytest.raises(UserError, match=r"--method=aml: wants classes of two images or more"):
        tuple_batches(gallery, tuples=0)


def test_the_augmentation_is_that_of_the_step(gallery):
    batches = tuple_batches(gallery)
    batches.augment_at = lambda step: Grey(size=2 if step < 2 else 3)
    assert [batches.batch(step)[0].shape[-1] for step in range(4)] == [2, 2, 3, 3]


# --- views beside features ------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("several", [False, True])
def test_features_and_labels_are_of_the_images_that_are_seen(gallery, several, ahead):
    labels = torch.randint(0, 2, (N, 5)) if several else torch.arange(N) % 7
    parts = [Ranks(rank, 2) for rank in range(2)]
    seen = []
    for ranks in parts:
        images = DeviceBatches(numbered(), 8, 3, ranks)
        views = ViewBatches(images, lambda step: [Grey()], 3, ahead)
        batches = TaughtBatches(views, gallery, labels)
        assert (len(batches), batches.images) == (N // 8, 8)
        for step in range(2 * len(batches)):
            view, features, own = batches.batch(step)
            rows = (view[:, 0, 0, 0] * 255).round().long()
            assert len(rows) == 4
            assert torch.equal(features, gallery[rows])
            assert torch.equal(own, labels[rows])
            seen.append(rows)
        without = TaughtBatches(views, gallery, None).batch(0)
        assert len(without) == 2
    assert len(torch.cat(seen[: len(batches)] + seen[2 * len(batches) :][: len(batches)])) == 56
    assert len(torch.cat(seen).unique()) > 50


# --- what --method asks for -----------------------------------------------------------------------


class Light(nn.Module):
    """A query network whose embedding of a numbered image is a row of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.modes = []

    def describe(self, images):
        self.modes.append(self.training)
        return self.table[(images[:, 0, 0, 0] * 255).round().long()]


def flags(**changes):
    known = {"method": "aml", "batch_size": 4, "seed": 5, "tuples": 12, "pool": 40, "negatives": R}
    known |= {"augmentation": "kornia", "crop_size": 4, "early_crop_size": 2, "early_share": 0.5}
    known |= {"epochs": 2, "crop_min_area": 0.9, "jitter_strength": 0.0, "input_size": 4}
    known |= {"amp": "off", "eval_only": False}
    return Namespace(**known | changes)


def test_aml_mines_with_the_network_as_it_is(gallery, light, clusters):
    model = Light(light).train()
    batches = taught_batches(flags(), numbered(), gallery, clusters, model, Ranks())
    for epoch in range(2):
        batches.batch(3 * epoch)
        generator = torch.Generator().manual_seed(5 * 1_000_003 + epoch)
        found = mine_tuples(
            lambda rows: model.table.detach()[rows], gallery, clusters, 12, 40, R, generator
        )
        assert torch.equal(batches.state()["rows"], found.rows())
        with torch.no_grad():
            model.table.copy_(model.table.roll(1, 0))  # it has learned
    assert model.training  # as it was, though it mines in evaluation mode
    assert set(model.modes) == {False}


def test_aml_mines_in_the_precision_of_training_and_uncompiled(gallery, light, clusters):
    seen = []

    class Watched(Light):
        def describe(self, images):
            stance = torch._dynamo.eval_frame._stance.stance
            seen.append((torch.is_autocast_enabled("cpu"), stance))
            return super().describe(images)

    for amp in ("off", "bf16"):
        batches = taught_batches(
            flags(amp=amp), numbered(), gallery, clusters, Watched(light), Ranks()
        )
        batches.batch(0)
    assert seen == [(False, "force_eager"), (True, "force_eager")]


@pytest.mark.parametrize("method", ["aml", "ssp"])
@pytest.mark.parametrize(("batch_size", "early"), [(4, 3), (10, 1), (50, 1)])
def test_early_crops_are_smaller(gallery, light, clusters, method, batch_size, early):
    """The first half of two epochs: of 12 tuples, or of 60 images."""
    if method == "ssp":
        early = N // batch_size
    changes = {"method": method, "batch_size": batch_size}
    batches = taught_batches(flags(**changes), numbered(), gallery, clusters, Light(light), Ranks())
    assert len(batches) == early
    sides = [batches.batch(step)[0].shape[-1] for step in range(2 * early)]
    assert sides == early * [2] + early * [4]


def test_methods_without_labels_get_none(gallery, light, clusters):
    for labels, parts in ((None, 2), (clusters, 3)):
        args = flags(method="regression")
        batches = taught_batches(args, numbered(), gallery, labels, Light(light), Ranks())
        assert isinstance(batches, TaughtBatches)
        assert len(batches.batch(0)) == parts


def test_labels_are_where_the_model_is(gallery, light, clusters, monkeypatch):
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(light.to("meta"))

    monkeypatch.setattr("data.views.augmentation_at", lambda *args: None)  # kornia has no meta
    args = flags(method="hvs")
    batches = taught_batches(args, numbered(), gallery, clusters, Elsewhere(), Ranks())
    assert (batches.labels.device.type, batches.gallery.device.type) == ("meta", "meta")


def test_no_more_tuples_than_images_that_have_another(gallery, light, clusters):
    able = able_queries(clusters)
    args = flags(tuples=500, batch_size=8)
    batches = taught_batches(args, numbered(), gallery, clusters, Light(light), Ranks())
    assert len(batches) == able // 8
    alone = torch.arange(N)
    with pytest.raises(UserError, match=r"--method=aml: wants classes of two images or more"):
        taught_batches(args, numbered(), gallery, alone, Light(light), Ranks())
