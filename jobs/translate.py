"""Translate every image under a folder or bucket, or the rows of a data set.

    python -m jobs.translate --checkpoint RUN --input FOLDER --output FOLDER --domain night

Each image keeps its place and name, with the suffix .png. What cannot be read is set aside with its reason
(manifest.parquet, rejected.txt) and the exit code is 3. The same command again goes on where it was stopped, does
new and changed images, and tries again those set aside.
"""

import sys

from jobs.common import cli
from jobs.translation import driver
from jobs.translation.plan import TranslateArgs, plan_translation


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(TranslateArgs, sys.argv[1:] if argv is None else argv, prog="jobs.translate", description=__doc__)
    return driver.run(plan_translation(args))


if __name__ == "__main__":
    cli.run(main)
