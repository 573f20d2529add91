"""What a user sees of S3 at its worst, on a real server of the test's own: killed, back, gone, refusing."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.fs
import pyarrow.parquet
import pytest
from conftest import ROOT, S3Server
from PIL import Image

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.datasets import reading
from jobs.datasets.format import find_card, read_card
from jobs.prepare import main as prepare_main


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(uri: str, count: int) -> None:
    for number in range(count):
        storage.write_bytes(f"{uri}/{'ab'[number % 2]}/{number:05d}.png", png(number))


def prepare(source: str, output: str, num_workers: int = 2) -> Any:
    """`jobs.prepare folders` as a process of its own."""
    arguments = ["folders", "--source", source, "--output", output, "--image-size", "16"]
    arguments += ["--num-workers", str(num_workers)]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.prepare", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: Any, timeout_s: float = 400) -> tuple[int, str]:
    """Exit code and the one line of error, of a process that has to end."""
    _, err = process.communicate(timeout=timeout_s)
    progress = ("decode:", "write:", "match:", "starting Ray", "waiting for")
    lines = [line for line in err.splitlines() if not line.startswith(progress)]
    assert len(lines) <= 1, err
    return process.returncode, lines[0] if lines else ""


@pytest.mark.slow
def test_read_and_write_wait_for_a_server_that_comes_back(own_s3: S3Server, prefix: str) -> None:
    storage.write_bytes(f"{prefix}/a.txt", b"a")
    own_s3.kill()
    back = threading.Timer(3, own_s3.start)
    back.start()
    started = time.monotonic()
    assert storage.read_bytes(f"{prefix}/a.txt") == b"a"
    assert time.monotonic() - started > 2.5
    back.join()
    own_s3.kill()
    back = threading.Timer(3, own_s3.start)
    back.start()
    storage.write_bytes(f"{prefix}/b.txt", b"b")
    back.join()
    assert storage.file_sizes(prefix) == {"a.txt": 1, "b.txt": 1}


@pytest.mark.slow
def test_a_large_object_is_written_in_parts_and_whole_or_not_at_all(own_s3: S3Server, prefix: str) -> None:
    content = np.random.default_rng(0).integers(0, 256, 70_000_000, np.uint8).tobytes()
    back = threading.Timer(0.2, lambda: (own_s3.kill(), time.sleep(1), own_s3.start()))
    back.start()
    sizes: list[int] = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(0.05):
            try:
                sizes.append(storage.file_sizes(prefix).get("big", 0))
            except InputError:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    storage.write_bytes(f"{prefix}/big", content)
    watching.set()
    watcher.join()
    back.join()
    assert set(sizes) <= {0, len(content)}
    assert storage.read_bytes(f"{prefix}/big") == content


@pytest.mark.slow
def test_a_server_gone_for_good_ends_in_one_line(
    own_s3: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "OUTAGE_S", 2.0)
    storage.write_bytes(f"{prefix}/a.txt", b"a")
    deeds: list[Callable[[], Any]] = [
        lambda: storage.read_bytes(f"{prefix}/a.txt"),
        lambda: storage.write_bytes(f"{prefix}/b.txt", b"b"),
        lambda: storage.list_files(prefix),
        lambda: storage.delete_file(f"{prefix}/a.txt"),
    ]
    own_s3.kill()
    started = time.monotonic()
    try:
        for deed in deeds:
            with pytest.raises(InputError, match=r"the S3 server cannot be reached; check AWS_ENDPOINT_URL"):
                deed()
        assert 1 < time.monotonic() - started < 90  # the first waits for it, the others know
    finally:
        own_s3.start()


@pytest.mark.slow
def test_a_server_that_hangs_is_given_up_too(own_s3: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OUTAGE_S", 1.0)
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setenv("AWS_TEST_OWN_CLIENT", "1")  # another environment: a client of this test's own
    assert not storage.exists(f"{prefix}/a.txt")
    assert own_s3.process is not None
    os.kill(own_s3.process.pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{own_s3.process.pid}/task")
    while {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()} != {"T"}:
        time.sleep(0.01)  # on a busy machine a thread may still answer after the signal
    try:
        started = time.monotonic()
        with pytest.raises(InputError, match="the S3 server cannot be reached"):
            storage.read_bytes(f"{prefix}/a.txt")
        assert time.monotonic() - started < 90
    finally:
        own_s3.kill()
        own_s3.start()


@pytest.fixture
def shared(s3: S3Server) -> str:
    """A prefix on the session's server, for tests that leave it alive."""
    return f"{s3.uri}/{uuid.uuid4().hex}"


def test_an_object_that_goes_while_it_is_read(shared: str) -> None:
    storage.write_bytes(f"{shared}/a.txt", bytes(1000))  # less than the server's answer would not hold it
    fs, path = storage.filesystem(f"{shared}/a.txt")
    stream = fs.open_input_file(path)
    storage.delete_file(f"{shared}/a.txt")
    with pytest.raises(FileNotFoundError):
        storage.with_retries(f"{shared}/a.txt", stream.read)


def test_a_name_that_pyarrow_cannot_use(shared: str) -> None:
    with pytest.raises(InputError, match=r"a//b\.png: a name that cannot be used \(Empty path component"):
        storage.read_bytes(f"{shared}/a//b.png")


