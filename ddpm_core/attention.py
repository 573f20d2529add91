"""Attention where the mission puts it.

    LinearAttention   high-resolution maps: cost linear in pixels
    SelfAttention     bottleneck: every place sees every other
    CrossAttention    skip connections, and every depth where asked for: places ask, the condition's features answer

All take and return maps, b c h w, and add to their input; output projections start at zero, so that each block
starts as the identity. Inside they work on tokens, b n c with n = h w: of a channels_last map these are a view.
"""

import functools
import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddpm_core.norms import GroupNorm, has_kernels
from ddpm_core.sums import linear, summed

Module = TypeVar("Module", bound=nn.Module)


def zeroed(module: Module) -> Module:
    """Set a layer's parameters to zero: the branch behind it starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """The places of a map in a row."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_map(x: Float[Tensor, "b n c"], like: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b c h w"]:
    """The inverse of `tokens`."""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def pooled(features: Float[Tensor, "b k h w"], side: int) -> Float[Tensor, "b k hk wk"]:
    """Means of `side` x `side` parts, or the features where they have no more places."""
    return F.adaptive_avg_pool2d(features, (min(side, features.shape[2]), min(side, features.shape[3])))


def heads(x: Float[Tensor, "b n c"], num_heads: int) -> Float[Tensor, "b k n d"]:
    """Channels shared out among `num_heads` heads."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def merged(x: Float[Tensor, "b k n d"]) -> Float[Tensor, "b n c"]:
    """The inverse of `heads`."""
    return x.transpose(1, 2).flatten(2)


def num_heads(channels: int, head_channels: int) -> int:
    """As many heads as share `channels` evenly with at least `head_channels` each; one where there are fewer."""
    wanted = max(channels // head_channels, 1)
    return next(count for count in range(wanted, 0, -1) if channels % count == 0)


def attend(
    q: Float[Tensor, "b k n d"], k: Float[Tensor, "b k m d"], v: Float[Tensor, "b k m d"]
) -> Float[Tensor, "b k n d"]:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 256:
        # With so few keys on a CPU, two matrix products beat the fused kernel.
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1).to(v) @ v
    return F.scaled_dot_product_attention(q, k, v)


def position_encoding(like: Float[Tensor, "b c h w"]) -> Float[Tensor, "1 c h w"]:
    """Sine and cosine of the relative position on the map, so that maps of different size agree on places."""
    _, channels, h, w = like.shape
    return _position_encoding(h, w, channels, like.dtype, like.device)


@functools.lru_cache(64)
def _position_encoding(
    h: int, w: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "1 c h w"]:
    with torch.inference_mode(False):  # it serves training too
        bands = max(channels // 4, 1)
        frequencies = math.pi * 2.0 ** (torch.arange(bands, device=device) * (5 / bands))
        y = ((torch.arange(h, device=device) + 0.5) / h)[:, None] * frequencies
        x = ((torch.arange(w, device=device) + 0.5) / w)[:, None] * frequencies
        rows = torch.cat([y.sin(), y.cos()], 1)[:, None].expand(h, w, -1)
        columns = torch.cat([x.sin(), x.cos()], 1)[None].expand(h, w, -1)
        of_places = torch.cat([rows, columns], 2)[:, :, :channels].to(dtype).contiguous()
        return of_places.permute(2, 0, 1)[None]


class LinearAttention(nn.Module):
    """Efficient attention (Shen et al. 2021): softmax over features for queries and over places for keys.

    The queries read from a matrix for each image, so that what stands around it is multiplied with it and not with the
    map: values and what comes before the output projection are never computed for all places.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads(channels, head_channels)
        self.norm = GroupNorm(1, channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        normalised, x = self.norm.forked(x)
        places = tokens(normalised)
        of_q, of_k, of_v = self.qkv.weight.chunk(3)
        q = softmax(F.linear(places, of_q).unflatten(2, (self.num_heads, -1))).flatten(2)
        read = F.linear(_over_places(of_k, places), of_v)
        read = read * _same_head(self.num_heads, read.shape[2], read.dtype, read.device)
        read = F.linear(read, self.out.weight)
        if has_kernels(x.device):
            return summed((x, None), (as_map(torch.bmm(q, read), x), self.out.bias))
        return x + as_map(torch.baddbmm(self.out.bias, q, read), x)


def _over_places(of_k: Float[Tensor, "k c"], places: Float[Tensor, "b n c"]) -> Float[Tensor, "b k c"]:
    """Each key's mean of all places, weighted by its softmax over them."""
    if has_kernels(places.device):
        # That is attention: the keys' weights ask, the places answer. What the keys are at each place is never stored.
        asked, answers = of_k.expand(len(places), 1, -1, -1), places[:, None]
        return F.scaled_dot_product_attention(asked, answers, answers, scale=1.0)[:, 0]
    k = of_k @ places.transpose(1, 2)  # b k n: the softmax goes along memory
    return softmax(k) @ places


@functools.lru_cache(64)
def _same_head(num_heads: int, channels: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "k c"]:
    """1 / sqrt(d) where key and value are of one head of d channels, else 0: a head's queries read its values alone."""
    with torch.inference_mode(False):  # it serves training too
        each = channels // num_heads
        head = torch.arange(channels, device=device) // each
        return (head[:, None] == head).to(dtype) * each**-0.5


def softmax(x: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
    """Over the last dimension, in the dtype of x: autocast would give float32; inside sums are so anyway."""
    with torch.autocast(x.device.type, enabled=False):
        return _Softmax.apply(x) if has_kernels(x.device) else x.softmax(dim=-1)


class _Softmax(torch.autograd.Function):
    """PyTorch's derivative goes through the map twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from ddpm_core import kernels  # Triton is there where there is a GPU

        y = kernels.softmax(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from ddpm_core import kernels

        return kernels.of_softmax(dy, *ctx.saved_tensors)


class SelfAttention(nn.Module):
    """Softmax attention between all places."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads(channels, head_channels)
        self.norm = GroupNorm(1, channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        normalised, x = self.norm.forked(x)
        q, k, v = (heads(part, self.num_heads) for part in self.qkv(tokens(normalised)).chunk(3, dim=2))
        out, bias = linear(self.out, merged(attend(q, k, v)))
        return summed((x, None), (as_map(out, x), bias))


class CrossAttention(nn.Module):
    """A map asks, the condition answers: what comes through depends on the reference image.

    Keys and values come from the condition's features pooled to at most `num_tokens` x `num_tokens`, so the cost
    stays linear in the map's pixels. Both sides carry their place.
    """

    def __init__(self, channels: int, condition_channels: int, head_channels: int, num_tokens: int) -> None:
        super().__init__()
        self.num_heads = num_heads(channels, head_channels)
        self.num_tokens = num_tokens
        self.norm = GroupNorm(1, channels)
        self.condition_norm = GroupNorm(1, condition_channels)
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(condition_channels, 2 * channels, bias=False)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, "b c h w"], features: Float[Tensor, "b k hk wk"]) -> Float[Tensor, "b c h w"]:
        features = pooled(features, self.num_tokens)
        queries, x = self.norm.forked(x, encoding=position_encoding(x))
        keys = self.condition_norm(features, encoding=position_encoding(features))
        q = heads(self.q(tokens(queries)), self.num_heads)
        k, v = (heads(part, self.num_heads) for part in self.kv(tokens(keys)).chunk(2, dim=2))
        out, bias = linear(self.out, merged(attend(q, k, v)))
        return summed((x, None), (as_map(out, x), bias))
