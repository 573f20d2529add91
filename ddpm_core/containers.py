"""What Pillow does not tell of image files: what they are by their first bytes, PNG's chunks, JPEG's scans."""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|.{4}ftyp(?:avi[fs]|he[iv]\w|mi[af]\d|msf1)"
    rb"|(?:II[*+]\0|MM\0[*+])|BM.{12}[\x0c(48@l|]\0{3}|\0{3}\x0cjP  \r\n|\xff\x4f\xff\x51|qoif"
    rb"|P(?:[1-6]\s(?:\s|#[^\n]*\n)*\d+\s|[Ff]\s+\d+\s)",
    re.DOTALL,
)
"""How the files begin that `images.decode` takes: JPEG, PNG, GIF, WebP, AVIF, HEIF, TIFF, BMP, JPEG 2000, QOI, PNM."""
MAX_TEXT_BYTES = 2**20
"""Longer text of a PNG, unpacked, is left out; of the text that is read there are two pieces at most."""
MAX_PROFILE_BYTES = 2**24
"""Longer colour profiles are not used; those of printers have a few MB."""


# ---------------------------------------------------------------------------------------------- PNG


def png_parts(data: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """A PNG without what Pillow refuses where it is long or damaged, though the image is good: text, but for that which
    tells how the image is turned, and chunks of colour (cICP, iCCP, sRGB, gAMA, cHRM); and these by name."""
    kept, at = [memoryview(data)[:8]], 8
    colour: dict[bytes, bytes] = {}
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        chunk = memoryview(data)[at : at + 12 + length]
        body = bytes(chunk[8 : 8 + length]) if name in _COLOUR | _TEXT.keys() else b""
        if name in _COLOUR:
            colour.setdefault(name, body)
        elif name not in _TEXT or (_TEXT[name].match(body) and _fits(body)):
            kept.append(chunk)
        at += 12 + length
    return b"".join(kept), colour


_COLOUR = {b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM"}
_TEXT = {
    b"tEXt": re.compile(rb"Raw profile type exif\0"),
    b"zTXt": re.compile(rb"Raw profile type exif\0"),
    b"iTXt": re.compile(rb"XML:com\.adobe\.xmp\0"),
}


def _fits(text: bytes) -> bool:
    """Whether a chunk of text is short, unpacked if need be."""
    packed = re.search(rb"\0(?:\0|\x01\0[^\0]*\0[^\0]*\0)(?=\x78)", text)
    if len(text) > MAX_TEXT_BYTES or packed is None:
        return len(text) <= MAX_TEXT_BYTES
    return unpacked(text[packed.end() :], MAX_TEXT_BYTES) is not None


def unpacked(data: bytes, max_bytes: int) -> bytes | None:
    """What zlib packed; None where it is damaged or longer than `max_bytes`, more of which is never unpacked."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, max_bytes + 1)
    except zlib.error:
        return None
    return content if stream.eof and len(content) <= max_bytes else None


# ---------------------------------------------------------------------------------------------- JPEG


class Scan(NamedTuple):
    """One of a JPEG's scans: a baseline image has one, a progressive one about ten."""

    components: bytes
    first: int
    """Of the 64 coefficients of a block those that it brings: from `first` to `last`."""
    last: int
    low_bit: int
    """Of these the lowest bit."""
    end: int
    """Where its data end: the offset of the next marker."""


def jpeg_scans(data: bytes) -> Iterator[Scan]:
    """A JPEG's scans in order (ITU-T T.81, B.2), up to its end marker or the end of the file."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xD9:
            return
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # without content
            at += 1
            continue
        if marker != 0xDA:
            at += 2 + length
            continue
        count = data[at + 4]
        ends = _SCAN_END.search(data, at + 2 + length)
        end = ends.start() if ends else len(data)
        header = data[at + 5 + 2 * count : at + 8 + 2 * count]
        if len(header) < 3:
            return
        yield Scan(data[at + 5 : at + 5 + 2 * count : 2], header[0], header[1], header[2] & 15, end)
        at = end


_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
NOISE = bytes(range(255)) * 4
"""Data that would become blocks of a JPEG, were any missing; 0 comes first, lest an 0xFF before it makes a marker."""


def jpeg_misses_scans(scans: list[Scan], components: bytes) -> bool:
    """Whether there are coefficients of a component that no scan brings to its last bit."""
    brought = {
        (component, coefficient)
        for scan in scans
        if scan.low_bit == 0
        for component in scan.components
        for coefficient in range(scan.first, scan.last + 1)
    }
    return any((component, k) not in brought for component in components for k in range(64))


def with_more_data(data: bytes, scan: Scan) -> bytes:
    """The JPEG with noise at the end of a scan: of a whole one it is passed over, in a cut one it becomes blocks."""
    return data[: scan.end] + NOISE + data[scan.end :]
