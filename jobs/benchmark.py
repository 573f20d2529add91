"""Measure this project on this machine, beside its peers; each run interleaves what it compares.

python -m jobs.benchmark network      (make bench)
python -m jobs.benchmark data
python -m jobs.benchmark size
"""

from collections.abc import Sequence
from typing import Annotated

import tyro

from jobs import cli
from jobs.benchmarks import data, network, size

Command = (
    Annotated[network.Options, tyro.conf.subcommand("network")]
    | Annotated[data.Options, tyro.conf.subcommand("data")]
    | Annotated[size.Options, tyro.conf.subcommand("size")]
)


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(Command, argv, prog="jobs.benchmark", description=__doc__)
    if isinstance(options, network.Options):
        return network.run(options)
    return data.run(options) if isinstance(options, data.Options) else size.run(options)


if __name__ == "__main__":
    cli.run(main)
