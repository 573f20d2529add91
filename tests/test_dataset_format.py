"""The data-set format: same rows, same bytes; strict when read; rows by index in the order of their ids."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ddpm_core import storage
from ddpm_core.config import Pairing
from ddpm_core.errors import InputError
from jobs.datasets import reading, writing
from jobs.datasets.format import SCHEMA, SPLITS, DatasetCard, Row, missing_shards, read_card

SIZE = 8


def card(**changes: Any) -> DatasetCard:
    values: dict[str, Any] = {
        "name": "test",
        "licence": "CC0",
        "source": "drawn",
        "image_size": SIZE,
        "encoding": "raw",
        "domains": ("day", "night"),
        "pairing": "paired",
    }
    return DatasetCard(**(values | changes))


def pixels(number: int) -> np.ndarray:
    """An image of its own for each number; smooth, so that JPEG keeps it."""
    base = np.full((SIZE, SIZE, 3), (number * 37 % 256, number * 11 % 256, number % 256), np.uint8)
    base[:, SIZE // 2 :] //= 2
    return base


def rows(count: int, start: int = 0, *, paired: bool = True) -> Iterator[Row]:
    for number in range(start, start + count):
        yield Row(
            id=f"{number:05d}",
            domain=number % 2,
            image=pixels(number),
            target=pixels(number + 1) if paired else None,
            target_id=f"{number + 1:05d}" if paired else None,
            identity=number // 10,
            attributes=[1, -1],
            landmarks=[0.5, number],
        )


def splits(train: int = 30, val: int = 10, test: int = 10, **options: Any) -> dict[str, Iterator[Row]]:
    return {
        "train": rows(train, **options),
        "val": rows(val, train, **options),
        "test": rows(test, train + val, **options),
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    writing.write_dataset(str(folder), splits(), card())
    return folder


def edit_card(source: Path, target: Path, **changes: Any) -> str:
    """A copy of the data set whose dataset.json has other values; None removes a field."""
    for name, content in files(source).items():
        storage.write_bytes(str(target / name), content)
    values = json.loads((target / "dataset.json").read_text())
    for name, value in changes.items():
        values.pop(name, None)
        if value is not None:
            values[name] = value
    (target / "dataset.json").write_text(json.dumps(values))
    return str(target)


# ---------------------------------------------------------------------------------------------- writing


def test_card_tells_what_was_written(dataset: Path) -> None:
    there = read_card(str(dataset))
    assert there.splits == {"train": 30, "val": 10, "test": 10}
    assert there.domain_counts["train"] == {"day": 15, "night": 15}
    assert [shard.file for shard in there.shards] == [f"{split}/part-00000.parquet" for split in SPLITS]
    mean = np.stack([row.image for row in rows(30)]).mean(axis=(0, 1, 2)) / 127.5 - 1
    np.testing.assert_allclose(there.mean_color, mean, atol=1e-5)
    np.testing.assert_allclose(there.mean_landmarks, [0.5 / SIZE, np.arange(30).mean() / SIZE], atol=1e-6)
    assert (there.version, there.parts) == (1, ())
    written = ("splits", "domain_counts", "mean_color", "mean_landmarks", "shards", "content_hash", "made_with")
    assert there == dataclasses.replace(card(), **{name: getattr(there, name) for name in written})


@pytest.mark.parametrize(("pairing", "count"), [("paired", 30), ("matched", 15), ("unpaired", 15), ("self", 15)])
def test_images_of_a_domain_are_counted(dataset: Path, pairing: Pairing, count: int) -> None:
    there = dataclasses.replace(read_card(str(dataset)), pairing=pairing)
    assert [there.num_images("train", domain) for domain in there.domains] == [count, count]


def test_columns_are_the_documented_ones(dataset: Path) -> None:
    table = pyarrow.parquet.read_table(dataset / "train/part-00000.parquet")
    assert table.schema.equals(SCHEMA)
    first = table.slice(3, 1).to_pylist()[0]
    assert first["image"] == pixels(3).tobytes()
    assert first["target"] == pixels(4).tobytes()
    assert {key: value for key, value in first.items() if key not in ("image", "target")} == {
        "id": "00003",
        "domain": 1,
        "target_id": "00004",
        "identity": 0,
        "attributes": [1, -1],
        "landmarks": [0.5, 3.0],
    }


def test_same_rows_same_bytes(dataset: Path, tmp_path: Path) -> None:
    writing.write_dataset(str(tmp_path), splits(), card())
    assert files(tmp_path) == files(dataset)


def test_content_hash_sees_pixels_ids_and_splits(dataset: Path, tmp_path: Path) -> None:
    hashes = {read_card(str(dataset)).content_hash}
    for number, changed in enumerate([splits(30, 10, 9), splits(20, 20)]):
        hashes.add(writing.write_dataset(str(tmp_path / str(number)), changed, card()).content_hash)
    other = [dataclasses.replace(row, image=row.image ^ (row.id == "00007")) for row in rows(30)]
    hashes.add(writing.write_dataset(str(tmp_path / "x"), {**splits(), "train": other}, card()).content_hash)
    assert len(hashes) == 4


def test_shards_and_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 600 * 2 * SIZE * SIZE * 3)
    many = [dataclasses.replace(row, identity=None) for row in rows(2000)]
    written = writing.write_dataset(str(tmp_path), {"train": many}, card())
    assert [shard.rows for shard in written.shards] == [768, 768, 464]
    metadata = pyarrow.parquet.ParquetFile(tmp_path / "train/part-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [256, 256, 256]


def test_large_images_make_small_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 10 * 2 * SIZE * SIZE * 3)
    many = [dataclasses.replace(row, identity=None) for row in rows(25)]
    written = writing.write_dataset(str(tmp_path), {"train": many}, card())
    assert [shard.rows for shard in written.shards] == [10, 10, 5]


@pytest.mark.parametrize("theirs", ["train/part-00000.parquet", "dataset.json"])
def test_two_that_write_at_a_time_do_not_mix(dataset: Path, tmp_path: Path, theirs: str) -> None:
    def disturbed() -> Iterator[Row]:
        storage.write_bytes(str(tmp_path / theirs), files(dataset)[theirs])
        yield from rows(5, 40)

    with pytest.raises(InputError, match="another program wrote there at the same time"):
        writing.write_dataset(str(tmp_path), {"train": rows(40), "val": disturbed()}, card())
    assert files(tmp_path)[theirs] == files(dataset)[theirs]
    assert (tmp_path / "dataset.json").exists() == (theirs == "dataset.json")
    assert (tmp_path / "val").exists() == (theirs != "dataset.json")


def test_killed_half_way_it_is_no_data_set_and_the_rest_is_replaced(dataset: Path, tmp_path: Path) -> None:
    def dies() -> Iterator[Row]:
        yield from rows(5, 30)
        raise KeyboardInterrupt

    storage.write_bytes(str(tmp_path / "train/part-00007.parquet"), b"left over")
    storage.write_bytes(str(tmp_path / "train/part-00000.parquet.0123abcd.tmp"), b"left over")
    storage.write_bytes(str(tmp_path / "notes.txt"), b"the user's own")
    writing.write_dataset(str(tmp_path), splits(), card())
    with pytest.raises(KeyboardInterrupt):
        writing.write_dataset(str(tmp_path), {**splits(), "val": dies()}, card())
    with pytest.raises(InputError, match="is not a data set"):
        read_card(str(tmp_path))
    writing.write_dataset(str(tmp_path), splits(), card())
    assert files(tmp_path) == {**files(dataset), "notes.txt": b"the user's own"}


def test_ids_must_be_unique_and_identities_in_one_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'00029' occurs twice"):
        writing.write_dataset(str(tmp_path), {"train": rows(30), "val": rows(10, 29)}, card())
    with pytest.raises(InputError, match="identity 2 is in both train and val"):
        writing.write_dataset(str(tmp_path), {"train": rows(25), "val": rows(10, 25)}, card())
    with pytest.raises(InputError, match="no image for training"):
        writing.write_dataset(str(tmp_path), {"val": rows(3)}, card())
    with pytest.raises(AssertionError, match="not sorted"):
        writing.write_dataset(str(tmp_path), {"train": reversed(list(rows(3)))}, card())


# ---------------------------------------------------------------------------------------------- the card


def test_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist.*jobs\.prepare"):
        read_card(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"is not a data set.*jobs\.prepare"):
        read_card(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 1}, "format_version 1, this program reads 2"),
        ({"format_version": 99}, "format_version 99, this program reads 2"),
        ({"format_version": None}, "format_version None"),
        ({"licence": None}, "no field 'licence'"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"image_size": "64"}, r"image_size is '64'; it must be int"),
        ({"encoding": "gif"}, "must be one of raw, png, jpeg"),
        ({"splits": {"train": 31, "val": 10, "test": 10}}, "do not fit"),
        ({"domains": []}, "do not fit"),
    ],
)
def test_card_is_read_strictly(dataset: Path, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        read_card(edit_card(dataset, tmp_path, **changes))
    assert "dataset.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_card_that_is_no_json(tmp_path: Path) -> None:
    for content in ('{"name": ', "[1]", ""):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(InputError, match=r"dataset\.json"):
            read_card(str(tmp_path))


def test_missing_shards_are_noticed(dataset: Path, tmp_path: Path) -> None:
    uri = edit_card(dataset, tmp_path)
    there = read_card(uri)
    assert missing_shards(uri, there) == []
    (tmp_path / "val/part-00000.parquet").write_bytes(b"cut off")
    (tmp_path / "test/part-00000.parquet").unlink()
    assert missing_shards(uri, there) == ["val/part-00000.parquet", "test/part-00000.parquet"]


# ---------------------------------------------------------------------------------------------- reading


def test_all_columns_can_be_read(dataset: Path) -> None:
    (table,) = reading.read_tables(str(dataset), "train", columns=SCHEMA.names)
    first = table.slice(0, 1).to_pylist()[0]
    assert first["attributes"] == [1, -1]
    assert first["identity"] == 0
    np.testing.assert_array_equal(reading.pixels_of(table, "image"), np.stack([row.image for row in rows(30)]))


def test_pieces_hold_every_row_once_and_only_the_wanted_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROWS_PER_GROUP", 4)
    writing.write_dataset(str(tmp_path), splits(), card())
    there = reading.open_split(str(tmp_path), "train", rows_in_piece=10)
    assert [piece.rows for piece in there.pieces] == [12, 12, 6]
    ids = [name for piece in there.pieces for name in there.read(piece)["id"].to_pylist()]
    assert ids == [f"{number:05d}" for number in range(30)]
    monkeypatch.setattr(reading, "decode_column", counted := Counted(reading.decode_column))
    assert there.read(there.pieces[1], wanted={"00013", "00029"})["id"].to_pylist() == ["00013"]
    assert there.read(there.pieces[1], wanted=set()).num_rows == 0
    assert counted.rows == 2  # an image and its counterpart


class Counted:
    def __init__(self, decode: Any) -> None:
        self.decode, self.rows = decode, 0

    def __call__(self, column: Any, *args: Any) -> Any:
        self.rows += len(column)
        return self.decode(column, *args)


def test_unknown_split_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows in split 'tset'; it has train, val, test"):
        reading.open_split(str(dataset), "tset")
    writing.write_dataset(str(tmp_path), {"train": rows(5)}, card())
    with pytest.raises(InputError, match="no rows in split 'val'; it has train"):
        reading.open_split(str(tmp_path), "val")


def without_footer(data: bytes) -> bytes:
    """A parquet file whose description of itself begins with nonsense."""
    length = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - length] + b"\xff" * 8 + data[-length:]


def _rewrite(path: Path, change: Any) -> None:
    pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(path)), path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "not a readable parquet file"),
        (lambda path: path.write_text("text"), "not a readable parquet file"),
        (lambda path: _rewrite(path, lambda table: table.drop_columns(["domain"])), "column 'domain' is missing"),
        (
            lambda path: _rewrite(path, lambda t: t.set_column(1, "domain", t.column("domain").cast(pyarrow.string()))),
            "column 'domain' is string, it must be int8",
        ),
        (lambda path: _rewrite(path, lambda table: table.slice(1)), "29 rows where dataset.json says 30"),
        (lambda path: _rewrite(path, lambda table: table), r"has [\d,]+ bytes where dataset.json says [\d,]+; make"),
        (lambda path: path.write_bytes(without_footer(path.read_bytes())), "is damaged"),
    ],
    ids=["gone", "cut", "text", "column", "type", "rows", "another", "footer"],
)
def test_damaged_file_is_named(dataset: Path, tmp_path: Path, damage: Any, reason: str) -> None:
    uri = edit_card(dataset, tmp_path)
    damage(tmp_path / "train/part-00000.parquet")
    with pytest.raises(InputError, match=reason) as caught:
        reading.open_split(uri, "train")
    assert "train/part-00000.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "is missing; make the data set again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "has .* bytes where dataset.json says"),
        (lambda path: path.write_bytes(b""), "has 0 bytes where dataset.json says"),
        (lambda path: path.write_bytes(bytes(len(path.read_bytes()))), r"is damaged .*; make the data set again"),
        (lambda path: _rewrite(path, lambda table: table), "has .* bytes where dataset.json says"),
    ],
    ids=["gone", "cut", "empty", "zeros", "another"],
)
def test_a_file_that_is_spoiled_while_it_is_read_is_named(
    dataset: Path, tmp_path: Path, damage: Any, reason: str
) -> None:
    there = reading.open_split(edit_card(dataset, tmp_path), "train")
    damage(tmp_path / "train/part-00000.parquet")
    with pytest.raises(InputError, match=rf"train/part-00000\.parquet {reason}"):
        there.read(there.pieces[0])


@pytest.mark.parametrize("offset", [0, 2])
def test_raw_column_is_viewed_even_when_sliced(offset: int) -> None:
    column = pyarrow.chunked_array([[pixels(i).tobytes() for i in range(6)]]).slice(offset, 3)
    decoded = reading.decode_column(column, SIZE, "raw")
    np.testing.assert_array_equal(decoded, np.stack([pixels(offset + i) for i in range(3)]))


def test_damaged_rows_are_named() -> None:
    good = pixels(1).tobytes()
    with pytest.raises(InputError, match="row b: 5 bytes; a raw image has 192"):
        reading.decode_column(pyarrow.chunked_array([[good, b"12345"]]), SIZE, "raw", ["a", "b"])
    with pytest.raises(InputError, match="row b: no image"):
        reading.decode_column(pyarrow.chunked_array([[good, None]]), SIZE, "raw", ["a", "b"])
    with pytest.raises(InputError, match="row a: not an image"):
        reading.decode_column(pyarrow.chunked_array([[b"text"]]), SIZE, "png", ["a"])


def test_damaged_pixels_are_named(dataset: Path, tmp_path: Path) -> None:
    uri = edit_card(dataset, tmp_path, encoding="png")  # raw bytes are no PNG
    with pytest.raises(InputError, match=r"^row 00030: not an image"):
        list(reading.read_tables(uri, "val"))


def test_on_s3_the_bytes_are_the_same(s3: Any, dataset: Path) -> None:
    uri = f"{s3.uri}/data/set"
    writing.write_dataset(uri, splits(), card())
    assert {name: storage.read_bytes(f"{uri}/{name}") for name in storage.list_files(uri)} == files(dataset)


def test_reading_from_s3(s3: Any, dataset: Path) -> None:
    uri = f"{s3.uri}/data/a copy"
    for name, content in files(dataset).items():
        storage.write_bytes(f"{uri}/{name}", content)
    there = reading.open_split(uri, "train")
    (piece,) = there.pieces
    found = reading.pixels_of(there.read(piece), "image")
    np.testing.assert_array_equal(found, np.stack([row.image for row in rows(30)]))
    storage.delete_file(f"{uri}/train/part-00000.parquet")
    for read in (lambda: there.read(piece), lambda: reading.open_split(uri, "train")):
        with pytest.raises(InputError, match=r"train/part-00000\.parquet is missing"):
            read()


def test_reading_from_a_folder_with_a_difficult_name(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "été 50%20 #1"
    for name, content in files(dataset).items():
        storage.write_bytes(str(folder / name), content)
    assert sum(table.num_rows for table in reading.read_tables(str(folder), "val")) == 10


def test_a_flipped_bit_in_a_image_is_told(dataset: Path, tmp_path: Path) -> None:
    uri = edit_card(dataset, tmp_path)
    shard = tmp_path / "train/part-00000.parquet"
    metadata = pyarrow.parquet.ParquetFile(shard).metadata.row_group(0).column(SCHEMA.names.index("image"))
    content = bytearray(shard.read_bytes())
    content[metadata.data_page_offset + metadata.total_compressed_size // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"train/part-00000\.parquet is damaged"):
        list(reading.read_tables(uri, "train"))


def test_row_groups_that_unpack_to_more_than_memory_holds_are_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(InputError, match=r"train/part-00000\.parquet unpacks to more than images of a data set take"):
        reading.open_split(str(dataset), "train")
