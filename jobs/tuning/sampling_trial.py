"""Points of a sweep's sampling options: a frozen checkpoint, held-out images and judges, looked at again and again.

The actor that Ray Tune starts keeps all three from point to point.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray.tune
import torch

from ddpm_core import checkpoint, nets
from ddpm_core.translator import Translator
from jobs.common import intervals
from jobs.datasets.format import read_card
from jobs.evaluation import worker
from jobs.evaluation.metrics import MIN_KID_IMAGES, cosine, flipped, kid, psnr
from jobs.evaluation.plan import EvaluateArgs, make_plans, spread
from jobs.evaluation.worker import Judges
from jobs.translation import listing
from jobs.translation.batch import dataset_rows
from jobs.tuning import search_space as spaces
from jobs.tuning import study

GRID_ROWS = 6
"""Images in the grid over guidance weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What points of the sampling space are looked at with; hashable, so that a process sets it up once."""

    checkpoint: str
    data: str
    split: str
    domain: str | None
    num_images: int
    seed: int
    judges: Judges
    batch_size: int
    num_threads: int


@dataclasses.dataclass(frozen=True)
class Seen:
    """What came of one point."""

    of_each: dict[str, np.ndarray]
    """Of each image: psnr or psnr_to_source, and where there is a net for it flip_rate and identity_cosine."""
    kid: np.ndarray
    """KID of random subsets; () where there are too few images."""
    nfe: float
    """Network evaluations for an image."""

    @property
    def objectives(self) -> dict[str, float]:
        found = {"kid": float(self.kid.mean())} if len(self.kid) else {}
        found |= {name: float(values.mean()) for name, values in self.of_each.items()}
        return {**found, "nfe": self.nfe}


class Bench:
    """A frozen checkpoint, held-out images and judges, ready for point after point."""

    def __init__(self, look: Look) -> None:
        torch.set_num_threads(look.num_threads)
        self.look, self.passes = look, 0
        self.card = read_card(look.data)
        self.translators: dict[float | None, Translator] = {}
        config = checkpoint.read_config(look.checkpoint)
        self.own = config.training.get("ema_sigma_rel")
        domains = (look.domain,) if look.domain else config.target_domains or config.domains
        args = EvaluateArgs(
            checkpoint="", data=look.data, output="", num_images=look.num_images, num_train=0, split=look.split
        )
        rows = listing.split_rows(look.data, self.card, look.split)
        plan = make_plans(args, self.card, domains, rows, 1)[look.split]
        self.judges = {
            name: worker.load_judge(name, uri, self.card.domains)
            for name, uri in vars(look.judges).items()
            if uri is not None
        }
        source = dataset_rows(
            look.data, self.card, {look.split: plan}, batch_size=256, keep_truth=self.card.has_targets
        )
        batches = list(source.batches())
        columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        real = columns["output"].astype(str) == worker.REAL
        paired = self.card.pairing == "paired"
        self.sides = [*dict.fromkeys(columns["to"][~real].astype(str))]
        self.made = {name: column[~real] for name, column in columns.items()}
        reals = self.made["truth"] if paired else columns["image"][real]
        real_to = (self.made["to"] if paired else columns["to"][real]).astype(str)
        self.real = {side: self._judge("features", reals[real_to == side]) for side in self.sides}
        self.faces = self._judge("identity", self.made["image"]) if "identity" in self.judges else None

    def translator(self, ema: float | None) -> Translator:
        """With the weights averaged over that length."""
        if ema == self.own:  # None stands for it: one copy
            ema = None
        if ema not in self.translators:
            loaded = checkpoint.load(self.look.checkpoint, ema=ema)
            found = Translator(loaded)
            found.model.register_forward_hook(self._count)
            self.translators[ema] = found
        return self.translators[ema]

    def _count(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.passes += len(output)

    def _judge(self, name: str, pictures: np.ndarray) -> np.ndarray:
        device = str(self.translator(None).device)
        return nets.features(self.judges[name].module, pictures, device=device).numpy()

    def results(self, point: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
        """These rows' images translated."""
        options, ema = spaces.sampling_options(point)
        translate = self.translator(ema)
        results = np.zeros_like(self.made["image"][rows])
        for side in self.sides:
            mine = np.flatnonzero(self.made["to"][rows].astype(str) == side)
            for first in range(0, len(mine), self.look.batch_size):
                part = mine[first : first + self.look.batch_size]
                results[part] = translate(self.made["image"][rows[part]], side, seed=self.look.seed, **options)
        return results

    def __call__(self, point: Mapping[str, Any]) -> Seen:
        """`point`: every sampling option, as `space.sampling_values` has them."""
        self.passes = 0
        made = self.results(point, np.arange(len(self.made["id"])))
        nfe = self.passes / len(made)
        paired = self.card.pairing == "paired"
        reference = self.made["truth"] if paired else self.made["image"]
        of_each = {"psnr" if paired else "psnr_to_source": psnr(made, reference)}
        features = self._judge("features", made)
        to = self.made["to"].astype(str)
        if "classifier" in self.judges:
            chances, of_each["flip_rate"] = self._judge("classifier", made), np.zeros(len(made))
            for side in self.sides:
                mine = to == side
                of_each["flip_rate"][mine] = flipped(chances[mine], self.card.domains.index(side))
        if self.faces is not None:
            of_each["identity_cosine"] = cosine(self._judge("identity", made), self.faces)
        kids = []
        for side in self.sides:
            there, here = torch.from_numpy(self.real[side]), torch.from_numpy(features[to == side])
            if min(len(there), len(here)) >= MIN_KID_IMAGES:
                kids.append(kid(there, here, seed=self.look.seed))
        return Seen(of_each, np.mean(kids, axis=0) if len(kids) == len(self.sides) else np.zeros(0), nfe)

    def grid(self, points: Mapping[str, Mapping[str, Any]]) -> bytes:
        """The same few images at each of these points: a PNG."""
        from jobs.reports.grids import labelled_grid

        rows = np.array(spread(len(self.made["id"]), GRID_ROWS))
        columns = {"source": self.made["image"][rows]}
        columns |= {name: self.results(point, rows) for name, point in points.items()}
        if self.card.pairing == "paired":
            columns["truth"] = self.made["truth"][rows]
        return labelled_grid([*columns], [list(row) for row in zip(*columns.values(), strict=True)])


