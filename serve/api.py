"""The endpoint's HTTP: what a request may be, what is refused before it costs anything, and what an answer says.

No Ray: `make` builds a FastAPI application around any `Backend`; `app` has the one of Ray Serve, tests their own.
"""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import http
import ipaddress
import json
import logging
import math
import re
import secrets
import string
import time
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import fastapi
import fastapi.exceptions
import fastapi.responses
import numpy as np
import prometheus_client
import starlette.exceptions
import starlette.formparsers
from starlette.datastructures import Headers, UploadFile

from ddpm_core import config as configs
from ddpm_core import faces, images, marks
from ddpm_core.config import Framing, ModelConfig, OutputFormat
from ddpm_core.errors import InputError
from ddpm_core.full_size import View
from ddpm_core.images import MEDIA_TYPES

from .engine import Done, Full, Job, Late
from .schemas import Arguments, FramingQuery, Options, Query, SamplingQuery, complete, explain, validate

RETRY_AFTER_S = 2
"""What a refused client is told to wait."""
MAX_BODIES = 64
"""Bodies that may be on their way at once; further ones are told to come back."""
READY_S = 5.0
"""How long a health check waits for the model's answer."""
PAGE = Path(__file__).parent / "page" / "index.html"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of every answer; one that sets a header itself keeps its own."""
NON_COMMERCIAL = re.compile(r"non-?\s?commercial|\bNC\b|research (use )?only", re.IGNORECASE)
access_log = logging.getLogger("ddpm_translate.access")
"""A line a request: nothing of what was sent, nor from where."""


class Read(NamedTuple):
    """An image file as the model takes it."""

    views: list[View]
    """One, or one for each face."""
    file: Any
    """The file, for `Backend.finish`: wherever the backend keeps it; None where it is not needed any more."""


class Unavailable(Exception):
    """No copy of the model can be reached."""


class Backend(Protocol):
    """What does the work."""

    async def read(self, data: bytes, template: tuple[float, ...], framing: Framing, deadline: float) -> Read:
        """Raises InputError for what is no usable image; TimeoutError, Unavailable where nobody reads it by then."""

    async def finish(
        self, read: Read, results: list[np.ndarray], encode: Callable[[np.ndarray], bytes], deadline: float
    ) -> bytes:
        """The file that `encode` makes of the photo itself with what changed from `read.views` to `results`; raises as
        `read`."""

    async def translate(self, job: Job) -> Done:
        """Raises Full, Late, Unavailable, InputError."""

    def stream(self, job: Job) -> AsyncIterator[tuple[int, np.ndarray] | Done]:
        """(steps done, how it looks by then) after each step, then the result; raises as `translate`."""

    async def stats(self) -> Mapping[str, float]:
        """Of the model, from a copy that answers; raises Unavailable."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an application is made for."""

    arguments: Arguments
    config: ModelConfig
    checkpoint: str
    """Names it in every answer."""
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of each token, in hex, to its owner's name; {}: none is needed."""
    mark_key: bytes = dataclasses.field(default=b"", repr=False)
    """Of the invisible mark of each answer; b"" for none."""

    @property
    def domains(self) -> tuple[str, ...]:
        return self.config.target_domains or self.config.domains


# -- answers --------------------------------------------------------------------------------------------------------


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> fastapi.Response:
    """An error as RFC 9457 has it."""
    title = http.HTTPStatus(status).phrase
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return fastapi.responses.JSONResponse(content, status, dict(headers or {}), media_type="application/problem+json")


def refusal(status: int, detail: str, **headers: str) -> fastapi.HTTPException:
    return fastapi.HTTPException(status, detail, headers or None)


def later(status: int, reason: str) -> fastapi.HTTPException:
    wait = {"Retry-After": str(RETRY_AFTER_S)}
    return fastapi.HTTPException(status, f"{reason}; try again in {RETRY_AFTER_S} s", wait)


def header(text: str) -> str:
    """`text` fit for an HTTP header: what is not plain ASCII is percent-encoded."""
    return urllib.parse.quote(text, safe=string.punctuation.replace("%", "") + " ")


# -- requests -------------------------------------------------------------------------------------------------------


