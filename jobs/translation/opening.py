"""The checkpoint that a command puts to use, with the nets that lead its sampling, checked before Ray starts."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from ddpm_core import checkpoint, encoders, storage
from ddpm_core import config as configs
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator, check_sampling
from jobs.translation.options import GuidanceNets, SamplingOverrides

LOADERS: dict[str, Callable[..., Any]] = {
    "classifier": encoders.load_attribute_classifier,
    "identity": encoders.load_identity_encoder,
}
"""What loads the net behind `--NAME-guidance`."""


def open_guidance_nets(guides: GuidanceNets) -> tuple[GuidanceNets, dict[str, Any]]:
    """The guides by their checkpoints' own folders, and what tells results made with them from others ({} without).

    Raises:
        InputError: a scale without its net, or nothing that can be loaded, by the flag.
    """
    given, defaults = vars(guides), vars(GuidanceNets())
    options: dict[str, Any] = {}
    for name, load in LOADERS.items():
        uri, scale = given[f"{name}_guidance"], given[f"{name}_scale"]
        if uri is None:
            if scale != defaults[f"{name}_scale"]:
                raise InputError(f"--{name}-scale has no effect without --{name}-guidance; leave it out, or give both")
            continue
        uri = storage.absolute(uri, flag=f"--{name}-guidance")
        folder, _ = checkpoint.resolve(uri)
        try:
            fingerprint = load(folder).fingerprint
        except InputError as error:
            raise InputError(f"--{name}-guidance: {error}") from None
        given = {**given, f"{name}_guidance": folder}
        options |= {f"{name}_guidance": fingerprint, f"{name}_scale": scale}
    return GuidanceNets(**given), options


def translator(loaded: Checkpoint, guides: GuidanceNets, *, device: str | None = None) -> Translator:
    """`loaded`, led by `guides` as `open_guides` gives them.

    Raises:
        InputError: a guide that cannot lead this network.
    """
    fields = {"classifier": "classifier", "identity": "identity_encoder"}
    nets: dict[str, Any] = {}
    for name, load in LOADERS.items():
        if (uri := getattr(guides, f"{name}_guidance")) is not None:
            nets[fields[name]] = load(uri)
            nets[f"{name}_scale"] = getattr(guides, f"{name}_scale")
    return Translator(loaded, device=device, **nets)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint, checked against what a command wants of it."""

    loaded: Checkpoint
    domains: tuple[str, ...]
    """The sides to produce."""
    sampling: SamplingConfig
    """Its sampling defaults with the command's in their place."""
    guides: GuidanceNets
    """Its guides, by their checkpoints' own folders."""
    options: dict[str, Any]
    """The sampling, the guides and the weights: what, of these, results depend on."""


def open_checkpoint(
    uri: str, domain: str | None, overrides: SamplingOverrides, *, ema: float | None, guides: GuidanceNets
) -> Opened:
    """The checkpoint of a command; `domain` None means every side it was trained to produce.

    Raises:
        InputError: no usable checkpoint, or it cannot do what is wanted, in one line.
    """
    try:
        loaded = checkpoint.load(uri, ema=ema)
    except InputError as error:
        raise InputError(f"--ema: {error}" if "EMA length" in str(error) else str(error)) from None
    guides, led = open_guidance_nets(guides)
    ready = translator(loaded, guides, device="cpu")
    domains = (domain,) if domain else loaded.config.target_domains or loaded.config.domains
    try:
        sampling = ready.options(**vars(overrides))
        for name in domains:
            check_sampling(loaded.config, sampling, name)
    except InputError as error:
        raise InputError(by_flags(str(error))) from None
    options = {"checkpoint": loaded.fingerprint, **configs.to_dict(sampling), **led}
    return Opened(loaded, tuple(domains), sampling, guides, options)


def by_flags(message: str) -> str:
    """A message of `ddpm_core`'s with sampling options called as the commands' flags: --num-steps, not
    sampling.num-steps."""
    named = re.sub(r"\bsampling\.([a-z_-]+)", lambda name: "--" + name[1].replace("_", "-"), message)
    return re.sub(r"^unknown domain", "--domain: unknown domain", named)
