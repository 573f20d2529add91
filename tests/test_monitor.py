"""Watching: what the terminal and the report say of a run, by two kinds of board, whatever happens."""

import dataclasses
import io
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_core.config import ModelConfig, SamplingConfig
from jobs.training import loop, monitor
from jobs.training.monitor import Monitor, StatusBoard
from jobs.training.presets import PRESETS
from jobs.training.worker_state import WorkerState


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(monitor, "PATIENCE", 0)


@pytest.fixture
def run(tmp_path: Path) -> str:
    config = {"domains": ["a", "b"], "data": {"name": "mine"}, "training": {"global_batch_size": 32, "epochs": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def state(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "total": 40, "start": 0, **more}


def page_of(run: str) -> str:
    path = Path(run, "report.html")
    return path.read_text() if path.exists() else ""


def test_a_run_in_this_process_is_told_as_running_then_finished(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    board = StatusBoard()
    with monitor.monitored(board, run):
        board.post(state(10, epoch=1, loss=0.5))
        until(lambda: "Running" in page_of(run))
        page = page_of(run)
        assert "10 of 40" in page
        assert '<meta http-equiv="refresh"' in page
        assert '<progress value="10" max="40"' in page
        board.post(state(40, epoch=4, loss=0.25, validated=40))
    page = page_of(run)
    assert "Finished" in page
    assert "http-equiv" not in page
    assert "<progress" not in page
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train: 40 of 40 steps, ")
    assert "took " in last


def test_a_board_that_is_an_actor_is_watched_too(run: str, ray_cluster: None) -> None:
    import ray

    board: Any = ray.remote(num_cpus=0)(StatusBoard).remote()
    with monitor.monitored(board, run):
        ray.get(board.post.remote(state(40)))
        until(lambda: "Running" in page_of(run))
        ray.kill(board)  # its node is gone: nobody minds
    assert "Finished" in page_of(run)


class Diverged(Exception):
    outcome = "diverged"


@pytest.mark.parametrize(
    ("error", "word", "text"),
    [
        (KeyboardInterrupt(), "Interrupted", "The same command goes on from the last checkpoint."),
        (Diverged("the last good one is step 7"), "Diverged", "the last good one is step 7"),
        (RuntimeError("first line\nno space left"), "Failed", "no space left"),
    ],
)
def test_the_report_says_how_a_run_ended(run: str, error: BaseException, word: str, text: str) -> None:
    board = StatusBoard()
    board.post(state(10))
    with pytest.raises(type(error)), monitor.monitored(board, run):
        raise error
    page = page_of(run)
    assert f">{word}</h2>" in page
    assert text in page
    assert "http-equiv" not in page


def test_a_run_that_never_began_has_no_report(run: str) -> None:
    with pytest.raises(ValueError, match="no"), monitor.monitored(StatusBoard(), run):
        raise ValueError("no")
    assert page_of(run) == ""


def test_each_validation_is_drawn_once_by_one_writer_that_holds_up_nothing(run: str) -> None:
    drawn: list[Any] = []
    writers, most, gate = 0, 0, threading.Event()

    def write(status: dict[str, Any]) -> None:
        nonlocal writers, most
        writers += 1
        most = max(most, writers)
        gate.wait(120)
        drawn.append((status["state"], status.get("validated")))
        writers -= 1

    board = StatusBoard()
    watch = Monitor(board, run, write=write)
    watch.thread.start()
    board.post(state(1))
    until(lambda: writers == 1)
    for step in (10, 20, 30):  # while the writer is busy
        board.post(state(step, validated=step))
        until(lambda: watch.state.get("step") == board.state["step"])
    gate.set()
    until(lambda: len(drawn) == 2)
    time.sleep(0.1)
    watch.end("finished", "")
    assert drawn == [("running", None), ("running", 30), ("finished", 30)]
    assert most == 1


def test_the_report_takes_a_small_part_of_the_time(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "PATIENCE", 20)
    drawn = []

    def write(status: dict[str, Any]) -> None:
        begun = time.thread_time()
        while time.thread_time() < begun + 0.02:
            pass
        drawn.append(time.monotonic())

    board = StatusBoard()
    watch = Monitor(board, run, write=write)
    watch.thread.start()
    step = 0
    while len(drawn) < 3:
        step += 1
        board.post(state(step, validated=step))
        time.sleep(0.005)
    assert min(later - sooner for sooner, later in itertools.pairwise(drawn)) >= 0.4
    watch.end("finished", "")


def test_a_report_that_cannot_be_written_is_told_once(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    tried = []

    def write(status: dict[str, Any]) -> None:
        tried.append(status)
        raise OSError("no space left")

    board = StatusBoard()
    watch = Monitor(board, run, write=write)
    watch.thread.start()
    for step in (1, 2, 3):
        board.post(state(step, validated=step, warnings=["MLflow: down"]))
        until(lambda: len(tried) >= board.state["step"])
    watch.end("finished", "")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert sorted(told) == [
        "warning: MLflow: down",
        "warning: the report could not be written (no space left); training goes on",
    ]


def test_the_rate_is_of_the_last_minute_and_forgets_lost_workers(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    board = StatusBoard()
    watch = Monitor(board, run, write=lambda status: None)
    for step in range(0, 200, 10):  # a step a second, then ten
        board.post(state(step))
        watch._look()
        now[0] += 10 if step < 100 else 1
    assert watch.steps_per_s() == pytest.approx(190 / 109, rel=0.6)
    for step in range(200, 1000, 10):
        board.post(state(step))
        watch._look()
        now[0] += 1
    status = watch.status("running")
    assert status["images_per_s"] == pytest.approx(10 * 32, rel=0.02)
    board.post(state(500, start=500, left_s=90.0))
    watch._look()
    assert watch.steps_per_s() == 0
    assert watch.status("running")["left_s"] == 90.0


def test_the_time_left_has_the_validations_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten epochs of 20 steps of 1 s, a validation of 30 s after every fourth epoch and the last."""
    options = dataclasses.replace(
        PRESETS["smoke"].options, epochs=10, validate_every_epochs=4, global_batch_size=16, sampling=SamplingConfig()
    )
    options = dataclasses.replace(options, optim=dataclasses.replace(options.optim, ema_sigma_rels=(0.05, 0.1)))
    fields = {**dict.fromkeys(field.name for field in dataclasses.fields(WorkerState)), "rows": np.arange(330)}
    worker = WorkerState(**{**fields, "options": options, "config": ModelConfig(sampling=options.sampling)})
    now = [50.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    pace = loop.Pace(worker, 120)
    assert pace.left_s(0) is None
    for done in range(1, 201):
        now[0] += 7.0 if done == 1 else 1.0  # the first warms up
        pace.step()
        if done == 79:  # 120 images by two lengths, and six drawn in 50 steps
            assert pace.left_s(done) == pytest.approx(121 + 3 * (240 + 300) / 16 / 3)
        if worker.validates(done):
            now[0] += 30.0
            pace.validated()
        if done == 80:
            assert pace.left_s(done) == pytest.approx(120 + 2 * 30)
        if done == 160:
            assert pace.left_s(done) == pytest.approx(40 + 30)
    assert pace.left_s(200) == 0
