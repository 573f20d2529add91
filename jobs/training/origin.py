"""A run that begins with another one's weights (`--init-from`).

Weights alone come from there, the averaged ones: optimiser, averages, schedule and steps begin anew. What the network
is, and what it was trained on to predict, comes from there too; a domain keeps its label by its name, others get fresh
ones. The network is convolutional and its attention knows places relative to the side, so that images may be of another
size. The run's config.json keeps what was found, and its first checkpoint the weights: a run that goes on needs the
origin no more.
"""

import dataclasses
import typing
from collections.abc import Collection, Iterator

import torch
from torch import nn

from ddpm_core import checkpoint, storage
from ddpm_core.config import DiffusionConfig, ModelConfig, Origin, SamplingConfig, UNetConfig
from ddpm_core.errors import InputError
from jobs.training.options import TrainOptions

FREE = (
    *("unet.dropout", "diffusion.loss", "diffusion.huber_delta", "diffusion.max_snr"),  # and the loss's weighting
    *("diffusion.p_uncond", "sampling."),  # and the domain's
)
"""Of the options that come from the checkpoint those that a command may give otherwise, by how they begin; the rest is
what the weights were made for."""
LABELS = "domain_embedding.weight"

Part = typing.TypeVar("Part", UNetConfig, DiffusionConfig, SamplingConfig)


def adopted(options: TrainOptions, image_size: int, run: str, given: Collection[str]) -> TrainOptions:
    """`options` with the network, the diffusion and the sampling of the checkpoint that they begin with, but for what
    the command gives. `given`: the flags that it names.

    Raises:
        InputError: no network to begin with there, or a flag asks for another network.
    """
    uri = options.init_from
    if uri is None or options.method != "diffusion":
        return options
    there = _recorded(run, uri) or _config_at(uri)

    def merged(group: str, ours: Part, theirs: Part) -> Part:
        changes = {}
        for name in (field.name for field in dataclasses.fields(ours)):
            wanted, found = getattr(ours, name), getattr(theirs, name)
            flag = f"--{group}.{name.replace('_', '-')}"
            if not {flag, f"--{group}.no-{name.replace('_', '-')}"} & {*given} or wanted == found:
                continue
            if not f"{group}.{name}".startswith(FREE):
                raise InputError(f"{flag}: the network of --init-from {uri} has {found}, not {wanted}; leave it out")
            changes[name] = wanted
        return dataclasses.replace(theirs, **changes)

    unet = dataclasses.replace(there.unet, attn_resolutions=_sides(there.unet, there.image_size, image_size))
    return dataclasses.replace(
        options,
        unet=merged("unet", options.unet, unet),
        diffusion=merged("diffusion", options.diffusion, there.diffusion),
        # a network that is shown the source from now on is not sampled like a prior that was not
        sampling=options.sampling
        if there.shown == "nothing" and options.pairing != "none"
        else merged("sampling", options.sampling, there.sampling),
    )


def with_origin(config: ModelConfig, options: TrainOptions, run: str) -> ModelConfig:
    """`config` with where its weights begin, whose licence binds it, too.

    Raises:
        InputError: no weights there, or damaged ones.
    """
    if options.init_from is None:
        return config
    there = _recorded(run, options.init_from)
    origin = there.origin if there else _read(options.init_from)
    assert origin is not None
    licences = (config.data.licence, origin.licence)
    licence = licences[0] if licences[0] == licences[1] else " + ".join(licences)
    return dataclasses.replace(config, origin=origin, data=dataclasses.replace(config.data, licence=licence))


def begin(network: nn.Module, config: ModelConfig) -> None:
    """Fill the network with the weights of `config.origin`.

    Raises:
        InputError: they are gone, or others by now.
    """
    origin = config.origin
    assert origin is not None
    found = checkpoint.load(origin.checkpoint, ema=origin.ema)
    if found.fingerprint != origin.fingerprint:
        raise InputError(
            f"{origin.checkpoint} holds other weights than when this run was first begun with them; begin it anew with "
            "another --output"
        )
    state, weights = network.state_dict(), found.model.state_dict()
    labels = weights.pop(LABELS)
    known = {name: labels[index] for index, name in enumerate(found.config.domains)}
    rows = [known.get(name, fresh) for name, fresh in zip(config.domains, state[LABELS], strict=False)]
    rows.append(labels[-1])  # no domain
    try:
        network.load_state_dict({**state, **weights, LABELS: torch.stack(rows)})
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise InputError(f"--init-from {origin.checkpoint} is another network: {first[0].strip()}") from None


def notes(config: ModelConfig) -> Iterator[str]:
    """What to say of it."""
    if (origin := config.origin) is None:
        return
    fresh = [name for name in config.domains if name not in origin.domains]
    yield (
        f"begins with the weights of {origin.checkpoint} ({origin.data}: {', '.join(origin.domains)})"
        + (f"; new here: {', '.join(fresh)}" if fresh else "")
        + (f"; licence {config.data.licence}" if origin.licence not in ("", config.data.licence) else "")
    )


def _recorded(run: str, uri: str) -> ModelConfig | None:
    """The configuration of the run in this folder, if it began with this checkpoint."""
    if not storage.exists(storage.join(run, "config.json")):
        return None
    there = checkpoint.read_config(run)
    return there if there.training.get("init_from") == uri and there.origin else None


def _config_at(uri: str) -> ModelConfig:
    try:
        config = checkpoint.read_config(checkpoint.resolve(uri)[0])
    except InputError as error:
        raise InputError(f"--init-from {error}") from None
    if config.method != "diffusion":
        raise InputError(
            f"--init-from {uri}: {config.method} is no diffusion network, with which alone a run can begin"
        )
    return config


def _read(uri: str) -> Origin:
    try:
        found = checkpoint.load(uri)
    except InputError as error:
        raise InputError(f"--init-from {error}") from None
    return Origin(
        checkpoint=found.path,
        fingerprint=found.fingerprint,
        ema=found.ema,
        domains=found.config.domains,
        data=found.config.data.name,
        licence=found.config.data.licence,
    )


def _sides(unet: UNetConfig, before: int, now: int) -> tuple[int, ...]:
    """`attn_resolutions` for images of another side, so that the same levels have attention."""
    if before == now:
        return unet.attn_resolutions
    strides = [unet.patch_size * 2**level for level in range(len(unet.channel_mult))]
    return tuple(now // each for each in strides if before // each in unet.attn_resolutions)
