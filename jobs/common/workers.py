"""One function over many tasks, or a worker with a state over many batches: by Ray Data, or in this process.

Tasks and results are any objects that can be pickled. Both ways give the same results and the same InputError; this
process in the order of the tasks, Ray in any order, so a result says itself what it is of.
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
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

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
CPUS_PER_ACTOR = 0.5
"""Logical CPUs of one actor on a cluster without GPUs; what is left lets Ray Data's reading tasks be placed."""
MOST_PER_CPU = 8
"""Actors asked for on a CPU, at most: each loads PyTorch and the network, and thousands would never have started."""

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


def piped(
    read: Callable[[T], Iterable[Any]],
    tasks: Iterable[T],
    num_tasks: int,
    worker: Callable[..., Callable[[Any], R]],
    make: Mapping[str, Any],
    pool: "Pool",
) -> Iterator[R]:
    """`worker(**make)` of each batch that `read` makes of a task; read ahead of the workers, one worker a place in
    `pool`: an actor, or a thread of this process. Needs Ray running unless the pool is this process.

    Raises:
        InputError: as `read` or the worker raises it.
    """
    if not pool.on_ray:
        place = threading.local()

        def run(batch: Any) -> R:
            if not hasattr(place, "worker"):
                place.worker = worker(**make, num_threads=pool.num_threads)
            return place.worker(batch)

        batches = itertools.chain.from_iterable(mapped(read, tasks, num_tasks, num_workers=0))
        yield from _here(run, batches, 0, math.inf, num_threads=pool.size)
        return
    import ray.data

    rows = _rows([pickle.dumps(task) for task in tasks]).map_batches(**_each(read, None, many=True))
    # A block is one worker's task: as read they would be far too large to share out.
    rows = rows.repartition(target_num_rows_per_block=1).map_batches(
        _Worker,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_args=(worker, {**make, "num_threads": pool.num_threads}),
        compute=ray.data.ActorPoolStrategy(size=pool.size),
        **pool.resources,
    )
    yield from _results(rows, prefetch_batches=0)


@dataclasses.dataclass(frozen=True)
class Pool:
    """How many workers, and what each may use."""

    size: int
    num_threads: int
    resources: Mapping[str, float]
    on_ray: bool = True


def pool(num_batches: int, num_workers: int | None) -> Pool:
    """Workers for so many batches: this process for 0; by default a GPU each where the cluster has any, else a CPU.

    Raises:
        InputError: more workers than GPUs, or far more than CPUs.
    """
    if num_workers == 0:
        import torch

        # A worker on each core: the threads of a single one would wait for each other after every operation.
        cores = torch.get_num_threads()
        size = 1 if torch.cuda.is_available() else min(cores, MAX_HERE, max(num_batches, 1))
        return Pool(size, cores // size, {}, on_ray=False)
    import ray

    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), max(int(there.get("CPU", 1)), 1)
    if gpus:
        if num_workers is not None and num_workers > gpus:
            raise InputError(f"--num-workers {num_workers}: the cluster has {gpus} GPUs, one for each; give fewer")
        return Pool(min(num_workers or gpus, max(num_batches, 1)), 2, {"num_gpus": 1.0, "num_cpus": 1.0})
    if num_workers is not None and num_workers > MOST_PER_CPU * cpus:
        raise InputError(
            f"--num-workers {num_workers}: the cluster has {cpus} CPUs; give at most {MOST_PER_CPU * cpus}"
        )
    # One thread a worker: convolutions this small gain less from a second thread than a second worker gives.
    size = min(num_workers or cpus, max(num_batches, 1))
    return Pool(size, 1, {"num_cpus": min(CPUS_PER_ACTOR, cpus / 2 / size)})


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


def _each(function: Callable[[Any], Any], num_workers: int | None, *, many: bool = False) -> dict[str, Any]:
    """Arguments of `map_batches` that give the results of a block's tasks; of each of `many` results a row."""
    import pyarrow
    import ray
    import ray.data

    shared = ray.put(function)  # once, however large its arguments are

    def block(batch: "pyarrow.Table") -> "pyarrow.Table":
        run = ray.get(shared)
        results = [run(pickle.loads(task)) for task in batch["task"].to_pylist()]
        if many:
            results = list(itertools.chain.from_iterable(results))
        return pyarrow.table({"result": pyarrow.array(map(pickle.dumps, results), pyarrow.large_binary())})

    block.__name__ = getattr(function, "func", function).__name__  # what Ray's dashboard calls it
    compute = {} if num_workers is None else {"compute": ray.data.TaskPoolStrategy(num_workers)}
    return {"fn": block, "batch_size": None, "batch_format": "pyarrow", **compute}


class _Worker:
    """One place of a pool: an actor of Ray Data."""

    def __init__(self, worker: Callable[..., Callable[[Any], Any]], make: dict[str, Any]) -> None:
        self.run = worker(**make)

    def __call__(self, batch: "pyarrow.Table") -> "pyarrow.Table":
        import pyarrow

        results = [pickle.dumps(self.run(pickle.loads(each))) for each in batch["result"].to_pylist()]
        return pyarrow.table({"result": pyarrow.array(results, pyarrow.large_binary())})


def _results(rows: "ray.data.Dataset", *, prefetch_batches: int = 1) -> Iterator[Any]:
    """What the blocks hold; a worker's InputError as such, out of what Ray wraps around it."""
    try:
        batches = iter(rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch_batches))
        with cluster.slow(
            lambda: f"waiting for the first result, while workers start and load what they need: {cluster.free_cpus()}"
        ):
            first = [*itertools.islice(batches, 1)]
        for batch in itertools.chain(first, batches):
            yield from map(pickle.loads, batch["result"].to_pylist())
    except Exception as error:
        if (cause := cli.input_error(error)) is not None:
            raise cause from None
        raise
