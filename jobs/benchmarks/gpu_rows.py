"""What `jobs.benchmark gpu` measures, a function for each kind of row, in a process of its own."""

import dataclasses
import functools
import gc
import importlib.util
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
import torch.profiler
from torch import Tensor

from ddpm_core import guidance, precision, provenance, samplers, schedule
from ddpm_core.config import DiffusionConfig, SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.graphs import Graphed
from jobs.benchmarks import contenders
from jobs.benchmarks.contenders import Layout, Network, Stepper
from jobs.benchmarks.gpu import FAILED, MEASURED, NETWORKS, NO_ROOM, Row
from jobs.common import cluster

GIB = 2**30
ROUNDS, TURN_S, MOST_CALLS = 5, 0.4, 200
"""Turns of each call that is timed, about how long one is, and how many calls at most."""


class Tell(Protocol):
    def __call__(self, **figures: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is measured on, and how closely."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def network(self, name: str) -> Network:
        """The network of a preset, or one among the peers."""
        if name not in NETWORKS:
            network = {each.name: each for each in contenders.networks("tiny" if self.tiny else "35M")}[name]
            return dataclasses.replace(network, image_size=16) if self.tiny else network
        unet, image_size = NETWORKS[name]
        if self.tiny:
            small: Any = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "head_channels": 8}
            unet, image_size = dataclasses.replace(unet, condition_channels=8, attn_resolutions=(8,), **small), 8
        return contenders.ours(name, unet, image_size)

    def stepper(self, network: Network, layout: Layout, *, compiled: bool = False, launched: bool = False) -> Stepper:
        """Its steps are graphs, as `jobs.train` takes them, but where they are to be launched kernel by kernel."""
        return Stepper(
            network,
            precision=self.precision,
            layout=layout,
            device=self.device,
            compiled=compiled,
            graphed=self.is_gpu and not launched,
        )

    def batch_size(self, row: Row) -> int:
        return min(row.batch_size, 2) if self.tiny else row.batch_size

    def timed(self, call: Callable[[], object], count: int = 1) -> float:
        """Seconds of a call, of `count` in a row, on the device's clock."""
        if not self.is_gpu:
            began = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - began) / count
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / count

    def medians(self, calls: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS) -> dict[str, float]:
        """Median seconds of each call; they take turns. Each was called before, so that what it needs is there."""
        first = {name: self.timed(call) for name, call in calls.items()}
        if self.tiny:
            return first
        counts = {name: min(max(round(TURN_S / seconds), 1), MOST_CALLS) for name, seconds in first.items()}
        turns: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                if len(calls) > 1 and counts[name] > 1:
                    call()  # memory that the others gave back is taken again
                turns[name].append(self.timed(call, counts[name]))
        return {name: statistics.median(seconds) for name, seconds in turns.items()}


def machine(device: str, *, tiny: bool) -> Machine:
    """
    Raises:
        InputError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no GPU is there; --device cpu --tiny tries the command without")
    if tiny:
        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")  # compiling takes longer than all the rest
    where = torch.device(device)
    return Machine(where, precision.resolve("auto", where), tiny)


def outcome(machine: Machine, row: Row, known: Mapping[str, Mapping[str, Any]], tell: Tell) -> str:
    """Measure a row; how it ended. `known`: figures of earlier rows by kind."""
    try:
        MEASURES[row.kind](machine, row, known, tell)
    except Exception as error:  # a row that fails must not cost the others
        if not is_out_of_memory(error):
            return f"{FAILED}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return f"{NO_ROOM} into {torch.cuda.get_device_properties(0).total_memory / GIB:.1f} GiB"
    finally:
        if row.kind == "compiled":
            torch.compiler.reset()
        if machine.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()
    return MEASURED


def is_out_of_memory(error: Exception) -> bool:
    """Also where a library of the GPU's says it in its own words."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error) or "out of memory" in str(error)


# -- the rows -----------------------------------------------------------------------------------------------------


