"""Two folders to a translator by one command: its stages, what stands after each, going on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_core import checkpoint
from ddpm_core import config as configs
from ddpm_core.errors import InputError
from jobs import recipe as command
from jobs import train
from jobs.suite import recipe

TINY = recipe.Size(
    image_size=16,
    prior_steps=4,
    side_steps=5,
    student_steps=2,
    batch_size=8,
    num_workers=0,
    stride=2,
    options=("--unet.model-channels", "32", "--unet.channel-mult", "1", "--sampling.num-steps", "4"),
)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Twenty dark images and twenty bright ones."""
    random = np.random.default_rng(0)
    for side, light in (("day", 150), ("night", 20)):
        (tmp_path / "photos" / side).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 100, (20, 24, 3)).astype(np.uint8) + np.uint8(light)
            Image.fromarray(pixels).save(tmp_path / "photos" / side / f"{i}.png")
    return tmp_path / "photos"


def run(folders: Path, output: Path, *flags: str) -> int:
    return command.main(["--source", str(folders), "--output", str(output), "--num-workers", "0", *flags])


@pytest.mark.slow
def test_one_command_from_two_folders_to_a_translator(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(recipe.SIZES, "cpu", TINY)
    output, begun = tmp_path / "out", []
    execute = recipe.execute

    def until(words: list[str]) -> int:
        begun.append(words)
        if len(begun) == 3:  # the prior is there, the classifier fails
            loaded = checkpoint.load(str(output))
            assert loaded.path.startswith(str(output / "prior"))
            assert loaded.config.sampling.start == "flowedit"
            return 1
        if "pairs" in words:  # of four steps nothing is turned
            at = words.index("--classifier")
            words = words[:at] + words[at + 2 :]
        return execute(words)

    monkeypatch.setattr(recipe, "execute", until)
    with pytest.raises(InputError, match="stage sides ended with exit code 1"):
        run(folders, output)
    assert "2 of 6 stages done" in (output / "report.html").read_text()
    assert run(folders, output) == 0  # goes on
    assert "already there" in capfd.readouterr().out
    loaded = checkpoint.load(str(output))
    assert loaded.path.startswith(str(output / "run"))
    assert (loaded.config.sampling.start, loaded.config.shown, loaded.config.data.pairing) == (
        "noise",
        "source",
        "synthetic",
    )
    assert loaded.config.origin is not None
    assert (output / "evaluation" / "metrics.json").exists()
    page = (output / "report.html").read_text()
    assert "6 of 6 stages done" in page
    for stage in ("data", "prior", "pairs", "run", "evaluation"):
        assert f'src="{stage}/' in page
    with pytest.raises(InputError, match="--seed 0, this command says 1"):
        run(folders, output, "--seed", "1")


def test_steps_come_to_epochs_of_what_there_is(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many steps whatever the number of images, validated about ten times."""
    seen: list[list[str]] = []

    def executed(words: list[str]) -> int:
        seen.append(words)
        if words[0] == "jobs.prepare" and "folders" in words:
            from jobs import prepare

            return prepare.main([*words[1:], "--num-workers", "0"])
        return 5

    monkeypatch.setattr(recipe, "execute", executed)
    with pytest.raises(InputError, match="stage prior ended with exit code 5"):
        run(folders, tmp_path / "out")
    given = dict(zip(seen[1], seen[1][1:], strict=False))
    rows = json.loads((tmp_path / "out" / "data" / "dataset.json").read_text())["splits"]["train"]
    assert int(given["--global-batch-size"]) == min(32, rows)
    assert int(given["--epochs"]) * rows == pytest.approx(1600 * 32, rel=0.01)
    assert 9 <= int(given["--epochs"]) / int(given["--validate-every-epochs"]) <= 11


@pytest.mark.parametrize(("preset", "side", "near"), [("cpu", "36", "32 or 40"), ("gpu", "40", "32 or 48")])
def test_a_side_that_the_networks_cannot_halve_is_refused_before_anything_is_written(
    preset: str, side: str, near: str, folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"--image-size is {side}; .* such as {near}"):
        run(folders, tmp_path / "out", "--preset", preset, "--image-size", side)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", recipe.SIZES)
@pytest.mark.parametrize("preset", ["prior", "student"])
def test_the_stride_is_the_networks(name: str, preset: str) -> None:
    size = recipe.SIZES[name]
    args = train.parse(["--data", "d", "--output", "o", "--preset", preset, *size.options])
    assert configs.stride(args.options.unet) == size.stride
