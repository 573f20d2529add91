"""What `jobs.prepare` is asked for, and who does it."""

from collections.abc import Callable
from typing import Annotated, Any

import tyro

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import cli
from jobs.datasets import assemble, source
from jobs.datasets.inspect import Inspect, inspect
from jobs.datasets.sources import celeba, day2night, earth, folders, pairs, rendered

Command = (
    Annotated[earth.Options, tyro.conf.subcommand("earth")]
    | Annotated[celeba.Options, tyro.conf.subcommand("celeba")]
    | Annotated[day2night.Options, tyro.conf.subcommand("day2night")]
    | Annotated[folders.Options, tyro.conf.subcommand("folders")]
    | Annotated[rendered.Options, tyro.conf.subcommand("rendered")]
    | Annotated[pairs.Options, tyro.conf.subcommand("pairs")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
)
DRAFTS: dict[type, Callable[[Any], source.Draft]] = {
    earth.Options: earth.draft,
    celeba.Options: celeba.draft,
    day2night.Options: day2night.draft,
    folders.Options: folders.draft,
    rendered.Options: rendered.draft,
    pairs.Options: pairs.draft,
}


def run(options: Any) -> int:
    """Make, extend or show a data set, by options of Command; the exit code.

    Raises:
        InputError: an option is wrong, or the source cannot be used.
    """
    if isinstance(options, Inspect):
        return inspect(options)
    output = storage.absolute(options.output, flag="--output")
    assemble.check_apart(output, options)
    append = getattr(options, "append", False)
    if append and options.overwrite:
        raise InputError("--append and --overwrite are both given; give one of them")
    draft = DRAFTS[type(options)](options)
    num_rejected = assemble.make(
        output, draft, append=append, overwrite=options.overwrite, num_workers=options.num_workers
    )
    return cli.set_aside(num_rejected, ok=options.set_aside_ok)
