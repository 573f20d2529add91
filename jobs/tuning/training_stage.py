"""Stage 1 of a sweep: trainings, stopped early by ASHA on the validation loss; the best is the sweep's network."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from optuna.trial import FrozenTrial

from ddpm_core import config as configs
from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import intervals
from jobs.reports import report
from jobs.training import run_folder
from jobs.tuning import plan, study, training_trial
from jobs.tuning import search_space as spaces
from jobs.tuning.runner import HOST
from jobs.tuning.stage import Stage
from jobs.tuning.study import Ending


class TrainingStage(Stage):
    """Each trial is a run of `jobs.train` in OUTPUT/trials."""

    best: int | None = None
    """The trial with the lowest validation loss."""
    later: Callable[..., Any]
    """Takes a function and its arguments: reports are not to hold up the trials."""

    def run(self) -> str:
        """The best trial's run."""
        job, args = self.job, self.args
        self.num_workers = max(args.num_workers, 1)
        self.runner.prepare()
        own = spaces.own_values(job.options, job.training)
        found = self.open("training", ["minimize"], job.training, job.num_trials, own)
        search = self.search(self._config, self._ending)
        scheduler = None
        if args.early_stopping == "asha":
            scheduler = study.ASHA(
                epochs=job.epochs,
                grace_epochs=job.grace_epochs,
                reduction_factor=args.reduction_factor,
                is_baseline=search.is_baseline,
            )
            scheduler.remember(found)
        self.runner.run(training_trial.train_trial, search, resources=HOST, scheduler=scheduler)
        best = min(study.complete(found, "no trial came to its end"), key=lambda trial: trial.values[0])
        self.best = best.number
        return job.run_of(best.number)

    def _config(self, number: int, values: dict[str, Any]) -> dict[str, Any]:
        options = spaces.applied(self.job.options, values)
        args = plan.train_args(self.args, self.job.run_of(number), options)
        fields = {
            field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.name != "options"
        }
        return {"args": fields, "options": configs.to_dict(options)}

    def _ending(self, number: int, result: Mapping[str, Any] | None, lost: bool) -> Ending:
        found = self._facts(number)
        outcome = "failed" if lost else (result or {}).get("outcome", "stopped")
        error = "its node was lost again and again" if lost else (result or {}).get("error")
        loss = found["loss"]
        if outcome == "complete" and (loss is None or not math.isfinite(loss)):
            outcome, error = "failed", "no validation loss came of it"
        if outcome == "stopped":
            self.later(write_stopped, self.job.run_of(number), self.job.epochs)
        values = (loss,) if outcome == "complete" else None
        return Ending(outcome, values, {**found, "error": error})  # type: ignore[arg-type]

    def _facts(self, number: int) -> dict[str, Any]:
        """Of a trial's run, as far as it is."""
        curve, num_steps = training_trial.progress(self.job.run_of(number))
        return {**self._curve(number, curve), "steps": num_steps}

    def _curve(self, number: int, curve: list[tuple[int, float]]) -> dict[str, Any]:
        """`curve`: epoch and validation loss."""
        curve = [point for point in curve if math.isfinite(point[1])]
        return {
            "curve": curve,
            "loss": min((loss for _, loss in curve), default=None),
            "epochs": max((epoch for epoch, _ in curve), default=0),
            "seconds": self.seconds(number),
        }

    def row(self, trial: FrozenTrial) -> dict[str, Any]:
        facts = study.facts(trial)
        if facts["state"] == "running":
            facts = {**facts, **self._curve(trial.number, sorted(trial.intermediate_values.items()))}
        run = self.job.run_of(trial.number).removeprefix(f"{self.args.output}/")
        run_there = None if facts["state"] == "failed" else run
        return {**super().row(trial), "run": run_there, "steps": None, "error": None, **facts}

    def measure_again(self) -> None:
        """The winner's loss on fresh noise and held-out images, beside the preset's own."""
        numbers = {"winner": self.best, "hand": study.baseline(self.study)}
        runs = {name: self.job.run_of(number) for name, number in numbers.items() if number is not None}
        runs = {name: run for name, run in runs.items() if run_folder.read_best(run)}
        split = "test" if self.job.card.splits.get("test") else "val"
        found = self.runner.call(training_trial.losses_again, runs, self.args.data, split, self.args.use_gpu)
        seed = self.args.search_seed
        fresh = {name: intervals.bootstrap(values, seed=seed) for name, values in found.items()}
        if "hand" in found:
            fresh["difference"] = intervals.difference(found["winner"], found["hand"], seed=seed)
        self.again = {
            "split": split,
            "num_images": len(found["winner"]),
            "seen": {name: run_folder.read_best(run)["metric"]["loss"] for name, run in runs.items()},
            "fresh": {name: dataclasses.asdict(each) for name, each in fresh.items()},
        }


def write_stopped(run: str, epochs: int) -> None:
    """The report of a trial that ASHA stopped: its own driver went with it."""
    with contextlib.suppress(InputError, OSError):
        last = storage.read_json_lines(storage.join(run, "metrics.jsonl"))[-1]
        status = {
            "state": "stopped",
            "step": last["step"],
            "total": last["step"] * epochs // max(last["epoch"], 1),
            "epoch": last["epoch"],
            "message": "Stopped by ASHA: others were ahead at the same number of epochs.",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        report.write_report(run, run_uri=run, status=status)
