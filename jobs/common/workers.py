"""One function over many tasks, or a worker with a state over many batches: on Ray, or in this process.

Tasks and results are any objects that can be pickled. Both ways give the same results and the same InputError; this
process in the order of the tasks, Ray in any order, so a result says itself what it is of.

Functions go by Ray Data. Workers are actors of our own, each of which reads what it works on: Ray Data's pool waits for
CPUs that its reading tasks do not get, may stay at one actor (ray#59144), restarts for ever what an image kills, and
keeps a few bytes of every batch there was.
"""

import collections
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import itertools
import math
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ddpm_core.errors import InputError
from jobs.common import cli, cluster

if TYPE_CHECKING:
    import pyarrow
    import ray
    import ray.data

RAY_PAYS_S = 20.0
"""CPU seconds of work left from which on Ray Data takes over. Its start costs 6 to 10 CPU seconds (measured on two
cores of an EPYC; decoding an image 2 ms at 178 x 218 and 40 ms at 4000 x 3000, drawing a pair 24 ms), and threads of
this process keep two cores about as busy as its workers do: below 20 s it gains nothing."""
WINDOW_BYTES = 64 * 2**20
"""Tasks that wait in Ray's object store, at most."""
MAX_BLOCKS = 4096
"""Ray Data's bookkeeping grows with blocks; beyond this many they get larger instead."""
MAX_HERE = 4
"""Workers that share this process, at most: more of them wait for the interpreter's lock."""
MOST_PER_CPU = 8
"""Actors asked for on a CPU, at most: each loads PyTorch and the network, and thousands would never have started."""
AHEAD = 3
"""Tasks that an actor has at once: while one is with the network, others are read or written."""
QUEUED = 64
"""Tasks that wait to be handed out, at most."""
TRIES = 3
"""Workers that one task may cost, and workers that may die in a row before the first is ready."""
LOOK_EVERY_S = 2.0
"""How often the cluster is asked what is free."""

T = TypeVar("T")
R = TypeVar("R")

_session: contextvars.ContextVar[tuple[int | None, contextlib.ExitStack] | None]
_session = contextvars.ContextVar("session", default=None)


@contextlib.contextmanager
def session(num_workers: int | None) -> Iterator[None]:
    """What `mapped` uses inside of this; Ray, if it comes to that, starts once and stays to the end."""
    with contextlib.ExitStack() as stack:
        before = _session.set((num_workers, stack))
        try:
            yield
        finally:
            _session.reset(before)


def mapped(
    function: Callable[[T], R], tasks: Iterable[T], num_tasks: int, *, num_workers: int | None = None
) -> Iterator[R]:
    """`function` of each task.

    `num_workers`: 0 is this process and its threads, more are so many tasks at a time on Ray; None is the session's,
    and where that is None, too, this process begins and Ray takes over what is left if that is much (RAY_PAYS_S).

    Raises:
        InputError: as `function` raises it.
    """
    chosen, kept = _session.get() or (None, None)
    num_workers = chosen if num_workers is None else num_workers
    rest = iter(tasks)
    if not num_workers:
        yield from _here(function, rest, num_tasks, RAY_PAYS_S if num_workers is None else math.inf)
    with contextlib.ExitStack() as own:
        for window in _windows(rest):
            (kept or own).enter_context(cli.ray_session())
            yield from _results(_rows(window).map_batches(**_each(function, num_workers)))


class Rescue(NamedTuple, Generic[T, R]):
    """What becomes of a task whose workers die of it, one after another."""

    halves: Callable[[T], Sequence[T]]
    """What it is cut into; nothing where it cannot be."""
    give_up: Callable[[T, str], R]
    """Its result, with the reason."""


