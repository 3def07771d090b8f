"""Landmark images decoded for each batch: which, in which order, and what is missing."""

import shutil

import numpy as np
import pytest
import small_landmarks
import torch
from PIL import Image

from args import parse_args, ssp_parser
from data.augment import CropJitter
from data.batches import DeviceBatches, ViewBatches
from data.datasets import load_dataset
from data.images import read_image, to_array
from data.landmark_batches import (
    DecodedSquares,
    main,
    pairs_among,
    read_landmark_split,
    square_side,
    to_square,
)
from utils.distributed import Ranks
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Both sets; not to be changed."""
    root = tmp_path_factory.mktemp("landmarks")
    small_landmarks.make_sfm(root)
    return small_landmarks.make_gldv2(root)


def load(root, dataset, *flags):
    words = [f"--dataset={dataset}", f"--data_dir={root}", "--features=f.npy", "--method=aml"]
    return load_dataset(parse_args(ssp_parser(), [*words, *flags]), CPU)


def squares(root, dataset="gldv2", threads=2, side=32):
    split, _ = read_landmark_split(dataset, {"gldv2": "clean"}.get(dataset, "train"), root)
    return DecodedSquares(root, split.listing.names, side, threads)


# --- sets -----------------------------------------------------------------------------------------


def test_sfm_has_clusters_as_labels_and_its_own_pairs(sets):
    data = load(sets, "sfm120k", "--input_size=32")
    assert data.split.listing.labels.tolist() == [i % 8 for i in range(40)]
    assert data.classes == tuple(str(5 * c + 3) for c in range(8))
    assert data.pairs.tolist() == [[i, i + 8] for i in range(24)]
    assert data.query is None and data.db is None and data.labelled is None
    assert data.split.protocol == "train" and list(data.split.roles) == ["train"]
    assert data.train.side == square_side(32, 0.8) == 36
    assert load(sets, "sfm120k", "--input_size=32", "--augmentation=batched").train.side == 32


def test_gldv2_has_landmarks_as_labels(sets):
    data = load(sets, "gldv2")
    assert data.split.listing.labels.tolist() == [c for c in range(8) for _ in range(5)]
    assert data.classes == tuple(str(100 * c + 17) for c in range(8))
    assert data.pairs is None and data.split.protocol == "clean"
    assert data.train.side == 573  # 512 / sqrt(0.8)


def test_pairs_among_some_rows():
    pairs = torch.tensor([[0, 5], [5, 2], [2, 0], [7, 5]])
    assert pairs_among(pairs, torch.tensor([0, 2, 5]), 8).tolist() == [[0, 2], [2, 1], [1, 0]]
    assert pairs_among(pairs, torch.arange(8), 8).tolist() == pairs.tolist()
    assert not len(pairs_among(pairs, torch.tensor([1]), 8))


def test_missing_images_stop_or_are_left_out(sets, tmp_path, capsys):
    root = tmp_path / "sets"
    shutil.copytree(sets, root)
    whole = load(sets, "sfm120k")
    names = whole.split.listing.names
    for row in (30, 1, 2, 20, 11, 12):
        (root / names[row]).unlink()
    five = ", ".join(names[row] for row in (1, 2, 11, 12, 20))
    message = rf"--data_dir=.*: 6 of 40 images are missing: {five} and 1 more\. retrieval-SfM-120k"
    with pytest.raises(UserError, match=message):
        load(root, "sfm120k")
    data = load(root, "sfm120k", "--skip_missing")
    assert (
        f"6 of 40 images are missing: {five} and 1 more; they are left" in capsys.readouterr().out
    )
    kept = [row for row in range(40) if row not in (30, 1, 2, 20, 11, 12)]
    assert data.left_out == 6 and data.rows["train"].tolist() == kept
    assert data.train.names == [names[row] for row in kept]
    # what is listed is the same, what is used is not
    assert data.split.sha256 == whole.split.sha256 != data.used.sha256
    pairs = [(kept[q], kept[p]) for q, p in data.pairs.tolist()]
    gone = {30, 1, 2, 20, 11, 12}
    assert pairs == [(i, i + 8) for i in range(24) if not {i, i + 8} & gone]
    assert main([f"--data_dir={root}", "--dataset=sfm120k"]) == 2
    told = capsys.readouterr()
    assert "sfm120k: 40 images listed, 6 missing" in told.out and five in told.err
    assert main([f"--data_dir={root}", "--dataset=gldv2"]) == 0
    assert main([f"--data_dir={tmp_path}", "--dataset=gldv2"]) == 2
    assert "gldv2/train_clean.csv" in (told := capsys.readouterr().err) and "Weyand" in told


def test_a_set_without_any_image_is_refused(sets, tmp_path):
    (tmp_path / "gldv2").mkdir()
    shutil.copy(sets / "gldv2" / "train_clean.csv", tmp_path / "gldv2")
    with pytest.raises(UserError, match="40 of 40 images are missing"):
        load(tmp_path, "gldv2", "--skip_missing")


# --- images ---------------------------------------------------------------------------------------


def test_images_are_decoded_in_the_order_that_is_asked_for(sets):
    found = squares(sets, "sfm120k")
    rows = torch.tensor([7, 2, 2, 39])
    batch = found[rows]
    assert batch.shape == (4, 3, 32, 32) and batch.dtype == torch.uint8
    assert found.shape == (40, 3, 32, 32)
    for one, row in zip(batch, rows.tolist(), strict=True):
        assert torch.equal(one, to_square(read_image(sets / found.names[row], side=32), 32))
    assert torch.equal(found[2:4], found[torch.tensor([2, 3])])


def test_squares_are_the_middle_of_long_images_and_the_whole_of_others():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    whole = to_square(Image.fromarray(pixels), 24)
    assert np.array_equal(whole, to_array(Image.fromarray(pixels), 24))
    for axis in (0, 1):  # 60 x 200: the middle 80
        more = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
        image, middle = np.concatenate([more, pixels, more], axis=1), pixels
        if axis == 0:
            image, middle = image.transpose(1, 0, 2), pixels.transpose(1, 0, 2)
        found = to_square(Image.fromarray(np.ascontiguousarray(image)), 24)
        want = to_array(Image.fromarray(np.ascontiguousarray(middle)), 24)
        # the filter looks a little beyond the box
        inner = (slice(None), *[slice(3, -3)] * 2)
        assert np.abs(found[inner].numpy().astype(int) - want[inner]).max() <= 2
    same = Image.fromarray(np.ascontiguousarray(pixels[:, :60]))
    assert np.array_equal(to_square(same, 60).permute(1, 2, 0), pixels[:, :60])


def test_views_depend_on_seed_step_and_rank_alone(sets):
    def batches(threads, rank=0, seed=0):
        rows = squares(sets, threads=threads)
        read = DeviceBatches(rows, 8, seed, Ranks(rank, 2, rank), CPU)
        return ViewBatches(read, lambda step: [CropJitter(28)], seed)

    one, many = batches(1), batches(5)
    steps = [0, 1, 2, 7, 3]
    first = [one.batch(step)[0] for step in steps]
    torch.rand(7)  # what else draws does not matter
    for step, want in zip(reversed(steps), reversed(first), strict=True):
        assert torch.equal(many.batch(step)[0], want)
    assert first[0].shape == (4, 3, 28, 28)
    for other in (batches(1, rank=1), batches(1, seed=1)):
        assert not torch.equal(other.batch(0)[0], first[0])


def test_an_image_that_cannot_be_decoded_is_named(sets, tmp_path):
    root = tmp_path / "sets"
    shutil.copytree(sets, root)
    found = squares(root)
    (root / found.names[3]).write_bytes(b"no image")
    assert len(found[torch.tensor([0, 1, 2])]) == 3
    with pytest.raises(UserError, match=rf"{found.names[3]} is not an image .*--resume=auto, or "):
        found[torch.tensor([0, 3, 1])]
    assert len(found[torch.tensor([0, 1, 2])]) == 3  # goes on


def test_views_without_jitter_keep_the_colours():
    image = torch.full((2, 3, 40, 40), 90, dtype=torch.uint8)
    plain = CropJitter(32, strength=0.0)(image)
    torch.testing.assert_close(plain, torch.full((2, 3, 32, 32), 90 / 255))
    torch.manual_seed(0)
    jittered = CropJitter(32)(image.repeat(32, 1, 1, 1))
    changed = (jittered.mean(dim=(2, 3)) - 90 / 255).abs().amax(dim=1) > 1e-3
    assert 0.5 < changed.float().mean() < 1  # of 0.8 of them


def test_crops_show_at_least_so_much_of_the_image():
    ramp = torch.arange(100).expand(3, 100, 100)
    both = torch.stack([ramp, ramp.transpose(1, 2)]).to(torch.uint8)  # grows along x, along y
    torch.manual_seed(0)
    for _ in range(20):
        torch.manual_seed(int(torch.randint(1000, ())))
        state = torch.get_rng_state()
        crop = CropJitter(50, strength=0.0)
        wide = crop(both[:1].repeat(16, 1, 1, 1)) * 255
        torch.set_rng_state(state)
        high = crop(both[1:].repeat(16, 1, 1, 1)) * 255
        width = wide[:, 0, 0, -1] - wide[:, 0, 0, 0]
        height = high[:, 0, -1, 0] - high[:, 0, 0, 0]
        area = (width + 1) * (height + 1) / 1e4
        assert (area > 0.77).all() and (area < 1.01).all()
