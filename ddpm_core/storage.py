"""Files by URI: local paths and `s3://bucket/prefix`, the same few verbs for both.

pyarrow's own S3 client is used; it reads AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_ENDPOINT_URL and AWS_DEFAULT_REGION from the environment, on every machine that touches the URI.
Only URIs travel to workers, never a file system: a pickled one carries the secret in clear.
pyarrow is imported where it is used: a `--help` needs none of it, nor does whoever reads a local file.

An S3 server that goes away during the work is waited for (OUTAGE_S) and then given up with one line; one that never
answered is given up within seconds: the endpoint is wrong.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import posixpath
import re
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ddpm_core.errors import InputError, printable

if TYPE_CHECKING:
    import pyarrow.fs

T = TypeVar("T")

NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)
"""What a damaged JSON file raises; ValueError would take in InputError."""
AGAIN_S = (0.05, 0.2, 1.0)
"""Waits before a file that made no sense is read again."""
DEBRIS = r"\.[0-9a-f]{16}\.tmp"
"""What files are called while they are written: no longer than any name may be."""
OUTAGE_S = 60.0
"""How long requests go on being repeated to a server that is down."""
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 3.0, 10.0
"""When a connection, and a transfer that does not move, count as lost. One request is tried three times."""
LONGEST_WAIT_S = 5.0
"""Longest pause between two requests to a server that is down."""


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str, *, flag: str = "path") -> str:
    """`uri` in the form that means the same on every worker: absolute for local paths, no trailing slash.

    Raises:
        InputError: empty or of an unknown scheme; or a relative path inside a submitted job, whose working
            directory is a temporary copy that is thrown away.
    """
    if not uri:
        raise InputError(f"{flag} is empty; give a folder or an s3:// URI")
    scheme = re.match(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://", uri)
    if scheme and scheme[1] == "file":
        uri = uri[len("file://") :]
    elif scheme:
        if scheme[1] != "s3":
            raise InputError(
                f"{flag} {uri}: scheme {scheme[1]}:// is not supported; use a folder or s3://bucket/prefix"
            )
        bucket, _, key = uri[len("s3://") :].partition("/")
        if not bucket:
            raise InputError(f"{flag} {uri}: no bucket; write s3://bucket/prefix")
        return f"s3://{bucket}/{posixpath.normpath(key)}" if key.strip("/") else f"s3://{bucket}"
    path = Path(uri).expanduser()
    if not path.is_absolute() and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise InputError(
            f"{flag} {uri} is relative, and a submitted job runs in a temporary copy of the working directory: "
            "give an absolute path on storage that all nodes share, or an s3:// URI"
        )
    return str(Path(os.path.abspath(path)))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> "tuple[pyarrow.fs.FileSystem, str]":
    """pyarrow's file system for `uri` and the path within it."""
    if not is_remote(uri):
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), uri
    # Only the bucket is parsed as a URI: in a key, spaces, # and % mean themselves.
    path = uri.partition("://")[2]
    bucket = path.partition("/")[0]
    return _s3(bucket, tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))), path


@functools.lru_cache(maxsize=8)
def _s3(bucket: str, environment: tuple[tuple[str, str], ...]) -> "pyarrow.fs.FileSystem":
    """One client, and so one pool of connections, for each bucket and set of AWS_* variables."""
    import pyarrow.fs

    given = dict(environment)
    endpoint = given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL")
    if endpoint and not re.match(r"https?://", endpoint):
        raise InputError(f"AWS_ENDPOINT_URL is {endpoint}; write it with its scheme: http://… or https://…")
    region = given.get("AWS_DEFAULT_REGION") or given.get("AWS_REGION")
    with user_errors(f"s3://{bucket}"):
        # Not FileSystem.from_uri: its client repeats nothing but connecting, and that 25 times, 100 s if it hangs.
        return pyarrow.fs.S3FileSystem(
            endpoint_override=endpoint,
            region=region if region or endpoint else pyarrow.fs.resolve_s3_region(bucket),
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=REQUEST_TIMEOUT_S,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=3),
        )


class UnusableNameError(InputError):
    """A name that the store or the file system does not take: one file's fault, not the store's."""


