"""The endpoint: what is refused and how, which images share a pass, and the real thing on Ray Serve."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from conftest import ROOT, S3Server, free_port
from dashboards import needs_prometheus, prometheus, queries
from PIL import Image

from ddpm_core import checkpoint, full_size, images, storage
from ddpm_core import config as configs
from ddpm_core.config import Framing, ModelConfig, OutputSize, SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator
from jobs.common import cli
from jobs.translation.options import TranslateArgs
from serve import api, app
from serve.schemas import Arguments, Options, Query, complete, validate

PLAIN = SamplingConfig(num_steps=2, guidance_scale=1.0)


def png(seed: int = 0, size: tuple[int, int] = (40, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return images.encode_png(pixels)


def test_arguments_are_typed_and_unknown_ones_refused() -> None:
    arguments = validate(Arguments, {"checkpoint": "runs/demo", "max_batch_size": "4"})  # `serve run` passes strings
    assert arguments.max_batch_size == 4
    assert arguments.replica_gpus == 0
    assert validate(Arguments, {"checkpoint": "x", "device": "cuda"}).replica_gpus == 1
    with pytest.raises(InputError, match=r"unknown option 'max_batchsize' \(did you mean 'max_batch_size'\?\)"):
        validate(Arguments, {"checkpoint": "x", "max_batchsize": "4"})
    with pytest.raises(InputError, match="checkpoint is missing; give checkpoint=VALUE"):
        validate(Arguments, {})
    with pytest.raises(InputError, match=r"^max_replicas is 1; it must be at least num_replicas, 2$"):
        validate(Arguments, {"checkpoint": "x", "num_replicas": "2", "max_replicas": "1"})
    with pytest.raises(InputError, match="num_replicas is '0': input should be greater than or equal to 1"):
        validate(Arguments, {"checkpoint": "x", "num_replicas": "0"})


def test_options_are_completed_from_the_checkpoint() -> None:
    config = ModelConfig(domains=("day", "night"), target_domains=("night",))
    assert complete(Query(), config) == Options("night", 0, SamplingConfig())
    given: dict[str, Any] = {"sampler": "dpm_solver", "domain_guidance_scale": 2.0, "start": "sdedit", "strength": 0.5}
    assert complete(Query(**given), config).sampling == SamplingConfig(**given)
    with pytest.raises(InputError, match=r"^strength has no effect with start noise"):
        complete(Query(strength=0.5), config)
    gan = ModelConfig(domains=("day", "night"), target_domains=("night",), method="pix2pix")
    assert complete(Query(num_steps=50), gan) == complete(Query(), gan)  # the page sends what it was given
    with pytest.raises(InputError, match="num_steps: no effect on pix2pix"):
        complete(Query(num_steps=7), gan)
    assert complete(Query(guidance_scale=0, num_steps=7), config).sampling.guidance_scale == 0
    with pytest.raises(InputError, match=r"domain is missing; add \?domain= with one of day, night"):
        complete(Query(), ModelConfig(domains=("day", "night")))
    with pytest.raises(InputError, match="'day' is not produced by this checkpoint; known are: night"):
        complete(Query(domain="day"), config)
    with pytest.raises(InputError, match=r"^num_steps is 1001; .* must not exceed num_timesteps = 1000"):
        complete(Query(num_steps=1001), config)


OTHER_OPTIONS: dict[str, Any] = {
    "sampler": "ddpm",
    "num_steps": 7,
    "spacing": "leading",
    "eta": 0.5,
    "guidance_scale": 2.5,
    "domain_guidance_scale": 2.0,
    "guidance_interval": (0.2, 0.8),
    "guidance_rescale": 0.5,
    "start": "sdedit",
    "strength": 0.5,
}
"""Every sampling option, and a value that is not its default."""


def test_every_sampling_option_is_a_flag_of_translate_and_an_option_of_the_endpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [field.name for field in dataclasses.fields(SamplingConfig)] == list(OTHER_OPTIONS)
    command = ["--checkpoint", "x", "--input", "x", "--output", "x", "--domain", "night"]
    for name, value in OTHER_OPTIONS.items():
        flag = [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
        assert getattr(cli.parse(TranslateArgs, [*command, *flag], prog="jobs.translate").sampling, name) == value
        assert getattr(validate(Query, {name: value}), name) == value
    for name, value in {"align": "none", "faces": "all", "output_size": "model"}.items():
        flag = f"--{name.replace('_', '-')}"
        args = cli.parse(TranslateArgs, [*command, flag, value], prog="jobs.translate")
        assert getattr(args.framing, name) == value
        assert getattr(validate(Query, {name: value}), name) == value
        assert getattr(validate(Query, {}), name) == getattr(Framing(), name)
    with pytest.raises(SystemExit):
        cli.parse(TranslateArgs, ["--help"], prog="jobs.translate")
    assert "Of ddim: 0 deterministic, 1 ancestral." in capsys.readouterr().out


def test_a_wrong_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="no checkpoint here") as caught:
        app.build_app({"checkpoint": str(tmp_path / "nowhere")})
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    with pytest.raises(click.ClickException, match="checkpoint gs://x/y: scheme gs:// is not supported"):
        app.build_app({"checkpoint": "gs://x/y"})


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"checkpoint": "checkpoints/7"}', '{"checkpoint": 7}'])
def test_a_broken_best_json_is_one_line(content: str, checkpoint_folder: str, tmp_path: Path) -> None:
    copy(checkpoint_folder, str(tmp_path))
    (tmp_path / "best.json").write_text(content)
    with pytest.raises(app.StartError) as caught:
        app.build_app({"checkpoint": str(tmp_path)})
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_serve_run_ends_with_that_line_and_no_traceback(tmp_path: Path) -> None:
    serve = Path(sys.executable).parent / "serve"
    command = [str(serve), "run", "serve.app:build_app", f"checkpoint={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"Error: {tmp_path}: no checkpoint here")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost", None])
@pytest.mark.parametrize("public", ["0.0.0.0", "::", "", "10.1.2.3", "a.org"])
def test_who_may_come_is_said_before_other_machines_are_listened_to(
    host: str | None, public: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = types.SimpleNamespace(http_config=types.SimpleNamespace(host=host))
    monkeypatch.setattr(app.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(app, "_get_global_client", lambda raise_if_no_controller_running: running)
    app.check_listening(validate(Arguments, {"checkpoint": "x"}))
    running.http_config.host = public
    for more in ({"tokens_file": "tokens"}, {"open_to_all": "true"}):
        app.check_listening(validate(Arguments, {"checkpoint": "x", **more}))
    with pytest.raises(app.StartError, match=f"^Ray Serve listens on {public}, .*: give tokens_file=FILE") as caught:
        app.build_app({"checkpoint": "x"})
    assert "\n" not in str(caught.value)


ODD_KEY = "a run/%20 #1%"
"""A key whose spaces, % and # mean themselves."""


