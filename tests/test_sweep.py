"""Sweeps: what is refused before they start, a whole one on the session's Ray, and what its folder is good for."""

import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console

from ddpm_core import checkpoint, images, storage
from ddpm_core import config as configs
from ddpm_core.config import DiffusionConfig, ModelConfig
from ddpm_core.errors import InputError
from jobs import sweep, train, translate
from jobs.common import cli
from jobs.datasets.format import read_card
from jobs.evaluation.plan import EvaluateArgs, plan_evaluation
from jobs.reports import metric_table
from jobs.training import checks
from jobs.training.driver import fit
from jobs.training.options import TrainArgs, TrainOptions
from jobs.translation.options import SamplingOverrides
from jobs.tuning import sampling_trial, study, terminal, training_trial
from jobs.tuning.choice import nearest_to_ideal, pareto_front
from jobs.tuning.plan import FORMAT, OBJECTIVES, described, plan_sweep, same_as_before, spaces
from jobs.tuning.runner import arithmetic, num_slots
from jobs.tuning.sampling_trial import Measured


def command(data: str, output: Path | str, *more: str) -> list[str]:
    return ["--preset", "smoke", "--data", data, "--output", str(output), *more]


SEARCHED = (
    "optim.learning_rate=2e-4,2e-3,100",  # the last one diverges
    "unet.injection=concat,anchor",
    "unet.anchor_channels=16,40",  # more than the network's channels: fails where there is an anchor
)
FLAGS = [
    *("--epochs", "3", "--max-concurrent", "2", "--early-stopping", "asha", "--grace-epochs", "1"),
    *("--search", "random", "--search-seed", "7", "--num-images", "8"),
    *("--space", *SEARCHED, "sampling.num_steps=1:4"),
]


HERE = ("--num-workers", "0")
"""One trial after the other in this process, without Ray."""