@contextlib.contextmanager
def user_errors(uri: str) -> Iterator[None]:
    """Turn the storage errors that a user can mend into one line; let the others pass.

    FileNotFoundError passes too: only the caller knows what a missing file means.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except UnicodeError as error:
        raise UnusableNameError(f"{uri}: a name that is not valid UTF-8; rename it") from error
    except PermissionError as error:
        raise InputError(f"{uri}: permission denied; check the folder's owner and mode") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise UnusableNameError(f"{uri}: a part of this path is a file, not a folder") from error
    except IsADirectoryError as error:
        raise UnusableNameError(f"{uri} is a folder; a file is expected") from error
    except OSError as error:
        text = str(error)
        if error.errno in _NAME_ERRORS or re.search(_NAME_REFUSED, text):
            why = os.strerror(error.errno) if error.errno else "the store refuses the key"
            raise UnusableNameError(f"{uri}: a name that cannot be used ({why}); rename it") from error
        if re.search(_GONE, text):
            raise FileNotFoundError(f"{uri}: {text}") from error
        for pattern, remedy in _REMEDIES:
            if re.search(pattern, text):
                raise InputError(f"{uri}: {remedy}") from error
        raise
    except ValueError as error:
        if type(error).__name__ != "ArrowInvalid" and "null byte" not in str(error):
            raise
        raise UnusableNameError(
            f"{uri}: a name that cannot be used ({str(error).splitlines()[0]}); rename it"
        ) from error


_NAME_ERRORS = frozenset({errno.ENAMETOOLONG, errno.EILSEQ})
_NAME_REFUSED = r"(?i)key_?too_?long"
_PASSING = (
    r"NETWORK_CONNECTION|curlCode|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|REQUEST_TIMEOUT|HTTP status 50\d"
)
_GONE = r"RESOURCE_NOT_FOUND|NO_SUCH_KEY|NO_SUCH_UPLOAD"
_REMEDIES = (
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|Bucket .* not found|bucket does not exist",
        "no such bucket; create it first",
    ),
    (
        r"(?i)expired_?token|token_?expired|token has expired",
        "the credentials have expired; renew AWS_SESSION_TOKEN and the keys, then give the same command again",
    ),
    (
        r"(?i)request_?time_?too_?skewed",
        "the store refuses this machine's clock; set the clock",
    ),
    (
        r"(?i)access_?denied|HTTP response code 403|invalid_?access_?key|signature_?(does|mismatch|invalid)",
        "access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
    ),
    (
        _PASSING,
        "the S3 server cannot be reached; check AWS_ENDPOINT_URL (with its http:// or https://) and the network",
    ),
    (r"path .* is a directory", "it is a folder; a file is expected"),
    (r"No space left|quota exceeded", "no space left on the device; free some or write elsewhere"),
    (r"File too large", "larger than a file may be there (ulimit -f says how large); write elsewhere"),
    (r"Read-only file system", "the file system is read-only; write elsewhere"),
)
_answered: set[str] = set()
"""Endpoints that this process has had an answer from."""
_down_since: dict[str, float] = {}
"""When an endpoint began not to answer: many threads that wait for it give up together, not one after another."""


def with_retries(uri: str, deed: Callable[[], T]) -> T:
    """What `deed` gives, a request to the store of `uri`; repeated while the server is down, its errors explained.

    `deed` must be one that may be done twice.

    Raises:
        FileNotFoundError: nothing is there.
        InputError: the store refuses, or has been down for OUTAGE_S (or, if it never answered, some seconds).
    """
    with user_errors(uri):
        if not is_remote(uri):
            return deed()
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        wait_s = 0.25
        while True:
            begun = time.monotonic()
            try:
                result = deed()
                _answered.add(endpoint)
                _down_since.pop(endpoint, None)
                return result
            except OSError as error:
                if not re.search(_PASSING, str(error)):
                    raise
                since = _down_since.setdefault(endpoint, begun)
                worth_it = endpoint in _answered or _in_ray_worker()
                if not worth_it or time.monotonic() + wait_s > since + OUTAGE_S:
                    raise
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _in_ray_worker() -> bool:
    """Whether a driver, which has seen the store answer, gave this process its work."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def local_size(uri: str) -> int:
    """Size of a local file; 0 where there is none, and for a remote one, whose store would have to be asked."""
    with contextlib.suppress(OSError, ValueError):
        return 0 if is_remote(uri) else os.path.getsize(uri)
    return 0


