"""Images as users have them, and the one preprocessing."""

import concurrent.futures
import io
import struct
import threading
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image, ImageCms

from ddpm_core import colour, containers, images
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


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
    waves = np.stack([np.sin(x + y), np.sin(2 * x), np.cos(y - x)], axis=-1)
    return Image.fromarray((127.5 + 120 * waves).astype(np.uint8))


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
    half.paste((10, 20, 30, 255), (8, 0, 16, 16))
    assert center(images.decode(encoded(half, "PNG")), 0.2, 0.5) == (255, 255, 255)
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


def test_every_ending_of_an_image_is_read_or_told_to_be_not() -> None:
    pillow_heif.register_heif_opener()
    plain = {".h5"}  # holds numbers more often
    for ending, kind in Image.registered_extensions().items():
        known = (ending in images.SUFFIXES, ending in images.UNREADABLE or ending in plain)
        assert known == ((True, False) if kind in (*images.FORMATS, "JPEG", "MPO") else (False, True)), ending


def test_an_ending_tells_what_is_not_read_unless_the_file_begins_like_an_image() -> None:
    assert not images.SUFFIXES & images.UNREADABLE.keys()
    images.check_kind("a/x.HEIC", b"")
    images.check_kind("a/README", b"")
    for name in ("x.DNG", "x.mov", "x.pdf", "x.jxl", "a.jpg/x.CR2"):
        with pytest.raises(InputError, match=rf"{name}: .*, which is not read; export it as JPEG or PNG"):
            images.check_kind(name, b"no image")
    images.check_kind("x.psd", encoded(picture(), "JPEG"))
    with pytest.raises(InputError, match="a raw photo"):
        images.check_kind("x.nef", encoded(picture(), "TIFF"))


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


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_is_encoded_with_its_packet_and_refused_where_no_file_can_hold_it(kind: Any) -> None:
    wide = np.full((1, images.MAX_SIDE["webp"] + 1, 3), (200, 30, 90), np.uint8)
    if kind == "webp":
        with pytest.raises(InputError, match="too large for webp, which has at most 16383 along a side; take png"):
            images.encode(wide, kind)
        wide = wide[:, 1:]
    with Image.open(io.BytesIO(images.encode(wide, kind, xmp="<é/>"))) as image:
        assert (image.format, image.size) == (kind.upper(), wide.shape[1::-1])
        assert image.get_format_mimetype() == images.MEDIA_TYPES[kind]
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - wide).max() <= 3
        told = image.info["xmp"]
    assert (told.encode() if isinstance(told, str) else told) == "<é/>".encode()
    with Image.open(io.BytesIO(images.encode(wide, kind))) as image:
        assert "xmp" not in image.info


def test_grid_places_rows_and_enlarges() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    sheet = images.grid([[black, white], [black]], gap=1, scale=2)
    assert sheet.shape == (17, 17, 3)
    assert (sheet[:8, :8] == 0).all()
    assert (sheet[9:, :8] == 0).all()
    assert (sheet[:, 8:] == 255).all()
    with pytest.raises(ValueError, match="at least one"):
        images.grid([])


# ---------------------------------------------------------------------------------------------- what files hold


def exif_of(orientation: int = 6, **tags: bytes) -> bytes:
    """EXIF with an orientation and, on demand, a negative width."""
    entries = [b"\x12\x01\x03\0\x01\0\0\0" + struct.pack("<HH", orientation, 0)]
    if "width" in tags:
        entries.insert(0, b"\x00\x01\x09\0\x01\0\0\0" + tags["width"])
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


BROKEN_EXIF = {
    "negative": exif_of(width=b"\xfb\xff\xff\xff"),
    "text": b"Exif\0\0nonsense, and more of it",
    "endless": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 8,
    "nowhere": b"Exif\0\0MM\0*\xff\xff\xff\xff",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_an_image_with_broken_exif_is_taken_as_it_lies(kind: str, exif: bytes) -> None:
    image = images.decode(encoded(picture(), kind, exif=exif))
    assert image.size == (40, 20)
    assert image.info["notes"] in ((), (images.EXIF_IGNORED,))
    if exif is BROKEN_EXIF["negative"]:
        assert image.info["notes"]


@pytest.mark.parametrize("seed", range(60))
def test_no_exif_spoils_an_image(seed: int) -> None:
    draw = np.random.default_rng(seed)
    exif = bytearray(exif_of(width=b"\1\0\0\0") + draw.bytes(200))
    for place in draw.integers(6, len(exif), 6):
        exif[place] = draw.integers(256)
    for kind in ("JPEG", "PNG", "WEBP"):
        assert sorted(images.decode(encoded(picture(), kind, exif=bytes(exif))).size) == [20, 40]


def test_notes_do_not_leave_the_file_s_own_data_in_the_image() -> None:
    image = images.decode(encoded(picture(), "JPEG", exif=exif_of()))
    assert image.info == {"notes": (), "size": (20, 40)}
    assert not image.getexif()


# ---------------------------------------------------------------------------------------------- HEIF


def heif(image: Image.Image, **options: object) -> bytes:
    pillow_heif.register_heif_opener()
    return encoded(image, "HEIF", **{"quality": -1, "chroma": 444, **options})


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_heic(mode: str) -> None:
    image = images.decode(heif(picture(64, 64, mode)))
    expected = picture(64, 64, mode).convert("RGB")
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image, int), np.asarray(expected, int), atol=3)
    assert image.info["notes"] == ()


