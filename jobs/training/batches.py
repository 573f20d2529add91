"""Training batches: which rows, shown how, with what noise; every number a function of its sample's id.

order of samples                                   a function of (seed, epoch)
noise, t, flip, shift, direction, what is dropped  functions of (seed, epoch, sample id)
"""

import collections
import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ddpm_core import conditioning, diffusion
from ddpm_core import config as configs
from ddpm_core.config import ModelConfig, domain_attributes
from ddpm_core.diffusion import seeded
from ddpm_core.images import to_float
from jobs.datasets.cache import NOBODY, Labels, SplitArrays
from jobs.training.options import TrainOptions

AHEAD = 2
"""Batches drawn before they are asked for."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One worker's share of a step, as the network takes it."""

    x_0: Tensor
    condition: Tensor
    domain: Tensor
    t: Tensor
    noise: Tensor
    dropped: Tensor
    """Whether the network is kept from the condition."""
    domain_dropped: Tensor
    """Whether it is kept from the domain."""
    labels: Tensor
    """b k int64, for an encoder: whom x_0 shows, or which attributes are there; else b 0."""

    def parts(self, number: int) -> "list[Batch]":
        """So many parts of it, as equal as can be, in order."""
        chunks = [getattr(self, field.name).tensor_split(number) for field in dataclasses.fields(self)]
        return [Batch(*tensors) for tensors in zip(*chunks, strict=True)]


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """One worker's share of a step as it is drawn on the CPU: the images as they are stored, and what to do to them.

    Small to move (uint8), and flips, shifts and conversion are left to the device.
    """

    ids: list[str]
    target: Tensor
    """b s s 3 uint8, the image that x_0 is made of."""
    source: Tensor
    """Likewise for the condition."""
    flip: Tensor
    """(b, 2) bool: of the target and of the source."""
    shift: Tensor
    """(b, 2, 2) int64: of the target and of the source, down and right, in pixels."""
    domain: Tensor
    t: Tensor
    noise: Tensor
    dropped: Tensor
    domain_dropped: Tensor
    labels: Tensor
    brightness: Tensor
    """(b, 2) of an encoder's: what the light of the target and of the source is multiplied by."""

    def pinned(self) -> "HostBatch":
        """In memory that a GPU copies from by itself."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "ids"}
        return HostBatch(ids=self.ids, **{name: tensor.pin_memory() for name, tensor in tensors.items()})

    def to(self, device: torch.device, *, shown: str = "source") -> Batch:
        """On the device; `shown` as ModelConfig's."""
        shifts = bool(self.shift.any())  # asked here: on the device the answer would be waited for

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        flip, shift, brightness = there(self.flip), there(self.shift) if shifts else None, there(self.brightness)

        def seen(image: int, pictures: Tensor) -> Tensor:
            found = moved(there(pictures), flip[:, image], None if shift is None else shift[:, image])
            return lit(found, brightness[:, image]) if self.labels.shape[1] else found

        x_0 = seen(0, self.target)
        condition = conditioning.shown(shown, seen(1, self.source) if shown == "source" else x_0)
        rest = (self.domain, self.t, self.noise, self.dropped, self.domain_dropped, self.labels)
        return Batch(x_0, condition, *map(there, rest))


def moved(pictures: Tensor, flip: Tensor, shift: Tensor | None) -> Tensor:
    """b s s 3 uint8 as b 3 s s in [-1, 1], flipped left to right where `flip`, then shifted with mirrored edges."""
    pictures = torch.where(flip[:, None, None, None], pictures.flip(2), pictures)
    if shift is not None:
        places = torch.arange(pictures.shape[1], device=pictures.device)
        rows, columns = (mirrored(places - shift[:, axis, None], len(places)) for axis in (0, 1))
        batch = torch.arange(len(pictures), device=pictures.device)[:, None, None]
        pictures = pictures[batch, rows[:, :, None], columns[:, None, :]]
    return to_float(pictures)


def lit(pictures: Tensor, brightness: Tensor) -> Tensor:
    """b 3 s s in [-1, 1] with the light multiplied by `brightness`, b."""
    return ((pictures + 1) * brightness[:, None, None, None] - 1).clamp(-1, 1)


