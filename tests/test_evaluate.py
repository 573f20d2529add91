"""Evaluation: the figures in metrics.json are those of the images, by id, beside their baselines."""

import io
import json
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ddpm_core import checkpoint, encoders, nets
from ddpm_core import config as configs
from ddpm_core.config import GANConfig, ModelConfig, SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator
from jobs import evaluate
from jobs.common import cli, intervals, progress
from jobs.datasets import cache, writing
from jobs.datasets.format import DatasetCard, Pairing, Row
from jobs.evaluation import baselines, driver, journal, summary, worker
from jobs.evaluation import metrics as evaluation_metrics
from jobs.evaluation import plan as evaluation_plan
from jobs.reports.metric_table import METHODS
from jobs.translation.options import GuidanceNets

SIDE = 16


def scene(seed: int) -> np.ndarray:
    """A gradient with a square on it, by day."""
    draw = np.random.default_rng(seed)
    image = np.linspace(60, 220, SIDE)[:, None, None] * np.ones((SIDE, SIDE, 3)) * draw.uniform(0.5, 1, 3)
    top, left = draw.integers(0, SIDE - 5, 2)
    image[top : top + 5, left : left + 5] = draw.integers(0, 256, 3)
    return image.astype(np.uint8)


def by_night(image: np.ndarray) -> np.ndarray:
    return (255 * (image / 255) ** 1.15 * np.array([0.2, 0.25, 0.5])).astype(np.uint8)


def card_of(pairing: str, domains: tuple[str, ...] = ("day", "night")) -> DatasetCard:
    return DatasetCard(
        name="toy",
        licence="CC0",
        source="made up",
        image_size=SIDE,
        encoding="raw",
        domains=domains,
        pairing=pairing,
    )


def write_set(uri: Path, pairing: Pairing, num_test: int = 24) -> Path:
    def rows(split: str, num: int, first: int) -> list[Row]:
        found = []
        for i in range(first, first + num):
            if pairing == "paired":
                target = by_night(scene(i))
                found.append(Row(id=f"{split}-{i:03d}", domain=0, image=scene(i), target=target, target_id="n"))
                continue
            side = i % 2
            image = by_night(scene(i)) if side else scene(i)
            other = None if pairing == "unpaired" else scene(i + 1) if side else by_night(scene(i + 1))
            found.append(Row(id=f"{split}-{i:03d}", domain=side, image=image, target=other))
        return found

    card = card_of(pairing)
    writing.write_dataset(str(uri), {"train": rows("train", 40, 0), "test": rows("test", num_test, 100)}, card)
    return uri


def command(checkpoint_folder: str, dataset: Path, output: Path, *more: str) -> list[str]:
    where = ["--checkpoint", checkpoint_folder, "--data", str(dataset), "--output", str(output)]
    return [*where, "--num-workers", "1", *more]


HERE = ("--num-workers", "0")
"""In this process, without Ray."""


