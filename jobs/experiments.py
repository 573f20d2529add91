"""The mission's experiments: train what is missing, measure it, and write one table and report.

    python -m jobs.experiments --size smoke --output FOLDER
    ray job submit --address … --working-dir . -- python -m jobs.experiments --size gpu --output s3://…

The same command again goes on from there; more seeds or sections add to it. Every command is a
process of its own on some node of the cluster; one that fails costs what needs it and no more.
"""

from collections.abc import Sequence

from jobs.common import cli


def main(argv: Sequence[str] | None = None) -> int:
    from jobs.suite.options import Args

    args = cli.parse(Args, argv, prog="jobs.experiments", description=__doc__)
    from jobs.suite import driver  # seconds, which --help and a wrong flag need not wait for

    return driver.run(args)


if __name__ == "__main__":
    cli.run(main)
