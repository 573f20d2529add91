"""Training: the run's layout, resuming, an order that restarts and workers cannot change, refusals."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from ddpm_core import checkpoint, encoders, identity, storage
from ddpm_core.conditioning import structure
from ddpm_core.config import DataCard, DiffusionConfig, ModelConfig
from ddpm_core.ema import EMA
from ddpm_core.errors import InputError
from ddpm_core.gan import Generator
from ddpm_core.translator import Translator
from ddpm_core.unet import UNet
from jobs import train, translate
from jobs.common import cli
from jobs.datasets import cache, writing
from jobs.datasets.format import DatasetCard, Row, read_card
from jobs.training import checks, driver, fitting, loop, methods, origin, validation, worker_state
from jobs.training.batches import (
    Batch,
    HostBatch,
    Prefetcher,
    Sampler,
    Share,
    epoch_order,
    moved,
    stratified_timesteps,
    training_rows,
)
from jobs.training.options import TrainOptions
from jobs.training.presets import PRESETS
from jobs.training.run_folder import Run, describe, latest_checkpoint, read_best

CPU = torch.device("cpu")

SMOKE = ["--preset", "smoke", "--precision", "fp32"]
HERE = ["--num-workers", "0"]  # in this process: what is not about Ray needs none
LENGTHS = ["--optim.ema-sigma-rels", "0.05", "0.1"]


def run(dataset: str, output: Path | str, *flags: str) -> int:
    return train.main([*SMOKE, "--data", dataset, "--output", str(output), *flags])


def metrics_of(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(str(run_folder)).model.state_dict()


@pytest.fixture(scope="session")
def two_epochs(dataset_folder, tmp_path_factory) -> Path:
    """A run of two epochs, four steps, with two lengths of EMA."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert run(dataset_folder, output, *LENGTHS, *HERE) == 0
    return output


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
    for step in (2, 4):
        with Image.open(two_epochs / f"samples/step-{step:08d}.png") as picture:
            assert (picture.width // 128, picture.height // 128) == (3, 6)  # source, translated, counterpart of six
    (attempt,) = json.loads((two_epochs / "environment.json").read_text())["attempts"]
    assert (attempt["step"], attempt["num_workers"]) == (0, 1)
    rows = metrics_of(two_epochs)
    assert [(row["split"], row["step"], row["epoch"]) for row in rows] == [
        ("train", 2, 1),
        ("val", 2, 1),
        ("train", 4, 2),
        ("val", 4, 2),
    ]
    best = json.loads((two_epochs / "best.json").read_text())
    assert best["metric"]["loss"] == min(row["loss"] for row in rows if row["split"] == "val")
    for row in rows[1::2]:
        of_each = {0.05: row["loss_ema_0.050"], 0.1: row["loss_ema_0.100"]}
        assert row["loss"] == of_each[row["ema_sigma_rel"]] == min(of_each.values())
    assert "CC0" in (two_epochs / last / "card.md").read_text()
    assert "validation images: too few" in (two_epochs / best["checkpoint"] / "README.md").read_text()
    assert Image.open(two_epochs / best["checkpoint"] / "samples.png").size[0] > 100


def test_every_length_of_the_ema_can_be_picked_afterwards(two_epochs):
    best = json.loads((two_epochs / "best.json").read_text())
    chosen, folder = best["ema_sigma_rel"], two_epochs / best["checkpoint"]
    (other,) = {0.05, 0.1} - {chosen}
    assert (folder / f"ema-{other:.3f}.safetensors").exists()
    assert not (folder / f"ema-{chosen:.3f}.safetensors").exists()
    loaded = checkpoint.load(str(two_epochs))
    assert loaded.config.training["ema_sigma_rel"] == chosen
    state = torch.load(folder / "train_state/state.pt", weights_only=True)
    for sigma_rel in (chosen, other):
        found = checkpoint.load(str(two_epochs), ema=sigma_rel).model.state_dict()
        for name, tensor in state["ema"][sigma_rel].items():
            assert torch.equal(found[name], tensor), name
    with pytest.raises(InputError, match=r"holds no weights of EMA length 0\.2; there are 0\.05, 0\.1"):
        checkpoint.load(str(two_epochs), ema=0.2)


def test_the_same_command_again_has_nothing_to_do(two_epochs, dataset_folder, capsys):
    before = (two_epochs / "metrics.jsonl").stat().st_mtime_ns
    assert run(dataset_folder, two_epochs, *LENGTHS, *HERE) == 0
    assert "already trained" in capsys.readouterr().out
    assert (two_epochs / "metrics.jsonl").stat().st_mtime_ns == before


def test_other_options_are_refused_by_name(two_epochs, dataset_folder):
    with pytest.raises(InputError, match=r"holds a run with --seed 0, this command says 7"):
        run(dataset_folder, two_epochs, *LENGTHS, "--seed", "7")


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.ray]), pytest.param(2, marks=pytest.mark.ray)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(two_epochs, dataset_folder, tmp_path, workers, request):
    """Begun in this process, resumed here or by workers of Ray: bit for bit, but where two share the sums."""
    if workers:
        request.getfixturevalue("ray_cluster")
    output = tmp_path / "run"
    assert run(dataset_folder, output, *LENGTHS, *HERE, "--epochs", "1") == 0
    assert run(dataset_folder, output, *LENGTHS, "--num-workers", str(workers)) == 0
    if workers == 2:
        assert json.loads((output / "environment.json").read_text())["attempts"][-1]["num_workers"] == 2
        assert [row["loss"] for row in metrics_of(output)] == pytest.approx(
            [row["loss"] for row in metrics_of(two_epochs)], rel=1e-4
        )
        assert_alike(two_epochs, output)
        return
    for one, two in zip(metrics_of(two_epochs), metrics_of(output), strict=True):
        clocks = {"images_per_s": 0, "data_wait_share": 0}
        assert one | clocks == two | clocks
    resumed = weights(output)
    for name, tensor in weights(two_epochs).items():
        assert torch.equal(tensor, resumed[name]), name


def assert_alike(one: Path, other: Path) -> None:
    """The same weights to float tolerance."""
    there = weights(other)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_three_unequal_workers_compute_what_one_does(ray_cluster, two_epochs, dataset_folder, tmp_path):
    """Of 16 images a step they take 5, 5 and 6."""
    assert run(dataset_folder, tmp_path / "run", *LENGTHS, "--num-workers", "3") == 0
    assert_alike(two_epochs, tmp_path / "run")


@pytest.mark.slow
def test_a_sharded_network_computes_what_a_whole_one_does_and_resumes_it(
    ray_cluster, two_epochs, dataset_folder, tmp_path
):
    """Half by a process alone, half by two that share the network, and the other way round: what AdamW kept is laid out
    differently in memory, and must come through."""
    here, sharded = HERE, ["--num-workers", "2", "--parallel", "fsdp"]
    for first, second in ((here, sharded), (sharded, here)):
        output = tmp_path / f"run{len(first)}"
        assert run(dataset_folder, output, *LENGTHS, *first, "--epochs", "1") == 0
        assert run(dataset_folder, output, *LENGTHS, *second) == 0
        assert_alike(two_epochs, output)


def test_milestones_are_kept(dataset_folder, tmp_path):
    flags = ["--epochs", "7", "--keep-every-epochs", "3", "--validate-every-epochs", "7"]
    assert run(dataset_folder, tmp_path / "run", *HERE, *flags) == 0
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000012", "step-00000014"]


def test_a_validation_lost_with_its_worker_is_made_up_for(two_epochs, dataset_folder, tmp_path):
    """The checkpoint was stored, what came of its validation not."""
    folder = shutil.copytree(two_epochs, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]))
    (folder / "best.json").unlink()
    assert run(dataset_folder, folder, *LENGTHS, *HERE) == 0
    for row, before in zip(metrics_of(folder), map(json.loads, lines), strict=True):
        assert row.pop("split") == before.pop("split")
        assert row == pytest.approx(before, rel=1e-6)
    assert json.loads((folder / "best.json").read_text())["metric"]["step"] == 4


