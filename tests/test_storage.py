"""Files by URI: the same verbs on disk and on a real S3 server, and one line for what a user can mend."""

import contextlib
import errno
import fcntl
import hashlib
import os
import pickle
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port

from ddpm_core import storage
from ddpm_core.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of this test's own."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('s3').uri}/{uuid.uuid4().hex}"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def switch(environment: dict[str, str]) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return switch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/b/", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("/a/../b", "/b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("~/x", os.path.expanduser("~/x")),
        ("x", os.path.abspath("x")),
    ],
)
def test_absolute(given: str, expected: str) -> None:
    assert storage.absolute(given) == expected


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", "empty"),
        ("gs://b/x", "gs:// is not supported"),
        ("s3://", "no bucket"),
        ("/dev/zero", "/dev/zero is a pipe, socket or device"),
    ],
)
def test_absolute_refuses(given: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"--data.*{reason}"):
        storage.absolute(given, flag="--data")


def test_relative_paths_are_refused_in_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(InputError, match=r"--data runs/x is relative.*absolute path"):
        storage.absolute("runs/x", flag="--data")
    assert storage.absolute("/runs/x") == "/runs/x"


def test_write_read_list_delete(folder: str) -> None:
    assert storage.file_sizes(folder) == {}
    assert not storage.exists(folder)
    storage.write_bytes(f"{folder}/b/two.txt", memoryview(b"two!"))
    storage.write_bytes(f"{folder}/one.txt", b"one")
    storage.write_bytes(f"{folder}/one.txt", b"ONE")
    assert storage.read_bytes(f"{folder}/one.txt") == b"ONE"
    assert storage.file_sizes(folder) == {"b/two.txt": 4, "one.txt": 3}
    assert storage.list_files(folder, recursive=False) == ["one.txt"]
    assert storage.list_folders(folder) == ["b"]
    assert storage.exists(f"{folder}/b")
    assert storage.is_file(f"{folder}/one.txt")
    assert not storage.is_file(f"{folder}/b")
    storage.delete_file(f"{folder}/one.txt")
    storage.delete_file(f"{folder}/one.txt")  # gone already: fine
    assert storage.list_files(folder) == ["b/two.txt"]
    storage.delete_folder(folder)
    assert storage.list_files(folder) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{folder}/one.txt")


@pytest.mark.parametrize("name", ["my photo.jpg", "Ünïcode ✓.jpg", "a#b.jpg", "50%20off.jpg", "who?.jpg", "a+b&c.jpg"])
def test_names_mean_themselves(folder: str, name: str) -> None:
    storage.write_bytes(f"{folder}/{name}", name.encode())
    assert storage.list_files(folder) == [name]
    assert storage.read_bytes(f"{folder}/{name}") == name.encode()


def test_check_writable_leaves_nothing(folder: str) -> None:
    storage.check_writable(folder)
    assert storage.list_files(folder) == []


