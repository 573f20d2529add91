"""A search that Optuna remembers; Ray Tune, or this process, runs its trials (`jobs.tuning.runner`).

The Optuna study is the only memory: what it holds as ended is never run again, what it holds as running was cut short
and is taken up with the same values. Ray's own snapshots are not used: they lag behind a driver that is killed, and
are bound to one version of Ray. ASHA's rungs are filled again from the study's intermediate values.
"""

import contextlib
import dataclasses
import math
import os
import tempfile
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
import ray.tune.schedulers
import ray.tune.search
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.tuning import search_space as spaces
from jobs.tuning.search_space import Space

State = Literal["complete", "stopped", "diverged", "failed", "running"]
"""Of a trial: done; stopped early by ASHA; its losses were lost; it could not be run; on its way."""
FACTS = "facts"
"""User attribute of a trial: what is known of it beside its values."""
LOSS, EPOCH = "val_loss", "val_epoch"
"""What training trials report."""
OBJECTIVE = "objective:"
"""How what sampling trials report begins."""

optuna.logging.set_verbosity(optuna.logging.ERROR)


class SweepError(Exception):
    """Nothing came of any trial, or not of all that were to run."""


class Journal(JournalFileBackend):
    """Optuna's journal on a disk that may be full."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Raises InputError, the journal as it was, where nothing more can be written."""
        file = Path(self._file_path)
        before = file.stat().st_size
        try:
            with storage.user_errors(str(file)):
                super().append_logs(logs)
        except Exception:
            os.truncate(file, before)  # half a line would spoil the next one
            raise


class Memory:
    """Where studies are kept: OUTPUT/study.journal, or a database of the user's.

    The journal of a bucket is a local file whose content is put there whole after every change (`sync`).
    """

    def __init__(self, output: str, url: str | None) -> None:
        """Raises InputError: a URL that is no database, or a journal that cannot be read."""
        self.uri = None if url else storage.join(output, "study.journal")
        self.local = (
            tempfile.TemporaryDirectory(prefix="ddpm-study-") if self.uri and storage.is_remote(output) else None
        )
        self.file = Path(self.local.name) / "study.journal" if self.local else Path(self.uri or "")
        self.storage: BaseStorage
        if url:
            try:
                self.storage = RDBStorage(url)
            except Exception as error:  # whatever SQLAlchemy and its drivers raise
                reason = str(error).splitlines()[0]
                raise InputError(
                    f"--study {url}: no such database ({reason}); write sqlite:///file or a server's URL"
                ) from None
            return
        if self.local:
            with contextlib.suppress(FileNotFoundError):
                self.file.write_bytes(storage.read_bytes(str(self.uri)))
        _drop_broken_end(self.file)
        try:
            self.storage = JournalStorage(Journal(str(self.file)))
        except (ValueError, KeyError) as error:
            raise InputError(f"{self.uri} is damaged ({error}); mend or delete it, or give another --output") from None

    def open(self, name: str, directions: Sequence[str], sampler: Callable[[int], BaseSampler]) -> optuna.Study:
        """The study of that name, made if need be; `sampler`: from the number of its trials."""
        study = optuna.create_study(
            study_name=name, storage=self.storage, directions=[*directions], load_if_exists=True
        )
        study.sampler = sampler(len(study.get_trials(deepcopy=False)))
        return study

    def sync(self) -> None:
        if self.local:
            storage.write_bytes(str(self.uri), self.file.read_bytes())

    def close(self) -> None:
        if self.local:
            self.local.cleanup()


def _drop_broken_end(file: Path) -> None:
    """Of a driver that was killed while it wrote: what comes after the last whole line, and its lock."""
    for left in (f"{file}.lock", f"{file}.lock.lock"):
        with contextlib.suppress(OSError):
            os.unlink(left)
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            storage.write_bytes(str(file), whole)


