"""What images say of how they were made, told in lines."""

import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ddpm_core import images, keyed_mark, marks, storage
from ddpm_core.errors import InputError, printable
from jobs.common import cli
from jobs.verification.options import VerifyArgs


def run(options: VerifyArgs) -> int:
    """Tell what each image says; the exit code.

    Raises:
        InputError: there is no such file, or none that is an image.
    """
    key = keyed_mark.read_key(options.mark_key, flag="--mark-key")
    roots = [storage.absolute(uri, flag="URI") for uri in options.uris]
    if not roots:
        raise InputError("no image is named; give files, folders or s3:// prefixes")
    counts: Counter[str] = Counter()
    for name, read in itertools.chain.from_iterable(map(below, roots)):
        row = look(name, read, key)
        print(json.dumps(row) if options.json else line(row), flush=True)
        counts.update(["images", *(name for name in ("generated", "marked", "error") if row[name])])
    if not options.json and counts["images"] > 1:
        parts = [f"{counts['generated']:,} say that they were generated"]
        parts += [f"{counts['marked']:,} have the mark"] if key else []
        print(f"{counts['images']:,} images: {', '.join(parts)}")
    if counts["error"]:
        print(f"{counts['error']:,} of {counts['images']:,} images could not be read", file=sys.stderr)
    return cli.set_aside(counts["error"], ok=False)


def below(uri: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The images at or below `uri` and in the rows of parquet files there, and how each is read.

    Raises:
        InputError: there are none.
    """
    files = [uri] if storage.is_file(uri) else [storage.join(uri, name) for name in sorted(storage.list_files(uri))]
    num = 0
    for file in files:
        suffix = "." + file.rpartition(".")[2].lower()
        found: Iterable[tuple[str, Callable[[], bytes]]] = ()
        if suffix == ".parquet":
            found = packed(file)
        elif suffix in images.SUFFIXES or file == uri:
            found = [(file, functools.partial(storage.read_bytes, file, max_bytes=images.MAX_BYTES))]
        for each in found:
            num += 1
            yield each
    if not num:
        raise InputError(f"{uri}: no image there; give a file, or a folder or s3:// prefix that holds some")


def packed(uri: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Those of a translation's parquet file: FILE#ID."""
    import pyarrow.parquet

    fs, path = storage.filesystem(uri)
    with storage.user_errors(uri), fs.open_input_file(path) as opened:
        try:
            file = pyarrow.parquet.ParquetFile(opened)
            if not {"id", "image"} <= {*file.schema_arrow.names}:
                return
            for some in file.iter_batches(16, columns=["id", "image"]):
                for row in some.to_pylist():
                    yield f"{uri}#{row['id']}", functools.partial(bytes, row["image"] or b"")
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{uri} is not a readable parquet file ({str(error).splitlines()[0]})") from None


def look(uri: str, read: Callable[[], bytes], key: bytes) -> dict[str, Any]:
    """What one image says: `generated`, `record`, `marked` and `score` (None where no mark was looked for), or the
    `error` that kept it from being read.

    Raises:
        InputError: the storage itself is gone.
    """
    row: dict[str, Any] = {"uri": uri, "generated": False, "record": {}, "marked": None, "score": None, "error": ""}
    try:
        data = read()
        pixels = np.asarray(images.decode(data, name=uri))
    except FileNotFoundError:
        return row | {"error": f"{uri}: it is gone"}
    except InputError as error:
        storage.exists(uri.partition("#")[0])  # raises where the server is unreachable or refuses everything
        return row | {"error": str(error)}
    told = marks.read(data)
    row |= {"generated": told.generated, "record": told.record}
    if key:
        score = keyed_mark.score(pixels, key)
        row |= {"marked": score >= keyed_mark.NEEDED, "score": round(score, 2), "needed": round(keyed_mark.NEEDED, 2)}
    return row


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    if row["error"]:
        return printable(row["error"])
    parts = ["says that it was generated" if row["generated"] else "says nothing of having been generated"]
    if row["marked"] is not None:
        found = "the mark is there" if row["marked"] else "no mark of this key"
        parts.append(f"{found} (score {row['score']:.1f}, {row['needed']:.1f} needed)")
    record = row["record"]
    if record:
        told = {name: record[name] for name in ("domain", "seed", "checkpoint", "licence", "mark") if name in record}
        parts.append(", ".join(f"{name} {value}" for name, value in told.items()))
    return printable(f"{row['uri']}: {'; '.join(parts)}")
