"""What Pillow does not tell of image files: what they are by their first bytes, PNG's chunks, JPEG's scans, and which
have more parts than memory and time allow."""

import contextlib
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
MAX_PARTS = 2**18
"""Chunks of a PNG, segments of a JPEG, values of a TIFF's tag, bytes of a PNM's header: Pillow goes through them in
Python and takes microseconds and hundreds of bytes for each. An image of 100 megapixels has tens of thousands."""
MAX_SCANS = 100
"""Of a JPEG: each is a pass over all its pixels. Encoders write about ten."""
MAX_PAGES = 10
"""Of a TIFF that are looked at."""
TOO_MANY = f"more than {MAX_PARTS:,} {{}}"


def checked(data: bytes) -> bytes:
    """An image file that Pillow opens in bounded time and memory: without the comments of a plain PNM.

    Raises:
        ValueError: it has more parts than any image needs, or none.
    """
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data)
    elif data.startswith((b"II", b"MM")):
        _check_tiff(data)
    elif re.match(rb"P[0-6fy]", data):
        if data[1:2] in b"123":  # Pillow takes a time of their number squared
            data = re.sub(rb"#[^\r\n]*+", b"", data)
        if not _PNM_HEADER.match(data, 0, MAX_PARTS):
            raise ValueError(f"no header in its first {MAX_PARTS:,} bytes")
    return data


_PNM_HEADER = re.compile(rb"P\w+(?:(?:\s++|#[^\r\n]*+)++[-+.\d]++){2}")


def _check_tiff(data: bytes) -> None:
    """Raises ValueError where a tag of the first pages has too many values (TIFF 6.0, 2; BigTIFF)."""
    order, big = "<" if data.startswith(b"I") else ">", 43 in data[2:4]
    number, entry, offset = ("Q", "HHQ8x", "Q") if big else ("H", "HHI4x", "I")
    size = struct.calcsize(order + entry)
    with contextlib.suppress(struct.error, OverflowError):  # damage is told by who reads on
        (at,) = struct.unpack_from(order + offset, data, 8 if big else 4)
        for _ in range(MAX_PAGES):
            if not at:
                return
            (num,) = struct.unpack_from(order + number, data, at)
            start = at + struct.calcsize(order + number)
            at = start + num * size
            tags = struct.iter_unpack(order + entry, data[start : min(at, start + MAX_PARTS * size)])
            if num > MAX_PARTS or any(count > MAX_PARTS and kind not in _BYTES for _, kind, count in tags):
                raise ValueError(TOO_MANY.format("values"))
            (at,) = struct.unpack_from(order + offset, data, at)


_BYTES = (1, 2, 6, 7)
"""Types of TIFF's that stay bytes."""


def _check_jpeg(data: bytes) -> None:
    """Raises ValueError for too many segments, scans or stray bytes."""
    num_parts, num_scans, end = 0, 0, 2
    for segment in _segments(data):
        num_parts += 1 + segment.at - end
        num_scans += segment.marker == 0xDA
        end = segment.end
        if num_parts > MAX_PARTS:
            raise ValueError(TOO_MANY.format("segments"))
        if num_scans > MAX_SCANS:
            raise ValueError(f"more than {MAX_SCANS} scans")
    if not num_scans and len(data) - end > MAX_PARTS:
        raise ValueError("no scan")


# ---------------------------------------------------------------------------------------------- PNG


def png_parts(data: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """A PNG without what Pillow refuses where it is long or damaged, though the image is good: text, but for that which
    tells how the image is turned, and chunks of colour (cICP, iCCP, sRGB, gAMA, cHRM); and these by name.

    Raises:
        ValueError: it has more chunks than any image needs.
    """
    kept, at, num_chunks = [memoryview(data)[:8]], 8, 0
    colour: dict[bytes, bytes] = {}
    while at + 8 <= len(data):
        num_chunks += 1
        if num_chunks > MAX_PARTS:
            raise ValueError(TOO_MANY.format("chunks"))
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
    frame: int
    """Marker of the frame that it is of, 0 for none: 0xC2 is progressive, those over 0xC8 are coded arithmetically."""


class Segment(NamedTuple):
    """A part of a JPEG from a marker on (ITU-T T.81, B.1.1); of a scan with its data."""

    marker: int
    at: int
    end: int


def _segments(data: bytes) -> Iterator[Segment]:
    """Those with content, up to the end marker or the end of the file; what stands between them is passed over."""
    end = 2
    while (found := _MARKER.search(data, end)) and found[1] != b"\xd9":
        at, marker = found.start(), found[1][0]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            ends = _SCAN_END.search(data, end)
            end = ends.start() if ends else len(data)
        yield Segment(marker, at, end)


_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
"""Of what has content, or ends the image."""


def jpeg_scans(data: bytes) -> Iterator[Scan]:
    """A JPEG's scans in order (ITU-T T.81, B.2.3)."""
    frame = 0
    for segment in _segments(data):
        if segment.marker in _FRAMES:
            frame = segment.marker
        if segment.marker == 0xDA:
            start, count = segment.at + 5, data[segment.at + 4]
            header = data[start + 2 * count : start + 2 * count + 3]
            if len(header) < 3:
                return
            components = data[start : start + 2 * count : 2]
            yield Scan(components, header[0], header[1], header[2] & 15, segment.end, frame)


_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
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
