"""Where a run's figures go beside metrics.jsonl: TensorBoard events, MLflow, Prometheus through Ray.

Nothing here may hold up a step or end a run: events and MLflow have a thread each, which is told what to do by a queue;
what cannot be stored is told once, kept, and tried again with the next item.
"""

import collections
import importlib.metadata
import io
import json
import logging
import os
import posixpath
import queue
import re
import shutil
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_core import config as configs
from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.reports.html import flat

GAUGES = {
    "ddpm_train_step": "Optimiser steps done.",
    "ddpm_train_epoch": "Epochs done.",
    "ddpm_train_epochs": "Epochs asked for.",
    "ddpm_train_images_seen": "Training images seen, with repetition.",
    "ddpm_train_images_per_second": "Training images a second, all workers together.",
    "ddpm_train_loss": "Mean loss of the last epoch (split=train) or of the last validation (split=val).",
    "ddpm_train_data_wait_ratio": "Share of the last epoch spent waiting for data.",
    "ddpm_train_learning_rate": "Learning rate of the last step.",
    "ddpm_train_checkpoint_step": "Step of the last checkpoint stored.",
    "ddpm_train_checkpoint_timestamp_seconds": "When the last checkpoint was stored, in seconds since 1970.",
}
"""What Prometheus sees, with `ray_` before it; each carries the label `run`, the loss also `split`."""
OF_ROW = {
    "epoch": "ddpm_train_epoch",
    "images_seen": "ddpm_train_images_seen",
    "data_wait_share": "ddpm_train_data_wait_ratio",
    "learning_rate": "ddpm_train_learning_rate",
}
STEP_EVERY_S = 1.0
"""Ray collects every ten seconds: gauges need not follow each step."""
MAX_WAITING = 1000
"""Rows and images kept for a store that does not answer; then the oldest go."""
CLOSE_S = 30.0
"""How long the end of a run waits for what is still to be stored."""
MAX_EVENTS_BYTES = 8 * 2**20
"""S3 objects are written whole: a new events file is begun where one is longer."""
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "uc")
"""What MLflow calls tracking URIs, beside folders."""


class Tracking:
    """What rank 0 of a run tells others. `warnings`: what went wrong, one line for each place."""

    def __init__(self, uri: str, config: Any, *, mlflow: str | None = None, use_ray: bool = True) -> None:
        """`config`: the run's, a dataclass. `mlflow`: as `mlflow_uri` gives it. `use_ray`: Ray runs in this process."""
        values = configs.to_dict(config)
        self.warnings: list[str] = []
        self.gauges = _gauges(uri) if use_ray else {}
        self.stepped_s = 0.0
        self._set("ddpm_train_epochs", values.get("training", {}).get("epochs"))
        sinks: list[Events | Mlflow] = [Events(uri)]
        if mlflow is not None:
            sinks.append(Mlflow(uri, values, mlflow))
        self.queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in sinks]
        self.threads = [
            threading.Thread(target=self._serve, args=each, name=each[0].name, daemon=True)
            for each in zip(sinks, self.queues, strict=True)
        ]
        for thread in self.threads:
            thread.start()

    def step(self, step: int, images_per_s: float) -> None:
        """After each step; costs microseconds."""
        now = time.monotonic()
        if self.gauges and now - self.stepped_s >= STEP_EVERY_S:
            self.stepped_s = now
            self._set("ddpm_train_step", step)
            self._set("ddpm_train_images_per_second", images_per_s)

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        for key, name in OF_ROW.items():
            self._set(name, row.get(key))
        self._set("ddpm_train_step", row["step"])
        self._set("ddpm_train_loss", row.get("loss"), split=row["split"])
        self._put("row", row)

    def checkpoint(self, step: int) -> None:
        """A checkpoint has been stored. May be called from any thread."""
        self._set("ddpm_train_checkpoint_step", step)
        self._set("ddpm_train_checkpoint_timestamp_seconds", time.time())

    def image(self, name: str, png: bytes, step: int) -> None:
        self._put("image", name, png, step)

    def flush(self) -> None:
        """Have all so far put where others see it; does not wait for it."""
        self._put("flush")

    def close(self, status: str = "FINISHED") -> None:
        """Store the rest, waiting CLOSE_S for it at most. `status`: MLflow's FINISHED, FAILED or KILLED."""
        self._put("close", status)
        until = time.monotonic() + CLOSE_S
        for tasks, thread in zip(self.queues, self.threads, strict=True):
            tasks.put(None)
            thread.join(max(until - time.monotonic(), 0))
            if thread.is_alive():
                self.warnings.append(f"{thread.name}: what was still to be stored after {CLOSE_S:g} s is lost")

    def _set(self, name: str, value: float | None, **tags: str) -> None:
        if self.gauges and value is not None:
            self.gauges[name].set(value, tags=tags or None)

    def _put(self, deed: str, *args: Any) -> None:
        for tasks in self.queues:
            tasks.put((deed, args))

    def _serve(self, sink: "Events | Mlflow", tasks: "queue.SimpleQueue[Any]") -> None:
        waiting: collections.deque[Any] = collections.deque(maxlen=MAX_WAITING)
        told = False
        while (task := tasks.get()) is not None:
            waiting.append(task)
            try:
                while waiting:
                    deed, args = waiting[0]
                    getattr(sink, deed)(*args)
                    waiting.popleft()
            except Exception as error:
                if not told:
                    text = (str(error).strip() or type(error).__name__).splitlines()[0]
                    self.warnings.append(f"{sink.name}: {text}; training goes on, and it is tried again with each row")
                told = True


