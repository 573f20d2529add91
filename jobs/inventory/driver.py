"""What was asked of the folders, told in lines."""

import os
import posixpath
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import cli, kinds, resume
from jobs.inventory import found
from jobs.inventory.found import Found
from jobs.inventory.options import Compare, List, Remove

LONGEST = 60
"""Letters of a value in a comparison."""


def run(options: List | Compare | Remove) -> int:
    """Do it; the exit code."""
    deeds: dict[type, Callable[[Any], int]] = {List: list_folders, Compare: compare, Remove: remove}
    return deeds[type(options)](options)


def list_folders(options: List) -> int:
    root = storage.absolute(options.uri, flag="URI")
    there = found.below(root)
    head = ("kind", "state", "", "best", "size", "last written", "where", "best checkpoint")
    rows = [
        (
            each.kind,
            each.state,
            each.progress,
            each.figure,
            size(each.num_bytes),
            each.date,
            posixpath.relpath(each.uri, root)
            if not storage.is_remote(root)
            else each.uri.removeprefix(root).strip("/"),
            each.checkpoint,
        )
        for each in there
    ]
    if not there:
        raise InputError(
            f"{root} holds nothing that one of the commands has left; give the folder that holds your runs"
        )
    for line in table([head, *rows]):
        print(line)
    print(f"{len(there)} in {root}, {size(sum(each.num_bytes for each in whole(there)))}")
    return cli.DONE


def whole(there: Iterable[Found]) -> list[Found]:
    """Those that lie in no other one."""
    top: list[Found] = []
    for each in there:
        if not any(kinds.inside(each.uri, above.uri) for above in top):
            top.append(each)
    return top


def compare(options: Compare) -> int:
    uris = {name: storage.absolute(uri, flag=name) for name, uri in (("A", options.a), ("B", options.b))}
    a, b = (found.at(uri, flag=name) for name, uri in uris.items())
    if a.kind != b.kind:
        raise InputError(f"A is {kinds.a(a.kind)}, B {kinds.a(b.kind)}: give two of one kind")
    for name, each in (("A", a), ("B", b)):
        print("  ".join(filter(None, [name, each.kind, each.state, each.progress, each.date, each.uri])))
    for title, left, right in (("options", a.options, b.options), ("versions", a.versions, b.versions)):
        rows = [(name, short(old), short(new)) for name, old, new in resume.differences(left, right)]
        print(f"\n{title}: {'those that differ' if rows else 'the same'}")
        for line in table(rows):
            print(f"  {line}")
    if rows := figures(a.metrics, b.metrics):
        print("\nfigures")
        for line in table([("", "A", "B"), *rows]):
            print(f"  {line}")
    if a.kind == "evaluation":
        print("\nwhich differences are more than chance: python -m jobs.evaluate compare A B")
    return cli.DONE


def figures(a: Mapping[str, float], b: Mapping[str, float]) -> list[tuple[str, str, str]]:
    def shown(side: Mapping[str, float], name: str) -> str:
        return f"{side[name]:.4g}" if name in side else ""

    return [(name, shown(a, name), shown(b, name)) for name in dict.fromkeys([*a, *b])]


def remove(options: Remove) -> int:
    uri = storage.absolute(options.uri, flag="URI")
    there = found.at(uri, flag="URI")
    if os.path.islink(uri):
        raise InputError(f"URI {uri} is a link; give the folder itself: {os.path.realpath(uri)}")
    minutes = found.QUIET.seconds // 60
    if not options.force and not there.is_complete and (who := there.driver) is not None:
        raise InputError(
            f"{uri} is at work ({who}); stop it, and wait until nothing was written for {minutes} minutes or give "
            "--force"
        )
    for other in found.below(uri):
        if other.uri != uri and other.kind not in found.PARTS.get(there.kind, set()):
            raise InputError(f"{uri} also holds {kinds.a(other.kind)}, {other.uri}; remove that first, or move it away")
    what = f"{there.kind} {uri}: {len(there.files):,} files, {size(there.num_bytes)}"
    if not options.yes:
        if not sys.stdin.isatty():
            raise InputError(f"{what}; give --yes to delete it without being asked")
        if input(f"delete the {what}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("kept")
            return cli.DONE
    # First what makes it count: killed half-way it is no longer taken for a whole one.
    for file in kinds.KINDS[there.kind].files:
        storage.delete_file(storage.join(uri, file))
    storage.delete_folder(uri)
    print(f"deleted: {what}")
    return cli.DONE


def size(num_bytes: int) -> str:
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= one:
            return f"{num_bytes / one:.3g} {unit}"
    return f"{num_bytes} B"


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with aligned columns; a column without content is left out."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    kept = [i for i in range(len(widths)) if any(row[i] for row in (rows[1:] or rows))]
    return ["  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows]
