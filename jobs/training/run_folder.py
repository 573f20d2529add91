"""The folder of a run: configuration, metrics, checkpoints, and which of them is the best.

config.json  environment.json   what was asked for, and where it ran
metrics.jsonl  events.out…      rows of training and validation
samples/step-00000100.png       fixed images at each validation
checkpoints/step-00000100/      train_state/state.pt is what training goes on from; config.json comes last; the best
                                one has a README.md, its model card
best.json                       the best of them, and for how many epochs the run was trained once it is whole
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import pickle
import platform
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from ddpm_core import config as configs
from ddpm_core import provenance, storage
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from jobs.reports import model_card
from jobs.training.tracking import Tracking

MAX_LOST_UPLOADS = 3
"""Checkpoints between validations that may fail to be stored one after the other; then the run ends with the reason."""

Files = Callable[..., dict[str, bytes]]
"""As `checkpoint.files`."""


class NotOursError(InputError):
    """The run's folder is gone, or another command trains there by now."""


def describe(uri: str, config: ModelConfig, owner: str = "") -> dict[str, bytes]:
    """The files that a run starts with; what environment.json says of earlier attempts stays. `owner`: which command
    trains there from now on; an earlier one that still runs sees it and ends."""
    values = {"format": "ddpm-translate", "format_version": configs.FORMAT_VERSION, **configs.to_dict(config)}
    environment = {**provenance.environment(), "owner": owner}
    with contextlib.suppress(FileNotFoundError, *storage.NOT_JSON):  # nothing depends on what it says
        before = storage.read_json(storage.join(uri, "environment.json"))
        environment["attempts"] = before.get("attempts", [])
    return {
        "environment.json": json.dumps(environment, indent=2).encode(),
        "config.json": json.dumps(values, indent=2).encode(),
    }


def note_attempt(uri: str, start: int, world: int, device: torch.device, start_s: dict[str, float]) -> None:
    """Add to environment.json that training went on from here, where and with how many workers; `start_s`: what it took
    from the command, or the loss of workers, to the first step."""
    try:
        facts = read_environment(uri)
    except storage.NOT_JSON:  # damaged; nothing depends on what it said
        facts = {}
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    attempt = {"date": now, "step": start, "num_workers": world, "hardware": hardware, "start_s": start_s}
    facts["attempts"] = [*facts.get("attempts", []), attempt]
    storage.write_bytes(storage.join(uri, "environment.json"), json.dumps(facts, indent=2).encode())


def read_environment(uri: str) -> dict[str, Any]:
    """Raises NotOursError: there is none, though every run begins with it."""
    try:
        return storage.read_json(storage.join(uri, "environment.json"))
    except FileNotFoundError:
        raise NotOursError(
            f"{uri} was removed or moved while it was trained; the same command begins anew, or goes on from where it "
            "was moved to if --output says so"
        ) from None


