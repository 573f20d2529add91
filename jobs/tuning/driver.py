"""The sweep as its driver sees it: both stages over Ray Tune, the choice, the second look, and what the user sees."""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
import ray

from ddpm_core import checkpoint, storage
from ddpm_core import config as configs
from ddpm_core.errors import InputError
from jobs.common import intervals
from jobs.datasets import cache
from jobs.evaluation.metrics import MIN_KID_IMAGES
from jobs.reports import report, sweep
from jobs.reports.metric_table import lower_is_better
from jobs.training import driver, run_folder
from jobs.tuning import plan, sampling_trial, study, training_trial
from jobs.tuning import search_space as spaces
from jobs.tuning.choice import nearest_to_ideal
from jobs.tuning.search_space import Space
from jobs.tuning.study import Ending, SweepError
from jobs.tuning.terminal import Table

REPORT_EVERY_S, PATIENCE = 15.0, 20
"""Least time between two reports, also in times of what the last one took."""
ROOM_EVERY_S = 2.0
"""How often the cluster is asked how large it is."""


def num_slots(nodes: Sequence[Mapping[str, Any]], worker: Mapping[str, float]) -> int:
    """How many workers fit on the nodes that are alive, whole on one node each."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(min(int(there.get(name, 0) // each) for name, each in worker.items()) for there in alive)


def arithmetic(nodes: Sequence[Mapping[str, Any]], worker: Mapping[str, float], num_workers: int) -> str:
    """How many trials there is room for, in words."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    there = ", ".join(f"{sum(node.get(name, 0) for node in alive):g} {name}s" for name in worker)
    each = " and ".join(f"{value:g} {name}{'' if value == 1 else 's'}" for name, value in worker.items())
    slots = num_slots(nodes, worker)
    count = f"{len(alive)} node{'' if len(alive) == 1 else 's'}"
    return (
        f"{there} on {count}: room for {slots} worker{'' if slots == 1 else 's'} of {each}; "
        f"a trial takes {num_workers}, so {slots // num_workers} at a time"
    )


