"""Augmentation: range, size, randomness, SimCLR's settings; the batched pass equals kornia."""

import itertools
import math
import sys
from pathlib import Path

import kornia.augmentation as K
import kornia.enhance
import kornia.filters
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF

from data import augment as A
from data.augment import BatchedAugment, CropFlip, Draw, SimCLRAugment

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from benchmark import draw_of_kornia

# kornia solves float32 systems for each crop's map, which moves its points by some 1e-6 of the
# image's side: on noise of 32 pixels crops differ by up to 1e-5, after the jitter by 3e-5
SAME = {"rtol": 0, "atol": 1e-4}
EXACT = {"rtol": 0, "atol": 2e-6}  # single steps: the same arithmetic in another order
both = pytest.mark.parametrize("kind", [SimCLRAugment, BatchedAugment])


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)


# --- properties of both -------------------------------------------------------------------------


@both
@pytest.mark.parametrize("size", [16, 32])
def test_views_are_floats_in_range_of_the_crop_size(images, kind, size):
    view = kind(size)(images)
    assert view.shape == (64, 3, size, size)
    assert view.dtype == torch.float32
    # the colour jitter clamps; the blur is a weighted mean, exact to some 1e-7
    assert view.min() >= -1e-5
    assert view.max() <= 1 + 1e-5


@both
def test_two_views_differ_and_a_seed_repeats_them(images, kind):
    augment, before = kind(32), images.clone()
    torch.manual_seed(3)
    first, second = augment(images), augment(images)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(augment(images), first)
    assert torch.equal(augment(images), second)
    assert torch.equal(images, before)


@both
def test_each_image_gets_its_own_transform(kind):
    same = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(8, -1, -1, -1)
    views = kind(32)(same)
    distinct = {tuple(v.flatten()[::97].tolist()) for v in views}
    assert len(distinct) == 8


@both
def test_a_fifth_of_the_views_is_gray(kind):
    # many draws of one coloured image: gray means all channels are equal
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[:, 0], image[:, 1] = 200, 90
    views = kind(16)(image.expand(2000, -1, -1, -1))
    gray = (views.amax(1) - views.amin(1)).amax(dim=(1, 2)) < 1e-3
    # a binomial of 2,000 at 0.2 has a deviation of 0.009; four of them are allowed
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.036)


@both
def test_not_lowered_by_autocast(images, kind):
    augment = kind(32)
    torch.manual_seed(1)
    plain = augment(images)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images), plain)


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


# --- the same images as kornia's ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "H", "W"), [(16, 32, 32), (32, 32, 32), (32, 24, 40), (16, 45, 31)]
)
def test_the_batched_pass_makes_kornia_s_images(size, H, W):
    images = torch.randint(0, 256, (64, 3, H, W), dtype=torch.uint8)
    images[:8] = images[:8, :1]  # some have no colour, as the hue's angle then has no value
    kornia_s, ours = SimCLRAugment(size), BatchedAugment(size)
    orders = set()
    for seed in range(8):
        torch.manual_seed(seed)
        want = kornia_s(images)
        draw = draw_of_kornia(kornia_s)
        torch.testing.assert_close(ours.transform(images, draw), want, **SAME)
        orders.add(draw.order)
    assert len(orders) >= 5  # of 24


def test_equality_with_kornia_would_show_a_fault(images):
    kornia_s, ours = SimCLRAugment(32), BatchedAugment(32)
    want = kornia_s(images)
    right = vars(draw_of_kornia(kornia_s))
    jitter = right["jitter"]
    faults = {
        "top": right["top"] + 1,
        "width": right["width"] - 1,
        "flip": 1 - right["flip"],
        "jitter": (*jitter[:3], jitter[3] + 0.01),
        "order": right["order"][::-1],
        "gray": 1 - right["gray"],
        "side": right["side"] + 0.01,
    }
    for name, value in faults.items():
        view = ours.transform(images, Draw(**right | {name: value}))
        assert (view - want).abs().max() > 100 * SAME["atol"], name


def test_strength_and_smallest_crop_reach_kornia_s_images_too(images):
    kornia_s = SimCLRAugment(24, min_area=0.5, strength=2.0)
    want = kornia_s(images)
    draw = draw_of_kornia(kornia_s)
    torch.testing.assert_close(BatchedAugment(24).transform(images, draw), want, **SAME)
    assert (draw.height * draw.width).min() > 0.4 * 32 * 32
    assert draw.jitter[3].abs().max() > 0.1


# --- the same parameters ------------------------------------------------------------------------

DRAWS = 20_000