def _gauges(run: str) -> dict[str, Any]:
    import ray.util.metrics

    tags = {name: ("run", "split") if name == "ddpm_train_loss" else ("run",) for name in GAUGES}
    return {
        name: ray.util.metrics.Gauge(name, description=about, tag_keys=tags[name]).set_default_tags({"run": run})
        for name, about in GAUGES.items()
    }


class Events:
    """TensorBoard's event files in the run's folder; written elsewhere and copied where that is not a local one.

    tensorboardX's SummaryWriter is not used: where its disk is full, its thread ends and all that follows waits.
    """

    name = "TensorBoard"

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.folder = tempfile.mkdtemp(prefix="events") if storage.is_remote(uri) else uri
        self.writer: Any = None
        self.file = ""
        self.num_files = 0

    def row(self, row: dict[str, Any]) -> None:
        from tensorboardX import summary

        for name, value in row.items():
            if isinstance(value, float):
                self._write(summary.scalar(f"{row['split']}/{name}", value), row["step"])

    def image(self, name: str, png: bytes, step: int) -> None:
        from tensorboardX import summary

        with Image.open(io.BytesIO(png)) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._write(summary.image(name, pixels, dataformats="HWC"), step)

    def flush(self) -> None:
        if self.writer is None:
            return
        try:
            self.writer.flush()
        except OSError:
            self.writer = None  # its end may be torn: what follows goes into another file
            raise
        if self.folder != self.uri:
            path = Path(self.folder, self.file)
            storage.write_bytes(storage.join(self.uri, self.file), path.read_bytes())
            if path.stat().st_size > MAX_EVENTS_BYTES:
                self.writer = None

    def close(self, status: str) -> None:
        self.flush()
        if self.folder != self.uri:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, summary: Any, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        try:
            if self.writer is None:
                os.makedirs(self.folder, exist_ok=True)
                suffix = f".{os.getpid()}.{self.num_files}"  # its time has whole seconds
                self.writer = EventsWriter(posixpath.join(self.folder, "events"), suffix)
                self.file = posixpath.basename(self.writer._file_name)
                self.num_files += 1
                # What an earlier attempt wrote of later steps is not shown.
                start = SessionLog(status=SessionLog.START)
                self.writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))
            self.writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        except OSError:
            self.writer = None
            raise


FORBIDDEN = re.compile(r"[^\w.\- :]")
"""What MLflow refuses in the name of a metric, such as the accuracy on a domain called "day (old)"."""


