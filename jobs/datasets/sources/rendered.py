"""Portraits and landscapes drawn from parameters, with the exact counterpart of each.

    --scene portraits    female, male    the same person; only what `rendered_portraits.sex_linked` gives differs
    --scene landscapes   day, night      the same place; only light, sky and lamps differ

A row is a function of (seed, index, moment): it depends neither on --count nor on other rows. The column `attributes`
holds every parameter, 0 to 100, `attribute_names` their names, and `draw` makes the row's pixels from them again;
`identity` is the index. In each of a person's --moments pose, light, place and clothes are others.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from ddpm_core.errors import InputError
from jobs.common import workers
from jobs.common.progress import Progress
from jobs.datasets import decode, source
from jobs.datasets.format import SPLITS, DatasetCard, Row
from jobs.datasets.options import Rendered, Scene
from jobs.datasets.sources import rendered_landscapes, rendered_portraits
from jobs.datasets.sources.rendered_svg import SIDE, Sheet

DRAWN_BY: dict[Scene, Callable[[Mapping[str, float], int], Sheet]] = {
    "portraits": rendered_portraits.portrait,
    "landscapes": rendered_landscapes.landscape,
}
DOMAINS: dict[Scene, tuple[str, ...]] = {
    "portraits": rendered_portraits.DOMAINS,
    "landscapes": rendered_landscapes.DOMAINS,
}
NAMES: dict[Scene, tuple[str, ...]] = {"portraits": rendered_portraits.NAMES, "landscapes": rendered_landscapes.NAMES}
LEVELS = 101
"""Values of a parameter: 0 to 100."""
IMAGES_PER_TASK = 64
"""Rows that one task draws."""
MIN_SIZE, MAX_SIZE = 32, SIDE
MAX_INDEX = 10**8
"""Ids have eight digits, so that they sort as numbers do."""


def draft(options: Rendered) -> source.Draft:
    """Raises InputError where an option is out of range."""
    check(options)
    scene = options.scene
    card = DatasetCard(
        name=f"rendered-{scene}",
        licence="CC0 (drawn by this program)",
        source=f"drawn from parameters: {scene}, seed {options.seed}",
        image_size=options.image_size,
        encoding=options.encoding,
        domains=DOMAINS[scene],
        pairing=options.pairing,
        attribute_names=NAMES[scene],
        prepared_by=source.prepared_by("rendered", options),
        source_hash=source.fingerprint(scene, options.seed),
    )
    return source.Draft(card=card, make=lambda: _make(options))


def check(options: Rendered) -> None:
    if options.source is not None:
        raise InputError("--source is given, and rendered draws its images itself; leave --source out")
    if not MIN_SIZE <= options.image_size <= MAX_SIZE:
        raise InputError(f"--image-size is {options.image_size}; it must lie between {MIN_SIZE} and {MAX_SIZE}")
    if options.count < 1:
        raise InputError(f"--count is {options.count}; it must be at least 1")
    if options.moments < 1 or (options.moments > 1 and options.scene != "portraits"):
        raise InputError(
            f"--moments is {options.moments}; give 1 or more for --scene portraits, and none for landscapes, of which "
            "there is one image each"
        )
    if options.first < 0 or options.first + options.count > MAX_INDEX:
        raise InputError(
            f"--first {options.first} and --count {options.count}: indices must lie between 0 and {MAX_INDEX:,}"
        )


# ------------------------------------------------------------------------------------------- one person or place


def parameters_of(scene: Scene, seed: int, index: int, moment: int = 0) -> list[int]:
    """The parameters of a person or place, 0 to 100 each, independent and evenly spread; in the order of NAMES. Those
    of another moment differ in `rendered_portraits.OF_THE_MOMENT`."""
    found = _levels(f"{scene}/{seed}/{index}", len(NAMES[scene]))
    if moment:
        first = len(found) - len(rendered_portraits.OF_THE_MOMENT)
        found[first:] = _levels(f"{scene}/{seed}/{index}/{moment}", len(found) - first)
    return found


def _levels(name: str, count: int) -> list[int]:
    digest = hashlib.shake_128(name.encode()).digest(2 * count)
    return [number * LEVELS >> 16 for number in np.frombuffer(digest, "<u2").tolist()]


def draw(scene: Scene, parameters: Sequence[int], domain: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The image that these parameters (0 to 100 each, in the order of NAMES) stand for, as a domain of the scene."""
    return DRAWN_BY[scene](_named(scene, parameters), domain).pixels(size)


