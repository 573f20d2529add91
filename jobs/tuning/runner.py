"""Where the trials of a sweep run: on a cluster by Ray Tune, or one after the other in this process."""

import contextlib
import math
import os
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TextIO, TypeVar

import ray
import ray.tune
import ray.tune.schedulers
from ray.tune.execution.placement_groups import PlacementGroupFactory

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.datasets import cache
from jobs.training import driver
from jobs.tuning.plan import SweepJob, train_args
from jobs.tuning.study import ASHA, LOSS, Search, SweepError, num_left

HOST = {"memory": 1}
"""What the actor of a trial takes whose work is done by others: a byte. A share of a CPU, however small, would keep
the last worker from a cluster that is just large enough."""

ROOM_EVERY_S = 2.0
"""How often the cluster is asked how large it is."""
Result = TypeVar("Result")
Report = Callable[[dict[str, Any]], Any]
Trial = Callable[[Mapping[str, Any], Report], None]
"""Runs one trial, plain data, and reports results as they come; the last one says how it ended."""


class Runner(Protocol):
    """What the stages of a sweep ask for."""

    def prepare(self) -> None:
        """Before trials that train.

        Raises:
            InputError: there is no room for a single one.
        """

    def room(self, num_workers: int) -> int:
        """Trials of so many workers that may run now."""

    def run(self, trial: Trial, search: Search, *, resources: Mapping[str, float], scheduler: ASHA | None) -> None:
        """All that is left of a study's trials. `resources`: of what runs the trial itself.

        Raises:
            SweepError: some are left.
        """

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Once, with what one worker takes."""


# -- in this process ----------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """A trial that lags behind; not an error that a trial could answer."""

    outcome = "stopped"
    """What the run's report says of it."""


class LocalRunner:
    """One trial after the other in this process; needs no Ray."""

    def prepare(self) -> None: ...

    def room(self, num_workers: int) -> int:
        return 1

    def run(self, trial: Trial, search: Search, *, resources: Mapping[str, float], scheduler: ASHA | None) -> None:
        number = 0
        while isinstance(config := search.suggest(str(number)), dict):
            report = _Reports(str(number), search, scheduler)
            # What a training shows of itself is in its report; the terminal has the table of all trials.
            with contextlib.suppress(Stopped), open(os.devnull, "w") as nowhere, _silent(nowhere):
                trial(config, report)
            search.on_trial_complete(str(number), report.last)
            number += 1

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        return function(*args)


@contextlib.contextmanager
def _silent(nowhere: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


class _Reports:
    """Takes what a trial reports."""

    def __init__(self, name: str, search: Search, scheduler: ASHA | None) -> None:
        self.name, self.search, self.scheduler = name, search, scheduler
        self.trial, self.last = types.SimpleNamespace(trial_id=name), dict[str, Any]()
        if scheduler is not None:
            scheduler.on_trial_add(None, self.trial)

    def __call__(self, result: dict[str, Any]) -> None:
        self.last = result
        self.search.on_trial_result(self.name, result)
        if self.scheduler is None or LOSS not in result:
            return
        if self.scheduler.on_trial_result(None, self.trial, result) == ray.tune.schedulers.TrialScheduler.STOP:
            raise Stopped("Stopped by ASHA: others were ahead at the same number of epochs.")


# -- on a cluster -------------------------------------------------------------------------------------------------


class RayRunner:
    """Ray Tune, as many trials at a time as there is room for."""

    def __init__(self, job: SweepJob) -> None:
        self.job, self.args = job, job.args
        self.asked_s, self.slots = -math.inf, 1

    def prepare(self) -> None:
        args = self.args
        driver.check_cluster(train_args(args, args.output, self.job.options))
        self._check_slots(args.num_workers)
        fewer = f", no more than --max-concurrent {args.max_concurrent}" if args.max_concurrent else ""
        print(f"sweep: {arithmetic(ray.nodes(), self.job.worker, args.num_workers)}{fewer}", flush=True)
        cache.spread(args.data, ("train", "val"), resource="GPU" if args.use_gpu else "CPU")

    def _check_slots(self, num_workers: int) -> None:
        if num_slots(ray.nodes(), self.job.worker) < num_workers:
            raise InputError(
                f"{arithmetic(ray.nodes(), self.job.worker, num_workers)}; give fewer --num-workers or "
                "--cpus-per-worker"
            )

    def room(self, num_workers: int) -> int:
        """The cluster may grow and lose nodes."""
        now = time.monotonic()
        if now - self.asked_s >= ROOM_EVERY_S:
            self.asked_s, self.slots = now, num_slots(ray.nodes(), self.job.worker)
        fits = self.slots // num_workers
        return max(min(fits, self.args.max_concurrent or fits), 1)

    def run(self, trial: Trial, search: Search, *, resources: Mapping[str, float], scheduler: ASHA | None) -> None:
        left = num_left(search.study, search.total)
        if not left:
            return
        if resources is not HOST:
            self._check_slots(1)

        def on_tune(config: dict[str, Any]) -> None:
            trial(config, ray.tune.report)

        notes = storage.join(self.args.output, ".ray")
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(on_tune, PlacementGroupFactory([dict(resources)])),
            tune_config=ray.tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=left,
                reuse_actors=resources is not HOST,  # not with a scheduler, which may stop a trial while it works
            ),
            run_config=ray.tune.RunConfig(
                name=search.study.study_name,
                storage_path=notes,
                verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=self.args.max_failures),
            ),
        )
        with _environment(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner.fit()
        storage.delete_folder(notes)
        if num_left(search.study, search.total):
            raise SweepError("Ray Tune ended before all trials had; the same command goes on")

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        gpus = {"num_gpus": 1} if self.args.use_gpu else {}
        task = ray.remote(num_cpus=self.args.cpus_per_worker, **gpus)(function)
        found: Result = ray.get(task.remote(*args))
        return found


def num_slots(nodes: Sequence[Mapping[str, Any]], worker: Mapping[str, float]) -> int:
    """How many workers fit on the nodes that are alive, whole on one node each."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(min(int(there.get(name, 0) // each) for name, each in worker.items()) for there in alive)


def arithmetic(nodes: Sequence[Mapping[str, Any]], worker: Mapping[str, float], num_workers: int) -> str:
    """How many trials there is room for, in words."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    there = ", ".join(f"{sum(node.get(name, 0) for node in alive):g} {name}s" for name in worker)
    each = " and ".join(f"{value:g} {name}{'' if value == 1 else 's'}" for name, value in worker.items())
    slots = num_slots(nodes, worker)
    count = f"{len(alive)} node{'' if len(alive) == 1 else 's'}"
    return (
        f"{there} on {count}: room for {slots} worker{'' if slots == 1 else 's'} of {each}; "
        f"a trial takes {num_workers}, so {slots // num_workers} at a time"
    )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Ray Tune's settings, which it reads from the environment."""
    wanted = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours to answer
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # what it would write of each trial, the study has
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_MAX_PENDING_TRIALS_PG": "16",  # `Search.room` is what limits them
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the last that a trial tells is how it ended
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
