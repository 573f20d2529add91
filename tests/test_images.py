"""Images as users have them, and the one preprocessing."""

import io
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image, ImageCms

from ddpm_core import images
from ddpm_core.errors import InputError


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int = 40, height: int = 20, mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, width // 2, height))
    return image.convert(mode)


def center(image: Image.Image, x: float, y: float) -> tuple[int, ...]:
    return image.getpixel((int(x * image.width), int(y * image.height)))


def test_upright_whatever_the_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    image = images.decode(encoded(picture(), "JPEG", exif=exif, quality=95, subsampling=0))
    assert image.size == (20, 40)
    top, bottom = center(image, 0.5, 0.2), center(image, 0.5, 0.8)
    assert top[0] > 200 > 100 > top[2]
    assert bottom[2] > 200 > 100 > bottom[0]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("GIF", "P"), ("BMP", "RGB"),
     ("WEBP", "RGB"), ("TIFF", "CMYK"), ("AVIF", "RGB"), ("PPM", "RGB")],
)  # fmt: skip
def test_colours_survive_every_format(kind: str, mode: str) -> None:
    image = images.decode(encoded(picture(64, 64, mode), kind))
    assert image.mode == "RGB"
    assert image.size == (64, 64)
    np.testing.assert_allclose(center(image, 0.2, 0.5), (255, 0, 0), atol=12)
    np.testing.assert_allclose(center(image, 0.8, 0.5), (0, 0, 255), atol=12)


@pytest.mark.parametrize(("mode", "value"), [("L", 128), ("1", 1), ("LA", (128, 255))])
def test_grey(mode: str, value: object) -> None:
    image = images.decode(encoded(Image.new(mode, (16, 16), value), "PNG"))
    assert center(image, 0.5, 0.5) == ((255,) * 3 if mode == "1" else (128,) * 3)


@pytest.mark.parametrize(("level", "expected"), [(65535, 255), (32896, 128), (200, 1), (0, 0)])
def test_16_bit_grey_is_scaled_not_clipped(level: int, expected: int) -> None:
    data = encoded(Image.fromarray(np.full((16, 16), level, np.uint16)), "PNG")
    assert center(images.decode(data), 0.5, 0.5) == (expected,) * 3


def test_float_grey() -> None:
    data = encoded(Image.fromarray(np.full((16, 16), 0.5, np.float32)), "TIFF")
    assert center(images.decode(data), 0.5, 0.5) == (128,) * 3


def test_transparency_is_laid_over_white() -> None:
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert center(images.decode(encoded(half, "PNG")), 0.5, 0.5) == (255, 255, 255)
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(1, (8, 0, 16, 16))
    image = images.decode(encoded(palette, "PNG", transparency=0))
    assert center(image, 0.2, 0.5) == (255, 255, 255)
    assert center(image, 0.8, 0.5) == (10, 20, 30)


def test_colour_profile_is_applied_and_a_broken_one_ignored() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    plain = encoded(Image.new("RGB", (16, 16), (200, 40, 40)), "PNG", icc_profile=lab.tobytes())
    np.testing.assert_allclose(center(images.decode(plain), 0.5, 0.5), (200, 40, 40), atol=1)
    wide = encoded(Image.new("RGB", (16, 16), (200, 40, 40)), "PNG", icc_profile=_linear_profile(lab.tobytes()))
    assert center(images.decode(wide), 0.5, 0.5)[1] > 60  # 40 as linear light is lighter in sRGB
    broken = encoded(Image.new("RGB", (16, 16), (200, 40, 40)), "PNG", icc_profile=b"nonsense" * 20)
    assert center(images.decode(broken), 0.5, 0.5) == (200, 40, 40)


def _linear_profile(srgb: bytes) -> bytes:
    """sRGB's primaries with linear light: the curves replaced by gamma 1, the description by another."""
    data = bytearray(srgb)
    (count,) = struct.unpack(">I", data[128:132])
    for tag in range(count):
        name, offset, size = struct.unpack(">4sII", data[132 + 12 * tag : 144 + 12 * tag])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            curve = b"curv" + bytes(4) + struct.pack(">I", 0)  # an empty curve is the identity
            data[offset : offset + size] = curve.ljust(size, b"\0")
    return bytes(data).replace("sRGB".encode("utf-16-be"), "line".encode("utf-16-be")).replace(b"sRGB", b"line")


def test_phones_jpeg_with_previews_is_one_image() -> None:
    data = encoded(picture(64, 64), "MPO", save_all=True, append_images=[picture(16, 16)])
    assert images.decode(data).size == (64, 64)


WRITTEN = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP")


@pytest.mark.parametrize("kind", WRITTEN)
def test_an_image_is_known_by_its_first_bytes(kind: str) -> None:
    pillow_heif.register_heif_opener()
    data = encoded(picture(), kind)
    assert images.looks_like_image(data[:32])
    assert not images.looks_like_image(data[1:33])


