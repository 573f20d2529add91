"""Grafana's dashboards: their queries, and a real Prometheus that scrapes as cluster/monitoring says to ask them of."""

import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import ROOT, free_port

MONITORING = ROOT / "cluster/monitoring"
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed")


def queries(dashboard: str) -> dict[str, str]:
    """Those of all panels, where All is chosen for each variable, with the panel's title."""
    content = json.loads((MONITORING / dashboard).read_text())
    chosen = {each["name"]: each.get("allValue", "") for each in content["templating"]["list"]}
    return {
        re.sub(r"\$(\w+)", lambda name: chosen[name[1]], target["expr"]): panel["title"]
        for panel in content["panels"]
        for target in panel["targets"]
    }


@contextlib.contextmanager
def prometheus(folder: Path, job: str, **found: list[Any]) -> Iterator[Callable[[str], bool]]:
    """Whether a query shows a number, asked of a Prometheus that has one of our jobs.

    `found`: where that job's targets are, as the configuration has it.
    """
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (scraped,) = [each for each in config["scrape_configs"] if each["job_name"] == job]
    assert found.keys() <= scraped.keys()
    file, port = folder / "prometheus.yml", free_port()
    file.write_text(
        yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [{"job_name": job, **found}]})
    )
    flags = (f"config.file={file}", f"storage.tsdb.path={folder / 'data'}", f"web.listen-address=127.0.0.1:{port}")
    command = ["prometheus", *(f"--{flag}" for flag in flags)]

    def shows(query: str) -> bool:
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}, timeout=300).json()
        assert answer["status"] == "success", answer
        return any(math.isfinite(float(each["value"][1])) for each in answer["data"]["result"])

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
                assert server.poll() is None
            yield shows
        finally:
            server.terminate()
