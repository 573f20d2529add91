"""`jobs.train` beside plain PyTorch, in one interleaved run on this machine, and its start beside Ray's own.

The job is the real one: Ray Train, draws made from the data set, checkpoints, metrics, what workers agree on after each
step. Plain is a loop in a process of its own: the same network, optimiser, clipping and averages of the weights, and
batches drawn in advance. They train in turns, so that what else the machine does strikes both; each process has one
thread. Shown are ratios, of wall time and of the processors' (all threads of the processes that train), which other
work on the machine disturbs less.

    one     one worker beside one plain loop, taking turns
    two     two workers (DDP) beside two plain loops that know nothing of each other, pair and pair taking turns
    start   seconds from the command to the first step: bare Ray Train, the job for the first time (the rows are read
            and decoded), the job again (they are on the node's disk)
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from ddpm_core import conditioning, diffusion, precision, provenance, schedule, storage
from ddpm_core.ema import EMA
from ddpm_core.errors import InputError
from ddpm_core.unet import UNet
from jobs import train
from jobs.common import cli
from jobs.datasets import writing
from jobs.datasets.cache import ROOT, load
from jobs.datasets.format import DatasetCard, Row, read_card
from jobs.training import checks, loop, profiling
from jobs.training.batches import Batch, HostBatch, Prefetcher, Sampler, Share
from jobs.training.options import TrainArgs

CPU = torch.device("cpu")
PATIENCE_S = 600.0
"""How long a turn may take; the first one waits for Ray to start."""

Part = Literal["one", "two", "start"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The job beside a plain loop: images a second, and seconds to the first step."""

    output: str = "runs/benchmark/train"
    """Folder or s3:// prefix for training.json."""
    parts: tuple[Part, ...] = ("one", "two", "start")
    """Which of the three."""
    turns: int = 10
    """Turns of each side that count."""
    steps: int = 16
    """Steps of a turn."""
    starts: int = 3
    """Starts of each kind."""
    image_size: int = 64
    """Side of the images, in pixels."""
    batch_size: int = 16
    """Images in a process's step."""
    model_channels: int = 32
    """Of the network: the mission's, narrow enough that a step on one core takes a part of a second."""


def run(options: Options) -> int:
    """Measure; write training.json; print the ratios."""
    check(options)
    output = storage.absolute(options.output, flag="--output")
    storage.check_writable(output)
    result: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "environment": provenance.environment(),
        "load_before": os.getloadavg(),
    }
    with tempfile.TemporaryDirectory(prefix="ddpm-benchmark-") as folder:
        os.environ.update({"OMP_NUM_THREADS": "1", ROOT: f"{folder}/cache"})  # of all processes from here on
        for part, num_workers in {"one": 1, "two": 2}.items():
            if part in options.parts:
                result[part] = overhead(options, num_workers, Path(folder) / part)
        if "start" in options.parts:
            result["start"] = start(options, Path(folder) / "start")
    storage.write_bytes(storage.join(output, "training.json"), json.dumps(result, indent=2).encode())
    print(f"written: {storage.join(output, 'training.json')}")
    return cli.DONE


def check(options: Options) -> None:
    for name in ("turns", "steps", "starts", "image_size", "batch_size", "model_channels"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be 1 or more")
    if not options.parts:
        raise InputError("--parts is empty; give at least one of one, two, start")
    if "two" in options.parts and (os.cpu_count() or 1) < 2:
        raise InputError("--parts two needs two cores; this machine has one")


# -- the job's steps and plain ones -------------------------------------------------------------------------------


def overhead(options: Options, num_workers: int, folder: Path) -> dict[str, Any]:
    """How many images a second the job's workers and as many plain loops train, and the ratio, turn by turn."""
    turns = options.turns + 2  # the first warms up; the job's last holds its final validation
    data, gates = str(folder / "data"), folder / "gates"
    gates.mkdir(parents=True)
    make_set(data, options, num_rows=options.steps * options.batch_size * num_workers)
    argv = command(data, str(folder / "run"), options, num_workers=num_workers, epochs=turns)
    teams = {who: [f"{who}-{rank}" for rank in range(num_workers)] for who in ("job", "plain")}
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=plain, args=(argv, gates, name, turns, options.steps), daemon=True)
        for name in teams["plain"]
    ]
    real, ended = loop.train_loop, threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        conducted = pool.submit(conduct, gates, teams, turns, ended)
        try:
            for process in processes:
                process.start()
            loop.train_loop = functools.partial(gated, gates, options.steps)
            code = train.main(argv)
            assert code == cli.DONE, code
            seconds = conducted.result()  # the last turn may be the plain loops'
        finally:
            ended.set()
            loop.train_loop = real
            for process in processes:
                process.terminate()
    return told(num_workers, seconds, pictures=options.steps * options.batch_size)


