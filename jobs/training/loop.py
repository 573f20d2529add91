"""What every training worker runs. Imported by the driver, pickled by reference, readable top to bottom.

What a step computes is `jobs.training.methods`', by method. All that is drawn by chance is a function of the seed, the
epoch and a sample's id (`jobs.training.batches`), so that a run killed and resumed equals an uninterrupted one, and
another number of workers sees the same global batches.

A step is an optimiser step over all workers; `steps_per_epoch` = rows // global batch, the rows left over differ from
epoch to epoch.
"""

import collections
import contextlib
import ctypes
import math
import time
import traceback
from collections.abc import Iterator
from typing import Any

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero

from ddpm_core.diffusion import seeded
from ddpm_core.errors import InputError
from jobs.training import distributed, profiling
from jobs.training.batches import Batch, Prefetcher, Sampler
from jobs.training.methods import Diffusion, Objective
from jobs.training.options import TrainOptions
from jobs.training.run_folder import Run, latest_checkpoint, note_attempt
from jobs.training.tracking import Tracking
from jobs.training.validation import NUM_IMAGES, Validation, warnings_of
from jobs.training.worker_state import END, SAVE, STOP, LossMeans, WorkerConsensus, WorkerState, is_finite, restore

POST_EVERY_S = 0.5
"""How often the driver hears how far we are."""
WARM = 0.05
"""Share of the run after which the images of a validation are judged."""


def train_loop(job: dict[str, Any]) -> dict[str, Any]:
    """One worker of `jobs.train`; `job` is plain data, as `driver.fit` makes it.

    Returns where the losses ceased to be good, if they did, and the last good checkpoint; or where it was told to end.
    """
    times = dict(job["times"])
    keep_memory()
    profiling.note(times, "workers")
    worker = restore(job)
    config, options, method, ema, start = worker.config, worker.options, worker.method, worker.ema, worker.start
    run = open_run(job, worker) if worker.rank == 0 else None  # all that is written and shown is rank 0's
    post = StatusPoster(job["board"], start=start, total=worker.total_steps)
    validation = Validation(
        worker.val, config, options, method, worker.device, worker.share, together=worker.parallel == "fsdp"
    )
    consensus = WorkerConsensus(
        worker.share.world,
        save_every_s=job["checkpoint_every_s"],
        comparable=method.comparable,
        first_loss=worker.first_loss,
    )
    if start and worker.validates(start):  # the worker before us may have died over it
        validate_again(worker, validation, run)

    def save(step: int, *, strict: bool) -> None:
        """All workers must call it."""
        state = {**method.state_dict(), "losses": mean_losses.state_dict(), "first_loss": consensus.first_loss}
        weights = distributed.gathered(ema.state_dict())
        if run:
            run.save(step, weights, state, strict=strict)

    sampler, pin = Sampler(worker.train, config, options), worker.device.type == "cuda"
    feed = Prefetcher(sampler, worker.rows, worker.share, start=start, stop=worker.total_steps, pin=pin)
    trace = profiling.tracer(job["run"] if job["profile"] and run else None)
    profiling.note(times, "network")
    mean_losses, clock, num_steps = worker.losses, time.monotonic(), 0
    pace = Pace(worker, len(validation.rows))
    if config.origin and not start:  # from here on the run has its weights itself
        save(0, strict=True)
    for step, draw in enumerate(feed, start=start):
        torch.manual_seed(seeded("dropout", options.seed, step, worker.rank).initial_seed())  # inside the network
        rate = learning_rate(options, step, worker.total_steps)
        batch = draw.to(worker.device, shown=config.shown)
        with memory_errors(method, batch):
            losses = method.step(batch, rate, step)
        done, num_steps = step + 1, num_steps + 1
        ema.update(method.network, done)
        mean_losses.add(losses)
        pace.step()
        if run:
            run.step(done, num_steps * options.global_batch_size / (time.monotonic() - clock))
            epoch = done // worker.steps_per_epoch
            post(done, epoch=epoch, loss=consensus.loss, left_s=pace.left_s(done), **run.status())
        agreed = consensus.agree(losses, storing=run is not None and run.storing, ending=post.ending)
        trace()
        if run and step == start:
            profiling.note(times, "first step")
            run.started = profiling.summary(profiling.spans(times))
            note_attempt(job["run"], start, worker.share.world, worker.device, profiling.spans(times))
        epoch_ends = done % worker.steps_per_epoch == 0
        if not epoch_ends and not agreed & (SAVE | STOP):
            continue

        means = mean_losses.gather(worker.share.world)
        finite = all(map(math.isfinite, means.values())) and is_finite(method.network, worker.share.world)
        if agreed & STOP or not finite:
            if run:
                run.stored(strict=True)
                run.close("FAILED")
            return {"diverged_at": done, "last_good": latest_checkpoint(job["run"])[1]}
        row = None
        if epoch_ends:
            passed_s = time.monotonic() - clock
            speed = {
                "learning_rate": rate,
                "images_per_s": num_steps * options.global_batch_size / passed_s,
                "data_wait_share": feed.waited_s / passed_s,
            }
            mean_losses = LossMeans()
            if run:
                run.log({**worker.position(done), "split": "train", **means, **speed})
            if worker.validates(done):
                row = validate(worker, validation, run, done)
                warn(worker, run, row)
            if run:
                run.flush()
        if agreed & SAVE or row or worker.keeps(done):
            save(done, strict=epoch_ends)
            if run and consensus.leaving:  # not a step more than this one may be lost
                run.stored(strict=False)
        if row:
            if run:
                run.promote(row, of_epochs=options.epochs)
            report = {"step": done, "loss": means["loss"], **{f"val_{name}": value for name, value in row.items()}}
            ray.train.report(report)  # a barrier, which the controller lets pass twice a second
            for callback in job["callbacks"]:
                callback.after_report(None, [report], None)
            pace.validated()
        if agreed & END and done < worker.total_steps:
            if run:
                run.stored(strict=True)
                run.close("KILLED")
            return {"ended_at": done}
        if epoch_ends:
            clock, num_steps, feed.waited_s = time.monotonic(), 0, 0.0
    if run:
        run.stored(strict=True)
        run.close("FINISHED")
        post(worker.total_steps, epoch=options.epochs, loss=consensus.loss, **run.status())
    return {}