bench = functools.lru_cache(maxsize=1)(Bench)
"""One a process: a GPU holds no two."""


def look_trial(trial: dict[str, Any]) -> None:
    """Ray Tune's trainable: one point of the sampling space; `trial`: look (fields of Look) and point."""
    try:
        seen = bench(opened(trial["look"]))(trial["point"])
        ray.tune.report({f"{study.OBJECTIVE}{name}": value for name, value in seen.objectives.items()})
    except Exception as error:  # options that do not go together, or too little memory: a result, too
        ray.tune.report({"error": (str(error).strip().splitlines() or [type(error).__name__])[-1]})


def opened(look: Mapping[str, Any]) -> Look:
    """From plain data."""
    return Look(**{**look, "judges": Judges(**look["judges"])})


def look_again(
    look: Mapping[str, Any], points: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Seen], bytes]:
    """Each of the points by a fresh look, and the grid of these columns: a Ray task."""
    here = Bench(opened(look))
    return {name: here(point) for name, point in points.items()}, here.grid(columns)


def compared(ours: Seen, theirs: Seen, *, seed: int) -> dict[str, dict[str, intervals.Interval]]:
    """Both, and ours minus theirs on the same images: each objective with its intervals."""
    found: dict[str, dict[str, intervals.Interval]] = {}
    for name in ours.of_each:
        a, b = ours.of_each[name], theirs.of_each[name]
        found[name] = {
            "chosen": intervals.bootstrap(a, seed=seed),
            "hand": intervals.bootstrap(b, seed=seed),
            "difference": intervals.difference(a, b, seed=seed),
        }
    if len(ours.kid) and len(theirs.kid):
        pairs = {"chosen": ours.kid, "hand": theirs.kid, "difference": ours.kid - theirs.kid}
        found["kid"] = {name: intervals.subsets_interval(values) for name, values in pairs.items()}
    exact = {"chosen": ours.nfe, "hand": theirs.nfe, "difference": ours.nfe - theirs.nfe}
    found["nfe"] = {name: intervals.Interval(value, value, value) for name, value in exact.items()}
    return found
