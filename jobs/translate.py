"""Translate every picture under a folder or bucket, or the rows of a data set.

    python -m jobs.translate --checkpoint RUN --input FOLDER --output FOLDER --domain night

Each picture keeps its place and name, with the suffix .png. What cannot be read is set aside with its reason
(manifest.parquet, rejected.txt) and the exit code is 3. The same command again goes on where it was stopped, does
new and changed pictures, and tries again those set aside.
"""

import collections
import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ddpm_core import config as configs
from ddpm_core import faces, images, provenance
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from jobs import cli, data, storage
from jobs.inference import Guides, SamplingOverrides, check_least, open_checkpoint

if TYPE_CHECKING:
    import ray.data

    from jobs.translating import Manifest

NUM_PREVIEWS = 8
"""Pictures shown in preview.png."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """What to translate, with what, into what."""

    checkpoint: str
    """A run (its best checkpoint) or a checkpoint folder, local or s3://."""
    input: str
    """Folder or s3:// prefix of pictures, searched to any depth; or a data set (holds dataset.json)."""
    output: str
    """Folder or s3:// prefix for the results; outside the input."""
    domain: str
    """The side to produce, such as night."""
    sampling: Annotated[SamplingOverrides, tyro.conf.arg(name="")] = SamplingOverrides()
    guides: Annotated[Guides, tyro.conf.arg(name="")] = Guides()
    ema: float | None = None
    """Weights averaged over this share of the training; those that validated best by default."""
    seed: int = 0
    """Another seed gives another result for each picture."""
    batch_size: int = 16
    """Pictures the network sees at once; memory and speed, not results."""
    num_workers: int | None = None
    """Copies of the network; by default one for each GPU, or for each CPU where there is none."""
    split: str = "test"
    """Of a data set, the rows to translate."""
    align: faces.Align = "auto"
    """faces: photos are turned and cut so that the largest face lies where the training pictures have theirs; those
    without a face are set aside. auto: faces, where the checkpoint was trained on aligned portraits. none: photos are
    cut to centred squares."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything one command has made up its mind about before Ray starts."""

    args: Args
    loaded: Checkpoint
    sampling: SamplingConfig
    guides: Guides
    card: data.DatasetCard | None
    """The input's card where it is a data set."""
    options: dict[str, Any]
    """What the results depend on; a folder holds results of one such set only."""
    template: tuple[float, ...]
    """Landmarks that faces are aligned to; () where pictures are taken as they are."""
    sources: list[dict[str, Any]]
    """id, size, mtime_ns of each picture."""
    num_others: int
    """Files under the input that are no pictures, or rows that are on the wanted side already."""


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Args, sys.argv[1:] if argv is None else argv, prog="jobs.translate", description=__doc__)
    job = prepare(args)
    manifest = open_output(job)
    todo = remaining(job, manifest)
    if todo:
        done = len(job.sources) - len(todo)
        print(f"{counted(len(todo))} to translate" + (f", {done:,} are done already" if done else ""))
        damaged = contextlib.nullcontext() if job.card is None else data.damage_told(job.args.input, args.split)
        with cli.ray_session(), damaged:
            translate(job, manifest, todo)
            write_preview(job, manifest)
    else:
        print(f"nothing to do, {counted(len(job.sources))} translated already: {job.args.output}")
    return finish(job, manifest)


def prepare(args: Args) -> Job:
    """All checks that cost little, before anything is started or written.

    Raises:
        InputError: whatever is wrong with the command, in one line.
    """
    args = dataclasses.replace(
        args,
        checkpoint=storage.absolute(args.checkpoint, flag="--checkpoint"),
        input=storage.absolute(args.input, flag="--input"),
        output=storage.absolute(args.output, flag="--output"),
    )
    check_least({"--batch-size": (args.batch_size, 1), "--num-workers": (args.num_workers, 1)})
    if inside(args.output, args.input):
        raise InputError(
            f"--output {args.output} lies in the input; results would be taken for pictures: write elsewhere"
        )
    opened = open_checkpoint(args.checkpoint, args.domain, args.sampling, ema=args.ema, guides=args.guides)
    loaded, sampling = opened.loaded, opened.sampling
    options = {
        "input": args.input,
        "domain": args.domain,
        "seed": args.seed,
        **opened.options,
    }
    card = data.find_card(args.input)
    if card is not None and args.align == "faces":
        raise InputError("--align faces has no effect on a data set, whose pictures are cut already; leave it out")
    template = () if card is not None else faces.template_for(loaded.config.data.landmarks, args.align)
    if template:
        options |= {"align": "faces"}
    if card is not None:
        sources, num_others = dataset_sources(args, card, loaded.config)
        options |= {"split": args.split, "content_hash": card.content_hash}
    else:
        from jobs.translating import list_pictures

        sources, num_others = list_pictures(args.input)
    if not sources:
        also = f" ({num_others:,} other files or rows are there)" if num_others else ""
        raise InputError(f"--input {args.input} holds no pictures{also}; wanted: {' '.join(sorted(images.SUFFIXES))}")
    return Job(args, loaded, sampling, opened.guides, card, options, template, sources, num_others)


