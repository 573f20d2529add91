"""One driver at a time in a folder."""

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_core import storage
from ddpm_core.errors import InputError

RENEW_S, SILENT_S = 20.0, 60.0
"""How often a driver says that it is at work, and after what silence another takes its place."""


@contextlib.contextmanager
def exclusive(output: str) -> Iterator[None]:
    """Keep other drivers out of a suite's folder: driver.json says that one is at work, as long as it is renewed.

    Raises:
        InputError: another one is at work.
    """
    uri, me = storage.join(output, "driver.json"), {"host": platform.node(), "pid": os.getpid()}
    before = _driver(uri)
    if before is not None and not _ended(before, me):
        who = f"process {before['pid']} on {before['host']}"
        print(f"{output}: {who} was at work there; up to {SILENT_S:.0f} s to see if it still is", file=sys.stderr)
        deadline = time.monotonic() + SILENT_S
        while (now := _driver(uri)) == before and time.monotonic() < deadline:
            time.sleep(RENEW_S / 20)
        if now is not None and now != before:
            raise InputError(f"{output}: another driver is at work there ({who}); wait for it, or stop it")
    over = threading.Event()

    def renew() -> None:
        while True:
            with contextlib.suppress(InputError):  # what the driver itself writes meets the same store, and says so
                storage.write_bytes(uri, json.dumps({**me, "renewed": time.time()}).encode())
            if over.wait(RENEW_S):
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(FileNotFoundError, InputError):
            storage.delete_file(uri)


def holder(output: str) -> str | None:
    """Who is at work in a folder, as far as driver.json says; None: nobody, or one that has ended."""
    found, me = _driver(storage.join(output, "driver.json")), {"host": platform.node(), "pid": os.getpid()}
    if found is None or _ended(found, me) or time.time() - found.get("renewed", 0) > SILENT_S + RENEW_S:
        return None
    return f"process {found['pid']} on {found['host']}"


def _driver(uri: str) -> dict[str, Any] | None:
    """What driver.json says, where it says something."""
    try:
        found = storage.read_json(uri)
    except (FileNotFoundError, *storage.NOT_JSON):
        return None
    return found if isinstance(found, dict) and {"host", "pid"} <= found.keys() else None


def _ended(driver: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether it was on this machine and is no more."""
    return driver["host"] == me["host"] and Path("/proc/self").exists() and not Path(f"/proc/{driver['pid']}").exists()
