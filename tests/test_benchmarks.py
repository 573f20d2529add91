"""The benchmarks' arithmetic, and that what they compare takes turns."""

import concurrent.futures
import threading
import time
from pathlib import Path

import pytest

from jobs.benchmarks import training, validation


def test_teams_take_turns_and_each_goes_first_every_second_time(tmp_path: Path) -> None:
    teams = {"job": ["job-0", "job-1"], "plain": ["plain-0", "plain-1"]}
    spans: dict[str, list[tuple[float, float]]] = {name: [] for names in teams.values() for name in names}

    def member(name: str, wait_s: float) -> None:
        gate = training.Gate(tmp_path, name)
        for _ in range(3):
            gate.begin()
            began = time.perf_counter()
            time.sleep(wait_s)
            spans[name].append((began, time.perf_counter()))
            gate.end()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(member, name, 0.02 * (1 + index)) for index, name in enumerate(spans)]
        seconds = training.conduct(tmp_path, teams, 3, threading.Event())
        for each in running:
            each.result()
    for who, names in teams.items():
        assert [len(turn) for turn in seconds[who]] == [2, 2, 2]
        for turn in range(3):
            for index, name in enumerate(names):
                began, ended = spans[name][turn]
                wall_s, cpu_s = seconds[who][turn][index]
                assert wall_s >= ended - began
                assert cpu_s >= 0
    order = [sorted(teams, key=lambda who: spans[teams[who][0]][turn][0]) for turn in range(3)]
    assert order == [["plain", "job"], ["job", "plain"], ["plain", "job"]]
    for turn, (first, second) in enumerate(order):
        assert max(spans[name][turn][1] for name in teams[first]) <= min(spans[name][turn][0] for name in teams[second])


def test_a_job_that_ends_too_early_is_told(tmp_path: Path) -> None:
    ended = threading.Event()
    ended.set()
    with pytest.raises(RuntimeError, match="training ended before its turn was over: job-0-0"):
        training.conduct(tmp_path, {"plain": [], "job": ["job-0"]}, 1, ended)


def test_the_first_and_last_turn_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    walls = {"job": [9.0, 2.0, 4.0, 2.5, 9.0], "plain": [9.0, 1.0, 4.0, 2.0, 9.0]}
    found = training.told(1, {who: [[[wall, 1.0]] for wall in each] for who, each in walls.items()}, pictures=8)
    assert found["wall"]["ratios"] == [0.5, 1.0, 0.8]
    assert found["wall"]["ratio"] == 0.8
    assert found["wall"]["images_per_s"] == {"job": 3.2, "plain": 4.0}
    assert found["cpu"]["ratios"] == [1.0, 1.0, 1.0]
    line = capsys.readouterr().out
    assert line.startswith(
        "one worker: 0.800 of a plain loop (0.560 to 0.960 in 80 % of 3 turns; by processor time 1.000)"
    )


def test_several_processes_add_up() -> None:
    warm = [[1.0, 1.0], [1.0, 1.0]]
    seconds = {"job": [warm, [[2.0, 1.0], [4.0, 2.0]], warm], "plain": [warm, [[1.0, 1.0], [2.0, 1.0]], warm]}
    found = training.told(2, seconds, pictures=4)
    assert found["wall"]["ratios"] == [0.5]  # (2 + 1) / (4 + 2) images a second
    assert found["cpu"]["ratios"] == [0.75]  # (4 + 2) / (4 + 4) images a processor second


def test_a_steady_slope_is_no_spread() -> None:
    assert validation.spread([100.0, 7.0, *(1.0 - 0.01 * epoch for epoch in range(11))]) == pytest.approx(0, abs=1e-12)
    bouncing = [(-1.0) ** epoch for epoch in range(11)]  # differences of 2 and -2 in turns: squares of 4, over 9
    assert validation.spread(bouncing) == pytest.approx((40 / 9) ** 0.5)


def test_more_images_lessen_what_fresh_draws_add_and_nothing_else() -> None:
    spreads = {"raw, fresh": 5.0, "raw, fixed": 3.0, "ema, fresh": 1.0, "ema, fixed": 2.0}
    found = validation.of_many(spreads, validation.MANY // 4)
    assert found == {"raw, fresh": (9 + 16 / 4) ** 0.5, "raw, fixed": 3.0, "ema, fresh": 2.0, "ema, fixed": 2.0}