def read(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def test_images_are_chosen_evenly() -> None:
    assert evaluation_plan.spread(10, 0) == list(range(10))
    assert evaluation_plan.spread(3, 10) == [0, 1, 2]
    assert evaluation_plan.spread(100, 4) == [12, 37, 62, 87]


def test_true_pairs_are_measured_to_the_truth(
    tmp_path: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, output = write_set(tmp_path / "set", "paired"), tmp_path / "out"
    argv = command(checkpoint_folder, dataset, output, "--domain", "night", *HERE)
    assert evaluate.main(argv) == cli.DONE
    assert str(output / "report.html") in capsys.readouterr().out
    found = read(output)
    night = found["domains"]["night"]
    assert night["num_images"] == 24

    # every figure again, from the images themselves
    sources = np.stack([scene(i) for i in range(100, 124)])
    truths = by_night(sources)
    results = Translator(checkpoint.load(checkpoint_folder))(sources, "night")
    train = np.stack([scene(i) for i in range(40)])
    color_map = baselines.solve_color_map(baselines.color_moments(train, by_night(train)))
    methods = {"model": results, "copy": sources, "linear": baselines.apply_color_map(color_map, sources)}
    for name, pictures in methods.items():
        values = night["methods"][name]["metrics"]
        assert values["psnr"]["mean"] == pytest.approx(evaluation_metrics.psnr(pictures, truths).mean(), abs=0.02)
        assert values["ssim"]["mean"] == pytest.approx(evaluation_metrics.ssim(pictures, truths).mean(), abs=0.002)
        for value in values.values():
            assert value["low"] <= value["mean"] <= value["high"]
        assert values["psnr"]["low"] < values["psnr"]["mean"] < values["psnr"]["high"]
    assert night["methods"]["linear"]["metrics"]["psnr"]["mean"] > 35  # the night here is nearly a linear map
    assert set(night["methods"]["real"]["metrics"]) == {"kid"}

    # a network with random weights beats nothing, and that is said
    assert "It does not beat a copy of the source in PSNR" in night["headline"]
    against = {(verdict["metric"], verdict["against"]): verdict for verdict in night["verdicts"]}
    assert against["psnr", "a copy of the source"]["better"] is False
    assert against["kid", "the best linear colour map"]["better"] is False

    assert found["sampling"] == configs.to_dict(SamplingConfig(num_steps=2))
    assert found["feature_net"]
    assert found["data"]["licence"] == "CC0"
    grid = Image.open(output / "grid.png")
    assert grid.size[0] == 5 * 128 + 4 * 4  # source, three samples, truth

    # the same again does nothing; other options do not overwrite
    stamp = (output / "metrics.json").stat().st_mtime_ns
    assert evaluate.main(argv) == cli.DONE
    assert "evaluated already" in capsys.readouterr().out
    assert (output / "metrics.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"--num-steps 2, this command says 1"):
        evaluate.main([*argv, "--num-steps", "1"])


@pytest.mark.slow
def test_both_directions_and_few_images(tmp_path: Path, checkpoint_folder: str) -> None:
    dataset, output = write_set(tmp_path / "set", "paired"), tmp_path / "out"
    assert evaluate.main(command(checkpoint_folder, dataset, output, "--num-images", "6", *HERE)) == cli.DONE
    found = read(output)["domains"]
    assert list(found) == ["day", "night"]
    assert found["day"]["num_images"] == found["night"]["num_images"] == 6
    sources = np.stack([scene(100 + i) for i in evaluation_plan.spread(24, 6)])
    expected = evaluation_metrics.psnr(by_night(sources), sources).mean()  # to day, a copy of the night image
    assert found["day"]["methods"]["copy"]["metrics"]["psnr"]["mean"] == pytest.approx(expected)
    assert "kid" not in found["day"]["methods"]["model"]["metrics"]
    assert any("No KID" in note for note in found["day"]["notes"])
    assert (output / "grid-day.png").exists()
    assert (output / "grid-night.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pairing", ["matched", "unpaired"])
def test_without_true_pairs_nothing_claims_a_truth(tmp_path: Path, checkpoint_folder: str, pairing: Pairing) -> None:
    dataset, output = write_set(tmp_path / "set", pairing, num_test=44), tmp_path / "out"
    assert evaluate.main(command(checkpoint_folder, dataset, output, "--domain", "night", *HERE)) == cli.DONE
    night = read(output)["domains"]["night"]
    assert night["num_images"] == night["num_real_images"] == 22  # only day images are turned into night
    assert "linear" not in night["methods"]
    ours, copy = (night["methods"][name]["metrics"] for name in ("model", "copy"))
    assert "psnr" not in ours
    assert "psnr_to_source" in ours
    assert "psnr_to_source" not in copy  # it would be infinite
    assert ("psnr_to_proxy" in ours) == (pairing == "matched")
    assert {verdict["metric"] for verdict in night["verdicts"]} == {"kid"}
    page = (output / "report.html").read_text()
    assert ("proxies" in page) == (pairing == "matched")
    assert ("no pairs" in page) == (pairing == "unpaired")
    assert "the truth" not in page


@pytest.mark.slow
def test_a_gan_takes_the_same_path_and_has_one_result(tmp_path: Path) -> None:
    config = ModelConfig(
        image_size=SIDE,
        domains=("day", "night"),
        target_domains=("night",),
        method="pix2pix",
        gan=GANConfig(channels=4, num_levels=2, num_discriminator_levels=1),
    )
    network = checkpoint.build(config)
    (tmp_path / "gan").mkdir()
    for name, content in checkpoint.files(network.state_dict(), config).items():
        (tmp_path / "gan" / name).write_bytes(content)
    dataset, output = write_set(tmp_path / "set", "paired"), tmp_path / "out"
    assert evaluate.main(command(str(tmp_path / "gan"), dataset, output, "--num-images", "6", *HERE)) == cli.DONE
    found = read(output)
    sources = np.stack([scene(100 + i) for i in evaluation_plan.spread(24, 6)])
    results = Translator(checkpoint.load(str(tmp_path / "gan")))(sources, "night")
    psnr = found["domains"]["night"]["methods"]["model"]["metrics"]["psnr"]["mean"]
    assert psnr == pytest.approx(evaluation_metrics.psnr(results, by_night(sources)).mean(), abs=0.02)
    assert Image.open(output / "grid.png").size[0] == 3 * 128 + 2 * 4  # source, result, truth
    page = (output / "report.html").read_text()
    assert "pix2pix" in page
    assert "noise only" not in page


def test_a_gan_and_a_diffusion_model_are_shown_on_the_same_images() -> None:
    args = evaluation_plan.EvaluateArgs(
        checkpoint="c", data="d", output="o", num_images=40, num_diverse=20, num_train=0
    )
    card = card_of("paired")
    rows = [(f"{i:03}", 0) for i in range(60)]

    def shown(samples: int) -> list[str]:
        plan = evaluation_plan.make_plans(args, card, ("night",), rows, samples)["test"]
        return [name for name, wishes in plan.items() if wishes[0][2] == worker.SHOW]

    assert len(shown(1)) == evaluation_plan.NUM_SHOWN
    assert shown(1) == shown(3)


def test_rows_come_back_by_id_whatever_their_order() -> None:
    job = evaluation_plan.EvaluationJob(
        args=evaluation_plan.EvaluateArgs(checkpoint="c", data="d", output="o", seed=3),
        checkpoint_path="c",
        config=ModelConfig(),
        sampling=ModelConfig().sampling,
        guides=GuidanceNets(),
        judges=worker.Judges(),
        nets={},
        card=card_of("unpaired", domains=("a", "b")),
        domains=("b",),
        options={},
        plans={},
        rows={"x": (0, 7), "y": (0, 8), "z": (0, cache.NOBODY)},
    )
    there = {
        ("b", name, seed): {"model/features": np.array([i, seed], np.float32), "model/psnr": 10.0 + i}
        for seed in (5, 3, 4)
        for i, name in reversed([*enumerate("xyz")])
        if name == "y" or seed == 3
    }
    purposes = {True: worker.SHOW, False: worker.MEASURE}
    found = {(*key, "sample" if key[2] != 3 else purposes[key[1] == "y"]): each for key, each in there.items()}
    found["b", "w", 3, "train"] = found["a", "x", 3, "measure"] = {"real/features": np.zeros(2, np.float32)}
    measured = driver.gather(job, "b", found)
    assert measured.ids == ["x", "y", "z"]
    assert measured.methods["model"]["psnr"].tolist() == [10, 11, 12]
    assert list(measured.samples) == ["y"]
    assert measured.samples["y"].tolist() == [[1, 3], [1, 4], [1, 5]]
    assert measured.train.tolist() == [[0, 0]]
    assert measured.people.tolist() == [7, 8, -3]  # nobody is nobody else
    assert measured.source_domains.tolist() == [0, 0, 0]


# -- the judges


class Sight(torch.nn.Module):
    """Night is dark: one logit of each of day and night."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.always = always

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dark = 70 - images.float().mean((1, 2, 3)) + (1000 if self.always else 0)
        return torch.stack([-dark, dark], dim=1)


class Face(torch.nn.Module):
    """Where an image is brighter or darker than it is on the whole, which the night leaves nearly as it is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(images.float(), 8)
        return ((x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1)).flatten(1)


def save(net: torch.nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(net).save(path)
    return str(path)


@pytest.fixture
def judges(tmp_path: Path) -> list[str]:
    sight, face = save(Sight(), tmp_path / "sight.pt"), save(Face(), tmp_path / "face.pt")
    return ["--classifier", sight, "--identity-net", face]


@pytest.mark.slow
def test_judges_are_right_where_the_answer_is_known(
    tmp_path: Path, checkpoint_folder: str, judges: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "ray_session", lambda **_: pytest.fail("Ray is not needed"))
    dataset, output = write_set(tmp_path / "set", "paired"), tmp_path / "out"
    argv = command(checkpoint_folder, dataset, output, "--domain", "night", "--num-workers", "0", *judges)
    assert evaluate.main(argv) == cli.DONE
    found = read(output)
    night = found["domains"]["night"]
    means = {
        name: {metric: value["mean"] for metric, value in method["metrics"].items()}
        for name, method in night["methods"].items()
    }
    assert means["copy"]["flip_rate"] == 0
    assert means["truth"]["flip_rate"] == means["linear"]["flip_rate"] == 1
    assert means["truth"]["identity_rank_1"] == means["copy"]["identity_cosine"] == 1
    assert {"psnr", "ssim", "perceptual", "kid"}.isdisjoint(means["truth"])
    assert night["instruments"]["classifier_accuracy"]["mean"] == night["instruments"]["identity_rank_1"]["mean"] == 1
    assert night["instruments"]["classifier_accuracy"]["low"] > 0.9  # of 48 images

    # the model's, from its images
    sources = np.stack([scene(i) for i in range(100, 124)])
    results = Translator(checkpoint.load(checkpoint_folder))(sources, "night")
    pixels = [torch.from_numpy(each).permute(0, 3, 1, 2) for each in (results, sources)]
    assert means["model"]["flip_rate"] == (Sight()(pixels[0])[:, 1] > 0).float().mean().item()
    of = [torch.nn.functional.normalize(Face()(each)).double() for each in pixels]
    assert means["model"]["identity_cosine"] == pytest.approx((of[0] * of[1]).sum(1).mean().item(), abs=1e-3)
    first = (of[0] @ of[1].T).argmax(1) == torch.arange(24)
    assert means["model"]["identity_rank_1"] == pytest.approx(first.double().mean().item(), abs=0.05)

    assert found["compute"]["nfe"] == 4  # two steps, each with and without the condition
    assert found["compute"]["num_workers"] == 1
    assert found["nets"]["classifier"]["name"] == "sight.pt, 2-d"
    assert night["num_diverse"] == 24
    assert len(night["shown"]) == 10
    table = pyarrow.parquet.read_table(output / "pictures.parquet").to_pylist()
    ours = [row for row in table if row["method"] == "model"]
    assert [row["id"] for row in ours] == [f"test-{i}" for i in range(100, 124)]
    for metric, mean in means["model"].items():
        if metric != "kid":
            assert np.mean([row[metric] for row in ours]) == pytest.approx(mean)
    halves = pyarrow.parquet.read_table(output / "halves.parquet").to_pylist()
    assert {row["method"] for row in halves} == {"model", "copy", "linear", "real"}
    assert np.mean([row["kid"] for row in halves if row["method"] == "copy"]) == pytest.approx(means["copy"]["kid"])

    # three seeds of each
    features = [
        nets.features(
            nets.feature_net().module, Translator(checkpoint.load(checkpoint_folder))(sources, "night", seed=n)
        )
        for n in range(3)
    ]
    spread = evaluation_metrics.diversity(torch.stack(features, dim=1).numpy())
    assert means["model"]["diversity"] == pytest.approx(spread.mean(), rel=1e-3)
    # other judges are another evaluation
    with pytest.raises(InputError, match=r"--classifier \w+, this command says None"):
        evaluate.main(argv[: argv.index("--classifier")])


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_a_classifier_that_sees_night_everywhere_is_found_out(
    tmp_path: Path, checkpoint_folder: str, pairing: Pairing
) -> None:
    """Its flip rate is perfect."""
    dataset, output = write_set(tmp_path / "set", pairing, num_test=12), tmp_path / "out"
    blind = save(Sight(always=True), tmp_path / "blind.pt")
    argv = command(checkpoint_folder, dataset, output, "--domain", "night", "--num-workers", "0")
    argv += ["--num-diverse", "0", "--num-train", "0"]
    assert evaluate.main([*argv, "--classifier", blind]) == cli.DONE
    night = read(output)["domains"]["night"]
    assert night["methods"]["model"]["metrics"]["flip_rate"]["mean"] == 1
    assert night["instruments"]["classifier_accuracy"]["mean"] == 0.5  # right on night, wrong on day
    assert any("right on 50.0%" in note and "too few to rely on it" in note for note in night["notes"])
    assert "too few to rely on it" in (output / "report.html").read_text()
    assert {"diversity", "copied"}.isdisjoint(night["methods"]["model"]["metrics"])


@pytest.mark.parametrize(("pairing", "number"), [("paired", "1"), pytest.param("matched", "2", marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_figures(
    ray_cluster: None,
    tmp_path: Path,
    checkpoint_folder: str,
    judges: list[str],
    pairing: Pairing,
    number: str,
) -> None:
    dataset = write_set(tmp_path / "set", pairing)
    for where in ("0", number):
        argv = command(checkpoint_folder, dataset, tmp_path / where, "--num-images", "7", "--num-diverse", "3")
        argv += ["--num-train", "8"]
        assert evaluate.main([*argv, *judges, "--batch-size", "3", "--num-workers", where]) == cli.DONE
    here, there = read(tmp_path / "0"), read(tmp_path / number)
    for domain in ("day", "night"):
        ours, theirs = here["domains"][domain], there["domains"][domain]
        assert ours["shown"] == theirs["shown"]
        for name, method in ours["methods"].items():
            assert method["metrics"]
            for metric, value in method["metrics"].items():
                assert theirs["methods"][name]["metrics"][metric] == pytest.approx(value, rel=1e-6, abs=1e-6)
    assert there["compute"]["num_workers"] == int(number)
    assert here["options"] == there["options"]


def write_encoder(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    options = {"kind": "identity", "image_size": 16, "widths": (8, 16), "embedding_channels": 4}
    config = encoders.EncoderConfig(**{**options, **changes})
    torch.manual_seed(seed)
    net = (encoders.AttributeClassifier if config.kind == "attributes" else encoders.IdentityEncoder)(config)
    folder.mkdir()
    for name, content in encoders.encoder_files(net.state_dict(), config).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_teacher_or_a_guide_does_not_judge(tmp_path: Path, checkpoint_folder: str) -> None:
    dataset, out = write_set(tmp_path / "set", "paired"), tmp_path / "out"
    who, other = write_encoder(tmp_path / "who"), write_encoder(tmp_path / "other", seed=1)
    shutil.copytree(who, tmp_path / "copied")  # the same weights elsewhere
    noisy = write_encoder(tmp_path / "noisy", kind="attributes", attributes=("night",), noise_aware=True)
    taught = tmp_path / "taught"
    shutil.copytree(checkpoint_folder, taught)
    config = json.loads((taught / "config.json").read_text())
    config["training"] = {"identity_encoder": str(who), "identity_weight": 0.1}
    (taught / "config.json").write_text(json.dumps(config))

    def refused(folder: Path | str, *flags: str) -> str:
        with pytest.raises(InputError) as error:
            evaluation_plan.plan_evaluation(
                cli.parse(
                    evaluation_plan.EvaluateArgs, command(str(folder), dataset, out, *flags), prog="jobs.evaluate"
                )
            )
        assert "\n" not in str(error.value)
        return str(error.value)

    for judge in (who, tmp_path / "copied"):
        assert "is the encoder of the model's own losses" in refused(taught, "--identity-net", str(judge))
        assert "--feature-net" in refused(taught, "--feature-net", str(judge))
        lead = ["--identity-guidance", str(who)]
        assert "of --identity-guidance" in refused(checkpoint_folder, *lead, "--identity-net", str(judge))
    lead = ["--classifier-guidance", str(noisy)]
    assert "of --classifier-guidance" in refused(checkpoint_folder, *lead, "--classifier", str(noisy))
    shutil.rmtree(who)  # the teacher itself may be gone: its place still tells
    assert evaluation_plan.same_net("identity", str(who), f"{who}/", nets.identity_net(str(other)), ("day", "night"))
    argv = command(str(taught), dataset, out, "--identity-net", str(other))
    job = evaluation_plan.plan_evaluation(cli.parse(evaluation_plan.EvaluateArgs, argv, prog="jobs.evaluate"))
    assert job.nets["identity"] is not None

    assert "identity encoder" in refused(taught, "--classifier", str(other))
    face = save(Face(), tmp_path / "face.pt")
    assert "--classifier: " in refused(taught, "--classifier", face)
    assert "192 values an image" in refused(taught, "--classifier", face)


def test_guides_lead_the_evaluation_too(tmp_path: Path, checkpoint_folder: str) -> None:
    dataset = write_set(tmp_path / "set", "paired", num_test=6)
    noisy = str(write_encoder(tmp_path / "noisy", kind="attributes", attributes=("night",), noise_aware=True))
    guide = ["--classifier-guidance", noisy, "--classifier-scale", "40"]
    found = {}
    for name, flags in {"plain": [], "led": guide}.items():
        argv = command(checkpoint_folder, dataset, tmp_path / name, "--domain", "night", "--num-workers", "0")
        assert evaluate.main([*argv, "--num-diverse", "0", *flags]) == cli.DONE
        found[name] = read(tmp_path / name)
    psnr = [found[name]["domains"]["night"]["methods"]["model"]["metrics"]["psnr"]["mean"] for name in found]
    assert psnr[0] != psnr[1]
    assert found["plain"]["guides"] == {}
    assert found["led"]["guides"] == {"classifier_guidance": noisy, "classifier_scale": 40}
    with pytest.raises(InputError, match="classifier_guidance"):
        evaluate.main(command(checkpoint_folder, dataset, tmp_path / "led", "--domain", "night", "--num-diverse", "0"))


def test_an_evaluation_of_an_earlier_version_is_left_alone(tmp_path: Path, checkpoint_folder: str) -> None:
    dataset, out = write_set(tmp_path / "set", "paired"), tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text(json.dumps({"format_version": 1, "options": {}}))
    with pytest.raises(InputError, match=r"format version 1, this program writes version 2.*new --output"):
        evaluate.main(command(checkpoint_folder, dataset, out))
    (out / "metrics.json").write_text("[]")
    with pytest.raises(InputError, match="not this program's"):
        evaluate.main(command(checkpoint_folder, dataset, out))


# -- what measurements come to


def measured_of(train: np.ndarray, model: np.ndarray, real: np.ndarray) -> summary.Measured:
    count = len(model)
    blank = {"features": np.zeros_like(model)}
    return summary.Measured(
        ids=[f"{i:03d}" for i in range(count)],
        methods={"model": {"features": model}, "copy": blank},
        samples={},
        real=real,
        real_chances=None,
        people=np.arange(count),
        train=train,
        wanted=1,
        source_domains=np.zeros(count, np.int64),
    )


def test_a_model_that_repeats_its_training_images_is_found_out() -> None:
    draw = np.random.default_rng(0)
    train, real, new = (draw.normal(size=(400, 8)).astype(np.float32) for _ in range(3))
    model = np.concatenate([train[:40], new[40:]])
    found = summary.summarise(measured_of(train, model, real), seed=0)
    copied = found.values["model"]["copied"]
    assert copied[:40].all()
    assert copied[40:].mean() < 0.04
    assert found.values["model"]["neighbor_distance"][:40].max() == 0
    assert found.summaries["model"]["copied"].low > 0.05
    told = summary.notes(found, pairing="unpaired", domain="night", num_train=(400, 1000), elsewhere=True)
    assert any("among 400 of 1,000 images of night" in note and "which are not those" in note for note in told)
    assert "fd" not in found.summaries["model"]


def test_what_is_copied_is_not_told_by_a_few_real_images() -> None:
    draw = np.random.default_rng(0)
    train, model = (draw.normal(size=(40, 8)).astype(np.float32) for _ in range(2))
    for num, told in ((3, False), (98, False), (99, True)):
        found = summary.summarise(measured_of(train, model, draw.normal(size=(num, 8)).astype(np.float32)), seed=0)
        assert ("copied" in found.values["model"]) == told
        assert "neighbor_distance" in found.values["model"]
        notes = summary.notes(found, pairing="unpaired", domain="night", num_train=(40, 40), elsewhere=False)
        assert any("copied: nearer" in note for note in notes) == told


def test_a_headline_is_never_empty_and_claims_nothing_of_a_few_images() -> None:
    draw = np.random.default_rng(0)
    ours = 20 + draw.normal(size=40)
    better, worse, even = (
        evaluation_metrics.verdict("psnr", METHODS[name], ours, ours - by * (1 + draw.normal(0, 0.1, 40)))
        for name, by in (("copy", 3.0), ("linear", -3.0), ("copy", 0.0))
    )
    assert summary.headline([better], num_images=40) == "It beats a copy of the source in PSNR."
    assert summary.headline([worse], num_images=40) == "It does not beat the best linear colour map in PSNR."
    assert summary.headline([even], num_images=40) == "There is no clear difference to a copy of the source in PSNR."
    assert "too few to tell good from bad" in summary.headline([better], num_images=3)
    assert "is not known" in summary.headline([], num_images=40)


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_an_evaluation_of_few_images_says_how_little_it_rests_on(
    tmp_path: Path, checkpoint_folder: str, pairing: Pairing, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, output = write_set(tmp_path / "set", pairing, num_test=12), tmp_path / "out"
    argv = command(checkpoint_folder, dataset, output, "--domain", "night", "--num-images", "3", "--num-workers", "0")
    assert evaluate.main([*argv, "--num-diverse", "0"]) == cli.DONE
    assert "This rests on 3 images: too few to tell" in capsys.readouterr().out
    page = (output / "report.html").read_text()
    assert '<p class="headline">This rests on 3 images: too few to tell' in page
    assert '<li class="good">' not in page
    assert '<td class="best">' not in page


def test_an_empty_side_leaves_out_what_it_cannot_measure() -> None:
    none = np.zeros((0, 0), np.float32)
    model = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    found = summary.summarise(measured_of(none, model, none), seed=0)
    assert found.subsets == {}
    assert found.values["model"] == {}
    assert found.instruments == {}


# -- the time left


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("workers", [1, 2])
def test_the_time_left_is_honest_though_real_images_cost_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """512 drawn at 0.5 s and then 2,048 real ones at 0.01 s, in batches of 16: by count alone 21 minutes would seem to
    be left after the first batch, and it is four and a half."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    kinds = [worker.MEASURE] + [worker.SHOW] * 31 + [worker.TRAIN] * 128
    costs = {worker.TRAIN: 0.01, worker.MEASURE: 0.5, worker.SHOW: 0.5}
    takes = [16 * costs[kind] / workers for kind in kinds]
    left = driver.TimeLeft([kind for kind in kinds for _ in range(16)], workers)
    log = io.StringIO()
    with progress.Progress(total=16 * len(kinds), description="evaluate", every_s=0, stream=log) as bar:
        for i, kind in enumerate(kinds):
            clock.now += takes[i]
            noisy = costs[kind] * (1 + 0.2 * (-1) ** i)
            each = {"spent_s": noisy, **({} if kind == worker.TRAIN else {"judged_s": 0.008})}
            left.add({("night", f"{i}-{n}", 0, kind): each for n in range(16)})
            bar.update(16, left_s=left.seconds())
            truth = sum(takes[i + 1 :])
            if truth:
                assert truth / 1.5 <= (left.seconds() or 0.0) <= 1.5 * truth
    first = log.getvalue().splitlines()[0]
    assert first.startswith("evaluate: 16 of 2,560 images"), first
    assert re.search(r"[345] min \d\d s left" if workers == 1 else r"[12] min \d\d s left", first), first


def test_before_an_image_is_drawn_no_time_is_told() -> None:
    left = driver.TimeLeft([worker.SAMPLE, worker.SAMPLE, worker.REAL, worker.REAL], 1)
    left.add({("b", "x", 0, worker.REAL): {"spent_s": 0.25}})
    assert left.seconds() is None
    left.add({("b", "y", 0, worker.SAMPLE): {"spent_s": 3.0, "judged_s": 0.5}})
    assert left.seconds() == 3.25
    left = driver.TimeLeft([worker.SAMPLE, worker.SAMPLE, worker.TRAIN], 1)
    left.add({("b", "y", 0, worker.SAMPLE): {"spent_s": 3.0, "judged_s": 0.5}})
    assert left.seconds() == 3.5


# -- compare


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: str) -> Path:
    """Of 24 pairs: plain, the same again, many steps, of fewer images, of another seed, of other data."""
    root = tmp_path_factory.mktemp("evaluations")
    dataset = write_set(root / "set", "paired")
    other = write_set(root / "other", "paired", num_test=23)
    night, whole = ["--domain", "night"], ["--num-diverse", "2", "--num-train", "20"]
    refused = ["--num-diverse", "0", "--num-train", "0", "--num-images", "4"]
    runs = {
        "plain": (dataset, [*night, *whole]),
        "again": (dataset, [*night, *whole]),
        "guided": (dataset, [*night, *whole, "--guidance-scale", "6"]),
        "fewer": (dataset, [*night, *whole, "--num-images", "20"]),
        "seed": (dataset, [*night, *whole, "--seed", "1"]),
        "elsewhere": (other, [*night, *refused]),
        "day": (dataset, ["--domain", "day", *refused]),
        "train": (dataset, [*night, "--split", "train", *refused]),
    }
    for name, (uri, flags) in runs.items():
        assert evaluate.main(command(checkpoint_folder, uri, root / name, *HERE, *flags)) == cli.DONE
    return root


def compared(root: Path, a: str, b: str) -> dict[str, Any]:
    assert evaluate.main(["compare", str(root / a), str(root / b), "--output", str(root / f"{a}-{b}")]) == cli.DONE
    return json.loads((root / f"{a}-{b}" / "compare.json").read_text())


def test_the_same_evaluation_differs_in_nothing(evaluations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(evaluations, "plain", "again")
    by_metric = {row["metric"]: row for row in found["metrics"]}
    assert {"psnr", "ssim", "kid", "perceptual", "diversity"} <= by_metric.keys()
    for row in by_metric.values():
        assert row["words"] == ("too few to tell" if row["num"] < 20 else "no clear difference")
        assert row["a"] == row["b"]
        assert row["difference"]["mean"] == 0
    assert by_metric["psnr"]["num"] == 24
    assert found["level"] == pytest.approx(1 - 0.05 / len(by_metric))
    assert f"{len(by_metric)} comparisons: each interval is of {found['level']:.2%}" in capsys.readouterr().out
    assert "no clear difference" in (evaluations / "plain-again" / "report.html").read_text()


def test_a_difference_is_told_the_right_way_round(evaluations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guidance of 6 makes worse images of a network that knows nothing."""
    found, back = compared(evaluations, "plain", "guided"), compared(evaluations, "guided", "plain")
    ours, theirs = ({row["metric"]: row for row in each["metrics"]} for each in (found, back))
    table = {
        name: {
            row["id"]: row
            for row in pyarrow.parquet.read_table(evaluations / name / "pictures.parquet").to_pylist()
            if row["method"] == "model"
        }
        for name in ("plain", "guided")
    }
    changes = [table["plain"][name]["psnr"] - table["guided"][name]["psnr"] for name in table["plain"]]
    assert ours["psnr"]["difference"]["mean"] == pytest.approx(np.mean(changes))
    expected = intervals.bootstrap(np.array(changes), level=found["level"])
    assert ours["psnr"]["difference"]["low"] == pytest.approx(expected.low)
    sign = {"psnr": 1, "ssim": 1, "kid": -1, "perceptual": -1}
    for metric, way in sign.items():
        gap = ours[metric]["difference"]
        clear = gap["low"] > 0 or gap["high"] < 0
        winner = "A" if gap["mean"] * way > 0 else "B"
        assert ours[metric]["words"] == (f"{winner} is better" if clear else "no clear difference")
        assert theirs[metric]["difference"]["mean"] == pytest.approx(-gap["mean"])
    assert any(row["words"].endswith("is better") for row in ours.values())
    assert "is better" in capsys.readouterr().out


def test_what_does_not_compare_is_left_out_with_its_reason(evaluations: Path) -> None:
    fewer = compared(evaluations, "plain", "fewer")
    assert {row["num"] for row in fewer["metrics"] if row["metric"] == "psnr"} == {20}
    assert any(reason.startswith("kid: measured on different images") for reason in fewer["left_out"])
    seed = compared(evaluations, "plain", "seed")
    assert any("kid: different seeds (0, 1)" in reason for reason in seed["left_out"])
    assert "psnr" in {row["metric"] for row in seed["metrics"]}
    assert not any(reason.startswith("fd") for reason in seed["left_out"])
    many = shutil.copytree(evaluations / "plain", evaluations / "many")
    content = json.loads((many / "metrics.json").read_text())
    content["domains"]["night"]["methods"]["model"]["metrics"]["fd"] = {"mean": 9.0, "low": 8.0, "high": 10.0}
    (many / "metrics.json").write_text(json.dumps(content))
    assert any(reason.startswith("fd: no parts") for reason in compared(evaluations, "plain", "many")["left_out"])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("elsewhere", "A was measured on data toy .* only evaluations of the same rows"),
        ("train", "split test, B on train"),
        ("day", "A was measured to night, B to day"),
        ("set", "no evaluation here"),
    ],
)
def test_evaluations_of_different_things_are_refused(evaluations: Path, other: str, named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        evaluate.main(["compare", str(evaluations / "plain"), str(evaluations / other)])
    assert "\n" not in str(error.value)


def test_compare_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["compare", "--help"])
    assert "usage: python -m jobs.evaluate compare" in capsys.readouterr().out
    with pytest.raises(InputError):
        evaluate.main(["compare", "only-one"])


def test_wrong_input_is_named_before_ray_starts(tmp_path: Path, checkpoint_folder: str) -> None:
    dataset, out = write_set(tmp_path / "set", "paired"), tmp_path / "out"

    def refused(*argv: str) -> str:
        with pytest.raises(InputError) as error:
            evaluate.main(list(argv))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in refused(*command(checkpoint_folder, tmp_path / "nowhere", out))
    assert "no checkpoint here" in refused(*command(str(tmp_path), dataset, out))
    assert "did you mean 'night'" in refused(*command(checkpoint_folder, dataset, out, "--domain", "nigt"))
    assert "--num-images is -1" in refused(*command(checkpoint_folder, dataset, out, "--num-images", "-1"))
    assert "num-step" in refused(*command(checkpoint_folder, dataset, out, "--num-stepps", "3"))
    assert "it has train, test" in refused(*command(checkpoint_folder, dataset, out, "--split", "val"))
    assert not out.exists()


# -- what has been measured is kept ------------------------------------------------------------------------------------


def test_a_disk_that_fills_at_the_end_costs_no_measurement(
    tmp_path: Path, checkpoint_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_set(tmp_path / "set", "paired", num_test=8)
    whole, output = tmp_path / "whole", tmp_path / "out"
    few = ("--domain", "night", "--num-diverse", "2", "--num-train", "4", *HERE)
    assert evaluate.main(command(checkpoint_folder, dataset, whole, *few)) == cli.DONE

    def full(*args: object) -> None:
        raise InputError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(driver, "write", full)
        with pytest.raises(InputError, match="no space left"):
            evaluate.main(command(checkpoint_folder, dataset, output, *few))
    with monkeypatch.context() as patched:
        patched.setattr(worker.Measure, "__call__", full)
        assert evaluate.main(command(checkpoint_folder, dataset, output, *few)) == cli.DONE
    assert read(output)["domains"] == read(whole)["domains"]
    assert not (output / ".measured").exists()


def test_measurements_of_other_options_and_damaged_ones_are_not_taken(tmp_path: Path) -> None:
    key, found = ("night", "a/ö.jpg", 3, "measure"), {"model/features": np.arange(3, dtype=np.float32), "device": "cpu"}
    written = journal.Journal(str(tmp_path), {"seed": 0})
    written.add({key: found, ("night", "b", 0, "show"): {"model/psnr": np.float64(20.5), "nfe": 2}})
    written.flush()
    again = journal.Journal(str(tmp_path), {"seed": 0}).rows
    assert [*again] == [*written.rows]
    assert again[key]["model/features"].dtype == np.float32
    np.testing.assert_array_equal(again[key]["model/features"], found["model/features"])
    assert (again[key]["device"], again["night", "b", 0, "show"]["model/psnr"]) == ("cpu", 20.5)
    assert journal.Journal(str(tmp_path), {"seed": 1}).rows == {}
    (part,) = tmp_path.rglob("*.npz")
    whole = part.read_bytes()
    for damaged in (b"", whole[:-40], b"x" * 100, pickle.dumps(again)):
        part.write_bytes(damaged)
        assert journal.Journal(str(tmp_path), {"seed": 0}).rows == {}
