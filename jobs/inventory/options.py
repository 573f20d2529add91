"""What is asked of the folders that commands have left."""

import dataclasses
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """Data sets, runs, sweeps, evaluations and translations below a folder: state, best figure, size, date."""

    uri: tyro.conf.Positional[str] = "runs"
    """Folder or s3:// prefix, searched to any depth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Two folders of one kind side by side: options and versions that differ, figures."""

    a: tyro.conf.Positional[str]
    """Folder or s3:// prefix."""
    b: tyro.conf.Positional[str]
    """The one to compare it with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remove:
    """Delete one such folder with all that is in it."""

    uri: tyro.conf.Positional[str]
    """Folder or s3:// prefix."""
    yes: bool = False
    """Do not ask."""
    force: bool = False
    """Delete it although a command is at work there, or was minutes ago."""


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Remove, tyro.conf.subcommand("remove")]
)
