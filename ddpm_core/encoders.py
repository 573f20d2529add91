"""Small networks that look at images: who is on one (IdentityEncoder), what it shows (AttributeClassifier).

    images       b 3 h w   in [-1, 1], of any side: the nets cut out `crop_box` and bring it to `image_size`
    labels       b k       of training: whom an image shows (k = 1), or which attributes are there (1 or 0)
    embeddings   b d       of length 1; the cosine of two says how alike the people are
    logits       b k       of each attribute being there, whatever the others are
    t            b         of a noise-aware classifier, which looks at x_t

Nothing in them looks across the batch (group norm), so no image's result depends on its neighbours.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from ddpm_core import config as configs
from ddpm_core.checkpoint import (
    ENCODER_FORMAT,
    ema_file,
    load_weights,
    read_meta,
    resolve,
    serialised,
)
from ddpm_core.config import DataCard, DiffusionConfig, EncoderNet, ModelConfig
from ddpm_core.errors import InputError
from ddpm_core.identity import crop
from ddpm_core.unet import IMAGE_CHANNELS, group_norm, timestep_embedding

FORMAT_VERSION = 1
"""What an encoder's `config.json` says it is; the version is raised when an older reader would misread a newer file."""

Kind = Literal["identity", "attributes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(EncoderNet):
    """All of an encoder's `config.json`."""

    kind: Kind
    """identity: images to embeddings. attributes: images to one logit an attribute."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The chain whose x_t a noise-aware classifier was trained on: its length and schedule."""
    data: DataCard = DataCard()
    """The data it was trained on."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The training options, for the record."""


def encoder_config(config: ModelConfig) -> EncoderConfig:
    """Of the encoder that a training run of `config` makes."""
    assert config.method in ("identity", "attributes"), config.method
    return EncoderConfig(
        kind=config.method,
        diffusion=config.diffusion if config.encoder.noise_aware else DiffusionConfig(),
        data=config.data,
        training=config.training,
        **{field.name: getattr(config.encoder, field.name) for field in dataclasses.fields(EncoderNet)},
    )


def check(config: EncoderConfig) -> None:
    """Refuse what cannot work or would have no effect, by name.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    if not config.widths:
        raise InputError("encoder.widths is empty; give each stage's channels, such as 24 48 96 192")
    configs.check_positive(
        {
            "encoder.image-size": (config.image_size, 8192),
            "encoder.embedding-channels": (config.embedding_channels, 65_536),
            "stages of encoder.widths": (len(config.widths), 12),
            **{f"encoder.widths[{stage}]": (width, 65_536) for stage, width in enumerate(config.widths)},
            "diffusion.num_timesteps": (config.diffusion.num_timesteps, 1_000_000),
        }
    )
    if len(config.crop_box) != 4 or not _is_box(*config.crop_box):
        raise InputError(
            f"encoder.crop-box is {list(config.crop_box)}; give x0 y0 x1 y1 in [0, 1] with x0 < x1 and y0 < y1"
        )
    if config.kind == "identity" and (config.attributes or config.noise_aware):
        raise InputError("attributes and noise_aware have no effect on an identity encoder; they are a classifier's")
    if config.kind == "attributes" and not config.attributes:
        raise InputError("attributes is empty; give the name of each attribute that the classifier learns")
    if len(set(config.attributes)) != len(config.attributes):
        raise InputError(f"attributes is {list(config.attributes)}; give distinct names")


def _is_box(x0: float, y0: float, x1: float, y1: float) -> bool:
    return 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


# -- networks ---------------------------------------------------------------------------------------------------


class IdentityEncoder(nn.Module):
    """Images to unit vectors that are near for the same person and far for different people."""

    fingerprint = ""
    """Hash of the file of weights it was loaded from."""

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
    """Images to one logit an attribute; the sigmoid is the probability that it is there."""

    fingerprint = ""
    """Hash of the file of weights it was loaded from."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        _check_kind(config, "attributes")
        self.config = config
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.widths[-1], len(config.attributes))

    def forward(self, images: Float[Tensor, "b 3 h w"], t: Int64[Tensor, " b"] | None = None) -> Float[Tensor, "b k"]:
        """`t` is a noise-aware classifier's, None for clean images.

        Raises:
            InputError: `t` for a classifier that was trained on clean images.
        """
        if t is not None and not self.config.noise_aware:
            raise InputError("this classifier knows clean images only; train one with noise_aware for noised ones")
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