def sampler(search: str, seed: int, num_trials: int) -> Callable[[int], BaseSampler]:
    """How values are proposed: "random", or "tpe", `SobolThenTPE`. Makes one from the number of trials that are there:
    a random sequence that began anew would propose again what it did before."""

    def make(num_there: int) -> BaseSampler:
        own = seed + 1_000_003 * num_there
        if search == "random":
            return RandomSampler(seed=own)
        return SobolThenTPE(num_first=min(10, max(num_trials // 4, 4)), sobol_seed=seed, tpe_seed=own)

    return make


class SobolThenTPE(BaseSampler):
    """First a scrambled Sobol sequence, which leaves no part of the space out, as a few points at random do; then TPE
    (Bergstra et al. 2011; over several objectives Ozaki et al. 2022)."""

    def __init__(self, *, num_first: int, sobol_seed: int, tpe_seed: int) -> None:
        self.num_first = num_first
        with warnings.catch_warnings():  # both are experimental, Optuna says
            warnings.simplefilter("ignore")
            self.sobol = QMCSampler(scramble=True, seed=sobol_seed, warn_independent_sampling=False)
            self.tpe = TPESampler(
                n_startup_trials=0, constant_liar=True, seed=tpe_seed, constraints_func=_no_translation
            )

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        return self.sobol if trial.number <= self.num_first else self.tpe  # the first is the preset's

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self.tpe.after_trial(study, trial, state, values)


def _no_translation(trial: FrozenTrial) -> tuple[float]:
    """Above 0 where the search is to keep away: what is no better than its source counts behind all that is."""
    return (0.0 if trial.user_attrs.get(FACTS, {}).get("translates", True) else 1.0,)


@dataclasses.dataclass(frozen=True)
class Ending:
    """What became of a trial."""

    state: State
    values: tuple[float, ...] | None
    """Of a trial that is complete: its objectives."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Search(ray.tune.search.Searcher):
    """Ray Tune's side of a study: hands out trials, takes their results."""

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        *,
        total: int,
        config: Callable[[int, dict[str, Any]], dict[str, Any]],
        ending: Callable[[int, Mapping[str, Any] | None, bool], Ending],
        room: Callable[[], int],
        told: Callable[[], None],
    ) -> None:
        """`config`: of a trial by its number and values. `ending`: from its number, what it reported last and whether
        its actor was lost. `room`: how many may run now. `told`: called after every change."""
        super().__init__()
        self.study, self.space, self.total = study, space, total
        self.config, self.ending, self.room, self.told = config, ending, room, told
        self.running: dict[str, optuna.Trial] = {}
        self.cut_short = [trial for trial in trials(study) if trial.state == TrialState.RUNNING]

    def is_baseline(self, trial_id: str) -> bool:
        """Of a trial that runs."""
        return trial_id in self.running and self.running[trial_id].number == baseline(self.study)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if len(self.running) >= self.room():
            return None
        if self.cut_short:
            trial = optuna.Trial(self.study, self.cut_short.pop(0)._trial_id)
        elif sum(trial.state != TrialState.WAITING for trial in trials(self.study)) < self.total:
            trial = self.study.ask()
        else:
            return ray.tune.search.Searcher.FINISHED
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = spaces.suggest(trial, self.space)
        self.running[trial_id] = trial
        self.told()
        return self.config(trial.number, values)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if LOSS in result:
            with warnings.catch_warnings():  # one taken up again tells again what it told before
                warnings.simplefilter("ignore")
                self.running[trial_id].report(result[LOSS], result[EPOCH])
            self.told()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self.running.pop(trial_id)
        ending = self.ending(trial.number, result, error)
        tell(self.study, trial, ending)
        self.told()

    def __reduce__(self) -> Any:
        return ray.tune.search.Searcher, ()  # Ray stores its search, to restore it; the study is what remembers

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None: ...


def tell(study: optuna.Study, trial: optuna.Trial, ending: Ending) -> None:
    """End a trial. One that diverged counts as stopped, so that the sampler keeps away from there."""
    trial.set_user_attr(FACTS, {**ending.facts, "state": ending.state})
    if ending.state == "complete":
        study.tell(trial, list(ending.values or ()))
    elif ending.state in ("stopped", "diverged") and len(study.directions) == 1:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, state=TrialState.FAIL)


def trials(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False)


def facts(trial: FrozenTrial) -> dict[str, Any]:
    """What is known of a trial beside its values; of one on its way, that it is."""
    if not trial.state.is_finished():
        return {"state": "running"}
    return trial.user_attrs.get(FACTS, {"state": "failed"})


def num_left(study: optuna.Study, total: int) -> int:
    """Trials that are still to run, those cut short among them."""
    return max(total - sum(trial.state.is_finished() for trial in trials(study)), 0)


class ASHA(ray.tune.schedulers.ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020) on the validation loss. A trial at its last epoch ends by
    itself, with everything stored; the baseline always goes on to there, or gain over it would say nothing."""

    def __init__(
        self,
        *,
        epochs: int,
        grace_epochs: int,
        reduction_factor: int,
        is_baseline: Callable[[str], bool] = lambda trial_id: False,
    ) -> None:
        """`is_baseline`: of Ray Tune's name of a trial."""
        super().__init__(
            time_attr=EPOCH,
            metric=LOSS,
            mode="min",
            max_t=epochs,
            grace_period=grace_epochs,
            reduction_factor=reduction_factor,
        )
        self.is_baseline = is_baseline

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get(EPOCH, 0) >= self._max_t:
            return ray.tune.schedulers.TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        return ray.tune.schedulers.TrialScheduler.CONTINUE if self.is_baseline(trial.trial_id) else decision

    def remember(self, study: optuna.Study) -> None:
        """What the study's trials have told so far."""
        for trial in trials(study):
            stub = types.SimpleNamespace(trial_id=f"study-{trial.number}")
            self.on_trial_add(None, stub)
            for epoch, loss in sorted(trial.intermediate_values.items()):
                self.on_trial_result(None, stub, {EPOCH: epoch, LOSS: loss})


# -- what a study's trials say ------------------------------------------------------------------------------------


def begun(study: optuna.Study | None) -> list[FrozenTrial]:
    """All but those that wait; of no study none."""
    return [] if study is None else [trial for trial in trials(study) if trial.state != TrialState.WAITING]


def complete(study: optuna.Study, nothing: str) -> list[FrozenTrial]:
    """The trials that came to their end.

    Raises:
        SweepError: `nothing`, and the first error.
    """
    done = [trial for trial in trials(study) if facts(trial)["state"] == "complete"]
    if not done:
        errors = [facts(trial).get("error") for trial in trials(study)]
        raise SweepError(f"{nothing}: {next((error for error in errors if error), 'all were stopped')}")
    return done


def baseline(study: optuna.Study | None) -> int | None:
    """The trial that was given its values: the preset's, or the checkpoint's, own."""
    there = trials(study) if study is not None else []
    return 0 if there and "fixed_params" in there[0].system_attrs else None


def values_of(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    """What a trial's parameters stand for."""
    found = {}
    for name, value in trial.params.items():
        each = space.get(name)
        found[name] = each.values.get(value, value) if isinstance(each, spaces.Choices) else value
    return found


def importance(study: optuna.Study, objective: int | None) -> dict[str, float]:
    """Of each option for what is good (PED-ANOVA, Watanabe et al. 2023); {} where the trials do not tell.

    `objective`: its place among the values of sampling trials; None for trainings, of which those that were stopped
    tell, too.
    """
    sign = -1.0 if objective is not None and study.directions[objective].name == "MAXIMIZE" else 1.0
    target = None if objective is None else lambda trial: sign * trial.values[objective]
    if objective is None:
        losses = {trial.number: facts(trial).get("loss") for trial in trials(study)}
        told = [trial for trial in trials(study) if losses[trial.number] is not None]
        study = optuna.create_study()
        for trial in told:
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial.params, distributions=trial.distributions, value=losses[trial.number]
                )
            )
    with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
        return {name: value for name, value in found.items() if math.isfinite(value)}
    return {}
