"""The runner of a suite's commands: real processes of this machine or of a real Ray, most of them `-m timeit`."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, S3Server

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs import experiments
from jobs.common import lock
from jobs.suite import driver, runner
from jobs.suite import plan as suite_plan
from jobs.suite.plan import Command, Figure, Measured, Plan, Section


def here(slots: int = 2) -> runner.LocalProcesses:
    return runner.LocalProcesses(slots)


def code(key: str, text: str, *, after: tuple[str, ...] = (), cost: float = 1.0) -> Command:
    """A command that runs `text` once."""
    words = ("-n", "1", "-r", "1", "import os, signal, time", text)
    return Command(key=key, module="timeit", argv=words, after=after, cost=cost)


def noting(file: Path, name: str, between: str = "pass") -> str:
    """Code that appends a line when it begins and when it ends."""
    line = f"open({str(file)!r}, 'a').write('WHAT {name}\\n')"
    return f"{line.replace('WHAT', 'begin')}; {between}; {line.replace('WHAT', 'end')}"


def waiting_for(file: Path, text: str) -> str:
    """Code that goes on when `file` holds `text`; where that never comes, the test ends with its time limit."""
    return f"[time.sleep(0.02) for _ in iter(lambda: {text!r} in open({str(file)!r}).read(), True)]"


def noted(file: Path) -> list[tuple[str, str]]:
    """Of the file that `noting` has written: (begin or end, name), as it came."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [(what, name) for what, name in map(str.split, lines)]


def begun(file: Path) -> list[str]:
    return [name for what, name in noted(file) if what == "begin"]


def plan_of(*commands: Command, name: str = "test", size: str = "smoke", sections: tuple[Section, ...] = ()) -> Plan:
    return Plan(name=name, size=size, commands=commands, sections=sections)


def section_of(key: str, *evaluations: str, figures: tuple[Figure, ...] = ()) -> Section:
    rows = (Measured(name=key, evaluations=evaluations, training=key),)
    return Section(key=key, title=key, question="?", rows=rows, metrics=(), figures=figures)


def states(records: dict[str, suite_plan.Record]) -> dict[str, str]:
    return {key: record["state"] for key, record in records.items()}


def on_disk(output: Path, key: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "commands" / (key.replace("/", "_") + ".json")).read_text())
    return found


# ---------------------------------------------------------------------------------------------------------------- plan


def test_arguments_name_their_own_folder_and_those_of_others() -> None:
    words = ("--data", "{data/earth}", "--output", "{out}", "--also={runs/a}/config.json", "--plain", "x")
    command = Command(key="evaluations/a", module="jobs.evaluate", argv=words, after=("first",), cost=1)
    assert suite_plan.needs(command) == {"data/earth", "runs/a", "first"}
    assert suite_plan.argv(command, "s3://bucket/suite") == [
        "--data",
        "s3://bucket/suite/data/earth",
        "--output",
        "s3://bucket/suite/evaluations/a",
        "--also=s3://bucket/suite/runs/a/config.json",
        "--plain",
        "x",
    ]


def test_a_plan_that_cannot_run_is_a_fault_of_ours() -> None:
    a, b = code("a", "pass", after=("b",)), code("b", "pass", after=("a",))
    with pytest.raises(ValueError, match="wait for each other: a, b"):
        suite_plan.ordered([a, b])
    with pytest.raises(ValueError, match="a needs b, which no command makes"):
        suite_plan.ordered([a])
    with pytest.raises(ValueError, match="two commands have the key c"):
        suite_plan.ordered([code("c", "pass"), code("c", "1")])
    with pytest.raises(ValueError, match="differ in / and _ only"):
        suite_plan.ordered([code("a/b", "pass"), code("a_b", "pass")])


def test_the_longest_way_to_the_end_counts_all_that_waits() -> None:
    commands = [
        code("data", "pass", cost=10),
        code("short", "pass", after=("data",), cost=100),
        code("long", "pass", after=("data",), cost=60),
        code("measured", "pass", after=("long",), cost=50),
    ]
    assert suite_plan.ways(commands) == {"data": 120, "short": 100, "long": 110, "measured": 50}
    assert [command.key for command in suite_plan.ordered(reversed(commands))] == ["data", "long", "short", "measured"]
    assert suite_plan.estimate_s(commands, 1) == 220
    assert suite_plan.estimate_s(commands, 100) == 120  # one after another, whatever the number of cores
    assert suite_plan.estimate_s(commands[2:], 100) == 110
    assert suite_plan.estimate_s([], 4) == 0


