"""Images of every kind come out right; damaged ones are told, whatever the decoder does."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.images
from data.images import (
    Cifar10Images,
    ImageError,
    find_images,
    open_images,
    read_image,
    read_list,
    to_array,
)
from utils.errors import UserError

RED, GREEN = (220, 30, 40), (20, 200, 60)


def two_halves(size=(32, 24)) -> Image.Image:
    """Left red, right green; wider than high, so that turning it shows."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 2, 0, *size))
    return image


def pixel(image, where):
    """Its mean colour near a corner, which lossy formats keep."""
    w, h = image.size
    x, y = (4 if "left" in where else w - 8), (4 if "top" in where else h - 8)
    return np.asarray(image)[y : y + 4, x : x + 4].reshape(-1, 3).mean(axis=0)


def close(colour, wanted, tolerance=12):  # JPEG and palettes move a colour by a few steps
    return np.abs(colour - np.asarray(wanted)).max() <= tolerance


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("RGB", "x.png", {}),
        ("RGB", "x.jpg", {"quality": 95}),
        ("RGB", "x.webp", {"quality": 95}),
        ("RGB", "x.bmp", {}),
        ("RGB", "x.tif", {}),
        ("RGB", "x.ppm", {}),
        ("RGB", "x.gif", {}),
        ("RGB", "x.jp2", {}),
        ("CMYK", "x.jpg", {"quality": 95}),
        ("CMYK", "x.tif", {}),
        ("YCbCr", "x.jpg", {"quality": 95}),
        ("P", "x.png", {}),
        ("RGBA", "x.png", {}),
        ("RGBA", "x.webp", {"lossless": True}),
    ],
)
def test_colours_survive_every_mode_and_format(tmp_path, mode, name, options):
    two_halves().convert(mode).save(tmp_path / name, **options)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert image.size == (32, 24)
    assert close(pixel(image, "top left"), RED)
    assert close(pixel(image, "top right"), GREEN)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_images(tmp_path, mode):
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (4, 0, 8, 8))
    image.convert(mode).save(tmp_path / "x.png")
    values = np.asarray(read_image(tmp_path / "x.png"))
    assert (values[:, :4] == 0).all()
    assert (values[:, 4:] == 255).all()


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_16_bits_are_scaled_not_cut_off(tmp_path, name):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / name)
    values = np.asarray(read_image(tmp_path / name))
    assert np.abs(values[..., 0].astype(int) - np.arange(256).reshape(16, 16)).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floating_point_samples(tmp_path, top):
    ramp = np.linspace(0, top, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.tif")
    values = np.asarray(read_image(tmp_path / "x.tif"))[..., 0].astype(int)
    assert np.abs(values - np.arange(256).reshape(16, 16)).max() <= 1


@pytest.mark.parametrize("kind", ["RGBA", "P"])
def test_transparency_is_laid_over_white(tmp_path, kind):
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((*RED, 0), (4, 0, 8, 8))
    if kind == "P":
        palette = Image.new("P", (8, 8), 0)
        palette.putpalette([*RED, 0, 0, 0])
        palette.paste(1, (4, 0, 8, 8))
        palette.save(tmp_path / "x.png", transparency=1)
    else:
        image.save(tmp_path / "x.png")
    values = np.asarray(read_image(tmp_path / "x.png"))
    assert (values[0, 0] == RED).all()
    assert (values[0, 7] == 255).all()


# where red, the left half of the upright picture, is stored under each orientation
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_orientation(tmp_path, orientation, turn):
    upright = two_halves()
    upright.paste((0, 0, 255), (0, 0, 10, 10))  # top left: tells mirrored from turned
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", quality=98, subsampling=0, exif=exif)
    image = read_image(tmp_path / "x.jpg")
    assert image.size == upright.size
    assert close(pixel(image, "top left"), (0, 0, 255))
    assert close(pixel(image, "bottom left"), RED)
    assert close(pixel(image, "top right"), GREEN)


# --- JPEG by torchvision ------------------------------------------------------------------------

needs_decoder = pytest.mark.skipif(data.images.decode_jpeg is None, reason="torchvision has none")


def textured(size, mode="RGB"):
    """Colours and edges, unlike in every block."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    noise = rng.normal(0, 20, (size[1], size[0], 3))
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)


def by_pillow(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def decoder(monkeypatch):
    """How often torchvision's decoder gave an image, and how often it refused."""
    outcomes = []
    decode = data.images.decode_jpeg

    def spy(*args, **kwargs):
        outcomes.append("refused")
        found = decode(*args, **kwargs)
        outcomes[-1] = "decoded"
        return found

    monkeypatch.setattr(data.images, "decode_jpeg", spy)
    return outcomes


@needs_decoder
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}])
def test_torchvision_decodes_the_pixels_of_pillow(tmp_path, decoder, mode, subsampling, options):
    for size in ((64, 48), (61, 35), (1, 1), (17, 8)):
        path = tmp_path / f"{size[0]}.jpg"
        textured(size, mode).save(path, subsampling=subsampling, **options)
        image = read_image(path)
        assert image.mode == "RGB"
        assert (np.asarray(image) == by_pillow(path)).all()
    assert decoder == ["decoded"] * 4


