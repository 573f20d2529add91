"""The benchmarks' arithmetic, and that what they compare takes turns."""

import asyncio
import concurrent.futures
import importlib
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from ddpm_core import checkpoint
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator, check_sampling
from jobs import benchmark
from jobs.benchmarks import contenders, gpu, gpu_rows, marks, training, validation
from jobs.benchmarks import serve as benchmark_serve
from jobs.common import cli
from jobs.training.presets import PRESETS


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


NOT_THERE = (
    *("tyro", "ray", "pyarrow", "s3fs", "safetensors", "PIL", "rich", "jinja2", "matplotlib", "optuna", "scipy"),
    *contenders.PEERS,
)


@pytest.mark.slow
def test_the_gpu_benchmark_needs_little_but_pytorch(tmp_path: Path) -> None:
    """Every row, on a CPU and in small, on a machine that has only PyTorch, numpy and jaxtyping."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_THERE}))\n")
    command = [
        sys.executable,
        "-m",
        "jobs.benchmark",
        "gpu",
        "--device",
        "cpu",
        "--tiny",
        "--output",
        str(tmp_path / "new"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "new" / "gpu.json").read_text())["rows"]
    assert [row["outcome"] for row in rows] == [gpu.MEASURED] * len(gpu.plan())
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[: len(rows)]] == [row.name for row in gpu.plan()]
    wanted = {
        "device": {"peak_tflops", "bandwidth_tb_s", "environment"},
        "train": {"first_step_s", "images_per_s", "share_of_peak"},
        "forward": {"launched_ms", "evaluations_per_s"},
        "sample": {"launched_images_per_s"},
        "kinds": {"convolutions_ms", "norms_ms", "softmax_ms", "matrix_products_ms", "all_ms"},
        "peers": {"layouts", "speeds", "lucidrains", "diffusers"},
    }
    for row in rows:
        figures = row["figures"]
        assert figures.keys() >= wanted.get(row["row"]["kind"], set()), row
        assert all(value > 0 for name, value in figures.items() if name.endswith(("_per_s", "_first_step_s")))
    assert "| train celeba-64 x 256 |" in (tmp_path / "new" / "gpu.md").read_text()


def test_the_gpu_benchmark_knows_the_presets() -> None:
    of_gpus = {name: preset.options for name, preset in PRESETS.items() if "--use-gpu" in preset.command}
    assert {name: options.unet for name, options in of_gpus.items()} == {
        k: unet for k, (unet, _) in gpu.NETWORKS.items()
    }
    trained = {(row.network, row.batch_size) for row in gpu.plan() if row.kind == "train"}
    assert trained >= {(name, options.global_batch_size) for name, options in of_gpus.items()}


def test_a_batch_that_does_not_fit_is_halved_and_no_row_begins_too_late() -> None:
    def measured(row: gpu.Row, before: list[gpu.Result]) -> gpu.Result:
        return gpu.Result(row, gpu.NO_ROOM if row.batch_size > 30 else gpu.MEASURED)

    reports: list[int] = []
    rows = [gpu.Row("train", "a", 100), gpu.Row("train", "b", 8, bound_s=1e6), gpu.Row("forward", "a", 1)]
    deadline = time.monotonic() + 1000
    found = gpu.measure(rows, measured, deadline, lambda results: reports.append(len(results)))
    assert [(each.row.name, each.outcome) for each in found] == [
        ("train a x 100", gpu.NO_ROOM),
        ("train a x 50", gpu.NO_ROOM),
        ("train a x 25", gpu.MEASURED),
        ("train b x 8", gpu.NO_TIME),
        ("forward a x 1", gpu.MEASURED),
    ]
    assert reports == [1, 2, 3, 4, 5]


SCRIPTED = """
import os, time

def serve(pipe, options):
    pipe.send({"refusal": options.only})
    while True:
        row, known = pipe.recv()
        pipe.send({"figures": {"process": os.getpid()}})
        if row.network == "hangs":
            time.sleep(600)
        if row.network == "dies":
            os._exit(1)
        pipe.send({"figures": {"known": sorted(known)}})
        pipe.send({"outcome": "measured"})
