"""What files say of how they were made."""

import io
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ddpm_core import marks

RECORD = {"checkpoint": "abc", "licence": "CC BY 4.0", "domain": "night", "seed": 3}
RDF, DC = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://purl.org/dc/elements/1.1/}"


def pixels(side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    "licence", ["CC BY 4.0", "", '<&"> Müller 日本', "\0\x0b\ud800\uffff", "\U0001f600" * 100_000, "a\n\tb"]
)
def test_a_file_tells_its_record_whatever_the_licence(kind, licence):
    data = marks.finish(pixels(), {**RECORD, "licence": licence}, kind)
    with Image.open(io.BytesIO(data)) as image:
        packet = image.info["xmp"]
        text = image.info.get(marks.RECORD)
    assert data == marks.finish(pixels(), {**RECORD, "licence": licence}, kind)
    told = ElementTree.fromstring(packet)[0][0]
    record = json.loads(told.attrib["{https://ddpm-translate/ns/1.0/}record"])
    assert record == {**RECORD, "licence": licence[: marks.MAX_LICENCE]}
    assert (text is None) == (kind != "png")
    assert text is None or json.loads(text) == record
    assert told.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == marks.SOURCE_TYPE
    assert told.attrib["{https://ddpm-translate/ns/1.0/}checkpoint"] == "abc"
    rights = told.find(f"{DC}rights/{RDF}Alt/{RDF}li")
    assert rights is not None
    assert (rights.text or "") == marks.NOT_XML.sub("\ufffd", licence[: marks.MAX_LICENCE])