class TooLargeError(InputError):
    """A file larger than what is read of its kind: one file's fault, not the store's."""


def check_size(uri: str, num_bytes: int, max_bytes: int | None) -> None:
    """Raises TooLargeError where a file has more bytes than are read."""
    if max_bytes is not None and num_bytes > max_bytes:
        raise TooLargeError(
            f"{uri}: too large a file, {num_bytes / 1e6:,.0f} MB; "
            f"at most {max_bytes / 1e6:,.0f} MB are read: scale it down"
        )


def read_bytes(uri: str, *, first: int | None = None, max_bytes: int | None = None) -> bytes:
    """A file's content, or its `first` so many bytes. Raises FileNotFoundError where there is none, InputError where
    access fails, TooLargeError before anything is read of a file larger than `max_bytes`."""
    if not is_remote(uri):
        with user_errors(uri), open(uri, "rb") as file:
            check_size(uri, os.fstat(file.fileno()).st_size, max_bytes)
            return file.read(first)
    fs, path = filesystem(uri)

    def read() -> bytes:
        with fs.open_input_file(path) as stream:
            check_size(uri, stream.size(), max_bytes)
            return stream.read(first)

    return with_retries(uri, read)


def read_json(uri: str) -> Any:
    """A JSON file's content; `read_parsed` says what it raises."""
    return read_parsed(uri, json.loads)


def read_json_lines(uri: str) -> list[Any]:
    """The rows of a file with a JSON value a line; `read_parsed` says what it raises."""
    return read_parsed(uri, lambda content: [json.loads(line) for line in content.splitlines() if line.strip()])


def read_parsed(uri: str, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of a file that others may be writing. From S3 it is read in two requests, length and content,
    and where it is replaced between them comes as a part of the new one: then it is read again.

    Raises:
        NOT_JSON: `parse` still does not take it.
        FileNotFoundError, InputError: as `read_bytes`.
    """
    for wait_s in AGAIN_S if is_remote(uri) else ():
        with contextlib.suppress(*NOT_JSON):
            return parse(read_bytes(uri))
        time.sleep(wait_s)
    return parse(read_bytes(uri))


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a whole file or nothing: a local file is written aside and renamed, an S3 object appears when complete."""
    if is_remote(uri):
        fs, path = filesystem(uri)
        return with_retries(uri, lambda: _put(fs, path, data))
    with user_errors(uri):
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        aside = os.path.join(os.path.dirname(uri), f".{uuid.uuid4().hex[:16]}.tmp")
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, uri)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            if isinstance(error, FileNotFoundError):  # its folder is there: a file system that takes no files
                raise InputError(f"{uri}: nothing can be written there ({error.strerror})") from None
            raise


def _put(fs: "pyarrow.fs.FileSystem", path: str, data: bytes | memoryview) -> None:
    # All in one call: a stream that an exception leaves between two calls publishes what it has.
    with fs.open_output_stream(path) as stream:
        stream.write(data)


def num_bytes(uri: str) -> int:
    """Size of a file.

    Raises:
        FileNotFoundError: nothing is there.
        InputError: something else is, whose reading may never end: a folder, a pipe, a device.
    """
    info = _info(uri)
    if info is None:
        raise FileNotFoundError(uri)
    if not info.is_file:
        raise InputError(f"{uri} is not a file")
    return info.num_bytes


def mtime_ns(uri: str) -> int:
    """When a file was changed last, in nanoseconds; 0 where that is not known."""
    info = _info(uri)
    return info.mtime_ns if info else 0


def exists(uri: str) -> bool:
    return _info(uri) is not None


def is_file(uri: str) -> bool:
    info = _info(uri)
    return info is not None and info.is_file


class _Info(NamedTuple):
    """What is at a URI."""

    is_file: bool
    num_bytes: int
    mtime_ns: int


def _info(uri: str) -> _Info | None:
    """None where there is nothing."""
    if not is_remote(uri):
        with contextlib.suppress(FileNotFoundError), user_errors(uri):
            try:
                there = os.stat(uri)  # not by pyarrow, which takes no names that are not UTF-8
            except NotADirectoryError:
                return None
            return _Info(stat.S_ISREG(there.st_mode), there.st_size, there.st_mtime_ns)
        return None
    fs, path = filesystem(uri)
    info = with_retries(uri, lambda: fs.get_file_info(path))
    return None if info.type.name == "NotFound" else _Info(info.is_file, info.size or 0, info.mtime_ns or 0)


