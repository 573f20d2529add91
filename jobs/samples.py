"""Training batches: which rows, shown how, with what noise; every number a function of its sample's id.

order of samples                            a function of (seed, epoch)
noise, t, flip, direction, what is dropped  functions of (seed, epoch, sample id)
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from ddpm_core import config as configs
from ddpm_core import diffusion
from ddpm_core import images as pictures
from ddpm_core.config import ModelConfig
from ddpm_core.diffusion import seeded
from jobs.data import SplitArrays
from jobs.presets import TrainOptions


@dataclasses.dataclass(frozen=True)
class Batch:
    """One worker's share of a step, on the CPU."""

    x_0: Tensor
    condition: Tensor
    domain: Tensor
    t: Tensor
    noise: Tensor
    dropped: Tensor
    """Whether the network is kept from the condition."""
    domain_dropped: Tensor
    """Whether it is kept from the domain."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return Batch(**{f.name: getattr(batch, f.name).to(device, non_blocking=True) for f in dataclasses.fields(batch)})


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
    """Draws batches of (x_0, condition, domain, t, noise) whose every number is a function of its sample's id.

    The condition is the counterpart of x_0 where there are pairs, any picture of the other side where there are none;
    CycleGAN draws it so from either, since to learn without pairs is what it is there for.
    """

    def __init__(self, data: SplitArrays, config: ModelConfig, options: TrainOptions) -> None:
        self.data, self.options, self.diffusion = data, options, config.diffusion
        self.mismatched = config.method == "cyclegan"
        wanted = options.target_domain
        self.wanted = None if wanted is None else configs.domain_index(config, wanted)
        self.others = [np.flatnonzero(data.domain != side) for side in range(len(config.domains))]

    def train(self, rows: np.ndarray, epoch: int) -> Batch:
        return self._batch(rows, [seeded(self.options.seed, epoch, self.data.ids[row]) for row in rows], training=True)

    def validation(self, rows: np.ndarray, ts: np.ndarray) -> Batch:
        """Fixed noise and given timesteps, nothing dropped or flipped: the same numbers at every validation."""
        batch = self._batch(rows, [seeded("validation", self.data.ids[row]) for row in rows], training=False)
        return dataclasses.replace(batch, t=torch.as_tensor(ts, dtype=torch.int64))

    def _batch(self, rows: np.ndarray, generators: list[torch.Generator], *, training: bool) -> Batch:
        # Every sample draws the same numbers in the same order, whether they are used or not.
        draws = torch.stack([torch.rand(6, generator=generator, dtype=torch.float64) for generator in generators])
        to_t, to_drop, to_flip, to_side, to_other, to_drop_domain = draws.unbind(1)
        domain = self.data.domain[rows].astype(np.int64)
        if self.data.has_targets:
            forward = (to_side < 0.5).numpy() if self.wanted is None else domain != self.wanted
            domain = np.where(forward, 1 - domain, domain)
            others = (to_other.numpy() * len(self.data)).astype(np.int64) if self.mismatched else rows
            x_0, condition = self._showing(rows, domain), self._showing(others, 1 - domain)
        else:
            drawn = zip(domain, to_other.tolist(), strict=True)
            others = np.asarray([self.others[side][int(draw * len(self.others[side]))] for side, draw in drawn])
            x_0, condition = self.data.images(rows), self.data.images(others)
        if training and self.options.flip:
            flip = (to_flip < 0.5).numpy()[:, None, None, None]
            x_0 = np.where(flip, x_0[:, :, ::-1], x_0)
            condition = np.where(flip, condition[:, :, ::-1], condition)
        x_0_tensor = pictures.to_tensor(x_0)
        return Batch(
            x_0=x_0_tensor,
            condition=pictures.to_tensor(condition),
            domain=torch.as_tensor(domain),
            t=(to_t * self.diffusion.num_timesteps).long(),
            noise=diffusion.draw_noise(generators, x_0_tensor),
            dropped=(to_drop < self.diffusion.p_uncond) & training,
            domain_dropped=(to_drop_domain < self.diffusion.p_uncond_domain) & training,
        )

    def _showing(self, rows: np.ndarray, sides: np.ndarray) -> np.ndarray:
        """Of each row's pair the picture of this side, uint8 b s s 3."""
        on_side = self.data.domain[rows] == sides
        found = self.data.images(rows)
        found[~on_side] = self.data.targets(rows[~on_side])
        return found


def stratified_timesteps(num_rows: int, num_timesteps: int) -> np.ndarray:
    """One fixed timestep a row, spread evenly over the chain in an order that neighbours do not share."""
    golden = (math.sqrt(5) - 1) / 2
    return (((np.arange(num_rows) + 0.5) * golden % 1.0) * num_timesteps).astype(np.int64)
