"""Rows by index from this node's disk: the order of ids, nothing lost, nothing twice, one reader a node."""

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from test_dataset_format import SIZE, card, edit_card, pixels, rows, splits

from ddpm_core.errors import InputError
from jobs.datasets import cache as datasets_cache
from jobs.datasets import format, reading, writing
from jobs.datasets.options import Encoding


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(datasets_cache.ROOT, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    writing.write_dataset(str(tmp_path / "set"), splits(), card())
    return str(tmp_path / "set")


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_read_back(cache: Path, tmp_path: Path, encoding: Encoding) -> None:
    writing.write_dataset(str(tmp_path / "set"), splits(), card(encoding=encoding))
    read = datasets_cache.load(str(tmp_path / "set"), "val")
    assert read.ids == [f"{number:05d}" for number in range(30, 40)]
    assert read.domain.tolist() == [0, 1] * 5
    assert read.has_targets
    assert len(read) == 10
    wanted = np.array([7, 0, 7, 3])
    expected = np.stack([pixels(30 + number) for number in wanted])
    tolerance = 4 if encoding == "jpeg" else 0
    np.testing.assert_allclose(read.images(wanted).astype(int), expected, atol=tolerance)
    following = np.stack([pixels(31 + number) for number in wanted])
    np.testing.assert_allclose(read.targets(wanted).astype(int), following, atol=tolerance)
    assert read.images([]).shape == (0, SIZE, SIZE, 3)
    copy = read.images([1])
    copy[:] = 0  # what is handed out is the caller's own
    assert read.images([1]).any()


@pytest.mark.parametrize("pairing", ["unpaired", "self"])
def test_unpaired_has_no_targets(cache: Path, tmp_path: Path, pairing: format.Pairing) -> None:
    writing.write_dataset(str(tmp_path), splits(paired=False), card(pairing=pairing))
    read = datasets_cache.load(str(tmp_path), "train")
    assert not read.has_targets
    with pytest.raises(ValueError, match="unpaired"):
        read.targets([0])


def test_a_image_is_kept_once_though_it_is_the_counterpart_of_others(cache: Path, dataset: str) -> None:
    datasets_cache.load(dataset, "train")
    (stored,) = cache.glob("*/images.raw")
    assert stored.stat().st_size == 31 * SIZE * SIZE * 3  # 30 rows, each the counterpart of the one before


def test_several_tables_in_any_order(cache: Path, dataset: str) -> None:
    expected = np.stack([row.image for row in rows(30)])
    filling = datasets_cache._Filling(format.read_card(dataset), "train")
    assert filling.start()
    (table,) = reading.read_tables(dataset, "train", columns=datasets_cache.COLUMNS)
    for start in (20, 0, 10):
        filling.add(table.slice(start, 10))
    filling.finish()
    read = datasets_cache.SplitArrays(filling.folder)
    assert read.ids == sorted(read.ids)
    np.testing.assert_array_equal(read.images(range(30)), expected)
    np.testing.assert_array_equal(read.domain, [row.domain for row in rows(30)])


def test_rows_that_are_missing_or_come_twice_are_told(cache: Path, dataset: str) -> None:
    (table,) = reading.read_tables(dataset, "train", columns=datasets_cache.COLUMNS)
    for wrong in (table.slice(1), pyarrow.concat_tables([table.slice(1), table.slice(1, 1)])):
        with datasets_cache._Filling(format.read_card(dataset), "train") as filling:
            assert filling.start()
            filling.add(wrong)
            with pytest.raises(InputError, match=r"29 different rows in split train, dataset.json says 30"):
                filling.finish()
    assert len(datasets_cache.load(dataset, "train")) == 30  # nothing of it stayed


def test_a_second_time_nothing_is_read(cache: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = datasets_cache.load(dataset, "train")
    monkeypatch.setattr(reading, "read_tables", lambda *_, **options: pytest.fail("read again"))
    np.testing.assert_array_equal(datasets_cache.load(dataset, "train").images(range(30)), first.images(range(30)))


@pytest.mark.parametrize("damage", ["cut", "images gone", "rows gone", "half written", "rows scrambled"])
def test_a_damaged_cache_is_made_again(cache: Path, dataset: str, damage: str) -> None:
    expected = datasets_cache.load(dataset, "train").images(range(30))
    (folder,) = (entry for entry in cache.iterdir() if entry.is_dir())
    if damage == "cut":
        os.truncate(folder / "images.raw", 100)
    elif damage == "half written":
        folder.rename(folder.with_suffix(".part"))
    elif damage == "rows scrambled":
        content = bytearray((folder / "rows.parquet").read_bytes())
        content[40:80] = bytes(40)  # in the first page of the ids; the footer is whole
        (folder / "rows.parquet").write_bytes(content)
    else:
        (folder / ("images.raw" if damage == "images gone" else "rows.parquet")).unlink()
    np.testing.assert_array_equal(datasets_cache.load(dataset, "train").images(range(30)), expected)


def _load(dataset: str, begin: object, read: object) -> None:
    datasets_cache.reading.read_tables = counted(datasets_cache.reading.read_tables, read)
    begin.wait()
    assert len(datasets_cache.load(dataset, "train")) == 30


def counted(function, read):
    def call(*args, **options):
        with read.get_lock():
            read.value += 1
        time.sleep(0.2)  # long enough for the others to arrive
        return function(*args, **options)

    return call


def test_one_of_many_processes_reads(cache: Path, dataset: str) -> None:
    context = multiprocessing.get_context("spawn")
    begin, read = context.Barrier(3), context.Value("i", 0)
    processes = [context.Process(target=_load, args=(dataset, begin, read)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert read.value == 1


@pytest.fixture
def nodes_cache() -> Path:
    """The cache that Ray's workers see, empty."""
    folder = Path(os.environ[datasets_cache.ROOT])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def test_the_nodes_that_lack_a_split_are_filled(
    ray_cluster: None, nodes_cache: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> dict[str, int]:
        return {entry.parent.name: entry.stat().st_mtime_ns for entry in nodes_cache.glob("*/rows.parquet")}

    import ray

    datasets_cache.load(dataset, "val")
    (val,) = made().items()
    here = ray.get_runtime_context().get_node_id()
    for node in ("another", here):  # as one that asks for others, and as the node itself
        with monkeypatch.context() as patch:
            patch.setattr(type(ray.get_runtime_context()), "get_node_id", lambda _, node=node: node)
            datasets_cache.spread(dataset, ("train", "val"), resource="CPU")
        filled = made()
        assert len(filled) == 2
        assert val in filled.items()
        datasets_cache.spread(dataset, ("train", "val"), resource="CPU")
        assert made() == filled
        read = datasets_cache.load(dataset, "train")
        np.testing.assert_array_equal(read.images(range(30)), np.stack([row.image for row in rows(30)]))
        np.testing.assert_array_equal(read.targets(range(30)), np.stack([row.target for row in rows(30)]))
        (train,) = (entry for entry in nodes_cache.iterdir() if entry.name.endswith("-train"))
        shutil.rmtree(train)


def test_a_shard_damaged_behind_its_footer_is_named(
    ray_cluster: None, nodes_cache: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    shard = Path(dataset) / "train" / "part-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[4:-2000] = bytes(len(content) - 2004)
    shard.write_bytes(content)
    named = r"train/part-00000\.parquet is damaged .*make the data set again"
    with pytest.raises(InputError, match=named):
        datasets_cache.spread(dataset, ("train",), resource="CPU")
    monkeypatch.setattr(type(ray.get_runtime_context()), "get_node_id", lambda _: "another")
    with pytest.raises(InputError, match=named):
        datasets_cache.spread(dataset, ("train",), resource="CPU")
    assert not list(nodes_cache.glob("*/rows.parquet"))


def test_a_data_set_replaced_while_it_is_read_is_not_kept(cache: Path, dataset: str) -> None:
    """File by file, each as large as it was: part of what is read may be of another data set."""
    card = Path(dataset, "dataset.json")

    def replaced(_: int) -> None:
        card.write_text(card.read_text().replace(format.read_card(dataset).content_hash, "0" * 32))

    with pytest.raises(InputError, match=r"was replaced or appended to since this run began .* now 0000"):
        datasets_cache.load(dataset, "train", on_rows=replaced)
    assert not list(cache.glob("*/rows.parquet"))


def test_room_is_made_by_what_was_longest_unused(
    cache: Path, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val", "test"):
        datasets_cache.load(dataset, split)
    entries = {entry.name.split("-")[-1]: entry for entry in cache.iterdir() if entry.is_dir()}
    now = time.time()
    for split, age_s in {"train": 100, "val": 8 * 24 * 3600, "test": 10}.items():
        os.utime(entries[split], (now - age_s, now - age_s))
    datasets_cache.make_room(0)
    assert {split for split, entry in entries.items() if entry.exists()} == {"train", "test"}  # a week is too long

    def usage(path: Path) -> object:
        free = 1000 if entries["train"].exists() else 2000
        return dataclasses.make_dataclass("Usage", ["free"])(free)

    monkeypatch.setattr(datasets_cache.shutil, "disk_usage", usage)
    datasets_cache.make_room(1500)
    assert [split for split, entry in entries.items() if entry.exists()] == ["test"]
    with pytest.raises(InputError, match=r"0\.0 GB of decoded images do not fit \(0\.0 GB free\); set DDPM_TRANS"):
        datasets_cache.make_room(10_000)


def test_the_cache_must_be_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(datasets_cache.ROOT, str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot be made .*; set DDPM_TRANSLATE_CACHE to a folder on a local disk"):
        datasets_cache.cache_folder()
    monkeypatch.setenv(datasets_cache.ROOT, str(tmp_path))
    monkeypatch.setattr(datasets_cache.os, "getuid", lambda: 12345)
    with pytest.raises(InputError, match="belongs to another user"):
        datasets_cache.cache_folder()


def test_what_the_disk_refuses_is_told_with_the_remedy(
    cache: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = r"decoded images cannot be kept there \({}\); set DDPM_TRANSLATE_CACHE to a folder of your own"
    (table,) = reading.read_tables(dataset, "train", columns=datasets_cache.COLUMNS)
    with datasets_cache._Filling(format.read_card(dataset), "train") as filling:
        assert filling.start()
        filling.images = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed by finish
        with pytest.raises(InputError, match=remedy.format("No space left on device")):
            filling.add(table)

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")  # folders of some network file systems

    monkeypatch.setattr(datasets_cache.fcntl, "flock", unsupported)
    with pytest.raises(InputError, match=remedy.format("No locks available")):
        datasets_cache.load(dataset, "val")
    shutil.rmtree(cache)
    cache.mkdir()
    monkeypatch.setattr(datasets_cache, "cache_folder", lambda: cache / "gone")
    with pytest.raises(InputError, match=remedy.format("No such file or directory")):
        datasets_cache.load(dataset, "val")


def test_nothing_half_written_stays(cache: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*_: object, **options: object) -> Iterator[pyarrow.Table]:
        assert list(cache.glob("*.part"))
        raise InputError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_tables", cut_off)
        with pytest.raises(InputError, match="the server is gone"):
            datasets_cache.load(dataset, "train")
    assert not list(cache.glob("*.part"))
    killed, busy = cache / "1-other-train.part", cache / "1-busy-train.part"
    for folder in (killed, busy):
        folder.mkdir()
    with open(busy.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        datasets_cache.load(dataset, "val")
        assert (killed.exists(), busy.exists()) == (False, True)


def test_data_that_changed_under_a_run_are_refused(cache: Path, dataset: str) -> None:
    there = format.read_card(dataset).content_hash
    assert len(datasets_cache.load(dataset, "train", content_hash=there)) == 30
    with pytest.raises(InputError, match="was replaced or appended to since this run began"):
        datasets_cache.load(dataset, "train", content_hash="another")


def test_unknown_split_and_damage_are_told(cache: Path, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows in split 'tset'; it has train, val, test"):
        datasets_cache.load(dataset, "tset")
    uri = edit_card(Path(dataset), tmp_path / "other", encoding="png", content_hash="other")  # raw bytes are no PNG
    with pytest.raises(InputError, match="row 00030: not an image"):
        datasets_cache.load(uri, "val")