def test_what_the_first_sections_need_is_urgent() -> None:
    commands = [
        code("net", "pass"),
        code("data", "pass"),
        code("late", "pass", after=("data",), cost=1000),
        code("early", "pass", after=("data",)),
        code("nobody's", "pass"),
    ]
    stress = Figure(kind="stress", title="", classifier="{net}", data="{data}")
    plan = plan_of(*commands, sections=(section_of("1", "early"), section_of("2", "late", figures=(stress,))))
    assert suite_plan.urgency(plan) == {"data": 0, "early": 0, "late": 1, "net": 1, "nobody's": 2}


def test_a_second_driver_is_refused_while_the_first_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note, output = tmp_path / "driver.json", str(tmp_path)
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    with lock.exclusive(output):
        deadline = time.monotonic() + 400
        while not note.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with (
            pytest.raises(InputError, match=rf"another driver is at work there \(process {os.getpid()} on "),
            lock.exclusive(output),
        ):
            pass
        with pytest.raises(InputError, match="another driver is at work there"):
            experiments.main(["--output", output, "--size", "smoke"])
        assert not (tmp_path / "plan.json").exists()  # that of the first is not touched
        there = json.loads(note.read_text())
    assert not note.exists()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for left in (json.dumps({**there, "pid": gone.pid}), "", "[]", '{"host": 3}'):  # killed on this machine; damaged
        note.write_text(left)
        with lock.exclusive(output):
            pass


def test_a_driver_that_says_nothing_any_more_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    monkeypatch.setattr(lock, "SILENT_S", 0.5)
    (tmp_path / "driver.json").write_text(json.dumps({"host": "elsewhere", "pid": 7, "renewed": time.time()}))
    with lock.exclusive(str(tmp_path)):
        assert "process 7 on elsewhere was at work there; up to" in capsys.readouterr().err
    assert not (tmp_path / "driver.json").exists()


def test_a_command_is_another_when_what_it_is_given_is_another() -> None:
    def found(count: int, how: tuple[str, ...] = ()) -> dict[str, str]:
        data = Command(key="data", module="jobs.prepare", argv=("rendered", "--count", str(count)), how=how, cost=1)
        run = Command(key="run", module="jobs.train", argv=("--data", "{data}"), cost=1)
        return suite_plan.digests(plan_of(data, run, code("other", "pass")))

    few, many = found(10), found(20)
    assert [key for key in few if few[key] != many[key]] == ["data", "run"]
    assert found(10, ("--num-workers", "0")) == few


def test_another_suite_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    suite_plan.keep(plan_of(code("a", "pass")), str(tmp_path))
    suite_plan.keep(plan_of(code("a", "pass"), code("b", "pass")), str(tmp_path))
    there = json.loads((tmp_path / "plan.json").read_text())
    assert [command["key"] for command in there["plan"]["commands"]] == ["a", "b"]
    assert there["environment"]["packages"]["torch"]
    with pytest.raises(
        InputError, match=f"{tmp_path} holds --suite test --size smoke, this command says --suite test --size "
    ):
        suite_plan.keep(plan_of(code("a", "pass"), size="cpu"), str(tmp_path))
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(InputError, match=r"plan\.json is not a plan"):
        suite_plan.keep(plan_of(code("a", "pass")), str(tmp_path))


# ----------------------------------------------------------------------------------------------------------- progress


