"""Translate every image under a folder or bucket, or the rows of a data set.

    python -m jobs.translate --checkpoint RUN --input FOLDER --output FOLDER --domain night

Each image keeps its place and name, with the suffix .png. What cannot be read is set aside with its reason
(manifest.parquet, rejected.txt) and the exit code is 3. The same command again goes on where it was stopped, does
new and changed images, and tries again those set aside.
"""

import contextlib
import sys

from jobs.common import cli
from jobs.datasets import reading
from jobs.translation import driver
from jobs.translation.plan import TranslateArgs, plan_translation, remaining


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(TranslateArgs, sys.argv[1:] if argv is None else argv, prog="jobs.translate", description=__doc__)
    job = plan_translation(args)
    manifest = driver.open_output(job)
    todo = remaining(job, manifest)
    if todo:
        done = len(job.sources) - len(todo)
        print(f"{driver.counted(len(todo))} to translate" + (f", {done:,} are done already" if done else ""))
        damaged = contextlib.nullcontext() if job.card is None else reading.damage_told(job.args.input, args.split)
        with cli.ray_session(), damaged:
            driver.translate(job, manifest, todo)
            driver.write_preview(job, manifest)
    else:
        print(f"nothing to do, {driver.counted(len(job.sources))} translated already: {job.args.output}")
    return driver.finish(job, manifest)


if __name__ == "__main__":
    cli.run(main)
