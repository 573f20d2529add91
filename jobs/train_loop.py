"""What every training worker runs. Imported by the driver, pickled by reference, readable top to bottom.

What a step computes is `jobs.objectives`', by method. All that is drawn by chance is a function of the seed, the epoch
and a sample's id (`jobs.samples`), so that a run killed and resumed equals an uninterrupted one, and another number of
workers sees the same global batches.

A step is an optimiser step over all workers; `steps_per_epoch` = rows // global batch, the rows left over differ from
epoch to epoch.
"""

import contextlib
import dataclasses
import io
import json
import math
import tempfile
import time
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import tensorboardX
import torch
import torch.distributed
from torch import Tensor

from ddpm_core import checkpoint, provenance
from ddpm_core import config as configs
from ddpm_core.config import ModelConfig
from ddpm_core.diffusion import seeded
from ddpm_core.ema import EMA
from jobs import arrays, storage
from jobs.arrays import SplitArrays
from jobs.objectives import Objective, objective
from jobs.presets import TrainOptions
from jobs.samples import Feed, Sampler, Share, evenly, stratified_timesteps, training_rows

NUM_BANDS = 4
"""Validation is also reported for each quarter of the chain, the least noisy first."""


class Board:
    """Where rank 0 notes how far it is and the driver looks: an actor."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def post(self, state: dict[str, Any]) -> None:
        self.state = state

    def look(self) -> dict[str, Any]:
        return self.state


def learning_rate(options: TrainOptions, step: int, total_steps: int) -> float:
    """Of the step'th update (the first is step 0)."""
    optim = options.optim
    rate = optim.learning_rate * min(1.0, (step + 1) / max(optim.warmup_steps, 1))
    if optim.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
    return rate


