"""Training: the run's layout, resuming, an order that restarts and workers cannot change, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from ddpm_core import checkpoint, precision, schedule
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from jobs import data, train, train_loop
from jobs.presets import PRESETS, TrainOptions

SMOKE = ["--preset", "smoke", "--precision", "fp32"]


def run(dataset: str, output: Path | str, *flags: str) -> int:
    return train.main([*SMOKE, "--data", dataset, "--output", str(output), *flags])


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(str(run_folder)).model.state_dict()


@pytest.fixture(scope="session")
def two_epochs(ray_cluster, dataset_folder, tmp_path_factory) -> Path:
    """A run of two epochs, four steps, by one worker."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert run(dataset_folder, output) == 0
    return output


@pytest.mark.slow
def test_a_run_leaves_what_the_design_promises(two_epochs):
    files = {str(path.relative_to(two_epochs)) for path in two_epochs.rglob("*") if path.is_file()}
    last = "checkpoints/step-00000004"
    for name in (
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "best.json",
        f"{last}/model.safetensors",
        f"{last}/config.json",
        f"{last}/card.md",
        f"{last}/train_state/state.pt",
    ):
        assert name in files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not [name for name in files if name.endswith(".tmp") or name.startswith(".")]
    rows = [json.loads(line) for line in (two_epochs / "metrics.jsonl").read_text().splitlines()]
    assert [(row["split"], row["step"], row["epoch"]) for row in rows] == [
        ("train", 2, 1),
        ("val", 2, 1),
        ("train", 4, 2),
        ("val", 4, 2),
    ]
    best = json.loads((two_epochs / "best.json").read_text())
    assert best["metric"]["loss"] == min(row["loss"] for row in rows if row["split"] == "val")
    assert "CC0" in (two_epochs / last / "card.md").read_text()


@pytest.mark.slow
def test_the_same_command_again_has_nothing_to_do(two_epochs, dataset_folder, capsys):
    before = (two_epochs / "metrics.jsonl").stat().st_mtime_ns
    assert run(dataset_folder, two_epochs) == 0
    assert "already trained" in capsys.readouterr().out
    assert (two_epochs / "metrics.jsonl").stat().st_mtime_ns == before


def test_other_options_are_refused_by_name(two_epochs, dataset_folder):
    with pytest.raises(InputError, match=r"training\.seed = 0, this command says 7"):
        run(dataset_folder, two_epochs, "--seed", "7")


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(two_epochs, dataset_folder, tmp_path):
    assert run(dataset_folder, tmp_path / "run", "--epochs", "1") == 0
    assert run(dataset_folder, tmp_path / "run") == 0
    whole = [json.loads(line) for line in (two_epochs / "metrics.jsonl").read_text().splitlines()]
    resumed = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for one, two in zip(whole, resumed, strict=True):
        assert {**one, "images_per_s": 0} == {**two, "images_per_s": 0}
    for name, tensor in weights(two_epochs).items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name]), name


