"""Matching: the nearest candidate, exactly, whoever computes it; ties by seed; CelebA in all its layouts."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_prepare import ATTRIBUTES, CelebA, celeba_set, refused, run

from ddpm_core import encoders, images
from ddpm_core.errors import InputError
from jobs.datasets import matching
from jobs.datasets.format import read_card
from jobs.datasets.sources import celeba


def traits(count: int, seed: int, *, landmarks: bool = True, embeddings: bool = True) -> matching.Traits:
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=(count, 16))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return matching.Traits(
        attributes=rng.choice([-1, 1], (count, 9)),
        landmarks=rng.integers(-60, 60, (count, 10)) if landmarks else None,
        embeddings=matching.quantised(unit) if embeddings else None,
    )


def costs(one: matching.Traits, two: matching.Traits) -> np.ndarray:
    """(n, m) by the definition in the module's docstring, in integers."""
    total = np.zeros((len(one.attributes), len(two.attributes)), np.int64)
    for name, scale in (("attributes", matching.ATTRIBUTE), ("landmarks", matching.LANDMARK), ("embeddings", 1)):
        a, b = getattr(one, name), getattr(two, name)
        if a is not None:
            total += scale**2 * ((a[:, None].astype(np.int64) - b[None].astype(np.int64)) ** 2).sum(axis=2)
    return total


def keys(count: int, seed: int = 0) -> list[str]:
    return [f"{seed}/{number}" for number in range(count)]


@pytest.mark.parametrize(("landmarks", "embeddings"), [(False, False), (True, False), (True, True)])
def test_nothing_is_nearer(landmarks: bool, embeddings: bool) -> None:
    one = traits(150, 1, landmarks=landmarks, embeddings=embeddings)
    two = traits(300, 2, landmarks=landmarks, embeddings=embeddings)
    found = matching.nearest(one.vectors(), matching.Candidates.of(two.vectors()), keys(150))
    expected = costs(one, two)
    np.testing.assert_array_equal(expected[np.arange(150), found], expected.min(axis=1))
    unique = (expected == expected.min(axis=1, keepdims=True)).sum(axis=1) == 1
    np.testing.assert_array_equal(found[unique], expected.argmin(axis=1)[unique])


def test_weights_are_as_documented() -> None:
    assert 4 * matching.ATTRIBUTE**2 == 400 * matching.LANDMARK**2
    np.testing.assert_allclose(2 * matching.IDENTITY**2 * 0.11, 4 * matching.ATTRIBUTE**2, rtol=0.02)


def test_tasks_give_what_one_search_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "QUERIES_PER_TASK", 64)
    one, two = traits(300, 3).vectors(), traits(400, 4).vectors()
    counts: list[int] = []
    found = matching.match(one, two, keys(300), counts.append)
    np.testing.assert_array_equal(found, matching.nearest(one, matching.Candidates.of(two), keys(300)))
    assert sorted(counts) == [44, 64, 64, 64, 64]


def test_all_ties_are_candidates_however_many() -> None:
    """70 distinct vectors at the same distance (more than NEAREST), one of them 31 times: 100 candidates tie."""
    query = np.zeros((3000, 70), np.float32)
    near = np.concatenate([np.eye(70, dtype=np.float32), np.tile(np.eye(70, dtype=np.float32)[5], (30, 1))])
    candidates = matching.Candidates.of(np.concatenate([near, 5 * np.eye(70, dtype=np.float32)]))
    found = matching.nearest(query, candidates, keys(3000))
    counts = np.bincount(found, minlength=170)
    assert (counts[100:] == 0).all()
    assert counts[:100].min() > 0
    assert np.square(counts[:100] - 30).sum() / 30 < 150  # chi squared of 99 degrees of freedom: < 150 in 99.9 %


def test_ties_are_decided_by_seed() -> None:
    one, many = np.ones((50, 4), np.float32), matching.Candidates.of(np.ones((20, 4), np.float32))
    first = matching.nearest(one, many, keys(50))
    np.testing.assert_array_equal(first, matching.nearest(one, many, keys(50)))
    assert (first != matching.nearest(one, many, keys(50, seed=1))).any()
    assert len(set(first.tolist())) > 10


def test_numbers_that_float32_cannot_hold_are_not_computed_with() -> None:
    far = matching.Traits(attributes=np.ones((2, 3), int), landmarks=np.full((2, 10), 300))
    with pytest.raises(AssertionError):
        far.vectors()


def test_attributes_that_go_with_the_domain_are_not_compared() -> None:
    domain = np.array([0, 0, 1, 1])
    attributes = np.array([[-1, 1, 1], [-1, -1, 1], [1, 1, 1], [1, -1, 1]])
    np.testing.assert_allclose(celeba.correlation(attributes, domain), [1, 0, 0])


