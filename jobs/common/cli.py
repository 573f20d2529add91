"""What the command lines share: parsing, exit codes, a quiet Ray."""

import argparse
import ast
import collections
import contextlib
import dataclasses
import difflib
import errno
import importlib
import importlib.util
import io
import logging
import os
import pkgutil
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ddpm_core.errors import InputError, printable
from jobs.common import cluster, numbers, stopping

DONE, FAILED, WRONG_INPUT, SET_ASIDE = 0, 1, 2, 3
"""Exit codes: done; anything else; the user's input is wrong; batch work done but rows were set aside. A signal gives
`stopping.exit_code`."""

T = TypeVar("T")


def parse(
    cls: Any,
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str | None = None,
    default: Any = None,
) -> Any:
    """`argv` as an instance of the dataclass `cls`.

    Raises:
        InputError: an option that there is not, a value that it does not take, a missing one; in one line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec("tyro") is None:
        return _parsed_plainly(cls, argv, prog, description)
    import tyro

    told = io.StringIO()
    extra: dict[str, Any] = {"prog": f"python -m {prog}", "description": description}
    if default is not None:
        extra["default"] = default
    try:
        with contextlib.redirect_stderr(told):
            options = tyro.cli(cls, args=argv, **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    else:
        if dataclasses.is_dataclass(options):
            numbers.check(options)
        return options

    def known() -> list[str]:
        """The options that --help lists, of the sub-command that was given if one was."""
        told, words = io.StringIO(), [word for word in argv[:1] if not word.startswith("-")]
        for given in (words, []):
            silent = contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO())
            with silent[0], silent[1], contextlib.suppress(SystemExit):
                tyro.cli(cls, args=[*given, "--help"], **extra)
            if found := re.findall(r"--[a-z][\w.-]*\w", told.getvalue()):
                return found
        return []

    raise InputError(f"{_complaint(_plain(told.getvalue()), argv, known)} (python -m {prog} --help lists the options)")


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
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return cls(**vars(parser.parse_args(argv)))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = re.sub(r"^usage: .*? error: ", "", " ".join(told.getvalue().split()))
        raise InputError(f"{message} (python -m {prog} --help lists the options)") from None


def _plain(boxed: str) -> str:
    """tyro's boxed message as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [re.sub(r"^[\s│╭╰─╮╯├┤]+|[\s│╭╰─╮╯├┤]+$", "", line) for line in text.splitlines()]
    body = " ".join(line for line in lines if line.strip("-"))
    body = re.sub(r"\s*For full helptext.*$|\s*Argument helptext:.*$", "", body)
    return re.sub(
        r"^(Parsing error|Unrecognized options|Required options|Value error|Invalid choice|Missing argument)\s+",
        "",
        body,
    )


def _complaint(body: str, argv: list[str], known: Callable[[], list[str]]) -> str:
    """What is wrong, and what was probably meant, out of tyro's message."""
    from ddpm_core import config as configs

    if found := re.search(r"(?:Available subcommands: |Expected one of \{)(\w+(?:, \w+)*)", body):
        names = found[1].split(", ")
        given = next((word for word in argv if not word.startswith("-")), None)
        if given is None or given in names:
            return f"say first what to do: {', '.join(names)}"
        return f"{given}{configs.did_you_mean(given, names)}: {', '.join(names)}"
    if found := re.search(r"invalid choice '([^']*)' for argument '([^']*)'\. Expected one of \(([^)]*)\)", body):
        names = sorted(name for each in found[3].split(",") if (name := each.strip(" '")) not in ("None", ""))
        flag = f"{found[2]} " if found[2].startswith("-") else ""
        return f"{flag}{found[1]}{configs.did_you_mean(found[1], names)}: {', '.join(names)}"
    if found := re.search(
        r"Error parsing (--[\w.-]+).*: (?:invalid literal for int|could not convert string to float)[^']*'([^']*)'",
        body,
    ):
        return f"{found[1]} {found[2]} is not a {'whole ' if 'int()' in body else ''}number; give one"
    if found := re.search(r"Missing value for argument '(-[^']*)'", body):
        return f"{found[1]} lacks its value; give one"
    if "nrecognized" in body:
        names = known()
        for word in argv:
            flag = word.partition("=")[0].replace("_", "-")
            if word.startswith("--") and flag not in names:
                near = difflib.get_close_matches(flag, names, n=1)
                return f"there is no option {word.partition('=')[0]}" + (f"; did you mean {near[0]}?" if near else "")
        words = body.partition("nrecognized options:")[2].split(" Perhaps you meant")[0].strip()
        return f"{words}: no option takes this; put it behind the option that it belongs to, or leave it out"
    if "(required)" in body:
        parts = body.partition(": ")[2].split("(required)")[:-1]
        flags = [_argument(part.strip()) for part in parts]
        return f"missing: {', '.join(flags)}; give {'it' if len(flags) == 1 else 'them'}"
    return body or "wrong arguments"


def _argument(told: str) -> str:
    """An argument out of its line of --help: its flag, or what stands there of one without."""
    flag = re.match(r"--[a-z][\w.-]*\w", told)
    return flag[0] if flag else f"an argument ({re.sub(r'^[A-Z]+ ', '', told).rstrip('.')})"


def set_aside(num: int, *, ok: bool) -> int:
    """The exit code of batch work that set `num` images aside; `ok`: the command was given --set-aside-ok."""
    return SET_ASIDE if num and not ok else DONE


