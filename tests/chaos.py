"""What befalls training in a week on spot machines, done on purpose, and what comes of it.

    python tests/chaos.py [row ...]    all, or those of these names, which are the keys of FAULTS; `make chaos`

Prints a table for docs/results.md and exits with 1 if a row did not end as it should. Real parts throughout: Ray nodes
(each a tree of processes with a cache of its own), an S3 server, a small disk, network namespaces. `test_train_faults`
uses the same parts for what the suite tests.
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from conftest import ROOT, S3Server, free_port, write_gradients

from ddpm_core import storage
from jobs.training import run_folder

RAY = Path(sys.executable).with_name("ray")
EPOCHS = 200
SMOKE = ["--preset", "smoke", "--precision", "fp32", "--global-batch-size", "24", "--validate-every-epochs", "1000"]
"""A step is an epoch, so that the metrics tell of each; 24 images can be shared by one, two and three workers."""
OFTEN, NEVER = ["--checkpoint-every-minutes", "0.003"], ["--checkpoint-every-minutes", "60"]
_SAID_ANYWAY = ("train:", "read ", "workers were lost", "\x1b[33m(raylet)", "\t(")
TOLERANCE = 1e-3
"""Of weights after EPOCHS steps, where the number of workers was another and sums were rounded in another order."""


# ------------------------------------------------------------------------------------------- a run and its processes


class Training:
    """`jobs.train` as a process of its own."""

    def __init__(self, run: str, data: str, *flags: str, env: dict[str, str] | None = None, network: str = "") -> None:
        self.run = run
        self.told = tempfile.NamedTemporaryFile(prefix="told")  # noqa: SIM115 as long as this object
        command = [sys.executable, "-m", "jobs.train", *SMOKE, "--data", data, "--output", run, *flags]
        environment = {**os.environ, **(env or {})}
        self.process = subprocess.Popen(
            [*inside(network), *command], cwd=ROOT, env=environment, stdout=self.told, stderr=self.told
        )

    @property
    def saved(self) -> int:
        """Step of the newest checkpoint."""
        return run_folder.latest_checkpoint(self.run)[0]

    @property
    def reached(self) -> int:
        """The last step that the run's metrics tell of."""
        return reached(self.run)

    def wait(self, done: Callable[[], bool], what: str, within_s: float = 500) -> None:
        deadline = time.monotonic() + within_s
        while not done():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{what}: not so after {within_s} s, or ended before: {self.lines()}")
            time.sleep(0.05)

    def wait_for(self, step: int, within_s: float = 500) -> None:
        """Until there is a checkpoint of `step` or later."""
        self.wait(lambda: self.saved >= step, f"a checkpoint of step {step}", within_s)

    def lines(self) -> list[str]:
        """What a user saw, without the progress and what Ray says of processes that died."""
        lines = Path(self.told.name).read_text(errors="replace").splitlines()
        return [line for line in lines if line and not line.startswith(_SAID_ANYWAY)]

    def end(self, within_s: float = 400) -> tuple[int, list[str]]:
        """Exit code and what was said."""
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {within_s} s: {self.lines()}") from None
        return self.process.returncode, self.lines()

    def finish(self) -> None:
        code, lines = self.end()
        assert code == 0, lines

    def kill(self) -> None:
        """kill -9 of the driver; a Ray that it started dies with it."""
        self.process.kill()
        self.process.wait()


def reached(run: str) -> int:
    """The last step that a run's metrics tell of; 0 before the first."""
    try:
        return storage.read_json_lines(storage.join(run, "metrics.jsonl"))[-1]["step"]
    except FileNotFoundError:
        return 0


def workers(*roots: int) -> list[psutil.Process]:
    """The training workers among the descendants of these processes."""
    found = []
    for root in roots:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(root).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.cmdline()[:1] and "RayTrainWorker" in child.cmdline()[0]:
                        found.append(child)
    return found


