"""Batch translation: names, resume, bad images, exit codes; in this process with a tiny network."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT
from PIL import Image

from ddpm_core import checkpoint, encoders, full_size, images, keyed_mark, marks, nets, storage
from ddpm_core import config as configs
from ddpm_core.config import DiffusionConfig, SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import NOT_FINITE, Translated, Translator
from jobs import evaluate, translate, verify
from jobs.common import cli
from jobs.datasets import reading, writing
from jobs.datasets.format import DatasetCard, Row, read_card
from jobs.reports import grids
from jobs.translation import batch as batches
from jobs.translation import driver, listing, tables
from jobs.translation import shards as shard_files
from jobs.translation.batch import Translate, expand_rows, read_images
from jobs.translation.driver import open_output
from jobs.translation.listing import Passed
from jobs.translation.names import RESERVED, Hashes, Taken, output_names
from jobs.translation.options import TranslateArgs
from jobs.translation.plan import plan_translation
from jobs.translation.shards import Known, Listed, Result, Shards


def picture(seed: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def put(path: Path, seed: int, side: int = 16, *, format: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, side)).save(path, format)
    return path


def command(checkpoint_folder: str, source: Path | str, output: Path | str, *more: str) -> list[str]:
    where = ["--checkpoint", checkpoint_folder, "--input", str(source), "--output", str(output)]
    return [*where, "--domain", "night", "--num-workers", "0", "--batch-size", "4", *more]


def manifest(output: Path) -> dict[str, dict[str, Any]]:
    rows = pyarrow.parquet.read_table(output / "manifest.parquet").to_pylist()
    return {row["id"]: row for row in rows}


# -- names


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["a.jpg", "sub/b.PNG", "c.tar.webp"], ["a.png", "sub/b.png", "c.tar.png"]),
        (["a.jpg", "a.png"], ["a.jpg.png", "a.png.png"]),
        (["a.jpg", "A.png"], ["a.jpg.png", "A.png.png"]),  # one file where case does not count
        (["b.jpg", "b.png", "b.jpg.png"], ["b.jpg.png", "b.png.png", "b.jpg.png.png"]),
        (["tile 7", "x.y"], ["tile 7.png", "x.y.png"]),  # a data set's ids have no image's suffix
        (["../up.jpg", ".hidden/x", "/root.jpg"], ["_../up.png", "_.hidden/x.png", "_/root.png"]),
    ],
)
def test_outputs_keep_the_name_and_never_meet(ids: list[str], expected: list[str]) -> None:
    assert list(output_names(ids, {}).values()) == expected


def test_odd_names_become_names_that_every_disk_takes() -> None:
    """A data set's ids are any strings; of files, names may be as long as the result's."""
    ids = ["é.jpg", "e\u0301.webp", "a\0b", "a_b", "c\nd", "", "x" * 300, "x" * 301, "é" * 200 + "/1", "é" * 200 + "/2"]
    ids += [
        "dir",
        "dir.png/x",
        "DIR.PNG/y",
        "run.json/x",
        "manifest.parquet/1/2",
        "end.",
        "..",
        "a//b",
        "y" * 251 + ".jpg",
    ]
    names = output_names(ids, {})
    assert list(names) == ids
    assert len({name.casefold() for name in names.values()}) == len(ids)
    folders = {parent for name in names.values() for parent in map(str, PurePosixPath(name.casefold()).parents)}
    assert not folders & {name.casefold() for name in names.values()} | folders & RESERVED
    for name in names.values():
        assert name.endswith(".png")
        assert all(0 < len(part.encode()) <= 255 and part[0] != "." for part in name.split("/"))
        assert not re.search(r"[\x00-\x1f]", name)
    assert names["y" * 251 + ".jpg"] == "y" * 251 + ".png"
    assert names["dir.png/x"] == "dir.png/x.png"
    assert PurePosixPath(names["é" * 200 + "/1"]).parent == PurePosixPath(names["é" * 200 + "/2"]).parent
    assert output_names(reversed(ids), {}) == names
    later = output_names(ids, {name: names[name] for name in ids[::2]})
    assert all(later[name] == names[name] for name in ids[::2])
    assert len({name.casefold() for name in later.values()}) == len(ids)


def test_a_folder_gives_way_to_a_file_that_is_there() -> None:
    found = output_names(["dir.png/x"], {"dir": "dir.png"})["dir.png/x"]
    assert re.fullmatch(r"x~[0-9a-f]{16}\.png", found)


def test_names_given_before_stay() -> None:
    names = output_names(["a.jpg", "a.png"], {"a.jpg": "a.png"})
    assert names == {"a.jpg": "a.png", "a.png": "a.png.png"}


def test_a_image_called_preview_is_not_lost() -> None:
    assert output_names(["preview.jpg"], {"": "preview.png"}) == {"preview.jpg": "preview.jpg.png"}


# -- the listing


def test_all_that_is_an_image_is_listed_to_any_depth(tmp_path: Path) -> None:
    for name in ("b.JPG", "x/y/a.png", "._b.jpg", ".thumbs/c.png", "@eaDir/d.jpg", "notes.txt", "e.jxl", "f.DNG"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "again").symlink_to(".")
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"1")
    for name in ("photo", "photo.dat", "clip.mp4"):
        put(tmp_path / "z" / name, 1, format="PNG")
    os.mkfifo(tmp_path / "pipe.png")
    passed = Passed()
    found = list(listing.files(str(tmp_path)).images(passed))
    good = {row.id: row for row in found if not row.error}
    bad = {row.id: row.error for row in found if row.error}
    assert list(good) == ["b.JPG", "caf%E9.jpg", "x/y/a.png", "z/clip.mp4", "z/photo", "z/photo.dat"]
    assert good["caf%E9.jpg"].path == b"caf\xe9.jpg"
    assert good["b.JPG"] == Listed("b.JPG", str(tmp_path / "b.JPG"), 5, (tmp_path / "b.JPG").stat().st_mtime_ns)
    assert sorted(bad) == ["e.jxl", "f.DNG", "gone.jpg", "pipe.png"]
    assert "JPEG XL, which is not read; export it" in bad["e.jxl"]
    assert "target is not there" in bad["gone.jpg"]
    assert passed.num_others == 1
    assert any("system files and folders passed over" in note for note in passed.notes)
    assert "1 other file passed over (.txt)" in passed.notes


def test_a_bucket_tells_images_by_their_content_too(s3: Any, tmp_path: Path) -> None:
    content = put(tmp_path / "x.png", 1).read_bytes()
    uri = f"{s3.uri}/{tmp_path.name}"
    for name, data in {"photo": content, "a/photo.dat": content, "note": b"text", "notes.txt": content}.items():
        storage.write_bytes(f"{uri}/{name}", data)
    passed = Passed()
    found = list(listing.files(uri).images(passed))
    assert [row.id for row in found] == ["a/photo.dat", "photo"]
    assert all(row.etag for row in found)
    assert passed.num_others == 2
    assert [row.id for row in listing.files(f"{uri}/photo").images(passed)] == ["photo"]


def test_an_input_may_be_one_image_or_a_pattern(tmp_path: Path) -> None:
    for name in ("a1.png", "a2.png", "b1.png", "sub/a3.png"):
        put(tmp_path / name, 1)

    def ids(uri: str) -> tuple[str, list[str]]:
        found = listing.files(uri)
        listing.check_any(found)
        return found.root, [row.id for row in found.images(Passed())]

    assert ids(f"{tmp_path}/a1.png") == (str(tmp_path), ["a1.png"])
    assert ids(f"{tmp_path}/a*.png") == (str(tmp_path), ["a1.png", "a2.png"])
    assert ids(f"{tmp_path}/sub/*") == (f"{tmp_path}/sub", ["a3.png"])
    assert ids(f"{tmp_path}/?1.png") == (str(tmp_path), ["a1.png", "b1.png"])
    (tmp_path / "[x]").mkdir()  # what is there means itself
    put(tmp_path / "[x]" / "c.png", 1)
    assert ids(f"{tmp_path}/[x]") == (f"{tmp_path}/[x]", ["c.png"])
    with pytest.raises(InputError, match="holds no images"):
        listing.check_any(listing.files(f"{tmp_path}/z*.png"))


# -- images that files tell of


def found_in(uri: Path | str) -> tuple[list[Listed], Passed]:
    passed = Passed()
    return list(tables.find(str(uri)).images(passed)), passed


def test_a_list_of_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "stamps", lambda uris: [(1, 2)] * len(uris))  # there is no such bucket
    lines = ["b/1.jpg", "s3://bucket/k #1.jpg", str(tmp_path / "x.png"), "", "http://host/1.jpg", "b/1.jpg"]
    (tmp_path / "list.txt").write_bytes("\n".join(lines).encode() + b"\r\ncaf\xe9.jpg\n")
    found, passed = found_in(tmp_path / "list.txt")
    assert [(row.id, row.input) for row in found] == [
        ("b/1.jpg", f"{tmp_path}/b/1.jpg"),
        ("bucket/k #1.jpg", "s3://bucket/k #1.jpg"),
        (str(tmp_path / "x.png")[1:], str(tmp_path / "x.png")),
        ("host/1.jpg", "http://host/1.jpg"),
        ("caf%E9.jpg", f"{tmp_path}/caf%E9.jpg"),
    ]
    assert [bool(row.error) for row in found] == [False, False, False, True, False]
    assert [row.mtime_ns for row in found] == [2, 2, 2, 0, 2]
    assert found[-1].path == os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    assert passed.num_twice == 1


def test_changed_images_of_a_list_are_done_again(
    folder: Path, tmp_path: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    (folder / "list.txt").write_text("\n".join(names))
    argv = command(checkpoint_folder, folder / "list.txt", tmp_path / "out")
    assert translate.main(argv) == cli.DONE
    put(folder / names[1], 9)
    (folder / names[2]).unlink()  # its result stays
    capsys.readouterr()
    assert translate.main(argv) == cli.DONE
    assert f"1 image to translate, {len(names) - 1} are done already" in capsys.readouterr().out


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


def packed(out: Path) -> dict[str, bytes]:
    """The results in parquet files; that each is there once, where the manifest says."""
    found: dict[str, bytes] = {}
    for path in sorted((out / "images").iterdir()):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            assert row["id"] not in found
            assert manifest(out)[row["id"]]["output"] == f"images/{path.name}"
            found[row["id"]] = row["image"]
    return found


def test_results_in_parquet(
    folder: Path, tmp_path: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each once, whatever came between; the same as in files of their own; an input like any other."""
    (folder / "bad.jpg").write_text("no image")
    put(folder / "more" / "p0.png", 7)
    argv = command(checkpoint_folder, folder, tmp_path / "files", "--output-size", "model")
    assert translate.main(argv) == cli.SET_ASIDE
    alone = {name: (tmp_path / "files" / row["output"]) for name, row in manifest(tmp_path / "files").items()}
    out = tmp_path / "out"
    argv = command(checkpoint_folder, folder, out, "--output-size", "model", "--output-format", "parquet")
    assert translate.main([*argv, "--batch-size", "4"]) == cli.SET_ASIDE
    first = packed(out)
    assert first.keys() == alone.keys() - {"bad.jpg"}
    for name, data in first.items():
        made, right = (np.asarray(images.decode(each)).astype(int) for each in (data, alone[name].read_bytes()))
        assert np.abs(made - right).max() <= 1
    assert len({row["output"] for row in manifest(out).values()}) > 2  # and one "" of what was set aside
    shutil.copy(next((out / "images").iterdir()), out / "images" / "of-a-worker-that-died.parquet")
    changed, gone = sorted(first)[1], sorted(first)[2]
    put(folder / changed, 70)
    (folder / gone).unlink()
    put(folder / "new.png", 71)
    assert translate.main(argv) == cli.SET_ASIDE
    second = packed(out)
    assert second.keys() == {*first, "new.png"}
    assert {name for name in first if first[name] != second[name]} == {changed}
    assert manifest(out)[gone]["status"] == "gone"
    assert translate.main(argv) == cli.SET_ASIDE
    assert packed(out) == second
    capsys.readouterr()
    assert verify.main([str(out), "--mark-key", "none"]) == cli.DONE
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{len(second) + 1} images: {len(second)} say that they were generated"  # and a contact sheet
    assert translate.main(command(checkpoint_folder, out / "images", tmp_path / "again")) == cli.DONE
    assert manifest(tmp_path / "again").keys() == second.keys()


