"""What the endpoint is given: its start-up arguments and the options of one request."""

import dataclasses
import re
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from ddpm_core import config as configs
from ddpm_core.config import Framing, ModelConfig, OutputFormat, SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import check_sampling


class Arguments(BaseModel):
    """`serve run serve.app:build_app checkpoint=RUN [name=value ...]`; in YAML the same under `args:`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: Annotated[str, Field(min_length=1)]
    """A run (its best checkpoint) or a checkpoint folder: a path that every node sees, or s3://bucket/prefix."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPU of the machine where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network; auto is bf16 where the hardware has it."""
    max_batch_size: Annotated[int, Field(ge=1, le=512)] = 16
    """Places in one pass of the network: an image takes one, under guidance two. They join and leave at any step."""
    num_replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    """Copies of the model, each with its own share of CPUs and GPUs."""
    max_replicas: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Copies are added up to so many while each has more than `max_batch_size` requests, and taken away again."""
    upscale_delay_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Of `max_replicas`: how long there must be too many requests before a copy is added."""
    downscale_delay_s: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """Of `max_replicas`: how long there must be few before one is taken away."""
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = 100
    """Copies started beside the old ones when the application is deployed again; the old ones stop once these are warm.
    0 where there is no room for more: the old ones then stop first, and are missed if the new ones do not start."""
    num_cpus: Annotated[int, Field(ge=1)] | None = None
    """CPUs reserved and threads used by each replica. Unset: one reserved, a thread for each core used."""
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs reserved by each replica, 0.5 for two on one. Unset: 1 with device=cuda, else 0."""
    max_queued_requests: Annotated[int, Field(ge=1)] | None = None
    """Images that may wait for a place; more are answered 429. Unset: eight passes full of them for each replica."""
    max_body_mb: Annotated[float, Field(gt=0, le=1000)] = 20.0
    """Larger request bodies are answered 413, in megabytes."""

    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """Requests that cannot be, or are not, done in this time are answered 503."""
    body_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """A body must be whole by then, or is answered 408."""
    tokens_file: str | None = None
    """A file with a line `NAME SHA256-OF-TOKEN` for each client; requests then need `Authorization: Bearer TOKEN`."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Of each token; more are answered 429."""
    mark_key: Annotated[str, Field(min_length=1)] = "public"
    """Of the invisible mark in each answer of 64 pixels and more: none, public (a key that everybody has), or a file
    that holds a secret one."""
    identity_net: Annotated[str, Field(min_length=1)] | None = None
    """Each answer says how much it shows whom its source shows, as this net sees it: a net file that gives an
    embedding, or a run of our own identity encoder."""
    open_to_all: bool = False
    """Serve other machines without a token, too: behind a proxy that decides who may come."""

    @property
    def queue_length(self) -> int:
        """Requests that may wait at each replica."""
        return (
            -(-self.max_queued_requests // self.num_replicas) if self.max_queued_requests else 8 * self.max_batch_size
        )

    @model_validator(mode="after")
    def _bounds(self) -> "Arguments":
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}; it must be at least num_replicas, {self.num_replicas}"
            )
        return self

    @property
    def scaling(self) -> dict[str, Any]:
        """How many copies there are, as Ray Serve's deployments take it."""
        if self.max_replicas is None:
            return {"num_replicas": self.num_replicas}
        config = {
            "min_replicas": self.num_replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.max_batch_size,
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
            "metrics_interval_s": min(self.upscale_delay_s / 2, 10.0),
            "look_back_period_s": min(self.upscale_delay_s, 30.0),
        }
        return {"num_replicas": "auto", "autoscaling_config": config}

    @property
    def replica_gpus(self) -> float:
        return self.num_gpus if self.num_gpus is not None else float(self.device == "cuda")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)


_fields: dict[str, Any] = {
    name: (Annotated[hint, Field(description=doc)], None) for name, hint, doc in configs.optional_fields(SamplingConfig)
}
SamplingQuery: Any = create_model("SamplingQuery", **_fields)
"""Every sampling option; None is the checkpoint's default."""


_fields = {
    name: (Annotated[hint, Field(description=doc)], getattr(Framing(), name))
    for (name, _, doc), hint in zip(configs.optional_fields(Framing), get_type_hints(Framing).values(), strict=True)
}
FramingQuery: Any = create_model("FramingQuery", **_fields)
"""What of a photo is translated, and what comes back."""


class Query(SamplingQuery, FramingQuery):
    """`POST /v1/translate?...`: what is left out takes the checkpoint's default."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    domain: str | None = None
    """The side to produce; may be left out where the checkpoint produces one only."""
    seed: Annotated[int, Field(ge=0, le=configs.MAX_SEED)] = 0
    """Another seed draws another sample for the same image."""
    format: OutputFormat | None = None
    """Of the answer; by default what the Accept header names, else png."""
    accept_licence: bool = False
    """Needed where the training data's licence allows non-commercial use only."""


@dataclasses.dataclass(frozen=True)
class Options:
    """A request's options in full."""

    domain: str
    seed: int
    sampling: SamplingConfig
    framing: Framing = Framing()

    def arguments(self) -> dict[str, Any]:
        """As a `Translator` takes them."""
        return {"domain": self.domain, "seed": self.seed, **configs.to_dict(self.sampling)}

    def told(self) -> dict[str, Any]:
        """As the response's X-Options and the file's XMP tell them."""
        told = {"output_size": "own"} if self.framing.output_size == "own" else {}
        return self.arguments() | told | ({"faces": "all"} if self.framing.faces == "all" else {})


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
    given = query.model_dump(include=set(SamplingQuery.model_fields))
    try:
        sampling = configs.override_sampling(config, given)
        check_sampling(config, sampling, domain)
    except InputError as error:  # by the query's names: num_steps, not sampling.num-steps
        named = re.sub(r"(?:sampling|diffusion)\.([a-z-]+)", lambda name: name[1].replace("-", "_"), str(error))
        raise InputError(named) from None
    return Options(domain, query.seed, sampling, Framing(**query.model_dump(include=set(FramingQuery.model_fields))))


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
    if not problem["loc"]:  # of several fields together
        return str(problem["ctx"]["error"])
    *_, name = [part for part in problem["loc"] if isinstance(part, str)]  # not the place within a tuple
    if problem["type"] == "extra_forbidden":
        fields = cls.model_fields
        return f"unknown option {name!r}{configs.did_you_mean(name, fields)}: {', '.join(fields)}"
    if problem["type"] == "missing":
        more = "" if problem["loc"][-1] == name else ", as often as it has values"
        return f"{name} is missing; give {name}=VALUE{more}"
    return f"{name} is {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
