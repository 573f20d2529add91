"""Data sets that grow, are looked into, and survive being killed at any moment."""

import pkgutil
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from conftest import ROOT
from PIL import Image
from test_duplicates import scene
from test_prepare import CelebA, made, refused, rejected, run, save

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.datasets import assemble, reading
from jobs.datasets.format import DUPLICATES, SPLITS, missing_shards, read_card


def fill(folder: Path, numbers: range, domains: tuple[str, ...] = ("cat", "dog")) -> Path:
    for number in numbers:
        for side, domain in enumerate(domains):
            save(scene(2 * number + side, 24), folder / domain / f"{number:02d}.png")
    return folder


def rows(folder: Path | str) -> dict[str, dict[str, Any]]:
    """Every row by its id, with its split, over all shards."""
    found = {}
    for shard in read_card(str(folder)).shards:
        content = storage.read_bytes(f"{folder}/{shard.file}")
        for row in pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist():
            found[row["id"]] = row | {"split": shard.file.partition("/")[0]}
    return found


def folders(source: Path | str, output: Path | str, *flags: object) -> int:
    return run("folders", "--source", source, "--output", output, "--image-size", 16, *flags)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of twenty images of either domain."""
    folder = tmp_path_factory.mktemp("append")
    assert folders(fill(folder / "in", range(20)), folder / "set") == 0
    return folder / "set"


@pytest.fixture
def grown(first: Path, tmp_path: Path) -> Path:
    shutil.copytree(first, tmp_path / "set")
    return tmp_path / "set"


# ------------------------------------------------------------------------------------------------ append


def test_append_adds_a_version_and_leaves_the_old_files_alone(
    first: Path, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, old = made(grown), read_card(str(grown))
    source = fill(tmp_path / "more", range(15, 40))
    assert folders(source, grown, "--append") == 0
    card = read_card(str(grown))
    after = made(grown)
    for name in before:
        if name.endswith(".parquet"):
            assert after[name] == before[name]
    assert (card.version, [part.rows for part in card.parts]) == (2, [40])
    assert "version 2: 40 rows added, 10 were there already" in card.notes
    assert sum(card.splits.values()) == 80
    assert card.shards[:3] == old.shards
    assert {shard.file for shard in card.shards[3:]} <= {f"{split}/part-00001.parquet" for split in SPLITS}
    assert card.content_hash != old.content_hash
    assert (card.prepared_by, card.source_hash) == (old.prepared_by, old.source_hash)
    there = rows(grown)
    assert set(there) == {f"{domain}/{number:02d}.png" for domain in ("cat", "dog") for number in range(40)}
    for name, row in rows(first).items():
        assert there[name] == row
    for number in range(40):  # equal names stay in one split
        assert there[f"cat/{number:02d}.png"]["split"] == there[f"dog/{number:02d}.png"]["split"]
    training = [np.frombuffer(row["image"], np.uint8) for row in there.values() if row["split"] == "train"]
    mean = np.concatenate(training).reshape(-1, 3).mean(axis=0) / 127.5 - 1
    np.testing.assert_allclose(card.mean_color, mean, atol=1e-6)
    capsys.readouterr()
    assert folders(source, grown, "--append") == 0
    assert "already there" in capsys.readouterr().out
    assert made(grown) == after


def test_append_reads_as_one_set(grown: Path, tmp_path: Path) -> None:
    assert folders(fill(tmp_path / "more", range(20, 30)), grown, "--append") == 0
    there = {name: row for name, row in rows(grown).items() if row["split"] == "train"}
    read = {
        name: pixels.tobytes()
        for table in reading.read_tables(str(grown), "train")
        for name, pixels in zip(table["id"].to_pylist(), reading.pixels_of(table, "image"), strict=True)
    }
    assert read == {name: row["image"] for name, row in there.items()}


def test_an_id_with_another_image_is_set_aside(grown: Path, tmp_path: Path) -> None:
    source = fill(tmp_path / "more", range(18, 22))
    save(scene(999, 24), source / "cat/19.png")
    (source / "dog/bad.png").write_text("text")
    assert folders(source, grown, "--append") == 3
    card = read_card(str(grown))
    assert card.num_rejected == 2
    assert card.parts[0].rows == 4
    reasons = rejected(grown)
    assert reasons["cat/19.png"] == "another image of this name is there already; rename the new one"
    assert "not an image" in reasons["dog/bad.png"]
    before = rows(grown)["cat/19.png"]["image"]
    (source / "dog/worse.png").write_text("")  # the same reasons again are not counted again
    assert folders(source, grown, "--append") == 3
    assert read_card(str(grown)).num_rejected == 3
    assert read_card(str(grown)).version == 2  # no new row
    assert rows(grown)["cat/19.png"]["image"] == before


def test_append_of_one_domain_only_and_a_third_version(grown: Path, tmp_path: Path) -> None:
    save(scene(500, 24), tmp_path / "cats/new.png")
    assert run("folders", "--domain", f"cat={tmp_path}/cats", "--output", grown, "--image-size", 16, "--append") == 0
    save(scene(501, 24), tmp_path / "dogs/new.png")
    assert run("folders", "--domain", f"dog={tmp_path}/dogs", "--output", grown, "--image-size", 16, "--append") == 0
    card, there = read_card(str(grown)), rows(grown)
    assert (card.version, len(there)) == (3, 42)
    assert there["dog/new.png"]["domain"] == 1
    assert there["dog/new.png"]["split"] == there["cat/new.png"]["split"]


def test_append_refusals(grown: Path, first: Path, tmp_path: Path) -> None:
    source = fill(tmp_path / "more", range(20, 22))
    before = made(grown)
    flags = ("--source", source, "--output", grown, "--append")
    assert "image size 16, the new images 64" in refused("folders", *flags)
    assert "encoding raw, the new images png" in refused("folders", *flags, "--image-size", 16, "--encoding", "png")
    assert "pairing unpaired" in refused("folders", *flags, "--image-size", 16, "--pairing", "paired")
    assert "licence unknown" in refused("folders", *flags, "--image-size", 16, "--licence", "CC0")
    assert "give one of them" in refused("folders", *flags, "--overwrite")
    other = fill(tmp_path / "birds", range(3), ("bird", "cat"))
    assert "domains cat, dog, the new images bird, cat" in refused(
        "folders", "--source", other, "--output", grown, "--image-size", 16, "--append"
    )
    assert "no data set at" in refused("folders", "--source", source, "--output", tmp_path / "no", "--append")
    assert "--append" in refused("earth", "--output", grown, "--append")
    assert "--append to add to it" in refused("folders", "--source", source, "--output", grown, "--image-size", 16)
    assert made(grown) == before


def test_a_grown_set_is_not_made_again_from_its_first_source(grown: Path, first: Path, tmp_path: Path) -> None:
    assert folders(fill(tmp_path / "more", range(20, 25)), grown, "--append") == 0
    assert folders(first.parent / "in", grown) == 0  # already there
    (grown / "train/part-00001.parquet").unlink()
    message = refused("folders", "--source", first.parent / "in", "--output", grown, "--image-size", 16)
    assert "train/part-00001.parquet is missing or damaged" in message


def test_pairs_keep_their_split(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert folders(fill(tmp_path / "in", range(20)), out, "--pairing", "paired") == 0
    before = rows(out)
    assert folders(fill(tmp_path / "more", range(10, 30)), out, "--pairing", "paired", "--append") == 0
    there = rows(out)
    assert len(there) == 30
    assert {name: row for name, row in there.items() if name in before} == before
    save(scene(998, 24), tmp_path / "other/dog/03.png")
    save(scene(6, 24), tmp_path / "other/cat/03.png")
    assert folders(tmp_path / "other", out, "--pairing", "paired", "--append") == 3
    assert "another image of this name" in rejected(out)["03"]  # another counterpart is another pair


def test_people_keep_their_split(tmp_path: Path) -> None:
    """Of each person two images come first, the third later: it joins them."""
    source = CelebA(tmp_path / "in")
    source.text("identity_CelebA.txt", source.people[:, None])
    points = np.random.default_rng(1).integers(60, 110, (60, 10))
    source.text("list_landmarks_align_celeba.txt", points, tuple("abcdefghij"))
    later = source.names[2::3]
    (tmp_path / "later").mkdir()
    for name in later:
        shutil.move(source.folder / "img_align_celeba" / name, tmp_path / "later" / name)
    flags = ("--source", source.folder, "--output", tmp_path / "set", "--image-size", 16, "--pairing", "unpaired")
    assert run("celeba", *flags) == 0
    first = rows(tmp_path / "set")
    assert len(first) == 40
    for name in later:
        shutil.move(tmp_path / "later" / name, source.folder / "img_align_celeba" / name)
    assert run("celeba", *flags, "--append") == 0
    card, there = read_card(str(tmp_path / "set")), rows(tmp_path / "set")
    assert len(there) == 60
    assert card.parts[0].rows == 20
    for person in range(20):
        assert len({row["split"] for row in there.values() if row["identity"] == person}) == 1
    training = [row["landmarks"] for row in there.values() if row["split"] == "train"]
    np.testing.assert_allclose(card.mean_landmarks, np.mean(training, axis=0) / 16, atol=1e-5)


def test_duplicates_between_versions(grown: Path, tmp_path: Path) -> None:
    there = rows(grown)
    name = next(name for name, row in there.items() if row["split"] == "train")
    image = Image.frombytes("RGB", (16, 16), there[name]["image"])
    source = fill(tmp_path / "more", range(20, 23))
    save(image, source / "cat/copy.png")
    assert folders(source, grown, "--append") == 0
    (line,) = assemble.read_lines(str(grown), DUPLICATES, read_card(str(grown)))
    assert (line["picture"], line["of"], line["kind"], line["version"]) == ("cat/copy.png", name, "exact", 2)
    save(image, source / "dog/another.png")
    assert folders(source, grown, "--append", "--duplicates", "drop") == 3
    assert "dog/another.png" not in rows(grown)
    lines = assemble.read_lines(str(grown), DUPLICATES, read_card(str(grown)))
    assert [line["picture"] for line in lines] == ["cat/copy.png", "dog/another.png"]


def test_an_exact_copy_is_found_between_versions_of_jpegs(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", range(6))
    assert folders(source, tmp_path / "set", "--encoding", "jpeg") == 0
    shutil.copy(source / "cat/00.png", source / "dog/copy.png")
    assert folders(source, tmp_path / "set", "--encoding", "jpeg", "--append") == 0
    (line,) = assemble.read_lines(str(tmp_path / "set"), DUPLICATES, read_card(str(tmp_path / "set")))
    assert (line["picture"], line["of"], line["kind"]) == ("dog/copy.png", "cat/00.png", "exact")


@pytest.mark.parametrize("when", ["jobs.datasets.decode.decode_images", "jobs.datasets.assemble.survey"])
def test_of_two_appends_at_a_time_one_is_refused(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    source, other = fill(tmp_path / "more", range(20, 22)), fill(tmp_path / "other", range(30, 33))
    deed, after = pkgutil.resolve_name(when), {}

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        result = deed(*args, **kwargs)
        assert folders(other, grown, "--append") == 0  # a second program, that came later and is done earlier
        after.update(made(grown))
        return result

    monkeypatch.setattr(when, overtaken)
    with pytest.raises(InputError, match="another program wrote there at the same time"):
        folders(source, grown, "--append")
    assert made(grown) == after
    assert folders(source, grown, "--append") == 0
    assert len(rows(grown)) == 40 + 6 + 4


def test_append_on_s3(s3: Any, first: Path, grown: Path, tmp_path: Path) -> None:
    uri = f"{s3.uri}/append/set"
    for name, content in made(first).items():
        storage.write_bytes(f"{uri}/{name}", content)
    source = fill(tmp_path / "more", range(18, 25))
    assert folders(source, uri, "--append") == 0
    assert folders(source, grown, "--append") == 0
    assert made(uri) == made(grown)


def test_side_by_side_images_are_appended(tmp_path: Path) -> None:
    def both(day: int, night: int) -> Image.Image:
        image = Image.new("RGB", (48, 24))
        image.paste(scene(night, 24).point(lambda level: level // 8), (0, 0))  # night is on the left
        image.paste(scene(day, 24), (24, 0))
        return image

    for number in range(20):
        save(both(2 * number, 2 * number + 1), tmp_path / f"in/{number}.png")
    flags = ("--image-size", 24, "--output", tmp_path / "set")
    assert run("day2night", "--source", tmp_path / "in", *flags) == 0
    save(both(0, 1), tmp_path / "more/copy.png")
    save(both(0, 99), tmp_path / "more/other night.png")
    save(both(90, 91), tmp_path / "more/new.png")
    assert run("day2night", "--source", tmp_path / "more", *flags, "--append", "--duplicates", "drop") == 3
    there = rows(tmp_path / "set")
    assert set(there) == {*(f"{number}.png" for number in range(20)), "new.png", "other night.png"}
    assert there["new.png"]["image"] == np.asarray(scene(90, 24)).tobytes()
    split = there["0.png"]["split"]
    assert rejected(tmp_path / "set") == {"copy.png": f"the same image as another (0.png in {split})"}


# -------------------------------------------------------------------------------------------- duplicates


def test_duplicates_are_reported_or_dropped(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", range(12))
    save(scene(0, 24), source / "dog/test/again.png")
    save(scene(2, 24), source / "cat/near.jpg", quality=97, subsampling=0)
    assert folders(source, tmp_path / "report") == 0
    card = read_card(str(tmp_path / "report"))
    lines = {line["picture"]: line for line in assemble.read_lines(str(tmp_path / "report"), DUPLICATES, card)}
    assert (lines["cat/00.png"]["of"], lines["cat/00.png"]["split_of"]) == ("dog/test/again.png", "test")
    (near,) = set(lines) - {"cat/00.png"}
    assert {near, lines[near]["of"]} == {"cat/01.png", "cat/near.jpg"}
    assert len(rows(tmp_path / "report")) == 26
    assert any(note.startswith("2 duplicates (1 exact, 1 near)") for note in card.notes)
    assert folders(source, tmp_path / "drop", "--duplicates", "drop") == 3
    assert set(rows(tmp_path / "report")) - set(rows(tmp_path / "drop")) == set(lines)
    assert rejected(tmp_path / "drop")["cat/00.png"] == "the same image as another (dog/test/again.png in test)"


def test_dropping_leaves_no_pair_without_its_other_half(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", range(12))
    save(scene(0, 24), source / "cat/50.png")
    save(scene(400, 24), source / "dog/50.png")
    save(scene(10, 24), source / "dog/05.png")  # counterparts may be alike: that is no duplicate
    flags = ("--pairing", "paired", "--duplicates", "drop")
    assert folders(source, tmp_path / "set", *flags) == 3
    reasons = rejected(tmp_path / "set")
    assert len(reasons) == 2
    assert sorted(name.partition("/")[0] for name in reasons) == ["cat", "dog"]
    assert len(rows(tmp_path / "set")) == 12
    assert all(row["target"] is not None for row in rows(tmp_path / "set").values())
    assert "05" in rows(tmp_path / "set")


def test_dropped_faces_are_no_matches(tmp_path: Path) -> None:
    source = CelebA(tmp_path / "in")
    for number, name in enumerate(source.names):
        save(scene(number % 55, 218), source.folder / "img_align_celeba" / name, quality=95)
    flags = ("--source", source.folder, "--output", tmp_path / "set", "--image-size", 16, "--duplicates", "drop")
    assert run("celeba", *flags) == 3
    there = rows(tmp_path / "set")
    assert len(there) == 55
    assert all(there[row["target_id"]]["image"] == row["target"] for row in there.values())


# ----------------------------------------------------------------------------------------------- inspect


def test_inspect(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", first, "--output", tmp_path) == 0
    out = capsys.readouterr().out
    for fact in ("folders, version 1", "16 x 16 pixels, raw", "32 rows (16 cat, 16 dog)", "unknown", "none known"):
        assert fact in out
    assert (tmp_path / "contact_sheet.png").read_bytes() == (first / "contact_sheet.png").read_bytes()
    mean = np.asarray(Image.open(tmp_path / "mean.png"))
    scale = 256 // 16
    for side, domain in enumerate(("cat", "dog")):
        stored = [row["image"] for name, row in rows(first).items() if name.startswith(domain)]
        expected = np.mean([np.frombuffer(image, np.uint8) for image in stored], axis=0).round()
        top = side * (256 + 2)
        shown = mean[top : top + 256 : scale, :256:scale]
        np.testing.assert_array_equal(shown, expected.reshape(16, 16, 3))


def test_the_most_frequent_reasons_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    why = "the file is empty (3), not an image, or of a kind that is not supported (1)"
    source = fill(tmp_path / "in", range(6))
    for number in range(3):
        (source / f"cat/empty{number}.png").write_bytes(b"")
    (source / "dog/text.jpg").write_text("text")
    assert folders(source, tmp_path / "set") == 3
    told = f"4 images set aside: {why}; the reasons are in {tmp_path}/set/rejected.txt; "
    assert capsys.readouterr().out.splitlines()[1].startswith(told)
    reasons = (tmp_path / "set/rejected.txt").read_text().splitlines()
    assert reasons[:2] == [f"cat/empty{number}.png\tthe file is empty" for number in range(2)]
    assert len(reasons) == 4
    assert run("inspect", tmp_path / "set") == 0
    assert f"4: {why}" in capsys.readouterr().out
    assert (tmp_path / "set-inspect/mean.png").exists()


def test_inspect_refusals(first: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("inspect", tmp_path / "nowhere")
    assert "is not a data set" in refused("inspect", tmp_path)
    assert "lies in the data set" in refused("inspect", first, "--output", first / "look")
    shutil.copytree(first, tmp_path / "set")
    (tmp_path / "set/val/part-00000.parquet").write_bytes(b"cut")
    assert "val/part-00000.parquet is missing or of another size" in refused("inspect", tmp_path / "set")


# ---------------------------------------------------------------------------------------------- survival

KILL_AT = {
    "listing": "folders.list_images = hang",
    "decoding": "decode.Pixels.__setitem__ = hang",
    "first shard": "storage.write_bytes = after('train/part-', write)",
    "last shard": "storage.write_bytes = after('test/part-', write)",
    "before the card": "storage.write_bytes = before('dataset.json', write)",
    "while the card is written": "os.replace = before('dataset.json', replace)",
}
"""Where the process hangs until it is killed."""
HANG = """
import os, sys, time
from ddpm_core import storage
from jobs import prepare
from jobs.datasets import decode
from jobs.datasets.sources import folders
write, replace = storage.write_bytes, os.replace
def hang(*_):
    print("here", flush=True)
    time.sleep(600)
