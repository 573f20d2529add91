"""What both stages of a sweep have in common: a study, its trials and how long they still take."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from jobs.tuning import search_space as spaces
from jobs.tuning import study
from jobs.tuning.plan import SweepJob
from jobs.tuning.runner import Runner
from jobs.tuning.search_space import Space


class Stage:
    """Trials of one kind, from where they are to their end."""

    def __init__(self, job: SweepJob, memory: study.Memory, runner: Runner, changed: Callable[..., None]) -> None:
        """`changed`: called after every change, with `news` False where an earlier command has told of all there is."""
        self.job, self.args, self.memory, self.runner, self.changed = job, job.args, memory, runner, changed
        self.study: optuna.Study | None = None
        self.space: Space = {}
        self.total, self.num_workers = 0, 1
        self.began: dict[int, float] = {}
        self.again: dict[str, Any] | None = None
        """The winner measured once more, beside the baseline."""

    def open(self, name: str, directions: list[str], space: Space, total: int, own: Mapping[str, Any]) -> optuna.Study:
        """The study, its first trial the baseline, `own` values, where they are in the space."""
        self.space, self.total = space, total
        self.study = self.memory.open(name, directions, study.sampler(self.args.search, self.args.search_seed, total))
        baseline = spaces.parameters(own, space)
        if not study.trials(self.study) and baseline is not None:
            self.study.enqueue_trial(baseline)
        self.changed(news=False)
        return self.study

    def search(
        self,
        config: Callable[[int, dict[str, Any]], dict[str, Any]],
        ending: Callable[[int, Mapping[str, Any] | None, bool], study.Ending],
    ) -> study.Search:
        """What hands the trials out; see `study.Search`."""
        assert self.study is not None

        def begin(number: int, values: dict[str, Any]) -> dict[str, Any]:
            self.began[number] = time.monotonic()
            return config(number, values)

        return study.Search(
            self.study,
            self.space,
            total=self.total,
            config=begin,
            ending=ending,
            room=lambda: self.runner.room(self.num_workers),
            told=self.changed,
        )

    def seconds(self, number: int) -> float | None:
        """Since this command began the trial."""
        return None if number not in self.began else time.monotonic() - self.began[number]

    def rows(self) -> list[dict[str, Any]]:
        """Every trial that has begun, as results.json has it."""
        return [self.row(trial) for trial in study.begun(self.study)]

    def row(self, trial: FrozenTrial) -> dict[str, Any]:
        return {
            "number": trial.number,
            "values": study.values_of(trial, self.space),
            "hand": trial.number == study.baseline(self.study),
        }

    def left_s(self) -> float | None:
        """Seconds that the stage still takes, by what its trials took so far."""
        if self.study is None:
            return None
        found = {trial.number: study.facts(trial) for trial in study.trials(self.study)}
        took = [facts["seconds"] for facts in found.values() if facts.get("seconds")]
        if not took:
            return None
        mean = sum(took) / len(took)
        running = [number for number, facts in found.items() if facts["state"] == "running"]
        spent = sum(min(self.seconds(number) or 0.0, mean) for number in running)
        room = max(self.runner.room(self.num_workers), 1)
        return max(mean * study.num_left(self.study, self.total) - spent, 0.0) / room
