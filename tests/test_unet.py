"""The network: shapes, gradients, attention where it should be, images that do not see each other."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ddpm_core.attention import (
    CrossAttention,
    LinearAttention,
    SelfAttention,
    attend,
    num_heads,
    position_encoding,
)
from ddpm_core.conditioning import Anchor, drop, landmark_mask
from ddpm_core.config import DiffusionConfig, ModelConfig, UNetConfig, stride
from ddpm_core.diffusion import seeded
from ddpm_core.errors import InputError
from ddpm_core.unet import Block, UNet

ROOT = Path(__file__).resolve().parent.parent
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


def with_unet(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, **changes))


INJECTIONS = [
    ("concat",),
    ("cross_attention",),
    ("anchor",),
    ("concat", "cross_attention"),
    ("concat", "cross_attention", "anchor"),
]


def test_output_has_the_inputs_shape_and_starts_at_zero():
    x_t, t, condition, domain = inputs()
    output = built(perturbed=False)(x_t, t, condition, domain)
    assert output.shape == x_t.shape
    assert not output.any()


def test_the_shortcut_is_a_line_through_the_noisy_image_for_each_channel():
    model = built(perturbed=False)  # F is zero
    with torch.no_grad():
        model.shortcut.weight.normal_()
        model.shortcut.bias.copy_(torch.tensor([2.0, 3.0, 4.0, 0.5, 0.6, 0.7]))
    x_t, t, condition, domain = inputs()
    shift = model(torch.zeros_like(x_t), t, condition, domain)
    slope = model(torch.ones_like(x_t), t, condition.flip(0), domain) - shift
    for value in (shift, slope):
        assert torch.equal(value, value[:, :, :1, :1].expand_as(value))
        assert (value[0] - value[1]).abs().min() > 1e-3  # another at each t and domain
    torch.testing.assert_close(model(x_t, t, condition, domain), slope * x_t + shift, rtol=1e-5, atol=1e-4)


def test_what_is_to_be_the_clean_image_has_no_path_around_the_network():
    assert UNet(dataclasses.replace(CONFIG, diffusion=DiffusionConfig(prediction="x_0"))).shortcut is None


MASKED = dataclasses.replace(
    CONFIG, unet=dataclasses.replace(CONFIG.unet, source_mask=True), diffusion=DiffusionConfig(prediction="x_0")
)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_source_mask_keeps_pixels_of_the_recoloured_source_and_draws_the_others(patch_size):
    unet = dataclasses.replace(MASKED.unet, patch_size=patch_size, channel_mult=(1, 2))
    model = built(dataclasses.replace(MASKED, unet=unet), perturbed=False)
    x_t, t, condition, domain = inputs()
    torch.testing.assert_close(model(x_t, t, condition, domain), condition / 2)  # nothing drawn, masks of 1/2
    with torch.no_grad():
        model.recolor.bias.copy_(torch.tensor([0.0, 1, 0, 0, 0, 1, 1, 0, 0]))  # green, blue, red
        drawn, mask = (model.out.bias[: 3 * patch_size**2], model.out.bias[3 * patch_size**2 :])
        drawn.copy_(torch.tensor([0.1, 0.2, 0.3]).repeat_interleave(patch_size**2))
        mask.fill_(2.0)
        mask[0] = -torch.inf  # the first pixel of each patch
    output = model(x_t, t, condition, domain)
    m = torch.full((32, 32), 2.0).sigmoid()
    m[::patch_size, ::patch_size] = 0
    wanted = m * condition[:, [1, 2, 0]] + (1 - m) * torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    torch.testing.assert_close(output, wanted)
    shown = model(x_t, t, condition, domain, show_mask=True)
    torch.testing.assert_close(shown[:, :3], output)
    torch.testing.assert_close(shown[:, 3], m.expand(len(x_t), -1, -1))


def test_every_parameter_of_a_network_with_a_source_mask_gets_a_gradient():
    model = built(MASKED)
    x_t, t, condition, domain = inputs()
    model(x_t, t, condition, domain).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("injection", INJECTIONS)
def test_every_parameter_gets_a_gradient(injection):
    model = built(with_unet(injection=injection))
    x_t, t, condition, domain = inputs()
    model(x_t, t, condition, domain).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize("injection", [INJECTIONS[0], INJECTIONS[-1]])
def test_no_image_sees_its_neighbour(injection):
    model = built(with_unet(injection=injection))
    x_t, t, condition, domain = inputs()
    whole = model(x_t, t, condition, domain)
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(
            model(x_t[row], t[row], condition[row], domain[row]), whole[row], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("what", ["x_t", "t", "condition", "domain"])
def test_the_output_depends_on_every_input(what: str, injection):
    model = built(with_unet(injection=injection))
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
    attention = CrossAttention(32, 16, 16, num_tokens=4)
    with torch.no_grad():
        attention.out.weight.normal_()
    skip, first, second = torch.randn(1, 32, 8, 8), *torch.randn(2, 1, 16, 8, 8)
    assert (attention(skip, first) - attention(skip, second)).abs().max() > 1e-3


def test_linear_attention_is_its_definition():
    torch.manual_seed(0)
    attention = LinearAttention(8, 4)
    with torch.no_grad():
        attention.out.weight.copy_(torch.eye(8))
    x = torch.randn(2, 8, 3, 5)
    normed = attention.norm(x).flatten(2)
    q, k, v = (attention.qkv.weight @ normed).reshape(2, 3, 2, 4, 15).unbind(1)
    q, k = q.softmax(2) / 2, k.softmax(3)
    expected = torch.zeros(2, 2, 4, 15)
    for place in range(15):  # each query reads the keys' mean values, feature by feature
        for feature in range(4):
            mean = (k[:, :, feature, None, :] * v).sum(-1)
            expected[..., place] += q[:, :, feature, place, None] * mean
    torch.testing.assert_close(attention(x), x + expected.reshape(2, 8, 3, 5), rtol=1e-4, atol=1e-5)


def test_self_attention_is_its_definition():
    torch.manual_seed(0)
    attention = SelfAttention(8, 4)
    with torch.no_grad():
        attention.out.weight.copy_(torch.eye(8))
    x = torch.randn(2, 8, 3, 5)
    q, k, v = (attention.qkv.weight @ attention.norm(x).flatten(2)).reshape(2, 3, 2, 4, 15).unbind(1)
    weights = (torch.einsum("bhdq,bhdk->bhqk", q, k) / 2).softmax(-1)
    expected = torch.einsum("bhqk,bhdk->bhdq", weights, v)
    torch.testing.assert_close(attention(x), x + expected.reshape(2, 8, 3, 5), rtol=1e-4, atol=1e-5)


def test_both_ways_of_attending_agree():
    q, k, v = torch.randn(3, 2, 4, 100, 16, generator=seeded("attend")).bfloat16()
    explicit = attend(q, k, v)  # bf16 and few keys on a CPU: by two matrix products
    torch.testing.assert_close(explicit.float(), attend(q.float(), k.float(), v.float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("channels", "head_channels", "heads"), [(64, 32, 2), (48, 32, 1), (80, 32, 2), (112, 32, 2), (16, 32, 1)]
)
def test_heads_share_any_number_of_channels_evenly(channels, head_channels, heads):
    assert num_heads(channels, head_channels) == heads
    assert channels % heads == 0


def test_what_depends_on_places_alone_is_computed_once_and_serves_training_too():
    with torch.inference_mode():
        first = position_encoding(torch.zeros(1, 16, 6, 9))
    assert position_encoding(torch.zeros(3, 16, 6, 9)) is first
    assert not first.is_inference()
    assert first.shape == (1, 16, 6, 9)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert position_encoding(torch.zeros(1, 16, 6, 9).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_map_leaves_linear_attention_in_another_dtype(dtype: torch.dtype):
    attention, x = LinearAttention(32, 16), torch.randn(1, 32, 8, 8).to(dtype).requires_grad_()
    kept: list[torch.Tensor] = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each)
    with keeping, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = attention(x)
    assert y.dtype == dtype
    assert {each.dtype for each in kept if each.numel() >= x.numel()} == {dtype}


def test_cross_attention_at_every_depth_starts_as_the_baseline():
    torch.manual_seed(0)
    baseline = built(CONFIG)
    extended = UNet(with_unet(injection=("concat", "cross_attention"))).eval()
    missing, unexpected = extended.load_state_dict(baseline.state_dict(), strict=False)
    assert not unexpected
    assert all(".cross_attention." in name for name in missing)
    assert len({name.split(".cross_attention.")[0] for name in missing}) == 3 * 2 * 2 + 2  # every block there is
    torch.testing.assert_close(extended(*inputs()), baseline(*inputs()), rtol=0, atol=0)


def test_an_anchors_channels_are_written_by_the_condition_alone():
    model = built(with_unet(injection=("anchor",), anchor_channels=8))
    maps: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda _, __, output, name=name: maps.setdefault(name, []).append(output))
    x_t, t, condition, domain = inputs()
    model(x_t, t, condition, domain)
    model(x_t.flip(0), t.flip(0), condition, domain.flip(0))
    model(x_t, t, condition.flip(0), domain)
    assert len(maps) == 3 * 2 * 2 + 2  # at every depth
    for first, other_image, other_condition in maps.values():
        assert torch.equal(first[:, -8:], other_image[:, -8:])
        assert not torch.equal(first[:, :-8], other_image[:, :-8])
        assert not torch.equal(first[:, -8:], other_condition[:, -8:])


def test_an_anchor_bound_to_landmarks_is_zero_elsewhere():
    anchor = Anchor(4, 2, (0.25, 0.25, 0.75, 0.5), 0.1)
    written = anchor(torch.ones(1, 4, 16, 16))
    there = written.abs().sum(1)[0] > 0
    assert there[4, 4]
    assert there[8, 12]
    assert there.sum() == landmark_mask((0.25, 0.25, 0.75, 0.5), 0.1, 16, 16).sum() < 30
    assert not there[12:].any()
    coarse = landmark_mask((0.25, 0.25, 0.75, 0.5), 0.01, 4, 4)  # smaller than a place: its own place counts
    assert coarse[0, 0, 0, 0] == 1
    assert coarse.sum() >= 2


def test_recomputing_in_the_backward_pass_changes_nothing():
    gradients = []
    for recompute in (False, True):
        model = built(with_unet(dropout=0.1)).train()
        model.set_gradient_checkpointing(recompute)
        torch.manual_seed(3)
        model(*inputs()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_dropping_condition_and_domain():
    x, domain = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    dropped, domain_dropped = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    condition, label = drop(x, domain, dropped, domain_dropped, num_domains=2)
    assert torch.equal(condition, torch.stack([0 * x[0], 0 * x[1], x[2], x[3]]))
    assert label.tolist() == [2, 1, 2, 1]


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
