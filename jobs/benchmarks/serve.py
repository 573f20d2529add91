"""The endpoint's engine beside other ways to serve one network, in one interleaved run; without HTTP and without Ray.

    steps     ours: all requests share every pass of the network, each at a step of its own (serve/engine.py)
    batches   request-level batching done right: whenever the model is free it takes the oldest request and all others
              of equal options that fit
    single    one request at a time

Requests are short ones among a few long ones. Parts, each of which takes the ways in turn:

    raw        images a second of full batches, nothing around them: what the hardware gives
    lone       latency of a lone request beside a bare call of the Translator
    closed     clients that ask again as soon as they are answered: images a second by their number
    open       Poisson arrivals by load, as a share of the raw rate: latencies of short and long requests
    goals      the ratios that are wanted, and what they came to

Clients are tasks of this process: what HTTP and Ray add to each request is not in it (docs/serving.md).
"""

import asyncio
import collections
import dataclasses
import functools
import itertools
import json
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ddpm_core import checkpoint, provenance, storage
from ddpm_core.config import ModelConfig, SamplingConfig
from ddpm_core.translator import Translator
from jobs.common import cli
from serve.engine import Done, Engine, Job, Ticket
from serve.schemas import Options as RequestOptions

WAYS = ("steps", "batches", "single")
SOURCES = 64
"""Different images that requests bring."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The endpoint's engine beside request-level batching and one request at a time."""

    checkpoint: str | None = None
    """A run or checkpoint folder; by default the preset demo's network with random weights, which is as fast."""
    output: str = "runs/benchmark/serve"
    """Folder or s3:// prefix for serve.json."""
    max_batch_size: int = 16
    """Rows of one pass of the network."""
    short_steps: int = 5
    """Steps of nine in ten requests."""
    long_steps: int = 50
    """Steps of the others."""
    guidance_scale: float = 1.5
    """Of all requests; above 1 a request takes two rows."""
    clients: tuple[int, ...] = (1, 8, 64)
    """Of the closed part."""
    loads: tuple[float, ...] = (0.3, 0.7, 1.0, 2.0)
    """Of the open part, as shares of the raw rate."""
    seconds: float = 20.0
    """Of each measurement."""
    rounds: int = 3
    """How often the ways take turns; medians are shown."""
    num_threads: int = os.cpu_count() or 1
    """Threads of the process, on CPUs."""


class Batches:
    """Request-level batching: a thread that fills its batch whenever it is free."""

    def __init__(self, translator: Translator, max_images: int) -> None:
        self.translator, self.max_images = translator, max_images
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.wake, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    async def translate(self, job: Job) -> Any:
        loop = asyncio.get_running_loop()
        ticket = Ticket(job, None, loop.create_future(), loop)
        with self.wake:
            self.waiting.append(ticket)
            self.wake.notify()
        return await ticket.future

    def _run(self) -> None:
        while True:
            with self.wake:
                while not (self.waiting or self.closed):
                    self.wake.wait()
                if self.closed:
                    return
                options = self.waiting[0].job.options
                alike = (each for each in self.waiting if each.job.options == options)
                taken = list(itertools.islice(alike, self.max_images))
                for ticket in taken:
                    self.waiting.remove(ticket)
            try:
                images = self.translator(np.stack([ticket.job.image for ticket in taken]), **options.arguments())
            except Exception as error:
                for ticket in taken:
                    ticket.answer(None, error)
                continue
            for ticket, image in zip(taken, images, strict=True):
                ticket.answer(Done(image, 0.0, 0.0, len(taken)))

    def close(self) -> None:
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join()


def run(options: Options) -> int:
    torch.set_num_threads(options.num_threads)
    translator = Translator(network(options.checkpoint))
    result: dict[str, Any] = {"options": dataclasses.asdict(options), "environment": provenance.environment()}
    print(
        f"{translator.config.image_size} px, {translator.device}, {translator.dtype}; {options.short_steps} steps, one "
        f"in ten {options.long_steps}; at most {options.max_batch_size} rows a pass"
    )
    bench = Bench(translator, options)
    parts: dict[str, Callable[[], Any]] = {
        "raw": bench.raw,
        "lone": bench.lone,
        "closed": bench.closed,
        "open": bench.open,
        "goals": lambda: [goal._asdict() for goal in goals(result)],
    }
    for name, part in parts.items():
        result[name] = part()
        storage.write_bytes(storage.join(options.output, "serve.json"), json.dumps(result, indent=2).encode())
    print(f"written: {storage.join(options.output, 'serve.json')}")
    return cli.DONE


