"""Measure a checkpoint on held-out images, beside baselines that need no network.

    python -m jobs.evaluate --checkpoint RUN --data DATASET --output FOLDER
    python -m jobs.evaluate compare FOLDER FOLDER

Writes metrics.json (every figure with its interval, the sizes, seeds and nets), pictures.parquet and halves.parquet
(the figures of each image, and of each random half for KID), grid.png, report.html and README.md, the checkpoint's
model card with these figures. Baselines: a copy of the
source, and for true pairs the best per-pixel linear colour map fitted on train.
"""

import contextlib
import sys
from collections.abc import Sequence

from jobs.common import cli
from jobs.common.progress import Waiting


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if [*argv[:1]] == ["compare"]:
        from jobs.evaluation.compare import compare

        return compare(argv[1:])
    from jobs.evaluation.options import EvaluateArgs

    args = cli.parse(EvaluateArgs, argv, prog="jobs.evaluate", description=__doc__)
    with Waiting("evaluate") as waiting:
        waiting.at("loading PyTorch, the checkpoint and what tells of the data")
        from ddpm_core import storage
        from jobs.evaluation import driver  # seconds, which --help and a wrong flag need not wait for
        from jobs.evaluation.plan import finished, plan_evaluation

        job = plan_evaluation(args)
    report_uri = storage.join(job.args.output, "report.html")
    if finished(job):
        print(f"evaluated already: {report_uri}")
        return cli.DONE
    storage.check_writable(job.args.output)
    with contextlib.nullcontext() if args.num_workers == 0 else cli.ray_session():
        evaluation, files = driver.evaluate(job)
    for name, domain in evaluation["domains"].items():
        print(f"to {name}: {domain['headline']}")
        for verdict in domain["verdicts"]:
            print(f"  {verdict['text']} ({verdict['figures']})")
    driver.write(job, evaluation, files)
    print(f"report: {report_uri}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
