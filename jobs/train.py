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
from jobs.common.progress import Waiting

if TYPE_CHECKING:
    from jobs.training.options import TrainArgs


def main(argv: list[str] | None = None) -> int:
    times = {"command": time.time()}
    args = parse(sys.argv[1:] if argv is None else argv)
    with Waiting("train") as waiting:
        waiting.at("loading PyTorch and Ray")
        return trained(args, times, waiting)


def trained(args: "TrainArgs", times: dict[str, float], waiting: Waiting) -> int:
    """The exit code."""
    from ddpm_core import checkpoint, storage  # seconds, which --help and a wrong flag need not wait for
    from ddpm_core.errors import InputError
    from jobs.common import kinds
    from jobs.common.intervals import ENOUGH
    from jobs.datasets.format import read_card
    from jobs.training import checks, driver, fitting, origin, profiling, tracking

    dataset, run = storage.absolute(args.data, flag="--data"), storage.absolute(args.output, flag="--output")
    kinds.check_output(run, "run", {"--data": dataset})
    waiting.at("looking at the data and the run's folder")
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
    waiting.at("" if args.workers[1] else "loading Ray")  # its start speaks for itself
    try:
        with cli.ray_session(start=args.workers[1] > 0):
            profiling.note(times, "Ray")
            driver.fit(args, config, dataset, run, times, waiting=waiting)
    except driver.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.FAILED
    best, found = checkpoint.resolve(run)
    if "metric" not in found:
        raise InputError(f"{run} was removed or begun anew by another command while it was trained; train it again")
    if (chosen_on := found["metric"].get("num_images", ENOUGH)) < ENOUGH:
        print(f"the best checkpoint is the best of {chosen_on} validation images: too few to tell it from the others")
    print(f"best checkpoint: {best}\nreport: {storage.join(run, 'report.html')}")
    return cli.DONE


def parse(argv: list[str]) -> "TrainArgs":
    from jobs.training.options import TrainArgs
    from jobs.training.presets import parse_from_preset

    return parse_from_preset(TrainArgs, argv, prog="jobs.train", description=__doc__ or "")


if __name__ == "__main__":
    cli.run(main)