@pytest.mark.parametrize(
    ("workers", "expected"),
    [("3", (3, 3)), ("0", (0, 0)), ("2:8", (2, 8)), ("8:2", None), ("0:2", None), ("two", None)],
)
def test_number_of_workers(workers, expected):
    args = train.parse(["--data", "x", "--output", "y", "--preset", "smoke", "--num-workers", workers])
    if expected:
        assert args.workers == expected
        return
    with pytest.raises(InputError, match=f"--num-workers is {workers}"):
        _ = args.workers


def started_until(step: int, output: Path, flags: list[str]) -> subprocess.Popen[str]:
    """`jobs.train` in a process of its own, on the session's Ray, once it has a checkpoint of `step` or later."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *flags],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 400
    while latest_checkpoint(str(output))[0] < step:
        if driver.poll() is not None or time.monotonic() > deadline:
            driver.kill()
            pytest.fail(f"no checkpoint of step {step}: {driver.communicate()[1]}")
        time.sleep(0.1)
    return driver


def test_a_checkpoint_cut_off_while_it_was_written_is_not_taken_for_one(two_epochs, tmp_path):
    folder = shutil.copytree(two_epochs, tmp_path / "run")
    half = folder / "checkpoints/step-99999999"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(str(folder)) == (4, str(folder / "checkpoints/step-00000004"))


def test_a_run_whose_losses_explode_stops_and_names_the_last_good_checkpoint(dataset_folder, tmp_path, capsys):
    good = ["--checkpoint-every-minutes", "1e-9", "--epochs", "3"]
    assert run(dataset_folder, tmp_path / "run", *HERE, *good) == 0
    config = tmp_path / "run/config.json"  # a run that goes on with a wild rate
    config.write_text(config.read_text().replace('"learning_rate": 0.0002', '"learning_rate": 100.0'))
    wild = ["--optim.learning-rate", "100", "--epochs", "30"]
    capsys.readouterr()
    assert run(dataset_folder, tmp_path / "run", *HERE, *wild) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "error: the losses were lost at step" in told
    last_good = tmp_path / "run/checkpoints/step-00000006"
    assert f"the last good checkpoint is {last_good}; train anew with a lower --optim.learning-rate" in told
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(str(last_good)).model.state_dict().values())
    assert "diverged" in (tmp_path / "run/report.html").read_text().lower()


def test_when_workers_take_a_checkpoint(monkeypatch):
    clock, leaving = [100.0], [None]
    monkeypatch.setattr(worker_state.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(worker_state.ray.train, "get_preemption_info", lambda: leaving[0])
    consensus = worker_state.WorkerConsensus(1, save_every_s=60.0, comparable=True)
    good, bad = {"loss": torch.tensor(0.5)}, {"loss": torch.tensor(float("nan"))}

    def after(seconds: float, losses=good, *, storing: bool = False) -> int:
        clock[0] += seconds
        return consensus.agree(losses, storing=storing)

    assert after(1) == 0
    assert after(3) == worker_state.ASK
    assert after(57) & worker_state.SAVE  # a minute after the start
    assert not after(59) & worker_state.SAVE
    assert not after(2, storing=True) & worker_state.SAVE  # the last one is still on its way
    assert after(0.1) & worker_state.SAVE
    leaving[0] = object()  # a node is about to go
    assert after(4) == worker_state.ASK
    assert [after(0.1) & worker_state.SAVE for _ in range(3)] == [
        worker_state.SAVE
    ] * 3  # as often as they can be stored
    assert not after(0.1, bad) & worker_state.STOP  # known one step later
    assert after(0.1) & worker_state.STOP


def test_a_run_has_diverged_when_its_losses_stay_far_above_the_first_ones():
    def stopped_at(losses: list[float], *, comparable: bool = True) -> int | None:
        consensus = worker_state.WorkerConsensus(1, save_every_s=1e9, comparable=comparable)
        consensus.asked_s = math.inf
        for step, loss in enumerate(losses):
            if consensus.agree({"loss": torch.tensor(loss)}, storing=False) & worker_state.STOP:
                return step
        return None

    first, learnt = [0.4] * 100, [0.05] * 200
    assert stopped_at([*first, *learnt, *[0.9] * 300]) is None
    assert stopped_at([*first, *learnt, 50.0, *learnt]) is None  # one bad step
    assert stopped_at([*first, *learnt, *[4.0] * 300]) == 300 + 30  # the mean of 100 is above 1.2 by then
    assert stopped_at([*first, *learnt, *[4.0] * 300], comparable=False) is None


def test_checkpoints_that_cannot_be_stored(tmp_path, monkeypatch):
    """In between validations two may be lost; nothing that was there before is touched."""
    options = PRESETS["smoke"].options
    objective = methods.Diffusion(config_for(options), options, CPU)
    ema = EMA(objective.network, sigma_rels=(0.1,))
    folder = Run(str(tmp_path), config_for(options), files=checkpoint.files, comparable=True)
    good = {"step": 1, "epoch": 1, "split": "val", "loss": 1.0, "ema_sigma_rel": 0.1}

    def save(step: int, *, strict: bool = False) -> None:
        folder.save(step, ema.state_dict(), objective.state_dict(), strict=strict)

    save(1)
    folder.promote(good, of_epochs=9)
    folder.stored(strict=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write = storage.write_bytes

    def full(uri: str, data: bytes) -> None:
        if uri.endswith("model.safetensors"):
            raise InputError(f"{uri}: no space left on the device; free some or write elsewhere")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", full)
    for step in (2, 3, 4):
        save(step)
    with pytest.raises(InputError, match="no space left"):
        save(5)
    assert latest_checkpoint(str(tmp_path)) == (1, str(tmp_path / "checkpoints/step-00000001"))
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.setattr(storage, "write_bytes", write)
    save(6)
    folder.stored(strict=True)
    assert latest_checkpoint(str(tmp_path))[0] == 6
    assert read_best(str(tmp_path))["metric"]["step"] == 1  # no validation, no claim to be the best
    monkeypatch.setattr(storage, "write_bytes", full)
    save(7)
    with pytest.raises(InputError, match="no space left"):  # after a validation it counts at once
        folder.stored(strict=True)


def test_a_checkpoint_that_was_lost_is_not_promoted_and_costs_none_before_it(tmp_path, monkeypatch):
    """The store failed for as long as the checkpoint took, and was well again when best.json was written."""
    ema = EMA(torch.nn.Linear(1, 1), sigma_rels=(0.1,))
    folder = Run(str(tmp_path), ModelConfig(), files=checkpoint.files, comparable=True)
    write = storage.write_bytes

    def failing(uri: str, data: bytes) -> None:
        if uri.endswith("step-00000003/config.json"):
            raise InputError(f"{uri}: no space left on the device; free some or write elsewhere")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", failing)

    def promote(step: int, loss: float) -> None:
        folder.promote({"step": step, "epoch": step, "loss": loss, "ema_sigma_rel": 0.1}, of_epochs=3)

    folder.save(1, ema.state_dict(), {}, strict=True)
    promote(1, 0.5)
    folder.save(2, ema.state_dict(), {}, strict=True)
    folder.stored(strict=True)
    folder.save(3, ema.state_dict(), {}, strict=True)
    promote(2, 0.6)
    promote(3, 0.4)
    with pytest.raises(InputError, match="no space left"):
        folder.stored(strict=True)
    best = read_best(str(tmp_path))
    assert best["checkpoint"] == "checkpoints/step-00000001"
    assert "epochs" not in best  # not whole
    kept = sorted(each.name for each in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000002"]  # nothing half-written takes the room that is lacking


def test_of_two_commands_for_one_run_the_earlier_ends(tmp_path):
    def command(name: str) -> Run:
        for file, content in describe(str(tmp_path), ModelConfig(), name).items():
            storage.write_bytes(str(tmp_path / file), content)
        return Run(str(tmp_path), ModelConfig(), files=checkpoint.files, comparable=True, owner=name)

    ema = EMA(torch.nn.Linear(1, 1), sigma_rels=(0.1,))
    first = command("first")
    first.save(1, ema.state_dict(), {}, strict=False)
    first.stored(strict=False)
    second = command("second")
    second.save(2, ema.state_dict(), {}, strict=False)
    second.stored(strict=False)
    first.save(3, ema.state_dict(), {}, strict=False)
    with pytest.raises(InputError, match="is trained by a command given later; this one ends here"):
        first.stored(strict=False)
    with pytest.raises(InputError, match="given later"):
        first.flush()
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="was removed or moved while it was trained"):
        second.flush()
    assert not tmp_path.exists()


def test_runs_that_are_damaged_old_or_too_long_are_told_apart(dataset_folder, tmp_path):
    folder = tmp_path / "run"
    assert run(dataset_folder, folder, *HERE) == 0
    whole, last = weights(folder), folder / "checkpoints/step-00000004"
    with pytest.raises(InputError, match=r"was trained for 2 epochs, this command says 1; give 2 or more"):
        run(dataset_folder, folder, *HERE, "--epochs", "1")
    shutil.copytree(last, folder / "checkpoints/step-00000004-mine")  # somebody's, neither read nor deleted
    best = (folder / "best.json").read_text()
    (folder / "best.json").write_text("")
    with pytest.raises(InputError, match=r"best\.json is damaged .* delete it, and the same command goes on"):
        run(dataset_folder, folder, *HERE)
    (folder / "best.json").unlink()
    state = last / "train_state/state.pt"
    content = state.read_bytes()
    for damage, what in ((lambda: state.write_bytes(content[:999]), "damaged"), (state.unlink, "missing")):
        damage()
        with pytest.raises(Exception, match=r"state\.pt") as error:
            run(dataset_folder, folder, *HERE)
        assert f"state.pt is {what}; delete the folder {last}" in str(cli.input_error(error.value))
    state.write_bytes(content)
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(metrics[:-9])
    (folder / "environment.json").write_text("{")
    with pytest.raises(Exception, match=r"metrics\.jsonl") as error:
        run(dataset_folder, folder, *HERE)
    assert "metrics.jsonl is damaged" in str(cli.input_error(error.value))
    (folder / "metrics.jsonl").write_text(metrics)
    with pytest.raises(Exception, match="epochs") as error:  # no best.json that says so
        run(dataset_folder, folder, *HERE, "--epochs", "1")
    assert "is trained for more than 1 epochs; give --epochs 2 or more" in str(cli.input_error(error.value))
    (folder / "best.json").write_text(best)  # of a checkpoint that is gone
    shutil.rmtree(last)
    assert run(dataset_folder, folder, *HERE) == 0
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, whole[name]), name
    assert (folder / "checkpoints/step-00000004-mine/config.json").exists()


@pytest.mark.slow
def test_what_earlier_releases_stored_is_gone_on_from(dataset_folder, tmp_path):
    """They stored at the ends of epochs only, and no losses; an option had another name."""
    for folder in (tmp_path / "old", tmp_path / "new"):
        assert run(dataset_folder, folder, *HERE, "--epochs", "1") == 0
    path = tmp_path / "old/checkpoints/step-00000002/train_state/state.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: state[name] for name in ("model", "optimizer", "ema")}, path)
    config = tmp_path / "old/config.json"
    config.write_text(config.read_text().replace('"validation_loss_config"', '"measured_by"'))
    for folder in (tmp_path / "old", tmp_path / "new"):
        assert run(dataset_folder, folder, *HERE) == 0
    for row, other in zip(metrics_of(tmp_path / "old"), metrics_of(tmp_path / "new"), strict=True):
        assert row["loss"] == other["loss"]


@pytest.mark.slow
def test_ctrl_c_is_not_taken_for_success(ray_cluster, dataset_folder, tmp_path):
    flags = [*SMOKE, "--data", dataset_folder, "--output", str(tmp_path / "run"), "--epochs", "400"]
    driver = started_until(2, tmp_path / "run", flags)
    driver.send_signal(signal.SIGINT)
    told = driver.communicate(timeout=300)[1]
    assert driver.returncode == 130, told
    assert "interrupted; the same command goes on from here" in told
    assert "epochs" not in read_best(str(tmp_path / "run"))


def loaded(dataset_folder: str, split: str = "train") -> cache.SplitArrays:
    return cache.load(dataset_folder, split)


def config_for(options: TrainOptions) -> ModelConfig:
    return ModelConfig(
        image_size=16,
        domains=("day", "night"),
        method=options.method,
        unet=options.unet,
        diffusion=options.diffusion,
        sampling=options.sampling,
        gan=options.gan,
    )


def test_samples_are_functions_of_seed_epoch_and_id(dataset_folder):
    options = PRESETS["smoke"].options
    sampler = Sampler(loaded(dataset_folder), config_for(options), options)
    rows = np.arange(8)
    whole = sampler.train(rows, epoch=3)
    halves = [sampler.train(rows[:4], epoch=3), sampler.train(rows[4:], epoch=3)]
    for name in ("target", "source", "flip", "shift", "domain", "t", "noise", "dropped", "domain_dropped"):
        together = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(getattr(whole, name), together), name
    other = sampler.train(rows, epoch=4)
    assert not torch.equal(whole.noise, other.noise)
    assert not torch.equal(whole.t, other.t)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 3, 7])  # of five steps an epoch: the beginning, within the first, in the second
def test_the_order_is_ours(ray_cluster, dataset_folder, workers, start):
    """Two epochs drawn by processes of their own, from the beginning or taken up again in the middle of an epoch: the
    global batches are the same, image by image, number by number."""
    options = dataclasses.replace(PRESETS["smoke"].options, global_batch_size=6, max_shift=2, seed=5)
    config = config_for(options)

    @ray.remote(num_cpus=0.1)
    def drawn(rank: int, world: int, first: int) -> list[tuple[list[str], list[torch.Tensor]]]:
        sampler = Sampler(cache.load(dataset_folder, "train"), config, options)
        share = Share(rank=rank, world=world)
        feed = Prefetcher(sampler, np.arange(32), share, start=first, stop=10, pin=False)
        names = [field.name for field in dataclasses.fields(HostBatch) if field.name != "ids"]
        return [(draw.ids, [getattr(draw, name) for name in names]) for draw in feed]

    (whole,) = ray.get([drawn.remote(0, 1, 0)])
    shares = ray.get([drawn.remote(rank, workers, start) for rank in range(workers)])
    assert len(shares[0]) == 10 - start
    for step, (ids, tensors) in enumerate(whole[start:]):
        assert [name for share in shares for name in share[step][0]] == ids
        for number, tensor in enumerate(tensors):
            assert torch.equal(torch.cat([share[step][1][number] for share in shares]), tensor)
    visited = [name for ids, _ in whole for name in ids]
    assert len(set(visited[:30])) == len(set(visited[30:])) == 30  # each epoch: no image twice
    assert visited[:30] != visited[30:]


def test_images_are_flipped_and_shifted_together():
    picture = torch.arange(5 * 5 * 3).reshape(1, 5, 5, 3).to(torch.uint8)
    plain = moved(picture, torch.tensor([False]), torch.tensor([[0, 0]]))
    assert torch.equal(((plain + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1), picture)
    assert torch.equal(moved(picture, torch.tensor([True]), torch.tensor([[0, 0]])), plain.flip(3))
    down, right = (moved(picture, torch.tensor([False]), torch.tensor([shift])) for shift in ([2, 0], [0, -1]))
    assert torch.equal(down[:, :, 2:], plain[:, :, :3])
    assert torch.equal(down[:, :, :2], plain[:, :, [2, 1]])  # the edge mirrored, not repeated
    assert torch.equal(right[..., :4], plain[..., 1:])
    assert torch.equal(right[..., 4], plain[..., 3])
    both = moved(picture, torch.tensor([True]), torch.tensor([[0, 1]]))
    assert torch.equal(both[..., 1:], plain.flip(3)[..., :4])  # first flipped, then shifted


def test_what_the_network_is_shown(dataset_folder):
    """The counterpart, any image of the other side, or the structure of x_0 itself."""
    rows_of, rows = loaded(dataset_folder), np.arange(32)

    def batch(**changes) -> Batch:
        options = TrainOptions(max_shift=3, **changes)
        shown = {"self": "structure", "none": "nothing"}.get(options.pairing, "source")
        config = dataclasses.replace(config_for(options), shown=shown)
        return Sampler(rows_of, config, options).train(rows, 0).to(CPU, shown=config.shown)

    def pairs(found: Batch) -> int:
        """How many conditions are the counterparts of x_0: a night is its day dimmed."""
        dim = torch.tensor([0.2, 0.3, 0.5])[:, None, None]
        number = 0
        for x_0, condition, domain in zip(found.x_0, found.condition, found.domain.tolist(), strict=True):
            day, night = ((each + 1) * 127.5 for each in ((condition, x_0) if domain else (x_0, condition)))
            number += int((day * dim - night).abs().max() < 2)
        return number

    assert pairs(batch()) == 32
    assert pairs(batch(pairing="unpaired")) < 8
    found = batch(pairing="self")
    assert torch.equal(found.condition, structure(found.x_0))
    assert torch.equal(found.x_0, batch().x_0)
    found = batch(pairing="none")
    assert not found.condition.any()
    assert torch.equal(found.x_0, batch().x_0)


def test_what_a_model_made_is_shown_and_never_made(dataset_folder):
    rows_of, rows = loaded(dataset_folder), np.arange(32)
    for wanted, serving in ((None, 32), ("day", 32), ("night", 0)):  # each row's own image is a day
        options = TrainOptions(flip=False, target_domain=wanted)
        config = config_for(options)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, pairing="synthetic"))
        assert len(training_rows(rows_of, config, options)) == serving
        batch = Sampler(rows_of, config, options).train(rows, 0)
        assert np.array_equal(batch.target, rows_of.images(rows))
        assert np.array_equal(batch.source, rows_of.targets(rows))
        assert not batch.domain.any()


def test_each_epoch_visits_every_row_once_in_its_own_order():
    first, second = (epoch_order(0, epoch, 50) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second)
    assert list(epoch_order(0, 1, 50)) == list(second)


def test_both_directions_and_one(dataset_folder):
    rows_of = loaded(dataset_folder)
    rows = np.arange(len(rows_of))
    options = TrainOptions(flip=False)
    both = Sampler(rows_of, config_for(options), options).train(rows, 0).to(CPU)
    assert set(both.domain.tolist()) == {0, 1}
    for i, domain in enumerate(both.domain.tolist()):
        dimmer, brighter = both.x_0[i].mean(), both.condition[i].mean()
        assert (dimmer < brighter) == (domain == 1)  # night is darker: the image fits its label
    one = TrainOptions(flip=False, target_domain="night")
    assert set(Sampler(rows_of, config_for(one), one).train(rows, 0).domain.tolist()) == {1}


def test_conditions_and_domains_are_dropped_apart_as_often_as_asked(dataset_folder):
    rows_of = loaded(dataset_folder)
    options = TrainOptions(diffusion=DiffusionConfig(p_uncond=0.2, p_uncond_domain=0.5))
    sampler = Sampler(rows_of, config_for(options), options)
    batches = [sampler.train(np.arange(len(rows_of)), epoch) for epoch in range(40)]
    dropped, domain_dropped = (
        torch.cat([getattr(each, name) for each in batches]) for name in ("dropped", "domain_dropped")
    )
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.04)
    assert domain_dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (dropped & domain_dropped).float().mean().item() == pytest.approx(0.1, abs=0.03)
    shown = sampler.validation(np.arange(4), np.arange(4))
    assert not (shown.dropped | shown.domain_dropped).any()


def test_cyclegan_is_shown_no_pairs(dataset_folder):
    rows_of = loaded(dataset_folder)
    options = TrainOptions(method="cyclegan", flip=False)
    batch = Sampler(rows_of, config_for(options), options).train(np.arange(len(rows_of)), 0).to(CPU)
    days = {tuple(picture.flatten().tolist()) for picture in rows_of.images(range(len(rows_of)))}
    pairs = 0
    for x_0, condition, domain in zip(batch.x_0, batch.condition, batch.domain.tolist(), strict=True):
        day, night = ((picture + 1) * 127.5 for picture in ((condition, x_0) if domain else (x_0, condition)))
        assert tuple(day.round().permute(1, 2, 0).flatten().to(torch.uint8).tolist()) in days  # each on its side
        dimmed = day * torch.tensor([0.2, 0.3, 0.5])[:, None, None]
        pairs += int((dimmed - night).abs().max() < 2)
    assert pairs < 8  # of 32 draws, one in 32 is its own counterpart


@pytest.mark.parametrize("method", ["diffusion", "pix2pix", "cyclegan"])
def test_validation_gives_the_same_numbers_every_time_and_picks_the_best_length(dataset_folder, method):
    options = dataclasses.replace(PRESETS["smoke"].options, method=method)
    config, rows_of = config_for(options), loaded(dataset_folder, "val")
    torch.manual_seed(0)
    objective = methods.objective(config, options, CPU)
    ema = EMA(objective.network, sigma_rels=(0.05, 0.1))
    batch = Sampler(rows_of, config, options).train(np.arange(8), 0).to(CPU)
    for step in range(4):
        objective.step(batch, 1e-3, step)
        ema.update(objective.network, step + 1)
    validate = validation.Validation(rows_of, config, options, objective, CPU, Share(rank=0, world=1))
    found = validate(ema.tracks)
    torch.rand(7)
    assert validate(ema.tracks) == found
    first = found.row
    of_each = {each: float(values["loss"].mean()) for each, values in validate.measure(ema.tracks).items()}
    assert of_each[0.05] != of_each[0.1]
    assert (first["loss_ema_0.050"], first["loss_ema_0.100"]) == (of_each[0.05], of_each[0.1])
    # CycleGAN's losses do not compare networks: the first length is taken, whatever its loss
    assert first["ema_sigma_rel"] == (0.05 if method == "cyclegan" else min(of_each, key=of_each.__getitem__))
    assert first["loss"] == of_each[first["ema_sigma_rel"]]
    bands = [first[name] for name in sorted(first) if name.startswith("loss_band_")]
    assert len(bands) == (4 if method == "diffusion" else 0)
    if bands:
        assert np.mean(bands) == pytest.approx(first["loss"], rel=0.05)


@pytest.mark.parametrize("target", [None, "day", "night"])
@pytest.mark.parametrize(
    ("paired", "pairing"),
    [*((True, each) for each in ("paired", "unpaired", "self", "none")), (False, "unpaired"), (False, "none")],
)
def test_what_is_shown_of_a_run_are_different_images_of_the_sides_that_are_left(
    dataset_folder, tmp_path, paired, pairing, target
):
    dataset = dataset_folder if paired else unpaired(tmp_path / "set", *(0, 1) * 20, val=(0, 0, 0, 1, 1, 1, 1))
    options = dataclasses.replace(PRESETS["smoke"].options, pairing=pairing, target_domain=target)
    config, rows_of = checks.model_config(read_card(dataset), options), loaded(dataset, "val")
    validate = validation.Validation(
        rows_of, config, options, methods.objective(config, options, CPU), CPU, Share(rank=0, world=1)
    )
    sources, to, truths = validate.to_show()
    assert len({image.tobytes() for image in sources}) == len(sources) >= 3
    sides = {0: rows_of.images(np.flatnonzero(rows_of.domain == 0)), 1: rows_of.images(np.flatnonzero(rows_of.domain))}
    if rows_of.has_targets:
        sides[1] = rows_of.targets(np.arange(len(rows_of)))
    of = [
        next(side for side in sides if image.tobytes() in {each.tobytes() for each in sides[side]}) for image in sources
    ]
    assert [1 - side for side in of] == to.tolist()
    assert {*to.tolist()} <= ({0, 1} if target is None else {config.domains.index(target)})
    assert (truths is None) == (pairing != "paired")


def test_timesteps_of_validation_are_stratified():
    ts = stratified_timesteps(200, 1000)
    assert np.histogram(ts, bins=10, range=(0, 1000))[0].tolist() == pytest.approx([20] * 10, abs=1)


def one_batch(**changes) -> Batch:
    x_0, condition, noise = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    whole = {
        "x_0": x_0,
        "condition": condition,
        "domain": torch.tensor([0, 1, 0, 1]),
        "t": torch.tensor([0, 10, 500, 999]),
        "noise": noise,
        "dropped": torch.tensor([True, False, True, False]),
        "domain_dropped": torch.tensor([False, False, True, True]),
        "labels": torch.empty(4, 0, dtype=torch.int64),
    }
    return Batch(**{**whole, **changes})


class Oracle(torch.nn.Module):
    """Predicts what it is told to, and remembers what it is shown."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = torch.nn.Parameter(output.clone())

    def forward(self, x_t, t, condition, domain):
        self.condition, self.domain = condition, domain
        return self.output


