"""Files by URI: local paths and `s3://bucket/prefix`, the same few verbs for both.

pyarrow's own S3 client is used, and s3fs for what that cannot do: a listing page by page, conditional writes. Both
read AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_ENDPOINT_URL and AWS_DEFAULT_REGION from the
environment, on every machine that touches the URI.
Only URIs travel to workers, never a file system: a pickled one carries the secret in clear.
pyarrow is imported where it is used: a `--help` needs none of it, nor does whoever reads a local file.

An S3 server that goes away during the work is waited for (OUTAGE_S) and then given up with one line; one that never
answered is given up within seconds: the endpoint is wrong.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import posixpath
import re
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
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
MAX_PARSED_BYTES = 2**28
"""Of a file of JSON: more is none of ours."""
DEBRIS = r"\.[0-9a-f]{16}\.tmp"
"""What files are called while they are written: no longer than any name may be."""
DEBRIS_AGE_S = 2.0
"""Age from which they may be taken for left behind: a younger one may not be locked yet."""
OUTAGE_S = 60.0
"""How long requests go on being repeated to a server that is down."""
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 3.0, 10.0
"""When a connection, and a transfer that does not move, count as lost. One request is tried three times."""
LONGEST_WAIT_S = 5.0
"""Longest pause between two requests to a server that is down."""
STAMPED_AT_ONCE = 32
"""Files that are looked at side by side."""


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str, *, flag: str = "path") -> str:
    """`uri` in the form that means the same on every worker: absolute for local paths, no trailing slash.

    Raises:
        InputError: empty, of an unknown scheme, or a pipe; or a relative path inside a submitted job, whose working
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
    mode = stat.S_IFDIR
    with contextlib.suppress(OSError, ValueError):  # nothing is there yet, or it is told when it is used
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{flag} {uri} is a pipe, socket or device; give a file or folder")
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
    return _s3(bucket, _environment()), path


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))


def _place(environment: tuple[tuple[str, str], ...]) -> tuple[str | None, str | None]:
    """Endpoint and region, where they are given."""
    given = dict(environment)
    endpoint = given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL")
    if endpoint and not re.match(r"https?://", endpoint):
        raise InputError(f"AWS_ENDPOINT_URL is {endpoint}; write it with its scheme: http://… or https://…")
    return endpoint or None, given.get("AWS_DEFAULT_REGION") or given.get("AWS_REGION")


@functools.lru_cache(maxsize=8)
def _s3(bucket: str, environment: tuple[tuple[str, str], ...]) -> "pyarrow.fs.FileSystem":
    """One client, and so one pool of connections, for each bucket and set of AWS_* variables."""
    import pyarrow.fs

    endpoint, region = _place(environment)
    with user_errors(f"s3://{bucket}"):
        # Not FileSystem.from_uri: its client repeats nothing but connecting, and that 25 times, 100 s if it hangs.
        return pyarrow.fs.S3FileSystem(
            endpoint_override=endpoint,
            region=region if region or endpoint else pyarrow.fs.resolve_s3_region(bucket),
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=REQUEST_TIMEOUT_S,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=3),
            allow_delayed_open=True,  # a small object is one request, not the three of an upload in parts
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
        if error.errno in _FAILING:
            why = os.strerror(error.errno)
            raise InputError(f"{uri}: the disk, or the network that it is on, fails ({why}); check it") from error
        raise
    except ValueError as error:
        if type(error).__name__ != "ArrowInvalid" and "null byte" not in str(error):
            raise
        raise UnusableNameError(
            f"{uri}: a name that cannot be used ({str(error).splitlines()[0]}); rename it"
        ) from error


_NAME_ERRORS = frozenset({errno.ENAMETOOLONG, errno.EILSEQ, errno.ELOOP})
_FAILING = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EUCLEAN, errno.EBADMSG}
)
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
            f"at most {max_bytes / 1e6:,.0f} MB are read: give a smaller one"
        )


def read_bytes(uri: str, *, first: int | None = None, max_bytes: int | None = None) -> bytes:
    """A file's content, or its `first` so many bytes. Raises FileNotFoundError where there is none, InputError where
    access fails, TooLargeError before anything is read of a file larger than `max_bytes`."""
    if not is_remote(uri):
        with user_errors(uri), open(uri, "rb", opener=_without_waiting) as file:
            there = os.fstat(file.fileno())
            if not stat.S_ISREG(there.st_mode):
                raise InputError(f"{uri} is a pipe, socket or device, not a file")
            check_size(uri, there.st_size, max_bytes)
            content = file.read(first if first is not None or max_bytes is None else max_bytes + 1)
            check_size(uri, len(content), max_bytes)  # it may have grown
            return content
    fs, path = filesystem(uri)

    def read() -> bytes:
        with fs.open_input_file(path) as stream:
            check_size(uri, stream.size(), max_bytes)
            return stream.read(first)

    return with_retries(uri, read)


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe that nobody writes to, too, and does not wait for one that does."""
    return os.open(path, flags | os.O_NONBLOCK)


def json_of(content: bytes) -> Any:
    """What JSON says.

    Raises:
        NOT_JSON: it is none, or none that Python takes: nested a thousand levels deep, numbers of thousands of digits.
    """
    try:
        return json.loads(content)
    except NOT_JSON:
        raise
    except (RecursionError, ValueError) as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


def read_json(uri: str) -> Any:
    """A JSON file's content; `read_parsed` says what it raises."""
    return read_parsed(uri, json_of)


