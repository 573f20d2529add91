"""A folder that a command has left: how far it is, and what it says of itself by the records of its kind."""

import contextlib
import dataclasses
import functools
import posixpath
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import kinds, lock

QUIET = timedelta(minutes=10)
"""What is not finished and was written to since is taken to be at work; checkpoints come as often."""
PARTS: dict[kinds.KindName, set[kinds.KindName]] = {
    "run": {"checkpoint"},
    "sweep": {"run", "checkpoint"},
    "experiments": set(kinds.KINDS),
    "recipe": set(kinds.KINDS),
}
"""Folders of other kinds that belong to one."""
LISTED_APART: set[kinds.KindName] = {"experiments", "recipe"}
"""Those whose parts are listed by themselves, too."""


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a folder."""

    size: int
    written: datetime


@dataclasses.dataclass(frozen=True)
class Found:
    """One folder of ours."""

    uri: str
    kind: kinds.KindName
    record: Mapping[str, Any]
    """The file that tells its kind."""
    files: Mapping[str, File]
    """By their paths in it."""

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    @functools.cached_property
    def best(self) -> Mapping[str, Any]:
        """best.json of a run or a sweep, {} where there is none."""
        return self._json("best.json")

    @functools.cached_property
    def environment(self) -> Mapping[str, Any]:
        """Where it was made."""
        inside = self.record.get("environment")
        return inside if isinstance(inside, dict) else self._json("environment.json")

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A run's rows of metrics."""
        with contextlib.suppress(FileNotFoundError, *storage.NOT_JSON):
            return storage.read_json_lines(storage.join(self.uri, "metrics.jsonl"))
        return []

    @property
    def date(self) -> str:
        """When something was last written, in this machine's time."""
        return max(file.written for file in self.files.values()).astimezone().strftime("%Y-%m-%d %H:%M")

    @property
    def is_complete(self) -> bool:
        if self.kind == "run":
            return self.best.get("epochs") is not None and self.best["epochs"] == self._training("epochs")
        if self.kind == "sweep":
            done = self.best.get("sweep", {})
            return all(done.get(name, -1) >= self.record.get(name, 0) for name in ("num_trials", "num_points"))
        if self.kind == "translation":
            return bool(self.record.get("complete"))
        if self.kind == "experiments":
            return self._num_done == self._num_commands
        if self.kind == "recipe":
            return "evaluation/metrics.json" in self.files
        return True

    @property
    def driver(self) -> str | None:
        """Who is at work there, or may be."""
        if (who := lock.holder(self.uri)) is not None:
            return who
        last = max(file.written for file in self.files.values())
        ago = datetime.now(UTC) - last
        return f"written to {ago.total_seconds():.0f} s ago" if not self.is_complete and ago < QUIET else None

    @property
    def state(self) -> str:
        return "complete" if self.is_complete else "at work" if self.driver else "unfinished"

    @property
    def progress(self) -> str:
        """How much of it there is."""
        if self.kind == "data set":
            return f"{sum(self.record.get('splits', {}).values()):,} rows of {self.record.get('image_size')} px"
        if self.kind == "run":
            return f"{max((row.get('epoch', 0) for row in self.rows), default=0)} of {self._training('epochs')} epochs"
        if self.kind == "sweep":
            return f"{self.record.get('num_trials', 0)} trials, {self.record.get('num_points', 0)} points"
        if self.kind == "translation":
            counts = self.record.get("counts", {})
            return f"{counts.get('ok', 0):,} of {counts.get('images', 0):,} images"
        if self.kind == "evaluation":
            domains = self.record.get("domains", {}).values()
            return f"{sum(each.get('num_images', 0) for each in domains):,} images"
        if self.kind == "experiments":
            return f"{self._num_done} of {self._num_commands} commands"
        return ""

    @property
    def figure(self) -> str:
        """The best it has come to."""
        if self.kind == "evaluation":
            kids = {name: value for name, value in self.metrics.items() if name.endswith(" kid")}
            return ", ".join(f"{name} {value:.3g}" for name, value in kids.items())
        loss = (self.best.get("metric") or {}).get("loss")
        return "" if loss is None else f"val loss {loss:.4g}"

    @property
    def checkpoint(self) -> str:
        """Its best one."""
        return str(self.best.get("checkpoint") or "")

    @property
    def options(self) -> Mapping[str, Any]:
        """What it was asked for."""
        of_record: dict[kinds.KindName, Iterable[str]] = {
            "sweep": ("data", "space", "sampling_space", "num_trials", "num_points", "num_images", "seed", "options"),
            "evaluation": ("options", "split", "seed", "sampling", "nets"),
            "translation": ("options",),
            "experiments": ("plan",),
            "comparison": ("a", "b"),
        }
        if self.kind in of_record:
            return {name: self.record.get(name) for name in of_record[self.kind]}
        left_out = {"format", "format_version", "shards", "made_with"}
        return {name: value for name, value in self.record.items() if name not in left_out}

    @property
    def versions(self) -> Mapping[str, Any]:
        """What it was made with."""
        there = self.environment
        return {
            **there.get("packages", {}),
            **{n: there.get(n) for n in ("python", "git_commit", "source_hash", "gpus")},
        }

    @property
    def metrics(self) -> dict[str, float]:
        """Its figures by name."""
        if self.kind == "evaluation":
            return {
                f"{domain} {name}": value["mean"]
                for domain, told in self.record.get("domains", {}).items()
                for name, value in told.get("methods", {}).get("model", {}).get("metrics", {}).items()
            }
        found: dict[str, float] = {}
        if self.kind == "run":
            for row in self.rows:  # the last of each split
                prefix = "validation" if row.get("split") == "val" else "training"
                numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
                found |= {f"{prefix} {name}": value for name, value in numbers.items() if name != "step"}
        if isinstance(loss := (self.best.get("metric") or {}).get("loss"), float):
            found["best validation loss"] = loss
        return found

    def _training(self, name: str) -> Any:
        return (self.record.get("training") or {}).get(name)

    @property
    def _num_commands(self) -> int:
        return len(self.record.get("plan", {}).get("commands", ()))

    @property
    def _num_done(self) -> int:
        return sum(name.startswith("commands/") for name in self.files)

    def _json(self, file: str) -> dict[str, Any]:
        if file not in self.files:
            return {}
        with contextlib.suppress(FileNotFoundError, *storage.NOT_JSON):
            content = storage.read_json(storage.join(self.uri, file))
            return content if isinstance(content, dict) else {}
        return {}


