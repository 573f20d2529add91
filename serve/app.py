"""The endpoint: `serve run serve.app:build_app checkpoint=RUN`, then http://127.0.0.1:8000.

    client ── proxy ── Gateway (HTTP, images in and out) ── Model (all requests share the network's passes)

The gateway answers while the model is busy: the page, the health check, and 429 when too much waits.
"""

import asyncio
import http
import json
import os
import string
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import click
import fastapi
import fastapi.exceptions
import fastapi.responses
import numpy as np
import ray.exceptions
import ray.serve
import ray.serve.exceptions
import starlette.exceptions
import torch
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from ddpm_core import checkpoint, faces, images, storage
from ddpm_core import config as configs
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator

from .engine import Done, Engine, Full, Job, Late
from .schemas import Arguments, Options, Query, SamplingQuery, complete, explain, validate

RETRY_AFTER_S = 2
"""What a refused client is told to wait."""
PAGE = Path(__file__).parent / "page" / "index.html"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


class StartError(click.ClickException):
    """What `serve run`, a click program, prints as one line instead of a traceback."""

    exit_code = 2


@ray.serve.deployment(graceful_shutdown_timeout_s=30)
class Model:
    """One copy of the network: a thin shell around `engine.Engine`."""

    def __init__(self, arguments: Arguments) -> None:
        # Ray gives a worker as many threads as it reserved CPUs: on a laptop the other cores would idle.
        torch.set_num_threads(arguments.num_cpus or os.cpu_count() or 1)
        device = None if arguments.device == "auto" else arguments.device
        self.translator = Translator(
            checkpoint.load(arguments.checkpoint), device=device, precision=arguments.precision
        )
        rows = arguments.max_batch_size
        on_gpu = self.translator.device.type == "cuda"
        sizes = [2**i for i in range(rows.bit_length())] if on_gpu else []  # CPUs pay for every row
        self.engine = Engine(self.translator, max_rows=rows, max_waiting=arguments.queue_length, sizes=sizes)

    async def translate(self, job: Job) -> Done:
        return await self.engine.translate(job)

    def check_health(self) -> None:
        """A GPU that failed keeps failing: Ray then replaces this replica."""
        assert self.engine.thread.is_alive()
        if self.translator.device.type == "cuda":
            torch.ones(1, device=self.translator.device).item()


async def read_body(request: fastapi.Request, limit: int) -> bytes:
    """The request's body, refused as soon as it is known to be too large.

    Raises:
        HTTPException: 413.
    """
    too_large = fastapi.HTTPException(413, f"the image is larger than {limit / 1e6:g} MB; scale it down")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def later(status: int, reason: str) -> fastapi.HTTPException:
    wait = {"Retry-After": str(RETRY_AFTER_S)}
    return fastapi.HTTPException(status, f"{reason}; try again in {RETRY_AFTER_S} s", wait)


def prepare(data: bytes, size: int, template: tuple[float, ...]) -> tuple[np.ndarray, str]:
    """An image file as the square the model takes, and what its owner should know of it (mostly nothing).

    `template`: landmarks that its face is aligned to, () to take it as it is.

    Raises:
        InputError: it is not an image that can be used, or (NoFaceError) has no face.
    """
    if template:
        portrait = faces.read_portrait(data, size, template)
        return portrait.pixels, portrait.note
    photo = images.decode(data, square=size)
    return images.to_square(photo, size), "; ".join(photo.info["notes"])


def describe(config: ModelConfig, options: Options, done: Done, total_ms: float, note: str) -> dict[str, str]:
    """Response headers: licence, options used, time taken, and what `prepare` noted."""
    return {
        "X-Licence": header(config.data.licence),
        "X-Options": json.dumps(options.arguments()),
        "X-Batch-Size": f"{done.batch_size:.1f}",
        "Server-Timing": f"queue;dur={done.queue_ms:.1f}, model;dur={done.model_ms:.1f}, total;dur={total_ms:.1f}",
        "Cache-Control": "no-store",
        **({"X-Note": header(note)} if note else {}),
    }


def header(text: str) -> str:
    """`text` fit for an HTTP header: what is not plain ASCII is percent-encoded."""
    return urllib.parse.quote(text, safe=string.punctuation.replace("%", "") + " ")


def answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> fastapi.Response:
    return fastapi.responses.JSONResponse({"error": message}, status, dict(headers or {}))