"""


def test_a_row_that_hangs_or_dies_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scripted.py").write_text(SCRIPTED)
    monkeypatch.syspath_prepend(tmp_path)
    serve = importlib.import_module("scripted").serve
    worker = gpu.Worker(gpu.Options(), time.monotonic() + 500, serve)
    results: list[gpu.Result] = []
    try:
        for network, bound_s in {"good": 300, "hangs": 1, "dies": 300, "better": 300}.items():
            results.append(worker.measure(gpu.Row("train", network, bound_s=bound_s), results))
    finally:
        worker.stop()
    outcomes = [each.outcome for each in results]
    assert outcomes[0] == outcomes[3] == gpu.MEASURED
    assert outcomes[1].startswith("not done after")
    assert outcomes[2].startswith(gpu.FAILED)
    assert len({each.figures["process"] for each in results}) == 3  # a new one after each mishap; first figures kept
    assert [each.figures.get("known") for each in results] == [[], None, None, ["train"]]

    refused = gpu.Worker(gpu.Options(only="no GPU"), time.monotonic() + 500, serve)
    with pytest.raises(InputError, match="no GPU"):
        refused.measure(gpu.Row("device"), [])
    refused.stop()


def test_kernels_are_counted_by_kind() -> None:
    def event(key: str, ms: float, *, kernel: bool = False, annotation: bool = False) -> types.SimpleNamespace:
        where = torch.autograd.DeviceType.CUDA if kernel else torch.autograd.DeviceType.CPU
        spent = {"self_device_time_total": ms * 1e3, "self_cpu_time_total": 7.0, "count": 2}
        return types.SimpleNamespace(key=key, device_type=where, is_user_annotation=annotation, **spent)

    events = [
        event("aten::cudnn_convolution", 8),
        event("aten::native_group_norm_backward", 4),
        event("ScaledNormBackward", 2),
        event("aten::linalg_vector_norm", 1),
        event("aten::_softmax_backward_data", 0.5),
        event("aten::copy_", 16),
        event("aten::mul", 32),
        event("ddpm_core::add", 0.25),
        event("ddpm_core::norm_forward", 0),
        event("aten::addmm", 64),
        event("cudaLaunchKernel", 0),
        event("a kernel", 130, kernel=True),
        event("Optimizer.step", 1000, kernel=True, annotation=True),
    ]
    assert gpu_rows.by_kind(events, on_gpu=True) == {
        "optimiser_and_clipping_ms": 1,
        "convolutions_ms": 8,
        "norms_ms": 6,
        "softmax_ms": 0.5,
        "matrix_products_ms": 64,
        "copies_casts_layouts_ms": 16,
        "sums_ms": 0.25,
        "elementwise_ms": 32,
        "other_ms": 2.25,
        "all_ms": 130,
        "kernels": 2,
    }


def test_what_the_gpu_benchmarks_rows_come_to() -> None:
    def trained(size: int, gib: float, **other: Any) -> gpu.Result:
        return gpu.Result(gpu.Row("train", "a", size, **other), figures={"reserved_gib": gib})

    results = [trained(10, 6.0), trained(50, 26.0), trained(50, 99.0, launched=True)]
    assert gpu.fitting(results) == [
        "a: 1.0 GiB and 0.500 an image; 46 images in 24 GiB, 78 images in 40 GiB, 158 images in 80 GiB"
    ]
    speeds = ({"ddpm-translate": 1.0, "slow": 0.5}, {"ddpm-translate": 3.0}, {"slow": 1.5})
    rows = [gpu.Result(gpu.Row("peers"), figures={"speeds": each}) for each in speeds]
    assert gpu.against_peers(rows) == ["a training step of ours is 2.00 x slow's"]
    assert gpu.against_peers(rows[:0]) == []


def test_ways_to_translate_take_turns(tmp_path: Path, checkpoint_folder: str) -> None:
    words = "translate --num-images 8 --batch-size 2 --rounds 1 --keys 50 --images"
    assert benchmark.main([*words.split(), "--checkpoint", checkpoint_folder, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "translate.json").read_text())
    assert all(found["speed"][way] > 0 for way in ("raw", "job", "script", "start_s", "job / raw"))
    (listed,) = found["keys"]
    assert (listed["keys"], listed["first_todo"], listed["again_todo"]) == (50, 50, 0)


@pytest.mark.slow
def test_the_ways_to_serve_take_turns(
    tmp_path: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # In so short a time a busy machine may answer nobody, so what the numbers are is not looked at.
    words = "serve --seconds 0.5 --rounds 1 --clients 1 4 --loads 0.7 --short-steps 1 --long-steps 2 --num-threads 1"
    assert benchmark.main([*words.split(), "--checkpoint", checkpoint_folder, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "serve.json").read_text())
    assert [row["clients"] for row in found["closed"]] == [1, 4]
    assert all(row[way] >= 0 for row in found["closed"] for way in ("steps", "batches", "single"))
    assert found["open"][0]["steps images_per_s"] >= 0
    assert len(found["goals"]) == 4
    told = capsys.readouterr().out
    assert "p95 of short requests at load 0.7, steps / batches" in told
    assert told.count("reached") + told.count("MISSED") == 4


def test_the_ways_to_serve_have_a_network_of_their_own_that_takes_any_number_of_steps() -> None:
    config = benchmark_serve.network(None).config
    options = benchmark_serve.Options()
    for steps in (options.short_steps, options.long_steps):
        check_sampling(config, SamplingConfig(num_steps=steps, guidance_scale=options.guidance_scale), "night")


def test_requests_of_equal_options_are_batched_and_a_failing_batch_fails_its_own(checkpoint_folder: str) -> None:
    bench = benchmark_serve.Bench(
        Translator(checkpoint.load(checkpoint_folder), device="cpu"), benchmark_serve.Options()
    )
    jobs = [bench.job(0, 2), bench.job(1, 2), bench.job(0, 3), bench.job(0, 5000), bench.job(2, 2)]
    server = bench.server("batches")

    async def main() -> list[Any]:
        return await asyncio.gather(*map(server.translate, jobs), return_exceptions=True)

    first, second, other, wrong, third = asyncio.run(main())
    server.close()
    assert isinstance(wrong, InputError)
    assert other.batch_size == 1
    assert first.batch_size + second.batch_size + third.batch_size in (5, 9)  # 1, 2, 2 or 3, 3, 3


@pytest.mark.slow
def test_the_mark_is_measured_after_every_change(tmp_path: Path) -> None:
    options = marks.Options(output=str(tmp_path), num_images=1, num_unmarked=2)
    assert marks.run(options) == cli.DONE
    result = json.loads((tmp_path / "marks.json").read_text())
    assert {size: set(found) for size, found in result["found"].items()} == {
        str(size): set(marks.CHANGES) for size in marks.SIZES
    }
    assert all(each["JPEG 75"]["mean"] == 1 for each in result["found"].values())
    assert (result["false"]["images"], result["false"]["taken"]) == (2, 0)
    image = marks.drawn(1, 0, 64)
    draw = np.random.default_rng(0)
    shapes = {name: change(image, draw).shape for name, change in marks.CHANGES.items()}
    assert shapes["half the size"] == (32, 32, 3)
    assert shapes["crop 5 %"] == (61, 61, 3)
    assert shapes["mirrored"] == (64, 64, 3)


@pytest.mark.slow
def test_people_never_seen_are_looked_for_after_learning_from_few_and_from_more(tmp_path: Path) -> None:
    words = "people --people 16 40 --moments 2 --steps 4 --batch-size 8 --output"
    with pytest.raises(InputError, match="--others is 400; with --people 40 there are 5 to test"):
        benchmark.main([*words.split(), str(tmp_path)])
    assert benchmark.main([*words.split(), str(tmp_path), "--others", "5"]) == 0
    rows = json.loads((tmp_path / "people.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["pixels", "16", "40"]
    assert all(0 <= row["low"] <= row["rank_1"] <= row["high"] <= 1 for row in rows)
    assert [row["epochs"] for row in rows[1:]] == [1, 1]
