"""What the command lines share: help at once, a Ray that leaves the machine to its user."""

import concurrent.futures
import contextlib
import http.server
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMANDS, ROOT, environment, free_port

from ddpm_core.errors import InputError
from jobs.common import cli, cluster, stopping

HELP = """
import runpy, sys
name = sys.argv[1]
sys.argv = [name, "--help"]
try:
    runpy.run_module(f"jobs.{name}", run_name="__main__")
except SystemExit as stop:
    assert stop.code in (0, None), stop.code
print(*(each for each in sys.modules if each in {slow}), file=sys.stderr)
"""
SLOW = {"ray", "torch", "pyarrow", "pandas", "matplotlib", "scipy", "faiss", "torchmetrics", "optuna"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_nothing_that_takes_seconds(name: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", HELP.replace("{slow}", repr(SLOW)), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert f"usage: python -m jobs.{name}" in done.stdout


def test_a_benchmark_lists_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import benchmark

    with pytest.raises(SystemExit):
        benchmark.main(["size", "--help"])
    assert "--num-images" in capsys.readouterr().out


NICENESS = """
import os
from jobs.common import cli
with cli.ray_session():
    import ray
    print("niceness", ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_workers_of_a_ray_that_a_command_starts_are_not_niced() -> None:
    """Ray's default is 15: beside any other work they would get a twentieth of a core."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-W", "ignore", "-c", NICENESS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["niceness", "0"]


def test_on_a_cluster_the_cluster_decides(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere:10001")
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    with cli.ray_session():
        assert "RAY_worker_niceness" not in os.environ


# -- what was typed ------------------------------------------------------------------------------------------------

NAMES = "--data d --output o"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "prepare folder --source a --output b",
            "folder (did you mean 'folders'?); known are: earth, celeba, day2night, folders, rendered, pairs, inspect",
        ),
        (f"train {NAMES} --epochs", "--epochs lacks its value; give one"),
        ("prepare", "say first what to do: earth, celeba, day2night, folders, rendered, pairs, inspect"),
        ("prepare folders --sorce x --output y", "there is no option --sorce; did you mean --source?"),
        (f"train {NAMES} --presett demo", "there is no option --presett; did you mean --preset?"),
        (
            f"train {NAMES} --optim.learning_rat 1",
            "no option --optim.learning_rat; did you mean --optim.learning-rate?",
        ),
        (f"train {NAMES} --preset dmo", "--preset dmo (did you mean 'demo'?)"),
        (f"sweep {NAMES} --preset=dmo", "--preset dmo (did you mean 'demo'?)"),
        ("train", "missing: --data, --output; give them"),
        ("evaluate --data d --output o", "missing: --checkpoint; give it"),
        ("evaluate compare one", "missing: an argument (The one to compare it with); give it"),
        (f"train {NAMES} more", "more: no option takes this"),
        (
            "translate --checkpoint c --input i --output o --domain n --sampler dim",
            "--sampler dim (did you mean 'ddim'?)",
        ),
        ("translate --checkpoint c --input i --output o --domain n --seed few", "--seed few is not a whole number"),
        (f"train {NAMES} --optim.learning-rate quick", "--optim.learning-rate quick is not a number"),
        ("benchmark netwrk", "netwrk (did you mean 'network'?)"),
        ("runs lst", "lst (did you mean 'list'?); known are: list, compare, remove"),
    ],
)
def test_what_was_meant_is_told_in_one_line(line: str, message: str) -> None:
    name, *words = line.split()
    with pytest.raises(InputError) as raised:
        importlib.import_module(f"jobs.{name}").main(words)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        (f"train {NAMES} --seed 99999999999999999999", "--seed"),
        (f"train {NAMES} --num-epochs 1 --seed -1", "--seed"),
        (f"train {NAMES} --global-batch-size 1000000000000", "--global-batch-size"),
        (f"train {NAMES} --unet.model-channels 99999999999", "--unet.model-channels"),
        (f"train {NAMES} --sampling.num-steps 99999999999", "--sampling.num-steps"),
        (f"sweep {NAMES} --search-seed 99999999999999999999", "--search-seed"),
        (f"sweep {NAMES} --num-trials 99999999999999999999", "--num-trials"),
        (f"evaluate --checkpoint c {NAMES} --seed 99999999999999999999", "--seed"),
        (f"evaluate --checkpoint c {NAMES} --batch-size 1000000000000", "--batch-size"),
        ("translate --checkpoint c --input i --output o --domain n --seed 2147483648", "--seed"),
        ("translate --checkpoint c --input i --output o --domain n --num-steps 99999999999", "--num-steps"),
        ("experiments --output o --seeds 99999999999999999999", "--seeds"),
        ("prepare rendered --output o --seed 99999999999999999999", "--seed"),
        ("prepare rendered --output o --image-size 1000000000", "--image-size"),
        ("prepare celeba --output o --source s --limit 99999999999", "--limit"),
        ("benchmark size --num-images 99999999999999999999", "--num-images"),
    ],
)
def test_whole_numbers_that_nothing_takes_are_refused_by_their_flag(line: str, flag: str) -> None:
    name, *words = line.replace("--num-epochs", "--epochs").split()
    with pytest.raises(InputError, match=rf"^{flag} is -?\d+; it must (lie between|be at least) "):
        importlib.import_module(f"jobs.{name}").main(words)


