"""How far a long step is: a bar on a terminal, a plain line now and then in a log."""

import collections
import io
import os
import sys
import threading
import time
from typing import TextIO

LINES = 60
"""A log gets a line every `every_s` at first, later whenever one part in so many of the time so far has passed."""
RECENT_S, MARK_S = 30.0, 0.1
"""A bar tells the rate of so long, measured at points so far apart."""
LONGEST_S = 300.0
"""But a line at least so often."""
WARM_S = 2.0
"""After a start that takes its time the rate is told from so long a stretch on: results come in bursts."""


class Bar:
    """A bar with a text behind it; `total` None: not known."""

    def __init__(self, description: str, stream: TextIO, *, total: float | None, completed: float = 0) -> None:
        from rich import progress  # workers, who have no terminal, need none of it
        from rich.console import Console

        self.bars = progress.Progress(
            progress.TextColumn("{task.description}:", markup=False),
            progress.TaskProgressColumn(),
            progress.BarColumn(bar_width=20),
            progress.TextColumn("{task.fields[text]}", markup=False),
            console=Console(file=stream, highlight=False),
            refresh_per_second=5,
            redirect_stdout=sys.stdout.isatty(),  # to be shown above the bar; what goes to a file is left alone
            redirect_stderr=stream is sys.stderr,
        )
        self.bars.start()
        self.task = self.bars.add_task(description, total=total, completed=int(completed), text="")

    def show(self, completed: float, text: str) -> None:
        self.bars.update(self.task, completed=completed, text=text)

    def expect(self, total: float) -> None:
        self.bars.update(self.task, total=total)

    def write(self, line: str) -> None:
        """A line above the bar."""
        self.bars.console.print(line, markup=False)

    def close(self) -> None:
        self.bars.stop()


