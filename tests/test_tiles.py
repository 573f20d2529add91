"""Photos drawn in overlapping windows."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_translator import TINY, translator

from ddpm_core import samplers, schedule, tiles
from ddpm_core.errors import InputError

SIDE = TINY.image_size


def photo(width, height, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("length", [8, 9, 11, 12, 13, 16, 21, 100, 1001])
def test_windows_cover_the_canvas_and_their_shares_add_up_to_one(length):
    places, shares = tiles.starts(length, 8), tiles.shares(length, 8)
    assert (places[0], places[-1]) == (0, length - 8)
    steps = np.diff(places)
    assert not len(steps) or (steps.max() <= 4 and steps.min() >= 1)
    total = torch.zeros(length)
    for start, share in zip(places, shares, strict=True):
        total[start : start + 8] += share
    assert torch.allclose(total, torch.ones(length))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("size", [(8, 8), (8, 13), (21, 12)])
def test_what_all_windows_agree_on_comes_back(size, batch_size):
    """A denoiser that works pixel by pixel gives in windows what it gives on the whole canvas."""
    source, x_t = torch.randn(1, 3, *size), torch.randn(1, 3, *size)
    drawn = []

    def denoiser_of(seen):
        return lambda x, t: 2 * x + seen * t[:, None, None, None]

    denoiser = tiles.tiled(denoiser_of, source, 8, batch_size=batch_size, done=drawn.append)
    assert torch.allclose(denoiser(x_t, torch.tensor([3])), 2 * x_t + 3 * source, atol=1e-5)
    assert sum(drawn) == tiles.count(size[1], size[0], 8)
    assert max(drawn) <= batch_size


def test_gaussian_data_are_sampled_in_windows_as_on_the_whole_canvas():
    """Independent normal pixels have a known best denoiser, of windows as of all: DDIM must end at the same image."""
    abar = schedule.alphas_cumprod(TINY.diffusion)
    mean, spread = 0.2, 0.5

    def best(x, t):
        a = abar[t].float()[:, None, None, None]
        x_0 = mean + a.sqrt() * spread**2 * (x - a.sqrt() * mean) / (a * spread**2 + 1 - a)
        return (x - a.sqrt() * x_0) / (1 - a).sqrt()

    chain = {
        "timesteps": samplers.trailing(len(abar), 10),
        "alphas_cumprod": abar,
        "prediction": "eps",
        "generators": [torch.Generator().manual_seed(0)],
    }
    x_T = torch.randn(1, 3, 20, 29)
    tiled = tiles.tiled(lambda seen: best, x_T, 8, batch_size=5, done=lambda windows: None)
    assert torch.allclose(samplers.ddim(tiled, x_T, **chain), samplers.ddim(best, x_T, **chain), atol=1e-4)


def test_a_photo_of_one_window_is_what_a_square_is():
    square = photo(SIDE, SIDE)
    translate = translator()
    alone = translate(np.asarray(square)[None], "night", seed=3)[0]
    assert np.abs(translate.in_tiles(square, "night", seed=3).astype(int) - alone).max() <= 1


@pytest.mark.parametrize("overrides", [{}, {"start": "sdedit", "strength": 0.5}, {"sampler": "ddpm"}])
def test_the_result_has_the_photos_size_and_does_not_depend_on_the_batch(overrides):
    translate, told = translator(), []
    wide = photo(27, 13)
    made = translate.in_tiles(wide, "night", batch_size=4, progress=lambda *done: told.append(done), **overrides)
    assert made.shape == (13, 27, 3)
    assert np.abs(translate.in_tiles(photo(27, 13), "night", batch_size=1, **overrides).astype(int) - made).max() <= 1
    assert told[-1][0] == told[-1][1]
    assert told[-1][1] % tiles.count(27, 13, SIDE) == 0
    assert not np.array_equal(translate.in_tiles(photo(27, 13), "night", seed=1, **overrides), made)


def test_what_cannot_be_drawn_in_tiles_is_refused_by_name():
    translate = translator()
    with pytest.raises(InputError, match="31 x 64 pixels; tiles are for photos of 32 x 32 and more"):
        tiles.check(31, 64, 32)
    with pytest.raises(
        InputError, match=r"5000 x 4000 pixels in tiles would need about 2.4 GB of memory; at most 16,0"
    ):
        translate.in_tiles(Image.new("RGB", (5000, 4000)), "night")
    with pytest.raises(InputError, match=r"tiles do not go with sampling.start flowedit"):
        translate.in_tiles(photo(30, 30), "night", start="flowedit")
    gan = dataclasses.replace(TINY, method="pix2pix")
    with pytest.raises(InputError, match="tiles have no effect on pix2pix"):
        translator(gan).in_tiles(photo(30, 30), "night")
