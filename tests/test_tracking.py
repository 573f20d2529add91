"""Tracking: each place is read back by its own means, and none of them can hold up or end a run."""

import dataclasses
import io
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from ddpm_core import images, storage
from ddpm_core.config import DataCard, ModelConfig
from jobs.training import tracking
from jobs.training.tracking import Events, Tracking, mlflow_uri

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
    to.image("samples", PNG, 2)
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
    assert time.perf_counter() - begun < 15  # 20 s, did each wait for what the end waits
    to.close()  # else it would wait for ever
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
    first.image("samples", PNG, 2)
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
