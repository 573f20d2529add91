"""A translation as its driver sees it: shards are listed, done by the pool, and put together at the end."""

import collections
import contextlib
import functools
import itertools
import json
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ddpm_core import config as configs
from ddpm_core import images, provenance, storage
from ddpm_core.config import Framing, SamplingConfig
from ddpm_core.errors import InputError
from jobs.common import cli, lock, resume, workers
from jobs.common.progress import Progress
from jobs.datasets import reading
from jobs.reports import translation as reports
from jobs.translation import batch as batches
from jobs.translation import listing, packs
from jobs.translation.batch import Batch, Source, Translate
from jobs.translation.options import GuidanceNets, TranslateArgs
from jobs.translation.plan import TranslationJob
from jobs.translation.shards import Known, Result, Shards, facts_of

FORMAT, FORMAT_VERSION = "ddpm-translate-results", 2
MOST_PACKED = 256
"""Results in a parquet file; a kill loses as many of a worker's."""
NUM_PREVIEWS, PREVIEWS_A_ROW = 24, 3
"""Images shown in preview.png, the contact sheet."""
PREVIEW_SIDE = 192
"""Side of a photo there, in pixels."""
NUM_REASONS = 1000
"""Lines of rejected.txt, at most; rejected.parquet has them all."""
LOOK_AT = 300
"""A share of images that were set aside is judged from so many on."""
BRIEF_S = 2.0
"""A listing that takes no longer is waited for, so that the first line says how much there is to do."""
FLAGS = {
    name: flag
    for options in (TranslateArgs, SamplingConfig, GuidanceNets, Framing)
    for name, flag in resume.flags_of(options).items()
    if name not in ("checkpoint", "classifier_guidance", "identity_guidance")
}
"""Options of a record that are flags; of the nets it has the weights' fingerprints."""


def run(job: TranslationJob) -> int:
    """Do what is left to do of a job; the exit code.

    Raises:
        InputError: as `open_output` and `translate`; or another driver is at work in the output.
    """
    storage.check_writable(job.args.output)
    with lock.exclusive(job.args.output) as held:
        shards, known = open_output(job)
        with listed(job, shards, known) as passed:
            shards.is_listed.wait(BRIEF_S)
            todo = iter(shards.todo())
            check_listed(job, shards)
            if (first := next(todo, None)) is not None:
                announce(shards)
                with contextlib.nullcontext() if job.args.num_workers == 0 else cli.ray_session():
                    translate(job, shards, itertools.chain([first], todo), held)
            counts = shards.counts
            if counts.images == counts.unreadable:
                raise listing.none_found(job.args.input, passed)
            if first is None:
                num = counts.images - counts.unreadable
                print(f"nothing to do, {counted(num)} translated already: {job.args.output}")
        return finish(job, shards, passed, is_new=first is not None)


def announce(shards: Shards) -> None:
    counts, done = shards.counts, shards.counts.images - shards.counts.unreadable - shards.counts.todo
    if shards.is_listed.is_set():
        print(f"{counted(counts.todo)} to translate" + (f", {done:,} are done already" if done else ""))
    else:
        print(f"{counts.images:,} images are listed so far, {done:,} of them are done already; the listing goes on")


def open_output(job: TranslationJob) -> tuple[Shards, Known]:
    """What earlier runs of this command left in the output.

    Raises:
        InputError: it holds something else, or results of other options, or cannot be written.
    """
    output = job.args.output
    note = storage.join(output, "run.json")
    earlier = resume.read_record(note, FORMAT, FORMAT_VERSION)
    storage.check_writable(output)
    if earlier is None and any(item.name != "driver.json" for item in storage.walk(output)):
        raise InputError(f"--output {output} is not empty and holds no earlier translation; give a new folder")
    shards = Shards(output)
    known = Known(shards.files, output)
    if earlier is not None and known.num_ok and not job.args.replace:
        remedy = "give the old value back, a new --output folder, or --replace to do them again"
        old = earlier.get("options", {})
        resume.check_same(output, "results", old, job.options, flags=FLAGS, remedy=remedy)
    if not known.num_ok or job.args.replace:  # what an earlier command asked for and was refused binds nobody
        write_note(job)
    return shards, known


