"""The noise-predicting U-Net.

    output = unet(x_t, t, condition, domain)      b 3 h w, what `DiffusionConfig.prediction` names
           = F(x_t, ...) + scale x_t + shift      one scale and shift a channel, learned functions of t and domain
           = m M condition + (1 - m) F(x_t, ...)  with `source_mask`: m of each pixel from the network, M a matrix of
                                                  colours, a learned function of t and domain

condition ──┬─────────────► ConditionEncoder ── features of each level ──┐
            │ concat                                                     ▼ keys, values
x_t ────────┴─► [Block] x n ─────────────────── skips ──► CrossAttention ──► [Block] x n ─► F
                     │ /2 at each level                                         ▲ x2 at each level
                     └────────────► Block, SelfAttention, Block ────────────────┘

Block = residual block, linear attention at high resolutions, and as `UNetConfig.injection` asks: cross-attention to
the condition, or channels that only the condition's encoder writes (anchor).
"""

import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ddpm_core.attention import CrossAttention, LinearAttention, SelfAttention, pooled, zeroed
from ddpm_core.conditioning import Anchor, ConditionEncoder
from ddpm_core.config import ModelConfig, UNetConfig, check, sides, stride
from ddpm_core.errors import InputError
from ddpm_core.norms import GroupNorm
from ddpm_core.sums import Conv2d, doubled, part, summed

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
        linear = [side in unet.attn_resolutions for side in sides(config)]

        self.time_embedding = nn.Sequential(
            nn.Linear(unet.model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.domain_embedding = nn.Embedding(self.num_domains + 1, embedding)
        self.condition_encoder = ConditionEncoder(pixels, unet.condition_channels, len(widths))
        self.anchors = nn.ModuleList(
            Anchor(unet.condition_channels, unet.anchor_channels, unet.anchor_landmarks, unet.anchor_radius)
            for _ in widths
            if "anchor" in unet.injection
        )
        self.stem = Conv2d(2 * pixels if "concat" in unet.injection else pixels, widths[0], 3, padding=1)

        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            blocks = [
                Block(channels if i == 0 else width, width, embedding, unet, attend=linear[level])
                for i in range(unet.num_res_blocks)
            ]
            last = level == len(widths) - 1
            shrink = nn.Identity() if last else Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(Down(blocks, shrink))
            channels = width
        self.middle_in = Block(channels, channels, embedding, unet, attend=False)
        self.middle_attention = SelfAttention(channels, unet.head_channels)
        self.middle_out = Block(channels, channels, embedding, unet, attend=False)
        for level, width in reversed(list(enumerate(widths))):
            blocks = [
                Block(2 * width, width, embedding, unet, attend=linear[level]) for _ in range(unet.num_res_blocks)
            ]
            attentions = [
                CrossAttention(width, unet.condition_channels, unet.head_channels, unet.condition_tokens)
                for _ in range(unet.num_res_blocks)
            ]
            grow = nn.Identity() if level == 0 else Upsample(width, widths[level - 1])
            self.up.append(Up(blocks, attentions, grow))
        self.out_norm = group_norm(widths[0], silu=True)
        masks = unet.patch_size**2 if unet.source_mask else 0
        self.out = zeroed(Conv2d(widths[0], pixels + masks, 3, padding=1))
        # Most of eps and v is a linear function of x_t: without this path the first thousand steps go into learning it.
        # To x_0 it would carry noise that F has to cancel (docs/log.md).
        self.shortcut = (
            None if config.diffusion.prediction == "x_0" else zeroed(nn.Linear(embedding, 2 * IMAGE_CHANNELS))
        )
        self.recolor = identical(nn.Linear(embedding, IMAGE_CHANNELS**2)) if unet.source_mask else None
        # Convolutions and attention over tokens are faster so (docs/results.md has the measurement).
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping what it computed: less memory, more time."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = on

    def forward(
        self,
        x_t: Float[Tensor, "b 3 h w"],
        t: Int64[Tensor, " b"],
        condition: Float[Tensor, "b 3 h w"],
        domain: Int64[Tensor, " b"],
        *,
        show_mask: bool = False,
    ) -> Float[Tensor, "b _ h w"]:
        """b 3 h w; with `show_mask`, which needs `source_mask`, b 4 h w: the last channel is m.

        Raises:
            InputError: h or w is not a multiple of the network's stride.
        """
        unet = self.config.unet
        if x_t.shape[2] % stride(unet) or x_t.shape[3] % stride(unet):
            raise InputError(
                f"image of {x_t.shape[3]} x {x_t.shape[2]} pixels: both must be multiples of {stride(unet)}"
            )
        assert x_t.shape == condition.shape, (x_t.shape, condition.shape)
        embedding = self.time_embedding(timestep_embedding(t, unet.model_channels).to(x_t))
        embedding = F.silu(embedding + self.domain_embedding(domain))
        source, condition = condition, F.pixel_unshuffle(condition, unet.patch_size)
        features = self.condition_encoder(condition)
        seen = [pooled(each, unet.condition_tokens) for each in features]
        h = F.pixel_unshuffle(x_t, unet.patch_size)
        h = self.stem(torch.cat([h, condition], dim=1) if "concat" in unet.injection else h)
        anchors = [anchor(feature) for anchor, feature in zip(self.anchors, features, strict=False)]
        shown = list(zip(seen, anchors or [None] * len(seen), strict=True))

        skips: list[Tensor] = []
        for level, see in zip(self.down, shown, strict=True):
            h = level(h, embedding, see, skips)
        h = self.middle_in(h, embedding, *shown[-1])
        h = self.middle_out(self.middle_attention(h), embedding, *shown[-1])
        for level, see in zip(self.up, reversed(shown), strict=True):
            h = level(h, embedding, see, skips)
        h = F.pixel_shuffle(self.out(self.out_norm(h)), unet.patch_size)
        with torch.autocast(x_t.device.type, enabled=False):
            return self._finished(h.to(x_t), x_t, source, embedding.to(x_t), show_mask)

    def _finished(self, h: Tensor, x_t: Tensor, source: Tensor, embedding: Tensor, show_mask: bool) -> Tensor:
        """The output from what the last convolution gave, b 3 h w, or b 4 h w with a mask."""
        if self.recolor is not None:
            drawn, mask = h.split([IMAGE_CHANNELS, 1], dim=1)
            mix = self.recolor(embedding).unflatten(1, (IMAGE_CHANNELS, IMAGE_CHANNELS))
            kept = torch.einsum("bij,bjhw->bihw", mix, source)
            mask = mask.sigmoid()
            output = drawn + mask * (kept - drawn)
            return torch.cat([output, mask], dim=1) if show_mask else output
        assert not show_mask, "this network has no mask"
        if self.shortcut is None:
            return h
        scale, shift = self.shortcut(embedding)[:, :, None, None].chunk(2, dim=1)
        return h + scale * x_t + shift


Shown = tuple[Tensor, Tensor | None]
"""What one level sees of the condition: the encoder's features, pooled, and the anchor where there is one."""


class Down(nn.Module):
    """One resolution of the encoder: blocks, each leaving a skip, then half the side."""

    def __init__(self, blocks: list["Block"], resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample

    def forward(self, h: Tensor, embedding: Tensor, shown: Shown, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            h = block(h, embedding, *shown)
            skips.append(h)
        return self.resample(h)


class Up(nn.Module):
    """One resolution of the decoder: each block takes a skip that has looked at the condition, then twice the side."""

    def __init__(self, blocks: list["Block"], attentions: list[CrossAttention], resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def forward(self, h: Tensor, embedding: Tensor, shown: Shown, skips: list[Tensor]) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = block(torch.cat([h, attention(skips.pop(), shown[0])], dim=1), embedding, *shown)
        return self.resample(h)


class Block(nn.Module):
    """A residual block (BigGAN's, with the embedding as scale and shift), then attention where asked for.

    With an anchor the last `anchor_channels` of the output are the anchor; the block itself writes the others.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_channels: int, unet: UNetConfig, *, attend: bool
    ) -> None:
        super().__init__()
        own = out_channels - (unet.anchor_channels if "anchor" in unet.injection else 0)
        self.recompute = False
        self.norm_in = group_norm(in_channels, silu=True)
        self.conv_in = Conv2d(in_channels, own, 3, padding=1)
        self.modulation = nn.Linear(embedding_channels, 2 * own)
        self.norm_out = group_norm(own, silu=True)
        self.dropout = nn.Dropout(unet.dropout)
        self.conv_out = zeroed(Conv2d(own, own, 3, padding=1))
        self.skip = nn.Identity() if in_channels == own else Conv2d(in_channels, own, 1)
        self.attention = LinearAttention(own, unet.head_channels) if attend else nn.Identity()
        self.cross_attention = (
            CrossAttention(own, unet.condition_channels, unet.head_channels, unet.condition_tokens)
            if "cross_attention" in unet.injection
            else None
        )

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        embedding: Float[Tensor, "b e"],
        features: Float[Tensor, "b f hf wf"],
        anchor: Float[Tensor, "b a h w"] | None,
    ) -> Float[Tensor, "b k h w"]:
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self.compute, x, embedding, features, anchor, use_reentrant=False)
        return self.compute(x, embedding, features, anchor)

    def compute(self, x: Tensor, embedding: Tensor, features: Tensor, anchor: Tensor | None) -> Tensor:
        h, x = self.norm_in.forked(x)
        h, bias = self.conv_in.part(h)
        h = self.norm_out(h, self.modulation(embedding), shift=bias)
        h = self.attention(summed(part(self.skip, x), self.conv_out.part(self.dropout(h))))
        if self.cross_attention is not None:
            h = self.cross_attention(h, features)
        return h if anchor is None else torch.cat([h, anchor.to(h)], dim=1)


class Upsample(nn.Module):
    """Twice the side by nearest neighbour, then a convolution (no checkerboard: Odena et al. 2016)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k H W"]:
        return self.conv(doubled(x))


def identical(linear: nn.Linear) -> nn.Linear:
    """`linear`, which starts as giving the identity matrix, row by row, whatever goes in."""
    zeroed(linear)
    with torch.no_grad():
        linear.bias.copy_(torch.eye(math.isqrt(linear.out_features)).flatten())
    return linear


def group_norm(channels: int, *, silu: bool = False) -> GroupNorm:
    """Groups of at least eight channels."""
    return GroupNorm(math.gcd(channels, max(1, min(32, channels // 8))), channels, silu=silu)


def timestep_embedding(t: Int64[Tensor, " b"], channels: int) -> Float[Tensor, "b c"]:
    """Sines and cosines of t at geometrically spaced frequencies (Vaswani et al. 2017)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, channels - 2 * half))
