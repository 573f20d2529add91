"""One driver at a time in a folder."""

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_core import storage
from ddpm_core.errors import InputError

RENEW_S, SILENT_S = 20.0, 60.0
"""How often a driver says that it is at work, and after what silence another takes its place."""


_mine: set[str] = set()
"""Ids of the drivers of this process."""


class Held:
    """A folder that is this driver's, as long as nobody has taken it."""

    def __init__(self, uri: str, me: dict[str, Any]) -> None:
        self.uri, self.me = uri, me
        self.taken_by: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises InputError where another driver has taken over."""
        if self.taken_by is not None:
            raise InputError(f"{self.uri}: {_who(self.taken_by)} has taken over, since this one was silent for long")

    def renew(self) -> None:
        """Say that we are at work, unless another does."""
        there = _driver(self.uri)
        if there is not None and there["id"] != self.me["id"]:
            self.taken_by = there
        else:
            storage.write_bytes(self.uri, json.dumps({**self.me, "renewed": time.time()}).encode())


@contextlib.contextmanager
def exclusive(output: str) -> Iterator[Held]:
    """Keep other drivers out of a folder: driver.json says that one is at work, as long as it is renewed.

    Raises:
        InputError: another one is at work.
    """
    uri = storage.join(output, "driver.json")
    me: dict[str, Any] = {"host": platform.node(), "pid": os.getpid(), "id": uuid.uuid4().hex}
    held, mine = Held(uri, me), json.dumps({**me, "renewed": time.time()}).encode()
    if not storage.write_once(uri, mine):
        before = _driver(uri)
        if before is not None and not _ended(before, me):
            print(
                f"{output}: {_who(before)} was at work there; up to {SILENT_S:.0f} s to see if it still is",
                file=sys.stderr,
            )
            deadline = time.monotonic() + SILENT_S
            while (now := _driver(uri)) == before and time.monotonic() < deadline:
                time.sleep(RENEW_S / 20)
            if now is not None and now != before:
                raise InputError(
                    f"{output}: another driver is at work there ({_who(before)}); wait for it, or stop it: "
                    f"{SILENT_S:.0f} s after its last sign this command takes over"
                )
        with contextlib.suppress(FileNotFoundError):
            storage.delete_file(uri)
        if not storage.write_once(uri, mine):
            raise InputError(f"{output}: another driver has just begun there; wait for it, or stop it")
    _mine.add(me["id"])
    over = threading.Event()

    def renew() -> None:
        while not over.wait(RENEW_S) and held.taken_by is None:
            with contextlib.suppress(InputError):  # what the driver itself writes meets the same store, and says so
                held.renew()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        over.set()
        thread.join()
        _mine.discard(me["id"])
        with contextlib.suppress(FileNotFoundError, InputError):
            if held.taken_by is None:
                storage.delete_file(uri)


def _who(driver: dict[str, Any]) -> str:
    return f"process {driver['pid']} on {driver['host']}"


def holder(output: str) -> str | None:
    """Who is at work in a folder, as far as driver.json says; None: nobody, or one that has ended."""
    found, me = _driver(storage.join(output, "driver.json")), {"host": platform.node(), "pid": os.getpid()}
    if found is None or _ended(found, me) or time.time() - found.get("renewed", 0) > SILENT_S + RENEW_S:
        return None
    return _who(found)


def _driver(uri: str) -> dict[str, Any] | None:
    """What driver.json says, where it says something."""
    try:
        found = storage.read_json(uri)
    except (FileNotFoundError, *storage.NOT_JSON):
        return None
    known = isinstance(found, dict) and {"host", "pid"} <= found.keys()
    return {"id": "", **found} if known else None


def _ended(driver: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether it was on this machine and is no more; a container begun anew may have its name and number."""
    if (driver["host"], driver["pid"]) == (me["host"], me["pid"]):
        return driver["id"] not in _mine
    return driver["host"] == me["host"] and Path("/proc/self").exists() and not Path(f"/proc/{driver['pid']}").exists()