def told(num_workers: int, seconds: "Seconds", *, pictures: int) -> dict[str, Any]:
    """Rates and ratios; a line about them. `pictures` of each process in each turn."""
    found: dict[str, Any] = {"seconds": seconds}
    for kind, name in enumerate(("wall", "cpu")):
        rates = {
            who: [sum(pictures / each[kind] for each in turn) for turn in turns[1:-1]] for who, turns in seconds.items()
        }
        ratios = [job / alone for job, alone in zip(rates["job"], rates["plain"], strict=True)]
        found[name] = {
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "images_per_s": {who: statistics.median(each) for who, each in rates.items()},
        }
    wall, cpu = found["wall"], found["cpu"]
    low, high = np.percentile(wall["ratios"], [10, 90])
    workers = "one worker" if num_workers == 1 else f"{num_workers} workers"
    loops = "a plain loop" if num_workers == 1 else f"{num_workers} plain loops that know nothing of each other"
    print(
        f"{workers}: {wall['ratio']:.3f} of {loops} ({low:.3f} to {high:.3f} in 80 % of {len(wall['ratios'])} turns; "
        f"by processor time {cpu['ratio']:.3f}); "
        f"{wall['images_per_s']['job']:.1f} and {wall['images_per_s']['plain']:.1f} images/s",
        flush=True,
    )
    return found


def make_set(uri: str, options: Options, *, num_rows: int) -> None:
    """Pairs of noise: what a step costs does not depend on what is in the images."""
    size = options.image_size
    random = np.random.default_rng(0)

    def rows(split: str, count: int) -> Iterator[Row]:
        for number in range(count):
            source, target = random.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
            name = f"{split}-{number:06d}"
            yield Row(id=name, domain=0, image=source, target=target, target_id=name)

    card = DatasetCard(
        name="noise",
        licence="",
        source="",
        image_size=size,
        encoding="raw",
        domains=("day", "night"),
        pairing="paired",
    )
    writing.write_dataset(uri, {"train": rows("train", num_rows), "val": rows("val", 4)}, card)


def command(data: str, run: str, options: Options, *, num_workers: int, epochs: int) -> list[str]:
    """Arguments of `jobs.train`: an epoch is a turn; validated and stored at the end only."""
    width = str(options.model_channels)
    flags: dict[str, Any] = {
        "data": data,
        "output": run,
        "preset": "day2night-64",
        "num-workers": num_workers,
        "epochs": epochs,
        "global-batch-size": options.batch_size * num_workers,
        "validate-every-epochs": 10**6,
        "sampling.num-steps": 1,
        "unet.model-channels": width,
        "unet.condition-channels": width,
        "unet.num-res-blocks": 1,
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*argv, "--unet.channel-mult", "1", "2", "4", "4"]


