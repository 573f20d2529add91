"""A run as the driver sees it: a bar on the terminal, and report.html kept current while the workers train.

The page is drawn by a thread of its own, one at a time, and takes at most a twentieth of this process' time.
"""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from ddpm_core import storage
from jobs.common.progress import Progress

LOOK_EVERY_S = 0.5
"""How often the board is looked at."""
REPORT_EVERY_S = 300.0
"""The report is written again at each validation, and so often where none comes."""
PATIENCE = 20
"""Time from one report to the next, in times of the CPU that the last one took."""
WINDOW_S = 60.0
"""The rate shown is that of so long."""


class StatusBoard:
    """Where rank 0 notes how far it is and the driver looks: an actor, or an object where all is one process."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.stopping = False

    def post(self, state: dict[str, Any]) -> bool:
        """Returns whether the run is to store a checkpoint and end.

        `state`: step, total, start (the step this attempt began at), and where known epoch, loss, validated and
        checkpoint (steps of the last one logged and stored), left_s (seconds), started (where the time until the first
        step went), warnings (a list of lines)."""
        self.state = state
        return self.stopping

    def stop(self) -> bool:
        """Let the run end at its next step, with a checkpoint; whether it has come to a step at all."""
        self.stopping = True
        return bool(self.state)

    def look(self) -> dict[str, Any]:
        return self.state


@contextlib.contextmanager
def monitored(board: Any, run_uri: str, begun: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While it lasts, show how far the run is; at its end, write the report once more and say how it ended. `begun` is
    called at the first step.

    An exception is told in the report as a failure, or as its `outcome` says if it has one.
    """
    watch = Monitor(board, run_uri)
    watch.begun = begun
    watch.thread.start()
    state, message = "finished", ""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        state = getattr(error, "outcome", "interrupted" if interrupted else "failed")
        message = "" if interrupted else _last_line(error)
        raise
    finally:
        watch.end(state, message)


class Monitor:
    """What looks at the board, and what it has seen."""

    def __init__(self, board: Any, run_uri: str, *, write: Callable[[dict[str, Any]], Any] | None = None) -> None:
        """`write`: draws the report of such a status; by default to the run's folder."""
        self.board, self.uri = board, run_uri
        self.write = self._write_report if write is None else write
        self.state: dict[str, Any] = {}
        self.begun: Callable[[], None] = lambda: None
        self.bar: Progress | None = None
        self.images_per_step = 0
        self.seen: collections.deque[tuple[float, int]] = collections.deque()
        self.told: set[str] = set()
        self.drawing: threading.Thread | None = None
        self.drawn: int | None = None
        """The validation that the last report shows."""
        self.drawn_s, self.not_before_s = -float("inf"), -float("inf")
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.stop.wait(LOOK_EVERY_S):
            with contextlib.suppress(Exception):  # the actor's node is gone, or Ray: training says so itself
                self._look()
        with contextlib.suppress(Exception):
            self._look()

    def _look(self) -> None:
        state = _state_of(self.board)
        if not state:
            return
        now = time.monotonic()
        if not self.state:
            self._begin(state)
        if state["step"] < self.state.get("step", 0) or state["start"] != self.state.get("start", state["start"]):
            self.seen.clear()  # workers were lost and began again
        self.state = state
        self.seen.append((now, state["step"]))
        while self.seen[0][0] < now - WINDOW_S and len(self.seen) > 2:
            self.seen.popleft()
        for warning in state.get("warnings", []):
            self._tell(warning)
        if (started := state.get("started", "")) and started not in self.told:
            self.told.add(started)
            print(f"train: {started}", file=sys.stderr, flush=True)
        if self.bar is not None:
            loss = state.get("loss")
            self.bar.at(state["step"], "" if loss is None else f"loss {loss:.3g}", left_s=state.get("left_s"))
        self._report_if_due(now)

    def _begin(self, state: dict[str, Any]) -> None:
        self.begun()
        with contextlib.suppress(FileNotFoundError):
            config = storage.read_json(storage.join(self.uri, "config.json"))
            self.images_per_step = config.get("training", {}).get("global_batch_size", 0)
        self.bar = Progress(
            total=state["total"],
            unit="step",
            description="train",
            initial=state["start"],
            rate_unit="image" if self.images_per_step else None,
            rate_scale=self.images_per_step or 1,
            warms_up=True,
        )

    def _report_if_due(self, now: float) -> None:
        due = self.state.get("validated") != self.drawn or now - self.drawn_s >= REPORT_EVERY_S
        if not due or now < self.not_before_s or (self.drawing is not None and self.drawing.is_alive()):
            return
        self.drawn, self.drawn_s = self.state.get("validated"), now
        self.drawing = threading.Thread(target=self._draw, args=(self.status("running"),), daemon=True)
        self.drawing.start()

    def _draw(self, status: dict[str, Any]) -> None:
        begun = time.thread_time()
        try:
            self.write(status)
        except Exception as error:
            self._tell(f"the report could not be written ({_last_line(error)}); training goes on")
        self.not_before_s = time.monotonic() + PATIENCE * (time.thread_time() - begun)

    def end(self, state: str, message: str) -> None:
        """Look a last time and write the last report."""
        self.stop.set()
        self.thread.join(timeout=10)
        if self.bar is not None:
            self.bar.close()
        if self.drawing is not None:
            self.drawing.join()
        if self.state:
            self._draw(self.status(state, message))

    def status(self, state: str, message: str = "") -> dict[str, Any]:
        """What the report says of how far the run is."""
        steps_per_s = self.steps_per_s()
        return {
            **self.state,
            "state": state,
            "message": message,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "images_per_s": steps_per_s * self.images_per_step,
            "left_s": self.state.get("left_s"),
        }

    def steps_per_s(self) -> float:
        """Of the last WINDOW_S; 0 where nothing is known."""
        if len(self.seen) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self.seen[0], self.seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def _tell(self, warning: str) -> None:
        if warning not in self.told:
            self.told.add(warning)
            print(f"warning: {warning}", file=sys.stderr, flush=True)

    def _write_report(self, status: dict[str, Any]) -> None:
        from jobs.reports import report  # seconds of matplotlib, which the first look need not wait for

        report.write_report(self.uri, run_uri=self.uri, status=status)


def _state_of(board: Any) -> dict[str, Any]:
    if isinstance(board, StatusBoard):
        return board.look()
    import ray

    return ray.get(board.look.remote(), timeout=5)


def _last_line(error: BaseException) -> str:
    from jobs.common import cli

    error = (isinstance(error, Exception) and cli.input_error(error)) or error
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
