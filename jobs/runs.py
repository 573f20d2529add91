"""The folder of a run: configuration, metrics, checkpoints, and which of them is the best.

config.json  environment.json   what was asked for, and where it ran
metrics.jsonl  events.out…      rows of training and validation
samples/step-00000100.png       fixed pictures at each validation
checkpoints/step-00000100/      train_state/state.pt is what training goes on from; config.json comes last
best.json                       the best of them, and for how many epochs the run was trained once it is whole
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from ddpm_core import config as configs
from ddpm_core import provenance
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from jobs import storage
from jobs.tracking import Tracking

MAX_LOST_UPLOADS = 3
"""Checkpoints between validations that may fail to be stored one after the other; then the run ends with the reason."""

Files = Callable[..., dict[str, bytes]]
"""As `checkpoint.files`."""


def describe(uri: str, config: ModelConfig) -> dict[str, bytes]:
    """The files that a run starts with; what environment.json says of earlier attempts stays."""
    values = {"format": "ddpm-translate", "format_version": configs.FORMAT_VERSION, **configs.to_dict(config)}
    environment = provenance.environment()
    with contextlib.suppress(FileNotFoundError):
        before = json.loads(storage.read_bytes(storage.join(uri, "environment.json")))
        environment["attempts"] = before.get("attempts", [])
    return {
        "environment.json": json.dumps(environment, indent=2).encode(),
        "config.json": json.dumps(values, indent=2).encode(),
    }


def note_attempt(uri: str, start: int, world: int, device: torch.device, start_s: dict[str, float]) -> None:
    """Add to environment.json that training went on from here, where and with how many workers; `start_s`: what it took
    from the command, or the loss of workers, to the first step."""
    name = storage.join(uri, "environment.json")
    facts = json.loads(storage.read_bytes(name))
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    attempt = {"date": now, "step": start, "num_workers": world, "hardware": hardware, "start_s": start_s}
    facts["attempts"] = [*facts.get("attempts", []), attempt]
    storage.write_bytes(name, json.dumps(facts, indent=2).encode())


class Run:
    """The folder of a run, as rank 0 writes it: checkpoints and metrics; what else is told of them goes to `tracking`,
    which only rank 0 has."""

    def __init__(
        self, uri: str, config: ModelConfig, *, files: Files, comparable: bool, keep_every_steps: int = 0
    ) -> None:
        """`files`, `comparable`: the objective's. `keep_every_steps`: checkpoints of every so many steps stay."""
        self.uri, self.config, self.files, self.comparable = uri, config, files, comparable
        self.keep_every_steps = keep_every_steps
        self.metrics: list[dict[str, Any]] = []
        self.tracking: Tracking | None = None
        self.validated = self.checkpoint = 0
        """Steps of the last validation others can see, and of the last checkpoint stored."""
        self.storage = concurrent.futures.ThreadPoolExecutor(1)
        self.underway: list[concurrent.futures.Future[None]] = []
        self.num_lost = 0
        self.last = 0
        self.awaited: set[int] = set()
        """Steps whose validation is not done: their checkpoints may yet be the best."""

    def resume(self, step: int) -> None:
        """Take up the metrics of the steps that are kept; what came after the checkpoint is computed again."""
        self.last = step
        with contextlib.suppress(FileNotFoundError):
            lines = storage.read_bytes(storage.join(self.uri, "metrics.jsonl")).decode().splitlines()
            self.metrics = [row for line in lines if (row := json.loads(line))["step"] <= step]

    def validation(self, step: int) -> dict[str, Any] | None:
        """The row of the validation after `step`, if there was one."""
        return next((row for row in self.metrics if row["step"] == step and row["split"] == "val"), None)

    def log(self, row: dict[str, Any], *, picture: bytes | None = None) -> None:
        """`picture`: PNG of the fixed pictures."""
        self.metrics.append(row)
        if picture is not None:
            storage.write_bytes(storage.join(self.uri, "samples", f"step-{row['step']:08d}.png"), picture)
        if self.tracking:
            self.tracking.log(row)
            if picture is not None:
                self.tracking.picture("samples", picture, row["step"])

    def flush(self) -> None:
        """Put the metrics so far where others see them."""
        data = "".join(json.dumps(row) + "\n" for row in self.metrics).encode()
        storage.write_bytes(storage.join(self.uri, "metrics.jsonl"), data)
        if self.tracking:
            self.tracking.flush()
        self.validated = max((row["step"] for row in self.metrics if row["split"] == "val"), default=0)

    def told(self) -> dict[str, Any]:
        """What the driver shows of it."""
        warnings = list(self.tracking.warnings) if self.tracking else []
        return {"validated": self.validated, "checkpoint": self.checkpoint, "warnings": warnings}

    def close(self, status: str) -> None:
        """Store what `tracking` still has; `status` as its `close` takes it."""
        if self.tracking:
            self.tracking.close(status)

    def save(self, step: int, weights: dict[float, dict[str, Tensor]], state: dict[str, Any], *, strict: bool) -> None:
        """Take a checkpoint, which is stored while training goes on.

        `weights`: the EMA's, by length. `strict`: no earlier one may have been lost.

        Raises:
            InputError: an earlier one could not be stored, and `strict`, or it is the third in a row.
        """
        self.stored(strict=strict)
        self.last = step
        sigma_rel = self._sigma_rel(weights)
        buffer = io.BytesIO()
        torch.save({**state, "ema": weights}, buffer)
        others = {length: tensors for length, tensors in weights.items() if length != sigma_rel}
        config = dataclasses.replace(self.config, training={**self.config.training, "ema_sigma_rel": sigma_rel})
        # Serialised here, since the next step changes the weights; config.json is last: then it is complete.
        files = {"train_state/state.pt": buffer.getvalue(), **self.files(weights[sigma_rel], config, others=others)}
        keep = {step, *self.awaited}
        self._later(self._store, step, files, keep)

    def _sigma_rel(self, weights: Mapping[float, Any]) -> float:
        """The length of the EMA that was the best in the last validation."""
        return next((row["ema_sigma_rel"] for row in reversed(self.metrics) if row["split"] == "val"), min(weights))

    def promote(self, row: dict[str, Any], *, of_epochs: int) -> None:
        """Point `best.json` at the checkpoint of a validation if it is the best so far (the last, where losses do not
        compare); `of_epochs`: how long the run is, noted once it is whole."""
        self.awaited.discard(row["step"])
        self._later(self._promote, row, of_epochs, {self.last, *self.awaited})

    @property
    def storing(self) -> bool:
        """Whether something is on its way to storage."""
        return not all(future.done() for future in self.underway)

    def stored(self, *, strict: bool) -> None:
        """Wait until all is stored.

        Raises:
            InputError: it could not be, and that is serious: `strict`, or not the first time.
        """
        underway, self.underway = self.underway, []
        try:
            for future in underway:
                future.result()
            self.num_lost = 0 if underway else self.num_lost
        except (InputError, OSError):
            self.num_lost += 1
            if strict or self.num_lost >= MAX_LOST_UPLOADS:
                raise

    def _later(self, deed: Callable[..., None], *args: Any) -> None:
        self.underway.append(self.storage.submit(deed, *args))

    def _store(self, step: int, files: dict[str, bytes], keep: set[int]) -> None:
        for file, data in files.items():
            storage.write_bytes(storage.join(self.uri, folder_of(step), file), data)
        self.checkpoint = step
        if self.tracking:
            self.tracking.checkpoint(step)
        self._tidy(keep)

    def _promote(self, row: dict[str, Any], of_epochs: int, keep: set[int]) -> None:
        best = read_best(self.uri)
        if not best or row["loss"] <= best["metric"]["loss"] or not self.comparable:
            best = {
                "checkpoint": folder_of(row["step"]),
                "metric": {"name": "val/loss", "loss": row["loss"], "step": row["step"]},
                "ema_sigma_rel": row["ema_sigma_rel"],
                **configs.to_dict(self.config.sampling),
            }
        if row["epoch"] == of_epochs:
            best["epochs"] = of_epochs
        storage.write_bytes(storage.join(self.uri, "best.json"), json.dumps(best, indent=2).encode())
        self._tidy(keep)

    def _tidy(self, keep: set[int]) -> None:
        """Drop checkpoints that are neither the best nor to be kept."""
        kept = {folder_of(step) for step in keep} | {read_best(self.uri).get("checkpoint")}
        for name in storage.list_folders(storage.join(self.uri, "checkpoints")):
            milestone = self.keep_every_steps and int(name.removeprefix("step-")) % self.keep_every_steps == 0
            if f"checkpoints/{name}" not in kept and not milestone:
                storage.delete_folder(storage.join(self.uri, "checkpoints", name))


def folder_of(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def read_best(uri: str) -> dict[str, Any]:
    """`best.json` of a run, {} where there is none yet."""
    try:
        return json.loads(storage.read_bytes(storage.join(uri, "best.json")))
    except FileNotFoundError:
        return {}


def latest_checkpoint(uri: str) -> tuple[int, str]:
    """(step, folder) of the newest complete checkpoint of a run that training can go on from; (0, "") for none."""
    folder = storage.join(uri, "checkpoints")
    for name in reversed(storage.list_folders(folder)):
        if name.startswith("step-") and storage.exists(storage.join(folder, name, "config.json")):
            return int(name.removeprefix("step-")), storage.join(folder, name)
    return 0, ""
