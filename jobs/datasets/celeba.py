"""CelebA as it is distributed: aligned faces and text files about them.

    img_align_celeba/ or img_align_celeba.zip    the pictures (or the pictures directly in SOURCE)
    list_attr_celeba.txt | .csv                  needed: 40 attributes a picture, -1 or 1
    list_eval_partition.txt | .csv               the official split
    identity_CelebA.txt                          who is who
    list_landmarks_align_celeba.txt | .csv       eyes, nose and mouth, for finding better matches

in SOURCE or anywhere below it. There are no true pairs of one person as woman and man: `--pairing matched` takes the
picture of the other domain, in the same split, that differs in the fewest of the attributes that do not go with the
domain (and, where landmarks are known, has the most similar pose). Such pairs are proxies.
"""

import dataclasses
import difflib
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from ddpm_core.errors import InputError
from jobs import storage
from jobs.data import SPLITS, DatasetCard, Row
from jobs.datasets import common
from jobs.datasets.common import Picture, Pixels
from jobs.progress import Progress

LICENCE = "CelebA: non-commercial research only"
PICTURES = "img_align_celeba"
ATTRIBUTES, PARTITION = "list_attr_celeba", "list_eval_partition"
IDENTITY, LANDMARKS = "identity_CelebA", "list_landmarks_align_celeba"
WIDTH, HEIGHT = 178, 218
"""Of the aligned pictures that landmarks refer to."""
LANDMARK_PX2 = 400
"""Squared landmark distance (px^2, summed over five points) that weighs as much as one differing attribute."""
MATCH_CHUNK = 128
"""Pictures matched in one matrix product."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(common.Common):
    """CelebA, from your own copy (non-commercial research only)."""

    domain_attribute: str = "Male"
    """The attribute that tells the two domains apart."""
    pairing: Literal["matched", "unpaired"] = "matched"
    """matched: the most similar picture of the other domain as target. unpaired: no targets."""
    match_correlation: float = 0.3
    """Attributes that correlate with the domain's by this much or more (lipstick, beard) say the same as the domain
    and are not compared when matching, or a few pictures would match nearly everything; above 1 compares all."""
    limit: int | None = None
    """Take this many pictures only (spread over all of them), for trying."""
    seed: int = 0
    """Decides between equally good matches."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One of CelebA's text files."""

    uri: str
    columns: tuple[str, ...]
    rows: dict[str, np.ndarray]
    """Picture to its int32 values."""


@dataclasses.dataclass(frozen=True)
class Face:
    """What the text files say about one picture."""

    name: str
    uri: str
    domain: int
    split: str
    attributes: np.ndarray
    identity: int | None
    landmarks: np.ndarray | None


def draft(options: Options) -> common.Draft:
    """Raises InputError where files, columns, the attribute or the pictures are missing or do not fit."""
    common.check_common(options)
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit is {options.limit}; it must be 1 or more")
    if not options.match_correlation > 0:
        raise InputError(f"--match-correlation is {options.match_correlation}; it must be positive")
    source = common.source_folder(options, "the folder that holds CelebA's pictures and list_attr_celeba.txt")
    sizes = storage.file_sizes(source)
    attributes = _table(source, sizes, ATTRIBUTES, header=True)
    if attributes is None:
        raise InputError(f"--source {source}: no list_attr_celeba.txt or .csv there; it comes with CelebA's pictures")
    others = {
        name: _table(source, sizes, name, header=header)
        for name, header in {PARTITION: False, IDENTITY: False, LANDMARKS: True}.items()
    }
    column = _attribute(attributes, options.domain_attribute)
    pictures, picture_sizes = _pictures(source, sizes)
    faces, rejected, notes = _faces(attributes, column, others, pictures, options)
    card = DatasetCard(
        name="celeba",
        licence=LICENCE,
        source="CelebA, aligned and cropped (Liu et al. 2015), the user's own copy",
        image_size=options.image_size,
        encoding=options.encoding,
        domains=domain_names(options.domain_attribute),
        pairing=options.pairing,
        attribute_names=attributes.columns,
        prepared_by=common.prepared_by("celeba", options),
        source_hash=common.fingerprint(sizes, picture_sizes),
    )
    return common.Draft(card=card, make=lambda scratch: _make(faces, rejected, notes, column, options, scratch))


def domain_names(attribute: str) -> tuple[str, str]:
    """Names of the domains without and with the attribute."""
    return ("female", "male") if attribute == "Male" else (f"not_{attribute.lower()}", attribute.lower())