# -- a signal while libraries are read -------------------------------------------------------------------------------

INTERRUPTED = """
import runpy, signal, sys
_, imported, number, module, *_ = sys.argv

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == imported:
            signal.raise_signal(getattr(signal, number))

signal.signal(getattr(signal, number), signal.SIG_DFL)  # whoever started the tests may have had it ignored (nohup)
sys.meta_path.insert(0, Hook())
sys.argv = sys.argv[3:]
runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("line", "imported", "number", "said"),
    [
        (f"train {NAMES}", "tyro", "SIGINT", "interrupted"),
        (f"train {NAMES}", "torch", "SIGINT", "interrupted"),
        (f"evaluate --checkpoint c {NAMES}", "numpy", "SIGTERM", "stopped by SIGTERM"),
        (
            "translate --checkpoint c --input i --output o --domain n",
            "jobs.translation.options",
            "SIGINT",
            "interrupted",
        ),
        ("prepare earth --output o", "PIL.Image", "SIGHUP", "stopped by SIGHUP"),
    ],
)
def test_a_signal_during_imports_costs_one_line(
    line: str, imported: str, number: str, said: str, tmp_path: Path
) -> None:
    name, *words = line.split()
    command = [sys.executable, "-W", "ignore", "-c", INTERRUPTED, imported, number, f"jobs.{name}", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stderr == f"\n{said}; the same command goes on from here\n"
    assert done.returncode == 128 + getattr(signal, number)
    assert done.stdout == ""


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_every_signal_ends_as_ctrl_c_does(number: signal.Signals, signals: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert stopping.exit_code() == 128 + number


def test_a_first_signal_asks_and_a_second_one_ends(signals: None, capfd: pytest.CaptureFixture[str]) -> None:
    asked = []
    with stopping.gently(lambda: asked.append(True) is None):
        signal.raise_signal(signal.SIGTERM)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert "stopped by SIGTERM: storing a checkpoint" in capfd.readouterr().err
    with stopping.gently(lambda: False), pytest.raises(KeyboardInterrupt):  # nothing runs yet
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_for_us_stays_ignored(signals: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    stopping.install()
    signal.raise_signal(signal.SIGHUP)


# -- a Ray that cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "the dashboard's address, which jobs are submitted to"),
        ("https://ray.example", "the dashboard's address"),
        ("redis://127.0.0.1:6379", "give HOST:PORT such as 10.0.0.1:6379"),
        ("garbage", "RAY_ADDRESS is garbage; give HOST:PORT"),
        ("two words:6379", "give HOST:PORT"),
        (":6379", "give HOST:PORT"),
        ("host:port", "give HOST:PORT"),
        ("ray://host", "give HOST:PORT"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=message):
        cluster.init()


def test_auto_with_no_ray_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with pytest.raises(InputError, match="RAY_ADDRESS is auto, and no Ray runs on this machine: start one"):
        cluster.init()


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener.getsockname()[1]


@contextlib.contextmanager
def web_server() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextlib.contextmanager
def head(*, version: str = "", refuses: bool = False) -> Iterator[int]:
    """What a Ray head answers, as another version or to one without the token."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def CheckAlive(self, request: Any, context: Any) -> Any:
            if refuses:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return gcs_service_pb2.CheckAliveReply(ray_version=version)

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


@contextlib.contextmanager
def nothing() -> Iterator[int]:
    yield free_port()