class IdentityTask(nn.Module):
    """What training minimises to get an encoder: two images of a person must be nearer than images of two people.

    A step compares all images of its batch, each row's image and its partner, another image of the same person. So
    nothing grows with the number of people: a vector for each of thousands would hardly move in the few steps in which
    its person is seen, and the network collapsed (docs/log.md).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.network = IdentityEncoder(encoder_config(config))
        self.scale, self.margin = config.encoder.scale, config.encoder.margin
        self.num_measured = 2 * config.encoder.embedding_channels + 1

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        partners: Float[Tensor, "b 3 h w"],
        t: Int64[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b 2 d"]:
        """The embeddings of both images of each row."""
        return torch.stack(self.network(torch.cat([images, partners])).float().chunk(2), dim=1)

    def losses(self, embeddings: Float[Tensor, "b 2 d"], labels: Int64[Tensor, "b 1"]) -> Float[Tensor, " b"]:
        """The loss of each row of a whole batch; `labels` say whom it shows."""
        people = labels.repeat_interleave(2)
        of_each = contrastive_loss(embeddings.flatten(0, 1), people, scale=self.scale, margin=self.margin)
        return of_each.unflatten(0, (-1, 2)).mean(1)

    def measured(
        self,
        network: nn.Module,
        images: Float[Tensor, "b 3 h w"],
        partners: Float[Tensor, "b 3 h w"],
        labels: Int64[Tensor, "b 1"],
        t: Int64[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b k"]:
        """What `values` needs of each image; `partners` show the same people, `network` is an average of ours."""
        both = network(torch.cat([images, partners])).float().chunk(2)
        return torch.cat([*both, labels.float()], dim=1)

    def values(self, measured: Float[Tensor, "n k"]) -> dict[str, Float[Tensor, " n"]]:
        """Of each image: its loss, and whether its partner is nearer than every other person's (rank 1)."""
        queries, partners = measured[:, :-1].chunk(2, dim=1)
        loss, first = retrieval(queries, partners, measured[:, -1], scale=self.scale)
        return {"loss": loss, "rank_1": first}


