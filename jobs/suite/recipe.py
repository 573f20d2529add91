"""Two folders without pairs to a translator: prior, edits, pairs, student, evaluation, each a command of its own.

URI/data        the images                       jobs.prepare folders
URI/prior       edits images                     jobs.train --preset prior
URI/sides       tells the sides apart            jobs.train --preset attribute-classifier
URI/pairs       each image with its other side   jobs.prepare pairs
URI/run         draws the other side in one go   jobs.train --preset student
URI/evaluation  of the test images               jobs.evaluate
URI/best.json   names the best checkpoint so far, so that URI is a --checkpoint
URI/report.html all of it to look at
"""

import contextlib
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable

from ddpm_core import checkpoint, storage
from ddpm_core.errors import InputError
from jobs.common import cli, kinds, numbers, resume
from jobs.common.lock import exclusive
from jobs.common.progress import duration
from jobs.datasets.format import CONTACT_SHEET, DatasetCard, read_card
from jobs.reports.html import render
from jobs.suite.options import RecipeArgs

STOP_S = 60.0
"""How long a command may take to store what it has when it is told to end."""
VALIDATIONS = 10
"""Of a training, about."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What a preset of the recipe comes to."""

    image_size: int
    prior_steps: int
    side_steps: int
    student_steps: int
    batch_size: int
    num_workers: int
    stride: int
    """Images' sides must be multiples of this, by the levels and the patches of both networks."""
    options: tuple[str, ...] = ()
    """Of both trainings."""
    attended: tuple[int, ...] = ()
    """Which feature maps have attention, by what the image's side is divided by; () leaves it to the preset."""


