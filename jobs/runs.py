"""What the commands have left: data sets, runs, sweeps, evaluations and translations.

    python -m jobs.runs list FOLDER
    python -m jobs.runs compare RUN RUN
    python -m jobs.runs remove FOLDER

All of it is read from the folders' own records, which the commands write. `remove` deletes nothing else than one such
folder, and none that is at work.
"""

from collections.abc import Sequence

from jobs.common import cli


def main(argv: Sequence[str] | None = None) -> int:
    from jobs.inventory.options import Command

    options = cli.parse(Command, argv, prog="jobs.runs", description=__doc__)
    from jobs.inventory import driver

    return driver.run(options)


if __name__ == "__main__":
    cli.run(main)