def read_json_lines(uri: str) -> list[Any]:
    """The rows of a file with a JSON value a line; `read_parsed` says what it raises."""
    return read_parsed(uri, lambda content: [json_of(line) for line in content.splitlines() if line.strip()])


def read_parsed(uri: str, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of a file that others may be writing. From S3 it is read in two requests, length and content,
    and where it is replaced between them comes as a part of the new one: then it is read again.

    Raises:
        NOT_JSON: `parse` still does not take it.
        FileNotFoundError, InputError: as `read_bytes`.
    """
    for wait_s in AGAIN_S if is_remote(uri) else ():
        with contextlib.suppress(*NOT_JSON):
            return parse(read_bytes(uri, max_bytes=MAX_PARSED_BYTES))
        time.sleep(wait_s)
    return parse(read_bytes(uri, max_bytes=MAX_PARSED_BYTES))


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
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # tells `clear_debris` that somebody still writes
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
    with fs.open_output_stream(path, compression=None) as stream:  # by itself it packs what is called .gz
        stream.write(data)


def write_once(uri: str, data: bytes) -> bool:
    """Write a whole file that is not there yet; False: another one is there, and stays. On S3 the store decides it
    (`If-None-Match: *`), on a disk a hard link."""
    if is_remote(uri):
        key = uri.partition("://")[2].partition("/")[2]
        try:
            _request(uri, "put_object", Key=key, Body=data, IfNoneMatch="*")
        except FileExistsError:
            return read_bytes(uri) == data  # it may be ours, whose answer was lost
        return True
    aside = f"{posixpath.dirname(uri)}/.{uuid.uuid4().hex[:16]}.tmp"
    write_bytes(aside, data)
    try:
        with user_errors(uri):
            os.link(aside, uri)
        return True
    except UnusableNameError as error:
        if isinstance(error.__cause__, FileExistsError):
            return False
        raise
    except (InputError, OSError):  # a file system without hard links, such as a memory card's
        if os.path.exists(uri):
            return False
        os.replace(aside, uri)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


@contextlib.contextmanager
def writing(uri: str) -> Iterator[str]:
    """A local path to write to, bit by bit; what is there at the end becomes the file `uri`, as a whole."""
    if not is_remote(uri):
        write_bytes(aside := f"{posixpath.dirname(uri)}/.{uuid.uuid4().hex[:16]}.tmp", b"")
        try:
            with user_errors(uri):
                yield aside
                os.replace(aside, uri)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield (path := os.path.join(folder, "file"))
        with_retries(uri, lambda: _explained(lambda: _s3fs(_environment()).put_file(path, uri)))


def _request(uri: str, method: str, **parameters: Any) -> Any:
    """A request to S3 that pyarrow cannot make.

    Raises:
        FileExistsError: it was to be done only where nothing is.
        FileNotFoundError, InputError: as `with_retries`.
    """
    bucket = uri.partition("://")[2].partition("/")[0]
    result = with_retries(uri, lambda: _explained(lambda: _unless_there(bucket, method, parameters)))
    if result is _THERE:
        raise FileExistsError(uri)
    return result


_THERE = object()


def _unless_there(bucket: str, method: str, parameters: dict[str, Any]) -> Any:
    try:
        return _s3fs(_environment()).call_s3(method, Bucket=bucket, **parameters)
    except OSError as error:
        if _code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
            return _THERE
        raise


def _explained(deed: Callable[[], T]) -> T:
    """With s3fs's errors in the words that pyarrow has for them."""
    try:
        return deed()
    except Exception as error:
        code = _code(error)
        if code in ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "500", "503"):
            raise OSError(f"SERVICE_UNAVAILABLE: {error}") from error
        if code or isinstance(error, OSError):
            raise OSError(f"{code}: {error}") from error
        if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp", "asyncio", "builtins"):
            raise OSError(f"NETWORK_CONNECTION: {error}") from error
        raise


