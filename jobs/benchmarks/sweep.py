"""Is a sweep worth its code? The same budget of training steps, spent in three ways, on a small real problem.

    tpe + asha     jobs.sweep as it is
    tpe            the same, every trial to its end
    random         values at random, every trial to its end

Earth at 16 px, small network; searched are the learning rate over four decades, its schedule and dropout; the first
trial of each search is the preset's own choice. A search is `jobs.sweep --num-workers 0`, one trial after the other in
a process of its own: what Ray adds is time, not losses. That time is measured apart: a sweep over Ray with ASHA, a
random one to the end, and its trainings one command after the other.
"""

import concurrent.futures
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_core import provenance, storage
from ddpm_core.errors import InputError
from jobs import prepare
from jobs.common import cli, intervals
from jobs.datasets import cache

SPACE = ("optim.learning_rate=1e-5:1e-1:log", "optim.lr_schedule=constant,cosine", "unet.dropout=0:0.3")
WAYS = {
    "tpe + asha": ("--search", "tpe", "--early-stopping", "asha"),
    "tpe": ("--search", "tpe", "--early-stopping", "none"),
    "random": ("--search", "random", "--early-stopping", "none"),
}
OURS, *OTHERS = WAYS
COLORS = {"tpe + asha": "#123", "tpe": "#e9a13b", "random": "#c44"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Best validation loss within a budget of training steps: jobs.sweep, TPE to the end, random search to the end."""

    output: str = "runs/benchmark/sweep"
    """Folder or s3:// prefix for sweep.json and sweep.png."""
    num_seeds: int = 16
    """Searches of each kind."""
    num_trials: int = 6
    """Trainings that are the budget, each to its end."""
    num_stopped_trials: int = 14
    """Trials that the search which stops them early may begin; it ends when the budget is spent."""
    epochs: int = 9
    """Of a training."""
    image_size: int = 16
    """Pixels of a side."""
    num_processes: int = 2
    """Searches at a time."""
    commands: bool = True
    """Time the commands too."""
    max_train_images: int = 512
    """Pairs to train on."""


def run(options: Options) -> int:
    """Search, count, write sweep.json and sweep.png, print the table."""
    if options.num_seeds < 2:
        raise InputError(f"--num-seeds is {options.num_seeds}; an interval needs 2 or more")
    output = storage.absolute(options.output, flag="--output")
    storage.check_writable(output)
    result: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "space": SPACE,
        "environment": provenance.environment(),
        "load_before": os.getloadavg(),
        "sweeps": [],
    }
    with tempfile.TemporaryDirectory(prefix="ddpm-benchmark-") as folder:
        os.environ[cache.ROOT] = f"{folder}/cache"
        data = f"{folder}/data"
        prepare.main(["earth", "--image-size", str(options.image_size), "--output", data])
        result["commands"] = timed(data, folder, options) if options.commands else {}
        with concurrent.futures.ThreadPoolExecutor(options.num_processes) as pool:
            seeds = range(options.num_seeds)
            pending = [pool.submit(search, data, folder, way, seed, options) for seed in seeds for way in WAYS]
            for done in pending:
                result["sweeps"].append(done.result())
                print(told(result["sweeps"][-1]), flush=True)
    result["budget"] = max(sum(row["steps"] or 0 for row in sweep["trials"]) for sweep in of(result, "random"))
    result["found"] = {way: [best_within(sweep, result["budget"]) for sweep in of(result, way)] for way in WAYS}
    result["ahead"] = {other: ahead(result["found"][OURS], result["found"][other]) for other in OTHERS}
    show(result)
    storage.write_bytes(storage.join(output, "sweep.json"), json.dumps(result, indent=2).encode())
    storage.write_bytes(storage.join(output, "sweep.png"), draw(result))
    print(f"written: {storage.join(output, 'sweep.json')}")
    return cli.DONE


