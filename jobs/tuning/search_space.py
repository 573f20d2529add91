"""What a sweep searches: options by their dotted names, each with a range or with choices.

    optim.learning_rate=1e-5:1e-2:log     a range, uniform in the logarithm
    optim.warmup_steps=0:500              a range; of whole numbers where the option is one
    unet.injection=concat,cross_attention+concat     choices; + joins the parts of an option that has several
    sampling.guidance_scale=1:4           names that begin with sampling. are searched on frozen checkpoints

Values are what the options' own types say, and are refused where a training would refuse them.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from ddpm_core import config as configs
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from jobs.training.options import TrainOptions

SAMPLING = "sampling."
"""How the names begin that are searched by measuring images."""
LEARNING_RATE = "optim.learning_rate"
REFUSED = {
    "seed": "luck is not an option to tune",
    "epochs": "trials must be able to train equally long to be compared; give --epochs",
    "validate_every_epochs": "trials are compared validation by validation; give --validate-every-epochs",
    "max_val_images": "trials must be measured on the same images; give --max-val-images",
    "target_domain": "trials must learn the same task; give --target-domain",
    "pairing": "trials must learn the same task; give --pairing",
    "method": "losses of different methods do not compare; run jobs.experiments",
    "identity_encoder": "give --identity-encoder",
    "validation_loss_config": "it is what trials are compared by",
    "diffusion.num_timesteps": "losses of different chains do not compare; run jobs.experiments",
    "diffusion.schedule": "losses of different chains do not compare; run jobs.experiments",
    "diffusion.zero_terminal_snr": "losses of different chains do not compare; run jobs.experiments",
    "diffusion.prediction": "losses of different predictions do not compare; run jobs.experiments",
}
"""What cannot be searched, and why."""
OF_LOSS = ("diffusion.loss", "diffusion.huber_delta", "diffusion.loss_weighting", "diffusion.max_snr")
"""Options that change what the validation loss measures: trials are then all measured by the base's."""
BOUNDS = ("guidance_low", "guidance_high")
"""Of sampling: the ends of `guidance_interval`, searched apart."""


class Suggests(Protocol):
    """What is asked of an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def suggest(self, name: str, trial: Suggests) -> Any:
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def parameter(self, value: Any) -> Any:
        """Optuna's parameter for this value, None where it lies outside."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if number and self.low <= value <= self.high else None

    @property
    def corners(self) -> list[Any]:
        return [self.low, self.high]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """Some values, by what the user calls them."""

    values: dict[str, Any]

    def suggest(self, name: str, trial: Suggests) -> Any:
        return self.values[trial.suggest_categorical(name, [*self.values])]

    def parameter(self, value: Any) -> Any:
        return next((text for text, each in self.values.items() if each == value), None)

    @property
    def corners(self) -> list[Any]:
        return [*self.values.values()]


Space = dict[str, Range | Choices]
"""By dotted name; those of sampling without their prefix."""


def suggest(trial: Suggests, space: Space) -> dict[str, Any]:
    """A value for each option; those a trial has by now it keeps."""
    return {name: each.suggest(name, trial) for name, each in space.items()}


def parameters(values: Mapping[str, Any], space: Space) -> dict[str, Any] | None:
    """Optuna's parameters for these values, None where one is not in the space."""
    found = {name: each.parameter(values.get(name)) for name, each in space.items()}
    return None if any(value is None for value in found.values()) else found


def parse(texts: Sequence[str]) -> tuple[Space, Space]:
    """What is given by --space: training options, and sampling options by their own names.

    Raises:
        InputError: an unknown option, one that cannot be searched, or a range or value that is none.
    """
    training: Space = {}
    sampling: Space = {}
    for text in texts:
        name, equals, given = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not given.strip():
            raise InputError(f"--space {text}: write NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C")
        hint = _hint(name)
        space, key = (sampling, name.removeprefix(SAMPLING)) if name.startswith(SAMPLING) else (training, name)
        if key in space:
            raise InputError(f"--space names {name} twice; give it once")
        space[key] = _parsed(name, hint, given.strip())
    return training, sampling


def _hint(name: str) -> Any:
    """The type of an option by its dotted name."""
    if name.startswith(SAMPLING):
        hints = {
            **typing.get_type_hints(SamplingConfig),
            **dict.fromkeys(BOUNDS, float),
            "ema": float,
        }
        del hints["guidance_interval"]
        key = name.removeprefix(SAMPLING)
        if key not in hints:
            raise InputError(f"--space {name}: unknown option{configs.did_you_mean(key, hints)}: {', '.join(hints)}")
        return hints[key]
    for prefix, why in REFUSED.items():
        if name == prefix:
            raise InputError(f"--space {name} cannot be searched: {why}")
    hint: Any = TrainOptions
    for part in name.split("."):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        if part not in hints:
            known = sorted(_leaves(TrainOptions))
            raise InputError(f"--space {name}: unknown option{configs.did_you_mean(name, known)}: {', '.join(known)}")
        hint = hints[part]
    if dataclasses.is_dataclass(hint):
        inner = ", ".join(f"{name}.{key}" for key in typing.get_type_hints(hint))
        raise InputError(f"--space {name} is a group of options; name one of {inner}")
    return hint


def _leaves(cls: Any, prefix: str = "") -> list[str]:
    found = []
    for key, hint in typing.get_type_hints(cls).items():
        inside = _leaves(hint, f"{prefix}{key}.") if dataclasses.is_dataclass(hint) else [f"{prefix}{key}"]
        found += [name for name in inside if name not in REFUSED and not name.startswith(SAMPLING)]
    return found