def piped(
    read: Callable[[T], Iterable[Any]],
    tasks: Iterable[T],
    worker: Callable[..., Callable[[Any], R]],
    make: Mapping[str, Any],
    pool: "Pool",
    rescue: Rescue[T, R] | None = None,
) -> Iterator[R]:
    """`worker(**make)` of each batch that `read` makes of a task; read ahead of the workers, one worker a place in
    `pool`: an actor, or a thread of this process. Needs Ray running unless the pool is this process. Tasks are taken
    as there is room for them. A worker that has a true SHARED is called by several threads at once.

    What a worker does may be done again, in part or as a whole, where a machine is lost.

    Raises:
        InputError: as `read` or the worker raises it.
    """
    if pool.on_ray:
        yield from _Crew(read, tasks, worker, {**make, "num_threads": pool.num_threads}, pool, rescue).results()
        return
    place = threading.local()

    def run(batch: Any) -> R:
        if not hasattr(place, "worker"):
            place.worker = worker(**make, num_threads=pool.num_threads)
        return place.worker(batch)

    batches = itertools.chain.from_iterable(mapped(read, tasks, 0, num_workers=0))
    with cluster.watched(lambda: "this process") as moved:
        for result in _here(run, batches, 0, math.inf, num_threads=pool.size):
            moved()
            yield result


@dataclasses.dataclass(frozen=True)
class Pool:
    """How many workers, and what each may use."""

    size: int
    """At most, as the cluster is now; work begins with the first that finds its place."""
    num_threads: int
    resources: Mapping[str, float]
    on_ray: bool = True
    grows: bool = False
    """With the cluster."""

    @property
    def on_gpus(self) -> bool:
        """Whether each has one."""
        if self.on_ray:
            return "num_gpus" in self.resources
        import torch

        return torch.cuda.is_available()


def pool(num_batches: float, num_workers: int | None) -> Pool:
    """Workers for so many batches: this process for 0; by default a GPU each where the cluster has any, else a CPU.

    Raises:
        InputError: more workers than GPUs, or far more than CPUs.
    """
    if num_workers == 0:
        import torch

        # A worker on each core: the threads of a single one would wait for each other after every operation.
        cores = torch.get_num_threads()
        size = 1 if torch.cuda.is_available() else int(min(cores, MAX_HERE, max(num_batches, 1)))
        return Pool(size, cores // size, {}, on_ray=False)
    import ray

    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), max(int(there.get("CPU", 1)), 1)
    if num_workers is not None and gpus and num_workers > gpus:
        raise InputError(f"--num-workers {num_workers}: the cluster has {gpus} GPUs, one for each; give fewer")
    if num_workers is not None and not gpus and num_workers > MOST_PER_CPU * cpus:
        raise InputError(
            f"--num-workers {num_workers}: the cluster has {cpus} CPUs; give at most {MOST_PER_CPU * cpus}"
        )
    size = int(min(num_workers or gpus or cpus, max(num_batches, 1)))
    grows = num_workers is None and num_batches == math.inf
    if gpus:  # and no CPU, for want of which it would wait
        return Pool(size, 2, {"num_gpus": 1.0, "num_cpus": 0.0}, grows=grows)
    # One thread a worker: convolutions this small gain less from a second thread than a second worker gives.
    return Pool(size, 1, {"num_cpus": min(1.0, cpus / size)}, grows=grows)


# -- in this process ----------------------------------------------------------------------------------------------


def _here(
    function: Callable[[T], R], tasks: Iterator[T], num_tasks: int, limit_s: float, *, num_threads: int | None = None
) -> Iterator[R]:
    """By threads, in order, until no task is left or those left are worth more than `limit_s` of CPU time."""
    num_threads = num_threads or os.cpu_count() or 1
    begun, done = time.process_time(), 0
    with concurrent.futures.ThreadPoolExecutor(num_threads) as threads:
        ahead: collections.deque[concurrent.futures.Future[R]] = collections.deque()
        try:
            for task in tasks:
                ahead.append(threads.submit(function, task))
                if len(ahead) > num_threads:
                    yield ahead.popleft().result()
                    done += 1
                    # What runs ahead has used time, too, so this is rather too much than too little.
                    if (time.process_time() - begun) / done * (num_tasks - done - len(ahead)) > limit_s:
                        break
            while ahead:
                yield ahead.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


# -- by Ray Data --------------------------------------------------------------------------------------------------


def _windows(tasks: Iterator[Any]) -> Iterator[list[bytes]]:
    """The tasks, pickled, as many at a time as WINDOW_BYTES hold."""
    pickled = map(pickle.dumps, tasks)
    for first in pickled:
        window, room = [first], WINDOW_BYTES - len(first)
        while room > 0 and (following := list(itertools.islice(pickled, 1))):
            window += following
            room -= len(following[0])
        yield window


