"""Losses: exact values on both sides of Huber's corner."""

import pytest
import torch

from ddpm_core.config import DiffusionConfig
from ddpm_core.losses import per_image_loss


@pytest.mark.parametrize(
    ("loss", "delta", "error", "expected"),
    [
        ("huber", 1.0, 0.5, 0.125),
        ("huber", 1.0, 3.0, 2.5),
        ("huber", 0.1, 0.3, 0.1 * (0.3 - 0.05)),
        ("mse", 1.0, 3.0, 9.0),
    ],
)
def test_exact_values(loss, delta, error, expected):
    output = torch.zeros(2, 3, 4, 4)
    target = torch.zeros(2, 3, 4, 4)
    target[1] = error
    values = per_image_loss(DiffusionConfig(loss=loss, huber_delta=delta), output, target)
    assert values.tolist() == pytest.approx([0.0, expected])
