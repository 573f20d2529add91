"""The averages of the weights against the profile they stand for, in closed form."""

import pytest
import torch
from torch import nn

from ddpm_core.ema import EMA, gamma_of


def averaged(values: list[float], *sigma_rels: float) -> EMA:
    """The averages of one weight that takes these values."""
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, sigma_rels=sigma_rels)
    for step, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value)
        ema.update(model, step)
    return ema


def weight(ema: EMA, sigma_rel: float) -> float:
    return next(ema.tracks[sigma_rel].parameters()).item()


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.1, 6.94), (0.05, 16.97)])
def test_exponents_are_the_papers(sigma_rel: float, gamma: float) -> None:
    """Karras et al. 2024, section 3.1 and appendix C."""
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.01)
    exact = gamma_of(sigma_rel)
    assert (exact + 1) ** 0.5 / ((exact + 2) * (exact + 3) ** 0.5) == pytest.approx(sigma_rel)


def test_each_track_of_a_linear_path_has_its_power_functions_mean() -> None:
    """Weights that grow by one each step: the average's lag is that of the profile s^gamma."""
    steps = 4000
    ema = averaged([step / steps for step in range(1, steps + 1)], 0.1, 0.05)
    for sigma_rel in (0.1, 0.05):
        gamma = gamma_of(sigma_rel)
        assert weight(ema, sigma_rel) == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_the_first_step_is_the_weights_themselves_and_the_second_weighs_them() -> None:
    assert weight(averaged([3.0], 0.1), 0.1) == 3.0
    share = 0.5 ** (gamma_of(0.1) + 1)  # what is left of the first
    assert weight(averaged([3.0, 5.0], 0.1), 0.1) == pytest.approx(share * 3 + (1 - share) * 5)


def test_every_track_is_restored() -> None:
    there, again = averaged([1.0, 2.0, 4.0], 0.1, 0.05), averaged([0.0], 0.1, 0.05)
    again.load_state_dict(there.state_dict())
    assert [weight(again, each) for each in (0.1, 0.05)] == [weight(there, each) for each in (0.1, 0.05)]
    assert weight(there, 0.1) != weight(there, 0.05)
    with pytest.raises(AssertionError):
        averaged([0.0], 0.1).load_state_dict(there.state_dict())


def test_tracks_are_networks_of_their_own() -> None:
    model = nn.BatchNorm1d(2)
    ema = EMA(model, sigma_rels=(0.1,))
    model(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    ema.update(model, 1)
    track = ema.tracks[0.1]
    assert not track.training
    assert not any(parameter.requires_grad for parameter in track.parameters())
    assert torch.equal(dict(track.named_buffers())["running_mean"], torch.tensor([0.2, 0.3]))  # buffers are copied
