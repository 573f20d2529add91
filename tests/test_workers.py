"""One function over many tasks: this process and Ray give the same, and Ray starts only where there is much to do."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_append import fill
from test_matching import write_encoder
from test_prepare import CelebA, made, refused, run
from test_translate import command, manifest, put

from ddpm_core.errors import InputError
from jobs import translate
from jobs.common import cli, cluster, workers
from jobs.datasets import decode, matching
from jobs.datasets.sources import rendered


@pytest.fixture
def on_ray(ray_cluster: None) -> Iterator[None]:
    """Ray's workers do not import tests: functions of this file travel to them whole."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def square(number: int) -> tuple[int, int, int]:
    """(number, its square, who computed it)"""
    if number < 0:
        raise InputError(f"{number} is negative; give another") if number == -1 else KeyError(number)
    return number, number**2, os.getpid()


class Adder:
    """A worker with a state: counts what it has seen."""

    def __init__(self, *, start: int, num_threads: int) -> None:
        self.seen = start

    def __call__(self, batch: np.ndarray) -> tuple[list[int], int]:
        self.seen += len(batch)
        return batch.tolist(), self.seen


def pairs(number: int) -> list[np.ndarray]:
    return [np.arange(2) + 10 * number, np.arange(2) + 10 * number + 2]


def test_this_process_keeps_the_order_and_works_side_by_side() -> None:
    def slow(number: int) -> int:
        time.sleep(0.2)
        return number

    begun = time.monotonic()
    assert list(workers.mapped(slow, range(20), 20, num_workers=0)) == list(range(20))
    assert time.monotonic() - begun < 20 * 0.2 or os.cpu_count() == 1


