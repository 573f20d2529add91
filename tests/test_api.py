"""The endpoint's HTTP in this process: what is taken and refused, at which cost, and what an answer tells."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import random
import resource
import struct
import time
import urllib.parse
import warnings
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from test_matching import write_encoder
from test_translator import TINY, network

from ddpm_core import checkpoint, faces, full_size, images, keyed_mark, marks, nets
from ddpm_core.config import Framing, ModelConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator
from jobs import translate
from serve import api, app
from serve.engine import Done, Engine, Full, Job, Late
from serve.schemas import Arguments, validate

CONFIG = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, licence="CC BY 4.0 — Müller"))


class Local:
    """A backend of this process: the real engine and reader around a tiny network."""

    def __init__(
        self, config: ModelConfig = CONFIG, loaded: checkpoint.Checkpoint | None = None, precision: str = "fp32"
    ) -> None:
        self.config = config
        translate = Translator(loaded or network(config), device="cpu", precision=precision)
        self.engine = Engine(translate, max_rows=8, max_waiting=100)
        self.translate, self.stream = self.engine.translate, self.engine.stream

    async def read(self, data: bytes, template: tuple[float, ...], framing: Framing, deadline: float) -> api.Read:
        look = functools.partial(full_size.look, output_size=framing.output_size, which=framing.faces)
        return api.Read(await asyncio.to_thread(look, data, self.config.image_size, template), data)

    async def finish(self, read: api.Read, results: Any, encode: Any, deadline: float) -> bytes:
        return await asyncio.to_thread(full_size.finish, read.file, read.views, results, encode)

    async def stats(self) -> Mapping[str, float]:
        return self.engine.stats()


class Failing(Local):
    """A backend whose model raises."""

    def __init__(self, error: Exception) -> None:
        self.config, self.error = CONFIG, error

    async def translate(self, job: Job) -> Done:  # type: ignore[override]
        raise self.error

    async def stream(self, job: Job) -> AsyncIterator[Any]:  # type: ignore[override]
        raise self.error
        yield

    async def stats(self) -> Mapping[str, float]:
        raise api.Unavailable


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    backend = Local()
    yield backend
    backend.engine.close()


def made(  # type: ignore[no-untyped-def]
    backend: api.Backend,
    config: ModelConfig = CONFIG,
    tokens: Mapping[str, str] | None = None,
    mark_key: bytes = b"",
    **arguments: Any,
):
    settings = api.Settings(
        validate(Arguments, {"checkpoint": "x", "max_body_mb": 1, **arguments}),
        config,
        "run/checkpoints/3@abc",
        tokens or {},
        mark_key,
    )
    return api.make(backend, settings)


def ask(application: Any, method: str, url: str, *, client: str = "127.0.0.1", **request: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(application, raise_app_exceptions=False, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as http:
            return await http.request(method, url, **request)

    return asyncio.run(asyncio.wait_for(main(), 300))


def png(seed: int = 0, size: tuple[int, int] = (40, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return images.encode_png(pixels)


def detail(answer: httpx.Response) -> str:
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == answer.status_code
    assert "\n" not in found["detail"]
    return found["detail"]


# -- bodies and answers ---------------------------------------------------------------------------------------------


def test_every_kind_of_body_gives_the_same_image(local: Local) -> None:
    application, url = made(local), "/v1/translate"
    right = ask(application, "POST", f"{url}?domain=night&seed=3", content=png())
    assert right.status_code == 200, right.text
    text = base64.b64encode(png()).decode()
    others = [
        ask(application, "POST", url, files={"image": png()}, data={"domain": "night", "seed": "3"}),
        ask(application, "POST", f"{url}?domain=night", files={"file": ("x.png", png())}, data={"seed": "3"}),
        ask(application, "POST", url, json={"image": text, "domain": "night", "seed": 3}),
        ask(application, "POST", f"{url}?seed=3", json={"image": f"data:image/png;base64,{text}", "domain": "night"}),
    ]
    for other in others:
        assert other.status_code == 200, other.text
        assert other.content == right.content
    edited = ask(
        application, "POST", "/v1/images/edits", files={"image": png()}, data={"prompt": "night", "seed": "3", "n": "1"}
    )
    assert base64.b64decode(edited.json()["data"][0]["b64_json"]) == right.content
    # the endpoint gives what the library gives
    expected = Translator(network(CONFIG), device="cpu", precision="fp32")
    (own,) = expected.at_own_size([Image.open(io.BytesIO(png()))], "night", seed=3)
    assert np.abs(pixels(right).astype(int) - own).max() <= 2
    source = images.read_square(png(), 8)
    square = ask(application, "POST", f"{url}?domain=night&seed=3&output_size=model", content=png())
    assert np.abs(pixels(square).astype(int) - expected(source[None], "night", seed=3)[0]).max() <= 1


@pytest.mark.parametrize(("precision", "most", "mean"), [("fp32", 1, 0.01), ("bf16", 16, 1.0)])
def test_an_image_comes_out_the_same_alone_in_a_crowd_and_by_translate(
    precision: str, most: int, mean: float, checkpoint_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for roundings where the kernels add up in another order, as those of two threads may, too."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: precision == "bf16")  # what translate goes by
    shared = {"num_steps": "3", "guidance_scale": "2", "seed": "3", "output_size": "model"}
    source, files = tmp_path / "in", [png(i) for i in range(4)]
    source.mkdir()
    for i, file in enumerate(files):
        (source / f"{i}.png").write_bytes(file)
    loaded, folder = checkpoint.load(checkpoint_folder), tmp_path / "checkpoint"
    by_v = dataclasses.replace(loaded.config.diffusion, prediction="v")  # whose results are not black and white
    config = dataclasses.replace(loaded.config, diffusion=by_v)
    folder.mkdir()
    for name, content in checkpoint.files(loaded.model.state_dict(), config).items():
        (folder / name).write_bytes(content)
    company = [{"num_steps": 2 + i, "guidance_scale": i / 2, "seed": i, "domain": "day"} for i in range(4)]

    async def crowd(application: Any) -> list[httpx.Response]:
        transport = httpx.ASGITransport(application, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint", timeout=300) as http:
            asked = [(file, {"domain": "night", **shared}) for file in files] + list(zip(files, company, strict=True))
            posts = [http.post("/v1/translate", params=query, content=file) for file, query in asked]
            return (await asyncio.gather(*posts))[: len(files)]

    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            backend = Local(
                config, checkpoint.load(str(folder)), precision
            )  # its thread takes the number that it finds
            application, query = made(backend, config), urllib.parse.urlencode({"domain": "night", **shared})
            found.append([pixels(ask(application, "POST", f"/v1/translate?{query}", content=file)) for file in files])
            found.append([pixels(answer) for answer in asyncio.run(asyncio.wait_for(crowd(application), 300))])
            backend.engine.close()
        where = {"checkpoint": folder, "input": source, "output": tmp_path / "out", "domain": "night", **shared}
        more = {"mark_key": "none", "num_workers": 0, "batch_size": 4}
        words = ((f"--{name.replace('_', '-')}", str(value)) for name, value in {**where, **more}.items())
        translate.main([*itertools.chain(*words)])
        found.append([np.asarray(Image.open(tmp_path / f"out/{i}.png")) for i in range(len(files))])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        differences = np.abs(np.array(others, int) - np.array(found[0], int))
        assert differences.max() <= most
        assert differences.mean() <= mean


def pixels(answer: httpx.Response) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(answer.content)))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("output_size", ["own", "model", None])
def test_answers_have_the_photos_size_unless_squares_are_wanted(
    local: Local, kind: str, output_size: str | None
) -> None:
    application, photo = made(local), png(size=(50, 30))
    sized = {"output_size": output_size} if output_size else {}
    query = {"domain": "night", "format": kind, **sized}
    answer = ask(application, "POST", "/v1/translate", params=query, content=photo)
    streamed = ask(application, "POST", "/v1/translate/stream", params=query, content=photo)
    assert pixels(answer).shape == ((8, 8, 3) if output_size == "model" else (30, 50, 3))
    assert base64.b64encode(answer.content).decode() in streamed.text
    assert json.loads(answer.headers["x-options"]).get("output_size") == (None if output_size == "model" else "own")
    with Image.open(io.BytesIO(answer.content)) as image:
        xmp = image.info["xmp"]
    told = xmp.decode() if isinstance(xmp, bytes) else xmp
    assert ("output_size" in told) == (output_size != "model")


def test_a_photo_of_twelve_megapixels_comes_back_as_one(local: Local) -> None:
    photo = io.BytesIO()
    Image.new("RGB", (4000, 3000), (120, 160, 90)).save(photo, "JPEG")
    answer = ask(made(local), "POST", "/v1/translate?domain=night&format=jpeg", content=photo.getvalue())
    assert answer.status_code == 200, answer.text
    assert pixels(answer).shape == (3000, 4000, 3)
    huge = io.BytesIO()
    Image.new("L", (12_000, 9_000)).save(huge, "PNG")
    answer = ask(made(local), "POST", "/v1/translate?domain=night", content=huge.getvalue())
    assert answer.status_code == 400
    assert "12000 x 9000 pixels; at most 100,000,000 are taken" in detail(answer)


@pytest.mark.parametrize(("kind", "media"), [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")])
def test_answers_say_that_they_were_generated_and_by_what(local: Local, kind: str, media: str) -> None:
    application = made(local)
    by_name = ask(application, "POST", f"/v1/translate?domain=night&format={kind}", content=png())
    by_accept = ask(
        application, "POST", "/v1/translate?domain=night", content=png(), headers={"Accept": f"{media}, */*"}
    )
    for answer in (by_name, by_accept):
        assert answer.headers["content-type"] == media
        with Image.open(io.BytesIO(answer.content)) as image:
            assert image.format == kind.upper()
            xmp = image.info["xmp"]
        xmp = xmp.decode() if isinstance(xmp, bytes) else xmp
        assert "compositeWithTrainedAlgorithmicMedia" in xmp
        assert "CC BY 4.0 — Müller" in xmp
        assert "run/checkpoints/3@abc" in xmp
    headers = by_name.headers
    assert headers["x-checkpoint"] == "run/checkpoints/3@abc"
    assert headers["x-licence"].startswith("CC BY 4.0 ")
    assert json.loads(headers["x-options"])["num_steps"] == 4
    assert "queue;dur=" in headers["server-timing"]
    assert headers["x-content-type-options"] == "nosniff"
    assert len(headers["x-request-id"]) == 16


def test_all_faces_of_a_photo_are_translated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = np.array(faces.CELEBA).reshape(5, 2)
    places = [np.array([x, 8.0]) for x in (10, 60, 110)]
    found = [faces.Face((*place, *place + 40), 1.0, place + 40 * template) for place in places]
    monkeypatch.setattr(faces, "find", lambda photo: found)
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, landmarks=faces.CELEBA))
    backend, photo = Local(config), png(size=(160, 56))
    try:
        application = made(backend, config)
        query = "/v1/translate?domain=night&faces=all"
        answer = ask(application, "POST", query, content=photo)
        streamed = ask(application, "POST", query.replace("?", "/stream?"), content=photo)
        largest = ask(application, "POST", "/v1/translate?domain=night", content=photo)
        for more, words in {"align=none": "photos are taken as they are", "output_size=model": "holds one"}.items():
            assert words in detail(ask(application, "POST", f"{query}&{more}", content=photo))
    finally:
        backend.engine.close()
    assert answer.status_code == 200, answer.text
    assert base64.b64encode(answer.content).decode() in streamed.text
    assert answer.headers["x-note"].startswith("all of its faces were taken (3)")
    assert json.loads(answer.headers["x-options"])["faces"] == "all"
    source = np.asarray(images.decode(photo))
    changed, alone = ((pixels(each) != source).any(axis=(0, 2)) for each in (answer, largest))
    assert changed[12:48].any()
    assert changed[70:90].any()
    assert changed[120:140].any()
    assert not alone[60:].any()


@pytest.mark.parametrize("output_size", ["own", "model"])
def test_answers_carry_the_operators_mark(local: Local, output_size: str) -> None:
    key, photo = b"0123456789abcdef", png(size=(90, 70))
    query = f"/v1/translate?domain=night&output_size={output_size}"
    bare = pixels(ask(made(local), "POST", query, content=photo))
    answer = ask(made(local, mark_key=key), "POST", query, content=photo)
    assert np.array_equal(pixels(answer), keyed_mark.embed(bare, key))
    assert keyed_mark.is_marked(pixels(answer), key) == (output_size == "own")  # a square of 8 pixels is not
    told = marks.read(answer.content)
    assert told.generated
    assert told.record.get("mark") == (keyed_mark.name_of(key) if output_size == "own" else None)


@pytest.mark.parametrize("output_size", ["own", "model"])
def test_an_encoder_tells_how_much_of_the_person_is_left(tmp_path: Path, output_size: str) -> None:
    net = nets.identity_net(str(write_encoder(tmp_path / "who"))).module
    backend, query = Local(), "/v1/translate?domain=night&output_size="
    try:
        application = made(backend)
        assert "x-identity-cosine" not in ask(application, "POST", query + output_size, content=png()).headers
        backend.engine.likeness = functools.partial(app.likeness, net, "cpu")
        answer = ask(application, "POST", query + output_size, content=png())
        result = pixels(ask(application, "POST", query + "model", content=png()))
        streamed = ask(application, "POST", query.replace("?", "/stream?") + output_size, content=png())
    finally:
        backend.engine.close()
    if output_size == "model":
        one, other = nets.features(net, np.stack([images.read_square(png(), 8), result])).numpy()
        assert float(answer.headers["x-identity-cosine"]) == pytest.approx(float(one @ other), abs=1e-3)
    assert -1 <= float(answer.headers["x-identity-cosine"]) < 0.9999
    assert f'"X-Identity-Cosine": "{answer.headers["x-identity-cosine"]}"' in streamed.text


def test_an_encoder_that_cannot_be_used_is_one_line(tmp_path: Path, checkpoint_folder: str) -> None:
    with pytest.raises(app.StartError, match=r"^identity_net: \S*nowhere") as caught:
        app.build_app({"checkpoint": checkpoint_folder, "identity_net": str(tmp_path / "nowhere")})
    assert "\n" not in str(caught.value)
    who = str(write_encoder(tmp_path / "who"))
    assert app.build_app({"checkpoint": checkpoint_folder, "identity_net": who})


def test_nothing_of_the_sources_metadata_comes_back(local: Local) -> None:
    exif = Image.Exif()
    exif[0x010E] = "at home"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 0.0)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 200)).save(buffer, "JPEG", exif=exif, comment=b"secret")
    for kind in ("png", "jpeg", "webp"):
        answer = ask(made(local), "POST", f"/v1/translate?domain=night&format={kind}", content=buffer.getvalue())
        with Image.open(io.BytesIO(answer.content)) as image:
            assert not dict(image.getexif())
        assert b"at home" not in answer.content
        assert b"secret" not in answer.content


def test_a_stream_shows_every_step_and_ends_with_the_result(local: Local) -> None:
    application = made(local)
    answer = ask(application, "POST", "/v1/translate/stream?domain=night&num_steps=3", content=png())
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    assert [lines[0] for lines in events] == ["event: preview"] * 3 + ["event: result"]
    data = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert [each["step"] for each in data[:3]] == [1, 2, 3]
    whole = ask(application, "POST", "/v1/translate?domain=night&num_steps=3", content=png())
    assert base64.b64decode(data[3]["image"].partition(",")[2]) == whole.content
    assert json.loads(data[3]["headers"]["X-Options"])["num_steps"] == 3
    failing = ask(made(Failing(Full())), "POST", "/v1/translate/stream?domain=night", content=png())
    assert failing.text.startswith("event: error")
    assert '"status": 429' in failing.text


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b""}, 400, "the file is empty"),
        ({"content": b"no image"}, 400, "not an image"),
        ({"content": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, 400, "image"),
        ({"content": png()[:200]}, 400, "truncated"),
        ({"files": {"image": b"no image"}}, 400, "not an image"),
        ({"data": {"seed": "1"}}, 400, "not an image"),
        ({"files": {"a": b"1", "b": b"2"}}, 400, "the form cannot be read"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "the form cannot be read"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "not JSON"),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "not JSON"),
        ({"json": {"picture": "x"}}, 400, "holds no image"),
        ({"json": {"image": "%%%"}}, 400, "not base64"),
        ({"json": {"image": "http://127.0.0.1/day.png"}}, 400, "not base64"),
        ({"json": {"image": "aGk=", "colour": 1}}, 422, "unknown option 'colour'"),
        ({"json": {"image": "aGk=", "domain": "night"}}, 422, "domain: given in the address and in the body"),
        ({"json": {"image": "aGk=", "num_steps": None, "seed": {"a": 1}}}, 422, "seed is"),
        ({"content": b"x" * 1_000_001}, 413, "larger than 1 MB"),
    ],
)
def test_a_wrong_body_is_refused_in_one_line(local: Local, request_: dict[str, Any], status: int, message: str) -> None:
    answer = ask(made(local), "POST", "/v1/translate?domain=night", **request_)
    assert answer.status_code == status, answer.text
    assert message in detail(answer)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "domain is missing; add ?domain= with one of day, night"),
        ("domain=nigth", "did you mean 'night'?"),
        ("domain=night&num_steps=many", "num_steps is 'many'"),
        ("domain=night&num_steps=5000", "must not exceed num_timesteps = 1000"),
        ("domain=night&strength=0", "strength is 0.0; it must lie in (0, 1]"),
        ("domain=night&start=sdedit&strength=0.01", "strength is 0.01"),
        ("domain=night&seed=99999999999999999999", "seed is '99999999999999999999'"),
        ("domain=night&guidance_scale=nan", "guidance_scale is nan; it must be a finite number"),
        ("domain=night&guidance=2", "unknown option 'guidance' (did you mean 'guidance_scale'?)"),
        ("domain=night&format=gif", "format is 'gif'"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(local: Local, query: str, message: str) -> None:
    answer = ask(made(local), "POST", f"/v1/translate?{query}", content=png())
    assert answer.status_code in (400, 422), answer.text
    assert message in detail(answer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": "night", "quality": "high"}, "unknown field 'quality'"),
        ({"prompt": "night", "n": "2"}, "n is '2'; possible here: 1"),
        ({"prompt": "night", "response_format": "url"}, "response_format is 'url'; possible here: b64_json"),
    ],
)
def test_an_edit_names_the_field_that_it_does_not_do(local: Local, fields: dict[str, str], message: str) -> None:
    answer = ask(made(local), "POST", "/v1/images/edits", files={"image": png()}, data=fields)
    assert answer.status_code == 400
    assert message in detail(answer)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Full(), 429),
        (Late(), 503),
        (TimeoutError(), 503),
        (api.Unavailable(), 503),
        (InputError("strength is 0.01: none of\nthe steps is left"), 400),
        (RuntimeError("secret path /root/x, pid 7"), 500),
    ],
)
def test_a_failure_behind_the_door_tells_nothing_of_the_inside(error: Exception, status: int) -> None:
    answer = ask(made(Failing(error)), "POST", "/v1/translate?domain=night", content=png())
    assert answer.status_code == status
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert detail(answer)
    assert ("retry-after" in answer.headers) == (status in (429, 503))


def test_health_follows_the_model(local: Local) -> None:
    for path in ("/healthz", "/readyz"):
        assert ask(made(local), "GET", path).json()["status"] == "ok"
        dead = ask(made(Failing(Full())), "GET", path)
        assert dead.status_code == 503
        assert "does not answer" in detail(dead)


def test_models_tell_sizes_domains_limits_and_the_licence(local: Local) -> None:
    (model,) = ask(made(local, requests_per_minute=7, timeout_s=3), "GET", "/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("run/checkpoints/3@abc", "model")
    assert (model["image_size"], model["domains"]) == (8, ["day", "night"])
    assert (model["licence"], model["accept_licence"]) == ("CC BY 4.0 — Müller", False)
    limits = {"max_body_bytes": 1_000_000, "max_pixels": 100_000_000, "timeout_s": 3, "requests_per_minute": 7}
    assert limits.items() <= model.items()
    assert model["formats"] == ["png", "jpeg", "webp"]


@pytest.mark.parametrize(
    ("method", "url", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/v1/models", 200),
        ("POST", "/v1/translate?domain=night", 200),
        ("POST", "/v1/translate/stream?domain=night", 200),
        ("POST", "/v1/translate?domain=noon", 422),
        ("GET", "/nowhere", 404),
        ("OPTIONS", "/v1/translate", 405),
    ],
)
def test_no_answer_is_for_other_sites(local: Local, method: str, url: str, status: int) -> None:
    origin = {"Origin": "https://elsewhere.org", "Access-Control-Request-Method": "POST"}
    answer = ask(made(local), method, url, headers=origin, content=png() if method == "POST" else b"")
    assert answer.status_code == status
    assert api.SAFE_HEADERS.items() <= {name.title(): value for name, value in answer.headers.items()}.items()
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_metrics_count_requests_by_route_and_status(local: Local) -> None:
    application = made(local)
    ask(application, "POST", "/v1/translate?domain=night", content=png())
    ask(application, "POST", "/v1/translate?domain=night", content=b"x")
    ask(application, "GET", "/no/such/path")
    text = ask(application, "GET", "/metrics").text
    assert 'ddpm_request_seconds_count{route="/v1/translate",status="200"} 1.0' in text
    assert 'ddpm_request_seconds_count{route="/v1/translate",status="400"} 1.0' in text
    assert 'ddpm_request_seconds_count{route="other",status="404"} 1.0' in text
    assert 'ddpm_model{what="passes"}' in text


def test_a_line_a_request_names_its_id_and_nothing_of_what_was_sent(
    local: Local, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=api.access_log.name)
    tokens = {"Authorization": "Bearer alice"}
    url = "/v1/translate?domain=night&seed=77"
    answer = ask(made(local, tokens=TOKENS), "POST", url, content=png(), headers=tokens, client="192.0.2.7")
    (line,) = [record.getMessage() for record in caplog.records if record.name == api.access_log.name]
    told = json.loads(line)
    assert told.keys() == {"id", "method", "route", "status", "s"}
    assert told["id"] == answer.headers["x-request-id"]
    assert (told["method"], told["route"], told["status"]) == ("POST", "/v1/translate", 200)


# -- files that are made to harm ------------------------------------------------------------------------------------

IMAGE = Image.open(io.BytesIO(png()))


def saved(kind: str, mode: str = "RGB", *, image: Image.Image = IMAGE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_announcing(width: int, height: int) -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def png_with(name: bytes, text: bytes) -> bytes:
    """A PNG with a chunk that is 50 MB unpacked."""
    return png()[:33] + png_chunk(name, text + packed_zeros()) + png()[33:]


@functools.cache
def packed_zeros() -> bytes:
    return zlib.compress(bytes(50_000_000))


def commented(jpeg: bytes, text: bytes) -> bytes:
    """A JPEG that says `text` after its first two bytes."""
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + jpeg[2:]


def riff(content: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content


def tiff_announcing(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 2**31 - 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiff_of_thumbnails(count: int) -> bytes:
    """Each page says that it is none of the images themselves (tag 254)."""
    tags = {254: 1, 256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 256}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    length = 2 + len(entries) + 4
    pages = [struct.pack("<H", len(tags)) + entries + struct.pack("<I", 8 + length * (i + 1)) for i in range(count)]
    return b"II*\0\x08\0\0\0" + b"".join(pages)


def big_tiff(announced: int, entries: int) -> bytes:
    head = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, announced)
    return head + struct.pack("<HHQQ", 65000, 1, 1, 0) * entries + bytes(8)


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = saved("JPEG", image=Image.new("L", (16, 16)), progressive=True)[:-2]
    return data + data[data.rindex(b"\xff\xda") :] * count


def replaced(data: bytes, after: bytes, skip: int, new: bytes) -> bytes:
    """`data` with `new` in the place of what lies `skip` bytes behind the first `after`."""
    at = data.index(after) + len(after) + skip
    return data[:at] + new + data[at + len(new) :]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("index.html", "<script>alert(1)</script>")
    return buffer.getvalue()


PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
GIF, MORE = saved("GIF", "P"), {"save_all": True, "append_images": [IMAGE.rotate(90), IMAGE.rotate(180)]}
DOT = saved("GIF", "P", image=Image.new("P", (8, 8)))
LARGE, NO_IMAGE, ANIMATION, PARTLY = "100,000,000", "not an image", "an animation", "a part of its data is missing"
TAKEN = {
    "GIF and JavaScript": GIF + b"\n=1;alert(1)//",
    "GIF, a comment of JavaScript": GIF[:-1] + b"\x21\xfe\x0c*/=alert(1)//\0;",
    "JPEG and PDF": saved("JPEG") + PDF,
    "JPEG around a PDF": commented(saved("JPEG"), PDF),
    "JPEG and ZIP": saved("JPEG") + zipped(),
    "PNG and ZIP": png() + zipped(),
    "PNG and HTML": png()[:33] + png_chunk(b"tEXt", b"a\0<script>alert(1)</script>") + png()[33:],
    "PNG, packed text": png_with(b"zTXt", b"a\0\0"),
    "PNG, packed international text": png_with(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"),
    "PNG, packed profile": png_with(b"iCCP", b"a\0\0"),
    "PNG, 50,000 texts": png()[:33] + png_chunk(b"tEXt", b"a\0b") * 50_000 + png()[33:],
    "CMYK JPEG": saved("JPEG", "CMYK"),
    "CMYK TIFF": saved("TIFF", "CMYK"),
    "16-bit PNG": saved("PNG", "I;16"),
    "16-bit TIFF": saved("TIFF", "I;16"),
}
"""Odd files whose image is right: the answer has what a plain file of that image gives."""
REFUSED = {
    "PDF before JPEG": (PDF + saved("JPEG"), NO_IMAGE),
    "ZIP before PNG": (zipped() + png(), NO_IMAGE),
    "HTML before PNG": (b"<script>alert(1)</script>" + png(), NO_IMAGE),
    "a program before PNG": (b"MZ" + png(), NO_IMAGE),
    "PNG of 1 x 10^9": (png_announcing(1, 10**9), LARGE),
    "PNG of 10^9 x 1": (png_announcing(10**9, 1), LARGE),
    "PNG of 50,000 x 50,000": (png_announcing(50_000, 50_000), LARGE),
    "PNG, nothing in it": (png_announcing(10_000, 10_000), "truncated"),
    "WebP, lossless": (riff(b"VP8L\x69\0\0\0\x2f" + struct.pack("<I", 2**28 - 1) + bytes(101)), LARGE),
    "WebP, extended": (riff(b"VP8X\x0a\0\0\0" + bytes(4) + b"\xff" * 6 + saved("WEBP")[12:]), LARGE),
    "TIFF of 50,000 x 50,000": (tiff_announcing(50_000, 50_000), LARGE),
    "TIFF of 7,900 thumbnails": (tiff_of_thumbnails(7_900), "raw photo"),
    "TIFF, a directory without end": (big_tiff(2**60, 10), NO_IMAGE),
    "TIFF, a million entries announced": (big_tiff(10**6, 40_000), NO_IMAGE),
    "AVIF of 50,000 x 50,000": (replaced(saved("AVIF"), b"ispe", 4, struct.pack(">II", 50_000, 50_000)), ""),
    "GIF of 65,535 x 65,535": (replaced(GIF, b"GIF8", 2, b"\xff" * 4), LARGE),
    "GIF of 10,000 frames": (DOT[:-1] + DOT[DOT.index(b"\x2c") : -1] * 9_999 + b";", ANIMATION),
    "BMP": (replaced(saved("BMP"), b"BM", 16, struct.pack("<ii", 50_000, 50_000)), LARGE),
    "PNM": (b"P6 50000 50000 255\n", LARGE),
    "PFM": (b"Pf 50000 50000 -1\n", LARGE),
    "QOI": (b"qoif" + struct.pack(">IIBB", 50_000, 50_000, 3, 0) + bytes(20), LARGE),
    "TGA": (struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 50_000, 50_000, 24, 0) + bytes(100), LARGE),
    "JPEG": (replaced(saved("JPEG"), b"\xff\xc0", 3, struct.pack(">HH", 65_000, 65_000)), LARGE),
    **{
        f"{name}, nothing in it": (
            replaced(saved("JPEG", **options), frame, 3, struct.pack(">HH", 9_999, 10_000)),
            PARTLY,
        )
        for name, (frame, options) in {
            "JPEG": (b"\xff\xc0", {}),
            "JPEG, progressive": (b"\xff\xc2", {"progressive": True}),
            "JPEG, progressive, every colour": (b"\xff\xc2", {"progressive": True, "subsampling": 0}),
        }.items()
    },
    "JPEG of 20,000 scans": (jpeg_of_scans(20_000), "more than 100 scans"),
    "SVG": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='99' height='99'/>", NO_IMAGE),
    "SVG that loads": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", NO_IMAGE),
    "PNG, animated": (saved("PNG", **MORE), ANIMATION),
    "WebP, animated": (saved("WEBP", **MORE), ANIMATION),
    "AVIF, animated": (saved("AVIF", **MORE), ANIMATION),
    "GIF, animated": (saved("GIF", **MORE), ANIMATION),
}


@pytest.fixture(scope="module")
def application(local: Local) -> Any:
    return made(local)


@pytest.mark.parametrize("name", TAKEN)
def test_an_odd_file_gives_what_its_image_gives(application: Any, name: str) -> None:
    query = "/v1/translate?domain=night&num_steps=1"
    answer = ask(application, "POST", query, content=TAKEN[name])
    assert answer.status_code == 200, answer.text
    plain = images.encode_png(np.asarray(images.decode(TAKEN[name])))
    assert np.array_equal(pixels(answer), pixels(ask(application, "POST", query, content=plain)))
    for text in (b"<script", b"alert(", b"/Catalog", b"index.html"):
        assert text not in answer.content


@pytest.mark.parametrize("output_size", ["own", "model"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_made_to_harm_is_refused_before_it_costs_anything(
    local: Local, application: Any, name: str, output_size: str
) -> None:
    data, words = REFUSED[name]
    passes, begun, before = local.engine.counts.get("passes", 0), time.process_time(), most_memory()
    answer = ask(application, "POST", f"/v1/translate?domain=night&output_size={output_size}", content=data)
    assert answer.status_code == 400, answer.text
    assert words in detail(answer)
    assert local.engine.counts.get("passes", 0) == passes
    assert time.process_time() - begun < 1  # of work: a busy machine does not count
    assert most_memory() < before + 64


def most_memory() -> int:
    """The most that this process has ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# -- who may come in ------------------------------------------------------------------------------------------------

