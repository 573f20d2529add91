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
from collections.abc import Iterator
from typing import Any

import ray.train
import ray.train.torch
import ray.util
import torch
import torch.distributed
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor
from torch.distributed.tensor import DTensor

from ddpm_core import config as configs
from ddpm_core import storage
from ddpm_core.config import ModelConfig
from ddpm_core.diffusion import seeded
from ddpm_core.ema import EMA
from ddpm_core.errors import InputError
from jobs.datasets import cache
from jobs.training import distributed, profiling
from jobs.training.batches import Prefetcher, Sampler, Share, training_rows
from jobs.training.methods import objective
from jobs.training.options import Parallel, TrainOptions
from jobs.training.run_folder import Run, folder_of, latest_checkpoint, note_attempt, read_state
from jobs.training.tracking import Tracking
from jobs.training.validation import AsyncValidation, SyncValidation, Validation, validate

SAVE, ASK, STOP = 1, 2, 4
"""What workers tell each other after a step: take a checkpoint; ask Ray whether a node is about to go; the losses are
lost."""
ASK_EVERY_S = 3.0
"""How often Ray is asked."""
POST_EVERY_S = 0.5
"""How often the driver is told how far we are."""
WINDOW, DIVERGED = 100, 3.0
"""A run has diverged when its mean loss over so many steps is so many times that of its first ones."""


def learning_rate(options: TrainOptions, step: int, total_steps: int) -> float:
    """Of the step'th update (the first is step 0)."""
    optim = options.optim
    rate = optim.learning_rate * min(1.0, (step + 1) / max(optim.warmup_steps, 1))
    if optim.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
    return rate


