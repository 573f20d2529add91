"""Stage 2 of a sweep: sampling options on the frozen checkpoint, by several objectives at once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from ddpm_core import config as configs
from ddpm_core import storage
from ddpm_core.checkpoint import Checkpoint
from jobs.evaluation.metrics import MIN_KID_IMAGES
from jobs.reports.metric_table import lower_is_better
from jobs.tuning import plan, sampling_trial, study
from jobs.tuning import search_space as spaces
from jobs.tuning.choice import nearest_to_ideal, pareto_front
from jobs.tuning.stage import Stage
from jobs.tuning.study import Ending

NONE_TRANSLATES = (
    "no point is better than the source itself in KID, PSNR to the truth or flips, so the choice says little: train "
    "longer, widen --space, or let a net judge the side (--classifier)"
)


class SamplingStage(Stage):
    """Each trial translates and measures the same held-out images."""

    chosen: int | None = None
    front: tuple[int, ...] = ()
    """Trials that no other beats in all objectives together, of those that are better than the source itself in
    something; where none is, of all."""
    warning: str = ""
    """What the user must know of the choice."""
    values: Mapping[str, Any] = {}
    """Every sampling option as it was chosen."""
    images: tuple[tuple[str, bytes], ...] = ()
    """(caption, PNG) for the report."""

    def run(self, loaded: Checkpoint, name: str) -> None:
        """`name`: of the study."""
        own = self._own(loaded)
        directions = ["minimize" if lower_is_better(name) else "maximize" for name in self.objectives()]
        space = plan.sampling_space(loaded.config, self.job.given_sampling)
        found = self.open(name, directions, space, self.job.num_points, own)
        setting = self._setting(loaded, "val", self.args.num_images, self.args.search_seed)
        search = self.search(
            lambda number, values: {"setting": setting, "values": {**own, **values}},
            self._ending,
        )
        self.runner.run(sampling_trial.sampling_trial, search, resources=self.job.worker, scheduler=None)
        there = study.complete(found, "no sampling trial came to its end")
        translating = [trial for trial in there if study.facts(trial).get("translates", True)]
        if not translating:
            self.warning, translating = NONE_TRANSLATES, there
        measured = [dict(zip(self.objectives(), trial.values, strict=True)) for trial in translating]
        on_front = pareto_front(measured)
        self.front = tuple(translating[i].number for i in on_front)
        chosen = translating[on_front[nearest_to_ideal([measured[i] for i in on_front], self.job.prefer)]]
        self.chosen, self.values = chosen.number, {**own, **study.values_of(chosen, space)}

    def _own(self, loaded: Checkpoint) -> dict[str, Any]:
        """The checkpoint's own sampling options."""
        return spaces.sampling_values(loaded.config.sampling, loaded.ema or loaded.config.training.get("ema_sigma_rel"))

    def objectives(self) -> list[str]:
        """By name, in the order of the study's values."""
        counts = [self.args.num_images, self.job.card.splits.get("val", 0)]
        if self.job.card.pairing != "paired":
            counts += self.job.card.domain_counts.get("val", {}).values()
        return plan.objectives(self.args, self.job.card, kid=min(counts) >= MIN_KID_IMAGES)

    def _setting(self, loaded: Checkpoint, split: str, num_images: int, seed: int) -> dict[str, Any]:
        setting = sampling_trial.Setting(
            checkpoint=loaded.path,
            data=self.args.data,
            split=split,
            domain=self.args.domain,
            num_images=num_images,
            seed=seed,
            judges=plan.judges_of(self.args),
            batch_size=self.args.batch_size,
            num_threads=self.args.cpus_per_worker,
        )
        return configs.to_dict(setting)

    def _ending(self, number: int, result: Mapping[str, Any] | None, lost: bool) -> Ending:
        result, names = result or {}, self.objectives()
        told = {name: result[key] for name in names if (key := f"{study.OBJECTIVE}{name}") in result}
        values = tuple(told.get(name, math.nan) for name in names)
        found = {"objectives": told or None, "error": result.get("error"), "seconds": self.seconds(number)}
        found |= {name: result[name] for name in ("translates", "source") if name in result}
        if lost or not all(map(math.isfinite, values)):
            error = found["error"] or ("its node was lost again and again" if lost else "not finite")
            return Ending("failed", None, {**found, "objectives": None, "error": error})
        return Ending("complete", values, found)

    def row(self, trial: FrozenTrial) -> dict[str, Any]:
        return {
            **super().row(trial),
            "front": trial.number in self.front,
            "chosen": trial.number == self.chosen,
            "objectives": None,
            "seconds": None,
            "error": None,
            **study.facts(trial),
        }

    def measure_again(self, loaded: Checkpoint) -> None:
        """The chosen options on fresh noise and other images, beside the checkpoint's own; and a grid of images."""
        assert self.study is not None
        split = "test" if self.job.card.splits.get("test") else "val"
        setting = self._setting(loaded, split, 4 * self.args.num_images, self.args.search_seed + 1)
        own, chosen = self._own(loaded), dict(self.values)
        weights = sorted({*plan.WEIGHTS, round(chosen["guidance_scale"], 2)})
        columns = {f"weight {weight:g}": {**chosen, "guidance_scale": weight} for weight in weights}
        both = {"chosen": chosen, "hand": own}
        measured, grid = self.runner.call(sampling_trial.measure_again, setting, both, columns)
        others = {name: value for name, value in chosen.items() if own.get(name) != value and name != "guidance_scale"}
        beside = ", ".join(f"{name} {f'{v:.3g}' if isinstance(v, float) else v}" for name, v in others.items())
        caption = "The same held-out images, noise and options at several guidance weights."
        self.images = ((f"{caption} Beside it: {beside}." if beside else caption, grid),)
        storage.write_bytes(storage.join(self.args.output, "weights.png"), grid)
        numbers = {"chosen": self.chosen, "hand": study.baseline(self.study)}
        trials = study.trials(self.study)
        seen = {
            who: study.facts(trials[number]).get("objectives") or {}
            for who, number in numbers.items()
            if number is not None
        }
        compared = sampling_trial.compared(measured["chosen"], measured["hand"], seed=self.args.search_seed)
        self.again = {
            "split": split,
            "num_images": len(next(iter(measured["chosen"].of_each.values()))),
            "values": both,
            "objectives": {
                name: {
                    **{key: dataclasses.asdict(interval) for key, interval in each.items()},
                    "seen": {who: objectives.get(name) for who, objectives in seen.items()},
                }
                for name, each in compared.items()
            },
        }
