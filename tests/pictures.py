"""Images that tests draw, as uint8 b h w 3."""

import numpy as np


def noise(num: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), dtype=np.uint8)


def smooth(num: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Images of slow colour gradients: as unlike noise as images get."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, side)
    ends = draw.integers(0, 256, (num, 2, 3))
    rows = ends[:, :1] * (1 - ramp)[None, :, None] + ends[:, 1:] * ramp[None, :, None]
    return np.repeat(rows[:, :, None], side, axis=2).astype(np.uint8)
