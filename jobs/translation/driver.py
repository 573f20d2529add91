"""A translation as its driver sees it: sources through the network, the manifest, the end."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ddpm_core import config as configs
from ddpm_core import images, provenance, storage
from ddpm_core.config import Framing, SamplingConfig
from ddpm_core.errors import InputError
from jobs.common import cli, resume, workers
from jobs.common.progress import Progress
from jobs.translation.batch import Batch, Source, Translate, dataset_rows, file_rows
from jobs.translation.manifest import Manifest
from jobs.translation.options import GuidanceNets, TranslateArgs
from jobs.translation.plan import TranslationJob, remaining

FORMAT, FORMAT_VERSION = "ddpm-translate-results", 1
NUM_PREVIEWS = 8
"""Images shown in preview.png."""
PREVIEW_SIDE = 192
"""Side of a photo there, in pixels."""
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
        InputError: as `open_output` and `translate`.
    """
    manifest = open_output(job)
    remain = remaining(job, manifest)
    todo = [source for source in remain if not source["error"]]
    for note in job.sources.notes:
        print(note)
    if todo:
        done = len(job.sources.rows) - len(remain)
        print(f"{counted(len(todo))} to translate" + (f", {done:,} are done already" if done else ""))
        with contextlib.nullcontext() if job.args.num_workers == 0 else cli.ray_session():
            translate(job, manifest, todo)
    else:
        print(f"nothing to do, {counted(len(job.sources.rows) - len(remain))} translated already: {job.args.output}")
    manifest.add(noted_row(source, error=source["error"]) for source in remain if source["error"])
    preview = write_preview(job, manifest) if todo else None
    return finish(job, manifest, preview)


def open_output(job: TranslationJob) -> Manifest:
    """What earlier runs of this command left in the output.

    Raises:
        InputError: it holds something else, or results of other options, or cannot be written.
    """
    output = job.args.output
    note = storage.join(output, "run.json")
    earlier = resume.read_record(note, FORMAT, FORMAT_VERSION)
    storage.check_writable(output)
    if earlier is None and storage.list_files(output):
        raise InputError(f"--output {output} is not empty and holds no earlier translation; give a new folder")
    manifest = Manifest(output)
    if earlier is not None and manifest.rows:
        resume.check_same(output, "results", earlier.get("options", {}), job.options, flags=FLAGS)
    if not manifest.rows:  # what an earlier command asked for and was refused binds nobody
        write_note(job, complete=False)
    return manifest