def test_heic_is_turned_once() -> None:
    """By the container's own property; its EXIF says the same once more."""
    image = images.decode(heif(picture(64, 32), exif=exif_of(6)[6:]))
    assert image.size == (32, 64)
    np.testing.assert_allclose(center(image, 0.5, 0.2), (255, 0, 0), atol=3)


@pytest.mark.parametrize("bits", [10, 12])
def test_heic_of_more_than_8_bits(bits: int) -> None:
    wide = np.full((32, 32, 3), (52428, 13107, 26214), np.uint16)  # 204, 51, 102 of 255
    buffer = io.BytesIO()
    pillow_heif.options.SAVE_HDR_TO_12_BIT = bits == 12
    try:
        pillow_heif.encode("RGB;16", (32, 32), wide.tobytes(), buffer, quality=-1, chroma=444)
    finally:
        pillow_heif.options.SAVE_HDR_TO_12_BIT = False
    np.testing.assert_allclose(center(images.decode(buffer.getvalue()), 0.5, 0.5), (204, 51, 102), atol=2)


def test_of_several_images_in_a_heic_the_main_one_is_taken() -> None:
    several = pillow_heif.HeifFile()
    for color in ("red", "lime", "blue"):
        several.add_from_pillow(Image.new("RGB", (32, 32), color))
    buffer = io.BytesIO()
    several.save(buffer, quality=-1, chroma=444, primary_index=1)
    image = images.decode(buffer.getvalue())
    np.testing.assert_allclose(center(image, 0.5, 0.5), (0, 255, 0), atol=3)
    assert image.info["notes"] == ("of its images the main one was taken",)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_animations_are_refused(kind: str) -> None:
    data = encoded(picture(), kind, save_all=True, append_images=[picture().rotate(180)])
    with pytest.raises(InputError, match="an animation; save one of its images as PNG or JPEG"):
        images.decode(data)


def test_of_several_pages_the_first_is_taken_and_of_thumbnails_none() -> None:
    pages = encoded(picture(), "TIFF", save_all=True, append_images=[picture(16, 16)])
    image = images.decode(pages)
    assert (image.size, image.info["notes"]) == ((40, 20), ("of its pages the first was taken",))
    raw = encoded(Image.new("RGB", (10, 10)), "TIFF", tiffinfo={254: 1})
    with pytest.raises(InputError, match="a raw photo, which is not read; export it as JPEG or PNG"):
        images.decode(raw)
    page = picture()
    page.encoderinfo = {"tiffinfo": {254: 0}}
    both = encoded(Image.new("RGB", (10, 10)), "TIFF", save_all=True, append_images=[page], tiffinfo={254: 1})
    assert images.decode(both).size == (40, 20)


# ---------------------------------------------------------------------------------------------- colours


PROFILES = {
    "linear": (colour.rgb_profile(colour.PRIMARIES[1], lambda light: light), (229, 133, 110)),
    "p3": (colour.numbered_profile(12, 13), None),
    "adobe": (colour.adobe_rgb_profile(), None),
}


def by_littlecms(profile: bytes, color: tuple[int, int, int]) -> tuple[int, ...]:
    theirs, ours = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(Image.new("RGB", (1, 1), color), theirs, ours, outputMode="RGB").getpixel((0, 0))


def named(profile: bytes, name: str) -> bytes:
    """The profile under another name."""
    return profile.replace(b"made of numbers\0", name.encode()[:15].ljust(15) + b"\0")


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "PA"])
@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_counts_whatever_it_is_called_and_for_whichever_mode(name: str, mode: str) -> None:
    profile, expected = PROFILES[name]
    profile = named(profile, "GIMP linear sRGB")
    flat = Image.new("RGB", (16, 16), (200, 60, 40))
    if mode in ("P", "PA"):
        flat = flat.quantize(4)
    image = images.decode(encoded(flat if mode in ("P", "PA") else flat.convert(mode), "PNG", icc_profile=profile))
    found = center(image, 0.5, 0.5)
    np.testing.assert_allclose(found, by_littlecms(profile, (200, 60, 40)), atol=1)
    if expected:
        np.testing.assert_allclose(found, expected, atol=1)
    assert np.abs(np.subtract(found, (200, 60, 40))).max() > 10


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_every_format_s_profile_is_applied(kind: str) -> None:
    flat, profile = Image.new("RGB", (32, 32), (200, 60, 40)), PROFILES["p3"][0]
    data = heif(flat, icc_profile=profile) if kind == "HEIF" else encoded(flat, kind, icc_profile=profile)
    np.testing.assert_allclose(center(images.decode(data), 0.5, 0.5), by_littlecms(profile, (200, 60, 40)), atol=4)


