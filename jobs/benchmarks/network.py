"""The network beside its peers', in one interleaved run on this machine.

Peers: the U-Nets of denoising-diffusion-pytorch (lucidrains) and of diffusers, at equal parameter count, each in the
layout and precision that suits it best. Shown are ratios: these machines are noisy. Three parts:

    step      a training step (forward, backward, AdamW) and a forward pass, as images/s and share of the peak
    memory    the most a training step held, each network in a process of its own
    race      denoising loss on held-out tiles of the Earth after equal wall time, the networks taking turns

Needs the extra `bench`.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_core import diffusion, images, provenance, schedule, storage
from ddpm_core.config import DiffusionConfig
from ddpm_core.ema import EMA
from ddpm_core.errors import InputError
from jobs.benchmarks.contenders import BATCH_SIZE, IMAGE_SIZE, Layout, Network, Size, Stepper, import_peers, networks
from jobs.common import cli
from jobs.datasets import cache

SAMPLING_STEPS = 50
"""Network evaluations an image that sampling is reckoned with."""
TURN_S = 5.0
"""How long each network trains before it is the next one's turn."""
CURVE_POINTS = 6
"""Validations over the race."""
NUM_VALIDATION = 256
"""Fixed (tile, timestep, noise) triples that the denoising loss is measured on."""

