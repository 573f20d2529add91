"""How far a long step is: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from typing import Any, TextIO

import tqdm


class Progress:
    """Count, rate and time left of one step, on stderr.

    with Progress(total=345, unit="picture", description="translate") as progress:
        progress.update(16)
    """

    def __init__(
        self,
        *,
        total: int | None = None,
        unit: str = "picture",
        description: str = "",
        initial: int = 0,
        every_s: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        """`total` None: not known. `initial`: what an earlier run did, not counted in the rate."""
        self.stream = sys.stderr if stream is None else stream
        self.total, self.unit, self.description = total, unit, description
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
            )

    def update(self, num: int = 1, note: str = "") -> None:
        """`num` more are done; `note` is shown behind the figures, such as the loss."""
        self.count += num
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(num)
        elif time.monotonic() - self.last_line >= self.every_s:
            self._line(note)

    def close(self) -> None:
        """End the bar, or write the last line, which says how long it took."""
        if self.bar is not None:
            self.bar.close()
        elif self.count > self.initial:
            self._line(f"took {duration(time.monotonic() - self.started)}", left=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, note: str, *, left: bool = True) -> None:
        self.last_line = now = time.monotonic()
        rate = (self.count - self.initial) / max(now - self.started, 1e-9)
        parts = [f"{self.count:,}" + (f" of {self.total:,}" if self.total is not None else "") + f" {self.unit}s"]
        if rate > 0:
            parts.append(f"{rate:.3g} a second")
        if left and self.total is not None and rate > 0:
            parts.append(f"{duration((self.total - self.count) / rate)} left")
        if note:
            parts.append(note)
        print(f"{self.description}: {', '.join(parts)}", file=self.stream, flush=True)


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