def test_progress_says_what_is_done_what_runs_and_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    commands = (
        Command(key="runs/a", module="jobs.train", argv=(), cost=100),
        Command(key="runs/b", module="jobs.train", argv=(), cost=100),
        Command(key="evaluations/a", module="jobs.evaluate", argv=(), after=("runs/a",), cost=50),
    )
    shown = io.StringIO()
    progress = runner._Progress(commands, {}, shown)
    progress.show({}, ["runs/a", "runs/b"], 2)
    clock[0] += 5
    progress.show({}, ["runs/a", "runs/b"], 2)  # nothing new
    clock[0] += 195
    records = {"runs/a": {"state": "done", "seconds": 200.0}}  # twice what was thought
    progress.show(records, ["runs/b", "evaluations/a"], 2)
    progress.say("failed: x")
    assert shown.getvalue().splitlines() == [
        "experiments: about 2 min 30 s left; 0 of 2 trainings, 0 of 1 measurements; now runs/a (0 s), runs/b (0 s)",
        "experiments: about 50 s left; 1 of 2 trainings, 0 of 1 measurements; "
        "now runs/b (3 min 20 s), evaluations/a (0 s)",
        "failed: x",
    ]
    assert progress.left_s(records, 1, clock[0]) == (50.0, pytest.approx(1 - 50 / 450))


# ------------------------------------------------------------------------------------------------------------ running


def test_commands_run_once_two_at_a_time_after_what_they_need(tmp_path: Path) -> None:
    notes, output = tmp_path / "notes", tmp_path / "suite"
    plan = plan_of(
        code("measured", noting(notes, "measured"), after=("run/1", "run/2")),
        code("run/1", noting(notes, "run/1", waiting_for(notes, "begin run/2")), after=("data",)),
        code("run/2", noting(notes, "run/2", waiting_for(notes, "begin run/1")), after=("data",)),
        code("data", noting(notes, "data")),
    )
    records = runner.run(plan, str(output), here())
    assert states(records) == dict.fromkeys(("data", "run/1", "run/2", "measured"), "done")
    found = noted(notes)
    assert found[:2] == [("begin", "data"), ("end", "data")]
    assert sorted(found[2:4]) == [("begin", "run/1"), ("begin", "run/2")]
    assert sorted(found[4:6]) == [("end", "run/1"), ("end", "run/2")]
    assert found[6:] == [("begin", "measured"), ("end", "measured")]

    record = on_disk(output, "run/1")
    assert record == records["run/1"]
    assert record["argv"] == list(plan.commands[1].argv)
    assert (record["exit_code"], record["attempts"], record["error"]) == (0, 1, None)
    assert record["seconds"] > 0
    assert "1 loop, best of 1" in record["tail"][-1]
    for key in records:
        log = (output / "logs" / f"{key}.log").read_text()
        assert log.splitlines()[0].startswith("$ python -m timeit -n 1 -r 1 ")
        assert "1 loop, best of 1" in log

    assert runner.run(plan, str(output), here()) == records
    assert noted(notes) == found


def test_sections_come_one_after_another_each_with_a_report(tmp_path: Path) -> None:
    notes, reports = tmp_path / "notes", []
    names = ("a", "b", "c")
    commands = [code(name, noting(notes, name), cost=cost) for cost, name in enumerate(names, start=1)]
    plan = plan_of(*commands, sections=tuple(section_of(name, name) for name in names))

    def report() -> None:
        reports.append([name for what, name in noted(notes) if what == "end"])
        raise InputError("the store is full")

    records = runner.run(plan, str(tmp_path / "suite"), here(1), report=report)
    assert states(records) == dict.fromkeys(names, "done")
    assert begun(notes) == ["a", "b", "c"]  # the longest is last: it is of the last section
    assert reports == [["a"], ["a", "b"]]


def test_what_changed_or_was_lost_runs_again_and_what_needs_it(tmp_path: Path) -> None:
    notes, output = tmp_path / "notes", tmp_path / "suite"

    def planned(text: str) -> Plan:
        made = f"os.makedirs('{{out}}', exist_ok=True); {noting(notes, 'data')}; {text}"
        return plan_of(
            code("data", made), code("run", noting(notes, "run"), after=("data",)), code("b", noting(notes, "b"))
        )

    def ran() -> list[str]:
        return sorted(begun(notes))

    runner.run(planned("pass"), str(output), here())
    assert ran() == ["b", "data", "run"]
    runner.run(planned("1 + 1"), str(output), here())
    assert ran() == ["b", "data", "data", "run", "run"]
    (output / "data").rmdir()
    assert set(suite_plan.done(planned("1 + 1"), str(output))) == {"run", "b"}
    runner.run(planned("1 + 1"), str(output), here())
    assert ran() == ["b", "data", "data", "data", "run", "run"]
    (output / "commands" / "b.json").write_text('{"state": "do')
    runner.run(planned("1 + 1"), str(output), here())
    assert ran() == ["b", "b", "data", "data", "data", "run", "run"]