def test_a_perfect_network_has_no_loss():
    options, batch = PRESETS["smoke"].options, one_batch()
    oracle = Oracle(batch.noise)
    loss = methods.Diffusion(config_for(options), options, CPU).validation_loss(oracle, batch)
    assert loss.tolist() == [0, 0, 0, 0]
    assert oracle.domain.tolist() == [0, 1, 2, 2]  # dropped: the null label
    assert not oracle.condition[[0, 2]].any()
    assert torch.equal(oracle.condition[[1, 3]], batch.condition[[1, 3]])


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> str:
    config = encoders.EncoderConfig(kind="identity", image_size=16, widths=(8, 8), embedding_channels=8)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    for name, content in encoders.encoder_files(encoders.IdentityEncoder(config).state_dict(), config).items():
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_added_losses_are_the_librarys_on_what_was_shown(encoder_folder, pairing):
    """With x_0 predicted as it is, the predicted image is known, and so are the losses on it."""
    smoke = dataclasses.replace(PRESETS["smoke"].options, diffusion=DiffusionConfig(prediction="x_0"))
    options = dataclasses.replace(
        smoke,
        global_batch_size=4,
        identity_encoder=encoder_folder,
        identity_weight=0.5,
        perceptual_weight=2.0,
        precision="fp32",
    )
    config = dataclasses.replace(config_for(options), data=DataCard(pairing=pairing))
    objective, batch = methods.Diffusion(config, options, CPU), one_batch()
    predicted = torch.randn(4, 3, 16, 16).clamp(-1, 1)
    objective.model = Oracle(predicted)
    found = objective.step(batch, 0.0, 0)
    encoder, abar = encoders.load_encoder(encoder_folder), objective.alphas_cumprod
    shown = {"t": batch.t, "alphas_cumprod": abar, "unpaired": pairing == "unpaired"}
    of_each = identity.identity_loss(predicted, batch.condition, encoder, **shown)
    assert found["loss_identity"].item() == pytest.approx((of_each[1] + of_each[3]).item() / 4)  # the others: dropped
    of_each = identity.perceptual_loss(predicted, batch.x_0, encoder.maps, t=batch.t, alphas_cumprod=abar)
    assert found["loss_perceptual"].item() == pytest.approx(of_each.mean().item())

    # and they pull with their weights: the gradient is the sum of the parts'
    def gradient(**weights: float) -> torch.Tensor:
        alone = methods.Diffusion(config, dataclasses.replace(options, **weights), CPU)
        alone.model = Oracle(predicted)
        alone.step(batch, 0.0, 0)
        return alone.model.output.grad

    none = gradient(identity_weight=0.0, perceptual_weight=0.0)
    by_identity = gradient(identity_weight=1.0, perceptual_weight=0.0) - none
    by_perception = gradient(identity_weight=0.0, perceptual_weight=1.0) - none
    assert by_identity[1].any()
    assert not by_identity[[0, 2]].any()
    whole = objective.model.output.grad
    torch.testing.assert_close(whole, none + 0.5 * by_identity + 2.0 * by_perception, rtol=1e-3, atol=1e-8)


