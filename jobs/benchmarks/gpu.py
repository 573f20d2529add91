"""The presets' networks on a GPU, within minutes and with little installed but PyTorch.

    device    the largest matrix product and copy: what the shares of the peak are shares of
    train     a step (forward, loss, backward, clipping, AdamW): images/s, share of the peak, memory, the first step
    forward   one pass, launched kernel by kernel and as a CUDA graph
    kinds     where the time of a training step goes, by kind of kernel
    peers     ours beside denoising-diffusion-pytorch and diffusers at equal parameters, where these are installed
    compiled  one of the peers under torch.compile beside ours
    sample    images drawn with the sampling defaults, 50 steps under guidance

Rows come in order of worth; each is printed, and written to gpu.json and gpu.md, as soon as it is there, so that a
kill loses nothing. A row that takes longer than its bound is stopped, one for which no time is left is named. Where a
batch does not fit into the GPU's memory, half of it is tried. Needs numpy and jaxtyping beside PyTorch.
"""

import collections
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ddpm_core.config import UNetConfig
from ddpm_core.errors import InputError
from jobs.common import cli
from jobs.training.networks import MISSION_64, MISSION_128

Kind = Literal["device", "train", "forward", "kinds", "peers", "compiled", "sample"]
Layout = Literal["nchw", "channels_last"]

NETWORKS: dict[str, tuple[UNetConfig, int]] = {
    "celeba-64": (MISSION_64, 64),
    "celeba-128": (MISSION_128, 128),
    "day2night-64": (MISSION_64, 64),
    "day2night-128": (MISSION_128, 128),
}
"""The presets that train on a GPU: network and side of the images."""
PASSES = (1, 8, 64)
"""Batches that requests come in."""
CARDS_GIB = (24, 40, 80)
"""Memory of the GPUs that batches are reckoned for."""
START_S = 60.0
"""What a process that measures may take until it measures: a cold disk."""
LEAST_SHARE = 0.5
"""A row is begun while this share of its bound is left."""

MEASURED, NO_ROOM, NO_TIME, FAILED = "measured", "does not fit", "left out for time", "failed"
"""How a row ends; text may follow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The presets' networks on a GPU: training steps, passes, sampling, memory, kernels; and the peers'."""

    output: str = "runs/benchmark/gpu"
    """Folder for gpu.json and gpu.md."""
    minutes: float = 8.0
    """All of it ends within this time."""
    device: str = "cuda"
    """cuda, or cpu to try the command."""
    tiny: bool = False
    """Networks and batches so small that a CPU is done in seconds: to try the command."""
    only: str = ""
    """Only rows whose name contains this, and the first."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Something to measure."""

    kind: Kind
    network: str = ""
    batch_size: int = 0
    layout: Layout = "channels_last"
    launched: bool = False
    """Kernel by kernel, and not as a graph."""
    bound_s: float = 60.0
    """When it is stopped."""

    @property
    def name(self) -> str:
        words = [self.kind, self.network, f"x {self.batch_size}" if self.batch_size else ""]
        words += ["nchw" if self.layout == "nchw" else "", "launched" if self.launched else ""]
        return " ".join(word for word in words if word)


@dataclasses.dataclass
class Result:
    """What became of a row."""

    row: Row
    outcome: str = MEASURED
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {told(value)}" for name, value in self.figures.items() if is_shown(value))
        end = [] if self.outcome == MEASURED else [self.outcome]
        return f"{self.row.name:<40} {'; '.join([*end, shown] if shown else end)}  [{self.seconds:.0f} s]"