def _parsed(name: str, hint: Any, given: str) -> Range | Choices:
    if ":" not in given:
        texts = [text.strip() for text in given.split(",")]
        if len(set(texts)) < len(texts) or not all(texts):
            raise InputError(f"--space {name}={given}: give different values, such as A,B,C")
        return Choices(values={text: _value(name, hint, text) for text in texts})
    low, high, *log = given.split(":")
    base = _scalar(hint)
    if base not in (int, float) or log not in ([], ["log"]):
        raise InputError(
            f"--space {name}={given}: write LOW:HIGH or LOW:HIGH:log for a number, A,B,C for anything else"
        )
    ends = [_value(name, base, end) for end in (low, high)]
    if not ends[0] < ends[1] or (log and ends[0] <= 0):
        need = "positive and " if log else ""
        raise InputError(f"--space {name}={given}: the ends must be {need}low before high")
    return Range(low=ends[0], high=ends[1], log=bool(log), integer=base is int)


def _scalar(hint: Any) -> Any:
    """The type of a number in an option that may be None, or hold several of them."""
    args = [arg for arg in typing.get_args(hint) if arg not in (type(None), Ellipsis)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(args) == 1:
        return _scalar(args[0])
    return args[0] if typing.get_origin(hint) is tuple and args else hint


def _value(name: str, hint: Any, text: str) -> Any:
    """A value of an option's type, as JSON has it."""
    optional = type(None) in typing.get_args(hint)
    if optional and text == "none":
        return None
    if typing.get_origin(hint) is tuple:
        return [_value(name, typing.get_args(hint)[0], part) for part in text.split("+")]
    base = _scalar(hint)
    try:
        if base is bool:
            return {"true": True, "false": False}[text.lower()]
        if base is int:
            return int(text)
        if base is float:
            number = float(text)
            if not math.isfinite(number):
                raise ValueError
            return number
    except (ValueError, KeyError):
        right = {bool: "true or false", int: "a whole number"}.get(base, "a number")
        raise InputError(f"--space {name}: {text!r} is not {right}") from None
    if typing.get_origin(base) is Literal and text not in typing.get_args(base):
        choices = typing.get_args(base)
        raise InputError(f"--space {name}: {text!r}{configs.did_you_mean(text, choices)}: {', '.join(choices)}")
    return text


def applied(options: TrainOptions, values: Mapping[str, Any]) -> TrainOptions:
    """`options` with these in their places."""
    nested = configs.to_dict(options)
    for name, value in values.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place[part]
        # A range over an option that holds several numbers searches a single one.
        place[last] = [value] if isinstance(place[last], list) and not isinstance(value, list) else value
    return configs.from_dict(TrainOptions, nested, where="options")


def value_of(options: Any, name: str) -> Any:
    """Of an option by its dotted name, as a trial's values have it."""
    found = configs.to_dict(options)
    for part in name.split("."):
        found = found[part]
    return found


def own_values(options: TrainOptions, space: Space) -> dict[str, Any]:
    """The options' own values of what is searched."""
    found = {}
    for name, each in space.items():
        value = value_of(options, name)
        single = isinstance(each, Range) and isinstance(value, list) and len(value) == 1
        found[name] = value[0] if single else value
    return found


def sampling_values(sampling: SamplingConfig, ema: float | None) -> dict[str, Any]:
    """Every sampling option by the name it is searched by."""
    found = configs.to_dict(sampling)
    low, high = found.pop("guidance_interval")
    return {**found, "guidance_low": low, "guidance_high": high, "ema": ema}


def sampling_options(values: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """The inverse: fields of SamplingConfig, and the length of the EMA."""
    fields = {name: value for name, value in values.items() if name not in (*BOUNDS, "ema")}
    return {**fields, "guidance_interval": [values["guidance_low"], values["guidance_high"]]}, values["ema"]


def default_training(options: TrainOptions) -> Space:
    """The learning rate, five hundredfold, with what the options say inside."""
    rate = options.optim.learning_rate
    return {LEARNING_RATE: Range(low=min(2e-5, rate / 5), high=max(1e-2, rate * 5), log=True)}


def default_sampling(sampling: SamplingConfig, emas: Sequence[float], num_timesteps: int) -> Space:
    """Guidance, steps, sampler and EMA length, with what the checkpoint says inside; `num_timesteps` has its chain."""
    most = min(max(50, sampling.num_steps), num_timesteps)
    samplers = dict.fromkeys([sampling.sampler, "ddim", "dpm_solver"])
    found: Space = {
        "guidance_scale": Range(low=min(0.5, sampling.guidance_scale), high=max(4.0, sampling.guidance_scale)),
        "guidance_low": Range(low=0.0, high=0.5),
        "guidance_high": Range(low=0.55, high=1.0),
        "guidance_rescale": Range(low=0.0, high=1.0),
        "num_steps": Range(low=min(4, sampling.num_steps), high=most, log=True, integer=True),
    }
    if sampling.start in configs.PARTIAL:
        found["strength"] = Range(low=min(0.3, sampling.strength), high=1.0)
    if sampling.start not in configs.FROM_SIDE and not sampling.eta:
        found["sampler"] = Choices(values={name: name for name in samplers})
    if len(emas) > 1:
        found["ema"] = Choices(values={f"{length:g}": length for length in emas})
    return found


def to_json(space: Space) -> dict[str, Any]:
    """For sweep.json."""
    return {
        name: {"choices": each.corners} if isinstance(each, Choices) else dataclasses.asdict(each)
        for name, each in space.items()
    }
