"""Results as files that tell machines that they were generated: by what, how, and under which licence.

record   what a file says of how it was made, JSON types: "checkpoint" and "licence", and the options
"""

import json
import re
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from jaxtyping import UInt8

from ddpm_core import images
from ddpm_core.config import OutputFormat

RECORD = "ddpm-translate"
"""Keyword of a PNG's text chunk that holds the record."""
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's word for an image that a trained algorithm made of another one."""
MAX_LICENCE = 3000
"""Characters of a licence that a file holds: of a JPEG's metadata there is room for 64 kB."""
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def finish(image: UInt8[np.ndarray, "h w 3"], record: Mapping[str, Any], kind: OutputFormat = "png") -> bytes:
    """A result's file, which holds its record and nothing of the source's own metadata. Equal images and records give
    equal bytes.

    Raises:
        InputError: the image has more pixels along a side than such a file can have.
    """
    record = {**record, "licence": record["licence"][:MAX_LICENCE]}
    text = json.dumps(record, sort_keys=True)
    packet = xmp(str(record["checkpoint"]), record["licence"], text)
    return images.encode(image, kind, xmp=packet, text={RECORD: text})


def xmp(checkpoint: str, licence: str, record: str) -> str:
    """An XMP packet: generated, by what, under which licence, and the record as JSON."""
    checkpoint, licence, record = (NOT_XML.sub("\ufffd", each) for each in (checkpoint, licence, record))
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:ddpm="https://ddpm-translate/ns/1.0/" '
        f'Iptc4xmpExt:DigitalSourceType={quoteattr(SOURCE_TYPE)} xmp:CreatorTool="ddpm-translate" '
        f"ddpm:checkpoint={quoteattr(checkpoint)} ddpm:record={quoteattr(record)}>"
        f'<dc:rights><rdf:Alt><rdf:li xml:lang="x-default">{escape(licence)}</rdf:li></rdf:Alt></dc:rights>'
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
