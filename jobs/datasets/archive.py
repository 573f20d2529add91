"""A zip file, local or remote, as a folder of files."""

import functools
import struct
import zipfile
import zlib

from ddpm_core import storage
from ddpm_core.errors import InputError

END_BYTES, MAX_LISTING = 2**17, 2**27
"""Where a zip file says how long its listing is, and the longest that is read: two million members take 1 GB."""


class Archive:
    """A zip file, local or remote: listed once, then each member costs one ranged read, from any thread."""

    def __init__(self, uri: str) -> None:
        fs, path = storage.filesystem(uri)
        self.uri = uri
        self.file = storage.with_retries(uri, lambda: fs.open_input_file(path))
        try:
            listing = storage.with_retries(uri, self._listing)
        except zipfile.BadZipFile as error:
            raise InputError(f"{uri} is not a whole zip file ({error}); download it again") from None
        # Some programs write \ for /, or a path from the root on.
        names = [info.filename.replace("\\", "/").lstrip("/") for info in listing]
        self.members = {name: info for name, info in zip(names, listing, strict=True) if name and name[-1] != "/"}

    def _listing(self) -> list[zipfile.ZipInfo]:
        size = self.file.size()
        end = self.file.read_at(min(size, END_BYTES), max(size - END_BYTES, 0))
        for mark, kind, offset in ((b"PK\5\6", "<I", 12), (b"PK\6\6", "<Q", 40)):  # the records of zip and of zip64
            at = end.rfind(mark) + offset
            if at >= offset and at + 8 <= len(end) and 2**32 - 1 != struct.unpack_from(kind, end, at)[0] > MAX_LISTING:
                raise zipfile.BadZipFile("it lists more files than any set of images has")
        try:
            return zipfile.ZipFile(self.file).infolist()
        except (ValueError, NotImplementedError, struct.error) as error:  # so it ends where the listing is nonsense
            raise zipfile.BadZipFile(str(error)) from None

    def sizes(self) -> dict[str, int]:
        """Size of each member by its path."""
        return {name: info.file_size for name, info in self.members.items()}

    def read(self, member: str, *, max_bytes: int | None = None) -> bytes:
        """A member's content, of which no more is unpacked than the listing says.

        Raises:
            KeyError: there is no such member.
            BadZipFile: it is damaged.
            TooLargeError: it has more than `max_bytes`.
        """
        info = self.members[member]
        storage.check_size(member, max(info.file_size, info.compress_size), max_bytes)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile(f"packed by method {info.compress_type}, only 0 and 8 are read: pack it anew")
        # local header: 30 bytes, name and extra field (whose length may differ from the listing's), then data
        start, size = info.header_offset, 30 + len(info.filename.encode()) + 2**10 + info.compress_size
        if not 0 <= start < self.file.size():
            raise zipfile.BadZipFile("it lies beyond the file's end")
        data = storage.with_retries(self.uri, lambda: self.file.read_at(size, start))
        if len(data) < 30 or data[:4] != b"PK\x03\x04" or info.flag_bits & 1:
            raise zipfile.BadZipFile("damaged or encrypted member")
        skip = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
        data = data[skip : skip + info.compress_size]
        try:
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            content = zlib.decompressobj(-15).decompress(data, info.file_size + 1) if deflated else data
        except zlib.error as error:
            raise zipfile.BadZipFile(str(error)) from None
        if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
            raise zipfile.BadZipFile("bad checksum")
        return content


@functools.lru_cache(maxsize=2)
def archive(uri: str) -> Archive:
    return Archive(uri)