def _code(error: BaseException) -> str:
    """What S3 calls it."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


@functools.lru_cache(maxsize=8)
def _s3fs(environment: tuple[tuple[str, str], ...]) -> Any:
    """A client for what pyarrow's cannot do: pages of a listing, conditional writes, files that are sent whole."""
    import s3fs

    endpoint, region = _place(environment)
    style = {"addressing_style": "path"} if endpoint else {}
    return s3fs.S3FileSystem(
        endpoint_url=endpoint,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": REQUEST_TIMEOUT_S,
            "retries": {"max_attempts": 2},
            "s3": style,
        },
        skip_instance_cache=True,
    )


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


def stamps(uris: Sequence[str]) -> list[tuple[int, int]]:
    """Size and time of change of many files, looked at side by side; (0, 0) where one cannot be looked at."""

    def stamp(uri: str) -> tuple[int, int]:
        try:
            info = _info(uri)
        except InputError:
            return 0, 0
        return (info.num_bytes, info.mtime_ns) if info else (0, 0)

    with concurrent.futures.ThreadPoolExecutor(STAMPED_AT_ONCE) as threads:
        return list(threads.map(stamp, uris))


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
    etag: str = ""
    """What S3 tells contents apart by."""


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


class Item(NamedTuple):
    """Something below a folder, as `walk` comes to it."""

    name: str
    """`as_text` of its path below the folder."""
    path: str
    entry: Entry | None = None
    """Of a file that can be read."""
    fault: str = ""
    """Why it cannot be, with the remedy."""
    skipped: bool = False
    """The caller does not want it. Where nothing else is said it is a link, not followed, to a folder that is read
    anyway."""


def walk(uri: str, *, recursive: bool = True, skip: Callable[[str], bool] = lambda name: False) -> Iterator[Item]:
    """What lies below `uri`, one after another in the order of their names, however much it is; nothing where there is
    nothing. Links are followed, each folder is read once. `skip`: see `tree`.

    A store that sorts otherwise than S3 does keeps its own order.

    Raises:
        InputError: `uri` is a file, or may not be read.
    """
    if is_remote(uri):
        yield from items_of(_pages(uri, recursive), skip)
        return
    with user_errors(uri), contextlib.suppress(FileNotFoundError):
        yield from _Walk(uri, recursive, skip).items()


def tree(uri: str, *, recursive: bool = True, skip: Callable[[str], bool] = lambda name: False) -> Tree:
    """What lies below `uri`, all at once; nothing where there is nothing. Links are followed, each folder is read once.

    `skip` says which names of files and folders are passed over, with all below them.

    Raises:
        InputError: `uri` is a file, or may not be read.
    """
    items = items_of(_infos(uri, recursive), skip) if is_remote(uri) else walk(uri, recursive=recursive, skip=skip)
    found = Tree()
    num_again = 0
    for item in items:
        if item.entry is not None:
            found.files[item.name] = item.entry
        elif item.fault:
            found.faults[printable(item.path)] = item.fault
        elif item.skipped:
            found.skipped.append(printable(item.path))
        else:
            num_again += 1
    return dataclasses.replace(
        found, files=dict(sorted(found.files.items())), skipped=sorted({*found.skipped}), num_again=num_again
    )


def items_of(entries: Iterator[Entry], skip: Callable[[str], bool]) -> Iterator[Item]:
    """What `walk` makes of objects that are listed one after another; `skip`: see `tree`."""
    last = None
    for entry in entries:
        parts = entry.path.split("/")
        if unwanted := next((depth for depth, part in enumerate(parts, 1) if skip(part)), None):
            above = "/".join(parts[:unwanted])
            if above != last:  # what is below a folder comes together
                yield Item(above, above, skipped=True)
            last = above
        else:
            yield Item(entry.path, entry.path, entry)


def _pages(uri: str, recursive: bool) -> Iterator[Entry]:
    """The objects below a prefix, asked for a thousand at a time."""
    prefix = uri.partition("://")[2].partition("/")[2]
    prefix = f"{prefix}/" if prefix else ""
    more: dict[str, Any] = {} if recursive else {"Delimiter": "/"}
    while True:
        page = _request(uri, "list_objects_v2", Prefix=prefix, **more)
        for found in page.get("Contents", ()):
            if not found["Key"].endswith("/"):  # else what stands for an empty folder
                mtime_ns = int(found["LastModified"].timestamp() * 1000) * 1_000_000
                path = found["Key"].removeprefix(prefix)
                yield Entry(found["Size"], mtime_ns, "", path, found.get("ETag", "").strip('"'))
        if not page.get("IsTruncated"):
            return
        more["ContinuationToken"] = page["NextContinuationToken"]


