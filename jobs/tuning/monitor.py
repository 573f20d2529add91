"""What the user sees of a sweep: the table on the terminal, results.json and report.html, kept current."""

import concurrent.futures
import contextlib
import json
import math
import time
from datetime import UTC, datetime
from typing import Any

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common.intervals import ENOUGH
from jobs.reports import sweep
from jobs.tuning import study
from jobs.tuning.sampling_stage import SamplingStage
from jobs.tuning.terminal import Table
from jobs.tuning.training_stage import TrainingStage

REPORT_EVERY_S, PATIENCE = 15.0, 20
"""Least time between two reports, also in times of what the last one took."""


class Monitor:
    """Shows both stages; reports are written by a thread."""

    def __init__(self, output: str, description: dict[str, Any], memory: study.Memory) -> None:
        """`description`: the content of sweep.json."""
        self.output, self.description, self.memory = output, description, memory
        self.training: TrainingStage | None = None
        self.sampling: SamplingStage | None = None
        self.state = "training"
        self.table = Table()
        self.written_s, self.cost_s = -math.inf, 0.0
        self.writing: concurrent.futures.Future[None] | None = None
        self.writer = concurrent.futures.ThreadPoolExecutor(1)

    def watch(self, training: TrainingStage, sampling: SamplingStage) -> None:
        self.training, self.sampling = training, sampling

    def show(self, *, news: bool = True) -> None:
        """Something has changed: the table now, what is stored when it is time."""
        self.memory.sync()
        now = time.monotonic()
        self.table.show(self.results(), news=news)
        due = now - self.written_s >= max(REPORT_EVERY_S, PATIENCE * self.cost_s)
        if due and (self.writing is None or self.writing.done()):
            self.written_s = now
            self.writing = self.writer.submit(self._write_timed)

    def end(self, state: str, message: str) -> None:
        """The last page, in order behind those under way."""
        self.state = state
        self.memory.sync()
        self.writer.submit(self._write, message).result()
        self.table.show({**self.results(), "message": message})

    def close(self) -> None:
        self.table.close()
        self.writer.shutdown()

    def _write_timed(self) -> None:
        began = time.thread_time()
        with contextlib.suppress(InputError):  # the store; what the sweep itself writes there says so
            self._write("")
        self.cost_s = time.thread_time() - began

    def _write(self, message: str) -> None:
        """results.json and report.html."""
        found = {**self.results(importance=True), "message": message}
        text = json.dumps(found, indent=1, allow_nan=False)
        storage.write_bytes(storage.join(self.output, "results.json"), text.encode())
        sweep.write(self.output, self.description, found, self.sampling.images if self.sampling else ())

    def results(self, *, importance: bool = False) -> dict[str, Any]:
        """The content of results.json."""
        training, sampling = self.training, self.sampling
        assert training is not None
        assert sampling is not None
        stage = {"training": training, "sampling": sampling}.get(self.state)
        again = {"training": training.again, "sampling": sampling.again}
        found: dict[str, Any] = {
            "state": self.state,
            "message": "",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "left_s": stage.left_s() if stage else None,
            "trials": training.rows(),
            "best_trial": training.best,
            "points": sampling.rows(),
            "again": {name: each for name, each in again.items() if each is not None},
        }
        if importance:
            by_stage: dict[str, Any] = {"training": training.study and study.importance(training.study, None)}
            if sampling.study is not None:
                shares = {name: study.importance(sampling.study, i) for i, name in enumerate(sampling.objectives())}
                by_stage["sampling"] = {name: each for name, each in shares.items() if each}
            told = {name: each for name, each in by_stage.items() if each}
            found["importance"] = {name: each for name, each in told.items() if sweep.num_told(name, found) >= ENOUGH}
        return found
