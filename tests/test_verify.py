"""`jobs.verify`: what it says of files, and how it ends."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_core import keyed_mark, marks
from jobs import verify
from jobs.common import cli

RECORD = {"checkpoint": "abc", "licence": "CC BY 4.0", "domain": "night", "seed": 3}
KEY = b"0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    there = tmp_path / "there"
    (there / "deep").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(100, 140, (64, 90, 3), dtype=np.uint8)
    (there / "public.png").write_bytes(marks.finish(pixels, RECORD, "png", keyed_mark.PUBLIC))
    (there / "deep" / "secret.webp").write_bytes(marks.finish(pixels, RECORD, "webp", KEY))
    (there / "bare.jpg").write_bytes(marks.finish(pixels, RECORD, "jpeg"))
    Image.fromarray(pixels).save(there / "photo.JPG", "JPEG")
    (there / "notes.txt").write_text("no image")
    (tmp_path / "key").write_bytes(KEY)
    return there


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {Path(row["uri"]).name: row for row in told}


def test_files_of_a_folder_are_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(folder), "--json"]) == cli.DONE
    told = rows(capsys)
    assert {name: (row["generated"], row["marked"]) for name, row in told.items()} == {
        "public.png": (True, True),
        "secret.webp": (True, False),
        "bare.jpg": (True, False),
        "photo.JPG": (False, False),
    }
    assert told["public.png"]["record"] == {**RECORD, "mark": "public"}
    assert told["photo.JPG"]["record"] == {}
    key = ["--mark-key", str(folder.parent / "key")]
    assert verify.main([str(folder / "deep" / "secret.webp"), str(folder / "public.png"), "--json", *key]) == cli.DONE
    assert [row["marked"] for row in rows(capsys).values()] == [True, False]
    assert verify.main([str(folder), "--json", "--mark-key", "none"]) == cli.DONE
    assert {row["marked"] for row in rows(capsys).values()} == {None}


def test_people_are_told_in_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(folder)]) == cli.DONE
    bare, secret, photo, public, total = capsys.readouterr().out.splitlines()
    assert "photo.JPG: says nothing of having been generated; no mark of this key (score " in photo
    assert "public.png: says that it was generated; the mark is there (score 1" in public
    assert public.endswith("domain night, seed 3, checkpoint abc, licence CC BY 4.0, mark public")
    assert "no mark" in bare
    assert "no mark" in secret
    assert total == "4 images: 3 say that they were generated, 1 have the mark"


def test_what_cannot_be_read_costs_itself_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    assert verify.main([str(folder), "--json"]) == cli.SET_ASIDE
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert "1 of 5 images could not be read" in err
    assert [row["uri"] for row in map(json.loads, out.splitlines()) if row["error"]] == [str(folder / "bad.png")]


@pytest.mark.parametrize("arguments", [[], ["gone.png"], ["empty"], ["here.png", "--mark-key", "gone"]])
def test_wrong_input_is_named(
    folder: Path,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: verify.main(arguments))
    assert stopped.value.code == cli.WRONG_INPUT
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
