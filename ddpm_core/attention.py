"""Attention where the mission puts it.

    LinearAttention   high-resolution maps: cost linear in pixels
    SelfAttention     bottleneck: every pixel sees every other
    CrossAttention    skip connections: pixels ask, the condition's pooled features answer

All take and return b c h w and add to their input; output projections start at zero, so that each block starts
as the identity.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def zeroed(module: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero: the branch behind it starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def position_encoding(h: int, w: int, channels: int, like: Tensor) -> Float[Tensor, "1 c h w"]:
    """Sine and cosine of the relative position on the map, so that maps of different size agree on places."""
    bands = max(channels // 4, 1)
    frequencies = math.pi * 2.0 ** (torch.arange(bands, device=like.device) * (5 / bands))
    y = ((torch.arange(h, device=like.device) + 0.5) / h)[:, None] * frequencies
    x = ((torch.arange(w, device=like.device) + 0.5) / w)[:, None] * frequencies
    rows = torch.cat([y.sin(), y.cos()], 1).T[:, :, None].expand(-1, h, w)
    columns = torch.cat([x.sin(), x.cos()], 1).T[:, None, :].expand(-1, h, w)
    return torch.cat([rows, columns])[None, :channels].to(like)


class LinearAttention(nn.Module):
    """Efficient attention (Shen et al. 2021): softmax over features for queries and over places for keys."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.num_heads, c // self.num_heads, h * w).unbind(1)
        q = q.softmax(dim=-2) * (c // self.num_heads) ** -0.5
        k = k.softmax(dim=-1)
        context = k @ v.transpose(-1, -2)  # b heads d d: no h*w by h*w matrix anywhere
        attended = context.transpose(-1, -2) @ q.to(context)
        return x + self.out(attended.reshape(b, c, h, w).to(v))


class SelfAttention(nn.Module):
    """Softmax attention between all places (Vaswani et al. 2017)."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.num_heads, c // self.num_heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(-1, -2).reshape(b, c, h, w))


class CrossAttention(nn.Module):
    """A skip connection asks, the condition answers: what the decoder receives depends on the reference image.

    Keys and values come from the condition's features pooled to at most `tokens` x `tokens`, so the cost stays
    linear in the skip's pixels. Both sides carry their place.
    """

    def __init__(self, channels: int, condition_channels: int, head_channels: int, tokens: int) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.tokens = tokens
        self.norm = nn.GroupNorm(1, channels)
        self.condition_norm = nn.GroupNorm(1, condition_channels)
        self.q = nn.Conv2d(channels, channels, 1, bias=False)
        self.kv = nn.Conv2d(condition_channels, 2 * channels, 1, bias=False)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, skip: Float[Tensor, "b c h w"], features: Float[Tensor, "b k hk wk"]) -> Float[Tensor, "b c h w"]:
        b, c, h, w = skip.shape
        pooled = F.adaptive_avg_pool2d(
            features, (min(self.tokens, features.shape[2]), min(self.tokens, features.shape[3]))
        )
        queries = self.norm(skip)
        queries = queries + position_encoding(h, w, c, queries)
        keys = self.condition_norm(pooled)
        keys = keys + position_encoding(pooled.shape[2], pooled.shape[3], pooled.shape[1], keys)
        q = self.q(queries).reshape(b, self.num_heads, c // self.num_heads, h * w).transpose(-1, -2)
        k, v = (
            self.kv(keys)
            .reshape(b, 2, self.num_heads, c // self.num_heads, pooled.shape[2] * pooled.shape[3])
            .transpose(-1, -2)
            .unbind(1)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return skip + self.out(attended.transpose(-1, -2).reshape(b, c, h, w))
