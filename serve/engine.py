"""Who is translated when: one thread steps all requests of a replica together; before it stands a bounded, fair queue.

engine = Engine(translator, max_rows=16, max_waiting=64)
done = await engine.translate(Job(image, options))        from any event loop; cancelling it frees its places
"""

import asyncio
import collections
import contextlib
import dataclasses
import heapq
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from ddpm_core.step_loop import StepLoop, Translation
from ddpm_core.translator import Translator

from .schemas import Options

Preview = Callable[[int, UInt8[np.ndarray, "h w 3"]], None]
Likeness = Callable[[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]], float]
"""Of a source and its result."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One request as the model gets it."""

    image: UInt8[np.ndarray, "h w 3"]
    options: Options
    client: str = ""
    """Whose it is: clients get equal shares of the model, however many requests each sends."""
    deadline: float | None = None
    """Unix time from which on nobody waits for it."""

    @property
    def cost(self) -> int:
        """Rows it will take in all, about: an interval of guidance is not looked at."""
        sampling = self.options.sampling
        weights = {1.0, sampling.guidance_scale, sampling.domain_guidance_scale or sampling.guidance_scale}
        return sampling.num_steps * len(weights)


@dataclasses.dataclass(frozen=True)
class Done:
    """One request as the model answers it."""

    image: UInt8[np.ndarray, "h w 3"]
    queue_ms: float
    """From its arrival to its first pass."""
    model_ms: float
    """From there to its end."""
    batch_size: float
    """Images in a pass that it was part of, on average."""
    checkpoint: str = ""
    """What made it, while a rollout has two of them at work."""
    identity_cosine: float | None = None
    """How much it shows whom the source shows, where an encoder tells."""


class Full(Exception):
    """The queue is full."""


class Late(Exception):
    """It cannot be, or was not, done before its deadline."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request, and who waits for it."""

    job: Job
    preview: Preview | None
    future: asyncio.Future[Done]
    loop: asyncio.AbstractEventLoop
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    started: float = 0.0
    abandoned: bool = False

    def answer(self, done: Done | None, error: Exception | None = None) -> None:
        """From the engine's thread."""

        def settle() -> None:
            if self.future.done():
                return
            if error is not None:
                self.future.set_exception(error)
            elif done is not None:
                self.future.set_result(done)

        with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody waits
            self.loop.call_soon_threadsafe(settle)