Part = Literal["step", "memory", "race"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Our network beside those of denoising-diffusion-pytorch and diffusers: steps, memory, denoising loss."""

    output: str = "runs/benchmark/network"
    """Folder or s3:// prefix for network.json and race.png."""
    parts: tuple[Part, ...] = ("step", "memory", "race")
    """Which of the three."""
    sizes: tuple[Size, ...] = ("9M", "35M")
    """Parameter counts for step and memory; the race is run by the first."""
    rounds: int = 4
    """Times each training step is measured; medians are shown."""
    race_s: float = 180.0
    """Wall seconds of training for each network and learning rate."""
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Peak learning rates; each network is shown at its best."""
    num_threads: int = os.cpu_count() or 1
    """Threads of the process, on CPUs."""


def run(args: Options) -> int:
    check(args)
    output = storage.absolute(args.output, flag="--output")
    storage.check_writable(output)
    import_peers()
    torch.set_num_threads(args.num_threads)
    result: dict[str, Any] = {"args": dataclasses.asdict(args), "environment": provenance.environment()}
    if "memory" in args.parts:  # first: a child process starts with what its parent holds
        result["memory"] = [row for size in args.sizes for row in measure_memory(size)]
    if "step" in args.parts:
        result["peak_gflops"] = measure_peak()
        result["step"] = [row for size in args.sizes for row in measure_steps(size, args, result["peak_gflops"])]
    if "race" in args.parts:
        result["race"] = race(args)
        storage.write_bytes(storage.join(output, "race.png"), draw_race(result["race"]))
    storage.write_bytes(storage.join(output, "network.json"), json.dumps(result, indent=2).encode())
    print(f"written: {storage.join(output, 'network.json')}")
    return cli.DONE


def check(args: Options) -> None:
    for flag, value in {"--rounds": args.rounds, "--race-s": args.race_s, "--num-threads": args.num_threads}.items():
        if not 0 < value < math.inf:
            raise InputError(f"{flag} is {value}; it must be positive")
    for flag, given in {"--parts": args.parts, "--sizes": args.sizes, "--learning-rates": args.learning_rates}.items():
        if not given:
            raise InputError(f"{flag} is empty; give at least one")


# -- one training step --------------------------------------------------------------------------------------------


def measure_steps(size: Size, args: Options, peak: dict[str, float]) -> list[dict[str, Any]]:
    """Every network in each precision and layout, taking turns; a table, and how much faster ours is."""
    layouts: tuple[Layout, ...] = ("nchw", "channels_last")
    variants = itertools.product(networks(size), ("fp32", "bf16"), layouts)
    steppers = [Stepper(network, precision=precision, layout=layout) for network, precision, layout in variants]
    batch = steppers[0].random_batch()
    for _ in range(args.rounds + 1):
        for stepper in steppers:
            with timed(stepper.step_s):
                stepper.step(*batch)
            with timed(stepper.forward_s), torch.no_grad():
                stepper.eps(*batch[:3])
    rows = []
    for stepper in steppers:
        step_s, forward_s = (statistics.median(times[1:]) for times in (stepper.step_s, stepper.forward_s))
        flops = stepper.flops_a_image()
        rows.append(
            {
                "size": size,
                "network": stepper.network.name,
                "precision": stepper.precision,
                "layout": stepper.layout,
                "parameters": stepper.num_parameters,
                "gflop_a_picture": flops / 1e9,
                "train_images_per_s": BATCH_SIZE / step_s,
                "sampled_images_per_s": BATCH_SIZE / forward_s / SAMPLING_STEPS,
                "gflops": flops * BATCH_SIZE / step_s / 1e9,
                "share_of_peak": flops * BATCH_SIZE / step_s / 1e9 / peak[stepper.precision],
                "step_s": stepper.step_s[1:],
                "forward_s": stepper.forward_s[1:],
            }
        )
    show_steps(size, rows)
    return rows


def show_steps(size: Size, rows: list[dict[str, Any]]) -> None:
    print(f"\n{size}, training step of {BATCH_SIZE} images of {IMAGE_SIZE} px; medians")
    print("| network | precision, layout | parameters | GFLOP/image | trained/s | share of peak | sampled/s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['network']} | {row['precision']} {row['layout']} | {row['parameters'] / 1e6:.2f} M "
            f"| {row['gflop_a_picture']:.1f} | {row['train_images_per_s']:.2f} | {row['share_of_peak']:.0%} "
            f"| {row['sampled_images_per_s']:.2f} |"
        )
    for figure, what in {"train_images_per_s": "a training step", "sampled_images_per_s": "sampling"}.items():
        for precision in ("fp32", "bf16"):
            best: dict[str, float] = {}
            for row in rows:
                if row["precision"] == precision:
                    best[row["network"]] = max(best.get(row["network"], 0.0), row[figure])
            ours = best.pop("ddpm-translate")
            ratios = ", ".join(f"{ours / value:.2f} x {name}" for name, value in best.items())
            print(f"{size} {precision} {what}, each in its best layout: {ratios}")


@contextlib.contextmanager
def timed(into: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    into.append(time.perf_counter() - started)


def measure_peak() -> dict[str, float]:
    """GFLOP/s of the fastest matrix product or convolution of networks like these, for each precision."""
    best: dict[str, float] = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        a, b = torch.randn(2, 2048, 2048, dtype=dtype)
        work: list[tuple[float, Callable[[], Tensor]]] = [(2.0 * 2048**3, functools.partial(torch.mm, a, b))]
        for channels, side in ((64, 64), (128, 32), (256, 16)):
            x = torch.randn(16, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
            w = torch.randn(channels, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
            convolve = functools.partial(nn.functional.conv2d, x, w, padding=1)
            work.append((2.0 * 9 * channels**2 * 16 * side**2, convolve))
        with torch.no_grad():
            for flops, deed in work:
                times: list[float] = []
                for _ in range(12):
                    with timed(times):
                        deed()
                best[name] = max(best.get(name, 0.0), flops / min(times) / 1e9)
    print("measured peak: " + ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in best.items()))
    return best


# -- memory -------------------------------------------------------------------------------------------------------


def measure_memory(size: Size) -> list[dict[str, Any]]:
    """The most that a process held while training in bf16, beside what it held before it made the network."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for index, network in enumerate(networks(size)):
        with context.Pool(1) as pool:
            before, peak = pool.apply(_peak_bytes, (size, index))
        rows.append({"size": size, "network": network.name, "peak_bytes": peak - before})
        print(f"{size} {network.name}: a bf16 training step held {(peak - before) / 2**30:.2f} GiB")
    return rows


def _peak_bytes(size: Size, index: int) -> tuple[int, int]:
    import_peers()
    before = _status_bytes("VmRSS")
    stepper = Stepper(networks(size)[index], precision="bf16", layout="channels_last")
    for _ in range(3):
        stepper.step(*stepper.random_batch())
    return before, _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# -- the race -----------------------------------------------------------------------------------------------------


class Racer:
    """A network in training on the Earth, with a clock of its own and the average of its weights."""

    def __init__(self, network: Network, learning_rate: float, track: "Track", seconds: float) -> None:
        # bf16; diffusers loses with channels_last (the step table shows it), the others win
        layout: Layout = "nchw" if network.name == "diffusers" else "channels_last"
        self.stepper = Stepper(network, precision="bf16", layout=layout)
        self.network, self.learning_rate, self.track, self.seconds = network, learning_rate, track, seconds
        self.clock_s, self.steps = 0.0, 0
        self.ema = EMA(self.stepper.net, sigma_rels=(0.1,))
        self.curve: list[tuple[float, float]] = []

    def train(self, until_s: float) -> None:
        while self.clock_s < until_s:
            started = time.perf_counter()
            rate = self.learning_rate * min(1.0, (self.steps + 1) / 30)
            rate *= 0.5 * (1 + math.cos(math.pi * min(self.clock_s / self.seconds, 1.0)))
            for group in self.stepper.optimizer.param_groups:
                group["lr"] = rate
            self.stepper.step(*self.track.batch(self.steps))
            self.steps += 1
            self.ema.update(self.stepper.net, self.steps)
            self.clock_s += time.perf_counter() - started

    @torch.no_grad()
    def validate(self) -> float:
        """Mean squared error of eps by the averaged weights on the fixed held-out triples."""
        (average,) = self.ema.tracks.values()
        errors = [
            (self.stepper.eps(x_t, condition, t, average.eval()) - noise).square().mean()
            for x_t, condition, t, noise in self.track.validation
        ]
        loss = float(torch.stack(errors).mean())
        self.curve.append((self.clock_s, loss))
        return loss


class Track:
    """Day and night of the Earth, and the same sequence of batches for every racer."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            from jobs import prepare

            prepare.main(["earth", "--image-size", str(IMAGE_SIZE), "--output", folder])
            # without Ray, so that nothing runs beside what is measured
            self.train, test = (cache.load(folder, split) for split in ("train", "test"))
        self.abar = schedule.alphas_cumprod(DiffusionConfig())
        rows = np.linspace(0, len(test) - 1, NUM_VALIDATION).round().astype(int)
        t = (torch.arange(NUM_VALIDATION) * 0.618034 % 1 * 1000).long()
        noise = torch.randn(NUM_VALIDATION, 3, IMAGE_SIZE, IMAGE_SIZE, generator=diffusion.seeded("race"))
        chunks = [slice(i, i + 32) for i in range(0, NUM_VALIDATION, 32)]
        self.validation = [self.noised(test, rows[chunk], t[chunk], noise[chunk]) for chunk in chunks]

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = diffusion.seeded("race", step)
        rows = torch.randint(0, len(self.train), (BATCH_SIZE,), generator=generator).numpy()
        t = torch.randint(0, 1000, (BATCH_SIZE,), generator=generator)
        noise = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return self.noised(self.train, rows, t, noise)

    def noised(
        self, pairs: cache.SplitArrays, rows: np.ndarray, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        day, night = images.to_tensor(pairs.images(rows)), images.to_tensor(pairs.targets(rows))
        return diffusion.q_sample(night, t, noise, self.abar), day, t, noise


def race(args: Options) -> list[dict[str, Any]]:
    """Each network at each learning rate for the same wall time; the loss of each, at its best rate."""
    track = Track()
    entries = itertools.product(networks(args.sizes[0]), args.learning_rates)
    racers = [Racer(network, rate, track, args.race_s) for network, rate in entries]
    turns = max(math.ceil(args.race_s / TURN_S), 1)
    for turn in range(1, turns + 1):
        for racer in racers:
            racer.train(args.race_s * turn / turns)
            if turn * CURVE_POINTS // turns > (turn - 1) * CURVE_POINTS // turns:
                racer.validate()
        left_s = args.race_s * (1 - turn / turns) * len(racers)
        print(f"\rrace: {turn / turns:.0%}, {left_s:.0f} s of training left", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows: list[dict[str, Any]] = [
        {
            "network": racer.network.name,
            "learning_rate": racer.learning_rate,
            "parameters": racer.stepper.num_parameters,
            "steps": racer.steps,
            "loss": racer.curve[-1][1],
            "curve": racer.curve,
        }
        for racer in racers
    ]
    print(f"\nrace: denoising loss (mean squared error of eps, held-out tiles) after {args.race_s:.0f} s of wall time")
    print("| network | learning rate | steps | loss |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['network']} | {row['learning_rate']:g} | {row['steps']} | {row['loss']:.5f} |")
    best = {name: min(row["loss"] for row in rows if row["network"] == name) for name in {r["network"] for r in rows}}
    ours = best.pop("ddpm-translate")
    print("each at its best rate, ours is " + ", ".join(f"{ours / v:.2f} x {k}'s" for k, v in sorted(best.items())))
    return rows


def draw_race(rows: list[dict[str, Any]]) -> bytes:
    """Loss over wall time, a line for each network at its best learning rate; PNG."""
    import io

    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["network"] for row in rows):
        row = min((row for row in rows if row["network"] == name), key=lambda row: row["loss"])
        axes.plot(*zip(*row["curve"], strict=True), marker="o", label=f"{name}, lr {row['learning_rate']:g}")
    axes.set(xlabel="wall seconds of training", ylabel="denoising loss, held-out tiles", yscale="log")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
