"""Group norm, and what stands around it, as one step.

    x = x + shift                          the bias of the convolution before it, where it was left out there
    n = (x - mean) / sqrt(var + eps)       over each group of channels of each image (Wu & He 2018)
    y = n weight + bias                    learned, one of each a channel
    y = y (1 + scale) + shift              with a modulation: one of each a channel of each image
    y = y sigmoid(y)                       with `silu`
    y = y + encoding                       a constant of each place

y has the dtype of x, also under autocast, which would run PyTorch's norm in float32 on a GPU and hand float32 maps on.
Statistics and sums are float32. On a GPU each direction is one kernel (`kernels`) and for the backward pass x and two
numbers a group are kept. On a CPU it is PyTorch's operators, with its own derivatives where these are fast.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Map = Float[Tensor, "b c h w"]
OfGroups = Float[Tensor, "b g"]
OfChannels = Float[Tensor, "b c"]


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` and what follows it; weights and their names are the same."""

    def __init__(self, num_groups: int, channels: int, *, silu: bool = False) -> None:
        super().__init__(num_groups, channels)
        self.silu = silu

    def forward(
        self,
        x: Map,
        modulation: Float[Tensor, "b m"] | None = None,
        *,
        shift: Float[Tensor, " c"] | None = None,
        encoding: Float[Tensor, "1 c h w"] | None = None,
    ) -> Map:
        """`modulation`: b 2c, the scales and then the shifts. `encoding` gets no gradient."""
        arguments = (x, shift, self.weight, self.bias, modulation, encoding, self.num_groups, self.eps, self.silu)
        return forward(*arguments)[0] if _derives_fast(x, self.num_groups) else _Step.apply(*arguments)[0]

    def forked(self, x: Map, *, encoding: Float[Tensor, "1 c h w"] | None = None) -> tuple[Map, Map]:
        """What `forward` gives, and x, for what goes past: the two gradients are added where the first is computed."""
        arguments = (x, None, self.weight, self.bias, None, encoding, self.num_groups, self.eps, self.silu)
        return (forward(*arguments)[0], x) if _derives_fast(x, self.num_groups) else _Step.apply(*arguments)


def _derives_fast(x: Map, groups: int) -> bool:
    """Whether the operators' own derivatives are the fastest: in CPUs' bf16 that of the norm is not vectorised over
    groups of few channels, and takes ten times as long as the norm."""
    narrow = x.dtype == torch.bfloat16 and x.shape[1] // groups < 16 and x.shape[2] * x.shape[3] >= 1024
    return x.device.type == "cpu" and not narrow


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        modulation: Tensor | None,
        encoding: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        y, *statistics = _implementation(x)[0](x, shift, weight, bias, modulation, encoding, *options)
        ctx.save_for_backward(x, shift, weight, bias, modulation, *statistics)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, passed_on: Tensor | None) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, modulation, *statistics = ctx.saved_tensors
        if dy is None:
            return passed_on, *[None] * 8
        inputs = (x, shift, weight, bias, modulation, *statistics)
        dx, sums, d_modulation = _implementation(x)[1](dy, passed_on, *inputs, *ctx.options)
        d_weight, d_bias, d_shift = sums.sum(0).unbind()
        return (
            dx,
            None if shift is None else d_shift.to(shift.dtype),
            d_weight.to(weight.dtype),
            d_bias.to(bias.dtype),
            None if modulation is None else d_modulation,
            *[None] * 4,
        )


