"""Group norm, and the scale, shift and SiLU that follow it, as one step.

    n = (x - mean) / sqrt(var + eps)       over each group of channels of each image (Wu & He 2018)
    y = n weight + bias                    learned, one of each a channel
    y = y (1 + scale) + shift              with a modulation: one of each a channel of each image
    y = y sigmoid(y)                       with `silu`

y has the dtype of x, also under autocast, which would run PyTorch's norm in float32 on a GPU and hand float32 maps on.
Statistics and sums are float32. On a GPU each direction is one kernel (`norm_kernels`) and for the backward pass x and
two numbers a group are kept. On a CPU it is PyTorch's operators, with its own derivatives where these are fast.
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

    def forward(self, x: Map, modulation: Float[Tensor, "b m"] | None = None) -> Map:
        """`modulation`: b 2c, the scales and then the shifts."""
        arguments = (x, self.weight, self.bias, modulation, self.num_groups, self.eps, self.silu)
        return forward(*arguments)[0] if _derives_fast(x, self.num_groups) else _Step.apply(*arguments)


def _derives_fast(x: Map, groups: int) -> bool:
    """Whether the operators' own derivatives are the fastest: in CPUs' bf16 that of the norm is not vectorised over
    groups of few channels, and takes ten times as long as the norm."""
    narrow = x.dtype == torch.bfloat16 and x.shape[1] // groups < 16 and x.shape[2] * x.shape[3] >= 1024
    return x.device.type == "cpu" and not narrow


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, *options: Any) -> Tensor:
        y, mean, rstd = _implementation(x)[0](x, weight, bias, modulation, *options)
        ctx.save_for_backward(x, weight, bias, modulation, mean, rstd)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, modulation, mean, rstd = ctx.saved_tensors
        dx, dn, db = _implementation(x)[1](dy, x, weight, bias, modulation, mean, rstd, *ctx.options)
        d_modulation = None
        if modulation is not None:
            d_modulation = torch.cat([dn * weight + db * bias, db], dim=1).to(modulation.dtype)
            gain = 1 + modulation[:, : x.shape[1]].to(dn.dtype)
            dn, db = dn * gain, db * gain
        return dx, dn.sum(0).to(weight.dtype), db.sum(0).to(bias.dtype), d_modulation, None, None, None


def _implementation(x: Map) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What computes y, and what its derivatives."""
    if x.is_cuda and has_kernels(x.device):
        from ddpm_core import norm_kernels  # Triton is there where there is a GPU

        return norm_kernels.forward, norm_kernels.backward
    return forward, backward


# -- in PyTorch's operators ---------------------------------------------------------------------------------------


def forward(
    x: Map, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Map, OfGroups, OfGroups]:
    """y, and the mean and 1 / sqrt(var + eps) of each group."""
    y, mean, rstd = _normalized(x, weight, bias, groups, eps)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None].to(y.dtype).chunk(2, dim=1)
        y = torch.addcmul(shift, y, 1 + scale)
    return F.silu(y) if silu else y, mean, rstd


def backward(
    dy: Map,
    x: Map,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    mean: OfGroups,
    rstd: OfGroups,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Map, OfChannels, OfChannels]:
    """dx, and of each channel the sums over places of dy n and dy, where dy is what comes to the SiLU's input."""
    b, c, h, w = x.shape
    n = _normalized(x, torch.ones_like(weight), torch.zeros_like(bias), groups, eps)[0]
    gain, offset = weight.expand(b, c), bias.expand(b, c)
    if modulation is not None:
        scale, shift = modulation.to(weight.dtype).chunk(2, dim=1)
        gain, offset = gain * (1 + scale), offset * (1 + scale) + shift

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
    return torch.addcmul(dx, dy, of_map(gain * rstd)), dn, db


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
    if device not in _HAS_KERNELS:
        difference = _tried(device)
        _HAS_KERNELS[device] = not difference
        if difference:
            warnings.warn(
                f"{device}: norms run in PyTorch's operators, which take several times as long: {difference}",
                stacklevel=2,
            )
    return _HAS_KERNELS[device]


_HAS_KERNELS: dict[torch.device, bool] = {}


def _tried(device: torch.device) -> str:
    """What is wrong with the kernels there; nothing if they give what the operators give."""
    try:
        from ddpm_core import norm_kernels

        for channels, groups in ((24, 3), (40, 1)):
            found = _example(norm_kernels.forward, norm_kernels.backward, channels, groups, device)
            wanted = _example(forward, backward, channels, groups, device)
            for mine, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.03, atol=0.03)
    except Exception as error:  # of the compiler or the driver, of whatever kind
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


@torch.no_grad()
def _example(
    forward: Callable[..., Any], backward: Callable[..., Any], channels: int, groups: int, device: torch.device
) -> list[Tensor]:
    """All that the two give for maps made up."""
    numbers = torch.linspace(-2, 2, 4 * channels * 36, device=device).sin().reshape(4, channels, 6, 6)
    x, dy = (each.bfloat16().to(memory_format=torch.channels_last) for each in numbers.chunk(2))
    weight, bias = numbers[0, :, :2, 0].T.contiguous()
    modulation = numbers[:2, :, 0, :2].flatten(1).bfloat16()
    y, mean, rstd = forward(x, weight, bias, modulation, groups, 1e-5, True)
    return [y, mean, rstd, *backward(dy, x, weight, bias, modulation, mean, rstd, groups, 1e-5, True)]