async def read_body(request: fastapi.Request, limit: int, timeout_s: float) -> bytes:
    """The request's body, refused as soon as it is known to be too large, or late.

    Raises:
        HTTPException: 413, 408.
    """
    too_large = refusal(413, f"the body is larger than {limit / 1e6:g} MB; scale the image down")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise refusal(
            408, f"the body was not whole after {timeout_s:g} s; send it faster", Connection="close"
        ) from None
    return bytes(body)


class Sent(NamedTuple):
    """What a body holds."""

    image: bytes
    fields: dict[str, Any]
    """Options that came in the body."""


async def parse_body(body: bytes, headers: Headers) -> Sent:
    """A body that is the image itself, a form with a file, or JSON with the image in base64.

    Raises:
        HTTPException: 400 for a form or JSON that holds no image.
    """
    kind = _content_type(headers)
    if kind == "multipart/form-data":
        return await _parse_form(body, headers)
    if kind == "application/json":
        return _parse_json(body)
    return Sent(body, {})


def holds_fields(headers: Headers) -> bool:
    """Whether the body may hold options beside the image."""
    return _content_type(headers) in ("multipart/form-data", "application/json")


def _content_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


async def _parse_form(body: bytes, headers: Headers) -> Sent:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = starlette.formparsers.MultiPartParser(headers, stream(), max_files=1, max_part_size=len(body) + 1)
    try:
        form = await parser.parse()
    except (starlette.formparsers.MultiPartException, KeyError, ValueError, UnicodeError) as error:
        raise refusal(400, f"the form cannot be read ({_line(error)}); send one file as image=@photo.jpg") from None
    files = [value for value in form.values() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise refusal(400, "the form holds no file; send one as image=@photo.jpg")
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, str):
            fields[name] = value if name not in fields else [*_listed(fields[name]), value]
    return Sent(await files[0].read(), fields)


def _parse_json(body: bytes) -> Sent:
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError):
        raise refusal(400, 'the body is not JSON; send {"image": "BASE64", ...} or the image itself') from None
    text = sent.pop("image", None) if isinstance(sent, dict) else None
    if not isinstance(text, str):
        raise refusal(400, 'the JSON holds no image; send {"image": "BASE64", "domain": ...}')
    try:
        return Sent(base64.b64decode(re.sub(r"^data:[^,]*,", "", text), validate=True), sent)
    except (binascii.Error, ValueError):
        raise refusal(400, "image is not base64") from None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def merged(query: Query, fields: Mapping[str, Any]) -> Query:
    """Options of the address and of the body together.

    Raises:
        HTTPException: 422 for an option that is unknown, wrong or given twice.
    """
    if not fields:
        return query
    given = query.model_dump(exclude_unset=True)
    if twice := sorted(set(given) & set(fields)):
        raise refusal(422, f"{', '.join(twice)}: given in the address and in the body; give it once")
    try:
        return validate(Query, {**given, **fields})
    except InputError as error:
        raise refusal(422, str(error)) from None


def edit(fields: dict[str, Any]) -> dict[str, Any]:
    """Our options of an image edit's fields.

    Raises:
        HTTPException: 400 for a field that is not known here, or asks for what is not done here, by name.
    """
    done_here = {"n": ("1",), "response_format": ("b64_json",), "size": ("auto",), "output_format": tuple(MEDIA_TYPES)}
    for name, value in fields.items():
        if name not in (*done_here, "prompt", "model", "user", "seed"):
            raise refusal(400, f"unknown field {name!r}; known are image, prompt, seed, {', '.join(done_here)}")
        if name in done_here and str(value) not in done_here[name]:
            raise refusal(400, f"{name} is {value!r}; possible here: {', '.join(done_here[name])}")
    if not isinstance(fields.get("prompt"), str):
        raise refusal(400, "prompt is missing; it names the domain to translate to")
    ours = {"domain": fields["prompt"].strip(), "seed": fields.get("seed"), "format": fields.get("output_format")}
    return {name: value for name, value in ours.items() if value is not None}


