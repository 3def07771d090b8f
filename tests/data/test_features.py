"""Features of a frozen trunk: those that the trunk gives, computed once, whatever kills it."""

import itertools
import signal
import zlib
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import small_stores
import torch
import torch.nn.functional as F
from torch import nn

import data.features
from data.features import identify_rows, identify_trunk, kept_features, trunk_features
from data.store import RowStore, fill_store
from models import build_spq
from utils.errors import UserError
from utils.evaluation import L2_DISTANCES, RetrievalEvaluation, images_at_once


class Trunk(nn.Module):
    """A few features of an image, and how many images it saw."""

    feature_dim = 5

    def __init__(self, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        generator = torch.Generator().manual_seed(seed)
        for weights in self.parameters():
            nn.init.normal_(weights, generator=generator)
        self.register_buffer("count", torch.tensor(0))  # as batch norm has: no dimension
        self.seen = 0

    def forward(self, images):
        assert not self.training
        self.seen += len(images)
        return self.conv(images).relu().mean(dim=(2, 3))


class Jitter(nn.Module):
    """An augmentation: each image in a random light, 8 pixels of it."""

    def forward(self, images):
        return images[:, :, :8, :8] / 255.0 * torch.rand(len(images), 1, 1, 1)


def make_images(n=50, size=12):
    images = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(1))
    return images.to(torch.uint8)


def flags(cache, **changes):
    known = {"arch": "small", "cache_dir": cache, "amp": "off", "input_size": 12, "seed": 3}
    return Namespace(**(known | changes))


def keep(cache, trunk, images, augments=None, settings=(), **changes):
    return kept_features(flags(cache, **changes), trunk.eval(), images, augments, settings, "test")


# --- what they are ------------------------------------------------------------------------------


# at 12 pixels all go through at once; at 48 and 80 they are more than that
@pytest.mark.parametrize(("n", "size"), [(50, 12), (300, 48), (130, 80)])
def test_features_are_those_of_the_trunk(tmp_path, n, size):
    trunk, images = Trunk().eval(), make_images(n, size)
    with torch.no_grad():
        want = trunk(images / 255.0).half()
    found = keep(tmp_path, trunk, images, input_size=size)
    assert found.shape == (n, 1, 5)
    assert found.dtype == torch.float16
    # sums of a convolution over other batches may differ in their last bits
    assert torch.allclose(found[:][:, 0].float(), want.float(), rtol=2e-3, atol=0)


