"""Training that is killed, moved, told to leave, and left without storage; `tests/chaos.py` does more, and longer."""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import chaos
import pytest
import ray
from chaos import NEVER, OFTEN, SMOKE, Training, difference, struck
from conftest import S3Server

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs import train
from jobs.common import stopping
from jobs.training import loop, monitor, run_folder

WITHOUT_END = ["--epochs", "100000"]
HERE = ["--num-workers", "0"]


def run(data: str, output: str, *flags: str) -> int:
    return train.main([*SMOKE, "--data", data, "--output", output, *flags])


def losses(output: str) -> list[float]:
    lines = storage.read_bytes(storage.join(output, "metrics.jsonl")).decode().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["split"] == "train"]


@contextlib.contextmanager
def training(output: str, data: str, *flags: str, env: dict[str, str] | None = None) -> Iterator[Training]:
    """One that goes on until it is killed, if it does not end before."""
    begun = Training(output, data, *flags, env=env)
    try:
        yield begun
    finally:
        begun.kill()


@pytest.mark.slow
def test_a_process_killed_at_random_steps_ends_with_the_same_weights(dataset_folder, tmp_path):
    """kill -9 twice, four steps an epoch: bit for bit what an uninterrupted run gives, the losses too."""
    output, flags = str(tmp_path / "run"), ["--epochs", "8", "--global-batch-size", "8", *HERE]
    resumed = [0]
    for _ in range(2):
        with training(output, dataset_folder, *flags, *OFTEN) as begun:
            begun.wait_for(resumed[-1] + random.randint(1, 9))
        resumed.append(run_folder.latest_checkpoint(output)[0])
    assert run(dataset_folder, output, *flags) == 0
    assert [attempt["step"] for attempt in chaos.attempts_of(output)] == resumed
    assert run(dataset_folder, str(tmp_path / "whole"), *flags) == 0
    assert difference(output, str(tmp_path / "whole")) == 0, resumed
    assert losses(output) == losses(str(tmp_path / "whole"))


@pytest.mark.slow
def test_killed_at_random_steps_a_run_ends_with_the_same_weights(ray_cluster, dataset_folder, tmp_path):
    """kill -9 of the worker at three random steps, then of the driver. Bit for bit what an uninterrupted run gives; and
    three workers take the run over where one left it."""
    output, here = str(tmp_path / "run"), os.getpid()
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    resumed = []
    with training(output, dataset_folder, *WITHOUT_END, *OFTEN, env=address) as begun:
        for _ in range(3):
            begun.wait_for(begun.saved + random.randint(1, 20))
            resumed.append(struck(begun, lambda: chaos.workers(here)[0].kill())[0])
    while chaos.workers(here):  # what the dead driver has left
        time.sleep(0.05)
    assert resumed == sorted(set(resumed)), resumed
    assert [attempt["step"] for attempt in chaos.attempts_of(output)] == [0, *resumed]
    step, _ = run_folder.latest_checkpoint(output)
    shutil.copytree(output, tmp_path / "by-three")
    to = ["--epochs", str(step + 3)]
    assert run(dataset_folder, output, *to, *HERE) == 0
    assert run(dataset_folder, str(tmp_path / "whole"), *to, *HERE) == 0
    assert difference(output, str(tmp_path / "whole")) == 0, resumed
    assert losses(output) == losses(str(tmp_path / "whole"))
    assert run(dataset_folder, str(tmp_path / "by-three"), *to, "--num-workers", "3") == 0
    assert losses(str(tmp_path / "by-three")) == pytest.approx(losses(output), rel=1e-5)


