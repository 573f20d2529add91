"""Where the time of training goes: before its first step, and, on request, within a few steps.

RUN/profile/  trace.json.gz    what the worker and its GPU did in a few steps; chrome://tracing shows it
              operators.txt    the operators that took the most time
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.profiler

from ddpm_core import storage

SKIP, WARM_UP, STEPS = 5, 2, 3
"""Steps that are let pass, traced and thrown away, and kept."""
NEEDED = SKIP + WARM_UP + STEPS
"""Steps that training must take for a trace."""
NUM_OPERATORS = 60


def tracer(run: str | None) -> Callable[[], None]:
    """What is to be called after every step, from the first one on; with None it does and costs nothing.

    `run` is the folder of the run, where the trace is written once its steps are done.
    """
    if run is None:
        return lambda: None
    from jobs.common import cluster  # not above: workers need its imports for nothing else

    def write(trace: torch.profiler.profile) -> None:
        with tempfile.TemporaryDirectory(prefix="trace") as folder:
            trace.export_chrome_trace(f"{folder}/trace.json.gz")
            content = Path(folder, "trace.json.gz").read_bytes()
        storage.write_bytes(storage.join(run, "profile", "trace.json.gz"), content)
        storage.write_bytes(storage.join(run, "profile", "operators.txt"), operators(trace).encode())

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=SKIP, warmup=WARM_UP, active=STEPS, repeat=1)
    trace = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write)
    trace.start()

    def done() -> None:
        if trace.step_num < NEEDED:
            with cluster.muted_stderr():  # the profiler tells that it starts and stops
                trace.step()
                if trace.step_num == NEEDED:
                    trace.stop()

    return done


def operators(trace: torch.profiler.profile) -> str:
    """The operators as a table, by the time that they took themselves."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = trace.key_averages().table(
        sort_by=f"self_{device}_time_total", row_limit=NUM_OPERATORS, max_name_column_width=60
    )
    return f"{STEPS} steps on {device}\n{table}\n"


# -- from command to first step -----------------------------------------------------------------------------------

Times = dict[str, float]
"""Seconds since the epoch at which each part of the start was done, in order; `command` is when it began."""


def note(times: Times, part: str) -> None:
    """`part` is done by now."""
    times[part] = time.time()


def spans(times: Times) -> dict[str, float]:
    """Seconds that each part took. Parts on several machines are as exact as their clocks."""
    names = list(times)
    return {name: round(times[name] - times[before], 3) for before, name in itertools.pairwise(names)}


def summary(seconds: dict[str, float], *, end: str = "first step") -> str:
    """One line, such as `first step after 12.3 s: imports 1.1, Ray 3.9, data 0.4, workers 6.0, first step 0.9`."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"{end} after {sum(seconds.values()):.1f} s: {parts}"