def test_failed_write_leaves_neither_file_nor_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "kept.txt").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left"):
        storage.write_bytes(str(tmp_path / "kept.txt"), b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert (tmp_path / "kept.txt").read_text() == "old"


@pytest.mark.parametrize("place", ["/proc/nothing/here", "FILE/below", "FILE"])
def test_local_places_that_take_no_files(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    uri = place.replace("FILE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=rf"^--output {uri}[: ]") as caught:
        storage.check_writable(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "endless", "loop"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    there, told = tmp_path / "x", "x is a pipe, socket or device, not a file"
    if kind == "pipe":
        os.mkfifo(there)
    elif kind == "device":
        there.symlink_to("/dev/zero")
    elif kind == "loop":
        there.symlink_to("x")
        told = r"x: a name that cannot be used \(Too many levels of symbolic links\)"
    else:
        with open(there, "w") as file:
            file.truncate(10**12)
        told = "x: too large a file, 1,000,000 MB; at most 1 MB are read"
    with pytest.raises(InputError, match=told):
        storage.read_bytes(str(there), max_bytes=10**6)


def test_a_file_that_grows_while_it_is_read_is_read_no_further(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "x").write_bytes(bytes(2000))
    sizes, check = iter([10]), storage.check_size
    monkeypatch.setattr(storage, "check_size", lambda uri, size, most: check(uri, next(sizes, size), most))
    with pytest.raises(storage.TooLargeError):
        storage.read_bytes(str(tmp_path / "x"), max_bytes=1000)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_fails_is_told(code: int) -> None:
    told = r"^x: the disk, or the network that it is on, fails \(.*\); check it$"
    with pytest.raises(InputError, match=told), storage.user_errors("x"):
        raise OSError(code, "it")


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"a":' * 10**5, b"1" * 5000, b"", b"{", b"\xff"])
def test_what_python_cannot_take_of_json_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(storage.NOT_JSON):
        storage.read_json(str(tmp_path / "x.json"))


def test_folder_read_as_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        storage.read_bytes(str(tmp_path))


def test_a_tree_as_people_have_it(tmp_path: Path) -> None:
    """What cannot be read is named with its remedy, and the rest is listed once."""
    root, outside = tmp_path / "in", tmp_path / "outside"
    for name in ("day/1.jpg", "day/sub/2.jpg", ".store/9.jpg", "@eaDir/1.jpg"):
        storage.write_bytes(str(root / name), b"four")
    storage.write_bytes(str(outside / "deep/3.jpg"), b"three")
    links = {
        "day/self": ".",
        "day/up": "../..",
        "day/sub/ring": "../../day",
        "more": str(outside),
        "again": str(outside / "deep"),
        "hidden": ".store",
        "day/link.jpg": "1.jpg",
        "day/gone.jpg": "/nowhere/x\ny.jpg",
        "day/annex.jpg": "../.git/annex/objects/a/b/c.jpg",
        "day/dvc.jpg": "/home/me/.cache/dvc/files/md5/aa/bb",
        "day/loop.jpg": "loop.jpg",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "day/pipe.jpg")
    Path(os.fsdecode(os.fsencode(root) + b"/day/caf\xe9.jpg")).write_bytes(b"")
    there = storage.tree(str(root), skip=lambda name: name[0] in ".@")
    assert {name: entry.num_bytes for name, entry in there.files.items()} == {
        "again/3.jpg": 5,
        "day/1.jpg": 4,
        "day/link.jpg": 4,
        "day/caf%E9.jpg": 0,
        "day/sub/2.jpg": 4,
        "hidden/9.jpg": 4,
    }
    assert there.files["day/link.jpg"].real == there.files["day/1.jpg"].real == str(root / "day/1.jpg")
    assert there.skipped == [".store", "@eaDir"]
    assert there.num_again == 4  # self, up, ring, and deep below more
    assert {name: reason.split(";")[0] for name, reason in there.faults.items()} == {
        "day/annex.jpg": "a link of git-annex whose content is not here",
        "day/dvc.jpg": "a link of DVC whose content is not here",
        "day/gone.jpg": "a link whose target is not there (/nowhere/x\\ny.jpg)",
        "day/loop.jpg": "a link that leads to itself",
        "day/pipe.jpg": "a pipe, socket or device, not a file",
    }
    assert storage.list_files(str(root), recursive=False) == []
    assert storage.list_folders(str(root)) == [".store", "@eaDir", "again", "day", "hidden", "more"]


def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root every folder may be: the system call is made to refuse."""
    storage.write_bytes(str(tmp_path / "in/day/1.jpg"), b"")
    storage.write_bytes(str(tmp_path / "in/locked/2.jpg"), b"")
    scandir = os.scandir

    def guarded(path: str) -> Any:
        if path.endswith("/locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    there = storage.tree(str(tmp_path / "in"))
    assert list(there.files) == ["day/1.jpg"]
    assert there.faults == {"locked/": "a folder that cannot be read (Permission denied); check its owner and mode"}
    with pytest.raises(InputError, match="/in/locked: permission denied; check the folder's owner and mode"):
        storage.tree(str(tmp_path / "in/locked"))


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    """It is read, and nothing is written there."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff")
    assert not storage.exists(path)
    storage.write_bytes(path, b"four")
    assert storage.is_file(path)
    assert storage.num_bytes(path) == 4
    assert storage.mtime_ns(path) == os.stat(path).st_mtime_ns
    for deed in (storage.delete_file, storage.check_writable):
        with pytest.raises(InputError, match=r"/bad\\xff: a name that is not valid UTF-8; rename it$"):
            deed(path)
    names = [b"a\xff/\x80\xe9.jpg", b"a%FF/%80%E9.jpg", b"\xc3\xa9.jpg", b"100%.jpg"]
    for name in names:
        storage.write_bytes(os.fsdecode(os.fsencode(tmp_path) + b"/in/" + name), name)
    there = storage.tree(str(tmp_path / "in"))
    assert {name: os.fsencode(entry.path) for name, entry in there.files.items()} == {
        "100%.jpg": b"100%.jpg",
        "a%FF/%80%E9.jpg": b"a%FF/%80%E9.jpg",
        "\u00e9.jpg": b"\xc3\xa9.jpg",
    }
    reason = "its name is not valid UTF-8, and a%FF/%80%E9.jpg is another's; rename one"
    assert there.faults == {r"a\xff/\x80\xe9.jpg": reason}
    os.unlink(tmp_path / "in/a%FF/%80%E9.jpg")
    entry = storage.tree(str(tmp_path / "in")).files["a%FF/%80%E9.jpg"]
    assert os.fsencode(entry.path) == names[0]
    assert storage.read_bytes(storage.join(str(tmp_path / "in"), entry.path)) == names[0]


def test_a_walk_gives_what_a_tree_has_in_order(tmp_path: Path) -> None:
    for name in ("a/b.jpg", "a.jpg", "a-b/c.jpg", "ab", "b/.x/1.jpg", "b/c/d.jpg", "\u00e9.jpg"):
        storage.write_bytes(str(tmp_path / name), b"four")
    storage.write_bytes(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9/1.jpg"), b"four")
    storage.write_bytes(str(tmp_path / "%E9/2.jpg"), b"four")
    items = list(storage.walk(str(tmp_path), skip=lambda name: name == ".x"))
    names = [item.name for item in items]
    assert names == sorted(names)
    assert "%E9/1.jpg" in names
    assert [item.name for item in items if item.skipped] == ["b/.x/"]
    assert {item.name: item.entry for item in items if item.entry} == storage.tree(
        str(tmp_path), skip=lambda name: name == ".x"
    ).files


def test_a_bucket_is_listed_page_by_page(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{s3.uri}/{uuid.uuid4().hex}"
    names = [f"{number % 3}/{number:02d} #%.jpg" for number in range(20)]
    for name in names:
        storage.write_bytes(f"{uri}/{name}", name.encode())
    request, pages = storage._request, []

    def few(where: str, method: str, **parameters: Any) -> Any:
        pages.append(page := request(where, method, MaxKeys=7, **parameters))
        return page

    monkeypatch.setattr(storage, "_request", few)
    found = [item.entry for item in storage.walk(uri)]
    assert [entry.path for entry in found] == sorted(names)
    assert len(pages) == 3
    (first,) = [entry for entry in found if entry.path == "0/00 #%.jpg"]
    there = storage.tree(uri).files["0/00 #%.jpg"]
    assert (first.num_bytes, first.mtime_ns // 10**9) == (there.num_bytes, there.mtime_ns // 10**9)
    assert first.etag == hashlib.md5(b"0/00 #%.jpg").hexdigest()
    assert [item.entry.path for item in storage.walk(f"{uri}/1", recursive=False)] == [
        n[2:] for n in sorted(names) if n[0] == "1"
    ]
    assert list(storage.walk(f"{uri}/none")) == []
    with pytest.raises(InputError, match="no such bucket"):
        list(storage.walk("s3://no-such-bucket/x"))


def test_what_is_called_packed_is_written_as_it_is(folder: str) -> None:
    storage.write_bytes(f"{folder}/a.gz", b"content")
    assert storage.read_bytes(f"{folder}/a.gz") == b"content"


@pytest.mark.parametrize("where", ["local", "card", "s3"])
def test_what_is_written_once_stays(where: str, request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if where == "card":
        monkeypatch.setattr(os, "link", no_links)
    uri = f"{request.getfixturevalue('s3').uri}/{uuid.uuid4().hex}" if where == "s3" else str(tmp_path / "new")
    assert storage.write_once(f"{uri}/a b", b"first")
    assert not storage.write_once(f"{uri}/a b", b"second")
    assert storage.read_bytes(f"{uri}/a b") == b"first"
    with storage.writing(f"{uri}/c") as path:
        Path(path).write_bytes(b"content")
    with contextlib.suppress(KeyError), storage.writing(f"{uri}/d") as path:
        Path(path).write_bytes(b"half")
        raise KeyError
    assert storage.list_files(uri) == ["a b", "c"]
    assert storage.read_bytes(f"{uri}/c") == b"content"


def test_s3fs_is_refused_in_the_same_words(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment("rw", secret="wrong").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="access denied; check AWS_ACCESS_KEY_ID"):
        storage.write_once(f"{s3.uri}/x", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match="cannot be reached; check AWS_ENDPOINT_URL"):
        list(storage.walk(f"{s3.uri}/x"))


def test_what_a_remote_listing_leaves_out(s3: Any) -> None:
    uri = f"{s3.uri}/{uuid.uuid4().hex}"
    for name in ("day/1.jpg", "@eaDir/day/1.jpg", "day/@eaDir/2.jpg"):
        storage.write_bytes(f"{uri}/{name}", b"four")
    there = storage.tree(uri, skip=lambda name: name == "@eaDir")
    assert {name: (entry.num_bytes, entry.real) for name, entry in there.files.items()} == {"day/1.jpg": (4, "")}
    assert (there.skipped, there.faults) == (["@eaDir", "day/@eaDir"], {})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\udce9.jpg", r"caf\xe9.jpg"),
        ("a\nb\tc\0", r"a\nb\tc\x00"),
        ("\ud800", r"\ud800"),
        ("\u2028", r"\u2028"),
        ("naïve 你好 \u3000👩‍🚀", "naïve 你好 \u3000👩‍🚀"),
    ],
)
def test_messages_are_one_printable_line(text: str, shown: str) -> None:
    assert str(InputError(text)) == shown
    shown.encode()


def test_wrong_secret_is_not_a_missing_file(s3: Any, use: Any) -> None:
    storage.write_bytes(f"{s3.uri}/secret/a.txt", b"a")
    use(s3.environment("rw", "not-the-secret"))
    for deed in (storage.read_bytes, storage.exists, storage.list_files, storage.check_writable):
        with pytest.raises(InputError, match=r"access denied; check AWS_ACCESS_KEY_ID"):
            deed(f"{s3.uri}/secret/a.txt")


def test_read_only_user_reads_and_is_told_he_cannot_write(s3: Any, use: Any) -> None:
    storage.write_bytes(f"{s3.uri}/shared/a.txt", b"a")
    use(s3.environment("ro"))
    assert storage.read_bytes(f"{s3.uri}/shared/a.txt") == b"a"
    with pytest.raises(InputError, match=rf"^--output {s3.uri}/shared: access denied"):
        storage.check_writable(f"{s3.uri}/shared")


def test_missing_bucket(s3: Any) -> None:
    assert not storage.exists("s3://no-such-bucket/x")
    with pytest.raises(InputError, match="no such bucket; create it"):
        storage.check_writable("s3://no-such-bucket/x")


def test_server_that_cannot_be_reached(s3: Any, use: Any) -> None:
    use({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    with pytest.raises(InputError, match="cannot be reached; check AWS_ENDPOINT_URL"):
        storage.exists(f"{s3.uri}/x")


def test_what_travels_to_workers_carries_no_secret(s3: Any) -> None:
    fs, _ = storage.filesystem(s3.uri)
    _, secret = s3.CREDENTIALS["rw"]
    assert secret.encode() not in pickle.dumps(fs)


def test_endpoint_without_scheme(s3: Any, use: Any) -> None:
    use({"AWS_ENDPOINT_URL": "127.0.0.1:9000"})
    with pytest.raises(InputError, match=r"AWS_ENDPOINT_URL is 127\.0\.0\.1:9000; write it with its scheme"):
        storage.exists(f"{s3.uri}/x")


def test_unknown_key(s3: Any, use: Any) -> None:
    use({**s3.environment("rw"), "AWS_ACCESS_KEY_ID": "nobody"})
    for deed in (storage.read_bytes, storage.exists, storage.list_files):
        with pytest.raises(InputError, match="access denied; check AWS_ACCESS_KEY_ID"):
            deed(f"{s3.uri}/x")


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(monkeypatch):
    """On S3 length and content are asked for one after the other."""
    whole = b'{"a": 1}\n{"a": 22}\n'
    pieces = [whole[:12], whole[7:], whole]
    monkeypatch.setattr(storage, "read_bytes", lambda uri, **limits: pieces.pop(0))
    assert storage.read_json_lines("s3://bucket/metrics.jsonl") == [{"a": 1}, {"a": 22}]
    pieces = [b"{"] * 9
    with pytest.raises(ValueError, match="Expecting"):
        storage.read_json("s3://bucket/best.json")
    assert len(pieces) == 5
    with pytest.raises(ValueError, match="Expecting"):
        storage.read_json("runs/best.json")  # a local file is whole or not there
    assert len(pieces) == 4


def test_importing_it_and_local_files_need_no_pyarrow(tmp_path: Path) -> None:
    code = (
        "import sys; from ddpm_core import storage; storage.write_bytes(sys.argv[1], b'a'); "
        "print(storage.read_bytes(sys.argv[1]), 'pyarrow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("b'a' False\n", "")


# -- names


def test_a_name_may_be_as_long_as_the_file_system_takes_it(tmp_path: Path) -> None:
    """A file is written under another name first, which must not be longer."""
    for name in ("x" * 255, "é" * 127):
        storage.write_bytes(str(tmp_path / name), b"1")
        assert (tmp_path / name).read_bytes() == b"1"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "name", ["x" * 256, "é" * 128, "a\0b", "there/below"], ids=["long", "long-utf8", "nul", "below"]
)
def test_a_name_that_cannot_be_written_is_that_files_fault(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").write_bytes(b"a file")
    with pytest.raises(storage.UnusableNameError) as error:
        storage.write_bytes(f"{tmp_path}/{name}", b"1")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_a_kill_leaves_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    monkeypatch.setattr(storage.os, "replace", lambda aside, uri: left.append(aside))
    storage.write_bytes(str(tmp_path / "x.png"), b"1")
    assert storage.is_debris(left[0])
    assert storage.is_debris(Path(left[0]).name)
    assert storage.is_debris("a/x.png.0123abcd.tmp")  # of an earlier release
    assert not any(map(storage.is_debris, ("x.png", "x.tmp", ".0123abcd", "0123456789abcdef.tmp")))


def test_what_a_kill_left_goes_with_the_next_command_and_what_is_being_written_stays(tmp_path: Path) -> None:
    left, young, locked = (tmp_path / "trials" / f".{letter * 16}.tmp" for letter in "abc")
    left.parent.mkdir()
    for path in (left, young, locked):
        path.write_bytes(b"half")
    for path in (left, locked):
        os.utime(path, (0, 0))
    (tmp_path / "kept.tmp").write_bytes(b"")
    with locked.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        storage.check_writable(str(tmp_path))
        assert {path.name for path in tmp_path.rglob("*.tmp")} == {young.name, locked.name, "kept.tmp"}
    storage.clear_debris(str(tmp_path))
    assert {path.name for path in tmp_path.rglob("*.tmp")} == {young.name, "kept.tmp"}


def test_a_file_is_locked_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the debris of another command's eyes might be what this one is about to rename."""
    seen = []

    def replace(aside: str, uri: str) -> None:
        os.utime(aside, (0, 0))
        storage.clear_debris(str(tmp_path))
        seen.append(os.path.exists(aside))

    monkeypatch.setattr(storage.os, "replace", replace)
    storage.write_bytes(str(tmp_path / "x.png"), b"1")
    assert seen == [True]