def is_loopback(host: str) -> bool:
    """Whether only the machine itself is behind an address or a name."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Door:
    """Who may come in, and how often."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.left: dict[str, tuple[float, float]] = {}
        """Of each client: requests it may still send, and when that was counted."""

    def client(self, request: fastapi.Request) -> str:
        """The name of whoever asks.

        Raises:
            HTTPException: 401 without a right token, 403 from elsewhere while there are none, 429 too often.
        """
        tokens = self.settings.tokens
        if not tokens:
            host = request.client.host if request.client else ""
            if not (self.settings.arguments.open_to_all or not host or is_loopback(host)):
                raise refusal(403, "this endpoint serves its own machine only; start it with tokens_file=FILE")
            return host
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest() if scheme.lower() == "bearer" else ""
        name = ""
        for known, owner in tokens.items():  # all of them: the time tells nothing
            if hmac.compare_digest(known, digest):
                name = owner
        if not name:
            raise refusal(401, "a token is needed: Authorization: Bearer TOKEN", **{"WWW-Authenticate": "Bearer"})
        self._count(name)
        return name

    def _count(self, name: str) -> None:
        rate = self.settings.arguments.requests_per_minute
        if rate is None:
            return
        now = time.monotonic()
        left, since = self.left.get(name, (float(rate), now))
        left = min(left + (now - since) * rate / 60, float(rate))
        if left < 1:
            wait = max(int((1 - left) * 60 / rate) + 1, 1)
            raise refusal(
                429, f"more than {rate} requests a minute; try again in {wait} s", **{"Retry-After": str(wait)}
            )
        self.left[name] = (left - 1, now)


