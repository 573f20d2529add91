"""Results as files that tell machines that they were generated: by what, how, and under which licence; read again, too.

record   what a file says of how it was made, JSON types: "checkpoint" and "licence", and the options
"""

import io
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ddpm_core import images, keyed_mark
from ddpm_core.config import OutputFormat

RECORD = "ddpm-translate"
"""Keyword of a PNG's text chunk that holds the record."""
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's word for an image that a trained algorithm made of another one."""
GENERATED = frozenset({"compositeWithTrainedAlgorithmicMedia", "trainedAlgorithmicMedia", "algorithmicMedia"})
"""The last part of such words."""
MAX_LICENCE = 3000
"""Characters of a licence that a file holds: of a JPEG's metadata there is room for 64 kB."""
NAMESPACE = "https://ddpm-translate/ns/1.0/"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def finish(
    image: UInt8[np.ndarray, "h w 3"], record: Mapping[str, Any], kind: OutputFormat = "png", key: bytes = b""
) -> bytes:
    """A result's file, which holds its record and nothing of the source's own metadata. Equal images, records and keys
    give equal bytes.

    `key`: of the invisible mark, b"" for none; the record of an image that has it says so.

    Raises:
        InputError: the image has more pixels along a side than such a file can have.
    """
    record = {**record, "licence": record["licence"][:MAX_LICENCE]}
    if key and keyed_mark.can_be_marked(image):
        image, record = keyed_mark.embed(image, key), {**record, "mark": keyed_mark.name_of(key)}
    text = json.dumps(record, sort_keys=True)
    packet = xmp(str(record["checkpoint"]), record["licence"], text)
    return images.encode(image, kind, xmp=packet, text={RECORD: text})


def xmp(checkpoint: str, licence: str, record: str) -> str:
    """An XMP packet: generated, by what, under which licence, and the record as JSON."""
    checkpoint, licence, record = (NOT_XML.sub("\ufffd", each) for each in (checkpoint, licence, record))
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        f'xmlns:Iptc4xmpExt="{IPTC}" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        f'xmlns:ddpm="{NAMESPACE}" '
        f'Iptc4xmpExt:DigitalSourceType={quoteattr(SOURCE_TYPE)} xmp:CreatorTool="ddpm-translate" '
        f"ddpm:checkpoint={quoteattr(checkpoint)} ddpm:record={quoteattr(record)}>"
        f'<dc:rights><rdf:Alt><rdf:li xml:lang="x-default">{escape(licence)}</rdf:li></rdf:Alt></dc:rights>'
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )


class Told(NamedTuple):
    """What an image file says of itself."""

    generated: bool
    """Its XMP has IPTC's word for what an algorithm made, of an image or of nothing."""
    record: dict[str, Any]
    """How it was made; {} where it was not by us."""


def read(data: bytes) -> Told:
    """What an image file says of how it was made. Damaged metadata say nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                packet, text = image.info.get("xmp", b""), image.info.get(RECORD, "")
    except Exception:  # decoders raise anything
        return Told(False, {})
    said = _said(packet.encode(errors="replace") if isinstance(packet, str) else packet)
    source_type = said.get(f"{{{IPTC}}}DigitalSourceType", "").rpartition("/")[2]
    return Told(source_type in GENERATED, _record(text, said))


def _said(packet: bytes) -> dict[str, str]:
    """The properties of an XMP packet, written as attributes or as elements."""
    if not packet or b"<!" in packet:  # entities, which may be made to grow without end
        return {}
    try:
        tree = ElementTree.fromstring(packet.strip(b"\0 \n"))
    except (ElementTree.ParseError, ValueError):
        return {}
    said: dict[str, str] = {}
    for each in tree.iter():
        said |= {each.tag: each.text or "", **each.attrib}
    return said


def _record(text: str, said: Mapping[str, str]) -> dict[str, Any]:
    for candidate in (said.get(f"{{{NAMESPACE}}}record", ""), text):
        try:
            record = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            return record
    return {}