def test_a_failure_costs_what_needs_it_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent"
    plan = plan_of(
        Command(key="runs/a", module="jobs.train", argv=("--data", str(absent), "--output", "{out}"), cost=1),
        code("evaluations/a", "pass", after=("runs/a",)),
        code("table", "pass", after=("evaluations/a",)),
        code("bad", "print('so far'); raise RuntimeError('no luck')"),
        code("worse", "os._exit(7)"),
        code("aside", "os._exit(3)"),
        code("good", "pass", after=("aside",)),
    )
    output = tmp_path / "suite"
    records = runner.run(plan, str(output), here())
    assert states(records) == {
        "aside": "done",
        "good": "done",
        "runs/a": "failed",
        "bad": "failed",
        "worse": "failed",
        "evaluations/a": "skipped",
        "table": "skipped",
    }
    wrong = on_disk(output, "runs/a")
    assert wrong["exit_code"] == 2
    assert wrong["error"].startswith(f"{absent}")
    assert wrong["tail"][-1] == f"error: {wrong['error']}"
    bad = on_disk(output, "bad")
    assert (bad["exit_code"], bad["error"]) == (1, "RuntimeError: no luck")
    assert bad["tail"][0] == "so far"
    assert (on_disk(output, "worse")["exit_code"], on_disk(output, "worse")["error"]) == (7, "exit code 7")
    assert on_disk(output, "evaluations/a")["error"] == "it needs runs/a"
    assert on_disk(output, "table")["error"] == "it needs evaluations/a"
    said = capsys.readouterr().err
    assert f"failed: runs/a: {wrong['error']}\n" in said
    assert "failed: bad: RuntimeError: no luck\n" in said
    assert "skipped: table: it needs evaluations/a\n" in said
    assert suite_plan.done(plan, str(output)).keys() == {"aside", "good"}  # the others are tried again


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def starter(request: pytest.FixtureRequest) -> runner.Starter:
    """Both ways of starting commands."""
    if request.param == "local":
        return here()
    request.getfixturevalue("ray_cluster")
    return runner.RayTasks(1, 0)


