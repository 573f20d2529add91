"""Exponential moving averages of the weights, with lengths that grow with the run.

Power-function EMA (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3.1): the weight of step s in the average at step T is proportional to (s / T)^gamma, so the average
always spans the same share of the run, short or long, and needs no warm-up. `sigma_rel` is that share. Which is best
is known afterwards only, so several are kept.
"""

import copy
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


@functools.cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent whose weight profile has the relative width `sigma_rel` (Karras et al. 2024, eq. 123)."""
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): one root above zero for sigma_rel < 0.28
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


class EMA:
    """Averages of a network's weights over training, each a network of its own: `tracks[sigma_rel]`."""

    def __init__(self, model: nn.Module, *, sigma_rels: Sequence[float]) -> None:
        self.tracks = {sigma_rel: copy.deepcopy(model).eval().requires_grad_(False) for sigma_rel in sigma_rels}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` optimiser steps (the first is step 1)."""
        weights: list[Tensor] = list(model.parameters())
        for sigma_rel, track in self.tracks.items():
            beta = (1 - 1 / step) ** (gamma_of(sigma_rel) + 1)
            torch._foreach_lerp_(list(track.parameters()), weights, 1 - beta)
            for average, current in zip(track.buffers(), model.buffers(), strict=True):
                average.copy_(current)

    def state_dict(self) -> dict[float, dict[str, Tensor]]:
        return {sigma_rel: track.state_dict() for sigma_rel, track in self.tracks.items()}

    def load_state_dict(self, state: dict[float, dict[str, Tensor]]) -> None:
        assert state.keys() == self.tracks.keys(), (state.keys(), self.tracks.keys())
        for sigma_rel, track in self.tracks.items():
            track.load_state_dict(state[sigma_rel])
