"""The images below a folder as people have them, among what systems and programs leave there."""

import collections
import concurrent.futures
import dataclasses
import posixpath
import re
from collections.abc import Iterable, Mapping

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
"""Endings of what stands beside images in numbers and is none: these are not opened, only counted. Into others the
listing looks, unless they end like images."""
HEAD_BYTES = 32
"""What is read of those."""
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


def list_images(uri: str) -> Listing:
    """The images below `uri`, to any depth.

    Raises:
        InputError: `uri` may not be read.
    """
    tree = storage.tree(uri, skip=is_system)
    named = {path for path in tree.files if _suffix(path) in images.SUFFIXES}
    heads = _heads(uri, {path: entry for path, entry in tree.files.items() if path not in named})
    found: dict[str, storage.Entry] = {}
    others: dict[str, storage.Entry] = {}
    rejected = {path: reason for path, reason in tree.faults.items() if path.endswith("/") or _maybe_image(path)}
    for path, entry in tree.files.items():
        head = heads.get(path, b"")
        try:
            if isinstance(head, InputError):
                raise head
            images.check_kind(path, head)
            if path in named or images.looks_like_image(head):
                storage.check_size(path, entry.num_bytes, images.MAX_BYTES)
                found[path] = entry
                continue
        except InputError as error:
            rejected[path] = error.args[0].removeprefix(f"{path}: ")
        others[path] = entry
    rejected |= _not_pulled(tree.files)
    notes = [_system_note(tree.skipped)] if tree.skipped else []
    if tree.num_again:
        link = "link to a folder" if tree.num_again == 1 else "links to folders"
        notes.append(f"{tree.num_again} {link} not followed: the images there are read where they lie")
    if none := [path for path in others if path not in rejected]:
        kinds = _commonest(_suffix(path) or "without an ending" for path in none)
        notes.append(f"{len(none):,} other file{'' if len(none) == 1 else 's'} passed over ({kinds})")
    return Listing(images=found, rejected=dict(sorted(rejected.items())), others=others, notes=notes)


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _maybe_image(path: str) -> bool:
    return _suffix(path) in images.SUFFIXES | images.UNREADABLE.keys() | {""}


def _heads(uri: str, files: Mapping[str, storage.Entry]) -> dict[str, bytes | InputError]:
    """How the files begin whose names do not tell what they are, or why that cannot be read.

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

    unknown = [path for path in files if not PLAIN.fullmatch(_suffix(path))]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(unknown, pool.map(head, unknown), strict=True))


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
    what = "file or folder" if len(skipped) == 1 else "files and folders"
    return f"{len(skipped):,} hidden or system {what} passed over ({_commonest(map(posixpath.basename, skipped))})"


def _commonest(names: Iterable[str]) -> str:
    ranked = [name for name, _ in collections.Counter(names).most_common()]
    return ", ".join(ranked[:3]) + (", …" if len(ranked) > 3 else "")