def _rows(tasks: list[bytes]) -> "ray.data.Dataset":
    import ray.data

    blocks = min(max(len(tasks), 1), MAX_BLOCKS)
    return ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=blocks)


def _each(function: Callable[[Any], Any], num_workers: int | None) -> dict[str, Any]:
    """Arguments of `map_batches` that give the results of a block's tasks."""
    import pyarrow
    import ray
    import ray.data

    shared = ray.put(function)  # once, however large its arguments are

    def block(batch: "pyarrow.Table") -> "pyarrow.Table":
        run = ray.get(shared)
        results = [pickle.dumps(run(pickle.loads(task))) for task in batch["task"].to_pylist()]
        return pyarrow.table({"result": pyarrow.array(results, pyarrow.large_binary())})

    block.__name__ = getattr(function, "func", function).__name__  # what Ray's dashboard calls it
    compute = {} if num_workers is None else {"compute": ray.data.TaskPoolStrategy(num_workers)}
    return {"fn": block, "batch_size": None, "batch_format": "pyarrow", **compute}


def _results(rows: "ray.data.Dataset") -> Iterator[Any]:
    """What the blocks hold; a worker's InputError as such, out of what Ray wraps around it."""
    try:
        with cluster.watched(cluster.free_cpus) as moved:
            for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
                moved()
                yield from map(pickle.loads, batch["result"].to_pylist())
    except Exception as error:
        if (cause := cli.input_error(error)) is not None:
            raise cause from None
        raise


# -- by actors ----------------------------------------------------------------------------------------------------


class _Place:
    """A place of a pool: an actor with a worker, which reads what that is given."""

    def open(self, given: tuple[Callable[..., Callable[[Any], Any]], dict[str, Any], Callable[[Any], Any]]) -> None:
        worker, make, self.read = given
        self.worker = worker(**make)
        self.turn = contextlib.nullcontext() if getattr(worker, "SHARED", False) else threading.Lock()

    def run(self, task: Any) -> list[Any]:
        results = []
        for batch in self.read(task):
            with self.turn:
                results.append(self.worker(batch))
        return results


@dataclasses.dataclass
class _Job:
    task: Any
    deaths: int = 0
    """Workers that died while they had it."""