def about(part, args):
    return any(isinstance(each, str) and part in each for each in args)
def after(part, do):
    return lambda *args: (do(*args), about(part, args) and hang())
def before(part, do):
    return lambda *args: hang() if about(part, args) else do(*args)
"""


def killed(moment: str, *argv: object) -> None:
    """Start the command in a process of its own and SIGKILL it at that moment."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HANG}\n{KILL_AT[moment]}\nprepare.main(sys.argv[1:])", *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "here\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on(first: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = ("folders", "--source", first.parent / "in", "--output", out, "--image-size", 16)
    for moment in ("decoding", "last shard", "while the card is written"):
        killed(moment, *command)
        with pytest.raises(InputError, match=r"is not a data set|does not exist"):
            read_card(str(out))
    assert run(*command) == 0
    assert made(out) == made(first)


@pytest.mark.slow
def test_killed_while_appending_the_old_version_stands(first: Path, grown: Path, tmp_path: Path) -> None:
    source = fill(tmp_path / "more", range(18, 60))
    shutil.copytree(first, tmp_path / "whole")
    assert folders(source, tmp_path / "whole", "--append") == 0
    command = ("folders", "--source", source, "--output", grown, "--image-size", 16, "--append")
    for moment in ("listing", "first shard", "before the card"):
        killed(moment, *command)
        assert read_card(str(grown)) == read_card(str(first))
        assert missing_shards(str(grown), read_card(str(grown))) == []
    assert run(*command) == 0
    assert made(grown) == made(tmp_path / "whole")