def drawn(H, W, **settings):
    """DRAWS parameters of each kind, from kornia's generators and from ours."""
    kornia_s, ours = SimCLRAugment(32, **settings), BatchedAugment(32, **settings)
    for transform in kornia_s.transforms:
        transform._params = transform.forward_parameters((DRAWS, 3, H, W))
    images = torch.zeros(1, 3, H, W, dtype=torch.uint8).expand(DRAWS, -1, -1, -1)
    return draw_of_kornia(kornia_s), ours.draw(images)


def assert_same_distribution(a, b, name):
    """Two-sample Kolmogorov-Smirnov: the largest distance of the two distribution functions.

    It exceeds sqrt(ln(2 / p) / 2 * (1/n + 1/m)) with probability p (less for integers): with
    20,000 draws and p = 1e-5 this is 0.025.
    """
    a, b = a.double().sort().values, b.double().sort().values
    points = torch.cat([a, b])
    below = [torch.searchsorted(x, points, right=True) / len(x) for x in (a, b)]
    limit = math.sqrt(math.log(2 / 1e-5) / 2 * (1 / len(a) + 1 / len(b)))
    distance = (below[0] - below[1]).abs().max().item()
    assert distance < limit, f"{name}: {distance:.4f}, allowed {limit:.4f}"


def test_the_comparison_of_distributions_would_show_a_fault():
    draws = torch.rand(DRAWS)
    assert_same_distribution(draws, torch.rand(DRAWS), "equal")
    with pytest.raises(AssertionError, match="narrower"):
        assert_same_distribution(draws, 0.95 * torch.rand(DRAWS), "narrower")


@pytest.mark.parametrize(
    ("H", "W", "settings"),
    [
        (32, 32, {}),
        (32, 32, {"min_area": 0.5, "strength": 0.5}),
        (40, 24, {"min_area": 0.2, "strength": 3.0}),  # 3 * 0.4 > 1: a factor is never negative
        (16, 64, {"min_area": 0.3}),  # only flat crops fit, and few: the fallback is drawn often
    ],
)
def test_parameters_have_kornia_s_distributions(H, W, settings):
    one, two = drawn(H, W, **settings)
    for name in ("height", "width", "top", "left"):
        assert_same_distribution(getattr(one, name), getattr(two, name), name)
    assert_same_distribution(one.height * one.width, two.height * two.width, "area")
    assert_same_distribution(one.width / one.height, two.width / two.height, "ratio")
    assert_same_distribution(one.top + one.height, two.top + two.height, "bottom")
    assert_same_distribution(one.left + one.width, two.left + two.width, "right")
    names = ("brightness", "contrast", "saturation", "hue")
    for name, a, b in zip(names, one.jitter, two.jitter, strict=True):
        assert_same_distribution(a, b, name)
    assert_same_distribution(one.side, two.side, "side")
    for draw in (one, two):
        assert (draw.top >= 0).all() and (draw.top + draw.height <= H).all()
        assert (draw.left >= 0).all() and (draw.left + draw.width <= W).all()


def test_how_often_each_step_is_taken():
    def rates(draw):
        neutral = torch.tensor([1, 1, 1, 0])[:, None]
        jittered = torch.stack(draw.jitter) != neutral  # (4, DRAWS)
        assert (jittered.any(0) == jittered.all(0)).float().mean() > 0.999  # all four or none
        return {
            "flip": draw.flip.mean(),
            "jitter": jittered.any(0).float().mean(),
            "gray": draw.gray.mean(),
            # a sigma of less than 0.11 has a weight of 0 to within 1e-18; 0.5% of them
            "blur": (draw.side > 0).float().mean(),
        }

    want = {"flip": A.P_FLIP, "jitter": A.P_JITTER, "gray": A.P_GRAY, "blur": A.P_BLUR}
    for found in map(rates, drawn(32, 32)):
        for name, p in want.items():
            deviation = math.sqrt(p * (1 - p) / DRAWS)  # at most 0.0035
            assert found[name].item() == pytest.approx(p, abs=4.5 * deviation), name


def test_parameters_are_drawn_independently():
    draw = drawn(32, 32)[1]
    jittered = draw.jitter[0] != 1
    rows = [draw.flip, draw.gray, draw.side > 0, jittered, draw.height, draw.top, draw.left]
    correlation = torch.corrcoef(torch.stack([row.float() for row in rows]))
    correlation[4, 5] = correlation[5, 4] = 0  # a low crop starts anywhere, a high one on top
    # height and width of a crop share its area, and so do its height and left margin
    correlation[4, 6] = correlation[6, 4] = correlation[5, 6] = correlation[6, 5] = 0
    # the correlation of n independent pairs has a deviation of 1 / sqrt(n) = 0.007
    assert (correlation - torch.eye(7)).abs().max() < 5 / math.sqrt(DRAWS)
    factors = torch.stack([factor[jittered] for factor in draw.jitter])
    assert (torch.corrcoef(factors) - torch.eye(4)).abs().max() < 5 / math.sqrt(0.8 * DRAWS)


