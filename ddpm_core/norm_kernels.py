"""`norms` on a GPU: one kernel for each direction, over maps in channels_last.

A program takes whole groups of one image: a span of channels, at all places. It goes through its part of the map twice,
once for the sums and once to write; what the programs in flight hold mostly stays in the cache in between, so that a
map comes from memory once. Variances are put together from those of the channels around a value of their own (Chan et
al. 1983), so that a mean far from 0 costs no digits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN_CHANNELS = 32
"""At least so many neighbouring channels are read together: 64 bytes of bf16, as much as memory hands out at once."""
FORWARD_VALUES, BACKWARD_VALUES = 8192, 4096
"""Values of each map that a program holds at a time."""
NUM_WARPS = 8


@triton.jit
def _of_group(values, ONE_GROUP: tl.constexpr, SPAN: tl.constexpr, channels_a_group):
    """Each channel's value replaced by the sum over its group."""
    if ONE_GROUP:
        return tl.sum(values, 0) + tl.zeros([SPAN], tl.float32)
    group = tl.arange(0, SPAN) // channels_a_group
    return tl.sum(tl.where(group[:, None] == group[None, :], values[:, None], 0.0), 0)


@triton.jit
def _gain_and_offset(weight, bias, modulation, row_stride, image, c, live, channels, MODULATED: tl.constexpr):
    """What the normalised value is multiplied by, and what is added."""
    gain = tl.load(weight + c, live, 0.0).to(tl.float32)
    offset = tl.load(bias + c, live, 0.0).to(tl.float32)
    if MODULATED:
        row = modulation + image * row_stride
        scale = 1.0 + tl.load(row + c, live, 0.0).to(tl.float32)
        offset = offset * scale + tl.load(row + channels + c, live, 0.0).to(tl.float32)
        gain = gain * scale
    return gain, offset