def _implementation(x: Map) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What computes y, and what its derivatives."""
    if has_kernels(x.device):
        from ddpm_core import kernels  # Triton is there where there is a GPU

        return kernels.forward, kernels.backward
    return forward, backward


# -- in PyTorch's operators ---------------------------------------------------------------------------------------


def forward(
    x: Map,
    shift: Float[Tensor, " c"] | None,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    encoding: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Map, OfGroups, OfGroups, OfChannels | None]:
    """y, the mean and 1 / sqrt(var + eps) of each group, and what the kernels keep beside."""
    y, mean, rstd = _normalized(_shifted(x, shift), weight, bias, groups, eps)
    if modulation is not None:
        scale, added = modulation[:, :, None, None].to(y.dtype).chunk(2, dim=1)
        y = torch.addcmul(added, y, 1 + scale)
    y = F.silu(y) if silu else y
    return y if encoding is None else y + encoding, mean, rstd, None


def backward(
    dy: Map,
    passed_on: Map | None,
    x: Map,
    shift: Float[Tensor, " c"] | None,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    mean: OfGroups,
    rstd: OfGroups,
    kept: OfChannels | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Map, Float[Tensor, "b 3 c"], Float[Tensor, "b m"] | None]:
    """dx, with what is passed on by others added; each image's part of the gradients of weight, bias and, where there
    is one, shift; and of the modulation."""
    b, c, h, w = x.shape
    n = _normalized(_shifted(x, shift), torch.ones_like(weight), torch.zeros_like(bias), groups, eps)[0]
    gain, offset, scale = weight.expand(b, c), bias.expand(b, c), torch.ones_like(weight)
    if modulation is not None:
        scale, added = modulation.to(weight.dtype).chunk(2, dim=1)
        scale = 1 + scale
        gain, offset = gain * scale, offset * scale + added

    def of_map(values: OfChannels) -> Float[Tensor, "b c 1 1"]:
        return values[:, :, None, None].to(x.dtype)

    if silu:
        dy = torch.ops.aten.silu_backward(dy, torch.addcmul(of_map(offset), n, of_map(gain)))
    dn, db = _sums(dy * n), _sums(dy)
    each = c // groups
    rstd = rstd.repeat_interleave(each, 1)
    # What a group's mean and variance pass on, the same for all of its channels.
    by_mean, by_variance = (
        (-part * gain).unflatten(1, (groups, each)).sum(2).repeat_interleave(each, 1) / (h * w * each)
        for part in (db, dn)
    )
    dx = torch.addcmul(of_map(by_mean * rstd), n, of_map(by_variance * rstd))
    dx = torch.addcmul(dx, dy, of_map(gain * rstd))
    sums = torch.stack([dn * scale, db * scale, torch.zeros_like(db) if shift is None else _sums(dx)], dim=1)
    if modulation is not None:
        modulation = torch.cat([dn * weight + db * bias, db], dim=1).to(modulation.dtype)
    return dx if passed_on is None else dx + passed_on, sums, modulation


def _shifted(x: Map, shift: Float[Tensor, " c"] | None) -> Map:
    return x if shift is None else x + shift[:, None, None].to(x.dtype)


def _normalized(x: Map, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Map, OfGroups, OfGroups]:
    b, c, h, w = x.shape
    if x.device.type == "cpu":  # in either layout, and sums in the precision of the weights
        return torch.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)
    planes = x.to(weight.dtype, memory_format=torch.contiguous_format)  # GPUs take nothing else
    y, mean, rstd = torch.native_group_norm(planes, weight, bias, b, c, h * w, groups, eps)
    return torch.empty_like(x).copy_(y), mean, rstd


def _sums(values: Map) -> OfChannels:
    """Over places; in two stages, for the sums of a bf16 map come out in bf16."""
    return values.permute(0, 2, 3, 1).sum(2).to(torch.promote_types(values.dtype, torch.float32)).sum(1)


# -- whether a GPU takes the kernels ------------------------------------------------------------------------------


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels work on this GPU: the first to ask finds out, on small maps."""
    if device.type != "cuda":
        return _HAS_KERNELS.get(device, False)
    if device not in _HAS_KERNELS:
        difference = _tried(device)
        _HAS_KERNELS[device] = not difference
        if difference:
            warnings.warn(
                f"{device}: norms and sums run in PyTorch's operators, which take several times as long: {difference}",
                stacklevel=2,
            )
    return _HAS_KERNELS[device]


_HAS_KERNELS: dict[torch.device, bool] = {}


def _tried(device: torch.device) -> str:
    """What is wrong with the kernels there; nothing if they give what the operators give."""
    try:
        from ddpm_core import kernels

        for channels, groups in ((24, 3), (40, 1)):
            numbers = torch.linspace(-2, 2, 4 * channels * 36, device=device).sin().reshape(4, channels, 6, 6)
            found = _example(kernels.forward, kernels.backward, numbers.bfloat16(), groups)
            wanted = _example(forward, backward, numbers.bfloat16().double(), groups)
            for mine, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.03, atol=0.03)
        x, other = torch.linspace(-2, 2, 2 * 6 * 5 * 8 * 6, device=device).sin().reshape(2, 6, 5, 8, 6)
        pairs = [
            (kernels.add(x, other, x[0, :, 0, 0]), x + other + x[0, :, 0, 0, None, None]),
            (kernels.sums(x), x.sum((0, 2, 3))),
            (kernels.softmax(x), x.softmax(-1)),
            (kernels.of_softmax(x, other), (x - (x * other).sum(-1, keepdim=True)) * other),
            (kernels.doubled(x), F.interpolate(x, scale_factor=2.0)),
            (kernels.of_doubled(x), 4 * F.avg_pool2d(x, 2)),
        ]
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    except Exception as error:  # of the compiler or the driver, of whatever kind
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


@torch.no_grad()
def _example(
    forward: Callable[..., Any], backward: Callable[..., Any], numbers: Float[Tensor, "4 c h w"], groups: int
) -> list[Tensor]:
    """All that the two give for maps made of `numbers`."""
    x, dy = (each.to(memory_format=torch.channels_last) for each in numbers.chunk(2))
    higher = torch.promote_types(numbers.dtype, torch.float32)
    shift, weight, bias = numbers[0, :, :3, 0].T.to(higher).contiguous()
    inputs = (shift, weight, bias, numbers[:2, :, 0, :2].flatten(1))
    y, *statistics = forward(x, *inputs, dy[:1], groups, 1e-5, True)
    return [y, *statistics[:2], *backward(dy, x, x, *inputs, *statistics, groups, 1e-5, True)]