def inside(uri: str, folder: str) -> bool:
    """Whether `uri` is `folder` or lies in it, symbolic links resolved."""
    if not storage.is_remote(uri) and not storage.is_remote(folder):
        uri, folder = os.path.realpath(uri), os.path.realpath(folder)
    return f"{uri.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def dataset_sources(
    args: Args, card: data.DatasetCard, config: configs.ModelConfig
) -> tuple[list[dict[str, Any]], int]:
    """The rows that can be turned into the wanted side, and how many cannot.

    A paired row has a picture of either side; of the other sets, rows that are on the wanted side stay out.
    """
    from jobs.translating import check_dataset, split_rows

    check_dataset(args.input, card, config)
    rows = split_rows(args.input, card, args.split)
    usable = [name for name, domain in rows if card.pairing == "paired" or card.domains[domain] != args.domain]
    return [{"id": name, "size": 0, "mtime_ns": 0} for name in usable], len(rows) - len(usable)


def open_output(job: Job) -> "Manifest":
    """What earlier runs of this command left in the output.

    Raises:
        InputError: it holds something else, or results of other options, or cannot be written.
    """
    from jobs.translating import Manifest

    output = job.args.output
    note = storage.join(output, "run.json")
    if storage.exists(note):
        try:
            earlier = json.loads(storage.read_bytes(note))["options"]
        except (*storage.NOT_JSON, KeyError, TypeError):
            raise InputError(f"{note} is not this program's; give a new --output folder") from None
        for name in dict.fromkeys([*earlier, *job.options]):
            was, now = earlier.get(name), job.options.get(name)
            if was != now:
                raise InputError(
                    f"{output} holds results with {name} = {was}, this command says {now}; "
                    "give the old value back, or a new --output folder"
                )
    elif storage.list_files(output):
        raise InputError(f"--output {output} is not empty and holds no earlier translation; give a new folder")
    storage.check_writable(output)
    if not storage.exists(note):
        write_note(job, complete=False)
    return Manifest(output)


def remaining(job: Job, manifest: "Manifest") -> list[dict[str, Any]]:
    """The sources to translate, each with its output: new, changed, set aside before, or with the result gone."""
    from jobs.translating import output_names

    there = set()
    for name in storage.list_files(job.args.output):
        if re.search(r"\.[0-9a-f]{8}\.tmp$", name):  # left by a kill in the middle of writing
            storage.delete_file(storage.join(job.args.output, name))
        else:
            there.add(name)
    taken = {"": "preview.png"} | {row["id"]: row["output"] for row in manifest.rows.values()}
    names = output_names([source["id"] for source in job.sources], taken)

    def done(source: dict[str, Any]) -> bool:
        row = manifest.rows.get(source["id"])
        return (
            row is not None
            and row["status"] == "ok"
            and row["output"] in there
            and all(row[key] == source[key] for key in ("size", "mtime_ns"))
        )

    return [{**source, "output": names[source["id"]]} for source in job.sources if not done(source)]


def translate(job: Job, manifest: "Manifest", todo: list[dict[str, Any]]) -> None:
    """Run `todo` through the cluster, noting each batch as it comes back."""
    from jobs import translating
    from jobs.progress import Progress

    results = translating.translate_rows(
        source_rows(job, todo),
        num_rows=len(todo),
        checkpoint_uri=job.loaded.path,
        ema=job.loaded.ema,
        sampling=job.sampling,
        guides=job.guides,
        output=job.args.output,
        batch_size=job.args.batch_size,
        num_workers=job.args.num_workers,
    )
    facts = {source["id"]: source for source in todo}
    bad = 0
    try:
        with Progress(total=len(todo), unit="picture", description="translate") as progress:
            for rows in noted(results, facts):
                manifest.add(rows)
                bad += sum(row["status"] != "ok" for row in rows)
                progress.update(len(rows), f"{bad} set aside" if bad else "")
    finally:
        manifest.flush()
    missing = [name for name in facts if name not in manifest.rows]
    if missing:
        raise RuntimeError(f"{len(missing)} pictures came back without a result, the first: {missing[0]}")