def test_gradient_checkpointing_changes_no_number():
    smoke, batch, found = PRESETS["smoke"].options, one_batch(), []
    for checkpointing in (False, True):
        options = dataclasses.replace(smoke, gradient_checkpointing=checkpointing, precision="fp32")
        torch.manual_seed(0)
        objective = methods.Diffusion(config_for(options), options, CPU)
        objective.distribute()
        losses = [objective.step(batch, 1e-2, step)["loss"].item() for step in range(3)]
        found.append((losses, [*objective.network.state_dict().values()]))
    assert found[0][0] == found[1][0]
    assert found[0][0][2] < found[0][0][0]
    for plain, again in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(plain, again)


def test_a_step_in_parts_is_the_step_in_one():
    smoke, batch, found = PRESETS["smoke"].options, one_batch(), []
    for parts in (1, 2, 4):
        options = dataclasses.replace(smoke, accumulate=parts, precision="fp32")
        torch.manual_seed(0)
        objective = methods.Diffusion(config_for(options), options, CPU)
        loss = objective.step(batch, 1e-2, 0)["loss"].item()
        found.append((loss, {name: weights.grad for name, weights in objective.network.named_parameters()}))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("most", "flags", "remedy"),
    [
        (4, [], "4 at a time do: give --accumulate 4, --gradient-checkpointing, more workers, or --parallel fsdp"),
        (5, ["--accumulate", "3"], "3 at a time do: give --accumulate 6, "),
        (3, ["--gradient-checkpointing"], "2 at a time do: give --accumulate 8, more workers, or --parallel fsdp"),
        (0, [], "not even one does: give --gradient-checkpointing, --parallel fsdp with more workers, or a smaller"),
        (0, ["--method", "pix2pix"], "give a smaller --global-batch-size or more workers"),
    ],
)
def test_a_share_too_large_for_the_gpu_is_told_with_what_fits(
    dataset_folder, tmp_path, monkeypatch, most, flags, remedy
):
    for network in (UNet, Generator):
        forward = network.forward

        def limited(self, x, *args, forward=forward, **kwargs):
            if len(x) > most and self.training:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More")
            return forward(self, x, *args, **kwargs)

        monkeypatch.setattr(network, "forward", limited)
    with pytest.raises(InputError) as told:
        run(dataset_folder, tmp_path / "run", *HERE, "--global-batch-size", "16", *flags)
    text = "a worker's share of a step, 16 images, does not fit into the GPU's memory (CUDA out of memory); "
    assert str(told.value).startswith(text + remedy)