# ------------------------------------------------------------------------------------------- text files


def _table(source: str, sizes: Mapping[str, int], stem: str, *, header: bool) -> Table | None:
    wanted = [f"{stem}.txt", f"{stem}.csv"]
    found = [file for file in sizes if posixpath.basename(file) in wanted]
    if not found:
        return None
    best = min(found, key=lambda file: (wanted.index(posixpath.basename(file)), file.count("/"), file))
    uri = storage.join(source, best)
    return parse_table(storage.read_bytes(uri), uri, header=header)


def parse_table(content: bytes, uri: str, *, header: bool) -> Table:
    """One of CelebA's files: the official text (a count line and names where `header`), or comma-separated.

    Raises:
        InputError: naming the file and the line.
    """
    try:
        lines = [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{uri} is not a text file; download it again") from None
    comma = uri.endswith(".csv")
    count = None
    columns: list[str] = []
    start = 0
    if comma:
        columns = [name.strip() for name in lines[0].split(",")] if lines else []
        if "image_id" not in columns:
            raise InputError(f"{uri}: column 'image_id' is missing; it has {', '.join(columns[:5]) or 'nothing'}")
        if columns[0] != "image_id":
            raise InputError(f"{uri}: column 'image_id' must be the first, that is {columns[0]!r}")
        columns, start = columns[1:], 1
    elif header:
        if len(lines) < 2 or not lines[0].strip().isdigit():
            raise InputError(f"{uri}: the first line must be the number of pictures, the second the names of columns")
        count, columns, start = int(lines[0]), lines[1].split(), 2
    records = [[cell.strip() for cell in line.split(",")] if comma else line.split() for line in lines[start:]]
    width = len(columns) or 1
    for number, record in enumerate(records, start + 1):
        if len(record) != width + 1:
            raise InputError(f"{uri} line {number}: {len(record) - 1} values where {width} are expected")
    if count is not None and count != len(records):
        raise InputError(f"{uri} announces {count} pictures and lists {len(records)}; it is cut off or edited")
    try:
        values = np.array([record[1:] for record in records]).astype(np.int32).reshape(len(records), width)
    except ValueError as error:
        raise InputError(f"{uri}: a value is not a number ({error})") from None
    rows = {record[0]: row for record, row in zip(records, values, strict=True)}
    if len(rows) != len(records):
        raise InputError(f"{uri} lists a picture twice; download it again")
    return Table(uri, tuple(columns), rows)


def _attribute(table: Table, name: str) -> int:
    """Column of the attribute that makes the domains."""
    if name not in table.columns:
        lower = {column.lower(): column for column in table.columns}
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = f"did you mean {lower[near[0]]}? " if near else ""
        raise InputError(f"--domain-attribute {name}: {hint}{table.uri} has {', '.join(table.columns)}")
    column = table.columns.index(name)
    sides = {int(values[column]) for values in table.rows.values()}
    if not sides <= {-1, 1}:
        raise InputError(f"{table.uri}: column {name!r} holds {sorted(sides - {-1, 1})[0]}; it must hold -1 and 1")
    return column


# --------------------------------------------------------------------------------------------- pictures


def _pictures(source: str, sizes: Mapping[str, int]) -> tuple[dict[str, str], dict[str, int]]:
    """URI of each picture by its name without ending, and sizes where an archive holds them."""
    files = common.picture_files(sizes)
    inside = [file for file in files if PICTURES in file.split("/")[:-1]]
    zips = [file for file in sizes if posixpath.basename(file) == f"{PICTURES}.zip"]
    if not inside and zips:
        uri = storage.join(source, zips[0])
        members = common.Archive(uri).sizes()
        return {_stem(member): f"{uri}!{member}" for member in common.picture_files(members)}, members
    return {_stem(file): storage.join(source, file) for file in inside or files}, {}


def _stem(file: str) -> str:
    return posixpath.splitext(posixpath.basename(file))[0]


def _faces(
    attributes: Table,
    column: int,
    others: Mapping[str, Table | None],
    pictures: Mapping[str, str],
    options: Options,
) -> tuple[list[Face], list[tuple[str, str]], list[str]]:
    """Pictures that are there, with what is known of them, sorted by name; those without a split; notes."""
    names = [name for name in attributes.rows if _stem(name) in pictures]
    if not names:
        raise InputError(
            f"--source {options.source}: none of the {len(attributes.rows):,} pictures that {attributes.uri} lists "
            f"is there; unpack img_align_celeba.zip or copy it into the folder"
        )
    notes = []
    if missing := len(attributes.rows) - len(names):
        notes.append(f"{missing:,} of the pictures that {ATTRIBUTES} lists are not there")
    if options.limit is not None:
        names = sorted(names, key=lambda name: (common.name_hash(name), name))[: options.limit]
    identities, landmarks = others[IDENTITY], others[LANDMARKS]
    splits, how = _splits(sorted(names), others[PARTITION], identities)
    notes.append(how)
    faces = []
    for name in sorted(splits):
        points = None if landmarks is None else landmarks.rows.get(name)
        faces.append(
            Face(
                name=name,
                uri=pictures[_stem(name)],
                domain=int(attributes.rows[name][column] > 0),
                split=splits[name],
                attributes=attributes.rows[name].astype(np.int8),
                identity=int(identities.rows[name][0]) if identities and name in identities.rows else None,
                landmarks=points,
            )
        )
    _check_identities(faces)
    unsplit = [(name, f"not listed in {PARTITION}") for name in sorted(set(names) - set(splits))]
    return faces, unsplit, notes


def _splits(names: Sequence[str], partition: Table | None, identities: Table | None) -> tuple[dict[str, str], str]:
    """Split of each picture, and how it was found."""
    if partition is not None:
        wrong = sorted({int(values[0]) for values in partition.rows.values()} - {0, 1, 2})
        if wrong:
            raise InputError(f"{partition.uri}: split {wrong[0]} is unknown; 0 is train, 1 val, 2 test")
        splits = {name: SPLITS[partition.rows[name][0]] for name in names if name in partition.rows}
        return splits, "official split"
    if identities is not None:
        people = {name: str(identities.rows[name][0]) if name in identities.rows else name for name in names}
        by_person = common.split_names(people.values())
        return {name: by_person[person] for name, person in people.items()}, "split by identity, 80/10/10"
    return common.split_names(names), (
        "split by hash of the name, 80/10/10: without identity_CelebA.txt a person may be in two splits"
    )


def _check_identities(faces: Sequence[Face]) -> None:
    seen: dict[int, str] = {}
    for face in faces:
        if face.identity is not None and seen.setdefault(face.identity, face.split) != face.split:
            raise InputError(
                f"{IDENTITY}.txt and {PARTITION} do not fit: person {face.identity} is in {seen[face.identity]} and in "
                f"{face.split}; take both from the same release, or leave one out"
            )


# --------------------------------------------------------------------------------------------- matching


def match(
    features: Int[np.ndarray, "n a"],
    points: Int[np.ndarray, "n p"] | None,
    candidates: Int[np.ndarray, "m a"],
    candidate_points: Int[np.ndarray, "m p"] | None,
    keys: Sequence[str],
    on_rows: Callable[[int], None] = lambda count: None,
) -> Int[np.ndarray, " n"]:
    """For each row the candidate that differs in the fewest features (-1 or 1), then in the landmarks.

    The cost is LANDMARK_PX2 * (number of differing features) + squared landmark distance: integers below 2^24, so
    float32 products are exact and the answer does not depend on the machine. A hash of `keys` decides ties.
    `on_rows` hears how many more rows are done.
    """
    # |p - q|^2 - |p|^2 = |q|^2 - 2 p.q, and the features differ in (a - f.g) / 2 places: minus the cost is, up to a
    # constant of the row, one matrix product.
    columns, weights = [candidates], [np.full(candidates.shape[1], LANDMARK_PX2 // 2)]
    rows = [features]
    if points is not None and candidate_points is not None:
        columns += [candidate_points, -(candidate_points.astype(np.int64) ** 2).sum(axis=1, keepdims=True)]
        weights += [np.full(points.shape[1], 2), np.ones(1)]
        rows += [points, np.ones((len(points), 1))]
    there = np.concatenate(columns, axis=1).astype(np.float32).T * np.concatenate(weights)[:, None].astype(np.float32)
    here = np.concatenate(rows, axis=1).astype(np.float32)
    out = np.empty(len(here), np.int64)
    for start in range(0, len(here), MATCH_CHUNK):
        scores = here[start : start + MATCH_CHUNK] @ there
        for row, (score, best) in enumerate(zip(scores, scores.max(axis=1), strict=True), start):
            ties = np.flatnonzero(score == best)
            out[row] = ties[int.from_bytes(common.name_hash(keys[row]), "big") % len(ties)]
        on_rows(len(scores))
    return out


def match_faces(faces: Sequence[Face], column: int, options: Options) -> tuple[dict[str, int], str]:
    """Index of each face's counterpart in `faces`, by name, and how good the matches are.

    Raises:
        InputError: a split lacks one of the domains.
    """
    all_attributes = np.stack([face.attributes for face in faces])
    others = np.delete(all_attributes, column, axis=1)
    domain, split = np.array([face.domain for face in faces]), np.array([face.split for face in faces])
    compared = others[:, correlation(others, domain) < options.match_correlation]
    has_points = all(face.landmarks is not None for face in faces)
    points = np.stack([face.landmarks for face in faces if face.landmarks is not None]) if has_points else None
    target = np.full(len(faces), -1)
    with Progress(total=len(faces), description="match") as progress:
        for here, there in _sides(split, domain, options.domain_attribute):
            found = match(
                compared[here],
                None if points is None else points[here],
                compared[there],
                None if points is None else points[there],
                [f"{options.seed}/{faces[row].name}" for row in here.tolist()],
                progress.update,
            )
            target[here] = there[found]
    what = f"{compared.shape[1]} of {others.shape[1]} attributes" + (" and landmarks" if has_points else "")
    note = (
        f"matched by {what}: {(compared != compared[target]).sum(1).mean():.2f} of them and "
        f"{(others != others[target]).sum(1).mean():.2f} of all differ on average, "
        f"a picture serves as match for up to {np.bincount(target).max()} others"
    )
    return {face.name: int(other) for face, other in zip(faces, target, strict=True)}, note


def _sides(split: np.ndarray, domain: np.ndarray, attribute: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of the pictures to match and of their candidates: each split in both directions."""
    for name in sorted(set(split.tolist())):
        without, having = (np.flatnonzero((split == name) & (domain == side)) for side in (0, 1))
        if not len(without) or not len(having):
            raise InputError(
                f"split {name} has {len(without)} pictures without {attribute} and {len(having)} with it; "
                "matching needs both: give more pictures, or --pairing unpaired"
            )
        yield without, having
        yield having, without


def correlation(attributes: Int[np.ndarray, "n a"], domain: Int[np.ndarray, " n"]) -> np.ndarray:
    """(a,) absolute correlation of each attribute with the domain; 0 where one of them is constant."""
    x, y = attributes - attributes.mean(axis=0), domain - domain.mean()
    scale = np.sqrt((x**2).sum(axis=0) * (y**2).sum())
    return np.abs(y @ x) / np.where(scale > 0, scale, np.inf)


# ------------------------------------------------------------------------------------------------- rows


def _make(
    faces: Sequence[Face],
    unsplit: Sequence[tuple[str, str]],
    notes: Sequence[str],
    column: int,
    options: Options,
    scratch: Path,
) -> common.Made:
    pictures = [Picture(name=face.name, uri=face.uri) for face in faces]
    pixels, rejected = common.decode_pictures(pictures, size=options.image_size, halves=False, scratch=scratch)
    usable = [face for face, ok in zip(faces, pixels.ok, strict=True) if ok]
    where = np.flatnonzero(pixels.ok)
    targets: dict[str, int] = {}
    notes = list(notes)
    if options.pairing == "matched":
        targets, note = match_faces(usable, column, options)
        notes.append(note)
    return common.Made(
        rows={split: _rows(usable, where, pixels, split, targets, options.image_size) for split in SPLITS},
        num_rows=len(usable),
        rejected=sorted([*rejected, *unsplit]),
        notes=notes,
    )


def _rows(
    faces: Sequence[Face], where: np.ndarray, pixels: Pixels, split: str, targets: Mapping[str, int], size: int
) -> Iterator[Row]:
    for number, face in enumerate(faces):
        if face.split != split:
            continue
        other = targets.get(face.name)
        yield Row(
            id=face.name,
            domain=face.domain,
            image=pixels[int(where[number]), 0],
            target=None if other is None else pixels[int(where[other]), 0],
            target_id=None if other is None else faces[other].name,
            identity=face.identity,
            attributes=face.attributes.tolist(),
            landmarks=None if face.landmarks is None else stored_landmarks(face.landmarks, size),
        )


def stored_landmarks(points: np.ndarray, size: int) -> list[float]:
    """Landmarks of an aligned picture (178 x 218) in pixels of its centred square of `size`."""
    xy = points.reshape(-1, 2).astype(np.float64)
    side = min(WIDTH, HEIGHT)
    offset = ((WIDTH - side) // 2, (HEIGHT - side) // 2)
    return ((xy - offset) * (size / side)).ravel().tolist()
