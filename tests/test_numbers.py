"""Every number that a command takes: in its range, or refused by its flag before anything else is looked at."""

import dataclasses
import importlib
import itertools
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ddpm_core import config as configs
from ddpm_core import images
from ddpm_core.errors import InputError
from jobs.common import numbers
from jobs.common.numbers import ImageSize, Within, within
from jobs.datasets import options as datasets
from jobs.evaluation.options import EvaluateArgs
from jobs.suite.options import Args, RecipeArgs
from jobs.training.options import TrainArgs
from jobs.translation.options import TranslateArgs
from jobs.tuning.options import SweepArgs

FILES = "--data d --output o"
COMMANDS: dict[str, type] = {
    f"train {FILES}": TrainArgs,
    f"sweep {FILES}": SweepArgs,
    f"evaluate {FILES} --checkpoint c": EvaluateArgs,
    "translate --checkpoint c --input i --output o --domain n": TranslateArgs,
    "recipe --source s --output o": RecipeArgs,
    "experiments --output o": Args,
    "prepare earth --output o": datasets.Earth,
    "prepare celeba --output o": datasets.CelebA,
    "prepare day2night --output o": datasets.Day2Night,
    "prepare folders --output o": datasets.Folders,
    "prepare rendered --output o": datasets.Rendered,
    f"prepare pairs {FILES} --checkpoint c": datasets.MadePairs,
}
NETWORK = ("unet", "diffusion", "gan", "encoder", "sampling")
"""Groups that become the model's configuration, whose ranges `ddpm_core` knows: test_config.py has them."""
BEYOND = {int: (-1, 10**20), float: (-1.0, math.nan, math.inf, 1e308, 1e20)}


def is_number(hint: Any) -> Any:
    """int or float where an option is one, or has several; else None."""
    if hint in (int, float):
        return hint
    return next(filter(None, map(is_number, typing.get_args(hint))), None)


def options_of(options: Any, prefix: str = "--") -> Iterator[tuple[str, Any, Any, Callable[[float], Any]]]:
    """Flag, type and annotation of each number among a command's options, and the options with another in its place."""
    for name, hint in typing.get_type_hints(type(options), include_extras=True).items():
        flag, value = f"{prefix}{name.replace('_', '-')}", getattr(options, name)

        def replaced(inner: Any, name: str = name) -> Any:
            return dataclasses.replace(options, **{name: inner})

        if dataclasses.is_dataclass(value):
            inline = any(getattr(mark, "name", None) == "" for mark in getattr(hint, "__metadata__", ()))
            for *found, put in options_of(value, prefix if inline else f"{flag}."):
                yield *found, lambda number, put=put, replaced=replaced: replaced(put(number))
        elif kind := is_number(hint):
            several = isinstance(value, tuple)
            rest = value[1:] if several else ()
            yield (
                flag,
                kind,
                hint,
                lambda number, several=several, rest=rest, replaced=replaced: replaced(
                    (number, *rest) if several else number
                ),
            )


def said(cls: type) -> Any:
    """A command's options where only those are given that must be."""
    needed = [each.name for each in dataclasses.fields(cls) if each.default is dataclasses.MISSING]
    return cls(**dict.fromkeys(needed, "x"))


@pytest.mark.parametrize("cls", COMMANDS.values())
def test_a_number_out_of_its_range_is_refused_by_its_flag(cls: type) -> None:
    for flag, kind, hint, put in options_of(said(cls)):
        limits = within(hint)
        near = (limits.least - 1, limits.most + 1) if kind is int else (limits.least - 0.5, limits.most * 1.01)
        for value in (*BEYOND[kind], *map(kind, near)):
            with pytest.raises(InputError) as refused:
                numbers.check(put(value))
            message = str(refused.value)
            assert message.startswith(f"{flag} is {value}; it must "), message
            assert "\n" not in message


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_look_at_numbers_before_they_read_anything(line: str) -> None:
    name, *words = line.split()
    flag = {"train": "--epochs", "prepare": "--num-workers", "experiments": "--seeds"}.get(name, "--num-workers")
    for value in ("-1", "2000000000000"):
        with pytest.raises(InputError, match=rf"^{flag} is {value}; it must "):
            importlib.import_module(f"jobs.{name}").main([*words, flag, value])


@pytest.mark.parametrize("cls", COMMANDS.values())
def test_every_number_of_a_command_has_a_range_of_its_own(cls: type) -> None:
    """One that stands in no annotation would be taken up to the largest seed."""
    marked = {field.name for field in dataclasses.fields(configs.SamplingConfig)}
    for flag, _, hint, _ in options_of(said(cls)):
        group = flag.removeprefix("--").partition(".")[0]
        if group in NETWORK or group.replace("-", "_") in marked:
            continue
        assert "Within" in repr(hint), f"{flag} has no range: write Annotated[{hint}, Within(least, most)]"


@dataclasses.dataclass(frozen=True)
class Held:
    depth: typing.Annotated[int, Within(1, 3)] | None = None
    lengths: tuple[typing.Annotated[float, Within(0, 1)], ...] = ()
    free: float = 0.0
    yes: bool = False
    rate: typing.Annotated[float, Within(0, 1, over=True)] = 0.5


@dataclasses.dataclass(frozen=True)
class Holder:
    held: Held = Held()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (Held(depth=0), "--held.depth is 0; it must lie between 1 and 3"),
        (Held(depth=4), "--held.depth is 4; it must lie between 1 and 3"),
        (Held(lengths=(0.5, 1.5)), "--held.lengths is 1.5; it must lie between 0 and 1"),
        (Held(rate=0.0), "--held.rate is 0.0; it must be positive"),
        (Held(rate=1.5), "--held.rate is 1.5; it must lie between 0 and 1"),
        (Held(free=-0.1), "--held.free is -0.1; it must be at least 0"),
        (Held(free=math.nan), "--held.free is nan; it must lie between 0 and 2,147,483,647"),
    ],
)
def test_ranges_hold_at_any_depth(held: Held, message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        numbers.check(Holder(held))


def test_what_lies_in_its_range_is_taken() -> None:
    for depth, length in itertools.product((None, 1, 3), (0.0, 1.0)):
        numbers.check(Holder(Held(depth=depth, lengths=(length,), free=1e9, yes=True)))


def test_images_that_prepare_makes_are_images_that_are_read() -> None:
    assert within(ImageSize).least == images.MIN_SIDE
