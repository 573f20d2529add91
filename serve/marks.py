"""Answers as files: what is in them tells machines that they were generated."""

import io
from xml.sax.saxutils import quoteattr

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ddpm_core import images
from ddpm_core.errors import InputError

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_SIDE = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
"""Pixels along a side."""
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's word for an image that a trained algorithm made of another one."""


def xmp(checkpoint: str, licence: str, options: str) -> str:
    """An XMP packet: generated, by what, under which licence, with which options."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:ddpm="https://ddpm-translate/ns/1.0/" '
        f'Iptc4xmpExt:DigitalSourceType={quoteattr(SOURCE_TYPE)} xmp:CreatorTool="ddpm-translate" '
        f"dc:rights={quoteattr(licence)} ddpm:checkpoint={quoteattr(checkpoint)} ddpm:options={quoteattr(options)}/>"
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )


def encode(image: UInt8[np.ndarray, "h w 3"], kind: str, packet: str) -> bytes:
    """A file of `kind` that carries the XMP packet, "" for none; nothing of the source's own metadata is in it.

    Raises:
        InputError: it has more pixels along a side than such a file can have.
    """
    if max(image.shape[:2]) > MAX_SIDE[kind]:
        raise InputError(
            f"a result of {image.shape[1]} x {image.shape[0]} pixels is too large for {kind}, which has at most "
            f"{MAX_SIDE[kind]} along a side; take format=png, or output_size=model"
        )
    if kind == "png":
        return images.encode_png(image, text={"XML:com.adobe.xmp": packet} if packet else {})
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind.upper(), quality=95, **({"xmp": packet.encode()} if packet else {}))
    return buffer.getvalue()