def landmarks_of(scene: Scene, parameters: Sequence[int], domain: int, size: int) -> list[float] | None:
    """x0 y0 x1 y1 ... of eyes, nose tip and corners of the mouth in pixels; a landscape has none."""
    if scene == "landscapes":
        return None
    return [size * share for share in rendered_portraits.landmarks(_named(scene, parameters), domain)]


def _named(scene: Scene, parameters: Sequence[int]) -> dict[str, float]:
    return {name: value / (LEVELS - 1) for name, value in zip(NAMES[scene], parameters, strict=True)}


def split_of(seed: int, index: int) -> str:
    """Of each ten in a row one is for validation and one for test: which, decides a hash."""
    block, place = divmod(index, 10)
    number = _hash("split", seed, block) % 90
    val, step = number % 10, 1 + number // 10
    return "val" if place == val else "test" if place == (val + step) % 10 else "train"


def domain_of(seed: int, index: int) -> int:
    """The one domain in which a person or place is shown where nobody has a counterpart."""
    return _hash("domain", seed, index) % 2


def _hash(*parts: object) -> int:
    return int.from_bytes(source.name_hash("/".join(map(str, parts))), "big")


# ---------------------------------------------------------------------------------------------- many of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What every drawing task needs to know."""

    scene: Scene
    seed: int
    first: int
    size: int
    paired: bool
    moments: int

    def person(self, number: int) -> tuple[int, int]:
        """Index and moment of the number'th row that is drawn."""
        index, moment = divmod(number, self.moments)
        return self.first + index, moment

    def domains(self, index: int) -> tuple[int, ...]:
        """The domains in which this person or place is drawn."""
        return (0, 1) if self.paired else (domain_of(self.seed, index),)


def _make(options: Rendered) -> source.Made:
    task = Task(
        scene=options.scene,
        seed=options.seed,
        first=options.first,
        size=options.image_size,
        paired=options.pairing == "paired",
        moments=options.moments,
    )
    num_rows = options.count * options.moments
    pixels = draw_all(task, num_rows)
    indices: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index in range(options.first, options.first + options.count):
        indices[split_of(options.seed, index)].append(index)
    notes = ["split by hash of the index: of each ten one val, one test"]
    if not task.paired:
        notes.append("each in one domain only, by hash of the index")
    if task.moments > 1:
        notes.append(f"each in {task.moments} moments")
    return source.Made(
        rows={split: _rows(task, of, pixels) for split, of in indices.items()}, num_rows=num_rows, notes=notes
    )


def draw_all(task: Task, count: int) -> decode.Pixels:
    """Every image; parts are the domains of `Task.domains`."""
    pixels = decode.Pixels((count, 2 if task.paired else 1, task.size, task.size, 3))
    numbers = [range(count)[start : start + IMAGES_PER_TASK] for start in range(0, count, IMAGES_PER_TASK)]
    with Progress(total=count, unit="row", description="draw") as progress:
        for some, drawn in workers.mapped(functools.partial(draw_task, task=task), numbers, len(numbers)):
            for number, content in zip(some, drawn, strict=True):
                pixels[number] = content
            progress.update(len(drawn))
    return pixels


def draw_task(numbers: range, task: Task) -> tuple[range, list[bytes]]:
    """The bytes of each row's domains, one after another."""
    return numbers, [_bytes(task, number) for number in numbers]


def _bytes(task: Task, number: int) -> bytes:
    index, moment = task.person(number)
    parameters = parameters_of(task.scene, task.seed, index, moment)
    return b"".join(draw(task.scene, parameters, domain, task.size).tobytes() for domain in task.domains(index))


def _rows(task: Task, indices: Iterable[int], pixels: decode.Pixels) -> Iterator[Row]:
    for index, moment in itertools.product(indices, range(task.moments)):
        parameters = parameters_of(task.scene, task.seed, index, moment)
        domain = task.domains(index)[0]
        name = f"{index:08d}" if task.moments == 1 else f"{index:08d}-{moment:04d}"
        number = (index - task.first) * task.moments + moment
        yield Row(
            id=name,
            domain=domain,
            image=pixels[number, 0],
            target=pixels[number, 1] if task.paired else None,
            target_id=name if task.paired else None,
            identity=index,
            attributes=parameters,
            landmarks=landmarks_of(task.scene, parameters, domain, task.size),
        )
