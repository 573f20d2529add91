"""Files by URI: local paths and `s3://bucket/prefix`, the same few verbs for both.

pyarrow's own S3 client is used; it reads AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_ENDPOINT_URL and AWS_DEFAULT_REGION from the environment, on every machine that touches the URI.
Only URIs travel to workers, never a file system: a pickled one carries the secret in clear.
"""

import contextlib
import functools
import os
import posixpath
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs

from ddpm_core.errors import InputError


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


def filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """pyarrow's file system for `uri` and the path within it."""
    if not is_remote(uri):
        return pyarrow.fs.LocalFileSystem(), uri
    # Only the bucket is parsed as a URI: in a key, spaces, # and % mean themselves.
    path = uri.partition("://")[2]
    bucket = path.partition("/")[0]
    return _s3(bucket, tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))), path


@functools.lru_cache(maxsize=8)
def _s3(bucket: str, environment: tuple[tuple[str, str], ...]) -> pyarrow.fs.FileSystem:
    """One client, and so one pool of connections, for each bucket and set of AWS_* variables."""
    with explained(f"s3://{bucket}"):
        return pyarrow.fs.FileSystem.from_uri(f"s3://{bucket}")[0]


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn the storage errors that a user can mend into one line; let the others pass.

    FileNotFoundError passes too: only the caller knows what a missing file means.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{uri}: a file name there is not valid UTF-8; rename that file") from error
    except PermissionError as error:
        raise InputError(f"{uri}: permission denied; check the folder's owner and mode") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{uri}: a part of this path is a file, not a folder") from error
    except IsADirectoryError as error:
        raise InputError(f"{uri} is a folder; a file is expected") from error
    except OSError as error:
        text = str(error)
        for pattern, remedy in _REMEDIES:
            if re.search(pattern, text):
                raise InputError(f"{uri}: {remedy}") from error
        raise


READ_WAITS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Pauses between attempts to read an object whose transfer broke off: S3's client retries requests, not bodies."""
_PASSING = r"INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|REQUEST_TIMEOUT"
_REMEDIES = (
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|Bucket .* not found|bucket does not exist",
        "no such bucket; create it first",
    ),
    (
        r"(?i)access_?denied|HTTP response code 403|invalid_?access_?key|signature_?(does|mismatch|invalid)",
        "access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
    ),
    (
        r"NETWORK_CONNECTION|curlCode|Couldn't connect|Could not connect|resolve host",
        "the S3 server cannot be reached; check AWS_ENDPOINT_URL (with its http:// or https://) and the network",
    ),
    (r"path .* is a directory", "it is a folder; a file is expected"),
    (r"No space left", "no space left on the device; free some or write elsewhere"),
    (r"Read-only file system", "the file system is read-only; write elsewhere"),
)


def read_bytes(uri: str) -> bytes:
    """A file's content. Raises FileNotFoundError where there is none, InputError where access fails."""
    fs, path = filesystem(uri)
    for wait_s in (*READ_WAITS_S, None):
        try:
            with explained(uri), fs.open_input_file(path) as stream:
                return stream.read()
        except OSError as error:
            if wait_s is None or not re.search(_PASSING, str(error)):
                raise
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a whole file or nothing: a local file is written aside and renamed, an S3 object is put in one piece."""
    fs, path = filesystem(uri)
    with explained(uri):
        if is_remote(uri):
            with fs.open_output_stream(path) as stream:
                stream.write(data)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        aside = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            if isinstance(error, FileNotFoundError):  # its folder is there: a file system that takes no files
                raise InputError(f"{uri}: nothing can be written there ({error.strerror})") from None
            raise


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    with explained(uri):
        return fs.get_file_info(path).type != pyarrow.fs.FileType.NotFound


def is_file(uri: str) -> bool:
    fs, path = filesystem(uri)
    with explained(uri):
        return fs.get_file_info(path).type == pyarrow.fs.FileType.File


def list_files(uri: str, *, recursive: bool = True) -> list[str]:
    """Paths below `uri`, relative to it, sorted. [] where there is nothing."""
    return list(file_sizes(uri, recursive=recursive))


def file_sizes(uri: str, *, recursive: bool = True) -> dict[str, int]:
    """Size in bytes of each file below `uri`, by its path relative to it, sorted. {} where there is nothing."""
    fs, path = filesystem(uri)
    with explained(uri):
        infos = fs.get_file_info(pyarrow.fs.FileSelector(path, recursive=recursive, allow_not_found=True))
        files = [info for info in infos if info.type == pyarrow.fs.FileType.File]
        return dict(sorted((info.path[len(path) :].lstrip("/"), info.size) for info in files))


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below `uri`, sorted."""
    fs, path = filesystem(uri)
    with explained(uri):
        infos = fs.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == pyarrow.fs.FileType.Directory)


def delete_file(uri: str) -> None:
    fs, path = filesystem(uri)
    with explained(uri), contextlib.suppress(FileNotFoundError):
        fs.delete_file(path)


def delete_folder(uri: str) -> None:
    fs, path = filesystem(uri)
    with explained(uri), contextlib.suppress(FileNotFoundError):
        fs.delete_dir(path)


def rename_folder(source: str, target: str) -> None:
    """Local folders only: atomic on one file system."""
    with explained(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)


def check_writable(uri: str, *, flag: str = "--output") -> None:
    """Fail now rather than after an hour of work.

    Raises:
        InputError: nothing can be written under `uri`.
    """
    probe = join(uri, f".write-probe-{uuid.uuid4().hex[:8]}")
    try:
        write_bytes(probe, b"")
        fs, path = filesystem(probe)
        with contextlib.suppress(FileNotFoundError):
            fs.delete_file(path)
    except InputError as error:
        raise InputError(f"{flag} {str(error).replace(probe, uri)}") from None
    except OSError as error:
        raise InputError(f"{flag} {uri}: nothing can be written there ({error.strerror or error})") from None