@pytest.mark.parametrize("shape", ["bytes", "struct"])
def test_parquet_with_images(tmp_path: Path, checkpoint_folder: str, shape: str) -> None:
    contents: list[Any] = [put(tmp_path / "x" / f"{i}.png", i).read_bytes() for i in range(5)]
    column = contents if shape == "bytes" else [{"bytes": each, "path": "x"} for each in contents]
    parquet(tmp_path / "in" / "a.parquet", id=["n1", "n2", "n1"], image=column[:3])
    parquet(tmp_path / "in" / "b.parquet", id=["n3", "n4", "n5"], image=[*column[3:], None])
    out = tmp_path / "out"
    argv = command(checkpoint_folder, tmp_path / "in", out, "--output-size", "model")
    assert translate.main(argv) == cli.SET_ASIDE
    rows = manifest(out)
    again = "n1 (again, a/00001-0000000)"
    assert {name: row["status"] for name, row in rows.items()} == {
        **dict.fromkeys(["n1", "n2", "n3", "n4"], "ok"), again: "rejected", "n5": "rejected",
    }  # fmt: skip
    assert rows["n3"]["input"] == f"{tmp_path}/in/b.parquet#00000.0000000"
    alone = Translator(checkpoint.load(checkpoint_folder))
    for name, seed in {"n1": 0, "n2": 1, "n3": 3, "n4": 4}.items():
        made = np.asarray(Image.open(out / f"{name}.png")).astype(int)
        assert np.abs(made - alone(picture(seed)[None], "night")[0]).max() <= 1
    before = {path: path.stat().st_mtime_ns for path in out.glob("n*.png")}
    assert translate.main(argv) == cli.SET_ASIDE
    assert {path: path.stat().st_mtime_ns for path in out.glob("n*.png")} == before


def test_a_reason_is_the_same_wherever_the_file_lies(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    read = batches.read_image(
        "x/a.jpg", str(tmp_path / "a.jpg"), root=str(tmp_path), image_size=16, template=(), output_size="model"
    )
    assert read.error == "x/a.jpg: is a pipe, socket or device, not a file"


def test_parquet_that_tells_where_images_lie(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", label=["x", "y", "x"], uri=["1.jpg", "2.jpg", "1.jpg"])
    found, passed = found_in(file)
    assert [row.input for row in found] == [f"{tmp_path}/1.jpg", f"{tmp_path}/2.jpg"]
    assert passed.num_twice == 1
    assert [row.id for row in found_in(f"{tmp_path}/*.parquet")[0]] == ["1.jpg", "2.jpg"]
    nothing = parquet(tmp_path / "b.parquet", label=["x"], kind=["y"])
    with pytest.raises(InputError, match=r"b\.parquet has the columns label, kind; one must hold the images' bytes"):
        tables.find(str(nothing))
    whole = file.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for content in (
        b"no",
        whole[:-9],
        whole[:footer] + b"\xff" * 8 + whole[footer + 8 :],
        whole[:4] + b"\xff" * (footer - 4) + whole[footer:],
    ):
        (tmp_path / "c.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"c\.parquet is not a readable parquet file"):
            found_in(tmp_path / "c.parquet")


def test_a_parquet_file_is_read_by_row_groups_that_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = parquet(tmp_path / "a.parquet", uri=["1.jpg"], image=[bytes(2_000_000)])
    tables.images_of.cache_clear()
    monkeypatch.setattr(reading, "MAX_GROUP_BYTES", 1_000_000)
    assert [row.id for row in found_in(file)[0]] == ["a/00000-0000000"]
    with pytest.raises(InputError, match=r"a\.parquet: row group 0 unpacks to 0\.0 GB; at most .* smaller row groups"):
        tables.images_of(str(file), 0, "image")


def test_text_that_is_no_utf_8_is_one_row_s_name(tmp_path: Path) -> None:
    column = pa.array([b"a.jpg", b"caf\xe9.jpg"]).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"uri": column}), tmp_path / "a.parquet")
    assert [row.id for row in found_in(tmp_path / "a.parquet")[0]] == ["a.jpg", "caf%E9.jpg"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"x" * 70_000),
        ("a.txt", b"1.jpg\n" + bytes(70_000)),
    ],
)
def test_lists_that_are_none(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"a\.txt: a line is longer than any URI"):
        found_in(tmp_path / name)


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_an_s3_inventory(s3: Any, tmp_path: Path, checkpoint_folder: str, kind: str) -> None:
    prefix = f"inventory-{kind}"
    keys = [f"{prefix}/in/my photo #{i}.png" for i in range(3)]
    for i, key in enumerate(keys):
        storage.write_bytes(f"{s3.uri}/{key}", put(tmp_path / f"{i}.png", i).read_bytes())
    listed = [*keys, f"{prefix}/in/notes.txt", f"{prefix}/in/.hidden/x.png", f"{prefix}/in/gone.png"]
    data = f"{prefix}/inventory/data/1.{'csv.gz' if kind == 'CSV' else 'parquet'}"
    if kind == "CSV":
        rows = [
            f'"{s3.bucket}","{quote_plus(key)}","","true","false","5","2026-01-02T03:04:05.000Z","e{i}"'
            for i, key in enumerate(listed)
        ]
        rows += [f'"{s3.bucket}","{quote_plus(keys[0])}","v","false","false","5","2026-01-02T03:04:05.000Z","old"']
        content = gzip.compress("\n".join(rows).encode())
        schema = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
    else:
        when = pa.array([1767323045000] * len(listed), pa.timestamp("ms"))
        tags = [f"e{i}" for i in range(len(listed))]
        parquet(
            tmp_path / "1.parquet",
            bucket=[s3.bucket] * len(listed),
            key=listed,
            size=[5] * len(listed),
            last_modified_date=when,
            e_tag=tags,
        )
        content, schema = (tmp_path / "1.parquet").read_bytes(), "message s3.inventory { … }"
    storage.write_bytes(f"{s3.uri}/{data}", content)
    told = {"sourceBucket": s3.bucket, "destinationBucket": f"arn:aws:s3:::{s3.bucket}", "fileFormat": kind}
    told |= {"fileSchema": schema, "files": [{"key": data, "size": 1}]}
    uri = f"{s3.uri}/{prefix}/inventory/manifest.json"
    storage.write_bytes(uri, json.dumps(told).encode())
    found, passed = found_in(uri)
    assert [row.id for row in found] == [*keys, f"{prefix}/in/gone.png"]
    assert found[1] == Listed(keys[1], f"{s3.uri}/{keys[1]}", 5, 1767323045 * 10**9, "e1")
    assert passed.num_others == 1
    assert translate.main(command(checkpoint_folder, uri, tmp_path / "out")) == cli.SET_ASIDE
    rows = manifest(tmp_path / "out")
    assert [row["status"] for row in rows.values()] == ["ok"] * 3 + ["rejected"]
    assert "gone since" in rows[f"{prefix}/in/gone.png"]["error"]
    storage.write_bytes(uri, b"{}")
    with pytest.raises(InputError, match=r"is not the manifest\.json of an S3 Inventory"):
        tables.find(uri)


