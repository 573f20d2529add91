"""Trials of a sweep's sampling options: one frozen checkpoint measured on the same held-out images again and again.

Whoever runs them keeps network, images and judges from trial to trial.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ddpm_core import checkpoint
from ddpm_core import config as configs
from jobs.common.intervals import ENOUGH, Interval
from jobs.datasets.format import read_card
from jobs.evaluation import metrics, worker
from jobs.evaluation.plan import EvaluateArgs, make_plans, spread
from jobs.evaluation.worker import Found, Judges
from jobs.reports.grids import labelled_grid
from jobs.reports.metric_table import lower_is_better
from jobs.translation import listing
from jobs.translation.batch import Batch, dataset_rows
from jobs.tuning import search_space as spaces
from jobs.tuning import study

TOLD_APART = frozenset({"psnr", "flip_rate"})
"""What of each image tells a translation from a copy of its source, beside KID; nearness to the source does not."""
GRID_ROWS = 6
"""Images in the grid over guidance weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What sampling trials are measured on and by; hashable, so that a process sets it up once."""

    checkpoint: str
    data: str
    split: str
    domain: str | None
    num_images: int
    seed: int
    judges: Judges
    batch_size: int
    num_threads: int

    @staticmethod
    def of(values: Mapping[str, Any]) -> "Setting":
        """From plain data."""
        return Setting(**{**values, "judges": Judges(**values["judges"])})


@dataclasses.dataclass(frozen=True)
class Measured:
    """One trial's results."""

    of_each: dict[str, np.ndarray]
    """Of each image: psnr or psnr_to_source, and where there is a net for it flip_rate and identity_cosine."""
    kid: np.ndarray
    """KID of random subsets; () where there are too few images."""
    nfe: float
    """Network evaluations for an image."""

    def improves_on(self, source: "Measured", *, seed: int) -> bool:
        """Whether anything that a copy of the source can lose in, is better than in `source`: of many images clearly,
        of few in the mean; True where nothing of the kind is measured."""
        pairs = {name: (self.of_each[name], source.of_each[name]) for name in TOLD_APART & self.of_each.keys()}
        if len(self.kid):
            pairs["kid"] = (self.kid, source.kid)
        for name, (ours, theirs) in pairs.items():
            gap = metrics.difference(name, ours, theirs, seed=seed)
            ahead = (-gap.high, -gap.mean) if lower_is_better(name) else (gap.low, gap.mean)
            if ahead[len(ours) < ENOUGH] > 0:
                return True
        return not pairs

    @property
    def objectives(self) -> dict[str, float]:
        found = {"kid": float(self.kid.mean())} if len(self.kid) else {}
        found |= {name: float(values.mean()) for name, values in self.of_each.items()}
        return {**found, "nfe": self.nfe}


