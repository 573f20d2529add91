"""What every training worker runs. Imported by the driver, pickled by reference, readable top to bottom.

    order of samples              a function of (seed, epoch)
    noise, t, flip, dropped?      a function of (seed, epoch, sample id)

so that a run killed and resumed equals an uninterrupted one, and another number of workers sees the same global
batches. A step is an optimiser step over all workers; `steps_per_epoch` = rows // global batch, the rows left
over differ from epoch to epoch.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import tensorboardX
import torch
import torch.distributed
from torch import Tensor, nn

from ddpm_core import checkpoint, conditioning, diffusion, losses, precision, provenance, schedule
from ddpm_core import config as configs
from ddpm_core import images as pictures
from ddpm_core.config import ModelConfig
from ddpm_core.diffusion import seeded
from ddpm_core.ema import EMA
from ddpm_core.unet import UNet
from jobs import storage
from jobs.data import SplitArrays, load_split
from jobs.presets import TrainOptions

NUM_BANDS = 4
"""Validation is also reported for each quarter of the chain, the least noisy first."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One worker's share of a step, on the CPU."""

    x_0: Tensor
    condition: Tensor
    domain: Tensor
    t: Tensor
    noise: Tensor
    dropped: Tensor


class Board:
    """Where rank 0 notes how far it is and the driver looks: an actor."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def post(self, state: dict[str, Any]) -> None:
        self.state = state

    def look(self) -> dict[str, Any]:
        return self.state


def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Row indices of one epoch, in order: a function of (seed, epoch) alone."""
    return torch.randperm(num_rows, generator=seeded("order", seed, epoch)).numpy()


def training_rows(data: SplitArrays, config: ModelConfig, options: TrainOptions) -> np.ndarray:
    """Indices of the rows that can serve the wanted direction."""
    rows = np.arange(len(data))
    if not data.has_targets and options.target_domain is not None:
        rows = rows[data.domain == configs.domain_index(config, options.target_domain)]
    return rows if options.max_train_images is None else rows[: options.max_train_images]


class Sampler:
    """Draws batches of (x_0, condition, domain, t, noise) whose every number is a function of its sample's id."""

    def __init__(self, data: SplitArrays, config: ModelConfig, options: TrainOptions) -> None:
        self.data, self.options = data, options
        self.num_timesteps, self.p_uncond = config.diffusion.num_timesteps, config.diffusion.p_uncond
        wanted = options.target_domain
        self.wanted = None if wanted is None else configs.domain_index(config, wanted)
        # unpaired: a condition is any picture of another side
        self.others = [np.flatnonzero(data.domain != side) for side in range(len(config.domains))]

    def train(self, rows: np.ndarray, epoch: int) -> Batch:
        return self._batch(rows, [seeded(self.options.seed, epoch, self.data.ids[row]) for row in rows], training=True)

    def validation(self, rows: np.ndarray, ts: np.ndarray) -> Batch:
        """Fixed noise and given timesteps, nothing dropped or flipped: the same numbers at every validation."""
        batch = self._batch(rows, [seeded("validation", self.data.ids[row]) for row in rows], training=False)
        return dataclasses.replace(batch, t=torch.as_tensor(ts, dtype=torch.int64))

    def _batch(self, rows: np.ndarray, generators: list[torch.Generator], *, training: bool) -> Batch:
        # Every sample draws the same numbers in the same order, whether they are used or not.
        draws = torch.stack([torch.rand(5, generator=generator, dtype=torch.float64) for generator in generators])
        to_t, to_drop, to_flip, to_side, to_other = draws.unbind(1)
        image, domain = self.data.images(rows), self.data.domain[rows].astype(np.int64)
        if self.data.has_targets:
            target, target_domain = self.data.targets(rows), 1 - domain
            forward = (to_side < 0.5).numpy() if self.wanted is None else target_domain == self.wanted
            pick = forward[:, None, None, None]
            x_0, condition = np.where(pick, target, image), np.where(pick, image, target)
            domain = np.where(forward, target_domain, domain)
        else:
            others = [
                self.others[side][int(draw * len(self.others[side]))]
                for side, draw in zip(domain, to_other.tolist(), strict=True)
            ]
            x_0, condition = image, self.data.images(np.asarray(others))
        if training and self.options.flip:
            flip = (to_flip < 0.5).numpy()[:, None, None, None]
            x_0 = np.where(flip, x_0[:, :, ::-1], x_0)
            condition = np.where(flip, condition[:, :, ::-1], condition)
        x_0_tensor = pictures.to_tensor(x_0)
        return Batch(
            x_0=x_0_tensor,
            condition=pictures.to_tensor(condition),
            domain=torch.as_tensor(domain),
            t=(to_t * self.num_timesteps).long(),
            noise=diffusion.draw_noise(generators, x_0_tensor),
            dropped=(to_drop < self.p_uncond) & training,
        )


