"""Whether a folder holds this very job: what an earlier command left there, and how it differs from this one."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ddpm_core import storage
from ddpm_core.errors import InputError


def read_record(
    uri: str, kind: str, version: int, *, what: str = "this program's", remedy: str = "give a new --output folder"
) -> dict[str, Any] | None:
    """The content of a JSON file that an earlier command left, None where there is none. `kind`: its "format".

    Raises:
        InputError: it is not `what` it should be (damaged, or of another format), or it is of another version.
    """
    if not storage.is_file(uri):  # nor where a part of the path is a file: what writes there says so
        return None
    try:
        record = storage.read_json(uri)
    except storage.NOT_JSON:
        record = None
    if not isinstance(record, dict) or record.get("format", kind) != kind:
        raise InputError(f"{uri} is not {what}; {remedy}")
    if (found := record.get("format_version")) != version:
        raise InputError(f"{uri} has format version {found}, this program writes version {version}; {remedy}")
    return record


def check_same(
    folder: str,
    holds: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    may_change: Sequence[str] = (),
    flags: Mapping[str, str] = MappingProxyType({}),
    remedy: str = "give the old value back, or a new --output folder",
) -> None:
    """Refuse to go on with what `folder` holds if it was made with other options.

    `may_change`: dotted names that may differ, with all below them. `flags`: the command's flag by the name in the
    record, as `flags_of` gives them; it stands for all below it, too.

    Raises:
        InputError: naming the first difference with its old and new value.
    """
    for name, was, now in differences(old, new):
        if not any(f"{name}.".startswith(f"{each}.") for each in may_change):
            flag = next((each for each in flags if f"{name}.".startswith(f"{each}.")), None)
            option = f"{name} =" if flag is None else f"{flags[flag]}{name.removeprefix(flag).replace('_', '-')}"
            raise InputError(f"{folder} holds {holds} with {option} {was}, this command says {now}; {remedy}")


def flags_of(options: Any, below: str = "") -> dict[str, str]:
    """The flag of each option of a dataclass that records hold as BELOW.NAME; of grouped ones the flag's beginning."""
    fields = {f"{below}{field.name}": field.name for field in dataclasses.fields(options)}
    return {name: f"--{field.replace('_', '-')}" for name, field in fields.items()}


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of each leaf of nested mappings that differs; what is missing is None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