def test_images_of_another_size_are_resized_as_in_an_evaluation(tmp_path):
    trunk, images = Trunk().eval(), make_images(6, 20)
    small = F.interpolate(images / 255.0, (12, 12), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        want = trunk(small)
    assert torch.allclose(keep(tmp_path, trunk, images)[:][:, 0].float(), want, rtol=2e-3)


def test_views_are_made_in_order_and_depend_on_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(data.features, "CHUNK", 120)
    monkeypatch.setattr("utils.evaluation.EVAL_PIXELS", 60 * 12**2)
    assert images_at_once(12) == 60
    trunk, images, augments = Trunk().eval(), make_images(200), [Jitter()] * 3
    found = keep(tmp_path, trunk, images, augments)
    assert found.shape == (200, 3, 5)
    want = []
    with torch.no_grad():
        for chunk in (images[:120], images[120:]):
            start = 0 if len(chunk) == 120 else 120
            torch.manual_seed(zlib.crc32(f"3 {start} kept".encode()))
            for part in chunk.split(60):
                want.append(torch.stack([trunk(augments[v](part)) for v in range(3)], dim=1))
    assert torch.equal(found[:], torch.cat(want).half())
    views = found[:].unbind(1)
    assert not any((a == b).all(dim=1).any() for a, b in itertools.pairwise(views))


def test_rows_on_disk_and_in_memory_give_the_same(tmp_path):
    trunk, images = Trunk().eval(), make_images()
    place = tmp_path / "images"
    on_disk = fill_store(
        place, 50, (3, 12, 12), torch.uint8, lambda a, b: (images[a:b], []), "images"
    )[0]
    assert isinstance(on_disk, RowStore)
    one = keep(tmp_path, trunk, images, [Jitter()] * 2)
    two = keep(tmp_path, trunk, on_disk, [Jitter()] * 2)
    assert torch.equal(one[:], two[:])
    some = torch.tensor([7, 3, 12])
    part = trunk_features(trunk, on_disk.part(some), 12, None, nullcontext)
    assert torch.allclose(part, trunk_features(trunk, images[some], 12, None, nullcontext))


def test_other_random_numbers_stay_as_they_were(tmp_path):
    trunk, images = Trunk(), make_images()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    keep(tmp_path, trunk, images, [Jitter()] * 2)
    assert torch.equal(torch.rand(3), want)


def test_features_beyond_float16_are_told(tmp_path):
    trunk = Trunk()
    nn.init.constant_(trunk.conv.bias, 1e5)
    with pytest.raises(UserError, match="features of small are too large for float16"):
        keep(tmp_path, trunk, make_images())


# --- kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("augments", [None, [Jitter()] * 2])
def test_the_second_time_the_trunk_sees_nothing(tmp_path, augments):
    trunk, images = Trunk(), make_images()
    first = keep(tmp_path, trunk, images, augments)
    assert trunk.seen == 50 * (1 if augments is None else 2)
    again, other = Trunk(), images.clone()  # equal ones
    assert torch.equal(keep(tmp_path, again, other, augments)[:], first[:])
    assert again.seen == 0
    assert len(list(tmp_path.iterdir())) == 1


def changed(name):
    """Arguments of `keep`, one of them changed."""
    trunk, images, settings, flags = Trunk(), make_images(), [2, "kornia"], {}
    if name == "weights":
        with torch.no_grad():
            trunk.conv.bias[4] += 1e-6
    elif name == "buffer":
        trunk.count += 1
    elif name == "images":
        images[49, 2, 11, 11] ^= 1
    elif name == "order":
        images = images.flip(0)
    elif name == "fewer":
        images = images[:49]
    elif name == "views":
        settings = [3, "kornia"]
    elif name == "augmentation":
        settings = [2, "batched"]
    elif name == "amp":
        flags = {"amp": "bf16"}
    elif name == "arch":
        flags = {"arch": "other"}
    return trunk, images, settings, flags


@pytest.mark.parametrize(
    "name",
    ["weights", "buffer", "images", "order", "fewer", "views", "augmentation", "amp", "arch"],
)
def test_whatever_decides_the_features_has_its_own(tmp_path, name):
    for trunk, images, settings, flags in (changed(None), changed(name)):
        keep(tmp_path, trunk, images, [Jitter()], settings, **flags)
        assert trunk.seen == len(images)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_store_of_changed_images_has_features_of_its_own(tmp_path):
    trunk = Trunk()
    (tmp_path / "rows.bin").write_bytes(make_images().numpy().tobytes())
    rows = torch.arange(50)
    for stamps in ("one", "two", "one"):
        images = RowStore(tmp_path / "rows.bin", (3, 12, 12), torch.uint8, rows, stamps)
        keep(tmp_path / "cache", trunk, images)
    assert trunk.seen == 100
    keep(tmp_path / "cache", trunk, images.part(slice(20)))
    assert trunk.seen == 120


def test_identities():
    images = make_images()
    assert identify_rows(images) == identify_rows(images.clone())
    assert identify_rows(images) != identify_rows(images.reshape(25, 6, 12, 12))
    strided = images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert identify_rows(images) == identify_rows(strided)
    one = Trunk()
    assert identify_trunk(one) == identify_trunk(Trunk())
    assert identify_trunk(one) != identify_trunk(Trunk(seed=1))
    assert identify_trunk(one.to(memory_format=torch.channels_last)) == identify_trunk(Trunk())


# --- kills --------------------------------------------------------------------------------------


def keep_in_chunks(cache):
    """For a process of its own."""
    data.features.CHUNK = 20
    keep(Path(cache), Trunk(), make_images(), [Jitter()] * 2)


# of three chunks each: rows and mark to the disk, the mark into its place
@pytest.mark.parametrize("die_at", [0, 2, 3, 5, 6, 8])
def test_killed_and_gone_on_with_gives_the_same(tmp_path, monkeypatch, die_at):
    code = small_stores.finish(keep_in_chunks, tmp_path / "killed", die_at=die_at)
    assert code == -signal.SIGKILL
    monkeypatch.setattr(data.features, "CHUNK", 20)
    stores, seen = {}, {}
    for name in ("whole", "killed"):
        trunk = Trunk()
        stores[name] = keep(tmp_path / name, trunk, make_images(), [Jitter()] * 2)[:]
        seen[name] = trunk.seen
    assert torch.equal(stores["killed"], stores["whole"])
    assert seen == {"whole": 100, "killed": 100 - 40 * (die_at // 3)}


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 48])
def test_an_evaluation_of_features_is_that_of_the_images(tmp_path, size):
    model = build_spq("resnet18", 8, "soft", M=4, K=16, d=4).eval()
    model.freeze_trunk()
    # a colour for each class, so that there is something to find
    labels = torch.arange(240) % 6
    colours = torch.randint(0, 200, (6, 3, 1, 1))[labels]
    images = (colours + torch.randint(0, 56, (240, 3, size, size))).to(torch.uint8)
    sides = (images[:40], labels[:40]), (images[40:], labels[40:])
    evaluate = RetrievalEvaluation(*sides, size, 50, L2_DISTANCES)
    with torch.no_grad():  # codewords among the descriptors, which are close together
        words = model.describe(images[:16] / 255.0).reshape(16, 4, 4)
        model.quantizer.codebooks.copy_(words.transpose(0, 1))
    plain, encoded = evaluate(model), evaluate.encoded
    kept = [keep(tmp_path, model.trunk, images, input_size=size) for images, _ in sides]
    evaluate.features = (kept[0][:], kept[1])  # in memory, and on disk
    model.trunk.forward = None  # must not be called
    found = evaluate(model)
    # float16 keeps 11 bits of a feature
    scale = encoded[0].abs().max()
    assert torch.allclose(evaluate.encoded[0], encoded[0], rtol=0, atol=2e-3 * scale)
    # codewords that are as near as each other may change places
    assert (evaluate.encoded[1] == encoded[1]).float().mean() > 0.97
    assert len(plain) == 2
    for one, two in zip(plain, found, strict=True):
        assert one["distance"] == two["distance"]
        assert one["mAP@50"] > 0.3
        assert abs(one["mAP@50"] - two["mAP@50"]) < 0.02
