"""The project as a user of a cluster runs it: `make cluster`, then `ray job submit`, and `serve deploy`."""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from chaos import NEVER, OFTEN, SMOKE, attempts_of, reached
from conftest import ROOT, free_port, write_gradients
from dashboards import needs_prometheus, prometheus, queries
from PIL import Image

from jobs.training import run_folder

RAY = Path(sys.executable).parent / "ray"


def script(verb: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", "cluster/local.sh", verb]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850)


def cluster_environment(state: str, **more: str) -> dict[str, str]:
    """An environment like a user's: without what the tests set for Ray."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ports = {"DDPM_GCS_PORT": str(free_port()), "DDPM_DASHBOARD_PORT": str(free_port())}
    path = f"{RAY.parent}:{clean.get('PATH', '')}"
    return {**clean, **ports, "PATH": path, "DDPM_CLUSTER_DIR": state, "DDPM_OBJECT_STORE_MB": "150", **more}


def exported(line: str) -> dict[str, str]:
    words = shlex.split(line)
    assert words[0] == "export"
    return dict(word.split("=", 1) for word in words[1:])


def node_processes(state: str) -> list[int]:
    return [int((Path(state) / f"{name}.pid").read_text()) for name in ("head", "worker")]


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def processes_below(folder: str) -> list[str]:
    """Command lines of the processes that name `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if folder in line:
            found.append(line)
    return found


@pytest.fixture
def state() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="cluster", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    def __init__(self, environment: dict[str, str]) -> None:
        line = script("env", environment).stdout
        self.environment = {**environment, **exported(line)}

    def begin(self, entrypoint: str, *options: str, working_dir: Path = ROOT) -> subprocess.Popen[str]:
        """`options`: of `ray job submit`."""
        command = [str(RAY), "job", "submit", "--log-color", "false", "--working-dir", str(working_dir)]
        return subprocess.Popen(
            [*command, *options, "--", *shlex.split(entrypoint)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def submit(self, entrypoint: str, *, working_dir: Path = ROOT) -> subprocess.CompletedProcess[str]:
        job = self.begin(entrypoint, working_dir=working_dir)
        said, errors = job.communicate(timeout=850)
        return subprocess.CompletedProcess(job.args, job.returncode, said, errors)

    def run(self, entrypoint: str) -> str:
        """A job that must succeed; its log."""
        done = self.submit(entrypoint)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    state = tempfile.mkdtemp(prefix="cluster", dir="/tmp")
    environment = cluster_environment(state)
    try:
        up = script("up", environment)
        assert up.returncode == 0, up.stdout + up.stderr
        temp = temp_folder(state)
        yield Cluster(environment)
    finally:
        down = script("down", environment)
        shutil.rmtree(state, ignore_errors=True)
    assert down.returncode == 0, down.stderr
    assert processes_below(temp) == []


def test_prepare_train_translate_by_ray_job_submit(cluster: Cluster, tmp_path: Path) -> None:
    data, run, men = tmp_path / "data", tmp_path / "run", tmp_path / "men"
    cluster.run(f"python -m jobs.prepare rendered --count 48 --output {data} --image-size 32")
    card = json.loads((data / "dataset.json").read_text())
    assert card["domains"] == ["female", "male"]

    cluster.run(f"python -m jobs.train --data {data} --output {run} --preset smoke --epochs 1 --num-workers 2")
    best = json.loads((run / "best.json").read_text())
    assert (run / best["checkpoint"] / "model.safetensors").stat().st_size > 0
    assert (run / "report.html").stat().st_size > 1000

    translate = f"python -m jobs.translate --checkpoint {run} --input {data} --output {men} --domain male"
    cluster.run(f"{translate} --num-steps 2")
    assert len(list(men.rglob("*.png"))) >= card["splits"]["test"] > 0


def test_the_experiments_by_ray_job_submit(cluster: Cluster, tmp_path: Path) -> None:
    """One section of the smoke size: what it trains and measures is spread over both nodes."""
    output = tmp_path / "mission"
    said = cluster.run(f"python -m jobs.experiments --size smoke --seeds 1 --sections gans --output {output}")
    assert f"report: {output}/report.html" in said
    plan = json.loads((output / "plan.json").read_text())["plan"]
    records = [json.loads(path.read_text()) for path in (output / "commands").iterdir()]
    assert {record["key"] for record in records} == {command["key"] for command in plan["commands"]}
    assert {(record["state"], record["exit_code"]) for record in records} == {("done", 0)}
    table = json.loads((output / "table.json").read_text())
    assert table["missing"] == {}
    assert [claim["text"] for claim in table["claims"]]
    assert (output / "report.html").stat().st_size > 10_000


def test_ray_job_stop_lets_a_training_store_its_step_and_the_same_command_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    data, output = tmp_path / "data", str(tmp_path / "run")
    write_gradients(str(data))
    command = shlex.join(["python", "-m", "jobs.train", *SMOKE, *NEVER, "--data", str(data), "--output", output])
    job = cluster.begin(f"{command} --epochs 100000", "--submission-id", "stopped")
    deadline = time.monotonic() + 800
    while not (asked := reached(output)):
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()
        time.sleep(0.2)
    assert run_folder.latest_checkpoint(output)[0] == 0
    stop = [RAY, "job", "stop", "--log-color", "false", "stopped"]
    subprocess.run(stop, env=cluster.environment, cwd=ROOT, check=True, timeout=300)
    said, _ = job.communicate(timeout=300)
    step, _ = run_folder.latest_checkpoint(output)
    assert step >= asked, said
    assert f"train: step {step:,} is stored" in said
    assert "stopped by SIGTERM; the same command goes on from here" in said
    assert "Traceback" not in said
    cluster.run(f"{command} --epochs {step + 2}")  # an epoch is a step
    assert [attempt["step"] for attempt in attempts_of(output)] == [0, step]


def ended_trials(output: Path) -> list[dict[str, Any]]:
    """Of a sweep, as far as its results.json goes."""
    try:
        rows = json.loads((output / "results.json").read_text())["trials"]
    except FileNotFoundError:
        return []
    return [row for row in rows if row["state"] != "running"]


def drivers_of(output: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        words = entry.read_bytes().split(b"\0") if entry.exists() else []
        if b"jobs.sweep" in words and str(output).encode() in words:
            found.append(int(entry.parent.name))
    return found


def test_a_sweep_by_ray_job_submit_whose_driver_is_killed_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "sweep"
    write_gradients(str(data))
    command = (
        f"python -m jobs.sweep --preset smoke --data {data} --output {output} --epochs 1 --num-trials 2 --num-points 1 "
        "--num-images 4 --num-workers 1 --max-concurrent 1 --early-stopping none --space sampling.num_steps=1:2"
    )
    first = cluster.begin(command)
    deadline = time.monotonic() + 800
    while not list((output / "trials").glob("*/best.json")):  # one is nearly done
        assert time.monotonic() < deadline, first.communicate(timeout=300)
        time.sleep(0.2)
    for pid in drivers_of(output):
        os.kill(pid, signal.SIGKILL)
    assert first.wait(timeout=300) != 0
    begun = {path.name for path in (output / "trials").iterdir()}
    before = {row["number"]: row for row in ended_trials(output) if row["state"] == "complete"}
    said = cluster.run(command)
    assert "room for 4 workers of 1 CPU; a trial takes 1, so 4 at a time, no more than --max-concurrent 1" in said
    assert f"report: {output}/report.html" in said
    after = {row["number"]: row for row in ended_trials(output)}
    assert sorted(after) == [0, 1]
    assert {row["state"] for row in after.values()} == {"complete"}
    assert {path.name for path in (output / "trials").iterdir()} == begun | {"0000", "0001"}
    assert {number: after[number] for number in before} == before
    assert len({row["values"]["optim.learning_rate"] for row in after.values()}) == 2
    points = json.loads((output / "results.json").read_text())["points"]
    assert [row["number"] for row in points] == [0]
    assert json.loads((output / "best.json").read_text())["sweep"]["num_points"] == 1
    assert not (output / "driver.json").exists()


@needs_prometheus
def test_every_panel_of_the_trainings_dashboard_shows_something(cluster: Cluster, tmp_path: Path) -> None:
    """Those about GPUs ask for what Ray tells where there are any."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    write_gradients(str(tmp_path / "data"))
    command = ["python", "-m", "jobs.train", *SMOKE, *OFTEN, "--data", tmp_path / "data", "--output", tmp_path / "run"]
    training = cluster.begin(f"{shlex.join(map(str, command))} --epochs 100000", "--submission-id", "watched")
    file = Path(temp_folder(cluster.environment["DDPM_CLUSTER_DIR"]), "prom_metrics_service_discovery.json")
    about_gpus = {"GPUs in use", "GPU memory in use"}
    with prometheus(tmp_path, "ray", file_sd_configs=[{"files": [str(file)], "refresh_interval": "1s"}]) as shows:
        waited = {query for query, title in queries("dashboard.json").items() if title not in about_gpus}
        assert len(waited) >= 10
        deadline = time.monotonic() + 800
        while waited := {query for query in waited if not shows(query)}:
            assert time.monotonic() < deadline, waited
            assert training.poll() is None, training.communicate()
            time.sleep(0.5)
        for query, title in queries("dashboard.json").items():
            if title in about_gpus:
                assert not shows(query)  # nor is it wrong
                assert {f"ray_{name}" for name in METRICS_GAUGES} >= {*re.findall(r"ray_\w+", query)}
    stop = [RAY, "job", "stop", "--log-color", "false", "watched"]
    subprocess.run(stop, env=cluster.environment, cwd=ROOT, check=True, timeout=300)
    training.communicate(timeout=300)


SERVE = RAY.with_name("serve")


class Deployed:
    """`serve deploy cluster/serve.yaml` with changes, of Serve on a cluster where none runs; it is shut down after."""

    def __init__(self, cluster: Cluster, folder: Path, host: str, **args: Any) -> None:
        config = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
        self.port = config["http_options"]["port"] = free_port()
        config["http_options"]["host"] = host
        (application,) = config["applications"]
        application["args"] = {**application["args"], **args}
        application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}  # installed may be another working tree
        self.cluster, self.file = cluster, folder / "serve.yaml"
        self.file.write_text(yaml.safe_dump(config))

    def serve(self, *words: str) -> str:
        environment = self.cluster.environment
        done = subprocess.run([SERVE, *words], cwd="/", env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def __enter__(self) -> "Deployed":
        self.serve("deploy", str(self.file))
        return self

    def __exit__(self, *_: object) -> None:
        self.serve("shutdown", "--yes")

    def status(self, *wanted: str) -> dict[str, Any]:
        """The application's, once it is one of those."""
        deadline = time.monotonic() + 600
        while (found := yaml.safe_load(self.serve("status", "--name", "translate")))["status"] not in wanted:
            assert found["status"] in ("DEPLOYING", *wanted), found
            assert time.monotonic() < deadline, found
            time.sleep(1)
        return found


def test_the_endpoint_by_serve_deploy(cluster: Cluster, checkpoint_folder: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"alice {hashlib.sha256(b'secret').hexdigest()}\n")
    args = {"checkpoint": checkpoint_folder, "tokens_file": str(tokens)}
    with Deployed(cluster, tmp_path, "127.0.0.1", **args) as deployed:
        status = deployed.status("RUNNING")
        assert {name: each["status"] for name, each in status["deployments"].items()} == dict.fromkeys(
            ("Gateway", "Reader", "Model"), "HEALTHY"
        )
        url, photo = f"http://127.0.0.1:{deployed.port}", io.BytesIO()
        Image.new("RGB", (40, 24), (200, 60, 40)).save(photo, "PNG")
        assert httpx.get(f"{url}/readyz", timeout=300).json()["status"] == "ok"
        asked: dict[str, Any] = {"url": f"{url}/v1/translate?domain=night", "content": photo.getvalue(), "timeout": 300}
        assert httpx.post(**asked).status_code == 401
        answer = httpx.post(**asked, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200, answer.text
        assert Image.open(io.BytesIO(answer.content)).size == (40, 24)


def test_a_public_endpoint_without_tokens_is_not_deployed(
    cluster: Cluster, checkpoint_folder: str, tmp_path: Path
) -> None:
    with Deployed(cluster, tmp_path, "0.0.0.0", checkpoint=checkpoint_folder, tokens_file=None) as deployed:
        said, *told = deployed.status("DEPLOY_FAILED")["message"].splitlines()
        assert said == "Deploying app 'translate' failed with exception:"  # Ray's own
        assert told == [
            "Ray Serve listens on 0.0.0.0, where other machines can reach it: give tokens_file=FILE, or "
            "open_to_all=true behind a proxy that decides who may come"
        ]


def test_the_cluster_has_two_nodes_and_asks_for_a_token(cluster: Cluster) -> None:
    code = "import ray; ray.init(log_to_driver=False); print([n['Resources']['CPU'] for n in ray.nodes()])"
    assert "[2.0, 2.0]" in cluster.run(f"python -c {shlex.quote(code)}")
    stranger = {**cluster.environment, "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "/nowhere"}
    refused = subprocess.run([RAY, "job", "list"], cwd=ROOT, env=stranger, capture_output=True, text=True, timeout=300)
    assert refused.returncode != 0
    assert "401" in refused.stderr or "nauthorized" in refused.stderr or "authentication" in refused.stderr.lower()


def test_a_users_mistake_is_a_failed_job_with_one_line_in_its_log(cluster: Cluster, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    done = cluster.submit(f"python -m jobs.train --data {missing} --output {tmp_path / 'run'} --preset smoke")
    assert done.returncode != 0
    errors = {line for line in done.stdout.splitlines() if line.startswith("error: ")}  # Ray shows it twice
    assert len(errors) == 1
    assert str(missing) in errors.pop()
    assert "Traceback" not in done.stdout
    relative = cluster.submit("python -m jobs.prepare earth --output runs/data")
    assert relative.returncode != 0
    assert "runs/data is relative" in relative.stdout


def test_up_and_down_are_idempotent_and_leave_others_alone(state: str, cluster: Cluster) -> None:
    """Beside another cluster, without tokens, over pid files whose numbers belong to somebody else."""
    bystander = subprocess.Popen(["sleep", "600"])
    for name in ("head", "worker"):
        (Path(state) / f"{name}.pid").write_text(f"{bystander.pid}\n")
    environment = cluster_environment(state, RAY_AUTH_MODE="disabled")
    try:
        first = script("up", environment)
        assert first.returncode == 0, first.stdout + first.stderr
        temp = temp_folder(state)
        pids = node_processes(state)
        assert bystander.pid not in pids
        assert "up already" in script("up", environment).stdout
        assert node_processes(state) == pids
        line = exported(script("env", environment).stdout)
        assert line["RAY_AUTH_MODE"] == "disabled"
        listed = subprocess.run(
            [RAY, "job", "list"], env={**environment, **line}, capture_output=True, text=True, timeout=60
        )
        assert listed.returncode == 0, listed.stderr
    finally:
        down = script("down", environment)
    assert down.stdout == "The cluster is down.\n"
    assert not any(map(is_running, pids))
    assert processes_below(temp) == []
    assert not Path(temp).exists()
    assert script("down", environment).stdout == "No cluster of ours was up.\n"
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    mine = cluster.environment["DDPM_CLUSTER_DIR"]
    assert all(map(is_running, node_processes(mine)))


def temp_folder(state: str) -> str:
    lines = (Path(state) / "address").read_text().splitlines()
    return next(line.removeprefix("temp=") for line in lines if line.startswith("temp="))


def test_the_uploaded_package_is_small_and_holds_the_code_only(tmp_path: Path) -> None:
    """Ray's own packing, of a working tree with the clutter that real ones have."""
    from ray._private.runtime_env.packaging import create_package

    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*_cache", "runs")
    shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
    for clutter in (
        "runs/x/model.safetensors",
        ".git/objects/x",
        "data/part-0.parquet",
        "faces.zip",
        "jobs/x.safetensors",
    ):
        (tree / clutter).parent.mkdir(parents=True, exist_ok=True)
        (tree / clutter).write_bytes(os.urandom(2_000_000))
    package = tmp_path / "package.zip"
    create_package(str(tree), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert package.stat().st_size < 2_000_000, sorted(names)
    assert {name.partition("/")[0] for name in names} == {"ddpm_core", "jobs", "serve", "pyproject.toml"}
    assert not any("earth_maps" in name or "benchmark" in name for name in names)
    assert {"jobs/train.py", "serve/page/index.html", "ddpm_core/unet.py"} <= names
    assert not any(name.endswith((".safetensors", ".pyc")) for name in names)