def kill_tree(root: int) -> None:
    """kill -9 of a process and all below it at once, as when a machine loses power."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        for sent in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: no one sees the other die
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(sent)
        psutil.wait_procs(tree, timeout=10)


def inside(network: str) -> list[str]:
    """What comes before a command to run it in a network namespace."""
    return ["ip", "netns", "exec", network] if network else []


# ------------------------------------------------------------------------------------------------------ Ray nodes


class Nodes:
    """Ray nodes on this machine, each with processes and a cache of its own, in namespaces also a network."""

    def __init__(self, *, cpus: int = 1, networks: dict[str, str] | None = None, **more: str) -> None:
        """`networks`: the address of a node in each namespace, the head's first. `more`: environment."""
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: Ray puts unix sockets below it
        self.cpus, self.networks = cpus, networks or {}
        self.port, dashboard = free_port(), free_port()
        self.host = next(iter(self.networks.values()), "127.0.0.1")
        self.env = {
            "RAY_ADDRESS": f"{self.host}:{self.port}",
            "RAY_API_SERVER_ADDRESS": f"http://{self.host}:{dashboard}",
            "PYTHONPATH": str(ROOT),
            **more,
        }
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.add(
            "--head", f"--port={self.port}", f"--dashboard-port={dashboard}", "--include-dashboard=true",
            f"--dashboard-host={self.host}", f"--temp-dir={self.folder}/ray",
        )  # fmt: skip

    def add(self, *flags: str) -> subprocess.Popen[bytes]:
        """One node more; returns when the cluster has it."""
        number = len(self.nodes)
        network, address = ([*self.networks.items()][number : number + 1] or [("", "")])[0]
        command = [
            str(RAY), "start", "--block", "--disable-usage-stats", f"--num-cpus={self.cpus}",
            f"--object-store-memory={100 * 2**20}", f"--dashboard-agent-listen-port={free_port()}",
            "--min-worker-port=0", "--max-worker-port=0", f"--labels=node=n{number}",
            *([f"--node-ip-address={address}"] if address else []),
            *(flags or [f"--address={self.host}:{self.port}"]),
        ]  # fmt: skip
        env = {**os.environ, **self.env, "DDPM_TRANSLATE_CACHE": f"{self.folder}/cache-{number}"}
        for name in ("RAY_ADDRESS",):
            env.pop(name)
        log = Path(self.folder, f"node-{number}.log")
        with log.open("wb") as told:
            node = subprocess.Popen([*inside(network), *command], env=env, stdout=told, stderr=told)
        self.nodes.append(node)
        deadline = time.monotonic() + 300
        while b"Ray runtime started" not in log.read_bytes():
            if node.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"node {number} does not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        return node

    def with_worker(self) -> list[subprocess.Popen[bytes]]:
        """The nodes, without the head, that a training worker runs on."""
        return [node for node in self.nodes[1:] if workers(node.pid)]

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        kill_tree(node.pid)
        node.wait()

    def id(self, node: subprocess.Popen[bytes]) -> str:
        """Ray's name of the node."""
        rows = json.loads(self.ray("list", "nodes", "--format=json", "--detail"))
        return next(row["node_id"] for row in rows if row["labels"].get("node") == f"n{self.nodes.index(node)}")

    def drain(self, node: subprocess.Popen[bytes], within_s: int) -> None:
        """What a spot market's notice comes to: the node will be gone in so many seconds."""
        self.ray(
            "drain-node", f"--address={self.env['RAY_ADDRESS']}", f"--node-id={self.id(node)}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot",
            f"--deadline-remaining-seconds={within_s}",
        )  # fmt: skip

    def ray(self, *command: str) -> str:
        network = next(iter(self.networks), "")
        done = subprocess.run(
            [*inside(network), str(RAY), *command], env={**os.environ, **self.env}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)


# ----------------------------------------------------------------------------------------------- what came of it


@dataclasses.dataclass
class Row:
    """A line of the table."""

    fault: str
    outcome: str
    resumed: str
    """Step that training went on from."""
    lost: str
    """Steps that were computed again."""
    weights: str
    """At the end, beside those of a run without the fault."""
    seconds: float
    """From the fault until training was further than before, or had ended."""


