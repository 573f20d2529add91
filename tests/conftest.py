"""What the tests share: one Ray, one S3 server and one cluster of several nodes a session, small data sets; marks."""

import atexit
import contextlib
import functools
import inspect
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import greenlet
import jaxtyping
import jaxtyping._storage
import pytest

os.environ.update(
    OMP_NUM_THREADS="1",  # networks this small lose by threads
    RAY_worker_niceness="0",  # by default Ray's workers get what everybody else leaves
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
    RAY_TRAIN_COLLECTIVE_TIMEOUT_S="300",
    RAY_DATA_USE_DATASOURCE_V2="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    AWS_EC2_METADATA_DISABLED="true",
)  # before ray is imported

CHECKED: set[Any] = set()
"""Calls whose shapes are checked already."""


def checked_once(typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped`; the same function with arguments of the same types, shapes and numbers is checked once.
    A step of a sampler is like the one before, and to check it takes longer than to compute it."""

    def decorate(function: Any) -> Any:
        checked = jaxtyped(typechecker=typechecker)(function)
        if inspect.isclass(function):
            return checked

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            key = (function, *map(alike, args), *options, *map(alike, options.values()))
            if key in CHECKED:
                return function(*args, **options)
            found = checked(*args, **options)
            CHECKED.add(key)
            return found

        return call

    return decorate


def alike(value: Any) -> Any:
    """What a check makes of an argument: arrays by shape and type, plain values by what they are, others by type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return type(value), value.shape, value.dtype
    if isinstance(value, bool | int | str):
        return type(value), value
    return (type(value), *map(alike, value)) if isinstance(value, list | tuple) else type(value)


jaxtyped, jaxtyping.jaxtyped = jaxtyping.jaxtyped, checked_once
jaxtyping.install_import_hook("ddpm_core", "beartype.beartype")  # the shapes in annotations are checked in tests


class ByGreenlet:
    """The shapes of calls under way, which jaxtyping keeps by thread: a step loop has several of them in one."""

    stacks: ClassVar[weakref.WeakKeyDictionary[greenlet.greenlet, list[Any]]] = weakref.WeakKeyDictionary()

    @property
    def memo_stack(self) -> list[Any]:
        return self.stacks.setdefault(greenlet.getcurrent(), [])


jaxtyping._storage._shape_storage = ByGreenlet()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background: commands would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

# decoded images: not among the user's own
os.environ["DDPM_TRANSLATE_CACHE"] = tempfile.mkdtemp(prefix="ddpm-translate-tests-")
atexit.register(shutil.rmtree, os.environ["DDPM_TRANSLATE_CACHE"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "prepare",
    "train",
    "sweep",
    "evaluate",
    "translate",
    "experiments",
    "recipe",
    "benchmark",
    "runs",
    "verify",
)
"""Thin entry points, `python -m jobs.NAME`; nothing but tests and benchmarks imports them."""
if "DDPM_TESTS_ON_RAY" not in os.environ:  # this is the process that gives the others their work
    os.environ["DDPM_TESTS_ON_RAY"] = tempfile.mkdtemp(prefix="ddpm-translate-tests-")
    atexit.register(shutil.rmtree, os.environ["DDPM_TESTS_ON_RAY"], ignore_errors=True)
ON_RAY = Path(os.environ["DDPM_TESTS_ON_RAY"], "tests")
"""Names of the tests that need Ray, as the processes that have collected them tell the one that has not."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


RARE = {
    "cluster": "a cluster from cluster/local.sh",
    "nodes": "a cluster of three nodes, which are killed",
    "page": "a browser",
    "database": "MLflow's server",
}
"""Fixtures whose tests run in `make test-all` only."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks from the fixtures that a test uses. Of the two processes of `make test` one runs all that needs Ray, on the
    one Ray that it starts, the other the rest, file by file, beginning with those on a cluster of their own."""
    for item in items:
        used = {*getattr(item, "fixturenames", ())}
        if used & RARE.keys():
            item.add_marker("slow")
        if used & {"ray_cluster", "nodes"}:
            item.add_marker("ray")

    def turn(item: pytest.Item) -> int:
        """What takes longest is begun first."""
        return 0 if item.get_closest_marker("ray") else 1 if "cluster" in getattr(item, "fixturenames", ()) else 2

    items.sort(key=turn)
    ON_RAY.write_text("\n".join(item.nodeid for item in items if item.get_closest_marker("ray")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out all tests on Ray as one queue, the others file by file. (xdist's own groups do nothing with pytest 9.2,
    whose names of tests cannot be changed.)"""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid in self.on_ray else super()._split_scope(nodeid)

        @functools.cached_property
        def on_ray(self) -> set[str]:
            return {*ON_RAY.read_text().splitlines()}

    return Scheduling(config, log)


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Variables of the process set for a while; None: taken away."""
    before = {name: os.environ.get(name) for name in values}

    def put(found: dict[str, str | None]) -> None:
        for name, value in found.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@pytest.fixture
def signals() -> Iterator[None]:
    """The signals taken as a command takes them."""
    from jobs.common import stopping

    # whoever started the tests may have had one ignored (nohup)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in stopping.SIGNALS}
    stopping.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stopping._installed = False


@pytest.fixture(scope="session")
def ray_cluster(s3_address: "S3Server") -> Iterator[None]:
    """One Ray for the session: four logical CPUs, so that Train workers never take all of them from Ray Data.

    Its workers stay when they are idle. They do not import torch beforehand: of the ten actors of a training one needs
    it. They know the S3 server, which is started for the first test that asks for it. Ray Train needs a dashboard
    (without one it takes its controller for dead), so there is one.
    """
    import logging

    import ray
    import ray.data

    port = free_port()
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: Ray puts unix sockets below it
    workers = {
        "RAY_idle_worker_killing_time_threshold_ms": "120000",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}",
        "PYTHONPATH": str(ROOT),
        **s3_address.env,
    }
    with environment(**workers):  # not as a runtime_env: that would make new processes of those that wait
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=True,
            dashboard_port=port,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().use_datasource_v2 = False
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def nodes(s3: "S3Server") -> Iterator[Any]:
    """Three Ray nodes of one CPU; two workers leave one node spare. A test that kills one adds another."""
    from chaos import Nodes

    with Nodes() as nodes:
        nodes.add()
        nodes.add()
        yield nodes


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny network with random weights, as a checkpoint: day and night at 16 px, two steps."""
    import torch

    from ddpm_core import checkpoint
    from ddpm_core.config import ModelConfig, SamplingConfig, UNetConfig
    from ddpm_core.unet import UNet

    config = ModelConfig(
        image_size=16,
        domains=("day", "night"),
        unet=UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attn_resolutions=(16,),
            condition_channels=32,
        ),
        sampling=SamplingConfig(num_steps=2),
    )
    torch.manual_seed(0)
    model = UNet(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the zero-initialised branches too: every part takes part
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("checkpoint")
    for name, data in checkpoint.files(model.state_dict(), config).items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_gradients(str(tmp_path_factory.mktemp("data") / "gradients"))


def write_gradients(folder: str) -> str:
    """A small paired data set: 48 gradients of 16 px by day, dimmed and blue by night."""
    import numpy as np

    from jobs.datasets import writing
    from jobs.datasets.format import DatasetCard, Row

    def rows(split: str, count: int) -> Iterator[Row]:
        random = np.random.default_rng(len(split))
        ramp = np.linspace(0, 1, 16)
        for i in range(count):
            corners = random.uniform(0, 255, (2, 2, 3))
            day = np.einsum("y,x,c->yxc", 1 - ramp, 1 - ramp, corners[0, 0]) + np.einsum(
                "y,x,c->yxc", ramp, ramp, corners[1, 1]
            )
            night = (day * [0.2, 0.3, 0.5]).astype(np.uint8)
            yield Row(
                id=f"{split}-{i:03d}", domain=0, image=day.astype(np.uint8), target=night, target_id=f"{split}-{i:03d}"
            )

    card = DatasetCard(
        name="gradients",
        licence="CC0",
        source="drawn by the tests",
        image_size=16,
        encoding="raw",
        domains=("day", "night"),
        pairing="paired",
    )
    writing.write_dataset(folder, {"train": rows("train", 32), "val": rows("val", 8), "test": rows("test", 8)}, card)
    return folder


class S3Server:
    """SeaweedFS with one fresh bucket. `rw` may do anything, `ro` may only read and list."""

    CREDENTIALS: ClassVar = {"rw": ("rw-key", "rw-secret-0123456789"), "ro": ("ro-key", "ro-secret-0123456789")}

    def __init__(self, folder: Path) -> None:
        self.folder, self.bucket = folder, "pictures"
        self.ports = dict(zip(("s3", "master", "volume", "filer", "admin"), _paired_ports(5), strict=True))
        self.uri = f"s3://{self.bucket}"
        self.env = self.environment("rw")
        self.process: subprocess.Popen[bytes] | None = None
        identities = [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
            for (name, (key, secret)), actions in zip(
                self.CREDENTIALS.items(), (["Admin", "Read", "Write", "List", "Tagging"], ["Read", "List"]), strict=True
            )
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def environment(self, user: str, secret: str | None = None) -> dict[str, str]:
        """AWS_* variables for `rw` or `ro`, with the right secret unless another is given."""
        key, right = self.CREDENTIALS[user]
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret or right,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3']}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start, or start again on the same files; returns when it answers."""
        ports = [f"-{name}.port={port}" for name, port in self.ports.items()]
        command = ["-logtostderr=true", "mini", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0"]
        command += ["-s3.port.lance=0", "-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        weed = Path(sys.executable).with_name("weed")
        self.process = subprocess.Popen(
            [str(weed), *command, *ports, f"-s3.config={self.folder / 's3.json'}"],
            env={**clean, "GOMEMLIMIT": "300MiB"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "log").open("ab"),
        )
        self._wait()

    def _wait(self) -> None:
        import pyarrow.fs

        key, secret = self.CREDENTIALS["rw"]
        once = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1)
        client = pyarrow.fs.S3FileSystem(
            access_key=key,
            secret_key=secret,
            endpoint_override=self.env["AWS_ENDPOINT_URL"],
            allow_bucket_creation=True,
            connect_timeout=1,
            request_timeout=5,
            retry_strategy=once,
        )
        until = time.monotonic() + 120
        while True:
            try:
                for bucket in (self.bucket, "health"):
                    client.create_dir(bucket)
                if client.get_file_info("health/alive").is_file:  # started again: what was written can be read
                    client.open_input_file("health/alive").read()
                with client.open_output_stream("health/alive") as stream:
                    stream.write(b"alive")
                return
            except OSError:
                assert self.process is not None
                assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, as when the machine goes."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def revoked(self) -> Iterator[None]:
        """Started again on the same files, but the credentials of `rw` are no longer good."""
        config, known = self.folder / "s3.json", dict(self.CREDENTIALS)
        before = config.read_text()
        self.kill()
        config.write_text(before.replace("rw-key", "new-key"))
        self.CREDENTIALS["rw"] = ("new-key", known["rw"][1])
        self.start()
        try:
            yield
        finally:
            self.kill()
            config.write_text(before)
            self.CREDENTIALS.update(known)
            self.start()


def _paired_ports(count: int) -> list[int]:
    """Free ports P such that P + 10000, which SeaweedFS also binds, is free."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20000, 45000)
        if port not in found and all(_is_free(number) for number in (port, port + 10000)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="session")
def s3_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Where the S3 server will answer, once a test asks for `s3`."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    if server.process is not None:
        server.kill()


@pytest.fixture(scope="session")
def s3(s3_address: S3Server) -> Iterator[S3Server]:
    """A real S3 server; AWS_* are set for the session. Write below `s3.uri` under a prefix of the test's own."""
    s3_address.start()
    with environment(**s3_address.env):
        yield s3_address


@pytest.fixture(scope="module")
def own_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that may be killed: nobody else uses it."""
    server = S3Server(tmp_path_factory.mktemp("own-s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def prefix(own_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in own_s3.env.items():
        monkeypatch.setenv(name, value)
    return f"{own_s3.uri}/{uuid.uuid4().hex}"
