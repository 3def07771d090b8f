"""What a step is fed with: random views of images, kept features of views, or views of images with
and without labels."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from data.augment import BatchedAugment, CropFlip, SimCLRAugment
from data.store import RowStore
from data.views import augmentation, kept_views, labelled_and_unlabelled, random_views
from models import GPQ, PrototypeQuantizer, build_spq
from models.vgg import MEAN
from utils.distributed import Ranks
from utils.errors import UserError
from utils.evaluation import RetrievalEvaluation, to_unit

CPU = torch.device("cpu")
N, V = 40, 4


def flags(cache, **changes):
    known = {
        "arch": "resnet18",
        "cache_dir": cache,
        "amp": "off",
        "input_size": 16,
        "seed": 2,
        "cached_views": V,
        "augmentation": "batched",
        "crop_size": 12,
        "early_crop_size": 8,
        "early_share": 0.25,
        "crop_min_area": 0.08,
        "jitter_strength": 1.0,
        "batch_size": 10,
        "epochs": 2,
        "accumulate": 1,
        "eval_only": False,
        "reversal_weight": 1.0,
        "reversal_warmup_epochs": 0.0,
        "views": 2,
        "neighbour_share": 0.0,
        "neighbours": 3,
    }
    known |= {"entropy_weight": 0.1}
    return Namespace(**(known | changes))


@pytest.fixture
def images():
    return torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8)


@pytest.fixture
def model():
    found = build_spq("resnet18", 8, "soft", M=2, K=4, d=4)
    found.freeze_trunk()
    found.trunk.seen = 0

    def count(module, inputs):
        module.seen += len(inputs[0])

    found.trunk.register_forward_pre_hook(count)
    return found


# --- fresh ones ---------------------------------------------------------------------------------


def test_the_augmentation_is_that_of_the_flags():
    for name, kind in (("kornia", SimCLRAugment), ("batched", BatchedAugment)):
        assert isinstance(augmentation(flags(None, augmentation=name), 9, CPU), kind)
    assert isinstance(augmentation(gpq_flags(None), 32, CPU), CropFlip)
    found = augmentation(flags(None, crop_min_area=0.5, jitter_strength=0.25), 9, CPU)
    assert (found.crop_size, found.min_area, found.strength) == (9, 0.5, 0.25)


def test_early_steps_have_small_crops(images, model):
    views = random_views(flags(None), images, model, Ranks())
    sizes = [views.batch(step)[0].shape[-1] for step in range(8)]
    assert sizes == [8, 8, 12, 12, 12, 12, 12, 12]  # a quarter of two epochs of four
    one, two = views.batch(3)
    assert one.shape == two.shape == (10, 3, 12, 12)
    assert not torch.equal(one, two)
    again = random_views(flags(None), images, model, Ranks())
    assert torch.equal(again.batch(3)[0], one)
    other = random_views(flags(None, seed=3), images, model, Ranks())
    assert not torch.equal(other.batch(3)[0], one)


def test_each_image_has_so_many_views(images, model):
    views = random_views(flags(None, views=3), images, model, Ranks()).batch(5)
    assert [view.shape for view in views] == 3 * [(10, 3, 12, 12)]
    assert not torch.equal(views[0], views[2])


# --- the second stage ---------------------------------------------------------------------------


@pytest.mark.parametrize("cached_views", [0, V])
def test_the_second_stage_adds_a_nearest_neighbour(cached_views, tmp_path, images, model):
    stage = flags(tmp_path, neighbour_share=0.375, cached_views=cached_views)
    if cached_views:
        batches = kept_views(stage, images, None, model, Ranks())
        rows = batches.whole.rows[:][:, 0].float()
    else:
        batches = random_views(stage, images, model, Ranks())
        rows = images
    assert batches.neighbours.start == 5  # of eight steps
    assert [len(batches.batch(step)) for step in range(8)] == 5 * [2] + 3 * [3]
    # naive: the three largest cosines of the model's descriptors, itself left out
    with torch.no_grad():
        x = model.eval().describe(rows if cached_views else to_unit(images, 16))
    for n, found in enumerate(batches.neighbours.neighbours.tolist()):
        sims = [float(x[n] @ x[j] / (x[n].norm() * x[j].norm())) for j in range(N)]
        want = sorted((j for j in range(N) if j != n), key=lambda j: -sims[j])[:3]
        assert found == want
    assert model.training is False
    drawn = batches.neighbours.chosen(6)
    for image, neighbour in zip(batches.batches.chosen(6), drawn, strict=True):
        assert neighbour in batches.neighbours.neighbours[image]
    if cached_views:
        torch.testing.assert_close(batches.batch(6)[-1], rows[drawn])


def test_neighbours_of_a_checkpoint_are_kept(images, model):
    def make(share):
        return random_views(flags(None, neighbour_share=share), images, model, Ranks())

    first = make(0.5)
    assert first.state()["neighbours"] is None  # before the stage
    views = first.batch(4)
    torch.nn.init.normal_(model.head[2].weight)  # training went on
    state = first.state()
    same = make(0.5)
    same.restore(state)
    for one, two in zip(same.batch(4), views, strict=True):
        assert torch.equal(one, two)
    anew = make(0.5)
    anew.restore(None)  # of an older checkpoint
    assert not torch.equal(anew.batch(4)[-1], views[-1])  # mined from the new weights
    with pytest.raises(UserError, match="--epochs: the second stage began at step 4, and would "):
        make(0.25).restore(state)


# --- kept ones ----------------------------------------------------------------------------------


def test_each_step_takes_two_kept_views_of_its_images(tmp_path, images, model):
    batches = kept_views(flags(tmp_path), images, None, model, Ranks())
    assert model.trunk.seen == N * (V + 1)
    assert len(batches) == 4
    features = model.trunk.feature_dim
    places = sorted(tmp_path.glob("*/rows.bin"), key=lambda path: path.stat().st_size)
    stores = [
        RowStore(place, (views, features), torch.float16, torch.arange(N))[:]
        for place, views in zip(places, (1, V), strict=True)
    ]
    kept = torch.cat(stores, dim=1)  # the image itself, and its random views
    for step in (0, 5):
        views = batches.batch(step)
        rows = batches.batches.chosen(step)
        chosen = [(kept[rows].float() == view[:, None]).all(dim=-1) for view in views]  # (B, V)
        assert all((found.sum(dim=1) == 1).all() for found in chosen)
        assert not (chosen[0] & chosen[1]).any()  # two different ones
    assert model.trunk.seen == N * (V + 1)
    x, z = model(views[0])
    assert x.shape == z.shape == (10, 8)
    x.sum().backward()
    assert model.head[0].weight.grad.abs().sum() > 0


def test_an_evaluation_gets_features_too(tmp_path, images, model):
    labels = torch.arange(N) % 2
    evaluate = RetrievalEvaluation(
        (images[:6], labels[:6]), (images[6:], labels[6:]), 16, 5, ["squared_l2"]
    )
    want = evaluate.encode(model.eval())
    model.trunk.seen = 0
    kept_views(flags(tmp_path), images, evaluate, model, Ranks())
    assert model.trunk.seen == N * (V + 1) + N
    found = evaluate.encode(model)
    assert model.trunk.seen == N * (V + 1) + N
    assert torch.allclose(found[0], want[0], rtol=0, atol=2e-3 * float(want[0].abs().max()))
    assert [len(part) for part in evaluate.features] == [6, 34]


def test_other_processes_wait_for_the_features_of_the_evaluation(tmp_path, images, model):
    """They must not run ahead: the next word between processes has a time limit."""
    labels = torch.arange(N) % 2
    evaluate = RetrievalEvaluation((images, labels), (images, labels), 16, 5, ["squared_l2"])
    kept_views(flags(tmp_path), images, evaluate, model, Ranks(1, 2))
    assert model.trunk.seen == N * V + N  # nobody had made them yet; queries are the database
    assert evaluate.features is None
    kept_views(flags(tmp_path), images, evaluate, model, Ranks(0, 2))
    assert model.trunk.seen == N * V + N
    assert evaluate.features is not None


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"cached_views": V + 1},
        {"augmentation": "kornia"},
        {"crop_size": 10},
        {"crop_min_area": 0.5},
        {"jitter_strength": 0.5},
    ],
)
def test_views_under_other_flags_are_made_anew(tmp_path, images, model, change):
    kept_views(flags(tmp_path), images, None, model, Ranks())
    model.trunk.seen = 0
    kept_views(flags(tmp_path), images, None, model, Ranks())
    kept_views(flags(tmp_path, batch_size=20, epochs=9), images, None, model, Ranks())
    assert model.trunk.seen == 0
    kept_views(flags(tmp_path, **change), images, None, model, Ranks())
    assert model.trunk.seen == N * change.get("cached_views", V)


def test_a_model_in_training_mode_gives_the_same_features(tmp_path, images):
    """Without the frozen trunk's own switch: batch norm must not see batches."""
    seen = []
    for name in ("one", "two"):
        torch.manual_seed(0)
        model = build_spq("resnet18", 8, "soft", M=2, K=4, d=4).train(name == "one")
        batches = kept_views(flags(tmp_path / name), images, None, model, Ranks())
        seen.append(batches.batch(0)[0])
    assert torch.equal(*seen)


