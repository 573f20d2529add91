"""Everything that defines a model and how it is sampled: frozen dataclasses, one field a line.

`ModelConfig` is the whole of a checkpoint's `config.json`: enough to rebuild the network and to prepare an
input exactly as training did.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from ddpm_core.errors import InputError

FORMAT_VERSION = 1
"""Version of `config.json`; raised when an older reader would misread a newer file."""

Prediction = Literal["eps", "v", "x_0"]
Schedule = Literal["linear"]
Loss = Literal["huber", "mse"]
Weighting = Literal["uniform", "snr"]
Sampler = Literal["ddpm", "ddim"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The noise-predicting U-Net."""

    model_channels: int = 64
    """Channels of the first level; the others are multiples of it."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)
    """Channels of each level as a multiple of `model_channels`; each level halves the side."""
    num_res_blocks: int = 2
    """Residual blocks at each level, in the encoder and again in the decoder."""
    attn_resolutions: tuple[int, ...] = (64, 32, 16)
    """Sides of the feature maps that get linear self-attention, at the training image size."""
    head_channels: int = 32
    """Channels of one attention head."""
    condition_channels: int = 64
    """Channels of the condition encoder, whose features the skip connections attend to."""
    condition_tokens: int = 8
    """The condition's features are pooled to at most this many rows and columns, so that cross-attention
    stays linear in the number of pixels."""
    patch_size: int = 1
    """Pixels folded into channels at the input, per side: 2 quarters the cost of the whole network."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process and what the network is trained on."""

    num_timesteps: int = 1000
    """Length of the training chain."""
    schedule: Schedule = "linear"
    """Noise schedule (Ho et al. 2020: beta from 1e-4 to 0.02, scaled to `num_timesteps`)."""
    prediction: Prediction = "eps"
    """What the network outputs: the noise, the velocity (Salimans & Ho 2022) or the clean image."""
    loss: Loss = "huber"
    """Regression loss on the prediction."""
    huber_delta: float = 1.0
    """Error at which the Huber loss turns from quadratic to linear."""
    loss_weighting: Weighting = "uniform"
    """uniform: every timestep counts the same. snr: as a loss on x_0 times the signal-to-noise ratio, held between
    1 (truncated SNR, Salimans & Ho 2022) and `max_snr` (min-SNR, Hang et al. 2023)."""
    max_snr: float = 5.0
    """Ceiling of the snr weighting: higher values put more of the training into fine detail."""
    p_uncond: float = 0.2
    """How often the condition is replaced by the null condition, so that guidance has an unconditional model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How pictures are drawn from the network unless the caller says otherwise."""

    sampler: Sampler = "ddim"
    """ddpm: ancestral (Ho et al. 2020). ddim: deterministic (Song et al. 2021)."""
    num_steps: int = 50
    """Network evaluations along the chain."""
    guidance_scale: float = 1.5
    """0 unconditional, 1 plain, above 1 guided towards the condition (Ho & Salimans 2022)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataCard:
    """What a checkpoint remembers of the data it was trained on."""

    name: str = "unknown"
    """Name of the data set."""
    licence: str = "unknown"
    """Licence of the pictures; it binds the checkpoint and what is made with it."""
    content_hash: str = ""
    """Hash of the data set's shards."""
    pairing: str = "unpaired"
    """How sources and targets were paired in training: paired, matched or unpaired."""
    mean_color: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Mean colour of the training pictures, in [-1, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All of a checkpoint's `config.json`."""

    image_size: int = 64
    """Side of the square pictures the network was trained on, in pixels."""
    domains: tuple[str, ...] = ("a", "b")
    """Names of the sides; a picture's domain is its index here."""
    target_domains: tuple[str, ...] = ()
    """The sides this network was trained to produce; empty means all of them."""
    unet: UNetConfig = UNetConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The forward process and the loss."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling defaults; a run's `best.json` overrides them."""
    data: DataCard = DataCard()
    """The data it was trained on."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The training options, for the record."""


def stride(config: UNetConfig) -> int:
    """Pictures' sides must be multiples of this many pixels."""
    return config.patch_size * 2 ** (len(config.channel_mult) - 1)


def check(config: ModelConfig) -> None:
    """Refuse values that cannot work, by name.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    unet, diffusion, sampling = config.unet, config.diffusion, config.sampling
    positive = {
        "image_size": config.image_size,
        "unet.model-channels": unet.model_channels,
        "unet.num-res-blocks": unet.num_res_blocks,
        "unet.head-channels": unet.head_channels,
        "unet.condition-channels": unet.condition_channels,
        "unet.condition-tokens": unet.condition_tokens,
        "unet.patch-size": unet.patch_size,
        "diffusion.num-timesteps": diffusion.num_timesteps,
        "diffusion.huber-delta": diffusion.huber_delta,
        "diffusion.max-snr": diffusion.max_snr,
        "sampling.num-steps": sampling.num_steps,
        **{f"unet.channel-mult[{i}]": mult for i, mult in enumerate(unet.channel_mult)},
    }
    for name, value in positive.items():
        if not value > 0 or not math.isfinite(value):
            raise InputError(f"{name} is {value}; it must be positive and finite")
    if not unet.channel_mult:
        raise InputError("unet.channel-mult is empty; give one multiple for each level, such as 1 2 2 4")
    if unet.model_channels % unet.head_channels:
        raise InputError(
            f"unet.model-channels is {unet.model_channels}; it must be a multiple of "
            f"unet.head-channels = {unet.head_channels}"
        )
    if config.image_size % stride(unet):
        raise InputError(
            f"image_size is {config.image_size}; with {len(unet.channel_mult)} levels and patch size "
            f"{unet.patch_size} it must be a multiple of {stride(unet)}"
        )
    for name, value in {"diffusion.p-uncond": diffusion.p_uncond, "unet.dropout": unet.dropout}.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}; it must lie in [0, 1)")
    if sampling.num_steps > diffusion.num_timesteps:
        raise InputError(
            f"sampling.num-steps is {sampling.num_steps}; it must not exceed "
            f"diffusion.num-timesteps = {diffusion.num_timesteps}"
        )
    if sampling.guidance_scale < 0 or not math.isfinite(sampling.guidance_scale):
        raise InputError(f"sampling.guidance-scale is {sampling.guidance_scale}; it must be 0 or more")
    if len(config.domains) < 1 or len(set(config.domains)) != len(config.domains):
        raise InputError(f"domains are {list(config.domains)}; give distinct names")
    for name in config.target_domains:
        domain_index(config, name)


def domain_index(config: ModelConfig, name: str) -> int:
    """Index of the side called `name`.

    Raises:
        InputError: listing the sides there are.
    """
    if name not in config.domains:
        raise InputError(f"unknown domain {name!r}{did_you_mean(name, config.domains)}: {', '.join(config.domains)}")
    return config.domains.index(name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?); known are` or `; known are`, to build an error message with."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?); known are" if near else "; known are"


T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types."""
    return _plain(dataclasses.asdict(config))


def from_dict(cls: type[T], values: Any, *, where: str = "config") -> T:
    """The inverse of `to_dict`: strict, so that a misspelt or newer field is never ignored.

    Raises:
        InputError: for unknown fields and values of the wrong type, naming the field.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} must be an object, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise InputError(f"{where}: unknown field {name!r}{did_you_mean(name, hints)}: {', '.join(hints)}")
    return cls(**{name: _coerce(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where} is {value!r}; it must be one of {', '.join(map(str, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {value!r}; it must be a list")
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    expected = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(hint)
    if expected and (not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool)):
        raise InputError(f"{where} is {value!r}; it must be {hint.__name__}")
    return float(value) if hint is float else value
