"""What the commands that put a checkpoint to use have in common: their options, and the checks before Ray starts."""

import dataclasses
import hashlib

from ddpm_core import checkpoint
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.config import Sampler, SamplingConfig, Spacing, Start
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator
from jobs import storage


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOverrides:
    """How pictures are drawn; what is not given is the checkpoint's own."""

    sampler: Sampler | None = None
    """ddim: deterministic. ddpm: ancestral. dpm_solver: DPM-Solver++(2M), second order."""
    num_steps: int | None = None
    """Network evaluations for one picture."""
    spacing: Spacing | None = None
    """Which timesteps are visited."""
    eta: float | None = None
    """Of ddim: 0 deterministic, 1 ancestral."""
    guidance_scale: float | None = None
    """1 plain, above 1 guided more strongly."""
    domain_guidance_scale: float | None = None
    """A weight of the domain's own; guidance-scale is then the picture's."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these shares of the chain, 1 being the noisiest: LOW HIGH."""
    guidance_rescale: float | None = None
    """Pull the guided prediction's spread back to the plain one's, 0 not at all, 1 wholly."""
    start: Start | None = None
    """noise; sdedit: the source, noised; ddib: the noise that DDIM finds for the source in its own domain."""
    strength: float | None = None
    """Of sdedit: share of the chain that is noised and drawn again."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint, checked against what a command wants of it."""

    loaded: Checkpoint
    fingerprint: str
    """Hash of its weights, which tells it from another one at the same place."""
    domains: tuple[str, ...]
    """The sides to produce."""
    sampling: SamplingConfig
    """Its sampling defaults with the command's in their place."""


def open_checkpoint(uri: str, domain: str | None, overrides: SamplingOverrides, *, ema: float | None) -> Opened:
    """The checkpoint of a command; `domain` None means every side it was trained to produce.

    Raises:
        InputError: no usable checkpoint, or it cannot do what is wanted, in one line.
    """
    digest = hashlib.blake2b(digest_size=8)

    def read(path: str) -> bytes:
        content = storage.read_bytes(path)
        if path.endswith(".safetensors"):
            digest.update(content)
        return content

    loaded = checkpoint.load(uri, ema=ema, read=read)
    translator = Translator(loaded, device="cpu")
    domains = (domain,) if domain else loaded.config.target_domains or loaded.config.domains
    for name in domains:
        translator.domain_index(name)
    sampling = translator.options(**vars(overrides))
    return Opened(loaded, digest.hexdigest(), tuple(domains), sampling)


def check_least(flags: dict[str, tuple[int | None, int]]) -> None:
    """Refuse numbers below their least by the flag's name; None is no number.

    Raises:
        InputError: naming the flag, its value and the least.
    """
    for flag, (value, least) in flags.items():
        if value is not None and value < least:
            raise InputError(f"{flag} is {value}; it must be at least {least}")
