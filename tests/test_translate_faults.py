"""jobs.translate on real parts that fail: a node of a cluster, the S3 server, credentials. Nothing is lost or half."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, S3Server
from test_s3_faults import png

from ddpm_core import storage
from jobs import translate

pytestmark = pytest.mark.slow
COUNT = 60
STEPS = ["--num-steps", "30", "--batch-size", "2"]


def fill(uri: str) -> str:
    for number in range(COUNT):
        storage.write_bytes(f"{uri}/{number % 3}/{number:03d}.png", png(number))
    return uri


def flags(checkpoint: str, source: str, output: str, *more: str) -> list[str]:
    where = ["--checkpoint", checkpoint, "--input", source, "--output", output]
    return [*where, "--domain", "night", *STEPS, *more]


@contextlib.contextmanager
def begun(argv: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.translate", *argv],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait(process: Any, done: Callable[[], bool]) -> None:
    until = time.monotonic() + 400
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


def results(uri: str) -> dict[str, bytes]:
    """The images below a folder of results, each whole."""
    names = [name for name in storage.list_files(uri) if name.endswith(".png") and name != "preview.png"]
    return {name: storage.read_bytes(f"{uri}/{name}") for name in names if not name.startswith(".")}


def some_are_done(output: str) -> bool:
    """And others are not."""
    return 0 < len(results(output)) < COUNT


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fill(str(tmp_path_factory.mktemp("photos")))


@pytest.fixture(scope="module")
def unbroken(source: str, checkpoint_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run gives to which nothing happens."""
    output = str(tmp_path_factory.mktemp("unbroken"))
    assert translate.main(flags(checkpoint_folder, source, output, "--num-workers", "0")) == 0
    return results(output)


def test_what_a_lost_node_had_is_done_by_others(
    nodes: Any, source: str, unbroken: dict[str, bytes], checkpoint_folder: str, tmp_path: Path
) -> None:
    output = str(tmp_path / "out")
    with begun(flags(checkpoint_folder, source, output), **nodes.env) as process:
        wait(process, lambda: some_are_done(output))
        nodes.kill(nodes.nodes[-1])
        said, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert f"{COUNT} images translated" in said
    assert results(output) == unbroken
    nodes.add()


def test_a_server_that_comes_back_is_waited_for(
    own_s3: S3Server, prefix: str, source: str, unbroken: dict[str, bytes], checkpoint_folder: str
) -> None:
    output = f"{prefix}/out"
    argv = flags(checkpoint_folder, fill(f"{prefix}/in"), output, "--num-workers", "2")
    with begun(argv, RAY_AUTH_MODE="disabled") as process:
        wait(process, lambda: some_are_done(output))
        own_s3.kill()
        threading.Timer(5, own_s3.start).start()
        said, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert f"{COUNT} images translated" in said
    assert results(output) == unbroken


def test_credentials_that_are_revoked_end_it_in_a_line_and_it_goes_on(
    own_s3: S3Server, prefix: str, source: str, unbroken: dict[str, bytes], checkpoint_folder: str
) -> None:
    output = f"{prefix}/out"
    argv = flags(checkpoint_folder, fill(f"{prefix}/in"), output)
    with begun([*argv, "--num-workers", "2"]) as process:
        wait(process, lambda: some_are_done(output))
        with own_s3.revoked():
            _, errors = process.communicate(timeout=400)
    assert process.returncode == 2
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert "access denied; check AWS_ACCESS_KEY_ID" in lines[0]
    assert results(output).items() <= unbroken.items()
    assert translate.main([*argv, "--num-workers", "0"]) == 0
    assert results(output) == unbroken