class _Crew(Generic[T, R]):
    """The actors of a pool at work on tasks. The first begins as soon as it finds a place; others come while there is
    room, and in the place of those that are lost."""

    def __init__(
        self,
        read: Callable[[T], Iterable[Any]],
        tasks: Iterable[T],
        worker: Callable[..., Callable[[Any], R]],
        make: dict[str, Any],
        pool: Pool,
        rescue: Rescue[T, R] | None,
    ) -> None:
        import ray

        self.pool, self.rescue, self.tasks = pool, rescue, tasks
        self.given = ray.put((worker, make, read))
        self.actor = ray.remote(max_concurrency=AHEAD, **pool.resources)(_Place)
        self.starting: dict[Any, Any] = {}
        """Actors that are being placed, or load what they need, by the reference to that."""
        self.ready: dict[Any, int] = {}
        """Actors, and how many tasks each has."""
        self.alone: set[Any] = set()
        """Actors that get no second task beside the one they have."""
        self.running: dict[Any, tuple[Any, _Job]] = {}
        """Actor and task by the reference to the results."""
        self.again: collections.deque[_Job] = collections.deque()
        self.queue: queue.Queue[_Job] = queue.Queue(QUEUED)
        self.fed: concurrent.futures.Future[None] = concurrent.futures.Future()
        """Done once all tasks are in the queue."""
        self.over = threading.Event()
        self.failed_starts = 0
        self.looked = -math.inf

    def results(self) -> Iterator[R]:
        import ray

        feeder = threading.Thread(target=self._feed, daemon=True)
        feeder.start()
        try:
            with cluster.watched(self._state) as moved:
                while self.running or not self._all_handed_out():
                    self._grow()
                    self._hand_out()
                    if not (refs := [*self.running, *self.starting]):
                        time.sleep(0.05)
                        continue
                    for ref in ray.wait(refs, timeout=0.5)[0]:
                        for result in self._settle(ref):
                            moved()
                            yield result
        finally:
            self.over.set()
            if ray.is_initialized():  # it is not where an error has ended all; then `ray.kill` would start a new one
                for actor in (*self.starting.values(), *self.ready):
                    ray.kill(actor)

    def _feed(self) -> None:
        try:
            for task in self.tasks:
                while not self.over.is_set():
                    with contextlib.suppress(queue.Full):
                        self.queue.put(_Job(task), timeout=0.5)
                        break
                if self.over.is_set():
                    break
        except BaseException as error:
            self.fed.set_exception(error)
        else:
            self.fed.set_result(None)

    def _all_handed_out(self) -> bool:
        if not self.fed.done():
            return False
        self.fed.result()  # raises what the tasks' source raised
        return self.queue.empty() and not self.again

    def _state(self) -> str:
        """What is waited for, in words."""
        words = [f"{len(self.running):,} tasks are with {len(self.ready)} workers"] if self.ready else []
        if self.starting:
            words.append(
                f"{len(self.starting)} more are waiting for a place, or load what they need"
                if words
                else f"{len(self.starting)} workers are waiting for a place, or load what they need"
            )
        if not self.fed.done() and self.queue.empty():
            words.append("more is being listed")
        return "; ".join([*words, cluster.free_cpus()])

    def _grow(self) -> None:
        import ray

        def want() -> bool:
            there = len(self.starting) + len(self.ready)
            return there < most and self.queue.qsize() + len(self.again) > len(self.starting)

        if time.monotonic() - self.looked < LOOK_EVERY_S and self.ready:
            return
        most = self.pool.size
        if not want() and not self.pool.grows:
            return
        self.looked = time.monotonic()
        free = ray.available_resources()
        need = {
            {"num_cpus": "CPU", "num_gpus": "GPU"}[name]: each for name, each in self.pool.resources.items() if each
        }
        if self.pool.grows:
            there = ray.cluster_resources()
            most = max(most, int(min((there.get(name, 0) / each for name, each in need.items()), default=0)))
        # One may wait for a place: the cluster may grow for it, or another's work end.
        while want() and (not self.starting or all(free.get(name, 0) >= each for name, each in need.items())):
            actor = self.actor.remote()
            self.starting[actor.open.remote(self.given)] = actor
            for name, each in need.items():
                free[name] = free.get(name, 0) - each

    def _hand_out(self) -> None:
        while free := self.ready.keys() - self.alone:
            actor = min(free, key=lambda each: self.ready[each])
            if self.ready[actor] >= (1 if self.again else AHEAD):
                return
            if self.again:  # what a worker died with has the next one for itself: no other task is to die of it
                job = self.again.popleft()
                self.alone.add(actor)
            else:
                try:
                    job = self.queue.get_nowait()
                except queue.Empty:
                    return
            self.running[actor.run.remote(job.task)] = actor, job
            self.ready[actor] += 1

    def _settle(self, ref: Any) -> list[R]:
        """What has come of it."""
        import ray

        actor, job = (self.starting.pop(ref), None) if ref in self.starting else self.running.pop(ref)
        try:
            results: list[R] | None = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # what was run raised it
            if (cause := cli.input_error(error)) is not None:
                raise cause from None
            raise
        except ray.exceptions.RayError as error:  # the worker, its machine, or what it had made is gone
            return self._lost(actor, job, error)
        if job is None:
            self.failed_starts = 0
            self.ready[actor] = 0
            return []
        self.ready[actor] -= 1
        self.alone.discard(actor)
        return results or []

    def _lost(self, actor: Any, job: _Job | None, error: Exception) -> list[R]:
        import ray

        self.alone.discard(actor)
        if self.ready.pop(actor, None) is not None or job is None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
        if job is None:
            self.failed_starts += 1
            if self.failed_starts >= TRIES:
                raise error
            return []
        job.deaths += 1
        if job.deaths < TRIES:
            self.again.append(job)
            return []
        if self.rescue is None:
            raise error
        if halves := self.rescue.halves(job.task):
            self.again += [_Job(half) for half in halves]
            return []
        reason = str(error).strip().splitlines()[0]
        return [self.rescue.give_up(job.task, f"{TRIES} workers died while they had it ({reason})")]
