"""A translation as its driver sees it: sources through the network, the manifest, the end."""

import contextlib
import json
import math
import sys
import time
from typing import Any

import torch

from ddpm_core import config as configs
from ddpm_core import images, provenance, storage
from ddpm_core.errors import InputError
from jobs.common import cli, resume, workers
from jobs.common.progress import Progress
from jobs.translation.batch import Batch, Source, Translate, dataset_rows, file_rows
from jobs.translation.manifest import Manifest
from jobs.translation.plan import TranslationJob, remaining

FORMAT, FORMAT_VERSION = "ddpm-translate-results", 1
NUM_PREVIEWS = 8
"""Images shown in preview.png."""


def run(job: TranslationJob) -> int:
    """Do what is left to do of a job; the exit code.

    Raises:
        InputError: as `open_output` and `translate`.
    """
    manifest = open_output(job)
    todo = remaining(job, manifest)
    if not todo:
        print(f"nothing to do, {counted(len(job.sources))} translated already: {job.args.output}")
        return finish(job, manifest)
    done = len(job.sources) - len(todo)
    print(f"{counted(len(todo))} to translate" + (f", {done:,} are done already" if done else ""))
    with contextlib.nullcontext() if job.args.num_workers == 0 else cli.ray_session():
        translate(job, manifest, todo)
    write_preview(job, manifest)
    return finish(job, manifest)


def open_output(job: TranslationJob) -> Manifest:
    """What earlier runs of this command left in the output.

    Raises:
        InputError: it holds something else, or results of other options, or cannot be written.
    """
    output = job.args.output
    note = storage.join(output, "run.json")
    earlier = resume.read_record(note, FORMAT, FORMAT_VERSION)
    if earlier is not None:
        resume.check_same(output, "results", earlier.get("options", {}), job.options)
    elif storage.list_files(output):
        raise InputError(f"--output {output} is not empty and holds no earlier translation; give a new folder")
    storage.check_writable(output)
    if earlier is None:
        write_note(job, complete=False)
    return Manifest(output)


def translate(job: TranslationJob, manifest: Manifest, todo: list[dict[str, Any]]) -> None:
    """Run `todo` through the network's copies, noting each batch as it comes back. Ray must run unless there are none.

    Raises:
        InputError: more copies than GPUs, a damaged data set, or the store refuses.
    """
    args, facts, bad = job.args, {source["id"]: source for source in todo}, 0
    num_batches = math.ceil(len(todo) / args.batch_size)
    results = source_rows(job, todo).through(
        Translate,
        workers.pool(num_batches, args.num_workers, threads_here=torch.get_num_threads()),
        checkpoint_uri=job.loaded.path,
        ema=job.loaded.ema,
        sampling=configs.to_dict(job.sampling),
        guides=configs.to_dict(job.guides),
        output=args.output,
    )
    try:
        with Progress(total=len(todo), unit="image", description="translate") as progress:
            for batch in results:
                rows = noted(batch, facts)
                manifest.add(rows)
                bad += sum(row["status"] != "ok" for row in rows)
                progress.update(len(rows), f"{bad} set aside" if bad else "")
    finally:
        manifest.flush()
    missing = [name for name in facts if name not in manifest.rows]
    if missing:
        raise RuntimeError(f"{len(missing)} images came back without a result, the first: {missing[0]}")


def source_rows(job: TranslationJob, todo: list[dict[str, Any]]) -> Source:
    """The images to translate."""
    args = job.args
    if job.card is not None:
        plan = {source["id"]: [(args.domain, args.seed, source["output"])] for source in todo}
        return dataset_rows(args.input, job.card, {args.split: plan}, batch_size=args.batch_size)
    return file_rows(
        todo,
        args.input,
        image_size=job.loaded.config.image_size,
        template=job.template,
        to=args.domain,
        seed=args.seed,
        batch_size=args.batch_size,
    )


def noted(batch: Batch, facts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A batch's rows of the manifest."""
    return [
        {
            "id": str(name),
            "output": facts[str(name)]["output"],
            "status": "rejected" if error else "ok",
            "error": str(error),
            "note": str(note),
            "size": facts[str(name)]["size"],
            "mtime_ns": facts[str(name)]["mtime_ns"],
        }
        for name, error, note in zip(batch["id"], batch["error"], batch["note"], strict=True)
    ]


def write_preview(job: TranslationJob, manifest: Manifest) -> None:
    """preview.png: the first images beside their results."""
    from jobs.reports import grids

    good = [s for s in job.sources if manifest.rows[s["id"]]["status"] == "ok"][:NUM_PREVIEWS]
    if not good:
        return
    todo = [{**source, "output": manifest.rows[source["id"]]["output"]} for source in good]
    rows = {
        str(name): image
        for batch in source_rows(job, todo).batches()
        for name, image in zip(batch["id"], batch["image"], strict=True)
    }
    shown = []
    for source in todo:
        result = images.decode(storage.read_bytes(storage.join(job.args.output, source["output"])))
        shown.append([rows[source["id"]], images.to_square(result, job.loaded.config.image_size)])
    png = grids.labelled_grid(["source", job.args.domain], shown)
    storage.write_bytes(storage.join(job.args.output, "preview.png"), png)


def finish(job: TranslationJob, manifest: Manifest) -> int:
    """The manifest in one file, the reasons in plain text, run.json; the exit code."""
    output = job.args.output
    bad = [row for s in job.sources if (row := manifest.rows[s["id"]])["status"] != "ok"]
    manifest.finish()
    reasons = storage.join(output, "rejected.txt")
    if bad:
        storage.write_bytes(reasons, cli.reasons_text((row["id"], row["error"]) for row in bad))
    elif storage.exists(reasons):
        storage.delete_file(reasons)
    write_note(job, complete=True, num_rejected=len(bad))
    good = len(job.sources) - len(bad)
    print(f"{counted(good)} translated: {output}")
    notes = [note for s in job.sources if (note := manifest.rows[s["id"]]["note"])]
    if notes:
        what = cli.tally(part for note in notes for part in note.split("; "))
        print(f"{counted(len(notes))} with a note in manifest.parquet: {what}")
    if bad:
        why = cli.tally(row["error"].removeprefix(f"{row['id']}: ") for row in bad)
        print(
            f"{len(bad):,} of {len(job.sources):,} images were set aside: {why}; the reasons are in {reasons}",
            file=sys.stderr,
        )
    return cli.set_aside(len(bad), ok=job.args.set_aside_ok)


def counted(num: int) -> str:
    return f"{num:,} image{'' if num == 1 else 's'}"


def write_note(job: TranslationJob, *, complete: bool, num_rejected: int = 0) -> None:
    """run.json: what was asked of what, and what came of it."""
    config = job.loaded.config
    total = len(job.sources)
    counts = {"images": total, "ok": total - num_rejected, "rejected": num_rejected, "ignored": job.num_others}
    note = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": complete,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if complete else None,
        "options": job.options,
        "command": configs.to_dict(job.args),
        "checkpoint": job.loaded.path,
        "model": configs.to_dict(config),
        "licence": config.data.licence,
        "counts": counts if complete else {"images": total, "ignored": job.num_others},
        "environment": provenance.environment(),
    }
    storage.write_bytes(storage.join(job.args.output, "run.json"), json.dumps(note, indent=2).encode())