class Evaluator:
    """A frozen checkpoint, held-out images and judges, ready for trial after trial."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.card = setting, read_card(setting.data)
        config = checkpoint.read_config(setting.checkpoint)
        self.own_ema = config.training.get("ema_sigma_rel")
        self.measure = worker.Measure(
            checkpoint_uri=setting.checkpoint,
            sampling=configs.to_dict(config.sampling),
            judges=configs.to_dict(setting.judges),
            domains=self.card.domains,
            pairing=self.card.pairing,
            num_threads=setting.num_threads,
            baselines=False,
        )
        rows = self._rows(config)
        real = rows["output"] == worker.REAL
        self.rows = {name: column[~real] for name, column in rows.items()}
        self.rows["output"][:] = worker.MEASURE
        self.to = self.rows["to"].astype(str)
        self.sides = [*dict.fromkeys(self.to.tolist())]
        self.paired = self.card.pairing == "paired"
        reals, real_to = (self.rows["truth"], self.to) if self.paired else (rows["image"][real], rows["to"][real])
        self.real = {
            side: torch.from_numpy(self.measure.judge("features", reals[real_to == side])) for side in self.sides
        }
        self.faces = self.measure.judge("identity", self.rows["image"]) if setting.judges.identity else None
        self.source = self._source()

    def _rows(self, config: configs.ModelConfig) -> Batch:
        """The rows to translate, and the real images of unpaired data."""
        setting, card = self.setting, self.card
        domains = (setting.domain,) if setting.domain else config.target_domains or config.domains
        args = EvaluateArgs(
            checkpoint="",
            data=setting.data,
            output="",
            num_images=setting.num_images,
            num_train=0,
            split=setting.split,
            seed=setting.seed,
        )
        there = listing.split_rows(setting.data, card, setting.split)
        plan = make_plans(args, card, domains, there, 1)[setting.split]
        rows = dataset_rows(setting.data, card, {setting.split: plan}, batch_size=256, keep_truth=card.has_targets)
        batches = list(rows.batches())
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def _options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        sampling, ema = spaces.sampling_options(values)
        return {"sampling": sampling, "ema": None if ema == self.own_ema else ema}  # None stands for it: one copy

    def _batches(self) -> Iterator[np.ndarray]:
        for side in self.sides:
            mine, size = np.flatnonzero(self.to == side), self.setting.batch_size
            yield from (mine[first : first + size] for first in range(0, len(mine), size))

    def __call__(self, values: Mapping[str, Any]) -> Measured:
        """`values`: every sampling option, as `search_space.sampling_values` has them."""
        options = self._options(values)
        found: list[Found] = [{} for _ in self.to]
        for rows in self._batches():
            batch = self.measure({name: column[rows] for name, column in self.rows.items()}, **options)
            for row, (_, each) in zip(rows, worker.opened(batch), strict=True):
                found[row] = each

        def column(name: str) -> np.ndarray:
            return np.stack([each[name] for each in found])

        psnr = "psnr" if self.paired else "psnr_to_source"
        of_each = {psnr: column(f"model/{psnr}")}
        if self.setting.judges.classifier:
            of_each["flip_rate"] = self._flips(column("model/chances"))
        if self.faces is not None:
            of_each["identity_cosine"] = metrics.cosine(column("model/embedding"), self.faces)
        return Measured(of_each, self._kid(column("model/features")), float(column("nfe").mean()))

    def _source(self) -> Measured:
        """The sources themselves, as if they were results."""
        sources = self.rows["image"]
        of_each = {"psnr": metrics.psnr(sources, self.rows["truth"])} if self.paired else {}
        if self.setting.judges.classifier:
            of_each["flip_rate"] = self._flips(self.measure.judge("classifier", sources))
        return Measured(of_each, self._kid(self.measure.judge("features", sources)), 0.0)

    def _flips(self, chances: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
        wanted = [self.card.domains.index(side) for side in self.to]
        return np.concatenate([metrics.flipped(row[None], to) for row, to in zip(chances, wanted, strict=True)])

    def _kid(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " k"]:
        """Of random subsets, the mean of both sides; () where there are too few images."""
        pairs = [(self.real[side], torch.from_numpy(features[self.to == side])) for side in self.sides]
        if any(min(len(real), len(made)) < metrics.MIN_KID_IMAGES for real, made in pairs):
            return np.zeros(0)
        return np.mean([metrics.kid(real, made, seed=self.setting.seed) for real, made in pairs], axis=0)

    def grid(self, columns: Mapping[str, Mapping[str, Any]]) -> bytes:
        """The same few images by the values of each column: a PNG."""
        rows = np.array(spread(len(self.to), GRID_ROWS))
        few = {name: column[rows] for name, column in self.rows.items()}
        shown = {"source": few["image"]}
        shown |= {name: self.measure.results(few, **self._options(values)) for name, values in columns.items()}
        if self.paired:
            shown["truth"] = few["truth"]
        return labelled_grid([*shown], [list(row) for row in zip(*shown.values(), strict=True)])


evaluator = functools.lru_cache(maxsize=1)(Evaluator)
"""One a process: a GPU holds no two."""


def sampling_trial(trial: Mapping[str, Any], report: Callable[[dict[str, Any]], Any]) -> None:
    """One trial; `trial`: setting (fields of Setting) and values."""
    try:
        here = evaluator(Setting.of(trial["setting"]))
        measured = here(trial["values"])
        report(
            {
                **{f"{study.OBJECTIVE}{name}": value for name, value in measured.objectives.items()},
                "source": here.source.objectives,
                "translates": measured.improves_on(here.source, seed=here.setting.seed),
            }
        )
    except Exception as error:  # options that do not go together, or too little memory: a result, too
        report({"error": (str(error).strip().splitlines() or [type(error).__name__])[-1]})


def measure_again(
    setting: Mapping[str, Any],
    values: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Measured], bytes]:
    """Each of these options on another setting, and the grid of these columns."""
    here = Evaluator(Setting.of(setting))
    return {name: here(each) for name, each in values.items()}, here.grid(columns)


def compared(ours: Measured, theirs: Measured, *, seed: int) -> dict[str, dict[str, Interval]]:
    """Chosen and baseline, and their difference on the same images: each objective with its intervals."""
    pairs = {name: (ours.of_each[name], theirs.of_each[name]) for name in ours.of_each}
    if len(ours.kid) and len(theirs.kid):
        pairs["kid"] = (ours.kid, theirs.kid)
    found = {
        name: {
            "chosen": metrics.estimate(name, a, seed=seed),
            "hand": metrics.estimate(name, b, seed=seed),
            "difference": metrics.difference(name, a, b, seed=seed),
        }
        for name, (a, b) in pairs.items()
    }
    exact = {"chosen": ours.nfe, "hand": theirs.nfe, "difference": ours.nfe - theirs.nfe}
    found["nfe"] = {name: Interval(value, value, value) for name, value in exact.items()}
    return found