def stratified_timesteps(num_rows: int, num_timesteps: int) -> np.ndarray:
    """One fixed timestep a row, spread evenly over the chain in an order that neighbours do not share."""
    golden = (math.sqrt(5) - 1) / 2
    return (((np.arange(num_rows) + 0.5) * golden % 1.0) * num_timesteps).astype(np.int64)


def learning_rate(options: TrainOptions, step: int, total_steps: int) -> float:
    """Of the step'th update (the first is step 0)."""
    optim = options.optim
    rate = optim.learning_rate * min(1.0, (step + 1) / max(optim.warmup_steps, 1))
    if optim.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
    return rate


class Run:
    """The folder of a run, as rank 0 writes it: checkpoints, metrics, TensorBoard events."""

    def __init__(self, uri: str, config: ModelConfig) -> None:
        self.uri, self.config = uri, config
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

    def save(self, step: int, ema: dict[str, Tensor], state: dict[str, Any], val: dict[str, Any]) -> None:
        """Write a checkpoint, point `best.json` at the best one, drop those that are neither best nor last."""
        name = f"checkpoints/step-{step:08d}"
        folder = storage.join(self.uri, name)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        storage.write_bytes(storage.join(folder, "train_state", "state.pt"), buffer.getvalue())
        for file, data in checkpoint.files(ema, self.config).items():  # config.json last: then it is complete
            storage.write_bytes(storage.join(folder, file), data)
        best = read_best(self.uri)
        if not best or val["loss"] <= best["metric"]["loss"]:
            sampling = configs.to_dict(self.config.sampling)
            best = {
                "checkpoint": name,
                "metric": {"name": "val/loss", "loss": val["loss"], "step": step},
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
    """One worker of `jobs.train`; `job` is plain data: run, config, options, board."""
    config = configs.from_dict(ModelConfig, job["config"])
    options = configs.from_dict(TrainOptions, job["options"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    train, val = (load_split(ray.train.get_dataset_shard(split)) for split in ("train", "val"))
    rows = training_rows(train, config, options)
    steps_per_epoch = len(rows) // options.global_batch_size
    total_steps = steps_per_epoch * options.epochs
    share = options.global_batch_size // world

    torch.manual_seed(options.seed)
    core = UNet(config).to(device)
    ema = EMA(core, sigma_rel=options.optim.ema_sigma_rel)
    optimizer = torch.optim.AdamW(
        core.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=options.optim.weight_decay, fused=True
    )
    start, folder = latest_checkpoint(job["run"])
    if folder:
        state = torch.load(io.BytesIO(storage.read_bytes(f"{folder}/train_state/state.pt")), weights_only=True)
        core.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
    run = Run(job["run"], config)
    if rank == 0:
        run.resume(start)
    model = ray.train.torch.prepare_model(core)
    sampler = Sampler(train, config, options)
    validate = Validation(val, config, options, device, rank, world)
    abar = schedule.alphas_cumprod(config.diffusion).to(device)
    dtype = precision.resolve(options.precision, device)

    def batches() -> Iterator[Batch]:
        """The batches from `start` on, the next one prepared while this one is used."""

        def prepare(step: int) -> Batch:
            epoch, offset = divmod(step, steps_per_epoch)
            order = rows[epoch_order(options.seed, epoch, len(rows))]
            first = offset * options.global_batch_size + rank * share
            return sampler.train(order[first : first + share], epoch)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(prepare, start)
            for step in range(start, total_steps):
                batch = ahead.result()
                if step + 1 < total_steps:
                    ahead = pool.submit(prepare, step + 1)
                yield batch

    loss_sum, loss_count, clock = torch.zeros((), device=device), 0, time.monotonic()
    for step, batch in enumerate(batches(), start=start):
        torch.manual_seed(hash_step(options.seed, step, rank))  # dropout inside the network
        rate = learning_rate(options, step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        loss = batch_loss(model, to_device(batch, device), config, abar, dtype).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), options.optim.grad_clip)
        optimizer.step()
        done = step + 1
        ema.update(core, done)
        loss_sum, loss_count = loss_sum + loss.detach(), loss_count + 1
        if rank == 0:
            job["board"].post.remote({"step": done, "total": total_steps, "start": start})
        if done % steps_per_epoch:
            continue

        epoch = done // steps_per_epoch
        train_loss = float(all_mean(loss_sum / loss_count, world))
        if not math.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss} at step {done}; lower --optim.learning-rate")
        row = {
            "step": done,
            "epoch": epoch,
            "images_seen": done * options.global_batch_size,
            "split": "train",
            "loss": train_loss,
            "learning_rate": rate,
            "images_per_s": loss_count * options.global_batch_size / (time.monotonic() - clock),
        }
        if rank == 0:
            run.log(row)
        validates = epoch % options.validate_every_epochs == 0 or epoch == options.epochs
        if validates:
            val_row = {
                **{k: row[k] for k in ("step", "epoch", "images_seen")},
                "split": "val",
                **validate(ema.model),
            }
            if rank == 0:
                run.log(val_row)
                state = {
                    "model": core.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                run.save(done, ema.state_dict(), state, val_row)
        if rank == 0:
            run.flush()
        if validates:  # not more often: the controller takes one report at a time, twice a second
            ray.train.report({"step": done, "loss": train_loss, **{f"val_{name}": val_row[name] for name in val_row}})
        loss_sum, loss_count, clock = torch.zeros((), device=device), 0, time.monotonic()


def hash_step(seed: int, step: int, rank: int) -> int:
    return seeded("dropout", seed, step, rank).initial_seed()


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return Batch(**{f.name: getattr(batch, f.name).to(device, non_blocking=True) for f in dataclasses.fields(batch)})


def batch_loss(model: nn.Module, batch: Batch, config: ModelConfig, abar: Tensor, dtype: torch.dtype) -> Tensor:
    """The training objective of each picture of a batch, b."""
    condition, domain = conditioning.drop(batch.condition, batch.domain, batch.dropped, len(config.domains))
    x_t = diffusion.q_sample(batch.x_0, batch.t, batch.noise, abar)
    target = diffusion.training_target(config.diffusion.prediction, batch.x_0, batch.t, batch.noise, abar)
    with precision.autocast(x_t.device, dtype):
        output = model(x_t, batch.t, condition, domain)
    weight = losses.timestep_weight(config.diffusion, batch.t, abar)
    return weight * losses.per_image_loss(config.diffusion, output, target)


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
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        self.config, self.device, self.rank, self.world = config, device, rank, world
        rows = training_rows(data, config, dataclasses.replace(options, max_train_images=None))
        keep = min(options.max_val_images, len(rows))
        self.rows = rows[np.linspace(0, len(rows) - 1, keep).round().astype(int)]
        self.ts = stratified_timesteps(keep, config.diffusion.num_timesteps)
        self.sampler = Sampler(data, config, options)
        self.batch_size = max(1, options.global_batch_size // world)
        self.abar = schedule.alphas_cumprod(config.diffusion).to(device)
        self.dtype = precision.resolve(options.precision, device)

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Mean loss, half-width of its 95 % interval, and the mean in each quarter of the chain."""
        values = torch.zeros(len(self.rows), device=self.device)
        mine = np.arange(self.rank, len(self.rows), self.world)
        for first in range(0, len(mine), self.batch_size):
            index = mine[first : first + self.batch_size]
            batch = to_device(self.sampler.validation(self.rows[index], self.ts[index]), self.device)
            loss = batch_loss(model, batch, self.config, self.abar, self.dtype)
            values[torch.as_tensor(index, device=self.device)] = loss
        if self.world > 1:
            torch.distributed.all_reduce(values)
        losses_ = values.double().cpu().numpy()
        bands = self.ts * NUM_BANDS // self.config.diffusion.num_timesteps
        return {
            "loss": float(losses_.mean()),
            "loss_ci": float(1.96 * losses_.std(ddof=1) / math.sqrt(len(losses_))) if len(losses_) > 1 else 0.0,
            **{f"loss_band_{band}": float(losses_[bands == band].mean()) for band in set(bands.tolist())},
        }


def describe(config: ModelConfig, options: TrainOptions) -> dict[str, bytes]:
    """The files that a run starts with."""
    values = {"format": "ddpm-translate", "format_version": configs.FORMAT_VERSION, **configs.to_dict(config)}
    assert values["training"] == configs.to_dict(options)
    return {
        "environment.json": json.dumps(provenance.environment(), indent=2).encode(),
        "config.json": json.dumps(values, indent=2).encode(),
    }
