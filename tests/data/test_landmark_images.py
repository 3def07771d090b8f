"""Landmark images: their own aspect, boxes in stored pixels, read ahead in order."""

import threading

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import data.landmark_images
from data.images import ImageError
from data.landmark_images import AHEAD, read_landmark, read_landmarks
from utils.errors import UserError


def save(path, width, height, seed=0, orientation=None):
    """A random pattern, (H, W, 3) uint8; PNG is lossless."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels


def channels_last(image):
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("size", "longest", "want"),
    [
        ((60, 40), 60, (60, 40)),
        ((60, 40), 1024, (60, 40)),  # never enlarged
        ((60, 40), 30, (30, 20)),
        ((40, 60), 31, (21, 31)),  # 20.67
        ((200, 1), 20, (20, 1)),  # 0.1 would be none
    ],
)
def test_the_longer_side_is_reduced_at_the_images_aspect(tmp_path, size, longest, want):
    pixels = save(tmp_path / "a.png", *size)
    found = read_landmark(tmp_path / "a.png", longest)
    assert found.dtype == torch.uint8 and found.shape == (3, want[1], want[0])
    expected = np.asarray(Image.fromarray(pixels).resize(want, Image.Resampling.BICUBIC))
    assert np.array_equal(channels_last(found), expected)
    if want == size:
        assert np.array_equal(channels_last(found), pixels)


def test_reducing_is_antialiased(tmp_path):
    """Stripes a pixel wide become their mean, not one of them."""
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    found = read_landmark(tmp_path / "a.png", 16)[:, :, 2:-2].float()
    assert (found - 127.5).abs().max() < 8


@pytest.mark.parametrize(
    ("box", "want"),
    [
        ((10, 5, 40, 25), (10, 5, 40, 25)),
        ((9.6, 5.4, 40.4, 24.9), (10, 5, 40, 25)),
        ((-7, -3.2, 40, 25), (0, 0, 40, 25)),
        ((10, 5, 400, 300.5), (10, 5, 50, 30)),
    ],
)
def test_a_box_is_cut_and_clipped(tmp_path, box, want):
    pixels = save(tmp_path / "a.png", 50, 30)
    left, top, right, bottom = want
    cut = pixels[top:bottom, left:right]
    whole = read_landmark(tmp_path / "a.png", 64, box)
    assert np.array_equal(channels_last(whole), cut)
    # the cut is reduced, after cutting
    small = read_landmark(tmp_path / "a.png", 15, np.array(box))
    assert max(small.shape) == 15
    size = small.shape[2], small.shape[1]
    expected = Image.fromarray(cut).resize(size, Image.Resampling.BICUBIC)
    assert np.array_equal(channels_last(small), np.asarray(expected))


# how each orientation turns stored pixels upright, by numpy
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_box_is_of_the_stored_pixels_and_its_part_is_upright(tmp_path, orientation, kind):
    path = tmp_path / f"a.{kind}"
    pixels = save(path, 50, 30, orientation=orientation)
    if kind == "jpg":  # as decoded, not as drawn
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    for box in (None, (3, 5, 20, 29)):
        part = pixels if box is None else pixels[5:29, 3:20]
        found = channels_last(read_landmark(path, box=box))
        assert np.array_equal(found, UPRIGHT[orientation](part)), box


def test_faults_of_an_image_are_told(tmp_path):
    save(tmp_path / "a.png", 50, 30)
    with pytest.raises(ImageError, match=r"has 50 x 30 pixels, none of them within its box \(50, "):
        read_landmark(tmp_path / "a.png", box=(50, 3, 60, 20))
    with pytest.raises(ImageError, match=r"within its box \(3\.1, 3, 3\.2, 20\)"):
        read_landmark(tmp_path / "a.png", box=(3.1, 3, 3.2, 20))
    with pytest.raises(ImageError, match="has 50 x 30 pixels; --max_pixels allows 1000"):
        read_landmark(tmp_path / "a.png", max_pixels=1000)
    with pytest.raises(ValueError, match="longest must be above 0, not 0"):
        read_landmark(tmp_path / "a.png", 0)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="is not an image that Pillow can read"):
        read_landmark(tmp_path / "b.png", box=(0, 0, 3, 3))


def test_many_are_read_in_order_each_with_its_box(tmp_path):
    names = [f"{i}.png" for i in range(11)]
    pixels = [save(tmp_path / name, 20 + i, 15, seed=i) for i, name in enumerate(names)]
    found = list(read_landmarks(tmp_path, names, threads=3))
    assert len(found) == 11
    assert all(np.array_equal(channels_last(a), b) for a, b in zip(found, pixels, strict=True))
    boxes = np.array([[i, 0, 20, 10] for i in range(11)], dtype=float)
    found = list(read_landmarks(tmp_path, names, 64, boxes))
    assert [tuple(a.shape) for a in found] == [(3, 10, 20 - i) for i in range(11)]
    assert list(read_landmarks(tmp_path, [])) == []


def test_no_more_than_a_few_are_read_ahead(tmp_path, monkeypatch):
    """And by several threads at once."""
    names = [f"{i}.png" for i in range(30)]
    read, both = [], threading.Barrier(2, timeout=10)

    def fake(path, *args):
        read.append(path)
        if len(read) <= 2:
            both.wait()  # passes only if two are read at the same time
        return torch.zeros(3, 1, 1)

    monkeypatch.setattr(data.landmark_images, "read_landmark", fake)
    images = read_landmarks(tmp_path, names, threads=2)
    assert not read  # nothing before it is asked for
    for taken in range(1, 6):
        next(images)
        assert len(read) <= taken + 2 * AHEAD - 1
    images.close()
    assert len(read) < 10  # what waited is not read any more


def test_the_first_that_cannot_be_used_is_named_when_it_is_due(tmp_path):
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        save(tmp_path / name, 8, 8)
    (tmp_path / "2.png").write_bytes(b"")
    images = read_landmarks(tmp_path, names)
    next(images), next(images)
    with pytest.raises(UserError, match=r"--data_dir=.*: 2\.png is empty \(0 bytes\)"):
        next(images)
