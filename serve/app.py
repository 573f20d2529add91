"""The endpoint: `serve run serve.app:build_app checkpoint=RUN`, then http://127.0.0.1:8000.

    client ── proxy ── Gateway (HTTP: api.make) ──┬── Reader (files to squares, and back)
                                                  └── Model (all requests share the network's passes: engine.Engine)

The gateway only passes bytes on: it answers while images are decoded, faces are looked for and the model is busy. The
checkpoint is resolved once, here; another one comes by `serve deploy` or `serve run` again.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import click
import fastapi
import numpy as np
import ray
import ray.exceptions
import ray.serve
import ray.serve.exceptions
import torch
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from torch import nn

from ddpm_core import checkpoint, full_size, keyed_mark, nets, storage
from ddpm_core.config import Framing, ModelConfig
from ddpm_core.errors import InputError
from ddpm_core.full_size import View
from ddpm_core.translator import Translator

from . import api
from .api import Read, Settings, Unavailable
from .engine import Done, Engine, Full, Job, Late
from .schemas import Arguments, validate

T = TypeVar("T")
GRACE_S = 5.0
"""A model that does not answer so long after a request's time is over is taken for dead."""


class StartError(click.ClickException, ray.serve.exceptions.RayServeException):
    """What `serve run`, a click program, prints as one line, and `serve status` after `serve deploy`, too: of its own
    errors Ray Serve tells the text, of others the traceback."""

    exit_code = 2


class Pinned(NamedTuple):
    """The checkpoint that an application is of, whatever its run finds better afterwards."""

    folder: str
    ema: float | None
    fingerprint: str
    config: ModelConfig

    @property
    def name(self) -> str:
        """Its place in its run, and which weights."""
        return f"{'/'.join(self.folder.rstrip('/').split('/')[-3:])}@{self.fingerprint[:12]}"

    def load(self) -> checkpoint.Checkpoint:
        """Raises InputError where the folder holds other weights by now."""
        loaded = checkpoint.load(self.folder, ema=self.ema)
        if loaded.fingerprint != self.fingerprint:
            raise InputError(
                f"{self.folder} holds other weights than when this application was started; deploy it again"
            )
        return dataclasses.replace(loaded, config=self.config)


def likeness(net: nn.Module, device: str, source: np.ndarray, result: np.ndarray) -> float:
    """As `nets.likeness`, of two squares."""
    return float(nets.likeness(net, source[None], result[None], device=device)[0])


@ray.serve.deployment(graceful_shutdown_timeout_s=60)
class Model:
    """One copy of the network: a thin shell around an engine."""

    def __init__(self, arguments: Arguments, pinned: Pinned) -> None:
        # Ray gives a worker as many threads as it reserved CPUs: on a laptop the other cores would idle.
        torch.set_num_threads(arguments.num_cpus or os.cpu_count() or 1)
        device = None if arguments.device == "auto" else arguments.device
        self.translator = Translator(pinned.load(), device=device, precision=arguments.precision)
        rows, side = arguments.max_batch_size, pinned.config.image_size
        on_gpu = self.translator.device.type == "cuda"
        sizes = [2**i for i in range(rows.bit_length())] if on_gpu else []  # CPUs pay for every row
        domain = (pinned.config.target_domains or pinned.config.domains)[0]
        for size in sizes or [1]:  # the first pass of a size is slow: nobody is to wait for it
            self.translator(np.zeros((size, side, side, 3), np.uint8), domain)
        net = nets.identity_net(arguments.identity_net).module if arguments.identity_net else None
        self.engine = Engine(
            self.translator,
            max_rows=rows,
            max_waiting=arguments.queue_length,
            sizes=sizes,
            checkpoint=pinned.name,
            likeness=functools.partial(likeness, net, str(self.translator.device)) if net else None,
        )

    async def translate(self, job: Job) -> Done:
        return await self.engine.translate(job)

    async def stream(self, job: Job) -> AsyncIterator[tuple[int, np.ndarray] | Done]:
        async with contextlib.aclosing(self.engine.stream(job)) as steps:  # type: ignore[type-var]
            async for step in steps:
                yield step

    async def stats(self) -> Mapping[str, float]:
        return self.engine.stats()

    def check_health(self) -> None:
        """A GPU that failed keeps failing: Ray then replaces this replica."""
        assert self.engine.thread.is_alive()
        if self.translator.device.type == "cuda":
            torch.ones(1, device=self.translator.device).item()