def learning_rate(options: TrainOptions, step: int, total_steps: int) -> float:
    """Of the step'th update (the first is step 0)."""
    optim = options.optim
    rate = optim.learning_rate * min(1.0, (step + 1) / max(optim.warmup_steps, 1))
    if optim.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
    return rate


def open_run(job: dict[str, Any], worker: WorkerState) -> Run:
    """The run's folder, for rank 0 to write to from the step that the worker goes on from."""
    run = Run(
        job["run"],
        worker.config,
        files=worker.method.files,
        comparable=worker.method.comparable,
        keep_every_steps=worker.keep_every_steps,
        owner=job["owner"],
    )
    run.resume(worker.start)
    run.tracking = Tracking(job["run"], worker.config, mlflow=job["mlflow"], use_ray=ray.is_initialized())
    return run


def validate(worker: WorkerState, validation: Validation, run: Run | None, step: int) -> dict[str, Any]:
    """The row of metrics of a validation after `step`, logged; all workers must call it."""
    found = validation(worker.ema.tracks)
    row = {**worker.position(step), "split": "val", **found.row}
    if run:
        run.log(row, image=found.image)
    return row


def validate_again(worker: WorkerState, validation: Validation, run: Run | None) -> None:
    """Make sure that the checkpoint we go on from is validated, and promoted if it is the best."""
    row = broadcast_from_rank_zero(run.validation(worker.start) if run else None)
    if row is None:
        row = validate(worker, validation, run, worker.start)
        if run:
            run.flush()
    warn(worker, run, row)
    if run:
        run.promote(row, of_epochs=worker.options.epochs)


