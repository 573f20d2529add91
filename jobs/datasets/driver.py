"""Which part does what `jobs.prepare` is asked for."""

from collections.abc import Callable
from typing import Any

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import cli, numbers
from jobs.datasets import assemble, source
from jobs.datasets.inspect import inspect
from jobs.datasets.options import CelebA, Command, Day2Night, Earth, Folders, Inspect, MadePairs, Rendered
from jobs.datasets.sources import celeba, day2night, earth, folders, pairs, rendered

DRAFTS: dict[type, Callable[[Any], source.Draft]] = {
    Earth: earth.draft,
    CelebA: celeba.draft,
    Day2Night: day2night.draft,
    Folders: folders.draft,
    Rendered: rendered.draft,
    MadePairs: pairs.draft,
}


def run(options: Command) -> int:
    """Make, extend or show a data set, by options of Command; the exit code.

    Raises:
        InputError: an option is wrong, or the source cannot be used.
    """
    if isinstance(options, Inspect):
        return inspect(options)
    numbers.check(options)
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