@contextlib.contextmanager
def listed(job: TranslationJob, shards: Shards, known: Known) -> Iterator[listing.Passed]:
    """The images listed into shards, by a thread, while this goes on; what is passed over."""
    passed, stop = listing.Passed(), threading.Event()

    def work() -> None:
        try:
            shards.list_images(job.sources.images(passed), known, facts_of(job), suffix=job.suffix, stop=stop)
            shards.is_listed.set()
            shards.listed.put(None)
        except BaseException as error:
            shards.listed.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield passed
    finally:
        stop.set()
        thread.join()


def translate(
    job: TranslationJob, shards: Shards, todo: Iterator[tuple[int, list[dict[str, Any]]]], held: lock.Held
) -> None:
    """Run what is to do through the network's copies, noting each batch as it comes back. Ray must run unless there are
    none.

    Raises:
        InputError: more copies than GPUs, a damaged data set, the store refuses, or another driver took over.
    """
    args = job.args
    num = shards.counts.todo if shards.is_listed.is_set() else math.inf
    pool = workers.pool(num / (args.batch_size or batches.AT_ONCE), args.num_workers)
    at_once = args.batch_size or (None if pool.on_gpus else batches.AT_ONCE)
    results = source(job, todo, rows_at_once(job, num, pool, at_once)).through(Translate, pool, **make(job, at_once))
    num_bad, num_seen, most_at_once = 0, 0, sys.maxsize
    why: collections.Counter[str] = collections.Counter()
    try:
        with Progress(total=0, unit="image", description="translate") as progress:
            for batch in results:
                held.check()
                if len(batch["most"]) and batch["most"].min() < most_at_once:
                    most_at_once = int(batch["most"].min())
                    print(f"out of memory: {counted(most_at_once)} at once from here on", file=sys.stderr)
                for number, rows in noted(batch).items():
                    shards.note(number, rows)
                    bad = [row.error.removeprefix(f"{name}: ") for name, row in rows.items() if row.status != "ok"]
                    num_bad, num_seen = num_bad + len(bad), num_seen + len(rows)
                    why.update(map(cli.kind, bad))
                check_rejected(job, num_bad, num_seen, why)
                check_listed(job, shards)
                progress.expect(shards.counts.todo, more=not shards.is_listed.is_set())
                progress.update(len(batch["id"]), f"{num_bad:,} set aside" if num_bad else "")
    finally:
        shards.flush()
    if missing := [name for shard in shards.open.values() for name in shard.rows if name not in shard.results]:
        raise RuntimeError(f"{len(missing)} images came back without a result, the first: {missing[0]}")


def rows_at_once(job: TranslationJob, num_images: float, pool: workers.Pool, at_once: int | None) -> int:
    """Images in a batch: those that the network sees `at_once`; or more where it is to find how many are best, or where
    their results become one file, if there are several batches for each worker."""
    least = at_once or batches.AT_ONCE
    most = MOST_PACKED if job.args.output_format == "parquet" else least if at_once else batches.MOST_AT_ONCE
    return max(math.ceil(min(num_images / (4 * pool.size), most) / least), 1) * least


def check_rejected(job: TranslationJob, num_bad: int, num_seen: int, why: "collections.Counter[str]") -> None:
    """Raises InputError where more images than --max-rejected allows were set aside."""
    if job.max_rejected is None:
        return
    most, is_share = job.max_rejected
    if num_bad > (most * num_seen if is_share else most) and (num_seen >= LOOK_AT or not is_share):
        raise InputError(
            f"{num_bad:,} of {num_seen:,} images were set aside, more than --max-rejected {job.args.max_rejected}: "
            f"{cli.told(why)}; mend the input, or allow more"
        )


