"""The Ray that a command uses: joined or started, or why it cannot be, in one line and within seconds.

ray.init by itself waits for minutes for an address at which nothing answers, and ends in a traceback.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpm_core.errors import InputError
from jobs.common import stopping

ANSWER_S = 5.0
"""How long a cluster may take to answer."""
SLOW_S = 5.0
"""After so long a user is told what is waited for."""
STILL_S = 60.0
"""And again whenever nothing has come for so long."""
LONGEST_SOCKET, SOCKET = 107, "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/dash_MetricsHead"
"""Bytes of a Unix socket's path, and where Ray puts its longest one below the temporary folder."""
ROOM_BYTES = 100 * 2**20
"""What the temporary folder must have free: Ray's logs, and what does not fit into /dev/shm."""
NO_RAY = "or give --num-workers 0, which needs no Ray"


def init() -> None:
    """`ray.init`: the cluster of RAY_ADDRESS, of the submitted job or of `ray start` where there is one, else one
    started here.

    Raises:
        InputError: it cannot be reached, or none can be started.
    """
    import ray

    address = find_address()
    if address is None:
        check_place()
    elif address.startswith("ray://"):
        check_answers(address)
    else:
        check_is_ray(address)
    what = "starting Ray" if address is None else f"joining the Ray cluster at {address}"
    try:
        with muted_stderr() as shown, slow(lambda: f"{what} …", say=shown), _own_signals():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(explained(error, address)) from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Where a command takes SIGTERM, Ray does not: its handlers, one in Python and one in its core, end the process by
    an abort, exit 134 and a dump of addresses."""
    from ray._private import utils

    if not stopping.installed():
        yield
        return
    theirs, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        stopping.install()


@contextlib.contextmanager
def muted_stderr() -> Iterator[Callable[[str], None]]:
    """Nothing written to file descriptor 2 is shown: what Ray's core says while it starts. Exceptions pass; gives what
    still shows a line."""
    sys.stderr.flush()
    shown, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)

    def say(line: str) -> None:
        os.write(shown, f"{line}\n".encode())

    try:
        yield say
    finally:
        sys.stderr.flush()
        os.dup2(shown, 2)
        os.close(shown)
        os.close(nowhere)


@contextlib.contextmanager
def slow(line: Callable[[], str], *, say: Callable[[str], object] | None = None) -> Iterator[None]:
    """Say what is waited for, once, if what is done within takes longer than SLOW_S. `line` may ask Ray."""
    over = threading.Event()

    def watch() -> None:
        if not over.wait(SLOW_S):
            with contextlib.suppress(Exception):  # whatever is wrong with Ray, who waits for it meets it, too
                (say or _say)(line())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(1)


@contextlib.contextmanager
def watched(state: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Say what is waited for if no result comes: for the first after SLOW_S, then whenever none has come for STILL_S.
    What this gives is called at each result. `state`: who is at work and what is free; it may ask Ray."""
    over, last, came = threading.Event(), [time.monotonic()], threading.Event()

    def moved() -> None:
        last[0] = time.monotonic()
        came.set()

    def watch() -> None:
        told = last[0] - STILL_S + SLOW_S
        while not over.wait(min(SLOW_S, STILL_S) / 5):
            now, since = time.monotonic(), last[0]
            if now - max(told, since if came.is_set() else told) < STILL_S:
                continue
            told = now
            what = "results" if came.is_set() else "the first result, while workers start and load what they need"
            with contextlib.suppress(Exception):  # whatever is wrong with Ray, who waits for it meets it, too
                _say(f"waiting for {what}; none for {now - since:.0f} s: {state()}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield moved
    finally:
        over.set()
        thread.join(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def free_cpus() -> str:
    """How much of the cluster is free, in words."""
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    names = [name for name in ("CPU", "GPU") if there.get(name)]
    each = " and ".join(f"{free.get(name, 0):g} of {there[name]:g} {name}s" for name in names)
    return f"the cluster has {each or 'no CPUs'} free"


# -- an address ---------------------------------------------------------------------------------------------------


def find_address() -> str | None:
    """host:port of the cluster that ray.init would join, or a client's ray://host:port; None: it would start one.

    Raises:
        InputError: RAY_ADDRESS is none.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given.startswith(("http://", "https://")):
        raise InputError(
            f"RAY_ADDRESS is {given}, the dashboard's address, which jobs are submitted to: put it into "
            "RAY_API_SERVER_ADDRESS for ray job submit, and give RAY_ADDRESS as HOST:6379, or leave it out"
        )
    if "://" in given and not given.startswith("ray://"):
        raise InputError(f"RAY_ADDRESS is {given}; give HOST:PORT such as 10.0.0.1:6379, or leave it out")
    if given not in ("", "auto", "local") and not re.fullmatch(
        r"(ray://)?(\[[\da-fA-F:.]+\]|[^\s:/]+):\d{1,5}/?", given
    ):
        raise InputError(f"RAY_ADDRESS is {given}; give HOST:PORT such as 10.0.0.1:6379, or leave it out")
    if given.startswith("ray://"):
        return given.rstrip("/")
    from ray._private import services

    try:
        return services.canonicalize_bootstrap_address(None)
    except ConnectionError:
        raise InputError(
            "RAY_ADDRESS is auto, and no Ray runs on this machine: start one with ray start --head, give HOST:PORT, or "
            "leave it out to have one started"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"RAY_ADDRESS is {given}: {_first_line(error)}; give HOST:PORT such as 10.0.0.1:6379"
        ) from None


def _called(address: str) -> str:
    """The address, as whoever set it knows it."""
    return f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}" if os.environ.get("RAY_ADDRESS") else f"the Ray at {address}"


def check_answers(address: str) -> None:
    """Raises InputError where nothing listens at ray://host:port."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    channel = init_grpc_channel(address.removeprefix("ray://"))
    try:
        grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
    except grpc.FutureTimeoutError:
        raise InputError(
            f"{_called(address)}: no Ray answers there within {ANSWER_S:.0f} s; check host and port, and that the "
            "cluster is up"
        ) from None
    finally:
        channel.close()


def check_is_ray(address: str) -> None:
    """Ask the head at host:port whether it lives, as which version.

    Raises:
        InputError: nothing answers, or something else, or it wants a token, or is of another version.
    """
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    where = _called(address)
    try:
        channel = init_grpc_channel(address)
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        version = head.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=ANSWER_S).ray_version
        channel.close()
    except grpc.RpcError as error:
        raise InputError(f"{where}: {_refusal(error)}") from None
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # the token's file
        raise InputError(f"{where}: {_first_line(error)}") from None
    if version != ray.__version__:
        raise InputError(
            f"{where} is Ray {version}, this is Ray {ray.__version__}: both must be the same; "
            "install that one here, or start the cluster with this one"
        )


def _refusal(error: object) -> str:
    """What a head's answer means, with the remedy."""
    import grpc

    code, details = error.code(), str(error.details())  # type: ignore[attr-defined]
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return (
            "the cluster wants a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (a local cluster's: eval "
            '"$(cluster/local.sh env)")'
        )
    if "refused" in details:
        return "nothing listens there; check host and port, and that the cluster is up"
    if "resol" in details or "lookup" in details:
        return "there is no such host; check its name"
    if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL) or "pars" in details or "frame" in details:
        return "what answers there is not Ray's head; give its host and the port that it was started with (6379)"
    return f"no Ray answers there within {ANSWER_S:.0f} s; check host and port, and that the cluster is up"


