"""The endpoint's engine: who is let in when, what company costs, and that nobody works for those who left."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from test_step_loop import ByRow, by_row
from test_translator import pictures

from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from serve.engine import Done, Engine, FairQueue, Full, Job, Late, Ticket
from serve.schemas import Options


def job(image: int = 0, *, client: str = "", deadline: float | None = None, seed: int = 0, **sampling: Any) -> Job:
    options = Options("night", seed, SamplingConfig(**{"num_steps": 4, "guidance_scale": 1.0, **sampling}))
    return Job(pictures(4)[image], options, client, deadline)


class Gate(ByRow):
    """A network whose passes wait until they are let through, one by one or all."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.through = threading.Semaphore(0), threading.Semaphore(0)
        self.open = False

    def __call__(self, *inputs: torch.Tensor, **shown: bool) -> torch.Tensor:
        if not self.open:
            self.asked.release()
            self.through.acquire()
        return super().__call__(*inputs, **shown)

    async def pass_asked_for(self) -> None:
        await asyncio.to_thread(self.asked.acquire)

    def let_all(self) -> None:
        self.open = True
        self.through.release(1000)


@contextmanager
def engine(network: ByRow | None = None, **options: Any) -> Iterator[tuple[Engine, ByRow]]:
    translate = by_row()
    translate.network = network or translate.network
    made = Engine(translate, **{"max_rows": 8, "max_waiting": 100, **options})
    try:
        yield made, translate.network  # type: ignore[misc]
    finally:
        if isinstance(network, Gate):
            network.let_all()
        made.close()


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main(), 300)

    return asyncio.run(bounded())


def test_every_request_gets_what_it_would_get_alone() -> None:
    jobs = [job(i % 4, seed=i, num_steps=3 + i % 3, guidance_scale=1.0 + i % 2) for i in range(20)]
    alone = [by_row()(each.image[None], **each.options.arguments())[0] for each in jobs]

    async def main(to: Engine) -> list[Done]:
        return await asyncio.gather(*map(to.translate, jobs))

    with engine() as (made, network):
        done = run(lambda: main(made))
        assert made.counts["done"] == 20
        assert made.counts["rows"] == sum(network.rows) == sum((1 + i % 2) * (3 + i % 3) for i in range(20))
        assert made.counts["passes"] < 30  # alone they would be 79
    for one, right in zip(done, alone, strict=True):
        assert np.array_equal(one.image, right)
        assert one.batch_size >= 1


def test_a_newcomer_joins_those_at_work() -> None:
    gate = Gate()

    async def main(to: Engine) -> list[Done]:
        first = asyncio.create_task(to.translate(job(0)))
        await gate.pass_asked_for()  # the first step has begun
        second = asyncio.create_task(to.translate(job(1, num_steps=3, guidance_scale=3.0)))
        await asyncio.sleep(0)
        gate.let_all()
        return await asyncio.gather(first, second)

    with engine(gate) as (made, _):
        run(lambda: main(made))
    assert gate.rows == [1, 3, 3, 3]


def test_who_leaves_takes_no_further_pass() -> None:
    gate = Gate()

    async def main(to: Engine) -> None:
        leaving = [asyncio.create_task(to.translate(job(i % 4, num_steps=1000))) for i in range(12)]
        await gate.pass_asked_for()
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        gate.let_all()
        assert (await to.translate(job(num_steps=2))).batch_size == 1

    with engine(gate) as (made, _):
        run(lambda: main(made))
        assert made.counts["cancelled"] == 12
        assert not made.running
        assert not made.queue
    assert len(gate.rows) == 3  # the pass that was under way, and the two of the one who stayed


def test_options_that_only_the_sampler_refuses_fail_alone() -> None:
    async def main(to: Engine) -> list[Any]:
        wrong = job(start="sdedit", strength=0.01)
        return await asyncio.gather(*map(to.translate, [job(), wrong, job(1), wrong]), return_exceptions=True)

    with engine() as (made, _):
        right, first, also_right, second = run(lambda: main(made))
    assert isinstance(right, Done)
    assert isinstance(also_right, Done)
    assert isinstance(first, InputError)
    assert isinstance(second, InputError)


