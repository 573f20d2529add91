"""What files say of how they were made."""

import io
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ddpm_core import images, keyed_mark, marks

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


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_what_a_file_says_is_read_again(kind):
    assert marks.read(marks.finish(pixels(), RECORD, kind)) == (True, RECORD)
    large = marks.finish(pixels(64), RECORD, kind, b"k" * 16)
    assert marks.read(large) == (True, {**RECORD, "mark": keyed_mark.name_of(b"k" * 16)})
    assert marks.finish(pixels(), RECORD, kind, b"k" * 16) == marks.finish(pixels(), RECORD, kind)  # too small for it
    with Image.open(io.BytesIO(large)) as image:
        assert keyed_mark.is_marked(np.asarray(image), b"k" * 16)


def test_a_packet_that_other_programs_have_written_anew_is_read():
    packet = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF[1:-1]}">
      <rdf:Description xmlns:a="{marks.IPTC}"><a:DigitalSourceType>{marks.SOURCE_TYPE}</a:DigitalSourceType>
      </rdf:Description><rdf:Description xmlns:b="{marks.NAMESPACE}"><b:record>{{"seed": 1}}</b:record>
      </rdf:Description></rdf:RDF></x:xmpmeta>"""
    assert marks.read(images.encode(pixels(), "png", xmp=packet)) == (True, {"seed": 1})
    wholly = packet.replace("compositeWithTrained", "trained")
    assert marks.read(images.encode(pixels(), "jpeg", xmp=wholly)).generated
    camera = packet.replace("compositeWithTrainedAlgorithmicMedia", "digitalCapture")
    assert not marks.read(images.encode(pixels(), "jpeg", xmp=camera)).generated


@pytest.mark.parametrize(
    "packet", ["", "no XML", "<a>", "<a b='&lol;'/>", "<!DOCTYPE a [<!ENTITY lol 'lol'>]><a>&lol;</a>", "<a/>\0"]
)
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_odd_packets_say_nothing(kind, packet):
    assert marks.read(images.encode(pixels(), kind, xmp=packet)) == (False, {})


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", "[" * 10_000, "NaN"])
def test_odd_records_say_nothing(text):
    assert marks.read(images.encode(pixels(), "png", text={marks.RECORD: text})) == (False, {})


def test_what_is_no_image_says_nothing():
    assert marks.read(b"") == marks.read(b"\x89PNG\r\n\x1a\n") == marks.read(b"no image") == (False, {})
