"""A trace holds the steps that it says and no others; the start adds up."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from ddpm_core.errors import InputError
from jobs import train as train_job
from jobs.training import profiling


def train(folder: str | None, num_steps: int) -> None:
    done = profiling.tracer(folder)
    for step in range(num_steps):
        with torch.profiler.record_function(f"step {step}"):
            torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        done()


def test_some_steps_after_the_first_are_traced(tmp_path: Path) -> None:
    train(str(tmp_path), 20)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    kept = range(profiling.SKIP + profiling.WARM_UP, profiling.NEEDED)
    assert [name for name in names if name.startswith("step ")] == [f"step {step}" for step in kept]
    operators = (tmp_path / "profile" / "operators.txt").read_text()
    assert operators.startswith("3 steps on cpu\n")
    (line,) = (line for line in operators.splitlines() if line.split()[:1] == ["aten::mm"])
    assert line.split()[-1] == "3"  # calls


def test_the_trace_is_there_while_training_goes_on_and_goes_to_s3(s3: object) -> None:
    from ddpm_core import storage

    uri = f"{s3.uri}/traced"
    train(uri, profiling.NEEDED - 1)
    assert not storage.exists(f"{uri}/profile/operators.txt")
    train(uri, profiling.NEEDED)
    assert storage.list_files(f"{uri}/profile") == ["operators.txt", "trace.json.gz"]


def test_nothing_is_traced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", None)
    train(None, 20)


def test_the_start_is_told_by_its_parts() -> None:
    times = {"command": 100.0, "imports": 101.1, "Ray": 105.0, "workers": 111.04}
    assert profiling.spans(times) == {"imports": 1.1, "Ray": 3.9, "workers": 6.04}
    assert profiling.summary(profiling.spans(times)) == "first step after 11.0 s: imports 1.1, Ray 3.9, workers 6.0"


def command(dataset: str, run: Path, *more: str) -> list[str]:
    return ["--data", dataset, "--output", str(run), "--preset", "smoke", "--num-workers", "0", "--profile", *more]


@pytest.mark.slow
def test_a_run_tells_where_its_time_went(dataset_folder: str, tmp_path: Path) -> None:
    assert train_job.main(command(dataset_folder, tmp_path, "--epochs", "5")) == 0
    (attempt,) = json.loads((tmp_path / "environment.json").read_text())["attempts"]
    assert [*attempt["start_s"]] == ["imports", "Ray", "data", "workers", "network", "first step"]
    assert all(seconds >= 0 for seconds in attempt["start_s"].values())
    assert attempt["start_s"]["network"] > 0.01
    assert {file.name for file in (tmp_path / "profile").iterdir()} == {"trace.json.gz", "operators.txt"}
    operators = (tmp_path / "profile" / "operators.txt").read_text()
    assert "aten::mkldnn_convolution" in operators or "aten::convolution" in operators
    (line,) = (line for line in operators.splitlines() if "Optimizer.step#AdamW.step" in line)
    assert line.split()[-1] == "3"


def test_a_run_too_short_to_be_traced_is_refused(dataset_folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--profile needs a run of 10 steps or more, this one has 8; leave it out"):
        train_job.main(command(dataset_folder, tmp_path, "--epochs", "4"))
    assert not list(tmp_path.iterdir())
