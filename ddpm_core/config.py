"""Everything that defines a model and how it is sampled: frozen dataclasses, one field a line.

`ModelConfig` is the whole of a checkpoint's `config.json`: enough to rebuild the network and to prepare an
input exactly as training did.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from ddpm_core.errors import InputError

FORMAT_VERSION = 2
"""Version of `config.json`; raised when an older reader would misread a newer file."""

MAX_SEED = 2**31 - 1
"""Largest seed of commands and requests: numpy, torch and Optuna take it, and a few more above it."""

MAX_DOMAINS, MAX_VALUES, MAX_BLOCKS = 10_000, 10_000, 256
"""Most domains of a data set, values of any list, and blocks of all generators of a GAN together."""

MAX_WEIGHT = 1_000_000
"""Most that a loss, or a bound of it, weighs: far above what trains, and far below what float32 cannot hold."""

MAX_SCALE = 100
"""Most guidance, and most eta: far above what makes an image, and far below what makes no number of it."""

Method = Literal["diffusion", "pix2pix", "cyclegan", "identity", "attributes"]
GANS: tuple[Method, ...] = ("pix2pix", "cyclegan")
ENCODERS: tuple[Method, ...] = ("identity", "attributes")
"""Methods whose checkpoints are encoders: `ddpm_core.encoders` reads them."""
Injection = Literal["concat", "cross_attention", "anchor"]
Prediction = Literal["eps", "v", "x_0"]
Schedule = Literal["linear", "cosine"]
Loss = Literal["huber", "mse"]
Weighting = Literal["uniform", "snr", "min_snr"]
Sampler = Literal["ddpm", "ddim", "dpm_solver"]
Spacing = Literal["trailing", "leading", "linspace"]
Start = Literal["noise", "sdedit", "ddib", "residual", "flowedit"]
FROM_SIDE: tuple[Start, ...] = ("ddib", "residual", "flowedit")
"""Ways that need to know which side the source is on, and show the network none of it but through x_t."""
PARTIAL: tuple[Start, ...] = ("sdedit", "residual", "flowedit")
"""Ways that may leave out the noisier part of the chain: `strength` is theirs."""
Precision = Literal["auto", "fp32", "bf16"]
Pairing = Literal["paired", "matched", "unpaired", "self", "none", "synthetic"]
Align = Literal["auto", "faces", "none"]
Faces = Literal["largest", "all"]
OutputSize = Literal["own", "model"]
OutputFormat = Literal["png", "jpeg", "webp"]


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
    injection: tuple[Injection, ...] = ("concat",)
    """How the condition reaches the network, besides the skip connections that always attend to it. concat: beside
    the noisy image at the input. cross_attention: every residual block attends to it, at every depth. anchor:
    `anchor_channels` of each level's feature map are written by the condition's encoder and by nothing else."""
    anchor_channels: int = 16
    """Channels of each level's feature map that the anchor reserves."""
    anchor_landmarks: tuple[float, ...] = ()
    """Places the anchor is bound to, as x0 y0 x1 y1 ... in shares of the image's side (aligned portraits share
    their landmarks); empty means the whole map."""
    anchor_radius: float = 0.15
    """How far the anchor reaches around each of `anchor_landmarks`, in shares of the side."""
    source_mask: bool = False
    """The network also says of each pixel how much of the source stays there (attention masks: Pumarola et al. 2018),
    and draws the rest; what does not change then need not be learned. With diffusion.prediction x_0 only."""
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
    """linear: beta from 1e-4 to 0.02, scaled to `num_timesteps` (Ho et al. 2020). cosine: Nichol & Dhariwal 2021."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last step is pure noise (Lin et al. 2024): dark and bright images need it.
    The last step then tells nothing about the noise, so `prediction` must be v or x_0."""
    prediction: Prediction = "eps"
    """What the network outputs: the noise, the velocity (Salimans & Ho 2022) or the clean image."""
    loss: Loss = "huber"
    """Regression loss on the prediction."""
    huber_delta: float = 1.0
    """Error at which the Huber loss turns from quadratic to linear."""
    loss_weighting: Weighting = "uniform"
    """uniform: every timestep counts the same. min_snr: as a loss on x_0 times the signal-to-noise ratio, at most
    `max_snr` (Hang et al. 2023). snr: the same, and at least 1 (truncated SNR, Salimans & Ho 2022)."""
    max_snr: float = 5.0
    """Ceiling of the snr weightings: higher values put more of the training into fine detail."""
    p_uncond: float = 0.2
    """How often the condition is replaced by the null condition, so that guidance has an unconditional model."""
    p_uncond_domain: float = 0.2
    """How often, independently of that, the domain is replaced by the null domain: it gets a guidance weight of its
    own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are drawn from the network unless the caller says otherwise."""

    sampler: Sampler = "ddim"
    """ddpm: ancestral (Ho et al. 2020). ddim: deterministic (Song et al. 2021). dpm_solver: DPM-Solver++(2M), second
    order (Lu et al. 2022)."""
    num_steps: int = 50
    """Network evaluations along the chain."""
    spacing: Spacing = "trailing"
    """Which timesteps are visited (Lin et al. 2024, table 2): only trailing starts where the chain ends."""
    eta: float = 0.0
    """Of ddim: 0 deterministic, 1 ancestral."""
    guidance_scale: float = 1.5
    """0 unconditional, 1 plain, above 1 guided towards the condition (Ho & Salimans 2022)."""
    domain_guidance_scale: float | None = None
    """A weight of the domain's own; `guidance_scale` is then the image's (Brooks et al. 2023, eq. 3)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at these timesteps, in shares of the chain, 1 the noisiest (Kynkäänniemi et al. 2024)."""
    guidance_rescale: float = 0.0
    """Pull the guided prediction's spread back to the plain one's, 0 not at all, 1 wholly (Lin et al. 2024)."""
    start: Start = "noise"
    """noise: pure noise. Four ways for networks trained without pairs: sdedit: the source with noise of `strength`
    (Meng et al. 2022). ddib: the noise that DDIM finds for the source in its own domain (Su et al. 2023). residual:
    the source, and what drawing it from that noise as the wanted domain differs from drawing it as its own. flowedit:
    the same difference without finding a noise (Kulikov et al. 2024)."""
    strength: float = 1.0
    """Of sdedit, residual and flowedit: share of the chain that is noised and drawn again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Framing:
    """What of a photo is translated, and what comes back."""

    align: Align = "auto"
    """faces: photos are turned and cut so that the largest face lies where the training images have theirs; those
    without a face are refused. auto: faces, where the checkpoint was trained on aligned portraits. none: photos are
    taken as they are."""
    faces: Faces = "largest"
    """Where photos are aligned: the largest face of each is translated, or all that are found."""
    output_size: OutputSize = "own"
    """own: results of the photo's own size and shape. The network sees the whole photo, or its face, at the network's
    size; what it changes is carried over to the photo, whose detail stays. model: squares of the network's size, of
    the photo's middle or its face."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GANConfig:
    """The baselines: pix2pix (Isola et al. 2017) for pairs, CycleGAN (Zhu et al. 2017) without."""

    channels: int = 64
    """Channels of the first level of generator and discriminator."""
    num_levels: int = 4
    """Levels of the generator's U-Net (pix2pix); each halves the side."""
    num_res_blocks: int = 6
    """Residual blocks of the generator (CycleGAN)."""
    num_discriminator_levels: int = 2
    """Halvings in the patch discriminator: sets how large a patch it judges."""
    l1_weight: float = 100.0
    """Of |result - target| (pix2pix)."""
    cycle_weight: float = 10.0
    """Of |source - there and back| (CycleGAN)."""
    identity_weight: float = 5.0
    """Of |image - itself translated to its own domain| (CycleGAN)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderNet:
    """A small network that looks at images: who is on one, or what it shows."""

    image_size: int = 64
    """Side of the square that it looks at, in pixels."""
    crop_box: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)
    """What of an image it looks at: x0 y0 x1 y1 in shares of its side. Faces are told apart by the face."""
    widths: tuple[int, ...] = (24, 48, 96, 192)
    """Channels of each stage; each stage halves the side."""
    embedding_channels: int = 128
    """Length of an identity embedding."""
    attributes: tuple[str, ...] = ()
    """Names of what a classifier learns to see, in the order of its logits."""
    noise_aware: bool = False
    """Of a classifier: it looks at x_t and is told t, so that it can guide sampling (Dhariwal & Nichol 2021)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderOptions(EncoderNet):
    """An encoder and how it is trained."""

    attributes: tuple[str, ...] = ()
    """What a classifier learns beside the domain, which it always does: names of the data set's attributes, or all."""
    scale: float = 16.0
    """Of the identity encoder's loss, and of its validation: what cosines are multiplied by."""
    margin: float = 0.2
    """Of the identity encoder's loss: what the right person's cosine must win by."""
    brightness: float = 0.3
    """Images are made brighter or darker by up to this share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataCard:
    """What a checkpoint remembers of the data it was trained on."""

    name: str = "unknown"
    """Name of the data set."""
    licence: str = "unknown"
    """Licence of the images; it binds the checkpoint and what is made with it."""
    content_hash: str = ""
    """Hash of the data set's shards."""
    pairing: str = "unpaired"
    """How sources and targets were paired in training, as the option --pairing has it."""
    mean_color: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Mean colour of the training images, in [-1, 1]."""
    landmarks: tuple[float, ...] = ()
    """Where faces have eyes, nose and corners of the mouth in the training images, x0 y0 x1 y1 ..., in shares of the
    side; empty where they are not aligned portraits. Photos to translate are aligned to them."""
    num_people: int = 0
    """How many people an identity encoder learned to tell apart."""
    attribute_rates: tuple[float, ...] = ()
    """Share of the training images that show each of a classifier's attributes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint whose weights a training began with."""

    checkpoint: str = ""
    """Its folder."""
    fingerprint: str = ""
    """Hash of its file of weights."""
    ema: float | None = None
    """The length of the EMA whose weights they are, where it is known."""
    domains: tuple[str, ...] = ()
    """Names of the sides that it knew."""
    data: str = "unknown"
    """Name of the data set it was trained on."""
    licence: str = "unknown"
    """Licence of those images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All of a checkpoint's `config.json`."""

    image_size: int = 64
    """Side of the square images the network was trained on, in pixels."""
    domains: tuple[str, ...] = ("a", "b")
    """Names of the sides; an image's domain is its index here."""
    target_domains: tuple[str, ...] = ()
    """The sides this network was trained to produce; empty means all of them."""
    method: Method = "diffusion"
    """The conditional diffusion model, a GAN baseline, or an encoder."""
    shown: Literal["source", "structure", "nothing"] = "source"
    """What the condition is: the source itself; its structure alone, so that the domain's label makes the rest; or
    nothing, for a prior of all sides that an image is edited with."""
    unet: UNetConfig = UNetConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The forward process and the loss."""
    gan: GANConfig = GANConfig()
    """Networks and losses of the GAN baselines."""
    encoder: EncoderOptions = EncoderOptions()
    """The encoder, its attributes named one by one."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling defaults; a run's `best.json` overrides them."""
    data: DataCard = DataCard()
    """The data it was trained on."""
    origin: Origin | None = None
    """Whose weights its training began with; None: fresh ones."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The training options, for the record."""