def test_a_run_that_is_told_to_end_stores_its_step_first(signals, dataset_folder, tmp_path, monkeypatch, capfd):
    """SIGTERM in the midst of an epoch, checkpoints an hour apart: no step is lost, and nothing differs in the end."""
    output, flags = str(tmp_path / "run"), ["--epochs", "3", "--global-batch-size", "8", *HERE]
    post = monitor.StatusBoard.post

    def told(board: monitor.StatusBoard, state: dict[str, Any]) -> bool:
        if state["step"] == 6:
            signal.raise_signal(signal.SIGTERM)
        return post(board, state)

    with monkeypatch.context() as patch:
        patch.setattr(monitor.StatusBoard, "post", told)
        patch.setattr(loop, "POST_EVERY_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run(dataset_folder, output, *flags, *NEVER)
    assert stopping.exit_code() == 143
    assert run_folder.latest_checkpoint(output)[0] == 6
    assert "train: step 6 is stored" in capfd.readouterr().err
    assert run(dataset_folder, output, *flags) == 0
    assert [attempt["step"] for attempt in chaos.attempts_of(output)] == [0, 6]
    assert run(dataset_folder, str(tmp_path / "whole"), *flags) == 0
    assert difference(output, str(tmp_path / "whole")) == 0
    assert losses(output) == losses(str(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_on_ray_that_is_told_to_end_stores_a_checkpoint(number, ray_cluster, dataset_folder, tmp_path):
    output, address = str(tmp_path / "run"), {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with training(output, dataset_folder, *WITHOUT_END, *NEVER, env=address) as begun:
        begun.wait(lambda: begun.reached > 10, "trains")
        reached = begun.reached
        begun.process.send_signal(number)
        code, lines = begun.end()
    assert code == 128 + number, lines
    assert begun.saved >= reached
    assert lines[-1].endswith("; the same command goes on from here")
    assert not any("Traceback" in line or "***" in line for line in lines), lines


# ------------------------------------------------------------------------------------------------ several nodes


@pytest.fixture(scope="module")
def on_s3(s3: S3Server, dataset_folder: str) -> str:
    """The data set where all nodes find it."""
    for name in storage.list_files(dataset_folder):
        storage.write_bytes(f"{s3.uri}/nodes/data/{name}", storage.read_bytes(f"{dataset_folder}/{name}"))
    return f"{s3.uri}/nodes/data"


def test_a_node_is_lost_and_the_run_ends_with_the_same_weights(nodes, on_s3, ray_cluster, tmp_path):
    output, flags = on_s3.replace("data", "lost"), ["--epochs", "100", "--num-workers", "2"]
    with training(output, on_s3, *flags, *OFTEN, env=nodes.env) as begun:
        begun.wait_for(random.randint(1, 20))
        resumed, lost, _ = struck(begun, lambda: nodes.kill(nodes.with_worker()[0]))
        code, lines = begun.end()
    assert code == 0, lines
    assert resumed > 0
    assert lost >= 0
    assert chaos.attempts_of(output)[-1]["num_workers"] == 2
    assert run(on_s3, str(tmp_path / "whole"), *flags) == 0
    assert difference(output, str(tmp_path / "whole")) == 0
    nodes.add()


def test_a_spot_node_that_must_go_costs_no_step(nodes, on_s3):
    """Checkpoints are an hour apart: what training goes on from was written because of the notice."""
    output, flags = on_s3.replace("data", "notice"), [*WITHOUT_END, "--num-workers", "2"]
    with training(output, on_s3, *flags, *NEVER, env=nodes.env) as begun:
        begun.wait(lambda: begun.reached > 10, "trains")
        assert begun.saved == 0
        leaving = nodes.with_worker()[0]
        resumed, lost, _ = struck(begun, lambda: chaos.taken(nodes, leaving, notice_s=12))
    assert resumed > 10
    assert lost <= 1


# ------------------------------------------------------------------------------------------------------ storage


def once(output: str, step: int, deed: Callable[[], Any]) -> threading.Thread:
    """Do it as soon as there is a checkpoint of `step`."""

    def wait() -> None:
        while run_folder.latest_checkpoint(output)[0] < step:
            time.sleep(0.02)
        deed()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def whole(dataset_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of 60 steps that nothing befell."""
    output = str(tmp_path_factory.mktemp("whole") / "run")
    assert run(dataset_folder, output, "--epochs", "60", *HERE) == 0
    return output


SIXTY = ["--epochs", "60", *HERE, "--checkpoint-every-minutes", "0.0001"]


@pytest.mark.slow
def test_a_server_that_is_back_soon_is_waited_for(own_s3, prefix, dataset_folder, whole):
    def away() -> None:
        own_s3.kill()
        time.sleep(2)
        own_s3.start()

    back = once(prefix, 5, away)
    assert run(dataset_folder, prefix, *SIXTY) == 0
    back.join()
    assert difference(prefix, whole) == 0
    assert len(chaos.attempts_of(prefix)) == 1


@pytest.mark.slow
def test_a_server_gone_for_good_ends_the_run_in_one_line(own_s3, prefix, dataset_folder, whole, monkeypatch):
    monkeypatch.setattr(storage, "OUTAGE_S", 1.0)
    gone = once(prefix, 5, own_s3.kill)
    try:
        with pytest.raises(InputError, match=r"the S3 server cannot be reached; check AWS_ENDPOINT_URL"):
            run(dataset_folder, prefix, *SIXTY)
    finally:
        gone.join()
        own_s3.start()
    resumes(prefix, dataset_folder, whole)


@pytest.mark.slow
def test_credentials_revoked_end_the_run_in_one_line(own_s3, prefix, dataset_folder, whole):
    with contextlib.ExitStack() as stack:
        revoked = once(prefix, 5, lambda: stack.enter_context(own_s3.revoked()))
        with pytest.raises(InputError, match=r"access denied; check AWS_ACCESS_KEY_ID"):
            run(dataset_folder, prefix, *SIXTY)
        revoked.join()
    resumes(prefix, dataset_folder, whole)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_ends_the_run_in_one_line(dataset_folder, whole):
    with chaos.disk(40) as folder:
        output, others = f"{folder}/run", folder / "others"

        def fill() -> None:
            with others.open("wb", buffering=0) as file:
                while others.exists():
                    with contextlib.suppress(OSError):
                        file.write(bytes(4096))

        full = once(output, 5, fill)
        with pytest.raises(InputError, match=r"no space left on the device; free some or write elsewhere"):
            run(dataset_folder, output, *SIXTY)
        others.unlink()
        full.join()
        resumes(output, dataset_folder, whole)


def resumes(output: str, data: str, whole: str) -> None:
    """What was stored before is whole, and the same command goes on from there."""
    step, folder = run_folder.latest_checkpoint(output)
    assert 5 <= step < 60
    assert storage.file_sizes(folder)
    assert run(data, output, *SIXTY) == 0
    assert [attempt["step"] for attempt in chaos.attempts_of(output)] == [0, step]
    assert difference(output, whole) == 0
