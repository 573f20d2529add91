"""The mission's experiments: train what is missing, measure it, and write one table and report.

    python -m jobs.experiments --size smoke --output FOLDER
    ray job submit --address … --working-dir . -- python -m jobs.experiments --size gpu --output s3://…

The same command again goes on from there; more seeds or sections add to it. Every command is a
process of its own on some node of the cluster; one that fails costs what needs it and no more.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Literal

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import cli
from jobs.common.lock import exclusive
from jobs.common.progress import duration
from jobs.suite import plan as suite_plan
from jobs.suite import runner
from jobs.translation.options import check_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Which experiments, how large, and where to."""

    output: str
    """Folder or s3:// prefix for data sets, runs, evaluations, the table and report.html."""
    suite: Literal["mission"] = "mission"
    """The plan: what is trained, measured and claimed."""
    size: Literal["smoke", "cpu", "gpu"] = "cpu"
    """smoke: minutes, shows that all parts work; cpu: under two hours on two cores; gpu: a GPU for each command."""
    seeds: int = 3
    """Trainings of each kind, from different random numbers: intervals count the spread between them."""
    sections: tuple[str, ...] = ()
    """Only these parts, such as injection day2night; by default all that there are data for. The report has them."""
    celeba: str | None = None
    """Your copy of CelebA, as jobs.prepare celeba takes it: adds real faces."""
    snapshots: str | None = None
    """A folder or s3:// prefix of your own photographs, for the stress test."""
    judges: str | None = None
    """Encoders that measure, trained before; by default the suite trains its own."""
    commands_per_gpu: int = 1
    """Small trainings may share a GPU."""
    local_processes: int = 0
    """Run so many commands at a time on this machine, without Ray; by default Ray spreads them, one on each CPU."""
    dry_run: bool = False
    """List the commands that are missing, as you could type them, and do nothing."""


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Args, sys.argv[1:] if argv is None else argv, prog="jobs.experiments", description=__doc__)
    output = storage.absolute(args.output, flag="--output")
    plan = planned(args)
    per_gpu = args.commands_per_gpu if args.size == "gpu" else 0
    if args.dry_run:
        there = suite_plan.done(plan, output)
        missing = [command for command in suite_plan.ordered(plan.commands) if command.key not in there]
        for command in missing:
            print(suite_plan.command_line(command.module, suite_plan.argv(command, output)))
        slots = args.local_processes or per_gpu or os.cpu_count() or 1
        print(f"# {status(plan, there, missing, slots)}")
        return cli.DONE
    with exclusive(output):
        suite_plan.keep(plan, output)
        records = suite_plan.done(plan, output)
        missing = [command for command in plan.commands if command.key not in records]
        if missing:
            with starter_of(args.local_processes, per_gpu) as starter:
                print(status(plan, records, missing, starter.slots), flush=True)
                records = runner.run(plan, output, starter, report=lambda: write_report_so_far(plan, output))
        return write_report(plan, output, records)


@contextlib.contextmanager
def starter_of(local_processes: int, commands_per_gpu: int) -> Iterator[runner.Starter]:
    """What starts the commands; where it is Ray, Ray is up."""
    if local_processes:
        yield runner.LocalProcesses(local_processes)
    else:
        with cli.ray_session():
            yield runner.RayTasks.of_cluster(commands_per_gpu)


def planned(args: Args) -> suite_plan.Plan:
    """The plan that the options ask for.

    Raises:
        InputError: an option is wrong, in one line.
    """
    least = {"--seeds": (args.seeds, 1), "--commands-per-gpu": (args.commands_per_gpu, 1)}
    check_least({**least, "--local-processes": (args.local_processes, 0)})
    if args.commands_per_gpu > 1 and args.size != "gpu":
        raise InputError(f"--commands-per-gpu has no effect with --size {args.size}; leave it out")
    if args.local_processes and args.size == "gpu":
        raise InputError("--local-processes run without GPUs; leave it out with --size gpu")
    given = {"celeba": args.celeba, "snapshots": args.snapshots, "judges": args.judges}
    uris = {name: None if uri is None else storage.absolute(uri, flag=f"--{name}") for name, uri in given.items()}
    from jobs.suite.mission import mission

    return mission(size=args.size, seeds=args.seeds, sections=args.sections, **uris)


def status(
    plan: suite_plan.Plan, there: dict[str, suite_plan.Record], missing: list[suite_plan.Command], slots: int
) -> str:
    """What is done, and how long the rest may take, in one line."""
    text = f"{plan.name}, {plan.size}: {suite_plan.counted(plan.commands, there)} done"
    if not missing:
        return text
    return f"{text}; about {duration(suite_plan.estimate_s(missing, slots))} to go, {slots} at a time"


def write_report_so_far(plan: suite_plan.Plan, output: str) -> None:
    """Write the report of what there is."""
    from jobs.suite import report

    report.write(plan, output)
    print(f"report so far: {storage.join(output, 'report.html')}", flush=True)


def write_report(plan: suite_plan.Plan, output: str, records: dict[str, suite_plan.Record]) -> int:
    """Write the report, say what it claims and what is missing; the exit code."""
    from jobs.suite import report

    for verdict in report.write(plan, output):
        print(f"  {verdict.line}")
    print(f"report: {storage.join(output, 'report.html')}", flush=True)
    failed = [key for key, record in records.items() if record["state"] == "failed"]
    skipped = [key for key, record in records.items() if record["state"] == "skipped"]
    if not failed:
        return cli.DONE
    behind = f", and {len(skipped)} that need it did not run" if skipped else ""
    remedy = f"the logs are in {storage.join(output, 'logs')}, the same command tries again"
    print(f"failed: {', '.join(failed)}{behind}; {remedy}", file=sys.stderr)
    return cli.FAILED


if __name__ == "__main__":
    cli.run(main)