def mirrored(places: Tensor, side: int) -> Tensor:
    """Places beyond 0 ... side - 1 brought back as in a mirror that repeats no edge."""
    return side - 1 - (places.abs() - (side - 1)).abs()


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Row indices of one epoch, in order: a function of (seed, epoch) alone."""
    return torch.randperm(num_rows, generator=seeded("order", seed, epoch)).numpy()


def training_rows(data: Labels, config: ModelConfig, options: TrainOptions) -> np.ndarray:
    """Indices of the rows that can serve the wanted direction, or show people of whom there is another image."""
    rows = np.arange(len(data))
    if config.method == "identity":
        people, index, counts = np.unique(data.identity, return_inverse=True, return_counts=True)
        serving = (people != NOBODY) & ((counts > 1) | has_counterparts(data, config))
        rows = rows[serving[index]]
    elif options.target_domain is not None and not (data.has_targets and both_ways(config)):
        rows = rows[data.domain == configs.domain_index(config, options.target_domain)]
    return rows if options.max_train_images is None else evenly(rows, options.max_train_images)


def has_counterparts(data: Labels, config: ModelConfig) -> bool:
    """Whether rows have true ones, which show the same person or place; those of matched sets show somebody else."""
    return data.has_targets and config.data.pairing == "paired"


def both_ways(config: ModelConfig) -> bool:
    """Whether either image of a pair may be what the network makes; those that a model made are shown only."""
    return config.data.pairing != "synthetic"


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, spread evenly over them."""
    keep = min(most, len(rows))
    return rows[np.linspace(0, len(rows) - 1, keep).round().astype(int)]