def test_srgb_s_own_profile_changes_no_bit() -> None:
    noise = Image.open(io.BytesIO(noise_jpeg())).convert("RGB")
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), colour.numbered_profile(1, 13)):
        image = images.decode(encoded(noise, "PNG", icc_profile=profile))
        assert image.tobytes() == noise.tobytes()


def grey_profile(gamma: float) -> bytes:
    """A profile of one channel: header and curve of an RGB one."""
    data = bytearray(colour.rgb_profile(colour.PRIMARIES[1], lambda stored: stored**gamma))
    data[16:20] = b"GRAY"
    return bytes(data).replace(b"rTRC", b"kTRC", 1)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(mode: str) -> None:
    level = {"L": 100, "LA": (100, 255), "I;16": 100 * 257}[mode]
    image = images.decode(encoded(Image.new(mode, (16, 16), level), "PNG", icc_profile=grey_profile(1.0)))
    np.testing.assert_allclose(
        center(image, 0.5, 0.5), [round(255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055))] * 3, atol=1
    )
    image = images.decode(encoded(Image.new(mode, (16, 16), level), "PNG", icc_profile=PROFILES["linear"][0]))
    np.testing.assert_allclose(
        center(image, 0.5, 0.5), [round(255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055))] * 3, atol=1
    )


@pytest.mark.parametrize(
    ("mode", "profile"),
    [("RGB", b"nonsense" * 20), ("RGB", grey_profile(1.0)), ("CMYK", PROFILES["p3"][0]), ("L", b"short")],
    ids=["nonsense", "grey-of-colour", "rgb-of-cmyk", "short"],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_told(mode: str, profile: bytes) -> None:
    flat = Image.new("RGB", (16, 16), (200, 60, 40)).convert(mode)
    image = images.decode(encoded(flat, "TIFF", icc_profile=profile))
    assert center(image, 0.5, 0.5) == flat.convert("RGB").getpixel((0, 0))
    assert image.info["notes"] == (images.PROFILE_IGNORED,)


def inks_profile() -> bytes:
    """An ICC profile of four inks (lut8, ICC.1:2001-04, 6.5.7) to CIE L*a*b*, far from Pillow's own idea of CMYK."""
    levels = np.linspace(0, 1, 9)
    c, m, y, k = np.meshgrid(levels, levels, levels, levels, indexing="ij")
    lightness = (100 - 42 * c - 50 * m - 10 * y) * (1 - 0.9 * k) / 100
    a = (-37 * c + 74 * m - 5 * y) * (1 - k)
    b = (-50 * c - 3 * m + 93 * y) * (1 - k)
    table = np.stack([lightness.clip(0, 1) * 255, a + 128, b + 128], axis=-1).clip(0, 255).round().astype(np.uint8)
    ramp = np.arange(256, dtype=np.uint8).tobytes()
    identity = struct.pack(">9i", *(np.eye(3, dtype=int) * 65536).ravel().tolist())
    lut = b"mft1" + bytes(4) + bytes([4, 3, 9, 0]) + identity + 4 * ramp + table.tobytes() + 3 * ramp
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"inks\0" + bytes(78)
    tags = {b"desc": text, b"wtpt": b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061), b"A2B0": lut}
    index, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        index += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = struct.pack(">I", 128 + len(index) + len(body))
    header = size + bytes(4) + b"\x02\x10\0\0prtrCMYKLab " + bytes(12) + b"acsp"
    return header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061).ljust(60, b"\0") + index + body


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_what_their_profile_says(kind: str) -> None:
    """JPEG as Photoshop writes it: Adobe's marker, and inks the other way round."""
    inks = [(10, 200, 30, 20), (255, 0, 0, 0), (0, 0, 255, 0), (0, 0, 0, 200), (90, 60, 60, 120), (0, 0, 0, 0)]
    profile = inks_profile()
    theirs, ours = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    far = 0
    for ink in inks:
        flat = Image.new("CMYK", (16, 16), ink)
        data = encoded(flat, kind, icc_profile=profile, **({"quality": 100} if kind == "JPEG" else {}))
        assert (b"Adobe" in data) == (kind == "JPEG")
        image = images.decode(data)
        right = ImageCms.profileToProfile(flat, theirs, ours, outputMode="RGB").getpixel((8, 8))
        np.testing.assert_allclose(center(image, 0.5, 0.5), right, atol=3)
        assert image.info["notes"] == ()
        far = max(far, np.abs(np.subtract(right, flat.convert("RGB").getpixel((0, 0)))).max())
    assert far > 60, "the profile decides"


def test_lab_is_read() -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (16, 16), (200, 60, 40)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    np.testing.assert_allclose(center(images.decode(encoded(lab, "TIFF")), 0.5, 0.5), (200, 60, 40), atol=3)


