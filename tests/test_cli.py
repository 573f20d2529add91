"""What the command lines share: help at once, a Ray that leaves the machine to its user."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from jobs.common import cli

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
SLOW = {"ray", "pyarrow.dataset", "pandas", "matplotlib", "scipy", "faiss", "torchmetrics", "optuna"}
LIGHT = {"train", "sweep", "benchmark"}
"""Commands that need not even torch for it."""


@pytest.mark.parametrize("name", ["train", "sweep", "prepare", "evaluate", "translate", "experiments", "benchmark"])
def test_help_loads_nothing_that_takes_seconds(name: str) -> None:
    slow = SLOW | ({"torch", "pyarrow"} if name in LIGHT else set())
    command = [sys.executable, "-W", "ignore", "-c", HELP.replace("{slow}", repr(slow)), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert f"usage: python -m jobs.{name}" in done.stdout


def test_set_aside_ok_changes_the_exit_code_alone() -> None:
    codes = [cli.set_aside(num, ok=ok) for num in (0, 2) for ok in (False, True)]
    assert codes == [cli.DONE, cli.DONE, cli.SET_ASIDE, cli.DONE]


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
