"""Augmentation on the device that trains: SimCLR's, by kornia and as one batched pass; GPQ's; that
of landmarks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.evaluation import to_unit

RATIO = (3 / 4, 4 / 3)  # of a crop, width / height
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue (in turns)
LANDMARK_JITTER = (0.4, 0.4, 0.2, 0.1)
P_FLIP, P_JITTER, P_GRAY, P_BLUR = 0.5, 0.8, 0.2, 0.5
SIGMA = (0.1, 2.0)  # of the 3x3 blur, pixels
LUMA = (0.299, 0.587, 0.114)  # gray value of red, green, blue
CROP_TRIES = 10


class SimCLRAugment(nn.Module):
    """uint8 images -> one random float view of each, by kornia.

    RandomResizedCrop(crop_size), RandomHorizontalFlip(0.5), ColorJitter(0.4, 0.4, 0.4, 0.1;
    p 0.8), RandomGrayscale(0.2), RandomGaussianBlur(3x3, sigma 0.1 to 2.0, p 0.5). Call it once
    for each view.
    Random numbers come from torch's global generator: seeded runs repeat.

    Args:
        crop_size: side of the square crops, pixels.
        min_area: smallest crop, as a share of the image.
        strength: multiplies the four ranges of the colour jitter; 1 is SimCLR's on CIFAR-10.
    Source: SPQ, section 4.2; Chen et al. 2020. Departures: none (32 px is the published size).
    """

    def __init__(self, crop_size: int = 32, min_area: float = 0.08, strength: float = 1.0) -> None:
        super().__init__()
        self.transforms = nn.Sequential(
            # "resample" crops the whole batch in one warp; the default loops over images
            K.RandomResizedCrop(
                (crop_size, crop_size), (min_area, 1.0), RATIO, cropping_mode="resample"
            ),
            K.RandomHorizontalFlip(p=P_FLIP),
            K.ColorJitter(*(strength * j for j in JITTER), p=P_JITTER),
            K.RandomGrayscale(p=P_GRAY),
            K.RandomGaussianBlur((3, 3), SIGMA, p=P_BLUR),
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 -> views (B, 3, crop_size, crop_size) float32 in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return self.transforms(images.float() / 255.0)


@dataclass(frozen=True)
class Draw:
    """What a batched augmentation does to each of B images; every tensor is (B,).

    Attributes:
        top, left, height, width: the crop, whole pixels.
        flip: 1 where the crop is mirrored, 0 elsewhere.
        jitter: brightness, contrast and saturation factors, and the hue's shift in turns;
            1, 1, 1, 0 where nothing is done.
        order: in which the four come, one for all images, as in kornia.
        gray: 1 where colour is taken away.
        side: weight of the two neighbours in the 3x3 blur, each axis; 0 where there is none.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    jitter: tuple[Tensor, Tensor, Tensor, Tensor]
    order: tuple[int, ...]
    gray: Tensor
    side: Tensor


