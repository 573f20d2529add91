"""The experiments as their command sees them: what is missing is run, the report written, the end told."""

import contextlib
import os
import sys
from collections.abc import Iterator

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import cli, kinds, numbers
from jobs.common.lock import exclusive
from jobs.common.progress import duration
from jobs.suite import plan as suite_plan
from jobs.suite import report, runner
from jobs.suite.mission import mission
from jobs.suite.options import Args


def run(args: Args) -> int:
    """Do what is left to do; the exit code.

    Raises:
        InputError: an option is wrong, or another driver is at work in the folder.
    """
    output = storage.absolute(args.output, flag="--output")
    kinds.check_output(output, "experiments", {"--celeba": args.celeba, "--snapshots": args.snapshots})
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
    numbers.check(args)
    if args.commands_per_gpu > 1 and args.size != "gpu":
        raise InputError(f"--commands-per-gpu has no effect with --size {args.size}; leave it out")
    if args.local_processes and args.size == "gpu":
        raise InputError("--local-processes run without GPUs; leave it out with --size gpu")
    given = {"celeba": args.celeba, "snapshots": args.snapshots, "judges": args.judges}
    uris = {name: None if uri is None else storage.absolute(uri, flag=f"--{name}") for name, uri in given.items()}
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
    report.write(plan, output)
    print(f"report so far: {storage.join(output, 'report.html')}", flush=True)


def write_report(plan: suite_plan.Plan, output: str, records: dict[str, suite_plan.Record]) -> int:
    """Write the report, say what it claims and what is missing; the exit code."""
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
