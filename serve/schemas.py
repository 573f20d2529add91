"""What the endpoint is given: its start-up arguments and the options of one request."""

import dataclasses
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddpm_core import config as configs
from ddpm_core.config import ModelConfig, Sampler, SamplingConfig, Start
from ddpm_core.errors import InputError
from ddpm_core.faces import Align


class Arguments(BaseModel):
    """`serve run serve.app:build_app checkpoint=RUN [name=value ...]`; in YAML the same under `args:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: Annotated[str, Field(min_length=1)]
    """A run (its best checkpoint) or a checkpoint folder: a path that every node sees, or s3://bucket/prefix."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPU of the machine where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network; auto is bf16 where the hardware has it."""
    max_batch_size: Annotated[int, Field(ge=1, le=512)] = 8
    """Images translated in one pass of the network."""
    batch_wait_ms: Annotated[float, Field(ge=0, le=10_000)] = 10.0
    """How long the first image of a batch waits for others."""
    num_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    """Copies of the model, each with its own share of CPUs and GPUs."""
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs reserved and threads used by each replica. Unset: one reserved, a thread for each core used."""
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs reserved by each replica, 0.5 for two on one. Unset: 1 with device=cuda, else 0."""
    max_queued_requests: Annotated[int, Field(ge=1)] | None = None
    """Images that may wait for a replica; more are answered 429. Unset: eight batches for each replica."""
    max_body_mb: Annotated[float, Field(gt=0, le=1000)] = 20.0
    """Larger request bodies are answered 413, in megabytes."""

    @property
    def max_ongoing_requests(self) -> int:
        """Requests one replica holds: a batch in work and the next one filling."""
        return 2 * self.max_batch_size

    @property
    def queue_length(self) -> int:
        """Requests that may wait; wide enough that a burst is not refused while replicas are idle."""
        return self.max_queued_requests or 8 * self.max_batch_size * self.num_replicas

    @property
    def replica_gpus(self) -> float:
        return self.num_gpus if self.num_gpus is not None else float(self.device == "cuda")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)


class Query(BaseModel):
    """`POST /v1/translate?...`: what is left out takes the checkpoint's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    domain: str | None = None
    """The side to produce; may be left out where the checkpoint produces one only."""
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """0 ignores the image, 1 is plain, above 1 follows it harder."""
    num_steps: Annotated[int, Field(ge=1)] | None = None
    """Network evaluations: more are slower and finer."""
    sampler: Sampler | None = None
    """ddim: deterministic. ddpm: ancestral. dpm_solver: DPM-Solver++(2M), second order."""
    domain_guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """A weight of the domain's own; guidance_scale is then the image's."""
    start: Start | None = None
    """noise; sdedit: the image, noised; ddib: the noise that DDIM finds for the image in its own domain."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of sdedit: share of the chain that is noised and drawn again."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Another seed draws another sample for the same image."""
    align: Align = "auto"
    """faces: the largest face is brought to where the training images have theirs. none: the centred square is
    taken. auto: faces, where the checkpoint was trained on aligned portraits."""


@dataclasses.dataclass(frozen=True)
class Options:
    """A request's options in full: requests with equal options may share a batch."""

    domain: str
    sampler: Sampler
    num_steps: int
    guidance_scale: float
    domain_guidance_scale: float | None
    start: Start
    strength: float
    seed: int


def complete(query: Query, config: ModelConfig) -> Options:
    """`query` with the checkpoint's defaults in the gaps.

    Raises:
        InputError: no domain where there is a choice, an unknown one, options that cannot work or have no effect.
    """
    targets = config.target_domains or config.domains
    if query.domain is None and len(targets) != 1:
        raise InputError(f"domain is missing; add ?domain= with one of {', '.join(targets)}")
    domain = query.domain if query.domain is not None else targets[0]
    if domain not in targets:
        known = f"{configs.did_you_mean(domain, targets)}: {', '.join(targets)}"
        raise InputError(f"domain {domain!r} is not produced by this checkpoint{known}")
    num_timesteps = config.diffusion.num_timesteps
    if query.num_steps is not None and query.num_steps > num_timesteps:
        raise InputError(f"num_steps is {query.num_steps}; this checkpoint takes at most {num_timesteps}")
    names = [field.name for field in dataclasses.fields(SamplingConfig) if field.name in Query.model_fields]
    defaults = config.sampling
    given = {name: value for name in names if (value := getattr(query, name)) not in (None, getattr(defaults, name))}
    if given and config.method != "diffusion":
        raise InputError(f"{', '.join(given)}: no effect on {config.method}, which does not sample; leave it out")
    sampling = dataclasses.replace(defaults, **given)
    configs.check_sampling(sampling, num_timesteps)
    return Options(domain=domain, seed=query.seed, **{name: getattr(sampling, name) for name in names})


M = TypeVar("M", bound=BaseModel)


def validate(cls: type[M], values: dict[str, Any]) -> M:
    """`values` as `cls`.

    Raises:
        InputError: the first problem in one line.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error.errors()[0], cls)) from None


def explain(problem: Any, cls: type[BaseModel]) -> str:
    """One of pydantic's problems as a line that names the field, its value and what would be right."""
    name = ".".join(str(part) for part in problem["loc"] if part not in ("query", "body"))
    if problem["type"] == "extra_forbidden":
        fields = cls.model_fields
        return f"unknown option {name!r}{configs.did_you_mean(name, fields)}: {', '.join(fields)}"
    if problem["type"] == "missing":
        return f"{name} is missing; give {name}=VALUE"
    return f"{name} is {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