@pytest.fixture(scope="module")
def run_in_a_bucket(s3: S3Server, checkpoint_folder: str) -> str:
    uri = f"{s3.uri}/serve/{ODD_KEY}"
    copy(checkpoint_folder, uri)
    return uri


def copy(checkpoint_folder: str, run: str) -> None:
    """A run whose best checkpoint this is."""
    for path in Path(checkpoint_folder).iterdir():
        storage.write_bytes(f"{run}/checkpoints/1/{path.name}", path.read_bytes())
    storage.write_bytes(f"{run}/best.json", b'{"checkpoint": "checkpoints/1"}')


def test_relative_paths_mean_the_folder_serve_run_was_started_in(
    tmp_path: Path, checkpoint_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(checkpoint_folder, str(tmp_path / ODD_KEY))
    monkeypatch.chdir(tmp_path)
    assert isinstance(app.build_app({"checkpoint": ODD_KEY}), app.ray.serve.Application)


def test_what_a_bucket_does_not_give_is_one_line(run_in_a_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(app.build_app({"checkpoint": run_in_a_bucket}), app.ray.serve.Application)
    nothing = run_in_a_bucket.replace("%20", " ")
    with pytest.raises(click.ClickException, match="no checkpoint here") as caught:
        app.build_app({"checkpoint": nothing})
    assert caught.value.message.startswith(nothing)
    with pytest.raises(click.ClickException, match=r"^s3://no-such-bucket/run"):
        app.build_app({"checkpoint": "s3://no-such-bucket/run"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(click.ClickException, match="access denied; check AWS_ACCESS_KEY_ID") as caught:
        app.build_app({"checkpoint": run_in_a_bucket})
    assert "\n" not in caught.value.message


@pytest.mark.slow
def test_a_server_that_went_away_is_waited_for_and_then_given_up_with_one_line(
    own_s3: S3Server, prefix: str, checkpoint_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(checkpoint_folder, prefix)
    app.build_app({"checkpoint": prefix})
    monkeypatch.setattr(storage, "OUTAGE_S", 2.0)
    own_s3.kill()
    try:
        begun = time.monotonic()
        with pytest.raises(click.ClickException, match="S3 server cannot be reached; check AWS_ENDPOINT_URL") as caught:
            app.build_app({"checkpoint": prefix})
        assert "\n" not in caught.value.message
        assert 0.5 < time.monotonic() - begun < 30
    finally:
        own_s3.start()


def test_a_header_carries_any_licence() -> None:
    text = "CC BY 4.0 — “Müller” 100 %\r\nX-Evil: 1"
    assert api.header(text).isascii()
    assert "\n" not in api.header(text)
    assert urllib.parse.unquote(api.header(text)) == text
    assert api.header("CC-BY 4.0 (see https://x.org/a?b)") == "CC-BY 4.0 (see https://x.org/a?b)"


@pytest.mark.parametrize("output_size", ["own", "model"])
def test_an_odd_image_is_taken_with_a_note_or_refused_in_one_line(output_size: OutputSize) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x00\x01\x09\0\x01\0\0\0\xfb\xff\xff\xff\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    files = {kind: io.BytesIO() for kind in ("JPEG", "AVIF", "PNG")}
    Image.new("RGB", (64, 64)).save(files["JPEG"], "JPEG", exif=exif + bytes(4))
    Image.new("RGB", (64, 64), (200, 60, 40)).save(files["AVIF"], "AVIF")
    Image.new("RGBA", (64, 64)).save(files["PNG"], "PNG")
    [view] = full_size.look(files["JPEG"].getvalue(), 16, output_size=output_size)
    assert (view.pixels.shape, view.notes) == ((16, 16, 3), (images.EXIF_IGNORED,))
    for data in (files["AVIF"].getvalue()[:-36] + bytes(36), files["PNG"].getvalue()):
        with pytest.raises(InputError, match=r"image: (truncated or corrupt|fully transparent)"):
            full_size.look(data, 16, output_size=output_size)


def test_a_body_without_length_is_refused_where_it_grows_too_large() -> None:
    taken = 0

    class Endless:
        def __init__(self) -> None:
            self.headers: dict[str, str] = {}

        async def stream(self):  # type: ignore[no-untyped-def]
            nonlocal taken
            while True:
                taken += 1000
                yield b"x" * 1000

    with pytest.raises(api.fastapi.HTTPException) as caught:
        asyncio.run(api.read_body(Endless(), 5_000, 100.0))  # type: ignore[arg-type]
    assert caught.value.status_code == 413
    assert taken == 6_000


@pytest.fixture(scope="module")
def endpoint(ray_cluster: None, run_in_a_bucket: str) -> Iterator[str]:
    import ray.serve

    port = free_port()
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {"checkpoint": run_in_a_bucket, "device": "cpu", "precision": "fp32", "max_batch_size": "4"}
    ray.serve.run(app.build_app({**args, "max_body_mb": "2"}))
    yield f"http://127.0.0.1:{port}"
    ray.serve.shutdown()


def test_a_image_in_a_image_out(endpoint: str, checkpoint_folder: str) -> None:
    """The endpoint gives what the library gives for the same image, options and seed."""
    query = {
        "domain": "night",
        "guidance_scale": 2,
        "num_steps": 3,
        "sampler": "ddpm",
        "seed": 5,
        "guidance_rescale": 0.5,
    }
    answer = httpx.post(f"{endpoint}/v1/translate", params=query, content=png(), timeout=300)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert len(answer.headers.get_list("x-request-id")) == 1
    assert json.loads(answer.headers["x-options"]) == {
        **configs.to_dict(SamplingConfig()),
        **query,
        "output_size": "own",
    }
    assert answer.headers["x-licence"] == "unknown"
    assert "model;dur=" in answer.headers["server-timing"]
    result = np.asarray(Image.open(io.BytesIO(answer.content)))

    translator = Translator(checkpoint.load(checkpoint_folder), device="cpu", precision="fp32")
    photo = Image.open(io.BytesIO(png()))
    (expected,) = translator.at_own_size(
        [photo], "night", guidance_scale=2.0, num_steps=3, sampler="ddpm", seed=5, guidance_rescale=0.5
    )
    assert result.shape == (photo.height, photo.width, 3)
    assert np.abs(result.astype(int) - expected.astype(int)).max() <= 2


def test_images_sent_together_share_passes_whatever_their_options(endpoint: str) -> None:
    def send(i: int) -> tuple[bytes, int]:
        query = {"domain": "night", "num_steps": 20 + i % 2, "output_size": "model"}
        answer = httpx.post(f"{endpoint}/v1/translate", params=query, content=png(i // 2), timeout=300)
        assert json.loads(answer.headers["x-options"])["num_steps"] == 20 + i % 2
        return answer.content, float(answer.headers["x-batch-size"])

    alone = [send(i)[0] for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(send, range(8)))
    assert max(size for _, size in together) > 1
    for (data, _), reference in zip(together, alone, strict=True):
        difference = np.asarray(Image.open(io.BytesIO(data)), int) - np.asarray(Image.open(io.BytesIO(reference)), int)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("query", "body", "status", "message"),
    [
        ("domain=night", b"no image", 400, "image: not an image"),
        ("domain=nigth", png(), 422, "did you mean 'night'?"),
        ("domain=night&start=sdedit&strength=0.01", png(), 422, "strength is 0.01"),
        ("domain=night", b"x" * 2_000_001, 413, "larger than 2 MB"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(endpoint: str, query: str, body: bytes, status: int, message: str) -> None:
    answer = httpx.post(f"{endpoint}/v1/translate?{query}", content=body, timeout=300)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert message in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


def test_steps_are_shown_as_they_come(endpoint: str) -> None:
    url = f"{endpoint}/v1/translate/stream?domain=night&num_steps=5"
    with httpx.stream("POST", url, content=png(), timeout=300) as answer:
        names = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    assert names == ["preview"] * 5 + ["result"]


def test_who_hangs_up_frees_the_model(endpoint: str) -> None:
    def model(what: str) -> float:
        text = httpx.get(f"{endpoint}/metrics", timeout=300).text
        return next(
            (float(x.split()[1]) for x in text.splitlines() if x.startswith(f'ddpm_model{{what="{what}"}}')), 0.0
        )

    before = model("cancelled")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{endpoint}/v1/translate?domain=night&num_steps=1000", content=png(), timeout=2)
    deadline = time.monotonic() + 300
    while model("cancelled") <= before and model("running"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert model("cancelled") == before + 1


def test_a_body_announced_too_large_is_refused_before_it_is_sent(endpoint: str) -> None:
    address = urllib.parse.urlsplit(endpoint)
    with socket.create_connection((address.hostname, address.port), timeout=300) as connection:
        lines = ["POST /v1/translate?domain=night HTTP/1.1", f"Host: {address.netloc}", "Content-Length: 999999999"]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413
        assert "2 MB" in json.loads(response.read())["detail"]


def test_the_other_addresses(endpoint: str) -> None:
    model = httpx.get(f"{endpoint}/v1/model").json()
    assert model["domains"] == ["day", "night"]
    assert model["image_size"] == 16
    framing = {"align": "auto", "faces": "largest", "output_size": "own"}
    assert model["defaults"] == {**configs.to_dict(SamplingConfig(num_steps=2)), **framing}
    assert model["licence"] == "unknown"
    assert set(model["options"]) == {*OTHER_OPTIONS, *framing}
    assert model["options"]["sampler"]["anyOf"][0]["enum"] == ["ddpm", "ddim", "dpm_solver"]
    schema = httpx.get(f"{endpoint}/v1/openapi.json").json()["paths"]["/v1/translate"]["post"]["parameters"]
    described = {parameter["name"]: parameter["description"] for parameter in schema}
    assert set(described) == {*OTHER_OPTIONS, *framing, "domain", "seed", "format", "accept_licence"}
    assert described["eta"] == "Of ddim: 0 deterministic, 1 ancestral."
    assert httpx.get(f"{endpoint}/healthz").json()["status"] == "ok"
    page = httpx.get(endpoint)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    wrong = httpx.get(f"{endpoint}/v2/translate")
    assert wrong.status_code == 404
    assert "/v1/translate" in wrong.json()["detail"]
    assert httpx.get(f"{endpoint}/v1/translate").status_code == 405


@pytest.mark.slow
def test_many_who_announce_a_body_and_send_one_byte_hold_up_nobody(endpoint: str) -> None:
    address = urllib.parse.urlsplit(endpoint)
    lines = ["POST /v1/translate?domain=night HTTP/1.1", f"Host: {address.netloc}", "Content-Length: 1000000", "", "x"]

    def post() -> int:
        return httpx.post(f"{endpoint}/v1/translate?domain=night", content=png(), timeout=300).status_code

    with contextlib.ExitStack() as stack:
        for _ in range(150):
            connection = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=300))
            connection.sendall("\r\n".join(lines).encode())
        until(lambda: post() == 429)  # all places for bodies are taken: it is told so at once
        assert httpx.get(f"{endpoint}/healthz", timeout=60).status_code == 200
    until(lambda: post() == 200)


@pytest.mark.slow
def test_overload_is_answered_429_with_retry_after(endpoint: str, checkpoint_folder: str) -> None:
    """One image at a time, one that may wait: of twelve at once some are refused, the others served."""
    import ray.serve

    args = {
        "checkpoint": checkpoint_folder,
        "device": "cpu",
        "max_batch_size": "1",
        "max_queued_requests": "1",
    }
    ray.serve.run(app.build_app(args), name="narrow", route_prefix="/narrow")

    def send(i: int) -> httpx.Response:
        query = {"domain": "night", "num_steps": 60}
        return httpx.post(f"{endpoint}/narrow/v1/translate", params=query, content=png(i), timeout=300)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(send, range(12)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.headers["retry-after"] == "2" for answer in refused)
    assert "try again" in refused[0].json()["detail"]
    ray.serve.delete("narrow")


@pytest.mark.slow
def test_a_replica_killed_under_load_costs_nobody_an_answer(endpoint: str, checkpoint_folder: str) -> None:
    """Its requests are asked again of the other, or refused with 503; none is answered wrongly."""
    import ray.serve

    args = {"checkpoint": checkpoint_folder, "device": "cpu", "precision": "fp32", "num_replicas": "2"}
    ray.serve.run(app.build_app(args), name="pair", route_prefix="/pair")

    def send(i: int) -> httpx.Response:
        query = {"domain": "night", "num_steps": 30, "seed": i}
        return httpx.post(f"{endpoint}/pair/v1/translate", params=query, content=png(i % 3), timeout=300)

    right = [send(i).content for i in range(6)]
    victim = replicas("pair")[0]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(send, i % 6) for i in range(48)]
        time.sleep(1)
        victim.kill()
        found = [each.result() for each in answers]
    assert {answer.status_code for answer in found} <= {200, 503}
    assert sum(answer.status_code == 200 for answer in found) >= 40
    for i, answer in enumerate(found):
        if answer.status_code == 200:
            one, other = (np.asarray(Image.open(io.BytesIO(data)), int) for data in (answer.content, right[i % 6]))
            assert np.abs(one - other).max() <= 1
    ray.serve.delete("pair")


def replicas(application: str, deployment: str = "Model") -> list[psutil.Process]:
    """The processes of a deployment."""
    title = f"ray::ServeReplica:{application}:{deployment}"
    found = psutil.process_iter(["cmdline"])
    return [each for each in found if " ".join(each.info["cmdline"] or []).startswith(title)]


def until(true: Any) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), int)


class Load:
    """Clients that ask again as soon as they are answered, until the block ends; a refusal is waited for."""

    def __init__(self, address: str, clients: int, **query: Any) -> None:
        self.address, self.query = address, {"domain": "night", **query}
        self.answers: list[tuple[int, int, str, bytes]] = []
        """Image, status, checkpoint and body of each."""
        self.stop, self.pool = threading.Event(), concurrent.futures.ThreadPoolExecutor(clients)
        self.clients = clients

    def __enter__(self) -> "Load":
        self.running = [self.pool.submit(self._client, number) for number in range(self.clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.pool.shutdown()
        for client in self.running:
            client.result()

    def _client(self, number: int) -> None:
        with httpx.Client(timeout=300) as http:
            while not self.stop.is_set():
                number = (number + 1) % 4
                answer = http.post(f"{self.address}/v1/translate", params=self.query, content=png(number))
                body = answer.content if answer.status_code == 200 else answer.text.encode()
                self.answers.append((number, answer.status_code, answer.headers.get("x-checkpoint", ""), body))
                if answer.status_code == 429:
                    self.stop.wait(float(answer.headers["retry-after"]) / 4)


@pytest.mark.slow
def test_a_better_checkpoint_is_rolled_out_under_load_and_a_broken_one_never_serves(
    endpoint: str, checkpoint_folder: str, tmp_path: Path
) -> None:
    import ray.serve

    run = tmp_path / "run"
    copy(checkpoint_folder, str(run))
    args = {"checkpoint": str(run), "device": "cpu", "precision": "fp32"}

    def deploy(wait: bool = True) -> None:
        application = app.build_app(args)
        if not wait:  # between its check and the start of the new copies
            (run / "checkpoints/3/model.safetensors").unlink()
        target = ray.serve.RunTarget(application, name="roll", route_prefix="/roll")
        ray.serve.run_many([target], wait_for_applications_running=wait)

    def better(number: int, seed: int) -> None:
        """Other weights, which the run finds best."""
        old, folder = run / "checkpoints/1", run / f"checkpoints/{number}"
        tensors = safetensors.torch.load((old / "model.safetensors").read_bytes())
        torch.manual_seed(seed)
        changed = {name: each + 0.01 * torch.randn_like(each) for name, each in tensors.items()}
        config = checkpoint.load(str(old)).config
        folder.mkdir()
        for name, data in checkpoint.files(changed, config).items():
            (folder / name).write_bytes(data)
        (run / "best.json").write_text(json.dumps({"checkpoint": f"checkpoints/{number}"}))

    def expected() -> tuple[str, list[np.ndarray]]:
        made = [httpx.post(f"{endpoint}/roll/v1/translate?domain=night&num_steps=20", content=png(i)) for i in range(4)]
        return made[0].headers["x-checkpoint"], [pixels(each.content) for each in made]

    deploy()
    right = dict([expected()])
    with Load(f"{endpoint}/roll", 6, num_steps=20) as load:
        better(2, seed=2)
        deploy()
        until(lambda: len(replicas("roll")) == 1)
        count = len(load.answers)
        until(lambda: len(load.answers) > count + 20)
    right.update([expected()])
    assert len(right) == 2
    assert {status for _, status, _, _ in load.answers} == {200}
    assert {name for _, _, name, _ in load.answers} == right.keys()
    for number, _, name, body in load.answers:
        assert np.abs(pixels(body) - right[name][number]).max() <= 1

    served = expected()[0]
    better(3, seed=3)
    with Load(f"{endpoint}/roll", 2, num_steps=20) as load:
        deploy(wait=False)
        until(lambda: ray.serve.status().applications["roll"].status in ("DEPLOY_FAILED", "UNHEALTHY"))
        count = len(load.answers)
        until(lambda: len(load.answers) > count + 20)
    assert {(status, name) for _, status, name, _ in load.answers} == {(200, served)}
    assert "model.safetensors" in str(ray.serve.status().applications["roll"])
    ray.serve.delete("roll")


@pytest.mark.slow
def test_where_no_copy_can_start_again_requests_are_refused_in_time(
    endpoint: str, checkpoint_folder: str, tmp_path: Path
) -> None:
    """The checkpoint is gone, and then the replica dies."""
    import ray.serve

    run = tmp_path / "run"
    copy(checkpoint_folder, str(run))
    args = {"checkpoint": str(run), "device": "cpu", "timeout_s": "5"}
    ray.serve.run(app.build_app(args), name="gone", route_prefix="/gone")
    url = f"{endpoint}/gone"
    assert httpx.get(f"{url}/readyz", timeout=300).status_code == 200
    (run / "checkpoints/1/model.safetensors").unlink()
    replicas("gone")[0].kill()
    until(lambda: httpx.get(f"{url}/readyz", timeout=60).status_code == 503)
    for path in ("translate", "translate/stream"):
        begun = time.monotonic()
        answer = httpx.post(f"{url}/v1/{path}?domain=night", content=png(), timeout=60)
        assert answer.status_code == 503 or '"status": 503' in answer.text
        assert time.monotonic() - begun < 50
    assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 200  # the rest of it lives
    until(lambda: "model.safetensors" in str(ray.serve.status().applications["gone"]))
    ray.serve.delete("gone")


@pytest.mark.slow
def test_twice_as_many_as_can_be_served_get_right_answers_or_429_from_ever_the_same_memory(
    endpoint: str, checkpoint_folder: str
) -> None:
    """Copies of the model come with the load and go after it. DDPM_SOAK_S: for so many seconds (make soak)."""
    import ray.serve

    args = {"checkpoint": checkpoint_folder, "device": "cpu", "precision": "fp32", "max_batch_size": "4"}
    scaling = {"max_replicas": "2", "upscale_delay_s": "2", "downscale_delay_s": "4"}
    ray.serve.run(app.build_app({**args, **scaling, "max_queued_requests": "4"}), name="soak", route_prefix="/soak")
    query = {"num_steps": 30, "guidance_scale": 2}
    url, params = f"{endpoint}/soak/v1/translate", {"domain": "night", **query}
    right = [pixels(httpx.post(url, params=params, content=png(i), timeout=300).content) for i in range(4)]
    assert len(replicas("soak")) == 1

    def memory() -> int:
        names = ("Model", "Reader", "Gateway")
        return sum(each.memory_info().rss for name in names for each in replicas("soak", name))

    with Load(f"{endpoint}/soak", 32, **query) as load:
        until(lambda: len(replicas("soak")) == 2)
        until(lambda: ray.serve.status().applications["soak"].deployments["Model"].status == "HEALTHY")
        count = len(load.answers)
        until(lambda: sum(answer[1] == 200 for answer in load.answers[count:]) > 60)  # all of it is warm
        before = memory()
        time.sleep(float(os.environ.get("DDPM_SOAK_S", "120")))
        after = memory()
    assert {status for _, status, _, _ in load.answers} == {200, 429}
    for number, status, _, body in load.answers:
        assert status == 429 or np.abs(pixels(body) - right[number]).max() <= 1
    assert after < before + 30 * 2**20
    until(lambda: len(replicas("soak")) == 1)
    assert httpx.post(url, params=params, content=png(), timeout=300).status_code == 200
    ray.serve.delete("soak")


@pytest.mark.slow
@needs_prometheus
def test_every_panel_of_the_endpoints_dashboard_shows_something(endpoint: str, tmp_path: Path) -> None:
    target = {"targets": [urllib.parse.urlsplit(endpoint).netloc]}
    with prometheus(tmp_path, "endpoint", static_configs=[target]) as shows, Load(endpoint, 2, num_steps=20):
        until(lambda: all(map(shows, queries("endpoint.json"))))
    assert len(queries("endpoint.json")) >= 8
