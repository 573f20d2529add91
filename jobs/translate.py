"""Translate every image under a folder or bucket, or the rows of a data set.

    python -m jobs.translate --checkpoint RUN --input FOLDER --output FOLDER --domain night

Each image keeps its place, its size (--output-size) and its name, with the suffix .png. What cannot be read is set
aside with its reason (rejected.parquet) and the exit code is 3. The same command again goes on where it
was stopped, does new and changed images, and tries again those set aside.
"""

from collections.abc import Sequence

from jobs.common import cli
from jobs.common.progress import Waiting


def main(argv: Sequence[str] | None = None) -> int:
    from jobs.translation.options import TranslateArgs

    args = cli.parse(TranslateArgs, argv, prog="jobs.translate", description=__doc__)
    with Waiting("translate") as waiting:
        waiting.at("loading PyTorch, the checkpoint and what tells of the images")
        from jobs.translation import driver, dry_run  # seconds, which --help and a wrong flag need not wait for
        from jobs.translation.plan import plan_translation

        job = plan_translation(args)
    return dry_run.run(job) if args.dry_run else driver.run(job)


if __name__ == "__main__":
    cli.run(main)