@triton.jit
def _forward_kernel(
    x,
    y,
    mean_out,
    rstd_out,
    weight,
    bias,
    modulation,
    row_stride,
    places,
    channels,
    channels_a_group,
    span,
    num_spans,
    eps,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    PLACES: tl.constexpr,
):
    image = (tl.program_id(0) // num_spans).to(tl.int64)
    lane = tl.arange(0, SPAN)
    c = tl.program_id(0) % num_spans * span + lane
    live = (lane < span) & (c < channels)
    x += image * places * channels
    y += image * places * channels

    near = tl.load(x + c, live, 0.0).to(tl.float32)
    sums = tl.zeros([PLACES, SPAN], tl.float32)
    squares = tl.zeros([PLACES, SPAN], tl.float32)
    for first in range(0, places, PLACES):
        p = first + tl.arange(0, PLACES)
        there = (p < places)[:, None] & live[None, :]
        value = tl.load(x + p[:, None] * channels + c[None, :], there, 0.0).to(tl.float32)
        value = tl.where(there, value - near[None, :], 0.0)
        sums += value
        squares += value * value
    total = tl.sum(sums, 0)
    own_mean = near + total / places
    own_squares = tl.sum(squares, 0) - total * total / places
    mean = _of_group(own_mean, ONE_GROUP, SPAN, channels_a_group) / channels_a_group
    apart = tl.where(live, own_mean - mean, 0.0)
    within = _of_group(own_squares + places * apart * apart, ONE_GROUP, SPAN, channels_a_group)
    rstd = 1.0 / tl.sqrt(within / (places * channels_a_group) + eps)

    group = image * (channels // channels_a_group) + c // channels_a_group
    first_of_group = live & (c % channels_a_group == 0)
    tl.store(mean_out + group, mean, first_of_group)
    tl.store(rstd_out + group, rstd, first_of_group)

    gain, offset = _gain_and_offset(weight, bias, modulation, row_stride, image, c, live, channels, MODULATED)
    gain = gain * rstd
    for first in range(0, places, PLACES):
        p = first + tl.arange(0, PLACES)
        there = (p < places)[:, None] & live[None, :]
        at = p[:, None] * channels + c[None, :]
        value = tl.load(x + at, there, 0.0).to(tl.float32)
        value = (value - mean[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        tl.store(y + at, value.to(y.dtype.element_ty), there)


@triton.jit
def _normalised_and_gradient(x, dy, at, there, mean, rstd, gain, offset, SILU: tl.constexpr):
    """n, and what comes to the SiLU's input."""
    n = (tl.load(x + at, there, 0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    gradient = tl.load(dy + at, there, 0.0).to(tl.float32)
    if SILU:
        value = n * gain[None, :] + offset[None, :]
        gate = 1.0 / (1.0 + tl.exp(-value))
        gradient = gradient * gate * (1.0 + value * (1.0 - gate))
    return tl.where(there, n, 0.0), gradient


@triton.jit
def _backward_kernel(
    dy,
    x,
    dx,
    dn_out,
    db_out,
    mean_in,
    rstd_in,
    weight,
    bias,
    modulation,
    row_stride,
    places,
    channels,
    channels_a_group,
    span,
    num_spans,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    PLACES: tl.constexpr,
):
    image = (tl.program_id(0) // num_spans).to(tl.int64)
    lane = tl.arange(0, SPAN)
    c = tl.program_id(0) % num_spans * span + lane
    live = (lane < span) & (c < channels)
    x += image * places * channels
    dx += image * places * channels
    dy += image * places * channels
    group = image * (channels // channels_a_group) + c // channels_a_group
    mean = tl.load(mean_in + group, live, 0.0)
    rstd = tl.load(rstd_in + group, live, 0.0)
    gain, offset = _gain_and_offset(weight, bias, modulation, row_stride, image, c, live, channels, MODULATED)

    products = tl.zeros([PLACES, SPAN], tl.float32)
    sums = tl.zeros([PLACES, SPAN], tl.float32)
    for first in range(0, places, PLACES):
        p = first + tl.arange(0, PLACES)
        there = (p < places)[:, None] & live[None, :]
        at = p[:, None] * channels + c[None, :]
        n, gradient = _normalised_and_gradient(x, dy, at, there, mean, rstd, gain, offset, SILU)
        products += n * gradient
        sums += gradient
    dn = tl.sum(products, 0)
    db = tl.sum(sums, 0)
    tl.store(dn_out + image * channels + c, dn, live)
    tl.store(db_out + image * channels + c, db, live)

    count = places * channels_a_group
    by_mean = _of_group(db * gain, ONE_GROUP, SPAN, channels_a_group) / count
    by_variance = _of_group(dn * gain, ONE_GROUP, SPAN, channels_a_group) / count
    for first in range(0, places, PLACES):
        p = first + tl.arange(0, PLACES)
        there = (p < places)[:, None] & live[None, :]
        at = p[:, None] * channels + c[None, :]
        n, gradient = _normalised_and_gradient(x, dy, at, there, mean, rstd, gain, offset, SILU)
        value = rstd[None, :] * (gradient * gain[None, :] - by_mean[None, :] - n * by_variance[None, :])
        tl.store(dx + at, value.to(dx.dtype.element_ty), there)


@torch.library.custom_op("ddpm_core::norm_forward", mutates_args=())
def forward(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norms.forward`; y is in channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2))
    programs, options = _options(x, weight, bias, modulation, groups, silu, FORWARD_VALUES)
    with torch.cuda.device_of(x):
        _forward_kernel[programs](x, y, mean, rstd, eps=eps, **options)
    return y, mean, rstd


@forward.register_fake
def _(x, weight, bias, modulation, groups, eps, silu):
    of_groups = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), of_groups, torch.empty_like(of_groups)


@torch.library.custom_op("ddpm_core::norm_backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norms.backward`; dx is in channels_last."""
    x, dy = (each.contiguous(memory_format=torch.channels_last) for each in (x, dy))
    dx = torch.empty_like(x)
    dn, db = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    programs, options = _options(x, weight, bias, modulation, groups, silu, BACKWARD_VALUES)
    with torch.cuda.device_of(x):
        _backward_kernel[programs](dy, x, dx, dn, db, mean, rstd, **options)
    return dx, dn, db


@backward.register_fake
def _(dy, x, weight, bias, modulation, mean, rstd, groups, eps, silu):
    of_channels = x.new_empty(x.shape[0], x.shape[1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), of_channels, torch.empty_like(of_channels)


def _options(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, silu: bool, values: int
) -> tuple[tuple[int], dict[str, Any]]:
    """How many programs there are, and what both kernels are told."""
    b, channels, h, w = x.shape
    each = channels // groups
    span = each * triton.cdiv(SPAN_CHANNELS, each)
    num_spans, lanes = triton.cdiv(channels, span), triton.next_power_of_2(span)
    if modulation is not None and modulation.stride(1) != 1:
        modulation = modulation.contiguous()
    return (b * num_spans,), {
        "weight": weight,
        "bias": bias,
        "modulation": weight if modulation is None else modulation,
        "row_stride": 0 if modulation is None else modulation.stride(0),
        "places": h * w,
        "channels": channels,
        "channels_a_group": each,
        "span": span,
        "num_spans": num_spans,
        "MODULATED": modulation is not None,
        "SILU": silu,
        "ONE_GROUP": span == each,
        "SPAN": lanes,
        "PLACES": min(triton.next_power_of_2(h * w), max(values // lanes, 1)),
        "num_warps": NUM_WARPS,
    }
