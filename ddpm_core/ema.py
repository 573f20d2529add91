"""Exponential moving average of the weights, with a length that grows with the run.

Power-function EMA (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3.1): the weight of step s in the average at step T is proportional to (s / T)^gamma, so the average
always spans the same share of the run, short or long, and needs no warm-up. `sigma_rel` is that share.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose weight profile has the relative width `sigma_rel` (Karras et al. 2024, eq. 123)."""
    # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): one root above zero for sigma_rel < 0.28
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


class EMA:
    """The average of a network's weights over training, as a network of its own."""

    def __init__(self, model: nn.Module, *, sigma_rel: float) -> None:
        self.gamma = gamma_of(sigma_rel)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` optimiser steps (the first is step 1)."""
        beta = (1 - 1 / step) ** (self.gamma + 1)
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - beta)
        for average, current in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
