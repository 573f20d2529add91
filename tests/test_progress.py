"""Progress: figures that are right, a line now and then in a log, a bar on a terminal."""

import io
import itertools
import re
import time

import pytest

from jobs.common import cluster, progress
from jobs.common.progress import Progress, Waiting, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_every_ten_seconds_with_rate_and_time_left(clock: Clock) -> None:
    log = io.StringIO()
    with Progress(total=200, unit="image", description="translate", initial=100, stream=log) as bar:
        for _ in range(30):
            clock.now += 1
            bar.update(2, "3 set aside")
    lines = log.getvalue().splitlines()
    assert lines == [
        "translate: 120 of 200 images, 2 a second, 40 s left, 3 set aside",
        "translate: 140 of 200 images, 2 a second, 30 s left, 3 set aside",
        "translate: 160 of 200 images, 2 a second, 20 s left, 3 set aside",
        "translate: 160 of 200 images, 2 a second, took 30 s",
    ]


def test_the_lines_become_rarer_as_the_run_gets_long(clock: Clock) -> None:
    log = io.StringIO()
    bar = Progress(total=10**6, unit="step", description="train", stream=log)
    written = []
    for _ in range(12 * 3600):
        clock.now += 1
        before = log.tell()
        bar.update(1)
        if log.tell() > before:
            written.append(clock.now - 100)
    gaps = [later - sooner for sooner, later in itertools.pairwise(written)]
    assert written[:3] == [10, 20, 30]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 300
    assert len(written) < 400


def test_the_rate_may_be_of_something_else(clock: Clock) -> None:
    log = io.StringIO()
    bar = Progress(
        total=4000, unit="step", description="train", initial=200, rate_unit="image", rate_scale=32, stream=log
    )
    clock.now += 25
    bar.at(1200, "loss 0.031")
    assert log.getvalue() == "train: 1,200 of 4,000 steps, 1,280 images a second, 1 min 10 s left, loss 0.031\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_slow_start_is_not_taken_for_the_rate(clock: Clock, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nets are loaded for 20 s, then every 2 s two tasks of four images each are done at once."""
    told: list[str] = []
    log = Terminal() if terminal else io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "Bar", lambda *args, **options: ShownBar(told))
    bar = Progress(total=64, unit="image", description="decode", warms_up=True, every_s=0, stream=log)
    clock.now += 20
    for _ in range(8):
        for _ in range(2):
            bar.update(4)
        clock.now += 2
    lines = told or log.getvalue().splitlines()
    found = [re.search(r"(\d+) of 64 images(?:, [\d.]+ a second, (\d+) s left)?", line) for line in lines]
    counts = [(int(match[1]), match[2] and int(match[2])) for match in found if match]
    assert counts[0] == (4, None)
    assert len([left for _, left in counts if left is not None]) >= 7
    for count, left in counts:
        assert left is None or abs(left - (64 - count) / 4) <= 4, (count, left)


class ShownBar:
    """A bar that has no rate of its own yet."""

    rate = None

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def show(self, completed: float, text: str) -> None:
        self.told.append(text)


def test_what_was_lost_with_a_worker_is_counted_back(clock: Clock) -> None:
    log = io.StringIO()
    bar = Progress(total=100, unit="step", description="train", stream=log)
    clock.now += 20
    bar.at(40)
    clock.now += 20
    bar.at(30)
    assert log.getvalue().splitlines() == [
        "train: 40 of 100 steps, 2 a second, 30 s left",
        "train: 30 of 100 steps, 1 a second, 1 min 10 s left",
    ]


def test_without_a_total_there_is_no_estimate(clock: Clock) -> None:
    log = io.StringIO()
    bar = Progress(unit="row", description="read", stream=log)
    clock.now += 20
    bar.update(1000)
    assert log.getvalue() == "read: 1,000 rows, 50 a second\n"


def test_nothing_done_says_nothing(clock: Clock) -> None:
    log = io.StringIO()
    Progress(total=5, stream=log).close()
    assert log.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on(screen: Terminal) -> list[str]:
    """What was drawn, without the terminal's codes, one line after the other."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", screen.getvalue().replace("\r", "\n"))
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Terminal()
    with Progress(total=4, unit="step", description="train", rate_unit="image", rate_scale=8, stream=screen) as bar:
        for step in range(1, 5):
            bar.at(step, "loss 0.1")
            time.sleep(0.25)  # it is drawn five times a second
    drawn = " ".join(shown_on(screen))
    assert re.search(r"[1-4] of 4 steps, [\d,.]+ images a second, \d+ s left, loss 0\.1", drawn), drawn
    assert re.search(r"train: +100% .*4 of 4 steps, [\d,.]+ images a second, took \d+ s", drawn), drawn


def test_what_is_written_beside_a_bar_stays_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    bar = progress.Bar("experiments", screen, total=1.0)
    bar.show(0.25, "about 3 min left")
    bar.write("failed: train [a]: no space left")
    bar.close()
    assert "failed: train [a]: no space left" in shown_on(screen)
    assert "about 3 min left" in shown_on(screen)[-1]
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_terminal_that_cannot_draw_gets_lines(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Terminal()
    bar = Progress(total=4, unit="step", description="train", stream=screen)
    clock.now += 20
    bar.update(2)
    assert screen.getvalue() == "train: 2 of 4 steps, 0.1 a second, 20 s left\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (2.5 * 86400, "2 d 12 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_is_waited_for_is_said_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Waiting, "FIRST_S", 0.02)
    with Waiting("train") as waiting:
        waiting.at("")
        waiting.at("starting Ray")
        deadline = time.monotonic() + 60
        said = ""
        with cluster.muted_stderr():  # as Ray is started
            while "starting Ray" not in said and time.monotonic() < deadline:
                time.sleep(0.01)
                said += capfd.readouterr().err
    assert said == "train: starting Ray\n"
