"""Images to a data set, as users call it: what it makes of each source, what it sets aside, what it refuses."""

import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pyarrow.parquet
import pytest
from PIL import Image, ImageDraw

from ddpm_core import images, storage
from ddpm_core.errors import InputError
from jobs import prepare
from jobs.datasets import decode, layout
from jobs.datasets.archive import Archive
from jobs.datasets.format import FORMAT_VERSION, SPLITS, read_card
from jobs.datasets.layout import Item
from jobs.datasets.listing import Listing
from jobs.datasets.options import Earth
from jobs.datasets.source import split_names
from jobs.datasets.sources import earth, folders
from jobs.datasets.sources.celeba import parse_table

ROOT = Path(__file__).resolve().parent.parent
ATTRIBUTES = ("Bald", "Male", "Smiling", "Wearing_Hat", "Young")


def run(*argv: object) -> int:
    return prepare.main([str(argument) for argument in argv])


def refused(*argv: object) -> str:
    """The one line with which a command is refused."""
    with pytest.raises(InputError) as caught:
        run(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def made(folder: Path | str) -> dict[str, bytes]:
    """All files but the environment, which carries the date."""
    return {
        name: storage.read_bytes(f"{folder}/{name}")
        for name in storage.list_files(str(folder))
        if name != "environment.json"
    }


def table(folder: Path | str, split: str) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(Path(folder) / split / "part-00000.parquet").to_pylist()


def all_rows(folder: Path | str) -> dict[str, dict[str, Any]]:
    card = read_card(str(folder))
    return {
        row["id"]: row | {"split": split} for split in card.splits if card.splits[split] for row in table(folder, split)
    }


def rejected(folder: Path | str) -> dict[str, str]:
    rows = pyarrow.parquet.read_table(Path(folder) / "rejected.parquet").to_pylist()
    return {row["picture"]: row["reason"] for row in rows}


def drawn(number: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """A disc of its own place and colour for each number."""
    image = Image.new("RGB", size, (number * 5 % 256, 90, 200))
    x, y = size[0] * (0.3 + number % 5 / 12), size[1] * (0.3 + number // 5 % 5 / 12)
    ImageDraw.Draw(image).ellipse((x - 6, y - 6, x + 6, y + 6), fill=(250, number * 11 % 256, 20))
    return image


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


# ------------------------------------------------------------------------------------------------- earth


@pytest.fixture(scope="module")
def earth_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earth") / "set"
    assert run("earth", "--output", folder) == 0
    return folder


def place(row: dict[str, Any]) -> tuple[int, int]:
    """top, left of an earth tile."""
    top, left = row["id"].split("-")
    return int(top[1:]), int(left[1:])


def test_earth_has_enough_of_everything(earth_set: Path) -> None:
    card = read_card(str(earth_set))
    assert card.splits["train"] > 1000
    assert card.splits["val"] >= 50
    assert card.splits["test"] >= 80
    assert (card.pairing, card.domains, card.image_size) == ("paired", ("day", "night"), 64)
    assert "NASA" in card.licence
    assert {path.name for path in earth_set.iterdir()} >= {"contact_sheet.png", "environment.json", "dataset.json"}
    assert Image.open(earth_set / "contact_sheet.png").size[0] > 1000


def test_no_pixel_of_a_test_tile_is_seen_in_training(earth_set: Path) -> None:
    seen = np.zeros((2048, 4096), int)
    for bit, split in enumerate(SPLITS):
        for row in table(earth_set, split):
            top, left = place(row)
            seen[top : top + 64, left : left + 64] |= 1 << bit
    assert set(np.unique(seen)) <= {0, 1, 2, 4}


def test_val_and_test_tiles_are_disjoint_and_spread_over_the_continents(earth_set: Path) -> None:
    count = np.zeros((2048, 4096), int)
    lands = {"americas": 0, "africa and europe": 0, "asia": 0, "australia": 0}
    for row in table(earth_set, "test"):
        top, left = place(row)
        count[top : top + 64, left : left + 64] += 1
        longitude, latitude = left / 4096 * 360 - 180, 90 - top / 2048 * 180
        if -60 < latitude < 75:
            south_east = longitude > 110 and latitude < -8
            where = "americas" if longitude < -30 else "africa and europe" if longitude < 50 else "asia"
            lands["australia" if south_east else where] += 1
    assert count.max() == 1
    assert min(lands.values()) >= 3, lands


def test_shares_of_land(earth_set: Path) -> None:
    day = np.asarray(Image.open(earth.MAPS / "day.avif").convert("RGB"))
    options = Earth(output="x", stride=64)
    tiles = {split: len(of) for split, of in earth.select_tiles(earth.Sums.of(day), options).items()}
    assert tiles["val"] / sum(tiles.values()) == pytest.approx(0.10, abs=0.02)
    assert tiles["test"] / sum(tiles.values()) == pytest.approx(0.15, abs=0.02)


def test_tiles_are_the_maps_pixels_and_registered(earth_set: Path) -> None:
    day, night = (np.asarray(Image.open(earth.MAPS / f"{name}.avif").convert("RGB")) for name in ("day", "night"))
    for row in table(earth_set, "val")[::7]:
        top, left = place(row)
        assert row["image"] == day[top : top + 64, left : left + 64].tobytes()
        assert row["target"] == night[top : top + 64, left : left + 64].tobytes()


@pytest.mark.parametrize(
    ("latitude", "longitude", "land"),
    [(23, 10, True), (-5, -62, True), (62, 100, True), (72, -40, True), (40, -100, True), (-25, 134, True),
     (30, -40, False), (0, -150, False), (35, 18, False), (-60, 0, False), (42, 50.5, False), (56, -150, False)],
)  # fmt: skip
def test_land_and_sea(latitude: float, longitude: float, land: bool) -> None:
    day = np.asarray(Image.open(earth.MAPS / "day.avif").convert("RGB"))
    y, x = int((90 - latitude) / 180 * 2048), int((longitude + 180) / 360 * 4096)
    assert earth.is_land(day[y - 3 : y + 4, x - 3 : x + 4]).mean() == pytest.approx(float(land), abs=0.3)


@pytest.mark.parametrize("size", [32, 128])
def test_earth_at_other_sizes(size: int, tmp_path: Path) -> None:
    assert run("earth", "--output", tmp_path, "--image-size", size, "--encoding", "jpeg") == 0
    assert all(count >= 20 for count in read_card(str(tmp_path)).splits.values())


def test_a_submitted_job_finds_the_maps_where_the_project_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = earth.MAPS
    monkeypatch.setattr(earth, "MAPS", tmp_path / "jobs/datasets/sources/earth_maps")  # the package leaves them out
    assert earth.maps_folder() == there

    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(earth.importlib.metadata, "distribution", not_installed)
    with pytest.raises(InputError, match=r"do not travel with a submitted job, .*; give --source"):
        prepare.main(["earth", "--output", str(tmp_path / "out")])


def test_earth_from_other_maps(tmp_path: Path) -> None:
    source = tmp_path / "maps"
    assert "exactly one map called day" in refused("earth", "--output", tmp_path / "out", "--source", ROOT / "jobs")
    save(Image.new("RGB", (512, 256)), source / "day.png")
    assert "night" in refused("earth", "--output", tmp_path / "out", "--source", source)
    save(Image.new("RGB", (256, 256)), source / "night.png")
    assert "equally large" in refused("earth", "--output", tmp_path / "out", "--source", source)


def test_the_same_command_again_does_nothing_and_overwriting_gives_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("rendered", "--count", 20, "--image-size", 32, "--output", tmp_path)
    assert run(*flags) == 0
    before, time_before = made(tmp_path), (tmp_path / "dataset.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(*flags) == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "dataset.json").stat().st_mtime_ns == time_before
    assert run(*flags, "--overwrite") == 0
    assert made(tmp_path) == before


def test_a_set_of_an_older_format_is_replaced_when_asked(tmp_path: Path) -> None:
    command = ["rendered", "--count", "20", "--image-size", "32", "--output", str(tmp_path / "set")]
    prepare.main(command)
    card = tmp_path / "set/dataset.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"format_version": 1}))
    with pytest.raises(InputError, match=r"format_version 1, .*; give another --output, or --overwrite to replace it"):
        prepare.main(command)
    assert prepare.main([*command, "--overwrite"]) == 0
    assert json.loads(card.read_text())["format_version"] == FORMAT_VERSION


def test_another_data_set_is_not_overwritten_unasked(earth_set: Path, tmp_path: Path) -> None:
    message = refused("earth", "--output", earth_set, "--image-size", 32)
    assert "--image-size 64, asked for 32" in message
    assert "--overwrite" in message


def test_a_damaged_data_set_is_made_again(earth_set: Path, tmp_path: Path) -> None:
    shutil.copytree(earth_set, tmp_path / "set")
    (tmp_path / "set/val/part-00000.parquet").write_bytes(b"cut")
    assert run("earth", "--output", tmp_path / "set") == 0
    assert made(tmp_path / "set") == made(earth_set)


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_gives_the_same_bytes(earth_set: Path, tmp_path: Path) -> None:
    arguments = ["earth", "--output", str(tmp_path / "set")]
    slow = (
        "import sys, time; from ddpm_core import storage; from jobs import prepare; write = storage.write_bytes\n"
        "storage.write_bytes = lambda uri, data: (write(uri, data), 'val/' in uri and time.sleep(600))\n"
        "prepare.main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    until = time.monotonic() + 400
    while not (tmp_path / "set/val/part-00000.parquet").exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [each.name for each in tmp_path.iterdir()] == ["set"]  # nothing is left of temporary files
    assert not (tmp_path / "set/dataset.json").exists()
    with pytest.raises(InputError, match="is not a data set"):
        read_card(str(tmp_path / "set"))
    command = [sys.executable, "-m", "jobs.prepare", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert made(tmp_path / "set") == made(earth_set)


# ----------------------------------------------------------------------------------------------- folders


@pytest.fixture
def two_folders(tmp_path: Path) -> Path:
    """Twenty images of each of two domains, equally named but for the ending."""
    for number in range(20):
        save(drawn(number), tmp_path / f"in/cat/sub/{number:02d}.jpg", quality=95)
        save(drawn(number + 100), tmp_path / f"in/dog/sub/{number:02d}.png")
    (tmp_path / "in/readme.txt").write_text("not an image")
    (tmp_path / "in/cat/.hidden.jpg").write_text("not an image")
    return tmp_path / "in"


def test_folders(two_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--image-size", 16, "--licence", "CC0", "--name", "pets")
    assert run("folders", "--source", two_folders, "--output", tmp_path / "out", *flags) == 0
    card = read_card(str(tmp_path / "out"))
    assert (card.name, card.licence, card.pairing, card.domains) == ("pets", "CC0", "unpaired", ("cat", "dog"))
    assert card.splits == {"train": 32, "val": 4, "test": 4}
    assert card.domain_counts["val"] == {"cat": 2, "dog": 2}
    rows = all_rows(tmp_path / "out")
    assert rows["cat/sub/03.jpg"]["domain"] == 0
    assert rows["dog/sub/03.png"]["split"] == rows["cat/sub/03.jpg"]["split"]
    assert rows["dog/sub/03.png"]["target"] is None
    assert rows["dog/sub/03.png"]["image"] == images.to_square(drawn(103), 16).tobytes()
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert out[-1].endswith("contact_sheet.png")


def test_a_broken_image_without_counterpart_is_set_aside_once(two_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(two_folders, tmp_path / "source")
    first = next(path for path in sorted((tmp_path / "source").iterdir()) if path.is_dir())
    (first / "broken.jpg").write_text("no image")
    out = tmp_path / "out"
    prepare.main(["folders", "--source", str(tmp_path / "source"), "--output", str(out), "--pairing", "paired"])
    names = pyarrow.parquet.read_table(out / "rejected.parquet").column("picture").to_pylist()
    assert names.count(f"{first.name}/broken.jpg") == 1


def test_folders_paired_by_name(two_folders: Path, tmp_path: Path) -> None:
    save(drawn(1), two_folders / "cat/alone.jpg")
    (two_folders / "dog/sub/05.png").write_bytes(b"")
    flags = ("--pairing", "paired", "--image-size", 16)
    assert run("folders", "--source", two_folders, "--output", tmp_path / "out", *flags) == 3
    rows = all_rows(tmp_path / "out")
    assert len(rows) == 19
    assert rows["sub/07"]["target_id"] == "dog/sub/07.png"
    target = np.frombuffer(rows["sub/07"]["target"], np.uint8).reshape(16, 16, 3)
    np.testing.assert_allclose(target.mean((0, 1)), np.asarray(drawn(107)).mean((0, 1)), atol=5)
    assert rejected(tmp_path / "out") == {
        "cat/alone.jpg": "no counterpart of the same name in dog",
        "cat/sub/05.jpg": "its counterpart cannot be used",
        "dog/sub/05.png": "the file is empty",
    }


@pytest.mark.parametrize(("num_pairs", "held_out"), [(6, 1), (2, 0)])
def test_pairs_are_split_among_themselves(tmp_path: Path, capsys: Any, num_pairs: int, held_out: int) -> None:
    """However many images have no counterpart or cannot be read; a split that stays empty is spoken of."""
    for number in range(num_pairs):
        for domain in ("day", "night"):
            save(drawn(number), tmp_path / "in" / domain / f"pair-{number}.png")
    for number in range(30):
        save(drawn(number), tmp_path / "in" / ("day", "night")[number % 2] / f"alone-{number}.png")
        (tmp_path / "in/day" / f"broken-{number}.png").write_bytes(b"no image")
        save(drawn(number), tmp_path / "in/night" / f"broken-{number}.png")
    out = tmp_path / "out"
    flags = ("--pairing", "paired", "--image-size", 8, "--num-workers", 0, "--set-aside-ok")
    assert run("folders", "--source", tmp_path / "in", "--output", out, *flags) == 0
    assert read_card(str(out)).splits == {"train": num_pairs - 2 * held_out, "val": held_out, "test": held_out}
    told = "no rows for val: jobs.train does not take it; prepare it again with more images"
    assert (told in capsys.readouterr().out) == (not held_out)


def test_folders_anywhere_named_on_the_command_line(two_folders: Path, tmp_path: Path) -> None:
    domains = ("--domain", f"a={two_folders}/cat", "--domain", f"b={two_folders}/dog")
    assert run("folders", *domains, "--output", tmp_path / "out", "--image-size", 8) == 0
    assert read_card(str(tmp_path / "out")).domains == ("a", "b")


@pytest.mark.parametrize("train", ["train", "Train"])
@pytest.mark.parametrize("layout", ["{split}/{domain}", "{domain}/{split}"])
def test_split_folders_are_respected(tmp_path: Path, layout: str, train: str) -> None:
    for split, count in ((train, 12), ("test", 3)):
        for domain in ("a", "b"):
            for number in range(count):
                save(drawn(number), tmp_path / "in" / layout.format(split=split, domain=domain) / f"{number}.png")
    assert run("folders", "--source", tmp_path / "in", "--output", tmp_path / "out", "--image-size", 8) == 0
    card = read_card(str(tmp_path / "out"))
    assert card.splits == {"train": 22, "val": 2, "test": 6}
    assert all("/test/" in row["id"] for row in table(tmp_path / "out", "test"))
    assert "10% val" in card.notes[0]


def test_splits_do_not_depend_on_anything_but_names() -> None:
    names = [f"{number}.jpg" for number in range(1000)]
    splits = split_names(names)
    assert splits == split_names(reversed(names))
    counts = [list(splits.values()).count(split) for split in SPLITS]
    assert counts == [800, 100, 100]
    assert sorted(split_names(names[:3]).values()) == ["test", "train", "val"]
    assert set(split_names(names[:2]).values()) == {"train"}


# ------------------------------------------------------------------------------------- folders as they come


def listing_of(*folders: str) -> Listing:
    """Two images in each of the folders."""
    paths = sorted(f"{folder}/{number}.jpg" for folder in folders for number in range(2))
    return Listing(images={path: storage.Entry(1, 0, "", path) for path in paths}, rejected={}, others={}, notes=[])


@pytest.mark.parametrize(
    ("folders", "domains"),
    [
        ("trainA trainB testA testB", "A:train,test B:train,test"),
        ("trainA trainB valA valB testA testB", "A:train,val,test B:train,val,test"),
        ("train_A train_B test_A test_B", "A:train,test B:train,test"),
        ("A_train B-train A_test B.test", "A:train,test B:train,test"),
        ("trainX trainY", "X:train Y:train"),
        ("traina trainb testa testb", "a:train,test b:train,test"),
        ("trainDay TrainNight test-day testNight", "Night:train,test day:train,test"),
        ("horse2zebra/trainA horse2zebra/trainB horse2zebra/testA", "A:train,test B:train"),
        ("train/trainA train/trainB test/testA test/testB", "A:train,test B:train,test"),
        ("training_set/cats training_set/dogs test_set/cats test_set/dogs", "cats:train,test dogs:train,test"),
        ("training_set/training_set/cats training_set/training_set/dogs test_set/test_set/cats",
         "cats:train,test dogs:train"),
        ("Training/cats Training/dogs dev/cats Hold-out/dogs", "cats:train,val dogs:train,test"),
        ("train_images/cats train_images/dogs Evaluation/cats", "cats:train,val dogs:train"),
        ("train2017/cats train2017/dogs val2017/cats", "cats:train,val dogs:train"),
        ("train/cats train/dogs test/Cats", "Cats:train,test dogs:train"),
        ("data/train/cats data/train/dogs data/validation/cats", "cats:train,val dogs:train"),
        ("cats/train cats/valid dogs/TRAIN dogs/Testing", "cats:train,val dogs:train,test"),
        ("cats/a/train_1 cats/a/test_1 dogs", "cats:train,test dogs:-"),
        ("day/2024/test night", "day:- night:-"),
        ("day/fold0 day/fold1 night", "day:- night:-"),
        ("trains cars testimony", "cars:- testimony:- trains:-"),
        ("A/train B/train AB/train A/test", "A:train,test B:train"),
        ("A B AB", "A:- B:-"),
        ("day night day2night", "day:- night:-"),
        ("monet photo photo_to_monet", "monet:- photo:-"),
        ("a b abc", "a:- abc:- b:-"),
    ],
)  # fmt: skip
def test_which_folder_is_a_domain_and_which_a_split(folders: str, domains: str) -> None:
    found = layout.domains_in("/in", listing_of(*folders.split())).domains
    told = {
        name: ",".join(split for split in SPLITS if split in {item.split for item in items}) or "-"
        for name, items in found.items()
    }
    assert " ".join(f"{name}:{splits}" for name, splits in sorted(told.items())) == domains


@pytest.mark.parametrize(
    "folders",
    ["train train1", "train test1", "trainA trainB extra", "trainA trainB testC", "trainA train", "day night test",
     "train/day train/night extra/day", "train1 test2", "fold0 fold1 fold2", "part_1 part_2 day",
     "train/fold0 train/fold1", "train_val/day test/day"],
)  # fmt: skip
def test_what_may_be_a_split_and_may_be_none_is_refused(folders: str) -> None:
    with pytest.raises(InputError, match=r"which of the folders .* is not sure; .* --domain NAME=URI$"):
        layout.domains_in("/in", listing_of(*folders.split()))


@pytest.mark.parametrize(
    ("folders", "hint"),
    [
        ("images/cats/train images/dogs", "only images; .*; if cats, dogs are the domains, give --source IN/images$"),
        ("train test", "no images in sub-folders; .*; 2 lie in no domain's folder .*jobs.prepare day2night"),
        ("test/a test/b", "all images of a and of b lie in folders for val or test; training needs some"),
        ("train/a test/a test/b", "all images of b lie in folders for val or test; training needs some"),
        ("Day day", "the domains Day and day differ only in capitals"),
        ("cafe\u0301 caf\u00e9", "differ only in capitals or in how accents are stored"),
    ],
)  # fmt: skip
def test_layouts_that_lack_something(tmp_path: Path, folders: str, hint: str) -> None:
    for folder in folders.split():
        save(drawn(1), tmp_path / "in" / folder / "1.png")
    message = refused("folders", "--source", tmp_path / "in", "--output", tmp_path / "out")
    assert re.search(hint.replace("IN", f"{tmp_path}/in"), message), message


def test_what_systems_and_programs_leave_is_neither_domain_nor_image(tmp_path: Path) -> None:
    system = [
        "@eaDir",
        "$RECYCLE.BIN",
        "__MACOSX/day",
        "lost+found",
        ".thumbnails",
        "System Volume Information",
        "@Recycle",
    ]
    system += ["#recycle", ".Trash-1000", "day/.AppleDouble", "night/.ipynb_checkpoints", "day/@EADIR/1.png", ".git"]
    for folder in ["day", "night", *system]:
        save(drawn(len(folder)), tmp_path / "in" / folder / "1.png")
    for file in ("day/Thumbs.db", "day/._1.png", "night/.DS_Store"):
        (tmp_path / "in" / file).write_bytes(b"x")
    out = tmp_path / "out"
    assert run("folders", "--source", tmp_path / "in", "--output", out, "--image-size", 8, "--num-workers", 0) == 0
    assert set(all_rows(out)) == {"day/1.png", "night/1.png"}
    assert any(
        note.startswith("16 hidden or system files and folders passed over (") for note in read_card(str(out)).notes
    )


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    for name in ("day/1.png", "night/1.png"):
        save(drawn(len(name)), tmp_path / "in" / name)
    content = (tmp_path / "in/day/1.png").read_bytes()  # endings of text and tables are believed: none is opened
    for name, data in {"day/notes.txt": content, "day/labels.csv": content, "README.txt": b"x", "day/x": b"y"}.items():
        (tmp_path / "in" / name).write_bytes(data)
    out = tmp_path / "out"
    assert run("folders", "--source", tmp_path / "in", "--output", out, "--image-size", 8, "--num-workers", 0) == 0
    assert set(all_rows(out)) == {"day/1.png", "night/1.png"}
    assert "4 other files passed over (.txt, .csv, without an ending)" in read_card(str(out)).notes


def test_what_links_and_programs_make_of_a_folder(tmp_path: Path) -> None:
    """Loops end, what is reached twice is read once, what is not there is named; nothing waits on a pipe."""
    for number, place in enumerate(["in/day/1.png", "in/day/2.png", "in/night/1.png", "pool/3.png"]):
        save(drawn(number * 7), tmp_path / place)
    links = {"day/self": ".", "night/up": "..", "day/again.png": "1.png", "day/pool": str(tmp_path / "pool")}
    links |= {
        "day/annex.jpg": "../.git/annex/objects/x.jpg",
        "night/gone.jpg": "/nowhere/x.jpg",
        "night/notes.txt": "/x",
    }
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    os.mkfifo(tmp_path / "in/day/pipe.jpg")
    os.mkfifo(tmp_path / "in/day/fifo")
    (tmp_path / "in/night/9.jpg.dvc").write_text("outs:")
    (tmp_path / "in/night/1.png.dvc").write_text("outs:")
    out = tmp_path / "out"
    assert run("folders", "--source", tmp_path / "in", "--output", out, "--image-size", 8, "--num-workers", 0) == 3
    assert set(all_rows(out)) == {"day/1.png", "day/2.png", "day/pool/3.png", "night/1.png"}
    assert rejected(out) == {
        "day/annex.jpg": "a link of git-annex whose content is not here; git annex get brings it",
        "day/fifo": "a pipe, socket or device, not a file; remove it",
        "day/pipe.jpg": "a pipe, socket or device, not a file; remove it",
        "night/9.jpg": "tracked by DVC, and its content is not here; dvc pull brings it",
        "night/gone.jpg": "a link whose target is not there (/nowhere/x.jpg); bring it back or remove the link",
    }
    notes = read_card(str(out)).notes
    assert "2 links to folders not followed: the images there are read where they lie" in notes
    assert "1 link to images that are there already passed over" in notes


def test_a_name_is_one_images_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("day", "night"):
        save(drawn(len(folder)), tmp_path / "in" / folder / "1.png")
    good = ["x" * 251 + ".png", "new\nline.png", "tab\t.png", "-dash.png", "--output.png", "dot. .png", " lead.png"]
    good += [
        "A.png",
        "a.png",
        "e\u0301.png",
        "\u00e9.png",
        "back\\slash.png",
        "a.zip!b.png",
        "\x1b[31m.png",
        "\u2028.png",
        "a" * 100 + "/b.png",
    ]
    for number, name in enumerate(good, 20):
        save(drawn(number), tmp_path / "in/day" / name)
    for name in (b"caf\xe9.png", b"d\xe9/1.png"):
        good.append(storage.as_text(os.fsdecode(name)))
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/day/" + name))
        save(drawn(3), path)
    out = tmp_path / "out"
    assert run("folders", "--source", tmp_path / "in", "--output", out, "--image-size", 8, "--num-workers", 0) == 0
    assert set(all_rows(out)) == {f"day/{name}" for name in [*good, "1.png"]} | {"night/1.png"}
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert run("inspect", out) == 0
    assert run("folders", "--source", tmp_path / "in", "--output", out, "--image-size", 8) == 0


def test_what_is_not_read_is_set_aside_and_what_is_no_image_is_not(tmp_path: Path) -> None:
    for folder in ("day", "night"):
        save(drawn(len(folder)), tmp_path / "in" / folder / "1.png")
    for name in ("raw.DNG", "layers.psd", "x.jxl", "README", "notes.txt", "x.bin", "empty"):
        (tmp_path / "in/day" / name).write_bytes(b"" if name == "empty" else b"not an image")
    (tmp_path / "in/day/lfs.jpg").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    images_all_the_same = {"bare", "2.png_large", "3.png~", "live.mov"}
    for name in images_all_the_same:
        save(drawn(3), tmp_path / "in/day" / name, format="PNG")
    out = tmp_path / "out"
    flags = ("--output", out, "--image-size", 8, "--num-workers", 0)
    assert run("folders", "--source", tmp_path / "in", *flags) == 3
    unread = "{}, which is not read; export it as JPEG or PNG"
    assert rejected(out) == {
        "day/layers.psd": unread.format("an image in layers"),
        "day/lfs.jpg": "a pointer of Git LFS whose content is not here; git lfs pull brings it",
        "day/raw.DNG": unread.format("a raw photo"),
        "day/x.jxl": unread.format("JPEG XL"),
    }
    assert set(all_rows(out)) == {"night/1.png", *(f"day/{name}" for name in ("1.png", *images_all_the_same))}
    for name in ("1.png", "lfs.jpg", *images_all_the_same):
        (tmp_path / "in/day" / name).unlink()
    for where in (
        ("--source", tmp_path / "in"),
        ("--domain", f"d={tmp_path}/in/day", "--domain", f"n={tmp_path}/in/night"),
    ):
        message = refused("folders", *where, *flags, "--overwrite")
        assert "3 cannot be read, the first: " in message
        assert message.endswith("layers.psd: an image in layers, which is not read; export it as JPEG or PNG")


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a\nb", "x" * 101, " ", "a\\b", ".hidden", "\udce9"])
def test_names_that_no_domain_can_have(two_folders: Path, tmp_path: Path, name: str) -> None:
    flags = ("--domain", f"{name}={two_folders}/cat", "--domain", f"dog={two_folders}/dog")
    assert "cannot be a domain's name; take letters and digits" in refused(
        "folders", *flags, "--output", tmp_path / "out"
    )


# ------------------------------------------------------------------------------------------------- pairs


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Images in two folders, and pairs.csv, in which cat/0.png has two counterparts."""
    for number in range(20):
        save(drawn(number), tmp_path / f"in/cat/{number}.png")
        save(drawn(number + 100), tmp_path / f"in/dog/sub/{number + 100}.png")
    lines = ["cat,dog", *(f"{number}.png,sub/{number + 100}.png" for number in range(18)), "cat/0.png,sub/118.png"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "in"


def pairs_flags(listed: Path, *flags: object) -> tuple[object, ...]:
    output = listed.parent / "out"
    return ("--source", listed, "--pairs", listed.parent / "pairs.csv", "--output", output, "--image-size", 16, *flags)


def test_pairs_from_a_list(listed: Path) -> None:
    (listed / "dog/sub/117.png").write_text("text")
    assert run("folders", *pairs_flags(listed)) == 3
    rows = all_rows(listed.parent / "out")
    assert set(rows) == {f"{number}.png~sub/{number + 100}.png" for number in range(17)} | {"0.png~sub/118.png"}
    first, second = rows["0.png~sub/100.png"], rows["0.png~sub/118.png"]
    assert first["split"] == second["split"]
    assert first["image"] == second["image"] == images.to_square(drawn(0), 16).tobytes()
    assert second["target"] == images.to_square(drawn(118), 16).tobytes()
    assert second["target_id"] == "dog/sub/118.png"
    reason = "an image of the pair cannot be used (dog/sub/117.png)"
    assert rejected(listed.parent / "out")["17.png~sub/117.png"] == reason
    assert read_card(str(listed.parent / "out")).pairing == "paired"


def test_pairs_hang_together_over_versions(listed: Path) -> None:
    out = listed.parent / "out"
    assert run("folders", *pairs_flags(listed)) == 0
    before = all_rows(out)
    of = {split: [name for name, row in before.items() if row["split"] == split] for split in ("train", "val")}
    in_train, in_val = of["train"][0].partition("~")[0], of["val"][0].partition("~")[2]
    lines = ["cat,dog", f"{in_train},{in_val}", "19.png,sub/119.png", f"18.png,{in_val}"]
    (listed.parent / "pairs.csv").write_text("\n".join(lines))
    assert run("folders", *pairs_flags(listed, "--append")) == 3
    card = read_card(str(out))
    torn = {f"{in_train}~{in_val}", f"18.png~{in_val}"}
    assert rejected(out) == dict.fromkeys(torn, "earlier versions have images of it in train and in val")
    assert card.parts[0].rows == 1
    (listed.parent / "pairs.csv").write_text("\n".join([lines[0], lines[3]]))
    assert run("folders", *pairs_flags(listed, "--append")) == 3
    (shard,) = [shard.file for shard in read_card(str(out)).shards if shard.file.startswith("val/part-00001")]
    assert pyarrow.parquet.read_table(out / shard).column("id").to_pylist() == [f"18.png~{in_val}"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "lists no pairs"),
        ("cat,dog\n", "lists no pairs"),
        ("cat\n0.png\n", "line 1: two different domains"),
        ("cat,cat\n0.png,1.png\n", "line 1: two different domains"),
        ("cat,bird\n0.png,1.png\n", "line 1: there is no domain 'bird'; there are cat, dog"),
        ("cat,dog\n0.png,sub/100.png\n1.png\n", "line 3: two images are expected, it has 1 columns"),
        ("cat,dog\n0.png,sub/100.png\n\n1.png,101.png\n",
         "line 4: there is no image '101.png' in dog; write its path in that folder, such as sub/100.png"),
        ("cat,dog\n/home/me/cat/0.png,sub/100.png\n",
         "line 2: there is no image '/home/me/cat/0.png' in cat; write its path in that folder, such as 0.png"),
        ("cat,dog\n0.png,sub/100.png\n./0.png,sub/100.png\n", "line 3: the same pair as in line 2"),
        (b"cat,dog\n\xff\xfe", "is not a CSV file in UTF-8"),
        (b"cat,dog\n0.png,\0sub/100.png\n", "holds NUL bytes, so it is no text; save it as CSV in UTF-8"),
        (b"cat,dog\n" + b"x" * 200_000, "is not a CSV file in UTF-8 (field larger than field limit"),
    ],
    ids=["empty", "header", "one-column", "same", "domain", "columns", "picture", "absolute", "twice", "bytes", "nul",
         "field"],
)  # fmt: skip
def test_pairs_that_are_wrong(listed: Path, text: str | bytes, reason: str) -> None:
    (listed.parent / "pairs.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert reason in refused("folders", *pairs_flags(listed))
    (listed.parent / "pairs.csv").unlink()
    assert "pairs.csv does not exist" in refused("folders", *pairs_flags(listed))


def test_pairs_of_hundreds_of_megabytes_are_not_read(listed: Path) -> None:
    with (listed.parent / "pairs.csv").open("r+b") as file:
        file.truncate(300_000_000)  # no disk is used
    assert "has 300 MB; a list of pairs has at most 100" in refused("folders", *pairs_flags(listed))


@pytest.mark.parametrize(
    "spelled",
    ["{}", "./{}", "IN/cat/{}|IN/dog/{}", "IN\\cat\\{}|IN\\dog\\{}", "cat/{}|dog/{}", ".\\cat//{}|dog\\.\\{}"],
    ids=["plain", "dot", "absolute", "backslashes", "source", "mixed"],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_pairs_as_programs_write_them(tmp_path: Path, encoding: str, delimiter: str, spelled: str) -> None:
    there = {domain: [Item(file="a é.jpg", uri=f"/in/{domain}/a é.jpg", split=None)] for domain in ("cat", "dog")}
    left, _, right = spelled.replace("IN", "/in").partition("|")
    line = delimiter.join([left.format("a e\u0301.jpg"), (right or left).format("a é.jpg")])
    text = ("sep=;\r\n" if delimiter == ";" else "") + f"Cat{delimiter}DOG\r\n{line}\r\n\r\n"
    (tmp_path / "pairs.csv").write_bytes(text.encode(encoding))
    found = folders.parse_pairs(str(tmp_path / "pairs.csv"), there, "/in")
    assert (found.domains, found.lines) == (("cat", "dog"), [(there["cat"][0], there["dog"][0])])


def test_pairs_as_spreadsheets_write_them(listed: Path) -> None:
    lines = ['"cat", "dog"', *(f'"{number}.png", "sub/{number + 100}.png"' for number in range(18)), "", " ", ","]
    (listed.parent / "pairs.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    assert run("folders", *pairs_flags(listed)) == 0
    assert len(all_rows(listed.parent / "out")) == 18


def test_counterparts_spelled_otherwise_are_found(tmp_path: Path) -> None:
    """macOS stores accents apart from their letters; cameras and phones differ in capitals."""
    names = {"re\u0301": "r\u00e9", "IMG_1": "img_1", "Train/2": "train/2", "same": "same"}
    for number, (day, night) in enumerate(names.items()):
        save(drawn(number), tmp_path / f"in/day/{day}.png")
        save(drawn(number + 50), tmp_path / f"in/night/{night}.png")
    for name in ("both.png", "both.bmp", "Two.png", "two.png"):
        save(drawn(9), tmp_path / "in/day" / name)
    for name in ("both.png", "TWO.png"):
        save(drawn(9), tmp_path / "in/night" / name)
    flags = ("--pairing", "paired", "--image-size", 8, "--num-workers", 0)
    assert run("folders", "--source", tmp_path / "in", "--output", tmp_path / "out", *flags) == 3
    rows = all_rows(tmp_path / "out")
    assert {name: row["target_id"] for name, row in rows.items()} == {
        "r\u00e9": "night/r\u00e9.png",
        "IMG_1": "night/img_1.png",
        "train/2": "night/train/2.png",
        "same": "night/same.png",
    }
    assert rows["IMG_1"]["target"] == images.to_square(drawn(51), 8).tobytes()
    alone = {f"day/{name}": "no counterpart of the same name in night" for name in ("Two.png", "two.png")}
    alone |= {f"night/{name}": "no counterpart of the same name in day" for name in ("both.png", "TWO.png")}
    twice = "2 images have this name (both.bmp, both.png); a pair needs one"
    assert rejected(tmp_path / "out") == alone | {f"day/both.{ending}": twice for ending in ("png", "bmp")}


def test_pairs_of_different_shape_are_told(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(6):
        save(drawn(number, (640, 360)), tmp_path / f"in/day/{number}.jpg")
        save(drawn(number + 50, (640, 360)), tmp_path / f"in/night/{number}.png")
    save(drawn(50, (480, 360)), tmp_path / "in/night/0.png")
    save(drawn(51, (360, 640)), tmp_path / "in/night/1.png")
    save(drawn(52, (360, 640)), tmp_path / "in/night/2.jpg", exif=exif)  # 640 x 360 when turned upright
    (tmp_path / "in/night/2.png").unlink()
    save(drawn(53, (644, 360)), tmp_path / "in/night/3.png")
    flags = ("--pairing", "paired", "--image-size", 8, "--num-workers", 0)
    assert run("folders", "--source", tmp_path / "in", "--output", tmp_path / "out", *flags) == 0
    worst = "day/1.jpg 640 x 360, night/1.png 360 x 640"
    note = f"2 of 6 pairs differ in shape and may lie apart: crop them alike (worst: {worst})"
    assert note in read_card(str(tmp_path / "out")).notes


# --------------------------------------------------------------------------------------------- day2night


def test_side_by_side_images(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        for number in range(count):
            both = Image.new("RGB", (80, 40))
            both.paste(drawn(number).point(lambda level: level // 8), (0, 0))  # night is on the left
            both.paste(drawn(number), (40, 0))
            save(both, tmp_path / f"in/{split}/{number}.png")
    flags = ("--source", tmp_path / "in", "--image-size", 40, "--licence", "CC0")
    assert run("day2night", *flags, "--output", tmp_path / "out") == 0
    card = read_card(str(tmp_path / "out"))
    assert card.splits == {"train": 6, "val": 2, "test": 2}
    assert any("left halves taken for night" in note for note in card.notes)
    row = all_rows(tmp_path / "out")["train/3.png"]
    assert row["image"] == np.asarray(drawn(3)).tobytes()  # and nothing of the night at its edge
    assert row["target"] == np.asarray(drawn(3).point(lambda level: level // 8)).tobytes()
    assert run("day2night", *flags, "--output", tmp_path / "swapped", "--left", "day") == 0
    assert all_rows(tmp_path / "swapped")["train/3.png"]["target"] == row["image"]


def test_single_images_are_not_taken_for_pairs(tmp_path: Path) -> None:
    save(drawn(1, (80, 40)), tmp_path / "in/train/good.png")
    save(drawn(1, (40, 40)), tmp_path / "in/train/single.png")
    assert run("day2night", "--source", tmp_path / "in", "--output", tmp_path / "out", "--image-size", 16) == 3
    assert "side by side" in rejected(tmp_path / "out")["train/single.png"]


def test_day_and_night_folders(tmp_path: Path) -> None:
    for number in range(10):
        save(drawn(number), tmp_path / f"in/night/{number}.png")
        save(drawn(number + 50), tmp_path / f"in/day/{number}.png")
    assert run("day2night", "--source", tmp_path / "in", "--output", tmp_path / "out", "--image-size", 40) == 0
    row = all_rows(tmp_path / "out")["4"]
    assert row["image"] == np.asarray(drawn(54)).tobytes()
    assert row["target"] == np.asarray(drawn(4)).tobytes()
    assert "no effect" in refused(
        "day2night", "--source", tmp_path / "in", "--output", tmp_path / "out2", "--left", "day"
    )
    (tmp_path / "in/day").rename(tmp_path / "in/DAY")
    (tmp_path / "in/night").rename(tmp_path / "in/Night")
    assert run("day2night", "--source", tmp_path / "in", "--output", tmp_path / "capitals", "--image-size", 40) == 0
    assert all_rows(tmp_path / "capitals") == all_rows(tmp_path / "out")
    shutil.rmtree(tmp_path / "in/Night")
    assert "none in night" in refused("day2night", "--source", tmp_path / "in", "--output", tmp_path / "out2")


# ------------------------------------------------------------------------------------------------ celeba


class CelebA:
    """A source in CelebA's layout: 60 drawn images of 20 people, three each."""

    def __init__(self, folder: Path, count: int = 60) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        self.names = [f"{number:06d}.jpg" for number in range(1, count + 1)]
        self.values = rng.choice([-1, 1], (count, len(ATTRIBUTES)))
        self.people = np.arange(count) // 3
        for number, name in enumerate(self.names):
            save(drawn(number, (178, 218)), folder / "img_align_celeba" / name)
        self.text("list_attr_celeba.txt", self.values, ATTRIBUTES)

    def text(self, file: str, values: np.ndarray, columns: tuple[str, ...] | None = None) -> None:
        lines = [f"{name} {' '.join(f'{v:2d}' for v in row)}" for name, row in zip(self.names, values, strict=True)]
        head = [] if columns is None else [str(len(lines)), " ".join(columns) + " "]
        (self.folder / file).write_text("\n".join([*head, *lines]) + "\n")

    def csv(self, file: str, values: np.ndarray, columns: tuple[str, ...]) -> None:
        lines = [",".join([name, *map(str, row)]) for name, row in zip(self.names, values, strict=True)]
        (self.folder / file).write_text("\n".join([",".join(["image_id", *columns]), *lines]) + "\n")

    def partition(self) -> np.ndarray:
        return np.where(self.people < 14, 0, np.where(self.people < 17, 1, 2))[:, None]


@pytest.fixture
def source(tmp_path: Path) -> CelebA:
    return CelebA(tmp_path / "in")


def celeba_set(source: CelebA, output: Path, *flags: object) -> dict[str, dict[str, Any]]:
    assert run("celeba", "--source", source.folder, "--output", output, "--image-size", 16, *flags) == 0
    return all_rows(output)


def test_celeba_matched(source: CelebA, tmp_path: Path) -> None:
    source.text("list_eval_partition.txt", source.partition())
    source.text("identity_CelebA.txt", source.people[:, None])
    points = np.random.default_rng(1).integers(60, 110, (60, 10))
    source.text("list_landmarks_align_celeba.txt", points, tuple("abcdefghij"))
    rows = celeba_set(source, tmp_path / "out", "--match-correlation", 2)
    card = read_card(str(tmp_path / "out"))
    assert card.splits == {"train": 42, "val": 9, "test": 9}
    assert (card.domains, card.pairing, card.attribute_names) == (("female", "male"), "matched", ATTRIBUTES)
    assert card.licence == "CelebA: non-commercial research only"
    for number, name in enumerate(source.names):
        row = rows[name]
        assert row["domain"] == int(source.values[number, 1] > 0)
        assert row["attributes"] == source.values[number].tolist()
        assert row["identity"] == source.people[number]
        assert row["split"] == SPLITS[source.partition()[number, 0]]
        np.testing.assert_allclose(row["landmarks"][:2], (points[number, :2] - [0, 20]) * 16 / 178, rtol=1e-5)
        counterpart = rows[row["target_id"]]
        assert counterpart["split"] == row["split"]
        assert counterpart["domain"] != row["domain"]
        assert row["target"] == counterpart["image"]
        # no image of the other side would have been nearer
        side = [(rows[other]["split"], rows[other]["domain"]) for other in source.names]
        others = [i for i, there in enumerate(side) if there == (row["split"], 1 - row["domain"])]
        differing = np.delete(source.values != source.values[number], 1, axis=1).sum(axis=1)
        cost = 400 * differing + ((points - points[number]) ** 2).sum(axis=1)
        assert cost[source.names.index(row["target_id"])] == cost[others].min()


def test_celeba_unpaired_by_another_attribute(source: CelebA, tmp_path: Path) -> None:
    rows = celeba_set(source, tmp_path / "out", "--pairing", "unpaired", "--domain-attribute", "Smiling")
    assert read_card(str(tmp_path / "out")).domains == ("not_smiling", "smiling")
    assert rows["000007.jpg"]["domain"] == int(source.values[6, 2] > 0)
    assert rows["000007.jpg"]["target"] is None


def test_celeba_splits_by_identity_where_it_is_known(source: CelebA, tmp_path: Path) -> None:
    source.text("identity_CelebA.txt", source.people[:, None])
    rows = celeba_set(source, tmp_path / "out", "--pairing", "unpaired")
    splits_of = [{rows[name]["split"] for name in source.names[3 * person : 3 * person + 3]} for person in range(20)]
    assert all(len(splits) == 1 for splits in splits_of)
    assert read_card(str(tmp_path / "out")).splits == {"train": 48, "val": 6, "test": 6}
    assert "identity" in read_card(str(tmp_path / "out")).notes[0]


def test_celeba_says_so_where_identities_are_unknown(source: CelebA, tmp_path: Path) -> None:
    celeba_set(source, tmp_path / "out", "--pairing", "unpaired")
    assert "a person may be in two splits" in read_card(str(tmp_path / "out")).notes[0]


def test_celeba_says_so_where_some_are_unknown(source: CelebA, tmp_path: Path) -> None:
    source.text("identity_CelebA.txt", source.people[:, None])
    _edit("identity_CelebA.txt", lambda text: "\n".join(text.splitlines()[:50]))(source.folder)
    celeba_set(source, tmp_path / "out", "--pairing", "unpaired")
    unknown = "identity of 10 images unknown: identity_CelebA.txt does not list them"
    assert unknown in read_card(str(tmp_path / "out")).notes


def test_celeba_as_csv_and_zip_is_the_same(source: CelebA, tmp_path: Path) -> None:
    source.text("list_eval_partition.txt", source.partition())
    celeba_set(source, tmp_path / "one")
    with zipfile.ZipFile(source.folder / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.names:
            archive.write(source.folder / "img_align_celeba" / name, f"img_align_celeba/{name}")
        archive.writestr("__MACOSX/img_align_celeba/._000001.jpg", b"x")
    shutil.rmtree(source.folder / "img_align_celeba")
    source.csv("list_attr_celeba.csv", source.values, ATTRIBUTES)
    source.csv("list_eval_partition.csv", source.partition(), ("partition",))
    (source.folder / "list_attr_celeba.txt").unlink()
    (source.folder / "list_eval_partition.txt").unlink()
    celeba_set(source, tmp_path / "two")
    for name in ("train/part-00000.parquet", "val/part-00000.parquet", "contact_sheet.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("pointed_at", ["folder", "file"])
def test_celeba_as_kaggle_packs_it(source: CelebA, tmp_path: Path, pointed_at: str) -> None:
    source.text("list_eval_partition.txt", source.partition())
    expected = celeba_set(source, tmp_path / "one")
    source.csv("list_attr_celeba.csv", source.values, ATTRIBUTES)
    source.csv("list_eval_partition.csv", np.array(["Train", "val", "test"])[source.partition()], ("partition",))
    (tmp_path / "packed").mkdir()
    with zipfile.ZipFile(tmp_path / "packed/archive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.names:
            path = source.folder / "img_align_celeba" / name
            archive.write(path, f"img_align_celeba/img_align_celeba/{name}.jpg")  # as Windows names them
        for file in ("list_attr_celeba.csv", "list_eval_partition.csv"):
            archive.write(source.folder / file, file)
        archive.writestr("__MACOSX/img_align_celeba/img_align_celeba/000001.jpg", b"x")
    source.folder = tmp_path / "packed" / ("archive.zip" if pointed_at == "file" else "")
    assert celeba_set(source, tmp_path / "two") == expected


def test_celeba_set_aside_images_are_not_matched(source: CelebA, tmp_path: Path) -> None:
    (source.folder / "img_align_celeba/000002.jpg").write_bytes(b"text")
    half = (source.folder / "img_align_celeba/000003.jpg").read_bytes()[:900]
    (source.folder / "img_align_celeba/000003.jpg").write_bytes(half)
    (source.folder / "img_align_celeba/000004.jpg").unlink()
    out = tmp_path / "out"
    flags = ("--source", source.folder, "--output", out, "--image-size", 16)
    assert run("celeba", *flags) == 3
    rows = all_rows(out)
    gone = {"000002.jpg", "000003.jpg", "000004.jpg"}
    assert set(rows) == set(source.names) - gone
    assert not {row["target_id"] for row in rows.values()} & gone
    reasons = rejected(out)
    assert set(reasons) == {"000002.jpg", "000003.jpg"}
    assert "not an image" in reasons["000002.jpg"]
    assert "truncated" in reasons["000003.jpg"]
    card = read_card(str(out))
    assert card.num_rejected == 2
    assert any(note.startswith("1 of the images that list_attr_celeba lists") for note in card.notes)
    assert run("celeba", *flags) == 3  # already there, and still not all of it


def test_celeba_limit_takes_some_of_each_split(source: CelebA, tmp_path: Path) -> None:
    source.text("list_eval_partition.txt", source.partition())
    rows = celeba_set(source, tmp_path / "out", "--limit", 30, "--pairing", "unpaired")
    assert len(rows) == 30
    assert min(read_card(str(tmp_path / "out")).splits.values()) >= 2


def _edit(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / file).write_text(change((folder / file).read_text()))

    return edit


TABLE = "2\nMale Young\n1.jpg -1 1\n2.jpg 1 1\n"


def _only_packed(folder: Path) -> None:
    shutil.rmtree(folder / "img_align_celeba")
    (folder / "img_align_celeba_png.7z.001").write_bytes(b"7z")


def _to_csv(header: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "list_attr_celeba.txt").unlink()
        (folder / "list_attr_celeba.csv").write_text(f"{header}\n000001.jpg,1,-1\n")

    return write


@pytest.mark.parametrize(
    ("damage", "flags", "reason"),
    [
        (None, ("--domain-attribute", "smilling"), "did you mean Smiling"),
        (None, ("--limit", 0), "--limit is 0"),
        (lambda folder: (folder / "list_attr_celeba.txt").unlink(), (), "no list_attr_celeba.txt or .csv"),
        (lambda folder: shutil.rmtree(folder / "img_align_celeba"), (), "none of the 60 images"),
        (_only_packed, (), "into the folder; img_align_celeba_png.7z.001 is packed: unpack it"),
        (_edit("list_attr_celeba.txt", lambda text: text.replace("60", "61", 1)), (), "announces 61 images"),
        (_edit("list_attr_celeba.txt", lambda text: text[:-5]), (), "line 62: "),
        (_edit("list_attr_celeba.txt", lambda text: text.split("\n", 1)[1]), (), "first line must be the number"),
        (_edit("list_attr_celeba.txt", lambda text: text.replace(" 1", " x")), (), "line 3: 'x' is not a whole number"),
        (_edit("list_attr_celeba.txt", lambda text: text.replace(" 1", " 0")), (), "must hold -1 and 1"),
        (_edit("list_attr_celeba.txt", lambda text: text.replace("000002", "000001")), (), "lists an image twice"),
        (_edit("list_attr_celeba.txt", lambda text: text.rstrip()[:-1] + "3"), (), "as Young; it must be -1 or 1"),
        (lambda folder: (folder / "list_eval_partition.txt").write_text("000001.png 0"), (), "lists none of the 60"),
        (lambda folder: (folder / "list_eval_partition.txt").write_text("000001.jpg some"), (),
         "list_eval_partition.txt line 1: 'some' is not a whole number"),
        (_edit("list_attr_celeba.txt", lambda text: text.replace("60", "\u00b2", 1)), (), "first line must be"),
        (_edit("list_attr_celeba.txt", lambda text: text + "\n" * 2_000_001), (), "more lines than CelebA has images"),
        (_edit("list_attr_celeba.txt", lambda text: text + " 1" * 5000), (), "lines of more than 4096 letters"),
        (_edit("list_attr_celeba.txt", lambda text: text + " " * 100_000_000), (), "too large a file, 100 MB; at most"),
        (_to_csv("picture,Male,Young"), (), "column 'image_id' is missing"),
        (_to_csv("image_id,Bald,Young"), (), "--domain-attribute Male: "),
    ],
    ids=["attribute", "limit", "no-list", "no-pictures", "packed", "count", "cut", "head", "text", "zero", "twice",
         "three",
         "partition", "words", "digit", "lines", "line", "huge", "id", "none"],
)  # fmt: skip
def test_celeba_refusals(
    source: CelebA, tmp_path: Path, damage: Callable[[Path], None] | None, flags: tuple[object, ...], reason: str
) -> None:
    if damage is not None:
        damage(source.folder)
    assert reason in refused("celeba", "--source", source.folder, "--output", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_celeba_files_that_do_not_fit(source: CelebA, tmp_path: Path) -> None:
    flags = ("--source", source.folder, "--output", tmp_path / "out")
    source.text("list_eval_partition.txt", np.arange(60)[:, None] % 3)
    source.text("identity_CelebA.txt", source.people[:, None])
    assert "person 0 is in train and in val" in refused("celeba", *flags)
    source.text("list_eval_partition.txt", np.arange(60)[:, None] % 4)
    assert "split 3 is unknown" in refused("celeba", *flags)


def test_matching_needs_both_sides_in_each_split(source: CelebA, tmp_path: Path) -> None:
    split = source.partition()
    split[:, 0][(split[:, 0] == 1) & (source.values[:, 1] > 0)] = 0
    source.text("list_eval_partition.txt", split)
    message = refused("celeba", "--source", source.folder, "--output", tmp_path / "out")
    assert "split val has" in message
    assert "--pairing unpaired" in message


# ------------------------------------------------------------------------------------------ what is wrong


def test_images_of_every_kind(tmp_path: Path) -> None:
    """What is usable is used, what is not is set aside with its reason."""
    folder = tmp_path / "in/a"
    save(drawn(1), tmp_path / "in/b/one.png")
    save(drawn(2), tmp_path / "in/b/two.png")
    save(drawn(3), tmp_path / "in/b/three.png")
    save(drawn(1).convert("CMYK"), folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(drawn(1), folder / "turned.jpg", exif=exif)
    save(Image.fromarray(np.full((40, 40), 30000, np.uint16)), folder / "sixteen.png")
    save(drawn(1).quantize(8), folder / "palette.png", transparency=0)
    save(drawn(5).convert("L"), folder / "grey.pgm")
    save(drawn(1), folder / "animated.gif", save_all=True, append_images=[drawn(2)])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "cut.jpg").write_bytes(save(drawn(4), tmp_path / "whole.jpg").read_bytes()[:700])
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    save(Image.new("1", (12000, 9000)), folder / "bomb.png")
    assert run("folders", "--source", tmp_path / "in", "--output", tmp_path / "out", "--image-size", 16) == 3
    used = {name for name in all_rows(tmp_path / "out") if name.startswith("a/")}
    assert used == {"a/cmyk.jpg", "a/turned.jpg", "a/sixteen.png", "a/palette.png", "a/grey.pgm"}
    reasons = rejected(tmp_path / "out")
    for name, reason in {
        "animated.gif": "an animation",
        "empty.jpg": "the file is empty",
        "text.jpg": "not an image",
        "cut.jpg": "truncated",
        "bomb.png": "12000 x 9000 pixels",
    }.items():
        assert reasons[f"a/{name}"].startswith(reason)


def _png(width: int, height: int, depth: int, color_type: int, lines: bytes) -> bytes:
    """A PNG by hand: Pillow writes no 16-bit colours and no lies about the size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, color_type, 0, 0, 0])
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How an image lies in the file, by its EXIF orientation."""


def ramp(width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    levels = np.stack([x * 255 / width, y * 255 / height, np.full(x.shape, 128)], axis=-1)
    return Image.fromarray(levels.astype(np.uint8))


def test_every_way_of_saving_a_image_gives_the_same(tmp_path: Path) -> None:
    """One image in many forms and under difficult names, all of it 24-bit sRGB after all."""
    folder, image = tmp_path / "in/a", ramp()
    for orientation, turn in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = image if turn is None else image.transpose(turn)
        save(turned, folder / f"exif{orientation}.jpg", exif=exif, quality=95)
    save(image.convert("CMYK"), folder / "cmyk-inverted.jpg", quality=95)  # Pillow writes them as Adobe does
    save(image.convert("CMYK"), folder / "cmyk.tif")
    wide = np.asarray(image).astype(">u2") * 257
    (folder / "rgb16.png").write_bytes(_png(60, 40, 16, 2, b"".join(b"\0" + line.tobytes() for line in wide)))
    save(image, folder / "progressive.jpg", progressive=True, quality=95)
    save(image.convert("RGBA"), folder / "alpha.png")
    save(image, folder / "a png.jpg", format="PNG")
    save(image, folder / "a jpeg.png", format="JPEG", quality=95)
    names = [
        "a space",
        "hash#1",
        "per%20cent",
        "ünï 你好",
        "new\nline",
        "q?a&b=1",
        "quo'te\"",
        "-dash",
        "[br]*",
        "plus+",
    ]
    for name in names:
        save(image, folder / f"{name}.png")
    save(drawn(1), tmp_path / "in/b/1.png")
    assert run("folders", "--source", tmp_path / "in", "--output", tmp_path / "out", "--image-size", 32) == 0
    rows = {name: row for name, row in all_rows(tmp_path / "out").items() if name.startswith("a/")}
    assert set(rows) >= {f"a/{name}.png" for name in names}
    assert len(rows) == 8 + 7 + len(names)
    expected = images.to_square(image, 32).astype(int)
    for name, row in rows.items():
        pixels = np.frombuffer(row["image"], np.uint8).reshape(32, 32, 3)
        assert np.abs(pixels - expected).max() <= 8, name


def test_what_cannot_be_read_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    folder, image = tmp_path / "in/a", ramp()
    reasons = {
        "bomb.png": "more than 100,000,000 pixels",
        "tiny.png": "4 x 4 pixels; at least 8 x 8",
        "dot.png": "1 x 1 pixels; at least 8 x 8",
        "moving.webp": "an animation",
        "moving.png": "an animation",
        "phone.heic": "not an image, or of a kind that is not supported",
        "half.webp": "truncated",
    }
    folder.mkdir(parents=True)
    (folder / "bomb.png").write_bytes(_png(50_000, 50_000, 8, 2, b"\0" * 100))
    save(image.resize((4, 4)), folder / "tiny.png")
    save(image.resize((1, 1)), folder / "dot.png")
    for kind in ("webp", "png"):
        save(image, folder / f"moving.{kind}", save_all=True, append_images=[image.transpose(0)])
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    (folder / "half.webp").write_bytes(save(drawn(1), tmp_path / "whole.webp").read_bytes()[:-100])
    save(image.resize((3000, 20)), folder / "strip.png")
    save(drawn(2), tmp_path / "in/b/1.png")
    assert run("folders", "--source", tmp_path / "in", "--output", tmp_path / "out", "--image-size", 32) == 3
    assert set(all_rows(tmp_path / "out")) == {"a/strip.png", "b/1.png"}
    told = rejected(tmp_path / "out")
    assert set(told) == {f"a/{name}" for name in reasons}
    for name, reason in reasons.items():
        assert told[f"a/{name}"].startswith(reason)
    assert "1 image is smaller than 32 pixels and was enlarged" in read_card(str(tmp_path / "out")).notes


BROKEN_EXIF = (
    b"Exif\0\0II*\0\x08\0\0\0\x02\0\x00\x01\x09\0\x01\0\0\0\xfb\xff\xff\xff\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
)
"""A negative width beside an orientation."""


def test_what_decoders_raise_is_one_image_s_fault_and_what_was_done_is_noted(tmp_path: Path) -> None:
    folder, image = tmp_path / "in/a", drawn(1)
    save(drawn(2), tmp_path / "in/b/1.png")
    pillow_heif.register_heif_opener()
    save(image, folder / "exif.jpg", exif=BROKEN_EXIF)
    save(drawn(3), folder / "again.jpg", exif=BROKEN_EXIF)
    save(drawn(4), folder / "phone.heic")
    save(drawn(5), folder / "profile.png", icc_profile=b"nonsense" * 20)
    avif = save(image, folder / "damaged.avif")
    avif.write_bytes(avif.read_bytes()[:-36] + bytes(36))
    jpeg = save(drawn(6), folder / "cut.jpg")
    jpeg.write_bytes(jpeg.read_bytes()[:-40] + b"\xff\xd9")
    save(Image.new("RGBA", (40, 40)), folder / "clear.png")
    with (folder / "huge.jpg").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    assert run("folders", "--source", tmp_path / "in", "--output", tmp_path / "out", "--image-size", 16) == 3
    assert set(all_rows(tmp_path / "out")) == {"b/1.png", *(f"a/{n}" for n in
                                               ("exif.jpg", "again.jpg", "phone.heic", "profile.png"))}  # fmt: skip
    told = rejected(tmp_path / "out")
    assert told["a/damaged.avif"].startswith("truncated or corrupt (")
    assert told["a/cut.jpg"].startswith("truncated or corrupt (a part of its data is missing)")
    assert told["a/clear.png"] == "fully transparent: there is nothing to see"
    assert told["a/huge.jpg"].startswith("too large a file, 400 MB; at most 400 MB are read")
    notes = read_card(str(tmp_path / "out")).notes
    assert f"{images.EXIF_IGNORED} (2 images)" in notes
    assert f"{images.PROFILE_IGNORED} (1 image)" in notes


def test_a_file_that_may_not_be_read_is_set_aside(tmp_path: Path) -> None:
    """As another user: for root every file may be read."""
    path = save(drawn(1), tmp_path / "x.png")
    path.chmod(0)
    become = "os.setuid(65534)" if os.getuid() == 0 else "pass"
    code = f"import os; from jobs.datasets import decode; {become}; print(decode.read_or_error({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "permission denied" in done.stdout, done.stderr


def test_nothing_usable(tmp_path: Path) -> None:
    for domain in ("a", "b"):
        (tmp_path / "in" / domain).mkdir(parents=True)
        (tmp_path / "in" / domain / "x.jpg").write_text("text")
    message = refused("folders", "--source", tmp_path / "in", "--output", tmp_path / "out")
    assert message.startswith("none of the 2 images can be used; the first: a/x.jpg: not an image")
    assert not (tmp_path / "out/dataset.json").exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["folders", "--output", "OUT"], "--source is missing"),
        (["folders", "--output", "OUT", "--source", "TMP/nowhere"], "does not exist"),
        (["folders", "--output", "OUT", "--source", "TMP/empty"], "no images in sub-folders"),
        (["folders", "--output", "OUT", "--source", "TMP/file"], "is a file"),
        (["folders", "--output", "OUT", "--source", "TMP/one"], "only a; two folders"),
        (["folders", "--output", "OUT", "--domain", "a"], "write NAME=URI"),
        (["folders", "--output", "OUT", "--domain", "a=TMP/one/a", "--domain", "a=TMP/one/a"], "given twice"),
        (["folders", "--output", "OUT", "--domain", "a=TMP/one/a", "--domain", "b=TMP/empty"], "no images there"),
        (["folders", "--output", "OUT", "--domain", "a=TMP/one/a", "--domain", "b=TMP/no"], "--domain b TMP/no"),
        (["folders", "--output", "TMP/one/out", "--source", "TMP/one"], "lies in --source"),
        (["folders", "--output", "TMP/one/a/out", "--domain", "b=TMP/empty", "--domain", "a=TMP/one/a"],
         "lies in --domain a"),
        (["day2night", "--output", "OUT", "--source", "TMP/empty"], "no images in day/ and night/"),
        (["celeba", "--output", "OUT", "--source", "TMP/empty"], "no list_attr_celeba"),
        (["earth", "--output", "/proc/nothing/here"], "--output /proc/nothing/here"),
        (["earth", "--output", "TMP/file/below"], "TMP/file/below"),
        (["earth", "--output", "gs://bucket/x"], "gs:// is not supported"),
        (["earth", "--output", "OUT", "--image-size", "4"], "--image-size is 4"),
        (["earth", "--output", "OUT", "--image-size", "300"], "at most 256"),
        (["earth", "--output", "OUT", "--image-size", "many"], "--image-size"),
        (["earth", "--output", "OUT", "--stride", "0"], "--stride is 0"),
        (["earth", "--output", "OUT", "--min-land", "2"], "--min-land is 2"),
        (["earth", "--output", "OUT", "--encoding", "gif"], "gif"),
        (["earth", "--output", "OUT", "--imge-size", "64"], "--image-size"),
        (["earth"], "--output"),
        (["moon", "--output", "OUT"], "earth, celeba, day2night, folders"),
        ([], "earth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_refusals(tmp_path: Path, argv: list[str], reason: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    save(drawn(1), tmp_path / "one/a/x.png")
    filled = [part.replace("TMP", str(tmp_path)).replace("OUT", str(tmp_path / "out")) for part in argv]
    assert reason.replace("TMP", str(tmp_path)) in refused(*filled)
    assert not (tmp_path / "out").exists()


def test_exit_codes_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.prepare", "earth", "--source", "/nowhere", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --source /nowhere does not exist; check the path"]


# ---------------------------------------------------------------------------------------------------- S3


def test_from_s3_to_s3(s3: Any, source: CelebA, tmp_path: Path) -> None:
    uri = f"{s3.uri}/prepare/celeba"
    for path in source.folder.rglob("*.*"):
        storage.write_bytes(f"{uri}/{path.relative_to(source.folder)}", path.read_bytes())
    celeba_set(source, tmp_path / "local")
    flags = ("--source", uri, "--output", f"{s3.uri}/prepare/out", "--image-size", 16)
    assert run("celeba", *flags) == 0
    assert made(f"{s3.uri}/prepare/out") == made(tmp_path / "local")
    assert run("celeba", *flags) == 0


def test_zip_on_s3(s3: Any) -> None:
    names = {"a/one.jpg": os.urandom(3000), "a/two ü.jpg": b"2" * 5000, "empty.jpg": b""}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    storage.write_bytes(f"{s3.uri}/prepare/x.zip", buffer.getvalue())
    there = Archive(f"{s3.uri}/prepare/x.zip")
    assert {name: there.read(name) for name in there.members} == names
    storage.write_bytes(f"{s3.uri}/prepare/y.zip", buffer.getvalue()[:2000])
    with pytest.raises(InputError, match=r"y\.zip is not a whole zip file"):
        Archive(f"{s3.uri}/prepare/y.zip")


@pytest.mark.parametrize(
    "text", [TABLE.replace("\n", "\r\n"), TABLE.replace("\n", "\r"), f"\ufeff{TABLE}", f"{TABLE}\n \n", TABLE.rstrip()]
)
def test_celeba_s_tables_as_editors_leave_them(text: str) -> None:
    table = parse_table(text.encode(), "list_attr_celeba.txt", header=True)
    assert table.columns == ("Male", "Young")
    assert {name: values.tolist() for name, values in table.rows.items()} == {"1.jpg": [-1, 1], "2.jpg": [1, 1]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        b"PK\x05\x06" + bytes(18),
        b"PK\x05\x06" + b"\xff" * 60,
        b"PK\x05\x06" + struct.pack("<8xII2x", 2**28, 0),
        b"PK\x06\x06"
        + struct.pack("<36xQQ", 2**60, 0)
        + b"PK\x06\x07"
        + bytes(16)
        + b"PK\x05\x06"
        + b"\xff" * 16
        + b"\0\0",
    ],
)
def test_what_is_no_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.zip is not a whole zip file"):
        Archive(str(tmp_path / "x.zip"))


def test_paths_in_a_zip_as_some_programs_write_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a\\1.jpg", "/a/2.jpg", "a\\", "a/3.jpg"):
            archive.writestr(name, name)
    there = Archive(str(tmp_path / "x.zip"))
    assert {name: there.read(name) for name in there.members} == {
        "a/1.jpg": b"a\\1.jpg", "a/2.jpg": b"/a/2.jpg", "a/3.jpg": b"a/3.jpg",
    }  # fmt: skip


def test_a_member_without_a_name_is_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", b"image")
        archive.writestr("b", b"image")
    content = bytearray((tmp_path / "x.zip").read_bytes())
    struct.pack_into("<HH", content, content.rindex(b"PK\x01\x02") + 28, 0, 1)  # its name is an extra field
    (tmp_path / "x.zip").write_bytes(content)
    assert list(Archive(str(tmp_path / "x.zip")).members) == ["a.jpg"]


@pytest.mark.parametrize("offset", [-(2**31), 2**40, 2**63])
def test_a_member_that_lies_beyond_the_file(tmp_path: Path, offset: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", b"image")
    there = Archive(str(tmp_path / "x.zip"))
    there.members["a.jpg"].header_offset = offset
    with pytest.raises(zipfile.BadZipFile):
        there.read("a.jpg")


def test_a_zip_packed_otherwise(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.jpg", b"picture")
    with pytest.raises(zipfile.BadZipFile, match="packed by method 12"):
        Archive(str(tmp_path / "x.zip")).read("a.jpg")


def test_a_member_of_a_zip_is_unpacked_no_further_than_it_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(50_000_000))
        archive.writestr("large.jpg", bytes(2_000_000))
    content = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "y.zip").write_bytes(content.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 5000)))
    there = Archive(str(tmp_path / "y.zip"))
    tracemalloc.start()
    with pytest.raises(zipfile.BadZipFile):
        there.read("bomb.jpg")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    with pytest.raises(storage.TooLargeError, match=r"large\.jpg: too large a file, 2 MB; at most 1 MB are read"):
        there.read("large.jpg", max_bytes=1_000_000)


def test_no_room_for_decoded_images() -> None:
    pixels = decode.Pixels((2, 1, 8, 8, 3))
    pixels.file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    with pytest.raises(InputError, match=r"TMPDIR.*no space left"), pixels.file:
        pixels[0] = bytes(8 * 8 * 3)


def test_s3_refusals(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = f"{s3.uri}/prepare/refused"
    assert "no such bucket" in refused("earth", "--output", "s3://no-such-bucket/x")
    assert "does not exist" in refused("folders", "--source", "s3://no-such-bucket/x", "--output", out)
    for environment in (s3.environment("rw", "wrong"), s3.environment("ro")):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert "access denied; check AWS_ACCESS_KEY_ID" in refused("earth", "--output", out)


def test_dataset_json_is_the_last_thing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, content: (order.append(uri), write(uri, content)))
    assert run("rendered", "--count", 20, "--output", tmp_path, "--image-size", 32) == 0
    assert order[-1].endswith("dataset.json")
    assert json.loads((tmp_path / "environment.json").read_text())["command"]
