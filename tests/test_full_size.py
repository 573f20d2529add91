"""Changes carried to full-size photos: what they are exactly, where they may not be, and that nothing moves."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_core import faces, full_size, images
from ddpm_core.full_size import View, carry, carry_all, finish, fit, look, whole


def scene(width, height, *, seed=0, cells=12):
    """A photo of smooth coloured fields with fine grain upon it."""
    random = np.random.default_rng(seed)
    fields = random.integers(40, 216, (cells, cells, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(fields).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    grain = random.integers(-6, 7, (height, width, 1))
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def turned(angle, scale, shift):
    """Rotation, scaling and shift, from the photo to the view."""
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


def file_of(photo, kind="PNG", **options):
    buffer = io.BytesIO()
    photo.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(97, 64), (64, 131), (16, 16), (11, 9), (300, 40)])
def test_where_nothing_changed_the_photo_stays_to_the_bit(size):
    photo = scene(*size)
    view = whole(photo, 16)
    assert np.array_equal(carry(photo, view, view.pixels), np.asarray(photo))


def test_a_change_reaches_no_further_than_its_windows():
    photo = scene(320, 240)
    view = whole(photo, 32)
    result = view.pixels.copy()
    result[10:14, 18:22] = 255 - result[10:14, 18:22]
    changed = (carry(photo, view, result) != np.asarray(photo)).any(-1)
    reach = 2 * full_size.RADIUS + 2  # both windows, and the cubics' taps
    allowed = np.zeros((32, 32), bool)
    allowed[10 - reach : 14 + reach, 18 - reach : 22 + reach] = True
    allowed = np.asarray(Image.fromarray(allowed).resize((320, 240), Image.Resampling.NEAREST))
    assert changed.any()
    assert not (changed & ~allowed).any()


def test_a_photo_of_the_views_size_becomes_the_result():
    photo = scene(24, 24)
    view, result = whole(photo, 24), np.asarray(scene(24, 24, seed=1))
    assert np.array_equal(view.pixels, np.asarray(photo))
    assert np.abs(carry(photo, view, result).astype(int) - result).max() <= 1


def test_a_recolouring_is_the_same_at_any_size():
    """result = M view + k everywhere: then so it is of the photo, grain and all."""
    matrix, shift = np.array([[0.5, 0.1, 0.0], [0.0, 0.4, 0.1], [0.2, 0.0, 0.6]]), np.array([10.0, 20.0, 5.0])

    def recoloured(pixels):
        return (pixels @ matrix.T + shift).round().astype(np.uint8)

    photo = scene(512, 384)
    view = whole(photo, 32)
    off = carry(photo, view, recoloured(view.pixels)).astype(int) - recoloured(np.asarray(photo))
    assert np.abs(off).mean() < 0.7  # the ridge of the least squares
    assert np.abs(off).max() <= 8


def test_what_is_fitted_is_the_change():
    view, result = np.asarray(scene(20, 20)), np.asarray(scene(20, 20, seed=1))
    matrix, rest = fit(view, result)
    source = torch.tensor(view).permute(2, 0, 1) / 255
    change = torch.einsum("ijhw,jhw->ihw", matrix.unflatten(0, (3, 3)), source) + rest
    assert torch.allclose(source + change, torch.tensor(result).permute(2, 0, 1) / 255, atol=1e-5)


def test_something_new_hides_what_was_there():
    """A plain disc drawn over stripes: of the stripes next to nothing shows through."""
    y, x = np.mgrid[:256, :256]
    stripes = np.where((x // 16 % 2)[..., None], 200, 60).astype(np.uint8).repeat(3, 2)
    photo, inside = Image.fromarray(stripes), (x - 128) ** 2 + (y - 128) ** 2 < 80**2
    truth = np.where(inside[..., None], 120, stripes).astype(np.uint8)
    out = carry(photo, whole(photo, 64), images.squeezed(Image.fromarray(truth), 64)).astype(int)
    middle = (x - 128) ** 2 + (y - 128) ** 2 < 50**2
    assert np.abs(out - 120)[middle].max() < 12


@pytest.mark.parametrize("size", [(400, 300), (300, 420)])
def test_nothing_moves(size):
    """By phase correlation of the luminance with that of a darkened photo: under a tenth of a pixel."""
    photo = scene(*size, cells=40)
    view = whole(photo, 32)
    before, after = (np.asarray(each, float).mean(-1) for each in (photo, carry(photo, view, view.pixels // 2)))
    spectra = [np.fft.fft2(each - each.mean()) for each in (before, after)]
    cross = spectra[0] * spectra[1].conj()
    peak = np.fft.fftshift(np.fft.ifft2(cross / np.abs(cross)).real)
    row, column = np.unravel_index(peak.argmax(), peak.shape)
    assert (row, column) == (peak.shape[0] // 2, peak.shape[1] // 2)
    near = peak[row - 1 : row + 2, column - 1 : column + 2].clip(min=0)
    offsets = np.array([-1, 0, 1])
    assert abs((near.sum(1) * offsets).sum() / near.sum()) < 0.1
    assert abs((near.sum(0) * offsets).sum() / near.sum()) < 0.1


def test_stripes_leave_no_seam(monkeypatch):
    photo = scene(90, 70)
    view = whole(photo, 16)
    at_once = carry(photo, view, 255 - view.pixels)
    monkeypatch.setattr(full_size, "STRIPE_PIXELS", 90 * 7)
    assert np.array_equal(carry(photo, view, 255 - view.pixels), at_once)


@pytest.mark.parametrize("angle", [0.0, 0.35, -2.0])
def test_a_view_of_a_part_fades_out_at_its_border(angle):
    photo = scene(200, 160)
    transform = turned(angle, 0.3, (0, 0))
    transform[:, 2] = 16 - transform[:, :2] @ [110, 80]  # its middle at (110, 80)
    seen = faces.resample(photo, transform, 32)
    view = View(pixels=seen, transform=transform, size=photo.size)
    brighter = carry(photo, view, np.minimum(seen, 215) + 40).astype(int) - np.asarray(photo)
    y, x = np.mgrid[:160, :200] + 0.5
    places = faces.apply(transform, np.stack([x, y], -1).reshape(-1, 2)).reshape(160, 200, 2)
    inside = ((places > 0) & (places < 32)).all(-1)
    assert not brighter[~inside].any()
    assert np.median(brighter[((places > 8) & (places < 24)).all(-1)]) == 40
    for axis in (0, 1):  # no step from one pixel to the next
        assert np.abs(np.diff(brighter, axis=axis)).max() <= 14


def brightened(photo, centres, levels, side=32):
    """Views of 64 pixels around each of the places, each brightened by as many levels."""
    views, results = [], []
    for (x, y), level in zip(centres, levels, strict=True):
        transform = turned(0.2, side / 64, (0, 0))
        transform[:, 2] = side / 2 - transform[:, :2] @ [x, y]
        view = View(pixels=faces.resample(photo, transform, side), transform=transform, size=photo.size)
        views.append(view)
        results.append((view.pixels.astype(int) + level).clip(0, 255).astype(np.uint8))
    return views, results


def test_views_apart_change_what_each_would_alone():
    photo = scene(300, 160)
    views, results = brightened(photo, [(70, 80), (220, 70)], [20, -20])
    both = carry_all(photo, views, results).astype(int) - np.asarray(photo)
    alone = [carry(photo, *each).astype(int) - np.asarray(photo) for each in zip(views, results, strict=True)]
    assert np.array_equal(both, alone[0] + alone[1])


def test_views_that_overlap_share_what_they_have_in_common_without_a_seam():
    photo = Image.new("RGB", (240, 160), (120, 120, 120))
    views, results = brightened(photo, [(100, 80), (130, 80)], [30, 30])
    both = carry_all(photo, views, results).astype(int) - 120
    assert both.max() == 30  # not twice as much
    assert (both[70:90, 85:145] == 30).all()
    views, results = brightened(photo, [(100, 80), (130, 80)], [30, -30])
    both = carry_all(photo, views, results).astype(int) - 120
    assert both[80, 82].tolist() == [30] * 3
    assert both[80, 148].tolist() == [-30] * 3
    assert np.abs(both[80, 115]).max() <= 3  # half-way
    for axis in (0, 1):
        assert np.abs(np.diff(both, axis=axis)).max() <= 14
    swapped = carry_all(photo, views[::-1], results[::-1]).astype(int) - 120
    assert np.abs(swapped - both).max() <= 1


def test_borders_that_are_the_photos_own_do_not_fade():
    """A portrait that fills the photo's height: its upper and lower border stay as they are translated."""
    photo = scene(200, 100)
    [view] = look(file_of(photo), 20, output_size="model")
    brighter = carry(photo, view, np.minimum(view.pixels, 215) + 40).astype(int) - np.asarray(photo)
    assert np.median(brighter[0, 80:120]) == np.median(brighter[-1, 80:120]) == 40
    assert not brighter[:, :50].any()
    assert not brighter[:, 150:].any()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_file_is_looked_at_upright_and_whole(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(scene(120, 80), "JPEG", quality=95, exif=exif.tobytes())
    [view] = look(data, 16, output_size="own")
    assert view.size == ((80, 120) if orientation > 4 else (120, 80))
    assert view.pixels.shape == (16, 16, 3)
    same = finish(data, [view], [view.pixels], images.encode_png)
    assert np.array_equal(images.decode(same), images.decode(data))


def test_for_squares_a_file_is_looked_at_as_ever():
    data = file_of(scene(120, 80), "JPEG", quality=95)
    [view] = look(data, 16, output_size="model")
    assert np.array_equal(view.pixels, images.read_square(data, 16))
    assert np.allclose(faces.apply(view.transform, np.array([[20.0, 0.0], [100.0, 80.0]])), [[0, 0], [16, 16]])


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_colours_are_those_of_the_reader(mode):
    data = file_of(scene(60, 40).convert(mode), "TIFF")
    [view] = look(data, 16, output_size="own")
    same = finish(data, [view], [view.pixels], images.encode_png)
    assert np.array_equal(images.decode(same), images.decode(data))


def test_a_view_of_another_photo_is_refused():
    view = whole(scene(60, 40), 16)
    with pytest.raises(ValueError, match="60, 40"):
        carry(scene(40, 60), view, view.pixels)
    with pytest.raises(ValueError, match="8, 8"):
        carry(scene(60, 40), view, view.pixels[:8, :8])