class FairQueue:
    """Requests by start-time fair queueing (Goyal et al. 1996): equal shares of the rows for each client that waits."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Ticket]] = []
        self.virtual = 0.0
        self.finish: dict[str, float] = {}
        """When the last request of a client would end, in rows that a client alone would have got."""
        self.count = 0
        """Requests so far: equals go by arrival."""

    def __len__(self) -> int:
        return len(self.heap)

    def push(self, ticket: Ticket) -> None:
        job = ticket.job
        start = max(self.virtual, self.finish.get(job.client, 0.0))
        self.finish[job.client] = start + job.cost
        self.count += 1
        heapq.heappush(self.heap, (start, self.count, ticket))

    def pop(self) -> Ticket:
        self.virtual, _, ticket = heapq.heappop(self.heap)
        if not self.heap:
            self.finish.clear()  # whoever comes next starts level; and the clients of a year need no memory
        return ticket

    def remove(self, unwanted: Callable[[Ticket], bool]) -> list[Ticket]:
        """Take out those that need no turn."""
        removed = [ticket for _, _, ticket in self.heap if unwanted(ticket)]
        if removed:
            self.heap = [entry for entry in self.heap if entry[2] not in removed]
            heapq.heapify(self.heap)
        return removed


class Engine:
    """A translator shared by many."""

    def __init__(
        self,
        translator: Translator,
        *,
        max_rows: int,
        max_waiting: int,
        sizes: Sequence[int] = (),
        checkpoint: str = "",
        likeness: Likeness | None = None,
    ) -> None:
        """`max_rows`, `sizes`: as `StepLoop`. `max_waiting`: requests beyond those that share passes. `checkpoint`: its
        name in the answers. `likeness`: called beside the steps, in threads of its own."""
        self.checkpoint, self.likeness = checkpoint, likeness
        self.steps = StepLoop(translator, max_rows=max_rows, sizes=sizes)
        self.max_waiting = max_waiting
        self.queue = FairQueue()
        self.running: dict[Translation, Ticket] = {}
        self.seconds_per_row = 0.0
        """Of late."""
        self.counts: collections.Counter[str] = collections.Counter()
        """passes, rows, and how requests ended: done, cancelled, late, failed."""
        self.closed = False
        self.wake = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    async def translate(self, job: Job, preview: Preview | None = None) -> Done:
        """`preview`: called on the engine's thread, with the number of steps done and how the image looks by then.

        Raises:
            Full: try later. Late: see `Job.deadline`. InputError: an option that cannot be used.
        """
        loop = asyncio.get_running_loop()
        ticket = Ticket(job, preview, loop.create_future(), loop)
        with self.wake:
            if len(self.queue) >= self.max_waiting:
                raise Full(f"{len(self.queue)} requests are waiting")
            if job.deadline is not None and time.time() + self.wait_s(job.cost) > job.deadline:
                self.counts["late"] += 1
                raise Late(f"it would take about {self.wait_s(job.cost):.1f} s")
            self.queue.push(ticket)
            self.wake.notify()
        try:
            done = await ticket.future
        finally:
            ticket.abandoned = True
        if self.likeness is None:
            return done
        cosine = await asyncio.to_thread(self.likeness, job.image, done.image)
        return dataclasses.replace(done, identity_cosine=cosine)

    async def stream(self, job: Job) -> AsyncIterator[tuple[int, UInt8[np.ndarray, "h w 3"]] | Done]:
        """(steps done, how the image looks by then) after each step, then the result; raises as `translate`."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[tuple[int, np.ndarray] | None]()

        def preview(done: int, image: np.ndarray) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, (done, image))

        task = asyncio.create_task(self.translate(job, preview))
        task.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (step := await steps.get()) is not None:
                yield step
            yield task.result()
        finally:
            task.cancel()

    def stats(self) -> dict[str, float]:
        """What waits and runs, the step time, and counts so far."""
        found = {"waiting": len(self.queue), "running": len(self.running), "rows_now": self.steps.num_rows}
        return {**found, "max_rows": self.steps.max_rows, "seconds_per_row": self.seconds_per_row, **self.counts}

    def wait_s(self, more_rows: int = 0) -> float:
        """How long it takes to work off all that is here, and `more_rows`: an upper bound for a newcomer's time."""
        waiting = sum(ticket.job.cost for _, _, ticket in self.queue.heap)
        begun = sum(max(ticket.job.cost - each.num_rows, 0) for each, ticket in list(self.running.items()))
        return (waiting + begun + more_rows) * self.seconds_per_row

    def close(self) -> None:
        """End the thread; whoever still waits is told that the engine stopped."""
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join()

    def _run(self) -> None:
        while not self.closed:
            with self.wake:
                while not (self.queue or self.running or self.closed):
                    self.wake.wait()
                unwanted = self.queue.remove(_unwanted)
            self._drop(unwanted)
            for translation, ticket in list(self.running.items()):
                if _unwanted(ticket):
                    self.steps.cancel(translation)
                    self._drop([self.running.pop(translation)])
            self._admit()
            begun, before = time.monotonic(), self.counts["rows"]
            finished = self._step()
            if (rows := self.counts["rows"] - before) > 0:
                latest = (time.monotonic() - begun) / rows
                self.seconds_per_row += (latest - self.seconds_per_row) * (0.1 if self.seconds_per_row else 1.0)
            for translation in finished:
                self._settle(self.running.pop(translation), translation)
        for ticket in [*self.running.values(), *self.queue.remove(lambda _: True)]:
            ticket.answer(None, RuntimeError("the engine was closed"))

    def _admit(self) -> None:
        """Let those who wait join, as far as the rows go."""
        while self.steps.num_rows < self.steps.max_rows:
            with self.wake:
                if not self.queue:
                    return
                ticket = self.queue.pop()
            ticket.started = time.monotonic()
            try:
                translation = self.steps.add(ticket.job.image, preview=ticket.preview, **ticket.job.options.arguments())
            except Exception as error:
                self.counts["failed"] += 1
                ticket.answer(None, error)
                continue
            self.running[translation] = ticket

    def _step(self) -> list[Translation]:
        before = {each: each.num_rows for each in self.running}
        finished = self.steps.step()
        rows = sum(each.num_rows - before[each] for each in self.running)
        self.counts["passes"] += rows > 0
        self.counts["rows"] += rows
        return finished

    def _settle(self, ticket: Ticket, translation: Translation) -> None:
        if translation.error is not None:
            self.counts["failed"] += 1
            ticket.answer(None, translation.error)
            return
        self.counts["done"] += 1
        queue_ms, model_ms = (ticket.started - ticket.arrived) * 1000, (time.monotonic() - ticket.started) * 1000
        company = translation.num_images / max(translation.num_passes, 1)
        ticket.answer(Done(translation.result(), queue_ms, model_ms, company, self.checkpoint))

    def _drop(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.counts["cancelled" if ticket.abandoned else "late"] += 1
            ticket.answer(None, Late("its time is over"))


def _unwanted(ticket: Ticket) -> bool:
    return ticket.abandoned or (ticket.job.deadline is not None and time.time() > ticket.job.deadline)