def plan() -> list[Row]:
    """All rows, the most telling first."""
    return [
        Row("device", bound_s=30),
        Row("train", "celeba-64", 256),
        *(Row("forward", "celeba-64", size, bound_s=30) for size in PASSES),
        Row("kinds", "celeba-64", 256),
        Row("train", "celeba-64", 32, bound_s=30),
        Row("train", "celeba-128", 16, bound_s=30),
        Row("train", "celeba-128", 128),
        Row("train", "celeba-64", 256, launched=True),
        Row("train", "celeba-64", 32, launched=True, bound_s=30),
        Row("train", "celeba-64", 256, "nchw"),
        Row("peers", "37M", 256, bound_s=120),
        *(Row("sample", "celeba-64", size) for size in PASSES),
        Row("compiled", "lucidrains", 256, bound_s=90),
        Row("compiled", "diffusers", 256, bound_s=90),
        Row("kinds", "celeba-128", 16, bound_s=30),
        Row("train", "celeba-128", 128, "nchw"),
        Row("train", "day2night-64", 64, bound_s=30),
        Row("train", "day2night-128", 32, bound_s=30),
        *(Row("forward", "celeba-128", size, bound_s=30) for size in PASSES),
    ]


def run(options: Options) -> int:
    """Measure; write gpu.json and gpu.md; 3 where a row failed."""
    check(options)
    deadline = time.monotonic() + options.minutes * 60
    folder = Path(options.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in plan() if options.only in row.name or row.kind == "device"]
    worker = Worker(options, deadline)

    def report(results: Sequence[Result]) -> None:
        print(results[-1], flush=True)
        content = {"options": dataclasses.asdict(options), "rows": [dataclasses.asdict(each) for each in results]}
        write(folder / "gpu.json", json.dumps(content, indent=2))
        write(folder / "gpu.md", markdown(results))

    try:
        results = measure(rows, worker.measure, deadline, report)
    finally:
        worker.stop()
    print(f"\n{markdown(results)}\n\nwritten: {folder / 'gpu.json'} and gpu.md")
    return cli.SET_ASIDE if any(each.outcome.startswith(FAILED) for each in results) else cli.DONE


def check(options: Options) -> None:
    if not 0 < options.minutes < math.inf:
        raise InputError(f"--minutes is {options.minutes}; it must be positive")
    if options.device not in ("cuda", "cpu"):
        raise InputError(f"--device is {options.device}; it must be cuda or cpu")
    if not any(options.only in row.name for row in plan()):
        raise InputError(
            f"--only {options.only}: no row is called so; they are {', '.join(row.name for row in plan())}"
        )


