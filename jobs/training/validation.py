"""Validation that does not bounce: the EMA weights on fixed rows with fixed noise and timesteps, and fixed images.

The training workers share the work between two steps.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from ddpm_core import config as configs
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.config import ModelConfig
from ddpm_core.translator import Translator
from jobs.common.intervals import student_half
from jobs.datasets.cache import SplitArrays
from jobs.reports.grids import labelled_grid
from jobs.training.batches import Sampler, Share, both_ways, evenly, stratified_timesteps, training_rows
from jobs.training.methods import Objective
from jobs.training.options import TrainOptions

NUM_BANDS = 4
"""Validation is also reported for each quarter of the chain, the least noisy first."""
NUM_IMAGES = 6
"""Fixed images that are translated at each validation, to be looked at."""
NUM_AGAIN = 2
"""As many of them are translated from other noise, too."""


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """The outcome of one validation."""

    row: dict[str, float]
    """Of metrics.jsonl, with what `behaviour` tells of the fixed images."""
    image: bytes | None
    """PNG of the fixed images: source, translated and, where there is one, the counterpart; None if nothing is
    translated."""


class Validation:
    """Of one worker, who does its `share`; all workers must call it."""

    def __init__(
        self,
        data: SplitArrays,
        config: ModelConfig,
        options: TrainOptions,
        method: Objective,
        device: torch.device,
        share: Share,
        *,
        together: bool = False,
        noise: str = "validation",
    ) -> None:
        """`together`: the network is sharded, so that every worker must take part in every evaluation. `noise`: names
        the draw; another than that of training's own validations tells what is luck in theirs."""
        self.config, self.options, self.method, self.device, self.share = config, options, method, device, share
        rows = training_rows(data, config, dataclasses.replace(options, max_train_images=None))
        self.rows, self.noise = evenly(rows, options.max_val_images), noise
        self.ts = stratified_timesteps(len(self.rows), config.diffusion.num_timesteps)
        self.sampler = Sampler(data, config, options)
        self.batch_size = max(1, options.global_batch_size // share.world)
        self.mine = share if not together else Share(rank=0, world=1)

    @torch.no_grad()
    def __call__(self, tracks: Mapping[float, nn.Module]) -> ValidationResult:
        """The best length of the EMA, its mean loss, the half-width of the 95 % interval (of several images), their
        number and, where there is noise, the mean in each quarter of the chain; the mean loss of every length, and what
        else was measured."""
        by_track = self.measure(tracks)
        means = {sigma_rel: float(found["loss"].mean()) for sigma_rel, found in by_track.items()}
        best = min(means, key=means.__getitem__) if self.method.comparable else next(iter(means))
        values = by_track[best].pop("loss")
        row = {
            "loss": means[best],
            **({"loss_ci": student_half(values)} if len(values) > 1 else {}),
            "num_images": len(values),
            "ema_sigma_rel": best,
            **{f"loss_ema_{sigma_rel:.3f}": mean for sigma_rel, mean in means.items()},
            **{name: float(others.mean()) for name, others in by_track[best].items()},
        }
        if self.config.method == "diffusion" or self.config.encoder.noise_aware:
            bands = self.ts * NUM_BANDS // self.config.diffusion.num_timesteps
            row |= {f"loss_band_{band}": float(values[bands == band].mean()) for band in sorted({*bands.tolist()})}
        image, behaviour = self.fixed_images(tracks[best])
        return ValidationResult(row | behaviour, image)

    def measure(self, tracks: Mapping[float, nn.Module]) -> dict[float, dict[str, np.ndarray]]:
        """For each length of the EMA `loss` of each row, (n,) float64, and what else the objective tells of each; the
        workers share the work."""
        values = torch.zeros(len(tracks), len(self.rows), self.method.num_measured, device=self.device)
        mine = np.arange(self.mine.rank, len(self.rows), self.mine.world)
        for first in range(0, len(mine), self.batch_size):
            index = mine[first : first + self.batch_size]
            draw = self.sampler.validation(self.rows[index], self.ts[index], noise=self.noise)
            batch = draw.to(self.device, shown=self.config.shown)
            for track, network in enumerate(tracks.values()):
                measured = self.method.validation_loss(network, batch).reshape(len(index), -1)
                values[track, torch.as_tensor(index, device=self.device)] = measured
        by_track = [self.method.validated(measured) for measured in self._sum_over_workers(values)]
        of_each = [{name: each.double().cpu().numpy() for name, each in values.items()} for values in by_track]
        return dict(zip(tracks, of_each, strict=True))

    def fixed_images(self, network: nn.Module) -> tuple[bytes | None, dict[str, float]]:
        """Fixed images translated: a PNG with a row of images for each, source first, and how they lie to each other
        (see `behaviour`); None where there is nothing to translate."""
        if self.config.method in configs.ENCODERS:
            return None, {}
        sources, domains, truths = self.to_show()
        if not len(sources):
            return None, {}
        translate = Translator(
            Checkpoint(model=network, config=self.config, path=""),  # type: ignore[arg-type]
            device=str(self.device),
            precision=self.options.precision,
        )
        made = self._translated(translate, sources, domains, seed=0)
        again = made[:0]
        if self.config.method == "diffusion" and self.config.sampling.start == "noise":
            again = self._translated(translate, sources[:NUM_AGAIN], domains[:NUM_AGAIN], seed=1)
        columns = {"source": sources, "translated": made}
        if truths is not None:
            columns["counterpart"] = truths
        png = labelled_grid([*columns], [list(row) for row in zip(*columns.values(), strict=True)])
        return png, behaviour(sources, made, domains, truths, again)

    def _translated(
        self,
        translate: Translator,
        sources: UInt8[np.ndarray, "n s s 3"],
        domains: Int[np.ndarray, " n"],
        *,
        seed: int,
    ) -> UInt8[np.ndarray, "n s s 3"]:
        """By all workers together, each its share. A network that is lost still gives its images, black ones: that the
        run diverged, its losses tell."""
        made = torch.zeros(sources.shape, dtype=torch.uint8, device=self.device)
        for domain in sorted({*domains.tolist()}):
            mine = np.flatnonzero(domains == domain)[self.mine.rank :: self.mine.world]
            if len(mine):
                result = translate.attempt(sources[mine], self.config.domains[domain], seed=seed)
                translated = result.images * result.finite[:, None, None, None]
                made[torch.as_tensor(mine, device=self.device)] = torch.as_tensor(translated, device=self.device)
        return self._sum_over_workers(made).cpu().numpy()

    def to_show(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Different images of a side that is left (n s s 3), the side that each is turned into (n), and where the
        network learns from pairs their counterparts."""
        sampler, data, wanted = self.sampler, self.sampler.data, self.sampler.wanted
        pairs = data.has_targets and both_ways(self.config)
        if pairs and not sampler.mismatched and not sampler.itself:
            rows = evenly(self.rows, NUM_IMAGES)
            draw = sampler.validation(rows, np.zeros(len(rows), np.int64))
            return draw.source.numpy(), draw.domain.numpy(), draw.target.numpy()
        # What the sampler draws as a source may come twice, or be of the very side that is wanted.
        rows = np.arange(len(data)) if pairs or wanted is None else np.flatnonzero(data.domain != wanted)
        rows = evenly(rows, NUM_IMAGES)
        sides = data.domain[rows].astype(np.int64)
        if pairs:  # a pair has an image of either side
            sides = np.arange(len(rows)) % 2 if wanted is None else np.full(len(rows), 1 - wanted)
        sources = sampler.showing(rows, sides) if pairs else data.images(rows)
        to = (sides + 1) % len(self.config.domains) if wanted is None else np.full(len(rows), wanted)
        return sources, to, None

    def _sum_over_workers(self, values: Tensor) -> Tensor:
        if self.mine.world > 1:
            torch.distributed.all_reduce(values)
        return values


# -- what goes wrong ----------------------------------------------------------------------------------------------

CHANGE, TRUE_CHANGE, SPREAD, SOURCE_SPREAD, SEED_SPREAD = (
    "change",
    "counterpart_change",
    "spread",
    "source_spread",
    "seed_spread",
)
"""Columns of metrics.jsonl, see `behaviour`."""


def behaviour(
    sources: UInt8[np.ndarray, "n s s 3"],
    made: UInt8[np.ndarray, "n s s 3"],
    domains: Int[np.ndarray, " n"],
    truths: UInt8[np.ndarray, "n s s 3"] | None,
    again: UInt8[np.ndarray, "m s s 3"],
) -> dict[str, float]:
    """Root mean square distances in levels of 255: of the results `made` from their sources, and of their true
    counterparts from these; between the results of different sources that go to the same side, and between these
    sources; between results and those of other noise, `again`, of the first sources."""
    found = {CHANGE: _apart(made, sources)}
    if truths is not None:
        found[TRUE_CHANGE] = _apart(truths, sources)
    first, second = np.triu_indices(len(sources), 1)
    same = domains[first] == domains[second]
    if same.any():
        found[SPREAD] = _apart(made[first[same]], made[second[same]])
        found[SOURCE_SPREAD] = _apart(sources[first[same]], sources[second[same]])
    if len(again):
        found[SEED_SPREAD] = _apart(again, made[: len(again)])
    return found


def _apart(a: UInt8[np.ndarray, "n s s 3"], b: UInt8[np.ndarray, "n s s 3"]) -> float:
    """The mean over the images."""
    return float(np.sqrt(np.square(a.astype(np.float64) - b).mean((1, 2, 3))).mean())


INVISIBLE = 3.0
"""Nobody sees a change of so many levels."""


def warnings_of(row: Mapping[str, float], config: ModelConfig) -> list[str]:
    """What the results of a validation's row are wrong in, each with its likely cause and what to change."""
    if CHANGE not in row:
        return []
    found = []
    if row[CHANGE] < max(INVISIBLE, 0.1 * row.get(TRUE_CHANGE, 0.0)):
        cause = "more guidance draws the new side more strongly (--sampling.guidance-scale)"
        if row.get(TRUE_CHANGE, np.inf) < INVISIBLE:
            cause = "the data's two sides are the same images: look at them, and prepare them again"
        elif config.sampling.start != "noise":
            cause = "the edit is too weak (--sampling.strength, --sampling.domain-guidance-scale)"
        elif config.unet.source_mask:
            cause = "the mask keeps all of the source so far (--unet.no-source-mask draws everything anew)"
        elif config.data.pairing == "self":
            cause = "a network that learns from an image itself copies it; jobs.recipe translates without pairs"
        found.append(f"the outputs equal their sources so far: {cause}")
    if row.get(SPREAD, np.inf) < 0.1 * row.get(SOURCE_SPREAD, 0.0):
        found.append(
            "all outputs are nearly the same so far: the learning rate (--optim.learning-rate) or the guidance "
            "(--sampling.guidance-scale) is too high, or the sources do not reach the network"
        )
    elif row.get(SEED_SPREAD, 0.0) > 0.9 * row.get(SPREAD, np.inf):
        cause = "--unet.injection takes it to more layers"
        if config.data.pairing in ("unpaired", "none"):
            cause = "without pairs nothing teaches it to; jobs.recipe keeps the source"
        found.append(
            f"outputs of one source differ as much as those of different sources so far: it is ignored; {cause}"
        )
    return found