TOKENS = {hashlib.sha256(name.encode()).hexdigest(): name for name in ("alice", "bob")}


def test_without_tokens_only_this_machine_is_served(local: Local) -> None:
    post: dict[str, Any] = {"method": "POST", "url": "/v1/translate?domain=night", "content": png()}
    assert ask(made(local), client="192.0.2.7", **post).status_code == 403
    assert ask(made(local), client="192.0.2.7", method="GET", url="/healthz").status_code == 200
    assert ask(made(local, open_to_all=True), client="192.0.2.7", **post).status_code == 200
    assert ask(made(local, tokens=TOKENS), **post).status_code == 401
    wrong = ask(made(local, tokens=TOKENS), headers={"Authorization": "Bearer mallory"}, **post)
    assert wrong.status_code == 401
    assert wrong.headers["www-authenticate"] == "Bearer"
    right = ask(made(local, tokens=TOKENS), client="192.0.2.7", headers={"Authorization": "Bearer bob"}, **post)
    assert right.status_code == 200


def test_each_token_has_a_rate_of_its_own(local: Local) -> None:
    application = made(local, tokens=TOKENS, requests_per_minute=2)

    def post(name: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {name}"}
        return ask(application, "POST", "/v1/translate?domain=night", content=png(), headers=headers)

    assert [post("alice").status_code for _ in range(3)] == [200, 200, 429]
    assert post("bob").status_code == 200
    assert int(post("alice").headers["retry-after"]) >= 1


def test_a_licence_that_binds_is_accepted_first() -> None:
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, licence="non-commercial research only"))
    backend = Local(config)
    application = made(backend, config)
    refused = ask(application, "POST", "/v1/translate?domain=night", content=png())
    assert refused.status_code == 403
    assert "accept_licence=true" in detail(refused)
    assert ask(application, "POST", "/v1/translate?domain=night&accept_licence=true", content=png()).status_code == 200
    assert ask(application, "GET", "/v1/models").json()["data"][0]["accept_licence"] is True
    backend.engine.close()