class Entry(NamedTuple):
    """A file, as its folder's listing tells of it."""

    num_bytes: int
    mtime_ns: int
    real: str
    """Where it lies once links are followed; "" on S3, which has none."""
    path: str
    """Below the folder, as the file system has it; `as_text` of it is the file's name everywhere else."""


def as_text(path: str) -> str:
    """A path as valid Unicode: bytes that are no UTF-8, which Python holds as U+DC80 to U+DCFF, become %80 to %FF."""
    return re.sub(r"[\ud800-\udfff]", lambda byte: f"%{ord(byte[0]) & 0xFF:02X}", path)


@dataclasses.dataclass(frozen=True)
class Tree:
    """What lies below a folder; paths are relative to it."""

    files: dict[str, Entry] = dataclasses.field(default_factory=dict)
    """By `as_text` of their paths, sorted."""
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    """What is there and cannot be read, with the reason and the remedy: dangling links, pipes, folders that may not be
    entered (with a slash at the end); names as they are printed."""
    skipped: list[str] = dataclasses.field(default_factory=list)
    """Files and folders that the caller did not want."""
    num_again: int = 0
    """Links, not followed, to folders that are read anyway or that lie around this one."""


def tree(uri: str, *, recursive: bool = True, skip: Callable[[str], bool] = lambda name: False) -> Tree:
    """What lies below `uri`; nothing where there is nothing. Links are followed, each folder is read once.

    `skip` says which names of files and folders are passed over, with all below them.

    Raises:
        InputError: `uri` is a file, or may not be read.
    """
    if is_remote(uri):
        return _remote_tree(uri, recursive, skip)
    with user_errors(uri), contextlib.suppress(FileNotFoundError):
        return _Walk(uri, recursive, skip).tree()
    return Tree()


def _remote_tree(uri: str, recursive: bool, skip: Callable[[str], bool]) -> Tree:
    files, skipped = {}, set()
    _, prefix = filesystem(uri)
    for info in _remote_infos(uri, recursive):
        path = info.path[len(prefix) :].lstrip("/")
        parts = path.split("/")
        unwanted = [depth for depth, part in enumerate(parts, 1) if skip(part)]
        if unwanted:
            skipped.add("/".join(parts[: unwanted[0]]))
        elif info.is_file:
            files[path] = Entry(info.size or 0, info.mtime_ns or 0, "", path)
    return Tree(dict(sorted(files.items())), skipped=sorted(skipped))


def _remote_infos(uri: str, recursive: bool) -> "list[pyarrow.fs.FileInfo]":
    import pyarrow.fs

    fs, path = filesystem(uri)
    selector = pyarrow.fs.FileSelector(path, recursive=recursive, allow_not_found=True)
    return with_retries(uri, lambda: fs.get_file_info(selector))


