"""Evaluation: the figures in metrics.json are those of the pictures, by id, beside their baselines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_core import checkpoint, metrics
from ddpm_core import config as configs
from ddpm_core.config import GANConfig, ModelConfig, SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator
from jobs import cli, data, evaluate, scores

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


def write_set(uri: Path, pairing: data.Pairing, num_test: int = 24) -> Path:
    def rows(split: str, num: int, first: int) -> list[data.Row]:
        found = []
        for i in range(first, first + num):
            if pairing == "paired":
                target = by_night(scene(i))
                found.append(data.Row(id=f"{split}-{i:03d}", domain=0, image=scene(i), target=target, target_id="n"))
                continue
            side = i % 2
            image = by_night(scene(i)) if side else scene(i)
            other = None if pairing == "unpaired" else scene(i + 1) if side else by_night(scene(i + 1))
            found.append(data.Row(id=f"{split}-{i:03d}", domain=side, image=image, target=other))
        return found

    card = data.DatasetCard(
        name="toy",
        licence="CC0",
        source="made up",
        image_size=SIDE,
        encoding="raw",
        domains=("day", "night"),
        pairing=pairing,
    )
    data.write_dataset(str(uri), {"train": rows("train", 40, 0), "test": rows("test", num_test, 100)}, card)
    return uri


def command(checkpoint_folder: str, dataset: Path, output: Path, *more: str) -> list[str]:
    where = ["--checkpoint", checkpoint_folder, "--data", str(dataset), "--output", str(output)]
    return [*where, "--num-workers", "1", *more]


def read(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def test_pictures_are_chosen_evenly() -> None:
    assert evaluate.spread(10, 0) == list(range(10))
    assert evaluate.spread(3, 10) == [0, 1, 2]
    assert evaluate.spread(100, 4) == [12, 37, 62, 87]


def test_true_pairs_are_measured_to_the_truth(
    ray_cluster: None, tmp_path: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, output = write_set(tmp_path / "set", "paired"), tmp_path / "out"
    argv = command(checkpoint_folder, dataset, output, "--domain", "night")
    assert evaluate.main(argv) == cli.DONE
    assert str(output / "report.html") in capsys.readouterr().out
    found = read(output)
    night = found["domains"]["night"]
    assert night["num_images"] == 24

    # every figure again, from the pictures themselves
    sources = np.stack([scene(i) for i in range(100, 124)])
    truths = by_night(sources)
    results = Translator(checkpoint.load(checkpoint_folder))(sources, "night")
    color_map = metrics.linear_color_map(*[np.stack([f(scene(i)) for i in range(40)]) for f in (lambda x: x, by_night)])
    methods = {"model": results, "copy": sources, "linear": metrics.apply_color_map(color_map, sources)}
    for name, pictures in methods.items():
        values = night["methods"][name]["metrics"]
        assert values["psnr"]["mean"] == pytest.approx(scores.psnr(pictures, truths).mean(), abs=0.02)
        assert values["ssim"]["mean"] == pytest.approx(scores.ssim(pictures, truths).mean(), abs=0.002)
        for value in values.values():
            assert value["low"] < value["mean"] < value["high"]
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
    with pytest.raises(InputError, match=r"num_steps = 2, this command says 1"):
        evaluate.main([*argv, "--num-steps", "1"])


def test_both_directions_and_few_pictures(ray_cluster: None, tmp_path: Path, checkpoint_folder: str) -> None:
    dataset, output = write_set(tmp_path / "set", "paired"), tmp_path / "out"
    assert evaluate.main(command(checkpoint_folder, dataset, output, "--num-images", "6")) == cli.DONE
    found = read(output)["domains"]
    assert list(found) == ["day", "night"]
    assert found["day"]["num_images"] == found["night"]["num_images"] == 6
    sources = np.stack([scene(100 + i) for i in evaluate.spread(24, 6)])
    expected = scores.psnr(by_night(sources), sources).mean()  # to day, a copy of the night picture
    assert found["day"]["methods"]["copy"]["metrics"]["psnr"]["mean"] == pytest.approx(expected)
    assert "kid" not in found["day"]["methods"]["model"]["metrics"]
    assert any("No KID" in note for note in found["day"]["notes"])
    assert (output / "grid-day.png").exists()
    assert (output / "grid-night.png").exists()


@pytest.mark.parametrize("pairing", ["matched", "unpaired"])
def test_without_true_pairs_nothing_claims_a_truth(
    ray_cluster: None, tmp_path: Path, checkpoint_folder: str, pairing: data.Pairing
) -> None:
    dataset, output = write_set(tmp_path / "set", pairing, num_test=44), tmp_path / "out"
    assert evaluate.main(command(checkpoint_folder, dataset, output, "--domain", "night")) == cli.DONE
    night = read(output)["domains"]["night"]
    assert night["num_images"] == night["num_real_images"] == 22  # only day pictures are turned into night
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


def test_a_gan_takes_the_same_path_and_has_one_result(ray_cluster: None, tmp_path: Path) -> None:
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
    assert evaluate.main(command(str(tmp_path / "gan"), dataset, output, "--num-images", "6")) == cli.DONE
    found = read(output)
    sources = np.stack([scene(100 + i) for i in evaluate.spread(24, 6)])
    results = Translator(checkpoint.load(str(tmp_path / "gan")))(sources, "night")
    psnr = found["domains"]["night"]["methods"]["model"]["metrics"]["psnr"]["mean"]
    assert psnr == pytest.approx(scores.psnr(results, by_night(sources)).mean(), abs=0.02)
    assert Image.open(output / "grid.png").size[0] == 3 * 128 + 2 * 4  # source, result, truth
    page = (output / "report.html").read_text()
    assert "pix2pix" in page
    assert "noise only" not in page


def test_rows_come_back_by_id_whatever_their_order() -> None:
    job = evaluate.Job(
        args=evaluate.Args(checkpoint="c", data="d", output="o", seed=3),
        checkpoint_path="c",
        config=ModelConfig(),
        sampling=ModelConfig().sampling,
        card=None,  # type: ignore[arg-type]
        domains=("b",),
        options={},
        plan={},
    )
    pictures = {name: np.full((2, 2, 3), i, np.uint8) for i, name in enumerate("xyz")}
    found = {
        ("b", name, seed): {"image": picture, "result": picture + 10 * (seed - 2)}
        for seed in (5, 3, 4)
        for name, picture in reversed(pictures.items())
        if name == "y" or seed == 3
    }
    there = evaluate.gather(job, "b", found)
    assert there.ids == ["x", "y", "z"]
    assert there.sources[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert there.results[:, 0, 0, 0].tolist() == [10, 11, 12]
    assert there.truths is None
    assert [sample[0, 0, 0] for sample in there.samples["y"]] == [11, 21, 31]
    assert list(there.samples) == ["y"]


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