def test_report() -> None:
    given = matching.Traits(
        attributes=np.array([[1, 1], [1, -1], [-1, -1]]),
        landmarks=np.array([[0, 0, 0, 0], [3, 4, 0, 0], [0, 0, 6, 8]]),
        embeddings=np.array([[127, 0], [0, 127], [0, -127]], np.int8),
    )
    others = np.array([[1, 1, 1], [1, -1, -1], [-1, -1, 1]])
    notes = matching.report(given, others, np.array([1, 0, 0]), ["a", "b", "c"])
    assert notes == [
        "matched by 2 of 3 attributes, landmarks, identity: of those 1.33 differ on average, of all 2.00 (at most 2); "
        "landmarks lie 3.3 px apart; the cosine of embeddings is 0.00; "
        "an image serves as match for up to 2 others, 33% for none",
        "worst matches: c with a, b with a, a with b",
    ]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder") / "16"))


def write_encoder(folder: Path, image_size: int = 16) -> Path:
    """An identity encoder with random weights."""
    torch.manual_seed(0)
    config = encoders.EncoderConfig(kind="identity", image_size=image_size, widths=(8, 16), embedding_channels=24)
    folder.mkdir()
    for name, content in encoders.encoder_files(encoders.IdentityEncoder(config).state_dict(), config).items():
        (folder / name).write_bytes(content)
    return folder


def test_embeddings(encoder_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "IMAGES_PER_TASK", 7)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), np.uint8)
    seen: list[int] = []
    found = matching.embed(pixels.__getitem__, 50, encoder_folder, seen.append)
    with torch.inference_mode():
        right = encoders.load_identity_encoder(encoder_folder)(images.to_tensor(pixels)).numpy()
    np.testing.assert_allclose(found, right * 127, atol=0.51)
    assert sum(seen) == 50
    np.testing.assert_allclose(
        matching.cosines(found, np.arange(50)[::-1]), (right * right[::-1]).sum(axis=1), atol=0.02
    )


def test_no_encoder_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no encoder here"):
        matching.load_encoder(str(tmp_path))


# ------------------------------------------------------------------------------------------------ celeba


@pytest.fixture
def source(tmp_path: Path) -> CelebA:
    """60 images of 20 people with split, identities and landmarks."""
    made = CelebA(tmp_path / "in")
    made.text("list_eval_partition.txt", made.partition())
    made.text("identity_CelebA.txt", made.people[:, None])
    points = np.random.default_rng(1).integers(60, 110, (60, 10))
    made.text("list_landmarks_align_celeba.txt", points, tuple("abcdefghij"))
    return made


def test_people_who_look_alike_are_matched(source: CelebA, encoder_folder: str, tmp_path: Path) -> None:
    encoder = Path(shutil.copytree(encoder_folder, tmp_path / "encoder"))
    rows = celeba_set(source, tmp_path / "out", "--identity-encoder", encoder, "--match-correlation", 2)
    card = read_card(str(tmp_path / "out"))
    assert any("4 of 4 attributes, landmarks, identity: " in note for note in card.notes)
    pixels = np.stack([np.frombuffer(rows[name]["image"], np.uint8).reshape(16, 16, 3) for name in source.names])
    with torch.inference_mode():
        unit = encoders.load_identity_encoder(str(encoder))(images.to_tensor(pixels)).numpy()
    points = np.random.default_rng(1).integers(60, 110, (60, 10))
    traits = matching.Traits(
        attributes=np.delete(source.values, 1, axis=1), landmarks=points - 100, embeddings=matching.quantised(unit)
    )
    cost = costs(traits, traits)
    sides = np.array([f"{rows[name]['split']} {rows[name]['domain']}" for name in source.names])
    for number, name in enumerate(source.names):
        other = f"{rows[name]['split']} {1 - rows[name]['domain']}"
        best = cost[number, sides == other].min()
        found = cost[number, source.names.index(rows[name]["target_id"])]
        assert found <= best + 300  # embeddings of a batch of another size may round another way
    # the encoder is known by its content: where it lies is no difference
    moved = Path(shutil.move(encoder, tmp_path / "moved"))
    flags = ("--source", source.folder, "--output", tmp_path / "out", "--image-size", 16, "--match-correlation", 2)
    assert run("celeba", *flags, "--identity-encoder", moved) == 0
    assert "--identity-encoder" in refused("celeba", *flags)


def test_self(source: CelebA, tmp_path: Path) -> None:
    rows = celeba_set(source, tmp_path / "out", "--pairing", "self")
    assert read_card(str(tmp_path / "out")).pairing == "self"
    assert {row["target"] for row in rows.values()} == {None}
    assert len(rows) == 60


def official(source: CelebA) -> None:
    """As the project's drive has it: Img, Anno, Eval, with the archives and what is not aligned beside."""
    root = source.folder
    for file, folder in (
        ("list_attr_celeba.txt", "Anno"),
        ("identity_CelebA.txt", "Anno"),
        ("list_landmarks_align_celeba.txt", "Anno"),
        ("list_eval_partition.txt", "Eval"),
        ("img_align_celeba", "Img"),
    ):
        (root / folder).mkdir(exist_ok=True)
        (root / file).rename(root / folder / file)
    (root / "Anno/list_landmarks_celeba.txt").write_text("1\nlefteye_x\n000001.jpg 9999\n")
    (root / "Img/img_align_celeba.zip").write_text("not unpacked to the end")
    wild = root / "Img/img_celeba"
    wild.mkdir()
    (wild / "000001.jpg").write_text("not aligned")


