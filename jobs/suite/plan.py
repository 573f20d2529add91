"""A plan of commands and of what their measurements are to show, and what a suite's folder says of it.

plan.json                 the plan, and where it was made
commands/<key>.json       a command that has ended: state (done, failed, skipped), exit code, seconds, last lines
logs/<key>.log            what it said
<key>/                    what it made
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Collection, Iterable
from typing import Any, Literal

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import resume

FORMAT, FORMAT_VERSION = "ddpm-translate-suite", 1
Record = dict[str, Any]
"""commands/<key>.json"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command line of the project."""

    key: str
    """Its name, and its folder below the suite's: runs/paired/seed-0."""
    module: str
    """jobs.train"""
    argv: tuple[str, ...]
    """`{out}` stands for the URI of its own folder, `{runs/paired/seed-0}` for that of another command, which is then
    waited for."""
    after: tuple[str, ...] = ()
    """Keys of further commands that must be done before."""
    cost: float
    """Rough seconds on one core (or one GPU), for the estimate and the order."""
    how: tuple[str, ...] = ()
    """Further arguments, which make no difference to what it makes: no part of its digest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A row of a table: one way of training and sampling, over training seeds."""

    name: str
    """paired, guidance 1.5"""
    evaluations: tuple[str, ...]
    """Keys of jobs.evaluate commands, one a training seed, in their order."""
    training: str
    """The same for measurements of the same networks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a section is to show; whether it does is a matter of intervals."""

    text: str
    metric: str
    domain: str
    ours: str
    """Name of a Measured of the section."""
    theirs: str | None = None
    kind: Literal["better", "at_least", "half_of_missing", "not_worse_by"] = "better"
    threshold: float | None = None
    reason: str = ""
    """The known likely reason where it fails."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot or a grid of images."""

    kind: Literal["images", "tradeoff", "curves", "bars", "stress"]
    title: str
    rows: tuple[str, ...] = ()
    """Names of the section's Measureds that are shown; by default all."""
    groups: tuple[str, ...] = ()
    """tradeoff: the line that each of `rows` belongs to."""
    domain: str = ""
    x: str = ""
    """tradeoff: a metric, or nfe."""
    y: str = ""
    """tradeoff, bars: a metric."""
    runs: tuple[str, ...] = ()
    """curves: keys of jobs.train commands."""
    translations: tuple[str, ...] = ()
    """stress: keys of jobs.translate commands."""
    classifier: str = ""
    """stress: the net that judges flips, a URI or `{key}`; by default nobody does."""
    identity: str = ""
    """stress: the net that judges identity, likewise."""
    data: str = ""
    """stress: the data set whose training images say what is in distribution, likewise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One question of the suite, and what answers it."""

    key: str
    title: str
    question: str
    rows: tuple[Measured, ...]
    metrics: tuple[str, ...]
    claims: tuple[Claim, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All commands of a suite, and what is made of their results."""

    name: str
    size: str
    commands: tuple[Command, ...]
    sections: tuple[Section, ...]


def needs(command: Command) -> set[str]:
    """Keys of the commands that must be done before: those it names and those whose URIs it uses."""
    named = {name for word in command.argv for name in re.findall(r"\{([^{}]+)\}", word)}
    return (named | {*command.after}) - {"out"}


def argv(command: Command, output: str) -> list[str]:
    """Its arguments as a user would type them."""
    return [
        re.sub(r"\{([^{}]+)\}", lambda at: storage.join(output, command.key if at[1] == "out" else at[1]), word)
        for word in (*command.argv, *command.how)
    ]


def command_line(module: str, words: Iterable[str]) -> str:
    return shlex.join(["python", "-m", module, *words])


def ordered(commands: Iterable[Command]) -> list[Command]:
    """What is needed before what needs it, else as given.

    Raises:
        ValueError: a key twice, a key that nothing has, or commands that wait for each other.
    """
    there: dict[str, Command] = {}
    for command in commands:
        if command.key in there:
            raise ValueError(f"two commands have the key {command.key}")
        there[command.key] = command
    if len({record_uri("", key) for key in there}) < len(there):
        raise ValueError("two commands would write the same record: their keys differ in / and _ only")
    for command in there.values():
        if unknown := needs(command) - there.keys():
            raise ValueError(f"{command.key} needs {', '.join(sorted(unknown))}, which no command makes")
    found: dict[str, Command] = {}
    while left := [command for command in there.values() if command.key not in found]:
        ready = [command for command in left if needs(command) <= found.keys()]
        if not ready:
            raise ValueError(f"commands wait for each other: {', '.join(command.key for command in left)}")
        found |= {command.key: command for command in ready}
    return [*found.values()]


def digests(plan: Plan) -> dict[str, str]:
    """What each command does and what it is given, by key: another one must run again."""
    found: dict[str, str] = {}
    for command in ordered(plan.commands):
        text = json.dumps([command.module, command.argv, sorted(found[key] for key in needs(command))])
        found[command.key] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return found


def ways(commands: Iterable[Command]) -> dict[str, float]:
    """Seconds from each command's begin to the end of the longest chain that waits for it."""
    found: dict[str, float] = {}
    behind: dict[str, float] = {}
    for command in reversed(ordered(commands)):
        found[command.key] = command.cost + behind.get(command.key, 0.0)
        for key in needs(command):
            behind[key] = max(behind.get(key, 0.0), found[command.key])
    return found


def urgency(plan: Plan) -> dict[str, int]:
    """The place of the first section that needs each command, by key, so that results come section by section."""
    there = {command.key: command for command in plan.commands}
    found: dict[str, int] = {}

    def visit(key: str, place: int) -> None:
        if key in there and key not in found:
            found[key] = place
            for before in needs(there[key]):
                visit(before, place)

    for place, section in enumerate(plan.sections):
        nets = [net.strip("{}") for each in section.figures for net in (each.classifier, each.identity, each.data)]
        shown = [key for each in section.figures for key in (*each.runs, *each.translations)]
        for key in [*(key for row in section.rows for key in row.evaluations), *shown, *nets]:
            visit(key, place)
    return {key: found.get(key, len(plan.sections)) for key in there}


def record_uri(output: str, key: str) -> str:
    return storage.join(output, "commands", key.replace("/", "_") + ".json")


def log_uri(output: str, key: str) -> str:
    return storage.join(output, "logs", key + ".log")


def records(plan: Plan, output: str) -> dict[str, Record]:
    """The records of those of the plan's commands that have ended, by key; a damaged one counts as none."""
    names = {*storage.list_files(storage.join(output, "commands"), recursive=False)}
    found = {}
    for command in plan.commands:
        uri = record_uri(output, command.key)
        if uri.rpartition("/")[2] in names:
            with contextlib.suppress(FileNotFoundError, *storage.NOT_JSON):
                record = storage.read_json(uri)
                if isinstance(record, dict) and record.get("key") == command.key:
                    found[command.key] = record
    return found


def done(plan: Plan, output: str) -> dict[str, Record]:
    """The records of the commands that need not run again: done, unchanged like all they need, and still there."""
    now = digests(plan)
    found = records(plan, output)
    return {
        command.key: found[command.key]
        for command in plan.commands
        if command.key in found
        and found[command.key].get("state") == "done"
        and found[command.key].get("digest") == now[command.key]
        and ("{out}" not in " ".join(command.argv) or storage.exists(storage.join(output, command.key)))
    }


def keep(plan: Plan, output: str) -> None:
    """Write plan.json; a suite may be extended, not exchanged.

    Raises:
        InputError: another suite or size is there, or nothing can be written.
    """
    from ddpm_core import provenance

    uri = storage.join(output, "plan.json")
    there = resume.read_record(uri, FORMAT, FORMAT_VERSION, what="a plan of this project")
    if there is None:
        storage.check_writable(output)
    elif (was := [there.get("plan", {}).get(fact) for fact in ("name", "size")]) != [plan.name, plan.size]:
        raise InputError(
            f"{output} holds --suite {was[0]} --size {was[1]}, this command says --suite {plan.name} "
            f"--size {plan.size}; give a new --output folder"
        )
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "plan": dataclasses.asdict(plan),
        "environment": provenance.environment(),
    }
    storage.write_bytes(uri, json.dumps(content, indent=1, allow_nan=False).encode())


def counted(commands: Iterable[Command], ended: Collection[str]) -> str:
    """3 of 12 trainings, 4 of 20 measurements, 2 of 3 others."""
    kinds: dict[str, list[bool]] = {"trainings": [], "measurements": [], "others": []}
    for command in commands:
        kind = {"jobs.train": "trainings", "jobs.evaluate": "measurements"}.get(command.module, "others")
        kinds[kind].append(command.key in ended)
    return ", ".join(f"{sum(found)} of {len(found)} {kind}" for kind, found in kinds.items() if found)


def estimate_s(commands: Iterable[Command], slots: int) -> float:
    """Rough seconds until `commands` are done with `slots` at a time; what they need of others is done."""
    there = {command.key: command for command in commands}
    alone = [
        dataclasses.replace(each, argv=(), after=tuple(needs(each) & there.keys()), key=key)
        for key, each in there.items()
    ]
    return max([sum(each.cost for each in alone) / max(slots, 1), *ways(alone).values()], default=0.0)