@pytest.fixture(scope="module")
def swept(dataset_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole sweep in this process: four trainings, three sampling trials."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    argv = command(dataset_folder, output, *FLAGS, *HERE, "--num-trials", "4", "--num-points", "3")
    assert sweep.main(argv) == cli.DONE
    return output


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def model_of(run: Path) -> ModelConfig:
    return checkpoint.read_config(str(run))


# -- a whole one ----------------------------------------------------------------------------------------------------


def test_ray_tune_and_this_process_find_the_same(ray_cluster: None, dataset_folder: str, tmp_path: Path) -> None:
    """A training and two sampling trials, one after the other and two at a time by Ray Tune."""
    flags = ["--epochs", "1", "--early-stopping", "none", "--search", "random", "--num-images", "4"]
    flags += ["--space", "sampling.num_steps=1:3", "--num-trials", "1", "--num-points", "2"]
    flags += ["--max-concurrent", "2"]
    found = {}
    for name, workers in {"here": "0", "ray": "1"}.items():
        argv = command(dataset_folder, tmp_path / name, *flags, "--num-workers", workers)
        assert sweep.main(argv) == cli.DONE
        found[name] = results(tmp_path / name)
    here, there = found["here"], found["ray"]
    for kind in ("trials", "points"):
        assert [row["values"] for row in here[kind]] == [row["values"] for row in there[kind]]
        assert {row["state"] for row in (*here[kind], *there[kind])} == {"complete"}
    for ours, theirs in zip(here["trials"], there["trials"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    for ours, theirs in zip(here["points"], there["points"], strict=True):
        assert theirs["objectives"] == pytest.approx(ours["objectives"], rel=1e-3)
    assert here["best_trial"] == there["best_trial"]
    fresh = [each["again"]["training"]["fresh"]["winner"]["mean"] for each in (here, there)]
    assert fresh[0] == pytest.approx(fresh[1], rel=1e-4)


@pytest.mark.slow
def test_a_trial_that_lags_behind_is_stopped_and_its_report_says_so(dataset_folder: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    argv = command(dataset_folder, output, *HERE, "--epochs", "3", "--grace-epochs", "1", "--num-points", "0")
    argv += ["--space", "optim.learning_rate=1e-8,2e-4", "--search", "random", "--num-trials", "4"]
    assert sweep.main([*argv, "--reduction-factor", "2"]) == cli.DONE
    rows = results(output)["trials"]
    stopped = [row for row in rows if row["state"] == "stopped"]
    assert stopped
    for row in stopped:
        assert row["values"] == {"optim.learning_rate": 1e-8}
        assert row["epochs"] < 3
        assert "Stopped by ASHA" in (output / row["run"] / "report.html").read_text()


def test_what_was_sampled_is_what_was_trained(swept: Path) -> None:
    rows = results(swept)["trials"]
    assert [row["number"] for row in rows] == list(range(4))
    seen = set()
    for row in rows:
        if row["state"] == "failed":  # never began
            continue
        config = model_of(swept / row["run"])
        training = configs.from_dict(TrainOptions, config.training)
        assert training.optim.learning_rate == row["values"]["optim.learning_rate"]
        assert [*config.unet.injection] == row["values"]["unet.injection"]
        assert config.unet.anchor_channels == row["values"]["unet.anchor_channels"]
        seen.add(training.optim.learning_rate)
    assert len(seen) > 1
    assert rows[0]["hand"]
    assert rows[0]["values"] == {
        "optim.learning_rate": 2e-4,
        "unet.injection": ["concat"],
        "unet.anchor_channels": 16,
    }


def test_failures_and_lost_losses_are_results(swept: Path) -> None:
    rows = results(swept)["trials"]
    states = [row["state"] for row in rows]
    assert {"complete", "diverged", "failed"} <= set(states), states
    for row in rows:
        diverges = row["values"]["optim.learning_rate"] == 100
        fails = row["values"]["unet.injection"] == ["anchor"] and row["values"]["unet.anchor_channels"] == 40
        assert (row["state"] == "failed") == fails
        assert (row["state"] == "diverged") == (diverges and not fails)
        if fails:
            assert "anchor-channels is 40" in row["error"]
        elif diverges:
            assert "the losses were lost at step" in row["error"]
        else:
            assert row["epochs"] == (3 if row["state"] == "complete" else row["curve"][-1][0])
            assert row["loss"] == min(loss for _, loss in row["curve"])
            assert row["steps"] == 2 * row["epochs"]


def test_the_best_is_what_the_folder_stands_for(swept: Path, tmp_path: Path) -> None:
    found = results(swept)
    complete = [row for row in found["trials"] if row["state"] == "complete"]
    best = min(complete, key=lambda row: row["loss"])
    assert found["best_trial"] == best["number"]
    loaded = checkpoint.load(str(swept))
    assert loaded.path.startswith(str(swept / best["run"]))
    (chosen,) = [row for row in found["points"] if row["chosen"]]
    sampling = configs.to_dict(loaded.config.sampling)
    point = {**chosen["values"]}
    assert sampling["guidance_interval"] == [point.pop("guidance_low"), point.pop("guidance_high")]
    assert {name: sampling[name] for name in point} == point
    assert 1 <= point["num_steps"] <= 4  # the range that was given

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    from PIL import Image

    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(pictures / "a.png")
    out = tmp_path / "night"
    argv = ["--checkpoint", str(swept), "--input", str(pictures), "--output", str(out), "--domain", "night"]
    assert translate.main([*argv, "--num-workers", "0"]) == cli.DONE
    options = json.loads((out / "run.json").read_text())["options"]
    assert {name: options[name] for name in sampling} == sampling


@pytest.mark.slow
def test_evaluate_takes_it_too(swept: Path, dataset_folder: str, tmp_path: Path) -> None:
    loaded = checkpoint.load(str(swept))
    argv = {"checkpoint": str(swept), "data": dataset_folder, "output": str(tmp_path / "evaluation")}
    job = plan_evaluation(EvaluateArgs(**argv, num_images=4))
    assert job.sampling == loaded.config.sampling != configs.SamplingConfig()
    assert (job.checkpoint_path, job.ema) == (loaded.path, loaded.ema)


def test_the_front_is_what_no_other_point_beats(swept: Path) -> None:
    rows = [row for row in results(swept)["points"] if row["state"] == "complete"]
    rows = [row for row in rows if row["translates"]] or rows
    losses = {row["number"]: (-row["objectives"]["psnr"], row["objectives"]["nfe"]) for row in rows}
    for row in rows:
        mine = losses[row["number"]]
        beaten = any(all(a <= b for a, b in zip(each, mine, strict=True)) and each != mine for each in losses.values())
        assert row["front"] == (not beaten)
    assert all(row["front"] for row in rows if row["chosen"])
    for row in rows:  # without guidance one pass a step, with it two where it acts
        assert row["values"]["num_steps"] <= row["objectives"]["nfe"] <= 2 * row["values"]["num_steps"]


def test_what_a_better_objective_is() -> None:
    lower = {name for name in OBJECTIVES if metric_table.lower_is_better(name)}
    assert lower == {"kid", "nfe"}


def test_the_winners_are_measured_again_where_they_were_not_chosen(swept: Path) -> None:
    again = results(swept)["again"]
    training, sampling = again["training"], again["sampling"]
    assert (training["split"], sampling["split"]) == ("test", "test")
    fresh = training["fresh"]
    assert fresh["winner"]["low"] <= fresh["winner"]["mean"] <= fresh["winner"]["high"]
    assert fresh["difference"]["mean"] == pytest.approx(fresh["winner"]["mean"] - fresh["hand"]["mean"])
    assert fresh["winner"]["mean"] != training["seen"]["winner"]
    assert set(sampling["objectives"]) == {"psnr", "nfe"}
    assert sampling["values"]["hand"]["guidance_scale"] == 1.5
    page = (swept / "report.html").read_text()
    assert "weights.png" not in page
    assert page.count("data:image/svg+xml") > 5


def test_the_same_command_again_does_nothing(
    swept: Path, dataset_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in swept.rglob("*") if path.is_file()}

    before = times()
    argv = command(dataset_folder, swept, *FLAGS, *HERE, "--num-trials", "4", "--num-points", "3")
    assert sweep.main(argv) == cli.DONE
    assert "tuned already" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds a sweep with --search random, this command says tpe"):
        sweep.main([*argv, "--search", "tpe"])
    assert times() == before


@pytest.mark.slow
def test_a_checkpoint_alone_can_be_tuned_and_more_points_are_only_more_points(
    dataset_folder: str, checkpoint_folder: str, tmp_path: Path
) -> None:
    output, given = tmp_path / "sampled", tmp_path / "given"
    shutil.copytree(checkpoint_folder, given)
    argv = command(dataset_folder, output, "--checkpoint", str(given), "--num-images", "4")
    argv += [*HERE, "--space", "sampling.num_steps=1:3", "--num-points"]
    assert sweep.main([*argv, "2"]) == cli.DONE
    first = results(output)
    assert (len(first["trials"]), len(first["points"])) == (0, 2)
    assert checkpoint.load(str(output)).fingerprint == checkpoint.load(str(given)).fingerprint
    page = (output / "report.html").read_text()
    assert ": sweep from a checkpoint</title>" in page
    assert "Options that all trials share" not in page  # of trials there are none
    assert sweep.main([*argv, "3"]) == cli.DONE
    points = results(output)["points"]
    assert len(points) == 3
    kept = ("number", "values", "objectives", "seconds")
    assert [{name: row[name] for name in kept} for row in points[:2]] == [
        {name: row[name] for name in kept} for row in first["points"]
    ]
    shutil.rmtree(given)  # as by a run that trains on
    assert checkpoint.load(str(output)).path == str(output / "checkpoints/given")


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-trials", "0"], "--num-trials is 0; it must lie between 1 and 100,000"),
        (["--reduction-factor", "1"], "--reduction-factor is 1"),
        (["--grace-epochs", "5"], "--grace-epochs 5 is more than the 2 epochs"),
        (["--space", "optim.learning_rate=0.1:-1"], "low before high"),
        (
            ["--space", "global_batch_size=16,64"],
            "--space global_batch_size = 64: --global-batch-size 64 is more than the 32",
        ),
        (["--space", "unet.head_channels=32,24"], "--space unet.head_channels = 24: unet.model-channels is 32"),
        (["--space", "gan.l1_weight=1:2"], "gan.l1-weight has no effect with --method diffusion"),
        (
            ["--space", "sampling.guidance_scale=-1:2"],
            r"--space sampling.guidance_scale = -1.0: sampling.guidance-scale",
        ),
        (["--space", "sampling.ema=0.05,0.1"], "--space sampling.ema = 0.05: the checkpoint keeps 0.1"),
        (["--space", "sampling.guidance_low=0:0.8"], "they must not meet"),
        (["--method", "cyclegan", "--pairing", "unpaired"], "its validation loss says nothing"),
        (["--method", "pix2pix", "--space", "sampling.guidance_scale=1:2"], "pix2pix, which does not sample"),
        (["--domain", "dusk"], "unknown domain 'dusk'"),
        (["--prefer", "fid=2"], "--prefer fid=2"),
        (["--prefer", "kid=much"], "write kid=WEIGHT"),
        (["--num-workers", "-1"], "--num-workers is -1; it must lie between 0 and 4,096"),
        (["--identity-net", "/nowhere/net.pt"], "--identity-net"),
        (["--checkpoint", "/nowhere"], "/nowhere"),
        (["--checkpoint", "CHECKPOINT", "--num-trials", "3"], "nothing is trained then"),
        (["--checkpoint", "CHECKPOINT", "--space", "flip=true,false"], "nothing is trained then"),
        (["--checkpoint", "CHECKPOINT", "--num-points", "0"], "nothing left to do"),
        (["--num-images", "1"], "--num-images is 1"),
        (["--space", "flip=true,false", "--space", "sampling.eta=0:1"], "--space is given 2 times"),
        (["--grace-epochs", "1", "--early-stopping", "none"], "--grace-epochs has no effect"),
        (["--num-points", "0", "--domain", "night"], "--domain has no effect with --num-points 0"),
        (["--prefer", "flip_rate=2"], "--prefer flip_rate: sampling trials are judged by"),
        (["--lerning-rate", "1"], "lerning-rate"),
    ],
)
def test_wrong_input_is_told_before_anything_starts(
    flags: list[str], said: str, dataset_folder: str, checkpoint_folder: str, tmp_path: Path
) -> None:
    flags = [checkpoint_folder if word == "CHECKPOINT" else word for word in flags]
    with pytest.raises(InputError, match=said) as raised:
        plan_sweep(sweep.parse(command(dataset_folder, tmp_path / "out", *flags)))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(dataset_folder: str, tmp_path: Path) -> None:
    def told(output: Path, *flags: str) -> bool:
        job = plan_sweep(sweep.parse(command(dataset_folder, output, *flags)))
        return same_as_before(job, described(job))

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"format": "ddpm-translate"}')
    (run / "environment.json").write_text("{}")
    with pytest.raises(InputError, match="holds a run"):
        told(run)
    other = tmp_path / "other"
    other.mkdir()
    (other / "sweep.json").write_text("[]")
    with pytest.raises(InputError, match="is not this program's"):
        told(other)
    (other / "sweep.json").write_text(json.dumps({"format": FORMAT, "format_version": 99}))
    with pytest.raises(InputError, match="format version 99"):
        told(other)
    assert not told(tmp_path / "nothing")
    job = plan_sweep(sweep.parse(command(dataset_folder, other)))
    (other / "sweep.json").write_text(json.dumps(described(job)))
    assert told(other)
    assert not told(other, "--prefer", "kid=2")  # the same trials, another choice among them


# -- room -----------------------------------------------------------------------------------------------------------


def nodes(*resources: dict[str, float], dead: int = 0) -> list[dict[str, Any]]:
    alive = [{"Alive": True, "Resources": each} for each in resources]
    return [*alive, *[{"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}] * dead]


@pytest.mark.parametrize(
    ("there", "worker", "slots"),
    [
        (nodes({"CPU": 4.0}), {"CPU": 1}, 4),
        (nodes({"CPU": 3.0}, {"CPU": 3.0}), {"CPU": 2}, 2),  # not three: a worker is whole on one node
        (nodes({"CPU": 1.0}, {"CPU": 1.0}), {"CPU": 2}, 0),
        (nodes({"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}), {"CPU": 4, "GPU": 1}, 2),
        (nodes({"CPU": 6.0, "GPU": 8.0}), {"CPU": 4, "GPU": 1}, 1),
        (nodes({"CPU": 2.0}, dead=1), {"CPU": 1}, 2),
        (nodes({}), {"CPU": 1}, 0),
    ],
)
def test_workers_fit_on_nodes_not_on_sums(there: list[dict[str, Any]], worker: dict[str, float], slots: int) -> None:
    assert num_slots(there, worker) == slots


def test_the_arithmetic_is_shown() -> None:
    said = arithmetic(nodes({"CPU": 3.0}, {"CPU": 3.0}), {"CPU": 2}, 2)
    assert said == "6 CPUs on 2 nodes: room for 2 workers of 2 CPUs; a trial takes 2, so 1 at a time"


def test_a_trial_that_never_fits_is_refused_at_once(ray_cluster: None, dataset_folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs \d+ CPUs, the cluster has 4"):
        sweep.main(command(dataset_folder, tmp_path / "out", "--num-workers", "3", "--cpus-per-worker", "2"))


# -- the choice -----------------------------------------------------------------------------------------------------


def test_the_nearest_to_the_ideal_point() -> None:
    front = [
        {"kid": 0.10, "psnr": 20.0, "nfe": 100.0},  # best in one
        {"kid": 0.12, "psnr": 23.0, "nfe": 20.0},  # good in all
        {"kid": 0.30, "psnr": 24.0, "nfe": 20.0},
        {"kid": 0.90, "psnr": 12.0, "nfe": 2.0},
    ]
    assert nearest_to_ideal(front, {}) == 1
    assert nearest_to_ideal(front, {"kid": 50.0}) == 0
    assert nearest_to_ideal(front, {"psnr": 50.0}) == 2
    assert nearest_to_ideal(front, {"nfe": 50.0}) == 3
    assert nearest_to_ideal(front[:1], {}) == 0
    # by hand, in units of (median - best): kid (.21 - .10), psnr (24 - 21.5), log nfe (log 20 - log 2)
    by_hand = []
    for point in front:
        behind = ((point["kid"] - 0.1) / 0.11, (24 - point["psnr"]) / 2.5, math.log(point["nfe"] / 2) / math.log(10))
        by_hand.append(math.hypot(*behind))
    assert by_hand.index(min(by_hand)) == 1


def test_the_front_of_points() -> None:
    points = [
        {"kid": 0.1, "psnr": 20.0},
        {"kid": 0.1, "psnr": 21.0},
        {"kid": 0.2, "psnr": 21.0},
        {"kid": 0.3, "psnr": 22.0},
    ]
    assert pareto_front(points) == [1, 3]
    assert pareto_front([points[0], points[0]]) == [0, 1]  # equals do not beat each other


def measured(num: int, *, kid: float, **of_each: float) -> Measured:
    noise = np.linspace(-1e-3, 1e-3, num)
    kids = kid + noise if num >= 20 else np.zeros(0)
    return Measured({name: value + noise for name, value in of_each.items()}, kids, 10.0)


@pytest.mark.parametrize("num", [8, 40])
def test_what_is_better_than_its_source_in_nothing_is_no_translation(num: int) -> None:
    source = measured(num, kid=0.13, psnr=23.8, flip_rate=0.05)
    for better, expected in [
        ({}, False),
        ({"psnr": 23.0}, False),
        ({"psnr": 24.0}, True),
        ({"flip_rate": 0.9, "psnr": 20.0, "kid": 0.2}, True),
        ({"identity_cosine": 1.0, "psnr_to_source": 99.0}, False),
    ]:
        assert (
            measured(num, **{"kid": 0.13, "psnr": 23.8, "flip_rate": 0.05, **better}).improves_on(source, seed=0)
            == expected
        )
    assert measured(num, kid=0.12, psnr=23.8).improves_on(source, seed=0) == (num == 40)
    assert Measured({"psnr_to_source": np.ones(num)}, np.zeros(0), 1.0).improves_on(source, seed=0)  # nobody can tell


@pytest.mark.parametrize("all_copy", [False, True])
def test_a_copy_of_the_source_is_never_chosen(
    all_copy: bool, swept: Path, dataset_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Low weights copy here: nearest to the source in the fewest evaluations, and yet behind all that translate."""

    class Fake:
        setting = SimpleNamespace(seed=0)
        source = measured(40, kid=0.13, psnr=13.0)

        def __call__(self, values: dict[str, Any]) -> Measured:
            if all_copy or values["guidance_scale"] < 2:
                return dataclasses.replace(self.source, nfe=1.0)
            return measured(40, kid=0.3, psnr=13.0 + values["guidance_scale"])

    def again(setting: Any, values: dict[str, Any], columns: Any) -> tuple[dict[str, Measured], bytes]:
        return {name: Fake()(each) for name, each in values.items()}, images.encode_png(np.zeros((4, 4, 3), np.uint8))

    monkeypatch.setattr(sampling_trial, "evaluator", lambda setting: Fake())
    monkeypatch.setattr(sampling_trial, "measure_again", again)
    argv = ["--checkpoint", str(swept), "--data", dataset_folder, "--output", str(tmp_path / "out"), *HERE]
    argv += ["--num-points", "8", "--num-images", "4", "--space", "sampling.guidance_scale=1:4"]
    assert sweep.main(argv) == cli.DONE
    found = results(tmp_path / "out")
    translating = {row["number"]: row["values"]["guidance_scale"] >= 2 and not all_copy for row in found["points"]}
    assert len(set(translating.values())) == 2 - all_copy
    assert {row["number"]: row["translates"] for row in found["points"]} == translating
    chosen = next(row for row in found["points"] if row["chosen"])
    assert chosen["translates"] != all_copy
    assert ("no point is better than the source itself" in found["message"]) == all_copy
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the source itself" in page


def test_an_outlier_does_not_flatten_what_is_good() -> None:
    good = [{"kid": 0.10, "psnr": 20.0}, {"kid": 0.11, "psnr": 23.0}, {"kid": 0.20, "psnr": 23.5}]
    assert nearest_to_ideal(good, {}) == 1
    assert nearest_to_ideal([*good, {"kid": 50.0, "psnr": 23.6}], {}) == 1


def test_trials_that_were_stopped_say_what_matters_too() -> None:
    """Only the first of forty ended: of it alone nothing could be told."""
    found = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(40):
        trial = found.ask()
        loss = abs(math.log10(trial.suggest_float("optim.learning_rate", 1e-5, 1e-1, log=True)) + 3)
        trial.suggest_float("unet.dropout", 0.0, 0.3)
        ending = study.Ending("stopped" if number else "complete", None if number else (loss,), {"loss": loss})
        study.tell(found, trial, ending)
    shares = study.importance(found, None)
    assert shares["optim.learning_rate"] > 0.8


def test_equal_objectives_do_not_count() -> None:
    assert nearest_to_ideal([{"kid": 0.2, "nfe": 10.0}, {"kid": 0.1, "nfe": 10.0}], {}) == 1


def test_what_was_seen_twice_is_compared_image_by_image() -> None:
    random = np.random.default_rng(0)
    base = random.normal(20, 5, 400)
    ours = Measured({"psnr": base + 1 + random.normal(0, 0.1, 400)}, np.full(200, 0.1), 10.0)
    theirs = Measured({"psnr": base}, np.full(200, 0.3), 50.0)
    found = sampling_trial.compared(ours, theirs, seed=0)
    assert found["psnr"]["difference"].mean == pytest.approx(1, abs=0.02)
    assert found["psnr"]["difference"].high - found["psnr"]["difference"].low < 0.03  # not the images' own spread
    assert found["kid"]["difference"].mean == pytest.approx(-0.2)
    assert found["nfe"]["difference"].mean == -40.0


# -- the measure ----------------------------------------------------------------------------------------------------


def test_trials_over_the_loss_are_measured_by_one_loss(dataset_folder: str, tmp_path: Path) -> None:
    argv = command(dataset_folder, tmp_path / "out", "--space", "diffusion.huber_delta=0.01:1:log")
    job = plan_sweep(sweep.parse(argv))
    assert job.options.validation_loss_config == DiffusionConfig()
    plain = plan_sweep(sweep.parse(command(dataset_folder, tmp_path / "out")))
    assert plain.options.validation_loss_config is None


@pytest.mark.slow
def test_a_smaller_delta_is_not_a_smaller_loss(dataset_folder: str, tmp_path: Path) -> None:
    """Two trainings at a learning rate of next to nothing: the same network, whatever the loss says of it."""
    losses = {}
    for name, measured_by in {"own": None, "one": DiffusionConfig()}.items():
        for delta in (0.01, 1.0):
            base = train.parse(command(dataset_folder, "x", "--epochs", "1", "--optim.learning-rate", "1e-12")).options
            values = configs.to_dict(base)
            values["diffusion"]["huber_delta"] = delta
            values["validation_loss_config"] = None if measured_by is None else configs.to_dict(measured_by)
            options = configs.from_dict(TrainOptions, values)
            run = str(tmp_path / f"{name}-{delta}")
            args = TrainArgs(data=dataset_folder, output=run, preset="smoke", num_workers="0", options=options)
            with cli.ray_session(start=False):
                config = checks.model_config(read_card(dataset_folder), options)
                fit(args, config, dataset_folder, run, {})
            losses[name, delta] = training_trial.progress(run)[0][-1][1]
    assert losses["own", 0.01] < 0.2 * losses["own", 1.0]
    assert (
        losses["one", 0.01]
        == pytest.approx(losses["one", 1.0], rel=1e-4)
        == pytest.approx(losses["own", 1.0], rel=1e-4)
    )


# -- the table ------------------------------------------------------------------------------------------------------


TRIAL = {
    "number": 3,
    "state": "stopped",
    "values": {"optim.learning_rate": 0.00123456, "unet.injection": ["concat", "anchor"]},
    "loss": 0.25,
    "epochs": 2,
    "seconds": 75.0,
    "hand": False,
    "error": None,
}


def shown(results: dict[str, Any]) -> str:
    stream = io.StringIO()
    table = terminal.Table(stream)
    table.show(results)
    table.close()
    return stream.getvalue()


def test_a_log_gets_a_line_for_what_has_ended() -> None:
    done = {**TRIAL, "number": 1, "state": "complete", "loss": 0.125}
    running = {**TRIAL, "number": 4, "state": "running"}
    told = shown(
        {"state": "training", "left_s": 90.0, "trials": [done, TRIAL, running], "points": [], "best_trial": None}
    )
    assert "sweep: trial 3 stopped: learning_rate 0.001235, injection concat+anchor; loss 0.25 after 2 epochs" in told
    assert "(best 0.125, trial 1); about 1 min 30 s left" in told
    assert "trials: 1 complete, 1 stopped, 1 running" in told
    assert "trial 4" not in told


def test_a_long_table_shows_the_best_and_the_latest() -> None:
    rows = [{**TRIAL, "number": n, "state": "complete", "loss": 1 / (1 + n % 30)} for n in range(60)]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(terminal.table({"state": "training", "trials": rows, "points": [], "best_trial": 29}))
    text = console.export_text()
    numbers = [int(found) for found in re.findall(r"^(\d+)", text, re.MULTILINE)]
    assert {29, 59} <= set(numbers)
    assert len(numbers) == terminal.NUM_SHOWN


def test_overrides_and_points_name_the_same_options() -> None:
    """What a sweep tunes is what translate takes by flags."""
    fields = set(vars(SamplingOverrides()))
    point = spaces.sampling_values(configs.SamplingConfig(), None)
    assert fields == {*point, "guidance_interval"} - {"guidance_low", "guidance_high", "ema"}
    assert storage.join("a", "b") == "a/b"