def stride(config: UNetConfig) -> int:
    """Images' sides must be multiples of this many pixels."""
    return config.patch_size * 2 ** (len(config.channel_mult) - 1)


def sides(config: ModelConfig) -> list[int]:
    """Of the U-Net's feature maps, level by level, at the training image size."""
    return [config.image_size // config.unet.patch_size // 2**level for level in range(len(config.unet.channel_mult))]


def check(config: ModelConfig) -> None:
    """Refuse values that cannot work, by name.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    unet, diffusion, gan = config.unet, config.diffusion, config.gan
    check_positive(
        {
            "image_size": (config.image_size, 8192),
            "unet.model-channels": (unet.model_channels, 8192),
            "levels of unet.channel-mult": (len(unet.channel_mult) or 1, 12),
            "unet.num-res-blocks": (unet.num_res_blocks, 64 // min(len(unet.channel_mult) or 1, 12)),
            "unet.head-channels": (unet.head_channels, 8192),
            "unet.condition-channels": (unet.condition_channels, 8192),
            "unet.condition-tokens": (unet.condition_tokens, 8192),
            "unet.patch-size": (unet.patch_size, 256),
            "unet.anchor-channels": (unet.anchor_channels, 8192),
            "unet.anchor-radius": (unet.anchor_radius, 100),
            **{f"unet.attn-resolutions[{i}]": (side, 8192) for i, side in enumerate(unet.attn_resolutions)},
            **{f"unet.channel-mult[{i}]": (mult, 128) for i, mult in enumerate(unet.channel_mult)},
            "diffusion.num-timesteps": (diffusion.num_timesteps, 1_000_000),
            "diffusion.huber-delta": (diffusion.huber_delta, MAX_WEIGHT),
            "diffusion.max-snr": (diffusion.max_snr, MAX_WEIGHT),
            "gan.channels": (gan.channels, 8192),
            "gan.num-levels": (gan.num_levels, 12),
            "gan.num-res-blocks": (gan.num_res_blocks, 256),
            "gan.num-discriminator-levels": (gan.num_discriminator_levels, 12),
            "encoder.scale": (config.encoder.scale, 1000),
        }
    )
    _check_unet(unet)
    _check_domains(config)
    check_landmarks(config.data.landmarks)
    if config.method == "diffusion" and (over := config.image_size % stride(unet)):
        raise InputError(
            f"image_size is {config.image_size}; with {len(unet.channel_mult)} levels and patch size "
            f"{unet.patch_size} it must be a multiple of {stride(unet)}: prepare the data with --image-size "
            f"{config.image_size - over or stride(unet)}, or give fewer levels (--unet.channel-mult)"
        )
    shares = {
        "diffusion.p-uncond": diffusion.p_uncond,
        "diffusion.p-uncond-domain": diffusion.p_uncond_domain,
        "unet.dropout": unet.dropout,
        "encoder.margin": config.encoder.margin,
        "encoder.brightness": config.encoder.brightness,
    }
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}; it must lie in [0, 1)")
    for name, value in {
        "gan.l1-weight": gan.l1_weight,
        "gan.cycle-weight": gan.cycle_weight,
        "gan.identity-weight": gan.identity_weight,
    }.items():
        if not 0 <= value <= MAX_WEIGHT:
            raise InputError(f"{name} is {value}; it must lie between 0 and {MAX_WEIGHT:,}")
    if config.method == "diffusion":
        _check_last_step(diffusion)
        if unet.source_mask and diffusion.prediction != "x_0":
            raise InputError(
                f"unet.source-mask with diffusion.prediction {diffusion.prediction}: noise has no parts that stay as "
                "they are in the source; predict x_0"
            )
    check_sampling(config.sampling, diffusion.num_timesteps)


def _check_domains(config: ModelConfig) -> None:
    if not 1 <= len(config.domains) <= MAX_DOMAINS:
        raise InputError(f"domains are {len(config.domains)} names; give 1 to {MAX_DOMAINS}")
    if len(set(config.domains)) != len(config.domains):
        raise InputError(f"domains are {list(config.domains)}; give distinct names")
    for name in config.domains:
        if not 0 < len(name) <= 255 or re.search(r"[\x00-\x1f\x7f-\x9f]", name):
            raise InputError(
                f"domains: {_shown(name)} is no name; give 1 to 255 characters, none of them a control one"
            )
    for name in config.target_domains:
        domain_index(config, name)
    if config.method == "cyclegan" and len(config.domains) != 2:
        raise InputError(f"method is cyclegan, which knows two domains; there are {len(config.domains)}")
    blocks = len(config.domains) * (config.gan.num_levels if config.method == "pix2pix" else config.gan.num_res_blocks)
    if config.method in GANS and blocks > MAX_BLOCKS:
        raise InputError(f"{len(config.domains)} domains, each with a generator of its own, are too many; give fewer")


def check_landmarks(landmarks: Sequence[float]) -> None:
    """Refuse what cannot be places in images: nothing is aligned to them.

    Raises:
        InputError: half a point, far outside of the image, or two points in one place.
    """
    points = list(zip(landmarks[::2], landmarks[1::2], strict=False))
    apart = len(set(points)) == len(points) and len(landmarks) % 2 == 0
    if not apart or not all(-1 <= place <= 2 for place in landmarks):
        raise InputError(f"data.landmarks is {_shown(list(landmarks))}; give x0 y0 x1 y1 ..., shares of the side")


def _check_last_step(diffusion: DiffusionConfig) -> None:
    if diffusion.zero_terminal_snr and diffusion.prediction == "eps":
        raise InputError(
            "diffusion.zero-terminal-snr with diffusion.prediction eps: at the last step the noise is all there is to "
            "see, so predicting it teaches nothing; predict v or x_0"
        )
    if diffusion.zero_terminal_snr and diffusion.loss_weighting == "min_snr":
        raise InputError(
            "diffusion.loss-weighting min_snr with diffusion.zero-terminal-snr: the last step, where sampling starts, "
            "would have the weight 0; take snr"
        )


def check_positive(values: Mapping[str, tuple[int | float, int | float]]) -> None:
    """Refuse numbers by name that are not positive and finite, or above the most that is taken. The most is far above
    what any network of use has: a checkpoint's `config.json` may come from anyone, and is built before it is known to
    fit the weights.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    for name, (value, most) in values.items():
        if not value > 0 or value == math.inf:
            raise InputError(f"{name} is {_shown(value)}; it must be positive and finite")
        if value > most:
            raise InputError(f"{name} is {_shown(value)}; at most {most:,} can be used")


def _check_unet(unet: UNetConfig) -> None:
    if not unet.channel_mult:
        raise InputError("unet.channel-mult is empty; give one multiple for each level, such as 1 2 2 4")
    if unet.model_channels % unet.head_channels:
        raise InputError(
            f"unet.model-channels is {unet.model_channels}; it must be a multiple of "
            f"unet.head-channels = {unet.head_channels}"
        )
    if not unet.injection or len(set(unet.injection)) != len(unet.injection):
        raise InputError(
            f"unet.injection is {list(unet.injection)}; give one or more different of "
            f"{', '.join(typing.get_args(Injection))}"
        )
    if unet.condition_channels % 8:
        raise InputError(f"unet.condition-channels is {unet.condition_channels}; it must be a multiple of 8")
    if "anchor" in unet.injection and not 0 < unet.anchor_channels < unet.model_channels:
        raise InputError(
            f"unet.anchor-channels is {unet.anchor_channels}; it must be positive and less than "
            f"unet.model-channels = {unet.model_channels}"
        )
    if len(unet.anchor_landmarks) % 2 or not all(0 <= place <= 1 for place in unet.anchor_landmarks):
        raise InputError(
            f"unet.anchor-landmarks is {list(unet.anchor_landmarks)}; give x0 y0 x1 y1 ..., each in [0, 1]"
        )
    if unet.anchor_landmarks and "anchor" not in unet.injection:
        raise InputError("unet.anchor-landmarks has no effect without anchor in unet.injection")


def check_sampling(sampling: SamplingConfig, num_timesteps: int) -> None:
    """Refuse sampling options that cannot work or would have no effect, by name.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    if not 1 <= sampling.num_steps <= num_timesteps:
        raise InputError(
            f"sampling.num-steps is {sampling.num_steps}; it must be positive and must not exceed "
            f"diffusion.num-timesteps = {num_timesteps}"
        )
    scales = {
        "guidance-scale": sampling.guidance_scale,
        "domain-guidance-scale": sampling.domain_guidance_scale or 0.0,
        "eta": sampling.eta,
    }
    for name, value in scales.items():
        if not 0 <= value <= MAX_SCALE:
            raise InputError(f"sampling.{name} is {value}; it must lie between 0 and {MAX_SCALE}")
    low, high = sampling.guidance_interval
    if not 0 <= low < high <= 1:
        raise InputError(f"sampling.guidance-interval is {low} {high}; it must be two shares, 0 <= low < high <= 1")
    if not 0 <= sampling.guidance_rescale <= 1:
        raise InputError(f"sampling.guidance-rescale is {sampling.guidance_rescale}; it must lie in [0, 1]")
    if not 0 < sampling.strength <= 1:
        raise InputError(f"sampling.strength is {sampling.strength}; it must lie in (0, 1]")
    if sampling.eta and sampling.sampler != "ddim":
        raise InputError(f"sampling.eta has no effect on the sampler {sampling.sampler}; it is ddim's")
    if sampling.strength != 1 and sampling.start not in PARTIAL:
        raise InputError(
            f"sampling.strength has no effect with sampling.start {sampling.start}; it is of {', '.join(PARTIAL)}"
        )
    if sampling.start in FROM_SIDE and (sampling.sampler != "ddim" or sampling.eta):
        raise InputError(f"sampling.start {sampling.start} has steps of its own; it needs sampler ddim and eta 0")


def override_sampling(config: ModelConfig, overrides: Mapping[str, Any]) -> SamplingConfig:
    """A checkpoint's sampling defaults with fields of `SamplingConfig` in their place; None is the default.

    Raises:
        InputError: an option that is unknown, cannot work or has no effect, by name.
    """
    defaults = to_dict(config.sampling)
    given = {name: value for name, value in overrides.items() if value is not None or name not in defaults}
    sampling = from_dict(SamplingConfig, {**defaults, **given}, where="sampling")
    check_sampling(sampling, config.diffusion.num_timesteps)
    if config.method != "diffusion" and sampling != config.sampling:
        changed = [
            f"sampling.{name.replace('_', '-')}"
            for name in given
            if getattr(sampling, name) != getattr(config.sampling, name)
        ]
        raise InputError(f"{', '.join(changed)}: no effect on {config.method}, which does not sample; leave it out")
    return sampling


def check_seed(seed: int, *, flag: str = "--seed") -> None:
    """Refuse seeds that not every generator takes.

    Raises:
        InputError: naming the flag, its value and the range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"{flag} is {seed}; it must lie between 0 and {MAX_SEED}")