def png_with(image: Image.Image, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks behind its header."""
    data = encoded(image, "PNG")
    framed = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return data[:33] + framed + data[33:]


GAMMA_1 = (b"gAMA", struct.pack(">I", 100_000))
GAMMA_SRGB = (b"gAMA", struct.pack(">I", 45_455))
SRGB = (b"sRGB", b"\0")
P3_CHRM = (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
SRGB_CHRM = (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
P3_CICP = (b"cICP", b"\x0c\x0d\0\1")
FLAT = (200, 60, 40)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([GAMMA_1], (229, 133, 110)),
        ([GAMMA_1, SRGB_CHRM], (229, 133, 110)),
        ([GAMMA_SRGB], FLAT),
        ([GAMMA_SRGB, SRGB_CHRM], FLAT),
        ([GAMMA_SRGB, P3_CHRM], by_littlecms(PROFILES["p3"][0], FLAT)),
        ([P3_CHRM], by_littlecms(PROFILES["p3"][0], FLAT)),
        ([SRGB, GAMMA_1, P3_CHRM], FLAT),
        ([P3_CICP, SRGB, GAMMA_1], by_littlecms(PROFILES["p3"][0], FLAT)),
        ([(b"cICP", b"\1\x08\0\1")], (229, 133, 110)),
        ([(b"iCCP", b"x\0\0" + zlib.compress(PROFILES["linear"][0])), GAMMA_SRGB, P3_CHRM], (229, 133, 110)),
        ([(b"gAMA", bytes(4))], FLAT),
        ([(b"cHRM", bytes(32))], FLAT),
        ([(b"gAMA", b"\0")], FLAT),
        ([(b"iCCP", b"x\0\0nonsense")], FLAT),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_the_colours_that_png_describes(
    chunks: list[tuple[bytes, bytes]], expected: tuple[int, ...], mode: str
) -> None:
    flat = Image.new("RGB", (16, 16), FLAT)
    image = images.decode(png_with(flat if mode == "RGB" else flat.quantize(2), *chunks))
    np.testing.assert_allclose(center(image, 0.5, 0.5), expected, atol=1)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_numbered_colours_of_heif_and_avif(kind: str) -> None:
    flat = Image.new("RGB", (32, 32), FLAT)
    nclx = {"color_primaries": 12, "transfer_characteristics": 13, "matrix_coefficients": 6, "full_range_flag": 1}
    if kind == "HEIF":
        data = heif(flat, nclx_profile=nclx)
    else:
        data = encoded(flat, kind, quality=100, subsampling="4:4:4")
        at = data.index(b"colrnclx") + 8
        data = data[:at] + struct.pack(">HH", 12, 13) + data[at + 4 :]
    np.testing.assert_allclose(center(images.decode(data), 0.5, 0.5), by_littlecms(PROFILES["p3"][0], FLAT), atol=3)


def test_high_dynamic_range_keeps_white_and_grey_apart() -> None:
    for transfer, white in ((16, 148), (18, 191)):  # 203 nits in PQ and 75 % in HLG, of 255
        for level, expected in ((white, 255), (0, 0)):
            flat = png_with(Image.new("RGB", (16, 16), (level,) * 3), (b"cICP", bytes([9, transfer, 0, 1])))
            np.testing.assert_allclose(center(images.decode(flat), 0.5, 0.5), (expected,) * 3, atol=2)


def test_a_camera_s_adobe_rgb_without_a_profile() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    data = encoded(Image.new("RGB", (16, 16), FLAT), "JPEG", quality=100, subsampling=0, exif=exif)
    stored = Image.open(io.BytesIO(data)).getpixel((8, 8))
    np.testing.assert_allclose(
        center(images.decode(data), 0.5, 0.5), by_littlecms(PROFILES["adobe"][0], stored), atol=1
    )


def test_colours_are_converted_before_they_are_laid_over_white() -> None:
    half = Image.new("RGBA", (16, 16), (*FLAT, 51))
    expected = 0.2 * np.array((229, 133, 110)) + 0.8 * 255
    image = images.decode(encoded(half, "PNG", icc_profile=PROFILES["linear"][0]))
    np.testing.assert_allclose(center(image, 0.5, 0.5), expected, atol=2)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_fully_transparent_image_shows_nothing(mode: str, kind: str) -> None:
    image = Image.new("RGBA", (16, 16), (9, 9, 9, 0))
    options = {}
    if mode in ("P", "PA"):
        image, options = Image.new("P", (16, 16), 0), {"transparency": 0}
    if kind != "PNG" and mode in ("P", "PA"):
        image = Image.new("RGBA", (16, 16))
    with pytest.raises(InputError, match="fully transparent: there is nothing to see"):
        images.decode(encoded(image.convert("LA") if mode == "LA" and kind != "WEBP" else image, kind, **options))


# ---------------------------------------------------------------------------------------------- wide greys


def tiff(values: np.ndarray, photometric: int = 1) -> bytes:
    """An uncompressed TIFF of one channel, of any type and byte order, written by hand."""
    order, kind = ("MM", ">") if values.dtype.byteorder == ">" else ("II", "<")
    form = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    entries = [(256, 4, width), (257, 4, height), (258, 3, values.itemsize * 8), (259, 3, 1), (262, 3, photometric),
               (273, 4, 8 + 2 + 12 * 9 + 4), (277, 3, 1), (279, 4, values.nbytes), (339, 3, form)]  # fmt: skip
    packed = b"".join(
        struct.pack(f"{kind}HHI", tag, size, 1)
        + struct.pack(f"{kind}{'I' if size == 4 else 'HH'}", *([value] if size == 4 else [value, 0]))
        for tag, size, value in entries
    )
    head = order.encode() + struct.pack(f"{kind}HI", 42, 8) + struct.pack(f"{kind}H", len(entries))
    return head + packed + bytes(4) + values.tobytes()


def one_off(value: float, other: float, kind: str) -> np.ndarray:
    values = np.full((64, 64), value, kind)
    values[0, 0] = other
    return values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (one_off(0.5, 0.5, "<f4"), 128),
        (one_off(0.5, 1.02, "<f4"), 128),
        (one_off(0.5, 300, "<f4"), 128),
        (one_off(0.5, np.nan, "<f4"), 128),
        (one_off(0.5, np.inf, ">f4"), 128),
        (one_off(0.5, -np.inf, "<f4"), 128),
        (one_off(1.5, 0.5, "<f4"), 255),
        (one_off(100, 100, "<f4"), 100),
        (one_off(100, 255.5, "<f4"), 100),
        (one_off(25700, 0, "<f4"), 100),
        (one_off(-3, 1, "<f4"), 0),
        (one_off(np.nan, np.nan, "<f4"), 0),
        (one_off(25700, 0, "<u2"), 100),
        (one_off(25700, 0, ">u2"), 100),
        (one_off(200, 0, "<u2"), 1),
        (one_off(12850, -5, "<i2"), 100),
        (one_off(12850, -5, ">i2"), 100),
        (one_off(100, 7, "<i4"), 100),
        (one_off(25700, -7, "<i4"), 100),
        (one_off(100 * 0x01010101, 0, "<u4"), 100),
        (one_off(255 * 0x01010101, 0, "<u4"), 255),
    ],
)  # fmt: skip
def test_wide_greys_are_scaled_by_their_type_or_their_values(values: np.ndarray, expected: int) -> None:
    assert center(images.decode(tiff(values)), 0.5, 0.5) == (expected,) * 3


def test_wide_greys_whose_zero_is_white() -> None:
    for kind in ("<u2", "<f4"):
        values = one_off(25700 if kind == "<u2" else 100 / 255, 0, kind)
        assert center(images.decode(tiff(values, photometric=0)), 0.5, 0.5) == (155,) * 3


def test_a_transparent_level_of_16_bit_grey() -> None:
    values = np.full((16, 16), 30000, np.uint16)
    values[:, 8:] = 25700
    data = png_with(Image.fromarray(values), (b"tRNS", struct.pack(">H", 30000)))
    assert [center(images.decode(data), x, 0.5) for x in (0.2, 0.8)] == [(255,) * 3, (100,) * 3]


def test_16_bits_in_three_channels() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 200 * 257, 60 * 257, 40 * 257) * 16 for _ in range(16))
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    framed = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    assert center(images.decode(b"\x89PNG\r\n\x1a\n" + b"".join(framed)), 0.5, 0.5) == FLAT


# ---------------------------------------------------------------------------------------------- PNG's text


TEXT = b"x" * 1_100_000


@pytest.mark.parametrize(
    "chunk",
    [
        (b"tEXt", b"Comment\0" + TEXT),
        (b"zTXt", b"Comment\0\0" + zlib.compress(TEXT)),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(TEXT)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TEXT)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + TEXT),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(TEXT)),
        (b"zTXt", b"Comment\0\0nonsense"),
        (b"zTXt", b""),
    ],
)
def test_long_text_in_a_png_is_passed_over(chunk: tuple[bytes, bytes]) -> None:
    image = images.decode(png_with(picture(), *[chunk] * 3))
    assert (image.size, image.info["notes"]) == ((40, 20), ())


def test_the_text_that_tells_how_a_png_is_turned_is_read() -> None:
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>'
    assert images.decode(png_with(picture(), (b"iTXt", xmp))).size == (20, 40)


@pytest.mark.parametrize(("num_bytes", "used"), [(4_000_000, True), (17_000_000, False)])
def test_a_long_profile_is_used_and_an_endless_one_is_not(num_bytes: int, used: bool) -> None:
    profile = PROFILES["linear"][0].ljust(num_bytes, b"\0")
    profile = struct.pack(">I", len(profile)) + profile[4:]
    image = images.decode(png_with(Image.new("RGB", (16, 16), FLAT), (b"iCCP", b"x\0\0" + zlib.compress(profile))))
    np.testing.assert_allclose(center(image, 0.5, 0.5), (229, 133, 110) if used else FLAT, atol=1)
    assert image.info["notes"] == (() if used else (images.PROFILE_IGNORED,))


# ---------------------------------------------------------------------------------------------- cut JPEGs


def blocks(mode: str) -> Image.Image:
    draw = np.random.default_rng(1).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    return Image.fromarray(draw.repeat(12, 0).repeat(12, 1)).convert(mode)


JPEG_OPTIONS = {"baseline": {}, "progressive": {"progressive": True}, "full": {"subsampling": 0, "quality": 95},
                "restarts": {"restart_marker_blocks": 7}}  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEG_OPTIONS.values(), ids=JPEG_OPTIONS)
def test_a_jpeg_that_was_cut_and_closed_is_noticed(options: dict[str, object], mode: str) -> None:
    data = encoded(blocks(mode), "JPEG", **options)
    images.decode(data)
    for share in (0.3, 0.5, 0.7, 0.95) if "progressive" not in options else (0.3, 0.5):
        for square in (None, 16):
            with pytest.raises(InputError, match="a part of its data is missing"):
                images.decode(data[: int(len(data) * share)] + b"\xff\xd9", square=square)


@pytest.mark.parametrize("options", JPEG_OPTIONS.values(), ids=JPEG_OPTIONS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_whole_jpeg_with_a_flat_grey_half_is_not_refused(options: dict[str, object], mode: str) -> None:
    image = blocks("RGB")
    image.paste((128, 128, 128), (0, 100, image.width, image.height))
    for quality in (30, 75, 100):
        data = encoded(image.convert(mode), "JPEG", **{**options, "quality": quality})
        for content in (data, data + b"more behind the end", data[:-2] + bytes(9) + b"\xff\xd9"):
            assert images.decode(content).size == image.size


# ---------------------------------------------------------------------------------------------- large files


def flat_png(width: int, height: int) -> bytes:
    packer = zlib.compressobj(1)
    row = b"\0" + bytes((200, 60, 40)) * width
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    framed = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_a_jpeg_counts_as_it_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 50_000)
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 400_000)
    data = encoded(smooth(600, 400), "JPEG", quality=95)
    assert images.decode(data, square=50).size == (50, 50)
    whole = images.decode(data)
    assert (whole.size, whole.info["notes"]) == ((150, 100), (images.SCALED_DOWN,))
    assert np.abs(np.asarray(whole, int) - np.asarray(smooth(600, 400).resize((150, 100), 4), int)).mean() < 4
    for refused, square in (
        (data, 300),
        (encoded(smooth(600, 400), "JPEG", progressive=True), 50),
        (encoded(smooth(1000, 500), "JPEG"), 50),
        (encoded(smooth(600, 400), "PNG"), 50),
        (encoded(smooth(600, 400), "WEBP"), None),
    ):
        with pytest.raises(InputError, match=r"pixels; at most 50,000 are taken: scale it down"):
            images.decode(refused, square=square)


HELD = {"L": ({}, 2), "4:2:0": ({"subsampling": 2}, 3), "4:4:4": ({"subsampling": 0}, 6), "CMYK": ({}, 8)}
"""Bytes of coefficients for each pixel of a progressive JPEG."""


@pytest.mark.parametrize("square", [None, 16])
@pytest.mark.parametrize("kind", HELD)
def test_what_the_decoder_of_a_progressive_jpeg_holds_counts(
    kind: str, square: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, held = HELD[kind]
    image = smooth(640, 480).convert(kind if ":" not in kind else "RGB")
    data = encoded(image, "JPEG", progressive=True, **options)
    counts = 640 * 480 * held // 4 + 80 * 60  # at an eighth of its size
    monkeypatch.setattr(images, "MAX_PIXELS", counts)
    taken = images.decode(data, square=square)
    assert taken.size == ((80, 60) if square is None else (16, 16))
    assert taken.info["notes"] == ((images.SCALED_DOWN,) if square is None else ())
    monkeypatch.setattr(images, "MAX_PIXELS", counts - 1)
    with pytest.raises(
        InputError, match=f"or save it as a baseline JPEG: as a progressive one it counts as {counts:,}$"
    ):
        images.decode(data, square=square)


JPEG_KINDS: dict[str, tuple[str, dict[str, object]]] = {
    f"{mode} {name}": (mode, {**options, "optimize": True})
    for mode in ("L", "RGB", "CMYK")
    for name, options in {**JPEG_OPTIONS, "full progressive": {"subsampling": 0, "progressive": True}}.items()
}


@pytest.mark.parametrize("square", [None, 16])
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_a_jpeg_that_announces_more_than_it_holds_is_not_decoded(
    kind: str, square: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, options = JPEG_KINDS[kind]
    data = encoded(Image.new(mode, (64, 64)), "JPEG", **options)
    frame = data.index(b"\xff\xc2" if "progressive" in kind else b"\xff\xc0")
    announced = data[: frame + 5] + struct.pack(">HH", 5000, 5000) + data[frame + 9 :]
    monkeypatch.setattr(images, "_decoding", None)  # not reached
    with pytest.raises(InputError, match="a part of its data is missing"):
        images.decode(announced, square=square)


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_a_jpeg_of_one_colour_is_taken_however_small_its_file(kind: str) -> None:
    mode, options = JPEG_KINDS[kind]
    for size in ((8, 20_000), (20_000, 8), (400, 400)):
        assert images.decode(encoded(Image.new(mode, size), "JPEG", **options)).size == size


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16"])
@pytest.mark.parametrize(("width", "height"), [(611, 403), (201, 399), (250, 250)])
def test_a_large_image_is_shrunk_as_its_square(
    mode: str, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = smooth(width, height)
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    data = encoded(image, "PNG")
    whole = images.read_square(data, 16).astype(int)
    monkeypatch.setattr(images, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(images, "STRIP_PIXELS", 5000)
    assert max(images.decode(data, square=16).size) < 16 * 8
    difference = np.abs(images.read_square(data, 16).astype(int) - whole)
    assert (difference.mean() < 3, difference.max() < 9) == (True, True)


def test_conversion_in_strips_is_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(smooth(64, 64).convert("RGBA"), "PNG", icc_profile=PROFILES["p3"][0])
    whole = images.decode(data).tobytes()
    monkeypatch.setattr(images, "STRIP_PIXELS", 64 * 7)
    assert images.decode(data).tobytes() == whole


def test_a_budget_bounds_what_is_taken_at_once() -> None:
    budget, most = images.Budget(10), 0
    lock = threading.Lock()

    def work(amount: int) -> None:
        nonlocal most
        with budget.take(amount), lock:
            most = max(most, budget.used)
            assert budget.used <= 10 or budget.used == amount

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3, 4, 5, 25, 1, 9, 2, 10] * 20))
    assert (budget.used, most) == (0, 25)


# ---------------------------------------------------------------------------------------------- anything at all


def mutated(data: bytes, draw: np.random.Generator) -> bytes:
    """A file with some bytes changed, left out, doubled or cut off, more likely near its start."""
    content = bytearray(data)
    for _ in range(draw.integers(1, 6)):
        at = int(len(content) * draw.random() ** 2)
        match draw.integers(5):
            case 0:
                content[at : at + 1] = draw.bytes(1)
            case 1:
                content[at : at + 4] = draw.choice([bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", draw.bytes(4)])
            case 2:
                del content[at : at + draw.integers(1, 40)]
            case 3:
                content[at:at] = content[at : at + draw.integers(1, 40)]
            case 4:
                if draw.random() < 0.3:
                    del content[max(at, 12) :]
    return bytes(content)


def fuzz_cases() -> dict[str, bytes]:
    """A small file of each kind that can be written here, with all that belongs to such files."""
    pillow_heif.register_heif_opener()
    image, profile, exif = smooth(40, 24), PROFILES["p3"][0][:600], exif_of()
    cases = {
        kind: encoded(image, kind) for kind in ("BMP", "DDS", "GIF", "PCX", "PPM", "QOI", "SGI", "TGA", "JPEG2000")
    }
    cases |= {
        kind: encoded(image, kind, icc_profile=profile, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")
    }
    cases |= {
        "HEIF": heif(image, exif=exif[6:]),
        "HEIF-alpha": heif(image.convert("RGBA")),
        "JPEG-progressive": encoded(image, "JPEG", progressive=True),
        "JPEG-CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "MPO": encoded(image, "MPO", save_all=True, append_images=[image]),
        "PNG-palette": encoded(image.quantize(16), "PNG", transparency=3),
        "PNG-16": encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
        "PNG-chunks": png_with(
            image, P3_CICP, GAMMA_1, P3_CHRM, (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"x"))
        ),
        "WEBP-alpha": encoded(image.convert("RGBA"), "WEBP", lossless=True),
        "WEBP-moving": encoded(image, "WEBP", save_all=True, append_images=[image.rotate(180)]),
        "GIF-moving": encoded(image, "GIF", save_all=True, append_images=[image.rotate(180)]),
        "TIFF-lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "TIFF-jpeg": encoded(image, "TIFF", compression="jpeg"),
        "TIFF-float": encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.float32)), "TIFF"),
        "TIFF-lab": encoded(Image.new("LAB", (16, 16)), "TIFF"),
        "TIFF-pages": encoded(image, "TIFF", save_all=True, append_images=[image]),
        "PFM": encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.float32)), "PPM"),
    }
    return cases


FUZZED = fuzz_cases()
"""Made once: encoders are slower than decoders."""


def many_parts(kind: str, count: int) -> bytes:
    """An image with so many parts of a kind, which a decoder goes through one by one."""
    jpeg, png = encoded(smooth(40, 24), "JPEG"), encoded(smooth(40, 24), "PNG")
    if kind == "chunks":
        return png[:33] + struct.pack(">I4sI", 0, b"prVt", zlib.crc32(b"prVt")) * count + png[33:]
    if kind == "scans":
        data = encoded(smooth(40, 24), "JPEG", progressive=True)
        *_, before, last = containers.jpeg_scans(data)
        return data[: last.end] + data[before.end : last.end] * (count - 10) + data[last.end :]
    if kind == "values":
        entries = [(256, 4, 1, 8), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
        entries += [(273, 4, count, 122), (278, 4, 1, 1), (279, 4, count, 122)]
        table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table.ljust(112, b"\0") + bytes([8, 0, 0, 0]) * count
    if kind == "header":
        return b"P6\n#" + b" " * (count - 14) + b"\n 40 24\n255\n" + smooth(40, 24).tobytes()
    return jpeg[:20] + {"segments": b"\xff\xe5\0\2", "padding": b"\xff", "junk": b"\0"}[kind] * count + jpeg[20:]


@pytest.mark.parametrize("kind", ["chunks", "segments", "padding", "junk", "scans", "values", "header"])
def test_a_file_of_endless_parts_is_refused_before_they_are_gone_through(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "MAX_PARTS", 500)
    most = containers.MAX_SCANS if kind == "scans" else 450
    image = images.decode(many_parts(kind, most))
    assert (image.width, image.mode) in ((40, "RGB"), (8, "RGB"))
    data = many_parts(kind, most + 101)
    monkeypatch.setattr(images, "_open_as_it_is", None)
    with pytest.raises(InputError, match=r"image: truncated or corrupt \((more than|no header in)"):
        images.decode(data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "HEIF"])
def test_endless_exif_is_not_looked_at(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_EXIF_BYTES", 1000)
    for num_bytes, notes in ((900, ()), (1100, (images.EXIF_IGNORED,))):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "x" * (num_bytes - 60)
        image = images.decode(encoded(smooth(40, 24), kind, exif=exif.tobytes()))
        assert (image.info["notes"], image.size) == (notes, (24, 40) if not notes or kind == "HEIF" else (40, 24))


def test_exif_in_endless_parts_is_not_put_together() -> None:
    jpeg, part = encoded(smooth(40, 24), "JPEG"), b"\xff\xe1\0\x64" + b"Exif\0\0".ljust(98, b"\0")
    image = images.decode(jpeg[:2] + part * (images.MAX_EXIF_PARTS + 1) + jpeg[2:])
    assert (image.size, image.info["notes"]) == ((40, 24), (images.EXIF_IGNORED,))


@pytest.mark.parametrize(
    "data",
    [
        encoded(smooth(40, 24), "QOI"),
        b"P3 40 24 255 " + b"1 " * (3 * 40 * 24),
        b"P6 40 24 65535 " + bytes(6 * 40 * 24),
        b"P5 40 24 100 " + bytes(40 * 24),
    ],
)
def test_what_is_decoded_slowly_may_be_less_large(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.decode(data).size == (40, 24)
    monkeypatch.setattr(images, "MAX_SLOW_PIXELS", 900)
    with pytest.raises(InputError, match="40 x 24 pixels; at most 900 are taken of this format: save it as PNG"):
        images.decode(data)


def test_comments_in_a_plain_image_take_no_time() -> None:
    data = b"P2 #\n 40 #a\n24 255\n" + b"#\n" * 100_000 + b"7 #b\n" * (40 * 24)
    assert images.decode(data).tobytes() == bytes([7]) * (3 * 40 * 24)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("square", [None, 8])
def test_the_files_size_is_told_upright(orientation: int, square: int | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = images.decode(encoded(Image.new("RGB", (64, 32)), "JPEG", exif=exif), square=square)
    assert image.info["size"] == ((64, 32) if orientation < 5 else (32, 64))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n", "a pointer of Git LFS"),
        (b"/annex/objects/SHA256E-s123--4d7a.jpg\n", "a pointer of git-annex"),
    ],
)
def test_pointers_are_known(text: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"^x.jpg: {reason} whose content is not here; .* brings it$"):
        images.decode(text, name="x.jpg")


@pytest.mark.parametrize("kind", FUZZED)
def test_damaged_files_are_decoded_or_refused_in_one_line(kind: str) -> None:
    draw = np.random.default_rng(len(FUZZED[kind]))
    for number in range(24):
        data = FUZZED[kind][: draw.integers(len(FUZZED[kind]))] if number < 4 else mutated(FUZZED[kind], draw)
        try:
            image = images.decode(data, square=draw.choice([None, 8]))
        except InputError as error:
            told = error.args[0]
            assert told.startswith("image: ")
            assert "\n" not in told
        else:
            assert (image.mode, list(image.info)) == ("RGB", ["notes", "size"])
