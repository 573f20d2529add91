"""The noise-predicting U-Net.

output = unet(x_t, t, condition, domain)      b 3 h w, what `DiffusionConfig.prediction` names

condition ──┬─────────────► ConditionEncoder ── features of each level ──┐
            │ concat                                                     ▼ keys, values
x_t ────────┴─► [ResBlock, LinearAttention] x n ─── skips ──► CrossAttention ──► [ResBlock, LinearAttention] x n ─► out
                     │ /2 at each level                                          ▲ x2 at each level
                     └────────────► ResBlock, SelfAttention, ResBlock ───────────┘
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ddpm_core.attention import CrossAttention, LinearAttention, SelfAttention, zeroed
from ddpm_core.conditioning import ConditionEncoder
from ddpm_core.config import ModelConfig, check, stride
from ddpm_core.errors import InputError

IMAGE_CHANNELS = 3


class UNet(nn.Module):
    """A network for every direction of a data set: the domain label says which side to produce."""

    def __init__(self, config: ModelConfig) -> None:
        check(config)
        super().__init__()
        unet = config.unet
        self.config = config
        self.num_domains = len(config.domains)
        pixels = IMAGE_CHANNELS * unet.patch_size**2
        embedding = 4 * unet.model_channels
        widths = [unet.model_channels * mult for mult in unet.channel_mult]
        resolutions = [config.image_size // unet.patch_size // 2**level for level in range(len(widths))]
        linear = [resolution in unet.attn_resolutions for resolution in resolutions]

        self.time_embedding = nn.Sequential(
            nn.Linear(unet.model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.domain_embedding = nn.Embedding(self.num_domains + 1, embedding)
        self.condition_encoder = ConditionEncoder(pixels, unet.condition_channels, len(widths))
        self.stem = nn.Conv2d(2 * pixels, widths[0], 3, padding=1)

        def block(in_channels: int, out_channels: int, attend: bool) -> "Block":
            return Block(in_channels, out_channels, embedding, unet.dropout, unet.head_channels if attend else 0)

        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            blocks = [block(channels if i == 0 else width, width, linear[level]) for i in range(unet.num_res_blocks)]
            last = level == len(widths) - 1
            shrink = nn.Identity() if last else nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(Down(blocks, shrink))
            channels = width
        self.middle_in = block(channels, channels, False)
        self.middle_attention = SelfAttention(channels, unet.head_channels)
        self.middle_out = block(channels, channels, False)
        for level, width in reversed(list(enumerate(widths))):
            blocks = [
                block((channels if i == 0 else width) + width, width, linear[level]) for i in range(unet.num_res_blocks)
            ]
            attentions = [
                CrossAttention(width, unet.condition_channels, unet.head_channels, unet.condition_tokens)
                for _ in range(unet.num_res_blocks)
            ]
            grow = nn.Identity() if level == 0 else Upsample(width)
            self.up.append(Up(blocks, attentions, grow))
            channels = width
        self.out_norm = group_norm(channels)
        self.out = zeroed(nn.Conv2d(channels, pixels, 3, padding=1))

    def forward(
        self,
        x_t: Float[Tensor, "b 3 h w"],
        t: Int64[Tensor, " b"],
        condition: Float[Tensor, "b 3 h w"],
        domain: Int64[Tensor, " b"],
    ) -> Float[Tensor, "b 3 h w"]:
        """
        Raises:
            InputError: h or w is not a multiple of the network's stride.
        """
        unet = self.config.unet
        if x_t.shape[2] % stride(unet) or x_t.shape[3] % stride(unet):
            raise InputError(
                f"picture of {x_t.shape[3]} x {x_t.shape[2]} pixels: both must be multiples of {stride(unet)}"
            )
        assert x_t.shape == condition.shape, (x_t.shape, condition.shape)
        embedding = self.time_embedding(timestep_embedding(t, unet.model_channels).to(x_t))
        embedding = F.silu(embedding + self.domain_embedding(domain))
        condition = F.pixel_unshuffle(condition, unet.patch_size)
        features = self.condition_encoder(condition)
        h = self.stem(torch.cat([F.pixel_unshuffle(x_t, unet.patch_size), condition], dim=1))

        skips: list[Tensor] = []
        for level in self.down:
            h = level(h, embedding, skips)
        h = self.middle_out(self.middle_attention(self.middle_in(h, embedding)), embedding)
        for level, feature in zip(self.up, reversed(features), strict=True):
            h = level(h, embedding, skips, feature)
        return F.pixel_shuffle(self.out(F.silu(self.out_norm(h))), unet.patch_size)


class Down(nn.Module):
    """One resolution of the encoder: blocks, each leaving a skip, then half the side."""

    def __init__(self, blocks: list["Block"], resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample

    def forward(self, h: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            h = block(h, embedding)
            skips.append(h)
        return self.resample(h)


class Up(nn.Module):
    """One resolution of the decoder: each block takes a skip that has looked at the condition, then twice the side."""

    def __init__(self, blocks: list["Block"], attentions: list[CrossAttention], resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def forward(self, h: Tensor, embedding: Tensor, skips: list[Tensor], features: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = block(torch.cat([h, attention(skips.pop(), features)], dim=1), embedding)
        return self.resample(h)


class Block(nn.Module):
    """A residual block (BigGAN's, with the embedding as scale and shift), then linear attention where asked for."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding_channels: int, dropout: float, head_channels: int
    ) -> None:
        super().__init__()
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_channels, 2 * out_channels)
        self.norm_out = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = LinearAttention(out_channels, head_channels) if head_channels else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b k h w"]:
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(h) * (1 + scale) + shift
        h = self.conv_out(self.dropout(F.silu(h)))
        return self.attention(self.skip(x) + h)


class Upsample(nn.Module):
    """Twice the side by nearest neighbour, then a convolution (no checkerboard: Odena et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least eight channels."""
    return nn.GroupNorm(math.gcd(channels, max(1, min(32, channels // 8))), channels)


def timestep_embedding(t: Int64[Tensor, " b"], channels: int) -> Float[Tensor, "b c"]:
    """Sines and cosines of t at geometrically spaced frequencies (Vaswani et al. 2017)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, channels - 2 * half))
