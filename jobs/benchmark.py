"""Measure this project on this machine, beside its peers; each run interleaves what it compares.

python -m jobs.benchmark network      (make bench)
python -m jobs.benchmark data
python -m jobs.benchmark size
python -m jobs.benchmark train
python -m jobs.benchmark validation
python -m jobs.benchmark sweep
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from jobs.benchmarks import data, network, size, sweep, training, validation
from jobs.common import cli

SUBJECTS: dict[Any, Callable[[Any], int]] = {
    network.Options: network.run,
    data.Options: data.run,
    size.Options: size.run,
    training.Options: training.run,
    validation.Options: validation.run,
    sweep.Options: sweep.run,
}
Command = (
    Annotated[network.Options, tyro.conf.subcommand("network")]
    | Annotated[data.Options, tyro.conf.subcommand("data")]
    | Annotated[size.Options, tyro.conf.subcommand("size")]
    | Annotated[training.Options, tyro.conf.subcommand("train")]
    | Annotated[validation.Options, tyro.conf.subcommand("validation")]
    | Annotated[sweep.Options, tyro.conf.subcommand("sweep")]
)


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Command, argv, prog="jobs.benchmark", description=__doc__)
    return SUBJECTS[type(options)](options)


if __name__ == "__main__":
    cli.run(main)
