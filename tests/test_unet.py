"""The network: shapes, gradients, attention where it should be, pictures that do not see each other."""

import dataclasses

import pytest
import torch

from ddpm_core.attention import CrossAttention, LinearAttention, SelfAttention
from ddpm_core.config import ModelConfig, UNetConfig, stride
from ddpm_core.errors import InputError
from ddpm_core.unet import UNet

CONFIG = ModelConfig(
    image_size=32,
    domains=("day", "night"),
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        attn_resolutions=(32, 16),
        condition_channels=32,
    ),
)


def built(config: ModelConfig = CONFIG, *, perturbed: bool = True) -> UNet:
    torch.manual_seed(0)
    model = UNet(config).eval()
    if perturbed:  # zero-initialised branches would hide what lies behind them
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 3, side: int = 32):
    torch.manual_seed(1)
    x_t, condition = torch.randn(2, batch, 3, side, side)
    return x_t, torch.tensor([5, 500, 999])[:batch], condition, torch.tensor([0, 1, 2])[:batch]


def test_output_has_the_inputs_shape_and_starts_at_zero():
    x_t, t, condition, domain = inputs()
    output = built(perturbed=False)(x_t, t, condition, domain)
    assert output.shape == x_t.shape
    assert not output.any()


def test_every_parameter_gets_a_gradient():
    model = built()
    x_t, t, condition, domain = inputs()
    model(x_t, t, condition, domain).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_no_picture_sees_its_neighbour():
    model = built()
    x_t, t, condition, domain = inputs()
    whole = model(x_t, t, condition, domain)
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(
            model(x_t[row], t[row], condition[row], domain[row]), whole[row], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("what", ["x_t", "t", "condition", "domain"])
def test_the_output_depends_on_every_input(what: str):
    model = built()
    named = dict(zip(("x_t", "t", "condition", "domain"), inputs(2), strict=True))
    before = model(**named)
    named[what] = named[what].flip(0)
    assert (model(**named) - before).abs().max() > 1e-3


def test_attention_is_where_the_mission_puts_it():
    model = built()
    linear = {name.split(".")[0] for name, m in model.named_modules() if isinstance(m, LinearAttention)}
    assert linear == {"down", "up"}
    assert (
        sum(isinstance(m, LinearAttention) for m in model.modules()) == 2 * 2 * 2
    )  # two levels, two blocks, both ways
    full = [name for name, m in model.named_modules() if isinstance(m, SelfAttention)]
    assert full == ["middle_attention"]
    assert sum(isinstance(m, CrossAttention) for m in model.modules()) == 3 * 2  # every skip connection


def test_the_condition_decides_what_the_skips_carry():
    torch.manual_seed(0)
    attention = CrossAttention(32, 16, 16, tokens=4)
    with torch.no_grad():
        attention.out.weight.normal_()
    skip, first, second = torch.randn(1, 32, 8, 8), *torch.randn(2, 1, 16, 8, 8)
    assert (attention(skip, first) - attention(skip, second)).abs().max() > 1e-3


def test_linear_attention_is_its_definition():
    torch.manual_seed(0)
    attention = LinearAttention(8, 4)
    with torch.no_grad():
        attention.out.weight.copy_(torch.eye(8)[..., None, None])
    x = torch.randn(2, 8, 3, 5)
    q, k, v = attention.qkv(attention.norm(x)).reshape(2, 3, 2, 4, 15).unbind(1)
    q, k = q.softmax(2) / 2, k.softmax(3)
    expected = torch.zeros(2, 2, 4, 15)
    for place in range(15):  # each query reads the keys' mean values, feature by feature
        for feature in range(4):
            mean = (k[:, :, feature, None, :] * v).sum(-1)
            expected[..., place] += q[:, :, feature, place, None] * mean
    torch.testing.assert_close(attention(x), x + expected.reshape(2, 8, 3, 5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_other_sizes_of_the_stride_work_and_others_are_refused(patch_size: int):
    config = dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, patch_size=patch_size))
    model = built(config)
    side = 3 * stride(config.unet)
    x_t, t, condition, domain = inputs(1, side)
    assert model(x_t, t, condition, domain).shape == x_t.shape
    x_t, t, condition, domain = inputs(1, side + 1)
    with pytest.raises(InputError, match=f"multiples of {stride(config.unet)}"):
        model(x_t, t, condition, domain)
