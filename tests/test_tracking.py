"""Tracking: each place is read back by its own means, and none of them can hold up or end a run."""

import dataclasses
import io
import json
import re
import shutil
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, free_port
from PIL import Image
from tensorboardX.proto import event_pb2

from ddpm_core import images, storage
from ddpm_core.config import DataCard, ModelConfig
from ddpm_core.errors import InputError
from jobs.training import tracking
from jobs.training.tracking import GAUGES, Events, Tracking, mlflow_uri

CONFIG = dataclasses.replace(
    ModelConfig(image_size=16, domains=("day", "night")),
    data=DataCard(name="gradients", licence="CC0"),
    training={"epochs": 7, "optim": {"learning_rate": 2e-4}},
)
PNG = images.encode_png(np.full((8, 8, 3), (10, 200, 30), np.uint8))


def row(step: int, split: str = "train", loss: float = 0.5) -> dict[str, Any]:
    speed = {"learning_rate": 0.25, "images_per_s": 64.0, "data_wait_share": 0.125} if split == "train" else {}
    return {"step": step, "epoch": step // 2, "images_seen": 4 * step, "split": split, "loss": loss, **speed}


def first_pixel(png: bytes) -> Any:
    return Image.open(io.BytesIO(png)).getpixel((0, 0))


def events(folder: Path | str) -> list[Any]:
    """What all event files below a folder say, in the order of the files' names."""
    found = []
    for name in sorted(name for name in storage.list_files(str(folder)) if "tfevents" in name):
        data, at = storage.read_bytes(storage.join(str(folder), name)), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
    return found


def scalars(found: list[Any]) -> list[tuple[str, int, float]]:
    return [
        (value.tag, event.step, value.simple_value)
        for event in found
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


EXPECTED = [
    ("train/loss", 2, 0.5),
    ("train/learning_rate", 2, 0.25),
    ("train/images_per_s", 2, 64.0),
    ("train/data_wait_share", 2, 0.125),
    ("val/loss", 2, 0.75),
]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_tensorboard_events_are_read_back(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    uri = str(tmp_path) if where == "local" else f"{request.getfixturevalue('s3').uri}/tracking/events"
    to = Tracking(uri, CONFIG, use_ray=False)
    to.log(row(2))
    to.flush()
    to.log(row(2, "val", 0.75))
    to.picture("samples", PNG, 2)
    to.close()
    assert to.warnings == []
    found = events(uri)
    assert found[0].file_version == "brain.Event:2"
    assert (found[1].session_log.status, found[1].step) == (event_pb2.SessionLog.START, 2)
    assert scalars(found) == EXPECTED
    (picture,) = [value for event in found for value in event.summary.value if value.HasField("image")]
    assert picture.tag == "samples"
    assert first_pixel(picture.image.encoded_image_string) == (10, 200, 30)


def test_a_full_disk_is_told_once_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = Tracking("/dev/full/run", CONFIG, use_ray=False)  # a file that takes nothing: no folder can be made in it
    for step in (2, 4, 6):
        to.log(row(step))
    to.close()
    (warning,) = to.warnings
    assert warning.startswith("TensorBoard: ")
    assert "/dev/full" in warning

    sink, flush, full = Events(str(tmp_path)), tracking.Events.flush, True

    def fails_while_full(self: Events) -> None:
        if full:
            self.writer = None
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(Events, "flush", fails_while_full)
    sink.row(row(2))
    with pytest.raises(OSError, match="No space left"):
        sink.flush()
    full = False
    sink.row(row(4))
    sink.close("FINISHED")
    assert len([name for name in storage.list_files(str(tmp_path)) if "tfevents" in name]) == 2
    assert ("train/loss", 4, 0.5) in scalars(events(tmp_path))


def test_a_store_that_hangs_holds_up_neither_the_steps_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(Events, "row", lambda *_: forever.wait())
    monkeypatch.setattr(tracking, "CLOSE_S", 0.2)
    to = Tracking(str(tmp_path), CONFIG, use_ray=False)
    begun = time.perf_counter()
    for step in range(100):
        to.log(row(step))
        to.flush()
    assert time.perf_counter() - begun < 0.1
    to.close()
    assert time.perf_counter() - begun < 2
    forever.set()
    assert to.warnings == ["TensorBoard: what was still to be stored after 0.2 s is lost"]


# -- MLflow -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty one: to make its tables takes seconds."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    tracking._mlflow_client(mlflow_uri(str(folder)))
    return folder / "mlflow.db"


@pytest.fixture
def client(database: Path, tmp_path: Path) -> Any:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(database, tmp_path / "mlflow/mlflow.db")
    return tracking._mlflow_client(mlflow_uri(str(tmp_path / "mlflow")))


def curve(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def runs_of(client: Any) -> list[Any]:
    return client.search_runs([client.get_experiment_by_name("ddpm-translate").experiment_id])


def test_mlflow_gets_curves_parameters_and_images_and_a_resumed_run_goes_on(client: Any, tmp_path: Path) -> None:
    uri, server = str(tmp_path / "run"), mlflow_uri(str(tmp_path / "mlflow"))
    first = Tracking(uri, CONFIG, mlflow=server, use_ray=False)
    first.log(row(2))
    first.log(row(2, "val", 0.75))
    first.picture("samples", PNG, 2)
    first.log(row(4))
    first.close("KILLED")
    assert first.warnings == []
    (run,) = runs_of(client)
    assert run.info.status == "KILLED"
    assert json.loads((tmp_path / "run/mlflow.json").read_text()) == {
        "tracking_uri": f"sqlite:///{tmp_path}/mlflow/mlflow.db",
        "run_id": run.info.run_id,
    }
    assert run.data.params["training.optim.learning_rate"] == "0.0002"
    assert run.data.params["domains"] == "day night"
    assert (run.data.tags["data"], run.data.tags["licence"], run.data.tags["run"]) == ("gradients", "CC0", uri)
    (picture,) = (tmp_path / "mlflow").rglob("samples*step+2*.png")
    assert first_pixel(picture.read_bytes()) == (10, 200, 30)

    second = Tracking(uri, CONFIG, mlflow=server, use_ray=False)
    second.log(row(4))  # computed again
    second.log(row(6, loss=0.25))
    second.close()
    assert second.warnings == []
    (run,) = runs_of(client)
    assert run.info.status == "FINISHED"
    assert curve(client, run.info.run_id, "train/loss") == [(2, 0.5), (4, 0.5), (6, 0.25)]
    assert curve(client, run.info.run_id, "val/loss") == [(2, 0.75)]


def test_names_that_mlflow_refuses_do_not_keep_it_from_the_rest(client: Any, tmp_path: Path) -> None:
    to = Tracking(str(tmp_path / "run"), CONFIG, mlflow=mlflow_uri(str(tmp_path / "mlflow")), use_ray=False)
    to.log({**row(2, "val", 0.75), "accuracy_day (old)": 0.5, "accuracy_männlich": 0.25})
    to.close()
    assert to.warnings == []
    (run,) = runs_of(client)
    assert curve(client, run.info.run_id, "val/accuracy_day _old_") == [(2, 0.5)]
    assert curve(client, run.info.run_id, "val/accuracy_männlich") == [(2, 0.25)]
    assert curve(client, run.info.run_id, "val/loss") == [(2, 0.75)]


def test_a_validation_done_aside_does_not_set_the_gauges_back(tmp_path: Path) -> None:
    to = Tracking(str(tmp_path), CONFIG, use_ray=False)
    seen: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            seen[" ".join([self.name, *(tags or {}).values()])] = value

    to.gauges = {name: Gauge(name) for name in GAUGES}
    to.log(row(4))
    to.log(row(2, "val", 0.75))
    to.close()
    assert seen["ddpm_train_step"] == 4
    assert (seen["ddpm_train_loss train"], seen["ddpm_train_loss val"]) == (0.5, 0.75)


def test_a_run_that_mlflow_no_longer_has_is_begun_anew(client: Any, tmp_path: Path) -> None:
    uri, server = str(tmp_path / "run"), mlflow_uri(str(tmp_path / "mlflow"))
    storage.write_bytes(f"{uri}/mlflow.json", json.dumps({"tracking_uri": server, "run_id": "0" * 32}).encode())
    to = Tracking(uri, CONFIG, mlflow=server, use_ray=False)
    to.log(row(2))
    to.close()
    assert to.warnings == []
    (run,) = runs_of(client)
    assert curve(client, run.info.run_id, "train/loss") == [(2, 0.5)]


def test_a_server_that_is_down_is_told_once_and_the_rest_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    to = Tracking(str(tmp_path), CONFIG, mlflow=f"http://127.0.0.1:{free_port()}", use_ray=False)
    to.log(row(2))
    to.log(row(2, "val", 0.75))
    to.close()
    (warning,) = to.warnings
    assert warning.startswith("MLflow: API request to http://127.0.0.1:")
    assert warning.endswith("training goes on, and it is tried again with each row")
    assert scalars(events(tmp_path)) == EXPECTED


def test_what_a_server_missed_is_sent_when_it_is_back(client: Any, tmp_path: Path) -> None:
    server = mlflow_uri(str(tmp_path / "mlflow"))
    sink = tracking.Mlflow(str(tmp_path / "run"), {}, server)
    real, down = sink._connected, True

    def connected() -> Any:
        if down:
            raise ConnectionError("no route to host")
        return real()

    sink._connected = connected  # type: ignore[method-assign]
    to = Tracking(str(tmp_path / "other"), CONFIG, use_ray=False)
    tasks: Any = to.queues[0].__class__()
    thread = threading.Thread(target=to._serve, args=(sink, tasks))
    thread.start()
    for step in (2, 4):
        tasks.put(("row", (row(step),)))
    until = time.monotonic() + 10
    while not to.warnings and time.monotonic() < until:
        time.sleep(0.01)
    down = False
    tasks.put(("row", (row(6),)))
    tasks.put(None)
    thread.join(30)
    to.close()
    assert to.warnings == ["MLflow: no route to host; training goes on, and it is tried again with each row"]
    assert curve(client, sink.run_id, "train/loss") == [(2, 0.5), (4, 0.5), (6, 0.5)]


def test_mlflow_uris_are_made_absolute_and_wrong_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    for text, uri in {
        "http://host:5000": "http://host:5000",
        "databricks": "databricks",
        "postgresql+psycopg2://u@h/db": "postgresql+psycopg2://u@h/db",
        "mine": f"sqlite:///{tmp_path}/mine/mlflow.db",
        "mine.db": f"sqlite:///{tmp_path}/mine.db",
        "file:///mine": "sqlite:////mine/mlflow.db",
        "sqlite:///a/b.db": f"sqlite:///{tmp_path}/a/b.db",
        "sqlite:////a/b.db": "sqlite:////a/b.db",
    }.items():
        assert mlflow_uri(text) == uri
    with pytest.raises(InputError, match="--mlflow s3://b/c: give a server"):
        mlflow_uri("s3://b/c")
    with pytest.raises(InputError, match="names no file"):
        mlflow_uri("sqlite://")
    for nothing in ("", "http://", "https:"):
        with pytest.raises(InputError, match=f"--mlflow {nothing}: give a server"):
            mlflow_uri(nothing)


# -- Prometheus ---------------------------------------------------------------------------------------------------


def scraped() -> str:
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def metrics_page(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Prometheus gets from a node while a run goes on."""
    uri = str(tmp_path_factory.mktemp("run"))
    to = Tracking(uri, CONFIG)
    to.step(3, 64.0)
    begun = time.perf_counter()
    for step in range(1000):
        to.step(step, 1.0)
    each_us = (time.perf_counter() - begun) * 1000
    assert each_us < 50
    to.log(row(4))
    to.log(row(4, "val", 0.75))
    to.checkpoint(4)
    until, page = time.monotonic() + 60, ""
    while f'run="{uri}"' not in page and time.monotonic() < until:
        time.sleep(0.5)
        page = scraped()
    to.close()
    return page.replace(uri, "RUN")


@pytest.mark.slow
def test_prometheus_sees_the_run_through_ray(metrics_page: str) -> None:
    found = {
        (name, split): float(value)
        for name, labels, value in re.findall(r"^ray_(ddpm_train_\w+)\{(.*)\} (\S+)$", metrics_page, re.MULTILINE)
        if 'run="RUN"' in labels
        for split in re.findall(r'split="(\w+)"', labels) or [""]
    }
    age = time.time() - found.pop(("ddpm_train_checkpoint_timestamp_seconds", ""))
    assert 0 <= age < 120
    assert found == {
        ("ddpm_train_step", ""): 4,
        ("ddpm_train_epoch", ""): 2,
        ("ddpm_train_epochs", ""): 7,
        ("ddpm_train_images_seen", ""): 16,
        ("ddpm_train_images_per_second", ""): 64,
        ("ddpm_train_loss", "train"): 0.5,
        ("ddpm_train_loss", "val"): 0.75,
        ("ddpm_train_data_wait_ratio", ""): 0.125,
        ("ddpm_train_learning_rate", ""): 0.25,
        ("ddpm_train_checkpoint_step", ""): 4,
    }


@pytest.mark.slow
def test_the_dashboard_names_only_metrics_that_a_node_gives(metrics_page: str) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES  # those of GPUs are not given here

    dashboard = json.loads((ROOT / "cluster/monitoring/dashboard.json").read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", []))
    named = set(re.findall(r"\bray_\w+", asked))
    given = {*re.findall(r"^(ray_\w+)[{ ]", metrics_page, re.MULTILINE), *(f"ray_{name}" for name in METRICS_GAUGES)}
    assert named - given == set()
    assert {f"ray_{name}" for name in GAUGES} <= named  # and every figure has its panel