def translate(job: TranslationJob, manifest: Manifest, todo: list[dict[str, Any]]) -> None:
    """Run `todo` through the network's copies, noting each batch as it comes back. Ray must run unless there are none.

    Raises:
        InputError: more copies than GPUs, a damaged data set, or the store refuses.
    """
    args, facts, bad = job.args, {source["id"]: source for source in todo}, 0
    num_batches = math.ceil(len(todo) / args.batch_size)
    results = source_rows(job, todo).through(
        Translate,
        workers.pool(num_batches, args.num_workers),
        checkpoint_uri=job.loaded.path,
        ema=job.loaded.ema,
        sampling=configs.to_dict(job.sampling),
        guides=configs.to_dict(job.guides),
        output=args.output,
        record=record(job),
        mark_key=job.mark_key,
        tiles=args.tiles,
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


def record(job: TranslationJob) -> dict[str, Any]:
    """What each file says of how it was made, which does not hang on where things lie."""
    made_with = {name: value for name, value in job.options.items() if name not in ("input", "mark_key")}
    return {**made_with, "licence": job.loaded.config.data.licence}


def source_rows(job: TranslationJob, todo: list[dict[str, Any]]) -> Source:
    """The images to translate."""
    args = job.args
    if job.card is not None:
        plan = {source["id"]: [(args.domain, args.seed, source["output"])] for source in todo}
        return dataset_rows(args.input, job.card, {args.split: plan}, batch_size=args.batch_size)
    return file_rows(
        todo,
        job.sources.root,
        image_size=job.loaded.config.image_size,
        template=job.template,
        output_size=args.framing.output_size,
        which=args.framing.faces,
        to=args.domain,
        seed=args.seed,
        batch_size=args.batch_size,
    )


def noted(batch: Batch, facts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A batch's rows of the manifest."""
    return [
        noted_row(facts[str(name)], error=str(error), note=str(note), width=int(width), height=int(height))
        for name, error, note, width, height in zip(
            *(batch[column] for column in ("id", "error", "note", "width", "height")), strict=True
        )
    ]


def noted_row(
    source: dict[str, Any], *, error: str = "", note: str = "", width: int = 0, height: int = 0
) -> dict[str, Any]:
    """A source's row of the manifest; `width` and `height` are the result's."""
    facts = {name: source[name] for name in ("id", "output", "size", "mtime_ns")}
    size = {"width": None, "height": None} if error else {"width": width, "height": height}
    return {**facts, "status": "rejected" if error else "ok", "error": error, "note": note, **size}


def write_preview(job: TranslationJob, manifest: Manifest) -> list[str]:
    """preview.png: images evenly spread over the sorted names, beside their results. Their ids."""
    from jobs.reports import grids

    good = [s for s in job.sources.rows if manifest.rows[s["id"]]["status"] == "ok"]
    if not good:
        return []
    shown = [good[len(good) * (2 * i + 1) // (2 * NUM_PREVIEWS)] for i in range(NUM_PREVIEWS)]
    chosen = list({source["id"]: source for source in shown}.values()) if len(good) > NUM_PREVIEWS else good
    todo = [{**source, "output": manifest.rows[source["id"]]["output"]} for source in chosen]
    rows = {
        str(name): image
        for batch in source_rows(job, todo).batches()
        for name, image in zip(batch["id"], shown_sources(batch), strict=True)
    }
    pairs = []
    for source in todo:
        result = images.decode(storage.read_bytes(storage.join(job.args.output, source["output"])))
        own = "output_size" in job.options
        made = framed(result) if own else images.to_square(result, job.loaded.config.image_size)
        pairs.append([rows[source["id"]], made])
    png = grids.labelled_grid(["source", job.args.domain], pairs)
    storage.write_bytes(storage.join(job.args.output, "preview.png"), png)
    return [source["id"] for source in chosen]


def shown_sources(batch: Batch) -> Iterable[UInt8[np.ndarray, "s s 3"]]:
    """A batch's sources as a preview shows them; black where one is gone meanwhile."""
    if "file" not in batch:
        return batch["image"]
    gone = Image.new("RGB", (PREVIEW_SIDE, PREVIEW_SIDE))
    return (framed(images.decode(file) if file else gone) for file in batch["file"])


def framed(photo: Image.Image) -> UInt8[np.ndarray, "s s 3"]:
    """A photo of any shape, whole, in the middle of a white square of PREVIEW_SIDE."""
    return np.asarray(ImageOps.pad(photo, (PREVIEW_SIDE, PREVIEW_SIDE), color="white"))


def finish(job: TranslationJob, manifest: Manifest, preview: list[str] | None) -> int:
    """The manifest in one file, the reasons in plain text, run.json; the exit code."""
    output, total = job.args.output, len(job.sources.rows)
    bad = [row for s in job.sources.rows if (row := manifest.rows[s["id"]])["status"] != "ok"]
    manifest.finish()
    reasons = storage.join(output, "rejected.txt")
    if bad:
        storage.write_bytes(reasons, cli.reasons_text((row["id"], row["error"]) for row in bad))
    elif storage.exists(reasons):
        storage.delete_file(reasons)
    write_note(job, complete=True, num_rejected=len(bad), preview=preview)
    print(f"{counted(total - len(bad))} translated: {output}")
    notes = [note for s in job.sources.rows if (note := manifest.rows[s["id"]]["note"])]
    if notes:
        what = cli.tally(part for note in notes for part in note.split("; "))
        print(f"{counted(len(notes))} with a note in manifest.parquet: {what}")
    if job.card is not None and job.sources.num_others:  # files were told of by the listing's notes
        print(f"passed over, rows that are {job.args.domain} already: {job.sources.num_others:,}")
    if bad:
        why = cli.tally(row["error"].removeprefix(f"{row['id']}: ") for row in bad)
        print(
            f"{len(bad):,} of {total:,} images were set aside: {why}; the reasons are in {reasons}",
            file=sys.stderr,
        )
    return cli.set_aside(len(bad), ok=job.args.set_aside_ok)


def counted(num: int) -> str:
    return f"{num:,} image{'' if num == 1 else 's'}"


def write_note(job: TranslationJob, *, complete: bool, num_rejected: int = 0, preview: list[str] | None = None) -> None:
    """run.json: what was asked of what, and what came of it; `preview`: ids of the images in preview.png, None where an
    earlier run made it."""
    config = job.loaded.config
    total, ignored = len(job.sources.rows), job.sources.num_others
    counts = {"images": total, "ok": total - num_rejected, "rejected": num_rejected, "ignored": ignored}
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
        "counts": counts if complete else {"images": total, "ignored": ignored},
        "preview": preview,
        "environment": provenance.environment(),
    }
    storage.write_bytes(storage.join(job.args.output, "run.json"), json.dumps(note, indent=2).encode())
