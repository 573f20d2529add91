"""Small networks that look at pictures: who is on one (IdentityEncoder), what it shows (AttributeClassifier).

    images       b 3 h w   in [-1, 1], of any side: the nets cut out `crop_box` and bring it to `image_size`
    embeddings   b d       of length 1; the cosine of two says how alike the people are
    logits       b k       of each attribute being there, whatever the others are
    t            b         of a noise-aware classifier, which looks at x_t

Nothing in them looks across the batch (group norm), so no picture's result depends on its neighbours.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ddpm_core import config as configs
from ddpm_core.checkpoint import ENCODER_FORMAT, Read, load_weights, read_local, read_meta, serialised
from ddpm_core.config import DataCard, DiffusionConfig
from ddpm_core.diffusion import q_sample, seeded
from ddpm_core.errors import InputError
from ddpm_core.identity import WHOLE, crop
from ddpm_core.images import to_tensor
from ddpm_core.schedule import alphas_cumprod
from ddpm_core.unet import IMAGE_CHANNELS, group_norm, timestep_embedding

FORMAT_VERSION = 1
"""What an encoder's `config.json` says it is; the version is raised when an older reader would misread a newer file."""

Kind = Literal["identity", "attributes"]
Progress = Callable[[int, float], None]
"""Called after each training step with the number of steps done and the batch's loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """All of an encoder's `config.json`."""

    kind: Kind
    """identity: pictures to embeddings. attributes: pictures to one logit an attribute."""
    image_size: int = 64
    """Side of the square that the network looks at, in pixels."""
    crop_box: tuple[float, ...] = WHOLE
    """What of a picture the network looks at: x0 y0 x1 y1 in shares of its side. Faces are told apart by the face."""
    widths: tuple[int, ...] = (24, 48, 96, 192)
    """Channels of each stage; each stage halves the side."""
    embedding_channels: int = 128
    """Length of an identity embedding."""
    attributes: tuple[str, ...] = ()
    """Names of the classifier's attributes, in the order of its logits."""
    noise_aware: bool = False
    """Of the classifier: it looks at x_t and is told t, so that it can guide sampling (Dhariwal & Nichol 2021)."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The chain whose x_t a noise-aware classifier was trained on: its length and schedule."""
    data: DataCard = DataCard()
    """The data it was trained on."""