class Lab:
    """An S3 server, a data set on it, and what a run without faults comes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.s3 = S3Server(folder)
        self.s3.start()
        os.environ.update(self.s3.env)
        self.local, self.data = write_gradients(str(folder / "gradients")), f"{self.s3.uri}/gradients"
        for name in storage.list_files(self.local):
            storage.write_bytes(f"{self.data}/{name}", storage.read_bytes(f"{self.local}/{name}"))
        self.count = 0
        self.whole = str(folder / "whole")
        self.train(self.whole, *NEVER).end()

    def train(self, run: str = "", *flags: str, workers: str = "2", data: str = "", **more: Any) -> Training:
        """A run of EPOCHS steps, on S3 unless told where."""
        self.count += 1
        return Training(
            run or f"{self.s3.uri}/run-{self.count}", data or self.data,
            "--num-workers", workers, "--epochs", str(EPOCHS), *flags, **more,
        )  # fmt: skip

    def weights(self, run: str) -> str:
        """How the end of a run compares."""
        apart = difference(run, self.whole)
        assert apart <= TOLERANCE, apart
        return "bit for bit" if apart == 0 else f"within {apart:.0e}"


def struck(training: Training, strike: Callable[[], Any]) -> tuple[int, int, float]:
    """Do it, and wait until training has gone on past the step it had reached.

    Returns the step it went on from, the steps lost, and the seconds it took.
    """
    before, begun = len(attempts_of(training.run)), time.monotonic()
    reached = training.reached
    strike()

    def taken_up() -> bool:
        nonlocal reached
        reached = max(reached, training.reached)
        return len(attempts_of(training.run)) > before

    training.wait(taken_up, "goes on")
    training.wait(lambda: training.reached > reached, "goes on")
    resumed = attempts_of(training.run)[-1]["step"]
    return resumed, reached - resumed, time.monotonic() - begun


def attempts_of(run: str) -> list[dict[str, Any]]:
    """From which step, and with how many workers, each process group of a run began."""
    try:
        return storage.read_json(storage.join(run, "environment.json")).get("attempts", [])
    except FileNotFoundError:
        return []


def told(training: Training, within_s: float = 400) -> str:
    """What a run that could not go on said, in one line."""
    code, lines = training.end(within_s)
    errors = [line for line in lines if not line.startswith("warning:")]
    assert code in (1, 2), (code, lines)
    assert len(errors) == 1, lines
    return f"exit {code}: {errors[0].replace(training.run, 'RUN')}"


def difference(run: str, other: str) -> float:
    """Largest difference between the weights, averages and optimisers of two runs at their ends; 0.0 is bit for bit."""
    (step, one), (other_step, two) = (run_folder.latest_checkpoint(uri) for uri in (run, other))
    assert step == other_step, (step, other_step)
    files = (storage.read_bytes(f"{folder}/train_state/state.pt") for folder in (one, two))
    states = [torch.load(io.BytesIO(file), weights_only=True) for file in files]
    return max(_difference(*(state[name] for state in states)) for name in ("model", "optimizer", "ema"))


def _difference(one: Any, two: Any) -> float:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        return max((_difference(one[key], two[key]) for key in one), default=0.0)
    if isinstance(one, list | tuple):
        assert len(one) == len(two)
        return max((_difference(*pair) for pair in zip(one, two, strict=True)), default=0.0)
    if isinstance(one, torch.Tensor):
        return 0.0 if torch.equal(one, two) else float((one.double() - two.double()).abs().max())
    assert one == two, (one, two)
    return 0.0


# ----------------------------------------------------------------------------------------------------- the faults


def workers_killed(lab: Lab) -> Row:
    training = lab.train("", *OFTEN, "--max-failures", "5")
    found = []
    for least in sorted(random.sample(range(10, EPOCHS // 2), 5)):
        training.wait_for(max(least, training.saved + 1))
        found.append(struck(training, lambda: random.choice(workers(training.process.pid)).kill()))
    training.finish()
    resumed, lost, seconds = zip(*found, strict=True)
    return Row(
        "kill -9 of one of two workers, five times at random steps", "goes on", listed(resumed), listed(lost),
        lab.weights(training.run), max(seconds),
    )  # fmt: skip


def driver_killed(lab: Lab) -> Row:
    training = lab.train("", *OFTEN)
    training.wait_for(random.randrange(10, EPOCHS // 2))
    kill_tree(training.process.pid)
    begun, reached = time.monotonic(), training.reached
    again = lab.train(training.run, *OFTEN)
    again.wait(lambda: again.reached > reached, "goes on")
    seconds = time.monotonic() - begun
    again.finish()
    resumed = attempts_of(again.run)[-1]["step"]
    return Row(
        "kill -9 of the driver and its Ray; the same command again", "goes on", str(resumed), str(reached - resumed),
        lab.weights(again.run), seconds,
    )  # fmt: skip


def node_killed(lab: Lab) -> Row:
    with Nodes() as nodes:
        nodes.add()
        nodes.add()
        training = lab.train("", *OFTEN, env=nodes.env)
        training.wait_for(random.randrange(10, EPOCHS // 2))
        resumed, lost, seconds = struck(training, lambda: nodes.kill(nodes.with_worker()[0]))
        training.finish()
    return Row(
        "one of three nodes loses power", "goes on on the two left", str(resumed), str(lost),
        lab.weights(training.run), seconds,
    )  # fmt: skip


def node_taken_with_notice(lab: Lab) -> Row:
    with Nodes() as nodes:
        nodes.add()
        nodes.add()
        training = lab.train("", *NEVER, env=nodes.env)
        training.wait(lambda: training.reached > 2, "trains")
        leaving = nodes.with_worker()[0]
        resumed, lost, seconds = struck(training, lambda: taken(nodes, leaving, notice_s=10))
        training.finish()
    return Row(
        "a spot node is taken with a notice of 10 s; checkpoints every hour", "goes on on the two left",
        str(resumed), str(lost), lab.weights(training.run), seconds,
    )  # fmt: skip


def taken(nodes: Nodes, node: "subprocess.Popen[bytes]", *, notice_s: int) -> None:
    """The notice, and when the time is up the node is gone; training may have left it by then."""
    nodes.drain(node, notice_s)
    time.sleep(notice_s)
    nodes.kill(node)


def worker_hangs(lab: Lab) -> Row:
    within_s = 20
    training = lab.train("", *OFTEN, env={"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(within_s)})
    training.wait_for(random.randrange(10, EPOCHS // 2))
    hung = random.choice(workers(training.process.pid))
    resumed, lost, seconds = struck(training, hung.suspend)
    training.finish()
    return Row(
        f"a worker is stopped (SIGSTOP) and taken for dead after {within_s} s (180 s by default)", "goes on",
        str(resumed), str(lost), lab.weights(training.run), seconds,
    )  # fmt: skip


def s3_back_soon(lab: Lab) -> Row:
    training = lab.train("", *OFTEN)
    training.wait_for(random.randrange(10, EPOCHS // 2))
    reached, begun = training.reached, time.monotonic()
    lab.s3.kill()
    time.sleep(5)
    lab.s3.start()
    training.wait(lambda: training.reached > reached, "goes on")
    seconds = time.monotonic() - begun
    training.finish()
    assert len(attempts_of(training.run)) == 1
    return Row("the S3 server is killed and back after 5 s", "waits", "–", "0", lab.weights(training.run), seconds)


def s3_gone(lab: Lab) -> Row:
    training = lab.train("", *OFTEN)
    training.wait_for(random.randrange(10, EPOCHS // 2))
    reached, begun = training.reached, time.monotonic()
    lab.s3.kill()
    try:
        said = told(training)
        seconds = time.monotonic() - begun
    finally:
        lab.s3.start()
    return resumed_by_hand(lab, training, "the S3 server is killed for good", said, reached, seconds)


def credentials_revoked(lab: Lab) -> Row:
    training = lab.train("", *OFTEN)
    training.wait_for(random.randrange(10, EPOCHS // 2))
    reached, begun = training.reached, time.monotonic()
    with lab.s3.revoked():
        said = told(training)
        seconds = time.monotonic() - begun
    return resumed_by_hand(lab, training, "the S3 credentials are revoked", said, reached, seconds)


def disk_full(lab: Lab) -> Row:
    with disk(60) as folder:
        training = lab.train(f"{folder}/run", *OFTEN)
        training.wait_for(random.randrange(10, EPOCHS // 2))
        reached, begun = training.reached, time.monotonic()
        with (folder / "others").open("wb", buffering=0) as others:
            while training.process.poll() is None and time.monotonic() < begun + 120:
                with contextlib.suppress(OSError):  # no space left
                    others.write(bytes(4096))
        said = told(training)
        seconds = time.monotonic() - begun
        (folder / "others").unlink()
        return resumed_by_hand(lab, training, "the disk of the run is full", said, reached, seconds)


@contextlib.contextmanager
def disk(megabytes: int) -> Iterator[Path]:
    """A disk of that size; needs root."""
    folder = Path(tempfile.mkdtemp(prefix="disk", dir="/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def killed_in_an_upload(lab: Lab) -> Row:
    training = lab.train("", *OFTEN)
    training.wait_for(random.randrange(10, EPOCHS // 2))
    assert lab.s3.process is not None
    server = psutil.Process(lab.s3.process.pid)
    before, reached, begun = training.saved, training.reached, time.monotonic()
    training.wait(lambda: len(checkpoints(training.run)) > 1, "an upload")
    server.suspend()
    kill_tree(training.process.pid)
    server.resume()
    half = [name for name in checkpoints(training.run) if int(name.removeprefix("step-")) > training.saved]
    assert training.saved >= before
    said = f"driver dead, {len(half)} checkpoint half stored"
    return resumed_by_hand(
        lab, training, "kill -9 of all while a checkpoint is stored", said, reached, time.monotonic() - begun
    )


def checkpoints(run: str) -> list[str]:
    return storage.list_folders(storage.join(run, "checkpoints"))


def resumed_by_hand(lab: Lab, ended: Training, fault: str, said: str, reached: int, seconds: float) -> Row:
    """The same command again, when the fault is mended; what is there is whole."""
    run_folder.latest_checkpoint(ended.run)
    again = lab.train(ended.run)
    again.finish()
    resumed = attempts_of(ended.run)[-1]["step"]
    return Row(
        f"{fault}; mended, and the same command again", said, str(resumed), str(max(reached - resumed, 0)),
        lab.weights(ended.run), seconds,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- nodes on a network


class Network:
    """Two network namespaces, each on a cable to a switch in a third; needs root."""

    nodes: ClassVar = {"ddpm-a": "10.77.0.1", "ddpm-b": "10.77.0.2"}

    def __enter__(self) -> "Network":
        for name in ("ddpm-switch", *self.nodes):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", "ddpm-switch", "link", "add", "switch", "type", "bridge")
        _ip("-n", "ddpm-switch", "link", "set", "switch", "up")
        for name, address in self.nodes.items():
            peer = ("type", "veth", "peer", "name", name, "netns", "ddpm-switch")
            _ip("link", "add", "eth0", "netns", name, *peer)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", "ddpm-switch", "link", "set", name, "up")
        self.join()
        return self

    def join(self) -> None:
        for name in self.nodes:
            _ip("-n", "ddpm-switch", "link", "set", name, "master", "switch")

    def cut(self) -> None:
        """Packets are lost from now on, and nobody is told."""
        _ip("-n", "ddpm-switch", "link", "set", "ddpm-b", "nomaster")

    def __exit__(self, *_: object) -> None:
        for name in ("ddpm-switch", *self.nodes):
            _ip("netns", "del", name)


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True)


@contextlib.contextmanager
def networked(lab: Lab, workers: str, *flags: str) -> Iterator[tuple[Network, Nodes, Training]]:
    """Two nodes in namespaces of their own, one worker each; the run is on a disk that both share."""
    with Network() as network, Nodes(networks=network.nodes) as nodes:
        nodes.add()
        run = str(lab.folder / f"networked-{lab.count}")
        training = lab.train(run, *flags, workers=workers, data=lab.local, env=nodes.env, network="ddpm-a")
        try:
            training.wait_for(random.randrange(10, EPOCHS // 2))
            yield network, nodes, training
        finally:
            training.kill()


def link_cut_for_5_s(lab: Lab) -> Row:
    with networked(lab, "2", *OFTEN) as (network, _, training):
        reached, begun = training.reached, time.monotonic()
        network.cut()
        time.sleep(5)
        network.join()
        training.wait(lambda: training.reached > reached + 1, "goes on")
        seconds = time.monotonic() - begun
        training.finish()
        assert len(attempts_of(training.run)) == 1
        weights = lab.weights(training.run)
    return Row("the link between two nodes is cut for 5 s", "waits", "–", "0", weights, seconds)


def link_cut_for_good(lab: Lab) -> Row:
    with networked(lab, "1:2", *OFTEN) as (network, _, training):
        resumed, lost, seconds = struck(training, network.cut)
        left = attempts_of(training.run)[-1]["num_workers"]
        training.finish()
        weights = lab.weights(training.run)
    return Row(
        "the link between two nodes is cut for good, --num-workers 1:2", f"goes on with {left} worker",
        str(resumed), str(lost), weights, seconds,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ elastic training


def node_lost_elastic(lab: Lab) -> Row:
    with Nodes() as nodes:
        nodes.add()
        training = lab.train("", *OFTEN, workers="1:2", env=nodes.env)
        training.wait_for(random.randrange(10, EPOCHS // 2))
        resumed, lost, seconds = struck(training, lambda: nodes.kill(nodes.with_worker()[0]))
        left = attempts_of(training.run)[-1]["num_workers"]
        training.finish()
    return Row(
        "one of two nodes loses power, --num-workers 1:2", f"goes on with {left} worker", str(resumed), str(lost),
        lab.weights(training.run), seconds,
    )  # fmt: skip


def node_added_elastic(lab: Lab) -> Row:
    with Nodes() as nodes:
        training = lab.train("", *OFTEN, "--epochs", str(100 * EPOCHS), workers="1:2", env=nodes.env)
        training.wait_for(10)
        resumed, lost, seconds = struck(training, nodes.add)
        now = attempts_of(training.run)[-1]["num_workers"]
        training.kill()
    return Row(
        "a node is added to one, --num-workers 1:2",
        f"goes on with {now} workers",
        str(resumed),
        str(lost),
        "–",
        seconds,
    )


def sweep_loses_a_node(lab: Lab) -> Row:
    """The trial on it, and maybe the actor that waits for another one, are gone; the search must not be."""
    lab.count += 1
    output, total = f"{lab.s3.uri}/sweep-{lab.count}", 5
    with Nodes() as nodes, tempfile.NamedTemporaryFile() as said:
        nodes.add()
        nodes.add()
        command = [sys.executable, "-m", "jobs.sweep", "--preset", "smoke", "--data", lab.data, "--output", output]
        command += ["--epochs", "40", "--validate-every-epochs", "10", "--num-trials", str(total), "--num-points", "0"]
        sweep = subprocess.Popen(
            [*command, "--early-stopping", "none"], cwd=ROOT, env={**os.environ, **nodes.env}, stdout=said, stderr=said
        )
        deadline = time.monotonic() + 400
        while not any(storage.exists(f"{output}/trials/{n:04d}/metrics.jsonl") for n in range(total)):
            assert sweep.poll() is None, Path(said.name).read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        begun = time.monotonic()
        nodes.kill(nodes.with_worker()[0])
        assert sweep.wait(400) == 0, Path(said.name).read_text()[-2000:]
    rows = storage.read_json(f"{output}/results.json")["trials"]
    assert [(row["number"], row["state"]) for row in rows] == [(n, "complete") for n in range(total)], rows
    again = [row["number"] for row in rows if len(attempts_of(f"{output}/{row['run']}")) > 1]
    assert again, rows
    steps = [attempts_of(f"{output}/{rows[n]['run']}")[-1]["step"] for n in again]
    return Row(
        "one of three nodes loses power under a sweep",
        f"all {total} trials end, {len(again)} taken up again, none begun twice",
        listed(steps), "–", "–", time.monotonic() - begun,
    )  # fmt: skip


FAULTS: dict[str, Callable[[Lab], Row]] = {
    "workers": workers_killed,
    "driver": driver_killed,
    "node": node_killed,
    "notice": node_taken_with_notice,
    "hang": worker_hangs,
    "s3-5s": s3_back_soon,
    "s3-gone": s3_gone,
    "credentials": credentials_revoked,
    "disk": disk_full,
    "upload": killed_in_an_upload,
    "link-5s": link_cut_for_5_s,
    "link-gone": link_cut_for_good,
    "shrink": node_lost_elastic,
    "grow": node_added_elastic,
    "sweep-node": sweep_loses_a_node,
}


def listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def main(names: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended
    folder = Path(tempfile.mkdtemp(prefix="chaos", dir="/tmp"))
    lab = Lab(folder)
    failed = 0
    print("| fault | outcome | on from step | steps lost | weights at the end | seconds |\n|---|---|---|---|---|---|")
    try:
        for name in names or FAULTS:
            try:
                row = FAULTS[name](lab)
                print(f"| {' | '.join(map(str, dataclasses.astuple(row)[:-1]))} | {row.seconds:.0f} |", flush=True)
            except Exception as error:
                failed += 1
                print(f"| {name} | **failed**: {error!r} | | | | |", flush=True)
    finally:
        lab.s3.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