# -- shards


FACTS = {"seed": 0, "options": "o", "checkpoint": "c"}


def images_named(*names: str, size: int = 1, root: str = "/in") -> list[Listed]:
    return [Listed(name, f"{root}/{name}", size, 2) for name in names]


def listed(output: Path, images: list[Listed], **facts: Any) -> Shards:
    """A run that has listed these."""
    files = Shards(str(output))
    known = Known(files.files, str(output))
    files.list_images(images, known, {**FACTS, **facts}, suffix=".png", stop=threading.Event())
    files.listed.put(None)
    return files


def todo(files: Shards) -> list[tuple[int, list[str]]]:
    return [(number, [row["id"] for row in rows]) for number, rows in files.todo()]


def do(files: Shards, number: int, *names: str, status: str = "ok") -> None:
    for name in names:
        put(Path(files.output, f"{name}.png"), 1)
    error = "" if status == "ok" else "bad"
    files.note(number, {name: Result(f"{name}.png", status, error, "", 4, 3, 0.5, None) for name in names})


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    """What all runs have left so far."""
    files = Shards(str(output)).files
    known = Known(files, str(output))
    return {row["id"]: row for rows in known.rest(1000) for row in rows}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "FIRST_ROWS", (2,))
    monkeypatch.setattr(shard_files, "SHARD_ROWS", 3)
    monkeypatch.setattr(Shards, "FLUSH_EVERY_S", 0.0)


def test_a_run_lists_into_shards_and_a_killed_one_is_taken_up(small_shards: None, tmp_path: Path) -> None:
    images = images_named("a", "b", "c", "d", "e", "f", "g")
    first = listed(tmp_path, images)
    assert todo(first) == [(0, ["a", "b"]), (1, ["c", "d", "e"]), (2, ["f", "g"])]
    do(first, 1, "c", "d", "e")
    do(first, 0, "b")
    do(first, 0, "a", status="rejected")
    do(first, 2, "g")  # and then it is killed
    place = tmp_path / ".shards" / "00000001"
    assert {path.name for path in place.glob("[dl]*")} == {
        *(f"listing-{number:05d}.parquet" for number in range(3)),
        "done-00000.parquet",
        "done-00001.parquet",
    }
    assert len(list(place.glob("part-*"))) == 1  # those of shards that are done are gone
    os.unlink(tmp_path / "d.png")
    changed = [image._replace(size=9) if image.id == "e" else image for image in images if image.id != "g"]
    second = listed(tmp_path, [*images_named("A+"), *changed])
    assert (second.counts.images, second.counts.todo) == (7, 5)
    assert todo(second) == [(0, ["A+", "a"]), (1, ["d"]), (2, ["e", "f"])]
    assert not place.exists()
    do(second, 0, "A+", "a")
    do(second, 1, "d")
    do(second, 2, "e", "f")
    second.finish({"x": 1})
    second.remove()
    rows = manifest(tmp_path)
    assert [*rows] == ["A+", "a", "b", "c", "d", "e", "f", "g"]
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys("abcdef", "ok") | {
        "A+": "ok",
        "g": "gone",
    }
    assert rows["c"] == {
        **FACTS,
        "id": "c",
        "input": "/in/c",
        "size": 1,
        "mtime_ns": 2,
        "etag": "",
        "output": "c.png",
        "status": "ok",
        "error": "",
        "note": "",
        "width": 4,
        "height": 3,
        "seconds": 0.5,
        "identity_cosine": None,
    }
    schema = pyarrow.parquet.read_schema(tmp_path / "manifest.parquet")
    assert schema.metadata[b"options"] == b'{"x": 1}'
    third = listed(tmp_path, [*images_named("A+"), *changed, *images_named("g")])
    assert third.counts.todo == 0  # the one that was gone is there again, and so is its result
    assert todo(third) == []
    assert len(rows_of(tmp_path)) == 8


def test_runs_that_are_killed_while_they_list_lose_nothing(small_shards: None, tmp_path: Path) -> None:
    images = images_named(*"abcdefgh")
    first = listed(tmp_path, images)
    for number, names in todo(first):
        do(first, number, *names)
    for stop_after in (1, 4, 6):

        def some(most: int = stop_after) -> Iterator[Listed]:
            yield from images[:most]
            raise KeyboardInterrupt

        files = Shards(str(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            files.list_images(some(), Known(files.files, str(tmp_path)), FACTS, suffix=".png", stop=threading.Event())
    assert [row["status"] for row in rows_of(tmp_path).values()] == ["ok"] * 8
    assert todo(listed(tmp_path, images)) == []


def test_results_of_other_options_are_done_again(small_shards: None, tmp_path: Path) -> None:
    images = images_named("a", "b")
    first = listed(tmp_path, images)
    do(first, todo(first)[0][0], "a", "b")
    other = listed(tmp_path, images, options="other")
    assert todo(other) == [(0, ["a", "b"])]
    do(other, 0, "a")
    assert todo(listed(tmp_path, images, options="other")) == [(0, ["b"])]


def test_names_of_other_shards_stay(small_shards: None, tmp_path: Path) -> None:
    """Within a shard both of two that would meet give way; what an earlier shard or run has given stays."""
    images = images_named("a.jpg", "a.png", "b.jpg", "d.png/x", "e", "c.jpg", "B.webp", "d", "E.png/y")
    outputs = {row["id"]: row["output"] for _, rows in listed(tmp_path, images).todo() for row in rows}
    assert (outputs["a.jpg"], outputs["a.png"], outputs["b.jpg"]) == ("a.jpg.png", "a.png.png", "b.png")
    assert outputs["B.webp"] == "B.webp.png"
    assert re.fullmatch(r"d~[0-9a-f]{16}\.png", outputs["d"])
    assert re.fullmatch(r"y~[0-9a-f]{16}\.png", outputs["E.png/y"])
    again = [*images_named("a.avif", "e/1", "C.png"), *images]
    later = {row["id"]: row["output"] for _, rows in listed(tmp_path, again).todo() for row in rows}
    assert outputs.items() <= later.items()
    assert len({name.casefold() for name in later.values()}) == 12
    assert later["C.png"] == "C.png.png"


def test_a_shard_is_done_once(small_shards: None, tmp_path: Path) -> None:
    files = listed(tmp_path, images_named("a", "b"))
    ((number, _),) = todo(files)
    storage.write_bytes(f"{files.place}/done-{number:05d}.parquet", b"another's")
    with pytest.raises(InputError, match="was written by another driver"):
        do(files, number, "a", "b")


def test_many_parts_are_put_together_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shards, "FLUSH_EVERY_S", 0.0)
    monkeypatch.setattr(Shards, "MAX_PARTS", 3)
    names = [f"{number:02d}" for number in range(9)]
    files = listed(tmp_path, images_named(*names))
    todo(files)
    for name in names[:-1]:
        do(files, 0, name)
        assert len(list(Path(files.place).glob("part-*"))) <= 4
    assert sum(row["status"] == "ok" for row in rows_of(tmp_path).values()) == 8


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"manifest\.parquet is damaged"):
        Known(Shards(str(tmp_path)).files, str(tmp_path))


def test_an_image_is_the_same_by_its_etag_or_its_time() -> None:
    row = {"size": 1, "mtime_ns": 2, "etag": "x"}
    assert shard_files.is_same(row, Listed("a", "a", 1, 3, "x"))
    assert not shard_files.is_same(row, Listed("a", "a", 1, 2, "y"))
    assert not shard_files.is_same(row, Listed("a", "a", 2, 2, "x"))
    assert shard_files.is_same({**row, "etag": ""}, Listed("a", "a", 1, 2))
    assert not shard_files.is_same({**row, "etag": ""}, Listed("a", "a", 1, 3))


