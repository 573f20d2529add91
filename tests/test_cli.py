"""What the command lines share: a Ray that leaves the machine to its user."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from jobs.common import cli

NICENESS = """
import os
from jobs.common import cli
with cli.ray_session():
    import ray
    print("niceness", ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))
"""


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
