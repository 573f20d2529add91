"""The images below a folder as people have them, among what systems and programs leave there."""

import collections
import concurrent.futures
import dataclasses
import posixpath
import re
from collections.abc import Iterable

from ddpm_core import images, storage
from ddpm_core.errors import InputError

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
"""Endings of files that are no images for certain; into others the listing looks."""
HEAD_BYTES = 32
"""What is read of those."""
PACKED = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies below a folder; paths are relative to it."""

    images: dict[str, storage.Entry]
    """Files that end like images which are read, sorted."""
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


def list_images(uri: str) -> Listing:
    """The images below `uri`, to any depth.

    Raises:
        InputError: `uri` may not be read.
    """
    tree = storage.tree(uri, skip=is_system)
    found: dict[str, storage.Entry] = {}
    others: dict[str, storage.Entry] = {}
    rejected = {path: reason for path, reason in tree.faults.items() if path.endswith("/") or _maybe_image(path)}
    for path, entry in tree.files.items():
        try:
            images.check_listed(path, entry.num_bytes if _suffix(path) in images.SUFFIXES else 0)
        except InputError as error:
            rejected[path] = error.args[0].removeprefix(f"{path}: ")
        (found if _suffix(path) in images.SUFFIXES and path not in rejected else others)[path] = entry
    rejected |= _without_ending(uri, others) | _not_pulled(tree.files)
    notes = [_system_note(tree.skipped)] if tree.skipped else []
    if tree.num_again:
        link = "link to a folder" if tree.num_again == 1 else "links to folders"
        notes.append(f"{tree.num_again} {link} not followed: the images there are read where they lie")
    return Listing(images=found, rejected=dict(sorted(rejected.items())), others=others, notes=notes)


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _maybe_image(path: str) -> bool:
    return _suffix(path) in images.SUFFIXES | images.UNREADABLE.keys() | {""}


def _without_ending(uri: str, others: Iterable[str]) -> dict[str, str]:
    """Images whose name does not say that they are."""

    def head(path: str) -> bytes:
        try:
            return storage.read_bytes(storage.join(uri, path), first=HEAD_BYTES)
        except (InputError, FileNotFoundError):
            return b""

    unknown = [path for path in others if not PLAIN.fullmatch(_suffix(path)) and _suffix(path) not in images.UNREADABLE]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        heads = list(pool.map(head, unknown))
    return {
        path: f"an image, but its name does not end like one ({_suffix(path) or 'no ending'}); rename it"
        for path, begins in zip(unknown, heads, strict=True)
        if images.looks_like_image(begins)
    }


def _not_pulled(files: Iterable[str]) -> dict[str, str]:
    """Images, and folders of them, of which only DVC's note is there."""
    there = {folder for path in files for folder in (path, *_folders(path))}
    noted = [path.removesuffix(".dvc") for path in files if path.endswith(".dvc")]
    reason = "tracked by DVC, and its content is not here; dvc pull brings it"
    return {path: reason for path in noted if path not in there and _maybe_image(path)}


def _folders(path: str) -> Iterable[str]:
    while path := posixpath.dirname(path):
        yield path


def _system_note(skipped: list[str]) -> str:
    names = [name for name, _ in collections.Counter(map(posixpath.basename, skipped)).most_common()]
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    what = "file or folder" if len(skipped) == 1 else "files and folders"
    return f"{len(skipped):,} hidden or system {what} passed over ({shown})"
