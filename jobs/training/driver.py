"""A training run as its driver sees it: the loop on Ray Train, lost workers, the end."""

import concurrent.futures
import contextlib
import functools
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ddpm_core import config as configs
from ddpm_core import storage
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from jobs.common import cli, stopping
from jobs.common.progress import Waiting
from jobs.training import monitor, profiling, run_folder
from jobs.training.options import TrainArgs

HANGS_S = 3600
"""How long workers wait for each other; rank 0 may be validating alone. One that is stopped or cut off is found dead by
Ray within minutes."""

ASKED_S = 2.0
"""How long a run that is told to end may take to say that it will."""


def check_cluster(args: TrainArgs) -> None:
    """The workers must fit, or Ray would wait for ever; a cluster that grows is asked to, and given time.

    Raises:
        NoRoomError: with the arithmetic.
    """
    import ray
    import ray.autoscaler.sdk

    worker = resources_per_worker(args)
    deadline = time.monotonic() + args.wait_for_nodes_s
    asked = False
    least, _ = args.workers
    while short := {name: each for name, each in worker.items() if ray.cluster_resources().get(name, 0) < each * least}:
        if time.monotonic() >= deadline:
            name, each = next(iter(short.items()))
            raise NoRoomError(no_room(args, name, each, ray.cluster_resources().get(name, 0)))
        if not asked:
            ray.autoscaler.sdk.request_resources(bundles=[worker] * least)
            print(f"waiting up to {args.wait_for_nodes_s} s for the cluster to grow", flush=True)
            asked = True
        time.sleep(2)
    if asked:  # or the nodes would be held when the run is over
        ray.autoscaler.sdk.request_resources(bundles=[])


def fit(
    args: TrainArgs,
    config: ModelConfig,
    dataset: str,
    run: str,
    times: profiling.Times,
    *,
    spread: bool = True,
    waiting: Waiting | None = None,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run the loop on Ray Train, the data read and decoded once onto the nodes' disks.

    `spread` False: they are there already, and a node that lacks them reads for itself. `callbacks`: Ray Train's.

    Raises:
        DivergedError: the losses are lost.
    """
    import ray
    import ray.train
    import ray.train.torch

    from jobs.datasets import cache
    from jobs.training import gloo
    from jobs.training.loop import train_loop

    local = not args.workers[1]
    waits_for = waiting.at if waiting else lambda what: None
    if not local:
        check_cluster(args)
        waits_for("")
        if spread:
            cache.spread(dataset, ("train", "val"), resource="GPU" if args.use_gpu else "CPU")
    profiling.note(times, "data")
    waits_for("the first step" if local else "the workers, which load the network and the images, and the first step")
    # Only now that we can begin: a command that trains there ends when it sees it.
    owner = uuid.uuid4().hex
    for name, content in run_folder.describe(run, config, owner).items():
        storage.write_bytes(storage.join(run, name), content)
    board = monitor.StatusBoard() if local else ray.remote(num_cpus=0)(monitor.StatusBoard).remote()
    attempts = storage.join(run, ".ray")  # Ray's own notes; ours are what a resumed run reads
    trainer = functools.partial(
        ray.train.torch.TorchTrainer,
        train_loop,
        train_loop_config={
            "data": dataset,
            "run": run,
            "owner": owner,
            "config": configs.to_dict(config),
            "options": configs.to_dict(args.options),
            "board": board,
            "checkpoint_every_s": args.checkpoint_every_minutes * 60,
            "keep_every_epochs": args.keep_every_epochs,
            "parallel": args.parallel,
            "mlflow": args.mlflow,
            "times": times,
            "profile": args.profile,
            "callbacks": [*callbacks] if local else [],  # in this process Ray Train calls none
        },
        torch_config=gloo.Torch(timeout_s=HANGS_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=args.workers[0] if len({*args.workers}) == 1 else args.workers,
            use_gpu=args.use_gpu,
            resources_per_worker=resources_per_worker(args),
        ),
    )
    failures = 0
    with _threads(args.cpus_per_worker if local else None), monitor.monitored(board, run, lambda: waits_for("")):
        while True:
            before, _ = run_folder.latest_checkpoint(run)
            storing = ray.train.RunConfig(
                name=f"attempt-{time.time_ns()}",
                storage_path=attempts,
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
                callbacks=[*callbacks],
            )
            try:
                end = _fit(trainer(run_config=storing), board).return_value or {}
                break
            except ray.train.TrainingFailedError as error:
                step, _ = run_folder.latest_checkpoint(run)
                failures = 1 if step > before else failures + 1
                if failures > args.max_failures or local or cli.input_error(error) is not None:
                    raise
                cause = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                print(f"workers were lost ({cause}); going on from step {step:,}", file=sys.stderr, flush=True)
                times.clear()  # as in the job: it starts anew
                profiling.note(times, "loss")
                check_cluster(args)
        storage.delete_folder(attempts)
        if "ended_at" in end:
            print(f"train: step {end['ended_at']:,} is stored", file=sys.stderr, flush=True)
            raise KeyboardInterrupt
        if end:
            raise DivergedError(
                f"the losses were lost at step {end['diverged_at']:,} (not finite, or far above the first ones); the "
                f"last good checkpoint is {end['last_good'] or 'none'}; train anew with a lower --optim.learning-rate"
            )


def no_room(args: TrainArgs, name: str, each: float, there: float) -> str:
    """The arithmetic of too few of a resource, and what helps."""
    grows = "or --wait-for-nodes-s 600 to a cluster that grows"
    if name == "GPU" and not there:
        return f"--use-gpu: there is no GPU here that Ray knows of; leave it out to train on CPUs, {grows}"
    if there < each:
        remedy = f"--cpus-per-worker {there:.0f} or fewer" if there >= 1 else "--num-workers 0"
    else:
        remedy = f"--num-workers {there // each:.0f} or fewer"
    needs = f"needs {each * args.workers[0]} {name}s, the cluster has {there:g}"
    return f"--num-workers {args.num_workers} with {each} {name} each {needs}: give {remedy}, {grows}"


def _fit(trainer: Any, board: Any) -> Any:
    """`trainer.fit()`; a signal lets the run store a checkpoint and end.

    On Ray it has a thread of its own, so that this one is there for signals; Ray Train's handler of Ctrl-C, which it
    sets in the main thread only, would end the run where it is.
    """
    if isinstance(board, monitor.StatusBoard):
        with stopping.gently(board.stop):
            return trainer.fit()
    if threading.current_thread() is not threading.main_thread():  # a trial of a sweep
        return trainer.fit()
    import ray

    result: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def fit() -> None:
        try:
            result.set_result(trainer.fit())
        except BaseException as error:
            result.set_exception(error)

    with stopping.gently(lambda: ray.get(board.stop.remote(), timeout=ASKED_S)):
        threading.Thread(target=fit, daemon=True).start()
        return result.result()


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """This process' PyTorch with as many threads as a worker has (--cpus-per-worker), unless OMP_NUM_THREADS says
    otherwise; None: as it is. Networks this small lose by a second thread on a busy machine."""
    import torch

    before = torch.get_num_threads()
    if number is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(number, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resources_per_worker(args: TrainArgs) -> dict[str, float]:
    return {"CPU": args.cpus_per_worker, **({"GPU": 1} if args.use_gpu else {})}


class NoRoomError(InputError):
    """The cluster is smaller than what was asked for."""


class DivergedError(Exception):
    """A run that cannot go on."""

    outcome = "diverged"
    """What the report says of it."""