def check_listed(job: TranslationJob, shards: Shards) -> None:
    """The same of what the listing says that it cannot be read."""
    counts = shards.counts
    check_rejected(job, counts.unreadable, counts.images, collections.Counter({"unreadable": counts.unreadable}))


def make(job: TranslationJob, at_once: int | None) -> dict[str, Any]:
    """What a worker is made with. `at_once`: images that the network sees, None to find how many are best."""
    return {
        "checkpoint_uri": job.loaded.path,
        "ema": job.loaded.ema,
        "sampling": configs.to_dict(job.sampling),
        "guides": configs.to_dict(job.guides),
        "output": job.args.output,
        "record": record(job),
        "mark_key": job.mark_key,
        "tiles": job.args.tiles,
        "output_format": job.args.output_format,
        "identity_net": job.args.identity_net,
        "batch_size": at_once,
    }


def record(job: TranslationJob) -> dict[str, Any]:
    """What each file says of how it was made, which does not hang on where things lie."""
    made_with = {name: value for name, value in job.options.items() if name not in ("input", "mark_key")}
    return {**made_with, "licence": job.loaded.config.data.licence}


def source(
    job: TranslationJob, todo: Iterable[tuple[int, list[dict[str, Any]]]], batch_size: int = batches.AT_ONCE
) -> Source:
    """The images to translate: of each shard by its number."""
    args = job.args
    common: dict[str, Any] = {"to": args.domain, "seed": args.seed}
    rescue = workers.Rescue(batches.halves, batches.given_up)
    if job.card is not None:
        split = reading.open_split(args.input, args.split, rows_in_piece=1)
        read = functools.partial(batches.read_piece, split=split, batch_size=batch_size, **common)
        tasks = (task for number, rows in todo for task in batches.piece_tasks(rows, shard=number))
        return Source(tasks, read, rescue)
    root = job.sources.root
    read = functools.partial(
        batches.read_images,
        root=root,
        image_size=job.loaded.config.image_size,
        template=job.template,
        output_size=args.framing.output_size,
        which=args.framing.faces,
        column=job.sources.column,
        **common,
    )

    def tasks_of(number: int, rows: list[dict[str, Any]]) -> Iterator[Batch]:
        if job.sources.column:
            return batches.piece_tasks(rows, shard=number, most=batch_size)
        return batches.file_tasks(rows, root, shard=number, batch_size=batch_size)

    tasks = (task for number, rows in todo for task in tasks_of(number, rows))
    return Source(tasks, read, rescue)


def noted(batch: Batch) -> dict[int, dict[str, Result]]:
    """What became of a batch's images: of each shard, by id."""
    found: dict[int, dict[str, Result]] = {}
    columns = ("shard", "id", "output", "error", "note", "width", "height", "seconds", "identity_cosine")
    for shard, name, output, error, note, width, height, seconds, like in zip(
        *(batch[each] for each in columns), strict=True
    ):
        found.setdefault(int(shard), {})[str(name)] = Result(
            output=str(output),
            status="rejected" if error else "ok",
            error=str(error),
            note=str(note),
            width=None if error else int(width),
            height=None if error else int(height),
            seconds=float(seconds),
            identity_cosine=None if error or np.isnan(like) else float(like),
        )
    return found


# -- the end ------------------------------------------------------------------------------------------------------