class Metrics:
    """What a Prometheus is told."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.seconds = prometheus_client.Histogram(
            "ddpm_request_seconds",
            "Time from a request to its answer",
            ["route", "status"],
            registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
        )
        self.model = prometheus_client.Gauge(
            "ddpm_model",
            "Of one copy of the model: what waits, what runs, rows and passes so far",
            ["what"],
            registry=self.registry,
        )


class Endpoint:
    """The work behind the routes."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend, self.settings = backend, settings
        self.config, self.arguments = settings.config, settings.arguments
        self.door, self.metrics = Door(settings), Metrics()
        self.bodies = 0

    async def order(
        self,
        request: fastapi.Request,
        query: Query,
        understood: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> tuple[Job, Query, Read]:
        """A request as the job that it asks for, its options, and its image.

        `understood`: makes our options of the fields of a body that speaks another language.

        Raises:
            HTTPException, InputError: what is wrong with it, in one line.
        """
        client = self.door.client(request)

        def asked(fields: dict[str, Any]) -> tuple[Query, Options]:
            whole = merged(query, understood(fields) if understood else fields)
            return whole, self.options(whole)

        early = None if holds_fields(request.headers) else asked({})  # what is wrong is said before a body is read
        if self.bodies >= MAX_BODIES:
            raise later(429, "too many requests are being sent")
        self.bodies += 1
        deadline = time.time() + self.arguments.timeout_s
        try:
            body = await read_body(request, self.arguments.max_body_bytes, self.arguments.body_timeout_s)
            sent = await parse_body(body, request.headers)
            del body
            query, options = early or asked(sent.fields)
            template = faces.template_of(self.config.data.landmarks, options.framing)
            read = await self.backend.read(sent.image, template, options.framing, deadline)
        finally:
            self.bodies -= 1
        return Job(read.views[0].pixels, options, client, deadline), query, read

    async def translated(self, job: Job, read: Read, *, first: int = 0) -> list[Done]:
        """What came of each view of a request from the `first` on; `job` is that of view 0.

        Raises:
            Full, Late, Unavailable, InputError: of any of them; the others are then given up.
        """
        jobs = [dataclasses.replace(job, image=view.pixels) for view in read.views[first:]]
        tasks = [asyncio.ensure_future(self.backend.translate(each)) for each in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def options(self, query: Query) -> Options:
        """Raises HTTPException 422, or 403 where the licence was not accepted."""
        licence = self.config.data.licence
        if NON_COMMERCIAL.search(licence) and not query.accept_licence:
            raise refusal(403, f"the training data's licence binds the results: {licence}; add accept_licence=true")
        try:
            return complete(query, self.config)
        except InputError as error:
            raise refusal(422, str(error)) from None

    async def encoded(self, job: Job, read: Read, dones: list[Done], kind: OutputFormat) -> bytes:
        """The answer's file: at the photo's own size, or the square.

        Raises:
            TimeoutError, Unavailable: nobody finishes it in time.
        """
        record = {
            "checkpoint": dones[0].checkpoint or self.settings.checkpoint,
            "licence": self.config.data.licence,
            **job.options.told(),
        }
        encode = functools.partial(marks.finish, record=record, kind=kind, key=self.settings.mark_key)
        if job.options.framing.output_size == "model":
            return await asyncio.to_thread(encode, dones[0].image)
        deadline = job.deadline if job.deadline is not None else math.inf
        return await self.backend.finish(read, [done.image for done in dones], encode, deadline)

    def headers(self, job: Job, read: Read, dones: list[Done], begun: float) -> dict[str, str]:
        done = max(dones, key=lambda each: each.queue_ms + each.model_ms)
        total_ms = (time.perf_counter() - begun) * 1000
        timing = f"queue;dur={done.queue_ms:.1f}, model;dur={done.model_ms:.1f}, total;dur={total_ms:.1f}"
        note = "; ".join(read.views[0].notes)
        cosines = [each.identity_cosine for each in dones if each.identity_cosine is not None]
        return {
            "X-Licence": header(self.config.data.licence),
            "X-Checkpoint": header(done.checkpoint or self.settings.checkpoint),
            "X-Options": json.dumps(job.options.told()),
            "X-Batch-Size": f"{done.batch_size:.1f}",
            "Server-Timing": timing,
            "Cache-Control": "no-store",
            **({"X-Identity-Cosine": f"{min(cosines):.4f}"} if cosines else {}),
            **({"X-Note": header(note)} if note else {}),
        }

    async def events(self, job: Job, kind: OutputFormat, read: Read, begun: float) -> AsyncIterator[bytes]:
        """Server-sent events: `preview` after each step of the first view, then `result`, or `error`."""
        steps = job.options.sampling.num_steps
        others = asyncio.ensure_future(self.translated(job, read, first=1))
        try:
            async with contextlib.aclosing(self.backend.stream(job)) as stream:  # type: ignore[type-var]
                async for each in stream:
                    if isinstance(each, Done):
                        dones = [each, *await others]
                        image = await self.encoded(job, read, dones, kind)
                        headers = self.headers(job, read, dones, begun)
                        yield _event("result", {"image": _data_url(image, kind), "headers": headers})
                    else:
                        image = await asyncio.to_thread(images.encode_png, each[1])
                        yield _event("preview", {"step": each[0], "steps": steps, "image": _data_url(image, "png")})
        except Exception as error:
            answer = failure(error)
            yield _event("error", {"status": answer.status_code, "detail": str(answer.detail)})
        finally:
            others.cancel()

    def describe(self) -> dict[str, Any]:
        """The checkpoint: what it is and may be used for."""
        config = self.config
        return {
            "checkpoint": self.settings.checkpoint,
            "image_size": config.image_size,
            "domains": list(self.settings.domains),
            "num_timesteps": config.diffusion.num_timesteps,
            "defaults": {**configs.to_dict(config.sampling), **configs.to_dict(Framing())},
            "options": {
                name: option
                for query in (SamplingQuery, FramingQuery)
                for name, option in query.model_json_schema()["properties"].items()
            },
            "licence": config.data.licence,
            "accept_licence": bool(NON_COMMERCIAL.search(config.data.licence)),
            "data": configs.to_dict(config.data),
            "max_body_bytes": self.arguments.max_body_bytes,
            "max_pixels": images.MAX_PIXELS,
            "timeout_s": self.arguments.timeout_s,
            "requests_per_minute": self.arguments.requests_per_minute,
            "formats": list(MEDIA_TYPES),
        }

    async def stats(self) -> Mapping[str, float] | None:
        """The model's, None where it does not answer in time."""
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(READY_S):
                return await self.backend.stats()
        return None


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _data_url(image: bytes, kind: OutputFormat) -> str:
    return f"data:{MEDIA_TYPES[kind]};base64,{base64.b64encode(image).decode()}"


def failure(error: Exception) -> starlette.exceptions.HTTPException:
    """Any failure of a request as the answer it gets; nothing of the machine's inside is told."""
    if isinstance(error, starlette.exceptions.HTTPException):
        return error
    if isinstance(error, faces.NoFaceError):
        return refusal(422, _line(error))
    if isinstance(error, InputError):
        return refusal(400, _line(error))
    if isinstance(error, Full):
        return later(429, "too many requests are waiting")
    if isinstance(error, (Late, TimeoutError)):
        return later(503, "it cannot be done in time")
    if isinstance(error, Unavailable):
        return later(503, "the model is restarting")
    return refusal(500, f"the endpoint failed ({type(error).__name__}); its log has the details")


def wanted_format(query: Query, request: fastapi.Request) -> OutputFormat:
    """What `format` says, else the first of our formats that Accept names, else png."""
    if query.format is not None:
        return query.format
    accepted = [part.partition(";")[0].strip() for part in request.headers.get("accept", "").split(",")]
    return next((kind for part in accepted for kind, media in MEDIA_TYPES.items() if media == part), "png")


# -- the application ------------------------------------------------------------------------------------------------

IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "string", "format": "binary"}},
                    "required": ["image"],
                    "description": "The file, and any of the options as further fields.",
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "string", "description": "base64, or a data: URL"}},
                    "required": ["image"],
                    "description": "The image, and any of the options as further keys.",
                }
            },
        },
    }
}
EDITS_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "prompt": {"type": "string", "description": "The domain to translate to."},
                        "seed": {"type": "integer", "minimum": 0, "maximum": configs.MAX_SEED},
                        "n": {"type": "integer", "enum": [1]},
                        "response_format": {"type": "string", "enum": ["b64_json"]},
                        "output_format": {"type": "string", "enum": list(MEDIA_TYPES)},
                    },
                    "required": ["image", "prompt"],
                }
            }
        },
    }
}
PROBLEM = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "status": {"type": "integer"}, "detail": {"type": "string"}},
}
REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/problem+json": {"schema": PROBLEM}}}
    for status, description in {
        400: "The image cannot be used.",
        401: "A token is needed.",
        403: "The licence was not accepted, or this client is not served.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        422: "An option is wrong, or there is no face.",
        429: "Too much waits; Retry-After says when to come back.",
        503: "No model, or not in time; Retry-After says when to come back.",
    }.items()
}
Options_ = Annotated[Query, fastapi.Query()]


