"""Train a translation model on a data set.

    python -m jobs.train --data URI --output URI --preset demo
    ray job submit --address … --working-dir . -- python -m jobs.train --data s3://… --output s3://… --preset celeba-64

The same command again resumes. Ctrl-C or a kill loses at most the steps since the last checkpoint.
"""

import dataclasses
import sys
import time
from typing import TYPE_CHECKING

from jobs.common import cli

if TYPE_CHECKING:
    from jobs.training.options import TrainArgs


def main(argv: list[str] | None = None) -> int:
    times = {"command": time.time()}
    args = parse(sys.argv[1:] if argv is None else argv)
    from ddpm_core import checkpoint, storage  # seconds, which --help and a wrong flag need not wait for
    from jobs.common import kinds
    from jobs.datasets.format import read_card
    from jobs.training import checks, driver, fitting, origin, profiling, tracking

    dataset, run = storage.absolute(args.data, flag="--data"), storage.absolute(args.output, flag="--output")
    kinds.check_output(run, "run", {"--data": dataset})
    card, asked = read_card(dataset), checks.with_absolute_uris(args.options)
    options = fitting.fitted(asked, card, dataset, run, preset=args.preset, given=args.given)
    args = dataclasses.replace(args, output=run, options=options)
    if args.mlflow is not None:
        args = dataclasses.replace(args, mlflow=tracking.mlflow_uri(args.mlflow))
    config = checks.configured(args, dataset)
    if checks.finished(run, config, args.options):
        print(f"already trained: {run}")
        return cli.DONE
    storage.check_writable(run)
    for line in (*fitting.notes(asked, options, card), *origin.notes(config)):
        print(f"train: {line}", file=sys.stderr, flush=True)
    profiling.note(times, "imports")
    try:
        with cli.ray_session(start=args.workers[1] > 0):
            profiling.note(times, "Ray")
            driver.fit(args, config, dataset, run, times)
    except driver.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.FAILED
    best, _ = checkpoint.resolve(run)
    print(f"best checkpoint: {best}\nreport: {storage.join(run, 'report.html')}")
    return cli.DONE


def parse(argv: list[str]) -> "TrainArgs":
    from jobs.training.options import TrainArgs
    from jobs.training.presets import parse_from_preset

    return parse_from_preset(TrainArgs, argv, prog="jobs.train", description=__doc__ or "")


if __name__ == "__main__":
    cli.run(main)
