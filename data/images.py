"""Images as users have them: found on disk, decoded whatever their kind, faults in a phrase."""

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from data.cifar10 import load_cifar10
from utils.errors import UserError

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB
# Pillow's decoders of pixels; others would run programs (EPS) or fetch nothing a camera writes
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".gif", ".bmp", ".dib", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".heic", ".heif"),
)
CIFAR10_NAME = "cifar10"

try:  # torchvision means to hand its decoders over to torchcodec; Pillow does without
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None
try:  # phones write HEIC; Pillow reads it with this package
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pass
# read_image has a stricter limit of its own, and damaged EXIF data harms no picture
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)


class ImageError(Exception):
    """One image cannot be used; the message is the reason, without the path."""


# --- one image ----------------------------------------------------------------------------------


def read_image(
    path: str | Path, max_pixels: int = MAX_PIXELS, side: int | None = None
) -> Image.Image:
    """Decode one image file to 8-bit RGB, upright.

    16-bit samples are scaled to 8 bits, transparency is laid over white, palettes, grey and CMYK
    become RGB, the EXIF orientation is applied. Of several frames the first counts.

    Args:
        path: a regular file.
        max_pixels: width * height of the largest image that is decoded.
        side: the size it will be reduced to, pixels: a JPEG of at least eight times that is then
            decoded at a half, quarter or eighth of its size, which is much faster.
    Returns:
        A PIL image of mode RGB.
    Raises:
        ImageError: saying why it cannot be used, whatever the decoder tripped over.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ImageError("is not a regular file")
        if found.st_size == 0:
            raise ImageError("is empty (0 bytes)")
        with Image.open(path, formats=_known_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"has {width} x {height} pixels; --max_pixels allows {max_pixels} in all"
                )
            if side is not None:
                image.draft(None, (4 * side, 4 * side))
            whole = image.format == "JPEG" and image.size == (width, height)
            if whole and image.mode in ("L", "RGB") and (found := _decode_jpeg(image)):
                return _upright(found)
            image.load()
            return _to_rgb(_upright(image))
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        hint = " (HEIC needs the package pillow-heif)" if _is_heic(path) else ""
        raise ImageError(f"is not an image that Pillow can read{hint}") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise ImageError(reason) from error
    except Exception as error:  # a damaged file can break a decoder anywhere
        detail = " ".join(str(error).split())[:120]
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {detail})") from error


def _decode_jpeg(image: Image.Image) -> Image.Image | None:
    """The pixels of an opened JPEG by torchvision, the very ones that Pillow decodes, at about its
    speed; None if it refuses, and then Pillow says why."""
    if decode_jpeg is None:
        return None
    image.fp.seek(0)
    content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
    try:
        pixels = decode_jpeg(content, mode=ImageReadMode.RGB)
    except RuntimeError:
        image.fp.seek(0)
        return None
    decoded = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    decoded.info = {key: image.info[key] for key in ("exif", "xmp") if key in image.info}
    return decoded


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _is_heic(path: str | Path) -> bool:
    return os.path.splitext(os.fspath(path))[1].lower() in (".heic", ".heif")


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # damaged EXIF data: the picture itself is good
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes -> RGB, 8 bits a channel."""
    if image.mode.startswith("I"):
        image = Image.fromarray(_from_integers(np.asarray(image)))
    elif image.mode == "F":
        image = Image.fromarray(_from_floats(np.asarray(image)))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_integers(values: np.ndarray) -> np.ndarray:
    """16-bit samples, which Pillow may hold in 32 bits -> uint8."""
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= 65535:
        raise ImageError("has 32-bit samples, whose white is unknown; allowed are 0 to 65535")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257


def _from_floats(values: np.ndarray) -> np.ndarray:
    """Samples in [0, 1] or [0, 255] -> uint8."""
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255):
        raise ImageError("has floating-point samples outside [0, 255], whose white is unknown")
    return np.rint(values * (255 if values.max() <= 1 else 1)).astype(np.uint8)


def to_array(image: Image.Image, side: int) -> np.ndarray:
    """An RGB image squeezed to a square of `side` pixels, bicubic -> uint8 (3, side, side).

    Source: SPQ resizes FLICKR25K and NUS-WIDE so. An image of that very size stays as it is.
    """
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(image).transpose(2, 0, 1).copy()


# --- many images --------------------------------------------------------------------------------


class ImageSource(Protocol):
    """A set of images with names.

    Attributes:
        kind: "files" or "cifar10".
        root: folder that names are relative to.
        names: of all images, each once; the order of the set.
        faults: (name, reason) of what could not even be listed.
        ignored: number of files passed over because they have no image's ending.
    """

    kind: str
    root: Path
    names: list[str]
    faults: list[tuple[str, str]]
    ignored: int

    def read(self, name: str, max_pixels: int, side: int | None) -> Image.Image:
        """As `read_image`."""


def load_square(
    source: ImageSource, name: str, side: int, max_pixels: int = MAX_PIXELS
) -> np.ndarray | str:
    """An image as networks take it, uint8 (3, side, side), or the reason why there is none."""
    try:
        return to_array(source.read(name, max_pixels, side), side)
    except ImageError as error:
        return str(error)