@pytest.mark.parametrize(
    ("there", "host", "message"),
    [
        (nothing(), "127.0.0.1", "nothing listens there; check host and port"),
        (silent(), "127.0.0.1", "no Ray answers there within 1 s"),
        (web_server(), "127.0.0.1", "what answers there is not Ray's head"),
        (head(version="2.9.3"), "127.0.0.1", "is Ray 2.9.3, this is Ray 2.60.0: both must be the same"),
        (
            head(refuses=True),
            "127.0.0.1",
            r"the cluster wants a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
        ),
        (nothing(), "no.such.host.invalid", "there is no such host; check its name"),
    ],
    ids=["nothing", "silent", "web server", "another version", "token", "no host"],
)
def test_an_address_without_our_ray_is_told_within_seconds(
    there: Any, host: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER_S", 1.0)
    with there as port:
        monkeypatch.setenv("RAY_ADDRESS", f"{host}:{port}")
        with pytest.raises(InputError, match=message) as raised:
            cluster.check_is_ray(f"{host}:{port}")
        assert str(raised.value).startswith(f"RAY_ADDRESS {host}:{port}")


def test_a_client_address_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_S", 0.2)
    monkeypatch.setenv("RAY_ADDRESS", address := f"ray://127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match=f"RAY_ADDRESS {address}: no Ray answers there"):
        cluster.init()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TMPDIR": "/tmp/" + "x" * 95}, "too long, Ray puts sockets below it: at most 3. bytes; give RAY_TMPDIR=/tmp"),
        ({"RAY_TMPDIR": "/tmp/" + "é" * 20}, "too long"),
        ({"TMPDIR": "/dev/null"}, r"TMPDIR=/dev/null: Ray cannot write there \(Not a directory\)"),
        ({"TMPDIR": "/proc/x"}, r"TMPDIR=/proc/x: Ray cannot write there"),
        (
            {"HOME": "/proc/nobody", "RAY_AUTH_MODE": None},
            r"/proc/nobody/.ray/auth_token: .* cannot be written .* HOME",
        ),
        ({"RAY_AUTH_TOKEN_PATH": "/proc/x/token", "RAY_AUTH_MODE": None}, "/proc/x/token: Ray keeps its token there"),
    ],
)
def test_a_machine_that_can_start_no_ray_is_told(variables: dict[str, str | None], message: str) -> None:
    usual = {"RAY_ADDRESS": None, "RAY_TMPDIR": None, "TMPDIR": "/tmp"}
    with environment(**{**usual, **variables}), pytest.raises(InputError, match=message) as raised:
        cluster.check_place()
    assert "--num-workers 0" in str(raised.value)


def test_a_full_temporary_folder_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(cluster, "ROOM_BYTES", 2**80)
    with pytest.raises(InputError, match=r"^RAY_TMPDIR=/tmp has [\d,]+ MB free, Ray needs "):
        cluster.check_place()


def test_who_waits_is_told_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SLOW_S", 0.0)
    said: list[str] = []
    told = threading.Event()
    with cluster.slow(lambda: "waiting for a node", say=lambda line: (said.append(line), told.set())):
        assert told.wait(60)
    monkeypatch.setattr(cluster, "SLOW_S", 60.0)
    with cluster.slow(lambda: "never", say=said.append):
        pass
    assert said == ["waiting for a node"]


# -- a process as machines start it ------------------------------------------------------------------------------------

RUNS = f"PYTHONPATH={ROOT} {sys.executable} -m jobs.runs"
PRINTS = f"PYTHONPATH={ROOT} {sys.executable} -c 'from jobs.common import cli; cli.run(lambda: print(1) or 0)'"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"{RUNS} --help >&-", 0, ""),
        (f"{RUNS} --help 2>&-", 0, "usage: python -m jobs.runs"),
        (f"{RUNS} --help <&- >&- 2>&-", 0, ""),
        (f"{RUNS} list none >&-", 2, "error: "),
        (f"PYTHONIOENCODING=ascii LC_ALL=C {RUNS} list --help", 0, "usage: python -m jobs.runs list"),
        (f"PYTHONIOENCODING=ascii LC_ALL=C {RUNS} list ä", 2, "error: "),
        (f"{RUNS} --help >/dev/full", 2, "error: standard output: no space left on the device; free some or write"),
        (
            f"{PRINTS} >/dev/full",
            2,
            "error: standard output: no space left on the device; free some or write elsewhere",
        ),
        (f"PYTHONUNBUFFERED=1 {PRINTS} >/dev/full", 2, "error: standard output: no space left on the device"),
        (f"{PRINTS} 2>/dev/full >&2", 2, ""),
        (f"ulimit -f 0; {PRINTS} >some", 2, "error: standard output: File too large; send it elsewhere"),
        (f"mkfifo p; exec 3<>p; exec 4>p; exec 3<&-; {PRINTS} >&4", 141, ""),
        (f"mkfifo p; exec 3<>p; exec 4>p; exec 3<&-; PYTHONUNBUFFERED=1 {PRINTS} >&4", 141, ""),
        (f"mkdir gone; cd gone; rmdir ../gone; {RUNS} --help", 2, "the working directory has been deleted"),
    ],
)
def test_streams_and_folders_that_are_closed_or_gone_end_in_no_traceback(
    line: str, code: int, said: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    told = done.stdout + done.stderr
    assert (done.returncode, "Traceback" in told) == (code, False), told
    assert said in told
