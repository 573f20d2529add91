"""What numbers an option takes: the range stands in its annotation, and is looked at before anything else is.

    batch_size: Annotated[int, Within(1, 16_384)] = 16

An option without a range takes no negative number and none that is not finite, so that none is forgotten. What is
refused for other options' values, or for the data, is checked where both are known.
"""

import dataclasses
import typing
from typing import Annotated, Any, NamedTuple

from ddpm_core.config import MAX_SEED
from ddpm_core.errors import InputError


class Within(NamedTuple):
    """A range of numbers, both ends included."""

    least: float = 0
    most: float = MAX_SEED
    over: bool = False
    """Whether `least` itself is refused."""


Seed = Annotated[int, Within()]
NumWorkers = Annotated[int, Within(0, 4096)]
Cpus = Annotated[int, Within(1, 4096)]
BatchSize = Annotated[int, Within(1, 16_384)]
"""Of images that a network sees at once."""
ImageSize = Annotated[int, Within(8, 1024)]
"""Side of a data set's images, in pixels."""
Share = Annotated[float, Within(0, 1)]


def check(options: Any, prefix: str = "--") -> None:
    """Refuse numbers outside of their ranges, in the dataclass `options` and in those that it holds.

    Raises:
        InputError: naming the flag, its value and the range.
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            inline = any(getattr(each, "name", None) == "" for each in getattr(hints[field.name], "__metadata__", ()))
            check(value, prefix if inline else f"{prefix}{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                check_number(f"{prefix}{name}", number, within(hints[field.name]))


def within(hint: Any) -> Within:
    """The range in an annotation, at any depth; the widest where there is none."""
    for each in (*getattr(hint, "__metadata__", ()), *typing.get_args(hint)):
        if isinstance(each, Within):
            return each
        if (found := within(each)) != Within():
            return found
    return Within()


def check_number(flag: str, number: float, limits: Within) -> None:
    """Refuse a number outside of its range; a NaN is in none.

    Raises:
        InputError: naming the flag, its value and the range.
    """
    if limits.least <= number <= limits.most and not (limits.over and number == limits.least):
        return
    if limits.over and number <= limits.least == 0:
        raise InputError(f"{flag} is {number}; it must be positive")
    if number < limits.least and limits.most == MAX_SEED:
        raise InputError(f"{flag} is {number}; it must be at least {limits.least:,}")
    raise InputError(f"{flag} is {number}; it must lie between {limits.least:,} and {limits.most:,}")
