"""Tune a recipe: the learning rate by training, the guidance weight by measuring what the best network makes.

    python -m jobs.sweep --data URI --output URI --preset demo --num-trials 16 --num-points 100
    ray job submit --address … --working-dir . -- python -m jobs.sweep --data s3://… --output s3://… --use-gpu

Stage 1 trains: each trial is a run of jobs.train in OUTPUT/trials, stopped early by ASHA on the fixed-noise validation
loss; the first is the preset as it is. Stage 2 samples: options of sampling on the best network's frozen checkpoint,
judged by realism, faithfulness, identity and cost at once. Both winners are then measured on fresh noise beside the
preset's own values. OUTPUT/best.json makes the folder a --checkpoint that translates as was found best.

The same command goes on where it was; a larger --num-trials or --num-points adds to what is there.
"""

import json
import sys
from typing import TYPE_CHECKING

from jobs.common import cli
from jobs.common.progress import Waiting

if TYPE_CHECKING:
    from jobs.tuning.options import SweepArgs


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    with Waiting("sweep") as waiting:
        waiting.at("loading PyTorch and Ray, and what tells of the data")
        from ddpm_core import storage
        from jobs.common.lock import exclusive  # seconds, which --help and a wrong flag need not wait for
        from jobs.tuning.plan import described, finished, plan_sweep, same_as_before

        job = plan_sweep(args)
    output = job.args.output
    report_uri = storage.join(output, "report.html")
    description = described(job)
    if same_as_before(job, description) and finished(job):
        print(f"tuned already: {report_uri}")
        return cli.DONE
    storage.check_writable(output)
    with cli.ray_session(start=job.args.num_workers > 0):
        from jobs.tuning.driver import Sweep
        from jobs.tuning.study import SweepError

        with exclusive(output):
            storage.write_bytes(storage.join(output, "sweep.json"), json.dumps(description, indent=2).encode())
            try:
                Sweep(job, description).run()
            except SweepError as error:
                print(f"error: {error}", file=sys.stderr)
                return cli.FAILED
            finally:
                storage.clear_debris(output)  # of trials that were stopped in the middle of a file
    print(f"best: {output} (take it for --checkpoint)\nreport: {report_uri}")
    return cli.DONE


def parse(argv: list[str]) -> "SweepArgs":
    """The preset first, then the flags that change it."""
    from ddpm_core.errors import InputError
    from jobs.training.presets import parse_from_preset
    from jobs.tuning.options import SweepArgs

    for flag in ("--space", "--prefer"):
        if argv.count(flag) > 1:  # the last would silently be all
            raise InputError(f"{flag} is given {argv.count(flag)} times; give all of them behind one {flag}")
    return parse_from_preset(SweepArgs, argv, prog="jobs.sweep", description=__doc__ or "")


if __name__ == "__main__":
    cli.run(main)
