"""Networks to be measured beside one another, ours and the peers', and what trains them."""

import functools
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_core.config import ModelConfig, UNetConfig
from ddpm_core.errors import InputError
from ddpm_core.graphs import GraphedTraining
from ddpm_core.unet import UNet

IMAGE_SIZE = 64
BATCH_SIZE = 16
PEERS = ("denoising_diffusion_pytorch", "diffusers")
CPU = torch.device("cpu")

Size = Literal["tiny", "9M", "35M"]
Layout = Literal["nchw", "channels_last"]
Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Network:
    """One contender: how to make it, and how it is asked for eps of x_t under a condition."""

    name: str
    make: Callable[[], nn.Module]
    call: Call
    module: str = "ddpm_core"
    """What must be installed."""
    image_size: int = IMAGE_SIZE


def networks(size: Size) -> list[Network]:
    """Ours first. All take 6 channels (noisy image and condition) to 3."""
    width = {"tiny": 16, "9M": 32, "35M": 64}[size]
    unet = UNetConfig(model_channels=width, channel_mult=(1, 2, 4, 9), num_res_blocks=1, head_channels=min(width, 32))
    return [
        ours("ddpm-translate", unet, IMAGE_SIZE),
        Network(
            "lucidrains",
            lambda: _lucidrains(width),
            lambda net, x, c, t: net(torch.cat([x, c], 1), t),
            "denoising_diffusion_pytorch",
        ),
        Network(
            "diffusers",
            lambda: _diffusers((2 * width, 2 * width, 4 * width, 5 * width)),
            lambda net, x, c, t: net(torch.cat([x, c], 1), t).sample,
            "diffusers",
        ),
    ]


def ours(name: str, unet: UNetConfig, image_size: int) -> Network:
    config = ModelConfig(image_size=image_size, domains=("day", "night"), unet=unet)
    return Network(name, lambda: UNet(config), _call_ours, image_size=image_size)


def _call_ours(net: nn.Module, x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
    return net(x_t, t, condition, torch.ones_like(t))


def _lucidrains(dim: int) -> nn.Module:
    return importlib.import_module("denoising_diffusion_pytorch").Unet(dim=dim, channels=6, out_dim=3)


def _diffusers(widths: tuple[int, ...]) -> nn.Module:
    return importlib.import_module("diffusers").UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=6,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


@functools.cache
def import_peers() -> None:
    """
    Raises:
        InputError: the extra is not installed.
    """
    allow_torchvision()
    for name in PEERS:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(f"no module {error.name!r}: the peers come with pip install -e '.[bench]'") from None


@functools.cache
def allow_torchvision() -> None:
    """A torchvision built for CUDA cannot be imported beside a CPU-only torch for want of two operators."""
    there = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False)
    if b"torchvision::nms does not exist" in there.stderr:
        _OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


class _Called(nn.Module):
    """A contender with its way of being asked: image, condition and timesteps to eps."""

    def __init__(self, call: Call, net: nn.Module) -> None:
        super().__init__()
        self.call, self.net = call, net

    def forward(self, x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        return self.call(self.net, x_t, condition, t)


class Stepper:
    """A network and its optimiser, in one precision and layout."""

    def __init__(
        self,
        network: Network,
        *,
        precision: str,
        layout: Layout,
        learning_rate: float = 1e-4,
        device: torch.device = CPU,
        compiled: bool = False,
        graphed: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.network, self.precision, self.layout, self.device = network, precision, layout, device
        self.net: nn.Module = network.make().to(device)
        self.net.to(memory_format=FORMATS[layout])  # type: ignore[call-overload]
        if compiled:
            self.net.compile()
        called = _Called(network.call, self.net)
        self.trained: nn.Module = GraphedTraining(called) if graphed else called
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.step_s: list[float] = []
        self.forward_s: list[float] = []

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def eps(self, x_t: Tensor, condition: Tensor, t: Tensor, net: nn.Module | None = None) -> Tensor:
        """What the network in training, or another of its kind, makes of x_t."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.network.call(net or self.net, x_t, condition, t).float()

    def step(self, x_t: Tensor, condition: Tensor, t: Tensor, noise: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.trained(x_t, condition, t).float()
        loss = (output - noise).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()

    def flops_a_image(self) -> float:
        """Of forward and backward, as PyTorch's counter sees them."""
        x_t, condition, t, noise = self.random_batch(1)
        with FlopCounterMode(display=False) as counter:
            (self.network.call(self.net, x_t, condition, t) - noise).square().mean().backward()
        self.optimizer.zero_grad(set_to_none=True)
        return float(counter.get_total_flops())

    def random_batch(self, size: int = BATCH_SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t, condition, t and noise, as `step` takes them."""
        images = torch.randn(3, size, 3, self.network.image_size, self.network.image_size, device=self.device)
        x_t, condition, noise = (each.to(memory_format=FORMATS[self.layout]) for each in images)
        return x_t, condition, torch.randint(0, 1000, (size,), device=self.device), noise