def write(path: Path, text: str) -> None:
    """Whole or not at all; not by `ddpm_core.storage`, which needs pyarrow."""
    aside = path.with_name(f"{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def measure(
    rows: Iterable[Row],
    measured: Callable[[Row, list[Result]], Result],
    deadline: float,
    report: Callable[[list[Result]], None],
) -> list[Result]:
    """What became of each row: `measured(row, results so far)`, half its batch where that does not fit."""
    results: list[Result] = []
    todo = collections.deque(rows)
    while todo:
        row, left = todo.popleft(), deadline - time.monotonic()
        if left < LEAST_SHARE * row.bound_s:
            results.append(Result(row, NO_TIME))
        else:
            results.append(measured(row, results))
        if results[-1].outcome.startswith(NO_ROOM) and row.batch_size > 1:
            todo.appendleft(dataclasses.replace(row, batch_size=row.batch_size // 2))
        report(results)
    return results


class Worker:
    """The process that measures. One that hangs or dies, with its GPU's state, is replaced by a fresh one."""

    def __init__(self, options: Options, deadline: float, target: Callable[..., None] | None = None) -> None:
        self.options, self.deadline, self.target = options, deadline, target or serve
        self.process: multiprocessing.process.BaseProcess | None = None

    def measure(self, row: Row, before: Sequence[Result]) -> Result:
        """
        Raises:
            InputError: there is no such device, or not what measures it.
        """
        began, result = time.monotonic(), Result(row)
        try:
            if self.process is None:
                self._start()
            self.pipe.send((row, {each.row.kind: each.figures for each in before}))
            end = time.monotonic() + row.bound_s
            while not (message := self._message(end)).keys() & {"outcome"}:
                result.figures |= message["figures"]
            result.outcome = message["outcome"]
        except TimeoutError:
            result.outcome = f"not done after {time.monotonic() - began:.0f} s"
            self.stop()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            result.outcome = f"{FAILED}: the process that measured died"
            self.stop()
        result.seconds = time.monotonic() - began
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=self.target, args=(theirs, self.options), daemon=True)
        self.process.start()
        theirs.close()
        if refusal := self._message(time.monotonic() + START_S)["refusal"]:
            raise InputError(refusal)

    def _message(self, end: float) -> dict[str, Any]:
        """The next that the process says.

        Raises:
            TimeoutError: nothing until `end` or the deadline.
        """
        if not self.pipe.poll(max(min(end, self.deadline) - time.monotonic(), 0)):
            raise TimeoutError
        return self.pipe.recv()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def serve(pipe: multiprocessing.connection.Connection, options: Options) -> None:
    """What the process that measures runs: rows come in, their figures go out one by one, then the outcome."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started us ends us
    try:
        from jobs.benchmarks import gpu_rows  # seconds

        machine = gpu_rows.machine(options.device, tiny=options.tiny)
    except (InputError, ModuleNotFoundError) as error:
        pipe.send({"refusal": f"{error} (pip install torch numpy jaxtyping)" if hasattr(error, "path") else str(error)})
        return
    pipe.send({"refusal": ""})
    while True:
        try:
            row, known = pipe.recv()
        except EOFError:
            return
        outcome = gpu_rows.outcome(machine, row, known, lambda **figures: pipe.send({"figures": figures}))
        pipe.send({"outcome": outcome})


# -- what is shown ------------------------------------------------------------------------------------------------


def is_shown(value: Any) -> bool:
    return not isinstance(value, dict)


def told(value: Any) -> str:
    """A figure, to four digits where it has more."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(results: Sequence[Result]) -> str:
    """A table for each kind of row, and what they come to."""
    parts = []
    for kind in dict.fromkeys(each.row.kind for each in results):
        rows = [each for each in results if each.row.kind == kind]
        names = list(dict.fromkeys(name for each in rows for name, value in each.figures.items() if is_shown(value)))
        cells = [[each.row.name, *(told(each.figures.get(name, "–")) for name in names), each.outcome] for each in rows]
        lines = [[kind, *(name.replace("_", " ") for name in names), ""], ["---"] * (len(names) + 2), *cells]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts += ["\n".join(f"- {line}" for line in [*fitting(results), *against_peers(results)])]
    return "\n\n".join(part for part in parts if part)


def fitting(results: Sequence[Result]) -> list[str]:
    """How many images of a preset's step fit into cards, along the line through the two batches that were measured."""
    sizes: dict[str, dict[int, float]] = {}
    for each in results:
        row, gib = each.row, each.figures.get("reserved_gib")
        if row.kind == "train" and row.layout == "channels_last" and not row.launched and gib:
            sizes.setdefault(row.network, {})[row.batch_size] = gib
    lines = []
    for network, of_batch in sizes.items():
        if len(of_batch) > 1:
            few, many = min(of_batch), max(of_batch)
            slope = (of_batch[many] - of_batch[few]) / (many - few)
            base = of_batch[few] - slope * few
            fits = ", ".join(f"{max(int((card - base) / slope), 0)} images in {card} GiB" for card in CARDS_GIB)
            lines.append(f"{network}: {base:.1f} GiB and {slope:.3f} an image; {fits}")
    return lines


def against_peers(results: Sequence[Result]) -> list[str]:
    """Ours against each peer at its best, by layout and compilation."""
    best: dict[str, float] = {}
    for each in results:
        for name, value in each.figures.get("speeds", {}).items():
            best[name] = max(best.get(name, 0.0), value)
    ours = best.pop("ddpm-translate", None)
    return [f"a training step of ours is {ours / value:.2f} x {name}'s" for name, value in best.items() if ours]