class Sweep:
    """One sweep from where it is to its end; needs Ray."""

    def __init__(self, job: plan.SweepJob, told: dict[str, Any]) -> None:
        self.job, self.told = job, told
        self.output = job.args.output
        self.memory = study.Memory(self.output, job.args.study)
        self.began: dict[str, dict[int, float]] = {}
        self.again: dict[str, Any] = {}
        self.images: list[tuple[str, bytes]] = []
        self.best_trial: int | None = None
        self.chosen: int | None = None
        self.front: list[int] = []
        self.training: optuna.Study | None = None
        self.points: optuna.Study | None = None
        self.sampling: Space = {}
        self.state = "training"
        self.table = Table()
        self.room_s, self.room = -math.inf, 1
        self.page_s, self.page_cost_s = -math.inf, 0.0
        self.page: concurrent.futures.Future[None] | None = None
        self.pages = concurrent.futures.ThreadPoolExecutor(1)

    def run(self) -> None:
        """Raises SweepError where nothing came of any trial."""
        try:
            self._run()
            self._end("finished", "")
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            with contextlib.suppress(Exception):
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self._end("interrupted" if interrupted else "failed", "" if interrupted else lines[-1])
            raise
        finally:
            self.table.close()
            self.pages.shutdown()
            self.memory.close()

    def _run(self) -> None:
        if self.job.num_trials:
            checkpoint_uri, run = self._train()
        else:
            checkpoint_uri, run = str(self.job.args.checkpoint), None
        loaded = checkpoint.load(checkpoint_uri) if self.job.num_points else None
        point: dict[str, Any] = {}
        if loaded is not None:
            self.state = "sampling"
            point = self._look(loaded)
        self.state = "checking"
        self.told_again()
        if run is not None:
            self.again["training"] = self._train_again(run)
        if loaded is not None:
            self.again["sampling"] = self._look_again(loaded, point)
        self._promote(checkpoint_uri, point, complete=True)

    # -- stage 1 --------------------------------------------------------------------------------------------------

    def _train(self) -> tuple[str, str]:
        """The best trial's checkpoint and run."""
        job, args = self.job, self.job.args
        driver.check_cluster(plan.train_args(args, self.output, job.options))
        slots = num_slots(ray.nodes(), job.worker)
        if slots < args.num_workers:
            raise InputError(
                f"--num-workers {args.num_workers}: {arithmetic(ray.nodes(), job.worker, args.num_workers)}; "
                "give fewer workers, or fewer --cpus-per-worker"
            )
        fewer = f", no more than --max-concurrent {args.max_concurrent}" if args.max_concurrent else ""
        print(f"sweep: {arithmetic(ray.nodes(), job.worker, args.num_workers)}{fewer}", flush=True)
        cache.spread(args.data, ("train", "val"), resource="GPU" if args.use_gpu else "CPU")
        self.training = self.memory.open(
            "training", ["minimize"], study.sampler(args.search, args.search_seed, job.num_trials)
        )
        hand = spaces.parameters(spaces.hand(job.options, job.training), job.training)
        if not study.trials(self.training) and hand is not None:
            self.training.enqueue_trial(hand)
        scheduler = None
        if args.early_stopping == "asha":
            scheduler = study.ASHA(
                epochs=job.epochs, grace_epochs=job.grace_epochs, reduction_factor=args.reduction_factor
            )
            scheduler.remember(self.training)
        search = study.Search(
            self.training,
            job.training,
            total=job.num_trials,
            config=self._training_config,
            ending=self._training_ending,
            room=lambda: self._room(args.num_workers),
            told=self.told_again,
        )
        self.told_again(news=False)
        study.run(
            training_trial.train_trial,
            search,
            notes=storage.join(self.output, ".ray"),
            resources=study.HOST,
            scheduler=scheduler,
            max_failures=args.max_failures,
        )
        best = min(_complete(self.training, "no trial came to its end"), key=lambda trial: trial.values[0])
        self.best_trial = best.number
        run = job.run_of(best.number)
        self._promote(run, {}, complete=False)
        return run, run

    def _training_config(self, number: int, values: dict[str, Any]) -> dict[str, Any]:
        self.began.setdefault("training", {})[number] = time.monotonic()
        options = spaces.applied(self.job.options, values)
        args = plan.train_args(self.job.args, self.job.run_of(number), options)
        fields = {
            field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.name != "options"
        }
        return {"args": fields, "options": configs.to_dict(options)}

    def _training_ending(self, number: int, result: Mapping[str, Any] | None, lost: bool) -> Ending:
        run = self.job.run_of(number)
        found = self._training_facts(number)
        outcome = "failed" if lost else (result or {}).get("outcome", "stopped")
        error = "its node was lost again and again" if lost else (result or {}).get("error")
        loss = found["loss"]
        if outcome == "complete" and (loss is None or not math.isfinite(loss)):
            outcome, error = "failed", "no validation loss came of it"
        if outcome == "stopped":
            self.pages.submit(_stopped_page, run, self.job.epochs)
        values = (loss,) if outcome == "complete" else None
        return Ending(outcome, values, {**found, "error": error})  # type: ignore[arg-type]

    def _training_facts(self, number: int) -> dict[str, Any]:
        """Of a trial's run, as far as it is."""
        curve, num_steps = training_trial.progress(self.job.run_of(number))
        curve = [point for point in curve if math.isfinite(point[1])]
        began = self.began.get("training", {}).get(number)
        return {
            "curve": curve,
            "loss": min((loss for _, loss in curve), default=None),
            "epochs": max((epoch for epoch, _ in curve), default=0),
            "steps": num_steps,
            "seconds": None if began is None else time.monotonic() - began,
        }

    def _train_again(self, run: str) -> dict[str, Any] | None:
        """The winner's loss on fresh noise and held-out images, beside the preset's own."""
        assert self.training is not None
        runs_there = {"winner": run}
        if (hand := _hand(self.training)) is not None:
            runs_there["hand"] = self.job.run_of(hand)
        split = "test" if self.job.card.splits.get("test") else "val"
        gpu = {"num_gpus": 1} if self.job.args.use_gpu else {}
        runs_there = {name: each for name, each in runs_there.items() if run_folder.read_best(each)}
        task = ray.remote(num_cpus=1, **gpu)(training_trial.losses_again)
        found = ray.get(task.remote(runs_there, self.job.args.data, split, self.job.args.use_gpu))
        seed = self.job.args.search_seed
        fresh = {name: intervals.bootstrap(values, seed=seed) for name, values in found.items()}
        if "hand" in found:
            fresh["difference"] = intervals.difference(found["winner"], found["hand"], seed=seed)
        seen = {name: run_folder.read_best(each)["metric"]["loss"] for name, each in runs_there.items()}
        return {
            "split": split,
            "num_images": len(found["winner"]),
            "seen": seen,
            "fresh": {name: dataclasses.asdict(each) for name, each in fresh.items()},
        }

    # -- stage 2 --------------------------------------------------------------------------------------------------

    def _look(self, loaded: checkpoint.Checkpoint) -> dict[str, Any]:
        """The chosen point of the sampling options, whole."""
        job, args = self.job, self.job.args
        self.sampling = space = plan.sampling_space(loaded.config, job.given_sampling)
        base = self._base(loaded)
        objectives = self._objectives()
        directions = ["minimize" if lower_is_better(name) else "maximize" for name in objectives]
        name = "sampling" if self.best_trial is None else f"sampling-{self.best_trial}"
        self.points = self.memory.open(name, directions, study.sampler(args.search, args.search_seed, job.num_points))
        hand = spaces.parameters(base, space)
        if not study.trials(self.points) and hand is not None:
            self.points.enqueue_trial(hand)
        look = self._look_at(loaded, "val", args.num_images, args.search_seed)
        slots = num_slots(ray.nodes(), job.worker)
        if not slots:
            raise InputError(f"{arithmetic(ray.nodes(), job.worker, 1)}; give fewer --cpus-per-worker")
        search = study.Search(
            self.points,
            space,
            total=job.num_points,
            config=lambda number, values: self._point_config(number, {**base, **values}, look),
            ending=lambda number, result, lost: self._point_ending(number, result, lost, objectives),
            room=lambda: self._room(1),
            told=self.told_again,
        )
        self.told_again(news=False)
        study.run(
            sampling_trial.look_trial,
            search,
            notes=storage.join(self.output, ".ray"),
            resources=job.worker,
            reuse_actors=True,
            max_failures=args.max_failures,
        )
        self._choose(objectives)
        trial = next(each for each in study.trials(self.points) if each.number == self.chosen)
        point = {**base, **_values(trial, space)}
        self._promote(loaded.path, point, complete=False)
        return point

    def _base(self, loaded: checkpoint.Checkpoint) -> dict[str, Any]:
        """The checkpoint's own sampling options."""
        return spaces.sampling_values(loaded.config.sampling, loaded.ema or loaded.config.training.get("ema_sigma_rel"))

    def _objectives(self) -> list[str]:
        """By name, in the order of the study's values."""
        return plan.objectives(self.job.args, self.job.card, kid=self._has_kid())

    def _has_kid(self) -> bool:
        counts = [self.job.args.num_images, self.job.card.splits.get("val", 0)]
        if self.job.card.pairing != "paired":
            counts += self.job.card.domain_counts.get("val", {}).values()
        return min(counts) >= MIN_KID_IMAGES

    def _look_at(self, loaded: checkpoint.Checkpoint, split: str, num_images: int, seed: int) -> dict[str, Any]:
        args = self.job.args
        look = sampling_trial.Look(
            checkpoint=loaded.path,
            data=args.data,
            split=split,
            domain=args.domain,
            num_images=num_images,
            seed=seed,
            judges=plan.judges_of(args),
            batch_size=args.batch_size,
            num_threads=args.cpus_per_worker,
        )
        return configs.to_dict(look)

    def _point_config(self, number: int, point: dict[str, Any], look: dict[str, Any]) -> dict[str, Any]:
        self.began.setdefault("sampling", {})[number] = time.monotonic()
        return {"look": look, "point": point}

    def _point_ending(self, number: int, result: Mapping[str, Any] | None, lost: bool, objectives: list[str]) -> Ending:
        result = result or {}
        told = {name: result[key] for name in objectives if (key := f"{study.OBJECTIVE}{name}") in result}
        found: dict[str, Any] = {"objectives": told or None, "error": result.get("error")}
        found["seconds"] = time.monotonic() - self.began["sampling"][number]
        values = [(found["objectives"] or {}).get(name) for name in objectives]
        if lost or any(value is None or not math.isfinite(value) for value in values):
            error = found["error"] or ("its node was lost again and again" if lost else "not finite")
            return Ending("failed", None, {**found, "objectives": None, "error": error})
        return Ending("complete", tuple(values), found)  # type: ignore[arg-type]

    def _choose(self, objectives: list[str]) -> None:
        assert self.points is not None
        _complete(self.points, "no point could be looked at")
        front = self.points.best_trials
        self.front = sorted(trial.number for trial in front)
        values = [dict(zip(objectives, trial.values, strict=True)) for trial in front]
        self.chosen = front[nearest_to_ideal(values, self.job.prefer)].number

    def _look_again(self, loaded: checkpoint.Checkpoint, point: dict[str, Any]) -> dict[str, Any]:
        """The chosen point on fresh noise and other images, beside the checkpoint's own; and a grid of images."""
        args = self.job.args
        split = "test" if self.job.card.splits.get("test") else "val"
        look = self._look_at(loaded, split, 4 * args.num_images, args.search_seed + 1)
        task = ray.remote(num_cpus=args.cpus_per_worker, **({"num_gpus": 1} if args.use_gpu else {}))
        base = self._base(loaded)
        weights = sorted({*plan.WEIGHTS, round(point["guidance_scale"], 2)})
        columns = {f"weight {weight:g}": {**point, "guidance_scale": weight} for weight in weights}
        seen, grid = ray.get(task(sampling_trial.look_again).remote(look, {"chosen": point, "hand": base}, columns))
        others = {name: value for name, value in point.items() if base.get(name) != value and name != "guidance_scale"}
        also = (
            f" Beside it: {', '.join(f'{name} {_short(value)}' for name, value in others.items())}." if others else ""
        )
        self.images = [(f"The same held-out images, noise and options at several guidance weights.{also}", grid)]
        storage.write_bytes(storage.join(self.output, "weights.png"), self.images[0][1])
        compared = sampling_trial.compared(seen["chosen"], seen["hand"], seed=args.search_seed)
        assert self.points is not None
        numbers = {"chosen": self.chosen, "hand": _hand(self.points)}
        was = {
            who: study.facts(study.trials(self.points)[number]) for who, number in numbers.items() if number is not None
        }
        objectives = {}
        for name, each in compared.items():
            told: dict[str, Any] = {key: dataclasses.asdict(interval) for key, interval in each.items()}
            told["seen"] = {who: (facts.get("objectives") or {}).get(name) for who, facts in was.items()}
            objectives[name] = told
        return {
            "split": split,
            "num_images": len(next(iter(seen["chosen"].of_each.values()))),
            "values": {"chosen": point, "hand": base},
            "objectives": objectives,
        }

    # -- what is promoted -----------------------------------------------------------------------------------------

    def _promote(self, checkpoint_uri: str, point: Mapping[str, Any], *, complete: bool) -> None:
        """Point best.json at the best so far; `point`: how it is sampled, {} as it says itself."""
        folder, best = checkpoint.resolve(checkpoint_uri)
        if self.best_trial is not None:
            best = run_folder.read_best(self.job.run_of(self.best_trial))
        told: dict[str, Any] = {"checkpoint": folder.removeprefix(f"{self.output}/"), "metric": best.get("metric")}
        if point:
            fields, ema = spaces.sampling_options(point)
            told |= {"ema_sigma_rel": ema, **fields}
        else:
            told |= {name: value for name, value in best.items() if name not in ("checkpoint", "metric", "epochs")}
        done = {"num_trials": self.job.num_trials, "num_points": self.job.num_points} if complete else {}
        told["sweep"] = {"trial": self.best_trial, "point": self.chosen, **done}
        storage.write_bytes(storage.join(self.output, "best.json"), json.dumps(told, indent=2).encode())
        self.memory.sync()

    # -- what the user sees ---------------------------------------------------------------------------------------

    def _room(self, num_workers: int) -> int:
        """Trials that may run now; the cluster may grow and lose nodes."""
        now = time.monotonic()
        if now - self.room_s >= ROOM_EVERY_S:
            self.room_s = now
            fits = num_slots(ray.nodes(), self.job.worker) // num_workers
            self.room = max(min(fits, self.job.args.max_concurrent or fits), 1)
        return self.room

    def told_again(self, *, news: bool = True) -> None:
        """Something has changed: the table now, what is stored when it is time."""
        self.memory.sync()
        now = time.monotonic()
        self.table.show(self.results(), news=news)
        due = now - self.page_s >= max(REPORT_EVERY_S, PATIENCE * self.page_cost_s)
        if due and (self.page is None or self.page.done()):
            self.page_s = now
            self.page = self.pages.submit(self._write)

    def _write(self) -> None:
        """results.json and report.html."""
        began = time.thread_time()
        with contextlib.suppress(InputError):  # the store; what the sweep itself writes there says so
            self._write_now("")
        self.page_cost_s = time.thread_time() - began

    def _write_now(self, message: str) -> None:
        found = {**self.results(importance=True), "message": message}
        text = json.dumps(found, indent=1, allow_nan=False)
        storage.write_bytes(storage.join(self.output, "results.json"), text.encode())
        sweep.write(self.output, self.told, found, self.images)

    def _end(self, state: str, message: str) -> None:
        """The last page, in order behind those under way."""
        self.state = state
        self.memory.sync()
        self.pages.submit(self._write_now, message).result()
        self.table.show(self.results())

    def results(self, *, importance: bool = False) -> dict[str, Any]:
        """The content of results.json."""
        training, points = self.training, self.points
        found: dict[str, Any] = {
            "state": self.state,
            "message": "",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "left_s": self._left_s(),
            "trials": [] if training is None else [self._trial(each) for each in _begun(training)],
            "best_trial": self.best_trial,
            "points": [] if points is None else [self._point(each) for each in _begun(points)],
            "again": self.again,
        }
        if importance:
            by_stage = {"training": training and _importance(training, None)}
            if points is not None:
                by_stage["sampling"] = {
                    name: each for i, name in enumerate(self._objectives()) if (each := _importance(points, i))
                }
            found["importance"] = {name: each for name, each in by_stage.items() if each}
        return found

    def _trial(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        facts, run = study.facts(trial), self.job.run_of(trial.number)
        if facts["state"] == "running":
            curve = sorted(trial.intermediate_values.items())
            began = self.began.get("training", {}).get(trial.number)
            facts = {
                **facts,
                "curve": curve,
                "loss": min((loss for _, loss in curve), default=None),
                "epochs": max((epoch for epoch, _ in curve), default=0),
                "seconds": None if began is None else time.monotonic() - began,
            }
        return {
            "number": trial.number,
            "values": _values(trial, self.job.training),
            "hand": trial.number == _hand(self.training),
            "run": None if facts["state"] == "failed" else run.removeprefix(f"{self.output}/"),
            "steps": None,
            "error": None,
            **facts,
        }

    def _point(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        return {
            "number": trial.number,
            "values": _values(trial, self.sampling),
            "hand": trial.number == _hand(self.points),
            "front": trial.number in self.front,
            "chosen": trial.number == self.chosen,
            "objectives": None,
            "seconds": None,
            "error": None,
            **study.facts(trial),
        }

    def _left_s(self) -> float | None:
        """Seconds that the stage under way still takes, by what its trials took so far."""
        which = {"training": (self.training, self.job.num_trials), "sampling": (self.points, self.job.num_points)}
        found, total = which.get(self.state, (None, 0))
        if found is None:
            return None
        took = [facts["seconds"] for trial in study.trials(found) if (facts := study.facts(trial)).get("seconds")]
        if not took:
            return None
        now, began = time.monotonic(), self.began.get(self.state, {})
        running = [trial.number for trial in study.trials(found) if study.facts(trial)["state"] == "running"]
        mean = sum(took) / len(took)
        spent = sum(min(now - began[number], mean) for number in running if number in began)
        return max(mean * study.num_left(found, total) - spent, 0.0) / max(self.room, 1)


def _begun(of: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.trials(of) if trial.state != optuna.trial.TrialState.WAITING]


def _complete(of: optuna.Study, nothing: str) -> list[optuna.trial.FrozenTrial]:
    """The trials that came to their end.

    Raises:
        SweepError: `nothing`, and the first error.
    """
    done = [trial for trial in study.trials(of) if study.facts(trial)["state"] == "complete"]
    if not done:
        errors = [study.facts(trial).get("error") for trial in study.trials(of)]
        raise SweepError(f"{nothing}: {next((error for error in errors if error), 'all were stopped')}")
    return done


def _hand(of: optuna.Study | None) -> int | None:
    """The trial that was told what to try: the preset's, or the checkpoint's, own values."""
    there = study.trials(of) if of is not None else []
    return 0 if there and "fixed_params" in there[0].system_attrs else None


def _values(trial: optuna.trial.FrozenTrial, space: Space) -> dict[str, Any]:
    """What a trial's parameters stand for."""
    found = {}
    for name, value in trial.params.items():
        each = space.get(name)
        found[name] = each.values.get(value, value) if isinstance(each, spaces.Choices) else value
    return found


def _importance(of: optuna.Study, objective: int | None) -> dict[str, float]:
    """Of each option for what is good (PED-ANOVA, Watanabe et al. 2023); {} where the trials do not tell.

    `objective`: its place among the values of points; None for trainings, of which those that were stopped tell, too.
    """
    sign = -1.0 if objective is not None and of.directions[objective].name == "MAXIMIZE" else 1.0
    target = None if objective is None else lambda trial: sign * trial.values[objective]
    if objective is None:
        losses = {trial.number: study.facts(trial).get("loss") for trial in study.trials(of)}
        told = [trial for trial in study.trials(of) if losses[trial.number] is not None]
        of = optuna.create_study()
        for trial in told:
            of.add_trial(
                optuna.trial.create_trial(
                    params=trial.params, distributions=trial.distributions, value=losses[trial.number]
                )
            )
    with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(of, evaluator=evaluator, target=target)
        return {name: value for name, value in found.items() if math.isfinite(value)}
    return {}


def _stopped_page(run: str, epochs: int) -> None:
    """The report of a trial that ASHA stopped: its own driver went with it."""
    with contextlib.suppress(InputError, OSError):
        rows = storage.read_json_lines(storage.join(run, "metrics.jsonl"))
        last = rows[-1]
        status = {
            "state": "stopped",
            "step": last["step"],
            "total": last["step"] * epochs // max(last["epoch"], 1),
            "epoch": last["epoch"],
            "message": "Stopped by ASHA: others were ahead at the same number of epochs.",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        report.write_report(run, run_uri=run, status=status)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