def _infos(uri: str, recursive: bool) -> Iterator[Entry]:
    """As `_pages`, all at once and sooner; without their etags."""
    _, prefix = filesystem(uri)
    for info in _remote_infos(uri, recursive):
        if info.is_file:
            yield Entry(info.size or 0, info.mtime_ns or 0, "", info.path[len(prefix) :].lstrip("/"))


def _remote_infos(uri: str, recursive: bool) -> "list[pyarrow.fs.FileInfo]":
    import pyarrow.fs

    fs, path = filesystem(uri)
    selector = pyarrow.fs.FileSelector(path, recursive=recursive, allow_not_found=True)
    return with_retries(uri, lambda: fs.get_file_info(selector))


class _Walk:
    """A local folder's files, in the order of their names. Nothing is found by the name of a link that has one of its
    own."""

    def __init__(self, root: str, recursive: bool, skip: Callable[[str], bool]) -> None:
        self.root, self.recursive, self.skip = os.path.realpath(root), recursive, skip
        self.elsewhere: set[str] = set()
        """Folders that links have led to and that were read."""

    def items(self) -> Iterator[Item]:
        """Raises OSError where the root cannot be read; below it that is a fault."""
        stack = [iter(self._read([("", self.root)]))]
        while stack:
            found = next(stack[-1], None)
            if found is None:
                stack.pop()
            elif isinstance(found, Item):
                yield found
            else:
                stack.append(iter(self._read(found)))

    def _read(self, folders: list[tuple[str, str]]) -> Iterator[Item | list[tuple[str, str]]]:
        """What is in folders (path below the root, where it lies) of the same name as text: items, and folders again.
        There are several only where one's name is not valid UTF-8."""
        found: dict[str, list[tuple[str, os.DirEntry[str]]]] = {}
        for path, real in folders:
            try:
                with os.scandir(real) as entries:
                    for entry in entries:
                        below = f"{path}/{entry.name}" if path else entry.name
                        key = as_text(below) + ("/" if _is_folder(entry) else "")
                        found.setdefault(key, []).append((below, entry))
            except OSError as error:
                if not path:
                    raise
                reason = f"a folder that cannot be read ({error.strerror}); check its owner and mode"
                yield Item(f"{as_text(path)}/", f"{path}/", fault=reason)
        for key in sorted(found):
            inner = []
            for below, entry in sorted(found.pop(key), key=lambda each: each[0] != as_text(each[0])):
                if self.skip(entry.name):
                    yield Item(key, below, skipped=True)
                elif not key.endswith("/"):
                    yield self._file(below, entry)
                elif self.recursive:
                    real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                    if self._is_read_anyway(real, entry.is_symlink()):
                        yield Item(key, below)
                    else:
                        inner.append((below, real))
            if inner:
                yield inner

    def _is_read_anyway(self, real: str, linked: bool) -> bool:
        """Whether a folder has been read, is being read, or will be where it lies."""
        if f"{self.root}/".startswith(f"{real.rstrip('/')}/"):
            return True
        if real.startswith(f"{self.root}/") and not any(map(self.skip, real[len(self.root) + 1 :].split("/"))):
            return linked
        if real in self.elsewhere:
            return True
        self.elsewhere.add(real)
        return False

    def _file(self, path: str, entry: "os.DirEntry[str]") -> Item:
        name = as_text(path)
        try:
            there = entry.stat()
        except OSError as error:
            return Item(name, path, fault=_why_not(entry, error))
        if not stat.S_ISREG(there.st_mode):
            return Item(name, path, fault="a pipe, socket or device, not a file; remove it")
        if name != path and os.path.lexists(os.path.join(self.root, name)):
            return Item(name, path, fault=f"its name is not valid UTF-8, and {name} is another's; rename one")
        real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
        return Item(name, path, Entry(there.st_size, there.st_mtime_ns, real, path))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


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


def clear_debris(uri: str) -> None:
    """Delete what kills in the middle of `write_bytes` have left in a local folder and below; S3 keeps no such rest."""
    for folder, _, names in () if is_remote(uri) else os.walk(uri):
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                if is_debris(name) and time.time() - os.lstat(path).st_mtime > DEBRIS_AGE_S:
                    with open(path, "rb") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                        os.unlink(path)


def delete_file(uri: str) -> None:
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        with_retries(uri, lambda: fs.delete_file(path))


def delete_folder(uri: str) -> None:
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        with_retries(uri, lambda: fs.delete_dir(path))


def check_writable(uri: str, *, flag: str = "--output") -> None:
    """Fail now rather than after an hour of work; also clears what a kill left there (`clear_debris`).

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
        clear_debris(uri)
    except InputError as error:
        raise InputError(f"{flag} {str(error).replace(probe, uri)}") from None
    except OSError as error:
        raise InputError(f"{flag} {uri}: nothing can be written there ({error.strerror or error})") from None