def test_a_command_that_was_killed_is_begun_once_more(
    starter: runner.Starter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process itself, as when memory runs out; on Ray the worker that waits for it, as when a node is lost."""
    notes, flag = tmp_path / "notes", tmp_path / "flag"
    local = isinstance(starter, runner.LocalProcesses)
    kill = f"os.kill({'os.getpid()' if local else 'os.getppid()'}, signal.SIGKILL)"
    once = f"os.path.exists({str(flag)!r}) or (open({str(flag)!r}, 'w'), {kill}, signal.pause())"
    always = f"{kill}; signal.pause()"
    plan = plan_of(code("once", noting(notes, "once", once)), code("always", noting(notes, "always", always)))
    records = runner.run(plan, str(tmp_path / "suite"), starter)
    assert (records["once"]["state"], records["once"]["attempts"]) == ("done", 2)
    assert (records["always"]["state"], records["always"]["attempts"]) == ("failed", 2)
    assert records["always"]["exit_code"] == -9
    why = "killed by signal 9" if local else "lost (WorkerCrashedError)"
    assert records["always"]["error"] == why
    assert f"always: {why}; once more\n" in capsys.readouterr().err
    assert sorted(begun(notes)) == ["always", "always", "once", "once"]


def test_commands_are_alone_with_one_thread_and_no_gpu(starter: runner.Starter, tmp_path: Path) -> None:
    written = tmp_path / "environment.json"
    text = f"import json; json.dump([os.getcwd(), dict(os.environ)], open({str(written)!r}, 'w'))"
    records = runner.run(plan_of(code("a", text)), str(tmp_path / "suite"), starter)
    assert states(records) == {"a": "done"}
    folder, environment = json.loads(written.read_text())
    assert folder == str(ROOT)  # where `-m jobs.train` is found
    assert [name for name in environment if name.startswith("RAY_")] == []
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("1", "")


def test_a_gpu_for_each_command_needs_a_gpu(ray_cluster: None) -> None:
    with pytest.raises(InputError, match="the cluster has no GPU; give --size cpu"):
        runner.RayTasks.of_cluster(1)
    assert runner.RayTasks.of_cluster(0) == runner.RayTasks(1, 0)


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """Short: Ray puts unix sockets below it."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
def test_commands_share_gpus_as_they_are_told(tmp_path: Path, ray_folder: str) -> None:
    """On GPUs that only Ray believes in."""
    commands = [
        code(f"{i}", f"import json; json.dump(dict(os.environ), open('{tmp_path}/{i}.json', 'w'))") for i in range(2)
    ]
    done = drive(
        tmp_path / "suite",
        commands,
        start=f"num_cpus=4, num_gpus=1, _temp_dir={ray_folder!r}",
        starter="runner.RayTasks.of_cluster(2)",
    )
    assert done.wait(timeout=400) == 0, done.communicate()[1]
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["0", "0"]
    assert [each["OMP_NUM_THREADS"] for each in found] == ["2", "2"]


def drive(
    output: Path, commands: list[Command], *, start: str = "", starter: str = "runner.LocalProcesses(2)"
) -> subprocess.Popen[str]:
    """A process of its own that runs a plan; `start`: on a Ray of its own, with these arguments of ray.init."""
    init = f"import ray; ray.init(address='local', log_to_driver=False, object_store_memory=100 * 2**20, {start})"
    text = (
        "import json, sys\n"
        "from jobs.common import cli; from jobs.suite import plan as plans, runner\n"
        "def main():\n"
        f"    {init if start else 'pass'}\n"
        "    commands = [plans.Command(**each) for each in json.loads(sys.argv[1])]\n"
        "    plan = plans.Plan(name='test', size='smoke', commands=commands, sections=())\n"
        f"    records = runner.run(plan, sys.argv[2], {starter})\n"
        "    return 0 if all(record['state'] == 'done' for record in records.values()) else 1\n"
        "cli.run(main)\n"
    )
    listed = [{**vars(command)} for command in commands]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", text, json.dumps(listed), str(output)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ""} | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(what: Any, seconds: float = 400.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.1)


@pytest.mark.parametrize("where", ["local", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.ray])])
@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT])
def test_a_driver_that_is_ended_takes_its_commands_with_it_and_goes_on(
    where: str, how: signal.Signals, tmp_path: Path, ray_folder: str
) -> None:
    notes, output, pid = tmp_path / "notes", tmp_path / "suite", tmp_path / "pid"
    flag = tmp_path / "go"
    mark = f"open({str(pid)!r}, 'w').write(str(os.getpid()))"
    long = f"{mark}; [time.sleep(0.1) for _ in iter(lambda: os.path.exists({str(flag)!r}), True)]"
    commands = [
        code("first", noting(notes, "first")),
        code("long", f"{long}; {noting(notes, 'long')}", after=("first",)),
        code("last", noting(notes, "last"), after=("long",)),
    ]
    on_ray = {"start": f"num_cpus=2, _temp_dir={ray_folder!r}", "starter": "runner.RayTasks(1, 0)"}
    driver = drive(output, commands, **(on_ray if where == "ray" else {}))
    try:
        wait_until(lambda: pid.exists() and pid.read_text())
        child = int(pid.read_text())
        if how == signal.SIGINT:  # as a terminal does it: to all that were started there
            os.killpg(driver.pid, how)
        else:
            driver.send_signal(how)
        _, said = driver.communicate(timeout=400)
    finally:
        driver.kill()
    assert driver.returncode == (130 if how == signal.SIGINT else -9), said
    if how == signal.SIGINT:
        assert "interrupted; the same command goes on from here" in said
        assert "Traceback" not in said
    wait_until(lambda: not Path(f"/proc/{child}").exists())
    assert {path.name for path in (output / "commands").iterdir()} == {"first.json"}
    flag.touch()
    records = runner.run(plan_of(*commands), str(output), here())
    assert states(records) == dict.fromkeys(("first", "long", "last"), "done")
    assert begun(notes) == ["first", "long", "last"]


