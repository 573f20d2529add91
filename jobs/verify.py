"""Whether images were generated: by what their XMP says, and by the invisible mark that this project's results carry.

    python -m jobs.verify photo.png results/ s3://bucket/results

A file that says nothing and has no mark may be generated all the same. The mark is found by the key that it was made
with (--mark-key).
"""

from collections.abc import Sequence

from jobs.common import cli


def main(argv: Sequence[str] | None = None) -> int:
    from jobs.verification.options import VerifyArgs

    options = cli.parse(VerifyArgs, argv, prog="jobs.verify", description=__doc__)
    from jobs.verification import driver

    return driver.run(options)


if __name__ == "__main__":
    cli.run(main)