class Files:
    """Images below a folder, or those that a list names. See `ImageSource`."""

    kind = "files"

    def __init__(
        self, root: Path, names: list[str], faults: list[tuple[str, str]], ignored: int
    ) -> None:
        self.root, self.names, self.faults, self.ignored = root, names, faults, ignored

    def read(self, name: str, max_pixels: int = MAX_PIXELS, side: int | None = None) -> Image.Image:
        return read_image(os.path.join(self.root, name), max_pixels, side)


class Cifar10Images:
    """CIFAR-10 under the names `train/00000.png` to `train/49999.png` and `test/00000.png` to
    `test/09999.png`; the set itself is the training images, SPQ's database. See `ImageSource`."""

    kind = CIFAR10_NAME

    def __init__(self, data_dir: Path, download: bool = False) -> None:
        train, test = load_cifar10(data_dir, download)
        self.root, self.faults, self.ignored = Path(os.path.abspath(data_dir)), [], 0
        self._images = {"train": train.images, "test": test.images}
        self.names = [f"train/{i:05d}.png" for i in range(len(train.images))]

    def read(self, name: str, max_pixels: int = MAX_PIXELS, side: int | None = None) -> Image.Image:
        part, _, number = name.removesuffix(".png").partition("/")
        images = self._images.get(part, ())
        if not number.isdecimal() or int(number) >= len(images):
            raise ImageError("is no image of CIFAR-10; allowed are train/00000.png and the like")
        return Image.fromarray(images[int(number)].permute(1, 2, 0).numpy())


def open_images(
    spec: str, data_dir: Path, download: bool = False, flag: str = "--images"
) -> ImageSource:
    """The images that `--images` means.

    Args:
        spec: a folder (searched with all below it), one image file, a text file that lists images,
            or `cifar10`.
        data_dir: where CIFAR-10 is.
        download: fetch CIFAR-10 if it is not there.
        flag: for messages.
    Raises:
        UserError: if there is nothing of that name, or no image in it.
    """
    path = Path(spec)
    try:
        if path.is_dir():
            source = find_images(path)
        elif path.is_file():
            is_image = path.suffix.lower() in EXTENSIONS or _is_known_image(path)
            folder = Path(os.path.realpath(path.parent))
            source = Files(folder, [path.name], [], 0) if is_image else read_list(path)
        elif spec == CIFAR10_NAME:
            return Cifar10Images(data_dir, download)
        else:
            raise UserError(
                f"{flag}={spec}: there is no such file; allowed are a folder, an image, a list "
                f"of images (one path a line) and {CIFAR10_NAME}"
            )
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{flag}={spec}: cannot be read: {error}") from error
    if not source.names:
        told = f" ({source.ignored} other files)" if source.ignored else ""
        told += "".join(f"; {name} {reason}" for name, reason in source.faults[:3])
        endings = " ".join(sorted(EXTENSIONS))
        raise UserError(f"{flag}={spec}: holds no image{told}; known endings: {endings}")
    return source


def _is_known_image(path: Path) -> bool:
    """Whether a file without an image's ending is one."""
    try:
        with Image.open(path, formats=_known_formats()):
            return True
    except Exception:  # whatever the decoders trip over: not an image
        return False


def find_images(folder: Path) -> Files:
    """All files below `folder` that have an image's ending, in order of their paths.

    Links are followed, each folder is entered once, so links in a circle come to an end. Names
    that begin with a dot are passed over. Folders that cannot be entered are faults.
    """
    root = os.path.realpath(folder)  # one name for each image, however the folder is told
    names: list[str] = []
    faults: list[tuple[str, str]] = []
    ignored = 0
    entered: set[tuple[int, int]] = set()

    def fault(error: OSError) -> None:
        name = os.path.relpath(error.filename or root, root)
        faults.append((name, error.strerror or str(error)))

    for place, folders, files in os.walk(root, followlinks=True, onerror=fault):
        known = os.stat(place)
        if (known.st_dev, known.st_ino) in entered:
            folders.clear()
            continue
        entered.add((known.st_dev, known.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in EXTENSIONS:
                names.append(os.path.relpath(os.path.join(place, name), root))
            else:
                ignored += 1
    names.sort(key=os.fsencode)
    return Files(Path(root), names, faults, ignored)


def read_list(path: Path) -> Files:
    """The images that a text file names: one path a line, or ended by NUL bytes (`find -print0`),
    relative to the list's folder. Empty lines and repeated paths are passed over."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    root = os.path.realpath(path.parent)
    full = [os.path.join(root, os.fsdecode(line)) for line in lines if line.strip()]
    names = list(dict.fromkeys(os.path.relpath(name, root) for name in full))
    return Files(Path(root), names, [], 0)


def batched(items: list, size: int) -> Iterator[list]:
    """Lists of up to `size` items, in order. (itertools.batched is Python 3.12 and later.)"""
    for start in range(0, len(items), size):
        yield items[start : start + size]
