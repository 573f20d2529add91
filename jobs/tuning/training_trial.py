"""Trials of a sweep that train: each a run like any other, in its own folder, by Ray Train; the actor that Ray Tune
starts only waits for it.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray.train
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from ddpm_core import checkpoint, storage
from ddpm_core import config as configs
from ddpm_core.ema import EMA
from jobs.common import cli
from jobs.training import checks, driver, run_folder
from jobs.training.options import TrainArgs, TrainOptions, stored_options

ROOM_S = 600.0
"""How long a trial waits for room on a cluster that has shrunk or is taken by others."""
NUM_DRAWS = 4
"""Draws of fresh noise that the best trainings are measured on again."""


def train_trial(trial: Mapping[str, Any], report: Callable[[dict[str, Any]], Any]) -> None:
    """One run of `jobs.train`. Only a lost node makes it raise: then it is begun again.

    `trial`: args (the fields of TrainArgs but one) and options, as plain data. `report` is told of each validation, and
    at last how the training ended: `outcome` complete, diverged or failed, `error`.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{ROOM_S:.0f}")
    with cli.ray_session(start=False):
        here = trial["args"]["num_workers"] == "0"
        report(trained(trial, _Reporting(report) if here else TuneReportCallback()))


class _Reporting(ray.train.UserCallback):
    """What TuneReportCallback does, where the training is in this very process."""

    def __init__(self, report: Callable[[dict[str, Any]], Any]) -> None:
        self.report = report

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.report(metrics[0])


def trained(trial: Mapping[str, Any], callback: ray.train.UserCallback) -> dict[str, Any]:
    """How it ended."""
    options = configs.from_dict(TrainOptions, trial["options"])
    args = TrainArgs(**trial["args"], options=options)
    deadline = time.monotonic() + ROOM_S
    while True:
        try:
            config = checks.configured(args, args.data)
            if not checks.finished(args.output, config, options):
                driver.fit(args, config, args.data, args.output, {}, spread=False, callbacks=[callback])
            return {"outcome": "complete", "error": None}
        except driver.DivergedError as error:
            return {"outcome": "diverged", "error": str(error)}
        except driver.NoRoomError as error:
            if time.monotonic() > deadline:
                return {"outcome": "failed", "error": str(error)}
            time.sleep(2)
        except Exception as error:
            known = cli.input_error(error)
            lines = str(known or error).strip().splitlines() or [type(error).__name__]
            return {"outcome": "failed", "error": lines[-1]}


def progress(run: str) -> tuple[list[tuple[int, float]], int]:
    """(epoch, validation loss) of a run, as far as it is, and its optimiser steps."""
    try:
        rows = storage.read_json_lines(storage.join(run, "metrics.jsonl"))
    except FileNotFoundError:
        return [], 0
    curve = [(row["epoch"], row["loss"]) for row in rows if row["split"] == "val"]
    return curve, max((row["step"] for row in rows), default=0)


def losses_again(there: Mapping[str, str], dataset: str, split: str, use_gpu: bool) -> dict[str, np.ndarray]:
    """Of the best checkpoint of each of the runs the loss of each held-out image, (n,), on fresh noise and
    timesteps: a Ray task."""
    return {name: _losses_again(run, dataset, split, use_gpu) for name, run in there.items()}


def _losses_again(run: str, dataset: str, split: str, use_gpu: bool) -> np.ndarray:
    from jobs.datasets import cache
    from jobs.training.batches import Share
    from jobs.training.methods import objective
    from jobs.training.validation import Validation

    best = run_folder.read_best(run)
    config = checkpoint.read_config(run)
    options = configs.from_dict(TrainOptions, stored_options(config.training))
    device = torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
    method = objective(config, options, device)
    ema = EMA(method.network, sigma_rels=options.optim.ema_sigma_rels)
    ema.load_state_dict(run_folder.read_state(storage.join(run, best["checkpoint"]))["ema"])
    tracks = {best["ema_sigma_rel"]: ema.tracks[best["ema_sigma_rel"]]}
    rows = cache.load(dataset, split, content_hash=config.data.content_hash)
    share, found = Share(rank=0, world=1), []
    for draw in range(NUM_DRAWS):
        again = Validation(rows, config, options, method, device, share, noise=f"again-{draw}")
        again.ts = np.roll(again.ts, draw + 1)
        with torch.no_grad():
            found.append(again.measure(tracks)[best["ema_sigma_rel"]]["loss"])
    return np.mean(found, axis=0)
