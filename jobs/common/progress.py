"""How far a long step is: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from typing import Any, TextIO

import tqdm

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's, without the rate, where what is counted is not what the rate is of."""
LINES = 60
"""A log gets a line every `every_s` at first, later whenever one part in so many of the time so far has passed."""
LONGEST_S = 300.0
"""But a line at least so often."""


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
        stream: TextIO | None = None,
    ) -> None:
        """`total` None: not known. `initial`: what an earlier run did, not counted in the rate. `rate_unit`: what the
        rate is of, `rate_scale` of them to a unit; by default the unit."""
        self.stream = sys.stderr if stream is None else stream
        self.total, self.unit, self.description = total, unit, description
        self.rate_unit, self.rate_scale = rate_unit, rate_scale
        self.count = self.initial = initial
        self.every_s = every_s
        self.started = self.last_line = time.monotonic()
        self.bar: Any = None
        if self.stream.isatty():
            self.bar = tqdm.tqdm(
                total=total,
                initial=initial,
                unit=f" {unit}",
                desc=description,
                file=self.stream,
                dynamic_ncols=True,
                mininterval=0.2,
                smoothing=0.1,
                bar_format=BAR if rate_unit and total is not None else None,
            )

    def update(self, num: int = 1, note: str = "") -> None:
        """`num` more are done; `note` is shown behind the figures, such as the loss."""
        self.count += num
        if self.bar is not None:
            if self.rate_unit:  # tqdm's own is that of the last steps, once it knows it
                rate = self._rate(self.bar.format_dict["rate"] or self._mean_rate())
                note = f"{rate}, {note}" if note else rate
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(num)
        elif self._passed(self.last_line) >= min(max(self.every_s, self._passed(self.started) / LINES), LONGEST_S):
            self._line(note)

    def at(self, count: int, note: str = "") -> None:
        """So many are done in all; fewer than before where some were lost."""
        lost = max(self.count - count, 0)
        self.count -= lost
        self.initial -= lost  # they took their time: the rate stays
        if self.bar is not None and lost:
            self.bar.n -= lost
            self.bar.initial -= lost
        self.update(count - self.count, note)

    def close(self) -> None:
        """End the bar, or write the last line, which says how long it took."""
        if self.bar is not None:
            self.bar.close()
        elif self.count > self.initial:
            self._line(f"took {duration(self._passed(self.started))}", left=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _passed(self, since: float) -> float:
        return time.monotonic() - since

    def _mean_rate(self) -> float:
        return (self.count - self.initial) / max(self._passed(self.started), 1e-9)

    def _rate(self, rate: float) -> str:
        rate *= self.rate_scale
        number = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        return f"{number} {self.rate_unit}s a second" if self.rate_unit else f"{number} a second"

    def _line(self, note: str, *, left: bool = True) -> None:
        self.last_line = time.monotonic()
        rate = self._mean_rate()
        parts = [f"{self.count:,}" + (f" of {self.total:,}" if self.total is not None else "") + f" {self.unit}s"]
        if rate > 0:
            parts.append(self._rate(rate))
        if left and self.total is not None and rate > 0:
            parts.append(f"{duration((self.total - self.count) / rate)} left")
        if note:
            parts.append(note)
        print(f"{self.description}: {', '.join(parts)}", file=self.stream, flush=True)


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