def check(config: EncoderConfig) -> None:
    """Refuse what cannot work or would have no effect, by name.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    for name, value in {"image_size": config.image_size, "embedding_channels": config.embedding_channels}.items():
        if value < 1:
            raise InputError(f"{name} is {value}; it must be positive")
    if not config.widths or min(config.widths) < 1:
        raise InputError(f"widths is {list(config.widths)}; give each stage's channels, such as 24 48 96 192")
    if len(config.crop_box) != 4 or not _is_box(*config.crop_box):
        raise InputError(f"crop_box is {list(config.crop_box)}; give x0 y0 x1 y1 in [0, 1] with x0 < x1 and y0 < y1")
    if config.kind == "identity" and (config.attributes or config.noise_aware):
        raise InputError("attributes and noise_aware have no effect on an identity encoder; they are a classifier's")
    if config.kind == "attributes" and not config.attributes:
        raise InputError("attributes is empty; give the name of each attribute that the classifier learns")
    if len(set(config.attributes)) != len(config.attributes):
        raise InputError(f"attributes is {list(config.attributes)}; give distinct names")
    if config.diffusion.num_timesteps < 1:
        raise InputError(f"diffusion.num_timesteps is {config.diffusion.num_timesteps}; it must be positive")


def _is_box(x0: float, y0: float, x1: float, y1: float) -> bool:
    return 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


# -- networks ---------------------------------------------------------------------------------------------------


class IdentityEncoder(nn.Module):
    """Pictures to unit vectors that are near for the same person and far for different people."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        _check_kind(config, "identity")
        self.config = config
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.widths[-1], config.embedding_channels)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return F.normalize(self.head(self.trunk(images)), dim=1)

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The feature map of each stage, for `perceptual_loss`."""
        return self.trunk.maps(images)


class AttributeClassifier(nn.Module):
    """Pictures to one logit an attribute; the sigmoid is the probability that it is there."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        _check_kind(config, "attributes")
        self.config = config
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.widths[-1], len(config.attributes))

    def forward(self, images: Float[Tensor, "b 3 h w"], t: Int64[Tensor, " b"] | None = None) -> Float[Tensor, "b k"]:
        """`t` is a noise-aware classifier's, None for clean pictures.

        Raises:
            InputError: `t` for a classifier that was trained on clean pictures.
        """
        if t is not None and not self.config.noise_aware:
            raise InputError("this classifier knows clean pictures only; train one with noise_aware for noised ones")
        return self.head(self.trunk(images, t))

    def log_prob(
        self, attribute: str, present: bool, images: Float[Tensor, "b 3 h w"], t: Int64[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """log p(attribute is there, or is not | x_t): with the first two bound, what classifier guidance takes.

        Raises:
            InputError: this classifier does not know the attribute.
        """
        known = self.config.attributes
        if attribute not in known:
            raise InputError(
                f"unknown attribute {attribute!r}{configs.did_you_mean(attribute, known)}: {', '.join(known)}"
            )
        logit = self(images, t)[:, known.index(attribute)]
        return F.logsigmoid(logit if present else -logit)


Encoder = IdentityEncoder | AttributeClassifier


class Trunk(nn.Module):
    """A small residual network: a block and half the side at each stage, then each channel's weighted mean.

    The weights over positions are learned for each channel (global depthwise convolution, Chen et al. 2018): in
    aligned portraits it matters where something is, which a plain mean forgets.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        embedding = 2 * widths[-1] if config.noise_aware else 0
        self.time_embedding = nn.Sequential(nn.Linear(widths[-1], embedding), nn.SiLU()) if embedding else None
        self.stem = nn.Conv2d(IMAGE_CHANNELS, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            Block(inp, out, embedding) for inp, out in zip((widths[0], *widths), widths, strict=False)
        )
        self.norm = group_norm(widths[-1])
        side = math.ceil(config.image_size / 2 ** len(widths))
        self.pool = nn.Conv2d(widths[-1], widths[-1], side, groups=widths[-1])

    def forward(self, images: Float[Tensor, "b 3 h w"], t: Int64[Tensor, " b"] | None = None) -> Float[Tensor, "b c"]:
        return self.pool(F.silu(self.norm(self.maps(images, t)[-1]))).flatten(1)

    def maps(
        self, images: Float[Tensor, "b 3 h w"], t: Int64[Tensor, " b"] | None = None
    ) -> list[Float[Tensor, "b _ _ _"]]:
        embedding = None
        if self.time_embedding is not None:
            t = torch.zeros(len(images), dtype=torch.int64, device=images.device) if t is None else t
            embedding = self.time_embedding(timestep_embedding(t, self.config.widths[-1]).to(images))
        h = self.stem(crop(images, self.config.crop_box, self.config.image_size))
        maps = []
        for block in self.blocks:
            h = block(h, embedding)
            maps.append(h)
        return maps


class Block(nn.Module):
    """A pre-activation residual block (He et al. 2016) at half the side; scaled and shifted by t where it is told."""

    def __init__(self, in_channels: int, out_channels: int, embedding_channels: int) -> None:
        super().__init__()
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.modulation = nn.Linear(embedding_channels, 2 * out_channels) if embedding_channels else None
        self.norm_out = group_norm(out_channels)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"] | None) -> Float[Tensor, "b k _ _"]:
        h = self.norm_out(self.conv_in(F.silu(self.norm_in(x))))
        if self.modulation is not None:
            scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.skip(F.avg_pool2d(x, 2, ceil_mode=True)) + self.conv_out(F.silu(h))


def _check_kind(config: EncoderConfig, kind: Kind) -> None:
    check(config)
    if config.kind != kind:
        raise InputError(f"kind is {config.kind}; this needs {kind}")


# -- training ---------------------------------------------------------------------------------------------------


def margin_softmax_loss(
    embeddings: Float[Tensor, "b d"],
    class_weights: Float[Tensor, "n d"],
    labels: Int64[Tensor, " b"],
    *,
    scale: float,
    margin: float,
) -> Float[Tensor, ""]:
    """Cross-entropy over scale * cosine, where the right class must win by `margin` (CosFace, Wang et al. 2018, eq. 4).

    An additive margin on the cosine, not on the angle (ArcFace, Deng et al. 2019): as good on small nets, and its
    gradient is bounded, where that of the arc cosine is infinite at the ends.
    """
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(class_weights, dim=1).T
    return F.cross_entropy(scale * (cosines - margin * F.one_hot(labels, len(class_weights))), labels)


def train_identity_encoder(
    config: EncoderConfig,
    images: np.ndarray,
    identities: np.ndarray,
    *,
    num_steps: int = 3000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    scale: float = 16.0,
    margin: float = 0.2,
) -> IdentityEncoder:
    """An encoder that tells the people in `images` apart; meant for people it has not seen.

    Args:
        images: uint8 b h w 3.
        identities: int b, any numbers; equal for the same person.
        scale, margin: of `margin_softmax_loss`.

    Raises:
        InputError: fewer than two people, arrays that do not fit, or training that diverges.
    """
    _check_pictures(images, identities, "identities", (len(images),))
    people, labels = np.unique(identities, return_inverse=True)
    if len(people) < 2:
        raise InputError(f"identities name {len(people)} person; at least two are needed to tell people apart")
    net = _seeded_net(IdentityEncoder, config, seed).to(device)
    class_weights = torch.randn(len(people), config.embedding_channels, generator=seeded(seed, "class weights"))
    class_weights = nn.Parameter(class_weights.to(device))

    def loss(batch: Tensor, generator: torch.Generator) -> Tensor:
        pictures = augmented(to_tensor(images[batch.numpy()], device), generator)
        truth = torch.from_numpy(labels)[batch].to(device)
        return margin_softmax_loss(net(pictures), class_weights, truth, scale=scale, margin=margin)

    _fit([*net.parameters(), class_weights], loss, len(images), num_steps, batch_size, learning_rate, seed, progress)
    return net.eval().requires_grad_(False)


def train_attribute_classifier(
    config: EncoderConfig,
    images: np.ndarray,
    attributes: np.ndarray,
    *,
    num_steps: int = 3000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> AttributeClassifier:
    """A classifier of `config.attributes`; a noise-aware one learns from x_t at uniform t.

    In training the pictures with and those without an attribute weigh the same, however rare it is. That multiplies
    the odds of the best answer by (1 - rate) / rate, which the last bias takes back: the sigmoid is the probability
    in pictures like these.

    Args:
        images: uint8 b h w 3; for a noise-aware classifier of the side of the diffusion model's pictures, because
            they are noised before they are cropped and resized, as when guiding.
        attributes: b k, -1 or 1, in the order of `config.attributes`.

    Raises:
        InputError: an attribute that is the same everywhere, arrays that do not fit, or training that diverges.
    """
    net = _seeded_net(AttributeClassifier, config, seed).to(device)
    _check_pictures(images, attributes, "attributes", (len(images), len(config.attributes)))
    if not np.isin(attributes, (-1, 1)).all():
        raise InputError("attributes must be -1 (not there) or 1 (there)")
    targets = torch.from_numpy(attributes > 0).float()
    rates = targets.mean(0)
    for name, rate in zip(config.attributes, rates.tolist(), strict=True):
        if rate in (0, 1):
            raise InputError(
                f"attribute {name} is {'everywhere' if rate else 'nowhere'} in these pictures; leave it out"
            )
    rates = rates.clamp(0.02, 0.98)  # rarer: single pictures would drown the rest
    weights = torch.where(targets > 0, 0.5 / rates, 0.5 / (1 - rates))
    abar = alphas_cumprod(config.diffusion)

    def loss(batch: Tensor, generator: torch.Generator) -> Tensor:
        pictures = augmented(to_tensor(images[batch.numpy()], device), generator)
        t = None
        if config.noise_aware:
            t = torch.randint(len(abar), (len(batch),), generator=generator).to(device)
            noise = torch.randn(pictures.shape, generator=generator).to(device)
            pictures = q_sample(pictures, t, noise, abar)
        return F.binary_cross_entropy_with_logits(
            net(pictures, t), targets[batch].to(device), weight=weights[batch].to(device)
        )

    _fit([*net.parameters()], loss, len(images), num_steps, batch_size, learning_rate, seed, progress)
    with torch.no_grad():
        net.head.bias.add_(torch.logit(rates).to(device))
    return net.eval().requires_grad_(False)


def augmented(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Each picture mirrored or not, moved by up to 1/16 of its side with its edge repeated, and brighter or darker."""
    b, _, h, w = images.shape

    def places(size: int) -> Int64[Tensor, "b size"]:
        shift = (torch.rand(b, 1, generator=generator) * 2 - 1) * size / 16
        return (torch.arange(size) + shift.round().long()).clamp(0, size - 1)

    rows, columns = places(h), places(w)
    columns = torch.where(torch.rand(b, 1, generator=generator) < 0.5, columns.flip(1), columns)
    brightness = 0.7 + 0.6 * torch.rand(b, 1, 1, 1, generator=generator)
    picture = torch.arange(b)[:, None, None]
    index = [i.to(images.device) for i in (picture, rows[:, :, None], columns[:, None, :])]
    moved = images.permute(0, 2, 3, 1)[index[0], index[1], index[2]].permute(0, 3, 1, 2).contiguous()
    return ((moved + 1) * brightness.to(images) - 1).clamp(-1, 1)


Net = TypeVar("Net", IdentityEncoder, AttributeClassifier)


def _seeded_net(cls: type[Net], config: EncoderConfig, seed: int) -> Net:
    """A new network whose weights are a function of `seed`; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeded(seed, "weights").initial_seed())
        return cls(config)


def _fit(
    parameters: list[nn.Parameter],
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    num_images: int,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: Progress | None,
) -> None:
    """AdamW with a cosine learning rate; every draw of a step is a function of (seed, step)."""
    for name, value in {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate}.items():
        if not 0 < value < math.inf:
            raise InputError(f"{name} is {value}; it must be positive")
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    loss = torch.zeros(())
    for step in range(num_steps):
        generator = seeded(seed, step)
        loss = loss_of(torch.randint(num_images, (batch_size,), generator=generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, loss.item())
    if not loss.isfinite():
        raise InputError(f"training diverged: the loss is {loss.item()}; give a learning_rate below {learning_rate}")


def _check_pictures(images: np.ndarray, labels: np.ndarray, name: str, shape: tuple[int, ...]) -> None:
    if images.ndim != 4 or images.shape[-1] != IMAGE_CHANNELS or images.dtype != np.uint8 or not len(images):
        raise InputError(f"images are {images.dtype} {list(images.shape)}; they must be uint8 b h w 3, one or more")
    if labels.shape != shape:
        raise InputError(f"{name} have shape {list(labels.shape)}; for these images it must be {list(shape)}")


# -- checkpoints ------------------------------------------------------------------------------------------------


def encoder_files(state: dict[str, Tensor], config: EncoderConfig) -> dict[str, bytes]:
    """An encoder as file name → bytes; `config.json` comes last: a folder that has it is complete."""
    meta = {"format": ENCODER_FORMAT, "format_version": FORMAT_VERSION, **configs.to_dict(config)}
    return {
        "model.safetensors": serialised(state),
        "config.json": json.dumps(meta, indent=2).encode(),
    }


def load_identity_encoder(path: str, *, read: Read = read_local) -> IdentityEncoder:
    """`load_encoder`, where an identity encoder is needed."""
    encoder = load_encoder(path, read=read)
    if not isinstance(encoder, IdentityEncoder):
        raise InputError(f"{path} is an attribute classifier; give an identity encoder")
    return encoder


def load_attribute_classifier(path: str, *, read: Read = read_local) -> AttributeClassifier:
    """`load_encoder`, where an attribute classifier is needed."""
    encoder = load_encoder(path, read=read)
    if not isinstance(encoder, AttributeClassifier):
        raise InputError(f"{path} is an identity encoder; give an attribute classifier")
    return encoder


def load_encoder(path: str, *, read: Read = read_local) -> Encoder:
    """An encoder's folder as a network in eval mode on the CPU, its weights fixed.

    Raises:
        InputError: nothing there, damaged files, another format or version, weights that do not fit the configuration.
    """
    path = path.rstrip("/")
    nothing = "no encoder here (no config.json); give the folder that training wrote"
    meta = read_meta(path, read, ENCODER_FORMAT, FORMAT_VERSION, nothing=nothing)
    if "kind" not in meta:
        raise InputError(f"{path}/config.json names no kind; it must be identity or attributes")
    config = configs.from_dict(EncoderConfig, meta, where=f"{path}/config.json")
    check(config)
    encoder = IdentityEncoder(config) if config.kind == "identity" else AttributeClassifier(config)
    load_weights(encoder, path, "model.safetensors", read)
    return encoder.eval().requires_grad_(False)