def test_bucket_root_and_prefix_that_is_a_file_too(s3: S3Server, shared: str) -> None:
    storage.write_bytes(f"{shared}/both", b"file")
    storage.write_bytes(f"{shared}/both/inner.txt", b"inner")
    assert storage.file_sizes(shared) == {"both": 4, "both/inner.txt": 5}
    assert storage.file_sizes(f"{shared}/both") == {"inner.txt": 5}
    assert storage.read_bytes(f"{shared}/both") == b"file"
    name = shared.removeprefix(f"{s3.uri}/")
    assert {file for file in storage.list_files(s3.uri) if file.startswith(name)} == {
        f"{name}/both",
        f"{name}/both/inner.txt",
    }
    assert storage.list_files(f"{shared}/nothing") == []


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("AWS Error UNKNOWN (HTTP status 400): Unable to parse ExceptionName: ExpiredToken", "have expired; renew"),
        ("AWS Error REQUEST_TIME_TOO_SKEWED during PutObject operation", "clock"),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation", "no such bucket"),
        ("AWS Error SLOW_DOWN during GetObject operation", "cannot be reached"),
    ],
)
def test_errors_that_this_server_never_gives(text: str, remedy: str) -> None:
    with pytest.raises(InputError, match=rf"^s3://b/x: .*{remedy}"), storage.user_errors("s3://b/x"):
        raise OSError(text)


# ------------------------------------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def many(own_s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """2,000 small images: where they are on the server, and the content hash of the data set made of them locally."""
    folder = tmp_path_factory.mktemp("many")
    uri = f"{own_s3.uri}/many"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own_s3.env.items():
            patch.setenv(name, value)
        for number in range(2000):
            name, content = f"{'ab'[number % 2]}/{number:05d}.png", png(number)
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            storage.write_bytes(f"{uri}/{name}", content)
        assert len(storage.list_files(uri)) == 2000
    assert told(prepare(str(folder), str(folder / "../many-out"), num_workers=0)) == (0, "")
    return uri, read_card(str(folder / "../many-out")).content_hash


def wait_for_decoding(process: Any) -> None:
    """Until Ray workers of this process decode images."""
    until = time.monotonic() + 400
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        if any("decode_task" in name for name in _process_names(process.pid)):
            return
        time.sleep(0.05)
    raise AssertionError("no decoding")


def _process_names(pid: int) -> list[str]:
    names = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            names += child.cmdline()
    return names


@pytest.mark.slow
def test_prepare_outlives_the_servers_death(own_s3: S3Server, many: tuple[str, str], prefix: str) -> None:
    uri, expected = many
    process = prepare(uri, prefix)
    wait_for_decoding(process)
    time.sleep(0.3)
    own_s3.kill()
    time.sleep(3)
    assert process.poll() is None
    own_s3.start()
    assert told(process) == (0, "")
    assert read_card(prefix).content_hash == expected


@pytest.mark.slow
def test_credentials_that_are_revoked_in_the_middle(
    own_s3: S3Server, many: tuple[str, str], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = prepare(many[0], prefix)
    wait_for_decoding(process)
    config = own_s3.folder / "s3.json"
    before = config.read_text()
    own_s3.kill()
    config.write_text(before.replace("rw-key", "new-key"))
    monkeypatch.setattr(own_s3, "CREDENTIALS", {**own_s3.CREDENTIALS, "rw": ("new-key", own_s3.CREDENTIALS["rw"][1])})
    own_s3.start()
    try:
        code, line = told(process)
        assert code == 2
        assert "access denied; check AWS_ACCESS_KEY_ID" in line
    finally:
        own_s3.kill()
        config.write_text(before)
        monkeypatch.undo()
        own_s3.start()
    for name, value in own_s3.env.items():
        monkeypatch.setenv(name, value)
    assert find_card(prefix) is None


def test_an_object_deleted_between_listing_and_reading(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{s3.uri}/vanishing/in"
    fill(uri, 10)
    check = storage.check_writable

    def and_delete(output: str) -> None:
        check(output)
        storage.delete_file(f"{uri}/a/00004.png")

    monkeypatch.setattr(storage, "check_writable", and_delete)
    flags = ["folders", "--source", uri, "--output", f"{s3.uri}/vanishing/out", "--image-size", "16"]
    assert prepare_main(flags) == 3
    assert sum(read_card(f"{s3.uri}/vanishing/out").splits.values()) == 9
    lines = pyarrow.parquet.read_table(io.BytesIO(storage.read_bytes(f"{s3.uri}/vanishing/out/rejected.parquet")))
    line = lines.to_pylist()[0]
    assert (line["picture"], line["reason"]) == ("a/00004.png", "the file is gone")


def test_a_whole_bucket_with_names_of_every_kind(s3: S3Server, tmp_path: Path) -> None:
    names = ["a/my photo #1.png", "a/50% + ü.png", "b/who?&me=1.png", "b/日本.png", "a/x/y.png"]
    creator = pyarrow.fs.S3FileSystem(
        endpoint_override=s3.env["AWS_ENDPOINT_URL"], region="us-east-1", allow_bucket_creation=True
    )
    creator.create_dir("whole")
    for number, name in enumerate(names):
        storage.write_bytes(f"s3://whole/{name}", png(number))
    assert prepare_main(["folders", "--source", "s3://whole", "--output", str(tmp_path / "out")]) == 0
    card = read_card(str(tmp_path / "out"))
    assert set(reading.read_index(str(tmp_path / "out"), card)) == set(names)