def test_a_failing_pass_fails_its_own_and_the_engine_goes_on() -> None:
    class Failing(ByRow):
        def __call__(self, *inputs: torch.Tensor, **shown: bool) -> torch.Tensor:
            if not self.rows:
                self.rows.append(0)
                raise torch.OutOfMemoryError("no memory")
            return super().__call__(*inputs, **shown)

    async def main(to: Engine) -> tuple[Any, Done]:
        first = await asyncio.gather(to.translate(job()), return_exceptions=True)
        return first[0], await to.translate(job())

    with engine(Failing()) as (made, _):
        failed, done = run(lambda: main(made))
        assert made.counts["failed"] == 1
    assert isinstance(failed, torch.OutOfMemoryError)
    assert isinstance(done, Done)


def test_the_queue_is_bounded() -> None:
    gate = Gate()

    async def main(to: Engine) -> list[Any]:
        tasks = [asyncio.create_task(to.translate(job()))]
        await gate.pass_asked_for()
        tasks += [asyncio.create_task(to.translate(job(i % 4))) for i in range(5)]
        await asyncio.sleep(0)
        gate.let_all()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with engine(gate, max_rows=1, max_waiting=2) as (made, _):
        found = run(lambda: main(made))
    assert [type(each) for each in found] == [Done, Done, Done, Full, Full, Full]


def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_one_that_passes_ends_the_work() -> None:
    gate = Gate()

    async def main(to: Engine) -> tuple[Any, ...]:
        to.seconds_per_row = 1.0
        hopeless = await asyncio.gather(to.translate(job(deadline=time.time() + 2)), return_exceptions=True)
        to.seconds_per_row = 1e-6
        late = asyncio.create_task(to.translate(job(deadline=time.time() + 0.05)))
        await gate.pass_asked_for()
        await asyncio.sleep(0.1)
        gate.let_all()
        found = await asyncio.gather(late, return_exceptions=True)
        return hopeless[0], found[0], await to.translate(job(deadline=time.time() + 1000))

    with engine(gate) as (made, _):
        hopeless, late, met = run(lambda: main(made))
        assert made.counts["late"] == 2
    assert isinstance(hopeless, Late)
    assert "about 4.0 s" in str(hopeless)
    assert isinstance(late, Late)
    assert isinstance(met, Done)


def order(*jobs: Job) -> list[tuple[str, int]]:
    """Client and seed in the order of their turns."""
    queue = FairQueue()
    for each in jobs:
        queue.push(Ticket(each, None, None, None))  # type: ignore[arg-type]
    return [(found.client, found.options.seed) for found in (queue.pop().job for _ in jobs)]


def test_clients_get_equal_shares_however_many_requests_they_send() -> None:
    greedy = [job(client="greedy", seed=i) for i in range(5)]
    modest = [job(client="modest", seed=i) for i in range(2)]
    assert order(*greedy, *modest) == [
        ("greedy", 0),
        ("modest", 0),
        ("greedy", 1),
        ("modest", 1),
        ("greedy", 2),
        ("greedy", 3),
        ("greedy", 4),
    ]
    long = [job(client="long", seed=i, num_steps=40) for i in range(2)]
    short = [job(client="short", seed=i) for i in range(11)]
    turns = order(*long, *short)
    assert turns.index(("long", 1)) == 11  # ten short ones cost what a long one does
    assert [turn for turn in turns if turn[0] == "short"] == [("short", i) for i in range(11)]


def test_an_idle_client_saves_nothing_up() -> None:
    queue = FairQueue()
    for i in range(3):
        queue.push(Ticket(job(client="busy", seed=i), None, None, None))  # type: ignore[arg-type]
    assert queue.pop().job.client == "busy"
    assert queue.pop().job.client == "busy"
    for i in range(3):
        queue.push(Ticket(job(client="new", seed=i), None, None, None))  # type: ignore[arg-type]
    queue.push(Ticket(job(client="busy", seed=3), None, None, None))  # type: ignore[arg-type]
    turns = [queue.pop().job.client for _ in range(5)]
    assert turns.count("busy") == 2
    assert turns[:3] != ["new", "new", "new"]


def test_cost_is_in_rows() -> None:
    assert job().cost == 4
    assert job(guidance_scale=2.0).cost == 8
    assert job(guidance_scale=2.0, domain_guidance_scale=3.0).cost == 12
    assert dataclasses.replace(job(), client="x").cost == 4