def test_tokens_are_read_from_a_file(tmp_path: Any) -> None:
    file = tmp_path / "tokens"
    file.write_text("# ours\nalice " + next(iter(TOKENS)).upper() + "\n\n")
    assert app.read_tokens(str(file)) == {next(iter(TOKENS)): "alice"}
    file.write_text("alice secret\n")
    with pytest.raises(InputError, match="line 1: write NAME and the SHA-256"):
        app.read_tokens(str(file))
    with pytest.raises(InputError, match="no such file"):
        app.read_tokens(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("/v1/translate?domain=nigth", 422, "did you mean 'night'?"),
        ("/v1/translate/stream?domain=night&num_steps=5000", 422, "must not exceed"),
        ("/v1/translate?domain=night&start=sdedit&strength=0.01", 422, "strength is 0.01"),
        ("/v1/translate?domain=night", 403, "accept_licence=true"),
        ("/v1/images/edits", 400, "prompt is missing"),
    ],
)
def test_what_is_wrong_is_said_before_a_body_is_read(local: Local, url: str, status: int, message: str) -> None:
    licence = "research only" if status == 403 else "CC0"
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, licence=licence))
    begun = []

    async def body() -> AsyncIterator[bytes]:
        begun.append(1)
        yield png()

    answer = ask(made(local, config), "POST", url, content=body(), headers={"Content-Type": "image/png"})
    assert answer.status_code == status, answer.text
    assert message in detail(answer)
    assert not begun


