"""Running a plan's commands, each once: the same call again goes on from there.

Each is a process of its own, started by a Ray task on any node of the cluster, or by this process. What one needs comes
before it, what the first sections need before the rest, and then the longest way to the end.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import cli
from jobs.common.progress import Bar, duration, has_bars
from jobs.suite.plan import (
    Command,
    Plan,
    Record,
    argv,
    command_line,
    counted,
    digests,
    done,
    estimate_s,
    log_uri,
    needs,
    ordered,
    record_uri,
    urgency,
    ways,
)

GOOD = (cli.DONE, cli.SET_ASIDE)
"""Exit codes of a command that is done. A private photo without a face is set aside; that is a result, too."""
ATTEMPTS = 2
"""How often a command is begun whose process or node was lost."""
TAIL_LINES = 20
"""Last lines of a log that a command's record keeps."""
POLL_S = 0.05
"""How often a running command is looked at."""
LOG_EVERY_S = 30.0
"""How often the log of a running command is stored."""
LINE_EVERY_S, QUIET_S = 10.0, 300.0
"""Least time between two lines of progress, and the longest where nothing ends."""
STOP_S = 10.0
"""How long a command may take to end when it is told to."""
CPUS_PER_GPU = 4
"""At most so many threads feed a GPU."""


# ------------------------------------------------------------------------------------------------------- one command


def execute(
    module: str, words: list[str], log: str, *, use_gpu: bool, threads: int, stop: threading.Event | None = None
) -> Record:
    """Run one command as a process of its own; its output goes to the URI `log`.

    The process ends with the one that waits for it, however that ends, and when `stop` is set.
    """
    begun = time.monotonic()
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if not use_gpu:  # a process alone takes the GPU that it sees
        environment["CUDA_VISIBLE_DEVICES"] = ""
    stop = stop or threading.Event()
    with tempfile.TemporaryFile("w+", buffering=1, encoding="utf-8") as said:
        said.write(f"$ {command_line(module, words)}\n")
        command = [sys.executable, "-c", _UNTIL_PARENT_ENDS, str(os.getpid()), module, *words]
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            stored = begun
            while process.poll() is None and not stop.wait(POLL_S):
                if time.monotonic() >= stored + LOG_EVERY_S:
                    stored = time.monotonic()
                    with contextlib.suppress(InputError):  # the command itself meets the same store, and knows better
                        storage.write_bytes(log, _content(said))
        finally:
            _end(process)
            storage.write_bytes(log, _content(said))
        return {**_ending(process.returncode, _content(said)), "seconds": time.monotonic() - begun}


