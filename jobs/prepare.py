"""Images to a data set.

    python -m jobs.prepare earth --output URI
    python -m jobs.prepare celeba --source URI --output URI --pairing matched
    python -m jobs.prepare folders --source NEW --output URI --append
    python -m jobs.prepare inspect URI

The same command again finds the data set complete and does nothing; killed half-way, it starts anew and gives the
same bytes.
"""

from collections.abc import Sequence

from jobs.common import cli


def main(argv: Sequence[str] | None = None) -> int:
    from jobs.datasets.options import Command

    options = cli.parse(Command, argv, prog="jobs.prepare", description=__doc__)
    from jobs.datasets import driver  # seconds, which --help and a wrong flag need not wait for

    return driver.run(options)


if __name__ == "__main__":
    cli.run(main)