def network(uri: str | None) -> checkpoint.Checkpoint:
    if uri is not None:
        return checkpoint.load(uri)
    from jobs.training.presets import PRESETS

    demo = PRESETS["demo"].options
    config = ModelConfig(
        image_size=32, domains=("day", "night"), unet=demo.unet
    )  # a chain of 1000 steps: any number goes
    model = checkpoint.build(config).eval().requires_grad_(False)
    return checkpoint.Checkpoint(model=model, config=config, path="the preset demo, untrained")


class Goal(NamedTuple):
    what: str
    value: float
    least: float
    most: float

    @property
    def met(self) -> bool:
        return self.least <= self.value <= self.most


def goals(result: dict[str, Any]) -> list[Goal]:
    """What the engine is to reach, of the parts that were measured; printed."""
    closed, lone = result["closed"], result["lone"]
    best = max(row["steps"] for row in closed)
    found = [
        Goal("images/s at saturation, engine / raw", max(row["steps / raw"] for row in closed), 0.9, float("inf")),
        Goal(
            f"images/s, {closed[-1]['clients']} clients / best",
            closed[-1]["steps"] / max(best, 1e-9),
            0.95,
            float("inf"),
        ),
        Goal("lone request, engine - 1.1 x bare, ms", (lone["engine_s"] - 1.1 * lone["bare_s"]) * 1e3, -1e9, 15.0),
    ]
    latency = "p95 of short requests at load 0.7, steps / batches"
    found += [Goal(latency, row["p95"], 0.0, 0.5) for row in result["open"] if row["load"] == 0.7]
    for goal in found:
        bound = f"at most {goal.most:g}" if goal.most != float("inf") else f"at least {goal.least:g}"
        print(f"{'reached' if goal.met else 'MISSED '}  {goal.what}: {goal.value:.2f} ({bound})")
    return found