# -- clients that do not behave -------------------------------------------------------------------------------------


def test_slow_bodies_hold_up_nobody_and_are_given_up(local: Local) -> None:
    """Many clients that announce a body and send one byte: further bodies are refused at once, health is told."""
    url = "/v1/translate?domain=night"

    async def slow() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(600)

    def client(body_timeout_s: float) -> httpx.AsyncClient:
        application = made(local, body_timeout_s=body_timeout_s)
        transport = httpx.ASGITransport(application, raise_app_exceptions=False, client=("127.0.0.1", 1))
        return httpx.AsyncClient(transport=transport, base_url="http://endpoint")

    async def held_up() -> tuple[set[int], int, int, int]:
        async with client(body_timeout_s=600) as http:
            many = [asyncio.create_task(http.post(url, content=slow())) for _ in range(150)]
            while sum(each.done() for each in many) < 150 - api.MAX_BODIES:
                await asyncio.sleep(0.01)
            refused = {each.result().status_code for each in many if each.done()}
            health = (await http.get("/healthz")).status_code
            another = (await http.post(url, content=png())).status_code
            for each in many:
                each.cancel()
            await asyncio.gather(*many, return_exceptions=True)
            return refused, health, another, (await http.post(url, content=png())).status_code

    async def given_up() -> int:
        async with client(body_timeout_s=0.2) as http:
            return (await http.post(url, content=slow())).status_code

    assert asyncio.run(asyncio.wait_for(held_up(), 300)) == ({429}, 200, 429, 200)
    assert asyncio.run(asyncio.wait_for(given_up(), 300)) == 408


