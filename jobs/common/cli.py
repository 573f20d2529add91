"""What the command lines share: parsing, presets, exit codes, a quiet Ray."""

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, get_type_hints

from ddpm_core.errors import InputError, printable

DONE, FAILED, WRONG_INPUT, SET_ASIDE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: done; anything else; the user's input is wrong; batch work done but rows were set aside; Ctrl-C."""

T = TypeVar("T")


def parse(
    cls: Any,
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str | None = None,
    default: Any = None,
) -> Any:
    """`argv` as an instance of the dataclass `cls`; an unknown or wrong option ends with one line and exit 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    lines: list[str] = []
    try:
        with contextlib.redirect_stderr(_Lines(lines)):
            if importlib.util.find_spec("tyro") is None:
                return _parsed_plainly(cls, argv, prog, description)
            import tyro

            extra = {} if default is None else {"default": default}
            return tyro.cli(cls, args=argv, prog=f"python -m {prog}", description=description, **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(lines, prog)) from None


def _parsed_plainly(cls: Any, argv: Sequence[str], prog: str, description: str | None) -> Any:
    """`parse` of a flat dataclass with defaults, for a machine lent for a benchmark that has little installed."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind: Any = {"action": "store_true"} if hints[field.name] is bool else {"type": hints[field.name]}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **kind)
    return cls(**vars(parser.parse_args(argv)))


def set_aside(num: int, *, ok: bool) -> int:
    """The exit code of batch work that set `num` images aside; `ok`: the command was given --set-aside-ok."""
    return SET_ASIDE if num and not ok else DONE


def tally(reasons: Iterable[str], most: int = 3) -> str:
    """The `most` commonest reasons, or one more, without their particulars, each with how often it is there."""
    counts = collections.Counter(map(_kind, reasons)).most_common()
    if len(counts) > most + 1:
        counts[most:] = [("others", sum(count for _, count in counts[most:]))]
    return ", ".join(f"{printable(reason)} ({count:,})" for reason, count in counts)


def _kind(reason: str) -> str:
    """A reason without what is particular to one image: its size, what stands in parentheses, the remedy."""
    return re.split(r"[;(]", re.sub(r"^[\d,]+ x [\d,]+ pixels; ", "", reason))[0].strip()


def reasons_text(rows: Iterable[tuple[str, str]]) -> bytes:
    """rejected.txt: image and reason, parted by a tab, a line each."""
    return "".join(f"{printable(name)}\t{printable(reason)}\n" for name, reason in rows).encode()


class _Lines:
    """A text stream that keeps what is written to it."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.encoding = "utf-8"

    def write(self, text: str) -> int:
        self.lines.append(text)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def _one_line(pieces: list[str], prog: str) -> str:
    """The boxed message of tyro, or argparse's, as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "".join(pieces))
    lines = [re.sub(r"^[\s│╭╰─╮╯├┤]+|[\s│╭╰─╮╯├┤]+$", "", line) for line in text.splitlines()]
    body = " ".join(line for line in lines if line)
    body = re.sub(r"^usage: .*? error: |\s*For full helptext.*$", "", body)
    body = re.sub(r"^(Parsing error|Unrecognized options|Required options|Value error|Invalid choice)\s+", "", body)
    return f"{body or 'wrong arguments'} (python -m {prog} --help lists the options)"


def run(main: Callable[[], int]) -> None:
    """Run an entry point and end the process with its exit code; a user's mistake costs one line, no traceback."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        cause = input_error(error)
        if cause is None:
            traceback.print_exc()
            code = FAILED
        else:
            print(f"error: {cause}", file=sys.stderr)
            code = WRONG_INPUT
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def input_error(error: BaseException | None) -> InputError | None:
    """The InputError behind `error`, through what Ray wraps around a worker's exception; None if there is none."""
    seen: set[int] = set()
    told: list[str] = []
    todo = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, InputError):
            return (
                InputError(str(current).splitlines()[-1].removeprefix("ddpm_core.errors.InputError: "))
                if hasattr(current, "cause")
                else current
            )
        todo += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        todo += list(getattr(current, "worker_failures", {}).values())
        if type(current).__module__.startswith("ray."):  # Ray Data keeps a task's exception as text only
            told += re.findall(r"^ddpm_core\.errors\.InputError: (.+)$", str(current), re.MULTILINE)
    return InputError(told[-1]) if told else None


@contextlib.contextmanager
def muted_stderr() -> Iterator[None]:
    """Nothing written to file descriptor 2 is shown: what Ray's core says while it starts. Exceptions pass."""
    sys.stderr.flush()
    shown, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(shown, 2)
        os.close(shown)
        os.close(nowhere)


@contextlib.contextmanager
def ray_session(*, start: bool = True) -> Iterator[None]:
    """Ray, quiet: the cluster of RAY_ADDRESS or of the submitted job where there is one, else one started here.

    `start` False: only quiet; what runs in this process alone needs no cluster.

    Logs of workers stay in Ray's session folder; their errors come back as exceptions.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A worker that does not answer, and one that never comes to a barrier (it may read the data first), are dead: by
    # themselves Ray's barriers wait for ever.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "180")
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "3600")
    # Ray's core warns of Ray Data's own actors at every start, past Python's logging, at the level of errors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if "RAY_ADDRESS" not in os.environ:  # a Ray of our own, whose workers would starve beside other work: Ray's is 15
        os.environ.setdefault("RAY_worker_niceness", "0")
    warnings.filterwarnings("ignore", module=r"ray\..*")
    import ray
    import ray.data

    started = start and not ray.is_initialized()
    if started:
        with muted_stderr():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False  # its start-up costs seconds on every execution and ignores block counts
    context.enable_progress_bars = False
    with contextlib.suppress(ImportError, AttributeError):  # its core warns, on stdout, of processes that only wait
        from ray._private.ray_logging import stdout_deduplicator

        stdout_deduplicator.skip_re = re.compile("maximum expected startup concurrency")
    for name in ("ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors also come as exceptions: told once
    try:
        yield
    finally:
        if started:
            ray.shutdown()