# -- a Ray of our own -----------------------------------------------------------------------------------------------


def check_place() -> None:
    """Refuse a machine on which no Ray can be started.

    Raises:
        InputError: the temporary folder's path is too long, it cannot be written to or is full; no home for the token.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    folder = os.environ[name] if name else "/tmp"
    where = f"{name}={folder}" if name else folder
    remedy = f"; give another folder, such as RAY_TMPDIR=/var/tmp, {NO_RAY}"
    most = LONGEST_SOCKET - len(SOCKET.format(pid=os.getpid())) - 1
    if len(os.fsencode(folder)) > most:
        raise InputError(
            f"{where}: too long, Ray puts sockets below it: at most {most} bytes; give RAY_TMPDIR=/tmp, {NO_RAY}"
        )
    if (problem := _unwritable(Path(folder))) is not None:
        raise InputError(f"{where}: Ray cannot write there ({problem}){remedy}")
    free = shutil.disk_usage(_there(Path(folder))).free
    if free < ROOM_BYTES:
        raise InputError(f"{where} has {free / 1e6:,.0f} MB free, Ray needs {ROOM_BYTES / 1e6:,.0f}: free some{remedy}")
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path(os.path.expanduser("~"), ".ray", "auth_token"))
    if (problem := _unusable_token(token)) is not None:
        raise InputError(
            f"{token}: Ray keeps its token there, which cannot be {problem}; give a HOME that is yours, "
            f"RAY_AUTH_TOKEN_PATH=FILE, or RAY_AUTH_MODE=disabled, {NO_RAY}"
        )


def _there(folder: Path) -> Path:
    """The folder, or the one above it that is there already."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be written below a folder, which need not be there yet; None: it can."""
    probe = _there(folder) / f".ddpm-translate-{os.getpid()}"
    try:
        probe.touch(exist_ok=True)
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _unusable_token(token: Path) -> str | None:
    try:
        if token.is_file():
            return None if os.access(token, os.R_OK) else "read"
    except OSError as error:
        return f"read ({error.strerror})"
    problem = _unwritable(token.parent)
    return None if problem is None else f"written ({problem})"


def explained(error: Exception, address: str | None) -> str:
    """What ray.init raised, in one line with a remedy."""
    line = _first_line(error)
    if "oken" in line and address is not None:
        line = "the cluster wants a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
    if address is not None:
        return f"{_called(address)} cannot be joined ({line}); a command runs on a node of the cluster: ray job submit"
    return f"Ray could not be started here ({line}); its logs are in {_logs()}; try again, {NO_RAY}"


def _logs() -> str:
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return os.path.join(folder, "ray/session_latest/logs")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