class Mlflow:
    """A run of MLflow; `mlflow.json` in the run's folder says which, so that a resumed run goes on with it."""

    name = "MLflow"

    def __init__(self, uri: str, config: dict[str, Any], server: str) -> None:
        self.uri, self.config, self.server = uri, config, server
        self.client: Any = None
        self.run_id = ""
        self.last: dict[str, int] = {}
        self.image_step = -1

    def row(self, row: dict[str, Any]) -> None:
        client, split = self._connected(), row["split"]
        if row["step"] <= self.last[split]:
            return  # computed again after a kill: it is there
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(f"{split}/{FORBIDDEN.sub('_', name)}", value, now, row["step"])
            for name, value in row.items()
            if isinstance(value, float)
        ]
        client.log_batch(self.run_id, metrics=metrics)
        self.last[split] = row["step"]

    def image(self, name: str, png: bytes, step: int) -> None:
        client = self._connected()
        if step > self.image_step:
            with Image.open(io.BytesIO(png)) as image:
                client.log_image(self.run_id, image.convert("RGB"), key=name, step=step)

    def flush(self) -> None: ...

    def close(self, status: str) -> None:
        self._connected().set_terminated(self.run_id, status)

    def _connected(self) -> Any:
        if self.client is None:
            client = _mlflow_client(self.server)
            self.run_id = self._reopened(client) or self._begun(client)
            self.last = {
                split: max(
                    (point.step for point in client.get_metric_history(self.run_id, f"{split}/loss")), default=-1
                )
                for split in ("train", "val")
            }
            self.image_step = self.last["val"]
            self.client = client
        return self.client

    def _reopened(self, client: Any) -> str:
        """The id of the run that an earlier attempt began there, "" where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            there = json.loads(storage.read_bytes(storage.join(self.uri, "mlflow.json")))
            if there["tracking_uri"] != self.server:
                return ""
            run = client.get_run(there["run_id"])
        except FileNotFoundError:
            return ""
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return ""
            raise
        if run.info.lifecycle_stage != "active":
            return ""
        client.update_run(run.info.run_id, status="RUNNING")
        return run.info.run_id

    def _begun(self, client: Any) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ddpm-translate")
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, self._artifacts())
        data = self.config.get("data", {})
        tags = {"run": self.uri, "data": data.get("name"), "licence": data.get("licence")}
        tags = {key: str(value) for key, value in tags.items() if value}
        run_id = client.create_run(experiment_id, run_name=posixpath.basename(self.uri), tags=tags).info.run_id
        note = {"tracking_uri": self.server, "run_id": run_id}
        storage.write_bytes(storage.join(self.uri, "mlflow.json"), json.dumps(note).encode())
        params = [Param(key, text[:500]) for key, text in flat(self.config)]
        for first in range(0, len(params), 100):  # as many as it takes at once
            client.log_batch(run_id, params=params[first : first + 100])
        return run_id

    def _artifacts(self) -> str | None:
        """Where images go; a server knows, beside a database file they go into a folder."""
        if not self.server.startswith("sqlite:///"):
            return None
        return str(Path(self.server.removeprefix("sqlite:///")).parent / "mlflow-artifacts")


def _mlflow_client(server: str) -> Any:
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(mlflow|sqlalchemy|alembic)\b.*")
    warnings.filterwarnings("ignore", message=".*noload.*")  # MLflow's, told of whoever calls
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if server.startswith("sqlite:///"):
        Path(server.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=server)


MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Ours unless the user says otherwise: a server that is down is tried again with the next row."""


def mlflow_uri(text: str) -> str:
    """`--mlflow` as workers in other folders can use it; a folder becomes mlflow.db in it.

    Raises:
        InputError: MLflow is not installed, or takes no such URI.
    """
    try:
        importlib.metadata.version("mlflow-skinny")
    except importlib.metadata.PackageNotFoundError:
        raise InputError("--mlflow needs MLflow, which is not installed: pip install 'mlflow-skinny>=3,<4'") from None
    scheme = text.partition(":")[0].partition("+")[0] if ":" in text else ""
    if scheme == "sqlite":
        path = text.partition("://")[2].removeprefix("/")
        if not path:
            raise InputError(f"--mlflow {text} names no file; give sqlite:///path/to/mlflow.db")
        return f"sqlite:///{Path(path).absolute()}"
    if text in ("databricks", "uc") or (scheme in SCHEMES and not re.fullmatch(r"https?:/*", text)):
        return text
    if scheme not in ("", "file") or not text:
        raise InputError(f"--mlflow {text}: give a server (http://…), a database (sqlite:///…) or a local folder")
    folder = Path(text.removeprefix("file://").removeprefix("file:"))
    try:
        is_database = folder.suffix == ".db" or folder.is_file()
    except OSError as error:
        raise InputError(f"--mlflow {text[:80]}: {error.strerror}; give a local folder") from None
    if is_database:
        return f"sqlite:///{folder.absolute()}"
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"