def has_bars(stream: TextIO) -> bool:
    """Whether it is a terminal that can draw a line anew."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class Progress:
    """Count, rate and time left of one step, on stderr.

    with Progress(total=345, unit="image", description="translate") as progress:
        progress.update(16)
    """

    def __init__(
        self,
        *,
        total: int | None = None,
        unit: str = "image",
        description: str = "",
        initial: int = 0,
        every_s: float = 10.0,
        rate_unit: str | None = None,
        rate_scale: float = 1.0,
        warms_up: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        """`total` None: not known. `initial`: what an earlier run did, not counted in the rate. `rate_unit`: what the
        rate is of, `rate_scale` of them to a unit; by default the unit. `warms_up`: what comes first tells how long the
        start took, such as loading nets, and not how fast the rest goes."""
        self.stream = sys.stderr if stream is None else stream
        self.total, self.more, self.unit, self.description = total, False, unit, description
        self.rate_unit, self.rate_scale = rate_unit, rate_scale
        self.count = self.initial = initial
        self.every_s = every_s
        self.started = self.last_line = time.monotonic()
        self.warms_up = warms_up
        self.marks: collections.deque[tuple[float, int]] = collections.deque()
        """Times and counts of the last half minute: a bar's rate is measured from the first on."""
        self.begun: tuple[float, int] | None = None
        """Time and count from which on a log's rate is measured, once it is."""
        if not warms_up:
            self._mark()
        self.left_s: float | None = None
        self.bar = Bar(description, self.stream, total=total, completed=initial) if has_bars(self.stream) else None

    def update(self, num: int = 1, note: str = "", *, left_s: float | None = None) -> None:
        """`num` more are done; `note` is shown behind the figures, such as the loss. `left_s`: the time left, where
        what is to come costs more or less than what is done."""
        self.count += num
        self.left_s = left_s
        self._mark()
        if self.bar is not None:
            self.bar.show(self.count, self._text(self._rate_since(self.marks[0]), note))
        elif self._passed(self.last_line) >= min(max(self.every_s, self._passed(self.started) / LINES), LONGEST_S):
            self._line(note)

    def expect(self, total: int, *, more: bool = False) -> None:
        """So many are to do in all, as far as is known; `more` may come."""
        self.total, self.more = total, more
        if self.bar is not None:
            self.bar.expect(total)

    def at(self, count: int, note: str = "", *, left_s: float | None = None) -> None:
        """So many are done in all; fewer than before where some were lost. `note`, `left_s`: as `update`'s."""
        lost = max(self.count - count, 0)
        self.count -= lost
        self.initial -= lost
        if self.begun is not None:  # they took their time: the rate stays
            self.begun = (self.begun[0], self.begun[1] - lost)
        self.marks = collections.deque((when, count - lost) for when, count in self.marks)
        self.update(count - self.count, note, left_s=left_s)

    def close(self) -> None:
        """End the bar, or write the last line; either says how long it took."""
        took = f"took {duration(self._passed(self.started))}"
        if self.bar is not None:
            self.bar.show(self.count, self._text(self._mean_rate(), took, left=False))
            self.bar.close()
        elif self.count > self.initial:
            self._line(took, left=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _passed(self, since: float) -> float:
        return time.monotonic() - since

    def _mark(self) -> None:
        now = time.monotonic()
        if not self.marks or now - self.marks[-1][0] >= MARK_S:
            self.marks.append((now, self.count))
        while len(self.marks) > 1 and self.marks[1][0] <= now - RECENT_S:
            self.marks.popleft()
        self.begun = self.begun or self.marks[0]

    def _mean_rate(self) -> float:
        return 0.0 if self.begun is None else self._rate_since(self.begun)

    def _rate_since(self, mark: tuple[float, int]) -> float:
        """0 while it is not known."""
        when, before = mark
        passed = self._passed(when)
        return 0.0 if self.warms_up and passed < WARM_S else (self.count - before) / max(passed, 1e-9)

    def _rate(self, rate: float) -> str:
        rate *= self.rate_scale
        number = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        return f"{number} {self.rate_unit}s a second" if self.rate_unit else f"{number} a second"

    def _text(self, rate: float, note: str, *, left: bool = True) -> str:
        of = "" if self.total is None else f" of {'at least ' if self.more else ''}{self.total:,}"
        parts = [f"{self.count:,}{of} {self.unit}s"]
        if rate > 0:
            parts.append(self._rate(rate))
        if left and self.total is not None and rate > 0:
            left_s = (self.total - self.count) / rate if self.left_s is None else self.left_s
            parts.append(f"{duration(left_s)} left")
        return ", ".join([*parts, note] if note else parts)

    def _line(self, note: str, *, left: bool = True) -> None:
        self.last_line = time.monotonic()
        print(f"{self.description}: {self._text(self._mean_rate(), note, left=left)}", file=self.stream, flush=True)


class Waiting:
    """Says on stderr what a command waits for, if it takes long: after `FIRST_S`, and again ever more rarely.

    with Waiting("train") as waiting:
        waiting.at("starting Ray")
    """

    FIRST_S = 1.0

    def __init__(self, description: str) -> None:
        self.description = description
        self.what, self.since, self.next_s = "", 0.0, 0.0
        self.over = threading.Event()
        try:  # of its own: Ray's start is muted
            self.stream: TextIO = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        except (OSError, io.UnsupportedOperation):
            self.stream = sys.stderr
        self.thread = threading.Thread(target=self._speak, daemon=True)
        self.thread.start()

    def at(self, what: str) -> None:
        """From here on it is this; nothing if empty."""
        self.what, self.since, self.next_s = what, time.monotonic(), self.FIRST_S

    def _speak(self) -> None:
        while not self.over.wait(self.FIRST_S / 4):
            what, passed = self.what, time.monotonic() - self.since
            if what and passed >= self.next_s:
                so_far = "" if self.next_s == self.FIRST_S else f" ({duration(passed)} so far)"
                print(f"{self.description}: {what}{so_far}", file=self.stream, flush=True)
                self.next_s = max(10.0, 2 * self.next_s)

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        if self.stream is not sys.stderr:
            self.stream.close()


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min, 3 d 04 h."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