@pytest.mark.parametrize(
    "data",
    [b"", b"BM stands for a bitmap, says this text", b"P1 is not P2, says this text", b"MM", bytes(32), b"%PDF-1.7",
     b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", b"<svg xmlns='http://www.w3.org/2000/svg'>", b"8BPS\0\1"],
)  # fmt: skip
def test_other_files_do_not_look_like_images(data: bytes) -> None:
    assert not images.looks_like_image(data[:32])


def test_what_a_listing_tells() -> None:
    assert not images.SUFFIXES & images.UNREADABLE.keys()
    images.check_listed("a/x.HEIC", 5_000_000)
    images.check_listed("a/README")
    for name in ("x.DNG", "x.mov", "x.pdf", "x.jxl", "a.jpg/x.CR2"):
        with pytest.raises(InputError, match=rf"{name}: .*, which is not read; export it as JPEG or PNG"):
            images.check_listed(name)
    with pytest.raises(InputError, match=r"x\.jpg: 1,000 MB; at most 400 MB are read"):
        images.check_listed("x.jpg", 10**9)


def bomb() -> bytes:
    """A valid PNG header that claims 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(bytes(1000))]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def noise_jpeg() -> bytes:
    rng = np.random.default_rng(0)
    return encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"just text, called .jpg", "not an image"),
        (noise_jpeg()[:1500], "truncated"),
        (encoded(picture(64, 64), "PNG")[:-30], "truncated"),
        (bomb(), "pixels"),
        (encoded(picture(6, 40), "PNG"), "at least 8 x 8"),
        (encoded(picture(), "GIF", save_all=True, append_images=[picture(40, 20).rotate(180)]), "animation"),
    ],
    ids=["empty", "text", "truncated-jpeg", "truncated-png", "bomb", "tiny", "animation"],
)
def test_what_is_no_image_is_refused_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        images.decode(data, name="holiday.jpg")
    assert str(caught.value).startswith("holiday.jpg: ")
    assert "\n" not in str(caught.value)


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
    waves = np.stack([np.sin(x + y), np.sin(2 * x), np.cos(y - x)], axis=-1)
    return Image.fromarray((127.5 + 120 * waves).astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "reduced"), [(608, 400, True), (600, 399, True), (401, 200, True), (99, 80, False)]
)
def test_a_jpeg_is_decoded_no_larger_than_needed(width: int, height: int, reduced: bool) -> None:
    jpeg = encoded(smooth(width, height), "JPEG", quality=95)
    assert images.decode(jpeg, square=50).size == ((50, 50) if reduced else (width, height))
    assert images.decode(jpeg).size == (width, height)
    assert images.decode(encoded(smooth(width, height), "PNG"), square=50).size == (width, height)
    whole = images.to_square(images.decode(jpeg), 50).astype(float)
    error = images.read_square(jpeg, 50).astype(float) - whole
    assert np.sqrt((error**2).mean()) < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(255, 257), (127, 129), (257, 255), (513, 385)])
def test_a_scaled_jpeg_of_odd_size_lies_where_the_whole_one_does(width: int, height: int, orientation: int) -> None:
    """Blocks at its right and lower edges are not full: the decoder's pixels there stand for fewer."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = encoded(smooth(width, height), "JPEG", exif=exif, quality=95)
    for size in (31, 32, 62):
        whole = images.to_square(images.decode(jpeg), size).astype(float)
        error = images.read_square(jpeg, size).astype(float) - whole
        assert np.sqrt((error**2).mean()) < 4


def test_a_scaled_jpeg_is_upright_and_in_the_right_colours() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture = smooth(400, 200)
    expected = images.to_square(picture, 50).astype(float)
    turned = images.decode(encoded(picture, "JPEG", exif=exif, quality=95), square=50)
    assert np.abs(np.asarray(turned, dtype=float) - np.rot90(expected, -1)).mean() < 4
    grey = images.decode(encoded(picture.convert("L"), "JPEG"), square=50)
    cmyk = images.decode(encoded(picture.convert("CMYK"), "JPEG", quality=95), square=50)
    assert (grey.mode, cmyk.mode, cmyk.size) == ("RGB", "RGB", (50, 50))
    assert np.abs(np.asarray(cmyk, dtype=float) - expected).mean() < 4


def test_to_square_takes_the_middle() -> None:
    image = Image.new("RGB", (60, 20), (0, 255, 0))
    image.paste((255, 0, 0), (20, 0, 40, 20))
    square = images.to_square(image, 10)
    assert square.shape == (10, 10, 3)
    assert square.dtype == np.uint8
    assert (square[:, 3:-3] == (255, 0, 0)).all()  # the edge pixels see a little of their neighbours
    tall = images.to_square(image.rotate(90, expand=True), 10)
    assert (tall[3:-3] == (255, 0, 0)).all()


@pytest.mark.parametrize("photo", [Image.new("L", (9, 9)), Image.new("RGBA", (9, 9)), Image.new("RGB", (0, 0))])
def test_to_square_takes_what_decode_returns(photo: Image.Image) -> None:
    with pytest.raises(ValueError, match=r"mode RGB is needed, as ddpm_core\.images\.decode returns it, not (L|RGB)"):
        images.to_square(photo, 8)


def test_to_square_averages_what_it_shrinks() -> None:
    board = np.indices((256, 256)).sum(0) % 2 * 255
    shrunk = images.to_square(Image.fromarray(np.stack([board] * 3, -1).astype(np.uint8)), 32)
    assert 100 < shrunk.min() <= shrunk.max() < 155  # without antialiasing: only 0 and 255


def test_tensors_and_back_are_exact() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    tensor = images.to_tensor(pixels)
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert (images.to_uint8(tensor) == pixels).all()
    assert images.to_uint8(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2)).reshape(-1, 3).tolist() == [
        [0] * 3,
        [255] * 3,
    ]


def test_content_hash_depends_on_pixels_and_shape_only() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    value = images.content_hash(image)
    assert value == images.content_hash(np.asfortranarray(image)) == images.content_hash(image.copy())
    assert 0 <= value < 2**63
    assert value != images.content_hash(image.reshape(2, 8, 3))
    image[0, 0, 0] += 1
    assert value != images.content_hash(image)


def test_grid_places_rows_and_enlarges() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    sheet = images.grid([[black, white], [black]], gap=1, scale=2)
    assert sheet.shape == (17, 17, 3)
    assert (sheet[:8, :8] == 0).all()
    assert (sheet[9:, :8] == 0).all()
    assert (sheet[:, 8:] == 255).all()
    with pytest.raises(ValueError, match="at least one"):
        images.grid([])
