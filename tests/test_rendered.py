"""Drawn images: the same again from the same numbers, and counterparts that differ only as they should."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from conftest import ROOT
from PIL import Image

from ddpm_core.errors import InputError
from jobs import prepare
from jobs.datasets.format import SPLITS, read_card
from jobs.datasets.sources import rendered, rendered_landscapes, rendered_portraits
from jobs.datasets.sources.rendered import draw, landmarks_of, parameters_of

SCENES: tuple[rendered.Scene, ...] = ("portraits", "landscapes")


def run(*argv: object) -> int:
    return prepare.main(["rendered", *map(str, argv)])


def refused(*argv: object) -> str:
    with pytest.raises(InputError) as caught:
        run("--output", "unused", *argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        row["id"]: row | {"split": split}
        for split in SPLITS
        for row in pyarrow.parquet.read_table(folder / split / "part-00000.parquet").to_pylist()
    }


def people(count: int, scene: rendered.Scene = "portraits") -> list[list[int]]:
    return [parameters_of(scene, 7, index) for index in range(count)]


def changed(parameters: list[int], scene: rendered.Scene, **values: int) -> list[int]:
    """The same person or place with other values of some parameters."""
    return [values.get(name, old) for name, old in zip(rendered.NAMES[scene], parameters, strict=True)]


# ------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("scene", SCENES)
def test_parameters_vary_evenly_and_independently(scene: rendered.Scene) -> None:
    names = rendered.NAMES[scene]
    values = np.array([parameters_of(scene, 0, index) for index in range(4000)])
    assert len(names) == len(set(names)) >= 40
    assert values.min(axis=0).tolist() == [0] * len(names)
    assert values.max(axis=0).tolist() == [100] * len(names)
    assert np.abs(values.mean(axis=0) - 50).max() < 2.5  # the mean of 4,000 has a standard error of 0.46
    correlations = np.corrcoef(values.T) - np.eye(len(names))
    assert np.abs(correlations).max() < 0.08  # standard error 0.016


def test_people_do_not_depend_on_the_domain_in_which_they_are_shown() -> None:
    """Unpaired: nothing but the sex tells the two pools apart."""
    domains = np.array([rendered.domain_of(0, index) for index in range(4000)])
    values = np.array([parameters_of("portraits", 0, index) for index in range(4000)])
    assert domains.mean() == pytest.approx(0.5, abs=0.03)
    difference = values[domains == 0].mean(axis=0) - values[domains == 1].mean(axis=0)
    assert np.abs(difference).max() < 4.2  # standard error 0.92


def test_every_parameter_shows_in_the_image() -> None:
    """Some people do not show some parameters (a shaved chin its beard's style): of 24, somebody must show each."""
    for scene in SCENES:
        hidden = set(rendered.NAMES[scene])
        for parameters in people(24, scene):
            before = [draw(scene, parameters, domain, 64) for domain in (0, 1)]
            for name in sorted(hidden):
                old = parameters[rendered.NAMES[scene].index(name)]
                other = changed(parameters, scene, **{name: 100 - old if abs(2 * old - 100) > 30 else (old + 50) % 101})
                if any((draw(scene, other, domain, 64) != before[domain]).any() for domain in (0, 1)):
                    hidden.discard(name)
            if not hidden:
                break
        assert not hidden, scene


def test_splits_are_a_matter_of_the_index_and_hold_their_shares() -> None:
    splits = [rendered.split_of(0, index) for index in range(2000)]
    for start in range(0, 2000, 10):
        assert sorted(splits[start : start + 10]) == ["test"] + 8 * ["train"] + ["val"]
    places = {split: {index % 10 for index, of in enumerate(splits) if of == split} for split in ("val", "test")}
    assert places == {"val": set(range(10)), "test": set(range(10))}
    assert splits != [rendered.split_of(1, index) for index in range(2000)]


# ------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("domain", [0, 1])
def test_every_size_shows_the_same_image(scene: rendered.Scene, domain: int) -> None:
    for parameters in people(3, scene):
        large = Image.fromarray(draw(scene, parameters, domain, 256))
        for size in (32, 64, 128):
            drawn = draw(scene, parameters, domain, size)
            assert drawn.shape == (size, size, 3)
            reduced = np.asarray(large.resize((size, size), Image.Resampling.BOX), np.float64)
            other = np.asarray(Image.fromarray(draw(scene, people(9, scene)[8], domain, size)), np.float64)
            error = np.abs(reduced - drawn).mean()
            assert error < 3.0, (scene, size)  # of 255: what is finer than a pixel is weighed differently
            assert error < 0.1 * np.abs(other - drawn).mean()


@pytest.mark.parametrize("scene", SCENES)
def test_extreme_parameters_are_drawn(scene: rendered.Scene) -> None:
    count = len(rendered.NAMES[scene])
    for parameters in ([0] * count, [100] * count, [0, 100] * (count // 2) + [50] * (count % 2), [50] * count):
        for domain in (0, 1):
            picture = draw(scene, parameters, domain, 64)
            assert picture.std() > 10
            assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 300


@pytest.mark.slow
def test_images_are_the_same_in_another_process() -> None:
    program = (
        "import hashlib; from jobs.datasets.sources.rendered import draw, parameters_of\n"
        "for scene in ('portraits', 'landscapes'):\n"
        "    for index in range(3):\n"
        "        for domain in (0, 1):\n"
        "            p = parameters_of(scene, 7, index)\n"
        "            print(hashlib.sha256(draw(scene, p, domain, 64).tobytes()).hexdigest())\n"
    )
    other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    here = [
        hashlib.sha256(draw(scene, parameters_of(scene, 7, index), domain, 64).tobytes()).hexdigest()
        for scene in SCENES
        for index in range(3)
        for domain in (0, 1)
    ]
    assert other.split() == here
    assert len(set(here)) == 12


# ------------------------------------------------------------------------------------------- counterparts


def test_sex_changes_nothing_but_the_sex_linked_traits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the traits of one sex put in for the other's, the counterparts are one image."""
    sex_linked = rendered_portraits.sex_linked
    monkeypatch.setattr(rendered_portraits, "sex_linked", lambda p, domain: sex_linked(p, 0))
    for parameters in people(6):
        np.testing.assert_array_equal(draw("portraits", parameters, 0, 64), draw("portraits", parameters, 1, 64))


def test_time_of_day_changes_nothing_but_the_light(monkeypatch: pytest.MonkeyPatch) -> None:
    light_of = rendered_landscapes.light_of
    monkeypatch.setattr(rendered_landscapes, "light_of", lambda p, domain: light_of(p, 0))
    for parameters in people(6, "landscapes"):
        np.testing.assert_array_equal(draw("landscapes", parameters, 0, 64), draw("landscapes", parameters, 1, 64))


def test_counterparts_share_background_and_differ_in_the_face() -> None:
    for parameters in people(20):
        bare = changed(parameters, "portraits", hat=0, shift=50, distance=50)
        female, male = (draw("portraits", bare, domain, 128).astype(int) for domain in (0, 1))
        for corner in (np.s_[:24, :20], np.s_[:24, -20:]):
            np.testing.assert_array_equal(female[corner], male[corner])
        assert np.abs(female - male)[40:100, 40:88].mean() > 2


def test_every_sex_linked_trait_differs_between_the_sexes() -> None:
    for name in rendered_portraits.SexLinked.__dataclass_fields__:
        pairs = []
        for parameters in people(20):
            p = {key: value / 100 for key, value in zip(rendered_portraits.NAMES, parameters, strict=True)}
            pairs.append([getattr(rendered_portraits.sex_linked(p, domain), name) for domain in (0, 1)])
        signs = {np.sign(male - female) for female, male in pairs} - {0}
        assert len(signs) == 1, name  # one sex has more of it, whoever it is


def test_nights_are_dark_and_blue_with_lit_windows() -> None:
    for parameters in people(12, "landscapes"):
        lit = changed(parameters, "landscapes", houses=100, lit_windows=100, precipitation=0)
        day, night = (draw("landscapes", lit, domain, 128).astype(float) for domain in (0, 1))
        assert night.mean() < 0.45 * day.mean()
        assert night[..., 2].mean() > 1.2 * night[..., 0].mean()
        windows = (night[..., 0] > 150) & (night[..., 2] < 0.85 * night[..., 0])
        assert 4 <= windows.sum() < 1500


def test_identity_outweighs_the_sex_in_pixels_of_the_face() -> None:
    """A person's counterpart is nearer than other people of the same sex: identity can be read at 64 pixels."""
    faces = np.array([[draw("portraits", p, domain, 64)[20:54, 16:48] for domain in (0, 1)] for p in people(30)], float)
    distances = np.abs(faces[:, None, 0] - faces[None, :, 1]).mean(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == np.arange(30)).mean() >= 0.9


@pytest.mark.parametrize("domain", [0, 1])
def test_landmarks_lie_on_eyes_and_mouth(domain: int) -> None:
    """Where eye colour or lips change, pixels change around the landmark and not elsewhere."""
    size = 256
    y, x = np.mgrid[:size, :size] + 0.5
    for parameters in people(6):
        plain = changed(parameters, "portraits", glasses=0, gaze=50, eye_color=5, hat=0, mouth_open=0, smile=25)
        blue = changed(plain, "portraits", eye_color=80)
        points = np.reshape(landmarks_of("portraits", plain, domain, size), (5, 2))
        iris = (draw("portraits", plain, domain, size) != draw("portraits", blue, domain, size)).any(axis=-1)
        for eye, side in ((0, x < points[2, 0]), (1, x >= points[2, 0])):
            found = iris & side
            assert np.hypot(x[found].mean() - points[eye, 0], y[found].mean() - points[eye, 1]) < 2.5
        assert points[0, 0] < points[2, 0] < points[1, 0]
        assert max(points[0, 1], points[1, 1]) < points[2, 1] < min(points[3, 1], points[4, 1])
        tip = (points[2] + 0.5).astype(int)
        painted = changed(
            plain, "portraits", lip_fullness=100 if plain[rendered.NAMES["portraits"].index("lip_fullness")] < 50 else 0
        )
        lips = (draw("portraits", plain, domain, size).astype(int) - draw("portraits", painted, domain, size)).any(
            axis=-1
        )
        middle = points[3:].mean(axis=0)
        assert np.hypot(x[lips].mean() - middle[0], y[lips].mean() - middle[1]) < 9
        assert not iris[tip[1], tip[0]]


def test_landmarks_scale_with_the_image_and_are_the_same_for_both_sexes() -> None:
    for parameters in people(5):
        small, large = (landmarks_of("portraits", parameters, 0, size) for size in (64, 256))
        assert small is not None
        assert large == pytest.approx([4 * value for value in small])
        assert landmarks_of("portraits", parameters, 1, 64) == small
    assert landmarks_of("landscapes", people(1, "landscapes")[0], 0, 64) is None


# ------------------------------------------------------------------------------------------- data sets


@pytest.mark.slow
def test_data_set_holds_the_parameters_that_make_its_pixels(tmp_path: Path) -> None:
    assert run("--output", tmp_path / "large", "--count", 30, "--image-size", 32) == 0
    card, rows = read_card(str(tmp_path / "large")), rows_of(tmp_path / "large")
    assert (card.domains, card.pairing, card.splits) == (
        ("female", "male"),
        "paired",
        {"train": 24, "val": 3, "test": 3},
    )
    assert "CC0" in card.licence
    assert card.attribute_names == rendered_portraits.NAMES
    assert sorted(row["identity"] for row in rows.values()) == list(range(30))
    for row in rows.values():
        for column, domain in (("image", 0), ("target", 1)):
            pixels = np.frombuffer(row[column], np.uint8).reshape(32, 32, 3)
            np.testing.assert_array_equal(pixels, draw("portraits", row["attributes"], domain, 32))
        assert row["landmarks"] == pytest.approx(landmarks_of("portraits", row["attributes"], 0, 32), abs=1e-5)
        assert row["split"] == rendered.split_of(0, row["identity"])

    # a later part of the same set: the rows of those indices, whatever --count and --first
    assert run("--output", tmp_path / "part", "--count", 15, "--first", 10, "--image-size", 32) == 0
    part = rows_of(tmp_path / "part")
    assert {name: part[name] for name in part} == {name: rows[name] for name in sorted(rows)[10:25]}

    # the same again, made by two appends
    assert run("--output", tmp_path / "grown", "--count", 20, "--image-size", 32) == 0
    assert run("--output", tmp_path / "grown", "--count", 10, "--first", 20, "--image-size", 32, "--append") == 0
    grown = read_card(str(tmp_path / "grown"))
    assert (grown.version, grown.splits) == (2, card.splits)
    assert grown.mean_landmarks == card.mean_landmarks
    with pytest.raises(InputError, match="seed"):
        run("--output", tmp_path / "grown", "--count", 5, "--first", 30, "--image-size", 32, "--append", "--seed", 1)


@pytest.mark.parametrize("pairing", ["unpaired", "self"])
def test_without_counterparts_everyone_is_in_one_domain(pairing: str, tmp_path: Path) -> None:
    options = ("--scene", "landscapes", "--count", 40, "--image-size", 32, "--pairing", pairing)
    assert run("--output", tmp_path / "set", *options) == 0
    card, rows = read_card(str(tmp_path / "set")), rows_of(tmp_path / "set")
    assert (card.pairing, card.domains) == (pairing, ("day", "night"))
    assert {row["domain"] for row in rows.values()} == {0, 1}
    assert len({row["identity"] for row in rows.values()}) == len(rows) == 40
    for row in rows.values():
        assert row["target"] is None
        assert row["landmarks"] is None
        pixels = np.frombuffer(row["image"], np.uint8).reshape(32, 32, 3)
        np.testing.assert_array_equal(pixels, draw("landscapes", row["attributes"], row["domain"], 32))


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_a_person_at_several_moments(pairing: str, tmp_path: Path) -> None:
    """Who it is stays, and the first moment is what it was; the rest differs."""
    options = ("--count", 20, "--image-size", 32, "--pairing", pairing, "--num-workers", 0)
    assert run("--output", tmp_path / "set", "--moments", 3, *options) == 0
    card, rows = read_card(str(tmp_path / "set")), rows_of(tmp_path / "set")
    assert card.splits == {"train": 48, "val": 6, "test": 6}
    assert sorted(rows) == [f"{person:08d}-{moment:04d}" for person in range(20) for moment in range(3)]
    moving = len(rendered_portraits.OF_THE_MOMENT)
    for person in range(20):
        of_person = [rows[f"{person:08d}-{moment:04d}"] for moment in range(3)]
        assert {(row["identity"], row["domain"], row["split"]) for row in of_person} == {
            (person, of_person[0]["domain"], rendered.split_of(0, person))
        }
        assert of_person[0]["attributes"] == parameters_of("portraits", 0, person)
        assert len({tuple(row["attributes"][:-moving]) for row in of_person}) == 1
        assert len({tuple(row["attributes"][-moving:]) for row in of_person}) == 3
        for row in of_person:
            for side, column in enumerate(("image", "target") if pairing == "paired" else ("image",)):
                pixels = np.frombuffer(row[column], np.uint8).reshape(32, 32, 3)
                domain = side if pairing == "paired" else row["domain"]
                np.testing.assert_array_equal(pixels, draw("portraits", row["attributes"], domain, 32))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--image-size", "16"), "--image-size is 16; it must lie between 32 and 256"),
        (("--image-size", "512"), "between 32 and 256"),
        (("--count", "0"), "--count is 0"),
        (("--first", "-1"), "--first is -1"),
        (("--moments", "0"), "--moments is 0"),
        (("--scene", "landscapes", "--moments", "2"), "--moments is 2; give 1 or more for --scene portraits"),
        (("--first", "99999999", "--count", "2"), "between 0 and 100,000,000"),
        (("--source", "pictures"), "leave --source out"),
        (("--scene", "seas"), "portraits"),
        (("--pairing", "matched"), "matched"),
    ],
)
def test_wrong_options_are_refused(options: tuple[str, ...], words: str) -> None:
    assert words in refused(*options)