def test_hashes_are_a_set() -> None:
    there = Hashes()
    assert there.have(["a"]).tolist() == [False]
    there.add(["a", "b"])
    there.add(["c", "a"])
    assert there.have(["c", "d", "a", "b", "\udce9"]).tolist() == [True, False, True, True, False]
    taken = Taken()
    taken.add(["x/y.png"])
    assert taken.meets(["x", "x/y.png", "x/y.png/z", "x/z", "z"]) == {"x", "x/y.png", "x/y.png/z"}


# -- rows


def test_a_batch_holds_no_more_than_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_BYTES", 100)
    sizes = [60, 40, 1, 500, 1, 1, 1]
    items = [{"id": str(i), "input": "", "path": None, "output": "", "size": size} for i, size in enumerate(sizes)]
    tasks = list(batches.file_tasks(items, "", shard=7, batch_size=2))
    assert tasks[0]["shard"].tolist() == [7, 7]
    assert [half["id"].tolist() for half in batches.halves(tasks[0])] == [["0"], ["1"]]
    assert batches.halves(tasks[1]) == []
    assert [task["id"].tolist() for task in tasks] == [["0", "1"], ["2"], ["3"], ["4", "5"], ["6"]]


def test_reading_prepares_as_training_did_and_keeps_the_reason(tmp_path: Path) -> None:
    put(tmp_path / "wide.png", 1, side=40)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    names = np.array(["wide.png", "bad.jpg", "gone.png"])
    uris = np.array([f"{tmp_path}/{name}" for name in names])
    batch = {"id": names, "uri": uris, "output": np.array(["1", "2", "3"])}
    (read,) = read_images(batch, root=str(tmp_path), image_size=16, to="night", seed=5)
    right = images.to_square(images.decode((tmp_path / "wide.png").read_bytes()), 16)
    assert np.array_equal(read["image"][0], right)
    assert read["error"][0] == ""
    assert "bad.jpg: not an image" in read["error"][1]
    assert "gone.png: gone since" in read["error"][2]
    assert read["seed"].tolist() == [5, 5, 5]