class AttributeTask(nn.Module):
    """What training minimises to get a classifier: cross-entropy, each attribute's two sides weighing the same."""

    rates: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.network = AttributeClassifier(encoder_config(config))
        self.register_buffer("rates", torch.tensor(config.data.attribute_rates), persistent=False)
        with torch.no_grad():  # where balanced_loss sees no preference
            self.network.head.bias.copy_(_prior(self.rates))
        self.num_measured = 1 + len(config.encoder.attributes)

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        partners: Float[Tensor, "b 3 h w"],
        t: Int64[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b k"]:
        """The logits of each row's image; its partner is not looked at."""
        return self.network(images, t).float()

    def losses(self, logits: Float[Tensor, "b k"], labels: Int64[Tensor, "b k"]) -> Float[Tensor, " b"]:
        """The loss of each row; `labels` are 1 where an attribute is there, else 0."""
        return balanced_loss(logits, labels, self.rates)

    def measured(
        self,
        network: nn.Module,
        images: Float[Tensor, "b 3 h w"],
        partners: Float[Tensor, "b 3 h w"],
        labels: Int64[Tensor, "b k"],
        t: Int64[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b 1+k"]:
        """Cross-entropy (lowest where the sigmoid is the probability), and of each attribute whether it is right."""
        logits = network(images, t).float()
        loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1, keepdim=True)
        return torch.cat([loss, ((logits > 0) == (labels > 0)).float()], dim=1)

    def values(self, measured: Float[Tensor, "n k"]) -> dict[str, Float[Tensor, " n"]]:
        """Of each image: its loss, the share of its attributes that are right, and of each whether it is."""
        names = self.network.config.attributes
        right = measured[:, 1:]
        of_each = {f"accuracy_{name}": right[:, i] for i, name in enumerate(names) if len(names) > 1}
        return {"loss": measured[:, 0], "accuracy": right.mean(1), **of_each}


Task = IdentityTask | AttributeTask


def task(config: ModelConfig) -> Task:
    """What trains the encoder that `config` describes."""
    return IdentityTask(config) if config.method == "identity" else AttributeTask(config)


def contrastive_loss(
    embeddings: Float[Tensor, "n d"], people: Int64[Tensor, " n"], *, scale: float, margin: float
) -> Float[Tensor, " n"]:
    """Cross-entropy over scale * cosine of finding an image's own person among all others of the batch, the mean over
    the images that show them (Khosla et al. 2020, eq. 2; with two images a person Chen et al. 2020, eq. 1).

    An image of the same person must win by `margin` (CosFace, Wang et al. 2018). `embeddings` have length 1; of each
    person there are two or more.
    """
    same = people[:, None] == people[None]
    logits = scale * (embeddings @ embeddings.T - margin * same.to(embeddings))
    itself = torch.eye(len(people), dtype=torch.bool, device=people.device)
    surprise = logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True) - logits
    others = same & ~itself
    return torch.where(others, surprise, 0.0).sum(1) / others.sum(1)


def retrieval(
    queries: Float[Tensor, "n d"], partners: Float[Tensor, "n d"], people: Shaped[Tensor, " n"], *, scale: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """How well each query finds its partner among its partner and the partners of all other people.

    Returns the cross-entropy over scale * cosine, and 1 where the partner is the nearest, 0 elsewhere.
    """
    losses, firsts = [], []
    for rows in torch.arange(len(queries), device=queries.device).split(1024):  # or memory would grow by n squared
        own = scale * (queries[rows] * partners[rows]).sum(1)
        strange = people[rows, None] != people[None]
        others = torch.where(strange, scale * queries[rows] @ partners.T, -torch.inf)
        losses.append(torch.cat([own[:, None], others], dim=1).logsumexp(1) - own)
        firsts.append((own > others.amax(1)).float())
    return torch.cat(losses), torch.cat(firsts)


def balanced_loss(
    logits: Float[Tensor, "b k"], labels: Int64[Tensor, "b k"], rates: Float[Tensor, " k"]
) -> Float[Tensor, " b"]:
    """Cross-entropy in which the images with and those without an attribute weigh the same, however rare it is.

    That multiplies the odds of the best answer by (1 - rate) / rate, which is taken back here: the best logits are
    those of the probability in images like the training ones.
    """
    rates = rates.clamp(*RAREST)
    weights = torch.where(labels > 0, 0.5 / rates, 0.5 / (1 - rates))
    return F.binary_cross_entropy_with_logits(
        logits - _prior(rates), labels.float(), weight=weights, reduction="none"
    ).mean(1)


RAREST = (0.02, 0.98)
"""Attributes that are rarer, or more common, count as if they were not: single images would drown the rest."""


def _prior(rates: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    return torch.logit(rates.clamp(*RAREST))


# -- checkpoints ------------------------------------------------------------------------------------------------


def encoder_files(
    state: dict[str, Tensor], config: EncoderConfig, *, others: Mapping[float, dict[str, Tensor]] | None = None
) -> dict[str, bytes]:
    """An encoder as file name → bytes; `config.json` comes last: a folder that has it is complete.

    `others`: weights of the EMA's other lengths by their `sigma_rel`.
    """
    meta = {"format": ENCODER_FORMAT, "format_version": FORMAT_VERSION, **configs.to_dict(config)}
    return {
        "model.safetensors": serialised(state),
        **{ema_file(sigma_rel): serialised(other) for sigma_rel, other in (others or {}).items()},
        "card.md": card(config).encode(),
        "config.json": json.dumps(meta, indent=2).encode(),
    }


def card(config: EncoderConfig) -> str:
    """The encoder's card: what it is, on what it was trained, what it may be used for."""
    data, side = config.data, config.image_size
    if config.kind == "identity":
        what = f"images of people to vectors of length {config.embedding_channels}: the nearer, the more alike"
        learned = f"from {data.num_people:,} people"
    else:
        what = f"images to whether they show: {', '.join(config.attributes)}"
        learned = "at any noise of its chain, to guide sampling" if config.noise_aware else "from clean images"
    return f"""# {data.name}: {config.kind}

An encoder that looks at {side} x {side} pixels: {what}. It learned {learned}.

| | |
|---|---|
| data | {data.name} (hash `{data.content_hash}`) |
| licence of the data, which binds this encoder | {data.licence} |

Load it with `ddpm_core.encoders.load_encoder(folder)`.
"""


def load_identity_encoder(path: str) -> IdentityEncoder:
    """`load_encoder`, where an identity encoder is needed."""
    encoder = load_encoder(path)
    if not isinstance(encoder, IdentityEncoder):
        raise InputError(f"{path} is an attribute classifier; give an identity encoder")
    return encoder


def load_attribute_classifier(path: str) -> AttributeClassifier:
    """`load_encoder`, where an attribute classifier is needed."""
    encoder = load_encoder(path)
    if not isinstance(encoder, AttributeClassifier):
        raise InputError(f"{path} is an identity encoder; give an attribute classifier")
    return encoder


def load_encoder(path: str) -> Encoder:
    """An encoder's folder, or a run (its best checkpoint), as a network in eval mode on the CPU, its weights fixed.

    Raises:
        InputError: nothing there, damaged files, another format or version, weights that do not fit the configuration.
    """
    path, _ = resolve(path)
    nothing = "no encoder here (no best.json, no config.json); give a run's folder or one of its checkpoints"
    meta = read_meta(path, ENCODER_FORMAT, FORMAT_VERSION, nothing=nothing)
    if "kind" not in meta:
        raise InputError(f"{path}/config.json names no kind; it must be identity or attributes")
    config = configs.from_dict(EncoderConfig, meta, where=f"{path}/config.json")
    check(config)
    network: type[Encoder] = IdentityEncoder if config.kind == "identity" else AttributeClassifier
    encoder, fingerprint = load_weights(lambda: network(config), path, "model.safetensors")
    encoder.fingerprint = fingerprint
    return encoder.eval().requires_grad_(False)