def device(machine: Machine, row: Row, known: Mapping[str, Mapping[str, Any]], tell: Tell) -> None:
    tell(environment=provenance.environment(), torch=torch.__version__, precision=machine.precision)
    if machine.is_gpu:
        there = torch.cuda.get_device_properties(0)
        tell(device=there.name, memory_gib=there.total_memory / GIB, multiprocessors=there.multi_processor_count)
    side, values = (256, 2**20) if machine.tiny else (8192, 2**29)
    a, b = (torch.randn(side, side, device=machine.device, dtype=machine.dtype) for _ in range(2))
    source = torch.randn(values, device=machine.device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    seconds = machine.medians(calls)
    moved = 2 * source.numel() * source.element_size()  # read and written
    tell(peak_tflops=2 * side**3 / seconds["product"] / 1e12, bandwidth_tb_s=moved / seconds["copy"] / 1e12)


def train(machine: Machine, row: Row, known: Mapping[str, Mapping[str, Any]], tell: Tell) -> None:
    network, size, memory = machine.network(row.network), machine.batch_size(row), Memory(machine)
    stepper = machine.stepper(network, row.layout, launched=row.launched)
    batch = stepper.random_batch(size)
    tell(first_step_s=machine.timed(lambda: stepper.step(*batch)))
    stepper.step(*batch)  # with the optimiser's averages in memory
    tell(**memory.figures())
    seconds = machine.medians({"": lambda: stepper.step(*batch)})[""]
    gflop = gflop_a_image(machine, row.network)
    tell(images_per_s=size / seconds, step_ms=seconds * 1e3, gflop_a_image=gflop)
    if peak := known.get("device", {}).get("peak_tflops"):
        tell(share_of_peak=gflop * size / seconds / 1e3 / peak)


def forward(machine: Machine, row: Row, known: Mapping[str, Mapping[str, Any]], tell: Tell) -> None:
    stepper = machine.stepper(machine.network(row.network), row.layout)
    stepper.net.eval()
    batch = stepper.random_batch(machine.batch_size(row))[:3]
    ways: dict[str, Callable[..., Tensor]] = {"launched": stepper.eps}
    if machine.is_gpu:
        ways["graph"] = Graphed(stepper.eps)
    with torch.no_grad():
        tell(first_s=machine.timed(lambda: stepper.eps(*batch)))
        results = {name: way(*batch).clone() for name, way in ways.items()}
        seconds = machine.medians({name: functools.partial(way, *batch) for name, way in ways.items()})
    seconds = captured(seconds, ways)
    tell(**{f"{name}_ms": value * 1e3 for name, value in seconds.items()})
    tell(evaluations_per_s=len(batch[0]) / min(seconds.values()), **difference(results))


def sample(machine: Machine, row: Row, known: Mapping[str, Mapping[str, Any]], tell: Tell) -> None:
    stepper = machine.stepper(machine.network(row.network), row.layout)
    net = stepper.net.eval()
    x_T, condition, domain, _ = stepper.random_batch(machine.batch_size(row))
    domain = torch.zeros_like(domain)
    chain, sampling = DiffusionConfig(), SamplingConfig(num_steps=3) if machine.tiny else SamplingConfig()
    abar = schedule.alphas_cumprod(chain)

    def evaluate(*inputs: Tensor) -> Tensor:
        with precision.autocast(machine.device, machine.dtype):
            return net(*inputs)

    def drawn(network: Callable[..., Tensor], num_steps: int) -> Tensor:
        denoiser = guidance.classifier_free(
            network, condition, domain, num_domains=2, guidance_scale=sampling.guidance_scale
        )
        timesteps = samplers.SPACINGS[sampling.spacing](chain.num_timesteps, num_steps)
        return samplers.SAMPLERS[sampling.sampler](
            denoiser, x_T, timesteps=timesteps, alphas_cumprod=abar, prediction=chain.prediction, generators=[]
        )

    ways: dict[str, Callable[..., Tensor]] = {"launched": evaluate}
    if machine.is_gpu:
        ways["graph"] = Graphed(evaluate)
    with torch.no_grad():
        results = {name: drawn(way, 2).clone() for name, way in ways.items()}
        calls = {name: functools.partial(drawn, way, sampling.num_steps) for name, way in ways.items()}
        seconds = machine.medians(calls, rounds=2)
    seconds = captured(seconds, ways)
    tell(**{f"{name}_images_per_s": len(x_T) / value for name, value in seconds.items()})
    tell(num_steps=sampling.num_steps, guidance_scale=sampling.guidance_scale, **difference(results))


def kinds(machine: Machine, row: Row, known: Mapping[str, Mapping[str, Any]], tell: Tell) -> None:
    stepper = machine.stepper(machine.network(row.network), row.layout, launched=True)  # a graph has no operators
    batch = stepper.random_batch(machine.batch_size(row))
    for _ in range(2):
        stepper.step(*batch)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if machine.is_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with (
        cluster.muted_stderr(),
        torch.profiler.profile(activities=activities) as trace,
    ):  # it tells that it starts and stops
        stepper.step(*batch)
        if machine.is_gpu:
            torch.cuda.synchronize()
    tell(**by_kind(trace.key_averages(), on_gpu=machine.is_gpu))


def peers(machine: Machine, row: Row, known: Mapping[str, Mapping[str, Any]], tell: Tell) -> None:
    """All in both layouts, taking turns; memory is each one's own, beside the others' weights."""
    layouts: tuple[Layout, ...] = ("nchw", "channels_last")
    names = [name for name in MODULES if is_installed(name, tell)]
    steps = {f"{name}_{layout}": a_step(machine, row, name, layout, tell) for name in names for layout in layouts}
    speeds = {name: machine.batch_size(row) / seconds for name, seconds in machine.medians(steps).items()}
    tell(**{f"{name}_images_per_s": speed for name, speed in speeds.items()})
    best = {name: max((speeds[f"{name}_{layout}"], layout) for layout in layouts)[1] for name in names}
    ours = speeds[f"{OURS}_{best[OURS]}"]
    tell(layouts=best, speeds={name: speeds[f"{name}_{layout}"] / ours for name, layout in best.items()})


def compiled(machine: Machine, row: Row, known: Mapping[str, Mapping[str, Any]], tell: Tell) -> None:
    """A peer compiled, beside ours, each in the layout that suits it best otherwise."""
    if not is_installed(row.network, tell):
        return
    layouts = known.get("peers", {}).get("layouts", {})
    steps = {
        what: a_step(machine, row, name, layouts.get(name, "channels_last"), tell, compiled=what == "compiled")
        for what, name in {"compiled": row.network, "ours": OURS}.items()
    }
    seconds = machine.medians(steps)
    tell(**{f"{what}_images_per_s": machine.batch_size(row) / value for what, value in seconds.items()})
    tell(speeds={row.network: seconds["ours"] / seconds["compiled"]})


MEASURES = {
    "device": device,
    "train": train,
    "forward": forward,
    "kinds": kinds,
    "peers": peers,
    "compiled": compiled,
    "sample": sample,
}

# -- what they share ----------------------------------------------------------------------------------------------

OURS = "ddpm-translate"
MODULES = {each.name: each.module for each in contenders.networks("35M")}


def is_installed(name: str, tell: Tell) -> bool:
    """Whether the contender of this name can be measured; where not, that is told."""
    there = importlib.util.find_spec(MODULES[name]) is not None
    if not there:
        tell(**{name: "not installed"})
    elif name != OURS:
        contenders.allow_torchvision()
    return there


def a_step(
    machine: Machine, row: Row, name: str, layout: Layout, tell: Tell, *, compiled: bool = False
) -> Callable[[], object]:
    """A training step of a contender, taken twice; the first one's seconds and the memory are told."""
    memory, stepper = Memory(machine), machine.stepper(machine.network(name), layout, compiled=compiled)
    step = functools.partial(stepper.step, *stepper.random_batch(machine.batch_size(row)))
    what = f"{name}_{layout}_compiled" if compiled else f"{name}_{layout}"
    tell(**{f"{what}_first_step_s": machine.timed(step)})
    step()
    tell(**{f"{what}_{figure}": value for figure, value in memory.figures().items() if figure == "peak_gib"})
    return step


class Memory:
    """The GPU's memory since here."""

    def __init__(self, machine: Machine) -> None:
        self.is_gpu = machine.is_gpu
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.allocated, self.reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def figures(self) -> dict[str, float]:
        """The most that was in use, and that was taken from the GPU for it; nothing on a CPU."""
        if not self.is_gpu:
            return {}
        return {
            "peak_gib": (torch.cuda.max_memory_allocated() - self.allocated) / GIB,
            "reserved_gib": (torch.cuda.max_memory_reserved() - self.reserved) / GIB,
        }


def captured(seconds: Mapping[str, float], ways: Mapping[str, Any]) -> dict[str, float]:
    """Without the time of a graph that came to none: too many rows, or it could not be captured."""
    return {name: value for name, value in seconds.items() if name != "graph" or ways[name].replays}


def difference(results: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference between the ways' results, where there are several."""
    first, *others = results.values()
    return {"largest_difference": max(float((first - each).abs().max()) for each in others)} if others else {}


@functools.cache
def gflop_a_image(machine: Machine, network: str) -> float:
    """Of forward and backward."""
    return machine.stepper(machine.network(network), "channels_last").flops_a_image() / 1e9


KERNELS = {
    "optimiser and clipping": r"adam|_foreach|vector_norm",
    "convolutions": r"conv",
    "norms": r"norm",
    "softmax": r"softmax",
    "matrix products": r"::(mm|addmm|bmm|baddbmm|linear|matmul)|attention",
    "copies, casts, layouts": r"::(copy_|cat|clone|fill_|zero_|contiguous|upsample.*)",
    "sums": r"::(sum|mean|sum_.*)|^ddpm_core::",  # what is left of ours: residual sums, biases' gradients, doubling
    "elementwise": r"^aten::",
}
"""Kinds of kernels by the operator that launches them; the first that fits counts."""


def by_kind(events: Iterable[Any], *, on_gpu: bool) -> dict[str, float]:
    """Milliseconds of each kind of kernel and in all, and on a GPU how many kernels, from a profile's averages."""
    totals = dict.fromkeys(KERNELS, 0.0)
    in_all, kernels = 0.0, 0
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:  # an operator
            spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
            in_all += 0.0 if on_gpu else spent
            kind = next((kind for kind, pattern in KERNELS.items() if re.search(pattern, event.key.lower())), None)
            if kind is not None:
                totals[kind] += spent
        elif not event.is_user_annotation:
            in_all += event.self_device_time_total / 1e3
            kernels += event.count
    figures = {f"{kind.replace(', ', '_').replace(' ', '_')}_ms": spent for kind, spent in totals.items()}
    figures |= {"other_ms": max(in_all - sum(totals.values()), 0.0), "all_ms": in_all}
    return figures | ({"kernels": kernels} if on_gpu else {})
