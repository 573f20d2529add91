"""Pairs that a model makes: the editing checkpoint, the choice among weights, the rows, going on after a kill."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_prepare import refused, rejected, run

from ddpm_core import checkpoint, storage
from ddpm_core.config import DiffusionConfig, ModelConfig, SamplingConfig, UNetConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator
from ddpm_core.unet import UNet
from jobs.datasets import reading, writing
from jobs.datasets.format import DatasetCard, Row, read_card
from jobs.datasets.sources import pairs

CONFIG = ModelConfig(
    image_size=16,
    domains=("day", "night"),
    shown="nothing",
    unet=UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=()),
    diffusion=DiffusionConfig(prediction="x_0"),
    sampling=SamplingConfig(num_steps=2, start="flowedit", strength=0.7),
)


def write_checkpoint(folder: Path, config: ModelConfig = CONFIG) -> str:
    torch.manual_seed(0)
    model = UNet(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for name, data in checkpoint.files(model.state_dict(), config).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def two_sides(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_set(str(tmp_path_factory.mktemp("sides")))


def write_set(folder: str, **changes: Any) -> str:
    """32 flat images for training, 4 for validation and 4 for test, of either side; bright ones by day."""

    def rows(split: str, count: int) -> Any:
        random = np.random.default_rng(len(split))  # train 5, val 3, test 4
        for i in range(count):
            image = np.full((16, 16, 3), random.integers(0, 100) + 150 * (i % 2 == 0), np.uint8)
            yield Row(
                id=f"{split}-{i:03d}", domain=i % 2, image=image, identity=1000 * len(split) + i, attributes=[i % 5]
            )

    card = DatasetCard(
        name="flat",
        licence="CC0",
        source="drawn by the tests",
        image_size=16,
        encoding="raw",
        domains=("day", "night"),
        pairing="unpaired",
        attribute_names=("number",),
    )
    writing.write_dataset(
        folder,
        {"train": rows("train", 32), "val": rows("val", 4), "test": rows("test", 4)},
        dataclasses.replace(card, **changes),
    )
    return folder


def write_net(path: Path, net: torch.nn.Module) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript's own, and the way to a file in one line
        torch.jit.script(net).save(str(path))  # type: ignore[no-untyped-call]
    return str(path)


def write_judge(path: Path) -> str:
    """A classifier that takes an image for night where its first pixel is odd."""

    class Judge(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            odd = 20 * images[:, 0, 0, 0].to(torch.int64).remainder(2).float()
            return torch.stack([10 - odd, odd - 10], dim=1)

    return write_net(path, Judge())


def tables(data: str, split: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for table in reading.read_tables(data, split, columns=("id", "domain", "image", "target", "target_id", "identity")):
        targets = reading.pixels_of(table, "target") if "target" in table.column_names else [None] * len(table)
        images = reading.pixels_of(table, "image")
        rest = table.drop_columns([name for name in ("image", "target") if name in table.column_names]).to_pylist()
        found += [
            {**row, "image": image, "target": target} for row, image, target in zip(rest, images, targets, strict=True)
        ]
    return found


def prepare(data: str, prior: str, output: Path | str, *flags: object) -> int:
    return run("pairs", "--data", data, "--checkpoint", prior, "--output", output, "--num-workers", 0, *flags)


def test_each_real_image_gets_a_source_of_the_other_side(two_sides: str, prior: str, tmp_path: Path) -> None:
    assert prepare(two_sides, prior, tmp_path / "pairs") == 0
    card = read_card(str(tmp_path / "pairs"))
    assert (card.pairing, card.splits, card.licence) == ("synthetic", {"train": 32, "val": 4, "test": 0}, "CC0")
    assert "the other side of each image is made by a model: 36 at weight 2.5" in card.notes
    real, made = tables(two_sides, "train"), tables(str(tmp_path / "pairs"), "train")
    for before, after in zip(real, made, strict=True):
        assert (before["id"], before["domain"], before["identity"]) == (
            after["id"],
            after["domain"],
            after["identity"],
        )
        assert np.array_equal(before["image"], after["image"])
        assert not np.array_equal(after["target"], after["image"])
        assert after["target_id"] == f"{after['id']} as {('night', 'day')[after['domain']]}"
    editor = pairs.Editor(
        checkpoint_uri=prior,
        ema=None,
        sampling={},
        weights=(2.5,),
        seed=0,
        classifier=None,
        identity_encoder=None,
        num_threads=1,
    )
    alone, _ = editor.turned(real[3]["image"][None], "night", "day")
    assert np.abs(alone[0].astype(int) - made[3]["target"]).max() <= 1
    assert not storage.exists(str(tmp_path / "pairs.parts"))


def test_edits_are_made_as_the_best_of_a_run_says(two_sides: str, tmp_path: Path) -> None:
    """best.json, of a run or a sweep, has the sampling; the checkpoint's own configuration may have another."""
    write_checkpoint(tmp_path / "run" / "last")
    best = {"checkpoint": "last", "num_steps": 4, "strength": 0.9}
    (tmp_path / "run" / "best.json").write_text(json.dumps(best))
    prepare(two_sides, str(tmp_path / "run"), tmp_path / "pairs", "--weights", 2)
    row = tables(str(tmp_path / "pairs"), "train")[0]
    translate = Translator(checkpoint.load(str(tmp_path / "run")))
    sides = ("day", "night")
    other, own = sides[1 - row["domain"]], sides[row["domain"]]
    expected = translate(row["image"][None], other, source_domain=own, guidance_scale=2.0)[0]
    assert np.abs(expected.astype(int) - row["target"]).max() <= 1