SIZES = {
    "cpu": Size(
        image_size=32,
        prior_steps=1600,
        side_steps=300,
        student_steps=1000,
        batch_size=32,
        num_workers=2,
        stride=8,
    ),
    "gpu": Size(
        image_size=64,
        prior_steps=20_000,
        side_steps=1000,
        student_steps=12_000,
        batch_size=128,
        num_workers=1,
        stride=16,
        options=(
            *("--unet.model-channels", "128", "--unet.channel-mult", "1", "2", "2", "2"),
            *("--unet.num-res-blocks", "2"),
        ),
        attended=(2, 4),
    ),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command, and what it leaves."""

    name: str
    """Of its folder."""
    about: str
    words: Callable[[], list[str]]
    """Module and options, known once the stages before it are done."""
    shows: str = ""
    """An image below its folder; of several names the last."""


def run(args: RecipeArgs) -> int:
    """Do what is left to do; the exit code.

    Raises:
        InputError: an option is wrong, another recipe is at work in the folder, or a stage has failed.
    """
    numbers.check(args)
    check_side(args)
    output, source = storage.absolute(args.output, flag="--output"), storage.absolute(args.source, flag="--source")
    kinds.check_output(output, "recipe", {"--source": source})
    todo = stages(args, output, source)
    begun = time.monotonic()
    with exclusive(output):
        keep(args, output, source)
        for number, stage in enumerate(todo, 1):
            print(f"recipe: stage {number} of {len(todo)}, {stage.about}", flush=True)
            code = execute(stage.words())
            if code not in (cli.DONE, cli.SET_ASIDE):
                raise InputError(
                    f"stage {stage.name} ended with exit code {code}; its own line says why, and the same command goes "
                    "on from there"
                )
            if stage.name in ("prior", "run"):
                point(output, stage.name)
            write_report(output, todo[:number], len(todo))
    print(f"recipe: done in {duration(time.monotonic() - begun)}; --checkpoint {output}")
    print(f"report: {storage.join(output, 'report.html')}")
    return cli.DONE


def check_side(args: RecipeArgs) -> None:
    """Refuse a size of images that the networks cannot halve so often, before the data are prepared in it.

    Raises:
        InputError: naming those next to it.
    """
    side, stride = args.image_size, SIZES[args.preset].stride
    if side is not None and side % stride:
        near = [each for each in (side - side % stride, side - side % stride + stride) if each]
        raise InputError(
            f"--image-size is {side}; with --preset {args.preset} it must be a multiple of {stride}, such as "
            f"{' or '.join(map(str, near))}"
        )


def keep(args: RecipeArgs, output: str, source: str) -> None:
    """Write down what is made here.

    Raises:
        InputError: it is something else by now.
    """
    wanted = {"source": source, "preset": args.preset, "image_size": args.image_size, "seed": args.seed}
    record = storage.join(output, "recipe.json")
    with contextlib.suppress(FileNotFoundError):
        there = storage.read_json(record)
        before = {name: there.get(name) for name in wanted}
        resume.check_same(output, "a recipe's stages", before, wanted, flags=resume.flags_of(RecipeArgs))
        return
    content = {"format": "ddpm-translate-recipe", "format_version": 1, **wanted}
    storage.write_bytes(record, json.dumps(content, indent=2).encode())


def stages(args: RecipeArgs, output: str, source: str) -> list[Stage]:
    """The commands in order."""
    size = SIZES[args.preset]
    at = {name: storage.join(output, name) for name in ("data", "prior", "sides", "pairs", "run", "evaluation")}
    workers = ["--num-workers", str(size.num_workers if args.num_workers is None else args.num_workers)]
    devices = [*workers, *(["--use-gpu"] if args.preset == "gpu" else [])]

    side = args.image_size or size.image_size
    attention = ["--unet.attn-resolutions", *(str(side // part) for part in size.attended)] if size.attended else []

    def prepare() -> list[str]:
        return ["jobs.prepare", "folders", "--source", source, "--image-size", str(side), "--output", at["data"]]

    def train(preset: str, name: str, data: str, steps: int, *options: str) -> list[str]:
        card = read_card(at[data])
        rows, batch = card.splits["train"], batch_of(card, size)
        epochs = max(round(steps * batch / rows), 1)
        every = max(epochs // VALIDATIONS, 1)
        return [
            *("jobs.train", "--preset", preset, "--data", at[data], "--output", at[name], *devices, *options),
            *("--epochs", str(epochs), "--global-batch-size", str(batch), "--validate-every-epochs", str(every)),
            *("--seed", str(args.seed)),
        ]

    def sides() -> list[str]:
        rows = read_card(at["data"]).splits["train"]
        batch = min(64, rows)
        return [
            *("jobs.train", "--preset", "attribute-classifier", "--data", at["data"], "--output", at["sides"]),
            *("--epochs", str(max(round(size.side_steps * batch / rows), 1)), "--global-batch-size", str(batch)),
            *("--num-workers", "0", "--seed", str(args.seed)),
        ]

    def pairs() -> list[str]:
        return [
            *("jobs.prepare", "pairs", "--data", at["data"], "--checkpoint", at["prior"], "--classifier", at["sides"]),
            *("--output", at["pairs"], "--seed", str(args.seed), "--set-aside-ok", "--num-workers", "0"),
        ]

    def evaluate() -> list[str]:
        return [
            *("jobs.evaluate", "--checkpoint", at["run"], "--data", at["data"], "--output", at["evaluation"]),
            *("--num-workers", "0"),
        ]

    return [
        Stage("data", "the images", prepare, CONTACT_SHEET),
        Stage(
            "prior",
            "a prior of both sides: from here on there is a translator",
            lambda: train("prior", "prior", "data", size.prior_steps, *size.options, *attention),
            "samples",
        ),
        Stage("sides", "a classifier of the sides", sides),
        Stage("pairs", "each image with its other side", pairs, CONTACT_SHEET),
        Stage(
            "run",
            "a student that draws the other side in one go",
            lambda: train("student", "run", "pairs", size.student_steps, "--init-from", at["prior"]),
            "samples",
        ),
        Stage("evaluation", "the translator, measured on the test images", evaluate, "grid"),
    ]


def batch_of(card: DatasetCard, size: Size) -> int:
    """As large as the recipe's, or as the data allow."""
    return min(size.batch_size, card.splits["train"])


def execute(words: list[str]) -> int:
    """Run a command as a process of its own, with our terminal; it ends with us."""
    print(f"$ python -m {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", *words])
    try:
        return process.wait()
    except BaseException:  # told to end: what runs is told, too, and stores what it has
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        process.wait()
        raise


def point(output: str, name: str) -> None:
    """Let the output's best.json name the best checkpoint of that run."""
    folder, best = checkpoint.resolve(storage.join(output, name))
    inside = folder.removeprefix(f"{output.rstrip('/')}/")
    content = json.dumps({**best, "checkpoint": inside}, indent=2)
    storage.write_bytes(storage.join(output, "best.json"), content.encode())


def write_report(output: str, done: list[Stage], number: int) -> None:
    """One page of what there is, with links into the folders."""
    shown = []
    for stage in done:
        folder = storage.join(output, stage.name)
        images = [name for name in sorted(storage.list_files(folder)) if name.startswith(stage.shows)]
        images = [name for name in images if name.endswith(".png")] if stage.shows else []
        page = f"{stage.name}/report.html" if storage.exists(storage.join(folder, "report.html")) else ""
        shown.append({"stage": stage, "image": f"{stage.name}/{images[-1]}" if images else "", "page": page})
    title = "Two folders to a translator"
    facts = [f"{len(done)} of {number} stages done"]
    page = render("recipe.html", title=title, heading=title, facts=facts, where=[output], stages=shown, refresh_s=None)
    storage.write_bytes(storage.join(output, "report.html"), page.encode())