@needs_decoder
def test_reduced_cmyk_and_other_files_are_left_to_pillow(tmp_path, decoder):
    textured((640, 480)).save(tmp_path / "large.jpg")
    assert read_image(tmp_path / "large.jpg", side=32).size == (320, 240)
    textured((40, 30), "CMYK").save(tmp_path / "cmyk.jpg")
    textured((40, 30)).save(tmp_path / "x.png")
    read_image(tmp_path / "cmyk.jpg")
    read_image(tmp_path / "x.png")
    assert decoder == []
    read_image(tmp_path / "large.jpg", side=64)  # not eight times that
    assert decoder == ["decoded"]


def xmp(orientation):
    """Metadata of the kind that photo programs write beside EXIF."""
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


@needs_decoder
@pytest.mark.parametrize("kind", ["exif", "xmp"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_torchvision_images_are_upright_too(tmp_path, decoder, monkeypatch, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    told = {"exif": exif} if kind == "exif" else {"xmp": xmp(orientation)}
    textured((32, 24)).save(tmp_path / "x.jpg", **told)
    found = read_image(tmp_path / "x.jpg")
    assert decoder == ["decoded"]
    assert found.size == ((24, 32) if orientation == 6 else (32, 24))
    monkeypatch.setattr(data.images, "decode_jpeg", None)
    assert (np.asarray(found) == np.asarray(read_image(tmp_path / "x.jpg"))).all()


@needs_decoder
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_a_truncated_jpeg_is_refused_as_pillow_refuses_it(tmp_path, decoder, monkeypatch, share):
    content = io.BytesIO()
    textured((64, 48)).save(content, "JPEG")
    (tmp_path / "x.jpg").write_bytes(content.getvalue()[: int(share * content.tell())])
    reasons = []
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / "x.jpg")
        reasons.append(str(caught.value))
        monkeypatch.setattr(data.images, "decode_jpeg", None)
    assert reasons[0] == reasons[1]
    assert decoder in ([], ["refused"])  # Pillow may not even open it


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_without_torchvision_s_decoder(tmp_path, monkeypatch, mode):
    textured((64, 48), mode).save(tmp_path / "x.jpg")
    monkeypatch.setattr(data.images, "decode_jpeg", None)
    image = read_image(tmp_path / "x.jpg")
    assert image.mode == "RGB"
    assert (np.asarray(image) == by_pillow(tmp_path / "x.jpg")).all()


def test_damaged_exif_data_does_not_cost_the_picture(tmp_path):
    two_halves().save(tmp_path / "x.jpg", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert close(pixel(read_image(tmp_path / "x.jpg"), "top left"), RED)


def test_the_first_frame_of_several(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert close(np.asarray(read_image(tmp_path / "x.gif"))[0, 0], RED)


def test_a_large_jpeg_is_decoded_reduced(tmp_path):
    two_halves((1600, 1200)).save(tmp_path / "x.jpg")
    image = read_image(tmp_path / "x.jpg", side=32)
    assert image.size == (200, 150)  # an eighth, still more than 4 * 32
    assert read_image(tmp_path / "x.jpg").size == (1600, 1200)
    assert close(pixel(image, "top left"), RED)


def test_pixel_limit(tmp_path):
    Image.new("L", (100, 50)).save(tmp_path / "x.png")
    read_image(tmp_path / "x.png", max_pixels=5000)
    with pytest.raises(ImageError, match=r"100 x 50 pixels; --max_pixels allows 4999"):
        read_image(tmp_path / "x.png", max_pixels=4999)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded(kind: str, **options) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 60,000 pixels square."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


PNG, JPEG = encoded("PNG"), encoded("JPEG")
DAMAGED = {
    "empty.png": b"",
    "one_byte.jpg": b"\xff",
    "text.jpg": b"this is no image\n",
    "html.png": b"<!DOCTYPE html><title>404</title>",
    "zeros.png": bytes(4096),
    "signature_only.png": PNG[:8],
    "half.png": PNG[: len(PNG) // 2],
    "half.jpg": JPEG[: len(JPEG) // 2],
    "no_tables.jpg": JPEG[:2] + JPEG[-200:],
    "half.gif": encoded("GIF")[:60],
    "half.bmp": encoded("BMP")[:500],
    "half.tif": encoded("TIFF")[:400],
    "half.webp": encoded("WEBP")[:200],
    "half.ppm": encoded("PPM")[:100],
    "flipped_header.png": flipped(PNG, 20),
    "flipped_data.png": flipped(PNG, len(PNG) // 2),
    "no_data.png": PNG[:8] + PNG[8:33] + png_chunk(b"IEND", b""),
    "zero_width.png": PNG[:8]
    + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0))
    + PNG[33:],
    "bomb.png": bomb(),
    "bad_offset.tif": encoded("TIFF")[:4] + b"\xff\xff\xff\x7f" + encoded("TIFF")[8:],
    "huge.ppm": b"P6\n999999 999999\n255\n\0\0\0",
    "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "archive.jpg": b"PK\x03\x04" + bytes(200),
}


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_damaged_images_are_refused_with_a_reason(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(ImageError, match=r"\w{2,}") as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    for name in ("pipe.png", "folder.png", "gone.png", "self.png", "absent.png"):
        with pytest.raises(ImageError):
            read_image(tmp_path / name)


def test_resizing_keeps_an_image_of_the_right_size(tmp_path):
    image = two_halves((32, 32))
    array = to_array(image, 32)
    assert array.shape == (3, 32, 32)
    assert (array.transpose(1, 2, 0) == np.asarray(image)).all()
    small = to_array(two_halves((320, 240)), 32)
    assert small.shape == (3, 32, 32)
    assert close(small[:, 2, 2], RED)
    assert close(small[:, 2, -2], GREEN)


# --- many images --------------------------------------------------------------------------------

ODD = [
    "two words.png",
    'quote\'s "here".png',
    "new\nline.png",
    "höhe 猫 🐈.png",
    "-n.png",
    "%s.png",
]


def test_a_folder_is_searched_with_all_below_it(tmp_path):
    names = [*ODD, "sub/deep/x.JPG", "sub/y.tiff"]
    for name in [*names, "notes.txt", "sub/.hidden.png", ".git/z.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images(tmp_path)
    assert found.names == sorted(names, key=os.fsencode)
    assert found.ignored == 1
    assert found.faults == []


def test_names_that_are_not_text(tmp_path):
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"  # Latin-1, not UTF-8
    with open(raw, "wb") as file:
        two_halves().save(file, "PNG")
    (name,) = find_images(tmp_path).names
    assert os.fsencode(name) == b"caf\xe9.png"
    assert find_images(tmp_path).read(name).size == (32, 24)


def test_links_in_a_circle_come_to_an_end(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x.png").write_bytes(b"")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b" / "home").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to("self")
    assert find_images(tmp_path).names == ["a/x.png"]


def test_links_to_other_folders_are_followed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.png").write_bytes(b"")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    assert find_images(tmp_path / "root").names == ["link/x.png"]


@pytest.mark.parametrize(
    "content",
    [
        b"a.png\nsub/b.png\n",
        b"\xef\xbb\xbfa.png\r\n\r\nsub/b.png\r\na.png",
        b"a.png\0sub/b.png\0",
    ],
    ids=["lines", "windows", "nul"],
)
def test_lists_of_images(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    found = read_list(tmp_path / "list.txt")
    assert found.names == ["a.png", "sub/b.png"]
    assert found.root == tmp_path


def test_a_list_with_nul_bytes_holds_names_with_newlines(tmp_path):
    (tmp_path / "list").write_bytes(b"new\nline.png\0b.png\0")
    assert read_list(tmp_path / "list").names == ["new\nline.png", "b.png"]


def test_nothing_to_open_is_said(tmp_path):
    with pytest.raises(UserError, match=r"--images=.*nowhere: there is no such file; allowed are"):
        open_images(str(tmp_path / "nowhere"), tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(
        UserError, match=r"holds no image \(1 other files\); known endings: .*\.jpg"
    ):
        open_images(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_images("bad\0name", tmp_path)


def test_cifar10_as_images(small_set):
    source = open_images("cifar10", small_set)
    assert isinstance(source, Cifar10Images)
    assert source.names[0] == "train/00000.png"
    assert len(source.names) == 300
    row = np.fromfile(small_set / "cifar-10-batches-bin" / "test_batch.bin", dtype=np.uint8)
    image = source.read("test/00001.png")
    assert (np.asarray(image).transpose(2, 0, 1).ravel() == row[3073 + 1 : 2 * 3073]).all()
    for name in ("test/99999.png", "other/00000.png", "train/-0001.png", "x"):
        with pytest.raises(ImageError, match="no image of CIFAR-10"):
            source.read(name)


def test_a_single_image_is_a_set_of_one(tmp_path):
    two_halves().save(tmp_path / "x.png")
    source = open_images(str(tmp_path / "x.png"), Path())
    assert source.names == ["x.png"]
    assert source.root == tmp_path