class Gate:
    """Where a process of ours waits for its turn, and says how long it took: files in a folder of this machine, with
    the seconds by the clock and of the processors."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.turn = 0
        self.began = (0.0, 0.0)

    def begin(self) -> None:
        while not (self.folder / f"{self.name}-{self.turn}.go").exists():
            time.sleep(0.001)
        self.began = (time.perf_counter(), time.process_time())

    def end(self) -> None:
        seconds = (time.perf_counter() - self.began[0], time.process_time() - self.began[1])
        aside = self.folder / f"{self.name}-{self.turn}.part"
        aside.write_text(json.dumps(seconds))
        aside.rename(aside.with_suffix(".done"))
        self.turn += 1


Seconds = dict[str, list[list[list[float]]]]
"""Of each side, for each turn, of each of its processes: by the clock and of the processors."""


def conduct(folder: Path, teams: dict[str, list[str]], turns: int, ended: threading.Event) -> Seconds:
    """Let one team train after the other, each first in every second turn."""
    seconds: Seconds = {who: [] for who in teams}
    for turn in range(turns):
        for who in [*teams] if turn % 2 else [*reversed(teams)]:
            for name in teams[who]:
                (folder / f"{name}-{turn}.go").touch()
            seconds[who].append([_awaited(folder / f"{name}-{turn}.done", ended) for name in teams[who]])
    return seconds


def _awaited(file: Path, ended: threading.Event) -> list[float]:
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists():
        if ended.wait(0.002) and not file.exists():
            raise RuntimeError(f"training ended before its turn was over: {file.stem}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing of {file.stem} within {PATIENCE_S:g} s")
    return json.loads(file.read_text())


class GatedFeed(Prefetcher):
    """The job's batches, given out when it is the job's turn."""

    def __init__(self, gate: Gate, num_steps: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate, self.num_steps = gate, num_steps

    def __iter__(self) -> Iterator[HostBatch]:
        for step, draw in enumerate(super().__iter__()):
            if step % self.num_steps == 0:
                if step:
                    self.gate.end()
                self.gate.begin()
            yield draw
        self.gate.end()


def gated(folder: Path, num_steps: int, job: dict[str, Any]) -> dict[str, Any]:
    """`train_loop` in a worker of the job, taking turns."""
    import ray.train

    gate = Gate(folder, f"job-{ray.train.get_context().get_world_rank()}")
    loop.Prefetcher = functools.partial(GatedFeed, gate, num_steps)  # type: ignore[assignment,misc]
    return loop.train_loop(job)


def plain(argv: list[str], folder: Path, name: str, turns: int, num_steps: int) -> None:
    """The loop that one writes first, on batches in memory."""
    torch.set_num_threads(1)
    args = train.parse(argv)
    options, gate = args.options, Gate(folder, name)
    config = checks.model_config(read_card(args.data), options)
    batches = batches_of(args, num_steps)
    network = UNet(config)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=options.optim.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=options.optim.weight_decay,
        fused=True,
    )
    ema = EMA(network, sigma_rels=options.optim.ema_sigma_rels)
    abar = schedule.alphas_cumprod(config.diffusion)
    dtype = precision.resolve(options.precision, CPU)
    done = 0
    network.train()
    for _ in range(turns):
        gate.begin()
        for batch in batches:
            condition, domain = conditioning.drop(
                batch.condition, batch.domain, batch.dropped, batch.domain_dropped, len(config.domains)
            )
            x_t = diffusion.q_sample(batch.x_0, batch.t, batch.noise, abar)
            with precision.autocast(CPU, dtype):
                output = network(x_t, batch.t, condition, domain)
            loss = F.huber_loss(output.float(), batch.noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), options.optim.grad_clip)
            optimizer.step()
            done += 1
            ema.update(network, done)
        gate.end()


def batches_of(args: TrainArgs, count: int) -> list[Batch]:
    """The job's first batches, as rank 0 has them."""
    config = checks.model_config(read_card(args.data), args.options)
    rows = load(args.data, "train")
    share = Share(rank=0, world=args.workers[0])
    sampler = Sampler(rows, config, args.options)
    feed = Prefetcher(sampler, np.arange(len(rows)), share, start=0, stop=count, pin=False)
    return [draw.to(CPU, shown=config.shown) for draw in feed]


# -- from the command to the first step ---------------------------------------------------------------------------

BARE = """
import logging, os, sys, time
import ray, ray.train.torch

def loop(job):
    with open(job["file"], "w") as file:
        file.write(str(time.time()))

if __name__ == "__main__":
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    with open(sys.argv[1] + ".ray", "w") as file:
        file.write(str(time.time()))
    storing = ray.train.RunConfig(name="bare", storage_path=sys.argv[2])
    one = ray.train.ScalingConfig(num_workers=1)
    job = {"file": sys.argv[1]}
    ray.train.torch.TorchTrainer(loop, train_loop_config=job, scaling_config=one, run_config=storing).fit()
"""
"""A training by Ray that notes when its worker is there, and does nothing else."""
BARE_RAY = "bare Ray Train"


def start(options: Options, folder: Path) -> dict[str, Any]:
    """Medians of the seconds that each part of the start takes: of bare Ray Train, of the job, of the job again."""
    folder.mkdir(parents=True)
    (folder / "bare.py").write_text(BARE)
    data = str(folder / "data")
    make_set(data, options, num_rows=64)
    found: dict[str, list[dict[str, float]]] = {BARE_RAY: [], "first": [], "again": []}
    for number in range(options.starts):
        found[BARE_RAY].append(bare_start(folder, number))
        for kind in ("first", "again"):
            argv = command(data, str(folder / f"{kind}-{number}"), options, num_workers=1, epochs=1)
            found[kind].append(job_start(argv, cache=folder / f"cache-{number}"))
    for kind, spans in found.items():
        medians = {name: statistics.median(each[name] for each in spans) for name in spans[0]}
        print(f"{kind}: {profiling.summary(medians, end='worker' if kind == BARE_RAY else 'first step')}", flush=True)
    return found


def bare_start(folder: Path, number: int) -> dict[str, float]:
    """Imports and Ray are one: a script of a few lines imports nothing that Ray does not."""
    entered, began = folder / f"entered-{number}", time.time()
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    argv = [sys.executable, str(folder / "bare.py"), str(entered), str(folder / "bare")]
    subprocess.run(argv, check=True, capture_output=True, env={**os.environ, **quiet})
    there = float(Path(f"{entered}.ray").read_text())
    return {"imports and Ray": there - began, "workers": float(entered.read_text()) - there}


def job_start(argv: list[str], cache: Path) -> dict[str, float]:
    words, env = [sys.executable, "-m", "jobs.train", *argv], {**os.environ, ROOT: str(cache)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    run = argv[argv.index("--output") + 1]
    return json.loads((Path(run) / "environment.json").read_text())["attempts"][-1]["start_s"]