@ray.serve.deployment(
    graceful_shutdown_timeout_s=30,
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=1000,
    max_surge_percent=100,
)
class Reader:
    """Image files to squares, and photos with the squares' changes to files, in a process of its own: decoding and
    looking for faces hold up nobody, and a decoder that dies takes nothing with it."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    async def look(self, data: bytes, size: int, template: tuple[float, ...], framing: Framing) -> list[View]:
        look = functools.partial(full_size.look, output_size=framing.output_size, which=framing.faces)
        return await asyncio.to_thread(look, data, size, template)

    async def finish(
        self, data: bytes, views: list[View], results: list[np.ndarray], encode: Callable[[np.ndarray], bytes]
    ) -> bytes:
        return await asyncio.to_thread(full_size.finish, data, views, results, encode)


class RayBackend:
    """The other deployments, with their failures in our words."""

    def __init__(self, model: DeploymentHandle, reader: DeploymentHandle, size: int) -> None:
        self.model, self.reader, self.size = model, reader, size

    async def read(self, data: bytes, template: tuple[float, ...], framing: Framing, deadline: float) -> Read:
        own = framing.output_size == "own"
        file = ray.put(data) if own else data  # its memory is shared, and bounded: disk takes the rest
        views = await _asked(lambda: self.reader.look.remote(file, self.size, template, framing), deadline)
        return Read(views, file if own else None)

    async def finish(
        self, read: Read, results: list[np.ndarray], encode: Callable[[np.ndarray], bytes], deadline: float
    ) -> bytes:
        return await _asked(lambda: self.reader.finish.remote(read.file, read.views, results, encode), deadline)

    async def translate(self, job: Job) -> Done:
        return await _asked(lambda: self.model.translate.remote(job), job.deadline)

    async def stream(self, job: Job) -> AsyncIterator[tuple[int, np.ndarray] | Done]:
        with _in_our_words():
            steps = aiter(self.model.options(stream=True).stream.remote(job))
            while True:
                async with _until(job.deadline):  # not around the yield, where others' time passes
                    step = await anext(steps, None)
                if step is None:
                    return
                yield step

    async def stats(self) -> Mapping[str, float]:
        return await _asked(lambda: self.model.stats.remote())


async def _asked(ask: Callable[[], Awaitable[T]], deadline: float | None = None) -> T:
    """The answer of a deployment, asked again once where a replica died over it: nothing of it has been sent yet."""
    for last in (False, True):
        response = ask()
        try:
            with _in_our_words():
                async with _until(deadline):
                    return await response
        except Unavailable:
            if last:
                raise
        except (asyncio.CancelledError, TimeoutError):
            response.cancel()  # type: ignore[attr-defined]  # nobody waits any more: its places are free
            raise
    raise AssertionError


def _until(deadline: float | None) -> asyncio.Timeout:
    """Raises TimeoutError a little after that time: whoever has not answered by then is dead."""
    return asyncio.timeout(None if deadline is None else max(deadline - time.time(), 0) + GRACE_S)


@contextlib.contextmanager
def _in_our_words() -> Any:
    try:
        yield
    except ray.serve.exceptions.BackPressureError:
        raise Full from None
    except (ray.exceptions.RayActorError, ray.serve.exceptions.DeploymentUnavailableError) as error:
        raise Unavailable from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (InputError, Full, Late)):
            raise cause from None
        raise


@ray.serve.deployment(
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 0},  # shares the machine with the model; beside it there is little to do
    max_surge_percent=100,
    max_ongoing_requests=10_000,  # it bounds what it takes itself, and answers the others at once
)
@ray.serve.ingress()
class Gateway:
    """HTTP."""

    def __init__(self, model: DeploymentHandle, reader: DeploymentHandle, settings: Settings) -> None:
        check_listening(settings.arguments)  # `serve run` builds the application before it joins a Serve that runs
        self.settings = settings
        api.access_log.setLevel(logging.INFO)  # Ray shows warnings only
        api.access_log.addHandler(logging.StreamHandler())
        self.backend = RayBackend(model, reader, settings.config.image_size)

    def __serve_build_asgi_app__(self) -> fastapi.FastAPI:
        return api.make(self.backend, self.settings)


def read_tokens(uri: str | None) -> dict[str, str]:
    """SHA-256 of each token to its owner's name, of a file with a line `NAME SHA256` for each.

    Raises:
        InputError: there is no such file, or a line is none of these.
    """
    if uri is None:
        return {}
    uri = storage.absolute(uri, flag="tokens_file")
    try:
        lines = storage.read_bytes(uri).decode().splitlines()
    except FileNotFoundError:
        raise InputError(f"tokens_file {uri}: no such file") from None
    tokens = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not re.fullmatch("[0-9a-fA-F]{64}", words[1]):
            raise InputError(
                f"{uri}, line {number}: write NAME and the SHA-256 of its token (printf %s TOKEN | sha256sum)"
            )
        tokens[words[1].lower()] = words[0]
    if not tokens:
        raise InputError(f"{uri} has no token; write lines of NAME and SHA-256")
    return tokens


def check_listening(arguments: Arguments) -> None:
    """Raises InputError where Ray Serve runs and listens to other machines, and nothing says who may come."""
    if arguments.tokens_file or arguments.open_to_all or not ray.is_initialized():
        return  # Serve that is started for this application listens to its own machine
    client = _get_global_client(raise_if_no_controller_running=False)
    host = client.http_config.host if client else None
    if host is not None and not api.is_loopback(host):
        raise InputError(
            f"Ray Serve listens on {host}, where other machines can reach it: give tokens_file=FILE, or "
            "open_to_all=true behind a proxy that decides who may come"
        )


def with_identity_net(arguments: Arguments) -> Arguments:
    """Its address as every node reads it.

    Raises:
        InputError: nothing there, or nothing that returns embeddings.
    """
    if arguments.identity_net is None:
        return arguments
    uri = storage.absolute(arguments.identity_net, flag="identity_net")
    try:
        nets.identity_net(uri)
    except InputError as error:
        raise InputError(f"identity_net: {error}") from None
    return arguments.model_copy(update={"identity_net": uri})


def build_app(args: dict[str, Any]) -> ray.serve.Application:
    """The application, for `serve run` and `serve deploy`.

    Raises:
        StartError: a wrong argument or checkpoint, in one line.
    """
    try:
        arguments = validate(Arguments, args)
        check_listening(arguments)
        arguments = with_identity_net(arguments)
        loaded = checkpoint.load(storage.absolute(arguments.checkpoint, flag="checkpoint"))
        tokens, mark_key = read_tokens(arguments.tokens_file), keyed_mark.read_key(arguments.mark_key)
    except (InputError, OSError) as error:
        raise StartError(str(error)) from None
    pinned = Pinned(loaded.path, loaded.ema, loaded.fingerprint, loaded.config)
    held = arguments.max_batch_size + arguments.queue_length
    """Requests at one replica, at work or waiting; Ray's own queue only has to take those on their way there."""
    model = Model.options(  # type: ignore[attr-defined]
        **arguments.scaling,
        max_ongoing_requests=held + 16,  # and whoever asks how it is
        max_queued_requests=held * (arguments.max_replicas or arguments.num_replicas),
        max_surge_percent=arguments.max_surge_percent,
        ray_actor_options={"num_cpus": arguments.num_cpus or 1, "num_gpus": arguments.replica_gpus},
    ).bind(arguments, pinned)
    settings = Settings(arguments, loaded.config, pinned.name, tokens, mark_key)
    return Gateway.bind(model, Reader.bind(), settings)  # type: ignore[attr-defined]