def tally(reasons: Iterable[str], most: int = 3) -> str:
    """The `most` commonest reasons, or one more, without their particulars, each with how often it is there."""
    return told(collections.Counter(map(kind, reasons)), most)


def told(kinds: "collections.Counter[str]", most: int = 3) -> str:
    """As `tally`, of kinds of reasons that are counted already."""
    counts = kinds.most_common()
    if len(counts) > most + 1:
        counts[most:] = [("others", sum(count for _, count in counts[most:]))]
    return ", ".join(f"{printable(reason)} ({count:,})" for reason, count in counts)


def kind(reason: str) -> str:
    """A reason without what is particular to one image: its size, what stands in parentheses, the remedy."""
    return re.split(r"[;(]", re.sub(r"^[\d,]+ x [\d,]+ pixels; ", "", reason))[0].strip()


def reasons_text(rows: Iterable[tuple[str, str]]) -> bytes:
    """rejected.txt: image and reason, parted by a tab, a line each."""
    return "".join(f"{printable(name)}\t{printable(reason)}\n" for name, reason in rows).encode()


def run(main: Callable[[], int]) -> None:
    """Run an entry point and end the process with its exit code; a user's mistake costs one line, no traceback, and so
    does a signal."""
    _take_streams()
    stopping.install()
    code: Any
    with contextlib.suppress(OSError):  # nobody can be told that stderr is full
        try:
            _check_folder()
            try:
                code = main()
            except SystemExit as stop:  # --help
                code = stop.code
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = stopping.exit_code()
            print(f"\n{stopping.word()}; {stopping.GOES_ON}", file=sys.stderr)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and error.filename == STDOUT:  # it went to a program such as `head`
                code = 128 + signal.SIGPIPE
            elif (cause := input_error(error)) is None:
                code = FAILED
                traceback.print_exc()
            else:
                code = WRONG_INPUT
                print(f"error: {cause}", file=sys.stderr)
    stopping.settle()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # else the interpreter tries it again, and says so
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


STDOUT = "standard output"


class _Stdout(io.FileIO):
    """File descriptor 1, whose errors say that they are of it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise


def _take_streams() -> None:
    """Streams that take any text, and lead nowhere where they are closed: else the next file that is opened would be
    the output of whatever prints."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not what a test has put there
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        ours = _Stdout(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            ours if isinstance(sys.stdout.buffer, io.RawIOBase) else io.BufferedWriter(ours),  # python -u
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=sys.stdout.line_buffering,
            write_through=sys.stdout.write_through,
        )


def _check_folder() -> None:
    """Refuse to work in a folder that is no more: libraries end the process where they look for themselves.

    Raises:
        InputError: it was deleted.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the working directory has been deleted; go to one that is there (cd)") from None


def dispatch() -> None:
    """`ddpm-translate NAME …`, which is `python -m jobs.NAME …`."""
    run(lambda: named(sys.argv[1:]))


def named(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with, or list those there are; the exit code.

    Raises:
        InputError: there is no such command; or as the command does.
    """
    from ddpm_core import config as configs

    there = commands()
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: ddpm-translate COMMAND …, the same as python -m jobs.COMMAND …; COMMAND --help lists its options\n"
        )
        for name, about in there.items():
            print(f"  {name:<12} {about}")
        return DONE
    name, *words = argv
    if name not in there:
        raise InputError(f"{name}{configs.did_you_mean(name, there)}: {', '.join(there)}")
    module = importlib.import_module(f"jobs.{name}")
    sys.argv = [str(module.__file__), *words]  # what records tell of the command is the same either way
    return module.main(words)


def commands() -> dict[str, str]:
    """The entry points at the top of `jobs` and what each does, by the first line of its file."""
    import jobs

    found = {}
    for module in pkgutil.iter_modules(jobs.__path__):
        if not module.ispkg:
            source = Path(jobs.__path__[0], f"{module.name}.py").read_text(encoding="utf-8")
            found[module.name] = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    return found


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
        if isinstance(current, OSError) and current.errno in (errno.ENOSPC, errno.EDQUOT):  # of whatever library
            place = current.filename or "a file, perhaps in TMPDIR"
            return InputError(f"{place}: no space left on the device; free some or write elsewhere")
        if isinstance(current, OSError) and current.filename == STDOUT:
            return InputError(f"{STDOUT}: {current.strerror}; send it elsewhere")
        if isinstance(current, FileNotFoundError) and "No usable temporary directory" in str(current):
            return InputError("there is no folder for temporary files that can be written to; set TMPDIR to one")
        todo += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        todo += list(getattr(current, "worker_failures", {}).values())
        if type(current).__module__.startswith("ray."):  # Ray Data keeps a task's exception as text only
            told += re.findall(r"^ddpm_core\.errors\.InputError: (.+)$", str(current), re.MULTILINE)
    return InputError(told[-1]) if told else None


@contextlib.contextmanager
def ray_session(*, start: bool = True) -> Iterator[None]:
    """Ray, quiet: the cluster of RAY_ADDRESS or of the submitted job where there is one, else one started here.

    `start` False: only quiet; what runs in this process alone needs no cluster.

    Logs of workers stay in Ray's session folder; their errors come back as exceptions.

    Raises:
        InputError: there is none, and none can be started.
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
        cluster.init()
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
