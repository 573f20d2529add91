"""Searches driven by hand: what is handed out, what is remembered, what is never done twice."""

import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import S3Server
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.tuning import search_space as spaces
from jobs.tuning import study
from jobs.tuning.runner import LocalRunner
from jobs.tuning.study import EPOCH, LOSS, Ending

SPACE, _ = spaces.parse(["optim.learning_rate=1e-5:1e-2:log", "unet.injection=concat,cross_attention"])


def ended(number: int, result: Mapping[str, Any] | None, lost: bool) -> Ending:
    outcome = "failed" if lost else (result or {}).get("outcome", "stopped")
    values = (result[LOSS],) if result and outcome == "complete" else None
    return Ending(outcome, values, {"error": None})


class Driver:
    """Ray Tune's part."""

    def __init__(self, memory: study.Memory, *, total: int, room: Callable[[], int] = lambda: 2, seed: int = 0) -> None:
        self.study = memory.open("training", ["minimize"], study.sampler("tpe", seed, total))
        self.told = 0
        self.search = study.Search(
            self.study,
            SPACE,
            total=total,
            config=lambda number, values: {"number": number, **values},
            ending=ended,
            room=room,
            told=self.count,
        )

    def count(self) -> None:
        self.told += 1

    def complete(self, name: str, loss: float, epoch: int = 1) -> None:
        self.search.on_trial_result(name, {LOSS: loss, EPOCH: epoch})
        self.search.on_trial_complete(trial_id=name, result={LOSS: loss, "outcome": "complete"})


@pytest.fixture
def memory(tmp_path: Path) -> study.Memory:
    return study.Memory(str(tmp_path), None)


def test_no_more_run_than_there_is_room_for_and_no_more_in_all_than_asked_for(memory: study.Memory) -> None:
    driver = Driver(memory, total=3)
    first, second = driver.search.suggest("a"), driver.search.suggest("b")
    assert first is not None
    assert second is not None
    assert driver.search.suggest("c") is None
    driver.complete("a", 1.0)
    third = driver.search.suggest("c")
    assert third is not None
    assert [each["number"] for each in (first, second, third)] == [0, 1, 2]
    driver.complete("b", 2.0)
    assert driver.search.suggest("d") == Searcher.FINISHED
    assert driver.told > 5


def test_a_killed_drivers_trials_are_taken_up_with_the_same_values(memory: study.Memory, tmp_path: Path) -> None:
    before = Driver(memory, total=4)
    handed = {name: before.search.suggest(name) for name in ("a", "b")}
    before.complete("a", 1.0)
    before.search.on_trial_result("b", {LOSS: 3.0, EPOCH: 1})
    del before  # killed

    after = Driver(study.Memory(str(tmp_path), None), total=4)
    assert study.num_left(after.study, 4) == 3
    again = after.search.suggest("x")
    assert again == handed["b"]
    after.search.on_trial_result("x", {LOSS: 3.0, EPOCH: 1})  # told once more
    after.complete("x", 2.0, epoch=2)
    others = []
    for name in ("y", "z"):
        others.append(after.search.suggest(name))
        after.complete(name, 5.0)
    assert after.search.suggest("w") == Searcher.FINISHED
    rates = [each["optim.learning_rate"] for each in (*handed.values(), *others) if each]
    assert len(set(rates)) == 4
    there = study.trials(after.study)
    assert [trial.number for trial in there] == [0, 1, 2, 3]
    assert all(trial.state == TrialState.COMPLETE for trial in there)
    assert there[1].intermediate_values == {1: 3.0, 2: 2.0}


def test_a_trial_cut_short_while_it_got_its_values_gets_the_rest(memory: study.Memory) -> None:
    driver = Driver(memory, total=2)
    half = driver.study.ask()
    rate = SPACE["optim.learning_rate"].suggest("optim.learning_rate", half)
    after = Driver(memory, total=2)
    found = after.search.suggest("x")
    assert found is not None
    assert found["optim.learning_rate"] == rate
    assert found["unet.injection"] in (["concat"], ["cross_attention"])


def test_the_hand_choice_comes_first_and_once(memory: study.Memory, tmp_path: Path) -> None:
    driver = Driver(memory, total=2)
    driver.study.enqueue_trial({"optim.learning_rate": 2e-4, "unet.injection": "concat"})
    first = driver.search.suggest("a")
    assert first == {"number": 0, "optim.learning_rate": 2e-4, "unet.injection": ["concat"]}
    second = driver.search.suggest("b")
    assert second is not None
    assert second["optim.learning_rate"] != 2e-4


def test_a_search_that_goes_on_does_not_repeat_itself(memory: study.Memory) -> None:
    one = Driver(memory, total=3)
    rates = []
    for name in "abc":
        rates.append((one.search.suggest(name) or {})["optim.learning_rate"])
        one.complete(name, 1.0)
    more = Driver(memory, total=6)
    for name in "def":
        rates.append((more.search.suggest(name) or {})["optim.learning_rate"])
        more.complete(name, 1.0)
    assert len(set(rates)) == 6