def below(root: str) -> list[Found]:
    """The folders of ours at and below `root`, by their paths; what is a part of one comes with that one.

    Raises:
        InputError: nothing is there, or the store refuses.
    """
    files = _files(root)
    if not files:
        raise InputError(f"{root} is empty or not there; give the folder that holds your runs")
    named = {kind.files[0] for kind in kinds.KINDS.values()}
    folders = sorted({posixpath.dirname(name) for name in files if posixpath.basename(name) in named})
    found: list[Found] = []
    for folder in folders:
        uri = storage.join(root, folder) if folder else root
        around = [each for each in found if kinds.inside(uri, each.uri)]
        if any(each.kind not in LISTED_APART and _may_be_part(uri, each) for each in around):
            continue
        kind = kinds.kind_of(uri)
        if kind is None:
            continue
        mine = {name.removeprefix(f"{folder}/") if folder else name: file for name, file in _within(files, folder)}
        found.append(Found(uri, kind[0], kind[1], mine))
    return found


def _may_be_part(uri: str, whole: Found) -> bool:
    """A run's checkpoints and a sweep's trials are not worth reading one by one."""
    inner = uri.removeprefix(f"{whole.uri}/").partition("/")[0]
    return inner in {"run": ("checkpoints",), "sweep": ("trials",)}.get(whole.kind, ())


def _within(files: Mapping[str, File], folder: str) -> Iterable[tuple[str, File]]:
    return ((name, file) for name, file in files.items() if not folder or name.startswith(f"{folder}/"))


def at(uri: str, *, flag: str) -> Found:
    """The one at `uri`.

    Raises:
        InputError: it is none of ours.
    """
    kind = kinds.kind_of(uri)
    if kind is None:
        raise InputError(
            f"{flag} {uri} is no folder that one of the commands has left; jobs.runs list shows those there are"
        )
    return Found(uri, kind[0], kind[1], _files(uri))


def _files(uri: str) -> dict[str, File]:
    import pyarrow.fs

    fs, path = storage.filesystem(uri)
    selector = pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True)
    infos = storage.with_retries(uri, lambda: fs.get_file_info(selector))
    never, found = datetime.fromtimestamp(0, UTC), {}
    for info in infos:
        with contextlib.suppress(UnicodeDecodeError):  # a name that is no UTF-8 is none of ours
            if info.is_file:
                found[info.path[len(path) :].lstrip("/")] = File(info.size or 0, info.mtime or never)
    return found