def test_every_order_of_the_jitter_comes():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    orders = [BatchedAugment(8).draw(images).order for _ in range(480)]
    # each of the 24 is missed by 480 draws with a probability of 1e-9
    assert set(orders) == set(itertools.permutations(range(4)))


@pytest.mark.parametrize(
    ("H", "W", "min_area", "crop"),
    [
        (3, 300, 0.08, (3, 4)),  # the smallest allowed area is higher than the image
        (300, 3, 0.08, (4, 3)),
        (2, 100, 0.08, (2, 3)),
        (40, 40, 1.0, (40, 40)),
    ],
)
def test_where_no_crop_fits_it_is_the_largest_of_an_allowed_ratio(H, W, min_area, crop):
    for draw in drawn(H, W, min_area=min_area):
        assert (draw.height == crop[0]).all()
        assert (draw.width == crop[1]).all()
    one, two = drawn(H, W, min_area=min_area)
    assert_same_distribution(one.top, two.top, "top")
    assert_same_distribution(one.left, two.left, "left")


# --- single steps -------------------------------------------------------------------------------


def coloured(kind):
    """(32, 3, 8, 8) in [0, 1]."""
    view = torch.rand(32, 3, 8, 8)
    if kind == "gray":
        return view[:, :1].expand(-1, 3, -1, -1).clone()
    if kind == "saturated":  # the eight corners of the cube of colours
        return view.round()
    if kind == "equal pairs":  # two channels tie for the largest or the smallest
        view[:, 1] = view[:, 0]
        return torch.stack([v[torch.randperm(3)] for v in view])
    return view


@pytest.mark.parametrize("kind", ["random", "gray", "saturated", "equal pairs"])
def test_hue_is_shifted_as_by_kornia_and_torchvision(kind):
    view, turns = coloured(kind), torch.rand(32) - 0.5
    turns[:3] = torch.tensor([0.0, 0.5, -0.5])
    ours = A.adjust_hue(view, turns[:, None, None, None])
    torch.testing.assert_close(kornia.enhance.adjust_hue(view, 2 * math.pi * turns), ours, **EXACT)
    theirs = [TF.adjust_hue(v, t.item()) for v, t in zip(view, turns, strict=True)]
    torch.testing.assert_close(torch.stack(theirs), ours, **EXACT)
    torch.testing.assert_close(ours[0], view[0], **EXACT)


def test_a_third_of_a_turn_exchanges_the_channels():
    view = coloured("random")
    third = torch.full((32, 1, 1, 1), 1 / 3)
    torch.testing.assert_close(A.adjust_hue(view, third), view.roll(1, dims=1), **EXACT)


@pytest.mark.parametrize("kind", ["random", "gray", "saturated"])
def test_brightness_contrast_and_saturation_are_kornia_s(kind):
    view, factor = coloured(kind), 2 * torch.rand(32)
    enhance = kornia.enhance
    pairs = [
        (A.adjust_brightness, enhance.adjust_brightness_accumulative),
        (A.adjust_contrast, enhance.adjust_contrast_with_mean_subtraction),
        (A.adjust_saturation, enhance.adjust_saturation_with_gray_subtraction),
    ]
    for ours, theirs in pairs:
        found = ours(view, factor[:, None, None, None])
        torch.testing.assert_close(found, theirs(view, factor), **EXACT)
        assert found.min() >= 0 and found.max() <= 1