@pytest.mark.parametrize(
    ("result", "lost", "state", "word"),
    [
        ({"outcome": "complete", LOSS: 0.5}, False, TrialState.COMPLETE, "complete"),
        ({LOSS: 0.5, EPOCH: 1}, False, TrialState.PRUNED, "stopped"),
        ({"outcome": "diverged"}, False, TrialState.PRUNED, "diverged"),
        ({"outcome": "failed"}, False, TrialState.FAIL, "failed"),
        (None, True, TrialState.FAIL, "failed"),
    ],
)
def test_how_a_trial_ended_is_kept(
    memory: study.Memory, result: dict[str, Any] | None, lost: bool, state: TrialState, word: str
) -> None:
    driver = Driver(memory, total=1)
    driver.search.suggest("a")
    assert study.facts(study.trials(driver.study)[0])["state"] == "running"
    if result and EPOCH in result:
        driver.search.on_trial_result("a", result)
    driver.search.on_trial_complete(trial_id="a", result=result, error=lost)
    (trial,) = study.trials(driver.study)
    assert trial.state == state
    assert study.facts(trial)["state"] == word
    assert study.num_left(driver.study, 1) == 0  # a failure is a result: it is not run again


def test_the_sampler_keeps_away_from_where_losses_diverge(memory: study.Memory) -> None:
    driver = Driver(memory, total=60)
    rates = []
    for number in range(60):
        found = driver.search.suggest(str(number))
        assert found is not None
        rates.append(rate := found["optim.learning_rate"])
        if rate > 1e-3:
            driver.search.on_trial_complete(trial_id=str(number), result={"outcome": "diverged"})
        else:
            driver.complete(str(number), abs(math.log10(rate) + 4))
    assert sum(rate > 1e-3 for rate in rates[-20:]) <= 3  # at random a third


def test_a_half_written_line_is_dropped_and_the_rest_kept(memory: study.Memory, tmp_path: Path) -> None:
    driver = Driver(memory, total=2)
    driver.search.suggest("a")
    driver.complete("a", 1.0)
    file = tmp_path / "study.journal"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code": 4, "wor')
    after = Driver(study.Memory(str(tmp_path), None), total=2)
    assert study.num_left(after.study, 2) == 1
    assert file.read_bytes().startswith(whole)
    found = after.search.suggest("b")
    assert found is not None
    assert found["number"] == 1


def test_a_damaged_journal_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_text("not JSON\nat all\n")
    with pytest.raises(InputError, match=r"study\.journal is damaged"):
        study.Memory(str(tmp_path), None).open("training", ["minimize"], study.sampler("tpe", 0, 2))


def test_a_database_remembers_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sweep.db'}"
    driver = Driver(study.Memory(str(tmp_path), url), total=2)
    handed = driver.search.suggest("a")
    after = Driver(study.Memory(str(tmp_path), url), total=2)
    assert after.search.suggest("b") == handed
    assert not (tmp_path / "study.journal").exists()


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/x.db", "oracle9://here/db"])
def test_a_url_that_is_no_database_is_one_line(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match=f"--study {url}: no such database"):
        study.Memory(str(tmp_path), url)


def test_a_journal_in_a_bucket(s3: S3Server) -> None:
    output = f"{s3.uri}/study-test"
    memory = study.Memory(output, None)
    driver = Driver(memory, total=2)
    handed = driver.search.suggest("a")
    memory.sync()
    elsewhere = study.Memory(output, None)
    after = Driver(elsewhere, total=2)
    assert after.search.suggest("b") == handed
    assert storage.read_bytes(f"{output}/study.journal").count(b"\n") > 3


# -- ASHA -----------------------------------------------------------------------------------------------------------


def results(scheduler: study.ASHA, name: str, losses: list[float], first: int = 1) -> list[str]:
    trial = types.SimpleNamespace(trial_id=name)
    scheduler.on_trial_add(None, trial)
    found = []
    for epoch, loss in enumerate(losses, start=first):
        found.append(scheduler.on_trial_result(None, trial, {EPOCH: epoch, LOSS: loss}))
        if found[-1] == TrialScheduler.STOP:
            break
    return found


def asha() -> study.ASHA:
    return study.ASHA(epochs=9, grace_epochs=1, reduction_factor=3)


def test_who_lags_behind_is_stopped_and_nobody_at_the_last_epoch() -> None:
    scheduler = asha()
    assert results(scheduler, "a", [5, 4, 3, 2, 2, 2, 2, 2, 2]) == ["CONTINUE"] * 9
    assert results(scheduler, "b", [4, 3, 2, 1, 1, 1, 1, 1, 1]) == ["CONTINUE"] * 9
    assert results(scheduler, "c", [9]) == ["STOP"]
    assert results(scheduler, "d", [1, 1, 1, 1, 1, 1, 1, 1, 99]) == ["CONTINUE"] * 9  # it ends by itself


