"""Augmentation: range, size, randomness, SimCLR's settings."""

import kornia.augmentation as K
import pytest
import torch

from data.augment import SimCLRAugment


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("size", [16, 32])
def test_views_are_floats_in_range_of_the_crop_size(images, size):
    view = SimCLRAugment(size)(images)
    assert view.shape == (64, 3, size, size)
    assert view.dtype == torch.float32
    # kornia's colour jitter clamps; the blur is a weighted mean, exact to some 1e-7
    assert view.min() >= -1e-5
    assert view.max() <= 1 + 1e-5


def test_two_views_differ_and_a_seed_repeats_them(images):
    augment = SimCLRAugment(32)
    torch.manual_seed(3)
    first, second = augment(images), augment(images)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(augment(images), first)
    assert torch.equal(augment(images), second)


def test_each_image_gets_its_own_transform():
    same = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(8, -1, -1, -1)
    views = SimCLRAugment(32)(same)
    distinct = {tuple(v.flatten()[::97].tolist()) for v in views}
    assert len(distinct) == 8


def test_a_fifth_of_the_views_is_gray():
    # many draws of one coloured image: gray means all channels are equal
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[:, 0], image[:, 1] = 200, 90
    views = SimCLRAugment(16)(image.expand(2000, -1, -1, -1))
    gray = (views.amax(1) - views.amin(1)).amax(dim=(1, 2)) < 1e-3
    # a binomial of 2,000 at 0.2 has a deviation of 0.009; four of them are allowed
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.036)


def test_settings_are_simclr_s():
    crop, flip, jitter, gray, blur = SimCLRAugment(32).transforms
    assert isinstance(crop, K.RandomResizedCrop)
    assert [flip.p, jitter.p, gray.p, blur.p] == [0.5, 0.8, 0.2, 0.5]
    assert isinstance(jitter, K.ColorJitter)
    assert isinstance(gray, K.RandomGrayscale)
    assert blur.flags["kernel_size"] == (3, 3)
    ranges = {
        "crop area": crop._param_generator.scale,
        "crop aspect ratio": crop._param_generator.ratio,
        "blur sigma": blur._param_generator.sigma,
        "brightness": jitter.brightness,
        "contrast": jitter.contrast,
        "saturation": jitter.saturation,
        "hue": jitter.hue,
    }
    want = {
        "crop area": [0.08, 1.0],
        "crop aspect ratio": [3 / 4, 4 / 3],
        "blur sigma": [0.1, 2.0],
        "brightness": [0.4],
        "contrast": [0.4],
        "saturation": [0.4],
        "hue": [0.1],
    }
    found = {name: torch.as_tensor(value).flatten().tolist() for name, value in ranges.items()}
    assert found == {name: pytest.approx(value) for name, value in want.items()}


def test_not_lowered_by_autocast(images):
    augment = SimCLRAugment(32)
    torch.manual_seed(1)
    plain = augment(images)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images), plain)