class Run:
    """The folder of a run, as rank 0 writes it: checkpoints and metrics; other stores of figures are `tracking`'s.

    Checkpoints are stored here, not by `ray.train.report(checkpoint=…)`, because Ray 2.60's
    - reports are a barrier of all workers that its controller lets pass once or twice a second;
    - storage has no commit: a checkpoint that was uploaded shortly before a crash is on the disk but not in Ray's
      snapshot, and half of one looks like a whole one; ours is whole once its config.json is there, written last;
    - snapshot can be read by the very version of Ray alone that wrote it: a run would end with an upgrade;
    - metrics exist only with a checkpoint, and which to keep cannot follow a validation, a failed upload (in between
      validations two may be lost) or another command that has taken the run over.
    """

    def __init__(
        self,
        uri: str,
        config: ModelConfig,
        *,
        files: Files,
        comparable: bool,
        keep_every_steps: int = 0,
        owner: str | None = None,
    ) -> None:
        """`files`, `comparable`: the objective's. `keep_every_steps`: checkpoints of every so many steps stay.
        `owner`: as `describe`'s; None leaves it unchecked."""
        self.owner = owner
        self.uri, self.config, self.files, self.comparable = uri, config, files, comparable
        self.keep_every_steps = keep_every_steps
        self.metrics: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        """What is wrong with what the network draws."""
        self.tracking: Tracking | None = None
        self.started = ""
        """Where the time until the first step went, once that is known."""
        self.validated = self.checkpoint = 0
        """Steps of the last validation others can see, and of the last checkpoint stored."""
        self.storage = concurrent.futures.ThreadPoolExecutor(1)
        self.underway: list[concurrent.futures.Future[None]] = []
        self.num_lost = 0
        self.last = 0

    def resume(self, step: int) -> None:
        """Take up the metrics of the steps that are kept; what came after the checkpoint is computed again."""
        self.last = step
        with contextlib.suppress(FileNotFoundError):
            try:
                rows = storage.read_json_lines(storage.join(self.uri, "metrics.jsonl"))
                self.metrics = [row for row in rows if row["step"] <= step]
            except storage.NOT_JSON as error:
                raise InputError(
                    f"{self.uri}/metrics.jsonl is damaged ({error}); mend or delete it, and the same command goes on"
                ) from None

    def validation(self, step: int) -> dict[str, Any] | None:
        """The row of the validation after `step`, if there was one."""
        return next((row for row in self.metrics if row["step"] == step and row["split"] == "val"), None)

    def log(self, row: dict[str, Any], *, image: bytes | None = None) -> None:
        """`image`: PNG of the fixed images."""
        self.metrics.append(row)
        if image is not None:
            storage.write_bytes(storage.join(self.uri, "samples", f"step-{row['step']:08d}.png"), image)
        if self.tracking:
            self.tracking.log(row)
            if image is not None:
                self.tracking.image("samples", image, row["step"])

    def step(self, step: int, images_per_s: float) -> None:
        if self.tracking:
            self.tracking.step(step, images_per_s)

    def flush(self) -> None:
        """Put the metrics so far where others see them.

        Raises:
            NotOursError: it is no longer ours to write to.
        """
        self._check_ours()
        data = "".join(json.dumps(row) + "\n" for row in self.metrics).encode()
        storage.write_bytes(storage.join(self.uri, "metrics.jsonl"), data)
        if self.tracking:
            self.tracking.flush()
        self.validated = max((row["step"] for row in self.metrics if row["split"] == "val"), default=0)

    def status(self) -> dict[str, Any]:
        """For `StatusBoard.post`."""
        warnings = [*(self.tracking.warnings if self.tracking else []), *self.warnings]
        fields = {"validated": self.validated, "checkpoint": self.checkpoint, "started": self.started}
        return {**fields, "warnings": warnings}

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
        self._later(self._store, step, files)

    def _sigma_rel(self, weights: Mapping[float, Any]) -> float:
        """The length of the EMA that was the best in the last validation."""
        return next((row["ema_sigma_rel"] for row in reversed(self.metrics) if row["split"] == "val"), min(weights))

    def promote(self, row: dict[str, Any], *, of_epochs: int) -> None:
        """Point `best.json` at the checkpoint of a validation if it is the best so far (the last, where losses do not
        compare); `of_epochs`: how long the run is, noted once it is whole."""
        self._later(self._promote, row, of_epochs, self.last)

    @property
    def storing(self) -> bool:
        """Whether something is on its way to storage."""
        return not all(future.done() for future in self.underway)

    def stored(self, *, strict: bool) -> None:
        """Wait until all is stored.

        Raises:
            InputError: it could not be, and that is serious: `strict`, not the first time, or the run is not ours.
        """
        underway, self.underway = self.underway, []
        concurrent.futures.wait(underway)
        try:
            for future in underway:
                future.result()
            self.num_lost = 0 if underway else self.num_lost
        except (InputError, OSError) as error:
            self.num_lost += 1
            if strict or self.num_lost >= MAX_LOST_UPLOADS or isinstance(error, NotOursError):
                raise

    def _later(self, deed: Callable[..., None], *args: Any) -> None:
        self.underway.append(self.storage.submit(deed, *args))

    def _store(self, step: int, files: dict[str, bytes]) -> None:
        self._check_ours()
        folder = storage.join(self.uri, folder_of(step))
        try:
            for file, data in files.items():
                storage.write_bytes(storage.join(folder, file), data)
        except (InputError, OSError):
            with contextlib.suppress(InputError, OSError):  # or half of it would take the room that the next one needs
                storage.delete_folder(folder)
            raise
        self.checkpoint = step
        if self.tracking:
            self.tracking.checkpoint(step)
        self._tidy(step)

    def _promote(self, row: dict[str, Any], of_epochs: int, last: int) -> None:
        self._check_ours()
        if not is_complete(self.uri, folder_of(row["step"])):
            return  # it could not be stored, which `stored` tells
        best = read_best(self.uri)
        known = best and is_complete(self.uri, best["checkpoint"])
        if not known or row["loss"] <= best["metric"]["loss"] or not self.comparable:
            best = {
                "checkpoint": folder_of(row["step"]),
                "metric": {
                    "name": "val/loss",
                    "loss": row["loss"],
                    "step": row["step"],
                    **({"num_images": row["num_images"]} if "num_images" in row else {}),
                },
                "ema_sigma_rel": row["ema_sigma_rel"],
                **configs.to_dict(self.config.sampling),
            }
            self._describe_best(row)
        if row["epoch"] == of_epochs:
            best["epochs"] = of_epochs
        storage.write_bytes(storage.join(self.uri, "best.json"), json.dumps(best, indent=2).encode())
        self._tidy(last)

    def _describe_best(self, row: dict[str, Any]) -> None:
        """The model card of a checkpoint, beside it, with the images of its validation."""
        folder, samples = storage.join(self.uri, folder_of(row["step"])), ["samples.png"]
        try:
            name = f"step-{row['step']:08d}.png"
            storage.write_bytes(
                storage.join(folder, samples[0]), storage.read_bytes(storage.join(self.uri, "samples", name))
            )
        except FileNotFoundError:  # nothing was translated
            samples = []
        environment = {}
        with contextlib.suppress(FileNotFoundError, *storage.NOT_JSON):  # nothing depends on what it says
            environment = storage.read_json(storage.join(self.uri, "environment.json"))
        text = model_card.build(configs.to_dict(self.config), environment, validation=row, samples=samples)
        storage.write_bytes(storage.join(folder, "README.md"), text.encode())

    def _tidy(self, last: int) -> None:
        """Drop checkpoints that are neither the best, nor the `last`, nor the last that is whole: that of step `last`
        may have been lost."""
        kept = {read_best(self.uri).get("checkpoint"), folder_of(last), folder_of(latest_checkpoint(self.uri)[0])}
        for step in checkpoint_steps(self.uri):
            milestone = self.keep_every_steps and step % self.keep_every_steps == 0
            if folder_of(step) not in kept and not milestone:
                storage.delete_folder(storage.join(self.uri, folder_of(step)))

    def _check_ours(self) -> None:
        if self.owner is None:
            return
        with contextlib.suppress(*storage.NOT_JSON):  # damaged: it says of nobody else that it is theirs
            if read_environment(self.uri).get("owner") == self.owner:
                return
            raise NotOursError(f"{self.uri} is trained by a command given later; this one ends here")