def test_blur_is_a_gaussian_of_three_pixels():
    view, sigma = torch.rand(32, 3, 9, 13), torch.linspace(0.1, 2.0, 32)
    weight = torch.exp(-0.5 / sigma**2)
    ours = A.blur(view, weight / (1 + 2 * weight))
    theirs = kornia.filters.gaussian_blur2d(view, (3, 3), sigma[:, None].expand(-1, 2))
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert torch.equal(A.blur(view, torch.zeros(32)), view)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_crop_is_cut_out_and_resized(flip):
    images = torch.randint(0, 256, (6, 3, 20, 30), dtype=torch.uint8)
    top, left, height, width = (torch.randint(1, 10, (6,)).float() for _ in range(4))
    top[0], left[0], height[0], width[0] = 0, 0, 20, 30
    neutral, one = torch.zeros(6), torch.ones(6)
    jitter, flipped = (one, one, one, neutral), torch.full((6,), flip)
    draw = Draw(top, left, height, width, flipped, jitter, (0, 1, 2, 3), neutral, neutral)
    found = A.crop_resize(images, draw, 12)
    boxes = torch.stack([top, left, height, width], 1).int().tolist()
    for view, image, (y, x, h, w) in zip(found, images, boxes, strict=True):
        cut = image[None, :, y : y + h, x : x + w] / 255.0
        want = F.interpolate(cut, (12, 12), mode="bilinear", align_corners=True)[0]
        torch.testing.assert_close(view, want.flip(-1) if flip else want, **EXACT)


# --- GPQ's --------------------------------------------------------------------------------------

COLOUR = (0.5, 0.25, 0.75)
# kornia's maps move points by some 1e-6 of the side: noise of 64 pixels changes by up to 1.4e-5
WARP = {"rtol": 0, "atol": 1e-4}


def located(n, side):
    """Images (n, 3, side, side) uint8: red tells the row, green the column, blue is noise."""
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    step = 255 // (side - 1)
    images[:, 0] = step * torch.arange(side)[:, None]
    images[:, 1] = step * torch.arange(side)
    return images


def cuts(view, side):
    """Where each view (n, 3, side, side) of `located` images was cut out of its padded image:
    top, left (n,) in [0, 2 pad], and whether it is mirrored."""
    step, half, pad = 255 // (side - 1), side // 2, side // 8
    row, column = ((255 * view[:, c, half] / step).round().long() for c in (0, 1))
    flipped = column[:, half + 1] < column[:, half]
    middle = torch.where(flipped, side - 1 - half, half)  # of the crop: what stands in the middle
    return row[:, half] - half + pad, column[:, half] - middle + pad, flipped


@pytest.mark.parametrize(("n", "side"), [(3000, 32), (200, 16), (50, 64)])
def test_every_view_is_a_crop_of_the_padded_image(n, side):
    images, pad = located(n, side), side // 8
    view = CropFlip(side, COLOUR)(images)
    assert view.shape == (n, 3, side, side)
    assert view.dtype == torch.float32
    assert view.min() >= 0 and view.max() <= 1
    top, left, flipped = cuts(view, side)
    padded = torch.tensor(COLOUR).view(1, 3, 1, 1).repeat(n, 1, side + 2 * pad, side + 2 * pad)
    padded[:, :, pad:-pad, pad:-pad] = images / 255.0
    i, pixels = torch.arange(n)[:, None, None], torch.arange(side)
    columns = torch.where(flipped[:, None], pixels.flip(0), pixels)
    rows, columns = (top[:, None] + pixels)[:, :, None], (left[:, None] + columns)[:, None]
    want = padded.permute(0, 2, 3, 1)[i, rows, columns].permute(0, 3, 1, 2)
    torch.testing.assert_close(view, want, **WARP)
    # 3,000 draws among 162: each has 19 with a deviation of 4.3
    counts = torch.zeros(2 * pad + 1, 2 * pad + 1, 2)
    counts.index_put_((top, left, flipped.long()), torch.tensor(1.0), accumulate=True)
    if n == 3000:
        assert counts.shape[:2] == (9, 9)
        assert counts.min() >= 1
        assert counts.max() <= 45
    # the binomial's deviation is at most 0.5 / sqrt(n); four of them are allowed
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=2 / math.sqrt(n))


def test_crops_of_images_of_another_size_are_those_of_the_resized_ones():
    images = torch.randint(0, 256, (20, 3, 24, 40), dtype=torch.uint8)
    small = F.interpolate(images / 255.0, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    rounded = (255 * small).round().to(torch.uint8)
    augment = CropFlip(16, COLOUR)
    torch.manual_seed(2)
    found = augment(images)
    torch.manual_seed(2)
    # to within the rounding to whole numbers
    torch.testing.assert_close(found, augment(rounded), rtol=0, atol=0.5 / 255 + 1e-4)


def test_a_crop_and_flip_is_repeated_by_a_seed_and_not_lowered_by_autocast(images):
    augment, before = CropFlip(32, COLOUR), images.clone()
    torch.manual_seed(3)
    first, second = augment(images), augment(images)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images), first)
    assert torch.equal(augment(images), second)
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's synchronisation")
def test_the_cpu_does_not_wait_for_the_gpu(images):
    images, augment = images.cuda(), BatchedAugment(32)
    augment(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert augment(images).is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
