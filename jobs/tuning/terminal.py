"""A sweep on the terminal: a table kept current, or in a log a line for what has ended."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from jobs.common.progress import duration

NUM_SHOWN = 12
"""Rows of the table: the best, and the latest."""
LOG_WIDTH = 160
"""Characters of a line in a log."""
STYLES = {"complete": "green", "stopped": "yellow", "diverged": "red", "failed": "red", "running": "cyan"}
STAGES = {
    "training": "stage 1, training",
    "sampling": "stage 2, sampling",
    "checking": "measuring the winners again",
    "finished": "finished",
    "interrupted": "interrupted; the same command goes on",
    "failed": "failed",
}
WORDS = {"trials": "trial", "points": "sampling trial"}


class Table:
    """Shows `results` as `jobs.tuning.monitor.Monitor.results` makes them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.console = Console(file=sys.stderr if stream is None else stream, highlight=False, soft_wrap=True)
        self.live: Live | None = None
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=2, transient=False)
            self.live.start()
        self.ended: set[tuple[str, int]] = set()
        self.state = ""

    def show(self, results: Mapping[str, Any], *, news: bool = True) -> None:
        """`news` False: an earlier command has shown what has ended by now."""
        if self.live is not None:
            self.live.update(Group(headline(results), table(results)))
            return
        rows = [(kind, row) for kind in ("trials", "points") for row in results[kind] if row["state"] != "running"]
        for kind, row in rows:
            if (kind, row["number"]) not in self.ended:
                self.ended.add((kind, row["number"]))
                if news:
                    self.console.print(line(kind, row, results), markup=False)
        if results["state"] != self.state:
            if self.state in ("training", "sampling"):
                self.console.print(table({**results, "state": self.state}))
            self.state = results["state"]
            self.console.print(headline(results))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()


def headline(results: Mapping[str, Any]) -> Text:
    """Stage, counts and the time left."""
    counted = []
    for kind, word in WORDS.items():
        of_state: dict[str, int] = {}
        for row in results[kind]:
            of_state[row["state"]] = of_state.get(row["state"], 0) + 1
        if of_state:
            parts = ", ".join(f"{count} {state}" for state, count in of_state.items())
            counted.append(f"{word}s: {parts}")
    left = results.get("left_s")
    facts = [STAGES[results["state"]], *counted, *([f"about {duration(left)} left"] if left is not None else [])]
    if results["state"] == "finished" and results.get("message"):
        facts.append(results["message"])
    return Text(f"sweep: {'; '.join(facts)}", style="bold")


def line(kind: str, row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What a log says of a trial that has ended."""
    told = f"sweep: {WORDS[kind]} {row['number']} {row['state']}: {values(row)}"
    if kind == "trials":
        told += f"; loss {number(row.get('loss'))} after {row.get('epochs', 0)} epochs"
        best = min((each for each in results[kind] if each["state"] == "complete"), key=_loss, default=None)
        told += f" (best {number(best['loss'])}, trial {best['number']})" if best else ""
    elif row.get("objectives"):
        told += "; " + ", ".join(f"{name} {number(value)}" for name, value in row["objectives"].items())
    if row.get("error"):
        told += f"; {row['error']}"
    if (left := results.get("left_s")) is not None:
        told += f"; about {duration(left)} left"
    return told


def table(results: Mapping[str, Any]) -> RichTable:
    """The best and the latest trials, of the second stage once there are any."""
    sampling = bool(results["points"])
    rows = list(results["points" if sampling else "trials"])
    shown = _chosen(rows, sampling)
    found = RichTable(box=None, pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row["values"]))
    objectives = list(dict.fromkeys(name for row in rows for name in row.get("objectives") or {}))
    for title in ["", "state", *(name.rpartition(".")[2] for name in names)]:
        found.add_column(title)
    for title in [*objectives] if sampling else ["loss", "epochs"]:
        found.add_column(title, justify="right")
    found.add_column("time", justify="right")
    for row in shown:
        mark = "★" if row.get("chosen") or (row["number"] == results.get("best_trial") and not sampling) else ""
        baseline = " (as given)" if row.get("hand") else ""
        still = " (no better than the source)" if row.get("translates") is False else ""
        cells = [f"{row['number']}{mark}{baseline}", row["state"] + still]
        cells += [number(row["values"].get(name)) for name in names]
        if sampling:
            cells += [number((row.get("objectives") or {}).get(name)) for name in objectives]
        else:
            cells += [number(row.get("loss")), str(row.get("epochs", 0))]
        cells.append("" if row.get("seconds") is None else duration(row["seconds"]))
        found.add_row(*cells, style=STYLES[row["state"]])
    return found


def _chosen(rows: Sequence[Mapping[str, Any]], sampling: bool) -> list[Mapping[str, Any]]:
    """At most NUM_SHOWN of them: the baseline and the chosen one, what runs, the best half, the latest."""
    best = [row for row in rows if row.get("front")] if sampling else sorted(rows, key=_loss)
    special = [row for row in rows if row.get("hand") or row.get("chosen")]
    running = [row for row in rows if row["state"] == "running"]
    wanted = [*special, *running, *best[: NUM_SHOWN // 2], *reversed(rows)]
    picked = list({row["number"]: row for row in wanted}.values())[:NUM_SHOWN]
    return sorted(picked, key=lambda row: row["number"])


def _loss(row: Mapping[str, Any]) -> float:
    return float("inf") if row.get("loss") is None else float(row["loss"])


def values(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {number(value)}" for name, value in row["values"].items())


def number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