def mutations(count: int, seed: int) -> Iterator[bytes]:
    """Damaged files of every kind that Pillow writes: cut, flipped, doubled, spliced."""
    draw, whole = random.Random(seed), []
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    kinds = (
        "PNG RGB|PNG RGBA|PNG P|PNG I;16|JPEG RGB|JPEG CMYK|WEBP RGB|GIF P|TIFF RGB|BMP RGB|AVIF RGB|PPM RGB|TGA RGB"
    )
    for kind, mode in (each.split() for each in kinds.split("|")):
        buffer = io.BytesIO()
        (picture.convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)).save(buffer, kind)
        whole.append(buffer.getvalue())
    for _ in range(count):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 8)):
            place = draw.randrange(len(data) or 1)
            match draw.randrange(4):
                case 0:
                    del data[place:]
                case 1:
                    data[place : place + 1] = bytes([draw.randrange(256)])
                case 2:
                    data[place:place] = draw.choice(whole)[: draw.randrange(64)]
                case _:
                    data[place : place + 4] = draw.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
        yield bytes(data)


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damaged_image_is_our_fault(local: Local, count: int) -> None:
    application = made(local)

    async def main() -> list[tuple[int, str]]:
        transport = httpx.ASGITransport(application, raise_app_exceptions=False, client=("127.0.0.1", 1))
        found = []
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as http:
            for data in mutations(count, seed=count):
                answer = await http.post("/v1/translate?domain=night&num_steps=1", content=data)
                found.append((answer.status_code, answer.text if answer.status_code >= 400 else ""))
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = asyncio.run(main())
    assert {status for status, _ in found} <= {200, 400, 413}, [each for each in found if each[0] >= 500][:3]
    assert sum(status == 200 for status, _ in found) > count // 50
    assert sum(status == 400 for status, _ in found) > count // 5