def test_gans_name_their_losses_and_measure_the_same_in_training_and_validation():
    for method, names in (
        ("pix2pix", {"loss", "loss_adversarial", "loss_discriminator"}),
        ("cyclegan", {"loss", "loss_identity", "loss_adversarial", "loss_discriminator"}),
    ):
        options = dataclasses.replace(PRESETS["smoke"].options, method=method, precision="fp32")
        torch.manual_seed(0)
        gan, batch = methods.objective(config_for(options), options, CPU), one_batch()
        expected = gan.validation_loss(gan.network, batch).mean().item()
        if method == "cyclegan":  # training goes round from either side
            back = dataclasses.replace(batch, condition=batch.x_0, domain=1 - batch.domain)
            expected = (expected + gan.validation_loss(gan.network, back).mean().item()) / 2
        found = gan.step(batch, 1e-3, 0)
        assert set(found) == names
        assert found["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_a_image_as_its_own_guide(dataset_folder, tmp_path):
    """Trained to make an image from its structure and its label, then asked for the other label."""
    flags = ["--pairing", "self", "--max-shift", "1", "--epochs", "1"]
    assert run(dataset_folder, tmp_path / "run", *HERE, *flags) == 0
    there = checkpoint.load(str(tmp_path / "run"))
    assert (there.config.shown, there.config.data.pairing) == ("structure", "self")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[0]["data_wait_share"] < 1
    source = cache.load(dataset_folder, "test").images([0])
    assert Translator(there)(source, "night").shape == source.shape


@pytest.mark.slow
def test_pix2pix_takes_the_same_path(ray_cluster, dataset_folder, tmp_path, capsys):
    """Trained, resumed and put to use by the same commands; two workers compute what one does."""
    flags = ["--method", "pix2pix", "--epochs", "3"]
    output = tmp_path / "run"
    assert run(dataset_folder, output, *HERE, *flags[:2], "--epochs", "1") == 0
    assert run(dataset_folder, output, *HERE, *flags) == 0
    assert run(dataset_folder, tmp_path / "whole", *flags, "--num-workers", "2") == 0
    one, two = weights(output), weights(tmp_path / "whole")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train", "val"] * 3
    assert {"loss", "loss_adversarial", "loss_discriminator"} <= set(rows[-2])
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert "The other training losses" in (output / "report.html").read_text()
    loaded = checkpoint.load(str(output))
    assert isinstance(loaded.model, Generator)
    assert "pix2pix" in (Path(loaded.path) / "card.md").read_text()

    where = ["--checkpoint", str(output), "--num-workers", "1"]
    made = ["--input", dataset_folder, "--output", str(tmp_path / "made"), "--domain", "night"]
    assert translate.main([*where, *made]) == 0
    source = cache.load(dataset_folder, "test").images([0])
    right = Translator(loaded)(source, "night")[0]
    found = np.asarray(Image.open(tmp_path / "made/test-000.png"), int)
    assert np.abs(found - right).max() <= 1
    with pytest.raises(InputError, match="--num-steps: no effect on pix2pix"):
        translate.main([*where, *made, "--num-steps", "3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--preset", "dmo"], "did you mean 'demo'"),
        (["--epohcs", "3"], "there is no option --epohcs; did you mean --epochs?"),
        (["--epochs", "0"], "--epochs is 0; it must lie between 1 and 1,000,000"),
        (["--global-batch-size", "64"], "more than the 32 training rows; give at most 32"),
        (
            ["--global-batch-size", "3", "--num-workers", "2:4"],
            "is not an image for each of 4 workers; give 4 or more",
        ),
        (
            ["--num-workers", "40", "--global-batch-size", "20"],
            "is not an image for each of 40 workers; with 32 training rows give --num-workers 32 or fewer",
        ),
        (["--global-batch-size", "4", "--accumulate", "5"], "1 workers in 5 parts each (--accumulate); give 5 or more"),
        (["--method", "cyclegan", "--num-workers", "2:3"], "cannot be shared equally by 3 workers, as cyclegan needs"),
        (
            ["--method", "cyclegan", "--parallel", "fsdp"],
            "--parallel fsdp: cyclegan trains with ddp only; leave it out",
        ),
        (["--parallel", "fsdp"], "--parallel fsdp shares a network among workers; --num-workers 1 has no two"),
        (["--optim.weight-decay", "-1"], "--optim.weight-decay is -1.0; it must lie between 0 and 1,000"),
        (["--keep-every-epochs", "-1"], "--keep-every-epochs is -1; it must be at least 0"),
        (["--num-workers", "many"], "--num-workers is many; give a number such as 4, or least:most such as 2:8"),
        (["--seed", "99999999999999999999"], "--seed is 99999999999999999999; it must lie between 0 and"),
        (["--optim.learning-rate", "inf"], "--optim.learning-rate is inf; it must lie between 0 and 100"),
        (["--optim.grad-clip", "nan"], "--optim.grad-clip is nan; it must lie between 0 and 1,000,000"),
        (["--max-failures", "-1"], "--max-failures is -1; it must be at least 0"),
        (["--wait-for-nodes-s", "-1"], "--wait-for-nodes-s is -1; it must lie between 0 and 10,000,000"),
        (["--optim.warmup-steps", "-1"], "--optim.warmup-steps is -1; it must be at least 0"),
        (["--mlflow", "y" * 300], "File name too long; give a local folder"),
        (["--accumulate", "0"], "--accumulate is 0; it must lie between 1 and 1,000,000"),
        (["--method", "cyclegan", "--accumulate", "2"], "--accumulate has no effect with --method cyclegan"),
        (["--checkpoint-every-minutes", "0"], "--checkpoint-every-minutes is 0.0; it must be positive"),
        (["--target-domain", "nite"], "unknown domain 'nite' (did you mean 'night'?)"),
        (["--unet.channel-mult", "1", "2", "2", "2", "2"], "must be a multiple of 32"),
        (["--method", "pix2pix", "--gan.num-levels", "5"], "for pix2pix both must be multiples of 32"),
        (
            ["--method", "pix2pix", "--diffusion.schedule", "cosine"],
            "--diffusion.schedule has no effect with --method pix",
        ),
        (["--method", "pix2pix", "--optim.grad-clip", "2"], "--optim.grad-clip has no effect with --method pix2pix"),
        (["--gan.l1-weight", "5"], "--gan.l1-weight has no effect with --method diffusion"),
        (
            ["--method", "pix2pix", "--gradient-checkpointing"],
            "--gradient-checkpointing has no effect with --method pix2pix",
        ),
        (["--method", "cyclegan", "--perceptual-weight", "1"], "--perceptual-weight has no effect with --method cycle"),
        (
            ["--identity-weight", "0.1"],
            "--identity-weight needs an encoder to compare images by; give --identity-enc",
        ),
        (["--identity-weight", "-1"], "--identity-weight is -1.0; it must lie between 0 and 1,000,000"),
        (["--identity-encoder", "/nowhere"], "has no effect without --identity-weight or --perceptual-weight"),
        (["--identity-encoder", "/nowhere", "--identity-weight", "1"], "/nowhere: no encoder here"),
        (["--optim.ema-sigma-rels", "0.1", "0.3"], "0.3; it must lie between 0 and 0.28"),
        (["--optim.ema-sigma-rels", "0.1", "0.1"], "give one or more different lengths"),
        (["--pairing", "matched"], "--pairing matched: gradients was prepared paired; prepare it anew for that"),
        (["--method", "pix2pix", "--pairing", "unpaired"], "pix2pix learns from pairs; leave it out, or give --method"),
        (["--method", "pix2pix", "--pairing", "none"], "--pairing none: pix2pix has to be shown something"),
        (["--pairing", "none"], "give --preset prior, or --sampling.start flowedit"),
        (["--pairing", "none", "--sampling.start", "ddib", "--target-domain", "day"], "leave --target-domain out"),
        (["--pairing", "synthetic"], "was prepared paired; prepare it anew for that"),
        (["--method", "cyclegan", "--pairing", "self"], "--pairing self: cyclegan would learn to copy"),
        (["--max-train-images", "0"], "--max-train-images is 0; it must be at least 1"),
        (["--max-shift", "16"], "--max-shift is 16; it must lie between 0 and 15"),
        (
            ["--unet.attn-resolutions", "8", "999", "3"],
            "--unet.attn-resolutions 999 3: no feature map has such a side; with images of 16 px there are 8 4",
        ),
        (["--unet.model-channels", "8192", "--num-workers", "0"], "billion weights; trained it takes "),
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


def unpaired(
    folder: Path, *domains: int, val: tuple[int, ...] | None = None, names: tuple[str, ...] = ("day", "night")
) -> str:
    rows, held_out = (
        [
            Row(id=f"{prefix}{i:02d}", domain=side, image=np.full((16, 16, 3), 100 * side + i, np.uint8))
            for i, side in enumerate(sides)
        ]
        for prefix, sides in (("", domains), ("v", domains if val is None else val))
    )
    card = DatasetCard(
        name="toy",
        licence="CC0",
        source="x",
        image_size=16,
        encoding="raw",
        domains=names,
        pairing="unpaired",
    )
    writing.write_dataset(str(folder), {"train": rows, "val": held_out}, card)
    return str(folder)


@pytest.mark.parametrize(
    ("method", "domains", "message"),
    [
        ("pix2pix", (0, 1) * 10, "pix2pix learns from pairs, toy has none; give --method cyclegan"),
        ("cyclegan", (0,) * 20, "toy has no image of night in its train split"),
        ("diffusion", (1,) * 20, "toy has no image of day in its train split"),
    ],
)
def test_methods_that_do_not_suit_the_data_are_refused(tmp_path, method, domains, message):
    with pytest.raises(InputError, match=message):
        run(unpaired(tmp_path / "set", *domains), tmp_path / "run", "--method", method)


@pytest.mark.parametrize(
    ("val", "flags", "message"),
    [
        ((0, 0), [], "toy has no image of night in its val split"),
        ((0, 0), ["--target-domain", "day"], "toy has no image of night in its val split"),
        ((0, 0), ["--target-domain", "night", "--pairing", "self"], "toy has no image of night in its val split"),
        (
            (0, 1),
            ["--target-domain", "night", "--global-batch-size", "16"],
            "16 is more than the 10 training rows of night; give at most 10",
        ),
    ],
)
def test_splits_with_nothing_to_make_or_to_show_are_refused(tmp_path, val, flags, message):
    dataset = unpaired(tmp_path / "set", *(0,) * 30, *(1,) * 10, val=val)
    with pytest.raises(InputError, match=message):
        run(dataset, tmp_path / "run", *flags)


def options_on(dataset: str, preset: str, *flags: str) -> tuple[TrainOptions, list[str]]:
    """What a command's options come to on a data set, and what is said of it."""
    args, card = train.parse(["--data", dataset, "--output", "x", "--preset", preset, *flags]), read_card(dataset)
    options = fitting.fitted(args.options, card, dataset, "x", preset=preset, given=args.given)
    checks.check_fit(card, checks.model_config(card, options), dataclasses.replace(args, options=options))
    return options, [*fitting.notes(args.options, options, card)]


@pytest.mark.parametrize(
    ("preset", "flags", "batch"),
    [
        ("smoke", [], 16),
        ("celeba-64", [], 40),
        ("day2night-64", ["--target-domain", "night"], 10),
        ("day2night-64", ["--num-workers", "1:3", "--max-train-images", "7"], 7),
        ("attribute-classifier", [], 40),
    ],
)
def test_a_presets_batch_is_no_larger_than_the_data(tmp_path, preset, flags, batch):
    dataset = unpaired(tmp_path / "set", *(0,) * 30, *(1,) * 10, val=(0, 1))
    options, said = options_on(dataset, preset, *flags)
    asked = PRESETS[preset].options.global_batch_size
    assert options.global_batch_size == batch
    assert [line for line in said if "batch" in line] == (
        []
        if batch == asked
        else [f"too few training rows for the preset's batch of {asked}: --global-batch-size {batch}"]
    )
    with pytest.raises(InputError, match=r"256 is more than the \d+ training rows.*; give at most \d+"):
        options_on(dataset, preset, *flags, "--global-batch-size", "256")


def test_a_run_too_short_for_its_learning_rate_says_so(tmp_path):
    dataset = unpaired(tmp_path / "set", *(0, 1) * 10)
    assert options_on(dataset, "smoke")[1] == []
    said = options_on(dataset, "celeba-64")[1]
    assert "with --epochs 54 training ends after 54 of the 200 steps over which the learning rate rises" in said[-1]


@pytest.mark.parametrize(
    ("preset", "flags", "domains", "expected"),
    [
        ("demo", [], ("Day", "Night"), "Night"),
        (
            "demo",
            [],
            ("a", "b"),
            "which toy does not have; say what to make, with --target-domain a or --target-domain b",
        ),
        ("demo", [], ("x y", "b"), "with --target-domain 'x y' or --target-domain b"),
        ("demo", ["--target-domain", "b"], ("a", "b"), "b"),
        ("demo", ["--target-domain", "B"], ("a", "b"), "--target-domain: unknown domain 'B'"),
        ("demo", ["--method", "attributes"], ("a", "b"), None),
        ("smoke", [], ("a", "b"), None),
    ],
)
def test_a_preset_aims_at_a_domain_that_is_there(tmp_path, preset, flags, domains, expected):
    dataset = unpaired(tmp_path / "set", *(0, 1) * 16, names=domains)
    if expected is None or expected in domains:
        assert options_on(dataset, preset, *flags)[0].target_domain == expected
        return
    with pytest.raises(InputError) as error:
        options_on(dataset, preset, *flags)
    assert expected in str(error.value)


@pytest.fixture(scope="module")
def origin_run(tmp_path_factory) -> Path:
    """A checkpoint, untrained, of a network for 32 px that makes night and dusk, under another licence."""
    folder = tmp_path_factory.mktemp("origin")
    unet = dataclasses.replace(PRESETS["smoke"].options.unet, num_res_blocks=2, attn_resolutions=(16,))
    config = ModelConfig(
        image_size=32,
        domains=("night", "dusk"),
        unet=unet,
        diffusion=DiffusionConfig(prediction="v", max_snr=7.0),
        data=DataCard(name="before", licence="CC-BY-4.0"),
    )
    torch.manual_seed(3)
    network = checkpoint.build(config)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    for name, content in checkpoint.files(network.state_dict(), config).items():
        storage.write_bytes(str(folder / name), content)
    return folder


@pytest.mark.slow
def test_a_run_begins_with_anothers_weights_and_ends_the_same_when_it_was_interrupted(
    dataset_folder, origin_run, tmp_path, capsys
):
    """On images of another size, with one domain in common; the origin is gone when it goes on."""
    gone = shutil.copytree(origin_run, tmp_path / "origin")
    begin = [*HERE, "--init-from", str(gone), "--max-train-images", "16"]
    assert run(dataset_folder, tmp_path / "whole", *begin) == 0
    assert f"begins with the weights of {gone} (before: night, dusk); new here: day; licence CC0 + CC-BY-4.0" in (
        capsys.readouterr().err
    )
    assert run(dataset_folder, tmp_path / "run", *begin, "--epochs", "1") == 0
    shutil.rmtree(gone)
    assert run(dataset_folder, tmp_path / "run", *begin) == 0
    resumed = weights(tmp_path / "run")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, resumed[name]), name
    found = checkpoint.load(str(tmp_path / "run"))
    assert (found.config.unet.num_res_blocks, found.config.unet.attn_resolutions) == (2, (8,))  # the same level
    assert (found.config.diffusion.prediction, found.config.diffusion.max_snr) == ("v", 7.0)
    assert found.config.data.licence == "CC0 + CC-BY-4.0"
    assert "began with the weights of" in Path(found.path, "card.md").read_text()