def test_features_that_do_not_fit_memory_are_read_as_needed(tmp_path, images, model, monkeypatch):
    want = kept_views(flags(tmp_path), images, None, model, Ranks())
    monkeypatch.setattr("data.datasets._memory", lambda device: 0)
    found = kept_views(flags(tmp_path), images, None, model, Ranks())
    assert isinstance(found.batches.rows, RowStore)
    for step in range(5):
        assert all(map(torch.equal, found.batch(step), want.batch(step)))


# --- labelled and unlabelled ones ---------------------------------------------------------------


class Middle(nn.Module):
    """A trunk: the value in the middle of an image, and the least and the largest one."""

    feature_dim = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        middle = images[:, 0, images.shape[2] // 2, images.shape[3] // 2]
        values = [middle, images.amin(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))]
        return self.scale * torch.stack(values, dim=1)


def gpq_flags(cache, **changes):
    known = {"augmentation": "crop-flip", "input_size": 32, "crop_size": 32, "early_crop_size": 32}
    return flags(cache, **(known | {"early_share": 0.0} | changes))


def small_gpq():
    net = GPQ(Middle(), PrototypeQuantizer(2, 4, 3, classes=5)).eval()
    net.freeze_trunk()
    return net


def plain_images(n, first=0, side=32):
    """Images of one value each, its number: a view tells it in its middle, wherever it is cut."""
    values = torch.arange(first, first + n, dtype=torch.uint8)
    return values.reshape(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()


def numbers(view):
    """Of the images that views (B, 3, S, S), or their features (B, 3), are of."""
    middle = 255 * (view if view.dim() == 2 else view[:, :, view.shape[2] // 2, view.shape[3] // 2])
    # the crop's rounding, and that of float16 to 1/4096
    assert (middle[:, 0] - middle[:, 0].round()).abs().max() < 0.1
    return middle[:, 0].round().long()


def two_sides(
    n=23, u=57, ranks=None, side=32, labels=None, cache=None, evaluate=None, net=None, **changes
):
    """Labelled images 0 to n - 1, of label 100 - number, and others from 100 on; with a folder for
    the cache kept views."""
    net = net or small_gpq()
    args = gpq_flags(cache, **({"cached_views": V if cache else 0} | changes))
    labels = 100 - torch.arange(n) if labels is None else labels
    sides = (plain_images(n, side=side), labels), plain_images(u, 100, side)
    return labelled_and_unlabelled(args, *sides, evaluate, net, ranks or Ranks())


def test_views_of_labelled_images_come_with_their_labels():
    batches, again = two_sides(), two_sides()
    assert len(batches) == 2
    first = [batches.batch(step) for step in range(7)]
    for view, labels, other, strength in first:
        assert view.shape == other.shape == (10, 3, 32, 32)
        assert torch.equal(labels, 100 - numbers(view))
        assert ((numbers(other) >= 100) & (numbers(other) < 157)).all()
        assert strength.tolist() == 10 * [1.0]
    for epoch in (0, 2, 4):
        seen = torch.cat([numbers(view) for view, *_ in first[epoch : epoch + 2]])
        assert len(seen.unique()) == 20
    for step in (4, 0, 6, 1):
        torch.manual_seed(step)
        for whose in (batches, again):
            assert all(map(torch.equal, whose.batch(step), first[step]))
    other_seed = two_sides(seed=3).batch(0)
    assert not torch.equal(other_seed[1], first[0][1])
    assert not torch.equal(numbers(other_seed[2]), numbers(first[0][2]))


def test_labels_of_several_kinds_at_once():
    labels = torch.randint(0, 2, (23, 5), dtype=torch.uint8)
    batches = two_sides(labels=labels)
    for step in range(5):
        view, found, *_ = batches.batch(step)
        assert torch.equal(found, labels[numbers(view)])


@pytest.mark.parametrize("seed", [0, 2, 2**31 - 1])
def test_the_two_sides_are_shuffled_and_cut_independently(seed):
    images, net = plain_images(40), small_gpq()
    args = gpq_flags(None, seed=seed, cached_views=0)

    def sides_of(images):
        both = (images, torch.arange(40)), images
        return labelled_and_unlabelled(args, *both, None, net, Ranks())

    batches = sides_of(images)
    orders = []
    for side in (0, 2):
        views = [batches.batch(step)[side] for step in range(8)]
        orders.append(torch.cat([numbers(view) for view in views]).split(40))
    # two epochs of two sides: four orders of the same 40 images, that do not follow each other
    for one in range(4):
        for two in range(one):
            a, b = (orders[i % 2][i // 2] for i in (one, two))
            assert torch.equal(a.sort().values, b.sort().values)
            # 40 images fall on the same place once on average; 8 do by chance once in 10^5 times
            assert (a == b).sum() < 8
    # where all images are the same one, the views differ by their crops
    same = plain_images(1, 50).expand(40, -1, -1, -1)
    same = torch.cat([same[:, :, :, :16], same[:, :, :, 16:] + 100], dim=3)
    view, _, other, _ = sides_of(same).batch(0)
    assert not torch.equal(view, other)


@pytest.mark.parametrize(
    ("n", "accumulate", "processes", "size"),
    [(7, 1, 1, 7), (8, 2, 1, 8), (8, 2, 2, 8), (12, 1, 1, 12), (13, 1, 1, 12), (4, 2, 1, 4)],
)
def test_of_fewer_labelled_images_than_a_batch_all_are_in_every_batch(
    n, accumulate, processes, size
):
    settings = {"accumulate": accumulate, "batch_size": 12}
    parts = [two_sides(n, ranks=Ranks(rank, processes), **settings) for rank in range(processes)]
    assert len(parts[0]) == 1
    assert parts[0].images == size + 12
    for step in range(4):
        shares = [part.batch(step) for part in parts]
        for view, labels, other, strength in shares:
            assert len(view) == len(labels) == size // processes
            assert len(other) == len(strength) == 12 // processes
            assert torch.equal(labels, 100 - numbers(view))
        assert len(torch.cat([labels for _, labels, *_ in shares]).unique()) == size


def test_fewer_unlabelled_images_than_a_batch():
    batches = two_sides(23, 6, accumulate=2)
    view, labels, other, strength = batches.batch(1)
    assert (len(view), len(labels), len(other), len(strength)) == (10, 10, 6, 6)
    assert len(numbers(other).unique()) == 6


def test_what_cannot_be_shared_out_evenly_is_told():
    """Else the number of parts would decide which images a batch has."""
    for n, u, few in ((7, 57, "7 labelled"), (23, 5, "5 unlabelled"), (4, 57, "4 labelled")):
        message = f"--batch_size=16: {few} images in a batch .* --accumulate=4 times 1 proc"
        with pytest.raises(UserError, match=message):
            two_sides(n, u, accumulate=4, batch_size=16)
    with pytest.raises(UserError, match=r"7 labelled images .* --accumulate=2 times 2 processes"):
        two_sides(7, accumulate=2, ranks=Ranks(0, 2))
    assert len(two_sides(8, 8, accumulate=4, batch_size=16).batch(0)[0]) == 8


def test_without_the_entropy_nothing_unlabelled_is_looked_at():
    with_it, without = two_sides(), two_sides(entropy_weight=0)
    assert without.unlabelled is None
    assert (with_it.images, without.images) == (20, 10)
    for step in range(3):
        view, labels = without.batch(step)
        assert torch.equal(view, with_it.batch(step)[0])
        assert torch.equal(labels, with_it.batch(step)[1])


@pytest.mark.parametrize(
    ("epochs", "want"),
    [
        (0.0, [2.0] * 6),
        (2.0, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),  # two batches of labelled images in an epoch
        (1.5, [2 / 3, 4 / 3, 2.0, 2.0, 2.0, 2.0]),
        (0.1, [2.0] * 6),  # less than a step
    ],
)
def test_the_reversal_warms_up(epochs, want):
    batches = two_sides(reversal_warmup_epochs=epochs, reversal_weight=2.0)
    found = [batches.batch(step)[3] for step in range(6)]
    assert all(len(set(strength.tolist())) == 1 for strength in found)
    assert [strength[0].item() for strength in found] == pytest.approx(want)
    assert batches.batch(1)[3][0].item() == pytest.approx(want[1])  # asked again


def test_a_reversal_of_no_strength_stays_so():
    batches = two_sides(reversal_weight=0.0, reversal_warmup_epochs=1.0)
    assert all(not batches.batch(step)[3].any() for step in range(4))


def test_edges_of_views_have_the_colour_that_normalisation_makes_zero():
    batches, corners = two_sides(batch_size=20), (0, -1)
    found = [view[:, :, y, x] for view in batches.batch(0)[::2] for y in corners for x in corners]
    found = torch.cat(found)  # (160, 3)
    # the crop's rounding; an image is gray, and the mean colour is not
    edge = (found - torch.tensor(MEAN) / 255).abs().amax(dim=-1) < 1e-4
    assert (edge | (found.std(dim=-1) < 1e-4)).all()
    # a corner lies in the image if the cut is shifted towards it, or not at all, on both axes: in
    # (5 / 9)^2 of the cuts, so that 0.69 are edges with a deviation of at most 0.073
    assert edge.float().mean().item() == pytest.approx(0.69, abs=0.25)


def test_images_of_another_size_are_resized():
    view, labels, other, _ = two_sides(side=40).batch(0)
    assert view.shape == other.shape == (10, 3, 32, 32)
    assert torch.equal(labels, 100 - numbers(view))


def test_both_sides_have_the_augmentation_of_the_flags():
    """Two steps an epoch, two epochs: small crops in the first of four steps."""
    changes = {"early_crop_size": 16, "crop_size": 24, "early_share": 0.25, "jitter_strength": 0.0}
    for name in ("batched", "kornia"):
        batches = two_sides(augmentation=name, **changes)
        for step, side in enumerate((16, 24, 24, 24)):
            view, labels, other, _ = batches.batch(step)
            assert view.shape == other.shape == (10, 3, side, side)
            # an image is of one gray value, which neither crop, flip, gray nor blur changes
            assert torch.equal(labels, 100 - numbers(view))
            assert (numbers(other) >= 100).all()
    halves = torch.cat([plain_images(40)[..., :16], plain_images(40, 100)[..., 16:]], dim=3)
    args = gpq_flags(None, augmentation="batched", cached_views=0, crop_min_area=0.01, **changes)
    batches = labelled_and_unlabelled(
        args, (halves, torch.arange(40)), halves, None, small_gpq(), Ranks()
    )
    for view in batches.batch(1)[::2]:
        bright = (255 * view[:, 0] > 70).float().mean(dim=(1, 2))
        # crops of a part of the image; GPQ's own shift it by an eighth at most
        assert (bright - 0.5).abs().max() > 0.3


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(1, 2)])
def test_kept_views_of_labelled_images_come_with_their_labels(tmp_path, ranks):
    net = small_gpq()
    batches = two_sides(cache=tmp_path, net=net, ranks=ranks)
    assert net.trunk.seen == (23 + 57) * (V + 1)
    fresh, share = two_sides(ranks=ranks), 10 // ranks.world_size
    whole = 0
    for step in (0, 1, 2, 9, 4, 4):
        found, want = batches.batch(step), fresh.batch(step)
        view, labels, other, strength = found
        assert view.shape == other.shape == (share, 3)
        assert torch.equal(labels, 100 - numbers(view))
        assert torch.equal(labels, want[1])  # the order of fresh views
        assert torch.equal(numbers(other), numbers(want[2]))
        assert torch.equal(strength, want[3])
        assert all(map(torch.equal, found, batches.batch(step)))
        # an image itself has no edge: its least and largest value are one
        whole += int((view[:, 1] == view[:, 2]).sum() + (other[:, 1] == other[:, 2]).sum())
    assert net.trunk.seen == (23 + 57) * (V + 1)
    # one of V + 1 views is the image, and a view is cut without an edge once in 81 times
    assert 0 < whole < 6 * 2 * share / 2


def test_kept_views_of_both_sides_are_chosen_independently(tmp_path):
    images = plain_images(40, 50)
    net = small_gpq()
    args = gpq_flags(tmp_path)
    both = (images, torch.arange(40)), images
    batches = labelled_and_unlabelled(args, *both, None, net, Ranks())
    assert not torch.equal(numbers(batches.batch(0)[0]), numbers(batches.batch(0)[2]))


def test_an_evaluation_beside_kept_views_gets_features_and_one_alone_does_not(tmp_path):
    net = small_gpq()
    images = plain_images(40, 50)
    evaluate = RetrievalEvaluation(
        (images[:6], torch.arange(6)), (images[6:], torch.arange(34)), 32, "all", ["inner_product"]
    )
    two_sides(cache=tmp_path, net=net, evaluate=evaluate, eval_only=True)
    assert net.trunk.seen == 0
    assert evaluate.features is None
    want = evaluate.encode(net)
    two_sides(cache=tmp_path, net=net, evaluate=evaluate)
    assert [len(part) for part in evaluate.features] == [6, 34]
    found = evaluate.encode(net)
    # float16 keeps 11 bits of a feature; sub-vectors have length 1
    torch.testing.assert_close(found[0], want[0], rtol=0, atol=5e-3)
    two_sides(cache=tmp_path, net=net, evaluate=evaluate, ranks=Ranks(1, 2))  # has no need of it