@pytest.mark.slow
def test_two_workers_compute_what_one_does(two_epochs, dataset_folder, tmp_path):
    assert run(dataset_folder, tmp_path / "run", "--num-workers", "2") == 0
    one, two = weights(two_epochs), weights(tmp_path / "run")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def started_until(step: int, output: Path, flags: list[str]) -> subprocess.Popen[str]:
    """`jobs.train` in a process of its own, on the session's Ray, once it has a checkpoint of `step` or later."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *flags],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while train_loop.latest_checkpoint(str(output))[0] < step:
        if driver.poll() is not None or time.monotonic() > deadline:
            driver.kill()
            pytest.fail(f"no checkpoint of step {step}: {driver.communicate()[1]}")
        time.sleep(0.1)
    return driver


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(ray_cluster, two_epochs, dataset_folder, tmp_path):
    """kill -9 of the driver in the middle; the same command again ends where the uninterrupted run of its kind ends."""
    output = tmp_path / "run"
    flags = [*SMOKE, "--data", dataset_folder, "--output", str(output), "--epochs", "400"]
    driver = started_until(6, output, flags)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    time.sleep(1)
    step, folder = train_loop.latest_checkpoint(str(output))
    assert 6 <= step < 800
    half = Path(folder, "../step-99999999")  # a checkpoint cut off while it was written is not taken for one
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert train_loop.latest_checkpoint(str(output)) == (step, folder)
    epochs = step // 2 + 2
    assert train.main([*flags[:-1], str(epochs)]) == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "val"] == list(range(2, 2 * epochs + 1, 2))
    whole = [json.loads(line) for line in (two_epochs / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows[:4]] == [row["loss"] for row in whole]


@pytest.mark.slow
def test_ctrl_c_is_not_taken_for_success(ray_cluster, dataset_folder, tmp_path):
    flags = [*SMOKE, "--data", dataset_folder, "--output", str(tmp_path / "run"), "--epochs", "400"]
    driver = started_until(2, tmp_path / "run", flags)
    driver.send_signal(signal.SIGINT)
    told = driver.communicate(timeout=60)[1]
    assert driver.returncode == 130, told
    assert "interrupted; the same command goes on from here" in told
    assert not (tmp_path / "run/report.html").exists()


def loaded(dataset_folder: str, split: str = "train") -> data.SplitArrays:
    return data.load_split(data.read_split(dataset_folder, split))


def config_for(options: TrainOptions) -> ModelConfig:
    return ModelConfig(image_size=16, domains=("day", "night"), unet=options.unet, diffusion=options.diffusion)


def test_samples_are_functions_of_seed_epoch_and_id(ray_cluster, dataset_folder):
    options = PRESETS["smoke"].options
    sampler = train_loop.Sampler(loaded(dataset_folder), config_for(options), options)
    rows = np.arange(8)
    whole = sampler.train(rows, epoch=3)
    halves = [sampler.train(rows[:4], epoch=3), sampler.train(rows[4:], epoch=3)]
    for name in ("x_0", "condition", "domain", "t", "noise", "dropped"):
        together = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(getattr(whole, name), together), name
    other = sampler.train(rows, epoch=4)
    assert not torch.equal(whole.noise, other.noise)
    assert not torch.equal(whole.t, other.t)


def test_each_epoch_visits_every_row_once_in_its_own_order():
    first, second = (train_loop.epoch_order(0, epoch, 50) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second)
    assert list(train_loop.epoch_order(0, 1, 50)) == list(second)


def test_both_directions_and_one(ray_cluster, dataset_folder):
    arrays = loaded(dataset_folder)
    rows = np.arange(len(arrays))
    options = TrainOptions(flip=False)
    both = train_loop.Sampler(arrays, config_for(options), options).train(rows, 0)
    assert set(both.domain.tolist()) == {0, 1}
    for i, domain in enumerate(both.domain.tolist()):
        dimmer, brighter = both.x_0[i].mean(), both.condition[i].mean()
        assert (dimmer < brighter) == (domain == 1)  # night is darker: the picture fits its label
    one = TrainOptions(flip=False, target_domain="night")
    assert set(train_loop.Sampler(arrays, config_for(one), one).train(rows, 0).domain.tolist()) == {1}


def test_conditions_are_dropped_as_often_as_asked(ray_cluster, dataset_folder):
    arrays, options = loaded(dataset_folder), TrainOptions()
    sampler = train_loop.Sampler(arrays, config_for(options), options)
    dropped = torch.cat([sampler.train(np.arange(len(arrays)), epoch).dropped for epoch in range(40)])
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.04)
    assert not sampler.validation(np.arange(4), np.arange(4)).dropped.any()


def test_validation_gives_the_same_number_every_time(ray_cluster, dataset_folder):
    options = PRESETS["smoke"].options
    config = config_for(options)
    from ddpm_core.unet import UNet

    model = UNet(config).eval()
    validate = train_loop.Validation(loaded(dataset_folder, "val"), config, options, torch.device("cpu"), 0, 1)
    first = validate(model)
    torch.rand(7)
    assert validate(model) == first
    assert {f"loss_band_{band}" for band in range(4)} <= set(first)
    assert np.mean([first[f"loss_band_{band}"] for band in range(4)]) == pytest.approx(first["loss"], rel=0.05)


def test_timesteps_of_validation_are_stratified():
    ts = train_loop.stratified_timesteps(200, 1000)
    assert np.histogram(ts, bins=10, range=(0, 1000))[0].tolist() == pytest.approx([20] * 10, abs=1)


def test_a_perfect_network_has_no_loss():
    config = ModelConfig()
    abar = schedule.alphas_cumprod(config.diffusion)
    x_0, condition, noise = torch.randn(3, 4, 3, 8, 8)
    batch = train_loop.Batch(
        x_0=x_0,
        condition=condition,
        domain=torch.tensor([0, 1, 0, 1]),
        t=torch.tensor([0, 10, 500, 999]),
        noise=noise,
        dropped=torch.tensor([True, False, True, False]),
    )
    seen = {}

    class Oracle(torch.nn.Module):
        def forward(self, x_t, t, condition, domain):
            seen.update(condition=condition, domain=domain)
            return noise

    loss = train_loop.batch_loss(Oracle(), batch, config, abar, precision.resolve("fp32", torch.device("cpu")))
    assert loss.tolist() == [0, 0, 0, 0]
    assert seen["domain"].tolist() == [2, 1, 2, 1]  # dropped: the null label
    assert not seen["condition"][[0, 2]].any()
    assert torch.equal(seen["condition"][1], condition[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--preset", "dmo"], "did you mean 'demo'"),
        (["--epohcs", "3"], "Unrecognized options: --epohcs"),
        (["--epochs", "0"], "--epochs is 0; it must be positive"),
        (["--global-batch-size", "64"], "more than the 32 training rows; give at most 32"),
        (["--global-batch-size", "15", "--num-workers", "2"], "cannot be shared by 2 workers; 14 can"),
        (["--target-domain", "nite"], "unknown domain 'nite' (did you mean 'night'?)"),
        (["--unet.channel-mult", "1", "2", "2", "2", "2"], "must be a multiple of 32"),
        (["--output", "/proc/run"], "--output /proc/run"),
        (["--output", "gs://bucket/run"], "scheme gs:// is not supported"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(dataset_folder, tmp_path, flags, message):
    given = {"--data": dataset_folder, "--output": str(tmp_path / "run"), "--preset": "smoke"}
    given.update(dict([flags[:2]]))
    with pytest.raises(InputError) as error:
        train.main([part for pair in given.items() for part in pair] + flags[2:])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_more_workers_than_the_cluster_has_are_refused_with_the_arithmetic(ray_cluster, dataset_folder, tmp_path):
    with pytest.raises(InputError, match="needs 16 CPUs, the cluster has 4: give fewer"):
        run(dataset_folder, tmp_path / "run", "--num-workers", "16")
    with pytest.raises(InputError, match="needs 1 GPUs, the cluster has 0"):
        run(dataset_folder, tmp_path / "run", "--use-gpu")


def test_a_folder_with_something_else_is_not_overwritten(dataset_folder, tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="not a ddpm-translate checkpoint's"):
        run(dataset_folder, tmp_path)


def test_learning_rate():
    options = PRESETS["demo"].options
    peak, warmup = options.optim.learning_rate, options.optim.warmup_steps
    assert train_loop.learning_rate(options, 0, 1000) == pytest.approx(peak / warmup, rel=1e-3)
    assert train_loop.learning_rate(options, 500, 1000) == pytest.approx(peak / 2)
    assert train_loop.learning_rate(options, 999, 1000) < peak * 1e-4
    constant = TrainOptions()
    assert train_loop.learning_rate(constant, 10_000, 10_000) == constant.optim.learning_rate