def make(backend: Backend, settings: Settings) -> fastapi.FastAPI:
    """The application."""
    # FastAPI's interactive documentation loads its script from elsewhere: left out, the schema stays.
    api = fastapi.FastAPI(
        title="ddpm-translate", version="1", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json"
    )
    endpoint, page = Endpoint(backend, settings), PAGE.read_text(encoding="utf-8")
    _handle_failures(api)
    _watch(api, endpoint.metrics)

    @api.post(
        "/v1/translate",
        response_class=fastapi.Response,
        responses={200: {"content": {media: {} for media in MEDIA_TYPES.values()}}, **REFUSED},
        openapi_extra=IMAGE_BODY,
    )
    async def translate(request: fastapi.Request, query: Options_) -> fastapi.Response:
        """An image in, its translation out."""
        begun = time.perf_counter()
        job, query, read = await endpoint.order(request, query)
        kind = wanted_format(query, request)
        dones = await endpoint.translated(job, read)
        data = await endpoint.encoded(job, read, dones, kind)
        return fastapi.Response(data, media_type=MEDIA_TYPES[kind], headers=endpoint.headers(job, read, dones, begun))

    @api.post(
        "/v1/translate/stream",
        response_class=fastapi.responses.StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}, **REFUSED},
        openapi_extra=IMAGE_BODY,
    )
    async def translate_stream(request: fastapi.Request, query: Options_) -> fastapi.Response:
        """The same as server-sent events: `preview` after each step, then `result`, or `error`."""
        begun = time.perf_counter()
        job, query, read = await endpoint.order(request, query)
        events = endpoint.events(job, wanted_format(query, request), read, begun)
        return fastapi.responses.StreamingResponse(
            events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )

    @api.post("/v1/images/edits", responses=REFUSED, openapi_extra=EDITS_BODY)
    async def edits(request: fastapi.Request) -> dict[str, Any]:
        """The shape that many clients speak already: `prompt` names the domain, one image comes back in base64."""
        begun = time.perf_counter()
        job, query, read = await endpoint.order(request, Query(), edit)
        dones = await endpoint.translated(job, read)
        kind = query.format or "png"
        data = await endpoint.encoded(job, read, dones, kind)
        answer = [{"b64_json": base64.b64encode(data).decode()}]
        return {"created": int(time.time()), "data": answer, "headers": endpoint.headers(job, read, dones, begun)}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The checkpoint that is served, in a list."""
        return {"object": "list", "data": [{"id": settings.checkpoint, "object": "model", **endpoint.describe()}]}

    @api.get("/v1/model")
    async def describe_model() -> dict[str, Any]:
        """What the checkpoint is and may be used for."""
        return endpoint.describe()

    @api.get("/healthz", responses={503: REFUSED[503]})
    async def healthz() -> fastapi.Response:
        """Whether this endpoint can do what it is for: 503 where the model does not answer."""
        return await ready()

    @api.get("/readyz", responses={503: REFUSED[503]})
    async def ready() -> fastapi.Response:
        """Whether the model is loaded and answers."""
        if await endpoint.stats() is None:
            return problem(503, "the model does not answer", {"Retry-After": str(RETRY_AFTER_S)})
        return fastapi.responses.JSONResponse({"status": "ok", "checkpoint": settings.checkpoint})

    @api.get("/metrics", response_class=fastapi.responses.PlainTextResponse)
    async def metrics() -> fastapi.Response:
        """For a Prometheus."""
        for what, value in (await endpoint.stats() or {}).items():
            endpoint.metrics.model.labels(what).set(value)
        text = prometheus_client.generate_latest(endpoint.metrics.registry)
        return fastapi.Response(text, media_type="text/plain; version=0.0.4")

    @api.get("/", response_class=fastapi.responses.HTMLResponse)
    async def index() -> fastapi.Response:
        """The page."""
        return fastapi.responses.HTMLResponse(page, headers=PAGE_HEADERS)

    return api


def _handle_failures(api: fastapi.FastAPI) -> None:
    """Every failure becomes an answer: problem+json with one line."""

    async def wrong_option(request: fastapi.Request, error: Exception) -> fastapi.Response:
        assert isinstance(error, fastapi.exceptions.RequestValidationError)
        return problem(422, explain(error.errors()[0], Query))

    async def failed(request: fastapi.Request, error: Exception) -> fastapi.Response:
        answer = failure(error)
        detail = str(answer.detail)
        if answer.status_code == http.HTTPStatus.NOT_FOUND:
            detail = f"nothing at {request.url.path}; there are {', '.join(sorted(api.openapi()['paths']))}"
        if answer.status_code >= 500 and not isinstance(error, starlette.exceptions.HTTPException):
            logging.getLogger("ddpm_translate").error("request failed", exc_info=error)
        return problem(answer.status_code, detail, answer.headers)

    api.add_exception_handler(fastapi.exceptions.RequestValidationError, wrong_option)
    expected = (starlette.exceptions.HTTPException, InputError, Full, Late, Unavailable, TimeoutError)
    for kind in (*expected, Exception):
        api.add_exception_handler(kind, failed)


def _watch(api: fastapi.FastAPI, metrics: Metrics) -> None:
    """An id, safe headers, a line in the access log and a time in the metrics for each request."""

    @api.middleware("http")
    async def watched(
        request: fastapi.Request, answer_to: Callable[[fastapi.Request], Awaitable[fastapi.Response]]
    ) -> fastapi.Response:
        begun = time.perf_counter()
        given = request.headers.get("x-request-id", "")  # by Serve's proxy, which puts it into the answer as well
        name = given[:64] or secrets.token_hex(8)
        try:
            answer = await answer_to(request)
        except Exception as error:  # one that came after the answer had begun, or that no handler is for
            refused = failure(error)
            logging.getLogger("ddpm_translate").error("request %s failed", name, exc_info=error)
            answer = problem(refused.status_code, str(refused.detail), refused.headers)
        seconds = time.perf_counter() - begun
        route = getattr(request.scope.get("route"), "path", "other")
        metrics.seconds.labels(route, str(answer.status_code)).observe(seconds)
        access_log.info(
            json.dumps(
                {
                    "id": name,
                    "method": request.method,
                    "route": route,
                    "status": answer.status_code,
                    "s": round(seconds, 3),
                }
            )
        )
        if not given:
            answer.headers["X-Request-Id"] = name
        for key, value in SAFE_HEADERS.items():
            answer.headers.setdefault(key, value)
        return answer