def source_rows(job: Job, todo: list[dict[str, Any]]) -> "ray.data.Dataset":
    """The pictures to translate as Ray Data rows."""
    from jobs import translating

    args, size = job.args, job.loaded.config.image_size
    if job.card is None:
        items = [{"id": source["id"], "output": source["output"]} for source in todo]
        return translating.file_rows(
            items,
            args.input,
            image_size=size,
            template=job.template,
            to=args.domain,
            seed=args.seed,
            batch_size=args.batch_size,
        )
    plan = {source["id"]: [(args.domain, args.seed, source["output"])] for source in todo}
    return translating.dataset_rows(args.input, job.card, args.split, plan, batch_size=args.batch_size)


def noted(results: "ray.data.Dataset", facts: dict[str, dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Manifest rows, as the batches come back."""
    for batch in results.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
        yield [
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


def write_preview(job: Job, manifest: "Manifest") -> None:
    """preview.png: the first pictures beside their results."""
    from jobs import report

    good = [s for s in job.sources if manifest.rows[s["id"]]["status"] == "ok"][:NUM_PREVIEWS]
    if not good:
        return
    todo = [{**source, "output": manifest.rows[source["id"]]["output"]} for source in good]
    rows = {row["id"]: row["image"] for row in source_rows(job, todo).take_all()}
    shown = []
    for source in todo:
        result = images.decode(storage.read_bytes(storage.join(job.args.output, source["output"])))
        shown.append([rows[source["id"]], images.to_square(result, job.loaded.config.image_size)])
    png = report.labelled_grid(["source", job.args.domain], shown)
    storage.write_bytes(storage.join(job.args.output, "preview.png"), png)


def finish(job: Job, manifest: "Manifest") -> int:
    """The manifest in one file, the reasons in plain text, run.json; the exit code."""
    output = job.args.output
    bad = [row for s in job.sources if (row := manifest.rows[s["id"]])["status"] != "ok"]
    manifest.finish()
    reasons = storage.join(output, "rejected.txt")
    if bad:
        storage.write_bytes(reasons, "".join(f"{row['id']}\t{row['error']}\n" for row in bad).encode())
    elif storage.exists(reasons):
        storage.delete_file(reasons)
    write_note(job, complete=True, num_rejected=len(bad))
    good = len(job.sources) - len(bad)
    print(f"{counted(good)} translated: {output}")
    notes = [note for s in job.sources if (note := manifest.rows[s["id"]]["note"])]
    if notes:
        what = tally(part for note in notes for part in note.split("; "))
        print(f"{counted(len(notes))} with a note in manifest.parquet: {what}")
    if bad:
        why = tally(row["error"].removeprefix(f"{row['id']}: ") for row in bad)
        print(
            f"{len(bad):,} of {len(job.sources):,} pictures were set aside: {why}; the reasons are in {reasons}",
            file=sys.stderr,
        )
    return cli.SET_ASIDE if bad else cli.DONE


def tally(reasons: Iterable[str], most: int = 4) -> str:
    """The commonest reasons, without their particulars, each with how often it is there."""
    counts = collections.Counter(re.split(r"[;(]", reason)[0].strip() for reason in reasons).most_common()
    if len(counts) > most:
        counts[most:] = [("others", sum(count for _, count in counts[most:]))]
    return ", ".join(f"{reason} ({count:,})" for reason, count in counts)


def counted(num: int) -> str:
    return f"{num:,} picture{'' if num == 1 else 's'}"


def write_note(job: Job, *, complete: bool, num_rejected: int = 0) -> None:
    """run.json: what was asked of what, and what came of it."""
    config = job.loaded.config
    total = len(job.sources)
    counts = {"pictures": total, "ok": total - num_rejected, "rejected": num_rejected, "ignored": job.num_others}
    note = {
        "format": "ddpm-translate-results",
        "format_version": 1,
        "complete": complete,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if complete else None,
        "options": job.options,
        "command": configs.to_dict(job.args),
        "checkpoint": job.loaded.path,
        "model": configs.to_dict(config),
        "licence": config.data.licence,
        "counts": counts if complete else {"pictures": total, "ignored": job.num_others},
        "environment": provenance.environment(),
    }
    storage.write_bytes(storage.join(job.args.output, "run.json"), json.dumps(note, indent=2).encode())


if __name__ == "__main__":
    cli.run(main)
