"""What a training worker goes on from, and what it agrees on with the others after each step."""

import collections
import dataclasses
import math
import time
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor
from torch.distributed.tensor import DTensor

from ddpm_core import config as configs
from ddpm_core.config import ModelConfig
from ddpm_core.ema import EMA
from ddpm_core.errors import InputError
from jobs.datasets import cache
from jobs.datasets.cache import SplitArrays
from jobs.training import distributed, origin
from jobs.training.batches import Share, training_rows
from jobs.training.methods import Objective, objective
from jobs.training.options import Parallel, TrainOptions
from jobs.training.run_folder import latest_checkpoint, read_state

SAVE, ASK, STOP, END = 1, 2, 4, 8
"""Flags that workers raise after a step: take a checkpoint; ask Ray whether a node is about to go; the losses are lost;
the command was told to end."""
ASK_EVERY_S = 3.0
"""How often Ray is asked."""
WINDOW, DIVERGED = 100, 3.0
"""A run has diverged when its mean loss over so many steps is so many times that of its first ones."""


class LossMeans:
    """Mean losses since the last row of metrics: `totals`, over all workers up to the last `gather`, and what this
    worker has added since."""

    def __init__(self, totals: dict[str, float] | None = None, count: int = 0) -> None:
        self.totals, self.count = totals or {}, count
        self.mine: dict[str, Tensor] = {}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "LossMeans":
        """Taken out of what a checkpoint stored; releases before this one called it `sums`, the first stored none."""
        before = state.pop("sums", {})
        return cls(**state.pop("losses", {"totals": before.get("of_all"), "count": before.get("count", 0)}))

    def add(self, losses: dict[str, Tensor]) -> None:
        # in float64, where sums of so few float32 are exact: a checkpoint in between, which gathers, changes no digit
        self.mine = {name: loss.double() + self.mine.get(name, 0.0) for name, loss in losses.items()}
        self.count += 1

    def gather(self, world: int) -> dict[str, float]:
        """Means over all steps and workers; all workers must call it."""
        sums = (all_sum(torch.stack([*self.mine.values()]), world) / world).tolist()
        added = dict(zip(self.mine, sums, strict=True))
        self.totals = {name: total + self.totals.get(name, 0.0) for name, total in added.items()}
        self.mine = {}
        return {name: total / self.count for name, total in self.totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """Of what was gathered."""
        return {"totals": self.totals, "count": self.count}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerState:
    """One worker's share of a run, as the last checkpoint left it."""

    config: ModelConfig
    options: TrainOptions
    share: Share
    parallel: Parallel
    device: torch.device
    train: SplitArrays
    val: SplitArrays
    rows: np.ndarray
    """Indices of the rows trained on."""
    method: Objective
    ema: EMA
    start: int
    """Steps done."""
    losses: LossMeans
    first_loss: float | None
    """Mean over the first steps of the run, if they are past."""
    keep_every_epochs: int

    @property
    def rank(self) -> int:
        return self.share.rank

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.options.global_batch_size

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.options.epochs

    @property
    def keep_every_steps(self) -> int:
        return self.keep_every_epochs * self.steps_per_epoch

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint after `step` stays for good."""
        return bool(self.keep_every_steps) and step % self.keep_every_steps == 0

    def validates(self, step: int) -> bool:
        epoch, rest = divmod(step, self.steps_per_epoch)
        return not rest and (epoch % self.options.validate_every_epochs == 0 or epoch == self.options.epochs)

    def position(self, step: int) -> dict[str, Any]:
        """How a row of metrics says where it belongs."""
        epoch, seen = step // self.steps_per_epoch, step * self.options.global_batch_size
        return {"step": step, "epoch": epoch, "images_seen": seen}


def restore(job: dict[str, Any]) -> WorkerState:
    """The network, optimizer and averages as the run's last checkpoint left them, ready to train; new where there is
    none. All workers must call it.

    Raises:
        InputError: the checkpoint is damaged, or the run is trained for longer than this.
    """
    config = configs.from_dict(ModelConfig, job["config"])
    options = configs.from_dict(TrainOptions, job["options"])
    context = ray.train.get_context()
    share = Share(rank=context.get_world_rank(), world=context.get_world_size())
    device = ray.train.torch.get_device()
    train, val = (cache.load(job["data"], split, content_hash=config.data.content_hash) for split in ("train", "val"))

    torch.manual_seed(options.seed)
    parallel: Parallel = job["parallel"] if share.world > 1 else "ddp"
    method = objective(config, options, device, parallel)
    # Rank 0 says which, or workers that look while an older one is dropped could begin at different steps.
    start, folder = broadcast_from_rank_zero(latest_checkpoint(job["run"]))
    state = read_state(folder) if folder else {}
    if config.origin and not folder:
        origin.begin(method.network, config)
    ema = EMA(method.network, sigma_rels=options.optim.ema_sigma_rels)
    worker = WorkerState(
        config=config,
        options=options,
        share=share,
        parallel=parallel,
        device=device,
        train=train,
        val=val,
        rows=training_rows(train, config, options),
        method=method,
        ema=ema,
        start=start,
        losses=LossMeans.restored(state),
        first_loss=state.pop("first_loss", None),
        keep_every_epochs=job["keep_every_epochs"],
    )
    if start > worker.total_steps:
        raise InputError(
            f"{job['run']} is trained for more than {options.epochs} epochs; give --epochs "
            f"{math.ceil(start / worker.steps_per_epoch)} or more, or another --output"
        )
    if folder:
        ema.load_state_dict(state.pop("ema"))
        method.load_state_dict(state)
    method.distribute()
    if parallel == "fsdp":
        for track in ema.tracks.values():
            distributed.shard(track, device)
    return worker


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

    def agree(self, losses: dict[str, Tensor], *, storing: bool, ending: bool = False) -> int:
        """SAVE, ASK, STOP and END, each if any worker raises it; `storing`: the last checkpoint is still on its way.
        `ending`: the driver says that the run is to end here; a checkpoint is taken then."""
        now = time.monotonic()
        flags = STOP * self._lost(losses)
        if self.rank == 0:
            flags |= SAVE * (self.leaving or (not storing and now - self.saved_s >= self.save_every_s))
            flags |= (SAVE | END) * ending
            flags |= ASK * (now - self.asked_s >= ASK_EVERY_S)
        if self.group is not None:
            combined = torch.tensor(flags)
            torch.distributed.all_reduce(combined, torch.distributed.ReduceOp.BOR, group=self.group)
            flags = int(combined)
        if flags & ASK:  # a barrier of Ray's: only where all of us come to it
            self.leaving = ray.train.get_preemption_info() is not None
            self.asked_s = now
        if flags & SAVE:
            self.saved_s = now
        return flags

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


def is_finite(network: torch.nn.Module, world: int) -> bool:
    """Of all weights, those of the other workers too; all must ask."""
    local = [weights.to_local() if isinstance(weights, DTensor) else weights for weights in network.parameters()]
    bad = torch.stack([(~weights.isfinite()).any() for weights in local]).any()
    return not all_sum(bad.float(), world).item()


def all_sum(value: Tensor, world: int) -> Tensor:
    if world > 1:
        torch.distributed.all_reduce(value)
    return value