@pytest.mark.slow
def test_several_workers_begin_with_anothers_weights_from_a_bucket(
    dataset_folder, origin_run, ray_cluster, s3, tmp_path
):
    """As one process with the same weights on its disk, to rounding: whole and shared among the workers."""
    uri = f"{s3.uri}/{tmp_path.name}/origin"
    for name in storage.list_files(str(origin_run)):
        storage.write_bytes(f"{uri}/{name}", storage.read_bytes(f"{origin_run}/{name}"))
    flags = ["--max-train-images", "16", "--epochs", "1", *LENGTHS]
    assert run(dataset_folder, tmp_path / "here", *HERE, *flags, "--init-from", str(origin_run)) == 0
    for parallel in ("ddp", "fsdp"):
        workers = ["--num-workers", "2", "--parallel", parallel]
        assert run(dataset_folder, tmp_path / parallel, *workers, *flags, "--init-from", uri) == 0
        assert_alike(tmp_path / "here", tmp_path / parallel)
        assert checkpoint.read_config(str(tmp_path / parallel)).origin.checkpoint == uri


def test_what_begins_with_anothers_weights_has_them_and_knows_domains_by_name(origin_run):
    options = dataclasses.replace(PRESETS["smoke"].options, init_from=str(origin_run))
    options = origin.adopted(options, 16, "/nowhere", ())
    config = dataclasses.replace(config_for(options), domains=("day", "night"))
    config = origin.with_origin(config, options, "/nowhere")
    torch.manual_seed(0)
    network = checkpoint.build(config)
    fresh = network.domain_embedding.weight.detach().clone()
    origin.begin(network, config)
    there = checkpoint.load(str(origin_run)).model.state_dict()
    labels = there.pop("domain_embedding.weight")
    for name, tensor in there.items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert torch.equal(network.domain_embedding.weight, torch.stack([fresh[0], labels[0], labels[2]]))
    other = dataclasses.replace(config, origin=dataclasses.replace(config.origin, fingerprint="another"))
    with pytest.raises(InputError, match="holds other weights than when this run was first begun with them"):
        origin.begin(network, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--unet.num-res-blocks", "1"],
            "--unet.num-res-blocks: the network of --init-from {origin} has 2, not 1; leave",
        ),
        (["--unet.source-mask"], "--unet.source-mask: the network of --init-from {origin} has False, not True"),
        (
            ["--diffusion.prediction", "eps"],
            "--diffusion.prediction: the network of --init-from {origin} has v, not eps",
        ),
        (["--method", "cyclegan"], "--init-from has no effect with --method cyclegan; leave it out"),
        (["--init-from", "/nowhere"], "--init-from /nowhere: no checkpoint here"),
        (["--init-from", ""], "--init-from is empty"),
        (["--unet.num-res-blocks", "2", "--unet.dropout", "0.1", "--diffusion.loss", "mse"], None),
    ],
)
def test_what_cannot_be_begun_with_is_named(dataset_folder, origin_run, tmp_path, flags, message):
    args = train.parse(
        [*SMOKE, "--data", dataset_folder, "--output", str(tmp_path), "--init-from", str(origin_run), *flags]
    )
    card = read_card(dataset_folder)

    def configured() -> TrainOptions:
        options = checks.with_absolute_uris(args.options)
        options = fitting.fitted(options, card, dataset_folder, str(tmp_path), preset="smoke", given=args.given)
        checks.configured(dataclasses.replace(args, options=options), dataset_folder)
        return options

    if message is None:
        assert (configured().unet.dropout, configured().diffusion.loss) == (0.1, "mse")
        return
    with pytest.raises(InputError) as error:
        configured()
    assert message.format(origin=origin_run) in str(error.value)


