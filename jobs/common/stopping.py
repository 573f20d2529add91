"""How a command ends that is told to: Ctrl-C, SIGTERM (`kill`, `ray job stop`, Kubernetes), its terminal closed.

Once `install` was called all of them raise KeyboardInterrupt in the main thread, so that there is one way out; within
`gently` the first one only asks, and what runs stores what it has before it ends.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GOES_ON = "the same command goes on from here"

_installed = False
_last = signal.SIGINT
"""The signal that came last."""
_asks: list[Callable[[], bool]] = []
"""What the next signal is to call instead of raising."""


def install() -> None:
    """Take the signals; those that whoever started us has told us to ignore (nohup) stay ignored."""
    global _installed
    _installed = True
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


def installed() -> bool:
    return _installed


def exit_code() -> int:
    """Of a command that a signal has ended: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + _last


def word() -> str:
    """What has happened to it."""
    return "interrupted" if _last == signal.SIGINT else f"stopped by {_last.name}"


def settle() -> None:
    """From now on a signal ends the process at once: all is said, and nothing is left to store."""
    for number in SIGNALS if _installed else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: os._exit(128 + number))


@contextlib.contextmanager
def gently(ask: Callable[[], bool]) -> Iterator[None]:
    """The first signal calls `ask`, in the main thread and in the midst of whatever that does: it lets what runs end by
    itself, or gives False where nothing runs yet. The next signal raises."""
    _asks.append(ask)
    try:
        yield
    finally:
        if ask in _asks:
            _asks.remove(ask)


def _receive(number: int, frame: FrameType | None) -> None:
    global _last
    _last = signal.Signals(number)
    if _asks and _asks.pop()():
        _say(f"\n{word()}: storing a checkpoint; once more, and it ends without\n")
        return
    if _importing(frame):
        _say(f"\n{word()}; {GOES_ON}\n")
        os._exit(exit_code())
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    """Whether an import was under way. Libraries do not expect an exception there: they pass it over, or turn it into
    others that say something else."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(2, text.encode())  # not by sys.stderr, which may be in the midst of writing