def finish(job: TranslationJob, shards: Shards, passed: listing.Passed, *, is_new: bool) -> int:
    """The manifest, the reasons in plain text too, the preview, run.json; the exit code."""
    output = job.args.output
    shards.finish(job.options)
    if job.args.output_format == "parquet":
        packs.tidy(output, shards.done, is_first=not shards.files)
    end = End()
    for table in shards.done():
        end.add(table)
    preview = write_preview(job, shards, end.num_ok) if is_new else None
    if not is_new:
        preview = (resume.read_record(storage.join(output, "run.json"), FORMAT, FORMAT_VERSION) or {}).get("preview")
    reasons = storage.join(output, "rejected.txt")
    if sum(end.num_bad):
        storage.write_bytes(reasons, cli.reasons_text(end.reasons))
    elif storage.exists(reasons):
        storage.delete_file(reasons)
    note = write_note(job, end=end, passed=passed, preview=preview)
    write_report(job, note, end)
    shards.remove()
    num_bad, total = sum(end.num_bad), sum(end.num_ok) + sum(end.num_bad)
    print(f"{counted(sum(end.num_ok))} translated: {output}")
    for text in passed.notes:
        print(text)
    if end.num_notes:
        print(f"{counted(end.num_notes)} with a note in manifest.parquet: {cli.told(end.notes)}")
    if passed.num_twice:
        print(f"given more than once, of which once counts: {passed.num_twice:,}")
    if passed.of_the_side:
        print(f"passed over, rows that are {job.args.domain} already: {passed.of_the_side:,}")
    if num_bad:
        print(
            f"{num_bad:,} of {total:,} images were set aside: {cli.told(end.why)}; the reasons are in {reasons}",
            file=sys.stderr,
        )
    return cli.set_aside(num_bad, ok=job.args.set_aside_ok)


class End:
    """What a finished job comes to, counted shard by shard."""

    MOST_KINDS = 1000
    NUM_LEAST = 10

    def __init__(self) -> None:
        self.num_ok: list[int] = []
        """Of each shard."""
        self.num_bad: list[int] = []
        self.num_notes = 0
        self.reasons: list[tuple[str, str]] = []
        """Of the first images that were set aside."""
        self.why: collections.Counter[str] = collections.Counter()
        self.notes: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        """Of work, over all images."""
        self.cosines = np.zeros(reports.BINS, int)
        """How many images are how like their sources."""
        self.least: list[tuple[float, str]] = []
        """The least like."""

    def add(self, table: pa.Table) -> None:
        status = table["status"].to_pylist()
        self.num_ok.append(status.count("ok"))
        self.num_bad.append(status.count("rejected"))
        for name, error in rows_of(table, "rejected", "id", "error"):
            if len(self.reasons) < NUM_REASONS:
                self.reasons.append((name, error))
            self._count(self.why, error.removeprefix(f"{name}: "))
        self.seconds += pa.compute.sum(table["seconds"]).as_py() or 0.0
        known = table.filter(pa.compute.is_valid(table["identity_cosine"]))
        cosines = known["identity_cosine"].to_numpy()
        self.cosines += np.histogram(cosines, reports.BINS, (-1, 1))[0]
        lowest = np.argsort(cosines, kind="stable")[: self.NUM_LEAST]
        names = known["id"].take(lowest).to_pylist()
        self.least = sorted([*self.least, *zip(cosines[lowest].tolist(), names, strict=True)])[: self.NUM_LEAST]
        for _, note in rows_of(table, "ok", "id", "note"):
            self.num_notes += bool(note)
            for part in note.split("; ") if note else ():
                self._count(self.notes, part)

    def _count(self, counts: "collections.Counter[str]", reason: str) -> None:
        kind = cli.kind(reason)
        counts[kind if kind in counts or len(counts) < self.MOST_KINDS else "others"] += 1