# FastAPI's interactive documentation loads its script from elsewhere: left out, the schema stays.
# `ray.serve.ingress` copies `api` and all it refers to when the class below is made: that must stand above it.
api = fastapi.FastAPI(title="ddpm-translate", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")


@api.exception_handler(InputError)
async def wrong_input(request: fastapi.Request, error: InputError) -> fastapi.Response:
    return answer(400, str(error))


@api.exception_handler(fastapi.exceptions.RequestValidationError)
async def wrong_option(request: fastapi.Request, error: fastapi.exceptions.RequestValidationError) -> fastapi.Response:
    return answer(422, explain(error.errors()[0], Query))


@api.exception_handler(starlette.exceptions.HTTPException)
async def refused(request: fastapi.Request, error: starlette.exceptions.HTTPException) -> fastapi.Response:
    detail = str(error.detail)
    if error.status_code == http.HTTPStatus.NOT_FOUND:
        detail = f"nothing at {request.url.path}; there are {', '.join(sorted(request.app.openapi()['paths']))}"
    return answer(error.status_code, detail, error.headers)


@api.exception_handler(Exception)
async def failed(request: fastapi.Request, error: Exception) -> fastapi.Response:
    return answer(500, f"the endpoint failed ({type(error).__name__}); its log has the details")


@ray.serve.deployment(
    graceful_shutdown_timeout_s=30,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
    ray_actor_options={"num_cpus": 0},  # shares the machine with the model; beside it there is little to do
)
@ray.serve.ingress(api)
class Gateway:
    """HTTP: images are decoded and cut to the model's square here; the model only sees small arrays."""

    def __init__(self, model: DeploymentHandle, config: ModelConfig, path: str, max_body_bytes: int) -> None:
        self.model, self.config, self.path, self.max_body_bytes = model, config, path, max_body_bytes
        self.page = PAGE.read_text(encoding="utf-8")
        self.decoding = asyncio.Semaphore(2)  # `images.decode` bounds the pixels of both together

    @api.post(
        "/v1/translate",
        response_class=fastapi.Response,
        responses={200: {"content": {"image/png": {}}}},
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": {}}}},
    )
    async def translate(self, request: fastapi.Request, query: Annotated[Query, fastapi.Query()]) -> fastapi.Response:
        """An image as the body, its translation as PNG."""
        start = time.perf_counter()
        try:
            options = complete(query, self.config)
            template = faces.template_for(self.config.data.landmarks, query.align)
        except InputError as error:
            raise fastapi.HTTPException(422, str(error)) from None
        data = await read_body(request, self.max_body_bytes)
        async with self.decoding:
            try:
                square, note = await asyncio.to_thread(prepare, data, self.config.image_size, template)
            except faces.NoFaceError as error:
                raise fastapi.HTTPException(422, str(error)) from None
        del data
        try:
            done: Done = await self.model.translate.remote(Job(square, options))
        except (ray.serve.exceptions.BackPressureError, Full, Late):
            raise later(429, "too many requests are waiting") from None
        except (ray.exceptions.RayActorError, ray.serve.exceptions.DeploymentUnavailableError):
            raise later(503, "the model is restarting") from None
        png = await asyncio.to_thread(images.encode_png, done.image)
        total_ms = (time.perf_counter() - start) * 1000
        headers = describe(self.config, options, done, total_ms, note)
        return fastapi.Response(png, media_type="image/png", headers=headers)

    @api.get("/v1/model")
    async def describe_model(self) -> dict[str, Any]:
        """What the checkpoint is and may be used for."""
        return {
            "checkpoint": self.path,
            "image_size": self.config.image_size,
            "domains": list(self.config.target_domains or self.config.domains),
            "num_timesteps": self.config.diffusion.num_timesteps,
            "defaults": configs.to_dict(self.config.sampling),
            "options": SamplingQuery.model_json_schema()["properties"],
            "licence": self.config.data.licence,
            "data": configs.to_dict(self.config.data),
            "max_body_bytes": self.max_body_bytes,
        }

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/", response_class=fastapi.responses.HTMLResponse)
    async def index(self) -> fastapi.Response:
        return fastapi.responses.HTMLResponse(self.page, headers=PAGE_HEADERS)


def build_app(args: dict[str, Any]) -> ray.serve.Application:
    """The application, for `serve run` and `serve deploy`.

    Raises:
        StartError: a wrong argument or checkpoint, in one line.
    """
    try:
        arguments = validate(Arguments, args)
        path = storage.absolute(arguments.checkpoint, flag="checkpoint")
        config = checkpoint.load(path).config
    except (InputError, OSError) as error:
        raise StartError(str(error)) from None
    arguments = arguments.model_copy(update={"checkpoint": path})
    held = arguments.max_batch_size + arguments.queue_length
    """Requests at one replica, at work or waiting; Ray's own queue only has to take those on their way there."""
    capacity = held * arguments.num_replicas
    model = Model.options(  # type: ignore[attr-defined]
        num_replicas=arguments.num_replicas,
        max_ongoing_requests=held,
        max_queued_requests=capacity,
        ray_actor_options={"num_cpus": arguments.num_cpus or 1, "num_gpus": arguments.replica_gpus},
    ).bind(arguments)
    # Wider than the model's queue, so that pages and health checks are answered while the model refuses.
    gateway = Gateway.options(  # type: ignore[attr-defined]
        max_ongoing_requests=capacity + 64, max_queued_requests=capacity + 64
    )
    return gateway.bind(model, config, path, arguments.max_body_bytes)