_UNTIL_PARENT_ENDS = """
import ctypes, os, signal, sys
if sys.platform == "linux":  # a process that is killed takes nothing with it by itself
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.getppid() == int(sys.argv[1]) or sys.exit("the parent has ended")
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""


def _content(said: TextIO) -> bytes:
    """All that was written; not by reading on, as the process that writes has the same place in the file."""
    return os.pread(said.fileno(), os.fstat(said.fileno()).st_size, 0)


def _ending(code: int, content: bytes) -> Record:
    """Exit code, last lines and the line that says what was wrong."""
    lines = [line for line in content.decode(errors="replace").splitlines()[1:] if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = errors[-1] if errors else lines[-1] if lines else f"exit code {code}"
    return {
        "exit_code": code,
        "node": platform.node(),
        "tail": lines[-TAIL_LINES:],
        "error": None if code in GOOD else f"killed by signal {-code}" if code < 0 else said,
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------ where commands run


class Starter(Protocol):
    """Starts commands as processes, somewhere; what `begin` returns stands for a running one."""

    @property
    def slots(self) -> int:
        """Commands that run at a time."""

    def begin(self, module: str, words: list[str], log: str) -> Any: ...

    def wait(self, running: Iterable[Any], timeout: float) -> Iterable[Any]:
        """Those of `running` that have ended, as soon as one has or after `timeout` seconds."""

    def ending(self, ended: Any) -> Record:
        """Exit code and the rest of the record; a negative code where the process or its node was lost."""

    def stop(self, running: Iterable[Any]) -> None:
        """End what runs, so that it has time to store what it has."""


class LocalProcesses:
    """Commands run on this machine, `slots` at a time, each on one core, without Ray."""

    def __init__(self, slots: int) -> None:
        self.slots, self.stopping = slots, threading.Event()
        self.threads = concurrent.futures.ThreadPoolExecutor(slots)

    def begin(self, module: str, words: list[str], log: str) -> "concurrent.futures.Future[Record]":
        return self.threads.submit(execute, module, words, log, use_gpu=False, threads=1, stop=self.stopping)

    def wait(self, running: Iterable[Any], timeout: float) -> Iterable[Any]:
        return concurrent.futures.wait(running, timeout, concurrent.futures.FIRST_COMPLETED).done

    def ending(self, ended: Any) -> Record:
        try:
            return ended.result()
        except InputError as error:  # the store, most likely
            return {"exit_code": None, "error": str(error)}

    def stop(self, running: Iterable[Any]) -> None:
        self.stopping.set()
        concurrent.futures.wait(running)


@dataclasses.dataclass(frozen=True)
class RayTasks:
    """Commands run on the nodes of the Ray that is up, each in a task that waits for it.

    The caller has imported torch before Ray came up: in a submitted job oneMKL ends the process that does it after.
    """

    cpus: int
    """Of one command."""
    commands_per_gpu: int
    """0: it gets no GPU."""

    @classmethod
    def of_cluster(cls, commands_per_gpu: int) -> "RayTasks":
        """Raises InputError where there is no GPU to share."""
        import ray

        there = ray.cluster_resources()
        if not commands_per_gpu:
            return cls(1, 0)
        gpus = there.get("GPU", 0.0)
        if gpus < 1:
            raise InputError("the cluster has no GPU; give --size cpu, or start Ray on machines that have one")
        cpus = int(there.get("CPU", 1.0) / gpus / commands_per_gpu)
        return cls(min(max(cpus, 1), CPUS_PER_GPU), commands_per_gpu)

    @property
    def slots(self) -> int:
        """Commands that run at a time: the cluster may grow, and lose nodes. One that has none is given one to wait
        for, so that an autoscaler hears of it."""
        import ray

        there = ray.cluster_resources()
        if self.commands_per_gpu:
            return max(int(there.get("GPU", 0.0)) * self.commands_per_gpu, 1)
        return max(int(there.get("CPU", 0.0)), 1)

    def begin(self, module: str, words: list[str], log: str) -> Any:
        import ray

        gpus = {"num_gpus": 1 / self.commands_per_gpu} if self.commands_per_gpu else {}
        task = ray.remote(execute).options(max_retries=0, scheduling_strategy="SPREAD", num_cpus=self.cpus, **gpus)
        return task.remote(module, words, log, use_gpu=bool(self.commands_per_gpu), threads=self.cpus)

    def wait(self, running: Iterable[Any], timeout: float) -> Iterable[Any]:
        import ray

        return ray.wait([*running], timeout=timeout)[0]

    def ending(self, ended: Any) -> Record:
        import ray

        try:
            return ray.get(ended)
        except ray.exceptions.RayTaskError as error:  # the store, most likely
            return {"exit_code": None, "error": str(cli.input_error(error) or str(error).splitlines()[-1])}
        except ray.exceptions.RayError as error:
            return {"exit_code": -signal.SIGKILL, "error": f"lost ({type(error).__name__})"}

    def stop(self, running: Iterable[Any]) -> None:
        import ray

        references = [*running]
        for reference in references:
            ray.cancel(reference)
        if references:
            ray.wait(references, num_returns=len(references), timeout=STOP_S + 2)


# ------------------------------------------------------------------------------------------------------ all commands


def run(plan: Plan, output: str, starter: Starter, *, report: Callable[[], object] = lambda: None) -> dict[str, Record]:
    """Run what is missing; the record of every command by key.

    `report` is called whenever all that a section needs has ended, but for the last one.
    """
    suite = _Suite(plan, output, starter, report)
    try:
        while suite.waiting or suite.running:
            suite.step()
    except BaseException:
        starter.stop(suite.running)
        raise
    finally:
        suite.progress.close()
    return suite.records


class _Suite:
    """Commands that wait, that run, and the records of those that have ended."""

    def __init__(self, plan: Plan, output: str, starter: Starter, report: Callable[[], object]) -> None:
        from ddpm_core import provenance  # torch, which the processes that wait for a command do without

        self.output, self.starter, self.report = output, starter, report
        self.records = done(plan, output)
        self.waiting = {each.key: each for each in ordered(plan.commands) if each.key not in self.records}
        self.running: dict[Any, Command] = {}
        self.digests, self.ways, self.urgency = digests(plan), ways(plan.commands), urgency(plan)
        self.attempts: dict[str, int] = {}
        environment = provenance.environment()
        self.source = {name: environment[name] for name in ("git_commit", "source_hash")}
        self.progress = _Progress(plan.commands, self.records)

    def step(self) -> None:
        """Begin what can begin, then wait for something to end."""
        self.skip()
        ended = {key for key, record in self.records.items() if record["state"] == "done"}
        ready = [command for command in self.waiting.values() if needs(command) <= ended]
        ready.sort(key=lambda command: (self.urgency[command.key], -self.ways[command.key]))
        slots = self.starter.slots
        for command in ready[: max(slots - len(self.running), 0)]:
            self.begin(command)
        self.progress.show(self.records, [each.key for each in self.running.values()], slots)
        if self.running:
            for handle in self.starter.wait(self.running, LINE_EVERY_S):
                self.end(handle)

    def skip(self) -> None:
        """Give up what waits for something that has failed; in order, so that it spreads."""
        bad = {key for key, record in self.records.items() if record["state"] != "done"}
        for command in [*self.waiting.values()]:
            if causes := needs(command) & bad:
                bad.add(command.key)
                del self.waiting[command.key]
                self.write(command, state="skipped", error=f"it needs {', '.join(sorted(causes))}")

    def begin(self, command: Command) -> None:
        self.waiting.pop(command.key, None)
        self.attempts[command.key] = self.attempts.get(command.key, 0) + 1
        words = argv(command, self.output)
        self.running[self.starter.begin(command.module, words, log_uri(self.output, command.key))] = command

    def end(self, handle: Any) -> None:
        command, ending = self.running.pop(handle), self.starter.ending(handle)
        killed = ending["exit_code"] is not None and ending["exit_code"] < 0
        if killed and self.attempts[command.key] < ATTEMPTS:
            self.progress.say(f"{command.key}: {ending['error']}; once more")
            self.begin(command)
        else:
            self.ended(command, ending)

    def ended(self, command: Command, ending: Record) -> None:
        self.write(command, state="done" if ending["exit_code"] in GOOD else "failed", **ending)
        place = self.urgency[command.key]
        left = {self.urgency[each.key] for each in (*self.waiting.values(), *self.running.values())}
        if left and place not in left:
            try:
                self.report()
            except InputError as error:  # there is another at the end
                self.progress.say(f"no report yet: {error}")

    def write(self, command: Command, **facts: Any) -> None:
        """Keep the record of a command that has ended."""
        record = {
            "key": command.key,
            "module": command.module,
            "argv": argv(command, self.output),
            "digest": self.digests[command.key],
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "attempts": self.attempts.get(command.key, 0),
            "exit_code": None,
            "seconds": None,
            "node": None,
            "tail": [],
            "error": None,
            **self.source,
            **facts,
        }
        self.records[command.key] = record
        storage.write_bytes(record_uri(self.output, command.key), json.dumps(record, indent=1).encode())
        if record["state"] != "done":
            self.progress.say(f"{record['state']}: {command.key}: {record['error']}")


# ---------------------------------------------------------------------------------------------------------- progress


class _Progress:
    """What is done, what runs and how long it may still take: a bar on a terminal, lines in a log."""

    def __init__(self, commands: tuple[Command, ...], records: dict[str, Record], stream: TextIO | None = None) -> None:
        self.commands, self.before = commands, {*records}
        self.stream = sys.stderr if stream is None else stream
        self.since: dict[str, float] = {}
        self.last_line, self.last_count = -LINE_EVERY_S, -1
        self.bar = Bar("experiments", self.stream, total=1.0) if has_bars(self.stream) else None

    def show(self, records: dict[str, Record], running: list[str], slots: int) -> None:
        """Say how things stand, where something has changed or was not said for long."""
        now = time.monotonic()
        self.since = {key: self.since.get(key, now) for key in running}
        left, share = self.left_s(records, slots, now)
        good = {key for key, record in records.items() if record["state"] == "done"}
        parts = [f"about {duration(left)} left", counted(self.commands, good)]
        if running:
            parts.append("now " + ", ".join(f"{key} ({duration(now - self.since[key])})" for key in running[:4]))
        if len(running) > 4:
            parts.append(f"{len(running) - 4} more")
        if self.bar is not None:
            self.bar.show(share, "; ".join(parts))
            return
        quiet = now - self.last_line
        if quiet >= QUIET_S or (quiet >= LINE_EVERY_S and len(records) != self.last_count):
            self.last_line, self.last_count = now, len(records)
            print(f"experiments: {'; '.join(parts)}", file=self.stream, flush=True)

    def left_s(self, records: dict[str, Record], slots: int, now: float) -> tuple[float, float]:
        """Seconds left, by the costs as those of each kind have turned out so far, and the share that is done."""
        took: dict[str, list[tuple[float, float]]] = {}
        for each in self.commands:
            if each.key not in self.before and (seconds := records.get(each.key, {}).get("seconds")):
                took.setdefault(each.module, []).append((each.cost, seconds))
        scales = {
            module: sum(seconds for _, seconds in pairs) / max(sum(cost for cost, _ in pairs), 1e-9)
            for module, pairs in took.items()
        }
        costs = {each.key: each.cost * scales.get(each.module, 1.0) for each in self.commands}
        left = [
            dataclasses.replace(each, cost=max(costs[each.key] - (now - self.since.get(each.key, now)), 0.0))
            for each in self.commands
            if each.key not in records
        ]
        return estimate_s(left, slots), 1 - sum(each.cost for each in left) / max(sum(costs.values()), 1e-9)

    def say(self, line: str) -> None:
        """A line beside the bar."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