@pytest.mark.parametrize(
    ("flags", "name", "there", "remedy"),
    [
        (["--use-gpu"], "GPU", 0, "--use-gpu: there is no GPU here that Ray knows of; leave it out to train on CPUs"),
        (["--use-gpu", "--num-workers", "3"], "GPU", 2, "needs 3 GPUs, the cluster has 2: give --num-workers 2 or"),
        (["--cpus-per-worker", "4"], "CPU", 2, "needs 4 CPUs, the cluster has 2: give --cpus-per-worker 2 or fewer"),
        (
            ["--cpus-per-worker", "2", "--num-workers", "4"],
            "CPU",
            5,
            "needs 8 CPUs, the cluster has 5: give --num-workers 2",
        ),
        ([], "CPU", 0, "needs 1 CPUs, the cluster has 0: give --num-workers 0"),
    ],
)
def test_the_remedy_for_too_small_a_cluster_helps(flags, name, there, remedy):
    args = train.parse(["--data", "x", "--output", "y", *flags])
    assert remedy in driver.no_room(args, name, driver.resources_per_worker(args)[name], there)


def test_few_training_rows_are_of_every_domain(tmp_path, monkeypatch):
    """Ids of folders begin with the domain's name: the first so many would be of one."""
    monkeypatch.setenv(cache.ROOT, str(tmp_path / "cache"))
    rows = cache.load(unpaired(tmp_path / "set", *(0,) * 30, *(1,) * 30), "train")
    config = ModelConfig(image_size=16, domains=("day", "night"))
    for most, each in ((20, 10), (100, 30)):
        kept = training_rows(rows, config, dataclasses.replace(PRESETS["smoke"].options, max_train_images=most))
        assert np.bincount(rows.domain[kept]).tolist() == [each, each]


