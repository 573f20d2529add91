"""Baselines of an evaluation that need no network: the best linear colour map."""

import numpy as np
from jaxtyping import Float, UInt8

# -- the colour-map baseline ------------------------------------------------------------------------------------


def color_moments(
    sources: UInt8[np.ndarray, "b h w 3"], targets: UInt8[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, "4 7"]:
    """Sums from which the least-squares colour map is solved; those of several batches add up."""
    x = sources.reshape(-1, 3).astype(np.float64)
    x = np.concatenate([x, np.full((len(x), 1), 255.0)], axis=1)
    y = targets.reshape(-1, 3).astype(np.float64)
    return np.concatenate([x.T @ x, x.T @ y], axis=1)


def solve_color_map(moments: Float[np.ndarray, "4 7"]) -> Float[np.ndarray, "3 4"]:
    """The affine map (A | b) of colours that minimises the squared error over all pixels behind `moments`.

    target ≈ A source + b in units of [0, 1]: the strongest translation that looks at no neighbourhood.
    """
    # The minimum-norm solution: images of one colour, or grey ones, leave the map underdetermined.
    return np.linalg.lstsq(moments[:, :4], moments[:, 4:], rcond=1e-10)[0].T


def apply_color_map(
    color_map: Float[np.ndarray, "3 4"], images: UInt8[np.ndarray, "b h w 3"]
) -> UInt8[np.ndarray, "b h w 3"]:
    """Every pixel through `color_map`, rounded and clipped."""
    mapped = images.astype(np.float64) @ color_map[:, :3].T + 255 * color_map[:, 3]
    return mapped.round().clip(0, 255).astype(np.uint8)