def common(data: str, options: Options) -> list[str]:
    """Flags of the trainings."""
    flags = {
        "data": data,
        "preset": "smoke",
        "epochs": options.epochs,
        "max-train-images": options.max_train_images,
        "max-val-images": 128,
        "target-domain": "night",
        "sampling.num-steps": 1,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


# -- what the searches find -----------------------------------------------------------------------------------------


def search(data: str, folder: str, way: str, seed: int, options: Options) -> dict[str, Any]:
    """One search: its trials in the order they began in."""
    output = f"{folder}/{seed}-{way.replace(' ', '')}"
    sweep(data, output, way, options, "--num-workers", "0", "--search-seed", str(seed))
    trials = storage.read_json(f"{output}/results.json")["trials"]
    return {"way": way, "seed": seed, "trials": trials}


def sweep(data: str, output: str, way: str, options: Options, *more: str) -> float:
    """Seconds that the command takes."""
    count = options.num_stopped_trials if way == OURS else options.num_trials
    argv = [*common(data, options), "--output", output, "--num-trials", str(count), "--num-points", "0"]
    return command("jobs.sweep", [*argv, *WAYS[way], *more, "--space", *SPACE])


# -- what Ray adds --------------------------------------------------------------------------------------------------


def timed(data: str, folder: str, options: Options) -> dict[str, Any]:
    """Of each way to run trials their number and seconds: two sweeps, and trainings one command after the other."""
    found = {}
    for way in (OURS, "random"):
        seconds = sweep(data, f"{folder}/command-{way.replace(' ', '')}", way, options)
        found[way] = {"trials": options.num_stopped_trials if way == OURS else options.num_trials, "seconds": seconds}
    rows = storage.read_json(f"{folder}/command-random/results.json")["trials"]
    seconds = 0.0
    for row in rows:
        argv = [*common(data, options), "--output", f"{folder}/alone-{row['number']}", *flags(row["values"])]
        seconds += command("jobs.train", argv)
    return {**found, "one command after the other": {"trials": len(rows), "seconds": seconds}}


def flags(values: Mapping[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def command(module: str, argv: list[str]) -> float:
    """Seconds that a command takes. A training that diverges has taken its time, too."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True)
    if done.returncode not in (cli.DONE, cli.FAILED) or (done.returncode and "the losses were lost" not in done.stderr):
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.monotonic() - began


def of(result: dict[str, Any], way: str) -> list[dict[str, Any]]:
    return [sweep for sweep in result["sweeps"] if sweep["way"] == way]


def best_so_far(sweep: dict[str, Any]) -> list[tuple[int, float]]:
    """(training steps spent, lowest loss of a whole training) after each trial, in their order."""
    spent, best, found = 0, math.inf, []
    for row in sweep["trials"]:
        spent += row["steps"] or 0
        if row["state"] == "complete":
            best = min(best, row["loss"])
        found.append((spent, best))
    return found


def best_within(sweep: dict[str, Any], budget: int) -> float:
    return min((best for spent, best in best_so_far(sweep) if spent <= budget), default=math.inf)


def ahead(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Mean of theirs / ours - 1 over the seeds, by logarithms, with Student's interval."""
    logs = np.log(np.array(theirs) / np.array(ours))
    half = intervals.student_quantile(0.975, len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    mean = float(logs.mean())
    return {name: math.expm1(value) for name, value in {"mean": mean, "low": mean - half, "high": mean + half}.items()}


def told(sweep: dict[str, Any]) -> str:
    states = [row["state"] for row in sweep["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    steps = sum(row["steps"] or 0 for row in sweep["trials"])
    return f"{sweep['way']}, seed {sweep['seed']}: {counts}; {steps:,} steps; best {best_so_far(sweep)[-1][1]:.5f}"


def show(result: dict[str, Any]) -> None:
    seeds = range(result["options"]["num_seeds"])
    print(f"\nbest validation loss within {result['budget']:,} training steps")
    print(f"| search | {' | '.join(f'seed {seed}' for seed in seeds)} |")
    print("|---" * (len(seeds) + 1) + "|")
    for way, found in result["found"].items():
        print(f"| {way} | {' | '.join(f'{loss:.5f}' for loss in found)} |")
    for other, lead in result["ahead"].items():
        print(f"the loss of {other} is {lead['mean']:+.1%} of ours ({lead['low']:+.1%} to {lead['high']:+.1%})")
    for way, took in result["commands"].items():
        rate = 3600 * took["trials"] / took["seconds"]
        print(f"{way}: {took['trials']} trials in {took['seconds']:.0f} s, {rate:.0f} an hour")


def draw(result: dict[str, Any]) -> bytes:
    """Best so far against steps spent, a thin line a seed and a thick one for their mean; PNG."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6.4, 3.7), layout="constrained")
    axes = figure.add_subplot()
    grid = np.linspace(0, result["budget"], 200)
    for way in WAYS:
        lines = []
        for sweep in of(result, way):
            points = [(0, math.nan), *best_so_far(sweep)]
            lines.append([[best for spent, best in points if spent <= at][-1] for at in grid])
            axes.step(grid, np.where(np.isfinite(lines[-1]), lines[-1], np.nan), color=COLORS[way], alpha=0.25, lw=0.8)
        mean = np.exp(np.log(np.array(lines)).mean(axis=0))
        axes.step(grid, np.where(np.isfinite(mean), mean, np.nan), color=COLORS[way], linewidth=2.2, label=way)
    axes.set(xlabel="training steps spent", ylabel="lowest validation loss", yscale="log", ylim=(None, 0.1))
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
