"""Sums of maps, and the biases of the layers that gave them.

On a GPU a layer leaves its bias out, and it is added by what comes next: a norm (`GroupNorm`'s `shift`) or a sum with
another map, which read and write the map anyway. There PyTorch would add a convolution's bias in a pass of its own, and
sum its gradient in another, both at a third of the memory's speed. Elsewhere a layer adds its bias itself.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpm_core.norms import has_kernels

Map = Float[Tensor, "b c h w"]
Made = Float[Tensor, "b k H W"]
Part = tuple[Made, Float[Tensor, " k"] | None]
"""A map, and what is still to be added to each of its channels."""


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`; weights and their names are the same."""

    def forward(self, x: Map) -> Made:
        return summed(self.part(x))

    def part(self, x: Map) -> Part:
        if has_kernels(x.device):
            return self._conv_forward(x, self.weight, None), self.bias
        return super().forward(x), None


def part(layer: nn.Module, x: Map) -> Part:
    """What a layer makes of x."""
    return layer.part(x) if isinstance(layer, Conv2d) else (layer(x), None)


def linear(layer: nn.Linear, x: Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n k"], Float[Tensor, " k"] | None]:
    """What a layer makes of tokens."""
    return (F.linear(x, layer.weight), layer.bias) if has_kernels(x.device) else (layer(x), None)


def summed(first: Part, second: Part | None = None) -> Made:
    """Of one part or two, with their biases."""
    a, b = first[0], None if second is None else second[0]
    biases = [each[1] for each in (first, second) if each is not None and each[1] is not None]
    if has_kernels(a.device):
        return (
            a if b is None and not biases else _Sum.apply(a, b, functools.reduce(torch.add, biases) if biases else None)
        )
    assert not biases, "left out where there are kernels"
    return a if b is None else a + b


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
        from ddpm_core import kernels  # Triton is there where there is a GPU

        ctx.dtypes = [None if each is None else each.dtype for each in (a, b, bias)]
        return kernels.add(a, b, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from ddpm_core import kernels

        of_a, of_b, of_bias = ctx.dtypes
        if not dy.is_contiguous(memory_format=torch.channels_last):  # a part of what was put together
            dy = kernels.add(dy, None, None)  # once, and not in each layer that the gradient goes to
        d_bias = kernels.sums(dy).to(of_bias) if of_bias is not None and ctx.needs_input_grad[2] else None
        return dy.to(of_a), None if of_b is None else dy.to(of_b), d_bias


def doubled(x: Map) -> Made:
    """Twice the side by nearest neighbour."""
    if has_kernels(x.device):
        return _Doubled.apply(x)
    with torch.autocast(x.device.type, enabled=False):  # which would make float32 of it, to copy it
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from ddpm_core import kernels

        return kernels.doubled(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from ddpm_core import kernels

        return kernels.of_doubled(dy)
