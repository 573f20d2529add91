"""What the network is shown: null forms, and structure without colour and brightness."""

import pytest
import torch

from ddpm_core import conditioning


def test_condition_and_domain_are_dropped_apart() -> None:
    condition, domain = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    shown, labels = conditioning.drop(
        condition, domain, torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]), 2
    )
    assert not shown[:2].any()
    assert torch.equal(shown[2:], condition[2:])
    assert labels.tolist() == [2, 1, 2, 1]


def pictures(side: int) -> torch.Tensor:
    x, y = torch.meshgrid(torch.linspace(0, 9, side), torch.linspace(0, 9, side), indexing="ij")
    waves = torch.stack([torch.sin(x + y), torch.sin(x * 2), torch.cos(x - y)])
    return 0.3 * torch.stack([waves, waves.flip(1)])


@pytest.mark.parametrize("side", [8, 32, 64])
def test_structure_knows_neither_colour_nor_brightness(side: int) -> None:
    found = conditioning.structure(pictures(side))
    assert found.shape == (2, 3, side, side)
    assert found.abs().max() <= 1
    assert found.std() > 0.1
    assert torch.equal(found[:, 0], found[:, 1])
    permuted = conditioning.structure(pictures(side)[:, [2, 0, 1]])
    torch.testing.assert_close(permuted, found, atol=1e-4, rtol=0)
    darker = conditioning.structure(pictures(side) - 0.6)
    torch.testing.assert_close(darker, found, atol=1e-4, rtol=0)
    weaker = conditioning.structure(pictures(side) * 0.5)
    assert (weaker - found).abs().mean() < 0.2 * found.abs().mean()  # contrast, but for what would be noise
    torch.testing.assert_close(conditioning.structure(pictures(side)[1:])[0], found[1])  # each image by itself


def test_structure_of_a_plain_image_is_nothing() -> None:
    assert conditioning.structure(torch.full((1, 3, 32, 32), 0.7)).abs().max() < 1e-4


def test_an_edge_is_where_it_was() -> None:
    step = torch.full((1, 3, 32, 32), -0.5)
    step[..., 16:] = 0.5
    found = conditioning.structure(step)[0, 0, 16]
    assert found[15] < -0.2 < 0.2 < found[16]
    torch.testing.assert_close(found, -found.flip(0), atol=1e-4, rtol=0)