def train_loop(job: dict[str, Any]) -> dict[str, Any]:
    """One worker of `jobs.train`; `job` is plain data, as `train.fit` makes it.

    Returns where the losses ceased to be good, if they did, and the last good checkpoint.
    """
    times = dict(job["times"])
    keep_memory()
    profiling.note(times, "workers")
    config = configs.from_dict(ModelConfig, job["config"])
    options = configs.from_dict(TrainOptions, job["options"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    train, val = (cache.load(job["data"], split, content_hash=config.data.content_hash) for split in ("train", "val"))
    rows = training_rows(train, config, options)
    steps_per_epoch = len(rows) // options.global_batch_size
    total_steps = steps_per_epoch * options.epochs

    torch.manual_seed(options.seed)
    mode: Parallel = job["parallel"] if world > 1 else "ddp"
    method = objective(config, options, device, mode)
    ema = EMA(method.network, sigma_rels=options.optim.ema_sigma_rels)
    # Rank 0 says which, or workers that look while an older one is dropped could begin at different steps.
    start, folder = broadcast_from_rank_zero(latest_checkpoint(job["run"]))
    sums, first_loss = Sums(), None
    if start > total_steps:
        raise InputError(
            f"{job['run']} is trained for more than {options.epochs} epochs; give --epochs "
            f"{math.ceil(start / steps_per_epoch)} or more, or another --output"
        )
    if folder:
        state = read_state(folder)
        ema.load_state_dict(state.pop("ema"))
        sums = Sums(**state.pop("sums", {}))  # releases before this one stored none, and at the end of epochs only
        first_loss = state.pop("first_loss", None)
        method.load_state_dict(state)
    method.distribute()
    if mode == "fsdp":
        for track in ema.tracks.values():
            distributed.shard(track, device)

    keep_every = job["keep_every_epochs"] * steps_per_epoch
    run = Run(
        job["run"],
        config,
        files=method.files,
        comparable=method.comparable,
        keep_every_steps=keep_every,
        owner=job["owner"],
    )
    if rank == 0:
        run.resume(start)
        run.tracking = Tracking(job["run"], config, mlflow=job["mlflow"], use_ray=ray.is_initialized())
    share = Share(rank=rank, world=world)
    validation = Validation(val, config, options, method, device, share, together=mode == "fsdp")
    validator = AsyncValidation(job, rank=rank) if job["aside"] else SyncValidation(validation)
    every_s = job["checkpoint_every_s"]
    signals = WorkerConsensus(world, save_every_s=every_s, comparable=method.comparable, first_loss=first_loss)
    post = Post(job["board"], start=start, total=total_steps) if rank == 0 else None

    def facts(step: int) -> dict[str, Any]:
        return {"step": step, "epoch": step // steps_per_epoch, "images_seen": step * options.global_batch_size}

    def validates(step: int) -> bool:
        epoch, rest = divmod(step, steps_per_epoch)
        return not rest and (epoch % options.validate_every_epochs == 0 or epoch == options.epochs)

    def validated(*, wait: bool = False) -> list[dict[str, Any]]:
        """Rows of the validations done since the last call, by now logged."""
        rows = []
        for of_step, found in validator.take(wait=wait):
            rows.append({**of_step, "split": "val", **found.row})
            if rank == 0:
                run.log(rows[-1], picture=found.picture)
        if rank == 0 and rows:
            run.flush()
        return rows

    def promote(rows: list[dict[str, Any]]) -> None:
        for row in rows if rank == 0 else []:
            run.promote(row, of_epochs=options.epochs)

    for step in run.unvalidated(validates, before=start) if rank == 0 else []:
        run.awaited.add(step)
        weights = read_state(storage.join(job["run"], folder_of(step)))["ema"]
        validator.found.append((facts(step), validate(job, weights, device)))
    promote(validated())
    if start and validates(start):  # what the worker before us may have died over
        known = broadcast_from_rank_zero(run.validation(start))
        if known is None:
            run.awaited.add(start)
            validator.start(facts(start), ema)
        promote(validated() if known is None else [known])

    sampler, pin = Sampler(train, config, options), device.type == "cuda"
    feed = Prefetcher(sampler, rows, share, start=start, stop=total_steps, pin=pin)
    clock, num_steps = time.monotonic(), 0
    traced = profiling.tracer(job["run"] if job["profile"] and rank == 0 else None)
    profiling.note(times, "network")
    for step, draw in enumerate(feed, start=start):
        torch.manual_seed(hash_step(options.seed, step, rank))  # dropout inside the network
        rate = learning_rate(options, step, total_steps)
        with memory_explained():
            losses = method.step(draw.to(device, shown=config.shown), rate, step)
        sums.add(losses)
        num_steps += 1
        done = step + 1
        ema.update(method.network, done)
        if run.tracking:
            run.tracking.step(done, num_steps * options.global_batch_size / (time.monotonic() - clock))
        if post and post(done, epoch=done // steps_per_epoch, loss=signals.loss, **run.told()):
            promote(validated())  # those done aside
        agreed = signals.agree(losses, storing=run.storing)
        traced()
        if step == start and rank == 0:
            profiling.note(times, "first step")
            run.started = profiling.told(profiling.spans(times))
            note_attempt(job["run"], start, world, device, profiling.spans(times))
        rest = done % steps_per_epoch
        if rest and not agreed & (SAVE | STOP):
            continue

        means = sums.gather(world)
        if agreed & STOP or not all(map(math.isfinite, means.values())) or not is_finite(method.network, world):
            if rank == 0:
                run.stored(strict=True)
                run.close("FAILED")
            return {"diverged_at": done, "last_good": latest_checkpoint(job["run"])[1]}
        if not rest:
            passed_s = time.monotonic() - clock
            speed = {
                "learning_rate": rate,
                "images_per_s": num_steps * options.global_batch_size / passed_s,
                "data_wait_share": feed.waited_s / passed_s,
            }
            if rank == 0:
                run.log({**facts(done), "split": "train", **means, **speed})
            sums = Sums()
        if validates(done):
            run.awaited.add(done)
            validator.start(facts(done), ema)
        found = validated()
        if rank == 0 and not rest:
            run.flush()
        if agreed & SAVE or validates(done) or (keep_every and done % keep_every == 0):
            state = {**method.state_dict(), "sums": sums.state_dict(), "first_loss": signals.first_loss}
            weights = distributed.gathered(ema.state_dict())
            if rank == 0:
                run.save(done, weights, state, strict=not rest)
            if rank == 0 and signals.leaving:  # not a step more than this one may be lost
                run.stored(strict=False)
        promote(found)
        for row in found if not job["aside"] else []:  # a barrier, which the controller lets pass twice a second
            told = {"step": done, "loss": means["loss"], **{f"val_{name}": row[name] for name in row}}
            ray.train.report(told)
            for callback in job["callbacks"]:
                callback.after_report(None, [told], None)
        if not rest:
            clock, num_steps, feed.waited_s = time.monotonic(), 0, 0.0
    if rank == 0:
        promote(validated(wait=True))
        run.stored(strict=True)
        run.close("FINISHED")
    if post:
        post(total_steps, epoch=options.epochs, loss=signals.loss, **run.told())
    return {}


def keep_memory() -> None:
    """Keep freed memory in this process: glibc would give the activations of each step back to the system and fetch
    them again, page by page, in the next one: a seventh of the time of a step on a CPU."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)  # the most it takes


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """What does not fit on a GPU, as an InputError with the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the GPU's memory is too small for a worker's share of a step ({str(error).split('.')[0]}); give "
            "--accumulate 2 or more, --gradient-checkpointing, more workers, or --parallel fsdp"
        ) from None


class Post:
    """What rank 0 tells the driver."""

    def __init__(self, board: Any, *, start: int, total: int) -> None:
        self.send = getattr(board.post, "remote", board.post)
        self.start, self.total = start, total
        self.sent_s = 0.0

    def __call__(self, done: int, **facts: Any) -> bool:
        """Tell that so many steps are done; at most twice a second, and whether now. `facts`: as `Board.post`'s."""
        now = time.monotonic()
        if now - self.sent_s < POST_EVERY_S and done < self.total:
            return False
        self.sent_s = now
        self.send({"step": done, "total": self.total, "start": self.start, **facts})
        return True


class Sums:
    """The losses since the last row of metrics: `of_all`, the workers' means added up, and what this one had since."""

    def __init__(self, of_all: dict[str, float] | None = None, count: int = 0) -> None:
        self.of_all, self.count = of_all or {}, count
        self.mine: dict[str, Tensor] = {}

    def add(self, losses: dict[str, Tensor]) -> None:
        self.mine = {name: loss + self.mine.get(name, 0.0) for name, loss in losses.items()}
        self.count += 1

    def gather(self, world: int) -> dict[str, float]:
        """Means over all steps and workers, which must all come here."""
        totals = (all_sum(torch.stack([*self.mine.values()]).double(), world) / world).tolist()
        means = dict(zip(self.mine, totals, strict=True))
        self.of_all = {name: total + self.of_all.get(name, 0.0) for name, total in means.items()}
        self.mine = {}
        return {name: total / self.count for name, total in self.of_all.items()}

    def state_dict(self) -> dict[str, Any]:
        """Of what was gathered."""
        return {"of_all": self.of_all, "count": self.count}


class WorkerConsensus:
    """What the workers agree on after each step: one small collective on the CPU, so that a GPU is never waited for."""

    def __init__(self, world: int, *, save_every_s: float, comparable: bool, first_loss: float | None = None) -> None:
        """`comparable`: the objective's. `first_loss`: mean over the first steps of the run, if they are past."""
        self.group = torch.distributed.new_group(backend="gloo") if world > 1 else None
        self.save_every_s, self.comparable, self.first_loss = save_every_s, comparable, first_loss
        self.rank = torch.distributed.get_rank() if world > 1 else 0
        self.saved_s = self.asked_s = time.monotonic()
        self.leaving = False
        """Whether a node is about to be taken."""
        self.before: Tensor | None = None
        self.recent: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def agree(self, losses: dict[str, Tensor], *, storing: bool) -> int:
        """SAVE, ASK and STOP as any of the workers wishes; `storing`: the last checkpoint is still on its way."""
        now = time.monotonic()
        wishes = STOP * self._lost(losses)
        if self.rank == 0:
            wishes |= SAVE * (self.leaving or (not storing and now - self.saved_s >= self.save_every_s))
            wishes |= ASK * (now - self.asked_s >= ASK_EVERY_S)
        if self.group is not None:
            flags = torch.tensor(wishes)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.BOR, group=self.group)
            wishes = int(flags)
        if wishes & ASK:  # a barrier of Ray's: only where all of us come to it
            self.leaving = ray.train.get_preemption_info() is not None
            self.asked_s = now
        if wishes & SAVE:
            self.saved_s = now
        return wishes

    @property
    def loss(self) -> float | None:
        """Mean of this worker's last steps."""
        return sum(self.recent) / len(self.recent) if self.recent else None

    def _lost(self, losses: dict[str, Tensor]) -> bool:
        """Whether the losses are no longer finite, or have long been far above where they began. That is known of the
        step before: to look at this one's would stop a GPU's queue."""
        last, self.before = self.before, torch.stack([losses["loss"], *losses.values()])
        if last is None:
            return False
        loss, *every = last.tolist()
        if not all(map(math.isfinite, every)):
            return True
        self.recent.append(loss)
        if len(self.recent) < WINDOW or not self.comparable:
            return False
        mean = sum(self.recent) / WINDOW
        if self.first_loss is None:
            self.first_loss = mean
        return mean > DIVERGED * self.first_loss


def hash_step(seed: int, step: int, rank: int) -> int:
    return seeded("dropout", seed, step, rank).initial_seed()


def is_finite(network: torch.nn.Module, world: int) -> bool:
    """Of all weights, those of the other workers too; all must ask."""
    local = [weights.to_local() if isinstance(weights, DTensor) else weights for weights in network.parameters()]
    bad = torch.stack([(~weights.isfinite()).any() for weights in local]).any()
    return not all_sum(bad.float(), world).item()


def all_sum(value: Tensor, world: int) -> Tensor:
    if world > 1:
        torch.distributed.all_reduce(value)
    return value