def test_the_baseline_goes_on_to_its_last_epoch_and_its_losses_count_for_the_others(memory: study.Memory) -> None:
    driver = Driver(memory, total=9)
    driver.study.enqueue_trial({"optim.learning_rate": 2e-4, "unet.injection": "concat"})
    for name in ("hand", "other", "third"):
        driver.search.suggest(name)
    assert [driver.search.is_baseline(name) for name in ("hand", "other", "unknown")] == [True, False, False]
    scheduler = study.ASHA(epochs=9, grace_epochs=1, reduction_factor=3, is_baseline=driver.search.is_baseline)
    assert results(scheduler, "other", [1.0]) == ["CONTINUE"]
    assert results(scheduler, "hand", [9.0] * 9) == ["CONTINUE"] * 9
    assert results(scheduler, "third", [8.0]) == ["STOP"]


def test_asha_remembers_what_a_killed_driver_saw(memory: study.Memory) -> None:
    driver = Driver(memory, total=9)
    for name, loss in {"a": 1.0, "b": 2.0, "c": 3.0}.items():
        driver.search.suggest(name)
        driver.complete(name, loss)
    assert results(asha(), "new", [4.0]) == ["CONTINUE"]  # of whom nobody came before
    remembering = asha()
    remembering.remember(driver.study)
    assert results(remembering, "new", [4.0]) == ["STOP"]
    assert results(remembering, "better", [0.5]) == ["CONTINUE"]


def test_random_search_is_random() -> None:
    make = study.sampler("random", 0, 10)
    assert isinstance(make(0), optuna.samplers.RandomSampler)


def quarter(rate: float) -> int:
    """Of the range of learning rates that `SPACE` has, in its logarithm."""
    return int((math.log10(rate) + 5) / 3 * 4)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_values_leave_no_part_of_the_range_out(memory: study.Memory, seed: int) -> None:
    driver = Driver(memory, total=16, seed=seed)
    driver.study.enqueue_trial({"optim.learning_rate": 2e-4, "unet.injection": "concat"})
    found = []
    for name in "abcde":  # two at a time
        found.append(driver.search.suggest(name) or {})
        if name > "a":
            driver.complete(chr(ord(name) - 1), 1.0)
    assert sorted(quarter(each["optim.learning_rate"]) for each in found[1:]) == [0, 1, 2, 3]
    assert sorted(len(each["unet.injection"]) for each in found[1:]) == [1, 1, 1, 1]
    assert len({each["unet.injection"][0] for each in found[1:]}) == 2


def test_a_search_that_goes_on_leaves_no_part_of_the_range_out_either(memory: study.Memory) -> None:
    rates = []
    for total, name in enumerate("abcde", 1):  # a driver that is killed after each trial
        driver = Driver(memory, total=total)
        if total == 1:
            driver.study.enqueue_trial({"optim.learning_rate": 2e-4, "unet.injection": "concat"})
        rates.append((driver.search.suggest(name) or {})["optim.learning_rate"])
        driver.complete(name, 1.0)
    assert sorted(map(quarter, rates[1:])) == [0, 1, 2, 3]


# -- in this process ------------------------------------------------------------------------------------------------


def test_trials_run_in_this_process_and_are_stopped_where_they_lag_behind(
    memory: study.Memory, capsys: pytest.CaptureFixture[str]
) -> None:
    """A made-up training whose loss halves with each epoch, from how far its learning rate is off 1e-3."""
    begun: list[int] = []

    def trial(config: Mapping[str, Any], report: Callable[[dict[str, Any]], Any]) -> None:
        print("what a training says of itself")
        begun.append(config["number"])
        off = abs(math.log10(config["optim.learning_rate"]) + 3)
        for epoch in (1, 2, 3):
            report({LOSS: off / 2**epoch, EPOCH: epoch})
        report({LOSS: off / 8, EPOCH: 3, "outcome": "complete"})

    driver = Driver(memory, total=12)
    scheduler = study.ASHA(epochs=3, grace_epochs=1, reduction_factor=2)
    LocalRunner().run(trial, driver.search, resources={}, scheduler=scheduler)
    assert begun == list(range(12))
    found = {trial.number: trial for trial in study.trials(driver.study)}
    best_so_far = math.inf
    for number in range(12):
        first = found[number].intermediate_values[1]
        state = study.facts(found[number])["state"]
        assert state == "complete" or (state == "stopped" and first > best_so_far)
        if first < best_so_far:  # nobody was ahead
            assert found[number].values == [first / 4]
        best_so_far = min(best_so_far, first)
    assert "stopped" in {study.facts(trial)["state"] for trial in found.values()}
    assert capsys.readouterr().out == ""
    LocalRunner().run(trial, Driver(memory, total=12).search, resources={}, scheduler=None)
    assert len(begun) == 12  # all have ended


def test_what_a_trial_cannot_answer_ends_the_sweep(memory: study.Memory) -> None:
    def trial(config: Mapping[str, Any], report: Callable[[dict[str, Any]], Any]) -> None:
        raise KeyboardInterrupt

    driver = Driver(memory, total=2)
    with pytest.raises(KeyboardInterrupt):
        LocalRunner().run(trial, driver.search, resources={}, scheduler=None)
    assert study.num_left(driver.study, 2) == 2  # it is taken up again
