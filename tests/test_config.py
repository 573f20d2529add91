"""Configurations: a round trip through JSON, and strictness."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from ddpm_core import checkpoint, encoders, gan
from ddpm_core.config import (
    ENCODERS,
    GANS,
    MAX_SEED,
    DiffusionConfig,
    EncoderOptions,
    GANConfig,
    ModelConfig,
    SamplingConfig,
    UNetConfig,
    check,
    check_seed,
    from_dict,
    to_dict,
)
from ddpm_core.errors import InputError

CONFIG = ModelConfig(
    domains=("day", "night"),
    target_domains=("night",),
    unet=UNetConfig(channel_mult=(1, 2)),
    training={"epochs": 3},
)


def test_round_trip_through_json():
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(CONFIG)))) == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imagesize": 3}, "unknown field 'imagesize' (did you mean 'image_size'?)"),
        ({"image_size": "big"}, "config.image_size is 'big'; it must be int"),
        ({"unet": {"model_channels": 2.5}}, "config.unet.model_channels is 2.5; it must be int"),
        ({"unet": 3}, "config.unet must be an object"),
        ({"diffusion": {"prediction": "noise"}}, "must be one of eps, v, x_0"),
        ({"domains": "day"}, "config.domains is 'day'; it must be a list"),
        ({"sampling": {"guidance_interval": [0.5]}}, "guidance_interval is [0.5]; it must have 2 values"),
    ],
)
def test_what_is_unknown_or_of_the_wrong_type_is_refused_by_name(change, message):
    with pytest.raises(InputError) as error:
        from_dict(ModelConfig, {**to_dict(CONFIG), **change})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 63}, "must be a multiple of 2"),
        ({"image_size": 0}, "image_size is 0"),
        ({"unet": UNetConfig(model_channels=40)}, "multiple of unet.head-channels = 32"),
        ({"unet": UNetConfig(channel_mult=())}, "channel-mult is empty"),
        ({"unet": UNetConfig(channel_mult=(1, 0))}, r"channel-mult[1] is 0"),
        ({"diffusion": DiffusionConfig(p_uncond=1.0)}, "p-uncond is 1.0"),
        ({"sampling": SamplingConfig(num_steps=1001)}, "must not exceed diffusion.num-timesteps = 1000"),
        ({"sampling": SamplingConfig(guidance_scale=float("nan"))}, "guidance-scale is nan"),
        ({"sampling": SamplingConfig(guidance_scale=1e30)}, "guidance-scale is 1e+30; it must lie between 0 and 100"),
        ({"sampling": SamplingConfig(eta=100.5)}, "eta is 100.5; it must lie between 0 and 100"),
        ({"domains": ("a", "a")}, "give distinct names"),
        ({"sampling": SamplingConfig(guidance_interval=(0.5, 0.2))}, "guidance-interval is 0.5 0.2"),
        ({"sampling": SamplingConfig(guidance_rescale=1.5)}, "guidance-rescale is 1.5"),
        ({"sampling": SamplingConfig(domain_guidance_scale=-1.0)}, "domain-guidance-scale is -1.0"),
        ({"sampling": SamplingConfig(sampler="ddpm", eta=0.5)}, "eta has no effect on the sampler ddpm"),
        ({"sampling": SamplingConfig(strength=0.5)}, "strength has no effect with sampling.start noise"),
        ({"sampling": SamplingConfig(start="ddib", sampler="ddpm")}, "needs sampler ddim"),
        ({"unet": UNetConfig(injection=())}, "injection is []; give one or more"),
        ({"unet": UNetConfig(injection=("anchor",), anchor_channels=64)}, "anchor-channels is 64"),
        ({"unet": UNetConfig(injection=("anchor",), anchor_landmarks=(0.5, 1.5))}, "anchor-landmarks is [0.5, 1.5]"),
        ({"unet": UNetConfig(anchor_channels=-1)}, "anchor-channels is -1; it must be positive"),
        ({"unet": UNetConfig(anchor_landmarks=(0.5, 0.5))}, "no effect without anchor"),
        ({"diffusion": DiffusionConfig(zero_terminal_snr=True)}, "predict v or x_0"),
        ({"unet": UNetConfig(source_mask=True)}, "source-mask with diffusion.prediction eps"),
        (
            {"diffusion": DiffusionConfig(zero_terminal_snr=True, prediction="v", loss_weighting="min_snr")},
            "would have the weight 0; take snr",
        ),
        ({"gan": GANConfig(l1_weight=-1.0)}, "gan.l1-weight is -1.0"),
        ({"method": "cyclegan", "domains": ("a", "b", "night")}, "knows two domains; there are 3"),
        ({"target_domains": ("nite",)}, "unknown domain 'nite' (did you mean 'night'?)"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(changes, message):
    with pytest.raises(InputError) as error:
        check(dataclasses.replace(CONFIG, **changes))
    assert message in str(error.value)


def test_seeds_are_what_every_generator_takes():
    for seed in (0, MAX_SEED):
        check_seed(seed)
    for seed in (-1, MAX_SEED + 1, 99999999999999999999):
        with pytest.raises(InputError, match=f"--seed is {seed}; it must lie between 0 and 2147483647"):
            check_seed(seed)


SMALL = dataclasses.replace(
    CONFIG,
    image_size=16,
    unet=UNetConfig(channel_mult=(1, 2), attn_resolutions=(8,)),
    diffusion=DiffusionConfig(num_timesteps=10),
    sampling=SamplingConfig(num_steps=2),
    gan=GANConfig(num_levels=2),
    encoder=EncoderOptions(image_size=16, widths=(8, 16), attributes=("night",)),
)
INTEGERS = (0, -1, 1, 3, 2**31 - 1, 10**30)
FRACTIONS = (0.0, -1.0, 1.0, 1e-30, 1e30, 1e308, math.nan, math.inf)
EDGES = {int: INTEGERS, float: FRACTIONS, bool: (True,)}
NUMBERS = [
    (group, field.name)
    for group in ("unet", "diffusion", "gan", "encoder", "sampling")
    for field in dataclasses.fields(getattr(SMALL, group))
    if not isinstance(getattr(getattr(SMALL, group), field.name), str)
]


def edges(group: str, name: str) -> tuple[Any, ...]:
    value = getattr(getattr(SMALL, group), name)
    if not isinstance(value, tuple):
        return (value, *(EDGES[type(value)] if value is not None else FRACTIONS))
    if name in ("injection", "attributes"):
        return (value, (), value + value)
    each = FRACTIONS if any(isinstance(one, float) for one in value) or name == "anchor_landmarks" else INTEGERS
    lists = [(one,) * max(len(value), 1) for one in each]
    longer = ((), (each[2],) * 13, (each[2], each[2] * 5000))
    return (value, *lists, *(() if name == "guidance_interval" else longer))


def _largest(value: Any) -> float:
    numbers = [each for each in (value if isinstance(value, tuple) else (value,)) if not isinstance(each, str)]
    return max(numbers, default=0)


@pytest.mark.parametrize(("group", "name"), NUMBERS)
def test_any_value_is_a_network_or_one_line(group, name):
    """At once, and before memory is taken: what is accepted can be built."""
    method = {"gan": "pix2pix", "encoder": "attributes"}.get(group, "diffusion")
    taken, lines = 0, []
    for value in edges(group, name):
        options = dataclasses.replace(getattr(SMALL, group), **{name: value})
        config = dataclasses.replace(SMALL, method=method, **{group: options})
        try:
            check(config)
            if method in GANS:
                gan.check(config)
            if method in ENCODERS:
                encoders.check(encoders.encoder_config(config))
        except InputError as refused:
            lines.append(str(refused))
            continue
        taken += 1
        assert value in ((), None) or _largest(value) <= 1_000_000, "refused by no bound"
        if group in ("unet", "gan"):
            with torch.device("meta"):
                checkpoint.build(config)
    assert taken, "nothing is accepted"
    assert all("\n" not in line and len(line) < 400 for line in lines)