def folder_of(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def read_best(uri: str) -> dict[str, Any]:
    """`best.json` of a run, {} where there is none yet.

    Raises:
        InputError: it is damaged.
    """
    try:
        return storage.read_json(storage.join(uri, "best.json"))
    except FileNotFoundError:
        return {}
    except storage.NOT_JSON as error:
        raise InputError(f"{uri}/best.json is damaged ({error}); delete it, and the same command goes on") from None


def checkpoint_steps(uri: str) -> list[int]:
    """Steps of a run's checkpoints, whole or not, in order. What else lies beside them is not ours."""
    names = storage.list_folders(storage.join(uri, "checkpoints"))
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d{8,})", name)))


def is_complete(uri: str, folder: str) -> bool:
    """Whether this checkpoint of a run, as `folder_of` names it, is whole."""
    return storage.exists(storage.join(uri, folder, "config.json"))


def read_state(folder: str) -> dict[str, Any]:
    """What training goes on from, of a checkpoint.

    Raises:
        InputError: it is missing or damaged.
    """
    name = storage.join(folder, "train_state", "state.pt")
    try:
        return torch.load(io.BytesIO(storage.read_bytes(name)), weights_only=True, map_location="cpu")
    except (FileNotFoundError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise InputError(
            f"{name} is {what}; delete the folder {folder}, and the same command goes on from the checkpoint before it"
        ) from None


def latest_checkpoint(uri: str) -> tuple[int, str]:
    """(step, folder) of the newest complete checkpoint of a run that training can go on from; (0, "") for none."""
    for step in reversed(checkpoint_steps(uri)):
        if is_complete(uri, folder_of(step)):
            return step, storage.join(uri, folder_of(step))
    return 0, ""