def domain_index(config: ModelConfig, name: str) -> int:
    """Index of the side called `name`.

    Raises:
        InputError: listing the sides there are.
    """
    if name not in config.domains:
        raise InputError(
            f"unknown domain {_shown(name)}{did_you_mean(name, config.domains)}: {', '.join(config.domains)}"
        )
    return config.domains.index(name)


def domain_attributes(domains: Sequence[str]) -> dict[str, int]:
    """Which attributes the domain is, and the domain that has each: of two the second is there or not."""
    return {domains[1]: 1} if len(domains) == 2 else {name: i for i, name in enumerate(domains) if len(domains) > 1}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?); known are` or `; known are`, to build an error message with."""
    near = difflib.get_close_matches(name[:100], list(known), n=1)
    return f" (did you mean {near[0]!r}?); known are" if near else "; known are"


T = TypeVar("T")


def optional_fields(cls: type) -> list[tuple[str, Any, str]]:
    """Name, type (or None: not given) and docstring of each field of a dataclass.

    The options that override the fields, of a command or a request, are made of these and not written again.
    """
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {
        ast.unparse(field.target): " ".join(ast.literal_eval(doc.value).split())
        for field, doc in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }
    return [(name, hint | None, docs[name]) for name, hint in typing.get_type_hints(cls).items()]


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
            raise InputError(f"{where}: unknown field {_shown(name)}{did_you_mean(name, hints)}: {', '.join(hints)}")
    return cls(**{name: _coerce(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _shown(value: Any) -> str:
    """A value in a message of one line, however long it is."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where} is {_shown(value)}; it must be one of {', '.join(map(str, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {_shown(value)}; it must be a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise InputError(f"{where} is {_shown(list(value))}; it must have {len(args)} values")
        if len(value) > MAX_VALUES:
            raise InputError(f"{where} has {len(value):,} values; at most {MAX_VALUES:,} can be used")
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    expected = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(hint, (origin or hint,))
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{where} is {_shown(value)}; it must be {(origin or hint).__name__}")
    if hint is float and not abs(value) <= sys.float_info.max:
        raise InputError(f"{where} is {_shown(value)}; it must be a finite number")
    if hint is str and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{where} is {_shown(value)}; it holds half a character")
    return float(value) if hint is float else value
