"""What the network computes between convolutions and products, on a GPU: maps in channels_last, b c h w.

    forward, backward      `norms`: each reads and writes a map as few times as it can
    add, sums              a sum of maps and a bias, and the bias's gradient
    softmax, of_softmax    softmax over neighbouring channels, and its derivative
    doubled, of_doubled    twice the side by nearest neighbour, and its derivative

A norm's program takes whole groups of one image: a span of channels, at all places. It goes through its part of the map
twice, once for the sums and once, the other way round, to write: what was read last may still be in the cache.
Variances are put together from those of the channels around a value of their own (Chan et al. 1983), so that a mean far
from 0 costs no digits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD = {"span": 64, "values": 4096, "num_warps": 8}
BACKWARD = {"span": 128, "values": 16384, "num_warps": 16}
"""Of a norm: at least so many neighbouring channels are read together, values of each map that a program holds at a
time, and its warps. Those that kept most bytes moving on an H100."""
NORM_PROGRAMS = 256
"""Fewer leave most of a GPU idle: then narrower spans are taken."""
VALUES, NUM_WARPS = 4096, 8
"""Of the others."""
SUM_PROGRAMS = 1024
"""Programs of `sums`, at most."""


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
def _shift(shift, c, live, SHIFTED: tl.constexpr):
    """What is added to each channel before all else."""
    added = tl.zeros(c.shape, tl.float32)
    if SHIFTED:
        added += tl.load(shift + c, live, 0.0).to(tl.float32)
    return added


@triton.jit
def _forward_kernel(
    x,
    y,
    mean_out,
    rstd_out,
    centre_out,
    shift,
    weight,
    bias,
    modulation,
    encoding,
    row_stride,
    places,
    channels,
    channels_a_group,
    span,
    num_spans,
    eps,
    SHIFTED: tl.constexpr,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
    ENCODED: tl.constexpr,
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
    own_mean = near + _shift(shift, c, live, SHIFTED) + total / places
    own_squares = tl.sum(squares, 0) - total * total / places
    mean = _of_group(own_mean, ONE_GROUP, SPAN, channels_a_group) / channels_a_group
    apart = tl.where(live, own_mean - mean, 0.0)
    within = _of_group(own_squares + places * apart * apart, ONE_GROUP, SPAN, channels_a_group)
    rstd = 1.0 / tl.sqrt(within / (places * channels_a_group) + eps)

    group = image * (channels // channels_a_group) + c // channels_a_group
    first_of_group = live & (c % channels_a_group == 0)
    tl.store(mean_out + group, mean, first_of_group)
    tl.store(rstd_out + group, rstd, first_of_group)
    tl.store(centre_out + image * channels + c, own_mean, live)

    gain, offset = _gain_and_offset(weight, bias, modulation, row_stride, image, c, live, channels, MODULATED)
    gain = gain * rstd
    mean = mean - _shift(shift, c, live, SHIFTED)
    for back in range(0, places, PLACES):
        p = (places - 1) // PLACES * PLACES - back + tl.arange(0, PLACES)
        there = (p < places)[:, None] & live[None, :]
        at = p[:, None] * channels + c[None, :]
        value = tl.load(x + at, there, 0.0).to(tl.float32)
        value = (value - mean[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        if ENCODED:
            value += tl.load(encoding + at, there, 0.0).to(tl.float32)
        tl.store(y + at, value.to(y.dtype.element_ty), there)


@triton.jit
def _normalised_and_gradient(x, dy, at, dy_at, there, mean, rstd, gain, offset, SILU: tl.constexpr):
    """n, and what comes to the SiLU's input."""
    n = (tl.load(x + at, there, 0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    gradient = tl.load(dy + dy_at, there, 0.0).to(tl.float32)
    if SILU:
        value = n * gain[None, :] + offset[None, :]
        gate = 1.0 / (1.0 + tl.exp(-value))
        gradient = gradient * gate * (1.0 + value * (1.0 - gate))
    return tl.where(there, n, 0.0), gradient


@triton.jit
def _backward_kernel(
    dy,
    dy_stride,
    x,
    passed_on,
    passed_on_stride,
    dx,
    sums_out,
    modulation_out,
    mean_in,
    rstd_in,
    centre_in,
    shift,
    weight,
    bias,
    modulation,
    row_stride,
    places,
    channels,
    channels_a_group,
    span,
    num_spans,
    SHIFTED: tl.constexpr,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
    FORKED: tl.constexpr,
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
    dy += image * places * dy_stride
    passed_on += image * places * passed_on_stride
    group = image * (channels // channels_a_group) + c // channels_a_group
    mean = tl.load(mean_in + group, live, 0.0)
    rstd = tl.load(rstd_in + group, live, 0.0)
    centre = tl.load(centre_in + image * channels + c, live, 0.0)
    normalised = (centre - mean) * rstd * places
    mean = mean - _shift(shift, c, live, SHIFTED)
    gain, offset = _gain_and_offset(weight, bias, modulation, row_stride, image, c, live, channels, MODULATED)

    products = tl.zeros([PLACES, SPAN], tl.float32)
    sums = tl.zeros([PLACES, SPAN], tl.float32)
    for first in range(0, places, PLACES):
        p = first + tl.arange(0, PLACES)
        there = (p < places)[:, None] & live[None, :]
        at, dy_at = p[:, None] * channels + c[None, :], p[:, None] * dy_stride + c[None, :]
        n, gradient = _normalised_and_gradient(x, dy, at, dy_at, there, mean, rstd, gain, offset, SILU)
        products += n * gradient
        sums += gradient
    dn = tl.sum(products, 0)
    db = tl.sum(sums, 0)

    count = places * channels_a_group
    by_mean = _of_group(db * gain, ONE_GROUP, SPAN, channels_a_group) / count
    by_variance = _of_group(dn * gain, ONE_GROUP, SPAN, channels_a_group) / count
    sums_out += image * 3 * channels + c
    scale = tl.full(c.shape, 1.0, tl.float32)
    if MODULATED:
        scale += tl.load(modulation + image * row_stride + c, live, 0.0).to(tl.float32)
        of_scale = dn * tl.load(weight + c, live, 0.0).to(tl.float32) + db * tl.load(bias + c, live, 0.0).to(tl.float32)
        modulation_out += image * 2 * channels + c
        tl.store(modulation_out, of_scale.to(modulation_out.dtype.element_ty), live)
        tl.store(modulation_out + channels, db.to(modulation_out.dtype.element_ty), live)
    tl.store(sums_out, dn * scale, live)
    tl.store(sums_out + channels, db * scale, live)
    if SHIFTED:  # the sum over places of dx
        tl.store(sums_out + 2 * channels, rstd * (db * gain - places * by_mean - normalised * by_variance), live)

    for back in range(0, places, PLACES):
        p = (places - 1) // PLACES * PLACES - back + tl.arange(0, PLACES)
        there = (p < places)[:, None] & live[None, :]
        at, dy_at = p[:, None] * channels + c[None, :], p[:, None] * dy_stride + c[None, :]
        n, gradient = _normalised_and_gradient(x, dy, at, dy_at, there, mean, rstd, gain, offset, SILU)
        value = rstd[None, :] * (gradient * gain[None, :] - by_mean[None, :] - n * by_variance[None, :])
        if FORKED:
            value += tl.load(passed_on + p[:, None] * passed_on_stride + c[None, :], there, 0.0).to(tl.float32)
        tl.store(dx + at, value.to(dx.dtype.element_ty), there)


@triton.jit
def _add_kernel(
    a,
    a_stride,
    b,
    b_stride,
    bias,
    y,
    places,
    channels,
    SUMMED: tl.constexpr,
    BIASED: tl.constexpr,
    PLACES: tl.constexpr,
    SPAN: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    c = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    there = (p < places)[:, None] & (c < channels)[None, :]
    value = tl.load(a + p[:, None] * a_stride + c[None, :], there, 0.0).to(tl.float32)
    if SUMMED:
        value += tl.load(b + p[:, None] * b_stride + c[None, :], there, 0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + c, c < channels, 0.0).to(tl.float32)[None, :]
    tl.store(y + p[:, None] * channels + c[None, :], value.to(y.dtype.element_ty), there)


@triton.jit
def _sums_kernel(x, stride, sums_out, places, channels, rows, PLACES: tl.constexpr, SPAN: tl.constexpr):
    c = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    sums = tl.zeros([PLACES, SPAN], tl.float32)
    start = tl.program_id(0).to(tl.int64) * rows
    for first in range(0, rows, PLACES):
        p = start + first + tl.arange(0, PLACES)
        there = (p < places)[:, None] & (c < channels)[None, :]
        sums += tl.load(x + p[:, None] * stride + c[None, :], there, 0.0).to(tl.float32)
    tl.store(sums_out + tl.program_id(0) * channels + c, tl.sum(sums, 0), c < channels)


@triton.jit
def _doubled_kernel(x, y, places, channels, width, FORWARD: tl.constexpr, PLACES: tl.constexpr, SPAN: tl.constexpr):
    """x to the larger y, or back: the sum of what came from a place. `places`, `width`: of x."""
    p = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    c = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    there = (p < places)[:, None] & (c < channels)[None, :]
    small = p[:, None] * channels + c[None, :]
    corner = (p // width * 4 * width + p % width * 2)[:, None] * channels + c[None, :]
    right, below = channels, 2 * width * channels
    if FORWARD:
        value = tl.load(x + small, there, 0.0)
        tl.store(y + corner, value, there)
        tl.store(y + corner + right, value, there)
        tl.store(y + corner + below, value, there)
        tl.store(y + corner + below + right, value, there)
    else:
        value = tl.load(y + corner, there, 0.0).to(tl.float32) + tl.load(y + corner + right, there, 0.0).to(tl.float32)
        value += tl.load(y + corner + below, there, 0.0).to(tl.float32)
        value += tl.load(y + corner + below + right, there, 0.0).to(tl.float32)
        tl.store(x + small, value.to(x.dtype.element_ty), there)


@triton.jit
def _softmax_kernel(x, y, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, lane = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = row[:, None] * width + lane[None, :]
    there = (row < rows)[:, None] & (lane < width)[None, :]
    value = tl.load(x + at, there, float("-inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 1)[:, None])
    value = value / tl.sum(value, 1)[:, None]
    tl.store(y + at, value.to(y.dtype.element_ty), there)


@triton.jit
def _of_softmax_kernel(dy, y, dx, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, lane = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = row[:, None] * width + lane[None, :]
    there = (row < rows)[:, None] & (lane < width)[None, :]
    value = tl.load(y + at, there, 0.0).to(tl.float32)
    gradient = tl.load(dy + at, there, 0.0).to(tl.float32)
    mean = tl.sum(value * gradient, 1)
    tl.store(dx + at, (value * (gradient - mean[:, None])).to(dx.dtype.element_ty), there)


@torch.library.custom_op("ddpm_core::norm_forward", mutates_args=())
def forward(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    encoding: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `norms.forward`; y is in channels_last."""
    x = _laid_out(x)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2))
    centre = x.new_empty(x.shape[:2], dtype=torch.float32)
    programs, options = _options(x, shift, weight, bias, modulation, groups, silu, **FORWARD)
    encoded = encoding is not None
    encoding = _laid_out(encoding) if encoding is not None else weight
    with torch.cuda.device_of(x):
        _forward_kernel[programs](x, y, mean, rstd, centre, encoding=encoding, eps=eps, ENCODED=encoded, **options)
    return y, mean, rstd, centre


@forward.register_fake
def _(x, shift, weight, bias, modulation, encoding, groups, eps, silu):
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    centre = x.new_empty(x.shape[0], x.shape[1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), mean, rstd, centre


@torch.library.custom_op("ddpm_core::norm_backward", mutates_args=())
def backward(
    dy: Tensor,
    passed_on: Tensor | None,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    centre: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norms.backward`; dx is in channels_last, and d_modulation empty where there is none."""
    x, dx = _laid_out(x), torch.empty_like(x, memory_format=torch.channels_last)
    dy, dy_stride = _strided(dy)
    other, other_stride = (dy, dy_stride) if passed_on is None else _strided(passed_on)
    sums = x.new_empty(len(x), 3, x.shape[1], dtype=torch.float32)
    d_modulation = x.new_empty(0) if modulation is None else modulation.new_empty(modulation.shape)
    programs, options = _options(x, shift, weight, bias, modulation, groups, silu, **BACKWARD)
    maps = (dy, dy_stride, x, other, other_stride, dx)
    with torch.cuda.device_of(x):
        _backward_kernel[programs](
            *maps, sums, d_modulation, mean, rstd, centre, FORKED=passed_on is not None, **options
        )
    return dx, sums, d_modulation


@backward.register_fake
def _(dy, passed_on, x, shift, weight, bias, modulation, mean, rstd, centre, groups, eps, silu):
    sums = x.new_empty(x.shape[0], 3, x.shape[1], dtype=torch.float32)
    d_modulation = x.new_empty(0) if modulation is None else modulation.new_empty(modulation.shape)
    return torch.empty_like(x, memory_format=torch.channels_last), sums, d_modulation


@torch.library.custom_op("ddpm_core::add", mutates_args=())
def add(a: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
    """a + b + bias of each channel, in channels_last; the dtype is the higher of the maps'."""
    y = torch.empty_like(a, dtype=_higher(a, b), memory_format=torch.channels_last)
    (a, a_stride), (other, other_stride) = _strided(a), _strided(a if b is None else b)
    grid, options = _tiles(a)
    with torch.cuda.device_of(a):
        _add_kernel[grid](
            a,
            a_stride,
            other,
            other_stride,
            a if bias is None else bias.contiguous(),
            y,
            SUMMED=b is not None,
            BIASED=bias is not None,
            **options,
        )
    return y


@add.register_fake
def _(a, b, bias):
    return torch.empty_like(a, dtype=_higher(a, b), memory_format=torch.channels_last)


@torch.library.custom_op("ddpm_core::sums", mutates_args=())
def sums(x: Tensor) -> Tensor:
    """Of each channel, over images and places, in float32."""
    x, stride = _strided(x)
    (programs, spans), options = _tiles(x)
    rows = options["PLACES"] * triton.cdiv(programs, SUM_PROGRAMS)
    parts = x.new_empty(triton.cdiv(options["places"], rows), x.shape[1], dtype=torch.float32)
    with torch.cuda.device_of(x):
        _sums_kernel[len(parts), spans](x, stride, parts, rows=rows, **options)
    return parts.sum(0)


@sums.register_fake
def _(x):
    return x.new_empty(x.shape[1], dtype=torch.float32)


@torch.library.custom_op("ddpm_core::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """Twice the side by nearest neighbour, in channels_last."""
    x = _laid_out(x)
    b, c, h, w = x.shape
    y = torch.empty((b, c, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grid, options = _tiles(x)
    with torch.cuda.device_of(x):
        _doubled_kernel[grid](x, y, width=w, FORWARD=True, **options)
    return y


@doubled.register_fake
def _(x):
    b, c, h, w = x.shape
    return torch.empty((b, c, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("ddpm_core::of_doubled", mutates_args=())
def of_doubled(dy: Tensor) -> Tensor:
    """dx from `doubled`'s dy."""
    dy = _laid_out(dy)
    b, c, h, w = dy.shape
    dx = torch.empty((b, c, h // 2, w // 2), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    grid, options = _tiles(dx)
    with torch.cuda.device_of(dy):
        _doubled_kernel[grid](dx, dy, width=w // 2, FORWARD=False, **options)
    return dx


@of_doubled.register_fake
def _(dy):
    b, c, h, w = dy.shape
    return torch.empty((b, c, h // 2, w // 2), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)


@torch.library.custom_op("ddpm_core::softmax", mutates_args=())
def softmax(x: Tensor) -> Tensor:
    """Over the last dimension."""
    x = x.contiguous()
    y = torch.empty_like(x)
    grid, options = _rows(x)
    with torch.cuda.device_of(x):
        _softmax_kernel[grid](x, y, **options)
    return y


@softmax.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ddpm_core::of_softmax", mutates_args=())
def of_softmax(dy: Tensor, y: Tensor) -> Tensor:
    """dx from what `softmax` gave."""
    dy = dy.contiguous()
    dx = torch.empty_like(dy)
    grid, options = _rows(dy)
    with torch.cuda.device_of(dy):
        _of_softmax_kernel[grid](dy, y, dx, **options)
    return dx


@of_softmax.register_fake
def _(dy, y):
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _strided(x: Tensor) -> tuple[Tensor, int]:
    """A map in channels_last, and how many values lie between two places: more than its channels where it is a part of
    what was put together, or comes from its gradient."""
    _, channels, h, w = x.shape
    between = x.stride(3)
    if between >= channels and x.stride() == (h * w * between, 1, w * between, between):
        return x, between
    return _laid_out(x), channels


def _higher(a: Tensor, b: Tensor | None) -> torch.dtype:
    return a.dtype if b is None else torch.promote_types(a.dtype, b.dtype)


def _tiles(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs that share a map's places and channels, and what they are told."""
    channels = x.shape[1]
    places, span = x.numel() // channels, min(triton.next_power_of_2(channels), 256)
    options = {"places": places, "channels": channels, "PLACES": VALUES // span, "SPAN": span, "num_warps": NUM_WARPS}
    return (triton.cdiv(places, VALUES // span), triton.cdiv(channels, span)), options


def _rows(x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Programs of a softmax, and what they are told: rows as wide as x's last dimension."""
    width = x.shape[-1]
    lanes, rows = triton.next_power_of_2(width), x.numel() // width
    at_once = max(VALUES // lanes, 1)
    return (triton.cdiv(rows, at_once),), {"rows": rows, "width": width, "ROWS": at_once, "WIDTH": lanes}


def _options(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    groups: int,
    silu: bool,
    *,
    span: int,
    values: int,
    num_warps: int,
) -> tuple[tuple[int], dict[str, Any]]:
    """How many programs there are, and what both kernels of a norm are told."""
    b, channels, h, w = x.shape
    each = channels // groups
    span = each * triton.cdiv(min(span, channels, max(b * channels // NORM_PROGRAMS, 16)), each)
    num_spans, lanes = triton.cdiv(channels, span), triton.next_power_of_2(span)
    if modulation is not None and modulation.stride(1) != 1:
        modulation = modulation.contiguous()
    return (b * num_spans,), {
        "shift": weight if shift is None else shift.contiguous(),
        "weight": weight,
        "bias": bias,
        "modulation": weight if modulation is None else modulation,
        "row_stride": 0 if modulation is None else modulation.stride(0),
        "places": h * w,
        "channels": channels,
        "channels_a_group": each,
        "span": span,
        "num_spans": num_spans,
        "SHIFTED": shift is not None,
        "MODULATED": modulation is not None,
        "SILU": silu,
        "ONE_GROUP": span == each,
        "SPAN": lanes,
        "PLACES": min(triton.next_power_of_2(h * w), max(values // lanes, 1)),
        "num_warps": num_warps,
    }
