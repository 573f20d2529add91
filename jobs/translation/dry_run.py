"""What a translation would do, take and cost; nothing is written."""

import dataclasses
import itertools
import tempfile
import time
from typing import Any

from ddpm_core import storage
from jobs.common import cli
from jobs.common.progress import duration
from jobs.translation import batch as batches
from jobs.translation import driver
from jobs.translation.batch import Translate
from jobs.translation.listing import Passed
from jobs.translation.plan import TranslationJob
from jobs.translation.shards import SHARD_ROWS, Known, Shards, facts_of

NUM_TRIED = 10
WRITE_DOLLARS, READ_DOLLARS = 5e-6, 4e-7
"""List price of a request to S3 Standard in us-east-1, November 2026: PUT, COPY, POST and LIST; GET and all others."""
A_PAGE = 1000
"""Objects that one request lists."""


def run(job: TranslationJob) -> int:
    """Count, try some images in this process, and say what all would take; the exit code.

    Raises:
        InputError: as the command without --dry-run.
    """
    shards = Shards(job.args.output)
    known, passed = Known(shards.files, job.args.output, sweep=False), Passed()
    tried: list[dict[str, Any]] = []
    num_images = num_todo = num_bytes = 0
    images = job.sources.images(passed)
    while some := list(itertools.islice(images, SHARD_ROWS)):
        rows = list(shards.rows(some, known, facts_of(job), job.suffix))
        todo = [row for row in rows if row["status"] == ""]
        tried += [{**row, "path": row.get("path")} for row in todo[: NUM_TRIED - len(tried)]]
        num_images, num_todo = num_images + len(rows), num_todo + len(todo)
        num_bytes += sum(row["size"] for row in todo)
    for note in passed.notes:
        print(note)
    print(
        f"{driver.counted(num_todo)} to translate of {num_images:,} that are listed; {num_bytes / 1e9:,.2f} GB to read"
    )
    if not tried:
        return cli.DONE
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = dataclasses.replace(job, args=dataclasses.replace(job.args, output=folder))
        began = time.perf_counter()
        translate = Translate(**driver.make(elsewhere, batches.AT_ONCE), num_threads=1)
        loaded = time.perf_counter()
        done = [translate(batch) for batch in driver.source(elsewhere, [(0, tried)]).batches()]
        each_s = (time.perf_counter() - loaded) / len(tried)
        written = sum(storage.file_sizes(folder).values())
    pairs = [pair for batch in done for pair in zip(batch["id"], batch["error"], strict=True)]
    bad = [str(error).removeprefix(f"{name}: ") for name, error in pairs if error]
    print(f"tried: {len(tried)}, of which {len(bad)} would be set aside" + (f": {cli.tally(bad)}" if bad else ""))
    print(f"time: {duration(loaded - began)} to load, then {duration(num_todo * each_s)} by one worker like this one")
    print(f"results: about {num_todo * written / max(len(tried) - len(bad), 1) / 1e9:,.2f} GB")
    reads = num_todo * storage.is_remote(job.args.input)
    lists = -(-num_images // A_PAGE) * storage.is_remote(job.args.input)
    writes = num_todo * storage.is_remote(job.args.output) + lists
    dollars = reads * READ_DOLLARS + writes * WRITE_DOLLARS
    print(f"requests to S3: {reads:,} to read, {writes:,} to list and write; at the list price {dollars:,.2f} dollars")
    return cli.DONE