def rows_of(table: pa.Table, status: str, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The values of some columns in the rows of a status."""
    chosen = table.filter(pa.compute.equal(table["status"], status))
    return zip(*(chosen[name].to_pylist() for name in columns), strict=True)


def write_preview(job: TranslationJob, shards: Shards, num_ok: list[int]) -> list[str]:
    """preview.png: images evenly spread over the listing, beside their results. Their ids."""
    from jobs.reports import grids

    total = sum(num_ok)
    if not total:
        return []
    wanted = sorted({total * (2 * i + 1) // (2 * NUM_PREVIEWS) for i in range(NUM_PREVIEWS)})
    wanted = [*range(total)] if total <= NUM_PREVIEWS else wanted
    chosen = list(shards.pick(wanted, num_ok))
    rows = {
        str(name): image
        for batch in source(job, [(0, chosen)]).batches()
        for name, image in zip(batch["id"], shown_sources(batch), strict=True)
    }
    pairs = []
    for row in chosen:
        if job.args.output_format == "parquet":
            result = images.decode(packs.image_of(job.args.output, row["output"], row["id"]))
        else:
            result = images.decode(storage.read_bytes(storage.join(job.args.output, row["output"])))
        own = "output_size" in job.options
        made = framed(result) if own else images.to_square(result, job.loaded.config.image_size)
        pairs.append([rows[row["id"]], made])
    several = PREVIEWS_A_ROW if len(pairs) > NUM_PREVIEWS // PREVIEWS_A_ROW else 1
    blank = [np.full_like(image, 255) for image in pairs[0]]
    pairs += [blank] * (-len(pairs) % several)
    rows_of_pairs = [list(itertools.chain(*pairs[i : i + several])) for i in range(0, len(pairs), several)]
    png = grids.labelled_grid(["source", job.args.domain] * several, rows_of_pairs)
    storage.write_bytes(storage.join(job.args.output, "preview.png"), png)
    return [row["id"] for row in chosen]


def shown_sources(batch: Batch) -> Iterable[UInt8[np.ndarray, "s s 3"]]:
    """A batch's sources as a preview shows them; black where one is gone meanwhile."""
    if "file" not in batch:
        return batch["image"]
    gone = Image.new("RGB", (PREVIEW_SIDE, PREVIEW_SIDE))
    return (framed(images.decode(file) if file else gone) for file in batch["file"])


def framed(photo: Image.Image) -> UInt8[np.ndarray, "s s 3"]:
    """A photo of any shape, whole, in the middle of a white square of PREVIEW_SIDE."""
    return np.asarray(ImageOps.pad(photo, (PREVIEW_SIDE, PREVIEW_SIDE), color="white"))


def counted(num: int) -> str:
    return f"{num:,} image{'' if num == 1 else 's'}"


def write_note(
    job: TranslationJob,
    *,
    end: End | None = None,
    passed: listing.Passed | None = None,
    preview: list[str] | None = None,
) -> dict[str, Any]:
    """run.json: what was asked of what, and what came of it; `preview`: ids of the images in preview.png."""
    config, counts = job.loaded.config, {}
    if end is not None and passed is not None:
        ok, bad = sum(end.num_ok), sum(end.num_bad)
        ignored = passed.num_others + passed.of_the_side
        counts = {"images": ok + bad, "ok": ok, "rejected": bad, "ignored": ignored}
    note = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": end is not None,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if end is not None else None,
        "options": job.options,
        "command": configs.to_dict(job.args),
        "checkpoint": job.loaded.path,
        "model": configs.to_dict(config),
        "licence": config.data.licence,
        "counts": counts,
        "preview": preview,
        "environment": provenance.environment(),
    }
    storage.write_bytes(storage.join(job.args.output, "run.json"), json.dumps(note, indent=2).encode())
    return note


def write_report(job: TranslationJob, note: dict[str, Any], end: End) -> None:
    """report.html."""
    sheet = storage.join(job.args.output, "preview.png")
    page = reports.build(
        note,
        seconds=end.seconds,
        reasons={"set aside": end.why, "translated, with a note": end.notes},
        cosines=end.cosines.tolist(),
        least=end.least,
        sheet=storage.read_bytes(sheet) if note["preview"] and storage.exists(sheet) else None,
    )
    storage.write_bytes(storage.join(job.args.output, "report.html"), page.encode())
