"""Classifier-free guidance: the formula at scales 0, 1 and 3, at batch sizes 1, 2 and 3, and its cost."""

import pytest
import torch

from ddpm_core.guidance import classifier_free

NUM_DOMAINS = 2


class Recorder(torch.nn.Module):
    """A network whose output names what it was shown; it counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []

    def forward(self, x_t, t, condition, domain):
        self.passes.append(len(x_t))
        return x_t + 10 * condition + 100 * domain.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_formula(scale: float, batch: int):
    model = Recorder()
    x_t, condition = torch.randn(2, batch, 3, 4, 4)
    domain, t = torch.arange(batch) % NUM_DOMAINS, torch.arange(batch) * 100
    denoise = classifier_free(model, condition, domain, num_domains=NUM_DOMAINS, guidance_scale=scale)
    output = denoise(x_t, t)
    assert output.shape == x_t.shape
    uncond = model(x_t, t, torch.zeros_like(condition), torch.full_like(domain, NUM_DOMAINS))
    cond = model(x_t, t, condition, domain)
    torch.testing.assert_close(output, uncond + scale * (cond - uncond), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 2), (1.0, 2), (1.5, 4)])
def test_one_forward_pass_and_no_wasted_half(scale: float, rows: int):
    model = Recorder()
    condition = torch.zeros(2, 3, 4, 4)
    denoise = classifier_free(model, condition, torch.zeros(2).long(), num_domains=2, guidance_scale=scale)
    denoise(torch.zeros(2, 3, 4, 4), torch.zeros(2).long())
    assert model.passes == [rows]