def test_ray_gives_the_same_in_any_order(on_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WINDOW_BYTES", 20)  # few tasks at a time
    found = sorted(workers.mapped(square, range(30), 30, num_workers=2))
    assert [each[:2] for each in found] == [(number, number**2) for number in range(30)]
    assert os.getpid() not in {pid for _, _, pid in found}


def test_ray_takes_over_what_would_take_long(on_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "RAY_PAYS_S", -1.0)
    found = list(workers.mapped(square, range(30), 30))
    assert sorted(number for number, _, _ in found) == list(range(30))
    here = {number for number, _, pid in found if pid == os.getpid()}
    assert here == set(range(len(here)))  # it began here
    assert 0 < len(here) < 10


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_come_out_as_they_were(on_ray: None, num_workers: int) -> None:
    with pytest.raises(InputError, match=r"^-1 is negative; give another$"):
        list(workers.mapped(square, [3, -1], 2, num_workers=num_workers))
    with pytest.raises(Exception, match="-2") as caught:
        list(workers.mapped(square, [3, -2], 2, num_workers=num_workers))
    assert cli.input_error(caught.value) is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_worker_is_made_once_a_place(on_ray: None, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    pool = workers.pool(6, num_workers)
    assert pool.size == max(num_workers, 1)
    found = list(workers.piped(pairs, range(3), Adder, {"start": 100}, pool))
    assert sorted(batch for batch, _ in found) == [[a, a + 1] for a in (0, 2, 10, 12, 20, 22)]
    counts = [seen - 100 for _, seen in found]
    assert counts == [2, 4, 6, 8, 10, 12] if num_workers == 0 else sum(count == 2 for count in counts) <= 2


@contextlib.contextmanager
def another(cpus: float) -> Iterator[None]:
    """Somebody else's actor, who holds so many CPUs."""
    import ray

    class Idle:
        def ready(self) -> None: ...

    actor = ray.remote(num_cpus=cpus)(Idle).remote()
    ray.get(actor.ready.remote())
    try:
        yield
    finally:
        ray.kill(actor)


def test_a_pool_takes_what_is_free(on_ray: None) -> None:
    with another(3):
        found = list(workers.piped(pairs, range(3), Adder, {"start": 0}, workers.pool(6, None)))
    assert len(found) == 6


def test_who_waits_says_for_what(on_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(cluster, "SLOW_S", 0.1)
    told = threading.Event()
    monkeypatch.setattr(cluster, "_say", lambda line: (print(line), told.set()))

    def tasks() -> Iterator[int]:
        yield 1

    with contextlib.ExitStack() as stack:
        stack.enter_context(another(4))
        threading.Thread(target=lambda: (told.wait(60), stack.close())).start()
        assert len(list(workers.piped(pairs, tasks(), Adder, {"start": 0}, workers.pool(1, 1)))) == 2
    assert "1 workers are waiting for a place" in (line := capsys.readouterr().out)
    assert "the cluster has 0 of 4 CPUs free" in line


class Mortal(Adder):
    """Dies of the number 12."""

    def __call__(self, batch: np.ndarray) -> tuple[list[int], int]:
        if 12 in batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


@pytest.mark.slow
def test_a_task_that_kills_its_workers_is_cut_and_given_up(on_ray: None) -> None:
    def read(numbers: list[int]) -> list[np.ndarray]:
        return [np.array(numbers)]

    def halves(numbers: list[int]) -> list[list[int]]:
        return [numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]] if len(numbers) > 1 else []

    rescue = workers.Rescue(halves, lambda numbers, reason: ([-number for number in numbers], reason))
    tasks = [[1, 2, 3, 4], [10, 11, 12, 13], *([number] for number in range(20, 40))]
    found = list(workers.piped(read, tasks, Mortal, {"start": 0}, workers.pool(3, 2), rescue))
    others = [1, 2, 3, 4, 10, 11, 13, *range(20, 40)]  # none of which dies with it three times
    assert sorted(number for numbers, _ in found for number in numbers) == [-12, *others]
    (reason,) = [what for numbers, what in found if numbers == [-12]]
    assert "3 workers died while they had it" in str(reason)
    with pytest.raises(Exception, match="died"):
        list(workers.piped(read, tasks, Mortal, {"start": 0}, workers.pool(3, 1)))


def test_tasks_are_taken_as_there_is_room(on_ray: None) -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = workers.piped(pairs, tasks(), Adder, {"start": 0}, workers.pool(9, 1))
    next(results)
    assert len(taken) < 200
    results.close()


@pytest.mark.parametrize(
    ("cores", "num_batches", "gpus", "size", "num_threads"),
    [(1, 9, 0, 1, 1), (2, 9, 0, 2, 1), (2, 1, 0, 1, 2), (2, 0, 0, 1, 2), (16, 9, 0, 4, 4), (16, 9, 1, 1, 16)],
)
def test_this_process_has_a_worker_for_each_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, num_batches: int, gpus: int, size: int, num_threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    pool = workers.pool(num_batches, 0)
    assert (pool.size, pool.num_threads, pool.on_ray) == (size, num_threads, False)


def test_workers_of_this_process_share_the_batches_and_keep_their_order() -> None:
    """Two workers that wait for each other: neither may do two batches before the other has begun one."""
    barrier = threading.Barrier(2, timeout=60)

    class Meeting(Adder):
        def __call__(self, batch: np.ndarray) -> tuple[list[int], int]:
            barrier.wait()
            return super().__call__(batch)

    pool = workers.Pool(2, 1, {}, on_ray=False)
    found = list(workers.piped(pairs, range(3), Meeting, {"start": 0}, pool))
    assert [batch for batch, _ in found] == [[a, a + 1] for a in (0, 2, 10, 12, 20, 22)]
    assert sorted(seen for _, seen in found) == [2, 2, 4, 4, 6, 6]


def test_fewer_workers_than_none_are_refused(tmp_path: Path) -> None:
    assert "--num-workers is -1" in refused("rendered", "--output", tmp_path / "out", "--num-workers", -1)


def test_a_small_folder_is_prepared_without_ray(tmp_path: Path) -> None:
    fill(tmp_path / "in", range(3))
    code = "import sys; from jobs import prepare; print(prepare.main(sys.argv[1:]), 'ray' in sys.modules)"
    argv = ["folders", "--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--image-size", "16"]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["0 False"], done.stderr


def test_prepare_gives_the_same_bytes_on_ray(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding, matching and embedding; drawing; and what an append reads."""
    for module in (decode, matching, rendered):
        monkeypatch.setattr(module, "IMAGES_PER_TASK", 16)
    source = CelebA(tmp_path / "in")
    source.text("list_eval_partition.txt", source.partition())
    (source.folder / "img_align_celeba/000007.jpg").write_text("text")
    encoder = write_encoder(tmp_path / "encoder", 32)
    for way in (0, 2):
        out, common = tmp_path / f"{way}", ("--image-size", 32, "--num-workers", way)
        flags = ("--source", source.folder, "--identity-encoder", encoder, *common)
        assert run("celeba", *flags, "--output", out / "celeba") == cli.SET_ASIDE
        assert run("rendered", "--count", 20, *common, "--output", out / "rendered") == cli.DONE
        assert run("rendered", "--first", 20, "--count", 3, *common, "--output", out / "rendered", "--append") == 0
    for name in ("celeba", "rendered"):
        assert made(tmp_path / "0" / name) == made(tmp_path / "2" / name)


def test_translate_gives_the_same_bytes_on_ray(ray_cluster: None, tmp_path: Path, checkpoint_folder: str) -> None:
    for number in range(10):
        put(tmp_path / "in" / f"{number % 2}" / f"{number}.png", number)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    outputs = {way: tmp_path / f"out{way}" for way in (0, 2)}
    for way, output in outputs.items():
        argv = command(checkpoint_folder, tmp_path / "in", output, "--num-workers", str(way))
        assert translate.main(argv) == cli.SET_ASIDE
    here, on_ray = ({path.name: path.read_bytes() for path in out.rglob("*.png")} for out in outputs.values())
    assert here == on_ray
    assert len(here) == 11  # with the preview
    of_time = [{**row, "seconds": 0} for out in outputs.values() for row in manifest(out).values()]
    assert of_time[: len(of_time) // 2] == of_time[len(of_time) // 2 :]
