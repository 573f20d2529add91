"""The invisible mark: not seen, found again, and by nobody else's key."""

import io

import numpy as np
import pytest
from PIL import Image

from ddpm_core import keyed_mark
from ddpm_core.errors import InputError

KEY = b"a key of the tests"


def scene(width, height, seed=0):
    """Smooth shapes under some texture, in colour."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(30, 226, (7, 7, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return (smooth + draw.normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8)


def as_image(change):
    return lambda pixels: np.asarray(change(Image.fromarray(pixels)))


def saved(kind, quality):
    def change(image):
        file = io.BytesIO()
        image.save(file, kind, quality=quality)
        return Image.open(file).convert("RGB")

    return as_image(change)


def resized(factor, how):
    return as_image(lambda image: image.resize((round(image.width * factor), round(image.height * factor)), how))


def cropped(left, top, right, bottom):
    def change(pixels):
        height, width = pixels.shape[:2]
        return pixels[
            round(top * height) : round((1 - bottom) * height), round(left * width) : round((1 - right) * width)
        ]

    return change


CHANGES = {
    "nothing": lambda pixels: pixels,
    "jpeg 75": saved("JPEG", 75),
    "webp 75": saved("WEBP", 75),
    "half": resized(0.5, Image.Resampling.BICUBIC),
    "half, Lanczos": resized(0.5, Image.Resampling.LANCZOS),
    "double": resized(2, Image.Resampling.BILINEAR),
    "5 % cut on one side": cropped(0.05, 0.05, 0, 0),
    "5 % cut around": cropped(0.025, 0.02, 0.025, 0.03),
    "5 % cut on each side": cropped(0.05, 0.05, 0.05, 0.05),
    "cut and jpeg 75": lambda pixels: saved("JPEG", 75)(cropped(0.01, 0.03, 0.04, 0.02)(pixels)),
    "brighter": lambda pixels: np.minimum(pixels, 235) + 20,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size", [(64, 64), (97, 64), (300, 200)])
def test_the_mark_is_found_after(change, size):
    image = scene(*size)
    marked = keyed_mark.embed(image, KEY)
    attacked = CHANGES[change](marked)
    assert keyed_mark.is_marked(attacked, KEY)
    assert not keyed_mark.is_marked(attacked, b"another key of the tests")
    assert not keyed_mark.is_marked(CHANGES[change](image), KEY)


@pytest.mark.parametrize("size", [(64, 64), (65, 200), (1000, 70), (640, 480)])
def test_it_is_not_seen(size):
    image = scene(*size)
    change = keyed_mark.embed(image, KEY).astype(int) - image
    assert 10 * np.log10(255**2 / np.square(change).mean()) > 41
    assert np.abs(change).max() <= 20
    inside = ((image > 20) & (image < 235)).all(axis=2)
    assert (change[inside] == change[inside][:, :1]).all()  # no colour is shifted


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_images_are_marked_and_not_taken_for_marked(level):
    image = np.full((64, 80, 3), level, np.uint8)
    assert not keyed_mark.is_marked(image, KEY)
    assert keyed_mark.is_marked(keyed_mark.embed(image, KEY), KEY)


def test_images_too_small_for_it_stay_as_they_are():
    image = scene(200, 63)
    assert keyed_mark.embed(image, KEY) is image
    assert not keyed_mark.can_be_marked(image)


def test_scores_of_what_was_not_marked_keep_to_the_bound():
    """For a random key, P(score >= z) is at most the number of places looked at times exp(-z^2 / 2)."""
    places = np.exp(keyed_mark.NEEDED**2 / 2) * keyed_mark.FALSE_RATE
    image = scene(64, 64)
    scores = np.array([keyed_mark.score(image, f"key {i}".encode()) for i in range(40)])
    for z in (4.5, 5.0):
        assert (scores >= z).mean() <= min(places * np.exp(-(z**2) / 2), 1)
    assert scores.max() < 5


def test_stripes_change_nothing(monkeypatch):
    image = scene(150, 120)
    whole = keyed_mark.embed(image, KEY)
    monkeypatch.setattr(keyed_mark, "STRIPE_PIXELS", 1000)
    assert np.abs(keyed_mark.embed(image, KEY).astype(int) - whole).max() <= 1
    assert abs(keyed_mark.score(whole, KEY) - 19.5) < 0.3


def test_coefficients_are_moved_to_the_nearest_place_of_the_key():
    """What the mark promises: each coefficient is a whole number plus its phase, in steps."""
    image = scene(128, 96)
    down, across = keyed_mark._cosines(96), keyed_mark._cosines(128)
    found = keyed_mark._projected(keyed_mark.embed(image, KEY), down, across)[keyed_mark.LOOKED_AT]
    before = keyed_mark._projected(image, down, across)[keyed_mark.LOOKED_AT]
    off = found / keyed_mark.STEP - keyed_mark._phases(KEY)[keyed_mark.LOOKED_AT]
    assert np.abs(off - off.round()).max() < 0.06
    assert np.abs(found - before).max() <= keyed_mark.STEP * 0.56


def test_keys(tmp_path):
    assert keyed_mark.read_key("none") == b""
    assert keyed_mark.read_key("public") == keyed_mark.PUBLIC
    (tmp_path / "key").write_bytes(b" 0123456789abcdef0123\n")
    (tmp_path / "short").write_bytes(b"0123\n")
    key = keyed_mark.read_key(str(tmp_path / "key"))
    assert key == b"0123456789abcdef0123"
    assert len({keyed_mark.name_of(each) for each in (b"", keyed_mark.PUBLIC, key)}) == 3
    assert "0123" not in keyed_mark.name_of(key)
    with pytest.raises(InputError, match=r"--mark-key .*gone: no such file"):
        keyed_mark.read_key(str(tmp_path / "gone"), flag="--mark-key")
    with pytest.raises(InputError, match="holds 4 bytes, at least 16 are needed"):
        keyed_mark.read_key(str(tmp_path / "short"))