class Bench:
    """The parts. Every way gets the same requests at the same times."""

    def __init__(self, translator: Translator, options: Options) -> None:
        self.translator, self.options = translator, options
        generator, side = np.random.default_rng(0), translator.config.image_size
        self.sources = generator.integers(0, 256, (SOURCES, side, side, 3), dtype=np.uint8)
        self.domain = (translator.config.target_domains or translator.config.domains)[-1]
        self.capacity = 0.0
        """Images a second of the mix in full batches."""

    def job(self, number: int, steps: int) -> Job:
        sampling = SamplingConfig(num_steps=steps, guidance_scale=self.options.guidance_scale)
        return Job(self.sources[number % SOURCES], RequestOptions(self.domain, 0, sampling))

    def requests(self, seed: int) -> Iterator[Job]:
        """Endless: one in ten is long, at random."""
        draw = random.Random(seed)
        for number in itertools.count():
            yield self.job(number, self.options.long_steps if draw.random() < 0.1 else self.options.short_steps)

    @property
    def images_a_pass(self) -> int:
        return max(self.options.max_batch_size // (2 if self.options.guidance_scale != 1 else 1), 1)

    def server(self, way: str) -> Any:
        if way == "steps":
            return Engine(self.translator, max_rows=self.options.max_batch_size, max_waiting=10_000)
        return Batches(self.translator, self.images_a_pass if way == "batches" else 1)

    def call(self, count: int, steps: int) -> float:
        """Seconds that the translator takes for `count` images."""
        job = self.job(0, steps)
        batch = self.sources[np.arange(count) % SOURCES]
        began = time.perf_counter()
        self.translator(batch, **job.options.arguments())
        return time.perf_counter() - began

    def raw_rate(self) -> float:
        """Images a second of the mix in full batches, now."""
        size, short, long = self.images_a_pass, self.options.short_steps, self.options.long_steps
        return size / (0.9 * self.call(size, short) + 0.1 * self.call(size, long))

    def raw(self) -> dict[str, float]:
        self.call(self.images_a_pass, self.options.short_steps)
        self.capacity = statistics.median(self.raw_rate() for _ in range(2 * self.options.rounds + 1))
        print(f"raw      {self.capacity:.2f} images/s in batches of {self.images_a_pass}")
        return {"images_per_s": self.capacity}

    def lone(self) -> dict[str, float]:
        steps = self.options.short_steps
        engine, bare, through = self.server("steps"), [], []

        async def one() -> float:
            began = time.perf_counter()
            await engine.translate(self.job(0, steps))
            return time.perf_counter() - began

        self.call(1, steps)
        for _ in range(10 * self.options.rounds):
            bare.append(self.call(1, steps))
            through.append(asyncio.run(one()))
        engine.close()
        found = {"bare_s": statistics.median(bare), "engine_s": statistics.median(through)}
        found["ratio"] = statistics.median(b / a for a, b in zip(bare, through, strict=True))
        bare_ms, engine_ms = found["bare_s"] * 1e3, found["engine_s"] * 1e3
        print(f"lone     bare {bare_ms:.0f} ms, engine {engine_ms:.0f} ms: {found['ratio']:.3f}")
        return found

    def closed(self) -> list[dict[str, Any]]:
        rows = []
        for clients in self.options.clients:
            rates: dict[str, list[float]] = {way: [] for way in (*WAYS, "raw")}
            for turn in range(self.options.rounds):
                rates["raw"].append(self.raw_rate())  # the machine may have become slower since
                for way in _in_turn(turn):
                    measure = functools.partial(self._ask_again, clients=clients, seed=turn)
                    rates[way].append(self._with(way, measure))
            row: dict[str, Any] = {way: statistics.median(each) for way, each in rates.items()}
            of_raw = statistics.median(a / b for a, b in zip(rates["steps"], rates["raw"], strict=True))
            row |= {"clients": clients, "rates": rates, "steps / raw": of_raw}
            rows.append(row)
            cells = ", ".join(f"{way} {row[way]:.2f}" for way in WAYS)
            print(f"closed   {clients:3} clients: {cells} images/s; steps {of_raw:.2f} of raw")
        return rows

    def open(self) -> list[dict[str, Any]]:
        rows = []
        for load in self.options.loads:
            found: dict[str, list[dict[str, list[float]]]] = {way: [] for way in WAYS}
            for turn in range(self.options.rounds):
                for way in _in_turn(turn):
                    measure = functools.partial(self._arrivals, load=load, seed=turn)
                    found[way].append(self._with(way, measure))
            row: dict[str, Any] = {"load": load}
            for way, turns in found.items():
                for kind in ("short", "long"):
                    latencies = [value for each in turns for value in each[kind]]
                    row[f"{way} {kind}"] = {str(q): _quantile(latencies, q) for q in (50, 95)}
                row[f"{way} images_per_s"] = statistics.median(each["rate"][0] for each in turns)
            rows.append(row)
            for way in WAYS:
                cells = "; ".join(
                    f"{kind} p50 {row[f'{way} {kind}']['50']:.2f} s, p95 {row[f'{way} {kind}']['95']:.2f} s"
                    for kind in ("short", "long")
                )
                print(f"open     load {load:.1f} {way:8} {row[f'{way} images_per_s']:.2f} images/s; {cells}")
            row["p95"] = row["steps short"]["95"] / row["batches short"]["95"]
            print(f"         short requests' p95, steps / batches: {row['p95']:.2f}")
        return rows

    def _with(self, way: str, measure: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        server = self.server(way)
        try:
            return asyncio.run(measure(server))
        finally:
            server.close()

    async def _ask_again(self, server: Any, clients: int, seed: int) -> float:
        """Images a second, by their rows of work: a long request counts as the long one that it is.

        Counted is what is done within the time, after a quarter of it in which the passes fill.
        """
        requests, began, cost = self.requests(seed), time.perf_counter(), 0
        counted_from = began + self.options.seconds / 4

        async def client() -> None:
            nonlocal cost
            while True:
                job = next(requests)
                await server.translate(job)
                if time.perf_counter() >= counted_from:
                    cost += job.cost

        tasks = [asyncio.create_task(client()) for _ in range(clients)]
        await asyncio.sleep(self.options.seconds)
        counted_s = time.perf_counter() - counted_from
        done = cost
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        mean = 0.9 * self.job(0, self.options.short_steps).cost + 0.1 * self.job(0, self.options.long_steps).cost
        return done / mean / counted_s

    async def _arrivals(self, server: Any, load: float, seed: int) -> dict[str, list[float]]:
        """Latencies by kind of all that arrived within the time, and the rate they were done at."""
        draw, requests = random.Random(seed), self.requests(seed)
        found: dict[str, list[float]] = {"short": [], "long": [], "rate": []}
        began, due, tasks = time.perf_counter(), 0.0, []

        async def one(job: Job) -> None:
            arrived = time.perf_counter()
            await server.translate(job)
            kind = "long" if job.options.sampling.num_steps == self.options.long_steps else "short"
            found[kind].append(time.perf_counter() - arrived)

        while (due := due + draw.expovariate(load * self.capacity)) < self.options.seconds:
            await asyncio.sleep(max(began + due - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(one(next(requests))))
        await asyncio.gather(*tasks)
        found["rate"] = [len(tasks) / (time.perf_counter() - began)]
        return found


def _in_turn(turn: int) -> Sequence[str]:
    return WAYS if turn % 2 == 0 else WAYS[::-1]


def _quantile(values: list[float], percent: int) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")