class Sampler:
    """Draws batches of (x_0, condition, domain, t, noise) whose every number is a function of its sample's id.

    x_0 is either side of a pair, but never one that a model made. The condition is its counterpart where there are
    pairs, any image of the other side where there are none or `pairing` is unpaired, and x_0 itself where it is self or
    none. CycleGAN draws it from the other side of whatever there is, since to learn without pairs is what it is for.

    An encoder looks at x_0: either side of a true pair, else the row's own image. Its condition is another image of
    the same person, moved and lit otherwise: an identity encoder's training compares them.
    """

    def __init__(self, data: SplitArrays, config: ModelConfig, options: TrainOptions) -> None:
        self.data, self.config, self.options, self.diffusion = data, config, options, config.diffusion
        self.itself = config.shown != "source"
        self.mismatched = config.method == "cyclegan" or options.pairing == "unpaired"
        wanted = options.target_domain
        self.wanted = None if wanted is None else configs.domain_index(config, wanted)
        self.others = [np.flatnonzero(data.domain != side) for side in range(len(config.domains))]
        self.truth = EncoderTargets(data, config, options) if config.method in configs.ENCODERS else None
        self.brightness = config.encoder.brightness if self.truth else 0.0

    def train(self, rows: np.ndarray, epoch: int) -> HostBatch:
        return self._draw(rows, [seeded(self.options.seed, epoch, self.data.ids[row]) for row in rows], training=True)

    def validation(self, rows: np.ndarray, ts: np.ndarray, *, noise: str = "validation") -> HostBatch:
        """Fixed noise, named `noise`, and given timesteps, nothing dropped or moved: the same numbers at every
        validation."""
        draw = self._draw(rows, [seeded(noise, self.data.ids[row]) for row in rows], training=False)
        return dataclasses.replace(draw, t=torch.as_tensor(ts, dtype=torch.int64))

    def _draw(self, rows: np.ndarray, generators: list[torch.Generator], *, training: bool) -> HostBatch:
        # Every sample draws the same numbers in the same order, whether they are used or not.
        draws = torch.stack([torch.rand(8, generator=generator, dtype=torch.float64) for generator in generators])
        to_t, to_drop, _, to_side, to_other, to_drop_domain, _, _ = draws.unbind(1)
        domain, target, source = self._pictures(rows, to_side.numpy(), to_other.numpy())
        noise = diffusion.draw_noise(generators, torch.empty(len(rows), 3, *target.shape[1:3]))
        again = draws
        if self.config.method == "identity":  # or where things are would tell partners
            again = torch.stack([torch.rand(8, generator=generator, dtype=torch.float64) for generator in generators])
        # encoders drop nothing: that number is free
        _, to_light, to_flip, _, _, _, to_down, to_right = torch.stack([draws, again], dim=2).unbind(1)
        reach = self.options.max_shift * training
        shift = (torch.stack([to_down, to_right], dim=2) * (2 * reach + 1)).long() - reach
        return HostBatch(
            ids=[self.data.ids[row] for row in rows],
            target=torch.from_numpy(target),
            source=torch.from_numpy(source),
            flip=(to_flip < 0.5) & (training and self.options.flip),
            shift=shift,
            domain=torch.as_tensor(domain),
            t=(to_t * self.diffusion.num_timesteps).long(),
            noise=noise,
            dropped=(to_drop < self.diffusion.p_uncond) & training,
            domain_dropped=(to_drop_domain < self.diffusion.p_uncond_domain) & training,
            labels=torch.from_numpy(self.truth(rows, domain) if self.truth else np.zeros((len(rows), 0), np.int64)),
            brightness=(1 + training * self.brightness * (2 * to_light - 1)).float(),
        )

    def _pictures(
        self, rows: np.ndarray, to_side: np.ndarray, to_other: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Domain, image to make and image to show of each sample."""
        domain = self.data.domain[rows].astype(np.int64)
        if self.truth and not self.truth.has_counterparts:
            return domain, self.data.images(rows), self.data.images(self.truth.partners(rows, to_other))
        if self.data.has_targets:
            forward = to_side < 0.5 if self.wanted is None else domain != self.wanted
            domain = np.where(forward & both_ways(self.config), 1 - domain, domain)
            target = self.showing(rows, domain)
            if self.itself:
                return domain, target, target
            others = (to_other * len(self.data)).astype(np.int64) if self.mismatched else rows
            return domain, target, self.showing(others, 1 - domain)
        target = self.data.images(rows)
        if self.itself:
            return domain, target, target
        drawn = zip(domain, to_other.tolist(), strict=True)
        others = np.asarray([self.others[side][int(draw * len(self.others[side]))] for side, draw in drawn])
        return domain, target, self.data.images(others)

    def showing(self, rows: np.ndarray, sides: np.ndarray) -> np.ndarray:
        """Of each row's pair the image of this side, uint8 b s s 3."""
        on_side = self.data.domain[rows] == sides
        found = self.data.images(rows)
        found[~on_side] = self.data.targets(rows[~on_side])
        return found


class EncoderTargets:
    """What an encoder should say of images, from what the data set says of its rows."""

    def __init__(self, data: Labels, config: ModelConfig, options: TrainOptions) -> None:
        self.data, self.config = data, config
        self.has_counterparts = has_counterparts(data, config)
        rows = training_rows(data, config, dataclasses.replace(options, max_train_images=None))
        self.people = np.unique(data.identity[rows])
        """Those of whom there are several images, in order: an index into them is a person's label."""
        self.by_person = np.argsort(data.identity, kind="stable")
        self.sorted = data.identity[self.by_person]

    def __call__(self, rows: np.ndarray, domain: np.ndarray) -> np.ndarray:
        """b k int64: the person's index, or of each attribute 1 or 0; `domain` is that of the image looked at."""
        if self.config.method == "identity":
            return np.searchsorted(self.people, self.data.identity[rows])[:, None]
        sides = [domain == side for side in domain_attributes(self.config.domains).values()]
        names = self.config.encoder.attributes[len(sides) :]
        values = self.data.attributes
        others = [] if values is None else [values[rows, self.data.attribute_names.index(name)] > 0 for name in names]
        return np.stack(sides + others, axis=1).astype(np.int64)

    def partners(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """For each row another one with the same person, if there is one; `draws` in [0, 1) choose."""
        first, end = (np.searchsorted(self.sorted, self.data.identity[rows], side) for side in ("left", "right"))
        place = np.empty(len(self.by_person), np.int64)
        place[self.by_person] = np.arange(len(place))
        found = first + (draws * np.maximum(end - first - 1, 1)).astype(np.int64)
        found = np.minimum(found + (found >= place[rows]), end - 1)
        return self.by_person[found]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every global batch is this worker's; parts differ by one at most."""

    rank: int
    world: int

    def of(self, global_batch: np.ndarray) -> np.ndarray:
        first, end = (rank * len(global_batch) // self.world for rank in (self.rank, self.rank + 1))
        return global_batch[first:end]


class Prefetcher:
    """This worker's draws from step `start` on, made ahead by a thread; `waited_s` is how long they kept us waiting.

    `rows`: those to train on, as `training_rows`. Iterated once.
    """

    def __init__(self, sampler: Sampler, rows: np.ndarray, share: Share, *, start: int, stop: int, pin: bool) -> None:
        self.sampler, self.rows, self.share, self.start, self.stop, self.pin = sampler, rows, share, start, stop, pin
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[HostBatch]:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ahead = collections.deque(pool.submit(self._make, step) for step in self._steps(self.start, AHEAD))
            for step in range(self.start, self.stop):
                before = time.monotonic()
                draw = ahead.popleft().result()
                self.waited_s += time.monotonic() - before
                ahead += [pool.submit(self._make, later) for later in self._steps(step + AHEAD, 1)]
                yield draw

    def _steps(self, first: int, count: int) -> range:
        return range(first, min(first + count, self.stop))

    def _make(self, step: int) -> HostBatch:
        options = self.sampler.options
        epoch, offset = divmod(step, len(self.rows) // options.global_batch_size)
        first = offset * options.global_batch_size
        order = epoch_order(options.seed, epoch, len(self.rows))[first : first + options.global_batch_size]
        draw = self.sampler.train(self.share.of(self.rows[order]), epoch)
        return draw.pinned() if self.pin else draw


def stratified_timesteps(num_rows: int, num_timesteps: int) -> np.ndarray:
    """One fixed timestep a row, spread evenly over the chain in an order that neighbours do not share."""
    golden = (math.sqrt(5) - 1) / 2
    return (((np.arange(num_rows) + 0.5) * golden % 1.0) * num_timesteps).astype(np.int64)