@pytest.mark.slow
def test_whatever_the_schema_allows_or_not_is_answered_as_the_schema_says(local: Local) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hypothesis
        import schemathesis
        from schemathesis import checks, specs

        schema = schemathesis.openapi.from_asgi("/v1/openapi.json", made(local, open_to_all=True))
        as_said = [
            checks.not_a_server_error,
            specs.openapi.checks.status_code_conformance,
            specs.openapi.checks.content_type_conformance,
            specs.openapi.checks.response_schema_conformance,
        ]
        found: dict[str, set[int]] = {}
        modes = list(schemathesis.GenerationMode)

        def check(case: Any) -> None:
            answer = case.call()
            found.setdefault(case.operation.path, set()).add(answer.status_code)
            case.validate_response(answer, checks=as_said)

        bounded = hypothesis.settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        for operation in schema.get_all_operations():
            for mode in modes:
                cases = operation.ok().as_strategy(generation_mode=mode)
                with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong with a GET
                    bounded(hypothesis.given(case=cases)(lambda case: check(case)))()
    assert {"/v1/translate", "/v1/translate/stream", "/v1/images/edits", "/v1/models", "/metrics"} <= found.keys()
    assert all(found[path] >= {400, 422} for path in ("/v1/translate", "/v1/images/edits"))


def test_who_hangs_up_frees_the_model(local: Local) -> None:
    before = dict(local.engine.counts)

    async def main() -> None:
        transport = httpx.ASGITransport(made(local), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as http:
            gone = asyncio.create_task(http.post("/v1/translate?domain=night&num_steps=1000", content=png()))
            while not local.engine.running:
                await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            while local.engine.running:
                await asyncio.sleep(0.01)

    begun = time.monotonic()
    asyncio.run(asyncio.wait_for(main(), 120))
    assert time.monotonic() - begun < 120
    assert local.engine.counts["cancelled"] == before.get("cancelled", 0) + 1
