"""The images below a folder as people have them, among what systems and programs leave there."""

import collections
import concurrent.futures
import dataclasses
import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from ddpm_core import images, storage
from ddpm_core.errors import InputError, printable

SYSTEM = frozenset(
    {"__macosx", "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "$recycle.bin"}
    | {"recycler", "recycled", "system volume information", "lost+found", "network trash folder", "temporary items"}
    | {"__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)
"""Folders and files of NAS boxes, Windows, macOS and Linux, in small letters; so are all that begin with a dot."""
PLAIN = re.compile(
    r"\.(txt|[ct]sv|jsonl?|xml|ya?ml|toml|ini|md|rst|html?|log|py|ipynb|sh|mat|np[yz]|pth?|pkl|h5|hdf5|safetensors|parquet"
    r"|db|sqlite|lmdb|tfrecord|zip|tar|t?gz|bz2|xz|7z|rar|dvc|docx|xlsx|xmp|aae|mp3|wav)"
)
"""Endings of what stands beside images in numbers and is none: these are not opened, only counted. Into others the
listing looks, unless they end like images."""
HEAD_BYTES = 32
"""What is read of those."""
LOOK_AT = 1000
"""Files are looked at so many at a time, as a bucket's listing brings them."""
NOT_PULLED = "tracked by DVC, and its content is not here; dvc pull brings it"
PACKED = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies below a folder; paths are relative to it."""

    images: dict[str, storage.Entry]
    """Files that end or begin like images which are read, sorted."""
    rejected: dict[str, str]
    """What stands there as an image and cannot be read, with the reason and the remedy."""
    others: dict[str, storage.Entry]
    """Other files."""
    notes: list[str]
    """What was passed over, in words."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file that can be read, for `fingerprint`."""
        return {path: entry.num_bytes for path, entry in sorted((self.images | self.others).items())}

    def hint(self) -> str:
        """Why images may be missing, as the end of a message."""
        if self.rejected:
            path, reason = min(self.rejected.items())
            return f"; {len(self.rejected):,} cannot be read, the first: {path}: {reason}"
        packed = [path for path in self.others if path.lower().endswith(PACKED)]
        return f"; {packed[0]} is packed: unpack it" if packed else ""


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is the system's own or hidden, and no image of the user's."""
    return name.startswith(".") or name.casefold() in SYSTEM


def image_files(files: Iterable[str]) -> list[str]:
    """Those of the paths that end like images and are not the system's own; archive.zip!path is of the archive."""
    return [file for file in files if _maybe_image(file) and _suffix(file) and not any(map(is_system, parts(file)))]


def parts(file: str) -> list[str]:
    """The folders and the name of a file, in an archive as outside of it."""
    return file.replace(".zip!", ".zip/").split("/")


class Seen(NamedTuple):
    """Something below a folder, and what it is taken for."""

    kind: Literal["image", "rejected", "other", "system", "again"]
    name: str
    """Path below the folder, as text; of what is rejected as it is printed."""
    entry: storage.Entry | None = None
    """Of an image or another file."""
    reason: str = ""
    """Why it is rejected, with the remedy."""


class PassedOver:
    """What a listing leaves out, counted, however much it is."""

    MOST_KINDS = 1000

    def __init__(self) -> None:
        self.num_others = self.num_again = 0
        self.others: collections.Counter[str] = collections.Counter()
        self.system: collections.Counter[str] = collections.Counter()
        self.packed: str | None = None
        """A file that is packed."""

    def add(self, seen: Seen) -> None:
        if seen.kind == "other":
            self.num_others += 1
            self._count(self.others, _suffix(seen.name) or "without an ending")
            self.packed = self.packed or (seen.name if seen.name.lower().endswith(PACKED) else None)
        elif seen.kind == "system":
            self._count(self.system, posixpath.basename(seen.name.rstrip("/")))
        elif seen.kind == "again":
            self.num_again += 1

    def _count(self, counts: "collections.Counter[str]", what: str) -> None:
        counts[what if what in counts or len(counts) < self.MOST_KINDS else "others"] += 1

    @property
    def notes(self) -> list[str]:
        """In words."""
        notes = []
        if num := self.system.total():
            what = "file or folder" if num == 1 else "files and folders"
            notes.append(f"{num:,} hidden or system {what} passed over ({_commonest(self.system)})")
        if self.num_again:
            link = "link to a folder" if self.num_again == 1 else "links to folders"
            notes.append(f"{self.num_again} {link} not followed: the images there are read where they lie")
        if self.num_others:
            files = "file" if self.num_others == 1 else "files"
            notes.append(f"{self.num_others:,} other {files} passed over ({_commonest(self.others)})")
        return notes


def look(uri: str, items: Iterator[storage.Item] | None = None) -> Iterator[Seen]:
    """What lies below `uri`, to any depth, in the order of `storage.walk`, or `items` of it.

    Raises:
        InputError: `uri` may not be read.
    """
    items = storage.walk(uri, skip=is_system) if items is None else items
    while some := list(itertools.islice(items, LOOK_AT)):
        unknown = {
            item.name: item.entry
            for item in some
            if item.entry is not None and not PLAIN.fullmatch(end := _suffix(item.name)) and end not in images.SUFFIXES
        }
        heads = _heads(uri, unknown)
        for item in some:
            if item.entry is not None:
                yield _seen(item.name, item.entry, heads.get(item.name, b""))
                if _is_not_pulled(uri, item.name):
                    yield Seen("rejected", item.name.removesuffix(".dvc"), reason=NOT_PULLED)
            elif item.skipped:
                yield Seen("system", item.name)
            elif not item.fault:
                yield Seen("again", item.name)
            elif item.path.endswith("/") or _maybe_image(item.path):
                yield Seen("rejected", printable(item.path), reason=item.fault)


def _seen(name: str, entry: storage.Entry, head: bytes | InputError) -> Seen:
    try:
        if isinstance(head, InputError):
            raise head
        images.check_kind(name, head)
        if _suffix(name) in images.SUFFIXES or images.looks_like_image(head):
            storage.check_size(name, entry.num_bytes, images.MAX_BYTES)
            return Seen("image", name, entry)
    except InputError as error:
        return Seen("rejected", name, entry, error.args[0].removeprefix(f"{name}: "))
    return Seen("other", name, entry)


def _is_not_pulled(uri: str, name: str) -> bool:
    """Whether of an image, or a folder of them, only DVC's note is there."""
    pulled = name.removesuffix(".dvc")
    return pulled != name and _maybe_image(pulled) and not storage.exists(storage.join(uri, pulled))


def list_images(uri: str) -> Listing:
    """The images below `uri`, to any depth.

    Raises:
        InputError: `uri` may not be read.
    """
    found: dict[str, storage.Entry] = {}
    others: dict[str, storage.Entry] = {}
    rejected: dict[str, str] = {}
    passed = PassedOver()
    for seen in look(uri):
        passed.add(seen)
        if seen.kind == "rejected":
            rejected[seen.name] = seen.reason
        if seen.entry is not None:
            (found if seen.kind == "image" else others)[seen.name] = seen.entry
    rejected = dict(sorted(rejected.items()))
    return Listing(images=found, rejected=rejected, others=others, notes=passed.notes)


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _maybe_image(path: str) -> bool:
    return _suffix(path) in images.SUFFIXES | images.UNREADABLE.keys() | {""}


def _heads(uri: str, files: Mapping[str, storage.Entry]) -> dict[str, bytes | InputError]:
    """How files begin, or why that cannot be read.

    Raises:
        InputError: the store refuses.
    """

    def head(path: str) -> bytes | InputError:
        file = storage.join(uri, files[path].path)
        try:
            return storage.read_bytes(file, first=HEAD_BYTES)
        except FileNotFoundError:
            return b""
        except InputError as error:
            if storage.is_remote(uri) and not isinstance(error, storage.UnusableNameError):
                raise
            return InputError(str(error).removeprefix(f"{file}: "))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(head, files), strict=True))


def _commonest(counts: "collections.Counter[str]") -> str:
    ranked = [name for name, _ in counts.most_common()]
    return ", ".join(ranked[:3]) + (", …" if len(ranked) > 3 else "")