@pytest.mark.slow
def test_real_commands_with_everything_on_s3(s3: S3Server) -> None:
    """Drawn, trained and translated; a second call does nothing."""
    output = f"{s3.uri}/{uuid.uuid4().hex}"
    small = "--count 24 --image-size 32 --output {out} --num-workers 0"
    train = "--data {data/portraits} --output {out} --preset smoke --num-workers 0"
    translate = (
        "--checkpoint {runs/a} --input {data/portraits} --split test --output {out} --domain female --num-steps 2 "
        "--num-workers 0"
    )
    plan = plan_of(
        Command(
            key="data/portraits",
            module="jobs.prepare",
            argv=("rendered", *shlex.split(small)),
            cost=5,
        ),
        Command(key="runs/a", module="jobs.train", argv=(*shlex.split(train),), cost=20),
        Command(key="translated", module="jobs.translate", argv=(*shlex.split(translate),), cost=10),
    )
    records = runner.run(plan, output, here())
    assert states(records) == dict.fromkeys(("data/portraits", "runs/a", "translated"), "done"), records
    best = storage.read_json(f"{output}/runs/a/best.json")
    assert storage.exists(f"{output}/runs/a/{best['checkpoint']}/model.safetensors")
    log = storage.read_bytes(f"{output}/logs/runs/a.log").decode()
    assert log.splitlines()[0] == f"$ python -m jobs.train {train}".replace("{out}", f"{output}/runs/a").replace(
        "{data/portraits}", f"{output}/data/portraits"
    )
    assert f"best checkpoint: {output}/runs/a/" in log
    assert "error" not in log
    before = storage.file_sizes(output)
    assert runner.run(plan, output, here()) == records
    assert storage.file_sizes(output) == before


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def small_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command's plan is of three lines; the second fails until the returned file is there."""
    flag = tmp_path / "mended"
    plan = plan_of(
        code("a", "pass", cost=60),
        code("b", f"open({str(flag)!r})", cost=60),
        code("c", "print('{b}')", cost=60),
        name="mission",
    )
    monkeypatch.setattr(driver, "planned", lambda _: plan)
    return flag


def test_a_dry_run_lists_what_is_missing_as_one_would_type_it(
    small_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    output = tmp_path / "suite"
    assert experiments.main(["--output", str(output), "--dry-run"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    words = [shlex.split(line) for line in lines]
    assert [each[:8] for each in words] == [["python", "-m", "timeit", *code("", "").argv[:5]]] * 3
    assert [each[8] for each in words] == ["pass", f"open({str(small_plan)!r})", f"print('{output}/b')"]
    assert last == "# mission, smoke: 0 of 3 others done; about 2 min 00 s to go, 2 at a time"
    assert not output.exists()


def test_the_command_reports_what_failed_and_goes_on_when_it_is_mended(
    ray_cluster: None, small_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "suite"
    assert experiments.main(["--output", str(output), "--local-processes", "3"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith("mission, smoke: 0 of 3 others done; about ")
    assert f"report: {output / 'report.html'}" in said.out
    failed = (
        f"failed: b, and 1 that need it did not run; the logs are in {output / 'logs'}, the same command tries again"
    )
    assert said.err.splitlines()[-1] == failed
    first = on_disk(output, "a")

    small_plan.touch()
    assert experiments.main(["--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("mission, smoke: 1 of 3 others done; about ")
    assert on_disk(output, "a") == first
    assert experiments.main(["--output", str(output)]) == 0
    assert capsys.readouterr().out == f"report: {output / 'report.html'}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--seeds 0", "--seeds is 0; it must lie between 1 and 1,000"),
        ("--size cpu --commands-per-gpu 2", "--commands-per-gpu has no effect with --size cpu; leave it out"),
        ("--local-processes -1", "--local-processes is -1; it must lie between 0 and 4,096"),
        ("--size gpu --local-processes 2", "--local-processes run without GPUs; leave it out with --size gpu"),
        ("--snapshots http://x/y", "--snapshots http://x/y: scheme http:// is not supported"),
    ],
)
def test_wrong_options_cost_one_line(tmp_path: Path, words: str, line: str) -> None:
    with pytest.raises(InputError) as wrong:
        experiments.main(["--output", str(tmp_path), *words.split()])
    assert str(wrong.value).startswith(line)
    assert list(tmp_path.iterdir()) == []
