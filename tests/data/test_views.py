"""What a step is fed with: random views of images, or kept features of views."""

from argparse import Namespace

import pytest
import torch

from data.augment import BatchedAugment, SimCLRAugment
from data.store import RowStore
from data.views import augmentation, kept_views, random_views
from models import build_spq
from utils.distributed import Ranks
from utils.evaluation import RetrievalEvaluation

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
    }
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
    found = augmentation(flags(None, crop_min_area=0.5, jitter_strength=0.25), 9, CPU)
    assert (found.crop_size, found.min_area, found.strength) == (9, 0.5, 0.25)


def test_early_steps_have_small_crops(images):
    views = random_views(flags(None), images, Ranks(), CPU)
    sizes = [views.batch(step)[0].shape[-1] for step in range(8)]
    assert sizes == [8, 8, 12, 12, 12, 12, 12, 12]  # a quarter of two epochs of four
    one, two = views.batch(3)
    assert one.shape == two.shape == (10, 3, 12, 12)
    assert not torch.equal(one, two)
    again = random_views(flags(None), images, Ranks(), CPU)
    assert torch.equal(again.batch(3)[0], one)
    other = random_views(flags(None, seed=3), images, Ranks(), CPU)
    assert not torch.equal(other.batch(3)[0], one)


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
        (images[:6], labels[:6]), (images[6:], labels[6:]), 16, 5, "squared_l2"
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
    evaluate = RetrievalEvaluation((images, labels), (images, labels), 16, 5, "squared_l2")
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