def test_an_odd_file_is_one_row_s_fault_or_has_a_note(tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x00\x01\x09\0\x01\0\0\0\xfb\xff\xff\xff\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    Image.new("RGB", (40, 20)).save(tmp_path / "exif.jpg", exif=exif + bytes(4))
    Image.new("RGB", (64, 64), (200, 60, 40)).save(tmp_path / "x.avif")
    content = (tmp_path / "x.avif").read_bytes()
    (tmp_path / "x.avif").write_bytes(content[:-36] + bytes(36))
    (tmp_path / "raw.nef").write_bytes(b"II*\0")
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    names = np.array(["exif.jpg", "x.avif", "raw.nef", "huge.jpg"])
    (read,) = read_images(
        {"id": names, "uri": np.array([f"{tmp_path}/{name}" for name in names]), "output": names},
        root=str(tmp_path),
        image_size=16,
        to="night",
        seed=5,
    )
    assert (read["error"][0], read["note"][0]) == ("", images.EXIF_IGNORED)
    for error, reason in zip(read["error"][1:], ["truncated or corrupt", "a raw photo", "400 MB"], strict=True):
        assert reason in error
        assert "\n" not in error


@pytest.mark.parametrize(("to", "source", "truth"), [("night", "image", "target"), ("day", "target", "image")])
def test_a_pair_is_read_from_either_side(to: str, source: str, truth: str) -> None:
    batch = {
        "id": np.array(["a", "b"]),
        "domain": np.array([0, 0], np.int8),
        "image": np.stack([picture(1), picture(2)]),
        "target": np.stack([picture(3), picture(4)]),
    }
    plan = {"b": [(to, 7, "b.png"), (to, 8, "b.png")]}
    rows = expand_rows(batch, plan=plan, domains=["day", "night"], paired=True, image_size=16, keep_truth=True)
    assert rows["id"].tolist() == ["b", "b"]
    assert rows["seed"].tolist() == [7, 8]
    assert np.array_equal(rows["image"], np.stack([batch[source][1]] * 2))
    assert np.array_equal(rows["truth"], np.stack([batch[truth][1]] * 2))


def test_a_result_that_no_file_can_hold_is_set_aside(tmp_path: Path, checkpoint_folder: str) -> None:
    wide = images.encode_png(np.zeros((8, images.MAX_SIDE["webp"] + 1, 3), np.uint8))
    files = {"wide.png": wide, "small.png": images.encode_png(picture(1, 40))}
    views = [full_size.look(data, 16, output_size="own") for data in files.values()]
    columns: dict[str, list[Any]] = {
        "id": list(files),
        "output": [f"{name}.webp" for name in files],
        "to": ["night", "night"],
        "seed": [0, 0],
        "error": ["", ""],
        "file": list(files.values()),
    }
    batch = {name: np.array(values, dtype=object) for name, values in columns.items()}
    batch |= {"image": np.stack([view.pixels for [view] in views]), "views": np.empty(2, object)}
    for row, each in enumerate(views):
        batch["views"][row] = tuple(each)
    actor = Translate(
        checkpoint_uri=checkpoint_folder,
        ema=None,
        sampling={},
        output=str(tmp_path),
        num_threads=1,
        output_format="webp",
    )
    wrong, right = actor(batch)["error"]
    assert wrong.startswith("wide.png: a result of 16384 x 8 pixels is too large for webp")
    assert right == ""
    with Image.open(tmp_path / "small.png.webp") as image:
        assert (image.format, image.size) == ("WEBP", (40, 40))
        assert checkpoint.load(checkpoint_folder).fingerprint.encode() in image.info["xmp"]
    assert not (tmp_path / "wide.png.webp").exists()


def test_the_actor_groups_by_wish_and_skips_what_is_set_aside(checkpoint_folder: str) -> None:
    actor = Translate(checkpoint_uri=checkpoint_folder, ema=None, sampling={}, output=None, num_threads=1)
    batch = {
        "id": np.array(["a", "b", "c"]),
        "to": np.array(["night", "day", "night"]),
        "seed": np.array([0, 0, 1]),
        "image": np.stack([picture(1)] * 3),
        "error": np.array(["", "", ""], dtype=object),
    }
    results = actor(batch)["result"]
    alone = Translator(checkpoint.load(checkpoint_folder))
    for i, (to, seed) in enumerate([("night", 0), ("day", 0), ("night", 1)]):
        assert np.array_equal(results[i], alone(picture(1)[None], to, seed=seed)[0])
    assert not np.array_equal(results[0], results[2])
    batch["error"] = np.array(["", "bad", ""], dtype=object)
    assert not actor(batch)["result"][1].any()


# -- the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        put(tmp_path / "in" / f"{i % 2}" / f"p{i}.png", i)
    return tmp_path / "in"


def test_a_folder_is_translated_resumed_and_kept_up_to_date(
    folder: Path, tmp_path: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One story, since each step stands on the one before."""
    output = tmp_path / "out"
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("hello")
    argv = command(checkpoint_folder, folder, output)
    assert translate.main(argv) == cli.SET_ASIDE
    said = capsys.readouterr()
    assert "1 of 6 images were set aside" in said.err
    assert str(output / "rejected.txt") in said.err
    assert "bad.jpg: not an image" in (output / "rejected.txt").read_text()

    # the results are those of the network on each image alone
    alone = Translator(checkpoint.load(checkpoint_folder))
    for i in range(5):
        found = np.asarray(Image.open(output / f"{i % 2}" / f"p{i}.png"))
        right = alone(picture(i)[None], "night")[0]
        assert np.abs(found.astype(int) - right).max() <= 1
    rows = manifest(output)
    assert rows["bad.jpg"]["status"] == "rejected"
    assert sum(row["status"] == "ok" for row in rows.values()) == 5
    note = json.loads((output / "run.json").read_text())
    assert note["complete"]
    assert note["counts"] == {"images": 6, "ok": 5, "rejected": 1, "ignored": 1}
    assert note["options"]["guidance_scale"] == 1.5
    assert note["licence"] == "unknown"
    assert Image.open(output / "preview.png").size[0] > 256

    # again: only what was set aside is tried, and what was mended, changed, lost or is new is done
    before = {path: path.stat().st_mtime_ns for path in output.rglob("p*.png") if path.name != "preview.png"}
    put(folder / "bad.jpg", 77)
    put(folder / "0" / "p0.png", 78)
    put(folder / "0" / "p4.webp", 79)
    (output / "1" / "p1.png").unlink()
    assert translate.main(argv) == cli.DONE
    assert "4 images to translate, 3 are done already" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in before}
    changed = {str(path.relative_to(output)) for path in before if before[path] != after[path]}
    assert changed == {"0/p0.png", "1/p1.png"}
    assert (output / "bad.png").exists()
    assert (output / "0" / "p4.webp.png").exists()  # p4.png was there first
    assert not (output / "rejected.txt").exists()

    # and again: nothing
    assert translate.main(argv) == cli.DONE
    assert "nothing to do, 7 images translated already" in capsys.readouterr().out

    # other options do not mix with these results
    with pytest.raises(InputError, match=r"--guidance-scale 1.5, this command says 3.0"):
        translate.main([*argv, "--guidance-scale", "3"])
    with pytest.raises(InputError, match="--seed 0, this command says 1"):
        translate.main([*argv, "--seed", "1"])


def test_a_data_set_is_translated_row_by_row(tmp_path: Path, checkpoint_folder: str) -> None:
    rows = [
        Row(id=f"{i:02d}.jpg", domain=0, image=picture(i), target=picture(50 + i), target_id=f"n{i}") for i in range(6)
    ]
    card = DatasetCard(
        name="toy",
        licence="CC0",
        source="here",
        image_size=16,
        encoding="png",
        domains=("day", "night"),
        pairing="paired",
    )
    writing.write_dataset(str(tmp_path / "set"), {"train": rows[:1], "test": rows[1:]}, card)
    output = tmp_path / "out"
    assert translate.main(command(checkpoint_folder, tmp_path / "set", output)) == cli.DONE
    names = sorted(path.name for path in output.glob("*.png") if path.name != "preview.png")
    assert names == [f"{i:02d}.png" for i in range(1, 6)]
    found = np.stack([np.asarray(Image.open(output / f"{i:02d}.png")) for i in range(1, 5)])
    right = Translator(checkpoint.load(checkpoint_folder))(np.stack([picture(i) for i in range(1, 5)]), "night")
    np.testing.assert_array_equal(found, right)  # of the same batch: its size may decide the last bits


@pytest.mark.parametrize("job", [translate, evaluate])
def test_a_damaged_shard_is_named(tmp_path: Path, checkpoint_folder: str, dataset_folder: str, job: Any) -> None:
    damaged = tmp_path / "set"
    shutil.copytree(dataset_folder, damaged)
    shard = damaged / "test" / "part-00000.parquet"
    content = bytearray(shard.read_bytes())
    column = pyarrow.parquet.ParquetFile(shard).metadata.row_group(0).column(2)
    start = column.data_page_offset
    content[start + 40 : start + column.total_compressed_size - 40] = bytes(column.total_compressed_size - 80)
    shard.write_bytes(content)
    flags = {translate: ["--input", "--domain", "night"], evaluate: ["--data"]}[job]
    flags[1:1] = [str(damaged)]
    with pytest.raises(InputError, match=r"test/part-00000\.parquet is damaged .*make the data set again"):
        job.main(["--checkpoint", checkpoint_folder, "--output", str(tmp_path / "out"), "--num-workers", "0", *flags])


def test_all_images_bad_is_no_crash(tmp_path: Path, checkpoint_folder: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    assert translate.main(command(checkpoint_folder, tmp_path / "in", tmp_path / "out")) == cli.SET_ASIDE
    assert "the file is empty" in (tmp_path / "out" / "rejected.txt").read_text()


def test_a_name_is_at_most_one_rows_fault(tmp_path: Path, checkpoint_folder: str) -> None:
    """Of files; and the same command again finds them done."""
    source, output = tmp_path / "in", tmp_path / "out"
    names = ["x" * 251 + ".png", "x" * 250 + ".webp", "dir.png", "dir.png.png", "dir.jpg", "Dir.PNG.webp", "a\nb.png"]
    for number, name in enumerate(names):
        put(source / name, number)
    for name in (b"caf\xe9.jpg", b"th\xe9.jpg", b"th%E9.jpg", b"d\xe9/1", b"photo", b"photo.jpg", b"photo.png"):
        put(source / os.fsdecode(name), 3, format="PNG")
    put(source / "preview.png" / "sub" / "1.png", 5)
    argv = command(checkpoint_folder, source, output)
    assert translate.main(argv) == cli.SET_ASIDE
    rows = manifest(output)
    bad = {name for name, row in rows.items() if row["status"] == "rejected"}
    assert bad == {"th\\xe9.jpg"}
    assert (output / "rejected.txt").read_text().startswith("th\\xe9.jpg\t")
    outputs = {name: row["output"] for name, row in rows.items()}
    assert (outputs["caf%E9.jpg"], outputs["d%E9/1"]) == ("caf%E9.png", "d%E9/1.png")
    assert [outputs[f"photo{ending}"] for ending in ("", ".jpg", ".png")] == [
        "photo.png",
        "photo.jpg.png",
        "photo.png.png",
    ]
    written = {path.relative_to(output).as_posix() for path in output.rglob("*.png")} - {"preview.png"}
    assert written == {row["output"] for row in rows.values() if row["status"] == "ok"}
    before = {name: (output / name).stat().st_mtime_ns for name in written}
    assert translate.main(argv) == cli.SET_ASIDE
    assert {name: (output / name).stat().st_mtime_ns for name in written} == before
    assert translate.main([*argv, "--set-aside-ok"]) == cli.DONE


def test_a_data_sets_odd_ids_are_translated(tmp_path: Path, checkpoint_folder: str) -> None:
    ids = ["dir", "dir.png/x", "x" * 300, "a\0b", "c\nd", "../up", "/root", "end.", "run.json/1"]
    card = DatasetCard(
        name="toy",
        licence="CC0",
        source="here",
        image_size=16,
        encoding="raw",
        domains=("day", "night"),
        pairing="self",
    )
    test = [Row(id=name, domain=0, image=picture(i)) for i, name in enumerate(sorted(ids))]
    writing.write_dataset(
        str(tmp_path / "set"), {"train": [Row(id="t", domain=0, image=picture(99))], "test": test}, card
    )
    output = tmp_path / "out"
    assert translate.main(command(checkpoint_folder, tmp_path / "set", output)) == cli.DONE
    rows = manifest(output)
    assert sorted(rows) == sorted(ids)
    assert all((output / row["output"]).is_file() for row in rows.values())
    assert {path.name for path in tmp_path.iterdir()} == {"set", "out"}


def test_a_result_that_cannot_be_written_or_is_no_number_is_set_aside(
    folder: Path, tmp_path: Path, checkpoint_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    put(output / "0" / "p2.png" / "in-the-way.png", 1)  # as another program may put it there
    (output / "run.json").write_text(json.dumps({"format": "ddpm-translate-results", "format_version": 2}))
    attempt = Translator.attempt

    def broken(self: Translator, *args: Any, **options: Any) -> Translated:
        made = attempt(self, *args, **options)
        return Translated(made.images, np.array([*made.finite[:-1], False]))

    monkeypatch.setattr(Translator, "attempt", broken)
    assert translate.main(command(checkpoint_folder, folder, output)) == cli.SET_ASIDE
    reasons = {name: row["error"] for name, row in manifest(output).items() if row["error"]}
    assert "result cannot be written" in reasons["0/p2.png"]
    assert [name for name, reason in reasons.items() if reason.startswith(NOT_FINITE)] == ["1/p1.png", "1/p3.png"]
    assert not (output / "1" / "p3.png").exists()


def test_each_file_says_how_it_was_made(folder: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    """The same bytes whatever the batch."""
    for batch_size in ("4", "1"):
        argv = command(checkpoint_folder, folder, tmp_path / batch_size, "--seed", "7")
        assert translate.main([*argv, "--batch-size", batch_size]) == cli.DONE
    told = json.loads(Image.open(tmp_path / "4" / "0" / "p0.png").text["ddpm-translate"])  # type: ignore[attr-defined]
    assert (told["seed"], told["domain"], told["num_steps"], told["licence"]) == (7, "night", 2, "unknown")
    assert told["checkpoint"] == checkpoint.load(checkpoint_folder).fingerprint
    assert "input" not in told
    packet = Image.open(tmp_path / "4" / "0" / "p0.png").info["xmp"]
    assert all(word.encode() in packet for word in (marks.SOURCE_TYPE, told["checkpoint"], "unknown"))
    texts = [Image.open(tmp_path / size / "1" / "p1.png").text for size in "41"]  # type: ignore[attr-defined]
    assert texts[0] == texts[1]


def test_two_images_side_by_side_are_told_of(tmp_path: Path, checkpoint_folder: str, capsys: Any) -> None:
    ramp = np.linspace(0, 120, 64)[None, :, None] * np.ones((64, 1, 3))
    pair = np.concatenate([ramp + 100, 100 - ramp / 2], axis=1).astype(np.uint8)
    panorama = np.concatenate([ramp, ramp + 120], axis=1).astype(np.uint8)
    (tmp_path / "in").mkdir()
    for name, pixels in {
        "pair.png": pair,
        "pair.jpg": pair,
        "panorama.png": panorama,
        "wide.png": pair[:, :120],
    }.items():
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    put(tmp_path / "in" / "noise.png", 1)
    argv = command(checkpoint_folder, tmp_path / "in", tmp_path / "out", "--output-size", "model")
    assert translate.main(argv) == cli.DONE
    noted = {name for name, row in manifest(tmp_path / "out").items() if "two images side by side" in row["note"]}
    assert noted == {"pair.png", "pair.jpg"}
    assert "cut them apart first (2)" in capsys.readouterr().out


def test_the_preview_is_spread_over_all_images(tmp_path: Path, checkpoint_folder: str) -> None:
    for i in range(72):
        put(tmp_path / "in" / f"{i:02d}.png", i)
    translate.main(command(checkpoint_folder, tmp_path / "in", tmp_path / "out", "--output-size", "model"))
    shown = json.loads((tmp_path / "out" / "run.json").read_text())["preview"]
    assert shown == [f"{i:02d}.png" for i in range(1, 72, 3)]
    columns, rows = grids.ungrid((tmp_path / "out" / "preview.png").read_bytes())
    assert (columns, len(rows)) == (["source", "night"] * 3, 8)
    images_shown = [image for row in rows for image in row]
    for i, name in enumerate(shown):
        for image, path in zip(images_shown[2 * i : 2 * i + 2], ("in", "out"), strict=True):
            assert np.array_equal(image, np.asarray(Image.open(tmp_path / path / name)))


def test_a_refused_command_binds_nobody(folder: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    out, sdedit = tmp_path / "out", ["--start", "sdedit", "--num-steps", "5"]
    message = refused([*command(checkpoint_folder, folder, out), *sdedit, "--strength", "0.01"])
    assert "--strength is 0.01: none of the 5 steps is left; give at least 0.2, or more --num-steps" in message
    assert not out.exists()
    job = plan_translation(
        TranslateArgs(checkpoint=checkpoint_folder, input=str(folder), output=str(out), domain="day")
    )
    open_output(job)  # and then Ray, say, does not start
    argv = [*command(checkpoint_folder, folder, out), *sdedit, "--strength", "0.5"]
    assert translate.main(argv) == cli.DONE
    assert "holds results with --strength 0.5, this command says 0.6" in refused([*argv, "--strength", "0.6"])
    assert "--seed is -1" in refused([*argv, "--seed", "-1"])
    assert "--seed is 99999999999999999999" in refused([*argv, "--seed", "99999999999999999999"])


# -- what is refused before anything starts: no Ray in these


def refused(argv: list[str]) -> str:
    with pytest.raises(InputError) as error:
        translate.main(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_input_is_named(folder: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    out = tmp_path / "out"
    assert "no such file or folder" in refused(command(checkpoint_folder, tmp_path / "nowhere", out))
    assert "called as an image" in refused(command(checkpoint_folder, folder / "0" / "p0.png", tmp_path / "night.png"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    message = refused(command(checkpoint_folder, tmp_path / "empty", out))
    assert "holds no images; wanted: .apng" in message
    assert "no checkpoint here" in refused(command(str(tmp_path / "empty"), folder, out))
    argv = command(checkpoint_folder, folder, out)
    argv[argv.index("night")] = "nigth"
    assert "did you mean 'night'" in refused(argv)
    assert "--num-steps is 0" in refused([*command(checkpoint_folder, folder, out), "--num-steps", "0"])
    assert "--batch-size is 0" in refused([*command(checkpoint_folder, folder, out), "--batch-size", "0"])
    assert not out.exists()


SAMPLING = [
    *("--sampler", "ddim", "--num-steps", "3", "--spacing", "leading", "--eta", "0.5", "--guidance-scale", "2"),
    *("--domain-guidance-scale", "1.5", "--guidance-interval", "0.25", "0.75", "--guidance-rescale", "0.5"),
    *("--start", "sdedit", "--strength", "0.8"),
]


def test_every_sampling_option_reaches_the_network(folder: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    argv = command(checkpoint_folder, folder, tmp_path / "out", *SAMPLING)
    args = cli.parse(TranslateArgs, argv, prog="jobs.translate")
    assert all(value is not None for value in vars(args.sampling).values())
    assert vars(args.sampling).keys() == {field.name for field in dataclasses.fields(SamplingConfig)}
    job = plan_translation(args)
    wanted = SamplingConfig(
        sampler="ddim",
        num_steps=3,
        spacing="leading",
        eta=0.5,
        guidance_scale=2.0,
        domain_guidance_scale=1.5,
        guidance_interval=(0.25, 0.75),
        guidance_rescale=0.5,
        start="sdedit",
        strength=0.8,
    )
    assert job.sampling == wanted
    actor = Translate(
        checkpoint_uri=checkpoint_folder, ema=None, sampling=configs.to_dict(job.sampling), output=None, num_threads=1
    )
    batch = {
        "id": np.array(["a"]),
        "to": np.array(["night"]),
        "seed": np.array([0]),
        "image": picture(1)[None],
        "error": np.array([""], dtype=object),
    }
    right = Translator(checkpoint.load(checkpoint_folder))(picture(1)[None], "night", **vars(args.sampling))
    assert np.array_equal(actor(batch)["result"], right)
    refusal = refused(command(checkpoint_folder, folder, tmp_path / "out", "--strength", "0.5"))
    assert "--strength has no effect with --start noise" in refusal
    assert "EMA length 0.1" in refused(command(checkpoint_folder, folder, tmp_path / "out", "--ema", "0.1"))


def write_encoder(folder: Path, **changes: Any) -> Path:
    """A classifier of night with random weights, or another encoder."""
    torch.manual_seed(0)
    options = {"kind": "attributes", "image_size": 16, "widths": (8, 16), "attributes": ("night",), "noise_aware": True}
    config = encoders.EncoderConfig(**{**options, **changes})
    net = (encoders.AttributeClassifier if config.kind == "attributes" else encoders.IdentityEncoder)(config)
    torch.nn.init.normal_(net.head.weight)
    folder.mkdir()
    for name, content in encoders.encoder_files(net.state_dict(), config).items():
        (folder / name).write_bytes(content)
    return folder


IDENTITY = {"kind": "identity", "attributes": (), "noise_aware": False}


def test_guides_reach_the_network_and_the_manifest(folder: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    judge, who = write_encoder(tmp_path / "judge"), write_encoder(tmp_path / "who", **IDENTITY)
    flags = ["--classifier-guidance", str(judge), "--classifier-scale", "30"]
    flags += ["--identity-guidance", str(who), "--identity-scale", "3"]
    out = tmp_path / "out"
    translate.main([*command(checkpoint_folder, folder, out), *flags])
    sources = np.stack([images.read_square((folder / name).read_bytes(), 16, name=name) for name in manifest(out)])
    made = np.stack([np.asarray(Image.open(out / row["output"])) for row in manifest(out).values()])
    plain = Translator(checkpoint.load(checkpoint_folder))(sources, "night")
    net = encoders.load_attribute_classifier(str(judge))
    before, after = (
        net.log_prob("night", True, images.to_tensor(each), torch.zeros(len(each), dtype=torch.int64)).mean()
        for each in (plain, made)
    )
    assert after > before
    right = Translator(
        checkpoint.load(checkpoint_folder),
        classifier=net,
        classifier_scale=30.0,
        identity_encoder=encoders.load_identity_encoder(str(who)),
        identity_scale=3.0,
    )
    assert np.abs(right(sources, "night").astype(int) - made).max() <= 1
    assert json.loads((out / "run.json").read_text())["options"]["classifier_scale"] == 30

    # results of other guides are other results
    assert "--classifier-scale 30.0, this command says 31.0" in refused(
        [*command(checkpoint_folder, folder, out), *flags, "--classifier-scale", "31"]
    )
    assert "classifier_guidance = " in refused(command(checkpoint_folder, folder, out))
    torch.manual_seed(1)
    shutil.copytree(judge, tmp_path / "same-weights")
    flags[1] = str(tmp_path / "same-weights")
    assert translate.main([*command(checkpoint_folder, folder, out), *flags]) == cli.DONE


def test_how_far_people_are_kept_is_told(
    folder: Path, tmp_path: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.jpg").write_text("no image")
    who, out = write_encoder(tmp_path / "who", **IDENTITY), tmp_path / "out"
    argv = [*command(checkpoint_folder, folder, out, "--output-size", "model"), "--identity-net", str(who)]
    assert translate.main(argv) == cli.SET_ASIDE
    rows = manifest(out)
    assert rows.pop("bad.jpg")["identity_cosine"] is None
    net = nets.identity_net(str(who)).module
    for name, row in rows.items():
        pair = np.stack([np.asarray(Image.open(each)) for each in (folder / name, out / row["output"])])
        one, two = nets.features(net, pair).numpy()
        assert row["identity_cosine"] == pytest.approx(float(one @ two), abs=2e-3)
        assert row["identity_cosine"] < 0.9999
    page = (out / "report.html").read_text()
    least = min(rows, key=lambda name: rows[name]["identity_cosine"])
    assert page.index("least alike") < page.index(f"<th>{least}") < page.index(f"{rows[least]['identity_cosine']:.2f}")
    assert all(text in page for text in ("5 translated", "1 set aside", "not an image", "data:image/png"))
    assert translate.main(argv) == cli.SET_ASIDE  # with the same sheet
    assert (out / "report.html").read_text().count("data:image/png") == page.count("data:image/png") == 1
    assert "no encoder here" in refused([*argv[:-1], str(folder)])
    argv[argv.index(str(out))] = str(tmp_path / "other")
    assert "would judge its own work" in refused([*argv, "--identity-guidance", str(who)])


def test_guides_that_cannot_lead_are_refused(folder: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    out = tmp_path / "out"
    judge, who = str(write_encoder(tmp_path / "judge")), str(write_encoder(tmp_path / "who", **IDENTITY))
    clean = str(write_encoder(tmp_path / "clean", noise_aware=False))
    smile = str(write_encoder(tmp_path / "smile", attributes=("Smiling",)))
    short = str(write_encoder(tmp_path / "short", diffusion=DiffusionConfig(num_timesteps=500)))
    for flags, named in [
        (["--classifier-guidance", clean], "knows clean images only"),
        (["--classifier-guidance", smile], "does not know night, only Smiling"),
        (["--classifier-guidance", short], "num_timesteps is 500, it must be 1000"),
        (["--classifier-guidance", who], "--classifier-guidance: .* is an identity encoder"),
        (["--identity-guidance", judge], "--identity-guidance: .* is an attribute classifier"),
        (["--identity-guidance", checkpoint_folder], "--identity-guidance: .* not an encoder's"),
        (["--identity-guidance", str(folder)], "--identity-guidance: .* no encoder here"),
        (["--classifier-scale", "2"], "--classifier-scale has no effect without --classifier-guidance"),
        (["--identity-scale", "2"], "--identity-scale has no effect without --identity-guidance"),
        (["--identity-guidance", who, "--identity-scale", "-1"], "--identity-scale is -1.0; it must be positive"),
        (["--identity-guidance", who, "--start", "ddib"], "ddib"),
    ]:
        assert re.search(named, refused([*command(checkpoint_folder, folder, out), *flags])), flags
    assert not out.exists()


def test_results_never_land_among_the_inputs(folder: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    (tmp_path / "link").symlink_to(folder)
    for output in (folder, folder / "out", tmp_path / "link" / "out"):
        assert "--input; give a folder outside of it" in refused(command(checkpoint_folder, folder, output))
    assert "contains --input" in refused(command(checkpoint_folder, folder, tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter.txt").write_text("hello")
    assert "is not empty" in refused(command(checkpoint_folder, folder, tmp_path / "theirs"))
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]


def test_an_output_without_permission_is_named(
    folder: Path, tmp_path: Path, checkpoint_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:  # root, whom CI often is, may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage.Path, "mkdir", refuse)
    message = refused(command(checkpoint_folder, folder, tmp_path / "locked"))
    assert message.startswith("--output")
    assert "permission denied" in message


def test_an_output_below_a_file_is_named(folder: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    (tmp_path / "file").write_text("x")
    message = refused(command(checkpoint_folder, folder, tmp_path / "file" / "out"))
    assert message.startswith("--output")


def test_a_data_set_of_another_size_is_named(tmp_path: Path, checkpoint_folder: str) -> None:
    row = Row(id="a", domain=0, image=picture(1, 8), target=picture(2, 8), target_id="b")
    card = DatasetCard(
        name="toy",
        licence="CC0",
        source="here",
        image_size=8,
        encoding="raw",
        domains=("day", "night"),
        pairing="paired",
    )
    writing.write_dataset(str(tmp_path / "set"), {"train": [row]}, card)
    message = refused(command(checkpoint_folder, tmp_path / "set", tmp_path / "out"))
    assert "--image-size 16" in message
    card = read_card(str(tmp_path / "set"))
    with pytest.raises(InputError, match="no rows in split 'test'; it has train"):
        listing.split_rows(str(tmp_path / "set"), card, "test")


def test_what_memory_does_not_hold_is_halved(
    folder: Path, tmp_path: Path, checkpoint_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    attempt, most = Translator.attempt, 2

    def narrow(self: Translator, sources: np.ndarray, *args: Any, **options: Any) -> Translated:
        if len(sources) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attempt(self, sources, *args, **options)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one worker
    argv = [*command(checkpoint_folder, folder, tmp_path / "whole"), "--batch-size", "5"]
    assert translate.main(argv) == cli.DONE
    monkeypatch.setattr(Translator, "attempt", narrow)
    argv[argv.index("--output") + 1] = str(tmp_path / "out")
    assert translate.main(argv) == cli.DONE
    assert "out of memory: 2 images at once from here on" in capsys.readouterr().err
    for name in (row["output"] for row in manifest(tmp_path / "out").values()):
        made, whole = (np.asarray(Image.open(tmp_path / where / name)).astype(int) for where in ("out", "whole"))
        assert np.abs(made - whole).max() <= 1  # one at a time is computed by other sums than several
    most = 0
    argv[argv.index("--output") + 1] = str(tmp_path / "none")
    assert "out of memory with one image at a time" in refused(argv)


@pytest.mark.parametrize(
    ("rates", "sizes"),
    [
        ({16: 10, 32: 15, 64: 18, 128: 20}, [16, 16, 32, 32, 64, 64, 128, 128, 128]),
        ({16: 10, 32: 15, 64: 15.1, 128: 20}, [16, 16, 32, 32, 64, 64, 32, 32, 32]),
        ({16: 10, 32: 9}, [16, 16, 32, 32, 16, 16, 16, 16, 16]),
    ],
)
def test_how_many_at_once_are_best_is_found(rates: dict[int, float], sizes: list[int]) -> None:
    found, seen = batches.AtOnce(None), []
    for turn in range(9):
        seen.append(found.now)
        found.took(3, 0.001)  # the end of a batch tells nothing
        found.took(found.now, found.now / rates[found.now] + (1 if turn % 2 == 0 else 0))  # the first of each is slow
    assert seen == sizes
    found.holds(8)
    assert found.now == 8
    said = batches.AtOnce(40)
    said.took(40, 1.0)
    assert said.now == 40


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_results_do_not_hang_on_the_batch(
    folder: Path, tmp_path: Path, checkpoint_folder: str, batch_size: int
) -> None:
    for output, size in {"a": batch_size, "b": 16}.items():
        argv = command(checkpoint_folder, folder, tmp_path / output, "--batch-size", str(size))
        assert translate.main(argv) == cli.DONE
    for row in manifest(tmp_path / "a").values():
        mine, whole = ((tmp_path / where / row["output"]).read_bytes() for where in "ab")
        if batch_size >= 3:
            assert mine == whole
        else:  # one or two images are computed by other sums than many
            apart = np.asarray(images.decode(mine)).astype(int) - np.asarray(images.decode(whole))
            assert np.abs(apart).max() <= 1


# -- early ends, other formats


@pytest.mark.parametrize("wrong", ["bad.png", "raw.dng"])
@pytest.mark.parametrize(("most", "code"), [(None, 3), ("1", 3), ("0", 2), ("99%", 3), ("5%", 2)])
def test_an_input_that_is_plainly_wrong_ends_it_early(
    folder: Path,
    tmp_path: Path,
    checkpoint_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    most: str | None,
    code: int,
    wrong: str,
) -> None:
    monkeypatch.setattr(driver, "LOOK_AT", 3)
    (folder / wrong).write_bytes(b"no image")
    argv = command(checkpoint_folder, folder, tmp_path / "out", *(["--max-rejected", most] if most else []))
    if code == 2:
        why = {"bad.png": "not an image", "raw.dng": "unreadable"}[wrong]
        said = refused([*argv, "--batch-size", "16"])
        assert f"1 of 6 images were set aside, more than --max-rejected {most}: {why}" in said
        assert not (tmp_path / "out" / "manifest.parquet").exists()
    else:
        assert translate.main(argv) == code


@pytest.mark.parametrize("most", ["100%", "-1", "x", "1.5", "%"])
def test_what_max_rejected_may_be(folder: Path, tmp_path: Path, checkpoint_folder: str, most: str) -> None:
    message = refused([*command(checkpoint_folder, folder, tmp_path / "out"), f"--max-rejected={most}"])
    assert f"--max-rejected is {most}; give a number of images, or a share" in message


def test_a_dry_run_tries_ten_and_writes_nothing(
    s3: Any, tmp_path: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = f"{s3.uri}/dry/in", tmp_path / "out"
    for i in range(12):
        storage.write_bytes(f"{source}/{i:02d}.png", put(tmp_path / "x.png", i).read_bytes())
    storage.write_bytes(f"{source}/00.png", b"no image")
    argv = command(checkpoint_folder, source, out, "--dry-run")
    assert translate.main(argv) == cli.DONE
    said = capsys.readouterr().out
    assert "12 images to translate of 12 that are listed" in said
    assert "tried: 10, of which 1 would be set aside: not an image" in said
    assert "requests to S3: 12 to read, 1 to list and write; at the list price 0.00 dollars" in said
    assert not out.exists()
    assert translate.main(argv[:-1]) == cli.SET_ASIDE
    before = storage.file_sizes(str(out))
    capsys.readouterr()
    assert translate.main(argv) == cli.DONE
    assert "1 image to translate of 12 that are listed" in capsys.readouterr().out
    assert storage.file_sizes(str(out)) == before


@pytest.mark.parametrize(("kind", "suffix", "format"), [("jpeg", ".jpg", "JPEG"), ("webp", ".webp", "WEBP")])
def test_results_in_other_formats(
    folder: Path, tmp_path: Path, checkpoint_folder: str, kind: str, suffix: str, format: str
) -> None:
    out = tmp_path / "out"
    assert translate.main(command(checkpoint_folder, folder, out, "--output-format", kind)) == cli.DONE
    outputs = [row["output"] for row in manifest(out).values()]
    assert outputs == [f"{i % 2}/p{i}{suffix}" for i in (0, 2, 4, 1, 3)]
    assert {Image.open(out / name).format for name in outputs} == {format}
    assert (
        "--output-format jpeg, this command says" in refused(command(checkpoint_folder, folder, out)) or kind == "webp"
    )


# -- kill -9


@pytest.mark.slow
def test_killed_half_way_and_started_again_equals_an_unbroken_run(tmp_path: Path, checkpoint_folder: str) -> None:
    for i in range(40):
        put(tmp_path / "in" / f"{i:03d}.png", i)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    more = ["--num-steps", "40", "--batch-size", "2"]
    argv = command(checkpoint_folder, tmp_path / "in", killed, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.translate", *argv],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},  # its own Ray
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    parts = killed / ".shards" / "00000001"
    deadline = time.monotonic() + 400
    while not (parts.exists() and any(parts.glob("part-*.parquet"))) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: row for name, row in rows_of(killed).items() if row["status"] == "ok"}
    assert 0 < len(before) < 40, "killed too early or too late to show anything"
    done = {name: (killed / row["output"]).stat().st_mtime_ns for name, row in before.items()}

    assert translate.main(argv) == cli.DONE
    assert translate.main(command(checkpoint_folder, tmp_path / "in", whole, *more)) == cli.DONE
    rows = manifest(killed)
    assert len(rows) == 40
    assert not list(killed.rglob("*.tmp"))
    for name, row in rows.items():
        assert (killed / row["output"]).read_bytes() == (whole / row["output"]).read_bytes()
        if name in done:  # not done a second time
            assert (killed / row["output"]).stat().st_mtime_ns == done[name]


def photos(folder: Path) -> Path:
    """A wide photo, a tall one that EXIF turns, and one of the network's size."""
    folder.mkdir()
    rgb = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    photo = Image.fromarray(rgb).resize((120, 80), Image.Resampling.BICUBIC)
    photo.save(folder / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "tall.jpg", exif=exif.tobytes())
    photo.resize((16, 16)).save(folder / "square.png")
    return folder


def test_results_have_their_photos_size(tmp_path: Path, checkpoint_folder: str) -> None:
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    assert translate.main(command(checkpoint_folder, source, out, "--mark-key", "none")) == cli.DONE
    sizes = {"wide": (120, 80), "tall": (80, 120), "square": (16, 16)}
    made = Translator(checkpoint.load(checkpoint_folder)).at_own_size(
        [Image.open(source / name) for name in ("wide.png", "tall.jpg", "square.png")], "night"
    )
    for (name, size), wanted in zip(sizes.items(), made, strict=True):
        with Image.open(out / f"{name}.png") as image:
            assert image.size == size
            assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 2
            assert json.loads(image.info["ddpm-translate"])["output_size"] == "own"
    rows = manifest(out)
    assert {(row["width"], row["height"]) for row in rows.values()} == set(sizes.values())
    with Image.open(out / "preview.png") as preview:
        assert max(preview.size) < 1000
    assert "--output-size own" in refused(command(checkpoint_folder, source, out, "--output-size", "model"))
    assert "--mark-key" in refused(command(checkpoint_folder, source, out))


def test_photos_are_drawn_in_tiles(tmp_path: Path, checkpoint_folder: str) -> None:
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    put(source / "small.png", 5, 12)
    argv = command(checkpoint_folder, source, out, "--tiles", "--mark-key", "none")
    assert translate.main(argv) == cli.SET_ASIDE
    assert manifest(out)["small.png"]["error"].startswith("small.png: 12 x 12 pixels; tiles are for photos of 16 x 16")
    library = Translator(checkpoint.load(checkpoint_folder))
    for name in ("wide.png", "tall.jpg"):
        with Image.open(out / f"{name.partition('.')[0]}.png") as image:
            assert json.loads(image.info["ddpm-translate"])["tiles"] is True
            wanted = library.in_tiles(Image.open(source / name), "night")
            assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1
    assert "--tiles" in refused(command(checkpoint_folder, source, out, "--mark-key", "none"))
    for more in (["--output-size", "model"], ["--start", "flowedit"]):
        assert "tiles" in refused(command(checkpoint_folder, source, tmp_path / "new", "--tiles", *more))


def test_results_are_marked_with_the_operators_key_or_not_at_all(tmp_path: Path, checkpoint_folder: str) -> None:
    source, key = photos(tmp_path / "in"), tmp_path / "key"
    key.write_bytes(b"0123456789abcdef")
    for name, mark_key in {"none": "none", "public": None, "secret": str(key)}.items():
        more = ["--mark-key", mark_key] if mark_key else []
        assert translate.main(command(checkpoint_folder, source, tmp_path / name, *more)) == cli.DONE
    keys = {"public": keyed_mark.PUBLIC, "secret": key.read_bytes()}
    for name, secret in keys.items():
        for photo in ("wide", "tall", "square"):
            bare = np.asarray(Image.open(tmp_path / "none" / f"{photo}.png"))
            with Image.open(tmp_path / name / f"{photo}.png") as made:
                assert np.array_equal(np.asarray(made), keyed_mark.embed(bare, secret))
                told = json.loads(made.info["ddpm-translate"])
            assert told.get("mark") == (None if photo == "square" else keyed_mark.name_of(secret))
            assert "mark_key" not in told
        assert json.loads((tmp_path / name / "run.json").read_text())["options"]["mark_key"] == keyed_mark.name_of(
            secret
        )
        assert all(b"0123456789abcdef" not in path.read_bytes() for path in (tmp_path / name).iterdir())
    assert "--mark-key" in refused(command(checkpoint_folder, source, tmp_path / "public", "--mark-key", str(key)))
    assert "no such file" in refused(command(checkpoint_folder, source, tmp_path / "new", "--mark-key", "gone"))
    assert not (tmp_path / "new").exists()


def test_squares_are_what_they_were(tmp_path: Path, checkpoint_folder: str) -> None:
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    argv = command(checkpoint_folder, source, out, "--output-size", "model")
    assert translate.main(argv) == cli.DONE
    square = images.read_square((source / "wide.png").read_bytes(), 16)
    wanted = Translator(checkpoint.load(checkpoint_folder))(square[None], "night")[0]
    with Image.open(out / "wide.png") as image:
        assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1
        assert "output_size" not in json.loads(image.info["ddpm-translate"])
    assert {(row["width"], row["height"]) for row in manifest(out).values()} == {(16, 16)}


def test_temporary_files_of_a_killed_run_are_swept(folder: Path, tmp_path: Path, checkpoint_folder: str) -> None:
    argv = command(checkpoint_folder, folder, tmp_path / "out")
    assert translate.main(argv) == cli.DONE
    debris = tmp_path / "out" / "0" / "p0.png.0123abcd.tmp"
    storage.write_bytes(str(debris), b"half")
    assert translate.main(argv) == cli.DONE
    assert not debris.exists()


def test_bucket_to_bucket(s3: Any, folder: Path, checkpoint_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoint, images and results all on S3; changed objects are found there too."""
    root = f"{s3.uri}/translate"
    for path in folder.rglob("*.png"):
        storage.write_bytes(f"{root}/in/{path.relative_to(folder)}", path.read_bytes())
    storage.write_bytes(f"{root}/in/bad.jpg", b"no image")
    for path in Path(checkpoint_folder).iterdir():
        storage.write_bytes(f"{root}/checkpoint/{path.name}", path.read_bytes())
    argv = command(f"{root}/checkpoint", f"{root}/in", f"{root}/out")
    assert translate.main(argv) == cli.SET_ASIDE
    names = storage.list_files(f"{root}/out")
    results = [f"{i % 2}/p{i}.png" for i in (0, 2, 4, 1, 3)]
    assert names == sorted(
        [*results, "manifest.parquet", "preview.png", "rejected.parquet", "rejected.txt", "report.html", "run.json"]
    )
    found = images.to_square(images.decode(storage.read_bytes(f"{root}/out/1/p3.png")), 16)
    right = Translator(checkpoint.load(checkpoint_folder))(picture(3)[None], "night")[0]
    assert np.abs(found.astype(int) - right).max() <= 1

    storage.write_bytes(f"{root}/in/bad.jpg", (folder / "0" / "p0.png").read_bytes())
    capsys.readouterr()
    assert translate.main(argv) == cli.DONE
    assert "1 image to translate, 5 are done already" in capsys.readouterr().out
    assert "lies in --input" in refused(command(f"{root}/checkpoint", f"{root}/in", f"{root}/in/out"))