class Run:
    """The folder of a run, as rank 0 writes it: checkpoints, metrics, TensorBoard events."""

    def __init__(self, uri: str, config: ModelConfig, *, comparable: bool) -> None:
        """`comparable`: as the objective's."""
        self.uri, self.config, self.comparable = uri, config, comparable
        self.metrics: list[dict[str, Any]] = []
        self.events = tempfile.mkdtemp(prefix="events") if storage.is_remote(uri) else uri
        self.writer: tensorboardX.SummaryWriter | None = None

    def resume(self, step: int) -> None:
        """Take up the metrics of the steps that are kept; what came after the checkpoint is computed again."""
        with contextlib.suppress(FileNotFoundError):
            lines = storage.read_bytes(storage.join(self.uri, "metrics.jsonl")).decode().splitlines()
            self.metrics = [row for line in lines if (row := json.loads(line))["step"] <= step]

    def log(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        if self.writer is None:
            self.writer = tensorboardX.SummaryWriter(self.events, purge_step=row["step"])
        for name, value in row.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def flush(self) -> None:
        """Put the metrics so far where others see them."""
        data = "".join(json.dumps(row) + "\n" for row in self.metrics).encode()
        storage.write_bytes(storage.join(self.uri, "metrics.jsonl"), data)
        if self.writer is not None:
            self.writer.flush()
            if storage.is_remote(self.uri):
                for name in storage.list_files(self.events):
                    storage.write_bytes(storage.join(self.uri, name), storage.read_bytes(f"{self.events}/{name}"))

    def save(self, step: int, ema: EMA, state: dict[str, Any], val: dict[str, Any]) -> None:
        """Write a checkpoint, point `best.json` at the best one (the last, where losses do not compare), drop those
        that are neither best nor last."""
        name = f"checkpoints/step-{step:08d}"
        folder = storage.join(self.uri, name)
        buffer = io.BytesIO()
        torch.save({**state, "ema": ema.state_dict()}, buffer)
        storage.write_bytes(storage.join(folder, "train_state", "state.pt"), buffer.getvalue())
        others = ema.state_dict()
        weights = others.pop(val["ema_sigma_rel"])
        training = {**self.config.training, "ema_sigma_rel": val["ema_sigma_rel"]}
        config = dataclasses.replace(self.config, training=training)
        for file, data in checkpoint.files(weights, config, others=others).items():  # config.json last: then complete
            storage.write_bytes(storage.join(folder, file), data)
        best = read_best(self.uri)
        if not best or val["loss"] <= best["metric"]["loss"] or not self.comparable:
            sampling = configs.to_dict(self.config.sampling)
            best = {
                "checkpoint": name,
                "metric": {"name": "val/loss", "loss": val["loss"], "step": step},
                "ema_sigma_rel": val["ema_sigma_rel"],
                **sampling,
            }
            storage.write_bytes(storage.join(self.uri, "best.json"), json.dumps(best, indent=2).encode())
        for other in storage.list_folders(storage.join(self.uri, "checkpoints")):
            if f"checkpoints/{other}" not in (name, best["checkpoint"]):
                storage.delete_folder(storage.join(self.uri, "checkpoints", other))


def read_best(uri: str) -> dict[str, Any]:
    """`best.json` of a run, {} where there is none yet."""
    try:
        return json.loads(storage.read_bytes(storage.join(uri, "best.json")))
    except FileNotFoundError:
        return {}


def latest_checkpoint(uri: str) -> tuple[int, str]:
    """(step, folder) of the newest complete checkpoint of a run that training can go on from; (0, "") for none."""
    folder = storage.join(uri, "checkpoints")
    for name in reversed(storage.list_folders(folder)):
        if name.startswith("step-") and storage.exists(storage.join(folder, name, "config.json")):
            return int(name.removeprefix("step-")), storage.join(folder, name)
    return 0, ""


def train_loop(job: dict[str, Any]) -> None:
    """One worker of `jobs.train`; `job` is plain data: data, run, config, options, board."""
    config = configs.from_dict(ModelConfig, job["config"])
    options = configs.from_dict(TrainOptions, job["options"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    train, val = (arrays.load(job["data"], split, content_hash=config.data.content_hash) for split in ("train", "val"))
    rows = training_rows(train, config, options)
    steps_per_epoch = len(rows) // options.global_batch_size
    total_steps = steps_per_epoch * options.epochs

    torch.manual_seed(options.seed)
    method = objective(config, options, device)
    ema = EMA(method.network, sigma_rels=options.optim.ema_sigma_rels)
    start, folder = latest_checkpoint(job["run"])
    if folder:
        state = torch.load(io.BytesIO(storage.read_bytes(f"{folder}/train_state/state.pt")), weights_only=True)
        ema.load_state_dict(state.pop("ema"))
        method.load_state_dict(state)
    run = Run(job["run"], config, comparable=method.comparable)
    if rank == 0:
        run.resume(start)
    method.distribute(ray.train.torch.prepare_model)
    sampler = Sampler(train, config, options)
    validate = Validation(val, config, options, method, device, rank, world)

    share = Share(rank=rank, world=world)
    feed = Feed(sampler, rows, share, start=start, stop=total_steps, pin=device.type == "cuda")

    sums, count, clock = dict[str, Tensor](), 0, time.monotonic()
    for step, draw in enumerate(feed, start=start):
        torch.manual_seed(hash_step(options.seed, step, rank))  # dropout inside the network
        rate = learning_rate(options, step, total_steps)
        losses = method.step(draw.to(device, shown=config.shown), rate, step)
        sums, count = {name: loss + sums.get(name, 0.0) for name, loss in losses.items()}, count + 1
        done = step + 1
        ema.update(method.network, done)
        if rank == 0:
            job["board"].post.remote({"step": done, "total": total_steps, "start": start})
        if done % steps_per_epoch:
            continue

        epoch = done // steps_per_epoch
        means = dict(zip(sums, all_mean(torch.stack([*sums.values()]) / count, world).tolist(), strict=True))
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"the training losses are {means} at step {done}; lower --optim.learning-rate")
        passed_s = time.monotonic() - clock
        row = {
            "step": done,
            "epoch": epoch,
            "images_seen": done * options.global_batch_size,
            "split": "train",
            **means,
            "learning_rate": rate,
            "images_per_s": count * options.global_batch_size / passed_s,
            "data_wait_share": feed.waited_s / passed_s,
        }
        if rank == 0:
            run.log(row)
        validates = epoch % options.validate_every_epochs == 0 or epoch == options.epochs
        if validates:
            val_row = {**{k: row[k] for k in ("step", "epoch", "images_seen")}, "split": "val", **validate(ema)}
            if rank == 0:
                run.log(val_row)
                run.save(done, ema, method.state_dict(), val_row)
        if rank == 0:
            run.flush()
        if validates:  # not more often: the controller takes one report at a time, twice a second
            report = {"step": done, "loss": means["loss"], **{f"val_{name}": val_row[name] for name in val_row}}
            ray.train.report(report)
        sums, count, clock, feed.waited_s = {}, 0, time.monotonic(), 0.0


def hash_step(seed: int, step: int, rank: int) -> int:
    return seeded("dropout", seed, step, rank).initial_seed()


def all_mean(value: Tensor, world: int) -> Tensor:
    if world > 1:
        torch.distributed.all_reduce(value)
    return value / world


class Validation:
    """The loss of the EMA weights on fixed rows with fixed noise and timesteps: a curve that does not bounce."""

    def __init__(
        self,
        data: SplitArrays,
        config: ModelConfig,
        options: TrainOptions,
        method: Objective,
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        self.config, self.method, self.device, self.rank, self.world = config, method, device, rank, world
        rows = training_rows(data, config, dataclasses.replace(options, max_train_images=None))
        self.rows = evenly(rows, options.max_val_images)
        self.ts = stratified_timesteps(len(self.rows), config.diffusion.num_timesteps)
        self.sampler = Sampler(data, config, options)
        self.batch_size = max(1, options.global_batch_size // world)

    def __call__(self, ema: EMA) -> dict[str, float]:
        """The best length of the EMA, its mean loss, the half-width of the 95 % interval and, of a diffusion model,
        the mean in each quarter of the chain; the mean loss of every length."""
        by_track = self.losses(ema)
        means = {sigma_rel: float(values.mean()) for sigma_rel, values in by_track.items()}
        best = min(means, key=means.__getitem__) if self.method.comparable else next(iter(means))
        values = by_track[best]
        found = {
            "loss": means[best],
            "loss_ci": float(1.96 * values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0,
            "ema_sigma_rel": best,
            **{f"loss_ema_{sigma_rel:.3f}": mean for sigma_rel, mean in means.items()},
        }
        if self.config.method == "diffusion":
            bands = self.ts * NUM_BANDS // self.config.diffusion.num_timesteps
            found |= {f"loss_band_{band}": float(values[bands == band].mean()) for band in set(bands.tolist())}
        return found

    @torch.inference_mode()
    def losses(self, ema: EMA) -> dict[float, np.ndarray]:
        """(n,) float64 for each length of the EMA, the loss of each row; the workers share the work."""
        values = torch.zeros(len(ema.tracks), len(self.rows), device=self.device)
        mine = np.arange(self.rank, len(self.rows), self.world)
        for first in range(0, len(mine), self.batch_size):
            index = mine[first : first + self.batch_size]
            draw = self.sampler.validation(self.rows[index], self.ts[index])
            batch = draw.to(self.device, shown=self.config.shown)
            for track, network in enumerate(ema.tracks.values()):
                values[track, torch.as_tensor(index, device=self.device)] = self.method.validation_loss(network, batch)
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return dict(zip(ema.tracks, values.double().cpu().numpy(), strict=True))


def describe(config: ModelConfig, options: TrainOptions) -> dict[str, bytes]:
    """The files that a run starts with."""
    values = {"format": "ddpm-translate", "format_version": configs.FORMAT_VERSION, **configs.to_dict(config)}
    assert values["training"] == configs.to_dict(options)
    return {
        "environment.json": json.dumps(provenance.environment(), indent=2).encode(),
        "config.json": json.dumps(values, indent=2).encode(),
    }