def warn(worker: WorkerState, run: Run | None, row: dict[str, Any]) -> None:
    """Let the run say what a validation's images are wrong in."""
    if run:
        run.warnings = warnings_of(row, worker.config) if row["step"] >= WARM * worker.total_steps else []


def keep_memory() -> None:
    """Keep freed memory in this process: glibc would give the activations of each step back to the system and fetch
    them again, page by page, in the next one: a seventh of the time of a step on a CPU."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)  # the most it takes


@contextlib.contextmanager
def memory_errors(method: Objective, batch: Batch) -> Iterator[None]:
    """A step that does not fit on a GPU, mostly the first, as an InputError that says what does."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what the step had computed
        fewer = "give a smaller --global-batch-size or more workers"
        raise InputError(
            f"a worker's share of a step, {len(batch.t)} images, does not fit into the GPU's memory "
            f"({str(error).split('.')[0]}); {method.what_fits(batch) if isinstance(method, Diffusion) else fewer}"
        ) from None


class Pace:
    """How long the rest of a run takes: steps by the last of them, validations by the last one. Before the first, one
    counts as its images do in a step, of whose time the forward pass is a third."""

    RECENT = 100

    def __init__(self, worker: WorkerState, num_rows: int) -> None:
        """`num_rows`: images of a validation."""
        self.worker = worker
        options, sampling = worker.options, worker.config.sampling
        drawn = NUM_IMAGES * sampling.num_steps if options.method == "diffusion" else 0
        forward = num_rows * len(options.optim.ema_sigma_rels) + drawn
        self.steps_a_validation = forward / options.global_batch_size / 3
        self.recent: collections.deque[float] = collections.deque(maxlen=self.RECENT)
        """Seconds of steps; not of the first, which warms up."""
        self.validation_s: float | None = None
        self.at: float | None = None

    def step(self) -> None:
        """A step is done."""
        now = time.monotonic()
        if self.at is not None:
            self.recent.append(now - self.at)
        self.at = now

    def validated(self) -> None:
        """A validation is done, with all that comes with it, since the last step."""
        if self.at is not None:
            now = time.monotonic()
            self.validation_s, self.at = now - self.at, now

    def left_s(self, done: int) -> float | None:
        """Of a run at that step; None while nothing is known."""
        if not self.recent:
            return None
        step_s = sum(self.recent) / len(self.recent)
        each_s = self.steps_a_validation * step_s if self.validation_s is None else self.validation_s
        first = done // self.worker.steps_per_epoch + 1
        ends = range(first * self.worker.steps_per_epoch, self.worker.total_steps + 1, self.worker.steps_per_epoch)
        return (self.worker.total_steps - done) * step_s + each_s * sum(map(self.worker.validates, ends))


class StatusPoster:
    """What rank 0 notes on the driver's board, at most twice a second, and what it hears there."""

    def __init__(self, board: Any, *, start: int, total: int) -> None:
        self.send = getattr(board.post, "remote", board.post)
        self.start, self.total = start, total
        self.sent_s = 0.0
        self.answer: Any = False

    def __call__(self, done: int, **fields: Any) -> None:
        """So many steps are done; `fields` as `StatusBoard.post`'s."""
        now = time.monotonic()
        if now - self.sent_s >= POST_EVERY_S or done == self.total:
            self.sent_s = now
            self.answer = self.send({"step": done, "total": self.total, "start": self.start, **fields})

    @property
    def ending(self) -> bool:
        """Whether the run is to end, as far as the board has answered."""
        if isinstance(self.answer, ray.ObjectRef) and ray.wait([self.answer], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):  # the board is gone, and the driver with it
                self.answer = ray.get(self.answer)
        return self.answer is True