class _Walk:
    """A local folder's tree. What lies there itself is read before what links lead to: nothing is found by the name
    of a link that has one of its own."""

    def __init__(self, root: str, recursive: bool, skip: Callable[[str], bool]) -> None:
        self.root, self.recursive, self.skip = os.path.realpath(root), recursive, skip
        self.seen: set[str] = set()
        """Folders that were read, by where they lie."""
        self.folders: list[tuple[str, str]] = []
        """Those to be read: path below the root, and where it lies."""
        self.links: list[tuple[str, str]] = []
        self.files: dict[str, Entry] = {}
        self.faults: dict[str, str] = {}
        self.skipped: list[str] = []
        self.num_again = 0

    def tree(self) -> Tree:
        """Raises OSError where the root cannot be read; below it that is a fault."""
        self._read("", self.root)
        while self.folders or self.links:
            if not self.folders:
                self.links.sort(reverse=True)
            path, real = (self.folders or self.links).pop()
            if real in self.seen or f"{self.root}/".startswith(f"{real.rstrip('/')}/"):
                self.num_again += 1
                continue
            try:
                self._read(path, real)
            except OSError as error:
                self._fault(f"{path}/", f"a folder that cannot be read ({error.strerror}); check its owner and mode")
        skipped = [printable(path) for path in sorted(self.skipped)]
        return Tree(dict(sorted(self._named().items())), dict(sorted(self.faults.items())), skipped, self.num_again)

    def _named(self) -> dict[str, Entry]:
        """The files by their paths as text; whose text is another's own path is a fault."""
        odd = [path for path in self.files if as_text(path) != path]
        entries = {path: self.files.pop(path) for path in sorted(odd)}
        for path, entry in entries.items():
            if self.files.setdefault(as_text(path), entry) is not entry:
                self._fault(path, f"its name is not valid UTF-8, and {as_text(path)} is another's; rename one")
        return self.files

    def _read(self, folder: str, real: str) -> None:
        self.seen.add(real)
        with os.scandir(real) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if self.skip(entry.name):
                    self.skipped.append(path)
                    continue
                try:
                    self._take(path, entry)
                except OSError as error:
                    self._fault(path, _why_not(entry, error))

    def _take(self, path: str, entry: "os.DirEntry[str]") -> None:
        there, linked = entry.stat(), entry.is_symlink()
        real = os.path.realpath(entry.path) if linked else entry.path
        if stat.S_ISDIR(there.st_mode):
            if self.recursive:
                (self.links if linked else self.folders).append((path, real))
        elif not stat.S_ISREG(there.st_mode):
            self._fault(path, "a pipe, socket or device, not a file; remove it")
        else:
            self.files[path] = Entry(there.st_size, there.st_mtime_ns, real, path)

    def _fault(self, path: str, reason: str) -> None:
        self.faults[printable(path)] = reason


def _why_not(entry: "os.DirEntry[str]", error: OSError) -> str:
    """Why something in a folder cannot be looked at."""
    if error.errno == errno.ELOOP:
        return "a link that leads to itself; remove it"
    if not isinstance(error, FileNotFoundError) or not entry.is_symlink():
        return f"cannot be read ({error.strerror}); check its owner and mode"
    target = os.readlink(entry.path)
    if "/annex/objects/" in target:
        return "a link of git-annex whose content is not here; git annex get brings it"
    if re.search(r"/(\.dvc|dvc)/|/files/md5/", target):
        return "a link of DVC whose content is not here; dvc pull brings it"
    return f"a link whose target is not there ({printable(target)}); bring it back or remove the link"


def list_files(uri: str, *, recursive: bool = True) -> list[str]:
    """Paths below `uri`, relative to it, sorted; without `Tree.faults`. [] where there is nothing."""
    return list(tree(uri, recursive=recursive).files)


def file_sizes(uri: str, *, recursive: bool = True) -> dict[str, int]:
    """Size in bytes of each of `list_files`."""
    return {path: entry.num_bytes for path, entry in tree(uri, recursive=recursive).files.items()}


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below `uri`, sorted."""
    if is_remote(uri):
        return sorted(posixpath.basename(info.path) for info in _remote_infos(uri, False) if not info.is_file)
    with user_errors(uri), contextlib.suppress(FileNotFoundError), os.scandir(uri) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())
    return []


def is_debris(name: str) -> bool:
    """Whether a file is what a kill in the middle of `write_bytes` leaves."""
    return re.search(rf"(^|/){DEBRIS}$|\.[0-9a-f]{{8}}\.tmp$", name) is not None  # the second: releases before this one


def delete_file(uri: str) -> None:
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        with_retries(uri, lambda: fs.delete_file(path))


def delete_folder(uri: str) -> None:
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        with_retries(uri, lambda: fs.delete_dir(path))


def check_writable(uri: str, *, flag: str = "--output") -> None:
    """Fail now rather than after an hour of work.

    Raises:
        InputError: nothing can be written under `uri`.
    """
    probe = join(uri, f".write-probe-{uuid.uuid4().hex[:8]}")
    try:
        with user_errors(uri):
            uri.encode()  # pyarrow takes no other names
        write_bytes(probe, b"")
        fs, path = filesystem(probe)
        with contextlib.suppress(FileNotFoundError):
            fs.delete_file(path)
    except InputError as error:
        raise InputError(f"{flag} {str(error).replace(probe, uri)}") from None
    except OSError as error:
        raise InputError(f"{flag} {uri}: nothing can be written there ({error.strerror or error})") from None