class BatchedAugment(nn.Module):
    """The augmentation of `SimCLRAugment` in a few large operations, without a CPU-GPU sync.

    Crop, resize and flip are one pair of matrix products (bilinear weights are separable), the
    jitter runs over the whole batch with neutral factors where it does not apply, the hue is
    shifted without going through HSV tables, the blur is two weighted sums. With the same
    parameters the images are kornia's to within 1e-4; the parameters have kornia's distributions.
    One call may hold the images of many batches, which then share the order of the
    four jitter steps, as the images of one batch do in kornia.

    Args and random numbers: as `SimCLRAugment`.
    """

    def __init__(self, crop_size: int = 32, min_area: float = 0.08, strength: float = 1.0) -> None:
        super().__init__()
        self.crop_size, self.min_area, self.strength = crop_size, min_area, strength

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 -> views (B, 3, crop_size, crop_size) float32 in [0, 1]."""
        return self.transform(images, self.draw(images))

    def draw(self, images: Tensor) -> Draw:
        """Random parameters for each image."""
        B, H, W = len(images), *images.shape[-2:]
        device = images.device

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.empty(B, *shape, device=device).uniform_(low, high)

        def chance(p: float) -> Tensor:
            return (torch.rand(B, device=device) < p).float()

        # the first of ten random crops that lies within the image; the whole image if none does
        area = uniform(self.min_area, 1.0, CROP_TRIES) * (H * W)
        ratio = uniform(math.log(RATIO[0]), math.log(RATIO[1]), CROP_TRIES).exp()
        width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (width > 0) & (width <= W) & (height > 0) & (height <= H)  # (B, tries)
        first = fits.float().argmax(dim=1, keepdim=True)
        found = fits.any(dim=1)
        whole = _whole(H, W)
        height = torch.where(found, height.gather(1, first)[:, 0], float(whole[0]))
        width = torch.where(found, width.gather(1, first)[:, 0], float(whole[1]))
        top = (torch.rand(B, device=device) * (H - height + 1)).floor()
        left = (torch.rand(B, device=device) * (W - width + 1)).floor()

        brightness, contrast, saturation, hue = (self.strength * j for j in JITTER)
        on = chance(P_JITTER)
        jitter = (
            1 + on * uniform(-min(1.0, brightness), brightness),
            1 + on * uniform(-min(1.0, contrast), contrast),
            1 + on * uniform(-min(1.0, saturation), saturation),
            on * uniform(-min(0.5, hue), min(0.5, hue)),
        )
        weight = torch.exp(-0.5 / uniform(*SIGMA).square())  # of a neighbour, the centre being 1
        return Draw(
            top,
            left,
            height,
            width,
            flip=chance(P_FLIP),
            jitter=jitter,
            order=tuple(torch.randperm(4).tolist()),  # on the host, as in kornia: no sync
            gray=chance(P_GRAY),
            side=chance(P_BLUR) * weight / (1 + 2 * weight),
        )

    def transform(self, images: Tensor, draw: Draw) -> Tensor:
        """Views of uint8 images under given parameters."""
        with torch.autocast(images.device.type, enabled=False):
            view = crop_resize(images, draw, self.crop_size)
            for step in draw.order:
                factor = draw.jitter[step][:, None, None, None]
                view = JITTER_STEPS[step](view, factor)
            return blur(to_gray(view, draw.gray), draw.side)


def _whole(H: int, W: int) -> tuple[int, int]:
    """Height and width of the largest crop whose ratio is allowed (torchvision's fallback)."""
    if W / H < RATIO[0]:
        return round(W / RATIO[0]), W
    if W / H > RATIO[1]:
        return H, round(H * RATIO[1])
    return H, W


def _weights(start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """Bilinear weights (B, out, size): row i holds those of the pixels around its source.

    The corner pixels' centres of the crop fall on those of the output, as in kornia.
    """
    step = (length - 1) / max(1, out - 1)  # source pixels an output pixel
    i = torch.arange(out, device=start.device)
    source = start[:, None] + i * step[:, None]  # (B, out)
    pixels = torch.arange(size, device=start.device)
    return (1 - (source[:, :, None] - pixels).abs()).clamp_(min=0)


def crop_resize(images: Tensor, draw: Draw, size: int) -> Tensor:
    """Crops of uint8 images, resized to (size, size) and mirrored: (B, 3, size, size) in [0, 1]."""
    H, W = images.shape[-2:]
    rows = _weights(draw.top, draw.height, H, size)  # (B, size, H)
    # mirrored: start at the right end of the crop and walk to the left
    left = draw.left + draw.flip * (draw.width - 1)
    columns = _weights(left, 1 + (1 - 2 * draw.flip) * (draw.width - 1), W, size)  # (B, size, W)
    pixels = images.to(rows.dtype).mul_(1 / 255.0).flatten(1, 2)  # (B, 3H, W)
    wide = (pixels @ columns.transpose(1, 2)).unflatten(1, (3, H))  # (B, 3, H, size)
    return rows[:, None] @ wide


def _gray_values(view: Tensor) -> Tensor:
    red, green, blue = view.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]  # (B, 1, S, S)


def adjust_brightness(view: Tensor, factor: Tensor) -> Tensor:
    """factor * view, clamped to [0, 1]."""
    return (view * factor).clamp_(0, 1)


def adjust_contrast(view: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean gray value, clamped."""
    mean = _gray_values(view).mean(dim=(2, 3), keepdim=True)
    return (view * factor + mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(view: Tensor, factor: Tensor) -> Tensor:
    """Blend with each pixel's gray value, clamped."""
    return (view * factor + _gray_values(view) * (1 - factor)).clamp_(0, 1)


def adjust_hue(view: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue by a part of the colour circle.

        h = hue in sixths of the circle, v = max(r, g, b), c = v - min(r, g, b)
        channel n = v - c * clamp(min(k, 4 - k), 0, 1),  k = (n + h + 6 * turns) mod 6

    with n = 5, 3, 1 for red, green, blue: HSV to RGB in one formula, without the six cases.
    """
    red, green, blue = view.unbind(1)
    high, low = view.amax(1), view.amin(1)
    chroma = high - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    of_red, of_green, of_blue = (green - blue) / safe, (blue - red) / safe, (red - green) / safe
    hue = torch.where(
        (red >= green) & (red >= blue),
        of_red,
        torch.where(green >= blue, 2 + of_green, 4 + of_blue),
    )
    n = torch.arange(5, 0, -2, device=view.device)[:, None, None]  # 5, 3, 1
    k = torch.remainder(n + (hue + 6 * turns[:, 0])[:, None], 6.0)  # (B, 3, S, S)
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


JITTER_STEPS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def to_gray(view: Tensor, gray: Tensor) -> Tensor:
    """Take the colour away where `gray` is 1."""
    return torch.where(gray[:, None, None, None] > 0, _gray_values(view), view)


def blur(view: Tensor, side: Tensor) -> Tensor:
    """3x3 blur of weights (side, 1 - 2 side, side) along each axis, borders reflected."""
    side = side[:, None, None, None]
    padded = F.pad(view, (0, 0, 1, 1), mode="reflect")
    view = (1 - 2 * side) * view + side * (padded[:, :, :-2] + padded[:, :, 2:])
    padded = F.pad(view, (1, 1, 0, 0), mode="reflect")
    return (1 - 2 * side) * view + side * (padded[..., :-2] + padded[..., 2:])


class CropFlip(nn.Module):
    """uint8 images -> one float view of each: padded, cropped at random and mirrored, by kornia.

    An eighth of the side (4 of 32 pixels) is added at each edge in the mean colour, which
    normalisation makes 0; then RandomCrop(side), RandomHorizontalFlip(0.5). Random numbers come
    from torch's global generator: seeded runs repeat.

    Args:
        side: of the images and of the views, pixels.
        colour: of the edges, (3,) in [0, 1].
    Source: GPQ's released training. Departures: none.
    """

    def __init__(self, side: int, colour: Sequence[float]) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("colour", torch.tensor(colour).view(1, 3, 1, 1))
        self.transforms = nn.Sequential(
            # "resample" crops the whole batch in one warp; at whole pixels it changes no value
            K.RandomCrop((side, side), padding=side // 8, cropping_mode="resample"),
            K.RandomHorizontalFlip(p=P_FLIP),
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 -> views (B, 3, side, side) float32 in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            centred = to_unit(images, self.side) - self.colour
            return (self.transforms(centred) + self.colour).clamp_(0, 1)


class CropJitter(nn.Module):
    """uint8 images -> one random float view of each, by kornia: a crop and, with a strength, its
    colours.

    RandomResizedCrop(crop_size), ColorJitter(0.4, 0.4, 0.2, 0.1; p 0.8). Random numbers come from
    torch's global generator: seeded runs repeat.

    Args:
        crop_size: side of the square crops, pixels.
        min_area: smallest crop, as a share of the image.
        strength: multiplies the four ranges of the colour jitter; 0 leaves colours as they are.
    Source: SSP, section IV, its training on Google Landmarks v2: min_area 0.8, strength 1.
    """

    def __init__(self, crop_size: int, min_area: float = 0.8, strength: float = 1.0) -> None:
        super().__init__()
        size = (crop_size, crop_size)
        steps: list[nn.Module] = [
            K.RandomResizedCrop(size, (min_area, 1.0), RATIO, cropping_mode="resample")
        ]
        if strength:
            steps.append(K.ColorJitter(*(strength * j for j in LANDMARK_JITTER), p=P_JITTER))
        self.transforms = nn.Sequential(*steps)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 -> views (B, 3, crop_size, crop_size) float32 in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            return self.transforms(images.float() / 255.0).clamp_(0, 1)


AUGMENTATIONS = {"kornia": SimCLRAugment, "batched": BatchedAugment}  # SimCLR's
CROP_FLIP = "crop-flip"  # GPQ's, `CropFlip`
CROP_JITTER = "crop-jitter"  # of landmarks, `CropJitter`