def official_png(source: CelebA) -> None:
    """The lossless release: the lists still say .jpg."""
    from PIL import Image

    official(source)
    jpg, png = (
        source.folder / "Img/img_align_celeba",
        source.folder / "Img/img_align_celeba_png.7z/img_align_celeba_png",
    )
    png.mkdir(parents=True)
    for name in source.names:
        Image.open(jpg / name).save(png / name.replace(".jpg", ".png"))
    shutil.rmtree(jpg)
    (source.folder / "Img/img_align_celeba.zip").unlink()


def kaggle(source: CelebA) -> None:
    """Comma-separated lists, and the images in a folder of the same name twice."""
    points = np.random.default_rng(1).integers(60, 110, (60, 10))
    source.csv("list_attr_celeba.csv", source.values, ATTRIBUTES)
    source.csv("list_eval_partition.csv", source.partition(), ("partition",))
    source.csv("list_landmarks_align_celeba.csv", points, tuple("abcdefghij"))
    for file in source.folder.glob("*.txt"):
        if "identity" not in file.name:  # Kaggle has none: kept here, so that all rows are equal
            file.unlink()
    (source.folder / "img_align_celeba").rename(source.folder / "inner")
    (source.folder / "img_align_celeba").mkdir()
    (source.folder / "inner").rename(source.folder / "img_align_celeba/img_align_celeba")


def torchvision(source: CelebA) -> None:
    """torchvision.datasets.CelebA(root): all below root/celeba, the archive left beside what was unpacked."""
    inner = source.folder / "celeba"
    files = list(source.folder.iterdir())
    inner.mkdir()
    for file in files:
        file.rename(inner / file.name)
    with zipfile.ZipFile(inner / "img_align_celeba.zip", "w") as archive:
        archive.write(inner / "img_align_celeba/000001.jpg", "img_align_celeba/000001.jpg")


@pytest.mark.parametrize("layout", [official, official_png, kaggle, torchvision])
def test_layouts_give_the_same_rows(source: CelebA, tmp_path: Path, layout: Callable[[CelebA], None]) -> None:
    expected = celeba_set(source, tmp_path / "one")
    layout(source)
    rows = celeba_set(source, tmp_path / "two")
    for name, row in rows.items():
        for column, value in row.items():
            if layout is official_png and column in ("image", "target"):  # a JPEG is scaled while it is decoded
                one, two = (np.frombuffer(pixels, np.uint8).astype(int) for pixels in (value, expected[name][column]))
                assert np.abs(one - two).mean() < 4
            else:
                assert value == expected[name][column], (name, column)


@pytest.mark.parametrize(
    ("points", "columns", "reason"),
    [
        (np.full((60, 10), 500), tuple("abcdefghij"), "000001.jpg has landmarks far outside of its 178 x 218 pixels"),
        (np.full((60, 4), 50), tuple("abcd"), "has 4 columns; x and y of five points"),
    ],
)
def test_landmarks_that_cannot_be(
    source: CelebA, tmp_path: Path, points: np.ndarray, columns: tuple[str, ...], reason: str
) -> None:
    source.text("list_landmarks_align_celeba.txt", points, columns)
    assert reason in refused("celeba", "--source", source.folder, "--output", tmp_path / "out")


def test_encoders_that_cannot_be_used(source: CelebA, encoder_folder: str, tmp_path: Path) -> None:
    flags = ("--source", source.folder, "--output", tmp_path / "out")
    assert f"--identity-encoder {tmp_path}/none: no encoder here" in refused(
        "celeba", *flags, "--identity-encoder", tmp_path / "none"
    )
    message = refused("celeba", *flags, "--identity-encoder", encoder_folder, "--pairing", "unpaired")
    assert "--identity-encoder has no effect with --pairing unpaired" in message


def test_a_long_table_is_parsed_like_a_short_one() -> None:
    names = [f"{number:06d}.jpg" for number in range(2500)]
    values = np.random.default_rng(0).choice([-1, 1], (2500, 3))
    lines = [f"{name} {' '.join(f'{v:2d}' for v in row)}" for name, row in zip(names, values, strict=True)]
    table = celeba.parse_table("\n".join(["2500", "A B C", *lines]).encode(), "x.txt", header=True)
    assert list(table.rows) == names
    np.testing.assert_array_equal(np.stack(list(table.rows.values())), values)
    lines[2100] += " 1"
    with pytest.raises(InputError, match="line 2103: 4 values where 3 are expected"):
        celeba.parse_table("\n".join(["2500", "A B C", *lines]).encode(), "x.txt", header=True)