def test_a_run_on_data_that_changed_is_told_apart(tmp_path):
    first, second = (unpaired(tmp_path / str(i), *(0, 1) * (16 + i)) for i in range(2))
    args = train.parse(["--data", first, "--output", str(tmp_path / "run"), "--preset", "smoke"])
    old, new = (checks.model_config(read_card(uri), args.options) for uri in (first, second))
    for name, content in describe(args.output, old).items():
        storage.write_bytes(f"{args.output}/{name}", content)
    assert not checks.finished(args.output, old, args.options)
    with pytest.raises(InputError, match=r"holds a run on other data .* it was replaced or appended to since"):
        checks.finished(args.output, new, args.options)


def test_more_workers_than_the_cluster_has_are_refused_with_the_arithmetic(ray_cluster, dataset_folder, tmp_path):
    with pytest.raises(InputError, match="needs 16 CPUs, the cluster has 4: give --num-workers 4 or fewer"):
        run(dataset_folder, tmp_path / "run", "--num-workers", "16")
    with pytest.raises(InputError, match="--use-gpu: there is no GPU here that Ray knows of; leave it out"):
        run(dataset_folder, tmp_path / "run", "--use-gpu")


def test_a_folder_with_something_else_is_not_overwritten(dataset_folder, tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="not a ddpm-translate checkpoint's"):
        run(dataset_folder, tmp_path)


def test_learning_rate():
    options = PRESETS["demo"].options
    peak, warmup = options.optim.learning_rate, options.optim.warmup_steps
    assert loop.learning_rate(options, 0, 1000) == pytest.approx(peak / warmup, rel=1e-3)
    assert loop.learning_rate(options, 500, 1000) == pytest.approx(peak / 2)
    assert loop.learning_rate(options, 999, 1000) < peak * 1e-4
    constant = TrainOptions()
    assert loop.learning_rate(constant, 10_000, 10_000) == constant.optim.learning_rate


@pytest.mark.parametrize("comparable", [True, False])
def test_the_best_checkpoint_is_the_last_where_losses_do_not_compare(tmp_path, comparable):
    """A generator that copies has CycleGAN's lowest loss: the untrained one must not stay the best for ever."""
    run = Run(str(tmp_path), ModelConfig(), files=checkpoint.files, comparable=comparable)
    ema = EMA(torch.nn.Linear(1, 1), sigma_rels=(0.1,))
    for step, loss in ((1, 0.1), (2, 0.3)):
        run.save(step, ema.state_dict(), {}, strict=True)
        run.promote({"step": step, "epoch": step, "loss": loss, "ema_sigma_rel": 0.1}, of_epochs=2)
    run.stored(strict=True)
    best = read_best(str(tmp_path))
    assert best["checkpoint"] == f"checkpoints/step-{1 if comparable else 2:08d}"
    assert best["epochs"] == 2
    kept = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert kept == ({"step-00000001", "step-00000002"} if comparable else {"step-00000002"})


# -- a run that goes wrong says so ----------------------------------------------------------------------------------


def drawn_images(kind: str) -> tuple[Any, ...]:
    """Sources, results, sides, counterparts and results of other noise of a network that fails in this way."""
    rng = np.random.default_rng(0)
    sources, truths, noise = rng.integers(0, 256, (3, 6, 8, 8, 3)).astype(np.uint8)
    made = {
        "good": truths,
        "copies": np.clip(sources.astype(int) + 1, 0, 255).astype(np.uint8),
        "collapses": np.repeat(truths[:1], 6, axis=0),
        "ignores": noise,
    }[kind]
    again = {"ignores": truths[:2]}.get(kind, made[:2])
    return sources, made, np.zeros(6, np.int64), truths, again


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("good", None),
        ("copies", "the outputs equal their sources so far: more guidance"),
        ("collapses", "all outputs are nearly the same so far"),
        ("ignores", "outputs of one source differ as much as those of different sources so far: it is ignored"),
    ],
)
@pytest.mark.parametrize("with_truths", [True, False])
def test_outputs_that_say_that_something_is_wrong(kind: str, told: str | None, with_truths: bool) -> None:
    sources, made, domains, truths, again = drawn_images(kind)
    row = validation.behaviour(sources, made, domains, truths if with_truths else None, again)
    said = validation.warnings_of(row, ModelConfig(image_size=8, domains=("day", "night")))
    assert (not said) if told is None else (len(said) == 1 and said[0].startswith(told))


def test_the_likely_cause_is_that_of_the_run() -> None:
    small = ModelConfig(image_size=8, domains=("day", "night"))
    row = {"change": 1.0, "counterpart_change": 40.0}
    masked = dataclasses.replace(small, unet=dataclasses.replace(small.unet, source_mask=True))
    edited = dataclasses.replace(small, sampling=dataclasses.replace(small.sampling, start="sdedit", strength=0.2))
    itself = dataclasses.replace(small, data=dataclasses.replace(small.data, pairing="self"))
    for config, cause in ((masked, "--unet.no-source-mask"), (edited, "--sampling.strength"), (itself, "jobs.recipe")):
        assert cause in validation.warnings_of(row, config)[0]
    assert "the same images" in validation.warnings_of({"change": 1.0, "counterpart_change": 0.0}, small)[0]
    assert validation.warnings_of({"loss": 1.0}, small) == []  # an encoder draws nothing


def test_a_run_whose_outputs_equal_its_sources_says_so(
    dataset_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validation.Validation, "_translated", lambda self, translate, sources, domains, seed: sources)
    assert run(dataset_folder, tmp_path / "run", "--epochs", "1", *HERE) == 0
    assert "warning: the outputs equal their sources so far" in capfd.readouterr().err
    assert metrics_of(tmp_path / "run")[-1]["change"] == 0
    assert "the outputs equal their sources so far" in (tmp_path / "run" / "report.html").read_text()
