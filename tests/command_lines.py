"""Command lines in prose and definitions: found, and given to the parsers of the commands themselves."""

import importlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT

from jobs.common import cli

JOB, SERVE, SUBMIT, MAKE = "python -m jobs.", "serve run ", "ray job submit ", "make "
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = {"", "bash", "sh"}
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


class Parsed(Exception):
    pass


def in_markdown(text: str) -> Iterator[str]:
    """Every command of a fenced block and every command between backticks; a backslash joins lines."""
    for language, block in FENCE.findall(text):
        if language in SHELL:
            for line in block.replace("\\\n", " ").splitlines():
                yield from command_in(line)
    for span in CODE.findall(FENCE.sub("", text)):
        yield from command_in(" ".join(span.split()))


def command_in(line: str) -> Iterator[str]:
    """The command of ours that a line holds: what stands after settings of the environment and `&&` counts."""
    for part in re.split(r"\s&&\s|;\s", line):
        part = re.sub(r"^(\w+=\S+\s+)+", "", part.strip())
        if part.startswith((JOB, SERVE, SUBMIT, MAKE)):
            yield part


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as it would be when typed.

    Raises:
        InputError: the command's own parser does not accept it.
        AssertionError: what is started is not there.
    """
    words = shlex.split(command, comments=True)
    if command.startswith(SUBMIT):
        assert "--" in words, command
        check(shlex.join(words[words.index("--") + 1 :]), monkeypatch)
    elif command.startswith(SERVE):
        check_serve(words[2:])
    elif command.startswith(MAKE):
        targets = [word for word in words[1:] if "=" not in word]
        assert targets
        assert set(targets) <= make_targets(), command
    else:
        assert command.startswith(JOB), command
        check_job(words[2], words[3:], monkeypatch)


def check_job(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = cli.parse

    def parse_only(*args: Any, **kwargs: Any) -> Any:
        parse(*args, **kwargs)
        raise Parsed

    main: Any = importlib.import_module(module).main
    with monkeypatch.context() as patch:
        patch.setattr(cli, "parse", parse_only)
        with pytest.raises((Parsed, SystemExit)) as ended:
            main(arguments)
    assert ended.type is Parsed or "--help" in arguments, arguments


def check_serve(words: list[str]) -> None:
    from serve.schemas import Arguments, validate

    target, *values = words
    assert target == "serve.app:build_app"
    validate(Arguments, dict(value.split("=", 1) for value in values))