def test_the_least_weight_that_turns_an_image_is_taken(two_sides: str, prior: str, tmp_path: Path) -> None:
    judge = write_judge(tmp_path / "judge.pt")
    editor = pairs.Editor(
        checkpoint_uri=prior,
        ema=None,
        sampling={},
        weights=(1.0, 2.0, 3.0),
        seed=0,
        classifier=judge,
        identity_encoder=None,
        num_threads=1,
    )
    sources = np.stack([row["image"] for row in tables(two_sides, "train") if row["domain"] == 0])
    made, taken = editor.turned(sources, "day", "night")
    each = [editor.translator(sources, "night", guidance_scale=weight) for weight in (1.0, 2.0, 3.0)]
    for row, weight in enumerate(taken):
        odd = [int(images[row, 0, 0, 0] % 2) for images in each]
        assert weight == (odd.index(1) if 1 in odd else pairs.NOT_TURNED)
        if weight >= 0:
            assert np.abs(made[row].astype(int) - each[weight][row]).max() <= 1
    assert {0, 1} <= {*taken.tolist()}


def test_with_an_encoder_the_most_alike_of_those_that_turn_is_taken(prior: str, tmp_path: Path) -> None:
    class ByBrightness(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            angle = images.float().mean((1, 2, 3)) / 255
            return torch.stack([angle.cos(), angle.sin()], dim=1)

    editor = pairs.Editor(
        checkpoint_uri=prior,
        ema=None,
        sampling={},
        weights=(1.0, 2.0, 3.0),
        seed=0,
        classifier=write_judge(tmp_path / "judge.pt"),
        identity_encoder=write_net(tmp_path / "who.pt", ByBrightness()),
        num_threads=1,
    )
    sources = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    _, taken = editor.turned(sources, "day", "night")
    each = np.stack([editor.translator(sources, "night", guidance_scale=weight) for weight in (1.0, 2.0, 3.0)])
    moved = np.abs(each.astype(float).mean((2, 3, 4)) - sources.astype(float).mean((1, 2, 3)))
    moved[each[:, :, 0, 0, 0] % 2 == 0] = np.inf
    wanted = np.where(np.isfinite(moved).any(0), moved.argmin(0), pairs.NOT_TURNED)
    assert np.array_equal(taken, wanted)


def test_what_no_weight_turns_is_set_aside_and_counted(two_sides: str, prior: str, tmp_path: Path) -> None:
    judge = write_judge(tmp_path / "judge.pt")
    assert prepare(two_sides, prior, tmp_path / "pairs", "--classifier", judge, "--weights", 2, 3) == 3
    card, aside = read_card(str(tmp_path / "pairs")), rejected(tmp_path / "pairs")
    assert 0 < len(aside) == card.num_rejected
    assert sum(card.splits.values()) + len(aside) == 36
    assert {*aside.values()} <= {
        "made night by every one of --weights, it is still taken for day",
        "made day by every one of --weights, it is still taken for night",
    }


def test_a_prior_that_turns_nothing_is_told_of(two_sides: str, prior: str, tmp_path: Path) -> None:
    class Nobody(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 2)

    judge = write_net(tmp_path / "judge.pt", Nobody())
    with pytest.raises(InputError, match="none of the 32 training images is taken for the other side"):
        prepare(two_sides, prior, tmp_path / "pairs", "--classifier", judge, "--weights", 2)


def test_the_same_command_goes_on_where_it_was_killed(
    two_sides: str, prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "pairs"
    prepare(two_sides, prior, whole)
    calls: list[int] = []
    call = pairs.Editor.__call__

    def counted(self: pairs.Editor, batch: dict[str, Any]) -> dict[str, Any]:
        calls.append(batch["first"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(self, batch)

    monkeypatch.setattr(pairs.Editor, "__call__", counted)
    monkeypatch.setattr(pairs, "BATCH", 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(KeyboardInterrupt):
        prepare(two_sides, prior, output)
    (folder,) = Path(f"{output}.parts").iterdir()
    kept = sorted(path.name for path in folder.iterdir())
    assert not (output / "dataset.json").exists()
    (folder / "000000033.npz").write_bytes(b"half")  # of another cut, and damaged
    calls[:] = [-1, -1]
    assert prepare(two_sides, prior, output) == 0
    assert not {int(name[:9]) for name in kept} & {*calls}
    assert json.loads((output / "dataset.json").read_text())["content_hash"] == read_card(str(whole)).content_hash
    calls[:] = [-1, -1]
    assert prepare(two_sides, prior, output) == 0
    assert calls == [-1, -1]  # it is there


@pytest.mark.parametrize(
    ("changes", "flags", "named"),
    [
        ({}, ["--weights", "3", "2"], "--weights is"),
        ({}, ["--weights", "0"], "--weights is"),
        ({}, ["--identity-encoder", "x"], "give --classifier, too"),
        ({"sampling": SamplingConfig()}, [], "its images are not edited"),
        ({"domains": ("day", "dusk")}, [], "train a prior on these data"),
        ({"image_size": 32}, [], "of 32 px"),
        ({"target_domains": ("day",)}, [], "not trained to produce 'night'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    two_sides: str, tmp_path: Path, changes: dict[str, Any], flags: list[str], named: str
) -> None:
    config = dataclasses.replace(CONFIG, **{"shown": "source", **changes})
    prior = write_checkpoint(tmp_path / "prior", config)
    command = ("pairs", "--data", two_sides, "--checkpoint", prior, "--output", tmp_path / "out", *flags)
    assert named in refused(*command)
    assert not (tmp_path / "out").exists()
